"""No price above what was promised, over HTTP: ceilings, signed quotes, and prices that change meanwhile (P-63, P-11)."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from channels.instants import UnixMillis, to_rfc3339
from mppnode.config.schema import PricingConfig
from tests.routing.test_failover import ask, buy, charged
from tests.support.http_client import UNIT, chat
from tests.support.providers import MODEL, Exchange, Script, Shop, Sold, answers, new_shop, serves

Price = tuple[int, int]
"""Cents per million tokens, in and out."""
DAY_S = 24 * 3600


class PriceList:
    """A catalog file that changes under a running node."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prices: dict[str, Price] = {}
        self._written = 0

    def write(self, *, at: int = 1_900_000_000, **prices: Price) -> None:
        """Replace the file; providers that are not named keep their price."""
        self.prices |= prices
        listings = [
            {
                "provider": name,
                "model": MODEL,
                "upstream_model": "theirs",
                "cost": {
                    "input_usd_per_million": f"{paid_in // 100}.{paid_in % 100:02d}",
                    "output_usd_per_million": f"{paid_out // 100}.{paid_out % 100:02d}",
                },
                "context": 128_000,
                "max_output": 8_192,
                "source": "https://prices.example/list",
                "time": to_rfc3339(UnixMillis(at * 1000)),
            }
            for name, (paid_in, paid_out) in self.prices.items()
        ]
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps({"version": 1, "listings": listings}))
        fresh.replace(self.path)

    async def change(self, shop: Shop, **prices: Price) -> None:
        """Replace the file, and have the node take it up."""
        self.write(at=shop.clock.now(), **prices)
        assert shop.net.node.sales is not None
        assert await shop.net.node.sales.shelf.refresh()


@pytest.fixture
def prices(tmp_path: Path) -> PriceList:
    return PriceList(tmp_path / "prices.json")


def listed(name: str, script: Script | None = None) -> Sold:
    """A provider that sells at the file's price."""
    return Sold(name, script or serves(5), listed=True)


def due(price: Price, *, prompt: int = 2, words: int = 5) -> int:
    """What an answer costs at a price, in pico."""
    return (prompt * price[0] + words * price[1]) * 10_000


async def test_p63_an_old_quote_buys_nothing_that_became_dearer(prices: PriceList) -> None:
    """P-63, R13: the price rose: a fresh challenge says so before the channel is opened, and that one is served."""
    prices.write(a=(50, 1000))
    async with new_shop(listed("a"), catalog=prices.path) as shop:
        channel, body = shop.payer.channel(), ask()
        old = await shop.challenge(body)
        await prices.change(shop, a=(50, 1001))
        before = shop.broadcasts()
        refused = await shop.send(body, shop.payer.credential(old, shop.payer.open(channel, UNIT)))
        assert (refused.status, refused.code) == (402, "invalid_challenge")
        assert refused.headers["X-Price-Output-Cents-Per-M"] == "1001"
        assert shop.broadcasts() == before, "nobody's channel is opened for a request that is not served"
        assert shop.asked() == {"a": 0}
        again = await shop.send(body, shop.payer.credential(refused.challenge(), shop.payer.open(channel, UNIT)))
        assert again.status == 200
        assert await charged(shop) == [due((50, 1001))]


async def test_p63_an_old_quote_is_served_below_it(prices: PriceList) -> None:
    """P-63: the price fell: the old challenge is good, and the lower price is charged."""
    prices.write(a=(50, 1000))
    async with new_shop(listed("a"), catalog=prices.path) as shop:
        body = ask()
        credential = await shop.pay(shop.payer.open(shop.payer.channel(), UNIT), body)
        await prices.change(shop, a=(40, 900))
        assert (await shop.send(body, credential)).headers["X-Price-Output-Cents-Per-M"] == "900"
        assert await charged(shop) == [due((40, 900))]


async def test_p63_who_still_sells_at_the_quote_serves_it(prices: PriceList) -> None:
    """P-63: of two quoted providers the one that became dearer on one axis alone is not asked any more."""
    prices.write(a=(50, 1000), b=(50, 1000))
    async with new_shop(listed("a"), listed("b"), catalog=prices.path) as shop:
        body = ask("a")
        credential = await shop.pay(shop.payer.open(shop.payer.channel(), UNIT), body)
        await prices.change(shop, a=(51, 10))
        assert (await shop.send(body, credential)).headers["X-Provider"] == "b"
        assert await charged(shop) == [due((50, 1000))]


