"""The chain's word, and the end of a channel: what is captured is what was consumed."""

from __future__ import annotations

import pytest

from channels.descriptor import ChainSnapshot, Escrow
from channels.faults import Reason
from channels.ids import Hash32
from channels.model import (
    AcceptVoucher,
    Account,
    BeginClose,
    ConfirmClosed,
    Finish,
    FixCapture,
    HoldId,
    ObserveChain,
    Phase,
    Renew,
)
from tests.support.builders import (
    TX,
    V1,
    V2,
    account_in,
    after,
    chain,
    decide,
    opened,
    opening,
    pico,
    reason,
    refusal,
    reserve,
    voucher,
)


def consumed(units: float, *, escrow: Escrow = V2, rungs: tuple[int, ...] = (), credit: float = 0) -> Account:
    """100 of 1,000 accepted (or the last of ``rungs``) and ``units`` charged, of which ``credit`` came back."""
    account = after(opened(10 if rungs else 100, escrow=escrow), *(AcceptVoucher(voucher(n)) for n in rungs))
    if units:
        account = after(account, reserve(units))
        account = after(account, Finish(HoldId("h"), pico(units)))
    if credit:  # all of a fold comes back: the stream was over-counted
        over = Renew(HoldId("g"), pico(credit), pico(credit))
        account = after(account, reserve(credit, hold="g", ticket="u"), over, Finish(HoldId("g"), pico(0)))
    return account


# -------------------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize(
    ("seen", "phase"),
    [
        (chain(1_000, block=5), Phase.OPEN),
        (chain(1_000, closing=7, block=5), Phase.CONTESTED),
        (chain(100, block=5), Phase.OPEN),
        (chain(99, block=5), Phase.SUSPECT),
        (chain(1_000, settled=40, block=5), Phase.OPEN),
        (chain(1_000, settled=41, block=5), Phase.SUSPECT),
        (chain(99, closing=7, block=5), Phase.SUSPECT),
        (chain(0, block=5), Phase.CLOSED),
        (chain(0, closing=7, block=5), Phase.CLOSED),
    ],
)
def test_what_the_chain_says_decides_the_phase(seen: ChainSnapshot, phase: Phase) -> None:
    """100 accepted and 40 spent: a request contests, a contradiction makes suspect, an empty slot closes."""
    account = after(consumed(40), ObserveChain(seen))
    assert (account.phase, account.chain) == (phase, seen)


def test_facts_are_replaced_never_merged() -> None:
    """A reorganisation may lower everything; keeping the maximum would keep what is no longer true."""
    account = after(consumed(40), ObserveChain(chain(2_000, 30, 9, block=5)), ObserveChain(chain(900, 0, None, block=5)))
    assert account.chain == chain(900, 0, None, block=5)
    assert account.phase is Phase.OPEN


@pytest.mark.parametrize("seen", [chain(1, block=1), chain(1_000, block=5)], ids=["older", "same"])
def test_old_news_changes_nothing(seen: ChainSnapshot) -> None:
    """An older block or the same facts again are a replay."""
    account = after(opened(), ObserveChain(chain(1_000, block=5)))
    made = decide(account, ObserveChain(seen))
    assert (made.events, made.result.replayed) == ((), True)


def test_a_lost_top_up_stops_everything_until_it_is_back() -> None:
    """Vouchers above the deposit the chain now shows are worth nothing: no new work, but no bill is lost either."""
    account = after(opened(100), AcceptVoucher(voucher(900)), reserve(50), ObserveChain(chain(100, block=5)))
    assert account.phase is Phase.SUSPECT
    assert reason(account, reserve(1, hold="g", ticket="u")) is Reason.CHANNEL_FINALIZED
    assert after(account, Finish(HoldId("h"), pico(20))).spent == 20
    assert after(account, ObserveChain(chain(1_000, block=6))).phase is Phase.OPEN


def test_a_channel_closed_behind_our_back_holds_nothing() -> None:
    """What the chain has closed is over; holds end at what was recorded."""
    account = after(opened(), reserve(50), ObserveChain(chain(0, block=5)))
    assert (account.phase, dict(account.holds), account.owed_pico) == (Phase.CLOSED, {}, 0)


# ---------------------------------------------------------------------------------------------------------- closing


def test_a_close_below_what_was_spent_is_refused_with_the_numbers() -> None:
    """The payer cannot close for less than was delivered, nor for less than the chain has paid."""
    fault = refusal(consumed(40), BeginClose("c", voucher(39)))
    assert fault.reason is Reason.CLOSE_BELOW_SPENT
    assert fault.numbers == {"cumulative": 39, "spent": 40}
    settled = after(None, opening(100, on_chain=chain(1_000, settled=60)))
    assert reason(settled, BeginClose("c", voucher(59))) is Reason.CLOSE_BELOW_SPENT


@pytest.mark.parametrize("cumulative", [40, 70, 100, 1_000])
def test_a_close_from_what_was_spent_to_the_deposit_is_accepted(cumulative: int) -> None:
    """Its amount is remembered for the answer; a higher one is a voucher as well."""
    account = after(consumed(40), BeginClose("c", voucher(cumulative)))
    assert account.close is not None
    assert (account.phase, account.close.cumulative) == (Phase.CLOSING, cumulative)
    assert account.accepted == max(100, cumulative)


def test_a_close_above_the_deposit_is_refused() -> None:
    """Nothing the escrow could not pay is accepted on the way out either."""
    assert reason(consumed(40), BeginClose("c", voucher(1_001))) is Reason.VOUCHER_EXCEEDS_DEPOSIT


def test_the_node_closes_with_its_highest_voucher() -> None:
    """Without a credential the close is our own wish, over everything we hold."""
    account = after(consumed(40), BeginClose("", None))
    assert account.close is not None
    assert account.close.cumulative == 100


