"""What a recipe will take, before anything is loaded: memory of a rank by part, work and traffic of an outer step.

Activations come from mass/memory.py, which runs the engines on tensors without numbers; all else is counted from the
model's config. Lengths are the longest that the recipe allows: prompts of `PROMPT` tokens (problems are not read).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from mass import blocks, lora, memory, metagrad
from mass.batch import Sequence, pack
from mass.errors import MassError
from mass.fastlinear import has_bf16_products
from mass.model import DTYPES, read_config
from mass.optimizers import Rule
from mass.recipe import Recipe
from mass.setting import lora_shape
from mass.shards import gathering_bytes, unit_of

PROMPT = 128
# fastest first: the engine, whether blockwise recomputes, and whether first-order passes do although the recipe does not say so;
# what each costs is in `_loop_passes`
ENGINES: dict[str, tuple[memory.Engine, bool, bool]] = {
    "reverse": ("reverse", False, False),
    "blockwise, kept": ("blockwise", False, False),
    "blockwise": ("blockwise", True, False),
    "blockwise, inner.checkpoint": ("blockwise", True, True),
    "finite_difference": ("finite_difference", False, False),
}
# in their place where inner.steps=0
NO_LOOP = "no inner loop"


@dataclass(frozen=True)
class Plan:
    """Bytes of a rank by part, by engine the bytes over the weights, and per outer step and rank FLOPs and bytes sent.

    `main`: bytes of main memory that zero.offload spares the GPU. A CPU has one memory: there they are in `parts`.
    """

    parts: dict[str, int]
    main: dict[str, int]
    generating: dict[str, int]
    engines: dict[str, memory.Peak]
    flops: dict[str, float]
    sent: dict[str, float]

    def total(self, engine: str) -> int:
        """Most bytes at one time: generation and gradients do not happen together."""
        return sum(self.parts.values()) + max(sum(self.generating.values()), self.engines[engine].total)


def make(recipe: Recipe, ranks: int, engines: Collection[str] = tuple(ENGINES)) -> Plan:
    """The plan for `ranks` processes, with these engines of ENGINES. Takes seconds."""
    r = recipe
    config = read_config(r.model.path, r.model.dtype, r.model.cache, r.problems.world)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=DTYPES[r.model.dtype], attn_implementation="sdpa")
    hf = hf.eval().requires_grad_(False)
    sharded = base_is_sharded(r, ranks)
    on_cpu = _on_cpu(r.model.device)
    device = "cpu" if on_cpu else "cuda"
    base = _bytes(hf)
    head = hf.get_output_embeddings().weight
    units = _unit_bytes(hf)
    packed = _packed_bytes(hf) if on_cpu and not sharded else 0
    linear = sum(x.weight.numel() for x in hf.modules() if isinstance(x, torch.nn.Linear)) - head.numel()
    shape = lora_shape(r)
    layers = lora.attach(hf, shape)
    parts = blocks.find(hf, layers)
    text = config.get_text_config()
    adapter = sum((x.weight.shape[0] + x.weight.shape[1]) * shape.rank for x in layers.values())
    outer, state = outer_bytes(adapter, r.zero.stage, ranks)
    own = [unit // ranks for unit in units]
    moves_base = r.zero.offload == "all" and sharded and not on_cpu
    moves_state = r.zero.offload != "no" and not on_cpu
    memory_parts = {
        "base, kept whole" if sharded else "base": base - sum(units) if sharded else base,
        "base shard": sum(own) if sharded and not moves_base else 0,
        "gathered units": gathering_bytes(own, ranks, r.zero.prefetch, moves_base) if sharded else 0,
        "weights packed for text": packed,
        "adapter and its gradient": outer,
        "optimizer": 0 if moves_state else state,
    }
    main = {"optimizer": state} if moves_state else {}
    if moves_base:
        # PyTorch takes pinned memory in powers of two
        main["base shard"] = sum(1 << (size - 1).bit_length() for size in own)
    T = r.outer.together
    i = r.inner
    # without an inner loop there are no examples
    N, new = (r.generate.examples, r.generate.max_new_tokens) if i.steps else (0, 0)
    answer = r.generate.answer_tokens
    G = r.outer.rollouts if r.outer.loss == "verifier" else 1
    rule = Rule(i.optimizer, i.momentum, i.beta1, i.beta2, i.eps, i.eps_root, i.clip)
    inner = pack([[Sequence([0] * (PROMPT + new), PROMPT)] * N] * T, 0)
    share = blocks.attends_fully(hf)
    last = pack([[Sequence([0] * (PROMPT + answer), PROMPT)] * G] * T, 0, share=share)
    policy = None
    if i.steps and r.outer.writes:
        at_once = min(T, max(1, r.outer.micro_rows // N))
        policy = pack([[Sequence([0] * (PROMPT + new), PROMPT)] * N] * at_once, 0, share=share)
    peaks: dict[str, memory.Peak] = {}
    # with inner.checkpoint two engines are one
    same: dict[tuple[str, bool, bool], memory.Peak] = {}
    seen: dict[bool, int] = {}
    if not i.steps:
        peaks[NO_LOOP] = memory.predict_outer(
            hf, parts, shape, last, checkpoint=i.checkpoint, with_kl=_has_kl(r), device=device
        )
    for name in engines if i.steps else ():
        engine, recompute, again = ENGINES[name]
        key = (engine, recompute, again or i.checkpoint)
        if key not in same:
            same[key] = memory.predict(
                hf, parts, shape, inner, last, engine=engine, steps=i.steps, recompute=recompute, checkpoint=key[2],
                rule=rule, truncate=r.meta_gradient.truncate, need_init=r.outer.through_init,
                keep_grads=i.learned_lr != "no", policy=policy, with_kl=r.outer.holds, loops=loops_held(r),
                device=device, seen=seen,
            )  # fmt: skip
        peaks[name] = same[key]
    rows = min(r.generate.batch_rows, T * max(N, G))
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    column = 2 * text.num_hidden_layers * kv_heads * width * head.element_size()
    generating = {
        # prompts once for the rows that share one
        "KV cache": column * (rows * max(new, answer) + min(rows, T) * PROMPT),
        "logits": rows * head.shape[0] * 4,
        # of each row's adapter a copy in fp32, and from that one in the base's dtype
        "adapters of the rows": (T if G > 1 and i.steps else 1) * adapter * (4 + head.element_size() % 4),
    }
    if sharded and r.zero.hold_base:
        # beside the rank's own part; nothing is gathered meanwhile
        generating["base held whole"] = max(0, sum(units) - memory_parts["gathered units"])
    flops = _flops(r, linear, head.numel(), blocks.weights_below(parts))
    sent = {"gradients": 2 * 4.0 * adapter * 2 * (ranks - 1) / ranks}
    if sharded:
        T_parts = -(-r.outer.tasks // T)
        # text is generated with the base gathered for every token, or once for all
        draws = _outer_losses(r) * (r.outer.loss == "verifier")
        # rows that do not fit wait for others to end
        rounds, answer_rounds = (-(-T * count // r.generate.batch_rows) for count in (N, G))
        texts = rounds * new + draws * answer_rounds * answer
        if r.zero.hold_base:
            texts = bool(i.steps) + draws
        passes = T_parts * (texts + _gathers(r))
        sent["base, gathered"] = base * passes * (ranks - 1) / ranks
    return Plan(memory_parts, main, generating, peaks, flops, sent)


def report(recipe: Recipe, ranks: int, limit_gb: float | None) -> str:
    """The plan as text; with `limit_gb` of a rank, what does not fit and which key mends it."""
    plan = make(recipe, ranks)
    lines = [f"{recipe.model.path}, {ranks} rank(s), zero.stage={recipe.zero.stage}. Of one rank, in GB:"]
    for name, size in (plan.parts | plan.generating).items():
        lines.append(f"  {name:38s}{size / 1e9:10.3f}")
    lines += [f"  {f'in main memory: {name}':38s}{size / 1e9:10.3f}" for name, size in plan.main.items()]
    lines.append(f"  {'engine':38s}{'activations':>12s}{'trajectory':>12s}{'in all':>10s}")
    for name, peak in plan.engines.items():
        total = plan.total(name) / 1e9
        fits = "" if limit_gb is None else ("  fits" if total <= limit_gb else "  does not fit")
        active = max(peak.first_order, peak.sweep) / 1e9
        lines.append(f"  {name:38s}{active:12.3f}{peak.kept / 1e9:12.3f}{total:10.3f}{fits}")
    lines.append("An outer step of one rank, in TFLOP:")
    lines += [f"  {name:38s}{x / 1e12:10.3f}" for name, x in plan.flops.items()]
    lines.append("Sent by one rank in an outer step, in GB:")
    lines += [f"  {name:38s}{x / 1e9:10.3f}" for name, x in plan.sent.items()]
    if limit_gb is not None:
        lines += _advice(recipe, plan, ranks, limit_gb * 1e9)
    return "\n".join(lines)


def base_is_sharded(recipe: Recipe, ranks: int) -> bool:
    """Whether ranks keep parts of the base; one rank too, when that part lies in main memory."""
    return recipe.zero.stage == 3 and (ranks > 1 or recipe.zero.offload == "all")


def machines(word: str) -> tuple[int, float | None]:
    """(ranks, GB of each or None) of `--plan=8` or `--plan=8x80`."""
    found = re.fullmatch(r"([1-9]\d*)(?:x(\d+(?:\.\d+)?))?", word)
    if found is None:
        raise MassError(f"--plan={word}: give ranks, or ranks x GB of each: --plan=8x80")
    return int(found[1]), float(found[2]) if found[2] else None


def _bytes(module: torch.nn.Module) -> int:
    return sum(x.nbytes for x in {id(x): x for x in module.parameters()}.values())


def _unit_bytes(hf: torch.nn.Module) -> list[int]:
    """What is gathered together at stage 3, ascending."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for path, module in hf.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            sizes[unit_of(path)] = sizes.get(unit_of(path), 0) + module.weight.nbytes
    return sorted(sizes.values())


