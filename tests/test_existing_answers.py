"""whatever says that one answer is better is read in one direction; what does not say it gives no pair."""

import ast
import copy
import json
import math
import random
import re
from itertools import product
from types import SimpleNamespace

import pytest

import rlhf_constructor as rc

RANK = ("--method", "rank_responses", "--provider", "offline", "--report-path", "none")
A, B = "Rain falls when a cloud grows too heavy.", "The gods are weeping again."
Q = "Why does it rain?"
GOOD = {
    "prompt": "Is ice cold?",
    "responses": ["Yes, at zero degrees or below.", "Never."],
    "scores": [200, 1],
}


@pytest.fixture
def process_record(rlhf, tmp_path):
    """fate(record, *flags): what the program makes of it: (chosen, rejected), or `stage: reason` of its drop."""

    def run(record, *flags):
        lines = [json.dumps(GOOD), record if isinstance(record, str) else json.dumps(record)]
        (tmp_path / "in.jsonl").write_text("\n".join(lines), "utf-8")
        result = rlhf(tmp_path / "in.jsonl", *RANK, *flags)
        assert result.status == 0 and result.pairs[0]["chosen"] == GOOD["responses"][0]
        made = [(row["chosen"], row["rejected"]) for row in result.pairs[1:]]
        return made[0] if len(made) == 1 else made or result.reasons[-1]

    return run


