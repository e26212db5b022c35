"""Holds whose owner is gone: charged what was recorded, shown as crashed, and nobody else's are touched."""

from __future__ import annotations

import asyncio

import pytest

from channels.credit import AccountId, CreditFault, CreditReason, Fold, KeyId
from channels.model import HoldId, NodeId
from channels.units import Pico
from mppnode.ledger import credit_lists
from mppnode.ledger.base import Ledger
from mppnode.ledger.credits import CRASHED, Credits, CreditSweeper
from mppnode.ledger.life import Life
from tests.store.credit_books import ACCOUNT, OTHER, account_row, books_of, finish, hold, used, whole
from tests.store.shops import LEDGERS, Shop

pytestmark = pytest.mark.parametrize("shop", LEDGERS, indirect=True)


async def nap(_: float) -> None:
    raise AssertionError("nothing sleeps here")


class Node:
    """One process: its life, its sweeper, and the requests it knows."""

    def __init__(self, shop: Shop, ledger: Ledger, name: str) -> None:
        self.books = Credits(ledger, clock=shop.clock)
        self.known: set[str] = set()
        self.life = Life(ledger, name, clock=shop.clock, sleep=nap, on_lost=lambda _: None)
        self.sweeper = CreditSweeper(self.books, ledger, self.life, ours=lambda hold: hold in self.known)

    async def take(self, name: str, consumed: int, account: AccountId = ACCOUNT, *, owner: NodeId | None = None) -> None:
        await self.books.apply(account, hold(name, 1_000, owner=owner or self.life.id, about="dev/echo"))
        if consumed:
            await self.books.apply(account, Fold(HoldId(name), Pico(consumed)))


async def living(shop: Shop) -> tuple[Ledger, Node]:
    books = await books_of(shop, ACCOUNT, OTHER, funds=100_000)
    ledger: Ledger = books._till  # type: ignore[assignment]  # the store that was opened for them
    node = Node(shop, ledger, "a")
    await node.life.begin()
    return ledger, node


async def test_the_dead_are_charged_what_was_recorded(shop: Shop) -> None:
    """Several holds of one account and one of another: each is a request that crashed, with a line of its own."""
    ledger, node = await living(shop)
    dead, other = await ledger.join("b"), await ledger.join("c")
    for number, consumed in enumerate((300, 0, 20)):
        await node.take(f"r{number}", consumed, owner=dead)
    await node.take("r3", 7, OTHER, owner=dead)
    await node.take("alive", 5, owner=other)
    assert await node.sweeper.sweep() == 0
    await ledger.leave(dead)
    assert await node.sweeper.sweep() == 4
    assert await node.sweeper.sweep() == 0
    account = await whole(node.books)
    assert (account.owed, list(account.holds)) == (325, ["alive"])
    assert (await whole(node.books, OTHER)).owed == 7 == await used(node.books, OTHER)
    lines = await node.books.read(lambda: credit_lists.entries(ACCOUNT, None, 2))
    assert {(line.kind, line.amount, line.reference) for line in lines} == {("usage", -300, "r0"), ("usage", -20, "r2")}
    for name, cost in (("r0", 300), ("r1", 0), ("r2", 20)):
        row = await node.books.read(lambda name=name: credit_lists.request(ACCOUNT, name))  # type: ignore[misc]
        assert row is not None
        assert (row.cost, row.document, row.model, row.api_key, row.completion) == (cost, CRASHED, "dev/echo", KeyId("k"), 0)
    await finish(node.books, "alive", 5)
    assert (await whole(node.books)).owed == 325 == await used(node.books)
    with pytest.raises(CreditFault) as caught:
        await finish(node.books, "r0", 900)
    assert caught.value.reason is CreditReason.HOLD_FENCED, "a node that wakes charges nothing more"


async def test_our_own_unknown_hold_goes_when_found_twice(shop: Shop) -> None:
    """Once may be a bill that is being settled; a request we know keeps its hold for as long as it takes."""
    _, node = await living(shop)
    await node.take("known", 10)
    await node.take("lost", 40)
    node.known = {"known"}
    assert await node.sweeper.sweep() == 0
    await node.take("lost later", 0)
    assert await node.sweeper.sweep() == 1
    assert set((await whole(node.books)).holds) == {"known", "lost later"}
    node.known.add("lost later")
    assert await node.sweeper.sweep() == 0
    node.known.discard("lost later")
    assert await node.sweeper.sweep() == 0, "doubt begins again"
    assert await node.sweeper.sweep() == 1
    assert (await whole(node.books)).owed == 50


async def test_two_sweepers_charge_once(shop: Shop) -> None:
    """Everybody sweeps after the same dead: each hold is released by one of them."""
    ledger, node = await living(shop)
    dead = await ledger.join("b")
    for number in range(12):
        await node.take(f"r{number}", number, (ACCOUNT, OTHER)[number % 2], owner=dead)
    nodes = [node]
    for name in ("c", "d"):
        nodes.append(Node(shop, ledger if shop.kind == "sqlite" else await shop.open(), name))
        await nodes[-1].life.begin()
    await ledger.leave(dead)
    assert sum(await asyncio.gather(*(one.sweeper.sweep() for one in nodes))) == 12
    assert (await whole(node.books)).owed + (await whole(node.books, OTHER)).owed == sum(range(12))


async def test_a_broken_row_hides_nobodys_holds(shop: Shop) -> None:
    """An account that cannot be read is reported and left; the holds of those after it are released all the same."""
    ledger, node = await living(shop)
    dead = await ledger.join("b")
    await node.take("r1", 3, owner=dead)
    await node.take("r2", 4, OTHER, owner=dead)
    await ledger.leave(dead)
    await shop.sql(f"UPDATE credit SET held = held + 1 WHERE id = '{ACCOUNT}'")
    reported: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
    try:
        assert await node.sweeper.sweep() == 1
    finally:
        loop.set_exception_handler(None)
    assert len(reported) == 1
    assert (await whole(node.books, OTHER)).owed == 4
    await shop.sql(f"UPDATE credit SET held = held - 1 WHERE id = '{ACCOUNT}'")
    assert await node.sweeper.sweep() == 1


async def test_more_accounts_than_a_page(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account is left out between two pages."""
    monkeypatch.setattr("mppnode.ledger.credits._PAGE", 3)
    ledger, node = await living(shop)
    dead = await ledger.join("b")
    for number in range(7):
        account = AccountId(f"b{number}")
        await node.books.create_account(account_row(account), overdraft=10_000)
        await node.take(f"r{number}", number, account, owner=dead)
    await ledger.leave(dead)
    assert await node.sweeper.sweep() == 7
