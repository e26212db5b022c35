"""Reserving, renewing, finishing: what may be delivered and what is charged for it. Amounts in units, half units allowed."""

from __future__ import annotations

import pytest

from channels.account import check
from channels.faults import Reason
from channels.model import AcceptVoucher, Account, Finish, HoldId, ObserveChain, ReleaseOrphans, Renew
from channels.policy import Policy
from channels.units import Pico
from tests.support.builders import NOW, after, chain, decide, opened, pico, reason, refusal, reserve, voucher

H = HoldId("h")


def renew(consumed: float, want: float, hold: str = "h") -> Renew:
    return Renew(HoldId(hold), pico(consumed), pico(want))


def finish(total: float, hold: str = "h") -> Finish:
    return Finish(HoldId(hold), pico(total))


def books(account: Account) -> tuple[float, float, int]:
    """(owed, held, spent) in units."""
    return account.owed_pico / 1e6, account.held_pico / 1e6, account.spent


# ---------------------------------------------------------------------------------------------------------- reserve


@pytest.mark.parametrize(
    ("floor", "want", "granted"), [(1, 5, 5), (100, 100, 100), (100, 500, 100), (0.000001, 0.000001, 0.000001)]
)
def test_a_reservation_gets_what_it_wants_up_to_the_voucher(floor: float, want: float, granted: float) -> None:
    """An exact fit is granted, and never more than the voucher covers."""
    made = decide(opened(100), reserve(floor, want))
    assert made.result.granted == pico(granted)
    assert books(made.account) == (0, granted, 0)


def test_a_reservation_above_the_voucher_says_what_would_do() -> None:
    """The refusal names the cumulative amount to sign: rounded up, because asking never takes."""
    account = after(opened(100), reserve(10), finish(9.5))
    fault = refusal(account, reserve(90.6, hold="g", ticket="u"))
    assert fault.reason is Reason.INSUFFICIENT_BALANCE
    assert fault.numbers == {"accepted": 100, "required": 101, "deposit": 1_000}
    assert after(account, AcceptVoucher(voucher(101)), reserve(90.6, hold="g", ticket="u")).headroom_pico >= 0


def test_what_others_hold_is_not_there_to_reserve() -> None:
    """Two requests never count the same money."""
    account = after(opened(100), reserve(60))
    assert reason(account, reserve(41, hold="g", ticket="u", preempt=False)) is Reason.INSUFFICIENT_BALANCE
    assert books(after(account, reserve(40, hold="g", ticket="u", preempt=False))) == (0, 100, 0)


def test_a_newer_request_ends_the_older_at_what_it_recorded() -> None:
    """The fenced request keeps what it has folded, loses the rest, and can change nothing any more."""
    account = after(opened(100), reserve(60), renew(12.5, 60), reserve(80, hold="g", ticket="u"))
    assert books(account) == (12.5, 80, 12)
    assert reason(account, renew(20, 60)) is Reason.HOLD_FENCED
    assert reason(account, finish(20)) is Reason.HOLD_FENCED


def test_a_refused_newcomer_does_not_end_the_older_request() -> None:
    """A reservation that fails changes nothing at all."""
    account = after(opened(100), reserve(60), renew(50, 60))
    assert reason(account, reserve(51, hold="g", ticket="u")) is Reason.INSUFFICIENT_BALANCE
    assert after(account, finish(55)).owed_pico == pico(55)


def test_sharing_has_a_limit() -> None:
    """Beyond the allowed live requests a channel is busy."""
    account, policy = opened(100), Policy(holds_max=2)
    for name in "ab":
        account = after(account, reserve(1, hold=name, ticket=name, preempt=False), policy=policy)
    assert reason(account, reserve(1, hold="c", ticket="c", preempt=False), policy=policy) is Reason.CHANNEL_BUSY


def test_a_repeated_reservation_is_answered_with_its_grant() -> None:
    """A step that runs twice reserves once."""
    account = after(opened(100), reserve(1, 60), renew(5, 70))
    made = decide(account, reserve(1, 60))
    assert made.result.replayed
    assert made.result.granted == pico(70)
    assert made.events == ()


# ---------------------------------------------------------------------------------------------------------- tickets


def test_a_credential_buys_one_response() -> None:
    """A used ticket buys nothing more, also after its request has ended."""
    account = after(opened(100), reserve(1), finish(0))
    assert reason(account, reserve(1, hold="g", ticket="t")) is Reason.CREDENTIAL_USED


def test_used_tickets_are_bounded_and_expire() -> None:
    """Too many requests in one credential lifetime are refused; room comes back as tickets expire."""
    policy, account = Policy(tickets_max=2), opened(100)
    for name in "ab":
        account = after(account, reserve(1, hold=name, ticket=name), policy=policy)
    third = reserve(1, hold="c", ticket="c", expires=NOW + 999)
    assert reason(account, third, policy=policy) is Reason.RATE_LIMITED
    assert reason(account, third, policy=policy, now=NOW + 299) is Reason.RATE_LIMITED
    later = decide(account, third, policy=policy, now=NOW + 300).account
    assert dict(later.tickets) == {"c": NOW + 999}, "what has expired is forgotten by the next reservation"


