r"""What the model is asked and what its text means: prompts for solving and for writing examples, and their parser.

Two styles. `chat` uses the tokenizer's own chat template; the instruction stands at the head of every user turn, which
every template allows (Gemma's has no system role; SmolLM2's puts its own system message in front, which stays).
`plain` is labelled text for models that only continue:

    solve     Problem: p\nSolution:        -> " s\n\n"
    generate  Problem: t\nNew problem:     -> " p\nSolution: s\n\n"

with the instruction above it and shots, in the same form, between. A blank line ends a plain solution, and not the end
token: that is what a base model writes in this form, so an adapted model need not first learn to stop. Hence blank
lines inside a plain problem or solution are closed up.

Prompt and continuation are tokens side by side. A continuation's tokens are those that the tokenizer gives it behind
the prompt (a leading space, the blank line before the next label), not those it would give the bare text. Control
tokens inside a problem or a solution are encoded as ordinary text.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from mass.errors import MassError
from mass.rewards import find_answer
from mass.rows import content_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mass.problems import Task

SOLVE_INSTRUCTION = {
    "chat": "Solve the problem. End the solution with a line 'Answer: ' and the final answer.",
    "plain": "Each problem is followed by its solution, which ends in a line 'Answer: ' and the final answer.",
}
GENERATE_INSTRUCTION = {
    "chat": "Write a problem similar to this one, with its solution:",
    "plain": "Each problem is followed by one new problem of its kind with the solution.",
}
# Behind the problem in every turn: a small model then copies the form, and not the problem's own end (measured).
CHAT_FORM = "Use this form: Problem: <the new problem> Solution: <its solution> Answer: <the final answer>"
# Read by some templates: Qwen3 would spend the tokens thinking, Llama 3 would put today's date in the prompt.
TEMPLATE_ARGUMENTS: dict[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}

SolveShot = tuple[str, str]  # problem, solution
GenerateShot = tuple[str, str, str]  # a problem, a similar problem, the solution of the latter


@dataclass(frozen=True)
class Prompts:
    """Token ids of everything the model is asked. Make it with `make_prompts`, which checks style and template."""

    tokenizer: "PreTrainedTokenizerBase"
    style: str
    solve_instruction: str
    generate_instruction: str

    def solve(self, text: str, shots: Sequence[SolveShot] = ()) -> list[int]:
        """The prompt whose continuation is the solution of problem `text`; shots are (problem, solution)."""
        if self.style == "chat":
            turns = []
            for problem, solution in shots:
                turns += [f"{self.solve_instruction}\n\n{problem.strip()}".strip(), solution.strip()]
            return self._chat([*turns, f"{self.solve_instruction}\n\n{text.strip()}".strip()])
        blocks = [f"Problem: {_close_up(p)}\nSolution: {_close_up(s)}" for p, s in shots]
        return self._plain(self.solve_instruction, [*blocks, f"Problem: {_close_up(text)}\nSolution:"])

    def generate(self, text: str, shots: Sequence[GenerateShot] = ()) -> list[int]:
        """The prompt whose continuation is a problem similar to `text` with its solution, as `parse_example` reads it."""
        if self.style == "chat":
            return self._chat(chat_turns(self.generate_instruction, text, shots))
        blocks = [
            f"Problem: {_close_up(given)}\nNew problem: {_close_up(similar)}\nSolution: {_close_up(solution)}"
            for given, similar, solution in shots
        ]
        return self._plain(self.generate_instruction, [*blocks, f"Problem: {_close_up(text)}\nNew problem:"])

    def solution(self, text: str) -> list[int]:
        """What the model must write after `solve(...)`: the solution `text` and what ends it in this style."""
        if self.style == "chat":
            asked, full = self._chat(["?"]), self._chat(["?", text.strip()])
            if full[: len(asked)] != asked:
                # the text's first characters melt into the template's last ones
                return [*self._encode(text.strip()), self._end_of_turn]
            written = full[len(asked) :]
            return written[: written.index(self._end_of_turn) + 1]
        asked = self._encode("Solution:")
        full = self._encode(f"Solution: {_close_up(text)}\n\nProblem:")
        return full[len(asked) : -self._label_tokens]

    def in_context(
        self, text: str, solution: str, shots: Sequence[SolveShot]
    ) -> tuple[list[int], list[range]] | None:
        """solve(text, shots) with its solution, and where the tokens of each solution in it lie, the shots' first.

        None where the tokenizer writes a shot's solution otherwise than as an answer (never seen; it is looked at).
        """
        asked = self.solve(text, shots)
        spans = []
        for k, (problem, said) in enumerate(shots):
            opened, own = self.solve(problem, shots[:k]), self.solution(said)
            # some templates open the last answer in another way (Qwen3): what is common ends before that
            same = (a == b for a, b in zip(opened, asked, strict=False))
            start = next((i for i, equal in enumerate(same) if not equal), min(len(opened), len(asked)))
            if asked[start : start + len(own)] != own:
                return None
            spans.append(range(start, start + len(own)))
        whole = [*asked, *self.solution(solution)]
        return whole, [*spans, range(len(asked), len(whole))]

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end a continuation: the tokenizer's end token and, in chat, the end of a turn."""
        ends = {self.tokenizer.eos_token_id, self._end_of_turn if self.style == "chat" else None}
        return sorted(ends - {None})

    @property
    def stop_strings(self) -> list[str]:
        """Text that ends a continuation: a blank line in plain style, nothing in chat."""
        return [] if self.style == "chat" else ["\n\n"]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _plain(self, instruction: str, blocks: list[str]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        start = [bos] if bos is not None and bos in self.tokenizer.encode("") else []
        return start + self._encode("\n\n".join([instruction, *blocks] if instruction else blocks))

    @cached_property
    def _label_tokens(self) -> int:
        """How many tokens `Problem:` has after a blank line."""
        tokens = self._encode("0\n\nProblem:")
        for count in range(1, len(tokens)):
            if str(self.tokenizer.decode(tokens[-count:])).strip() == "Problem:":
                return count
        raise MassError(
            "prompt.style=plain: this tokenizer does not give back the text 'Problem:'. Set prompt.style=chat"
        )

    def _chat(self, turns: Sequence[str]) -> list[int]:
        """User and assistant turns in alternation; after a last turn of the user the assistant's is opened."""
        roles = ("user", "assistant")
        ids = self.tokenizer.apply_chat_template(
            [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)],
            add_generation_prompt=len(turns) % 2 == 1,
            sanitize_control_tokens=True,
            return_dict=False,
            **TEMPLATE_ARGUMENTS,
        )
        return cast(list[int], ids)

    @cached_property
    def _end_of_turn(self) -> int:
        """The control token that the template writes after an assistant's turn, else the end token."""
        asked, full = self._chat(["?"]), self._chat(["?", "0"])
        written, content = full[len(asked) :], self._encode("0")[-1]
        control = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        behind = written[written.index(content) :] if content in written else []
        after = [token for token in behind if token in control]
        if full[: len(asked)] != asked or not after:
            raise MassError(
                "prompt.style=chat: this tokenizer's chat template opens an answer in another way than it writes one, "
                "or ends it without a control token. Set prompt.style=plain"
            )
        return after[0]


