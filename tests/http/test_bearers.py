"""Tokens and ``X-Trust`` over HTTP, keys on several nodes, and issuers that are away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from mppnode.accounts.forms import Opening
from mppnode.accounts.model import AccountKind, Prepaid
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.accounts import AccountsConfig, JwtConfig
from mppnode.kernel.faults import NodeFault
from mppnode.ledger.credit_lists import By, find_account
from tests.http.fleet import two_nodes
from tests.http.key_reasons import ACCOUNTS, token
from tests.support.customers import Customer, customers_of, new_customer
from tests.support.http_client import World, chat, new_world
from tests.unit.accounts.kit import RSA, jwk, jwks
from tests.unit.accounts.kit import token as signed


def with_accounts(accounts: AccountsConfig) -> DevnetOptions:
    return DevnetOptions(tokens_per_second=0.0, accounts=accounts)


@pytest.fixture
async def tokens_world() -> AsyncIterator[World]:
    async with new_world(with_accounts(ACCOUNTS)) as world:
        yield world
        assert world.log.bugs == []


async def test_a_token_spends_its_accounts_credit(tokens_world: World) -> None:
    """A verified JWT buys from the pooled credit of its account; its requests name no key."""
    world = tokens_world
    customer = await new_customer(world)
    reply = await world.send(chat(stream=False), token(world))
    assert reply.status == 200
    await world.settled()
    (row,) = await customer.requests()
    assert row.api_key == ""
    assert row.cost == (await customer.credit()).owed > 0


async def test_x_trust_selects_among_several_accounts(tokens_world: World) -> None:
    """Seed 000: without the header 400 when there are several, with a stranger's 403, with one's own that one pays."""
    world = tokens_world
    ours, theirs = await new_customer(world, trust="ours"), await new_customer(world, trust="theirs")
    bearer = token(world, trusts=["ours", "theirs"])
    missing = await world.send(chat(), bearer)
    assert (missing.status, missing.field) == (400, "X-Trust")
    assert (await world.send(chat(), bearer, headers={"X-Trust": "strangers"})).status == 403
    assert (await world.send(chat(stream=False), bearer, headers={"X-Trust": "theirs"})).status == 200
    await world.settled()
    assert [len(await who.requests()) for who in (ours, theirs)] == [0, 1]
    assert (await ours.send(chat(), headers={"X-Trust": "theirs"})).status == 403, "a key has one account"
    assert (await ours.send(chat(stream=False), headers={"X-Trust": "ours"})).status == 200


async def test_x_trust_may_be_required_of_everybody() -> None:
    """Seed 000's rule behind a setting: a request without the header is 400, one without credentials 401 or 402."""
    async with new_world(with_accounts(AccountsConfig(trust_rule="always"))) as world:
        customer = await new_customer(world)
        missing = await customer.send(chat())
        assert (missing.status, missing.field) == (400, "X-Trust")
        assert (await customer.send(chat(stream=False), headers={"X-Trust": "customer"})).status == 200


async def test_a_first_token_may_open_its_account() -> None:
    """With sign_up, an issuer's new customer has an account at once, with nothing on it; twice it is the same one."""
    assert ACCOUNTS.jwt is not None
    async with new_world(with_accounts(AccountsConfig(jwt=ACCOUNTS.jwt, sign_up=True))) as world:
        for _ in range(2):
            refused = await world.send(chat(), token(world, sub="newcomer"))
            assert (refused.status, refused.code) == (402, "insufficient_credit")
        books = customers_of(world).books
        row = await books.read(lambda: find_account(By.TRUST, "newcomer"))
        assert row is not None
        other = Customer(world, row.id, "", "")  # type: ignore[arg-type]
        await other.grant(10**12, "gift")
        assert (await world.send(chat(stream=False), token(world, sub="newcomer"))).status == 200
        assert (await world.send(chat(), token(world, sub="x", trusts=["a", "b"]))).status == 400


