"""what is refused before anything happens, the files, the books."""

import asyncio
import contextlib
import gzip
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import pytest

import rlhf_constructor as rc
from tests.conftest import DATA, ROOT, SCRIPT, rows, write_jsonl
from tests.server import Api, Fault, Reply, demo_world

DEMO = DATA / "alpaca_demo.jsonl"
MODELS = ("--provider", "openai", "--high-model", "gpt-4o", "--low-model", "gpt-4o-mini")
PROMPTS = [{"prompt": f"Question {n}?"} for n in range(12)]


# --- exit 2: one clear line, nothing called, nothing written

REFUSED = {
    "no input": ([], ["--provider", "offline"], "--input-file FILE is missing"),
    "no such input": (["--input-file", "none.jsonl"], [], "none.jsonl: no such file"),
    "a near name": (["--input-file", "../lesson3/data/alpaca_demo.jsonl"], [], "data/alpaca_demo.jsonl?"),
    "a folder": (["--input-file", "."], [], "is no file"),
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
    "bad rename": (["--input-file", "odd.jsonl", "--rename", "size=prompt"], ["--provider", "offline"], "no 'size' among the fields: colour"),
    "no rename": (["--input-file", "odd.jsonl", "--rename", "size"], [], "is not OLD=NEW"),
    "same models": (["--input-file", DEMO, *MODELS[:4], "--low-model", "gpt-4o"], [], "are both gpt-4o"),
    "no judge": (["--input-file", DEMO, "--method", "generate_pairs", "--judge-model", "none"], [], "needs a judge"),
    "too many candidates": (["--input-file", DEMO, "--num-candidates", 9], [], "not a number from 2 to 8"),
    "no workers": (["--input-file", DEMO, "--concurrency", 0], [], "not a number from 1 to"),
    "not a number": (["--input-file", DEMO, "--max-samples", "ten"], [], "'ten' is not a number"),
    "budget without price": (["--input-file", DEMO, *MODELS, "--max-cost", 1], [], "--price gpt-4o=IN/OUT"),
    "bad price": (["--input-file", DEMO, "--price", "gpt-4o=cheap"], [], "is not MODEL=IN/OUT"),
    "bad option": (["--input-file", DEMO, "--model-option", "top_p"], [], "is not [MODEL:]KEY=JSON"),
    "a key in an address": (["--input-file", DEMO, "--low-model", "openai:m@http://u:pw@h/v1"], [], "environment"),
    "reward without address": (["--input-file", DEMO, "--judge-model", "reward:rm"], [], "needs its address"),
    "two scales in one panel": (["--input-file", DEMO, "--judge-model", "m", "--judge-model", "reward:r@http://localhost:1"], [], "scale is its own"),
    "kto both ways": (["--input-file", DEMO, "--output-format", "kto", "--strategy", "adjacent"], [], "both ways"),
    "no scheme": (["--input-file", DEMO, *MODELS, "--base-url", "localhost:8000/v1"], [], "is written http://"),
    "no scheme after @": (["--input-file", DEMO, *MODELS, "--low-model", "m@localhost:1/v1"], [], "m@localhost:1"),
    "no port": (["--input-file", DEMO, *MODELS, "--base-url", "http://host:port/v1"], [], "is written http://"),
    "no number": (["--input-file", DEMO, *MODELS, "--max-cost", "nan"], [], "--max-cost: 'nan'"),
    "no gap": (["--input-file", DEMO, *MODELS, "--min-score-gap", "nan"], [], "--min-score-gap: 'nan'"),
    "no output name": (["--input-file", DEMO, "--output-path", ""], [], "name a .jsonl file"),
    "output under a file": (["--input-file", DEMO, "--output-path", "odd.jsonl/x.jsonl"], [], "cannot be written"),
    "output is a device": (["--input-file", DEMO, "--output-path", os.devnull], [], "name a .jsonl file"),
    "cache is a folder": (["--input-file", DEMO, "--cache-path", "."], [], "is no file"),
    "candidates is a folder": (["--input-file", DEMO, "--candidates-path", "."], [], "is no file"),
    "output's part is the input": (["--input-file", "y.jsonl.part", "--output-path", "y.jsonl"], [], "written over"),
    "two pages in one file": (["--input-file", DEMO, "--output-path", "o.jsonl", "--review-path", "o.report.html"], [], "the same"),
    "review page over the output": (["--input-file", DEMO, "--output-path", "o.jsonl", "--review-path", "o.jsonl"], [], "the same"),
    "candidates in a part": (["--input-file", DEMO, "--output-path", "o.jsonl", "--candidates-path", "o.jsonl.part"], [], "the same"),
    "no folder can be made": (["--input-file", DEMO, "--output-path", "/proc/none/o.jsonl"], ["--provider", "offline"], "/proc/none"),
    "a name too long": (["--input-file", DEMO, "--output-path", "n" * 300 + ".jsonl"], ["--provider", "offline"], "cannot be written"),
    "no table out": (["--input-file", DEMO, "--output-path", "o.csv"], [], "name a .jsonl file"),
    "renamed onto a field": (["--input-file", "two.jsonl", "--rename", "question=prompt"], ["--provider", "offline"], "two fields of one name"),
    "one file for two": (["--input-file", DEMO, "--candidates-path", "o.jsonl", "--output-path", "o.jsonl"], [], "the same"),
    "excluded is missing": (["--input-file", DEMO, "--exclude-prompts", "none.jsonl"], [], "none.jsonl: no such"),
    "missing rubric": (["--input-file", DEMO, "--rubric", "none.txt"], [], "none.txt"),
    "no samples": (["--input-file", DEMO, "--max-samples", 0], [], "is not a number of records from 1 on"),
    "output is the rubric": (["--input-file", DEMO, "--rubric", "odd.jsonl", "--output-path", "odd.jsonl"], [], "written over"),
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
    write_jsonl(tmp_path / "y.jsonl.part", PROMPTS)
    write_jsonl(tmp_path / "two.jsonl", [{"question": "a", "prompt": "b", "output": "c"}])
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
    assert all(
        lesson < out.index(f"  {flag} ") for flag in ("--input-file", "--method", "--output-path")
    )


@pytest.mark.parametrize("package", ["openai", "dashscope"])
def test_a_package_that_is_missing_is_named_before_anything_happens(
    rlhf, monkeypatch, tmp_path, package
):
    monkeypatch.setitem(sys.modules, package, None)
    with Api(demo_world) as api:
        result = rlhf(
            PROMPTS, "--provider", package, "--high-model", "a", "--low-model", "b", api=api
        )
    assert result.status == 2 and f"the package {package} is missing: pip install" in result.err
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(rlhf, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    result = rlhf(DEMO, "--provider", "offline", output="shut/out.jsonl")
    assert result.status == 2 and "shut cannot be written to" in result.err


def test_a_link_stays_and_the_file_it_points_to_is_written(rlhf, tmp_path):
    os.symlink("store/real.jsonl", tmp_path / "out.jsonl")
    for count in (30, 20):
        assert rlhf(DEMO, "--provider", "offline", "--max-samples", count).status == 0
    assert os.readlink(tmp_path / "out.jsonl") == "store/real.jsonl"
    assert sorted(os.listdir(tmp_path / "store")) == ["real.jsonl", "real.jsonl.bak"]
    assert (
        len(rows(tmp_path / "store/real.jsonl"))
        <= 20
        < len(rows(tmp_path / "store/real.jsonl.bak"))
    )


def test_an_input_is_never_written_over_by_a_link(rlhf, tmp_path):
    source = write_jsonl(tmp_path / "real.jsonl", [{"prompt": "a", "output": "b c d."}])
    os.symlink(source, tmp_path / "out.jsonl")
    assert rlhf(source, "--provider", "offline").status == 2 and len(rows(source)) == 1


# --- the books


def test_every_record_is_a_pair_or_a_drop_with_its_line(rlhf, tmp_path):
    lines = [json.dumps({"prompt": f"Question {n}?"}) for n in range(6)]
    lines += [
        "{broken",
        '{"colour": 1}',
        lines[0],
        '{"prompt": " "}',
        '{"prompt": "refuse me"}',
        '"a string"',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    bad = lambda call: Fault(400) if "refuse" in call.prompt else demo_world(call)
    with Api(bad) as api:
        result = rlhf(tmp_path / "in.jsonl", *MODELS, "--judge-model", "none", api=api)
    assert [row["line"] for row in result.dropped] == [7, 8, 9, 10, 11]
    assert "12 records read: 7 (58%) gave 7 pairs, 5 dropped" in result.out
    stages = [reason.split(":")[0] for reason in result.reasons]
    assert stages == ["input", "input", "input", "input", "model"]
    assert (
        result.dropped[2]["reason"] == "repeated prompt"
        and result.dropped[2]["prompt"] == "Question 0?"
    )


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


@pytest.mark.parametrize(
    "flags, calls",
    [
        (
            ["--method", "generate_pairs"],
            "(2 gpt-4o + 2 gpt-4o-mini + 2 gpt-4o as judge) = 72 calls",
        ),
        (["--judge-model", "none"], "(1 gpt-4o + 1 gpt-4o-mini) = 24 calls"),
        (["--judge-model", "j", "--judge-model", "k"], "+ 2 j as judge + 2 k as judge) = 72 calls"),
        (["--judge-model", "j", "--judge-orders", 1], "+ 1 j as judge) = 36 calls"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_the_plan_knows_methods_and_judges(rlhf, flags, calls):
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, *flags, api=api)
    assert calls in result.err and f"= {api.count()} calls" in result.err


def test_a_dry_run_needs_no_key_calls_nobody_and_writes_nothing(rlhf, tmp_path):
    result = rlhf(PROMPTS, "--dry-run", "--price", "qwen3-max=1/2", "--provider", "dashscope")
    assert result.status == 0 and os.listdir(tmp_path) == ["in.jsonl"]
    assert "12 records read" in result.out and "at the given price" in result.out
    assert "qwen-flash as answer is asked:\nQuestion 0?" in result.out and "<answer" in result.out


def test_a_budget_stops_the_run_and_a_larger_one_goes_on(rlhf):
    prices = (
        "--price",
        "gpt-4o=1000/1000",
        "--price",
        "gpt-4o-mini=1000/1000",
        "--max-tokens",
        500,
    )
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, *prices, "--max-cost", 2, api=api)
        assert (
            result.status == 3 and "--max-cost 2 is reached" in result.err and 4 <= api.count() < 40
        )
        assert (
            rlhf(PROMPTS, *MODELS, *prices, "--max-cost", 1000, api=api).status == 0
            and api.count() == 48
        )


BUDGET = ("--price", "gpt-4o=0/1000000", "--price", "gpt-4o-mini=0/1000000", "--max-tokens", 3000)
FORTY = [{"prompt": f"Question {n}"} for n in range(40)]


@pytest.mark.parametrize("text", [None, ""], ids=["", "some without text"])
@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_passed_by_the_two_calls_in_flight_at_most(rlhf, seed, text):
    luck, spent = random.Random(seed), []

    async def answer(call):
        await asyncio.sleep(luck.random() / 50)
        spent.append(50 if len(spent) < 90 else luck.choice((50, 200, 3000)))
        lost = text is not None and luck.random() < 0.3
        return Reply(text if lost else demo_world(call), tokens_in=0, tokens_out=spent[-1])

    with Api(answer) as api:
        for limit in (7000, 25000):
            flags = ("--max-cost", limit, "--concurrency", 1)
            assert rlhf(FORTY, *MODELS, *BUDGET, *flags, api=api).status == 3
            assert 0.5 * limit < sum(spent) <= limit + 2 * 3000


def test_no_call_is_made_once_the_budget_is_reached(rlhf):
    with Api(lambda call: Reply(demo_world(call), tokens_in=0, tokens_out=9000)) as api:
        rlhf(FORTY, *MODELS, *BUDGET, "--max-cost", 50000, "--concurrency", 1, api=api)
        assert api.count() == 6  # 54,000


LIMIT = ("--max-cost", 20000, "--concurrency", 1)


def test_a_budget_is_of_one_output_whatever_the_method_asks_by_now(rlhf):
    with Api(lambda call: Reply(demo_world(call), tokens_in=0, tokens_out=1000)) as api:
        rlhf(FORTY, *MODELS, *BUDGET, *LIMIT, api=api)
        first = api.count()
        again = rlhf(FORTY, *MODELS, *BUDGET, *LIMIT, "--judge-model", "gpt-4o-mini", api=api)
        assert (
            again.status == 3 and api.count() <= 22 and first > 10
        )  # the other judge's verdicts count on
        other = ("--output-path", "other.jsonl")
        rlhf(FORTY, *MODELS, *BUDGET, *LIMIT, *other, api=api)
        assert 22 < api.count() <= 44


def test_a_budget_of_nothing_still_takes_what_the_cache_holds(rlhf):
    prices = ("--price", "gpt-4o=1/1", "--price", "gpt-4o-mini=1/1", "--max-cost", 0)
    with Api(demo_world) as api:
        assert rlhf(PROMPTS, *MODELS, *prices, api=api).status == 3 and api.count() == 0
        rlhf(PROMPTS, *MODELS, api=api)
        assert rlhf(PROMPTS, *MODELS, *prices, api=api).status == 0 and api.count() == 48


def test_a_budget_needs_the_price_of_what_was_paid_before(rlhf):
    with Api(demo_world) as api:
        rlhf(PROMPTS, *MODELS, "--low-model", "former", api=api)
        calls, budget = (
            api.count(),
            ("--price", "gpt-4o=1/1", "--price", "gpt-4o-mini=1/1", "--max-cost", 9),
        )
        result = rlhf(PROMPTS, *MODELS, *budget, api=api)
        assert (
            result.status == 2
            and "paid for former already: --price former=IN/OUT, too" in result.err
        )
        more = rlhf(PROMPTS, *MODELS, *budget, "--price", "former=1/1", "--dry-run", api=api)
        assert more.status == 0 and "no model of this run" not in more.err and api.count() == calls


def test_a_price_for_nobody_is_noted(rlhf):
    prices = ("--price", "gpt-4o=0/1000", "--price", "gpt-4o-mini=0/1000", "--price", "gpt5=1/1")
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, *prices, "--max-cost", 0.01, "--max-tokens", 41, api=api)
    assert "--price gpt5: no model of this run has that name" in result.err
    assert "--max-cost 0.01 is reached" in result.err


def test_a_reply_that_another_process_had_first_is_still_in_the_books(tmp_path):
    for output_id in ("first", "second"):
        cache = rc.Cache(str(tmp_path / "c.sqlite"), output_id)
        with contextlib.closing(cache):
            assert cache.put("key", rc.Reply(output_id, tokens_in=3, tokens_out=4), "m") == (
                output_id == "first"
            )
            assert cache.get("key").text == "first" and cache.bill() == [("m", 3, 4)]


@pytest.mark.parametrize("bad", [0, 5, 11])
def test_the_books_balance_whatever_fails(rlhf, bad):
    """read = with pairs + dropped, for each kind of trouble at any place"""
    troubles = (
        Fault(400),
        Fault(500),
        Fault(kind="empty"),
        "I cannot help with that. I can't assist.",
        " ",
    )
    for trouble in troubles:
        with Api(
            lambda call, t=trouble: t if call.prompt == f"Question {bad}?" else demo_world(call)
        ) as api:
            result = rlhf(PROMPTS, *MODELS, "--max-retries", 0, "--cache-path", "none", api=api)
        dropped = {row["line"] for row in result.dropped}
        assert len(result.pairs) + len(dropped) == 12 and bad + 1 in dropped
        assert f"12 records read: {len(result.pairs)} (" in result.out


# --- how a run ends early


def test_a_stop_reaches_those_who_wait_for_an_early_record(rlhf):
    """One record is slow, the others fill the window behind it and wait; then the key is refused."""
    prompts = [{"prompt": f"Question {n}?"} for n in range(300)]

    async def answer(call):
        while call.model == "gpt-4o-mini" and call.prompt == "Question 1?":
            await asyncio.sleep(0.05)
            if api.count("gpt-4o-mini") >= 2 * rc.WINDOW:
                return Fault(401)
        return demo_world(call)

    with Api(answer) as api:
        result = rlhf(prompts, *MODELS, "--judge-model", "none", "--concurrency", 2, api=api)
    assert result.status == 3 and "key was refused" in result.err


def test_a_bug_of_our_own_ends_the_run_and_closes_what_is_open(tmp_path):
    """A method that breaks the law of direction meets the writer's refusal: no hang, no row, one traceback."""
    code = f"""if True:
        import sys; sys.path.insert(0, {str(ROOT)!r}); import rlhf_constructor as rc
        async def mine(record, run):
            "wrong way round"
            answer = await run.ask_text(record, run.high, record.messages)
            return [rc.Pair(record, rc.Answer("a", score=1.0), rc.Answer(answer, score=2.0))]
        rc.METHODS["mine"] = mine
        sys.exit(rc.main(sys.argv[1:]))"""
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"Question {n}?"} for n in range(200)])
    flags = [
        "--input-file",
        source,
        "--method",
        "mine",
        *MODELS,
        "--skip-filter",
        "gap",
        "--concurrency",
        "2",
    ]
    with Api(demo_world) as api:
        run = subprocess.run([sys.executable, "-c", code, *flags, "--output-path", "o.jsonl"], cwd=tmp_path,
                             env=api.env(), capture_output=True, text=True, timeout=30)  # fmt: skip
        assert api.count() < 20
    assert run.returncode != 0 and "without a lead" in run.stderr and "Unclosed" not in run.stderr
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.skipif(os.name == "nt", reason="no signals to send")
def test_a_second_ctrl_c_leaves_at_once_and_quietly(process, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    with Api(lambda call: Fault(kind="hang")) as api:
        run = process("--input-file", "in.jsonl", *MODELS, "--output-path", "o.jsonl", api=api)
        while api.count() < 2 and run.poll() is None:
            time.sleep(0.01)
        err = ""
        run.send_signal(signal.SIGINT)
        while "Ctrl-C again" not in err:
            err += run.stderr.readline()
        run.send_signal(signal.SIGINT)
        _, rest = run.communicate(timeout=30)
    assert run.returncode == 130 and not any(word in rest for word in ("Traceback", "Unclosed"))


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


@pytest.mark.parametrize(
    "flags", [(), ("--candidates-path", "c.jsonl")], ids=["the output", "another file"]
)
def test_a_file_that_another_run_is_writing_is_left_as_it_is(rlhf, tmp_path, flags):
    fcntl = pytest.importorskip("fcntl")
    part = tmp_path / ("c.jsonl.part" if flags else "out.jsonl.part")
    part.write_text("half a row")
    with open(part, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = rlhf(DEMO, "--provider", "offline", *flags)
    assert (
        result.status == 2
        and f"{part.name}: another run" in result.err
        and result.err.count("\n") == 1
    )
    assert part.read_text() == "half a row" and not result.pairs


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
    more = [{"instruction": f"New prompt {n}", "output": "An answer."} for n in range(7)]
    rlhf([*more, *rows(DEMO)], *flags, output="more.jsonl")
    known = {row["prompt_id"] for row in whole.pairs} | held
    assert {row["prompt_id"] for row in rows(tmp_path / "more.test.jsonl")} & known == held


def test_all_pairs_of_a_prompt_stay_on_one_side_of_the_split(rlhf, tmp_path):
    flags = ("--method", "rank_responses", "--strategy", "all_pairs", "--test-fraction", 0.4)
    train = rlhf(DATA / "ranked_answers.jsonl", *flags).pairs
    held = rows(tmp_path / "out.test.jsonl")
    assert train and held and len(train) + len(held) > 36
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}


def test_prompts_of_another_file_are_left_out(rlhf, tmp_path):
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    chinese = "请把下面这句话翻译成英文然后解释它的意思"
    write_jsonl(
        tmp_path / "eval.jsonl",
        [{"question": "Short?"}, {"text": f"{long} A"}, {"prompt": chinese}],
    )
    records = [
        {"prompt": p, "output": "An answer."}
        for p in ("Short?", f"B, {long}!", chinese + "吧", "Fine?")
    ]
    result = rlhf(records, "--provider", "offline", "--exclude-prompts", "eval.jsonl")
    assert [row["reason"] for row in result.dropped] == ["excluded prompt"] * 3
    assert [pair["prompt"] for pair in result.pairs] == ["Fine?"]


def test_a_prompt_of_any_script_is_left_out_alone(rlhf, tmp_path):
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "ما هي عاصمة فرنسا؟"}, {"prompt": "🙂"}])
    records = [
        {"prompt": p, "output": "An answer."}
        for p in ("ما هي عاصمة فرنسا؟", "كيف حالك؟", "🙂", "🙃")
    ]
    result = rlhf(records, "--provider", "offline", "--exclude-prompts", "eval.jsonl")
    assert [pair["prompt"] for pair in result.pairs] == ["كيف حالك؟", "🙃"]


