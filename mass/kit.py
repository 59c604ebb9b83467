"""What test time works with, loaded: the kit of a plan (`mass.wanted`), and a user's own model for as long as it is lent."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mass import checkpoint, fastlinear, teacher, vllm_engine
from mass.blocks import Split, split
from mass.choices import Kit, Teacher
from mass.choices.guards import fisher_information
from mass.errors import MassError
from mass.forward import check_model
from mass.lora import LoraLinear, attach, detach, load_peft, read_peft_shape
from mass.model import LanguageModel, check_tokenizer, language_model, load
from mass.optimizers import Rule
from mass.prompts import make_prompts
from mass.recipe import Recipe
from mass.scorer import Scorer
from mass.setting import answer_sampling, example_sampling, lora_shape, rate_of
from mass.wanted import Plan, check_shots, pool_of


def build_kit(plan: Plan, loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None) -> Kit:
    """Load the model, the policy, the scorer, the shots and the teacher that a plan names.

    `loaded`: the model and tokenizer where they are in memory already; the model gets LoRA slots.
    """
    r = plan.recipe
    if r.generate.engine == "vllm":
        vllm_engine.check_installed()
    pool = pool_of(plan)
    check_shots(plan, pool)
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
    # one that was fitted with other weights or settings is for nobody who asks the kit alone (a service)
    fitted = None if (found := plan.fitted) and plan.unlike(found) else found
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
        chooser=fitted,
    )
    return dataclasses.replace(kit, fisher=fisher_information(kit)) if r.guard.fisher else kit


@contextlib.contextmanager
def lent(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within the context a user's own model is as `mass.model.load` leaves one: eval mode, frozen, with a pad token.

    Afterwards model and tokenizer are as they were. LoRA slots that were put into it are gone, and so are packed copies of its
    weights, which its owner may change before the next time. Raises MassError for a model that cannot be adapted.
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
    fastlinear.forget(hf)
    try:
        check_tokenizer(tokenizer, hf.config, hf.name_or_path or "a model in memory")
        hf.eval()
        hf.requires_grad_(False)
        yield
    finally:
        fastlinear.forget(hf)
        detach(hf, {name: module for name, module in hf.named_modules() if isinstance(module, LoraLinear)})
        for parameter in wanted_grad:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
        if tokenizer.pad_token != pad:
            tokenizer.pad_token = pad


def _teacher(r: Recipe, name: str, tokenizer: PreTrainedTokenizerBase) -> Teacher:
    sampling = example_sampling(r)
    there = teacher.endpoint(name)
    if there:
        return teacher.address(*there, tokenizer, sampling, r.knobs.teacher_seconds)
    m = r.model
    other = language_model(name, None, dtype=m.dtype, device=m.device, cache=m.cache, attention=m.attention)
    check_model(other.hf)
    return teacher.local(other, make_prompts(other.tokenizer, "auto"), sampling, tokenizer)


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
        return saved[rate_of(r.inner.learned_lr, parts, key)]

    return {key: torch.tensor(rate(key), device=device) for key in keys}
