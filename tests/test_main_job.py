"""The main job: the lesson's commands, labels under a noisy judge, and what survives a kill."""

import random
import re
import shutil
import signal
import statistics
import time
from statistics import NormalDist

import pytest

import rlhf_constructor as rc
from tests.conftest import DATA, rows, write_jsonl
from tests.server import Api, demo_world, is_judge, judge_reply

LESSON = [
    ("dashscope", "qwen-max", "qwen-plus", "alpaca_demo.jsonl"),
    ("dashscope", "qwen-max", "qwen-turbo", "fewshot_sentiment.jsonl"),
    ("openai", "gpt-4o", "gpt-4o-mini", "self_instruct.jsonl"),
]


def lesson(provider, high, low, *more):
    return [
        "--method",
        "model_comparison",
        "--provider",
        provider,
        "--high-model",
        high,
        "--low-model",
        low,
        *more,
    ]


@pytest.mark.parametrize("provider, high, low, name", LESSON)
def test_the_lessons_commands_work_as_written(process, tmp_path, provider, high, low, name):
    shutil.copytree(DATA, tmp_path / "data")
    flags = [
        "--input-file",
        f"data/{name}",
        *lesson(provider, high, low, "--output-path", "data/rlhf.jsonl"),
    ]
    with Api(demo_world) as api:
        run = process(*flags, api=api)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    pairs, dropped = rows(tmp_path / "data/rlhf.jsonl"), rows(tmp_path / "data/rlhf.dropped.jsonl")
    records = int(re.search(r"Read (\d+) records", out)[1])
    assert records == len(pairs) + len(dropped) and len(pairs) > records / 2
    assert {(pair["chosen_model"], pair["rejected_model"]) for pair in pairs} == {(high, low)}


@pytest.mark.parametrize(
    "name", sorted(path.name for path in DATA.iterdir() if "rlhf" not in path.name)
)
def test_every_data_file_runs_without_a_key(rlhf, name):
    ranked = name in ("ranked_answers.jsonl", "preference_pairs.jsonl")
    judged = ("--method", "rank_responses") if ranked else ("--provider", "offline")
    result = rlhf(DATA / name, *judged)
    if name == "questions.csv":
        assert result.status == 2 and "no record has an answer" in result.err
    else:
        assert result.status == 0 and len(result.pairs) > 15


# --- a world with a hidden truth: quality 1 to 10 stands in the answer, and only the judge can read it


def noisy_world(gap, seed=1, still=False):
    """Models whose quality differs by `gap`, sd 1.5 each; a judge with sd 1 of error and +0.8 for what is first.

    `still`: the same request gets the same reply."""

    def answer(call):
        luck = random.Random(
            f"{seed} {call.model} {call.prompt} {call.params.get('temperature')} {0 if still else call.time}"
        )
        if is_judge(call):
            return judge_reply(
                call, lambda text, slot: truth(text) + luck.gauss(0, 1) + 0.8 * (slot == 0)
            )
        quality = luck.gauss(5 + gap * ("strong" in call.model), 1.5)
        noise = " ".join(
            luck.choices("amber basil cedar delta ember flint grove haven iris jade".split(), k=30)
        )
        return f"{noise} quality={quality:.3f}"

    return answer


def truth(text):
    return float(re.search(r"quality=(-?[\d.]+)", text)[1])


def wrong_share(pairs):
    return statistics.fmean(truth(pair["chosen"]) <= truth(pair["rejected"]) for pair in pairs)


PROMPTS = [{"prompt": f"Question number {n}: what is best?"} for n in range(1000)]
MODELS = (
    "--provider",
    "openai",
    "--high-model",
    "strong",
    "--low-model",
    "weak",
    "--concurrency",
    64,
)


QUICK = ("--provider", "dashscope", *MODELS[2:])  # the quicker of the two SDKs


def test_a_noisy_judge_leaves_few_wrong_pairs(rlhf):
    with Api(noisy_world(1.5, still=True)) as api:
        trusting = rlhf(PROMPTS, *QUICK, "--judge-model", "none", api=api, output="t.jsonl").pairs
        judged = rlhf(PROMPTS, *QUICK, api=api).pairs
    print(
        f"no judge: {wrong_share(trusting):.1%} wrong; judged: {wrong_share(judged):.1%} of {len(judged)}"
    )
    assert wrong_share(trusting) > 0.20
    assert wrong_share(judged) <= 0.025 and len(judged) >= 400


def test_the_best_and_the_worst_of_four_are_hardly_ever_confused(rlhf):
    with Api(noisy_world(1.5, still=True)) as api:
        pairs = rlhf(PROMPTS, *QUICK, "--method", "generate_pairs", api=api).pairs
        assert sum(map(is_judge, api.calls)) == 2 * 1000
    print(f"{wrong_share(pairs):.1%} wrong of {len(pairs)}")
    assert wrong_share(pairs) <= 0.015 and len(pairs) >= 750


