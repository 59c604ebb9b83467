"""Recipes that are wrong: every error at once, each with the key, the value and the way out."""

from pathlib import Path

import pytest
from test_recipe import NEEDED, errors

from mass.errors import MassError
from mass.recipe import load


def test_all_errors_come_in_one_message(write):
    path = write(NEEDED + "inner: {stps: 3}\nouter: {tasks: four, loss: golden, rollouts: 0}\nlora: 3\n")
    found = errors(path, "generate.top_p=1.5", "meta_gradient.truncate=9", "nonsense", "--inner.lr=1", "a=[1")
    assert sorted(found) == sorted(
        [
            "inner.stps: unknown key. Did you mean inner.steps?",
            "outer.tasks='four': wants an int, at least 1.",
            "outer.loss='golden': wants one of gold, verifier.",
            "outer.rollouts=0: wants an int, at least 1.",
            "lora=3: lora is a group of keys. Set one of them, e.g. lora.rank.",
            "generate.top_p=1.5: wants a number, more than 0 and at most 1.",
            "meta_gradient.truncate=9 is more than inner.steps=2. Use null to differentiate all steps.",
            "'nonsense': not an override. Write key=value, e.g. inner.steps=2.",
            "--inner.lr=1: unknown option. A recipe key is set without dashes, e.g. inner.steps=2.",
            "a=[1: the value is not YAML. Text is put in quotes: a='\"...\"'.",
        ]
    )


@pytest.mark.parametrize(
    "override, end",
    [
        ("inner.stps=3", "inner.stps: unknown key. Did you mean inner.steps?"),
        ("iner.steps=3", "iner.steps: unknown key. Did you mean inner.steps?"),
        ("steps=3", "steps: unknown key. Did you mean inner.steps or outer.steps?"),
        ("iner={steps: 3}", "iner.steps: unknown key. Did you mean inner.steps?"),
        ("zero.qqqq=3", "zero.qqqq: unknown key. zero has stage, hold_base, prefetch, offload, config."),
        ("wandb=3", "wandb: unknown key. The groups are run, model, prompt, problems, lora, generate,"),
        ("inner=3", "inner=3: inner is a group of keys."),
        ("inner.steps=2.5", "inner.steps=2.5: wants an int, at least 0."),
        ("inner.steps=true", "inner.steps=True: wants an int"),
        ("inner.steps=", "inner.steps=None: wants an int"),
        ("inner.steps.x=3", "inner.steps={'x': 3}: wants an int"),
        ("inner.lr=.nan", "inner.lr=nan: wants a number, at least 0."),
        ("inner.lr=.inf", "inner.lr=inf: wants a number"),
        ("inner.clip=off", "inner.clip=False: wants a number or null, more than 0."),
        ("run.name=true", "run.name=True: wants text."),
        ("run.name=''", "run.name: empty. It wants text"),
        ("lora.rank=0", "lora.rank=0: wants an int, at least 1."),
        ("lora.targets=[]", "lora.targets: empty."),
        ("lora.targets=[[a]]", "lora.targets=[['a']]: wants a list of texts."),
        (
            "scorer.layers=[0.5, 2]",
            "scorer.layers=[0.5, 2.0]: wants a list of numbers, at least 0 and at most 1.",
        ),
        ("scorer.layers=[a]", "scorer.layers=['a']: wants a list of numbers"),
        ("model.attention=flash", "model.attention='flash': wants one of sdpa, eager."),
        ("zero.offload=true", "zero.offload=True: wants one of no, optimizer, all."),
        ("zero.stage=4", "zero.stage=4: wants an int, at least 0 and at most 3."),
        ("log.tensorboard=maybe", "log.tensorboard='maybe': wants true or false."),
        ("model.path='???'", "model.path: still to be filled in."),
        ("model.path=", "model.path=None: wants text."),
        ("problems.gym={chain_sum: 3}", "problems.gym={'chain_sum': 3}: wants a mapping."),
        ("prompt.solve_instruction=Solve: it", "Text with ': ' in it needs quotes."),
    ],
)
def test_one_wrong_value(write, override, end):
    (line,) = errors(write(NEEDED), override)
    assert end in line


