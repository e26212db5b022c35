"""Failover through the real application: who is passed over, who is not, what is charged and what is told (rule R10)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from mppnode.cli.devnet import DevnetOptions
from mppnode.config.schema import LimitsConfig, RoutingConfig
from tests.support.http_client import UNIT, Reply, chat
from tests.support.providers import (
    INPUT,
    KEY,
    MODEL,
    OUTPUT,
    Script,
    Shop,
    Sold,
    answers,
    empty,
    error_in_200,
    finishes_in_error,
    garbage,
    hangs_up,
    new_shop,
    serves,
    stalls,
    stalls_after,
)

SHORT = DevnetOptions(tokens_per_second=0.0, limits=LimitsConfig(drain_s=2, first_token_s=1))
"""A node that waits one second for a first token."""


def ask(*order: str, **members: Any) -> dict[str, Any]:
    """A request that tries providers in this order."""
    return chat(MODEL, provider={"order": list(order)}, **{"max_tokens": 20, **members})


async def buy(shop: Shop, body: dict[str, Any]) -> Reply:
    """One request on a new channel, read to its end."""
    return await shop.buy(body, shop.payer.open(shop.payer.channel(), UNIT))


async def charged(shop: Shop) -> list[int]:
    """What each channel owes, in pico, once everything has ended."""
    await shop.settled()
    assert shop.net.node.books is not None
    accounts = await shop.net.node.books.accounts()
    assert not any(account.holds for account in accounts), "no hold outlives its request"
    return [account.owed_pico for account in accounts]


BAD: Sequence[tuple[str, Script | None, str, int | None]] = (
    ("a dead port", None, "connect", None),
    ("hangs up", hangs_up, "closed", None),
    ("408", answers(408), "status", 408),
    ("429", answers(429, Retry_After="9"), "status", 429),
    ("500", answers(500), "status", 500),
    ("503", answers(503), "status", 503),
    ("529", answers(529), "status", 529),
    ("401", answers(401), "status", 401),
    ("402", answers(402), "status", 402),
    ("403", answers(403), "status", 403),
    ("404", answers(404), "status", 404),
    ("redirect", answers(302, Location="http://169.254.169.254/"), "status", 302),
    ("web page", garbage, "closed", None),
    ("error in 200", error_in_200, "error", None),
    ("empty", empty, "error", None),
    ("finish error", finishes_in_error, "error", None),
)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "buffered"])
@pytest.mark.parametrize(("script", "kind", "status"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
async def test_r10_another_provider_serves_and_only_its_work_is_charged(
    script: Script | None, kind: str, status: int | None, *, stream: bool
) -> None:
    """R10, R13: a failure before the first byte is not noticed, and the bill is the served provider's."""
    async with new_shop(Sold("bad", script, output=4_000_000), Sold("good", serves(5))) as shop:
        reply = await buy(shop, ask("bad", "good", stream=stream))
        assert reply.status == 200, reply.body
        assert (reply.headers["X-Provider"], reply.headers["X-Route-Attempts"]) == ("good", "2")
        assert b"secret" not in reply.body
        assert await charged(shop) == [2 * INPUT + 5 * OUTPUT]
        assert shop.asked() == {"bad": int(script is not None), "good": 1}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "buffered"])
