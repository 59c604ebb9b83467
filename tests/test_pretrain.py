"""The small base of a planted world: its tokenizer, its training, and the cache that it is made in once."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mass import model, pretrain, worlds
from mass.errors import MassError
from mass.prompts import make_prompts

WORDS = worlds.Families().words


def test_the_tokenizer_gives_the_text_back_in_one_token_a_word(tmp_path: Path) -> None:
    tokenizer = pretrain.word_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for _ in range(200):
        lesson = worlds.Families(noise=0.2).lesson(rng)
        target = lesson.target or "a b c 0 0 times 2"
        text = f"Problem: {target}\nNew problem: {lesson.problem}\nSolution: {lesson.solution}\n\nProblem: a"
        ids = again.encode(text, add_special_tokens=False)
        assert again.unk_token_id not in ids and again.decode(ids) == text
        words = text.replace("New problem:", "New problem").split()
        assert len(ids) == len(words) + text.count("\n") - text.count("\n\n")
    assert again.encode(" hello") == [again.unk_token_id] and again.eos_token == "<eos>"


def test_a_lesson_is_what_generation_asks_for_and_practice_trains_on() -> None:
    prompts = make_prompts(pretrain.word_tokenizer(WORDS), "plain", "", "")
    text = prompts.tokenizer.decode
    solved = worlds.Lesson("a b c 1 2 check", "Answer: 1 : w 3 4\nCheck: x y w yes", shots=(("p", "s"),))
    tokens, asked = pretrain._encode(prompts, solved)
    assert tokens[:asked] == prompts.solve(solved.problem, solved.shots)
    assert text(tokens[asked:]) == " Answer: 1 : w 3 4\nCheck: x y w yes\n\n"
    made = solved._replace(target="a b c 5 6 times 4", shots=())
    tokens, asked = pretrain._encode(prompts, made)
    assert tokens[:asked] == prompts.generate("a b c 5 6 times 4")
    assert text(tokens[asked:]) == f" {made.problem}\nSolution: {made.solution}\n\n"


def lesson(rng: random.Random) -> worlds.Lesson:
    """A world of one certain answer."""
    return worlds.Lesson(f"a {rng.randrange(10)}", "Answer: 7")


def test_pretraining_learns_and_repeats_itself(tmp_path: Path) -> None:
    said: list[str] = []
    before = torch.get_rng_state()
    for name in ("one", "two"):
        pretrain.pretrain(tmp_path / name, ["a", *"0123456789"], lesson, 12, 3, said.append)
    assert torch.equal(torch.get_rng_state(), before)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(x, two[key]) for key, x in one.items())
    assert said[-1].startswith("  step 12/12") and len(said) == 2
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    prompts = make_prompts(AutoTokenizer.from_pretrained(tmp_path / "one"), "plain", "", "")
    asked = prompts.solve("a 3")
    written = [*asked, *prompts.solution("Answer: 7")]
    logprob = hf(torch.tensor([written])).logits.log_softmax(-1)[0, len(asked) - 1 : -1]
    picked = logprob.gather(1, torch.tensor(written[len(asked) :]).unsqueeze(1)).exp()
    assert picked.min() > 0.8, "it has seen nothing else"


def test_the_padding_of_a_batch_does_not_count() -> None:
    torch.manual_seed(0)
    tokenizer = pretrain.word_tokenizer(WORDS)
    hf = pretrain.LlamaForCausalLM(pretrain.config_of(tokenizer)).double()
    batch = [([5, 6, 7, 8, 9, 10, 11], 3), ([5, 6, 7, 12], 2), ([9, 8], 1)]
    loss = pretrain._backward(hf, batch, tokenizer.pad_token_id)
    batched = [p.grad.clone() for p in hf.parameters() if p.grad is not None]
    hf.zero_grad()
    total = 0.0
    for tokens, asked in batch:
        logprob = hf(torch.tensor([tokens])).logits[0].log_softmax(-1)
        one = -sum(logprob[i - 1, tokens[i]] for i in range(asked, len(tokens))) / 7
        one.backward()
        total += one.item()
    assert loss == pytest.approx(total, rel=1e-12)
    alone = [p.grad for p in hf.parameters() if p.grad is not None]
    assert all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(batched, alone, strict=True))


def test_a_base_is_made_once_and_again_for_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"planted": {"steps": 1}}
    first, _ = model.load("world:planted", dtype="fp32", device="cpu", cache=tmp_path, world=settings)
    said = capsys.readouterr().err
    assert "pre-training the base model of world:planted once" in said and "step 1/1" in said
    again, _ = model.load("world:planted", dtype="fp32", device="cpu", cache=tmp_path, world=settings)
    assert "pre-training" not in capsys.readouterr().err
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), again.parameters(), strict=True))
    settings["planted"]["seed"] = 1
    other, _ = model.load("world:planted", dtype="fp32", device="cpu", cache=tmp_path, world=settings)
    assert any(not torch.equal(x, y) for x, y in zip(first.parameters(), other.parameters(), strict=True))
    assert len([x for x in (tmp_path / "world").iterdir() if x.is_dir()]) == 2
    with pytest.raises(MassError, match="no world 'world:plant'"):
        model.load("world:plant", cache=tmp_path)
