"""The ledger of the model: the real ``channels.account``, asked once for every different question.

Accounts are numbered. What cannot change any answer (versions, tickets, the time of the last use, block numbers) is left
out of them, so that two ways to the same money are one state. Every new step is judged against the laws of the ledger
here, in code that shares nothing with the machine; amounts are units, and one chunk of an answer costs one unit.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from channels.descriptor import ChainSnapshot
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.instants import UnixSeconds
from channels.policy import Policy
from channels.units import PICO_PER_UNIT as UNIT
from channels.units import Units
from tests.support.builders import NOW, TX, V2, descriptor, voucher

EVERYBODY = -1
"""Whose holds a release without an owner ends."""


class Broken(Exception):
    """A law does not hold; the first word names it."""


class Held(NamedTuple):
    """A hold in whole units; ``owner`` is the number of a process."""

    granted: int
    consumed: int
    owner: int
    stream: bool
    ending: bool


class View(NamedTuple):
    """What a node reads in an account, in whole units."""

    phase: str
    accepted: int
    owed: int
    spent: int
    headroom: int
    final: int
    settleable: int
    holds: dict[int, Held]
    facts: tuple[int, int, bool]
    """(deposit, settled, whether the payer has asked to close) as the ledger believes them."""
    capture: int


class Answer(NamedTuple):
    """What a command did: the account after it, or why it was refused; units."""

    account: int
    refused: Reason | None = None
    granted: int = 0


class Books:
    """Accounts by number, and every answer the account machine has given."""

    def __init__(self, model: ModuleType, account: ModuleType) -> None:
        self._m, self._a = model, account
        self._numbers: dict[Any, int] = {}
        self._accounts: list[Any] = []
        self._answers: dict[tuple[Any, ...], Answer] = {}
        self.views: list[View] = []

    def open(self, deposit: int, accepted: int) -> int:
        """A new channel."""
        chain = self._chain(deposit, 0, False)
        opening = self._m.Open(ChannelId(b"\xc1" * 32), V2, descriptor(), chain, self._voucher(accepted))
        return self._number(self._a.plan(None, opening, now=NOW, policy=Policy()).account)

    def do(self, account: int, kind: str, *numbers: int) -> Answer:
        """The answer to a command, computed when it is asked for the first time. Raises ``Broken``."""
        asked = (account, kind, *numbers)
        answer = self._answers.get(asked)
        if answer is None:
            answer = self._answers[asked] = self._decide(account, kind, numbers)
        return answer

    def _decide(self, account: int, kind: str, numbers: tuple[int, ...]) -> Answer:
        before = self._accounts[account]
        try:
            made = self._a.plan(before, self._command(kind, numbers), now=NOW, policy=Policy())
        except ChannelFault as fault:
            _refusals(self.views[account], kind, numbers, fault.reason)
            return Answer(account, fault.reason)
        except (AssertionError, KeyError, ValueError) as error:
            raise Broken(f"I1: the ledger was asked for what cannot be: {kind}{numbers}: {error!r}") from error
        if made.account.version != before.version + len(made.events):
            raise Broken("I6: events and versions disagree")
        if kind == "recount":  # a broken ledger: the charge is the difference from what the node remembers
            owed = before.owed_pico + (numbers[1] - numbers[3]) * UNIT
            spent = Units(max(before.spent, owed // UNIT))
            made = replace(made, account=replace(made.account, owed_pico=owed, spent=spent))
        after = self._number(made.account)
        _steps(self.views[account], self.views[after], kind, numbers, made.result.unpaid // UNIT)
        return Answer(after, None, made.result.granted // UNIT)

    def _command(self, kind: str, n: tuple[int, ...]) -> Any:
        m = self._m
        match kind:
            case "voucher":
                return m.AcceptVoucher(self._voucher(n[0]))
            case "stream" | "preempt" | "whole":
                name, preempt = _name(n[0]), kind == "preempt"
                until = UnixSeconds(NOW + 300)
                return m.Reserve(name, name, until, UNIT, n[2] * UNIT, preempt, str(n[1]), kind != "whole")
            case "renew" | "recount":
                return m.Renew(_name(n[0]), n[1] * UNIT, n[2] * UNIT)
            case "finish":
                return m.Finish(_name(n[0]), n[1] * UNIT)
            case "ask":
                return m.EndStreams()
            case "release":
                return m.ReleaseOrphans(None if n[0] == EVERYBODY else str(n[0]))
            case "observe":
                return m.ObserveChain(self._chain(n[0], n[1], bool(n[2])))
            case "close":
                return m.BeginClose("c", None)
            case "fix":
                return m.FixCapture()
            case "abort":
                return m.AbortClose()
            case "confirm":
                return m.ConfirmClosed(TX, self._chain(0, 0, False))
        raise AssertionError(kind)

    def _voucher(self, amount: int) -> Any:
        return self._m.Voucher(Units(amount), voucher(amount).signature)

    def _chain(self, deposit: int, settled: int, asked: bool) -> ChainSnapshot:
        return ChainSnapshot(Units(deposit), Units(settled), UnixSeconds(5) if asked else None, 1)

    def _number(self, account: Any) -> int:
        plain = replace(account, version=1, tickets=MappingProxyType({}), active_at=UnixSeconds(0))
        close = plain.close and (plain.close.capture, plain.close.tx_hash)
        rungs = tuple(rung.cumulative for rung in plain.ladder)
        key = (plain.phase, plain.chain, rungs, plain.owed_pico, plain.spent, tuple(sorted(plain.holds.items())), close)
        key = (*key[:5], tuple((name, h.granted, h.consumed, h.owner, h.stream, h.ending) for name, h in key[5]), close)
        number = self._numbers.get(key)
        if number is None:
            view = _view(plain)
            _account(view, len(rungs))
            number = self._numbers[key] = len(self._accounts)
            self._accounts.append(plain)
            self.views.append(view)
        return number


def _name(hold: int) -> str:
    return f"h{hold}"


def _view(account: Any) -> View:
    holds = {
        int(name[1:]): Held(hold.granted // UNIT, hold.consumed // UNIT, int(hold.owner), hold.stream, hold.ending)
        for name, hold in account.holds.items()
    }
    owed = account.owed_pico // UNIT
    held = sum(hold.granted - hold.consumed for hold in holds.values())
    chain = account.chain
    capture = account.close.capture if account.close is not None else None
    return View(
        phase=account.phase.value,
        accepted=account.ladder[-1].cumulative,
        owed=owed,
        spent=account.spent,
        headroom=account.ladder[-1].cumulative - owed - held,
        final=owed - sum(hold.consumed for hold in holds.values()),
        settleable=account.settleable,
        holds=holds,
        facts=(chain.deposit, chain.settled, chain.close_requested_at is not None),
        capture=-1 if capture is None else capture,
    )


def _must(law: str, true: bool, text: str, *about: object) -> None:
    if not true:
        raise Broken(f"{law}: {text}: {about}")


def _account(now: View, rungs: int) -> None:
    """What holds of every account there is."""
    _must("I2", now.headroom >= 0, "charged or held beyond what was accepted", now)
    _must("I2", now.owed >= 0 and all(0 <= h.consumed <= h.granted for h in now.holds.values()), "a hold is out of order", now)
    _must("I2", now.owed <= now.spent <= now.accepted, "spent is not between owed and accepted", now)
    _must("I2", now.phase in ("closed", "suspect") or now.accepted <= now.facts[0], "accepted beyond the deposit", now)
    _must("I2", sum(h.stream for h in now.holds.values()) <= 1, "two streams on one channel", now)
    _must("I4", now.phase != "suspect", "our own doing contradicts the chain", now)
    _must("I4", now.phase != "captured" or not now.holds, "a fixed capture and a live request", now)
    _must("I4", now.phase != "captured" or now.capture == max(now.owed, now.facts[1]), "a capture that is not what was consumed", now)
    _must("I7", rungs >= 1, "no voucher left", now)


def _steps(was: View, now: View, kind: str, n: tuple[int, ...], unpaid: int) -> None:
    """What one command may change, and what it must."""
    charged, mine = 0, set[int]()
    if kind in ("renew", "recount", "finish"):
        mine = {n[0]}
        _must("I6", n[0] in was.holds, "a hold that is gone was written to", kind, n, now)
        paid = n[1] - unpaid
        charged = paid - was.holds[n[0]].consumed
        _must("I3", paid >= 0, "less than nothing was charged", kind, n, now)
    if kind in ("renew", "recount"):
        _must("I1", now.holds[n[0]].granted >= was.holds[n[0]].granted, "a grant has shrunk", n, now)
        _must("I1", not was.holds[n[0]].ending or now.holds[n[0]].granted == was.holds[n[0]].granted, "an ending stream has grown", n)
    _must("I3", now.owed == was.owed + charged, "charged something else than what was delivered", kind, n, was, now)
    _must("I3", now.spent == max(was.spent, now.owed), "a number that was shown has fallen or run ahead", kind, n, was, now)
    _must("I7", now.accepted == (max(was.accepted, n[0]) if kind == "voucher" else was.accepted), "a voucher is lost", kind, n)
    if kind == "observe":
        _must("C1", now.facts == (n[0], n[1], bool(n[2])), "what the chain says does not replace what it said", n, now)
    gone = _gone(was, kind, n)
    stay = {name: hold for name, hold in was.holds.items() if name not in gone | mine}
    others = {name: now.holds.get(name) for name in stay}
    if kind == "ask":
        stay = {name: hold._replace(ending=hold.ending or hold.stream) for name, hold in stay.items()}
    _must("I6", others == stay, "somebody else's hold was touched", kind, n, was, now)
    born = {n[0]} if kind in ("stream", "preempt", "whole") else set[int]()
    _must("I6", set(now.holds) == set(stay) | born | (mine if kind != "finish" else set()), "a hold is there that should not be", kind, n, was, now)


def _gone(was: View, kind: str, n: tuple[int, ...]) -> set[int]:
    """The holds a command ends besides its own."""
    match kind:
        case "preempt":
            return {name for name, hold in was.holds.items() if hold.stream}
        case "release":
            return {name for name, hold in was.holds.items() if n[0] in (EVERYBODY, hold.owner)}
        case "observe" if n[0] == 0:
            return set(was.holds)
    return set()


def _refusals(now: View, kind: str, n: tuple[int, ...], why: Reason) -> None:
    """A refusal must be deserved, or a payer who has paid is turned away."""
    if why is Reason.INSUFFICIENT_BALANCE:
        free = now.headroom + (sum(h.granted - h.consumed for h in now.holds.values() if h.stream) if kind == "preempt" else 0)
        _must("L2", free < 1, "an exact fit was refused", kind, n, now)
    if why is Reason.HOLD_FENCED:
        _must("L2", n[0] not in now.holds, "a live hold was refused", kind, n, now)
