"""Rate limits and remembered bearers under change: what is refused takes nothing, and nothing outlives its deadline."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mppnode.accounts import directory
from mppnode.accounts.forms import read_key_form
from mppnode.ledger.credits import Credits
from tests.http.test_keyed import agree
from tests.support.customers import DOLLAR, Customer, customers_of, new_customer
from tests.support.http_client import World, chat, cost


async def _change(customer: Customer, form: bytes) -> None:
    world = customer.world
    await customers_of(world).keyring.change(customer.account, customer.key, read_key_form(form, now=world.clock.now()))


def _left(headers: Any, what: str) -> int:
    return int(headers[f"x-ratelimit-remaining-{what}"])


async def test_a_transaction_that_runs_again_takes_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger may decide a hold several times: what it takes of the limits, and later gives back, it takes once."""
    customer = await new_customer(world, rpm=10, tpm=10_000)
    transact = Credits.transact

    async def thrice(self: Credits, account: Any, step: Any) -> Any:
        found = await self.load(account)
        for _ in range(2):
            step(found)
        return await transact(self, account, step)

    monkeypatch.setattr(Credits, "transact", thrice)
    reply = await customer.send(chat("dev/story", max_tokens=100, stream=False))
    assert _left(reply.headers, "requests") == 9
    assert _left(reply.headers, "tokens") in range(10_000 - 120, 10_000 - 99)
    usage = reply.json["usage"]
    probe = await customer.send(chat("dev/story", max_tokens=1, stream=False))
    assert _left(probe.headers, "requests") == 8
    assert 10_000 - _left(probe.headers, "tokens") <= usage["total_tokens"] + 1 + 12
    await agree(customer)


@pytest.mark.parametrize("why", ["money", "cap", "concurrency", "tokens"])
async def test_a_refusal_takes_nothing_of_the_limits(world: World, why: str) -> None:
    """Refused for money, a cap, its siblings or its tokens, a request has used up neither requests nor tokens."""
    form: dict[str, Any] = {"money": {}, "cap": {"spend_caps": {"total": 1}}, "concurrency": {"concurrency": 1}}.get(why, {})
    credit = cost(50, 20) if why == "money" else DOLLAR
    customer = await new_customer(world, credit, rpm=10, tpm=5_000, **form)
    tokens = 4_000 if why != "tokens" else 6_000
    gate = world.gate(lent=0) if why == "concurrency" else None
    asking = asyncio.ensure_future(customer.send(chat("dev/story", max_tokens=10))) if gate else None
    if gate:
        await world.eventually(lambda: world.net.provider.live == 1)
        tokens = 10
    refused = [await customer.send(chat("dev/story", max_tokens=tokens)) for _ in range(5)]
    assert {reply.status for reply in refused} <= {402, 403, 429}
    assert {_left(reply.headers, "requests") for reply in refused} == {9 if gate else 10}, "told on every answer"
    if gate and asking:
        await gate.release(100)
        await asking
        await world.settled()
        world.net.provider.gate = None
    served = await customer.send(chat("dev/story", max_tokens=10, stream=False))
    assert (served.status, _left(served.headers, "requests")) == (200, 8 if gate else 9)
    await agree(customer)


async def test_a_request_without_usage_gives_its_tokens_back(world: World) -> None:
    """Nobody served it: the tokens it might have taken are free again, the request itself is counted."""
    customer = await new_customer(world, rpm=10, tpm=5_000)
    for _ in range(3):
        assert (await customer.send(chat("dev/error-500", max_tokens=4_000))).status >= 500
    reply = await customer.send(chat("dev/story", max_tokens=4_000, stream=False))
    assert (reply.status, _left(reply.headers, "requests")) == (200, 6)


async def test_p67_a_remembered_key_meets_its_new_limits(world: World) -> None:
    """P-67: caps, rates and pools that changed on another node hold for the very next request, remembered or not."""
    customer = await new_customer(world)
    assert (await customer.send(chat(stream=False))).status == 200
    await _change(customer, b'{"rpm": 1}')
    first = await customer.send(chat(stream=False))
    assert (first.status, _left(first.headers, "requests")) == (200, 0)
    assert (await customer.send(chat(stream=False))).status == 429
    await _change(customer, b'{"rpm": null, "spend_caps": {"day": 0}}')
    assert (await customer.send(chat(stream=False))).code == "cap_reached"
    await _change(customer, b'{"spend_caps": {}, "model_pool": ["dev/story"]}')
    assert (await customer.send(chat(stream=False))).status == 409, "it was routed where it may not go"
    assert (await customer.send(chat(stream=False))).code == "model_forbidden"
    await agree(customer)


async def test_x_trust_is_checked_on_every_request(world: World) -> None:
    """A remembered key is its own account's whatever the header says: another's is 403, two are 400."""
    customer = await new_customer(world, trust="mine")
    for _ in range(2):
        assert (await customer.send(chat(stream=False), headers={"X-Trust": "mine"})).status == 200
        refused = await customer.send(chat(stream=False), headers={"X-Trust": "theirs"})
        assert (refused.status, refused.code) == (403, "account_forbidden")
        assert (await customer.send(chat(stream=False), headers={"X-Trust": "no such name!"})).status == 400
    await agree(customer)


async def test_unknown_keys_take_no_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger who tries keys is looked up and not remembered, and customers are remembered up to a bound."""
    monkeypatch.setattr(directory, "_REMEMBERED_MAX", 3)
    customer, known = await new_customer(world), customers_of(world).directory._known
    others = [await customer.another_key() for _ in range(5)]
    for other in others:
        assert (await other.send(chat(stream=False))).status == 200
    assert len(known) == 3
    for number in range(20):
        bearer = f"{customer.bearer[:-4]}{number:04d}"
        assert (await world.send(chat(), bearer)).status == 401
    assert (await world.send(chat(), "Bearer " + "x" * 9_000)).status in (400, 401)
    assert len(known) == 3
    assert (await others[0].send(chat(stream=False))).status == 200, "forgotten is looked up again"
