"""every row of a format has the same keys in the same order, and values that loaders take."""

import json

import pytest

import rlhf_constructor as rc
from tests.tiny import pair, run_of

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
         {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "6 by 7?"}]  # fmt: skip
FLAT = "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: 6 by 7?"
GOOD, BAD = {"role": "assistant", "content": "42"}, {"role": "assistant", "content": "41"}


def made(scores=(9, 3), models=("strong", "weak"), turns=TURNS) -> rc.Pair:
    chosen, rejected = (rc.Answer(t, m, s) for t, m, s in zip(("42", "41"), models, scores))
    return rc.Pair(rc.Record(turns, "the reference"), chosen, rejected)


PROMPT_ID = rc.digest(TURNS)[:16]
ROWS = {
    "standard": [{"prompt": FLAT, "chosen": "42", "rejected": "41", "score_chosen": 9.0, "score_rejected": 3.0,
                  "chosen_model": "strong", "rejected_model": "weak", "prompt_id": PROMPT_ID}],
    "basic": [{"prompt": FLAT, "chosen": "42", "rejected": "41"}],
    "conversational": [{"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]}],
    "chatml": [{"messages": TURNS, "chosen": GOOD, "rejected": BAD}],
    "openai": [{"input": {"messages": TURNS}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}],
    "swift": [{"messages": [*TURNS, GOOD], "rejected_response": "41"}],
    "kto": [{"prompt": FLAT, "completion": "42", "label": True}, {"prompt": FLAT, "completion": "41", "label": False}],
    "prompts": [{"prompt": TURNS}],
}  # fmt: skip


def test_every_format_is_tested():
    assert set(ROWS) == set(rc.OUTPUTS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_exactly_this(name):
    rows = rc.OUTPUTS[name](made(), run_of())
    assert rows == ROWS[name] and [list(row) for row in rows] == [list(row) for row in ROWS[name]]


@pytest.mark.parametrize("name", ROWS)
def test_keys_and_their_order_never_change(name):
    pairs = [
        made(),
        made(models=("", "")),
        made(turns=TURNS[-1:]),
        made(scores=(1, 10)),
        pair("是", "否"),
    ]
    keys = {tuple(tuple(row) for row in rc.OUTPUTS[name](one, run_of())) for one in pairs}
    assert len(keys) == 1


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("scores", [(9, 3), (9.0, 2.5), (10**3, -7), (None, None)])
def test_a_row_holds_no_null_and_reads_back_as_it_is(name, scores):
    for row in rc.OUTPUTS[name](made(scores=scores), run_of()):
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        assert "null" not in text and json.loads(text) == row


@pytest.mark.parametrize("scores", [(None, None), (9, None), (None, 3)])
def test_score_columns_are_left_out_together(scores):
    [row] = rc.as_standard(made(scores=scores), run_of())
    assert list(row) == [
        "prompt",
        "chosen",
        "rejected",
        "chosen_model",
        "rejected_model",
        "prompt_id",
    ]


@pytest.mark.parametrize("human, by", [(True, "people"), (False, "scores")])
def test_with_annotations_every_row_says_who_decided(human, by):
    run = run_of()
    run.writes_decided_by = True
    one = made()
    one.human = human
    [row] = rc.as_standard(one, run)
    assert list(row)[-1] == "decided_by" and row["decided_by"] == by


def test_a_lone_user_turn_is_the_prompt_itself():
    assert rc.as_basic(made(turns=TURNS[-1:]), run_of())[0]["prompt"] == "6 by 7?"


def test_kto_labels_by_the_pair_where_nobody_gave_a_score():
    rows = rc.as_kto(made(scores=(None, None)), run_of("--min-chosen-score", "6"))
    assert [row["label"] for row in rows] == [True, False]


def test_neither_reference_nor_rubric_leaks_into_a_row():
    for name in rc.OUTPUTS:
        assert "the reference" not in json.dumps(rc.OUTPUTS[name](made(), run_of()))
