"""which answer is chosen and which is rejected, in every case that can come up."""

import asyncio
import itertools

import pytest

import rlhf_constructor as rc
from tests.tiny import LOCAL, ROOT, ask, judged_by, pair, run_of, shown, verdict, wait, why

DEMO = str(ROOT / "data" / "alpaca_demo.jsonl")
STRONG_AND_WEAK = ["--high-model", f"openai:strong{LOCAL}", "--low-model", f"openai:weak{LOCAL}"]


def comparison(judge, *flags, high="It is 42.", low="It is 41.", names=("judge",)):
    """A run of model_comparison: two scripted models, and judges whose reply is judge(name, sheet)."""
    says = lambda name, prompt: {"strong": high, "weak": low}.get(name) or judge(name, prompt)
    return run_of(*STRONG_AND_WEAK, *judged_by(*names), *flags, says=says)


def process_record(record, run) -> str:
    """`chosen over rejected`, or `stage: reason`, of one record through its method and all filters."""
    outcome = wait(rc.process_record(record, run))
    if not outcome.pairs:
        return f"{outcome.stage}: {outcome.reason.split(':')[0]}"
    return ", ".join(f"{p.chosen.model or p.chosen.text} over {p.rejected.model or p.rejected.text}"
                     for p in outcome.pairs)  # fmt: skip


# --- direction: the whole truth table

SAYS = {
    "high": (8, 3),
    "low": (3, 8),
    "tie": (6, 6),
    "unparsed": None,
}  # scores of (high, low) in one order


def verdict_by_order(high_first: str, low_first: str):
    """A judge that says one thing when the strong model's answer is shown first, another when it is second."""

    def judge(name, judge_in_order):
        said = SAYS[high_first if shown(judge_in_order)[0][1] == "It is 42." else low_first]
        return (
            "no idea" if said is None else verdict(judge_in_order, lambda t: said[t != "It is 42."])
        )

    return judge


def expected(one: str, two: str, when_low_wins: str) -> str:
    """What must become of the pair, said once more and in words."""
    if "unparsed" in (one, two):
        return "judge: unreadable judge reply"
    if one == two == "high":
        return "strong over weak"
    if one == two == "low":
        return "weak over strong" if when_low_wins == "flip" else "judge: low model won"
    return "judge: tie" if one == two == "tie" else "judge: orders disagree"


@pytest.mark.parametrize("when_low_wins", ["drop", "flip"])
@pytest.mark.parametrize("high_first, low_first", [*itertools.product(SAYS, SAYS)])
def test_a_pair_needs_the_same_winner_in_both_orders(high_first, low_first, when_low_wins):
    run = comparison(verdict_by_order(high_first, low_first), "--when-low-wins", when_low_wins)
    assert process_record(ask(), run) == expected(high_first, low_first, when_low_wins)


JURIES = [  # the winner that each judge sees (in both orders) -> the fate
    (["high", "high"], "strong over weak"),
    (["high", "high", "high"], "strong over weak"),
    (["high", "high", "low"], "judge: orders disagree"),
    (["high", "low"], "judge: orders disagree"),
    (["high", "tie"], "judge: orders disagree"),
    (["tie", "tie"], "judge: tie"),
    (["low", "low"], "judge: low model won"),
    (["low", "low", "high"], "judge: orders disagree"),
    (["high", "unparsed"], "judge: unreadable judge reply"),
]


@pytest.mark.parametrize(
    "jury, outcome", JURIES, ids=lambda value: "-".join(value) if type(value) is list else None
)
def test_every_judge_must_agree(jury, outcome):
    seen = dict(zip("xyz", jury))
    judge = lambda name, judge_in_order: verdict_by_order(seen[name], seen[name])(
        name, judge_in_order
    )
    assert process_record(ask(), comparison(judge, names=tuple(seen))) == outcome


@pytest.mark.parametrize("orders", [1, 2])
@pytest.mark.parametrize("low", [5, 5.9, 6, 9])
def test_flip_believes_a_low_model_that_wins_by_3_points_in_every_vote(low, orders):
    judge = lambda _, judge_in_order: verdict(judge_in_order, lambda t: 3 if "42" in t else low)
    flags = ["--when-low-wins", "flip", "--judge-orders", str(orders)]
    assert process_record(ask(), comparison(judge, *flags)) == (
        "weak over strong" if low >= 6 else "judge: low model won"
    )


