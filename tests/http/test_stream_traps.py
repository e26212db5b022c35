"""Traps of paid streams: T-48, T-49 and T-51 to T-63, and what every faulty provider costs the payer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from channels.descriptor import Escrow, SessionProtocol
from channels.ids import to_hex
from channels.model import Phase
from channels.units import Units
from channels.wire import request as requests
from channels.wire.sse import NEED_VOUCHER_EVENT, RECEIPT_EVENT
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.schema import LimitsConfig, SessionConfig
from mppnode.engine.stream import StreamLimits
from tests.http.test_open_traps import BOTH
from tests.support.http_client import DEPOSIT, PATH, UNIT, V1, V2, Channel, Stream, World, bent, chat, cost, new_world

PROTOCOLS = (SessionProtocol.V2, SessionProtocol.V1)
LONG: Any = functools.partial(chat, "dev/story", max_tokens=400)
COVERED = 99
"""Tokens the first voucher pays for: 1,000 units, less 6 units held for a prompt of 11 bytes."""


@contextlib.asynccontextmanager
async def impatient(wait_s: float = 0.15, stall_s: float = 15) -> AsyncIterator[World]:
    """A world whose node waits only a moment for others."""
    session = SessionConfig(PROTOCOLS, Units(1_000), Units(100_000), voucher_wait_s=wait_s, chain_ttl_s=0)  # type: ignore[arg-type]
    limits = LimitsConfig(drain_s=2, stall_s=stall_s)  # type: ignore[arg-type]
    async with new_world(DevnetOptions(tokens_per_second=0.0, session=session, limits=limits)) as world:
        yield world
        assert world.log.bugs == []


async def quiet(stream: Stream) -> None:
    """Read what is there until nothing more comes: the stream waits."""
    with contextlib.suppress(TimeoutError):
        while await asyncio.wait_for(stream.next(), 0.05) is not None:
            pass
        pytest.fail("the stream ended")


async def owed(world: World, channel: Channel) -> int:
    await world.settled()
    account = await world.account(channel)
    assert not account.holds, "every hold has been released"
    return account.owed_pico


# ------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("model", ["dev/injects", "dev/injects-cr"])
async def test_t51_model_output_cannot_forge_a_payment_event(world: World, model: str) -> None:
    """T-51, U1, U2: line breaks in text stay text, and events the provider writes itself never leave the node."""
    channel, body = world.payer.channel(), chat(model)
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.rest()
    assert [e.event for e in stream.events if e.event != "message"] == [RECEIPT_EVENT]
    assert stream.final.spent == (await world.account(channel)).spent
    (forged,) = [e for e in stream.events if "forged" in e.data]
    assert forged.event == "message", "its JSON passes as data, its event name stays behind"
    (text,) = stream.texts
    assert "\r\n\r\nevent: payment-receipt" in text
    assert b"\r" not in stream.raw


async def test_t52_t60_control_events_have_the_members_clients_read(world: World) -> None:
    """T-52, T-60: four strings in a need, the client's own channel id, one receipt in the headers and one at the end."""
    channel, body = world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.until(NEED_VOUCHER_EVENT)
        (need,) = stream.needs
        numbers = ("requiredCumulative", "acceptedCumulative", "deposit")
        assert all(isinstance(need[name], str) and need[name].isdecimal() for name in numbers)
        assert need["channelId"] == to_hex(channel.id)
        assert int(need["acceptedCumulative"]) == UNIT
        assert int(need["deposit"]) == DEPOSIT
        assert UNIT < int(need["requiredCumulative"]) <= DEPOSIT
        reply = await world.manage(world.payer.voucher(channel, int(need["requiredCumulative"])))
        assert reply.status == 204
        while True:
            event = await stream.next()
            if event is None:
                break
            if event.event == NEED_VOUCHER_EVENT:
                more = json.loads(event.data)["requiredCumulative"]
                assert (await world.manage(world.payer.voucher(channel, int(more)))).status == 204
    assert stream.receipt.spent == 0
    assert stream.response.headers["Content-Type"].startswith("text/event-stream")
    assert stream.text_chunks == 400
    assert stream.final.spent == (await world.account(channel)).spent
    assert stream.events[-1].data == "[DONE]"
    assert stream.events[-2].event == RECEIPT_EVENT


