"""Traps of vouchers: T-29 to T-42, P1, P2, P10 to P12 and P21."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest

from channels import escrow as escrow_v2
from channels import escrow_v1
from channels.descriptor import Escrow
from channels.ids import Hash32
from channels.model import Phase, VoucherAccepted
from channels.signature import CURVE_ORDER
from channels.units import MAX_UINT96, Units
from channels.wire.credential import source_of
from mppnode.cli.devnet import CHAIN_ID, DevnetOptions
from mppnode.config.schema import SessionConfig
from tests.http.test_open_traps import BOTH, payers_call
from tests.support.http_client import DEPOSIT, UNIT, V1, V2, World, bent, chat, cost, new_world


async def refused(world: World, credential: str, code: str, *, status: int = 402, body: object = None) -> None:
    """A refusal that leaves every account, journal, balance and provider untouched."""
    state = await world.state()
    reply = await world.send(body, credential)
    assert (reply.status, reply.code) == (status, code), reply.body
    assert reply.challenges
    assert "Payment-Receipt" not in reply.headers
    assert await world.state() == state


@BOTH
async def test_t29_an_equal_voucher_is_the_same_answer(world: World, escrow: Escrow) -> None:
    """T-29, P2: a bodyless repeat of the highest voucher is answered alike, and moves nothing."""
    channel = await world.opened(escrow)
    first = await world.manage(world.payer.voucher(channel, 2 * UNIT))
    state = await world.state()
    for _ in range(30):
        again = await world.manage(world.payer.voucher(channel, 2 * UNIT))
        assert again.status == 204
        assert again.receipt is not None
        assert first.receipt is not None
        assert replace(again.receipt, challenge_id="") == replace(first.receipt, challenge_id="")
    assert await world.state() == state


async def test_t29_p2_an_equal_voucher_buys_only_what_is_left(world: World) -> None:
    """T-29, P2: a voucher is a permission, not a ticket: repeats buy until it is used up, and not one token more."""
    channel = await world.opened(deposit=DEPOSIT, cumulative=110)
    body, answers = chat("dev/story", stream=False, max_tokens=4), 0
    while True:
        reply = await world.buy(body, world.payer.voucher(channel, 110))
        if reply.status != 200:
            break
        answers += 1
        usage = reply.json["usage"]
        assert usage["completion_tokens"] == 4
    assert (reply.status, reply.code) == (402, "insufficient_balance")
    account = await world.account(channel)
    assert account.owed_pico == answers * cost(4, usage["prompt_tokens"])
    assert answers == 2, "the third would not fit its worst case under the voucher"


async def test_t29_t30_one_credential_buys_once(world: World) -> None:
    """T-29, T-30: the same voucher under one challenge, fifteen times at once and by two methods: one response."""
    channel = await world.opened()
    body = chat("dev/story", max_tokens=5)
    credential = await world.pay(world.payer.voucher(channel, 2 * UNIT), body)
    sends = [world.send(body, credential) for _ in range(15)]
    sends += [world.send(None, credential, method="HEAD"), world.send(None, credential)]
    replies = await asyncio.gather(*sends)
    content, management = replies[:15], replies[15:]
    assert sorted(reply.status for reply in content) == [200] + [402] * 14
    assert {reply.code for reply in content if reply.status == 402} == {"credential_used"}
    assert [reply.status for reply in management] == [204, 204]
    assert world.net.provider.requests == 1
    assert (await world.account(channel)).owed_pico == cost(5, 2)


@BOTH
async def test_t31_a_lower_voucher_is_refused(world: World, escrow: Escrow) -> None:
    """T-31: it neither lowers the highest nor serves."""
    channel = await world.opened(escrow)
    assert (await world.manage(world.payer.voucher(channel, 3 * UNIT))).status == 204
    lower = world.payer.voucher(channel, 3 * UNIT - 1)
    await refused(world, await world.pay(lower), "voucher_too_low")
    body = chat()
    await refused(world, await world.pay(lower, body), "voucher_too_low", body=body)


def twin(signature: bytes) -> bytes:
    """The high-s signature of the same key over the same digest."""
    s = CURVE_ORDER - int.from_bytes(signature[32:64])
    return signature[:32] + s.to_bytes(32) + bytes((55 - signature[64],))


def shapes(good: bytes) -> dict[str, str]:
    """Everything a signature may look like that is not one we pay on."""
    r, s, v = good[:32], good[32:64], good[64]
    order = CURVE_ORDER.to_bytes(32)
    raw = {
        "high-s": twin(good),
        "v-0-or-1": r + s + bytes((v - 27,)),
        "v-29": r + s + b"\x1d",
        "v-35": r + s + b"\x23",
        "other-v": r + s + bytes((55 - v,)),
        "compact": r + (int.from_bytes(s) | ((v - 27) << 255)).to_bytes(32),
        "r-zero": bytes(32) + s + good[64:],
        "s-zero": r + bytes(32) + good[64:],
        "r-order": order + s + good[64:],
        "s-order": r + order + good[64:],
        "all-zero": bytes(64) + b"\x1b",
        "all-ff": b"\xff" * 65,
        "keychain": b"\x03" + bytes(20) + good,
        "keychain-2": b"\x04" + bytes(20) + good,
        "p256": b"\x01" + bytes(129),
        "webauthn": b"\x02" + bytes(300),
        "wrapped": b"\x00" + good,
        "erc6492": good + bytes.fromhex("6492" * 16),
        "empty": b"",
        "short": good[:-1],
        "long": good + b"\0",
        "4-kB": bytes(4_000),
    }
    texts = {name: "0x" + value.hex() for name, value in raw.items()}
    return texts | {"odd": "0x" + good.hex()[:-1], "no-prefix": good.hex(), "spaces": "0x " + good.hex(), "word": "sig"}


@pytest.mark.parametrize("action", ["voucher", "close", "open"])
async def test_t32_t33_p21_only_canonical_signatures_count(world: World, action: str) -> None:
    """T-32, T-33, P21: high-s twins, compact and wrapped forms, odd lengths: invalid signatures, never a 500."""
    channel = await world.opened()
    payload: Any = {
        "voucher": world.payer.voucher(channel, 2 * UNIT),
        "close": world.payer.close(channel, 2 * UNIT),
        "open": world.payer.open(world.payer.channel()),
    }[action]
    for name, text in shapes(payload.signature).items():
        if action != "open":
            world.clock.advance(1)  # the voucher rate is another test's subject
        credential = bent(await world.pay(payload), "payload.signature", text)
        await refused(world, credential, "invalid_signature")
        assert name
    for value in (None, 5, [], {}, ...):
        credential = bent(await world.pay(payload), "payload.signature", value)
        await refused(world, credential, "invalid_signature")
    assert (await world.manage(payload)).status == 204, "the signature itself is good"


AMOUNTS = [
    "1e3", "-1", "0x10", "01", "", " 2000", "2000 ", "+2000", "2_000", "2000\n", "2000.0", "2,000",
    "\u0662\u0660\u0660\u0660", "\uff12\uff10\uff10\uff10", "NaN", "null", str(2**96), str(2**128), str(2**256),
    "9" * 5_000, 2000, 2000.5, True, None, [], {}, ["2000"],
]  # fmt: skip


@pytest.mark.parametrize("value", AMOUNTS, ids=lambda value: repr(value)[:20])
async def test_t34_p11_amounts_are_canonical_decimal_strings(world: World, value: object) -> None:
    """T-34, P11: whatever ``int()`` would also take is refused as an invalid payload, in every action that has one."""
    channel = await world.opened()
    payloads = {
        "cumulativeAmount": [world.payer.voucher(channel, 2_000), world.payer.close(channel, 2_000), world.payer.open(world.payer.channel(), 2_000)],
        "additionalDeposit": [world.payer.top_up(channel, 2_000)],
    }
    expected = "malformed_credential" if isinstance(value, float) else "invalid_payload"
    for name, each in payloads.items():
        for payload in each:
            await refused(world, bent(await world.pay(payload), f"payload.{name}", value), expected)


async def test_t34_the_largest_amount_is_an_amount(world: World) -> None:
    """T-34: 2**96 - 1 is read without overflow and refused only because the deposit is smaller."""
    channel = await world.opened()
    await refused(world, await world.pay(world.payer.voucher(channel, MAX_UINT96)), "voucher_exceeds_deposit")
    await refused(world, await world.pay(world.payer.close(channel, MAX_UINT96)), "voucher_exceeds_deposit")
    assert (await world.manage(world.payer.voucher(channel, DEPOSIT))).status == 204
    await refused(world, await world.pay(world.payer.voucher(channel, DEPOSIT + 1)), "voucher_exceeds_deposit")


@BOTH
async def test_t35_p12_a_channel_id_has_one_record_however_it_is_spelled(world: World, escrow: Escrow) -> None:
    """T-35, P12: upper and mixed case name the same channel; answers are in lower case; other spellings are refused."""
    channel = await world.opened(escrow)
    digits = channel.id.hex()
    spellings = ["0x" + digits.upper(), "0x" + "".join(c.upper() if n % 2 else c for n, c in enumerate(digits))]
    for number, text in enumerate(spellings, start=2):
        credential = bent(await world.pay(world.payer.voucher(channel, number * UNIT)), "payload.channelId", text)
        reply = await world.send(None, credential)
        assert reply.status == 204, reply.body
        assert reply.receipt is not None
        assert reply.receipt.to_json()["channelId"] == "0x" + digits
    assert world.net.node.books is not None
    assert len(await world.net.node.books.accounts()) == 1
    for text in ("0X" + digits, digits, "0x" + digits[:-1], "0x" + digits + "00", "0x" + digits[:-1] + "\uff11", " 0x" + digits, None, 7):
        credential = bent(await world.pay(world.payer.voucher(channel, 9 * UNIT)), "payload.channelId", text)
        await refused(world, credential, "invalid_payload")


async def test_t36_p8_vouchers_of_other_channels_do_not_count(world: World) -> None:
    """T-36, P8: an unknown channel is gone, another's signature is invalid, and the refusal tells nothing more."""
    mine, other = await world.opened(), world.new_payer()
    theirs = await world.opened(payer=other)
    unknown = world.payer.channel()
    await refused(world, await world.pay(world.payer.voucher(unknown, UNIT)), "channel_not_found", status=410)
    stolen = replace(other.voucher(theirs, 2 * UNIT), channel_id=mine.id)
    await refused(world, await world.pay(stolen), "descriptor_mismatch")
    crossed = replace(world.payer.voucher(mine, 2 * UNIT), signature=other.sign(theirs, 2 * UNIT))
    await refused(world, await world.pay(crossed), "invalid_signature")
    for domain in (replace(mine, escrow=Escrow(V2.protocol, 4217, V2.address)), replace(mine, escrow=V1)):
        foreign = replace(world.payer.voucher(mine, 2 * UNIT), signature=world.payer.sign(domain, 2 * UNIT))
        await refused(world, await world.pay(foreign), "invalid_signature")
    elsewhere = replace(world.payer.voucher(mine, 2 * UNIT), signature=other.sign(mine, 2 * UNIT))
    await refused(world, await world.pay(elsewhere), "invalid_signature")


