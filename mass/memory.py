"""How much memory a meta-gradient takes over the weights, and the fastest engine that fits.

Nothing here is a formula about transformers. The engines themselves are run on fake tensors (shapes and dtypes, no
numbers) on two shallow copies of the model, while every storage is counted from the operation that makes it to its
death; the peak is a line in the number of blocks. So an architecture, an engine or a batch that is new needs no new
arithmetic. Not counted: what an allocator wastes between blocks, and workspaces inside a kernel.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

# The module that PyTorch's own page on fake tensors imports from; there is no public name for them.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from mass import metagrad, optimizers
from mass.batch import Packed
from mass.blocks import Split
from mass.errors import MassError
from mass.forward import example_loss, loss_and_grad, reference_states
from mass.free import free_bytes
from mass.inner import Step
from mass.lora import Adapter, Layers, LoraShape
from mass.optimizers import Rule
from mass.shallow import DEPTHS, Copy, depth_of, line, shallow

Engine = Literal["reverse", "blockwise", "finite_difference"]


@dataclass(frozen=True)
class Peak:
    """Most bytes held over the weights: in a first-order pass (the largest of the inner steps', the outer loss's and the
    generator's policy gradient's), in the way back, and, during both, in the trajectory of small states (and by the CPU's libraries)."""

    first_order: int
    sweep: int
    kept: int

    @property
    def total(self) -> int:
        return max(self.first_order, self.sweep) + self.kept


class Live(TorchDispatchMode):
    """Counts the bytes of storages made inside the context while they live: `now`, and the most so far: `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # two calls in three, and nothing is made
            return args[0].fake_device
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            # what comes from outside (weights, the batch) is not ours to count
            self._note(tensor.untyped_storage(), 0)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            # the zero tangents of forward mode have a size but no memory
            self._note(storage, 0 if tensor._is_zerotensor() else storage.nbytes())
        self.peak = max(self.peak, self.now + _workspace(func._overloadpacket, args))
        return out

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._seen.pop(key)


_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)


def _workspace(operation: Any, args: tuple[Any, ...]) -> int:
    """Bytes of large temporaries that an operation makes inside its kernel."""
    if operation is torch.ops.aten.logsumexp:
        return args[0].nbytes
    if operation in _PRODUCTS:
        # an operand that is one value seen many times (a zero tangent, say) is written out
        return sum(x.nbytes for x in _tensors(args) if x.untyped_storage().nbytes() < x.nbytes)
    return 0


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Those among an operation's arguments or results, which are tuples, lists and dicts of them at most. By hand, since
    this runs for every operation."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for one in tree:
            yield from _tensors(one)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def predict(
    hf: PreTrainedModel,
    parts: Split | None,
    shape: LoraShape,
    inner: Packed,
    outer: Packed,
    *,
    engine: Engine,
    steps: int,
    recompute: bool = True,
    checkpoint: bool = False,
    rule: Rule | None = None,
    truncate: int | None = None,
    need_init: bool = False,
    keep_grads: bool = True,
    policy: Packed | None = None,
    with_kl: bool = False,
    loops: int = 1,
    device: str | None = None,
    seen: dict[bool, int] | None = None,
) -> Peak:
    """Peak bytes over the weights of K inner steps, the outer gradient, the way back and the generator's policy gradient.

    `inner` and `outer` are batches of the largest shapes to expect (their numbers do not matter). `recompute` is
    blockwise's; `checkpoint` says that first-order passes recompute block by block. `truncate`: how many steps the way back takes (None: all). `need_init`: dL/dphi_0 is wanted.
    `keep_grads`: `inner.adapt`'s; where it is False and the rule may clip, it is taken that it does. `policy`: the micro-batch of the policy gradient,
    of one adapter (None: the generator is not trained), `with_kl` as for `predict_outer`. `loops`: inner loops of a step
    whose trajectories are held together. `device`: the type of device that it is for (None: where the model lies). `seen`: a dict that calls on the same model and batches share, for what engines have in common (first-order passes).
    """
    rule = rule or Rule()
    back = min(steps, truncate or steps)
    need_hessian = need_init or back > 1
    exact = torch.float64 if next(hf.parameters()).dtype == torch.float64 else torch.float32
    T = inner.tokens_TPS.shape[0]
    recorded = metagrad.recorded(steps, truncate) if engine == "reverse" else 0
    known = {} if seen is None else seen
    measure = checkpoint not in known
    first_order: list[int] = []
    writing: list[int] = []
    sweep: list[int] = []
    size: list[int] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        examples, last = (_fake(packed, mode) for packed in (inner, outer))
        weight_TN = torch.ones(examples.count_TN.shape, dtype=exact)
        for depth in DEPTHS:
            model = shallow(hf, parts, shape, depth, device or hf.device.type)
            adapter = _adapter(model.layers, shape.rank, T, exact)
            size.append(sum(x.nbytes for x in adapter.values()))
            own = model.parts if checkpoint else None
            if measure:
                with _counting(first_order):
                    _first_order(model, max(examples, last, key=lambda x: x.tokens_TPS.numel()), adapter, own)
            if measure and policy is not None:
                alone = _adapter(model.layers, shape.rank, 1, exact)
                with _counting(writing):
                    _first_order(model, _fake(policy, mode), alone, own, with_kl=with_kl)
            products = _products(model, examples, weight_TN, engine, recompute, own)
            grad = {key: torch.empty_like(x) for key, x in adapter.items()}
            with _counting(sweep):
                taken = [grad]
                if isinstance(products, metagrad.Reverse):
                    # the graphs of the last steps wait while the outer gradient is made
                    taken = [products.record(adapter)[1] for _ in range(recorded)]
                    _first_order(model, last, adapter, own)
                while taken:
                    products(Step(adapter, {}, taken.pop(), weight_TN), grad, need_hessian)
    deep = depth_of(hf, parts, shape)
    if measure:
        known[checkpoint] = max(line(first_order, deep), line(writing, deep) if writing else 0)
    one = line(size, deep)
    # An inner step keeps where it started, its gradient and the optimizer's state; then there are the adapted adapter,
    # the outer gradient, and on the way back lam, mu and the cotangent of the state.
    states = len(optimizers.init(rule, {"x": torch.zeros(1, 1, 1)}))
    # The gradients of recorded steps are counted with their graphs.
    spared = not keep_grads and optimizers.is_plain(rule) and rule.clip is None
    grads = 0 if spared else steps - recorded
    kept = one * (steps * (1 + states) + grads + 1) * loops
    return Peak(known[checkpoint], line(sweep, deep) + one * (3 + states), kept)


def predict_outer(
    hf: PreTrainedModel,
    parts: Split | None,
    shape: LoraShape,
    outer: Packed,
    *,
    checkpoint: bool = False,
    with_kl: bool = False,
    device: str | None = None,
) -> Peak:
    """Peak bytes over the weights of the outer loss's gradient by one adapter: all that there is without an inner loop.
    `with_kl`: the loss has the divergence from the base model. `device`: as for `predict`."""
    exact = torch.float64 if next(hf.parameters()).dtype == torch.float64 else torch.float32
    first_order: list[int] = []
    size: list[int] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = _fake(outer, mode)
        for depth in DEPTHS:
            model = shallow(hf, parts, shape, depth, device or hf.device.type)
            adapter = _adapter(model.layers, shape.rank, 1, exact)
            size.append(sum(x.nbytes for x in adapter.values()))
            with _counting(first_order):
                _first_order(model, batch, adapter, model.parts if checkpoint else None, with_kl=with_kl)
    deep = depth_of(hf, parts, shape)
    return Peak(line(first_order, deep), 0, line(size, deep))


@dataclass(frozen=True)
class Choice:
    """The engine that `auto` takes, whether first-order passes recompute block by block, and why, as a sentence."""

    engine: Engine
    recompute: bool
    checkpoint: bool
    peak: Peak
    reason: str


# Fastest first, by matrix products over those of a first-order step, inner steps included: 2.0 (3.0 for steps that are
# not recorded), 3.0, 4.0, 4.5.
# Finite differences are not here: what nobody asked for must be exact.
_ORDER: list[tuple[Engine, bool, bool]] = [
    ("reverse", False, False),
    ("blockwise", False, False),
    ("blockwise", True, False),
    ("blockwise", True, True),
]


def choose(
    hf: PreTrainedModel,
    parts: Split | None,
    shape: LoraShape,
    inner: Packed,
    outer: Packed,
    *,
    steps: int,
    memory_gb: float | None = None,
    ranks: int = 1,
    taken: int = 0,
    checkpoint: bool = False,
    rule: Rule | None = None,
    truncate: int | None = None,
    need_init: bool = False,
    keep_grads: bool = True,
    policy: Packed | None = None,
    with_kl: bool = False,
    loops: int = 1,
) -> Choice:
    """The fastest exact engine that fits into `memory_gb` (default: what the device has free, shared by `ranks`) beside
    `taken` bytes that are not held yet: the outer parameters and their optimizer's state, the gathered parts of a sharded base.

    `parts` None: the blocks were not found, so reverse is the only one. `checkpoint`: first-order passes recompute
    anyhow (inner.checkpoint). `truncate`, `policy`, `with_kl`, `loops`: as for `predict`. Raises MassError when none fits. Takes seconds, so it belongs to a run's start.
    """
    if memory_gb is not None:
        limit, whose = memory_gb * 1e9, "meta_gradient.memory_gb"
    else:
        free, whose = free_bytes(next(hf.parameters()).device)
        limit = free / ranks
    tried: list[str] = []
    least = float("inf")
    seen: dict[bool, int] = {}
    for engine, recompute, own_checkpoint in _ORDER:
        if (parts is None and engine == "blockwise") or (checkpoint and not own_checkpoint and recompute):
            continue
        again = parts is not None and (checkpoint or own_checkpoint)
        peak = predict(
            hf, parts, shape, inner, outer, engine=engine, steps=steps, recompute=recompute, checkpoint=again, rule=rule,
            truncate=truncate, need_init=need_init, keep_grads=keep_grads, policy=policy, with_kl=with_kl, loops=loops, seen=seen,
        )  # fmt: skip
        words = engine + {("blockwise", False): " without recomputation"}.get((engine, recompute), "")
        words += " with recomputed first-order passes" if again else ""
        total = peak.total + taken
        need = f"{words} needs {total / 1e9:.2f} GB over the weights"
        if total <= limit:
            why = "; ".join(
                [f"{need}, {limit / 1e9:.2f} GB {whose}", *(f"too large: {one}" for one in tried)]
            )
            return Choice(engine, recompute, again, peak, why)
        tried.append(need)
        least = min(least, total)
    raise MassError(
        f"meta_gradient.mode=auto: no exact engine fits into {limit / 1e9:.2f} GB ({whose}): {'; '.join(tried)}. "
        f"Raise meta_gradient.memory_gb to {least / 1e9:.2f}, or lower outer.tasks_at_once, outer.micro_rows, generate.examples or "
        "generate.max_new_tokens, or take meta_gradient.mode=finite_difference with inner.checkpoint=true."
    )


def _first_order(
    model: Copy, packed: Packed, adapter: Adapter, parts: Split | None, *, with_kl: bool = False
) -> None:
    def loss(logprob_M: Tensor, *kl_M: Tensor) -> Tensor:
        return torch.stack([example_loss(packed, x).sum() for x in (logprob_M, *kl_M)]).sum()

    base_MD = reference_states(model.hf, model.layers, packed, None) if with_kl else None
    loss_and_grad(model.hf, model.layers, packed, adapter, loss, reference_MD=base_MD, parts=parts)


def _products(
    model: Copy, packed: Packed, weight_TN: Tensor, engine: Engine, recompute: bool, parts: Split | None
) -> metagrad.Products:
    if engine == "reverse":
        return metagrad.Reverse(model.hf, model.layers, packed, weight_TN)
    if engine == "finite_difference":
        return metagrad.finite_difference(model.hf, model.layers, packed, weight_TN, parts=parts)
    if engine == "blockwise":
        assert model.parts is not None, "blockwise without blocks"
        return metagrad.blockwise(model.hf, model.parts, packed, weight_TN, recompute=recompute)
    raise ValueError(f"engine {engine!r}")


def _fake(packed: Packed, mode: FakeTensorMode) -> Packed:
    tensors = {f.name: x for f in fields(packed) if isinstance(x := getattr(packed, f.name), Tensor)}
    # the shallow copies lie on the CPU, wherever the model is
    faked: dict[str, Any] = {name: mode.from_tensor(x.cpu()) for name, x in tensors.items()}
    tiles = packed.tiles and packed.tiles.map(lambda x: mode.from_tensor(x.cpu()))
    return replace(packed, tiles=tiles, **faked)


def _adapter(layers: Layers, rank: int, tasks: int, dtype: torch.dtype) -> Adapter:
    adapter: Adapter = {}
    for name, layer in layers.items():
        out, width = layer.weight.shape
        adapter[f"{name}.A"] = torch.empty(tasks, rank, width, dtype=dtype, device=layer.weight.device)
        adapter[f"{name}.B"] = torch.empty(tasks, out, rank, dtype=dtype, device=layer.weight.device)
    return adapter


@contextlib.contextmanager
def _counting(peaks: list[int]) -> Iterator[None]:
    with Live() as live:
        yield
    peaks.append(live.peak)
