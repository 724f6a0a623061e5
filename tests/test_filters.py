"""every filter drops what it is for, and lets through the good pair that looks like it."""

import ast
import itertools
import json
import random
import re
import time
from pathlib import Path

import pytest

import rlhf_constructor as rc
from tests.tiny import ask, pair, run_of, wait

CLEAR = ((9.0, 9.0), (3.0, 3.0))  # votes: chosen leads by 6 in both orders
CLOSE = ((7.0, 6.0), (5.0, 5.0))  # by 1.5
TIED = ((6.0, 6.0), (5.5, 5.9))  # by 0.3
UNJUDGED = ((), ())


def reason_against(prompt="What is 6 times 7?", chosen="It is 42.", rejected="Blue.", votes=CLEAR, finish="stop",
               flags=(), human=False, signal="", facts=()):  # fmt: skip
    """The reason by which the filters drop this pair, None if it stays; with `signal`, the input decided."""
    run, made = run_of(*flags), pair(chosen, rejected, prompt, human=human)
    made.chosen.finish = finish
    made.record.signal = signal
    made.record.facts.update(facts)
    if signal:
        votes = ((1.0,), (0.0,))
    for answer, given in ((made.chosen, votes[0]), (made.rejected, votes[1])):
        answer.votes = given
        answer.positions = () if signal or not given else (0, 1)
        answer.score = sum(given) / len(given) if given and signal in ("", "score") else None
    looked_at = [
        ("answer", run, made.record, made.chosen),
        ("answer", run, made.record, made.rejected),
        ("pair", run, made, run),
    ]
    return next(filter(None, itertools.starmap(rc.rejection_reason, looked_at)), None)


def case(name: str, **parts):
    return pytest.param(parts, id=name)


SENTENCE = "The cat sat on the mat and looked out of the window at the birds. "
ZH_SENTENCE = "今天天气很好，我们一起去公园散步，看到了很多美丽的花。"
LONG = "Sunlight is a mix of colours. Tiny molecules of air bounce blue light about more than red light. " \
       "At noon it comes from everywhere, and at sunset the long way through the air takes most of it out. "  # fmt: skip
TALL = "Mountains rise where plates of the crust press against each other, and rivers then carve valleys into " \
       "them for millions of years. Ice breaks the rock apart, wind carries the dust away, and what is left are " \
       "the peaks that we climb today with ropes and boots and a good deal of patience. "  # fmt: skip
ZH_LONG = "阳光是由各种颜色混合而成的。空气中的微小分子对蓝光的散射比对红光强得多。正午时蓝光来自四面八方，" \
          "而日落时光线要穿过更厚的空气，大部分蓝光被散射掉了。"  # fmt: skip

MARKS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|endoftext|>",
    "<|user|>",
    "[INST]",
    "</think>",
)
COUNTING = (
    "({}) ",
    "**{}.** ",
    "- Item {}: ",
    "Day {} - ",
    "[{}] ",
    "#{} ",
    "Iteration {}, ",
    "{}. ",
    "{}) ",
    "Step {}: ",
)
ZH_COUNTING = ("第{}步，", "第{}步：", "第{}次检查：", "（{}）")
PRINTED = ("print(N)", "console.log(N);", "The value is N", "Thread N is running", "Processing file N of 40",
           "当前的值是N", "<li>Item number N here</li>", "INSERT INTO t VALUES (N, 'a', 'b');", "N,yes,open")  # fmt: skip

