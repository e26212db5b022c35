"""The payer machine: opening, paying, mid-stream vouchers and top-ups, one promise at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.instants import UnixMillis
from channels.payer import model as m
from channels.units import Units
from channels.wire.receipt import SessionReceipt
from channels.wire.snapshot import SignedAmount
from channels.wire.sse import NeedVoucher
from tests.unit.payer.kit import (
    CHANNEL,
    DESCRIPTOR,
    NOW,
    PAYER,
    POLICY,
    TERMS,
    V1,
    V2,
    WIDE,
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

# --- opening


def test_first_challenge_opens_a_channel_for_one_unit() -> None:
    """The first payment opens a channel with the suggested deposit, and its first voucher covers exactly one unit."""
    made = session()
    seen = offer(1)
    (ask,) = made.handle(seen)
    assert ask == m.OpenChannel(1, m.counterparty_of(TERMS), ZERO_ADDRESS, PAYER, Units(1_000), fee_payer=False, fee_token=None)
    assert made.handle(m.OpenPrepared(1, DESCRIPTOR)) == (m.SendOpen(1, CHANNEL, Units(1_000), Units(25)),)
    assert made.handle(m.Answered(1, ok=True, receipt=receipt(25, 25, seen.challenge.id))) == ()
    assert (made.state.phase, made.state.deposit, made.state.accepted, made.state.spent) == (m.PayerPhase.OPEN, 1_000, 25, 25)


@pytest.mark.parametrize(
    ("policy", "suggested", "deposit"),
    [
        (POLICY, None, 25),
        (POLICY, 10, 25),
        (POLICY, 1_000, 1_000),
        (POLICY, 99_000, 5_000),
        (replace(POLICY, max_deposit=Units(600)), 1_000, 600),
        (replace(POLICY, deposit=Units(7_000)), 1_000, 7_000),
        (replace(POLICY, max_deposit=Units(24)), 1_000, None),
        (replace(POLICY, deposit=Units(24)), 1_000, None),
        (replace(POLICY, channel_cap=Units(24)), 1_000, None),
        (replace(POLICY, request_cap=Units(24)), 1_000, None),
    ],
)
def test_deposit_choice(policy: m.PayerPolicy, suggested: int | None, deposit: int | None) -> None:
    """The deposit is ours if configured, else the suggestion, and never beyond our caps; too small a cap opens nothing."""
    terms = replace(TERMS, suggested_deposit=None if suggested is None else Units(suggested))
    (action,) = session(policy).handle(offer(1, terms))
    if deposit is None:
        assert isinstance(action, m.GiveUp)
    else:
        assert isinstance(action, m.OpenChannel)
        assert action.deposit == deposit


def test_a_policy_cannot_contradict_itself() -> None:
    """A chosen deposit above the largest allowed one is refused at configuration."""
    with pytest.raises(ValueError):
        replace(POLICY, deposit=Units(10_001))


@pytest.mark.parametrize(
    "change",
    [
        {"payer": Address(b"\x66" * 20)},
        {"payee": Address(b"\x66" * 20)},
        {"token": Address(b"\x66" * 20)},
        {"operator": Address(b"\x66" * 20)},
        {"authorized_signer": Address(b"\x66" * 20)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_nothing_is_signed_for_a_channel_that_was_not_asked_for(change: dict[str, Address]) -> None:
    """A prepared opening that names other parties is refused before its voucher is signed."""
    made = session()
    made.handle(offer(1))
    actions = made.handle(m.OpenPrepared(1, replace(DESCRIPTOR, **change)))
    assert gave_up(actions) == [m.GiveUpReason.FOREIGN_CHANNEL]
    assert made.state.phase is m.PayerPhase.ABSENT
    assert made.state.signed_max == 0


def test_the_advertised_operator_is_part_of_the_channel() -> None:
    """An operator named in the challenge must be in the descriptor; none named means the zero address."""
    terms = replace(TERMS, operator=Address(b"\x0a" * 20))
    made = session()
    (ask,) = made.handle(offer(1, terms))
    assert isinstance(ask, m.OpenChannel)
    assert ask.operator == terms.operator
    (send,) = made.handle(m.OpenPrepared(1, replace(DESCRIPTOR, operator=ask.operator)))
    assert isinstance(send, m.SendOpen)


def test_t27_parallel_first_requests_open_one_channel() -> None:
    """T-27: five first requests at once give one opening and then vouchers 25 to 125."""
    made = session()
    first = [made.handle(offer(number, entropy=number)) for number in range(1, 6)]
    assert [len(actions) for actions in first] == [1, 0, 0, 0, 0]
    made.handle(m.OpenPrepared(1, DESCRIPTOR))
    actions = made.handle(m.Answered(1, ok=True))
    assert vouchers(actions) == [50, 75, 100, 125]


def test_a_failed_opening_is_looked_up_and_taken_over() -> None:
    """An opening answered by a plain 5xx is looked for on chain; found there, the next request pays on it, not on a new one."""
    made = session()
    made.handle(offer(1))
    made.handle(m.OpenPrepared(1, DESCRIPTOR))
    assert made.handle(m.Answered(1, ok=False)) == (m.ReadChannel(CHANNEL, opening=True),)
    made.handle(m.RequestEnded(1))
    assert made.handle(offer(2)) == ()
    actions = made.handle(m.ChannelRead(chain(1_000)))
    assert actions == (m.SignVoucher(2, CHANNEL, Units(25), m.Purpose.CONTENT),)
    assert made.state.deposit == 1_000


def test_an_opening_that_never_happened_is_tried_again() -> None:
    """A refused opening the escrow does not show is repeated, at most three times for one request."""
    made = session()
    opens = 0
    heard: m.Input = offer(1)
    for attempt in range(5):
        actions = made.handle(heard)
        if gave_up(actions):
            assert gave_up(actions) == [m.GiveUpReason.TOO_MANY_ATTEMPTS]
            break
        assert [type(action) for action in actions] == [m.OpenChannel]
        opens += 1
        made.handle(m.OpenPrepared(1, replace(DESCRIPTOR, salt=Hash32(bytes([attempt]) * 32))))
        (read,) = made.handle(offer(1, entropy=attempt))
        assert isinstance(read, m.ReadChannel)
        heard = m.ChannelRead(chain(0))
    assert opens == 3


def test_an_unreadable_opening_is_reclaimed() -> None:
    """When nobody can say whether the channel exists, its deposit is asked back before it is forgotten."""
    made = session()
    made.handle(offer(1))
    made.handle(m.OpenPrepared(1, DESCRIPTOR))
    made.handle(m.Answered(1, ok=False))
    assert made.handle(m.ChannelRead(None)) == (m.Reclaim(CHANNEL),)
    assert made.state.phase is m.PayerPhase.ABSENT


def test_a_receipt_on_a_failed_answer_keeps_the_channel() -> None:
    """T-49: a 500 with the right receipt acknowledges the opening, and the next call uses the same channel and voucher."""
    made = session()
    seen = offer(1)
    made.handle(seen)
    made.handle(m.OpenPrepared(1, DESCRIPTOR))
    assert made.handle(m.Answered(1, ok=False, receipt=receipt(25, 0, seen.challenge.id))) == ()
    made.handle(m.RequestEnded(1))
    assert made.handle(offer(2)) == (m.SignVoucher(2, CHANNEL, Units(25), m.Purpose.CONTENT),)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda seen: receipt(25, 0, "other"),
        lambda seen: receipt(24, 0, seen.challenge.id),
        lambda seen: receipt(26, 0, seen.challenge.id),
        lambda seen: receipt(25, 0, seen.challenge.id, ChannelId(b"\x01" * 32)),
    ],
    ids=["challenge", "low", "inflated", "channel"],
)
def test_a_wrong_receipt_does_not_acknowledge_an_opening(wrong: Any) -> None:
    """A receipt for another challenge, channel or amount proves nothing: the chain is asked."""
    made = session()
    seen = offer(1)
    made.handle(seen)
    made.handle(m.OpenPrepared(1, DESCRIPTOR))
    actions = made.handle(m.Answered(1, ok=True, receipt=wrong(seen)))
    assert gave_up(actions)
    assert m.ReadChannel(CHANNEL, opening=True) in actions
    assert made.state.accepted == 0


def test_a_snapshot_in_a_402_acknowledges_an_opening() -> None:
    """T-49: a 402 with a snapshot of the opened channel is paid at once with a voucher, without asking the chain."""
    made = session()
    made.handle(offer(1))
    made.handle(m.OpenPrepared(1, DESCRIPTOR))
    actions = made.handle(offer(1, replace(TERMS, snapshot=snapshot(25, 0, 25))))
    assert actions == (m.SignVoucher(1, CHANNEL, Units(50), m.Purpose.CONTENT),)


def test_an_aborted_opening_lets_the_next_request_try() -> None:
    """When the transaction cannot be made, the request fails and the one waiting behind it opens for itself."""
    made = session()
    made.handle(offer(1))
    made.handle(offer(2))
    actions = made.handle(m.OpenAborted(1))
    assert gave_up(actions) == [m.GiveUpReason.OPEN_FAILED]
    assert [action.request for action in actions if isinstance(action, m.OpenChannel)] == [2]
    assert gave_up(made.handle(m.OpenAborted(1))) == [m.GiveUpReason.OPEN_FAILED]


def test_a_request_that_ends_while_opening_strands_nothing() -> None:
    """Cancelled before the transaction exists, the opening is forgotten; cancelled after, it is looked up."""
    made = session()
    made.handle(offer(1))
    assert made.handle(m.RequestEnded(1)) == ()
    assert made.state.phase is m.PayerPhase.ABSENT
    made.handle(offer(2))
    made.handle(m.OpenPrepared(2, DESCRIPTOR))
    assert made.handle(m.RequestEnded(2)) == (m.ReadChannel(CHANNEL, opening=True),)


# --- paying


def test_the_next_voucher_covers_what_is_owed_and_no_more() -> None:
    """On a metered service the unspent remainder is used before more is signed."""
    made = opened()
    assert vouchers(made.handle(offer(2))) == [50]
    made.handle(m.Answered(2, ok=True))
    assert vouchers(made.handle(m.NeedVoucherSeen(2, need(200)))) == [200]
    made.handle(m.Answered(2, ok=True))
    made.handle(m.ReceiptSeen(2, receipt(200, 60)))
    made.handle(m.RequestEnded(2))
    assert vouchers(made.handle(offer(3))) == [200]
    made.handle(m.Answered(3, ok=True, receipt=receipt(200, 190)))
    made.handle(m.RequestEnded(3))
    assert vouchers(made.handle(offer(4))) == [215]


def test_parallel_requests_do_not_share_one_amount() -> None:
    """Two requests at once are covered for both amounts."""
    made = opened()
    assert vouchers(made.handle(offer(2))) == [50]
    assert vouchers(made.handle(offer(3))) == [75]


def test_a_refused_voucher_is_taken_back_and_signed_again() -> None:
    """After a 5xx without receipt the same amount is signed next time, so the retry costs nothing more."""
    made = opened()
    assert vouchers(made.handle(offer(2))) == [50]
    made.handle(m.Answered(2, ok=False))
    made.handle(m.RequestEnded(2))
    assert (made.state.cumulative, made.state.signed_max) == (25, 50)
    assert vouchers(made.handle(offer(3))) == [50]


def test_what_was_signed_once_stays_claimable() -> None:
    """After a refusal a smaller voucher may follow, but a claim up to the refused one is true, and costs no budget again."""
    made = opened(replace(POLICY, request_cap=Units(100)))
    assert vouchers(made.handle(offer(2, replace(TERMS, amount=Units(100))))) == [125]
    made.handle(m.Answered(2, ok=False))
    made.handle(m.RequestEnded(2))
    assert vouchers(made.handle(offer(3))) == [50]
    assert made.state.signed_max == 125
    assert made.handle(m.Answered(3, ok=True, receipt=receipt(125, 60))) == ()
    assert vouchers(made.handle(m.NeedVoucherSeen(3, need(225)))) == [225]
    made.handle(m.Answered(3, ok=True))
    assert gave_up(made.handle(m.NeedVoucherSeen(3, need(226)))) == [m.GiveUpReason.REQUEST_CAP]


def test_a_receipt_on_an_error_is_not_taken_back() -> None:
    """A receipt says the voucher was accepted, whatever the status beside it."""
    made = opened()
    made.handle(offer(2))
    made.handle(m.Answered(2, ok=False, receipt=receipt(50, 25)))
    assert (made.state.cumulative, made.state.accepted) == (50, 50)


def test_an_overtaken_voucher_is_not_taken_back() -> None:
    """When a later voucher is out, refusing the earlier one lowers nothing; refusing the later one lowers to the earlier."""
    made = opened()
    made.handle(offer(2))
    made.handle(offer(3))
    made.handle(m.Answered(2, ok=False))
    assert made.state.cumulative == 75
    made.handle(m.Answered(3, ok=False))
    assert made.state.cumulative == 50


def test_a_refusal_never_goes_below_what_was_accepted() -> None:
    """Amounts the server has acknowledged stay, also when the credential that carried them is refused afterwards."""
    made = opened()
    made.handle(offer(2))
    made.handle(m.ReceiptSeen(2, receipt(50, 30)))
    made.handle(m.Answered(2, ok=False))
    assert made.state.cumulative == 50


def test_a_second_402_raises_the_voucher_and_a_fourth_ends_it() -> None:
    """A server that keeps refusing gets larger vouchers within the cap, three payments in all."""
    made = opened()
    assert vouchers(made.handle(offer(2))) == [50]
    assert vouchers(made.handle(offer(2, entropy=1))) == [50]
    assert vouchers(made.handle(offer(2, entropy=2))) == [75]
    assert gave_up(made.handle(offer(2, entropy=3))) == [m.GiveUpReason.TOO_MANY_ATTEMPTS]


def test_a_snapshot_in_a_402_names_the_amount() -> None:
    """A 402 with a proven snapshot of our channel is answered with what it requires."""
    made = opened()
    made.handle(offer(2))
    actions = made.handle(offer(2, replace(TERMS, snapshot=snapshot(50, 45, 70))))
    assert vouchers(actions) == [75]
    assert (made.state.accepted, made.state.spent) == (50, 45)


def test_a_forged_snapshot_changes_nothing() -> None:
    """A snapshot without our signature moves neither what we believe nor what we sign."""
    made = opened()
    forged = replace(snapshot(400, 400, 425), highest_voucher=SignedAmount(Units(400), b"\x01" * 65))
    assert vouchers(made.handle(offer(2, replace(TERMS, snapshot=forged)))) == [50]
    assert made.state.accepted == 25


def test_min_voucher_delta_is_honoured() -> None:
    """A voucher that advances does so by at least the server's minimum; one that does not advance is left alone."""
    made = opened()
    assert vouchers(made.handle(offer(2, replace(TERMS, min_voucher_delta=Units(100))))) == [125]
    made.handle(m.Answered(2, ok=True, receipt=receipt(125, 26)))
    made.handle(m.RequestEnded(2))
    assert vouchers(made.handle(offer(3, replace(TERMS, min_voucher_delta=Units(100))))) == [125]


