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


# -- planted faults, in Chinese and English --


def test_clean_data_raises_no_alarm(write):
    numbers = report(outcomes(write))
    assert alarms(numbers) == set()
    said = {row["metric"] for row in numbers["metrics"] if row["verdict"] == "ok"}
    assert {"longer", "flips", "first_slot", "words", "identity", "compression_prompts"} <= said


def test_always_longer_chosen_is_critical(write):
    def longer(rng, i, chosen, rejected):
        chosen.text, rejected.text = write(rng, 150), write(rng, 50)

    numbers = report(outcomes(write, change=longer))
    assert {"longer", "length_ratio"} <= alarms(numbers, "critical")
    assert metric(numbers, "longer")["value"] == 1.0 and numbers["sign_test"]["p"] < 1e-9


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
    assert (
        numbers["words"][0]["word"] in ("certainly", "当然")
        and numbers["words"][0]["in rejected"] == 0
    )


def test_one_model_always_chosen_is_critical(write):
    def model(rng, i, chosen, rejected):
        chosen.model, rejected.model = "qwen-max", "qwen-flash"

    numbers = report(outcomes(write, change=model))
    assert "identity" in alarms(numbers, "critical")
    assert {row["model"]: row["value"] for row in numbers["models"]} == {
        "qwen-max": 1.0,
        "qwen-flash": 0.0,
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


def test_templated_answers_are_critical(write):
    stock = write(random.Random(1), 90)

    def template(rng, i, chosen, rejected):
        chosen.text, rejected.text = stock + write(rng, 10), stock + write(rng, 10)

    numbers = report(outcomes(write, change=template))
    found = alarms(numbers, "critical")
    assert {row["level"] for row in numbers["warnings"] if "compression" in row["metric"]} == {
        "warn"
    }
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
    assert any("qwen-max" in note for note in numbers["notes"])


def test_labels_of_one_word_are_no_template(write):
    def label(rng, i, chosen, rejected):
        chosen.text, rejected.text = rng.sample(["yes", "no", "是", "否"], 2)

    numbers = report(outcomes(write, change=label))
    assert not {key for key in alarms(numbers) if key.endswith(("chosen", "rejected"))}
    assert metric(numbers, "near_duplicates_chosen")["verdict"] == "not applicable"


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


@pytest.mark.parametrize(
    "k, n", [(0, 0), (3, 10), (5, 10), (30, 100), (560, 1000), (540, 1001), (5200, 10000)]
)
def test_sign_test_is_the_binomial_test(k, n):
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.binomtest(k, n).pvalue if n else 1.0
    assert rc.sign_test(k, n) == pytest.approx(wanted, rel=0.02, abs=1e-12)


def test_rank_correlation_is_scipys_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    xs = [rng.randrange(5) for _ in range(200)]
    ys = [x + rng.randrange(6) for x in xs]
    value, (low, high), n = rc.spearman(xs, ys)
    assert value == pytest.approx(stats.spearmanr(xs, ys).statistic) and n == 200
    assert low < value < high and high - low < 0.3


def test_median_and_its_interval_by_hand():
    # n = 100: ranks 50 +- 1.96 * 5, so the values with 40 and 60 below them
    assert rc.median(list(range(100))) == (49.5, (40, 60), 100)
    assert rc.median([7]) == (7, (7, 7), 1) and rc.median([]) == (None, None, 0)


def test_distinct_n_by_hand():
    assert rc.distinct(["a b a b", "a b"], 1)[::2] == (2 / 6, 6)
    assert rc.distinct(["a b a b", "a b"], 2)[::2] == (
        2 / 4,
        4,
    )  # ab ba ab, ab: no pair spans two texts


def test_distinct_n_is_taken_of_a_fixed_amount_of_text():
    assert rc.distinct([" ".join(map(str, range(50_000)))], 1)[::2] == (1.0, rc.DIVERSITY_TOKENS)


def test_compression_ratio_is_zlibs():
    assert rc.compression(["a" * 500] * 2).value == pytest.approx(1001 / 17, rel=0.3)


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
    counts = rc.tally(sides, rc.OFTEN)
    assert counts == {"good": (6, 1), "bad": (1, 6)}
    assert rc.log_odds(counts, {}) == {"good": math.log(7 / 2), "bad": math.log(2 / 7)}
    assert rc.log_odds(counts, {"good": (3, 0)}) == {"bad": math.log(2 / 7)}


def test_held_out_guessing_agrees_with_naive_bayes_on_one_sided_words():
    naive = pytest.importorskip("sklearn.naive_bayes")
    numpy = pytest.importorskip("numpy")
    rng, vocabulary, sides = random.Random(5), [f"w{i}" for i in range(40)], []
    for i in range(600):
        ours = {w for k, w in enumerate(vocabulary) if rng.random() < 0.2 + 0.004 * k}
        theirs = {w for w in vocabulary if rng.random() < 0.28}
        sides.append((i % rc.FOLDS, tuple(ours - theirs), tuple(theirs - ours)))
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
        (i % 5, *(tuple({f"w{rng.randrange(99)}" for _ in range(9)}) for _ in "ab"))
        for i in range(500)
    ]
    assert 0.4 < rc.cross_validated_accuracy(sides).value < 0.6


