"""A reader's edits to the file: the result of each, and what a mistake in each is called."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import SCRIPT, Result, write_jsonl

SOURCE = SCRIPT.read_text("utf-8")
SECTIONS = {
    "inputs": "§2",
    "methods": "§4",
    "filters": "§5",
    "outputs": "§6",
    "providers": "§7",
}
BAR = "# " + "-" * 98 + "\n"
ASKED = [
    {"prompt": f"What is {n} plus {n}?", "output": f"It is {2 * n}. That is a fact. Count it."}
    for n in range(3, 7)
]
OFFLINE = ("--provider", "offline", "--report-path", "none")


def inserted(section: str, code: str) -> str:
    """The script with code of one's own at the end of a section, as an editor leaves it."""
    number = SECTIONS[section]
    start = SOURCE.index(f"{BAR}# {number} ")
    end = SOURCE.index(f"{BAR}# §", start + len(BAR))
    if section == "providers":
        end = SOURCE.index("# ====", start)
    return SOURCE[:end] + code + "\n\n" + SOURCE[end:]


@pytest.fixture
def edited(tmp_path, monkeypatch, capsys):
    """edited(section, code, *flags, records=ASKED) runs the script with that code in it."""
    monkeypatch.chdir(tmp_path)

    def run(section, code, *flags, records=ASKED):
        script = tmp_path / "edited_script.py"
        script.write_text(inserted(section, code), "utf-8")
        write_jsonl(tmp_path / "in.jsonl", records)
        spec = importlib.util.spec_from_file_location("edited_script", script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "edited_script", module)
        spec.loader.exec_module(module)
        command = ["--input-file", "in.jsonl", "--output-path", "out.jsonl", *OFFLINE, *flags]
        status = module.main(command)
        streams = capsys.readouterr()
        return Result(status, streams.out, streams.err, tmp_path / "out.jsonl")

    return run


# --- a method

METHOD = '''
@register(METHODS, asks=("high",))
async def mine(record, run):
    """the reference against an evasion of my own"""
    [good] = [await run.ask_text(record, run.high, record.messages)]
    BODY
'''


def method(body: str) -> str:
    return METHOD.replace("BODY", body.replace("\n", "\n    "))


MINE = ("--method", "mine")


def test_a_pair_made_by_hand_becomes_a_row(edited):
    code = method('return [Pair(record, Answer(good, "reference"), Answer("No idea.", "mine"))]')
    result = edited("methods", code, *MINE)
    assert result.status == 0 and len(result.pairs) == 4
    assert result.pairs[0]["rejected"] == "No idea." and result.pairs[0]["rejected_model"] == "mine"


def test_a_pair_made_by_hand_pays_the_length_penalty(edited):
    """chosen scores 9, rejected 7; chosen is more than 1.5 times as long: 3 points are taken off."""
    body = """chosen = Answer(good, score=9.0, votes=(9.0,))
rejected = Answer("No idea.", score=7.0, votes=(7.0,))
return [Pair(record, chosen, rejected)]"""
    assert len(edited("methods", method(body), *MINE).pairs) == 4
    result = edited("methods", method(body), *MINE, "--length-penalty", "3")
    assert result.reasons == ["filter: score gap too small"] * 4


def test_an_answer_made_by_hand_and_judged_is_among_the_answers_of_a_drop(edited):
    code = '''
@register(METHODS, asks=("high", "low"))
async def mine(record, run):
    """asks for two answers and adds one"""
    answers = await run.ask_all(record, [run.high, run.low])
    await run.judge(record, [*answers, Answer("No idea.", "by hand")])
    raise Failed("judge", "not today")
'''
    result = edited("methods", code, *MINE)
    for drop in result.dropped:
        assert [answer["model"] for answer in drop["answers"]][-1] == "by hand"
        assert all(answer["score"] for answer in drop["answers"]) and len(drop["answers"]) == 3


def test_a_method_that_calls_no_model_may_be_a_plain_function(edited):
    code = '''
@register(METHODS, asks=())
def mine(record, run):
    """the reference against nothing much"""
    return [Pair(record, Answer(record.reference), Answer("Hm."))]
'''
    assert len(edited("methods", code, *MINE).pairs) == 4


