"""§7: one reading of a reply, and what a provider is; the real SDKs over real HTTP where servers matter."""

import doctest

import pytest

import rlhf_constructor as rc
from tests.server import Api, Fault, Reply, is_judge, judge_reply
from tests.tiny import wait, why

OPENAI = ("--provider", "openai", "--high-model", "strong", "--low-model", "weak")
DASHSCOPE = ("--provider", "dashscope", *OPENAI[2:])
BOTH = pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
PROMPTS = [{"prompt": f"What is {n} plus {n}?"} for n in range(3)]


def world(call):
    """The strong model is right, the weak one is not, and the judge can tell."""
    if is_judge(call):
        return judge_reply(call, lambda text, slot: 9 if "right" in text else 3)
    return f"A {'right' if call.model == 'strong' else 'mistaken'} answer to: {call.prompt}"


def weak(reply):
    """The world, but this is the weak model's reply."""
    return lambda call: reply if call.model == "weak" else world(call)


# --- finish reasons


FINISH = {
    "stop": ["stop", "STOP", "end_turn", "eos", "eos_token", "", "null", None, "stop_sequence"],
    "length": ["length", "max_tokens", "MAX_TOKENS", "model_length"],
    "content_filter": ["content_filter", "SAFETY", "RECITATION", "PROHIBITED_CONTENT", "sensitive"],
    "": ["error", "abort", "insufficient_system_resource", "tool_calls", "who knows", 5, []],
}


@pytest.mark.parametrize("kind, reason", [(kind, r) for kind, rs in FINISH.items() for r in rs])
def test_a_finish_reason_has_one_of_four_meanings(kind, reason):
    assert rc.finish_kind(reason) == kind


@BOTH
@pytest.mark.parametrize("reason", ["error", "insufficient_system_resource", "abort"])
def test_a_reply_that_failed_half_way_is_asked_for_again_and_never_taken_as_whole(
    rlhf, sdk, reason
):
    halves = [Reply("A mistaken ans", finish=reason)]
    with Api(lambda call: halves.pop() if call.model == "weak" and halves else world(call)) as api:
        result = rlhf(PROMPTS[:1], *sdk, api=api)
    assert [pair["rejected"] for pair in result.pairs] == [
        "A mistaken answer to: What is 0 plus 0?"
    ]


@BOTH
@pytest.mark.parametrize("text", ["", "A half answer"])
def test_a_filtered_answer_costs_one_call_and_is_remembered(rlhf, sdk, text):
    withheld = Reply(text, finish="content_filter", content=text or None)
    with Api(weak(withheld)) as api:
        result = rlhf(PROMPTS[:1], *sdk, api=api)
        assert result.reasons[0].startswith("model: content filter: weak: ")
        assert rlhf(PROMPTS[:1], *sdk, api=api).status == 1 and api.count("weak") == 1


def test_many_filtered_answers_in_a_row_do_not_stop_the_run(rlhf):
    prompts = [{"prompt": f"What is {n} plus {n}?"} for n in range(25)]
    with Api(weak(Reply("", finish="content_filter", content=None))) as api:
        result = rlhf(prompts, *OPENAI, "--judge-model", "none", api=api)
    assert (result.status, len(result.dropped)) == (1, 25)


@BOTH
def test_no_content_at_the_limit_is_a_cut_reply(rlhf, sdk):
    def answer(call):
        short = call.model == "weak" and call.params["max_tokens"] == 4096
        return Reply("", finish="length", content=None) if short else world(call)

    with Api(answer) as api:
        assert len(rlhf(PROMPTS[:1], *sdk, api=api).pairs) == 1 and api.count("weak") == 2


def test_the_text_of_a_refusal_field_is_the_answer(rlhf):
    refusal = Reply("", content=None, more={"refusal": "A mistaken refusal."})
    with Api(weak(refusal)) as api:
        [pair] = rlhf(PROMPTS[:1], *OPENAI, api=api).pairs
    assert pair["rejected"] == "A mistaken refusal."


