"""Traps of opening and topping up a channel: T-12 to T-28, P8, P9 and P12."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import rlp

from channels import escrow as escrow_v2
from channels.descriptor import Escrow
from channels.ids import Address, to_hex
from channels.instants import UnixSeconds
from channels.model import Phase
from channels.tempo_tx import Call
from channels.units import Units
from tests.support.http_client import DEPOSIT, TOKEN_UNITS, UNIT, V1, V2, Channel, Stream, World, bent, chat, cost

BOTH = pytest.mark.parametrize("escrow", [V2, V1], ids=["v2", "v1"])


def rpc_hook(world: World, change: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]) -> Callable[[], None]:
    """Let ``change(request, reply)`` replace the chain's replies; returns how to stop that."""
    handle = world.net.chain.handle

    def hooked(request: Any) -> dict[str, Any]:
        return change(request, handle(request))

    world.net.chain.handle = hooked  # type: ignore[method-assign]

    def restore() -> None:
        world.net.chain.handle = handle  # type: ignore[method-assign]

    return restore


def failing(request: dict[str, Any], code: int = -32603) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request["id"], "error": {"code": code, "message": "down"}}


def payers_call(world: World, channel: Channel, data: bytes) -> None:
    """The payer goes to the chain without telling the node."""
    raw = world.payer.transaction((Call(channel.escrow.address, data),)).raw
    reply = world.net.chain.handle({"id": 1, "method": "eth_sendRawTransactionSync", "params": [to_hex(raw)]})
    assert reply["result"]["status"] == "0x1", reply


@BOTH
async def test_t12_an_open_sent_again_changes_nothing(world: World, escrow: Escrow) -> None:
    """T-12, T-13: the same open twice, one after the other, is one transaction and one channel; spent is not reset."""
    channel, body = world.payer.channel(escrow), chat("dev/story", max_tokens=5)
    credential = await world.pay(world.payer.open(channel), body)
    async with world.stream(body, credential) as stream:
        await stream.rest()
    state = await world.state()
    for sent in (None, None):
        again = await world.send(sent, credential)
        assert (again.status, again.receipt.spent if again.receipt else None) == (204, stream.final.spent)
    content = await world.send(body, credential)
    assert (content.status, content.code) == (402, "credential_used")
    assert await world.state() == state


async def test_t12_ten_parallel_opens_are_one_channel(world: World) -> None:
    """T-12: ten copies of one open at once are broadcast once, and all are answered alike."""
    before = world.broadcasts()
    credential = await world.pay(world.payer.open(world.payer.channel()))
    replies = await asyncio.gather(*(world.send(None, credential) for _ in range(10)))
    assert [reply.status for reply in replies] == [204] * 10
    assert {reply.receipt.accepted for reply in replies if reply.receipt} == {UNIT}
    assert world.broadcasts() == before + 1


async def test_t12_parallel_content_opens_serve_once(world: World) -> None:
    """T-12, T-29: ten copies of one open that asks for content are one transaction and one response."""
    before, body = world.broadcasts(), chat("dev/story", max_tokens=5)
    credential = await world.pay(world.payer.open(world.payer.channel()), body)
    replies = await asyncio.gather(*(world.send(body, credential) for _ in range(10)))
    assert sorted(reply.status for reply in replies) == [200] + [402] * 9
    assert world.broadcasts() == before + 1
    assert world.net.provider.requests == 1


