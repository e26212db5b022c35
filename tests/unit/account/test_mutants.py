"""The ways a ledger goes wrong, tried on ours: each broken machine must fail the scenario that is named for it.

A mutant is a replacement in the source of ``channels/account.py`` or ``channels/model.py``, run from memory. The table
keeps the scenarios honest: a scenario that no longer notices its fault fails here, not in production.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from channels.faults import ChannelFault
from tests.support.mutants import Change, build
from tests.unit.account import scenarios as does

Scenario = Callable[[does.Machine], None]
MUTANTS: dict[str, tuple[str, str, str, Scenario]] = {
    "hold not subtracted": (
        "model", " - self.owed_pico - self.held_pico", " - self.owed_pico", does.two_requests_share_one_voucher,
    ),
    "> for >= in availability": (
        "account", "after.headroom_pico < command.floor", "after.headroom_pico <= command.floor", does.an_exact_fit_is_granted,
    ),
    "fold adds granted": (
        "account", "owed = account.owed_pico + event.consumed", "owed = account.owed_pico + event.granted", does.a_fold_charges_what_was_delivered,
    ),
    "granted may shrink": (
        "account", "max(command.want - hold.granted, 0)", "command.want - hold.granted", does.a_grant_never_shrinks,
    ),
    "a renewal grants what is wanted": (
        "account", "hold.granted + min(wanted, account.headroom_pico)", "hold.granted + wanted", does.a_renewal_takes_only_what_is_free,
    ),
    "recovery charges the window": (
        "account",
        "return tuple(Released(name) for name, hold in account.holds.items() if owner is None or hold.owner == owner)",
        "return tuple(e for n, h in account.holds.items() for e in (Folded(n, h.granted, h.granted), Released(n)))",
        does.recovery_gives_the_window_back,
    ),
    "no fence": (
        "account", "[Released(hold) for hold in account.streams] if command.preempt else []", "[]", does.a_newcomer_fences_the_older_request,
    ),
    "two streams at once": ("account", "if command.stream and after.streams:", "if False:", does.a_channel_has_one_stream),
    "a buffered request counts as a stream": (
        "account", "if command.stream and after.streams:", "if command.stream and after.holds:", does.a_newcomer_spares_whole_requests,
    ),
    "a buffered request waits for the stream": (
        "account", "if command.stream and after.streams:", "if after.streams:", does.a_channel_has_one_stream,
    ),
    "preempting ends buffered requests": (
        "account", "for hold in account.streams] if command.preempt", "for hold in account.holds] if command.preempt", does.a_newcomer_spares_whole_requests,
    ),
    "every hold is a stream": ("account", "event.owner, event.stream)", "event.owner)", does.a_channel_has_one_stream),
    "an ending stream is extended": ("account", " and not hold.ending", "", does.an_asked_stream_ends_with_what_it_holds),
    "a fold forgets that the end was asked": (
        "account", "before.owner, before.stream, before.ending)", "before.owner, before.stream)", does.an_asked_stream_ends_with_what_it_holds,
    ),
    "buffered requests are asked to end": (
        "account", "for hold in account.streams if not account.holds[hold].ending", "for hold in account.holds if not account.holds[hold].ending",
        does.an_asked_stream_ends_with_what_it_holds,
    ),
    "streams are asked again and again": (
        "account", " if not account.holds[hold].ending)", ")", does.an_asked_stream_ends_with_what_it_holds,
    ),
    "a fold forgets the owner": (
        "account", "Hold(event.granted, event.consumed, before.owner, before.stream,", "Hold(event.granted, event.consumed, '', before.stream,",
        does.a_fold_keeps_whose_hold_it_is,
    ),
    "the dead take everybody along": (
        "account", " if owner is None or hold.owner == owner)", ")", does.the_dead_take_only_their_own_along,
    ),
    "only named owners are released": (
        "account", " if owner is None or hold.owner == owner)", " if hold.owner == owner)", does.the_dead_take_only_their_own_along,
    ),
    "settle ignores live streams": (
        "model",
        "Units((self.owed_pico - sum(hold.consumed for hold in self.holds.values())) // PICO_PER_UNIT)",
        "self.spent",
        does.settlement_waits_for_the_end_of_a_stream,
    ),
    "settle takes a rung above consumption": (
        "model", "for rung in self.ladder if rung.cumulative <= final)", "for rung in self.ladder)", does.settlement_waits_for_the_end_of_a_stream,
    ),
    "a settlement goes back": (
        "model", "Units(max(self.chain.settled, *rungs, 0))", "Units(max(*rungs, 0, 0))", does.a_settlement_never_goes_back,
    ),
    "exposure is counted twice": (
        "model", "max(self.capturable - self.chain.settled, 0)", "self.capturable", does.settlement_waits_for_the_end_of_a_stream,
    ),
    "thinning by what was spent": (
        "account", "VoucherAccepted(_thin((*account.ladder, voucher), account.final,", "VoucherAccepted(_thin((*account.ladder, voucher), account.spent,",
        does.thinning_waits_for_the_end_of_a_stream,
    ),
    "the closing voucher may be thinned away": (
        "account",
        "VoucherAccepted(tuple(sorted((*kept, voucher), key=lambda rung: rung.cumulative)))",
        "VoucherAccepted(_thin(tuple(sorted((*kept, voucher), key=lambda rung: rung.cumulative)), account.final, policy.ladder_max))",
        does.the_closing_voucher_stays,
    ),
    "a use is forgotten": ("account", "max(account.active_at, event.now)", "account.active_at", does.a_use_is_remembered),
    "a confirmation is booked twice": (
        "account", "if record is not None and record.tx_hash == command.tx_hash:", "if False:", does.an_end_is_confirmed_once,
    ),
    "a late receipt is lost": ("account", "ConfirmClosed: frozenset({Phase.CAPTURED, Phase.CLOSED})", "ConfirmClosed: frozenset({Phase.CAPTURED})", does.an_end_is_confirmed_once),
    "two transactions closed one channel": ("account", " or record.tx_hash is not None:", ":", does.an_end_is_confirmed_once),
    "a withdrawal is booked as our close": ("account", "record is None or record.capture is None or", "record is None or", does.a_withdrawal_is_no_close_of_ours),
    "a restore earns settled money again": (
        "account", "max(account.owed_pico, command.chain.settled * PICO_PER_UNIT)", "account.owed_pico", does.a_restore_believes_vouchers_and_the_chain,
    ),
    "a restore believes vouchers above the deposit": (
        "account", "*account.ladder) if rung.cumulative <= chain.deposit}", "*account.ladder)}", does.a_restore_believes_vouchers_and_the_chain,
    ),
    "a restore leaves requests running": (
        "account", "_planned(account, *(Released(hold) for hold in account.holds), restored)", "_planned(account, restored)",
        does.a_restore_believes_vouchers_and_the_chain,
    ),
    "a restore believes an old block": ("account", "if chain.block < account.chain.block:", "if False:", does.a_restore_believes_vouchers_and_the_chain),
    "a restore without a voucher": (
        "account", "ladder[-1].cumulative * PICO_PER_UNIT < max(owed, account.spent * PICO_PER_UNIT)", "False", does.a_restore_believes_vouchers_and_the_chain,
    ),
    "a restore lowers what was shown": ("account", "max(owed, account.spent * PICO_PER_UNIT):", "owed:", does.a_restore_never_forgets_what_was_shown),
    "a restore keeps an overtaken capture": (
        "account", "record.capture < chain.settled:", "False:", does.a_restore_drops_a_capture_that_was_overtaken,
    ),
    "a restore drops every capture": (
        "account", "record.capture < chain.settled:", "True:", does.a_restore_drops_a_capture_that_was_overtaken,
    ),
    "an unpaid channel goes on": ("account", "if after.spent - after.chain.settled >= policy.unsettled_units_max:", "if False:", does.the_exposure_is_bounded),
    "the exposure limit is one too high": (
        "account", "after.chain.settled >= policy.unsettled_units_max:", "after.chain.settled > policy.unsettled_units_max:", does.the_exposure_is_bounded,
    ),
    "lower voucher accepted": ("account", "if cumulative < accepted:", "if cumulative < 0:", does.vouchers_only_rise),
    "lower voucher answered as a repeat": (
        "account", "command.voucher.cumulative == account.accepted", "command.voucher.cumulative <= account.accepted", does.vouchers_only_rise,
    ),
    "equal voucher advances": (
        "account",
        "account.phase is Phase.OPEN and command.voucher.cumulative == account.accepted",
        "command.voucher.cumulative < 0",
        does.vouchers_only_rise,
    ),
    "voucher beyond the deposit": (
        "account", "    if cumulative > account.chain.deposit:", "    if cumulative > 2**96:", does.vouchers_only_rise,
    ),
    "remainder dropped": (
        "account",
        "owed = account.owed_pico + event.consumed - before.consumed",
        "owed = (account.owed_pico + event.consumed - before.consumed) // PICO_PER_UNIT * PICO_PER_UNIT",
        does.fractions_are_carried,
    ),
    "ceiling per request": (
        "account", "max(account.spent, owed // PICO_PER_UNIT)", "max(account.spent, -(-owed // PICO_PER_UNIT))", does.fractions_are_carried,
    ),
    "spent falls with a credit": (
        "account", "Units(max(account.spent, owed // PICO_PER_UNIT))", "Units(owed // PICO_PER_UNIT)", does.a_credit_is_given_and_spent_stands,
    ),
    "no credit": (
        "account", "Pico(min(command.total,", "Pico(min(max(command.total, hold.consumed),", does.a_credit_is_given_and_spent_stands,
    ),
    "credit captured": (
        "model", "min(self.spent, self.owed_pico // PICO_PER_UNIT)", "self.spent", does.a_credit_is_given_and_spent_stands,
    ),
    "tail charged": (
        "account",
        "payable = Pico(min(command.total, hold.granted + account.headroom_pico))",
        "payable = command.total",
        does.the_tail_is_not_charged,
    ),
    "settle takes the highest voucher": (
        "model", "min(self.spent, self.owed_pico // PICO_PER_UNIT)", "self.accepted", does.a_capture_is_what_was_consumed,
    ),
    "a contract channel captures the next rung up": (
        "model", "if rung.cumulative <= earned), default=0)", "), default=0)", does.a_contract_channel_captures_a_rung,
    ),
    "the exact closing voucher is dropped": (
        "account",
        "all(rung.cumulative != voucher.cumulative for rung in account.ladder)",
        "voucher.cumulative > account.accepted",
        does.a_contract_channel_takes_the_exact_closing_voucher,
    ),
    "capture fixed before fencing": ("account", "            if account.holds:", "            if False:", does.the_capture_waits_for_the_last_request),
    "charged after the capture": (
        "account",
        "_LIVE: Final = frozenset({Phase.OPEN, ",
        "_LIVE: Final = frozenset({Phase.CAPTURED, Phase.OPEN, ",
        does.the_capture_waits_for_the_last_request,
    ),
    "close below spent": ("account", "if voucher.cumulative < least:", "if voucher.cumulative < 0:", does.a_close_covers_what_was_spent),
    "ticket used twice": ("account", "if command.ticket in account.tickets:", "if False:", does.a_credential_buys_once),
    "the ladder loses its highest": (
        "account",
        "del kept[min(inner, key=lambda i: kept[i + 1].cumulative - kept[i - 1].cumulative)]",
        "del kept[-1]",
        does.the_ladder_keeps_its_ends,
    ),
    "the ladder loses what can be settled": (
        "account", "ladder[max(settled_by - 1, 0) :]", "ladder[settled_by:]", does.the_ladder_keeps_its_ends,
    ),
    "deposit merged by maximum": (
        "account",
        "chain=event.chain, phase=event.phase)",
        "phase=event.phase, chain=replace(event.chain, deposit=max(event.chain.deposit, account.chain.deposit)))",
        does.the_chain_is_believed,
    ),
    "old blocks are news": ("account", "chain.block >= account.chain.block and ", "", does.the_chain_is_believed),
    "a lost top-up goes unnoticed": ("account", "chain.deposit < account.accepted or ", "", does.the_chain_is_believed),
    "a close request goes unnoticed": (
        "account",
        "return Phase.OPEN if chain.close_requested_at is None else Phase.CONTESTED",
        "return Phase.OPEN",
        does.a_close_request_stops_new_work,
    ),
    "an abort forgets the close request": (
        "account", "phase=_usable(account.chain), close=None", "phase=Phase.OPEN, close=None", does.a_close_request_stops_new_work,
    ),
    "a contested channel grants more": (
        "account", "account.phase is Phase.OPEN and not hold.ending", "not hold.ending", does.a_close_request_stops_new_work,
    ),
    "a top-up counts twice": ("account", "if credential == command.credential:", "if False:", does.a_top_up_counts_once),
}


def machine(patch: pytest.MonkeyPatch, *changes: Change, with_laws: bool) -> does.Machine:
    return does.Machine(*build(patch, *changes, with_laws=with_laws))


@pytest.mark.parametrize("scenario", sorted({row[3] for row in MUTANTS.values()}, key=lambda s: s.__name__), ids=lambda s: s.__name__)
def test_the_machine_passes_every_scenario(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine as it is passes them all, with and without its own alarms."""
    for with_laws in (True, False):
        scenario(machine(monkeypatch, with_laws=with_laws))


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_dies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken machine fails its scenario by what it does, even with its own alarms switched off."""
    *changes, scenario = MUTANTS[name]
    mutant = machine(monkeypatch, (changes[0], changes[1], changes[2]), with_laws=False)
    with pytest.raises((AssertionError, ChannelFault, pytest.fail.Exception)):
        scenario(mutant)
