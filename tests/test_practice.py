"""Practice: examples written, weighed and trained on, each task as if it were alone."""

import dataclasses
from pathlib import Path

import pytest
import torch
from chain import save_chain
from tiny import tiny_lm
from torch import Tensor

from mass import blocks, lora, practice
from mass.batch import Sequence, pack
from mass.forward import example_loss, loss_and_grad
from mass.lora import LoraShape
from mass.model import LanguageModel, language_model
from mass.optimizers import Rule
from mass.practice import Practice, Sampling, answer, fine_tune, pack_examples, seed_of, solve_sequence
from mass.prompts import Example, Prompts, make_prompts

TARGETS = ["What is 9 - 7?", "What is 5 - 4?", "What is 12 - 9?"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = save_chain(tmp_path_factory.mktemp("chain"))
    return language_model(str(folder), LoraShape(2, 4.0, ("all-linear",)), dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def prompts(chain: LanguageModel) -> Prompts:
    return make_prompts(chain.tokenizer, "plain", None, None)


def policy_of(
    lm: LanguageModel, tasks: int, size: float = 0.05, dtype: torch.dtype = torch.float32
) -> lora.Adapter:
    """T different adapters that are not zero."""
    generator = torch.Generator().manual_seed(1)
    return {
        key: size * torch.randn(tasks, *x.shape, generator=generator).to(dtype)
        for key, x in lora.fresh(lm.lora, 2, generator).items()
    }


def write(
    lm: LanguageModel, prompts: Prompts, targets: list[str], count: int, adapter: lora.Adapter | None = None
) -> Practice:
    return practice.write_examples(
        lm,
        prompts,
        targets,
        generate_shots=[[("1 + 1", " 3 + 4 =", "Answer: 3")] for _ in targets],
        solve_shots=[[("2 - 1", "Answer: 1")] for _ in targets],
        adapter=adapter,
        seeds=[[seed_of(0, target, i) for i in range(count)] for target in targets],
        sampling=Sampling(max_new_tokens=16),
    )


def test_seeds_are_stable_and_differ_by_every_part() -> None:
    # pinned: a seed that changed with the Python version or machine would change what a run samples
    assert seed_of(0, 3, "p1", 2) == 6783232311231504771
    many = {
        seed_of(s, t, p, i) for s in range(3) for t in range(3) for p in ("a", "ab", "b") for i in range(3)
    }
    assert len(many) == 81 and all(0 <= x < 2**63 for x in many)
    assert seed_of("a", "bc") != seed_of("ab", "c")


def test_written_examples_are_parsed_packed_and_marked(chain: LanguageModel, prompts: Prompts) -> None:
    made = write(chain, prompts, TARGETS, 8)
    assert [len(own) for own in made.examples] == [len(own) for own in made.rollouts] == [8, 8, 8]
    assert made.valid_TN.shape == (3, 8)
    assert made.valid_TN.float().mean() > 0.4, "the chain model writes well-formed examples most of the time"
    assert not made.valid_TN.all(), "and sometimes not"
    for t in range(3):
        assert made.prompts[t] == prompts.generate(TARGETS[t], [("1 + 1", " 3 + 4 =", "Answer: 3")])
        for n in range(8):
            example = made.examples[t][n]
            assert bool(made.valid_TN[t, n]) == example.valid == (example.reason == "")
            want = len(prompts.solution(example.solution)) if example.valid else 0
            assert made.packed.count_TN[t, n] == want


def test_an_example_does_not_depend_on_what_shares_its_batch(chain: LanguageModel, prompts: Prompts) -> None:
    adapter = policy_of(chain, 1)
    together = write(chain, prompts, TARGETS, 4, adapter)
    for t, target in enumerate(TARGETS):
        alone = write(chain, prompts, [target], 4, adapter)
        assert [e.text for e in alone.rollouts[0]] == [e.text for e in together.rollouts[t]]
    base = write(chain, prompts, TARGETS, 4)
    logprobs = [[r.logprobs for own in made.rollouts for r in own] for made in (base, together)]
    assert logprobs[0] != logprobs[1], "the adapter is used"


def test_an_example_too_long_for_the_context_is_truncated() -> None:
    lm = tiny_lm("llama", torch.float32, max_position_embeddings=200)
    prompts = make_prompts(lm.tokenizer, "plain", None, None)
    long = Example("1 + 1 " * 40, "Answer: 2", True, "")
    assert len(solve_sequence(prompts, long.problem, long.solution).tokens) > 200
    _, valid_TN = pack_examples(lm, prompts, [[long, Example("1 + 1", "Answer: 2", True, "")]], [[]])
    assert valid_TN.tolist() == [[False, True]]


def test_solve_sequence_learns_the_solution_only(prompts: Prompts) -> None:
    shots = [("2 - 1", "Answer: 1")]
    s = solve_sequence(prompts, "9 - 7", "Answer: 2", shots)
    assert s.tokens[: s.prompt] == prompts.solve("9 - 7", shots)
    assert s.tokens[s.prompt :] == prompts.solution("Answer: 2")
    assert prompts.tokenizer.decode(s.tokens[s.prompt :]) == " Answer: 2\n\n"


def test_each_task_answers_with_its_own_adapter(chain: LanguageModel, prompts: Prompts) -> None:
    many = policy_of(chain, 3, size=0.5)
    shots: list[list[tuple[str, str]]] = [[], [("2 - 1", "Answer: 1")], []]
    seeds = [[seed_of(t, j) for j in range(5)] for t in range(3)]
    sampling = Sampling(max_new_tokens=6)
    got = answer(chain, prompts, TARGETS, shots=shots, adapter=many, sampling=sampling, seeds=seeds)
    for t in range(3):
        own = lora.select(many, [t])
        alone = answer(
            chain, prompts, [TARGETS[t]], shots=[shots[t]], adapter=own, sampling=sampling, seeds=[seeds[t]]
        )
        assert [r.tokens for r in alone[0]] == [r.tokens for r in got[t]]
        other = lora.select(many, [(t + 1) % 3])
        swapped = answer(
            chain, prompts, [TARGETS[t]], shots=[shots[t]], adapter=other, sampling=sampling, seeds=[seeds[t]]
        )
        assert [r.logprobs for r in swapped[0]] != [r.logprobs for r in got[t]]


@pytest.mark.parametrize("pool", ["solution", "all"])
def test_features_pool_over_the_solution_or_the_whole_example(
    chain: LanguageModel, prompts: Prompts, pool: str
) -> None:
    made = write(chain, prompts, TARGETS[:2], 4)
    parts = blocks.split(chain.hf, chain.lora)
    task_TF, example_TNF = practice.features(chain, parts, prompts, made, TARGETS[:2], [0.5, 1.0], pool)
    assert task_TF.shape == (2, 128) and example_TNF.shape == (2, 4, 128)

    def middle(tokens: list[int], first: int) -> Tensor:
        with torch.no_grad():
            states = chain.hf(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
        return states[1][0, first:].mean(0)

    seen = 0
    for t in range(2):
        torch.testing.assert_close(
            task_TF[t, :64], middle(prompts.solve(TARGETS[t]), 1), rtol=1e-4, atol=1e-5
        )
        for n, e in enumerate(made.examples[t]):
            if not e.valid:
                assert (example_TNF[t, n] == 0).all()
                continue
            shots = [("2 - 1", "Answer: 1")] if pool == "solution" else []
            s = solve_sequence(prompts, e.problem, e.solution, shots)
            want = middle(s.tokens, s.prompt if pool == "solution" else 1)
            torch.testing.assert_close(example_TNF[t, n, :64], want, rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen >= 4


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_fine_tuning_many_tasks_equals_torch_optim_on_each(kind: str, recompute: bool) -> None:
    lm = tiny_lm("llama", torch.float64)
    generator = torch.Generator().manual_seed(4)

    def random(length: int) -> Sequence:
        return Sequence(torch.randint(3, 259, (length,), generator=generator).tolist(), length // 2)

    tasks = [[random(8), random(13), random(6)], [random(10), None, random(7)]]
    weight_TN = torch.tensor([[1.5, 0.3, 1.2], [2.0, 0.0, 1.0]], dtype=torch.float64)
    start = policy_of(lm, 2, 0.2, torch.float64)
    rule = Rule(kind=kind, momentum=0.5 if kind == "sgd" else 0.0, clip=0.6)  # type: ignore[arg-type]
    rate = {"sgd": 0.2, "adam": 0.02}[kind]
    lr = {key: torch.tensor(rate, dtype=torch.float64) for key in start}
    parts = blocks.split(lm.hf, lm.lora) if recompute else None
    tuned = fine_tune(
        lm, pack(tasks, 0), weight_TN, start, rule=rule, lr=lr, steps=3, max_growth=2.0, parts=parts
    )
    for t, task in enumerate(tasks):
        packed = pack([task], 0)
        own = {key: x.clone().requires_grad_() for key, x in lora.select(start, [t]).items()}
        leaves = list(own.values())
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(leaves, rate, momentum=0.5) if kind == "sgd" else torch.optim.Adam(leaves, rate)
        )
        values = []
        for k in range(4):
            value, _, grad = loss_and_grad(
                lm.hf,
                lm.lora,
                packed,
                own,
                lambda x, t=t, packed=packed: (weight_TN[t] * example_loss(packed, x)).sum() / 3,
            )
            values.append(value.item())
            if k == 3:
                break
            for key, x in own.items():
                x.grad = grad[key]
            assert torch.nn.utils.clip_grad_norm_(leaves, 0.6) > 0.6, "the clip is to act"
            optimizer.step()
        for key, x in own.items():
            torch.testing.assert_close(tuned.trajectory.adapter[key][t], x[0].detach(), rtol=1e-7, atol=1e-9)
        assert tuned.before_T[t].item() == pytest.approx(values[0])
        assert tuned.after_T[t].item() == pytest.approx(values[3])
        assert values[3] < values[0], "it learns"
    assert not tuned.exploded_T.any()
    harsh = fine_tune(
        lm,
        pack(tasks, 0),
        weight_TN,
        start,
        rule=dataclasses.replace(rule, clip=None),
        lr={key: 1e3 * x for key, x in lr.items()},
        steps=3,
        max_growth=1.001,
        parts=parts,
    )
    assert harsh.exploded_T.tolist() == (harsh.after_T > 1.001 * harsh.before_T).tolist()


def test_without_the_check_of_growth_a_forward_pass_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama", torch.float32)
    packed = pack([[Sequence([5, 6, 7, 8], 2)], [Sequence([9, 8, 7, 6], 2)]], 0)
    start = policy_of(lm, 2)
    start["model.layers.0.mlp.up_proj.B"][1] = torch.inf
    passes = []
    lm.hf.base_model.register_forward_hook(lambda *_: passes.append(1))

    def tune(max_growth: float | None) -> practice.Tuned:
        passes.clear()
        lr = {key: torch.tensor(0.3) for key in start}
        return fine_tune(
            lm, packed, torch.ones(2, 1), start, rule=Rule(), lr=lr, steps=2, max_growth=max_growth
        )

    checked = tune(2.0)
    assert len(passes) == 3
    free = tune(None)
    assert len(passes) == 2 and free.after_T is None
    assert all(
        torch.equal(x[0], checked.trajectory.adapter[key][0]) for key, x in free.trajectory.adapter.items()
    )
    assert free.exploded_T.tolist() == checked.exploded_T.tolist() == [False, True]


def test_fine_tuning_on_nothing_moves_nothing() -> None:
    lm = tiny_lm("llama", torch.float32)
    start = policy_of(lm, 2)
    lr = {key: torch.tensor(0.3) for key in start}
    tuned = fine_tune(
        lm,
        pack([[None, None], [None, None]], 0),
        torch.zeros(2, 2),
        start,
        rule=Rule(clip=1.0),
        lr=lr,
        steps=2,
        max_growth=2.0,
    )
    assert all(torch.equal(tuned.trajectory.adapter[key], start[key]) for key in start)
    assert not tuned.exploded_T.any() and tuned.before_T.tolist() == [0.0, 0.0]


def test_the_chain_model_is_what_the_run_tests_need(
    tmp_path: Path, chain: LanguageModel, prompts: Prompts
) -> None:
    """Answers 1, 2 and 3 all occur, in both prompt styles."""
    for style in ("plain", "chat"):
        own = make_prompts(chain.tokenizer, style, None, None)
        drawn = answer(
            chain,
            own,
            TARGETS[:1],
            shots=[[]],
            adapter=None,
            sampling=Sampling(max_new_tokens=10),
            seeds=[[seed_of(j) for j in range(40)]],
        )
        text = " ".join(r.text for r in drawn[0])
        assert all(f"Answer: {digit}" in text for digit in (1, 2, 3)), text
        made = practice.write_examples(
            chain,
            own,
            TARGETS,
            generate_shots=[[], [], []],
            solve_shots=[[], [], []],
            adapter=None,
            seeds=[[seed_of(t, i) for i in range(4)] for t in range(3)],
            sampling=Sampling(16),
        )
        assert made.valid_TN.any(1).all(), style
