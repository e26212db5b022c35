"""Sends due alerts to the addresses accounts have given, each until it has arrived or three days have passed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import orjson

from channels.instants import UnixMillis, to_rfc3339
from mppnode.accounts.documents import read_account
from mppnode.accounts.model import Alerts
from mppnode.accounts.notices import ALERT
from mppnode.gateways.alerts import AlertSender, Delivered, Refused, parse_alert_secret
from mppnode.ledger.credit_lists import By, find_account
from mppnode.ledger.credit_rows import Task, TaskState
from mppnode.ledger.credits import Credits
from mppnode.observe.logs import Level, Log

AGAIN_MS: Final = (60_000, 300_000, 900_000, 3_600_000, 10_800_000, 21_600_000)
"""A minute, and then slower up to six hours: a receiver that is deployed anew, and one that is down for a night."""
GIVE_UP_MS: Final = 3 * 86_400_000
"""A weekend and a day; what is told of a cap after that helps nobody."""
_AT_ONCE: Final = 16  # accounts: a receiver that is slow to answer delays its own alerts, and hardly another's
_HOLD_MS: Final = 60_000  # an alert in flight is nobody else's: one attempt ends in ten seconds


class AlertWorker:
    """Works on due alerts. Every method raises ``ChannelFault`` with ``STORE_UNAVAILABLE``."""

    def __init__(self, books: Credits, sender: AlertSender, *, log: Log) -> None:
        self._books = books
        self._sender = sender
        self._log = log

    async def work(self) -> int:
        """Send every due alert once, an account's in the order they were made; returns how many arrived."""
        by_account: dict[str, list[Task]] = {}
        for task in await self._books.due(ALERT):
            by_account.setdefault(task.account, []).append(task)
        slots = asyncio.Semaphore(_AT_ONCE)

        async def in_turn(tasks: Sequence[Task]) -> int:
            async with slots:
                return sum([await self._one(task) for task in tasks])

        async with asyncio.TaskGroup() as side:
            running = [side.create_task(in_turn(tasks)) for tasks in by_account.values()]
        return sum(one.result() for one in running)

    async def _one(self, task: Task) -> bool:
        now = self._books.clock.now_millis()
        document = orjson.loads(task.document)
        tries = document.get("tries", 0)
        claimed = replace(task, due_ms=now + _HOLD_MS)
        if not await self._books.move_task(task, claimed):
            return False
        claimed = replace(claimed, version=task.version + 1)
        alerts = await self._receiver(task)
        if alerts is None:
            await self._books.move_task(claimed, replace(claimed, state=TaskState.PARKED))
            self._books.metrics.outbox_attempt(ALERT, "parked")
            return False
        body = orjson.dumps(
            {
                "id": task.id,
                "type": document["type"],
                "created": to_rfc3339(UnixMillis(task.created_ms)),
                "data": document["data"],
            }
        )
        outcome = await self._sender.send(alerts.url, parse_alert_secret(alerts.secret), id=task.id, body=body)
        if isinstance(outcome, Delivered):
            await self._books.move_task(claimed, replace(claimed, state=TaskState.DONE, due_ms=now))
            self._books.metrics.outbox_attempt(ALERT, "done")
            return True
        again = None if isinstance(outcome, Refused) else max(_pause(tries), (outcome.after_s or 0) * 1000)
        if again is None or now + again - task.created_ms > GIVE_UP_MS:
            self._log("alert.parked", level=Level.WARNING, account=task.account, why=outcome.problem.value)
            await self._books.move_task(claimed, replace(claimed, state=TaskState.PARKED))
            self._books.metrics.outbox_attempt(ALERT, "parked")
            return False
        later = orjson.dumps({**document, "tries": tries + 1}).decode()
        await self._books.move_task(claimed, replace(claimed, document=later, due_ms=now + again))
        self._books.metrics.outbox_attempt(ALERT, "again")
        return False

    async def _receiver(self, task: Task) -> Alerts | None:
        """Where its owner wants to be told now; nobody is told at an address that was taken back."""
        row = await self._books.read(partial(find_account, By.ID, task.account))
        return None if row is None else read_account(row).alerts


def _pause(tries: int) -> int:
    return AGAIN_MS[min(tries, len(AGAIN_MS) - 1)]
