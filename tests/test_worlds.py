"""Planted worlds: what they hold out, what they teach, and the truth of an example, against independent arithmetic."""

import itertools
import json
import random
from dataclasses import replace

import pytest

from mass import worlds
from mass.errors import MassError
from mass.problems import Problem, Task, load_tasks, truth
from mass.prompts import parse_example
from mass.splits import split_tasks
from mass.worlds import METHODS, Families, Planted


def lessons(world, n=4000):
    rng = random.Random(5)
    return [world.lesson(rng) for _ in range(n)]


def digits_of(problem: str) -> tuple[int, ...]:
    return tuple(int(x) for x in problem.split() if x.isdigit())


def right_method(world: Families, family: str) -> str:
    """By trying all four: look each up three times."""
    permutations, _, _ = world._plan
    a, b, c = family.split()
    (found,) = [k for k in range(4) if permutations[c][permutations[b][permutations[a][k]]] == 0]
    return METHODS[found]


def test_planted_problems_hold_out_digits_and_families():
    world = Planted(families=3, unseen=2)
    train = list(worlds.items(world, 500, True, seed=1))
    held = list(worlds.items(world, 500, False, seed=1))
    assert {x.family for x in train} == {"planted:a", "planted:b", "planted:c"}
    assert {x.family for x in held} == {f"planted:{name}" for name in "abcde"}
    assert not {digits_of(x.problem) for x in train} & {digits_of(x.problem) for x in held}
    unseen = sum(x.family in ("planted:d", "planted:e") for x in held) / len(held)
    assert 0.4 < unseen < 0.6
    # a fifth of all digits, and not of some kind only
    kept = [d for d in itertools.product(range(10), repeat=4) if worlds._hash(d) % 5 == 0]
    assert 0.15 < len(kept) / 10**4 < 0.25
    assert {d[i] for d in kept for i in range(4)} == set(range(10))


def test_planted_references_follow_one_shift_a_family_and_truth_knows_it():
    world = Planted()
    shift: dict[str, int] = {}
    for x in worlds.items(world, 300, True, seed=0):
        family, *start = x.problem.split()
        moved = [(int(b) - int(a)) % 10 for a, b in zip(start, x.answer.split(), strict=True)]
        assert len(set(moved)) == 1 and shift.setdefault(family, moved[0]) == moved[0]
        assert x.solution == f"+{moved[0]}\nAnswer: {x.answer}"
        assert world.truth(x.problem, x.problem, x.solution) == (True, True, None)
        off = x.answer[:-1] + str((int(x.answer[-1]) + 1) % 10)
        assert not world.truth(x.problem, x.problem, f"+{moved[0]}\nAnswer: {off}").right
        assert not world.truth(x.problem, x.problem, f"+{(moved[0] + 1) % 10}\nAnswer: {x.answer}").right
    # right, but of another family than its target
    found = list(worlds.items(world, 100, True, seed=0))
    a, b = (next(x for x in found if x.family == f"planted:{name}") for name in "ab")
    assert world.truth(a.problem, b.problem, b.solution) == (True, False, None)


def test_planted_base_is_right_half_of_the_time_and_mostly_of_the_family():
    world = Planted(low=0.3, high=0.7, kin=0.7)
    made = [x for x in lessons(world) if x.target is not None]
    assert 0.45 < len(made) / 4000 < 0.55
    kin = [world.truth(x.target, x.problem, x.solution) for x in made]
    assert 0.66 < sum(x.kin for x in kin) / len(kin) < 0.74
    assert 0.44 < sum(x.right for x in kin) / len(kin) < 0.56
    by_family = {
        name: [world.truth(x.target, x.problem, x.solution).right for x in made if x.problem[0] == name]
        for name in world.names
    }
    shares = [sum(own) / len(own) for own in by_family.values()]
    assert min(shares) < 0.42 and max(shares) > 0.58


def test_families_hold_out_a_quarter_from_everything():
    world = Families(gold=20)
    train = list(worlds.items(world, 1000, True, seed=0))
    held = list(worlds.items(world, 1000, False, seed=0))
    taught = {" ".join(x.problem.split()[:3]) for x in lessons(world, 20000)}
    assert len({x.family for x in train}) == 20 and len({x.family for x in held}) == 128
    trained, kept = ({" ".join(x.problem.split()[:3]) for x in found} for found in (train, held))
    assert not kept & (trained | taught)
    assert len(taught) == 512 - 128 and trained <= taught


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_families_apply_their_right_method_in_every_row(rows):
    world = Families(rows=rows, seed=2)
    shift: dict[str, int] = {}
    for x in worlds.items(world, 100, False, seed=0):
        *family, first, second, _, count = x.problem.split()
        assert int(count) == rows and x.solution == f"Answer: {x.answer}"
        digits = (int(first), int(second))
        parts = list(zip(*[iter(x.answer.split())] * 5, strict=True))
        assert [int(left) for left, *_ in parts] == list(range(rows, 0, -1))
        for _, colon, method, y, z in parts:
            assert (colon, method) == (":", right_method(world, " ".join(family)))
            moved = {(int(new) - old) % 10 for new, old in zip((y, z), digits, strict=True)}
            assert len(moved) == 1 and shift.setdefault(method, min(moved)) == min(moved)
            digits = (int(y), int(z))
    assert len(shift) == len(set(shift.values())) == 4


