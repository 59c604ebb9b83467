"""Where practice examples come from: self-made, a teacher, own answers, training problems, or demonstrations."""

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from mass.batch import Sequence, pack
from mass.blocks import attends_fully
from mass.choices.budget import fill, running
from mass.choices.kit import Kit, Room, Written, sample, shots_for, written
from mass.choices.texts import Drawn
from mass.choices.views import colours_of, seen_as
from mass.errors import MassError
from mass.generate import Rollout
from mass.grids import SYMMETRIES, View
from mass.model import context_length
from mass.practice import (
    Practice,
    pack_examples,
    read_examples,
    seed_of,
    solve_sequence,
)
from mass.problems import Problem, Task, content_key
from mass.prompts import Example, filter_examples, parse_example
from mass.rewards import find_answer

Shown = Seq[tuple[str, str]]


def self_made(kit: Kit, problems: Seq[Problem], room: Room) -> Practice:
    """N problems like each target with solutions, written by the policy."""
    texts, shots = [p.text for p in problems], [shots_for(kit, p) for p in problems]

    def seeds(which: Seq[range]) -> list[list[int]]:
        return [
            [seed_of(kit.seed, "example", p.text, i) for i in own]
            for p, own in zip(problems, which, strict=True)
        ]

    asked = [kit.prompts.generate(text, s.generate) for text, s in zip(texts, shots, strict=True)]
    solve_shots = [s.solve for s in shots]

    def draw(which: Seq[range]) -> Drawn:
        return written(kit, asked, seeds(which), kit.writing, examples=True)

    def cost(t: int, own: list[Rollout]) -> list[int]:
        read = filter_examples([parse_example(r.text, finished=r.finished) for r in own], texts[t])
        return _cost(kit, room, solve_shots[t], own, read)

    if room.tokens is None:
        rollouts = draw([range(kit.examples)] * len(problems))
    else:
        longest = kit.writing.max_new_tokens * (1 + room.passes)
        rollouts = fill(room.tokens, longest, draw, cost, [[] for _ in problems])
    return read_examples(kit.lm, kit.prompts, texts, rollouts, solve_shots)


def teacher_made(kit: Kit, problems: Seq[Problem], room: Room) -> Practice:
    """N problems like each target, written by another, stronger model. What it could not write is malformed, and says why.

    TT-D: Acikgoz et al., arXiv 2510.07841. Its tokens are counted as generated.
    """
    assert kit.teacher is not None
    teacher = kit.teacher
    texts, shots = [p.text for p in problems], [shots_for(kit, p) for p in problems]
    failed: dict[int, str] = {}

    def draw(which: Seq[range]) -> list[list[Rollout]]:
        seeds = [
            [seed_of(kit.seed, "teacher", p.text, i) for i in own if t not in failed]
            for t, (p, own) in enumerate(zip(problems, which, strict=True))
        ]
        written = teacher(texts, [s.generate for s in shots], seeds)
        return [[heard(t, x) for x in own] for t, own in enumerate(written)]

    def heard(t: int, x: Written) -> Rollout:
        if isinstance(x, Rollout):
            return x
        failed[t] = x
        # its room is used up: nobody asks again for this problem
        return Rollout([], [], False, "")

    def read(t: int, own: list[Rollout]) -> list[Example]:
        made = [parse_example(r.text, finished=r.finished) for r in own]
        made = [
            e if r.tokens else Example("", "", False, failed.get(t, "empty"))
            for e, r in zip(made, own, strict=True)
        ]
        return filter_examples(made, texts[t])

    def cost(t: int, own: list[Rollout]) -> list[int]:
        running = _cost(kit, room, shots[t].solve, own, read(t, own))
        return [*running[:-1], max(running[-1], room.tokens[t])] if t in failed and room.tokens else running

    if room.tokens is None:
        rollouts = draw([range(kit.examples)] * len(problems))
    else:
        longest = kit.writing.max_new_tokens * (1 + room.passes)
        rollouts = fill(room.tokens, longest, draw, cost, [[] for _ in problems])
    examples = [read(t, own) for t, own in enumerate(rollouts)]
    return _practice(kit, problems, examples, rollouts)


def own_answers(kit: Kit, problems: Seq[Problem], room: Room) -> Practice:
    """N sampled solutions of each target itself, as examples of it; valid are those that state an answer."""
    drawn = _own_drawn(kit, problems, room, lambda r: find_answer(r.text) is not None)
    examples = [[_own(p.text, r) for r in own] for p, own in zip(problems, drawn, strict=True)]
    return _practice(kit, problems, examples, drawn)


def own_samples(kit: Kit, problems: Seq[Problem], room: Room) -> Practice:
    """The same token by token as they were sampled, and with those that state no answer: what a policy gradient needs."""
    drawn = _own_drawn(kit, problems, room, lambda _: True)
    examples = [[_own(p.text, r) for r in own] for p, own in zip(problems, drawn, strict=True)]
    rows = []
    for p, own in zip(problems, drawn, strict=True):
        asked = kit.prompts.solve(p.text, shots_for(kit, p).solve)
        rows.append([Sequence([*asked, *r.tokens], len(asked)) for r in own])
    packed = pack(rows, kit.lm.tokenizer.pad_token_id, kit.lm.device, share=attends_fully(kit.lm.hf))
    return Practice([], drawn, examples, packed, packed.count_TN > 0)


def training_problems(kit: Kit, problems: Seq[Problem], room: Room) -> Practice:
    """N solved training problems for each target, drawn at random from the pool; never the target itself."""
    examples = []
    for t, p in enumerate(problems):
        others = training_problems_for(kit, p)
        order = sorted(others, key=lambda x: seed_of(kit.seed, "random", p.text, x.problem.id))
        own = [Example(x.problem.text, x.solution, True, "") for x in order]
        if room.tokens is None:
            own = own[: kit.examples]
        else:
            spent = _cost(kit, room, shots_for(kit, p).solve, [None] * len(own), own)
            own = own[: sum(x <= room.tokens[t] for x in spent)]
        examples.append(own)
    return _practice(kit, problems, examples, [[] for _ in problems])


def training_problems_for(kit: Kit, problem: Problem) -> list[Task]:
    """Those of the pool that are not the problem itself. Raises MassError where N are wanted and there are fewer."""
    others = [x for x in kit.pool if content_key(x.problem.text) != content_key(problem.text)]
    check_pool(kit.examples, len(others), kit.budget)
    return others


def check_pool(examples: int, count: int, budget: int | None) -> None:
    """Raise MassError where `random` would draw more training problems than `count`. A budget takes what there is."""
    if budget is None and count < examples:
        raise MassError(
            f"method random draws generate.examples={examples} training problems, and {count} are set aside (prompt.pool). "
            f"Use generate.examples={count} or fewer."
        )


def leave_one_out(kit: Kit, problems: Seq[Problem], room: Room) -> Practice:
    """N in-context tasks from each problem's own demonstrations: one is to be solved, the others stand before it.

    Akyurek et al., arXiv 2411.07279. Each demonstration is left out in turn, in another order of the others each time;
    after the first round grids are also turned and their colours renamed. The loss is on the outputs of all
    demonstrations but the first, which nothing explains. Fewer than N where there are not so many different ones.
    """
    examples: list[list[Example]] = []
    rows: list[list[Sequence | None]] = []
    for t, p in enumerate(problems):
        most = math.inf if room.tokens is None else room.tokens[t]
        own: list[Example] = []
        row: list[Sequence | None] = []
        spent = 0
        for given, shown, solution in _tasks(kit, p, kit.examples if room.tokens is None else None):
            found = kit.prompts.in_context(given, solution, shown)
            reason = "template" if found is None else ""
            sequence = None
            if found is not None:
                whole, spans = found
                learned = {j for span in spans[1:] for j in span}
                prompt = min(learned)
                skip = frozenset(range(prompt, len(whole))) - learned
                sequence = Sequence(whole, prompt, skip)
                if len(whole) > context_length(kit.lm.hf):
                    sequence, reason = None, "truncated"
            spent += room.passes * len(sequence.tokens) if sequence else 0
            if spent > most:
                break
            own.append(Example(given, solution, sequence is not None, reason))
            row.append(sequence)
        examples.append(own)
        rows.append(row)
    packed = pack(rows, kit.lm.tokenizer.pad_token_id, kit.lm.device, share=attends_fully(kit.lm.hf))
    return Practice([], [[] for _ in problems], examples, packed, packed.count_TN > 0)


