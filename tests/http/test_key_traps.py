"""What an auditor tried on the request path of API keys: leaving at the wrong moment, and asking again."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from channels.faults import ChannelFault, Reason
from mppnode.engine import frames
from mppnode.engine.record import Idempotence
from mppnode.ledger.credits import Credits
from tests.http.key_reasons import _suspend
from tests.http.test_keyed import KEY, agree
from tests.support.customers import Customer, customers_of, new_customer
from tests.support.http_client import World, chat


class Slowly:
    """Lets the ledger do what it is asked to, and holds the answer back."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str) -> None:
        self.reached, self.leave = asyncio.Event(), asyncio.Event()
        inner: Any = getattr(Credits, name)

        async def slow(books: Credits, *args: Any, **more: Any) -> Any:
            done = await inner(books, *args, **more)
            self.reached.set()
            await self.leave.wait()
            return done

        patch.setattr(Credits, name, slow)


async def _left_while(world: World, sending: Any, slowly: Slowly) -> None:
    asking = asyncio.ensure_future(sending)
    await slowly.reached.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    for _ in range(20):
        await asyncio.sleep(0.001)
    slowly.leave.set()
    await world.settled()


async def test_p24_leaving_while_the_key_is_claimed_leaves_no_claim(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P-24: a client that hangs up before its claim is answered finds its Idempotency-Key free."""
    customer, body = await new_customer(world), chat("dev/story", max_tokens=5, stream=False)
    with monkeypatch.context() as patch:
        await _left_while(world, customer.send(body, headers=KEY), Slowly(patch, "write"))
    assert (await customer.send(body, headers=KEY)).status == 200
    await agree(customer)


async def test_p24_a_payer_who_leaves_while_the_key_is_claimed_leaves_no_claim(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P-24: the same for a channel, whose repeat would otherwise be refused as long as the node lives."""
    body, channel = chat("dev/story", max_tokens=5, stream=False), world.payer.channel()
    credential = await world.pay(world.payer.open(channel), body)
    with monkeypatch.context() as patch:
        await _left_while(world, world.send(body, credential, headers=KEY), Slowly(patch, "write"))
    assert (await world.send(body, credential, headers=KEY)).status == 200


async def test_leaving_while_the_money_is_held_leaves_no_hold(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that hangs up before its reservation is answered pays nothing, and nothing stays held or claimed."""
    customer, body = await new_customer(world), chat("dev/story", max_tokens=5, stream=False)
    with monkeypatch.context() as patch:
        await _left_while(world, customer.send(body, headers=KEY), Slowly(patch, "transact"))
    assert await agree(customer) == 0
    assert (await customer.send(body, headers=KEY)).status == 200


@pytest.mark.parametrize("answered", [True, False])
async def test_p24_an_outage_at_the_end_blocks_no_key(
    world: World, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    """P-24: what could not be written when a request ended is written later: its repeat is free, or told it is done."""
    customer, body = await new_customer(world), chat("dev/story", max_tokens=5)
    gate = world.gate(lent=2)
    async with customer.stream(body, headers=KEY) as stream:
        await stream.tokens(2)
        with monkeypatch.context() as patch:
            patch.setattr(Credits, "write", _away)
            if answered:
                await gate.release(100)
                await stream.rest()
            else:
                stream.response.close()
                await gate.release(100)
            await world.settled()
    world.net.provider.gate = None
    again = await customer.send(body, headers=KEY)
    if answered:
        assert (again.status, again.code) == (409, "conflict"), "it was served and charged, its answer is lost"
        assert (await customer.send(chat(), headers=KEY)).status == 422
    else:
        assert again.status == 200
    await agree(customer)


async def test_p24_an_outage_at_the_end_is_made_good_without_a_repeat(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P-24: other nodes learn of it too: the node catches up by itself."""
    customer, idempotence = await new_customer(world), customers_of(world).idempotence
    record = await idempotence.begin(f"account:{customer.account}", "order-17", b"x")
    with monkeypatch.context() as patch:
        patch.setattr(Credits, "write", _away)
        await record.drop()  # type: ignore[union-attr]
        await idempotence.catch_up()
    await idempotence.catch_up()
    elsewhere = Idempotence(customer.books, clock=world.clock, node=idempotence._node, owner=world.net.node._owner)
    await elsewhere.begin(f"account:{customer.account}", "order-17", b"y")


async def _away(*_: Any, **__: Any) -> Any:
    raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger is not available")


async def _revoke(customer: Customer) -> None:
    await customers_of(customer.world).keyring.revoke(customer.account, customer.key)


@pytest.mark.parametrize(("change", "code"), [(_revoke, "api_key_revoked"), (_suspend, "account_suspended")])
async def test_p67_a_revoked_key_gets_no_kept_answer(world: World, change: Any, code: str) -> None:
    """P-67: a repeat reserves nothing, so whether its key still holds is looked up before it is answered."""
    customer, body = await new_customer(world), chat(stream=False)
    assert (await customer.send(body, headers=KEY)).status == 200
    await change(customer)
    refused = await customer.send(body, headers=KEY)
    assert (refused.status, refused.code) == (403, code)


async def test_a_change_of_routing_while_asking_is_worth_a_retry(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routed by settings that have changed meanwhile, the request is refused so that SDKs send it again, and served."""
    customer = await new_customer(world)
    assert (await customer.send(chat(stream=False))).status == 200
    await customers_of(world).keyring.change(customer.account, customer.key, _form(b'{"optimize_mode": "cost"}'))
    refused = await customer.send(chat(stream=False))
    assert (refused.status, refused.code) == (409, "conflict")
    assert refused.headers.get("x-should-retry") != "false"
    assert refused.headers["Retry-After"] == "1"
    assert (await customer.send(chat(stream=False))).status == 200
    await agree(customer)


def _form(body: bytes) -> Any:
    from mppnode.accounts.forms import read_key_form

    return read_key_form(body, now=0)  # type: ignore[arg-type]


async def test_a_node_that_is_fenced_is_told_as_an_outage(world: World) -> None:
    """A request the node gives up because its life has ended is 503 and retried, not a conflict of the caller's."""
    customer = await new_customer(world)
    world.gate(lent=0)
    asking = asyncio.ensure_future(customer.send(chat("dev/story", max_tokens=5)))
    await world.eventually(lambda: world.net.provider.live == 1)
    customers_of(world).rail.end_everything()
    refused = await asking
    assert (refused.status, "x-should-retry" in refused.headers) == (503, False)
    assert "Retry-After" in refused.headers
    assert await agree(customer) == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_mistake_of_ours_at_the_end_releases_the_hold(
    world: World, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Whatever goes wrong between the last token and the bill, nothing stays held and no more than delivered is owed."""
    customer = await new_customer(world)

    def broken(*_: Any) -> Any:
        raise ValueError("hostile")

    with monkeypatch.context() as patch:
        patch.setattr(frames, "usage_json", broken)
        with contextlib.suppress(Exception):  # the stream is broken off
            await customer.send(chat("dev/story", max_tokens=5, stream=stream))
        await world.settled()
    assert world.log.bugs
    world.log.lines.clear()
    credit = await customer.credit()
    assert not credit.holds
    assert await agree(customer) <= 5 * 10_000_000 + 30 * 500_000
    assert (await customer.send(chat(stream=False))).status == 200
