"""A run from its input to its files: every record accounted for, labels across rows, early ends."""

import asyncio
import errno
import gzip
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import rlhf_constructor as rc
from tests.conftest import DATA, ROOT, SCRIPT, rows, write_jsonl
from tests.server import Api, Fault, demo_world
from tests.tiny import run_of, shown, verdict

DEMO = DATA / "alpaca_demo.jsonl"
MODELS = ("--provider", "openai", "--high-model", "gpt-4o", "--low-model", "gpt-4o-mini")
PROMPTS = [{"prompt": f"Question {n}?"} for n in range(12)]
RANK = ("--method", "rank_responses")


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
    assert "Read 12 records, wrote 7 pairs (58%), dropped 5." in result.out
    stages = [reason.split(":")[0] for reason in result.reasons]
    assert stages == ["input", "input", "input", "input", "model"]
    assert (
        result.dropped[2]["reason"] == "repeated prompt"
        and result.dropped[2]["prompt"] == "Question 0?"
    )


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
        assert f"Read 12 records, wrote {len(result.pairs)} pairs (" in result.out


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
    assert (
        run.returncode != 0
        and "whose chosen answer scores 1 and whose rejected one scores 2" in run.stderr
        and "Unclosed" not in run.stderr
    )
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
            line = run.stderr.readline()
            assert line, f"the program ended: {err}"
            err += line
        while run.poll() is None:  # within a second it counts as the first one, forwarded
            run.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, rest = run.communicate(timeout=30)
    assert run.returncode == 130 and not any(word in rest for word in ("Traceback", "Unclosed"))


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
    assert all(row["reason"].startswith("excluded prompt: ") for row in result.dropped)
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
    result = rlhf([answers | {"ranks": [1, 2]}, answers | {"ranks": [2, 1]}] * 2, *RANK)
    assert result.pairs == [] and set(result.reasons) == {"input: contradictory labels"}


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


def test_stdin_is_an_input(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--input-file", "-", "--provider", "offline", "--output-path", "new/o.jsonl"],
        input=DEMO.read_bytes(), cwd=tmp_path, capture_output=True, check=True,
    )  # fmt: skip
    assert b"Read 30 records" in run.stdout and len(rows(tmp_path / "new/o.jsonl")) > 20


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
    assert result.pairs[0] == first[0] | {"decided_by": "people"} and len(result.pairs) == 28
    assert result.pairs[2]["decided_by"] == "scores"
    flipped = result.pairs[1]
    assert (flipped["chosen"], flipped["rejected"]) == (first[1]["rejected"], first[1]["chosen"])
    assert (flipped["score_chosen"], flipped["score_rejected"]) == (
        first[1]["score_rejected"],
        first[1]["score_chosen"],
    )
    assert result.reasons == ["human: no difference", "human: both bad"]
    assert "1 choice not used: no such pair in the input" in result.err
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
    write_jsonl(tmp_path / "v.jsonl", judged_by("Ann", first, ["chosen"] * 30))
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
    assert api.count() == 2 and "reviewed 30 of 30 pairs" in result.out


def test_annotations_of_another_file_are_refused(rlhf, tmp_path):
    other = {"prompt": "Another", "chosen": "a", "rejected": "b", "prompt_id": ""}
    write_jsonl(tmp_path / "a.jsonl", judged_by("Ann", [other], ["rejected"]))
    result = rlhf(
        DATA / "preference_pairs.jsonl", "--method", "rank_responses", "--annotations", "a.jsonl"
    )
    assert (
        result.status == 2
        and "no choice is about a pair of this input" in result.err
        and not result.output.exists()
    )


def test_pairs_are_kept_if_their_input_is_gone_by_then(rlhf, monkeypatch, tmp_path):
    async def mine(record, run):
        """removes its input"""
        pairs = await rc.model_comparison(record, run)
        (tmp_path / "in.jsonl").unlink(missing_ok=True)
        return pairs

    monkeypatch.setitem(rc.METHODS, "mine", mine)
    with Api(demo_world) as api:
        result = rlhf(PROMPTS, "--method", "mine", *MODELS, api=api)
    assert result.status == 0 and result.pairs
    assert json.loads((tmp_path / "out.report.json").read_bytes())["settings"]["input_sha256"] == ""


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


