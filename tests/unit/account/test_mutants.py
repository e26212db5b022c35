"""The ways a ledger goes wrong, tried on ours: each broken machine must fail the scenario that is named for it.

A mutant is a replacement in the source of ``channels/account.py`` or ``channels/model.py``, run from memory. The table
keeps the scenarios honest: a scenario that no longer notices its fault fails here, not in production.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import channels.account
import channels.model
from channels.faults import ChannelFault, Reason
from channels.policy import Policy
from channels.units import PICO_PER_UNIT
from tests.support.builders import CHANNEL, NOW, TX, V1, V2, chain, descriptor

SOURCES = {"account": Path(channels.account.__file__).read_text(), "model": Path(channels.model.__file__).read_text()}
DEEP = Policy(ladder_max=3, holds_max=4)


class Machine:
    """One build of the account machine, spoken to in units."""

    def __init__(self, model: ModuleType, account: ModuleType) -> None:
        self.m, self.a = model, account
        self.account: Any = None
        self.journal: list[Any] = []
        self.block = 1

    def do(self, command: Any) -> Any:
        made = self.a.plan(self.account, command, now=NOW, policy=DEEP)
        self.account = made.account
        self.journal.extend(made.events)
        assert reduce(self.a.fold, self.journal, None) == self.account
        return made.result

    def refuses(self, why: Reason, ask: Callable[[], Any]) -> None:
        with pytest.raises(ChannelFault) as caught:
            ask()
        assert caught.value.reason is why

    def signed(self, units: int) -> Any:
        return self.m.Voucher(units, units.to_bytes(65, "big"))

    def open(self, cumulative: int = 100, deposit: int = 1_000, escrow: Any = V2) -> Any:
        return self.do(self.m.Open(CHANNEL, escrow, descriptor(), chain(deposit), self.signed(cumulative)))

    def voucher(self, units: int) -> Any:
        return self.do(self.m.AcceptVoucher(self.signed(units)))

    def reserve(self, floor: float, want: float | None = None, *, hold: str = "h", ticket: str | None = None, preempt: bool = True) -> Any:
        least, most = int(floor * PICO_PER_UNIT), int((want or floor) * PICO_PER_UNIT)
        return self.do(self.m.Reserve(hold, ticket or hold, NOW + 300, least, most, preempt))

    def renew(self, consumed: float, want: float, hold: str = "h") -> Any:
        return self.do(self.m.Renew(hold, int(consumed * PICO_PER_UNIT), int(want * PICO_PER_UNIT)))

    def finish(self, total: float, hold: str = "h") -> Any:
        return self.do(self.m.Finish(hold, int(total * PICO_PER_UNIT)))

    def see(self, deposit: int, settled: int = 0, closing: int | None = None, block: int | None = None) -> Any:
        self.block += 1
        return self.do(self.m.ObserveChain(chain(deposit, settled, closing, self.block if block is None else block)))

    def close(self, cumulative: int | None = None) -> Any:
        return self.do(self.m.BeginClose("c", None if cumulative is None else self.signed(cumulative)))

    def capture(self) -> int:
        self.do(self.m.FixCapture())
        capture: int = self.account.close.capture
        return capture

    @property
    def owed(self) -> float:
        return float(self.account.owed_pico) / PICO_PER_UNIT


# -------------------------------------------------------------------------------------------------------- scenarios


def two_requests_share_one_voucher(n: Machine) -> None:
    n.open()
    n.reserve(60)
    n.refuses(Reason.INSUFFICIENT_BALANCE, lambda: n.reserve(41, hold="g", preempt=False))


def an_exact_fit_is_granted(n: Machine) -> None:
    n.open()
    assert n.reserve(100).granted == 100 * PICO_PER_UNIT


def a_fold_charges_what_was_delivered(n: Machine) -> None:
    n.open()
    n.reserve(10, 40)
    n.renew(7, 40)
    assert n.owed == 7


def a_grant_never_shrinks(n: Machine) -> None:
    n.open()
    n.reserve(50)
    assert n.renew(5, 10).granted == 50 * PICO_PER_UNIT


def a_renewal_takes_only_what_is_free(n: Machine) -> None:
    n.open()
    n.reserve(60)
    assert n.renew(10, 500).granted == 100 * PICO_PER_UNIT
    assert n.account.headroom_pico == 0


def recovery_gives_the_window_back(n: Machine) -> None:
    n.open()
    n.reserve(60)
    n.renew(12, 60)
    n.do(n.m.ReleaseOrphans())
    assert n.owed == 12
    assert n.account.headroom_pico == 88 * PICO_PER_UNIT


def a_newcomer_fences_the_older_request(n: Machine) -> None:
    n.open()
    n.reserve(60)
    n.reserve(60, hold="g")
    n.refuses(Reason.HOLD_FENCED, lambda: n.renew(20, 60))
    n.refuses(Reason.HOLD_FENCED, lambda: n.finish(20))


def vouchers_only_rise(n: Machine) -> None:
    n.open()
    n.refuses(Reason.VOUCHER_TOO_LOW, lambda: n.voucher(99))
    version = n.account.version
    assert n.voucher(100).replayed
    assert n.account.version == version
    n.refuses(Reason.VOUCHER_EXCEEDS_DEPOSIT, lambda: n.voucher(1_001))
    n.voucher(1_000)


def fractions_are_carried(n: Machine) -> None:
    n.open()
    for i in range(3):
        n.reserve(1, hold=f"h{i}")
        n.finish(0.4, hold=f"h{i}")
    assert n.account.owed_pico == 1_200_000
    assert n.account.spent == 1


def a_credit_is_given_and_spent_stands(n: Machine) -> None:
    n.open()
    n.reserve(60)
    n.renew(40, 60)
    n.finish(25)
    assert n.owed == 25
    assert n.account.spent == 40
    n.close()
    assert n.capture() == 25


def the_tail_is_not_charged(n: Machine) -> None:
    n.open()
    n.reserve(10)
    n.reserve(70, hold="g", preempt=False)
    assert n.finish(45).unpaid == 15 * PICO_PER_UNIT
    assert n.owed == 30


def a_capture_is_what_was_consumed(n: Machine) -> None:
    n.open()
    n.reserve(50)
    n.finish(33.9)
    n.close(100)
    assert n.capture() == 33


def a_contract_channel_captures_a_rung(n: Machine) -> None:
    n.open(10, escrow=V1)
    n.voucher(30)
    n.voucher(90)
    n.reserve(50)
    n.finish(50)
    n.close()
    assert n.capture() == 30


def a_contract_channel_takes_the_exact_closing_voucher(n: Machine) -> None:
    n.open(10, escrow=V1)
    n.voucher(90)
    n.reserve(50)
    n.finish(50)
    n.close(50)
    assert n.capture() == 50


def the_capture_waits_for_the_last_request(n: Machine) -> None:
    n.open()
    n.reserve(50)
    n.close(100)
    n.refuses(Reason.CHANNEL_BUSY, n.capture)
    n.finish(20)
    assert n.capture() == 20
    n.refuses(Reason.CHANNEL_FINALIZED, lambda: n.finish(21))


def a_close_covers_what_was_spent(n: Machine) -> None:
    n.open()
    n.reserve(50)
    n.finish(50)
    n.refuses(Reason.CLOSE_BELOW_SPENT, lambda: n.close(49))
    n.close(50)


def a_credential_buys_once(n: Machine) -> None:
    n.open()
    n.reserve(5, ticket="t")
    n.finish(1)
    n.refuses(Reason.CREDENTIAL_USED, lambda: n.reserve(5, hold="g", ticket="t"))


def the_ladder_keeps_its_ends(n: Machine) -> None:
    n.open(10)
    n.reserve(10)
    n.finish(10)
    for units in (20, 30, 31, 500):
        n.voucher(units)
        assert n.account.accepted == units
    assert [rung.cumulative for rung in n.account.ladder] == [10, 31, 500]


def the_chain_is_believed(n: Machine) -> None:
    n.open()
    n.see(2_000)
    assert n.see(1_500, block=1).replayed, "an older block is no news"
    assert n.account.chain.deposit == 2_000
    n.see(900)
    assert n.account.chain.deposit == 900, "a newer block may say less"
    n.see(99)
    assert n.account.phase.value == "suspect"


def a_close_request_stops_new_work(n: Machine) -> None:
    n.open()
    n.reserve(10, 20)
    n.see(1_000, closing=5)
    n.refuses(Reason.CHANNEL_FINALIZED, lambda: n.voucher(200))
    n.refuses(Reason.CHANNEL_FINALIZED, lambda: n.reserve(1, hold="g"))
    assert n.renew(5, 90).granted == 20 * PICO_PER_UNIT
    n.close(100)
    n.finish(6)
    n.do(n.m.AbortClose())
    n.refuses(Reason.CHANNEL_FINALIZED, lambda: n.voucher(200))


def a_top_up_counts_once(n: Machine) -> None:
    n.open()
    assert not n.do(n.m.RecordTopUp(b"c" * 32, TX, chain(1_500, block=2))).replayed
    again = n.do(n.m.RecordTopUp(b"c" * 32, bytes(32), chain(9_000, block=3)))
    assert again.replayed
    assert again.tx_hash == TX
    assert n.account.chain.deposit == 1_500


# ---------------------------------------------------------------------------------------------------------- mutants

Scenario = Callable[[Machine], None]
MUTANTS: dict[str, tuple[str, str, str, Scenario]] = {
    "hold not subtracted": (
        "model", " - self.owed_pico - self.held_pico", " - self.owed_pico", two_requests_share_one_voucher,
    ),
    "> for >= in availability": (
        "account", "after.headroom_pico < command.floor", "after.headroom_pico <= command.floor", an_exact_fit_is_granted,
    ),
    "fold adds granted": (
        "account", "owed = account.owed_pico + event.consumed", "owed = account.owed_pico + event.granted", a_fold_charges_what_was_delivered,
    ),
    "granted may shrink": (
        "account", "max(command.want - hold.granted, 0)", "command.want - hold.granted", a_grant_never_shrinks,
    ),
    "a renewal grants what is wanted": (
        "account", "hold.granted + min(wanted, account.headroom_pico)", "hold.granted + wanted", a_renewal_takes_only_what_is_free,
    ),
    "recovery charges the window": (
        "account",
        "return _planned(account, *(Released(hold) for hold in account.holds))",
        "return _planned(account, *(e for n, h in account.holds.items() for e in (Folded(n, h.granted, h.granted), Released(n))))",
        recovery_gives_the_window_back,
    ),
    "no fence": (
        "account", "[Released(hold) for hold in account.holds] if command.preempt else []", "[]", a_newcomer_fences_the_older_request,
    ),
    "lower voucher accepted": ("account", "if cumulative < accepted:", "if cumulative < 0:", vouchers_only_rise),
    "lower voucher answered as a repeat": (
        "account", "command.voucher.cumulative == account.accepted", "command.voucher.cumulative <= account.accepted", vouchers_only_rise,
    ),
    "equal voucher advances": (
        "account",
        "account.phase is Phase.OPEN and command.voucher.cumulative == account.accepted",
        "command.voucher.cumulative < 0",
        vouchers_only_rise,
    ),
    "voucher beyond the deposit": (
        "account", "    if cumulative > account.chain.deposit:", "    if cumulative > 2**96:", vouchers_only_rise,
    ),
    "remainder dropped": (
        "account",
        "owed = account.owed_pico + event.consumed - account.holds[event.hold].consumed",
        "owed = (account.owed_pico + event.consumed - account.holds[event.hold].consumed) // PICO_PER_UNIT * PICO_PER_UNIT",
        fractions_are_carried,
    ),
    "ceiling per request": (
        "account", "max(account.spent, owed // PICO_PER_UNIT)", "max(account.spent, -(-owed // PICO_PER_UNIT))", fractions_are_carried,
    ),
    "spent falls with a credit": (
        "account", "Units(max(account.spent, owed // PICO_PER_UNIT))", "Units(owed // PICO_PER_UNIT)", a_credit_is_given_and_spent_stands,
    ),
    "no credit": (
        "account", "Pico(min(command.total,", "Pico(min(max(command.total, hold.consumed),", a_credit_is_given_and_spent_stands,
    ),
    "credit captured": (
        "model", "min(self.spent, self.owed_pico // PICO_PER_UNIT)", "self.spent", a_credit_is_given_and_spent_stands,
    ),
    "tail charged": (
        "account",
        "payable = Pico(min(command.total, hold.granted + account.headroom_pico))",
        "payable = command.total",
        the_tail_is_not_charged,
    ),
    "settle takes the highest voucher": (
        "model", "min(self.spent, self.owed_pico // PICO_PER_UNIT)", "self.accepted", a_capture_is_what_was_consumed,
    ),
    "a contract channel captures the next rung up": (
        "model", "if rung.cumulative <= earned), default=0)", "), default=0)", a_contract_channel_captures_a_rung,
    ),
    "the exact closing voucher is dropped": (
        "account",
        "all(rung.cumulative != voucher.cumulative for rung in account.ladder)",
        "voucher.cumulative > account.accepted",
        a_contract_channel_takes_the_exact_closing_voucher,
    ),
    "capture fixed before fencing": ("account", "            if account.holds:", "            if False:", the_capture_waits_for_the_last_request),
    "charged after the capture": (
        "account",
        "_LIVE: Final = frozenset({Phase.OPEN, ",
        "_LIVE: Final = frozenset({Phase.CAPTURED, Phase.OPEN, ",
        the_capture_waits_for_the_last_request,
    ),
    "close below spent": ("account", "if voucher.cumulative < least:", "if voucher.cumulative < 0:", a_close_covers_what_was_spent),
    "ticket used twice": ("account", "if command.ticket in account.tickets:", "if False:", a_credential_buys_once),
    "the ladder loses its highest": (
        "account",
        "del kept[min(inner, key=lambda i: kept[i + 1].cumulative - kept[i - 1].cumulative)]",
        "del kept[-1]",
        the_ladder_keeps_its_ends,
    ),
    "the ladder loses what can be settled": (
        "account", "ladder[max(settled_by - 1, 0) :]", "ladder[settled_by:]", the_ladder_keeps_its_ends,
    ),
    "deposit merged by maximum": (
        "account",
        "chain=event.chain, phase=event.phase)",
        "phase=event.phase, chain=replace(event.chain, deposit=max(event.chain.deposit, account.chain.deposit)))",
        the_chain_is_believed,
    ),
    "old blocks are news": ("account", "chain.block >= account.chain.block and ", "", the_chain_is_believed),
    "a lost top-up goes unnoticed": ("account", "chain.deposit < account.accepted or ", "", the_chain_is_believed),
    "a close request goes unnoticed": (
        "account",
        "return Phase.OPEN if chain.close_requested_at is None else Phase.CONTESTED",
        "return Phase.OPEN",
        a_close_request_stops_new_work,
    ),
    "an abort forgets the close request": (
        "account", "phase=_usable(account.chain), close=None", "phase=Phase.OPEN, close=None", a_close_request_stops_new_work,
    ),
    "a contested channel grants more": (
        "account", " if account.phase is Phase.OPEN else 0", "", a_close_request_stops_new_work,
    ),
    "a top-up counts twice": ("account", "if credential == command.credential:", "if False:", a_top_up_counts_once),
}


def build(patch: pytest.MonkeyPatch, changes: tuple[str, str, str] | None, *, with_laws: bool) -> Machine:
    """The two modules from their source, with one replacement.

    ``with_laws=False`` switches the machine's own ``check`` off: a mutant then has to be noticed by what it does, not by
    the alarm that happens to be next to it.
    """
    sources = dict(SOURCES)
    if changes is not None:
        where, old, new = changes
        assert sources[where].count(old) >= 1, "the mutant no longer applies: say it in today's words"
        sources[where] = sources[where].replace(old, new, 1)
    made = []
    for name in ("model", "account"):
        module = ModuleType(f"channels.{name}")
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(sources[name], f"<mutant {name}>", "exec"), module.__dict__)
        made.append(module)
    if not with_laws:
        made[1].__dict__["check"] = lambda account: None
    return Machine(*made)


@pytest.mark.parametrize("scenario", sorted({row[3] for row in MUTANTS.values()}, key=lambda s: s.__name__), ids=lambda s: s.__name__)
def test_the_machine_passes_every_scenario(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine as it is passes them all, with and without its own alarms."""
    for with_laws in (True, False):
        scenario(build(monkeypatch, None, with_laws=with_laws))


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_dies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken machine fails its scenario by what it does, even with its own alarms switched off."""
    *changes, scenario = MUTANTS[name]
    mutant = build(monkeypatch, (changes[0], changes[1], changes[2]), with_laws=False)
    with pytest.raises((AssertionError, ChannelFault, pytest.fail.Exception)):
        scenario(mutant)