def user(text, role="user"):
    return {"role": role, "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def parts(text, role="assistant"):
    return {"role": role, "content": [{"type": "text", "text": text}]}


LOW = "abcdefghijklmnopqrstuvwxyz"


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def hh(*texts):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


def two(name, texts=(A, B), **fields):
    """Two answer objects: two("text", rank=[1, 2])."""
    return [
        {name: text} | {key: values[i] for key, values in fields.items()}
        for i, text in enumerate(texts)
    ]


# --- Every shape, in both directions. A shape is a function of who is to win, 0 for A and 1 for B.
# hi(w, 9, 2) -> [9, 2] if A is to win, [2, 9] if B is.


def hi(winner, better, worse):
    return [better, worse] if winner == 0 else [worse, better]


def ready(winner, shape):
    """A ready pair: `shape` wraps each text."""
    better, worse = hi(winner, A, B)
    return {"chosen": shape(better), "rejected": shape(worse)}


# fmt: off
SHAPES = {
    # parallel lists
    "responses, scores": lambda w: {"prompt": Q, "responses": [A, B], "scores": hi(w, 9, 2)},
    "scores that are numeric strings": lambda w: {"prompt": Q, "responses": [A, B], "scores": hi(w, "10", "9.5")},
    "negative scores": lambda w: {"prompt": Q, "responses": [A, B], "scores": hi(w, -0.5, -3)},
    "distilabel: generations, ratings": lambda w: {"instruction": Q, "generations": [A, B], "ratings": hi(w, 5, 2), "generation_models": ["m", "n"]},
    "distilabel: rating, strings": lambda w: {"instruction": Q, "generations": [A, B], "rating": hi(w, "4", "1")},
    "SimPO: all_rm_scores": lambda w: {"prompt": Q, "all_generated_responses": [A, B], "all_rm_scores": hi(w, 0.1, -0.2)},
    "completions, rewards": lambda w: {"prompt": Q, "completions": [A, B], "rewards": hi(w, 0.0, -1.0)},
    "ranks: 1 is best": lambda w: {"prompt": Q, "responses": [A, B], "ranks": hi(w, 1, 2)},
    "ranks that are strings": lambda w: {"prompt": Q, "responses": [A, B], "ranks": hi(w, "1", "2")},
    "ranks from 0: the lowest is best": lambda w: {"prompt": Q, "responses": [A, B], "ranks": hi(w, 0, 1)},
    "order: indices, best first": lambda w: {"prompt": Q, "responses": [A, B], "order": hi(w, 0, 1)},
    "summaries beside scores": lambda w: {"prompt": Q, "summaries": [A, B], "scores": hi(w, 3, 1)},
    "a choice among responses by letter": lambda w: {"prompt": Q, "responses": [A, B], "choice": "AB"[w]},
    "a choice counted from 0, by name": lambda w: {"prompt": Q, "responses": [A, B], "winner_from_0": w},
    "a choice counted from 1, by name": lambda w: {"prompt": Q, "responses": [A, B], "winner_from_1": str(w + 1)},
    # answers as objects
    "text, score": lambda w: {"prompt": Q, "responses": two("text", score=hi(w, 7, 3))},
    "response, rating": lambda w: {"prompt": Q, "responses": two("response", rating=hi(w, 5, 2))},
    "answer, rank": lambda w: {"prompt": Q, "answers": two("answer", rank=hi(w, 1, 2))},
    "content, reward": lambda w: {"prompt": Q, "completions": two("content", reward=hi(w, -1, -2))},
    "UltraFeedback": lambda w: {"instruction": Q, "models": ["m", "n"], "completions": two("response", **{"fine-grained_score": hi(w, 4.25, 2.0), "overall_score": hi(w, 8, 6), "annotations": [{"honesty": {"Rating": "N/A"}}] * 2})},
    "UltraFeedback: fine-grained_score against a wrong overall_score": lambda w: {"instruction": Q, "completions": two("response", **{"fine-grained_score": hi(w, 4.25, 2.0), "overall_score": hi(w, 1, 10)})},
    "overall_score alone": lambda w: {"instruction": Q, "completions": two("response", overall_score=hi(w, 8, 5))},
    "Nectar": lambda w: {"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": two("answer", model=["m", "n"], rank=hi(w, 1.0, 2.0)), "num_responses": 2},
    "candidates file": lambda w: {"prompt": [user(Q)], "prompt_id": "x", "completions": two("response", model=["m", "n"], score=hi(w, 8.5, 3.0), votes=hi(w, [8, 9], [3, 3]))},
    # fields with suffixes
    "WebGPT": lambda w: {"question": {"full_text": Q, "id": "x"}, "answer_0": A, "answer_1": B, "score_0": hi(w, 0.5, -0.5)[0], "score_1": hi(w, 0.5, -0.5)[1]},
    "question, answer_0, answer_1": lambda w: {"question": Q, "answer_0": A, "answer_1": B, "choice": w},
    "HelpSteer3's strength beside a prompt": lambda w: {"prompt": Q, "response1": A, "response2": B, "overall_preference": hi(w, -1, 1)[0]},
    "response_a, rating_a": lambda w: {"prompt": Q, "response_a": A, "response_b": B, "rating_a": hi(w, 5, 1)[0], "rating_b": hi(w, 5, 1)[1]},
    "output_1, rank_1": lambda w: {"prompt": Q, "output_1": A, "output_2": B, "rank_1": hi(w, 1, 2)[0], "rank_2": hi(w, 1, 2)[1]},
    "SHP: labels 1 is A": lambda w: {"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": 1 - w, "score_A": hi(w, 20, 8)[0], "score_B": hi(w, 20, 8)[1], "score_ratio": 2.5},
    "SHP without scores": lambda w: {"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": 1 - w},
    "HelpSteer2: negative strength is the first": lambda w: {"split": "train", "prompt": Q, "response_1": A, "response_2": B, "preference_strength": hi(w, -2, 2)[0]},
    "HelpSteer3: the same sign": lambda w: {"domain": "stem", "context": [user(Q)], "response1": A, "response2": B, "overall_preference": hi(w, -1, 1)[0]},
    "AlpacaEval: below 1.5 is the first": lambda w: {"instruction": Q, "output_1": A, "output_2": B, "preference": hi(w, 1.2, 1.8)[0]},
    "PKU-SafeRLHF: both verdicts agree": lambda w: {"prompt": Q, "response_0": A, "response_1": B, "better_response_id": w, "safer_response_id": w},
    "better_response_id alone": lambda w: {"prompt": Q, "response_0": A, "response_1": B, "better_response_id": w},
    "summarize comparisons: choice counts from 0": lambda w: {"info": {"post": Q, "title": "t", "article": None}, "summaries": two("text", policy=["sup", "ref"], note=[None] * 2), "choice": w, "extra": {"confidence": 8}},
    "Chatbot Arena 33k": lambda w: {"question_id": "x", "model_a": "m", "model_b": "n", "winner": f"model_{'ab'[w]}", "conversation_a": chat(Q, A), "conversation_b": chat(Q, B), "turn": 1},
    "Chatbot Arena 55k": lambda w: {"id": 1, "prompt": json.dumps([Q]), "response_a": json.dumps([A]), "response_b": json.dumps([B]), "winner_model_a": 1 - w, "winner_model_b": w, "winner_tie": 0},
    "Chatbot Arena 140k: content in parts": lambda w: {"model_a": "m", "model_b": "n", "winner": f"model_{'ab'[w]}", "conversation_a": [parts(Q, "user"), parts(A)], "conversation_b": [parts(Q, "user"), parts(B)]},
    "winner by the model's name": lambda w: {"prompt": Q, "response_a": A, "response_b": B, "model_a": "gpt-x", "model_b": "Qwen-y", "winner": ["gpt-x", "qwen-y"][w]},
    "winner by its letter": lambda w: {"prompt": Q, "response_a": A, "response_b": B, "winner": "AB"[w]},
    "winner response_1 or response_2": lambda w: {"prompt": Q, "response_1": A, "response_2": B, "winner": f"response_{w + 1}"},
    # ready pairs
    "basic": lambda w: {"prompt": Q} | ready(w, str),
    "standard": lambda w: {"prompt": Q} | ready(w, str) | {"score_chosen": 8.0, "score_rejected": 2.5, "chosen_model": "m", "rejected_model": "", "prompt_id": "x"},
    "standard with a score of 0": lambda w: {"prompt": Q} | ready(w, str) | {"score_chosen": 1.0, "score_rejected": 0.0},
    "Argilla: chosen_score, strings": lambda w: {"prompt": Q} | ready(w, str) | {"chosen_score": "8", "rejected_score": "2"},
    "chosen-rating": lambda w: {"instruction": Q} | ready(w, str) | {"chosen-rating": 5.0, "rejected-rating": 4.0},
    "conversational": lambda w: {"prompt": [user(Q)]} | ready(w, lambda text: [said(text)]),
    "whole chats, no prompt": lambda w: ready(w, lambda text: chat(Q, text)),
    "ultrafeedback_binarized": lambda w: {"prompt": Q, "prompt_id": "x", "messages": chat(Q, hi(w, A, B)[0])} | ready(w, lambda text: chat(Q, text)) | {"score_chosen": 8.5, "score_rejected": 3.0},
    "chatml": lambda w: {"messages": [user(Q)]} | ready(w, said),
    "ShareGPT ranking": lambda w: {"conversations": [{"from": "human", "value": Q}]} | ready(w, lambda text: {"from": "gpt", "value": text}),
    "openai": lambda w: {"input": {"messages": [user(Q)]}, "preferred_output": [said(hi(w, A, B)[0])], "non_preferred_output": [said(hi(w, A, B)[1])]},
    "HH-RLHF": lambda w: ready(w, lambda text: hh(Q, text)),
}
# fmt: on


@pytest.mark.parametrize(
    "winner", [pytest.param(0, id="the first"), pytest.param(1, id="the second")]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_is_read_in_both_directions(process_record, shape, winner):
    assert process_record(shape(winner)) == tuple(hi(winner, A, B))


def test_the_inputs_own_scores_and_models_are_exported(rlhf):
    [row] = rlhf([SHAPES["UltraFeedback"](1) | {"models": []}], *RANK).pairs
    assert (row["score_chosen"], row["score_rejected"]) == (4.25, 2.0) and row["prompt"] == Q
    [row] = rlhf([SHAPES["candidates file"](0)], *RANK).pairs
    assert (row["score_chosen"], row["chosen_model"], row["rejected_model"]) == (8.5, "m", "n")


def test_a_strength_beside_a_choice_is_no_score(rlhf):
    [row] = rlhf([NUMBERED | {"preference_strength": -2, "winner": "response_1"}], *RANK).pairs
    assert row["chosen"] == A and "score_chosen" not in row


def test_the_judges_combined_score_of_a_candidates_file_is_kept_as_it_was(rlhf):
    votes = [
        [8, 8, 9, 9, 3, 3],
        [2, 2, 2, 2, 1, 1],
    ]  # three judges: the median of 8, 9 and 3, not the mean
    [row] = rlhf(
        [{"prompt": Q, "completions": two("response", score=[8.0, 2.0], votes=votes)}], *RANK
    ).pairs
    assert (row["score_chosen"], row["score_rejected"]) == (8.0, 2.0)


@pytest.mark.parametrize(
    "signal",
    [
        pytest.param({"order": [2, 0, 1]}, id="order: the third answer is best, then the first"),
        pytest.param({"ranks": [2, 3, 1]}, id="ranks: the first answer is second best"),
        pytest.param({"ranks": [1.0, 2.0, 0.0]}, id="ranks from 0"),
        pytest.param({"scores": [5, 1, 9]}, id="scores"),
        pytest.param(
            {"order": [2, 0, 1], "ranks": [2, 3, 1], "scores": [5, 1, 9]}, id="all three, agreeing"
        ),
    ],
)
def test_three_answers_tell_an_order_from_ranks(process_record, signal):
    first, second, third = answers = [
        A,
        B,
        "Warm air rises, cools, and its vapour turns into drops.",
    ]
    assert process_record(
        {"prompt": Q, "responses": answers} | signal, "--strategy", "adjacent"
    ) == [
        (third, first),
        (first, second),
    ]


def test_an_answer_that_nobody_rated_leaves_the_others_their_pair(process_record):
    record = {
        "prompt": Q,
        "responses": [A, "Nobody knows, and nobody asked.", B],
        "scores": [3, "N/A", 5],
    }
    assert process_record(record) == (B, A)


def test_several_turns_of_a_chat_are_the_prompt(rlhf):
    record = {"prompt": "Hi"} | ready(0, lambda text: chat("Hi", "Hello!", Q, text))
    [row] = rlhf([record], *RANK, "--output-format", "conversational").pairs
    assert row["prompt"] == chat("Hi", "Hello!", Q) and row["chosen"] == [said(A)]


# --- What gives no pair, and why.

LISTS = {"prompt": Q, "responses": [A, B]}
SUFFIXED = {"prompt": Q, "response_a": A, "response_b": B}
NUMBERED = {"prompt": Q, "response_1": A, "response_2": B}
ARENA = {"model_a": "m", "model_b": "n", "conversation_a": chat(Q, A), "conversation_b": chat(Q, B)}
ONE_HOT = {"prompt": json.dumps([Q]), "response_a": json.dumps([A]), "response_b": json.dumps([B])}
PAIR = {"prompt": Q, "chosen": A, "rejected": B}
SHP = {"history": Q, "human_ref_A": A, "human_ref_B": B}
STRENGTH, EVAL = NUMBERED, {"instruction": Q, "output_1": A, "output_2": B}
UNSAID, UNRATED = (
    "input: answers without any signal",
    "input: no preference: fewer than two answers are rated",
)
CONTRADICTION, NOBODY = "input: contradictory signals", "input: no preference"
UNCLEAR, FROM = "input: winner not understood", "input: ambiguous winner"
NO_HISTORY = "input: histories differ"
TWO_PAIRS = "input: ambiguous: two ready pairs"
BESIDE = "input: ambiguous: `chosen` is none of the other answers: --rename chosen=winner"

# fmt: off
DROPS = {
    # ties
    "equal scores": (LISTS | {"scores": [3, 3]}, "input: tie"),
    "equal scores, one a string": (LISTS | {"scores": [3, "3.0"]}, "input: tie"),
    "equal ranks": (LISTS | {"ranks": [1, 1]}, "input: tie"),
    "WebGPT scores equal": ({"question": {"full_text": Q}, "answer_0": A, "answer_1": B, "score_0": 0, "score_1": 0}, "input: tie"),
    "a tie by name": (ARENA | {"winner": "tie"}, "input: tie"),
    "a tie with a remark": (ARENA | {"winner": "tie (inconsistent)"}, "input: tie"),
    "both bad, 33k": (ARENA | {"winner": "tie (bothbad)"}, "input: both bad"),
    "both bad, 140k": (ARENA | {"winner": "both_bad"}, "input: both bad"),
    "a one-hot tie": (ONE_HOT | {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}, "input: tie"),
    "strength 0": (STRENGTH | {"preference_strength": 0}, "input: tie"),
    "AlpacaEval 1.5": (EVAL | {"preference": 1.5}, "input: tie"),
    "a ready pair whose two scores are equal": (PAIR | {"score_chosen": 4, "score_rejected": 4.0}, "input: tie"),
    # nobody said
    "strength -100: neither": (STRENGTH | {"preference_strength": -100}, NOBODY),
    "strength beyond its range": (STRENGTH | {"preference_strength": 7}, NOBODY),
    "strength N/A": (STRENGTH | {"preference_strength": "N/A"}, NOBODY),
    "strength null": (STRENGTH | {"preference_strength": None}, UNSAID),
    "AlpacaEval NaN": (EVAL | {"preference": math.nan}, NOBODY),
    "AlpacaEval 0": (EVAL | {"preference": 0}, FROM),
    "winner null": (SUFFIXED | {"winner": None}, NOBODY),
    "winner N/A": (SUFFIXED | {"winner": "N/A"}, NOBODY),
    "a blank winner": (SUFFIXED | {"winner": " "}, NOBODY),
    "winner none, and models unknown": (SUFFIXED | {"winner": "none", "model_a": None, "model_b": None}, NOBODY),
    "winner is nobody's name": (SUFFIXED | {"winner": "model_c", "model_a": "x", "model_b": "y"}, UNCLEAR),
    "a winner that both models share": (SUFFIXED | {"winner": "gpt-x", "model_a": "gpt-x", "model_b": "gpt-x"}, "input: ambiguous winner"),
    "an arena battle without a winner": (ARENA, UNSAID),
    "a choice out of range": (LISTS | {"choice": 3}, UNCLEAR),
    "a negative choice": (LISTS | {"choice": -1}, UNCLEAR),
    "half a choice": (LISTS | {"choice": 0.5}, UNCLEAR),
    "true is no index": (LISTS | {"choice": True}, UNCLEAR),
    "SHP labels of neither kind": (SHP | {"labels": 2}, UNCLEAR),
    "SHP labels null": (SHP | {"labels": None}, NOBODY),
    "one-hot, none set": (ONE_HOT | {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0}, NOBODY),
    "one-hot, two set": (ONE_HOT | {"winner_model_a": 1, "winner_model_b": 1, "winner_tie": 0}, UNCLEAR),
    "one-hot, a winner and a tie": (ONE_HOT | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 1}, UNCLEAR),
    "one score null": (LISTS | {"scores": [None, 3]}, UNRATED),
    "one score N/A": (LISTS | {"scores": ["N/A", 3]}, UNRATED),
    "one score NaN": (LISTS | {"scores": [math.nan, 3]}, UNRATED),
    "one score infinite": (LISTS | {"scores": [math.inf, 3]}, UNRATED),
    "scores of true and false": (LISTS | {"scores": [True, False]}, UNRATED),
    "one suffixed score missing": (SUFFIXED | {"score_a": 0.5}, UNRATED),
    "all scores null": (LISTS | {"scores": [None, None]}, UNSAID),
    "no signal at all": (LISTS, UNSAID),
    "candidates that no judge saw": ({"prompt": Q, "completions": two("response", score=[None] * 2, votes=[[], []])}, UNSAID),
    # ambiguous: never guessed
    "a bare ranking": (LISTS | {"ranking": [1, 0]}, "input: ambiguous `ranking`: --rename ranking=order (best first) or ranking=ranks"),
    "winner 0 of answers 1 and 2: the first, or a tie": (NUMBERED | {"winner": 0}, FROM),
    "winner 2 of answers 0 and 1: a tie, or the second": ({"prompt": Q, "response_0": A, "response_1": B, "winner": 2}, FROM),
    "order inside answer objects": ({"prompt": Q, "responses": two("text", order=[1, 0])}, UNSAID),
    # malformed
    "fewer scores than answers": (LISTS | {"scores": [3]}, "input: lists of unequal length: 2 answers"),
    "more ranks than answers": (LISTS | {"ranks": [1, 2, 3]}, "input: lists of unequal length"),
    "votes of unequal length": (LISTS | {"scores": [[1, 2], [3]]}, "input: votes of unequal length"),
    "a rank above the number of answers": (LISTS | {"ranks": [1, 3]}, "input: ranks out of range"),
    "a rank below 0": (LISTS | {"ranks": [-1, 1]}, "input: ranks out of range"),
    "an index twice in order": (LISTS | {"order": [0, 0]}, "input: order is not a list of all indices from 0"),
    "order that counts from 1": (LISTS | {"order": [1, 2]}, "input: order is not a list of all indices from 0"),
    "one answer": ({"prompt": Q, "responses": [A], "scores": [9]}, UNRATED),
    "no answers": ({"prompt": Q, "responses": [], "scores": []}, "input: no answers"),
    "no answers, but a score": ({"prompt": Q, "score": 5}, "input: no answers"),
    "an empty answer": (LISTS | {"responses": [A, ""], "scores": [1, 2]}, "filter: empty answer"),
    "white space for an answer": (LISTS | {"responses": [" \n", B], "scores": [1, 2]}, "filter: empty answer"),
    "null for an answer": (LISTS | {"responses": [A, None], "scores": [1, 2]}, "filter: empty answer"),
    "a number for an answer": (LISTS | {"responses": [A, 7], "scores": [1, 2]}, "input: not a text"),
    "a list for an answer": (SUFFIXED | {"response_b": [B], "winner": "a"}, "input: not a text"),
    "numbers too large to add": (LISTS | {"scores": [[1e308, 1e308], [1, 2]]}, UNRATED),
    "scores that are objects": (LISTS | {"scores": [{"a": 1}, {"b": 2}]}, UNRATED),
    "a chosen that ends with the user": ({"chosen": chat(Q, A, "Thanks"), "rejected": chat(Q, B, "Hm")}, NO_HISTORY),
    "a chosen that the user says": ({"messages": [user(Q)], "chosen": user(A), "rejected": said(B)}, "input: the conversation has no user turn"),
    "two texts for chosen": ({"prompt": Q, "chosen": [said(A), said(A)], "rejected": [said(B)] * 2}, "input: not one answer on each side"),
    "chats with different questions": ({"prompt": Q, "chosen": chat(Q, A), "rejected": chat("What?", B)}, NO_HISTORY),
    "a battle whose histories differ": (ARENA | {"winner": "model_a", "conversation_b": chat("Hi", "Ho", Q, B)}, NO_HISTORY),
    "HH-RLHF with different histories": ({"chosen": hh(Q, A), "rejected": hh("What?", B)}, NO_HISTORY),
    "55k with two turns": (ONE_HOT | {"prompt": json.dumps([Q, Q]), "response_a": json.dumps([A, A]), "response_b": json.dumps([B, B]), "winner_model_a": 1, "winner_model_b": 0}, NO_HISTORY),
    # contradictions
    "scores against ranks": (LISTS | {"scores": [9, 2], "ranks": [2, 1]}, CONTRADICTION),
    "scores against order": (LISTS | {"scores": [9, 2], "order": [1, 0]}, CONTRADICTION),
    "ranks against order": (LISTS | {"ranks": [1, 2], "order": [1, 0]}, CONTRADICTION),
    "score against rank in objects": ({"prompt": Q, "responses": two("text", score=[9, 2], rank=[2, 1])}, CONTRADICTION),
    "SHP labels against scores": (SHP | {"labels": 1, "score_A": 8, "score_B": 20}, CONTRADICTION),
    "winner against scores": (SUFFIXED | {"winner": "a", "score_a": 1, "score_b": 2}, CONTRADICTION),
    "chosen scored below rejected": (PAIR | {"score_chosen": 2.0, "score_rejected": 8.0}, CONTRADICTION),
    "chosen scored 0, rejected 1": (PAIR | {"score_chosen": 0, "score_rejected": 1}, CONTRADICTION),
    "PKU: better and safer differ": ({"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 0, "safer_response_id": 1}, CONTRADICTION),
    "one answer of three with two scores": (LISTS | {"responses": [A, f"{A} ", B], "scores": [9, 2, 5]}, CONTRADICTION),
    "two equal answers with two scores": (LISTS | {"responses": [A, f"{A} "], "scores": [9, 2]}, "filter: identical answers"),
    "two equal answers with a winner": (SUFFIXED | {"response_b": A, "winner": "a"}, "filter: identical answers"),
    "a combined score that its votes deny": ({"prompt": Q, "completions": two("response", score=[5, 5], votes=[[9, 9], [1, 1]])}, "input: tie"),
    "the votes of two orders disagree": ({"prompt": Q, "completions": two("response", score=[6, 5], votes=[[9, 3], [2, 8]])}, "input: orders disagree"),
    "objects' own scores against a list beside them": (LISTS | {"responses": two("text", score=[9, 2]), "scores": [2, 9]}, CONTRADICTION),
    "objects' own ranks against an order beside them": (LISTS | {"responses": two("text", rank=[1, 2]), "order": [1, 0]}, CONTRADICTION),
    "suffixed answers against a list beside them": (SUFFIXED | {"winner": "a", "scores": [2, 9]}, CONTRADICTION),
    "two lists of scores": (LISTS | {"scores": [9, 2], "rating": [2, 4]}, CONTRADICTION),
    "two lists of the same kind": (LISTS | {"scores": [9, 2], "all_scores": [2, 4]}, CONTRADICTION),
    "two kinds of score in objects": (LISTS | {"responses": two("text", score=[9, 2], rating=[2, 4])}, CONTRADICTION),
    "two suffixed kinds of score": (SUFFIXED | {"score_a": 9, "score_b": 2, "rating_a": 2, "rating_b": 4}, CONTRADICTION),
    "two verdicts": (LISTS | {"choice": "a", "better_response_id": "b"}, CONTRADICTION),
    "two verdicts, one of them a data set's": (SHP | {"labels": 1, "winner": "b"}, CONTRADICTION),
    "a strength against a verdict": (NUMBERED | {"preference_strength": -2, "winner": "response_2"}, CONTRADICTION),
    "scores tie where a verdict does not": (SUFFIXED | {"winner": "a", "score_a": 2, "score_b": 2}, "input: tie"),
    "ranks tie where scores do not": (LISTS | {"scores": [9, 2], "ranks": [1, 1]}, "input: tie"),
    "a ready pair against the list it came from": (PAIR | {"generations": [B, A], "ratings": [5, 1]}, CONTRADICTION),
    "a ready pair against its list, behind a double space": (PAIR | {"generations": [A.replace(" ", "  "), B], "ratings": [1, 5]}, CONTRADICTION),
    "a ready pair against a verdict": (PAIR | {"response_a": A, "response_b": B, "winner": "b"}, CONTRADICTION),
    "a ready pair against a strength": (PAIR | {"response_a": A, "response_b": B, "preference_strength": 2}, CONTRADICTION),
    "a ready pair against a strength of its list": (PAIR | {"responses": [B, A], "overall_preference": -1}, CONTRADICTION),
    "a ready pair and a verdict on something else": (PAIR | {"winner": "b"}, UNCLEAR),
    "two ready pairs": (PAIR | {"preferred_output": B, "non_preferred_output": A}, TWO_PAIRS),
    "a negative margin": (PAIR | {"margin": -1.5}, CONTRADICTION),
    "a duplicate key": ('{"prompt": "Q", "responses": ["A", "B"], "scores": [9, 2], "scores": [2, 9]}', "input: not JSON: a key stands twice"),
    "a model that is called as the other one's end": (SUFFIXED | {"model_a": "b", "model_b": "a", "winner": "a"}, "input: ambiguous winner"),
    "a model that is called tie": (SUFFIXED | {"model_a": "tie", "model_b": "m", "winner": "tie"}, "input: tie"),
    "scores beyond what can be added": (LISTS | {"scores": [1e308, 1.7e308]}, UNRATED),
    "identical chosen and rejected": (PAIR | {"rejected": f" {A} "}, "filter: identical answers"),
    "winner null, and a model called none": (SUFFIXED | {"winner": None, "model_a": "none", "model_b": "m"}, NOBODY),
}
# fmt: on


@pytest.mark.parametrize(
    "score", ["score", "rating", "reward", "rm_score", "fine-grained_score", "overall_score"]
)
@pytest.mark.parametrize(
    "form", ["{}_chosen {}_rejected", "chosen_{} rejected_{}", "chosen-{} rejected-{}"]
)
def test_a_ready_pair_that_is_scored_the_other_way_round_is_none(process_record, score, form):
    better, worse = form.replace("{}", score).split()
    assert isinstance(process_record(PAIR | {better: 3, worse: 1}), tuple)
    assert process_record(PAIR | {better: 1, worse: 3}).startswith(CONTRADICTION)
    assert process_record(PAIR | {better: 2, worse: "2.0"}) == "input: tie"


def test_a_ready_pair_that_is_ranked_the_other_way_round_is_none(process_record):
    assert isinstance(
        process_record(PAIR | {"chosen_rank": 1, "rejected_rank": 4}), tuple
    )  # of four once
    assert process_record(PAIR | {"chosen_rank": 4, "rejected_rank": 1}).startswith(CONTRADICTION)


@pytest.mark.parametrize(
    "drop", ["a tie by name", "strength 0", "scores against ranks", "a rank below 0"]
)
def test_a_dropped_record_keeps_its_answers(rlhf, drop):
    [row] = rlhf([GOOD, DROPS[drop][0]], *RANK).dropped
    assert [answer["text"] for answer in row["answers"]] == [A, B]


@pytest.mark.parametrize("models", [["m", "n"], ["k", "l", "m", "n"]])
def test_a_list_of_models_beside_a_ready_pair_names_nobody(rlhf, models):
    [row] = rlhf([PAIR | {"models": models}], *RANK).pairs
    assert [row["chosen"], row["chosen_model"], row["rejected_model"]] == [A, "", ""]


@pytest.mark.parametrize("record, reason", DROPS.values(), ids=DROPS)
def test_what_does_not_say_which_is_better_gives_no_pair(process_record, record, reason):
    assert str(process_record(record)).startswith(reason)


# fmt: off
AGREE = {
    "objects and a list beside them": LISTS | {"responses": two("text", score=[2, 9]), "scores": [1, 3]},
    "suffixed answers and a list beside them": SUFFIXED | {"scores": [2, 9]},
    "a pair and the list it came from": {"prompt": Q, "chosen": B, "rejected": A, "generations": [A, B], "ratings": [1, 5], "order": ["rejected", "chosen"]},
    "a verdict of null beside one that speaks": LISTS | {"choice": "b", "winner": None},
    "a verdict of nothing beside one that speaks": LISTS | {"choice": "b", "winner": ""},
    "a flag that a spreadsheet wrote": ONE_HOT | {"winner_model_a": "FALSE", "winner_model_b": "TRUE"},
    "answers without text, rated apart": {"prompt": Q, "responses": [A, "", None, B], "scores": [3, 1, 2, 5]},
    "a list whose answers cannot be read": PAIR | {"chosen": B, "rejected": A, "generations": [[said(B)], [said(A)]], "ratings": [5, 1]},
    "fine-grained_score of one answer only": {"prompt": Q, "completions": two("text", **{"overall_score": [2, 8], "fine-grained_score": [4, None]})},
    "a list of other models beside answers that name their own": {"prompt": Q, "models": ["k"], "completions": two("text", model=["m", "n"], score=[2, 9])},
    "a score for one answer only compares nothing": SUFFIXED | {"winner": "b", "score_a": 5},
    "a model whose name begins like a tie": SUFFIXED | {"model_a": "m", "model_b": "Tie-breaker-7b", "winner": "tie-breaker-7b"},
    "a model that is called as its own end": SUFFIXED | {"model_a": "a", "model_b": "b", "winner": "b"},
}
# fmt: on


@pytest.mark.parametrize("record", AGREE.values(), ids=AGREE)
def test_signals_that_agree_are_one(process_record, record):
    assert process_record(record) == (B, A)


OTHERS = {"prompt": Q, "answers": ["Paris", "the city of Paris"]}
OPTIONS = {
    "prompt": Q,
    "answer_a": "Paris",
    "answer_b": "the city of Paris",
    "response_a": A,
    "response_b": B,
}
# fmt: off
OF_WHICH = {
    "an index": OTHERS | {"response_0": A, "response_1": B, "better_response_id": 0},
    "a list beside both": OTHERS | {"response_a": A, "response_b": B, "scores": [9, 2]},
    "a list beside a pair of other texts": OTHERS | {"chosen": A, "rejected": B, "ranks": [2, 1]},
    "a list beside two lists": OTHERS | {"generations": [A, B], "ratings": [5, 1]},
    "an end of two": OPTIONS | {"winner": "model_a"},
    "scores by ends of two": OPTIONS | {"score_a": 9, "score_b": 1},
}
# fmt: on


@pytest.mark.parametrize("record", OF_WHICH.values(), ids=OF_WHICH)
def test_what_could_speak_of_other_answers_gives_no_pair(process_record, record):
    assert process_record(record).startswith("input: ambiguous: ")


def test_a_lead_speaks_of_its_own_two_answers_only(process_record):
    record = NUMBERED | {
        "preference_strength": -2,
        "responses": [A, "A reference that nobody compared."],
    }
    assert process_record(record).startswith("input: ambiguous: two sets of answers")


def test_two_answers_that_only_one_of_two_signals_tells_apart_form_no_pair(process_record):
    first, second, third, fourth = FOUR
    record = {"prompt": Q, "responses": FOUR, "ranks": [1, 2, 3, 4], "scores": [9, 7, 7, 1]}
    made = process_record(record, "--strategy", "all_pairs")
    assert len(made) == 5 and (second, third) not in made and (first, fourth) in made


def test_no_two_shapes_in_one_row_that_differ_give_a_pair():
    run, rows = SimpleNamespace(seed=0, args=SimpleNamespace(strategy="all_pairs")), 0
    shapes = SHAPES | OF_OTHERS
    del shapes["LLaMA-Factory, former ranking"]  # a mere list, if anything else says who is better
    del (
        shapes["OASST: a tree"],
        shapes["RMB: pairs"],
    )  # they stand in the prompt; they share a field
    for (one, other), winner in product(product(shapes.values(), repeat=2), (0, 1)):
        first, second = one(winner), other(1 - winner)
        shared = first.keys() & second.keys() - {"prompt", "instruction", "question"}
        if any(first[name] != second[name] for name in shared):
            continue  # the second overwrites what the first says
        rows += 1
        with pytest.raises((rc.Failed, *rc.JUNK)):
            [record] = rc.parse_row(first | second, with_answers=True)
            rc.pair_up(record, record.answers, run)
            pytest.fail(str(first | second))
    assert rows > 12_000


@pytest.mark.parametrize("depth", [100, 400, 600, 900, 20_000])
def test_deep_json_is_a_pair_or_a_reason(rlhf, tmp_path, depth):
    deep = json.dumps(LISTS | {"scores": [1, 2], "extra": "DEEP"}).replace(
        '"DEEP"', "[" * depth + "]" * depth
    )
    (tmp_path / "deep.jsonl").write_text(json.dumps(GOOD) + "\n" + deep + "\n")
    result = rlhf(tmp_path / "deep.jsonl", *RANK)
    assert result.status == 0
    assert result.pairs[1:] or result.reasons[0].startswith("input: not JSON")


def test_answers_of_a_megabyte_are_exported_whole(process_record):
    draw = random.Random(1)
    long, longer = (
        "".join(draw.choices(a + "  ", k=1_000_000)).strip() for a in (LOW, LOW.upper())
    )
    assert process_record({"prompt": Q, "responses": [long, longer], "scores": [1, 2]}) == (
        longer,
        long,
    )


# --- 3,000 mutated records: none stops the run, and no pair contradicts what its record says.

JUNK = [None, "", "N/A", math.nan, -100, 0, 1, 2, -1, 0.5, 1e308, True, "7", "tie", [], {}, [[1, 2], [3]],
        {"a": []}]  # fmt: skip


def mutate(record, draw):
    """One or two fields, at any depth, are deleted, changed in type, swapped or replaced by junk."""
    record = json.loads(json.dumps(record))
    for _ in range(draw.randint(1, 2)):
        inside = record
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(inside[key], list | dict) and draw.random() < 0.6:
                inside = inside[key]
                continue
            match draw.choice(["delete", "cast", "wrap", "junk", "junk", "swap"]):
                case "delete":
                    del inside[key]
                case "cast":
                    inside[key] = str(inside[key])
                case "wrap":
                    inside[key] = [inside[key]]
                case "junk":
                    inside[key] = copy.deepcopy(draw.choice(JUNK))
                case "swap":
                    other = draw.choice(keys)
                    inside[key], inside[other] = inside[other], inside[key]
            break
    return record


def says(record, chosen, rejected) -> bool:
    """An independent reading of four shapes: does the record say that `chosen` is better?"""
    said = [chosen, rejected]
    if "preference_strength" in record:
        strength = float(record["preference_strength"])
        first, second = (record[f"response_{i}"].strip() for i in (1, 2))
        return (
            said == ([first, second] if strength < 0 else [second, first])
            and 0 < abs(strength) <= 3
        )
    if "winner" in record:
        texts = [record[f"response_{end}"].strip() for end in "ab"]
        names = {"model_a": 0, "model_b": 1, texts[0]: 0, texts[1]: 1}
        first = names[str(record["winner"]).strip("[]'\"")]
        return said == [texts[first], texts[1 - first]]
    if "chosen" in record:
        scores = [record.get(f"score_{side}") for side in ("chosen", "rejected")]
        numeric = [re.fullmatch(r"-?\d+(\.\d+)?(e\+?\d+)?", str(score)) for score in scores]
        agrees = not all(numeric) or float(scores[0]) > float(scores[1])
        texts = [
            text[0] if isinstance(text, list) else text
            for text in (record["chosen"], record["rejected"])
        ]
        return said == [text.strip() for text in texts] and agrees
    texts, scores = (
        ast.literal_eval(cell) if isinstance(cell, str) else cell
        for cell in (record["responses"], record["scores"])
    )
    score = {str(text).strip(): value for text, value in zip(texts, scores)}
    better, worse = (v if isinstance(v, list) else [v] for v in (score[chosen], score[rejected]))
    return all(float(b) > float(w) for b, w in zip(better, worse, strict=True))


READABLE = {  # the shapes that `says` can read
    "scores": lambda w: {"prompt": Q, "responses": [A, B], "scores": hi(w, 9, 2)},
    "strength": SHAPES["HelpSteer2: negative strength is the first"],
    "winner": lambda w: SUFFIXED | {"winner": f"model_{'ab'[w]}"},
    "pair": SHAPES["standard"],
}


def fuzzed(shapes, count, seed):
    """`count` mutated records; each answer carries its record's number."""
    draw = random.Random(seed)
    for number in range(count):
        record = mutate(draw.choice(list(shapes.values()))(draw.randint(0, 1)), draw)
        text = json.dumps(record).replace(A, f"{A} #{number}#").replace(B, f"{B} #{number}#")
        yield json.loads(text.replace(Q, f"{Q} {number}"))


def test_mutated_records_of_every_shape_never_stop_the_run(rlhf):
    records = list(fuzzed(SHAPES, 2000, 1))
    result = rlhf([GOOD, *records], *RANK, "--strategy", "all_pairs")
    assert result.status == 0, result.err
    assert f"Read {len(records) + 1:,} records" in result.out and len(result.pairs) > 300
    assert len(result.dropped) > 300 and all(row["reason"] for row in result.dropped)


def test_no_mutated_record_gives_a_pair_against_its_own_signal(rlhf):
    records = list(fuzzed(READABLE, 1000, 2))
    result = rlhf([GOOD, *records], *RANK, "--strategy", "all_pairs")
    assert result.status == 0 and len(result.pairs) > 200
    for row in result.pairs[1:]:
        number = re.search(
            r"#(\d+)#", row["chosen"] + row["rejected"]
        )  # none: both texts were replaced
        record = records[int(number[1])] if number else None
        assert record is None or says(record, row["chosen"], row["rejected"]), record


# --- How far apart the two have to be.

KEPT, SMALL = "kept", "filter: score gap too small"
FOUR = [
    "One reason is the cloud.",
    "Two hands pour it.",
    "Three winds meet there.",
    "Four words only, sadly.",
]


def fine(a, b):
    return {"instruction": Q, "completions": two("response", **{"fine-grained_score": [a, b]})}


# fmt: off
GAPS = {
    "scores of unknown range: any gap": (LISTS | {"scores": [0.02, 0.01]}, (), KEPT),
    "ratings span 4 points: .75 is too small": (LISTS | {"ratings": [4.0, 3.25]}, (), SMALL),
    "ratings: .8 is enough": (LISTS | {"ratings": [4.0, 3.2]}, (), KEPT),
    "ratings: one point is enough": (LISTS | {"ratings": [4, 3]}, (), KEPT),
    "overall_score spans 9: 1.5 is too small": ({"prompt": Q, "responses": two("text", overall_score=[7, 5.5])}, (), SMALL),
    "overall_score: 2 is enough": ({"prompt": Q, "responses": two("text", overall_score=[7, 5])}, (), KEPT),
    "fine-grained spans 4: .75 is too small": (fine(4.0, 3.25), (), SMALL),
    "fine-grained: 1 is enough": (fine(4.25, 3.25), (), KEPT),
    "strength spans 3: an average of .5 is too small": (STRENGTH | {"preference_strength": -0.5}, (), SMALL),
    "strength: 1 is enough": (STRENGTH | {"preference_strength": 1}, (), KEPT),
    "AlpacaEval spans .5: .05 is too small": (EVAL | {"preference": 1.45}, (), SMALL),
    "AlpacaEval: .1 is enough": (EVAL | {"preference": 1.4}, (), KEPT),
    "three answers, one rank apart": (LISTS | {"responses": FOUR[:3], "ranks": [1, 2, 2]}, (), KEPT),
    "four answers, one rank apart": (LISTS | {"responses": FOUR, "ranks": [1, 2, 2, 2]}, (), SMALL),
    "four answers, two ranks apart": (LISTS | {"responses": FOUR, "ranks": [1, 3, 3, 3]}, (), KEPT),
    "four answers, one rank apart, drawn": (LISTS | {"responses": FOUR, "ranks": [1, 2, 2, 2]}, ("--strategy", "best_random"), SMALL),
    "four answers, one rank apart, all pairs": (LISTS | {"responses": FOUR, "ranks": [1, 2, 2, 2]}, ("--strategy", "all_pairs"), KEPT),
    "four answers, one rank apart, adjacent": (LISTS | {"responses": FOUR, "ranks": [1, 2, 2, 2]}, ("--strategy", "adjacent"), KEPT),
    "a choice has no gap to measure": (SUFFIXED | {"winner": "a"}, ("--min-score-gap", 5), KEPT),
    "a choice beside close scores": (SHP | {"labels": 1, "score_A": 9, "score_B": 8}, (), KEPT),
    "a ready pair is kept however close": (PAIR | {"score_chosen": 7.1, "score_rejected": 7.0}, (), KEPT),
    "a ready pair with scores, a gap asked for": (PAIR | {"score_chosen": 7, "score_rejected": 5}, ("--min-score-gap", 3), SMALL),
    "a ready pair without scores, a gap asked for": (PAIR, ("--min-score-gap", 3), KEPT),
    "a smaller gap given than the default": (LISTS | {"ratings": [4.0, 3.25]}, ("--min-score-gap", 0.5), KEPT),
    "a larger gap given than the default": (LISTS | {"ratings": [4, 3]}, ("--min-score-gap", 1.5), SMALL),
    "a gap given for scores of unknown range": (LISTS | {"scores": [3, 2]}, ("--min-score-gap", 2), SMALL),
    "a smaller gap given for ranks": (LISTS | {"responses": FOUR, "ranks": [1, 2, 2, 2]}, ("--min-score-gap", 1), KEPT),
    "a larger gap given for ranks": (LISTS | {"responses": FOUR[:3], "ranks": [1, 2, 3]}, ("--min-score-gap", 3), SMALL),
}
# fmt: on


@pytest.mark.parametrize("record, flags, expected", GAPS.values(), ids=GAPS)
def test_gap(process_record, record, flags, expected):
    got = process_record(record, *flags)
    assert (got if isinstance(got, str) else KEPT) == expected


# --- Strategies: one record, worked by hand.

ONE, TWO, THREE, BAD = FOUR  # 9, 7, 4 and 1 points; they stand in another order in the record
WORKED = {
    "prompt": Q,
    "responses": [THREE, ONE, BAD, TWO],
    "scores": [4, 9, 1, 7],
    "models": [*"cadb"],
}
STRATEGIES = {
    "best_worst": [(ONE, BAD)],
    "all_pairs": [(ONE, TWO), (ONE, THREE), (ONE, BAD), (TWO, THREE), (TWO, BAD), (THREE, BAD)],
    "adjacent": [(ONE, TWO), (TWO, THREE), (THREE, BAD)],
}


@pytest.mark.parametrize("strategy, expected", STRATEGIES.items(), ids=STRATEGIES)
def test_strategy_from_record_to_output_line(rlhf, strategy, expected):
    rows = rlhf([WORKED], *RANK, "--strategy", strategy).pairs
    points, model = (
        {ONE: 9.0, TWO: 7.0, THREE: 4.0, BAD: 1.0},
        {ONE: "a", TWO: "b", THREE: "c", BAD: "d"},
    )
    assert rows == [
        {"prompt": Q, "chosen": better, "rejected": worse, "score_chosen": points[better],
         "score_rejected": points[worse], "chosen_model": model[better], "rejected_model": model[worse],
         "prompt_id": rows[0]["prompt_id"]}
        for better, worse in expected
    ]  # fmt: skip


def test_best_random_draws_the_rejected_by_the_seed(rlhf):
    drawn = [
        rlhf([WORKED], *RANK, "--strategy", "best_random", "--seed", seed).pairs
        for seed in (*range(12), 0)
    ]
    assert drawn[0] == drawn[-1]
    assert all(rows[0]["chosen"] == ONE for rows in drawn)
    assert {rows[0]["rejected"] for rows in drawn} == {TWO, THREE, BAD}


@pytest.mark.parametrize("strategy", ["all_pairs", "adjacent", "best_random"])
def test_equal_ranks_form_no_pair(process_record, strategy):
    made = process_record(
        {"prompt": Q, "responses": FOUR[:3], "ranks": [1, 2, 2]}, "--strategy", strategy
    )
    made = made if isinstance(made, list) else [made]
    assert made and all(pair[0] == ONE and pair[1] in (TWO, THREE) for pair in made)


def length(n, seed):
    """A text of exactly n characters."""
    draw = random.Random(seed)
    words = ("".join(draw.choices("abcdefghij", k=5)) for _ in range(n))
    return " ".join(words)[: n - 1] + "x"


def test_length_penalty_worked_by_hand(rlhf):
    # 9 points at 216 characters, 8 at 64, 2 at 64. 216 / 64 = 1.5 ** 3: the long one pays 3, so 9-2-3 < 8-2.
    long, short, worst = length(216, 1), length(64, 2), length(64, 3)
    record = {"prompt": Q, "responses": [worst, long, short], "scores": [2, 9, 8]}
    [free], [taxed] = (rlhf([record], *RANK, "--length-penalty", points).pairs for points in (0, 1))
    assert (free["chosen"], taxed["chosen"]) == (long, short)
    assert (taxed["score_chosen"], taxed["score_rejected"]) == (
        8.0,
        2.0,
    )  # scores are exported untaxed


def test_length_penalty_counts_against_the_gap(process_record):
    # 1 point ahead at 1.5 ** 2 times the length: a penalty of 0.4 leaves 0.2, one of 0.6 nothing
    record = {"prompt": Q, "responses": [length(225, 1), length(100, 2)], "scores": [9, 8]}
    assert process_record(record, "--length-penalty", 0.4) == tuple(record["responses"])
    assert process_record(record, "--length-penalty", 0.6) == SMALL
    assert process_record(record | {"scores": [8, 9]}, "--length-penalty", 9) == tuple(
        record["responses"][::-1]
    )


# --- Answers without a signal, and repeats.


def test_answers_without_a_signal_go_to_the_judge(rlhf):
    record = {
        "prompt": Q,
        "responses": [B, A + " Warm air rises, cools, and its vapour turns into drops."],
    }
    result = rlhf([record], *RANK, "--judge-model", "offline:heuristic", "--min-score-gap", 0.1)
    [row] = result.pairs
    assert 1 <= row["score_rejected"] < row["score_chosen"] <= 10


def test_answers_without_a_signal_or_a_judge_are_dropped_with_the_flag_that_helps(rlhf):
    result = rlhf([LISTS], *RANK)
    assert result.status == 1
    [reason] = result.reasons
    assert reason.startswith(UNSAID + ": name a --judge-model, or the field that is one: --rename")


def test_a_signal_is_not_asked_of_the_judge_again(rlhf):
    [row] = rlhf([LISTS | {"scores": [70, 30]}], *RANK, "--judge-model", "offline:heuristic").pairs
    assert (row["score_chosen"], row["score_rejected"]) == (70.0, 30.0)


def test_a_prompt_may_come_again_with_other_answers_but_not_with_the_same(rlhf):
    other = LISTS | {"responses": [A, "Because of clouds, that is all I know."], "scores": [9, 2]}
    first, rescored = LISTS | {"scores": [9, 2]}, LISTS | {"scores": [9, 3]}
    result = rlhf([first, other, rescored, first, LISTS | {"ranks": [1, 2]}], *RANK)
    assert len(result.pairs) == 2 and len({row["prompt_id"] for row in result.pairs}) == 1
    assert result.reasons == ["input: repeated label"] * 3
    assert [drop["line"] for drop in result.dropped] == [3, 4, 5]


def test_a_field_renamed_onto_another_costs_the_record(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "p", "ranking": [1, 2], "ranks": [2, 1]}\n', "utf-8"
    )
    [(_, found)] = rc.read_records(
        str(tmp_path / "a.jsonl"), {"ranking": "ranks"}, with_answers=True
    )
    assert isinstance(found, rc.Failed) and "two fields" in found.reason


# --- Winners in all their spellings, choices numbered from 0 or from 1, the data sets of others.


def winner_of(row, *others):
    """What the first of a file's rows says is better: A or B, or `stage: reason` of its drop."""
    rows = [row, *others]
    run = SimpleNamespace(seed=0, args=SimpleNamespace(strategy="best_worst", length_penalty=0))
    try:
        [record] = rc.parse_row(row, True, rc.ChoiceNumbers(iter(rows)))
        if not record.signal:
            return "no signal"
        return rc.pair_up(record, record.answers, run)[0].chosen.text
    except rc.Failed as failed:
        return f"{failed.stage}: {failed.reason}"


# fmt: off
SPELLINGS = {
    "a, b": ("response_a", "response_b", {
        A: ["a", "A", "model_a", "Model A", "Response A", "response_a", "[[A]]", "A.", "(A)", "assistant A", "A>B", "A>>B", "B<A",
            "left", "first", "the first"[4:], A, f"  {A} ", "回答A", "模型A", "A > B", "model_a > model_b", "左", "前者"],
        B: ["b", "model_b", "Response B", "[[B]]", "B.", "B>A", "right", "second", B, "第二个", "右边", "回答 B", "后者", "Answer b"],
        "input: tie": ["tie", "Tie", "A=B", "a = b", "[[tie]]", "equal", "平局", "一样好", "draw"],
        "input: both bad": ["both bad", "neither", "tie (bothbad)", "都不好"],
        "input: winner not understood": ["model_c", "C", "left-ish", "A>C", "maybe a", "gpt-4"],
        "input: no preference": ["none", "N/A", " ", "null", "unknown"],
    }),
    "1, 2": ("output_1", "output_2", {
        A: ["output_1", "model_1", "1", 1, 1.0, "A", "first", "Output 1", A],
        B: ["output_2", "2", 2, "[[2]]", "b"[:1], "Assistant 2"],
        "input: winner not understood": [3, "model_3", 1.5],
    }),
    "a list": ("responses", None, {
        A: ["model_a", "a", "Response A", A, "left", "first"],
        B: ["B", "model_b", "right", B],
        "input: winner not understood": ["c", "response_c"],
    }),
}
# fmt: on


@pytest.mark.parametrize(
    "first, second, winner, expected",
    [
        pytest.param(first, second, winner, expected, id=f"{shape}: {winner}")
        for shape, (first, second, spellings) in SPELLINGS.items()
        for expected, winners in spellings.items()
        for winner in winners
    ],
)
def test_winners_are_understood_in_every_spelling(first, second, winner, expected):
    answers = {first: A, second: B} if second else {first: [A, B]}
    assert winner_of({"prompt": Q, "winner": winner} | answers).startswith(expected)


def numbered(winner, name="choice", ends="ab"):
    return {"prompt": Q, f"response_{ends[0]}": A, f"response_{ends[1]}": B, name: winner}


# fmt: off
NUMBERINGS = {  # the fields' ends, the numbers of the whole file, what the first of them means
    "a, b: 1 alone": ("ab", [1], FROM),
    "a, b: 0 alone is the first": ("ab", [0], A),
    "a, b: 1 beside a 0": ("ab", [1, 0], B),
    "a, b: 1 beside a 2": ("ab", [1, 2], A),
    "a, b: 2 beside a 1": ("ab", [2, 1], B),
    "a, b: 0, 1 and 2, one of which is a tie": ("ab", [1, 0, 2], FROM),
    "a, b: a minus one shows another coding": ("ab", [0, 1, -1], FROM),
    "a, b: a half shows another coding": ("ab", [0, 1, 0.5], FROM),
    "1, 2: the names fix 1": ("12", [1], A),
    "1, 2: the names fix 2": ("12", [2, 1], B),
    "1, 2: 0 is the first or a tie": ("12", [1, 0], FROM),
    "1, 2: 0 is a tie (PandaLM) or 2 is (Auto-J)": ("12", [1, 0, 2], FROM),
    "0, 1: the names fix 1": ("01", [1], B),
    "0, 1: the names fix 0": ("01", [0, 1], A),
    "0, 1: 2 is a tie or the second": ("01", [1, 2], FROM),
}
# fmt: on


@pytest.mark.parametrize("ends, values, expected", NUMBERINGS.values(), ids=NUMBERINGS)
@pytest.mark.parametrize("form", ["{}", "model_{}"])
@pytest.mark.parametrize("name", ["winner", "choice", "better_response_id"])
def test_the_whole_file_settles_what_a_number_means(ends, values, expected, form, name):
    if form != "{}" and not all(value in (0, 1, 2) for value in values):
        pytest.skip("no model has this number")
    texts = [value if form == "{}" else form.format(value) for value in values]
    rows = [numbered(text, name, ends) for text in texts]
    assert winner_of(*rows).startswith(expected)


@pytest.mark.parametrize("method", [str, int])
def test_numbers_are_settled_by_a_record_far_behind(rlhf, method):
    rows = [numbered(method(1)) | {"prompt": f"{Q} {i}"} for i in range(40)]
    last = numbered(method(2)) | {"prompt": "Is it wet?"}
    assert all(row["chosen"] == A for row in rlhf([*rows, last], *RANK).pairs[:40])
    last["choice"] = method(0)
    assert all(row["chosen"] == B for row in rlhf([*rows, last], *RANK).pairs[:40])
    result = rlhf(rows, *RANK)
    assert result.status == 2 and "--rename choice=winner_from_0" in result.err


def test_preference_of_another_coding_is_refused_in_the_whole_file():
    row = EVAL | {"preference": 1}
    assert winner_of(row) == A
    reason = winner_of(row, EVAL | {"preference": 0})
    assert reason.startswith("input: ambiguous winner: `preference` is 0, 1 in this file")
    assert winner_of(EVAL | {"winner_from_0": 1}) == B  # as the message advises
    assert winner_of(EVAL | {"winner_from_1": 1}) == A


# A winner that is named as a side of the ready pair: it agrees with the pair or contradicts it.
READY_ROWS = {
    "chosen, rejected": ("chosen", "rejected"),
    "OpenAI": ("preferred_output", "non_preferred_output"),
    "NeMo": ("chosen_response", "rejected_response"),
    "stack-exchange-paired": ("response_j", "response_k"),
    "RMB": ("chosen", "reject"),
    "ms-swift": ("response", "rejected_response"),
}


@pytest.mark.parametrize("better, worse", READY_ROWS.values(), ids=READY_ROWS)
@pytest.mark.parametrize("name", [*rc.LOOSE_WINNERS, "winner", "choice"])
@pytest.mark.parametrize("form", [str, str.title, lambda side: {"selected": side}])
def test_a_winner_that_names_a_side_of_the_ready_pair_is_read(better, worse, name, form):
    row = {"prompt": Q, better: A, worse: B}
    if name not in rc.LOOSE_WINNERS and form("x") != "x":
        form = str.upper  # {"selected": ...} is only read where it names an answer
    for side in {worse, "rejected"}:
        assert winner_of(row | {name: form(side)}).startswith(CONTRADICTION)
    for side in {better, "chosen"}:
        assert winner_of(row | {name: form(side)}) == A


def test_a_winner_that_names_a_side_of_several_answers_is_read():
    row = {"prompt": Q, "chosen": [A, f"{A} Often."], "rejected": [B]}
    assert winner_of(row | {"preference": "chosen"}) in row["chosen"]
    assert winner_of(row | {"preference": "rejected"}).startswith(CONTRADICTION)


SUMMARIES = {"info": {"post": Q}, "summaries": two("text")}
LIST = {"prompt": Q, "responses": [A, B]}
BOTH_NUMBERED = {"prompt": Q, "response_0": A, "response_1": B}


@pytest.mark.parametrize(
    "row, other",
    [
        (LIST | {"choice": 1}, SUMMARIES | {"choice": 0}),
        (LIST | {"winner": 1}, BOTH_NUMBERED | {"winner": 2}),
        (LIST | {"winner": 1}, {"prompt": Q, "generations": [A, B], "winner": 0}),
        (LIST | {"winner": 1}, SUFFIXED | {"winner": 0}),
        (LIST | {"winner": 1}, {"prompt": Q, "winner": 0}),
    ],
)
def test_rows_of_another_shape_do_not_settle_a_number(row, other):
    assert winner_of(row, other).startswith(FROM)


def test_rows_of_another_shape_may_contradict_a_number():
    other = {"prompt": Q, "generations": [A, B], "winner": 2}
    assert winner_of(LIST | {"winner": 0}, other).startswith(FROM)


def test_two_shapes_may_number_their_answers_in_two_ways():
    rows = [NUMBERED | {"choice": 1}, BOTH_NUMBERED | {"choice": 0}]
    assert winner_of(*rows) == A
    assert winner_of(*reversed(rows)) == A


def test_numbers_of_a_list_fit_the_answers_of_each_row():
    three = {"prompt": Q, "responses": [A, B, "Because."]}
    assert winner_of(LIST | {"winner": 1}, three | {"winner": 3}) == A


@pytest.mark.parametrize(
    "row, winner, loser",
    [
        (SHP | {"labels": 0}, {"first_is_better": 0}, {"first_is_better": 1}),
        (SUMMARIES | {"choice": 1}, {"winner_from_0": 1}, {"winner_from_0": 0}),
    ],
)
def test_a_field_with_the_name_of_a_derived_one_is_read_too(row, winner, loser):
    assert winner_of(row) == winner_of(row | winner) == B
    assert winner_of(row | loser).startswith(CONTRADICTION)


STRENGTH = {"response1": A, "response2": B, "overall_preference": -1}


def test_the_prompt_of_helpsteer3_is_its_context():
    row = STRENGTH | {"domain": "stem", "context": chat("q0", "a0", Q)}
    for beside in ({}, {"prompt": Q}, {"prompt": "another"}):
        [record] = rc.parse_row(row | beside, True)
        assert [turn["content"] for turn in record.messages] == ["q0", "a0", Q]
    [record] = rc.parse_row(row | {"history": [["h0", "h1"]]}, True)
    assert [turn["content"] for turn in record.messages] == ["h0", "h1", "q0", "a0", Q]


TREE = {"role": "prompter", "text": Q, "replies": two("text", role=["assistant"] * 2)}


def part(text):
    """A turn's content as LLaMA-Factory v1 has it."""
    return [{"type": "text", "value": text}]


# fmt: off
OF_OTHERS = {  # who is to win -> a row
    "JudgeBench": lambda w: {"question": Q, "response_A": A, "response_B": B, "label": ["A>B", "B>A"][w]},
    "RewardBench 2: lists": lambda w: {"prompt": Q, "chosen": [hi(w, A, B)[0]], "rejected": [hi(w, A, B)[1], "No."]},
    "RMB: best of n": lambda w: {"conversation_input": [user(Q)], "bon_best": {"llm_name": "m", "answer": hi(w, A, B)[0]},
                                 "loser_list": [{"llm_name": "n", "answer": hi(w, A, B)[1]}]},
    "RMB: pairs": lambda w: {"conversation_input": [user(Q)], "chosen": {"answer": hi(w, A, B)[0]}, "reject": {"answer": hi(w, A, B)[1]}},
    "OASST: replies with ranks from 0": lambda w: TREE | {"replies": two("text", rank=hi(w, 0, 1))},
    "OASST: a tree": lambda w: {"message_tree_id": "x", "prompt": TREE | {"replies": two("text", rank=hi(w, 0, 1))}},
    "ms-swift: messages, rejected_response": lambda w: {"messages": chat(Q, hi(w, A, B)[0]), "rejected_response": hi(w, A, B)[1]},
    "ms-swift: query, response": lambda w: {"query": Q, "response": hi(w, A, B)[0], "rejected_response": hi(w, A, B)[1]},
    "ms-swift: rejected_messages": lambda w: {"messages": chat(Q, hi(w, A, B)[0]), "rejected_messages": chat(Q, hi(w, A, B)[1])},
    "LLaMA-Factory, former ranking": lambda w: {"instruction": Q, "input": "", "output": hi(w, A, B)},
    "LLaMA-Factory v1": lambda w: {f"{side}_messages": [user(part(Q)), said(part(text))] for side, text in zip(("chosen", "rejected"), hi(w, A, B))},
    "NeMo": lambda w: {"prompt": Q, "chosen_response": hi(w, A, B)[0], "rejected_response": hi(w, A, B)[1]},
    "stack-exchange-paired": lambda w: {"question": Q, "response_j": hi(w, A, B)[0], "response_k": hi(w, A, B)[1]},
    "Label Studio": lambda w: {"prompt": Q, "answer1": A, "answer2": B, "comparison": ["left", "right"][w]},
    "Label Studio, nested": lambda w: {"prompt": Q, "answer1": A, "answer2": B, "comparison": {"selected": ["left", "right"][w]}},
    "PandaLM, its tie named": lambda w: {"instruction": Q, "response1": A, "response2": B, "winner_from_1": w + 1},
    "is_correct in a list": lambda w: {"prompt": Q, "responses": [A, B], "is_correct": hi(w, True, False)},
    "correct in a list, as a table writes it": lambda w: {"prompt": Q, "responses": [A, B], "correct": hi(w, "True", "False")},
    "is_correct in objects": lambda w: {"prompt": Q, "responses": two("text", is_correct=hi(w, True, False))},
    "correct in fields": lambda w: {"prompt": Q, "answer_a": A, "answer_b": B, "correct_a": 1 - w, "correct_b": w},
    "cells with JSON": lambda w: {"prompt": Q, "responses": json.dumps([A, B]), "scores": json.dumps(hi(w, 9, 2))},
    "cells with Python's text": lambda w: {"prompt": Q, "responses": str([A, B]), "scores": str(hi(w, 9.5, 2.0))},
    "message lists as text": lambda w: {"prompt": Q} | ready(w, lambda text: json.dumps([said(text)])),
    "whole chats as Python's text": lambda w: ready(w, lambda text: str(chat(Q, text))),
    "decimal commas": lambda w: {"prompt": Q, "response_a": A, "response_b": B, "score_a": hi(w, "7,5", "7,25")[0], "score_b": hi(w, "7,5", "7,25")[1]},
    "chosen is the text of one of a list": lambda w: {"prompt": Q, "responses": [A, B], "chosen": hi(w, A, B)[0], "rejected": hi(w, A, B)[1]},
    "winner is the text of one of a list": lambda w: {"prompt": Q, "responses": [A, B], "winner": hi(w, A, B)[0]},
    "preference names the answer": lambda w: {"prompt": Q, "response_1": A, "response_2": B, "preference": f"response_{w + 1}"},
    "first_is_better": lambda w: SUFFIXED | {"first_is_better": 1 - w},
    "Auto-J: fields with a space": lambda w: {"prompt": Q, "response 1": A, "response 2": B, "winner_from_0": w},
    "fields in Chinese": lambda w: {"prompt": Q, "回答A": A, "回答B": B, "winner": f"回答{'AB'[w]}"},
    "a model that is called model_1": lambda w: SUFFIXED | {"model_a": "model_2", "model_b": "model_1", "winner": f"model_{2 - w}"},
    "an empty winner beside a comparison": lambda w: SUFFIXED | {"winner": "", "comparison": ["left", "right"][w]},
    "correct that is no flag, and chosen that is none": lambda w: {"prompt": Q, "responses": two("text", score=hi(w, 2, 1), correct=[0.7, 0.8]), "chosen": True},
    "people decided against the scores": lambda w: {"prompt": Q} | ready(w, str) | {"score_chosen": 2.0, "score_rejected": 8.0, "decided_by": "people"},
}
# fmt: on


@pytest.mark.parametrize("winner", [0, 1])
@pytest.mark.parametrize("shape", OF_OTHERS.values(), ids=OF_OTHERS)
def test_the_data_sets_of_others_are_read_in_both_directions(process_record, shape, winner):
    assert process_record(shape(winner)) == tuple(hi(winner, A, B))


# fmt: off
REFUSED = {
    "preference against a strength": (NUMBERED | {"preference": "response_1", "preference_strength": 2}, CONTRADICTION),
    "is_correct against a winner": (SUFFIXED | {"is_correct_a": True, "is_correct_b": False, "winner": "b"}, CONTRADICTION),
    "all are correct": (LISTS | {"is_correct": [True, True]}, "input: tie"),
    "a label that is no comparison may name the worse one": (SUFFIXED | {"label": "A"}, "no signal"),
    "a label that is a number": (SUFFIXED | {"label": 1}, "no signal"),
    "chosen and rejected name one field": (SUFFIXED | {"chosen": "response_b", "rejected": "response_b"}, BESIDE),
    "chosen names an answer, rejected does not": (SUFFIXED | {"chosen": "response_b", "rejected": "?"}, BESIDE),
    "chosen alone names nothing": (SUFFIXED | {"chosen": "perhaps"}, BESIDE),
    "a letter that is also the other answer's text": ({"prompt": Q, "responses": ["B", "A"], "winner": "A"}, FROM),
    "a number that is also the other answer's text": ({"prompt": Q, "responses": ["1", "0"], "winner_from_0": 0}, FROM),
    "three texts in the former ranking": ({"instruction": Q, "output": [A, B, Q]}, "no signal"),
    "two texts in the former ranking beside scores": ({"instruction": Q, "output": [A, B], "scores": [1, 1]}, "input: tie"),
    "chosen alone is a long text of nobody": (SUFFIXED | {"chosen": A + A}, BESIDE),
    "a thousand or a decimal": (SUFFIXED | {"score_a": "7,500", "score_b": 8}, UNRATED),
    "scores of people's pairs against a list": (PAIR | {"decided_by": "people", "generations": [A, B], "ratings": [1, 5]}, CONTRADICTION),
    "SHP's -1 may stand beside a tie": (SHP | {"labels": -1}, UNCLEAR),
}
# fmt: on


@pytest.mark.parametrize("row, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_unclear_is_refused(row, reason):
    assert winner_of(row).startswith(reason)


def test_a_list_of_numbers_as_an_answer_stays_text():
    [record] = rc.parse_row({"instruction": Q, "output": "[1, 2]"})
    assert record.reference == "[1, 2]"


def test_a_lone_flag_does_not_cost_the_scores():
    row = LISTS | {"responses": two("text", score=[2, 9], is_correct=[True, None])}
    assert winner_of(row) == B


def test_equal_flags_say_nothing_beside_scores():
    row = LISTS | {"responses": FOUR[:3], "is_correct": [True, True, False], "scores": [2, 9, 1]}
    assert winner_of(row) == FOUR[1]


def test_answers_that_differ_in_case_only_are_a_pair_where_the_signal_differs():
    row = {"prompt": "Mock it.", "responses": ["a GiAnT sPiDeR", "a giant spider"]}
    assert winner_of(row | {"scores": [9, 2]}) == "a GiAnT sPiDeR"
    assert winner_of(PAIR | {"rejected": A.upper()}) == A


def test_an_indented_first_line_of_an_answer_keeps_its_indentation():
    [record] = rc.parse_row(PAIR | {"chosen": "\n    return 1\n", "rejected": " No. "}, True)
    assert [answer.text for answer in record.answers] == ["    return 1", "No."]


# --- Rows of one answer each.


def rows_of(*rated, name="score", field="output"):
    return [{"prompt": Q, field: text, name: value} for text, value in rated]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(rows_of((A, 2), (B, 9), name="reward"), id="OpenRLHF"),
        pytest.param(rows_of((A, 3), (B, 1), name="rank", field="response"), id="ranks"),
        pytest.param(rows_of((B, True), (A, False), name="label", field="completion"), id="KTO"),
        pytest.param(
            rows_of((B, "good"), (A, "bad"), name="label", field="completion"), id="words"
        ),
        pytest.param(rows_of((B, True), (A, False), name="kto_tag"), id="LLaMA-Factory's KTO"),
        pytest.param(rows_of((B, True), (A, False), name="is_correct"), id="is_correct"),
        pytest.param(
            [{"messages": chat(Q, B), "label": True}, {"messages": chat(Q, A), "label": False}],
            id="messages",
        ),
    ],
)
def test_rows_of_one_prompt_are_grouped(rlhf, rows):
    if "rank" in rows[0]:
        rows.append({"prompt": Q, "response": "Who knows?", "rank": 2})
    [row] = rlhf([GOOD, *rows], *RANK).pairs[1:]
    assert (row["prompt"], row["chosen"], row["rejected"]) == (Q, B, A)


def test_our_own_kto_output_is_read_back(rlhf, tmp_path):
    other = {"prompt": "Is it wet?", "chosen": "Yes, it is.", "rejected": "Not at all."}
    rlhf([PAIR, other], *RANK, "--output-format", "kto", output="kto.jsonl")
    made = rlhf(tmp_path / "kto.jsonl", *RANK, "--output-format", "basic").pairs
    assert made == [PAIR, other]


def test_one_answer_alone_is_dropped_and_kept_in_the_list(rlhf):
    alone = rows_of((A, 2)) + [GOOD] + rows_of((B, 9))
    result = rlhf(alone, *RANK)
    assert len(result.pairs) == 1 and [row["line"] for row in result.dropped] == [1, 3]
    assert all(reason.startswith("input: one answer alone") for reason in result.reasons)
    assert result.dropped[0]["answers"][0]["text"] == A


def test_a_score_of_another_name_groups_rows_once_it_is_renamed(rlhf):  # HelpSteer2
    rows = rows_of((A, 1), (B, 4), name="helpfulness", field="response")
    result = rlhf(rows, *RANK)
    assert result.status == 2 and "--rename NAME=score" in result.err
    [row] = rlhf(rows, *RANK, "--rename", "helpfulness=score").pairs
    assert (row["chosen"], row["score_chosen"]) == (B, 4.0)


def test_groups_are_bounded(monkeypatch):
    monkeypatch.setattr(rc, "GROUP_SIZE", 3)
    rows = enumerate(rows_of(*((f"Answer {i}", i) for i in range(7))), 1)
    sizes = [len(row["responses"]) for _, row in rc.group_rows(rows) if isinstance(row, dict)]
    assert sizes == [3, 3]


# --- Signals under other names: the message says which --rename reads them, and it works.

# fmt: off
UNREAD = {  # who is to win -> a row; the renames that read it
    "best: an index": (lambda w: SUFFIXED | {"best_answer": w}, ["best_answer=winner"]),
    "a letter under a strange name": (lambda w: SUFFIXED | {"my_pick": "AB"[w]}, ["my_pick=winner"]),
    "label as a letter": (lambda w: SUFFIXED | {"label": "AB"[w]}, ["label=winner"]),
    "label: 1 is the first": (lambda w: SUFFIXED | {"label": 1 - w}, ["label=first_is_better"]),
    "a list of numbers, higher is better": (lambda w: LISTS | {"quality": hi(w, 3.5, 1)}, ["quality=scores"]),
    "a list of numbers, lower is better": (lambda w: LISTS | {"losses": hi(w, 0, 1)}, ["losses=ranks"]),
    "numbers in fields": (lambda w: SUFFIXED | {"grade_a": hi(w, 3, 1)[0], "grade_b": hi(w, 3, 1)[1]}, ["grade_a=score_a", "grade_b=score_b"]),
    "numbers in fields without a mark": (lambda w: {"prompt": Q, "answer1": A, "answer2": B, "q1": hi(w, 3, 1)[0], "q2": hi(w, 3, 1)[1]}, ["q1=score1", "q2=score2"]),
    "a name in Chinese": (lambda w: SUFFIXED | {"标注": f"回答{'AB'[w]}"}, ["标注=winner"]),
    "a bare ranking of indices": (lambda w: LISTS | {"ranking": hi(w, 0, 1)}, ["ranking=order"]),
    "numbers from 1": (lambda w: SUFFIXED | {"winner": w + 1} , ["winner=winner_from_1"]),
    "numbers from 0, and a tie": (lambda w: NUMBERED | {"winner": w}, ["winner=winner_from_0"]),
    "PandaLM": (lambda w: {"instruction": Q, "response1": A, "response2": B, "annotator1": w + 1}, ["annotator1=winner_from_1"]),
    "preference from 0": (lambda w: EVAL | {"preference": w}, ["preference=winner_from_0"]),
    "chosen is a letter": (lambda w: SUFFIXED | {"chosen": "AB"[w]}, ["chosen=winner"]),
    "chosen and rejected are fields": (lambda w: SUFFIXED | {"chosen": f"response_{'ab'[w]}", "rejected": f"response_{'ba'[w]}"}, ["chosen=winner"]),
    "chosen and rejected are indices": (lambda w: {"prompt": Q, "response_0": A, "response_1": B, "chosen": w, "rejected": 1 - w}, ["chosen=winner"]),
}
# fmt: on


@pytest.mark.parametrize("shape, renames", UNREAD.values(), ids=UNREAD)
def test_the_message_names_a_field_that_is_not_read_and_a_rename_reads_it(rlhf, shape, renames):
    rows = [{**shape(i % 2), "prompt": f"{Q} {i}"} for i in range(4)]
    for row in rows:
        row.pop("instruction", None)
    if "winner" in rows[0] and "response_a" in rows[0]:
        rows = [rows[0], rows[2]]  # 1 alone: from 0 or from 1?
    result = rlhf(rows, *RANK)
    text = (result.reasons[0] if result.dropped else "") + result.err
    assert not result.pairs
    flags = []
    for rename in renames:
        assert rename.partition("=")[0] in text
        flags += ["--rename", rename]
    wanted = [A, A] if len(rows) == 2 else [A, B, A, B]
    assert [row["chosen"] for row in rlhf(rows, *RANK, *flags).pairs] == wanted


# --- contradictions and names that mislead

PLAIN_TWO = {"prompt": Q, "response_a": A, "response_b": B}
SIDES = {"prompt": Q, "chosen": A, "rejected": B}
SCORED_SIDES = {"prompt": Q, "chosen": {"text": A, "score": 1}, "rejected": {"text": B, "score": 9}}


def scored_items(text, score):
    return [{"text": text, "score": score}, {"text": f"{text} Yes.", "score": score}]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(SCORED_SIDES, id="scores inside the sides"),
        pytest.param(
            SIDES | {"chosen": scored_items(A, 1), "rejected": scored_items(B, 9)}, id="of lists"
        ),
        pytest.param(SIDES | {"margin": -1}, id="a negative margin"),
        pytest.param(PLAIN_TWO | {"winner": "a", "overall_preference": 3}, id="HelpSteer3's lead"),
        pytest.param(
            {"prompt": Q, "responses": [A, B], "winner": "a", "preference_strength": 3},
            id="HelpSteer2's lead",
        ),
    ],
)
def test_a_signal_beside_a_pair_that_contradicts_it_gives_no_pair(process_record, row):
    assert "contradictory signals" in process_record(row)