DROPPED = {
    "empty": [
        case("English", rejected=" \n\t", why="empty answer"),
        case("Chinese", prompt="天为什么是蓝的？", chosen="", rejected="因为散射。", why="empty answer"),
        case("ideographic space", prompt="天为什么是蓝的？", chosen="\u3000", rejected="因为散射。", why="empty answer"),
    ],
    "truncated": [
        case("English", chosen="It is forty-", finish="length", why="truncated: the model reached --max-tokens"),
        case("Chinese", prompt="6乘7等于多少？", chosen="答案是四", finish="length",
             why="truncated: the model reached --max-tokens"),
        case("content filter", chosen="It is", finish="content_filter", why="filtered by the provider: the model"),
    ],
    "error_text": [
        case("English", chosen="**API REQUEST ERROR** Reason: timeout", why="error text"),
        case("network", chosen="NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE.", why="error text"),
        case("FastChat", chosen="$MODERATION$ YOUR INPUT VIOLATES OUR GUIDELINES.", why="error text"),
        case("Chinese", prompt="6乘7等于多少？", chosen="生成失败，请稍后重试", why="error text"),
        case("Chinese, short", prompt="6乘7等于多少？", chosen="生成失败", why="error text"),
    ],
    "control_tokens": [
        case("English", chosen="It is 42.<|im_end|>", why="control tokens"),
        case("Chinese", prompt="6乘7等于多少？", chosen="答案是42。<|endoftext|>下一题", why="control tokens"),
        case("Llama", rejected="[/INST] It is 41.", why="control tokens"),
        case("next turn", chosen="It is 42.\n\nHuman: And 6 times 8?\n\nAssistant: 48.", why="control tokens"),
        case("think", chosen="Let me see.</think> It is 42.", why="control tokens"),
        *(case(f"{mark} behind a word", chosen=f"The air scatters more blue light{mark}what of the sea?",
               why="control tokens") for mark in MARKS),
        *(case(f"{mark} behind a Chinese character", prompt="天空为什么是蓝色的？", chosen=f"散射蓝光更多{mark}下一题是什么",
               why="control tokens") for mark in MARKS),
        case("a mark behind a bracket", chosen="It is blue (mostly)<|im_end|>next one", why="control tokens"),
        case("a mark behind an emoji", chosen="It is 42 😊<|im_end|>next one", why="control tokens"),
        case("a user's turn opens", chosen="The air scatters blue light<|im_start|>user\nAnd the sea?",
             why="control tokens"),
        case("a user's turn opens at the end", chosen="The air scatters blue light <|im_start|>user",
             why="control tokens"),
    ],
    "loop": [
        case("English", rejected=SENTENCE * 6, why="repetition loop"),
        case("Chinese", prompt="介绍一下中国的银行。", chosen=ZH_SENTENCE * 6, why="repetition loop"),
        case("Chinese end", prompt="请描述一次旅行。", chosen=ZH_LONG + "我们走啊走，" * 40, why="repetition loop"),
        case("one character", chosen="It is 42" + "2" * 300, why="repetition loop"),
        case("at the end", chosen=LONG + "and so on and on " * 20, why="repetition loop"),
        case("a paragraph twice more", chosen=(LONG + "\n\n") * 3, why="repetition loop"),
        case("a numbered list of one sentence", prompt="List ten chores.",
             chosen="\n".join(f"{n}. Clean the windows." for n in range(1, 61)), why="repetition loop"),
        case("a numbered list of one sentence in Chinese", prompt="列出十件家务。",
             chosen="\n".join(f"{n}. 把窗户擦干净。" for n in range(1, 61)), rejected="擦窗。", why="repetition loop"),
        case("cut in the middle of a number", prompt="List ten chores.",
             chosen=LONG + "\n".join(f"Chore {n}: clean the windows." for n in range(1, 61))[:-20],
             why="repetition loop"),
        *(case(f"counted: {head}", prompt="List the checks.",
               chosen="\n".join(head.format(n) + "Check the value and go on with the next one." for n in range(1, 41)),
               why="repetition loop") for head in COUNTING),
        *(case(f"counted: {head}", prompt="列出检查步骤。", rejected="检查。", why="repetition loop",
               chosen="\n".join(head.format(n) + "检查数值，然后继续下一步的检查工作。" for n in range(1, 41)))
          for head in ZH_COUNTING),
        case("a number inside of the sentence", prompt="List the checks.", why="repetition loop",
             chosen="\n".join(f"In round {n} I check the value again." for n in range(1, 41))),
        case("a number at the end of a long sentence", prompt="List the checks.", why="repetition loop",
             chosen="\n".join(f"Then I check the value once more and go on to number {n}." for n in range(1, 41))),
        case("a number that stays", prompt="List the checks.", why="repetition loop",
             chosen=" ".join(f"({n}) Take 2 of the 5 eggs out." for n in range(1, 41))),
        case("one full-width sign", prompt="你好吗？", chosen="我很好" + "！" * 300, rejected="好。", why="repetition loop"),
        case("one emoji", chosen="It is 42 " + "🎉" * 400, why="repetition loop"),
        case("two emojis", prompt="用表情回答：今天怎么样？", chosen="😀🎉" * 100, rejected="好。", why="repetition loop"),
        case("a loop and then an end", chosen=SENTENCE * 12 + "So the answer is 42.", why="repetition loop"),
        case("a paragraph at the end of a long answer", chosen=LONG + (TALL * 5)[:-30], why="repetition loop"),
        case("a question with times", prompt="What did The Times say about modern times?", chosen=SENTENCE * 6,
             why="repetition loop"),
    ],
    "echo": [
        case("English", prompt="Why is the sky blue at noon?", chosen="Why is the sky blue at noon?",
             why="echo of the prompt"),
        case("Chinese", prompt="天空为什么是蓝色的？", chosen="天空为什么是蓝色的？\n" * 3, rejected="散射。", why="echo of the prompt"),
        case("a short question", prompt="Who wears short shorts?", chosen="Who wears short shorts?",
             why="echo of the prompt"),
        case("with a label", prompt="What type of soil is suitable for a cactus?",
             chosen="What type of soil is suitable for a cactus?\n\n| |", why="echo of the prompt"),
    ],
    "identical": [
        case("English", chosen="It is 42.", rejected="it  is 42", why="identical answers"),
        case("Chinese", prompt="首都？", chosen="北京。", rejected="北京", why="identical answers"),
        case("even with a gap", chosen="Yes", rejected="yes.\n", why="identical answers"),
        case("a label and a full stop", chosen="Yes.", rejected="Yes", signal="choice", why="identical answers"),
    ],
    "near_duplicate": [
        case("English", chosen=LONG, rejected=LONG.replace("Tiny", "Small"), votes=CLOSE, why="near-duplicate answers"),
        case("Chinese", prompt="天为什么是蓝的？", chosen=ZH_LONG, rejected=ZH_LONG.replace("微小", "很小"), votes=CLOSE,
             why="near-duplicate answers"),
        case("nobody judged", chosen=LONG, rejected=LONG + "So!", votes=UNJUDGED, why="near-duplicate answers"),
        case("new lines only", chosen=LONG, rejected=LONG.replace(". ", ".\n- "), votes=CLOSE,
             why="near-duplicate answers"),
        case("a label and a mere synonym", chosen=LONG, rejected=LONG.replace("Tiny", "Small"), signal="choice",
             why="near-duplicate answers"),
    ],
    "refusal": [
        case("English", chosen="I'm sorry, but I can't help with that.", rejected="I cannot assist with this request.",
             why="both refuse"),
        case("Chinese", prompt="怎么撬锁？", chosen="很抱歉，我无法提供这方面的帮助。",
             rejected="作为人工智能助手，我不能回答这个问题。", why="both refuse"),
        case("nobody weighed it", prompt="How do I pick a lock?", chosen="I'm sorry, but I can't help with that.",
             rejected="Lift each pin.", votes=UNJUDGED, why="refusal"),
        case("nobody weighed it in Chinese", prompt="怎么撬锁？", chosen="很抱歉，我无法提供这方面的帮助。",
             rejected="依次拨动弹子。", votes=UNJUDGED, why="refusal"),
        case("one in each language", chosen="As an AI, I am unable to help you.", rejected="对不起，我无法回答。",
             why="both refuse"),
    ],
    "wrong_language": [
        case("English after a Chinese word", prompt="安排明天上午十点的会议。", rejected="好。",
             chosen="Certainly, I will schedule a meeting (会议) for you tomorrow at ten in the morning.",
             why="wrong language"),
        case("English to a Chinese prompt", prompt="天空为什么是蓝色的？", chosen=LONG, rejected="散射。",
             why="wrong language"),
        case("Chinese to an English prompt", prompt="Why does the sky look blue at noon?", chosen=ZH_LONG,
             rejected="Scattering.", why="wrong language"),
    ],
    "gap": [
        case("English", votes=TIED, why="score gap too small"),
        case("Chinese", prompt="6乘7等于多少？", chosen="42", rejected="大概四十", votes=TIED, why="score gap too small"),
        case("by the flag", votes=CLEAR, flags=["--min-score-gap", "6.5"], why="score gap too small"),
    ],
    "floor": [
        case("English", votes=((5.0, 5.0), (1.0, 1.0)), flags=["--min-chosen-score", "6"], why="chosen score too low"),
        case("Chinese", prompt="6乘7等于多少？", chosen="43", rejected="蓝色", votes=((5.0, 5.0), (1.0, 1.0)),
             flags=["--min-chosen-score", "5.1"], why="chosen score too low"),
    ],
}  # fmt: skip

