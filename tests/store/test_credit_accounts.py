"""Accounts and keys on every store: names are taken once, however many ask, and a change is known to every node."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from channels.credit import FUNDS_MAX, AccountId, CreditFault, CreditReason, KeyId
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_lists import By
from mppnode.ledger.credit_rows import AccountRow, KeyRow
from mppnode.ledger.credit_talk import Exists
from tests.store.credit_books import ACCOUNT, KEY, OTHER, account_row, books_of, finish, hold, key_row, whole
from tests.store.shops import LEDGERS, SHARED, Shop

every_store = pytest.mark.parametrize("shop", LEDGERS, indirect=True)
shared_stores = pytest.mark.parametrize("shop", SHARED, indirect=True)


def taken(answers: list[Any]) -> list[str]:
    """The fields that were taken; every other answer is a success."""
    assert all(not isinstance(answer, BaseException) or isinstance(answer, Exists) for answer in answers), answers
    return [answer.field for answer in answers if isinstance(answer, Exists)]


@every_store
async def test_exists_names_what_is_taken(shop: Shop) -> None:
    """The field that is somebody's already is the one that is named, and nothing is left of the attempt."""
    books = await books_of(shop)
    await books.create_account(account_row(ACCOUNT, trust="a", customer="cus_1"))
    for field, row in (
        ("trust", account_row(OTHER, trust="a")),
        ("customer", account_row(OTHER, trust="b", customer="cus_1")),
        ("id", account_row(ACCOUNT, trust="b")),
    ):
        with pytest.raises(Exists) as caught:
            await books.create_account(row)
        assert caught.value.field == field
    assert await books.load(OTHER) is None
    await books.create_account(account_row(OTHER, trust="b", customer="cus_2"))
    found = await books.read(lambda: credit_lists.find_account(By.CUSTOMER, "cus_2"))
    assert found == account_row(OTHER, trust="b", customer="cus_2")


@shared_stores
async def test_racing_accounts_share_no_name(shop: Shop) -> None:
    """Many sign up under one name and as one customer at two nodes: one has it, the others hear which field it was."""
    nodes = [await books_of(shop), await books_of(shop)]
    rows = [account_row(AccountId(f"a{n}"), trust="one") for n in range(10)]
    answers = await asyncio.gather(*(nodes[n % 2].create_account(row) for n, row in enumerate(rows)), return_exceptions=True)
    assert taken(answers) == ["trust"] * 9
    rows = [account_row(AccountId(f"b{n}"), customer="cus") for n in range(10)]
    answers = await asyncio.gather(*(nodes[n % 2].create_account(row) for n, row in enumerate(rows)), return_exceptions=True)
    assert taken(answers) == ["customer"] * 9
    assert len(await nodes[0].read(lambda: credit_lists.accounts(None, 99))) == 2
    assert len(await nodes[0].read(lambda: credit_lists.credit_accounts(None, 99))) == 2


@shared_stores
async def test_racing_changes_share_no_customer(shop: Shop) -> None:
    """Accounts that are given one customer at the same moment, at two nodes: one gets it and no node is broken."""
    names = [AccountId(f"a{n}") for n in range(12)]
    a, b = await books_of(shop, *names), await books_of(shop)

    async def give(number: int, customer: str) -> AccountRow | None:
        node = (a, b)[number % 2]
        return await node.change_account(names[number], lambda row: replace(row, customer=customer))

    for turn in range(5):
        answers = await asyncio.gather(*(give(n, f"cus_{turn}") for n in range(12)), return_exceptions=True)
        assert taken(answers) == ["customer"] * 11
        assert len(await shop.sql(f"SELECT id FROM account WHERE customer = 'cus_{turn}'")) == 1
    assert len(await a.read(lambda: credit_lists.accounts(None, 99))) == 12
    for name in names:
        await whole(b, name)


@every_store
async def test_a_changed_account_is_another_to_every_node(shop: Shop) -> None:
    """A change replaces the row's customer and document alone, counts in ``access`` and may set the overdraft."""
    books = await books_of(shop, ACCOUNT, funds=100)

    def change(row: AccountRow) -> AccountRow:
        return replace(row, customer="cus_1", document='{"a":1}', trust="stolen")

    made = await books.change_account(ACCOUNT, change, overdraft=500)
    assert made is not None
    account = await whole(books)
    assert (account.access, account.overdraft, account.headroom) == (2, 500, 600)
    expected = account_row(ACCOUNT, customer="cus_1", document='{"a":1}')
    assert await books.read(lambda: credit_lists.account_with_access(By.ID, ACCOUNT)) == (expected, 2)
    await books.change_account(ACCOUNT, lambda row: replace(row, document="{}"))
    assert await books.read(lambda: credit_lists.account_with_access(By.CUSTOMER, "cus_1")) == (replace(expected, document="{}"), 3)
    assert (await whole(books)).overdraft == 500
    with pytest.raises(CreditFault) as caught:
        await books.apply(ACCOUNT, hold("r", 10, access=2))
    assert caught.value.reason is CreditReason.ACCESS_CHANGED
    assert await books.change_account(OTHER, change) is None


