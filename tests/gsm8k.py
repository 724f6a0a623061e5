"""What each way of labelling gives on GSM8K, where every answer is known to be right or wrong.

Run by hand: `python tests/gsm8k.py FILE`, with OpenAI's example_model_solutions.jsonl
(github.com/openai/grade-school-math, MIT licence). It prints the table of the README.
The four models' published answers come over HTTP from the loopback server. The judge is simulated: it gives
a right answer 7.5 and a wrong one 4.5 points, with an error of 2 points (sd) in every score and 0.8 more for
the answer shown first, so it prefers the right answer in 85% of single comparisons.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.server import Api, is_judge, judge_reply

SCRIPT = Path(__file__).parent.parent / "rlhf_constructor.py"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def read_problems(path: str) -> list[dict]:
    """The rows of the published file."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def make_world(problems: list[dict]):
    """The function that answers each call, and the truth: (question, answer) -> right or wrong."""
    solutions, truth, by_text = {}, {}, {}
    for problem in problems:
        question = problem["question"].strip()
        for model in MODELS:
            text, right = problem[model]["solution"].strip(), problem[model]["is_correct"]
            solutions[question, model] = text
            truth[question, text] = right
            by_text[text] = right

    def answer(call):
        if not is_judge(call):
            return solutions[call.prompt.strip(), call.model]

        def score(text, position):
            luck = random.Random(f"{call.prompt} {position}")
            return (7.5 if by_text[text] else 4.5) + luck.gauss(0, 2) + 0.8 * (position == 0)

        return judge_reply(call, score)

    return answer, truth


def run(api: Api, folder: Path, *flags: str) -> list[dict]:
    """The pairs that the program makes of all problems."""
    output = folder / "pairs.jsonl"
    command = [sys.executable, str(SCRIPT), "--input-file", str(folder / "problems.jsonl"),
               "--provider", "openai", "--output-path", str(output), "--cache-path", "none",
               "--report-path", "none", "--concurrency", "64", *flags]  # fmt: skip
    subprocess.run(command, env=api.env(), check=False, capture_output=True)
    rows = output.read_text("utf-8").splitlines()
    os.remove(output)
    return [json.loads(row) for row in rows]


def count_labels(pairs: list[dict], truth: dict) -> Counter:
    """How many pairs are right, make no difference, or are wrong."""
    counts = Counter()
    for pair in pairs:
        question = pair["prompt"].strip()
        lead = truth[question, pair["chosen"]] - truth[question, pair["rejected"]]
        counts[("no difference", "right", "wrong")[lead]] += 1
    return counts


def main(path: str):
    problems = read_problems(path)
    answer, truth = make_world(problems)
    two_models = ("--high-model", "175b_verification", "--low-model", "6b_finetuning")
    alike = ("--high-model", "175b_finetuning", "--low-model", "6b_finetuning")
    four = ("--method", "generate_pairs", "--candidate-models", *MODELS)
    ways = {
        "strong model trusted (`--judge-model none`): 175B over 6B, both fine-tuned": (
            *alike,
            "--judge-model",
            "none",
        ),
        "the same, 175B with verification over 6B": (*two_models, "--judge-model", "none"),
        "`model_comparison` with a simulated judge": (*two_models, "--judge-model", "judge"),
        "`model_comparison` with `exact_match`": (*two_models, "--judge-model", "exact_match"),
        "`generate_pairs`, four candidates, simulated judge": (*four, "--judge-model", "judge"),
        "`generate_pairs`, four candidates, `exact_match`": (*four, "--judge-model", "exact_match"),
    }
    with tempfile.TemporaryDirectory() as folder, Api(answer) as api:
        folder = Path(folder)
        rows = [{"prompt": p["question"], "output": p["ground_truth"]} for p in problems]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "problems.jsonl").write_text(lines, "utf-8")
        for name, flags in ways.items():
            pairs = run(api, folder, *flags)
            counts = count_labels(pairs, truth)
            shares = [counts[kind] / len(pairs) for kind in ("right", "no difference", "wrong")]
            cells = [f"{len(pairs):,}", *(f"{share:.1%}" for share in shares)]
            print("|", " | ".join([name, *cells]), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
