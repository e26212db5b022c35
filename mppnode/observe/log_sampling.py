"""Says the same thing a few times a second and counts the rest: whoever is refused a thousand times writes five lines.

For refusals only, which strangers cause and which cost them nothing. Lines about money and errors are never left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from mppnode.kernel.clock import Clock
from mppnode.observe.logs import Level, Log

PER_SECOND: Final = 5
"""Lines of one event, reason and route in one second: enough to see examples."""
KINDS_MAX: Final = 256
"""Kinds counted apart in one second: more than reasons times routes; beyond them they are counted together."""
_WINDOW_S: Final = 1.0
_REST: Final = ("other", "other")

Later = Callable[[float, Callable[[], None]], object]


class Refusals:
    """Writes ``request.refused``, sampled by reason and route, and ``log.suppressed`` with what was left out."""

    def __init__(self, log: Log, clock: Clock, *, later: Later | None = None) -> None:
        """``later`` calls back after seconds; the running loop's own unless told."""
        self._log = log
        self._clock = clock
        self._later = later if later is not None else _on_the_loop
        self._window = -1.0
        self._seen: dict[tuple[str, str], int] = {}
        self._waiting = False

    def __call__(self, reason: str, route: str, *, level: Level = Level.INFO, **fields: object) -> None:
        """Tell of a refusal, or count it."""
        now = self._clock.monotonic()
        if not 0 <= now - self._window < _WINDOW_S:
            self.tell()
            self._window = now
        kind = (reason, route)
        if kind not in self._seen and len(self._seen) >= KINDS_MAX:
            kind = _REST
        seen = self._seen[kind] = self._seen.get(kind, 0) + 1
        if seen <= PER_SECOND:
            self._log("request.refused", level=level, reason=reason, route=route, **fields)
        elif not self._waiting:
            # A storm that ends is told of as well: no later refusal may come to do it.
            self._waiting = True
            self._later(_WINDOW_S, self._told_later)

    def tell(self) -> None:
        """Say what was left out since the last time, if anything was."""
        left_out = {
            f"{reason} {route}": seen - PER_SECOND for (reason, route), seen in self._seen.items() if seen > PER_SECOND
        }
        self._seen.clear()
        if left_out:
            self._log("log.suppressed", about="request.refused", total=sum(left_out.values()), counts=left_out)

    def _told_later(self) -> None:
        self._waiting = False
        self.tell()


def _on_the_loop(seconds: float, call: Callable[[], None]) -> object:
    return asyncio.get_running_loop().call_later(seconds, call)