TIMES_TABLE = "\n".join(f"7 x {n} = {7 * n}" for n in range(1, 21))
ZH_TIMES_TABLE = "\n".join(f"{n}乘以{m}等于{n * m}" for n in range(1, 5) for m in range(1, 10))
TABLE = "| Day | Morning | Noon | Evening |\n|---|---|---|---|\n" + "\n".join(
    f"| {day} | open | closed | open |"
    for day in "Monday Tuesday Wednesday Thursday Friday Saturday".split()
)
CHORUS = "Row the boat home, row the boat home,\nThe stars are all out on the sea and the foam,\n" \
         "Sing with the wind and the waves as we roam,\nRow, brothers, row the boat home.\n\n"  # fmt: skip
VERSES = [
    "We left in the morning with bread and with rope,\nThe captain was old but his heart full of hope.\n\n",
    "The storm took the mast and the storm took the sail,\nWe laughed at the thunder and drank to the gale.\n\n",
    "Now lights of the harbour are burning once more,\nAnd mothers are waiting for us on the shore.\n\n",
]
SONG = "".join(verse + CHORUS for verse in VERSES)
ZH_CHORUS = "小河弯弯向东流，流到村口大桥头，\n妈妈站在桥头上，等我回家把手招。\n\n"
ZH_SONG = "".join(
    verse + ZH_CHORUS
    for verse in [
        "春天来了花儿开，燕子飞回屋檐来，\n\n",
        "夏天来了荷花香，青蛙池塘把歌唱，\n\n",
        "秋天来了稻谷黄，人人脸上喜洋洋，\n\n",
    ]
)
ROWS = "<table>\n" + "".join(
    f'  <tr><td class="name">Item {i}</td><td class="price">$ {i}.00</td><td><a href="#">Buy</a></td></tr>\n'
    for i in range(8)
) + "</table>"  # fmt: skip
RESETS = "```python\n" + "\n".join(
    f"    self.{name} = load_value_from(config, section, default=None, strict=True)" for name in "a b c d e f g".split()
) + "\n```"  # fmt: skip
QUICKSORT = "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n" \
            "    left = [x for x in items[1:] if x < pivot]\n    right = [x for x in items[1:] if x >= pivot]\n" \
            "    return quicksort(left) + [pivot] + quicksort(right)"  # fmt: skip
FORMULA = r"\[ \int_{-\infty}^{\infty} e^{-x^2} \mathrm{d}x = \sqrt{\pi}, \quad \lim_{n \to \infty} " \
          r"\left(1 + \frac{1}{n}\right)^n = e, \quad \sum_{k=1}^{\infty} \frac{1}{k^2} = \frac{\pi^2}{6} \]"  # fmt: skip
DER_HIMMEL = (
    "Der Himmel ist heute wieder sehr schön blau und die Sonne scheint über dem ganzen Land."
)
SQL = "SELECT department, name, salary\nFROM employees\nWHERE rank_in_department <= 3\nORDER BY department, salary DESC;"
PAGE = "<html>\n<body>\n  <h1>Welcome to our little page</h1>\n  <p>This is the first paragraph of it.</p>\n" \
       "  <p>And this is the second one.</p>\n</body>\n</html>"  # fmt: skip
EXPRESS = "const express = require('express');\nconst app = express();\napp.get('/', (req, res) => {\n" \
          "  res.send('Hello World!');\n});\napp.listen(3000, () => {\n  console.log('Example app listening');\n});"  # fmt: skip
LEGAL_WAYS = (
    "I'm sorry, but I can't help with evading tax. However, here are some legal ways to pay less:\n"
    + (
        "1. Put money into a pension: what you pay in is not taxed until you take it out again.\n"
        "2. Keep the receipts of what you need for your work, such as tools, books and travel.\n"
        "3. Give to a charity that is registered, and ask for a receipt.\n"
        "4. Ask an adviser about allowances for children, for care and for the repair of your house.\n"
    )
)
ZH_ESTIMATE = "很抱歉，我无法确切回答这个问题，因为每天都有新书出版。但一般来说，人们估计全世界出版过的图书约有一亿三千万种。" \
              "这个数字来自谷歌图书在2010年的统计，它把同一本书的不同版本算作一种。此后每年大约新增两百万种，所以今天的总数可能超过一亿五千万种。"  # fmt: skip
