"""Runs checks side by side, each within its own deadline; none can end, delay or silence another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from mppnode.doctor.findings import Case, Check, Finding, Result, fail
from mppnode.kernel.tasks import TaskOwner

TIMEOUT_S: Final = 10
"""Of one check: a provider across the world answers in one, and an operator waits no longer."""
_END_S: Final = 0.0

Sleep = Callable[[float], Awaitable[None]]


async def run_checks(
    checks: Iterable[Check], case: Case, *, timeout_s: float = TIMEOUT_S, sleep: Sleep = asyncio.sleep
) -> list[Result]:
    """The findings of every check on every one of its subjects, in the order of the checks."""
    owner = TaskOwner(lambda _name, _error: None)  # a failure is a finding: see _watched
    jobs = [(check, subject) for check in checks for subject in check.subjects(case.config)]
    try:
        found = await asyncio.gather(
            *(_watched(owner, check, case, subject, timeout_s=timeout_s, sleep=sleep) for check, subject in jobs)
        )
    finally:
        await owner.drain(deadline_s=_END_S)
    return [Result(check.name, subject, finding) for (check, subject), finding in zip(jobs, found, strict=True)]


async def _watched(
    owner: TaskOwner, check: Check, case: Case, subject: str, *, timeout_s: float, sleep: Sleep
) -> Finding:
    async def look() -> Finding:
        return await check.look(case, subject)

    async def wait() -> None:
        await sleep(timeout_s)

    work, timer = owner.start(look(), name=check.name), owner.start(wait(), name="deadline")
    await asyncio.wait({work, timer}, return_when=asyncio.FIRST_COMPLETED)
    timer.cancel()
    if not work.done():
        work.cancel()
        return fail(f"no answer within {timeout_s:g} s", "look at what it asks, or allow more with --timeout")
    if work.cancelled():
        return fail("the check was interrupted", "run it again with --only")
    error = work.exception()
    if error is not None:
        # Its type and no more: the text may quote a URL, a key or somebody else's answer.
        return fail(f"the check itself failed: {type(error).__name__}", "report this as a bug of mppnode doctor")
    return work.result()
