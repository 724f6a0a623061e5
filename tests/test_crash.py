"""Killed at any moment, out of disk, out of permission: nothing is lost, nothing is wrong, one clear line."""

import gc
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

import rlhf_constructor as rc
from tests.conftest import ROOT, rows, write_jsonl
from tests.server import Api, demo_world, is_judge

MODELS = ("--provider", "openai", "--high-model", "gpt-4o", "--low-model", "gpt-4o-mini")
PROMPTS = [{"prompt": f"Question {n}: which way is best?"} for n in range(90)]
WORKERS = 4
pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX processes and file systems")


def world(call):
    """The demo world, where some prompts get one answer from both models, and are dropped."""
    return "That depends." if not is_judge(call) and "7:" in call.prompt else demo_world(call)


def flags_for(folder):
    """A run whose files all stand in this folder, its cache beside it."""
    written = {
        "--output-path": "a.jsonl",
        "--candidates-path": "c.jsonl",
        "--cache-path": "cache/c.sqlite",
    }
    flags = ["--input-file", "in.jsonl", *MODELS, "--concurrency", WORKERS, "--test-fraction", 0.3]
    for flag, name in written.items():
        flags += [flag, f"{folder}/{name}"]
    return flags


# --- kills. A process that has read its imports waits for commands and runs each in a fork: one process for each
# kill, without the second that the SDKs take to load. With `at` it kills itself just before the n-th time that a
# file is opened to write, renamed or removed; without, the test does, when it has counted enough calls.

WARM = f"""if True:
    import json, os, signal, sys
    sys.path.insert(0, {str(ROOT)!r})
    import aiohttp, dashscope, openai, rlhf_constructor as rc
    def die_at(event, args):
        writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wa"
        if (writes and str(args[0]).endswith((".part", "l", "n"))) or event in ("os.rename", "os.remove"):
            global at
            at -= 1
            if at == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    for line in sys.stdin:
        flags, at = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stdout = open(os.devnull, "w")
            if at:
                sys.addaudithook(die_at)
            os._exit(rc.main(flags))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)"""


@pytest.fixture
def runs(tmp_path):
    """runs(api) -> start(*flags, at=0) -> (its id, a function that waits for its end: the exit status)."""
    started = []

    def warm(api):
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        parent = subprocess.Popen([sys.executable, "-c", WARM], cwd=tmp_path, env=api.env(), **pipe)
        started.append(parent)

        def start(*flags, at=0):
            parent.stdin.write(json.dumps([[*map(str, flags)], at]) + "\n")
            parent.stdin.flush()
            return int(parent.stdout.readline()), lambda: int(parent.stdout.readline())

        return start

    yield warm
    for parent in started:
        parent.communicate()


