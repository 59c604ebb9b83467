"""Before a scorer is trained: is the credit right, can the features be read, does the inner step help, at which rate, and is
there room for better examples?

Each question isolates one fault. Credit that does not rank right examples above wrong ones is a fault of the examples, the
inner loop or the outer loss; features from which a head trained on the truth cannot tell them apart are a fault of the
scorer's inputs; where both are good and training is not, it is the outer optimizer. And where an update on solved training
problems, whose answers are all right, helps no more than one on self-made examples, wrong answers are not what is in the way.
"""

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mass import credit, episode, metrics, outer, scorer
from mass.choices import Room, own_answers, training_problems
from mass.credit import STEP
from mass.episode import Result
from mass.lora import Adapter
from mass.practice import Practice, features
from mass.problems import Task
from mass.scorer import Scorer
from mass.setting import Setting, task_batch
from mass.setting import kit as test_time_kit

# inner.lr times these is tried: three decades, half a decade apart
RATES = tuple(10 ** (k / 2) for k in range(-3, 4))
HEAD_STEPS = 150
HEAD_LR = 3e-3
FOLDS = 4


@dataclass(frozen=True)
class Rate:
    """What one inner learning rate does: outer loss without update, after one with uniform weights, after one on the right
    examples alone (NaN where they are not known), and after one on as many solved training problems (NaN where the pool has
    too few); share of tasks that exploded; AUC of the credit."""

    lr: float
    before: float
    uniform: float
    right: float
    solved: float
    exploded: float
    auc: float


@dataclass(frozen=True)
class Report:
    """What `probe` found. `judged`: "truth" or "verifier", or "" where no example could be told right or wrong."""

    tasks: int
    examples: int
    judged: str
    right: float
    credit_auc: float
    feature_auc: float
    credit_median: float
    credit_max: float
    flat: float
    exact: float
    one_step: float
    rates: tuple[Rate, ...]

    @property
    def lines(self) -> list[str]:
        """The report in words and numbers."""
        whose = {"truth": "self-made examples, by their truth", "verifier": "own answers, by the verifier"}
        out = [f"{self.tasks} tasks x {self.examples} examples, uniform weights, nothing trained"]
        if self.judged:
            out += [
                f"judged: {whose[self.judged]}; {self.right:.0%} are right",
                f"raw credit: AUC {self.credit_auc:.3f} (right above wrong, within a task)",
                f"features of the scorer: AUC {self.feature_auc:.3f} on tasks that a head trained to tell right from "
                f"wrong ({HEAD_STEPS} steps) has not met",
            ]
        else:
            out.append("no example can be told right or wrong here: no AUC of the credit or the features")
        ratio = self.credit_max / self.credit_median if self.credit_median else math.nan
        out += [
            f"size of the credits: median {self.credit_median:.2g}, largest {self.credit_max:.2g} ({ratio:.0f} times); "
            f"{self.flat:.0%} of the tasks under outer.min_spread",
            f"rank correlation with leaving each example out: exact credit {self.exact:.3f}, one-step dot product "
            f"{self.one_step:.3f}",
            "inner.lr     outer loss   after update   on right ones   on solved problems   exploded   credit AUC",
        ]
        for x in self.rates:
            out.append(
                f"{x.lr:<12.3g} {x.before:10.3f} {x.uniform:14.3f} {x.right:15.3f} {x.solved:20.3f} {x.exploded:10.0%} "
                f"{x.auc:12.3f}"
            )
        good = [x.lr for x in self.rates if self._gain(x) > 0.5 * max(map(self._gain, self.rates))]
        if good and max(map(self._gain, self.rates)) > 0:
            out.append(f"at least half of the best gain: inner.lr from {min(good):.3g} to {max(good):.3g}")
        else:
            out.append("no rate lowers the outer loss")
        return out

    def _gain(self, x: Rate) -> float:
        after = x.uniform if math.isnan(x.right) else x.right
        return x.before - after if math.isfinite(after) else -math.inf


