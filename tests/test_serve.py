"""mass-adapt serve: the service as OpenAI's own client sees it, under load, at its limits, and when clients leave (the command: test_serve_command.py)."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import uvicorn
from chain import save_chain
from openai import APIError, APIStatusError, OpenAI

from mass import batcher
from mass.api import Limits, make_app
from mass.choices import Kit
from mass.errors import MassError
from mass.kit import build_kit
from mass.methods import METHODS, Record, solve
from mass.problems import Problem, Task, text_problem
from mass.wanted import plan

SHORT = ["model.dtype=fp32", "prompt.style=plain", "generate.examples=2", "generate.max_new_tokens=16"]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """A model that writes valid examples, so that requests really adapt."""
    folder = save_chain(tmp_path_factory.mktemp("chain"))
    return build_kit(plan(None, str(folder), [*SHORT, "generate.answer_tokens=8"]))


@pytest.fixture(scope="module")
def slow_kit() -> Kit:
    """A random model, which never ends by itself: an answer takes seconds."""
    return build_kit(plan(None, "tiny:llama", [*SHORT, "generate.answer_tokens=1800"]))


@contextmanager
def running(kit: Kit, **options: Any) -> Iterator[SimpleNamespace]:
    """The service in a thread, an OpenAI client, and /metrics as a dict."""
    app = make_app(kit, "demo", "quest", **options)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    token = options.get("token") or "none"
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0, timeout=60)

    def metrics() -> dict[str, float]:
        text = get("/metrics", {"Authorization": f"Bearer {token}"})[1]
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if not line.startswith("#")
        }

    def get(path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> tuple[int, str]:
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def ask(text: str, method: str = "demo:quest", **more: Any) -> Any:
        return client.chat.completions.create(
            model=method, messages=[{"role": "user", "content": text}], **more
        )

    try:
        yield SimpleNamespace(
            client=client, metrics=metrics, get=get, ask=ask, port=port, batcher=app.state.batcher
        )
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not app.state.batcher.alive


@pytest.fixture(scope="module")
def service(kit: Kit) -> Iterator[SimpleNamespace]:
    with running(kit) as started:
        yield started


def alone(kit: Kit, text: str, method: str = "quest", most: int = 8) -> Record:
    short = replace(kit, answering=replace(kit.answering, max_new_tokens=most))
    return solve(short, [text_problem(text)], method, baselines=False)[0]


def test_an_answer_is_that_of_the_command_with_its_curriculum(service: SimpleNamespace, kit: Kit) -> None:
    answer = service.ask("What is 3 - 2?")
    wanted = alone(kit, "What is 3 - 2?")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", wanted.solution) and wanted.steps
    assert choice.finish_reason == ("stop" if wanted.finished else "length")
    assert answer.model == "demo:quest" and answer.object == "chat.completion"
    assert answer.usage.completion_tokens == wanted.tokens.generated
    assert answer.usage.prompt_tokens == len(kit.prompts.solve("What is 3 - 2?"))
    record = answer.model_extra["mass"]
    assert record["answer"] == wanted.answer and record["error"] is None and len(record["examples"]) == 2
    # another thread's buffers lie elsewhere, and products round by how they lie
    assert [s["after"] for s in record["steps"]] == pytest.approx([s.after for s in wanted.steps], rel=1e-4)
    # the bare name is the default method; another method, a shorter answer
    assert service.ask("What is 3 - 2?", "demo").model_extra["mass"]["method"] == "quest"
    vote = service.ask("What is 3 - 2?", "demo:vote").model_extra["mass"]
    assert vote["method"] == "vote" and vote["answer"] == alone(kit, "What is 3 - 2?", "vote").answer
    cut = service.ask("What is 3 - 2?", "demo:none", max_tokens=1)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 1
    # a system message stands above the problem
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "What is 3 - 2?"}]}]  # fmt: skip
    both = service.client.chat.completions.create(model="demo:none", messages=messages, temperature=0, seed=3)
    assert both.model_extra["mass"]["problem"] == "Be brief.\n\nWhat is 3 - 2?"


def test_streaming(service: SimpleNamespace, kit: Kit) -> None:
    chunks = list(service.ask("What is 5 - 3?", stream=True, stream_options={"include_usage": True}))
    wanted = alone(kit, "What is 5 - 3?")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == wanted.solution and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason and chunks[-2].model_extra["mass"]["answer"] == wanted.answer
    assert chunks[-1].usage.completion_tokens == wanted.tokens.generated and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1
    with pytest.raises(APIStatusError, match="too long: the prompt has") as raised:
        service.ask("x " * 3000)
    assert (raised.value.status_code, raised.value.code) == (400, "context_length_exceeded")
    # what shows itself after the first event is raised by the client
    with pytest.raises(APIError, match="too long: the prompt has"):
        list(service.ask("x " * 3000, stream=True))


def test_models_health_and_metrics(service: SimpleNamespace) -> None:
    names = [model.id for model in service.client.models.list()]
    # no scorer and no training problems here
    free = [name for name in METHODS if name not in ("mass", "shuffled", "pick", "in-context", "random")]
    assert names[0] == "demo" and {"demo:quest", "demo:vote", "demo:none"} <= set(names)
    assert not {f"demo:{name}" for name in METHODS if name not in free} & set(names)
    assert service.get("/healthz") == (200, '{"status":"ok"}')
    before = service.metrics()
    service.ask("What is 4 - 3?")
    after = service.metrics()
    for name, more in [('mass_requests_total{status="200"}', 1), ("mass_wait_seconds_count", 1)]:
        assert after[name] == before.get(name, 0) + more
    assert after['mass_tokens_total{kind="trained"}'] > before.get('mass_tokens_total{kind="trained"}', 0)
    assert after["mass_queue_problems"] == 0


def test_requests_that_arrive_together_adapt_together(kit: Kit) -> None:
    texts = [f"What is {i} - {i - 1 - i % 3}?" for i in range(4, 10)]
    with running(kit, window=1.0, batch=4) as service, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(service.ask, texts))
        metrics = service.metrics()
        assert metrics['mass_batch_problems_bucket{le="2.0"}'] == 2
        assert metrics['mass_batch_problems_bucket{le="4.0"}'] == 6
    for text, answer in zip(texts, answers, strict=True):
        wanted = alone(kit, text)
        assert answer.choices[0].message.content == wanted.solution
        assert answer.model_extra["mass"]["problem"] == text


@pytest.mark.slow
def test_load_loses_and_mixes_nothing_and_memory_is_flat() -> None:
    """200 requests from 16 clients, plain and streaming, of three methods."""
    kit = build_kit(plan(None, "tiny:llama", [*SHORT, "generate.answer_tokens=8"]))
    methods = ("none", "vote", "quest")

    def one(service: SimpleNamespace, i: int) -> tuple[str, dict[str, Any]]:
        text, method = f"What is {i} + {i % 7}? (marker {i:04})", f"demo:{methods[i % 3]}"
        if i % 4:
            answer = service.ask(text, method)
            return answer.choices[0].message.content, answer.model_extra["mass"]
        chunks = list(service.ask(text, method, stream=True))
        return "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].model_extra["mass"]

    with running(kit) as service, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: one(service, i), range(1000, 1100)))
        before = psutil.Process().memory_info().rss
        answers = list(pool.map(lambda i: one(service, i), range(200)))
        grown = psutil.Process().memory_info().rss - before
        metrics = service.metrics()
    assert metrics['mass_requests_total{status="200"}'] == 300 and metrics["mass_batch_problems_sum"] > 450
    assert grown < 16e6, f"{grown / 1e6:.1f} MB"
    for i, (content, record) in enumerate(answers):
        assert f"(marker {i:04})" in record["problem"] and content == record["solution"]
        assert record["method"] == methods[i % 3] and record["error"] is None
    for i in range(0, 200, 11):
        text = f"What is {i} + {i % 7}? (marker {i:04})"
        assert answers[i][0] == alone(kit, text, methods[i % 3]).solution


def test_a_client_that_leaves_frees_its_work(slow_kit: Kit) -> None:
    passes = []
    embedding: Any = slow_kit.lm.hf.get_input_embeddings()
    counting = embedding.register_forward_pre_hook(lambda *_: passes.append(1))

    def leave(service: SimpleNamespace, stream: bool) -> None:
        with pytest.raises(APIError) if not stream else pytest.raises(Exception):  # noqa: B017
            client = service.client.with_options(timeout=0.4)
            words = {"model": "demo:none", "messages": [{"role": "user", "content": "x"}]}
            list(client.chat.completions.create(**words, stream=stream))

    with running(slow_kit, batch=1) as service:
        for stream in (False, True):
            count = len(passes)
            leave(service, stream)
            begin = time.monotonic()
            service.ask("y", "demo:none", max_tokens=2)
            assert time.monotonic() - begin < 3 and 10 < len(passes) - count < 1500
        # one that waits is taken out of the queue, while the one at work goes on
        with ThreadPoolExecutor(1) as pool:
            at_work = pool.submit(service.ask, "z", "demo:none")
            time.sleep(0.3)
            assert service.batcher.waiting == 0
            leave(service, False)
            time.sleep(0.5)
            assert service.batcher.waiting == 0 and not at_work.done()
            assert at_work.result().usage.completion_tokens == 1800
        assert service.metrics()['mass_requests_total{status="499"}'] == 3
    counting.remove()
    assert not embedding._forward_pre_hooks


def test_limits(slow_kit: Kit) -> None:
    with running(slow_kit, batch=1, limits=Limits(body=2000, seconds=0.8, queue=1)) as service:

        def status(**body: Any) -> tuple[int, str, str]:
            words = {"model": "demo:none", "messages": [{"role": "user", "content": "x"}]} | body
            with pytest.raises(APIStatusError) as raised:
                service.client.chat.completions.create(**words)
            error = raised.value.body
            return raised.value.status_code, str(error["code"]), str(error["message"])  # type: ignore[index]

        user = {"role": "user", "content": "x"}
        cases: list[tuple[dict[str, Any], int, str]] = [
            ({"messages": [{"role": "user", "content": "x" * 3000}]}, 413, "larger than 2000 bytes"),
            ({"messages": [{"role": "user", "content": " "}]}, 400, "no 'problem'"),
            ({"messages": [user, {"role": "assistant", "content": "y"}, user]}, 400, "messages.1.role"),
            ({"messages": [user, user]}, 400, "one problem a request"),
            ({"messages": []}, 400, "messages"),
            ({"model": "other"}, 404, "there is no model 'other'"),
            ({"model": "demo:mass"}, 404, "there is no model 'demo:mass'"),
            ({"model": "demo:"+ "z" * 50}, 404, "there is no model"),
            ({"temperature": 0.7}, 400, "answers are greedy"),
            ({"n": 2}, 400, "n: Input should be 1"),
            ({"stop": ["a"]}, 400, "stop: Extra inputs"),
            ({"max_tokens": 1801}, 400, "writes up to 1800"),
            ({"extra_body": {"demonstrations": [["a"]]}}, 400, "'demonstrations' is not a list of"),
        ]  # fmt: skip
        for body, code, sentence in cases:
            found = status(**body)
            assert found[0] == code and sentence in found[2], (body, found)
        chat, json_type = "/v1/chat/completions", {"Content-Type": "application/json"}
        assert service.get(chat, {"Content-Type": "text/plain"}, b"{}")[0] == 415
        for broken in (b"{", b"\xff", b"[]", b"null", b'{"model": "demo", "messages": "x"}'):
            assert service.get(chat, json_type, broken)[0] == 400
        assert service.get("/healthz", {"Host": "evil.example"})[0] == 400
        assert service.get("/v1/nothing")[0] == 404 and service.get(chat)[0] == 405
        # one at work, one waits, the third is too many; time is over for both
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(status)
            time.sleep(0.2)
            second = pool.submit(status)
            time.sleep(0.2)
            full = status()
            assert full[:2] == (429, "queue_full")
            assert first.result()[:2] == second.result()[:2] == (504, "timeout")
        assert service.batcher.waiting == 0
        # and nothing of it is left: the next one has the model to itself
        assert service.ask("x", "demo:none", max_tokens=2).usage.completion_tokens == 2
        service.batcher.close()
        assert status()[:2] == (503, "stopping") and service.get("/healthz")[0] == 503


def test_stopping_gives_back_what_waits_and_what_is_at_work(slow_kit: Kit) -> None:
    with running(slow_kit, batch=1) as service, ThreadPoolExecutor(2) as pool:
        both = [pool.submit(service.ask, text, "demo:none") for text in "ab"]
        time.sleep(0.4)
        begin = time.monotonic()
        service.batcher.close()
        errors = [future.exception() for future in both]
        assert [error.status_code for error in errors] == [503, 503] and time.monotonic() - begin < 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("failure", "status"), [(RuntimeError("secret detail"), 500), (MassError("use another"), 400)]
)
def test_one_that_fails_fails_alone(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, failure: Exception, status: int
) -> None:
    def poisoned(kit: Kit, problems: Any, *words: Any, **more: Any) -> Any:
        if any("poison" in p.text for p in problems):
            raise failure
        return solve(kit, problems, *words, **more)

    monkeypatch.setattr(batcher, "solve", poisoned)
    with running(kit, window=0.5) as service, ThreadPoolExecutor(3) as pool:
        texts = ["What is 3 - 2?", "poison", "What is 5 - 3?"]
        answers = [pool.submit(service.ask, text) for text in texts]
        error = answers[1].exception()
        assert isinstance(error, APIStatusError) and error.status_code == status
        assert "secret" not in str(error) and ("use another" in str(error)) is (status == 400)
        found = [answers[i].result().choices[0].message.content for i in (0, 2)]
        assert service.get("/healthz")[0] == 200
    # the model is the service's own as long as it runs
    assert found == [alone(kit, texts[i]).solution for i in (0, 2)]


def test_a_problem_of_the_pool_that_leaves_too_few_shots_is_refused_alone(kit: Kit) -> None:
    pool = [
        Task(Problem(f"t{i}", f"What is {i} - 1?"), str(i - 1), f"Answer: {i - 1}", "x", "exact")
        for i in (2, 3)
    ]
    kit = replace(kit, pool=pool, solve_shots=2)
    with running(kit, window=0.5) as service, ThreadPoolExecutor(2) as threads:
        texts = ["What is 5 - 3?", "What is 2 - 1?"]
        good, bad = [threads.submit(service.ask, text, "demo:none") for text in texts]
        assert good.result().choices[0].message.content == alone(kit, texts[0], "none").solution
        with pytest.raises(APIStatusError, match="2 shots wanted and 1 problems set aside") as raised:
            bad.result()
        assert raised.value.status_code == 400
        assert service.metrics()['mass_batch_problems_bucket{le="1.0"}'] == 0, "nothing was done again"


def test_token(kit: Kit) -> None:
    with running(kit, token="s3cret") as service:
        assert service.client.models.list().data
        for path in ("/v1/models", "/metrics"):
            assert service.get(path)[0] == service.get(path, {"Authorization": "Bearer s3cre"})[0] == 401
        assert service.get("/v1/chat/completions", {}, b"{}")[0] == 401 and service.get("/healthz")[0] == 200
        # from elsewhere it goes by another name
        assert service.get("/healthz", {"Host": "adapt.example"})[0] == 200


def test_an_address_of_this_machine_is_listened_to(kit: Kit) -> None:
    with running(kit, host="127.0.0.2") as service:
        # an address of this machine's own that was asked for, and no other name
        assert service.get("/healthz", {"Host": "127.0.0.2"})[0] == 200
        assert service.get("/healthz", {"Host": "evil.example"})[0] == 400