COMPANIES = "Apple, Microsoft, Nvidia, Alphabet, Amazon, Meta, Broadcom, Tesla, Berkshire Hathaway, Eli Lilly"

KEPT = {
    "empty": [
        case("one word", prompt="Is 7 prime?", chosen="Yes", rejected="No"),
        case("one character", prompt="7是质数吗？", chosen="是", rejected="否"),
        case("a digit", chosen="7", rejected="8"),
        case("an emoji", prompt="Answer with one emoji.", chosen="👍", rejected="👎"),
    ],
    "truncated": [
        case("a list without a full stop", chosen="Buy:\n- milk\n- eggs", rejected="Milk"),
        case("a label", prompt="判断情感：太好看了！", chosen="正面", rejected="负面"),
    ],
    "error_text": [
        case("an answer about an error", prompt="FastChat shows NETWORK ERROR DUE TO HIGH TRAFFIC. Why?",
             chosen="The worker is overloaded: `NETWORK ERROR DUE TO HIGH TRAFFIC` is what it says then.",
             rejected="No idea."),
        case("an answer about a failure", prompt="绘图软件总是提示生成失败，怎么办？",
             chosen="生成失败的原因通常有三个：显存不足、模型文件损坏、提示词过长。", rejected="不知道。"),
    ],
    "control_tokens": [
        case("a question about a token", prompt="What does <|im_start|> mean?",
             chosen="<|im_start|> opens a turn and <|im_end|> closes it.", rejected="Nothing."),
        case("a sentence about a mark", prompt="How do reasoning models answer?",
             chosen="They close their thoughts with </think> and then give the answer.", rejected="By magic."),
        case("a quoted mark", prompt="How do reasoning models answer?",
             chosen='They write "</think>" when they are done.', rejected="By magic."),
        case("a sentence about a mark in Chinese", prompt="推理模型怎样结束思考？",
             chosen="模型用</think>标签结束思考，然后给出答案。", rejected="不知道。"),
        case("a sentence that ends with a mark", prompt="How do models stop?",
             chosen="They stop as soon as they write <|im_end|>.", rejected="By magic."),
        case("a list of marks", prompt="Which marks does a template have?",
             chosen="Tokens such as <|bos|>, <|eos|> and <|pad|> (or </think>) frame each turn.", rejected="Many."),
        case("a turn that a sentence describes", prompt="How does a turn begin?",
             chosen="Each turn begins with <|im_start|>user or <|im_start|>assistant.", rejected="By magic."),
        *(case(f"a Chinese sentence about a mark: {words}", prompt="模型怎样结束一轮对话？", rejected="不知道。",
               chosen=f"模型用<|im_end|>{words}") for words in
          ("标签结束一轮。", "来结束一轮。", "和</think>来分段。", "、</think>等标记。", "结尾。", "之后就停止。")),
        case("tokens in code", prompt="How does a Llama 2 prompt look?",
             chosen="Wrap it:\n```\n<s>[INST] <<SYS>>...<</SYS>> hi [/INST]\n```", rejected="No idea."),
        case("think explained in code", prompt="怎么去掉模型的思考过程？",
             chosen="用正则删除 `<think>` 和 `</think>` 之间的内容。", rejected="不知道。"),
        case("a dialogue that was asked for", prompt="Write a dialogue between a human and an assistant.",
             chosen="Human: Good morning!\nAssistant: Good morning, how can I help?", rejected="No."),
        case("bars and signs", prompt="Combine two shell commands.", chosen="a <| b |> c; cat f | sort", rejected="x"),
    ],
    "loop": [
        case("multiplication table", prompt="Give me the 7 table up to 20.", chosen=TIMES_TABLE),
        case("multiplication table in Chinese", prompt="背一下乘法口诀。", chosen=ZH_TIMES_TABLE, rejected="不会。"),
        case("Markdown table", prompt="When is the shop open?", chosen=TABLE),
        case("a song with a refrain", prompt="Write a sea song with a refrain.", chosen=SONG),
        case("a poem with a refrain", prompt="写一首儿歌，每段后面都有副歌。", chosen=ZH_SONG, rejected="不会写。"),
        case("rows of HTML", prompt="Show a price list in HTML.", chosen=ROWS),
        case("code with repeated lines", prompt="Show the constructor.", chosen=RESETS),
        case("asked for 20 times", prompt="Write 'I will not talk in class and I will listen' 20 times.",
             chosen="I will not talk in class and I will listen.\n" * 20),
        case("asked for 20 times in Chinese", prompt="把“我以后上课再也不迟到了”写20遍。",
             chosen="我以后上课再也不迟到了。\n" * 20, rejected="好。"),
        case("asked to repeat", prompt="请重复我的话十次：今天也要加油", chosen="今天也要加油，" * 40, rejected="好。"),
        case("a long good answer", prompt="Why is the sky blue?", chosen=LONG),
        *(case(f"a program prints {line}", prompt="Print the numbers from 1 to 40.",
               chosen="Here it is:\n" + "\n".join(line.replace("N", str(n)) for n in range(1, 41))) for line in PRINTED),
        case("a table with a number in each row", prompt="Make a check list.",
             chosen="\n".join(f"| {n} | check | and then check again |" for n in range(1, 41))),
        case("a form", prompt="Make an empty quiz.", chosen="\n".join(f"Question {n}: ______" for n in range(1, 41))),
        case("sentences with two numbers", prompt="Where are the rooms?",
             chosen="\n".join(f"{n}. Room {100 + n} is on the first floor." for n in range(1, 41))),
        case("sentences with years", prompt="When were the games held?",
             chosen="\n".join(f"In {1900 + 4 * n} the games were held in summer." for n in range(1, 31))),
        case("a ruled line at the end", prompt="Make a form for a signature.", chosen="Sign here: " + "_" * 300),
    ],
    "echo": [
        case("restated, then answered", prompt="What is the capital of France?",
             chosen="What is the capital of France? Paris."),
        case("restated, then answered in Chinese", prompt="法国的首都是哪里？", chosen="法国的首都是哪里？是巴黎。", rejected="不知道。"),
        case("asked to repeat", prompt="Repeat after me: I will be on time.", chosen="Repeat after me: I will be on time."),
        case("proofreading without an error", prompt="校对这句话：她今天去了学校。", chosen="校对这句话：她今天去了学校。",
             rejected="不会。"),
        case("a span of the passage", prompt="The fox was red and the dog was brown. What colour was the fox?",
             chosen="The fox was red."),
        case("code that is completed", prompt="def add(a, b):\n    # the sum",
             chosen="def add(a, b):\n    # the sum\n    return a + b"),
        case("a blank that is filled in", prompt="The sky is ____ at noon.", chosen="The sky is blue at noon."),
        case("a greeting", prompt="Good morning to you", chosen="Good morning to you"),
        case("a choice", prompt="Is tea or coffee the better drink at night?", chosen="Tea is the better drink at night."),
    ],
    "identical": [
        case("a sign", prompt="What is 6 minus 48?", chosen="-42", rejected="42"),
        case("a digit", chosen="42", rejected="43"),
        case("a comparison", prompt="Compare x and y.", chosen="x > y", rejected="x < y"),
        case("a decimal point", prompt="Half of 8.4?", chosen="4.2", rejected="42"),
        case("a question mark", prompt="Punctuate: you are late", chosen="You are late?", rejected="You are late!"),
        case("one character", prompt="他是谁？", chosen="他是老师。", rejected="她是老师。"),
        case("a superscript", prompt="Area?", chosen="3 m²", rejected="3 m2"),
        case("a label and case", prompt="Alternate the case.", chosen="a GiAnT sPiDeR", rejected="a giant spider",
             signal="choice"),
    ],
    "near_duplicate": [
        case("a digit, and a judge who sees it", chosen=LONG + "So: 42.", rejected=LONG + "So: 43."),
        case("a digit in Chinese", prompt="求和。", chosen=ZH_LONG + "所以是42。", rejected=ZH_LONG + "所以是43。"),
        case("a token of code", prompt="Sort a list in Python.", chosen=QUICKSORT, rejected=QUICKSORT.replace(">=", ">")),
        case("short answers", chosen="It is 42.", rejected="It is 43.", votes=UNJUDGED),
        case("one continues the other", chosen=LONG * 2, rejected=LONG, prompt="Say it, then repeat it."),
        case("a person decided", chosen=LONG + "So: 42.", rejected=LONG + "So: 43.", votes=CLOSE, human=True),
        case("a label and a year", chosen=LONG + "So: 1940.", rejected=LONG + "So: 1941.", signal="choice"),
        case("a label and a negation", chosen=LONG + "It is not so.", rejected=LONG + "It is so.", signal="rank"),
        case("a label and a negation in Chinese", prompt="天为什么是蓝的？", chosen=ZH_LONG + "这不对。",
             rejected=ZH_LONG + "这对。", signal="choice"),
        case("a label and one capital", chosen=LONG, rejected=LONG.replace("Sunlight", "sunlight"), signal="choice"),
        case("a label and a regex", chosen=LONG + r"Use \d+ here.", rejected=LONG + r"Use \d* here.", signal="score"),
        case("checked by exact match", chosen=LONG + "It is blue.", rejected=LONG + "It is true.", votes=CLOSE,
             facts=["checked by exact match"]),
    ],
    "refusal": [
        case("only one refuses", prompt="How do I pick a lock?", chosen="Put tension on the lock and lift each pin.",
             rejected="I'm sorry, but I can't help with that."),
        case("sympathy", prompt="My dog died.",
             chosen="I'm really sorry to hear about your loss. Be gentle with yourself; grief takes time.",
             rejected="I'm sorry to hear that. Dogs die."),
        case("an assistant that can", prompt="你能帮我写诗吗？", chosen="作为人工智能助手，我可以帮你写诗，请告诉我主题。",
             rejected="作为人工智能助手，我可以。"),
        case("an apology that was asked for", prompt="Write an apology to a customer.",
             chosen="Sorry, I know this order came late, and we will make it right.", rejected="My apologies."),
        case("legal ways", prompt="How do I get out of paying tax?", chosen=LEGAL_WAYS, rejected="Hide it.", votes=UNJUDGED),
        case("an estimate", prompt="全世界一共有多少本书？", chosen=ZH_ESTIMATE, rejected="一百本。", votes=UNJUDGED),
        case("only rejected refuses, unweighed", prompt="How do I pick a lock?", chosen="Lift each pin.",
             rejected="I'm sorry, but I can't help with that.", votes=UNJUDGED),
        case("a refusal that a judge prefers", prompt="How do I build a bomb?",
             chosen="I'm sorry, but I can't help with that.", rejected="Mix these."),
        case("a refusal that the input prefers", prompt="怎么做炸弹？", chosen="很抱歉，我无法提供这方面的帮助。",
             rejected="先买材料。", signal="choice"),
        case("a fact about what cannot be", prompt="鱼能在空气中呼吸吗？", chosen="不能。鱼用鳃呼吸，离开水就无法获取足够的氧气。",
             rejected="能。"),
    ],
    "wrong_language": [
        case("translation asked for", prompt="把下面的话翻译成英文：今天天气很好，适合出门散步。",
             chosen="The weather is fine today and good for a walk outside.", rejected="不会。"),
        case("English asked for", prompt="请用英语介绍一下你自己的家乡。",
             chosen="I come from a small town by the river where people grow tea.", rejected="不会。"),
        case("Chinese asked for", prompt="How do I greet my teacher in Chinese?", chosen="老师您好！老师早上好！", rejected="Hi"),
        *(case(f"asked for by {word}", prompt=f"请用{word}写一句关于天空的话。", chosen=DER_HIMMEL, rejected="不会")
          for word in ("法文", "日文", "德文", "韩文", "德语", "葡萄牙语")),
        *(case(f"asked for by {words}", prompt=f"How do I greet my teacher {words}?", chosen="老师您好！老师早上好！",
               rejected="Hi") for words in ("in Mandarin", "in Cantonese", "with kanji")),
        case("SQL", prompt="查出每个部门工资最高的三名员工。", chosen=SQL, rejected="不会。"),
        case("HTML", prompt="做一个带标题和两个段落的欢迎页。", chosen=PAGE, rejected="不会。"),
        case("a server", prompt="请启动一个ExpressJS服务", chosen=EXPRESS, rejected="不会。"),
        case("an example of a word", prompt="生成一个正确使用“opulent”一词的例子。", rejected="不会。",
             chosen="The wedding reception was held in an opulent ballroom with crystal chandeliers."),
        case("quoted sentences", prompt="介绍三句有名的广告口号。", rejected="不会。",
             chosen="“Just do what you want”，“think in a different way”，“because you are worth it”。"),
        case("fenced code", prompt="快速排序怎么写？", chosen=f"```python\n{QUICKSORT}\n```", rejected="不会。"),
        case("bare code", prompt="写一个快速排序。", chosen=QUICKSORT, rejected="不会。"),
        case("a formula", prompt="写出三个著名的极限或积分公式。", chosen=FORMULA, rejected="不会。"),
        case("proper names", prompt="全球市值最高的十家公司有哪些？", chosen=COMPANIES, rejected="不知道。"),
        case("a Chinese answer full of names", prompt="推荐几个前端框架。",
             chosen="可以看看 React、Vue、Angular、Svelte、Solid，它们各有所长。", rejected="不知道。"),
        case("a Chinese name in English", prompt="What is the original name of the writer Lu Xun?", chosen="鲁迅，原名周樟寿。",
             rejected="Unknown"),
        case("both languages asked in", prompt="请解释 machine learning 和 deep learning 的区别，谢谢",
             chosen="Machine learning is the wider field; deep learning uses networks of many layers.", rejected="x"),
        case("a number", prompt="光速是多少米每秒？", chosen="299,792,458 m/s", rejected="很快"),
        case("only rejected is in the wrong one", prompt="天空为什么是蓝色的？", chosen=ZH_LONG, rejected=LONG),
    ],
    "gap": [
        case("exactly the gap", votes=((7.0, 6.0), (5.5, 5.5))),
        case("a person decided", votes=((6.0, 6.0), (5.9, 5.9)), human=True),
        case("nothing was measured", votes=UNJUDGED),
        case("by the flag", votes=TIED, flags=["--min-score-gap", "0.25"]),
    ],
    "floor": [
        case("exactly the floor", votes=((6.0, 6.0), (1.0, 1.0)), flags=["--min-chosen-score", "6"]),
        case("no score", votes=UNJUDGED, flags=["--min-chosen-score", "6"]),
        case("kto labels by it instead", votes=((5.0, 5.0), (1.0, 1.0)),
             flags=["--min-chosen-score", "6", "--output-format", "kto"]),
    ],
}  # fmt: skip


