"""each format is what its trainer takes, the same from the first line to the last, and can be read back."""

import json
import random
from collections import Counter

import pytest

from tests.conftest import DATA, rows, write_jsonl

TALKS, RANKED, PAIRS = (
    DATA / "conversations.jsonl",
    DATA / "ranked_answers.jsonl",
    DATA / "preference_pairs.jsonl",
)
OFFLINE = ("--provider", "offline", "--report-path", "none")
RANK = (*OFFLINE, "--method", "rank_responses")
TEXT = str
ANSWER = {"role": "assistant", "content": str}
TURNS = [{"role": ("system", "user", "assistant"), "content": str}]  # the last one is the user's
TALK = [{"role": ("system", "user", "assistant"), "content": str}]  # the last one is an answer

SHAPES = {
    "basic": {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT},
    "standard": {
        "prompt": TEXT,
        "chosen": TEXT,
        "rejected": TEXT,
        "score_chosen": float,
        "score_rejected": float,
        "chosen_model": TEXT,
        "rejected_model": TEXT,
        "prompt_id": TEXT,
    },
    "conversational": {"prompt": TURNS, "chosen": [ANSWER], "rejected": [ANSWER]},
    "chatml": {"messages": TURNS, "chosen": ANSWER, "rejected": ANSWER},
    "openai": {
        "input": {"messages": TURNS},
        "preferred_output": [ANSWER],
        "non_preferred_output": [ANSWER],
    },
    "swift": {"messages": TALK, "rejected_response": TEXT},
    "kto": {"prompt": TEXT, "completion": TEXT, "label": bool},
    "prompts": {"prompt": TURNS},
}
PAIR_FORMATS = [
    "basic",
    "standard",
    "conversational",
    "chatml",
    "openai",
    "swift",
]


def fits(value, shape) -> bool:
    """Exactly this shape: the same keys, no null, a list of one message or any number of turns."""
    if shape is TURNS or shape is TALK:
        last = "user" if shape is TURNS else "assistant"
        ends = bool(value) and value[-1]["role"] == last
        return ends and all(
            set(m) == {"role", "content"} and m["role"] in TURNS[0]["role"] and m["content"].strip()
            for m in value
        )
    if isinstance(shape, dict):
        return (
            isinstance(value, dict)
            and value.keys() == shape.keys()
            and all(fits(value[k], shape[k]) for k in shape)
        )
    if isinstance(shape, list):
        return isinstance(value, list) and len(value) == 1 and fits(value[0], shape[0])
    return type(value) is shape if isinstance(shape, type) else value == shape


# --- What a row looks like.


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "source, flags",
    [
        pytest.param(TALKS, OFFLINE, id="generated for conversations"),
        pytest.param(RANKED, RANK, id="ranked answers"),
    ],
)
def test_every_row_has_exactly_the_documented_shape(rlhf, source, flags, name):
    result = rlhf(source, *flags, "--output-format", name)
    shape = dict(SHAPES[name])
    if (
        source == RANKED and name == "standard"
    ):  # some of its records carry choices: no scores in the whole file
        del shape["score_chosen"], shape["score_rejected"]
    assert result.status == 0 and len(result.pairs) >= 15
    assert all(fits(row, shape) for row in result.pairs)


@pytest.mark.parametrize("name", ["conversational", "chatml", "openai", "swift", "prompts"])
def test_turns_and_system_prompts_are_kept(rlhf, name):
    plain = rlhf(TALKS, *OFFLINE, "--output-format", name).pairs
    chats = [row.get("messages") or row.get("prompt") or row["input"]["messages"] for row in plain]
    roles = Counter(message["role"] for chat in chats for message in chat)
    assert roles["system"] and roles["assistant"] and roles["user"] >= len(chats)


@pytest.mark.parametrize("name", ["basic", "standard", "kto"])
def test_turns_become_one_text_with_one_warning_that_names_conversational(rlhf, name):
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Is ice cold?"),
    ]
    record = {"prompt": [{"role": role, "content": text} for role, text in turns]}
    answers = {"responses": ["Yes, at zero degrees or below.", "Never."]}
    result = rlhf(
        [record | answers | {"scores": [9, hi]} for hi in (1, 2)], *RANK, "--output-format", name
    )
    flat = "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello!\n\nUser: Is ice cold?"
    assert {row["prompt"] for row in result.pairs} == {flat}
    assert result.err.count("--output-format conversational") == 1


@pytest.mark.parametrize("name", ["conversational", "chatml", "openai", "swift", "prompts"])
def test_formats_that_keep_turns_do_not_warn(rlhf, name):
    assert "turns become one text" not in rlhf(TALKS, *OFFLINE, "--output-format", name).err