def test_a_flip_by_3_points_in_the_mean_alone_is_not_enough():
    judge = lambda _, judge_in_order: verdict(
        judge_in_order,
        lambda t: 3 if "42" in t else 5 if "42" in shown(judge_in_order)[0][1] else 9,
    )
    assert (
        process_record(ask(), comparison(judge, "--when-low-wins", "flip"))
        == "judge: low model won"
    )


def test_one_order_takes_a_biased_judge_at_its_word_and_two_orders_do_not():
    biased = lambda _, judge_in_order: verdict(
        judge_in_order, lambda t: 9 if t == shown(judge_in_order)[0][1] else 4
    )
    prompts = [ask(f"Prompt {i}") for i in range(12)]
    assert {process_record(p, comparison(biased)) for p in prompts} == {"judge: orders disagree"}
    assert len({process_record(p, comparison(biased, "--judge-orders", "1")) for p in prompts}) == 2


def test_an_example_worked_by_hand_from_record_to_row():
    """Record: "What is 6 times 7?". strong says 42, weak says 41; judge x gives (42: 9, 41: 2) when 42 stands
    first and (8, 3) when it stands second. Votes of 42: 9 and 8, mean 8.5; of 41: 2 and 3, mean 2.5. 42 leads
    in both orders, by 6 in the mean (1 is needed), so it is chosen. prompt_id is a hash of the messages."""
    judge = lambda _, judge_in_order: verdict(
        judge_in_order,
        {True: {"42": 9, "41": 2}, False: {"42": 8, "41": 3}}[
            shown(judge_in_order)[0][1] == "42"
        ].get,
    )
    run = comparison(judge, high="42", low="41")
    [pair] = wait(rc.process_record(ask(), run)).pairs
    assert rc.as_standard(pair, run) == [
        {"prompt": "What is 6 times 7?", "chosen": "42", "rejected": "41", "score_chosen": 8.5,
         "score_rejected": 2.5, "chosen_model": "strong", "rejected_model": "weak",
         "prompt_id": rc.digest([{"role": "user", "content": "What is 6 times 7?"}])[:16]}
    ]  # fmt: skip


# --- a wrong label is never the judge's slot

LOOK_ALIKES = [
    pytest.param("Is 7 prime?", "Yes", "No", id="one word"),
    pytest.param("7是质数吗？", "是", "不是", id="one word, Chinese"),
    pytest.param("Sort: great film!", "positive", "negative", id="label"),
    pytest.param("判断情感：太好看了！", "正面", "负面", id="label, Chinese"),
    pytest.param("What is 17 * 23?", "17 * 23 = 17 * 20 + 17 * 3 = 340 + 51 = 391",
                 "17 * 23 = 17 * 20 + 17 * 3 = 340 + 51 = 381", id="one digit changed"),
    pytest.param("17乘23等于多少？", "17乘20得340，17乘3得51，相加得391，所以答案是391。",
                 "17乘20得340，17乘3得51，相加得381，所以答案是381。", id="one digit changed, Chinese"),
    pytest.param("What is 6 minus 48?", "-42", "42", id="a sign"),
    pytest.param("Write max(a, b) in Python.", "def largest(a, b):\n    return a if a > b else b",
                 "def largest(a, b):\n    return a if a < b else b", id="one token of code changed"),
    pytest.param("用 Python 写一个求和函数。", "```python\ndef add(a, b):\n    return a + b\n```",
                 "```python\ndef add(a, b):\n    return a - b\n```", id="one token of code changed, Chinese"),
]  # fmt: skip


