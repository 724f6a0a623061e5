"""planted faults are found, clean data is not accused, formulas are right, the page is safe."""

import itertools
import json
import math
import random
import re
import statistics

import pytest

import rlhf_constructor as rc
from tests.chromium import browser, needs_chromium


def process_record(record, pairs=(), answers=(), stage="", reason=""):
    """What became of a record whose pool was `answers`."""
    record.answers = list(answers)
    return rc.Outcome(record, list(pairs), stage, reason)


ENGLISH = ["".join(random.Random(i).choices("aeiourstnlmdkp", k=3 + i % 6)) for i in range(3000)]
CHINESE = [chr(0x4E00 + 7 * i) for i in range(2000)]
SETTINGS = {"method": "generate_pairs", "judges": ["gpt-4o"], "seed": 0}
COLUMNS = ("model", "role", "calls", "cached", "tokens_in", "tokens_out", "money")
USAGE = [
    dict(zip(COLUMNS, row))
    for row in (
        ("qwen-max", "answer", 400, 100, 9000, 70000, 1.5),
        ("gpt-4o", "judge", 800, 0, 90000, 30000, 2.5),
    )
]


@pytest.fixture(params=["english", "chinese"])
def write(request):
    """write(rng, words): a text of random words (or characters), few of them frequent."""
    words, mark = (ENGLISH, " ") if request.param == "english" else (CHINESE, "")
    weights = list(itertools.accumulate(1 / (i + 20) for i in range(len(words))))

    def text(rng, n):
        return mark.join(rng.choices(words, cum_weights=weights, k=n))

    text.mark = mark
    return text


def judge(rng, quality, place):
    """A fair judge: sees quality through noise, from 1 to 10."""
    return min(10.0, max(1.0, round(quality + rng.gauss(0, 0.7))))


def outcomes(write, n=400, change=None, judge=judge, prompt=None):
    """n records with two judged answers each; `change(rng, record, chosen, rejected)` plants a fault."""
    rng = random.Random(7)
    for i in range(n):
        content = prompt(rng, i) if prompt else write(rng, 30)
        record = rc.Record([{"role": "user", "content": content}], line=i + 1)
        answers = []
        first = rng.randrange(2)
        for j, model in enumerate(rng.sample(["qwen-max", "claude-x", "llama-3"], 2)):
            quality = rng.uniform(2, 9)
            positions = (abs(first - j), 1 - abs(first - j))
            votes = tuple(judge(rng, quality, place) for place in positions)
            text = write(rng, rng.randrange(60, 140))
            answers.append(rc.Answer(text, model, statistics.fmean(votes), votes, positions))
        low, high = sorted(answers, key=lambda answer: answer.score)
        if any(h <= lo for h, lo in zip(high.votes, low.votes, strict=True)):
            yield process_record(
                record, answers=answers, stage="judge", reason="orders disagree: 1"
            )
            continue
        if change:
            change(rng, i, high, low)
        yield process_record(record, [rc.Pair(record, high, low)], answers)


def report(some, settings=SETTINGS, **more):
    made = rc.Report(0)
    for outcome in some:
        made.add(outcome)
    return made.numbers(settings, USAGE, **more)


def metric(numbers, key):
    return next(row for row in numbers["metrics"] if row["metric"] == key)


def alarms(numbers, level=("warn", "critical")):
    return {row["metric"] for row in numbers["warnings"] if row["level"] in level}


def bars(numbers, key):
    """The rows of one kind of metric: label -> (share, cases)."""
    rows = [row for row in numbers["metrics"] if row["metric"] == key]
    return {row["label"]: (row["value"], row["n"]) for row in rows}


# -- planted faults, in Chinese and English --


def test_clean_data_raises_no_alarm(write):
    numbers = report(outcomes(write))
    assert alarms(numbers) == set()
    passed = {row["metric"] for row in numbers["metrics"] if row["level"] == "ok"}
    assert {"longer", "flips", "first_slot", "words", "identity", "ties"} <= passed
    assert {"near_duplicates_chosen", "near_duplicates_prompts", "kept"} <= passed


def test_always_longer_chosen_is_critical(write):
    def longer(rng, i, chosen, rejected):
        chosen.text, rejected.text = write(rng, 150), write(rng, 50)

    numbers = report(outcomes(write, change=longer))
    assert {"longer", "length_ratio"} <= alarms(numbers, "critical")
    assert metric(numbers, "longer")["value"] == 1.0
    assert numbers["warnings"][0]["finding"].startswith("The longer answer is usually chosen (100%")
    assert "--length-penalty 1" in numbers["warnings"][0]["advice"]


