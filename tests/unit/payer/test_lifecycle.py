"""The payer machine: resuming, losing and closing a channel; the signer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from channels.descriptor import ChainSnapshot
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.payer import model as m
from channels.payer.signer import sign_voucher
from channels.signature import parse_signature
from channels.units import Units
from channels.voucher import VoucherDomain
from channels.wire.receipt import SessionReceipt
from channels.wire.snapshot import SignedAmount
from tests.unit.payer.kit import (
    CHANNEL,
    DESCRIPTOR,
    ID,
    PAYER,
    POLICY,
    SIGNER,
    TERMS,
    V1,
    V2,
    chain,
    gave_up,
    need,
    offer,
    opened,
    receipt,
    session,
    snapshot,
    streaming,
    vouchers,
)

# --- resuming


def test_a_proven_snapshot_is_adopted_after_reading_the_chain() -> None:
    """Without memory, a snapshot with our own voucher is checked on chain and used; no second channel is opened."""
    made = session()
    terms = replace(TERMS, snapshot=snapshot(100, 60, 85))
    assert made.handle(offer(1, terms)) == (m.ReadChannel(CHANNEL, opening=False),)
    assert vouchers(made.handle(m.ChannelRead(chain(1_000, 40)))) == [100]
    assert (made.state.deposit, made.state.accepted, made.state.spent) == (1_000, 100, 60)


def test_money_settled_on_chain_is_spent() -> None:
    """Of two stories about what was spent, the chain's larger one is believed."""
    made = session()
    made.handle(offer(1, replace(TERMS, snapshot=snapshot(100, 10, 35))))
    assert vouchers(made.handle(m.ChannelRead(chain(1_000, 90)))) == [115]


@pytest.mark.parametrize(
    "change",
    [
        {"channel_id": ChannelId(b"\x01" * 32)},
        {"escrow": replace(V2, chain_id=1)},
        {"descriptor": replace(DESCRIPTOR, payer=Address(b"\x66" * 20))},
        {"descriptor": replace(DESCRIPTOR, payee=Address(b"\x66" * 20))},
        {"descriptor": replace(DESCRIPTOR, token=Address(b"\x66" * 20))},
        {"descriptor": replace(DESCRIPTOR, operator=Address(b"\x66" * 20))},
        {"descriptor": replace(DESCRIPTOR, authorized_signer=Address(b"\x66" * 20))},
        {"descriptor": replace(DESCRIPTOR, salt=Hash32(b"\x66" * 32))},
        {"descriptor": replace(DESCRIPTOR, expiring_nonce_hash=Hash32(b"\x66" * 32))},
        {"accepted": Units(99)},
        {"accepted": Units(101)},
        {"spent": Units(101)},
        {"settled": Units(1_001)},
        {"highest_voucher": None},
        {"highest_voucher": SignedAmount(Units(100), b"")},
        {"highest_voucher": SignedAmount(Units(100), b"\x01" * 65)},
        {"close_requested_at": UnixSeconds(1)},
    ],
    ids="-".join,
)
def test_p8_snapshots_that_do_not_prove_themselves_are_ignored(change: dict[str, Any]) -> None:
    """P8: one altered fact in a snapshot, and a channel of our own is opened instead."""
    terms = replace(TERMS, snapshot=replace(snapshot(100, 60, 85), **change))
    (action,) = session().handle(offer(1, terms))
    assert isinstance(action, m.OpenChannel)


def test_a_snapshot_beyond_the_channel_cap_is_ignored() -> None:
    """A channel on which more was signed than this policy allows is not continued."""
    (action,) = session(replace(POLICY, channel_cap=Units(99))).handle(offer(1, replace(TERMS, snapshot=snapshot(100, 60, 85))))
    assert isinstance(action, m.OpenChannel)


@pytest.mark.parametrize(
    ("read", "reclaimed"),
    [
        (chain(0), False),
        (chain(1_000, closing=5), False),
        (chain(99), True),
        (chain(1_000, settled=101), True),
        (None, True),
    ],
    ids=["closed", "closing", "small", "settled", "unreadable"],
)
def test_a_snapshot_the_chain_contradicts_is_dropped(read: ChainSnapshot | None, reclaimed: bool) -> None:
    """A channel the escrow shows closed, closing or inconsistent is not paid on; a new one is opened, without going in circles."""
    made = session()
    made.handle(offer(1, replace(TERMS, snapshot=snapshot(100, 60, 85))))
    actions = made.handle(m.ChannelRead(read))
    assert (m.Reclaim(CHANNEL) in actions) == reclaimed
    assert isinstance(actions[-1], m.OpenChannel)
    assert made.handle(m.ChannelRead(chain(1_000))) == ()


def test_a_channel_the_server_forgot_is_reclaimed_and_replaced() -> None:
    """After a 410 the deposit is asked back from the escrow and the repeated request opens a new channel."""
    made = opened()
    made.handle(offer(2))
    assert made.handle(m.ChannelGone(2)) == (m.Reclaim(CHANNEL),)
    (action,) = made.handle(offer(2, entropy=1))
    assert isinstance(action, m.OpenChannel)
    assert made.handle(m.ChannelGone(2)) == ()


def test_a_channel_being_reclaimed_is_not_taken_up_again() -> None:
    """A server that disowned a channel and then offers it back does not get it: its deposit is on the way home."""
    made = opened()
    made.handle(m.ChannelGone(2))
    (action,) = made.handle(offer(3, replace(TERMS, snapshot=snapshot(25, 25, 50))))
    assert isinstance(action, m.OpenChannel)


