"""Anything in, and the promises hold: no exception, valid rows of one type, books that balance, one order.

The judge's parser and fences are fuzzed in test_judge.py, the signals of ranked answers in test_existing_answers.py.
"""

import asyncio
import contextlib
import gzip
import io
import json
import random
import re
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_constructor as rc
from tests.test_inputs import LEAVES, NAMES
from tests.tiny import run_of, verdict


def fuzz(examples):
    """Settings: the same examples every time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        deadline=None, derandomize=True, max_examples=examples, suppress_health_check=checks
    )


# --- texts and rows of every kind

PIECES = ["I'm sorry, I cannot help with that.", "抱歉，我无法提供帮助。", "```", "`", "$$", "$", "\\[", "\\]", "\\(", "<think>", "</think>",
          "<|im_end|>", "[INST]", "\nHuman: ", "\n\nAssistant: ", "<answer", "</answer>", '{"scores": {', "}", '"', "\\", "https://a.b/", "<b>",
          "Paris. ", "The answer is 42. ", "答案是四十二。", "20 times ", "写20遍", "\x00", "\x1b[31m", "\x7f", "\u202e", "\u2028", "\u0085", "مرحبا",
          "שלום", "👩‍👩‍👧", "🇫🇷", "e\u0301", "\ufeff", "\ud83d", "\udc00", "\ufffe", "İ", "ß", "a" * 300, " ", "\n", "\r\n", "\t"]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.sampled_from(LEAVES)
)
KEYS = st.one_of(st.sampled_from(NAMES), st.text(max_size=5))
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
ROWS = st.one_of(ANYTHING, st.dictionaries(KEYS, ANYTHING, min_size=1, max_size=6))


def read(name, data, with_answers):
    """What read_records makes of a file with this name and content, "" if it says why it cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        try:
            return list(rc.read_records(str(path), with_answers=with_answers))
        except rc.UserError as error:
            assert name in str(error) and "\n" not in str(error)
            return []


def sound(found):
    """Only records that can be asked, and failures that say why."""
    for line, one in found:
        assert isinstance(line, int) and isinstance(one, rc.Record | rc.Failed)
        if isinstance(one, rc.Failed):
            assert one.stage == "input" and isinstance(one.reason, str) and one.reason
            continue
        assert (
            one.messages[-1]["role"] == "user"
            and one.messages[-1]["content"]
            and len(one.prompt_id) == 16
        )
        assert {turn["role"] for turn in one.messages} <= {"system", "user", "assistant"}
        texts = [
            one.reference,
            *(turn["content"] for turn in one.messages),
            *(a.text for a in one.answers),
        ]
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)
        assert all(isinstance(vote, float) for answer in one.answers for vote in answer.votes)
    return True


@fuzz(400)
@given(
    st.lists(ROWS, min_size=1, max_size=5), st.booleans(), st.sampled_from(["a.jsonl", "a.json"])
)
def test_any_json_is_read_as_records_or_as_failures(values, with_answers, name):
    dump = lambda value: json.dumps(value, ensure_ascii=True)
    data = "\n".join(map(dump, ["first", *values])) if name == "a.jsonl" else dump(values)
    found = read(name, data.encode(), with_answers)
    assert sound(found) and (name == "a.json" or len(found) > len(values))


ENDS = st.sampled_from(["jsonl", "json", "csv", "tsv", "jsonl.gz", "csv.gz"])
BYTES = st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(
    [b'{"prompt": "Q?"}', b"[", b"]", b"{", b"}", b",", b'"', b"\n", b"\r", b"\\ud83d", b"\xff", b"\x00", b"prompt", b"\t", b"\xef\xbb\xbf", b"1e999", b"NaN"]
), max_size=12).map(b"".join))  # fmt: skip


@fuzz(300)
@given(BYTES, ENDS, st.booleans(), st.integers(0, 40))
def test_any_bytes_are_read_as_records_failures_or_one_clear_error(data, end, with_answers, cut):
    data = gzip.compress(data)[: -cut or None] if end.endswith("gz") else data
    assert sound(read(f"a.{end}", data, with_answers))


# --- whole runs, in this process, offline or with a provider that answers from a hash of what it is asked


class ask_scripted(rc.Provider):
    """a provider of the tests: replies, judges and fails by a hash, at its own pace"""

    async def call(self, name, messages, options, hints):
        said = messages[-1]["content"]
        luck = random.Random(rc.digest(name, said, hints["sample"]))
        await asyncio.sleep(random.choice([0, 0, 0.001]))
        if hints["role"] == "judge":
            good = verdict(said, lambda text: luck.choice([2, 5, 8, 9.5]))
            return rc.make_reply(
                luck.choice([good, good, good, good[:-2], "no idea", good.replace("9.5", "11")]),
                "stop",
                1,
                1,
            )
        if luck.random() < 0.12:
            raise luck.choice([rc.ApiError(500, "", "down"), rc.ApiError(400, "", "no"), KeyError("choices"), ValueError("junk"),
                               rc.ApiError(400, "content_filter", ""), ConnectionResetError(), json.JSONDecodeError("x", "y", 0)])  # fmt: skip
        text = luck.choice(["", f"It is {luck.random()}. "]) + "".join(
            luck.choices(PIECES, k=luck.randint(0, 4))
        )
        return rc.make_reply(text, luck.choice(["stop"] * 30 + ["length", None]), None, "7")

    async def close(self):
        pass