def test_request_and_channel_caps_hold() -> None:
    """Neither one request nor one channel is ever signed beyond its cap, whatever the server requires."""
    made = opened(replace(POLICY, request_cap=Units(100), channel_cap=Units(160)))
    made.handle(offer(2))
    made.handle(m.Answered(2, ok=True))
    assert vouchers(made.handle(m.NeedVoucherSeen(2, need(125)))) == [125]
    made.handle(m.Answered(2, ok=True))
    assert gave_up(made.handle(m.NeedVoucherSeen(2, need(126)))) == [m.GiveUpReason.REQUEST_CAP]
    made.handle(m.ReceiptSeen(2, receipt(125, 125)))
    made.handle(m.RequestEnded(2))
    made.handle(offer(3))
    made.handle(m.Answered(3, ok=True))
    assert vouchers(made.handle(m.NeedVoucherSeen(3, need(160)))) == [160]
    assert gave_up(made.handle(m.NeedVoucherSeen(3, need(161)))) == [m.GiveUpReason.CHANNEL_CAP]
    assert made.state.signed_max == 160


# --- mid-stream


def test_need_voucher_signs_the_larger_amount() -> None:
    """A mid-stream voucher reaches what is required and never falls below what was signed."""
    made = opened()
    made.handle(offer(2))
    made.handle(m.Answered(2, ok=True))
    assert made.handle(m.NeedVoucherSeen(2, need(80, 50))) == (m.SignVoucher(2, CHANNEL, Units(80), m.Purpose.VOUCHER),)
    made.handle(m.Answered(2, ok=True))
    assert vouchers(made.handle(m.NeedVoucherSeen(2, need(10, 50)))) == [80]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (need(80, channel=ChannelId(b"\x01" * 32)), m.GiveUpReason.FOREIGN_CHANNEL),
        (need(80, accepted=51), m.GiveUpReason.INFLATED_CLAIM),
    ],
)
def test_need_voucher_of_another_channel_or_claim_is_refused(event: NeedVoucher, reason: m.GiveUpReason) -> None:
    """An event that names another channel, or claims more than was signed, gets no voucher."""
    made = opened()
    made.handle(offer(2))
    made.handle(m.Answered(2, ok=True))
    assert gave_up(made.handle(m.NeedVoucherSeen(2, event))) == [reason]


