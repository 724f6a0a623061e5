"""Speed and memory as ratios, never bare times: `python tests/bench.py` (about two minutes).

Each figure is measured beside something outside the script: the bare SDK, the allowed rate, `python -c pass`."""

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.server import Api  # noqa: E402

SCRIPT = str(ROOT / "rlhf_constructor.py")
WORKERS, LATENCY = 64, 0.2


METER = """import resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
print(status, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""


def timed(command, env=None, cwd=None) -> tuple[float, int]:
    """(seconds, peak memory in KiB) of a command; a small process starts it, since a fork inherits the peak."""
    meter = subprocess.run(
        [sys.executable, "-c", METER, *command], env=env, cwd=cwd, capture_output=True, text=True
    )
    status, seconds, peak = meter.stdout.split()
    assert status in "01", command
    return float(seconds), int(peak)


def script(source, *flags, api=None, folder) -> tuple[float, int]:
    """Run the script on a file of records."""
    command = [
        sys.executable,
        SCRIPT,
        "--input-file",
        str(source),
        "--output-path",
        "o.jsonl",
        *map(str, flags),
    ]
    return timed(command, api.env() if api else None, folder)


def written(path: Path, records) -> Path:
    """Records -> a JSONL file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path


async def bare_openai(api, prompts):
    """The same calls by the bare SDK, as many at a time."""
    import openai

    client = openai.AsyncOpenAI(
        base_url=api.openai_url, api_key="none", http_client=openai.DefaultAioHttpClient()
    )
    room = asyncio.Semaphore(2 * WORKERS)

    async def one(prompt, model):
        async with room:
            await client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}])

    async with client:
        await asyncio.gather(*(one(prompt, model) for prompt in prompts for model in ("a", "b")))


async def bare_dashscope(api, prompts):
    """The same calls by the bare SDK, with a session of its own as the script has."""
    import aiohttp
    from dashscope import AioGeneration

    room = asyncio.Semaphore(2 * WORKERS)

    async def one(prompt, model):
        async with room:
            messages, where = [{"role": "user", "content": prompt}], {"base_address": api.dashscope_url}
            await AioGeneration.call(model=model, messages=messages, session=session, api_key="none", **where)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(prompt, model) for prompt in prompts for model in ("a", "b")))


def throughput(folder: Path):
    """Calls a second as a share of the bare SDK's, from the first call's arrival to the last one's."""
    prompts = [f"Question {n}?" for n in range(1500)]
    source = written(folder / "p.jsonl", [{"prompt": prompt} for prompt in prompts])
    for provider, bare in (("openai", bare_openai), ("dashscope", bare_dashscope)):
        spans = []
        for ours in (False, True):
            with Api(lambda call: f"An answer of {call.model} to {call.prompt}", latency=LATENCY) as api:
                flags = (
                    "--provider",
                    provider,
                    "--high-model",
                    "a",
                    "--low-model",
                    "b",
                    "--judge-model",
                    "none",
                )
                if ours:
                    script(
                        source,
                        *flags,
                        "--concurrency",
                        WORKERS,
                        "--cache-path",
                        f"{provider}.sqlite",
                        api=api,
                        folder=folder,
                    )
                else:
                    asyncio.run(bare(api, prompts))
                spans.append(api.calls[-1].time - api.calls[0].time)
        print(
            f"{provider}: {spans[0] / spans[1]:.0%} of the bare SDK's calls a second ({2 * WORKERS} in flight)"
        )


def pacing(folder: Path, limit: int = 50):
    """Calls answered, as a share of what the limit allows in that time."""
    source = written(folder / "q.jsonl", [{"prompt": f"Question {n}?"} for n in range(400)])
    flags = ("--provider", "openai", "--high-model", "a", "--low-model", "b", "--judge-model", "none")
    with Api(lambda call: f"{call.model}: {call.prompt}", latency=LATENCY, limit=limit) as api:
        script(source, *flags, "--concurrency", 32, "--cache-path", "none", api=api, folder=folder)
        span = api.calls[-1].time - api.calls[0].time
    print(
        f"rate limit {limit}/s: {800 / (span * limit):.0%} of the allowed calls, {len(api.calls) - 800} refused"
    )


def start_up():
    """--help beside an empty Python."""
    helps = min(timed([sys.executable, SCRIPT, "--help"])[0] for _ in range(9))
    empty = min(timed([sys.executable, "-c", "pass"])[0] for _ in range(9))
    print(f"--help: {helps / empty:.1f} x `python -c pass`")


def memory(folder: Path):
    """Peak memory of 100,000 short prompts through `offline` above that of 1,000."""
    peaks = []
    for count in (1_000, 100_000):
        records = ({"prompt": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(count))
        peaks.append(script(written(folder / "m.jsonl", records), "--provider", "offline", folder=folder)[1])
    print(f"memory: {(peaks[1] - peaks[0]) / 1024:.0f} MB more for 100,000 prompts than for 1,000")


def ranking(folder: Path):
    """rank_responses on four 450-character answers: beside `json` alone, memory, and the report's share."""
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(2, 11))) for _ in range(5000)]
    text = lambda: " ".join(draw.choices(words, k=60)) + "."
    made = [
        {
            "prompt": f"Question {n}?",
            "responses": [text() for _ in range(4)],
            "scores": draw.sample(range(10), 4),
        }
        for n in range(50_000)
    ]
    peaks = {}
    for count in (5_000, 50_000):
        source = written(folder / f"r{count}.jsonl", made[:count])
        flags = ("--method", "rank_responses")
        (bare, low), (full, high) = (
            script(source, *flags, "--report-path", "none", folder=folder),
            script(source, *flags, folder=folder),
        )
        peaks[count] = (low, high)
    start = time.perf_counter()
    for line in source.open(encoding="utf-8"):
        json.dumps(json.loads(line))
    alone = time.perf_counter() - start
    print(
        f"rank_responses: {50_000 / bare:,.0f} records/s, {bare / alone:.1f} x reading and writing them with `json` alone"
    )
    print(
        f"  its memory: {(peaks[50_000][0] - peaks[5_000][0]) / 1024:.0f} MB more for 50,000 records than for 5,000"
    )
    print(
        f"report: {(full - bare) / bare:.0%} of the run's own time, {(peaks[50_000][1] - peaks[5_000][1]) / 1024:.0f} MB more for 50,000 pairs than for 5,000"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        start_up()
        throughput(Path(name))
        pacing(Path(name))
        memory(Path(name))
        ranking(Path(name))