def test_the_same_answers_ranked_the_other_way_are_no_repetition(rlhf):
    """(-1.0 and -2.0 have one hash in Python.)"""
    answers = {"prompt": "Q", "responses": ["an answer", "a worse one"]}
    result = rlhf(
        [answers | {"ranks": [1, 2]}, answers | {"ranks": [2, 1]}] * 2, "--method", "rank_responses"
    )
    assert len(result.pairs) == 2 and result.reasons == ["input: repeated prompt and answers"] * 2


def test_candidates_can_be_ranked_again_without_a_call(rlhf, tmp_path):
    with Api(demo_world) as api:
        pairs = rlhf(PROMPTS, *MODELS, "--candidates-path", "c.jsonl", api=api).pairs
    again = rlhf(
        tmp_path / "c.jsonl",
        "--method",
        "rank_responses",
        "--min-score-gap",
        1,
        output="again.jsonl",
    )
    assert pairs and [row["chosen"] for row in again.pairs] == [row["chosen"] for row in pairs]


def test_score_columns_are_whole_or_absent_over_the_split(rlhf, tmp_path):
    """Two files of one data set have the same columns, whichever of them holds the pair without scores."""
    scored = {"responses": ["an answer", "a worse one"], "scores": [9, 2]}
    records = [{"prompt": f"Q {n}", **scored} for n in range(30)]
    records.append({"prompt": "Q", "chosen": "an answer", "rejected": "a worse one"})
    train = rlhf(records, "--method", "rank_responses", "--test-fraction", 0.4).pairs
    held = rows(tmp_path / "out.test.jsonl")
    assert (
        len(train) + len(held) == 31
        and held
        and not any("score_chosen" in row for row in train + held)
    )


