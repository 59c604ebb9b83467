"""Meta-gradients of K inner steps: time, memory and error of our engines and of the peers.

All rows compute the same thing: dL/dw of the example weights (`--init`: also dL/dphi_0) through K SGD steps on N weighted
examples, rank-8 LoRA on every linear layer of a random model of SmolLM2-135M's shape; losses are on the second half of
each sequence's tokens, and L is that of one more sequence a task.
"""

import argparse
import ctypes
import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mass import lora, metagrad, optimizers
from mass.batch import Packed, Sequence, pack
from mass.blocks import Call, Split, differentiable_attention, enter, model_inputs, split
from mass.forward import example_loss, logits, loss_and_grad, token_logprobs
from mass.inner import Trajectory, adapt
from mass.lora import Adapter, Layers, LoraShape
from mass.metagrad import Products
from mass.optimizers import Rule

Row = dict[str, Any]

OURS = {
    "reverse": "reverse, each step recomputed",
    "blockwise": "reverse over forward, block by block",
    "blockwise_kept": "blockwise without recomputation",
    "finite_difference": "central differences",
    "finite_difference_one": "one-sided differences",
}
PEERS = {"torchopt": "TorchOpt MetaSGD", "higher": "higher innerloop_ctx"}
ENGINES = ["first_order", "unrolled", *PEERS, *OURS]

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
RANK, EXAMPLES, REAL_EXAMPLES, REAL_TASKS = 8, 4, 6, 8
LR = 0.1
# Errors are measured on a shallow model: float64 unrolling at full depth takes tens of GB.
ERROR_LAYERS, ERROR_TOKENS, ERROR_TASKS = 4, 32, 2

COLUMNS = {
    "case": ("case", ""),
    "engine": ("engine", ""),
    "K": ("K", "d"),
    "tokens": ("tokens", "d"),
    "tasks": ("tasks", "d"),
    "seconds": ("seconds", ".2f"),
    "time_ratio": ("/ first order", ".2f"),
    "sweep_ratio": ("sweep / first order", ".2f"),
    "peak_gb": ("peak GB", ".3f"),
    "peak_ratio": ("/ first order", ".2f"),
    "predicted_gb": ("predicted GB", ".3f"),
    "products": ("products", ".2f"),
    "least": ("least", ".2f"),
    "rel_error": ("rel. error", ".1e"),
    "rel_error_init": ("of phi_0", ".1e"),
    "rel_error_fp64": ("in fp64", ".1e"),
}
NOTES = [
    "seconds: the K inner steps, the outer gradient and the way back; of `first_order` the K inner steps alone.",
    "peak GB: most memory during that, over what was held before (weights, adapter, data).",
    "products: matrix products (FLOPs) over those of K first-order steps, the outer gradient left out; least: what an exact method needs "
    "that saves everything and does nothing twice (2 a step; 1.5 for the step whose Hessian product nobody asked for).",
    f"rel. error: |dL/dw - truth| / |truth|, truth = float64 unrolling of the same case with {ERROR_LAYERS} layers, "
    f"{ERROR_TOKENS} tokens, up to {ERROR_TASKS} tasks; in fp64: the engine in float64 against it (Hugging Face's norms round to fp32).",
    "torchopt and higher take the tasks one by one (they have no task axis), on plain LoRA modules of the same shape.",
    f"case real: {REAL_TASKS} tasks x {REAL_EXAMPLES} ragged examples with masked prompts; ours packs them in one batch on a bf16 base.",
]


@dataclass(frozen=True)
class Setup:
    """One model and one batch. `each` holds every task as a batch of its own, for the peers."""

    hf: PreTrainedModel
    layers: Layers
    parts: Split
    inner: Packed
    outer: Packed
    each: list[tuple[Packed, ...]]
    weight_TN: Tensor
    start: Adapter
    rule: Rule
    lr: dict[str, Tensor]
    K: int
    init: bool


@dataclass(frozen=True)
class Answer:
    """dL/dw [T, N], dL/dphi_0 when asked for, and seconds by stage."""

    weight_TN: Tensor
    init: Adapter | None
    seconds: dict[str, float]


# ---- cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="every K with every length and number of tasks")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="depth of the model [30]")
    parser.add_argument("--init", action="store_true", help="also the gradient of the initial adapter")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")


