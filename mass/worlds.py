"""Planted worlds: problems made up so that the truth of every self-made example is known. No torch here.

A world is a source of problems (`world:NAME`), the words and lessons from which a small base model is pre-trained, and a
judge of what that model writes. `planted`: each family has a right and a wrong rule, and the base follows either.
`families`: the base can check a method honestly, but not find the right one in a single pass.
A world's settings are the fields of its class; the recipe gives them under problems.world.NAME.
"""

import dataclasses
import difflib
import functools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mass.errors import MassError

METHODS = ("w", "x", "y", "z")
DIGITS = tuple("0123456789")


class Truth(NamedTuple):
    """Of a self-made example: whether its solution is right, whether it is of the target's family, and whether the
    check that it states is honest (None: it states none)."""

    right: bool
    kin: bool
    honest: bool | None


class Lesson(NamedTuple):
    """A text to pre-train on. With a target: a new problem like it, and its solution; else a problem and its solution,
    behind solved ones (`shots`)."""

    problem: str
    solution: str
    target: str | None = None
    shots: tuple[tuple[str, str], ...] = ()


class Item(NamedTuple):
    """A problem of a world with its reference; `family` is the source that the task is of."""

    family: str
    problem: str
    answer: str
    solution: str


@dataclass(frozen=True)
class Planted:
    """Families named by a letter, each with a right and a wrong shift of digits.

    A problem is a family and four digits; its solution names a shift and adds it to each digit. The base follows the
    right rule in a share of its solutions that goes from `low` to `high` over the families; a new problem is of the
    target's family with probability `kin`. A fifth of the digits is in no training problem, and `unseen` families are in
    none at all; they make every other held-out problem.
    """

    families: int = 8
    unseen: int = 4
    low: float = 0.3
    high: float = 0.7
    kin: float = 0.7
    steps: int = 600
    seed: int = 0

    TASK_ONLY = ()

    def complaint(self) -> str | None:
        """What is wrong with the settings."""
        if not (1 <= self.families and 0 <= self.unseen and self.families + self.unseen <= 26):
            return f"families={self.families} and unseen={self.unseen} have to be 1 to 26 letters together"
        if not (0 <= self.low <= self.high <= 1 and 0 <= self.kin <= 1):
            return f"low={self.low:g}, high={self.high:g}, kin={self.kin:g} are shares, and low is not above high"
        if self.families + self.unseen == 1 and self.kin < 1:
            return f"kin={self.kin:g} of one family: its examples can be of no other. Set kin to 1, or families to 2 or more"
        return None

    @property
    def words(self) -> list[str]:
        """All words of the world's problems and solutions."""
        return [*self.names, *DIGITS, *(f"+{shift}" for shift in range(10))]

    @property
    def names(self) -> list[str]:
        return [chr(ord("a") + i) for i in range(self.families + self.unseen)]

    @functools.cached_property
    def rules(self) -> dict[str, tuple[int, int, float]]:
        """Of each family: the right shift, the wrong one, and how often the base follows the right one."""
        rng = random.Random(f"planted:{self.seed}")
        found: dict[str, tuple[int, int, float]] = {}
        for group in (self.names[: self.families], self.names[self.families :]):
            shares = [self.low + (self.high - self.low) * (i + 0.5) / len(group) for i in range(len(group))]
            rng.shuffle(shares)
            for name, share in zip(group, shares, strict=True):
                right, wrong = rng.sample(range(10), 2)
                found[name] = (right, wrong, share)
        return found

    def item(self, rng: random.Random, training: bool) -> Item:
        """A problem with its reference."""
        seen, unseen = self.names[: self.families], self.names[self.families :]
        family = rng.choice(unseen if unseen and not training and rng.random() < 0.5 else seen)
        while True:
            digits = [rng.randrange(10) for _ in range(4)]
            if (_hash(digits) % 5 == 0) != training:
                break
        solution = self._solve(digits, self.rules[family][0])
        return Item(f"planted:{family}", self._pose(family, digits), solution.rpartition(": ")[2], solution)

    def lesson(self, rng: random.Random) -> Lesson:
        """A text as the base writes it: right by chance."""
        family = rng.choice(self.names)
        posed, solved = self._write(family, rng)
        if rng.random() < 0.5:
            return Lesson(posed, solved)
        other = family if rng.random() < self.kin else rng.choice([x for x in self.names if x != family])
        return Lesson(*self._write(other, rng), target=posed)

    def truth(self, target: str, problem: str, solution: str) -> Truth:
        """Of an example that was made for a target."""
        family, *digits = problem.split() or [""]
        known = family in self.rules and len(digits) == 4 and all(x in DIGITS for x in digits)
        right = known and solution == self._solve([int(x) for x in digits], self.rules[family][0])
        return Truth(right, target.split()[:1] == [family], None)

    def read_rows(self, answer: str) -> list[str]:
        """An answer is one row."""
        return [answer]

    def write_rows(self, problem: str, rows: Sequence[str]) -> str:
        """The answer of a row."""
        return rows[0]

    def _write(self, family: str, rng: random.Random) -> tuple[str, str]:
        right, wrong, share = self.rules[family]
        digits = [rng.randrange(10) for _ in range(4)]
        return self._pose(family, digits), self._solve(digits, right if rng.random() < share else wrong)

    def _pose(self, family: str, digits: Sequence[int]) -> str:
        return " ".join([family, *map(str, digits)])

    def _solve(self, digits: Sequence[int], shift: int) -> str:
        return f"+{shift}\nAnswer: {' '.join(str((x + shift) % 10) for x in digits)}"


