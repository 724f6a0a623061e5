"""Speed and memory as ratios from one run: `python tests/bench.py` (ten minutes; a quiet machine of two cores).

Each figure stands beside something outside the script, measured a moment before or after it: the bare SDK, the
allowed rate, `json` alone, `python -c pass`. Everything is whole process against whole process, and the loopback
server is a process of its own. `--only PART` (repeatable) measures a part, `--quick` tries all with small sizes."""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT, BARE, SERVER = (
    ROOT / "rlhf_constructor.py",
    ROOT / "tests" / "bare.py",
    ROOT / "tests" / "server.py",
)
LATENCY = 0.2  # seconds the server takes for an answer
REPEATS = {16: 1, 64: 2, 256: 5}  # by calls in flight: short runs are the noisy ones
API = {"openai": "/v1", "dashscope": "/api/v1"}  # where the server speaks a provider's protocol
PARTS = {}


@dataclass
class Row:
    """One line of the table: a value, how it is written, and the limit it has to keep, if there is one."""

    what: str
    value: float
    form: str = "{:.2f} x"
    most: float | None = None
    least: float | None = None

    def cells(self) -> tuple[str, str, str, str]:
        low, high = self.least is not None, self.most is not None
        required = (
            "at least " * low + "at most " * high + self.form.format(self.least or self.most or 0)
        )
        kept = (not low or self.value >= self.least) and (not high or self.value <= self.most)
        verdict = ("ok" if kept else "MISSED") if low or high else ""
        return self.what, self.form.format(self.value), required if verdict else "", verdict


def part(function):
    """Enter a part of the bench; it is called with (quick, a folder of its own) and yields rows."""
    PARTS[function.__name__.replace("_", "-")] = function
    return function


# ------------------------------------------------------------------------------------------- the parts


@part
def start_up(quick: bool, folder: Path):
    """--help, and one record offline, beside an empty Python."""
    source = written(
        folder / "one.jsonl", [{"prompt": "What is 6 times 7?", "answer": "It is 42."}]
    )
    best = lambda run: min(run().seconds for _ in range(3 if quick else 9))
    empty = best(lambda: measured(["-c", "pass"], folder))
    yield Row(
        "--help / python -c pass",
        best(lambda: measured([SCRIPT, "--help"], folder)) / empty,
        most=15,
    )
    offline = best(lambda: script(source, "--provider", "offline"))
    yield Row("one record offline / python -c pass", offline / empty)


