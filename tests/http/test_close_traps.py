"""Traps of the close: T-64 to T-70, T-73, P9 and P13; the settle worker's T-71 and T-72 come with that worker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from channels import escrow as escrow_v2
from channels.descriptor import CLOSE_GRACE_S, Escrow
from channels.ids import to_hex
from channels.model import Phase
from channels.tempo_tx import Call
from channels.units import Units
from channels.wire import request as requests
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.schema import LimitsConfig
from tests.http.test_open_traps import BOTH, failing, payers_call, rpc_hook
from tests.support.http_client import DEPOSIT, UNIT, V1, V2, Channel, World, chat, new_world

FUNDS = 100_000_000


async def used(world: World, escrow: Escrow = V2, tokens: int = 50) -> tuple[Channel, int]:
    """A channel with one delivered response, and what it cost."""
    channel, body = world.payer.channel(escrow), chat("dev/story", max_tokens=tokens)
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await stream.rest()
    return channel, int(stream.final.spent)


@BOTH
async def test_t64_a_close_below_what_was_spent_is_refused_with_the_way_out(world: World, escrow: Escrow) -> None:
    """T-64, P13: 402 with a fresh challenge; on v2 its snapshot names the accepted amount, and signing that closes."""
    channel, spent = await used(world, escrow)
    state = await world.state()
    reply = await world.manage(world.payer.close(channel, spent - 1))
    assert (reply.status, reply.code) == (402, "close_below_spent")
    assert await world.state() == state
    snapshot = requests.decode(reply.challenge(escrow.protocol).request).snapshot
    if escrow is V2:
        assert snapshot is not None
        assert (snapshot.channel_id, snapshot.accepted, snapshot.spent) == (channel.id, UNIT, spent)
        assert snapshot.highest_voucher.cumulative == UNIT
    else:
        assert snapshot is None
    assert (await world.manage(world.payer.close(channel, UNIT))).status == 204


@BOTH
async def test_t65_the_close_receipt_is_the_one_the_client_requires(world: World, escrow: Escrow) -> None:
    """T-65: accepted is the credential's amount, the challenge is the credential's, spent is within it, with its hash."""
    channel, spent = await used(world, escrow)
    assert (await world.manage(world.payer.voucher(channel, 5 * UNIT))).status == 204
    challenge = await world.challenge(None, escrow.protocol)
    reply = await world.send(None, world.payer.credential(challenge, world.payer.close(channel, spent + 7)))
    assert (reply.status, reply.body) == (204, b"")
    receipt = reply.receipt
    assert receipt is not None
    assert (receipt.accepted, receipt.spent, receipt.challenge_id) == (spent + 7, spent, challenge.id)
    assert receipt.channel_id == channel.id
    assert receipt.tx_hash is not None
    found = world.net.chain.handle({"id": 1, "method": "eth_getTransactionReceipt", "params": [to_hex(receipt.tx_hash)]})
    assert found["result"]["status"] == "0x1"


@BOTH
async def test_t66_parallel_closes_are_one_transaction(world: World, escrow: Escrow) -> None:
    """T-66: ten closes at once, some the same credential: one broadcast; the same gets the same receipt, others a 410."""
    channel, _ = await used(world, escrow)
    before = world.broadcasts()
    same = await world.pay(world.payer.close(channel, UNIT))
    others = [await world.pay(world.payer.close(channel, UNIT)) for _ in range(5)]
    replies = await asyncio.gather(*(world.send(None, credential) for credential in [same] * 5 + others))
    assert world.broadcasts() == before + 1
    assert sorted({reply.status for reply in replies}) == [204, 410]
    hashes = {reply.receipt.tx_hash for reply in replies if reply.receipt}
    assert len(hashes) == 1
    again = await world.send(None, same)
    assert again.status in (204, 410)
    assert again.receipt is None or again.receipt.tx_hash in hashes


async def test_t66_a_repeat_after_a_lost_answer_gets_the_stored_receipt(world: World) -> None:
    """T-66, 3.11: the very credential that closed the channel is answered again; another one is told it is over."""
    channel, _ = await used(world)
    credential = await world.pay(world.payer.close(channel, UNIT))
    first, second = await world.send(None, credential), await world.send(None, credential)
    assert (first.status, second.status) == (204, 204)
    assert first.receipt is not None
    assert first.receipt == second.receipt
    assert (await world.manage(world.payer.close(channel, UNIT))).code == "channel_finalized"


def hold_the_close(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Keep the chain's part of a close pending; returns (it has begun, let it go on)."""
    assert world.net.node.treasury is not None
    settler = world.net.node.treasury.settler
    bring, begun, go_on = settler.bring, asyncio.Event(), asyncio.Event()

    async def slow(*close: Any, **more: Any) -> Any:
        begun.set()
        await go_on.wait()
        return await bring(*close, **more)

    monkeypatch.setattr(settler, "bring", slow)
    return begun, go_on