BROKEN_METHODS = [
    pytest.param("return [Pair(record, goood, good)]", "raised NameError: name 'goood'", id="name"),
    pytest.param("return good.nothing", "raised AttributeError: ", id="attribute"),
    pytest.param("return good", "returned 'It is 6.", id="a text"),
    pytest.param("return [good]", "returned a list with 'It is 6.", id="no Pair"),
    pytest.param("return [Pair(record, good, good)]", "which is not an Answer", id="no Answer"),
    pytest.param(
        'return [Pair(record, Answer(good, score="9"), Answer("Hm."))]',
        "with the score '9', which is not a number",
        id="a score that is text",
    ),
    pytest.param(
        'return pair_up(record, [Answer(good), Answer("Hm.")], run)',
        "pair_up needs votes: await run.judge(record, answers) first",
        id="nobody judged",
    ),
]


@pytest.mark.parametrize("body, says", BROKEN_METHODS)
def test_a_mistake_in_a_method_names_the_method_and_the_line(edited, body, says):
    result = edited("methods", method(body), *MINE)
    last = result.err.splitlines()[-1]
    assert result.status == 3 and not result.output.exists()
    assert "stopped: in.jsonl:1: the method `mine` " in last and says in last
    assert result.err.count("Traceback") == ("raised" in last)


# --- a filter

FILTER = '''
@register(FILTERS, on="pair"SETTINGS)
def too_short(pair, run):
    """chosen has fewer than 30 characters"""
    BODY
'''


def pair_filter(body: str, settings: str = "") -> str:
    return FILTER.replace("BODY", body).replace("SETTINGS", settings)


DROP_SHORT = 'return "too short" if len(pair.chosen.text) < 99 else None'


def test_a_filter_of_ones_own_drops_pairs_and_can_be_skipped(edited):
    assert edited("filters", pair_filter(DROP_SHORT)).reasons == ["filter: too short"] * 4
    skipped = edited("filters", pair_filter(DROP_SHORT), "--skip-filter", "too_short")
    assert len(skipped.pairs) == 4


def test_an_opt_in_filter_is_used_only_where_it_is_named(edited):
    code = pair_filter(DROP_SHORT, ", opt_in=True")
    assert len(edited("filters", code).pairs) == 4
    assert edited("filters", code, "--use-filter", "too_short").pairs == []
    assert edited("filters", code, "--use-filter", "loop").status == 2


BROKEN_FILTERS = [
    pytest.param("return reson", "raised NameError: name 'reson'", id="name"),
    pytest.param("return pair.gap < 1 + None", "raised TypeError: ", id="type"),
    pytest.param("return len(pair.chosen.text) < 99", "returned True, not a reason", id="True"),
    pytest.param("return 0", "returned 0, not a reason (text) or None", id="a number"),
]


@pytest.mark.parametrize("body, says", BROKEN_FILTERS)
def test_a_mistake_in_a_filter_names_the_filter_and_the_line(edited, body, says):
    result = edited("filters", pair_filter(body))
    last = result.err.splitlines()[-1]
    assert result.status == 3 and result.err.count("Traceback") == ("raised" in says)
    assert "stopped: in.jsonl:1: the filter `too_short` " in last and says in last


def test_an_answer_filter_names_itself_too(edited):
    code = FILTER.replace('on="pair"SETTINGS', 'on="answer"').replace("pair, run", "record, answer")
    result = edited("filters", code.replace("BODY", "return answer.txt"))
    assert "the filter `too_short` raised AttributeError" in result.err.splitlines()[-1]


def test_a_filter_has_to_say_what_it_looks_at(edited):
    with pytest.raises(ValueError, match='on="answer" or on="pair"'):
        edited("filters", pair_filter(DROP_SHORT).replace(', on="pair"', ""))


# --- an output format

FORMAT = '''
@register(OUTPUTS)
def as_tsv_like(pair, run):
    """question, good, bad"""
    BODY
'''
ROW = '{"question": pair.record.prompt, "good": pair.chosen.text, "bad": pair.rejected.text}'
TSV_LIKE = ("--output-format", "tsv_like")