async def test_t53_t54_a_voucher_buys_exactly_its_tokens(world: World) -> None:
    """T-53, T-54: a starved stream waits; the voucher's POST is answered meanwhile and buys what it pays, no more."""
    channel, body = world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.tokens(COVERED)
        await quiet(stream)
        assert stream.text_chunks == COVERED
        account = await world.account(channel)
        assert account.owed_pico + account.held_pico <= UNIT * 1_000_000
        assert account.owed_pico + account.held_pico >= cost(COVERED, 1), "no token is out of a durable hold"
        assert (await world.manage(world.payer.voucher(channel, UNIT + 500))).status == 204
        await stream.tokens(COVERED + 50)
        await quiet(stream)
        assert stream.text_chunks == COVERED + 50
        assert (await world.manage(world.payer.voucher(channel, 5 * UNIT))).status == 204
        await stream.rest()
    assert stream.text_chunks == 400
    assert await owed(world, channel) == cost(400, 2)


async def test_t54_a_need_is_asked_for_once_per_voucher(world: World) -> None:
    """T-54: one event per accepted voucher, however long the wait."""
    channel, body = world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.tokens(COVERED)
        await quiet(stream)
        assert len(stream.needs) == 1
        await world.manage(world.payer.voucher(channel, UNIT + 100))
        await stream.tokens(COVERED + 10)
        await quiet(stream)
        assert [int(need["acceptedCumulative"]) for need in stream.needs] == [UNIT, UNIT + 100]


@BOTH
async def test_t55_a_client_that_leaves_while_waiting_frees_everything(world: World, escrow: Escrow) -> None:
    """T-55: gone while a voucher is awaited: the provider is cancelled, the hold released, the delivered tokens paid."""
    channel, body = world.payer.channel(escrow), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.tokens(COVERED)
        await quiet(stream)
        stream.response.close()
    await world.eventually(lambda: world.net.provider.live == 0, seconds=1.0)
    assert await owed(world, channel) == cost(COVERED, 1)
    assert world.log.endings() == ["disconnected"]


async def test_r15_a_disconnect_mid_stream_cancels_the_provider(world: World) -> None:
    """R15, P28: five tokens were read, five are charged, and the provider stops."""
    gate, channel, body = world.gate(), world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await gate.release(5)
        await stream.tokens(5)
        stream.response.close()
    await world.eventually(lambda: world.net.provider.cancelled == 1)
    assert await owed(world, channel) == cost(5, 1)


@BOTH
async def test_t56_no_voucher_ends_the_stream_with_a_receipt(escrow: Escrow) -> None:
    """T-56: after the wait the stream ends, says why, gives its receipt, and the channel is usable again."""
    async with impatient() as world:
        channel, body = world.payer.channel(escrow), LONG()
        async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
            await stream.rest()
        assert stream.text_chunks == COVERED
        assert stream.chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert stream.chunks[-1]["mppnode"] == {"ended": "unpaid"}
        assert stream.usage["completion_tokens"] == COVERED
        assert stream.final.spent == cost(COVERED, 1) // 1_000_000
        assert stream.events[-1].data == "[DONE]"
        assert await owed(world, channel) == cost(COVERED, 1)
        await world.eventually(lambda: world.net.provider.live == 0)
        again = await world.buy(chat(), world.payer.voucher(channel, 2 * UNIT))
        assert again.status == 200


async def test_3_5_a_v1_stream_ends_with_its_deposit() -> None:
    """Protocol 3.5: a v1 payer cannot top up by itself, so no voucher beyond the deposit is ever asked for."""
    async with impatient() as world:
        channel, body = world.payer.channel(V1, deposit=UNIT), LONG()
        async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
            await stream.rest()
        assert stream.needs == []
        assert stream.text_chunks == COVERED


