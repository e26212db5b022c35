"""Sums over traffic of every kind: what the metrics say was charged is what the books say, and what counts up counts down."""

from __future__ import annotations

import asyncio
import contextlib
import random
import string
from typing import Any

import aiohttp
import pytest

from channels.credit import Settle
from channels.faults import ChannelFault, Reason
from mppnode.gauging import page_of
from mppnode.ledger.credits import Credits
from tests.http.test_counted import PICO, Seen
from tests.support.customers import Customer, new_customer
from tests.support.http_client import UNIT, Channel, World, chat

MODELS = ("dev/story", "dev/dies-after-3", "dev/error-500", "dev/garbage-200", "dev/usage-huge", "dev/never-ends", "dev/empty")


def at_rest(world: World) -> Seen:
    """The metrics, with everything that goes up and down back at nothing."""
    seen = Seen(world)
    for rail in ("session", "credit"):
        assert seen("requests_active", rail=rail) == 0
    assert seen("streams_active") == seen("streams_paused") == 0
    begun = sum(seen.samples[name, labels] for name, labels in seen.samples if name == "mppnode_requests_total")
    for one_each in ("model_requests_total", "request_seconds_count"):
        found = sum(seen.samples[name, labels] for name, labels in seen.samples if name == f"mppnode_{one_each}")
        assert found == begun, one_each
    return seen


async def assert_charged(world: World, customer: Customer, channels: list[Channel]) -> Seen:
    """Dollars by rail, by model and by provider are the books' own sums."""
    await world.settled()
    seen = at_rest(world)
    books = {
        "credit": (await customer.credit()).owed / PICO,
        "session": sum([(await world.account(channel)).owed_pico for channel in channels]) / PICO,
    }
    for rail, owed in books.items():
        assert seen("charged_usd_total", rail=rail) == pytest.approx(owed, rel=1e-12, abs=1e-12), rail
    for name in ("model_charged_usd_total", "provider_charged_usd_total"):
        found = sum(value for (sample, _), value in seen.samples.items() if sample == f"mppnode_{name}")
        assert found == pytest.approx(sum(books.values()), rel=1e-12, abs=1e-12), name
    return seen


async def some_request(world: World, who: Customer | Channel, dice: random.Random) -> None:
    """One request that ends in one way or another."""
    body = chat(dice.choice(MODELS), max_tokens=dice.randrange(1, 60), stream=dice.random() < 0.7)
    if isinstance(who, Customer):
        credential = who.bearer
    else:
        held = (await world.account(who)).accepted
        credential = await world.pay(world.payer.voucher(who, held + dice.choice((0, 10, 200, 1_000))), body)

    async def ask() -> None:
        with contextlib.suppress(aiohttp.ClientError):
            async with world.request(body, credential) as response:
                await response.read()

    asking = asyncio.ensure_future(ask())
    if dice.random() < 0.4:
        for _ in range(dice.randrange(0, 120)):
            await asyncio.sleep(0)
        asking.cancel()
    else:
        for _ in range(4_000):  # one that is waiting for its payer is left
            if asking.done():
                break
            await asyncio.sleep(0)
        asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_charged_dollars_are_the_books_after_traffic_of_every_kind(world: World) -> None:
    """Served, failed, cut off at any moment, refused: the sums of the metrics are those of the ledger, on both rails."""
    dice, customer = random.Random(11), await new_customer(world)
    channels = [await world.opened() for _ in range(3)]
    for _ in range(120):
        await some_request(world, dice.choice((customer, *channels)), dice)
    seen = await assert_charged(world, customer, channels)
    assert seen("charged_usd_total", rail="session") > 0 < seen("charged_usd_total", rail="credit")
    accepted = sum([(await world.account(channel)).accepted for channel in channels])
    assert seen("accepted_usd_total") == pytest.approx(accepted / 10**6)


async def test_a_bill_another_process_has_closed_is_counted_as_it_closed_it(world: World) -> None:
    """A sweep that took this process for dead charged what was recorded: what was delivered beyond it nobody pays."""
    customer, channel = await new_customer(world), await world.opened()
    gate = world.gate(lent=20)
    body = chat("dev/story", max_tokens=40)
    async with customer.stream(body) as stream:
        await stream.tokens(5)
        (hold,) = (await customer.credit()).holds
        await customer.books.apply(customer.account, Settle(hold, 0))  # type: ignore[arg-type]
        await gate.release(100)
        await stream.rest()
    await world.settled()
    gate = world.gate(lent=20)
    credential = await world.pay(world.payer.voucher(channel, 20 * UNIT), body)
    async with world.stream(body, credential) as stream:
        await stream.tokens(5)
        (name,) = (await world.account(channel)).holds
        books = world.net.node.books
        assert books is not None
        await books.release(channel.id, name)
        await gate.release(100)
        await stream.rest()
    await assert_charged(world, customer, [channel])


async def test_a_bill_that_cannot_be_written_is_not_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that is away when a request ends charges nothing, and no metric says it did."""
    customer = await new_customer(world)
    transact, held = Credits.transact, list[bool]()

    async def once(self: Credits, account: Any, step: Any) -> Any:
        if held:
            raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger is not available")
        held.append(True)
        return await transact(self, account, step)

    with monkeypatch.context() as patch:
        patch.setattr(Credits, "transact", once)
        assert (await customer.send(chat("dev/story", max_tokens=40, stream=False))).status == 503
        await world.settled()
    await assert_charged(world, customer, [])


async def test_a_flood_of_names_keys_and_texts_makes_no_series_and_no_page_grow(world: World) -> None:
    """Thousands of random models, keys, credentials and bodies over HTTP: the same series as before, nothing of them."""
    dice = random.Random(5)

    def noise() -> str:
        return "FLOOD" + "".join(dice.choices(string.ascii_letters + string.digits + "-_./", k=dice.randrange(1, 50)))

    async def one(number: int) -> None:
        match number % 5:
            case 0:
                await world.send(chat(noise(), text=noise()))
            case 1:
                await world.send(chat("dev/story"), f"Bearer {noise()}")
            case 2:
                await world.send(chat("dev/story"), f"Payment {noise()}")
            case 3:
                await world.send(noise().encode(), path="/v1/chat/completions")
            case _:
                await world.send(chat("dev/story"), path=f"/{noise()}", headers={"Idempotency-Key": noise()})

    for number in range(5):
        await one(number)  # each kind of refusal once
    node = world.net.node
    assert node.gauges is not None
    assert node.treasury is not None
    for look in (node.gauges.look_here, node.gauges.look_at_ledger, node.gauges.look_at_chain, node.treasury.treasurer._review):
        await look()  # or a gauge would be shown for the first time meanwhile
    before = Seen(world)
    refused = sum(value for (name, _), value in before.samples.items() if name == "mppnode_requests_refused_total")
    for number in range(0, 2_000, 50):
        await asyncio.gather(*(one(each) for each in range(number, number + 50)))
    after = Seen(world)
    assert after.samples.keys() == before.samples.keys()
    body, _ = page_of(world.net.node._registry)("text/plain")
    assert b"FLOOD" not in body
    assert len(body) < 200_000
    counted = sum(value for (name, _), value in after.samples.items() if name == "mppnode_requests_refused_total")
    assert counted - refused == 2_000
