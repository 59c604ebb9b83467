"""The methods that `meta_bench.py gradients` compares, ours and the peers', on one batch of one random model."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mass import lora, metagrad, optimizers
from mass.batch import Packed, Sequence, pack
from mass.blocks import Call, Split, enter, model_inputs, split
from mass.forward import example_loss, logits, loss_and_grad, token_logprobs
from mass.inner import Trajectory, adapt
from mass.lora import Adapter, Layers, LoraShape
from mass.metagrad import Products
from mass.optimizers import Rule

Row = dict[str, Any]

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
LORA = LoraShape(8, 16.0, ("all-linear",))
LR = 0.1


@dataclass(frozen=True)
class Setup:
    """One model and one batch. `each` holds every task as a batch of its own, for the peers, and for ours when it takes one
    task after another (`alone`)."""

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
    alone: bool = False


@dataclass(frozen=True)
class Answer:
    """dL/dw [T, N], dL/dphi_0 when asked for, and seconds by stage."""

    weight_TN: Tensor
    init: Adapter | None
    seconds: dict[str, float]


def build(case: Row) -> Setup:
    """The case's model and batch. The same numbers for every engine and dtype (seed 0)."""
    dtype, device, T, N, S = (case[key] for key in ("dtype", "device", "tasks", "examples", "tokens"))
    shape = SHAPES[case["shape"]] | {"num_hidden_layers": case["layers"]}
    torch.manual_seed(0)
    with torch.device(device):
        hf = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    for parameter in hf.parameters():
        parameter.data = parameter.data.to(device, DTYPES[dtype])
    hf.to(device)
    layers = lora.attach(hf, LORA)
    gen = torch.Generator().manual_seed(0)
    policy = lora.fresh(layers, LORA.rank, gen)
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
    examples, last = (pack(batch, 0, device, row) for batch in (inner, outer))
    each = [tuple(pack([x], 0, device, row) for x in own) for own in zip(inner, outer, strict=True)]
    lr = {key: torch.tensor(LR, dtype=exact, device=device) for key in start}
    return Setup(
        hf=hf,
        layers=layers,
        parts=split(hf, layers),
        inner=examples,
        outer=last,
        each=each,
        weight_TN=weight_TN,
        start=start,
        rule=Rule(),
        lr=lr,
        K=case["K"],
        init=case["init"],
        alone=case.get("at_once") == 1,
    )


def warm(setup: Setup) -> Setup:
    """The same model with a batch of a few tokens: libraries load and set themselves up, little memory is touched."""
    T, N = setup.weight_TN.shape
    device = setup.weight_TN.device
    few = pack([[Sequence([1, 2, 3, 4], 2)] * N] * T, 0, device, 4)
    one = pack([[Sequence([1, 2, 3, 4], 2)]] * T, 0, device, 4)
    each = [tuple(pack([[Sequence([1, 2, 3, 4], 2)] * n], 0, device, 4) for n in (N, 1))] * T
    return replace(setup, inner=few, outer=one, each=each, K=1)


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _inner(setup: Setup, parts: Split | None, products: Products, keep_grads: bool) -> Trajectory:
    n = setup.weight_TN.shape[1]

    def gradient(adapter: Adapter) -> tuple[Tensor, Adapter]:
        def loss(logprob_M: Tensor) -> Tensor:
            return (setup.weight_TN * example_loss(setup.inner, logprob_M)).sum() / n

        _, logprob_M, grad = loss_and_grad(setup.hf, setup.layers, setup.inner, adapter, loss, parts=parts)
        return example_loss(setup.inner, logprob_M), grad

    last = products.record if isinstance(products, metagrad.Reverse) else None
    return adapt(
        gradient,
        setup.start,
        setup.rule,
        setup.lr,
        setup.K,
        last=last,
        count=metagrad.RECORDED,
        keep_grads=keep_grads,
    )


