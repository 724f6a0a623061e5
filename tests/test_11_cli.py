"""§11 CLI: what is refused before anything happens, the files, the books."""

import gzip
import json
import os
import subprocess
import sys

import pytest

import rlhf_constructor as rc
from tests.conftest import DATA, ROOT, SCRIPT, rows, write_jsonl
from tests.server import Api, Fault, demo_world

DEMO = DATA / "alpaca_demo.jsonl"
MODELS = ("--provider", "openai", "--high-model", "gpt-4o", "--low-model", "gpt-4o-mini")
PROMPTS = [{"prompt": f"Question {n}?"} for n in range(12)]


# --- exit 2: one clear line, nothing called, nothing written

REFUSED = {
    "no input": ([], ["--provider", "offline"], "--input-file FILE is missing"),
    "no such input": (["--input-file", "none.jsonl"], [], "none.jsonl: no such file"),
    "a near name": (["--input-file", "../lesson3/data/alpaca_demo.jsonl"], [], "data/alpaca_demo.jsonl?"),
    "a folder": (["--input-file", "."], [], "is a folder"),
    "no key": (["--input-file", DEMO], [], "DASHSCOPE_API_KEY is not set"),
    "unknown method": (["--input-file", DEMO, "--method", "magic"], [], "model_comparison"),
    "unknown provider": (["--input-file", DEMO, "--provider", "magic"], [], "dashscope"),
    "unknown flag": (["--input-file", DEMO, "--high-modell", "x"], [], "did you mean --high-model?"),
    "shortened flag": (["--input-file", DEMO, "--high", "x"], [], "--high"),
    "output is the input": (["--input-file", "in.jsonl", "--output-path", "./in.jsonl"], [], "written over"),
    "drops over the input": (["--input-file", "x.dropped.jsonl", "--output-path", "x.jsonl"], [], "written over"),
    "output is a folder": (["--input-file", DEMO, "--output-path", "."], [], "name a .jsonl file"),
    "empty input": (["--input-file", "empty.jsonl"], ["--provider", "offline"], "holds no record"),
    "unknown fields": (["--input-file", "odd.jsonl"], ["--provider", "offline"], "no known fields: colour"),
    "no answers offline": (["--input-file", "in.jsonl"], ["--provider", "offline"], "no record has an answer"),
    "bad rename": (["--input-file", "odd.jsonl", "--rename", "size=prompt"], ["--provider", "offline"], "has no 'size'"),
    "no rename": (["--input-file", "odd.jsonl", "--rename", "size"], [], "is not OLD=NEW"),
    "same models": (["--input-file", DEMO, *MODELS[:4], "--low-model", "gpt-4o"], [], "are both gpt-4o"),
    "no judge": (["--input-file", DEMO, "--method", "generate_pairs", "--judge-model", "none"], [], "needs a judge"),
    "too many candidates": (["--input-file", DEMO, "--num-candidates", 9], [], "give 2 to 8"),
    "no workers": (["--input-file", DEMO, "--concurrency", 0], [], "give 1 to"),
    "not a number": (["--input-file", DEMO, "--max-samples", "ten"], [], "invalid int value"),
    "budget without price": (["--input-file", DEMO, *MODELS, "--max-cost", 1], [], "needs the price of gpt-4o"),
    "bad price": (["--input-file", DEMO, "--price", "gpt-4o=cheap"], [], "is not MODEL=IN/OUT"),
    "bad option": (["--input-file", DEMO, "--model-option", "top_p"], [], "is not [MODEL:]KEY=JSON"),
    "a key in an address": (["--input-file", DEMO, "--low-model", "openai:m@http://u:pw@h/v1"], [], "environment"),
    "reward without address": (["--input-file", DEMO, "--judge-model", "reward:rm"], [], "needs its address"),
    "kto both ways": (["--input-file", DEMO, "--output-format", "kto", "--strategy", "adjacent"], [], "both ways"),
    "missing rubric": (["--input-file", DEMO, "--rubric", "none.txt"], [], "none.txt"),
    "a file of no kind": (["--input-file", "noise.jsonl"], ["--provider", "offline"], "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("source, more, says", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, monkeypatch, capsys, source, more, says):
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "DASHSCOPE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    write_jsonl(tmp_path / "x.dropped.jsonl", PROMPTS)
    write_jsonl(tmp_path / "odd.jsonl", [{"colour": "red"}])
    (tmp_path / "empty.jsonl").write_bytes(b"\xef\xbb\xbf\n\n")
    (tmp_path / "noise.jsonl").write_bytes(bytes(range(256)) * 9)
    before = sorted(os.listdir(tmp_path))
    assert rc.main([*map(str, source), *more]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == before


def test_no_arguments_show_three_commands_and_the_methods(capsys):
    assert rc.main([]) == 0
    out = capsys.readouterr().out
    assert out.count("python rlhf_constructor.py") == 3 and all(name in out for name in rc.METHODS)


def test_help_lists_every_entry_of_every_table():
    out = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for table in (rc.METHODS, rc.INPUTS, rc.FILTERS, rc.OUTPUTS, rc.PROVIDERS, rc.STRATEGIES):
        assert all(name in out for name in table)
    lesson = out.index("the lesson's command:")
    assert all(lesson < out.index(f"  {flag} ") for flag in ("--input-file", "--method", "--output-path"))


def test_help_and_the_offline_provider_need_the_standard_library_only(tmp_path):
    block = "import sys; sys.modules.update(dict.fromkeys(['openai', 'dashscope', 'aiohttp', 'tqdm']));"
    for flags in (
        ["--help"],
        ["--provider", "offline", "--input-file", str(DEMO), "--output-path", "o.jsonl"],
    ):
        code = f"{block} sys.path.insert(0, {str(ROOT)!r}); import rlhf_constructor as rc; sys.exit(rc.main({flags}))"
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)


# --- the books


def test_every_record_is_a_pair_or_a_drop_with_its_line(rlhf, tmp_path):
    lines = [json.dumps({"prompt": f"Question {n}?"}) for n in range(6)]
    lines += [
        "{broken",
        '{"colour": 1}',
        lines[0],
        '{"prompt": " "}',
        '{"prompt": "refuse me"}',
        '"a plain string"',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    bad = lambda call: Fault(400) if "refuse" in call.prompt else demo_world(call)
    with Api(bad) as api:
        result = rlhf(tmp_path / "in.jsonl", *MODELS, "--judge-model", "none", api=api)
    assert [row["line"] for row in result.dropped] == [7, 8, 9, 10, 11]
    assert "12 records read: 7 (58%) gave 7 pairs, 5 dropped" in result.out
    stages = [reason.split(":")[0] for reason in result.reasons]
    assert stages == ["input", "input", "input", "input", "model"]
    assert result.dropped[2]["reason"] == "repeated prompt" and result.dropped[2]["prompt"] == "Question 0?"


def test_few_pairs_come_with_advice(rlhf):
    with Api(lambda call: "positive") as api:
        result = rlhf(PROMPTS, *MODELS, api=api)
    assert result.status == 1 and result.pairs == []
    assert "12  filter: identical answers" in result.out and "--system-prompt" in result.out


def test_the_plan_names_the_calls_that_are_then_made(rlhf):
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, api=api)
        plan = "12 records x (1 gpt-4o + 1 gpt-4o-mini + 2 gpt-4o as judge) = 48 calls, 0 of them cached"
        assert plan in result.err and "--judge-model none: 24" in result.err and api.count() == 48
        result = rlhf(PROMPTS + [{"prompt": "one more"}], *MODELS, api=api)
        assert "= 52 calls, 48 of them cached" in result.err and api.count() == 52


def test_a_dry_run_needs_no_key_calls_nobody_and_writes_nothing(rlhf, tmp_path):
    result = rlhf(PROMPTS, "--dry-run", "--price", "qwen3-max=1/2", "--provider", "dashscope")
    assert result.status == 0 and os.listdir(tmp_path) == ["in.jsonl"]
    assert "12 records read" in result.out and "at the given price" in result.out
    assert "qwen-flash as answer is asked:\nQuestion 0?" in result.out and "<answer" in result.out


def test_a_budget_stops_the_run_and_a_larger_one_goes_on(rlhf):
    prices = ("--price", "gpt-4o=1000/1000", "--price", "gpt-4o-mini=1000/1000", "--concurrency", 1)
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, *prices, "--max-cost", 2, api=api)
        assert result.status == 3 and "--max-cost 2 is reached" in result.err and 4 <= api.count() < 40
        assert rlhf(PROMPTS, *MODELS, *prices, "--max-cost", 1000, api=api).status == 0 and api.count() == 48


# --- files


def test_a_former_output_that_differs_is_kept(rlhf, tmp_path):
    flags = ("--provider", "offline")
    first = rlhf(DEMO, *flags).output.read_bytes()
    rlhf(DEMO, *flags)
    assert not (tmp_path / "out.jsonl.bak").exists()
    rlhf(DEMO, *flags, "--output-format", "basic")
    assert (tmp_path / "out.jsonl.bak").read_bytes() == first
    assert not list(tmp_path.glob("*.part"))


def test_drops_of_a_former_run_do_not_stay(rlhf, tmp_path):
    rlhf([{"instruction": "a", "output": "b c d."}, {"x": 1}], "--provider", "offline")
    assert (tmp_path / "out.dropped.jsonl").exists()
    rlhf([{"instruction": "a", "output": "b c d."}], "--provider", "offline")
    assert not (tmp_path / "out.dropped.jsonl").exists()


def test_a_second_run_at_the_same_output_is_refused(process, rlhf, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    with Api(demo_world, latency=0.3) as api:
        run = process("--input-file", "in.jsonl", *MODELS, "--output-path", "out.jsonl", api=api)
        while api.count() < 3:
            pass
        second = rlhf(DEMO, "--provider", "offline")
        run.communicate(timeout=60)
    assert second.status == 2 and "another run" in second.err and run.returncode == 0
    assert len(rows(tmp_path / "out.jsonl")) > 6


def test_two_runs_share_one_cache(process, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    with Api(demo_world, latency=0.02) as api:
        flags = ["--input-file", "in.jsonl", *MODELS, "--cache-path", "c.sqlite"]
        runs = [process(*flags, "--output-path", f"{n}.jsonl", api=api) for n in "ab"]
        assert [run.wait(60) for run in runs] == [0, 0]
        for run in runs:
            run.communicate()
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_the_test_split_never_parts_a_prompt_and_never_moves(rlhf, tmp_path):
    flags = ("--provider", "offline", "--test-fraction", 0.3)
    test = tmp_path / "out.test.jsonl"
    whole = rlhf(DEMO, *flags)
    held = {row["prompt_id"] for row in rows(test)}
    assert 3 <= len(held) <= 15 and not held & {row["prompt_id"] for row in whole.pairs}
    rlhf(DEMO, *flags, "--max-samples", 20)
    assert {row["prompt_id"] for row in rows(test)} <= held


def test_prompts_of_another_file_are_left_out(rlhf, tmp_path):
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    chinese = "请把下面这句话翻译成英文然后解释它的意思"
    write_jsonl(tmp_path / "eval.jsonl", [{"question": "Short?"}, {"text": f"{long} A"}, {"prompt": chinese}])
    records = [
        {"prompt": p, "output": "An answer."} for p in ("Short?", f"B, {long}!", chinese + "吧", "Fine?")
    ]
    result = rlhf(records, "--provider", "offline", "--exclude-prompts", "eval.jsonl")
    assert [row["reason"] for row in result.dropped] == ["excluded prompt"] * 3
    assert [pair["prompt"] for pair in result.pairs] == ["Fine?"]


def test_fields_can_be_renamed_and_samples_limited(rlhf):
    records = [{"ask": f"Question {n}?", "gold": "An answer."} for n in range(5)]
    flags = ("--rename", "ask=prompt", "--rename", "gold=output", "--max-samples", 3, "--provider", "offline")
    assert len(rlhf(records, *flags).pairs) == 3


def test_stdin_is_an_input(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--input-file", "-", "--provider", "offline", "--output-path", "new/o.jsonl"],
        input=DEMO.read_bytes(), cwd=tmp_path, capture_output=True, check=True,
    )  # fmt: skip
    assert b"30 records read" in run.stdout and len(rows(tmp_path / "new/o.jsonl")) > 20


def test_a_broken_cache_is_named_and_left_alone(rlhf, tmp_path):
    (tmp_path / "c.sqlite").write_bytes(b"no database " * 99)
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, "--cache-path", "c.sqlite", api=api)
        assert (
            result.status == 2
            and "c.sqlite" in result.err
            and "Traceback" not in result.err
            and not api.calls
        )


def test_an_input_that_breaks_off_is_an_error_with_the_progress_kept(rlhf, tmp_path):
    whole = gzip.compress(
        "".join(json.dumps({"prompt": f"Q {os.urandom(20).hex()}?"}) + "\n" for _ in range(500)).encode()
    )
    (tmp_path / "in.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with Api(demo_world) as api:
        result = rlhf(tmp_path / "in.jsonl.gz", *MODELS, "--judge-model", "none", api=api)
    assert result.status == 2 and "in.jsonl.gz: cannot be read" in result.err and not api.calls


def test_a_bug_in_a_method_of_ones_own_shows_its_line_and_keeps_the_progress(rlhf, monkeypatch):
    async def mine(record, run):
        """a method with a bug"""
        return await rc.model_comparison(record, run) if "7" not in record.prompt else 1 / 0

    monkeypatch.setitem(rc.METHODS, "mine", mine)
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, "--method", "mine", *MODELS, api=api)
    assert (
        result.status == 3 and "ZeroDivisionError" in result.err and "in.jsonl:8: mine raised" in result.err
    )


def test_a_method_of_ones_own_has_everything_without_a_line_for_it(rlhf, monkeypatch):
    monkeypatch.setattr(rc, "METHODS", dict(rc.METHODS))

    async def revise(record, run):
        """A draft is rejected, its revision chosen, if the judge agrees."""
        [draft] = [await run.ask_text(record, run.low, record.messages)]
        better = await run.ask_text(record, run.high, [{"role": "user", "content": f"Improve: {draft}"}])
        answers = await run.judge(record, [rc.Answer(better, "revision"), rc.Answer(draft, "draft")])
        return rc.pair_up(record, answers, run)

    monkeypatch.setitem(rc.METHODS, "revise", revise)
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, "--method", "revise", *MODELS, api=api)
        calls = api.count()
        assert result.status == 0 and len(result.pairs) + len(result.dropped) == 12
        assert (
            f"= {calls} calls" in result.err
            and rlhf(PROMPTS, "--method", "revise", *MODELS, api=api).status == 0
        )
        assert api.count() == calls == 48