def test_a_410_to_an_opening_is_looked_up() -> None:
    """A 410 in answer to an opening does not prove that it did not happen."""
    made = session()
    made.handle(offer(1))
    made.handle(m.OpenPrepared(1, DESCRIPTOR))
    assert made.handle(m.ChannelGone(2)) == ()
    assert made.handle(m.ChannelGone(1)) == (m.ReadChannel(CHANNEL, opening=True),)
    assert made.handle(m.ChannelGone(1)) == ()


def test_a_410_leaves_nobody_waiting() -> None:
    """Requests that waited for a top-up of a channel that is gone are told."""
    made = streaming()
    made.handle(m.NeedVoucherSeen(2, need(1_100)))
    actions = made.handle(m.ChannelGone(2))
    assert actions == (m.Reclaim(CHANNEL), m.GiveUp(2, m.GiveUpReason.NO_CHANNEL))


# --- closing

TX = Hash32(b"\xcd" * 32)


def test_closing_takes_what_was_spent() -> None:
    """T-65: a close is signed for what was signed already, and ends with the server's receipt for exactly that."""
    made = opened()
    assert made.handle(m.CloseRequested()) == (m.Close(CHANNEL, Units(25)),)
    assert gave_up(made.handle(offer(2))) == [m.GiveUpReason.CLOSING]
    answer = m.CloseAnswered(ok=True, challenge_id="c", receipt=receipt(25, 25, "c", tx=TX))
    assert made.handle(answer) == (m.Closed(CHANNEL, Units(25), TX),)
    assert made.state == m.PayerState(m.counterparty_of(TERMS))
    assert made.handle(answer) == ()


def test_v1_close_signs_only_what_was_spent() -> None:
    """On v1 the close voucher is the payout, so an unspent remainder is not in it; with a request running, all is."""
    terms = replace(TERMS, escrow=V1)
    for running in (False, True):
        made = opened(terms=terms)
        assert made.state.channel is not None
        made.handle(offer(2, terms))
        made.handle(m.Answered(2, ok=True, receipt=receipt(50, 31, channel=made.state.channel.id)))
        if not running:
            made.handle(m.RequestEnded(2))
        (action,) = made.handle(m.CloseRequested())
        assert isinstance(action, m.Close)
        assert action.cumulative == (50 if running else 31)


def test_a_low_close_is_repeated_with_all_that_can_be_owed() -> None:
    """T-64: a refused close is repeated once with the most ever signed; refused again, the escrow is asked."""
    made = opened()
    made.handle(offer(2))
    made.handle(m.Answered(2, ok=False))
    made.handle(m.RequestEnded(2))
    assert made.handle(m.CloseRequested()) == (m.Close(CHANNEL, Units(25)),)
    assert made.handle(m.CloseAnswered(ok=False, challenge_id="c")) == (m.Close(CHANNEL, Units(50)),)
    actions = made.handle(m.CloseAnswered(ok=False, challenge_id="d"))
    assert actions == (m.GiveUp(None, m.GiveUpReason.CLOSE_REFUSED), m.Reclaim(CHANNEL))


@pytest.mark.parametrize(
    "claim",
    [
        None,
        receipt(25, 25, "c"),
        receipt(25, 25, "other", tx=TX),
        receipt(24, 24, "c", tx=TX),
        receipt(25, 24, "c", tx=TX),
        receipt(25, 26, "c", tx=TX),
        receipt(25, 25, "c", ChannelId(b"\x01" * 32), TX),
    ],
    ids=["none", "no tx", "challenge", "amount", "spent fell", "inflated", "channel"],
)
def test_t65_a_close_is_believed_only_with_its_receipt(claim: SessionReceipt | None) -> None:
    """T-65: a close without the right receipt is not taken for one: the escrow is asked for the deposit."""
    made = opened()
    made.handle(m.CloseRequested())
    actions = made.handle(m.CloseAnswered(ok=True, challenge_id="c", receipt=claim))
    assert actions == (m.GiveUp(None, m.GiveUpReason.BAD_RECEIPT), m.Reclaim(CHANNEL))
    assert made.state.phase is m.PayerPhase.ABSENT


def test_there_must_be_something_to_close() -> None:
    """Closing without an open channel is refused; closing while others wait for a top-up tells them."""
    assert gave_up(session().handle(m.CloseRequested())) == [m.GiveUpReason.NO_CHANNEL]
    made = streaming()
    made.handle(m.NeedVoucherSeen(2, need(1_100)))
    actions = made.handle(m.CloseRequested())
    assert actions == (m.Close(CHANNEL, Units(50)), m.GiveUp(2, m.GiveUpReason.CLOSING))


# --- signer


def test_the_key_is_never_shown() -> None:
    """A signer shows its address and nothing of its key."""
    shown = repr(SIGNER) + str(SIGNER)
    assert "11" * 32 not in shown
    assert SIGNER.address.hex() in shown


def test_vouchers_verify() -> None:
    """A signed voucher verifies for its channel and amount and for no other."""
    domain = VoucherDomain(V2)
    signature = sign_voucher(SIGNER, domain, ID, Units(25))
    domain.verify(ID, 25, parse_signature(signature), PAYER)
    with pytest.raises(Exception, match="signer"):
        domain.verify(ID, 26, parse_signature(signature), PAYER)
