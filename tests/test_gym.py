"""Problems of reasoning-gym: what is made, how it is split, and mistakes in its settings."""

import logging
from collections import Counter

import pytest
from test_problems import texts

from mass import rewards
from mass.errors import MassError
from mass.problems import load_tasks
from mass.splits import split_tasks

ONE_DIGIT = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


@pytest.fixture
def gym():
    return pytest.importorskip("reasoning_gym")


def test_gym_tasks(gym):
    tasks = load_tasks("gym:chain_sum", size=20, gym=ONE_DIGIT, seed=3)
    assert texts(tasks) == texts(load_tasks("gym:chain_sum", size=20, gym=ONE_DIGIT, seed=3))
    assert len(set(texts(tasks))) == 20
    task = tasks[0]
    name, stream, index = task.problem.id.rsplit("-", 2)
    row = gym.create_dataset("chain_sum", seed=int(stream), size=1, **ONE_DIGIT["chain_sum"])[int(index)]
    assert task.problem.text == row["question"] and task.answer == row["answer"] and name == "chain_sum"
    assert task.entry == {**row, "settings": ONE_DIGIT["chain_sum"]}
    assert (task.source, task.verifier, task.solution) == ("chain_sum", "gym", f"Answer: {row['answer']}")


def test_gym_mixture(gym):
    source = ["gym:chain_sum", "gym:gcd"]
    assert Counter(task.source for task in load_tasks(source, size=9)) == {"chain_sum": 5, "gcd": 4}
    assert Counter(task.source for task in load_tasks(source, size=9, weights=[1, 2])) == {
        "chain_sum": 3,
        "gcd": 6,
    }
    assert {task.verifier for task in load_tasks(source, size=4, verifier="numeric")} == {"numeric"}


def test_neighbouring_seeds_and_other_splits_make_other_problems(gym):
    # Row i of a family comes from Random(seed + i): seeds 0 and 1 would share all problems but one.
    train = set(texts(load_tasks("gym:chain_sum", size=100, seed=0)))
    assert len(train & set(texts(load_tasks("gym:chain_sum", size=100, seed=1)))) < 5
    assert len(train & set(texts(load_tasks("gym:chain_sum", size=100, seed=0, split="test")))) < 5


def test_a_small_family_gives_what_it_has_and_shares_it(gym, caplog):
    with caplog.at_level(logging.WARNING):
        train = load_tasks("gym:chain_sum", size=1000, gym=ONE_DIGIT)
    assert 150 < len(train) < 250 and f"{len(train)} different problems of the 1000" in caplog.text
    heldout = load_tasks("gym:chain_sum", size=100, gym=ONE_DIGIT, split="test")
    split = split_tasks(train, heldout, 100, seed=0)
    assert not set(texts(split.train)) & set(texts(split.heldout))
    assert len(train) // 4 - 5 <= len(split.heldout) <= len(train) // 4 + 1
    assert len(split.train) + len(split.heldout) >= len(train) and split.removed == len(train) - len(
        split.train
    )


def test_a_large_family_keeps_its_whole_heldout_set(gym):
    train = load_tasks("gym:basic_arithmetic", size=30)
    split = split_tasks(train, load_tasks("gym:basic_arithmetic", size=30, split="test"), 30, seed=0)
    assert (len(split.train), len(split.heldout), split.removed) == (30, 30, 0)


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("chian_sum", {}, "no family 'chian_sum'; the nearest is 'chain_sum'"),
        ("chain_sum", {"chain_smu": {}}, "no family 'chain_smu'; the nearest is 'chain_sum'"),
        ("chain_sum", {"chain_sum": {"min_term": 2}}, "no setting 'min_term'; the nearest is 'min_terms'"),
        ("chain_sum", {"chain_sum": {"seed": 2}}, "problems.gym.chain_sum.seed is set by run.seed"),
        (
            "chain_sum",
            {"chain_sum": {"min_terms": 9, "max_terms": 2}},
            "max_terms must be >= min_terms.*problems.gym",
        ),
        ("chain_sum", {"chain_sum": {"min_terms": "x"}}, "gym:chain_sum cannot make problem 0 with"),
        ("graph_color", {}, "no reference answers"),
        ("composite", {}, "no family 'composite'"),
    ],
)
def test_gym_mistakes(gym, name, settings, words):
    with pytest.raises(MassError, match=words):
        load_tasks(f"gym:{name}", gym=settings, size=3)


def test_gym_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MassError, match=r"pip install 'mass\[gym\]'"):
        load_tasks("gym:chain_sum")
