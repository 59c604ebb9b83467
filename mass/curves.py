"""The learning curves of a run, read from its log.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# chart -> tag -> what a legend calls it
CURVES = {
    "outer loss": {"meta/loss_before": "before the update", "meta/loss": "after it"},
    "AUC, right above other": {
        "scorer/auc": "scorer",
        "credit/auc": "credit",
        "heldout/auc": "scorer, held out",
    },
    "held-out problems right": {
        "heldout/none": "without update",
        "heldout/mass": "with",
        "unseen/none": "unseen sources, without",
        "unseen/mass": "unseen sources, with",
    },
}
# more points than this are averaged, some steps at a time
MOST = 200


def read(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Tag -> `step` and `value` of each point up to a step folder, for the tags of `CURVES` that its run has logged.

    A tag logged at more than `MOST` steps has means of as many neighbours as it takes. A line that a kill has torn, and a
    value that was not finite, are left out; a run without a log has no curves.
    """
    path, last = folder.parent / "log.jsonl", int(folder.name.rpartition("_")[2])
    if not path.is_file():
        return {}
    points: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, TypeError, KeyError):
            continue
        for tag in (tag for chart in CURVES.values() for tag in chart):
            if step <= last and entry.get(tag) is not None:
                points.setdefault(tag, []).append((step, entry[tag]))
    return {tag: _thinned(own) for tag, own in points.items()}


def _thinned(points: Sequence[tuple[int, float]]) -> dict[str, list[Any]]:
    size = -(-len(points) // MOST)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return {
        "step": [sum(step for step, _ in part) / len(part) for part in parts],
        "value": [sum(value for _, value in part) / len(part) for part in parts],
    }