def cases(args: argparse.Namespace) -> list[Row]:
    """The grid: K at 128 tokens and one task, then lengths, then tasks (at K = 2), then the real batch."""
    every = ([1, 2, 4, 8], [64, 128, 256, 512], [1, 4, 8])
    if args.full:
        grid = [(k, s, t) for t in every[2] for s in every[1] for k in every[0]]
    else:
        grid = [*((k, 128, 1) for k in every[0]), *((2, s, 1) for s in every[1]), *((2, 128, t) for t in every[2])]
    common = {"layers": args.layers, "device": args.device, "init": args.init}
    plain = {"case": "grid", "examples": EXAMPLES, "dtype": "fp32"} | common
    rows = [plain | {"engine": e, "K": k, "tokens": s, "tasks": t} for k, s, t in dict.fromkeys(grid) for e in ENGINES]
    real = {"case": "real", "examples": REAL_EXAMPLES, "K": 2, "tokens": 128, "tasks": REAL_TASKS} | common
    return rows + [
        real | {"engine": e, "dtype": d}
        for e, d in [("torchopt", "fp32"), *((e, "bf16") for e in OURS if e != "finite_difference_one")]
    ]


def name(case: Row) -> str:
    """What --cases picks by: engine/K2/tokens128/tasks1, with real/ in front of the real batch's."""
    front = "real/" if case["case"] == "real" else ""
    return f"{front}{case['engine']}/K{case['K']}/tokens{case['tokens']}/tasks{case['tasks']}"


def finish(rows: list[Row]) -> list[Row]:
    """Ratios to the first-order row of the same case (the real batch: to TorchOpt's)."""
    keys = ("case", "K", "tokens", "tasks")
    against = {"grid": "first_order", "real": "torchopt"}
    base = {tuple(r[k] for k in keys): r for r in rows if r["engine"] == against[r["case"]] and "seconds" in r}
    for row in rows:
        own = base.get(tuple(row[k] for k in keys))
        if own and "seconds" in row:
            row["time_ratio"] = row["seconds"] / own["seconds"]
            row["peak_ratio"] = row["peak_gb"] / own["peak_gb"] if own["peak_gb"] else None
            if row.get("seconds_sweep") is not None and own["engine"] == "first_order":
                row["sweep_ratio"] = row["seconds_sweep"] / own["seconds"]
    return rows


