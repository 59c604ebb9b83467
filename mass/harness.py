"""The field's harness: `mass` as a model of lm-evaluation-harness, that adapts to each document and writes its answer.

    python -m mass.harness --model mass --model_args run=RUN,method=mass --tasks TASK,...

is `lm_eval` with this model in its registry: the harness knows no other way to a model of somebody else than that its
module has been imported. From Python, `lm_eval.simple_evaluate(model=MassLM(run=RUN), ...)`.

A document is seen through its request alone (`Instance.args`: prompt and generation settings). The row that it was made
of has the reference answer in it and is never read. docs/evaluation.md says what becomes the problem.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mass.choices import Kit
from mass.errors import MassError
from mass.filerun import Item, group, run_batches
from mass.kit import build_kit
from mass.methods import AUTO, Record
from mass.problems import as_problems
from mass.rewards import find_answer
from mass.wanted import plan, settings_key

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from tqdm import tqdm
except ModuleNotFoundError as error:
    missing = f"mass.harness needs lm-eval ({error.name} is not installed): pip install 'mass[eval]'"
    if __name__ == "__main__":
        print(missing, file=sys.stderr)
        sys.exit(2)
    raise MassError(missing) from None

_log = logging.getLogger(__name__)

# without effect on a greedy answer
IDLE = ("top_p", "top_k", "min_p", "seed")
BATCH = 16
# how a prompt in turns begins: JSON, since a harness hands on text alone
TURNS = '{"mass turns": '
_SHOWN = 3  # failed documents named in warnings


@register_model("mass")
class MassLM(LM):
    """A run, a PEFT adapter or a bare model, and one method; see the constructor's arguments.

    Answers of one call do not depend on another: nothing carries over between documents.
    """

    def __init__(
        self,
        run: str | None = None,
        model: str | None = None,
        method: str | None = None,
        *,
        batch_size: int | str = BATCH,
        device: str | None = None,
        budget: int | None = None,
        teacher: str | None = None,
        **settings: Any,
    ) -> None:
        """run, model, method, budget, teacher  as the options of mass-adapt
        batch_size                            T, documents adapted together; "auto" is 16
        device                                "cpu", or the recipe's model.device (auto: a GPU where there is one)
        settings                              recipe keys, e.g. inner.steps=1

        Raises MassError for what is wrong with them, before a model is loaded.
        """
        super().__init__()
        automatic = str(batch_size).startswith("auto")
        if not automatic and not (str(batch_size).isdecimal() and int(batch_size) > 0):
            raise MassError(f"batch_size={batch_size}: it wants 1 or more, or auto")
        # JSON is YAML: text stays text
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        # the harness names cuda:0 also where nobody asked for it: all but the CPU is left to the recipe
        overrides += ["model.device=cpu"] if device == "cpu" else []
        wanted = dataclasses.replace(
            plan(None if run is None else str(run), model, overrides), budget=budget, teacher=teacher
        )
        self.method = method or wanted.default_method
        wanted = wanted.of_method(self.method)
        self.batch = BATCH if automatic else int(batch_size)
        torch.set_num_threads(wanted.recipe.run.threads)
        # what the harness writes beside its numbers
        self._about = {
            "method": self.method,
            "run": None if wanted.step is None else str(wanted.step),
            "settings": settings_key(wanted, self.method),
        }
        self._count = dict.fromkeys(("documents", "failed", "generated", "trained"), 0)
        self.kit = build_kit(wanted)

    # ---- what the harness asks

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text of each document's answer, up to the first of its stop strings; "" for one that failed (a warning says
        why). Raises MassError for settings that no method can honour, before anything is written."""
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        wanted: dict[tuple[str, int], list[tuple[int, list[str]]]] = {}
        for i, request in enumerate(requests):
            context, given = request.args
            tokens, until = _limits(given, self.kit, self.method)
            # repeats of a document are one problem: they have one answer
            rows[context, tokens] = _row(context)
            wanted.setdefault((context, tokens), []).append((i, until))
        found = [""] * len(requests)
        failed: list[str] = []
        with tqdm(total=len(rows), desc=f"mass ({self.method})", disable=None) as bar:
            for tokens in sorted({tokens for _, tokens in rows}):
                names = [name for name in rows if name[1] == tokens]
                items = as_problems([rows[name] for name in names])
                for place, record in self._records(items, tokens):
                    failed += [] if record.error is None else [f"{record.id}: {record.error}"]
                    for i, until in wanted[names[place]]:
                        found[i] = postprocess_generated_text(record.solution, until, None)
                        # for --use_cache: an evaluation that is stopped keeps what it has
                        self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
                    bar.update()
        for reason in failed[:_SHOWN]:
            _log.warning("no answer to %s", reason)
        if failed:
            _log.warning("%d of %d documents failed and count with an empty answer", len(failed), len(rows))
        return found

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: a method answers by writing."""
        raise _no_likelihood("loglikelihood")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused: a method answers by writing."""
        raise _no_likelihood("loglikelihood_rolling")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns as they are: it is the kit that puts a problem and its demonstrations into the model's own form."""
        return f"{TURNS}{json.dumps(chat_history)}}}"

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's key for cached prompts; ours depend on no tokenizer."""
        return "mass"

    def get_model_info(self) -> dict[str, Any]:
        """Method, weights and settings, and what all documents so far have cost, for the harness's results file."""
        return {"mass": {**self._about, **self._count}}

    def _records(self, items: Sequence[Item], tokens: int) -> Iterator[tuple[int, Record]]:
        kit = dataclasses.replace(
            self.kit, answering=dataclasses.replace(self.kit.answering, max_new_tokens=tokens)
        )
        for done in run_batches(kit, items, group(items, self.batch), self.method, baselines=False):
            for place, record in done:
                self._add(record)
                yield place, record

    def _add(self, record: Record) -> None:
        self._count["documents"] += 1
        self._count["failed"] += record.error is not None
        self._count["generated"] += record.tokens.generated
        self._count["trained"] += record.tokens.trained


