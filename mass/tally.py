"""What the answers of all arms come to: the numbers of an evaluation, as a tree of JSON values.

Takes the files of answers alone, so that a table can be made again without any model.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mass import compare, outer
from mass.rewards import ends_with_number

# arms by these names are what the others are compared with
RIVALS = ("none", "vote", "quest")
SECONDS = ("generate", "score", "adapt", "answer")
BINS = 20
# by what an answer is right: the verifier's score of the answer that its text states, or the last number in the text
COUNTS = ("stated", "last-number")


def results(
    files: Mapping[str, Iterable[Mapping[str, Any]]],
    trained: Callable[[Mapping[str, Any]], bool] = lambda row: False,
    count: str = COUNTS[0],
    stated: Collection[str] = (),
) -> dict[str, Any]:
    """`arms`, `comparisons` and `sources` of the rows of each arm, all in the order of the same problems, and `count`.

    `trained`: whether a row's source has training problems of its run. A problem is right when its verifier gives the full score; one
    without an answer or without a verdict is not. With count="last-number" it is right when the last number in its
    answer's text is the reference; scores, tries and votes stay as they are, and so does a problem whose reference is no number.
    An arm that chose among tries none of which states an answer (a vote, say) stays as it is too, and is in no comparison;
    so does an arm of `stated`.
    """
    arms, right, states = [], {}, {}
    source_P: list[tuple[str, bool]] = []
    for name, rows in files.items():
        arm, right[name], states[name], source_P = _arm(name, rows, trained, count, name in stated)
        arms.append(arm)
    written = [arm["arm"] for arm in arms if arm["states_answer"]]
    # arms that are all counted alike
    numbers = any(arm["by_last_number"] is not None for arm in arms)
    other = count != COUNTS[0] and numbers
    comparable = [arm["arm"] for arm in arms if not other or arm["by_last_number"] is not None]
    return {
        "count": count,
        "arms": arms,
        "comparisons": _comparisons({name: right[name] for name in comparable}),
        "sources": [
            {
                "source": source,
                "trained": has_trained,
                "problems": size,
                "right": {name: int(right_P[of_source].sum()) for name, right_P in right.items()},
                "states_answer": {
                    name: _states_answer(states[name][of_source], right[name][of_source]) for name in written
                },
            }
            for (source, has_trained), size in sorted(Counter(source_P).items(), key=lambda x: (-x[1], x[0]))
            for of_source in [np.array([x == (source, has_trained) for x in source_P], bool)]
        ],
    }


def _arm(
    name: str,
    rows: Iterable[Mapping[str, Any]],
    trained: Callable[[Mapping[str, Any]], bool],
    by: str,
    stated: bool,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, list[tuple[str, bool]]]:
    right: list[bool] = []
    last: list[bool | None] = []
    sources: list[tuple[str, bool]] = []
    tries: list[tuple[int, int]] = []
    rules: list[Mapping[str, bool | None]] = []
    count: Counter[str] = Counter()
    total = dict.fromkeys(("generated", "trained", "flops", *SECONDS), 0.0)
    scores = 0.0
    won = 0.0
    good: list[float] = []
    other: list[float] = []
    states: list[int] = []
    undecided = 0
    for row in rows:
        right.append(row["score"] == 1.0)
        last.append(ends_with_number(row["solution"], row["reference"]))
        sources.append((row["source"], trained(row)))
        # answers of an earlier version have none
        scores_of = row.get("tries", [])
        undecided += bool(scores_of) and row["answer"] is None and not row["solution"]
        tries.append((len(scores_of), sum(score == 1.0 for score in scores_of)))
        rules.append(row.get("vote_rules") or {})
        count["errors"] += row["error"] is not None
        count["no_answer"] += row["error"] is None and row["answer"] is None
        count["unverified"] += row["score"] is None
        scores += row["score"] or 0.0
        total["flops"] += row["flops"]
        for part, value in (row["tokens"] | row["seconds"]).items():
            total[part] += value
        reasons = Counter(e["reason"] for e in row["examples"])
        count["examples"] += len(row["examples"])
        count["valid"] += reasons[""]
        count["copies"] += reasons["copy"]
        states.append(_stating(row["reference"], row["examples"]))
        known = [
            (e["weight"], x)
            for e, x in zip(row["examples"], row["truth"], strict=True)
            if x is not None and e["weight"] is not None
        ]
        is_good = [bool(x[0] and x[1]) for _, x in known]
        if known:
            weight = torch.tensor([[w for w, _ in known]])
            good_TN = torch.tensor([is_good])
            ahead, pairs = outer.ordered_pairs(weight, good_TN, torch.ones_like(good_TN))
            won += ahead
            count["pairs"] += pairs
        good += [w for (w, _), x in zip(known, is_good, strict=True) if x]
        other += [w for (w, _), x in zip(known, is_good, strict=True) if not x]
        count["checks"] += sum(x[2] is not None for _, x in known)
        count["honest"] += sum(x[2] is True for _, x in known)
    P = len(right)
    # a choice among tries by the answers that they state has no text where none of them states one
    last = [None] * P if undecided or stated else last
    last_P = np.array([whole if x is None else x for x, whole in zip(last, right, strict=True)], bool)
    right_P, states_P = np.array(right, bool) if by == COUNTS[0] else last_P, np.array(states, int)
    seconds = sum(total[part] for part in SECONDS) / P
    known_count = len(good) + len(other)
    arm = {
        "arm": name,
        "problems": P,
        "right": int(right_P.sum()),
        "accuracy": float(right_P.mean()),
        "interval": compare.interval(right_P),
        "score": scores / P,
        # None where no reference is a number, and where the answer was chosen among tries that state none
        "by_last_number": None if all(x is None for x in last) else float(last_P.mean()),
        "tries": _tries(tries),
        "vote_rules": _vote_rules(rules, right),
        **{key: count[key] for key in ("errors", "no_answer", "unverified", "examples", "valid", "copies")},
        "tokens": (total["generated"] + total["trained"]) / P,
        "generated": total["generated"] / P,
        "trained": total["trained"] / P,
        "flops": total["flops"] / P,
        "seconds": seconds,
        "parts": {part: total[part] / P for part in SECONDS},
        "per_minute": 60 / seconds if seconds else None,
        # a try that states the answer is a right one, and no practice
        "states_answer": _states_answer(states_P, right_P)
        if count["examples"] and not any(n for n, _ in tries)
        else None,
        "truth": {
            "known": known_count,
            "good": len(good) / known_count,
            "auc": won / count["pairs"] if count["pairs"] else None,
            "honest": count["honest"] / count["checks"] if count["checks"] else None,
            **_histogram(good, other),
        }
        if known_count
        else None,
    }
    return arm, right_P, states_P, sources


def _stating(reference: str, examples: Iterable[Mapping[str, Any]]) -> int:
    """How many valid examples have the target's reference in their problem or solution, as words or numbers of their own."""
    word = re.compile(rf"(?<![\w.,-]){re.escape(reference.strip())}(?!\w|[.,]\d)", re.IGNORECASE)
    return sum(bool(word.search(f"{e['problem']}\n{e['solution']}")) for e in examples if e["valid"])