@BOTH
async def test_t37_small_steps_are_refused_and_repeats_are_not(escrow: Escrow) -> None:
    """T-37: with a least step of 10, nine more is too little, ten more is accepted, and zero more is a repeat."""
    protocols = (V2.protocol, V1.protocol)
    session = SessionConfig(protocols, Units(1_000), Units(100_000), min_voucher_delta=Units(10), chain_ttl_s=0)
    async with new_world(DevnetOptions(tokens_per_second=0.0, session=session)) as world:
        channel = await world.opened(escrow)
        await refused(world, await world.pay(world.payer.voucher(channel, UNIT + 9)), "voucher_delta_too_small")
        assert (await world.manage(world.payer.voucher(channel, UNIT))).status == 204
        assert (await world.manage(world.payer.voucher(channel, UNIT + 10))).status == 204
        assert (await world.account(channel)).accepted == UNIT + 10


@BOTH
async def test_t38_a_close_request_on_chain_stops_the_channel(world: World, escrow: Escrow) -> None:
    """T-38: seen with the next voucher: 410, nothing new is accepted or served, what was spent stays owed."""
    channel = await world.opened(escrow)
    reply = await world.buy(chat("dev/story", max_tokens=5), world.payer.voucher(channel, 2 * UNIT))
    assert reply.status == 200
    if escrow is V2:
        payers_call(world, channel, escrow_v2.encode_request_close(channel.descriptor))
    else:
        payers_call(world, channel, escrow_v1.encode_request_close(channel.id))
    for body in (None, chat()):
        answer = await world.buy(body, world.payer.voucher(channel, 3 * UNIT))
        assert (answer.status, answer.code) == (410, "channel_finalized")
    account = await world.account(channel)
    assert (account.phase, account.accepted, account.spent) == (Phase.CONTESTED, 2 * UNIT, 51)
    assert world.net.provider.requests == 1
    assert (await world.manage(world.payer.close(channel, 2 * UNIT))).status == 204, "we can still close and be paid"