def test_what_is_required(write):
    first, second = errors(write("run: {name: x}\n"))
    assert first.startswith("model.path: required. It wants text: a folder, a hub id")
    assert second.startswith("problems.train: required. It wants a list of texts: ")


@pytest.mark.parametrize(
    "overrides, part",
    [
        (["inner.optimizer=adam", "inner.steps=1"], "eps_root=1e-4"),
        (["inner.optimizer=adam", "inner.eps=0"], "0/0 is NaN. Leave inner.eps out (1e-8)"),
        (["inner.optimizer=adam", "inner.momentum=0.9"], "inner.momentum=0.9 belongs to sgd"),
        (
            ["inner.eps_root=1e-4"],
            "eps_root=0.0001 belongs to adam, and inner.optimizer=sgd. Use inner.eps_root=0",
        ),
        (
            ["inner.beta1=0.5"],
            "inner.beta1=0.5 belongs to adam, and inner.optimizer=sgd. Use inner.beta1=0.9",
        ),
        (
            ["inner.beta2=0.9"],
            "inner.beta2=0.9 belongs to adam, and inner.optimizer=sgd. Use inner.beta2=0.999",
        ),
        (["inner.learned_lr=one", "outer.lr_inner=0"], "never learns"),
        (["inner.learned_lr=layer", "inner.lr=0"], "starts at inner.lr=0"),
        (["meta_gradient.truncate=3"], "more than inner.steps=2"),
        (["meta_gradient.truncate=1", "outer.through_init=true"], "cuts the first"),
        (["inner.start=base"], "Use outer.gamma=0, or inner.start=policy."),
        (["inner.start=base", "outer.gamma=0", "outer.through_init=true"], "does not start from what"),
        (["inner.start=base", "outer.gamma=0", "inner.steps=0"], "trains the policy to answer"),
        (["outer.loss=verifier", "outer.rollouts=1"], "outer.rollouts=2 or more"),
        (["generate.examples=1"], "softmax over one example"),
        (["outer.lr_policy=0", "outer.lr_scorer=0"], "nothing would be learned"),
        (["outer.generator=0", "outer.gamma=0", "outer.lr_scorer=0"], "the policy has no loss, so nothing"),
        (
            ["meta_gradient.mode=reverse", "meta_gradient.one_sided=true"],
            "only finite differences have sides",
        ),
        (
            ["meta_gradient.one_sided=true"],
            "mode=auto: only finite differences have sides. Use meta_gradient.one",
        ),
        (["outer.through_init=true", "outer.lr_policy=0"], "the policy, which the gradient is for, is kept"),
        (["outer.beta_check=1"], "no token is left out of the reward"),
        (["problems.demonstrations=2"], "training shows none"),
        (
            ["problems.train=world:families", "problems.verifier=math"],
            "problems of worlds alone, whose answers are judged by exact. Use problems.verifier=auto",
        ),
        (["prompt.pool=3"], "Use prompt.pool=4 or more"),
        (["prompt.solve_shots=17"], "Use prompt.pool=17 or more"),
        (["prompt.pool=64", "problems.size=64"], "sets aside all of problems.size=64"),
        (["problems.weights=[1, 2]"], "2 numbers for the 1 sources"),
        (
            ["problems.gym={chain_sums: {min_terms: 2}}"],
            "problems.gym.chain_sums: settings of a family that is not used",
        ),
        (["evaluate.every=1", "problems.heldout_size=8"], "more than problems.heldout_size=8"),
        (["zero.prefetch=false"], "only stage 3 gathers anything"),
        (["zero.offload=optimizer"], "Use zero.stage=1 or more, or zero.offload=no"),
        (["zero.offload=all", "zero.stage=2"], "zero.stage=2: only the base of stage 3"),
        (["run.name=a/b"], "Put the folder into run.folder"),
        (["run.name=.."], "a name, not a path"),
    ],
)
def test_a_contradiction_is_refused(write, overrides, part):
    (line,) = errors(write(NEEDED), *overrides)
    assert part in line
    assert line.endswith(".")


