"""What mass-adapt works with: a run folder, a PEFT folder or a bare model, found out (`plan`) and loaded (`build_kit`)."""

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mass import checkpoint, chooser, recipe, teacher, vllm_engine
from mass.blocks import Split, split
from mass.choices import Kit, Teacher
from mass.choices.guards import fisher_information
from mass.errors import MassError
from mass.forward import check_model
from mass.lora import LoraLinear, attach, detach, load_peft, read_peft_shape
from mass.methods import Method, find
from mass.model import LanguageModel, check_tokenizer, language_model, load
from mass.optimizers import Rule
from mass.problems import Problem, Task, load_tasks
from mass.prompts import make_prompts
from mass.recipe import Recipe
from mass.rows import as_object, json_lines
from mass.scorer import Scorer
from mass.setting import answer_sampling, example_sampling, lora_shape
from mass.splits import draw_pool

# what a saved adapter and scorer were made with
FIXED = ("lora.", "scorer.layers", "scorer.hidden", "scorer.pool")
# what changes time, memory and rounding, but no answer otherwise
SPEED = ("run.threads", "model.device", "model.cache", "generate.batch_rows", "inner.checkpoint")


@dataclass(frozen=True)
class Plan:
    """What to load: the recipe with its overrides, and a run's step folder or a PEFT folder (neither: a bare model)."""

    recipe: Recipe
    step: Path | None = None
    peft: Path | None = None
    # tokens that a problem may cost; who writes the examples of `tt-d`: a model, or http://HOST:PORT/v1#MODEL
    budget: int | None = None
    teacher: str | None = None

    @property
    def has_pool(self) -> bool:
        """Whether there are training problems for shots and for `random`."""
        if self.step is None:
            return bool(_sources(self.recipe))
        shots = self.step.parent / "shots.jsonl"
        # a missing one is for `build_kit` to complain of
        return not shots.is_file() or shots.stat().st_size > 0

    @property
    def default_method(self) -> str:
        """`mass` where there is a trained scorer, else `quest`; `none` where no step would be taken."""
        if self.recipe.inner.steps == 0:
            return "none"
        return "mass" if self.step else "quest"

    def method(self, name: str, *, has_truth: bool = False) -> Method:
        """The row of the table. Raises MassError that says what it lacks here. `has_truth`: the problems are of a world."""
        return find(
            name,
            has_scorer=self.step is not None,
            has_pool=self.has_pool,
            has_teacher=self.teacher is not None,
            has_chooser=self.step is not None and chooser.load(self.step.parent) is not None,
            has_truth=has_truth,
            steps=self.recipe.inner.steps,
        )


def plan(
    run: str | None,
    model: str | None,
    overrides: Sequence[str] = (),
    *,
    loaded: PreTrainedModel | None = None,
) -> Plan:
    """Find out what `--run` and `--model` name; nothing is loaded. Raises MassError for whatever is wrong with them.

    `overrides` are key=value. A run brings its recipe; all else starts from the recipe's defaults. `loaded`: a model in
    memory, that stands where the base model would be loaded.
    """
    if run is None and model is None and loaded is None:
        raise MassError("name what is to adapt: --run FOLDER (of a run, or a PEFT adapter) or --model MODEL")
    folder = Path(run).expanduser() if run is not None else None
    if folder is not None and not folder.is_dir():
        raise MassError(f"--run {run}: there is no such folder. It wants a run folder, e.g. checkpoints/demo")
    if folder is not None and not (folder / "adapter_config.json").is_file():
        if model is not None:
            raise MassError("--model goes with a PEFT folder or stands alone: a run names its own model")
        step = checkpoint.step_of(folder)
        fixed = [text for text in overrides if text.startswith(FIXED)]
        if fixed:
            raise MassError(
                f"{fixed[0]}: the saved adapter and scorer of {run} were not made so. Leave it out."
            )
        found = recipe.load(step.parent / "recipe.yaml", overrides, training=False)
        by_hand = [text for text in overrides if text.startswith("inner.lr=")]
        if by_hand and found.inner.learned_lr != "no":
            raise MassError(
                f"{by_hand[0]}: this run learned its inner rate. Add inner.learned_lr=no to set it by hand."
            )
        return Plan(found, step=step)
    base = model
    if loaded is not None:
        base = loaded.name_or_path or "a model in memory"
    elif base is None and folder is not None:
        base = _base_of(folder)
    return Plan(_defaults(str(base), overrides), peft=folder)


