"""mass.prepare: what a run is planned for, before its first step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mass import lora, memory, prepare
from mass.batch import Packed, Sequence, pack
from mass.blocks import attends_fully
from mass.distributed import World
from mass.errors import MassError
from mass.practice import pack_examples, solve_sequence
from mass.prompts import Example
from mass.recipe import load
from mass.setting import draw_shots
from mass.splits import Cursor

ROOT = Path(__file__).parent.parent
T, N = 2, 3


@pytest.mark.parametrize("shots", [1, 6])
@pytest.mark.parametrize("loss", ["gold", "verifier"])
def test_training_problems_that_do_not_fit_the_context_are_named(loss: str, shots: int) -> None:
    """Each sequence that a step makes is looked at, and no problem that fits is refused."""
    words = [f"outer.loss={loss}", f"prompt.solve_shots={shots}", "meta_gradient.mode=reverse"]
    recipe = load(ROOT / "recipes/smoke.yaml", words)
    tasks, _, pool = prepare.tasks_of(recipe)
    setting, _ = prepare.make_setting(recipe, World(0, 1, torch.device("cpu")), pool, None)
    prepare.check_context(setting, tasks)
    need = {}
    for task, own in zip(tasks, draw_shots(setting, tasks), strict=True):
        text, g = task.problem.text, recipe.generate
        written = len(setting.prompts.generate(text, own.generate)) + g.max_new_tokens
        answered = len(setting.prompts.solve(text, own.solve)) + g.answer_tokens
        solved = len(solve_sequence(setting.prompts, text, task.solution, own.solve).tokens)
        need[task.problem.id] = max(written, solved if loss == "gold" else answered)
    most, next_most = sorted(set(need.values()), reverse=True)[:2]
    config = setting.lm.hf.config
    config.max_position_embeddings = most
    prepare.check_context(setting, tasks)
    config.max_position_embeddings = next_most
    longer = [name for name, size in need.items() if size == most]
    with pytest.raises(MassError, match=rf"{len(longer)} problems.*context of {next_most} tokens: ") as error:
        prepare.check_context(setting, tasks)
    assert all(name in str(error.value) for name in longer[:5])
    config.max_position_embeddings = 10
    with pytest.raises(MassError, match=rf"problems.train: {len(tasks)} problems.*, \.\.\.\. Take them out"):
        prepare.check_context(setting, tasks)


@pytest.mark.parametrize("shots", [0, 3])
def test_auto_plans_for_the_shots_that_a_step_shows(shots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Packed] = []
    told: dict[str, Any] = {}

    def choose(hf: Any, parts: Any, shape: Any, inner: Packed, outer: Packed, **how: Any) -> memory.Choice:
        planned.extend((inner, outer))
        told.update(how)
        return memory.Choice("reverse", True, False, memory.Peak(0, 0, 0), "")

    monkeypatch.setattr(memory, "choose", choose)
    recipe = load(
        ROOT / "recipes/smoke.yaml",
        [
            f"outer.tasks={T}",
            f"generate.examples={N}",
            f"prompt.solve_shots={shots}",
            f"prompt.generate_shots={shots}",
            "outer.micro_rows=4",
            "prompt.pool=8",
            "meta_gradient.mode=auto",
        ],
    )
    tasks, _, pool = prepare.tasks_of(recipe)
    setting, _ = prepare.make_setting(recipe, World(0, 1, torch.device("cpu")), pool, None)
    some = Cursor(tasks, 0).next(T)
    shown = [own.solve for own in draw_shots(setting, some)]
    # as long as it may get: what is generated is the problem, the line break with "Solution: ", and the solution
    text = "x" * (recipe.generate.max_new_tokens - len("0\nSolution: 1"))
    own = [Example(f"{n}{text}", "1", True, "") for n in range(N)]
    packed, valid_TN = pack_examples(setting.lm, setting.prompts, [own] * T, shown)
    inner, outer = planned
    assert valid_TN.all()
    assert inner.length_TN.shape == (T, N) and (inner.length_TN >= packed.length_TN).all()
    # the shots stand once in a row, as in the step: planned for is what is there, and little more
    assert packed.size <= inner.size <= 1.2 * packed.size
    for task, own_shots in zip(some, shown, strict=True):
        asked = solve_sequence(setting.prompts, task.problem.text, task.solution, own_shots).prompt
        assert asked <= outer.length_TN[0, 0] - recipe.generate.answer_tokens
    # the generator's policy gradient: the examples of one task of two, behind the prompts that they are written after
    new, lm = recipe.generate.max_new_tokens, setting.lm
    for task, own_shots in zip(some, draw_shots(setting, some), strict=True):
        asked_for = setting.prompts.generate(task.problem.text, own_shots.generate)
        rows = [[Sequence([*asked_for, *[n] * new], len(asked_for)) for n in range(N)]]
        taken = pack(rows, lm.tokenizer.pad_token_id, share=attends_fully(lm.hf))
        assert taken.size <= told["policy"].size <= 1.2 * taken.size
    assert told["with_kl"] and told["loops"] == 1


def test_auto_plans_for_no_generator_where_none_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[bool, int]] = []

    def choose(*_: Any, **how: Any) -> memory.Choice:
        told.append((how["policy"] is None, how["loops"]))
        return memory.Choice("reverse", True, False, memory.Peak(0, 0, 0), "")

    monkeypatch.setattr(memory, "choose", choose)
    for changes in (
        ["outer.generator=0"],
        ["outer.lr_policy=0", "outer.credit=uniform"],
        ["outer.credit=uniform"],
        ["outer.credit=left_out", "inner.steps=2"],
        ["outer.credit=left_out", "inner.steps=1"],
    ):
        recipe = load(ROOT / "recipes/smoke.yaml", ["meta_gradient.mode=auto", *changes])
        prepare.make_setting(recipe, World(0, 1, torch.device("cpu")), [], None)
    assert told == [(True, 1), (True, 1), (False, 2), (False, 2), (False, 4)]


def test_a_model_without_blocks_is_not_recomputed_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> None:
        raise MassError("its blocks were not found.")

    monkeypatch.setattr(prepare.blocks, "split", lost)
    own = ["inner.checkpoint=true", "meta_gradient.mode=reverse"]
    recipe = load(ROOT / "recipes/smoke.yaml", own)
    _, _, pool = prepare.tasks_of(recipe)
    with pytest.raises(
        MassError, match="not found.*inner.checkpoint=true needs the blocks too: set it to false"
    ):
        prepare.make_setting(recipe, World(0, 1, torch.device("cpu")), pool, None)


def test_a_resumed_run_keeps_its_engine_until_something_else_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto` again with the memory and the recomputation that were asked for when the run began, and with others."""
    monkeypatch.setattr(
        memory,
        "choose",
        lambda *_, **__: memory.Choice("blockwise", True, True, memory.Peak(0, 0, 0), "chosen"),
    )

    def engine(*words: str, mode: str = "auto", **began: Any) -> tuple[str, bool, bool, str]:
        recipe = load(ROOT / "recipes/smoke.yaml", [f"meta_gradient.mode={mode}", *words])
        kept = {"engine": ["finite_difference", False, False]} | began
        setting, _ = prepare.make_setting(recipe, World(0, 1, torch.device("cpu")), [], kept)
        return setting.engine, setting.recompute, setting.checkpoint, setting.why

    as_begun = ("finite_difference", False, False, "as the run began")
    again = ("blockwise", True, True, "chosen")
    on, off = "inner.checkpoint=true", "inner.checkpoint=false"
    assert engine(off, asked=["auto", None, False]) == as_begun
    assert engine(off) == as_begun, "a checkpoint of before this was saved"
    assert engine(on, asked=["auto", None, False]) == again
    assert engine(off, "meta_gradient.memory_gb=2", asked=["auto", None, False]) == again
    assert engine(off, asked=["finite_difference", None, False]) == again, "what nobody asks for is exact"
    assert engine(off, mode="reverse", asked=["auto", None, False])[0] == "reverse"
    assert engine(off, engine=["none", True, False], asked=["auto", None, False]) == again


@pytest.mark.parametrize("stage", [0, 2])
def test_auto_leaves_room_for_what_is_made_after_it_has_chosen(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy with its gradient and moments, and the copy that a step works with."""
    told: dict[str, Any] = {}

    def choose(*_: Any, **how: Any) -> memory.Choice:
        told.update(how)
        return memory.Choice("reverse", True, False, memory.Peak(0, 0, 0), "")

    monkeypatch.setattr(memory, "choose", choose)
    words = ["meta_gradient.mode=auto", "meta_gradient.truncate=1", f"zero.stage={stage}"]
    recipe = load(ROOT / "recipes/smoke.yaml", words)
    setting, _ = prepare.make_setting(recipe, World(0, 1, torch.device("cpu")), [], None)
    size = sum(x.nbytes for x in lora.fresh(setting.lm.lora, recipe.lora.rank, torch.Generator()).values())
    # value, gradient, two moments and the copy; a sharded optimizer has a master copy, too
    assert told["taken"] == (5 if stage == 0 else 6) * size and told["truncate"] == 1
