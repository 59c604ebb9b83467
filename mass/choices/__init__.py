"""What a test-time method can choose: where examples come from, their weights, the update, the gate, how it answers.

Each choice is a function on T problems at once; `mass.methods.METHODS` puts them together. A `Kit` is what all of them
work with. Randomness is seeded by the problem's text and a number, so it depends on nothing that shares the batch.
"""

from mass.choices.answers import best, greedy, in_context, majority, over_views
from mass.choices.examples import (
    leave_one_out,
    own_answers,
    own_samples,
    self_made,
    teacher_made,
    training_problems,
)
from mass.choices.gates import small_margin
from mass.choices.kit import (
    Answered,
    Gated,
    Kit,
    Room,
    Teacher,
    Updated,
    Work,
    Written,
    shots_for,
)
from mass.choices.texts import Texts
from mass.choices.updates import fine_tuned, fine_tuned_on_best, policy_gradient
from mass.choices.weights import (
    agreement,
    best_scored,
    by_truth,
    probable,
    scored,
    shortest,
    shuffled,
    uniform,
)

__all__ = [
    "Answered",
    "Gated",
    "Kit",
    "Room",
    "Teacher",
    "Texts",
    "Updated",
    "Work",
    "Written",
    "agreement",
    "best",
    "best_scored",
    "by_truth",
    "fine_tuned",
    "fine_tuned_on_best",
    "greedy",
    "in_context",
    "leave_one_out",
    "majority",
    "over_views",
    "own_answers",
    "own_samples",
    "policy_gradient",
    "probable",
    "scored",
    "self_made",
    "shortest",
    "shots_for",
    "shuffled",
    "small_margin",
    "teacher_made",
    "training_problems",
    "uniform",
]