def settings_key(plan: Plan) -> str:
    """16 hexadecimal digits of everything that answers depend on: recipe (less `SPEED`), trained weights, shots, budget."""
    digest = hashlib.sha256()
    tree = yaml.safe_load(recipe.dump(plan.recipe))
    for name in SPEED:
        group, _, key = name.partition(".")
        del tree[group][key]
    digest.update(json.dumps([tree, plan.budget, plan.teacher], sort_keys=True).encode())
    files = [plan.step / "meta.json", plan.step.parent / "shots.jsonl"] if plan.step else []
    files += [plan.step.parent / chooser.FILE] if plan.step else []
    files += (
        [plan.peft / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        if plan.peft
        else []
    )
    # without a run shots are drawn from these; a hub set and a folder of one are known by name alone
    files += [] if plan.step else [Path(source).expanduser() for source in plan.recipe.problems.train]
    for path in files:
        # the hash of each file of a step is in its meta.json
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


def build_kit(plan: Plan, loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None) -> Kit:
    """Load the model, the policy, the scorer, the shots and the teacher that a plan names.

    `loaded`: the model and tokenizer where they are in memory already; the model gets LoRA slots.
    """
    r = plan.recipe
    if r.generate.engine == "vllm":
        vllm_engine.check_installed()
    pool = _pool(plan)
    m = r.model
    hf, tokenizer = loaded or load(
        m.path,
        dtype=m.dtype,
        device=m.device,
        cache=m.cache,
        attention=m.attention,
        world=r.problems.world,
    )
    check_model(hf)
    # before the slots change the parameters' names
    print_of = checkpoint.fingerprint(hf.named_parameters()) if plan.step else None
    folder = plan.step / "policy" if plan.step else plan.peft
    shape = read_peft_shape(folder) if folder else lora_shape(r)
    lm = LanguageModel(hf, tokenizer, attach(hf, shape), shape, m.path)
    policy, head, saved_rates = None, None, {}
    if plan.step:
        contents = checkpoint.load(plan.step, lm.lora, print_of)
        policy = contents.policy
        width = hf.config.get_text_config().hidden_size
        head = Scorer(width, len(r.scorer.layers), r.scorer.hidden).requires_grad_(False)
        head.load_state_dict(contents.scorer)
        head.to(lm.device)
        saved_rates = contents.meta.get("extra", {}).get("inner_lr", {})
    elif plan.peft:
        policy = load_peft(plan.peft, lm.lora)
    if policy is not None:
        policy = {key: tensor.to(lm.device) for key, tensor in policy.items()}
    parts = _parts(lm)
    g, i = r.generate, r.inner
    keys = [f"{name}.{kind}" for name in lm.lora for kind in "AB"]
    kit = Kit(
        lm,
        make_prompts(tokenizer, r.prompt.style, r.prompt.solve_instruction, r.prompt.generate_instruction),
        Rule(i.optimizer, i.momentum, i.beta1, i.beta2, i.eps, i.eps_root, i.clip),
        _rates(r, saved_rates, keys, parts, lm.device),
        example_sampling(r),
        answer_sampling(r, g.temperature),
        examples=g.examples,
        steps=i.steps,
        max_growth=i.max_growth,
        policy=policy if i.start == "policy" else None,
        author=policy if i.start == "base" else None,
        head=head,
        depths=r.scorer.layers,
        pool_kind=r.scorer.pool,
        temperature=r.scorer.temperature,
        pool=pool,
        solve_shots=r.prompt.solve_shots,
        generate_shots=r.prompt.generate_shots,
        parts=parts,
        recompute=i.checkpoint,
        seed=r.run.seed,
        budget=plan.budget,
        teacher=_teacher(r, plan.teacher, tokenizer) if plan.teacher else None,
        guard=r.guard,
        knobs=r.knobs,
        chooser=chooser.load(plan.step.parent) if plan.step else None,
    )
    return dataclasses.replace(kit, fisher=fisher_information(kit)) if r.guard.fisher else kit


@contextlib.contextmanager
def lent(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within the context a user's own model is as `mass.model.load` leaves one: eval mode, frozen, with a pad token.

    Afterwards model and tokenizer are as they were, and LoRA slots that were put into it are gone. Raises MassError for
    a model that cannot be adapted.
    """
    if not isinstance(hf, PreTrainedModel):
        raise MassError(
            f"model is a {type(hf).__name__}, and a transformers model is wanted. Of a PeftModel, merge_and_unload() "
            "makes one; or save its adapter and name the folder: run=FOLDER"
        )
    if any(isinstance(module, LoraLinear) for module in hf.modules()):
        raise MassError(
            "this model has LoRA slots of mass already (another call of mass.adapt is at work with it?)"
        )
    training = [module for module in hf.modules() if module.training]
    wanted_grad = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    pad = tokenizer.pad_token
    try:
        check_tokenizer(tokenizer, hf.config, hf.name_or_path or "a model in memory")
        hf.eval()
        hf.requires_grad_(False)
        yield
    finally:
        detach(hf, {name: module for name, module in hf.named_modules() if isinstance(module, LoraLinear)})
        for parameter in wanted_grad:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
        if tokenizer.pad_token != pad:
            tokenizer.pad_token = pad


# ---- what a plan is made of


def _defaults(model: str, overrides: Sequence[str]) -> Recipe:
    """The recipe's defaults for a model without a run: no shots unless problems.train names where they come from."""
    shots = {} if any(text.startswith("problems.train=") for text in overrides) else {"generate_shots": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "defaults.yaml"
        # test time needs no training problems, which a recipe has to name
        path.write_text(
            yaml.safe_dump({"model": {"path": model}, "problems": {"train": [""]}, "prompt": shots})
        )
        try:
            return recipe.load(path, overrides, training=False)
        except MassError as error:
            raise MassError(str(error).replace(f"{path}: ", "", 1)) from None


def _sources(r: Recipe) -> list[str]:
    return [source for source in r.problems.train if source]


def _base_of(folder: Path) -> str:
    read_peft_shape(folder)
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not base:
        raise MassError(f"{folder}/adapter_config.json names no base model: give it with --model MODEL")
    return str(base)


def _pool(plan: Plan) -> list[Task]:
    """Training problems to show: those that the run set aside, or from problems.train."""
    r = plan.recipe
    p = r.problems
    if plan.step:
        path = plan.step.parent / "shots.jsonl"
        if not path.is_file():
            if r.prompt.generate_shots or r.prompt.solve_shots:
                raise MassError(
                    f"{path} is missing, and prompts show problems from it: "
                    "restore it, or set prompt.generate_shots=0 prompt.solve_shots=0"
                )
            return []
        try:
            return [
                Task(Problem(x["id"], x["problem"]), x["answer"], x["solution"], x["source"], "exact")
                for _, row in json_lines(path.read_bytes())
                for x in [as_object(row)]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise MassError(
                f"{path} is damaged ({error!r}): restore it from where the run was made"
            ) from None
    if not _sources(r):
        return []
    tasks = load_tasks(
        _sources(r),
        split=p.split,
        size=p.size,
        weights=p.weights,
        gym=p.gym,
        world=p.world,
        columns=dataclasses.asdict(p.columns),
        verifier=p.verifier,
        seed=r.run.seed,
        demonstrations=p.demonstrations,
    )
    return draw_pool(tasks, r.prompt.pool, r.run.seed)[0]


def _teacher(r: Recipe, name: str, tokenizer: PreTrainedTokenizerBase) -> Teacher:
    sampling = example_sampling(r)
    if name.startswith(("http://", "https://")):
        return teacher.address(name, tokenizer, sampling, r.knobs.teacher_seconds)
    m = r.model
    other = language_model(name, None, dtype=m.dtype, device=m.device, cache=m.cache, attention=m.attention)
    check_model(other.hf)
    return teacher.local(other, make_prompts(other.tokenizer, "auto"), sampling)


def _parts(lm: LanguageModel) -> Split | None:
    try:
        return split(lm.hf, lm.lora)
    except MassError:
        # training went without the blocks of such a model, too
        return None


def _rates(
    r: Recipe, saved: dict[str, float], keys: Sequence[str], parts: Split | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """The inner learning rate of each adapter tensor: the recipe's, or what the run learned (one, or one a block)."""

    def rate(key: str) -> float:
        if r.inner.learned_lr == "no" or not saved:
            return r.inner.lr
        blocks = parts.prefix if parts and r.inner.learned_lr == "layer" else []
        last = "rest" if blocks else "all"
        return saved[next((f"block{i}" for i, prefix in enumerate(blocks) if key.startswith(prefix)), last)]

    return {key: torch.tensor(rate(key), device=device) for key in keys}
