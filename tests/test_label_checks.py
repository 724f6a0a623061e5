"""A judge beside labels that exist: a pair needs both, and the label alone says which is chosen."""

import json

import pytest

import rlhf_constructor as rc
from tests.server import Api, is_judge, judge_reply
from tests.tiny import run_of, shown, verdict

RANK = ("--method", "rank_responses")
JUDGED = (*RANK, "--judge-model", "openai:big")
GOOD, BAD = "A good answer, 8 of 10.", "A bad answer, 3 of 10."
SCORE_OF = {GOOD: 8, BAD: 3}
LABELLED = {"prompt": "Which?", "chosen": GOOD, "rejected": BAD}
FLIPPED = {"prompt": "Which?", "chosen": BAD, "rejected": GOOD}


def honest(call):
    return judge_reply(call, lambda text, slot: SCORE_OF[text])


def torn(call):
    """Prefers what it is shown first."""
    return judge_reply(call, lambda text, slot: 9 - slot)


def even(call):
    return judge_reply(call, lambda text, slot: 5)


def test_without_a_named_judge_nobody_is_asked(rlhf):
    with Api(honest) as api:
        result = rlhf([LABELLED, FLIPPED | {"prompt": "What?"}], *RANK, api=api)
        assert api.count() == 0 and len(result.pairs) == 2


CHECKS = {  # judge -> what becomes of the right label, of the flipped one
    honest: ("kept", "judge: judge disagrees with the label"),
    torn: ("judge: judge undecided about the label", "judge: judge undecided about the label"),
    even: ("judge: judge undecided about the label", "judge: judge undecided about the label"),
}


