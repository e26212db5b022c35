"""Post-paid usage on its way to Stripe's meter: sealed in the ledger first, then reported until it is certain.

Sealing moves ``reported_micro`` and writes the report in one transaction, so what is reported is what the account says,
whatever dies in between. Each report has a minute of its customer's to itself. That is what makes an outcome that was
never learnt decidable after Stripe has forgotten the identifier: what Stripe counted in that minute is this report, or
nothing.

Source: docs.stripe.com/api/billing/meter-event/create (identifiers, times) and .../meter-event-summary/list (minutes).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import orjson

from channels.credit import AccountId, CreditAccount, CreditPlan, ReportUsage, plan
from channels.instants import UnixMillis, UnixSeconds
from mppnode.accounts.documents import read_account
from mppnode.accounts.model import Account, Postpaid
from mppnode.billing.booking import customers
from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind
from mppnode.kernel.probe import Probe, unwatched
from mppnode.ledger import credit_lists, credit_talk
from mppnode.ledger.credit_lists import By
from mppnode.ledger.credit_rows import Task, TaskState
from mppnode.ledger.credits import Credits
from mppnode.ledger.talk import Talk
from mppnode.observe.logs import Level, Log

if TYPE_CHECKING:
    from mppnode.gateways.stripe_api import StripeGateway

METER: Final = "meter"
MINUTE_S: Final = 60
"""One report per account and minute at most: Stripe adds up by minutes, and takes so many events a second of a node."""
DOUBT_MS: Final = 20 * 3_600_000
"""Stripe forgets an identifier after 24 hours at the earliest: well before, we compare instead of trusting it."""
PARK_S: Final = 34 * 86_400
"""Stripe takes usage of the last 35 days; a day before that somebody must look, while there is something to be done."""
AGAIN_MS: Final = (30_000, 60_000, 300_000, 900_000, 3_600_000)
VALUE_MAX: Final = 10**12
"""Micro-dollars of one report, as in the gateway: a million dollars in a minute is a mistake, and is not billed."""
_AT_ONCE: Final = 8  # customers reported at once; of one customer one at a time, as Stripe wants it
_ACCOUNTS: Final = 200
_HOLD_MS: Final = 60_000  # a report in flight is nobody else's for so long: a call with all its attempts ends before
_TOO_OLD: Final = "timestamp_too_far_in_past"
_AHEAD: Final = "timestamp_in_future"


@dataclass(frozen=True, slots=True)
class Report:
    """The document of a meter's task: ``value`` micro-dollars used until ``at`` (Unix seconds)."""

    customer: str
    value: int
    at: int
    total: int
    """What the account has reported with this one, micro-dollars."""
    first_ms: int = 0
    """When it was first sent, or about to be; 0 before that."""
    tries: int = 0
    why: str = ""
    """Why it was parked."""