def kept(folder):
    """Every JSONL file that a run left, byte by byte."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name.endswith("jsonl")
    }


def test_killed_at_fifty_moments_it_comes_to_the_same_bytes(runs, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    moments, killed, flags = random.Random(7), 0, flags_for("killed")
    with Api(world, latency=0.01) as api:
        start = runs(api)
        assert start(*flags_for("whole"))[1]() == 0
        paid = api.count()
        for _ in range(40):  # while answers are made and judged, and between
            before, (child, end) = api.count(), start(*flags)
            until, patience = before + moments.randint(0, 5), time.monotonic() + 5
            while api.count() < until and time.monotonic() < patience:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            killed += end() == -signal.SIGKILL
        assert api.count() < 2 * paid, "the kills came too late to hit a call"
        for at in range(1, 11):  # while files are opened, renamed and removed
            killed += start(*flags, at=at)[1]() == -signal.SIGKILL
        assert start(*flags)[1]() == 0
        twice, calls = api.count() - 2 * paid, api.count()
        assert start(*flags)[1]() == 0 and api.count() == calls
    print(f"{killed} kills, {twice} of {paid} calls paid twice")
    assert killed == 50 and 0 <= twice <= 40 * 2 * WORKERS
    assert (
        kept(tmp_path / "killed") == kept(tmp_path / "whole") and len(kept(tmp_path / "whole")) == 4
    )
    assert not list((tmp_path / "killed").glob("*.part")) and not list(
        (tmp_path / "killed").glob("*.bak")
    )
    assert json.loads((tmp_path / "killed/a.report.json").read_text("utf-8"))
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_a_former_output_outlives_a_kill_at_every_rename(runs, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", PROMPTS[:10])
    output, former, killed = tmp_path / "out/a.jsonl", b'{"prompt": "of a former run"}\n', 0
    with Api(world) as api:
        start = runs(api)
        assert start(*flags_for("out"))[1]() == 0
        for at in range(1, 12):
            output.write_bytes(former)
            (tmp_path / "out/a.jsonl.bak").unlink(missing_ok=True)
            killed += start(*flags_for("out"), at=at)[1]() == -signal.SIGKILL
            assert former in [path.read_bytes() for path in output.parent.glob("a.jsonl*")], at
        assert killed == 11 and start(*flags_for("out"))[1]() == 0
    assert all(pair["prompt"] in str(PROMPTS) for pair in rows(output))


# --- no room, no permission


@contextmanager
def small_disk(folder, size="300k"):
    """A file system of so many bytes at `folder` -> remount(option); skips where none can be mounted."""
    folder.mkdir()
    mount = lambda *flags: subprocess.run(
        ["mount", "-t", "tmpfs", *flags, "small", folder], capture_output=True
    )
    if not shutil.which("mount") or mount("-o", f"size={size}").returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield lambda option: mount("-o", f"remount,{option}")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def one_line(result, status, says):
    """The run ended so, and said why in one line of its own."""
    said = [line for line in result.err.splitlines() if line.startswith("rlhf_constructor.py: ")]
    return (
        result.status == status
        and len(said) == 1
        and says in said[0]
        and "Traceback" not in result.err
    )


LONG = [
    {"prompt": f"{record['prompt']} {'It matters to us a great deal. ' * 50}"} for record in PROMPTS
]
BESIDE = ("--cache-path", "cache.sqlite")


@pytest.mark.parametrize(
    "where, flags",
    [("disk/o.jsonl", BESIDE), ("o.jsonl", (*BESIDE, "--candidates-path", "disk/c.jsonl")),
     ("o.jsonl", (*BESIDE, "--review-path", "disk/r.html", "--report-path", "disk/r.html.html")),
     ("o.jsonl", ("--cache-path", "disk/cache.sqlite"))],
    ids=["output", "candidates", "pages", "cache"],
)  # fmt: skip
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(rlhf, tmp_path, where, flags):
    with Api(world) as api, small_disk(tmp_path / "disk", "100k") as remount:
        whole = rlhf(LONG, *MODELS, "--cache-path", "other.sqlite", api=api, output="whole.jsonl")
        paid = api.count()
        full = rlhf(LONG, *MODELS, *flags, api=api, output=where)
        assert one_line(full, 3, "stopped: "), full.err
        assert full.output.exists() == ("disk/r.html" in flags), "a part of it has its name"
        gc.collect()  # as the end of the process does: close what a failed flush has left open
        remount("size=10m")
        done = rlhf(LONG, *MODELS, *flags, api=api, output=where)
        assert (done.status, done.output.read_bytes()) == (0, whole.output.read_bytes()), done.err
        assert done.dropped == whole.dropped and len(whole.pairs) + len(whole.dropped) == len(LONG)
        lost = api.count() - 2 * paid
        assert 0 <= lost <= ("disk/cache.sqlite" in flags) * 2 * 16, (
            "what could not be stored, at most"
        )


def test_a_read_only_folder_is_refused_before_anything_is_called(rlhf, tmp_path):
    with Api(world) as api, small_disk(tmp_path / "disk") as remount:
        assert rlhf(PROMPTS[:3], *MODELS, api=api, output="disk/o.jsonl").status == 0
        paid, before = api.count(), kept(tmp_path / "disk")
        remount("ro")
        for flags in (("--cache-path", "disk/c.sqlite"), ("--review-path", "disk/r.html"), ()):
            result = rlhf(
                PROMPTS, *MODELS, *flags, api=api, output="o.jsonl" if flags else "disk/o.jsonl"
            )
            assert one_line(result, 2, "cannot be written to"), result.err
        assert api.count() == paid and kept(tmp_path / "disk") == before


# --- the cache


def damaged(path, how):
    """A cache that some run has filled, and what became of it."""
    data = path.read_bytes()
    if how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "random bytes":
        path.write_bytes(random.Random(1).randbytes(len(data)))
    elif how == "zeros in its middle":
        path.write_bytes(data[:4096] + bytes(len(data) - 8192) + data[-4096:])
    elif how == "its head spoilt":
        path.write_bytes(random.Random(1).randbytes(100) + data[100:])
    else:
        with sqlite3.connect(path) as db:
            db.execute({"fewer columns": "ALTER TABLE replies DROP COLUMN rate",
                        "another table": "ALTER TABLE replies RENAME TO answers",
                        "more columns": "ALTER TABLE replies ADD COLUMN day"}[how])  # fmt: skip


DAMAGES = ("cut short", "random bytes", "zeros in its middle", "its head spoilt")
VERSIONS = ("fewer columns", "more columns", "another table")


@pytest.mark.parametrize("how", DAMAGES + VERSIONS)
def test_a_cache_that_cannot_be_used_is_named_in_one_line_and_left_as_it_is(rlhf, tmp_path, how):
    cache = tmp_path / "c.sqlite"
    with Api(world) as api:
        run = lambda name, records=PROMPTS: rlhf(records, *MODELS, "--cache-path", name, api=api)
        whole = run("c.sqlite").output.read_bytes()
        damaged(cache, how)
        paid, before = api.count(), cache.read_bytes()
        result = run("c.sqlite", [*PROMPTS, {"prompt": "One more?"}])
        if how in (
            "more columns",
            "another table",
        ):  # there is room for ours beside what we do not know
            assert result.status == 0 and result.output.read_bytes().startswith(whole)
            assert api.count() == (paid + 4 if how == "more columns" else 2 * paid + 4)
        else:
            assert result.status in (2, 3) and one_line(result, result.status, "c.sqlite"), (
                result.err
            )
            assert api.count() <= paid + 1 and cache.read_bytes()[:4096] == before[:4096]
            assert (tmp_path / "out.jsonl").read_bytes() == whole, "the former output is as it was"
            assert run("new.sqlite").output.read_bytes() == whole


def test_a_cache_that_another_process_holds_is_named_in_one_line(rlhf, tmp_path, monkeypatch):
    monkeypatch.setattr(rc, "CACHE_PATIENCE", 0.2)
    with Api(world) as api:
        whole = rlhf(PROMPTS[:5], *MODELS, "--cache-path", "c.sqlite", api=api).output.read_bytes()
        holder = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None)
        holder.execute("PRAGMA locking_mode=EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        paid = api.count()
        result = rlhf(PROMPTS, *MODELS, "--cache-path", "c.sqlite", api=api)
        assert result.status in (2, 3) and one_line(result, result.status, "c.sqlite"), result.err
        assert "is locked: in use elsewhere" in result.err and api.count() == paid
        holder.execute("ROLLBACK")
        holder.close()
        assert (
            rlhf(PROMPTS[:5], *MODELS, "--cache-path", "c.sqlite", api=api).output.read_bytes()
            == whole
        )
        assert api.count() == paid


def test_a_cache_that_gets_locked_in_the_middle_stops_the_run_and_the_next_goes_on(
    rlhf, tmp_path, monkeypatch
):
    monkeypatch.setattr(rc, "CACHE_PATIENCE", 0.2)
    holders = []

    def answer(call):
        if api.count() == 60:
            holders.append(
                sqlite3.connect(
                    tmp_path / "c.sqlite", isolation_level=None, check_same_thread=False
                )
            )
            holders[0].execute("BEGIN IMMEDIATE")
        return world(call)

    with Api(answer, latency=0.01) as api:
        result = rlhf(
            PROMPTS, *MODELS, "--cache-path", "c.sqlite", "--concurrency", WORKERS, api=api
        )
        assert one_line(result, 3, "c.sqlite: the cache cannot be used (database is locked)"), (
            result.err
        )
        lost = api.count() - holders[0].execute("SELECT count(*) FROM replies").fetchone()[0]
        holders[0].close()
        done = rlhf(PROMPTS, *MODELS, "--cache-path", "c.sqlite", api=api)
        assert done.status == 0 and len(done.pairs) + len(done.dropped) == len(PROMPTS)
    assert lost <= 2 * WORKERS and not result.output.with_name("out.jsonl.part").exists()
