"""The development provider: deterministic text, exact usage, and one fault per model name.

Pure: a request gives a plan of what to send and when. DEVELOPMENT ONLY; no model is involved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import orjson

_TEXT: Final = (
    "a channel opens once and every token after that is paid with a signature so the reader never waits for a block "
    "the node counts what it sends asks for the next voucher early and gives back what was not used when the channel "
    "closes money moves only for words that arrived"
)
_WORDS: Final = tuple(_TEXT.split())
_STORY_TOKENS: Final = 160
_PROMPT_BYTES_PER_TOKEN: Final = 4
_CREATED: Final = 1_700_000_000
_INJECTION: Final = 'x\r\n\r\nevent: payment-receipt\r\ndata: {"spent":"0"}\n\ny\rz'
_RAW_INJECTION: Final = b'event: payment-receipt\ndata: {"forged":true}\n\n'
_HTML: Final = b"<!doctype html><title>Welcome</title><p>Log in to continue: secret upstream text</p>"
_RETRY_AFTER_S: Final = 7
_SHORT: Final = frozenset({"stalls", "dies-after-3", "closes-early"})
"""Behaviours that end after three tokens, each in its way."""
_RAW_INJECTION_CR: Final = b'event: payment-receipt\rdata: {"forged":true}\r\r'  # CR alone ends a line too


@dataclass(frozen=True, slots=True)
class DevPlan:
    """What the provider will do: a status, a whole body, or timed pieces of an answer.

    ``pieces`` yields (token number, bytes); a server paces by the token number. ``hangs`` keeps the answer open after
    the last piece, ``dies`` closes the connection there.
    """

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    pieces: Iterator[tuple[int, bytes]] | None = None
    hangs: bool = False
    dies: bool = False
    pace: float = 1.0
    """Factor on the server's tokens per second; 0 means all at once."""


def prompt_tokens(request: Mapping[str, Any]) -> int:
    """Tokens of the prompt: a quarter of the bytes of its text."""
    text = "".join(
        message["content"] for message in request.get("messages", []) if isinstance(message.get("content"), str)
    )
    return max(1, len(text.encode()) // _PROMPT_BYTES_PER_TOKEN)


def plan_for(request: Mapping[str, Any]) -> DevPlan:
    """The plan for one chat completion request; the part of the model name after ``dev/`` selects the behaviour."""
    behaviour = str(request.get("model", "")).rpartition("/")[2]
    streamed = bool(request.get("stream"))
    match behaviour:
        case "error-500":
            return DevPlan(status=500, body=b'{"error":{"message":"secret upstream text"}}')
        case "rate-limited":
            retry = (("Retry-After", str(_RETRY_AFTER_S)),)
            return DevPlan(status=429, body=b'{"error":{"message":"secret upstream text"}}', headers=retry)
        case "garbage-200":
            return DevPlan(body=_HTML, content_type="text/html")
        case "error-in-200" if not streamed:
            return DevPlan(body=b'{"error":{"message":"secret upstream text"}}')
        case "stalls-first" | "stalls-mid" | "closes-early" if not streamed:
            # The declared answer breaks off: at once, or half way.
            whole = b"" if behaviour == "stalls-first" else _completion(request, behaviour)
            half = iter([(0, whole[: len(whole) // 2])] if whole else ())
            return DevPlan(pieces=half, hangs=behaviour != "closes-early")
    if not streamed:
        return DevPlan(body=_completion(request, behaviour))
    return DevPlan(
        pieces=_stream(request, behaviour),
        content_type="text/event-stream",
        hangs=behaviour in ("stalls", "stalls-first", "stalls-mid"),
        dies=behaviour == "dies-after-3",
        pace={"slow": 0.1, "drip": 0.02, "burst": 0.0}.get(behaviour, 1.0),
    )


def _words(request: Mapping[str, Any], behaviour: str) -> list[str]:
    limit = request.get("max_tokens") or request.get("max_completion_tokens") or _STORY_TOKENS
    if behaviour == "echo":
        said = " ".join(str(message.get("content")) for message in request.get("messages", []))
        words = said.split()[:limit]
    elif behaviour in ("injects", "injects-cr"):
        words = [_INJECTION]
    elif behaviour in ("finish-only", "empty", "stalls-first"):
        words = []
    elif behaviour == "drip":
        return list("".join(f"{word} " for word in _WORDS)[:limit])
    else:
        words = [_WORDS[n % len(_WORDS)] for n in range(min(limit, 100_000))]
    if behaviour in _SHORT:
        words = words[:3]
    if behaviour == "stalls-mid":
        words = words[: len(words) // 2]
    return [word if n == 0 else f" {word}" for n, word in enumerate(words)]


def _chunk(request: Mapping[str, Any], **members: object) -> bytes:
    head = {"id": "chatcmpl-dev", "object": "chat.completion.chunk", "created": _CREATED, "model": request["model"]}
    return b"data: " + orjson.dumps({**head, **members}) + b"\n\n"


def _delta(request: Mapping[str, Any], delta: dict[str, object], finish: str | None = None) -> bytes:
    return _chunk(request, choices=[{"index": 0, "delta": delta, "finish_reason": finish}], usage=None)


def _stream(request: Mapping[str, Any], behaviour: str) -> Iterator[tuple[int, bytes]]:
    yield 0, _delta(request, {"role": "assistant", "content": ""})
    if behaviour == "garbage":
        yield 1, b"data: {not json\n\n"
        return
    if behaviour == "error-in-200":
        yield 1, b'data: {"error":{"message":"secret upstream text"}}\n\n'
        return
    if behaviour == "injects":
        yield 0, b": comment\n" + _RAW_INJECTION
    if behaviour == "injects-cr":
        yield 0, _RAW_INJECTION_CR
    if behaviour == "never-ends":
        for number in count(1):
            yield number, _delta(request, {"content": f" {_WORDS[number % len(_WORDS)]}"})
    words = _words(request, behaviour)
    for number, word in enumerate(words, start=1):
        yield number, _delta(request, {"content": word})
    if behaviour in _SHORT or behaviour in ("stalls-first", "stalls-mid"):
        return
    if behaviour == "empty":
        yield 0, b"data: [DONE]\n\n"
        return
    cut_off = words and len(words) == (request.get("max_tokens") or request.get("max_completion_tokens"))
    yield len(words), _delta(request, {}, "length" if cut_off else "stop")
    if behaviour != "no-usage" and (request.get("stream_options") or {}).get("include_usage"):
        yield len(words), _chunk(request, choices=[], usage=_usage(request, behaviour, len(words)))
    yield len(words), b"data: [DONE]\n\n"


def _usage(request: Mapping[str, Any], behaviour: str, completion: int) -> dict[str, int]:
    """The report: true, or false by a factor that is not absurd (``lies-...``), or absurd (``usage-huge``)."""
    prompt = prompt_tokens(request)
    if behaviour == "lies-high":
        prompt, completion = prompt * 3, completion * 3
    elif behaviour == "lies-low":
        prompt, completion = max(1, prompt // 10), completion // 10
    completion = {"usage-shrinks": completion // 2, "usage-huge": 9_000_000}.get(behaviour, completion)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion(request: Mapping[str, Any], behaviour: str) -> bytes:
    words = _words(request, behaviour)
    message = {"role": "assistant", "content": "".join(words)}
    document: dict[str, object] = {
        "id": "chatcmpl-dev",
        "object": "chat.completion",
        "created": _CREATED,
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": None if behaviour == "empty" else "stop"}],
    }
    if behaviour != "no-usage":
        document["usage"] = _usage(request, behaviour, len(words))
    return orjson.dumps(document)
