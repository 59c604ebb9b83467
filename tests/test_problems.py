import io
import json
import logging
import sys
from collections import Counter

import pytest

from mass import problems, rewards
from mass.errors import MassError
from mass.problems import BadLine, Problem, Task, load_problems, load_tasks, text_problem
from mass.splits import Cursor, draw_pool, split_tasks


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


# Hugging Face datasets, from a folder


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    folder.mkdir()
    rows = [{"question": f"{i} + 1?", "answer": f"So.\n#### {i + 1}"} for i in range(3)]
    write(folder / "train.jsonl", rows)
    datasets.Dataset.from_list(rows[:1]).to_parquet(folder / "test.parquet")
    return folder


def test_a_dataset_by_columns_and_split(hub_folder):
    (hub_folder / "test.parquet").unlink()
    tasks = load_tasks(str(hub_folder), columns={"problem": "question"})
    assert texts(tasks) == ["0 + 1?", "1 + 1?", "2 + 1?"]
    assert tasks[2].answer == "3" and tasks[2].source == "sums" and tasks[2].solution == "So.\nAnswer: 3"
    with pytest.raises(
        MassError, match="no column 'problem'; it has question, answer.*problems.columns.problem"
    ):
        load_tasks(str(hub_folder))
    with pytest.raises(MassError, match="split 'validation'.*problems.split"):
        load_tasks(str(hub_folder), split="validation", columns={"problem": "question"})


def test_a_dataset_of_parquet_and_its_bad_rows(hub_folder):
    (hub_folder / "train.jsonl").unlink()
    (task,) = load_tasks(str(hub_folder), split="test", columns={"problem": "question"})
    assert task.answer == "1"
    with pytest.raises(MassError, match=r"(?s)1 row of .*sums:0: no 'level'"):
        load_tasks(str(hub_folder), split="test", columns={"problem": "question", "answer": "level"})


def test_a_hub_id_is_passed_on_with_its_config(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"problem": "p", "answer": "1"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (task,) = load_tasks("owner/name:main", split="train[:1]")
    assert asked == [(("owner/name", "main"), {"split": "train[:1]"})]
    assert task.source == "name"

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(MassError, match="owner/name.*ConnectionError: no route. Check .*network"):
        load_tasks("owner/name")


# reasoning-gym

ONE_DIGIT = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


@pytest.fixture
def gym():
    return pytest.importorskip("reasoning_gym")


def test_gym_tasks(gym):
    tasks = load_tasks("gym:chain_sum", size=20, gym=ONE_DIGIT, seed=3)
    assert texts(tasks) == texts(load_tasks("gym:chain_sum", size=20, gym=ONE_DIGIT, seed=3))
    assert len(set(texts(tasks))) == 20
    task = tasks[0]
    name, stream, index = task.problem.id.rsplit("-", 2)
    row = gym.create_dataset("chain_sum", seed=int(stream), size=1, **ONE_DIGIT["chain_sum"])[int(index)]
    assert task.problem.text == row["question"] and task.answer == row["answer"] and name == "chain_sum"
    assert task.entry == {**row, "settings": ONE_DIGIT["chain_sum"]}
    assert (task.source, task.verifier, task.solution) == ("chain_sum", "gym", f"Answer: {row['answer']}")


def test_gym_mixture(gym):
    source = ["gym:chain_sum", "gym:gcd"]
    assert Counter(task.source for task in load_tasks(source, size=9)) == {"chain_sum": 5, "gcd": 4}
    assert Counter(task.source for task in load_tasks(source, size=9, weights=[1, 2])) == {
        "chain_sum": 3,
        "gcd": 6,
    }
    assert {task.verifier for task in load_tasks(source, size=4, verifier="numeric")} == {"numeric"}


def test_neighbouring_seeds_and_other_splits_make_other_problems(gym):
    # Row i of a family comes from Random(seed + i): seeds 0 and 1 would share all problems but one.
    train = set(texts(load_tasks("gym:chain_sum", size=100, seed=0)))
    assert len(train & set(texts(load_tasks("gym:chain_sum", size=100, seed=1)))) < 5
    assert len(train & set(texts(load_tasks("gym:chain_sum", size=100, seed=0, split="test")))) < 5


def test_a_small_family_gives_what_it_has_and_shares_it(gym, caplog):
    with caplog.at_level(logging.WARNING):
        train = load_tasks("gym:chain_sum", size=1000, gym=ONE_DIGIT)
    assert 150 < len(train) < 250 and f"{len(train)} different problems of the 1000" in caplog.text
    heldout = load_tasks("gym:chain_sum", size=100, gym=ONE_DIGIT, split="test")
    split = split_tasks(train, heldout, 100, seed=0)
    assert not set(texts(split.train)) & set(texts(split.heldout))
    assert len(train) // 4 - 5 <= len(split.heldout) <= len(train) // 4 + 1
    assert len(split.train) + len(split.heldout) >= len(train) and split.removed == len(train) - len(
        split.train
    )


def test_a_large_family_keeps_its_whole_heldout_set(gym):
    train = load_tasks("gym:basic_arithmetic", size=30)
    split = split_tasks(train, load_tasks("gym:basic_arithmetic", size=30, split="test"), 30, seed=0)
    assert (len(split.train), len(split.heldout), split.removed) == (30, 30, 0)


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("chian_sum", {}, "no family 'chian_sum'; the nearest is 'chain_sum'"),
        ("chain_sum", {"chain_smu": {}}, "no family 'chain_smu'; the nearest is 'chain_sum'"),
        ("chain_sum", {"chain_sum": {"min_term": 2}}, "no setting 'min_term'; the nearest is 'min_terms'"),
        ("chain_sum", {"chain_sum": {"seed": 2}}, "problems.gym.chain_sum.seed is set by run.seed"),
        (
            "chain_sum",
            {"chain_sum": {"min_terms": 9, "max_terms": 2}},
            "max_terms must be >= min_terms.*problems.gym",
        ),
        ("chain_sum", {"chain_sum": {"min_terms": "x"}}, "gym:chain_sum cannot make problem 0 with"),
        ("graph_color", {}, "no reference answers"),
        ("composite", {}, "no family 'composite'"),
    ],
)
def test_gym_mistakes(gym, name, settings, words):
    with pytest.raises(MassError, match=words):
        load_tasks(f"gym:{name}", gym=settings, size=3)


