"""Bugs that were found in other tools, each as a fact that holds here.

What another file tests already is not repeated: one 400 costs one record (test_calls), ties and missing scores
make no pair (test_methods, test_existing_answers), another system prompt or address misses the cache (test_main_job,
test_calls), batch results are joined by custom_id with errors among them (test_batch), kills (test_crash).
"""

import asyncio
import json
import re
import subprocess
import sys

import pytest

import rlhf_constructor as rc
from tests.conftest import DATA, SCRIPT, rows
from tests.server import Api, Fault, Reply, demo_world, is_judge, judge_reply

MODELS = (
    "--provider",
    "openai",
    "--high-model",
    "strong",
    "--low-model",
    "weak",
    "--max-retries",
    0,
)
PROMPTS = [{"prompt": f"What is {n} plus {n}?"} for n in range(12)]


def world(call):
    """Each answer names its model and its prompt; the judge prefers the strong one's."""
    if is_judge(call):
        return judge_reply(call, lambda text, slot: 9 if "strong" in text else 3)
    return f"{call.model} on: {call.prompt}"


def belongs(pair):
    """Both answers were given to this prompt."""
    return all(pair[side].endswith(f"on: {pair['prompt']}") for side in ("chosen", "rejected"))


# --- the label


@pytest.mark.parametrize("flags", [("--when-low-wins", "flip"), ("--method", "generate_pairs", "--num-candidates", 2)],
                         ids=["model_comparison", "generate_pairs"])  # fmt: skip
def test_the_judges_verdict_decides_the_label(rlhf, flags):
    """open-instruct compared with `and` what could not hold together: chosen was always the first completion."""
    for better, worse in (("strong", "weak"), ("weak", "strong")):
        judge = lambda call, better=better: judge_reply(
            call, lambda text, slot: 9 if better in text else 3
        )
        with Api(lambda call, judge=judge: judge(call) if is_judge(call) else world(call)) as api:
            pairs = rlhf(PROMPTS, *MODELS, *flags, "--cache-path", "none", api=api).pairs
        assert {(pair["chosen_model"], pair["rejected_model"]) for pair in pairs} == {
            (better, worse)
        }
        assert len(pairs) == 12 and all(
            better in pair["chosen"] and worse in pair["rejected"] for pair in pairs
        )


@pytest.mark.parametrize("reply", [
    "Rating: 4\nRationale: good\n\nRating: 2\nRationale: poor", "**Rating:** 4\n\n**Rating:** 2", "Rating: high\n\nRating: low",
    "K3: 5/5\nQ7: 2/5", "[[8]] [[3]]", "Score: 1\nScore: 10", "<think>K3 Rating: 1</think>\nK3 Rating: 5\nQ7 Rating: 2",
    '{"scores": {"K3": "5/5", "Q7": "2/5"}}', '{"scores": {"K3": "Rating: 4", "Q7": "Rating: 2"}}',
    '{"scores": {"K3": "1 to 10", "Q7": 1}}', "A", "[[A]]", "m", "0.8",
])  # fmt: skip
def test_no_rating_in_prose_becomes_a_score(reply):
    """distilabel split replies at blank lines, [5, 2] became [None, 5, 2]; UltraFeedback read 1 as 10."""
    with pytest.raises(rc.UnreadableReply):
        rc.parse_scores(reply, ["K3", "Q7"])


@pytest.mark.parametrize("one, two", [(1, 10), ("1", "10"), (10, 1), ("10.0", "1.0"), (1.0, 1.5)])
def test_1_is_not_10(one, two):
    """UltraFeedback: 2,628 completions had a 10 where many judges meant 1."""
    reply = json.dumps({"reason": "10 of 10, 1 of 1", "scores": {"K3": one, "Q7": two}})
    assert rc.parse_scores(reply, ["K3", "Q7"]) == [float(one), float(two)]


