"""What another device may change: gradients, memory, text, the whole loop. Run on a machine with a GPU: pytest -m cuda."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import case, gradients, methods
from test_decode import same
from writers import build, some_adapters, some_prompts, tokens

from mass.generate import generate

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kind", ["grid", "real"])
@pytest.mark.parametrize("engine", ["reverse", "blockwise", "blockwise_kept", "finite_difference"])
def test_gradients_are_those_of_unrolling(engine: str, kind: str) -> None:
    truth = methods.unrolled(methods.build(case(case=kind, device="cuda")))
    dtype = "fp32" if engine.startswith("finite") else "fp64"
    got = methods.METHODS[engine](methods.build(case(case=kind, device="cuda", dtype=dtype)))
    assert truth.init is not None and got.init is not None
    bound = 1e-2 if engine.startswith("finite") else 1e-6
    assert gradients.distance([got.weight_TN], [truth.weight_TN]) < bound
    assert gradients.distance(list(got.init.values()), list(truth.init.values())) < bound


@pytest.mark.parametrize("engine", ["reverse", "blockwise", "blockwise_kept", "finite_difference"])
def test_memory_is_predicted_within_15_percent(engine: str) -> None:
    small = {"shape": "SmolLM2-135M", "dtype": "fp32", "device": "cuda", "init": False, "engine": engine}
    row = gradients.memory(case(**small, layers=6, examples=4, tokens=64, tasks=1))
    # the workspaces of matrix products, some tens of MB, are not in the prediction
    assert row["predicted_gb"] == pytest.approx(row["peak_gb"], rel=0.15, abs=0.1)


def on_gpu(kind: str) -> Any:
    lm = build(kind)
    lm.hf.to("cuda")
    lm.device = torch.device("cuda", 0)
    return lm


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_text_is_hugging_face_s_and_a_cuda_graph_changes_nothing(kind: str) -> None:
    lm = on_gpu(kind)
    prompts = some_prompts(20)
    want = [
        lm.hf.generate(torch.tensor([p], device="cuda"), max_new_tokens=40, do_sample=False) for p in prompts
    ]
    greedy: dict[str, Any] = {"seeds": [0] * 20, "max_new_tokens": 40, "temperature": 0.0, "batch_rows": 8}
    eager = generate(lm, prompts, **greedy)
    assert tokens(eager) == [out[0, len(p) :].tolist() for out, p in zip(want, prompts, strict=True)]
    with warnings.catch_warnings():
        # a step that is not recorded says so
        warnings.simplefilter("error", UserWarning)
        assert same(generate(lm, prompts, step="cuda_graph", **greedy), eager)
    adapter = {key: x.cuda() for key, x in some_adapters(build(kind), 20).items()}
    sampled: dict[str, Any] = {"seeds": range(20), "max_new_tokens": 40, "top_p": 0.9, "adapter": adapter}
    assert same(generate(lm, prompts, step="cuda_graph", **sampled), generate(lm, prompts, **sampled))


def test_a_run_trains_and_resumes_on_a_gpu(tmp_path: Path) -> None:
    problems = tmp_path / "p.jsonl"
    lines = [{"problem": f"{a} + {b}", "answer": str(a + b)} for a in range(9) for b in range(9)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        sys.executable, str(ROOT / "launch" / "meta_train.py"), str(ROOT / "recipes" / "smoke.yaml"),
        f"problems.train={problems}", "problems.heldout_size=8", f"run.folder={tmp_path / 'run'}", "outer.steps=2",
        "generate.step=cuda_graph",
    ]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    for more in ([], ["outer.steps=3", "run.resume=auto"]):
        done = subprocess.run([*words, *more], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "smoke" / "log.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) >= 2
