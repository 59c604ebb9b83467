"""Answers found in text, compared as text and as numbers, voted on; and those judged without a worker."""

import math
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from mass import rewards
from mass.errors import MassError
from mass.problems import Problem, Task
from mass.rewards import Verifier, canonical, ends_with_number, find_answer, number, same_number, vote


def task(answer, verifier, source="toy", entry=None):
    return Task(Problem("t", "text"), answer, f"Answer: {answer}", source, verifier, entry)


# Finding an answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"so $\boxed 2$.", "2"),
        (r"\boxed{} Answer: 5", "5"),
        (r"\boxed{6} Answer: 7", "6"),
        ("Answer: 7", "7"),
        ("Answer: 7\nno wait\nanswer : 8", "8"),
        ("Answer: 7\nAnswer:", "7"),
        ("**Answer:** 18", "18"),
        ("**Answer: 18**", "18"),
        ("Answer: `x = 1`", "x = 1"),
        ("The answer is 3.5. I am sure.", "3.5"),
        ("Final Answer: The final answer is $5$. I hope it is correct.", "$5$"),
        ("Answer:\n\n1 2\n3 4\n\nThat was all.", "1 2\n3 4"),
        ("18 eggs\n#### 1,000", "1,000"),
        ("Answer: 3\n#### What I did", "3"),
        ("##### not this", None),
        ("Answer the question with answers 3 and 4", None),
        ("It is 42.", None),
        ("", None),
    ],
)
def test_find_answer(text, answer):
    assert find_answer(text) == answer


def test_a_number_alone_is_no_stated_answer():
    assert find_answer("from 3 we get 1,250.5.") is None