def output_format(body: str) -> str:
    return FORMAT.replace("BODY", body)


def test_a_format_of_ones_own_is_written(edited):
    result = edited("outputs", output_format(f"return [{ROW}]"), *TSV_LIKE)
    assert result.status == 0 and len(result.pairs) == 4
    assert list(result.pairs[0]) == ["question", "good", "bad"]


BROKEN_FORMATS = [
    pytest.param("return pairr", "raised NameError: name 'pairr'", id="name"),
    pytest.param(f"return {ROW}", "returned {'question': ", id="a dict"),
    pytest.param("return [pair.chosen.text]", "not a list of rows (dicts)", id="texts"),
    pytest.param('return [{"gap": None}]', "wrote null in `gap`", id="null"),
    pytest.param('return [{"a": {"b": [None]}}]', "wrote null in `a`", id="null inside"),
    pytest.param('return [{"x": pair.chosen}]', "a row that is not JSON: ", id="an object"),
    pytest.param(
        'return [{"a": "x"}, {"b": "y", "a": "x"}]',
        "wrote a row with b, a; the first row has a: every row needs the same keys",
        id="other keys",
    ),
    pytest.param('return [{"x": float("nan")}]', "a row that is not JSON: ", id="NaN"),
    pytest.param('return [{"x": "\\ud83d"}]', "a row that is not JSON: ", id="half an emoji"),
]


@pytest.mark.parametrize("body, says", BROKEN_FORMATS)
def test_a_mistake_in_a_format_names_the_format_and_the_line(edited, body, says):
    result = edited("outputs", output_format(body), *TSV_LIKE)
    last = result.err.splitlines()[-1]
    assert result.status == 3 and not result.output.exists()
    assert "stopped: in.jsonl:1: the output format `tsv_like` " in last and says in last
    assert result.err.count("Traceback") == ("raised" in says)


def test_a_format_without_rows_says_so(edited):
    result = edited("outputs", output_format("return []"), *TSV_LIKE)
    assert result.reasons == ["filter: the format wrote no row"] * 4


def test_scores_may_be_in_some_rows_alone(edited):
    """They are taken out of the file at the end."""
    body = """row = {"a": pair.chosen.text}
    if "3" in pair.record.prompt:
        row["score_chosen"] = 1.0
    return [row]"""
    result = edited("outputs", output_format(body), *TSV_LIKE)
    assert [list(row) for row in result.pairs] == [["a"]] * 4


def test_a_format_that_is_written_once_needs_that_column(edited):
    code = output_format(f"return [{ROW}]").replace("(OUTPUTS", '(OUTPUTS, once=("prompt",)')
    result = edited("outputs", code, *TSV_LIKE)
    assert result.status == 3
    assert "once='prompt', which a row lacks" in result.err.splitlines()[-1]


def test_the_word_null_in_a_text_is_a_text(edited):
    code = output_format('return [{"x": "null", "y": {"null": 1}}]')
    assert edited("outputs", code, *TSV_LIKE).status == 0


# --- an input adapter

INPUT = '''
@register(INPUTS)
def from_quiz(row):
    """`quiz` and `key`: a question and its answer"""
    BODY
'''
QUIZ = [{"quiz": ask["prompt"], "key": ask["output"]} for ask in ASKED]


def adapter(body: str) -> str:
    return INPUT.replace("BODY", body.replace("\n", "\n    "))


READ_QUIZ = """if "quiz" not in row:
    return None
turns = [{"role": "user", "content": row["quiz"]}]
return [Record(turns, reference=row["key"])]"""


def test_an_input_of_ones_own_is_read(edited):
    result = edited("inputs", adapter(READ_QUIZ), records=QUIZ)
    assert result.status == 0 and [row["prompt"] for row in result.pairs] == [
        row["quiz"] for row in QUIZ
    ]


