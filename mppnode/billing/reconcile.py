"""Once a day, Stripe's objects against the ledger: what was never announced is booked, what differs is reported.

Everything found is taken in through the same join as an announcement, so a day that is reconciled twice changes nothing
the second time. Amounts are cents unless a name says micro.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import orjson

from channels.credit import AccountId, CreditAccount, CreditFault
from channels.payment import DisputeState, PaymentRecord, RefundState, joined
from mppnode.accounts.documents import read_account
from mppnode.accounts.model import Account
from mppnode.billing.booking import Bookkeeper, Paid
from mppnode.billing.hearing import USD, Hearer, refunded
from mppnode.billing.meters import METER, MINUTE_S, Report, is_metered
from mppnode.gateways.stripe_faults import StripeFault, StripeFaultKind
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_lists import By
from mppnode.ledger.credit_rows import TaskState
from mppnode.ledger.credit_talk import OtherAccounts, load_credit
from mppnode.ledger.talk import Talk
from mppnode.observe.logs import Level, Log

if TYPE_CHECKING:
    from mppnode.gateways.stripe_api import StripeGateway
    from mppnode.gateways.stripe_objects import Dispute

_PAGE: Final = 200
_FIRST_S: Final = 1_000_000_000  # a time before every payment, and with as many digits as today's
_REFUNDS_S: Final = 30 * 86_400  # before the period: a bank can return a refund for a month after it was made
_DISPUTES_S: Final = 120 * 86_400  # a bank decides within about three months, with evidence and appeal
_INVOICES_S: Final = 60 * 86_400  # Stripe tries a card for up to two months; only those of suspended accounts are read
_COUNTING_S: Final = 3_600  # Stripe counts late: reports of the last hour are compared the next time
_DIFFERENCES_MAX: Final = 1_000  # told one by one; beyond that something is wrong that a longer list does not explain


@dataclass(frozen=True, slots=True)
class Side:
    """What one side has of the payments of a period."""

    payments: int = 0
    paid: int = 0
    refunded: int = 0
    disputed: int = 0

    def plus(self, record: PaymentRecord) -> Side:
        """With one more payment."""
        back = sum(cents for cents, state in record.refunds.values() if state is not RefundState.FAILED)
        lost = (DisputeState.OPEN, DisputeState.LOST)
        disputed = sum(cents for cents, state in record.disputes.values() if state in lost)
        here = record.paid is not None
        return Side(
            self.payments + here, self.paid + (record.paid or 0), self.refunded + back, self.disputed + disputed
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that does not agree, or did not before it was booked."""

    account: AccountId
    what: str
    """``payment``, ``entries`` (statement against balance), ``reports`` (outbox against account) or ``meter``."""
    reference: str
    ours: int
    theirs: int


