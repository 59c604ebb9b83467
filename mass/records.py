"""What came of a problem: the fields that `mass-adapt --json` prints. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Made:
    """One example: its weight, and why it is malformed (`reason`, "" when valid)."""

    problem: str
    solution: str
    weight: float
    valid: bool
    reason: str


@dataclass(frozen=True)
class StepLoss:
    """The weighted inner loss before and after one step of the update."""

    before: float
    after: float


@dataclass(frozen=True)
class Tokens:
    """`generated`: sampled for gate, examples and answer. `trained`: tokens of the examples with a weight, each whole,
    times K."""

    generated: int = 0
    trained: int = 0


@dataclass(frozen=True)
class Seconds:
    """A problem's share of its batch's wall time, without the baselines."""

    generate: float = 0.0
    score: float = 0.0
    adapt: float = 0.0
    answer: float = 0.0


@dataclass(frozen=True)
class Record:
    """What came of one problem. `mass-adapt --json` prints these fields.

    answer          None where `solution`, its text, states none
    base_answer     greedy by the same weights without update; None also where no baselines were asked for
    vote_answer     majority of `votes` samples of those weights, of as many tokens as the method spent
    steps           one for each step of the update; empty without
    note            what is worth knowing: no valid example, an update that was dropped
    error           why there is no answer at all (all else is then empty); None when there is nothing wrong
    finished        `solution` ended by itself, not at generate.answer_tokens
    """

    id: str
    problem: str
    method: str
    answer: str | None = None
    base_answer: str | None = None
    vote_answer: str | None = None
    votes: int = 0
    solution: str = ""
    base_solution: str = ""
    examples: tuple[Made, ...] = ()
    steps: tuple[StepLoss, ...] = ()
    tokens: Tokens = Tokens()
    seconds: Seconds = Seconds()
    note: str = ""
    error: str | None = None
    finished: bool = True
