"""Fixtures that several test files share. A test that changes one makes its own.

What is large is imported where it is used: the process that hands tests out to pytest-xdist's workers reads this file and runs none.
"""

from __future__ import annotations

import os

# two cores are shared by all that runs here; set before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mass.choices import Kit
    from mass.model import LanguageModel
    from mass.practice import Practice


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files with the most slow tests first, so that no process is left with a long one at the end.

    Takes effect with `-n 2 --dist loadfile --no-loadscope-reorder`: by itself pytest-xdist starts with the files
    that have the most tests, and these are the quickest."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from mass.tiny import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama() -> PreTrainedModel:
    """A random two-layer Llama in float64, without LoRA slots."""
    from tiny import tiny

    return tiny("llama")[0]


@pytest.fixture(scope="session")
def tiny_llama_lm() -> LanguageModel:
    """The same with empty LoRA slots of rank 2 on every linear layer."""
    from tiny import tiny_lm

    return tiny_lm("llama")


@pytest.fixture(scope="module")
def llama() -> Any:
    """A model of tests/writers.py."""
    from writers import build

    return build()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tests/chain.py's model."""
    from chain import save_chain

    return save_chain(tmp_path_factory.mktemp("model") / "chain")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, chain: Path) -> Path:
    """A recipe on the chain model and problems that it can solve by luck."""
    from runs import write_recipe

    return write_recipe(tmp_path_factory.mktemp("recipe"), chain)


@pytest.fixture(scope="module")
def kit() -> Kit:
    """Test time on a tiny random model, four examples a problem."""
    from tiny import tiny_kit

    return tiny_kit(examples=4)


@pytest.fixture
def handmade(monkeypatch: pytest.MonkeyPatch) -> None:
    """GOOD of tests/handmade.py as what the model writes, three tokens each."""
    from handmade import GOOD, PROBLEMS

    import mass.methods  # noqa: F401  (all that a method chooses from)
    from mass import choices
    from mass.generate import Rollout
    from mass.practice import Practice, pack_examples
    from mass.prompts import Example

    def read(
        lm: LanguageModel, prompts: Any, targets: Sequence[str], rollouts: Any, solve_shots: Any
    ) -> Practice:
        ids = {p.text: p.id for p in PROBLEMS}
        examples = [
            [
                Example("", "", False, "empty") if x is None else Example(x[0], x[1], True, "")
                for x in GOOD[ids[text]]
            ]
            for text in targets
        ]
        packed, valid_TN = pack_examples(lm, prompts, examples, solve_shots)
        return Practice([], rollouts, examples, packed, valid_TN)

    three = [Rollout([1, 2, 3], [0.0] * 3, True, "")] * 3
    monkeypatch.setattr(choices.examples, "written", lambda kit, asked, *_, **__: [three] * len(asked))
    monkeypatch.setattr(choices.examples, "read_examples", read)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model states no answer: its first character counts as one."""
    import mass.methods  # noqa: F401  (all that a method chooses from)
    from mass import choices, method

    stated = lambda text, **_: text[:1] or None  # noqa: E731
    for module in (
        choices.answers,
        choices.examples,
        choices.gates,
        choices.kit,
        choices.weights,
        choices.signals,
        method,
    ):
        monkeypatch.setattr(module, "find_answer", stated)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a recipe file of a text."""

    def write(text: str) -> Path:
        path = tmp_path / "some.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 640 KiB: it takes one save of a tiny run and a part of the next."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        # nothing else makes a disk that is truly full; a full one that is only pretended is tested everywhere
        pytest.skip(f"mounting a small disk needs root: {mounted.stderr.strip()}")
    yield folder
    # lazily, since this process may hold a lock in it
    subprocess.run(["umount", "-l", str(folder)], check=True)