@pytest.mark.parametrize(
    "judge, outcomes", CHECKS.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_a_pair_needs_the_label_and_every_vote(rlhf, judge, outcomes):
    for row, outcome in zip((LABELLED, FLIPPED), outcomes):
        with Api(judge) as api:
            result = rlhf([row], *JUDGED, api=api, output=f"{row['chosen'][2]}.jsonl")
            assert api.count() == 2  # both orders
        assert (result.reasons or ["kept"]) == [outcome]
        assert all(pair["chosen"] == GOOD for pair in result.pairs)


SIGNALS = {  # row -> the scores that its pair carries
    "a choice: the judge's scores": (LABELLED, (8.0, 3.0)),
    "scores: the input's": ({"prompt": "Which?", "responses": [GOOD, BAD], "scores": [90, 20]}, (90.0, 20.0)),
    "ranks: the judge's scores": ({"prompt": "Which?", "responses": [BAD, GOOD], "ranks": [2, 1]}, (8.0, 3.0)),
    "a lead: the judge's scores": (
        {"prompt": "Which?", "response_1": BAD, "response_2": GOOD, "preference_strength": 2}, (8.0, 3.0)),
}  # fmt: skip


@pytest.mark.parametrize("row, scores", SIGNALS.values(), ids=SIGNALS)
def test_rows_carry_the_scores_of_the_input_else_the_judges(rlhf, row, scores):
    with Api(honest) as api:
        [pair] = rlhf([row], *JUDGED, api=api).pairs
    assert (pair["chosen"], pair["score_chosen"], pair["score_rejected"]) == (GOOD, *scores)


def test_the_judge_never_turns_a_label_round(rlhf):
    """Not even with --when-low-wins flip, and not by a lead of 9 points."""
    sure = lambda call: judge_reply(call, lambda text, slot: 10 if text == GOOD else 1)
    with Api(sure) as api:
        result = rlhf([FLIPPED], *JUDGED, "--when-low-wins", "flip", api=api)
    assert result.pairs == [] and result.reasons == ["judge: judge disagrees with the label"]


def checks_of(row: dict, score_of, *flags) -> tuple[rc.Record, rc.Outcome]:
    """The record of a row, and what became of it, with a judge who gives score_of(text, slot)."""

    def says(_, prompt):
        slots = {text: slot for slot, (_, text) in enumerate(shown(prompt))}
        return verdict(prompt, lambda text: score_of(text, slots[text]))

    run = run_of(*RANK, "--judge-model", "openai:big@http://localhost:9/v1", *flags, says=says)
    [record] = rc.parse_row(row, with_answers=True)
    return record, rc.asyncio.run(rc.process_record(record, run))


FOUR = {"prompt": "Which?", "responses": ["a1", "b2", "c3", "d4"], "scores": [1, 2, 3, 4]}


@pytest.mark.parametrize("strategy, pairs", [("best_worst", 1), ("adjacent", 3), ("all_pairs", 6)])
def test_every_proposed_pair_is_noted_also_the_dropped(strategy, pairs):
    score_of = lambda text, slot: 9 if text == "a1" else int(text[1])  # a1 is the best, it says
    record, outcome = checks_of(FOUR, score_of, "--strategy", strategy, "--min-score-gap", "0")
    results = record.label_checks
    wrong = {"best_worst": 1, "adjacent": 1, "all_pairs": 3}[strategy]
    assert len(results) == pairs and results.count("disagrees") == wrong
    assert len(outcome.pairs) == results.count("agrees") == pairs - wrong


def test_a_gap_is_asked_of_the_scores_in_the_row(rlhf):
    with Api(honest) as api:
        few = rlhf([LABELLED], *JUDGED, "--min-score-gap", "6", api=api)
        assert few.reasons == ["filter: score gap too small"]
        assert len(rlhf([LABELLED], *JUDGED, "--min-score-gap", "5", api=api).pairs) == 1


def test_an_unreadable_judge_drops_the_pair_and_keeps_no_label_unchecked(rlhf):
    with Api(lambda call: "Both are nice.") as api:
        result = rlhf([LABELLED], *JUDGED, api=api)
    assert result.reasons == ["judge: unreadable judge reply: big: no scores in it"]


def test_what_people_reviewed_is_left_to_them(rlhf, tmp_path):
    row = {"pair_id": rc.pair_id("Which?", GOOD, BAD), "prompt_id": "", "choice": "chosen", "queue": "random",
           "note": "", "annotator": "ann", "seconds": 3}  # fmt: skip
    (tmp_path / "notes.jsonl").write_text(json.dumps(row) + "\n")
    with Api(even) as api:
        result = rlhf([LABELLED], *JUDGED, "--annotations", "notes.jsonl", api=api)
        assert len(result.pairs) == 1 and api.count() == 0


def test_dry_run_cache_and_budget_know_the_judge(rlhf):
    records = [LABELLED | {"prompt": f"Which, {i}?"} for i in range(3)]
    with Api(honest) as api:
        plan = rlhf(records, *JUDGED, "--dry-run", api=api)
        assert api.count() == 0 and "6" in plan.out and "big" in plan.out
        broke = rlhf(records, *JUDGED, "--price", "big=1/1", "--max-cost", "0.000001", api=api)
        assert broke.status == 3
        first = rlhf(records, *JUDGED, api=api)
        calls = api.count()
        again = rlhf(records, *JUDGED, api=api)
        assert api.count() == calls and again.pairs == first.pairs and len(first.pairs) == 3


def test_a_batch_answers_the_judges_prompts(rlhf):
    records = [LABELLED | {"prompt": f"Which, {i}?"} for i in range(3)]
    with Api(honest) as api:
        assert len(rlhf(records, *JUDGED, "--batch", api=api).pairs) == 3
        assert all(map(is_judge, api.calls))


# --- exact_match

EXACT = ("--judge-model", "exact_match")
CANDIDATES = ["6*7 = 42\nA: 42", "6+7 = 13\nA: 13", "It is many.", "Answer: 42", "Answer: 67"]
SUM = {"prompt": "What is 6 times 7?", "answer": "#### 42", "responses": CANDIDATES}


def of(*places, **more):
    return SUM | {"responses": [CANDIDATES[i] for i in places]} | more


def test_correct_is_chosen_and_incorrect_rejected_without_a_key(rlhf):
    [pair] = rlhf([SUM], *RANK, *EXACT).pairs
    assert "42" in pair["chosen"] and ("13" in pair["rejected"] or "67" in pair["rejected"])
    assert (pair["score_chosen"], pair["score_rejected"]) == (10.0, 1.0)


def test_all_pairs_are_every_correct_with_every_incorrect_answer(rlhf):
    pairs = rlhf([SUM], *RANK, *EXACT, "--strategy", "all_pairs").pairs
    right, wrong = {CANDIDATES[0], CANDIDATES[3]}, {CANDIDATES[1], CANDIDATES[4]}
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {
        (a, b) for a in right for b in wrong
    }


@pytest.mark.parametrize("strategy", ["best_worst", "best_random"])
def test_ties_are_drawn_by_the_seed(rlhf, strategy):
    drawn = set()
    for seed in range(12):
        flags = (*RANK, *EXACT, "--strategy", strategy, "--seed", seed)
        [pair] = rlhf([SUM], *flags, output=f"{seed}.jsonl").pairs
        assert [pair] == rlhf([SUM], *flags, output=f"{seed}.jsonl").pairs
        drawn.add((pair["chosen"], pair["rejected"]))
    assert len(drawn) == 4


DROPS = {
    "no correct answer": of(1, 4),
    "no incorrect answer": of(0, 2, 3),
    "no checkable answer": of(2) | {"responses": ["It is many.", "It is few."]},
    "no checkable answer: the reference marks no final answer": of(0, 1, answer="Many.\nVery, very, very, very many."),
}  # fmt: skip


@pytest.mark.parametrize("reason, row", DROPS.items(), ids=DROPS)
def test_a_record_without_right_and_wrong_says_so(rlhf, reason, row):
    assert rlhf([row, SUM], *RANK, *EXACT).reasons == [f"judge: {reason}"]
    run = run_of(*RANK, *EXACT)
    [record] = rc.parse_row(row, with_answers=True)
    rc.asyncio.run(rc.process_record(record, run))
    assert record.facts == {"checked by exact match": 1, reason.partition(":")[0]: 1}


COMPARED = {  # (high, low), flags -> what becomes of them
    ("Answer: 42", "Answer: 13", "drop"): "Answer: 42",
    ("Answer: 13", "Answer: 42", "drop"): "judge: low model won",
    ("Answer: 13", "Answer: 42", "flip"): "Answer: 42",
    ("Answer: 42", "42", "drop"): "judge: no incorrect answer",
    ("Answer: 13", "Answer: 14", "drop"): "judge: no correct answer",
    ("Answer: 42", "It is many.", "drop"): "judge: no incorrect answer",
}


@pytest.mark.parametrize("answers, outcome", COMPARED.items())
def test_model_comparison_by_exact_match(rlhf, answers, outcome):
    high, low, flip = answers
    flags = ("--provider", "openai", "--high-model", "strong", "--low-model", "weak", *EXACT)
    with Api(lambda call: high if call.model == "strong" else low) as api:
        result = rlhf([of(0)], *flags, "--when-low-wins", flip, api=api)
        assert api.count() == 2
    assert [pair["chosen"] for pair in result.pairs] + result.reasons == [outcome]


def test_candidates_of_a_model_are_checked(rlhf):
    replies = {0.7: "Answer: 42", 0.9: "Answer: 41", 1.0: "Answer: 42 or so"}
    flags = (
        "--provider",
        "openai",
        "--method",
        "generate_pairs",
        "--candidate-models",
        "m",
        *EXACT,
    )
    with Api(lambda call: replies[call.params["temperature"]]) as api:
        [pair] = rlhf([of(0)], *flags, api=api).pairs
    assert (pair["chosen"], pair["rejected"]) == ("Answer: 42", "Answer: 41")


def test_exact_match_checks_labels(rlhf):
    label = {"prompt": "6 times 7?", "answer": "42"}
    good = label | {"chosen": "Answer: 42", "rejected": "Answer: 13"}
    flipped = label | {"chosen": "Answer: 13", "rejected": "Answer: 42"}
    both = label | {"chosen": "Answer: 42", "rejected": "It is 42.\n\n42"}
    unclear = label | {"chosen": "Answer: 42", "rejected": "No idea."}
    result = rlhf([good, flipped, both, unclear], *RANK, *EXACT)
    assert [pair["chosen"] for pair in result.pairs] == ["Answer: 42"]
    assert result.reasons == [
        "judge: judge disagrees with the label",
        "judge: judge undecided about the label",
        "judge: no checkable answer: the label cannot be checked",
    ]


REFUSED = {
    "another judge beside it": (*EXACT, "--judge-model", "heuristic"),
    "as a writer": ("--high-model", "exact_match", *EXACT),
}


@pytest.mark.parametrize("flags", REFUSED.values(), ids=REFUSED)
def test_exact_match_is_a_judge_and_stands_alone(rlhf, flags):
    result = rlhf([of(0)], "--provider", "offline", *flags)
    assert result.status == 2 and "exact_match" in result.err and len(result.err.splitlines()) == 1


def test_exact_match_needs_a_reference(rlhf):
    result = rlhf([{"prompt": "Add.", "responses": ["1", "2"]}], *RANK, *EXACT)
    assert result.status == 2 and "exact_match needs a reference" in result.err
    row = {"prompt": "Add.", "responses": ["1", "2"]}
    assert rlhf([row, SUM], *RANK, *EXACT).reasons == ["input: no reference answer"]
