"""The files train: each format loads with `datasets` and moves a tiny random model a few steps in TRL, on CPU.

    pip install -r tests/requirements-trl.txt && python -m pytest tests/test_trl.py

Without these packages the tests are skipped. No model is downloaded: it is made here, at random."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import DATA, ROOT
from tests.test_formats import RANK, mixed

pytestmark = pytest.mark.trl
torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

STEPS = 3
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE trained on the example data, with a chat template."""
    texts = (DATA / "preference_pairs.jsonl").read_text("utf-8").splitlines()
    model = tokenizers.ByteLevelBPETokenizer()
    special = ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    model.train_from_iterator(texts, vocab_size=600, special_tokens=special)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=special[2:],
    )
    wrapped.chat_template = CHAT
    return wrapped


@pytest.fixture
def shape(tokenizer):
    """Two layers of 32."""
    return transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def causal(shape):
    """A language model with the same random weights every time: the trained one and its reference."""
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(shape)


@pytest.fixture
def loaded(rlhf, tmp_path, monkeypatch):
    """loaded(source, *flags) -> the program's output as `datasets` loads it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def load(source, *flags):
        result = rlhf(source, *RANK, *flags)
        assert result.status == 0
        made = datasets.load_dataset(
            "json", data_files=str(result.output), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert len(made) == len(result.output.read_text("utf-8").splitlines())
        return made

    return load


def settings(kind, path, **more):
    """A trainer's config: a few small steps on CPU, nothing saved, nothing reported."""
    return kind(
        output_dir=str(path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        **more,
    )


def trained(trainer):
    """Train; every step has a finite loss, and the weights have moved."""
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and all(0 < loss < 20 for loss in losses)
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters()))


PAIRS = [
    pytest.param("preference_pairs.jsonl", "basic", id="basic"),
    pytest.param("preference_pairs.jsonl", "standard", id="standard, with scores"),
    pytest.param("ranked_answers.jsonl", "standard", id="standard, without scores"),
    pytest.param("preference_pairs.jsonl", "conversational", id="conversational"),
]


@pytest.mark.parametrize("source, name", PAIRS)
def test_a_reward_model_trains(loaded, shape, tokenizer, tmp_path, source, name):
    data = loaded(DATA / source, "--output-format", name)
    shape.num_labels = 1
    torch.manual_seed(0)
    model = transformers.Qwen2ForSequenceClassification(shape)
    args = settings(trl.RewardConfig, tmp_path / "rm")
    trainer = trl.RewardTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer
    )
    assert len(trainer.train_dataset) == len(data)
    trained(trainer)


@pytest.mark.parametrize("source, name", PAIRS)
def test_dpo_trains(loaded, shape, tokenizer, tmp_path, source, name):
    data = loaded(DATA / source, "--output-format", name)
    model, reference = causal(shape), causal(shape)
    args = settings(trl.DPOConfig, tmp_path / "dpo")
    trained(
        trl.DPOTrainer(model, reference, args=args, train_dataset=data, processing_class=tokenizer)
    )


@pytest.mark.parametrize(
    "flags",
    [pytest.param((), id="by choice"), pytest.param(("--min-chosen-score", 9), id="by score")],
)
def test_kto_trains(loaded, shape, tokenizer, tmp_path, flags):
    data = loaded(DATA / "preference_pairs.jsonl", "--output-format", "kto", *flags)
    assert data.features["label"].dtype == "bool" and set(data["label"]) == {True, False}
    model, reference = causal(shape), causal(shape)
    args = settings(trl.KTOConfig, tmp_path / "kto")
    trained(
        trl.KTOTrainer(model, reference, args=args, train_dataset=data, processing_class=tokenizer)
    )


def test_prompts_load_as_prompt_only(loaded, tokenizer):
    data = loaded(DATA / "ranked_answers.jsonl", "--output-format", "prompts")
    assert data.column_names == ["prompt"] and trl.is_conversational(data[0])
    text = trl.apply_chat_template(data[0], tokenizer)["prompt"]
    assert text.startswith("<|user|>") and text.endswith("<|assistant|>")


@pytest.mark.parametrize(
    "name", ["basic", "standard", "conversational", "chatml", "openai", "kto", "prompts"]
)
def test_every_format_loads_to_what_was_written(loaded, tmp_path, name):
    data = loaded(DATA / "preference_pairs.jsonl", "--output-format", name)
    with open(tmp_path / "out.jsonl", encoding="utf-8") as file:
        assert data.to_list() == [json.loads(line) for line in file]


@pytest.mark.parametrize(
    "scores_last",
    [
        pytest.param(False, id="scores in the first 12 MB only"),
        pytest.param(True, id="scores at the end only"),
    ],
)
def test_20_megabytes_of_mixed_input_load_with_one_type_per_column(loaded, scores_last):
    data = loaded(list(mixed(20, scores_last)))
    assert set(data.column_names) == {
        "prompt",
        "chosen",
        "rejected",
        "chosen_model",
        "rejected_model",
        "prompt_id",
    }
    assert {feature.dtype for feature in data.features.values()} == {"string"}
    assert data.data.nbytes > 20_000_000


def test_20_megabytes_of_scored_pairs_keep_their_floats(loaded):
    records = [record for record in mixed(33) if "score_a" in record]
    data = loaded(records, "--min-score-gap", 0.1)
    assert data.features["score_chosen"].dtype == data.features["score_rejected"].dtype == "float64"
    assert data.data.nbytes > 19_000_000


# --- the README's programs, as printed: on the CPU, one step each, with a random model where its name leads to

ON_CPU = """import runpy, sys, transformers
old = transformers.TrainingArguments.__post_init__
def on_cpu(self):
    self.use_cpu, self.max_steps = True, 1
    old(self)
transformers.TrainingArguments.__post_init__ = on_cpu
runpy.run_path(sys.argv[1], run_name="__main__")
"""
README = (ROOT / "README.md").read_text("utf-8")
PROGRAMS = re.findall(r"<!-- trl: (\S+) -->\n```python\n(.*?)```", README, re.S)


def test_the_programs_of_the_readme_train_in_the_order_in_which_they_stand(
    rlhf, shape, tokenizer, tmp_path
):
    named = {name for _, program in PROGRAMS for name in re.findall(r'model="([^"]+)"', program)}
    for name in named:
        causal(shape).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pairs = rlhf(
        DATA / "alpaca_demo.jsonl", "--provider", "offline", output="data/rlhf_preference.jsonl"
    )
    for line in (
        re.search(r"<!-- convert -->\n```bash\n(.*?)```", README, re.S)[1]
        .replace("\\\n", "")
        .splitlines()
    ):
        flags = line.split()[2:]
        made = rlhf(pairs.output, *flags, output=flags[flags.index("--output-path") + 1])
        assert made.status == 0 and made.pairs
    (tmp_path / "on_cpu.py").write_text(ON_CPU)
    for number, (source, program) in enumerate(PROGRAMS):
        assert source in program and (tmp_path / source).exists()
        (tmp_path / f"{number}.py").write_text(program)
        command = [sys.executable, "on_cpu.py", f"{number}.py"]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "'train_loss': " in done.stdout, done.stderr[-2000:]
    assert PROGRAMS