def test_a_dropped_record_shifts_no_neighbour(rlhf, tmp_path):
    """open-instruct dropped rows, then joined by position: each later prompt got its neighbour's pair."""

    def answer(call):
        n = int(re.search(r"What is (\d+)", call.prompt)[1])
        if is_judge(call):
            return (
                "no idea"
                if n == 5
                else judge_reply(call, lambda text, slot: 5)
                if n == 7
                else world(call)
            )
        return {1: Fault(400), 2: " ", 3: Reply("cut", finish="length"), 4: Fault(500)}.get(
            n
        ) or world(call)

    with Api(answer) as api:
        result = rlhf(
            PROMPTS, *MODELS, "--candidates-path", "c.jsonl", "--test-fraction", 0.3, api=api
        )
    pairs = result.pairs + rows(tmp_path / "out.test.jsonl")
    assert sorted(row["line"] for row in result.dropped) == [2, 3, 4, 5, 6, 8] and all(
        map(belongs, pairs)
    )
    assert {pair["prompt"] for pair in pairs} == {
        PROMPTS[n]["prompt"] for n in (0, 6, 8, 9, 10, 11)
    }
    for row in rows(tmp_path / "c.jsonl"):
        told = [answer["text"] for answer in row["completions"] if " on: " in answer["text"]]
        assert all(text.endswith(row["prompt"][0]["content"]) for text in told)
    assert all(row["prompt"] == PROMPTS[row["line"] - 1]["prompt"] for row in result.dropped)


@pytest.mark.parametrize(
    "kind", ["error", "html", "garbage", "not_json_type", "null_content", "no_choices", "close"]
)
def test_no_text_of_an_error_becomes_an_answer(rlhf, tmp_path, kind):
    """FastChat wrote $ERROR$ as an answer, and judged it."""
    broken = lambda call: call.model == "weak" and not is_judge(call) and "2 plus" in call.prompt
    with Api(lambda call: Fault(500, kind=kind) if broken(call) else world(call)) as api:
        result = rlhf(PROMPTS, *MODELS, "--candidates-path", "c.jsonl", api=api)
        assert all(
            "fault" not in call.prompt and "went wrong" not in call.prompt for call in api.calls
        )
    assert len(result.pairs) == 11 and all(map(belongs, result.pairs))
    texts = [answer["text"] for row in rows(tmp_path / "c.jsonl") for answer in row["completions"]]
    assert len(texts) == 12 + 11 and all(" on: What is" in text for text in texts)


def test_every_candidate_that_is_paid_for_is_used(rlhf, tmp_path):
    """curator sent n=4, paid four choices and kept the first."""

    def answer(call):
        return (
            judge_reply(call, lambda text, slot: float(text[-1]))
            if is_judge(call)
            else f"Answer {api.count()} of 12, rated {api.count() % 9 + 1}"
        )

    with Api(answer) as api:
        result = rlhf(
            PROMPTS[:2],
            *MODELS,
            "--method",
            "generate_pairs",
            "--candidates-path",
            "c.jsonl",
            api=api,
        )
        asked = [call for call in api.calls if not is_judge(call)]
    assert (
        result.status == 0 and len(asked) == 2 * 4 and not any("n" in call.params for call in asked)
    )
    assert [len(row["completions"]) for row in rows(tmp_path / "c.jsonl")] == [4, 4]


# --- what is paid, and what is served from a cache


def test_another_input_of_the_same_name_gets_its_own_pairs(rlhf):
    """distilabel left the rows out of its key: 20 other prompts got the former 20 rows, without a call."""
    with Api(world) as api:
        assert len(rlhf(PROMPTS[:6], *MODELS, api=api).pairs) == 6
        again = rlhf(PROMPTS[6:], *MODELS, api=api)
        assert [pair["prompt"] for pair in again.pairs] == [
            record["prompt"] for record in PROMPTS[6:]
        ]
        assert api.count() == 4 * 12 and all(map(belongs, again.pairs))


def test_more_prompts_of_the_same_file_pay_for_themselves_alone(rlhf):
    """curator's key was that of the whole data set: a prompt more, and all were paid again; equal prompts, too."""
    with Api(world) as api:
        rlhf(PROMPTS[:6], *MODELS, "--max-samples", 4, api=api)
        result = rlhf([*PROMPTS[:3], PROMPTS[9], *PROMPTS[3:6], PROMPTS[0]], *MODELS, api=api)
        assert (
            api.count() == 4 * 7
            and len(result.pairs) == 7
            and result.reasons == ["input: repeated prompt"]
        )


