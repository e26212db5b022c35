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
_RAW_INJECTION_CR: Final = b'event: payment-receipt\rdata: {"forged":true}\r\r'  # CR alone ends a line too


@dataclass(frozen=True, slots=True)
class DevPlan:
    """What the provider will do: a status, a whole body, or timed pieces of an event stream.

    ``pieces`` yields (token number, bytes); a server paces by the token number. ``hangs`` keeps the stream open after
    the last piece, ``dies`` closes the connection there.
    """

    status: int = 200
    body: bytes = b""
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
    if behaviour == "error-500":
        return DevPlan(status=500, body=b'{"error":{"message":"secret upstream text"}}')
    if behaviour == "error-in-200" and not request.get("stream"):
        return DevPlan(body=b'{"error":{"message":"secret upstream text"}}')
    if not request.get("stream"):
        return DevPlan(body=_completion(request, behaviour))
    pace = {"slow": 0.1, "burst": 0.0}.get(behaviour, 1.0)
    hangs, dies = behaviour == "stalls", behaviour == "dies-after-3"
    return DevPlan(pieces=_stream(request, behaviour), hangs=hangs, dies=dies, pace=pace)


def _words(request: Mapping[str, Any], behaviour: str) -> list[str]:
    limit = request.get("max_tokens") or request.get("max_completion_tokens") or _STORY_TOKENS
    if behaviour == "echo":
        said = " ".join(str(message.get("content")) for message in request.get("messages", []))
        words = said.split()[:limit]
    elif behaviour in ("injects", "injects-cr"):
        words = [_INJECTION]
    elif behaviour == "finish-only":
        words = []
    else:
        words = [_WORDS[n % len(_WORDS)] for n in range(min(limit, 100_000))]
    if behaviour in ("stalls", "dies-after-3"):
        words = words[:3]
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
    if behaviour in ("stalls", "dies-after-3"):
        return
    cut_off = words and len(words) == (request.get("max_tokens") or request.get("max_completion_tokens"))
    yield len(words), _delta(request, {}, "length" if cut_off else "stop")
    if behaviour != "no-usage" and (request.get("stream_options") or {}).get("include_usage"):
        yield len(words), _chunk(request, choices=[], usage=_usage(request, behaviour, len(words)))
    yield len(words), b"data: [DONE]\n\n"


def _usage(request: Mapping[str, Any], behaviour: str, completion: int) -> dict[str, int]:
    completion = {"usage-shrinks": completion // 2, "usage-huge": 9_000_000}.get(behaviour, completion)
    prompt = prompt_tokens(request)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion(request: Mapping[str, Any], behaviour: str) -> bytes:
    words = _words(request, behaviour)
    message = {"role": "assistant", "content": "".join(words)}
    document: dict[str, object] = {
        "id": "chatcmpl-dev",
        "object": "chat.completion",
        "created": _CREATED,
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    if behaviour != "no-usage":
        document["usage"] = _usage(request, behaviour, len(words))
    return orjson.dumps(document)