@dataclass(slots=True)
class Reconciled:
    """The result of one comparison. ``ledger`` is before anything was booked."""

    stripe: Side = Side()
    ledger: Side = Side()
    booked: int = 0
    """Payments that were not, or not fully, known."""
    foreign: int = 0
    """Payments at Stripe that belong to no account of ours."""
    accounts: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing differs that booking could not heal."""
        return all(difference.what == "payment" for difference in self.differences)


class Reconciler:
    """Compares a period. Raises ``StripeFault``, and ``ChannelFault`` with ``STORE_UNAVAILABLE``."""

    def __init__(
        self, gateway: StripeGateway, keeper: Bookkeeper, hearer: Hearer, *, event_name: str | None, log: Log
    ) -> None:
        self._stripe = gateway
        self._keeper = keeper
        self._books = keeper.books
        self._hearer = hearer
        self._event_name = event_name
        self._log = log

    async def run(self, since: int, until: int) -> Reconciled:
        """Compare what Stripe made from ``since`` to before ``until`` (Unix seconds), and book what is missing."""
        found = Reconciled()
        heard: dict[str, tuple[Account, PaymentRecord]] = {}
        await self._payments(since, until, heard, found)
        await self._invoices(since, until, heard)
        await self._taken_back(since, until, heard)
        for account, record in heard.values():
            await self._book(account, record, found)
        await self._accounts(since, until, found)
        for one in found.differences[:_DIFFERENCES_MAX]:
            self._log(
                "billing.difference",
                level=Level.WARNING if one.what == "payment" else Level.ERROR,
                account=one.account,
                what=one.what,
                reference=one.reference,
                ours=one.ours,
                theirs=one.theirs,
            )
        ours, theirs = found.ledger, found.stripe
        self._log(
            "billing.reconciled",
            payments=[ours.payments, theirs.payments],
            paid_cents=[ours.paid, theirs.paid],
            refunded_cents=[ours.refunded, theirs.refunded],
            disputed_cents=[ours.disputed, theirs.disputed],
            booked=found.booked,
            foreign=found.foreign,
            accounts=found.accounts,
            differences=len(found.differences),
        )
        return found

    # -------------------------------------------------------------------------------------------------------- payments

    async def _payments(
        self, since: int, until: int, heard: dict[str, tuple[Account, PaymentRecord]], found: Reconciled
    ) -> None:
        for payment in await self._stripe.payments(since, until):
            if payment.status != "succeeded" or payment.currency != USD:
                continue
            account = await self._hearer.account_of(payment.id, payment.tags.account, payment.customer)
            if account is None:
                found.foreign += 1
            elif payment.tags.account is not None:
                _add(heard, account, PaymentRecord(payment.id, paid=payment.received))

    async def _invoices(self, since: int, until: int, heard: dict[str, tuple[Account, PaymentRecord]]) -> None:
        for invoice in await self._stripe.invoices(max(since - _INVOICES_S, _FIRST_S), until):
            account = await self._hearer.invoice_account(invoice)
            if account is None or not invoice.amount_paid:
                continue
            if invoice.created >= since or account.suspended_at is not None:
                for record in await self._hearer.payments_of(invoice.id):
                    _add(heard, account, record)

    async def _taken_back(self, since: int, until: int, heard: dict[str, tuple[Account, PaymentRecord]]) -> None:
        """Refunds and disputes, whenever what they are about was paid; older ones too, as they may just have ended."""
        listed = await self._stripe.refunds(max(since - _REFUNDS_S, _FIRST_S), until)
        refunds = [one for one in listed if one.payment is not None]
        for payment in dict.fromkeys(one.payment for one in refunds):
            assert payment is not None
            account = await self._hearer.account_of(payment, None, None)
            if account is not None:
                _add(heard, account, refunded(payment, [one for one in refunds if one.payment == payment]))
        for dispute in await self._stripe.disputes(max(since - _DISPUTES_S, _FIRST_S), until):
            if dispute.payment is not None and dispute.currency == USD:
                account = await self._hearer.account_of(dispute.payment, None, None)
                if account is not None:
                    disputes = MappingProxyType({dispute.id: (dispute.amount, _state(dispute))})
                    _add(heard, account, PaymentRecord(dispute.payment, disputes=disputes))

    async def _book(self, account: Account, heard: PaymentRecord, found: Reconciled) -> None:
        known = await self._books.read(partial(credit_lists.payment_of, heard.id))
        before = None if known is None else known[1]
        after = joined(before, heard)
        found.stripe = found.stripe.plus(heard)
        found.ledger = found.ledger.plus(_same_parts(before, heard))
        if after == before:
            return
        worth = 0 if before is None else before.worth
        found.differences.append(Difference(account.id, "payment", heard.id, worth, after.worth))
        news = Paid() if heard.paid and (before is None or before.paid is None) else None
        try:
            await self._keeper.take_in(account.id, [heard], event=None, news=news)
            found.booked += 1
        except (CreditFault, OtherAccounts) as error:
            self._log("billing.unbooked", level=Level.ERROR, payment=heard.id, reason=type(error).__name__)
            found.differences[-1] = replace(found.differences[-1], what="unbooked")

    # -------------------------------------------------------------------------------------------------------- accounts

    async def _accounts(self, since: int, until: int, found: Reconciled) -> None:
        meter, after = await self._meter(), None
        while page := await self._books.read(partial(credit_lists.credit_accounts, after, _PAGE)):
            after = page[-1].id
            for each in page:
                found.accounts += 1
                account, lines, reports = await self._books.read(partial(_totals, each.id))
                # A running request is charged as it is delivered, and on the statement when it has ended.
                if lines != account.funds - account.final:
                    ours = account.funds - account.final
                    found.differences.append(Difference(account.id, "entries", "", ours, lines))
                # Old reports are forgotten, but never the last: the oldest that is left says what they came to.
                total = min((report.total - report.value for _, report in reports), default=0)
                total += sum(report.value for _, report in reports)
                if total != account.reported_micro:
                    found.differences.append(
                        Difference(account.id, "reports", "", account.reported_micro, total)
                    )
                if meter is not None and reports:
                    await self._metered(meter, account.id, reports, (since, until), found)

    async def _meter(self) -> str | None:
        if self._event_name is None:
            return None
        meter = await self._stripe.find_meter(self._event_name)
        if meter is None:
            raise StripeFault(StripeFaultKind.REFUSED, "no_such_meter")
        return meter

    async def _metered(
        self,
        meter: str,
        account: AccountId,
        reports: Sequence[tuple[TaskState, Report]],
        period: tuple[int, int],
        found: Reconciled,
    ) -> None:
        row = await self._books.read(partial(credit_lists.find_account, By.ID, account))
        if row is None or not is_metered(read_account(row)):
            return
        customer = read_account(row).billing.customer
        assert customer is not None
        first = period[0] - period[0] % MINUTE_S
        last = min(period[1], self._books.clock.now() - _COUNTING_S)
        last -= last % MINUTE_S
        if last <= first:
            return
        theirs = await self._stripe.reported_usage(meter=meter, customer=customer, since=first, until=last)
        mine = [
            (state, report)
            for state, report in reports
            if report.customer == customer and first <= report.at < last
        ]
        sure = sum(report.value for state, report in mine if state is TaskState.DONE)
        most = sure + sum(report.value for state, report in mine if state is TaskState.DUE and report.first_ms)
        if not sure <= theirs <= most:  # what is being sent may have been counted or not
            found.differences.append(Difference(account, "meter", customer, sure, theirs))


def _add(heard: dict[str, tuple[Account, PaymentRecord]], account: Account, record: PaymentRecord) -> None:
    known = heard.get(record.id)
    heard[record.id] = (account, record if known is None else joined(known[1], record))


def _same_parts(known: PaymentRecord | None, heard: PaymentRecord) -> PaymentRecord:
    """What we know of the things that were heard of: the rest is of another period, and on one side only."""
    if known is None:
        return PaymentRecord(heard.id)
    return replace(
        known,
        paid=None if heard.paid is None else known.paid,
        refunds={name: known.refunds[name] for name in heard.refunds if name in known.refunds},
        disputes={name: known.disputes[name] for name in heard.disputes if name in known.disputes},
    )


def _state(dispute: Dispute) -> DisputeState:
    if dispute.status in ("won", "prevented"):
        return DisputeState.WON
    if dispute.status == "lost":
        return DisputeState.LOST
    if dispute.inquiry:
        return DisputeState.WON if dispute.status == "warning_closed" else DisputeState.INQUIRY
    return DisputeState.OPEN


def _totals(account: AccountId) -> Talk[tuple[CreditAccount, int, list[tuple[TaskState, Report]]]]:
    """An account, the sum of its statement, and its reports, of one moment."""
    credit = yield from load_credit(account)
    assert credit is not None
    lines = yield "SELECT CAST(COALESCE(SUM(amount), 0) AS BIGINT) FROM entry WHERE account = ?", (account,)
    rows = yield "SELECT state, document FROM outbox WHERE account = ? AND kind = ?", (account, METER)
    return credit, lines[0][0], list(_reports(rows))


def _reports(rows: Iterable[Sequence[str]]) -> Iterable[tuple[TaskState, Report]]:
    for state, document in rows:
        yield TaskState(state), Report(**orjson.loads(document))
