"""mass-eval: its statistics against scipy and counts by hand, arms, disjoint problems, resuming, and the report."""

import dataclasses
import json
import os
import re
import signal
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import Ranks
from scipy import stats

from mass import arms, checkpoint, compare, evaluate, filerun, results, tally
from mass.checkpoint import Contents, open_run
from mass.choices.kit import sample
from mass.errors import MassError
from mass.filerun import adapt_problems
from mass.kit import build_kit, plan
from mass.lora import LoraShape, attach, fresh
from mass.methods import Made, Record
from mass.model import load
from mass.problems import content_key
from mass.rewards import Verifier, find_answer
from mass.scorer import Scorer

DATA = Path(__file__).parent / "data"
COUNT = 10


def make_run(root: Path, name: str, **problems: Any) -> Path:
    """A run folder as training leaves it, with the small base of the families world; its policy moves, its scorer is random."""
    recipe = {
        "run": {"name": name},
        "model": {"path": str(DATA / "families"), "dtype": "fp32"},
        "problems": {
            "train": ["world:families"],
            "heldout": ["world:families"],
            "size": 20,
            "heldout_size": COUNT,
        }
        | problems,
        "prompt": {
            "style": "plain",
            "solve_instruction": "",
            "generate_instruction": "",
            "generate_shots": 0,
            "pool": 0,
        },
        "lora": {"rank": 2, "alpha": 4.0},
        "scorer": {"hidden": 8},
        "generate": {"max_new_tokens": 28, "answer_tokens": 48, "examples": 4},
        "inner": {"lr": 5.0, "clip": 0.1, "checkpoint": False},
    }
    hf, _ = load(str(DATA / "families"), dtype="fp32", device="cpu")
    base = checkpoint.fingerprint(hf.named_parameters())
    shape = LoraShape(2, 4.0, ("all-linear",))
    generator = torch.Generator().manual_seed(len(name))
    policy = {
        key: x + 0.02 * torch.randn(x.shape, generator=generator)
        for key, x in fresh(attach(hf, shape), 2, generator).items()
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scorer = Scorer(hf.config.hidden_size, 2, 8).state_dict()
    opened = open_run(root, name, yaml.safe_dump(recipe), "no")
    contents = Contents(
        policy, shape, "base", scorer, {}, [torch.get_rng_state()], {"fingerprint": base, "extra": {}}
    )
    checkpoint.save(opened, 1, contents, 0)
    (opened.folder / "shots.jsonl").write_text("")
    return opened.folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), "r")


def rows(path: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "seconds": None} for line in path.read_text().splitlines()]


# ---- statistics


def test_paired_comparison_is_that_of_the_two_by_two_table() -> None:
    # 30 both, 17 the first alone, 5 the second alone, 48 neither
    a = np.array([1] * 30 + [1] * 17 + [0] * 5 + [0] * 48, bool)
    b = np.array([1] * 30 + [0] * 17 + [1] * 5 + [0] * 48, bool)
    found = compare.paired(a, b)
    assert (found.won, found.lost, found.difference) == (17, 5, pytest.approx(0.12))
    assert found.p == pytest.approx(stats.binomtest(5, 22, 0.5).pvalue) and 0.01 < found.p < 0.02
    # the bootstrap's exact distribution: sums of 100 draws of +1, -1 and 0
    draw = np.random.default_rng(7).multinomial(100, [0.17, 0.05, 0.78], size=400_000)
    exact = np.quantile((draw[:, 0] - draw[:, 1]) / 100, [0.025, 0.975])
    assert found.interval == pytest.approx(tuple(exact), abs=0.0101)
    # what the pairs have in common does not widen it, as two separate samples would
    separate = 2 * 1.96 * np.sqrt(a.var() / 100 + b.var() / 100)
    assert found.interval[1] - found.interval[0] < 0.7 * separate  # type: ignore[index]
    turned = compare.paired(b, a)
    assert (turned.won, turned.lost, turned.p) == (5, 17, found.p) and turned.difference == -found.difference
    assert compare.paired(a, a).p == 1.0 and compare.paired(a, a).interval == (0.0, 0.0)
    with pytest.raises(ValueError, match="not answers to the same problems"):
        compare.paired(a, b[:99])