def test_the_check_is_honest_but_for_the_noise():
    def shares(world):
        made = [x for x in lessons(world) if x.target is not None]
        known = [world.truth(x.target, x.problem, x.solution) for x in made]
        assert all(x.kin for x in known)
        for x, t in zip(made, known, strict=True):
            assert t.right == (x.solution.split()[3] == right_method(world, " ".join(x.problem.split()[:3])))
        right = [x.honest for x in known if x.right]
        wrong = [x.honest for x in known if not x.right]
        return len(right) / len(known), sum(right) / len(right), sum(wrong) / len(wrong)

    right, honest_right, honest_wrong = shares(Families())
    assert 0.2 < right < 0.3 and honest_right == honest_wrong == 1
    # a check that goes astray never ends at the right place from a right method, and by chance from a wrong one
    right, honest_right, honest_wrong = shares(Families(noise=0.4))
    assert 0.2 < right < 0.3 and 0.55 < honest_right < 0.65 and 0.8 < honest_wrong < 0.95


def test_context_gives_a_text_one_method():
    def methods(world):
        many = [x for x in lessons(world) if x.target is None and len(x.shots) == 2]
        return [{w for text in [x.solution, *(s for _, s in x.shots)] for w in text.split("\n")[0].split() if w in METHODS} for x in many]  # fmt: skip

    assert all(len(own) == 1 for own in methods(Families(context=1.0)))
    assert any(len(own) > 2 for own in methods(Families(context=0.0)))


def test_truth_refuses_what_is_not_a_practice_problem():
    world = Families()
    practice = next(x for x in lessons(world) if x.target is not None and "yes" in x.solution)
    problem, solution, target = practice.problem, practice.solution, practice.target
    assert world.truth(target, problem, solution) == (True, True, True)
    assert world.truth(target, problem, solution.replace("yes", "no")) == (True, True, False)
    broken = [
        (problem.replace("check", "times 1"), solution),
        (problem, solution.partition("\n")[0]),
        (problem, solution + " yes"),
        ("", ""),
        ("i i i 0 0 check", solution),
    ]
    for p, s in broken:
        assert not world.truth(target, p, s).right and world.truth(target, p, s).honest is None
    digit = solution.split()[4]
    other = solution.replace(f" {digit} ", f" {(int(digit) + 1) % 10} ", 1)
    assert world.truth(target, problem, other)[:2] == (False, True)


@pytest.mark.parametrize("world", [Planted(), Families(noise=0.3)])
def test_what_a_base_learns_to_write_can_be_parsed(world):
    for x in lessons(world, 300):
        read = parse_example(f" {x.problem}\nSolution: {x.solution}", finished=True)
        assert read.valid and (read.problem, read.solution) == (x.problem, x.solution)
        assert set((x.problem + " " + x.solution).split()) <= {*world.words, "Answer:"}


def test_world_tasks_carry_what_the_truth_needs():
    settings = {"families": {"rows": 2, "gold": 5}}
    train = load_tasks("world:families", size=30, world=settings, seed=3)
    held = load_tasks("world:families", size=30, world=settings, seed=3, split="test")
    assert train == load_tasks("world:families", size=30, world=settings, seed=3)
    assert train != load_tasks("world:families", size=30, world=settings, seed=4)
    assert len({t.problem.id for t in train}) == 30 and {t.verifier for t in train} == {"exact"}
    assert not {t.source for t in train} & {t.source for t in held}
    # a part of the training problems is of the training problems
    assert load_tasks("world:families", size=30, world=settings, seed=3, split="train[:500]") == train
    split = split_tasks(train, held, 30, seed=3)
    assert (len(split.train), len(split.heldout)) == (30, 30)
    task = replace(train[0], entry=json.loads(json.dumps(train[0].entry)))
    family = " ".join(task.problem.text.split()[:3])
    world = Families(rows=2, gold=5)
    rng = random.Random(0)
    made = [world._practice(family, range(4), rng) for _ in range(20)]
    for problem, solution in made:
        assert truth(task, problem, solution) == world.truth(task.problem.text, problem, solution)
    plain = Task(Problem("1", "4 + 3"), "7", "Answer: 7", "toy", "numeric")
    assert truth(plain, "4 + 4", "Answer: 8") is None
    assert truth(replace(plain, entry={"question": "4 + 3"}), "4 + 4", "Answer: 8") is None


def test_a_world_without_more_problems_says_so(caplog):
    found = load_tasks("world:families", size=500, world={"families": {"gold": 1}})
    assert len(found) == 100 and "world:families gave 100 different problems of the 500" in caplog.text


@pytest.mark.parametrize(
    "source, settings, says",
    [
        ("world:planed", {}, "Did you mean world:planted"),
        ("world:planted", {"planted": {"famlies": 3}}, "no setting 'famlies'. It has families, unseen"),
        ("world:planted", {"planed": {"families": 3}}, "problems.world.planed: there is no such world"),
        ("world:planted", {"planted": {"families": 2.5}}, "planted.families=2.5: wants a whole number"),
        ("world:planted", {"planted": {"kin": "all"}}, "planted.kin='all': wants a number"),
        ("world:planted", {"planted": {"families": 20, "unseen": 7}}, "1 to 26 letters"),
        ("world:planted", {"planted": {"low": 0.8}}, "low is not above high"),
        ("world:planted", {"planted": {"families": 1, "unseen": 0}}, "kin=0.7 of one family"),
        ("world:families", {"families": {"rows": 9}}, "rows=9"),
        ("world:families", {"families": {"gold": 385}}, "gold=385: 1 to 384"),
        ("world:families", {"families": {"noise": 1.5}}, "noise=1.5"),
    ],
)
def test_wrong_settings_are_named(source, settings, says):
    with pytest.raises(MassError, match=says):
        load_tasks(source, world=settings)


def test_the_base_does_not_depend_on_what_only_tasks_use():
    assert worlds.base_key(Families(rows=8, gold=3)) == worlds.base_key(Families())
    assert worlds.base_key(Families(noise=0.1)) != worlds.base_key(Families())
    assert worlds.base_key(Planted(seed=1)) != worlds.base_key(Planted())
