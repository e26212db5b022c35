"""Automatic recharge: the saved card is charged when an account's balance has fallen below its threshold.

An order comes from ``accounts/notices.py``, in the transaction that spent the money. Before each attempt it is written
down that it is made and with what amount, so a process that dies in between repeats the same attempt under the same
idempotency key. A new key is only used when it is certain that the attempt before it took no money.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

import orjson

from channels.credit import CreditAccount, CreditFault, FundsKind, MoveFunds, plan
from channels.instants import UnixMillis, UnixSeconds
from channels.payment import PICO_PER_CENT, PaymentRecord
from mppnode.accounts.documents import read_account
from mppnode.accounts.model import Account, Prepaid, Recharge
from mppnode.accounts.notices import RECHARGE, alert, recharge_order
from mppnode.billing.booking import Bookkeeper, Paid, changed, customers, still_low
from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind
from mppnode.gateways.stripe_objects import Purpose
from mppnode.ledger import credit_lists, credit_talk
from mppnode.ledger.credit_lists import By
from mppnode.ledger.credit_rows import Task, TaskState
from mppnode.ledger.talk import Talk
from mppnode.observe.logs import Level, Log

if TYPE_CHECKING:
    from mppnode.gateways.stripe_api import Charge, StripeGateway
    from mppnode.gateways.stripe_objects import Payment

DECLINED_MS: Final = (3_600_000, 21_600_000, 86_400_000)
"""1, 6 and 24 hours after a decline: a card that was empty at night may not be by day; card networks count retries."""
AGAIN_MS: Final = (60_000, 300_000, 900_000, 3_600_000)
"""After an outcome that is not known, and after an outage: soon, then each hour."""
KEY_FORGOTTEN_MS: Final = 23 * 3_600_000
"""Stripe keeps the answer of a key for a day at least; an hour before that we look instead of asking again."""
_ORDERS_MAX: Final = 1_000  # of one account that are counted for its month; a month has fewer
_ACCOUNTS: Final = 200
_SKEW_S: Final = 600  # between Stripe's clock and ours, when payments are listed by time
_OPEN: Final = ("trying", "processing")
_PAID: Final = "paid"


@dataclass(frozen=True, slots=True)
class Order:
    """The document of a recharge's task: where its attempt stands. Instants are Unix milliseconds."""

    stage: str = ""
    """Empty, ``trying`` (an attempt may have been made), ``processing``, ``declined``, ``paid`` or why it ended."""
    attempt: int = 0
    cents: int = 0
    began_ms: int = 0
    """When the attempt was written down."""
    tries: int = 0
    payment: str | None = None
    customer: str = ""
    card: str = ""


