"""what is refused before anything happens, the files, the books."""

import asyncio
import contextlib
import json
import os
import random
import re
import shlex
import subprocess
import sys

import pytest

import rlhf_constructor as rc
from tests.conftest import DATA, SCRIPT, rows, write_jsonl
from tests.server import Api, Fault, Reply, demo_world

DEMO = DATA / "alpaca_demo.jsonl"
MODELS = ("--provider", "openai", "--high-model", "gpt-4o", "--low-model", "gpt-4o-mini")
PROMPTS = [{"prompt": f"Question {n}?"} for n in range(12)]


# --- exit 2: one clear line, nothing called, nothing written

REFUSED = {
    "no input": ([], ["--provider", "offline"], "--input-file FILE is missing"),
    "no such input": (["--input-file", "none.jsonl"], [], "none.jsonl: no such file"),
    "a folder": (["--input-file", "."], [], ". is a folder: name a file in it"),
    "no key": (["--input-file", DEMO], [], "DASHSCOPE_API_KEY is not set"),
    "unknown method": (["--input-file", DEMO, "--method", "rank_response"], [], "--method: invalid choice: 'rank_response'"),
    "no value": (["--input-file", DEMO, "--seed"], [], "--seed: expected one argument"),
    "unknown provider": (["--input-file", DEMO, "--provider", "magic"], [], "dashscope"),
    "unknown flag": (["--input-file", DEMO, "--high-modell", "x"], [], "did you mean --high-model?"),
    "shortened flag": (["--input-file", DEMO, "--high", "x"], [], "--high"),
    "output is the input": (["--input-file", "in.jsonl", "--output-path", "./in.jsonl"], [], "would be overwritten"),
    "drops over the input": (["--input-file", "x.dropped.jsonl", "--output-path", "x.jsonl"], [], "would be overwritten"),
    "output is a folder": (["--input-file", DEMO, "--output-path", "."], [], "name a .jsonl file"),
    "empty input": (["--input-file", "empty.jsonl"], ["--provider", "offline"], "holds no record"),
    "unknown fields": (["--input-file", "odd.jsonl"], ["--provider", "offline"], "no known fields: colour"),
    "no answers offline": (["--input-file", "in.jsonl"], ["--provider", "offline"], "no record has an answer"),
    "bad rename": (["--input-file", "odd.jsonl", "--rename", "size=prompt"], ["--provider", "offline"], "no record of the first 20 has a field 'size'; their fields: colour"),
    "no rename": (["--input-file", "odd.jsonl", "--rename", "size"], [], "is not OLD=NEW"),
    "same models": (["--input-file", DEMO, *MODELS[:4], "--low-model", "gpt-4o"], [], "are both gpt-4o"),
    "no judge": (["--input-file", DEMO, "--method", "generate_pairs", "--judge-model", "none"], [], "needs a judge"),
    "too many candidates": (["--input-file", DEMO, "--num-candidates", 9], [], "not a number from 2 to 8"),
    "no workers": (["--input-file", DEMO, "--concurrency", 0], [], "not a number from 1 to"),
    "not a number": (["--input-file", DEMO, "--max-samples", "ten"], [], "--max-samples: 'ten' is not a number of records"),
    "budget without price": (["--input-file", DEMO, *MODELS, "--max-cost", 1], [], "--price gpt-4o=IN/OUT"),
    "bad price": (["--input-file", DEMO, "--price", "gpt-4o=cheap"], [], "--price: 'gpt-4o=cheap' is not MODEL=IN/OUT, e.g. "),
    "bad option": (["--input-file", DEMO, "--model-option", "top_p"], [], "is not [MODEL:]KEY=JSON"),
    "a key in an address": (["--input-file", DEMO, "--low-model", "openai:m@http://u:pw@h/v1"], [], "environment"),
    "reward without address": (["--input-file", DEMO, "--judge-model", "reward:rm"], [], "needs its address"),
    "two scales in one panel": (["--input-file", DEMO, "--judge-model", "m", "--judge-model", "reward:r@http://localhost:1"], [], "has its own scale"),
    "kto both ways": (["--input-file", DEMO, "--output-format", "kto", "--strategy", "adjacent"], [], "both true and false"),
    "no scheme": (["--input-file", DEMO, *MODELS, "--base-url", "localhost:8000/v1"], [], "is written http://"),
    "no scheme after @": (["--input-file", DEMO, *MODELS, "--low-model", "m@localhost:1/v1"], [], "m@localhost:1"),
    "no port": (["--input-file", DEMO, *MODELS, "--base-url", "http://host:port/v1"], [], "is written http://"),
    "no number": (["--input-file", DEMO, *MODELS, "--max-cost", "nan"], [], "--max-cost: 'nan'"),
    "no gap": (["--input-file", DEMO, *MODELS, "--min-score-gap", "nan"], [], "--min-score-gap: 'nan'"),
    "no output name": (["--input-file", DEMO, "--output-path", ""], [], "name a .jsonl file"),
    "output under a file": (["--input-file", DEMO, "--output-path", "odd.jsonl/x.jsonl"], ["--provider", "offline"], "cannot be written"),
    "output is a device": (["--input-file", DEMO, "--output-path", os.devnull], [], "name a .jsonl file"),
    "cache is a folder": (["--input-file", DEMO, "--cache-path", "."], [], "not a file"),
    "candidates is a folder": (["--input-file", DEMO, "--candidates-path", "."], [], "not a file"),
    "output's part is the input": (["--input-file", "y.jsonl.part", "--output-path", "y.jsonl"], [], "would be overwritten"),
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
    "no samples": (["--input-file", DEMO, "--max-samples", 0], [], "is not a number of records: 1 or more"),
    "output is the rubric": (["--input-file", DEMO, "--rubric", "odd.jsonl", "--output-path", "odd.jsonl"], [], "would be overwritten"),
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
    assert out.count("python3 rlhf_constructor.py") == 3 and all(name in out for name in rc.METHODS)


def test_help_lists_every_entry_of_every_table():
    out = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for table in (rc.METHODS, rc.INPUTS, rc.FILTERS, rc.OUTPUTS, rc.PROVIDERS, rc.STRATEGIES):
        assert all(name in out for name in table)
    first = out.index("main flags:")
    assert all(
        first < out.index(f"  {flag} ") for flag in ("--input-file", "--method", "--output-path")
    )


def test_help_has_100_columns_and_a_short_usage_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "102")
    lines = rc.build_parser().format_help().splitlines()
    assert lines[0] == "usage: rlhf_constructor.py --input-file FILE [options]"
    assert max(map(len, lines)) <= 100
    examples = [n for n, line in enumerate(lines) if "python3 rlhf_constructor.py" in line]
    assert len(examples) == 3 and max(examples) < lines.index("methods:")


