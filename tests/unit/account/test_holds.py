"""Reserving, renewing, finishing: what may be delivered and what is charged for it. Amounts in units, half units allowed."""

from __future__ import annotations

import pytest

from channels.account import check
from channels.faults import Reason
from channels.model import (
    AcceptVoucher,
    Account,
    EndStreams,
    Finish,
    HoldId,
    NodeId,
    ObserveChain,
    ReleaseOrphans,
    Renew,
)
from channels.policy import Policy
from channels.units import Pico
from tests.support.builders import NOW, after, buffered, chain, decide, opened, pico, reason, refusal, reserve, voucher

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
    assert reason(account, buffered(41)) is Reason.INSUFFICIENT_BALANCE
    assert books(after(account, buffered(40))) == (0, 100, 0)


def test_a_newer_stream_ends_the_older_at_what_it_recorded() -> None:
    """The fenced stream keeps what it has folded, loses the rest, and can change nothing any more."""
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
        account = after(account, buffered(1, hold=name, ticket=name), policy=policy)
    assert reason(account, buffered(1, hold="c", ticket="c"), policy=policy) is Reason.CHANNEL_BUSY


def test_a_repeated_reservation_is_answered_with_its_grant() -> None:
    """A step that runs twice reserves once."""
    account = after(opened(100), reserve(1, 60), renew(5, 70))
    made = decide(account, reserve(1, 60))
    assert made.result.replayed
    assert made.result.granted == pico(70)
    assert made.events == ()


def test_a_hold_says_whose_it_is_and_when_the_channel_was_last_used() -> None:
    """The owner and the kind of a request are durable with its money; an older clock does not turn back the activity."""
    account = after(opened(100), reserve(10, owner="life-7"))
    hold = account.holds[H]
    assert (hold.owner, hold.stream, hold.ending) == ("life-7", True, False)
    assert (opened().active_at, account.active_at) == (0, NOW)
    assert decide(account, buffered(1), now=NOW + 9).account.active_at == NOW + 9
    assert decide(account, buffered(1), now=NOW - 9).account.active_at == NOW


# ---------------------------------------------------------------------------------------------------------- streams


def test_a_channel_has_one_stream_at_a_time() -> None:
    """A second stream waits its turn, whichever node asks; a buffered request does not."""
    account = after(opened(100), reserve(10))
    second = reserve(10, hold="g", ticket="u", preempt=False, owner="node-2")
    assert reason(account, second) is Reason.CHANNEL_BUSY
    assert after(account, buffered(10)).streams == (H,)
    assert after(account, finish(3), second).streams == (HoldId("g"),)


def test_a_stream_may_begin_beside_a_buffered_request() -> None:
    """Only streams exclude each other."""
    account = after(opened(100), buffered(10), reserve(10, preempt=False))
    assert (set(account.holds), account.streams) == ({"g", "h"}, (H,))


def test_preempting_ends_streams_and_no_buffered_request() -> None:
    """A whole answer cannot be cut short: its request keeps its hold through a change of streams."""
    account = after(opened(100), buffered(20, hold="whole", ticket="w"), reserve(30), renew(4, 30))
    account = after(account, reserve(50, hold="g", ticket="u"))
    assert set(account.holds) == {"whole", "g"}
    assert books(account) == (4, 70, 4)
    assert after(account, finish(11, hold="whole")).owed_pico == pico(15)


def test_preempting_does_not_get_past_the_limit_of_requests() -> None:
    """Room is counted after the older stream has gone, and buffered requests stay in the count."""
    policy = Policy(holds_max=2)
    full = after(opened(100), buffered(1), reserve(1), policy=policy)
    assert len(after(full, reserve(1, hold="n", ticket="n"), policy=policy).holds) == 2
    busy = after(opened(100), buffered(1), buffered(1, hold="b", ticket="b"), policy=policy)
    assert reason(busy, reserve(1), policy=policy) is Reason.CHANNEL_BUSY


def test_a_busy_channel_is_told_before_it_is_short_of_money() -> None:
    """The newcomer learns that it must wait, not that it must sign more."""
    account = after(opened(100), reserve(100))
    assert reason(account, reserve(1, hold="g", ticket="u", preempt=False)) is Reason.CHANNEL_BUSY


