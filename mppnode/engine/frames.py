"""The few OpenAI-shaped chunks the node writes itself; everything else on a stream is the provider's, as it came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from channels.units import PICO_PER_UNIT, Pico
from channels.wire import sse
from mppnode.kernel.usage import Usage

_PICO_DIGITS: Final = 12
_UNIT_DIGITS: Final = 6


def usage_json(usage: Usage, cost: Pico) -> dict[str, object]:
    """The OpenAI ``usage`` object, and what the caller pays for it, exactly: in dollars and in base units."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt, "cache_write_tokens": usage.cache_write},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
        "cost": _decimal(cost, PICO_PER_UNIT**2, _PICO_DIGITS),
        "cost_base_units": _decimal(cost, PICO_PER_UNIT, _UNIT_DIGITS),
    }


def _decimal(value: int, one: int, digits: int) -> str:
    whole, rest = divmod(value, one)
    return f"{whole}.{rest:0{digits}d}".rstrip("0").rstrip(".")


def routing_frame(decision: Mapping[str, object]) -> bytes:
    """The first event of a stream whose model the node chose; it has ``choices`` because SDKs look for them."""
    return sse.data_frame(orjson.dumps({"object": "routing", "choices": [], **decision}))


def usage_frame(first: bytes | None, usage: dict[str, object]) -> bytes:
    """The chunk a caller gets who asked for one with the usage."""
    return _chunk(first, choices=[], usage=usage)


def finish_frame(first: bytes | None, why: str) -> bytes:
    """End a stream that was cut short: ``length`` is the reason SDKs know for "there would have been more"."""
    choice = {"index": 0, "delta": {}, "finish_reason": "length"}
    return _chunk(first, choices=[choice], mppnode={"ended": why})


def error_frame(first: bytes | None, why: str) -> bytes:
    """Report a failure after the status line has gone: SDKs raise on a top-level ``error``."""
    choice = {"index": 0, "delta": {}, "finish_reason": "error"}
    error = {"message": why, "type": "upstream_error", "param": None, "code": "upstream_failed"}
    return _chunk(first, choices=[choice], error=error)


def with_usage(frame: bytes, usage: dict[str, object]) -> bytes:
    """A chunk with the usage on it: for callers who did not ask, and whose code looks into ``choices[0]`` of each."""
    return sse.data_frame(orjson.dumps({**_event(frame), "usage": usage}))


def without_usage(frame: bytes) -> bytes:
    """A chunk without what its provider says of the usage."""
    event = _event(frame)
    for name in ("usage", "x_groq", "timings"):  # Groq and llama.cpp repeat it under names of their own
        event.pop(name, None)
    return sse.data_frame(orjson.dumps(event))


def split_finish(frame: bytes) -> tuple[bytes, bytes]:
    """A chunk that carries output and a finish reason, as one with the output and one with the reason."""
    event = _event(frame)
    choices: list[dict[str, Any]] = event["choices"]
    content = [{**choice, "finish_reason": None} for choice in choices]
    ends = [
        {"index": choice.get("index", 0), "delta": {}, "finish_reason": choice.get("finish_reason")}
        for choice in choices
        if choice.get("finish_reason") is not None
    ]
    return (
        sse.data_frame(orjson.dumps({**event, "choices": content})),
        sse.data_frame(orjson.dumps({**event, "choices": ends})),
    )


def _event(frame: bytes) -> dict[str, Any]:
    event: dict[str, Any] = orjson.loads(frame[6:])
    return event


def _chunk(first: bytes | None, **members: object) -> bytes:
    """A chunk that carries the identity of the stream's first one."""
    seen = _event(first) if first else {}
    head = {name: seen.get(name) for name in ("id", "created", "model") if seen.get(name) is not None}
    return sse.data_frame(orjson.dumps({**head, "object": "chat.completion.chunk", **members}))
