"""Settings of a recipe that are good each by itself and do not go together; no torch here."""

from collections.abc import Iterator

from mass.keys import said
from mass.schema import KEYS, Recipe, keys_of


def contradictions(r: Recipe, *, training: bool) -> Iterator[tuple[str, str]]:
    """(the keys that play a part, one sentence with the reason and the way out) for settings that do not go together.

    `training`: also those that only meta-training minds.
    """
    yield from _at_all(r)
    if training:
        yield from _in_training(r)


def _at_all(r: Recipe) -> Iterator[tuple[str, str]]:
    pool, shots, train = r.prompt.pool, r.prompt.generate_shots, r.problems.train
    if r.run.name in (".", "..") or any(x in r.run.name for x in "/\\\0"):
        yield (
            "run.name",
            f"{said('run.name', r.run.name)}: a name, not a path. Put the folder into run.folder.",
        )

    used = {x.removeprefix("gym:") for x in [*train, *(r.problems.heldout or [])] if x.startswith("gym:")}
    # where no gym is used, a file has been put in a recipe's place on the command line, which cannot remove its settings
    for family in r.problems.gym.keys() - used if used else ():
        text = (
            f"problems.gym.{family}: settings of a family that is not used. Remove them, or add gym:{family}"
        )
        yield "problems.gym problems.train problems.heldout", f"{text} to problems.train."
    if r.problems.weights is not None and len(r.problems.weights) != len(train):
        text = f"problems.weights has {len(r.problems.weights)} numbers for the {len(train)} sources of problems.train"
        yield "problems.weights problems.train", f"{text}. Give one for each, or null."
    if train and all(x.startswith("gym:") for x in train) and pool >= r.problems.size:
        text = f"prompt.pool={pool} sets aside all of problems.size={r.problems.size} training problems"
        yield "prompt.pool problems.size problems.train", f"{text}. Raise problems.size or lower prompt.pool."
    if r.guard.heldout and r.inner.max_growth is None:
        text = f"guard.heldout={r.guard.heldout:g} picks a step by losses that inner.max_growth=null does not look at"
        yield (
            "guard.heldout inner.max_growth",
            f"{text}. Use inner.max_growth={KEYS['inner.max_growth'].default:g}.",
        )
    if r.inner.optimizer == "adam" and r.inner.steps > 0 and r.inner.eps == r.inner.eps_root == 0:
        yield (
            "inner.optimizer inner.steps inner.eps inner.eps_root",
            "inner.optimizer=adam with inner.eps=0 and inner.eps_root=0: a gradient that is exactly zero, as those of a fresh "
            "adapter's A are, is divided by its size, and 0/0 is NaN. Leave inner.eps out (1e-8), or use inner.eps_root=1e-4.",
        )
    if pool < 2 * shots:
        text = (
            f"prompt.generate_shots={shots} shows two problems each, more than prompt.pool={pool} sets aside"
        )
        yield "prompt.pool prompt.generate_shots", f"{text}. Use prompt.pool={2 * shots} or more."
    if pool < r.prompt.solve_shots:
        text = (
            f"prompt.solve_shots={r.prompt.solve_shots} are more problems than prompt.pool={pool} sets aside"
        )
        yield "prompt.pool prompt.solve_shots", f"{text}. Use prompt.pool={r.prompt.solve_shots} or more."
    if r.evaluate.every and r.problems.heldout is None and r.evaluate.problems > r.problems.heldout_size:
        yield (
            "evaluate.every evaluate.problems problems.heldout problems.heldout_size",
            f"evaluate.problems={r.evaluate.problems} are more than problems.heldout_size={r.problems.heldout_size} "
            "sets aside. Raise problems.heldout_size or lower evaluate.problems.",
        )


