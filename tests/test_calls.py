"""the real SDKs over real HTTP, and a server that misbehaves."""

import asyncio
import contextlib
import json
import random

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
from tests.tiny import ask, run_of

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
        assert rlhf(PROMPTS[:1], *OPENAI, api=api).reasons == ["filter: truncated"]
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
    assert result.reasons[0].startswith("judge: unreadable verdict")
    assert sum(map(is_judge, api.calls)) == 2 * 3


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
    assert len(result.pairs) == 6 and f"= {one.count() + two.count()} calls" in result.err


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
        assert rlhf(PROMPTS[:1], *OPENAI, api=api).reasons == ["filter: truncated"]


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
        assert result.status == 3 and "--max-cost 2 is reached" in result.err
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
    with pytest.raises(ValueError):
        run_of().check_pair(rc.Pair(ask(), *made))