@pytest.mark.parametrize(
    "text,gold,right",
    [
        ("from 3 we get 1,250.5.", "1250.5", True),
        ("so 7-3 is -4", "-4", True),
        ("so 7-3 is -4", "4", False),
        ("Answer: Answer: 9", "9", True),
        ("Answer: 9, not 10", "9", False),
        ("29 + 38 = 67\n", "67", True),
        ("none", "0", False),
        ("", "0", False),
        ("a cat", "cat", None),
        (r"so \frac{3}{4}", r"\frac{3}{4}", True),
        (r"it is 10{,}000.", "10000", True),
        (r"it is 10\!000.", "10000", True),
        ("about 2e-5", "2e-5", True),
        ("that is .5", "0.5", True),
        ("1/2 of 3", "1/2", False),
        ("at 3.5.", "3.5", True),
    ],
)
def test_ends_with_number(text, gold, right):
    assert ends_with_number(text, gold) is right


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "\\boxed ",
        "{",
        "}",
        "answer is . ",
        "Answer:\n**\n\n",
        "answer",
        "####\n",
        " ",
        "\n",
        "9",
        "**",
        "\\",
        "$",
        "\u0301",
        "=",
    ],
)
def test_long_text_of_anything_is_read_in_linear_time(unit):
    text = unit * (200_000 // len(unit))  # quadratic time would be minutes
    began = time.process_time()
    find_answer(text)
    ends_with_number(text, "7")
    with Verifier() as verifier:
        verdict = verifier.verify(f"Answer: 1{text}", task("7", "numeric"))
        assert verifier.verify(f"\\boxed{{1{text}}}", task("7", "exact")).status != "right"
    assert verdict.status in ("wrong", "no_answer")
    assert time.process_time() - began < 5.0


def test_a_megabyte_is_judged():
    text = "word 12 {x} \\frac{1}{2} \n" * 40_000
    assert len(text) >= 1_000_000
    with Verifier() as verifier:
        assert verifier.verify(text + "Answer: 7", task("7", "numeric")).status == "right"
        assert verifier.verify(f"\\boxed{{{text}}}", task("7", "exact")).status == "wrong"
        assert verifier.verify(text, task("7", "numeric")).status == "no_answer"
    began = time.process_time()
    assert find_answer("answer is . " * 83_000) is None  # every marker's line is the rest of the text
    assert time.process_time() - began < 2.0


def test_strange_unicode_is_text_like_any_other():
    for text in ("\ud800", "\u202e7", "\x00", "\U0001f600", "٧", "\ufeff7"):
        assert find_answer(f"Answer: {text}") is not None
        canonical(text), number(text)
    assert canonical("e\u0301") == canonical("\u00e9")
    assert same_number("\u22125", "-5")
    assert same_number("\uff17", "7")


# Canonical form, numbers, vote


@pytest.mark.parametrize(
    "answer, form",
    [
        (" 7.0 ", "7"),
        ("1,050.50.", "1050.5"),
        ("-0.0", "0"),
        ("+.50", "0.5"),
        ("0101", "0101"),
        ("1,2", "1,2"),
        ("$5", "$5"),
        ("5 cm", "5 cm"),
        ("No.", "No"),
        (".", ""),
        ("-", "-"),
    ],
)
def test_canonical(answer, form):
    assert canonical(answer) == form
    assert canonical(form) == form


@pytest.mark.parametrize(
    "text, value",
    [
        ("-1,250.50", Fraction(-2501, 2)),
        ("3/4", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        ("2e-5", Fraction(1, 50000)),
        ("$18", 18),
        ("$18$", 18),
        (r"\(18\)", 18),
        (r"\$1{,}800", 1800),
        (r"10\%", 10),
        ("1/0", None),
        ("inf", None),
        ("nan", None),
        ("1e999999999", None),
        ("9" * 10_000, None),
        ("5 cats", None),
        ("1_000", None),
        ("", None),
        ("$", None),
    ],
)
def test_number(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "answer, gold, same",
    [
        ("18.0", "18", True),
        ("0.333333", "1/3", True),
        ("0.33", "1/3", False),
        ("x = 5", "5", True),
        ("$3 + 4 = 7$", "7", True),
        ("5 dollars per day.", "5", True),
        ("5 million", "5", False),
        ("5 or 6", "5", False),
        ("1000000.5", "1000000", False),
        ("12345678901234567890", "12345678901234567891", False),
        ("", "0", False),
        ("x >= 5", "5", False),
        ("x != 5", "5", False),
        ("2 >= 1, so x = 5", "5", True),
    ],
)
def test_same_number(answer, gold, same):
    assert same_number(answer, gold) is same


def test_vote_counts_canonical_forms_and_ignores_none():
    assert vote(["7", None, "7.0", "8", None, None]) == "7"
    assert vote(["b", "a", "A.", "B"]) == "b"
    assert vote(["True", "true", "False"]) == "True"
    assert vote([None, ""]) is None
    assert vote([]) is None


# Judging in the caller


def test_exact_and_numeric_need_no_worker():
    with Verifier() as verifier:
        verdicts = verifier.verify_all(
            [
                ("Answer: yes.", task("Yes", "exact")),
                ("Answer: no", task("Yes", "exact")),
                ("I do not know", task("Yes", "exact")),
                (r"\boxed{\frac{6}{8}}", task("0.75", "numeric")),
                ("Answer: 7", task("8", "numeric")),
                ("Answer: 1/0", task("8", "numeric")),
                (r"\boxed{x^2}", task("x^2", "math")),
            ]
        )
        assert verifier._process is None
    assert [verdict.status for verdict in verdicts] == [
        *("right", "wrong", "no_answer", "right", "wrong", "wrong", "right"),
    ]
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def test_a_reference_that_cannot_be_compared_is_a_failure_not_a_zero():
    with Verifier() as verifier:
        verdict = verifier.verify("Answer: 7", task("seven", "numeric"))
    assert verdict.status == "failed" and math.isnan(verdict.score) and "'seven'" in verdict.reason


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MassError, match=r"math_verify.*pip install 'mass\[math\]'"):
        rewards.require(["exact", "math"])
    rewards.require(["exact", "numeric"])
    with Verifier() as verifier, pytest.raises(MassError, match=r"mass\[gym\]"):
        verifier.verify("Answer: 7", task("7", "gym", entry={}))


def test_no_torch_is_imported():
    code = "import sys, mass.rewards, mass.problems; print(sorted({'torch', 'datasets', 'sympy'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
