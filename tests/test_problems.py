import configparser
import io
import json
import re
import sys
import typing
from collections import Counter
from pathlib import Path

import pytest

from mass import problems, rewards
from mass.errors import MassError
from mass.problems import BadLine, Problem, Task, load_problems, load_tasks, text_problem
from mass.schema import KEYS


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def toy(count, start=0, text="What is {} + 1?"):
    return [
        Task(Problem(f"p{i}", text.format(i)), str(i + 1), f"Answer: {i + 1}", "toy", "numeric")
        for i in range(start, start + count)
    ]


def texts(tasks):
    return [task.problem.text for task in tasks]


# JSONL for training


def test_jsonl_rows_become_tasks(tmp_path):
    path = write(
        tmp_path / "sums.jsonl",
        [
            {
                "problem": " 1 + 1? ",
                "answer": 2,
                "solution": "One more than one is 2.",
                "id": "a",
                "extra": [1],
            },
            "",
            {"problem": "Sky?", "answer": "Blue", "source": "colours"},
            {"problem": "Root of 2?", "answer": "\\sqrt{2}", "solution": "It is $\\boxed{\\sqrt{2}}$."},
            {
                "problem": "Pair",
                "answer": "1\n2",
                "demonstrations": [["x", "y"], {"input": "u", "output": "v"}],
            },
        ],
    )
    first, sky, root, pair = load_tasks(path)
    assert first == Task(
        Problem("a", "1 + 1?"), "2", "One more than one is 2.\nAnswer: 2", "sums", "numeric", None
    )
    assert (sky.source, sky.verifier, sky.solution) == ("colours", "exact", "Answer: Blue")
    assert len(sky.problem.id) == 16 and sky.problem.id == problems.content_key("SKY?  ")
    assert (root.verifier, root.solution) == ("math", "It is $\\boxed{\\sqrt{2}}$.")
    assert pair.problem.demonstrations == (("x", "y"), ("u", "v"))
    assert [rewards.find_answer(task.solution) for task in (first, sky, root, pair)] == [
        *("2", "Blue", "\\sqrt{2}", "1\n2"),
    ]


def test_a_problem_has_no_place_for_an_answer():
    assert set(Problem.__dataclass_fields__) == {"id", "text", "demonstrations", "grids"}


def test_columns_of_gsm8k_and_math_as_on_the_hub(tmp_path):
    gsm = write(
        tmp_path / "gsm.jsonl",
        [{"question": "Eggs?", "answer": "16 - 7 = <<16-7=9>>9 eggs, 9 * 2 = $<<9*2=18>>18.\n#### 1,018"}],
    )
    (task,) = load_tasks(gsm, columns={"problem": "question"})
    assert (task.answer, task.verifier) == ("1,018", "numeric")
    assert task.solution == "16 - 7 = 9 eggs, 9 * 2 = $18.\nAnswer: 1,018"
    math = write(
        tmp_path / "math.jsonl",
        [{"problem": "Half?", "solution": "So $\\boxed{\\frac{x}{2}}$.", "level": "Level 1"}],
    )
    (task,) = load_tasks(math)
    assert (task.answer, task.verifier, task.solution) == (
        "\\frac{x}{2}",
        "math",
        "So $\\boxed{\\frac{x}{2}}$.",
    )
    (task,) = load_tasks(math, verifier="exact")
    assert task.verifier == "exact"


@pytest.mark.parametrize(
    "answer, solution, want",
    [
        ("2+5 is 7. The answer is 7.", None, ("7", "2+5 is 7. The answer is 7.")),
        ("thus \\boxed{72}", None, ("72", "thus \\boxed{72}")),
        ("steps #### 72", "own steps", ("72", "own steps\nAnswer: 72")),
        ("#### 72", None, ("72", "Answer: 72")),
        ("blue", None, ("blue", "Answer: blue")),
    ],
)
def test_an_answer_that_is_stated_in_a_text_is_what_is_asked_for(tmp_path, answer, solution, want):
    (task,) = load_tasks(
        write(tmp_path / "t.jsonl", [{"problem": "p", "answer": answer, "solution": solution}])
    )
    assert (task.answer, task.solution) == want
    assert rewards.Verifier().verify(f"So. Answer: {task.answer}", task).score == 1
    assert rewards.find_answer(task.solution) == task.answer


