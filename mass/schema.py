"""Every recipe key once: name, type, default, bounds and meaning. Checks, `--help` and docs/recipes.md read it here.

No torch: mass/recipe.py fills these dataclasses in.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mass.keys import Key, group, key


@dataclass(frozen=True)
class Run:
    name: str = key("run", "name of the run: its files are in FOLDER/NAME/")
    folder: str = key("checkpoints", "folder of all runs")
    seed: int = key(0, "everything random follows from it", ge=0)
    resume: str = key("no", "no; auto: go on from the newest step if there is one; or a step folder")
    patience: float = key(600.0, "seconds that ranks wait for one that computes longer than they", ge=10)
    threads: int = key(1, "CPU threads of a process; more are slow where cores are shared", ge=1)


@dataclass(frozen=True)
class Model:
    path: str = key("", "a folder, a hub id, package:NAME/FILE.gguf in a package, world:NAME or tiny:llama")
    dtype: Literal["bf16", "fp32"] = key("bf16", "of the frozen base; everything learned is fp32")
    attention: Literal["sdpa", "eager"] = key("sdpa", "attention where no second derivative is needed")
    cache: str | None = key(None, "folder for models made here; null = $MASS_CACHE or ~/.cache/mass")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto = the GPU of this rank if there is one")


@dataclass(frozen=True)
class Prompt:
    style: Literal["auto", "chat", "plain"] = key("auto", "auto = chat if the tokenizer has a chat template")
    solve_shots: int = key(0, "solved problems shown before the problem to solve", ge=0)
    generate_shots: int = key(
        2,
        "shown cases of a problem and one like it, solved; alike: of one family or file, or with one value in a column source",
        ge=0,
    )
    pool: int = key(16, "training problems set aside to be shown, and never trained on", ge=0)
    solve_instruction: str | None = key(None, "said before a problem; null = the text in mass/prompts.py")
    generate_instruction: str | None = key(None, "asks for an example; null = the text in mass/prompts.py")


@dataclass(frozen=True)
class Columns:
    problem: str = key("problem", "column with the problem")
    answer: str = key("answer", "column with the final answer, or with text that states it")
    solution: str = key("solution", "column with a worked solution; may be absent")
    id: str = key("id", "column with an identifier; may be absent")


@dataclass(frozen=True)
class Problems:
    train: list[str] = key(
        [], "sources: FILE.jsonl, a hub id (OWNER/NAME or OWNER/NAME:CONFIG), gym:NAME or world:NAME"
    )
    heldout: list[str] | None = key(None, "the same to hold out; null = split off the training problems")
    heldout_size: int = key(
        100, "held-out problems made from a gym or world, or split off: at most a quarter", ge=0
    )
    size: int = key(
        1000, "training problems made from gyms and worlds; with weights, drawn from all sources", ge=1
    )
    weights: list[float] | None = key(
        None, "share of each source in size; null = files whole, gyms alike", ge=0
    )
    gym: dict[str, dict[str, Any]] = key({}, "settings of reasoning-gym families: {NAME: {setting: value}}")
    world: dict[str, dict[str, Any]] = key(
        {}, "settings of planted worlds, and of their base models: {NAME: {setting: value}}"
    )
    columns: Columns = group(
        Columns,
        "columns of a data set; rows with a key problem but not this one have the defaults; a column source, if there is one, "
        "says of which kind a problem is",
    )
    split: str = key(
        "train",
        "split of a data set to train on, or a slice: train[:1000]; of a file, which is one split, the slice alone counts",
    )
    heldout_split: str = key("test", "the same of what is held out")
    demonstrations: int = key(
        0,
        "solved problems of each subject of a file set aside to demonstrate its others, at test time; 0 = none",
        ge=0,
    )
    verifier: Literal["auto", "exact", "numeric", "math", "gym"] = key("auto", "how an answer is checked")


@dataclass(frozen=True)
class Lora:
    rank: int = key(8, "rank R of the adapter", ge=1)
    alpha: float = key(16.0, "the update is scaled by alpha / rank", gt=0)
    targets: list[str] = key(["all-linear"], "linear layers by name, e.g. q_proj; all-linear spares the head")
    last: int | None = key(
        None, "adapters on the last so many decoder blocks, no backward pass below; null = all", ge=1
    )


@dataclass(frozen=True)
class Generate:
    examples: int = key(6, "practice examples of a task (N)", ge=1)
    max_new_tokens: int = key(128, "longest example, in tokens", ge=1)
    temperature: float = key(1.0, "of examples and, at test time, own answers; outer rollouts have 1", gt=0)
    top_p: float = key(
        1.0,
        "of practice examples: keep the likeliest tokens that make up this probability; 1 = off",
        gt=0,
        le=1,
    )
    top_k: int = key(0, "of practice examples: keep this many likeliest tokens; 0 = off", ge=0)
    min_p: float = key(
        0.0,
        "of practice examples: drop tokens less likely than this share of the likeliest; 0 = off",
        ge=0,
        lt=1,
    )
    batch_rows: int = key(128, "sequences generated at once", ge=1)
    answer_tokens: int = key(128, "longest answer, greedy or rollout, in tokens", ge=1)
    engine: Literal["ours", "hf", "vllm"] = key(
        "ours", "who draws: mass's own loop, generate of transformers (slow, for comparison), or vLLM"
    )
    step: Literal["eager", "cuda_graph", "compile"] = key(
        "eager", "decode step: as it is, recorded as a CUDA graph, or compiled (minutes at the first text)"
    )


@dataclass(frozen=True)
class Scorer:
    temperature: float = key(1.0, "of the softmax from scores to weights", gt=0)
    layers: list[float] = key([0.5, 1.0], "layers that are read, as fractions of the depth", ge=0, le=1)
    hidden: int = key(64, "width of the head", ge=1)
    pool: Literal["solution", "all"] = key("solution", "tokens of an example that are averaged")
    l2: float = key(0.2, "penalty on centred scores, so that the softmax does not saturate", ge=0)


@dataclass(frozen=True)
class Inner:
    steps: int = key(
        2,
        "fine-tuning steps on the weighted examples (K); 0 = no inner loop: the outer loss trains the policy as it is",
        ge=0,
    )
    optimizer: Literal["sgd", "adam"] = key("sgd", "update rule that is differentiated through")
    lr: float = key(0.3, "learning rate", ge=0)
    momentum: float = key(0.0, "of sgd", ge=0, lt=1)
    beta1: float = key(0.9, "of adam", ge=0, lt=1)
    beta2: float = key(0.999, "of adam", ge=0, lt=1)
    eps: float = key(1e-8, "of adam, added to the square root", ge=0)
    eps_root: float = key(0.0, "of adam, added under the square root: tames its derivative", ge=0)
    clip: float | None = key(1.0, "largest norm of a task's inner gradient; null = off", gt=0)
    start: Literal["policy", "base"] = key(
        "policy",
        "what is updated and answers: the policy, which writes the examples too, or the base model; then the policy only writes",
    )
    max_growth: float | None = key(
        2.0,
        "drop a task whose inner loss grows by this factor; null = do not look, a forward pass less",
        gt=1,
    )
    learned_lr: Literal["no", "one", "layer"] = key("no", "learn lr too: one rate, or one for each layer")
    checkpoint: bool = key(
        True, "recompute first-order gradients block by block: less memory, about a third more time"
    )


@dataclass(frozen=True)
class Guard:
    max_loss: float | None = key(
        None, "skip examples whose loss is larger at the start, in nats; null = off", gt=0
    )
    max_grad_norm: float | None = key(
        None, "skip examples whose own gradient is longer at the start; null = off", gt=0
    )
    fisher: float = key(0.0, "pull to the start, weighted by Fisher information; 0 = off", ge=0)
    restore: float = key(0.0, "chance of a weight to go back to the start after a step; 0 = off", ge=0, le=1)
    heldout: float = key(0.0, "share of the examples that picks the step to stop at; 0 = off", ge=0, lt=1)


@dataclass(frozen=True)
class Knobs:
    margin: float = key(0.5, "tt-si, tt-d: update where the two likeliest answers are closer", gt=0, le=1)
    gate_samples: int = key(4, "tt-si, tt-d: own answers that the gate looks at", ge=1)
    threshold: float = key(
        0.3, "vds: least share of the scorer's softmax that the best answer has", ge=0, le=1
    )
    kl: float = key(0.001, "ttrl: coefficient of the KL divergence from the start", ge=0)
    forking: float = key(
        1.0, "ttrl: share of the tokens learned from, those of most entropy; 1 = all", gt=0, le=1
    )
    band: float = key(0.0, "ttrl: coefficient that keeps their entropy in a band; 0 = off", ge=0)
    teacher_seconds: float = key(60.0, "tt-d: time limit of one request to a teacher's address", gt=0)


@dataclass(frozen=True)
class MetaGradient:
    mode: Literal["auto", "blockwise", "reverse", "finite_difference"] = key(
        "auto", "second-order engine; none is used with inner.steps=0"
    )
    memory_gb: float | None = key(None, "memory that auto may plan with; null = what is free", gt=0)
    truncate: int | None = key(None, "differentiate the last J inner steps only; null = all", ge=1)
    one_sided: bool = key(
        False, "finite_difference by one more pass a step instead of two: cheaper, less exact"
    )


@dataclass(frozen=True)
class Outer:
    steps: int = key(100, "outer steps of the run", ge=1)
    tasks: int = key(4, "tasks of one rank in one step (T)", ge=1)
    loss: Literal["gold", "verifier"] = key(
        "gold", "of the reference solution, or of sampled answers' rewards"
    )
    tasks_at_once: int | None = key(
        None, "tasks worked at once, for memory; the step is the same; null = all of outer.tasks", ge=1
    )
    rollouts: int = key(8, "sampled answers of a task, verifier loss only (G)", ge=1)
    lr_policy: float = key(3e-5, "learning rate of the policy adapter; 0 = keep it", ge=0)
    lr_scorer: float = key(1e-3, "learning rate of the scorer; 0 = keep it", ge=0)
    lr_inner: float = key(1e-2, "learning rate of a learned inner learning rate", ge=0)
    gamma: float = key(
        0.1, "coefficient of the solver loss of the policy without update; with inner.steps=0 it is 1", ge=0
    )
    beta: float = key(
        0.01,
        "coefficient of the KL divergence from the base model; with inner.steps=0 on the answers of outer.loss=verifier, and "
        "none with gold",
        ge=0,
    )
    generator: float = key(1.0, "coefficient of the generator loss, its KL included", ge=0)
    credit: Literal["score", "uniform", "left_out"] = key(
        "score",
        "what rewards the generator: the derivative at the scorer's weights; at uniform ones (a second inner loop), where it tells "
        "good examples apart however sharp the scorer is; or, in nats, what the outer loss rises by without the example (N inner "
        "loops more), which rewards no second example of what is there already",
    )
    reward: Literal["example", "answer", "solution"] = key(
        "example",
        "tokens of an example that its credit rewards: all, those up to its answer (a check that follows stays honest), or of "
        "those the solution's alone (less noise where the problem hardly matters)",
    )
    beta_check: float = key(
        0.0, "reward=answer and solution: coefficient of the KL divergence on the tokens left out", ge=0
    )
    through_init: bool = key(False, "pass the meta-gradient to the policy as the inner loop's start, too")
    warmup: int = key(5, "steps in which the learning rates rise from 0", ge=0)
    clip_grad: float = key(1.0, "largest norm of the outer gradient", gt=0)
    ratio_clip: float = key(
        0.2,
        "how far a token's policy ratio may leave 1; a sample has one gradient, so that it is 1 but for rounding",
        gt=0,
    )
    malformed_penalty: float = key(1.0, "advantage taken from a malformed example", ge=0)
    min_spread: float = key(
        1e-8,
        "a task whose credits, or rewards, spread less than this is left out (not so of the generator with credit=left_out)",
        ge=0,
    )
    max_skipped: int = key(5, "steps in a row with a non-finite gradient that stop the run", ge=1)
    micro_rows: int = key(32, "sequences in one policy-gradient forward", ge=1)

    @property
    def together(self) -> int:
        """How many tasks a rank works on at one time."""
        return min(self.tasks, self.tasks_at_once or self.tasks)

    @property
    def writes(self) -> bool:
        """Whether the generator is trained."""
        return self.generator > 0 and self.lr_policy > 0

    @property
    def solves(self) -> bool:
        """Whether the policy is trained to answer without update, beside an inner loop."""
        return self.gamma > 0 and self.lr_policy > 0

    @property
    def holds(self) -> bool:
        """Whether the generator is held to the base model."""
        return self.beta > 0 or (self.reward != "example" and self.beta_check > 0)


@dataclass(frozen=True)
class Zero:
    stage: int = key(
        0,
        "DeepSpeed ZeRO stage of the outer parameters; 3 also shards the frozen base over the ranks",
        ge=0,
        le=3,
    )
    hold_base: bool = key(
        False, "stage 3: hold the whole base while text is generated; faster where memory allows"
    )
    prefetch: bool = key(
        True,
        "stage 3: gather the block that comes next while one computes; false holds one at a time and waits for each",
    )
    offload: Literal["no", "optimizer", "all"] = key(
        "no",
        "what stays in main memory: the outer optimizer's state (from stage 1 on), or that and the base (stage 3)",
    )
    config: str | None = key(None, "a DeepSpeed JSON file of yours; what contradicts the recipe is refused")


@dataclass(frozen=True)
class Save:
    every: int = key(10, "outer steps between checkpoints", ge=1)
    keep: int = key(3, "newest checkpoints kept; 0 = all", ge=0)


@dataclass(frozen=True)
class Evaluate:
    every: int = key(
        0,
        "outer steps between evaluations, from step 0 to the last; 0, or more than outer.steps, = never",
        ge=0,
    )
    problems: int = key(32, "held-out problems of an evaluation, of all sources in turn", ge=1)


@dataclass(frozen=True)
class Log:
    samples_every: int = key(1, "outer steps between tables of examples; 0 = never", ge=0)
    tensorboard: bool = key(True, "write TensorBoard files")


@dataclass(frozen=True)
class Recipe:
    run: Run = group(Run, "where a run is kept and how it starts")
    model: Model = group(Model, "the frozen base model")
    prompt: Prompt = group(Prompt, "how the model is asked")
    problems: Problems = group(Problems, "what it is trained and evaluated on")
    lora: Lora = group(Lora, "the adapter: it is the policy, and what the inner loop updates")
    generate: Generate = group(Generate, "sampling of practice examples and answers")
    scorer: Scorer = group(Scorer, "the head that weighs the examples")
    inner: Inner = group(Inner, "the update at test time")
    guard: Guard = group(Guard, "guards of the update, at test time alone; all off")
    knobs: Knobs = group(Knobs, "settings of single test-time methods")
    meta_gradient: MetaGradient = group(MetaGradient, "the derivative through the inner loop")
    outer: Outer = group(Outer, "meta-training")
    zero: Zero = group(Zero, "sharding")
    save: Save = group(Save, "checkpoints")
    evaluate: Evaluate = group(Evaluate, "evaluation while training")
    log: Log = group(Log, "what is shown and written")


def _keys(cls: Any, prefix: str = "") -> Iterator[Key]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            default = typing.cast(Any, field).default_factory()
            yield Key(prefix + field.name, hints[field.name], default, **field.metadata)


KEYS = {one.name: one for one in _keys(Recipe)}
GROUPS = {name.rpartition(".")[0] for name in KEYS}


def keys_of(group: str) -> list[str]:
    return [name for name in KEYS if name.startswith(group + ".")]