def test_scores_inside_the_sides_that_agree_give_the_pair(process_record):
    row = SIDES | {"chosen": {"text": A, "score": 9}, "rejected": {"text": B, "score": 1}}
    assert process_record(row) == (A, B)


def test_a_lead_of_other_names_alone_says_nothing(process_record):
    assert "without any signal" in process_record(PLAIN_TWO | {"overall_preference": 3})


def test_names_of_models_are_no_pair_of_answers(process_record):
    row = PLAIN_TWO | {"chosen": "gpt", "rejected": "llama"}
    assert process_record(row).startswith(BESIDE)


@pytest.mark.parametrize("field", [{"preferred_index": 1}, {"quality": [1, 9]}])
def test_a_list_of_outputs_beside_a_signal_is_no_pair(process_record, field):
    reason = process_record({"instruction": Q, "output": [A, B]} | field)
    assert "without any signal" in reason


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"response_a": "(B)", "response_b": "(A)", "winner": "A"}, id="letters"),
        pytest.param({"responses": ["B.", "A."], "winner": "A"}, id="letters in a list"),
    ],
)
def test_a_letter_that_is_also_the_other_answers_text_is_ambiguous(process_record, row):
    assert "ambiguous winner" in process_record({"prompt": Q} | row)


@pytest.mark.parametrize("winner", ["!b", "1_0"])
def test_a_negated_name_and_a_python_number_name_no_winner(process_record, winner):
    assert "winner not understood" in process_record(PLAIN_TWO | {"winner": winner})


def rated_row(score, reference):
    return {"prompt": Q, "response": f"{A} {score}", "score": score, "reference": reference}


@pytest.mark.parametrize(("second", "reference"), [("rain", "rain"), ("snow", "")])
def test_grouped_rows_keep_the_reference_on_which_they_agree(tmp_path, second, reference):
    rows = [rated_row(1, "rain"), rated_row(2, second)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    [(_, record)] = rc.read_records(str(tmp_path / "in.jsonl"), with_answers=True)
    assert (record.reference, len(record.answers)) == (reference, 2)


def test_two_labels_of_one_answer_that_contradict_each_other_are_no_label(rlhf):
    rows = [
        {"prompt": "Why?", "completion": "good", "label": True, "kto_tag": False},
        {"prompt": "Why?", "completion": "bad", "label": False, "kto_tag": False},
    ]
    result = rlhf(rows, "--method", "rank_responses")
    assert result.status == 2 and not result.pairs