def test_interval_has_the_quantiles_of_the_binomial() -> None:
    right = [True] * 60 + [False] * 140
    found = compare.interval(right)
    exact = stats.binom.ppf([0.025, 0.975], 200, 0.3) / 200
    assert found == pytest.approx(tuple(exact), abs=0.0051) and compare.interval(right) == found
    assert compare.interval([True] * 9) == (1.0, 1.0) and compare.interval([True]) is None


def test_holm_by_hand() -> None:
    assert compare.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert compare.holm([]) == []


def row(score: float | None, source: str = "a", **more: Any) -> dict[str, Any]:
    return {
        "score": score,
        "source": source,
        "error": None,
        "answer": "x",
        "flops": 10,
        "tokens": {"generated": 3, "trained": 4},
        "seconds": {"generate": 0.5, "score": 0.25, "adapt": 0.0, "answer": 0.25},
        "examples": [],
        "truth": [],
        "tries": [],
    } | more


def test_a_table_from_rows_counted_by_hand() -> None:
    def example(weight: float | None, reason: str = "") -> dict[str, Any]:
        return {"weight": weight, "reason": reason}

    first = row(1.0, examples=[example(w) for w in (2.0, 1.0, 1.0, 0.0)] + [example(0.0, "copy")],
                truth=[[True, True, True], [False, True, True], [True, True, False], [True, False, None], None])  # fmt: skip
    second = row(0.5, examples=[example(0.5), example(3.5), example(None)],
                 truth=[[True, True, True], [False, False, False], [True, True, True]])  # fmt: skip
    answers = {
        "none": [row(0.0), row(1.0), row(None, "b"), row(0.0, "b", answer=None)],
        "vote": [
            row(0.0, tries=[0.0, 1.0, 0.0, 0.0]),
            row(1.0, tries=[1.0, 1.0, None]),
            row(1.0, "b", tries=[1.0, 1.0, 1.0]),
            row(0.0, "b", error="too long", answer=None),
        ],
        "mass": [first, second, row(1.0, "b"), row(1.0, "b")],
    }
    found = tally.results(answers, trained=["a"])
    none, vote, mass = found["arms"]
    assert [arm["right"] for arm in found["arms"]] == [1, 2, 3] and mass["accuracy"] == 0.75
    assert mass["score"] == pytest.approx((1 + 0.5 + 1 + 1) / 4) and mass["interval"] == compare.interval(
        [1, 0, 1, 1]
    )
    # by all subsets of 1, 2 and 3 tries; the problem that failed has none right
    at = [(1 / 4 + 2 / 3 + 1) / 4, (3 / 6 + 3 / 3 + 1) / 4, (3 / 4 + 1 + 1) / 4]
    assert vote["tries"] == {"least": 3, "most": 4, "any": 0.75, "at": pytest.approx(at)}
    assert none["tries"] is None is mass["tries"]
    del answers["vote"][0]["tries"]  # of an earlier version
    assert tally.results(answers)["arms"][1]["tries"]["any"] == 0.5
    assert (none["unverified"], none["no_answer"], vote["errors"], vote["no_answer"]) == (1, 1, 1, 0)
    assert (mass["tokens"], mass["flops"], mass["seconds"], mass["per_minute"]) == (7, 10, 1, 60)
    assert mass["parts"] == {"generate": 0.5, "score": 0.25, "adapt": 0.0, "answer": 0.25}
    assert (mass["examples"], mass["valid"], mass["copies"]) == (8, 7, 1) and none["truth"] is None
    # good against other, task by task: 2 and 1 against 1 and 0; 0.5 against 3.5.
    won = stats.mannwhitneyu([2.0, 1.0], [1.0, 0.0]).statistic
    assert mass["truth"]["auc"] == pytest.approx(won / 5) == pytest.approx(3.5 / 5)
    assert (mass["truth"]["known"], mass["truth"]["good"], mass["truth"]["honest"]) == (6, 0.5, 0.6)
    assert sum(mass["truth"]["weights_good"]) == 3 == sum(mass["truth"]["weights_other"])
    assert found["sources"] == [
        {"source": "a", "trained": True, "problems": 2, "right": {"none": 1, "vote": 1, "mass": 1}},
        {"source": "b", "trained": False, "problems": 2, "right": {"none": 0, "vote": 1, "mass": 2}},
    ]
    pairs = found["comparisons"]
    assert [(x["arm"], x["against"]) for x in pairs] == [
        ("vote", "none"),
        ("mass", "none"),
        ("mass", "vote"),
    ]
    assert [(x["won"], x["lost"], x["p"]) for x in pairs] == [(1, 0, 1.0), (3, 1, 0.625), (2, 1, 1.0)]
    assert [x["p_holm"] for x in pairs] == compare.holm([x["p"] for x in pairs])


