"""Credit accounts on every store: what is decided is durable, serial per account, and shown as it was decided."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from channels.credit import (
    AccountId,
    ChangeAccess,
    CreditAccount,
    CreditFault,
    CreditPlan,
    CreditReason,
    Fold,
    FundsKind,
    KeyId,
    MoveFunds,
    Settle,
    SpendCaps,
    plan,
)
from channels.instants import UnixMillis
from channels.model import HoldId
from channels.units import Pico
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_rows import Task
from mppnode.ledger.credits import Credits
from tests.store.credit_books import ACCOUNT, DOLLAR, KEY, OTHER, books_of, finish, hold, request_row, used, whole
from tests.store.shops import LEDGERS, SHARED, Shop

every_store = pytest.mark.parametrize("shop", LEDGERS, indirect=True)
shared_stores = pytest.mark.parametrize("shop", SHARED, indirect=True)


@every_store
async def test_a_request_is_held_charged_and_on_the_journal(shop: Shop) -> None:
    """Hold, charge and release are durable; folding the journal rebuilds the row, and another node reads the same."""
    books = await books_of(shop, ACCOUNT, funds=DOLLAR)
    await books.apply(ACCOUNT, hold("r1", 600, about="dev/echo"))
    made = await finish(books, "r1", 250)
    assert (made.result.charged, made.account.owed, made.account.held) == (250, 250, 0)
    again = await Credits(await shop.open(), clock=shop.clock).load(ACCOUNT) if shop.kind != "sqlite" else made.account
    assert again == made.account == await whole(books)
    lines = await books.read(lambda: credit_lists.entries(ACCOUNT, None, 10))
    assert [(line.kind, line.amount, line.reference, line.balance) for line in lines] == [
        ("usage", -250, "r1", DOLLAR - 250),
        ("grant", DOLLAR, "welcome", DOLLAR),
    ]


@every_store
@pytest.mark.parametrize("many", [50, 500])
async def test_k3_parallel_requests_stay_within_a_cap(shop: Shop, many: int) -> None:
    """K3: of 50 and 500 parallel requests against a cap for ten, ten are held and the cap is never passed."""
    books = await books_of(shop, ACCOUNT, funds=DOLLAR)
    caps, refused = SpendCaps(total=Pico(1_000)), set[CreditReason]()

    async def ask(number: int) -> int:
        try:
            made = await books.apply(ACCOUNT, hold(f"r{number}", 100, caps=caps))
        except CreditFault as fault:
            refused.add(fault.reason)
            return 0
        await finish(books, f"r{number}", 100)
        return made.result.granted

    assert sum(await asyncio.gather(*(ask(number) for number in range(many)))) == 1_000
    assert refused == {CreditReason.CAP_REACHED}
    account = await whole(books)
    assert (account.owed, account.spending[KEY].spent_total, account.held) == (1_000, 1_000, 0)
    assert await used(books) == 1_000


@shared_stores
async def test_two_nodes_share_the_last_of_the_credit(shop: Shop) -> None:
    """Two hundred requests at two nodes on funds for thirty: the totals are exact, whoever was faster."""
    a, b = await books_of(shop, ACCOUNT, OTHER, funds=30_000), await books_of(shop)
    refused = set[CreditReason]()

    async def ask(number: int) -> int:
        node, account = (a, b)[number % 2], (ACCOUNT, OTHER)[number // 2 % 2]
        try:
            await node.apply(account, hold(f"r{number}", 1_000))
        except CreditFault as fault:
            refused.add(fault.reason)
            return 0
        other = (b, a)[number % 2]
        await other.apply(account, Fold(HoldId(f"r{number}"), Pico(300)))
        await node.apply(account, MoveFunds(FundsKind.PAYMENT, f"p{number}", 7))
        await other.apply(account, MoveFunds(FundsKind.PAYMENT, f"p{number}", -7))
        return (await finish(other, f"r{number}", 1_000, account)).result.charged

    charged = await asyncio.gather(*(ask(number) for number in range(200)))
    assert sum(charged) == 60_000
    assert refused == {CreditReason.CREDIT_TOO_LOW}
    for account in (ACCOUNT, OTHER):
        assert (await whole(a, account)).balance == 0
        assert await used(b, account) == 30_000


@every_store
async def test_many_accounts_at_once_are_exact(shop: Shop) -> None:
    """Forty accounts, each held, folded and settled five times at once: every one adds up by itself."""
    accounts = [AccountId(f"a{number:02}") for number in range(40)]
    books = await books_of(shop, *accounts, funds=DOLLAR)

    async def ask(account: AccountId, number: int) -> None:
        name = f"{account}-{number}"
        await books.apply(account, hold(name, 500))
        await books.apply(account, Fold(HoldId(name), Pico(number)))
        await finish(books, name, 100 + number, account)

    await asyncio.gather(*(ask(account, number) for account in accounts for number in range(5)))
    for account in accounts:
        assert (await whole(books, account)).owed == 510 == await used(books, account)


@every_store
async def test_a_statement_adds_up_while_requests_run(shop: Shop) -> None:
    """What a live request was folded is on no line yet, so the line of one that ends beside it leaves it out."""
    books = await books_of(shop, ACCOUNT, funds=10_000)
    for name in ("long", "short"):
        await books.apply(ACCOUNT, hold(name, 1_000))
    await books.apply(ACCOUNT, Fold(HoldId("long"), Pico(700)))
    await finish(books, "short", 50)
    await whole(books)
    await finish(books, "long", 600)
    await whole(books)
    lines = await books.read(lambda: credit_lists.entries(ACCOUNT, None, 10))
    assert [(line.amount, line.balance) for line in lines] == [(-600, 9_350), (-50, 9_950), (10_000, 10_000)]


@every_store
async def test_a_request_costs_what_was_charged(shop: Shop) -> None:
    """A row that says something else than its hold was released at is refused, and nothing of its step is written."""
    books = await books_of(shop, ACCOUNT, OTHER, funds=10_000)
    await books.apply(ACCOUNT, hold("r", 1_000))
    now, before = shop.clock.now(), await whole(books)

    def lying(found: CreditAccount | None) -> tuple[CreditPlan, list[object]]:
        task = Task("t", "alert", ACCOUNT, 0, "{}")
        return plan(found, Settle(HoldId("r"), Pico(10)), now=now), [task, request_row("r", 11)]

    def strange(found: CreditAccount | None) -> tuple[CreditPlan, list[object]]:
        return plan(found, Settle(HoldId("r"), Pico(10)), now=now), [request_row("r", 10, OTHER)]

    for step in (lying, strange):
        with pytest.raises(AssertionError):
            await books.transact(ACCOUNT, step)  # type: ignore[arg-type]
    assert await whole(books) == before
    assert (await used(books), await books.due("alert")) == (0, [])
    assert (await finish(books, "r", 10)).result.charged == 10


@every_store
async def test_a_refusal_leaves_nothing_even_beside_others(shop: Shop) -> None:
    """A talk that raises after it has written is undone alone: what was asked at the same moment stands."""
    books = await books_of(shop, ACCOUNT, funds=10_000)

    def noisy(number: int) -> object:
        def talk() -> object:
            yield "INSERT INTO heard (id, at_ms) VALUES (?, ?)", (f"e{number}", 1)
            if number % 2:
                raise CreditFault(CreditReason.BUSY)

        return talk

    asked = [books.write(noisy(number), of=ACCOUNT) for number in range(20)]  # type: ignore[arg-type]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [isinstance(answer, CreditFault) for answer in answers] == [bool(number % 2) for number in range(20)]
    heard = {row[0] for row in await shop.sql("SELECT id FROM heard")}
    assert heard == {f"e{number}" for number in range(0, 20, 2)}


@every_store
async def test_old_knowledge_of_a_key_is_refused(shop: Shop) -> None:
    """A request admitted with what was known before a change is refused; one with today's count is held."""
    books = await books_of(shop, ACCOUNT, funds=10_000)
    await books.apply(ACCOUNT, hold("r1", 100))
    await books.apply(ACCOUNT, ChangeAccess(KEY))
    with pytest.raises(CreditFault) as caught:
        await books.apply(ACCOUNT, hold("r2", 100))
    assert caught.value.reason is CreditReason.ACCESS_CHANGED
    await finish(books, "r1", 80)
    account = await whole(books)
    assert (account.access, dict(account.spending)) == (2, {}), "a dead key does not come back by its last request"
    assert (await books.apply(ACCOUNT, hold("r2", 100, access=2))).account.spending.keys() == {KEY}


