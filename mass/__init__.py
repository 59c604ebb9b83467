"""mass: a language model learns to write, weigh and learn from its own practice examples.

`mass.adapt` is a function. The package of that name only holds it and what `python -m mass.adapt` runs, so the name means
the function whatever has been imported before.
"""

from mass.adapt import adapt

__all__ = ["adapt"]
__version__ = "0.1.0"