def chat_turns(instruction: str, text: str, shots: Sequence[GenerateShot] = ()) -> list[str]:
    """What a user and an assistant say in turn until the assistant has to write a problem similar to `text`."""

    def ask(given: str) -> str:
        return f"{instruction}\n\n{given.strip()}\n\n{CHAT_FORM}".strip()

    turns: list[str] = []
    for given, similar, solution in shots:
        turns += [ask(given), f"Problem: {similar.strip()}\nSolution: {solution.strip()}"]
    return [*turns, ask(text)]


def make_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    style: str = "auto",
    solve_instruction: str | None = None,
    generate_instruction: str | None = None,
) -> Prompts:
    """Prompts in `style`: auto is chat where the tokenizer has a chat template. None instructions mean the defaults."""
    if style not in ("auto", "chat", "plain"):
        raise MassError(f"prompt.style={style!r}: it must be auto, chat or plain")
    if style == "auto":
        style = "chat" if tokenizer.chat_template else "plain"
    if style == "chat" and not tokenizer.chat_template:
        raise MassError(
            "prompt.style=chat: this model's tokenizer has no chat template. Set prompt.style=plain"
        )
    prompts = Prompts(
        tokenizer,
        style,
        SOLVE_INSTRUCTION[style] if solve_instruction is None else solve_instruction,
        GENERATE_INSTRUCTION[style] if generate_instruction is None else generate_instruction,
    )
    # a template or tokenizer that cannot be used shows itself here
    prompts.solution("0")
    return prompts


def _close_up(text: str) -> str:
    return re.sub(r"\n\s*\n", "\n", text.strip())


# ---- shots


class Shots(NamedTuple):
    """Shots for both prompts; the first j of k are those of a smaller draw."""

    solve: tuple[SolveShot, ...]
    generate: tuple[GenerateShot, ...]


