"""Alerts and workers: sent until they arrive, parked when they cannot, and no loop ends of a fault."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from channels.faults import ChannelFault, Reason
from channels.model import NodeId
from mppnode.accounts.model import Alerts
from mppnode.accounts.notices import alert
from mppnode.billing.alerts import GIVE_UP_MS, AlertWorker
from mppnode.billing.workers import Workers
from mppnode.config.secrets import Secret
from mppnode.gateways.alerts import AlertProblem, Delivered, Outcome, Refused, Retry
from mppnode.ledger.credit_rows import TaskState
from tests.billing.kit import Desk, no_sleep

SECRET = "whsec_" + "A" * 43 + "="
ALERTS = Alerts("https://hooks.example.com/a", SECRET)


class Receiver:
    """Answers alerts as it is told, and keeps them."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = list(outcomes)
        self.bodies: list[tuple[str, dict[str, Any]]] = []

    async def send(self, url: str, secret: Secret[bytes], *, id: str, body: bytes) -> Outcome:  # noqa: A002
        assert (url, len(secret.reveal())) == (ALERTS.url, 32)
        self.bodies.append((id, orjson.loads(body)))
        return self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]


async def waiting(desk: Desk, receiver: Receiver) -> AlertWorker:
    account = await desk.account(alerts=ALERTS)
    await desk.books.add_task(alert(account.id, "balance.low", (1,), {"balance_cents": 3}, desk.clock.now_millis()))
    return AlertWorker(desk.books, receiver, log=lambda event, **fields: None)  # type: ignore[arg-type]


async def test_an_alert_is_repeated_with_the_same_id_until_it_arrives(desk: Desk) -> None:
    """Two failures and a success are three attempts a minute and five minutes apart; then it is done, without secrets."""
    receiver = Receiver(Retry(AlertProblem.TIMEOUT), Retry(AlertProblem.STATUS, 500), Delivered(204))
    worker = await waiting(desk, receiver)
    arrived = []
    for seconds in (0, 61, 200, 101, 10_000):
        desk.clock.advance(seconds)
        arrived.append(await worker.work())
    assert arrived == [0, 0, 0, 1, 0]
    (first, body), *others = receiver.bodies
    assert others == [(first, body)] * 2
    assert sorted(body) == ["created", "data", "id", "type"]
    assert (body["id"], body["type"], body["data"]) == (first, "balance.low", {"account": "acct_1", "balance_cents": 3})
    (task,) = await desk.tasks("alert")
    assert task.state is TaskState.DONE
    assert SECRET not in task.document


@pytest.mark.parametrize("outcome", [Refused(AlertProblem.GONE, 410), Retry(AlertProblem.UNREACHABLE)])
async def test_an_alert_that_cannot_arrive_is_parked(desk: Desk, outcome: Outcome) -> None:
    """A refusal parks at once; an unreachable receiver after three days, each pause at most six hours."""
    worker = await waiting(desk, Receiver(outcome))
    tries = 0
    while (await desk.tasks("alert"))[0].state is TaskState.DUE:
        await worker.work()
        tries += 1
        desk.clock.advance(6 * 3_600)
    assert tries == 1 if isinstance(outcome, Refused) else 10 <= tries <= GIVE_UP_MS // (6 * 3_600_000) + 2


async def test_a_loop_outlives_every_fault_and_works_only_where_it_leads(desk: Desk) -> None:
    """A fault of the ledger and a bug are logged and the loop goes on; a node that does not lead does nothing."""
    done: list[str] = []

    async def work() -> int:
        done.append("work")
        if len(done) == 1:
            raise ChannelFault(Reason.STORE_UNAVAILABLE, "away")
        if len(done) == 2:
            raise KeyError("a secret")
        if len(done) == 4:
            raise asyncio.CancelledError
        return 0

    base = desk.billing.workers
    first, second = await desk.ledger.join("first"), await desk.ledger.join("second")
    leader = Workers(base.ledger, lambda: first, base.books, base.clock, base.log, None, None, None, None)
    with pytest.raises(asyncio.CancelledError):
        await leader.keep("test", work, 1.0, no_sleep)
    assert [fields["job"] for event, fields in desk.log if event in ("billing.late", "billing.failed")] == ["test", "test"]
    assert "a secret" not in str(desk.log)
    other = Workers(base.ledger, lambda: second, base.books, base.clock, base.log, None, None, None, None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await other.keep("test", work, 1.0, no_sleep)
    assert len(done) == 4
    assert NodeId("node-1") not in (first, second)


async def test_a_day_is_reconciled_once(desk: Desk) -> None:
    """Every node asks, and one comparison a UTC day is made."""
    assert await desk.billing.workers.daily() == 1
    assert await desk.billing.workers.daily() == 0
    desk.clock.advance(86_400)
    assert await desk.billing.workers.daily() == 1


async def test_every_loop_has_a_name(desk: Desk) -> None:
    """What the node spawns, by name."""
    loops = list(desk.billing.daemons(no_sleep))
    assert [name for name, _ in loops] == ["recharge", "recharge search", "seal usage", "report usage", "billing day", "forget"]
    for _, loop in loops:
        loop.close()
