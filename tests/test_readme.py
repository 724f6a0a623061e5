"""Every command in the README runs as it is written, and the output it shows is the real one."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

import rlhf_constructor as rc
from tests.conftest import DATA, ROOT, SCRIPT, rows, write_jsonl
from tests.server import Api, demo_world

README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
OURS = [line for line in COMMANDS if "python rlhf_constructor.py" in line]
METHOD = re.search(r"```python\n(@register.*?)```", README, re.S)[1]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a user downloads, with the README's own method added where it says."""
    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("rlhf_*", ".*"))
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    source = SCRIPT.read_text("utf-8")
    assert source.count("\ndef beats(") == 1
    pair = rows(DATA / "preference_pairs.jsonl")[0]
    name = rc.pair_id(*(pair[key] for key in ("prompt", "chosen", "rejected")))
    verdict = {
        "pair_id": name,
        "prompt_id": "",
        "choice": "rejected",
        "queue": "random",
        "note": "",
        "annotator": "Ann",
        "seconds": 3,
    }
    write_jsonl(tmp_path / "annotations-Ann.jsonl", [verdict])
    (tmp_path / SCRIPT.name).write_text(source.replace("\ndef beats(", f"\n{METHOD}\n\ndef beats("), "utf-8")
    return tmp_path


def run(line, folder, api, method=""):
    """Run a README line, with this interpreter for `python` and the loopback server for every address."""
    line = line.split("&& ")[-1].replace("http://localhost:11434/v1", api.openai_url)
    words = shlex.split(line, comments=True)
    assert words[0].endswith("python")
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=api.env(), capture_output=True, text=True
    )


def test_every_line_of_a_command_block_is_a_known_kind():
    known = ("python rlhf_constructor.py", "export ", "python3 -m venv")
    assert all(line.startswith(known) for line in COMMANDS) and len(OURS) >= 10


@pytest.mark.parametrize(
    "line", OURS, ids=[re.sub(r"^.*rlhf_constructor.py ", "", line)[:60] for line in OURS]
)
def test_a_command_runs(checkout, line):
    with Api(demo_world) as api:
        if "--annotations" in line:  # it goes on from the command before
            run(OURS[OURS.index(line) - 1], checkout, api)
        done = run(line, checkout, api)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_the_first_output_is_the_real_one(checkout):
    shown = re.search(r"<!-- output of: try -->\n```\n(.*?)```", README, re.S)[1]
    with Api(demo_world) as api:
        assert run(OURS[0], checkout, api).stdout == shown


def test_every_flag_in_the_readme_exists():
    flags = {flag for action in rc.build_parser()._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= flags