BROKEN_INPUTS = [
    pytest.param(READ_QUIZ.replace('row["quiz"]', 'row["quizz"]'), "raised KeyError", id="key"),
    pytest.param(READ_QUIZ.replace('row["key"]', "key"), "raised NameError", id="name"),
    pytest.param("return conversation(row, row, row, row)", "raised TypeError", id="arguments"),
    pytest.param(
        READ_QUIZ.replace("return [Record", "return (Record").replace('"])]', '"]))'),
        "not a list of records",
        id="no list",
    ),
    pytest.param('return [Record("text")]', "made a Record of 'text', not of [{", id="a text"),
    pytest.param('return [Record([{"content": "Q"}])]', "made a Record of [{'con", id="no role"),
]


@pytest.mark.parametrize("body, says", BROKEN_INPUTS)
def test_a_mistake_in_an_adapter_names_the_adapter_and_the_line(edited, tmp_path, body, says):
    result = edited("inputs", adapter(body), records=QUIZ)
    last = result.err.splitlines()[-1]
    assert result.status == 3 and not list(tmp_path.glob("out*"))
    assert "stopped: in.jsonl:1: the input adapter `from_quiz` " in last and says in last
    assert result.err.count("Traceback") == ("raised" in says)


def test_a_mistake_that_only_a_later_record_meets_names_its_line(edited):
    records = [*QUIZ * 6, {"quiz": "Without a key?"}]
    result = edited("inputs", adapter(READ_QUIZ), records=records)
    last = result.err.splitlines()[-1]
    assert "in.jsonl:25: the input adapter `from_quiz` raised KeyError: 'key'" in last


def test_junk_in_a_row_is_no_bug_of_the_adapter(edited):
    """What goes wrong in the functions that an adapter calls comes from the row."""
    body = READ_QUIZ.replace(
        'return [Record(turns, reference=row["key"])]', 'return [conversation(row["quiz"], row)]'
    )
    records = [{"quiz": [{"role": "user", "content": "Hi?"}], "output": "Ho."}, {"quiz": 7}]
    result = edited("inputs", adapter(body), records=records)
    reason = result.dropped[-1]["reason"]
    assert result.status != 3 and reason.startswith("malformed record: ")


def test_an_error_in_a_helper_of_an_adapter_names_its_line(edited, tmp_path):
    code = adapter("return [prompt_record(first_word(row), row)]")
    code += '\ndef first_word(row):\n    return row["quizz"]\n'
    result = edited("inputs", code, records=[*QUIZ, *ASKED])
    lines = (tmp_path / "edited_script.py").read_text("utf-8").splitlines()
    line = 1 + lines.index('    return row["quizz"]')
    where = f"(KeyError in line {line} of this script, under from_quiz)"
    assert result.dropped[0]["reason"] == f"malformed record: 'quizz' {where}"


# --- a provider

PROVIDER = '''
@register(PROVIDERS)
class ask_mine(Provider):
    """a provider of my own"""

    async def call(self, name, messages, options, hints):
        BODY
'''
MINE_IS_LOW = ("--low-model", "mine:m", "--judge-model", "none")


def provider(body: str) -> str:
    return PROVIDER.replace("BODY", body.replace("\n", "\n        "))


def test_a_provider_of_ones_own_is_asked(edited):
    result = edited("providers", provider('return Reply("No idea.")'), *MINE_IS_LOW)
    assert [row["rejected"] for row in result.pairs] == ["No idea."] * 4


BROKEN_PROVIDERS = [
    pytest.param("return Replyy(name)", "raised NameError: name 'Replyy'", id="name"),
    pytest.param('return Reply(messages["content"])', "raised TypeError: ", id="type"),
    pytest.param('return Reply(options["sample"])', "raised KeyError: 'sample'", id="key"),
    pytest.param("return Reply(str(int(name)))", "raised ValueError: ", id="value"),
    pytest.param("return Reply(messages.content)", "raised AttributeError: ", id="attribute"),
    pytest.param(
        "return await super().call(name, messages, options, hints)",
        "raised NotImplementedError",
        id="no call",
    ),
    pytest.param("return Reply(str(1 / 0))", "raised ZeroDivisionError: ", id="division"),
    pytest.param('return messages[-1]["content"]', "not a Reply with a text", id="a text"),
    pytest.param('return Reply("a", "done")', "with the finish 'done', not stop", id="finish"),
]