# ---- arms


def test_arms_say_what_runs_with_which_settings(run: Path) -> None:
    wanted = plan(str(run), None, ["inner.clip=0.2"])
    text = f"none, mass[inner.steps=1,scorer.layers=[0.5,1.0],budget=500],base:quest,{run}/step_000001:vote"
    with pytest.raises(MassError, match=r"arm mass\[.*scorer.layers"):
        arms.parse(text, wanted, ["inner.clip=0.2"], (str(run), None))
    text = text.replace("scorer.layers=[0.5,1.0],", "model.attention=sdpa,")
    none, mass, bare, other = arms.parse(text, wanted, ["inner.clip=0.2"], (str(run), None))
    assert (none.method, mass.method, bare.method, other.method) == ("none", "mass", "quest", "vote")
    assert (mass.plan.recipe.inner.steps, mass.plan.budget, none.plan.budget) == (1, 500, None)
    assert {arm.plan.recipe.inner.clip for arm in (none, mass, bare, other)} == {0.2}
    assert bare.bare and not none.bare and other.plan.step == run / "step_000001"
    assert len({arm.key for arm in (none, mass, bare, other)}) == 4
    assert len({arm.file for arm in (none, mass, bare, other)}) == 4 and none.file == "none.jsonl"
    assert all("/" not in arm.file and not arm.file.startswith(".") for arm in (mass, bare, other))


def test_arms_that_cannot_be_are_named(run: Path, tmp_path: Path) -> None:
    wanted = plan(str(run), None)
    cases = [
        ("quets", "arm quets: method 'quets': did you mean quest?"),
        ("none,none", "the arm none twice"),
        (",", "names no arm"),
        ("mass]", r"arm mass\]: an arm is METHOD"),
        ("mass[problems.size=3]", "all arms answer the same problems"),
        (
            "mass[inner.stepz=3]",
            r"arm mass\[inner.stepz=3\]: (.|\n)*inner.stepz: unknown key. Did you mean inner.steps",
        ),
        ("random", "random draws training problems, and there are none here"),
        ("base:mass", "arm base:mass: method mass weighs by a trained scorer"),
        (f"{tmp_path}/nowhere:mass", "there is no such folder"),
        ("vote[budget=3]", "a budget of 3 is less than generate.answer_tokens=48"),
        ("vote[budget=many]", "a number of tokens"),
    ]
    for text, sentence in cases:
        with pytest.raises(MassError, match=sentence):
            arms.parse(text, wanted, [], (str(run), None))


def test_every_usable_arm_and_why_the_others_are_not(run: Path) -> None:
    usable, reasons = arms.every_usable(plan(str(run), None), [])
    names = [arm.name for arm in usable]
    assert "mass" in names and "none" in names and not {"random", "ttt", "tt-d", "auto"} & set(names)
    assert [reason.partition(" ")[0] for reason in reasons] == ["random", "ttt", "tt-d", "auto"]


# ---- problems


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
    default = evaluate.held_out(wanted, [], made=False)
    assert len(default.tasks) == 3 and (default.left_out, default.repeated, default.trained) == (
        0,
        0,
        ["train"],
    )
    held = {content_key(task.problem.text) for task in default.tasks}
    # another size of the split would take training problems: those that the run has met are left out
    more = evaluate.held_out(plan(str(own), None, ["run.seed=5"]), [], made=False)
    assert {content_key(task.problem.text) for task in more.tasks} <= held and len(
        more.tasks
    ) + more.left_out == 3

    met = next(text for i in range(12) if content_key(text := f"Training problem {i}") not in held)
    asked = file("new.jsonl", ["New A", f"  {met.upper()} ", "New B", "new b", "New C"])
    wanted = plan(str(own), None, [f"problems.heldout={json.dumps([asked])}"])
    found = evaluate.held_out(wanted, [], made=True)
    assert [task.problem.text for task in found.tasks] == ["New A", "New B", "New C"]
    assert (found.left_out, found.repeated) == (1, 1)
    # what another run of an arm has trained on is left out for all
    both = evaluate.held_out(
        wanted, arms.parse(f"none,{other}:none", wanted, [], (str(own), None)), made=True
    )
    held_by_other = evaluate.held_out(plan(str(other), None), [], made=False).tasks[0].problem.text
    expected = [text for text in ("New A", "New B", "New C") if text != "New A" or held_by_other == text]
    assert [task.problem.text for task in both.tasks] == expected
    assert len(evaluate.held_out(wanted, [], made=True, limit=2).tasks) == 2
    only = plan(str(own), None, [f"problems.heldout={json.dumps([file('met.jsonl', [met])])}"])
    with pytest.raises(MassError, match="no problem is left of 1"):
        evaluate.held_out(only, [], made=True)


# ---- whole calls


ARMS = "none,vote,quest,mass,mass[inner.steps=1],base:quest"