def test_fields_can_be_renamed_and_samples_limited(rlhf):
    records = [{"ask": f"Question {n}?", "gold": "An answer."} for n in range(5)]
    flags = (
        "--rename",
        "ask=prompt",
        "--rename",
        "gold=output",
        "--max-samples",
        3,
        "--provider",
        "offline",
    )
    assert len(rlhf(records, *flags).pairs) == 3


def test_stdin_is_an_input(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--input-file", "-", "--provider", "offline", "--output-path", "new/o.jsonl"],
        input=DEMO.read_bytes(), cwd=tmp_path, capture_output=True, check=True,
    )  # fmt: skip
    assert b"30 records read" in run.stdout and len(rows(tmp_path / "new/o.jsonl")) > 20


def test_a_closed_stdin_is_one_line():
    command = [sys.executable, SCRIPT, "--provider", "offline", "--input-file", "-"]
    run = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True
    )
    assert run.returncode == 2 and "stdin is closed" in run.stderr and run.stderr.count("\n") == 1


def test_nothing_of_stdin_stays_behind(tmp_path):
    env, command = (
        {**os.environ, "TMPDIR": str(tmp_path)},
        [sys.executable, SCRIPT, "--provider", "offline"],
    )
    for source in (DEMO.read_bytes(), b""):
        subprocess.run(
            [*command, "--input-file", "-", "--dry-run"], input=source, env=env, cwd=tmp_path
        )
    assert os.listdir(tmp_path) == []


