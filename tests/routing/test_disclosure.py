"""What a caller is told: quotes that hold, who served by which rule at what price, what is on sale, what works (R14)."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote as encoded

import pytest

from channels.wire.receipt import SessionReceipt
from mppnode.engine.prober import Prober
from mppnode.kernel.listing import ProviderKind
from tests.routing.test_disconnects import client, leave
from tests.routing.test_failover import ask, buy, charged
from tests.support.http_client import UNIT, Reply, chat
from tests.support.providers import INPUT, MODEL, OUTPUT, Exchange, Shop, Sold, answers, new_shop, serves, stalls, usage

DISCLOSED = ("X-Model", "X-Provider", "X-Route-Strategy", "X-Route-Attempts")
PRICED = ("X-Price-Input-Cents-Per-M", "X-Price-Output-Cents-Per-M")


async def quoted(shop: Shop, body: dict[str, Any]) -> dict[str, Any]:
    """The quote for a request."""
    reply = await shop.send(body, path="/v1/quote")
    assert reply.status == 200, reply.body
    return reply.json


def waits(release: asyncio.Event) -> Any:
    """Answers once it is told to."""

    async def script(exchange: Exchange) -> None:
        await release.wait()
        exchange.whole(5)

    return script


REQUESTS: tuple[dict[str, Any], ...] = (
    {},
    {"n": 3, "max_tokens": 7},
    {"text": "many words " * 300},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    {"routing_strategy": "cheapest", "max_input_price_per_million": 50, "max_output_price_per_million": 1000},
)


@pytest.mark.parametrize("members", REQUESTS)
async def test_a_quote_is_what_the_request_then_reserves(members: dict[str, Any]) -> None:
    """The most a buffered request can cost by its quote is, to the pico, what it holds while it runs."""
    release = asyncio.Event()
    sold = [Sold(name, waits(release), output=price) for name, price in (("a", OUTPUT), ("b", OUTPUT + 70_001))]
    async with new_shop(*sold) as shop:
        body = ask(stream=False, **members)
        told = await quoted(shop, body)
        most = int(told["max_cost"]["pico_usd"])
        units = int(told["max_cost"]["base_units"])
        assert units == -(-most // 1_000_000)
        channel = shop.payer.channel()
        credential = await shop.pay(shop.payer.open(channel, units), body)
        buying = asyncio.ensure_future(shop.send(body, credential))
        await shop.eventually(lambda: sum(shop.asked().values()) == 1)
        account = await shop.account(channel)
        assert account.held_pico == most
        release.set()
        assert (await buying).status == 200
        (owed,) = await charged(shop)
        assert 0 < owed <= most


async def test_a_quote_is_free_and_names_who_and_why() -> None:
    """A quote needs no credential, asks no provider, and lists candidates with prices in the order they would be tried."""
    sold = [Sold("native"), Sold("cloud", kind=ProviderKind.QUOTA, input=1, output=1)]
    async with new_shop(*sold) as shop:
        told = await quoted(shop, chat(MODEL))
        assert (told["model"], told["provider"], told["strategy"]) == (MODEL, "native", "balanced")
        assert told["rule"]
        assert [(each["provider"], each["kind"]) for each in told["candidates"]] == [("native", "native"), ("cloud", "quota")]
        assert told["max_price"]["output_cents_per_million"] == "1000"
        assert told["candidates"][1]["price"]["output_cents_per_million"] == "0.0001"
        assert shop.asked() == {"native": 0, "cloud": 0}
        assert shop.broadcasts() == 0


async def test_r14_a_served_request_tells_who_at_what_price() -> None:
    """R14: model, provider, strategy, attempts and prices are in the headers, streamed or not, and exposed to browsers."""
    async with new_shop(Sold("bad", answers(500), output=1), Sold("good", input=55_000)) as shop:
        for stream in (True, False):
            reply = await buy(shop, ask("bad", "good", stream=stream, routing_strategy="cheapest"))
            shown = [reply.headers[name] for name in (*DISCLOSED, *PRICED)]
            assert shown == [MODEL, "good", "cheapest", "2", "5.5", "1000"]
            exposed = {name.strip() for name in reply.headers["Access-Control-Expose-Headers"].split(",")}
            assert {*DISCLOSED, *PRICED} <= exposed


async def test_r14_refusals_tell_prices_and_attempts() -> None:
    """R14: a 402 tells the most it would cost; a 502 how many were tried; a 503 nothing that was not decided."""
    async with new_shop(Sold("a", answers(500)), Sold("b", answers(500), output=12_345_678)) as shop:
        unpaid = await shop.send(chat(MODEL))
        assert unpaid.status == 402
        assert [unpaid.headers[name] for name in PRICED] == ["50", "1234.5678"]
        failed = await buy(shop, chat(MODEL, max_tokens=20))
        assert (failed.status, failed.headers["X-Route-Attempts"]) == (502, "2")
        assert [failed.headers[name] for name in PRICED] == ["50", "1234.5678"]
        none = await shop.send(chat(MODEL, max_input_price_per_million=1, max_output_price_per_million=1))
        assert none.status == 503
        assert not {"X-Provider", "X-Route-Attempts"} & set(none.headers)


async def test_r14_cost_is_one_value_wherever_it_is_told() -> None:
    """R14, P-08: ``usage.cost`` in dollars and base units, the receipt and the books say the same, streamed or not."""
    async with new_shop(Sold("a", serves(7), input=123_457, output=7_654_321)) as shop:
        owed_before = 0
        channel = await shop.opened()
        for stream in (True, False):
            body = chat(MODEL, max_tokens=20, stream=stream)
            credential = await shop.pay(shop.payer.voucher(channel, UNIT), body)
            told, receipt = await _usage(shop, body, credential)
            await shop.settled()
            account = await shop.account(channel)
            owed = account.owed_pico - owed_before
            owed_before = account.owed_pico
            assert owed == 2 * 123_457 + 7 * 7_654_321 == 53_827_161
            assert (told["cost"], told["cost_base_units"]) == ("0.000053827161", "53.827161")
            assert receipt.spent == account.spent == account.owed_pico // 1_000_000
            assert {name: told[name] for name in usage(0, 0)} == usage(2, 7)


async def _usage(shop: Shop, body: dict[str, Any], credential: str) -> tuple[dict[str, Any], SessionReceipt]:
    if body["stream"]:
        async with shop.stream(body, credential) as stream:
            await stream.rest()
        return stream.usage, stream.final
    reply = await shop.send(body, credential)
    assert reply.receipt is not None
    return reply.json["usage"], reply.receipt


async def test_r13_a_failed_attempts_tokens_are_the_nodes_cost() -> None:
    """R13: what a provider that then failed would have charged is not on the caller's bill."""

    async def dies_with_a_bill(exchange: Exchange) -> None:
        exchange.head()
        exchange.event(choices=[], usage=usage(1000, 1000))

    async with new_shop(Sold("bad", dies_with_a_bill), Sold("good")) as shop:
        assert (await buy(shop, ask("bad", "good"))).headers["X-Provider"] == "good"
        assert await charged(shop) == [2 * INPUT + 5 * OUTPUT]


