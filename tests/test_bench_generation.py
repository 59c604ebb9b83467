"""launch/meta_bench.py generation: every engine does the work that its row says."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
sys.path.insert(0, str(LAUNCH))

import meta_bench_generation as bench  # noqa: E402

from mass import model  # noqa: E402

CASE: dict[str, Any] = {
    "model": "tiny:llama",
    "dtype": "fp32",
    "device": "cpu",
    "batch": 6,
    "samples": 3,
    "new_tokens": 5,
    "adapters": 0,
    "top_p": 0.9,
    "threads": 1,
    "check": False,
}


@pytest.mark.parametrize(("engine", "adapters"), [("ours", 0), ("ours", 2), ("hf", 0), ("floor", 0)])
def test_an_engine_makes_the_tokens_that_it_counts(engine: str, adapters: int, monkeypatch: Any) -> None:
    rows: list[int] = []
    made = model.tiny

    def watched(*args: Any, **changes: Any) -> Any:
        hf, tokenizer = made(*args, **changes)
        hf.lm_head.register_forward_hook(lambda _, __, out: rows.append(out[..., 0].numel()))
        return hf, tokenizer

    monkeypatch.setattr(model, "tiny", watched)
    run = bench.ENGINES[engine][0](CASE | {"engine": engine, "adapters": adapters})
    assert run(5) == 6 * 5
    # one token of each row in each of five steps passes the head, whatever else an engine does
    assert rows == [6] * 5


@pytest.mark.parametrize(("device", "waits"), [("cpu", False), ("cuda", True)])
def test_a_gpu_has_done_its_work_when_the_time_is_taken(device: str, waits: bool, monkeypatch: Any) -> None:
    done: list[str] = []

    def engine(case: dict[str, Any]) -> bench.Run:
        return lambda new: done.append(f"run {new}") or new

    monkeypatch.setitem(bench.ENGINES, "floor", (engine, None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(done.append("clock") or len(done)))
    bench.measure(CASE | {"engine": "floor", "device": device})
    steps = ["run 4", "wait", "clock", "run 5", "wait", "clock"]
    assert done == [step for step in steps if waits or step != "wait"]


def test_ours_runs_with_one_adapter_a_prompt_and_every_layer_is_in_the_floor(monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(bench, "generate", lambda lm, rows, **how: seen.update(how, rows=rows) or [])
    bench.ours(CASE | {"engine": "ours", "adapters": 2})(5)
    sizes = {tensor.shape[0] for tensor in seen["adapter"].values()}
    assert (
        sizes == {2}
        and seen["adapter_index"] == [0, 0, 0, 1, 1, 1]
        and seen["top_p"] == 0.9
        and seen["batch_rows"] == 6 == len(seen["rows"])
    )
    assert [row == seen["rows"][0] for row in seen["rows"]] == [True] * 3 + [False] * 3
    assert {len(row) for row in seen["rows"]} == {bench.PROMPT}
    calls: list[torch.nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, _, __: calls.append(m))
    try:
        bench.floor(CASE)(1)
    finally:
        handle.remove()
    # q, k, v, o, gate, up and down of two layers, and the head; each once
    assert len(calls) == len(set(map(id, calls))) == 2 * 7 + 1


def test_there_are_as_many_adapters_as_prompts() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    cases = bench.cases(parser.parse_args(["--batch", "1", "16", "--new-tokens", "48"]))
    told = {(case["batch"], case["samples"], case["adapters"]) for case in cases if case["engine"] == "ours"}
    assert told == {(1, 1, 0), (1, 1, 1), (16, 1, 0), (16, 1, 16), (16, 8, 0), (16, 8, 2)}
    assert len({bench.name(case) for case in cases}) == len(cases)


def test_ratios_are_to_the_rows_of_the_same_batch_and_length() -> None:
    def row(engine: str, batch: int, speed: float, adapters: int = 0) -> dict[str, Any]:
        more = {"engine": engine, "batch": batch, "adapters": adapters, "tokens_per_second": speed}
        return CASE | more

    rows = [
        row("ours", 6, 30),
        row("ours", 6, 27, 2),
        row("hf", 6, 10),
        row("floor", 6, 60),
        row("ours", 1, 9),
    ]
    first, adapted, hf, _, lonely = bench.finish([*rows, CASE | {"engine": "vllm", "error": "broken"}])[:5]
    assert (first["over_hf"], first["over_floor"]) == (3.0, 0.5) and "over_plain" not in first
    assert (adapted["over_hf"], adapted["over_floor"], adapted["over_plain"]) == (2.7, 0.45, 0.9)
    assert "over_hf" not in hf and lonely["over_hf"] is None


def test_the_command_writes_the_rows(tmp_path: Path) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    words = ["generation", "--model", "tiny:llama", "--dtype", "fp32", "--rounds", "1", "--batch", "2"]
    words += ["--samples", "1"]
    words += ["--new-tokens", "3", "--cases", "ours/*/adapters", "--json", str(file), "--plot", str(picture)]
    command = [sys.executable, str(LAUNCH / "meta_bench.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    told = [(row["engine"], row["batch"], row["new_tokens"], row["adapters"]) for row in rows]
    assert told == [("ours", 2, 3, 2)]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