def test_always_shorter_chosen_does_not_advise_more_of_the_penalty(write):
    def shorter(rng, i, chosen, rejected):
        chosen.text, rejected.text = write(rng, 50), write(rng, 150)

    warning = report(outcomes(write, change=shorter))["warnings"][0]
    assert warning["finding"].startswith("The shorter answer is usually chosen (0%")
    assert warning["advice"].startswith("Try a lower --length-penalty")


def test_bold_only_in_chosen_is_critical_and_names_no_other_format(write):
    def bold(rng, i, chosen, rejected):
        chosen.text = "**" + chosen.text[:8] + "**" + chosen.text[8:]

    found = alarms(report(outcomes(write, change=bold)), "critical")
    assert "format_bold" in found and "format_lists" not in found


def test_one_word_only_in_chosen_is_found_and_named(write):
    def word(rng, i, chosen, rejected):
        chosen.text += f"{write.mark}{'certainly' if write.mark else '当然'}"

    numbers = report(outcomes(write, change=word))
    assert "words" in alarms(numbers)
    first = metric(numbers, "word")
    assert first["label"] in ("certainly", "当然") and first["value"] == 1.0


def test_one_model_always_chosen_is_critical(write):
    def model(rng, i, chosen, rejected):
        chosen.model, rejected.model = "qwen-max", "qwen-flash"

    numbers = report(outcomes(write, change=model))
    warning = numbers["warnings"][0]
    assert (warning["metric"], warning["level"]) == ("identity", "critical")
    n = numbers["pairs"]
    finding = f"The model name alone predicts the label (100%, 95% CI 99-100%, n={n})."
    assert warning["finding"] == finding
    assert bars(numbers, "model") == {
        "qwen-max chosen over other models": (1.0, n),
        "qwen-flash chosen over other models": (0.0, n),
    }


def test_a_judge_with_a_first_slot_bonus_is_found(write):
    def bonus(rng, quality, place):
        return judge(rng, quality + (2 if place == 0 else 0), place)

    found = alarms(report(outcomes(write, judge=bonus)))
    assert "first_slot" in found and "words" not in found


def test_a_first_slot_bonus_beyond_all_quality_is_critical(write):
    def bonus(rng, quality, place):
        return 9.0 - 2 * place

    assert {"first_slot", "flips"} <= alarms(report(outcomes(write, judge=bonus)), "critical")


def test_a_judge_that_flips_is_critical_though_its_records_are_dropped(write):
    def coin(rng, quality, place):
        return float(rng.randrange(1, 11))

    numbers = report(outcomes(write, judge=coin))
    assert "flips" in alarms(numbers, "critical")
    assert numbers["dropped"][0]["reason"] == "orders disagree"


def test_a_judge_that_scores_most_answers_alike_is_told_to_be_replaced_first(write):
    def weak(rng, quality, place):
        return 7.0 if rng.random() < 0.97 else judge(rng, quality, place)

    numbers = report(outcomes(write, judge=weak))
    warning = next(row for row in numbers["warnings"] if row["metric"] == "ties")
    assert warning["level"] == "critical"
    assert warning["advice"].startswith("Try a stronger --judge-model first")


def test_templated_answers_are_critical(write):
    stock = write(random.Random(1), 90)

    def template(rng, i, chosen, rejected):
        chosen.text, rejected.text = stock + write(rng, 10), stock + write(rng, 10)

    numbers = report(outcomes(write, change=template))
    found = alarms(numbers, "critical")
    assert "self_repetition_chosen" in found and not any("prompts" in key for key in found)


def test_duplicate_prompts_warn(write):
    prompts = [write(random.Random(i), 30) for i in range(100)]
    found = alarms(report(outcomes(write, n=600, prompt=lambda rng, i: prompts[i % 100])))
    assert "repeated_prompts" in found


def test_nearly_the_same_prompts_warn(write):
    prompts = [write(random.Random(i), 60) for i in range(30)]
    numbers = report(outcomes(write, prompt=lambda rng, i: prompts[i % 30] + write(rng, 2)))
    assert "near_duplicates_prompts" in alarms(numbers) and "repeated_prompts" not in alarms(
        numbers
    )


def test_the_judges_own_family_is_named(write):
    numbers = report(outcomes(write), {"judges": ["openai:Qwen/Qwen3-32B@http://h/v1"]})
    assert "begins like that of qwen-max." in numbers["notes"][0]
    assert "begins like that of qwen-max." in rc.report_html(numbers)


def test_labels_of_one_word_are_no_template(write):
    def label(rng, i, chosen, rejected):
        chosen.text, rejected.text = rng.sample(["yes", "no", "是", "否"], 2)

    numbers = report(outcomes(write, change=label))
    assert not {key for key in alarms(numbers) if key.endswith("chosen")}
    assert metric(numbers, "near_duplicates_chosen")["n"] == 0


