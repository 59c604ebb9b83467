"""Hand-made problems and examples for the tests of test time (tests/tiny.py:tiny_kit)."""

from typing import Any

from mass.problems import Problem

PROBLEMS = [
    Problem("a", "What is 4 + 3?"),
    Problem("b", "Name the colour of snow."),
    Problem("c", "2, 4, 6, ?"),
]
GOOD: dict[str, list[Any]] = {
    "a": [
        ("What is 1 + 2?", "1 + 2 = 3\nAnswer: 3"),
        ("What is 5 + 5?", "Answer: 10"),
        ("What is 0 + 9?", "Answer: 9"),
    ],
    "b": [("Colour of grass?", "It grows.\nAnswer: green"), ("Colour of coal?", "Answer: black"), None],
    "c": [("1, 2, 3, ?", "Answer: 4"), None, ("5, 10, ?", "Answer: 15")],
}
GRIDS = Problem(
    "g", "1 0\n0 0", (("1 2\n0 0", "0 0\n1 2"), ("3 0\n0 4", "0 4\n3 0"), ("5 5\n0 1", "0 1\n5 5")), True
)
SUMS = Problem("s", "3 + 3", (("1 + 1", "2"), ("2 + 1", "3"), ("2 + 2", "4")))
PLAIN = Problem("p", "What is 4 + 3?")
