"""exact_match: right and wrong are never confused; what could be either is not checkable.

gsm8k_sample.jsonl: 42 problems of OpenAI grade-school-math with four model answers each and whether
they are right. MIT License, Copyright (c) 2021 OpenAI."""

import doctest
import json
import time
from collections import Counter
from pathlib import Path

import pytest

import rlhf_constructor as rc

SAMPLE = [
    json.loads(line)
    for line in (Path(__file__).parent / "gsm8k_sample.jsonl").read_text("utf-8").splitlines()
]
WRITERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def checked(reference: str, answer: str, prompt: str = "") -> bool | None:
    """Right, wrong, or None: not checkable."""
    one, other = rc.final_answer(reference), rc.final_answer(answer)
    if one is None or other is None:
        return None
    return rc.same_answer(one, other, prompt)


@pytest.mark.parametrize("section", ["final_answer", "read_answer", "same_answer", "parse_scores",
                                     "split_entries", "default_rubric", "gather_lines", "flatten_object",
                                     "enclosing_objects", "heading", "marked_answers", "exclude_each_other",
                                     "read_number", "join_parts", "look_up", "read_error_body",
                                     "read_error_text", "without_thinking", "about_tokens", "counts_on"])  # fmt: skip
def test_the_examples_in_the_docstrings_hold(section):
    finder = doctest.DocTestFinder(recurse=False)
    [examples] = finder.find(getattr(rc, section), section, globs=vars(rc).copy())
    assert examples.examples and doctest.DocTestRunner().run(examples).failed == 0


def test_no_real_answer_is_taken_for_the_opposite():
    count = Counter()
    for problem in SAMPLE:
        for writer in WRITERS:
            answer = problem[writer]
            result = checked(problem["ground_truth"], answer["solution"], problem["question"])
            count[result] += 1
            assert result in (None, answer["is_correct"]), answer["solution"]
    assert count[None] <= 20 and count[True] > 30 and count[False] > 60