def test_a_request_asked_four_times_at_once_is_paid_once_though_the_first_call_fails(rlhf):
    failures = [Fault(400)]
    world = lambda call: failures.pop() if failures else demo_world(call)
    with Api(world) as api:
        models = run_of().models
        model = rc.Model("openai", "strong", f"{api.url}/v1")

        async def ask_four_times():
            calls = [models.ask(model, [{"role": "user", "content": "Hi"}], {}) for _ in range(4)]
            replies = await asyncio.gather(*calls, return_exceptions=True)
            await models.close()
            return replies

        replies = asyncio.run(ask_four_times())
        assert api.count() == 2
    assert [isinstance(reply, rc.Failed) for reply in replies] == [True, False, False, False]


def test_a_dry_run_reads_a_cache_and_writes_nothing_into_it(rlhf, tmp_path):
    cache = tmp_path / ".rlhf_cache.sqlite"
    with Api(demo_world) as api:
        rlhf(PROMPTS[:2], *MODELS, api=api)
        before = cache.read_bytes()
        result = rlhf(PROMPTS[:2], *MODELS, "--dry-run", api=api)
    assert result.status == 0 and "8 are cached, 0 to pay." in result.out
    assert cache.read_bytes() == before


def test_a_dry_run_makes_no_table_in_an_empty_cache(rlhf, tmp_path):
    cache = tmp_path / ".rlhf_cache.sqlite"
    cache.touch()
    with Api(demo_world) as api:
        assert rlhf(PROMPTS[:2], *MODELS, "--dry-run", "--price", "gpt-4o=1/1", api=api).status == 0
    assert cache.read_bytes() == b""


def test_a_system_prompt_with_half_an_emoji_is_mended(rlhf):
    with Api(demo_world) as api:
        assert rlhf(PROMPTS[:1], *MODELS, "--system-prompt", "Be kind \ud83d", api=api).status == 0
    assert api.calls[0].messages[0]["content"].rstrip("\ufffd") == "Be kind "


# --- labels across rows

HOT, COLD = "Tea is served hot.", "Tea is served cold."
LABEL = {"prompt": "How is tea served?", "chosen": HOT, "rejected": COLD}
SAME_LABEL = [
    pytest.param({"prompt": LABEL["prompt"], "chosen": HOT, "rejected": COLD}, id="the same row"),
    pytest.param(
        {"prompt": LABEL["prompt"], "response_a": COLD, "response_b": HOT, "winner": "b"},
        id="sides swapped",
    ),
    pytest.param(
        {"prompt": LABEL["prompt"], "responses": [HOT, COLD], "scores": [9, 2]}, id="by scores"
    ),
    pytest.param(
        {"prompt": LABEL["prompt"], "responses": [COLD, HOT], "ranks": [2, 1]}, id="by ranks"
    ),
    pytest.param({"prompt": LABEL["prompt"], "chosen": f" {HOT}", "rejected": COLD}, id="spaces"),
]
OPPOSITE = {"prompt": LABEL["prompt"], "chosen": COLD, "rejected": HOT}
OTHER = {"prompt": "Is ice cold?", "chosen": "Yes, it is.", "rejected": "No, never."}


@pytest.mark.parametrize("row", SAME_LABEL)
def test_a_repeated_label_is_written_once_and_the_repeat_is_listed(rlhf, row):
    result = rlhf([LABEL, OTHER, row], *RANK, "--output-format", "basic")
    assert [pair["chosen"] for pair in result.pairs] == [HOT, "Yes, it is."]
    assert [(drop["line"], drop["reason"]) for drop in result.dropped] == [(3, "repeated label")]


@pytest.mark.parametrize("row", SAME_LABEL)
def test_contradictory_labels_give_no_pair_and_all_are_listed(rlhf, row):
    result = rlhf([row, OTHER, OPPOSITE], *RANK, "--output-format", "basic")
    assert result.pairs == [OTHER]
    assert result.reasons == ["input: contradictory labels"] * 2
    assert [drop["line"] for drop in result.dropped] == [1, 3]
    assert "Read 3 records" in result.out and "read again" in result.err


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_a_majority_of_three_labels_decides(rlhf, order):
    records = [LABEL, LABEL | {"rejected": f"{COLD} "}, OPPOSITE]
    result = rlhf([records[place] for place in order], *RANK)
    assert [pair["chosen"] for pair in result.pairs] == [HOT]
    assert sorted(result.reasons) == ["input: contradictory labels", "input: repeated label"]


def test_two_labels_against_two_decide_nothing(rlhf):
    result = rlhf([LABEL, OPPOSITE] * 2, *RANK)
    assert result.pairs == [] and result.reasons == ["input: contradictory labels"] * 4