def test_every_file_may_stand_in_a_folder_that_is_not_there(rlhf, tmp_path):
    result = rlhf(
        DEMO, "--provider", "offline", "--candidates-path", "c/d/e.jsonl", output="a/b/out.jsonl"
    )
    assert result.status == 0 and len(rows(tmp_path / "c/d/e.jsonl")) == 30


def test_a_stopped_run_leaves_the_former_output_alone(rlhf, tmp_path):
    with Api(demo_world) as api:
        before = rlhf(PROMPTS[:6], *MODELS, api=api).output.read_bytes()
        api._answer = lambda call: Fault(401)
        assert rlhf(PROMPTS, *MODELS, "--concurrency", 1, api=api).status == 3
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert (tmp_path / "out.jsonl.part").read_bytes().startswith(before)


@pytest.mark.skipif(os.name == "nt", reason="no limits to set")
@pytest.mark.parametrize("paid", [False, True], ids=["by the output", "by the cache"])
def test_a_full_disk_stops_the_run_in_one_line(tmp_path, paid):
    code = f"""if True:
        import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        sys.path.insert(0, {str(ROOT)!r}); import rlhf_constructor as rc; sys.exit(rc.main(sys.argv[1:]))"""
    models = MODELS if paid else ("--provider", "offline")
    records = [
        {"prompt": f"Question {n}?", "output": f"The answer to {n} is long. " * 9}
        for n in range(200)
    ]
    flags = [
        "--input-file",
        write_jsonl(tmp_path / "in.jsonl", records),
        *models,
        "--output-path",
        "o.jsonl",
    ]
    with Api(demo_world) as api:
        run = subprocess.run([sys.executable, "-c", code, *flags], cwd=tmp_path, env=api.env(),
                             capture_output=True, text=True, timeout=30)  # fmt: skip
    assert run.returncode == 3 and "stopped: " in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "o.jsonl").exists()


