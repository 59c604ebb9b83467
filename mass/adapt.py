"""mass-adapt: adapt to each problem and answer it, with a run folder, a PEFT folder or a bare model.

Standard output carries the answers alone (with --json one object a line); warnings and progress go to standard error.
`plan`, `build_kit` and `adapt_problems` do the same from Python.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress

from mass import checkpoint, chooser, recipe, teacher
from mass.blocks import Split, split
from mass.choices import Guard, Kit, Knobs, Teacher
from mass.choices.guards import fisher_information
from mass.episode import answer_sampling, example_sampling
from mass.errors import MassError
from mass.forward import check_model
from mass.log import no_space
from mass.lora import LoraShape, attach, load_peft, read_peft_shape
from mass.methods import AUTO, METHODS, Record, find, solve
from mass.model import LanguageModel, language_model, load
from mass.optimizers import Rule
from mass.problems import BadLine, Problem, Task, draw_pool, load_problems, load_tasks, text_problem
from mass.prompts import make_prompts
from mass.recipe import Recipe
from mass.scorer import Scorer
from mass.view import view

# what a saved adapter and scorer were made with
FIXED = ("lora.", "scorer.layers", "scorer.hidden", "scorer.pool")


@dataclass(frozen=True)
class Plan:
    """What to load: the recipe with its overrides, and a run's step folder or a PEFT folder (neither: a bare model)."""

    recipe: Recipe
    step: Path | None = None
    peft: Path | None = None
    # tokens that a problem may cost; who writes the examples of `tt-d`: a model, or http://HOST:PORT/v1#MODEL
    budget: int | None = None
    teacher: str | None = None

    @property
    def has_pool(self) -> bool:
        """Whether there are training problems for shots and for `random`."""
        return self.step is not None or bool(_sources(self.recipe))


def plan(run: str | None, model: str | None, overrides: Sequence[str] = ()) -> Plan:
    """Find out what `--run` and `--model` name; nothing is loaded. Raises MassError for whatever is wrong with them.

    `overrides` are key=value. A run brings its recipe; all else starts from the recipe's defaults.
    """
    if run is None and model is None:
        raise MassError("name what is to adapt: --run FOLDER (of a run, or a PEFT adapter) or --model MODEL")
    folder = Path(run).expanduser() if run is not None else None
    if folder is not None and not folder.is_dir():
        raise MassError(f"--run {run}: there is no such folder. It wants a run folder, e.g. checkpoints/demo")
    if folder is not None and not (folder / "adapter_config.json").is_file():
        if model is not None:
            raise MassError("--model goes with a PEFT folder or stands alone: a run names its own model")
        _, step = checkpoint.read_run(folder)
        fixed = [text for text in overrides if text.startswith(FIXED)]
        if fixed:
            raise MassError(
                f"{fixed[0]}: the saved adapter and scorer of {run} were not made so. Leave it out."
            )
        found = recipe.load(step.parent / "recipe.yaml", overrides, training=False)
        by_hand = [text for text in overrides if text.startswith("inner.lr=")]
        if by_hand and found.inner.learned_lr != "no":
            raise MassError(
                f"{by_hand[0]}: this run learned its inner rate. Add inner.learned_lr=no to set it by hand."
            )
        return Plan(found, step=step)
    base = model or _base_of(folder) if folder is not None else model
    return Plan(_defaults(str(base), overrides), peft=folder)


