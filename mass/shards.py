"""A frozen base of which every rank keeps a part and gathers the rest when a product asks for it (`zero.stage=3`).

The matrices of a decoder block lie end to end in one flat tensor, a *unit*; so do the embedding and the head, each by
itself. A rank keeps 1/W of each unit, on its accelerator or in main memory. `frozen.linear` asks for its matrix in
forward, backward and tangent and keeps nothing, so at any time a rank holds its parts, the unit at work and the one
that comes next, which is gathered while this one computes. Which one that is, is learnt: units are asked for in an order
that repeats. A wrong guess costs a gather and nothing else, since a unit is used by its number only.

Ranks do not run the same products: texts end at different steps, a task may have no examples. So no rank relies on
what another does. Units move in rounds: every rank says which unit it wants (or that it wants none), all read the
same answers, and all take part in gathering the unit that follows from them. A rank that waits for others therefore
has to keep giving: `settle` does that until no rank wants anything, and belongs before every other collective call.

DeepSpeed makes and holds the parts: a unit is one flat parameter that `deepspeed.zero.Init` partitions, and its tools see it:
`deepspeed.zero.GatheredParameters(shards.parameters())`, called by all ranks after `settle`. Two things are ours. Reading:
each rank reads its own elements of a file into its part, where DeepSpeed would have a process hold each tensor whole.
Gathering: DeepSpeed's must be asked for in the same order on every rank, and it assigns `param.data`, which under
torch.func is an error inside PyTorch (0.19.8 with torch 2.13: "escaped?", or the process dies).
"""

import contextlib
import functools
import re
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mass import frozen
from mass.distributed import longest_wait
from mass.errors import MassError

# (name of a parameter, first, last + 1) -> these elements of the flattened parameter, in any dtype
Read = Callable[[str, int, int], Tensor]

# Where a matrix begins in its unit, in bytes: products may round otherwise over memory that is aligned otherwise.
ALIGNMENT = 64
# More than this share of the parameters outside of linear layers and embeddings would be a base that is not sharded.
MOST_WHOLE = 0.1


