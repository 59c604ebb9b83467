"""From a YAML file and `key=value` overrides to a checked Recipe, before anything costly starts; no torch here.

Unknown keys, wrong types and settings that contradict each other are collected and raised as one MassError.
`python -m mass.recipe > docs/recipes.md` makes the page of all keys.
"""

import argparse
import dataclasses
import difflib
import itertools
import json
import operator
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mass.contradictions import contradictions
from mass.errors import MassError
from mass.keys import Key, said
from mass.schema import GROUPS, KEYS, Recipe, keys_of


def load(path: str | Path, overrides: Sequence[str] = (), *, training: bool = True) -> Recipe:
    """The recipe of a YAML file with `key=value` overrides. Raises one MassError that lists all that is wrong.

    `training` False leaves out what only meta-training minds: test time may well use one example or one cold Adam step.
    """
    config = _unlocked(OmegaConf.structured(Recipe))
    trees = [_read(path)]
    # by the key at fault: a good override takes back what was said of the file's value
    errors: dict[str, str] = {}
    for override in overrides:
        try:
            trees.append(_parse(override))
        except MassError as fault:
            errors[override] = str(fault)
    asked: set[str] = set()
    for tree in trees:
        for name, value in _leaves(tree):
            errors.pop(name, None)
            if complaint := _assign(config, name, value):
                errors[name] = complaint
            elif name == "problems.gym" and tree is not trees[0] and isinstance(value, Mapping):
                asked |= value.keys()
    try:
        recipe = typing.cast(Recipe, OmegaConf.to_object(config))
    except OmegaConfBaseException as fault:  # an interpolation ${...} that leads nowhere
        errors[str(fault.full_key)] = f"{fault.full_key}: {str(fault.msg).partition(chr(10))[0]}."
    else:
        for key in KEYS.values():
            if key.name not in errors and (complaint := key.complaint(operator.attrgetter(key.name)(recipe))):
                errors[key.name] = complaint
        if not training:
            # a run's settings of families in whose place other problems have come
            named = {
                source.removeprefix("gym:")
                for source in [*recipe.problems.train, *(recipe.problems.heldout or [])]
            }
            for family in recipe.problems.gym.keys() - named - asked:
                del recipe.problems.gym[family]
        # nothing follows from the default that stands in for a faulty value
        said_no = contradictions(recipe, training=training)
        clashes = [text for names, text in said_no if not errors.keys() & set(names.split())]
        errors |= {text: text for text in clashes}
    if errors:
        count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
        raise MassError("\n  ".join([f"{path}: {count}", *errors.values()]))
    return recipe