@BOTH
def test_thoughts_without_an_answer_cost_one_call_and_say_what_helps(rlhf, sdk):
    thoughts = Reply("", content=None, more={"reasoning_content": "Two and two ..."})
    with Api(weak(thoughts)) as api:
        result = rlhf(PROMPTS[:1], *sdk, api=api)
        rlhf(PROMPTS[:1], *sdk, api=api)
        assert api.count("weak") == 1
    assert "model: only thoughts came: weak: raise --max-tokens" in result.reasons[0]


def test_an_error_inside_a_200_has_the_status_that_it_names(rlhf):
    body = b'{"choices": null, "error": {"code": 429, "message": "slow down"}}'
    busy = [Fault(200, kind="body", body=body)]
    with Api(lambda call: busy.pop() if call.model == "weak" and busy else world(call)) as api:
        result = rlhf(PROMPTS[:1], *OPENAI, "--max-retries", 0, api=api)
    assert len(result.pairs) == 1 and "waiting for weak" in result.err


# --- the answer in a reply


ANSWERS = {
    "think": ("<think>hm</think>Paris", "Paris"),
    "capitals": ("<Think>hm</THINK>\n\nParis", "Paris"),
    "thought": ("<thought>hm</thought>\nParis", "Paris"),
    "reasoning": ("<reasoning>\nhm\n</reasoning>\nParis", "Paris"),
    "Magistral": ("[THINK]hm[/THINK]Paris", "Paris"),
    "Kimi": ("◁think▷hm◁/think▷Paris", "Paris"),
    "gpt-oss without marks": ("analysisWe need one word.assistantfinalParis", "Paris"),
    "gpt-oss": (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Paris<|return|>",
        "Paris",
    ),
    "gpt-oss, no final channel": ("<|channel|>analysis<|message|>hm", ""),
    "opened in the prompt": ("hm\n</think>\n\nParis", "Paris"),
    "a draft that never ends": ("<reasoning>It is Rome.", ""),
    "a quoted mark in thoughts": ("<think>he asks about `</think>`\n</think>\nParis", "Paris"),
    "speaks of the mark": ("R1 ends its thoughts with </think> and answers.",) * 2,
    "speaks of it in code": ("It ends with `</think>`.",) * 2,
    "an analysis": ("analysis of the data shows 4.",) * 2,
    "a closing mark in a code block": ("So:\n```\nhm\n</think>\nParis\n```",) * 2,
    "an assistant in an analysis": ("analysis by the assistant final version: 4.",) * 2,
    "a channel of thoughts": ("<|channel>thought\nhm<channel|>Paris", "Paris"),
    "an element of XML": ("<reason> is the XML element to use.",) * 2,
    "indented code": ("<think>hm</think>\n\n    x = 1\n    y = 2\n", "    x = 1\n    y = 2"),
    "a tokenizer's space": (" Paris ", "Paris"),
}


