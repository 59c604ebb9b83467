"""The service of `mass-adapt serve` (mass/serve.py): a model that adapts to each problem, behind OpenAI's chat API.

POST /v1/chat/completions (streaming too), GET /v1/models, /healthz, and /metrics for Prometheus. The method is the suffix
of a model's name, `demo:vote`. Requests that arrive together adapt together (mass/batcher.py).
"""

import asyncio
import dataclasses
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mass.batcher import Batcher, Closed, Done, Full, Job
from mass.chat import Refusal, problem_of, read_chat
from mass.choices import Kit
from mass.errors import MassError
from mass.filerun import as_fields
from mass.methods import AUTO, METHODS, find_for

# how often it is looked whether a client has left, and how often a stream that has nothing to say yet shows that it lives
LOOK_SECONDS, ALIVE_SECONDS = 0.2, 5.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may take: bytes of its body, seconds from its arrival; and problems that may wait in all."""

    body: int = 1 << 18
    seconds: float = 300.0
    queue: int = 256


def make_app(
    kit: Kit,
    name: str,
    default: str,
    *,
    batch: int = 8,
    window: float = 0.02,
    limits: Limits = Limits(),
    token: str | None = None,
    threads: int = 1,
    host: str = "localhost",
) -> FastAPI:
    """The service of one model, called `name`; `name` alone is the method `default`. `token`: what a request must carry.
    `host`: the address of this machine that it listens on."""
    methods = [m for m in [*METHODS, AUTO] if _usable(kit, m)]
    batcher = Batcher(kit, batch=batch, window=window, queue=limits.queue, threads=threads)
    metrics = Metrics(batcher)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="mass", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if token is None:
        # a page in the user's browser must not reach us through a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])
    app.state.batcher = batcher

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        metrics.requests.labels(refusal.status).inc()
        return JSONResponse(refusal.body(), refusal.status, dict(refusal.headers or {}))

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            raise Refusal(401, "a token is wanted: Authorization: Bearer TOKEN", "invalid_api_key")

    @app.get("/healthz")
    async def health() -> Response:
        return JSONResponse(
            {"status": "ok"} if batcher.alive else {"status": "stopped"}, 200 if batcher.alive else 503
        )

    @app.get("/metrics")
    async def measured(request: Request) -> Response:
        check_token(request)
        return Response(
            generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_token(request)
        names = [name, *(f"{name}:{method}" for method in methods)]
        data = [{"id": each, "object": "model", "created": 0, "owned_by": "mass"} for each in names]
        return JSONResponse({"object": "list", "data": data})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        check_token(request)
        asked = await read_chat(request, limits.body)
        base, _, method = asked.model.partition(":")
        if base != name or (method and method not in methods):
            raise Refusal(
                404,
                f"there is no model {asked.model!r}: GET /v1/models lists {name} and its methods",
                "model_not_found",
            )
        most = asked.max_completion_tokens or asked.max_tokens or kit.answering.max_new_tokens
        if most > kit.answering.max_new_tokens:
            raise Refusal(
                400,
                f"max_tokens={most}: this service writes up to {kit.answering.max_new_tokens} (generate.answer_tokens)",
                "invalid_value",
            )
        job = Job(problem_of(asked), method or default, most, time.monotonic() + limits.seconds)
        try:
            batcher.submit(job)
        except Full:
            raise Refusal(
                429,
                f"{limits.queue} problems are waiting already: try again later",
                "queue_full",
                {"Retry-After": "5"},
            ) from None
        except Closed:
            raise Refusal(503, "the service is stopping", "stopping") from None
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = _events(request, batcher, metrics, job, asked.model, limits, usage)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        async for done in _wait(request, batcher, job, limits):
            if done is not None:
                metrics.count(done)
                return JSONResponse(_completion(done, asked.model))
        metrics.requests.labels(499).inc()
        # the client has left: nobody reads this
        return Response(status_code=499)

    return app


class Metrics:
    """What /metrics shows, in a registry of its own."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        often = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self.requests = Counter("mass_requests", "chat requests by HTTP status (499: client left)", ["status"], registry=self.registry)  # fmt: skip
        self.tokens = Counter(
            "mass_tokens", "tokens spent on answered requests", ["kind"], registry=self.registry
        )
        self.waited = Histogram(
            "mass_wait_seconds", "time in the queue", buckets=often, registry=self.registry
        )
        self.worked = Histogram(
            "mass_work_seconds", "time of a request's batch", buckets=often, registry=self.registry
        )
        self.together = Histogram("mass_batch_problems", "problems in a request's batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry)  # fmt: skip
        Gauge("mass_queue_problems", "problems in the queue", registry=self.registry).set_function(lambda: batcher.waiting)  # fmt: skip

    def count(self, done: Done) -> None:
        self.requests.labels(200).inc()
        self.tokens.labels("generated").inc(done.record.tokens.generated)
        self.tokens.labels("trained").inc(done.record.tokens.trained)
        self.waited.observe(done.waited)
        self.worked.observe(done.worked)
        self.together.observe(done.together)


def _usable(kit: Kit, method: str) -> bool:
    try:
        find_for(kit, method)
    except MassError:
        return False
    return True


async def _wait(request: Request, batcher: Batcher, job: Job, limits: Limits) -> AsyncIterator[Done | None]:
    """None every now and then, and at last what came of the job; ends without it when the client has left."""
    result = asyncio.wrap_future(job.result)
    try:
        while not result.done():
            await asyncio.wait({result}, timeout=LOOK_SECONDS)
            if result.done():
                break
            if await request.is_disconnected():
                return
            if not job.wanted:
                raise TimeoutError
            yield None
        done = result.result()
    except (TimeoutError, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and not result.cancelled():
            raise
        raise Refusal(
            504, f"not done within {limits.seconds:g} s (time limit of the service)", "timeout"
        ) from None
    except Closed:
        raise Refusal(503, "the service is stopping", "stopping") from None
    except MassError as error:
        raise Refusal(400, str(error), "invalid_request") from None
    except Exception as error:
        raise Refusal(
            500, f"the problem failed ({type(error).__name__}): see the service's log", "failed"
        ) from None
    finally:
        batcher.leave(job)
        result.cancel()
    if done.record.error is not None:
        code = "context_length_exceeded" if done.record.error.startswith("too long") else "invalid_request"
        raise Refusal(400, done.record.error, code)
    yield done


async def _events(
    request: Request, batcher: Batcher, metrics: Metrics, job: Job, model: str, limits: Limits, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: a sign of life every now and then, the answer's text when it is there, the end."""
    common = {"id": _new_id(), "object": "chat.completion.chunk", "created": int(time.time()), "model": model}

    def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
        return f"data: {json.dumps({**common, 'choices': choices, **more})}\n\n"

    yield event({"role": "assistant", "content": ""})
    alive = time.monotonic()
    answered = False
    try:
        async for done in _wait(request, batcher, job, limits):
            if done is None:
                if time.monotonic() > alive + ALIVE_SECONDS:
                    alive = time.monotonic()
                    yield ": adapting\n\n"
                continue
            answered = True
            metrics.count(done)
            whole = _completion(done, model)
            (choice,) = whole["choices"]
            yield event({"content": choice["message"]["content"]})
            yield event({}, choice["finish_reason"], mass=whole["mass"])
            if usage:
                yield f"data: {json.dumps({**common, 'choices': [], 'usage': whole['usage']})}\n\n"
            yield "data: [DONE]\n\n"
    except Refusal as refusal:
        answered = True
        metrics.requests.labels(refusal.status).inc()
        # the status has gone out already; OpenAI's client raises what it finds here
        yield f"data: {json.dumps(refusal.body())}\n\n"
    finally:
        if not answered:
            metrics.requests.labels(499).inc()
        batcher.leave(job)


def _completion(done: Done, model: str) -> dict[str, Any]:
    record = done.record
    message = {"role": "assistant", "content": record.solution, "refusal": None}
    spent = {"prompt_tokens": done.prompt_tokens, "completion_tokens": record.tokens.generated}
    return {
        "id": _new_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": message,
                "finish_reason": "stop" if record.finished else "length",
                "logprobs": None,
            }
        ],
        "usage": {**spent, "total_tokens": sum(spent.values())},
        "mass": as_fields(record),
    }


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"