def build_kit(plan: Plan) -> Kit:
    """Load the model, the policy, the scorer, the shots and the teacher that a plan names."""
    r = plan.recipe
    pool = _pool(plan)
    m = r.model
    hf, tokenizer = load(
        m.path,
        dtype=m.dtype,
        device=m.device,
        cache=m.cache,
        attention=m.attention,
        world=r.problems.world,
    )
    check_model(hf)
    # before the slots change the parameters' names
    print_of = checkpoint.fingerprint(hf.named_parameters()) if plan.step else None
    folder = plan.step / "policy" if plan.step else plan.peft
    shape = read_peft_shape(folder) if folder else LoraShape(r.lora.rank, r.lora.alpha, tuple(r.lora.targets))
    lm = LanguageModel(hf, tokenizer, attach(hf, shape), shape, m.path)
    policy, head, saved_rates = None, None, {}
    if plan.step:
        contents = checkpoint.load(plan.step, lm.lora, print_of)
        policy = contents.policy
        width = hf.config.get_text_config().hidden_size
        head = Scorer(width, len(r.scorer.layers), r.scorer.hidden).requires_grad_(False)
        head.load_state_dict(contents.scorer)
        head.to(lm.device)
        saved_rates = contents.meta.get("extra", {}).get("inner_lr", {})
    elif plan.peft:
        policy = load_peft(plan.peft, lm.lora)
    if policy is not None:
        policy = {key: tensor.to(lm.device) for key, tensor in policy.items()}
    parts = _parts(lm)
    g, i = r.generate, r.inner
    keys = [f"{name}.{kind}" for name in lm.lora for kind in "AB"]
    kit = Kit(
        lm,
        make_prompts(tokenizer, r.prompt.style, r.prompt.solve_instruction, r.prompt.generate_instruction),
        Rule(i.optimizer, i.momentum, i.beta1, i.beta2, i.eps, i.eps_root, i.clip),
        _rates(r, saved_rates, keys, parts, lm.device),
        example_sampling(r),
        answer_sampling(r, g.temperature),
        examples=g.examples,
        steps=i.steps,
        max_growth=i.max_growth,
        policy=policy,
        head=head,
        depths=r.scorer.layers,
        pool_kind=r.scorer.pool,
        temperature=r.scorer.temperature,
        pool=pool,
        solve_shots=r.prompt.solve_shots,
        generate_shots=r.prompt.generate_shots,
        parts=parts,
        recompute=i.checkpoint,
        seed=r.run.seed,
        budget=plan.budget,
        teacher=_teacher(r, plan.teacher, tokenizer) if plan.teacher else None,
        guard=Guard(**dataclasses.asdict(r.guard)),
        knobs=_knobs(r),
        chooser=chooser.load(plan.step.parent) if plan.step else None,
    )
    return dataclasses.replace(kit, fisher=fisher_information(kit)) if r.guard.fisher else kit


def _knobs(r: Recipe) -> Knobs:
    values = dataclasses.asdict(r.knobs)
    # of the teacher alone
    del values["teacher_seconds"]
    return Knobs(**values)


def _teacher(r: Recipe, name: str, tokenizer: Any) -> Teacher:
    sampling = example_sampling(r)
    if name.startswith(("http://", "https://")):
        return teacher.address(name, tokenizer, sampling, r.knobs.teacher_seconds)
    m = r.model
    other = language_model(name, None, dtype=m.dtype, device=m.device, cache=m.cache, attention=m.attention)
    check_model(other.hf)
    return teacher.local(other, make_prompts(other.tokenizer, "auto"), sampling)


def adapt_problems(
    kit: Kit, problems: Iterable[Problem | BadLine], method: str, batch: int = 8, *, baselines: bool = True
) -> Iterator[Record]:
    """`solve` on `batch` problems at a time; each record as soon as its batch is done, in order.

    A line that held no problem is a record with its error, in its place.
    """
    waiting: list[Problem | BadLine] = []

    def flush() -> Iterator[Record]:
        done = iter(solve(kit, [p for p in waiting if isinstance(p, Problem)], method, baselines=baselines))
        for item in waiting:
            yield next(done) if isinstance(item, Problem) else _unread(item, method)
        waiting.clear()

    for item in problems:
        waiting.append(item)
        if sum(isinstance(p, Problem) for p in waiting) == batch:
            yield from flush()
    yield from flush()


