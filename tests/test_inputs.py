"""whatever users bring, each record is read once, and what cannot be read costs one record and says why."""

import gzip
import json
import random

import pytest

import rlhf_constructor as rc
from tests.tiny import ROOT, run_of


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
    pytest.param({"messages": [{"role": "tool", "content": "{}"}]}, "not a text: tools", id="a tool turn"),
    pytest.param({"conversations": [{"from": "observation", "value": "x"}]}, "not a text: tools",
                 id="a ShareGPT tool turn"),
    pytest.param({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "not a text",
                 id="a turn that only calls a tool"),
    pytest.param({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not a text", id="a picture"),
    pytest.param({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "not a text", id="a part that is null"),
    pytest.param({"messages": ["Hi"]}, "unknown role", id="turns that are strings"),
    pytest.param({"instruction": {"text": "Hi"}}, "not a text: `instruction` holds a dict", id="nested junk"),
    pytest.param({"instruction": "Add", "input": 10**400}, "not a text: `input` holds a int", id="a huge integer"),
    pytest.param({"prompt": float("nan")}, "empty prompt", id="NaN"),
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
    pytest.param("in.csv", 'prompt,x\na,1\n"b,2\nc,3\n', [(2, "a"), (3, "not a table row: unexpected end of data; check the quotes of lines 3 to 4")],
                 id="CSV with a quote that is never closed"),
    pytest.param("in.csv", 'prompt,x\n"a,1\nb,"2"\nc,3\n', [(2, "not a table row: ',' expected after '\"'; check the quotes of lines 2 to 3"), (4, "c")],
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
        "not a history",
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


@pytest.mark.parametrize("depth", [300, 900, 970])
def test_no_deep_value_of_a_field_that_is_read_ends_the_run(tmp_path, depth):
    lists, objects = "[" * depth + "]" * depth, '{"text": ' * depth + "1" + "}" * depth
    rows = []
    for deep in (
        lists,
        objects,
        f'[{{"role": {lists}}}]',
        f'[{{"role": "user", "content": {lists}}}]',
    ):
        rows += [f'{{"prompt": "Q", "{name}": {deep}}}' for name in NAMES if name != "prompt"]
    found = read(tmp_path, "\n".join(rows))
    assert len(found) == len(rows)


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
         "turns", "context", "conversation", "choices", "options", "A", "B", "reference", "answers", "kto_tag", "rating",
         "system_prompt", "query", "Prompt", "conversation_a", "conversation_b", "role", "content", "from", "value", "model", "message_tree_id", "rejected_response", "conversation_input", "response_j", "info", "bon_best", "preferred_output", "chosen_messages"]  # fmt: skip
LEAVES = [None, True, False, 0, 1, -1, 2, 10**400, 1e308, float("nan"), float("inf"), "", " ", "a", "b", "tie",
          "model_a", "你好", "[1", '["x"]', "\n\nHuman: a\n\nAssistant: b", "\ud800", "user", "assistant", "system",
          "gpt", "### Human: a", [["a", "b"]], [{"role": "user", "content": "a"}], "<|im_start|>user", "[INST]", "[INST] a [/INST]"]  # fmt: skip


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


# --- earlier turns, system prompts, what stands beside a prompt

HISTORIES = [
    pytest.param([["Hi", "Hello"]], id="pairs"),
    pytest.param([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], id="messages"),
    pytest.param([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], id="ShareGPT turns"),
    pytest.param([{"question": "Hi", "answer": "Hello"}], id="questions and answers"),
    pytest.param([{"user": "Hi", "assistant": "Hello"}], id="user and assistant"),
    pytest.param([{"instruction": "Hi", "output": "Hello"}], id="instruction and output"),
    pytest.param(["Hi", "Hello"], id="alternating texts"),
    pytest.param('[["Hi", "Hello"]]', id="JSON text, as in a CSV cell"),
    pytest.param("[['Hi', 'Hello']]", id="Python text, as pandas writes it"),
]  # fmt: skip


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("field", ["instruction", "prompt", "question", "query", "text"])
def test_a_history_in_any_shape_stands_before_any_prompt(field, history):
    assert record({field: "How?", "history": history}).messages == KEPT


@pytest.mark.parametrize("empty", [None, [], "", "[]", " [] ", "nan", "None", float("nan")])
def test_an_empty_history_is_none(empty):
    assert record({"prompt": "How?", "history": empty}).messages == turns("How?")


@pytest.mark.parametrize(
    "junk",
    [
        {"a": 1},
        7,
        "User: Hi",
        [["Hi"]],
        [["Hi", 1]],
        ["Hi"],
        [{"x": "Hi"}],
        "[[",
        [["a", "b", "c"]],
    ],
)
def test_a_history_of_another_shape_is_refused_with_what_one_looks_like(junk):
    with pytest.raises(rc.Failed, match="not a history: .*question"):
        rc.parse_row({"prompt": "How?", "history": junk})


def test_a_greeting_that_nobody_asked_for_is_kept_in_the_history():
    found = record({"prompt": "How?", "history": [[None, "Hello"]]})
    assert [turn["content"] for turn in found.messages] == ["Hello", "How?"]


def test_a_list_of_turns_named_context_is_the_history_of_a_prompt_and_else_the_prompt():
    assert record({"prompt": "How?", "context": KEPT[:2]}).messages == KEPT
    assert record({"context": KEPT}).messages == KEPT


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message", "System_Prompt"])
@pytest.mark.parametrize("field", ["prompt", "instruction", "question"])
def test_a_system_prompt_under_its_usual_names_is_the_first_turn(name, field):
    row = {field: "How?", name: "Be brief."}
    assert record(row).messages == SYSTEM + KEPT[2:]
    assert record({"messages": KEPT[2:], name: "Be brief."}).messages == SYSTEM + KEPT[2:]


def test_a_system_turn_is_not_doubled_by_a_system_field():
    assert record({"messages": SYSTEM + KEPT, "system": "Be kind."}).messages == SYSTEM + KEPT


SQUAD = {"context": "It rained in Rome.", "question": "Where did it rain?",
         "answers": {"text": ["Rome"], "answer_start": [13]}}  # fmt: skip
ARC = {"text": ["the sun", "the moon"], "label": ["A", "B"]}
WARM = "What is warm?\n\nA. the sun\nB. the moon"
BESIDE = [
    pytest.param({"instruction": "Where?", "context": "In Rome.", "response": "Rome", "category": "qa"},
                 "Where?\n\nIn Rome.", "Rome", id="Dolly"),
    pytest.param(SQUAD, "Where did it rain?\n\nIt rained in Rome.", "Rome", id="SQuAD"),
    pytest.param({"prompt": "Translate", "input": "hello"}, "Translate\n\nhello", "", id="input beside prompt"),
    pytest.param({"input": "Hi", "output": "Hello"}, "Hi", "Hello", id="input alone"),
    pytest.param({"question": "Q?", "context": ["One.", "Two."]}, "Q?\n\nOne.\n\nTwo.", "", id="passages"),
    pytest.param({"question": "Q?", "context": {"page": 3}}, "Q?", "", id="a context that is no text"),
    pytest.param({"question": "What is warm?", "choices": ["the sun", "the moon"], "answer": 0}, WARM, "",
                 id="choices; an answer's index is no reference"),
    pytest.param({"question": "What is warm?", "choices": ARC, "answerKey": "A"}, WARM, "A", id="ARC"),
    pytest.param({"question": "What is warm?", "options": {"A": "the sun", "B": "the moon"}}, WARM, "", id="options by letter"),
    pytest.param({"Question": "What is warm?", "A": "the sun", "B": "the moon", "Answer": "A"}, WARM, "A", id="C-Eval, CMMLU"),
    pytest.param({"question": "Sun or moon?", "choices": ["Sun", "moon"]}, "Sun or moon?", "", id="choices that the prompt holds"),
    pytest.param({"question": "2+2?", "answer": 4}, "2+2?", "4", id="a number as answer"),
    pytest.param({"question_id": 81, "category": "math", "turns": ["2+2?", "And 3+3?"], "reference": ["4", "6"]},
                 "2+2?", "4", id="MT-Bench"),
    pytest.param({"question_id": "x", "turns": [{"content": "2+2?"}]}, "2+2?", "", id="Arena-Hard"),
    pytest.param({"turns": turns("Hi", "Hello")}, "Hi", "Hello", id="turns with roles"),
    pytest.param({"id": "t.1", "system_prompt": "", "question": "Q?", "response": "A"}, "Q?", "A", id="OpenOrca"),
    pytest.param({"problem": "2+2?", "solution": "4"}, "2+2?", "4", id="problem, solution"),
    pytest.param({"conversation": turns("Hi", "Hello"), "model": "m"}, "Hi", "Hello", id="LMSYS, WildChat"),
    pytest.param({"Instruction": "Q?", " OUTPUT ": "A"}, "Q?", "A", id="names in other case"),
    pytest.param(turns("Hi", "Hello"), "Hi", "Hello", id="a line that is a list of turns"),
]  # fmt: skip


@pytest.mark.parametrize("row, prompt, reference", BESIDE)
def test_what_stands_beside_a_prompt_is_joined_to_it(row, prompt, reference):
    assert (record(row).prompt, record(row).reference) == (prompt, reference)


def test_a_name_of_the_row_is_not_written_over_by_its_other_case():
    assert record({"prompt": "a", "Prompt": "b"}).prompt == "a"
    assert rc.with_plain_names({"score_A": 1, "responseA": 2, "A": 3, "Text": 4}) == {
        "score_A": 1, "responseA": 2, "A": 3, "text": 4}  # fmt: skip


# --- turns as text: JSON cells and chat templates

TEMPLATES = [
    pytest.param("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
                 "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n", id="ChatML"),
    pytest.param("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
                 "\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>"
                 "\n\nHow?<|eot_id|>", id="Llama 3"),
    pytest.param("<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nHow?</s>\n<|assistant|>", id="Zephyr"),
    pytest.param("<bos><start_of_turn>system\nBe brief.<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello"
                 "<end_of_turn>\n<start_of_turn>user\nHow?<end_of_turn>\n<start_of_turn>model\n", id="Gemma"),
]  # fmt: skip


@pytest.mark.parametrize("prompt", TEMPLATES)
@pytest.mark.parametrize("field", ["prompt", "instruction", "text"])
def test_a_chat_template_in_a_prompt_becomes_turns(field, prompt):
    assert record({field: prompt}).messages == SYSTEM + KEPT


def test_an_answer_in_a_chat_template_is_the_reference():
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n  code<|im_end|>"
    assert (record(text).prompt, record(text).reference) == ("Hi", "  code")
    assert record("### Human: Hi### Assistant: Hello").reference == "Hello"


@pytest.mark.parametrize(
    "prompt",
    [
        "Say hi <|im_start|>user\nHi<|im_end|>",
        "Hi<|im_end|>",
        "[INST] Hi",
        "<s>[INST] Hi [/INST] Hello </s><s>[INST] How? [/INST]",
        "<|im_start|>user\nHi<|eot_id|>more<|im_end|>",
    ],
)
def test_a_broken_chat_template_is_dropped(prompt):
    for row in ({"prompt": prompt}, {"messages": turns(prompt)}):
        with pytest.raises(rc.Failed, match="prompt holds chat-template tokens"):
            rc.parse_row(row)


def test_text_that_is_no_template_stays():
    for prompt in ("Is a < b | c > d?", "cat <file | wc", "What does </s> mean?", "[1] INST"):
        assert record(prompt).messages == turns(prompt)


@pytest.mark.parametrize("dump", [json.dumps, repr])
@pytest.mark.parametrize("field", ["messages", "conversations", "prompt", "question"])
def test_turns_as_json_text_are_turns(field, dump):
    assert record({field: dump(SYSTEM + KEPT)}).messages == SYSTEM + KEPT


def test_chosen_and_rejected_as_json_text_are_answers():
    chosen, rejected = (json.dumps(turns("Hi", text)) for text in ("Hello", "Go away"))
    [found] = rc.parse_row({"chosen": chosen, "rejected": rejected}, with_answers=True)
    assert found.messages == turns("Hi")
    assert [answer.text for answer in found.answers] == ["Hello", "Go away"]


def test_json_that_is_no_turns_stays_a_text():
    for prompt in ('{"value": "a"} as YAML, please', "[1, 2]", '{"role": "x"}', '["a"]'):
        assert record({"prompt": prompt}).messages == turns(prompt)


def test_turns_that_were_cut_off_or_printed_by_numpy_are_refused():
    broken = "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Ho'}]"
    with pytest.raises(rc.Failed, match="`prompt` looks like turns but is no JSON"):
        rc.parse_row({"prompt": broken})


# --- texts as they are

INDENTED_CODE = "    if a:\n        return b"


def test_only_blank_lines_around_a_text_are_stripped():
    row = {"messages": turns(f"\n \n{INDENTED_CODE}\n\n", INDENTED_CODE)}
    assert (record(row).prompt, record(row).reference) == (INDENTED_CODE, INDENTED_CODE)
    assert record({"prompt": f"\n{INDENTED_CODE} \n"}).prompt == INDENTED_CODE
    assert record({"prompt": "Q", "output": f"\n{INDENTED_CODE}"}).reference == INDENTED_CODE
    assert rc.strip_blank_lines(" Blue.\n") == "Blue."
    assert rc.strip_blank_lines(" \n\t\n") == ""


MISSING = ["", " ", "nan", "NaN", "None", "null", "NULL", "<noinput>", None, float("nan"), []]


@pytest.mark.parametrize("cell", MISSING)
def test_nan_and_its_spellings_in_an_optional_field_are_missing(cell):
    row = {"instruction": "Hi", "input": cell, "system": cell, "context": cell, "history": cell,
           "output": cell, "label": cell, "images": cell, "tools": cell}  # fmt: skip
    assert (record(row).messages, record(row).reference) == (turns("Hi"), "")


def test_a_prompt_may_be_the_word_none():
    assert record({"prompt": "None"}).prompt == "None"
    assert record({"prompt": "nan", "question": "Why?"}).prompt == "Why?"


NOT_TEXTS = [
    pytest.param({"prompt": "What is this?", "images": ["a.png"]}, "images", id="a list of pictures"),
    pytest.param({"messages": turns("<image>What is this?"), "images": ["a.png"]}, "images", id="LLaMA-Factory"),
    pytest.param({"prompt": "<image>\nWhat is this?"}, "images", id="a picture's place"),
    pytest.param({"prompt": "What is this?\n<image>"}, "images", id="a picture's place at the end"),
    pytest.param({"prompt": "Picture 1: <img>a.png</img>\nWhat is it?"}, "images", id="Qwen-VL"),
    pytest.param({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images", id="a picture part"),
    pytest.param({"prompt": "Hi", "audio": {"bytes": "x"}}, "audio", id="sound"),
    pytest.param({"prompt": "Weather?", "tools": '[{"name": "get_weather"}]'}, "tools", id="tools as text"),
    pytest.param({"input": {"messages": turns("Hi"), "tools": [{"a": 1}]}}, "tools", id="tools of OpenAI's input"),
    pytest.param({"messages": [*turns("Hi"), {"role": "assistant", "content": "", "tool_calls": [1]}]}, "tools", id="a call"),
    pytest.param({"conversations": [*sharegpt("Hi"), {"from": "function_call", "value": "{}"}]}, "tools", id="function_call"),
    pytest.param({"prompt": "Weather?", "output": 'Action: get_weather\nAction Input: {"city": "Rome"}'}, "tools",
                 id="an answer that calls a tool"),
]  # fmt: skip


@pytest.mark.parametrize("row, kind", NOT_TEXTS)
def test_pictures_sound_and_tools_are_refused(row, kind):
    with pytest.raises(rc.Failed, match=f"not a text: {kind}"):
        rc.parse_row(row)


def test_an_answer_to_rank_that_calls_a_tool_is_refused():
    row = {"prompt": "Weather?", "chosen": "Action: get\nAction Input: {}", "rejected": "Sun."}
    with pytest.raises(rc.Failed, match="not a text: tools") as failed:
        rc.parse_row(row, with_answers=True)
    assert failed.value.record.prompt == "Weather?"


def test_texts_about_pictures_and_actions_are_texts():
    row = {"images": {"bytes": None, "path": None}, "tools": "[]"}
    for text in ("What does <image> mean in SVG?", "Action: run!", 'An <img src="a"> tag'):
        assert record(row | {"prompt": text}).prompt == text


# --- a reference only where nothing says that it is bad

BAD_LABELS = [
    {"label": False}, {"label": 0}, {"label": -1}, {"label": "false"}, {"label": "bad"}, {"label": "undesirable"},
    {"label": "no"}, {"label": "rejected"}, {"label": "差"}, {"label": "?"}, {"label": 2}, {"kto_tag": False},
    {"kto_tag": "False"}, {"is_safe": False}, {"is_correct": 0}, {"correct": False}, {"rating": 1},
    {"rating": "2"}, {"score": 1}, {"score": 0.1}, {"reward": -3.5}, {"helpfulness": 1, "correctness": 4},
    {"overall_score": 5},
]  # fmt: skip
GOOD_LABELS = [
    {}, {"label": True}, {"label": 1}, {"label": "true"}, {"label": "good"}, {"label": "desirable"}, {"label": "是"},
    {"kto_tag": True}, {"is_safe": True}, {"label": None}, {"label": float("nan")}, {"rating": 5}, {"rating": "4"},
    {"helpfulness": 4, "correctness": 4}, {"correct": "see the answer"}, {"score": "N/A"},
]  # fmt: skip


@pytest.mark.parametrize("label", BAD_LABELS, ids=str)
def test_an_answer_that_is_or_may_be_bad_is_no_reference(label):
    assert record({"prompt": "Q", "completion": "x"} | label).reference == ""
    assert record({"messages": turns("Q", "x")} | label).reference in (
        "",
        "x" * ("?" in str(label)),
    )


@pytest.mark.parametrize("label", GOOD_LABELS, ids=str)
def test_an_answer_that_nothing_calls_bad_is_a_reference(label):
    assert record({"prompt": "Q", "completion": "x"} | label).reference == "x"
    assert record({"instruction": "Q", "output": "x"} | label).reference == "x"


@pytest.mark.parametrize("label", [0, 1, 2, "0", "negative"])
def test_a_label_beside_text_is_a_class(label):
    assert record({"text": "Fine film", "label": label, "answer": "x"}).reference == "x"


def test_the_kto_rows_that_we_write_are_read_with_the_right_reference():
    made = rc.Pair(rc.Record(turns("Q")), rc.Answer("good"), rc.Answer("bad"))
    rows = list(rc.OUTPUTS["kto"](made, run_of()))
    assert [record(row).reference for row in rows] == ["good", ""]


# --- functions of one's own, and fields that nothing reads


def from_typo(row):
    """`sound`: the test's own format, with a typo"""
    return [rc.Record([{"role": "user", "content": row["suond"]}])] if "sound" in row else None


def test_a_bug_in_an_input_function_stops_with_its_traceback_its_name_and_the_line(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(rc.INPUTS, "typo", from_typo)
    file = write(tmp_path, f'{A}\n{{"sound": "x"}}\n')
    with pytest.raises(rc.PartError, match="`from_typo` raised KeyError: 'suond'") as raised:
        list(rc.read_records(str(file)))
    assert raised.value.place.endswith("in.jsonl:2")
    assert isinstance(raised.value.__cause__, KeyError)


def test_an_input_function_that_returns_something_else_is_named(monkeypatch):
    monkeypatch.setitem(rc.INPUTS, "lone", lambda row: rc.Record(turns("Q")))
    with pytest.raises(rc.PartError, match="returned Record.*not a list of records or None"):
        rc.parse_row({"sound": "x"})


def unused(*rows, with_answers=False):
    return rc.unused_fields(list(rows), with_answers)


def test_fields_that_change_nothing_are_named_and_ids_and_labels_are_not():
    row = {
        "id": 1,
        "question_id": 2,
        "prompt": "Q",
        "source": "web",
        "label": True,
        "notes": "",
        "answer": "A",
    }
    assert unused(row) == ["source"]
    assert unused({"prompt": "Q", "response": "A", "helpfulness": 4, "verbosity": 2}) == [
        "verbosity"
    ]
    assert unused({"question": "Q", "text": "a passage"}) == ["text"]
    assert unused({"question": "Q", "context": {"page": 3}}) == ["context"]
    assert unused({"prompt": "Q", "query": "Q"}) in (["prompt"], ["query"])
    assert unused({"nothing": 1}) == []


def test_a_field_that_one_row_uses_is_used():
    assert (
        unused({"prompt": "Q", "output": "x", "answer": "y"}, {"prompt": "Q", "output": "y"}) == []
    )


def test_signals_are_used_where_answers_are_read():
    row = {
        "prompt": "Q",
        "chosen": "a",
        "rejected": "b",
        "score_chosen": 2,
        "score_rejected": 1,
        "lang": "en",
    }
    assert unused(row, with_answers=True) == ["lang"]
    assert unused(row) == ["chosen", "rejected", "score_chosen", "score_rejected", "lang"]


# --- references and choices


@pytest.mark.parametrize("name", ["reference", "solution", "answerkey", "answer"])
@pytest.mark.parametrize("other", ["output", "completion", "response"])
def test_a_gold_answer_beats_the_answer_of_a_model(name, other):
    assert record({"prompt": "Q", other: "a model's", name: "gold"}).reference == "gold"


LEGS = {"question": "How many legs?", "choices": ["0", "2", "4", "6"]}
LABELLED = {"text": ["2", "3", "4", "5"], "label": ["1", "2", "3", "4"]}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(LEGS | {"answer": "2"}, id="an index"),
        pytest.param(LEGS | {"choices": str(LEGS["choices"]), "answer": "2"}, id="a CSV cell"),
        pytest.param({"question": "Legs?", "choices": LABELLED, "answerKey": "3"}, id="a label"),
    ],
)
def test_digits_that_may_be_a_choices_number_are_no_reference(row):
    assert record(row).reference == ""


@pytest.mark.parametrize("answer", ["six", "B"])
def test_a_choices_text_and_letter_are_references(answer):
    assert record(LEGS | {"answer": answer}).reference == answer


@pytest.mark.parametrize("cell", ["['x1', 'y1']", '["x1", "y1"]'])
def test_choices_in_a_cell_are_read(cell):
    assert record({"question": "Q", "choices": cell}).prompt == "Q\n\nA. x1\nB. y1"


# --- what stands beside turns

ASKED = [{"role": "user", "content": "q1"}]
SYSTEM_TURN = {"role": "system", "content": "Be brief."}


def contents(row) -> list[str]:
    return [turn["content"] for turn in record(row).messages]


@pytest.mark.parametrize("name", ["messages", "conversations", "turns", "prompt"])
def test_a_history_stands_before_the_turns(name):
    assert contents({name: ASKED, "history": [["q0", "a0"]]}) == ["q0", "a0", "q1"]


def test_a_history_that_the_turns_repeat_stands_once():
    assert contents({"messages": turns("q0", "a0", "q1"), "history": [["q0", "a0"]]}) == [
        "q0",
        "a0",
        "q1",
    ]


def test_a_system_turn_moves_before_the_history():
    row = {"prompt": [SYSTEM_TURN, *ASKED], "history": [["q0", "a0"]]}
    assert contents(row) == ["Be brief.", "q0", "a0", "q1"]


def full_turns(prompt) -> dict:
    return {"prompt": prompt, "chosen": turns("q1", "good"), "rejected": turns("q1", "bad")}


@pytest.mark.parametrize("prompt", ["another", turns("another"), [SYSTEM_TURN, *ASKED]])
def test_a_prompt_that_differs_from_the_turns_of_a_pair_costs_the_row(prompt):
    with pytest.raises(rc.Failed, match="histories differ: `prompt`"):
        rc.parse_row(full_turns(prompt))


OPEN = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nSure, "


@pytest.mark.parametrize("prompt", [OPEN, turns("q1", "Sure, ")])
def test_a_prompt_that_ends_inside_an_answer_takes_no_other_answers(prompt):
    with pytest.raises(rc.Failed, match="the prompt ends inside an answer"):
        rc.parse_row({"prompt": prompt, "chosen": "good", "rejected": "bad"})
    assert record({"prompt": prompt}).reference.startswith("Sure,")


def test_an_unread_field_that_may_name_the_better_answer_is_no_id():
    assert unused({"prompt": "Q", "preferred_index": 1, "row_index": 1}) == ["preferred_index"]


@pytest.mark.parametrize(
    "prompt",
    [
        "Sum this up.",
        "\n\nHuman: Sum this up.\n\nAssistant:",
        "<|im_start|>user\nSum this up.<|im_end|>\n<|im_start|>assistant\n",
    ],
    ids=["plain", "human", "template"],
)
def test_context_stands_after_a_prompt_of_any_text_form(prompt):
    [record] = rc.parse_row({"prompt": prompt, "context": "A long text."})
    assert record.prompt == "Sum this up.\n\nA long text."


ONE_TURN = [{"role": "user", "content": "Sum this up."}]
BESIDE_TURNS = {
    "context": {"context": "A long text."},
    "a list of contexts": {"context": ["Sum this up.", "A long text."]},
    "passage": {"passage": "A long text."},
    "article": {"article": "A long text."},
    "choices": {"choices": ["x1", "y1"]},
    "options": {"options": {"A": "x1", "B": "y1"}},
    "columns": {"A": "x1", "B": "y1"},
    "turns that a history replaces": {"context": turns("q0", "a0"), "history": [["q1", "a1"]]},
}


@pytest.mark.parametrize("beside", BESIDE_TURNS.values(), ids=BESIDE_TURNS)
@pytest.mark.parametrize("name", ["messages", "conversations", "prompt", "turns", "input"])
@pytest.mark.parametrize("answers", [{}, {"chosen": "good", "rejected": "bad"}])
def test_a_text_beside_turns_that_they_do_not_hold_costs_the_row(name, beside, answers):
    row = {name: ONE_TURN} | beside | answers
    with pytest.raises(rc.Failed, match="text beside the turns: `.*`; put it into a turn"):
        rc.parse_row(row, with_answers=bool(answers))


def test_a_text_beside_a_prompt_that_ends_with_an_answer_costs_the_row():
    row = {"prompt": "\n\nHuman: Sum this up.\n\nAssistant: No.", "context": "A long text."}
    with pytest.raises(rc.Failed, match="text beside the turns: `context`"):
        rc.parse_row(row)


@pytest.mark.parametrize("context", ["Passage.", " Passage.\n", "NaN", None, ["Passage.", "Q?"], 7])
def test_a_text_beside_turns_that_they_hold_is_no_loss(context):
    [record] = rc.parse_row({"messages": turns("Passage.\n\nQ?"), "context": context})
    assert record.prompt == "Passage.\n\nQ?"


def test_an_input_beside_turns_is_no_part_of_the_prompt():
    [record] = rc.parse_row({"messages": ONE_TURN, "input": "a copy"})
    assert record.prompt == "Sum this up."


def test_a_history_stands_before_turns_in_context_or_input():
    for name in ("context", "input"):
        [record] = rc.parse_row({name: ONE_TURN, "history": [["q0", "a0"]]})
        assert [turn["content"] for turn in record.messages] == ["q0", "a0", "Sum this up."]
