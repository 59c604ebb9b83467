"""Rows of problems as files and datasets have them: read, parsed, and checked value by value. No torch here.

A row that cannot be used is a ValueError without a place; whoever reads on says which line it was.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mass import rewards
from mass.errors import MassError

COLUMNS = {"problem": "problem", "answer": "answer", "solution": "solution", "id": "id"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?")
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's marks
_SURROGATE = re.compile("[\ud800-\udfff]")


def column_names(columns: Mapping[str, str] | None) -> dict[str, str]:
    """COLUMNS with the user's own names in it. Raises MassError for a key that it has not."""
    unknown = sorted(set(columns or {}) - set(COLUMNS))
    if unknown:
        raise MassError(f"problems.columns has no key {unknown[0]!r}; it has {', '.join(COLUMNS)}.")
    return {**COLUMNS, **(columns or {})}


def read_file(path: str) -> bytes:
    """All of a file of problems. Raises MassError where it cannot be read."""
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise MassError(f"There is no problem file {path}.") from None
    except OSError as error:
        raise MassError(f"The problem file {path} cannot be read: {error.strerror}.") from error


def json_lines(data: bytes) -> Iterator[tuple[int, Any]]:
    """(line number from 1, parsed line or the ValueError that says why not); empty lines are passed over."""
    for line, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            yield line, json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield line, ValueError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
        except (ValueError, RecursionError) as error:
            yield line, ValueError(f"not JSON ({error})")


def dataset_rows(name: str, split: str, names: dict[str, str]) -> list[tuple[int, Any]]:
    """(number from 0, row) of a split of a Hugging Face dataset: a local folder, a hub id, or one with `:config`.

    Raises MassError where there is none such, or it has no column of problems.
    """
    folder, _, config = (name, "", "") if Path(name).expanduser().exists() else name.partition(":")
    local = Path(folder).expanduser()
    if not local.is_dir() and not _HUB_ID.fullmatch(name):
        raise MassError(
            f"Problem source {name!r} is neither a file or folder that exists, nor a hub id owner/name, nor gym:NAME, nor world:NAME."
        )
    import datasets

    try:
        rows = datasets.load_dataset(str(local) if local.is_dir() else folder, config or None, split=split)
    except Exception as error:  # the hub client raises requests', fsspec's and its own errors
        first = str(error).strip().partition("\n")[0]
        raise MassError(
            f"The dataset {name} (split {split!r}) cannot be loaded: {type(error).__name__}: {first}. Check "
            "problems.train or problems.heldout, problems.split or problems.heldout_split, and the network."
        ) from error
    if names["problem"] not in rows.column_names:
        raise MassError(
            f"The dataset {name} has no column {names['problem']!r}; it has {', '.join(rows.column_names)}. "
            "Set problems.columns.problem (and answer, solution)."
        )
    return list(enumerate(rows))


def as_object(row: Any) -> dict[str, Any]:
    """The row itself. Raises ValueError where it is no JSON object, or raises the one that it is."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {type(row).__name__}")
    return row


def text_of(row: Mapping[str, Any], key: str) -> str:
    """The value of `key` as text without outer space, "" where it is absent or null."""
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, (list, dict)):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not text")
    return _encodable(str(value).strip(), key)


def _encodable(text: str, key: str) -> str:
    if _SURROGATE.search(text):  # JSON can write one alone; no tokenizer, hash or file takes it
        raise ValueError(f"{key!r} holds half of a surrogate pair, which is no Unicode text")
    return text


def reference(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, str]:
    """(answer, solution) of a row, which may state the answer in only one of the two. Raises ValueError if in none."""
    answer, solution = text_of(row, names["answer"]), text_of(row, names["solution"])
    if "####" in answer:  # GSM8K as on the hub
        text, _, answer = (part.strip() for part in answer.rpartition("####"))
        solution = solution or _CALCULATOR.sub("", text)
    elif stated := rewards.find_answer(answer):
        answer, solution = stated, solution or answer
    if not answer:  # MATH as on the hub
        answer = rewards.find_answer(solution) or ""
    if not answer:
        raise ValueError(f"no {names['answer']!r}, and none is stated in {names['solution']!r}")
    return answer, solution


def content(text: str) -> str:
    """The text without regard to case, spacing and Unicode form: what equal problems have in common."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_key(text: str) -> str:
    """16 hex digits of the text's `content`: equal problems, equal keys."""
    return hashlib.sha256(content(text).encode()).hexdigest()[:16]
