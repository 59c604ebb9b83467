"""How many samples a budget of tokens pays for."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

from mass.generate import Rollout

Draw = Callable[[list[range]], list[list[Rollout]]]
# the running cost of a problem's samples 0..j, for every j
Cost = Callable[[int, list[Rollout]], list[int]]


def fill(
    room: Seq[int], longest: int, draw: Draw, cost: Cost, have: Seq[Seq[Rollout]], least: int = 0
) -> list[list[Rollout]]:
    """Samples 0, 1, ... of each problem, as many as cost no more than its room; `have` are the first ones.

    These are what drawing one after the other and stopping at the budget would have. For speed they are drawn in rounds
    over all problems, since how many fit is known only when their lengths are; what was drawn beyond is thrown away.
    `longest`: the most that one sample can cost. `least`: so many are kept even where there is no room for them.
    """
    drawn = [list(own) for own in have]
    while True:
        costs = [cost(t, own) for t, own in enumerate(drawn)]
        more = [_more(own, most, longest, least) for own, most in zip(costs, room, strict=True)]
        if not any(more):
            return [
                own[: max(least, sum(x <= most for x in spent))]
                for own, spent, most in zip(drawn, costs, room, strict=True)
            ]
        which = [range(len(own), len(own) + n) for own, n in zip(drawn, more, strict=True)]
        for own, new in zip(drawn, draw(which), strict=True):
            own += new


def _more(costs: Seq[int], room: int, longest: int, least: int) -> int:
    """How many further samples fit for certain (none drawn yet), or by the mean cost of those drawn."""
    if not costs:
        return max(least, 1 if room > 0 else 0, room // longest)
    # One more at least: a short one may fit where one of mean length does not. None costs nothing, so there is an end.
    likely = (room - costs[-1]) * len(costs) // max(1, costs[-1])
    return max(1, likely) if costs[-1] < room and len(costs) < room else 0


def running(generated: Seq[int], trained: Seq[int], passes: int, single: bool) -> list[int]:
    """Running cost of samples of so many tokens each, of which `trained` are learned from, or (`single`) the longest."""
    out, made, learned = [], 0, 0
    for new, size in zip(generated, trained, strict=True):
        made += new
        learned = max(learned, size) if single else learned + size
        out.append(made + passes * learned)
    return out