async def test_t13_a_broadcast_whose_answer_was_lost_is_recognised(world: World) -> None:
    """T-13: the transaction landed and nobody heard: the repeat finds the channel on the chain and opens it."""
    lost = {"eth_sendRawTransaction", "eth_getTransactionReceipt", "eth_getTransactionByHash"}

    def lose(request: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        world.clock.advance(1)
        return failing(request) if request["method"] in lost else reply

    restore = rpc_hook(world, lose)
    channel = world.payer.channel()
    credential, before = await world.pay(world.payer.open(channel)), world.broadcasts()
    reply = await world.send(None, credential)
    assert (reply.status, reply.code) == (503, "chain_outcome_unknown")
    assert "Payment-Receipt" not in reply.headers
    assert world.broadcasts() == before + 1
    restore()
    world.net.clock._millis -= 40_000  # type: ignore[attr-defined]  # the transaction is still valid when the payer asks again
    again = await world.send(None, credential)
    assert again.status == 204, again.body
    assert (await world.account(channel)).chain.deposit == DEPOSIT
    assert world.broadcasts() == before + 1


@BOTH
async def test_t14_p9_a_closed_channel_is_a_tombstone(world: World, escrow: Escrow) -> None:
    """T-14, P9: after the close its open, vouchers, top-ups and closes are refused for ever; the record stays."""
    channel = world.payer.channel(escrow)
    opening = await world.pay(world.payer.open(channel))
    assert (await world.send(None, opening)).status == 204
    top_up = await world.pay(world.payer.top_up(channel, 1_000))
    assert (await world.manage(world.payer.close(channel, UNIT))).status == 204
    state = await world.state()
    payloads = (world.payer.voucher(channel, UNIT), world.payer.voucher(channel, 2 * UNIT), world.payer.close(channel, UNIT))
    credentials = [opening, top_up, *[await world.pay(payload) for payload in payloads]]
    for credential in credentials:
        reply = await world.send(None, credential)
        assert (reply.status, reply.code) == (410, "channel_finalized")
    for payload in (world.payer.open(channel), world.payer.voucher(channel, 2 * UNIT)):
        assert (await world.buy(chat(), payload)).status == 410
    assert await world.state() == state
    assert (await world.account(channel)).phase is Phase.CLOSED


async def refused_open(world: World, credential: str, reasons: set[str]) -> None:
    """An open that must be refused before anything is broadcast or stored."""
    state = await world.state()
    reply = await world.send(None, credential)
    assert (reply.status, reply.code in reasons) == (402, True), reply.body
    assert reply.challenges
    assert await world.state() == state


@BOTH
async def test_t15_the_voucher_of_an_open_is_judged_before_the_broadcast(world: World, escrow: Escrow) -> None:
    """T-15: wrong signer, above the deposit, or for another channel: refused, and the deposit stays the payer's."""
    channel, other, payer = world.payer.channel(escrow), world.payer.channel(escrow), world.payer
    stranger = b"\x07" * 32
    cases = [
        (payer.open(channel, key=stranger), {"invalid_signature"}),
        (payer.open(channel, DEPOSIT + 1), {"voucher_exceeds_deposit"}),
        (replace(payer.open(channel), signature=payer.sign(other, UNIT)), {"invalid_signature"}),
        (replace(payer.open(channel), cumulative=Units(UNIT + 1)), {"invalid_signature"}),
        (replace(payer.open(channel), channel_id=other.id), {"descriptor_mismatch"}),
        (replace(payer.open(channel), transaction=other.opening.raw), {"descriptor_mismatch"}),
        (replace(payer.open(channel), authorized_signer=Address(b"\x09" * 20)), {"descriptor_mismatch"}),
    ]
    for payload, reasons in cases:
        await refused_open(world, await world.pay(payload), reasons)


async def test_t15_an_open_too_small_for_its_request_takes_the_money_but_serves_nothing(world: World) -> None:
    """T-15: vouchers are permissions here, so an open over one unit is opened and the request refused with a snapshot."""
    channel, body = world.payer.channel(), chat("dev/story", stream=False, max_tokens=1_000)
    reply = await world.buy(body, world.payer.open(channel, 1))
    assert (reply.status, reply.code) == (402, "insufficient_balance")
    required = int(reply.json["details"]["required"])
    assert (await world.buy(body, world.payer.voucher(channel, required))).status == 200
    assert world.net.provider.requests == 1


DESCRIPTOR_FIELDS = ["payer", "payee", "operator", "token", "salt", "authorizedSigner", "expiringNonceHash"]


@pytest.mark.parametrize("name", DESCRIPTOR_FIELDS)
async def test_t16_p8_every_member_of_the_descriptor_counts(world: World, name: str) -> None:
    """T-16, P8: one altered member of the descriptor, in an open, voucher, top-up or close, is refused, whoever asks."""
    fresh, known, payer = world.payer.channel(), await world.opened(), world.payer
    size = 32 if name in ("salt", "expiringNonceHash") else 20
    altered = "0x" + "31" * size
    payloads = [payer.open(fresh), payer.voucher(known, 2 * UNIT), payer.top_up(known, 1_000), payer.close(known, UNIT)]
    for payload in payloads:
        credential = bent(await world.pay(payload), f"payload.descriptor.{name}", altered)
        await refused_open(world, credential, {"descriptor_mismatch"})
        missing = bent(await world.pay(payload), f"payload.descriptor.{name}", ...)
        await refused_open(world, missing, {"invalid_payload"})


@pytest.mark.parametrize(
    "call",
    [
        {"payee": Address(b"\x15" * 20)},
        {"token": Address(bytes.fromhex("20c0000000000000000000000000000000000001"))},
        {"operator": Address(b"\x16" * 20)},
    ],
    ids=["payee", "token", "operator"],
)
async def test_t16_t36_a_channel_for_somebody_else_is_not_opened(world: World, call: dict[str, Any]) -> None:
    """T-16, T-36: a consistent open of a channel to another payee, in another token or with an operator is refused."""
    channel = world.payer.channel(call=call)
    await refused_open(world, await world.pay(world.payer.open(channel)), {"descriptor_mismatch"})


async def test_t16_the_signer_is_the_descriptors(world: World) -> None:
    """T-16: a delegate named in the opening call signs vouchers; the payer's own signature then counts no more."""
    delegate = world.new_payer()
    channel = world.payer.channel(call={"authorized_signer": delegate.address})
    await refused_open(world, await world.pay(world.payer.open(channel)), {"invalid_signature"})
    assert (await world.manage(world.payer.open(channel, key=delegate.key))).status == 204
    reply = await world.manage(world.payer.voucher(channel, 2 * UNIT))
    assert (reply.status, reply.code) == (402, "invalid_signature")
    assert (await world.manage(world.payer.voucher(channel, 2 * UNIT, key=delegate.key))).status == 204


async def test_t17_a_channel_of_the_other_escrow_is_not_found(world: World) -> None:
    """T-17, T-36: a v2 channel is unknown under a v1 challenge and the other way round."""
    two, one = await world.opened(V2), await world.opened(V1)
    state = await world.state()
    for channel, wrong in ((two, V1), (one, V2)):
        challenge = await world.challenge(None, wrong.protocol)
        for payload in (world.payer.voucher(channel, 2 * UNIT), world.payer.close(channel, UNIT)):
            reply = await world.send(None, world.payer.credential(challenge, payload))
            assert (reply.status, reply.code) == (410, "channel_not_found")
    assert await world.state() == state


STRANGE_TARGET = Address(b"\x77" * 20)


def with_second(calls: tuple[Call, ...]) -> tuple[Call, ...]:
    return (*calls, Call(STRANGE_TARGET, b"\x01\x02\x03\x04"))


@BOTH
@pytest.mark.parametrize(
    "calls",
    [
        with_second,
        lambda calls: (Call(STRANGE_TARGET, b""), *calls),
        lambda calls: (*calls[:-1], replace(calls[-1], value=1)),
        lambda calls: (*calls[:-1], replace(calls[-1], data=calls[-1].data + b"\0")),
        lambda calls: (*calls[:-1], replace(calls[-1], data=calls[-1].data + bytes(32))),
        lambda calls: (*calls[:-1], replace(calls[-1], data=calls[-1].data[:4] + b"\x01" + calls[-1].data[5:])),
        lambda calls: (*calls[:-1], replace(calls[-1], data=calls[-1].data[:-1])),
        lambda calls: (*calls[:-1], replace(calls[-1], data=b"\xde\xad\xbe\xef" + calls[-1].data[4:])),
        lambda calls: (*calls[:-1], replace(calls[-1], to=STRANGE_TARGET)),
        lambda calls: (calls[-1], calls[-1]),
    ],
    ids=["call-after", "call-before", "value", "trailing", "trailing-word", "dirty-address", "short", "selector", "target", "twice"],
)
async def test_t18_only_the_exact_calls_are_broadcast(world: World, escrow: Escrow, calls: Any) -> None:
    """T-18: an open with anything beside, behind or inside its canonical calls never reaches the chain."""
    channel = world.payer.channel(escrow, calls=calls)
    reasons = {"transaction_rejected", "descriptor_mismatch", "invalid_payload"}
    await refused_open(world, await world.pay(world.payer.open(channel)), reasons)


@pytest.mark.parametrize(
    "changes",
    [
        {"valid_before": None},
        {"valid_before": UnixSeconds(1_899_999_999)},
        {"valid_before": UnixSeconds(1_900_000_000)},
        {"nonce_key": 0},
        {"nonce_key": 7, "nonce": 3},
        {"nonce": 1},
        {"chain_id": 4217},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
async def test_t18_t22_odd_envelopes_are_not_broadcast(world: World, changes: dict[str, Any]) -> None:
    """T-18, T-22: no expiring nonce, a past end, another chain: refused before the broadcast, nothing stored."""
    channel = world.payer.channel(**changes)
    await refused_open(world, await world.pay(world.payer.open(channel)), {"transaction_rejected"})


@pytest.mark.parametrize(
    "changes",
    [
        {"gas": 2_000_001},
        {"max_fee_per_gas": 101_000_000_000},
        {"max_priority_fee_per_gas": 60_000_000_000},
        {"nonce_key": 0},
        {"valid_before": UnixSeconds(1_900_000_960)},
        {},
    ],
    ids=["gas", "max-fee", "priority", "nonce-key", "far", "fair"],
)
async def test_t19_nothing_is_sponsored(world: World, changes: dict[str, Any]) -> None:
    """T-19: this node sponsors no fees, so every sponsored envelope, fair or greedy, is refused and never co-signed."""
    channel = world.payer.channel(sponsored=True, fee_token=None, **changes)
    await refused_open(world, await world.pay(world.payer.open(channel)), {"transaction_rejected"})


async def test_t20_t21_both_sponsored_forms_are_refused(world: World) -> None:
    """T-20, T-21: the 0x78 envelope, one naming a victim in its slot, and the 0x76 placeholder are refused alike."""
    channel = world.payer.channel(sponsored=True, fee_token=None)
    items = rlp.decode(channel.opening.raw[1:])
    victim = [*items[:11], b"\x55" * 20, *items[12:]]
    placeholder = [*items[:11], b"\0", *items[12:]]
    for raw in (channel.opening.raw, b"\x78" + rlp.encode(victim), b"\x76" + rlp.encode(placeholder)):
        payload = replace(world.payer.open(channel), transaction=raw)
        await refused_open(world, await world.pay(payload), {"transaction_rejected"})


async def test_t18_lists_and_garbage_in_the_envelope(world: World) -> None:
    """T-18: access lists, authorisation lists, key authorisations and bytes that are no transaction are refused."""
    channel = world.payer.channel()
    items = rlp.decode(channel.opening.raw[1:])
    entry = [[b"\x01" * 20, []]]
    raws = [
        b"\x76" + rlp.encode([*items[:5], entry, *items[6:]]),
        b"\x76" + rlp.encode([*items[:12], entry, *items[13:]]),
        b"\x76" + rlp.encode([*items[:13], [b"\x01"], *items[13:]]),
        channel.opening.raw + b"\0",
        channel.opening.raw[:-1],
        b"\x02" + channel.opening.raw[1:],
        b"\x76",
        b"\x76\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\0" * 4_000,
    ]
    for raw in raws:
        payload = replace(world.payer.open(channel), transaction=raw)
        await refused_open(world, await world.pay(payload), {"transaction_rejected"})


async def test_t22_an_open_that_waited_too_long_fails_cleanly(world: World) -> None:
    """T-22: more than 25 s after signing the transaction is dead: 402 with a fresh challenge, nothing stored."""
    credential = await world.pay(world.payer.open(world.payer.channel()))
    world.clock.advance(25)
    await refused_open(world, credential, {"transaction_rejected"})


@pytest.mark.parametrize("change", ["none", "two", "other-id", "other-deposit", "elsewhere"])
async def test_t23_the_receipt_must_show_the_channel(world: World, change: str) -> None:
    """T-23: a successful receipt without exactly one matching event of the escrow opens nothing here."""

    def bend(request: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        if request["method"] != "eth_getTransactionReceipt" or not reply.get("result"):
            return reply
        receipt = dict(reply["result"])
        log = next(entry for entry in receipt["logs"] if entry["topics"][0] == to_hex(escrow_v2.CHANNEL_OPENED))
        others = [entry for entry in receipt["logs"] if entry is not log]
        made = {
            "none": [],
            "two": [log, log],
            "other-id": [log | {"topics": [log["topics"][0], "0x" + "11" * 32, *log["topics"][2:]]}],
            "other-deposit": [log | {"data": log["data"][:-2] + "01"}],
            "elsewhere": [log | {"address": "0x" + "66" * 20}],
        }[change]
        return reply | {"result": receipt | {"logs": others + made}}

    rpc_hook(world, bend)
    channel = world.payer.channel()
    reply = await world.manage(world.payer.open(channel))
    assert reply.status != 204
    assert "Payment-Receipt" not in reply.headers
    assert world.net.node.books is not None
    assert await world.net.node.books.load(channel.id) is None


async def test_t23_foreign_logs_are_ignored(world: World) -> None:
    """T-23: the same event from another contract beside the real one changes nothing."""

    def add(request: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        if request["method"] != "eth_getTransactionReceipt" or not reply.get("result"):
            return reply
        receipt = reply["result"]
        return reply | {"result": receipt | {"logs": [*receipt["logs"], receipt["logs"][0] | {"address": "0x" + "66" * 20}]}}

    rpc_hook(world, add)
    assert (await world.manage(world.payer.open(world.payer.channel()))).status == 204


async def test_t24_a_lagging_replica_is_asked_again(world: World) -> None:
    """T-24: the state is read at the receipt's block, and a replica that has not got it yet is asked again."""
    misses = []

    def lag(request: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        if request["method"] == "eth_call" and world.broadcasts() > 0 and len(misses) < 4:
            misses.append(request)
            return failing(request, -32001)
        return reply

    rpc_hook(world, lag)
    channel = await world.opened()
    assert len(misses) == 4
    assert (await world.account(channel)).chain.deposit == DEPOSIT


@BOTH
async def test_t25_bad_top_ups_are_refused(world: World, escrow: Escrow) -> None:
    """T-25: nothing, another amount, another channel's, another payer's, a stale one: refused before the broadcast."""
    channel, other, payer = await world.opened(escrow), await world.opened(escrow), world.payer
    stranger = world.new_payer()
    good = payer.top_up(channel, 1_000)
    reasons = {"transaction_rejected", "descriptor_mismatch", "invalid_payload", "source_mismatch"}
    for payload in (
        replace(good, additional_deposit=Units(2_000)),
        replace(good, transaction=payer.top_up(other, 1_000).transaction),
        replace(good, transaction=stranger.top_up(channel, 1_000).transaction),
        replace(good, transaction=payer.top_up(channel, 1_000, valid_before=UnixSeconds(world.clock.now())).transaction),
        replace(good, transaction=channel.opening.raw),
    ):
        await refused_open(world, await world.pay(payload), reasons)
    await refused_open(world, bent(await world.pay(good), "payload.additionalDeposit", "0"), {"invalid_payload"})
    await refused_open(world, await world.pay(good, payer=stranger), {"source_mismatch"})


@BOTH
async def test_t25_a_top_up_counts_once(world: World, escrow: Escrow) -> None:
    """T-25: the same top-up twice, and five times at once, is one transaction, one sum and one answer."""
    channel, before = await world.opened(escrow), world.broadcasts()
    first = await world.pay(world.payer.top_up(channel, 5_000))
    replies = [await world.send(None, first), await world.send(None, first)]
    second = await world.pay(world.payer.top_up(channel, 7_000))
    replies += await asyncio.gather(*(world.send(None, second) for _ in range(5)))
    assert [reply.status for reply in replies] == [204] * 7
    assert len({reply.receipt.tx_hash for reply in replies if reply.receipt}) == 2
    assert world.broadcasts() == before + 2
    assert (await world.account(channel)).chain.deposit == DEPOSIT + 12_000


async def test_t25_topping_up_a_channel_that_is_closing_on_chain_takes_the_request_back(world: World) -> None:
    """T-25: the chain cancels a close request at a top-up, so the channel serves again; a finished one stays finished."""
    channel = await world.opened()
    payers_call(world, channel, escrow_v2.encode_request_close(channel.descriptor))
    assert (await world.manage(world.payer.voucher(channel, 2 * UNIT))).status == 410
    assert (await world.account(channel)).phase is Phase.CONTESTED
    assert (await world.manage(world.payer.top_up(channel, 1_000))).status == 204
    assert (await world.account(channel)).phase is Phase.OPEN
    assert (await world.manage(world.payer.voucher(channel, 2 * UNIT))).status == 204


async def test_t26_a_top_up_races_vouchers_and_a_close(world: World) -> None:
    """T-26: no update is lost: the deposit is the chain's, the highest voucher is the highest one."""
    channel, payer = await world.opened(), world.payer
    payloads = [payer.top_up(channel, 5_000), *(payer.voucher(channel, UNIT * n) for n in (2, 3, 4, 5))]
    credentials = [await world.pay(payload) for payload in payloads]
    replies = await asyncio.gather(*(world.send(None, credential) for credential in credentials))
    assert all(reply.status == 204 or reply.code == "voucher_too_low" for reply in replies)
    account = await world.account(channel)
    assert (account.chain.deposit, account.accepted) == (DEPOSIT + 5_000, 5 * UNIT)
    racing = [await world.pay(payer.top_up(channel, 5_000)), await world.pay(payer.close(channel, 5 * UNIT))]
    topped, closed = await asyncio.gather(*(world.send(None, credential) for credential in racing))
    assert closed.status == 204
    assert topped.status in (204, 402, 410, 503)
    assert (await world.account(channel)).phase is Phase.CLOSED
    assert world.net.chain.balance(world.payer.address) == 100_000_000 - (5_000 if topped.status == 503 else 0)


async def test_t27_five_first_requests_share_one_channel(world: World) -> None:
    """T-27: five parallel requests of one payer: one broadcast, every one answered, the sum of their bills is spent.

    A newer request ends the older one here, so an answer may be short or a 409; none is lost or billed for more.
    """
    channel, before = world.payer.channel(), world.broadcasts()
    body = chat("dev/story", max_tokens=3)
    credentials = [await world.pay(world.payer.open(channel, 10 * UNIT), body) for _ in range(5)]

    async def ask(credential: str) -> int:
        async with world.request(body, credential) as response:
            if response.status == 409:
                assert (await response.json())["error"]["code"] == "hold_fenced"
                return 0
            stream = await Stream(response).rest()
            assert stream.final.channel_id == channel.id
            usage = stream.usage
            return int(usage["completion_tokens"]) * 20 + int(usage["prompt_tokens"]) if stream.text_chunks else 0

    half_units = sum(await asyncio.gather(*(ask(credential) for credential in credentials)))
    await world.settled()
    account = await world.account(channel)
    assert world.broadcasts() == before + 1
    assert account.owed_pico == half_units * 500_000
    assert not account.holds


async def test_t28_a_chain_that_is_down_is_a_503_and_the_retry_completes(world: World) -> None:
    """T-28: no chain, no open: 503 and never 402; the same credential completes when the chain is back."""
    restore = rpc_hook(world, lambda request, _: failing(request))
    channel, body = world.payer.channel(), chat("dev/story", max_tokens=5)
    credential = await world.pay(world.payer.open(channel), body)
    state = await world.state()
    reply = await world.send(body, credential)
    assert (reply.status, reply.code) == (503, "chain_unavailable")
    assert int(reply.headers["Retry-After"]) > 0
    assert await world.state() == state
    restore()
    async with world.stream(body, credential) as stream:
        await stream.rest()
    assert stream.final.spent == (5 * TOKEN_UNITS * 2 + 2) // 2


async def test_p24_a_deposit_under_the_minimum_is_not_broadcast(world: World) -> None:
    """P23: a deposit that costs more to settle than it holds is refused before it is taken."""
    channel = world.payer.channel(deposit=999)
    await refused_open(world, await world.pay(world.payer.open(channel, 1)), {"deposit_too_small"})
    assert (await world.manage(world.payer.open(world.payer.channel(deposit=1_000), 1))).status == 204


async def test_p6_an_open_of_a_channel_that_is_already_closing_serves_nothing(world: World) -> None:
    """P6: a payer who opens by themself, asks for the close and only then presents the open gets no service."""
    channel = world.payer.channel()
    raw = to_hex(channel.opening.raw)
    world.net.chain.handle({"id": 1, "method": "eth_sendRawTransactionSync", "params": [raw]})
    payers_call(world, channel, escrow_v2.encode_request_close(channel.descriptor))
    reply = await world.buy(chat(), world.payer.open(channel))
    assert reply.status in (402, 410), reply.body
    assert world.net.provider.requests == 0


async def test_t39_an_open_replayed_after_the_books_were_lost_serves_nothing_twice(world: World) -> None:
    """T-39: what the chain has paid out was earned before the store was lost: spent starts there, not at zero."""
    channel, payer = world.payer.channel(), world.payer
    world.net.chain.handle({"id": 1, "method": "eth_sendRawTransactionSync", "params": [to_hex(channel.opening.raw)]})
    settle = escrow_v2.encode_settle(channel.descriptor, Units(UNIT), payer.sign(channel, UNIT))
    payee = world.new_payer(world.net.payee_key)
    sent = payee.transaction((Call(V2.address, settle),)).raw
    reply = world.net.chain.handle({"id": 1, "method": "eth_sendRawTransactionSync", "params": [to_hex(sent)]})
    assert reply["result"]["status"] == "0x1"
    lower = await world.buy(chat(), payer.open(channel, UNIT - 1))
    assert (lower.status, lower.code) == (402, "voucher_too_low")
    equal = await world.buy(chat(), payer.open(channel, UNIT))
    assert (equal.status, equal.code) == (402, "insufficient_balance")
    assert (await world.account(channel)).spent == UNIT
    assert world.net.provider.requests == 0
    assert (await world.buy(chat(), payer.voucher(channel, 2 * UNIT))).status == 200


async def test_p3_parallel_buffered_requests_are_all_billed(world: World) -> None:
    """P3: ten whole answers asked for at once on one channel: what was delivered is what was charged, to the pico."""
    channel, body = await world.opened(cumulative=50 * UNIT), chat("dev/story", stream=False, max_tokens=20)
    credentials = [await world.pay(world.payer.voucher(channel, 50 * UNIT), body) for _ in range(10)]
    replies = await asyncio.gather(*(world.send(body, credential) for credential in credentials))
    await world.settled()
    served = [reply.json["usage"] for reply in replies if reply.status == 200]
    assert served, "the newest request is served"
    due = sum(cost(usage["completion_tokens"], usage["prompt_tokens"]) for usage in served)
    assert (await world.account(channel)).owed_pico == due