def test_lone_turns_need_no_warning(rlhf):
    assert "conversational" not in rlhf(PAIRS, *RANK).err


# --- kto and prompts: rows that are not pairs.

THREE = ["Yes, at zero degrees or below.", "I think so.", "Never."]
SCORED = {"prompt": "Is ice cold?", "responses": THREE, "scores": [9, 6, 2]}


@pytest.mark.parametrize(
    "flags, labels",
    [
        pytest.param((), {0: True, 2: False}, id="by choice"),
        pytest.param(
            ("--min-chosen-score", 5), {0: True, 2: False}, id="by score, one on each side"
        ),
        pytest.param(("--min-chosen-score", 9.5), {0: False, 2: False}, id="by score, both poor"),
        pytest.param(("--min-chosen-score", 1), {0: True, 2: True}, id="by score, both good"),
        pytest.param(
            ("--min-chosen-score", 5, "--strategy", "all_pairs"),
            {0: True, 1: True, 2: False},
            id="by score, all answers",
        ),
        pytest.param(
            ("--min-chosen-score", 7, "--strategy", "adjacent"),
            {0: True, 1: False, 2: False},
            id="by score, adjacent",
        ),
    ],
)
def test_kto_labels(rlhf, flags, labels):
    made = rlhf([SCORED], *RANK, "--output-format", "kto", *flags).pairs
    assert sorted((row["completion"], row["label"]) for row in made) == sorted(
        (THREE[index], label) for index, label in labels.items()
    )


@pytest.mark.parametrize("strategy", ["all_pairs", "adjacent"])
def test_kto_by_choice_is_refused_where_one_answer_would_be_both_good_and_bad(rlhf, strategy):
    result = rlhf([SCORED], *RANK, "--output-format", "kto", "--strategy", strategy)
    assert result.status == 2 and "--min-chosen-score" in result.err and not result.output.exists()


def labels_of(result) -> dict:
    """(prompt, completion) -> the set of its labels."""
    labels = {}
    for row in result.pairs:
        labels.setdefault((row["prompt"], row["completion"]), set()).add(row["label"])
    return labels


@pytest.mark.parametrize(
    "records, flags",
    [
        pytest.param(
            [{"prompt": "Is ice cold?", "responses": THREE, "ranks": [1, 2, 3]}],
            ("--strategy", "all_pairs", "--min-chosen-score", 5),
            id="ranks have no score to label by",
        ),
        pytest.param(
            [
                {"prompt": "Is ice cold?", "chosen": THREE[0], "rejected": THREE[1]},
                {"prompt": "Is ice cold?", "chosen": THREE[1], "rejected": THREE[2]},
            ],
            (),
            id="one prompt, several pairs",
        ),
    ],
)
def test_no_completion_is_labelled_both_ways(rlhf, records, flags):
    labels = labels_of(rlhf(records, *RANK, "--output-format", "kto", *flags))
    assert labels and all(len(both) == 1 for both in labels.values())


@pytest.mark.parametrize(
    "source", [pytest.param(RANKED, id="ranked answers"), pytest.param(PAIRS, id="ready pairs")]
)
def test_kto_has_each_prompt_with_a_good_and_a_bad_completion(rlhf, source):
    labels = labels_of(rlhf(source, *RANK, "--output-format", "kto"))
    per_prompt = Counter((prompt, *label) for (prompt, _), label in labels.items())
    assert len(labels) >= 60 and set(per_prompt.values()) == {1}


@pytest.mark.parametrize(
    "records, flags",
    [
        pytest.param([SCORED], ("--strategy", "all_pairs"), id="three pairs of one record"),
        pytest.param([SCORED, SCORED | {"scores": [9, 5, 1]}], (), id="a prompt that comes twice"),
    ],
)
def test_a_prompt_is_written_once(rlhf, records, flags):
    result = rlhf(records, *RANK, "--output-format", "prompts", *flags)
    assert result.pairs == [{"prompt": [{"role": "user", "content": "Is ice cold?"}]}]


# --- Round trips: what is written is an input.


@pytest.mark.parametrize("name", PAIR_FORMATS)
@pytest.mark.parametrize(
    "source, flags",
    [
        pytest.param(TALKS, OFFLINE, id="conversations"),
        pytest.param(RANKED, RANK, id="ranked answers"),
        pytest.param(PAIRS, RANK, id="ready pairs"),
    ],
)
def test_pairs_that_were_written_are_read_back_as_the_same_pairs(rlhf, source, flags, name):
    first = rlhf(source, *flags, "--output-format", name, output="first.jsonl")
    again = rlhf(first.output, *RANK, "--output-format", name, output="again.jsonl")
    written, read = first.pairs, again.pairs
    for row in written + read:
        row.pop("prompt_id", None)  # turns that a string format made one text have another id
    assert len(written) >= 15 and read == written and not again.dropped


