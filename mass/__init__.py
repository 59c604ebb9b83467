"""mass: a language model learns to write, weigh and learn from its own practice examples."""

__version__ = "0.1.0"