# ---- from a request to a problem


def _limits(given: dict[str, Any], kit: Kit, method: str) -> tuple[int, list[str]]:
    """The most tokens of an answer, and the stop strings. Raises MassError for what no method can honour."""
    wanted: Mapping[str, Any] = normalize_gen_kwargs(given, kit.answering.max_new_tokens)
    rest = dict(wanted)
    tokens, until = rest.pop("max_gen_toks"), rest.pop("until")
    temperature = rest.pop("temperature", None)
    if rest.pop("do_sample") and temperature != 0:
        raise MassError(
            f"the task wants sampled answers (do_sample=true, temperature={temperature}), and a method's answer is its own "
            "choice: --gen_kwargs do_sample=False,temperature=0 takes one answer a document"
        )
    unknown = [key for key in rest if key not in IDLE]
    if unknown:
        raise MassError(
            f"the task's generation_kwargs have {unknown[0]}={rest[unknown[0]]!r}, which has no meaning for a method. "
            f"Known are until, max_gen_toks, do_sample=false, temperature=0, and {', '.join(IDLE)} (without effect)"
        )
    if tokens < 1:
        raise MassError(f"the task's generation_kwargs have max_gen_toks={tokens}: it wants 1 or more")
    # auto brings its own along
    budget = kit.chooser.budget if method == AUTO and kit.chooser else kit.budget
    if budget is not None and budget < tokens:
        raise MassError(
            f"budget={budget} is less than the {tokens} tokens that an answer of this task may take (max_gen_toks): "
            f"raise it, or lower that with --gen_kwargs max_gen_toks={budget}"
        )
    return tokens, until


def _row(context: str) -> dict[str, Any]:
    """The problem that a prompt poses. Of turns it is the last one, below what the system's say; those before demonstrate.

    A demonstration is its question and the answer that it states. A prompt without turns is one problem, as a whole.
    """
    if not context.startswith(TURNS):
        return {"problem": context}
    (turns,) = json.loads(context).values()
    above = [turn["content"].strip() for turn in turns if turn["role"] == "system"]
    said = [turn for turn in turns if turn["role"] != "system"]
    if [turn["role"] for turn in said] != ["user", "assistant"] * (len(said) // 2) + ["user"]:
        raise MassError(
            "the task's prompt does not end in a question to which a whole answer can be written (it begins the answer by "
            "gen_prefix?): leave out --apply_chat_template, and it is read as one text"
        )
    shown = [
        [question["content"], find_answer(answer["content"]) or answer["content"]]
        for question, answer in zip(said[:-1:2], said[1::2], strict=True)
    ]
    return {"problem": "\n\n".join([*above, said[-1]["content"]]), "demonstrations": shown}


def _no_likelihood(kind: str) -> MassError:
    return MassError(
        f"{kind}: a method answers a document by writing, and gives no likelihood to a text of somebody else. Take the "
        "task's generative form (output_type: generate_until); or, without adaptation, score by the harness's own model: "
        "--model hf --model_args pretrained=BASE,peft=RUN/step_NNNNNN/policy"
    )


def main() -> int:
    """`lm_eval` with this model. Returns the exit code: 0, or 2 for what the user has to mend."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
        return 0
    except MassError as error:
        print(f"mass.harness: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
