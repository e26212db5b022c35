"""The few OpenAI-shaped chunks the node writes itself; everything else on a stream is the provider's, as it came."""

from __future__ import annotations

from typing import Any

import orjson

from channels.wire import sse
from mppnode.kernel.usage import Usage


def usage_json(usage: Usage) -> dict[str, object]:
    """The OpenAI ``usage`` object."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def usage_frame(first: bytes | None, usage: Usage) -> bytes:
    """The last data chunk of a stream whose provider reported no usage, or none that can be believed."""
    return _chunk(first, choices=[], usage=usage_json(usage))


def finish_frame(first: bytes | None, why: str) -> bytes:
    """End a stream that was cut short: ``length`` is the reason SDKs know for "there would have been more"."""
    choice = {"index": 0, "delta": {}, "finish_reason": "length"}
    return _chunk(first, choices=[choice], mppnode={"ended": why})


def error_frame(first: bytes | None, why: str) -> bytes:
    """Report a failure after the status line has gone: SDKs raise on a top-level ``error``."""
    choice = {"index": 0, "delta": {}, "finish_reason": "error"}
    error = {"message": why, "type": "upstream_error", "param": None, "code": "upstream_failed"}
    return _chunk(first, choices=[choice], error=error)


def _chunk(first: bytes | None, **members: object) -> bytes:
    """A chunk that carries the identity of the stream's first one."""
    seen: dict[str, Any] = orjson.loads(first[6:]) if first else {}
    head = {name: seen.get(name) for name in ("id", "created", "model") if seen.get(name) is not None}
    return sse.data_frame(orjson.dumps({**head, "object": "chat.completion.chunk", **members}))