def test_need_voucher_for_nothing_is_refused() -> None:
    """Without a channel, or for a request that is over, no voucher is signed."""
    assert gave_up(session().handle(m.NeedVoucherSeen(1, need(80)))) == [m.GiveUpReason.NO_CHANNEL]
    assert gave_up(opened().handle(m.NeedVoucherSeen(1, need(80)))) == [m.GiveUpReason.NO_CHANNEL]


def test_an_expired_challenge_mid_stream_is_refreshed_once() -> None:
    """A 402 to a mid-stream voucher is answered with the same amount under the fresh challenge, once."""
    made = opened()
    made.handle(offer(2))
    made.handle(m.Answered(2, ok=True))
    made.handle(m.NeedVoucherSeen(2, need(80)))
    assert vouchers(made.handle(offer(2, entropy=9))) == [80]
    assert gave_up(made.handle(offer(2, entropy=10))) == [m.GiveUpReason.TOO_MANY_ATTEMPTS]
    assert made.state.cumulative == 50


# --- topping up

@pytest.mark.parametrize(
    ("policy", "required", "additional"),
    [
        (WIDE, 1_001, 1_000),
        (WIDE, 3_000, 2_000),
        (replace(WIDE, top_up=Units(50)), 1_001, 50),
        (replace(WIDE, top_up=Units(50)), 1_200, 200),
        (replace(WIDE, max_deposit=Units(1_300)), 1_001, 300),
        (replace(WIDE, max_deposit=Units(1_300)), 1_301, None),
    ],
)
def test_top_up_size(policy: m.PayerPolicy, required: int, additional: int | None) -> None:
    """A top-up covers the shortfall, or the configured or suggested size if larger, and stays under the deposit cap."""
    made = streaming(policy)
    actions = made.handle(m.NeedVoucherSeen(2, need(required)))
    if additional is None:
        assert gave_up(actions) == [m.GiveUpReason.DEPOSIT_CAP]
        return
    assert actions == (m.TopUp(2, CHANNEL, Units(additional)),)
    assert vouchers(made.handle(m.TopUpAnswered(ok=True))) == [required]
    assert made.state.deposit == 1_000 + additional