async def test_t40_a_restart_forgets_nothing(world: World) -> None:
    """T-40: what was accepted and spent is there after a restart, and the used credential stays used."""
    channel, body = await world.opened(), chat("dev/story", max_tokens=5)
    credential = await world.pay(world.payer.voucher(channel, 5 * UNIT), body)
    assert (await world.send(body, credential)).status == 200
    before = await world.account(channel)
    await world.net.node.stop()
    world.net.node = world.net.new_node()
    await world.net.node.start()
    assert await world.account(channel) == before
    await refused(world, credential, "credential_used", body=body)
    assert (await world.buy(body, world.payer.voucher(channel, 5 * UNIT))).status == 200


async def test_t42_the_source_must_be_the_payer_or_the_signer(world: World) -> None:
    """T-42: another address, another chain or no did:pkh is refused; the signer's own and none at all are fine."""
    channel, other = await world.opened(), world.new_payer()
    voucher = world.payer.voucher(channel, 2 * UNIT)
    mine = world.payer.address
    for source in (
        source_of(CHAIN_ID, other.address),
        source_of(CHAIN_ID + 1, mine),
        "did:pkh:eip155:1337:0x00",
        "did:web:example.com",
        "0x" + mine.hex(),
        "",
        f"did:pkh:eip155:01337:0x{mine.hex()}",
        f"did:pkh:eip155:1337:0x{mine.hex()}\n",
    ):
        for payload in (voucher, world.payer.close(channel, UNIT), world.payer.open(world.payer.channel())):
            await refused(world, await world.pay(payload, source=source), "source_mismatch")
    assert (await world.manage(voucher, source=source_of(CHAIN_ID, mine).upper().replace("DID:PKH:EIP155:1337:0X", "did:pkh:eip155:1337:0x"))).status == 204
    assert (await world.manage(world.payer.voucher(channel, 3 * UNIT), source=None)).status == 204