SURE = [
    {"prompt": "Sure?", "responses": ["Paris it is.", "Rome, I guess, or so."], "scores": [5, 1]}
]


@pytest.fixture
def program(monkeypatch):
    """program(rows, *flags) -> (status, what it printed, {name: bytes}); each in a folder of its own."""
    monkeypatch.setitem(rc.PROVIDERS, "scripted", ask_scripted)
    monkeypatch.setitem(rc.DEFAULT_MODELS, "scripted", ("high", "low"))

    def run(values, *flags):
        with tempfile.TemporaryDirectory() as folder:
            data = "".join(json.dumps(value) + "\n" for value in [*SURE, *values])
            Path(folder, "in.jsonl").write_text(data, "utf-8")
            paths = [
                "--input-file",
                f"{folder}/in.jsonl",
                "--output-path",
                f"{folder}/o.jsonl",
                "--candidates-path",
                f"{folder}/c.jsonl",
            ]
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                status = rc.main(
                    [*paths, "--report-path", "none", "--cache-path", "none", *map(str, flags)]
                )
            assert "Traceback" not in out.getvalue(), out.getvalue()
            return (
                status,
                out.getvalue(),
                {path.name: path.read_bytes() for path in Path(folder).glob("?.*l")},
            )

    return run


def strict(data, typed=True):
    """The rows of JSON lines: UTF-8, no NaN; and no null, one type a column, the same keys in the same order."""
    assert not data or data.endswith(b"\n")
    refuse = lambda constant: pytest.fail(f"{constant} in a row")
    found = [
        json.loads(line.decode("utf-8"), parse_constant=refuse) for line in data.split(b"\n")[:-1]
    ]
    assert (
        not typed
        or len({tuple((key, kind(value)) for key, value in row.items()) for row in found}) <= 1
    )
    return found


def kind(value):
    """The type of a column's value, down to its leaves; lists hold one type."""
    assert value is not None
    if isinstance(value, dict):
        return tuple((key, kind(inner)) for key, inner in value.items())
    if isinstance(value, list):
        [inner] = {kind(item) for item in value}
        return [list, inner].__repr__()
    assert not isinstance(value, str) or not re.search("[\ud800-\udfff]", value)
    return type(value).__name__


def balanced(out, files, many=False):
    """Records read = records that gave pairs + lines among the dropped; pairs = rows."""
    form = r"Read (\d+) records?, wrote (\d+) pairs?(?: from (\d+) records?)? \(\d+%\), dropped (\d+)\."
    read_, pairs, paired, dropped = re.search(form, out).groups()
    pairs, dropped = int(pairs), int(dropped)
    drops = strict(files.get("o.dropped.jsonl", b""), typed=False)
    assert int(read_) == int(paired or pairs) + dropped and len(drops) == dropped
    assert all(
        row["stage"] in ("input", "model", "judge", "filter", "human") and row["reason"]
        for row in drops
    )
    assert [row["line"] for row in drops] == sorted(row["line"] for row in drops)
    if not many:
        assert len(files.get("o.jsonl", b"").split(b"\n")[:-1]) == pairs
    return True


ASKED = st.builds(lambda prompt, more: {"prompt": prompt} | more, TEXTS,
                  st.fixed_dictionaries({}, optional={"output": TEXTS, "system": TEXTS, "history": ANYTHING}))  # fmt: skip
SCORES = st.one_of(st.integers(-5, 10), st.floats(), st.sampled_from(["7", "3.5", "x", None, True]))
RATED = st.one_of(
    st.builds(lambda p, a, s: {"prompt": p, "responses": a, "scores": s}, TEXTS, st.lists(TEXTS, min_size=2, max_size=4),
              st.lists(SCORES, min_size=2, max_size=4)),
    st.builds(lambda p, a, b, w: {"prompt": p, "response_a": a, "response_b": b, "winner": w}, TEXTS, TEXTS, TEXTS,
              st.sampled_from(["a", "b", "model_a", "tie", 0, 1, None])),
    st.builds(lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r}, TEXTS, TEXTS, TEXTS),
    st.builds(lambda p, c, r, s, t: {"prompt": p, "chosen": c, "rejected": r, "score_chosen": s, "score_rejected": t}, TEXTS, TEXTS, TEXTS,
              SCORES, SCORES),
    ROWS,
)  # fmt: skip


