"""A port whose n-th operation fails: before its effect, after it, or by never answering.

Wraps any object with asynchronous methods (a ledger, a chain). A test runs the same story with ``fail_at`` 1, 2, 3 and
so on until a run meets no fault, so that no operation is ever the one nobody thought of.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from channels.faults import ChannelFault, Reason


class Mode(StrEnum):
    """How the operation fails."""

    BEFORE = "before its effect"
    AFTER = "after its effect"
    """The effect stays, its answer is lost."""
    HANGS = "hangs before its effect"
    HANGS_AFTER = "hangs after its effect"
    """Both until the caller gives up."""


def unavailable() -> ChannelFault:
    return ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger did not answer")


class Faulty:
    """Stands before ``port`` and counts its operations; everything that is not asynchronous passes."""

    def __init__(
        self,
        port: Any,
        *,
        fail_at: int,
        mode: Mode,
        fault: Callable[[], Exception] = unavailable,
        counts: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._port = port
        self._fail_at = fail_at
        self._mode = mode
        self._fault = fault
        self._counts = counts
        self.operations = 0
        self.failed: str | None = None
        """The operation that failed, once one has."""
        self.hanging = asyncio.Event()
        """Set when an operation has begun to hang."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not inspect.iscoroutinefunction(found) or not self._counts(name):
            return found

        async def operation(*args: Any, **kwargs: Any) -> Any:
            self.operations += 1
            if self.operations != self._fail_at:
                return await found(*args, **kwargs)
            self.failed = name
            if self._mode in (Mode.AFTER, Mode.HANGS_AFTER):
                await found(*args, **kwargs)
            if self._mode in (Mode.HANGS, Mode.HANGS_AFTER):
                self.hanging.set()
                await asyncio.Event().wait()
            raise self._fault()

        return operation

    async def give_up_on(self, work: asyncio.Task[Any]) -> None:
        """Wait for ``work``; when it hangs here, cancel it as a deadline would. Raises what ``work`` raised."""
        hangs = asyncio.ensure_future(self.hanging.wait())
        await asyncio.wait({work, hangs}, return_when=asyncio.FIRST_COMPLETED)
        hangs.cancel()
        if not work.done():
            self.hanging.clear()
            work.cancel()
            await asyncio.wait({work})
            raise self._fault()
        work.result()
