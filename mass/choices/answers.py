"""How a method answers: greedily, with examples in the prompt, by a vote, over several views, or with an own answer."""

import math
from collections import Counter
from collections.abc import Sequence as Seq

from mass import grids
from mass.choices.kit import Answered, Kit, Work, greedily, overlong, shots_for
from mass.choices.views import Seen, views
from mass.demonstrations import stated
from mass.generate import Rollout
from mass.lora import select
from mass.prompts import Example
from mass.rewards import canonical, find_answer

# how many of the best-scored examples `in_context` puts into the prompt
CONTEXT_EXAMPLES = 2
# how many answers of one symmetry go on to the vote across symmetries
FINALISTS = 3


def greedy(kit: Kit, work: Work) -> list[Answered]:
    """The likeliest text, token by token, with the problem's own adapter where it has moved, else with the policy."""
    still = [t for t, moved in enumerate(work.moved) if not moved]
    moved = [t for t, moved in enumerate(work.moved) if moved]
    adapter = select(work.updated.adapter, moved) if work.updated and moved else None
    found: dict[int, Answered] = dict(
        zip(still, greedily(kit, [work.problems[t] for t in still]), strict=True)
    )
    found |= zip(moved, greedily(kit, [work.problems[t] for t in moved], adapter), strict=True)
    return [found[t] for t in range(len(work.problems))]


def in_context(kit: Kit, work: Work) -> list[Answered]:
    """Greedy by the policy, with the best-weighted examples in the prompt (best last) as far as the context reaches."""
    assert work.practice is not None and work.weight_TN is not None
    shots: list[list[tuple[str, str]]] = []
    for t, p in enumerate(work.problems):
        own = list(shots_for(kit, p).solve)
        weight = work.weight_TN[t].tolist()
        best = sorted(range(len(work.practice.examples[t])), key=lambda i: -weight[i])[:CONTEXT_EXAMPLES]
        put: list[tuple[str, str]] = []
        for e in (work.practice.examples[t][i] for i in best):
            longer = [(e.problem, e.solution), *put]
            if e.valid and overlong(kit, kit.prompts.solve(p.text, [*own, *longer]), kit.answering) is None:
                put = longer
        shots.append([*own, *put])
    return greedily(kit, work.problems, shots=shots)


def majority(kit: Kit, work: Work) -> list[Answered]:
    """The answer that most weight among the own answers stands behind; its text is the weightiest that states it."""
    assert work.practice is not None and work.weight_TN is not None
    return [
        _weighted_vote(own, drawn, weight)
        for own, drawn, weight in zip(
            work.practice.examples, work.practice.rollouts, work.weight_TN.tolist(), strict=True
        )
    ]


def best(kit: Kit, work: Work) -> list[Answered]:
    """The own answer of most weight."""
    assert work.practice is not None and work.weight_TN is not None
    found = []
    practice = work.practice
    for own, drawn, weight in zip(practice.examples, practice.rollouts, work.weight_TN.tolist(), strict=True):
        if not any(weight):
            found.append(Answered(None, "", 0))
            continue
        top = max(range(len(own)), key=lambda i: weight[i])
        text = own[top].solution
        found.append(Answered(find_answer(text), text, 0, drawn[top].finished))
    return found


def _weighted_vote(examples: Seq[Example], drawn: Seq[Rollout], weight: Seq[float]) -> Answered:
    behind: dict[str, list[tuple[float, int]]] = {}
    for i, e in enumerate(examples):
        stated = find_answer(e.solution) if weight[i] > 0 else None
        if stated is not None:
            behind.setdefault(canonical(stated).casefold(), []).append((weight[i], i))
    if not behind:
        return Answered(None, "", 0)
    # math.fsum: equal weights in equal number tie exactly, and ties go to the answer seen first, as in rewards.vote
    most = max(behind.values(), key=lambda votes: math.fsum(w for w, _ in votes))
    first, top = most[0][1], max(most, key=lambda vote: vote[0])[1]
    said = find_answer(examples[first].solution) or ""
    return Answered(canonical(said), examples[top].solution, 0, drawn[top].finished)


def over_views(kit: Kit, work: Work) -> list[Answered]:
    """Greedy in several views of the problem (order of the demonstrations; for grids symmetries and colours, too), each
    answer turned back, and a hierarchical vote. As many views as the budget has room for, at least one."""
    rows: list[tuple[int, Seen]] = []
    for t, p in enumerate(work.problems):
        seen = views(kit, p)
        most = len(seen) if work.left is None else work.left[t] // kit.answering.max_new_tokens
        rows += [(t, view) for view in seen[: max(1, most)]]
    said: dict[int, Answered] = {}
    for moved in (False, True):
        group = [i for i, (t, _) in enumerate(rows) if work.moved[t] is moved]
        adapter = work.updated.adapter if work.updated and moved else None
        drawn = greedily(
            kit,
            [rows[i][1].problem for i in group],
            adapter,
            [rows[i][1].shots for i in group],
            [rows[i][0] if moved else 0 for i in group],
        )
        said |= zip(group, drawn, strict=True)
    found = []
    for t in range(len(work.problems)):
        own = [(rows[i][1], said[i]) for i in range(len(rows)) if rows[i][0] == t]
        groups: dict[str, list[str]] = {}
        for view, one in own:
            back = view.undo(one.answer) if one.answer is not None else None
            if back is not None:
                groups.setdefault(view.view.symmetry, []).append(back)
        answer = vote_over_views(groups, work.problems[t].grids)
        text = stated(answer) if answer is not None else own[0][1].solution
        finished = answer is not None or own[0][1].finished
        found.append(Answered(answer, text, sum(one.tokens for _, one in own), finished))
    return found


def vote_over_views(groups: dict[str, list[str]], as_grids: bool) -> str | None:
    """Akyurek et al., arXiv 2411.07279: the three commonest answers of each symmetry, for grids filled up with the
    row-wise and the column-wise majority, then a vote across symmetries; ties go to what the identity says, then to the
    answer with more votes in all, then to the first."""
    across: Counter[str] = Counter()
    in_all: Counter[str] = Counter()
    plain: list[str] = []
    for symmetry, said in groups.items():
        count = Counter(canonical(answer) for answer in said)
        in_all += count
        finalists = [answer for answer, _ in count.most_common(FINALISTS)]
        if as_grids:
            finalists += [x for x in dict.fromkeys(grids.by_majority(said)) if x not in finalists]
        across.update(finalists[:FINALISTS])
        if symmetry == "identity":
            plain = finalists[:FINALISTS]
    if not across:
        return None
    return max(across, key=lambda answer: (across[answer], answer in plain, in_all[answer]))