async def test_p1_vouchers_race_in_any_order(world: World) -> None:
    """P1: of twenty vouchers at once, in any order, the highest wins; each accepted once; receipts never fall back."""
    channel, rounds = await world.opened(), random.Random(1)
    for start in range(2, 62, 20):
        world.clock.advance(10)
        amounts = [n * UNIT for n in range(start, start + 20)]
        rounds.shuffle(amounts)
        credentials = [await world.pay(world.payer.voucher(channel, amount)) for amount in amounts]
        replies = await asyncio.gather(*(world.send(None, credential) for credential in credentials))
        for amount, reply in zip(amounts, replies, strict=True):
            assert reply.status == 204 or reply.code == "voucher_too_low"
            assert reply.receipt is None or reply.receipt.accepted >= amount
        assert (await world.account(channel)).accepted == max(amounts)
    assert world.net.node.books is not None
    events = await world.net.node.books.journal(channel.id)
    rungs = [event.ladder[-1].cumulative for event in events if isinstance(event, VoucherAccepted)]
    assert rungs == sorted(set(rungs))


async def test_p10_a_flood_of_vouchers_is_limited_and_repeats_are_free(world: World) -> None:
    """P10: twenty at once, then ten a second; refused with a time to come back; an equal voucher costs no check."""
    channel = await world.opened()
    accepted = 0
    for number in range(2, 42):
        reply = await world.manage(world.payer.voucher(channel, UNIT + number))
        if reply.status == 204:
            accepted += 1
        else:
            assert (reply.status, reply.code) == (429, "rate_limited")
            assert int(reply.headers["Retry-After"]) >= 1
    assert accepted == 20
    equal = (await world.account(channel)).accepted
    for _ in range(30):
        assert (await world.manage(world.payer.voucher(channel, equal))).status == 204
    world.clock.advance(1)
    answers = [(await world.manage(world.payer.voucher(channel, 2 * UNIT + n))).status for n in range(15)]
    assert answers == [204] * 10 + [429] * 5


async def test_p10_lower_vouchers_cost_no_check(world: World) -> None:
    """P10: an old voucher is refused by comparison alone, so a flood of them uses up nobody's rate."""
    channel = await world.opened(cumulative=5 * UNIT)
    for _ in range(40):
        assert (await world.manage(world.payer.voucher(channel, UNIT))).code == "voucher_too_low"
    assert (await world.manage(world.payer.voucher(channel, 6 * UNIT))).status == 204


async def test_p8_a_delegates_key_cannot_move_another_channel(world: World) -> None:
    """P8: two channels of one payer with different signers do not accept each other's vouchers."""
    delegate = world.new_payer()
    channel = world.payer.channel(call={"authorized_signer": delegate.address, "salt": Hash32(b"\x01" * 32)})
    assert (await world.manage(world.payer.open(channel, key=delegate.key))).status == 204
    plain = await world.opened()
    await refused(world, await world.pay(world.payer.voucher(plain, 2 * UNIT, key=delegate.key)), "invalid_signature")
    assert (await world.manage(world.payer.voucher(channel, 2 * UNIT, key=delegate.key), source=source_of(CHAIN_ID, delegate.address))).status == 204
