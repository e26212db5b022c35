"""What a ledger may forget, on every store."""

from __future__ import annotations

from functools import partial

import pytest

from channels.credit import AccountId
from channels.instants import UnixMillis
from mppnode.ledger import credit_grants, credit_purge, credit_talk
from mppnode.ledger.credit_purge import purge
from mppnode.ledger.credit_rows import Task, TaskState
from mppnode.ledger.credits import Credits
from tests.store.credit_books import ACCOUNT, OTHER, books_of
from tests.store.shops import LEDGERS, Shop

pytestmark = pytest.mark.parametrize("shop", LEDGERS, indirect=True)
DAY_MS = 86_400_000
KEPT = ("grant", "recharge", "suspension", "card", "customer", "subscription", "reconciled")


async def add(books: Credits, kind: str, days: int, state: TaskState = TaskState.DONE, account: AccountId = ACCOUNT) -> str:
    """A task made so many days ago; its id."""
    at = books.clock.now_millis() - days * DAY_MS - 1
    task = Task(f"{kind}-{account}-{days}-{state}", kind, account, at, "{}", state, created_ms=at)
    assert await books.add_task(task)
    return task.id


async def left(books: Credits, names: list[str]) -> list[str]:
    return [name for name in names if await books.read(partial(credit_grants.task, name)) is not None]


async def test_old_announcements_are_forgotten_and_younger_ones_known(shop: Shop) -> None:
    """What was heard more than 40 days ago goes, in bites, and nothing younger."""
    books = await books_of(shop, ACCOUNT)
    now = books.clock.now_millis()
    old = 1_203
    for number in range(old):
        await books.write(partial(credit_talk.note_event, f"evt_old_{number}", UnixMillis(now - 40 * DAY_MS - 1)), of="")
    await books.write(partial(credit_talk.note_event, "evt_young", UnixMillis(now - 40 * DAY_MS)), of="")
    assert await purge(books) == old
    assert await books.note_event("evt_old_7")
    assert not await books.note_event("evt_young")
    assert await purge(books) == 0


async def test_only_old_alerts_and_reports_that_are_done_are_forgotten(shop: Shop) -> None:
    """Due and parked tasks, younger ones, and every kind that remembers what must happen once, stay."""
    books = await books_of(shop, ACCOUNT)
    gone = [await add(books, "alert", 90), await add(books, "meter", 100), await add(books, "meter", 90)]
    kept = [await add(books, kind, 4_000) for kind in KEPT]
    kept += [await add(books, kind, 89) for kind in ("alert", "meter")]
    kept += [await add(books, "alert", 91, state) for state in (TaskState.DUE, TaskState.PARKED)]
    assert await purge(books) == len(gone)
    assert await left(books, gone) == []
    assert await left(books, kept) == kept
    assert await purge(books) == 0


async def test_what_is_left_of_the_reports_has_no_gap(shop: Shop) -> None:
    """An account's last report stays whatever its age, and so does each that follows one that is not done."""
    books = await books_of(shop, ACCOUNT, OTHER)
    last = await add(books, "meter", 400, account=OTHER)
    first = await add(books, "meter", 300)
    kept = [await add(books, "meter", 200, TaskState.PARKED), await add(books, "meter", 150), await add(books, "meter", 1)]
    assert await purge(books) == 1
    assert await left(books, [first, last, *kept]) == [last, *kept]


async def test_a_purge_that_is_cut_short_forgets_the_oldest_first(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of bites the reports that are left are the newest."""
    monkeypatch.setattr(credit_purge, "_BITE", 2)
    books = await books_of(shop, ACCOUNT)
    names = [await add(books, "meter", days) for days in (95, 97, 96, 99, 98, 1)]
    bite = partial(credit_purge._bite, credit_purge._REPORTS, UnixMillis(books.clock.now_millis() - 90 * DAY_MS))
    assert await books.write(bite, of="") == 2
    assert await left(books, names) == [names[0], names[1], names[2], names[5]]
    assert await purge(books) == 3
