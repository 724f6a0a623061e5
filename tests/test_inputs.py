"""whatever users bring, each record is read once, and what cannot be read costs one record and says why."""

import gzip
import json
import random

import pytest

import rlhf_constructor as rc
from tests.tiny import ROOT


def record(row) -> rc.Record:
    [one] = rc.parse_row(row)
    return one


def read(path, content, name="in.jsonl", **more) -> list:
    """Write a file, read it: [(line, prompt or reason of the failure), ...]."""
    file = path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = list(rc.read_records(str(file), **more))
    return [(line, r.prompt if isinstance(r, rc.Record) else r.reason) for line, r in found]


def turns(*texts) -> list[dict]:
    """Texts -> OpenAI messages, user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def sharegpt(*texts) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


ALPACA = {"instruction": "Translate", "input": "hello", "output": "你好"}
FEW_SHOT = {"instruction": "Great! -> good\nAwful. -> bad\nFine! ->", "output": "good"}
SHAPES = [
    pytest.param(ALPACA, "Translate\n\nhello", "你好", id="Alpaca"),
    pytest.param(ALPACA | {"input": ""}, "Translate", "你好", id="Alpaca with an empty input"),
    pytest.param(ALPACA | {"input": None}, "Translate", "你好", id="Alpaca with a null input"),
    pytest.param({"instruction": "Hi"}, "Hi", "", id="an instruction alone"),
    pytest.param(FEW_SHOT, FEW_SHOT["instruction"], "good", id="few-shot"),
    pytest.param(
        {"prompt": "Sky?", "completion": " Blue."}, "Sky?", "Blue.", id="prompt, completion"
    ),
    pytest.param({"question": "2+2?", "answer": "4"}, "2+2?", "4", id="question, answer"),
    pytest.param({"query": "天空？", "response": "蓝色"}, "天空？", "蓝色", id="query, response"),
    pytest.param({"text": "Say hi"}, "Say hi", "", id="text"),
    pytest.param("Just a string", "Just a string", "", id="a plain string"),
    pytest.param(
        {"prompt": "Q", "completion": "bad", "label": False}, "Q", "", id="a KTO row labelled bad"
    ),
    pytest.param({"messages": turns("Hi", "Hello")}, "Hi", "Hello", id="OpenAI messages"),
    pytest.param({"conversations": sharegpt("Hi", "Hello")}, "Hi", "Hello", id="ShareGPT"),
    pytest.param({"input": {"messages": turns("Hi")}}, "Hi", "", id="OpenAI preference input"),
    pytest.param(
        {"prompt": turns("Hi"), "answer": "Ho"},
        "Hi",
        "Ho",
        id="a prompt of messages with an answer",
    ),
    pytest.param(
        {"prompt": "\n\nHuman: Hi\n\nAssistant:"}, "Hi", "", id="a prompt that ends with Assistant:"
    ),
]


@pytest.mark.parametrize("row, prompt, reference", SHAPES)
def test_a_format_is_recognised_by_its_fields(row, prompt, reference):
    assert (record(row).prompt, record(row).reference) == (prompt, reference)


def test_every_instance_of_self_instruct_is_a_record():
    instances = [{"input": "cat", "output": "chat"}, {"input": "", "output": "none"}, "junk"]
    records = rc.parse_row({"id": "seed_0", "instruction": "To French", "instances": instances})
    assert [(r.prompt, r.reference) for r in records] == [
        ("To French\n\ncat", "chat"),
        ("To French", "none"),
    ]


SYSTEM = [{"role": "system", "content": "Be brief."}]
KEPT = turns("Hi", "Hello", "How?")
MULTI_TURN = [
    pytest.param({"messages": KEPT}, KEPT, "", id="ends with the user"),
    pytest.param({"messages": turns("Hi", "Hello", "How?", "Fine")}, KEPT, "Fine", id="ends with an answer"),
    pytest.param({"conversations": sharegpt("Hi", "Hello", "How?", "Fine")}, KEPT, "Fine", id="ShareGPT"),
    pytest.param({"messages": SYSTEM + KEPT}, SYSTEM + KEPT, "", id="a system turn"),
    pytest.param({"conversations": sharegpt("Hi", "Hello", "How?"), "system": "Be brief."}, SYSTEM + KEPT, "",
                 id="a system field beside the turns"),
    pytest.param({"instruction": "How?", "history": [["Hi", "Hello"]], "system": "Be brief."}, SYSTEM + KEPT, "",
                 id="Alpaca with history and system"),
    pytest.param({"prompt": "How?", "system": "Be brief."}, SYSTEM + KEPT[2:], "", id="prompt with system"),
    pytest.param({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, KEPT[:1], "",
                 id="content in parts"),
]  # fmt: skip


@pytest.mark.parametrize("row, messages, reference", MULTI_TURN)
def test_turns_and_system_turns_are_kept(row, messages, reference):
    assert (record(row).messages, record(row).reference) == (messages, reference)


def test_several_turns_as_one_text_say_who_speaks():
    assert record({"messages": SYSTEM + KEPT}).prompt == (
        "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: How?"
    )


REFUSED = [
    pytest.param({}, "no known fields: empty object", id="an empty object"),
    pytest.param({"foo": 1, "bar": 2}, "no known fields: foo, bar", id="unknown fields"),
    pytest.param({"prompt": ""}, "empty prompt", id="an empty prompt"),
    pytest.param({"prompt": " \n"}, "empty prompt", id="a blank prompt"),
    pytest.param({"instruction": " ", "output": "x"}, "empty prompt", id="a blank instruction"),
    pytest.param("", "empty prompt", id="an empty string"),
    pytest.param({"messages": turns("  ")}, "empty prompt", id="a blank user turn"),
    pytest.param({"messages": turns("Hi", "Ho")[1:]}, "no user turn", id="nobody asked"),
    pytest.param({"messages": SYSTEM}, "no user turn", id="a system turn alone"),
    pytest.param({"messages": [{"role": "tool", "content": "{}"}]}, "unknown role: 'tool'", id="a tool turn"),
    pytest.param({"conversations": [{"from": "observation", "value": "x"}]}, "unknown role: 'observation'",
                 id="a ShareGPT tool turn"),
    pytest.param({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "not a text",
                 id="a turn that only calls a tool"),
    pytest.param({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not a text", id="a picture"),
    pytest.param({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "not a text", id="a part that is null"),
    pytest.param({"messages": ["Hi"]}, "unknown role", id="turns that are strings"),
    pytest.param({"instruction": {"text": "Hi"}}, "not a text: `instruction` holds a dict", id="nested junk"),
    pytest.param({"instruction": "Add", "input": 10**400}, "not a text: `input` holds a int", id="a huge integer"),
    pytest.param({"prompt": float("nan")}, "no known fields", id="NaN"),
    pytest.param([1, 2], "not a record: a list", id="a list"),
    pytest.param(None, "not a record: a NoneType", id="null"),
]  # fmt: skip


@pytest.mark.parametrize("row, reason", REFUSED)
def test_a_row_that_is_no_record_says_why(row, reason):
    with pytest.raises(rc.Failed, match="input") as failed:
        rc.parse_row(row)
    assert reason in failed.value.reason


A, B = '{"prompt": "a"}', '{"prompt": "b"}'
BOTH = [(1, "a"), (2, "b")]
INDENTED = json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=2)
FILES = [
    pytest.param("in.jsonl", f"{A}\n{B}\n", BOTH, id="JSONL"),
    pytest.param("in.jsonl", f"{A}\n{B}", BOTH, id="no last newline"),
    pytest.param("in.jsonl", f"{A}\r\n{B}\r\n", BOTH, id="CRLF"),
    pytest.param("in.jsonl", f"\ufeff{A}\n{B}\n", BOTH, id="BOM"),
    pytest.param("in.jsonl", f"\ufeff\r\n\n{A}\n \n\n{B}\n\n", [(3, "a"), (6, "b")], id="BOM and blank lines"),
    pytest.param("in.jsonl", '"a"\n"b"\n', BOTH, id="plain strings"),
    pytest.param("in.json", f"[{A}, {B}]", BOTH, id="JSON array on one line"),
    pytest.param("in.json", f"\ufeff\n {INDENTED}", BOTH, id="indented JSON array"),
    pytest.param("in.jsonl", INDENTED, BOTH, id="JSON array named .jsonl"),
    pytest.param("in.json", json.dumps({"data": json.loads(INDENTED)}, indent=1), BOTH, id="an array in an object"),
    pytest.param("in.json", json.dumps({"prompt": "a"}, indent=4), [(1, "a")], id="one indented object"),
    pytest.param("in.json", json.dumps({"messages": turns("a")}, indent=4), [(1, "a")], id="one indented chat"),
    pytest.param("in.json", json.dumps({"rows": json.loads(INDENTED)}, indent=1), BOTH, id="an array in an object, under any name"),
    pytest.param("in.json", json.dumps({"data": json.loads(INDENTED)}), BOTH, id="an array in an object in one line"),
    pytest.param("in.json", '{"answers": [{"text": "a"}]}', [(1, "no known fields: answers")], id="answers are no rows"),
    pytest.param("in.json", json.dumps({"prompt": "a", "data": ["b", "c"]}, indent=4), [(1, "a")], id="one indented object with data of its own"),
    pytest.param("in.jsonl", '\n{"messages": [{"role": "user", "content": "a"}]}', [(2, "a")], id="one chat in one line"),
    pytest.param("in.csv", "prompt;x\na, or b;1\n", [(2, "a, or b")], id="a European CSV"),
    pytest.param("in.csv", "prompt;x,y\n1;a,2\n", [(2, "no known fields: prompt;x, y")], id="a semicolon in a name"),
    pytest.param("in.csv", "prompt,x\na,1\n,\n , ,,\nb,2\n", [(2, "a"), (5, "b")], id="CSV with rows of empty cells"),
    pytest.param("in.csv", "prompt,x\na,1\nb,2\n", [(2, "a"), (3, "b")], id="CSV"),
    pytest.param("in.csv", '\ufeffprompt\r\n"a"\r\n\r\nb', [(2, "a"), (4, "b")], id="CSV with BOM and CRLF"),
    pytest.param("in.csv", 'prompt\n"two\nlines, ""quoted"""\n', [(3, 'two\nlines, "quoted"')], id="CSV quotes"),
    pytest.param("in.csv", "prompt,x\na,1,2\nb,1\n", [(2, "more cells than the header has"), (3, "b")],
                 id="CSV with too many cells"),
    pytest.param("in.csv", "x,prompt\n1\n2,b\n", [(2, "empty prompt"), (3, "b")], id="CSV with too few cells"),
    pytest.param("in.csv", 'prompt,x\na,1\n"b,2\nc,3\n', [(2, "a"), (4, "not a table row: unexpected end of data; check the quotes of lines 3 to 4")],
                 id="CSV with a quote that is never closed"),
    pytest.param("in.csv", 'prompt,x\n"a,1\nb,"2"\nc,3\n', [(3, "not a table row: ',' expected after '\"'; check the quotes of lines 2 to 3"), (4, "c")],
                 id="CSV with a quote that the next one closes"),
    pytest.param("in.tsv", "prompt\toutput\na, c\tx\n", [(2, "a, c")], id="TSV"),
    pytest.param("in.jsonl", '{"prompt": "a\u2028b\u0085c"}\n', [(1, "a\u2028b\u0085c")], id="U+2028 in a string"),
    pytest.param("in.csv", "prompt\na\u2028b\n", [(2, "a\u2028b")], id="U+2028 in a CSV cell"),
    pytest.param("in.jsonl", "", [], id="an empty file"),
    pytest.param("in.json", "[]", [], id="an empty array"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, expected", FILES)
def test_a_file_is_read_whatever_its_line_ends_and_wrapping(tmp_path, name, content, expected):
    assert read(tmp_path, content, name) == expected
    assert read(tmp_path, gzip.compress(content.encode()), name + ".gz") == expected


BROKEN = [
    pytest.param(b'{"prompt": "a', "not JSON", id="cut off"),
    pytest.param('{"prompt": "é"}'.encode("latin-1"), "not UTF-8", id="not UTF-8"),
    pytest.param('{"prompt": "你好"}'.encode("gb18030"), "not UTF-8", id="GB 18030"),
    pytest.param(A.encode("utf-16"), "not UTF-8", id="UTF-16"),
    pytest.param(b"[" * 100_000, "not JSON", id="nested 100,000 deep"),
    pytest.param(b'{"prompt": 1' + b"0" * 5000 + b"}", "not JSON", id="an integer of 5,000 digits"),
    pytest.param(b"\x00\x00", "not JSON", id="zero bytes"),
    pytest.param(b"plain text", "not JSON", id="plain text"),
    pytest.param(b"NaN", "not a record", id="NaN"),
    pytest.param(b'[{"prompt": "x"}]', "not a record", id="an array"),
    pytest.param(
        b'{"instruction": "x", "history": [1, {"a": 2}]}',
        "malformed record",
        id="junk in the history",
    ),
]


@pytest.mark.parametrize("line, reason", BROKEN)
def test_a_broken_line_costs_one_record_and_gives_its_number(tmp_path, line, reason):
    (_, a), (at, said), (_, b) = read(tmp_path, f"{A}\n".encode() + line + f"\n{B}\n".encode())
    assert (a, at, b) == ("a", 2, "b") and said.startswith(reason)


@pytest.mark.parametrize("depth", [50, 200, 400, 600, 900, 2_000, 20_000])
@pytest.mark.parametrize("name", ["in.jsonl", "in.json"])
def test_deep_nesting_never_ends_the_run(tmp_path, depth, name):
    deep = '{"x": ' * depth + "1" + "}" * depth
    rows = read(
        tmp_path,
        f'{A}\n{{"prompt": "b", "x": {deep}}}' if name == "in.jsonl" else f"[{deep}]",
        name,
    )
    assert len(rows) == (2 if name == "in.jsonl" else 1)


@pytest.mark.parametrize("whole", ["[" + A, '{\n"prompt": "a"', f"[{A}\n{B}]", INDENTED + "x"])
def test_a_broken_json_array_is_one_failed_record(tmp_path, whole):
    [(line, reason)] = read(tmp_path, whole, "in.json")
    assert line == 1 and reason.startswith("not JSON")


UNREADABLE = [
    pytest.param("in.csv", "prompt\na\n".encode("utf-16"), "not UTF-8", id="UTF-16 CSV"),
    pytest.param("in.csv", "prompt\n你好\n".encode("gb18030"), "not UTF-8", id="GB 18030 CSV"),
    pytest.param(
        "in.csv",
        b"prompt,score_a,score_a\na,1,2\n",
        "a name stands twice",
        id="a CSV header that says one name twice",
    ),
    pytest.param(
        "in.csv", b'"prompt\na\n', "unexpected end", id="a CSV header that is never closed"
    ),
    pytest.param(
        "in.jsonl.gz", gzip.compress(A.encode() * 999)[:-20], "cannot be read", id="truncated gzip"
    ),
    pytest.param("in.jsonl.gz", A.encode(), "cannot be read", id="not gzip"),
]


@pytest.mark.parametrize("name, content, message", UNREADABLE)
def test_an_unreadable_file_is_one_clear_error(tmp_path, name, content, message):
    with pytest.raises(rc.UserError, match=message):
        read(tmp_path, content, name)


@pytest.mark.parametrize("code", ["utf-16", "gb18030"])
@pytest.mark.parametrize(
    "name, text", [("in.csv", "prompt\n你好\n"), ("in.jsonl", '{"prompt": "你好"}')]
)
def test_a_file_that_is_not_utf_8_is_told_the_whole_command(tmp_path, name, text, code):
    try:
        [(_, said)] = read(tmp_path, text.encode(code), name)
    except rc.UserError as error:
        said = str(error)
    assert said.endswith(f"not UTF-8: convert it, e.g. iconv -f {code} -t utf-8 FILE > NEW")


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(rc.UserError, match="cannot be read"):
        list(rc.read_records(str(tmp_path / "none.jsonl")))


def test_half_an_emoji_is_replaced_at_any_depth(tmp_path):
    row = r'{"conversations": [{"from": "human", "value": "a \ud83d b"}, {"from": "gpt", "value": "\udc00!"}]}'
    file = tmp_path / "in.jsonl"
    file.write_text(row)
    [(_, found)] = rc.read_records(str(file))
    assert found.prompt.replace("\ufffd", "") == "a  b" and found.reference.endswith("!")
    assert "\ufffd" in found.prompt and (found.prompt + found.reference).encode()


def test_a_whole_emoji_stays():
    assert rc.parse_json(rb'{"prompt": "\ud83d\ude00"}') == {"prompt": "😀"}


def test_rename_reads_other_field_names(tmp_path):
    row = '{"ask": "a", "say": "b"}'
    [(_, found)] = rc.read_records(str(write(tmp_path, row)), {"ask": "question", "say": "answer"})
    assert (found.prompt, found.reference) == ("a", "b")


def write(path, text):
    (path / "in.jsonl").write_text(text, "utf-8")
    return path / "in.jsonl"


def test_records_know_their_line(tmp_path):
    rows = list(rc.read_records(str(write(tmp_path, f"\n{A}\n\n{B}\n"))))
    assert [(line, found.line) for line, found in rows] == [(2, 2), (4, 4)]


def test_a_prompt_id_is_the_prompts_own():
    one, two = record({"prompt": "a", "answer": "x"}), record({"messages": turns("a", "y")})
    assert one.prompt_id == two.prompt_id != record({"prompt": "A"}).prompt_id
    assert len(one.prompt_id) == 16 and int(one.prompt_id, 16)


@pytest.mark.parametrize(
    "path",
    sorted(ROOT.glob("data/[!r.]*")) + [ROOT / "data/ranked_answers.jsonl"],
    ids=lambda p: p.name,
)
def test_every_example_file_is_read_without_a_failure(path):
    found = [one for _, one in rc.read_records(str(path))]
    assert len(found) >= 5 and all(isinstance(one, rc.Record) for one in found)


NAMES = ["prompt", "question", "text", "instruction", "input", "output", "instances", "messages", "conversations",
         "history", "system", "label", "answer", "chosen", "rejected", "responses", "completions", "scores", "ranks",
         "score", "rank", "order", "winner", "choice", "response_a", "response_b", "answer_0", "answer_1", "votes",
         "output_1", "output_2", "preference", "summaries", "info", "human_ref_A", "human_ref_B", "labels",
         "conversation_a", "conversation_b", "role", "content", "from", "value", "model", *rc.DATA_SETS]  # fmt: skip
LEAVES = [None, True, False, 0, 1, -1, 2, 10**400, 1e308, float("nan"), float("inf"), "", " ", "a", "b", "tie",
          "model_a", "你好", "[1", '["x"]', "\n\nHuman: a\n\nAssistant: b", "\ud800", "user", "assistant", "system",
          "gpt"]  # fmt: skip


def junk(draw: random.Random, depth: int = 3):
    """A random JSON value made of names and values that readers look for."""
    kind = draw.random() if depth else 1
    if kind < 0.3:
        return {draw.choice(NAMES): junk(draw, depth - 1) for _ in range(draw.randrange(5))}
    if kind < 0.5:
        return [junk(draw, depth - 1) for _ in range(draw.randrange(4))]
    return draw.choice(LEAVES)


@pytest.mark.parametrize("with_answers", [False, True])
def test_no_row_of_junk_raises(tmp_path, with_answers):
    draw = random.Random(1)
    rows = [
        {name: junk(draw) for name in draw.sample(NAMES, draw.randrange(1, 7))} for _ in range(1500)
    ]
    rows += [
        {"prompt": "Q?", **{name: junk(draw) for name in draw.sample(NAMES, 4)}}
        for _ in range(1500)
    ]
    rows += [{"prompt": "Q?", "answers": ["a", "b"], name: [junk(draw, 1), junk(draw, 1)]}
             for name in ("scores", "ranks", "order", "votes", "models") for _ in range(200)]  # fmt: skip
    rows += [junk(draw) for _ in range(500)]
    file = write(tmp_path, '"first"\n' + "".join(json.dumps(row) + "\n" for row in rows))
    found = [one for _, one in rc.read_records(str(file), with_answers=with_answers)]
    good = [one for one in found if isinstance(one, rc.Record)]
    assert len(found) > len(rows) and len(good) >= 200
    assert all(isinstance(one, rc.Record | rc.Failed) for one in found)
    for one in good:
        assert {m["role"] for m in one.messages} <= {"system", "user", "assistant"}
        assert one.messages[-1]["role"] == "user" and one.messages[-1]["content"].strip()
        assert one.prompt.encode() and one.reference.encode() is not None
