"""the real SDKs over real HTTP, and a server that misbehaves."""

import asyncio
import contextlib
import json
import re

import pytest

import rlhf_constructor as rc
from tests.conftest import rows
from tests.server import (
    DASHSCOPE_KEY,
    OPENAI_KEY,
    PAGE,
    Api,
    Fault,
    Reply,
    is_judge,
    judge_reply,
    success,
)
from tests.tiny import LOCAL, ask, run_of

OPENAI = (
    "--provider",
    "openai",
    "--high-model",
    "strong",
    "--low-model",
    "weak",
    "--max-retries",
    2,
)
DASHSCOPE = ("--provider", "dashscope", *OPENAI[2:])
PROMPTS = [{"prompt": f"What is {n} plus {n}?"} for n in range(6)]


def world(call):
    """The strong model is right, the weak one is not, and the judge can tell."""
    if is_judge(call):
        return judge_reply(call, lambda text, slot: 9 if "right" in text else 3)
    return f"A {'right' if call.model == 'strong' else 'mistaken'} answer to: {call.prompt}"


def faulty(fault, when):
    """The world, but calls for which `when` is true meet the fault."""
    return lambda call: fault if when(call) else world(call)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """No real waiting between tries: the seconds that would have been waited."""
    asked = []

    def wait_for(task, seconds):
        asked.append(seconds)
        return WAIT_FOR(task, min(seconds, 0.01))

    monkeypatch.setattr(asyncio, "wait_for", wait_for)
    return asked


WAIT_FOR = asyncio.wait_for
NO_MESSAGE = (
    b'{"choices": [{"finish_reason": "stop"}], "output": {"choices": [{"finish_reason": "stop"}]}}'
)
NO_CONTENT = NO_MESSAGE.replace(b'"}', b'", "message": {"role": "assistant"}}')
FAULTS = {
    kind: Fault(kind=kind)
    for kind in "html garbage empty cut chunked delimited close reset".split()
}
FAULTS |= {kind: Fault(kind=kind) for kind in "not_json_type no_choices null_content".split()}
FAULTS |= {str(status): Fault(status) for status in (408, 409, 500, 502, 503, 504, 529)}
FAULTS |= {
    "HTML labelled JSON": Fault(502, kind="body", body=PAGE.encode()),
    "invalid UTF-8": Fault(200, kind="body", body=b'{"choices": "\xff"}'),
    "an error in a 200": Fault(200, kind="body", body=b'{"error": {"message": "busy"}}'),
    "{}": Fault(200, kind="body", body=b"{}"),
    "[]": Fault(200, kind="body", body=b"[]"),
    "null": Fault(200, kind="body", body=b"null"),
    "null choices": Fault(200, kind="body", body=b'{"choices": null, "output": {"choices": null}}'),
    "no message": Fault(200, kind="body", body=NO_MESSAGE),
    "no content": Fault(200, kind="body", body=NO_CONTENT),
}


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_passing_fault_is_retried_and_a_lasting_one_costs_its_record_only(rlhf, fault, sdk):
    seen = []

    def answer(call):
        if call.model == "weak" and "2 plus" in call.prompt:
            return fault
        if call.model == "weak" and "3 plus" in call.prompt and not seen:
            seen.append(call)
            return fault
        return world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *sdk, api=api)
    assert (result.status, len(result.pairs), len(result.dropped)) == (1, 5, 1)
    assert result.dropped[0]["stage"] == "model" and result.dropped[0]["line"] == 3
    assert all("right" in pair["chosen"] for pair in result.pairs)


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
def test_an_answer_in_parts_is_an_answer(rlhf, sdk):
    parts = Reply(
        "", content=[{"type": "text", "text": "A mistaken "}, {"type": "text", "text": "answer"}]
    )
    with Api(faulty(parts, lambda call: call.model == "weak")) as api:
        [pair] = rlhf(PROMPTS[:1], *sdk, api=api).pairs
    assert pair["rejected"] == "A mistaken answer"


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_a_call_that_never_ends_times_out_and_is_tried_once_more(rlhf, kind, sdk):
    fault = faulty(Fault(kind=kind), lambda call: call.model == "weak" and "2 plus" in call.prompt)
    with Api(fault) as api:
        result = rlhf(PROMPTS, *sdk, "--timeout", 0.5, "--max-retries", 5, api=api)
        assert sum("2 plus" in call.prompt and call.model == "weak" for call in api.calls) == 2
    assert result.reasons == ["model: timeout: weak: no answer in time (--timeout)"]


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
@pytest.mark.parametrize(
    "code", ["invalid_value", "content_policy_violation", "DataInspectionFailed"]
)
def test_a_prompt_that_is_rejected_costs_one_record_and_one_call(rlhf, sdk, code):
    with Api(
        faulty(Fault(400, code=code), lambda c: c.model == "strong" and "2 plus" in c.prompt)
    ) as api:
        result = rlhf(PROMPTS, *sdk, api=api)
    assert (result.status, len(result.pairs), len(result.dropped)) == (0, 5, 1)
    assert api.count("strong") == 6 + 2 * 5


@pytest.mark.parametrize(
    "status, code, says",
    [
        (401, "invalid_api_key", "key was refused"),
        (401, "InvalidApiKey", "key was refused"),
        (403, "AccessDenied.Unpurchased", "key was refused"),
        (429, "billing_not_active", "used up"),
        (429, "exceeded_current_quota_error", "used up"),
        (400, "Arrearage", "used up"),
        (403, "AllocationQuota.FreeTierOnly", "used up"),
        (404, "model_not_found", "no such model"),
        (400, "ModelNotFound", "no such model"),
        (404, "", "no such model"),
        (403, "Forbidden", "no such model or address"),
    ],
)
@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
def test_what_every_call_would_meet_stops_the_run_after_one_call_of_each_model(
    rlhf, sdk, status, code, says
):
    with Api(lambda call: Fault(status, code=code)) as api:
        result = rlhf(PROMPTS * 1, *sdk, api=api)
        assert api.count() <= 2
    assert result.status == 3 and says in result.err and not result.output.exists()


