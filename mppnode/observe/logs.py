"""Log lines: one JSON object (or one readable line) per event, built in ``app.py`` and passed down.

Fields are ours or are escaped by ``json``; nothing is interpolated into a sentence, and secrets have no path here:
callers pass ids, amounts and reasons, and ``Secret`` has no text.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol, TextIO

from channels.instants import to_rfc3339
from mppnode.kernel.clock import Clock


class Level(IntEnum):
    """How much a line matters."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


class Log(Protocol):
    """Writes one line."""

    def __call__(self, event: str, *, level: Level = Level.INFO, **fields: object) -> None:
        """Write ``event`` with its fields."""
        ...


def make_log(*, clock: Clock, level: Level, as_json: bool, stream: TextIO | None = None) -> Log:
    """Build the node's logger over a text stream (standard error unless told)."""
    out = stream if stream is not None else sys.stderr
    write: Callable[[dict[str, object]], str] = _json_line if as_json else _text_line

    def log(event: str, *, level: Level = Level.INFO, **fields: object) -> None:
        if level < threshold:
            return
        at = to_rfc3339(clock.now_millis())
        line = write({"at": at, "level": level.name.lower(), "event": event, **fields}) + "\n"
        # A full disk or a closed pipe must not fail the payment that is being logged; there is nowhere to say so.
        with contextlib.suppress(OSError, ValueError):
            out.write(line)

    threshold = level
    return log


def quiet(event: str, *, level: Level = Level.INFO, **fields: object) -> None:
    """Write nothing; for tools whose output is something else."""


def _json_line(fields: dict[str, object]) -> str:
    return json.dumps(fields, default=str, separators=(",", ":"))


def _text_line(fields: dict[str, object]) -> str:
    head = f"{fields.pop('at')} {str(fields.pop('level')).upper():7} {fields.pop('event')}"
    return " ".join([head, *(f"{name}={json.dumps(value, default=str)}" for name, value in fields.items())])