@every_store
async def test_a_refused_change_changes_nothing(shop: Shop) -> None:
    """A customer that is another's, or an overdraft that fits no account: row and count are what they were."""
    books = await books_of(shop, ACCOUNT)
    await books.create_account(account_row(OTHER, customer="cus_1"))
    with pytest.raises(Exists) as taken_one:
        await books.change_account(ACCOUNT, lambda row: replace(row, customer="cus_1", document="x"))
    assert taken_one.value.field == "customer"
    for overdraft in (-1, FUNDS_MAX + 1):
        with pytest.raises(CreditFault) as caught:
            await books.change_account(ACCOUNT, lambda row: replace(row, document="x"), overdraft=overdraft)
        assert caught.value.reason is CreditReason.FUNDS_LIMIT
        with pytest.raises(CreditFault):
            await books.create_account(account_row(AccountId("new")), overdraft=overdraft)
    assert await books.read(lambda: credit_lists.account_with_access(By.ID, ACCOUNT)) == (account_row(ACCOUNT), 1)
    assert await books.read(lambda: credit_lists.find_account(By.ID, "new")) is None


@shared_stores
async def test_racing_keys_stay_within_the_limit(shop: Shop) -> None:
    """Twenty keys at two nodes where five may be: five are made, and a digest is one account's."""
    a, b = await books_of(shop, ACCOUNT, OTHER), await books_of(shop)
    answers = await asyncio.gather(*((a, b)[n % 2].create_key(key_row(f"k{n:02}"), limit=5) for n in range(20)))
    assert sum(answers) == 5
    same = [key_row("x", ACCOUNT, digest="same"), key_row("y", OTHER, digest="same")]
    raced = await asyncio.gather(*(node.create_key(row, limit=9) for node, row in zip((a, b), same, strict=True)), return_exceptions=True)
    assert taken(raced) == ["key"]
    assert len(await shop.sql("SELECT id FROM api_key WHERE digest = 'same'")) == 1


@every_store
async def test_a_key_needs_its_account(shop: Shop) -> None:
    """No key is made for an account that does not exist."""
    books = await books_of(shop)
    with pytest.raises(CreditFault) as caught:
        await books.create_key(key_row("k"), limit=5)
    assert caught.value.reason is CreditReason.NOT_FOUND
    assert await shop.sql("SELECT id FROM api_key") == []


@every_store
async def test_a_revoked_key_is_refused_at_once(shop: Shop) -> None:
    """Ending a key counts in ``access``, frees its place, and drops its counters for good, whatever still runs."""
    books = await books_of(shop, ACCOUNT, funds=1_000)
    assert await books.create_key(key_row("k"), limit=1)
    assert not await books.create_key(key_row("k2"), limit=1)
    found = await books.read(lambda: credit_lists.find_key("digest of k"))
    assert found == (key_row("k"), account_row(ACCOUNT), 1)
    await books.apply(ACCOUNT, hold("r1", 100, pace=(1, 2)))

    def end(row: KeyRow) -> KeyRow:
        return replace(row, ended=True, document='{"why":1}')

    assert await books.change_key(ACCOUNT, KEY, end) == replace(key_row("k"), ended=True, document='{"why":1}')
    with pytest.raises(CreditFault) as caught:
        await books.apply(ACCOUNT, hold("r2", 100))
    assert caught.value.reason is CreditReason.ACCESS_CHANGED
    await finish(books, "r1", 60)
    account = await whole(books)
    assert (account.owed, dict(account.spending), dict(account.paces)) == (60, {}, {})
    assert await books.create_key(key_row("k2"), limit=1)


@every_store
async def test_another_accounts_key_is_not_there(shop: Shop) -> None:
    """Neither read nor changed, and no list of its account shows it."""
    books = await books_of(shop, ACCOUNT, OTHER)
    for name in ("k1", "k2", "k3"):
        await books.create_key(key_row(name), limit=9)
    await books.create_key(key_row("k4", OTHER), limit=9)
    assert await books.read(lambda: credit_lists.key(OTHER, KeyId("k1"))) is None
    assert await books.read(lambda: credit_lists.key(ACCOUNT, KeyId("k1"))) == key_row("k1")
    assert await books.change_key(OTHER, KeyId("k1"), lambda row: replace(row, ended=True)) is None
    assert await books.read(lambda: credit_lists.key(ACCOUNT, KeyId("k1"))) == key_row("k1")
    assert [row.id for row in await books.read(lambda: credit_lists.keys(ACCOUNT, None, 2))] == ["k1", "k2"]
    assert [row.id for row in await books.read(lambda: credit_lists.keys(ACCOUNT, KeyId("k2"), 2))] == ["k3"]
    assert (await whole(books, OTHER)).access == 1
