"""What a provider may do to us at most: take its time, drip, set headers, charge; and what the caller sees of it."""

from __future__ import annotations

import asyncio
import json

import pytest

from mppnode.cli.devnet import DevnetOptions
from mppnode.config.schema import LimitsConfig, PricingConfig
from mppnode.kernel.listing import ProviderKind
from tests.routing.test_failover import ask, buy, charged
from tests.routing.test_prices import PriceList, due, prices
from tests.support.http_client import UNIT
from tests.support.providers import INPUT, OUTPUT, Exchange, Sold, new_shop, serves

__all__ = ["prices"]


async def test_r15_p34_the_timeout_is_for_the_first_output_and_not_for_the_stream() -> None:
    """R15, P-34: three times as long as ``timeout_ms`` in all, never silent for as long: nothing is cut off."""

    async def slowly(exchange: Exchange) -> None:
        exchange.head()
        for number in range(1, 7):
            exchange.words(number, number)
            await asyncio.sleep(0.1)
        exchange.close(6)

    async with new_shop(Sold("slow", slowly)) as shop:
        reply = await buy(shop, ask("slow", timeout_ms=200))
        assert reply.status == 200
        assert reply.body.count(b'"w') == 6
        assert b'"finish_reason":"error"' not in reply.body
        assert await charged(shop) == [2 * INPUT + 6 * OUTPUT]


async def test_u6_a_drip_without_end_is_ended() -> None:
    """U6: never silent, never finished: the stream's own limit ends it with an error, billed for what came."""

    async def forever(exchange: Exchange) -> None:
        exchange.head()
        number = 0
        while not exchange.gone.is_set():
            number += 1
            exchange.words(number, number)
            await asyncio.sleep(0.05)

    options = DevnetOptions(tokens_per_second=0.0, limits=LimitsConfig(drain_s=2, total_s=1))
    async with new_shop(Sold("drip", forever), options=options) as shop:
        reply = await buy(shop, ask("drip", max_tokens=5_000))
        came = reply.body.count(b'"w')
        assert came > 0
        assert b'"code":"upstream_failed"' in reply.body
        assert await charged(shop) == [INPUT + came * OUTPUT]
        await asyncio.wait_for(shop.provider("drip").exchanges[0].gone.wait(), 5)


@pytest.mark.parametrize("stream", [True, False])
async def test_u8_no_header_of_a_provider_reaches_the_caller(stream: bool) -> None:
    """U8, P-53: cookies, tenants and servers stay between the provider and us; the node's own headers are all there is."""

    async def talkative(exchange: Exchange) -> None:
        noise = {"Set_Cookie": "session=theirs", "X_Tenant": "theirs", "Openai_Organization": "theirs", "Server": "theirs"}
        if exchange.streamed:
            exchange.head(**noise)
            exchange.words(1, 3)
            exchange.close(3)
        else:
            exchange.head(kind="application/json", **noise)
            message = {"role": "assistant", "content": "w1 w2 w3"}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            exchange.send(json.dumps({"id": "x", "object": "chat.completion", "choices": choices}))

    async with new_shop(Sold("noisy", talkative)) as shop:
        reply = await buy(shop, ask("noisy", stream=stream))
        assert reply.status == 200
        assert "theirs" not in {value for name, value in reply.headers.items() if name != "X-Model"}
        assert not {"Set-Cookie", "X-Tenant", "Openai-Organization"} & set(reply.headers)


async def test_r11_an_external_provider_may_charge_us_what_we_sell_for_less_our_share(prices: PriceList) -> None:
    """R2, R11: the caller pays the markup, the provider is told to take no more than the rest."""
    prices.write(or_=(100, 400))
    sold = Sold("or_", serves(5), kind=ProviderKind.EXTERNAL, preset="openrouter", listed=True)
    pricing = PricingConfig(catalog=prices.path, markup_bps=1_000, stale_s=10**9)
    async with new_shop(sold, pricing=pricing) as shop:
        reply = await buy(shop, ask("or_"))
        assert reply.status == 200, reply.body
        assert (reply.headers["X-Price-Input-Cents-Per-M"], reply.headers["X-Price-Output-Cents-Per-M"]) == ("110", "440")
        (exchange,) = shop.provider("or_").exchanges
        assert exchange.body["provider"]["max_price"] == {"prompt": 1, "completion": 4}
        assert await charged(shop) == [due((110, 440))]


@pytest.mark.parametrize(("preset", "runs_on"), [("openai", False), ("groq", True)])
async def test_u9_the_log_says_whose_provider_may_run_on(preset: str, runs_on: bool) -> None:
    """U9: a caller who leaves a provider that cannot be stopped costs us something the bill does not show."""

    async def waits(exchange: Exchange) -> None:
        exchange.head()
        exchange.words(1, 3)
        await exchange.gone.wait()

    async with new_shop(Sold("p", waits, preset=preset)) as shop:
        body = ask("p")
        credential = await shop.pay(shop.payer.open(shop.payer.channel(), UNIT), body)
        async with shop.stream(body, credential) as stream:
            await stream.tokens(3)
            stream.response.close()
        await shop.settled()
        (line,) = shop.logged("request.ended")
        assert (line["ending"], line["runs_on"]) == ("disconnected", runs_on)


async def test_p43_without_a_limit_the_answer_takes_the_room_there_is() -> None:
    """P-43: a small context refuses nobody who set no limit; who set one that cannot fit is told so."""
    async with new_shop(Sold("small", context=2_048)) as shop:
        body = ask("small")
        del body["max_tokens"]
        assert (await buy(shop, body)).status == 200
        (exchange,) = shop.provider("small").exchanges
        assert 1_900 < exchange.body["max_tokens"] < 2_048
        refused = await shop.send(ask("small", max_tokens=2_048))
        assert (refused.status, refused.field) == (400, "messages")
