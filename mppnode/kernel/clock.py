"""Time as a constructor argument. This is the only module that reads the machine's clocks."""

from __future__ import annotations

import time
from typing import Protocol

from channels.instants import UnixMillis, UnixSeconds


class Clock(Protocol):
    """Wall time for what others see, monotonic time for what we measure."""

    def now(self) -> UnixSeconds:
        """Wall time in whole seconds."""
        ...

    def now_millis(self) -> UnixMillis:
        """Wall time in milliseconds."""
        ...

    def monotonic(self) -> float:
        """Seconds that never run backwards; only differences mean anything."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> UnixSeconds:
        return UnixSeconds(int(time.time()))

    def now_millis(self) -> UnixMillis:
        return UnixMillis(time.time_ns() // 1_000_000)

    def monotonic(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told; for tests and simulations."""

    def __init__(self, start: int = 1_900_000_000) -> None:
        self._millis = start * 1000

    def now(self) -> UnixSeconds:
        return UnixSeconds(self._millis // 1000)

    def now_millis(self) -> UnixMillis:
        return UnixMillis(self._millis)

    def monotonic(self) -> float:
        return self._millis / 1000

    def advance(self, seconds: float) -> None:
        """Move both clocks forward."""
        self._millis += round(seconds * 1000)
