"""Secrets of others that a reload exchanges: an issuer's, Stripe's; and reloads that go wrong in ways nobody planned."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from channels.units import Pico
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.accounts import AccountsConfig, JwtConfig
from mppnode.config.billing import BillingConfig
from mppnode.config.load import ConfigError
from mppnode.config.ops import MetricsConfig
from mppnode.config.schema import Config, LimitsConfig
from mppnode.config.secrets import Secret
from mppnode.http.ops import Phase
from mppnode.reload import Reloader, taken_up
from tests.billing.kit import SECRET
from tests.http.key_reasons import ACCOUNTS, SHARED, token
from tests.support.customers import new_customer
from tests.support.http_client import UNIT, LogLines, World, chat, new_world
from tests.support.stripe_peer import KEY, StripePeer, running_peer

ANOTHER = b"another signing secret of 38 bytes, ok"
NEW_KEY = "sk_test_newnewnewNewNewNew0123456789"
NEW_SECRET = "whsec_newnewnewNewNewNew0123456789"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with new_world(DevnetOptions(tokens_per_second=0.0, accounts=ACCOUNTS)) as made:
        yield made
        assert made.log.bugs == []


async def trusting(world: World, jwt: JwtConfig | None) -> None:
    """Reload with other words about whose tokens are taken."""
    old = world.net.config()
    await world.net.node.reload(taken_up(old, replace(old, accounts=AccountsConfig(jwt=jwt))))


async def test_an_issuers_new_secret_shuts_its_old_tokens_out(world: World) -> None:
    """From the next request on only the new secret's tokens are good, also for who was admitted before; and without an
    issuer nobody's are, while keys go on.
    """
    assert ACCOUNTS.jwt is not None
    customer = await new_customer(world)
    old, new = token(world), token(world, secret=ANOTHER)
    assert (await world.send(chat(stream=False), old)).status == 200
    assert (await world.send(chat(), new)).code == "invalid_token"
    await trusting(world, replace(ACCOUNTS.jwt, secret=Secret(ANOTHER)))
    assert (await world.send(chat(), old)).code == "invalid_token"
    assert (await world.send(chat(stream=False), new)).status == 200
    await trusting(world, None)
    assert (await world.send(chat(), new)).status == 401
    assert (await customer.send(chat(stream=False))).status == 200
    await trusting(world, replace(ACCOUNTS.jwt, secret=Secret(SHARED)))
    assert (await world.send(chat(stream=False), old)).status == 200


async def test_another_audience_is_taken_up_too(world: World) -> None:
    """Not the secret alone decides: a token for somebody else is refused after a reload that says so."""
    assert ACCOUNTS.jwt is not None
    await new_customer(world)
    bearer = token(world)
    assert (await world.send(chat(stream=False), bearer)).status == 200
    await trusting(world, replace(ACCOUNTS.jwt, audience="elsewhere"))
    assert (await world.send(chat(), bearer)).code == "invalid_token"
    assert (await world.send(chat(stream=False), token(world, aud="elsewhere"))).status == 200


def billing_at(peer: StripePeer) -> BillingConfig:
    page = "https://node.example.com/"
    return BillingConfig(
        Secret(KEY), (Secret(SECRET),), page, page, page, (500,), None, livemode=False, api_base=peer.base_url
    )


async def test_stripes_new_secrets_are_used_and_the_old_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls have the new key, webhooks are measured by the new secrets, and while both are listed both are good."""
    async with running_peer() as peer:
        options = DevnetOptions(tokens_per_second=0.0, billing=billing_at(peer))
        async with new_world(options) as world:
            world.clock.advance(peer.now() - world.clock.now())
            event = peer.emit("charge.refund.updated", peer.add("refund", "re", status="succeeded"))

            async def heard(secret: str) -> int:
                url = f"{world.net.node.url}/webhooks/stripe"
                (status,) = await peer.deliver(world.http, url, secret, [event], at=world.clock.now())
                return status

            async def reloaded(**changes: Any) -> None:
                old = world.net.config()
                assert old.billing is not None
                await world.net.node.reload(taken_up(old, replace(old, billing=replace(old.billing, **changes))))

            assert (await heard(SECRET), await heard(NEW_SECRET)) == (200, 400)
            await reloaded(webhook_secrets=(Secret(NEW_SECRET), Secret(SECRET)))
            assert (await heard(SECRET), await heard(NEW_SECRET)) == (200, 200)
            peer.seen.clear()
            monkeypatch.setattr("tests.support.stripe_peer.KEY", NEW_KEY)  # the one it takes
            await reloaded(webhook_secrets=(Secret(NEW_SECRET),), secret_key=Secret(NEW_KEY))
            assert (await heard(SECRET), await heard(NEW_SECRET)) == (400, 200)
            assert {seen.headers["Authorization"] for seen in peer.seen} == {f"Bearer {NEW_KEY}"}
            assert world.log.bugs == []


