"""What a node logs of requests and money: one line each, with the request that caused it."""

from __future__ import annotations

import io
import json
from typing import Any

from mppnode.observe.log_sampling import PER_SECOND
from mppnode.observe.logs import Level, make_log
from tests.support.customers import new_customer
from tests.support.http_client import UNIT, World, chat


def of(world: World, event: str) -> list[dict[str, Any]]:
    """The lines of one event."""
    return [line for line in world.log.lines if line["event"] == event]


async def test_the_life_of_a_channel_is_a_line_each(world: World) -> None:
    """Opened, added to, signed for, closed: each once, with amounts as the books have them."""
    channel, body = await world.opened(), chat("dev/story", max_tokens=20)
    (opened,) = of(world, "channel.opened")
    name = "0x" + channel.id.hex()
    assert (opened["channel"], opened["accepted"]) == (name, UNIT)
    reply = await world.buy(body, world.payer.voucher(channel, 60 * UNIT))
    assert reply.status == 200
    await world.settled()
    (accepted,) = of(world, "voucher.accepted")
    assert (accepted["level"], accepted["channel"]) == (Level.DEBUG, name)
    assert (accepted["accepted"], accepted["delta"]) == (60 * UNIT, 59 * UNIT)
    (ended,) = of(world, "request.ended")
    account = await world.account(channel)
    assert (ended["channel"], ended["charged_pico"]) == (name, account.owed_pico)
    reply = await world.manage(world.payer.close(channel, account.spent))
    assert reply.status in (200, 204), reply.body
    (closing,), (closed,) = of(world, "channel.closing"), of(world, "channel.closed")
    assert closing["channel"] == closed["channel"] == name
    assert closed["captured"] == account.capturable
    (intent,) = of(world, "intent.ended")
    assert (intent["kind"], intent["state"], intent["amount"], intent["tx"]) == ("close", "final", closed["captured"], closed["tx"])


async def test_refusals_are_told_with_reason_route_and_rail(world: World) -> None:
    """Who was refused for what; the first answer of every payment is only for those who look closely."""
    await world.send(chat())
    await world.send(chat(), "Bearer sk-mpp-wrong")
    await world.send(path="/v1/made-up/path-of-a-stranger", method="GET")
    lines = of(world, "request.refused")
    assert [(line["reason"], line["route"], line["rail"], line["status"], line["level"]) for line in lines] == [
        ("payment_required", "/v1/chat/completions", None, 402, Level.DEBUG),
        ("invalid_api_key", "/v1/chat/completions", "credit", 401, Level.INFO),
        ("not_found", "none", None, 404, Level.INFO),
    ]


async def test_a_storm_of_refusals_is_counted(world: World) -> None:
    """A flood writes a few lines, and the number of the others."""
    for _ in range(PER_SECOND + 7):
        await world.send(chat(), "Bearer sk-mpp-wrong")
    assert len(of(world, "request.refused")) == PER_SECOND
    world.clock.advance(2)
    await world.send(chat(), "Bearer sk-mpp-wrong")
    (suppressed,) = of(world, "log.suppressed")
    assert suppressed["counts"] == {"invalid_api_key /v1/chat/completions": 7}


async def test_credit_that_moves_is_told_with_its_reference(world: World) -> None:
    """A gift is one line, with the amount in the books; a repeat is none."""
    customer = await new_customer(world)
    lines = of(world, "credit.moved")
    account = await world.net.node.customers.books.load(customer.account)
    assert account is not None
    assert sum(line["amount_pico"] for line in lines) == account.balance
    assert {(line["account"], line["kind"]) for line in lines} == {(customer.account, "grant")}
    assert all(line["reference"] for line in lines)


async def test_lines_name_the_request_that_caused_them(world: World) -> None:
    """A line deep in the books carries the id its caller got."""
    stream = io.StringIO()
    world.net.node.books._log = make_log(clock=world.clock, level=Level.INFO, as_json=True, stream=stream)
    channel = world.payer.channel()
    reply = await world.manage(world.payer.open(channel, UNIT))
    (line,) = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (line["event"], line["request"]) == ("channel.opened", reply.headers["X-Request-Id"])