def dump(recipe: Recipe) -> str:
    """YAML of every key; `load` makes the same recipe of it."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _unlocked(config: Any) -> Any:
    """Frozen dataclasses make read-only configs: lift that while one is filled in."""
    OmegaConf.set_readonly(config, False)
    for name in config:
        if OmegaConf.is_dict(config[name]):
            _unlocked(config[name])
    return config


def _read(path: str | Path) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        hint = " The recipe comes first, then key=value." if "=" in str(path) else ""
        raise MassError(f"{path}: no such recipe file.{hint}") from None
    except yaml.MarkedYAMLError as fault:
        line = f"line {fault.problem_mark.line + 1}: " if fault.problem_mark else ""
        raise MassError(f"{path}: cannot be read as YAML: {line}{fault.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as fault:
        raise MassError(f"{path}: cannot be read as YAML: {' '.join(str(fault).split())}") from None
    if not tree:
        raise MassError(f"{path}: empty. A recipe needs model.path and problems.train at least.")
    # OmegaConf reads bare text as {text: null}
    if not isinstance(tree, dict) or (list(tree.values()) == [None] and not tree.keys() & GROUPS):
        raise MassError(
            f"{path}: not a recipe. It has to be YAML: 'group:', and 'key: value' indented below it."
        )
    return typing.cast(dict[str, Any], tree)


def _parse(override: str) -> dict[str, Any]:
    name, equals, raw = override.partition("=")
    if override.startswith("-"):
        raise MassError(
            f"{override}: unknown option. A recipe key is set without dashes, e.g. inner.steps=2."
        )
    if not name or not equals:
        raise MassError(f"{override!r}: not an override. Write key=value, e.g. inner.steps=2.")
    try:
        tree = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([override])))
        if name in KEYS and _is_text(KEYS[name]):
            # YAML takes 010 for 8, 2024_01_05 for 20240105, and 7e55012 for a number without an end
            if type(OmegaConf.select(OmegaConf.create(tree), name)) in (int, float):
                return _parse(f"{name}={json.dumps(raw.strip())}")
        return tree
    except (yaml.YAMLError, OmegaConfBaseException):
        raise MassError(
            f"{override}: the value is not YAML. Text is put in quotes: {name}='\"...\"'."
        ) from None


def _is_text(key: Key) -> bool:
    """Whether a value is text, or a list of texts, and no number."""
    return any(x is str or x == list[str] for x in key.options) and not {int, float} & set(key.options)


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if isinstance(value, Mapping) and name not in KEYS and (value or name in GROUPS):
            yield from _leaves(value, name + ".")
        elif value is not None or name not in GROUPS:  # a group with all its keys commented out is fine
            yield name, value


def _assign(config: Any, name: str, value: Any) -> str | None:
    """Put a value into the structured config, or say why it does not fit."""
    if name in GROUPS:
        return f"{said(name, value)}: {name} is a group of keys. Set one of them, e.g. {keys_of(name)[0]}."
    if name not in KEYS:
        return f"{name}: unknown key. {_nearest(name)}"
    key = KEYS[name]
    if value == "???":
        return f"{name}: still to be filled in. It wants {key.wants}."
    if value is False and key.default == "no":  # YAML 1.1 reads a bare no as false
        value = "no"
    if isinstance(value, str | int | float) and any(typing.get_origin(x) is list for x in key.options):
        value = [value]
    # OmegaConf would make 'True' of true, and take a list for an item of a list
    items = value if isinstance(value, list) else [value]
    nested = isinstance(value, list) and any(isinstance(x, list | dict) for x in items)
    fits = not nested and (bool in key.options or not any(isinstance(x, bool) for x in items))
    try:
        if fits:
            OmegaConf.update(config, name, value, merge=True)
    except OmegaConfBaseException:
        fits = False
    quotes = " Text with ': ' in it needs quotes." if str in key.options and isinstance(value, dict) else ""
    return None if fits else f"{said(name, value)}: wants {key.wants}.{quotes}"


def _nearest(name: str) -> str:
    same = [known for known in KEYS if known.rpartition(".")[2] == name.rpartition(".")[2]]
    near = (
        difflib.get_close_matches(name, KEYS, n=1, cutoff=0.8)
        or same
        or difflib.get_close_matches(name, KEYS, n=1)
    )
    group = name.partition(".")[0]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    if group in GROUPS:
        return f"{group} has {', '.join(known.partition('.')[2] for known in keys_of(group))}."
    return f"The groups are {', '.join(field.name for field in dataclasses.fields(Recipe))}."


# tasks to look at, and ranks to plan for, where no number is given
_SIZE = {"--probe": 64, "--plan": 1}


class Order(NamedTuple):
    """What a command line asks for: `probe`: how many tasks to look at; `plan`: the machines to plan for."""

    recipe: Recipe
    probe: int | None
    plan: str | None


def command_line(argv: Sequence[str] | None, prog: str, description: str) -> Order:
    """The recipe that a command line names, and what to do with it.

    Prints and exits: --help and --cfg with 0, errors with 2.
    """
    parser = argparse.ArgumentParser(
        prog,
        description=description,
        epilog=_key_help(shutil.get_terminal_size().columns - 2),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, e.g. recipes/demo.yaml")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="takes the place of the file's value"
    )
    parser.add_argument("--cfg", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument(
        "--probe",
        metavar="TASKS",
        type=int,
        nargs="?",
        help="look at credit, features and inner.lr on so many tasks (64), and stop",
    )
    parser.add_argument(
        "--plan",
        metavar="RANKSxGB",
        nargs="?",
        help="print memory, work and traffic of a step on such machines (8x80: 8 ranks of 80 GB), and stop; no weights are loaded",
    )
    # the deepspeed launcher adds it; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    # without a size of its own: argparse would take the KEY=VALUE or the recipe behind it for one
    words = [
        f"{word}={_SIZE[word]}" if word in _SIZE and not after[:1].isdigit() else word
        for word, after in itertools.pairwise([*words, ""])
    ]
    known, unknown = parser.parse_known_intermixed_args(words)
    if known.probe is not None and known.probe < 1:
        parser.error(f"--probe {known.probe}: it wants 1 or more")
    # one rank of many says it
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        recipe = load(known.recipe, [*known.overrides, *unknown])
    except MassError as fault:
        if speaks:
            print(fault, file=sys.stderr)
        sys.exit(2)
    if known.cfg:
        if speaks:
            print(dump(recipe), end="")
        sys.exit(0)
    return Order(recipe, known.probe, known.plan)


def _sections() -> Iterator[tuple[str, str, list[Key]]]:
    for field in dataclasses.fields(Recipe):
        yield field.name, field.metadata["meaning"], [KEYS[name] for name in keys_of(field.name)]


def _default(key: Key) -> str:
    if key.default in ("", []):
        return "required"
    return key.default if isinstance(key.default, str) else json.dumps(key.default)


def _type(key: Key) -> str:
    return key.wants.removeprefix("an ").removeprefix("a ")


def _key_help(width: int) -> str:
    lines = ["recipe keys: key = default (type), meaning"]
    for group, meaning, keys in _sections():
        lines += ["", f"{group}: {meaning}"]
        for key in keys:
            head = f"{key.name} = {_default(key)}  ({_type(key)})"
            lines += textwrap.wrap(head, width, initial_indent="  ", subsequent_indent="    ")
            lines += textwrap.wrap(key.meaning, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


_PAGE = """\
# Recipes

<!-- Made from mass/schema.py by `python -m mass.recipe > docs/recipes.md`; edit it there. -->

A recipe is a YAML file with the keys below, by group; what it does not name keeps its default. The folder `recipes/`
holds some; the head of each says how it is launched, what hardware it needs, how long it takes and what to change first.

```bash
deepspeed launch/meta_train.py recipes/demo.yaml inner.steps=3 'problems.train=[gym:chain_sum, mine.jsonl]'
```

What follows the recipe takes the place of the file's values. A value is YAML: text with `: ` or ` #` in it needs
quotes of its own, and where a list is wanted a single value will do. `--cfg` prints the resolved recipe and stops,
`--help` prints the tables below. Unknown keys, wrong types and settings that contradict each other are reported in one
message, with exit code 2, before a model is loaded.
"""


def markdown() -> str:
    """The text of docs/recipes.md."""
    lines = [_PAGE]
    for group, meaning, keys in _sections():
        lines += [f"## {group}", "", f"{meaning[0].upper()}{meaning[1:]}.", ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{key.name}` | {_type(key)} | `{_default(key)}` | {key.meaning} |" for key in keys] + [
            ""
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