def test_gym_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MassError, match=r"pip install 'mass\[gym\]'"):
        load_tasks("gym:chain_sum")


# Splits


def test_heldout_split_off_train_is_disjoint_seeded_and_free_of_the_files_order():
    tasks = toy(100)
    split = split_tasks(tasks, None, 10, seed=0)
    assert (len(split.train), len(split.heldout), split.removed) == (90, 10, 0)
    assert not set(texts(split.train)) & set(texts(split.heldout))
    again = split_tasks(tasks[::-1], None, 10, seed=0)
    assert texts(again.heldout) == texts(split.heldout)
    assert texts(split_tasks(tasks, None, 10, seed=1).heldout) != texts(split.heldout)
    assert len(split_tasks(tasks, None, 80, seed=0).heldout) == 25
    assert len(split_tasks(tasks[:2], None, 80, seed=0).heldout) == 1
    assert split_tasks(tasks[:1], None, 0, seed=0).heldout == []
    with pytest.raises(MassError, match="problems.heldout"):
        split_tasks(tasks[:1], None, 1, seed=0)


def test_repeated_training_problems_count_once_and_never_cross_the_split():
    tasks = toy(20) + toy(20, text="WHAT is  {} +\n1?")
    tasks = [
        Task(Problem(f"id{i}", t.problem.text), *list(vars(t).values())[1:]) for i, t in enumerate(tasks)
    ]
    split = split_tasks(tasks, None, 5, seed=0)
    assert (len(split.train), len(split.heldout), split.removed) == (15, 5, 20)
    keys = [{problems.content_key(text) for text in texts(part)} for part in split[:2]]
    assert not keys[0] & keys[1]


def test_what_a_heldout_source_shares_leaves_train():
    train, heldout = toy(20), toy(10, start=15, text="what is {} + 1? ")
    split = split_tasks(train, heldout, 3, seed=0)
    assert texts(split.heldout) == texts(heldout)
    assert texts(split.train) == texts(train[:15]) and split.removed == 5
    assert not {t.problem.id for t in split.train} & {t.problem.id for t in split.heldout}
    with pytest.raises(MassError, match="Every training problem is also held out"):
        split_tasks(train[15:], heldout, 3, seed=0)


def test_draw_pool():
    tasks = toy(20)
    pool, rest = draw_pool(tasks, 5, seed=0)
    assert len(pool) == 5 and sorted(texts(pool) + texts(rest)) == sorted(texts(tasks))
    assert rest == [task for task in tasks if task in rest]
    assert texts(draw_pool(tasks, 5, seed=1)[0]) != texts(pool)
    assert [len(part) for part in draw_pool(tasks[:3], 16, seed=0)] == [1, 2]
    assert [len(part) for part in draw_pool(tasks, 0, seed=0)] == [0, 20]


# The cursor


def test_ranks_together_see_what_one_rank_sees():
    tasks = toy(10)
    alone = Cursor(tasks, seed=4)
    ranks = [Cursor(tasks, seed=4) for _ in range(2)]
    for _ in range(8):
        whole = alone.next(6)
        parts = [ranks[rank].next(3, rank=rank, world=2) for rank in range(2)]
        assert parts[0] + parts[1] == whole
    assert alone.position == ranks[0].position == ranks[1].position == 48


def test_every_epoch_is_another_permutation():
    tasks = toy(10)
    cursor = Cursor(tasks, seed=4)
    epochs = [texts(cursor.next(5) + cursor.next(5)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(texts(tasks)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert texts(Cursor(tasks, seed=5).next(10)) != epochs[0]
    assert len(Cursor(tasks[:2], seed=0).next(5)) == 5


def test_the_cursor_resumes():
    tasks = toy(10)
    whole, first = Cursor(tasks, seed=4), Cursor(tasks, seed=4)
    expected = [whole.next(4) for _ in range(6)]
    got = [first.next(4) for _ in range(3)]
    second = Cursor.from_state(json.loads(json.dumps(first.state())), tasks[::-1])
    assert got + [second.next(4) for _ in range(3)] == expected
    with pytest.raises(MassError, match="10 then, 9 now"):
        Cursor.from_state(first.state(), tasks[:9])
    with pytest.raises(MassError, match="changed since the checkpoint"):
        Cursor.from_state(first.state(), toy(10, text="{}?"))


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
