"""``mppnode credits reconcile`` beside a running node, against the Stripe peer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mppnode.kernel.clock import SystemClock
from tests.cli.operator import Desk, configuration, desk
from tests.support.stripe_peer import KEY, Mishap, StripePeer, running_peer

HOOK = "whsec_canaryCanaryCanary0123456789"


@pytest.fixture
async def peer() -> AsyncIterator[StripePeer]:
    async with running_peer(clock=SystemClock()) as peer:
        yield peer


@pytest.fixture
async def shop(tmp_path: Path, peer: StripePeer) -> AsyncIterator[Desk]:
    async with desk(tmp_path) as made:
        (made.folder / "stripe.key").write_text(KEY)
        (made.folder / "hook.key").write_text(HOOK)
        page = "https://shop.example/back"
        billing = f"""
[billing]
secret_key = {{ file = "stripe.key" }}
webhook_secrets = [{{ file = "hook.key" }}]
success_url = "{page}"
cancel_url = "{page}"
return_url = "{page}"
packs_cents = [500]
livemode = false
api_base = "{peer.base_url}"
"""
        (made.folder / "selling.toml").write_text(configuration(made.net) + billing)
        yield made


async def test_what_was_never_announced_is_booked_and_named_once(shop: Desk, peer: StripePeer) -> None:
    """A payment whose webhook never came is a difference and status 1, then booked; the second run agrees with status 0."""
    account = (await shop.run("accounts", "create", "ada", "--json")).records[0]["id"]
    clean = await shop.run("credits", "reconcile", config="selling.toml")
    assert (clean.status, clean.err) == (0, "")
    intent = peer.intent(500, None, {"mppnode_account": account, "mppnode_reference": "pack-1"})
    peer.confirm(intent, "pm_visa")
    for _ in range(5):  # a period ends before its last second: a payment of this one is of the next comparison
        found = await shop.run("credits", "reconcile", "--json", config="selling.toml")
        if found.status:
            break
    difference, summary = found.records
    assert found.status == 1
    assert difference == {"account": account, "what": "payment", "reference": intent["id"], "ours": 0, "theirs": 500}
    assert (summary["ledger"]["paid"], summary["stripe"]["paid"], summary["booked"], summary["differences"]) == (0, 500, 1, 1)
    again = await shop.run("credits", "reconcile", "--days", "1", "--json", config="selling.toml")
    assert (again.status, again.records[0]["differences"], again.records[0]["ledger"]["paid"]) == (0, 0, 500)
    shown = await shop.run("credits", "show", "ada", "--json")
    assert shown.records[0]["balance"]["usd"] == "5.000000"
    assert KEY not in found.out + found.err
    assert HOOK not in found.out + found.err


async def test_a_comparison_that_cannot_be_made_says_why(shop: Desk, peer: StripePeer) -> None:
    """Without [billing] the request is wrong (2); with Stripe away or another's key it failed (1), and no key is shown."""
    without = await shop.run("credits", "reconcile")
    assert (without.status, without.out) == (2, "")
    assert "[billing]" in without.err
    peer.mishaps.extend([Mishap.BROKEN] * 3)
    away = await shop.run("credits", "reconcile", config="selling.toml")
    assert (away.status, away.out) == (1, "")
    assert "payment processor" in away.err
    (shop.folder / "stripe.key").write_text("sk_test_" + "stranger" * 4)
    refused = await shop.run("credits", "reconcile", config="selling.toml")
    assert (refused.status, refused.out) == (1, "")
    assert "stranger" not in refused.err


async def test_nobody_is_trusted_who_could_not_be_billed(shop: Desk) -> None:
    """Where money comes through Stripe, post-paid terms need a card and a metered price, by command as by the admin API."""
    opened = await shop.run("accounts", "create", "eve", "--terms", "postpaid", "--trust-limit", "5", config="selling.toml")
    assert (opened.status, opened.out) == (2, "")
    assert (await shop.run("accounts", "create", "ada", config="selling.toml")).status == 0
    terms = await shop.run("accounts", "terms", "ada", "postpaid", "--trust-limit", "5", config="selling.toml")
    assert (terms.status, terms.out) == (2, "")
    assert "metered" in terms.err
    billing = (shop.folder / "selling.toml").read_text().replace("livemode", 'meter = "usage"\nmeter_price = "price_usage"\nlivemode')
    (shop.folder / "metered.toml").write_text(billing)
    cardless = await shop.run("accounts", "terms", "ada", "postpaid", "--trust-limit", "5", config="metered.toml")
    assert (cardless.status, cardless.out) == (2, "")
    assert "card" in cardless.err
    shown = await shop.run("accounts", "show", "ada", "--json", config="selling.toml")
    assert (shown.records[0]["terms"], shown.records[0]["credits"]["available"]["usd"]) == ("prepaid", "0.000000")
