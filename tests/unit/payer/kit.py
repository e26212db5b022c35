"""What the payer tests share: one payer, one payee, and short ways to say what was heard."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from channels.descriptor import RESERVE_ADDRESS, ChainSnapshot, Descriptor, Escrow, SessionProtocol
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.instants import UnixMillis, UnixSeconds
from channels.payer import model as m
from channels.payer.session import PayerSession
from channels.payer.signer import LocalSigner, sign_voucher
from channels.units import Units
from channels.voucher import VoucherDomain, derive_channel_id
from channels.wire.challenge import ChallengeMac, expires_text
from channels.wire.receipt import SessionReceipt
from channels.wire.request import SessionRequest
from channels.wire.snapshot import SessionSnapshot, SignedAmount
from channels.wire.sse import NeedVoucher

NOW = UnixMillis(1_893_456_000_000)
MAC = ChallengeMac((b"k" * 32,))
SIGNER = LocalSigner(b"\x11" * 32)
PAYER, PAYEE, TOKEN = SIGNER.address, Address(b"\x15" * 20), Address(b"\x20" * 20)
V2 = Escrow(SessionProtocol.V2, 42_431, RESERVE_ADDRESS)
V1 = Escrow(SessionProtocol.V1, 42_431, Address(b"\xe1" * 20))
POLICY = m.PayerPolicy(
    payer=PAYER,
    signer=PAYER,
    escrows=frozenset({V1, V2}),
    tokens=frozenset({TOKEN}),
    request_cap=Units(500),
    channel_cap=Units(5_000),
    max_deposit=Units(10_000),
)
TERMS = SessionRequest(
    amount=Units(25),
    currency=TOKEN,
    recipient=PAYEE,
    unit_type="token",
    escrow=V2,
    suggested_deposit=Units(1_000),
)
DESCRIPTOR = Descriptor(PAYER, PAYEE, ZERO_ADDRESS, TOKEN, Hash32(b"\x77" * 32), PAYER, Hash32(b"\x99" * 32))
ID = derive_channel_id(V2, DESCRIPTOR)
CHANNEL = m.Channel(ID, DESCRIPTOR, V2)


def session(policy: m.PayerPolicy = POLICY, terms: SessionRequest = TERMS) -> PayerSession:
    return PayerSession(policy, m.counterparty_of(terms))


def offer(request: int, terms: SessionRequest = TERMS, entropy: int = 0, **changes: Any) -> m.ChallengeSeen:
    arguments: dict[str, Any] = {
        "realm": "r",
        "method": "tempo",
        "intent": "session",
        "request": terms.encode(),
        "expires": expires_text(UnixMillis(NOW + 300_000), entropy),
    }
    return m.ChallengeSeen(request, MAC.issue(**(arguments | changes)), NOW)


def receipt(accepted: int, spent: int, challenge: str = "", channel: ChannelId = ID, tx: Hash32 | None = None) -> SessionReceipt:
    return SessionReceipt(NOW, challenge, channel, Units(accepted), Units(spent), tx_hash=tx)


def need(required: int, accepted: int = 0, channel: ChannelId = ID) -> NeedVoucher:
    return NeedVoucher(channel, Units(required), Units(accepted), Units(1))


def snapshot(accepted: int, spent: int, required: int) -> SessionSnapshot:
    signature = sign_voucher(SIGNER, VoucherDomain(V2), ID, Units(accepted))
    return SessionSnapshot(
        channel_id=ID,
        escrow=V2,
        descriptor=DESCRIPTOR,
        deposit=Units(1_000),
        settled=Units(0),
        spent=Units(spent),
        accepted=Units(accepted),
        required=Units(required),
        highest_voucher=SignedAmount(Units(accepted), signature),
    )


def chain(deposit: int, settled: int = 0, closing: int | None = None) -> ChainSnapshot:
    return ChainSnapshot(Units(deposit), Units(settled), None if closing is None else UnixSeconds(closing), 7)


def gave_up(actions: tuple[m.Action, ...]) -> list[m.GiveUpReason]:
    return [action.reason for action in actions if isinstance(action, m.GiveUp)]


def opened(policy: m.PayerPolicy = POLICY, terms: SessionRequest = TERMS) -> PayerSession:
    """A session whose request 1 opened the channel and is over; 25 accepted and 25 spent."""
    made = session(policy, terms)
    made.handle(offer(1, terms))
    made.handle(m.OpenPrepared(1, DESCRIPTOR))
    assert made.handle(m.Answered(1, ok=True)) == ()
    assert made.state.channel is not None
    made.handle(m.ReceiptSeen(1, receipt(25, 25, channel=made.state.channel.id)))
    made.handle(m.RequestEnded(1))
    assert made.state.phase is m.PayerPhase.OPEN
    return made


def vouchers(actions: tuple[m.Action, ...]) -> list[int]:
    return [action.cumulative for action in actions if isinstance(action, m.SignVoucher)]


WIDE = replace(POLICY, request_cap=Units(5_000))


def streaming(policy: m.PayerPolicy = WIDE, terms: SessionRequest = TERMS) -> PayerSession:
    made = opened(policy, terms)
    made.handle(offer(2, terms))
    made.handle(m.Answered(2, ok=True))
    return made