@pytest.mark.parametrize("body, says", BROKEN_PROVIDERS)
def test_a_mistake_in_a_provider_names_the_provider_and_the_line(edited, body, says):
    result = edited("providers", provider(body), *MINE_IS_LOW)
    last = result.err.splitlines()[-1]
    assert result.status == 3 and not result.output.exists()
    assert "stopped: in.jsonl:1: the provider `mine` " in last and says in last
    assert result.err.count("Traceback") == ("raised" in says)


def test_a_mistake_in_a_providers_constructor_names_the_provider(edited):
    code = provider('return Reply("No.")') + "\n    def __init__(self, url, key):\n        pass\n"
    result = edited("providers", code, *MINE_IS_LOW)
    assert "the provider `mine` raised TypeError: " in result.err.splitlines()[-1]


def test_a_stop_without_any_call_does_not_speak_of_paying_again(edited):
    """The third record meets the mistake; offline models cost nothing."""
    code = method(
        'if "5 plus" in record.prompt:\n    raise KeyError(1)\nraise Failed("judge", "no")'
    )
    result = edited("methods", code, *MINE, "--concurrency", "1")
    assert result.status == 3 and "Run the same command again to start over;" in result.out
    assert "pays for all calls again" not in result.out


def test_a_package_that_is_missing_is_named(edited):
    code = provider('return Reply("No.")') + '\n    package = "no_such_sdk"\n'
    result = edited("providers", code, *MINE_IS_LOW)
    assert result.status == 2
    assert "the package no_such_sdk is missing: pip install no_such_sdk" in result.err


# --- the whole file


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_says_where_to_edit(section):
    body = re.search(rf"# {SECTIONS[section]} .*?(?=^# §)", SOURCE, re.S | re.M)[0]
    assert "# EDIT HERE" in body


def test_a_name_that_is_taken_and_a_missing_docstring_are_named(edited):
    with pytest.raises(ValueError, match="model_comparison: the name is taken"):
        edited("methods", method("").replace("mine", "model_comparison") + "    pass")
    with pytest.raises(ValueError, match="mine: no docstring"):
        edited("methods", "@register(METHODS)\ndef mine(record, run):\n    return []\n")


WRONG_SETTINGS = [
    pytest.param("METHODS, ask=()", r"no setting 'ask' here \(known: gap, asks", id="unknown"),
    pytest.param("INPUTS, once=()", r"no setting 'once' here \(known: none\)", id="none known"),
    pytest.param('METHODS, asks="high"', r"e.g. asks=\('high',\), not 'high'", id="asks"),
    pytest.param('OUTPUTS, once="prompt"', r"e.g. once=\('prompt',\)", id="once"),
    pytest.param('METHODS, asks=("judge",)', "'judge' is not high, low or candidates", id="role"),
]


@pytest.mark.parametrize("arguments, says", WRONG_SETTINGS)
def test_a_setting_that_cannot_work_is_refused(edited, arguments, says):
    code = f'@register({arguments})\ndef mine(record, run):\n    """mine"""\n'
    with pytest.raises(ValueError, match=says):
        edited("methods", code, *MINE)


def test_a_name_that_the_file_uses_already_is_refused(edited):
    with pytest.raises(ValueError, match="similar_text: the name is taken in this file"):
        edited("methods", "similar_text = 1\n" + method("pass").replace("mine", "similar_text"))


def test_a_scale_upside_down_is_refused(edited, monkeypatch):
    monkeypatch.setitem(
        globals(), "SOURCE", SOURCE.replace("JUDGE_SCALE = (1, 10)", "JUDGE_SCALE = (10, 1)")
    )
    result = edited("methods", "")
    assert result.status == 2 and "the lowest score must be below the highest" in result.err


def test_a_python_without_docstrings_is_refused_in_a_sentence():
    env = {**os.environ, "PYTHONOPTIMIZE": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "run it without -OO" in done.stderr