class Runs:
    """Something to reload, which fails as it is told to."""

    def __init__(self) -> None:
        self.fails: BaseException | None = None
        self.taken: list[Config] = []

    async def reload(self, config: Config) -> None:
        if self.fails is not None:
            raise self.fails
        self.taken.append(config)


async def test_no_failure_ends_the_ability_to_reload(world: World) -> None:
    """A defect of ours or of a library fails one reload, says its type and no more, and the next one is served."""
    old, log, runs = world.net.config(), LogLines(), Runs()
    read: list[Config | Exception] = [
        ConfigError(["node.port: is odd"]),
        RecursionError("quotes the file"),
        replace(old, providers=()),
        replace(old, providers=()),
    ]

    def load() -> Config:
        found = read.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    reloader = Reloader(old, load=load, service=runs, log=log)
    keeping = asyncio.ensure_future(reloader.keep())
    for count, fails in enumerate((None, None, KeyError("quotes a secret"), None), 1):
        runs.fails = fails
        reloader.ask()
        while len(log.lines) < count:
            assert not keeping.done()
            await asyncio.sleep(0)
    keeping.cancel()
    assert [line["event"] for line in log.lines] == ["config.refused"] * 3 + ["config.reloaded"]
    assert [line.get("problems") for line in log.lines[:3]] == [
        ["node.port: is odd"], ["not taken up: RecursionError"], ["not taken up: KeyError"],
    ]  # fmt: skip
    assert len(runs.taken) == 1


def priced(config: Config, factor: int) -> Config:
    models = tuple(replace(model, output=Pico(model.output * factor)) for model in config.models)
    return replace(config, models=models)


async def test_a_price_that_rises_between_quote_and_payment_is_not_charged(world: World) -> None:
    """A payment for the lower quote is refused and free, and its challenge anew; one for a higher quote is served."""
    config, channel, body = world.net.config(), await world.opened(), chat(max_tokens=5)
    assert (await world.buy(body, world.payer.voucher(channel, UNIT))).status == 200
    await world.settled()
    once = (await world.account(channel)).owed_pico
    early = await world.pay(world.payer.voucher(channel, UNIT), body)
    await world.net.node.reload(priced(config, 2))
    refused = await world.send(body, early)
    assert (refused.status, refused.code) == (402, "invalid_challenge")
    assert (await world.account(channel)).owed_pico == once > 0
    dear = await world.pay(world.payer.voucher(channel, UNIT), body)
    await world.net.node.reload(config)
    assert (await world.send(body, dear)).status == 200
    await world.settled()
    assert (await world.account(channel)).owed_pico == 2 * once


async def test_what_a_reload_brings_has_series_of_its_own_and_a_drain_is_still_measured() -> None:
    """New names are counted by name and not as ``other``; the page is there until the last stream has ended."""
    options = DevnetOptions(tokens_per_second=0.0, metrics=MetricsConfig(port=0), limits=LimitsConfig(drain_delay_s=300))
    async with new_world(options) as world:
        config, node = world.net.config(), world.net.node
        other = replace(config.providers[0], name="newcomer")
        models = tuple(replace(model, id="new/model", provider="newcomer") for model in config.models[:1])
        await node.reload(replace(config, providers=(*config.providers, other), models=(*config.models, *models)))
        assert node.gauges is not None
        await node.gauges.look_here()
        stopping = asyncio.ensure_future(node.stop())
        await world.eventually(lambda: node.vitals is not None and node.vitals.phase is Phase.DRAINING)
        async with world.http.get(f"{node.ops_url}/metrics") as answer:
            page = await answer.text()
        node.hurry()
        await stopping
        world.net.node = world.net.new_node()
        await world.net.node.start()
        world.net.node.hurry()
        assert 'mppnode_model_providers_usable{model="new/model"} 1' in page
        assert re.search(r'mppnode_\w+_total\{[^}]*provider="newcomer"', page)
        assert 'mppnode_model_providers_usable{model="other"}' not in page