class Recharger:
    """Works on due orders, one at a time. Every method raises ``ChannelFault`` with ``STORE_UNAVAILABLE``."""

    def __init__(self, gateway: StripeGateway, keeper: Bookkeeper, *, log: Log) -> None:
        self._stripe = gateway
        self._keeper = keeper
        self._books = keeper.books
        self._log = log

    async def work(self) -> int:
        """Work on every due order once; how many there were."""
        due = await self._books.due(RECHARGE)
        for task in due:
            await self._one(task)
        return len(due)

    async def look(self) -> int:
        """Order what nobody ordered: accounts that were below a threshold when it was set. Returns how many."""
        ordered, after = 0, None
        while page := await self._books.read(partial(customers, after, _ACCOUNTS)):
            after = page[-1].id
            for account in page:
                if account.billing.recharge is not None and (credit := await self._books.load(account.id)):
                    for task in recharge_order(credit, account, self._books.clock.now_millis()):
                        ordered += await self._books.add_task(task)
        return ordered

    async def _one(self, task: Task) -> None:
        claimed, wanted = await self._books.write(
            partial(_claim, task, self._books.clock.now_millis()), of=task.account
        )
        if claimed is None:
            return
        order = read_order(claimed)
        try:
            if order.payment is not None:
                await self._settle(claimed, order, await self._stripe.payment(order.payment))
            elif not wanted or self._books.clock.now_millis() - order.began_ms >= KEY_FORGOTTEN_MS:
                await self._find(claimed, order)
            else:
                await self._charge(claimed, order)
        except StripeFault as fault:
            await self._failed(claimed, order, fault)

    async def _charge(self, task: Task, order: Order) -> None:
        charge = await self._stripe.charge(
            Purpose(task.account, _reference(task, order)),
            customer=order.customer,
            payment_method=order.card,
            cents=order.cents,
            key=_reference(task, order),
        )
        await self._charged(task, order, charge)

    async def _charged(self, task: Task, order: Order, charge: Charge) -> None:
        match charge.outcome.value:
            case "succeeded":
                await self._paid(task, order, charge.payment, charge.amount)
            case "processing":
                await self._wait(task, replace(order, stage="processing", payment=charge.payment, tries=0))
            case _:
                await self._needs_owner(task, replace(order, payment=charge.payment))

    async def _settle(self, task: Task, order: Order, payment: Payment) -> None:
        """What has become of a payment that is known."""
        if payment.status == "succeeded":
            await self._paid(task, order, payment.id, payment.received)
        elif payment.status in ("processing", "requires_capture"):
            await self._wait(task, replace(order, stage="processing", payment=payment.id))
        elif payment.status == "requires_action":
            await self._needs_owner(task, replace(order, payment=payment.id))
        else:
            await self._declined(task, order, payment.status)

    async def _find(self, task: Task, order: Order) -> None:
        """Look for an attempt among the customer's payments: Stripe may have forgotten its key, or it is not wanted."""
        since = order.began_ms // 1000 - _SKEW_S
        until = self._books.clock.now() + _SKEW_S
        listed = await self._stripe.payments(since, until, customer=order.customer)
        found = [one for one in listed if one.tags.reference == _reference(task, order)]
        if found:
            await self._settle(task, order, found[0])
            return
        # Nothing was made, and nothing will be under that key: a new attempt is a new charge, and decided anew.
        fresh = replace(order, stage="declined", attempt=order.attempt + 1, tries=0)
        await self._move(task, fresh, due_in_ms=0)

    async def _failed(self, task: Task, order: Order, fault: StripeFault) -> None:
        if fault.kind in (StripeFaultKind.DECLINED, StripeFaultKind.INVALID):
            if fault.kind is StripeFaultKind.INVALID:
                self._log("recharge.invalid", level=Level.ERROR, task=task.id, code=fault.code)
            await self._declined(task, order, fault.decline_code or fault.code)
            return
        level = Level.ERROR if fault.kind is StripeFaultKind.REFUSED else Level.WARNING
        self._log("recharge.late", level=level, task=task.id, kind=fault.kind.value, code=fault.code)
        await self._wait(task, order)

    # --------------------------------------------------------------------------------------------------------- endings

    async def _paid(self, task: Task, order: Order, payment: str, cents: int) -> None:
        done = replace(order, stage=_PAID, payment=payment, cents=cents)

        def also(credit: CreditAccount, owner: Account) -> Talk[None]:
            at = self._books.clock.now_millis()
            moved = yield from credit_lists.move_task(task, _written(task, done, TaskState.DONE, at))
            if moved:
                yield from still_low(credit, owner, at)

        record = PaymentRecord(payment, paid=cents)
        try:
            await self._keeper.take_in(task.account, [record], event=None, news=Paid(), also=also)
        except CreditFault as fault:
            # Money came that the account cannot hold: only an operator can give it back, or make room for it. The
            # payment is written down, so that a retry books this one and takes no other.
            self._log("recharge.unbooked", level=Level.ERROR, task=task.id, reason=fault.reason.value)
            await self._park(task, done, fault.reason.value)
            return
        self._books.metrics.outbox_attempt(RECHARGE, "done")
        self._log("recharge.paid", account=task.account, cents=cents, payment=payment)

    async def _wait(self, task: Task, order: Order) -> None:
        pause = AGAIN_MS[min(order.tries, len(AGAIN_MS) - 1)]
        await self._move(task, replace(order, tries=order.tries + 1), due_in_ms=pause)

    async def _declined(self, task: Task, order: Order, code: str) -> None:
        """Try again later, under a new key, or give the card up."""
        if order.attempt < len(DECLINED_MS):
            pause = DECLINED_MS[order.attempt]
            later = replace(order, stage="declined", attempt=order.attempt + 1, tries=0, payment=None)
            await self._move(task, later, due_in_ms=pause)
            return
        self._log("recharge.given_up", level=Level.WARNING, account=task.account, code=code)
        await self._park(task, order, "declined", switch_off=True)

    async def _needs_owner(self, task: Task, order: Order) -> None:
        await self._park(task, order, "requires_action")

    async def _move(self, task: Task, order: Order, *, due_in_ms: int) -> None:
        at = self._books.clock.now_millis()
        await self._books.move_task(task, _written(task, order, TaskState.DUE, at + due_in_ms))
        self._books.metrics.outbox_attempt(RECHARGE, "again")

    async def _park(self, task: Task, order: Order, why: str, *, switch_off: bool = False) -> None:
        at = self._books.clock.now_millis()

        def talk() -> Talk[None]:
            yield from credit_talk.load_credit(task.account, lock=True)
            moved = yield from credit_lists.move_task(
                task, _written(task, replace(order, stage=why), TaskState.PARKED, at)
            )
            row = yield from credit_lists.find_account(By.ID, task.account)
            if not moved or row is None:
                return
            if switch_off:
                yield from credit_talk.change_account(task.account, partial(changed, _switched_off), at)
            if read_account(row).alerts is not None:
                data = {"reason": why, "amount_cents": order.cents, "recharge_enabled": not switch_off}
                yield from credit_talk.add_task(alert(task.account, "recharge.failed", (task.id,), data, at))

        await self._books.write(talk, of=task.account)
        self._books.metrics.outbox_attempt(RECHARGE, "parked")