def test_a_step_cannot_be_picked_by_losses_that_nobody_looks_at(write):
    with pytest.raises(MassError, match="inner.max_growth=null does not look at") as refused:
        load(write(NEEDED), ["guard.heldout=0.5", "inner.max_growth=null"], training=False)
    assert "guard.heldout=0.5" in str(refused.value) and "Use inner.max_growth=2." in str(refused.value)
    load(write(NEEDED), ["guard.heldout=0.5"], training=False)


@pytest.mark.parametrize(
    "overrides",
    [
        ["inner.optimizer=adam", "inner.steps=2"],
        ["inner.optimizer=adam", "inner.steps=1", "inner.eps_root=1e-4"],
        ["inner.optimizer=adam", "inner.eps=0", "inner.eps_root=1e-4"],
        ["inner.optimizer=sgd", "inner.eps=0", "inner.beta1=0.9", "inner.beta2=0.999"],
        ["inner.optimizer=adam", "inner.beta1=0.5", "inner.beta2=0.9"],
        ["meta_gradient.mode=finite_difference", "meta_gradient.one_sided=true", "model.dtype=fp32"],
        ["generate.examples=1", "outer.lr_scorer=0"],
        ["inner.start=base", "outer.gamma=0"],
        ["meta_gradient.truncate=2", "outer.through_init=true"],
        ["zero.stage=3", "zero.hold_base=true"],
        ["zero.stage=1", "zero.offload=optimizer"],
        ["zero.stage=3", "zero.offload=all", "zero.prefetch=false"],
        ["outer.loss=verifier", "outer.rollouts=2"],
        ["problems.train=world:families", "problems.verifier=exact"],
        ["problems.train=world:families", "problems.heldout=a.jsonl", "problems.verifier=math"],
        ["prompt.pool=4"],
    ],
)
def test_what_is_next_to_a_contradiction_is_fine(write, overrides):
    load(write(NEEDED), overrides)


def test_nothing_is_said_to_contradict_a_faulty_value(write):
    (line,) = errors(write(NEEDED), "inner.steps=three", "meta_gradient.truncate=3")
    assert line.startswith("inner.steps='three'")


@pytest.mark.parametrize(
    "text, end",
    [
        ("", "empty. A recipe needs model.path and problems.train at least."),
        ("# only a comment\n", "empty. A recipe needs model.path and problems.train at least."),
        ("just some words\n", "not a recipe. It has to be YAML"),
        ("- a\n- b\n", "not a recipe. It has to be YAML"),
        ("42\n", "cannot be read as YAML"),
        ("inner: [1\nlora: 3\n", "cannot be read as YAML: line 2: "),
        (
            "inner: {steps: 1}\ninner: {steps: 2}\n",
            "cannot be read as YAML: line 2: found duplicate key inner",
        ),
        ("inner:\n  steps: 1\n  steps: 2\n", "cannot be read as YAML: line 3: found duplicate key steps"),
        ("run: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML: line 1: "),
        ("run: {name: '${x'}\n", "cannot be read as YAML: "),
    ],
)
def test_a_file_that_is_no_recipe(write, text, end):
    path = write(text)
    with pytest.raises(MassError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {end}")
    assert "\n" not in message


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(MassError, match="none.yaml: no such recipe file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(MassError, match="The recipe comes first"):
        load("outer.steps=2")
    with pytest.raises(MassError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(MassError, match="cannot be read as YAML"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize("guard", ["max_loss=3", "max_grad_norm=3", "fisher=1", "restore=0.1", "heldout=0.2"])
def test_meta_training_refuses_the_guards_of_test_time(tmp_path: Path, guard: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: 'tiny:llama'}\nproblems: {train: ['gym:chain_sum']}\n")
    load(path)
    load(path, [f"guard.{guard}"], training=False)
    with pytest.raises(MassError, match=f"guard.{guard.partition('=')[0]}=.*does not differentiate through"):
        load(path, [f"guard.{guard}"])
