"""Fixtures: the real program, run in this process or in one of its own, against the loopback server."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import rlhf_constructor as rc

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
SCRIPT = ROOT / "rlhf_constructor.py"


def pytest_xdist_auto_num_workers(config) -> int:
    """One worker more than cores: some tests wait for retries, browsers and killed processes."""
    return (os.cpu_count() or 1) + 1


@dataclass
class Result:
    """What a run left: exit status, both streams, rows written, rows dropped."""

    status: int
    out: str
    err: str
    output: Path

    @property
    def pairs(self) -> list[dict]:
        return rows(self.output)

    @property
    def dropped(self) -> list[dict]:
        return rows(self.output.with_name(self.output.name.replace(".jsonl", ".dropped.jsonl")))

    @property
    def reasons(self) -> list[str]:
        return [f"{row['stage']}: {row['reason']}" for row in self.dropped]


def rows(path: Path) -> list[dict]:
    """The rows of a JSONL file, none if there is no file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def write_jsonl(path: Path, records) -> Path:
    """Records -> file."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


@pytest.fixture
def rlhf(tmp_path, monkeypatch, capsys):
    """rlhf(records or path, *flags, api=None) runs the program in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(source, *flags, api=None, output="out.jsonl", **env) -> Result:
        if not isinstance(source, str | Path):
            source = write_jsonl(tmp_path / "in.jsonl", source)
        for name in (
            "OPENAI_API_KEY",
            "OPENAI_BASE_URL",
            "DASHSCOPE_API_KEY",
            "DASHSCOPE_HTTP_BASE_URL",
        ):
            monkeypatch.delenv(name, raising=False)
        for name, value in ((api.env() if api else {}) | env).items():
            monkeypatch.setenv(name, value)
        status = rc.main(["--input-file", str(source), "--output-path", output, *map(str, flags)])
        streams = capsys.readouterr()
        return Result(status, streams.out, streams.err, tmp_path / output)

    return run


@pytest.fixture
def process(tmp_path):
    """process(*flags, api=None) starts the program as a process of its own."""

    def start(*flags, api=None, **env) -> subprocess.Popen:
        env = {**(api.env() if api else os.environ), **env}
        command = [sys.executable, str(SCRIPT), *map(str, flags)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True)

    return start