# tries in a row that bring nothing new before there is taken to be no more; tasks of one problem (arXiv 2411.07279)
_TRIES, _MOST_TASKS = 50, 250


def _tasks(kit: Kit, problem: Problem, count: int | None) -> list[tuple[str, Shown, str]]:
    """Different (input, demonstrations before it, solution) of a problem, at most `count`."""
    draw = np.random.default_rng(seed_of(kit.seed, "leave one out", problem.text))
    n = len(problem.demonstrations)
    names = list(SYMMETRIES)
    turns: list[int] = []
    out: dict[tuple[str, Shown, str], None] = {}
    idle = 0
    while len(out) < (count or _MOST_TASKS) and idle < _TRIES:
        if not turns:
            turns = draw.permutation(n).tolist()
        last = turns.pop()
        view = View()
        if problem.grids and len(out) >= n:
            view = View(names[draw.integers(len(names))], colours_of(draw))
        others = [i for i in draw.permutation(n).tolist() if i != last]
        shots = seen_as(problem, view, [*others, last]).shots
        before = len(out)
        out.setdefault((shots[-1][0], shots[:-1], shots[-1][1]))
        idle = idle + 1 if len(out) == before else 0
    return list(out)


def _own(text: str, rollout: Rollout) -> Example:
    stated = find_answer(rollout.text) is not None
    return Example(
        text, rollout.text, stated, "" if stated else "no_answer" if rollout.finished else "truncated"
    )


def _own_drawn(
    kit: Kit, problems: Seq[Problem], room: Room, learned: Callable[[Rollout], bool]
) -> list[list[Rollout]]:
    """Own answers 0, 1, ...: N of each problem, or what the room pays for, training on those `learned` included."""
    if room.tokens is None:
        which = [range(len(own), max(kit.examples, len(own))) for own in room.have]
        return [[*own, *new] for own, new in zip(room.have, sample(kit, problems, which), strict=True)]
    asked = [len(kit.prompts.solve(p.text, shots_for(kit, p).solve)) for p in problems]

    def cost(t: int, own: list[Rollout]) -> list[int]:
        sizes = [asked[t] + len(r.tokens) if learned(r) else 0 for r in own]
        return running([len(r.tokens) for r in own], sizes, room.passes, room.single)

    longest = kit.answering.max_new_tokens * (1 + room.passes)
    return fill(room.tokens, longest, lambda which: sample(kit, problems, which), cost, room.have)


def _cost(kit: Kit, room: Room, shots: Shown, drawn: Seq[Rollout | None], made: Seq[Example]) -> list[int]:
    sizes = [
        len(solve_sequence(kit.prompts, e.problem, e.solution, shots).tokens)
        if e.valid and room.passes
        else 0
        for e in made
    ]
    return running([len(r.tokens) if r else 0 for r in drawn], sizes, room.passes, room.single)


def _practice(
    kit: Kit, problems: Seq[Problem], examples: list[list[Example]], rollouts: list[list[Rollout]]
) -> Practice:
    shots = [shots_for(kit, p).solve for p in problems]
    packed, valid_TN = pack_examples(kit.lm, kit.prompts, examples, shots)
    return Practice([], rollouts, examples, packed, valid_TN)