def labelled(count, flipped, seed=5):
    """Pairs of the noisy world, of which this share is labelled the wrong way round."""
    draw = random.Random(seed)
    pairs = []
    for n in range(count):
        worse, better = sorted(
            (f"Option {draw.random()} quality={draw.gauss(mean, 1.5):.3f}" for mean in (5, 6.5)),
            key=truth,
        )
        if draw.random() < flipped:
            worse, better = better, worse
        pairs.append({"prompt": f"Question number {n}?", "chosen": better, "rejected": worse})
    return pairs


def true_agreement(records):
    """How often this judge agrees where both its votes go one way, by the law of the noisy world."""
    agrees = disagrees = 0
    for record in records:
        lead = truth(record["chosen"]) - truth(record["rejected"])
        first, second = (NormalDist(lead + bias, 2**0.5).cdf(0) for bias in (0.8, -0.8))
        agrees += (1 - first) * (1 - second)
        disagrees += first * second
    return agrees / (agrees + disagrees)


def test_a_judge_cleans_labels_and_its_agreement_is_measured(rlhf, monkeypatch):
    records, checks, process = labelled(1000, flipped=0.2), [], rc.process_line

    async def noted(line, record, run):
        outcome = await process(line, record, run)
        checks.extend(record.label_checks)
        return outcome

    monkeypatch.setattr(rc, "process_line", noted)
    flags = ("--method", "rank_responses", "--judge-model", "dashscope:strong", "--concurrency", 64)
    with Api(noisy_world(1.5, still=True)) as api:
        kept = rlhf(records, *flags, api=api).pairs
    assert 0.15 < wrong_share(records) < 0.25
    decided = [check == "agrees" for check in checks if check != "undecided"]
    agreement = rc.share(sum(decided), len(decided))
    print(
        f"{wrong_share(records):.1%} wrong labels; kept {len(kept)}: {wrong_share(kept):.1%} wrong; {agreement}"
    )
    assert wrong_share(kept) <= 0.04 and len(kept) >= 450
    assert len(checks) == 1000
    low, high = agreement.interval
    assert low <= true_agreement(records) <= high


# --- pairs that look alike and are not: the right answer wins from either slot, and no filter throws it away

LONG_SUM = "We add the parts one by one: 17 + 25 = 42, then 42 + 58 = 100, and half of 100 is 50. The answer is {}."
CODE = (
    "```python\ndef last(items):\n    if not items:\n        return None\n    return items[{}]\n```"
)
ALIKE = {
    "one word": ("Label the sentiment: great film!", "positive", "negative"),
    "one Chinese word": ("判断情感：这部电影太好看了！", "正面", "负面"),
    "a sign": ("Solve x + 50 = 8 for x.", "-42", "42"),
    "a digit": ("What is 6 times 7?", "42", "43"),
    "one digit of a derivation": ("Add 17, 25, 58 and halve it.", LONG_SUM.format(50), LONG_SUM.format(60)),
    "one Chinese digit": ("小明有三十个苹果，吃掉一半还剩多少？请写出过程。",
                          "先算一半：三十除以二等于十五。所以小明还剩十五个苹果，答案是十五。",
                          "先算一半：三十除以二等于十五。所以小明还剩十六个苹果，答案是十六。"),
    "one token of code": ("Write last(items).", CODE.format("-1"), CODE.format("1")),
    "a comparison": ("Which holds for x=3, y=2?", "x > y", "x < y"),
}  # fmt: skip


@pytest.mark.parametrize("reference", [True, False], ids=["with reference", "without"])
@pytest.mark.parametrize("prompt, right, wrong", ALIKE.values(), ids=ALIKE)
def test_the_right_answer_wins_from_either_slot(rlhf, prompt, right, wrong, reference):
    positions = set()

    def answer(call):
        if is_judge(call):
            return judge_reply(
                call,
                lambda text, slot: (
                    positions.add((text == right, slot)) or (9 if text == right else 2)
                ),
            )
        return right if call.model == "strong" else wrong

    record = {"prompt": prompt} | ({"output": f"Reference: {right}"} if reference else {})
    with Api(answer) as api:
        result = rlhf([record], *MODELS, api=api)
        [turned] = rlhf([record], *MODELS[:2], "--high-model", "weak", "--low-model", "strong",
                        "--when-low-wins", "flip", api=api).pairs  # fmt: skip
        assert all(
            ("<reference" in call.prompt) == reference for call in api.calls if is_judge(call)
        )
    assert [(pair["chosen"], pair["rejected"]) for pair in result.pairs] == [(right, wrong)], (
        result.reasons
    )
    assert (turned["chosen"], turned["rejected"]) == (right, wrong)
    assert positions == {(True, 0), (True, 1), (False, 0), (False, 1)}


