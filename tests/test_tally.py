"""From rows of answers to the numbers of an evaluation."""

from typing import Any

import pytest
from scipy import stats

from mass import compare, tally


def row(score: float | None, source: str = "a", **more: Any) -> dict[str, Any]:
    return {
        "score": score,
        "source": source,
        "error": None,
        "answer": "x",
        "solution": "Answer: x",
        "flops": 10,
        "tokens": {"generated": 3, "trained": 4},
        "seconds": {"generate": 0.5, "score": 0.25, "adapt": 0.0, "answer": 0.25},
        "examples": [],
        "truth": [],
        "tries": [],
        "reference": "12",
    } | more


def test_a_table_from_rows_counted_by_hand() -> None:
    def example(weight: float | None, reason: str = "") -> dict[str, Any]:
        return {
            "weight": weight,
            "reason": reason,
            "valid": not reason,
            "problem": "1 + 1",
            "solution": "Answer: 2",
        }

    first = row(1.0, examples=[example(w) for w in (2.0, 1.0, 1.0, 0.0)] + [example(0.0, "copy")],
                truth=[[True, True, True], [False, True, True], [True, True, False], [True, False, None], None])  # fmt: skip
    second = row(0.5, examples=[example(0.5), example(3.5), example(None)],
                 truth=[[True, True, True], [False, False, False], [True, True, True]])  # fmt: skip
    answers = {
        "none": [row(0.0), row(1.0), row(None, "b"), row(0.0, "b", answer=None)],
        "vote": [
            row(0.0, tries=[0.0, 1.0, 0.0, 0.0], vote_rules={"rows": True, "one": None, "generous": True}),
            row(1.0, tries=[1.0, 1.0, None], vote_rules={"rows": None, "one": None, "generous": True}),
            row(1.0, "b", tries=[1.0, 1.0, 1.0]),
            row(0.0, "b", error="too long", answer=None),
        ],
        "mass": [first, second, row(1.0, "b"), row(1.0, "b")],
    }
    found = tally.results(answers, trained=lambda row: row["source"] == "a")
    none, vote, mass = found["arms"]
    assert [arm["right"] for arm in found["arms"]] == [1, 2, 3] and mass["accuracy"] == 0.75
    assert mass["score"] == pytest.approx((1 + 0.5 + 1 + 1) / 4) and mass["interval"] == compare.interval(
        [1, 0, 1, 1]
    )
    # by all subsets of 1, 2 and 3 tries; the problem that failed has none right
    at = [(1 / 4 + 2 / 3 + 1) / 4, (3 / 6 + 3 / 3 + 1) / 4, (3 / 4 + 1 + 1) / 4]
    assert vote["tries"] == {"least": 3, "most": 4, "any": 0.75, "at": pytest.approx(at)}
    assert none["tries"] is None is mass["tries"] and none["vote_rules"] is None
    # where a rule says nothing the answer itself counts
    interval = compare.interval([1, 1, 1, 0])
    wanted = {"accuracy": 0.75, "interval": interval}
    assert vote["vote_rules"] == {"rows": wanted, "generous": wanted}
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
    a, b = ({key: x for key, x in of.items() if key != "states_answer"} for of in found["sources"])
    assert a == {"source": "a", "trained": True, "problems": 2, "right": {"none": 1, "vote": 1, "mass": 1}}
    assert b == {"source": "b", "trained": False, "problems": 2, "right": {"none": 0, "vote": 1, "mass": 2}}
    pairs = found["comparisons"]
    assert [(x["arm"], x["against"]) for x in pairs] == [
        ("vote", "none"),
        ("mass", "none"),
        ("mass", "vote"),
    ]
    assert [(x["won"], x["lost"], x["p"]) for x in pairs] == [(1, 0, 1.0), (3, 1, 0.625), (2, 1, 1.0)]
    assert [x["p_holm"] for x in pairs] == compare.holm([x["p"] for x in pairs])