def test_top_up_comes_before_the_voucher_and_serves_all_who_wait() -> None:
    """No voucher above the deposit is signed before the top-up is acknowledged; two needs share one top-up."""
    made = streaming()
    made.handle(offer(3))
    made.handle(m.Answered(3, ok=True))
    assert [type(action) for action in made.handle(m.NeedVoucherSeen(2, need(1_100)))] == [m.TopUp]
    assert made.handle(m.NeedVoucherSeen(3, need(1_200))) == ()
    assert made.state.signed_max <= 1_000
    assert vouchers(made.handle(m.TopUpAnswered(ok=True, receipt=receipt(75, 30)))) == [1_100, 1_200]


def test_a_failed_top_up_ends_the_requests_that_waited() -> None:
    """When the deposit does not grow, nothing above it is signed and everyone waiting is told."""
    made = streaming()
    made.handle(m.NeedVoucherSeen(2, need(1_100)))
    assert gave_up(made.handle(m.TopUpAnswered(ok=False))) == [m.GiveUpReason.TOP_UP_FAILED]
    assert (made.state.deposit, made.state.signed_max, made.state.top_up) == (1_000, 50, None)
    assert made.handle(m.TopUpAnswered(ok=True)) == ()
    assert made.state.deposit == 1_000


def test_a_refused_top_up_is_repeated_once() -> None:
    """A 402 to a top-up repeats it under the fresh challenge; a second one ends it."""
    made = streaming()
    (top_up,) = made.handle(m.NeedVoucherSeen(2, need(1_100)))
    assert made.handle(offer(2, entropy=5)) == (top_up,)
    assert gave_up(made.handle(offer(2, entropy=6))) == [m.GiveUpReason.TOP_UP_FAILED]
    assert made.state.top_up is None


