"""What people read on the terminal: summary, warnings, plan, progress, reasons, colour, messages."""

import ast
import asyncio
import errno
import io
import re
import sqlite3
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

import rlhf_constructor as rc
from tests.tiny import ROOT

SOURCE = (ROOT / "rlhf_constructor.py").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


# --- drop reasons


def literal_texts(node) -> list[str]:
    """The literal texts that an expression may give: `"tie" if x else "both bad"` has two."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.IfExp):
        return literal_texts(node.body) + literal_texts(node.orelse)
    if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
        return literal_texts(node.values[0])
    return []


def is_filter(node) -> bool:
    """Whether a statement of the module is a function registered in FILTERS."""
    decorators = getattr(node, "decorator_list", [])
    return any("FILTERS" in ast.unparse(decorator) for decorator in decorators)


def kinds_in(source: str) -> set[str]:
    """The kinds of all literal drop reasons: of each Failed(stage, reason) and of the filters."""
    tree = ast.parse(source)
    texts = []
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Failed"
        if called and len(node.args) > 1:
            texts += literal_texts(node.args[1])
    for rule in filter(is_filter, tree.body):
        for node in ast.walk(rule):
            if isinstance(node, ast.Return):
                texts += literal_texts(node.value)
    return {rc.reason_kind(text) for text in texts}


def test_every_drop_reason_of_the_source_is_explained():
    kinds = kinds_in(SOURCE)

    assert len(kinds) > 30 and sorted(kinds - set(rc.DROP_REASONS)) == []


def test_every_explanation_fits_a_line_and_reads_as_one_sentence():
    for kind, (meaning, advice) in rc.DROP_REASONS.items():
        assert len(kind) < 45 and 10 < len(meaning) <= 66 and len(advice) <= 75, kind
        assert not meaning.endswith(".") and not advice.endswith("."), kind
        assert "|" not in meaning + advice, "it would end a cell of the README's table"


def test_a_reason_is_explained_by_its_kind_and_a_reason_of_ones_own_by_nothing():
    assert rc.explain_reason("timeout: big: 600 s")[0].endswith("within --timeout")
    assert rc.explain_reason("the draft won") == ("", "")


def test_the_readme_explains_reasons_in_the_words_of_the_table():
    section = re.search(r"^#+ Why records are dropped\n(.*?)(?=^#|\Z)", README, re.M | re.S)
    shown = re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \|$", section[1], re.M)
    assert len(shown) >= 20
    for kind, meaning, advice in shown:
        assert rc.DROP_REASONS[kind] == (meaning, advice), kind


# --- the summary


def finished(read=300, pairs=171, **changes) -> SimpleNamespace:
    """What a run of 300 records leaves in OutputFiles."""
    dropped = Counter()
    dropped["orders disagree"] = 62
    dropped["low model won"] = 41
    dropped["score gap too small"] = 26
    files = {
        "read": read,
        "pairs": pairs,
        "dropped": dropped,
        "retryable": 0,
        "output": "data/o.jsonl",
        "drops": "data/o.dropped.jsonl",
        "test": "",
        "candidates": "",
        "pages": ["data/o.report.html", "data/o.report.json", ""],
        "rows": Counter({"data/o.jsonl": pairs, "data/o.dropped.jsonl": 129}),
        "run": SimpleNamespace(args=SimpleNamespace(output_format="standard")),
    }
    return SimpleNamespace(**(files | changes))


def called(stop=None, cache=True, money=1.02, kept=0.0) -> SimpleNamespace:
    """What a run leaves in Models: one answering model and the judge."""
    usage = {"tokens_in": 206_000, "tokens_out": 49_000, "money": money and money / 2}
    return SimpleNamespace(
        rows=lambda: [
            {"model": "qwen-max", "role": "answer", "calls": 600, "cached": 0, **usage},
            {"model": "qwen-max", "role": "judge", "calls": 600, "cached": 0, **usage},
        ],
        usage={"qwen-max": SimpleNamespace(kept=kept, money=money)},
        stop=stop,
        cache=SimpleNamespace(db=cache),
        args=SimpleNamespace(batch=False, prices={}),
    )


def numbers(warnings=1, few="", **changes) -> dict:
    """A report's numbers as far as the terminal shows them."""
    warning = {
        "level": "critical",
        "metric": "identity",
        "finding": "The model name alone predicts the label (100%, 95% CI 98-100%, n=171)",
        "meaning": "A reward model can learn to recognise the model instead of quality.",
        "advice": "Try --method generate_pairs, or the same models on both sides.",
    }
    return {
        "pairs": 171,
        "warnings": [warning] * warnings,
        "checks": {"passed": 14, "too_few": 6, "total": 24},
        "headline": ["order flips 12%", "chosen is longer 54%", "median score gap 2.5"],
        "few": few,
        "people": [],
        "notes": [],
    } | changes