def test_a_broken_cache_is_named_and_left_alone(rlhf, tmp_path):
    (tmp_path / "c.sqlite").write_bytes(b"no database " * 99)
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, "--cache-path", "c.sqlite", api=api)
        assert result.status == 2 and not api.calls
        assert "c.sqlite" in result.err and "Traceback" not in result.err


def test_an_input_that_breaks_off_is_an_error_with_the_progress_kept(rlhf, tmp_path):
    whole = gzip.compress(
        "".join(
            json.dumps({"prompt": f"Q {os.urandom(20).hex()}?"}) + "\n" for _ in range(500)
        ).encode()
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
    assert result.status == 3
    assert "ZeroDivisionError" in result.err and "in.jsonl:8: mine raised" in result.err


def test_a_method_of_ones_own_has_everything_without_a_line_for_it(rlhf, monkeypatch):
    monkeypatch.setattr(rc, "METHODS", dict(rc.METHODS))

    async def revise(record, run):
        """A draft is rejected, its revision chosen, if the judge agrees."""
        [draft] = [await run.ask_text(record, run.low, record.messages)]
        better = await run.ask_text(
            record, run.high, [{"role": "user", "content": f"Improve: {draft}"}]
        )
        answers = await run.judge(
            record, [rc.Answer(better, "revision"), rc.Answer(draft, "draft")]
        )
        return rc.pair_up(record, answers, run)

    monkeypatch.setitem(rc.METHODS, "revise", revise)
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, "--method", "revise", *MODELS, api=api)
        calls = api.count()
        assert result.status == 0 and len(result.pairs) + len(result.dropped) == 12
        assert f"= {calls} calls" in result.err
        again = rlhf(PROMPTS, "--method", "revise", *MODELS, api=api)
        assert again.status == 0 and api.count() == calls == 48