def test_the_defaults_in_help_are_the_real_ones():
    named = 0
    for action in rc.build_parser()._actions:
        default = re.search(r"\(default (-?[\w./]+)", action.help % vars(action))
        if default and action.default is not None:
            named += 1
            assert str(action.default) in (default[1], f"{default[1]}.0"), action.option_strings
    assert named >= 15


def test_every_flag_is_explained_with_its_default_or_as_repeatable():
    for action in rc.build_parser()._actions[1:]:
        complete = re.search("default|repeatable|required", action.help)
        assert complete or action.nargs == 0, action.option_strings


# --- @FILE


def parsed(*argv):
    return rc.build_parser().parse_args(list(map(str, argv)))


def test_a_file_of_flags_holds_a_flag_and_its_value_on_each_line(tmp_path):
    file = tmp_path / "flags"
    file.write_text(
        "\ufeff# the main job\n--input-file in put.jsonl\n\n  --system-prompt @ Reply in 中文.\r\n"
        '--batch\n--candidate-models a b\n--rename "my field=prompt"\n--seed=4\n',
        "utf-8",
    )
    args = parsed(f"@{file}", "--seed", 5)
    assert (args.input_file, args.system_prompt) == ("in put.jsonl", "@ Reply in 中文.")
    assert args.batch and args.candidate_models == ["a", "b"] and args.seed == 5
    assert args.rename == [("my field", "prompt")]