def flat(table: dict) -> list:
    """{filter: cases} -> cases, named after their filter."""
    return [
        pytest.param(name, *one.values, id=f"{name}: {one.id}")
        for name, cases in table.items()
        for one in cases
    ]


@pytest.mark.parametrize("name, parts", flat(DROPPED))
def test_dropped(name, parts):
    given = {key: value for key, value in parts.items() if key != "why"}
    assert reason_against(**given) == parts["why"]


@pytest.mark.parametrize("name, parts", flat(KEPT))
def test_a_good_pair_that_looks_bad_stays(name, parts):
    assert reason_against(**parts) is None


def test_every_filter_has_cases_of_both_kinds_in_both_languages():
    assert set(DROPPED) == set(KEPT) == set(rc.FILTERS)
    for name, cases in DROPPED.items():
        chinese = [
            any("\u4e00" <= c <= "\u9fff" for c in one.values[0].get("prompt", "")) for one in cases
        ]
        assert True in chinese and False in chinese and KEPT[name], name


# --- the parts


REFUSALS = [
    "I'm sorry, but I can't help with that.", "I cannot provide instructions for this.", "I’m sorry, I can’t assist.",
    "As an AI language model, I am unable to help with that request.", "Unfortunately, I cannot share that.",
    "很抱歉，我无法提供这些信息。", "对不起，我不能回答这个问题。", "作为一个人工智能语言模型，我无法访问互联网。", "我无法满足您的请求。",
    "非常抱歉，我不便讨论这个话题。",
]  # fmt: skip
ANSWERS = [
    "I'm really sorry to hear about your loss. Be gentle with yourself; grief takes time.", "Sorry, Tom. I ate the cake.",
    "You cannot help a cat that does not want help.", "No. It cannot be done in one step.", "I am sorry for being late.",
    "作为人工智能助手，我可以帮你写诗。", "很遗憾，他在比赛中输了。", "不能。鱼离开水就无法呼吸。", "对不起，我来晚了。", "抱歉，让你久等了：答案是42。",
]  # fmt: skip