def pick_shots(
    pool: Sequence["Task"],
    k: int,
    seed: int,
    problem_id: str,
    *,
    pairs: int | None = None,
    text: str | None = None,
) -> Shots:
    """`k` solve shots and `pairs` generate shots (None: k) for one target, drawn by hash from (seed, problem_id) alone.

    The two problems of a generate shot are of one `source`. The target itself (by its `text`, or by its id where no text is
    given) is never a shot. Raises MassError when the pool is too small.
    """
    target = None if text is None else content_key(text)

    def order(task: "Task") -> bytes:
        key = (seed, problem_id, task.problem.id, task.problem.text)
        return hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()

    pairs = k if pairs is None else pairs
    others = (
        task
        for task in pool
        if (task.problem.id != problem_id if target is None else content_key(task.problem.text) != target)
    )
    tasks = sorted(others, key=order)
    if len(tasks) < k:
        raise MassError(
            f"{k} shots wanted and {len(tasks)} problems set aside for them: raise prompt.pool above {k}"
        )
    solve = tuple((task.problem.text, task.solution) for task in tasks[:k])
    generate: list[GenerateShot] = []
    used: set[int] = set()
    for i, given in enumerate(tasks):
        if len(generate) == pairs:
            break
        partners = [j for j, task in enumerate(tasks) if task.source == given.source and j != i]
        if i in used or not partners:
            continue
        # a fresh partner where there is one
        j = min(partners, key=lambda j: (j in used, j))
        used |= {i, j}
        generate.append((given.problem.text, tasks[j].problem.text, tasks[j].solution))
    if len(generate) < pairs:
        sources = {task.source for task in tasks}
        text = (
            f"{pairs} pairs of problems of one source wanted as shots and {len(generate)} found among {len(tasks)} problems of "
            f"{len(sources)} source{'s' if len(sources) > 1 else ''}: lower prompt.generate_shots, or raise prompt.pool to {2 * pairs} or more for each source "
            "(at most half of the training problems are set aside)"
        )
        # those of a gym or world have the family's name; of a row it is not known here whether it named one
        if len(sources) > 1 and any(task.entry is None for task in tasks):
            example = next(task.source for task in tasks if task.entry is None)
            text += (
                f". A row's source is what its column 'source' says, where a file or data set has that ({example[:80]!r} here): "
                "if it tells no kinds of problems apart, rename the column"
            )
        raise MassError(text)
    return Shots(solve, tuple(generate))


# ---- what the model wrote


@dataclass(frozen=True)
class Example:
    """A self-made problem with its solution. `reason`: "" when valid, else no_solution, no_answer, truncated, copy,
    duplicate or empty."""

    problem: str
    solution: str
    valid: bool
    reason: str


# every repetition is bounded: a megabyte of blanks must not take quadratic time
_MARKS = r"[*_]{0,2}[\t ]{0,8}:\*{0,2}"
_PROBLEM = re.compile(
    rf"^[#*>\t ]{{0,8}}(?:(?:similar|new) )?problem(?: \d{{1,3}})?{_MARKS}", re.IGNORECASE | re.MULTILINE
)
_SOLUTION = re.compile(rf"[#*>]{{0,6}}[\t ]?(?<![^\W_])solution(?: \d{{1,3}})?{_MARKS}", re.IGNORECASE)


def parse_example(text: str, *, finished: bool) -> Example:
    """Read "[Problem:] p Solution: s" (any case, Markdown bold or headings allowed). `finished`: it ended by itself.

    Words before the last "Problem:" in front of the solution are dropped (a greeting, the target said again), and so
    is a further problem behind it. Reasons, the first that holds: empty (no text), truncated (not finished),
    no_solution, empty (no problem), no_answer (`mass.rewards.find_answer` finds none in the solution).
    """
    head, solution = text, ""
    label = _SOLUTION.search(text)
    if label:
        head, solution = text[: label.start()], text[label.end() :]
        following = _PROBLEM.search(solution)
        solution = (solution[: following.start()] if following else solution).strip()
    labels = list(_PROBLEM.finditer(head))
    problem = (head[labels[-1].end() :] if labels else head).strip()
    if not text.strip():
        reason = "empty"
    elif not finished:
        reason = "truncated"
    elif not solution:
        reason = "no_solution"
    elif not problem:
        reason = "empty"
    else:
        reason = "" if find_answer(solution) else "no_answer"
    return Example(problem, solution, not reason, reason)


def answer_end(text: str) -> int:
    """Where the line ends that first states the final answer of a self-made example, if more text follows it (a check,
    say); else the length of the text."""
    stated = find_answer(text)
    end = text.find("\n")
    while stated is not None and end >= 0:
        if find_answer(text[:end]) == stated:
            return end if text[end:].strip() else len(text)
        end = text.find("\n", end + 1)
    return len(text)


def solution_start(text: str) -> int:
    """Where the solution of a self-made example begins, behind its label; 0 without one."""
    label = _SOLUTION.search(text)
    return label.end() if label else 0


def filter_examples(examples: Sequence[Example], target: str) -> list[Example]:
    """The same examples, where valid ones that repeat are marked: `copy` when the problem is the target or contains
    it, `duplicate` when problem and solution equal those of a valid one before. Case, spacing and the punctuation at
    the end do not count."""
    seen: set[tuple[str, str]] = set()
    out = []
    for example in examples:
        key = (_normal(example.problem), _normal(example.solution))
        if example.valid and f" {_normal(target)} " in f" {key[0]} ":
            example = replace(example, valid=False, reason="copy")
        elif example.valid and key in seen:
            example = replace(example, valid=False, reason="duplicate")
        elif example.valid:
            seen.add(key)
        out.append(example)
    return out


def _normal(text: str) -> str:
    """Words, numbers and symbols with one space between: "14 + 3" does not contain "4 + 3"."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.casefold())).rstrip(" .,:;!?")
