"""Rows of Hugging Face datasets: from a folder, and from the hub (what is asked of it)."""

import pytest
from test_problems import texts, write

from mass.errors import MassError
from mass.problems import load_tasks


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