def _on_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def loops_held(recipe: Recipe) -> int:
    """Inner loops whose trajectories a step holds together: what rewards the generator may want some of its own."""
    o = recipe.outer
    if not o.writes or o.credit == "score":
        return 1
    # with one inner step each example has an adapter and a gradient; with more, one loop is run after the other
    return 1 + (recipe.generate.examples if o.credit == "left_out" and recipe.inner.steps == 1 else 1)


def _packed_bytes(hf: torch.nn.Module) -> int:
    """A CPU keeps the matrices of a bf16 base a second time, in the order that its products like (mass/fastlinear.py)."""
    if not has_bf16_products():
        return 0
    linears = (m.weight for m in hf.modules() if isinstance(m, torch.nn.Linear))
    return sum(w.nbytes for w in linears if w.dtype == torch.bfloat16)


def outer_bytes(size: int, stage: int, ranks: int) -> tuple[int, int]:
    """fp32: the value and its gradient; Adam's two moments, and from stage 1 on a master copy."""
    state = (2 if stage == 0 else 3) * size * 4 // (ranks if stage else 1)
    value = size * 4 // (ranks if stage == 3 else 1)
    gradient = size * 4 // (ranks if stage >= 2 else 1)
    return value + gradient, state


def _flops(r: Recipe, linear: int, head: int, below: int = 0) -> dict[str, float]:
    """A product of a frozen matrix takes 2 FLOPs a weight and token, forward and backward alike; attention is left out.
    `below`: those of the `linear` weights that lie below the lowest adapter, which no backward pass reaches."""
    T, N, new, answer = (
        r.outer.tasks,
        r.generate.examples,
        r.generate.max_new_tokens,
        r.generate.answer_tokens,
    )
    G = r.outer.rollouts if r.outer.loss == "verifier" else 1
    token = 2.0 * (linear + head)
    back = token - 2.0 * below
    # what a first-order pass that keeps one block's activations reads a second time: no head, and nothing that it does not go
    # back through
    again = 2.0 * (linear - below)
    gradient = back + r.inner.checkpoint * again
    # the base reads as well, and the divergence goes back through the head on its own
    kl = token + 2.0 * head
    if not r.inner.steps:
        read = T * G * (PROMPT + answer)
        sampled = read if r.outer.loss == "verifier" else 0
        return {"generate": token * sampled, "outer loss": (token + gradient + _has_kl(r) * kl) * read}
    train = T * N * (PROMPT + new)
    loops = _loops(r)
    once = T * G * (PROMPT + answer)
    after = loops * once
    last = once + after
    without = N * once if _leaves_out(r) else 0
    sampled = _outer_losses(r) * once if r.outer.loss == "verifier" else 0
    out = {
        "generate": token * (train + sampled),
        # what is looked at for the scorer's features has no logits
        "score": 2.0 * linear * train,
        # the weights' own loss has a gradient where it is trained on
        "outer loss, before and after": token * last + gradient * (r.outer.solves * once + after),
        "policy gradient": r.outer.writes * (token + gradient + r.outer.holds * kl) * train,
    }
    if without:
        passes = 1 if r.inner.steps == 1 else N * r.inner.steps
        out["without each example"] = (token + gradient) * train * passes + token * without
    # whether a loop exploded is read off the loss where it ends
    check = (r.inner.max_growth is not None) * token * train * loops
    for name in ENGINES:
        whole, once_more, read_below = _loop_passes(r, name)
        own = whole * back + once_more * again + read_below * 2.0 * below
        out[f"inner loop and meta, {name}"] = own * train * loops + check
    return out