# --- report and review


def test_every_run_leaves_a_report_of_one_set_of_numbers(rlhf, tmp_path):
    result = rlhf(DATA / "preference_pairs.jsonl", "--method", "rank_responses")
    numbers = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
    assert numbers["records"] == 30 and numbers["settings"]["input_sha256"]
    assert "<svg" in (tmp_path / "out.report.html").read_text("utf-8")
    assert "out.report.html" in result.out and len(result.out.splitlines()) <= 30
    again = (tmp_path / "out.report.json").read_bytes()
    rlhf(DATA / "preference_pairs.jsonl", "--method", "rank_responses")
    assert (tmp_path / "out.report.json").read_bytes() == again


def test_the_report_can_go_elsewhere_or_nowhere(rlhf, tmp_path):
    rlhf(DATA / "preference_pairs.jsonl", "--method", "rank_responses", "--report-path", "none")
    assert not list(tmp_path.glob("*report*"))
    rlhf(
        DATA / "preference_pairs.jsonl",
        "--method",
        "rank_responses",
        "--report-path",
        "r/page.html",
    )
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["page.html", "page.json"]


def judged_by(name, pairs, choices):
    """Lines of an annotations file: one choice for each of the first pairs."""
    for pair, choice in zip(pairs, choices, strict=False):
        known = rc.pair_id(*(pair[key] for key in ("prompt", "chosen", "rejected")))
        yield {"pair_id": known, "prompt_id": pair["prompt_id"], "choice": choice, "queue": "random",
               "note": "", "annotator": name, "seconds": 2}  # fmt: skip


def test_what_people_say_confirms_flips_and_drops(rlhf, tmp_path):
    first = rlhf(
        DATA / "preference_pairs.jsonl", "--method", "rank_responses", output="a.jsonl"
    ).pairs
    said = list(judged_by("Ann", first, ["chosen", "rejected", "tie", "bad"]))
    write_jsonl(tmp_path / "v.jsonl", [*said, said[0] | {"pair_id": "0" * 16}])
    result = rlhf(tmp_path / "a.jsonl", "--method", "rank_responses", "--annotations", "v.jsonl")
    assert result.pairs[0] == first[0] and len(result.pairs) == 28
    flipped = result.pairs[1]
    assert (flipped["chosen"], flipped["rejected"]) == (first[1]["rejected"], first[1]["chosen"])
    assert (flipped["score_chosen"], flipped["score_rejected"]) == (
        first[1]["score_rejected"],
        first[1]["score_chosen"],
    )
    assert result.reasons == ["human: tie", "human: both bad"]
    assert "v.jsonl:5: not used" in result.err
    metrics = json.loads((tmp_path / "out.report.json").read_text("utf-8"))["metrics"]
    assert [m["n"] for m in metrics if m["metric"] == "human_agreement"] == [2]


