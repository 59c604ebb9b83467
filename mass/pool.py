"""Evaluations of several training seeds put together: one table over all their problems, and the spread over the seeds.

An interval over problems says nothing about another training run; the standard deviation over seeds does. Problems of
different folders are different problems, also where their texts are the same.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mass import arms, filerun, tally
from mass.errors import MassError


def pooled(folders: Sequence[Path], count: str = tally.COUNTS[0]) -> dict[str, Any]:
    """The numbers of `mass.tally.results` over the answers in finished --out folders of mass-eval, and `seeds`.

    The rows of every arm are those of the folders one after another; a problem's id is the folder's label and its own
    (`seed-0/p17`). `seeds`: what each folder has, and for each arm the mean of its accuracies and their standard deviation
    (n - 1). `count`: one of `tally.COUNTS`. Raises MassError for folders that are not finished or have other arms, and for one folder given twice.
    """
    if len(folders) < 2:
        raise MassError(f"--pool {' '.join(map(str, folders))}: give two folders or more")
    paths = [folder.resolve() for folder in folders]
    twice = next((folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise MassError(f"--pool has the folder {twice} twice: leave one out")
    found = [_report(folder) for folder in folders]
    names = [arm["arm"] for arm in found[0]["arms"]]
    for folder, other in zip(folders, found, strict=True):
        own = [arm["arm"] for arm in other["arms"]]
        if odd := set(own) ^ set(names):
            raise MassError(
                f"--pool: {folder} and {folders[0]} have other arms ({', '.join(sorted(odd))} in one of them alone). "
                "Add what is missing: mass-eval --resume with the same --out"
            )
    labels = _labels(folders)
    if not names:
        raise MassError("--pool: these folders have no arms, only --credit: there is nothing to pool")
    ids = {name: [row["id"] for row in _rows(folders, labels, name)] for name in names}
    for name in names:
        if ids[name] != ids[names[0]]:
            raise MassError(
                f"--pool: {name} and {names[0]} have answers to other problems: evaluate them again"
            )
    # a source of one world may have training problems in another: each folder knows its own
    of_folder = {
        label: {x["source"] for x in other["sources"] if x["trained"]}
        for label, other in zip(labels, found, strict=True)
    }

    def trained(row: Mapping[str, Any]) -> bool:
        return row["source"] in of_folder[row["folder"]]

    numbers = tally.results({name: _rows(folders, labels, name) for name in names}, trained, count)
    # an arm of which one folder has no last numbers is counted by what is stated in all of them
    stated = [arm["arm"] for arm in numbers["arms"] if arm["by_last_number"] is None]
    # counted again: a folder's report may count otherwise
    alone = [
        tally.results({name: _rows([folder], [label], name) for name in names}, trained, count, stated)
        for folder, label in zip(folders, labels, strict=True)
    ]
    accuracy = [{arm["arm"]: arm["accuracy"] for arm in own["arms"]} for own in alone]
    return {
        "seed": ", ".join(dict.fromkeys(str(other["seed"]) for other in found)),
        "versions": _versions(found),
        "weights": {name: _joined(found, "weights", name) for name in names},
        "problems": len(ids[names[0]]),
        "left_out": sum(other["left_out"] for other in found),
        "repeated": sum(other["repeated"] for other in found),
        **numbers,
        "seeds": {
            "folders": [
                {
                    "folder": label,
                    "seed": other["seed"],
                    "problems": other["problems"],
                    "command": other["command"],
                    "accuracy": own,
                }
                for label, other, own in zip(labels, found, accuracy, strict=True)
            ],
            "arms": [
                {
                    "arm": name,
                    "mean": statistics.fmean(own[name] for own in accuracy),
                    "deviation": statistics.stdev(own[name] for own in accuracy),
                }
                for name in names
            ],
        },
    }


def _report(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MassError(
            f"--pool {folder}: there is no results.json of a finished mass-eval. Finish it with mass-eval --resume --out {folder}"
        ) from None
    if "seeds" in found:
        raise MassError(f"--pool {folder}: it is a pool itself. Name the folders that it was made of")
    return found


def _rows(folders: Sequence[Path], labels: Sequence[str], arm: str) -> Iterator[dict[str, Any]]:
    for folder, label in zip(folders, labels, strict=True):
        path = folder / arms.file_of(arm)
        if not path.is_file():
            raise MassError(f"--pool: {path} is missing. Answer it again: mass-eval --resume --out {folder}")
        for row in filerun.rows(path):
            yield row | {"id": f"{label}/{row['id']}", "folder": label}


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or their paths where two names are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _versions(found: Sequence[dict[str, Any]]) -> dict[str, str]:
    names = dict.fromkeys(name for other in found for name in other["versions"])
    return {name: _joined(found, "versions", name) for name in names}


def _joined(found: Sequence[dict[str, Any]], key: str, name: str) -> str:
    """What the reports have under `key` for `name`; those of an earlier version may not have it."""
    return " or ".join(dict.fromkeys(other.get(key, {}).get(name, "none") for other in found))