@pytest.mark.parametrize("phase", [Phase.CLOSING, Phase.CAPTURED])
def test_a_close_is_repeated_by_the_same_challenge_only(phase: Phase) -> None:
    """The same close again is a replay; a second, different close comes too late."""
    account = account_in(phase)
    assert decide(account, BeginClose("close", voucher(100))).result.replayed
    assert reason(account, BeginClose("other", voucher(100))) is Reason.CHANNEL_FINALIZED


def test_a_capture_is_fixed_only_when_every_request_has_ended() -> None:
    """Work that can still be charged would be lost, or worse, taken without being consumed."""
    account = after(opened(), reserve(50), BeginClose("c", voucher(100)))
    fault = refusal(account, FixCapture())
    assert (fault.reason, fault.numbers) == (Reason.CHANNEL_BUSY, {"holds": 1})
    account = after(account, Finish(HoldId("h"), pico(33)), FixCapture())
    assert account.close is not None
    assert account.close.capture == 33
    assert decide(account, FixCapture()).result.replayed
    assert reason(account, Finish(HoldId("h"), pico(33))) is Reason.CHANNEL_FINALIZED


def capture(account: Account, cumulative: int | None = None) -> int:
    account = after(account, BeginClose("c", None if cumulative is None else voucher(cumulative)), FixCapture())
    assert account.close is not None
    assert account.close.capture is not None
    return account.close.capture


@pytest.mark.parametrize(("units", "credit", "captured"), [(0, 0, 0), (40, 0, 40), (40.999999, 0, 40), (40, 30, 40), (100, 0, 100)])
def test_the_reserve_escrow_is_asked_for_exactly_what_was_consumed(units: float, credit: float, captured: int) -> None:
    """v2 takes a capture amount: whole units of what is owed, never what was merely permitted or came back as credit."""
    account = consumed(units, credit=credit)
    assert account.spent == int(units) + int(credit)
    assert capture(account) == captured


@pytest.mark.parametrize(
    ("units", "rungs", "captured"),
    [
        (5, (50, 90), 0),
        (10, (50, 90), 10),
        (49.9, (50, 90), 10),
        (50, (50, 90), 50),
        (89, (50, 90), 50),
        (90, (50, 90), 90),
    ],
)
def test_the_contract_escrow_is_given_the_greatest_voucher_not_above_consumption(
    units: float, rungs: tuple[int, ...], captured: int
) -> None:
    """v1 pays a voucher in full, so the rung below what was consumed is all that may be used."""
    assert capture(consumed(units, escrow=V1, rungs=rungs)) == captured


def test_the_exact_closing_voucher_of_a_contract_channel_is_used() -> None:
    """A v1 payer signs what was spent when it closes; that voucher pays the node in full although others are higher."""
    account = consumed(40, escrow=V1, rungs=(30, 90))
    assert capture(account, 40) == 40
    closing = after(account, BeginClose("c", voucher(40)))
    assert closing.ladder == (voucher(30), voucher(40), voucher(90))


def test_a_capture_is_never_below_what_the_chain_has_paid() -> None:
    """The escrow refuses to go back; after a credit the settled amount stands."""
    account = after(None, opening(100, on_chain=chain(1_000, settled=60)))
    assert capture(account) == 60


def test_a_closed_channel_keeps_its_end() -> None:
    """The record says who asked, what was captured and by which transaction; the tombstone refuses everything."""
    account = after(consumed(40), BeginClose("c", voucher(70)), FixCapture(), ConfirmClosed(TX, chain(0, block=9)))
    assert account.close is not None
    assert (account.close.challenge_id, account.close.cumulative, account.close.capture, account.close.tx_hash) == ("c", 70, 40, TX)
    assert reason(account, opening()) is Reason.CHANNEL_FINALIZED


def test_our_close_is_confirmed_once() -> None:
    """The same confirmation again is a replay; another transaction cannot have closed it too."""
    account = after(consumed(40), BeginClose("c", None), FixCapture(), ConfirmClosed(TX, chain(0, block=9)))
    again = decide(account, ConfirmClosed(TX, chain(0, block=10)))
    assert (again.events, again.result.replayed) == ((), True)
    assert reason(account, ConfirmClosed(Hash32(b"\x01" * 32), chain(0, block=9))) is Reason.CHANNEL_FINALIZED


def test_a_watcher_may_see_the_end_before_our_receipt_comes() -> None:
    """The empty slot closes the channel; the receipt then says that it was our close, and with which transaction."""
    account = after(consumed(40), BeginClose("c", None), FixCapture(), ObserveChain(chain(0, block=8)))
    assert account.phase is Phase.CLOSED
    assert account.close is not None
    assert (account.close.capture, account.close.tx_hash) == (40, None)
    confirmed = after(account, ConfirmClosed(TX, chain(0, block=9)))
    assert confirmed.close is not None
    assert (confirmed.phase, confirmed.close.tx_hash, confirmed.chain.block) == (Phase.CLOSED, TX, 9)
    assert decide(confirmed, ConfirmClosed(TX, chain(0, block=9))).result.replayed


@pytest.mark.parametrize("begun", [False, True])
def test_a_channel_the_payer_withdrew_is_no_close_of_ours(begun: bool) -> None:
    """Without a fixed capture nothing of ours can have closed it: it is never booked as earned."""
    account = after(consumed(40), *([BeginClose("c", None)] if begun else []), ObserveChain(chain(0, block=8)))
    assert account.phase is Phase.CLOSED
    assert reason(account, ConfirmClosed(TX, chain(0, block=9))) is Reason.CHANNEL_FINALIZED
