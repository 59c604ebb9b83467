"""mass.adapt: the function, on models in memory that are left as they were found."""

import importlib
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from chain import save_chain
from peft import LoraConfig, get_peft_model
from ranks import Ranks
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import mass
from mass import choices, filerun
from mass.errors import MassError
from mass.kit import build_kit
from mass.lora import LoraLinear, LoraShape, attach, fresh, save_peft
from mass.methods import Record, solve
from mass.problems import Problem, as_problems
from mass.wanted import plan

PLAIN = {
    "prompt.style": "plain",
    "generate.examples": 3,
    "generate.max_new_tokens": 16,
    "generate.answer_tokens": 8,
}
PROBLEMS = ["What is 3 - 2?", "What is 9 - 7? Take care.", "What is 5 - 2?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As a user may have them: a part in train mode, parameters that want gradients, a gradient, hooks (of accelerate too),
    no pad token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    for module in (model.model.layers[0], model.model.layers[1].mlp.up_proj):
        add_hook_to_module(module, ModelHook())
    return model, tokenizer


def state(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that could have changed. Tensors by identity and by value."""
    out: dict[str, Any] = {"pad": tokenizer.pad_token, "config": model.config.to_dict(), "grad mode": torch.is_grad_enabled()}  # fmt: skip
    for name, module in model.named_modules():
        out[name] = (
            id(module),
            type(module),
            module.training,
            [*module.__dict__],
            [*module._modules],
            module.forward,
        )
        out[f"{name} hooks"] = [
            list(value) for key, value in module.__dict__.items() if "hooks" in key and value
        ]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        out[f"tensor {name}"] = (
            id(tensor),
            tensor.data_ptr(),
            tensor.dtype,
            tensor.requires_grad,
            tensor._version,
        )
        out[f"value {name}"] = tensor.detach().numpy().tobytes()
        out[f"grad {name}"] = None if tensor.grad is None else tensor.grad.numpy().tobytes()
    return out


@contextmanager
def untouched(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Iterator[None]:
    before = state(*loaded)
    yield
    after = state(*loaded)
    assert [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)] == []


def same(one: Record, other: Record) -> bool:
    return {**vars(one), "seconds": 0} == {**vars(other), "seconds": 0}


def test_same_records_as_the_command_and_the_model_is_untouched(loaded: Any, folder: Path) -> None:
    with untouched(loaded):
        records = mass.adapt(
            *loaded, [*PROBLEMS, ""], method="quest", settings=PLAIN, batch=2, baselines=False
        )
    assert [r.problem for r in records] == [*PROBLEMS, ""] and records[3].error
    assert sum(bool(r.steps) for r in records) >= 2
    kit = build_kit(
        plan(None, str(folder), [f"{key}={value}" for key, value in PLAIN.items()] + ["model.dtype=fp32"])
    )
    # in the batches that the length gives: the second and one more, the rest
    items = as_problems(PROBLEMS)
    alone = [
        r for part in ([1, 0], [2]) for r in solve(kit, [items[i] for i in part], "quest", baselines=False)
    ]  # type: ignore[misc]
    assert all(same(records[i], r) for i, r in zip((1, 0, 2), alone, strict=True))
    # and once more on the same model
    again = mass.adapt(*loaded, PROBLEMS[0], settings=PLAIN, baselines=False)
    assert len(again) == 1 and (again[0].method, again[0].answer) == ("quest", records[0].answer)


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["update", "decode", "load"])
def test_untouched_after_an_exception(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    calls = []

    def late(module: nn.Module, *_: Any) -> None:
        calls.append(module)
        if len(calls) == 12:
            raise error

    if where == "update":
        monkeypatch.setattr(choices.updates, "fine_tune", fail)
    if where == "load":
        monkeypatch.setattr("mass.kit.make_prompts", fail)
    handle = loaded[0].model.embed_tokens.register_forward_pre_hook(late) if where == "decode" else None
    with untouched(loaded), pytest.raises(type(error)):
        mass.adapt(*loaded, PROBLEMS, settings=PLAIN, batch=3, baselines=False)
    if handle:
        handle.remove()
    assert not any(isinstance(module, LoraLinear) for module in loaded[0].modules())


def test_a_run_or_a_peft_folder_on_a_model_in_memory(loaded: Any, folder: Path, tmp_path: Path) -> None:
    shape = LoraShape(2, 4.0, ("q_proj", "down_proj"))
    other = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    policy = {key: x + 0.3 * torch.randn(x.shape, generator=generator) for key, x in fresh(attach(other, shape), 2, generator).items()}  # fmt: skip
    save_peft(tmp_path / "peft", policy, shape, str(folder))
    with untouched(loaded):
        moved, plain = (
            mass.adapt(*loaded, PROBLEMS, method="none", settings=PLAIN, run=run, baselines=False)
            for run in (tmp_path / "peft", None)
        )
    assert [r.solution for r in moved] != [r.solution for r in plain]
    with untouched(loaded), pytest.raises(MassError, match="there is no such folder"):
        mass.adapt(*loaded, PROBLEMS, run=tmp_path / "none")


def test_what_is_wrong_is_said_before_the_model_is_touched(loaded: Any) -> None:
    model, tokenizer = loaded
    with untouched(loaded):
        for words, sentence in [
            ({"method": "mass"}, "method mass weighs by a trained scorer"),
            ({"method": "mas"}, "did you mean mass"),
            ({"settings": {"inner.step": 1}}, "inner.step: unknown key"),
            ({"batch": 0}, "batch=0: it wants 1 or more"),
        ]:
            with pytest.raises(MassError, match=sentence):
                mass.adapt(model, tokenizer, PROBLEMS, **words)  # type: ignore[arg-type]
        assert mass.adapt(model, tokenizer, [], settings=PLAIN) == []
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(MassError, match=r"is a PeftModel.*merge_and_unload\(\)"):
        mass.adapt(wrapped, tokenizer, PROBLEMS)


def test_problems_from_python() -> None:
    found = as_problems(
        ["a", {"problem": "b", "id": 7, "demonstrations": [["x", "y"]]}, Problem("7", "c"), 3, {"x": 1}]
    )
    assert found[1] == Problem("7", "b", (("x", "y"),)) and found[2] == Problem("7#2", "c")
    assert [type(item).__name__ for item in found] == ["Problem"] * 3 + ["BadLine"] * 2
    assert as_problems("a") == as_problems(["a"]) == [found[0]]
    assert as_problems({"problem": "a"}) == [found[0]] and as_problems(Problem("i", "t")) == [
        Problem("i", "t")
    ]


def named() -> None:
    """In a process that has not asked for it before."""
    assert "mass.adapt.__main__" not in sys.modules
    import mass.adapt as again
    import mass.adapt.__main__  # noqa: F401
    from mass import adapt

    assert adapt is again is mass.adapt and mass.adapt.__name__ == "adapt", mass.adapt


def as_module() -> None:
    """`python -W error::RuntimeWarning -m mass.adapt --help`"""
    warnings.simplefilter("error", RuntimeWarning)
    sys.argv[1:] = ["--help"]
    runpy.run_module("mass.adapt", run_name="__main__", alter_sys=True)


@pytest.mark.multiprocess
def test_the_name_is_the_function_whatever_was_imported(ranks: Ranks) -> None:
    assert importlib.import_module("mass.adapt").adapt is mass.adapt and callable(mass.adapt)
    ranks("test_library:named").good()
    light = "import sys, mass, mass.recipe, mass.rewards; assert not {'torch', 'transformers', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True)
    said = ranks("test_library:as_module").good().out[0]
    assert said.startswith("usage: mass-adapt"), said
    assert filerun.adapt_problems.__module__ == "mass.filerun"