def test_a_top_up_before_a_request() -> None:
    """A content request that does not fit the deposit tops up first and then pays with the challenge it had."""
    made = opened(replace(WIDE, deposit=Units(30)))
    (top_up,) = made.handle(offer(2))
    assert top_up == m.TopUp(2, CHANNEL, Units(1_000))
    assert made.handle(m.TopUpAnswered(ok=True)) == (m.SignVoucher(2, CHANNEL, Units(50), m.Purpose.CONTENT),)


def test_v1_is_never_topped_up_nor_overdrawn() -> None:
    """On the contract escrow a voucher above the deposit is not signed, and no top-up is tried."""
    terms = replace(TERMS, escrow=V1, suggested_deposit=Units(100))
    made = streaming(terms=terms)
    assert made.state.channel is not None
    event = need(101, channel=made.state.channel.id)
    assert gave_up(made.handle(m.NeedVoucherSeen(2, event))) == [m.GiveUpReason.DEPOSIT_EXHAUSTED]


# --- receipts


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        (receipt(51, 25), m.GiveUpReason.INFLATED_CLAIM),
        (receipt(50, 51), m.GiveUpReason.INFLATED_CLAIM),
        (receipt(50, 50, channel=ChannelId(b"\x01" * 32)), m.GiveUpReason.FOREIGN_CHANNEL),
    ],
)
def test_inflated_receipts_are_not_believed(claim: SessionReceipt, reason: m.GiveUpReason) -> None:
    """A receipt that claims more than we signed, or another channel, changes nothing and is reported."""
    made = opened()
    made.handle(offer(2))
    before = made.state
    assert gave_up(made.handle(m.ReceiptSeen(2, claim))) == [reason]
    assert made.state == before