async def test_r13_a_running_request_keeps_its_price(prices: PriceList) -> None:
    """R13, P-63: a price sync in the middle of a stream changes nothing for that stream."""
    released = asyncio.Event()

    async def slowly(exchange: Exchange) -> None:
        exchange.head()
        exchange.words(1, 2)
        await released.wait()
        exchange.words(3, 5)
        exchange.close(5)

    prices.write(a=(50, 1000))
    async with new_shop(listed("a", slowly), catalog=prices.path) as shop:
        body = ask()
        credential = await shop.pay(shop.payer.open(shop.payer.channel(), UNIT), body)
        async with shop.stream(body, credential) as stream:
            await stream.tokens(2)
            await prices.change(shop, a=(5000, 100_000))
            released.set()
            await stream.rest()
        assert stream.usage["cost_base_units"] == "51"
        assert await charged(shop) == [due((50, 1000))]


async def test_p63_no_axis_is_ever_above_a_ceiling(prices: PriceList) -> None:
    """P-63: over random prices, ceilings, failures and changes between quote and payment, no bill exceeds a promise."""
    dice = random.Random(63)
    sold = [listed(name) for name in "abcd"]
    served = refused = 0

    def anew() -> dict[str, Price]:
        return {name: (dice.randint(1, 100), dice.randint(100, 1500)) for name in "abcd"}

    prices.write(**anew())
    async with new_shop(*sold, catalog=prices.path) as shop:
        for _ in range(60):
            ceiling = (dice.randint(1, 100), dice.randint(100, 1500))
            limits = {f"max_{axis}_price_per_million": most for axis, most in zip(("input", "output"), ceiling, strict=True)}
            body = chat(MODEL, max_tokens=20, **limits)
            asked = await shop.send(body)
            if asked.status != 402:
                assert asked.status == 503, asked.body
                assert not [p for p in prices.prices.values() if p[0] <= ceiling[0] and p[1] <= ceiling[1]]
                refused += 1
                await prices.change(shop, **anew())
                continue
            for provider in shop.net.providers.values():
                provider.script = answers(500) if dice.random() < 0.2 else serves(5)
            if dice.random() < 0.5:
                await prices.change(shop, **anew())
            channel = shop.payer.channel()
            reply = await shop.send(body, shop.payer.credential(asked.challenge(), shop.payer.open(channel, UNIT)))
            if reply.status == 200:
                price = prices.prices[reply.headers["X-Provider"]]
                owed = (await shop.account(channel)).owed_pico
                quoted = tuple(float(asked.headers[f"X-Price-{axis}-Cents-Per-M"]) for axis in ("Input", "Output"))
                assert owed == due(price)
                assert all(paid <= most for paid, most in zip(price, ceiling, strict=True))
                assert all(paid <= most for paid, most in zip(price, quoted, strict=True))
                served += 1
            else:
                assert reply.status in {402, 502, 503}, reply.body
                refused += 1
            shop.clock.advance(400)  # past every cool-down
    assert served > 20
    assert refused > 5


@pytest.mark.parametrize("age_s", [8 * DAY_S, -2 * DAY_S], ids=["stale", "from the future"])
async def test_p11_a_stale_price_is_a_503_and_never_a_challenge(prices: PriceList, age_s: int) -> None:
    """P-11: nobody is asked to pay a price that is not known to hold; it is not in the list of models either."""
    prices.write(at=1_900_000_000 - age_s, a=(50, 1000))
    async with new_shop(listed("a"), catalog=prices.path) as shop:
        for path in ("/v1/chat/completions", "/v1/quote"):
            reply = await shop.send(ask(), path=path)
            assert (reply.status, reply.code) == (503, "no_provider")
            assert reply.json["error"]["excluded_by"] == {"price_stale": 1}
            assert not reply.challenges
        models = (await shop.send(method="GET", path="/v1/models")).json["data"]
        assert MODEL not in {model["id"] for model in models}
        assert (await shop.send(method="GET", path=f"/v1/models/{MODEL}")).status == 404


async def test_p11_a_price_that_goes_stale_after_the_quote_is_not_charged(prices: PriceList) -> None:
    """P-11: a challenge outlives its price by no moment: paid after the price went stale it buys nothing."""
    prices.write(a=(50, 1000))
    pricing = PricingConfig(catalog=prices.path, stale_s=60)
    async with new_shop(listed("a"), pricing=pricing) as shop:
        body = ask()
        credential = await shop.pay(shop.payer.open(shop.payer.channel(), UNIT), body)
        shop.clock.advance(61)
        before = shop.broadcasts()
        assert (await shop.send(body, credential)).status == 503
        assert shop.broadcasts() == before


