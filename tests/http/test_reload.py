"""Secrets of others that a reload exchanges: an issuer's, Stripe's; and reloads that go wrong in ways nobody planned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from mppnode.cli.devnet import DevnetOptions
from mppnode.config.accounts import AccountsConfig, JwtConfig
from mppnode.config.billing import BillingConfig
from mppnode.config.load import ConfigError
from mppnode.config.schema import Config
from mppnode.config.secrets import Secret
from mppnode.reload import Reloader, taken_up
from tests.billing.kit import SECRET
from tests.http.key_reasons import ACCOUNTS, SHARED, token
from tests.support.customers import new_customer
from tests.support.http_client import LogLines, World, chat, new_world
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