def test_every_bad_training_line_is_counted_and_the_first_five_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"problem": "p", "answer": "a"}).encode()
    lines = [
        good,
        b"{not json",
        b'{"problem": "p"}',
        b'{"problem": "\xff", "answer": "a"}',
        b'["p", "a"]',
        b'{"problem": "", "answer": "a"}',
        b'{"problem": "p", "answer": ["a"]}',
        b'{"problem": "p \\ud800", "answer": "a"}',
        b"[" * 100_000,
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(MassError) as raised:
        load_tasks(str(path))
    message = str(raised.value)
    assert message.startswith("8 lines of ") and "and 3 more" in message
    for line, words in (
        (2, "not JSON"),
        (3, "no 'answer'"),
        (4, "not UTF-8"),
        (5, "list"),
        (6, "no 'problem'"),
    ):
        assert f"bad.jsonl:{line}: " in message and words in message
    assert "bad.jsonl:7" not in message
    for line in lines[6:]:
        path.write_bytes(line)
        with pytest.raises(MassError, match="bad.jsonl:1: .*(not text|surrogate|not JSON)"):
            load_tasks(str(path))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"source": "nowhere/file.jsonl"}, "no problem file nowhere/file.jsonl"),
        ({"source": "chain_sum"}, "'chain_sum' is neither .* nor gym:NAME"),
        ({"source": []}, "problems.train"),
        ({"source": "a.jsonl", "verifier": "maths"}, "problems.verifier='maths'"),
        ({"source": "a.jsonl", "columns": {"question": "q"}}, "problems.columns has no key 'question'"),
        ({"source": ["a.jsonl", "b.jsonl"], "weights": [1]}, "problems.weights"),
        ({"source": ["a.jsonl", "b.jsonl"], "weights": [0, 0]}, "problems.weights"),
    ],
)
def test_a_mistake_in_the_settings_is_one_clear_sentence(arguments, words):
    with pytest.raises(MassError, match=words):
        load_tasks(**arguments)


def test_a_verifier_is_a_choice_and_its_package_an_extra_that_make_env_installs():
    root = Path(__file__).parent.parent
    assert typing.get_args(KEYS["problems.verifier"].hint) == ("auto", *rewards.KINDS)
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    installed = re.search(r"-e '\.\[(.*)\]'", (root / "Makefile").read_text()).group(1).split(",")
    for kind, package in rewards._PACKAGE.items():
        assert kind in rewards.KINDS and kind in installed
        assert package in setup["options.extras_require"][kind].replace("-", "_")


def test_unusable_files(tmp_path):
    with pytest.raises(MassError, match="holds no problem"):
        load_tasks(write(tmp_path / "empty.jsonl", ["", " "]))
    words = write(tmp_path / "words.jsonl", [{"problem": "p", "answer": "word"}])
    with pytest.raises(MassError, match="words.jsonl:1: .*'word' is not a number"):
        load_tasks(words, verifier="numeric")
    with pytest.raises(MassError, match="gym:NAME source"):
        load_tasks(words, verifier="gym")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(MassError, match="folder.jsonl cannot be read"):
        load_tasks(str(tmp_path / "folder.jsonl"))


def test_a_slice_of_a_split_is_of_a_files_lines_too(tmp_path):
    """`problems.train=mine.jsonl` in the place of a data set that a recipe takes `train[:1000]` of."""
    file = write(
        tmp_path / "t.jsonl", ["", *({"problem": f"p{i}", "answer": "1"} for i in range(10)), "no row"]
    )

    def picked(split):
        return "".join(text[1:] for text in texts(load_tasks(file, split=split)))

    assert picked("train[:3]") == picked("test[:3]") == "012"
    assert (picked("train[4:-5]"), picked("train[:27%]")) == ("45", "012")
    assert picked("train[:2]+train[8:10]") == "0189"
    # lines that are not asked for are not read
    assert picked("train[:10]") == "0123456789"
    for split in ("train", "test", "train[:1000]"):
        with pytest.raises(MassError, match="t.jsonl:12: not JSON"):
            picked(split)
    for split, words in (
        ("train[:2]+test[:2]", 'Unknown split "test"'),
        ("train[:x]", "Unrecognized instruction format"),
        ("train[90:]", "picks none of the 11 lines"),
    ):
        with pytest.raises(MassError, match=words) as raised:
            picked(split)
        assert f"problems.split or problems.heldout_split is {split!r}" in str(raised.value)