def test_a_used_ticket_is_reported_before_any_limit() -> None:
    """A repeat is a repeat, not a rate limit."""
    account = after(opened(100), reserve(1))
    assert reason(account, reserve(1, hold="g"), policy=Policy(tickets_max=1)) is Reason.CREDENTIAL_USED


# ------------------------------------------------------------------------------------------------------------ renew


def test_a_renewal_charges_what_was_delivered_and_reserves_the_next_window() -> None:
    """Folding moves value from held to owed; the hold reaches the wanted total."""
    made = decide(after(opened(100), reserve(10)), renew(7.25, 20))
    assert made.result.granted == pico(20)
    assert books(made.account) == (7.25, 12.75, 7)


def test_a_hold_never_shrinks_while_its_owner_lives() -> None:
    """The owner delivers against the copy it was given, so a smaller wish changes only what was consumed."""
    made = decide(after(opened(100), reserve(50)), renew(5, 10))
    assert made.result.granted == pico(50)
    assert books(made.account) == (5, 45, 5)


def test_a_renewal_takes_what_is_left() -> None:
    """A short renewal is a smaller grant, not a refusal."""
    account = after(opened(100), reserve(60), reserve(30, hold="g", ticket="u", preempt=False))
    made = decide(account, renew(10, 200))
    assert made.result.granted == pico(70)
    assert made.account.headroom_pico == 0


def test_a_renewal_that_changes_nothing_is_a_replay() -> None:
    """Absolute numbers make a lost acknowledgement harmless."""
    account = after(opened(100), reserve(10), renew(7, 20))
    made = decide(account, renew(7, 20))
    assert (made.events, made.result.replayed, made.result.granted) == ((), True, pico(20))


@pytest.mark.parametrize("consumed", [6, 21])
def test_a_renewal_outside_its_hold_is_our_own_bug(consumed: float) -> None:
    """Delivery before the recorded mark or beyond the grant stops the channel, it is not charged."""
    account = after(opened(100), reserve(20), renew(7, 20))
    with pytest.raises(AssertionError):
        decide(account, renew(consumed, 30))


@pytest.mark.parametrize("closing", [5, None])
def test_a_contested_or_suspect_channel_folds_but_reserves_nothing_new(closing: int | None) -> None:
    """What was delivered is still charged; what was not yet reserved no longer is."""
    account = after(opened(100), reserve(10), ObserveChain(chain(1_000 if closing else 50, closing=closing, block=2)))
    made = decide(account, renew(8, 50))
    assert made.result.granted == pico(10)
    assert books(made.account) == (8, 2, 8)


# ----------------------------------------------------------------------------------------------------------- finish


def test_a_request_that_used_less_gives_the_rest_back() -> None:
    """The exact total is charged and the hold is gone."""
    made = decide(after(opened(100), reserve(60)), finish(12.3))
    assert books(made.account) == (12.3, 0, 12)
    assert made.account.headroom_pico == pico(87.7)
    assert made.result.unpaid == 0


def test_a_final_total_below_what_was_folded_is_credit() -> None:
    """An over-count goes back to the payer; the number people have seen does not fall, and new work uses credit first."""
    account = after(opened(100), reserve(60), renew(40, 60), finish(25))
    assert books(account) == (25, 0, 40)
    assert account.headroom_pico == pico(75)
    account = after(account, reserve(20, hold="g", ticket="u"), finish(10, hold="g"))
    assert books(account) == (35, 0, 40), "spent stands still until the credit is used up"


def test_a_total_above_the_hold_is_paid_from_headroom() -> None:
    """A late usage report is charged as far as the voucher covers it."""
    made = decide(after(opened(100), reserve(10)), finish(30))
    assert books(made.account) == (30, 0, 30)
    assert made.result.unpaid == 0


def test_what_no_voucher_covers_is_the_tail() -> None:
    """Never more than was permitted is charged; the rest is the node's loss and is counted."""
    account = after(opened(100), reserve(10), reserve(70, hold="g", ticket="u", preempt=False))
    made = decide(account, finish(45.5))
    assert made.result.unpaid == pico(15.5)
    assert books(made.account) == (30, 70, 30), "the other request keeps every bit of its hold"
    check(made.account)


def test_a_request_is_finished_once() -> None:
    """A second finish of the same hold changes nothing."""
    account = after(opened(100), reserve(10), finish(3))
    assert reason(account, finish(3)) is Reason.HOLD_FENCED


def test_dust_is_carried_never_dropped_and_never_rounded_up() -> None:
    """Many fractions of a unit add up exactly; only whole units are ever shown as spent."""
    account = opened(100)
    for n in range(10):
        account = after(account, reserve(1, hold=f"h{n}", ticket=f"t{n}"), Finish(HoldId(f"h{n}"), Pico(333_333)))
    assert account.owed_pico == 3_333_330
    assert account.spent == 3


# ---------------------------------------------------------------------------------------------------------- orphans


def test_recovery_charges_what_was_recorded_and_nothing_else() -> None:
    """The window of a dead request is given back: billing it would bill work nobody may have received."""
    account = after(opened(100), reserve(60), renew(12, 60), reserve(20, hold="g", ticket="u", preempt=False))
    made = decide(account, ReleaseOrphans())
    assert books(made.account) == (12, 0, 12)
    assert decide(made.account, ReleaseOrphans()).result.replayed
