"""The problems of an evaluation: none that a run has trained on or shows, and none twice."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from folders import make_run

from mass import arms, attribution, checkpoint
from mass.disjoint import held_out
from mass.errors import MassError
from mass.problems import content_key
from mass.sources import load_all
from mass.splits import Cursor
from mass.wanted import plan, pool_of


def test_no_problem_is_one_that_a_run_has_met(tmp_path: Path) -> None:
    def file(name: str, texts: Sequence[str]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts))
        return str(path)

    trained = file("train.jsonl", [f"Training problem {i}" for i in range(12)])
    own = make_run(tmp_path, "one", train=[trained], heldout=None, heldout_size=3)
    other = make_run(tmp_path, "other", train=[file("more.jsonl", ["New A", "New X", "New Y", "New Z"])], heldout=None,
                     heldout_size=1)  # fmt: skip
    wanted = plan(str(own), None)
    default = held_out(wanted, [], made=False)
    assert len(default.tasks) == 3 and (default.left_out, default.repeated, default.trained) == (
        0,
        0,
        ["train"],
    )
    held = {content_key(task.problem.text) for task in default.tasks}
    # another size of the split would take training problems: those that the run has met are left out
    more = held_out(plan(str(own), None, ["run.seed=5"]), [], made=False)
    assert {content_key(task.problem.text) for task in more.tasks} <= held and len(
        more.tasks
    ) + more.left_out == 3

    met = next(text for i in range(12) if content_key(text := f"Training problem {i}") not in held)
    asked = file("new.jsonl", ["New A", f"  {met.upper()} ", "New B", "new b", "New C"])
    wanted = plan(str(own), None, [f"problems.heldout={json.dumps([asked])}"])
    found = held_out(wanted, [], made=True)
    assert [task.problem.text for task in found.tasks] == ["New A", "New B", "New C"]
    assert (found.left_out, found.repeated) == (1, 1)
    # what another run of an arm has trained on is left out for all
    both = held_out(wanted, arms.parse(f"none,{other}:none", wanted, [], (str(own), None)), made=True)
    held_by_other = held_out(plan(str(other), None), [], made=False).tasks[0].problem.text
    expected = [text for text in ("New A", "New B", "New C") if text != "New A" or held_by_other == text]
    assert [task.problem.text for task in both.tasks] == expected
    assert len(held_out(wanted, [], made=True, limit=2).tasks) == 2
    only = plan(str(own), None, [f"problems.heldout={json.dumps([file('met.jsonl', [met])])}"])
    with pytest.raises(MassError, match="no problem is left of 1"):
        held_out(only, [], made=True)


def test_the_first_problems_are_of_all_sources_in_turn(tmp_path: Path) -> None:
    """A world is one source, and a single source stays in its order; so does all of several ones."""

    def file(name: str) -> str:
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"problem": f"{name} {i}", "answer": "1"}) + "\n" for i in range(4)]
        path.write_text("".join(lines))
        return str(path)

    def asked(sources: Sequence[str], limit: int | None) -> list[str]:
        wanted = plan(None, "tiny:llama", [f"problems.heldout={json.dumps(sources)}"])
        return [task.problem.text for task in held_out(wanted, [], made=True, limit=limit).tasks]

    both = [file("a"), file("b")]
    assert asked(both, 5) == ["a 0", "b 0", "a 1", "b 1", "a 2"]
    assert asked(both[:1], 3) == ["a 0", "a 1", "a 2"]
    assert asked(both, 8) == asked(both, None) == [f"{name} {i}" for name in "ab" for i in range(4)]
    own = plan(str(make_run(tmp_path, "r")), None, ["meta_gradient.mode=reverse"])
    whole = held_out(own, [], made=False).tasks
    assert len({task.source for task in whole[:5]}) > 1
    assert held_out(own, [], made=False, limit=5).tasks == whole[:5]
    mixed = [
        *whole[:4],
        *held_out(plan(None, "tiny:llama", [f"problems.heldout=[{both[0]}]"]), [], made=True).tasks,
    ]
    assert attribution.choose(own, mixed, 4) == [mixed[0], mixed[4], mixed[1], mixed[5]]


def test_what_a_bare_model_shows_is_not_asked() -> None:
    """Shots are drawn from a mixture: a family of large weight is read further than its equal part."""
    words = ["problems.train=[gym:gcd, gym:chain_sum]", "problems.weights=[1, 9]", "prompt.pool=100"]
    words += ["problems.heldout=[gym:chain_sum]", "problems.heldout_size=500"]
    words += ["problems.gym.chain_sum={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2}"]
    wanted = plan(None, "tiny:llama", words)
    shown = {content_key(task.problem.text) for task in pool_of(wanted)}
    asked = {content_key(task.problem.text) for task in held_out(wanted, [], made=True).tasks}
    assert len(shown) == 100 and len(asked) > 100 and not shown & asked


def test_a_run_whose_problems_have_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(texts: Sequence[str]) -> None:
        path.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts))

    path, texts = tmp_path / "train.jsonl", [f"Training problem {i}" for i in range(12)]
    write(texts)
    run = make_run(tmp_path, "r", train=[str(path)], heldout=None, heldout_size=3)
    wanted = plan(str(run), None)
    trained = load_all(wanted.recipe).train
    meta = {"cursor": Cursor(trained, 0).state()}
    monkeypatch.setattr(checkpoint, "read_meta", lambda step: meta)
    assert len(held_out(wanted, [], made=False).tasks) == 3
    write(texts[:-1])
    with pytest.raises(MassError, match=r"/r: the problems that it was trained on have changed since"):
        held_out(wanted, [], made=False)
