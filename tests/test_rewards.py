import math
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from mass import rewards
from mass.errors import MassError
from mass.problems import Problem, Task
from mass.rewards import Verdict, Verifier, canonical, find_answer, number, same_number, vote


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


def test_the_last_number_counts_only_when_asked_for():
    assert find_answer("from 3 we get 1,250.5.") is None
    assert find_answer("from 3 we get 1,250.5.", loose=True) == "1,250.5"
    assert find_answer("so 7-3 is -4", loose=True) == "-4"
    assert find_answer("Answer: 9, not 10", loose=True) == "9, not 10"
    assert find_answer("none", loose=True) is None


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
    find_answer(text, loose=True)
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


# Judging in the worker. A stand-in for reasoning-gym misbehaves in every way that a real scorer might.

FAKE_GYM = """
import os, signal, sys, time
class Dataset:
    def __init__(self, name, settings): self.name, self.settings = name, settings
    def score_answer(self, answer, entry): return getattr(self, self.name)(answer, entry)
    def fine(self, answer, entry): return float(answer == entry["answer"])
    def strict(self, answer, entry): return float(answer == entry["answer"] and self.settings == {"hard": (1, 2)})
    def half(self, answer, entry): return 0.5
    def nan(self, answer, entry): return float("nan")
    def crash(self, answer, entry): os._exit(7)
    def signal(self, answer, entry): os.kill(os.getpid(), signal.SIGKILL)
    def hang(self, answer, entry):
        while True:
            try: time.sleep(1)
            except Exception: pass
    def deaf(self, answer, entry):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        while True: time.sleep(1)
    def error(self, answer, entry): raise RuntimeError("broken on " + answer)
    def leave(self, answer, entry): raise SystemExit(3)
    def eat(self, answer, entry):
        import mmap
        return float(len(mmap.mmap(-1, 6 * 2**30)))  # address space only: no memory is touched where this works
    def talk(self, answer, entry):
        print("noise " * 100000); sys.stdout.flush(); return 1.0
    def eval(self, answer, entry): return float(eval(answer))
    def torch(self, answer, entry): return float("torch" in sys.modules)
def create_dataset(name, **settings): return Dataset(name, settings)
"""