def test_a_stopped_run_goes_on_where_it_stopped(rlhf):
    broke = faulty(Fault(429, code="insufficient_quota"), lambda call: api.count() > 10)
    with Api(broke) as api:
        assert rlhf(PROMPTS, *OPENAI, "--concurrency", 2, api=api).status == 3
        refused, api._answer = api.count() - 10, world
        result = rlhf(PROMPTS, *OPENAI, "--concurrency", 2, api=api)
        assert result.status == 0 and len(result.pairs) == 6
        assert api.count() == 4 * 6 + refused and refused <= 4


def test_the_words_of_an_empty_purse_are_a_throttle_where_the_code_says_so(rlhf):
    calls = []

    def answer(call):
        calls.append(call)
        if len(calls) % 5 == 3:
            return Fault(429, code="Throttling", message="You exceeded your current quota")
        return world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *DASHSCOPE, "--max-retries", 0, api=api)
    assert (result.status, len(result.pairs)) == (0, 6)


@pytest.mark.parametrize(
    "after, seconds", [("7", 7), ("1.5", 1.5), ("86400", 60), ("-3", 0), ("soon", 0)]
)
def test_retry_after_delays_the_refused_call_by_at_most_a_minute(after, seconds):
    assert rc.ApiError(429, "", "", after).retry_after == seconds


def test_retry_after_is_waited_for(rlhf, waits):
    refusals = [Fault(429, headers={"Retry-After": "47"})]
    with Api(lambda call: refusals.pop() if refusals else world(call)) as api:
        assert rlhf(PROMPTS, *OPENAI, "--max-retries", 0, api=api).status == 0
    assert 47 in waits


@pytest.mark.parametrize("after", ["0.01", "1", "Wed, 21 Oct 2026 07:28:00 GMT", "soon"])
def test_a_429_is_no_retry_whatever_its_retry_after_says(rlhf, after):
    calls = []

    def answer(call):
        calls.append(call)
        return Fault(429, headers={"Retry-After": after}) if len(calls) % 3 == 0 else world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *OPENAI, "--max-retries", 0, api=api)
    assert (result.status, len(result.pairs)) == (0, 6)


def test_nothing_but_429_stops_the_run(rlhf, monkeypatch):
    monkeypatch.setattr(rc, "PATIENCE", 0.05)
    with Api(lambda call: Fault(429)) as api:
        result = rlhf(PROMPTS, *OPENAI, api=api)
    assert result.status == 3 and "nothing but 429" in result.err


def test_twenty_failures_alike_in_a_row_stop_the_run(rlhf):
    prompts = [{"prompt": f"Question {n}"} for n in range(200)]
    with Api(faulty(Fault(500), lambda call: call.model == "weak")) as api:
        result = rlhf(prompts, *OPENAI, "--max-retries", 0, "--concurrency", 4, api=api)
        assert result.status == 3 and "20 calls in a row failed alike" in result.err
        assert api.count("weak") <= 20 + 4


def test_failures_with_successes_between_them_do_not_stop_the_run(rlhf):
    prompts = [{"prompt": f"Question {n}"} for n in range(60)]
    with Api(
        faulty(Fault(500), lambda call: call.model == "weak" and call.prompt[-1] != "0")
    ) as api:
        result = rlhf(prompts, *OPENAI, "--max-retries", 0, "--concurrency", 1, api=api)
    assert (result.status, len(result.pairs), len(result.dropped)) == (1, 6, 54)


def test_a_key_that_is_revoked_in_the_middle_stops_the_run_within_the_calls_in_flight(rlhf):
    prompts = [{"prompt": f"Question {n}"} for n in range(200)]
    with Api(faulty(Fault(401), lambda call: api.count("weak") > 30), latency=0.01) as api:
        result = rlhf(prompts, *OPENAI, "--concurrency", 8, api=api)
        assert result.status == 3 and api.count("weak") <= 30 + 8
    assert len(rows(result.output.with_name("out.jsonl.part"))) >= 8, "what was ready is there"


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
@pytest.mark.parametrize("way", ["refused", "no such host", "no TLS"])
def test_a_server_that_is_not_there_stops_the_run(rlhf, sdk, way):
    with Api(world) as api:
        gone = "http://models.invalid/v1" if way == "no such host" else api.openai_url
        if way == "no TLS":
            result = rlhf(PROMPTS, *sdk, "--base-url", gone.replace("http", "https"), api=api)
    if way != "no TLS":
        result = rlhf(PROMPTS, *sdk, "--base-url", gone, "--max-retries", 0)
    assert (
        result.status == 3
        and "cannot be reached" in result.err
        and result.err.count("reached") == 1
    )


def refuses_option(name, message):
    """A server that refuses requests with the option `name`."""

    def answer(call):
        if name in call.params:
            return Fault(400, code="unsupported_parameter", message=message)
        return world(call)

    return answer


@pytest.mark.parametrize(
    "sdk, name, message",
    [
        (OPENAI, "max_tokens", "Unsupported parameter: use 'max_completion_tokens' instead."),
        (OPENAI, "max_tokens", "max_tokens is not supported"),
        (
            OPENAI,
            "temperature",
            "Unsupported value: 'temperature' does not support 0.7 with this model.",
        ),
        (DASHSCOPE, "enable_thinking", "parameter.enable_thinking is not supported by this model"),
    ],
)
def test_a_refused_option_is_changed_once_for_each_model(rlhf, sdk, name, message):
    with Api(refuses_option(name, message)) as api:
        result = rlhf(PROMPTS, *sdk, api=api)
        assert (result.status, len(result.pairs)) == (0, 6)
        assert sum(name in call.params for call in api.calls) == 2  # once for strong, once for weak
        calls = api.count()
        assert (
            rlhf(PROMPTS, *sdk, api=api).status == 0 and api.count() == calls
        )  # the key is what was asked


def test_a_fix_is_learned_once_although_many_calls_are_refused_together(rlhf):
    message = "Unsupported parameter: use 'max_completion_tokens' instead."

    async def answer(call):
        late = call.model == "weak" and api.count("weak") > 1
        await asyncio.sleep(0.02)
        return refuses_option("max_tokens", message)(call) if late else world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *OPENAI, "--max-retries", 0, api=api)
    assert (result.status, len(result.pairs)) == (0, 6)
    assert result.err.count("weak: max_completion_tokens") == 1
    assert sum(call.model == "weak" and "max_tokens" in call.params for call in api.calls) > 3


