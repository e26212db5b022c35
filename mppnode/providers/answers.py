"""OpenAI chunks and completions written by us, for providers that answer in another shape.

``created`` is left out when no clock is given: a zero would be a lie that some clients show.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from mppnode.kernel.clock import Clock
from mppnode.kernel.usage import Usage
from mppnode.providers.usage import usage_document

_ID: Final = "chatcmpl"


class Head:
    """The members that every chunk of one stream repeats, or that head one completion."""

    __slots__ = ("_members",)

    def __init__(self, kind: str, *, name: object, model: object, clock: Clock | None) -> None:
        self._members: dict[str, Any] = {"id": name if type(name) is str and name else _ID, "object": kind}
        if clock is not None:
            self._members["created"] = int(clock.now())
        if type(model) is str:
            self._members["model"] = model

    def frame(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        """One event of a stream: a line of JSON and a blank line."""
        event = {**self._members, "choices": choices}
        if usage is not None:
            event["usage"] = usage_document(usage)
        return b"data: " + orjson.dumps(event) + b"\n\n"

    def completion(self, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        """A whole answer."""
        document = {**self._members, "choices": choices}
        if usage is not None:
            document["usage"] = usage_document(usage)
        return document


def piece(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """One choice of a chunk."""
    return {"index": index, "delta": delta, "finish_reason": finish}


def called(index: int | None, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call, with its index in a stream and without one in a whole answer."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return call if index is None else {"index": index, **call}


def text_of(value: object) -> str:
    """A provider's string; empty when it is none."""
    return value if type(value) is str else ""
