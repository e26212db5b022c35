"""Credit accounts on a shop's stores, and the audit every history must pass."""

from __future__ import annotations

from functools import reduce
from itertools import accumulate
from typing import Any

from channels.credit import (
    AccountId,
    CreditAccount,
    CreditPlan,
    FundsKind,
    Hold,
    KeyId,
    MoveFunds,
    Settle,
    fold,
    plan,
)
from channels.instants import UnixMillis
from channels.model import HoldId
from channels.units import Pico
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_lists import Between
from mppnode.ledger.credit_rows import AccountRow, KeyRow, RequestRow
from mppnode.ledger.credit_talk import Booked
from mppnode.ledger.credits import Credits
from tests.store.shops import Shop

ACCOUNT, OTHER = AccountId("acct_1"), AccountId("acct_2")
KEY = KeyId("k")
DOLLAR = 10**12


def nothing_more(_: CreditAccount, __: Booked) -> tuple[tuple[()], tuple[()]]:
    return (), ()


def account_row(account: AccountId, **more: Any) -> AccountRow:
    values = {"trust": f"name of {account}", "customer": None, "document": "{}", "created_ms": UnixMillis(1), **more}
    return AccountRow(account, **values)


def key_row(name: str, account: AccountId = ACCOUNT, *, digest: str | None = None) -> KeyRow:
    return KeyRow(KeyId(name), account, digest or f"digest of {name}", False, "{}", UnixMillis(1))


async def books_of(shop: Shop, *accounts: AccountId, funds: int = 0) -> Credits:
    """Books on a store of their own; these accounts are opened on them, with funds."""
    books = Credits(await shop.open(), clock=shop.clock)
    for account in accounts:
        await books.create_account(account_row(account))
        await books.apply(account, MoveFunds(FundsKind.GRANT, "welcome", funds))
    return books


def hold(name: str, amount: int, *, floor: int | None = None, access: int = 1, **more: Any) -> Hold:
    return Hold(HoldId(name), Pico(amount if floor is None else floor), Pico(amount), access=access, **{"key": KEY, **more})


def request_row(name: str, cost: int, account: AccountId = ACCOUNT, **more: Any) -> RequestRow:
    counts = {"prompt": 7, "cached": 1, "completion": 3, "reasoning": 2}
    values = {"api_key": KEY, "at_ms": UnixMillis(1_000), "model": "dev/echo", "provider": "dev", **counts, **more}
    return RequestRow(id=name, account=account, cost=cost, document="{}", **values)


async def finish(books: Credits, name: str, total: int, account: AccountId = ACCOUNT, **more: Any) -> CreditPlan:
    """Settle a request with the row that customers see."""
    now = books.clock.now()

    def step(found: CreditAccount | None) -> tuple[CreditPlan, list[RequestRow]]:
        made = plan(found, Settle(HoldId(name), Pico(total)), now=now)
        return made, [request_row(name, made.result.charged, account, **more)]

    return await books.transact(account, step)


async def whole(books: Credits, account: AccountId = ACCOUNT) -> CreditAccount:
    """The account, audited: the journal rebuilds it, its statement adds up line by line, and so do its requests."""
    found = await books.load(account)
    assert found is not None
    journal = await books.read(lambda: credit_lists.credit_journal(account))
    assert reduce(fold, journal, None) == found
    assert len(journal) == found.version
    lines = (await books.read(lambda: credit_lists.entries(account, None, 100_000)))[::-1]
    assert list(accumulate(line.amount for line in lines)) == [line.balance for line in lines]
    assert sum(line.amount for line in lines) == found.funds - found.final
    if not found.holds:
        assert found.balance == (lines[-1].balance if lines else 0)
        assert found.owed == -sum(line.amount for line in lines if line.kind == "usage")
    return found


async def used(books: Credits, account: AccountId = ACCOUNT) -> int:
    """What the usage report adds up to, checked against the requests one by one."""
    (sums,) = await books.read(lambda: credit_lists.usage(account, Between(), (), 1))
    rows = await books.read(lambda: credit_lists.requests(account, Between(), None, 100_000))
    assert (sums.requests, sums.cost) == (len(rows), sum(row.cost for row in rows))
    return sums.cost