@pytest.mark.parametrize(
    "reference", ["", "right", "other"], ids=["no reference", "itself", "another"]
)
@pytest.mark.parametrize("prompt, right, wrong", LOOK_ALIKES)
def test_the_right_answer_is_chosen_from_either_slot_and_no_filter_objects(
    prompt, right, wrong, reference
):
    record = ask(prompt, {"right": right, "other": "The answer of the book."}.get(reference, ""))
    judge = lambda _, judge_in_order: verdict(judge_in_order, lambda t: 8 if t == right else 5)
    starts = set()
    for seed in range(8):
        run = comparison(judge, "--seed", str(seed), high=right, low=wrong)
        assert process_record(record, run) == "strong over weak"
        mirrored = comparison(
            judge, "--seed", str(seed), "--when-low-wins", "flip", high=wrong, low=right
        )
        assert process_record(record, mirrored) == "weak over strong"
        starts.add(shown(run.models.asked[2][1])[0][1])
    assert starts == {right, wrong}


# --- model_comparison without a judge, and its pool


def test_without_a_judge_the_models_are_trusted_and_the_row_has_no_scores():
    run = run_of(*STRONG_AND_WEAK, "--judge-model", "none", says=lambda name, _: f"{name} says so")
    [pair] = wait(rc.process_record(ask(), run)).pairs
    assert (pair.chosen.text, pair.rejected.text, pair.gap) == (
        "strong says so",
        "weak says so",
        None,
    )
    assert not {"score_chosen", "score_rejected"} & rc.as_standard(pair, run)[0].keys()


LOST = [
    pytest.param(rc.Failed("model", "500 InternalError"), "model: 500 InternalError", id="failed"),
    pytest.param(rc.Reply("It is 4", "length"), "filter: truncated", id="truncated"),
    pytest.param(
        rc.Reply("It is", "content_filter"),
        "filter: filtered by the provider",
        id="cut by a content filter",
    ),
    pytest.param(" \n", "filter: empty answer", id="empty"),
    pytest.param(
        "<think>only a thought</think>", "filter: empty answer", id="nothing but a thought"
    ),
    pytest.param("it is  42", "filter: identical answers", id="identical"),
    pytest.param("It is <|im_end|>", "filter: control tokens", id="control tokens"),
]


@pytest.mark.parametrize("weak, reason", LOST)
def test_a_lost_answer_ends_the_comparison_before_the_judge(weak, reason):
    run = comparison(lambda *_: pytest.fail("the judge was asked"), low=weak)
    assert process_record(ask(), run).startswith(reason)


def test_a_thought_is_cut_off_before_anyone_judges_or_trains_on_it():
    run = comparison(
        lambda _, judge_in_order: verdict(judge_in_order, {"42": 9, "41": 2}.get),
        high="<think>6*7</think>\n42",
        low="41",
    )
    [pair] = wait(rc.process_record(ask(), run)).pairs
    assert pair.chosen.text == "42"


# --- generate_pairs

POOL = ["--method", "generate_pairs", "--num-candidates", "4"]
POOL += ["--candidate-models", *(f"openai:{name}{LOCAL}" for name in "abcd"), *judged_by("judge")]
GOOD = {"a": "It is 42.", "b": "About 40.", "c": "Many.", "d": "It is 12, I think."}
MARKS = {"It is 42.": 9, "About 40.": 5, "Many.": 3, "It is 12, I think.": 2}


def candidates(*flags, marks=MARKS, **changed):
    """A run of generate_pairs over models a, b, c, d that say GOOD, but for those that say otherwise."""
    replies = GOOD | changed
    return run_of(
        *POOL, *flags, says=lambda name, prompt: replies.get(name) or verdict(prompt, marks.get)
    )


def test_the_best_candidate_is_chosen_and_the_worst_rejected():
    assert process_record(ask(), candidates()) == "a over d"


REFUSAL = "I'm sorry, but I can't help with that."
LEAVERS = [*LOST, pytest.param(REFUSAL, "filter: refusal", id="refused"),
           pytest.param("很抱歉，我无法回答这个问题。", "filter: refusal", id="refused in Chinese")]  # fmt: skip


@pytest.mark.parametrize("text, reason", LEAVERS)
def test_a_candidate_that_cannot_be_used_leaves_the_pool(text, reason):
    run = candidates(d=text)
    assert process_record(ask(), run) == "a over c"
    assert all(
        len(shown(judge_in_order)) == 3
        for name, judge_in_order in run.models.asked
        if name == "judge"
    )


@pytest.mark.parametrize("text, reason", LEAVERS)
def test_fewer_than_two_candidates_left_end_the_record(text, reason):
    run = candidates(b=text, c=text, d=text)
    assert process_record(ask(), run).startswith(reason)
    assert "judge" not in [name for name, _ in run.models.asked]