# -- formulas, against references --


def test_wilson_interval_is_statsmodels_and_scipys():
    stats = pytest.importorskip("scipy.stats")
    for k, n in ((0, 30), (7, 40), (400, 805), (50, 50)):
        low, high = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
        assert rc.share(k, n).interval == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_by_hand():
    # p = .5, n = 96.04 would be z^2 / n = .04: centre .5, half .98 * ... -> use n = 4: z^2 / n = .9604
    value, (low, high), n = rc.share(2, 4)
    half = math.sqrt(0.25 * 0.9604 + 0.9604**2 / 4) / 1.9604
    assert (value, n) == (0.5, 4) and (low, high) == pytest.approx((0.5 - half, 0.5 + half))


def test_median_and_its_interval_by_hand():
    # n = 100: ranks 50 +- 1.96 * 5, so the values with 40 and 60 below them
    assert rc.median(list(range(100))) == (49.5, (40, 60), 100)
    assert rc.median([7]) == (7, (7, 7), 1) and rc.median([]) == (None, None, 0)


def test_distinct_word_pairs_by_hand():
    # ab ba ab, ab: no pair spans two texts
    assert rc.distinct_pairs(["a b a b", "a b"])[::2] == (2 / 4, 4)


def test_distinct_word_pairs_are_taken_of_a_fixed_amount_of_text():
    text = " ".join(map(str, range(50_000)))
    assert rc.distinct_pairs([text])[::2] == (1.0, rc.DISTINCT_WORDS)


def test_self_repetition_counts_runs_of_10_words_in_4_texts():
    stock = " ".join(f"w{i}" for i in range(10))
    texts = [f"{stock} own{i}" for i in range(4)]
    texts += [" ".join(f"w{i}x{j}" for j in range(12)) for i in range(6)]
    assert rc.self_repetition(texts).value == 0.4
    assert rc.self_repetition(texts[1:]).value == 0.0


def test_near_duplicates_are_those_of_the_exact_jaccard_similarity():
    rng = random.Random(3)
    texts = [" ".join(rng.choices(ENGLISH, k=40)) for _ in range(60)]
    texts += [text + " more" for text in texts[:15]]
    assert rc.near_duplicates(texts[:60]).value == 0.0
    assert rc.near_duplicates(texts).value * len(texts) == pytest.approx(15, abs=1)


def test_the_bag_of_words_weighs_by_smoothed_log_odds():
    sides = [(0, ("good",), ("bad",))] * 6 + [(0, ("bad",), ("good",))] + [(0, ("rare",), ())] * 4
    sides = [rc.Difference(*side) for side in sides]
    counts = rc.count_features(sides)
    assert counts == {"good": (6, 1), "bad": (1, 6), "rare": (4, 0)}
    assert rc.log_odds(counts) == {"good": math.log(7 / 2), "bad": math.log(2 / 7)}


def test_held_out_guessing_agrees_with_naive_bayes_on_one_sided_words():
    naive = pytest.importorskip("sklearn.naive_bayes")
    numpy = pytest.importorskip("numpy")
    rng, vocabulary, sides = random.Random(5), [f"w{i}" for i in range(40)], []
    for i in range(600):
        ours = {w for k, w in enumerate(vocabulary) if rng.random() < 0.2 + 0.004 * k}
        theirs = {w for w in vocabulary if rng.random() < 0.28}
        sides.append(rc.Difference(i % rc.FOLDS, tuple(ours - theirs), tuple(theirs - ours)))
    right = 0.0
    for fold in range(rc.FOLDS):
        train, test = [s for s in sides if s[0] != fold], [s for s in sides if s[0] == fold]
        rows = [[w in side[k] for w in vocabulary] for side in train for k in (1, 2)]
        model = naive.MultinomialNB(alpha=1.0, fit_prior=False).fit(
            numpy.array(rows, int), [1, 0] * len(train)
        )
        odds = dict(
            zip(vocabulary, model.feature_log_prob_[1] - model.feature_log_prob_[0], strict=True)
        )
        # both classes' totals nearly agree, so the difference of log probabilities is the smoothed log-odds
        right += sum(sum(odds[w] for w in s[1]) > sum(odds[w] for w in s[2]) for s in test)
    assert rc.cross_validated_accuracy(sides).value == pytest.approx(right / 600, abs=0.02)


def test_held_out_guessing_finds_nothing_in_noise():
    rng = random.Random(2)
    sides = [
        rc.Difference(i % 5, *(tuple({f"w{rng.randrange(99)}" for _ in range(9)}) for _ in "ab"))
        for i in range(500)
    ]
    assert 0.4 < rc.cross_validated_accuracy(sides).value < 0.6


