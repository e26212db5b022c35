"""Log lines: one JSON object (or one readable line) per event, built in ``app.py`` and passed down.

Fields are ours or are escaped by ``json``; nothing is interpolated into a sentence, and secrets have no path here:
callers pass ids, amounts and reasons, ``Secret`` has no text, and ``log_values`` is the second net. Which events there
are, and with which fields, is in ``log_events``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from enum import IntEnum
from typing import Final, Protocol, TextIO

from channels.instants import to_rfc3339
from mppnode.kernel.clock import Clock
from mppnode.observe.log_events import KEPT
from mppnode.observe.log_values import cut, shown
from mppnode.observe.log_writer import CLOSE_S, LineWriter

LINE_BYTES_MAX: Final = 4_096
"""Bytes of a line with its end: what a pipe takes whole, so lines of several workers never mix."""
_FIELDS_MAX: Final = 32  # in a line that is too long even with nothing in them; no caller has so many
_STANDARD_ERROR: Final = 2
_VALUE_MIN: Final = 64  # characters left of a value in a line that is too long
_OUR_NAMES: Final = frozenset({"at", "level", "event"})

CAUSE: Final[ContextVar[str]] = ContextVar("cause", default="")
"""The id of the request on whose behalf something happens; lines that name no other carry it as ``request``."""


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


class NodeLog:
    """The node's log: give it events, and close it at the end."""

    def __init__(
        self,
        *,
        clock: Clock,
        level: Level,
        form: Callable[[dict[str, object]], str],
        writer: LineWriter | _Direct,
        levels: Mapping[str, Level],
        always: Mapping[str, object],
    ) -> None:
        """See :func:`make_log`."""
        self._clock = clock
        self._level = level
        self._levels = dict(levels)
        self._lowest = min([level, *levels.values()])
        self._form = form
        self._writer = writer
        self._always = {name: shown(name, value) for name, value in always.items()}
        writer.told = self._dropped

    def __call__(self, event: str, *, level: Level = Level.INFO, **fields: object) -> None:
        """Write ``event`` with its fields, if its level is wanted of its room. It never waits for a reader."""
        if level < self._lowest or level < self._levels.get(event.partition(".")[0], self._level):
            return
        keep = level >= Level.WARNING or event in KEPT
        self._writer.put(self._line(event, level, fields), keep=keep)

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until everything is written; False when the time was not enough."""
        return self._writer.flush(timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Write what waits and end; False when some lines are lost."""
        return self._writer.close(timeout_s)

    def _line(self, event: str, level: Level, fields: Mapping[str, object]) -> bytes:
        line: dict[str, object] = {
            "at": to_rfc3339(self._clock.now_millis()),
            "level": level.name.lower(),
            "event": event,
        }
        request = fields.get("request") or CAUSE.get()
        if request:
            line["request"] = shown("request", request)
        line.update(self._always)
        for name, value in fields.items():
            if name != "request":
                # A field cannot take the place of what identifies the line.
                line[f"{name}_" if name in _OUR_NAMES else name] = shown(name, value)
        text = self._form(line)
        if len(text) >= LINE_BYTES_MAX:
            text = self._form(_shortened(line, self._form))
        return text.encode() + b"\n"  # ASCII: everything else is escaped

    def _dropped(self, count: int) -> bytes:
        return self._line("log.dropped", Level.WARNING, {"lines": count})


def make_log(
    *,
    clock: Clock,
    level: Level,
    as_json: bool,
    stream: TextIO | None = None,
    colour: bool = False,
    levels: Mapping[str, Level] | None = None,
    always: Mapping[str, object] | None = None,
) -> NodeLog:
    """Build the node's logger over a text stream, written to at once, or over standard error, through a queue.

    ``levels`` are those of events by the first word of their names, where they differ; ``always`` is on every line.
    """
    form = _json_line if as_json else _coloured_line if colour else _text_line
    writer = _Direct(stream) if stream is not None else LineWriter.of_descriptor(_STANDARD_ERROR)
    return NodeLog(clock=clock, level=level, form=form, writer=writer, levels=levels or {}, always=always or {})


def is_terminal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether lines are read by eye."""
    return stream.isatty() and environ.get("TERM") != "dumb"


def wants_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether lines may have colours: only in a terminal, and only without ``NO_COLOR`` (https://no-color.org)."""
    return is_terminal(stream, environ) and not environ.get("NO_COLOR")


def quiet(event: str, *, level: Level = Level.INFO, **fields: object) -> None:
    """Write nothing; for tools whose output is something else."""


class _Direct:
    """Lines into a stream of the caller's, at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.told: Callable[[int], bytes] = lambda _: b""

    def put(self, line: bytes, *, keep: bool = False) -> None:  # noqa: ARG002 - as LineWriter's
        # A full disk or a closed pipe must not fail the payment that is being logged; there is nowhere to say so.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line.decode())

    def flush(self, timeout_s: float = 0) -> bool:  # noqa: ARG002 - as LineWriter's
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
        return True

    def close(self, timeout_s: float = 0) -> bool:
        return self.flush(timeout_s)


_encode: Final = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode


def _shortened(line: dict[str, object], form: Callable[[dict[str, object]], str]) -> dict[str, object]:
    """A line that fits: its longest values first become their own beginnings, then go."""
    short = dict(line)
    by_length = sorted((name for name in line if name not in _OUR_NAMES), key=lambda name: -len(_encode(line[name])))
    for name in by_length:
        # Cut as text in ASCII: what a character takes when it is escaped is not what it counts.
        short[name] = cut(_encode(line[name]), _VALUE_MIN)
        if len(form(short)) < LINE_BYTES_MAX:
            return short
    for name in by_length:
        short[name] = "..."
    return {name: short[name] for name in list(short)[:_FIELDS_MAX]}


def _json_line(line: dict[str, object]) -> str:
    return _encode(line)


def _text_line(line: dict[str, object]) -> str:
    return " ".join([f"{line['at']} {str(line['level']).upper():7} {line['event']}", *_fields(line)])


_COLOURS: Final = {"debug": "2", "info": "32", "warning": "33", "error": "31;1"}


def _coloured_line(line: dict[str, object]) -> str:
    level = str(line["level"])
    head = f"\x1b[2m{line['at']}\x1b[0m \x1b[{_COLOURS[level]}m{level.upper():7}\x1b[0m \x1b[1m{line['event']}\x1b[0m"
    return " ".join([head, *(f"\x1b[2m{name}=\x1b[0m{value}" for name, value in _pairs(line))])


def _fields(line: dict[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in _pairs(line)]


def _pairs(line: dict[str, object]) -> list[tuple[str, str]]:
    return [(name, _encode(value)) for name, value in line.items() if name not in _OUR_NAMES]


__all__ = ["CAUSE", "Level", "Log", "NodeLog", "is_terminal", "make_log", "quiet", "wants_colour"]