@pytest.fixture
def fake_gym(tmp_path, monkeypatch):
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "__init__.py").write_text(FAKE_GYM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def judged(verifier, family, answer="7", **entry):
    return verifier.verify(f"Answer: {answer}", task("7", "gym", family, {"answer": "7", **entry}))


def test_the_worker_scores(fake_gym):
    with Verifier() as verifier:
        assert judged(verifier, "fine") == Verdict(1.0, "right")
        assert judged(verifier, "fine", "7.0.") == Verdict(1.0, "right")
        assert judged(verifier, "fine", "8") == Verdict(0.0, "wrong")
        assert judged(verifier, "half") == Verdict(0.5, "partial")
        assert judged(verifier, "strict").status == "wrong"
        assert judged(verifier, "strict", settings={"hard": (1, 2)}).status == "right"
        assert judged(verifier, "talk").status == "right"
        assert judged(verifier, "torch").status == "wrong"
        assert judged(verifier, "fine", "\ud800").status == "wrong"
        assert judged(verifier, "crash", "x" * 1_000_000).status == "wrong"  # never read
        process = verifier._process
        assert process.poll() is None
    assert process.poll() is not None and verifier._process is None


@pytest.mark.parametrize(
    "family, status, reason",
    [
        ("crash", "failed", "exit code 7"),
        ("signal", "failed", "Error|exit code -9"),
        ("leave", "failed", "exit code 3"),
        ("error", "failed", "RuntimeError: broken on 7"),
        ("nan", "failed", "nan"),
        ("eat", "failed", "allocate memory"),
        ("absent", "failed", "AttributeError"),
        ("hang", "timeout", "0.3 s"),
        ("deaf", "timeout", "exit code"),
    ],
)
def test_a_broken_verifier_is_a_status_and_the_next_answer_is_judged(fake_gym, family, status, reason):
    with Verifier(time_limit=0.3) as verifier:
        verdict = judged(verifier, family)
        assert verdict.status == status and math.isnan(verdict.score)
        assert re.search(reason, verdict.reason), verdict.reason
        assert judged(verifier, "fine") == Verdict(1.0, "right")


def test_a_worker_killed_between_two_answers_costs_none(fake_gym):
    with Verifier() as verifier:
        judged(verifier, "fine")
        verifier._process.kill()
        verifier._process.wait()
        assert judged(verifier, "fine") == Verdict(1.0, "right")


def test_a_stopped_worker_is_a_timeout_and_the_next_answer_is_judged(fake_gym):
    with Verifier(time_limit=0.3) as verifier:
        judged(verifier, "fine")
        os.kill(verifier._process.pid, signal.SIGSTOP)
        verdict = judged(verifier, "fine")
        assert verdict.status == "timeout" and math.isnan(verdict.score)
        assert verdict.reason == "the verifier's worker does not answer"
        assert judged(verifier, "fine") == Verdict(1.0, "right")


def test_a_model_text_that_a_scorer_evaluates_reaches_no_file_and_no_shell(fake_gym):
    target = fake_gym / "written"
    with Verifier() as verifier:
        assert judged(verifier, "eval", "1 - 0").status == "right"
        for code in (
            f"__import__('os').system('touch {target}')",
            f"open('{target}', 'w')",
            f"__import__('pathlib').Path('{target}').touch()",
            f"__import__('subprocess').run(['touch', '{target}'])",
            "__import__('socket').create_connection(('127.0.0.1', 9))",
        ):
            verdict = judged(verifier, "eval", code)
            assert verdict.status == "failed" and "PermissionError" in verdict.reason, verdict
    assert not target.exists()


def test_a_package_that_breaks_on_import_names_the_extra(fake_gym):
    (fake_gym / "reasoning_gym" / "__init__.py").write_text("import a_package_that_is_not_there")
    with Verifier() as verifier, pytest.raises(MassError, match=r"a_package_that_is_not_there.*mass\[gym\]"):
        judged(verifier, "fine")


def test_the_worker_ends_with_its_caller(fake_gym):
    code = (
        "from mass.rewards import Verifier; from mass.problems import Problem, Task\n"
        "verifier = Verifier()\n"
        "verifier.verify('Answer: 7', Task(Problem('t', 't'), '7', '', 'fine', 'gym', {'answer': '7'}))\n"
        "print(verifier._process.pid, flush=True); import os; os._exit(1)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    pid = int(printed)
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# The real libraries


def test_math_verify():
    pytest.importorskip("math_verify")
    table = [
        (r"\frac{1}{2}", "0.5", "right"),
        (r"\frac{1}{2}", r"$\frac{2}{4}$", "right"),
        (r"(3, \frac{\pi}{2})", r"\left(3,\frac{\pi}{2}\right)", "right"),
        ("x^2+2x+1", "(x+1)^2", "right"),
        (r"\text{Evelyn}", "Evelyn", "right"),
        (r"\text{Evelyn}", "Bob", "wrong"),
        ("[1,2)", "(1,2)", "wrong"),
        ("5", "$$$", "wrong"),
        ("5", "\ud800", "wrong"),
        ("5", r"\frac{", "wrong"),
    ]
    with Verifier() as verifier:
        for gold, answer, status in table:
            assert verifier.verify(f"Answer: {answer}", task(gold, "math")).status == status, (gold, answer)
    with Verifier(time_limit=0.5) as verifier:
        verdict = verifier.verify(r"\boxed{10^{10^{10^{10}}}}", task("5", "math"))
        assert verdict.status == "timeout" and math.isnan(verdict.score)
        assert verifier.verify(r"\boxed{\frac{10}{2}}", task("5", "math")).status == "right"


def test_reasoning_gym_scores_its_own_rows():
    gym = pytest.importorskip("reasoning_gym")
    with Verifier() as verifier:
        for family in (
            "chain_sum",
            "countdown",
            "prime_factorization",
            "spiral_matrix",
            "decimal_arithmetic",
        ):
            row = gym.create_dataset(family, size=1, seed=3)[0]
            item = task(row["answer"], "gym", family, row)
            assert verifier.verify(f"Answer: {row['answer']}", item).status == "right", family
            assert verifier.verify("no idea", item) == Verdict(0.0, "no_answer")
            assert verifier.verify("Answer: 123454321", item).status in ("wrong", "partial")