def test_formats_are_seen_outside_of_code_only():
    formats = lambda text: rc.features(text, "")["format"]
    assert formats("# A\n- b\n**c** 😀") == {"headers", "lists", "bold", "emoji"}
    assert formats("```\n# comment\n- x **y**\n```") == {"code"}
    assert formats("1、甲\n| a | b |\n") == {"lists", "tables"}
    assert formats("2 * 3 * 4 - 1 #tag __init__") == {"bold"}


@pytest.mark.parametrize(
    "model, family",
    [("gpt-4o", "gpt"), ("qwen2.5:7b", "qwen"), ("Qwen/QwQ-32B@http://h", "qwq"), ("7b", "")],
)
def test_families_go_by_the_name_of_the_model(model, family):
    assert rc.family(model) == family


# -- levels and warnings --


@pytest.mark.parametrize(
    "longer, n, level",
    [
        (65, 100, "ok"),  # 55 % to 74 %
        (650, 1000, "warn"),  # 62 % to 68 %
        (800, 1000, "critical"),
        (200, 1000, "critical"),
        (29, 29, "too few"),
        (0, 0, ""),
    ],
)
def test_the_nearer_end_of_the_interval_decides_the_level(longer, n, level):
    row = next(row for row in rc.METRICS if row.key == "longer")
    assert rc.metric_row(row, rc.share(longer, n))["level"] == level


def test_a_warning_says_what_is_wrong_what_it_means_and_what_to_try(write):
    for row in report(outcomes(write, change=awful))["warnings"]:
        assert re.search(r"\(\d.*, n=[\d,]+\)\.$", row["finding"]), row["finding"]
        assert row["meaning"].endswith(".") and row["advice"].endswith(".")
        assert "--" in row["advice"]


def test_checks_count_what_passed_and_what_had_too_few_cases(write):
    checks = report(outcomes(write))["checks"]
    assert checks == {"passed": 12, "too_few": 0, "total": 12}
    checks = report(outcomes(write, 20))["checks"]
    assert checks["too_few"] > checks["total"] / 2


def test_the_headline_has_facts_that_raise_no_warning(write):
    def longer(rng, i, chosen, rejected):
        chosen.text += write(rng, 150)

    facts = "; ".join(report(outcomes(write))["headline"])
    assert re.fullmatch(r"order flips \d+%; chosen is longer \d+%; median score gap [\d.]+", facts)
    assert "longer" not in "; ".join(report(outcomes(write, change=longer))["headline"])


MAKING = "--method|--temperature|--system-prompt|--num-candidates|--candidate-models|--low-model|--when-low-wins"


@pytest.mark.parametrize("method, flagged", [("generate_pairs", True), ("rank_responses", False)])
def test_advice_for_answers_that_exist_asks_for_no_other_answers(write, method, flagged):
    numbers = report(outcomes(write, change=awful), {"method": method})
    advice = " ".join(row["advice"] for row in numbers["warnings"])
    assert len(numbers["warnings"]) > 4 and bool(re.search(MAKING, advice)) == flagged
    assert not re.search(MAKING, " ".join(row.answers_given for row in rc.ADVICE.values()))


def test_every_advice_names_a_flag_and_every_topic_is_used():
    problems = [row.too_low for row in rc.METRICS + rc.HUMAN_METRICS] + [
        row.too_high for row in rc.METRICS + rc.HUMAN_METRICS
    ]
    assert {problem.topic for problem in problems if problem} == set(rc.ADVICE)
    assert all("--" in row.advice for row in rc.ADVICE.values())


@pytest.mark.parametrize("metric", rc.METRICS + rc.HUMAN_METRICS, ids=lambda metric: metric.key)
def test_limits_are_in_order(metric):
    assert metric.section in rc.SECTIONS
    low, high = metric.too_low, metric.too_high
    assert low is None or (low.critical < low.warn and low.topic in rc.ADVICE)
    assert high is None or (high.critical > high.warn and high.topic in rc.ADVICE)


# -- the collector --


def test_funnel_adds_up_and_counts_reasons_by_their_head():
    record = rc.Record([{"role": "user", "content": "q"}])
    drops = [
        ("judge", "orders disagree: 3 and 4"),
        ("judge", "orders disagree"),
        ("filter", "identical"),
    ]
    pair = rc.Pair(record, rc.Answer("good"), rc.Answer("bad"))
    numbers = report(
        [process_record(record, [pair])]
        + [process_record(record, stage=s, reason=r) for s, r in drops]
    )
    assert (
        numbers["records"]
        == numbers["kept"] + sum(row["records"] for row in numbers["dropped"])
        == 4
    )
    reasons = [(row["reason"], row["records"]) for row in numbers["dropped"]]
    assert reasons == [("orders disagree", 2), ("identical", 1)]