def test_hybrid_models_do_not_think_at_dashscope_unless_asked_to(rlhf):
    with Api(world) as api:
        rlhf(PROMPTS[:1], *DASHSCOPE, api=api)
        rlhf(PROMPTS[:1], *DASHSCOPE, "--model-option", "strong:enable_thinking=true", api=api)
    assert api.calls[0].params["enable_thinking"] is False
    thinking = [call for call in api.calls if call.params["enable_thinking"]]
    assert {call.model for call in thinking} == {"strong"}


def test_models_behind_the_multimodal_address_are_found_there(rlhf):
    def answer(call):
        if call.model == "strong" and call.protocol != "multimodal":
            return Fault(400, code="InvalidParameter", message="url error, please check url!")
        return world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *DASHSCOPE, api=api)
    assert len(result.pairs) == 6
    assert sum(call.model == "strong" and call.protocol == "dashscope" for call in api.calls) == 1


@pytest.mark.parametrize("text", ["half an ans", ""], ids=["cut", "all spent on thinking"])
def test_a_cut_answer_is_asked_for_once_more_with_twice_the_limit(rlhf, text):
    def answer(call):
        short = call.model == "weak" and call.params["max_tokens"] < 8192
        return Reply(text, finish="length") if short else world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS[:1], *OPENAI, api=api)
        assert len(result.pairs) == 1 and api.count("weak") == 2


def test_an_answer_cut_twice_is_dropped_and_not_paid_for_again(rlhf):
    with Api(
        faulty(Reply("half an ans", finish="length"), lambda call: call.model == "weak")
    ) as api:
        assert rlhf(PROMPTS[:1], *OPENAI, api=api).reasons == [
            "filter: truncated: weak reached --max-tokens"
        ]
        calls = api.count()
        rlhf(PROMPTS[:1], *OPENAI, api=api)
        assert api.count() == calls


def test_thinking_is_no_part_of_an_answer(rlhf):
    def answer(call):
        reply = world(call)
        return (
            f"<think>the other is right? </think>\n\n{reply}"
            if not is_judge(call)
            else f"<think>{{}}</think>{reply}"
        )

    with Api(answer) as api:
        [pair] = rlhf(PROMPTS[:1], *OPENAI, api=api).pairs
    assert pair["chosen"] == "A right answer to: What is 0 plus 0?"


def test_an_unreadable_verdict_is_asked_for_twice_more_then_the_record_is_dropped(rlhf):
    def answer(call):
        return "I like both." if is_judge(call) else world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS[:1], *OPENAI, api=api)
    assert result.reasons[0].startswith("judge: unreadable judge reply")
    assert sum(map(is_judge, api.calls)) == 2 * 3


def scoreless(call):
    return "I like both." if is_judge(call) else world(call)


FIFTY = [{"prompt": f"What is {n} plus {n}?"} for n in range(50)]


def test_a_judge_whose_every_reply_is_unreadable_stops_the_run(rlhf):
    with Api(scoreless) as api:
        result = rlhf(FIFTY, *OPENAI, "--concurrency", 2, api=api)
        judged = sum(map(is_judge, api.calls))
        assert rlhf(FIFTY, *OPENAI, "--concurrency", 2, api=api).status == 3
        paid_again = sum(map(is_judge, api.calls)) - judged
    assert result.status == 3 and "none of its 40 replies as a judge holds a score" in result.err
    assert 40 <= judged < 60 and "stronger --judge-model" in result.err
    assert paid_again < 10, "the cache answers the second run"


def test_a_judge_with_one_readable_reply_goes_on(rlhf):
    def answer(call):
        return world(call) if "What is 0 plus 0?" in call.prompt else scoreless(call)

    with Api(answer) as api:
        result = rlhf(FIFTY, *OPENAI, "--concurrency", 1, api=api)
    assert (len(result.pairs), len(result.dropped)) == (1, 49)


@pytest.mark.parametrize(
    "flags, calls, scores",
    [
        (["--judge-orders", 1], 1, (9.0, 3.0)),
        (["--judge-model", "strong", "--judge-model", "other"], 4, (8.0, 2.5)),
        (
            ["--judge-model", "strong", "--judge-model", "other", "--judge-model", "third"],
            6,
            (9.0, 3.0),
        ),
    ],
    ids=["one order", "the mean of two judges", "the median of three"],
)
def test_judges_and_orders_can_be_chosen(rlhf, flags, calls, scores):
    def answer(call):
        high, low = {"other": (7, 2)}.get(call.model, (9, 3))
        seen = lambda text, slot: high if "right" in text else low
        return judge_reply(call, seen) if is_judge(call) else world(call)

    with Api(answer) as api:
        [pair] = rlhf(PROMPTS[:1], *OPENAI, *flags, api=api).pairs
    assert (pair["score_chosen"], pair["score_rejected"]) == scores
    assert sum(map(is_judge, api.calls)) == calls


def test_without_a_judge_the_rows_carry_no_scores(rlhf):
    with Api(world) as api:
        [pair] = rlhf(PROMPTS[:1], *OPENAI, "--judge-model", "none", api=api).pairs
    assert api.count() == 2 and list(pair)[:4] == ["prompt", "chosen", "rejected", "chosen_model"]


def test_a_reward_model_scores_each_answer_once(rlhf):
    def answer(call):
        if call.protocol == "reward":
            return 2.25 if "right" in call.messages[-1]["content"] else -1.5
        return world(call)

    with Api(answer) as api:
        [pair] = rlhf(PROMPTS[:1], *OPENAI, "--judge-model", f"reward:rm@{api.url}", api=api).pairs
    assert (pair["score_chosen"], pair["score_rejected"]) == (2.25, -1.5)


def test_servers_can_be_mixed_and_one_on_this_machine_gets_no_key(rlhf):
    with Api(world) as cloud, Api(world) as local:
        low = f"openai:weak@{local.openai_url}"
        result = rlhf(PROMPTS, *DASHSCOPE, "--low-model", low, api=cloud)
    assert len(result.pairs) == 6 and local.count("weak") == 6 == len(local.calls)
    assert not any(
        key in str(call.headers) for call in local.calls for key in (OPENAI_KEY, DASHSCOPE_KEY)
    )


def test_with_a_base_url_the_key_is_used_if_there_is_one_and_not_needed(rlhf):
    with Api(world) as api:
        flags = (*OPENAI, "--cache-path", "none", "--base-url", api.openai_url)
        assert rlhf(PROMPTS[:1], *flags).status == 0
        assert not any(OPENAI_KEY in str(call.headers) for call in api.calls)
        assert rlhf(PROMPTS[:1], *flags, OPENAI_API_KEY=OPENAI_KEY).status == 0
        assert api.calls[-1].headers["authorization"] == f"Bearer {OPENAI_KEY}"