@pytest.mark.parametrize("name", rc.OUTPUTS)
def test_every_record_is_accounted_for_in_every_format(rlhf, name):
    records = [LABEL, OPPOSITE, OTHER, OTHER, OTHER | {"rejected": "Not at all."}]
    result = rlhf(records, *RANK, "--output-format", name)
    reasons = ["contradictory labels", "contradictory labels", "repeated label"]
    reasons += ["repeated row"] if name == "prompts" else []  # the same prompt once more
    assert [drop["reason"] for drop in result.dropped] == reasons
    assert f"Read 5 records, wrote {5 - len(reasons)} " in result.out


def test_a_record_whose_kto_rows_are_all_written_before_is_listed(rlhf):
    """good > fair and fine > poor are written; good > poor gives no new row."""
    texts = [("good", "fair"), ("fine", "poor"), ("good", "poor")]
    records = [
        {"prompt": "Q", "chosen": chosen, "rejected": rejected} for chosen, rejected in texts
    ]
    result = rlhf(records, *RANK, "--output-format", "kto")
    assert len(result.pairs) == 4 and result.reasons == ["filter: repeated row"]


def test_other_pairs_of_a_record_outlive_a_contradiction(rlhf):
    ranked = {"prompt": LABEL["prompt"], "responses": [HOT, "Mild.", COLD], "ranks": [1, 2, 3]}
    result = rlhf([ranked, OPPOSITE], *RANK, "--strategy", "all_pairs")
    assert [(pair["chosen"], pair["rejected"]) for pair in result.pairs] == [
        (HOT, "Mild."),
        ("Mild.", COLD),
    ]
    assert [drop["line"] for drop in result.dropped] == [2]


def test_report_and_review_page_know_nothing_of_contradictory_labels(rlhf, tmp_path):
    rlhf([LABEL, OTHER, OPPOSITE], *RANK, "--review-path", "r.html")
    numbers = json.loads((tmp_path / "out.report.json").read_text("utf-8"))
    assert numbers["records"] == 3 and numbers["pairs"] == 1
    assert HOT not in (tmp_path / "r.html").read_text("utf-8")


def test_people_win_over_labels(rlhf, tmp_path):
    known = rc.pair_id(LABEL["prompt"], HOT, COLD)
    choice = {"pair_id": known, "choice": "chosen", "queue": "random", "annotator": "Ann"}
    write_jsonl(tmp_path / "v.jsonl", [choice])
    result = rlhf([OPPOSITE, LABEL, OPPOSITE], *RANK, "--annotations", "v.jsonl")
    assert [(pair["chosen"], pair["decided_by"]) for pair in result.pairs] == [(HOT, "people")]
    assert result.reasons == ["input: contradictory labels"] * 2
    assert "reviewed 1 of" in result.out


def counting_judge(call):
    """A judge who prefers the hot tea of two answers, the cold one of three; a prompt that fails."""
    answers = shown(call.prompt)
    if "FAIL" in call.prompt:
        return Fault(400)
    best = HOT if len(answers) == 2 else COLD
    return verdict(call.prompt, lambda text: 9 if text == best else 3)


@pytest.mark.parametrize("cache", ["c.sqlite", "none"])
def test_the_second_pass_over_contradictory_labels_makes_no_call(rlhf, tmp_path, cache):
    tea = {"prompt": LABEL["prompt"]}
    records = [
        tea | {"responses": [HOT, COLD]},
        tea | {"responses": [HOT, "Mild.", COLD]},
        {"prompt": "FAIL", "responses": ["one answer", "another"]},
    ]
    flags = (*RANK, "--provider", "openai", "--judge-model", "gpt-4o", "--strategy", "all_pairs")
    with Api(counting_judge) as api:
        result = rlhf(records, *flags, "--cache-path", cache, "--min-score-gap", 1, api=api)
        failed = sum("FAIL" in call.prompt for call in api.calls)
        assert api.count() == 4 + failed and failed <= 4
    assert result.dropped[0]["reason"] == "contradictory labels" and len(result.pairs) == 1
    assert (tmp_path / "c.sqlite").exists() == (cache != "none")


def test_a_generating_method_reads_its_input_once(rlhf):
    assert "read again" not in rlhf(DEMO, "--provider", "offline").err


def test_answers_without_a_label_are_judged_once(rlhf):
    bare = {"prompt": LABEL["prompt"], "responses": [HOT, COLD]}
    with Api(demo_world) as api:
        result = rlhf([bare, bare], *RANK, *MODELS, "--judge-model", "gpt-4o", api=api)
        assert api.count() == 2
    assert result.reasons[-1] == "input: repeated prompt and answers"


# --- waiting, signals, messages