def test_a_rerun_may_cure_a_failure_but_not_a_filter():
    failed = rc.Failed("model", "500 InternalError", retryable=True)
    assert wait(rc.process_record(ask(), candidates(b=failed, c=failed, d=" "))).retryable
    assert not wait(rc.process_record(ask(), candidates(b=" ", c=" ", d=" "))).retryable


def test_a_pair_of_candidates_needs_two_points():
    assert (
        process_record(ask(), candidates(marks=dict.fromkeys(MARKS, 5) | {"It is 42.": 6.9}))
        == "filter: score gap too small"
    )
    assert process_record(
        ask(), candidates(marks=dict.fromkeys(MARKS, 5) | {"It is 42.": 7})
    ).startswith("a over ")


def test_model_comparison_needs_one_point():
    marks = lambda high: comparison(lambda _, judge_in_order: verdict(judge_in_order, {"It is 42.": high, "It is 9.": 5}.get),
                                    low="It is 9.")  # fmt: skip
    assert [process_record(ask(), marks(high)) for high in (5.9, 6)] == [
        "filter: score gap too small",
        "strong over weak",
    ]


# --- strategies, by hand: a is best with 9, then b 7, c 7, d 4; b beats c in no vote, and c not b

RANKED = {"a": (9, 9), "b": (7, 7), "c": (7, 7), "d": (5, 3)}


def paired(strategy, *flags, votes=RANKED, texts=None, record=None):
    """The pairs of a strategy as `ad`: a is chosen, d is rejected."""
    answers = [rc.Answer((texts or {}).get(n, n), n, sum(v) / len(v), v) for n, v in votes.items()]
    try:
        pairs = rc.pair_up(record or ask(), answers[::-1], run_of("--strategy", strategy, *flags))
    except rc.Failed as failed:
        return why(failed)
    return sorted(pair.chosen.model + pair.rejected.model for pair in pairs)


def test_best_worst():
    assert paired("best_worst") == ["ad"]


def test_best_random_draws_one_of_those_that_the_best_beats_and_the_seed_decides():
    drawn = [paired("best_random", "--seed", str(seed)) for seed in range(30)]
    assert {pair for [pair] in drawn} == {"ab", "ac", "ad"}
    assert drawn == [paired("best_random", "--seed", str(seed)) for seed in range(30)]


def test_best_random_never_draws_one_that_was_ahead_in_a_vote():
    votes = {"a": (9, 6), "b": (7, 7), "c": (3, 3)}
    assert {tuple(paired("best_random", "--seed", str(s), votes=votes)) for s in range(20)} == {
        ("ac",)
    }


def test_all_pairs_leaves_out_ties():
    assert paired("all_pairs") == ["ab", "ac", "ad", "bd", "cd"]


def test_adjacent_leaves_out_ties():
    assert paired("adjacent") in (
        ["ab", "cd"],
        ["ac", "bd"],
    )  # b and c tie: a hash decides who stands first
    assert paired("adjacent", votes={"a": (9,), "b": (7,), "c": (4,)}) == ["ab", "bc"]


NO_PAIR = [
    pytest.param({"a": (5, 5), "b": (5, 5)}, "judge: tie", id="a tie"),
    pytest.param(
        {"a": (9, 3), "b": (3, 9)},
        "judge: orders disagree",
        id="each wins once, the means are equal",
    ),
    pytest.param({"a": (9, 3), "b": (4, 5)}, "judge: orders disagree", id="each wins once"),
    pytest.param({"a": (9, 5), "b": (4, 5)}, "judge: orders disagree", id="a tie in one order"),
    pytest.param({"a": (9,)}, "input: fewer than two answers", id="a single answer"),
    pytest.param({}, "input: fewer than two answers", id="no answer"),
]


@pytest.mark.parametrize("strategy", rc.STRATEGIES)
@pytest.mark.parametrize("votes, reason", NO_PAIR)
def test_no_strategy_makes_a_pair_without_a_winner(strategy, votes, reason):
    assert paired(strategy, votes=votes) == reason


