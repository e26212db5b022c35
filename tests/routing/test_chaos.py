"""Five hundred paid streams at once over providers that each fail in another way (market rule R10, reliability P-63)."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from channels.model import Folded
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.schema import LimitsConfig
from tests.support.http_client import UNIT, Channel, Payer, chat
from tests.support.providers import (
    MODEL,
    Shop,
    Sold,
    answers,
    drips,
    garbage,
    lies,
    new_shop,
    serves,
    stalls,
    stalls_after,
)

STREAMS = int(os.environ.get("CHAOS_STREAMS", "500"))
WORDS, BROKEN = 12, 4
PROMPT = "one two three four five six"
ESTIMATE = len(PROMPT) // 6
"""Prompt tokens as they are charged where there is no report to believe."""
IN = {"dead": 500, "mute": 501, "busy": 502, "page": 503, "liar": 504, "drip": 505, "good": 506, "well": 507, "breaks": 508}
OUT = {name: 20 * price for name, price in IN.items()}
"""Every provider has its own price, so that a bill says who was paid; the bad are the cheapest, so all are tried."""
WISHES: tuple[dict[str, Any], ...] = (
    {},
    {"routing_strategy": "cheapest"},
    {"routing_strategy": "fastest"},
    {"provider": {"sort": "price"}},
    {"provider": {"order": ["page", "busy", "dead"]}},
    {"provider": {"order": ["mute", "liar"]}},
    {"provider": {"order": ["drip"]}},
    {"provider": {"order": ["breaks"]}},
)


@dataclass
class Served:
    """What one payer got."""

    channel: Channel
    provider: str
    words: int
    broken: bool
    usage: dict[str, Any]
    spent: int
    quoted: tuple[int, int]


def word_counter(path: Path) -> Path:
    """A tokenizer's file whose tokens are words."""
    path.write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "post_processor": None,
                "decoder": None,
                "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
            }
        )
    )
    return path


def sellers(tokenizer: Path) -> list[Sold]:
    """One of each kind, and two that work. Only its own tokenizer can tell that the liar lies by so little."""
    scripts = {
        "dead": None,
        "mute": stalls,
        "breaks": stalls_after(BROKEN),
        "busy": answers(429, Retry_After="1"),
        "page": garbage,
        "liar": lies(WORDS, 3),
        "drip": drips(WORDS),
        "good": serves(WORDS),
        "well": serves(WORDS),
    }
    return [
        Sold(
            name,
            script,
            input=IN[name] * 1000,
            output=OUT[name] * 1000,
            more={"tokenizer": tokenizer} if name == "liar" else {},
        )
        for name, script in scripts.items()
    ]


async def one(shop: Shop, payer: Payer, number: int) -> Served:
    """Open a channel and buy one stream with it."""
    body = chat(MODEL, PROMPT, max_tokens=40, stream_options={"include_usage": True}, **WISHES[number % len(WISHES)])
    refused = await shop.send(body)
    assert refused.status == 402, refused.body
    quoted = [refused.headers[f"X-Price-{axis}-Cents-Per-M"] for axis in ("Input", "Output")]
    channel = payer.channel()
    credential = payer.credential(refused.challenge(), payer.open(channel, UNIT))
    async with shop.stream(body, credential) as stream:
        await stream.rest()
    assert stream.events[-1].data == "[DONE]"
    return Served(
        channel=channel,
        provider=stream.response.headers["X-Provider"],
        words=stream.text_chunks,
        broken=any(chunk.get("error") for chunk in stream.chunks),
        usage=stream.usage,
        spent=stream.final.spent,
        quoted=(pico(quoted[0]), pico(quoted[1])),
    )


def pico(cents: str) -> int:
    """Cents per million tokens as pico-dollars per token."""
    whole, _, rest = cents.partition(".")
    return int(whole + rest.ljust(4, "0"))


async def check(shop: Shop, served: Served) -> None:
    """The bill of one stream: what was delivered, at the price of who delivered it, the same wherever it is told."""
    name = served.provider
    assert served.broken == (name == "breaks"), f"{name} could have been replaced"
    assert served.words == (BROKEN if served.broken else WORDS)
    prompt = ESTIMATE if name in ("breaks", "liar") else len(PROMPT.split())
    assert (served.usage["prompt_tokens"], served.usage["completion_tokens"]) == (prompt, served.words)
    due = (prompt * IN[name] + served.words * OUT[name]) * 1000
    account = await shop.account(served.channel)
    assert account.owed_pico == due, name
    assert not account.holds
    assert served.spent == account.spent == due // 1_000_000
    assert served.usage["cost_base_units"] == f"{due / 1_000_000:.6f}".rstrip("0").rstrip(".")
    assert due <= prompt * served.quoted[0] + served.words * served.quoted[1]
    assert shop.net.node.books is not None
    journal = await shop.net.node.books.journal(served.channel.id)
    folded = [event for event in journal if isinstance(event, Folded)]
    assert max(event.consumed for event in folded) == due


async def test_p63_nobody_notices_a_failure_that_another_could_serve(tmp_path: Path) -> None:
    """Chaos: every stream but those that broke off is whole, and every bill is what was delivered at the served price."""
    options = DevnetOptions(tokens_per_second=0.0, limits=LimitsConfig(drain_s=5, first_token_s=4, idle_s=4))
    sold = sellers(word_counter(tmp_path / "tokenizer.json"))
    async with new_shop(*sold, options=options, real_time=True) as shop:
        payer = shop.payer
        served = await asyncio.gather(*(one(shop, payer, number) for number in range(STREAMS)))
        await shop.settled()
        for each in served:
            await check(shop, each)
        by = Counter(each.provider for each in served)
        print(dict(by), shop.asked())
        assert not set(by) & {"dead", "mute", "busy", "page"}
        assert {"liar", "drip", "breaks"} < set(by), "every kind that begins has served"
        assert by["good"] + by["well"]
        charged = Counter(line["channel"] for line in shop.logged("request.ended"))
        assert set(charged.values()) == {1}, "nobody was billed twice"
        assert len(charged) == STREAMS
        assert all(shop.asked()[name] for name in ("mute", "busy", "page")), "and every other has been asked in vain"