def read_order(task: Task) -> Order:
    """The order in a task's document."""
    return Order(**orjson.loads(task.document))


def month_of(at_ms: int) -> tuple[int, int]:
    """The UTC month of an instant."""
    date = datetime.fromtimestamp(at_ms // 1000, tz=UTC)
    return date.year, date.month


def _reference(task: Task, order: Order) -> str:
    return f"{task.id}:{order.attempt}"


def _written(task: Task, order: Order, state: TaskState, due_ms: int) -> Task:
    return replace(task, document=orjson.dumps(asdict(order)).decode(), state=state, due_ms=due_ms)


def _claim(task: Task, at: UnixMillis) -> Talk[tuple[Task | None, bool]]:
    """Decide, with the account locked, whether an order is worked on now; writes down the attempt before it is made.

    False beside an attempt that may have been made and is not to be made any more.
    """
    credit = yield from credit_talk.load_credit(task.account, lock=True)
    row = yield from credit_lists.find_account(By.ID, task.account)
    orders = yield from credit_lists.tasks(task.account, RECHARGE, None, _ORDERS_MAX)
    order = read_order(task)
    others = [(one.state, read_order(one)) for one in orders if one.id != task.id]
    owner = None if row is None else read_account(row)
    why = _why_not(credit, owner, others, at)
    if order.stage in _OPEN or order.payment is not None:
        # An attempt may have been made: whatever has changed since, its end must be found out.
        return (yield from _claimed(task, order, at)), why is None
    if why is not None:
        yield from _drop(task, order, why, owner, at)
        return None, False
    assert owner is not None
    recharge = owner.billing.recharge
    assert recharge is not None
    assert owner.billing.customer is not None
    assert owner.billing.card is not None
    begun = replace(
        order,
        stage="trying",
        cents=recharge.amount_cents,
        began_ms=at,
        customer=owner.billing.customer,
        card=owner.billing.card,
    )
    return (yield from _claimed(task, begun, at)), True


def _claimed(task: Task, order: Order, at: UnixMillis) -> Talk[Task | None]:
    """The task as it is being worked on: whoever has read the same one has lost it."""
    due = at + AGAIN_MS[0]
    after = _written(task, order, TaskState.DUE, due)
    moved = yield from credit_lists.move_task(task, after)
    return replace(after, version=task.version + 1) if moved else None


def _why_not(
    credit: CreditAccount | None, owner: Account | None, others: Sequence[tuple[TaskState, Order]], at: UnixMillis
) -> str | None:
    """Why no money is to be taken now."""
    if credit is None or owner is None or owner.suspended_at is not None:
        return "suspended"
    recharge, billing = owner.billing.recharge, owner.billing
    if recharge is None or not isinstance(owner.terms, Prepaid) or billing.card is None or billing.customer is None:
        return "switched_off"
    if credit.balance >= recharge.threshold_cents * PICO_PER_CENT:
        return "enough"
    # A declined one waits for its hour: another order must not be the way around it.
    if any(state is TaskState.DUE and other.stage in (*_OPEN, "declined") for state, other in others):
        return "another"
    if _month(others, at) + recharge.amount_cents > recharge.month_cap_cents:
        return "month_cap"
    return None if _fits(credit, recharge.amount_cents, at) else "full"


def _fits(credit: CreditAccount, cents: int, at: UnixMillis) -> bool:
    """Whether an account can hold so much more: what could not be booked is not to be taken."""
    try:
        plan(credit, MoveFunds(FundsKind.PAYMENT, "", cents * PICO_PER_CENT), now=UnixSeconds(at // 1000))
    except CreditFault:
        return False
    return True


def _month(others: Sequence[tuple[TaskState, Order]], at: UnixMillis) -> int:
    """Cents that were taken, or may have been, in the UTC month of ``at``."""
    month = month_of(at)
    taken = [order for _, order in others if order.stage in (*_OPEN, _PAID) or order.payment is not None]
    return sum(order.cents for order in taken if month_of(order.began_ms) == month)


def _drop(task: Task, order: Order, why: str, owner: Account | None, at: UnixMillis) -> Talk[None]:
    ended = _written(task, replace(order, stage=why), TaskState.DONE, at)
    moved = yield from credit_lists.move_task(task, ended)
    if moved and why == "month_cap" and owner is not None and owner.alerts is not None:
        recharge = owner.billing.recharge
        data: Mapping[str, object] = {"reason": why, **_caps(recharge), "recharge_enabled": True}
        yield from credit_talk.add_task(alert(task.account, "recharge.failed", (why, *month_of(at)), data, at))


def _caps(recharge: Recharge | None) -> Mapping[str, object]:
    if recharge is None:
        return {}
    return {"amount_cents": recharge.amount_cents, "month_cap_cents": recharge.month_cap_cents}


def _switched_off(account: Account) -> Account:
    return replace(account, billing=replace(account.billing, recharge=None))