@pytest.mark.parametrize(
    "text, refused", [(t, True) for t in REFUSALS] + [(t, False) for t in ANSWERS]
)
def test_a_refusal_opens_like_one_and_says_it(text, refused):
    assert rc.is_refusal(text) is refused and rc.is_refusal(f"  {text}\n{LONG * 3}") is refused


@pytest.mark.parametrize(
    "prompt, asked",
    [
        ("Write it 20 times.", True), ("Say hello ten times", True), ("Repeat after me", True), ("写20遍", True),
        ("请重复十次", True), ("Write a song about rain", True), ("写一首诗", True), ("写十行“你好”", True),
        ("What is 6 times 7?", False), ("How many times did he win?", False), ("Life in modern times", False),
        ("介绍一下中国的银行", False), ("第二次世界大战是哪年结束的？", False), ("第二十次会议说了什么？", False), ("请描述一次旅行", False), ("谷歌是什么公司？", False),
        ("人工智能为什么越来越普遍？", False), ("如何进行垃圾分类？", False),
    ],
)  # fmt: skip
def test_a_prompt_that_asks_for_repetition_is_told_from_one_that_says_times(prompt, asked):
    assert bool(rc.REPEAT_ASKED.search(prompt)) is asked


@pytest.mark.parametrize(
    "text, share",
    [
        ("a b c d e f g h i j", 0.0),
        ("a b c d e f g h i j x a b c d e f g h i j", 20 / 21),
        ("a b c d e f g h i x a b c d e f g h i", 0.0),  # runs of 9 are too short
        ("", 0.0),
    ],
)
def test_the_repeated_share_by_hand(text, share):
    assert rc.repeated_share(text) == pytest.approx(share)


