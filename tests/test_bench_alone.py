"""meta_bench's rows that take the tasks of the real batch one after another."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
sys.path.insert(0, str(LAUNCH))

import meta_bench_gradients as gradients  # noqa: E402
import meta_bench_methods as methods  # noqa: E402

methods.SHAPES["slim"] = methods.SHAPES["SmolLM2-135M"] | {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def case(**changes: Any) -> dict[str, Any]:
    common = {"case": "real", "examples": 3, "K": 2, "tokens": 16, "tasks": 2, "layers": 2}
    return common | {"device": "cpu", "dtype": "fp32", "init": True, "shape": "slim"} | changes


@pytest.mark.parametrize("engine", gradients.ALONE)
def test_one_by_one_is_the_same_gradient(engine: str) -> None:
    both = [methods.METHODS[engine](methods.build(case(engine=engine, at_once=n))) for n in (1, 2)]
    alone, together = both
    assert alone.init is not None and together.init is not None
    assert torch.allclose(alone.weight_TN, together.weight_TN, rtol=1e-4, atol=1e-7)
    assert gradients.distance(list(alone.init.values()), list(together.init.values())) < 1e-4
    assert alone.seconds.keys() == together.seconds.keys()


def test_one_by_one_holds_one_task_and_is_predicted_so() -> None:
    rows = [gradients.memory(case(engine="reverse", tasks=6, tokens=64, at_once=n)) for n in (1, 6)]
    assert rows[0]["predicted_gb"] < 0.4 * rows[1]["predicted_gb"]


def test_the_real_cases_have_them() -> None:
    parser = argparse.ArgumentParser()
    gradients.add_arguments(parser)
    names = [gradients.name(one) for one in gradients.cases(parser.parse_args([])) if one["case"] == "real"]
    assert {f"real/{e}/K2/tokens128/tasks8/one_by_one" for e in gradients.ALONE} <= set(names)
    assert {f"real/{e}/K2/tokens128/tasks8" for e in ("torchopt", "blockwise", "reverse")} <= set(names)
    assert len(names) == len(set(names))
