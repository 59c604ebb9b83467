"""Examples by a second model, local or at an address that may be slow, broken or away."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from handmade import PLAIN
from tiny import tiny_lm

from mass import command, teacher
from mass.choices import Kit, Teacher
from mass.errors import MassError
from mass.generate import Rollout
from mass.lora import LoraShape
from mass.methods import METHODS, solve
from mass.model import language_model
from mass.practice import Sampling
from mass.problems import Problem
from mass.prompts import make_prompts
from mass.wanted import plan


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    """An address that answers as `behave` says, and what it was asked."""
    asked: list[Any] = []
    behave: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, self.headers.get("Authorization")))
            problem = next(p for p in behave if p in body["messages"][-1]["content"])
            what = behave[problem]
            if what == "slow":
                time.sleep(1.5)
                return
            if isinstance(what, int):
                self.send_response(what)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()
                return
            text = f"Problem: {what} {body['seed']}?\nSolution: Answer: 3"
            data = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
            if what == "silent":
                data = json.dumps({"choices": [{"message": {"content": " \n"}}]})
            data = {"broken": "{", "endless": " " * (teacher.LONGEST + 1)}.get(what, data)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield f"http://127.0.0.1:{httpd.server_port}/v1#big", asked, behave
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def address(url: str, *rest: Any) -> Teacher:
    there = teacher.endpoint(url)
    assert there is not None
    return teacher.address(*there, *rest)


def test_teacher_at_an_address(kit: Kit, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked, behave = server
    behave |= {
        "4 + 3": "What is 1 + 2, or",
        "slow one": "slow",
        "refused": 503,
        "moved": 302,
        "torn": "broken",
    }
    monkeypatch.setenv("MASS_TEACHER_KEY", "sesame")
    far = address(url, kit.lm.tokenizer, kit.writing, 0.5)
    open_gate = replace(METHODS["tt-d"], gate=None)
    monkeypatch.setitem(METHODS, "tt-d", open_gate)
    problems = [PLAIN, *(Problem(x, x) for x in ("slow one", "refused", "moved", "torn"))]
    started = time.monotonic()
    kit = replace(kit, teacher=far, examples=2)
    records = solve(kit, problems, "tt-d", baselines=False)
    assert time.monotonic() - started < 20
    good = records[0]
    assert (
        all(e.valid and e.problem.startswith("What is 1 + 2") for e in good.examples) and len(good.steps) == 2
    )
    assert good.examples[0].problem != good.examples[1].problem and good.tokens.generated > 60
    for record, reason in zip(
        records[1:],
        ("gave nothing within 0.5 s 2", "answers 503", "answers 302", "reply cannot be read"),
        strict=True,
    ):
        assert record.error is None and record.steps == () and record.solution
        assert record.note.startswith("none of 2 examples is valid (teacher") and reason in record.note
    path, body, key = asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "big" and body["max_tokens"] == 10
    assert key == "Bearer sesame" and [m["role"] for m in body["messages"]] == ["user"]
    # alone as beside those that fail
    (alone,) = solve(kit, [PLAIN], "tt-d", baselines=False)
    assert alone.solution == good.solution


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("endless", f"teacher wrote more than {teacher.LONGEST} bytes"),
        ("silent", "teacher wrote nothing"),
        ("away", r"teacher cannot be reached \(.*refused"),
    ],
)
def test_what_an_address_did_not_give_says_why(kit: Kit, server: Any, what: str, reason: str) -> None:
    url, _, behave = server
    behave["4 + 3"] = what
    if what == "away":
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1#big"
    far = address(url, kit.lm.tokenizer, kit.writing, 10.0)
    ((one, other),) = far([PLAIN.text], [()], [[1, 2]])
    assert isinstance(one, str) and one == other and re.match(reason, one)


def test_a_local_teacher_s_tokens_are_the_student_s(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_lm("qwen2")
    prompts = make_prompts(other.tokenizer, "plain")
    student: Any = SimpleNamespace(encode=lambda text, **_: [7] * 2 * len(text))
    near = teacher.local(other, prompts, Sampling(10, 1.0), student)
    (own,) = near([PLAIN.text], [()], [[1, 2]])
    for r in own:
        assert isinstance(r, Rollout) and r.text and len(r.tokens) == len(r.logprobs) == 2 * len(r.text)
    # a text that is empty has cost a token
    student = SimpleNamespace(encode=lambda text, **_: [])
    (silent,) = teacher.local(other, prompts, Sampling(10, 1.0), student)([PLAIN.text], [()], [[1]])
    assert isinstance(silent[0], Rollout) and len(silent[0].tokens) == 1


def test_a_prompt_that_a_local_teacher_has_no_room_for_is_that_problem_s_reason(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_lm("qwen2")
    prompts = make_prompts(other.tokenizer, "plain")
    long = Problem("long", "word " * 200)
    size = len(prompts.generate(long.text))
    monkeypatch.setattr(teacher, "context_length", lambda _: size + 9)
    near = teacher.local(other, prompts, Sampling(10, 1.0), kit.lm.tokenizer)
    monkeypatch.setitem(METHODS, "tt-d", replace(METHODS["tt-d"], gate=None))
    plain, failed = solve(replace(kit, teacher=near, examples=2), [PLAIN, long], "tt-d", baselines=False)
    assert failed.error is None and failed.solution and "the prompt" not in plain.note
    assert (
        f"2 examples is valid (teacher's context of {size + 9} tokens does not hold its prompt of {size} and 10"
        in failed.note
    )
    assert plain.examples and not any(e.reason.startswith("teacher") for e in plain.examples)
    # also where none has room
    assert near([long.text], [()], [[1, 2]]) == [[failed.examples[0].reason] * 2]


def test_teacher_that_is_a_model_writes_and_the_student_learns(
    kit: Kit, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = language_model(str(chain), LoraShape(2, 4.0, ("all-linear",)), dtype="fp32", device="cpu")
    near = teacher.local(other, make_prompts(other.tokenizer, "plain"), Sampling(16, 1.0), kit.lm.tokenizer)
    monkeypatch.setitem(METHODS, "tt-d", replace(METHODS["tt-d"], gate=None))
    (record,) = solve(replace(kit, teacher=near, examples=2), [PLAIN], "tt-d", baselines=False)
    assert any(e.valid for e in record.examples) and len(record.steps) == 2
    assert record.steps[1].after < record.steps[0].before
    with pytest.raises(
        MassError, match="tt-d has its examples from a stronger model: name it with --teacher"
    ):
        solve(kit, [PLAIN], "tt-d")


def test_an_address_is_looked_at_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert teacher.endpoint("https://h:1/v1/#m") == ("https://h:1/v1/chat/completions", "m")
    assert teacher.endpoint("some/model") is None
    wanted = plan(None, "tiny:llama", [])
    for wrong in ("http://x/v1", "http://#m"):
        with pytest.raises(MassError, match="an address is written http://HOST:PORT/v1#MODEL"):
            replace(wanted, teacher=wrong).method("tt-d")
    # a method that asks no teacher has none loaded
    some = replace(wanted, teacher="tiny:llama")
    assert some.of_method("tt-d") == some and some.of_method("quest") == wanted
    monkeypatch.setattr(command, "build_kit", lambda _: pytest.fail("loaded"))
    words = ["--model", "tiny:llama", "--method", "tt-d", "--teacher", "http://x/v1", "--problem", "1 + 1"]
    assert command.main(words) == 2
