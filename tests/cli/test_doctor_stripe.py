"""What the doctor says of a Stripe account, asked of a Stripe that refuses what Stripe's interface does not have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mppnode.config.billing import BillingConfig
from mppnode.config.secrets import Secret
from mppnode.doctor.findings import Status
from mppnode.gateways.stripe_api import API_VERSION
from mppnode.gateways.stripe_events import HANDLED
from tests.cli.doctor_kit import DEAD_URL, config, look
from tests.support.stripe_peer import ACCOUNT, KEY, Mishap, running_peer

URL = "https://api.mynode.net/webhooks/stripe"
EVENTS = sorted(name for name in HANDLED if not name.startswith("v1."))


@pytest.fixture
async def peer():
    async with running_peer() as running:
        yield running


def billing(peer, **more) -> BillingConfig:
    base = BillingConfig(
        secret_key=Secret(KEY),
        webhook_secrets=(Secret("whsec_canaryCanary0123456789"),),
        success_url="https://shop.example/paid",
        cancel_url="https://shop.example/credit",
        return_url="https://shop.example/account",
        packs_cents=(500,),
        meter=None,
        livemode=False,
        api_base=peer.base_url,
    )
    return replace(base, **more)


async def ask(name, peer, **more):
    found = await look(name, config(billing=billing(peer, **more)))
    assert "canary" not in (found.text + found.remedy).lower()
    return found


def says(**fields):
    """Fields that the account has in every answer."""
    return lambda body: body | fields if body.get("object") == "account" else body


async def test_whose_key_it_is(peer):
    """The account, its mode and country are told, and whether it may charge where the key may see that."""
    plain = await ask("stripe-account", peer)
    assert (plain.status, plain.text) == (Status.OK, f"{ACCOUNT}, test mode, country unknown")
    peer.override = says(country="DE", charges_enabled=True)
    assert (await ask("stripe-account", peer)).text == f"{ACCOUNT}, test mode, country DE, may charge"
    peer.override = says(country="owner@customer", charges_enabled=False)
    idle = await ask("stripe-account", peer)
    assert (idle.status, idle.text) == (Status.FAIL, f"{ACCOUNT}, test mode, country unknown: it may not charge")


async def test_a_key_that_does_not_do(peer):
    """Another mode, a revoked key, a Stripe that is away and one that talks nonsense are failures of their own."""
    peer.livemode = True
    other = await ask("stripe-account", peer)
    assert (other.status, other.text) == (Status.FAIL, "the key is of live mode")
    peer.mishaps.append(Mishap.LOCKED_OUT)
    revoked = await ask("stripe-account", peer)
    assert revoked.status is Status.FAIL
    assert "billing.secret_key" in revoked.remedy
    for mishap in (Mishap.BROKEN, Mishap.GARBAGE):
        peer.mishaps.append(mishap)
        away = await ask("stripe-account", peer)
        assert away.status is Status.FAIL
        assert away.text.startswith("no usable answer (unreachable")
    assert not peer.mishaps, "each is asked once: a repeat would hide what is looked for"
    assert (await ask("stripe-account", peer, api_base=DEAD_URL)).status is Status.FAIL


def endpoint(peer, **more):
    fields = {"url": URL, "enabled_events": EVENTS, "status": "enabled", "api_version": API_VERSION} | more
    return peer.add("webhook_endpoint", "we", **fields)


async def test_whether_the_node_hears_of_payments(peer):
    """Our URL must be registered, enabled, told of everything, and in our version."""
    endpoint(peer, url="https://other.example/webhooks/stripe")
    none = await ask("stripe-webhook", peer)
    assert (none.status, none.text) == (Status.FAIL, f"none of 1 endpoints is {URL}")
    ours = endpoint(peer)
    assert (await ask("stripe-webhook", peer)).status is Status.OK
    ours["enabled_events"] = ["*"]
    assert (await ask("stripe-webhook", peer)).status is Status.OK
    ours["api_version"] = "2019-01-01"
    old = await ask("stripe-webhook", peer)
    assert old.status is Status.WARN
    assert API_VERSION in old.text
    ours["enabled_events"] = EVENTS[1:]
    deaf = await ask("stripe-webhook", peer)
    assert deaf.status is Status.FAIL
    assert f"is not told of 1 events: {EVENTS[0]}" in deaf.text
    ours["status"] = "disabled"
    off = await ask("stripe-webhook", peer)
    assert (off.status, off.text) == (Status.FAIL, f"{URL} is disabled")


async def test_the_meter_of_post_paid_usage(peer):
    """Configured and not there, nobody would be billed."""
    assert (await ask("stripe-meter", peer)).status is Status.SKIP
    named = {"meter": "inference_usage", "meter_price": "price_1"}
    missing = await ask("stripe-meter", peer, **named)
    assert missing.status is Status.FAIL
    assert "billing.meter" in missing.remedy
    peer.add("billing.meter", "mtr", event_name="inference_usage", status="active")
    assert (await ask("stripe-meter", peer, **named)).status is Status.OK


async def test_nothing_to_look_at_without_billing():
    """Who sells nothing through Stripe is not asked for a key."""
    for name in ("stripe-account", "stripe-webhook", "stripe-meter"):
        assert (await look(name, config())).status is Status.SKIP


async def test_looking_changes_nothing(peer):
    """Every request is a GET."""
    endpoint(peer)
    for name in ("stripe-account", "stripe-webhook", "stripe-meter"):
        await ask(name, peer, meter="inference_usage", meter_price="price_1")
    assert {seen.method for seen in peer.seen} == {"GET"}