def test_one_name_at_two_addresses_is_two_models(rlhf):
    with Api(world) as one, Api(lambda call: world(call).replace("mistaken", "right")) as two:
        flags = ("--high-model", f"m@{two.openai_url}", "--low-model", f"m@{one.openai_url}")
        result = rlhf(PROMPTS, "--provider", "openai", *flags, "--judge-model", "judge", api=one)
    assert len(result.pairs) == 6 and f" {one.count() + two.count()} API calls" in result.err


def test_the_reference_can_be_the_strong_model(rlhf):
    records = [{"instruction": "2 + 2?", "output": "The right answer is 4."}]
    flags = ("--provider", "openai", "--high-model", "reference", "--low-model", "weak")
    with Api(world) as api:
        assert rlhf(records, *flags, api=api).status == 2  # who judges?
        [pair] = rlhf(records, *flags, "--judge-model", "strong", api=api).pairs
        assert pair["chosen_model"] == "reference" and api.count("weak") == 1


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
def test_no_key_reaches_a_file_or_a_message(rlhf, sdk, tmp_path):
    keys = f"{OPENAI_KEY} {DASHSCOPE_KEY}"

    def answer(call):
        if "2 plus" in call.prompt:
            return Fault(400, code=f"bad {keys}", message=f"your key {keys} is fine")
        return world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *sdk, api=api)
        stopped = rlhf(PROMPTS, *sdk, "--seed", 1, "--cache-path", "none", api=api)
    with Api(lambda call: Fault(401, message=f"Incorrect API key provided: {keys}")) as api:
        refused = rlhf([{"prompt": "new"}], *sdk, api=api)
    said = result.out + result.err + stopped.err + refused.err
    said += "".join(path.read_text(errors="ignore") for path in tmp_path.iterdir())
    assert OPENAI_KEY not in said and DASHSCOPE_KEY not in said and "[key]" in said


def test_the_first_call_to_each_model_goes_alone(rlhf):
    early = []

    async def answer(call):
        if not early:
            early.append(call.model)
            await asyncio.sleep(0.2)
            assert sum(c.model == call.model for c in api.calls) == 1
        return world(call)

    with Api(answer) as api:
        assert len(rlhf(PROMPTS, *OPENAI, api=api).pairs) == 6


def test_pacing_settles_under_the_limit_and_loses_nothing(rlhf, monkeypatch):
    monkeypatch.setattr(asyncio, "wait_for", WAIT_FOR)
    prompts = [{"prompt": f"Question {n}"} for n in range(60)]
    flags = ("--judge-model", "none", "--concurrency", 32, "--max-retries", 0)
    with Api(world, limit=60) as api:
        result = rlhf(
            prompts, *OPENAI[:6], *flags, "--cache-path", "none", "--base-url", api.openai_url
        )
    assert (result.status, len(result.pairs)) == (0, 60)
    assert api.count() < 2 * 120, "more calls were refused than answered"


def test_the_cache_key_is_everything_that_changes_the_answer():
    one = [
        "openai",
        "http://a/v1",
        "m",
        [{"role": "user", "content": "q"}],
        {"temperature": 0.7},
        0,
    ]
    changed = [one[:i] + [f"other {part}"] + one[i + 1 :] for i, part in enumerate(one)]
    assert len({rc.digest(*key) for key in [one, *changed]}) == 7


def test_errors_are_never_cached(rlhf):
    with Api(faulty(Fault(500), lambda call: call.model == "weak")) as api:
        rlhf(PROMPTS[:2], *OPENAI, "--max-retries", 0, api=api)
        api._answer = world
        result = rlhf(PROMPTS[:2], *OPENAI, api=api)
    assert (result.status, len(result.pairs)) == (0, 2)


def test_a_proxy_of_the_environment_is_used(rlhf, monkeypatch):
    for sdk, url in (
        (OPENAI, "http://models.invalid/v1"),
        (DASHSCOPE, "http://models.invalid/api/v1"),
    ):
        with Api(
            world
        ) as proxy:  # a forwarding proxy is asked for whole addresses; aiohttp.web takes their path
            env = {"HTTP_PROXY": proxy.url, "http_proxy": proxy.url, "NO_PROXY": "", "no_proxy": ""}
            result = rlhf(PROMPTS[:1], *sdk, "--base-url", url, "--cache-path", "none", **env)
            assert len(result.pairs) == 1 and proxy.count() == 4


def test_an_address_in_no_proxy_is_asked_directly(rlhf):
    for sdk in (OPENAI, DASHSCOPE):
        with Api(world) as api, Api(world) as proxy:
            env = {"HTTP_PROXY": proxy.url, "http_proxy": proxy.url}
            env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
            assert rlhf(PROMPTS[:1], *sdk, "--cache-path", "none", api=api, **env).status == 0
            assert (proxy.count(), api.count()) == (0, 4)


def test_another_address_is_another_key(rlhf):
    with Api(world) as one, Api(world) as two:
        for api in (one, two):
            rlhf(PROMPTS[:1], *OPENAI, api=api)
    assert (one.count(), two.count()) == (4, 4)


def test_replies_are_kept_as_text_and_nothing_else(rlhf, tmp_path):
    with Api(world) as api:
        rlhf(PROMPTS[:1], *OPENAI, api=api)
    cache = tmp_path / ".rlhf_cache.sqlite"
    assert cache.stat().st_mode & 0o777 == 0o600
    kept = rc.sqlite3.connect(cache).execute("SELECT text FROM replies").fetchall()
    assert (
        len(kept) == 4
        and sum("scores" in json.loads(text) for (text,) in kept if text[0] == "{") == 2
    )


async def turns(endpoint, count):
    """The times at which so many calls may start, without waiting for them."""

    async def pause(seconds):
        pass

    return [await endpoint.wait_for_turn(pause) for _ in range(count)]


def test_the_first_guess_of_a_rate_is_what_came_through_the_first_burst():
    endpoint = rc.Endpoint(rc.Model("openai", "m"), None)
    starts = asyncio.run(turns(endpoint, 64))
    for start in starts[:14]:
        endpoint.on_rate_limit(start)
    assert endpoint.rate == pytest.approx(50, rel=0.01)