def test_formats_are_seen_outside_of_code_only():
    formats = lambda text: rc.marks(text, "")["format"]
    assert formats("# A\n- b\n**c** 😀") == {"headers", "lists", "bold", "emoji"}
    assert formats("```\n# comment\n- x **y**\n```") == {"code"}
    assert formats("1、甲\n| a | b |\n") == {"lists", "tables"}
    assert formats("2 * 3 * 4 - 1 #tag __init__") == {"bold"}


@pytest.mark.parametrize(
    "model, family",
    [
        ("gpt-4o", "gpt"),
        ("openai:o3@http://h", "gpt"),
        ("qwen2.5:7b", "qwen"),
        ("Qwen/QwQ-32B", "qwen"),
        ("x", ""),
    ],
)
def test_families_go_by_the_name_of_the_model(model, family):
    assert rc.family(model) == family


# -- verdicts --


def test_a_verdict_hangs_on_the_bound_of_the_interval():
    row = next(row for row in rc.METRICS if row[0] == "longer")
    assert rc.judged(row, rc.share(65, 100))["verdict"] == "ok"  # 55 % to 74 %
    assert rc.judged(row, rc.share(650, 1000))["verdict"] == "warn"  # 62 % to 68 %
    assert rc.judged(row, rc.share(800, 1000))["verdict"] == "critical"
    assert rc.judged(row, rc.share(200, 1000))["verdict"] == "critical"
    assert rc.judged(row, rc.share(29, 29))["verdict"] == "too few"
    assert rc.judged(row, rc.share(0, 0))["verdict"] == "not applicable"


MAKING = "--method|--temperature|--system-prompt|--num-candidates|--candidate-models|--low-model|--when-low-wins"


@pytest.mark.parametrize("method, flagged", [("generate_pairs", True), ("rank_responses", False)])
def test_advice_for_answers_that_exist_asks_for_no_other_answers(write, method, flagged):
    numbers = report(outcomes(write, change=awful), {"method": method})
    advice = " ".join(row["advice"] for row in numbers["warnings"])
    assert len(numbers["warnings"]) > 4 and bool(re.search(MAKING, advice)) == flagged
    assert not re.search(MAKING, " ".join(rc.ADVICE_GIVEN.values()))


def test_every_advice_names_a_flag_and_every_topic_is_used():
    rows = rc.METRICS + rc.HUMAN
    assert {topic for _, _, _, limits, topic, _, _ in rows if limits != rc.FREE} == set(rc.ADVICE)
    assert all(re.search(r"--[a-z-]+\b", text) for text in rc.ADVICE.values())


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
    assert numbers["dropped"][0] == {"stage": "judge", "reason": "orders disagree", "records": 2}
    left = {name: n for name, (n, _, _) in numbers["charts"][0]["series"]["left"].items()}
    assert left == {"read": 4, "judge: orders disagree": 2, "filter: identical": 1}


def test_length_curve_by_hand():
    record = rc.Record([{"role": "user", "content": "q"}])
    sizes = [(100, 105), (105, 100), (130, 100), (100, 300), (50, 50)]
    pairs = [rc.Pair(record, rc.Answer("x" * c), rc.Answer("y" * r)) for c, r in sizes]
    curve = report([process_record(record, [pair]) for pair in pairs])["charts"][4]["series"][""]
    assert {name: (value, n) for name, (value, _, n) in curve.items()} == {
        "up to 1.1×": (0.5, 2),
        "up to 1.25×": (None, 0),
        "up to 1.5×": (1.0, 1),
        "up to 2×": (None, 0),
        "over 2×": (0.0, 1),
    }


