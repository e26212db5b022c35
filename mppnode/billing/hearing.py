"""What becomes of each of Stripe's events: whose it is, what it says of a payment, and what is booked.

Nothing is booked on the word of an event alone where the order of events could matter: refunds are read from Stripe as
they are now, and so is whether what failed has been paid since. The rest is joined (``channels/payment.py``). One event
is one transaction; when a question to Stripe or the ledger fails, nothing has happened, and Stripe sends it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import orjson

from channels.credit import AccountId, CreditFault, FundsKind
from channels.instants import UnixMillis
from channels.payment import DisputeState, PaymentRecord, RefundState
from mppnode.accounts.documents import read_account
from mppnode.accounts.model import Account
from mppnode.billing.booking import Bookkeeper, Failed, Paid, changed
from mppnode.gateways.stripe_events import (
    CardSaved,
    CustomerDeleted,
    DisputeLost,
    DisputeOpened,
    DisputeWon,
    Ignored,
    InvoiceFailed,
    InvoicePaid,
    MeterErrors,
    PaymentFailed,
    PaymentSucceeded,
    Refunded,
    RefundFailed,
    StripeEvent,
    SubscriptionEnded,
)
from mppnode.ledger import credit_grants, credit_lists, credit_talk
from mppnode.ledger.credit_lists import By
from mppnode.ledger.credit_rows import Task, TaskState
from mppnode.ledger.credit_talk import OtherAccounts
from mppnode.ledger.talk import Talk
from mppnode.observe.logs import Level, Log

if TYPE_CHECKING:
    from mppnode.gateways.stripe_api import StripeGateway
    from mppnode.gateways.stripe_objects import Invoice, Refund, Tags

USD: Final = "usd"
"""The only currency anything is sold in; another one is not ours to convert."""
FORGOTTEN: Final = "customer"
"""A task of this kind is kept for each customer that was deleted at Stripe."""
ENDED: Final = "subscription"
"""A task of this kind is kept for each subscription that has ended at Stripe."""
SAVED: Final = "card"
"""A task of this kind is kept for the newest card of an account: when Stripe says it was saved."""
_REFUNDS: Final[Mapping[str | None, RefundState]] = MappingProxyType(
    {"succeeded": RefundState.SUCCEEDED, "failed": RefundState.FAILED, "canceled": RefundState.FAILED}
)
"""Others are on their way: docs.stripe.com/api/refunds/object, ``status``."""
_UNKNOWN: Final = "of no account of ours"
_NO_DOLLARS: Final = "not in dollars"
_OTHER_INVOICE: Final = "not for usage"


class Hearer:
    """Takes events in. Raises ``StripeFault``, and ``ChannelFault`` with ``STORE_UNAVAILABLE``."""

    def __init__(self, gateway: StripeGateway, keeper: Bookkeeper, *, log: Log) -> None:
        self._stripe = gateway
        self._keeper = keeper
        self._books = keeper.books
        self._log = log

    async def hear(self, event: StripeEvent) -> None:
        """Take one event in; a copy of one that was changes nothing.

        Raises:
            CreditFault: the amount fits no account: nothing was booked, and an operator must look.
        """
        if await self._keeper.is_known(event.id):
            return
        try:
            await self._take_in(event)
        except OtherAccounts:
            await self._pass(event, "the payment is another account's", level=Level.ERROR)
        except CreditFault as fault:
            self._log("billing.unbooked", level=Level.ERROR, event_id=event.id, reason=fault.reason.value)
            raise

    async def _take_in(self, event: StripeEvent) -> None:
        match event.what:
            case PaymentSucceeded():
                await self._paid(event, event.what)
            case PaymentFailed():
                await self._payment_failed(event, event.what)
            case CardSaved():
                await self._card(event, event.what.customer, event.what.tags, event.what.payment_method)
            case Refunded():
                what = event.what
                await self._refunds(event, what.payment, what.tags.account, what.customer)
            case RefundFailed():
                await self._refunds(event, event.what.payment, None, None)
            case DisputeOpened() | DisputeWon() | DisputeLost():
                await self._dispute(event, event.what)
            case InvoicePaid():
                await self._invoice_paid(event, event.what)
            case InvoiceFailed():
                await self._invoice_failed(event, event.what)
            case CustomerDeleted():
                await self._customer_deleted(event, event.what.customer)
            case SubscriptionEnded():
                await self._subscription_ended(event, event.what)
            case MeterErrors():
                for error in await self._stripe.meter_errors(event.id):
                    self._log("billing.meter", level=Level.ERROR, code=error.code, count=error.count)
                    self._books.metrics.meter_error(error.count)
                await self._books.note_event(event.id)
            case Ignored():
                pass  # not noted either: nothing would be changed by a copy

    # -------------------------------------------------------------------------------------------------------- payments

    async def _paid(self, event: StripeEvent, what: PaymentSucceeded) -> None:
        account = await self.account_of(what.payment, what.tags.account, what.customer)
        if account is None:
            await self._pass(event, _UNKNOWN)
        elif what.currency != USD:
            await self._pass(event, _NO_DOLLARS, level=Level.ERROR, payment=what.payment)
        elif what.tags.account is None:
            # The payment of an invoice, or something an operator sold by hand: invoice.paid tells of the first.
            await self._pass(event, "not sold by a node", level=Level.INFO, payment=what.payment)
        else:
            if what.saved_card is not None and what.customer is not None:
                await self._save(event, account, what.customer, what.saved_card, mark=False)
            record = PaymentRecord(what.payment, paid=what.amount)
            await self._keeper.take_in(account.id, [record], event=event.id, news=Paid())

    async def _payment_failed(self, event: StripeEvent, what: PaymentFailed) -> None:
        # No debt: a card was mistyped on a page of Checkout, or it was for an invoice, which has an event of its own.
        self._log("billing.payment_failed", payment=what.payment, code=what.code, decline_code=what.decline_code)
        await self._books.note_event(event.id)

    async def _refunds(self, event: StripeEvent, payment: str | None, tagged: str | None, customer: str | None) -> None:
        account = None if payment is None else await self.account_of(payment, tagged, customer)
        if account is None or payment is None:
            await self._pass(event, _UNKNOWN)
            return
        record = refunded(payment, await self._stripe.refunds_of(payment))
        await self._keeper.take_in(account.id, [record], event=event.id)

    async def _dispute(self, event: StripeEvent, what: DisputeOpened | DisputeWon | DisputeLost) -> None:
        state = _state(what)
        account = None if what.payment is None else await self.account_of(what.payment, None, None)
        if account is None or what.payment is None:
            await self._pass(event, _UNKNOWN)
            return
        if what.currency != USD:
            await self._pass(event, _NO_DOLLARS, level=Level.ERROR, payment=what.payment)
            return
        self._log("billing.dispute", level=Level.WARNING, account=account.id, dispute=what.dispute, state=state.name)
        disputes = MappingProxyType({what.dispute: (what.amount, state)})
        await self._keeper.take_in(account.id, [PaymentRecord(what.payment, disputes=disputes)], event=event.id)

    # -------------------------------------------------------------------------------------------------------- invoices

    async def _invoice_paid(self, event: StripeEvent, what: InvoicePaid) -> None:
        account = await self._by_customer(what.customer)
        if account is None:
            await self._pass(event, _UNKNOWN)
            return
        if not is_for_usage(account, what.subscription, what.tags):
            await self._pass(event, _OTHER_INVOICE, level=Level.INFO)
            return
        records = await self.payments_of(what.invoice)
        # An invoice of nothing is paid too, and says nothing about what is owed on another one.
        news = Paid() if any(record.paid for record in records) else Paid(what.invoice)
        await self._keeper.take_in(account.id, records, event=event.id, news=news)

    async def _invoice_failed(self, event: StripeEvent, what: InvoiceFailed) -> None:
        account = await self._by_customer(what.customer)
        if account is None:
            await self._pass(event, _UNKNOWN)
        elif not is_for_usage(account, what.subscription, what.tags):
            await self._pass(event, _OTHER_INVOICE)
        elif sum(paid.amount for paid in await self._stripe.payments_of(what.invoice)) >= what.due > 0:
            await self._books.note_event(event.id)  # paid since: events come in any order
        else:
            owed = {"account": account.id, "invoice": what.invoice, "cents": what.amount}
            self._log("billing.unpaid", level=Level.WARNING, **owed)
            await self._keeper.take_in(account.id, event=event.id, news=Failed(what.invoice))

    async def payments_of(self, invoice: str) -> list[PaymentRecord]:
        """What an invoice was paid with. Money that came another way counts under its own name. Raises StripeFault."""
        return [
            PaymentRecord(paid.payment or paid.id, FundsKind.INVOICE, paid.amount)
            for paid in await self._stripe.payments_of(invoice)
            if paid.currency == USD
        ]

    # ------------------------------------------------------------------------------------------------ cards, customers

    async def _card(self, event: StripeEvent, customer: str, tags: Tags, card: str) -> None:
        account = await self._named(tags.account) or await self._by_customer(customer)
        if account is None or account.billing.customer != customer:
            await self._pass(event, _UNKNOWN)
            return
        await self._save(event, account, customer, card, mark=True)

    async def _save(self, event: StripeEvent, account: Account, customer: str, card: str, *, mark: bool) -> None:
        """Keep a card, unless a newer one is kept or its customer is not the account's. ``mark`` notes the event."""
        if account.billing.subscription is not None and account.billing.customer == customer:
            # Before it is kept: a copy of this event does it again when we die in between.
            await self._stripe.set_default_card(customer=customer, payment_method=card, key=f"{event.id}-{card}")
        at = self._books.clock.now_millis()
        noted = event.id if mark else None
        await self._books.write(
            lambda: _saved(account.id, customer, card, created=event.created, event=noted, at=at), of=account.id
        )

    async def _customer_deleted(self, event: StripeEvent, customer: str) -> None:
        account = await self._by_customer(customer)
        if account is None:
            await self._pass(event, _UNKNOWN)
            return
        self._log("billing.customer_deleted", level=Level.WARNING, account=account.id)
        at = self._books.clock.now_millis()
        # Its name is part of the next one's idempotency key: Stripe would answer the old key with the deleted one.
        task = Task(_forgotten(customer), FORGOTTEN, account.id, at, "{}", TaskState.DONE, created_ms=at)
        await self._books.add_task(task)
        await self._keeper.change(account.id, event.id, partial(_without, customer), overdraft=0)

    async def _subscription_ended(self, event: StripeEvent, what: SubscriptionEnded) -> None:
        account = await self._by_customer(what.customer)
        if account is None:
            await self._pass(event, _UNKNOWN)
            return
        if account.billing.subscription == what.subscription:
            self._log("billing.subscription_ended", level=Level.ERROR, account=account.id)
        at = self._books.clock.now_millis()
        # As above: under the old key Stripe would answer with the subscription that has ended.
        name = f"{ENDED}-{what.subscription}"
        await self._books.add_task(Task(name, ENDED, account.id, at, "{}", TaskState.DONE, created_ms=at))
        # Nobody would be billed for what it goes on using: it may owe nothing more until it is subscribed again.
        await self._keeper.change(account.id, event.id, partial(_unsubscribed, what.subscription), overdraft=0)

    # ----------------------------------------------------------------------------------------------------------- whose

    async def account_of(self, payment: str, tagged: str | None, customer: str | None) -> Account | None:
        """Whose payment it is: as it is tagged, as we know it, as its customer, or as Stripe says when asked.

        A tag counts with its account's own customer only: whoever can write one on a payment of his must not be able
        to put his money, or his card, into another's account.
        """
        account = await self._named(tagged)
        if account is not None and customer is not None and not await self._is_of(account, customer):
            self._log("billing.foreign_tag", level=Level.ERROR, account=account.id, payment=payment, customer=customer)
            return None
        if account is None and (known := await self._books.read(partial(credit_lists.payment_of, payment))):
            account = await self._named(known[0])
        if account is None and customer is not None:
            account = await self._by_customer(customer)
        if account is None and tagged is None and customer is None:
            asked = await self._stripe.payment(payment)
            if asked.tags.account is not None or asked.customer is not None:
                return await self.account_of(payment, asked.tags.account or "", asked.customer)
        return account

    async def _is_of(self, account: Account, customer: str) -> bool:
        """Whether a customer is, or was until it was deleted, an account's."""
        if account.billing.customer == customer:
            return True
        was = await self._books.read(partial(credit_grants.task, _forgotten(customer)))
        return was is not None and was.account == account.id

    async def invoice_account(self, invoice: Invoice) -> Account | None:
        """Whose invoice for usage it is."""
        account = None if invoice.customer is None else await self._by_customer(invoice.customer)
        return account if account is not None and is_for_usage(account, invoice.subscription, invoice.tags) else None

    async def _named(self, account: str | None) -> Account | None:
        return await self._found(By.ID, account) if account else None

    async def _by_customer(self, customer: str) -> Account | None:
        return await self._found(By.CUSTOMER, customer)

    async def _found(self, by: By, value: str) -> Account | None:
        row = await self._books.read(partial(credit_lists.find_account, by, value))
        return None if row is None else read_account(row)

    async def _pass(
        self, event: StripeEvent, why: str, *, level: Level = Level.WARNING, payment: str | None = None
    ) -> None:
        """Note an event that books nothing, and say so."""
        if await self._books.note_event(event.id):
            self._log("billing.passed", level=level, event_id=event.id, type=event.type, why=why, payment=payment)


