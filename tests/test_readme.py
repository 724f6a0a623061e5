"""Every command in the README runs as it is written, and what it shows is what comes out."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

import rlhf_constructor as rc
from tests.conftest import DATA, ROOT, SCRIPT, rows, write_jsonl
from tests.server import Api, demo_world, is_judge, judge_reply
from tests.server import shown as shown_answers

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"(?:<!-- (\w+) -->\n)?```bash\n(.*?)```", README, re.S)
NAMED = {name: block for name, block in BLOCKS if name}
OURS = [block for _, block in BLOCKS if re.search(r"python3? rlhf_constructor.py", block)]
METHOD = re.search(r"```python\n(@register.*?)```", README, re.S)[1]
FLAGS = {flag for action in rc.build_parser()._actions for flag in action.option_strings}
SET_UP = re.compile(r"python3 -m venv .*? && \.venv/bin/(?=python rlhf)")
ADDRESS = re.compile(r"http://(?:localhost|10\.0\.0\.\d+):\d+")

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")


@pytest.fixture(scope="module")
def first_pairs(tmp_path_factory):
    """What the README's first command leaves for those that go on from it."""
    folder = tmp_path_factory.mktemp("first")
    flags = ["--provider", "offline", "--input-file", str(DATA / "alpaca_demo.jsonl")]
    assert rc.main([*flags, "--output-path", str(folder / "rlhf_preference.jsonl")]) == 0
    ranked = ["--method", "rank_responses", "--input-file", str(DATA / "preference_pairs.jsonl")]
    assert rc.main([*ranked, "--output-path", str(folder / "rlhf_pairs.jsonl")]) == 0
    return folder / "rlhf_preference.jsonl"


@pytest.fixture
def checkout(tmp_path, first_pairs):
    """A copy of what a user downloads and has by then, with the README's own method where it says."""
    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("rlhf_*", ".*"))
    shutil.copy(first_pairs, tmp_path / "data")
    shutil.copy(first_pairs.with_name("rlhf_pairs.jsonl"), tmp_path / "data")
    source = SCRIPT.read_text("utf-8")
    assert source.count("\ndef wins_every_vote(") == 1
    pair = rows(DATA / "preference_pairs.jsonl")[0]
    name = rc.pair_id(*(pair[key] for key in ("prompt", "chosen", "rejected")))
    verdict = {"pair_id": name, "prompt_id": "", "choice": "rejected", "queue": "random", "note": "",
               "annotator": "Ann", "seconds": 3}  # fmt: skip
    write_jsonl(tmp_path / "annotations-Ann.jsonl", [verdict])
    (tmp_path / SCRIPT.name).write_text(
        source.replace("\ndef wins_every_vote(", f"\n{METHOD}\n\ndef wins_every_vote("), "utf-8"
    )
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        python = tmp_path / "bin" / name
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    return tmp_path


SENTIMENTS = {row["instruction"]: row["output"] for row in rows(DATA / "fewshot_sentiment.jsonl")}
PREFERRED = {row["chosen"] for row in rows(DATA / "preference_pairs.jsonl")}


def world(call):
    """demo_world, but answers vary with the temperature, labels are right or wrong by it, a reward model
    sees one answer, and a judge agrees with the labels of data/preference_pairs.jsonl."""
    if call.protocol == "reward":
        return demo_world(replace(call, messages=call.messages[-1:]))
    if is_judge(call):
        right = [label for prompt, label in SENTIMENTS.items() if prompt in call.prompt]
        better = PREFERRED | set(right[:1])
        if any(text in better for _, text in shown_answers(call)):
            return judge_reply(call, lambda text, position: 9 if text in better else 3)
        return demo_world(call)
    temperature = call.params.get("temperature")
    label = SENTIMENTS.get(call.prompt)
    if label and call.messages[0]["role"] == "user":
        other = {"正面": "负面", "positive": "negative"}
        return (
            label
            if "max" in call.model
            else other.get(label, "positive" if label.isascii() else "正面")
        )
    return demo_world(replace(call, model=f"{call.model} at {temperature}"))


def run(block, folder, api):
    """Run a README block, with this interpreter for `python` and the loopback server for every address."""
    block = re.sub("(?m)^export .*$", "", ADDRESS.sub(api.url, SET_UP.sub("", block)))
    env = api.env()
    env |= {"PATH": f"{folder / 'bin'}:{env['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", block]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def shown(kind, name):
    """The text of the README's block under `<!-- KIND: NAME -->`."""
    return re.search(rf"<!-- {kind}: {re.escape(name)} -->\n```\w*\n(.*?)```", README, re.S)[1]


def title(block):
    return re.sub(
        r"^.*rlhf_constructor.py ", "", next(x for x in block.splitlines() if "rlhf_" in x)
    )[:60]