@every_store
async def test_numbers_of_a_limiter_may_outgrow_64_bits(shop: Shop) -> None:
    """What a limiter adds up for good is read back as it was, in the row and in the journal."""
    books = await books_of(shop, ACCOUNT, funds=10_000)
    pace = (2**63 - 1, 2**63, -(2**70), 10**30, 0)
    await books.apply(ACCOUNT, hold("r1", 100, pace=pace))
    await books.apply(ACCOUNT, Settle(HoldId("r1"), Pico(1), pace))
    assert dict((await whole(books)).paces) == {KEY: pace}


@every_store
async def test_a_broken_row_is_its_askers_alone(shop: Shop) -> None:
    """An account whose row breaks the law is refused to who asks for it; others go on."""
    books = await books_of(shop, ACCOUNT, OTHER, funds=10_000)
    for damage in ("held = 7", "holds = 'no JSON'", "holds = '{\"h\":[1,2,\"\",\"\",\"\"]}'"):
        await shop.sql(f"UPDATE credit SET {damage} WHERE id = '{ACCOUNT}'")
        with pytest.raises(AssertionError, match=ACCOUNT):
            await books.load(ACCOUNT)
        with pytest.raises(AssertionError, match=ACCOUNT):
            await books.apply(ACCOUNT, hold("r1", 100))
        await shop.sql(f"UPDATE credit SET held = 0, holds = '{{}}' WHERE id = '{ACCOUNT}'")
    await whole(books, OTHER)
    assert (await books.apply(ACCOUNT, hold("r1", 100))).result.granted == 100


@every_store
async def test_what_an_operator_lists_is_in_order(shop: Shop) -> None:
    """Accounts come page by page in the order of their ids; ``live`` leaves out those without a request."""
    names = [AccountId(f"a{number}") for number in range(7)]
    books = await books_of(shop, *names[::-1], funds=1_000)
    await books.apply(names[3], hold("r", 5, key=KeyId("")))
    seen: list[AccountId] = []
    while page := await books.read(partial(credit_lists.credit_accounts, seen[-1] if seen else None, 3)):
        seen += [account.id for account in page]
    assert seen == names
    (live,) = await books.read(lambda: credit_lists.credit_accounts(None, 9, live=True))
    assert (live.id, live.held) == (names[3], 5)
    rows = await books.read(lambda: credit_lists.accounts(names[1], 2))
    assert [(row.id, row.created_ms) for row in rows] == [(names[2], UnixMillis(1)), (names[3], UnixMillis(1))]
