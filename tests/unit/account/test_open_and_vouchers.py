"""Opening a channel, the ladder of vouchers, and top-ups."""

from __future__ import annotations

import pytest

from channels.faults import Reason
from channels.ids import Hash32
from channels.model import (
    TOP_UPS_MAX,
    AcceptVoucher,
    Finish,
    HoldId,
    ObserveChain,
    Phase,
    RecordTopUp,
    VoucherAccepted,
)
from channels.policy import Policy
from channels.units import MAX_UINT96, PICO_PER_UNIT, Units
from tests.support.builders import TX, after, chain, decide, opened, opening, pico, reason, refusal, reserve, voucher


def test_an_open_starts_with_its_voucher_and_owes_nothing() -> None:
    """A new channel may spend its first voucher and not a pico more."""
    account = opened(100, 1_000)
    assert (account.accepted, account.spent, account.owed_pico, account.version) == (100, 0, 0, 1)
    assert account.headroom_pico == pico(100)


def test_a_repeated_open_is_a_replay() -> None:
    """The id contains the opening transaction, so the same id again is the same open again."""
    again = decide(opened(), opening(500))
    assert again.events == ()
    assert again.result.replayed
    assert again.account.accepted == 100


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (opening(5, 9), Reason.DEPOSIT_TOO_SMALL),
        (opening(50, 9), Reason.DEPOSIT_TOO_SMALL),
        (opening(1_001, 1_000), Reason.VOUCHER_EXCEEDS_DEPOSIT),
        (opening(99, on_chain=chain(1_000, settled=100)), Reason.VOUCHER_TOO_LOW),
        (opening(100, on_chain=chain(1_000, closing=5)), Reason.CHANNEL_FINALIZED),
    ],
    ids=["small", "small-first", "above-deposit", "below-settled", "being-closed"],
)
def test_opens_that_are_refused(command: object, expected: Reason) -> None:
    """A channel is opened only when it is worth it, covered, unsettled beyond its voucher and not being closed."""
    assert reason(None, command, policy=Policy(deposit_units_min=Units(10))) is expected  # type: ignore[arg-type]


def test_what_the_chain_paid_out_before_the_books_were_lost_is_never_earned_again() -> None:
    """Re-opening a settled channel starts with that amount as spent: nothing is left of a voucher for as much."""
    account = after(None, opening(100, on_chain=chain(1_000, settled=100)))
    assert (account.spent, account.owed_pico, account.headroom_pico) == (100, pico(100), 0)


@pytest.mark.parametrize(
    ("cumulative", "expected"),
    [
        (1_001, Reason.VOUCHER_EXCEEDS_DEPOSIT),
        (99, Reason.VOUCHER_TOO_LOW),
        (0, Reason.VOUCHER_TOO_LOW),
        (101, Reason.VOUCHER_DELTA_TOO_SMALL),
        (104, Reason.VOUCHER_DELTA_TOO_SMALL),
    ],
)
def test_vouchers_that_are_refused(cumulative: int, expected: Reason) -> None:
    """A voucher advances enough and stays inside the deposit, or is refused with the numbers that clashed."""
    fault = refusal(opened(), AcceptVoucher(voucher(cumulative)), policy=Policy(voucher_delta_units_min=Units(5)))
    assert fault.reason is expected
    assert fault.numbers["cumulative"] == cumulative


@pytest.mark.parametrize("cumulative", [105, 1_000])
def test_vouchers_at_the_edges_are_accepted(cumulative: int) -> None:
    """The least advance and the whole deposit both count."""
    account = after(opened(), AcceptVoucher(voucher(cumulative)), policy=Policy(voucher_delta_units_min=Units(5)))
    assert account.accepted == cumulative
    assert account.ladder[-1] == voucher(cumulative), "the signature is kept with its amount"


def test_an_equal_voucher_is_a_replay_whatever_the_least_advance() -> None:
    """An honest retry never meets a new error."""
    made = decide(opened(), AcceptVoucher(voucher(100)), policy=Policy(voucher_delta_units_min=Units(5)))
    assert made.events == ()
    assert made.result.replayed


def test_uint96_amounts_are_ordinary() -> None:
    """The largest amount the escrow can hold is held, spent and kept exact."""
    account = after(None, opening(MAX_UINT96, MAX_UINT96), reserve(1, MAX_UINT96))
    account = after(account, Finish(HoldId("h"), account.holds[HoldId("h")].granted))
    assert (account.spent, account.owed_pico) == (MAX_UINT96, MAX_UINT96 * PICO_PER_UNIT)