def is_for_usage(account: Account, subscription: str | None, tags: Tags) -> bool:
    """Whether an invoice is of a subscription of ours; operators may sell their customers other things as well."""
    return subscription is not None and (
        subscription == account.billing.subscription or tags.account == account.id
    )


def refunded(payment: str, refunds: Iterable[Refund]) -> PaymentRecord:
    """What the refunds of a payment say of it."""
    states = {
        one.id: (one.amount, _REFUNDS.get(one.status, RefundState.PENDING)) for one in refunds if one.currency == USD
    }
    return PaymentRecord(payment, refunds=MappingProxyType(states))


def _forgotten(customer: str) -> str:
    return f"{FORGOTTEN}-{customer}"


def _state(what: DisputeOpened | DisputeWon | DisputeLost) -> DisputeState:
    if isinstance(what, DisputeOpened):
        return DisputeState.INQUIRY if what.inquiry else DisputeState.OPEN
    return DisputeState.WON if isinstance(what, DisputeWon) else DisputeState.LOST


def _saved(
    account: AccountId, customer: str, card: str, *, created: int, event: str | None, at: UnixMillis
) -> Talk[None]:
    """Keep a card with the time Stripe saved it; an older one that is heard of late changes nothing."""
    yield from credit_talk.load_credit(account, lock=True)
    if event is not None and not (yield from credit_talk.note_event(event, at)):
        return
    row = yield from credit_lists.find_account(By.ID, account)
    if row is None or row.customer != customer:
        return  # it went with its customer
    kept = yield from credit_lists.tasks(account, SAVED, None, 1)
    document = orjson.dumps({"created": created}).decode()
    if kept and orjson.loads(kept[0].document)["created"] > created:
        return
    if kept:
        yield from credit_lists.move_task(kept[0], replace(kept[0], document=document))
    else:
        task = Task(f"{SAVED}-{account}", SAVED, account, at, document, TaskState.DONE, created_ms=at)
        yield from credit_talk.add_task(task)
    if read_account(row).billing.card != card:
        yield from credit_talk.change_account(account, partial(changed, partial(_with_card, card)), at)


def _with_card(card: str, account: Account) -> Account:
    return replace(account, billing=replace(account.billing, card=card))


def _unsubscribed(subscription: str, account: Account) -> Account:
    """The account without what has ended, unless it has another subscription by now."""
    if account.billing.subscription != subscription:
        return account
    return replace(account, billing=replace(account.billing, subscription=None))


def _without(customer: str, account: Account) -> Account:
    """The account without what was deleted, unless it has another customer by now."""
    if account.billing.customer != customer:
        return account
    return replace(account, billing=replace(account.billing, customer=None, card=None, subscription=None))