def test_flips_and_slots_by_hand_with_two_judges_of_two_orders():
    made, record = rc.Report(0, orders=2), rc.Record([{"role": "user", "content": "q"}])
    a = rc.Answer(
        "a", votes=(8, 4, 7, 6), positions=(0, 1, 0, 1)
    )  # judge 1 flips, judge 2 does not
    b = rc.Answer("b", votes=(5, 6, 5, 5), positions=(1, 0, 1, 0))
    made.add(process_record(record, answers=[a, b], stage="judge", reason="orders disagree"))
    assert made.counts["flips"] == {True: 1, False: 1}
    assert made.counts["place", 0] == {True: 3, False: 1} and made.counts["place", 1] == {
        True: 1,
        False: 3,
    }


@pytest.mark.parametrize("positions", [(), (0,)])
def test_votes_without_places_count_in_no_position_metric(positions):
    made, record = rc.Report(0), rc.Record([{"role": "user", "content": "q"}])
    answers = [
        rc.Answer("a", votes=(8, 4), positions=positions),
        rc.Answer("b", votes=(5, 6), positions=positions),
    ]
    made.add(process_record(record, answers=answers, stage="judge", reason="x"))
    assert not made.counts["flips"] and not made.counts["place", 0]


def test_one_order_gives_no_flips():
    made, record = rc.Report(0, orders=1), rc.Record([{"role": "user", "content": "q"}])
    answers = [
        rc.Answer("a", votes=(8, 9), positions=(0, 1)),
        rc.Answer("b", votes=(5, 6), positions=(1, 0)),
    ]
    made.add(process_record(record, answers=answers, stage="judge", reason="x"))
    assert not made.counts["flips"] and made.counts["place", 0].total() == 2


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
        drawn.append([int(row["prompts"]) for row in made.rows])
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
    assert [metric(numbers, key)["value"] for key in ("gap", "score_chosen", "score_rejected")] == [
        2,
        9,
        7,
    ]
    assert metric(numbers, "gap")["n"] == 1 and not any(
        "No scores" in note for note in numbers["notes"]
    )
    numbers = report(some[:2])
    page = rc.report_html(numbers)
    assert metric(numbers, "gap")["n"] == 0 and any(
        "No scores" in note for note in numbers["notes"]
    )
    assert "<h3>Gap" not in page and "<h3>Scores" not in page and "<h3>Length" in page
    assert "<small>random</small>" in page and "lowest gap" not in page


def test_too_little_data_is_no_clean_bill(write):
    for n, said in (
        (0, "Too little data to judge: "),
        (20, "Too little data to judge: "),
        (400, "No warnings."),
    ):
        numbers = report(outcomes(write, n))
        level = "ok" if n == 400 else "unknown"
        assert rc.report_lines(numbers)[0].startswith(said)
        assert f'<li class="{level}">{said}' in rc.report_html(numbers)


def test_percent_of_a_fair_coin_has_a_fixed_scale():
    row = rc.share(50, 100)
    chart = {"title": "", "note": "", "unit": "%", "series": {"": {"x": row}}}
    assert 'width="50.0"' in rc.bars(chart | {"top": 1}) and 'class="tick"' in rc.bars(
        chart | {"top": 1}
    )
    assert 'class="tick"' not in rc.bars(chart | {"top": None})


def test_empty_and_scoreless_runs_are_json_too():
    record = rc.Record([{"role": "user", "content": "q \ud800"}])
    some = [process_record(record, [rc.Pair(record, rc.Answer("a\ud800"), rc.Answer(""))])]
    for outcomes_ in ([], some):
        numbers = json.loads(json.dumps(report(outcomes_), allow_nan=False))
        assert numbers["warnings"] == [] and rc.report_lines(numbers)
        assert "</html>" in rc.report_html(numbers) and rc.report_html(numbers).encode()


def test_two_runs_give_the_same_numbers(write):
    assert json.dumps(report(outcomes(write, 150))) == json.dumps(report(outcomes(write, 150)))


def test_histogram_shares_by_hand():
    found = rc.histogram({"a": [1, 1.5, 2, 9], "b": [4]})
    shares = {name: value for name, (value, _, _) in found["a"].items() if value}
    assert shares == {"1 to 2": 0.5, "2 to 3": 0.25, "9 or more": 0.25}
    assert (
        list(found["a"]) == list(found["b"])
        and len(found["b"]) == 9
        and found["b"]["4 to 5"].value == 1.0
    )
    assert rc.histogram({"a": []}) == {"a": {}}