def test_a_value_may_begin_with_the_sign_of_a_file():
    assert parsed("--system-prompt=@home helps").system_prompt == "@home helps"


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "No such file or directory: 'flags'"),
        ("--sed 1", "unrecognized arguments: --sed=1 (did you mean --seed?)"),
        ("--seed one", "--seed: invalid int value: 'one'"),
    ],
    ids=["missing", "a typo", "a wrong value"],
)
def test_a_mistake_in_a_file_of_flags_is_one_line(tmp_path, monkeypatch, capsys, text, says):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "flags").write_text(text)
    assert rc.main(["@flags"]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


# --- values


def test_an_unknown_optional_filter_is_refused_with_the_known_ones(monkeypatch):
    with pytest.raises(rc.UserError, match="--use-filter: invalid choice: 'strict'"):
        parsed("--use-filter", "strict")

    def strict(pair, run):
        """a filter that runs only when asked for"""

    monkeypatch.setitem(rc.FILTERS, "strict", strict)
    strict.opt_in = True
    assert parsed("--use-filter", "strict").use_filter == ["strict"]


def test_chinese_arguments_are_read_as_utf_8_in_a_c_locale(tmp_path):
    """Python hands over bytes that it cannot decode as lone surrogates."""
    broken = "请用中文".encode().decode("ascii", "surrogateescape")
    options = ["--rename", f"{broken}=prompt", "--model-option", f'm:a="{broken}"']
    args = parsed("--system-prompt", broken, *options)
    assert args.system_prompt == "请用中文" and args.rename == [("请用中文", "prompt")]
    assert args.model_option == [("m", "a", "请用中文")]


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
    assert result.status == 2 and "cannot be written" in result.err


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


def test_few_pairs_come_with_advice(rlhf):
    with Api(lambda call: "positive") as api:
        result = rlhf(PROMPTS, *MODELS, api=api)
    assert result.status == 1 and result.pairs == []
    assert "  12  identical answers  both answers are the same text" in result.out
    assert "identical answers: on label tasks: --system-prompt" in result.out


def test_the_plan_names_the_calls_that_are_then_made(rlhf):
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, api=api)
        models = "12 gpt-4o, 12 gpt-4o-mini, 24 judging by gpt-4o"
        assert (
            f"Plan: 12 records, 48 API calls ({models});\n  0 are cached, 48 to pay." in result.err
        )
        assert api.count() == 48
        result = rlhf(PROMPTS + [{"prompt": "another"}], *MODELS, api=api)
        assert "52 API calls" in result.err and "48 are cached, 4 to pay." in result.err
        assert api.count() == 52


@pytest.mark.parametrize(
    "flags, calls",
    [
        (
            ["--method", "generate_pairs"],
            "72 API calls (24 gpt-4o, 24 gpt-4o-mini, 24 judging by gpt-4o)",
        ),
        (["--judge-model", "none"], "24 API calls (12 gpt-4o, 12 gpt-4o-mini)"),
        (["--judge-model", "j", "--judge-model", "k"], "24 judging by j, 24 judging by k)"),
        (["--judge-model", "j", "--judge-orders", 1], "12 judging by j)"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_the_plan_knows_methods_and_judges(rlhf, flags, calls):
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, *flags, api=api)
    assert calls in result.err and f" {api.count()} API calls" in result.err


def test_a_dry_run_needs_no_key_calls_nobody_and_writes_nothing(rlhf, tmp_path):
    result = rlhf(PROMPTS, "--dry-run", "--price", "qwen3-max=1/2", "--provider", "dashscope")
    assert result.status == 0 and os.listdir(tmp_path) == ["in.jsonl"]
    assert "Plan: 12 records, 48 API calls" in result.out
    assert "qwen3-max: 36 calls to pay" in result.out and "(--price)" in result.out
    assert "Expected cost: unknown, because qwen-flash has no --price." in result.out
    assert "First prompt to qwen-flash:\nQuestion 0?" in result.out and "<answer" in result.out


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
            result.status == 3 and "exceed --max-cost 2: " in result.err and 4 <= api.count() < 40
        )
        assert (
            rlhf(PROMPTS, *MODELS, *prices, "--max-cost", 1000, api=api).status == 0
            and api.count() == 48
        )


BUDGET = ("--price", "gpt-4o=0/1000000", "--price", "gpt-4o-mini=0/1000000", "--max-tokens", 3000)
FORTY = [{"prompt": f"Question {n}"} for n in range(40)]


@pytest.mark.parametrize("text", [None, ""], ids=["", "some without text"])
@pytest.mark.parametrize("seed", range(2))
def test_a_budget_is_passed_by_the_two_calls_in_flight_at_most(rlhf, seed, text):
    luck, spent = random.Random(seed), []

    async def answer(call):
        await asyncio.sleep(luck.random() / 50)
        spent.append(50 if len(spent) < 90 else luck.choice((50, 200, 3000)))
        lost = text is not None and luck.random() < 0.1
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
        assert result.status == 2 and "paid for former: add --price former=IN/OUT" in result.err
        more = rlhf(PROMPTS, *MODELS, *budget, "--price", "former=1/1", "--dry-run", api=api)
        assert more.status == 0 and "--price former" not in more.err and api.count() == calls


def test_a_reply_that_another_process_had_first_is_still_in_the_books(tmp_path):
    for output_id in ("first", "second"):
        cache = rc.Cache(str(tmp_path / "c.sqlite"), output_id)
        with contextlib.closing(cache):
            assert cache.put("key", rc.Reply(output_id, tokens_in=3, tokens_out=4), "m") == (
                output_id == "first"
            )
            assert cache.get("key").text == "first" and cache.bill() == [("m", 3, 4)]


def test_a_capital_field_is_named_as_it_is_and_renamed_in_either_case(rlhf):
    records = [{"Frage": "Why?", "gold": "An answer."}]
    flags = ("--provider", "offline", "--rename", "gold=output")
    assert "no known fields: Frage" in rlhf(records, *flags).err
    for name in ("Frage", "frage"):
        assert len(rlhf(records, *flags, "--rename", f"{name}=prompt").pairs) == 1


def test_a_model_that_writes_and_judges_is_named_as_both(rlhf):
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, api=api)
    report = json.loads(result.output.with_suffix(".report.json").read_text("utf-8"))
    settings = report["settings"]
    assert settings["models"] == ["gpt-4o", "gpt-4o-mini"] and settings["judges"] == ["gpt-4o"]


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