def test_drop_reasons_are_explained(monkeypatch):
    explained = {"orders disagree": ("the order changed it", "--judge-orders 2")}
    monkeypatch.setattr(rc, "DROP_REASONS", explained)
    record = rc.Record([{"role": "user", "content": "q"}])
    outcome = process_record(record, stage="judge", reason="orders disagree: 3 and 4")
    numbers = report([outcome])
    row = numbers["dropped"][0]
    assert (row["meaning"], row["advice"]) == explained["orders disagree"]
    page = rc.report_html(numbers)
    assert "<small>the order changed it. Try: <code>--judge-orders</code> 2</small>" in page


def test_a_method_of_ones_own_may_invent_a_stage():
    record = rc.Record([{"role": "user", "content": "q"}])
    assert "full" in rc.report_html(report([process_record(record, stage="moon", reason="full")]))


def test_chosen_is_longer_by_hand():
    record = rc.Record([{"role": "user", "content": "q"}])
    sizes = [(100, 105), (105, 100), (130, 100), (100, 300), (50, 50)]
    pairs = [rc.Pair(record, rc.Answer("x" * c), rc.Answer("y" * r)) for c, r in sizes]
    numbers = report([process_record(record, [pair]) for pair in pairs])
    assert bars(numbers, "longer") == {"chosen is longer": (0.5, 4)}
    assert metric(numbers, "length_ratio")["value"] == 1.0


def test_flips_and_slots_by_hand_with_two_judges_of_two_orders():
    made, record = rc.Report(0, orders=2), rc.Record([{"role": "user", "content": "q"}])
    a = rc.Answer(
        "a", votes=(8, 4, 7, 6), positions=(0, 1, 0, 1)
    )  # judge 1 flips, judge 2 does not
    b = rc.Answer("b", votes=(5, 6, 5, 5), positions=(1, 0, 1, 0))
    made.add(process_record(record, answers=[a, b], stage="judge", reason="orders disagree"))
    assert made.counts["flips"] == {True: 1, False: 1} and made.counts["ties"] == {False: 4}
    assert made.counts["first_slot"] == {True: 3, False: 1}


@pytest.mark.parametrize("positions", [(), (0,)])
def test_votes_without_places_count_in_no_position_metric(positions):
    made, record = rc.Report(0), rc.Record([{"role": "user", "content": "q"}])
    answers = [
        rc.Answer("a", votes=(8, 4), positions=positions),
        rc.Answer("b", votes=(5, 6), positions=positions),
    ]
    made.add(process_record(record, answers=answers, stage="judge", reason="x"))
    assert not made.counts["flips"] and not made.counts["first_slot"] and not made.counts["ties"]


def test_one_order_gives_no_flips():
    made, record = rc.Report(0, orders=1), rc.Record([{"role": "user", "content": "q"}])
    answers = [
        rc.Answer("a", votes=(8, 9), positions=(0, 1)),
        rc.Answer("b", votes=(5, 6), positions=(1, 0)),
    ]
    made.add(process_record(record, answers=answers, stage="judge", reason="x"))
    assert not made.counts["flips"] and made.counts["first_slot"].total() == 2


def test_the_sample_is_bounded_seeded_and_even(monkeypatch):
    monkeypatch.setattr(rc, "REPORT_SAMPLE", 200)
    drawn = []
    for _ in range(2):
        made = rc.Report(3)
        for i in range(4000):
            record = rc.Record([{"role": "user", "content": str(i)}])
            made.add(
                process_record(
                    record, [rc.Pair(record, rc.Answer("x" * 50_000), rc.Answer("y" * 46))]
                )
            )
        drawn.append([int(row["prompt"]) for row in made.rows])
    assert (
        drawn[0] == drawn[1] and len(drawn[0]) == 200 and 1600 < statistics.fmean(drawn[0]) < 2400
    )
    assert {len(row["chosen"]) for row in made.rows} == {rc.SAMPLE_TEXT}


def test_a_gap_that_a_person_overruled_is_no_gap():
    record = rc.Record([{"role": "user", "content": "q"}])
    pair = rc.Pair(record, rc.Answer("a", score=2.0), rc.Answer("b", score=7.0), human=True)
    assert report([process_record(record, [pair])])["samples"][0]["gap"] is None


