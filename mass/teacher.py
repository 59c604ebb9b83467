"""A stronger model that writes practice examples: a second local model, or an OpenAI-compatible address.

What an address could not give is a reason for that example alone. Its key, where it wants one, is read from the
environment variable MASS_TEACHER_KEY; redirects are not followed, so that the key goes nowhere else.
"""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence as Seq
from dataclasses import replace
from queue import Empty, Queue
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from mass.choices import Teacher, Written
from mass.errors import MassError
from mass.generate import Rollout
from mass.model import LanguageModel, context_length
from mass.practice import Sampling, draw
from mass.prompts import GENERATE_INSTRUCTION, Prompts, chat_turns

# requests under way at one time, and the longest reply that is read
AT_ONCE, LONGEST = 8, 2**20

Shots = Seq[tuple[str, str, str]]


def local(
    lm: LanguageModel, prompts: Prompts, sampling: Sampling, tokenizer: PreTrainedTokenizerBase
) -> Teacher:
    """A model in this process, with its own tokenizer and prompts. `tokenizer` is the student's: it counts what was written."""
    longest = context_length(lm.hf)

    def write(targets: Seq[str], shots: Seq[Shots], seeds: Seq[Seq[int]]) -> list[list[Written]]:
        asked = [prompts.generate(text, own) for text, own in zip(targets, shots, strict=True)]
        fits = [len(prompt) + sampling.max_new_tokens <= longest for prompt in asked]
        wanted = [list(own) if ok else [] for own, ok in zip(seeds, fits, strict=True)]
        drawn = draw(lm, prompts, asked, wanted, sampling, None)
        out: list[list[Written]] = []
        for prompt, own, ok, count in zip(asked, drawn, fits, map(len, seeds), strict=True):
            reason = (
                f"teacher's context of {longest} tokens does not hold its prompt of {len(prompt)} and "
                f"{sampling.max_new_tokens} after it"
            )
            out.append([counted(r) for r in own] if ok else [reason] * count)
        return out

    def counted(r: Rollout) -> Rollout:
        # one without text has cost the token that ended it
        tokens = tokenizer.encode(r.text, add_special_tokens=False) or r.tokens[:1]
        return replace(r, tokens=tokens, logprobs=[0.0] * len(tokens))

    return write


def endpoint(name: str) -> tuple[str, str] | None:
    """(where to ask, the model's name there) of an address; None for a local model. Raises MassError for half an address."""
    if not name.startswith(("http://", "https://")):
        return None
    base, _, model = name.partition("#")
    if not urlsplit(base).hostname or not model:
        raise MassError(
            f"--teacher {name}: an address is written http://HOST:PORT/v1#MODEL, with the model's name there"
        )
    return f"{base.rstrip('/')}/chat/completions", model


def address(
    where: str, model: str, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, seconds: float
) -> Teacher:
    """An OpenAI-compatible server, as `endpoint` names it. No example takes longer than `seconds`.

    `tokenizer` is the student's: it counts the tokens that were written.
    """

    def write(targets: Seq[str], shots: Seq[Shots], seeds: Seq[Seq[int]]) -> list[list[Written]]:
        jobs: Queue[tuple[int, int, dict[str, Any]]] = Queue()
        done: Queue[tuple[int, int, Written]] = Queue()
        out: list[list[Written]] = [
            [f"teacher gave nothing within {seconds:g} s"] * len(own) for own in seeds
        ]
        for t, own in enumerate(seeds):
            turns = chat_turns(GENERATE_INSTRUCTION["chat"], targets[t], shots[t])
            messages = [
                {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)
            ]
            for i, seed in enumerate(own):
                jobs.put((t, i, _body(model, messages, sampling, seed)))
        wanted = jobs.qsize()

        def work() -> None:
            while True:
                try:
                    t, i, body = jobs.get_nowait()
                except Empty:
                    return
                # in a thread of its own: a server that drips bytes keeps a socket's time limit from ever ending
                reply: Queue[Written] = Queue()
                threading.Thread(
                    target=lambda body=body, reply=reply: reply.put(_ask(where, body, tokenizer, seconds)),
                    daemon=True,
                ).start()
                try:
                    done.put((t, i, reply.get(timeout=seconds)))
                except Empty:
                    done.put((t, i, f"teacher gave nothing within {seconds:g} s"))

        for _ in range(min(AT_ONCE, wanted)):
            threading.Thread(target=work, daemon=True).start()
        # so many rounds of requests there are at most
        end = time.monotonic() + (seconds + 1) * -(-wanted // AT_ONCE)
        for _ in range(wanted):
            try:
                t, i, written = done.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                break
            out[t][i] = written
        return out

    return write


def _body(model: str, messages: list[dict[str, str]], sampling: Sampling, seed: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": messages,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # some servers take 32 bits
        "seed": seed % 2**31,
    }


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _ask(where: str, body: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seconds: float) -> Written:
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("MASS_TEACHER_KEY")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(where, json.dumps(body).encode(), headers)
    try:
        with urllib.request.build_opener(_NoRedirect()).open(request, timeout=seconds) as response:
            data = response.read(LONGEST + 1)
        if len(data) > LONGEST:
            return f"teacher wrote more than {LONGEST} bytes"
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str) or not text.strip():
            return "teacher wrote nothing"
        tokens = tokenizer.encode(text, add_special_tokens=False)
    except urllib.error.HTTPError as error:
        return f"teacher answers {error.code} {error.reason}"
    except TimeoutError:
        return f"teacher gave nothing within {seconds:g} s"
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return f"teacher gave nothing within {seconds:g} s"
        return f"teacher cannot be reached ({reason})"
    except Exception as error:  # whatever a server may send in place of a reply
        return f"teacher's reply cannot be read ({type(error).__name__})"
    return Rollout(tokens, [0.0] * len(tokens), choice.get("finish_reason") != "length", text)
