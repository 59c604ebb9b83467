"""`mass.adapt`: adapt a model that is in memory to problems, from Python. `python -m mass.adapt` is the command."""

# Nothing is imported here but what is light: `import mass` runs this file, and the recipe, the rewards and the commands'
# --help must not wait for torch.
from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mass.methods import Record
    from mass.problems import Problem


def adapt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: str | Iterable[str | Mapping[str, Any] | Problem],
    *,
    method: str | None = None,
    run: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    batch: int = 8,
    baselines: bool = True,
) -> list[Record]:
    """Adapt to each problem and answer it; one `mass.methods.Record` a problem, in the problems' order.

    model, tokenizer  a causal language model of transformers, as it lies in memory, on any device
    problems          one text, or several texts, `mass.problems.Problem`s, or mappings like the lines of a problem file
                      ({"problem": ..., "id": ..., "demonstrations": ...})
    method            a row of docs/test-time.md; by default mass where there is a trained scorer, else quest
    run               a run folder, one of its steps, or a PEFT LoRA folder made for this model: its policy, scorer, shots
                      and settings
    settings          recipe keys, e.g. {"inner.steps": 1, "generate.examples": 6}
    batch             T, problems adapted together
    baselines         also answer without update and by vote

    The model and the tokenizer are left as they were found, bit for bit, also after an exception: weights, modules,
    modes, gradients and the flags that ask for them. A problem that cannot be used is a record with an `error`. Raises
    MassError for what is wrong with the arguments.
    """
    import json

    from mass.errors import MassError
    from mass.filerun import group, run_batches
    from mass.kit import build_kit, lent
    from mass.problems import as_problems
    from mass.wanted import plan

    if batch < 1:
        raise MassError(f"batch={batch}: it wants 1 or more")
    # JSON is YAML: text stays text
    overrides = [f"{key}={json.dumps(value)}" for key, value in (settings or {}).items()]
    items = as_problems(problems)
    with lent(model, tokenizer):
        wanted = plan(None if run is None else str(run), None, overrides, loaded=model)
        method = method or wanted.default_method
        wanted.method(method)
        kit = build_kit(wanted, (model, tokenizer))
        found: dict[int, Record] = {}
        for done in run_batches(kit, items, group(items, batch), method, baselines=baselines):
            found |= done
    return [found[place] for place in range(len(items))]