@pytest.mark.parametrize(("script", "kind", "status"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
async def test_p53_a_refusal_names_what_was_tried_in_our_words(
    script: Script | None, kind: str, status: int | None, *, stream: bool
) -> None:
    """R12, P-53, P-65: the trail says who failed and how; neither the provider's text, our key nor its 402 is shown."""
    async with new_shop(Sold("bad", script)) as shop:
        reply = await buy(shop, ask("bad", stream=stream))
        error = reply.json["error"]
        assert reply.status == (429 if status == 429 else 502)
        if not stream and script is garbage:
            kind = "protocol"
        assert error["attempts"] == [{"provider": "bad", "kind": kind, "status": status}]
        assert reply.headers["X-Route-Attempts"] == "1"
        # An open on this request is confirmed by a receipt, or its payer would forget the channel; nothing is spent.
        assert reply.receipt is not None
        assert reply.receipt.spent == 0
        told = reply.body.decode() + str(dict(reply.headers)) + json.dumps(shop.log.lines, default=str)
        assert "secret" not in told
        assert KEY not in told
        assert await charged(shop) == [0]


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_r10_a_request_a_provider_refuses_is_not_shopped_around(status: int) -> None:
    """R10: what one provider finds wrong the next would too, unless it takes a longer context."""
    async with new_shop(Sold("strict", answers(status)), Sold("same"), Sold("longer", context=256_000)) as shop:
        assert (await buy(shop, ask("strict", "same"))).headers["X-Provider"] == "longer"
        assert shop.asked() == {"strict": 1, "same": 0, "longer": 1}
        reply = await buy(shop, chat(MODEL, provider={"order": ["strict"], "ignore": ["longer"]}))
        assert reply.status == 502
        assert [each["status"] for each in reply.json["error"]["attempts"]] == [status]
        assert shop.asked() == {"strict": 2, "same": 0, "longer": 1}


@pytest.mark.parametrize("script", [stalls, stalls_after(0)], ids=["without headers", "after the headers"])
async def test_r10_silence_before_the_first_byte_is_passed_over(script: Script) -> None:
    """R10: a provider that takes a request and says nothing is given up for the next, and is hung up on."""
    async with new_shop(Sold("mute", script), Sold("good"), options=SHORT) as shop:
        reply = await buy(shop, ask("mute", "good"))
        assert (reply.status, reply.headers["X-Provider"]) == (200, "good")
        await asyncio.wait_for(shop.provider("mute").exchanges[0].gone.wait(), 5)
        assert await charged(shop) == [2 * INPUT + 5 * OUTPUT]


async def test_r10_a_provider_that_cannot_do_tls_is_passed_over() -> None:
    """R10: a plain server where TLS is expected is one more way not to be there."""

    async with new_shop(Sold("plain", tls=True), Sold("good"), options=SHORT) as shop:
        reply = await buy(shop, ask("plain", "good", timeout_ms=1500))
        assert (reply.status, reply.headers["X-Provider"]) == (200, "good")
        assert shop.asked() == {"plain": 0, "good": 1}


async def test_r10_nobody_takes_over_after_the_first_byte() -> None:
    """R10, P-31: an answer that breaks off ends in an error chunk, is paid for as far as it came, and is not repeated."""
    options = DevnetOptions(tokens_per_second=0.0, limits=LimitsConfig(drain_s=2, idle_s=1))
    async with new_shop(Sold("weak", stalls_after(3)), Sold("good"), options=options) as shop:
        body = ask("weak", "good", stream_options={"include_usage": True})
        credential = await shop.pay(shop.payer.open(shop.payer.channel(), UNIT), body)
        async with shop.stream(body, credential) as stream:
            await stream.rest()
        assert stream.text_chunks == 3
        (failed,) = [chunk for chunk in stream.chunks if chunk.get("error")]
        assert failed["choices"][0]["finish_reason"] == "error"
        assert stream.events[-1].data == "[DONE]"
        assert shop.asked() == {"weak": 1, "good": 0}
        (owed,) = await charged(shop)
        assert owed == 3 * OUTPUT + len("hello there") // 6 * INPUT
        assert stream.usage["completion_tokens"] == 3
        assert stream.final.spent == owed // 1_000_000


async def test_r12_all_throttled_is_429_with_the_smallest_wait() -> None:
    """R12, P-25: 429 from everybody is our 429, with the least of what they ask for; told again without asking them."""
    sold = [Sold(f"p{wait}", answers(429, Retry_After=str(wait))) for wait in (40, 7, 300)]
    async with new_shop(*sold) as shop:
        for _ in range(2):
            reply = await buy(shop, ask("p40", "p7", "p300"))
            assert (reply.status, reply.code) == (429, "providers_busy")
            assert (reply.headers["Retry-After"], reply.headers["retry-after-ms"]) == ("7", "7000")
        assert shop.asked() == {"p40": 1, "p7": 1, "p300": 1}
        shop.clock.advance(8)
        shop.provider("p7").script = serves(2)
        assert (await buy(shop, ask())).headers["X-Provider"] == "p7"


async def test_r12_one_that_is_not_throttled_makes_it_a_502() -> None:
    """R12: 429 and 500 together are a 502 with both in its trail, in the order they were tried."""
    async with new_shop(Sold("busy", answers(429)), Sold("broken", answers(500))) as shop:
        reply = await buy(shop, ask("busy", "broken"))
        assert (reply.status, reply.code) == (502, "all_providers_failed")
        assert reply.json["error"]["attempts"] == [
            {"provider": "busy", "kind": "status", "status": 429},
            {"provider": "broken", "kind": "status", "status": 500},
        ]
        assert reply.headers["X-Route-Attempts"] == "2"


async def test_r10_many_quick_refusals_hide_no_working_provider() -> None:
    """R10: refusals at once do not use up the attempts; with six dead providers before it, the seventh serves."""
    bad = [None, answers(429), answers(500), garbage, error_in_200, empty]
    sold = [Sold(f"bad{index}", script) for index, script in enumerate(bad)]
    async with new_shop(*sold, Sold("good")) as shop:
        reply = await buy(shop, ask(*(each.name for each in sold), "good"))
        assert (reply.status, reply.headers["X-Provider"], reply.headers["X-Route-Attempts"]) == (200, "good", "7")


async def test_r10_only_so_many_providers_are_waited_for() -> None:
    """R10: ``attempts_max`` mute providers are waited for, each for its share of ``timeout_ms``; then it is a 504."""
    sold = [Sold(f"mute{index}", stalls) for index in range(3)]
    async with new_shop(*sold, Sold("good"), routing=RoutingConfig(attempts_max=2)) as shop:
        reply = await buy(shop, ask("mute0", "mute1", "mute2", "good", timeout_ms=400))
        assert (reply.status, reply.code) == (504, "provider_timeout")
        assert shop.asked() == {"mute0": 1, "mute1": 1, "mute2": 0, "good": 0}
        assert await charged(shop) == [0]


async def test_r10_the_deadline_is_over_all_attempts() -> None:
    """R10: three mute providers share one ``timeout_ms``; the working one behind them is reached inside it."""
    async with new_shop(Sold("a", stalls), Sold("b", stalls), Sold("good"), real_time=True) as shop:
        reply = await buy(shop, ask("a", "b", "good", timeout_ms=900))
        assert (reply.status, reply.headers["X-Provider"]) == (200, "good")
        assert shop.asked() == {"a": 1, "b": 1, "good": 1}


async def test_p65_a_refused_key_alarms_the_operator_once_and_takes_the_provider_out() -> None:
    """P-65: 402 from a provider is an alarm with its name and status, and nobody is sent there again."""
    async with new_shop(Sold("poor", answers(402)), Sold("good")) as shop:
        for _ in range(3):
            assert (await buy(shop, ask("poor", "good"))).headers["X-Provider"] == "good"
        assert [(line["provider"], line["status"]) for line in shop.logged("provider.refused_us")] == [("poor", 402)]
        assert shop.asked() == {"poor": 1, "good": 3}


async def test_r10_what_one_adapter_cannot_express_goes_to_the_next() -> None:
    """A field that one provider's API lacks is no reason to refuse while another provider has it."""
    translated = [Sold("anthropic", preset="anthropic"), Sold("gemini", preset="gemini")]
    async with new_shop(*translated, Sold("openai")) as shop:
        reply = await buy(shop, ask("anthropic", "gemini", "openai", logit_bias={"50256": -100}))
        assert (reply.status, reply.headers["X-Provider"], reply.headers["X-Route-Attempts"]) == (200, "openai", "1")
        assert shop.asked() == {"anthropic": 0, "gemini": 0, "openai": 1}
        assert shop.provider("openai").exchanges[0].body["logit_bias"] == {"50256": -100}


async def test_r10_what_nobody_can_be_asked_is_a_400() -> None:
    """When no provider's API has a field, it is refused by its name, and nothing is charged."""
    async with new_shop(Sold("anthropic", preset="anthropic"), Sold("gemini", preset="gemini")) as shop:
        reply = await buy(shop, ask(logit_bias={"50256": -100}))
        assert (reply.status, reply.code, reply.field) == (400, "invalid_field", "logit_bias")
        assert await charged(shop) == [0]
        broken = await buy(shop, ask())
        assert broken.status == 502, "and nothing was held against them: both are tried"
        assert len(broken.json["error"]["attempts"]) == 2


async def test_r10_who_could_be_asked_later_makes_it_a_503() -> None:
    """A field that only a provider which is down could take is not the caller's mistake: it may be asked again."""
    async with new_shop(Sold("anthropic", preset="anthropic"), Sold("openai", answers(500))) as shop:
        for _ in range(5):
            assert (await buy(shop, ask("openai", logit_bias={"50256": -100}))).status == 502
        reply = await buy(shop, ask(logit_bias={"50256": -100}))
        assert (reply.status, reply.code, reply.headers["Retry-After"]) == (503, "no_provider", "1")
        assert shop.asked() == {"anthropic": 0, "openai": 5}


async def test_p53_a_provider_sees_nothing_of_the_caller_but_the_request() -> None:
    """P-48, P-53: our key goes out; the caller's credential, cookies and organization and the node's fields do not."""
    async with new_shop(Sold("good")) as shop:
        body = ask("good", timeout_ms=20_000, routing_strategy="cheapest", seed=7)
        credential = await shop.pay(shop.payer.open(shop.payer.channel(), UNIT), body)
        extra = {"Cookie": "a=b", "OpenAI-Organization": "org", "X-Forwarded-For": "1.2.3.4", "X-Api-Key": "mine"}
        assert (await shop.send(body, credential, headers=extra)).status == 200
        (exchange,) = shop.provider("good").exchanges
        assert exchange.headers["authorization"] == f"Bearer {KEY}"
        assert not {"cookie", "openai-organization", "x-forwarded-for", "x-api-key"} & set(exchange.headers)
        assert not {"provider", "timeout_ms", "routing_strategy"} & set(exchange.body)
        assert (exchange.body["model"], exchange.body["seed"]) == ("theirs", 7)