async def _get(shop: Shop, path: str) -> Reply:
    return await shop.send(method="GET", path=f"/v1/models{path}")


async def test_p55_models_list_what_is_sold_by_whom_at_what_price() -> None:
    """P-55: names with slashes round-trip, encoded or not; every provider is there with its own price, cheapest first."""
    async with new_shop(Sold("dear", output=20_000_000), Sold("cheap")) as shop:
        data = (await _get(shop, "")).json["data"]
        (listed,) = [model for model in data if model["id"] == MODEL]
        for path in (f"/{MODEL}", "/" + encoded(MODEL, safe="")):
            assert (await _get(shop, path)).json == listed
        assert [provider["name"] for provider in listed["providers"]] == ["cheap", "dear"]
        assert listed["pricing"]["output_cents_per_million"] == "1000"
        assert listed["providers"][1]["pricing"]["output_cents_per_million"] == "2000"
        assert (await _get(shop, "/no/such")).status == 404
        assert "sk-" not in json.dumps(data)


async def test_health_follows_what_providers_do() -> None:
    """A model is ready until all of its providers are avoided, then loading, and ready again once a probe succeeds."""
    async with new_shop(Sold("only", answers(500))) as shop:

        async def status() -> str:
            word: str = (await _get(shop, f"/{MODEL}/health")).json["status"]
            return word

        assert await status() == "ready"
        for _ in range(5):
            assert (await buy(shop, ask())).status == 502
        assert await status() == "unavailable"
        avoided = await buy(shop, ask())
        assert (avoided.status, avoided.json["error"]["excluded_by"]) == (503, {"health": 1})
        assert shop.asked() == {"only": 5}
        shop.clock.advance(10)
        assert await status() == "loading"
        shop.provider("only").script = serves()
        engine = shop.net.node._engine
        assert engine is not None
        await Prober(engine.market, engine._transport, clock=shop.clock, log=shop.log).run()
        assert [line["provider"] for line in shop.logged("provider.recovered")] == ["only"]
        assert await status() == "ready"
        assert (await buy(shop, ask())).status == 200


async def test_p64_one_caller_finds_out_and_the_others_do_not_wait() -> None:
    """P-64: of many callers after a cool-down one is let through; when its client leaves, the place is free again."""
    async with new_shop(Sold("only", answers(500))) as shop:
        for _ in range(5):
            await buy(shop, ask())
        shop.clock.advance(10)
        shop.provider("only").script = stalls
        async with client(shop, ask()) as leaving:
            await shop.eventually(lambda: shop.asked() == {"only": 6})
            assert (await buy(shop, ask())).status == 503
            await leave(leaving)
        await shop.settled()
        release = asyncio.Event()

        async def slow(exchange: Exchange) -> None:
            await release.wait()
            exchange.whole(5)

        shop.provider("only").script = slow
        first = asyncio.ensure_future(buy(shop, ask(stream=False)))
        await shop.eventually(lambda: shop.asked() == {"only": 7})
        others = await asyncio.gather(*(buy(shop, ask(stream=False)) for _ in range(10)))
        assert {reply.status for reply in others} == {503}
        assert shop.asked() == {"only": 7}
        release.set()
        assert (await first).status == 200
        assert (await buy(shop, ask(stream=False))).status == 200