def test_the_bar_counts_records_as_they_finish_not_in_the_order_of_the_input(rlhf, monkeypatch):
    bars = []

    class Watched(rc.Progress):
        def __init__(self, *args):
            super().__init__(*args)
            bars.append(self)

    monkeypatch.setattr(rc, "Progress", Watched)

    async def answer(call):
        """Question 3 is answered when all others are done."""
        if call.prompt == "Question 3?":
            until = time.monotonic() + 20
            while bars[0].finished < 11 and time.monotonic() < until:
                await asyncio.sleep(0.01)
            finished_before.append(bars[0].finished)
        return demo_world(call)

    finished_before = []
    with Api(answer) as api:
        result = rlhf(PROMPTS, *MODELS, "--judge-model", "none", api=api)
    assert result.status == 0 and max(finished_before) == 11 and bars[0].finished == 12


def test_the_report_names_the_versions_of_python_and_of_the_installed_sdks(rlhf, monkeypatch):
    def version(package):
        if package == "dashscope":
            raise importlib.metadata.PackageNotFoundError(package)
        return "9.8"

    monkeypatch.setattr(importlib.metadata, "version", version)
    records = [{"prompt": "Why?", "output": "So. It is. Very."}]
    output = rlhf(records, "--provider", "offline").output
    settings = json.loads(output.with_name("out.report.json").read_text("utf-8"))["settings"]
    assert settings["versions"] == {"python": sys.version.split()[0], "openai": "9.8"}


def test_ctrl_c_stops_the_plan_at_once(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"Question {n}?"} for n in range(300)])
    run = run_of("--provider", "openai", "--high-model", "a@http://localhost:9/v1",
                 "--low-model", "b@http://localhost:9/v1")  # fmt: skip

    async def interrupted():
        planning = asyncio.create_task(rc.plan(str(source), run, rc.Cache(None)))
        await asyncio.sleep(0)
        run.models.halt("interrupted", 130)
        return await planning

    with pytest.raises(rc.Stop, match="interrupted"):
        asyncio.run(interrupted())


def test_the_first_signal_after_a_stop_and_one_that_is_forwarded_leave_calls_in_flight(
    monkeypatch, capsys
):
    models = run_of().models
    models.in_flight = 3
    left = []
    monkeypatch.setattr(rc.os, "_exit", left.append)

    async def press_three_times():
        models.halt("--max-cost 1 is reached")
        with rc.interruptible(models):
            press = signal.getsignal(signal.SIGINT)
            press()
            press()
            assert not left
            monkeypatch.setattr(rc, "FORWARDED_SECONDS", 0.0)
            press()

    asyncio.run(press_three_times())
    assert left == [130]
    assert "stopping: waiting for 3 calls in flight\n" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="no signals to send")
def test_sigterm_ends_a_run_like_ctrl_c(process, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    with Api(demo_world, latency=0.2) as api:
        run = process("--input-file", "in.jsonl", *MODELS, "--output-path", "o.jsonl", api=api)
        while api.count() < 3 and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=30)
    assert run.returncode == 130 and err.splitlines()[-1].endswith("interrupted")
    assert "Run the same command again to continue" in out and "Traceback" not in err


@pytest.mark.parametrize(
    "number, advice",
    [
        (errno.EMFILE, "lower --concurrency"),
        (errno.ENOSPC, "the disk is full. Nothing is lost: free some space"),
    ],
)
def test_the_systems_errors_come_with_their_cause(number, advice):
    assert advice in rc.disk_message(OSError(number, os.strerror(number)))


@pytest.mark.skipif(os.name == "nt", reason="no limits to set")
def test_too_many_open_files_are_named_as_the_cause(tmp_path):
    resource = pytest.importorskip("resource")
    files = [open(os.devnull) for _ in range(30)]  # noqa: SIM115
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        lowest_free = file.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(
            rc.UserError, match="too many open files. Nothing is lost: lower --concurrency"
        ):
            rc.opened(str(tmp_path / "x.jsonl"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            file.close()


def test_a_template_shared_with_the_excluded_prompts_is_named(rlhf, tmp_path):
    template = "You are a careful assistant who answers the following question in one short line"
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": f"{template}: What is ice?"}])
    records = [{"prompt": f"{template}: {word}?", "output": "Yes."} for word in "abc"]
    records.append({"prompt": "Is tea hot?", "output": "It is, as a rule. Yes. Very."})
    result = rlhf(records, "--provider", "offline", "--exclude-prompts", "eval.jsonl")
    assert "are they a template?" in result.out
    reason = result.dropped[0]["reason"]
    assert "you are a careful assistant who answers the following question" in reason
