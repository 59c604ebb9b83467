"""Problems that reasoning-gym makes: which families and settings there are, and rows of one."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from mass import rewards
from mass.errors import MassError
from mass.rows import content_key


class GymItem(NamedTuple):
    """`entry` is the row, with the family's settings where some were given: what gym's own score needs."""

    id: str
    problem: str
    answer: str
    entry: dict[str, Any]


def check_gym(families: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Raises MassError where reasoning-gym is not installed, or has no such family or setting."""
    rewards.require(["gym"])
    from reasoning_gym.factory import DATASETS

    for name in [*families, *settings]:
        if name not in DATASETS or name == "composite":
            near = difflib.get_close_matches(name, DATASETS, n=1)
            raise MassError(
                f"reasoning-gym has no family {name!r}" + (f"; the nearest is {near[0]!r}." if near else ".")
            )
        known = [entry.name for entry in fields(DATASETS[name][1]) if entry.name not in ("seed", "size")]
        for key in settings.get(name) or {}:
            if key in ("seed", "size"):
                raise MassError(
                    f"problems.gym.{name}.{key} is set by run.seed and problems.size; take it out."
                )
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise MassError(
                    f"problems.gym.{name} has no setting {key!r}"
                    + (f"; the nearest is {near[0]!r}" if near else "")
                    + f". It has {', '.join(known)}."
                )


def gym_items(
    name: str, share: int, settings: dict[str, Any], split: str, seed: int, numeric: bool
) -> list[GymItem]:
    """Up to `share` problems of a family that differ in content. `numeric`: each answer has to be a number.

    Raises MassError that names the family for settings that it cannot use.
    """
    import reasoning_gym

    # Row i of a family is made from Random(seed + i), so neighbouring seeds give the same problems shifted by one.
    stream = int.from_bytes(hashlib.sha256(f"{seed}:{split}:{name}".encode()).digest()[:4], "big") >> 1
    items: list[GymItem] = []
    seen: set[str] = set()
    index = 0
    try:
        rows = reasoning_gym.create_dataset(name, seed=stream, size=max(4 * share, 1), **settings)
        for index in range(4 * share if share else 0):
            row = rows[index]
            if row["answer"] is None:
                raise ValueError("this family has no reference answers")
            text, answer = str(row["question"]).strip(), str(row["answer"]).strip()
            key = content_key(text)
            if key in seen:
                continue
            seen.add(key)
            if numeric and rewards.number(answer) is None:
                raise ValueError(f"problems.verifier=numeric, but an answer is {answer[:80]!r}, not a number")
            entry = {**row, "settings": settings} if settings else dict(row)
            items.append(GymItem(f"{name}-{stream}-{index}", text, answer, entry))
            if len(items) == share:
                break
    except Exception as error:  # a family asserts and raises what it likes on settings it cannot use
        reason = str(error) or type(error).__name__
        raise MassError(
            f"gym:{name} cannot make problem {index} with {settings or 'its defaults'}: {reason}. "
            f"Change problems.gym.{name}, or take another family."
        ) from error
    return items