def test_every_line_of_a_command_block_is_a_known_kind():
    known = ("python", "export ", "echo ", "cat ", "# ")
    lines = [line for _, block in BLOCKS for line in re.sub(r"\\\n *", "", block).splitlines()]
    assert all(line.lstrip().startswith(known) for line in lines)
    assert sum("rlhf_constructor.py" in line for line in lines) >= 25


@pytest.mark.parametrize("block", OURS, ids=map(title, OURS))
def test_the_commands_run(checkout, block):
    with Api(world) as api:
        done = run(block, checkout, api)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert block == NAMED["plan"] or any((checkout / "data").glob("rlhf_*")), "it left a file"


@pytest.mark.parametrize("name", re.findall(r"<!-- output of: (\w+) -->", README))
def test_the_output_shown_is_the_real_one(checkout, name):
    with Api(world) as api:
        assert run(NAMED[name], checkout, api).stdout == shown("output of", name)


ARRAY = """
split -n l/4 data/alpaca_demo.jsonl data/rlhf_part-
for part in data/rlhf_part-??; do
  python rlhf_constructor.py --input-file $part --cache-path data/rlhf_shared.sqlite \\
    --output-path data/rlhf_out/$(basename $part).jsonl &
done
wait
cat data/rlhf_out/rlhf_part-??.jsonl > data/rlhf_joined.jsonl
"""


def test_the_job_array_joins_to_the_bytes_of_one_run(checkout):
    with Api(world) as api:
        assert run(ARRAY, checkout, api).returncode == 0
        paid = api.count()
        one = re.search(r"python rlhf_constructor.py[^&]*", ARRAY)[0]
        whole = one.replace("$(basename $part)", "whole").replace("$part", "data/alpaca_demo.jsonl")
        assert run(whole, checkout, api).returncode == 0 and api.count() == paid
    joined = (checkout / "data" / "rlhf_joined.jsonl").read_bytes()
    assert joined and joined == (checkout / "data" / "rlhf_out" / "whole.jsonl").read_bytes()


def test_the_row_shown_is_in_the_file():
    number, path = re.search(r"<!-- line (\d+) of: (\S+) -->", README).groups()
    line = (ROOT / path).read_text("utf-8").splitlines()[int(number) - 1]
    assert shown(f"line {number} of", path) == line + "\n"


def test_every_flag_in_the_readme_exists_and_every_flag_is_in_the_readme():
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named <= FLAGS and FLAGS - named <= {"-h", "--help"} and "`--help`" in README


def test_every_link_inside_the_page_and_every_picture_leads_somewhere():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    slug = lambda head: re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
    heads = {slug(head) for head in re.findall(r"^#+ (.*)$", prose, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= heads
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 3 and all((ROOT / path).stat().st_size < 200_000 for path in pictures)


def test_every_output_format_method_and_strategy_is_named():
    for name in (*rc.OUTPUTS, *rc.METHODS):
        assert f"`{name}`" in README, name


def test_the_tokens_per_prompt_follow_from_the_judges_prompt():
    prompt, answer, reply = 100, 400, 120
    assert {"answer": answer, "judge": reply} == rc.GUESSED_TOKENS
    nothing = rc.Record([{"role": "user", "content": ""}])
    rubric = rc.default_rubric()
    judge_prompt, _ = rc.judge_prompt(nothing, ["", ""], rubric=rubric, reference="", seed=(0,))
    instructions = 410
    assert abs(len(judge_prompt) / 4 - instructions) < 0.1 * instructions
    for count in (2, 4):
        tokens_in = count * prompt + 2 * (instructions + prompt + count * answer)
        assert f"{tokens_in:,} tokens in and {count * answer + 2 * reply:,}" in README


def test_the_default_models_are_named():
    for provider in ("dashscope", "openai"):
        high, low = rc.DEFAULT_MODELS[provider]
        assert (
            f"`{high}` and `{low}`" in README and f"--high-model {high} --low-model {low}" in README
        )


def test_calls_per_pair_are_what_this_tool_asks():
    table = re.findall(r"^\| (\d) \| \d+ % \| (\d+) % \| ([\d.]+) \|$", README, re.M)
    assert [n for n, _, _ in table] == ["2", "4", "8"]
    assert all(f"{(int(n) + 2) / int(share) * 100:.1f}" == calls for n, share, calls in table)


def test_the_gaps_of_signals_and_the_size_of_a_review_are_the_scripts():
    least = {name: f"{rc.SCORE_GAP_SHARE * scale:g}" for name, (_, scale) in rc.SIGNALS.items()}
    assert (
        least["rating"] == least["fine-grained_score"] and least["overall_score"] == least["votes"]
    )
    leads = [f"{rc.SCORE_GAP_SHARE * scale:g}" for _, _, scale in rc.LEADS.values()]
    said = README.partition("How much better is enough?")[2].partition("\n\n")[0]
    assert all(number in said for number in (least["rating"], least["votes"], *leads))
    assert f"at most {rc.REVIEW_SAMPLE} pairs" in README