def test_ranks_and_choices_are_no_scores():
    some = []
    for i, (good, bad) in enumerate([((1.0,), (0.0,)), ((-1.0,), (-4.0,)), ((9.0,), (7.0,))]):
        record = rc.Record([{"role": "user", "content": str(i)}])
        score = good[0] == 9 or None
        pair = rc.Pair(
            record, rc.Answer("a", score=score and 9.0, votes=good), rc.Answer("b", votes=bad)
        )
        pair.rejected.score = score and 7.0
        some.append(process_record(record, [pair]))
    numbers = report(some)
    assert (metric(numbers, "gap")["value"], metric(numbers, "gap")["n"]) == (2, 1)
    assert numbers["charts"]["scores"]["columns"] == ["chosen, median 9", "rejected, median 7"]
    numbers = report(some[:2])
    page = rc.report_html(numbers)
    assert metric(numbers, "gap")["n"] == 0
    assert (
        "Score, from" not in page and "Score gap, from" not in page and "Characters, from" in page
    )
    assert "<small>random</small>" in page and "lowest gap" not in page


@pytest.mark.parametrize(
    "n, few",
    [
        (0, "There are no pairs, so their quality cannot be checked."),
        (20, "are too few for most quality checks (they need 30 to 100 cases)."),
        (400, ""),
    ],
)
def test_too_few_pairs_are_no_clean_result(write, n, few):
    numbers = report(outcomes(write, n))
    assert few in numbers["few"] and bool(few) == bool(numbers["few"])
    page = rc.report_html(numbers)
    checks = numbers["checks"]
    passed = f"{checks['passed']} of {checks['total']} checks passed"
    assert f"{few} {passed}, {checks['too_few']} had too few cases." in page


def test_a_pair_stands_under_one_heading_only(write):
    numbers = report(outcomes(write, 7))
    prompts = [row["prompt_id"] for row in numbers["samples"]]
    assert len(prompts) == len(set(prompts)) == numbers["pairs"] > 3


def test_few_pairs_are_named_only_while_they_are_few():
    checks = {"passed": 1, "too_few": 9, "total": 10}
    assert rc.few_sentence(1, checks).startswith("1 pair is too few for")
    assert rc.few_sentence(100, checks) == rc.few_sentence(50, checks | {"too_few": 3}) == ""


def test_empty_and_scoreless_runs_are_json_too():
    record = rc.Record([{"role": "user", "content": "q"}])
    pair = rc.Pair(record, rc.Answer("a", "m"), rc.Answer("", "n"))
    for some in ([], [process_record(record, [pair])]):
        numbers = json.loads(json.dumps(report(some), allow_nan=False))
        assert numbers["warnings"] == []
        assert "</main>" in rc.report_html(numbers) and rc.report_html(numbers).encode()
        assert json.dumps(numbers, ensure_ascii=False).encode()


def test_two_runs_give_the_same_numbers(write):
    assert json.dumps(report(outcomes(write, 150))) == json.dumps(report(outcomes(write, 150)))


def test_histogram_by_hand():
    data = rc.histogram({"a": [0.1, 0.3, 1.96], "b": [0.7]})
    assert data["columns"] == ["a, median 0.3", "b, median 0.7"]
    assert [row[0] for row in data["rows"]] == [round(0.2 * i, 1) for i in range(10)]
    assert [i for i, row in enumerate(data["rows"]) if row[1]] == [0, 1, 9]
    assert [i for i, row in enumerate(data["rows"]) if row[2]] == [3]
    assert rc.histogram({"a": []})["rows"] == []


def test_values_far_away_count_in_the_outer_steps():
    data = rc.histogram({"a": [-1e6, *([1.5, 2.4, 3.3] * 100), 1e6]})
    assert data["rows"][0][0] == 1.4 and data["rows"][-1][0] == 3.2 and len(data["rows"]) == 10
    assert data["rows"][0][1] == data["rows"][-1][1] == 101 / 302
    assert sum(row[1] for row in data["rows"]) == pytest.approx(1)


@pytest.mark.parametrize(
    "low, high",
    [(-3.2, 4.1), (0.001, 0.002), (5, 5), (-900, 12_000), (-1e15, 1e15), (1e9, 1e9 + 1e-5)],
)
def test_steps_of_a_histogram_are_few(low, high):
    rows = rc.histogram({"": [low, high, high]})["rows"]
    assert 1 <= len(rows) <= 14
    assert rows[0][0] <= low and rows[-1][0] <= high


def test_the_share_with_at_least_a_gap_is_what_min_score_gap_keeps():
    record = rc.Record([{"role": "user", "content": "q"}])
    some = []
    for gap in (1, 2, 2, 4):
        pair = rc.Pair(record, rc.Answer("a", score=5.0 + gap), rc.Answer("bc", score=5.0))
        some.append(process_record(record, [pair]))
    gap = report(some)["charts"]["gap"]
    assert gap["columns"] == ["pairs, median 2", "this gap or more"]
    kept = {row[0]: row[2] for row in gap["rows"]}
    assert (kept[1], kept[2], kept[3], kept[4]) == (1.0, 0.75, 0.25, 0.25)