async def test_t57_a_second_stream_ends_the_first_with_its_receipt(world: World) -> None:
    """T-57: the newer request takes the channel; the older one gets its receipt; both are billed, once each."""
    gate, channel, body = world.gate(), world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as first:
        await gate.release(5)
        await first.tokens(5)
        world.net.provider.gate = None
        short = chat("dev/story", max_tokens=5)
        async with world.stream(short, await world.pay(world.payer.voucher(channel, 2 * UNIT), short)) as second:
            await second.rest()
        await first.rest()
    assert first.chunks[-1]["mppnode"] == {"ended": "superseded"}
    assert first.text_chunks == second.text_chunks == 5
    assert second.receipt.spent >= first.final.spent == 50
    assert await owed(world, channel) == cost(5, 1) + cost(5, 2)
    assert world.net.provider.cancelled == 1


async def test_t57_a_replayed_credential_cannot_stop_a_live_stream(world: World) -> None:
    """T-57, T-29: the credential of the running stream, or a bad one, sent again, leaves the stream alone."""
    gate, channel, body = world.gate(), world.payer.channel(), LONG()
    credential = await world.pay(world.payer.open(channel), body)
    async with world.stream(body, credential) as stream:
        await gate.release(5)
        await stream.tokens(5)
        assert (await world.send(body, credential)).code == "credential_used"
        forged = world.payer.voucher(channel, 2 * UNIT, key=b"\x08" * 32)
        assert (await world.buy(body, forged)).code == "invalid_signature"
        assert (await world.send(None, credential)).status == 204
        await gate.release(5)
        await stream.tokens(10)
        await gate.release(1_000)
        stream.response.close()


@BOTH
async def test_t58_a_close_ends_the_stream_and_settles_what_was_delivered(world: World, escrow: Escrow) -> None:
    """T-58: a close during a stream: the stream gets its receipt, the chain pays what arrived, later charges are 410."""
    gate, channel, body = world.gate(), world.payer.channel(escrow), LONG()
    before = world.net.chain.balance(world.net.payee)
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await gate.release(5)
        await stream.tokens(5)
        closed = await world.manage(world.payer.close(channel, UNIT))
        await stream.rest()
    assert closed.status == 204, closed.body
    assert stream.text_chunks == 5
    assert stream.final.spent == 50
    account = await world.account(channel)
    assert (account.phase, account.spent) == (Phase.CLOSED, 50)
    earned = world.net.chain.balance(world.net.payee) - before
    assert earned == (50 if escrow is V2 else 0), "v1 pays whole vouchers, and none is as low as what was spent"
    assert (await world.buy(chat(), world.payer.voucher(channel, 2 * UNIT))).status == 410


async def test_t58_a_close_for_less_than_the_stream_has_cost_is_answered_consistently(world: World) -> None:
    """T-58, T-64: a close credential below what the live stream has delivered never gets a receipt with spent above it."""
    gate, channel, body = world.gate(), world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await gate.release(20)
        await stream.tokens(20)
        reply = await world.manage(world.payer.close(channel, 10))
        assert (reply.status, reply.code) == (402, "close_below_spent")
        snapshot = reply.challenge().request
        assert snapshot
        stream.response.close()
    await world.settled()
    again = await world.manage(world.payer.close(channel, UNIT))
    assert again.status == 204
    assert again.receipt is not None
    assert again.receipt.spent == 200


async def test_t59_the_whole_stream_is_not_one_unit(world: World) -> None:
    """T-59: nothing is sold per request here: the unit is a number of tokens and the charge follows the tokens."""
    channel, body = world.payer.channel(), chat("dev/story", max_tokens=7)
    challenge = await world.challenge(body)
    async with world.stream(body, world.payer.credential(challenge, world.payer.open(channel))) as stream:
        await stream.rest()
    assert await owed(world, channel) == cost(7, 2)
    assert stream.final.units == 9