@dataclass(frozen=True)
class Families:
    """512 families named by three of eight symbols; each symbol is a permutation of four methods.

    The right method k of a family a b c is the one with P_c P_b P_a k = 0: three look-ups check it, but to find it in one
    pass would mean to invert the chain. A method shifts a pair of digits. A target asks to apply the family's method
    `rows` times over, and all of them have to be right; a practice problem asks for one application and its check.
    The base draws a method at random each time (with probability `context` one for a whole text) and checks it
    honestly, but for a share `noise` of the checks, which go astray at one look-up. A quarter of the families is held
    out from pre-training and training; `gold` of the others have training problems.
    """

    rows: int = 4
    gold: int = 64
    noise: float = 0.0
    context: float = 0.0
    steps: int = 300
    seed: int = 0

    TASK_ONLY = ("rows", "gold")
    SYMBOLS = tuple("abcdefgh")
    HELD = 128

    def complaint(self) -> str | None:
        """What is wrong with the settings."""
        if not 1 <= self.rows <= 8:
            return f"rows={self.rows}: the base is trained on 1 to 8"
        if not 1 <= self.gold <= 512 - self.HELD:
            return f"gold={self.gold}: 1 to {512 - self.HELD} families can have training problems"
        if not (0 <= self.noise <= 1 and 0 <= self.context <= 1):
            return f"noise={self.noise:g} and context={self.context:g} are shares"
        return None

    @property
    def words(self) -> list[str]:
        """All words of the world's problems and solutions."""
        return [*self.SYMBOLS, *DIGITS, *METHODS, ":", "times", "check", "Check:", "yes", "no"]

    @functools.cached_property
    def _plan(self) -> tuple[dict[str, list[int]], list[int], list[str]]:
        """Permutation of each symbol, shift of each method, and the families in random order, held-out ones first."""
        rng = random.Random(f"families:{self.seed}")
        permutations = {symbol: rng.sample(range(4), 4) for symbol in self.SYMBOLS}
        shifts = rng.sample(range(1, 10), 4)
        names = [f"{a} {b} {c}" for a in self.SYMBOLS for b in self.SYMBOLS for c in self.SYMBOLS]
        rng.shuffle(names)
        return permutations, shifts, names

    def item(self, rng: random.Random, training: bool) -> Item:
        """A target with its reference."""
        names = self._plan[2]
        family = rng.choice(names[self.HELD : self.HELD + self.gold] if training else names[: self.HELD])
        start = [rng.randrange(10), rng.randrange(10)]
        answer = self._apply(start, [self._right(family)] * self.rows)
        posed = self._pose(family, start, self.rows)
        return Item(f"families:{family.replace(' ', '')}", posed, answer, f"Answer: {answer}")

    def lesson(self, rng: random.Random) -> Lesson:
        """A text as the base writes it: methods by chance, checks (but for the noise) honest."""
        family = rng.choice(self._plan[2][self.HELD :])
        always = [rng.randrange(4)] if rng.random() < self.context else range(4)
        rows = rng.randint(1, 8)
        start = [rng.randrange(10), rng.randrange(10)]
        posed = self._pose(family, start, rows)
        practice = self._practice(family, always, rng)
        kind = rng.random()
        if kind < 0.5:
            return Lesson(*practice, target=posed)
        if kind < 0.7:
            return Lesson(*practice)
        shots = tuple(self._practice(family, always, rng) for _ in range(rng.choice((0, 0, 1, 2))))
        methods = [rng.choice(always) for _ in range(rows)]
        return Lesson(posed, f"Answer: {self._apply(start, methods)}", shots=shots)

    def truth(self, target: str, problem: str, solution: str) -> Truth:
        """Of an example that was made for a target."""
        words, stated = problem.split(), solution.split()
        family, start = " ".join(words[:3]), words[3:5]
        kin = target.split()[:3] == words[:3]
        # Answer: 1 : METHOD y y Check: h h h VERDICT
        formed = (
            family in self._plan[2]
            and words[5:] == ["check"]
            and len(start) == 2
            and all(x in DIGITS for x in start)
            and len(stated) == 11
            and stated[3] in METHODS
        )
        if not formed:
            return Truth(False, kin, None)
        method = METHODS.index(stated[3])
        applied = stated[1:6] == self._apply([int(x) for x in start], [method]).split()
        holds = method == self._right(family)
        return Truth(holds and applied, kin, stated[-1] == ("yes" if holds else "no"))

    def read_rows(self, answer: str) -> list[str]:
        """The method that each row of an answer names; none for what does not have the form of rows."""
        words = answer.split()
        rows = [words[i : i + 5] for i in range(0, len(words), 5)]
        formed = all(len(row) == 5 and row[1] == ":" and row[2] in METHODS for row in rows)
        return [row[2] for row in rows] if formed else []

    def write_rows(self, problem: str, rows: Sequence[str]) -> str:
        """The answer to a target that applies these methods, a row each."""
        start = [int(x) for x in problem.split()[3:5]]
        return self._apply(start, [METHODS.index(row) for row in rows])

    def _chain(self, family: str, method: int) -> list[int]:
        found = []
        for symbol in family.split():
            method = self._plan[0][symbol][method]
            found.append(method)
        return found

    def _right(self, family: str) -> int:
        return next(k for k in range(4) if self._chain(family, k)[-1] == 0)

    def _practice(self, family: str, methods: Sequence[int], rng: random.Random) -> tuple[str, str]:
        start, method = [rng.randrange(10), rng.randrange(10)], rng.choice(methods)
        chain = self._chain(family, method)
        if rng.random() < self.noise:
            at = rng.randrange(3)
            astray = rng.choice([k for k in range(4) if k != chain[at]])
            chain[at:] = [astray, *self._chain(" ".join(family.split()[at + 1 :]), astray)]
        check = [*(METHODS[k] for k in chain), "no" if chain[-1] else "yes"]
        return (
            f"{family} {start[0]} {start[1]} check",
            f"Answer: {self._apply(start, [method])}\nCheck: {' '.join(check)}",
        )

    def _pose(self, family: str, start: Sequence[int], rows: int) -> str:
        return f"{family} {start[0]} {start[1]} times {rows}"

    def _apply(self, start: Sequence[int], methods: Sequence[int]) -> str:
        """The rows of an answer: how many are left, the method, and the digits that it gives."""
        rows, digits = [], list(start)
        for left, method in zip(range(len(methods), 0, -1), methods, strict=True):
            digits = [(x + self._plan[1][method]) % 10 for x in digits]
            rows.append(f"{left} : {METHODS[method]} {digits[0]} {digits[1]}")
        return " ".join(rows)


