"""What may be settled while a channel lives: only what no later usage report can take back. Amounts in units."""

from __future__ import annotations

import pytest

from channels.descriptor import Escrow
from channels.faults import Reason
from channels.model import (
    AcceptVoucher,
    Account,
    BeginClose,
    Finish,
    FixCapture,
    HoldId,
    ObserveChain,
    Phase,
    ReleaseOrphans,
    Renew,
)
from channels.policy import Policy
from tests.support.builders import (
    V1,
    V2,
    after,
    buffered,
    chain,
    decide,
    opened,
    opening,
    pico,
    reason,
    reserve,
    voucher,
)


def ladder(*rungs: int, escrow: Escrow = V2) -> Account:
    return after(opened(rungs[0], escrow=escrow), *(AcceptVoucher(voucher(rung)) for rung in rungs[1:]))


def streaming(account: Account, used: float, held: float) -> Account:
    return after(account, reserve(held), Renew(HoldId("h"), pico(used), pico(held)))


def finish(total: float, hold: str = "h") -> Finish:
    return Finish(HoldId(hold), pico(total))


@pytest.mark.parametrize(
    ("used", "final", "settleable"),
    [(0, 0, 0), (9.9, 9, 0), (10, 10, 10), (29.999999, 29, 10), (30, 30, 30), (89, 89, 30), (90, 90, 90)],
)
def test_settlement_brings_the_chain_to_a_voucher_that_is_used_up(used: float, final: int, settleable: int) -> None:
    """A settlement pays a voucher in full, so it takes the greatest one that was consumed and never the next."""
    account = ladder(10, 30, 90)
    if used:
        account = after(account, reserve(used), finish(used))
    assert (account.final, account.settleable) == (final, settleable)


def test_a_live_stream_adds_nothing_to_what_may_be_settled() -> None:
    """Its count may turn out too high at the end: what the chain has paid out cannot be given back."""
    account = streaming(after(ladder(10, 30, 90), reserve(12, hold="g", ticket="u"), finish(12, "g")), 40, 60)
    assert (account.spent, account.final, account.settleable) == (52, 12, 10)
    assert after(account, finish(25)).final == 37
    assert after(account, ReleaseOrphans()).final == 52


def test_a_buffered_request_adds_nothing_before_its_end_either() -> None:
    """What ends a charge is the end of the request, not its kind."""
    account = after(ladder(10, 30), buffered(20), Renew(HoldId("g"), pico(15), pico(20)))
    assert (account.spent, account.final, account.settleable) == (15, 0, 0)


def test_final_never_falls() -> None:
    """Through charges, credits and fences it only rises, so a settlement that was right stays right."""
    account, seen = ladder(10, 30, 90), [0]
    for step in (
        reserve(40),
        Renew(HoldId("h"), pico(35), pico(40)),
        finish(11),
        reserve(20, hold="g", ticket="u"),
        Renew(HoldId("g"), pico(20), pico(20)),
        reserve(5, hold="i", ticket="i"),
        finish(0, "i"),
    ):
        account = after(account, step)
        seen.append(account.final)
    assert seen == [0, 0, 0, 11, 11, 11, 31, 31]


def test_a_settlement_during_a_stream_survives_the_streams_credit() -> None:
    """The chain was paid for ended requests alone, so the capture after a full credit is not below it."""
    account = after(ladder(10, 30, 90), reserve(10), finish(10))
    account = streaming_on(account)
    account = after(account, ObserveChain(chain(1_000, settled=account.settleable, block=5)))
    assert (account.phase, account.chain.settled) == (Phase.OPEN, 10)
    closed = after(account, finish(0, "s"), BeginClose("c", None), FixCapture())
    assert closed.close is not None
    assert closed.close.capture == 10
    assert closed.owed_pico == pico(10)


def streaming_on(account: Account) -> Account:
    """A stream ``s`` that has been charged 50 of its 60."""
    return after(account, reserve(60, hold="s", ticket="s"), Renew(HoldId("s"), pico(50), pico(60)))


def test_what_the_chain_has_paid_is_the_least_that_is_settled() -> None:
    """A settlement never goes back: the escrow refuses amounts that do not increase."""
    account = after(None, opening(100, on_chain=chain(1_000, settled=60)))
    assert (account.settleable, account.unsettled) == (60, 0)


@pytest.mark.parametrize(("used", "settled", "unsettled"), [(0, 0, 0), (40, 0, 40), (40.5, 10, 30), (40, 30, 10)])
def test_unsettled_is_what_a_close_would_still_bring(used: float, settled: int, unsettled: int) -> None:
    """The node's exposure: earned and not paid out."""
    account = ladder(10, 30, 90)
    if used:
        account = after(account, reserve(used), finish(used))
    assert after(account, ObserveChain(chain(1_000, settled=settled, block=5))).unsettled == unsettled


def test_unsettled_counts_whole_vouchers_on_the_contract_escrow() -> None:
    """There a close pays no more than a settlement would."""
    account = after(ladder(10, 30, 90, escrow=V1), reserve(45), finish(45))
    assert (account.settleable, account.unsettled) == (30, 30)


# --------------------------------------------------------------------------------------------------- the ladder


def test_thinning_keeps_the_voucher_that_can_be_cashed_now() -> None:
    """What ``spent`` has passed is not used up while the stream runs: its credit would leave nothing to cash."""
    account = streaming(after(ladder(10, 30, 90), reserve(12, hold="g", ticket="u"), finish(12, "g")), 40, 60)
    account = after(account, AcceptVoucher(voucher(200)), policy=Policy(ladder_max=4))
    assert [rung.cumulative for rung in account.ladder] == [10, 30, 90, 200]
    account = after(account, finish(19), AcceptVoucher(voucher(300)), policy=Policy(ladder_max=4))
    assert (account.final, account.settleable) == (31, 30)


def test_thinning_by_rungs_that_are_used_up_for_good() -> None:
    """Once the stream has ended, what lies below the greatest used-up voucher is forgotten."""
    account = after(ladder(10, 20, 30, 40), reserve(35), finish(35), AcceptVoucher(voucher(200)))
    assert [rung.cumulative for rung in account.ladder] == [30, 40, 200]


def test_the_closing_voucher_is_never_thinned_away() -> None:
    """A v1 payer who closes signs exactly what was spent; losing that rung would pay the node the one below it."""
    policy = Policy(ladder_max=4)
    account = streaming(ladder(10, 59, 61, 100, escrow=V1), 60, 60)
    account = after(account, BeginClose("c", voucher(60)), finish(60), FixCapture(), policy=policy)
    assert account.close is not None
    assert account.close.capture == 60, "the rungs around it are nearer to it than any others"


# --------------------------------------------------------------------------------------------------- the exposure


def test_a_channel_that_owes_too_much_gets_no_new_request() -> None:
    """A payer whose token is frozen, or a chain that stands still, costs the node a known amount."""
    policy = Policy(unsettled_units_max=pico(0.000040))
    owing = after(opened(100), reserve(40), finish(40))
    fault_at = reserve(1, hold="g", ticket="u")
    assert reason(owing, fault_at, policy=policy) is Reason.EXPOSURE_LIMIT
    paid = after(owing, ObserveChain(chain(1_000, settled=1, block=5)))
    assert not decide(paid, fault_at, policy=policy).result.replayed
    assert reason(owing, buffered(1), policy=policy) is Reason.EXPOSURE_LIMIT