OPTIONS = "Which city? A. Paris B. London C. Rome"
SENTIMENT = "Say whether the review is positive, negative or neutral."
RIGHT = [
    ("C", r"So $\boxed{(C)}$.", ""),
    ("negative", "The food was not good.\nnegative", SENTIMENT),
    ("A: 18", "6 + 12 = 18\nA: 18", ""),
    ("#### 18", "She has 18 eggs.\n#### 18", ""),
    ("18", r"So \boxed{18}", ""),
    ("18", "The answer is 18.", ""),
    ("18", "**Answer:** 18", ""),
    ("18", "**Final Answer**: $18$.", ""),
    ("18", "So the final answer is: \\boxed{18}.", ""),
    ("18", "6 + 12 = 18, so the answer is 18 eggs.", "How many eggs has she?"),
    ("18", r"So she has \boxed{18} eggs.", "How many eggs has she?"),
    (
        "18",
        r"It takes $\boxed{18}$ minutes.",
        "It takes a minute a page. How many minutes are that?",
    ),
    ("18", "答案：18瓶", "每箱6瓶，3箱有多少瓶？"),
    ("18", "6 + 12 makes it.\n\n18", ""),
    ("18", "一共有18个。\n答案：18", ""),
    ("18", "所以答案是18。", ""),
    ("18", "两次分别是6个和12个，所以答案是18。", ""),
    ("1,200", "The answer is 1200.", ""),
    ("1200", "The answer is $1,200.00.", ""),
    ("0.5", "Answer: 1/2", ""),
    ("1/2", r"\boxed{\frac{1}{2}}", ""),
    ("3.5", r"\boxed{3\frac{1}{2}}", ""),
    ("2/4", r"\boxed{\dfrac{1}{2}}", ""),
    ("50%", "Answer: 0.5", ""),
    ("50%", "Answer: 50 percent", ""),
    ("$18", "Answer: 18 dollars", ""),
    ("18 cm", "Answer: 18 cm", ""),
    ("18元", "答案：18 块钱", ""),
    ("30000", "答案：3万", ""),
    ("3 million", "Answer: 3,000,000", ""),
    ("-5", "Answer: −5", ""),
    ("-5", "Answer: minus 5", ""),
    ("-5", "答案：负5", ""),
    ("20", "Answer: $20", "She works 4 hours for 5 dollars an hour. How much does she make?"),
    ("１８", "答案：18", ""),
    ("B", "The answer is (B).", OPTIONS),
    ("B", "(B) London", OPTIONS),
    ("B. London", "Answer: B", OPTIONS),
    ("B", "London is larger.\nAnswer: Option B", OPTIONS),
    ("B", "答案：选B", OPTIONS),
    ("positive", "Sentiment: Positive.", SENTIMENT),
    ("正面", "情感：正面", ""),
    ("yes", "The answer is true.", ""),
    ("不对", "答案：错误", ""),
    ("not positive", "Answer: not positive", SENTIMENT),
    ("10-20", "Answer: 10-20", ""),
    ("3:30", "Answer: 3:30", ""),
]
WRONG = [
    ("A: 18", "6 * 12 = 72\nA: 72", ""),
    ("18", "The answer is 8.", ""),
    ("18", r"\boxed{81}", ""),
    ("42", "Answer: -42", ""),
    ("1/2", r"\boxed{\frac{-1}{2}}", ""),
    ("1/2", r"\boxed{\frac{1}{3}}", ""),
    ("50%", "Answer: 40%", ""),
    ("$18", "Answer: $26", ""),
    ("18 cm", "Answer: 1800 cm", ""),
    ("3万", "答案：4万", ""),
    ("B", "Answer: C", OPTIONS),
    ("B. London", "The answer is (A) Paris.", OPTIONS),
    ("positive", "Answer: negative", ""),
    ("正面", "情感：负面", ""),
    ("yes", "Answer: no", ""),
    ("对", "答案：不对", ""),
    ("Paris", "London", "Which city is larger, Paris or London?"),
    ("苹果", "答案：香蕉", "选一个：苹果、香蕉、梨。"),
]
UNCHECKED = [
    ("C", r"\boxed{(C)}. Nope.", OPTIONS),
    ("C", "The answer is (C), my bad.", OPTIONS),
    ("12", "\\boxed{12} 不对，应该是43。\n情感：12", ""),
    ("12", r"\boxed{12} 错误", ""),
    ("12", "\\boxed{12} 更正：43\n情感：12", ""),
    ("negative", "You might think 答案\nnegative", SENTIMENT),
    ("12", "Many would say:\n12", ""),
    ("42", "The answer is not 42 but 43.", ""),
    ("43", "The answer is not 42 but 43.", ""),
    ("42", "The answer is not 42.", ""),
    ("42", "The answer is 42. Wait, I forgot the tax: it is 43.", ""),
    ("42", "The answer is 42.\nHowever, with tax it is 43.", ""),
    ("42", "The answer is 42.\nA: 43", ""),
    ("42", "The answer is 42 or 43.", ""),
    ("42", "The answer is between 42 and 43.", ""),
    ("42", "The answer is about 42.", ""),
    ("42", "The answer is at least 42.", ""),
    ("42", "Answer: 42, 43", ""),
    ("42", "Answer: 40-44", ""),
    ("42", "If she kept all, the answer is 42.", ""),
    ("42", "I doubt that the answer is 42", ""),
    ("42", "如果不算税，答案是42", ""),
    ("42", "答案不是42", ""),
    ("42", "答案是42吗？", ""),
    ("42", "答案是42左右", ""),
    ("42", "答案不是42，而是43。", ""),
    ("42", "She has 42 eggs and 3 hens.", ""),
    ("42", "40\n41\n42", ""),
    ("42", "", ""),
    ("42", r"\boxed{42} or \boxed{43}", ""),
    ("42", r"\boxed{42", ""),
    ("42", r"It is not \boxed{42}.", ""),
    ("42", r"If she kept them all, she had \boxed{42}.", ""),
    ("5", "Answer: 5x", ""),
    ("5", "Answer: 5!", ""),
    ("5", "Answer: 5 dozen", ""),
    ("?", "Answer: ?", ""),
    ("5", "I think the answer is 5", ""),
    ("1" * 5000, "Answer: " + "1" * 5001, ""),
    ("5", "Answer: 5 tenths", ""),
    ("5", "Answer: 5 more", ""),
    ("5", "Answer: 5 and a half", ""),
    ("5", "答案：5倍多", ""),
    ("5", "答案：五个半", ""),
    ("5", "Answer: 5%", ""),
    ("50", "Answer: 0.5", ""),
    ("3.33", "Answer: 10/3", ""),
    ("18", "Answer: 17.96", ""),
    ("1.5", "Answer: 90 minutes", ""),
    ("1.5 hours", "Answer: 90 minutes", ""),
    ("18 cm", "Answer: 18 m", ""),
    ("18 cm", "Answer: 18 inches", ""),
    ("$18", "Answer: 18 euros", ""),
    ("18", "Answer: 1800 cents", ""),
    ("18", "Answer: 18 cents", "How many dollars are 1,800 cents?"),
    ("3", "答案：3天", "36小时的两倍是几小时？"),
    ("18", "Answer: 1800", ""),
    ("212", "Answer: 100 °C", ""),
    ("3:30", "Answer: 3:30 pm", ""),
    ("15:30", "Answer: 3:30 pm", ""),
    ("2:1", "Answer: 4:2", ""),
    ("B", "Answer: B or C", OPTIONS),
    ("B", "Answer: A, B", OPTIONS),
    ("B", "A. Paris\nB. London\nC. Rome", OPTIONS),
    ("B. London", "Answer: C. London", OPTIONS),
    ("B. London", "Answer: B. Rome", OPTIONS),
    ("B", "London", OPTIONS),
    ("A", "A good question.", OPTIONS),
    ("positive", "Answer: not positive", SENTIMENT),
    ("negative", "Answer: not positive", SENTIMENT),
    ("positive", "Answer: very positive", SENTIMENT),
    ("positive", "Answer: positive or neutral", SENTIMENT),
    ("积极", "答案：正面", ""),
    ("正面", "答案：不是正面", ""),
    ("USA", "Answer: United States", "Which country?"),
    ("car", "Answer: automobile", ""),
    ("St. Paul", "The answer is St. Louis.", ""),
    ("六十八", "答案：六八", ""),
    ("150", "答案：一百五", ""),
    ("x > 3", "Answer: 3 < x", ""),
    (r"\sqrt{2}", "Answer: 1.41", ""),
    ("8", "Answer: 2^3", ""),
    ("52", "Answer: 5²", ""),
    ("1000000", "Answer: 10^6", ""),
    ("300000", r"\boxed{3 \times 10^{5}}", ""),
    ("3 million", "Answer: 3,200,000", ""),
    ("18", "答案是十八个。", ""),
    ("18", "答案是二十。", ""),
    ("50%", "答案：百分之50", ""),
    ("18", "Answer: 18 eggs", "How many hens has she?"),
    ("18", "Answer: 18 men", "How many women are there?"),
    ("18", "Answer: 18 minutes", "How long does it take?"),
    ("18 cm", "Answer: 18 centimeters", ""),
]  # fmt: skip

