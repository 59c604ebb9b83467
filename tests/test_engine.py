"""A user's own DeepSpeed file (zero.config): what it may leave open, and what it may not say."""

import json
from pathlib import Path
from typing import Any

import pytest

from mass.engine import merge, settings
from mass.errors import MassError


def merged(folder: Path, theirs: dict[str, Any], offload: bool = False) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(json.dumps(theirs))
    return merge(str(path), settings(2, 1.0, offload), 1)


@pytest.mark.parametrize("absent", ["auto", None])
@pytest.mark.parametrize(
    "put",
    [
        lambda x: {"zero_optimization": x},
        lambda x: {"zero_optimization": {"stage": x, "offload_optimizer": x, "offload_param": x}},
        lambda x: {"optimizer": x, "scheduler": x, "fp16": x, "bf16": {"enabled": x}, "amp": x},
        lambda x: {"gradient_clipping": x, "train_batch_size": x, "comms_logger": {"enabled": x}},
    ],
)
def test_auto_and_null_are_as_if_they_were_not_there(tmp_path: Path, absent: str | None, put: Any) -> None:
    for offload in (False, True):
        out = merged(tmp_path, put(absent), offload)
        assert {key: x for key, x in out.items() if x != {}} == merged(tmp_path, {}, offload)
        assert '"auto"' not in json.dumps(out) and "null" not in json.dumps(out)


def test_a_group_that_is_no_object_is_told_with_the_other_faults(tmp_path: Path) -> None:
    theirs = {"zero_optimization": 3, "fp16": True, "gradient_clipping": 5.0}
    with pytest.raises(MassError) as caught:
        merged(tmp_path, theirs)
    _, *lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines] == [
        "zero_optimization=3, where an object is wanted",
        "fp16=true, where an object is wanted",
        "gradient_clipping=5.0, where outer.clip_grad stands for 1.0",
    ]
    for offload in (False, True):
        with pytest.raises(MassError, match='zero_optimization.offload_optimizer="cpu", where an object'):
            merged(tmp_path, {"zero_optimization": {"offload_optimizer": "cpu"}}, offload)