def test_the_summary_shows_result_quality_calls_and_files_in_this_order():
    text = rc.summary(finished(), called(), numbers())
    assert (
        text
        == """\
Read 300 records, wrote 171 pairs (57%), dropped 129.
    62  orders disagree      the judge preferred a different answer when the order was swapped
    41  low model won        the weak model's answer was better
    26  score gap too small  the score gap (less --length-penalty) was below --min-score-gap

Quality of the 171 pairs
  CRITICAL  The model name alone predicts the label (100%, 95% CI 98-100%, n=171)
            A reward model can learn to recognise the model instead of quality.
            Try --method generate_pairs, or the same models on both sides.
  ok        order flips 12%, chosen is longer 54%, median score gap 2.5; 14 of 24 checks passed, 6
            need more data

API calls: 1,200 made, 0 from cache; 412,000 tokens in, 98,000 out; cost 1.02 (--price)

Wrote
  data/o.jsonl          171 pairs
  data/o.dropped.jsonl  129 records with their reasons
  data/o.report.html    quality report, open it in a browser"""
    )


def test_a_summary_without_report_prices_and_drops_leaves_these_lines_out():
    files = finished(read=5, pairs=5, dropped=Counter(), rows=Counter({"data/o.jsonl": 5}))
    files.pages = ["", "", ""]
    assert rc.summary(files, called(money=None)).splitlines() == [
        "Read 5 records, wrote 5 pairs (100%), dropped 0.",
        "",
        "API calls: 1,200 made, 0 from cache; 412,000 tokens in, 98,000 out",
        "",
        "Wrote",
        "  data/o.jsonl  5 pairs",
    ]


def test_several_pairs_of_a_record_are_told_from_records():
    assert rc.result_lines(finished(pairs=400))[0] == (
        "Read 300 records, wrote 400 pairs from 171 records (57%), dropped 129."
    )


def test_one_of_a_thing_is_singular():
    dropped = Counter({"empty prompt": 1})
    rows = Counter({"data/o.jsonl": 0, "data/o.dropped.jsonl": 1})
    files = finished(read=1, pairs=0, dropped=dropped, rows=rows)
    lines = rc.summary(files, called()).splitlines()
    assert lines[0] == "Read 1 record, wrote 0 pairs (0%), dropped 1."
    assert "  data/o.dropped.jsonl  1 record with its reason" in lines


def test_the_rare_reasons_are_counted_at_the_end():
    dropped = Counter({"tie": 5, "timeout": 2, **{f"reason {n}": 1 for n in range(5)}})
    lines = rc.result_lines(finished(read=12, pairs=0, dropped=dropped))
    assert lines[1].split() == ["5", "tie", "both", "answers", "were", "rated", "equal"]
    assert lines[2].startswith("     2  timeout   the server did not answer within --timeout")
    assert lines[-1] == "     3  other reasons" and len(lines) == 6


def test_few_pairs_come_with_what_to_try_and_many_without():
    assert rc.advice_lines(finished()) == []
    dropped = Counter({"tie": 9, "both refuse": 5})
    assert rc.advice_lines(finished(read=15, dropped=dropped)) == [
        "Few records gave a pair. What to try:",
        "  tie: a stronger --judge-model",
    ]


def test_failed_calls_say_that_a_rerun_may_help():
    text = " ".join(rc.advice_lines(finished(retryable=7)))
    assert text.startswith("7 records failed for a reason that may pass: run the same command")


@pytest.mark.parametrize("cache, advice", [(True, "in the cache"), (False, "to start over")])
def test_a_stopped_run_says_where_its_pairs_are(cache, advice):
    text = rc.summary(finished(), called(stop=rc.Stop("x"), cache=cache))
    assert "Stopped after 300 records; 171 pairs so far, in data/o.jsonl.part." in text
    assert advice in text and "Wrote" not in text


def test_what_earlier_runs_paid_is_named():
    text = " ".join(" ".join(rc.call_lines(called(kept=0.4))).split())
    assert text.endswith("cost 1.02 (--price), 0.4000 of it in earlier runs")


@pytest.mark.parametrize("warnings", [0, 1, 3, 9])
def test_the_longest_summary_has_30_lines_of_100_columns(warnings):
    dropped = Counter(dict.fromkeys(list(rc.DROP_REASONS)[:9], 99))
    files = finished(read=1000, dropped=dropped, candidates="c.jsonl", test="t.jsonl", retryable=9)
    files.pages[2] = "review.html"
    few = "29 pairs are too few for most quality checks (they need 30 to 100 cases)."
    lines = rc.summary(files, called(), numbers(warnings, few)).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 30


