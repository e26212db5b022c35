"""What customers list: their own rows, complete and in order while others are written, added up by any group."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from itertools import combinations

import pytest

from channels.credit import AccountId, FundsKind, KeyId, MoveFunds
from channels.instants import UnixMillis
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_lists import Between, Group
from mppnode.ledger.credit_rows import Entry, RequestRow
from mppnode.ledger.credits import Credits
from tests.store.credit_books import ACCOUNT, OTHER, books_of, finish, hold, request_row, whole
from tests.store.shops import LEDGERS, Shop

pytestmark = pytest.mark.parametrize("shop", LEDGERS, indirect=True)
DAY_MS = 86_400_000


async def ask(books: Credits, name: str, cost: int, account: AccountId = ACCOUNT, **more: object) -> RequestRow:
    await books.apply(account, hold(name, 10_000, key=more.get("api_key", KeyId("k"))))
    await finish(books, name, cost, account, **more)
    return request_row(name, cost, account, **more)


async def history(books: Credits) -> list[RequestRow]:
    """Thirty-six requests over three days, with every other combination of key, model and provider."""
    rows = [
        await ask(
            books,
            f"r{number:02}",
            100 + number,
            api_key=KeyId(f"k{number % 2}"),
            model=f"m{number // 2 % 3}",
            provider=f"p{number // 6 % 2}",
            at_ms=UnixMillis(number // 12 * DAY_MS + number % 3),
            prompt=number,
            cached=number // 2,
            completion=3 * number,
            reasoning=number // 3,
        )
        for number in range(36)
    ]
    await ask(books, "theirs", 7, OTHER, at_ms=UnixMillis(5))
    return rows


NAMES = {
    Group.KEY: lambda row: row.api_key,
    Group.MODEL: lambda row: row.model,
    Group.PROVIDER: lambda row: row.provider,
    Group.DAY: lambda row: row.at_ms // DAY_MS,
}


async def test_usage_by_every_combination_of_groups(shop: Shop) -> None:
    """Sixteen ways to add the same requests up: each gives what a loop over the rows gives, and their total is owed."""
    books = await books_of(shop, ACCOUNT, OTHER, funds=10**9)
    rows = await history(books)
    for count in range(5):
        for groups in combinations(Group, count):
            expected: dict[tuple[str | int, ...], list[int]] = defaultdict(lambda: [0] * 6)
            for row in rows:
                sums = expected[tuple(NAMES[group](row) for group in groups)]
                for place, value in enumerate((1, row.cost, row.prompt, row.cached, row.completion, row.reasoning)):
                    sums[place] += value
            found = await books.read(partial(credit_lists.usage, ACCOUNT, Between(), groups, 1_000))
            assert {one.names: [one.requests, one.cost, one.prompt, one.cached, one.completion, one.reasoning] for one in found} == expected
            assert [one.names for one in found] == sorted(expected)
            assert sum(one.cost for one in found) == (await whole(books)).owed


async def test_usage_of_a_part(shop: Shop) -> None:
    """Bounds are from the first millisecond to before the second; a key, a model and a provider narrow it further."""
    books = await books_of(shop, ACCOUNT, OTHER, funds=10**9)
    rows = await history(books)
    for what, belongs in (
        (Between(since=UnixMillis(1), until=UnixMillis(DAY_MS + 1)), lambda row: 1 <= row.at_ms < DAY_MS + 1),
        (Between(api_key=KeyId("k1")), lambda row: row.api_key == "k1"),
        (Between(model="m2", provider="p1"), lambda row: (row.model, row.provider) == ("m2", "p1")),
        (Between(api_key=KeyId("nobody's")), lambda row: False),
    ):
        wanted = [row for row in rows if belongs(row)]
        (sums,) = await books.read(partial(credit_lists.usage, ACCOUNT, what, (), 9))
        assert (sums.requests, sums.cost) == (len(wanted), sum(row.cost for row in wanted))
        listed = await books.read(partial(credit_lists.requests, ACCOUNT, what, None, 99))
        assert listed == sorted(wanted, key=lambda row: (row.at_ms, row.id), reverse=True)


async def test_pages_neither_repeat_nor_hide(shop: Shop) -> None:
    """While a customer pages back, new requests and lines are written: what was there at the start is listed once."""
    books = await books_of(shop, ACCOUNT, OTHER, funds=10**9)
    rows = await history(books)
    before = await books.read(partial(credit_lists.entries, ACCOUNT, None, 999))
    found, lines = list[RequestRow](), list[Entry]()
    for number in range(100):
        after = (found[-1].at_ms, found[-1].id) if found else None
        page = await books.read(partial(credit_lists.requests, ACCOUNT, Between(), after, 5))
        statement = await books.read(partial(credit_lists.entries, ACCOUNT, lines[-1].seq if lines else None, 5))
        if not page and not statement:
            break
        found, lines = found + page, lines + statement
        await ask(books, f"new{number}", 1, at_ms=UnixMillis(9 * DAY_MS))
        await books.apply(ACCOUNT, MoveFunds(FundsKind.PAYMENT, f"p{number}", 5))
    assert found == sorted(rows, key=lambda row: (row.at_ms, row.id), reverse=True)
    assert lines == before
    await whole(books)


async def test_another_accounts_request_is_not_there(shop: Shop) -> None:
    """Its id alone opens nothing."""
    books = await books_of(shop, ACCOUNT, OTHER, funds=10**9)
    row = await ask(books, "r", 5)
    assert await books.read(partial(credit_lists.request, ACCOUNT, "r")) == row
    assert await books.read(partial(credit_lists.request, OTHER, "r")) is None
    assert await books.read(partial(credit_lists.requests, OTHER, Between(), None, 9)) == []
    assert [line.kind for line in await books.read(partial(credit_lists.entries, OTHER, None, 9))] == ["grant"]