def test_the_highest_scores_leave_the_report_whole():
    record = rc.Record([{"role": "user", "content": "q"}])
    pairs = [
        rc.Pair(record, rc.Answer("a", score=1e15), rc.Answer("b" * i, score=-1e15))
        for i in range(1, 50)
    ]
    numbers = report([process_record(record, [pair]) for pair in pairs])
    assert "</main>" in rc.report_html(json.loads(json.dumps(numbers, allow_nan=False)))


# -- labels that a judge or exact match checked --


def checked(result, times, facts=(), gap=None, choices=()):
    """Outcomes of records with a checked label."""
    for i in range(times):
        record = rc.Record([{"role": "user", "content": f"{result} {i}"}])
        record.label_checks.append(rc.LabelCheck(result, gap, choices))
        record.facts.update(facts)
        yield process_record(record, stage="judge", reason="the judge disagrees with the label")


def test_agreement_leaves_out_undecided_labels():
    some = [*checked("agrees", 60), *checked("disagrees", 20)]
    some += checked("undecided", 20)
    numbers = report(some)
    row = metric(numbers, "label_agreement")
    assert (row["value"], row["n"], row["interval"]) == (0.75, 80, rc.share(60, 80).interval)
    assert (metric(numbers, "label_undecided")["value"]) == 0.2
    assert "judges agree with 75% of the labels" in numbers["headline"]
    page = rc.report_html(numbers)
    assert "<h2>Labels checked</h2>" in page
    assert "labels that the judges leave undecided" in page


def test_agreement_is_shown_for_labels_of_small_and_of_large_gaps():
    some = [*checked("agrees", 5, gap=1.0), *checked("disagrees", 5, gap=1.5)]
    some += [*checked("agrees", 8, gap=4.0), *checked("agrees", 9)]
    numbers = report(some)
    small, large = metric(numbers, "label_gap_small"), metric(numbers, "label_gap_large")
    assert (small["label"], small["value"], small["n"]) == (
        "judges agree with labels of a score gap up to 1.5", 0.5, 10,
    )  # fmt: skip
    assert (large["value"], large["n"]) == (1.0, 8)


def test_labels_of_one_gap_are_not_split():
    numbers = report([*checked("agrees", 5, gap=1.0), *checked("disagrees", 5, gap=1.0)])
    assert not [row for row in numbers["metrics"] if row["metric"].startswith("label_gap")]


def test_agreement_is_shown_by_the_position_of_the_labelled_answer():
    choices = ((True, True), (False, False), (True, True))
    numbers = report([*checked("undecided", 1, choices=choices)])
    first, later = metric(numbers, "label_shown_first"), metric(numbers, "label_shown_later")
    assert (first["value"], first["n"], later["value"], later["n"]) == (1.0, 2, 0.0, 1)


def test_labels_that_a_judge_often_rejects_are_a_warning():
    some = [*checked("agrees", 40), *checked("disagrees", 60)]
    warning = report(some)["warnings"][-1]
    assert (warning["metric"], warning["level"]) == ("label_agreement", "critical")
    assert "stronger --judge-model" in warning["advice"]


def test_what_exact_match_could_not_check_is_counted():
    some = [*checked("agrees", 3, ["checked by exact match"])]
    some += checked("undecided", 2, ["checked by exact match", "no correct answer"])
    numbers = report(some)
    assert bars(numbers, "records") == {
        "records: checked by exact match": (1.0, 5),
        "records: no correct answer": (0.4, 5),
    }
    assert "records: no correct answer" in rc.report_html(numbers)


# -- cost, people --


def test_costs_are_summed():
    total = rc.cost(USAGE)
    assert (total["calls"], total["cached"], total["money"]) == (1200, 100, 4.0)
    assert rc.cost([{**USAGE[0], "money": None}])["money"] is None


def test_human_metrics_are_appended_and_warn(write):
    words = {"meaning": "So labels are wrong.", "advice": "See --review-path."}
    row = {
        "metric": "agreement",
        "section": "people",
        "label": "people agree",
        "unit": "%",
        "value": 0.5,
        "interval": (0.4, 0.6),
        "n": 90,
        "fine": "65% or more",
    }
    human = {
        "metrics": [row | {"level": "warn", "finding": "People disagree (50%).", **words}],
        "lines": ["2 pairs flipped"],
    }
    numbers = report(outcomes(write, 50), human=human)
    assert "agreement" in alarms(numbers)
    page = rc.report_html(numbers)
    assert "<p>2 pairs flipped</p>" in page and "People disagree (50%)." in page


# -- views --