# ----------------------------------------------------------------------------------------------------------- ladder


def rungs(spent: int, amounts: list[int], limit: int) -> list[int]:
    account = opened(spent + 1, 10_000)
    if spent:
        account = after(account, reserve(spent), Finish(HoldId("h"), pico(spent)))
    for amount in amounts:
        account = after(account, AcceptVoucher(voucher(amount)), policy=Policy(ladder_max=limit))
        assert account.ladder[-1].cumulative == amount, "the highest is never lost"
        assert len(account.ladder) <= limit
    return [rung.cumulative for rung in account.ladder]


def test_thinning_drops_the_rung_that_leaves_the_smallest_gap() -> None:
    """When the ladder is full, what goes is what settlement misses least."""
    assert rungs(0, [100, 110, 500, 900], limit=4) == [1, 110, 500, 900]
    assert rungs(0, [100, 110, 500, 510, 900], limit=4) == [1, 110, 510, 900]


def test_rungs_below_the_greatest_that_is_spent_are_forgotten() -> None:
    """Settlement needs the greatest rung that is not above what was spent, and none below that."""
    account = after(opened(10, 1_000), *(AcceptVoucher(voucher(n)) for n in (20, 30, 40)), reserve(25))
    account = after(account, Finish(HoldId("h"), pico(25)), AcceptVoucher(voucher(50)))
    assert [rung.cumulative for rung in account.ladder] == [20, 30, 40, 50]


@pytest.mark.parametrize("limit", [2, 3, 5])
def test_thinning_keeps_the_settlable_rung_and_the_highest(limit: int) -> None:
    """However many vouchers come, the ladder ends with the newest and begins with the greatest one already spent."""
    kept = rungs(7, [9, 20, 21, 22, 40, 80, 81, 300, 4_000], limit)
    assert kept[0] == 8, "the greatest that can be settled first (8 was the opening voucher, 7 are spent)"
    assert kept[-1] == 4_000


# ----------------------------------------------------------------------------------------------------------- top-ups


def credential(number: int) -> Hash32:
    return Hash32(number.to_bytes(32, "big"))


def test_a_top_up_raises_the_deposit_and_cancels_the_payers_close_request() -> None:
    """On the escrow a top-up takes a close request back; the account follows the chain."""
    contested = after(opened(), ObserveChain(chain(1_000, closing=5, block=2)))
    account = after(contested, RecordTopUp(credential(1), TX, chain(1_500, block=3)))
    assert (account.phase, account.chain.deposit) == (Phase.OPEN, 1_500)


def test_a_repeated_top_up_gives_the_stored_transaction_in_every_phase() -> None:
    """A credential is recognised for ever, also after the channel has been closed on chain."""
    account = after(opened(), RecordTopUp(credential(1), TX, chain(1_500, block=3)), ObserveChain(chain(0, block=4)))
    assert account.phase is Phase.CLOSED
    made = decide(account, RecordTopUp(credential(1), Hash32(bytes(32)), chain(9_999, block=9)))
    assert made.events == ()
    assert made.result.replayed
    assert made.result.tx_hash == TX


def test_a_top_up_seen_through_an_older_block_changes_no_chain_facts() -> None:
    """The credential is remembered; the newer snapshot stays."""
    account = after(opened(), ObserveChain(chain(3_000, block=9)), RecordTopUp(credential(1), TX, chain(1_500, block=3)))
    assert account.chain == chain(3_000, block=9)
    assert account.top_ups == ((credential(1), TX),)


def test_only_the_newest_top_ups_are_remembered() -> None:
    """The memory is bounded; the oldest credential goes first."""
    account = opened()
    for number in range(TOP_UPS_MAX + 1):
        account = after(account, RecordTopUp(credential(number), TX, chain(1_001 + number, block=2 + number)))
    assert [known for known, _ in account.top_ups] == [credential(n) for n in range(1, TOP_UPS_MAX + 1)]


def test_a_channel_that_is_gone_when_its_top_up_is_read_holds_nothing() -> None:
    """A deposit of zero closes the channel whichever command brings the news."""
    account = after(opened(), reserve(10), RecordTopUp(credential(1), TX, chain(0, block=9)))
    assert account.phase is Phase.CLOSED
    assert not account.holds


def test_the_ladder_travels_whole_in_its_event() -> None:
    """The journal alone rebuilds the ladder, thinning included."""
    made = decide(opened(), AcceptVoucher(voucher(200)))
    assert made.events == (VoucherAccepted((voucher(100), voucher(200))),)
