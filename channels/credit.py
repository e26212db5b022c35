"""The credit account: money paid in ahead (or billed afterwards), held before work and charged exactly after it.

The same shape as ``channels/account.py``: ``plan(account, command, now)`` decides, ``fold(account, event)`` applies,
folding the journal rebuilds the account, and nothing here reads a clock, a file or a socket. Amounts are pico-dollars.

* ``funds``   what was paid in, less what was refunded or charged back; it may fall below what was already spent;
* ``owed``    charged for delivered work, exact. It falls only when a final report shows a stream was over-counted;
* ``held``    reserved by live requests and not yet charged: the sum over holds of granted - consumed.

A hold is granted only while ``owed + held <= funds + overdraft``, and within every spend cap of its key; a request is
charged at most its hold. That is no invariant of the state: a chargeback takes away what was already promised, and the
running requests are then the node's loss, never a reason to charge anybody more.

An account counts the changes of its keys and settings in ``access``. A node admits a request with what it remembers of
a key and names the ``access`` it knew; the reservation refuses it when that has changed since. So a revoked key fails
on its next request on every node, and a warm key costs no look-up: the reservation is written anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum, unique
from functools import reduce
from types import MappingProxyType
from typing import Final, NewType, assert_never

from channels.instants import UnixSeconds
from channels.model import NOBODY, HoldId, NodeId
from channels.units import PICO_PER_UNIT, Pico

AccountId = NewType("AccountId", str)
KeyId = NewType("KeyId", str)
"""A key of an account, or empty for a bearer without one."""

FUNDS_MAX: Final = 4 * 10**18  # four million dollars: the sum of two such numbers still fits a 64-bit column
FUNDS_MIN: Final = -(10**18)  # a million taken back beyond what was paid: below it a balance would not fit
HOLDS_MAX: Final = 1024  # requests at once: every change of a hold writes them all
KEYS_MAX: Final = 256  # keys with counters of their own: they travel with every change as well
_DAY_S: Final = 86_400
_NEVER: Final = UnixSeconds(0)


@unique
class CreditReason(StrEnum):
    """Why a credit account refuses a command, in the order of checks."""

    NOT_FOUND = "not_found"
    ACCESS_CHANGED = "access_changed"
    """The key or the account is not what the asker remembers: look again, then ask again."""
    BUSY = "busy"
    CAP_REACHED = "cap_reached"
    CREDIT_TOO_LOW = "credit_too_low"
    HOLD_FENCED = "hold_fenced"
    FUNDS_LIMIT = "funds_limit"
    """The amount does not fit an account."""


class Window(StrEnum):
    """What a spend cap is counted over; days and months are UTC."""

    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class CreditFault(Exception):
    """A refusal. ``left`` is what could still be held, in pico, where that is the question."""

    def __init__(
        self,
        reason: CreditReason,
        *,
        left: Pico = Pico(0),
        window: Window | None = None,
        again_in_s: int | None = None,
    ) -> None:
        self.reason = reason
        self.left = left
        self.window = window
        self.again_in_s = again_in_s
        super().__init__(reason.replace("_", " "))


class FundsKind(StrEnum):
    """Where money comes from; what is taken back is booked under the kind it came by."""

    PAYMENT = "payment"
    INVOICE = "invoice"
    """Pays for usage that was reported to be billed."""
    GRANT = "grant"
    """Given or taken by the operator."""


@dataclass(frozen=True, slots=True)
class SpendCaps:
    """The most a key may spend in pico-dollars: by UTC day, by UTC month, for good. None is no cap of its own."""

    day: Pico | None = None
    month: Pico | None = None
    total: Pico | None = None


NO_CAPS: Final = SpendCaps()


@dataclass(frozen=True, slots=True)
class Spending:
    """What a key has spent, in the windows of its last charge: ``day`` since 1970-01-01, ``month`` since year 0."""

    day: int = 0
    month: int = 0
    spent_day: int = 0
    spent_month: int = 0
    spent_total: int = 0

    def at(self, now: UnixSeconds) -> Spending:
        """The same in the windows of ``now``. A clock that steps back opens no older window: that would empty it."""
        day = max(now // _DAY_S, self.day)
        if day == self.day:
            return self
        date = datetime.fromtimestamp(day * _DAY_S, tz=UTC)
        month = date.year * 12 + date.month - 1
        return Spending(day, month, 0, self.spent_month if month == self.month else 0, self.spent_total)

    def plus(self, amount: int, now: UnixSeconds) -> Spending:
        """With a charge at ``now``; a negative one gives back what was over-counted, and opens no window below zero."""
        this = self.at(now)
        return replace(
            this,
            spent_day=max(this.spent_day + amount, 0),
            spent_month=max(this.spent_month + amount, 0),
            spent_total=max(this.spent_total + amount, 0),
        )


@dataclass(frozen=True, slots=True)
class CreditHold:
    """A durable reservation of one live request; both numbers are absolute, so a repeated fold changes nothing."""

    granted: Pico
    consumed: Pico
    key: KeyId = KeyId("")
    owner: NodeId = NOBODY
    about: str = ""
    """What it is for, in the asker's words; so that a request whose node died can still be named on the statement."""

    @property
    def open(self) -> int:
        """Reserved and not yet charged, in pico."""
        return self.granted - self.consumed