def as_json(record: Record) -> str:
    """One line of JSON with every field of the record; numbers that are not finite are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(dataclasses.asdict(record)), allow_nan=False)


# ---- what a plan is made of


def _defaults(model: str, overrides: Sequence[str]) -> Recipe:
    """The recipe's defaults for a model without a run: no shots unless problems.train names where they come from."""
    shots = {} if any(text.startswith("problems.train=") for text in overrides) else {"generate_shots": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "defaults.yaml"
        # test time needs no training problems, which a recipe has to name
        path.write_text(
            yaml.safe_dump({"model": {"path": model}, "problems": {"train": [""]}, "prompt": shots})
        )
        try:
            return recipe.load(path, overrides, training=False)
        except MassError as error:
            raise MassError(str(error).replace(f"{path}: ", "", 1)) from None


def _sources(r: Recipe) -> list[str]:
    return [source for source in r.problems.train if source]


def _base_of(folder: Path) -> str:
    read_peft_shape(folder)
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not base:
        raise MassError(f"{folder}/adapter_config.json names no base model: give it with --model MODEL")
    return str(base)


def _pool(plan: Plan) -> list[Task]:
    """Training problems to show: those that the run set aside, or from problems.train."""
    r = plan.recipe
    p = r.problems
    if plan.step:
        path = plan.step.parent / "shots.jsonl"
        if not path.is_file():
            if r.prompt.generate_shots or r.prompt.solve_shots:
                raise MassError(
                    f"{path} is missing, and prompts show problems from it: "
                    "restore it, or set prompt.generate_shots=0 prompt.solve_shots=0"
                )
            return []
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return [
                Task(Problem(x["id"], x["problem"]), x["answer"], x["solution"], x["source"], "exact")
                for x in rows
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise MassError(
                f"{path} is damaged ({error!r}): restore it from where the run was made"
            ) from None
    if not _sources(r):
        return []
    tasks = load_tasks(
        _sources(r),
        split=p.split,
        size=p.size,
        weights=p.weights,
        gym=p.gym,
        world=p.world,
        columns=dataclasses.asdict(p.columns),
        verifier=p.verifier,
        seed=r.run.seed,
        demonstrations=p.demonstrations,
    )
    return draw_pool(tasks, r.prompt.pool, r.run.seed)[0]


def _parts(lm: LanguageModel) -> Split | None:
    try:
        return split(lm.hf, lm.lora)
    except MassError:
        # training went without the blocks of such a model, too
        return None


def _rates(
    r: Recipe, saved: dict[str, float], keys: Sequence[str], parts: Split | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """The inner learning rate of each adapter tensor: the recipe's, or what the run learned (one, or one a block)."""

    def rate(key: str) -> float:
        if r.inner.learned_lr == "no" or not saved:
            return r.inner.lr
        blocks = parts.prefix if parts and r.inner.learned_lr == "layer" else []
        last = "rest" if blocks else "all"
        return saved[next((f"block{i}" for i, prefix in enumerate(blocks) if key.startswith(prefix)), last)]

    return {key: torch.tensor(rate(key), device=device) for key in keys}


def _unread(bad: BadLine, method: str) -> Record:
    return Record(f"line {bad.line}", bad.text, method, error=f"line {bad.line}: {bad.reason}")


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code: 0, or 2 for what the user has to mend."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv[:1]) == ["fit"]:
        # it builds on this module
        from mass import fit

        try:
            return fit.main(argv[1:])
        except MassError as error:
            print(f"mass-adapt fit: {error}", file=sys.stderr)
            return 2
    args = _parser().parse_intermixed_args(argv)
    # libraries may print: standard output is for the answers alone
    out = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            _run(args, out)
        return 0
    except MassError as error:
        print(f"mass-adapt: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # the reader has gone (head, less)
        _silence(out)
        return 0
    except OSError as error:
        if not no_space(error):
            raise
        _silence(out)
        print("mass-adapt: no space left for the answers: free some, and run the rest again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mass-adapt",
        description="Adapt to each problem and answer it. `mass-adapt fit --help`: learn which method pays (auto).",
        epilog=f"METHOD is one of {', '.join([*METHODS, AUTO])}. KEY=VALUE changes the run's recipe for this call, e.g. "
        "inner.steps=1 generate.examples=12; mass-train --help has all keys. docs/test-time.md says more.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", metavar="FOLDER", help="a run (its newest good step), one of its steps, or a PEFT adapter"
    )
    parser.add_argument(
        "--model", help="a bare model, or the base of the PEFT adapter: folder, hub id, package:..."
    )
    parser.add_argument("--problem", metavar="TEXT", help="one problem")
    parser.add_argument(
        "--file", metavar="F.jsonl", help='problems, one JSON object a line: {"problem": "..."}'
    )
    parser.add_argument("--method", help="default: mass where there is a scorer, else quest")
    parser.add_argument(
        "--budget", type=int, metavar="TOKENS", help="generated plus trained tokens that a problem may cost"
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="of tt-d: a model, or an address http://HOST:PORT/v1#MODEL"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a problem, a line each")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON lines to this new file")
    parser.add_argument("--batch", type=int, default=8, metavar="T", help="problems adapted together (8)")
    parser.add_argument(
        "--no-baselines",
        action="store_true",
        help="leave out the answers without update and by vote: less time",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="- | KEY=VALUE",
        help="-: problems from standard input; or a recipe key",
    )
    return parser


def _run(args: argparse.Namespace, out: IO[str]) -> None:
    """Everything that a user can get wrong is looked at before the model is loaded."""
    overrides = [text for text in args.settings if text != "-"]
    if args.batch < 1:
        raise MassError(f"--batch {args.batch}: it wants 1 or more")
    wanted = plan(args.run, args.model, overrides)
    method = args.method or ("mass" if wanted.step else "quest")
    find(
        method,
        has_scorer=wanted.step is not None,
        has_pool=wanted.has_pool,
        has_teacher=args.teacher is not None,
        has_chooser=wanted.step is not None and chooser.load(wanted.step.parent) is not None,
    )
    least = wanted.recipe.generate.answer_tokens
    if args.budget is not None and args.budget < least:
        raise MassError(
            f"--budget {args.budget} is less than generate.answer_tokens={least}, which one answer may take: raise it, or "
            "lower that."
        )
    problems = _problems(args, wanted.recipe)
    if args.method is None and not wanted.step:
        _say("there is no trained scorer here, so the method is quest: all examples count alike")
    torch.set_num_threads(wanted.recipe.run.threads)
    if args.out is not None and Path(args.out).exists():
        raise MassError(f"--out {args.out} exists, and nothing is overwritten: name another file")
    kit = build_kit(dataclasses.replace(wanted, budget=args.budget, teacher=args.teacher))
    with contextlib.nullcontext() if args.out is None else _new(args.out) as file:
        console = Console(file=out, highlight=False, width=None if out.isatty() else 120)
        live = Progress(
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
            redirect_stdout=False,
            redirect_stderr=False,
        )
        bar = live.add_task(method, total=len(problems))
        with live:
            for record in adapt_problems(kit, problems, method, args.batch, baselines=not args.no_baselines):
                # both may be the same terminal
                live.stop()
                line = as_json(record)
                if file:
                    file.write(line + "\n")
                    file.flush()
                if args.json:
                    print(line, file=out, flush=True)
                else:
                    console.print(view(record, console.width, console.encoding))
                live.advance(bar)
                live.start()


def _problems(args: argparse.Namespace, r: Recipe) -> list[Problem | BadLine]:
    sources = {"--problem": args.problem, "--file": args.file, "-": "-" if "-" in args.settings else None}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        found = "none of them is given" if not given else f"{' and '.join(given)} are given"
        raise MassError(f"one of --problem TEXT, --file F.jsonl and - (standard input) is wanted; {found}")
    if args.problem is not None:
        return [text_problem(args.problem)]
    return load_problems(args.file or "-", demonstrations=r.problems.demonstrations, seed=r.run.seed)


def _new(path: str) -> IO[str]:
    try:
        return open(path, "x", encoding="utf-8")
    except FileExistsError:
        raise MassError(f"--out {path} exists, and nothing is overwritten: name another file") from None
    except OSError as error:
        raise MassError(f"--out {path} cannot be written ({error.strerror}): name another file") from None


def _silence(out: IO[str]) -> None:
    """What is still in the stream's buffer goes nowhere, or Python would fail on it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _say(text: str) -> None:
    print(f"mass-adapt: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
