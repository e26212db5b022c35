"""Bringing an account from an old backup up to date. Amounts in units."""

from __future__ import annotations

from functools import reduce

import pytest

from channels.account import fold
from channels.faults import Reason
from channels.model import (
    AcceptVoucher,
    Account,
    BeginClose,
    CaptureFixed,
    CloseBegun,
    CloseRecord,
    Finish,
    FixCapture,
    HoldId,
    ObserveChain,
    Outcome,
    Phase,
    Plan,
    Renew,
    Restore,
)
from channels.units import Units
from tests.support.builders import (
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


def finish(total: float, hold: str = "h") -> Finish:
    return Finish(HoldId(hold), pico(total))


def restore(deposit: int = 1_000, settled: int = 0, *vouchers: int, closing: int | None = None, block: int = 9) -> Restore:
    return Restore(chain(deposit, settled, closing, block), tuple(voucher(amount) for amount in vouchers))


def backup() -> Account:
    """100 accepted, 30 charged, and a stream with 5 of 20 recorded when the copy was taken."""
    return after(opened(100), reserve(30), finish(30), reserve(20, hold="s", ticket="s"), Renew(HoldId("s"), pico(5), pico(20)))


def test_newer_vouchers_and_the_chains_word_bring_a_backup_up_to_date() -> None:
    """The highest voucher anybody kept counts again, and what the chain has paid out was consumed."""
    account = after(backup(), restore(2_000, 120, 110, 250, 120))
    assert (account.phase, account.accepted, account.spent, account.owed_pico) == (Phase.OPEN, 250, 120, pico(120))
    assert account.chain == chain(2_000, 120, block=9)
    assert [rung.cumulative for rung in account.ladder] == [120, 250], "below what is used up none is needed"
    assert account.headroom_pico == pico(130)


def test_the_requests_of_a_backup_are_over() -> None:
    """Whoever ran them is long gone; they are charged what the copy says."""
    account = after(backup(), restore())
    assert (dict(account.holds), account.owed_pico) == ({}, pico(35))
    assert reason(account, Renew(HoldId("s"), pico(9), pico(20))) is Reason.HOLD_FENCED


def test_the_books_are_believed_where_they_know_more_than_the_chain() -> None:
    """What was charged and not yet settled is in the copy alone."""
    account = after(backup(), restore(1_000, 10, 100))
    assert (account.owed_pico, account.spent, account.accepted) == (pico(35), 35, 100)


def test_a_restored_channel_can_be_settled_up_to_what_is_known() -> None:
    """Nothing the chain has not paid and the copy does not know is ever taken."""
    account = after(backup(), restore(1_000, 120, 120, 250))
    assert (account.final, account.settleable, account.unsettled) == (120, 120, 0)


@pytest.mark.parametrize("phase", [Phase.CONTESTED, Phase.SUSPECT, Phase.CLOSING, Phase.CAPTURED])
def test_a_close_request_on_chain_is_seen_by_a_restore(phase: Phase) -> None:
    """Without a close of ours the chain decides the phase; a close of ours goes on."""
    account = after(account_in(phase), restore(1_000, 0, closing=5))
    expected = phase if phase in (Phase.CLOSING, Phase.CAPTURED) else Phase.CONTESTED
    assert account.phase is expected
    assert (account.close is not None) is (expected is phase and phase is not Phase.CONTESTED)


def test_a_capture_the_chain_has_overtaken_is_forgotten() -> None:
    """It was fixed from older books and the escrow would refuse it; the channel is closed anew."""
    account = after(backup(), finish(10, "s"), BeginClose("c", None), FixCapture())
    assert account.close is not None
    assert account.close.capture == 40
    assert after(account, restore(1_000, 40, 100)).close == account.close
    again = after(account, restore(1_000, 41, 100))
    assert (again.phase, again.close) == (Phase.OPEN, None)
    anew = after(again, BeginClose("d", None), FixCapture())
    assert anew.close is not None
    assert anew.close.capture == 41


def test_a_channel_that_was_closed_meanwhile_is_closed() -> None:
    """An empty slot on chain is the end, whatever vouchers there are."""
    account = after(backup(), restore(0, 0, 500))
    assert (account.phase, dict(account.holds), account.accepted) == (Phase.CLOSED, {}, 100)


@pytest.mark.parametrize(
    ("deposit", "settled", "vouchers"),
    [(1_000, 101, (100,)), (1_000, 101, ()), (90, 0, ()), (34, 0, (34,))],
    ids=["paid out more", "no voucher", "nothing below the deposit", "charged more"],
)
def test_books_no_voucher_covers_are_not_restored(deposit: int, settled: int, vouchers: tuple[int, ...]) -> None:
    """Somebody still has the voucher that paid: without it the account would break its own law."""
    assert reason(backup(), restore(deposit, settled, *vouchers)) is Reason.VOUCHER_TOO_LOW


def test_a_number_that_was_shown_needs_a_voucher_too() -> None:
    """After a credit ``spent`` is above what is owed, and it has been shown: the ladder must reach it."""
    account = after(opened(100), reserve(60), Renew(HoldId("h"), pico(60), pico(60)), finish(20))
    assert (account.spent, account.owed_pico) == (60, pico(20))
    assert reason(account, restore(50, 0, 50)) is Reason.VOUCHER_TOO_LOW


def test_vouchers_above_the_deposit_are_left_out() -> None:
    """The escrow would not pay them, so they permit nothing."""
    assert after(backup(), restore(300, 0, 300, 301)).accepted == 300


def test_the_chains_word_for_a_restore_is_no_older_than_the_copy() -> None:
    """A node that lags behind would drop vouchers the deposit covers, and their money with them."""
    account = after(backup(), ObserveChain(chain(2_000, block=9)), AcceptVoucher(voucher(1_500)))
    assert reason(account, restore(1_000, 0, block=8)) is Reason.CHAIN_UNAVAILABLE
    assert after(account, restore(2_000, 0, block=9)).accepted == 1_500


def test_a_restore_is_safe_to_repeat() -> None:
    """The second changes no amount."""
    once = after(backup(), restore(2_000, 120, 250))
    twice = after(once, restore(2_000, 120, 250))
    assert (twice.ladder, twice.owed_pico, twice.spent, twice.phase) == (once.ladder, once.owed_pico, once.spent, once.phase)


def test_the_journal_of_a_restored_account_is_the_account() -> None:
    """The restore is written down whole, the ends of the lost requests before it."""
    journal: list[Plan[Outcome]] = []
    account: Account | None = None
    for command in (opening(100), reserve(30), restore(2_000, 120, 250)):
        journal.append(decide(account, command))
        account = journal[-1].account
    assert reduce(fold, [event for made in journal for event in made.events], None) == account


def test_an_account_at_the_end_of_a_close_needs_no_voucher_it_has_not() -> None:
    """A close that has not fixed its capture goes on with the vouchers that are there."""
    account = after(backup(), BeginClose("c", voucher(200)), restore(1_000, 50, 200))
    assert (account.phase, account.close) == (Phase.CLOSING, CloseRecord("c", Units(200)))
    fixed = decide(account, FixCapture())
    assert fixed.events == (CaptureFixed(Units(50)),)
    assert CloseBegun(CloseRecord("c", Units(200))) not in fixed.events


def test_a_refused_restore_says_nothing_about_the_payer() -> None:
    """The refusal is for an operator's eye and carries our own words only."""
    assert "voucher" in refusal(backup(), restore(90)).message