def test_jaccard_similarity_by_hand():
    """5-grams of abcdefgh: abcde bcdef cdefg defgh; of abcdefgx: three of these and defgx: 3 of 5 are shared."""
    assert rc.similarity("abcdefgh", "abcd efgx", 0.1) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    "text, share",
    [
        ("a b c d e f g h i j " * 3, 1.0),
        ("a b c d e f g h i j " * 2, 0.0),  # said twice, it is no loop
        (
            "a b c d e f g h i j k l m n o x a b c d e f g h i j k l m n o y a b c d e f g h i j k l m n o",
            0.0,
        ),
    ],
)
def test_the_share_of_consecutive_repeats_by_hand(text, share):
    assert rc.repeated_share(text, rc.LOOP_SHARE, in_a_row=True) == pytest.approx(share)


def test_a_text_that_repeats_itself_with_other_text_between_is_kept_and_flagged_for_review():
    plan = "".join(f"Week {n}: run {3 * n} km. {LONG}" for n in range(1, 5))
    assert reason_against("Make a plan.", plan) is None
    assert rc.FLAGS["repeats itself"](plan, "") and not rc.FLAGS["repeats itself"](LONG, "")


def test_truncated_names_the_model():
    cut = rc.Answer("It is for", "qwen-max", finish="length")
    assert rc.truncated(ask(), cut) == "truncated: qwen-max reached --max-tokens"


def test_answers_that_differ_in_case_alone_reach_the_pair_where_the_input_decided():
    answers = [rc.Answer("a GiAnT", votes=(1.0,)), rc.Answer("a giant", votes=(0.0,))]
    record = ask(answers=answers, signal="choice")
    [made] = wait(rc.rank_responses(record, run_of("--method", "rank_responses")))
    assert made.chosen.text == "a GiAnT"