def _states_answer(states_P: np.ndarray, right_P: np.ndarray) -> dict[str, Any]:
    """Valid `examples` that state their target's answer, `problems` with such a one, and how many of these (`right`) and
    of the others (`right_others`) are answered rightly."""
    one_P = states_P > 0
    return {
        "examples": int(states_P.sum()),
        "problems": int(one_P.sum()),
        "right": int(right_P[one_P].sum()),
        "right_others": int(right_P[~one_P].sum()),
    }


def _tries(of: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    """pass@n of (tries, right ones) of each problem; None without any. A problem that failed has no try, and none right.

    `any`: the share of problems with a right try among all of theirs; `at[k - 1]`: pass@k for every k up to the fewest
    tries of a problem, by the unbiased estimator of Chen et al., arXiv 2107.03374.
    """
    drawn = [n for n, _ in of if n]
    if not drawn:
        return None
    least, P = min(drawn), len(of)
    return {
        "least": least,
        "most": max(drawn),
        "any": sum(c > 0 for _, c in of) / P,
        "at": [
            sum(1 - math.comb(n - c, k) / math.comb(n, k) for n, c in of if n) / P
            for k in range(1, least + 1)
        ],
    }


def _vote_rules(rules: Sequence[Mapping[str, bool | None]], right: Sequence[bool]) -> dict[str, Any] | None:
    """Accuracy of a vote by each rule that there is for some problem; a problem without it goes by the arm's own answer."""
    found = {}
    for rule in dict.fromkeys(rule for own in rules for rule, x in own.items() if x is not None):
        by_rule = [own.get(rule) for own in rules]
        right_P = [whole if x is None else x for x, whole in zip(by_rule, right, strict=True)]
        found[rule] = {"accuracy": float(np.mean(right_P)), "interval": compare.interval(right_P)}
    return found or None


def _histogram(good: Sequence[float], other: Sequence[float]) -> dict[str, list[float]]:
    top = max([*good, *other, 1e-9])
    edges = np.linspace(0.0, top, BINS + 1)
    return {
        "edges": edges.tolist(),
        "weights_good": np.histogram(good, edges)[0].tolist(),
        "weights_other": np.histogram(other, edges)[0].tolist(),
    }


def _comparisons(right: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Every arm against each rival, no pair twice; Holm's correction is over all of them."""
    found: list[dict[str, Any]] = []
    rivals = [name for name in RIVALS if name in right]
    for name, right_P in right.items():
        # of two rivals the later one is compared with the earlier
        for rival in rivals[: rivals.index(name)] if name in rivals else rivals:
            found.append({"arm": name, "against": rival, **compare.paired(right_P, right[rival])._asdict()})
    for comparison, p in zip(found, compare.holm([x["p"] for x in found]), strict=True):
        comparison["p_holm"] = p
    return found