# --- the quality of the pairs


def test_the_worst_warnings_come_first_and_the_others_are_counted():
    data = numbers(warnings=5)
    data["warnings"] = [row | {"advice": f"Try {n}."} for n, row in enumerate(data["warnings"])]
    lines = rc.report_lines(data, room=12)
    assert len(lines) <= 12 and "  3 more warnings in the report" in lines
    assert sum(line.startswith("  CRITICAL") for line in lines) == 2


def test_a_first_warning_is_shown_however_little_room_there_is():
    assert any("CRITICAL" in line for line in rc.report_lines(numbers(), room=2))


def test_without_warnings_the_checks_that_passed_are_named():
    lines = rc.report_lines(numbers(warnings=0, headline=[]))
    assert lines[1:] == ["  ok        14 of 24 checks passed, 6 need more data"]


def test_where_no_check_passed_the_label_is_info():
    checks = {"passed": 0, "too_few": 24, "total": 24}
    lines = rc.report_lines(numbers(warnings=0, headline=[], checks=checks))
    assert lines[1:] == ["  info      0 of 24 checks passed, 24 need more data"]


def test_advice_that_two_warnings_share_is_printed_once():
    lines = rc.report_lines(numbers(warnings=2), room=20)
    assert sum("recognise the model" in line for line in lines) == 1
    assert sum(line.startswith("  CRITICAL") for line in lines) == 2


def test_too_few_pairs_reviews_and_notes_are_sentences():
    few = "29 pairs are too few for most quality checks (they need 30 to 100 cases)."
    people = ["People reviewed 12 of 29 pairs: 11 confirmed, 1 flipped."]
    lines = rc.report_lines(numbers(warnings=0, few=few, people=people))
    assert lines[-2:] == [f"  note      {few}", f"  note      {people[0]}"]


# --- the plan


def test_a_plan_of_100_columns_is_one_line_and_a_longer_one_two():
    models = called(money=None)
    assert rc.plan_line(10_000, models) == (
        "Plan: 10,000 records, 1,200 API calls (600 qwen-max, 600 judging by qwen-max);\n"
        "  0 are cached, 1,200 to pay."
    )
    models.rows = lambda: called(money=None).rows()[:1]
    assert rc.plan_line(600, models) == (
        "Plan: 600 records, 600 API calls (600 qwen-max); 0 are cached, 600 to pay."
    )


def test_a_plan_with_prices_names_the_expected_cost_and_what_is_paid():
    models = called(kept=0.25)
    models.args.prices = {"qwen-max": (1, 1)}
    text = " ".join(rc.plan_line(600, models).split())
    assert text.endswith("Expected cost: 1.02 (--price), 0.2500 of it in earlier runs.")


def test_a_plan_with_a_price_too_few_says_which_model_has_none():
    models = called()
    models.args.prices = {"qwen-max": (1, 1)}
    rows = models.rows()
    rows[0] |= {"model": "gpt-5-nano", "money": None}
    models.rows = lambda: rows
    text = " ".join(rc.plan_line(600, models).split())
    assert text.endswith("Expected cost: unknown, because gpt-5-nano has no --price.")


def dry_run(models, capsys) -> str:
    """What --dry-run prints of these models."""
    models.first_prompts = {"qwen-max as answer": [{"role": "user", "content": "Why?"}]}
    rc.show_plan(600, models)
    return capsys.readouterr().out


def test_a_dry_run_prints_a_line_for_each_model_and_the_first_prompts(capsys):
    models = called()
    models.args.prices = {"qwen-max": (1, 1)}
    text = dry_run(models, capsys)
    line = "  qwen-max: 1,200 calls to pay, 0 cached; about 412,000 tokens in, 98,000 out; 1.02 (--price)"
    assert line in text.splitlines()
    assert text.endswith("\n--- First prompt to qwen-max:\nWhy?\n")


def test_a_dry_run_without_prices_says_how_to_get_the_cost(capsys):
    text = dry_run(called(money=None), capsys)
    assert "98,000 out\nFor the cost add --price MODEL=IN/OUT.\n" in text


