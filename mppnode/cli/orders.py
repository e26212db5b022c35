"""What a running process is told by signals, and a worker by its supervisor."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Final

RELOAD: Final = b"reload\n"
"""What a supervisor writes to its workers. Not a signal: one that comes before Python listens would end the worker."""
_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)


class Orders:
    """Stop (SIGTERM, SIGINT), hurry with that (the same one again) and reload (SIGHUP).

    A third one of a kind ends the process as if nobody listened: what it held is then released by the others' sweeps.
    """

    def __init__(self) -> None:
        """Listen from now on; must be made in the running loop, before anything that takes long."""
        self.stop = asyncio.Event()
        self.reload = asyncio.Event()
        self._hurrying = False
        self._hurry: Callable[[], None] = _nothing
        self._loop = asyncio.get_running_loop()
        self._seen: set[signal.Signals] = set()
        for number in _STOPPING:
            self._loop.add_signal_handler(number, self._on_stop, number)
        self._loop.add_signal_handler(signal.SIGHUP, self.reload.set)
        # Those that came earlier come now: see mppnode.cli.main. A child must not inherit that they wait.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGHUP, *_STOPPING))

    def _on_stop(self, number: signal.Signals) -> None:
        # By kind: a terminal sends SIGINT to a whole group, and a supervisor adds its SIGTERM to that.
        if number in self._seen:
            self._loop.remove_signal_handler(number)
            self._hurrying = True
            self._hurry()
        self._seen.add(number)
        self.stop.set()

    def when_hurried(self, hurry: Callable[[], None]) -> None:
        """Say what to do when the stop is to be cut short; done at once if that has been asked for already."""
        self._hurry = hurry
        if self._hurrying:
            hurry()

    async def follow_supervisor(self) -> None:
        """Take a supervisor's orders from standard input, whose end is the end of the supervisor."""
        await self._loop.connect_read_pipe(lambda: _Leash(self), sys.stdin)


class _Leash(asyncio.Protocol):
    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    def data_received(self, data: bytes) -> None:
        if data.endswith(RELOAD):
            self._orders.reload.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._orders.stop.set()


def _nothing() -> None:
    """Stand in until somebody knows how to hurry."""