def test_a_throttle_on_the_very_first_call_does_not_put_the_run_to_sleep():
    endpoint = rc.Endpoint(rc.Model("openai", "m"), None)
    [start] = asyncio.run(turns(endpoint, 1))
    endpoint.on_rate_limit(start)
    assert endpoint.rate == 0.5


@pytest.mark.parametrize(
    "starts, refusals, rate",
    [(50, 0, 52.5), (50, 5, 47.5), (50, 40, 40), (20, 0, 50), (50, 1, 52.5)],
)
def test_a_rate_follows_what_came_through_in_small_steps(starts, refusals, rate):
    endpoint = rc.Endpoint(rc.Model("openai", "m"), None)
    endpoint.rate, endpoint.starts, endpoint.refusals = 50.0, starts, refusals
    endpoint.adjust_rate(endpoint.since + 1)
    assert endpoint.rate == pytest.approx(rate) and endpoint.starts == 0


def test_an_answer_all_spent_on_thinking_is_called_truncated(rlhf):
    with Api(faulty(Reply("", finish="length"), lambda call: call.model == "weak")) as api:
        assert rlhf(PROMPTS[:1], *OPENAI, api=api).reasons == [
            "filter: truncated: weak reached --max-tokens"
        ]


# --- tokens that are billed, and what they may cost


def bare(call, text, choices=True, usage=None):
    """A 200 with this text and this usage, none if it is None."""
    body = success(call, Reply(text), choices)
    return Fault(200, kind="body", body=json.dumps(body | {"usage": usage}).encode())


PRICE = ("--price", "strong=1000/1000", "--price", "weak=1000/1000", "--max-tokens", 200)


def billed():
    """[(model, tokens in, tokens out), ...] of the books."""
    cache = rc.Cache(".rlhf_cache.sqlite")
    with contextlib.closing(cache):
        return cache.do("SELECT model, sum(tokens_in), sum(tokens_out) FROM replies GROUP BY model")


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
def test_a_reply_that_bills_no_tokens_costs_what_its_text_would(rlhf, sdk):
    with Api(lambda call: bare(call, world(call))) as api:
        result = rlhf(PROMPTS, *sdk, *PRICE, "--max-cost", 2, api=api)
        assert result.status == 3 and "exceed --max-cost 2: " in result.err
        assert result.err.count("weak: bills no tokens: they are estimated from the text") == 1
        assert all(into and out for _, into, out in billed()) and api.count() < 24


def test_a_reward_model_is_billed_by_its_usage(rlhf):
    def answer(call):
        if call.protocol == "reward":
            return Reply(
                str(float("right" in call.messages[-1]["content"])), tokens_in=5000, tokens_out=0
            )
        return world(call)

    with Api(answer) as api:
        rlhf(
            PROMPTS,
            *OPENAI,
            "--judge-model",
            f"reward:rm@{api.url}",
            "--min-score-gap",
            0.5,
            api=api,
        )
        assert dict(row[:2] for row in billed())["rm"] == 12 * 5000


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
def test_a_billed_reply_without_choices_stands_in_the_books(rlhf, sdk):
    usage = dict.fromkeys(
        ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"), 70
    )
    with Api(lambda call: bare(call, "", choices=False, usage=usage)) as api:
        rlhf(PROMPTS[:1], *sdk, api=api)
        assert sorted(billed()) == [(model, 2 * 70, 2 * 70) for model in ("strong", "weak")]


def test_no_pair_stands_whose_rejected_answer_alone_has_votes():
    made = (
        rc.Answer("It is 42.", score=9.0),
        rc.Answer("It is 43, is it not?", score=3.0, votes=(9.0,)),
    )
    assert "judge both answers together" in rc.wrong_pairs([rc.Pair(ask(), *made)])


# --- one reading of an error


def one_call_stops(rlhf, fault, *flags, **env):
    """What a run says that its first call stops."""
    with Api(lambda call: fault) as api:
        result = rlhf(PROMPTS, *OPENAI, *flags, api=api, **env)
        assert result.status == 3 and api.count() <= 2, result.err
    return result.err


def refusal(status, body):
    """A refusal with this JSON body."""
    return Fault(status, kind="body", body=json.dumps(body).encode())


@pytest.mark.parametrize(
    "fault, says",
    [
        (Fault(429, code="insufficient_quota"), "used up"),
        (refusal(403, {"error": {"code": 403, "message": "Key limit exceeded (total)"}}), "used up"),
        (refusal(429, {"error": {"type": "exceeded_current_quota_error", "message": "x"}}), "used up"),
        (
            refusal(400, [{"error": {"code": 400, "message": "API key not valid.", "status": "X"}}]),
            "the key was refused: check OPENAI_API_KEY",
        ),
        (
            refusal(403, {"error": {"code": "unsupported_country_region_territory",
                                    "message": "Country, region, or territory not supported"}}),
            "refuses calls from this region",
        ),
        (Fault(200, kind="not_json_type"), "is /v1 missing in the address?"),
        (Fault(404, kind="html"), "is /v1 missing in the address?"),
        (Fault(400, message="temperature must be between 0 and 1"), "choose another --temperature"),
    ],
)  # fmt: skip
def test_a_first_error_that_every_call_would_meet_stops_the_run_with_advice(rlhf, fault, says):
    assert says in one_call_stops(rlhf, fault)


def test_a_page_that_comes_from_dashscopes_address_stops_the_run(rlhf):
    with Api(lambda call: Fault(kind="not_json_type")) as api:
        result = rlhf(PROMPTS, *DASHSCOPE, api=api)
        assert result.status == 3 and "a web page came" in result.err and api.count() <= 2