@pytest.mark.parametrize(
    "low, high", [(-3.2, 4.1), (0.001, 0.002), (5, 5), (-900, 12_000), (-1e12, 1e12)]
)
def test_steps_of_a_histogram_are_few(low, high):
    assert 1 <= len(rc.histogram({"": [low, high, high]})[""]) <= 12


def test_absurd_scores_leave_the_report_whole():
    record = rc.Record([{"role": "user", "content": "q"}])
    pairs = [
        rc.Pair(record, rc.Answer("a", score=1e308), rc.Answer("b" * i, score=-1e308))
        for i in range(1, 50)
    ]
    numbers = report([process_record(record, [pair]) for pair in pairs])
    assert "</html>" in rc.report_html(json.loads(json.dumps(numbers, allow_nan=False)))


def test_costs_are_summed_and_shared_among_the_pairs():
    total = rc.cost(USAGE, 200)
    assert (total["calls"], total["cached"], total["money"], total["money_per_pair"]) == (
        1200,
        100,
        4.0,
        0.02,
    )
    assert rc.cost([{**USAGE[0], "money": None}], 0)["money"] is None


def test_human_metrics_are_appended_and_warn(write):
    row = {
        "metric": "agreement",
        "label": "people agree",
        "value": 0.5,
        "interval": (0.4, 0.6),
        "n": 90,
    }
    human = {
        "metrics": [row | {"verdict": "warn", "advice": "See --review-path."}],
        "lines": ["2 pairs flipped"],
    }
    numbers = report(outcomes(write, 50), human=human)
    assert "agreement" in alarms(numbers) and "2 pairs flipped" in rc.report_html(numbers)
    assert any("people agree" in line for line in rc.report_lines(numbers))


# -- views --


def awful(rng, i, chosen, rejected):
    """Every fault at once."""
    chosen.model, rejected.model = "gpt-4o-with-a-name-that-is-far-too-long", "gpt-4o-mini"
    chosen.text = "**Certainly!** 😀\n# Head\n- one\n" + "the same words again and again " * 20


def test_terminal_lines_are_few_short_and_begin_with_the_warnings(write):
    numbers = report(outcomes(write, change=awful, prompt=lambda rng, i: "one prompt"))
    lines = rc.report_lines(numbers)
    assert len(numbers["warnings"]) > 4 and lines[0].startswith("CRITICAL ")
    assert len(lines) <= 25 and max(map(len, lines)) <= 110
    assert rc.report_lines(report(outcomes(write)))[0] == "No warnings."


def test_warnings_have_stable_keys(write):
    numbers = report(outcomes(write, change=awful))
    assert all(
        {"metric", "level", "value", "interval", "n", "advice"} <= set(row)
        for row in numbers["warnings"]
    )
    assert [m["metric"] for m in numbers["metrics"]] == [row[0] for row in rc.METRICS]


def test_every_chart_says_its_values_as_text(write):
    page = rc.report_html(report(outcomes(write)))
    bars = re.findall(r'<td><svg [^>]*aria-hidden="true">.*?</svg></td><td>(.*?)</td>', page)
    assert (
        page.count("<figure>") == 6
        and len(bars) == page.count("<svg ") > 20
        and bars[0] == "400"
        and all(bars)
    )


HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=http://127.0.0.1:9/x.png onerror=\"document.title='owned'\">",
    "[a](javascript:alert(1)) <a href='javascript:alert(1)'>x</a> {{COST}}",
    "</style><style>body{display:none}</style><link rel=stylesheet href=//127.0.0.1:9>\u202e",
]


def hostile(rng, i, chosen, rejected):
    chosen.text, rejected.text = HOSTILE[i % 4] * 3, HOSTILE[(i + 1) % 4]
    chosen.model, rejected.model = "<b>m</b>", "\"><script>document.title='owned'</script>"


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
        assert find("script, img, link, a, [onerror]") == 0 and find("style") == 1
        text = driver.execute_script("return document.body.textContent")
        assert all(bad in text for bad in HOSTILE) and find("article") == 9
        for width in (390, 1280):
            driver.set_window_size(width, 900)
            assert driver.execute_script(
                "return document.documentElement.scrollWidth <= innerWidth"
            )