@pytest.mark.parametrize("strategy", rc.STRATEGIES)
def test_answers_that_tie_in_the_input_are_the_inputs_fault(strategy):
    votes = {"a": (5, 5), "b": (5, 5)}
    assert paired(strategy, votes=votes, record=ask(signal="score")) == "input: tie"


@pytest.mark.parametrize("strategy", rc.STRATEGIES)
def test_chosen_leads_in_every_vote_whatever_the_votes_are(strategy):
    levels = itertools.product((3, 5, 8), repeat=2)
    for votes in itertools.combinations_with_replacement(levels, 3):
        answers = [rc.Answer(name, name, sum(v) / 2, v) for name, v in zip("abc", votes)]
        try:
            pairs = rc.pair_up(ask(), answers, run_of("--strategy", strategy))
        except rc.Failed:
            pairs = []
        assert all(c > r for p in pairs for c, r in zip(p.chosen.votes, p.rejected.votes))


# --- length penalty, by hand: one point of --length-penalty for each factor 1.5 in characters


@pytest.mark.parametrize(
    "chosen, rejected, points", [(150, 100, 2), (225, 100, 4), (100, 100, 0), (100, 900, 0)]
)
def test_a_longer_chosen_costs_points_and_a_shorter_one_earns_none(chosen, rejected, points):
    run = run_of("--length-penalty", "2")
    assert rc.penalty(rc.Answer("x" * chosen), rc.Answer("y" * rejected), run) == pytest.approx(
        points
    )


def test_with_a_length_penalty_the_pair_with_the_largest_rest_of_its_gap_is_made():
    """a (9, 225 characters) against c (4, 100): gap 5, two factors 1.5, penalty 2 x 2 = 4, rest 1.
    b (7, 100) against c: gap 3, no penalty, rest 3. a against b: gap 2, penalty 4, rest -2. So: b over c."""
    votes, texts = (
        {"a": (9, 9), "b": (7, 7), "c": (4, 4)},
        {"a": "a" * 225, "b": "b" * 100, "c": "c" * 100},
    )
    assert paired("best_worst", texts=texts, votes=votes) == ["ac"]
    assert paired("best_worst", "--length-penalty", "2", texts=texts, votes=votes) == ["bc"]


def test_the_penalty_counts_against_the_gap_that_is_needed():
    """9 against 5 is a gap of 4; chosen is 1.5 times as long: at 2 points a factor 2 are left, at 3 only 1."""
    marks = {"x" * 30: 9, "y" * 20: 5}
    for points, outcome in (("2", "a over b"), ("3", "filter: score gap too small")):
        run = run_of("--method", "generate_pairs", "--num-candidates", "2", "--length-penalty", points,
                     "--candidate-models", f"openai:a{LOCAL}", f"openai:b{LOCAL}", *judged_by("judge"),
                     says=lambda name, p: {"a": "x" * 30, "b": "y" * 20}.get(name) or verdict(p, marks.get))  # fmt: skip
        assert process_record(ask(), run) == outcome


# --- a method of one's own


def test_a_method_may_be_a_plain_function_and_direction_stays_law(monkeypatch):
    def upside_down(record, run):
        """Wrong on purpose."""
        return [
            rc.Pair(
                record,
                rc.Answer("bad", votes=(2, 2), score=2),
                rc.Answer("good", votes=(9, 9), score=9),
            )
        ]

    monkeypatch.setitem(rc.METHODS, "upside_down", upside_down)
    assert process_record(ask(), run_of("--method", "upside_down")) == "judge: rejected answer won"


def hand_made(monkeypatch, chosen_votes, rejected_votes):
    """What becomes of a pair of two answers with these votes, which a method makes by hand."""

    def by_hand(record, run):
        """A pair made by hand."""
        chosen = rc.Answer("It is 42.", votes=chosen_votes)
        return [rc.Pair(record, chosen, rc.Answer("No.", votes=rejected_votes))]

    monkeypatch.setitem(rc.METHODS, "by_hand", by_hand)
    return process_record(ask(), run_of("--method", "by_hand"))