def _in_training(r: Recipe) -> Iterator[tuple[str, str]]:
    """Of settings that only the outer loop minds."""
    truncate = r.meta_gradient.truncate
    for name in keys_of("guard"):
        value = getattr(r.guard, name.partition(".")[2])
        if value != KEYS[name].default:
            yield (
                name,
                f"{said(name, value)}: a guard of test time, which the meta-gradient does not differentiate through. "
                f"Leave it out here, and give it to mass-adapt.",
            )
    if r.inner.steps == 0 and r.inner.learned_lr != "no":
        text = f"inner.learned_lr={r.inner.learned_lr} with inner.steps=0: there is no inner step whose rate could be learned"
        yield "inner.steps inner.learned_lr", f"{text}. Use inner.learned_lr=no, or inner.steps=1 or more."
    if r.inner.steps == 0 and r.outer.through_init:
        text = "outer.through_init=true with inner.steps=0: there is no inner loop to pass a gradient through"
        yield (
            "inner.steps outer.through_init",
            f"{text}. Use outer.through_init=false, or inner.steps=1 or more.",
        )
    if r.outer.lr_policy == 0 and r.outer.through_init:
        text = "outer.through_init=true with outer.lr_policy=0: the policy, which the gradient is for, is kept as it is"
        yield (
            "outer.through_init outer.lr_policy",
            f"{text}. Use outer.through_init=false, or raise outer.lr_policy.",
        )
    if r.inner.steps == 0 and r.outer.lr_policy == 0:
        text = "inner.steps=0 with outer.lr_policy=0: without an inner loop only the policy is trained"
        yield "inner.steps outer.lr_policy", f"{text}. Raise outer.lr_policy, or use inner.steps=1 or more."
    if r.generate.examples < 2 and r.outer.lr_scorer > 0 and r.inner.steps > 0:
        yield (
            "generate.examples outer.lr_scorer inner.steps",
            "generate.examples=1 with a trained scorer: the softmax over one example is always 1, so the scorer "
            "would get no gradient. Use generate.examples=2 or more, or outer.lr_scorer=0.",
        )
    if r.inner.optimizer == "adam" and r.inner.steps == 1 and r.inner.eps_root == 0:
        yield (
            "inner.optimizer inner.steps inner.eps_root",
            "inner.optimizer=adam with inner.steps=1 and inner.eps_root=0: the first update of a cold Adam is "
            "g/(|g|+eps), whose derivative by the examples' weights is about 1e-8 of SGD's, so the scorer would learn "
            "nothing. Use inner.eps_root=1e-4, inner.steps=2 or more, or inner.optimizer=sgd.",
        )
    if r.zero.hold_base and r.zero.stage < 3:
        text = f"zero.hold_base=true with zero.stage={r.zero.stage}: only stage 3 shards the base"
        yield (
            "zero.hold_base zero.stage",
            f"{text}; below it every rank holds it always. Use zero.stage=3, or false.",
        )
    if r.inner.optimizer == "adam" and r.inner.momentum > 0:
        text = f"inner.momentum={r.inner.momentum:g} belongs to sgd, and inner.optimizer=adam"
        yield "inner.optimizer inner.momentum", f"{text}. Use inner.beta1, or inner.optimizer=sgd."
    for name in ("inner.beta1", "inner.beta2", "inner.eps_root") if r.inner.optimizer == "sgd" else ():
        value, default = getattr(r.inner, name.partition(".")[2]), KEYS[name].default
        if value != default:
            text = f"{name}={value:g} belongs to adam, and inner.optimizer=sgd"
            yield (
                f"inner.optimizer {name}",
                f"{text}. Use {name}={default:g}, or inner.optimizer=adam.",
            )
    if r.inner.learned_lr != "no" and r.outer.lr_inner == 0:
        text = f"inner.learned_lr={r.inner.learned_lr} with outer.lr_inner=0 never learns"
        yield "inner.learned_lr outer.lr_inner", f"{text}. Use outer.lr_inner=1e-2, or inner.learned_lr=no."
    if r.inner.learned_lr != "no" and r.inner.lr == 0:
        text = (
            f"inner.learned_lr={r.inner.learned_lr} learns the logarithm of a rate that starts at inner.lr=0"
        )
        yield "inner.learned_lr inner.lr", f"{text}. Use inner.lr=0.3, or inner.learned_lr=no."
    if r.inner.start == "base" and r.inner.steps == 0:
        text = "inner.start=base with inner.steps=0: without an inner loop the outer loss trains the policy to answer"
        yield "inner.start inner.steps", f"{text}. Use inner.start=policy, or inner.steps=1 or more."
    elif r.inner.start == "base" and r.outer.gamma > 0:
        text = f"inner.start=base with outer.gamma={r.outer.gamma:g}: the policy only writes, and what answers is not trained"
        yield "inner.start outer.gamma", f"{text}. Use outer.gamma=0, or inner.start=policy."
    if r.inner.start == "base" and r.outer.through_init:
        text = "inner.start=base with outer.through_init=true: the inner loop does not start from what is trained"
        yield (
            "inner.start outer.through_init",
            f"{text}. Use outer.through_init=false, or inner.start=policy.",
        )
    if truncate is not None and truncate > r.inner.steps:
        text = f"meta_gradient.truncate={truncate} is more than inner.steps={r.inner.steps}"
        yield "meta_gradient.truncate inner.steps", f"{text}. Use null to differentiate all steps."
    if truncate is not None and truncate < r.inner.steps and r.outer.through_init:
        yield (
            "meta_gradient.truncate inner.steps outer.through_init",
            f"outer.through_init=true needs all inner steps, and meta_gradient.truncate={truncate} cuts the first "
            "ones off. Use meta_gradient.truncate=null, or outer.through_init=false.",
        )
    if r.meta_gradient.mode == "finite_difference" and r.meta_gradient.one_sided and r.model.dtype == "bf16":
        yield (
            "meta_gradient.mode meta_gradient.one_sided model.dtype",
            "meta_gradient.one_sided=true with model.dtype=bf16: the difference of two losses drowns in rounding (errors "
            "of 27 % and more were measured). Use meta_gradient.one_sided=false, or model.dtype=fp32.",
        )
    if r.outer.loss == "verifier" and r.outer.rollouts < 2:
        yield (
            "outer.loss outer.rollouts",
            "outer.loss=verifier with outer.rollouts=1: an answer's advantage is its reward against the others of its "
            "task, so it would always be 0. Use outer.rollouts=2 or more, or outer.loss=gold.",
        )
    if not r.zero.prefetch and r.zero.stage < 3:
        text = f"zero.prefetch=false with zero.stage={r.zero.stage}: only stage 3 gathers anything"
        yield "zero.prefetch zero.stage", f"{text}. Use zero.stage=3, or leave zero.prefetch out."
    if r.zero.offload == "optimizer" and r.zero.stage == 0:
        text = "zero.offload=optimizer with zero.stage=0: DeepSpeed offloads a sharded optimizer only"
        yield "zero.offload zero.stage", f"{text}. Use zero.stage=1 or more, or zero.offload=no."
    if r.zero.offload == "all" and r.zero.stage < 3:
        text = f"zero.offload=all with zero.stage={r.zero.stage}: only the base of stage 3 is fetched as it is needed"
        yield "zero.offload zero.stage", f"{text}. Use zero.stage=3, or zero.offload=no."
    # auto takes exact engines alone
    if r.meta_gradient.one_sided and r.meta_gradient.mode != "finite_difference":
        text = f"meta_gradient.one_sided=true with meta_gradient.mode={r.meta_gradient.mode}: only finite differences have sides"
        yield (
            "meta_gradient.one_sided meta_gradient.mode",
            f"{text}. Use meta_gradient.one_sided=false, or meta_gradient.mode=finite_difference.",
        )
    if r.outer.beta_check > 0 and r.outer.reward == "example":
        text = f"outer.beta_check={r.outer.beta_check:g} with outer.reward=example: no token is left out of the reward"
        yield (
            "outer.beta_check outer.reward",
            f"{text}. Use outer.reward=answer or solution, or leave it out.",
        )
    sources = [*r.problems.train, *(r.problems.heldout or [])]
    if r.problems.verifier not in ("auto", "exact") and all(x.startswith("world:") for x in sources):
        text = f"problems.verifier={r.problems.verifier} with problems of worlds alone, whose answers are judged by exact"
        yield "problems.verifier problems.train problems.heldout", f"{text}. Use problems.verifier=auto."
    if r.problems.demonstrations > 0:
        text = f"problems.demonstrations={r.problems.demonstrations}: training shows none, so that they would only be lost to it"
        yield "problems.demonstrations", f"{text}. Leave it out here, and give it to mass-adapt or mass-eval."
    if r.outer.lr_policy == r.outer.lr_scorer == 0 and r.inner.learned_lr == "no":
        text = "outer.lr_policy=0 and outer.lr_scorer=0: nothing would be learned. Raise one of them."
        yield "outer.lr_policy outer.lr_scorer inner.learned_lr", text
    elif (
        r.inner.steps > 0
        and r.outer.generator == r.outer.gamma == r.outer.lr_scorer == 0
        and not r.outer.through_init
        and r.inner.learned_lr == "no"
    ):
        yield (
            "inner.steps outer.generator outer.gamma outer.lr_scorer outer.through_init inner.learned_lr",
            "outer.generator=0, outer.gamma=0 and outer.through_init=false with outer.lr_scorer=0: the policy has no loss, so "
            "nothing would be learned. Raise one of them, or use outer.through_init=true.",
        )