def test_asking_streams_to_end_stops_their_growth_and_nothing_else() -> None:
    """The owner still charges what it delivers inside the hold it has, and bills exactly at the end."""
    account = after(opened(100), buffered(20), reserve(10), renew(2, 12), EndStreams())
    assert {name: hold.ending for name, hold in account.holds.items()} == {"g": False, "h": True}
    made = decide(account, renew(7, 60))
    assert made.result.granted == pico(12)
    assert made.account.holds[H].ending, "a fold does not forget what was asked"
    assert decide(made.account, renew(5, 40, hold="g")).result.granted == pico(40)
    assert books(after(made.account, finish(8.5))) == (8.5, 20, 8)


def test_streams_are_asked_once() -> None:
    """Asking again, or where nobody streams, is a repeat; a stream that came later is asked for itself."""
    account = after(opened(100), reserve(10), EndStreams())
    assert decide(account, EndStreams()).events == ()
    assert decide(after(opened(100), buffered(5)), EndStreams()).result.replayed
    later = after(account, reserve(10, hold="g", ticket="u"))
    assert not later.holds[HoldId("g")].ending
    assert decide(later, EndStreams()).account.holds[HoldId("g")].ending


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
    account = after(opened(100), reserve(60), buffered(30))
    made = decide(account, renew(10, 200))
    assert made.result.granted == pico(70)
    assert made.account.headroom_pico == 0


def test_a_renewal_that_changes_nothing_is_a_replay() -> None:
    """Absolute numbers make a lost acknowledgement harmless."""
    account = after(opened(100), reserve(10), renew(7, 20))
    made = decide(account, renew(7, 20))
    assert (made.events, made.result.replayed, made.result.granted) == ((), True, pico(20))


def test_a_renewal_before_its_mark_is_our_own_bug() -> None:
    """Delivery never runs backwards; a step that says so is not written."""
    account = after(opened(100), reserve(20), renew(7, 20))
    with pytest.raises(AssertionError):
        decide(account, renew(6, 30))


def test_a_renewal_beyond_its_grant_ends_the_request() -> None:
    """A database that failed over has lost the extension: nothing is extended on its word, and the end bills what it can."""
    account = after(opened(100), reserve(20), renew(7, 20))
    assert reason(account, renew(21, 30)) is Reason.HOLD_FENCED
    assert books(after(account, Finish(HoldId("h"), pico(21)))) == (21, 0, 21)


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
    account = after(opened(100), reserve(10), buffered(70))
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
    account = after(opened(100), reserve(60), renew(12, 60), buffered(20))
    made = decide(account, ReleaseOrphans())
    assert books(made.account) == (12, 0, 12)
    assert decide(made.account, ReleaseOrphans()).result.replayed


def test_a_dead_node_loses_its_own_holds_and_nobody_elses() -> None:
    """Holds go by the life of the node that owns them, streams and buffered requests alike."""
    account = after(opened(100), buffered(20, owner="dead"), reserve(30, owner="dead"), buffered(10, hold="x", ticket="x", owner="alive"))
    account = after(account, renew(6, 30))
    made = decide(account, ReleaseOrphans(NodeId("dead")))
    assert set(made.account.holds) == {"x"}
    assert books(made.account) == (6, 10, 6)
    assert reason(made.account, renew(7, 30)) is Reason.HOLD_FENCED
    assert decide(made.account, ReleaseOrphans(NodeId("dead"))).events == ()


def test_holds_from_before_holds_had_owners_belong_to_nobody() -> None:
    """The empty name is an owner like any other: it is in no list of living nodes."""
    account = after(opened(100), reserve(30, owner=""), buffered(10, owner="alive"))
    assert set(after(account, ReleaseOrphans(NodeId(""))).holds) == {"g"}


@pytest.mark.parametrize("total", [0, 5, 30])
def test_a_released_hold_stays_released(total: float) -> None:
    """Its owner may come back from a long sleep with any number: it changes nothing, and no name is used twice."""
    account = after(opened(100), reserve(30), renew(5, 30), ReleaseOrphans(NodeId("node-1")))
    assert reason(account, renew(max(total, 5), 60)) is Reason.HOLD_FENCED
    assert reason(account, finish(total)) is Reason.HOLD_FENCED