def test_late_receipts_do_not_turn_back_time() -> None:
    """Receipts that overtake one another leave the highest numbers standing."""
    made = opened()
    made.handle(offer(2))
    made.handle(m.ReceiptSeen(2, receipt(50, 50)))
    made.handle(m.ReceiptSeen(2, receipt(25, 25)))
    assert (made.state.accepted, made.state.spent, made.state.cumulative) == (50, 50, 50)


# --- offers we do not take


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"recipient": Address(b"\x66" * 20)}, m.GiveUpReason.FOREIGN_TERMS),
        ({"currency": Address(b"\x66" * 20)}, m.GiveUpReason.FOREIGN_TERMS),
        ({"escrow": replace(V2, chain_id=1)}, m.GiveUpReason.FOREIGN_TERMS),
        ({"escrow": replace(V2, address=Address(b"\x66" * 20))}, m.GiveUpReason.FOREIGN_TERMS),
    ],
)
def test_offers_on_other_terms_are_not_paid(change: dict[str, Any], reason: m.GiveUpReason) -> None:
    """An offer for another payee, token, chain or escrow than this session's and the policy's is not paid."""
    assert gave_up(session().handle(offer(1, replace(TERMS, **change)))) == [reason]


def test_escrows_and_tokens_must_be_allowed() -> None:
    """A session for a token or escrow outside the policy pays nothing."""
    for policy in (replace(POLICY, tokens=frozenset()), replace(POLICY, escrows=frozenset({V1}))):
        assert gave_up(session(policy).handle(offer(1))) == [m.GiveUpReason.FOREIGN_TERMS]


def test_challenges_that_cannot_be_paid() -> None:
    """Expired challenges, other methods and intents, and unreadable requests are given up on."""
    made = session()
    assert gave_up(made.handle(replace(offer(1), now=UnixMillis(NOW + 300_001)))) == [m.GiveUpReason.EXPIRED_CHALLENGE]
    assert gave_up(made.handle(offer(1, method="stripe"))) == [m.GiveUpReason.BAD_CHALLENGE]
    assert gave_up(made.handle(offer(1, intent="charge"))) == [m.GiveUpReason.BAD_CHALLENGE]
    empty = replace(offer(1).challenge, request="e30")
    assert gave_up(made.handle(m.ChallengeSeen(1, empty, NOW))) == [m.GiveUpReason.BAD_CHALLENGE]
    unreadable = replace(offer(1).challenge, expires="soon")
    assert gave_up(made.handle(m.ChallengeSeen(1, unreadable, NOW))) == [m.GiveUpReason.EXPIRED_CHALLENGE]
    timeless = replace(offer(1).challenge, expires=None)
    assert isinstance(made.handle(m.ChallengeSeen(1, timeless, NOW))[0], m.OpenChannel)


def test_an_unpayable_402_still_refuses_what_was_sent() -> None:
    """A 402 we do not pay takes back the voucher it refused, and a refused opening is looked up."""
    made = opened()
    made.handle(offer(2))
    made.handle(offer(2, method="stripe"))
    assert made.state.cumulative == 25
    fresh = session()
    fresh.handle(offer(1))
    fresh.handle(m.OpenPrepared(1, DESCRIPTOR))
    assert m.ReadChannel(CHANNEL, opening=True) in fresh.handle(offer(1, method="stripe"))
    topping = streaming()
    topping.handle(m.NeedVoucherSeen(2, need(1_100)))
    topping.handle(offer(2, method="stripe"))
    assert topping.state.top_up is None
