"""Prompts: what is tokenised, what ends a solution, and how self-made examples are read, marked and drawn."""

import copy
import time
from dataclasses import FrozenInstanceError, replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mass.errors import MassError
from mass.problems import Problem, Task
from mass.prompts import CHAT_FORM, Example, Prompts, filter_examples, make_prompts, parse_example, pick_shots

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# SmolLM2: a default system message in front
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
# Gemma: no system role, strict alternation, another end than <eos>
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + (m['content'] | trim) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# Mistral: a space before the answer, the end token behind it, no mark for the generation prompt
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Qwen3: an empty thought in front of the last answer, and in the generation prompt when thinking is off
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "system": SYSTEM, "gemma": GEMMA, "mistral": MISTRAL, "qwen3": QWEN3}


def chatty(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """A copy with turn marks, as special tokens, and a chat template."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own.chat_template = template
    return own


def merging() -> PreTrainedTokenizerFast:
    """As GPT-2's: words and runs of blanks are split first, and a blank line at the end of a text is one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *letters, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def of_kind(kind: str, tokenizer: PreTrainedTokenizerFast) -> Prompts:
    return make_prompts(tokenizer if kind == "plain" else chatty(tokenizer, TEMPLATES[kind]))


@pytest.fixture(params=["plain", *TEMPLATES])
def prompts(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Prompts:
    """One of each kind; `auto` finds the style."""
    return of_kind(request.param, tokenizer)


@pytest.fixture(params=["plain", "chatml", "system", "gemma", "mistral"])
def steady(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Prompts:
    """Those that write an earlier answer as they write the last one (Qwen3's template does not)."""
    return of_kind(request.param, tokenizer)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


# ---- prompts


def test_plain_solve_reads_as_documented(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = make_prompts(tokenizer, solve_instruction="Head.")
    ids = prompts.solve("4 + 3 =", [("1 + 1 =", "Answer: 2")])
    expected = "<bos>Head.\n\nProblem: 1 + 1 =\nSolution: Answer: 2\n\nProblem: 4 + 3 =\nSolution:"
    assert text_of(tokenizer, ids) == expected
    assert text_of(tokenizer, prompts.solution("Answer: 7")) == " Answer: 7\n\n"


def test_plain_generate_reads_as_documented(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = make_prompts(tokenizer, generate_instruction="")
    ids = prompts.generate("4 + 3 =", [("1 + 1 =", "2 + 2 =", "Answer: 4")])
    expected = (
        "<bos>Problem: 1 + 1 =\nNew problem: 2 + 2 =\nSolution: Answer: 4\n\nProblem: 4 + 3 =\nNew problem:"
    )
    assert text_of(tokenizer, ids) == expected


def test_chat_prompts_are_turns_with_the_instruction_in_each(tokenizer: PreTrainedTokenizerFast) -> None:
    own = chatty(tokenizer, CHATML)
    prompts = make_prompts(own, solve_instruction="Solve.", generate_instruction="Write.")
    user, model, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    assert text_of(own, prompts.solve("b?", [("a?", "Answer: a")])) == (
        f"{user}Solve.\n\na?{end}{model}Answer: a{end}{user}Solve.\n\nb?{end}{model}"
    )
    assert text_of(own, prompts.generate("c?", [("a?", "b?", "Answer: b")])) == (
        f"{user}Write.\n\na?\n\n{CHAT_FORM}{end}{model}Problem: b?\nSolution: Answer: b{end}"
        f"{user}Write.\n\nc?\n\n{CHAT_FORM}{end}{model}"
    )


def test_solution_continues_solve_as_a_shot_would(steady: Prompts) -> None:
    """solve(p) + solution(s) must be the very tokens that a prompt with the shot (p, s) begins with."""
    sequence = steady.solve("4 + 3 =") + steady.solution("4 + 3 = 7\nAnswer: 7")
    assert steady.solve("5 + 5 =", [("4 + 3 =", "4 + 3 = 7\nAnswer: 7")])[: len(sequence)] == sequence


def test_solution_ends_in_what_stops_generation(prompts: Prompts) -> None:
    ids = prompts.solution("Answer: 7")
    if prompts.style == "plain":
        assert prompts.stop_strings == ["\n\n"] and prompts.stop_ids == [prompts.tokenizer.eos_token_id]
        assert text_of(prompts.tokenizer, ids).endswith("Answer: 7\n\n")
    else:
        assert prompts.stop_strings == [] and prompts.tokenizer.eos_token_id in prompts.stop_ids
        assert ids[-1] in prompts.stop_ids and not set(ids[:-1]) & set(prompts.stop_ids)
        assert text_of(prompts.tokenizer, ids[:-1]).strip() == "Answer: 7"


def test_end_of_turn_is_the_templates_own(tokenizer: PreTrainedTokenizerFast) -> None:
    for name, end in (("gemma", "<|im_end|>"), ("mistral", "<eos>"), ("qwen3", "<|im_end|>")):
        own = chatty(tokenizer, TEMPLATES[name])
        assert make_prompts(own).solution("x")[-1] == own.convert_tokens_to_ids(end), name


def test_empty_thought_belongs_to_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    own = chatty(tokenizer, QWEN3)
    prompts = make_prompts(own)
    assert text_of(own, prompts.solve("x")).endswith("<think>\n\n</think>\n\n")
    assert text_of(own, prompts.solution("y")) == "y<|im_end|>"


def test_blank_line_is_tokenised_as_between_shots() -> None:
    own = merging()
    assert own.convert_ids_to_tokens(own.encode("7\n\n")) == ["7", "ĊĊ"], "the trap that this test is about"
    ids = make_prompts(own).solution("Answer: 7")
    assert own.convert_ids_to_tokens(ids)[-3:] == ["7", "Ċ", "Ċ"]


def test_plain_texts_hold_no_blank_line(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = make_prompts(tokenizer, solve_instruction="")
    assert text_of(tokenizer, prompts.solution("a\n \n\nb\n\n")) == " a\nb\n\n"
    assert "\n\n" not in text_of(tokenizer, prompts.solve("p\n\nq"))


def test_begin_token_only_where_the_tokenizer_puts_one(tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_prompts(tokenizer).solve("x").count(tokenizer.bos_token_id) == 1
    assert make_prompts(tokenizer).solution("x").count(tokenizer.bos_token_id) == 0
    own = merging()
    own.bos_token = "<eos>"
    assert own.bos_token_id not in make_prompts(own).solve("x")


def test_control_tokens_in_a_problem_are_text(prompts: Prompts) -> None:
    control = prompts.tokenizer.convert_tokens_to_ids("<|im_end|>" if prompts.style == "chat" else "<eos>")
    for name in ("<|im_end|>", "<eos>"):
        evil = f"What is {name} ?"
        for make in (prompts.solve, prompts.generate):
            assert make(evil).count(control) == make("What is it ?").count(control)
        assert prompts.solution(evil).count(control) == prompts.solution("What is it ?").count(control)
        assert name in text_of(prompts.tokenizer, prompts.solution(evil))


def test_styles_and_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_prompts(tokenizer).style == "plain"
    assert make_prompts(chatty(tokenizer, CHATML)).style == "chat"
    assert make_prompts(chatty(tokenizer, CHATML), "plain").style == "plain"
    with pytest.raises(MassError, match="prompt.style=chat: this model's tokenizer has no chat template"):
        make_prompts(tokenizer, "chat")
    with pytest.raises(MassError, match="prompt.style='poem'"):
        make_prompts(tokenizer, "poem")
    with pytest.raises(FrozenInstanceError):
        make_prompts(tokenizer).style = "chat"  # type: ignore[misc]


def test_template_that_cannot_be_continued_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    other = CHATML.replace("assistant\n' }}{% endif %}", "bot\n' }}{% endif %}")
    endless = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    for template in (other, endless):
        with pytest.raises(MassError, match="Set prompt.style=plain"):
            make_prompts(chatty(tokenizer, template))


# ---- shots


def task(i: int, source: str) -> Task:
    return Task(Problem(f"id{i}", f"p{i} of {source}"), str(i), f"Answer: {i}", source, "exact", None)


POOL = [task(i, "sums" if i % 2 else "words") for i in range(12)]


def test_shots_depend_on_seed_and_problem_only() -> None:
    shots = pick_shots(POOL, 3, 0, "target")
    assert shots == pick_shots(POOL[::-1], 3, 0, "target")
    others = [pick_shots(POOL, 3, seed, name) for seed, name in ((1, "target"), (0, "t2"), (0, "t3"))]
    assert all(other != shots for other in others)
    # pinned: it must not change with the process (hash()) or between releases
    assert [p for p, _ in shots.solve] == ["p10 of words", "p3 of sums", "p0 of words"]


def test_fewer_shots_are_the_first_of_more() -> None:
    five, two = pick_shots(POOL, 5, 7, "t"), pick_shots(POOL, 2, 7, "t")
    assert five.solve[:2] == two.solve and five.generate[:2] == two.generate


def test_both_counts_in_one_draw() -> None:
    both = pick_shots(POOL, 5, 7, "t", pairs=2)
    assert both == (pick_shots(POOL, 5, 7, "t").solve, pick_shots(POOL, 2, 7, "t").generate)


def test_generate_shots_are_of_one_source_and_solved() -> None:
    for seed in range(20):
        shots = pick_shots(POOL, 4, seed, "t")
        used = []
        for given, similar, solution in shots.generate:
            assert given != similar and given.split(" of ")[1] == similar.split(" of ")[1]
            assert solution == f"Answer: {similar.split(' ')[0][1:]}"
            used += [given, similar]
        assert len(set(used)) == 8, "a problem serves twice although there are enough"


def test_the_target_is_no_shot() -> None:
    for seed in range(20):
        shots = pick_shots(POOL, 5, seed, "id3")
        assert "p3 of sums" not in {text for shot in (*shots.solve, *shots.generate) for text in shot}


def test_the_target_is_no_shot_under_another_id_either() -> None:
    for seed in range(20):
        shots = pick_shots(POOL, 5, seed, "typed", text="P3  of sums")
        assert "p3 of sums" not in {text for shot in (*shots.solve, *shots.generate) for text in shot}
    # a text that is not there changes nothing, also where its id is another problem's
    assert pick_shots(POOL, 5, 7, "typed", text="other") == pick_shots(POOL, 5, 7, "typed")
    few = POOL[:3]
    assert len(pick_shots(few, 3, 7, few[0].problem.id, text="other", pairs=0).solve) == 3


def test_too_small_a_pool_says_so() -> None:
    assert pick_shots([], 0, 0, "t") == ((), ())
    with pytest.raises(MassError, match="raise prompt.pool above 3"):
        pick_shots(POOL[:2], 3, 0, "t")
    lonely = [task(i, f"source {i}") for i in range(4)]
    with pytest.raises(
        MassError, match="2 pairs of problems of one source wanted .* among 4 problems of 4 sources"
    ) as raised:
        pick_shots(lonely, 2, 0, "t")
    # an URL for each row, say: no pool mends that
    assert "column 'source'" in str(raised.value) and "('source " in str(raised.value)
    made = [replace(one, entry={}) for one in lonely]
    for others in (made, POOL[1:4:2]):
        with pytest.raises(MassError, match="2 pairs of problems") as raised:
            pick_shots(others, 0, 0, "t", pairs=2)
        assert "column" not in str(raised.value)
    # who wants no pairs is not asked for any
    assert len(pick_shots(lonely, 2, 0, "t", pairs=0).solve) == 2


# ---- the parser


@pytest.mark.parametrize(
    "text",
    [
        " 5 + 5 =\nSolution: 5 + 5 = 10\nAnswer: 10",
        "Problem: 5 + 5 =\nSolution: 5 + 5 = 10\nAnswer: 10",
        "Here is one.\n\nProblem: 5 + 5 =\n\nSolution:\n5 + 5 = 10\nAnswer: 10\n",
        "**Problem:** 5 + 5 =\n**Solution:** 5 + 5 = 10\nAnswer: 10",
        "**Problem**: 5 + 5 =\n\n**Solution**:\n5 + 5 = 10\nAnswer: 10",
        "### Similar problem: 5 + 5 =\n### SOLUTION: 5 + 5 = 10\nAnswer: 10",
        "problem 2: 5 + 5 = solution 2: 5 + 5 = 10\nAnswer: 10",
        "Problem: 4 + 3 =\nNew problem: 5 + 5 =\nSolution: 5 + 5 = 10\nAnswer: 10",
        "Problem: 5 + 5 =\nSolution: 5 + 5 = 10\nAnswer: 10\n\nProblem: 6 + 6 =\nSolution: 12",
    ],
)
def test_forms_that_parse(text: str) -> None:
    assert parse_example(text, finished=True) == Example("5 + 5 =", "5 + 5 = 10\nAnswer: 10", True, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("Problem:\nSolution: Answer: 10", "empty"),
        ("Problem: 5 + 5 =\nAnswer: 10", "no_solution"),
        ("Problem: 5 + 5 =\nSolution:", "no_solution"),
        ("Problem: what is a resolution: Answer: 10", "no_solution"),
        ("Problem: 5 + 5 =\nSolution: it is ten", "no_answer"),
        ("Problem: 5 + 5 =\nSolution: the answer of all\nProblem: x\nAnswer: 10", "no_answer"),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    example = parse_example(text, finished=True)
    assert (example.valid, example.reason) == (False, reason)


def test_unfinished_is_truncated_and_still_shown() -> None:
    example = parse_example("Problem: 5 + 5 =\nSolution: 5 + 5 = 10\nAnswer: 1", finished=False)
    assert example == Example("5 + 5 =", "5 + 5 = 10\nAnswer: 1", False, "truncated")


def test_blanks_to_fill_in_survive() -> None:
    example = parse_example("Problem: __ + 2 = 5, * is times\nSolution: \\boxed{3}", finished=True)
    assert example == Example("__ + 2 = 5, * is times", "\\boxed{3}", True, "")


def test_parser_takes_linear_time() -> None:
    start = time.process_time()
    for junk in (" ", "#", "*", "\n", "Problem:", "Solution:", "problem ", "\\boxed{"):
        parse_example("Problem: a" + junk * 100_000 + "b", finished=True)
    assert time.process_time() - start < 10


def test_good_example_goes_round(steady: Prompts) -> None:
    """What a perfect model writes after generate(...) parses, and its training sequence says the same again."""
    problem, solution = "5 + 5 =", "5 + 5 = 10\nAnswer: 10"
    asked = steady.generate("4 + 4 =")
    with_shot = steady.generate("1 + 1 =", [("4 + 4 =", problem, solution)])
    assert with_shot[: len(asked)] == asked
    written = with_shot[len(asked) :]
    if steady.style == "chat":
        written = written[: next(i for i, token in enumerate(written) if token in steady.stop_ids)]
    example = parse_example(text_of(steady.tokenizer, written).split("\n\n")[0], finished=True)
    assert example == Example(problem, solution, True, "")
    sequence = text_of(steady.tokenizer, steady.solve(example.problem) + steady.solution(example.solution))
    assert problem in sequence and solution in sequence


# ---- copies and duplicates


def good(problem: str, solution: str = "Answer: 1") -> Example:
    return Example(problem, solution, True, "")


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("Compute 4 + 3 =", "copy"),
        ("  compute 4+3 = ?", "copy"),
        ("Now compute 4 + 3 = and explain.", "copy"),
        ("Compute 4 + 3", ""),
        ("Compute 4 + 30 =", ""),
        ("Compute 14 + 3 =", ""),
        ("Compute 4 - 3 =", ""),
    ],
)
def test_copies_of_the_target(problem: str, reason: str) -> None:
    (out,) = filter_examples([good(problem)], "Compute 4 + 3 =")
    assert (out.valid, out.reason) == (not reason, reason)


def test_a_bare_target_is_found_by_whole_numbers() -> None:
    examples = [good("14 + 3 ="), good("4 + 3 = ?"), good("4 + 3.5 =")]
    assert [e.reason for e in filter_examples(examples, "4 + 3 =")] == ["", "copy", ""]


def test_duplicates_are_of_an_earlier_valid_one() -> None:
    invalid = Example("a?", "Answer: 1", False, "truncated")
    examples = [invalid, good("a?"), good("A ?"), good("a?", "Answer: 2"), good("b?"), good("b?"), invalid]
    out = filter_examples(examples, "target")
    assert [e.reason for e in out] == ["truncated", "", "duplicate", "", "", "duplicate", "truncated"]
    assert [(e.problem, e.solution) for e in out] == [(e.problem, e.solution) for e in examples]