@dataclass
class Unit:
    """Matrices that are gathered together. `parameter`: all of them, flat, once DeepSpeed has partitioned it."""

    names: list[str] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    size: int = 0
    parameter: nn.Parameter = field(default_factory=nn.Parameter)

    @property
    def part(self) -> Tensor:
        """This rank's 1/W, flat."""
        return self.parameter.ds_tensor  # type: ignore[attr-defined]

    def add(self, name: str, shape: torch.Size, alignment: int) -> int:
        """Append a matrix; returns its number in the unit."""
        self.names.append(name)
        self.shapes.append(shape)
        self.starts.append(self.size)
        self.size += -(-shape.numel() // alignment) * alignment
        return len(self.names) - 1

    def view(self, flat: Tensor, i: int) -> Tensor:
        return flat[self.starts[i] : self.starts[i] + self.shapes[i].numel()].view(self.shapes[i])


class Shards:
    """The sharded matrices of one model on this rank. All ranks make it, and call `take` and `settle`, together.

    hold            whether generation shall hold the whole base (see `held`)
    prefetch        whether the unit that comes next is gathered while one computes
    in_main_memory  whether the parts stay in main memory and are copied to the device for each gather
    waited          seconds that this rank has waited for units so far
    """

    def __init__(
        self,
        device: torch.device,
        *,
        hold: bool = False,
        prefetch: bool = True,
        in_main_memory: bool = False,
        patience: float = 600.0,
    ) -> None:
        self.device, self.hold, self.prefetch, self.waited = device, hold, prefetch, 0.0
        self.home = torch.device("cpu") if in_main_memory else device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.units: list[Unit] = []
        self._place: dict[str, tuple[int, int]] = {}
        # Rounds are agreed upon by the CPUs: the accelerator need not be waited for.
        # A new group has torch's time limit, not that of the first one.
        limit = longest_wait(patience)
        self._moves = dist.new_group(timeout=limit)
        self._talks = dist.new_group(backend="gloo", timeout=limit)
        self._talk: tuple[Any, Tensor] | None = None
        self._move: tuple[Any, int, Tensor] | None = None
        self._want, self._served = -1, 0
        self._arrived: tuple[int, Tensor] | None = None
        self._now: tuple[int, Tensor] | None = None
        self._held: dict[int, Tensor] = {}
        # which unit came after these two the last time
        self._next: dict[tuple[int, int], int] = {}
        self._recent = (-1, -1)

    # ---- taking a model apart

    def take(self, hf: nn.Module, read: Read, dtype: torch.dtype) -> None:
        """Keep this rank's part of every linear layer and embedding of `hf` and let these layers gather the rest.

        `hf`'s own matrices (which may lie on the meta device) give way to placeholders of their shape. `read` is asked
        for this rank's elements only. What else `hf` holds stays as it is. Raises MassError when that is much.
        """
        number: dict[str, int] = {}
        seen: dict[int, tuple[int, int, nn.Parameter]] = {}
        layers: list[tuple[ShardedLinear | ShardedEmbedding, tuple[int, int, nn.Parameter]]] = []
        total = sum(p.numel() for p in hf.parameters())
        alignment = ALIGNMENT // dtype.itemsize
        for path, module in hf.named_modules():
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                continue
            weight = module.weight
            if id(weight) not in seen:
                u = number.setdefault(unit_of(path), len(number))
                if u == len(self.units):
                    self.units.append(Unit())
                i = self.units[u].add(f"{path}.weight", weight.shape, alignment)
                self._place[f"{path}.weight"] = (u, i)
                seen[id(weight)] = (u, i, self._placeholder(weight.shape, dtype))
            layers.append((typing.cast(Any, module), seen[id(weight)]))
        whole = total - sum(shape.numel() for unit in self.units for shape in unit.shapes)
        if whole > MOST_WHOLE * total:
            raise MassError(
                f"zero.stage=3: {whole / total:.0%} of the weights of {type(hf).__name__} lie outside of linear layers "
                "and embeddings and cannot be sharded. Use zero.stage=2, which keeps the base whole on every rank."
            )
        for unit in self.units:
            self._partition(unit, dtype)
        for unit in self.units:
            self._fill(unit, read)
        for module, (u, i, placeholder) in layers:
            module.__class__ = _sharded_class(module)
            module.weight = placeholder
            module.matrix = functools.partial(self.matrix, u, i)

    def _placeholder(self, shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
        """Shape, dtype and device of a matrix in the memory of one number: NaN, so that what forgets to gather shows."""
        one = torch.full((1,), torch.nan, dtype=dtype, device=self.device)
        return nn.Parameter(one.expand(shape), requires_grad=False)

    def _partition(self, unit: Unit, dtype: torch.dtype) -> None:
        """Let DeepSpeed make the parts of a unit. It wants the unit whole for a moment, and sends it from rank 0 to all,
        with no numbers in it yet: one unit at a time, as when it is gathered.
        """
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        flat = torch.empty(unit.size, dtype=dtype, device=get_accelerator().current_device_name())
        unit.parameter = nn.Parameter(flat, requires_grad=False)
        # Given a module it patches nothing but the linear that has no forward mode; as a context it would patch the
        # constructors of all modules and tensors, and leave its traces on every class.
        deepspeed.zero.Init(
            module=nn.ParameterList([unit.parameter]),
            data_parallel_group=self._moves,
            mem_efficient_linear=False,
            remote_device=str(self.home),
            # pages that the GPU can read by itself
            pin_memory=self.home.type == "cpu" and self.device.type == "cuda",
        )

    def _fill(self, unit: Unit, read: Read) -> None:
        part = unit.part.zero_()
        first = len(part) * self.rank
        for name, shape, start in zip(unit.names, unit.shapes, unit.starts, strict=True):
            low, high = max(first, start), min(first + len(part), start + shape.numel())
            if low < high:
                part[low - first : high - first] = read(name, low - start, high - start).detach()

    # ---- what a layer asks for

    def matrix(self, u: int, i: int) -> Tensor:
        """Matrix i of unit u, whole. To be used at once: it is given up when another unit is asked for."""
        return self.units[u].view(self._flat(u), i)

    def named_parameters(self, hf: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """As `hf.named_parameters()`, with the real values, each of which is to be used before the next is asked for."""
        for name, parameter in hf.named_parameters():
            yield name, self.matrix(*self._place[name]) if name in self._place else parameter

    def parameters(self) -> list[nn.Parameter]:
        """The units, as DeepSpeed's partitioned parameters (flat, of size 0 until DeepSpeed gathers them)."""
        return [unit.parameter for unit in self.units]

    @property
    def working_bytes(self) -> int:
        """Most bytes of the device for gathering at a time."""
        offloaded = self.home != self.device
        return gathering_bytes([x.part.nbytes for x in self.units], self.ranks, self.prefetch, offloaded)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the context the whole base is in this rank's memory and nothing is gathered after the start."""
        try:
            for u in range(len(self.units)):
                self._held[u] = self._flat(u)
            self._now = None
            yield
        finally:
            self._held = {}

    # ---- rounds

    def _flat(self, u: int) -> Tensor:
        if u in self._held:
            return self._held[u]
        if self._now is not None and self._now[0] == u:
            # a round in the background moves on when somebody looks after it
            self._turn(wait=False)
            return self._now[1]
        self._now = None
        begin = time.perf_counter()
        while self._arrived is None or self._arrived[0] != u:
            if self._want < 0:
                self._arrived = None
                self._ask(u)
            self._turn(wait=True)
        self._now, self._arrived = self._arrived, None
        self.waited += time.perf_counter() - begin
        before, last = self._recent
        self._next[before, last] = u
        self._recent = (last, u)
        foretold = self._next.get(self._recent, u) if self.prefetch else u
        if foretold != u and foretold not in self._held:
            self._ask(foretold)
        return self._now[1]

    def settle(self) -> None:
        """Give other ranks what they ask for until no rank asks for anything."""
        begin = time.perf_counter()
        self._now = None
        while self._want >= 0:
            self._turn(wait=True)
        self._ask(-1)
        while self._talk is not None or self._move is not None:
            self._turn(wait=True)
        self._served = 0
        self.waited += time.perf_counter() - begin

    def _ask(self, u: int) -> None:
        """Begin a round in which this rank wants unit u (-1: none)."""
        self._want = u
        answers = torch.empty(self.ranks, 2, dtype=torch.long)
        own = torch.tensor([u, self._served])
        self._talk = (
            dist.all_gather_into_tensor(answers.view(-1), own, group=self._talks, async_op=True),
            answers,
        )

    def _turn(self, wait: bool) -> None:
        """Take the round in progress one stage on, if there is one and the stage before is over (or after waiting)."""
        if self._talk is not None:
            work, answers = self._talk
            if wait or work.is_completed():
                work.wait()
                self._talk = None
                u = _chosen(answers.tolist())
                if u >= 0:
                    part = self.units[u].part
                    flat = torch.empty(part.numel() * self.ranks, dtype=part.dtype, device=self.device)
                    # the part itself where it is on the device already
                    own = part.to(self.device, non_blocking=True)
                    # as bytes: not every backend knows every dtype
                    out, own = flat.view(torch.uint8), own.view(torch.uint8)
                    work = dist.all_gather_into_tensor(out, own, group=self._moves, async_op=True)
                    self._move = (work, u, flat)
        elif self._move is not None:
            work, u, flat = self._move
            if wait or work.is_completed():
                work.wait()
                self._move = None
                if u == self._want:
                    self._arrived, self._want = (u, flat), -1
                    self._served += 1
                else:
                    self._ask(self._want)


def unit_of(path: str) -> str:
    """The unit that the matrix of the module at `path` belongs to: its decoder block, or it is one by itself."""
    # up to the first number: a decoder block
    found = re.match(r".*?\.\d+(?=\.)", path)
    return found[0] if found else path


def gathering_bytes(parts: Sequence[int], ranks: int, prefetch: bool, offloaded: bool) -> int:
    """Most bytes of a device for gathering at a time, from the bytes of one rank's part of each unit: the unit at work,
    with `prefetch` another, and the copy of an `offloaded` part on its way into one of them.
    """
    largest = sorted(parts)[-2 if prefetch else -1 :]
    return ranks * sum(largest) + (max(parts) if offloaded else 0)


def _chosen(answers: list[list[int]]) -> int:
    """The unit that a round gathers, from what each rank wants and how many units it has got: the rank that has got
    least goes first, and whoever wants the same gets it too. -1 when no rank wants any.
    """
    wanting = [(served, rank, want) for rank, (want, served) in enumerate(answers) if want >= 0]
    return min(wanting)[2] if wanting else -1


class ShardedLinear(nn.Linear):
    """A frozen linear layer whose weight is gathered for every product and not kept."""

    matrix: frozen.Matrix

    def forward(self, x: Tensor) -> Tensor:
        return frozen.linear(x, self.matrix, self.bias)


class ShardedEmbedding(nn.Embedding):
    """A frozen embedding whose weight is gathered for every look-up."""

    matrix: frozen.Matrix

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.matrix())


def _sharded_class(module: nn.Module) -> type:
    """The module's class with its call of torch's own `forward` going to ours (Gemma's embedding scales what that returns)."""
    cls, kind = type(module), ShardedLinear if isinstance(module, nn.Linear) else ShardedEmbedding
    return kind if cls in (nn.Linear, nn.Embedding) else type(f"Sharded{cls.__name__}", (cls, kind), {})