def test_dashscopes_insufficient_quota_is_a_rate_limit_and_is_waited_for(rlhf):
    refusals = [Fault(429, code="insufficient_quota")]
    with Api(lambda call: refusals.pop() if refusals else world(call)) as api:
        assert rlhf(PROMPTS, *DASHSCOPE, "--max-retries", 0, api=api).status == 0
    model = rc.Model("openai", "qwen", "https://dashscope.aliyuncs.com/compatible-mode/v1")
    assert rc.find_rule(rc.ApiError(429, "insufficient_quota", ""), model, False).action == "wait"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(404, code="model_not_found"),
        refusal(404, {"error": "model 'strong' not found, try pulling it first"}),
        refusal(
            400, {"error": {"message": "Invalid model name passed in model=strong", "code": "400"}}
        ),
        refusal(400, {"error": {"message": "strong is not a valid model ID", "code": 400}}),
    ],
)
def test_an_unknown_model_is_told_what_the_server_serves_nearest_first(rlhf, fault):
    with Api(lambda call: fault) as api:
        api.models = ["aaa", "bbb", "ccc", "ddd", "strong-2", "eee"]
        result = rlhf(PROMPTS, *OPENAI, "--judge-model", "none", api=api)
    assert result.status == 3 and "there is no such model" in result.err
    said = re.search("the server serves (.*?) and 1 more", result.err)[1]
    assert len(said.split(", ")) == 5 and ("strong-2" in said) == ("strong:" in result.err)


def test_an_unknown_model_at_dashscope_is_told_the_usual_ones(rlhf):
    with Api(lambda call: Fault(400, code="InvalidParameter", message="Model not exist.")) as api:
        result = rlhf(PROMPTS, *DASHSCOPE, api=api)
    assert all(name in result.err for name in rc.DEFAULT_MODELS["dashscope"])


def test_a_server_without_classify_is_no_reward_models(rlhf):
    def answer(call):
        return (
            Fault(404, kind="text", body=b"Not Found") if call.protocol == "reward" else world(call)
        )

    with Api(answer) as api:
        result = rlhf(PROMPTS, *OPENAI, "--judge-model", f"reward:rm@{api.url}", api=api)
    assert result.status == 3 and "this server has no /classify" in result.err


TOO_LONG = {
    "vLLM": "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens.",
    "OpenAI": "Input tokens exceed the configured limit: context_length_exceeded",
    "DashScope": "Range of input length should be [1, 30720]",
    "llama.cpp": "the request exceeds the available context size. try increasing the context size",
    "Anthropic": "prompt is too long: 250000 tokens > 200000 maximum",
}


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
@pytest.mark.parametrize("words", TOO_LONG.values(), ids=TOO_LONG)
def test_a_prompt_that_is_too_long_costs_its_record_and_one_call(rlhf, sdk, words):
    code = "context_length_exceeded" if "context_length" in words else "invalid_request_error"
    long = Fault(400, code=code, message=words)
    with Api(faulty(long, lambda call: call.model == "weak" and "2 plus" in call.prompt)) as api:
        result = rlhf(PROMPTS, *sdk, api=api)
        assert (result.status, api.count("weak")) == (0, 6)
    assert result.reasons[0].startswith("model: prompt too long for the model: weak: 400")


def test_long_prompts_in_a_row_do_not_stop_the_run(rlhf):
    prompts = [{"prompt": f"Question {n}"} for n in range(30)]
    long = Fault(400, message=TOO_LONG["DashScope"])
    with Api(faulty(long, lambda call: call.prompt != "Question 0")) as api:
        result = rlhf(prompts, *OPENAI, "--judge-model", "none", api=api)
    assert (result.status, len(result.dropped)) == (0, 29)


def test_404s_in_mid_run_are_worth_another_run(rlhf):
    with Api(faulty(Fault(404), lambda c: c.model == "weak" and "0 plus" not in c.prompt)) as api:
        result = rlhf(PROMPTS, *OPENAI, "--concurrency", 1, api=api)
    assert result.status == 1 and len(result.pairs) == 1
    assert result.reasons[0].startswith("model: model unavailable: weak: 404")


def test_a_dead_proxy_is_named(rlhf):
    for sdk in (OPENAI, DASHSCOPE):
        dead = "http://me:secret@127.0.0.1:9"
        env = {"HTTP_PROXY": dead, "http_proxy": dead, "NO_PROXY": "", "no_proxy": ""}
        flags = ("--base-url", "http://models.invalid/api/v1", "--max-retries", 0)
        result = rlhf(PROMPTS, *sdk, *flags, **env)
        assert result.status == 3 and "secret" not in result.err
        assert re.search("the proxy 127.0.0.1:9 in http_proxy: does it run", result.err, re.I)


def test_a_stale_certificate_file_is_named(rlhf):
    env = {"SSL_CERT_FILE": "/nowhere/ca.pem", "OPENAI_API_KEY": "k" * 9}
    result = rlhf(PROMPTS, *OPENAI, "--base-url", "https://models.invalid/v1", **env)
    assert result.status == 3 and "SSL_CERT_FILE names /nowhere/ca.pem" in result.err


def test_a_certificate_that_is_not_trusted_has_its_own_advice():
    failure = type("SSLCertVerificationError", (OSError,), {})("self-signed certificate")
    error = rc.read_error(failure)
    rule = rc.find_rule(error, rc.Model("openai", "m"), False)
    assert rule.action == "stop" and "certificate is not trusted" in rule.advice


# --- requests that are refused


def limited(most, words):
    """A server whose models take at most so many max_tokens."""

    def answer(call):
        asked = call.params.get("max_tokens", 0)
        return Fault(400, message=words) if asked > most else world(call)

    return answer


LIMITS = {
    "DashScope": "Range of max_tokens should be [1, 2048]",
    "OpenAI": "max_tokens is too large: 4096. This model supports at most 2048 completion tokens",
    "Groq": "`max_tokens` must be less than or equal to `2048`",
    "TGI": "`max_new_tokens` must be <= 2048. Given: 4096",
    "Anthropic": "max_tokens: 4096 > 2048, which is the maximum allowed number of output tokens",
}


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
@pytest.mark.parametrize("words", LIMITS.values(), ids=LIMITS)
def test_a_models_limit_is_read_in_the_refusal_and_used(rlhf, sdk, words):
    with Api(limited(2048, words)) as api:
        result = rlhf(PROMPTS, *sdk, api=api)
        assert [call.params["max_tokens"] for call in api.calls].count(4096) == 2
    assert len(result.pairs) == 6 and "weak: max_tokens 2,048, the model's limit" in result.err


def test_a_context_that_is_nearly_full_leaves_a_shorter_answer_to_this_request_only(rlhf):
    words = (
        "'max_tokens' or 'max_completion_tokens' is too large: 4096. This model's maximum context length "
        "is 4096 tokens and your request has 96 input tokens (4096 > 4096 - 96)."
    )
    with Api(limited(4000, words)) as api:
        result = rlhf(PROMPTS, *OPENAI, "--judge-model", "none", api=api)
        assert {call.params["max_tokens"] for call in api.calls} == {4096, 4000}
    assert len(result.pairs) == 6 and result.err.count("weak: max_tokens is lowered") == 1


