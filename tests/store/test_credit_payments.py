"""Payments on every store: booked by what they are worth, once per announcement, to one account."""

from __future__ import annotations

import asyncio
import random

import pytest

from channels.credit import FUNDS_MAX, CreditAccount, CreditFault, CreditReason, FundsKind, MoveFunds, SetOverdraft
from channels.instants import UnixMillis
from channels.payment import PICO_PER_CENT, DisputeState, PaymentRecord, RefundState
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_rows import Task
from mppnode.ledger.credit_talk import Booked, OtherAccounts
from tests.store.credit_books import ACCOUNT, OTHER, account_row, books_of, nothing_more, whole
from tests.store.shops import LEDGERS, SHARED, Shop

every_store = pytest.mark.parametrize("shop", LEDGERS, indirect=True)
shared_stores = pytest.mark.parametrize("shop", SHARED, indirect=True)

HEARD = [
    PaymentRecord("pi_1", paid=1_000),
    PaymentRecord("pi_1", refunds={"re_1": (300, RefundState.PENDING)}),
    PaymentRecord("pi_1", refunds={"re_1": (300, RefundState.SUCCEEDED)}),
    PaymentRecord("pi_1", disputes={"dp_1": (700, DisputeState.OPEN)}),
    PaymentRecord("pi_1", disputes={"dp_1": (700, DisputeState.WON)}),
    PaymentRecord("pi_1", kind=FundsKind.INVOICE),
]


@every_store
async def test_a_payment_is_booked_by_what_it_is_worth(shop: Shop) -> None:
    """K6, K8: announcements of one payment, each once, in any order: the account holds what the payment is worth."""
    books = await books_of(shop, ACCOUNT)
    heard = [
        (HEARD[2], "evt_2", 0),
        (HEARD[0], "evt_1", 700),
        (HEARD[0], "evt_1", 0),
        (HEARD[3], "evt_3", -700),
        (HEARD[4], "evt_4", 700),
    ]
    for record, event, cents in heard:
        booked = await books.book(ACCOUNT, record, event=event, react=nothing_more)
        assert (0 if booked is None else booked.moved) == cents * PICO_PER_CENT
    assert (await whole(books)).balance == 700 * PICO_PER_CENT
    lines = await books.read(lambda: credit_lists.entries(ACCOUNT, None, 10))
    assert [line.kind for line in lines] == ["payment", "payment_reversed", "payment"]


@shared_stores
async def test_announcements_race_at_two_nodes(shop: Shop) -> None:
    """Every announcement three times at two nodes at once, in random order: worth and kind are those of any order."""
    a, b = await books_of(shop, ACCOUNT), await books_of(shop)
    rng = random.Random(5)
    for turn in range(4):
        payment = f"pi_{turn}"
        wave = [(n, copy) for n in range(len(HEARD)) for copy in range(3)]
        rng.shuffle(wave)
        asked = [
            rng.choice((a, b)).book(ACCOUNT, _renamed(HEARD[n], payment), event=f"{payment}-{n}", react=nothing_more)
            for n, _ in wave
        ]
        booked = await asyncio.gather(*asked)
        assert sum(one is not None for one in booked) == len(HEARD)
        assert sum(one.moved for one in booked if one is not None) == 700 * PICO_PER_CENT
    account = await whole(a)
    assert (account.prepaid, account.invoiced) == (0, 4 * 700 * PICO_PER_CENT)


def _renamed(record: PaymentRecord, name: str) -> PaymentRecord:
    return PaymentRecord(name, record.kind, record.paid, record.refunds, record.disputes)