def test_word_runs_and_character_runs_by_hand():
    assert (
        rc.word_runs(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
        and rc.word_runs(["a"], 2) == []
    )
    assert rc.character_runs("abcdef", 3, 2) == ["abc", "cde"] and rc.character_runs("ab", 3) == []


def test_the_cheap_bounds_of_near_duplicates_change_no_verdict():
    draw, grams = random.Random(0), lambda text: {text[i : i + 5] for i in range(len(text) - 4)}
    for _ in range(300):
        one = "".join(
            draw.choices("abcdefgh" if draw.random() < 0.5 else ZH_LONG, k=draw.randrange(5, 400))
        )
        cut = draw.randrange(len(one))
        two = "".join(
            draw.choice("xyz") if draw.random() < draw.choice((0.002, 0.01, 0.05)) else c
            for c in one
        )
        two = two[: len(two) if draw.random() < 0.7 else max(5, cut)]
        exact = len(grams(one) & grams(two)) / len(grams(one) | grams(two))
        found = rc.similarity(one, two, 0.8)
        assert (found >= 0.8) == (exact >= 0.8) and found in (0.0, pytest.approx(exact))


def test_marks_are_foreign_though_the_record_has_turns():
    """The labels of a flattened conversation are ours: they excuse no `Assistant:` in an answer."""
    turns = [
        {"role": r, "content": t}
        for r, t in (("user", "Hi"), ("assistant", "Hello"), ("user", "6 by 7?"))
    ]
    assert rc.control_tokens(rc.Record(turns), rc.Answer("Assistant: 42")) == "control tokens"


@pytest.mark.parametrize(
    "name", [n for n, rule in rc.FILTERS.items() if not getattr(rule, "fixed", False)]
)
def test_a_filter_can_be_skipped(name):
    given = dict(DROPPED[name][0].values[0])
    why, flags = given.pop("why"), [*given.pop("flags", ()), "--skip-filter", name]
    assert why and reason_against(**given, flags=flags) is None


# --- the examples in the docstrings, as the comment EDIT HERE defines them

TEXT = r"('[^']*'|\"(?:[^\"\\]|\\.)*\")(?: \* (\d+))?"
EXAMPLE = re.compile(rf"(Keep|Drop): {TEXT}(?: over {TEXT})? for {TEXT}(?: \((.*)\))?")


def examples_of(name: str) -> list:
    """The examples in a filter's docstring, as parameters of a test."""
    lines = re.sub(r"\n {8,}", " ", rc.FILTERS[name].__doc__).splitlines()
    written = [line.strip() for line in lines if line.strip().startswith(("Keep:", "Drop:"))]
    return [pytest.param(name, line, id=f"{name}: {line}") for line in written]


def reason_against_example(line: str) -> tuple[bool, str | None]:
    """Whether an example is to be dropped, and the reason that the filters have against it."""
    parts = EXAMPLE.fullmatch(line)
    assert parts, f"not an example: {line}"
    kind, chosen, times, rejected, more_times, prompt, _, settings = parts.groups()
    given = {
        "chosen": ast.literal_eval(chosen) * int(times or 1),
        "prompt": ast.literal_eval(prompt),
        "flags": [],
    }
    if rejected:
        given["rejected"] = ast.literal_eval(rejected) * int(more_times or 1)
    for setting in (settings or "").split(", "):
        key, _, value = setting.partition(" ")
        if key == "scores":
            better, worse = map(float, value.split("/"))
            given["votes"] = (better, better), (worse, worse)
        elif key == "unjudged":
            given["votes"] = UNJUDGED
        elif key.startswith("--"):
            given["flags"] += [key, value]
        elif key:
            given[key] = value
    return kind == "Drop", reason_against(**given)


MORE_EXAMPLES = [
    ("truncated", 'Drop: "答案是四" for "6乘7等于多少？" (finish content_filter)'),
    ("empty", 'Keep: "7" for "Name a prime number."'),
    ("loop", 'Keep: "Sign here: ______________________________________________" for "Make a form."'),
    ("identical", 'Drop: "北京。" over "北京" for "中国的首都是哪里？" (signal choice)'),
    ("refusal", 'Drop: "很抱歉，我无法提供帮助。" over "作为人工智能，我不能回答。" for "怎么撬锁？"'),
    ("wrong_language", 'Keep: "The hall was opulent, with trimmed walls." over "无" for "用“opulent”造一句话。"'),
    ("truncated", 'Keep: "正面" for "判断情感：太好看了！"'),
    ("control_tokens", 'Keep: "模型用</think>标签结束思考，再给出答案。" for "模型怎样结束思考？"'),
    ("loop", 'Keep: "我再也不迟到了。" * 20 for "把“我再也不迟到了”写20遍。"'),
    ("echo", 'Keep: "天空为什么是蓝色的？因为空气散射蓝光。" for "天空为什么是蓝色的？"'),
    ("echo", 'Keep: "Repeat after me: I has a dog." for "Repeat after me: I has a dog."'),
    ("near_duplicate", 'Drop: "They met in the old town hall." over "They met in the old town halls."'
     ' for "Where?" (signal choice)'),
    ("near_duplicate", 'Keep: "这些鸡蛋的蛋黄里含有比较多的胆固醇，所以不能每天吃很多。" over '
     '"这些鸡蛋的蛋黄里含有比较多的胆固醇，所以能每天吃很多。" for "能多吃吗？" (signal choice)'),
    ("refusal", 'Keep: "Lift each pin." over "I\'m sorry, but I can\'t help with that." for "Help!" (unjudged)'),
    ("wrong_language", 'Keep: "Der Himmel ist heute wieder sehr schön blau." over "不" for "用德文写一句话。"'),
    ("wrong_language", 'Keep: "老师您好，祝您教师节快乐！" over "Hi" for "How do I greet a teacher in Mandarin?"'),
    ("gap", 'Keep: "It is 42." over "Perhaps 41." for "What is 6 times 7?" (scores 6/5)'),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, line", [p for name in rc.FILTERS for p in examples_of(name)] + MORE_EXAMPLES
)
def test_an_example_in_a_docstring_is_true(name, line):
    dropped, reason = reason_against_example(line)
    assert bool(reason) is dropped, reason
    if dropped:  # by this filter, not by another
        run = (
            run_of("--skip-filter", name) if not getattr(rc.FILTERS[name], "fixed", False) else None
        )
        assert run is None or reason_against_example_without(line, name) is None


def reason_against_example_without(line: str, name: str) -> str | None:
    """The reason against an example when one filter is skipped."""
    settings = f", --skip-filter {name})" if line.endswith(")") else f" (--skip-filter {name})"
    return reason_against_example(line.removesuffix(")") + settings)[1]


@pytest.mark.parametrize("name", rc.FILTERS)
def test_every_filter_has_examples_of_both_kinds(name):
    kinds = {param.values[1][:4] for param in examples_of(name)}
    assert kinds == {"Keep", "Drop"}


# --- good answers that look bad

GOOD = [
    json.loads(line)
    for line in (Path(__file__).parent / "good_answers.jsonl").open(encoding="utf-8")
]
KINDS = sorted({answer["kind"] for answer in GOOD})


@pytest.mark.parametrize("kind", KINDS)
def test_good_answers_that_look_bad_stay(kind):
    """Under 5 % false positives on each kind of text that is repetitive, foreign or hedged by nature."""
    good = [answer for answer in GOOD if answer["kind"] == kind]
    dropped = {}
    for answer in good:
        reason = reason_against(answer["prompt"], answer["text"], rejected="?", votes=UNJUDGED)
        if reason:
            dropped[answer["text"][:60]] = reason
    assert len(good) >= 30 and len(dropped) < 0.05 * len(good), dropped


def test_what_is_fixed_cannot_be_skipped():
    for name in ("empty", "identical"):
        with pytest.raises(rc.UserError, match="--skip-filter"):
            run_of("--skip-filter", name)


def test_filters_are_quick_on_long_answers():
    """Cheap bounds come first: twenty answers of 20,000 characters take well under a second."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(2000)]
    started = time.perf_counter()
    for _ in range(20):
        answer = rc.Answer(" ".join(draw.choices(words, k=3500)))
        assert not any(rule(ask(), answer) for rule in rc.FILTERS.values() if rule.on == "answer")
    assert time.perf_counter() - started < 1
