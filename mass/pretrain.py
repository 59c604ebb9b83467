"""A small Llama trained from scratch on made-up lessons, in the plain style of mass/prompts.py: a planted world's base.

Two layers of width 96, about 0.22 M weights, a vocabulary of whole words; two minutes of one CPU core.
"""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mass.prompts import Prompts, make_prompts
from mass.worlds import Lesson

BATCH = 192
LR = 3e-3
# lessons are drawn and encoded once and met several times: encoding costs as much as learning otherwise
POOL = 100
LABELS = ("Problem:", "New", " problem:", "Solution:", "Answer:", "\n", "\n\n")


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, together with the space before it; labels of the plain style begin a line. Text comes back exactly."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = [
        *special,
        *LABELS,
        *(w for w in words if w.endswith(":")),
        *(f" {w}" for w in [*words, "Answer:"]),
    ]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(vocabulary))}, unk_token="<unk>")
    )
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n| ?[^ \n]+| "), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=512,
    )


def pretrain(
    folder: Path,
    words: Sequence[str],
    lesson: Callable[[random.Random], Lesson],
    steps: int,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Train the model and write it to `folder`: config, safetensors (fp32) and tokenizer. The same for the same arguments."""
    tokenizer = word_tokenizer(words)
    prompts = make_prompts(tokenizer, "plain", "", "")
    rng = random.Random(f"lessons:{seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = LlamaForCausalLM(config_of(tokenizer))
    pool = [_encode(prompts, lesson(rng)) for _ in range(min(steps, POOL) * BATCH)]
    optimizer = torch.optim.AdamW(hf.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=steps, pct_start=0.05, anneal_strategy="linear", cycle_momentum=False
    )
    begin, order = time.monotonic(), list(range(len(pool)))
    for step in range(steps):
        at = step * BATCH % len(pool)
        if at == 0:
            rng.shuffle(order)
        batch = [pool[i] for i in order[at : at + BATCH]]
        optimizer.zero_grad()
        loss = _backward(hf, batch, tokenizer.pad_token_id)
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            pace = (time.monotonic() - begin) / (step + 1)
            say(f"  step {step + 1}/{steps}, loss {loss:.3f}, {pace * (steps - step - 1):.0f} s left")
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config_of(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The size of every world's base model."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # at the usual 0.02 a model so narrow needs half of its steps to begin to learn
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def _encode(prompts: Prompts, lesson: Lesson) -> tuple[list[int], int]:
    """Tokens of a lesson, and how many of them are its prompt."""
    if lesson.target is None:
        asked = prompts.solve(lesson.problem, lesson.shots)
        return [*asked, *prompts.solution(lesson.solution)], len(asked)
    asked = prompts.generate(lesson.target)
    posed = prompts.tokenizer.encode(f" {lesson.problem}\nSolution:", add_special_tokens=False)
    return [*asked, *posed, *prompts.solution(lesson.solution)], len(asked)


def _backward(hf: LlamaForCausalLM, batch: Sequence[tuple[list[int], int]], pad: int) -> float:
    """Add the gradient of the mean cross-entropy of what follows the prompts; returns that mean."""
    batch, total = sorted(batch, key=lambda one: len(one[0])), 0.0
    count = sum(len(tokens) - asked for tokens, asked in batch)
    # in parts of like length: half of one rectangle would be padding
    for first in range(0, len(batch), BATCH // 6):
        part = batch[first : first + BATCH // 6]
        width = len(part[-1][0])
        ids = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens, _ in part])
        place = torch.arange(width)
        learned = torch.stack([(place >= asked) & (place < len(tokens)) for tokens, asked in part])[:, 1:]
        hidden = hf.model(input_ids=ids).last_hidden_state[:, :-1][learned]
        loss = F.cross_entropy(hf.lm_head(hidden), ids[:, 1:][learned], reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total
