"""The cache folder: what is made once for all processes, and is there whole or not at all."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from mass.errors import MassError


def cache_folder(cache: str | Path | None = None) -> Path:
    """`cache`, else $MASS_CACHE, else ~/.cache/mass."""
    return Path(cache or os.environ.get("MASS_CACHE") or "~/.cache/mass").expanduser()


def once(path: str, folder: Path, note: str, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` if it is not there: whole or absent, by one process at a time.

    `note` is said before it is made; `path` is the model.path that an error names. Raises MassError where it cannot be written.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():
                return folder
            # what a killed process left; the lock says that nobody is writing it now
            shutil.rmtree(partial, ignore_errors=True)
            say(note)
            try:
                make(partial)
                for written in partial.iterdir():
                    with open(written, "rb") as stream:
                        os.fsync(stream.fileno())
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise MassError(
            f"model.path={path}: cannot be made in the cache folder {folder.parent} ({first_line(error)}). "
            "Free some space there, or set model.cache (or MASS_CACHE) to another folder."
        ) from error
    return folder


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def say(text: str) -> None:
    """Tell the user what takes long."""
    # standard error: mass-adapt --json keeps standard output for its objects
    print(f"mass: {text}", file=sys.stderr, flush=True)
