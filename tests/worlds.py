"""Small worlds for the tests of the derivative core: a tiny model, ragged examples, and the inner loop of mass on them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from tiny import ExactRMSNorm, tiny
from torch import Tensor
from transformers import PreTrainedModel

import mass.tiny
from mass import blocks, forward, inner, lora, metagrad, scorer
from mass.batch import Packed, Sequence, pack
from mass.lora import Adapter, Layers, LoraShape
from mass.metagrad import MetaGradient, Products
from mass.optimizers import Rule

# name -> (architecture of mass.tiny, changes). Sliding windows are shorter than the sequences.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
    "gemma3": ("gemma3", {"sliding_window": 4}),
    "gemma3 untied, soft cap": (
        "gemma3",
        {"sliding_window": 4, "tie_word_embeddings": False, "final_logit_softcapping": 3.0},
    ),
    "mistral": ("mistral", {"sliding_window": 4}),
    "mistral tied, full attention": ("mistral", {"tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox tied": ("gpt_neox", {"tie_word_embeddings": True}),
}
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}

# name -> (inner optimizer, learning rate)
RULES: dict[str, tuple[Rule, float]] = {
    "sgd": (Rule("sgd"), 0.3),
    "momentum": (Rule("sgd", momentum=0.9, clip=0.3), 0.3),
    "adam": (Rule("adam", eps_root=1e-6), 0.02),
}
ENGINES = ("reverse", "recorded", "blockwise", "blockwise keep", "central", "one-sided")
EXACT = ENGINES[:4]
STEPS = (1, 2, 5)


@dataclass(frozen=True)
class World:
    """A model with adapters in its slots, N ragged examples of each of T tasks, one outer sequence of each."""

    hf: PreTrainedModel
    layers: Layers
    parts: blocks.Split
    examples: list[list[Sequence | None]]
    targets: list[list[Sequence | None]]
    packed: Packed
    outer: Packed
    score_TN: Tensor
    start: Adapter

    @property
    def valid_TN(self) -> Tensor:
        return self.packed.count_TN > 0

    @property
    def weight_TN(self) -> Tensor:
        return scorer.weights(self.score_TN, self.valid_TN, 1.0)

    def task(self, t: int) -> "World":
        """The world of task t alone."""
        return with_examples(
            replace(self, score_TN=self.score_TN[t : t + 1], start=lora.select(self.start, [t])),
            [self.examples[t]],
            [self.targets[t]],
        )


def with_examples(
    world: World, examples: list[list[Sequence | None]], targets: list[list[Sequence | None]]
) -> World:
    return replace(
        world, examples=examples, targets=targets, packed=pack(examples, 0), outer=pack(targets, 0)
    )


def sequences(
    generator: torch.Generator, count: int, low: int, high: int, prompt: int, vocabulary: int = 259
) -> list[Sequence | None]:
    def one() -> Sequence:
        length = int(torch.randint(low, high, (), generator=generator))
        return Sequence(torch.randint(3, vocabulary, (length,), generator=generator).tolist(), prompt)

    return [one() for _ in range(count)]


def alike(rows: list[list[Sequence | None]], length: int = 18) -> list[list[Sequence | None]]:
    """The same sequences behind a context that the sequences of a task have in common."""
    return [
        [
            s and Sequence([3 + (7 * i + t) % 256 for i in range(length)] + s.tokens, length + s.prompt)
            for s in task
        ]
        for t, task in enumerate(rows)
    ]


def populate(hf: PreTrainedModel, tasks: int, dtype: torch.dtype, seed: int = 0, rank: int = 2) -> World:
    """Slots, adapters that differ from task to task (B not zero), examples: the last one of the last task is absent."""
    g = torch.Generator().manual_seed(seed)
    layers = lora.attach(hf, LoraShape(rank, 2.0 * rank, ("all-linear",)))
    start = lora.expand(lora.fresh(layers, rank, g, torch.float64), tasks)
    for key, tensor in start.items():
        tensor += torch.randn(tensor.shape, generator=g, dtype=torch.float64) * (
            0.02 if key.endswith("A") else 0.1
        )
    # the same numbers in every dtype
    start = {key: tensor.bfloat16().to(dtype) for key, tensor in start.items()}
    examples = [sequences(g, 3, 6, 14, 3) for _ in range(tasks)]
    examples[-1][-1] = None
    targets = [sequences(g, 1, 9, 10, 4) for _ in range(tasks)]
    score = torch.randn(tasks, 3, generator=g, dtype=torch.float64).bfloat16().to(dtype)
    return World(
        hf,
        layers,
        blocks.split(hf, layers),
        examples,
        targets,
        pack(examples, 0),
        pack(targets, 0),
        score,
        start,
    )


def make(name: str = "llama", tasks: int = 2, **changes: Any) -> World:
    """A world in pure float64: every norm computes in float64 too."""
    architecture, own = ARCHITECTURES[name]
    return populate(tiny(architecture, torch.float64, **(SMALL | own | changes))[0], tasks, torch.float64)


def make_huggingface(name: str, dtype: torch.dtype, tasks: int = 2) -> World:
    """A world whose model is as Hugging Face writes it (RMS norms compute in fp32), adapters in at least fp32."""
    architecture, own = ARCHITECTURES[name]
    hf = mass.tiny.tiny(architecture, dtype=dtype, **(SMALL | own))[0].eval().requires_grad_(False)
    return populate(hf, tasks, torch.float64 if dtype == torch.float64 else torch.float32)


def in_float64(world: World) -> World:
    """The same world, weights rounded as they are, computed in pure float64 throughout: the truth for lower precision."""
    lora.detach(world.hf, world.layers)
    hf = copy.deepcopy(world.hf).double()
    again = lora.attach(world.hf, LoraShape(2, 4.0, ("all-linear",)))
    world.layers.update(again)
    for name, module in list(hf.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            shift = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
            hf.set_submodule(name, ExactRMSNorm(module.weight, shift, eps))
    twin = populate(hf.eval().requires_grad_(False), len(world.examples), torch.float64)
    return replace(twin, score_TN=world.score_TN.double())


@cache
def shared() -> World:
    """The float64 Llama world that most tests look at. Nobody changes it."""
    return make()


# ---- the way of mass


def rates(world: World, lr: float) -> dict[str, Tensor]:
    return {key: torch.tensor(lr, dtype=x.dtype) for key, x in world.start.items()}


def gradient(world: World, weight_TN: Tensor, parts: blocks.Split | None = None) -> inner.Gradient:
    def one(adapter: Adapter) -> tuple[Tensor, Adapter]:
        def loss(logprob_M: Tensor) -> Tensor:
            return (weight_TN * forward.example_loss(world.packed, logprob_M)).sum() / weight_TN.shape[1]

        _, logprob_M, grad = forward.loss_and_grad(
            world.hf, world.layers, world.packed, adapter, loss, parts=parts
        )
        return forward.example_loss(world.packed, logprob_M), grad

    return one


def products(world: World, engine: str, weight_TN: Tensor) -> Products:
    hf, layers, parts, packed = world.hf, world.layers, world.parts, world.packed
    return {
        "reverse": lambda: metagrad.Reverse(hf, layers, packed, weight_TN),
        "recorded": lambda: metagrad.Reverse(hf, layers, packed, weight_TN),
        "blockwise": lambda: metagrad.blockwise(hf, parts, packed, weight_TN),
        "blockwise keep": lambda: metagrad.blockwise(hf, parts, packed, weight_TN, recompute=False),
        "central": lambda: metagrad.finite_difference(hf, layers, packed, weight_TN),
        "one-sided": lambda: metagrad.finite_difference(hf, layers, packed, weight_TN, central=False),
    }[engine]()


def outer_loss(world: World, adapter: Adapter) -> Tensor:
    """L of each task, [T]."""
    with torch.no_grad():
        logprob_M = forward.token_logprobs(world.hf, world.layers, world.outer, adapter)
        return forward.example_loss(world.outer, logprob_M).sum(1)


def outer_grad(world: World, adapter: Adapter) -> Adapter:
    return forward.loss_and_grad(
        world.hf, world.layers, world.outer, adapter, lambda x: forward.example_loss(world.outer, x).sum()
    )[2]


def loop(
    world: World,
    rule: Rule,
    lr: Mapping[str, Tensor],
    K: int,
    weight_TN: Tensor | None = None,
    start: Adapter | None = None,
    last: inner.Gradient | None = None,
) -> inner.Trajectory:
    weight_TN = world.weight_TN if weight_TN is None else weight_TN
    first = world.start if start is None else start
    return inner.adapt(gradient(world, weight_TN), first, rule, lr, K, last=last, count=metagrad.RECORDED)


def meta(world: World, engine: str, rule: Rule, lr: float, K: int, **options: Any) -> MetaGradient:
    """The whole meta-gradient of mass."""
    given = products(world, engine, world.weight_TN)
    last = given.record if engine == "recorded" and isinstance(given, metagrad.Reverse) else None
    trajectory = loop(world, rule, rates(world, lr), K, last=last)
    return metagrad.sweep(given, trajectory, outer_grad(world, trajectory.adapter), **options)


# ---- comparing


def error(got: Tensor | Mapping[str, Tensor], want: Tensor | Mapping[str, Tensor]) -> float:
    """|got - want| / |want| over all tensors together, in float64. NaN counts as infinite."""

    def flat(x: Tensor | Mapping[str, Tensor]) -> Tensor:
        parts = [x] if isinstance(x, Tensor) else [x[key] for key in sorted(x)]
        return torch.cat([part.double().flatten() for part in parts])

    if not isinstance(got, Tensor):
        assert not isinstance(want, Tensor) and got.keys() == want.keys()
    ratio = ((flat(got) - flat(want)).norm() / flat(want).norm()).item()
    return ratio if ratio == ratio else float("inf")


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(a[key] * b[key]).sum() for key in a]).sum()
