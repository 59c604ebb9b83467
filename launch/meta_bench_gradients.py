"""Meta-gradients of K inner steps: time, memory and error of our engines and of the peers.

All rows compute the same thing: dL/dw of the example weights (`--init`: also dL/dphi_0) through K SGD steps on N weighted
examples, rank-8 LoRA on every linear layer of a random model of SmolLM2-135M's shape (or --shape's); losses are on the
second half of each sequence's tokens, and L is that of one more sequence a task.
"""

import argparse
import ctypes
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from meta_bench_methods import (
    LORA,
    METHODS,
    SHAPES,
    Row,
    Setup,
    build,
    outer_only,
    task,
    unrolled,
    wait,
    warm,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mass.memory import predict

OURS = ["reverse", "blockwise", "blockwise_kept", "finite_difference", "finite_difference_one"]
# How the memory model is asked for them.
PREDICT: dict[str, dict[str, Any]] = {
    "reverse": {"engine": "reverse"},
    "blockwise": {"engine": "blockwise", "checkpoint": True},
    "blockwise_kept": {"engine": "blockwise", "recompute": False},
    "finite_difference": {"engine": "finite_difference"},
    "finite_difference_one": {"engine": "finite_difference", "keep_grads": True},
}
# Those that keep a whole graph: of one task at a time it is no large one.
ALONE = ["reverse", "blockwise_kept"]
ENGINES = ["first_order", "unrolled", "torchopt", "higher", *OURS]

EXAMPLES, REAL_EXAMPLES, REAL_TASKS = 4, 6, 8
# Errors are measured on a shallow model: float64 unrolling at full depth takes tens of GB.
ERROR_LAYERS, ERROR_TOKENS, ERROR_TASKS = 4, 32, 2

COLUMNS = {
    "case": ("case", ""),
    "engine": ("engine", ""),
    "K": ("K", "d"),
    "tokens": ("tokens", "d"),
    "tasks": ("tasks", "d"),
    "at_once": ("at once", "d"),
    "seconds": ("seconds", ".2f"),
    "time_ratio": ("/ first order", ".2f"),
    "sweep_ratio": ("sweep / first order", ".2f"),
    "peak_gb": ("peak GB", ".3f"),
    "peak_ratio": ("/ first order", ".2f"),
    "predicted_gb": ("predicted GB", ".3f"),
    "malloc_gb": ("as malloc leaves it", ".3f"),
    "products": ("products", ".2f"),
    "least": ("least", ".2f"),
    "rel_error": ("rel. error", ".1e"),
    "rel_error_init": ("of phi_0", ".1e"),
    "rel_error_fp64": ("in fp64", ".1e"),
}
NOTES = [
    "seconds: the K inner steps, the outer gradient and the way back; of `first_order` the K inner steps alone.",
    "peak GB: most memory during that, over what was held before (weights, adapter, data): on CUDA what is allocated, on a CPU "
    "what is resident, in a run of its own whose allocator gives freed blocks back (MALLOC_MMAP_THRESHOLD_=65536); as malloc "
    "leaves it: the same in the timed runs, with the blocks that the allocator keeps for later.",
    "products: matrix products (FLOPs) over those of K first-order steps, the outer gradient left out; least: what an exact method needs "
    "that saves everything and does nothing twice (2 a step; 1.5 for the step whose Hessian product nobody asked for).",
    f"rel. error: |dL/dw - truth| / |truth|, truth = float64 unrolling of the same case with {ERROR_LAYERS} layers, "
    f"{ERROR_TOKENS} tokens, up to {ERROR_TASKS} tasks; in fp64: the engine in float64 against it (Hugging Face's norms round to fp32).",
    "torchopt and higher take the tasks one by one (they have no task axis), on plain LoRA modules of the same shape.",
    f"case real: {REAL_TASKS} tasks x {REAL_EXAMPLES} ragged examples with masked prompts; ours packs them in one batch on a bf16 base, "
    "or (at once: 1) takes them one after another.",
]


# ---- cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="every K with every length and number of tasks")
    parser.add_argument("--shape", choices=SHAPES, default="SmolLM2-135M", help="of the model [SmolLM2-135M]")
    parser.add_argument("--layers", type=int, help="depth of the model [the shape's own]")
    parser.add_argument("--dtype", default="fp32", help="of the grid's base: bf16 or fp32 [fp32]")
    parser.add_argument(
        "--examples", type=int, default=EXAMPLES, help=f"of a task of the grid (N) [{EXAMPLES}]"
    )
    parser.add_argument("--init", action="store_true", help="also the gradient of the initial adapter")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")


def cases(args: argparse.Namespace) -> list[Row]:
    """The grid: K at 128 tokens and one task, then lengths, then tasks (at K = 2), then the real batch."""
    every = ([1, 2, 4, 8], [64, 128, 256, 512], [1, 4, 8])
    if args.full:
        grid = [(k, s, t) for t in every[2] for s in every[1] for k in every[0]]
    else:
        grid = [
            *((k, 128, 1) for k in every[0]),
            *((2, s, 1) for s in every[1]),
            *((2, 128, t) for t in every[2]),
        ]
    layers = args.layers or SHAPES[args.shape]["num_hidden_layers"]
    common = {"shape": args.shape, "layers": layers, "device": args.device, "init": args.init}
    plain = {"case": "grid", "examples": args.examples, "dtype": args.dtype} | common
    rows = [
        plain | {"engine": e, "K": k, "tokens": s, "tasks": t}
        for k, s, t in dict.fromkeys(grid)
        for e in ENGINES
    ]
    real = {"case": "real", "examples": REAL_EXAMPLES, "K": 2, "tokens": 128, "tasks": REAL_TASKS} | common
    together = [e for e in OURS if e != "finite_difference_one"]
    return [
        *rows,
        real | {"engine": "torchopt", "dtype": "fp32", "at_once": 1},
        *(real | {"engine": e, "dtype": "bf16", "at_once": REAL_TASKS} for e in together),
        *(real | {"engine": e, "dtype": "bf16", "at_once": 1} for e in ALONE),
    ]


def name(case: Row) -> str:
    """What --cases picks by: engine/K2/tokens128/tasks1, with real/ in front of the real batch's, and one_by_one behind those of
    ours that take its tasks one after another."""
    front = "real/" if case["case"] == "real" else ""
    back = "/one_by_one" if case["engine"] in OURS and case.get("at_once") == 1 else ""
    return f"{front}{case['engine']}/K{case['K']}/tokens{case['tokens']}/tasks{case['tasks']}{back}"


def finish(rows: list[Row]) -> list[Row]:
    """Ratios to the first-order row of the same case (the real batch: to TorchOpt's)."""
    keys = ("case", "K", "tokens", "tasks")
    against = {"grid": "first_order", "real": "torchopt"}
    base = {
        tuple(r[k] for k in keys): r for r in rows if r["engine"] == against[r["case"]] and "seconds" in r
    }
    for row in rows:
        own = base.get(tuple(row[k] for k in keys))
        if own and "seconds" in row:
            row["time_ratio"] = row["seconds"] / own["seconds"]
            row["peak_ratio"] = row["peak_gb"] / own["peak_gb"] if own["peak_gb"] else None
            if row.get("seconds_sweep") is not None and own["engine"] == "first_order":
                row["sweep_ratio"] = row["seconds_sweep"] / own["seconds"]
    return rows


def plot(rows: list[Row], axes: Any) -> None:
    """Time against memory: one line an engine, one point a K (marked), at the grid's first length and task count."""
    good = [r for r in rows if r["case"] == "grid" and "seconds" in r]
    spots = [(r["tokens"], r["tasks"]) for r in good]
    spot = max(set(spots), key=spots.count) if spots else (0, 0)
    for engine in ENGINES:
        own = [r for r in good if r["engine"] == engine and (r["tokens"], r["tasks"]) == spot]
        if own:
            axes.plot([r["peak_gb"] for r in own], [r["seconds"] for r in own], "o-", label=engine)
            for r in own:
                axes.annotate(
                    f"K={r['K']}",
                    (r["peak_gb"], r["seconds"]),
                    fontsize=7,
                    xytext=(3, 3),
                    textcoords="offset points",
                )
    axes.set(xscale="log", yscale="log", xlabel="peak memory over the weights, GB", ylabel="seconds")
    axes.set_title(f"{good[0]['examples'] if good else EXAMPLES} x {spot[0]} tokens, {spot[1]} task(s)")


# ---- one case, in its own process


def measure(case: Row) -> Row:
    """Time of one case; with `check`, instead, its memory, its error and its count of products."""
    torch.set_num_threads(case["threads"])
    return memory(case) | check(case) if case["check"] else timing(case)


def timing(case: Row) -> Row:
    """Seconds, whole and by stage, and what was resident meanwhile."""
    setup = build(case)
    method = METHODS[case["engine"]]
    method(warm(setup))
    before = reset_peak(case["device"])
    begin = time.perf_counter()
    answer = method(setup)
    wait(case["device"])
    row: Row = {"seconds": time.perf_counter() - begin, "malloc_gb": peak_since(case["device"], before) / 1e9}
    if case["engine"] == "first_order":
        row["seconds"] = answer.seconds["inner"]
    return row | {f"seconds_{stage}": value for stage, value in answer.seconds.items()}


def memory(case: Row) -> Row:
    """Peak over what was held before, and what the memory model says of it (our engines only)."""
    setup = build(case)
    method = METHODS[case["engine"]]
    method(warm(setup))
    before = reset_peak(case["device"])
    method(setup)
    row: Row = {"peak_gb": peak_since(case["device"], before) / 1e9}
    if case["engine"] in PREDICT:
        steps, init, how = setup.K, setup.init, PREDICT[case["engine"]]
        if setup.alone:
            each = [task(setup, t) for t in range(len(setup.each))]
            setup = max(each, key=lambda x: x.inner.tokens_TPS.numel())
        peak = predict(
            setup.hf,
            setup.parts,
            LORA,
            setup.inner,
            setup.outer,
            steps=steps,
            need_init=init,
            **({"keep_grads": False} | how),
        )
        row["predicted_gb"] = peak.total / 1e9
    return row


def check(case: Row) -> Row:
    """Errors against float64 unrolling on a shallow model, products counted at depths 1 and 2 and drawn out to the case's."""
    small = case | {"layers": min(case["layers"], ERROR_LAYERS), "tokens": min(case["tokens"], ERROR_TOKENS)}
    small |= {"tasks": min(case["tasks"], ERROR_TASKS)}
    row: Row = {}
    method = METHODS[case["engine"]]
    if case["engine"] != "first_order":
        truth = unrolled(build(small | {"dtype": "fp64"}))
        for key, dtype in (("", case["dtype"]), ("_fp64", "fp64")):
            got = method(build(small | {"dtype": dtype}))
            row[f"rel_error{key}"] = distance([got.weight_TN], [truth.weight_TN])
            if got.init is not None and truth.init is not None:
                row[f"rel_error_init{key}"] = distance(list(got.init.values()), list(truth.init.values()))
    flops = {engine: _products(case, METHODS[engine]) for engine in {case["engine"], "first_order"}}
    plain, outer = flops["first_order"], _products(case, outer_only)
    row["products"] = (flops[case["engine"]] - outer) / (plain - outer)
    if case["engine"] != "first_order":
        row["least"] = 2.0 if case["init"] else 2.0 - 0.5 / case["K"]
    return row


class Flops(TorchDispatchMode):
    """Sums the FLOPs of matrix products. (`FlopCounterMode` hangs hooks on modules, which fail in `autograd.grad`.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def _products(case: Row, method: Callable[[Setup], Any]) -> float:
    """FLOPs of matrix products at the case's depth. They are a line in the number of layers, so two depths give it."""
    found = []
    for layers in (1, 2):
        setup = build(case | {"layers": layers, "dtype": "fp32"})
        # the CPU's fused attention has no formula in the counter
        with sdpa_kernel(SDPBackend.MATH), Flops() as counter:
            method(setup)
        found.append(counter.total)
    return found[0] + (case["layers"] - 1) * (found[1] - found[0])


def distance(got: list[Tensor], truth: list[Tensor]) -> float:
    """|got - truth| / |truth| over all tensors."""
    gap = sum((a.double().cpu() - b.double().cpu()).square().sum() for a, b in zip(got, truth, strict=True))
    size = sum(b.double().cpu().square().sum() for b in truth)
    return float(torch.as_tensor(gap / size).sqrt())


def reset_peak(device: str) -> float:
    """Forget the peak so far; returns the bytes held now: what PyTorch holds on a GPU, on a CPU what is resident."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        # give back what loading has freed, it would hide as much of the case's own
        libc.malloc_trim(0)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        # 5: the high-water mark of resident memory starts again from here (proc(5))
        clear.write_text("5")
    return _resident("VmRSS")


def peak_since(device: str, before: float) -> float:
    """The most bytes held since reset_peak() gave `before`, over that."""
    return (_resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()) - before


def _resident(field: str) -> float:
    """Bytes by /proc/self/status; NaN where there is none. getrusage() will not do: a process starts with its parent's mark
    there, and keeps it as a floor."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return float(found[0]) * 1024.0 if found else math.nan