# --- colour, control characters, the progress bar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown_on_terminal(monkeypatch, text: str, **env) -> str:
    """What `show` writes to a terminal."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm", "WT_SESSION": "1"} | env).items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        rc.show(text)
        return sys.stdout.getvalue()


def test_levels_have_colour_on_a_terminal(monkeypatch):
    text = "  CRITICAL  bad\n  ok        good\nnot CRITICAL  here"
    assert shown_on_terminal(monkeypatch, text) == (
        "  \x1b[1;31mCRITICAL\x1b[0m  bad\n  \x1b[1;32mok\x1b[0m        good\nnot CRITICAL  here\n"
    )


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_switched_off(monkeypatch, name, value):
    text = shown_on_terminal(monkeypatch, "  CRITICAL  bad", **{name: value})
    assert text == "  CRITICAL  bad\n"


def test_a_pipe_gets_no_colour(capsys):
    rc.show("  CRITICAL  bad")
    assert capsys.readouterr().out == "  CRITICAL  bad\n"


def test_control_characters_are_made_visible(capsys):
    rc.show("a\x1b[31mred\tb\n\u202ec\x9b")
    rc.note("field \x07")
    shown = capsys.readouterr()
    assert shown.out == "a\\x1b[31mred\tb\n\\u202ec\\x9b\n" and shown.err == "field \\x07\n"


def test_a_file_name_in_utf_8_is_readable_though_the_locale_is_c(capsys):
    rc.show("数据.jsonl".encode().decode("ascii", "surrogateescape"))
    assert capsys.readouterr().out == "数据.jsonl\n"


def draw_bar() -> None:
    """Draw a progress bar, as after two seconds of a run."""
    models = SimpleNamespace(replies=3, tokens=lambda: 59234, total=2, spent=0)
    models.args = SimpleNamespace(prices={})
    files = SimpleNamespace(pairs=0, dropped=Counter(), retryable=0)

    async def draw():
        progress_bar = rc.Progress(files, models)
        progress_bar.finished = 1
        progress_bar.draw()

    asyncio.run(draw())


@pytest.fixture
def no_bar(monkeypatch):
    """No bar is drawn before or after the test."""
    monkeypatch.setattr(rc.Progress, "bar", None)


def test_a_note_stands_on_a_line_of_its_own_below_the_bar(no_bar, capsys):
    pytest.importorskip("tqdm")
    draw_bar()
    rc.note("a note")
    assert re.search(r"1/2 .*replies=3.*tokens=59234\]\na note\n", capsys.readouterr().err)


def test_a_note_leaves_no_piece_of_the_bar_on_a_terminal(no_bar, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    draw_bar()
    before = sys.stderr.getvalue()
    rc.note("a note")
    written = sys.stderr.getvalue().removeprefix(before)
    bar = before.rpartition("\r")[2]
    assert "1/2" in bar
    cleared, _, last = written.rpartition("\r")
    assert last == "a note\n" and cleared.strip("\r") == " " * len(bar)


def test_nothing_is_drawn_in_the_first_two_seconds(no_bar, capsys):
    async def short_run():
        progress_bar = rc.Progress(None, None)
        await asyncio.sleep(0)
        rc.note("Plan: ...")
        progress_bar.close()

    asyncio.run(short_run())
    assert capsys.readouterr().err == "Plan: ...\n"


def test_the_bar_ends_its_line_in_a_file(no_bar, capsys):
    pytest.importorskip("tqdm")

    async def run():
        models = SimpleNamespace(replies=3, tokens=lambda: 59234, total=2, spent=0)
        models.args = SimpleNamespace(prices={})
        progress_bar = rc.Progress(SimpleNamespace(pairs=4, dropped=Counter({"tie": 5})), models)
        progress_bar.draw()
        progress_bar.close()

    asyncio.run(run())
    assert capsys.readouterr().err.endswith("replies=3, pairs=4, drops=5, tokens=59234]\n")


def test_without_tqdm_the_bar_is_silent(no_bar, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    draw_bar()
    rc.note("a note")
    assert capsys.readouterr() == ("", "a note\n")


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def write(self, text: str):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def fileno(self) -> int:
        return self.file.fileno()


def test_a_stream_without_reader_ends_nothing(monkeypatch, tmp_path):
    with open(tmp_path / "stream", "w") as file:
        monkeypatch.setattr(sys, "stderr", Broken(file))
        monkeypatch.setattr(sys, "stdout", Broken(file))
        rc.note("to nobody")
        rc.show("to nobody")
        file.write("later")
    assert (tmp_path / "stream").read_text() == ""


# --- stops


@pytest.mark.parametrize(
    "error, advice",
    [
        (OSError(errno.ENOSPC, "No space left"), "the disk is full. Nothing is lost: free some"),
        (sqlite3.OperationalError("database or disk is full"), "the disk is full. Nothing is lost"),
        (OSError(errno.EMFILE, "Too many"), "too many open files. Nothing is lost: lower --conc"),
        (OSError(errno.EIO, "I/O error"), "I/O error. Nothing is lost: run the same command"),
    ],
    ids=["disk", "cache", "files", "other"],
)
def test_a_stop_says_what_to_do(error, advice):
    assert advice in rc.disk_message(error)