def plot(rows: list[Row], file: Path) -> None:
    """Time against memory: one line an engine, one point a K (marked), at the grid's first length and task count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [r for r in rows if r["case"] == "grid" and "seconds" in r]
    spots = [(r["tokens"], r["tasks"]) for r in good]
    spot = max(set(spots), key=spots.count) if spots else (0, 0)
    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    for engine in ENGINES:
        own = [r for r in good if r["engine"] == engine and (r["tokens"], r["tasks"]) == spot]
        if own:
            axes.plot([r["peak_gb"] for r in own], [r["seconds"] for r in own], "o-", label=engine)
            for r in own:
                axes.annotate(f"K={r['K']}", (r["peak_gb"], r["seconds"]), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="peak memory over the weights, GB", ylabel="seconds")
    axes.set_title(f"{EXAMPLES} x {spot[0]} tokens, {spot[1]} task(s)")
    axes.grid(alpha=0.3, which="both")
    if good:
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)


# ---- one case, in its own process


def measure(case: Row) -> Row:
    """Seconds, peak over the weights, and (with `check`) errors and counts of products of one case."""
    torch.set_num_threads(case["threads"])
    setup = build(case)
    method = METHODS[case["engine"]]
    method(warm(setup))
    before = _reset_peak(case["device"])
    begin = time.perf_counter()
    answer = method(setup)
    _wait(case["device"])
    seconds = time.perf_counter() - begin
    row: Row = {"seconds": seconds, "peak_gb": _peak(case["device"], before) / 1e9}
    row |= {f"seconds_{stage}": value for stage, value in answer.seconds.items()}
    if case["engine"] == "first_order":
        row["seconds"] = answer.seconds["inner"]
    return row | (check(case) if case["check"] else {})


def build(case: Row) -> Setup:
    """The case's model and batch. The same numbers for every engine, dtype and device (seed 0)."""
    dtype, device, T, N, S = (case[key] for key in ("dtype", "device", "tasks", "examples", "tokens"))
    shape = SHAPE | {"num_hidden_layers": case["layers"]} | case.get("shape", {})
    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    for parameter in hf.parameters():
        parameter.data = parameter.data.to(device, DTYPES[dtype])
    hf.to(device)
    layers = lora.attach(hf, LoraShape(RANK, 2.0 * RANK, ("all-linear",)))
    gen = torch.Generator().manual_seed(0)
    policy = lora.fresh(layers, RANK, gen)
    exact = torch.float64 if dtype == "fp64" else torch.float32
    for key, value in policy.items():
        if key.endswith(".B"):
            policy[key] = torch.empty(value.shape).normal_(0, 0.02, generator=gen).to(device)
    start = lora.expand({key: value.to(exact) for key, value in policy.items()}, T)

    def sequence(length: int, prompt: int) -> Sequence:
        return Sequence(torch.randint(shape["vocab_size"], (length,), generator=gen).tolist(), prompt)

    def example() -> Sequence:
        if case["case"] != "real":
            return sequence(S, S // 2)
        length = int(torch.randint(S // 4, S + 1, (1,), generator=gen))
        return sequence(length, int(torch.randint(length // 4, length // 2 + 1, (1,), generator=gen)))

    inner = [[example() for _ in range(N)] for _ in range(T)]
    outer = [[example()] for _ in range(T)]
    row = None if case["case"] == "real" else S
    weight_TN = (0.5 + torch.rand(T, N, generator=gen)).to(device, exact)
    packed = [pack(batch, 0, device, row) for batch in (inner, outer)]
    each = [(pack([a], 0, device, row), pack([b], 0, device, row)) for a, b in zip(inner, outer, strict=True)]
    lr = {key: torch.tensor(LR, dtype=exact, device=device) for key in start}
    return Setup(
        hf, layers, split(hf, layers), *packed, each, weight_TN, start, Rule(), lr, case["K"], case["init"]
    )  # fmt: skip


def warm(setup: Setup) -> Setup:
    """The same model with a batch of a few tokens: libraries load and set themselves up, little memory is touched."""
    T, N = setup.weight_TN.shape
    device = setup.weight_TN.device
    few = pack([[Sequence([1, 2, 3, 4], 2)] * N] * T, 0, device, 4)
    one = pack([[Sequence([1, 2, 3, 4], 2)]] * T, 0, device, 4)
    each = [tuple(pack([[Sequence([1, 2, 3, 4], 2)] * n], 0, device, 4) for n in (N, 1))] * T
    return replace(setup, inner=few, outer=one, each=each, K=1)


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


def _products(case: Row, method: Callable[[Setup], Any]) -> float:
    """FLOPs of matrix products at the case's depth. They are a line in the number of layers, so two depths give it."""
    found = []
    for layers in (1, 2):
        setup = build(case | {"layers": layers, "dtype": "fp32"})
        # the CPU's fused attention has no formula in the counter
        with differentiable_attention(), FlopCounterMode(display=False) as counter:
            method(setup)
        found.append(counter.get_total_flops())
    return found[0] + (case["layers"] - 1) * (found[1] - found[0])


def distance(got: list[Tensor], truth: list[Tensor]) -> float:
    """|got - truth| / |truth| over all tensors."""
    gap = sum((a.double().cpu() - b.double().cpu()).square().sum() for a, b in zip(got, truth, strict=True))
    size = sum(b.double().cpu().square().sum() for b in truth)
    return float(torch.as_tensor(gap / size).sqrt())


def _reset_peak(device: str) -> float:
    """Forget the peak so far; returns the bytes held now."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        # give back what loading has freed: it would hide as much of the case's own memory
        libc.malloc_trim(0)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        # 5: the high-water mark of resident memory starts again from here (Linux, proc(5)); getrusage reads it
        clear.write_text("5")
    status = Path("/proc/self/statm")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return int(status.read_text().split()[1]) * float(resource.getpagesize())


def _peak(device: str, before: float) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() - before
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 - before


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# ---- the methods


def _inner(setup: Setup, parts: Split | None) -> Trajectory:
    n = setup.weight_TN.shape[1]

    def gradient(adapter: Adapter) -> tuple[Tensor, Adapter]:
        def loss(logprob_M: Tensor) -> Tensor:
            return (setup.weight_TN * example_loss(setup.inner, logprob_M)).sum() / n

        _, logprob_M, grad = loss_and_grad(setup.hf, setup.layers, setup.inner, adapter, loss, parts=parts)
        return example_loss(setup.inner, logprob_M), grad

    return adapt(gradient, setup.start, setup.rule, setup.lr, setup.K)


def _outer(setup: Setup, adapter: Adapter, parts: Split | None) -> Adapter:
    def loss(logprob_M: Tensor) -> Tensor:
        return example_loss(setup.outer, logprob_M).sum()

    return loss_and_grad(setup.hf, setup.layers, setup.outer, adapter, loss, parts=parts)[2]


def _ours(make: Callable[[Setup], Products], blocks: bool) -> Callable[[Setup], Answer]:
    def method(setup: Setup) -> Answer:
        parts = setup.parts if blocks else None
        device = str(setup.weight_TN.device)
        marks = [time.perf_counter()]
        trajectory = _inner(setup, parts)
        _wait(device)
        marks.append(time.perf_counter())
        outer_grad = _outer(setup, trajectory.adapter, parts)
        _wait(device)
        marks.append(time.perf_counter())
        found = metagrad.sweep(make(setup), trajectory, outer_grad, need_init=setup.init)
        _wait(device)
        marks.append(time.perf_counter())
        spans = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        return Answer(found.weight_TN, found.init, dict(zip(("inner", "outer", "sweep"), spans, strict=True)))

    return method


def first_order(setup: Setup) -> Answer:
    """The baseline: K plain autograd steps, the fast attention kernel, logits at the target positions only."""
    begin = time.perf_counter()
    adapter, state = setup.start, optimizers.init(setup.rule, setup.start)
    for k in range(setup.K):
        leaf = {key: value.detach().requires_grad_() for key, value in adapter.items()}
        loss = (setup.weight_TN * example_loss(setup.inner, _plain(setup, setup.inner, leaf))).sum()
        grads = torch.autograd.grad(loss / setup.weight_TN.shape[1], list(leaf.values()))
        with torch.no_grad():
            grad = dict(zip(leaf, grads, strict=True))
            adapter, state = optimizers.update(setup.rule, k, grad, state, adapter, setup.lr)
    _wait(str(setup.weight_TN.device))
    middle = time.perf_counter()
    outer_only(setup)
    return Answer(setup.weight_TN, None, {"inner": middle - begin, "outer": time.perf_counter() - middle})


def outer_only(setup: Setup) -> None:
    """The outer gradient by plain autograd: what every row has in common."""
    leaf = {key: value.detach().requires_grad_() for key, value in setup.start.items()}
    torch.autograd.grad(example_loss(setup.outer, _plain(setup, setup.outer, leaf)).sum(), list(leaf.values()))


def _plain(setup: Setup, packed: Packed, adapter: Adapter) -> Tensor:
    with lora.using(setup.layers, adapter):
        out = setup.hf.base_model(**model_inputs(setup.hf, packed), use_cache=False)
    hidden_MD = out.last_hidden_state.flatten(0, 1)[packed.place_M]
    return -nn.functional.cross_entropy(logits(setup.hf, hidden_MD), packed.label_M, reduction="none")


def unrolled(setup: Setup) -> Answer:
    """All K steps in one graph (`create_graph`), the batched LoRA layers of ours."""
    weight = setup.weight_TN.detach().requires_grad_()
    first = {key: value.detach().requires_grad_() for key, value in setup.start.items()}
    adapter, state = first, optimizers.init(setup.rule, first)
    for k in range(setup.K):
        logprob_M = token_logprobs(setup.hf, setup.layers, setup.inner, adapter, second_order=True)
        total = (weight * example_loss(setup.inner, logprob_M)).sum() / weight.shape[1]
        grads = torch.autograd.grad(total, list(adapter.values()), create_graph=True)
        adapter, state = optimizers.update(
            setup.rule, k, dict(zip(adapter, grads, strict=True)), state, adapter, setup.lr
        )
    loss = example_loss(setup.outer, token_logprobs(setup.hf, setup.layers, setup.outer, adapter)).sum()
    by_weight, *by_first = torch.autograd.grad(loss, [weight, *(first.values() if setup.init else ())])
    return Answer(by_weight, dict(zip(first, by_first, strict=True)) if setup.init else None, {})


class Pair(nn.Module):
    """A LoRA pair as ordinary parameters, as a user of the peers has them."""

    def __init__(self, a_RI: Tensor, b_OR: Tensor) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(a_RI.clone()), nn.Parameter(b_OR.clone())


class PlainLora(nn.Module):
    """A frozen linear layer and its pair, no task axis."""

    def __init__(self, base: nn.Linear, pair: Pair, scale: float) -> None:
        super().__init__()
        self.base, self.pair, self.scale = base, pair, scale

    def forward(self, x: Tensor) -> Tensor:
        update = nn.functional.linear(nn.functional.linear(x.to(self.pair.A.dtype), self.pair.A), self.pair.B)
        return self.base(x) + (update * self.scale).to(x.dtype)


class Net(nn.Module):
    """The decoder as a plain module: `higher` cannot patch one that slices its list of blocks."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(setup.parts.blocks), setup.parts.norm
        self.head = setup.hf.get_output_embeddings()

    def forward(self, call: Call, packed: Packed) -> Tensor:
        """The loss of each example, [1, N]."""
        hidden = call.hidden_BSD
        for block, (args, kwargs) in zip(self.blocks, call.arguments, strict=True):
            hidden = block(hidden, *args, **kwargs)
        hidden_MD = self.norm(hidden).flatten(0, 1)[packed.place_M]
        loss_M = nn.functional.cross_entropy(self.head(hidden_MD), packed.label_M, reduction="none")
        return packed.mean_by_example(loss_M)


def _peer(one: Callable[..., tuple[Tensor, list[Tensor]]]) -> Callable[[Setup], Answer]:
    """Task by task on a plain module."""

    def method(setup: Setup) -> Answer:
        lora.detach(setup.hf, setup.layers)
        weights, firsts = [], []
        try:
            for t, (inner, outer) in enumerate(setup.each):
                pairs = {}
                for key, layer in setup.layers.items():
                    pairs[key] = Pair(setup.start[f"{key}.A"][t], setup.start[f"{key}.B"][t])
                    owner = setup.hf.get_submodule(key.rpartition(".")[0])
                    setattr(owner, key.rpartition(".")[2], PlainLora(layer.base, pairs[key], layer.scale))
                with differentiable_attention():
                    weight, first = one(setup, Net(setup), nn.ModuleList(pairs.values()), inner, outer, t)
                weights.append(weight)
                firsts.append(first)
        finally:
            for key, layer in setup.layers.items():
                setattr(setup.hf.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2], layer)
        init = dict(zip(setup.start, map(torch.stack, zip(*firsts, strict=True)), strict=True)) if setup.init else None
        return Answer(torch.cat(weights), init, {})

    return method


def _torchopt(
    setup: Setup, net: Net, pairs: nn.ModuleList, inner: Packed, outer: Packed, t: int
) -> tuple[Tensor, list[Tensor]]:
    import torchopt

    weight = setup.weight_TN[t : t + 1].detach().requires_grad_()
    first = list(pairs.parameters())
    call, last = (enter(setup.parts, p) for p in (inner, outer))
    optimizer = torchopt.MetaSGD(pairs, lr=LR)
    for _ in range(setup.K):
        optimizer.step((weight * net(call, inner)).sum() / weight.shape[1])
    wanted = [weight, *(first if setup.init else ())]
    by_weight, *by_first = torch.autograd.grad(net(last, outer).sum(), wanted)
    return by_weight, by_first


def _higher(
    setup: Setup, net: Net, pairs: nn.ModuleList, inner: Packed, outer: Packed, t: int
) -> tuple[Tensor, list[Tensor]]:
    import higher

    weight = setup.weight_TN[t : t + 1].detach().requires_grad_()
    first = list(pairs.parameters())
    call, last = (enter(setup.parts, p) for p in (inner, outer))
    optimizer = torch.optim.SGD(first, lr=LR)
    with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, steps):
        for _ in range(setup.K):
            steps.step((weight * fast(call, inner)).sum() / weight.shape[1])
        wanted = [weight, *(first if setup.init else ())]
        by_weight, *by_first = torch.autograd.grad(fast(last, outer).sum(), wanted)
    return by_weight, by_first


METHODS: dict[str, Callable[[Setup], Answer]] = {
    "first_order": first_order,
    "unrolled": unrolled,
    "torchopt": _peer(_torchopt),
    "higher": _peer(_higher),
    "reverse": _ours(lambda s: metagrad.reverse(s.hf, s.layers, s.inner, s.weight_TN), blocks=False),
    "blockwise": _ours(lambda s: metagrad.blockwise(s.hf, s.parts, s.inner, s.weight_TN), blocks=True),
    "blockwise_kept": _ours(
        lambda s: metagrad.blockwise(s.hf, s.parts, s.inner, s.weight_TN, recompute=False), blocks=False
    ),
    "finite_difference": _ours(
        lambda s: metagrad.finite_difference(s.hf, s.layers, s.inner, s.weight_TN), blocks=False
    ),
    "finite_difference_one": _ours(
        lambda s: metagrad.finite_difference(s.hf, s.layers, s.inner, s.weight_TN, central=False), blocks=False
    ),
}