def _outer(setup: Setup, adapter: Adapter, parts: Split | None) -> Adapter:
    def loss(logprob_M: Tensor) -> Tensor:
        return example_loss(setup.outer, logprob_M).sum()

    return loss_and_grad(setup.hf, setup.layers, setup.outer, adapter, loss, parts=parts)[2]


def _ours(
    make: Callable[[Setup], Products], blocks: bool, keep_grads: bool = False
) -> Callable[[Setup], Answer]:
    def one_by_one(setup: Setup) -> Answer:
        found = [at_once(task(setup, t)) for t in range(len(setup.each))]
        inits = [x.init for x in found if x.init is not None]
        return Answer(
            torch.cat([x.weight_TN for x in found]),
            {key: torch.cat([x[key] for x in inits]) for key in setup.start} if inits else None,
            {stage: sum(x.seconds[stage] for x in found) for stage in found[0].seconds},
        )

    def at_once(setup: Setup) -> Answer:
        parts = setup.parts if blocks else None
        device = str(setup.weight_TN.device)
        marks = [time.perf_counter()]
        products = make(setup)
        trajectory = _inner(setup, parts, products, keep_grads)
        wait(device)
        marks.append(time.perf_counter())
        outer_grad = _outer(setup, trajectory.adapter, parts)
        wait(device)
        marks.append(time.perf_counter())
        found = metagrad.sweep(products, trajectory, outer_grad, need_init=setup.init)
        wait(device)
        marks.append(time.perf_counter())
        spans = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        return Answer(found.weight_TN, found.init, dict(zip(("inner", "outer", "sweep"), spans, strict=True)))

    return lambda setup: one_by_one(setup) if setup.alone else at_once(setup)


def task(setup: Setup, t: int) -> Setup:
    """Task t of the batch as a batch of its own."""
    inner, outer = setup.each[t]
    weight_TN, start = setup.weight_TN[t : t + 1], lora.select(setup.start, [t])
    return replace(
        setup, inner=inner, outer=outer, each=[(inner, outer)], weight_TN=weight_TN, start=start, alone=False
    )


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
    wait(str(setup.weight_TN.device))
    middle = time.perf_counter()
    outer_only(setup)
    return Answer(setup.weight_TN, None, {"inner": middle - begin, "outer": time.perf_counter() - middle})


def outer_only(setup: Setup) -> None:
    """The outer gradient by plain autograd: what every row has in common."""
    leaf = {key: value.detach().requires_grad_() for key, value in setup.start.items()}
    torch.autograd.grad(
        example_loss(setup.outer, _plain(setup, setup.outer, leaf)).sum(), list(leaf.values())
    )


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
                with sdpa_kernel(SDPBackend.MATH):
                    weight, first = one(setup, Net(setup), nn.ModuleList(pairs.values()), inner, outer, t)
                weights.append(weight)
                firsts.append(first)
        finally:
            for key, layer in setup.layers.items():
                setattr(setup.hf.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2], layer)
        init = (
            dict(zip(setup.start, map(torch.stack, zip(*firsts, strict=True)), strict=True))
            if setup.init
            else None
        )
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
    "reverse": _ours(lambda s: metagrad.Reverse(s.hf, s.layers, s.inner, s.weight_TN), blocks=False),
    "blockwise": _ours(lambda s: metagrad.blockwise(s.hf, s.parts, s.inner, s.weight_TN), blocks=True),
    "blockwise_kept": _ours(
        lambda s: metagrad.blockwise(s.hf, s.parts, s.inner, s.weight_TN, recompute=False), blocks=False
    ),
    "finite_difference": _ours(
        lambda s: metagrad.finite_difference(s.hf, s.layers, s.inner, s.weight_TN), blocks=False
    ),
    "finite_difference_one": _ours(
        lambda s: metagrad.finite_difference(s.hf, s.layers, s.inner, s.weight_TN, central=False),
        blocks=False,
        keep_grads=True,
    ),
}