AROUND_A_BOX = [
    r"x = -\boxed{5}", r"$-\boxed{5}$", r"-\(\boxed{5}\)", r"\boxed{5}%", r"\boxed{5}\%", r"2^\boxed{5}",
    r"2^{\boxed{5}}", r"1/\boxed{5}", r"\sqrt{\boxed{5}}", r"x > \boxed{5}", r"x \ne \boxed{5}",
    r"x \leq \boxed{5}", r"3 + \boxed{5}", r"about \boxed{5}", r"10\boxed{5}", r"-\$\boxed{5}",
    r"negative \boxed{5}", r"负\boxed{5}", r"\boxed{5}\pi", r"\boxed{5}\text{ cm}", r"\boxed{5} million",
    r"\boxed{5}万", r"\boxed{5}x", r"\boxed{5} cents", r"\boxed{5} dozen", r"\boxed{5}!", r"\boxed{5}^2",
    r"\boxed{5}斤", r"\boxed{5} tenths", r"\boxed{5} \times 10^3", r"She has \boxed{5} eggs left.",
    r"\boxed{5} is the total.", r"$\boxed{5}$ mph", r"\boxed{5}\cos x",
]  # fmt: skip
WHOLE_BOX = [
    r"So \boxed{5}.", r"$x = \boxed{5}$", r"\[ \boxed{5} \]", r"一共\boxed{5}个。", r"Hence $$\boxed{5}.$$", r"**Answer:** \boxed{5}",
]  # fmt: skip
SECOND_CHOICES = [
    "The answer is B. Wait, that is wrong.", "答案：B、C都对", "The answer is (B) or the last one",
    "Answer: (B) False", "答案：B，不对", "答案：(B)错误", "Answer: B, c", "答案：B，丙", "Answer: (B)? No.",
    "Answer: B, but actually the last one.", "The answer is B (incorrect).", "答案：B。但是C也可以",
]  # fmt: skip
DOUBTED = [
    "The answer is 42\nThat is incorrect.", "The answer is 42\nThis is false.", "The answer is 42.\nThat was a mistake.",
    "The answer is 42\nThe true total is forty-three.", "答案：42\n以上结果有误。", "答案：42\n算漏了一个。",
    "答案：42\n重算：六", "Incorrect: the answer is 42.", "Common mistake: the answer is 42.",
    "Bob claims, the answer is 42.", "小明认为：答案是42", "反例：答案是42", "常见误区：答案是42",
]  # fmt: skip
OTHER_UNITS = [
    ("60", "The answer is 60 mph", "What is its speed in km/h?"),
    ("7", "Answer: 7 fortnights", "How many days?"),
    ("5", "Answer: 5 hectares", "How many acres?"),
    ("5", "答案：5斤", "重多少公斤？"),
    ("5", "答案：5里", "多少公里？"),
    ("5", "Answer: 5 km", "How many m is it?"),
    ("5", "Answer: 5 boxes", "There are boxes of 12. How many bottles?"),
    ("5", "答案：5箱", "每箱12瓶，有多少瓶？"),
    ("0.5", "The answer is 50%", "What percent is it?"),
    ("1", "答案：100%", "百分之几？"),
    ("33", "The answer is 33.3%", "What percentage is it?"),
    ("2", "Answer: 3 days", "How many hours?"),
    ("7/15", "Answer: 7 fifteenths", ""),
    ("11/20", "Answer: 11 twentieths", ""),
    ("5", "Answer: 5 twelfths", ""),
    ("Answer: 6'", 'Answer: 6"', ""),
    (r"\boxed{A'}", r"\boxed{A}", ""),
    (r"\boxed{y'}", r"\boxed{y}", ""),
    (r"\boxed{(1,2)}", r"\boxed{[1,2]}", ""),
    (r"\boxed{X}", r"\boxed{x}", ""),
    (r"-\boxed{5}", r"-\boxed{6}", ""),
]