World = Planted | Families
WORLDS: dict[str, type[World]] = {"planted": Planted, "families": Families}


def find(source: str, settings: Mapping[str, Mapping[str, Any]] | None = None) -> World:
    """The world that `world:NAME` names, with its settings from {NAME: {setting: value}}. MassError for wrong ones."""
    name = source.removeprefix("world:")
    if name not in WORLDS:
        near = difflib.get_close_matches(name, WORLDS, n=1) or list(WORLDS)
        raise MassError(f"There is no world {source!r}. Did you mean world:{near[0]}?")
    for other in (settings or {}).keys() - WORLDS.keys():
        raise MassError(
            f"problems.world.{other}: there is no such world. The worlds are {', '.join(WORLDS)}."
        )
    own = dict((settings or {}).get(name) or {})
    known = {x.name: type(x.default) for x in dataclasses.fields(WORLDS[name])}
    for key, value in own.items():
        if key not in known:
            raise MassError(f"problems.world.{name} has no setting {key!r}. It has {', '.join(known)}.")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (known[key] is float and isinstance(value, float))):
            kind = "a whole number" if known[key] is int else "a number"
            raise MassError(f"problems.world.{name}.{key}={value!r}: wants {kind}.")
    world = WORLDS[name](**own)
    if complaint := world.complaint():
        raise MassError(f"problems.world.{name}: {complaint}.")
    return world


