"""Answers judged in the worker, by a scorer that misbehaves in every way that a real one might, and by the real libraries."""

import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from test_rewards import task

from mass.errors import MassError
from mass.rewards import Verdict, Verifier

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
    target, kept = fake_gym / "written", fake_gym / "kept"
    kept.write_text("kept")
    with Verifier() as verifier:
        assert judged(verifier, "eval", "1 - 0").status == "right"
        for code in (
            f"__import__('os').system('touch {target}')",
            f"open('{target}', 'w')",
            # to read, and emptied by it
            f"__import__('os').open('{kept}', {os.O_RDONLY | os.O_TRUNC})",
            f"__import__('pathlib').Path('{target}').touch()",
            f"__import__('subprocess').run(['touch', '{target}'])",
            "__import__('socket').create_connection(('127.0.0.1', 9))",
            f"__import__('sqlite3').connect('{target}').execute('create table a(b)')",
            f"__import__('_posixsubprocess').fork_exec([b'/bin/touch', b'{target}'], [b'/bin/touch'])",
            f"__import__('subprocess')._fork_exec([b'/bin/touch', b'{target}'], [b'/bin/touch'])",
            "__import__('resource').setrlimit(1, (9, 9))",
        ):
            verdict = judged(verifier, "eval", code)
            assert verdict.status == "failed" and "PermissionError" in verdict.reason, verdict
        # what no audit event tells of can write nothing into a file
        assert judged(verifier, "eval", "__import__('resource').getrlimit(1) == (0, 0)").status == "right"
    assert not target.exists() and kept.read_text() == "kept"


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