@BOTH
async def test_t67_a_closing_channel_takes_nothing(
    world: World, escrow: Escrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T-67: while the close is on its way vouchers, top-ups, opens and content are refused with 410."""
    channel, spent = await used(world, escrow)
    begun, go_on = hold_the_close(world, monkeypatch)
    closing = asyncio.ensure_future(world.manage(world.payer.close(channel, UNIT)))
    await begun.wait()
    state = await world.state()
    payloads = [world.payer.voucher(channel, 2 * UNIT), world.payer.top_up(channel, 1_000), world.payer.open(channel)]
    for payload in payloads:
        reply = await world.manage(payload)
        assert (reply.status, reply.code) == (410, "channel_finalized")
    assert (await world.buy(chat(), world.payer.voucher(channel, UNIT))).status == 410
    assert await world.state() == state
    go_on.set()
    assert (await closing).status == 204
    assert (await world.account(channel)).spent == spent


@BOTH
async def test_t68_a_close_that_surely_failed_can_be_repeated(world: World, escrow: Escrow) -> None:
    """T-68: the chain refuses the transaction: the channel is open again, the payer may go on or close again."""
    channel, _ = await used(world, escrow)
    down = {"eth_estimateGas"}
    restore = rpc_hook(world, lambda request, reply: failing(request, 3) if request["method"] in down else reply)
    reply = await world.manage(world.payer.close(channel, UNIT))
    assert (reply.status, reply.code) == (402, "chain_rejected")
    assert (await world.account(channel)).phase is Phase.OPEN
    restore()
    assert (await world.buy(chat(), world.payer.voucher(channel, 2 * UNIT))).status == 200
    assert (await world.manage(world.payer.close(channel, 2 * UNIT))).status == 204


@pytest.mark.parametrize("lost", ["before", "after"])
async def test_t68_a_close_nobody_knows_the_end_of_is_never_undone(lost: str) -> None:
    """T-68: no answer from the chain: 503, the channel stays closing, and the same credential brings it to its end."""
    impatient = DevnetOptions(tokens_per_second=0.0, limits=LimitsConfig(drain_s=0))
    async with new_world(impatient) as world:
        channel, spent = await used(world)
        earned, before = world.net.chain.balance(world.net.payee), world.broadcasts()

        def lose(request: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
            world.clock.advance(1)
            silent = {"eth_getTransactionReceipt", "eth_getTransactionByHash"} if lost == "after" else {request["method"]}
            return failing(request) if request["method"] in silent else reply

        credential = await world.pay(world.payer.close(channel, UNIT))
        restore = rpc_hook(world, lose)
        reply = await world.send(None, credential)
        assert reply.status == 503
        assert reply.code == ("chain_unavailable" if lost == "before" else "chain_outcome_unknown")
        assert (await world.account(channel)).phase in (Phase.CLOSING, Phase.CAPTURED)
        assert (await world.buy(chat(), world.payer.voucher(channel, 2 * UNIT))).status == 410
        restore()
        again = await world.send(None, credential)
        assert again.status == 204, again.body
        assert world.broadcasts() == before + 1
        assert world.net.chain.balance(world.net.payee) - earned == spent


async def test_t69_a_v2_close_captures_what_was_spent_and_returns_the_rest(world: World) -> None:
    """T-69, R17: the payee earns exactly spent, the payer gets back the rest, whatever was permitted."""
    channel, spent = await used(world)
    assert (await world.manage(world.payer.voucher(channel, 50 * UNIT))).status == 204
    assert (await world.manage(world.payer.close(channel, 60 * UNIT))).status == 204
    assert world.net.chain.balance(world.payer.address) == FUNDS - spent
    assert world.net.chain.balance(world.net.payee) == FUNDS + spent


async def test_t69_a_v1_close_pays_no_more_than_was_spent(world: World) -> None:
    """T-69: v1 pays whole vouchers, so the greatest one that is not above spent is used; a closing one may be exact."""
    channel, spent = await used(world, V1)
    assert (await world.manage(world.payer.voucher(channel, 50 * UNIT))).status == 204
    above = await world.manage(world.payer.close(channel, DEPOSIT + 1))
    assert (above.status, above.code) == (402, "voucher_exceeds_deposit")
    assert (await world.manage(world.payer.close(channel, 50 * UNIT))).status == 204
    assert world.net.chain.balance(world.net.payee) <= FUNDS + spent
    exact, cost = await used(world, V1)
    before = world.net.chain.balance(world.net.payee)
    assert (await world.manage(world.payer.close(exact, cost))).status == 204
    assert world.net.chain.balance(world.net.payee) - before == cost, "the payer signed exactly what was spent"


@pytest.mark.parametrize("first", ["voucher", "close", "topUp", "content"])
async def test_t70_a_channel_the_payer_has_emptied_is_gone(world: World, first: str) -> None:
    """T-70: withdrawn on chain behind our back: 410 for whatever comes, no endless retry, no transaction of ours."""
    channel, _ = await used(world)
    payers_call(world, channel, escrow_v2.encode_request_close(channel.descriptor))
    world.clock.advance(CLOSE_GRACE_S)
    payers_call(world, channel, escrow_v2.encode_withdraw(channel.descriptor))
    before = world.broadcasts()
    payer = world.payer
    sends = {
        "voucher": lambda: world.manage(payer.voucher(channel, 2 * UNIT)),
        "close": lambda: world.manage(payer.close(channel, UNIT)),
        "topUp": lambda: world.manage(payer.top_up(channel, 1_000)),
        "content": lambda: world.buy(chat(), payer.voucher(channel, 2 * UNIT)),
    }
    reply = await sends.pop(first)()
    if first == "topUp":
        assert reply.status in (402, 410), "the chain says no"
    else:
        assert (reply.status, reply.code) == (410, "channel_finalized"), reply.body
    for send in sends.values():
        assert (await send()).status in (402, 410)
    assert world.broadcasts() - before <= (1 if first == "topUp" else 0), "at most the payer's own failing transaction"
    assert world.net.provider.requests == 1


@BOTH
@pytest.mark.parametrize("cumulative", [0, UNIT, DEPOSIT])
async def test_t73_a_channel_that_was_never_used_closes_for_nothing(
    world: World, escrow: Escrow, cumulative: int
) -> None:
    """T-73: nothing spent, nothing captured, the whole deposit goes back, whatever amount the close was signed for."""
    channel = await world.opened(escrow)
    reply = await world.manage(world.payer.close(channel, cumulative))
    assert reply.status == 204, reply.body
    assert reply.receipt is not None
    assert (reply.receipt.accepted, reply.receipt.spent) == (cumulative, 0)
    assert world.net.chain.balance(world.payer.address) == FUNDS
    assert world.net.chain.balance(world.net.payee) == FUNDS


async def test_p13_a_close_needs_the_payers_signature(world: World) -> None:
    """P13: an id and a descriptor are public; without the signature nobody can end another's channel or its streams."""
    gate, channel, body = world.gate(), world.payer.channel(), chat("dev/story", max_tokens=50)
    stranger = world.new_payer()
    async with world.stream(body, await world.pay(world.payer.open(channel), body)) as stream:
        await gate.release(5)
        await stream.tokens(5)
        for cumulative in (0, UNIT, DEPOSIT):
            forged = world.payer.close(channel, cumulative, key=stranger.key)
            reply = await world.manage(forged, source=None)
            assert (reply.status, reply.code) == (402, "invalid_signature")
        await gate.release(50)
        await stream.rest()
    assert stream.text_chunks == 50


async def test_p13_settled_counts_like_spent_for_a_close(world: World) -> None:
    """P13: what the chain has already paid out is the least a close may name, and nothing is captured twice."""
    channel, spent = await used(world)
    settle = escrow_v2.encode_settle(channel.descriptor, Units(UNIT), world.payer.sign(channel, UNIT))
    payee = world.new_payer(world.net.payee_key)
    raw = payee.transaction((Call(V2.address, settle),)).raw
    reply = world.net.chain.handle({"id": 1, "method": "eth_sendRawTransactionSync", "params": [to_hex(raw)]})
    assert reply["result"]["status"] == "0x1"
    assert spent < UNIT
    await world.manage(world.payer.voucher(channel, 2 * UNIT))
    account = await world.account(channel)
    assert account.phase is Phase.SUSPECT, "the chain has paid more than was spent: only people go on"
    assert (await world.manage(world.payer.close(channel, 2 * UNIT))).status == 410
