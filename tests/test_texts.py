"""Texts that are drawn by the same call are drawn once, and count for every method as if it had drawn them."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import make_run
from handmade import PROBLEMS
from test_evaluate import rows
from tiny import tiny_kit

from mass import answers, arms, evaluate, practice
from mass.choices import Texts
from mass.choices.kit import greedily, sample
from mass.lora import expand
from mass.methods import solve
from mass.prompts import make_prompts
from mass.records import Record, Seconds
from mass.wanted import plan

ARMS = (
    "none,vote,pick,quest,mass,in-context,base:quest,mass[inner.steps=1],mass[generate.temperature=0.5],"
    "mass[generate.examples=2],pick[budget=300],vote[budget=300]"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each call of `generate` by a policy hangs on, hashed; updated adapters are a problem's own."""
    seen: list[str] = []
    generate = practice.generate

    def spied(lm: Any, prompts: Any, *, adapter: Mapping[str, torch.Tensor] | None, **how: Any) -> Any:
        values = {key: x.tolist() for key, x in sorted((adapter or {}).items())}
        own = any(len(x) > 1 for x in values.values())
        seen.extend(
            [] if own else [hashlib.sha256(repr((prompts, sorted(how.items()), values)).encode()).hexdigest()]
        )
        return generate(lm, prompts, adapter=adapter, **how)

    monkeypatch.setattr(practice, "generate", spied)
    return seen


def test_an_evaluation_draws_every_text_once_and_its_files_do_not_tell(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(make_run(tmp_path, "r"))
    wanted = plan(run, None)
    chosen = arms.parse(ARMS, wanted, [], (run, None))
    tasks = evaluate.held_out(wanted, chosen, made=False, limit=6).tasks

    def files(out: Path) -> dict[str, Any]:
        out.mkdir()
        assert answers.answer_all(chosen, tasks, out, 4, lambda _: None)
        return {path.name: rows(path) for path in out.glob("*.jsonl")}

    shared = files(tmp_path / "shared")
    once = list(calls)
    calls.clear()
    monkeypatch.setattr(Texts, "draw", lambda self, key, draw: draw())
    assert files(tmp_path / "alone") == shared and len(shared) == 12
    assert len(set(once)) == len(once) and set(once) == set(calls)
    # two batches of examples for four of the arms; answers for pick, and several rounds of them under the budget
    assert len(calls) - len(once) >= 2 * 3 + 2 + 4


def test_a_text_is_shared_by_all_that_it_hangs_on() -> None:
    texts = Texts()
    kit = tiny_kit(texts=texts)
    assert kit.policy is not None and kit.lm.shape is not None
    first = sample(kit, PROBLEMS, [range(2)] * 3)
    assert first == sample(replace(kit, texts=None), PROBLEMS, [range(2)] * 3)
    # whoever gets a list may add to it
    first[0].clear()
    copy = replace(kit, policy={key: x.clone() for key, x in kit.policy.items()}, steps=1, examples=5)
    again = sample(copy, PROBLEMS, [range(2)] * 3)
    assert len(texts.found) == 1 and len(again[0]) == 2

    last = next(reversed(kit.policy))
    moved = {key: x + (key == last) * 1e-9 for key, x in kit.policy.items()}
    scaled = replace(kit.lm, shape=replace(kit.lm.shape, alpha=1.0))
    others = [
        replace(kit, policy=moved),
        replace(kit, policy=None),
        replace(kit, lm=scaled),
        replace(kit, prompts=make_prompts(kit.lm.tokenizer, "plain", "Solve it.")),
        replace(kit, seed=1),
    ]
    other = {"engine": "hf", "step": "compile"}
    for field in fields(kit.answering):
        value = getattr(kit.answering, field.name)
        value = other.get(field.name, value / 2 if isinstance(value, float) else value)
        value = {"max_new_tokens": 7, "top_k": 3, "min_p": 0.1, "batch_rows": 2}.get(field.name, value)
        others.append(replace(kit, answering=replace(kit.answering, **{field.name: value})))
    # the key alone is looked at: nothing is drawn
    texts.draw = lambda key, draw: keys.append(key) or []  # type: ignore[method-assign,func-returns-value,assignment]
    keys: list[str] = list(texts.found)
    for one in others:
        sample(one, PROBLEMS, [range(2)] * 3)
    sample(kit, PROBLEMS, [range(3)] * 3)
    sample(kit, PROBLEMS, [range(2), range(2), range(1, 3)])
    sample(kit, PROBLEMS[:2], [range(2)] * 2)
    sample(kit, PROBLEMS[::-1], [range(2)] * 3)
    greedily(kit, PROBLEMS)
    assert len(keys) == len(set(keys)) == 1 + 5 + len(fields(kit.answering)) + 5
    # an adapter of a problem's own is nobody else's
    greedily(kit, PROBLEMS[:1], expand(kit.policy, 1))
    assert len(keys) == len(set(keys))


def test_what_is_not_drawn_again_is_charged(calls: list[str]) -> None:
    texts = Texts()
    kit = tiny_kit(texts=texts)

    def total(records: list[Record]) -> Seconds:
        parts = [field.name for field in fields(Seconds)]
        return Seconds(*(sum(getattr(r.seconds, part) for r in records) for part in parts))

    # nothing that a random model writes is valid: the policy answers
    for method, generate, answer in (("quest", 1, 1), ("vote", 1, 0), ("none", 0, 1), ("tt-si", 2, 1)):
        solve(kit, PROBLEMS, method, baselines=False)
        calls.clear()
        texts.found = {key: (drawn, 1000.0) for key, (drawn, _) in texts.found.items()}
        seconds = total(solve(kit, PROBLEMS, method, baselines=False))
        assert not calls
        assert seconds.generate // 1000 == generate and seconds.answer // 1000 == answer
        assert seconds.score + seconds.adapt < 1000