# --- the same command again


def test_the_same_command_again_makes_no_call_and_the_same_bytes(rlhf):
    with Api(demo_world) as api:
        first = rlhf(
            DATA / "alpaca_demo.jsonl", *MODELS, api=api, output="a.jsonl"
        ).output.read_bytes()
        calls = api.count()
        again = rlhf(
            DATA / "alpaca_demo.jsonl", *MODELS, api=api, output="a.jsonl"
        ).output.read_bytes()
        alone = rlhf(
            DATA / "alpaca_demo.jsonl", *MODELS, "--concurrency", 1, api=api, output="b.jsonl"
        ).output
        assert api.count() == calls and first == again == alone.read_bytes()


def test_one_worker_or_many_write_the_same_bytes_and_drops(rlhf):
    files = []
    with Api(noisy_world(0.5, still=True)) as api:
        for workers in (1, 32):
            flags = ("--concurrency", workers, "--cache-path", "none")
            result = rlhf(PROMPTS[:60], *MODELS[:6], *flags, api=api, output=f"{workers}.jsonl")
            files.append((result.output.read_bytes(), result.dropped))
    assert files[0] == files[1] and all(files[0])


def test_another_seed_asks_everybody_again(rlhf):
    with Api(demo_world) as api:
        rlhf(PROMPTS[:10], *MODELS, api=api)
        calls = api.count()
        rlhf(PROMPTS[:10], *MODELS, "--seed", 1, api=api)
        assert api.count() == 2 * calls


def test_an_inserted_record_pays_only_for_itself(rlhf):
    with Api(demo_world) as api:
        rlhf(PROMPTS[:20], *MODELS, api=api)
        calls = api.count()
        rlhf([{"prompt": "a new one"}, *PROMPTS[:20]], *MODELS, api=api)
        assert api.count() == calls + 4


@pytest.mark.parametrize(
    "flags, pays",
    [
        (("--min-score-gap", 3), False),
        (("--output-format", "conversational"), False),
        (("--when-low-wins", "flip"), False),
        (("--judge-orders", 1), False),
        (("--skip-filter", "near_duplicate"), False),
        (("--min-chosen-score", 5), False),
        (("--max-samples", 5), False),
        (("--system-prompt", "Be brief."), True),
        (("--temperature", 0.2), True),
        (("--low-model", "other"), True),
        (("--max-tokens", 100), True),
    ],
)
def test_only_what_changes_an_answer_is_paid_for_again(rlhf, flags, pays):
    with Api(demo_world) as api:
        rlhf(PROMPTS[:10], *MODELS, api=api)
        calls = api.count()
        rlhf(PROMPTS[:10], *MODELS, *flags, api=api)
        assert (api.count() > calls) == pays


def test_killed_at_any_moment_it_goes_on_to_the_same_file(process, tmp_path):
    source, workers = write_jsonl(tmp_path / "in.jsonl", PROMPTS[:100]), 4
    flags = [
        "--input-file",
        source,
        *lesson("openai", "gpt-4o", "gpt-4o-mini", "--concurrency", workers),
    ]
    with Api(demo_world, latency=0.02) as api:
        process(*flags, "--output-path", "whole/a.jsonl", api=api).communicate(timeout=60)
        whole, moments = api.count(), random.Random(7)
        for _ in range(4):
            run, before = process(*flags, "--output-path", "killed/a.jsonl", api=api), api.count()
            until = before + moments.randint(1, 100)
            while run.poll() is None and api.count() < until:
                time.sleep(0.005)
            run.send_signal(signal.SIGKILL)
            run.communicate()
        last = process(*flags, "--output-path", "killed/a.jsonl", api=api)
        last.communicate(timeout=60)
    assert last.returncode == 0
    assert (tmp_path / "killed/a.jsonl").read_bytes() == (tmp_path / "whole/a.jsonl").read_bytes()
    assert api.count() - whole <= whole + 4 * 2 * workers


def test_ctrl_c_lets_paid_calls_come_home(process, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", PROMPTS[:80])
    flags = ["--input-file", source, *lesson("openai", "gpt-4o", "gpt-4o-mini", "--concurrency", 4)]
    with Api(demo_world, latency=0.05) as api:
        run = process(*flags, "--output-path", "a.jsonl", api=api)
        while run.poll() is None and api.count() < 40:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=30)
        paid = api.count()
        again = process(*flags, "--output-path", "a.jsonl", api=api)
        again.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err and again.returncode == 0
    assert api.count() == 320 and paid < 320, "no call was paid twice"
