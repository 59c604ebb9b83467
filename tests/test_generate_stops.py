"""Where a row of generated text ends, and what that leaves of the text and of the other rows."""

import types
from typing import Any

from writers import Letters, some_prompts

from mass.generate import generate


def test_stop_ids_end_a_row_and_leave_no_trace_in_its_text(llama: Any) -> None:
    free = generate(llama, [[5, 6, 7]], seeds=[3], max_new_tokens=20)[0]
    assert not free.finished
    assert free.text == Letters().decode(free.tokens, skip_special_tokens=True)
    stop = free.tokens[9]
    row = generate(llama, [[5, 6, 7]], seeds=[3], max_new_tokens=20, stop_ids=[stop])[0]
    first = free.tokens.index(stop)
    assert row.finished
    assert row.tokens == free.tokens[: first + 1]
    assert row.text == Letters().decode(free.tokens[:first], skip_special_tokens=True)


def test_stop_strings_end_a_row_at_the_token_that_completes_them(llama: Any) -> None:
    free = generate(llama, [[5, 6, 7]], seeds=[3], max_new_tokens=20)[0]
    # no special token among those that the string is made of
    assert min(free.tokens[:9]) > 2
    string = free.text[6:9]
    row = generate(llama, [[5, 6, 7]], seeds=[3], max_new_tokens=20, stop_strings=["not in it", string])[0]
    assert row.finished
    assert row.tokens == free.tokens[:9]
    assert row.text == free.text[:6]
    at_the_limit = generate(llama, [[5, 6, 7]], seeds=[3], max_new_tokens=9, stop_strings=[string])[0]
    assert at_the_limit.finished


def test_stop_strings_across_and_inside_tokens() -> None:
    from mass.generate import _Stop

    words = [" the", "\n", "\nEnd", " of.", "", "Prob", "lem:", "�", " Problem: x"]
    tokenizer = types.SimpleNamespace(decode=lambda ids, **_: "".join(words[i] for i in ids))
    stop = _Stop(tokenizer, [4], ["\nEnd of", "Problem:"])
    assert stop.ends([0, 4])
    assert stop.ends([0, 2, 3])
    assert stop.ends([1, 5, 6])
    assert stop.ends([8])
    assert not stop.ends([2, 0])
    assert not stop.ends([5, 0, 6])
    assert stop.text([0, 2, 3]) == " the"
    assert stop.text([0, 8]) == " the "
    assert stop.text([0, 0, 4]) == " the the"


def test_rows_that_leave_do_not_change_the_others(llama: Any) -> None:
    prompts = some_prompts(30, seed=9)
    settings: dict[str, Any] = {"seeds": range(30), "max_new_tokens": 40}
    free = generate(llama, prompts, **settings)
    stops = list(range(20, 30))
    rows = generate(llama, prompts, stop_ids=stops, **settings)
    assert 5 < sum(row.finished for row in rows) < 30
    for row, whole in zip(rows, free, strict=True):
        assert row.tokens == whole.tokens[: len(row.tokens)]
        assert row.finished or len(row.tokens) == 40