def test_another_rubric_or_judge_asks_the_judge_again_and_nobody_else(rlhf, tmp_path):
    """alpaca_eval's key held neither the judge's prompt nor its model."""
    (tmp_path / "strict.txt").write_text("Only facts count.", "utf-8")
    with Api(world) as api:
        rlhf(PROMPTS, *MODELS, api=api)
        for flags in (("--rubric", "strict.txt"), ("--judge-model", "other")):
            paid = api.count()
            rlhf(PROMPTS, *MODELS, *flags, api=api)
            assert [is_judge(call) for call in api.calls[paid:]] == [True] * 24


def test_a_step_more_after_a_stop_takes_nothing_partial_for_the_whole(rlhf):
    """distilabel, killed and given a step more, returned 120 of 400 rows as if they were all."""
    with Api(lambda call: Fault(401) if api.count() > 20 else world(call)) as api:
        assert rlhf(PROMPTS, *MODELS, "--concurrency", 2, api=api).status == 3
        api._answer = world
        result = rlhf(
            PROMPTS, *MODELS, "--output-format", "conversational", "--length-penalty", 0.1, api=api
        )
    assert result.status == 0 and len(result.pairs) == 12


@pytest.mark.parametrize("batch", [(), ("--batch",)], ids=["online", "batch"])
def test_the_cost_is_that_of_all_runs_and_prices_have_decimals(rlhf, tmp_path, monkeypatch, batch):
    """curator's cost covered the last run only, was 0 in batches, and took no price of 0.4."""
    monkeypatch.setattr(rc, "BATCH_POLL", (0.01, 0.05))
    flags = (*MODELS, "--price", "strong=0.4/1.6", "--price", "weak=0.05/0.2", *batch)
    answer = lambda call: Reply(world(call), tokens_in=1000, tokens_out=500)
    with Api(answer) as api:
        rlhf(PROMPTS[:5], *flags, api=api)
        rlhf(PROMPTS, *flags, api=api)
    usage = json.loads((tmp_path / "out.report.json").read_text("utf-8"))["usage"]
    share = 0.5 if batch else 1
    assert sum(row["money"] for row in usage) == pytest.approx(
        share * 12 * (3 * (0.4 + 0.8) + 0.05 + 0.1) / 1000
    )


# --- speed and manners


def test_a_slow_record_holds_up_no_other(rlhf):
    """distilabel and synthetic-data-kit waited for the slowest row of each batch."""
    late = []

    async def answer(call):
        if "What is 1 " in call.prompt and not is_judge(call) and call.model == "weak":
            while api.count() < 4 * 11 + 2:  # all the others
                await asyncio.sleep(0.005)
            late.append(call)
        return world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *MODELS, "--concurrency", 2, "--timeout", 20, api=api)
    assert (
        len(late) == 1
        and len(result.pairs) == 12
        and result.pairs[1]["prompt"] == PROMPTS[1]["prompt"]
    )


def test_as_many_calls_are_in_flight_as_were_asked_for(rlhf):
    """curator, told nothing by the server, kept 2 in flight; alpaca_eval went five at a time."""
    with Api(demo_world, latency=0.4) as api:
        prompts = [{"prompt": f"Question {n}?"} for n in range(60)]
        rlhf(prompts, *MODELS, "--judge-model", "none", "--concurrency", 20, api=api)
        assert 30 <= api.peak <= 2 * 20


def test_nothing_is_reported_to_anybody(tmp_path):
    """Some tools send telemetry: here an offline run opens no connection and looks up no name."""
    code = f"""if True:
        import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import rlhf_constructor as rc
        def watch(event, args):
            assert event not in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"), event
        sys.addaudithook(watch); sys.exit(rc.main(sys.argv[1:]))"""
    flags = [
        "--provider",
        "offline",
        "--input-file",
        DATA / "alpaca_demo.jsonl",
        "--output-path",
        tmp_path / "o.jsonl",
    ]
    subprocess.run(
        [sys.executable, "-c", code, *map(str, flags)], check=True, capture_output=True, timeout=30
    )