@pytest.mark.parametrize(
    "source, method",
    [
        pytest.param(TALKS, "model_comparison", id="model_comparison"),
        pytest.param(DATA / "alpaca_demo.jsonl", "generate_pairs", id="generate_pairs"),
    ],
)
def test_a_candidates_file_gives_the_same_pairs(rlhf, source, method):
    flags = ("--output-format", "standard", "--min-score-gap", 2)
    made = rlhf(
        source,
        *OFFLINE,
        "--method",
        method,
        "--candidates-path",
        "all.jsonl",
        *flags,
        output="first.jsonl",
    )
    again = rlhf("all.jsonl", *RANK, *flags, output="again.jsonl")
    assert len(made.pairs) >= 10 and again.pairs == made.pairs


def test_a_candidates_file_holds_every_answer_with_its_model_and_score(rlhf, tmp_path):
    rlhf(TALKS, *OFFLINE, "--candidates-path", "all.jsonl")
    for row in rows(tmp_path / "all.jsonl"):
        assert list(row) == ["prompt", "prompt_id", "completions"] and fits(row["prompt"], TURNS)
        assert [answer["model"] for answer in row["completions"]] == ["reference", "weakened"]
        assert all(
            isinstance(answer["score"], float) and len(answer["votes"]) == 2
            for answer in row["completions"]
        )


# --- One type per column, from the first line to the last.


def kind(value):
    """What a loader makes of a value: a list is what its items are, an object what its fields are."""
    if isinstance(value, dict):
        return tuple((name, kind(one)) for name, one in value.items())
    if isinstance(value, list):
        return ("list", frozenset(map(kind, value)))
    return type(value).__name__


def schemas(path) -> Counter:
    """How many lines there are of each schema: key names in order, with their types."""
    with open(path, encoding="utf-8") as file:
        return Counter(kind(json.loads(line)) for line in file)


def mixed(megabytes, scores_last=False):
    """Records of many kinds, with scores first (10 MB fix a loader's types) and without them later."""
    draw, size = random.Random(5), 4_000
    count = megabytes * 10**6 // (2 * size)
    letters = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz   .,", k=10**6))

    def text(half):
        start = draw.randrange(half * 500_000, half * 500_000 + 490_000)
        return "x" + letters[start : start + size] + "x"

    for i in range(count):
        a, b, early = text(0), text(1), (i < 0.6 * count) != scores_last
        pair = {"prompt": f"Question {i}?", "response_a": a, "response_b": b}
        if early:
            number = draw.choice([draw.randint(2, 9), draw.random() + 1, "7.5", 8.0])
            yield pair | {"model_a": "m", "score_a": number, "score_b": draw.choice([0, 0.5, "1"])}
        elif i % 3:
            yield pair | {"model_a": None, "model_b": 7, "winner": draw.choice("ab")}
        else:
            turn = [{"role": "user", "content": f"Question {i}?", "name": None}]
            yield {
                "messages": turn,
                "chosen": {"role": "assistant", "content": a},
                "rejected": {"role": "assistant", "content": b},
            }


def test_20_megabytes_of_mixed_input_keep_one_type_per_column(rlhf, tmp_path):
    source = write_jsonl(tmp_path / "mixed.jsonl", mixed(20, scores_last=True))
    result = rlhf(source, *RANK)
    assert result.status == 0 and result.output.stat().st_size > 20_000_000 and not result.dropped
    names = ("prompt", "chosen", "rejected", "chosen_model", "rejected_model", "prompt_id")
    assert list(schemas(result.output)) == [tuple((name, "str") for name in names)]
    assert "score columns are left out of the whole file" in result.err


def test_scores_are_floats_whatever_the_input_held(rlhf):
    scores = [(9, 2), ("7", "3.5"), (8.5, 1)]
    records = [
        {"prompt": f"Is ice cold, {i}?", "responses": THREE[:2], "scores": s}
        for i, s in enumerate(scores)
    ]
    result = rlhf(records, *RANK)
    exported = [(row["score_chosen"], row["score_rejected"]) for row in result.pairs]
    assert exported == [(9.0, 2.0), (7.0, 3.5), (8.5, 1.0)] and len(schemas(result.output)) == 1
    assert '"score_chosen": 9.0' in result.output.read_text("utf-8")


@pytest.mark.parametrize("name", ["conversational", "chatml", "openai", "kto", "prompts"])
def test_mixed_input_keeps_one_schema_in_every_format(rlhf, name):
    result = rlhf(list(mixed(1)), *RANK, "--output-format", name)
    assert len(result.pairs) > 100 and len(schemas(result.output)) == 1