def test_a_fix_that_does_not_help_is_not_kept(rlhf):
    """one 400 that merely mentions temperature"""
    odd = Fault(400, message="the temperature of this text cannot be measured")
    with Api(faulty(odd, lambda c: "2 plus" in c.prompt and c.model == "weak")) as api:
        result = rlhf(PROMPTS, *OPENAI, "--concurrency", 1, api=api)
        assert all("temperature" in c.params for c in api.calls if "2 plus" not in c.prompt)
    assert "as the server asks" not in result.err and len(result.pairs) == 5


def test_the_users_own_limit_stands_where_max_tokens_is_renamed(rlhf):
    words = "Unsupported parameter: use 'max_completion_tokens' instead."
    with Api(refuses_option("max_tokens", words)) as api:
        flags = ("--model-option", "max_completion_tokens=100")
        assert rlhf(PROMPTS[:1], *OPENAI, *flags, api=api).status == 0
    assert {c.params["max_completion_tokens"] for c in api.calls} == {100}


def test_a_system_turn_is_folded_into_the_users_where_there_is_no_such_role(rlhf):
    def answer(call):
        if call.model == "weak" and call.messages[0]["role"] == "system":
            return Fault(400, message="System role not supported")
        return world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *OPENAI, "--system-prompt", "Be brief.", api=api)
    folded = [c for c in api.calls if c.model == "weak" and len(c.messages) == 1]
    assert len(result.pairs) == 6 and folded[0].prompt.startswith("Be brief.\n\nWhat is")


def test_modelscopes_wording_about_thinking_is_understood(rlhf):
    words = "parameter.enable_thinking only support stream call: enable thinking can not be support when `stream=False`"

    def answer(call):
        refused = call.model == "weak" and call.params.get("enable_thinking") is not False
        return Fault(400, message=words) if refused else world(call)

    with Api(answer) as api:
        assert len(rlhf(PROMPTS, *OPENAI, api=api).pairs) == 6


def test_the_second_request_that_is_refused_is_no_failure_and_is_not_tried_again(rlhf):
    """a cut reply at the context's end: twice as many tokens do not fit"""
    prompts = [{"prompt": f"Question {n}"} for n in range(30)]

    def answer(call):
        if call.model != "weak":
            return world(call)
        if call.params["max_tokens"] > 4096:
            return Fault(400, message="requested tokens exceed context window of 4096")
        return Reply("half an ans", finish="length")

    with Api(answer) as api:
        flags = ("--judge-model", "none", "--concurrency", 1)
        result = rlhf(prompts, *OPENAI, *flags, api=api)
        assert api.count("weak") == 31 and len(result.dropped) == 30
    assert set(result.reasons) == {"filter: truncated: weak reached --max-tokens"}


def test_an_interrupted_run_asks_cut_answers_for_longer_on_a_server_that_needs_a_fix(rlhf):
    """the first reply is cached, so the longer request is the first that the server refuses"""
    words = "Unsupported parameter: use 'max_completion_tokens' instead."
    down = [True]

    def answer(call):
        limit = call.params.get("max_completion_tokens")
        if call.model != "weak" or (limit and limit > 4096 and not down):
            return world(call)
        if not limit:
            return Fault(400, message=words)
        return Fault(503) if limit > 4096 else Reply("half", finish="length")

    with Api(answer) as api:
        assert rlhf(PROMPTS[:2], *OPENAI, api=api).status == 1
        down.clear()
        assert len(rlhf(PROMPTS[:2], *OPENAI, api=api).pairs) == 2


def test_a_cut_answer_whose_second_request_met_a_503_is_worth_another_run(rlhf):
    def answer(call):
        if call.model != "weak":
            return world(call)
        return Fault(503) if call.params["max_tokens"] > 4096 else Reply("half", finish="length")

    with Api(answer) as api:
        result = rlhf(PROMPTS[:2], *OPENAI, api=api)
    assert result.status == 1 and result.reasons[0].startswith("model: server error: weak: 503")


# --- who answers, and what is waited for


def answered_by(names, world=world):
    """A server that answers under these names."""
    return lambda call: Reply(world(call), model=names.get(call.model, call.model))


def test_another_name_than_was_asked_for_is_noted_once(rlhf):
    with Api(answered_by({"weak": "gemma-3"})) as api:
        result = rlhf(PROMPTS, *OPENAI, api=api)
    assert result.err.count("asked for weak, the server answers as gemma-3") == 1
    assert len(result.pairs) == 6


def test_one_model_that_answers_for_both_stops_the_run(rlhf):
    with Api(answered_by({"weak": "gemma-3", "strong": "gemma-3"})) as api:
        result = rlhf(PROMPTS, *OPENAI, api=api)
    assert result.status == 3 and "are both answered by gemma-3" in result.err


def test_a_rerun_on_the_cached_replies_of_one_model_stops_again_without_a_call(rlhf):
    with Api(answered_by({"weak": "gemma-3", "strong": "gemma-3"})) as api:
        rlhf(PROMPTS[:1], *OPENAI, api=api)
        assert api.count() == 2
        result = rlhf(PROMPTS[:1], *OPENAI, api=api)
        assert result.status == 3 and "are both answered by gemma-3" in result.err
        assert api.count() == 2


def test_a_cache_of_an_older_version_is_used(rlhf, tmp_path):
    path = tmp_path / ".rlhf_cache.sqlite"
    with Api(world) as api:
        rlhf(PROMPTS[:1], *OPENAI, api=api)
        calls = api.count()
        with contextlib.closing(rc.sqlite3.connect(path)) as db:
            db.execute("ALTER TABLE replies DROP COLUMN served")
            db.execute("ALTER TABLE replies DROP COLUMN payer")
            db.execute("DROP TABLE batches")
        as_it_was = path.read_bytes()
        dry = rlhf(PROMPTS[:1], *OPENAI, "--dry-run", api=api)
        assert dry.status == 0 and f"{calls} are cached, 0 to pay" in dry.out
        assert path.read_bytes() == as_it_was
        assert rlhf(PROMPTS[:1], *OPENAI, api=api).status == 0 and api.count() == calls


