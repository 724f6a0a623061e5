"""The small parts that tests of §2-§6 share: a run without files, a scripted model door, a judge's sheet."""

import asyncio
import json
import re
from pathlib import Path

import rlhf_constructor as rc

ROOT = Path(__file__).parent.parent
LOCAL = "@http://localhost:9/v1"  # an address that needs no key; nothing is ever sent to it


class Door:
    """Stands where `Models` stands, the one door to every model: replies are scripted, the rest is real.

    `says(name, prompt)` gives a text, a Reply, or an exception to raise."""

    def __init__(self, says):
        self.says, self.asked = says, []

    async def ask(self, model, messages, options, sample=0, role="answer", reference=""):
        self.asked.append((model.name, messages[-1]["content"]))
        said = self.says(*self.asked[-1])
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, rc.Reply) else rc.Reply(said)

    def count_judge_reply(self, judge, problem=""):
        """Counted by Models only: see test_calls."""


def run_of(*flags, says=None):
    """The Run that a command line makes, checked as the real one; offline, or with `says` behind the door."""
    base = ["--provider", "offline", "--input-file", str(ROOT / "data" / "alpaca_demo.jsonl")]
    args = rc.build_parser().parse_args([*base, "--output-path", "out.jsonl", *flags])
    run = rc.check(args)
    run.models = Door(says) if says else rc.Models(args, rc.Cache(None))
    return run


def judged_by(*names):
    """--judge-model flags for judges of these names."""
    return [part for name in names for part in ("--judge-model", f"openai:{name}{LOCAL}")]


def ask(text="What is 6 times 7?", reference="", **more):
    """A record with a single user turn."""
    return rc.Record([{"role": "user", "content": text}], reference, **more)


def pair(chosen, rejected, prompt="What is 6 times 7?", votes=((9.0, 9.0), (3.0, 3.0)), **more):
    """A pair as a judge of two orders leaves it."""
    made = [
        rc.Answer(t, score=sum(v) / 2, votes=v, positions=(0, 1))
        for t, v in zip((chosen, rejected), votes)
    ]
    return rc.Pair(ask(prompt), *made, **more)


def shown(prompt: str) -> list[tuple[str, str]]:
    """A judge's prompt -> [(id, text), ...] as they stand in it."""
    return re.findall(
        r'<answer id="(\w+)" nonce="(?:\w+)">\n(.*?)\n</answer nonce="\w+">', prompt, re.S
    )


def verdict(prompt: str, score_of) -> str:
    """The reply of a judge who gives each text of a sheet `score_of(text)`."""
    return json.dumps(
        {"reason": "as scripted", "scores": {name: score_of(text) for name, text in shown(prompt)}}
    )


def wait(coroutine):
    """The result of a coroutine, or the Failed that it raises."""
    try:
        return asyncio.run(coroutine)
    except rc.Failed as failed:
        return failed


def why(failed) -> str:
    """`stage: reason` of a Failed."""
    return f"{failed.stage}: {failed.reason}"