async def test_an_issuer_that_is_away_is_503_and_then_forgiven() -> None:
    """JWKS: while the issuer cannot be asked nobody is called unknown; once it answers, its tokens are good."""
    up = False

    async def keys(_: web.Request) -> web.Response:
        return web.Response(body=jwks(jwk("RS256"))) if up else web.Response(status=500)

    app = web.Application()
    app.add_routes([web.get("/keys", keys)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/keys"
    try:
        async with new_world(with_accounts(AccountsConfig(jwt=JwtConfig("https://id.example", "mppnode", jwks_url=url)))) as world:
            await new_customer(world)
            claims = {"iss": "https://id.example", "aud": "mppnode", "sub": "customer", "exp": world.clock.now() + 600}
            bearer = "Bearer " + signed(claims, RSA, "RS256", kid="RS256")
            away = await world.send(chat(), bearer)
            assert (away.status, away.code) == (503, "identity_unavailable")
            assert "Retry-After" in away.headers
            up = True
            world.clock.advance(61)
            assert (await world.send(chat(stream=False), bearer)).status == 200
            unknown = await world.send(chat(), "Bearer " + signed(claims, RSA, "RS256", kid="other"))
            assert unknown.status in (401, 503), "asked again a minute later at the earliest"
    finally:
        await runner.cleanup()


async def test_p67_a_key_revoked_elsewhere_fails_here() -> None:
    """P-67: warm on one node, revoked on the other: its next request fails on both, and so does a suspended account's."""
    async with two_nodes() as (one, two):
        here = await new_customer(one)
        there = Customer(two, here.account, here.key, here.bearer.removeprefix("Bearer "))
        for customer in (here, there):
            assert (await customer.send(chat(stream=False))).status == 200
        spare = await here.another_key()
        await customers_of(one).keyring.revoke(here.account, here.key)
        for customer in (there, here):
            assert (await customer.send(chat())).code == "api_key_revoked"
        assert (await spare.send(chat(stream=False))).status == 200


async def test_several_nodes_spend_one_balance() -> None:
    """K3 across nodes: what one holds the other cannot; the sum of all bills is what the account says."""
    async with two_nodes() as (one, two):
        here = await new_customer(one, 40 * 10_000_000 * 20)
        there = Customer(two, here.account, here.key, here.bearer.removeprefix("Bearer "))
        body = chat("dev/story", max_tokens=40, stream=False)
        replies = await asyncio.gather(*(customer.send(body) for _ in range(30) for customer in (here, there)))
        assert {reply.status for reply in replies} == {200, 402}
        for world in (one, two):
            await world.settled()
        credit, rows = await here.credit(), await here.requests()
        assert not credit.holds
        assert credit.balance >= 0
        assert sum(row.cost for row in rows) == credit.owed
        assert len(rows) == sum(reply.status == 200 for reply in replies)


async def test_an_account_opened_twice_is_refused_by_name(world: World) -> None:
    """Two accounts with one X-Trust name would be a coin toss of who pays."""
    await new_customer(world)
    with pytest.raises(NodeFault) as caught:
        await customers_of(world).accounts.create(Opening("customer", AccountKind.USER, None, Prepaid()))
    assert caught.value.reason.value == "conflict"


async def test_the_routes_of_customers_are_on_the_node(world: World) -> None:
    """Keys, credit, usage and a single request, over the public port, with a key alone."""
    customer = await new_customer(world)
    reply = await customer.send(chat(stream=False))
    await world.settled()
    name = reply.headers["X-Request-Id"]
    shown = await customer.send(method="GET", path=f"/v1/requests/{name}")
    assert shown.status == 200
    assert shown.json["id"] == name
    credit = await customer.send(method="GET", path="/v1/credits")
    owed = (await customer.credit()).owed
    assert str(10**12 - owed) in json.dumps(credit.json)
    for path in ("/v1/usage", "/v1/credits/transactions", "/v1/keys", "/v1/account"):
        assert (await customer.send(method="GET", path=path)).status == 200, path
    assert (await world.send(method="GET", path="/v1/credits")).status == 401