@BOTH
async def test_t61_an_expired_challenge_still_carries_vouchers_and_closes(world: World, escrow: Escrow) -> None:
    """T-61, 3.8: a stream outlives its challenge: vouchers and the close may come with it, top-ups and content may not."""
    channel, body = world.payer.channel(escrow), LONG()
    challenge = await world.challenge(body, escrow.protocol)
    async with world.stream(body, world.payer.credential(challenge, world.payer.open(channel))) as stream:
        await stream.tokens(COVERED)
        world.clock.advance(3_600)
        reply = await world.send(None, world.payer.credential(challenge, world.payer.voucher(channel, 6 * UNIT)))
        assert reply.status == 204, reply.body
        await stream.rest()
    assert stream.text_chunks == 400
    for payload in (world.payer.top_up(channel, 1_000), world.payer.open(world.payer.channel(escrow))):
        late = await world.send(None, world.payer.credential(challenge, payload))
        assert (late.status, late.code) == (402, "payment_expired")
        assert late.challenges
    content = await world.send(body, world.payer.credential(challenge, world.payer.voucher(channel, 7 * UNIT)))
    assert (content.status, content.code) == (402, "payment_expired")
    closed = await world.send(None, world.payer.credential(challenge, world.payer.close(channel, 6 * UNIT)))
    assert closed.status == 204


async def test_t62_comments_keep_a_waiting_stream_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """T-62: while nothing is sent, comment lines are; parsers skip them; proxies are told not to buffer."""
    monkeypatch.setattr("mppnode.app.StreamLimits", functools.partial(StreamLimits, heartbeat_s=0.02))
    async with new_world() as world:
        channel, body = world.payer.channel(), chat("dev/stalls")
        async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
            headers = stream.response.headers
            await stream.tokens(3)
            while stream.raw.count(b": waiting\n\n") < 3:
                stream.raw += await stream.response.content.readany()
            stream.response.close()
        assert "no-transform" in headers["Cache-Control"]
        assert headers["X-Accel-Buffering"] == "no"
        assert {event.event for event in stream.events} == {"message"}
        assert await owed(world, channel) == cost(3, 1)


# ------------------------------------------------------------------------------------------------- what providers do


EXACT = ["dev/story", "dev/echo", "dev/burst", "dev/no-usage", "dev/usage-huge", "dev/usage-shrinks"]


@pytest.mark.parametrize("model", EXACT)
async def test_the_usage_that_is_shown_is_the_usage_that_is_charged(world: World, model: str) -> None:
    """D8: every stream ends with one usage report, the charge is its exact price, and the receipt shows its floor."""
    channel, body = world.payer.channel(), chat(model, "one two three four five six seven eight", max_tokens=30)
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.rest()
    reports = [chunk["usage"] for chunk in stream.chunks if chunk.get("usage")]
    assert len(reports) == 1
    due = cost(reports[0]["completion_tokens"], reports[0]["prompt_tokens"])
    assert await owed(world, channel) == due
    assert stream.final.units == reports[0]["total_tokens"]
    assert stream.final.spent >= due // 1_000_000
    assert "include_usage" in json.dumps(world.net.provider.last_request), "the node asks for usage by itself"


async def test_usage_that_shrinks_becomes_credit(world: World) -> None:
    """T10: tokens were counted as they came; the report says fewer: the difference is credit, spent never falls."""
    gate, channel = world.gate(), world.payer.channel()
    body = chat("dev/usage-shrinks", max_tokens=60)
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await gate.release(60)
        await stream.rest()
    assert stream.usage["completion_tokens"] == 30
    account = await world.account(channel)
    assert account.owed_pico == cost(30, 2)
    assert account.spent >= 301
    spent = account.spent
    assert (await world.buy(chat("dev/story", max_tokens=1), world.payer.voucher(channel, 2 * UNIT))).status == 200
    after = await world.account(channel)
    assert after.owed_pico == cost(30, 2) + cost(1, 2)
    assert after.spent >= spent


async def test_a_report_that_cannot_be_true_is_not_believed(world: World) -> None:
    """U3: nine million tokens are claimed, thirty were seen: thirty are shown and charged, streamed or buffered."""
    channel, body = world.payer.channel(), chat("dev/usage-huge", max_tokens=30)
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.rest()
    assert stream.usage["completion_tokens"] == 30
    assert b"9000000" not in stream.raw
    charged = await owed(world, channel)
    assert charged == cost(30, 1)
    reply = await world.buy(body | {"stream": False}, world.payer.voucher(channel, 2 * UNIT))
    usage = reply.json["usage"]
    assert usage["completion_tokens"] < 100
    assert await owed(world, channel) == charged + cost(usage["completion_tokens"], usage["prompt_tokens"])