@shared_stores
async def test_one_payment_is_never_two_accounts(shop: Shop) -> None:
    """Two accounts are told of one payment at the same moment: one is credited, the other refused, each time."""
    a, b = await books_of(shop, ACCOUNT, OTHER), await books_of(shop)
    for number in range(20):
        record = PaymentRecord(f"pi_{number}", paid=100)
        asked = [
            node.book(account, record, event=f"{account}-{number}", react=nothing_more)
            for node, account in ((a, ACCOUNT), (b, OTHER))
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sorted(type(answer) for answer in answers if not isinstance(answer, Booked)) == [OtherAccounts]
    both = [await whole(a, account) for account in (ACCOUNT, OTHER)]
    assert sum(account.funds for account in both) == 20 * 100 * PICO_PER_CENT
    for account in both:
        paid = await a.read(lambda account=account: credit_lists.payments(account.id, "", 99))  # type: ignore[misc]
        assert sum(record.worth_pico for _, record in paid) == account.funds
    assert len(await a.read(lambda: credit_lists.payments(None, "", 99))) == 20


@every_store
async def test_a_refused_announcement_may_come_again(shop: Shop) -> None:
    """For an unknown account, another's payment or more than fits: nothing is noted, so its repeat is heard."""
    books = await books_of(shop, OTHER)
    paid = PaymentRecord("pi_1", paid=100)
    with pytest.raises(CreditFault) as caught:
        await books.book(ACCOUNT, paid, event="evt_1", react=nothing_more)
    assert caught.value.reason is CreditReason.NOT_FOUND
    assert await books.read(lambda: credit_lists.payment_of("pi_1")) is None
    await books.book(OTHER, paid, event="evt_1", react=nothing_more)
    await books.create_account(account_row(ACCOUNT))
    with pytest.raises(OtherAccounts):
        await books.book(ACCOUNT, paid, event="evt_2", react=nothing_more)
    assert (await whole(books)).funds == 0
    assert await books.note_event("evt_2")
    await books.apply(OTHER, MoveFunds(FundsKind.GRANT, "much", FUNDS_MAX - 100 * PICO_PER_CENT))
    for _ in range(2):
        with pytest.raises(CreditFault) as caught:
            await books.book(OTHER, PaymentRecord("pi_2", paid=1), event="evt_3", react=nothing_more)
        assert caught.value.reason is CreditReason.FUNDS_LIMIT
    assert (await whole(books, OTHER)).funds == FUNDS_MAX


@every_store
async def test_what_follows_is_one_transaction_with_it(shop: Shop) -> None:
    """A reaction sees the booking and may set the overdraft and tasks; one that raises takes the booking along."""
    books = await books_of(shop, ACCOUNT)

    def react(account: CreditAccount, booked: Booked) -> tuple[list[SetOverdraft], list[Task]]:
        assert (account.funds, booked.moved, booked.before) == (100 * PICO_PER_CENT, 100 * PICO_PER_CENT, None)
        return [SetOverdraft(7)], [Task("t", "thanks", ACCOUNT, 0, "{}")]

    def fail(_: CreditAccount, __: Booked) -> tuple[list[SetOverdraft], list[Task]]:
        raise RuntimeError("a bug")

    paid = PaymentRecord("pi_1", paid=100)
    with pytest.raises(RuntimeError):
        await books.book(ACCOUNT, paid, event="evt_1", react=fail)
    assert (await whole(books)).funds == 0
    booked = await books.book(ACCOUNT, paid, event="evt_1", react=react)
    assert booked is not None
    assert booked.account == await whole(books)
    assert booked.account.overdraft == 7
    assert [task.id for task in await books.due("thanks")] == ["t"]
    assert await books.book(ACCOUNT, paid, event="evt_1", react=fail) is None


@every_store
async def test_a_payment_that_turns_out_an_invoice_moves(shop: Shop) -> None:
    """Its worth leaves what was prepaid and pays for what was billed: two lines, and the balance is the same."""
    books = await books_of(shop, ACCOUNT)
    await books.book(ACCOUNT, PaymentRecord("pi_1", paid=100), event=None, react=nothing_more)
    invoice = PaymentRecord("pi_1", kind=FundsKind.INVOICE)
    booked = await books.book(ACCOUNT, invoice, event=None, react=nothing_more)
    assert booked is not None
    assert (booked.moved, booked.account.prepaid, booked.account.invoiced) == (0, 0, 100 * PICO_PER_CENT)
    await whole(books)
    lines = await books.read(lambda: credit_lists.entries(ACCOUNT, None, 10))
    assert [line.kind for line in lines] == ["invoice", "payment_reversed", "payment"]
    assert await books.read(lambda: credit_lists.payment_of("pi_1")) == (ACCOUNT, booked.payment)


@every_store
async def test_an_announcement_without_money_is_noted_once(shop: Shop) -> None:
    """Of many who hear it at once, one is told that it is new; a booking knows it too."""
    books = await books_of(shop, ACCOUNT)
    assert sorted(await asyncio.gather(*(books.note_event("evt_1") for _ in range(8)))) == [False] * 7 + [True]
    assert await books.book(ACCOUNT, PaymentRecord("pi", paid=5), event="evt_1", react=nothing_more) is None
    assert (await whole(books)).funds == 0


@every_store
async def test_the_outbox_moves_once(shop: Shop) -> None:
    """Tasks come when they are due, the longest due first; duplicates are dropped and only one mover wins."""
    books = await books_of(shop, ACCOUNT)
    now = shop.clock.now_millis()
    for name, due in (("late", now + 1), ("b", now - 5), ("a", now - 5), ("first", now - 9), ("now", now)):
        assert await books.add_task(Task(name, "alert", ACCOUNT, due, "{}", created_ms=UnixMillis(due)))
    assert not await books.add_task(Task("a", "alert", ACCOUNT, 0, '{"other":1}'))
    assert await books.add_task(Task("z", "report", ACCOUNT, 0, "{}"))
    due = await books.due("alert")
    assert [task.id for task in due] == ["first", "a", "b", "now"]
    assert due[1].document == "{}"
    assert [task.id for task in await books.due("alert", limit=2)] == ["first", "a"]
    after = Task("a", "alert", ACCOUNT, now + 50, '{"tries":1}')
    moved = await asyncio.gather(*(books.move_task(due[1], after) for _ in range(5)))
    assert sorted(moved) == [False] * 4 + [True]
    assert [task.id for task in await books.due("alert")] == ["first", "b", "now"]
    shop.clock.advance(1)
    again = await books.due("alert")
    assert [(task.id, task.version) for task in again] == [("first", 1), ("b", 1), ("now", 1), ("late", 1), ("a", 2)]
    listed = await books.read(lambda: credit_lists.tasks(ACCOUNT, "alert", None, 2))
    assert [task.id for task in listed] == ["late", "now"]