def probe(
    setting: Setting,
    tasks: Seq[Task],
    policy: Adapter,
    eta: Mapping[str, Tensor],
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Look at the first outer step of some tasks, as many at a time as training works at once, with a fresh scorer. Nothing is
    trained.

    Where the truth of self-made examples is not known, credit and features are judged on the policy's own answers, which
    the verifier judges. The rates and the leave-one-out comparison use the first 16 tasks or the first batch.
    """
    quiet = replace(setting.recipe.outer, lr_policy=0.0, gamma=0.0, through_init=False)
    fixed = replace(setting.recipe.inner, learned_lr="no")
    setting = replace(setting, recipe=replace(setting.recipe, outer=quiet, inner=fixed))
    size = quiet.together
    batches = [tasks[i : i + size] for i in range(0, len(tasks) // size * size, size)] or [tasks]
    made: list[Result] = []
    for i, batch in enumerate(batches):
        say(
            f"examples and credit of tasks {i * size + 1} to {i * size + len(batch)} of {len(batches) * size}"
        )
        made.append(episode.run(setting, batch, STEP, policy, eta, {}))
    size_TN = torch.cat([x.credit_TN[x.practice.valid_TN].abs() for x in made])
    spread_T = torch.cat([x.credit_TN.square().mean(1).sqrt() for x in made])

    judged, right = [], [metrics.known_truth(x.practice, b) for x, b in zip(made, batches, strict=True)]
    if any(known.any() for _, known in right):
        how, judged = "truth", made
    else:
        how = "verifier"
        for batch in batches:
            say("own answers, for the verifier to judge")
            problems = [task.problem for task in batch]
            practice = own_answers(
                test_time_kit(setting, policy, eta, {}), problems, Room(None, 0, False, [[] for _ in batch])
            )
            judged.append(episode.run(setting, batch, STEP, policy, eta, {}, practice=practice))
        right = [_verified(setting, x.practice, b) for x, b in zip(judged, batches, strict=True)]
    credit_TN = torch.cat([x.credit_TN for x in judged])
    good_TN, known_TN = (torch.cat(x) for x in zip(*right, strict=True))
    few = max(1, 16 // size)
    say("leaving each example out, and other inner rates")
    solved = [_solved_problems(setting, batch, policy, eta) for batch in batches[:few]]
    exact, one_step = _leave_one_out(setting, batches[:few], made[:few], policy)
    return Report(
        len(batches) * size if len(tasks) >= size else len(tasks),
        setting.recipe.generate.examples,
        how if known_TN.any() else "",
        good_TN[known_TN].float().mean().item() if known_TN.any() else math.nan,
        outer.auc(credit_TN, good_TN, known_TN),
        _feature_auc(setting, batches, [x.practice for x in judged], good_TN, known_TN),
        size_TN.median().item() if size_TN.numel() else math.nan,
        size_TN.max().item() if size_TN.numel() else math.nan,
        (spread_T < setting.recipe.outer.min_spread).float().mean().item(),
        exact,
        one_step,
        tuple(
            _rate(setting, lr * setting.recipe.inner.lr, batches[:few], made[:few], solved, policy, eta)
            for lr in RATES
        ),
    )


def _verified(setting: Setting, practice: Practice, tasks: Seq[Task]) -> tuple[Tensor, Tensor]:
    """Which own answers are right, and of which that is known, [T, N]."""
    verdicts = [
        [setting.verifier.verify(e.solution, task).score if e.valid else math.nan for e in own]
        for task, own in zip(tasks, practice.examples, strict=True)
    ]
    score_TN = torch.tensor(verdicts, device=practice.valid_TN.device)
    return score_TN >= 1, torch.isfinite(score_TN)


def _feature_auc(
    setting: Setting, batches: Seq[Seq[Task]], practices: Seq[Practice], good_TN: Tensor, known_TN: Tensor
) -> float:
    """AUC of scorer heads that were trained to rank right above wrong, each on the quarter of the tasks it has not met."""
    lm, r = setting.lm, setting.recipe.scorer
    found = [
        features(
            lm, setting.parts, setting.prompts, practice, [t.problem.text for t in batch], r.layers, r.pool
        )
        for batch, practice in zip(batches, practices, strict=True)
    ]
    task_TF, example_TNF = (torch.cat(x) for x in zip(*found, strict=True))
    pairs_TNN = (good_TN & known_TN).unsqueeze(2) & (~good_TN & known_TN).unsqueeze(1)
    fold_T = torch.arange(len(good_TN), device=good_TN.device) % FOLDS
    won, pairs = 0.0, 0
    for fold in range(FOLDS):
        learned_TNN = pairs_TNN & (fold_T != fold).view(-1, 1, 1)
        if not learned_TNN.any():
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head = Scorer(setting.head.width, len(r.layers), r.hidden).to(good_TN.device)
        optimizer = torch.optim.Adam(head.parameters(), HEAD_LR)
        for _ in range(HEAD_STEPS):
            score_TN = head(task_TF, example_TNF)
            ahead_TNN = score_TN.unsqueeze(2) - score_TN.unsqueeze(1)
            loss = F.softplus(-ahead_TNN[learned_TNN]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            score_TN = head(task_TF, example_TNF)
        ordered = outer.ordered_pairs(score_TN, good_TN, known_TN & (fold_T == fold).unsqueeze(1))
        won, pairs = won + ordered[0], pairs + ordered[1]
    return won / pairs if pairs else math.nan


def _solved_problems(
    setting: Setting, tasks: Seq[Task], policy: Adapter, eta: Mapping[str, Tensor]
) -> Practice | None:
    """As many solved problems of the pool as a task has examples, in place of them; None where the pool is too small."""
    if len(setting.pool) <= setting.recipe.generate.examples:
        return None
    nothing = Room(None, 0, False, [[] for _ in tasks])
    return training_problems(
        test_time_kit(setting, policy, eta, {}), [task.problem for task in tasks], nothing
    )


def _rate(
    setting: Setting,
    lr: float,
    batches: Seq[Seq[Task]],
    made: Seq[Result],
    solved: Seq[Practice | None],
    policy: Adapter,
    eta: Mapping[str, Tensor],
) -> Rate:
    inner = replace(setting.recipe.inner, lr=lr)
    at = replace(setting, recipe=replace(setting.recipe, inner=inner))
    before, uniform, right, on_solved, exploded, won, pairs = [], [], [], [], [], 0.0, 0
    for batch, first, problems in zip(batches, made, solved, strict=True):
        practice = first.practice
        result = episode.run(at, batch, STEP, policy, eta, {}, practice=practice)
        before.append(result.metrics["meta/loss_before"])
        uniform.append(result.metrics["meta/loss"])
        exploded.append(result.metrics["meta/exploded"])
        good_TN, known_TN = metrics.known_truth(practice, batch)
        ordered = outer.ordered_pairs(result.credit_TN, good_TN, known_TN)
        won, pairs = won + ordered[0], pairs + ordered[1]
        if known_TN.any():
            # a task without a right example stays as it is
            weight_TN = scorer.weights(torch.zeros_like(result.weight_TN), good_TN, 1.0)
            same = task_batch(at, batch, practice, policy, {}, STEP)
            right.append(credit.update(same, weight_TN).loss_T.mean().item())
        if problems is not None:
            weight_TN = scorer.weights(torch.zeros_like(result.weight_TN), problems.valid_TN, 1.0)
            same = task_batch(at, batch, problems, policy, {}, STEP)
            on_solved.append(credit.update(same, weight_TN).loss_T.mean().item())
    return Rate(
        lr,
        _mean(before),
        _mean(uniform),
        _mean(right),
        _mean(on_solved),
        _mean(exploded),
        won / pairs if pairs else math.nan,
    )


def _leave_one_out(
    setting: Setting, batches: Seq[Seq[Task]], made: Seq[Result], policy: Adapter
) -> tuple[float, float]:
    """Mean over tasks of the rank correlation between what leaving an example out does to the outer loss, under uniform
    weights, and its exact credit; and the same for the one-step dot product."""
    exact, one_step = [], []
    for batch, result in zip(batches, made, strict=True):
        practice = result.practice
        uniform_TN = torch.zeros_like(result.weight_TN)
        at = task_batch(setting, batch, practice, policy, {}, STEP)
        change_TN, _ = credit.left_out(at, uniform_TN)
        dot_TN, _ = credit.one_step(at)
        for t, own in enumerate(practice.valid_TN):
            exact.append(credit.rank_correlation(result.credit_TN[t][own], change_TN[t][own]))
            one_step.append(credit.rank_correlation(dot_TN[t][own], change_TN[t][own]))
    return _mean(exact), _mean(one_step)


def _mean(values: Seq[float]) -> float:
    finite = [x for x in values if math.isfinite(x)]
    return sum(finite) / len(finite) if finite else math.nan
