"""The one place that starts asyncio tasks. A task without an owner is a task whose failure nobody sees."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def end_of(task: asyncio.Task[Any]) -> asyncio.Future[None]:
    """A future that is done when ``task`` is, whatever became of it; its waiter's cancellation leaves the task alone.

    ``asyncio.wait`` does the same for a kilobyte, which counts where thousands wait for hours.
    """
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task.add_done_callback(partial(_over, over))
    return over


def _over(over: asyncio.Future[None], _: asyncio.Task[Any]) -> None:
    if not over.done():
        over.set_result(None)


class TaskOwner:
    """Starts tasks, reports their failures, and drains them with a deadline."""

    def __init__(self, on_error: Callable[[str, BaseException], None]) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_error = on_error

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Run ``coroutine`` until it ends or :meth:`drain` cancels it; an exception goes to ``on_error``."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def spawn(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> None:
        """As :meth:`start`, for work nobody waits for."""
        task = self.start(coroutine, name=name)
        assert not task.done()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(task.get_name(), error)

    async def drain(self, *, deadline_s: float) -> None:
        """Wait for the tasks to end by themselves, then cancel those that are left and wait for them."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=deadline_s)
        left = set(self._tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