def test_the_last_number_of_an_answer_in_whatever_form() -> None:
    answers = {
        "none": [row(0.0, solution="= 12"), row(0.0, solution="12"), row(1.0, "b", reference="cat")],
        "mass": [
            row(1.0, solution="Answer: 12"),
            row(1.0, solution="Answer: 12 (not 13)"),
            row(0.0, "b", reference="cat"),
        ],
    }
    found = tally.results(answers)
    assert [(x["right"], x["by_last_number"]) for x in found["arms"]] == [(1, 1.0), (2, pytest.approx(1 / 3))]
    by_number = tally.results(answers, count="last-number")
    assert [x["right"] for x in by_number["arms"]] == [3, 1] and by_number["count"] == "last-number"
    (pair,) = by_number["comparisons"]
    assert (pair["won"], pair["lost"]) == (0, 2) and by_number["sources"][0]["right"] == {
        "none": 2,
        "mass": 1,
    }
    words = tally.results({"none": [row(1.0, "b", reference="cat")]})
    assert words["arms"][0]["by_last_number"] is None


def test_examples_that_state_the_answer_of_their_target() -> None:
    def rows(reference: str, *texts: str, score: float = 0.0, source: str = "a") -> dict[str, Any]:
        made = [
            {"weight": 1.0, "reason": "", "valid": True, "problem": x, "solution": "So: ..."} for x in texts
        ]
        return row(score, source, reference=reference, examples=made, truth=[None] * len(made))

    right = rows("82", "9 + 73 = 82", "82", "(82) apples", "It is 82.", score=1.0)
    other = rows("82", "182", "820", "82.5", "8,282", "-82", "82,000", "x82", "4.82")
    wrong = rows("-4", "2 - 6 = -4", "10-4")
    words = rows("a+ (b)", "A+ (B)", "a+ (b)c", source="b", score=1.0)
    found = tally.results({"none": [row(0.0)] * 4, "mass": [right, other, wrong, words]})
    none, mass = found["arms"]
    assert none["states_answer"] is None
    # tries are answers of its own, and no practice
    tries = tally.results({"vote": [right | {"tries": [1.0] * 4}]})
    assert tries["arms"][0]["states_answer"] is None and tries["sources"][0]["states_answer"] == {}
    assert mass["states_answer"] == {"examples": 6, "problems": 3, "right": 2, "right_others": 0}
    a, b = (x["states_answer"] for x in found["sources"])
    assert a == {"mass": {"examples": 5, "problems": 2, "right": 1, "right_others": 0}}
    assert b == {"mass": {"examples": 1, "problems": 1, "right": 1, "right_others": 0}}
    other["examples"][0] |= {"problem": "82", "valid": False, "reason": "copy"}
    assert tally.results({"mass": [other]})["arms"][0]["states_answer"]["examples"] == 0


def test_a_choice_among_tries_that_state_nothing_has_no_last_number() -> None:
    """A vote has no text then, and cannot be counted as the other arms are."""
    said = [row(0.0, solution="= 12", answer=None), row(1.0, solution="Answer: 12")]
    chosen = [
        row(0.0, solution="", answer=None, tries=[0.0, 0.0]),
        row(1.0, solution="Answer: 12", tries=[1.0]),
    ]
    found = tally.results({"none": said, "vote": chosen, "mass": said}, count="last-number")
    none, vote, _ = found["arms"]
    assert (none["accuracy"], none["by_last_number"]) == (1.0, 1.0)
    assert (vote["accuracy"], vote["by_last_number"]) == (0.5, None)
    assert [(x["arm"], x["against"]) for x in found["comparisons"]] == [("mass", "none")]
    stated = tally.results({"none": said, "vote": chosen, "mass": said})
    assert {x["against"] for x in stated["comparisons"]} == {"none", "vote"}
    # where every choice has a text, or no reference is a number, all are compared
    whole = tally.results({"none": said, "vote": chosen[1:] * 2, "mass": said}, count="last-number")
    words = tally.results(
        {"none": [row(1.0, reference="x")], "vote": [row(0.0, reference="x")]}, count="last-number"
    )
    assert len(whole["comparisons"]) == 3 and len(words["comparisons"]) == 1
