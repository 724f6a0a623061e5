"""Who can read what a run leaves, where keys and passwords show up, and what the code never does."""

import ast
import os

import pytest

import rlhf_constructor as rc
from tests.conftest import SCRIPT
from tests.server import DASHSCOPE_KEY, OPENAI_KEY, Api, Fault, demo_world

MODELS = ("--provider", "openai", "--high-model", "gpt-4o", "--low-model", "gpt-4o-mini")
PROMPTS = [{"prompt": f"Question {n}?"} for n in range(12)]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize("mask", [0o022, 0], ids=["usual umask", "no umask"])
def test_whatever_holds_prompts_is_readable_by_its_owner_only(rlhf, tmp_path, monkeypatch, mask):
    monkeypatch.setattr(rc, "BATCH_POLL", (0.01, 0.05))
    flags = (
        "--test-fraction",
        0.4,
        "--candidates-path",
        "c.jsonl",
        "--review-path",
        "r.html",
        "--batch",
    )
    refused = lambda call: Fault(400) if "Question 3" in call.prompt else demo_world(call)
    former = os.umask(mask)
    try:
        with Api(refused) as api:
            rlhf(PROMPTS, *MODELS, *flags, api=api)
            api._answer = api.engine.answer = lambda call: Fault(401)
            assert (
                rlhf([{"prompt": "new"}], *MODELS, "--cache-path", "d.sqlite", api=api).status == 3
            )
    finally:
        os.umask(former)
    modes = {
        path.name: oct(path.stat().st_mode & 0o777)
        for path in tmp_path.iterdir()
        if path.name != "in.jsonl"
    }
    assert (
        len(modes) >= 10
        and {"out.jsonl", "out.jsonl.part", "out.dropped.jsonl", "out.test.jsonl"} < modes.keys()
    )
    assert set(modes.values()) == {"0o600"}, modes


ADDRESSES = {
    "--base-url": (["--base-url", "http://user:hunter2pass@h/v1"], {}),
    "a query": (["--base-url", "http://h/v1?key=hunter2pass"], {}),
    "model@URL": (["--judge-model", "openai:m@https://user:hunter2pass@h/v1"], {}),
    "a candidate": (["--method", "generate_pairs", "--candidate-models", "a", "b@http://:hunter2pass@h/v1"], {}),
    "a reward model": (["--judge-model", "reward:m@http://user:hunter2pass@h"], {}),
    "without a scheme": (["--base-url", "user:hunter2pass@h/v1"], {}),
    "in capitals": (["--low-model", "m@HTTP://user:hunter2pass@h/v1"], {}),
    "the password has a slash": (["--base-url", "http://user:pa/hunter2pass@h/v1"], {}),
    "in a fragment": (["--base-url", "http://h/v1#hunter2pass"], {}),
    "OPENAI_BASE_URL": ([], {"OPENAI_BASE_URL": "http://user:hunter2pass@h/v1"}),
    "DASHSCOPE_HTTP_BASE_URL": (["--provider", "dashscope"], {"DASHSCOPE_HTTP_BASE_URL": "http://u:hunter2pass@h/api/v1"}),
}  # fmt: skip


@pytest.mark.parametrize("flags, env", ADDRESSES.values(), ids=ADDRESSES)
def test_an_address_with_a_password_is_refused_and_never_printed(rlhf, tmp_path, flags, env):
    keys = {"OPENAI_API_KEY": OPENAI_KEY, "DASHSCOPE_API_KEY": DASHSCOPE_KEY}
    result = rlhf(PROMPTS, *MODELS, *flags, **keys, **env)
    assert (
        result.status == 2
        and result.err.count("\n") == 1
        and "hunter2" not in result.err + result.out
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    "key", ["“sk-hunter2pass”", "sk-hunter2 pass", "sk-hunter2\npass", "sk-hunter2pass密钥"]
)
@pytest.mark.parametrize("provider", ["openai", "dashscope"])
def test_a_key_that_was_pasted_badly_is_refused_in_one_line_and_not_printed(
    rlhf, tmp_path, key, provider
):
    result = rlhf(PROMPTS, "--provider", provider, OPENAI_API_KEY=key, DASHSCOPE_API_KEY=key)
    assert (
        result.status == 2
        and "holds a character that no key has" in result.err
        and result.err.count("\n") == 1
    )
    assert "hunter2" not in result.err and [path.name for path in tmp_path.iterdir()] == [
        "in.jsonl"
    ]


def test_a_proxy_that_is_no_address_is_one_line_without_its_password(rlhf):
    proxies = dict.fromkeys(
        ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"),
        "http://user:hunter2/pass@127.0.0.1:9",
    )
    result = rlhf(
        PROMPTS,
        *MODELS,
        "--base-url",
        "http://models.invalid/v1",
        OPENAI_API_KEY=OPENAI_KEY,
        NO_PROXY="",
        no_proxy="",
        **proxies,
    )
    said = result.out + result.err
    assert (
        result.status == 3
        and "HTTP_PROXY" in result.err
        and "Traceback" not in said
        and "hunter2" not in said
    )


@pytest.mark.parametrize("provider", ["openai", "dashscope"])
def test_a_key_that_a_server_echoes_is_in_no_file_and_no_message(rlhf, tmp_path, provider):
    keys = {"OPENAI_API_KEY": "sk-test/abc+XYZ=12", "DASHSCOPE_API_KEY": "sk-test/QWE+rty=34"}
    echoed = " and ".join(keys.values())

    def answer(call):
        if "Question 3" in call.prompt:
            return Fault(400, code=f"bad {echoed}", message=f"your key {echoed} is fine")
        return demo_world(call)

    with Api(answer) as api:
        run = lambda *more: rlhf(
            PROMPTS, "--provider", provider, *MODELS[2:], *more, api=api, **keys
        )
        results = [run()]
        api._answer = lambda call: Fault(401, message=echoed)
        results.append(run("--cache-path", "none"))
    assert [result.status for result in results] == [0, 3]
    said = "".join(result.out + result.err for result in results)
    said += "".join(path.read_text("utf-8", "replace") for path in tmp_path.iterdir())
    assert not any(key in said for key in keys.values()) and "[key]" in said


def test_the_code_runs_no_text_and_loads_no_objects():
    """No eval, exec or compile of text, no pickle, marshal or shelve, no shell and no other program."""
    tree = ast.parse(SCRIPT.read_text("utf-8"))
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec", "compile", "__import__"}
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not names & {
        "pickle",
        "marshal",
        "shelve",
        "dill",
        "joblib",
        "subprocess",
        "ctypes",
        "pty",
    }
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"system", "popen", "spawnv", "execv", "fork", "startfile"}


def test_a_key_that_begins_another_key_leaves_nothing_of_it(monkeypatch):
    names = sorted({provider.key_variable for provider in rc.PROVIDERS.values()} - {""})
    for name, key in zip(names, ["sk-12345678", "sk-12345678-secret"] * len(names)):
        monkeypatch.setenv(name, key)
    assert rc.redacted("key sk-12345678-secret!") == "key [key]!"
