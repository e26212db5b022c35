"""What the metrics say of requests, against what the books say: every number is counted where it becomes true."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mppnode.cli.devprovider_server import Gate
from mppnode.gauging import page_of
from tests.support.customers import new_customer
from tests.support.http_client import UNIT, World, chat
from tests.support.providers import MODEL, Sold, answers, new_shop

PICO = 10**12


class Seen:
    """The metrics of a node at one moment, as a scrape shows them."""

    def __init__(self, world: World) -> None:
        body, kind = page_of(world.net.node._registry)("text/plain")
        assert kind.startswith("text/plain")
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[f"mppnode_{name}", tuple(sorted(labels.items()))]


async def test_a_paid_stream_is_counted_as_the_books_have_it(world: World) -> None:
    """Tokens, dollars, vouchers and the ending of one stream are those of its channel."""
    channel, body = await world.opened(), chat("dev/story", max_tokens=50)
    credential = await world.pay(world.payer.voucher(channel, 60 * UNIT), body)
    async with world.stream(body, credential) as stream:
        await stream.rest()
    await world.settled()
    account, seen = await world.account(channel), Seen(world)
    assert seen("requests_total", rail="session", ending="complete") == 1
    assert seen("charged_usd_total", rail="session") == account.owed_pico / PICO
    assert seen("model_charged_usd_total", model="dev/story") == account.owed_pico / PICO
    assert seen("tokens_total", model="dev/story", kind="completion") == stream.usage["completion_tokens"] == 50
    assert seen("tokens_total", model="dev/story", kind="prompt") == stream.usage["prompt_tokens"]
    assert seen("accepted_usd_total") == account.accepted / 10**6
    assert (seen("channels_opened_total"), seen("vouchers_total")) == (1, 2)
    assert seen("provider_attempts_total", provider="dev", result="ok") == 1
    assert seen("first_token_seconds_count", provider="dev") == seen("request_seconds_count", rail="session") == 1
    assert seen("token_gap_seconds_count", provider="dev") == 1
    assert seen("requests_active", rail="session") == seen("streams_active") == 0
    assert seen("store_commit_seconds_count", store="sqlite") > 3
    assert seen("ceiling_breaches_total") == seen("store_failures_total", store="sqlite") == 0


async def test_a_keys_request_is_counted_on_its_own_rail(world: World) -> None:
    """A customer's request is credit's, and what the account is charged is what was counted."""
    customer = await new_customer(world)
    assert (await customer.send(chat(stream=False))).status == 200
    credit, seen = await customer.credit(), Seen(world)
    assert seen("requests_total", rail="credit", ending="complete") == 1
    assert seen("charged_usd_total", rail="credit") == credit.owed / PICO
    assert seen("charged_usd_total", rail="session") == 0


async def test_waiting_for_a_payer_is_a_pause_and_says_how_it_ended(world: World) -> None:
    """A stream without money is paused; a voucher makes it paid, and a client that leaves makes it gone."""
    channel, body = await world.opened(), chat("dev/story", max_tokens=2_000)
    credential = await world.pay(world.payer.voucher(channel, 3 * UNIT), body)
    async with world.stream(body, credential) as stream:
        need = await stream.until("payment-need-voucher")
        await world.eventually(lambda: Seen(world)("streams_paused") == 1)
        required = int(json.loads(need.data)["requiredCumulative"])
        assert (await world.manage(world.payer.voucher(channel, required))).status == 204
        await world.eventually(lambda: Seen(world)("pauses_total", ended="paid") >= 1)
        await stream.until("payment-need-voucher")
        await world.eventually(lambda: Seen(world)("streams_paused") == 1)
        stream.response.close()
    await world.settled()
    seen = Seen(world)
    assert (seen("streams_paused"), seen("pauses_total", ended="gone")) == (0, 1)
    assert seen("disconnects_total", phase="paused") == 1
    assert seen("requests_total", rail="session", ending="disconnected") == 1
    assert seen("upstream_cancels_total", provider="dev") == 1


async def test_a_client_that_leaves_before_anything_came_is_not_a_failure(world: World) -> None:
    """Nobody answered, and nobody was to blame: it is disconnected before any output, with no failed call."""
    channel, body = await world.opened(), chat("dev/story", max_tokens=5)
    credential = await world.pay(world.payer.voucher(channel, 6 * UNIT), body)
    world.gate(lent=0)
    asking = asyncio.ensure_future(world.send(body, credential))
    await world.eventually(lambda: world.net.provider.live == 1)
    asking.cancel()
    await asyncio.wait({asking})
    await world.settled()
    seen = Seen(world)
    assert seen("requests_total", rail="session", ending="disconnected") == 1
    assert seen("disconnects_total", phase="before_output") == 1
    assert seen("model_requests_total", model="dev/story", outcome="abandoned") == 1
    assert not sum(value for (name, _), value in seen.samples.items() if name == "mppnode_provider_attempts_total")


async def test_nobody_answering_is_failed_and_names_the_provider(world: World) -> None:
    """A provider that refuses is counted by its own fault, and the request as failed by us."""
    channel, body = await world.opened(), chat("dev/error-500", max_tokens=5)
    credential = await world.pay(world.payer.voucher(channel, 6 * UNIT), body)
    assert (await world.send(body, credential)).status == 502
    seen = Seen(world)
    assert seen("requests_total", rail="session", ending="failed") == 1
    assert seen("model_requests_total", model="dev/error-500", outcome="failed") == 1
    assert seen("provider_attempts_total", provider="dev", result="status") == 1
    assert seen("requests_refused_total", reason="all_providers_failed") == 1
    (line,) = [line for line in world.log.lines if line["event"] == "request.ended"]
    assert line["attempts"] == 1
    assert seen("charged_usd_total", rail="session") == 0


@pytest.mark.parametrize("rail", ["session", "credit"])
async def test_refusals_are_counted_once_by_their_reason(world: World, rail: str) -> None:
    """Whoever renders a refusal, it is one, under its own name."""
    if rail == "session":
        assert (await world.send(chat())).status == 402
        assert Seen(world)("requests_refused_total", reason="payment_required") == 1
        channel = await world.opened()
        low = await world.manage(world.payer.voucher(channel, 0))
        assert low.status == 402
        assert Seen(world)("vouchers_refused_total", reason=low.code) == 1
        return
    customer = await new_customer(world, credit=0)
    refused = await customer.send(chat(stream=False))
    assert refused.status == 402
    seen = Seen(world)
    assert seen("requests_refused_total", reason=refused.code) == 1
    assert seen("holds_refused_total", rail="credit", reason=refused.code) == 1


async def test_what_is_delivered_and_not_recorded_is_exposed(world: World) -> None:
    """Between two records of a running stream a crash would cost what has left since; at its end nothing is exposed."""
    channel, body = await world.opened(), chat("dev/story", max_tokens=40)
    credential = await world.pay(world.payer.voucher(channel, 60 * UNIT), body)
    gate: Gate = world.gate(lent=20)
    gauges = world.net.node.gauges
    assert gauges is not None
    async with world.stream(body, credential) as stream:
        await stream.tokens(20)
        await gauges.look_here()
        assert 0 < Seen(world)("exposure_usd", rail="session") <= 40 * UNIT / 10**6
        await gate.release(100)
        await stream.rest()
    await world.settled()
    await gauges.look_here()
    assert Seen(world)("exposure_usd", rail="session") == 0


async def test_the_treasurys_review_shows_where_the_money_is(world: World) -> None:
    """Claimable, earned, headroom and unsigned are the differences of the account's own amounts."""
    channel, body = await world.opened(), chat("dev/story", max_tokens=50)
    credential = await world.pay(world.payer.voucher(channel, 60 * UNIT), body)
    async with world.stream(body, credential) as stream:
        await stream.rest()
    await world.settled()
    treasury = world.net.node.treasury
    assert treasury is not None
    await treasury.treasurer._review()
    account, seen = await world.account(channel), Seen(world)
    money = {name: seen("channel_usd", money=name) for name in ("claimable", "earned", "headroom", "unsigned")}
    settled = account.chain.settled
    assert money == {
        "claimable": (account.accepted - settled) / 10**6,
        "earned": (account.spent - settled) / 10**6,
        "headroom": (account.accepted - account.spent) / 10**6,
        "unsigned": (account.chain.deposit - account.accepted) / 10**6,
    }
    assert seen("channels", phase="open") == 1
    world.net.node.metrics.relieved()
    assert not [name for name, _ in Seen(world).samples if name in ("mppnode_channels", "mppnode_channel_usd")]