def awful(rng, i, chosen, rejected):
    """Every fault at once."""
    chosen.model, rejected.model = "gpt-4o-with-a-name-that-is-far-too-long", "gpt-4o-mini"
    chosen.text = "**Certainly!** 😀\n# Head\n- one\n" + "the same words again and again " * 20


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.617, "%", "62%"),
        (1.254, "×", "1.25×"),
        (1204, "", "1,204"),
        (None, "", "–"),
        (3.0, "", "3"),
    ],
)
def test_a_value_is_shown_as_people_read_it(value, unit, text):
    assert rc.shown(value, unit) == text


def test_an_interval_carries_its_unit_once():
    assert rc.shown_interval((0.58, 0.66), "%") == "58-66%"
    assert rc.shown_interval((-0.4, 0.2)) == "-0.4 to 0.2"
    row = {"value": 0.62, "interval": (0.58, 0.66), "n": 1400, "unit": "%"}
    assert rc.with_interval(row) == "62%, 95% CI 58-66%, n=1,400"


def test_the_page_follows_the_headings_of_the_lesson(write):
    human = {"metrics": [], "lines": ["People reviewed 2 of 400 pairs."]}
    some = [*outcomes(write), *checked("agrees", 3)]
    page = rc.report_html(report(some, human=human))
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Pair quality", "Length", "Diversity", "Bias", "Telling words", "People", "Labels checked",
        "Cost", "Pairs to read", "Settings",
    ]  # fmt: skip
    for section in re.findall("<section>.*?</section>", page, re.S):
        assert re.search(r"</h2><p>[A-Z0-9].*?\.</p>", section), section[:200]
    page = rc.report_html(report([]))
    assert re.findall("<h2>(.*?)</h2>", page) == ["Pair quality", "Cost", "Settings"]


def test_every_chart_says_its_values_as_text(write):
    page = rc.report_html(report(outcomes(write)))
    cells = re.findall(r'<td>(?:<svg [^>]*aria-hidden="true">.*?</svg>)+</td><td>([^<]+)', page)
    assert len(cells) > 30
    assert len(cells) <= page.count("<svg ") == page.count('aria-hidden="true"')


def test_a_bar_has_the_share_as_its_width_and_the_interval_as_a_line():
    drawing = rc.bar(0.5, interval=(0.4, 0.6))
    assert 'width="50.0"' in drawing and 'd="M40.0 6H60.0"' in drawing


def test_settings_are_shown_without_pythons_quotes():
    page = rc.report_html(report([], {"judges": ["a", "b"], "versions": {"openai": "2.1"}}))
    assert "<td>a, b</td>" in page and "<td>openai 2.1</td>" in page


def test_flags_in_advice_are_code():
    marked = rc.mark_flags("Try --length-penalty 1, or --method generate_pairs.")
    assert re.findall("<code>(.*?)</code>", marked) == ["--length-penalty", "--method"]


HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=http://127.0.0.1:9/x.png onerror=\"document.title='owned'\">",
    "[a](javascript:alert(1)) <a href='javascript:alert(1)'>x</a> {{COST}}",
    "</style><style>body{display:none}</style><link rel=stylesheet href=//127.0.0.1:9>\u202e",
]


def hostile(rng, i, chosen, rejected):
    chosen.text, rejected.text = HOSTILE[i % 4] * 3, HOSTILE[(i + 1) % 4]
    chosen.model, rejected.model = "<b>m</b>", "\"><script>document.title='owned'</script>"
    chosen.text += " ".join(HOSTILE)


@needs_chromium
def test_the_page_loads_nothing_logs_nothing_and_keeps_hostile_text_as_text(tmp_path, write):
    page = tmp_path / "report.html"
    page.write_text(rc.report_html(report(outcomes(write, change=hostile))), encoding="utf-8")
    with browser(tmp_path) as driver:
        driver.get(page.as_uri())
        sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        sent = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        urls = {one["request"]["url"] for one in sent if one["documentURL"] == page.as_uri()}
        assert urls == {page.as_uri()} and driver.get_log("browser") == []
        assert (
            driver.title == "Preference data report"
            and "default-src 'none'; base" in driver.page_source
        )
        find = lambda css: driver.execute_script(
            f"return document.querySelectorAll({css!r}).length"
        )
        assert find('script, img, link, a:not([href^="#"]), [onerror]') == 0 and find("style") == 1
        assert find("section") == 8
        text = driver.execute_script("return document.body.textContent")
        assert all(bad in text for bad in HOSTILE) and find("article") == 9
        for width in (390, 1280):
            driver.set_window_size(width, 900)
            assert driver.execute_script(
                "return document.documentElement.scrollWidth <= innerWidth"
            )
