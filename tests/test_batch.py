"""the real openai SDK against a loopback batch engine; nothing is paid twice, nothing is mixed up."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import rlhf_constructor as rc
from tests.conftest import ROOT, rows, write_jsonl
from tests.server import Api, Fault, Reply, demo_world, is_judge, judge_reply

OPENAI = ("--provider", "openai", "--high-model", "strong", "--low-model", "weak")
DASHSCOPE = ("--provider", "dashscope", *OPENAI[2:])
PROMPTS = [{"prompt": f"What is {n} plus {n}?"} for n in range(12)]


def world(call):
    """The strong model is right, the weak one is not, and the judge can tell; each answer names its question."""
    if is_judge(call):
        return judge_reply(call, lambda text, slot: 9 if "right" in text else 3)
    return f"A {'right' if call.model == 'strong' else 'mistaken'} answer\u2028to: {call.prompt}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rc, "BATCH_POLL", (0.01, 0.05))


def belongs(pair):
    """Both answers of a pair are answers to its prompt."""
    return all(
        text.endswith(f"to: {pair['prompt']}") for text in (pair["chosen"], pair["rejected"])
    )


@pytest.mark.parametrize("sdk", [OPENAI, DASHSCOPE], ids=["openai", "dashscope"])
def test_answers_and_verdicts_come_by_batch_and_no_call_is_made_online(rlhf, sdk):
    with Api(world) as api:
        result = rlhf(PROMPTS, *sdk, "--batch", api=api)
        assert (result.status, len(result.pairs), api.count()) == (0, 12, 0)
        assert all(map(belongs, result.pairs)) and all(
            "right" in pair["chosen"] for pair in result.pairs
        )
        assert (
            len(api.engine.batches) == 3 and len(set(api.engine.keys)) == len(api.engine.keys) == 48
        )
        again = rlhf(PROMPTS, *sdk, "--batch", api=api)
        assert again.output.read_bytes() and len(api.engine.batches) == 3


def test_a_reply_of_a_batch_is_one_to_the_same_command_without_it(rlhf):
    with Api(world) as api:
        batched = rlhf(PROMPTS, *OPENAI, "--batch", api=api).output.read_bytes()
        online = rlhf(PROMPTS, *OPENAI, api=api)
        assert online.output.read_bytes() == batched and api.count() == 0


def test_replies_of_this_runs_batches_are_calls_and_those_of_earlier_runs_are_cached(rlhf):
    with Api(world) as api:
        first = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        again = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
    assert "API calls: 48 made, 0 from cache" in first.out
    assert "API calls: 0 made, 48 from cache" in again.out


def test_a_judge_that_is_never_readable_stops_after_its_first_batch(rlhf):
    def answer(call):
        return "I like both." if is_judge(call) else world(call)

    prompts = [{"prompt": f"What is {n} plus {n}?"} for n in range(50)]
    with Api(answer) as api:
        result = rlhf(prompts, *OPENAI, "--batch", api=api)
        assert result.status == 3 and "none of its 40 replies as a judge holds" in result.err
        assert len(api.engine.keys) == 50 * 4, "both answers and both orders, once"


def test_a_run_without_batch_is_refused_while_batches_of_its_models_run(rlhf):
    with Api(world) as api:
        rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        with contextlib.closing(rc.Cache(".rlhf_cache.sqlite")) as cache:
            for name in ("weak", "another"):
                row = (f"file-{name}", f"openai:{name}@{api.url}/v1")
                cache.do("INSERT INTO batches (file, model, id) VALUES (?, ?, 'b')", *row)
        result = rlhf(PROMPTS, *OPENAI, api=api)
    assert result.status == 2 and "batches of this cache may still run" in result.err


def test_methods_need_not_know_of_it(rlhf):
    with Api(world) as api:
        flags = ("--method", "generate_pairs", "--num-candidates", 4, "--batch")
        result = rlhf(PROMPTS, *OPENAI, *flags, api=api)
        assert (result.status, len(result.pairs), api.count()) == (0, 12, 0)


def test_failed_lines_are_sent_again_and_join_their_own_prompts(rlhf):
    luck = random.Random(1)
    with Api(lambda call: Fault(500) if luck.random() < 0.3 else world(call)) as api:
        result = rlhf(PROMPTS * 1, *OPENAI, "--batch", "--max-retries", 9, api=api)
        assert (result.status, len(result.pairs)) == (0, 12) and all(map(belongs, result.pairs))
        assert api.count() == 0


def test_what_keeps_failing_costs_its_record_only_and_the_next_run_tries_it_again(rlhf):
    broken = lambda call: (
        Fault(500) if "3 plus" in call.prompt and call.model == "weak" else world(call)
    )
    with Api(broken) as api:
        result = rlhf(PROMPTS, *OPENAI, "--batch", "--max-retries", 1, api=api)
        assert (result.status, len(result.pairs), len(result.dropped)) == (1, 11, 1)
        assert (
            result.reasons[0].startswith("model: server error: weak: 500")
            and result.dropped[0]["line"] == 4
        )
        api.engine.answer = world
        assert rlhf(PROMPTS, *OPENAI, "--batch", api=api).status == 0 and api.count() == 0


def test_a_prompt_that_is_refused_is_not_sent_again(rlhf):
    refused = Fault(400, code="content_policy_violation")
    with Api(
        lambda call: refused if "3 plus" in call.prompt and not is_judge(call) else world(call)
    ) as api:
        result = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        assert (result.status, len(result.pairs), len(result.dropped)) == (0, 11, 1)
        assert Counter(api.engine.keys).most_common(1)[0][1] == 1


def test_a_refused_option_is_changed_and_the_requests_are_sent_again(rlhf):
    def answer(call):
        if "max_tokens" in call.params:
            return Fault(400, message="Unsupported parameter: use 'max_completion_tokens' instead.")
        return world(call)

    with Api(answer) as api:
        result = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        assert (result.status, len(result.pairs)) == (
            0,
            12,
        ) and "max_completion_tokens" in result.err


def test_a_cut_answer_is_asked_for_once_more_with_twice_the_limit(rlhf):
    short = lambda call: call.model == "weak" and call.params["max_tokens"] == 4096
    with Api(lambda call: Reply("half", finish="length") if short(call) else world(call)) as api:
        result = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        assert len(result.pairs) == 12 and all(map(belongs, result.pairs))


@pytest.mark.parametrize("spoilt", ["twice", "foreign", "broken", "missing"])
def test_lines_join_by_custom_id_whatever_else_is_in_the_file(rlhf, spoilt):
    change = {
        "twice": lambda lines: lines + lines[::-1],
        "foreign": lambda lines: [lines[0].replace('"custom_id": "', '"custom_id": "f'), *lines],
        "broken": lambda lines: ["{", "[]", '{"custom_id": []}', "", *lines],
        "missing": lambda lines: lines[1:] if len(lines) > 8 else lines,
    }
    with Api(world) as api:
        api.engine.spoil = change[spoilt]
        result = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        assert (result.status, len(result.pairs)) == (0, 12) and all(map(belongs, result.pairs))


def test_the_rest_of_an_expired_batch_is_submitted_again(rlhf):
    with Api(world) as api:
        api.engine.ends = lambda batch, requests: (
            "expired" if batch["id"] == "batch-1" else "completed"
        )
        result = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        assert (result.status, len(result.pairs)) == (0, 12)
        assert len(api.engine.keys) == 48, "what the expired batch had answered was not asked again"


def test_a_cancelled_batch_stops_the_run_and_keeps_what_it_brought(rlhf):
    with Api(world) as api:
        api.engine.ends = lambda batch, requests: (
            "cancelled" if batch["id"] == "batch-1" else "completed"
        )
        result = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        assert result.status == 3 and "cancelled" in result.err
        assert rlhf(PROMPTS, *OPENAI, "--batch", api=api).status == 0 and len(api.engine.keys) == 48


@pytest.mark.parametrize("where", ["creation", "status"])
def test_a_batch_too_big_for_the_account_is_split_and_sent_in_turn(rlhf, where):
    big = lambda requests: len(requests) > 4
    with Api(world) as api:
        if where == "creation":
            too_big = Fault(429, code=rc.TOO_BIG)
            api.engine.creating = lambda requests: too_big if big(requests) else None
        else:
            failed = f"failed:{rc.TOO_BIG}"
            api.engine.ends = lambda batch, requests: failed if big(requests) else "completed"
        result = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        assert (result.status, len(result.pairs)) == (0, 12)
        assert len(api.engine.keys) == 48, "each request was answered once"


def test_files_are_split_at_their_limits(rlhf, monkeypatch):
    monkeypatch.setattr(rc, "BATCH_REQUESTS", 5)
    monkeypatch.setattr(rc, "BATCH_BYTES", 1500)
    with Api(world) as api:
        assert len(rlhf(PROMPTS, *OPENAI, "--batch", api=api).pairs) == 12
        uploads = [
            api.engine.files[batch["input_file_id"]] for batch in api.engine.batches.values()
        ]
    assert all(len(data.splitlines()) <= 5 for data in uploads)
    assert all(len(data) <= 1500 or data.count(b"\n") == 1 for data in uploads)


@pytest.mark.parametrize(
    "code, says",
    [
        ("model_not_found", "no such model"),
        ("insufficient_quota", "used up"),
        ("odd", "refused (400 odd"),
    ],
)
def test_a_failed_batch_stops_the_run_and_says_what_to_do(rlhf, code, says):
    with Api(world) as api:
        api.engine.ends = lambda batch, requests: f"failed:{code}"
        result = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
    assert result.status == 3 and says in result.err and not result.output.exists()


def test_a_batch_whose_creation_was_answered_by_silence_is_found_and_not_made_again(rlhf):
    with Api(world) as api:
        api.engine.lost = True
        assert rlhf(PROMPTS, *OPENAI, "--batch", api=api).status == 0
        assert len(api.engine.batches) == 3 and len(api.engine.keys) == 48


def test_a_wrong_key_stops_at_the_upload_and_a_busy_engine_is_waited_for(rlhf):
    with Api(world) as api:
        api.engine.uploading = lambda: Fault(401)
        result = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        assert result.status == 3 and "key was refused" in result.err and not api.engine.files
        faults = [Fault(503), Fault(429)]
        api.engine.uploading = lambda: faults.pop() if faults else None
        assert rlhf(PROMPTS, *OPENAI, "--batch", api=api).status == 0 and not faults


def test_without_a_cache_or_with_a_reward_model_it_is_refused(rlhf):
    assert (
        "leave out --cache-path none"
        in rlhf(PROMPTS, *OPENAI, "--batch", "--cache-path", "none", OPENAI_API_KEY="k" * 9).err
    )
    judge = ("--judge-model", "reward:rm@http://localhost:9")
    assert (
        "a reward model: leave it out"
        in rlhf(PROMPTS, *OPENAI, "--batch", *judge, OPENAI_API_KEY="k" * 9).err
    )


def test_the_budget_holds_for_what_is_submitted(rlhf):
    price = ("--price", "strong=10/10", "--price", "weak=10/10")
    with Api(world) as api:
        result = rlhf(PROMPTS, *OPENAI, "--batch", *price, "--max-cost", 0.03, api=api)
        assert result.status == 3 and "--max-cost" in result.err and 0 < len(api.engine.keys) < 48
        first = len(api.engine.keys)
        again = rlhf(PROMPTS, *OPENAI, "--batch", *price, "--max-cost", 1, api=api)
        assert again.status == 0 and len(api.engine.keys) == 48 > first


START = "import sys, rlhf_constructor as rc; rc.BATCH_POLL = (0.02, 0.1); sys.exit(rc.main(sys.argv[1:]))"


def start(folder, api, *flags):
    """The program as a process of its own, that looks at its batches often."""
    env = api.env() | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", START, *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def test_killed_three_times_a_thousand_prompts_pay_only_failed_lines_twice(tmp_path):
    """1,000 prompts with a judge, 2 % failing lines, shuffled results: every pair is right."""
    source = write_jsonl(
        tmp_path / "in.jsonl", [{"prompt": f"What is {n} plus {n}?"} for n in range(1000)]
    )
    flags = (*OPENAI, "--batch", "--input-file", source, "--output-path", "out.jsonl")
    luck, failed = random.Random(3), []

    def answer(call):
        if luck.random() < 0.02:
            failed.append(call)
            return Fault(500)
        return world(call)

    with Api(answer) as api:
        api.engine.looks = 6
        moments = [
            lambda: api.engine.files,
            lambda: api.engine.batches,
            lambda: len(api.engine.files) > 4,
        ]
        for moment in moments:
            run = start(tmp_path, api, *flags)
            while run.poll() is None and not moment():
                time.sleep(0.005)
            run.send_signal(signal.SIGKILL)
            run.communicate()
        last = start(tmp_path, api, *flags)
        _, err = last.communicate(timeout=120)
        assert last.returncode == 0, err
        pairs = rows(tmp_path / "out.jsonl")
        assert (
            len(pairs) == 1000
            and all(map(belongs, pairs))
            and all("right" in p["chosen"] for p in pairs)
        )
        assert len(api.engine.keys) == 4000 + len(failed) and api.count() == 0


def interrupted(folder, api):
    """A run that Ctrl-C ends while its first two batches are at work -> its flags, to go on with."""
    source = write_jsonl(folder / "in.jsonl", PROMPTS)
    flags = (*OPENAI, "--batch", "--input-file", source, "--output-path", "out.jsonl")
    api.engine.looks = 10**9
    run = start(folder, api, *flags)
    while run.poll() is None and len(api.engine.batches) < 2:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130 and "Traceback" not in err
    api.engine.looks = 1
    return flags


def test_ctrl_c_leaves_the_batches_running_and_the_next_run_collects_them(tmp_path):
    with Api(world) as api:
        flags = interrupted(tmp_path, api)
        again = start(tmp_path, api, *flags)
        again.communicate(timeout=60)
        assert again.returncode == 0 and len(api.engine.keys) == 48 and len(api.engine.batches) == 3


def test_two_batch_runs_do_not_share_a_cache(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    flags = (*OPENAI, "--batch", "--input-file", source)
    with Api(world) as api:
        api.engine.looks = 10**9
        first = start(tmp_path, api, *flags, "--output-path", "a.jsonl")
        while first.poll() is None and not api.engine.batches:
            time.sleep(0.01)
        second = start(tmp_path, api, *flags, "--output-path", "b.jsonl")
        _, err = second.communicate(timeout=30)
        assert second.returncode == 2 and ".batch: another run is using it" in err
        first.kill()
        first.communicate()


@pytest.mark.skipif(not os.path.exists("/usr/bin/split"), reason="no split here")
def test_one_input_in_four_parts_on_one_cache_joins_to_the_bytes_of_a_single_run(process, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"Question {n}"} for n in range(41)])
    flags = (
        "--provider",
        "openai",
        "--high-model",
        "gpt-4o",
        "--low-model",
        "gpt-4o-mini",
        "--cache-path",
        "c.sqlite",
    )
    with Api(demo_world, latency=0.01) as api:
        subprocess.run(
            ["split", "-n", "l/4", "--additional-suffix=.jsonl", "in.jsonl", "part-"],
            cwd=tmp_path,
            check=True,
        )
        parts = sorted(path.name for path in tmp_path.glob("part-*.jsonl"))
        runs = [
            process("--input-file", part, *flags, "--output-path", f"out/{part}", api=api)
            for part in parts
        ]
        assert [run.communicate(timeout=60) and run.returncode for run in runs] == [0] * 4
        paid = api.count()
        whole = process("--input-file", "in.jsonl", *flags, "--output-path", "whole.jsonl", api=api)
        whole.communicate(timeout=60)
        assert paid == api.count() == len({(call.model, call.prompt) for call in api.calls})
    joined = b"".join((tmp_path / "out" / part).read_bytes() for part in parts)
    assert joined == (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_of_results_that_cannot_be_read_costs_nothing_again(rlhf):
    with Api(world) as api:
        api.engine.spoil = lambda lines: ["<html>gateway</html>"]
        result = rlhf(PROMPTS, *OPENAI, "--batch", api=api)
        assert result.status == 3 and "cannot be read yet" in result.err
        paid, api.engine.spoil = len(api.engine.keys), lambda lines: lines
        for batch in api.engine.batches.values():
            api.engine.finish(batch | {"id": batch["id"]})
        answered = {
            name: batch
            for name, batch in api.engine.batches.items()
            if batch.pop("output_file_id", 0)
        }
        for batch in answered.values():
            api.engine.finish(batch)  # the same answers, readable now
        api.engine.keys[paid:] = []
        assert rlhf(PROMPTS, *OPENAI, "--batch", api=api).status == 0
        assert len(api.engine.keys) == 48 and len(api.engine.batches) == 3


def test_a_batch_that_is_gone_at_the_provider_is_submitted_again(tmp_path):
    with Api(world) as api:
        flags = interrupted(tmp_path, api)
        api.engine.batches.clear()
        again = start(tmp_path, api, *flags)
        _, err = again.communicate(timeout=60)
    assert again.returncode == 0 and "gone at the provider" in err
    assert len(rows(tmp_path / "out.jsonl")) == 12 and len(api.engine.keys) == 48


def test_money_of_batches_under_way_counts_after_a_kill(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    price = ("--price", "strong=10/10", "--price", "weak=10/10", "--max-cost", 0.03)
    flags = (*OPENAI, "--batch", *price, "--input-file", source, "--output-path", "out.jsonl")
    with Api(world) as api:
        api.engine.looks = 10**9
        for _ in range(3):
            run = start(tmp_path, api, *flags)
            until = time.monotonic() + 20
            while run.poll() is None and not api.engine.batches and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.3)
            run.kill()
            run.communicate()
        sent = sum(
            api.engine.files[b["input_file_id"]].count(b"\n") for b in api.engine.batches.values()
        )
    assert 0 < sent * 400 * 10 / 1e6 * 0.5 <= 0.03, "an answer is taken for 400 tokens"


def test_what_was_used_once_is_not_replaced_by_a_late_batch(rlhf):
    with Api(world) as api:
        api.engine.creating = lambda requests: Fault(400, code="odd")
        assert rlhf(PROMPTS, *OPENAI, "--batch", api=api).status == 3
        online = rlhf(PROMPTS, *OPENAI, api=api)
        cache = rc.Cache(".rlhf_cache.sqlite")
        [(key,)] = cache.do("SELECT key FROM replies LIMIT 1")
        first = cache.get(key)
        cache.put(key, rc.Reply("another"), "strong")
        assert online.status == 0 and cache.get(key) == first
        cache.close()


def test_a_result_that_bills_no_tokens_costs_what_its_text_would(rlhf):
    silent = lambda line: json.dumps(
        json.loads(line) | {"response": unbilled(json.loads(line)["response"])}
    )
    unbilled = lambda response: response | {"body": response["body"] | {"usage": None}}
    with Api(world) as api:
        api.engine.spoil = lambda lines: list(map(silent, lines))
        result = rlhf(
            PROMPTS, *OPENAI, "--batch", "--price", "strong=1/1", "--price", "weak=1/1", api=api
        )
        assert result.status == 0 and result.err.count("strong: bills no tokens") == 1
        usage = json.loads(Path("out.report.json").read_text("utf-8"))["usage"]
        assert all(row["tokens_in"] and row["tokens_out"] and row["money"] for row in usage)


def killed_with_batches_under_way(tmp_path, api, price):
    """A run at out.jsonl whose batches stay under way -> money that is set aside for them."""
    source = write_jsonl(tmp_path / "in.jsonl", PROMPTS)
    api.engine.looks = 10**9
    run = start(
        tmp_path,
        api,
        *OPENAI,
        "--batch",
        *price,
        "--input-file",
        source,
        "--output-path",
        "out.jsonl",
    )
    while run.poll() is None and not under_way(tmp_path):
        time.sleep(0.01)
    run.kill()
    run.communicate()
    api.engine.looks = 0
    return under_way(tmp_path)


def under_way(folder):
    """Money in the table of batches, once the batches of both models are noted with their ids."""
    cache = rc.Cache(str(folder / ".rlhf_cache.sqlite"))
    with contextlib.closing(cache):
        rows = cache.do("SELECT money FROM batches WHERE id != ''")
    return sum(money for (money,) in rows) if len(rows) == 2 else 0


NAMES = ("strong", "weak", "other", "third")
PRICE = (*[part for name in NAMES for part in ("--price", f"{name}=10/10")], "--max-cost")
ONLINE = ("--high-model", "other", "--low-model", "third", "--judge-model", "other")


@pytest.mark.parametrize("more", [ONLINE, ("--batch", *ONLINE)], ids=["online", "batch"])
def test_money_of_batches_under_way_counts_in_every_run_of_the_output(rlhf, tmp_path, more):
    with Api(world) as api:
        aside = killed_with_batches_under_way(tmp_path, api, (*PRICE, 1))
        result = rlhf(PROMPTS, *OPENAI, *more, *PRICE, aside, api=api)
        assert result.status == 3 and "is under way. Raise it" in result.err
        assert (api.count(), len(api.engine.batches)) == (0, 2)
        assert rlhf(PROMPTS, *OPENAI, *PRICE, aside, "--dry-run", api=api).status == 0


def test_a_batch_is_paid_once_by_the_output_that_takes_it_in(rlhf, tmp_path):
    with Api(world) as api:
        assert killed_with_batches_under_way(tmp_path, api, (*PRICE, 1))
        flags = (*OPENAI, "--batch", *PRICE, 1)
        assert rlhf(PROMPTS, *flags, api=api, output="other.jsonl").status == 0
        assert len(api.engine.keys) == 48 and not under_way(tmp_path)
        for output, bills in (("out.jsonl", 0), ("other.jsonl", 2)):
            cache = rc.Cache(".rlhf_cache.sqlite", rc.digest(os.path.realpath(output))[:16])
            with contextlib.closing(cache):
                assert (len(cache.bill()), cache.under_way) == (bills, 0)


def test_what_a_round_brings_is_reckoned_with_in_that_round(rlhf):
    """replies of 40 tokens where 4,096 were possible: the first batch is small, all others are not"""
    prompts = [{"prompt": f"What is {n} plus {n}?"} for n in range(120)]
    price = ("--price", "strong=0/100", "--price", "weak=0/100", "--max-cost", 5)
    with Api(lambda call: Reply(world(call), tokens_out=40)) as api:
        assert rlhf(prompts, *OPENAI, "--batch", *price, api=api).status == 0
        assert len(api.engine.keys) == 480 and len(api.engine.batches) <= 8


# --- real servers and real models (one reading of a reply and of an error, online and in a batch)

FEW = PROMPTS[:3]


@pytest.mark.parametrize(
    "fault",
    [Fault(404, code="not_found"), Fault(405, code="x"), Fault(404, kind="html")],
    ids=["404", "405", "404 web page"],
)
@pytest.mark.parametrize("where", ["uploading", "creating"])
def test_a_server_without_a_batch_engine_is_named(rlhf, where, fault):
    with Api(world) as api:
        setattr(api.engine, where, lambda *_: fault)
        result = rlhf(FEW, *OPENAI, "--batch", api=api)
    assert result.status == 3 and api.count() == 0
    assert "this server has no batch engine: leave out --batch" in result.err


def test_a_provider_without_a_batch_client_is_named(rlhf, monkeypatch):
    monkeypatch.setattr(rc.ask_openai, "batch_client", rc.Provider.batch_client)
    with Api(world) as api:
        result = rlhf(FEW, *OPENAI, "--batch", api=api)
    assert result.status == 3 and "this server has no batch engine: leave out --batch" in result.err


def test_a_bug_of_a_providers_own_batch_client_is_shown_as_one(rlhf, monkeypatch):
    monkeypatch.setattr(rc.ask_openai, "batch_client", lambda self: SimpleNamespace(files=None))
    with Api(world) as api:
        with pytest.raises(AttributeError, match="create"):
            rlhf(FEW, *OPENAI, "--batch", api=api)


def test_a_page_of_a_gateway_while_a_batch_runs_does_not_make_it_again(rlhf, monkeypatch):
    """The look is answered by a web page with 404: the batch may well be there."""
    with Api(world) as api:
        api.engine.looking = lambda: Fault(404, kind="html")
        result = rlhf(FEW, *OPENAI, "--batch", "--max-retries", 0, api=api)
        assert result.status == 3
        api.engine.looking = lambda: None
        assert rlhf(FEW, *OPENAI, "--batch", api=api).status == 0
        assert len(api.engine.batches) == 3 and len(api.engine.keys) == 12


@pytest.mark.parametrize("where", ["uploading", "creating", "line", "failed"])
def test_dashscopes_limit_per_minute_is_waited_for(rlhf, where):
    """Its compatible mode calls a limit per minute insufficient_quota, which is no empty account."""
    faults = [Fault(429, code="insufficient_quota")]
    once = lambda *_: faults.pop() if faults else None
    with Api(world) as api:
        if where == "line":
            api.engine.answer = lambda call: once() or world(call)
        elif where == "failed":
            api.engine.ends = lambda *_: "failed:insufficient_quota" if once() else "completed"
        else:
            setattr(api.engine, where, once)
        result = rlhf(FEW, *DASHSCOPE, "--batch", api=api)
        assert (result.status, len(result.pairs)) == (0, 3) and not faults


READINGS = {
    "unknown finish": (Reply("cut off", finish="error"), 3, "unfinished reply"),
    "filtered": (Reply("", finish="content_filter"), 1, "content filter"),
    "filtered, null": (Reply("", "content_filter", content=None), 1, "content filter"),
    "SAFETY": (Reply("half", finish="SAFETY"), 1, "content filter"),
    "no text": (Reply("", content=None), 2, "no text in the reply"),
    "only thoughts": (
        Reply("", content=None, more={"reasoning_content": "hm"}),
        1,
        "only thoughts came",
    ),
    "tool call": (Reply("", finish="tool_calls", content=None), 1, "tool call"),
}


@pytest.mark.parametrize("kind", READINGS)
def test_a_result_is_read_like_a_reply_online(rlhf, kind):
    reply, sent, reason = READINGS[kind]
    odd = lambda call: call.model == "weak" and "1 plus" in call.prompt
    with Api(lambda call: reply if odd(call) else world(call)) as api:
        result = rlhf(FEW, *OPENAI, "--batch", "--max-retries", 2, api=api)
        assert len(result.pairs) == 2 and result.dropped[0]["reason"].startswith(reason)
        assert sum(map(odd, api.engine.calls)) == sent
        if reason == "content filter":  # it is remembered
            rlhf(FEW, *OPENAI, "--batch", api=api)
            assert sum(map(odd, api.engine.calls)) == 1


def test_the_text_of_a_refusal_field_is_the_answer(rlhf):
    refusal = Reply("", content=None, more={"refusal": "I cannot help with that."})
    with Api(lambda call: refusal if call.model == "weak" else world(call)) as api:
        result = rlhf(FEW, *OPENAI, "--batch", api=api)
    assert [pair["rejected"] for pair in result.pairs] == ["I cannot help with that."] * 3


@pytest.mark.parametrize(
    "text, sent",
    [("half", [4096, 8192]), (None, [4096, 8192]), ("over and over again " * 90, [4096])],
    ids=["cut", "null", "loop"],
)
def test_a_cut_reply_is_asked_for_once_more_unless_it_loops(rlhf, text, sent):
    cut = Reply(text or "", finish="length", content=text)
    with Api(lambda call: cut if call.model == "weak" else world(call)) as api:
        for _ in range(2):
            result = rlhf(FEW[:1], *OPENAI, "--batch", api=api)
            assert result.dropped[0]["reason"].startswith("truncated: weak")
    limits = [call.params["max_tokens"] for call in api.engine.calls if call.model == "weak"]
    assert limits == sent


def test_a_longer_request_that_is_refused_is_not_sent_again(rlhf):
    too_long = "maximum context length is 6000 tokens, you requested 8197 (5 in the messages)"

    def answer(call):
        if call.model == "weak" and call.params["max_tokens"] > 4096:
            return Fault(400, message=too_long)
        return Reply("half", finish="length") if call.model == "weak" else world(call)

    with Api(answer) as api:
        result = rlhf(FEW[:1], *OPENAI, "--batch", api=api)
    assert result.dropped[0]["reason"].startswith("truncated")
    assert sum(call.model == "weak" for call in api.engine.calls) == 2


def test_a_longer_request_may_need_a_fix(rlhf):
    def answer(call):
        if call.model == "weak" and call.params["max_tokens"] == 4096:
            return Reply("half", finish="length")
        if call.model == "weak" and "temperature" in call.params:
            return Fault(400, message="temperature is not supported")
        return world(call)

    with Api(answer) as api:
        assert len(rlhf(FEW[:1], *OPENAI, "--batch", api=api).pairs) == 1


BODIES = {
    "text": {"error": "the model is overloaded"},
    "detail": {"detail": "the model is overloaded"},
    "list": [{"error": {"code": 503, "message": "the model is overloaded"}}],
}


@pytest.mark.parametrize("shape", BODIES)
def test_the_servers_own_words_are_read_from_a_failed_line(rlhf, shape):
    def spoil(lines):
        results = [json.loads(line) for line in lines]
        for result in results:
            if result["response"]["status_code"] == 503:
                result["response"]["body"] = BODIES[shape]
        return list(map(json.dumps, results))

    odd = lambda call: call.model == "weak" and "1 plus" in call.prompt
    with Api(lambda call: Fault(503) if odd(call) else world(call)) as api:
        api.engine.spoil = spoil
        result = rlhf(FEW, *OPENAI, "--batch", "--max-retries", 0, api=api)
    reason = "server error: weak: 503: the model is overloaded"
    assert [row["reason"] for row in result.dropped] == [reason] and result.status == 1


def test_a_line_without_a_response_is_sent_again(rlhf):
    expired = {"code": "batch_expired", "message": "the window was over"}
    spoilt = []

    def spoil(lines):
        if not spoilt:
            spoilt.append(json.loads(lines[0]) | {"response": None, "error": expired})
            return [json.dumps(spoilt[0]), *lines[1:]]
        return lines

    with Api(world) as api:
        api.engine.spoil = spoil
        assert len(rlhf(FEW, *OPENAI, "--batch", api=api).pairs) == 3
        assert api.engine.keys.count(spoilt[0]["custom_id"]) == 2


def test_an_unknown_model_lists_what_the_server_serves(rlhf):
    with Api(lambda call: Fault(404) if call.model == "weak" else world(call)) as api:
        api.models = ["weak-2", "strong"]
        result = rlhf(FEW, *OPENAI, "--batch", api=api)
    assert result.status == 3 and "the server serves weak-2, strong" in result.err


def test_a_fix_is_kept_only_if_the_changed_request_succeeds(rlhf):
    """One odd 400 that speaks of the temperature takes it from no other request."""
    odd = lambda call: call.model == "weak" and "1 plus" in call.prompt
    fault = Fault(400, message="temperature: a strange thing happened")
    with Api(lambda call: fault if odd(call) else world(call)) as api:
        result = rlhf(FEW, *OPENAI, "--batch", api=api)
        assert len(result.pairs) == 2 and "no temperature" not in result.err
        rest = [call for call in api.engine.calls if not odd(call)]
    assert all("temperature" in call.params for call in rest)


def test_a_system_turn_that_is_refused_is_folded_into_the_first_user_turn(rlhf):
    def answer(call):
        if call.messages[0]["role"] == "system":
            return Fault(400, message="System role not supported")
        return world(call)

    with Api(answer) as api:
        result = rlhf(FEW, *OPENAI, "--batch", "--system-prompt", "Be kind.", api=api)
        folded = [
            c for c in api.engine.calls if c.messages[0]["role"] != "system" and not is_judge(c)
        ]
    assert len(result.pairs) == 3 and result.err.count("the system turn becomes part") == 2
    assert all(call.prompt.startswith("Be kind.\n\nWhat") for call in folded)
    assert all("fold_system" not in call.params for call in api.engine.calls)


def test_a_model_that_only_streams_stops_a_batch(rlhf):
    fault = Fault(400, message="This model only support stream mode")
    with Api(lambda call: fault if call.model == "weak" else world(call)) as api:
        result = rlhf(FEW, *OPENAI, "--batch", api=api)
    assert result.status == 3 and "weak: the model only streams its replies" in result.err
    assert sum(call.model == "weak" for call in api.engine.calls) == 3


def test_another_served_model_is_said_once(rlhf):
    with Api(lambda call: Reply(world(call), model=f"{call.model[0]}-7b")) as api:
        result = rlhf(FEW, *OPENAI, "--batch", api=api)
    assert result.status == 0
    assert result.err.count("asked for weak, the server answers as w-7b") == 1


def test_one_model_behind_both_names_stops_the_run(rlhf):
    with Api(lambda call: Reply(world(call), model="gemma")) as api:
        result = rlhf(FEW, *OPENAI, "--batch", api=api)
        assert result.status == 3 and "are both answered by gemma" in result.err
        assert len(api.engine.batches) == 2


def test_another_seed_asks_for_other_answers(rlhf):
    with Api(world) as api:
        rlhf(FEW, *OPENAI, "--batch", "--seed", 1, api=api)
        rlhf(FEW, *OPENAI, "--batch", "--seed", 2, api=api)
        seeds = {call.params["seed"] for call in api.engine.calls if not is_judge(call)}
        assert len(seeds) == 2
        assert len(rlhf(FEW, *OPENAI, "--seed", 2, api=api).pairs) == 3 and api.count() == 0


def test_the_progress_is_told_in_plain_words(rlhf):
    with Api(world) as api:
        err = rlhf(FEW, *OPENAI, "--batch", api=api).err
    assert "batch batch-1 (strong): in progress, 0 of 3 done, 0 failed" in err
    assert "batch batch-1 (strong): completed, 3 of 3 done, 0 failed" in err


@pytest.mark.parametrize(
    "moment",
    [
        "INSERT INTO batches",
        "UPDATE batches SET id",
        "DELETE FROM batches",
        "UPDATE wanted SET file = ''",
    ],
)
def test_killed_at_each_step_of_the_bookkeeping_nothing_is_submitted_twice(
    rlhf, monkeypatch, moment
):
    """As SIGKILL between two statements: what is not committed is gone, what was submitted stays."""
    do = rc.Cache.do

    def killed(cache, sql, *values):
        if sql.startswith(moment):
            raise KeyboardInterrupt
        return do(cache, sql, *values)

    with Api(world) as api:
        with monkeypatch.context() as patched:
            patched.setattr(rc.Cache, "do", killed)
            assert rlhf(FEW, *OPENAI, "--batch", api=api).status == 130
        assert rlhf(FEW, *OPENAI, "--batch", api=api).status == 0
        assert len(api.engine.batches) == 3 and len(api.engine.keys) == 12
