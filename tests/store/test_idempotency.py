"""Answers kept for repeats, on every store: done once, answered the same, and never stuck behind the dead."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from channels.instants import UnixMillis
from channels.model import NodeId
from mppnode.ledger import idempotency
from mppnode.ledger.idempotency import KEPT_MS, Claim, Stored
from tests.store.shops import LEDGERS, SHARED, Shop

every_store = pytest.mark.parametrize("shop", LEDGERS, indirect=True)
shared_stores = pytest.mark.parametrize("shop", SHARED, indirect=True)
AT = UnixMillis(10**12)


class Desk:
    """One life of a node that is asked for requests by their keys."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop

    async def open(self, name: str) -> Desk:
        self.store = await self.shop.open()
        self.node = await self.store.join(name)
        return self

    async def claim(self, name: str = "n", body: str = "b", *, at: int = AT, scope: str = "s", node: NodeId | None = None) -> Claim | Stored:
        return await self.store.write(partial(idempotency.claim, scope, name, body, node or self.node, UnixMillis(at)), of=scope)

    async def keep(self, answer: str, name: str = "n", *, at: int = AT, node: NodeId | None = None) -> bool:
        return await self.store.write(partial(idempotency.store, "s", name, node or self.node, answer, UnixMillis(at)), of="s")

    async def give_up(self, name: str = "n", *, node: NodeId | None = None) -> None:
        await self.store.write(partial(idempotency.give_up, "s", name, node or self.node), of="s")

    async def purge(self, at: int) -> None:
        await self.store.write(partial(idempotency.purge, UnixMillis(at)), of="s")

    async def names(self) -> list[str]:
        return sorted(row[0] for row in await self.shop.sql("SELECT name FROM idempotency"))


@every_store
async def test_a_repeat_is_answered_from_the_first(shop: Shop) -> None:
    """Claimed, running, stored: the same body gets the answer, another body is told so, another scope is another."""
    desk = await Desk(shop).open("a")
    assert await desk.claim() is Claim.OURS
    assert await desk.claim() is Claim.RUNNING
    assert await desk.claim(body="other") is Claim.OTHER_BODY
    assert await desk.claim(scope="another") is Claim.OURS
    assert await desk.keep('{"id":1}')
    assert await desk.claim() == Stored('{"id":1}')
    assert await desk.claim(body="other") is Claim.OTHER_BODY
    assert not await desk.keep("twice"), "a stored answer is nobody's to replace"
    await desk.give_up()
    assert await desk.claim() == Stored('{"id":1}')


@every_store
async def test_what_came_to_nothing_is_a_first_try_again(shop: Shop) -> None:
    """A claim that was given up is free, for any body; giving up somebody else's changes nothing."""
    desk = await Desk(shop).open("a")
    stranger = await desk.store.join("b")
    await desk.claim()
    await desk.give_up(node=stranger)
    assert await desk.claim() is Claim.RUNNING
    await desk.give_up()
    assert await desk.claim(body="other") is Claim.OURS


@every_store
async def test_the_dead_do_not_keep_their_claims(shop: Shop) -> None:
    """A life that ended leaves its request to the next who asks; if it wakes, it stores and gives up nothing."""
    desk = await Desk(shop).open("a")
    dead = desk.node
    await desk.claim()
    desk.node = await desk.store.join("b")
    assert await desk.claim() is Claim.RUNNING, "it may be asleep, and it lives"
    await desk.store.leave(dead)
    assert await desk.claim(body="other") is Claim.OURS
    assert not await desk.keep("late", node=dead)
    await desk.give_up(node=dead)
    assert await desk.claim(body="other") is Claim.RUNNING
    assert await desk.keep("ours")
    assert await desk.claim(body="other") == Stored("ours")


@every_store
async def test_an_answer_is_kept_for_a_day(shop: Shop) -> None:
    """To the millisecond, counted from when it was stored; after that its key is free for anything."""
    desk = await Desk(shop).open("a")
    await desk.claim(at=AT - 50)
    await desk.keep("answer", at=AT)
    assert await desk.claim(at=AT + KEPT_MS - 1) == Stored("answer")
    assert await desk.claim(at=AT + KEPT_MS - 1, body="other") is Claim.OTHER_BODY
    assert await desk.claim(at=AT + KEPT_MS, body="other") is Claim.OURS
    assert await desk.claim(at=AT + KEPT_MS) is Claim.OTHER_BODY


@every_store
async def test_a_purge_forgets_the_old_alone(shop: Shop) -> None:
    """Old answers go, and old claims of the dead with them; what is running stays, however long it takes."""
    desk = await Desk(shop).open("a")
    dead = await desk.store.join("b")
    for name in ("old", "new", "running"):
        await desk.claim(name)
    await desk.claim("orphan", node=dead)
    await desk.keep("x", "old", at=AT)
    await desk.keep("x", "new", at=AT + 2)
    await desk.purge(AT + KEPT_MS)
    assert await desk.names() == ["new", "old", "orphan", "running"]
    await desk.store.leave(dead)
    await desk.purge(AT + KEPT_MS + 1)
    assert await desk.names() == ["new", "running"]


@shared_stores
async def test_one_of_many_does_it(shop: Shop) -> None:
    """The same request at two nodes at once, also after its first owner has died: one claims it, one time."""
    a, b = await Desk(shop).open("a"), await Desk(shop).open("b")
    dead = await a.store.join("c")
    for number in range(10):
        name = f"n{number}"
        if number % 2:
            await a.claim(name, node=dead)
            await a.store.leave(dead)
        answers = await asyncio.gather(*((a, b)[n % 2].claim(name) for n in range(8)))
        assert sorted(answer.name for answer in answers if isinstance(answer, Claim)) == ["OURS"] + ["RUNNING"] * 7
        stored = await asyncio.gather(a.keep("by a", name), b.keep("by b", name))
        assert sorted(stored) == [False, True]
        dead = await a.store.join("c")
