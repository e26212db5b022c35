"""An event loop without a clock or a socket: when nothing is ready, time jumps to the next timer.

Hours pass in milliseconds and every run of the same program is the same run. A loop that has nothing ready and no timer
would wait for ever; here that is an error at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from channels.instants import UnixMillis, UnixSeconds

T = TypeVar("T")
START = 1_900_000_000


class WaitsForEver(Exception):
    """Every task waits for another one, and no timer is left."""


class _NoFiles:
    """In the place of a selector: there is nothing to select, so the wait is skipped."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            waiting = sorted(task.get_name() for task in asyncio.all_tasks(self._loop))
            raise WaitsForEver(f"nothing is ready and no timer is set; waiting: {', '.join(waiting)}")
        self._loop.jump(timeout)
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Timers, tasks and futures in virtual time. Threads and sockets are refused."""

    def __init__(self) -> None:
        super().__init__()
        self._virtual_now = 0.0
        # A timer is due within this of its time. The machine's nanosecond is lost in the digits of a virtual year, and a
        # timer that is reached and never due would spin for ever.
        self._clock_resolution = 1e-6
        self._selector = _NoFiles(self)

    def time(self) -> float:
        return self._virtual_now

    def jump(self, seconds: float) -> None:
        """Let time pass while nobody runs, as it does for a machine that sleeps."""
        assert seconds >= 0
        self._virtual_now += seconds

    def run_in_executor(self, *_: Any) -> NoReturn:
        raise RuntimeError("a thread does not live in virtual time")

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody has to be woken."""


class VirtualClock:
    """A ``mppnode.kernel.clock.Clock`` on a loop's time; ``skew_s`` moves the wall clock alone."""

    def __init__(self, loop: VirtualLoop, start: int = START) -> None:
        self._loop = loop
        self._start = start
        self.skew_s = 0

    def now(self) -> UnixSeconds:
        return UnixSeconds(self._start + self.skew_s + int(self._loop.time()))

    def now_millis(self) -> UnixMillis:
        return UnixMillis((self._start + self.skew_s) * 1000 + int(self._loop.time() * 1000))

    def monotonic(self) -> float:
        return self._loop.time()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end in virtual time; what is still running then is cancelled."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def this_loop() -> VirtualLoop:
    """The running loop, which must be a virtual one."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop
