"""The ways a credit ledger goes wrong, tried on ours: each broken machine must fail the scenario that is named for it.

A mutant is a replacement in the source of ``channels/credit.py``, run from memory; one that no longer applies is an
error, so the table cannot quietly stop testing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import channels.credit
from tests.unit.credit import scenarios as does

SOURCE = Path(channels.credit.__file__).read_text()
Scenario = Callable[[does.Machine], None]
MUTANTS: dict[str, tuple[str, str, Scenario]] = {
    "a hold is not subtracted": (" + self.overdraft - self.held", " + self.overdraft", does.requests_share_the_funds),
    "what is owed is not subtracted": ("return self.funds - self.owed", "return self.funds", does.an_overdraft_may_be_owed),
    "a hold counts in full beside its charge": ("return self.granted - self.consumed", "return self.granted", does.requests_share_the_funds),
    "> for >= in credit": ("if account.headroom < command.floor", "if account.headroom <= command.floor", does.requests_share_the_funds),
    "more is granted than there is": ("granted = Pico(min(command.want, most))", "granted = command.want", does.requests_share_the_funds),
    "no trust": ("self.balance + self.overdraft - self.held", "self.balance - self.held", does.an_overdraft_may_be_owed),
    "trust is funds": ("return self.prepaid + self.invoiced", "return self.prepaid + self.invoiced + self.overdraft", does.an_overdraft_may_be_owed),
    "trust without end": ("if not 0 <= overdraft <= FUNDS_MAX:", "if overdraft < 0:", does.an_overdraft_may_be_owed),
    "trust below zero": ("if not 0 <= overdraft <= FUNDS_MAX:", "if overdraft > FUNDS_MAX:", does.what_does_not_exist_is_not_found),
    "charged above the hold": ("total = Pico(min(command.total, hold.granted))", "total = command.total", does.nobody_pays_above_the_hold),
    "folded above the hold": ("if command.consumed > hold.granted:", "if False:", does.nobody_pays_above_the_hold),
    "the last pico of a hold is fenced": ("command.consumed > hold.granted:", "command.consumed >= hold.granted:", does.nobody_pays_above_the_hold),
    "nothing is given back": ("Pico(min(command.total, hold.granted))", "Pico(max(min(command.total, hold.granted), hold.consumed))", does.an_over_count_is_given_back),
    "a key's spending only rises": ("spending[before.key].plus(added,", "spending[before.key].plus(max(added, 0),", does.an_over_count_is_given_back),
    "a charge adds all that was consumed": ("added = event.consumed - before.consumed", "added = event.consumed", does.an_over_count_is_given_back),
    "a day goes below zero": ("spent_day=max(this.spent_day + amount, 0)", "spent_day=this.spent_day + amount", does.giving_back_opens_no_window_below_zero),
    "a cap forgets what is held": ("max(cap - so_far - held, 0)", "max(cap - so_far, 0)", does.a_cap_counts_what_is_held),
    "a cap forgets what was spent": ("max(cap - so_far - held, 0)", "max(cap - held, 0)", does.a_cap_counts_what_is_held),
    "a cap counts everybody's holds": (" if hold.key == key)", ")", does.a_cap_counts_what_is_held),
    "> for >= in caps": ("capped.left < command.floor", "capped.left <= command.floor", does.a_cap_counts_what_is_held),
    "a grant ignores the cap": ("most = account.headroom if capped is None else min(account.headroom, capped.left)", "most = account.headroom", does.a_cap_counts_what_is_held),
    "a negative rest of a cap": ("max(cap - so_far - held, 0)", "cap - so_far - held", does.a_lowered_cap_refuses_the_next),
    "a clock that steps back opens a day": ("day = max(now // _DAY_S, self.day)", "day = now // _DAY_S", does.days_and_months_begin_at_midnight),
    "a day opens the month": ("self.spent_month if month == self.month else 0", "0", does.days_and_months_begin_at_midnight),
    "a month never opens": ("self.spent_month if month == self.month else 0", "self.spent_month", does.days_and_months_begin_at_midnight),
    "a day never opens": ("Spending(day, month, 0, self", "Spending(day, month, self.spent_day, self", does.days_and_months_begin_at_midnight),
    "a total begins again": ("else 0, self.spent_total)", "else 0, 0)", does.days_and_months_begin_at_midnight),
    "months of one year": ("month = date.year * 12 + date.month - 1", "month = date.year", does.days_and_months_begin_at_midnight),
    "a month ends a month late": ("divmod(date.year * 12 + date.month, 12)", "divmod(date.year * 12 + date.month + 1, 12)", does.days_and_months_begin_at_midnight),
    "the first window is named": ("left == least or left < floor][-1]", "left == least or left < floor][0]", does.a_refusal_names_the_window_to_wait_for),
    "only the tightest window is named": ("left == least or left < floor]", "left == least]", does.a_refusal_names_the_window_to_wait_for),
    "a window with room is named": ("left == least or left < floor]", "left == least or left <= floor]", does.a_refusal_names_the_window_to_wait_for),
    "what the loosest cap leaves": ("least = Pico(min(", "least = Pico(max(", does.a_refusal_names_the_window_to_wait_for),
    "a repeat holds again": ("if known is not None:", "if False:", does.a_repeat_changes_nothing),
    "a repeated fold is an event": ("if command.consumed == hold.consumed:", "if False:", does.a_repeat_changes_nothing),
    "nothing moved is an event": ("if command.amount == 0:", "if False:", does.a_repeat_changes_nothing),
    "an older key is believed": ("if command.access != account.access:", "if command.access > account.access:", does.old_knowledge_is_refused),
    "a newer key is believed": ("if command.access != account.access:", "if command.access < account.access:", does.old_knowledge_is_refused),
    "access stands still": ("access=account.access + 1", "access=account.access", does.old_knowledge_is_refused),
    "one too many at once": ("if running >= command.concurrency", "if running > command.concurrency", does.a_key_has_so_many_at_once),
    "everybody's requests count": (" if hold.key == command.key)", ")", does.a_key_has_so_many_at_once),
    "a row without end": (" or len(account.holds) >= HOLDS_MAX:", ":", does.an_account_has_so_many_at_once),
    "one too many in a row": ("len(account.holds) >= HOLDS_MAX:", "len(account.holds) > HOLDS_MAX:", does.an_account_has_so_many_at_once),
    "a row one too short": ("len(account.holds) >= HOLDS_MAX:", "len(account.holds) >= HOLDS_MAX - 1:", does.an_account_has_so_many_at_once),
    "headroom is never negative": ("return self.balance + self.overdraft - self.held", "return max(self.balance + self.overdraft - self.held, 0)", does.a_chargeback_takes_what_was_promised),
    "what is left is negative": ("left=Pico(max(account.headroom, 0))", "left=Pico(account.headroom)", does.a_chargeback_takes_what_was_promised),
    "live requests are billed": ("max(account.final - account.prepaid, 0)", "max(account.owed - account.prepaid, 0)", does.only_ended_usage_is_billed),
    "what was prepaid is billed": ("max(account.final - account.prepaid, 0)", "max(account.final, 0)", does.only_ended_usage_is_billed),
    "a paid invoice is prepaid": ("max(account.final - account.prepaid, 0)", "max(account.final - account.funds, 0)", does.only_ended_usage_is_billed),
    "billed twice": ("added = billable - account.reported_micro", "added = billable", does.only_ended_usage_is_billed),
    "a bill is rounded up": ("max(account.final - account.prepaid, 0) // PICO_PER_UNIT", "-(-max(account.final - account.prepaid, 0) // PICO_PER_UNIT)", does.only_ended_usage_is_billed),
    "reports fall": ("if billable <= account.reported_micro:", "if billable == account.reported_micro:", does.only_ended_usage_is_billed),
    "an invoice is prepaid": ("if event.kind is FundsKind.INVOICE:", "if False:", does.only_ended_usage_is_billed),
    "funds without end": (") > FUNDS_MAX:", ") > FUNDS_MAX * 2:", does.funds_fit_their_columns),
    "a part without end": ("max(after.funds, abs(after.prepaid), abs(after.invoiced))", "after.funds", does.funds_fit_their_columns),
    "a debt without end": ("after.funds < FUNDS_MIN or ", "", does.funds_fit_their_columns),
    "a last charge brings the dead back": ("if before.key in spending:", "spending = {before.key: Spending(), **spending}\n    if True:", does.the_dead_stay_forgotten),
    "a last pace brings the dead back": ("if pace is None or key not in account.spending:", "if pace is None:", does.the_dead_stay_forgotten),
    "everybody is forgotten": ("in account.spending.items() if key != event.forgot}", "in ()}", does.the_dead_stay_forgotten),
    "paces are remembered": ("in account.paces.items() if key != event.forgot}", "in account.paces.items()}", does.the_dead_stay_forgotten),
    "silence forgets the pace": ("if pace is None or", "if", does.what_a_limiter_keeps_comes_with_the_money),
    "the end keeps the old pace": ("return _paced(replace(account, version=version, holds=holds), key, event.pace)", "return replace(account, version=version, holds=holds)", does.what_a_limiter_keeps_comes_with_the_money),
    "a fold forgets the owner": ("replace(before, consumed=event.consumed)", "CreditHold(before.granted, event.consumed, before.key)", does.a_hold_says_whose_it_is),
    "the last charge goes back": ("max(account.charged_at, event.at)", "event.at", does.a_hold_says_whose_it_is),
    "an unknown account is opened": ("raise CreditFault(CreditReason.NOT_FOUND)", "account = CreditAccount(id='acct', version=0)", does.what_does_not_exist_is_not_found),
    "an opening forgets the trust": ("version=1, overdraft=event.overdraft)", "version=1)", does.what_does_not_exist_is_not_found),
}


def machine(patch: pytest.MonkeyPatch, old: str = "", new: str = "", *, with_laws: bool) -> does.Machine:
    """A machine from the source with one replacement, with or without its own alarm: what it does must show it."""
    assert old in SOURCE, f"the mutant no longer applies, say it in today's words: {old}"
    module = ModuleType("channels.credit")
    patch.setitem(sys.modules, module.__name__, module)
    exec(compile(SOURCE.replace(old, new, 1) if old else SOURCE, "<mutant credit>", "exec"), module.__dict__)
    if not with_laws:
        module.__dict__["check"] = lambda account: None
    return does.Machine(module)


@pytest.mark.parametrize("with_laws", [True, False])
@pytest.mark.parametrize("scenario", sorted({row[2] for row in MUTANTS.values()}, key=lambda s: s.__name__), ids=lambda s: s.__name__)
def test_the_machine_passes_every_scenario(scenario: Scenario, with_laws: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine as it is passes them all, with and without its own alarms."""
    scenario(machine(monkeypatch, with_laws=with_laws))


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_dies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken machine fails its scenario by what it does, even with its own alarms switched off."""
    old, new, scenario = MUTANTS[name]
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        scenario(machine(monkeypatch, old, new, with_laws=False))