@part
def calls(quick: bool, folder: Path):
    """The same calls by us and by the bare SDK, by provider and by calls in flight."""
    number = 400 if quick else 2_000
    source = written(
        folder / "prompts.jsonl", [{"prompt": f"Question {n}?"} for n in range(number // 2)]
    )
    for provider in API:
        for width, most in ((16, None), (64, 1.15), (256, 1.4)):
            bare, ours, busy = race(provider, source, number, width, 1 if quick else REPEATS[width])
            name = f"{provider}, {width} in flight: "
            yield Row(name + "wall / bare SDK's", ours.seconds / bare.seconds, most=most)
            yield Row(name + "wall / ideal", ours.seconds / (number / width * LATENCY))
            yield Row(name + "CPU of a call / bare SDK's", ours.cpu / bare.cpu, most=1.5)
            yield Row(name + "server's share of a core", busy, "{:.0%}", most=0.9)


def race(provider: str, source: Path, number: int, width: int, repeats: int):
    """-> (bare SDK's best, our best, the server's CPU seconds a second while it served us)."""
    bare, ours, busy = [], [], []
    for _ in range(repeats):
        with served("--latency", LATENCY) as server:
            url = server.url + API[provider]
            bare.append(measured([BARE, provider, url, number, width], source.parent))
        with served("--latency", LATENCY) as server:
            idle = server.stats()["cpu"]
            models = ("--high-model", "a", "--low-model", "b", "--judge-model", "none")
            flags = ("--provider", provider, "--base-url", server.url + API[provider], *models)
            ours.append(script(source, *flags, "--concurrency", width // 2))
            stats = server.stats()
            busy.append((stats["cpu"] - idle) / stats["span"])
        assert stats["calls"] == number, stats
        ours[-1].accounted(number // 2)
    return best_of(bare), best_of(ours), min(busy)


@part
def limits(quick: bool, folder: Path):
    """Calls answered as a share of what a server allows that answers the rest with 429; all four at once."""
    sizes = {(50, 0.2): 400 if quick else 2_000, (10, 2.0): 100 if quick else 600}
    cases = [(*case, retry_after) for case in sizes for retry_after in ("", "1")]
    source = {case: written(folder / f"{n}.jsonl", references(n)) for case, n in sizes.items()}
    with ThreadPoolExecutor(len(cases)) as pool:
        for case, share in zip(
            cases, pool.map(lambda c: limited(source[c[:2]], sizes[c[:2]], *c), cases)
        ):
            how = f"{case[0]}/s, {case[1]:g} s latency, {'with' if case[2] else 'no'} Retry-After"
            yield Row(f"limit of {how}: share used", share, "{:.1%}", least=0.9)


def limited(source: Path, number: int, limit: int, latency: float, retry_after: str) -> float:
    """Answered / (seconds from the first to the last arrival at the server x limit), 64 in flight, no record lost."""
    more = ("--retry-after", retry_after) if retry_after else ()
    with served("--latency", latency, "--limit", limit, *more) as server:
        flags = ("--provider", "openai", "--base-url", server.url + "/v1", "--judge-model", "none")
        done = script(
            source, *flags, "--high-model", "reference", "--low-model", "b", "--concurrency", 64
        )
        done.accounted(number)
        return number / (server.stats()["span"] * limit)


@part
def cached(quick: bool, folder: Path):
    """The same command again: 10,000 judged records, every reply from the cache."""
    number = 1_000 if quick else 10_000
    source = written(
        folder / "prompts.jsonl", [{"prompt": f"Question {n}?"} for n in range(number)]
    )
    with served() as server:
        models = (
            "--high-model",
            "gpt-4o",
            "--low-model",
            "gpt-4o-mini",
        )  # who judges is the high one
        flags = ("--provider", "openai", "--base-url", server.url + "/v1", *models)
        first = script(source, *flags, "--batch", through=EAGER)  # the quickest way to fill a cache
        again = best_of([script(source, *flags, out=first.out) for _ in range(1 if quick else 3)])
        assert server.stats()["calls"] == 0, "a cached call was made again"
    again.accounted(number)
    yield Row("cached rerun, records a second", number / again.seconds, "{:,.0f}", least=1_500)
    yield Row("cached rerun / json alone on its rows", again.seconds / json_alone(again.out))


@part
def ranking(quick: bool, folder: Path):
    """rank_responses on four answers of 450 characters: beside `json` alone, the report's share, and memory."""
    small, large = (500, 5_000) if quick else (5_000, 50_000)
    source = {n: written(folder / f"{n}.jsonl", ranked(n)) for n in (small, large)}
    flags = ("--method", "rank_responses")
    plain = {n: script(source[n], *flags, "--report-path", "none") for n in source}
    full = {n: script(source[n], *flags) for n in source}
    full[large].accounted(large)
    yield Row(
        "rank_responses / json alone on its input", plain[large].seconds / json_alone(source[large])
    )
    yield Row("rank_responses, records a second", large / plain[large].seconds, "{:,.0f}")
    share = full[large].seconds / plain[large].seconds - 1
    yield Row("its report, share of the time without one", share, "{:.0%}", most=0.3)
    for name, runs in (("without", plain), ("with", full)):
        more = runs[large].peak - runs[small].peak
        yield Row(
            f"rank_responses {name} report, MB more for {large:,} than for {small:,}",
            more,
            "{:.0f}",
            most=40,
        )


@part
def texts(quick: bool, folder: Path):
    """rank_responses with its report on answers as long as real ones, beside `json` alone."""
    for least, most, number in ((60, 200, 20_000), (300, 600, 5_000)):
        number = number // 20 if quick else number
        source = written(folder / f"{least}.jsonl", essays(number, least, most))
        done = script(source, "--method", "rank_responses", "--judge-model", "none")
        done.accounted(number)
        name = f"answers of {least} to {most} words"
        yield Row(f"{name}: wall / json alone on its input", done.seconds / json_alone(source))
        yield Row(f"{name}: records a second", number / done.seconds, "{:,.0f}")


@part
def memory(quick: bool, folder: Path):
    """Peak memory at 10,000 and at 200,000 records, offline and in batch mode, both at once."""
    small, large = (1_000, 5_000) if quick else (10_000, 200_000)
    source = {n: written(folder / f"{n}.jsonl", sums(n)) for n in (small, large)}
    with ThreadPoolExecutor(2) as pool, served() as server:
        models = ("--high-model", "a", "--low-model", "b", "--judge-model", "none", "--batch")
        batch = ("--provider", "openai", "--base-url", server.url + "/v1", *models)
        ways = {"offline": (("--provider", "offline"), ()), "--batch": (batch, EAGER)}
        peaks = lambda way: [
            script(source[n], *way[0], through=way[1]).accounted(n).peak for n in source
        ]
        for way, (low, high) in zip(ways, pool.map(peaks, ways.values())):
            yield Row(
                f"{way}: MB more for {large:,} than for {small:,}", high - low, "{:.0f}", most=40
            )
            yield Row(f"{way}: MB for {small:,} records", low, "{:.0f}")


# ------------------------------------------------------------------------------------------- what they are fed


def sums(number: int):
    return ({"prompt": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(number))


def references(number: int):
    """Records whose own answer is like none of the server's."""
    return (
        {"prompt": f"Question {n}?", "output": "A reference that is long enough."}
        for n in range(number)
    )


def ranked(number: int):
    """Prompts with four scored answers of 450 characters, of words that are no language's."""
    draw = random.Random(1)
    words = [
        "".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(2, 11))) for _ in range(5_000)
    ]
    for n in range(number):
        texts = [" ".join(draw.choices(words, k=60)) + "." for _ in range(4)]
        yield {"prompt": f"Question {n}?", "responses": texts, "scores": draw.sample(range(10), 4)}


def essays(number: int, least: int, most: int):
    """Prompts with four scored answers of so many words, in sentences of 6 to 16 words."""
    draw = random.Random(2)
    words = [
        "".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(2, 9))) for _ in range(5_000)
    ]
    for n in range(number):
        texts = [essay(draw, words, draw.randint(least, most)) for _ in range(4)]
        yield {"prompt": f"Question {n}?", "responses": texts, "scores": draw.sample(range(10), 4)}


def essay(draw: random.Random, words: list[str], length: int) -> str:
    sentences = []
    while length > 0:
        size = min(length, draw.randint(6, 16))
        length -= size
        sentences.append(" ".join(draw.choices(words, k=size)).capitalize() + ".")
    return " ".join(sentences)


def written(path: Path, records) -> Path:
    """Records -> a JSONL file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path


# ------------------------------------------------------------------------------------------- how it is measured

# A small process starts what is measured, since a child's peak memory is at least that of its parent.
METER = """import resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(status, time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss)"""
# The script, looking at its batches often; a real engine takes minutes.
EAGER = ("-c", f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import rlhf_constructor as rc; rc.BATCH_POLL = (.05, .5); sys.exit(rc.main(sys.argv[1:]))""")  # fmt: skip
JSON_ALONE = """import json, sys
with open(sys.argv[1], encoding="utf-8") as source, open(sys.argv[2], "w", encoding="utf-8") as copy:
    for line in source:
        copy.write(json.dumps(json.loads(line), ensure_ascii=False) + "\\n")"""
OUT = count(1)


@dataclass
class Cost:
    """What a process took: wall and CPU seconds, peak memory in MB; and where the script wrote."""

    seconds: float
    cpu: float
    peak: float
    out: Path | None = None

    def accounted(self, records: int) -> "Cost":
        """Refuse a run that lost records: each has one row, or lines among the dropped."""
        dropped, ended = self.out.with_suffix(".dropped.jsonl"), 0
        with self.out.open("rb") as rows:
            ended += sum(1 for _ in rows)
        if dropped.exists():
            ended += len({json.loads(line)["line"] for line in dropped.open("rb")})
        assert ended == records, f"{records - ended} of {records} records were lost"
        return self


def measured(command: list, folder: Path) -> Cost:
    """The cost of `python *command`; refuses one that fails."""
    kept = {
        name: value for name, value in os.environ.items() if not re.search("_proxy$", name, re.I)
    }
    keys = dict.fromkeys(("OPENAI_API_KEY", "DASHSCOPE_API_KEY"), "none")
    meter = [sys.executable, "-c", METER, sys.executable, *map(str, command)]
    done = subprocess.run(
        meter, env=kept | keys, cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )
    status, seconds, cpu, peak = map(float, done.stdout.split())
    assert status == 0, f"{command}: status {status:.0f}\n{done.stderr[-2000:]}"
    return Cost(seconds, cpu, peak / (2**20 if sys.platform == "darwin" else 2**10))


def script(source: Path, *flags, through=(), out: Path | None = None) -> Cost:
    """The cost of a run of the script on a file, in a folder and with a cache of its own unless `out` names one."""
    out = out or source.parent / str(next(OUT)) / "out.jsonl"
    files = ("--input-file", source, "--output-path", out)
    cost = measured([*(through or [SCRIPT]), *files, *flags], source.parent)
    cost.out = out
    return cost


def best_of(costs: list[Cost]) -> Cost:
    """The least of each figure: noise only ever adds."""
    return Cost(
        *(min(getattr(cost, name) for cost in costs) for name in ("seconds", "cpu", "peak")),
        costs[-1].out,
    )


def json_alone(path: Path) -> float:
    """Seconds in which `json` reads and writes a file's rows."""
    return min(
        measured(["-c", JSON_ALONE, path, "copy.jsonl"], path.parent).seconds for _ in range(3)
    )


class Served:
    """The loopback server, in a process of its own."""

    def __init__(self, process: subprocess.Popen):
        self.url = process.stdout.readline().strip()

    def stats(self) -> dict:
        """calls that arrived online, span in seconds from the first to the last, CPU seconds so far."""
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            self.url + "/stats"
        ) as reply:
            return json.load(reply)


@contextmanager
def served(*flags):
    command = [sys.executable, str(SERVER), *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Served(process)
        finally:
            process.terminate()


# ------------------------------------------------------------------------------------------- the command


def line(cells, widths=(70, 9, 17, 0)) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths)).rstrip()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    options = parser.parse_args()
    print(
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    rows = []
    for name in options.only or PARTS:
        start = time.monotonic()
        print(f"\n{name}: {PARTS[name].__doc__}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for row in PARTS[name](options.quick, Path(folder)):
                rows.append(row.cells())
                print(line(rows[-1]), flush=True)
        print(f"({time.monotonic() - start:.0f} s)")
    print("\nRequired:", *map(line, filter(lambda cells: cells[-1], rows)), sep="\n")
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