@pytest.mark.parametrize("text, answer", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_the_reply_without_its_thoughts(text, answer):
    assert rc.answer_text(text) == answer


ENDED = {
    "another turn": ("Paris.<|im_end|>\n<|im_start|>user\nAnd Rome?", "Paris."),
    "turns without marks": ("Paris.<|im_end|>\nuser\nAnd Rome?", "Paris."),
    "Gemma": ("Paris.<end_of_turn>\n<start_of_turn>user\nAnd Rome?", "Paris."),
    "Llama": ("Paris.<|eot_id|><|start_header_id|>user", "Paris."),
    "at the end": ("Paris.</s>", "Paris."),
}
NOT_ENDED = {
    "quoted": "A turn ends with `<|im_end|>`\nin ChatML.",
    "an example": "```\n<|im_start|>user\nHi<|im_end|>\n```",
    "a tag at a line's end": "In HTML, end struck text with </s>\nas here.",
    "struck out": "<s>Rome</s>\nParis",
    "in a sentence": "The mark <|im_end|> ends a turn.",
}


def test_the_end_of_a_channel_ends_no_reply():
    text = "<|channel|>analysis<|message|>hm<|end|>\n<|start|>assistant<|channel|>final<|message|>Paris"
    assert rc.answer_text(rc.cut_at_end_mark(rc.Reply(text)).text) == "Paris"


@pytest.mark.parametrize("text, answer", ENDED.values(), ids=ENDED)
def test_a_reply_ends_at_its_templates_end_mark(text, answer):
    assert rc.cut_at_end_mark(rc.Reply(text, "length")) == rc.Reply(answer, "stop")


@pytest.mark.parametrize("text", NOT_ENDED.values(), ids=NOT_ENDED)
def test_an_end_mark_that_is_spoken_of_ends_nothing(text):
    assert rc.cut_at_end_mark(rc.Reply(text, "length")) == rc.Reply(text, "length")


def test_a_model_that_never_stops_is_not_asked_again_if_its_turn_had_ended(rlhf):
    endless = Reply("A mistaken one.<|im_end|>\n<|im_start|>user\nWhy?", finish="length")
    with Api(weak(endless)) as api:
        [pair] = rlhf(PROMPTS[:1], *OPENAI, api=api).pairs
        assert pair["rejected"] == "A mistaken one." and api.count("weak") == 1


def test_a_cut_reply_that_loops_is_not_paid_for_twice(rlhf):
    loop = Reply("I think that this is the answer to it. " * 60, finish="length")
    with Api(weak(loop)) as api:
        assert rlhf(PROMPTS[:1], *OPENAI, api=api).reasons == [
            "filter: truncated: weak reached --max-tokens"
        ]
        assert api.count("weak") == 1


def test_a_word_that_is_a_local_servers_key_stays_in_answers(rlhf):
    with Api(
        lambda call: world(call) + " Set your password." if not is_judge(call) else world(call)
    ) as api:
        [pair] = rlhf(PROMPTS[:1], *OPENAI, api=api, OPENAI_API_KEY="password").pairs
    assert pair["chosen"].endswith("Set your password.")


# --- the server's words


BODIES = {
    "OpenAI": ({"error": {"message": "no", "type": "invalid", "code": None}}, ("invalid", "no")),
    "LM Studio": ({"error": "no"}, ("", "no")),
    "FastAPI": ({"detail": "no"}, ("", "no")),
    "FastAPI's list": ({"detail": [{"loc": ["body", "n"], "msg": "no"}]}, ("", "body.n: no")),
    "Gemini": ([{"error": {"code": 400, "message": "no", "status": "BAD"}}], ("BAD", "no")),
    "OpenRouter": (
        {"error": {"message": "Provider returned error", "code": 400,
                   "metadata": {"raw": '{"error": {"message": "no", "code": "odd"}}'}}},
        ("odd", "no"),
    ),
    "old vLLM": ({"object": "error", "message": "no", "type": "Bad", "code": 400}, ("Bad", "no")),
    "plain text": ("no", ("", "no")),
    "JSON in text": ('{"error": "no"}', ("", "no")),
    "a page": ("<html><title>502 Bad</title></html>", ("web page", "502 Bad")),
    "nothing": (None, ("", "")),
}  # fmt: skip


@pytest.mark.parametrize("body, words", BODIES.values(), ids=BODIES)
def test_the_servers_own_words_are_found_in_a_body_of_any_shape(body, words):
    assert rc.read_error_body(body) == words


def test_an_error_is_one_line_without_keys_or_escape_sequences(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    error = rc.ApiError(400, "odd", "your\nkey sk-secret-key\x1b[2J is bad")
    assert str(error) == "400 odd: your key [key]\\x1b[2J is bad"


@pytest.mark.parametrize(
    "error, text",
    [
        (rc.ApiError(400, "400", "no"), "400: no"),
        (rc.ApiError(400, "odd", "odd: no"), "400: odd: no"),
        (rc.ApiError(503, "", ""), "503"),
        (rc.ApiError(0, "timeout", "no answer"), "no answer"),
    ],
)
def test_an_error_names_no_code_twice(error, text):
    assert str(error) == text


# --- streams


STREAM_ONLY = {
    "DashScope": "This model only support stream mode, please enable the stream parameter.",
    "gateway": "This model requires stream=true required",
    "quoted": "'stream' must be set to true for this model",
}


@BOTH
@pytest.mark.parametrize("words", STREAM_ONLY.values(), ids=STREAM_ONLY)
def test_a_model_that_only_streams_is_streamed(rlhf, sdk, words):
    def answer(call):
        streamed = call.params.get("stream") or "x-dashscope-sse" in call.headers
        return world(call) if streamed or call.model != "weak" else Fault(400, message=words)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *sdk, api=api)
        assert api.count("weak") == 4, "one refusal, then one call for each prompt"
    assert [pair["rejected"] for pair in result.pairs] == [
        f"A mistaken answer to: {record['prompt']}" for record in PROMPTS
    ]
    assert "weak: replies are streamed (as the server asks)" in result.err
    assert "bills no tokens" not in result.err


def test_a_streamed_reply_may_be_cut_or_hold_thoughts_only():
    joined = rc.ReplyParts("choices.delta", "usage.prompt_tokens", "usage.completion_tokens")
    for text, finish in (("Par", None), ("is", "length")):
        joined.add({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})
    assert joined.reply(streamed=True) == rc.Reply("Paris", "length")


IN_STREAM = {
    "account": {"code": "insufficient_quota", "message": "no credit"},
    "key": {"code": "invalid_api_key", "message": "wrong key"},
    "content filter": {"code": "content_filter", "message": "withheld"},
    "prompt too long for the model": {"code": "context_length_exceeded", "message": "too long"},
    "rate limit": {"code": 429, "message": "slow down"},
}


@pytest.mark.parametrize("kind", IN_STREAM)
def test_an_error_event_inside_a_stream_is_read_like_any_other(kind):
    import httpx
    import openai

    request = httpx.Request("POST", "http://localhost/v1")
    error = rc.read_error(openai.APIError("failed", request, body=IN_STREAM[kind]))
    assert rc.find_rule(error, rc.Model("openai", "m", ""), False).kind == kind


def test_a_stream_that_ends_too_early_is_no_reply():
    joined = rc.ReplyParts("choices.delta", "usage.prompt_tokens", "usage.completion_tokens")
    joined.add({"choices": [{"delta": {"content": "Par"}, "finish_reason": None}]})
    with pytest.raises(rc.ApiError, match="too early"):
        joined.reply(streamed=True)


# --- what a provider is


@pytest.fixture
def registry(monkeypatch):
    """A copy of the table of providers, to register in."""
    monkeypatch.setattr(rc, "PROVIDERS", dict(rc.PROVIDERS))
    monkeypatch.setitem(rc.PREFIXES, id(rc.PROVIDERS), "ask_")
    return rc.PROVIDERS


def example():
    """Run the examples of Provider's docstring, which register `echo` and `deepseek`."""
    globs = vars(rc).copy()
    test = doctest.DocTestParser().get_doctest(rc.Provider.__doc__, globs, "Provider", None, 0)
    assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
    return test.globs


def test_the_example_in_the_docstring_is_a_provider_like_the_others(registry, rlhf):
    example()
    flags = ("--high-model", "reference", "--low-model", "echo:any", "--judge-model", "none")
    [pair] = rlhf(
        [{"prompt": "Say it again: hello!", "output": "hello!"}], "--provider", "offline", *flags
    ).pairs
    assert (pair["chosen"], pair["rejected"]) == ("hello!", "Say it again: hello!")


def test_a_provider_without_default_models_asks_for_names(registry, rlhf):
    example()
    result = rlhf(PROMPTS, "--provider", "echo")
    assert result.status == 2 and "name --high-model and --low-model" in result.err


def ask_a_provider(registry, call):
    """The reply of a provider `mine` with this `call`; --max-retries 0."""

    class Mine(rc.Provider):
        """a provider of one's own"""

        async def call(self, name, messages, options, hints):
            return call()

    registry["mine"] = Mine
    args = rc.build_parser().parse_args(["--input-file", "x", "--max-retries", "0"])
    args.prices = {}

    async def ask():
        models = rc.Models(args, rc.Cache(None))
        return await models.ask(rc.Model("mine", "m"), [{"role": "user", "content": "Q"}], {})

    return wait(ask())


BAD_CALLS = [
    pytest.param(lambda: rc.flatten(None), "raised TypeError", id="type"),
    pytest.param(lambda: no_such_name, "raised NameError", id="name"),  # noqa: F821
    pytest.param(lambda: "a text", "returned 'a text', not a Reply", id="a text"),
    pytest.param(lambda: None, "returned None, not a Reply with a text", id="None"),
    pytest.param(lambda: rc.Reply(None), "not a Reply with a text", id="no text"),
    pytest.param(lambda: rc.Reply("a", "end"), "the finish 'end', not stop, length", id="finish"),
]


@pytest.mark.parametrize("call, says", BAD_CALLS)
def test_a_bug_in_a_providers_own_code_is_the_providers_and_no_network_failure(
    registry, call, says
):
    with pytest.raises(rc.PartError, match="the provider `mine` ") as raised:
        ask_a_provider(registry, call)
    assert says in str(raised.value)


def test_the_text_of_an_error_that_is_no_bug_is_in_the_reason(registry):
    def call():
        raise RuntimeError("the tunnel fell in")

    failed = ask_a_provider(registry, call)
    assert "cannot be read (RuntimeError: the tunnel fell in)" in failed.reason


def test_a_provider_of_openais_protocol_needs_an_address_and_a_key_alone(registry, monkeypatch):
    """The second example of the docstring."""
    deepseek = example()["ask_deepseek"]

    async def address(url):
        provider = deepseek(url, "sk-x", 10)
        await provider.close()
        return str(provider.client.base_url)

    assert wait(address("")) == "https://api.deepseek.com"
    assert wait(address("http://localhost:9/v1")) == "http://localhost:9/v1/"


def test_an_sdks_own_exceptions_are_failures_of_the_call():
    def sdk():
        raise TypeError("junk")

    try:
        sdk()
    except TypeError as error:
        assert not rc.is_own_bug(error) and rc.read_error(error).code == "garbled"


def test_the_offline_judge_keeps_to_the_scale(monkeypatch):
    monkeypatch.setattr(rc, "JUDGE_SCALE", (0, 5))
    assert rc.reference_f1("It is 42.", "It is 42.") == 5
    assert rc.reference_f1("Rome", "It is 42.") == 0
    assert (
        0
        <= rc.reference_f1("I cannot help.", "")
        <= rc.reference_f1("It is 42, since 6 x 7.", "")
        <= 5
    )


def test_another_seed_draws_other_offline_answers(rlhf):
    words = (
        "amber basil cedar delta ember flint grove haven iris jade kelp lotus maple nectar".split()
    )
    long = " ".join(f"The {word} stands beside the house of my {other}."
                    for word, other in zip(words, words[::-1], strict=True))  # fmt: skip
    records = [{"instruction": "Count.", "output": long}]
    first, again, other = [
        rlhf(records, "--provider", "offline", "--seed", seed).pairs for seed in (1, 1, 2)
    ]
    assert first == again != other


def test_a_failed_is_told_why():
    failed = rc.Failed("model", "content filter: m: x")
    assert why(failed) == "model: content filter: m: x"