def _loop_passes(r: Recipe, name: str) -> tuple[int, int, int]:
    """How often an inner loop and the way back go, in a direction each: through the head and the blocks with adapters, through these
    blocks alone (recomputation), and through the blocks below, which are read only."""
    engine, recompute, own_checkpoint = ENGINES[name]
    again = own_checkpoint or r.inner.checkpoint
    total, last = [0, 0, 0], metagrad.recorded(r.inner.steps, r.meta_gradient.truncate)
    for k, way_back, hessian in _steps(r):
        recorded = engine == "reverse" and k >= r.inner.steps - last
        counts: list[tuple[int, int, int]] = [(2, again and not recorded, 1)]
        if way_back and engine == "reverse":
            # a step that was not recorded is taken again
            counts.append((1 + hessian + 2 * (not recorded), 0, not recorded))
        elif way_back and engine == "blockwise":
            # dual numbers: two passes each way
            counts.append((2 + 2 * hessian, 2 * (hessian and recompute), 1))
        elif way_back:
            sides = 1 if r.meta_gradient.one_sided else 2
            counts.append((sides * (1 + hessian), sides * (hessian and again), sides))
        total = [sum(column) for column in zip(total, *counts, strict=True)]
    return total[0], total[1], total[2]


def _steps(r: Recipe) -> list[tuple[int, bool, bool]]:
    """Each inner step, whether it has a way back, and whether that has a Hessian product: the first step's has none unless the
    start has a gradient (`metagrad.sweep`)."""
    K = r.inner.steps
    first = K - min(K, r.meta_gradient.truncate or K)
    return [(k, k >= first, k > first or (k == first and r.outer.through_init)) for k in range(K)]