@pytest.fixture(scope="module")
def done(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "out"
    assert evaluate.main(["--run", str(run), "--methods", ARMS, "--batch", "4", "--out", str(folder)]) == 0
    return folder


def test_an_arm_answers_as_its_method_does_alone(run: Path, done: Path) -> None:
    tasks = evaluate.held_out(plan(str(run), None), [], made=False).tasks
    problems = [task.problem for task in tasks]
    whole = build_kit(plan(str(run), None))
    bare = dataclasses.replace(whole, policy=None, head=None)
    one = dataclasses.replace(whole, steps=1)
    found = {}
    for name, kit, method in (("mass", whole, "mass"), ("mass[inner.steps=1]", one, "mass"), ("base:quest", bare, "quest")):  # fmt: skip
        arm = arms.parse(name, plan(str(run), None), [], (str(run), None))[0]
        found[name] = rows(done / arm.file)
        records = {x.id: x for x in adapt_problems(kit, problems, method, 4, baselines=False)}
        assert [row["id"] for row in found[name]] == [p.id for p in problems]
        for row, task in zip(found[name], tasks, strict=True):
            record = records[row["id"]]
            assert row["solution"] == record.solution and row["tokens"] == dataclasses.asdict(record.tokens)
            assert row["score"] == float(record.answer == task.answer) and len(row["truth"]) == 4
    assert {len(row["steps"]) for row in found["mass"]} == {2}
    assert {len(row["steps"]) for row in found["mass[inner.steps=1]"]} == {1}
    assert [row["solution"] for row in found["base:quest"]] != [row["solution"] for row in found["mass"]]
    weights = sum(x.numel() for x in load(str(DATA / "families"), dtype="fp32", device="cpu")[0].parameters())
    first = found["mass"][0]
    assert first["flops"] == weights * (2 * first["tokens"]["generated"] + 6 * first["tokens"]["trained"])
    # a world judges practice, not own answers
    assert any(any(x is not None for x in row["truth"]) for row in found["mass"])
    assert all(x is None for row in rows(done / "vote.jsonl") for x in row["truth"])


def test_every_try_of_a_vote_is_verified(run: Path, tmp_path: Path) -> None:
    tasks = evaluate.held_out(plan(str(run), None), [], made=False).tasks
    kit = build_kit(plan(str(run), None))
    drawn = sample(kit, [task.problem for task in tasks], [range(4)] * COUNT)
    said = [[find_answer(r.text) for r in own] for own in drawn]
    # the reference of some problems is what one of the tries says, whatever the vote makes of them
    answers = [said[i][i % 4] or task.answer if i % 2 else task.answer for i, task in enumerate(tasks)]
    path = tmp_path / "problems.jsonl"
    lines = [
        json.dumps({"problem": task.problem.text, "answer": x})
        for task, x in zip(tasks, answers, strict=True)
    ]
    path.write_text("\n".join(lines))
    out = tmp_path / "out"
    argv = ["--run", str(run), "--problems", str(path), "--methods", "none,vote", "--out", str(out)]
    assert evaluate.main(argv) == 0
    own = rows(out / "vote.jsonl")
    wanted = [[float(x == answer) for x in texts] for texts, answer in zip(said, answers, strict=True)]
    assert [row["tries"] for row in own] == wanted and all(
        not row["tries"] for row in rows(out / "none.jsonl")
    )
    assert all(row["score"] <= max(row["tries"]) for row in own)
    found = json.loads((out / "results.json").read_text())
    none, vote = found["arms"]
    any_right = sum(max(scores) for scores in wanted) / COUNT
    assert none["tries"] is None and 1 > any_right > vote["accuracy"]
    tries = vote["tries"]
    assert (tries["least"], tries["most"], tries["any"], tries["at"][3]) == (4, 4, any_right, any_right)
    assert tries["at"][0] == pytest.approx(np.mean(wanted)) and tries["at"] == sorted(tries["at"])
    assert f"| {any_right:.3f} n = 4 |" in (out / "results.md").read_text()
    # an answer that is chosen among the tries has them; one that is learned from them has not
    with Verifier() as verifier:
        for method, has in (("pick", True), ("rpc", True), ("vds", False), ("ttrl", False), ("auto", False)):
            arm = arms.Arm(method, plan(str(run), None), method)
            record = Record("x", "", method, examples=(Made("", tasks[0].solution, 1.0, True, ""),))
            assert evaluate._tries(arm, tasks[0], record, verifier) == ([1.0] if has else [])


class Links(HTMLParser):
    """Everything in a page that could make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.ids += [str(value)] if name == "id" else []
            if name.rpartition(":")[2] in ("href", "src", "srcset", "data", "action") or name.startswith(
                "on"
            ):
                self.links.append(str(value))


def test_the_report_has_the_numbers_of_the_rows_and_loads_nothing(done: Path) -> None:
    found = json.loads((done / "results.json").read_text())
    names = ARMS.split(",")
    assert [arm["arm"] for arm in found["arms"]] == names and found["problems"] == COUNT
    for arm, name in zip(found["arms"], ("none", "vote", "quest", "mass"), strict=False):
        own = rows(done / f"{name}.jsonl")
        assert arm["right"] == sum(row["score"] == 1 for row in own)
        assert arm["tokens"] == pytest.approx(np.mean([sum(row["tokens"].values()) for row in own]))
    assert (
        found["arms"][0]["trained"]
        == 0
        < found["arms"][3]["trained"]
        == pytest.approx(2 * found["arms"][4]["trained"])
    )
    # vote and quest are compared with the rivals before them, the three others with all
    assert len(found["comparisons"]) == 1 + 2 + 3 * 3
    assert found["versions"]["torch"] == torch.__version__ and "--methods" in found["command"]
    markdown = (done / "results.md").read_text()
    assert f"| mass[inner.steps=1] | {found['arms'][4]['accuracy']:.3f} [" in markdown

    page = (done / "results.html").read_text()
    reader = Links()
    reader.feed(page)
    assert {"svg", "table"} <= reader.tags and not {"script", "link", "img", "iframe"} & reader.tags
    assert page.count("<svg") == 4 and all(link.startswith("#") for link in reader.links)
    assert not re.search(r"url\((?!#)|@import|https?://", page), "nothing is fetched"
    # each mark and clip that a plot uses is in the page
    used = {link[1:] for link in reader.links} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used and used <= set(reader.ids) and len(reader.ids) == len(set(reader.ids))
    assert "currentColor" in page and "#010203" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_names_and_sources_are_text_in_the_report(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|$x_1$"
    found = tally.results({evil: [row(1.0, evil), row(0.0, "b")], "none": [row(0.0, evil), row(0.0, "b")]})
    found |= {"command": ["mass-eval", evil], "seed": 0, "versions": {}, "problems": 2, "left_out": 0, "repeated": 0}  # fmt: skip
    results.write(tmp_path, found)
    page = (tmp_path / "results.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 5 and "$x_1$" in page
    assert "<script>alert(1)</script>\\|$x_1$ | 0.500" in (tmp_path / "results.md").read_text()


def killed(argv: list[str], calls: int) -> None:
    """mass-eval that is killed in its write number `calls`, in the middle of a line."""
    real, counted = filerun.append, []

    def append(path: Path, lines: Sequence[str]) -> None:
        counted.append(path)
        if len(counted) < calls:
            real(path, lines)
            return
        with open(path, "ab") as file:
            file.write("".join(line + "\n" for line in lines).encode()[:1500])
        os.kill(os.getpid(), signal.SIGKILL)

    filerun.append = append
    evaluate.main(argv)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_call_goes_on_to_the_same_files(run: Path, done: Path, tmp_path: Path) -> None:
    argv = ["--run", str(run), "--methods", ARMS, "--batch", "4", "--out", str(tmp_path / "out"), "--resume"]
    with Ranks() as ranks:
        assert ranks("test_evaluate:killed", argv, 5).codes == [-signal.SIGKILL]
        assert not (tmp_path / "out" / "results.json").exists()
        last = ranks("mass.evaluate:main", argv).good()
    assert "none: 10 of 10 problems have their answer" in last.err[0]
    names = sorted(path.name for path in done.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names and len(names) == 10
    for name in names:
        if name.endswith(".jsonl"):
            assert rows(tmp_path / "out" / name) == rows(done / name)
    whole, again = (json.loads((x / "results.json").read_text()) for x in (done, tmp_path / "out"))
    assert again["comparisons"] == whole["comparisons"] and again["sources"] == whole["sources"]


def test_nothing_is_loaded_when_nothing_is_left(
    run: Path, done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    hashed = []
    real = arms.settings_key
    monkeypatch.setattr(arms, "settings_key", lambda plan: hashed.append(plan) or real(plan))
    argv = ["--run", str(run), "--batch", "4", "--out", str(done), "--resume"]
    assert evaluate.main([*argv, "--methods", "none,mass"]) == 0
    assert len(hashed) == 2, "what an arm depends on is hashed once, not for every problem"
    said = capsys.readouterr()
    assert "10 problems" in said.out and "vs none" in said.out and "vs vote" not in said.out
    # a kill may come when all answers are there but not in order yet; put back for the other tests
    lines = (done / "mass.jsonl").read_bytes().splitlines(True)
    (done / "mass.jsonl").write_bytes(b"".join(reversed(lines)))
    assert evaluate.main([*argv, "--methods", ARMS]) == 0
    assert (done / "mass.jsonl").read_bytes() == b"".join(lines)
    assert evaluate.main([*argv, "--methods", "mass", "inner.lr=1"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_bad_input_is_a_sentence_before_any_model_is_loaded(
    run: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    of_run, new = ["--run", str(run)], ["--out", str(tmp_path / "new")]
    cases = [
        ([*of_run, *new, "--methods", "mas"], "arm mas: method 'mas': did you mean mass?"),
        ([*of_run, "--out", str(done)], "exists, and nothing is overwritten.*--resume"),
        ([*of_run, "--out", str(tmp_path / "file")], "is a file"),
        ([*of_run, *new, "--problems", str(tmp_path / "empty.jsonl")], "empty.jsonl holds no problem"),
        ([*of_run, *new, "--problems", "gym:chain_sun"], "the nearest is 'chain_sum'"),
        ([*of_run, *new, "--problems", str(tmp_path / "none.jsonl")], "There is no problem file"),
        ([*of_run, *new, "problems.heldout=null", "problems.heldout_size=0"], "no held-out problems"),
        ([*of_run, *new, "--limit", "0"], "--limit 0: it wants 1 or more"),
        ([*of_run, *new, "--budget", "3"], "--budget 3 is less than generate.answer_tokens"),
        (["--model", "tiny:llama", *new], "name the problems"),
        (["--model", "tiny:llama", "--problems", "world:families"], "--out FOLDER is wanted"),
        (["--run", str(tmp_path / "no")], "there is no such folder"),
    ]  # fmt: skip
    for argv, sentence in cases:
        assert evaluate.main(argv) == 2, argv
        said = capsys.readouterr()
        assert re.search(sentence, said.err) and said.out == "" and "Traceback" not in said.err, (
            argv,
            said.err,
        )
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(compare, "find_spec", lambda name: None if name == "statsmodels" else name)
    assert evaluate.main([*of_run, *new]) == 2
    assert "needs statsmodels, which is not installed: pip install 'mass[eval]'" in capsys.readouterr().err