def test_annotators_who_disagree_drop_the_pair(rlhf, tmp_path):
    first = rlhf(
        DATA / "preference_pairs.jsonl", "--method", "rank_responses", output="a.jsonl"
    ).pairs
    write_jsonl(tmp_path / "1.jsonl", judged_by("Ann", first, ["chosen", "rejected"]))
    write_jsonl(tmp_path / "2.jsonl", judged_by("Bo", first, ["rejected", "rejected"]))
    flags = ("--method", "rank_responses", "--annotations", "1.jsonl", "--annotations", "2.jsonl")
    result = rlhf(tmp_path / "a.jsonl", *flags)
    assert (
        result.reasons == ["human: annotators disagree"]
        and result.pairs[0]["chosen"] == first[1]["rejected"]
    )


def test_a_pair_is_counted_once_though_the_plan_passes_it_too(rlhf, tmp_path):
    """Only where a judge is asked is there a plan, and only its first call asks for it."""
    first = rlhf(
        DATA / "preference_pairs.jsonl", "--method", "rank_responses", output="a.jsonl"
    ).pairs
    write_jsonl(tmp_path / "v.jsonl", judged_by("Ann", first, ["chosen"]))
    write_jsonl(
        tmp_path / "b.jsonl", [*first, {"prompt": "Q?", "responses": ["an answer", "a worse one"]}]
    )
    flags = (
        "--method",
        "rank_responses",
        *MODELS,
        "--judge-model",
        "gpt-4o",
        "--annotations",
        "v.jsonl",
    )
    with Api(demo_world) as api:
        result = rlhf(tmp_path / "b.jsonl", *flags, api=api)
    assert api.count() == 2 and "reviewed 1 of 30 pairs" in result.out


def test_annotations_without_their_pairs_are_refused(rlhf, tmp_path):
    (tmp_path / "v.jsonl").write_text("{}\n")
    result = rlhf(DEMO, "--provider", "offline", "--annotations", "v.jsonl")
    assert "need --method rank_responses" in result.err
    refused = rlhf(
        DATA / "preference_pairs.jsonl", "--method", "rank_responses", "--annotations", "v.jsonl"
    )
    assert refused.status == 2 and "no line of it is a verdict" in refused.err


def test_a_file_of_prompts_to_exclude_that_holds_none_is_refused(rlhf, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"colour": "red"}\n')
    result = rlhf(DEMO, "--provider", "offline", "--exclude-prompts", "eval.jsonl")
    assert result.status == 2 and "no record in it is recognised" in result.err


def test_a_system_prompt_with_half_an_emoji_is_mended(rlhf):
    with Api(demo_world) as api:
        assert rlhf(PROMPTS[:1], *MODELS, "--system-prompt", "Be kind \ud83d", api=api).status == 0
    assert api.calls[0].messages[0]["content"].rstrip("\ufffd") == "Be kind "


@pytest.mark.parametrize(
    "mistake, says",
    [
        (lambda record, run: run.judge, "not a list of pairs"),
        (
            lambda record, run: rc.pair_up(record, [rc.Answer("a"), rc.Answer("b")], run),
            "await run.judge",
        ),
    ],
    ids=["something else is returned", "nobody judged"],
)
def test_a_mistake_in_a_method_of_ones_own_is_explained(rlhf, monkeypatch, mistake, says):
    async def mine(record, run):
        """a mistaken method"""
        return mistake(record, run)

    monkeypatch.setitem(rc.METHODS, "mine", mine)
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, "--method", "mine", *MODELS, api=api)
    assert result.status == 3 and says in result.err.splitlines()[-1]


def test_a_model_alone_stands_for_its_first_answer(rlhf, monkeypatch):
    async def mine(record, run):
        """asks without sample numbers"""
        return rc.pair_up(
            record, await run.judge(record, await run.ask_all(record, [run.high, run.low])), run
        )

    monkeypatch.setitem(rc.METHODS, "mine", mine)
    with Api(demo_world) as api:
        assert rlhf(PROMPTS, "--method", "mine", *MODELS, api=api).pairs


def test_nobody_reading_the_summary_is_no_error(process, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "2 + 2?", "output": "It is 4."}])
    run = process("--provider", "offline", "--input-file", source, "--output-path", "out.jsonl")
    run.stdout.close()
    _, err = run.communicate(timeout=30)
    assert run.returncode == 0 and "Traceback" not in err and "stopped" not in err