def test_a_closed_stdin_is_one_line():
    command = [sys.executable, SCRIPT, "--provider", "offline", "--input-file", "-"]
    run = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True
    )
    assert run.returncode == 2 and "stdin is closed" in run.stderr and run.stderr.count("\n") == 1


def test_a_broken_cache_is_named_and_left_alone(rlhf, tmp_path):
    (tmp_path / "c.sqlite").write_bytes(b"no database " * 99)
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, "--cache-path", "c.sqlite", api=api)
        assert result.status == 2 and not api.calls
        assert "c.sqlite" in result.err and "Traceback" not in result.err


def test_annotations_without_their_pairs_are_refused(rlhf, tmp_path):
    choice = {"pair_id": "0" * 16, "choice": "tie", "queue": "random", "annotator": "Ann"}
    write_jsonl(tmp_path / "v.jsonl", [choice])
    result = rlhf(DEMO, "--provider", "offline", "--annotations", "v.jsonl")
    assert "works with --method rank_responses" in result.err
    (tmp_path / "v.jsonl").write_text("{}\n")
    refused = rlhf(
        DATA / "preference_pairs.jsonl", "--method", "rank_responses", "--annotations", "v.jsonl"
    )
    assert refused.status == 2 and "no line of it is a choice" in refused.err


def test_a_file_of_prompts_to_exclude_that_holds_none_is_refused(rlhf, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"colour": "red"}\n')
    result = rlhf(DEMO, "--provider", "offline", "--exclude-prompts", "eval.jsonl")
    assert result.status == 2 and "no record in it is recognised" in result.err


def test_nobody_reading_the_summary_is_no_error(process, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "2 + 2?", "output": "It is 4."}])
    run = process("--provider", "offline", "--input-file", source, "--output-path", "out.jsonl")
    run.stdout.close()
    _, err = run.communicate(timeout=30)
    assert run.returncode == 0 and "Traceback" not in err and "stopped" not in err


def test_a_spreadsheet_is_refused_whatever_its_name(rlhf, tmp_path):
    (tmp_path / "q.csv").write_bytes(b"PK\x03\x04 rest")
    result = rlhf(tmp_path / "q.csv", "--provider", "offline")
    assert result.status == 2 and "save the sheet as CSV UTF-8" in result.err


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


def test_a_price_for_nobody_is_noted(rlhf):
    prices = ("--price", "gpt-4o=0/1000", "--price", "gpt-4o-mini=0/1000", "--price", "gpt5=1/1")
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, *MODELS, *prices, api=api)
    assert "--price gpt5: this run uses no model of that name" in result.err
    assert result.err.count("this run uses no model") == 1


def test_candidates_of_a_method_that_asks_none_are_refused(rlhf):
    result = rlhf(PROMPTS, "--provider", "offline", "--candidate-models", "reference", "weakened")
    assert result.status == 2 and "use --method generate_pairs" in result.err


def test_a_folder_as_input_is_named(rlhf, tmp_path):
    assert f"{tmp_path} is a folder: name a file in it" in rlhf(str(tmp_path)).err