async def test_looks_at_ledger_and_chain_show_what_is_there(world: World) -> None:
    """Keys, tasks, sponsoring, the fee payer's balance and the head's age come from where they are kept."""
    customer = await new_customer(world)
    gauges = world.net.node.gauges
    assert gauges is not None
    world.clock.advance(40)
    await gauges.look_at_ledger()
    await gauges.look_at_chain()
    seen = Seen(world)
    assert (seen("keys_active"), seen("unbilled_usd"), seen("sponsor_budget_used_usd")) == (1, 0, 0)
    assert seen("outbox_tasks", kind="meter", state="due") == seen("outbox_oldest_age_seconds", kind="meter") == 0
    funds = world.net.chain.balance(world.net.payee)
    assert seen("fee_payer_balance_usd") == funds / 10**6
    assert seen("chain_head_age_seconds") >= 0
    await customer.another_key(name="second")
    await gauges.look_at_ledger()
    assert Seen(world)("keys_active") == 2


async def test_providers_and_prices_are_looked_at(world: World) -> None:
    """Each model says how many could serve it, each provider how it stands, and a price that was read its time."""
    gauges = world.net.node.gauges
    assert gauges is not None
    await gauges.look_here()
    seen = Seen(world)
    assert seen("model_providers_usable", model="dev/story") == 1
    assert seen("provider_standing", provider="dev") == 0
    assert not [name for name, _ in seen.samples if name == "mppnode_price_timestamp_seconds"], "written down by hand"
    catalog = gauges.market.catalog()
    (listing,) = catalog.listings("dev/story")
    priced = type(catalog)([replace(listing, priced_at=world.clock.now())], stale_s=60, held={"dev": 3})
    gauges.market.catalog = lambda: priced
    await gauges.look_here()
    seen = Seen(world)
    assert (seen("price_timestamp_seconds", provider="dev"), seen("prices_held", provider="dev")) == (world.clock.now(), 3)


async def test_a_request_every_provider_finds_fault_with_is_no_failure_of_theirs() -> None:
    """A customer who asks for the impossible all day must wake nobody: rejected is the caller's doing."""
    async with new_shop(Sold("one", answers(422)), Sold("two", answers(400))) as shop:
        customer = await new_customer(shop)
        for stream in (True, False):
            assert (await customer.send(chat(MODEL, stream=stream))).headers["x-should-retry"] == "false"
        seen = Seen(shop)
        assert seen("requests_total", rail="credit", ending="rejected") == 2
        assert seen("model_requests_total", model=MODEL, outcome="abandoned") == 2
        assert seen("model_requests_total", model=MODEL, outcome="failed") == 0