@pytest.mark.parametrize("answer", AROUND_A_BOX)
def test_a_box_inside_a_larger_answer_is_not_checkable(answer):
    assert checked("5", answer) is None and checked(answer, "5") is None


@pytest.mark.parametrize("answer", WHOLE_BOX)
def test_a_box_in_a_sentence_is_the_answer(answer):
    assert checked("5", answer) is True and checked("6", answer) is False


@pytest.mark.parametrize("answer", SECOND_CHOICES)
def test_a_choice_taken_back_or_doubled_is_not_checkable(answer):
    assert checked("B", answer) is None and checked("C", answer) is None


@pytest.mark.parametrize("words", ["Nope.", "My bad.", "in base 7", "and also 7"])
def test_a_choice_in_a_box_with_words_behind_it_is_not_checkable(words):
    answer = rf"\boxed{{(C)}} {words}"
    assert checked("(C)", answer) is None and checked("(A)", answer) is None


@pytest.mark.parametrize("answer", DOUBTED)
def test_an_answer_that_is_called_wrong_is_not_checkable(answer):
    assert checked("42", answer) is None and checked("43", answer) is None


@pytest.mark.parametrize("reference, answer, prompt", OTHER_UNITS)
def test_an_answer_in_another_unit_or_notation_is_not_checkable(reference, answer, prompt):
    assert checked(reference, answer, prompt) is None


@pytest.mark.parametrize("reference, answer, prompt", RIGHT)
def test_a_right_answer_is_recognised(reference, answer, prompt):
    assert checked(reference, answer, prompt) is True


@pytest.mark.parametrize("reference, answer, prompt", WRONG)
def test_a_wrong_answer_is_recognised(reference, answer, prompt):
    assert checked(reference, answer, prompt) is False


@pytest.mark.parametrize("reference, answer, prompt", UNCHECKED)
def test_what_could_be_either_is_not_checkable(reference, answer, prompt):
    assert checked(reference, answer, prompt) is None


@pytest.mark.parametrize("unit", ["\n", ", ", "so ", r"\boxed{"])
def test_a_degenerate_answer_is_read_quickly(unit):
    started = time.perf_counter()
    rc.final_answer(unit * 8000 + "\n#### 42")
    assert time.perf_counter() - started < 2
