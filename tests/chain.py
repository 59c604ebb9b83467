"""A tiny model that writes well-formed practice examples, so that whole runs have a signal without any pretrained model.

Its tokens for the parts of an example are chained: behind ` problem:`, the last label of the prompt, it writes ` a +`, ` b =`, a newline and
`Solution:`, ` Answer:`, ` d` and a blank line, with the digits nearly at random; everything else of it is random and
small. A run on it does all that a run does: sampling, parsing, verifying (a third of the answers are right), learning.
"""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mass.tiny import byte_tokenizer

LABELS = ["Problem:", " problem:", "\nSolution:", " Answer:", "\n\n", "<|user|>", "<|assistant|>"]
FIRST, SECOND, DIGITS = [f" {i} +" for i in range(10)], [f" {i} =" for i in range(10)], [" 1", " 2", " 3"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WIDTH = 64
# logit of a wanted continuation over the others: about one token in thirty strays, so some examples are malformed
GAP = 9.0


def save_chain(folder: Path) -> Path:
    """Write the model as a Hugging Face folder; always the same weights."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([*LABELS, *FIRST, *SECOND, *DIGITS])
    tokenizer.chat_template = TEMPLATE
    ends = {token: tokenizer.convert_tokens_to_ids(token) for token in [*LABELS, *FIRST, *SECOND, *DIGITS]}
    ends["<eos>"] = tokenizer.eos_token_id
    follow: dict[str, list[str]] = {
        " problem:": FIRST,
        "<|assistant|>": ["Problem:"],
        "Problem:": FIRST,
        **dict.fromkeys(FIRST, SECOND),
        **dict.fromkeys(SECOND, ["\nSolution:"]),
        "\nSolution:": [" Answer:"],
        " Answer:": DIGITS,
        **dict.fromkeys(DIGITS, ["\n\n", "<eos>"]),
        "\n\n": ["<eos>"],
    }
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    hf = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight *= 0.15
            layer.mlp.down_proj.weight *= 0.15
        embed, head = hf.model.embed_tokens.weight, hf.lm_head.weight
        # one direction for each kind of token with a known successor; bytes live in the other directions
        kinds = [
            " problem:",
            "<|assistant|>",
            "Problem:",
            FIRST,
            SECOND,
            "\nSolution:",
            " Answer:",
            DIGITS,
            "\n\n",
        ]
        embed[:, : len(kinds)] = 0
        embed[:, len(kinds) :] *= 10
        for i, kind in enumerate(kinds):
            for token in [kind] if isinstance(kind, str) else kind:
                embed[ends[token]] *= 0.1
                embed[ends[token], i] = WIDTH**0.5
            first = kind if isinstance(kind, str) else kind[0]
            head[[ends[token] for token in follow[first]], i] = GAP / WIDTH**0.5
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_problems(path: Path, count: int = 40) -> Path:
    """A JSONL file of sums whose answers are 1, 2 or 3, the digits that the chain model answers with."""
    rows = [
        {"id": f"p{i}", "problem": f"What is {i} - {i - 1 - i % 3}?", "answer": str(1 + i % 3)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