@pytest.mark.parametrize(("model", "tokens"), [("dev/dies-after-3", 3), ("dev/closes-early", 3)])
async def test_t60_a_provider_that_fails_mid_stream_costs_what_it_delivered(
    world: World, model: str, tokens: int
) -> None:
    """T-60, U7, U10: an error chunk in our words, usage, the receipt, the end; only delivered tokens are charged."""
    channel, body = world.payer.channel(), chat(model)
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.rest()
    assert stream.text_chunks == tokens
    (error,) = [chunk for chunk in stream.chunks if "error" in chunk]
    assert error["error"]["code"] == "upstream_failed"
    assert b"secret" not in stream.raw
    assert stream.usage["completion_tokens"] == tokens
    assert [event.event for event in stream.events[-2:]] == [RECEIPT_EVENT, "message"]
    assert stream.events[-1].data == "[DONE]"
    due = cost(tokens, 1) if tokens else 0
    assert await owed(world, channel) == due
    assert stream.final.spent == due // 1_000_000


@pytest.mark.parametrize("stream", [True, False])
async def test_t48_t49_a_provider_that_refuses_costs_nothing(world: World, stream: bool) -> None:
    """T-48, T-49: 502 with the attempts, never 402, nothing charged; after an open with the receipt of that open."""
    channel, body = world.payer.channel(), chat("dev/error-500", stream=stream, max_tokens=10)
    before = world.broadcasts()
    reply = await world.buy(body, world.payer.open(channel))
    assert (reply.status, reply.code) == (502, "all_providers_failed")
    assert reply.json["error"]["attempts"] == [{"provider": "dev", "kind": "status", "status": 500}]
    assert b"secret" not in reply.body
    assert reply.receipt is not None
    assert (reply.receipt.channel_id, reply.receipt.accepted, reply.receipt.spent) == (channel.id, UNIT, 0)
    assert reply.receipt.tx_hash == channel.opening.tx_hash
    again = await world.buy(body, world.payer.voucher(channel, UNIT))
    assert (again.status, again.receipt) == (502, None)
    served = await world.buy(chat(), world.payer.voucher(channel, UNIT))
    assert served.status == 200, "the same channel, the same voucher"
    assert world.broadcasts() == before + 1
    assert await owed(world, channel) == cost(2, 2)


@pytest.mark.parametrize("model", ["dev/error-in-200", "dev/error-500"])
async def test_t48_a_buffered_failure_charges_nothing(world: World, model: str) -> None:
    """T-48: an error inside a 200 is a 502 of ours, without the provider's words and without a charge."""
    channel = await world.opened()
    reply = await world.buy(chat(model, stream=False, max_tokens=5), world.payer.voucher(channel, UNIT))
    assert (reply.status, reply.code) == (502, "all_providers_failed")
    assert b"secret" not in reply.body
    assert await owed(world, channel) == 0


async def test_d7_a_buffered_answer_holds_its_worst_case_and_charges_its_usage(world: World) -> None:
    """D7: too little for prompt plus max_tokens is a 402 with the amount that would do; then exactly that works."""
    channel, body = await world.opened(), chat("dev/echo", stream=False, max_tokens=200)
    before = await world.state()
    reply = await world.buy(body, world.payer.voucher(channel, UNIT))
    assert (reply.status, reply.code) == (402, "insufficient_balance")
    assert await world.state() == before
    required = int(reply.json["details"]["required"])
    assert required == 2_006
    snapshot = requests.decode(reply.challenge().request).snapshot
    assert snapshot is not None
    assert (snapshot.required, snapshot.accepted, snapshot.channel_id) == (required, UNIT, channel.id)
    assert (await world.buy(body, world.payer.voucher(channel, required - 1))).status == 402
    served = await world.buy(body, world.payer.voucher(channel, required))
    assert served.status == 200
    assert served.json["choices"][0]["message"]["content"] == "hello there"
    assert served.receipt is not None
    assert served.receipt.units == served.json["usage"]["total_tokens"] == 4
    assert await owed(world, channel) == cost(2, 2)