@pytest.mark.parametrize(
    "asked, served, same",
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("qwen/qwen3-8b", "Qwen3-8B", True),
        ("llama3", "llama3:latest", True),
        ("Qwen2.5-7B", "/models/qwen2.5-7b-q4_k_m.gguf", True),
        ("gpt-4", "gpt-4o", False),
        ("big", "gemma-3", False),
    ],
)
def test_dated_names_owners_and_paths_mean_the_same_model(asked, served, same):
    assert rc.same_model(asked, served) == same


def test_a_server_that_reads_a_part_of_a_prompt_is_noted(rlhf):
    prompts = [{"prompt": f"Question {n}: " + "long words " * 4000} for n in range(2)]
    with Api(lambda call: Reply(world(call), tokens_in=2050)) as api:
        result = rlhf(prompts, *OPENAI, "--judge-model", "none", api=api)
    assert result.err.count("weak: the server read 2,050 of about 11,0") == 1


def test_the_first_retry_says_what_is_waited_for(rlhf):
    faults = [Fault(503, message="loading")]
    with Api(lambda call: faults.pop() if faults else world(call)) as api:
        result = rlhf(PROMPTS, *OPENAI, api=api)
        assert re.search(
            rf"waiting for \w+ at {api.url}/v1: 503 .*loading; trying again", result.err
        )


def test_a_slow_first_reply_is_said_to_be_waited_for(rlhf, monkeypatch):
    monkeypatch.setattr(rc, "SLOW_SECONDS", 0.05)

    async def answer(call):
        await asyncio.sleep(0.3 if call.model == "weak" and api.count("weak") == 1 else 0)
        return world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *OPENAI, api=api)
        assert result.err.count(f"waiting for weak at {api.url}/v1: no reply to the first") == 1


def test_a_server_that_goes_away_in_mid_run_stops_it_and_the_other_model(rlhf):
    prompts = [{"prompt": f"Question {n}"} for n in range(2000)]

    def leave_after_five(call):
        if local.count() == 5:
            local._loop.call_soon(local._loop.create_task, local._runner.cleanup())
        return world(call)

    with Api(world) as cloud, Api(leave_after_five) as local:
        low = f"openai:weak@{local.openai_url}"
        result = rlhf(prompts, *OPENAI, "--low-model", low, api=cloud)
        assert cloud.count() < 1000, "not asked on for all records"
    assert result.status == 3 and "weak: the server cannot be reached" in result.err


def test_replies_are_counted_as_they_come():
    run = run_of()
    assert run.models.replies == run.models.in_flight == 0


# --- names, addresses, budgets


@pytest.mark.parametrize(
    "url, private",
    [
        ("http://gpu-box:8000/v1", True),
        ("http://[fd00::5]:8000/v1", True),
        ("http://llm.internal/v1", True),
        ("http://nas.lan/v1", True),
        ("http://host.docker.internal:11434/v1", True),
        ("http://169.254.1.1/v1", True),
        ("http://10.evil.com/v1", False),
        ("http://8.8.8.8/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
def test_a_private_address_gets_no_key(url, private):
    assert rc.is_private(url) == private


def test_an_address_with_a_query_is_refused_with_azures_form(rlhf):
    url = "https://x.openai.azure.com/openai?api-version=2024-06-01"
    result = rlhf(PROMPTS, *OPENAI, "--base-url", url, OPENAI_API_KEY="k" * 9)
    assert result.status == 2 and "a base URL takes no query" in result.err
    assert "https://NAME.openai.azure.com/openai/v1" in result.err


def test_a_candidate_model_named_twice_has_samples_of_its_own():
    model = f"openai:m{LOCAL}"
    flags = ("--method", "generate_pairs", "--judge-model", model)
    run = run_of(*flags, "--candidate-models", model, model)
    assert [sample for _, sample in run.candidates] == [0, 1, 2, 3]


def test_one_name_at_two_addresses_is_told_apart_in_rows(rlhf):
    with Api(world) as one, Api(lambda call: world(call).replace("mistaken", "right")) as two:
        flags = ("--high-model", f"m@{two.openai_url}", "--low-model", f"m@{one.openai_url}")
        [pair] = rlhf(
            PROMPTS[:1], "--provider", "openai", *flags, "--judge-model", "j", api=one
        ).pairs
        assert pair["chosen_model"] == f"m@{two.openai_url}"
        assert pair["rejected_model"] == f"m@{one.openai_url}"


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
def test_another_seed_draws_answers_anew_and_is_sent(rlhf, sdk):
    with Api(world) as api:
        rlhf(PROMPTS[:1], *sdk, "--judge-model", "none", api=api)
        assert all("seed" not in call.params for call in api.calls)
        for seed in (1, 1, 2):
            rlhf(PROMPTS[:1], *sdk, "--judge-model", "none", "--seed", seed, api=api)
        assert api.count("weak") == 3 and len({c.params.get("seed") for c in api.calls}) == 3


def test_a_server_that_takes_no_seed_is_asked_without(rlhf):
    with Api(refuses_option("seed", "Unrecognized request argument: seed")) as api:
        assert len(rlhf(PROMPTS, *OPENAI, "--seed", 3, api=api).pairs) == 6


def test_the_budget_ends_a_run_within_the_calls_in_flight_and_counts_all_runs(rlhf):
    flags = (*OPENAI, "--judge-model", "none", *PRICE, "--concurrency", 1)
    with Api(lambda call: Reply(world(call), tokens_in=100, tokens_out=100)) as api:
        result = rlhf(PROMPTS, *flags, "--max-cost", 1, api=api)
        assert result.status == 3 and "exceed --max-cost 1: " in result.err
        assert 4 <= api.count() <= 6, "a call costs 0.2"
        calls = api.count()
        assert rlhf(PROMPTS, *flags, "--max-cost", 1, api=api).status == 3 and api.count() == calls
        assert rlhf(PROMPTS, *flags, "--max-cost", 9, api=api).status == 0 and api.count() == 12


def test_calls_in_flight_are_bounded_by_the_files_that_may_be_open(rlhf, monkeypatch):
    monkeypatch.setattr(rc, "most_calls", lambda: 3)
    with Api(world, latency=0.01) as api:
        result = rlhf(PROMPTS, *OPENAI, api=api)
        assert api.peak <= 3 and len(result.pairs) == 6
    assert "at most 3 calls at once" in result.err