class Meters:
    """Seals usage and reports it. Every method raises ``ChannelFault`` with ``STORE_UNAVAILABLE``."""

    def __init__(
        self, gateway: StripeGateway, books: Credits, *, event_name: str, log: Log, probe: Probe = unwatched
    ) -> None:
        self._stripe = gateway
        self._books = books
        self._event_name = event_name
        self._log = log
        self._probe = probe
        self._meter: str | None = None

    # --------------------------------------------------------------------------------------------------------- sealing

    async def seal(self) -> int:
        """Write a report for every post-paid account that has used something; returns how many."""
        sealed, after = 0, None
        while page := await self._books.read(partial(customers, after, _ACCOUNTS)):
            after = page[-1].id
            for account in page:
                # A look first: most accounts have used nothing, and a transaction for each would be a write for each.
                if is_metered(account) and await self._has_usage(account.id):
                    sealed += await self._seal(account)
        return sealed

    async def _has_usage(self, account: AccountId) -> bool:
        credit = await self._books.load(account)
        return credit is not None and bool(plan(credit, ReportUsage(), now=self._books.clock.now()).events)

    async def _seal(self, account: Account) -> bool:
        at = self._books.clock.now_millis()
        self._probe("seal.before")
        task = await self._books.write(partial(_sealed, account.id, at), of=account.id)
        self._probe("seal.after")
        if task is not None and task.state is TaskState.PARKED:
            self._log("meter.parked", level=Level.ERROR, account=account.id, why=read_report(task).why)
        return task is not None

    # --------------------------------------------------------------------------------------------------------- sending

    async def send(self) -> int:
        """Report what is due, the oldest first, one at a time for each customer; returns how many were confirmed."""
        by_customer: dict[str, list[Task]] = {}
        for task in sorted(await self._books.due(METER), key=lambda task: task.created_ms):
            by_customer.setdefault(read_report(task).customer, []).append(task)
        slots = asyncio.Semaphore(_AT_ONCE)

        async def in_turn(tasks: Sequence[Task]) -> int:
            async with slots:
                # Not faster by gathering: Stripe answers a second call for the same customer and meter with 429.
                return sum([await self._send(task) for task in tasks])

        async with asyncio.TaskGroup() as side:
            running = [side.create_task(in_turn(tasks)) for tasks in by_customer.values()]
        return sum(one.result() for one in running)

    async def _send(self, task: Task) -> bool:
        now, report = self._books.clock.now_millis(), read_report(task)
        if now // 1000 - report.at >= PARK_S:
            await self._park(task, report, "too_old")
            return False
        if report.value > VALUE_MAX:
            # Also one that an operator let be tried again: the gateway would refuse it, and the others after it wait.
            await self._park(task, report, "too_much")
            return False
        # On disk before anything is sent: the day in which Stripe knows the identifier is counted from here.
        begun = replace(report, first_ms=report.first_ms or now)
        claimed = _written(task, begun, TaskState.DUE, now + _HOLD_MS)
        if not await self._books.move_task(task, claimed):
            return False
        claimed = replace(claimed, version=task.version + 1)
        try:
            if now - begun.first_ms < DOUBT_MS or not await self._was_counted(claimed, begun):
                self._probe("meter.before")
                await self._stripe.report_usage(
                    event_name=self._event_name,
                    identifier=task.id,
                    customer=begun.customer,
                    value=begun.value,
                    timestamp=begun.at,
                )
                self._probe("meter.after")
        except _UnclearError:
            await self._park(claimed, begun, "unclear")
            return False
        except StripeFault as fault:
            await self._failed(claimed, begun, fault)
            return False
        self._probe("metered.before")
        done = await self._books.move_task(claimed, replace(claimed, state=TaskState.DONE, due_ms=now))
        self._probe("metered.after")
        self._books.metrics.outbox_attempt(METER, "done")
        return done

    async def _was_counted(self, task: Task, report: Report) -> bool:
        """Whether Stripe has counted a report whose identifier it may have forgotten."""
        if self._meter is None:
            self._meter = await self._stripe.find_meter(self._event_name)
        if self._meter is None:
            raise StripeFault(StripeFaultKind.REFUSED, "no_such_meter")
        since = report.at - report.at % MINUTE_S
        counted = await self._stripe.reported_usage(
            meter=self._meter, customer=report.customer, since=since, until=since + MINUTE_S
        )
        if counted not in (0, report.value):
            self._log("meter.unclear", level=Level.ERROR, task=task.id, counted=counted, value=report.value)
            raise _UnclearError
        return counted == report.value

    async def _failed(self, task: Task, report: Report, fault: StripeFault) -> None:
        if fault.kind is StripeFaultKind.INVALID and fault.code != _AHEAD:
            await self._park(task, report, "too_old" if fault.code == _TOO_OLD else "refused")
            return
        level = Level.ERROR if fault.kind is StripeFaultKind.REFUSED else Level.WARNING
        self._log("meter.late", level=level, task=task.id, kind=fault.kind.value, code=fault.code)
        pause = AGAIN_MS[min(report.tries, len(AGAIN_MS) - 1)]
        later = replace(report, tries=report.tries + 1)
        due = self._books.clock.now_millis() + pause
        await self._books.move_task(task, _written(task, later, TaskState.DUE, due))
        self._books.metrics.outbox_attempt(METER, "again")

    async def _park(self, task: Task, report: Report, why: str) -> None:
        now = self._books.clock.now_millis()
        self._log("meter.parked", level=Level.ERROR, task=task.id, account=task.account, micro=report.value, why=why)
        await self._books.move_task(task, _written(task, replace(report, why=why), TaskState.PARKED, now))
        self._books.metrics.outbox_attempt(METER, "parked")


class _UnclearError(Exception):
    """Stripe has counted something else in this minute, and nothing says what."""


def is_metered(account: Account) -> bool:
    """Whether an account's usage is billed by Stripe."""
    billing = account.billing
    return isinstance(account.terms, Postpaid) and billing.subscription is not None and billing.customer is not None


def read_report(task: Task) -> Report:
    """The report in a task's document."""
    return Report(**orjson.loads(task.document))


def identifier_of(account: AccountId, total_micro: int) -> str:
    """The name of a report at Stripe: the same for the same state of the account, whoever computes it."""
    return f"meter_{hashlib.sha256(f'{account}:{total_micro}'.encode()).hexdigest()[:40]}"


def _written(task: Task, report: Report, state: TaskState, due_ms: int) -> Task:
    return replace(task, document=orjson.dumps(asdict(report)).decode(), state=state, due_ms=due_ms)


def _sealed(account: AccountId, at: UnixMillis) -> Talk[Task | None]:
    """Report all ended usage, in a minute of its own; None when there is none, or this minute has a report."""
    credit = yield from credit_talk.load_credit(account, lock=True)
    row = yield from credit_lists.find_account(By.ID, account)
    owner = None if row is None else read_account(row)
    if credit is None or owner is None or not is_metered(owner):
        return None
    last = yield from credit_lists.tasks(account, METER, None, 1)
    if last and at - last[0].created_ms < MINUTE_S * 1000:
        return None
    made = plan(credit, ReportUsage(), now=UnixSeconds(at // 1000))
    if not made.events:
        return None
    task = _task(owner, credit, made, last, at)
    yield from credit_talk.write_credit(credit, made, at)
    yield from credit_talk.add_task(task)
    return task


def _task(owner: Account, credit: CreditAccount, made: CreditPlan, last: Sequence[Task], at: UnixMillis) -> Task:
    customer = owner.billing.customer
    assert customer is not None
    used_at = int(credit.charged_at)
    if last:
        # Reports are a minute apart and usage is never ahead of them, so the next minute has begun by now.
        used_at = max(used_at, _next_minute(read_report(last[0]).at))
    total = made.account.reported_micro
    report = Report(customer, made.result.reported_micro, used_at, total)
    state = TaskState.DUE
    if report.value > VALUE_MAX:
        report, state = replace(report, why="too_much"), TaskState.PARKED
    name = identifier_of(owner.id, total)
    return Task(name, METER, owner.id, at, orjson.dumps(asdict(report)).decode(), state, created_ms=at)


def _next_minute(at: int) -> int:
    return at - at % MINUTE_S + MINUTE_S
