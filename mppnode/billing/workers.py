"""The loops of billing: each runs on the node that leads, and outlives whatever Stripe or the ledger does.

Two nodes that both believe to lead do no harm: every task is claimed by its version, and every call has its key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from channels.credit import AccountId, CreditFault
from channels.faults import ChannelFault
from channels.model import NodeId
from mppnode.billing.alerts import AlertWorker
from mppnode.billing.meters import Meters
from mppnode.billing.recharge import Recharger
from mppnode.gateways.stripe_faults import StripeFault
from mppnode.kernel.clock import Clock
from mppnode.ledger import credit_grants
from mppnode.ledger.base import Ledger
from mppnode.ledger.credit_purge import purge
from mppnode.ledger.credit_rows import Task, TaskState
from mppnode.ledger.credits import Credits
from mppnode.observe.logs import Level, Log

if TYPE_CHECKING:
    from mppnode.billing.reconcile import Reconciler

JOB: Final = "billing"
PASS_S: Final = 5.0
"""Between two looks at the outbox: a recharge is asked for while there is still something left to spend."""
SEAL_S: Final = 20.0
LOOK_S: Final = 600.0
"""Between two searches for accounts that were below their threshold before anybody spent anything."""
DAILY_S: Final = 600.0
"""Between two questions whether today was reconciled; a restart of the node does not begin the day anew."""
DAY_S: Final = 86_400
BACK_DAYS: Final = 3
"""Days that are compared each time: Stripe sends events for three days, and an invoice is open for a while."""
RECONCILED: Final = "reconciled"
FORGOT: Final = "forgot"
_NOBODY: Final = AccountId("")

Sleep = Callable[[float], Awaitable[None]]
Loop = Coroutine[Any, Any, None]


@dataclass(frozen=True, slots=True)
class Workers:
    """Everything that is done without a request."""

    ledger: Ledger
    node: Callable[[], NodeId]
    books: Credits
    clock: Clock
    log: Log
    recharger: Recharger | None
    meters: Meters | None
    reconciler: Reconciler | None
    alerts: AlertWorker | None

    def daemons(self, sleep: Sleep) -> Iterator[tuple[str, Loop]]:
        """Every loop by name, to be spawned and cancelled by the caller."""
        if self.recharger is not None:
            yield "recharge", self.keep("recharge", self.recharger.work, PASS_S, sleep)
            yield "recharge search", self.keep("recharge search", self.recharger.look, LOOK_S, sleep)
        if self.meters is not None:
            yield "seal usage", self.keep("seal usage", self.meters.seal, SEAL_S, sleep)
            yield "report usage", self.keep("report usage", self.meters.send, PASS_S, sleep)
        if self.reconciler is not None:
            yield "billing day", self.keep("billing day", self.daily, DAILY_S, sleep)
        yield "forget", self.keep("forget", self.forget, DAILY_S, sleep)
        if self.alerts is not None:
            yield "alerts", self.keep("alerts", self.alerts.work, PASS_S, sleep)

    async def keep(self, name: str, work: Callable[[], Awaitable[int]], pause_s: float, sleep: Sleep) -> None:
        """Do ``work`` again and again while this node leads, until cancelled."""
        while True:
            await sleep(pause_s)
            try:
                if await self.ledger.lead(JOB, self.node()):
                    await work()
            except (ChannelFault, StripeFault, CreditFault) as fault:
                self.log("billing.late", level=Level.WARNING, job=name, why=str(fault))
            except Exception as error:  # noqa: BLE001 - one strange account must not end the work for all the others
                # Its type and no more: an exception we did not foresee may quote what it was given.
                self.log("billing.failed", level=Level.ERROR, job=name, error=type(error).__name__)

    async def daily(self) -> int:
        """Reconcile once a UTC day, of all nodes together; 1 if this was it."""
        assert self.reconciler is not None
        now = self.clock.now()
        return await self._once(RECONCILED, partial(self.reconciler.run, (now // DAY_S - BACK_DAYS) * DAY_S, now))

    async def forget(self) -> int:
        """Forget once a UTC day what is old enough; 1 if this was it. Not with the comparison: Stripe may be away."""
        return await self._once(FORGOT, partial(purge, self.books))

    async def _once(self, kind: str, work: Callable[[], Awaitable[object]]) -> int:
        name = f"{kind}-{self.clock.now() // DAY_S}"
        if await self.books.read(lambda: credit_grants.task(name)) is not None:
            return 0
        await work()
        at = self.clock.now_millis()
        await self.books.add_task(Task(name, kind, _NOBODY, at, "{}", TaskState.DONE, created_ms=at))
        return 1