async def test_p42_a_model_without_a_price_is_not_sold(prices: PriceList) -> None:
    """P-11, P-42: a provider's model that the price list does not know is refused, and the operator is told at start."""
    prices.write(b=(50, 1000))
    async with new_shop(listed("a"), catalog=prices.path) as shop:
        refused = await shop.send(ask())
        assert (refused.status, refused.json["error"]["excluded_by"]) == (503, {"price_unknown": 1})
        assert [(line["provider"], line["model"]) for line in shop.logged("model.unpriced")] == [("a", MODEL)]


CEILINGS: tuple[tuple[dict[str, Any], Price], ...] = (
    ({"max_input_price_per_million": 49, "max_output_price_per_million": 2000}, (50, 1000)),
    ({"max_input_price_per_million": 60, "max_output_price_per_million": 999}, (50, 1000)),
    ({"max_input_price_per_million": 0, "max_output_price_per_million": 0}, (50, 1000)),
    ({"provider": {"max_price": {"prompt": "0.49", "completion": "10"}}}, (50, 1000)),
)


@pytest.mark.parametrize(("limits", "lowest"), CEILINGS)
async def test_r12_a_ceiling_below_everybody_says_the_lowest_price(limits: dict[str, Any], lowest: Price) -> None:
    """R4, R12: 503 with how many the ceiling kept out and the price that would do, on the request and on the quote."""
    dear = Sold("dear", input=900_000, output=20_000_000)
    async with new_shop(Sold("a"), dear) as shop:
        for path in ("/v1/chat/completions", "/v1/quote"):
            reply = await shop.send(chat(MODEL, **limits), path=path)
            error = reply.json["error"]
            assert (reply.status, error["code"], error["type"]) == (503, "no_provider", "server_error")
            assert error["excluded_by"] == {"max_price": 2}
            shown = {f"{axis}_cents_per_million": str(cents) for axis, cents in zip(("input", "output"), lowest, strict=True)}
            assert error["lowest_price"] == shown
        assert shop.asked() == {"a": 0, "dear": 0}


async def test_r4_a_ceiling_that_is_met_exactly_is_met() -> None:
    """R4: ceilings are inclusive; who is above is not asked even when everybody below fails."""
    async with new_shop(Sold("a", answers(500)), Sold("dear", output=10_010_000)) as shop:
        reply = await buy(shop, ask(max_input_price_per_million=50, max_output_price_per_million=1000))
        assert reply.status == 502
        assert shop.asked() == {"a": 1, "dear": 0}


BAD_INPUT: tuple[tuple[dict[str, Any], int, str | None], ...] = (
    ({"max_input_price_per_million": 5}, 400, "max_output_price_per_million"),
    ({"max_output_price_per_million": 5}, 400, "max_input_price_per_million"),
    ({"max_input_price_per_million": 5.5, "max_output_price_per_million": 5}, 400, "max_input_price_per_million"),
    ({"max_input_price_per_million": 5, "max_output_price_per_million": -1}, 400, "max_output_price_per_million"),
    ({"max_input_price_per_million": True, "max_output_price_per_million": 5}, 400, "max_input_price_per_million"),
    ({"max_input_price_per_million": "5", "max_output_price_per_million": 5}, 400, "max_input_price_per_million"),
    ({"routing_strategy": "best"}, 400, "routing_strategy"),
    ({"routing_strategy": 1}, 400, "routing_strategy"),
    ({"allow_external": "yes"}, 400, "allow_external"),
    ({"models": []}, 400, "models"),
    ({"timeout_ms": 30_001}, 400, "timeout_ms"),
    ({"timeout_ms": 0}, 400, "timeout_ms"),
    ({"provider": {"sort": "luck"}}, 400, "provider.sort"),
    ({"provider": {"zdr": True}}, 400, "provider.zdr"),
    ({"model": "maker/modle"}, 404, "model"),
    ({"models": [MODEL, "maker/other"]}, 404, "model"),
)


async def test_bad_routing_input_is_named_and_costs_nothing() -> None:
    """Every mistake in a routing field is refused by its name, on the request and on the quote alike."""
    async with new_shop(Sold("a")) as shop:
        for members, status, field in BAD_INPUT:
            for path in ("/v1/chat/completions", "/v1/quote"):
                reply = await shop.send(chat(**{"model": MODEL, **members}), path=path)
                assert (reply.status, reply.field) == (status, field), (members, reply.body)
                assert reply.headers["x-should-retry"] == "false"
                assert not reply.challenges
        near = await shop.send(chat("maker/modle"))
        assert f"did you mean {MODEL}?" in near.json["error"]["message"]
        assert shop.asked() == {"a": 0}
