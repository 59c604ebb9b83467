"""mass.harness: lm-evaluation-harness runs a local task on a run, with mass-eval's own answers and accuracy."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from test_evaluate import make_run, rows

from mass import chooser, evaluate, harness, wanted
from mass.chooser import Chooser
from mass.errors import MassError
from mass.filerun import adapt_problems
from mass.harness import MassLM
from mass.kit import build_kit
from mass.problems import as_problems, load_tasks
from mass.records import Record, Tokens
from mass.wanted import plan

COUNT = 8
BATCH = 4
METHODS = ("none", "vote", "mass")
ARM = "mass[inner.steps=1]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), "r")


@pytest.fixture(scope="module")
def problems(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems that the run has not trained on, as a file. Three of four references are what one of three methods says, so
    that each method has another part of them right."""
    path = tmp_path_factory.mktemp("problems") / "held.jsonl"
    tasks = load_tasks("world:families", split="heldout", size=COUNT, seed=3)
    kit = build_kit(plan(str(run), None))
    answers = [task.answer for task in tasks]
    for first, method in enumerate(METHODS):
        records = list(adapt_problems(kit, [task.problem for task in tasks], method, BATCH, baselines=False))
        said = {record.problem: record.answer for record in records}
        for i in range(first, COUNT, 4):
            answers[i] = said[tasks[i].problem.text] or answers[i]
    lines = [
        json.dumps({"problem": task.problem.text, "answer": x})
        for task, x in zip(tasks, answers, strict=True)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, problems: Path) -> Path:
    """A folder with a task of the harness over the same file, and one that wants likelihoods."""
    folder = tmp_path_factory.mktemp("tasks")
    task = {
        "task": "held",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(problems)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{problem}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False},
        "filter_list": [
            {
                "name": "stated",
                "filter": [
                    {"function": "regex", "regex_pattern": "Answer: (.*)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    }
    (folder / "held.yaml").write_text(yaml.safe_dump(task))
    choice = {
        **task,
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_choice": ["0", "{{answer}}"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}],
    }
    del choice["generation_kwargs"], choice["filter_list"]
    (folder / "choice.yaml").write_text(yaml.safe_dump(choice))
    return folder


@pytest.fixture(scope="module")
def ours(run: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mass-eval on the same problems."""
    out = tmp_path_factory.mktemp("ours") / "out"
    argv = ["--run", str(run), "--methods", ",".join([*METHODS, ARM]), "--problems", str(problems)]
    assert evaluate.main([*argv, "--batch", str(BATCH), "--out", str(out)]) == 0
    return out


def evaluated(lm: MassLM, local: Path, task: str = "held", **more: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(local), include_defaults=False)
    return simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **more)


def request(context: str, **given: Any) -> Instance:
    # what no answer may depend on: the row has the reference in it
    return Instance("generate_until", {"answer": "CANARY"}, (context, given), 0, ("t", 0, 1))


@pytest.mark.parametrize("method", METHODS)
def test_a_local_task_has_the_answers_and_the_accuracy_of_mass_eval(
    run: Path, local: Path, ours: Path, method: str
) -> None:
    lm = MassLM(run=str(run), method=method, batch_size=BATCH)
    found = evaluated(lm, local)
    own = rows(ours / f"{method}.jsonl")
    samples = sorted(found["samples"]["held"], key=lambda x: x["doc_id"])
    assert [x["resps"] for x in samples] == [[[row["solution"]]] for row in own]
    arm = next(x for x in json.loads((ours / "results.json").read_text())["arms"] if x["arm"] == method)
    assert 0 < found["results"]["held"]["exact_match,stated"] == arm["accuracy"] < 1
    assert [x["exact_match"] for x in samples] == [row["score"] for row in own]
    about = found["config"]["mass"]
    assert (about["method"], about["documents"], about["failed"]) == (method, COUNT, 0)
    settings = wanted.settings_key(plan(str(run), None), method)
    assert about["run"].endswith("step_000001") and about["settings"] == settings
    assert (about["generated"] + about["trained"]) / COUNT == arm["tokens"]


@pytest.mark.slow
def test_the_command_is_lm_eval_with_this_model(
    local: Path,
    run: Path,
    ours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A recipe key among the model's arguments is the arm's of that key."""
    argv = ["--model", "mass", "--model_args", f"run={run},method=mass,inner.steps=1"]
    argv += ["--batch_size", str(BATCH), "--tasks", "held", "--include_path", str(local)]
    monkeypatch.setattr(sys, "argv", ["mass.harness", *argv, "--output_path", str(tmp_path / "out.json")])
    assert harness.main() == 0
    (written,) = tmp_path.glob("out*.json")
    found = json.loads(written.read_text())
    one, two = (
        next(x for x in json.loads((ours / "results.json").read_text())["arms"] if x["arm"] == name)
        for name in (ARM, "mass")
    )
    assert found["results"]["held"]["exact_match,stated"] == one["accuracy"]
    about = found["config"]["mass"]
    assert about["documents"] == COUNT and "|held" in capsys.readouterr().out
    assert about["trained"] / COUNT == one["trained"] == pytest.approx(two["trained"] / 2)


# ---- what becomes the problem


@pytest.fixture
def asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[MassLM, list[Any]]:
    """A model whose method only says what it was given; and that list: (problem, most tokens of an answer)."""
    given: list[Any] = []

    def batches(kit: Any, items: Sequence[Any], groups: Any, method: str, **_: Any) -> Any:
        given.extend((item, kit.answering.max_new_tokens) for item in items)
        for some in groups:
            yield [
                (
                    i,
                    Record(
                        str(i),
                        "",
                        method,
                        solution=f"{items[i].text[:4]} Answer: 1\nQ: 2",
                        tokens=Tokens(5, 6),
                    ),
                )
                for i in some
            ]

    monkeypatch.setattr(harness, "run_batches", batches)
    return MassLM(run=str(run), method="none", batch_size="auto"), given


def test_a_prompt_is_one_problem_and_nothing_of_the_row_is_read(asked: tuple[MassLM, list[Any]]) -> None:
    lm, given = asked
    requests = [
        request("Question: a?\n\nAnswer:", until=["\nQ:", "zzz"]),
        request("b", until="Answer", max_gen_toks=7),
        request("Question: a?\n\nAnswer:", until=[]),
        request("b", max_gen_toks=9, do_sample=False, temperature=0.0, top_p=0.9),
    ]
    texts = lm.generate_until(requests)
    assert texts == ["Ques Answer: 1", "b ", "Ques Answer: 1\nQ: 2", "b Answer: 1\nQ: 2"]
    # a repeat is answered once; a task's own limit holds for its documents, and else the recipe's
    assert [(x.text, most) for x, most in given] == [("b", 7), ("b", 9), ("Question: a?\n\nAnswer:", 48)]
    assert all(x.demonstrations == () for x, _ in given) and "CANARY" not in repr(given)
    assert lm.get_model_info()["mass"]["generated"] == 15 and lm.batch == 16


def test_turns_are_demonstrations_and_a_last_question(asked: tuple[MassLM, list[Any]]) -> None:
    lm, given = asked
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "One and one. The answer is 2."},
        {"role": "user", "content": "2 + 1?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "2 + 2?"},
    ]
    lm.generate_until([request(lm.apply_chat_template(turns)), request(lm.apply_chat_template(turns[-1:]))])
    assert [x.text for x, _ in given] == ["Be brief.\n\n2 + 2?", "2 + 2?"]
    assert given[0][0].demonstrations == (("1 + 1?", "2"), ("2 + 1?", "3")) and not given[1][0].demonstrations
    for wrong in ([*turns, {"role": "assistant", "content": "It is"}], turns[:1], [turns[1], turns[1]]):
        with pytest.raises(MassError, match="gen_prefix"):
            lm.generate_until([request(lm.apply_chat_template(wrong))])


def test_few_shots_of_a_task_reach_the_method_as_demonstrations(
    asked: tuple[MassLM, list[Any]], local: Path, problems: Path, tmp_path: Path
) -> None:
    lm, given = asked
    task = yaml.safe_load((local / "held.yaml").read_text())
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    shots = {"sampler": "first_n", "samples": [{"problem": "P", "answer": "A"}]}
    task |= {"num_fewshot": 1, "fewshot_config": shots, "description": "Say it.\n\n"}
    (tmp_path / "held.yaml").write_text(yaml.safe_dump(task))
    evaluated(lm, tmp_path, apply_chat_template=True, fewshot_as_multiturn=True)
    assert [x.text for x, _ in given] == [f"Say it.\n\n{row['problem']}" for row in rows]
    assert {x.demonstrations for x, _ in given} == {(("P", "A"),)}
    given.clear()
    evaluated(lm, tmp_path)
    assert [x.text for x, _ in given] == [f"Say it.\n\nP A\n\n{row['problem']}" for row in rows]


# ---- what is refused, and what fails


def test_what_a_method_cannot_honour_is_refused_before_anything_is_written(
    asked: tuple[MassLM, list[Any]], local: Path
) -> None:
    lm, given = asked
    good = request("a")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"do_sample": True}, "wants sampled answers"),
        ({"temperature": 0.6}, "wants sampled answers"),
        ({"num_beams": 4}, "num_beams=4, which has no meaning"),
        ({"max_gen_toks": 0}, "max_gen_toks=0: it wants 1"),
    ]
    for settings, sentence in cases:
        with pytest.raises(MassError, match=sentence):
            lm.generate_until([good, request("b", **settings)])
    with pytest.raises(MassError, match="loglikelihood: a method answers .* --model hf"):
        evaluated(lm, local, "choice")
    with pytest.raises(MassError, match="loglikelihood_rolling: a method answers"):
        lm.loglikelihood_rolling([good])
    assert given == []


def test_bad_arguments_are_a_sentence_before_any_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "build_kit", lambda *_: pytest.fail("a model is loaded"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "name what is to adapt"),
        ({"run": str(run), "method": "mas"}, "did you mean mass"),
        ({"run": str(run), "batch_size": 0}, "batch_size=0: it wants 1 or more"),
        ({"run": str(run), "inner.stepz": 3}, "inner.stepz: unknown key. Did you mean inner.steps"),
        ({"run": str(run), "trust_remote_code": True}, "trust_remote_code: unknown key"),
        ({"model": "tiny:llama", "method": "mass"}, "weighs by a trained scorer"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(MassError, match=sentence):
            MassLM(**arguments)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: MassLM())
    assert harness.main() == 2 and "mass.harness: name what is to adapt" in capsys.readouterr().err


def test_without_lm_eval_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    sentence = "mass.harness needs lm-eval .* pip install 'mass\\[eval\\]'"
    with pytest.raises(MassError, match=sentence):
        runpy.run_path(harness.__file__, run_name="other")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(harness.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert re.fullmatch(sentence, said.strip())


def test_a_budget_and_limits_of_a_task(run: Path) -> None:
    lm = MassLM(run=str(run), method="vote", budget=60)
    with pytest.raises(MassError, match="budget=60 is less than the 61 tokens"):
        lm.generate_until([request("a", max_gen_toks=61)])


def test_the_budget_that_auto_was_fitted_under_holds_for_a_task_s_limit(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "r")
    flat = {"none": (0.0,) * 5}
    chooser.save(Chooser(60, 4, 10, (0.0,) * 4, (1.0,) * 4, flat, {"none": 0.5}), copy)
    with pytest.raises(MassError, match="fitted under --budget 60, not 70"):
        MassLM(run=str(copy), method="auto", budget=70)
    lm = MassLM(run=str(copy), method="auto")
    with pytest.raises(MassError, match="budget=60 is less than the 61 tokens"):
        lm.generate_until([request("a", max_gen_toks=61)])


def test_a_document_that_fails_is_an_empty_answer_with_a_warning(
    run: Path, problems: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = json.loads(problems.read_text().splitlines()[0])["problem"]
    lm = MassLM(run=str(run), method="none")
    long, fine, empty = lm.generate_until([request(text * 500), request(text), request("  ")])
    (record,) = adapt_problems(build_kit(plan(str(run), None)), as_problems([text]), "none", baselines=False)
    assert (long, empty) == ("", "") and fine == record.solution != ""
    assert "too long: the prompt has" in caplog.text and "2 of 3 documents failed" in caplog.text
    assert lm.get_model_info()["mass"]["failed"] == 2


def test_a_cache_of_the_harness_keeps_each_answer(
    asked: tuple[MassLM, list[Any]], local: Path, tmp_path: Path
) -> None:
    lm, given = asked
    first = evaluated(lm, local, use_cache=str(tmp_path / "cache"))
    assert len(given) == COUNT
    again = evaluated(lm, local, use_cache=str(tmp_path / "cache"))
    assert len(given) == COUNT
    assert [x["resps"] for x in first["samples"]["held"]] == [x["resps"] for x in again["samples"]["held"]]
    # also what was answered before an evaluation was stopped
    kept: list[Any] = []
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *found: kept.append(found)))
    requests = [request("a"), request("b", until=["Answer"]), request("a")]
    texts = lm.generate_until(requests)
    wanted = [("generate_until", x.args, text) for x, text in zip(requests, texts, strict=True)]
    assert len(kept) == 3 and all(one in kept for one in wanted)