def test_a_pair_is_lost_by_every_vote_or_by_some(monkeypatch):
    assert hand_made(monkeypatch, (2, 2), (9, 9)) == "judge: rejected answer won"
    assert hand_made(monkeypatch, (2, 9), (9, 2)) == "judge: orders disagree"
    assert hand_made(monkeypatch, (2, 2), (2, 2)) == "judge: orders disagree"


def test_a_pair_whose_answers_were_judged_apart_stops_the_run(monkeypatch):
    with pytest.raises(
        rc.PartError, match="2 votes for chosen and 1 for rejected: judge both answers"
    ):
        hand_made(monkeypatch, (9, 9), (2,))


def test_pair_up_needs_judged_answers_and_says_so():
    async def judge():
        return []

    unfinished = judge()
    with pytest.raises(TypeError, match="write `await` before run.judge"):
        rc.pair_up(ask(), unfinished, run_of())
    unfinished.close()
    answers = [rc.Answer("a", votes=(9.0, 9.0)), rc.Answer("b", votes=(2.0,))]
    with pytest.raises(ValueError, match="judge all answers together"):
        rc.pair_up(ask(), answers, run_of())


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="the stage 'judging' is none of input, model, judge"):
        rc.Failed("judging", "too bad")


@pytest.mark.parametrize("scale", [(1, 5), (0, 100)])
def test_another_scale_gives_as_many_pairs(monkeypatch, rlhf, scale):
    """Gaps stand in points of 1-10 and are fitted to the scale."""
    flags = ("--provider", "offline", "--method", "generate_pairs", "--report-path", "none")
    usual = len(rlhf(DEMO, *flags).pairs)
    monkeypatch.setattr(rc, "JUDGE_SCALE", scale)
    assert abs(len(rlhf(DEMO, *flags).pairs) - usual) <= 1


@pytest.mark.parametrize("scale, gap", [((1, 10), 3.0), ((1, 4), 1.0), ((0, 90), 30.0)])
def test_gaps_in_the_code_are_fitted_to_the_scale(monkeypatch, scale, gap):
    monkeypatch.setattr(rc, "JUDGE_SCALE", scale)
    assert rc.on_judge_scale(rc.FLIP_GAP) == gap
    assert rc.needed_gap(pair("a", "b"), run_of("--method", "generate_pairs")) == gap * 2 / 3


def test_the_most_urgent_of_several_errors_is_raised():
    """A Stop, then a bug, then a reply that is not there yet, then a record's own failure."""
    errors = [rc.Failed("model", "x"), rc.Pending(), rc.PartError("x"), rc.Stop("x")]

    async def fail(error):
        raise error

    async def gather(errors):
        return await rc.gather_all([fail(error) for error in errors])

    for count in range(4, 0, -1):
        with pytest.raises(type(errors[count - 1])):
            asyncio.run(gather(errors[:count]))


def test_a_name_is_taken_once_and_needs_a_docstring():
    def model_comparison(record, run):
        """Another one."""

    for entry, reason in ((model_comparison, "the name is taken"), (lambda: 0, "no docstring")):
        with pytest.raises(ValueError, match=reason):
            rc.register(rc.METHODS)(entry)


# --- a method of one's own meets the same filters

LOOP = "Well, this is a loop that goes on. " * 40
UNFIT = {"empty answer": "", "control tokens": "<|im_end|> Yes.", "repetition loop": LOOP,
         "truncated: strong reached --max-tokens": rc.Reply("It is for", finish="length")}  # fmt: skip


@pytest.mark.parametrize("reason", UNFIT)
def test_what_no_answer_may_be_is_no_text_to_work_with(reason):
    run = run_of(*STRONG_AND_WEAK, *judged_by("judge"), says=lambda name, prompt: UNFIT[reason])
    assert why(wait(run.ask_text(ask(), run.high, ask().messages))) == f"filter: {reason}"


