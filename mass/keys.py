"""How a recipe key is declared, described and checked; no torch here, and nothing of the other modules."""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

_BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("more than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}


def key(default: Any, meaning: str, **bounds: float) -> Any:
    """Declares a key: default, meaning, and bounds by the names of `_BOUNDS`."""
    metadata = {"meaning": meaning, "bounds": bounds}
    return dataclasses.field(default_factory=lambda: deepcopy(default), metadata=metadata)


def group(cls: type, meaning: str) -> Any:
    """Declares a group of keys."""
    return dataclasses.field(default_factory=cls, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Key:
    """One leaf of the schema. `hint` is its Python type."""

    name: str
    hint: Any
    default: Any
    meaning: str
    bounds: Mapping[str, float]

    @property
    def options(self) -> tuple[Any, ...]:
        """The alternatives of the hint: `float | None` gives float and None's type."""
        return typing.get_args(self.hint) if isinstance(self.hint, types.UnionType) else (self.hint,)

    @property
    def wants(self) -> str:
        """Type and bounds in words."""
        bounds = " and ".join(f"{_BOUNDS[how][0]} {limit:g}" for how, limit in self.bounds.items())
        return " or ".join(_words(x) for x in self.options) + (f", {bounds}" if bounds else "")

    def complaint(self, value: Any) -> str | None:
        """Why a value of the right type will not do, or None."""
        if value == [] or (value == "" and type(None) not in self.options):
            required = self.default in ("", [])
            return (
                f"{self.name}: {'required' if required else 'empty'}. It wants {self.wants}: {self.meaning}."
            )
        numbers = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int | float)]
        bounds = [(_BOUNDS[how][1], limit) for how, limit in self.bounds.items()]
        if all(math.isfinite(x) and all(holds(x, limit) for holds, limit in bounds) for x in numbers):
            return None
        return f"{said(self.name, value)}: wants {self.wants}."


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is list:
        return "a list of " + {str: "texts", float: "numbers"}[arguments[0]]
    if origin is dict:
        return "a mapping"
    return {int: "an int", float: "a number", str: "text", bool: "true or false", type(None): "null"}[hint]


def said(name: str, value: Any) -> str:
    """`name=value` as an error shows it, cut to a line."""
    text = repr(value)
    return f"{name}={text if len(text) <= 80 else text[:77] + '...'}"