def test_ids_are_unique_over_a_mixture(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"problem": f"a{i}", "answer": "1", "id": i % 2} for i in range(4)])
    two = write(tmp_path / "two.jsonl", [{"problem": f"b{i}", "answer": "1", "id": i} for i in range(3)])
    tasks = load_tasks([one, two])
    assert len(tasks) == 7 and len({task.problem.id for task in tasks}) == 7
    assert [task.problem.id for task in tasks[:2]] == ["0", "1"]


def test_weights_share_out_the_size(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"problem": f"a{i}", "answer": "1"} for i in range(10)])
    two = write(tmp_path / "two.jsonl", [{"problem": f"b{i}", "answer": "1"} for i in range(10)])
    tasks = load_tasks([one, two], size=8, weights=[3, 1], seed=1)
    assert Counter(task.source for task in tasks) == {"one": 6, "two": 2}
    assert texts(tasks) == texts(load_tasks([one, two], size=8, weights=[3, 1], seed=1))
    assert texts(tasks) != texts(load_tasks([one, two], size=8, weights=[3, 1], seed=2))
    with pytest.raises(MassError, match="asks for 15 problems of .*one.jsonl, which has 10"):
        load_tasks([one, two], size=20, weights=[3, 1])
    assert problems._shares(10, [1, 1, 1]) == [4, 3, 3]


# Test time


def test_bad_lines_of_test_time_are_records_and_the_others_stay(tmp_path):
    path = tmp_path / "ask.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"problem": "1 + 1?", "answer": "2", "id": "q"}\r\n'
        b"\n"
        b"{oops\n"
        b'{"problem": "\xff"}\n'
        b'{"answer": "2"}\n'
        b'{"problem": "p", "demonstrations": [["a", "b", "c"]]}\n'
        b'{"problem": "p", "demonstrations": [["a", 1]]}\n'
        b'{"problem": "p", "demonstrations": 3}\n'
        b'{"problem": "2 + 2?", "id": "q", "demonstrations": [{"input": "1", "output": "2"}, ["3", "4"]]}'
    )
    found = load_problems(str(path))
    assert found[0] == Problem("q", "1 + 1?")
    assert found[-1] == Problem("q#2", "2 + 2?", (("1", "2"), ("3", "4")))
    bad = found[1:-1]
    assert all(isinstance(item, BadLine) for item in bad) and [item.line for item in bad] == [
        3,
        4,
        5,
        6,
        7,
        8,
    ]
    assert bad[0].text == "{oops" and "not JSON" in bad[0].reason
    assert "not UTF-8" in bad[1].reason and "no 'problem'" in bad[2].reason
    assert all("demonstrations" in item.reason for item in bad[3:])


def test_columns_of_a_recipe_are_those_of_test_time_too(tmp_path):
    path = tmp_path / "ask.jsonl"
    rows = [
        {"question": "1?", "uid": "a", "gold": "1"},
        {"problem": "2?", "id": "b", "answer": "2"},
        {"text": "3?"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"problem": "question", "id": "uid", "answer": "gold"}
    one, two, bad = load_problems(str(path), columns=columns)
    assert (one, two) == (Problem("a", "1?"), Problem("b", "2?")) and bad.reason == "no 'question'"
    # an answer is read where the problem is set aside, whatever its column is called
    (left,) = load_problems(write(path, rows[:2]), columns=columns, demonstrations=1)
    assert left.demonstrations in ((("1?", "1"),), (("2?", "2"),))


def test_standard_input_is_json_lines_or_one_problem(monkeypatch):
    def given(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return load_problems("-")

    assert [item.text for item in given(b'{"problem": "a"}\n{"problem": "b"}\n')] == ["a", "b"]
    assert [item.text for item in given("Was ist\n4 + 3 \u00f7 1?\n".encode())] == [
        "Was ist\n4 + 3 \u00f7 1?"
    ]
    with pytest.raises(MassError, match="standard input is empty"):
        given(b" \n")
    with pytest.raises(MassError, match="not UTF-8"):
        given(b"\xff")


def test_test_time_mistakes(tmp_path):
    with pytest.raises(MassError, match="no problem file"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(MassError, match="is empty"):
        load_problems(write(tmp_path / "empty.jsonl", [""]))
    with pytest.raises(MassError, match="no 'problem'"):
        text_problem("  ")
    assert text_problem(" What is 4 + 3? ").text == "What is 4 + 3?"