@pytest.mark.parametrize("reason", ["empty answer", "control tokens", "repetition loop"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_what_no_answer_may_be_is_no_side_of_a_pair(reason, side):
    texts = {"chosen": "It is 42, for six sevens are that.", "rejected": "No idea."} | {
        side: UNFIT[reason]
    }

    def mine(record, run):
        return [rc.Pair(record, *map(rc.Answer, texts.values()))]

    run = run_of("--judge-model", "none")
    run.method = mine
    assert process_record(ask(reference="42"), run) == f"filter: {reason}"


# --- which models, which samples, which names


def pool_of(*specs, count="4"):
    """A run of generate_pairs over these candidate models."""
    return run_of("--method", "generate_pairs", "--num-candidates", count,
                  "--candidate-models", *specs, *judged_by("judge"),
                  says=lambda name, prompt: f"I am {name}, number {len(prompt)}.")  # fmt: skip


@pytest.mark.parametrize(
    "specs, samples",
    [("m", "m0 m1 m2 m3"), ("mm", "m0 m1 m2 m3"), ("mn", "m0 n0 m1 n1"), ("mmn", "m0 m1 n0 m2")],
)
def test_a_model_that_is_named_twice_gives_samples_of_its_own(specs, samples):
    run = pool_of(*(f"openai:{name}{LOCAL}" for name in specs))
    assert " ".join(f"{model.name}{sample}" for model, sample in run.candidates) == samples


def test_one_name_at_two_addresses_is_two_names_in_rows():
    run = pool_of("openai:m@http://localhost:1/v1", "openai:m@http://localhost:2/v1", count="2")
    answers = wait(run.ask_all(ask(), [(run.candidates[0][0], 0), (run.candidates[1][0], 1)]))
    assert "identical answers" in why(answers)  # the script answers both alike
    names = [run.names[model] for model, _ in run.candidates]
    assert names == ["m@http://localhost:1/v1", "m@http://localhost:2/v1"]


def test_a_name_of_its_own_stays_a_plain_name():
    run = pool_of(f"openai:m{LOCAL}", f"openai:n{LOCAL}")
    assert {run.names[model] for model, _ in run.candidates} == {"m", "n"}


def test_a_provider_without_default_models_asks_for_them(monkeypatch):
    monkeypatch.delitem(rc.DEFAULT_MODELS, "openai")
    with pytest.raises(rc.UserError, match="name --high-model and --low-model"):
        run_of("--provider", "openai")


# --- who decided, and what is looked at twice


def test_a_label_that_people_decided_outlives_scores_that_say_the_opposite():
    answers = [
        rc.Answer("It is 42.", score=3.0, votes=(1.0,)),
        rc.Answer("It is 41.", score=8.0, votes=(0.0,)),
    ]
    record = ask(answers=answers, signal="choice", decided_by="people")
    run = run_of("--method", "rank_responses")
    [pair] = wait(rc.process_record(record, run)).pairs
    assert (pair.chosen.text, pair.human) == ("It is 42.", True)


def test_an_answer_filter_looks_at_an_answer_once(monkeypatch):
    seen = []

    def watching(record, answer):
        """notes what it sees"""
        seen.append(answer.text)

    watching.on = "answer"
    monkeypatch.setitem(rc.FILTERS, "watching", watching)
    run = comparison(lambda _, sheet: verdict(sheet, {"It is 42.": 9, "It is 41.": 2}.get))
    assert process_record(ask(), run) == "strong over weak"
    assert sorted(seen) == ["It is 41.", "It is 42."]


def test_two_texts_that_differ_in_case_alone_are_a_pair_if_the_label_tells_them_apart():
    answers = [rc.Answer("a GiAnT", votes=(1.0,)), rc.Answer("a giant", votes=(0.0,))]
    run = run_of("--method", "rank_responses")
    record = ask(answers=answers, signal="choice")
    assert rc.usable_answers(record, run) == answers


@pytest.mark.parametrize(
    "texts, reason",
    [
        (["Yes", "Yes"], "filter: identical answers"),
        (["Yes", "Yes", "No"], "input: contradictory signals"),
    ],
)
def test_one_text_with_two_votes(texts, reason):
    answers = [rc.Answer(text, votes=(float(place),)) for place, text in enumerate(texts)]
    run = run_of("--method", "rank_responses")
    with pytest.raises(rc.Failed) as failed:
        rc.usable_answers(ask(answers=answers, signal="choice"), run)
    assert why(failed.value).startswith(reason)


def test_the_reference_is_never_damaged_as_a_text_to_work_with():
    reference = "First. Second. Third. Fourth."
    run = run_of()
    assert wait(run.ask_text(ask(reference=reference), run.high, ask().messages)) == reference