def _loops(r: Recipe) -> int:
    """Inner loops with a way back: the generator's credit may want one of its own."""
    return 1 + (r.outer.writes and r.outer.credit == "uniform")


def _leaves_out(r: Recipe) -> bool:
    return r.outer.writes and r.outer.credit == "left_out"


def _outer_losses(r: Recipe) -> int:
    """With an inner loop: before it, after each, and without each example."""
    return 1 + _loops(r) + _leaves_out(r) * r.generate.examples if r.inner.steps else 1


def _gathers(r: Recipe) -> int:
    """How often the gradients of T tasks at once gather a sharded base, each direction a pass; what is recomputed is there already.
    By an engine that is exact: what finite differences read more, and `reverse` for steps before the recorded, is left out."""
    if not r.inner.steps:
        return 2 + _has_kl(r)
    N, K, o = r.generate.examples, r.inner.steps, r.outer
    looks = r.inner.max_growth is not None
    loop = sum(2 + way_back + hessian for _, way_back, hessian in _steps(r)) + looks
    # the prompts and the examples, for the scorer's features
    count = 2 + (1 + o.solves) + _loops(r) * (loop + 2)
    if o.writes:
        count += -(-o.together // max(1, o.micro_rows // N)) * (2 + o.holds)
    if _leaves_out(r):
        count += (2 if K == 1 else N * 2 * K) + N
    return count


def _has_kl(r: Recipe) -> bool:
    """Without an inner loop: whether the base model reads the answers, too."""
    return r.outer.loss == "verifier" and r.outer.beta > 0


def _advice(r: Recipe, plan: Plan, ranks: int, limit: float) -> list[str]:
    fixed = sum(plan.parts.values())
    fitting = [name for name in plan.engines if plan.total(name) <= limit]
    exact = [name for name in fitting if name != "finite_difference"]
    if NO_LOOP in fitting:
        return ["It fits."]
    if exact:
        return [f"The fastest exact engine that fits: {exact[0]}."]
    if fitting:
        return [
            "No exact engine fits: lower outer.tasks_at_once, generate.examples or generate.max_new_tokens, "
            "or take meta_gradient.mode=finite_difference."
        ]
    lines = ["Nothing fits."]
    if r.zero.stage < 3 and ranks > 1 and fixed > limit / 2:
        lines.append("zero.stage=3 shards the base.")
    if fixed > limit:
        lines.append(
            "The base alone is too large: more ranks at zero.stage=3, zero.offload=all, or model.dtype=bf16."
        )
    if fixed + sum(plan.generating.values()) > limit:
        lines.append("Generation is too large: lower generate.batch_rows or outer.tasks_at_once.")
    if fixed + min(peak.total for peak in plan.engines.values()) > limit:
        lines.append("The gradients are too large: outer.tasks_at_once=1, then lower generate.examples.")
    return lines