@fuzz(400)
@given(
    values=st.lists(RATED, max_size=6),
    name=st.sampled_from(list(rc.OUTPUTS)),
    strategy=st.sampled_from(list(rc.STRATEGIES)),
)
def test_every_format_writes_valid_rows_of_one_type_whatever_is_ranked(
    program, values, name, strategy
):
    strategy = "best_worst" if name == "kto" else strategy
    flags = ("--method", "rank_responses", "--output-format", name, "--strategy", strategy)
    status, out, files = program(values, *flags)
    assert status == 0 and balanced(out, files, many=name in ("kto", "prompts"))
    assert strict(files["o.jsonl"]), "one record was sure to give a pair"
    if name == "standard":
        for row in strict(files["o.jsonl"]):
            assert (
                row.get("score_chosen", 1) > row.get("score_rejected", 0)
                and row["chosen"] != row["rejected"]
            )
    strict(files.get("o.dropped.jsonl", b""), typed=False)


METHODS = st.sampled_from([("model_comparison",), ("generate_pairs", "--num-candidates", 3), ("generate_pairs", "--strategy", "all_pairs"),
                           ("model_comparison", "--when-low-wins", "flip"), ("rank_responses", "--judge-model", "j"),
                           ("model_comparison", "--judge-model", "none"), ("model_comparison", "--judge-model", "a", "--judge-model", "b")])  # fmt: skip


@fuzz(300)
@given(values=st.lists(st.one_of(ASKED, RATED), min_size=1, max_size=8), method=METHODS)
def test_books_balance_and_order_is_the_inputs_whatever_fails_and_however_many_work(
    program, values, method
):
    flags = ("--provider", "scripted", "--max-retries", 0, "--method", *method)
    status, out, files = program(values, *flags, "--concurrency", 1)
    assert status in (0, 1) and balanced(out, files)
    lines = strict(files["o.jsonl"])
    assert not lines or {row["prompt_id"] for row in lines}
    again = program(values, *flags, "--concurrency", 8)
    assert (again[0], again[2]) == (status, files)


# --- filters

LONG = st.builds(
    lambda text, size: (text * (size // max(1, len(text)) + 1))[:size],
    TEXTS,
    st.sampled_from([0, 10, 500, 100_000]),
)
RUN = run_of("--min-chosen-score", "5")


def complaints(prompt, one, two, votes=((9.0,), (8.0,))):
    """What each filter says of these texts."""
    record = rc.Record([{"role": "user", "content": prompt}])
    chosen, rejected = (
        rc.Answer(text, score=vote[0], votes=vote) for text, vote in zip((one, two), votes)
    )
    for name, rule in rc.FILTERS.items():
        subject = (
            (record, chosen) if rule.on == "answer" else (rc.Pair(record, chosen, rejected), RUN)
        )
        yield name, lambda rule=rule, subject=subject: rule(*subject)


@fuzz(300)
@given(TEXTS, LONG, st.one_of(LONG, TEXTS))
def test_filters_never_raise(prompt, one, two):
    prompt, one, two = map(rc.scrub, (prompt, one, two))  # as every text is that is read or replied
    for name, ask in complaints(prompt, one, two):
        assert ask() is None or isinstance(ask(), str), name


# What some rule looks for and does not find the end of, or finds the beginning of again and again.
UNITS = ["\\[", "\\(", "\\[a", "$", "$$ ", "``` ", "`", "https://a ", "<|", "<|a ", "[/INST", "think>", "<think>", "\nHuman: ", "I am ",
         "sorry, ", "I can't ", "i am an ai ", "我是一个AI", "无法", "十", "十遍", "1", "1 times ", "twty", "twenty ", "A", "Aa", "é", "a\u0301",
         "<a", "<a>", "</", "{", '{"a":', "\n", " ", "\t", "\u3000", ".", "。", "\x00", "👩‍👩‍👧", "\u202e", "a", "ab c "]  # fmt: skip


def seconds(ask):
    """The least CPU time of two tries."""
    times = []
    for _ in range(2):
        started = time.process_time()
        ask()
        times.append(time.process_time() - started)
    return min(times)


@pytest.mark.parametrize("unit", UNITS)
def test_filters_take_time_in_proportion_to_the_text(unit):
    """Eight times the text may take 24 times as long, where it takes long at all; a square would take 64 times."""
    ask = "Please say how this is done and 请告诉我怎么做"
    for tail in ("", "!x"):
        texts = [(unit * size)[:size] + tail for size in (4_000, 32_000)]
        forms = {"both": lambda t: (ask, t, t + "x"), "answer": lambda t: ("Human, 请问怎么做才好呢", f"Human: INST] {t}", "good"),
                 "prompt": lambda t: (t, "the same words again " * 40, "good")}  # fmt: skip
        for about, form in forms.items():
            small, large = (list(complaints(*form(text))) for text in texts)
            for (name, quick), (_, slow) in zip(small, large):
                taken = seconds(slow)
                assert taken < 0.05 or taken < 24 * seconds(quick), (
                    f"{name}, {about}: {taken:.2f} s"
                )