def items(world: World, size: int, training: bool, seed: int) -> Iterator[Item]:
    """Up to `size` different problems, always the same for a seed: fewer where the world has no more."""
    rng = random.Random(f"{seed}:{'training' if training else 'heldout'}")
    seen: set[str] = set()
    for _ in range(20 * size):
        item = world.item(rng, training)
        if item.problem not in seen:
            seen.add(item.problem)
            yield item
        if len(seen) == size:
            return


def entry(world: World) -> dict[str, Any]:
    """Name and settings, as a task carries them."""
    name = next(name for name, cls in WORLDS.items() if isinstance(world, cls))
    return {"world": name, "settings": dataclasses.asdict(world)}


def truth(entry: Mapping[str, Any], target: str, problem: str, solution: str) -> Truth:
    """Of an example made for a target of the world that `entry` describes."""
    return _restored(json.dumps(entry, sort_keys=True)).truth(target, problem, solution)


def read_rows(entry: Mapping[str, Any], answer: str) -> list[str]:
    """What a vote can be taken on in each row of an answer in the world that `entry` describes."""
    return _restored(json.dumps(entry, sort_keys=True)).read_rows(answer)


def write_rows(entry: Mapping[str, Any], problem: str, rows: Sequence[str]) -> str:
    """The answer that such rows make."""
    return _restored(json.dumps(entry, sort_keys=True)).write_rows(problem, rows)


@functools.lru_cache
def _restored(entry: str) -> World:
    found = json.loads(entry)
    return WORLDS[found["world"]](**found["settings"])


def base_key(world: World) -> dict[str, Any]:
    """What a world's base model depends on."""
    return {key: value for key, value in dataclasses.asdict(world).items() if key not in world.TASK_ONLY}


def _hash(digits: Sequence[int]) -> int:
    # a fixed mixing of the digits: the split must not depend on Python's own hash
    return sum((7 * i + 3) * (x + 1) ** 2 for i, x in enumerate(digits))