def test_annotations_of_another_file_are_refused(rlhf, tmp_path):
    other = {"prompt": "Another", "chosen": "a", "rejected": "b", "prompt_id": ""}
    write_jsonl(tmp_path / "a.jsonl", judged_by("Ann", [other], ["rejected"]))
    result = rlhf(
        DATA / "preference_pairs.jsonl", "--method", "rank_responses", "--annotations", "a.jsonl"
    )
    assert (
        result.status == 2 and "none of the verdicts" in result.err and not result.output.exists()
    )


def test_a_bug_in_a_method_of_ones_own_is_shown_once(rlhf, monkeypatch):
    async def broken(record, run):
        """a method with a bug"""
        await asyncio.sleep(0)
        return record.nothing

    monkeypatch.setitem(rc.METHODS, "broken", broken)
    result = rlhf(DATA / "alpaca_demo.jsonl", "--method", "broken", "--provider", "offline")
    assert (
        result.status == 3
        and result.err.count("Traceback") == 1
        and "alpaca_demo.jsonl:" in result.err
    )


def test_a_spreadsheet_is_refused_by_its_name(rlhf, tmp_path):
    (tmp_path / "q.xlsx").write_bytes(b"PK")
    assert ".xlsx is not read" in rlhf(tmp_path / "q.xlsx", "--provider", "offline").err


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--judge-model", "j", "--judge-model", "j"), "named twice"),
        (("--model-option", "max_tokens=null"), "max_tokens=null"),
        (("--model-option", "max_tokens=-5"), "max_tokens=-5"),
    ],
)
def test_what_would_defeat_a_guarantee_is_refused(rlhf, flags, says):
    result = rlhf(PROMPTS, *MODELS, *flags, OPENAI_API_KEY="k" * 20)
    assert result.status == 2 and says in result.err


def test_one_request_asked_twice_at_once_is_paid_once_and_a_rerun_gives_the_same(rlhf):
    pool = ("gpt-4o", "openai:gpt-4o", "gpt-4o-mini", "gpt-4o-mini")
    flags = ("--method", "generate_pairs", "--candidate-models", *pool)
    with Api(demo_world) as api:
        first = rlhf(PROMPTS, *MODELS, *flags, api=api).output.read_bytes()
        calls = api.count()
        assert (
            rlhf(PROMPTS, *MODELS, *flags, api=api).output.read_bytes() == first
            and api.count() == calls
        )


def stopped_by(mine, rlhf, monkeypatch):
    """A run of a method of one's own that does not come to its end."""
    monkeypatch.setitem(rc.METHODS, "mine", mine)
    with Api(demo_world) as api:
        return rlhf(PROMPTS, "--method", "mine", *MODELS, api=api)


BUGS = (StopIteration(), asyncio.CancelledError(), GeneratorExit(), SystemExit(5), rc.Failed(None, None),
        rc.UserError("odd"))  # fmt: skip


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_whatever_a_method_raises_stops_the_run_with_the_records_line(
    rlhf, monkeypatch, bug, plain
):
    def mine(record, run):
        """a method with a bug"""
        raise bug

    async def mine_too(record, run):
        """another"""
        mine(record, run)

    result = stopped_by(mine if plain else mine_too, rlhf, monkeypatch)
    assert result.status == 3 and "stopped: " in result.err.splitlines()[-1]
    assert "in.jsonl:1: mine " in result.err.splitlines()[-1]


def test_pairs_are_kept_if_their_input_is_gone_by_then(rlhf, monkeypatch, tmp_path):
    async def mine(record, run):
        """removes its input"""
        pairs = await rc.model_comparison(record, run)
        (tmp_path / "in.jsonl").unlink(missing_ok=True)
        return pairs

    result = stopped_by(mine, rlhf, monkeypatch)
    assert result.status == 0 and result.pairs
    assert json.loads((tmp_path / "out.report.json").read_bytes())["settings"]["input_sha256"] == ""


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
@pytest.mark.parametrize("reader", ["2>&-", "2>/dev/full", "2> >(true)", "2>&1 | head -n 1"])
def test_nobody_reading_what_is_said_changes_nothing(tmp_path, reader):
    with Api(demo_world) as api:
        assert shell(tmp_path, api, reader) == 0
    assert len(rows(tmp_path / "out.jsonl")) + len(rows(tmp_path / "out.dropped.jsonl")) == 12


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
def test_a_stopped_run_says_so_by_its_status_though_nobody_reads_the_summary(tmp_path):
    with Api(lambda call: Fault(401)) as api:
        assert shell(tmp_path, api, "2>/dev/null | true") == 3


def shell(folder, api, reader):
    """The exit status of a run whose streams go where the shell's words say."""
    command = [
        sys.executable,
        SCRIPT,
        *MODELS,
        "--input-file",
        "in.jsonl",
        "--output-path",
        "out.jsonl",
    ]
    line = f"{shlex.join(map(str, command))} {reader}; exit ${{PIPESTATUS[0]}}"
    write_jsonl(folder / "in.jsonl", PROMPTS)
    return subprocess.run(["bash", "-c", line], cwd=folder, env=api.env(), timeout=60).returncode