async def test_r13_a_reader_that_stops_pays_for_what_left() -> None:
    """P27, R13: a client that reads nothing is cut off, its provider stopped, and charged no more than it could read."""
    async with impatient(stall_s=0.3) as world:
        channel = await world.opened(cumulative=DEPOSIT)
        body = chat("dev/burst", max_tokens=8_000)
        credential = await world.pay(world.payer.voucher(channel, DEPOSIT), body)
        data = json.dumps(body).encode()
        host, port = "127.0.0.1", int(world.net.node.url.rpartition(":")[2])
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
        head = f"POST {PATH} HTTP/1.0\r\nHost: x\r\nAuthorization: {credential}\r\nContent-Length: {len(data)}\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(sock, head.encode() + data)
        await world.eventually(lambda: bool(world.log.endings()))
        assert world.log.endings() == ["stalled"]
        assert world.net.provider.live == 0
        received = bytearray()
        with contextlib.suppress(ConnectionError, TimeoutError):
            while piece := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65_536), 0.3):
                received += piece
        sock.close()
        readable = received.count(b'"content":" ') + received.count(b'"content":"a')
        charged = await owed(world, channel)
        assert charged <= cost(readable, 2)
        assert readable < 1_000, "the buffers in between are small"


async def test_t43_a_url_with_a_query_is_the_same_route(world: World) -> None:
    """T-43: a mid-stream voucher to the stream's own URL with its query is management: 204, one stream, exact spend."""
    channel, body, path = world.payer.channel(), LONG(), f"{PATH}?api-version=1&x=%20"
    async with world.stream(body, await world.pay(world.payer.open(channel), body), path=path) as stream:
        await stream.tokens(COVERED)
        credential = await world.pay(world.payer.voucher(channel, 6 * UNIT))
        reply = await world.send(None, credential, path=path, headers={"Accept": "text/event-stream"})
        assert reply.status == 204
        await stream.rest()
    assert stream.text_chunks == 400
    assert world.net.provider.requests == 1
    assert await owed(world, channel) == cost(400, 2)


async def test_t45_vouchers_do_not_pay_for_a_live_streams_first_tokens_twice(world: World) -> None:
    """T-45: HEAD and bodyless vouchers beside a stream are charged nothing and consume nothing of it."""
    gate, channel, body = world.gate(), world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        for n in range(2, 6):
            for method in ("HEAD", "POST"):
                credential = await world.pay(world.payer.voucher(channel, n * UNIT))
                reply = await world.send(None, credential, method=method)
                assert reply.status == 204
                assert reply.receipt is not None
                assert reply.receipt.spent == 0
        await gate.release(400)
        await stream.rest()
    assert stream.text_chunks == 400
    assert await owed(world, channel) == cost(400, 2)


async def test_a_top_up_mid_stream_extends_it(world: World) -> None:
    """3.6: the need that exceeds the deposit is answered by a top-up and a voucher, and the stream goes on."""
    channel, body = world.payer.channel(deposit=UNIT), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        need = json.loads((await stream.until(NEED_VOUCHER_EVENT)).data)
        required = int(need["requiredCumulative"])
        assert required > int(need["deposit"]) == UNIT
        assert (await world.manage(world.payer.voucher(channel, required))).code == "voucher_exceeds_deposit"
        assert (await world.manage(world.payer.top_up(channel, 10 * UNIT))).status == 204
        assert (await world.manage(world.payer.voucher(channel, 5 * UNIT))).status == 204
        await stream.rest()
    assert stream.text_chunks == 400


async def test_a_bad_credential_beside_a_stream_changes_nothing(world: World) -> None:
    """T-03 beside a stream: refusals on the channel neither end nor feed the stream."""
    channel, body = world.payer.channel(), LONG()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.tokens(COVERED)
        credential = await world.pay(world.payer.voucher(channel, 6 * UNIT))
        for path, value in (("challenge.id", "x"), ("payload.signature", "0x"), ("payload.cumulativeAmount", "7000")):
            assert (await world.send(None, bent(credential, path, value))).status == 402
        await quiet(stream)
        assert stream.text_chunks == COVERED
        assert (await world.account(channel)).accepted == UNIT
        assert (await world.send(None, credential)).status == 204
        await stream.rest()
    assert stream.text_chunks == 400
