"""Which problems are held out and shown as shots, and the order of training."""

import json
from dataclasses import replace

import pytest
from test_problems import texts, toy

from mass import problems
from mass.errors import MassError
from mass.problems import Problem, Task
from mass.splits import Cursor, draw_pool, in_turn, split_tasks


def test_heldout_split_off_train_is_disjoint_seeded_and_free_of_the_files_order():
    tasks = toy(100)
    split = split_tasks(tasks, None, 10, seed=0)
    assert (len(split.train), len(split.heldout), split.removed) == (90, 10, 0)
    assert not set(texts(split.train)) & set(texts(split.heldout))
    again = split_tasks(tasks[::-1], None, 10, seed=0)
    assert texts(again.heldout) == texts(split.heldout)
    assert texts(split_tasks(tasks, None, 10, seed=1).heldout) != texts(split.heldout)
    assert len(split_tasks(tasks, None, 80, seed=0).heldout) == 25
    assert len(split_tasks(tasks[:2], None, 80, seed=0).heldout) == 1
    assert split_tasks(tasks[:1], None, 0, seed=0).heldout == []
    with pytest.raises(MassError, match="problems.heldout"):
        split_tasks(tasks[:1], None, 1, seed=0)


def test_repeated_training_problems_count_once_and_never_cross_the_split():
    tasks = toy(20) + toy(20, text="WHAT is  {} +\n1?")
    tasks = [
        Task(Problem(f"id{i}", t.problem.text), *list(vars(t).values())[1:]) for i, t in enumerate(tasks)
    ]
    split = split_tasks(tasks, None, 5, seed=0)
    assert (len(split.train), len(split.heldout), split.removed) == (15, 5, 20)
    keys = [{problems.content_key(text) for text in texts(part)} for part in split[:2]]
    assert not keys[0] & keys[1]


def test_what_a_heldout_source_shares_leaves_train():
    train, heldout = toy(20), toy(10, start=15, text="what is {} + 1? ")
    split = split_tasks(train, heldout, 3, seed=0)
    assert texts(split.heldout) == texts(heldout)
    assert texts(split.train) == texts(train[:15]) and split.removed == 5
    assert not {t.problem.id for t in split.train} & {t.problem.id for t in split.heldout}
    with pytest.raises(MassError, match="Every training problem is also held out"):
        split_tasks(train[15:], heldout, 3, seed=0)


def test_one_grid_in_two_tasks_is_two_problems_and_does_not_cross_the_split():
    """What they show makes them two; what they ask is on one side of the split all the same."""
    rows = [(f"{i % 6} 4", ((f"{i} 1", str(i)),)) for i in range(12)]
    tasks = [
        Task(Problem(f"p{i}", text, shown), "1", "Answer: 1", "f", "exact")
        for i, (text, shown) in enumerate(rows)
    ]
    assert len(split_tasks([*tasks, *tasks[:3]], None, 0, seed=0).train) == 12
    split = split_tasks(tasks, None, 3, seed=0)
    assert len(split.heldout) == 3 and not set(texts(split.heldout)) & set(texts(split.train))


def test_the_first_few_are_of_all_sources():
    tasks = [replace(task, source="abc"[i // 4]) for i, task in enumerate(toy(10))]
    few = in_turn(tasks)
    assert [task.source for task in few] == list("abcabcabab") and sorted(texts(few)) == sorted(texts(tasks))
    assert [task for task in few if task.source == "a"] == tasks[:4]
    assert in_turn(tasks[:4]) == tasks[:4] and in_turn([]) == []


def test_draw_pool():
    tasks = toy(20)
    pool, rest = draw_pool(tasks, 5, seed=0)
    assert len(pool) == 5 and sorted(texts(pool) + texts(rest)) == sorted(texts(tasks))
    assert rest == [task for task in tasks if task in rest]
    assert texts(draw_pool(tasks, 5, seed=1)[0]) != texts(pool)
    assert [len(part) for part in draw_pool(tasks[:3], 16, seed=0)] == [1, 2]
    assert [len(part) for part in draw_pool(tasks, 0, seed=0)] == [0, 20]


# The cursor


def test_ranks_together_see_what_one_rank_sees():
    tasks = toy(10)
    alone = Cursor(tasks, seed=4)
    ranks = [Cursor(tasks, seed=4) for _ in range(2)]
    for _ in range(8):
        whole = alone.next(6)
        parts = [ranks[rank].next(3, rank=rank, world=2) for rank in range(2)]
        assert parts[0] + parts[1] == whole
    assert alone.position == ranks[0].position == ranks[1].position == 48


def test_every_epoch_is_another_permutation():
    tasks = toy(10)
    cursor = Cursor(tasks, seed=4)
    epochs = [texts(cursor.next(5) + cursor.next(5)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(texts(tasks)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert texts(Cursor(tasks, seed=5).next(10)) != epochs[0]
    assert len(Cursor(tasks[:2], seed=0).next(5)) == 5


def test_the_cursor_resumes():
    tasks = toy(10)
    whole, first = Cursor(tasks, seed=4), Cursor(tasks, seed=4)
    expected = [whole.next(4) for _ in range(6)]
    got = [first.next(4) for _ in range(3)]
    second = Cursor.from_state(json.loads(json.dumps(first.state())), tasks[::-1])
    assert got + [second.next(4) for _ in range(3)] == expected
    with pytest.raises(MassError, match="10 then, 9 now"):
        Cursor.from_state(first.state(), tasks[:9])
    with pytest.raises(MassError, match="changed since the checkpoint"):
        Cursor.from_state(first.state(), toy(10, text="{}?"))
