"""What a chat request may say: its body read within limits and checked, the problem in it, and what is refused."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mass.problems import BadLine, Problem, as_problems

BODY_SECONDS = 30.0


class Refusal(Exception):
    """An answer that is no completion: HTTP status, what to say, and OpenAI's code for it."""

    def __init__(
        self, status: int, message: str, code: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class Text(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user"]
    content: str | list[Text]
    name: str | None = None

    @property
    def text(self) -> str:
        return (
            self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        )


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Chat(BaseModel):
    """The part of OpenAI's request that has a meaning here. Whatever would change the answer there and not here is refused."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    demonstrations: list[Any] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Literal[1] | None = None
    # answers are greedy, or a method's own samples
    temperature: Annotated[float, Field(ge=0, le=0)] | None = None
    # without effect on a greedy answer
    top_p: float | None = None
    seed: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None


async def read_chat(request: Request, limit: int) -> Chat:
    """The request's body, checked; `limit` in bytes. Nothing larger is ever held. Raises Refusal."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be application/json", "unsupported_media_type")

    async def whole() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise Refusal(413, f"the request is larger than {limit} bytes", "request_too_large")
        return bytes(body)

    try:
        body = await asyncio.wait_for(whole(), BODY_SECONDS)
    except TimeoutError:
        raise Refusal(
            408, f"the request did not arrive within {BODY_SECONDS:.0f} s", "request_timeout"
        ) from None
    try:
        return Chat.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        hint = {
            "temperature": ": answers are greedy; leave it out, or set 0",
            "messages": ": one user message, and system messages in front of it",
        }.get(str(first["loc"][0]) if first["loc"] else "", "")
        raise Refusal(400, f"{where}: {first['msg']}{hint}", "invalid_request") from None


def problem_of(asked: Chat) -> Problem:
    """The user's message; what system messages say stands above it. Raises Refusal."""
    *above, last = asked.messages
    if last.role != "user" or any(message.role == "user" for message in above):
        raise Refusal(
            400,
            "messages: one problem a request: one user message, the last one, and system messages in front of it. "
            "Solved examples go into `demonstrations`, a list of [input, output]",
            "invalid_request",
        )
    text = "\n\n".join(message.text for message in asked.messages)
    (item,) = as_problems({"problem": text, "demonstrations": asked.demonstrations})
    if isinstance(item, BadLine):
        raise Refusal(400, f"the problem cannot be used: {item.reason}", "invalid_request")
    return item
