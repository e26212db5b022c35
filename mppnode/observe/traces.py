"""Traces of requests as plain values: who receives them is somebody else's affair, and so is their wire format.

A request carries a few dozen bytes while it runs; its spans are built once, when it is over. Nothing is told per token.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

TRACEPARENT: Final = "traceparent"
# A later version may add members behind a dash; 200 characters are far more than any uses.
_SHAPE: Final = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[!-~]{0,200})?", re.ASCII)
_OURS: Final = "00"
_SAMPLED: Final = 1
_ALL: Final = 1000
_LOW: Final = (1 << 64) - 1
_CORE: Final = struct.Struct("<16sQQd?")


class Role(Enum):
    """What a span is to the machine that has recorded it."""

    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of a trace. Times are nanoseconds since 1970; ``parent_id`` is 0 at the beginning of a trace."""

    name: str
    role: Role
    trace_id: int
    span_id: int
    parent_id: int
    begun_ns: int
    ended_ns: int
    attributes: Mapping[str, str | int | bool]
    events: tuple[tuple[str, int], ...] = ()
    """Names and times."""
    failed: bool = False
    remote: bool = field(default=False, kw_only=True)
    """Whether its parent is another machine's."""


class Parent(NamedTuple):
    """What a caller says of its own trace."""

    trace_id: int
    span_id: int
    sampled: bool


class Failed(NamedTuple):
    """A provider that was asked in vain, and when that was clear, on the monotonic clock."""

    provider: str
    kind: str
    status: int | None
    at: float


def parse_traceparent(values: Sequence[str]) -> Parent | None:
    """What the ``traceparent`` headers of a request say; None unless there is exactly one and it is well-formed.

    Source: W3C Trace Context, section 3.2.
    """
    match = _SHAPE.fullmatch(values[0]) if len(values) == 1 else None
    if match is None:
        return None
    version, trace, span, flags, more = match.groups()
    trace_id, span_id = int(trace, 16), int(span, 16)
    if not trace_id or not span_id or (version == _OURS and more is not None):
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


class Trace:
    """What a running request keeps of its trace."""

    # Packed: thousands of streams may wait for their payers at once, and as objects the numbers are three times as big.
    __slots__ = ("_core", "failed", "provider")

    def __init__(self, trace_id: int, span_id: int, parent_id: int, begun: float, *, sampled: bool) -> None:
        """``begun`` is on the monotonic clock."""
        self._core = _CORE.pack(trace_id.to_bytes(16), span_id, parent_id, begun, sampled)
        self.failed: tuple[Failed, ...] = ()
        self.provider = ""
        """Who is being asked; empty between two."""

    @property
    def ids(self) -> tuple[int, int, int]:
        """Of the trace, of the request's own span, and of its parent, which is 0 when there is none."""
        trace_id, span_id, parent_id, _, _ = _CORE.unpack(self._core)
        return int.from_bytes(trace_id), span_id, parent_id

    @property
    def begun(self) -> float:
        """When the request's span begins."""
        return float(_CORE.unpack(self._core)[3])

    @property
    def sampled(self) -> bool:
        """Whether anything is recorded."""
        return bool(_CORE.unpack(self._core)[4])

    def child(self, number: int) -> int:
        """The id of a span inside the request's: derived, so that it need not be kept."""
        return ((self.ids[1] + number) & _LOW) or _LOW

    def header(self) -> str:
        """``traceparent`` for the provider that is asked next: the parent is the attempt's own span."""
        flags = _SAMPLED if self.sampled else 0
        return f"00-{self.ids[0]:032x}-{self.child(attempt_number(len(self.failed))):016x}-{flags:02x}"

    def failing(self, kind: str, status: int | None, at: float) -> None:
        """The provider that was asked has failed."""
        self.failed = (*self.failed, Failed(self.provider, kind, status, at))
        self.provider = ""


_ATTEMPTS_FROM: Final = 16  # children below are the phases of a request


def attempt_number(index: int) -> int:
    """Which child of its request an attempt is."""
    return _ATTEMPTS_FROM + index


class Tracer:
    """Decides which requests are recorded, and hands their spans on."""

    def __init__(
        self, take: Callable[[Sequence[Span]], None], *, sample_permille: int, entropy: Callable[[int], bytes]
    ) -> None:
        """``take`` must neither wait nor raise."""
        self.take = take
        self._entropy = entropy
        self._below = sample_permille * (_LOW + 1) // _ALL

    def begin(self, values: Sequence[str], begun: float) -> Trace:
        """The trace of a request with these ``traceparent`` headers.

        A caller can keep a request out but not in: whoever pays a cent must not decide how much the node stores. What
        is left is decided by the trace's id, as OpenTelemetry's ratio sampler does, so several nodes agree.
        """
        parent = parse_traceparent(values)
        trace_id, parent_id = (self._id(16), 0) if parent is None else (parent.trace_id, parent.span_id)
        sampled = (parent is None or parent.sampled) and trace_id & _LOW < self._below
        return Trace(trace_id, self._id(8), parent_id, begun, sampled=sampled)

    def _id(self, size: int) -> int:
        return int.from_bytes(self._entropy(size)) or 1