@dataclass(frozen=True, slots=True)
class CreditAccount:
    """Everything the ledger knows about one account's money. Amounts: pico-dollars unless a name says micro."""

    id: AccountId
    version: int
    access: int = 1
    prepaid: int = 0
    invoiced: int = 0
    """Paid on invoices, for usage that was reported."""
    overdraft: int = 0
    """How much may be owed: a post-paid customer's trust limit, otherwise zero."""
    owed: int = 0
    reported_micro: int = 0
    """Usage reported to be billed so far, in millionths of a dollar; never falls."""
    charged_at: UnixSeconds = _NEVER
    holds: Mapping[HoldId, CreditHold] = field(default_factory=lambda: MappingProxyType({}))
    spending: Mapping[KeyId, Spending] = field(default_factory=lambda: MappingProxyType({}))
    """A key counts from its first hold until it is forgotten; what runs then counts only if the key holds anew."""
    paces: Mapping[KeyId, tuple[int, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """What a rate limiter keeps of each key; opaque here, but it changes in the same step as the money."""

    @property
    def funds(self) -> int:
        """Paid in and not taken back."""
        return self.prepaid + self.invoiced

    @property
    def held(self) -> int:
        """Reserved by live requests, not yet charged."""
        return sum(hold.open for hold in self.holds.values())

    @property
    def balance(self) -> int:
        """What is left of the funds; negative is owed to the node."""
        return self.funds - self.owed

    @property
    def headroom(self) -> int:
        """What may still be reserved; below zero after a chargeback."""
        return self.balance + self.overdraft - self.held

    @property
    def final(self) -> int:
        """Charged by requests that have ended: only this may be billed, as a live one may yet get something back."""
        return self.owed - sum(hold.consumed for hold in self.holds.values())

    def held_by(self, key: KeyId) -> int:
        """The part of :attr:`held` that is a key's."""
        return sum(hold.open for hold in self.holds.values() if hold.key == key)


# --------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class OpenAccount:
    """none -> account; a repeat changes nothing."""

    id: AccountId
    overdraft: int = 0


@dataclass(frozen=True, slots=True)
class MoveFunds:
    """Book money in, or out with a negative ``amount``; whoever asks knows that it has not been booked before."""

    kind: FundsKind
    reference: str
    amount: int


@dataclass(frozen=True, slots=True)
class SetOverdraft:
    """Set how much may be owed."""

    overdraft: int


@dataclass(frozen=True, slots=True)
class ChangeAccess:
    """A key or a setting has changed: what nodes remember no longer holds. ``forget`` drops a dead key's counters."""

    forget: KeyId | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """Start a request: hold between ``floor`` and ``want`` pico, within the caps and ``concurrency`` of its key."""

    hold: HoldId
    floor: Pico
    want: Pico
    access: int
    key: KeyId = KeyId("")
    caps: SpendCaps = NO_CAPS
    concurrency: int = HOLDS_MAX
    owner: NodeId = NOBODY
    about: str = ""
    pace: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Fold:
    """Charge a running request up to ``consumed`` in all."""

    hold: HoldId
    consumed: Pico


@dataclass(frozen=True, slots=True)
class Settle:
    """Charge the exact ``total`` of a request, at most its hold, and release the rest.

    With what was recorded as its total it releases the hold of a request whose node has died.
    """

    hold: HoldId
    total: Pico
    pace: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ReportUsage:
    """Note that all ended usage beyond what was prepaid is being billed; the result says how much that adds."""


CreditCommand = OpenAccount | MoveFunds | SetOverdraft | ChangeAccess | Hold | Fold | Settle | ReportUsage

# ----------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class AccountOpened:
    """The account exists."""

    id: AccountId
    overdraft: int


@dataclass(frozen=True, slots=True)
class FundsMoved:
    """Money came or went."""

    kind: FundsKind
    reference: str
    amount: int


@dataclass(frozen=True, slots=True)
class OverdraftSet:
    """The most that may be owed changed."""

    overdraft: int


@dataclass(frozen=True, slots=True)
class AccessChanged:
    """Keys or settings changed."""

    forgot: KeyId | None


@dataclass(frozen=True, slots=True)
class Held:
    """A request got its hold."""

    hold: HoldId
    granted: Pico
    key: KeyId
    owner: NodeId
    about: str = ""
    pace: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Charged:
    """A hold's consumption moved; ``owed`` and its key's spending move by the difference."""

    hold: HoldId
    consumed: Pico
    at: UnixSeconds


@dataclass(frozen=True, slots=True)
class Released:
    """A hold ended; what was not consumed is free again."""

    hold: HoldId
    pace: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class UsageReported:
    """Everything up to this total is being billed."""

    total_micro: int


CreditEvent = AccountOpened | FundsMoved | OverdraftSet | AccessChanged | Held | Charged | Released | UsageReported


@dataclass(frozen=True, slots=True)
class CreditOutcome:
    """The answer to a command, pico unless named micro; ``replayed`` says nothing changed."""

    replayed: bool = False
    granted: Pico = Pico(0)
    charged: Pico = Pico(0)
    """By this request in all."""
    beyond: Pico = Pico(0)
    """What a request cost beyond its hold: the node's loss."""
    reported_micro: int = 0


@dataclass(frozen=True, slots=True)
class CreditPlan:
    """What a command would do; no events means that there is nothing to write."""

    account: CreditAccount
    events: tuple[CreditEvent, ...]
    result: CreditOutcome


# ------------------------------------------------------------------------------------------------------------- plan


def plan(account: CreditAccount | None, command: CreditCommand, *, now: UnixSeconds) -> CreditPlan:
    """Decide what ``command`` does to ``account``.

    Raises:
        CreditFault: every refusal; nothing has changed then.
    """
    if isinstance(command, OpenAccount):
        if account is not None:
            return _planned(account)
        _check_overdraft(command.overdraft)
        opened = AccountOpened(command.id, command.overdraft)
        return CreditPlan(fold(None, opened), (opened,), CreditOutcome())
    if account is None:
        raise CreditFault(CreditReason.NOT_FOUND)
    match command:
        case MoveFunds():
            return _move(account, command)
        case SetOverdraft():
            if command.overdraft == account.overdraft:
                return _planned(account)
            _check_overdraft(command.overdraft)
            return _planned(account, OverdraftSet(command.overdraft))
        case ChangeAccess():
            return _planned(account, AccessChanged(command.forget))
        case Hold():
            return _hold(account, command, now)
        case Fold():
            return _fold(account, command, now)
        case Settle():
            return _settle(account, command, now)
        case ReportUsage():
            return _report(account)
        case _:
            assert_never(command)


def _planned(account: CreditAccount, *events: CreditEvent, result: CreditOutcome | None = None) -> CreditPlan:
    after = reduce(fold, events, account)
    check(after)
    return CreditPlan(after, events, result or CreditOutcome(replayed=not events))


def _move(account: CreditAccount, command: MoveFunds) -> CreditPlan:
    if command.amount == 0:
        return _planned(account)
    moved = FundsMoved(command.kind, command.reference, command.amount)
    after = fold(account, moved)
    # Each part too: they have columns of their own, and opposite ones could grow without end.
    if after.funds < FUNDS_MIN or max(after.funds, abs(after.prepaid), abs(after.invoiced)) > FUNDS_MAX:
        raise CreditFault(CreditReason.FUNDS_LIMIT)
    return _planned(account, moved)


def _check_overdraft(overdraft: int) -> None:
    if not 0 <= overdraft <= FUNDS_MAX:
        raise CreditFault(CreditReason.FUNDS_LIMIT)


def _hold(account: CreditAccount, command: Hold, now: UnixSeconds) -> CreditPlan:
    assert 0 < command.floor <= command.want
    known = account.holds.get(command.hold)
    if known is not None:
        return CreditPlan(account, (), CreditOutcome(replayed=True, granted=known.granted))
    if command.access != account.access:
        raise CreditFault(CreditReason.ACCESS_CHANGED)
    running = sum(1 for hold in account.holds.values() if hold.key == command.key)
    if running >= command.concurrency or len(account.holds) >= HOLDS_MAX:
        raise CreditFault(CreditReason.BUSY)
    capped = headroom(account, command.key, command.caps, now, floor=command.floor)
    if capped is not None and capped.left < command.floor:
        raise capped
    if account.headroom < command.floor:
        raise CreditFault(CreditReason.CREDIT_TOO_LOW, left=Pico(max(account.headroom, 0)))
    most = account.headroom if capped is None else min(account.headroom, capped.left)
    granted = Pico(min(command.want, most))
    held = Held(command.hold, granted, command.key, command.owner, command.about, command.pace)
    return _planned(account, held, result=CreditOutcome(granted=granted))


def headroom(
    account: CreditAccount, key: KeyId, caps: SpendCaps, now: UnixSeconds, *, floor: int = 0
) -> CreditFault | None:
    """The refusal with what the caps leave (never below zero), None when nothing is capped.

    It names the last window to open of those that leave least or less than ``floor``: to say tomorrow when it is next
    month would be a wrong promise.

    A hold counts in every window while it is open, and a charge in the windows of its moment: so spent and held
    together stay within a cap, also across midnight.
    """
    if caps == NO_CAPS:
        return None
    spent, held = account.spending.get(key, Spending()).at(now), account.held_by(key)
    lefts = list[tuple[Window, int]]()
    for window, cap, so_far in (
        (Window.DAY, caps.day, spent.spent_day),
        (Window.MONTH, caps.month, spent.spent_month),
        (Window.TOTAL, caps.total, spent.spent_total),
    ):
        if cap is not None:
            lefts.append((window, max(cap - so_far - held, 0)))
    least = Pico(min(left for _, left in lefts))
    window = [window for window, left in lefts if left == least or left < floor][-1]
    return CreditFault(CreditReason.CAP_REACHED, left=least, window=window, again_in_s=ends_in(window, now))


def ends_in(window: Window, now: UnixSeconds) -> int | None:
    """Seconds until a window ends; None when it never does."""
    if window is Window.TOTAL:
        return None
    if window is Window.DAY:
        return _DAY_S - now % _DAY_S
    date = datetime.fromtimestamp(now, tz=UTC)
    year, month = divmod(date.year * 12 + date.month, 12)
    return int(datetime(year, month + 1, 1, tzinfo=UTC).timestamp()) - now


def _fold(account: CreditAccount, command: Fold, now: UnixSeconds) -> CreditPlan:
    hold = _live(account, command.hold)
    assert hold.consumed <= command.consumed, "delivery ran backwards"
    if command.consumed > hold.granted:
        # A database that failed over has lost the hold this was delivered under: another request's stands in its place.
        raise CreditFault(CreditReason.HOLD_FENCED)
    if command.consumed == hold.consumed:
        return CreditPlan(account, (), CreditOutcome(replayed=True, granted=hold.granted, charged=hold.consumed))
    outcome = CreditOutcome(granted=hold.granted, charged=command.consumed)
    return _planned(account, Charged(command.hold, command.consumed, now), result=outcome)


def _settle(account: CreditAccount, command: Settle, now: UnixSeconds) -> CreditPlan:
    hold = _live(account, command.hold)
    assert command.total >= 0
    # Never more than was held: what was promised to the customer is kept, the price of our own error is ours.
    total = Pico(min(command.total, hold.granted))
    charged = () if total == hold.consumed else (Charged(command.hold, total, now),)
    outcome = CreditOutcome(granted=hold.granted, charged=total, beyond=Pico(command.total - total))
    return _planned(account, *charged, Released(command.hold, command.pace), result=outcome)


def _live(account: CreditAccount, hold_id: HoldId) -> CreditHold:
    hold = account.holds.get(hold_id)
    if hold is None:
        raise CreditFault(CreditReason.HOLD_FENCED)
    return hold


def _report(account: CreditAccount) -> CreditPlan:
    billable = max(account.final - account.prepaid, 0) // PICO_PER_UNIT  # a unit is a millionth of a dollar
    if billable <= account.reported_micro:
        return _planned(account)
    added = billable - account.reported_micro
    return _planned(account, UsageReported(billable), result=CreditOutcome(reported_micro=added))


# ------------------------------------------------------------------------------------------------------------- fold


def fold(account: CreditAccount | None, event: CreditEvent) -> CreditAccount:
    """Apply one event. Never refuses: an event is a fact."""
    if isinstance(event, AccountOpened):
        assert account is None, "an account is opened once"
        return CreditAccount(id=event.id, version=1, overdraft=event.overdraft)
    assert account is not None, "only AccountOpened comes first"
    version = account.version + 1
    match event:
        case FundsMoved():
            if event.kind is FundsKind.INVOICE:
                return replace(account, version=version, invoiced=account.invoiced + event.amount)
            return replace(account, version=version, prepaid=account.prepaid + event.amount)
        case OverdraftSet():
            return replace(account, version=version, overdraft=event.overdraft)
        case AccessChanged():
            spending = {key: spent for key, spent in account.spending.items() if key != event.forgot}
            paces = {key: pace for key, pace in account.paces.items() if key != event.forgot}
            changed = replace(account, version=version, access=account.access + 1)
            return replace(changed, spending=MappingProxyType(spending), paces=MappingProxyType(paces))
        case Held():
            hold = CreditHold(event.granted, Pico(0), event.key, event.owner, event.about)
            holds = MappingProxyType({**account.holds, event.hold: hold})
            if event.key not in account.spending:
                account = replace(account, spending=MappingProxyType({**account.spending, event.key: Spending()}))
            return _paced(replace(account, version=version, holds=holds), event.key, event.pace)
        case Charged():
            return _charged(replace(account, version=version), event)
        case Released():
            key = account.holds[event.hold].key
            holds = MappingProxyType({name: hold for name, hold in account.holds.items() if name != event.hold})
            return _paced(replace(account, version=version, holds=holds), key, event.pace)
        case UsageReported():
            return replace(account, version=version, reported_micro=event.total_micro)
        case _:
            assert_never(event)


def _charged(account: CreditAccount, event: Charged) -> CreditAccount:
    before = account.holds[event.hold]
    added = event.consumed - before.consumed
    spending = account.spending
    if before.key in spending:  # otherwise it was forgotten: dead keys must not fill the row again
        spending = MappingProxyType({**spending, before.key: spending[before.key].plus(added, event.at)})
    holds = MappingProxyType({**account.holds, event.hold: replace(before, consumed=event.consumed)})
    at = max(account.charged_at, event.at)
    return replace(account, owed=account.owed + added, charged_at=at, holds=holds, spending=spending)


def _paced(account: CreditAccount, key: KeyId, pace: tuple[int, ...] | None) -> CreditAccount:
    if pace is None or key not in account.spending:
        return account
    return replace(account, paces=MappingProxyType({**account.paces, key: pace}))


def check(account: CreditAccount) -> None:
    """Assert the laws of an account; run before every write and after every read, in production too."""
    assert FUNDS_MIN <= account.funds <= FUNDS_MAX, "funds out of range"
    assert 0 <= account.overdraft <= FUNDS_MAX, "overdraft out of range"
    assert account.owed >= 0, "owed is negative"
    assert account.reported_micro >= 0, "reported is negative"
    assert all(0 <= hold.consumed <= hold.granted for hold in account.holds.values()), "a hold is out of order"
    assert account.owed >= sum(hold.consumed for hold in account.holds.values()), "a live request's charge is not owed"
