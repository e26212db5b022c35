"""Credit accounts on every store: what is decided is durable, serial per account, and shown as it was decided."""

from __future__ import annotations

import asyncio

import pytest

from channels.credit import (
    AccountId,
    CreditAccount,
    CreditFault,
    CreditReason,
    FundsKind,
    Hold,
    KeyId,
    MoveFunds,
    Settle,
    SpendCaps,
    fold,
)
from channels.instants import UnixMillis
from channels.model import HoldId
from channels.payment import DisputeState, PaymentRecord, RefundState
from channels.units import Pico
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_rows import AccountRow
from mppnode.ledger.credit_talk import Booked
from mppnode.ledger.credits import Credits
from tests.store.shops import LEDGERS, Shop

pytestmark = pytest.mark.parametrize("shop", LEDGERS, indirect=True)

ACCOUNT = AccountId("acct_1")
DOLLAR = 10**12


def nothing_more(_: CreditAccount, __: Booked) -> tuple[tuple[()], tuple[()]]:
    return (), ()


async def opened(shop: Shop) -> Credits:
    books = Credits(await shop.open(), clock=shop.clock)
    await books.create_account(AccountRow(ACCOUNT, "first", None, "{}", UnixMillis(1)))
    return books


def hold(name: str, amount: int, **more: object) -> Hold:
    return Hold(HoldId(name), Pico(amount), Pico(amount), access=1, **more)  # type: ignore[arg-type]


async def test_a_request_is_held_charged_and_on_the_journal(shop: Shop) -> None:
    """Hold, charge and release are durable; folding the journal rebuilds the row, and another node reads the same."""
    books = await opened(shop)
    await books.apply(ACCOUNT, MoveFunds(FundsKind.GRANT, "welcome", DOLLAR))
    await books.apply(ACCOUNT, hold("r1", 600, key=KeyId("k"), about="dev/echo"))
    made = await books.apply(ACCOUNT, Settle(HoldId("r1"), Pico(250)))
    assert (made.result.charged, made.account.owed, made.account.held) == (250, 250, 0)
    again = await Credits(await shop.open(), clock=shop.clock).load(ACCOUNT) if shop.kind != "sqlite" else made.account
    assert again == made.account
    rebuilt = None
    for event in await books.read(lambda: credit_lists.credit_journal(ACCOUNT)):
        rebuilt = fold(rebuilt, event)
    assert rebuilt == made.account
    (line,) = await books.read(lambda: credit_lists.entries(ACCOUNT, None, 10))
    assert (line.kind, line.amount, line.reference, line.balance) == ("grant", DOLLAR, "welcome", DOLLAR)


@pytest.mark.parametrize("many", [50, 500])
async def test_k3_parallel_requests_stay_within_a_cap(shop: Shop, many: int) -> None:
    """K3: of 50 and 500 parallel requests against a cap for ten, ten are held and the cap is never passed."""
    books = await opened(shop)
    await books.apply(ACCOUNT, MoveFunds(FundsKind.GRANT, "welcome", DOLLAR))
    caps, refused = SpendCaps(total=Pico(1_000)), set[CreditReason]()

    async def ask(number: int) -> int:
        try:
            made = await books.apply(ACCOUNT, hold(f"r{number}", 100, key=KeyId("k"), caps=caps))
        except CreditFault as fault:
            refused.add(fault.reason)
            return 0
        await books.apply(ACCOUNT, Settle(HoldId(f"r{number}"), Pico(100)))
        return made.result.granted

    assert sum(await asyncio.gather(*(ask(number) for number in range(many)))) == 1_000
    assert refused == {CreditReason.CAP_REACHED}
    account = await books.load(ACCOUNT)
    assert account is not None
    assert (account.owed, account.spending[KeyId("k")].spent_total, account.held) == (1_000, 1_000, 0)


async def test_a_payment_is_booked_by_what_it_is_worth(shop: Shop) -> None:
    """K6, K8: announcements of one payment, each once, in any order: the account holds what the payment is worth."""
    books = await opened(shop)
    heard = [
        (PaymentRecord("pi_1", refunds={"re_1": (300, RefundState.SUCCEEDED)}), "evt_2", 0),
        (PaymentRecord("pi_1", paid=1_000), "evt_1", 700),
        (PaymentRecord("pi_1", paid=1_000), "evt_1", 0),
        (PaymentRecord("pi_1", disputes={"dp_1": (700, DisputeState.OPEN)}), "evt_3", -700),
        (PaymentRecord("pi_1", disputes={"dp_1": (700, DisputeState.WON)}), "evt_4", 700),
    ]
    for record, event, cents in heard:
        booked = await books.book(ACCOUNT, record, event=event, react=nothing_more)
        assert (0 if booked is None else booked.moved) == cents * 10**10
    account = await books.load(ACCOUNT)
    assert account is not None
    assert account.balance == 700 * 10**10
    lines = await books.read(lambda: credit_lists.entries(ACCOUNT, None, 10))
    assert [line.kind for line in lines] == ["payment", "payment_reversed", "payment"]
