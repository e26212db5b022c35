"""The credit machine against books kept by somebody else: plain lists, recomputed from the beginning every time.

The clerk decides before each command what must happen, from the lists alone; the machine's answer must be the same to
the pico. ``--hypothesis-profile=deep`` runs it for longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import reduce

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from channels import credit as c
from channels.credit import CreditReason as Why
from channels.instants import UnixSeconds
from channels.model import HoldId, NodeId
from channels.units import Pico

ID = c.AccountId("acct")
KEYS = [c.KeyId("k1"), c.KeyId("k2"), c.KeyId("")]
BEGIN = int(datetime(2024, 12, 30, 22, tzinfo=UTC).timestamp())
MICRO = 10**6
AMOUNT = st.integers(1, 60).map(lambda n: n * 300_000)
CAP = st.sampled_from([None, None, None, "least", "least", "want", "one too few", "nothing"])
"""What a cap leaves: just enough, just too little; or there is none."""
QUICK = settings(max_examples=150, stateful_step_count=50, deadline=None)


@dataclass
class Live:
    """A request as its clerk sees it: what it was promised, and every charge it was told of."""

    key: c.KeyId
    promised: int
    counted: bool = True
    charges: list[int] = field(default_factory=list)

    @property
    def charged(self) -> int:
        return sum(self.charges)

    @property
    def rest(self) -> int:
        return self.promised - self.charged


class Clerk:
    """Naive books. Nothing is ever updated: every number is added up from what happened."""

    def __init__(self) -> None:
        self.money: list[tuple[c.FundsKind, int]] = []
        self.charges: list[tuple[c.KeyId, int, int, bool]] = []
        """(key, amount, moment, counted against caps)"""
        self.live: dict[str, Live] = {}
        self.bills: list[int] = []
        self.overdraft = 0
        self.access = 1

    def funds(self, *kinds: c.FundsKind) -> int:
        return sum(amount for kind, amount in self.money if not kinds or kind in kinds)

    @property
    def owed(self) -> int:
        return sum(amount for _, amount, _, _ in self.charges)

    @property
    def held(self) -> int:
        return sum(live.rest for live in self.live.values())

    @property
    def free(self) -> int:
        return self.funds() + self.overdraft - self.owed - self.held

    @property
    def ended(self) -> int:
        return self.owed - sum(live.charged for live in self.live.values())

    def spent(self, key: c.KeyId, now: int) -> dict[c.Window, int]:
        """What a key has spent by window: charges of the latest window there was, in order, never below zero.

        A moment before an earlier one counts as that one: who sets the clock back opens no new window.
        """
        spent, latest = dict.fromkeys(c.Window, 0), 0
        for moment, amount in [(at, amount) for who, amount, at, counted in self.charges if who == key and counted] + [(now, 0)]:
            day, before = max(moment // 86_400, latest), datetime.fromtimestamp(latest * 86_400, UTC)
            date = datetime.fromtimestamp(day * 86_400, UTC)
            if day != latest:
                spent[c.Window.DAY] = 0
            if (date.year, date.month) != (before.year, before.month):
                spent[c.Window.MONTH] = 0
            latest = day
            spent = {window: max(so_far + amount, 0) for window, so_far in spent.items()}
        return spent

    def lefts(self, key: c.KeyId, caps: c.SpendCaps, now: int) -> dict[c.Window, int]:
        spent = self.spent(key, now)
        held = sum(live.rest for live in self.live.values() if live.key == key)
        limits = {c.Window.DAY: caps.day, c.Window.MONTH: caps.month, c.Window.TOTAL: caps.total}
        return {window: max(cap - spent[window] - held, 0) for window, cap in limits.items() if cap is not None}

    def verdict(self, ask: c.Hold, now: int) -> tuple[Why | None, int]:
        """The refusal and what is left, or None and what is granted."""
        if ask.access != self.access:
            return Why.ACCESS_CHANGED, 0
        if sum(live.key == ask.key for live in self.live.values()) >= ask.concurrency:
            return Why.BUSY, 0
        left = min(self.lefts(ask.key, ask.caps, now).values(), default=None)
        if left is not None and left < ask.floor:
            return Why.CAP_REACHED, left
        if self.free < ask.floor:
            return Why.CREDIT_TOO_LOW, max(self.free, 0)
        return None, min(ask.want, self.free, ask.want if left is None else left)

    def charge(self, live: Live, total: int, now: int) -> None:
        more = total - live.charged
        if more:
            live.charges.append(more)
            self.charges.append((live.key, more, now, live.counted))

    def forget(self, key: c.KeyId) -> None:
        self.charges = [(who, amount, at, counted and who != key) for who, amount, at, counted in self.charges]
        for live in self.live.values():
            live.counted = live.counted and live.key != key


class CreditBooks(RuleBasedStateMachine):
    """One account under everything its customer, operator, bank and clock can do."""

    def __init__(self) -> None:
        super().__init__()
        self.clerk = Clerk()
        self.now = BEGIN
        self.number = 0
        self.journal: list[c.CreditEvent] = []
        self.account: c.CreditAccount | None = None
        self.run(c.OpenAccount(ID))
        self.moves(c.FundsKind.PAYMENT, 8 * MICRO, 1)
        self.trusts(80 * MICRO)

    def run(self, command: c.CreditCommand) -> c.CreditOutcome | c.CreditFault:
        before, copy = self.account, repr(self.account)
        try:
            made = c.plan(before, command, now=UnixSeconds(self.now))
        except c.CreditFault as fault:
            return fault
        finally:
            assert repr(before) == copy, "deciding changes nothing"
        assert made.result.replayed == (made.events == ())
        assert made.account == reduce(c.fold, made.events, before)
        self.account = made.account
        self.journal += made.events
        return made.result

    def done(self, command: c.CreditCommand) -> c.CreditOutcome:
        made = self.run(command)
        assert isinstance(made, c.CreditOutcome), f"{command} was refused: {made!r}"
        return made

    def some(self, pick: int) -> str | None:
        names = sorted(self.clerk.live)
        return names[pick % len(names)] if names else None

    # --- money

    @rule(kind=st.sampled_from([c.FundsKind.INVOICE, *c.FundsKind]), amount=AMOUNT, back=st.sampled_from([1, 1, 1, -1]))
    def moves(self, kind: c.FundsKind, amount: int, back: int) -> None:
        assert not self.done(c.MoveFunds(kind, "x", amount * back)).replayed
        self.clerk.money.append((kind, amount * back))

    @rule(part=st.sampled_from([1, 2, 3]))
    def charges_back(self, part: int) -> None:
        """A bank takes back what was paid, whatever was spent of it."""
        gone = self.clerk.funds(c.FundsKind.PAYMENT) // part
        assert self.done(c.MoveFunds(c.FundsKind.PAYMENT, "x", -gone)).replayed == (gone == 0)
        self.clerk.money.append((c.FundsKind.PAYMENT, -gone))

    @rule(beyond=st.sampled_from([1, c.FUNDS_MAX]), kind=st.sampled_from(list(c.FundsKind)))
    def more_than_fits(self, beyond: int, kind: c.FundsKind) -> None:
        for amount in (c.FUNDS_MAX - self.clerk.funds() + beyond, c.FUNDS_MIN - self.clerk.funds() - beyond):
            fault = self.run(c.MoveFunds(kind, "x", amount))
            assert isinstance(fault, c.CreditFault)
            assert fault.reason is Why.FUNDS_LIMIT

    @rule(overdraft=st.sampled_from([0, 3 * MICRO, 80 * MICRO, 80 * MICRO]))
    def trusts(self, overdraft: int) -> None:
        assert self.done(c.SetOverdraft(overdraft)).replayed == (overdraft == self.clerk.overdraft)
        self.clerk.overdraft = overdraft

    @rule(key=st.sampled_from([None, None, *KEYS]))
    def changes_access(self, key: c.KeyId | None) -> None:
        self.done(c.ChangeAccess(key))
        self.clerk.access += 1
        if key is not None:
            self.clerk.forget(key)

    # --- requests

    @rule(
        key=st.sampled_from(KEYS),
        want=st.integers(1, 40).map(lambda n: n * 123_456),
        floor=st.integers(1, 8),
        caps=st.tuples(CAP, CAP, CAP),
        room=st.sampled_from([1, 2, 9, 9, 9]),
        stale=st.sampled_from([0] * 9 + [-1, 1]),
        fits=st.sampled_from([None] * 7 + [0, 1]),
    )
    def holds(
        self, *, key: c.KeyId, want: int, floor: int, caps: tuple[str | None, ...], room: int, stale: int, fits: int | None
    ) -> None:
        self.number += 1
        name, least = f"r{self.number:03}", max(want * floor // 8, 1)
        if fits is not None:  # all there is, or a pico more
            want = least = max(self.clerk.free, 0) + max(fits, self.clerk.free <= 0)
        used = sum(live.rest for live in self.clerk.live.values() if live.key == key)
        room_for = {"least": least, "want": want, "one too few": least - 1, "nothing": -3}
        spends = self.clerk.spent(key, self.now).values()
        limits = c.SpendCaps(
            *(None if cap is None else Pico(max(spent + used + room_for[cap], 0)) for cap, spent in zip(caps, spends, strict=True))
        )
        ask = c.Hold(HoldId(name), Pico(least), Pico(want), self.clerk.access + stale, key, limits, room, NodeId("n"))
        why, amount = self.clerk.verdict(ask, self.now)
        made = self.run(ask)
        if why is not None:
            assert isinstance(made, c.CreditFault), f"granted, not refused with {why}"
            assert (made.reason, made.left) == (why, amount)
            self.promises(made, ask)
            return
        assert isinstance(made, c.CreditOutcome), repr(made)
        assert (made.granted, made.replayed) == (amount, False)
        assert least <= amount <= want
        self.clerk.live[name] = Live(key, amount)
        for live in self.clerk.live.values():
            live.counted = live.counted or live.key == key  # a forgotten key that comes back is charged what still runs
        # At the moment of the grant, and only then: what is promised is covered.
        assert self.clerk.owed + self.clerk.held <= self.clerk.funds() + self.clerk.overdraft
        spent, held = self.clerk.spent(key, self.now), sum(one.rest for one in self.clerk.live.values() if one.key == key)
        for window, cap in zip(c.Window, (limits.day, limits.month, limits.total), strict=True):
            assert cap is None or spent[window] + held <= cap
        again = self.done(ask)
        assert (again.replayed, again.granted) == (True, amount)

    def promises(self, fault: c.CreditFault, ask: c.Hold) -> None:
        """Whoever is told to come again when a window ends is then not refused for one that ends later."""
        if fault.reason is not Why.CAP_REACHED:
            return
        blocked = [window for window, left in self.clerk.lefts(ask.key, ask.caps, self.now).items() if left < ask.floor]
        assert fault.window is blocked[-1]
        if fault.window is c.Window.TOTAL:
            assert fault.again_in_s is None
            return
        assert fault.again_in_s is not None
        ahead = [datetime.fromtimestamp(self.now + fault.again_in_s - back, UTC) for back in (1, 0)]
        assert (ahead[1].hour, ahead[1].minute, ahead[1].second) == (0, 0, 0)
        if fault.window is c.Window.MONTH:
            assert (ahead[1].day, ahead[0].month) == (1, datetime.fromtimestamp(self.now, UTC).month)
        else:
            assert ahead[0].date() == datetime.fromtimestamp(self.now, UTC).date()

    @rule(pick=st.integers(0, 9), part=st.integers(0, 9))
    def folds(self, pick: int, part: int) -> None:
        name = self.some(pick)
        if name is None:
            return
        live = self.clerk.live[name]
        total = live.charged + (live.rest * part // 8 if part < 9 else live.rest + 1)
        made = self.run(c.Fold(HoldId(name), Pico(total)))
        if total > live.promised:
            assert isinstance(made, c.CreditFault)
            assert made.reason is Why.HOLD_FENCED
            return
        assert isinstance(made, c.CreditOutcome), repr(made)
        assert (made.charged, made.granted, made.replayed) == (total, live.promised, total == live.charged)
        self.clerk.charge(live, total, self.now)

    @rule(pick=st.integers(0, 9), part=st.integers(0, 24))
    def settles(self, pick: int, part: int) -> None:
        """The exact end says less than was folded, the same, or more than was ever held."""
        name = self.some(pick)
        if name is None:
            return
        live = self.clerk.live.pop(name)
        total = live.promised * part // 16
        if part % 5 == 0:
            total = live.charged
        made = self.done(c.Settle(HoldId(name), Pico(total)))
        payable = min(total, live.promised)
        assert (made.charged, made.beyond, made.granted) == (payable, total - payable, live.promised)
        self.clerk.charge(live, payable, self.now)
        assert live.charged <= live.promised, "never charged above the hold"
        for command in (c.Settle(HoldId(name), Pico(total)), c.Fold(HoldId(name), Pico(total))):
            late = self.run(command)
            assert isinstance(late, c.CreditFault)
            assert late.reason is Why.HOLD_FENCED

    @rule(key=st.sampled_from(KEYS), want=st.integers(8, 4 * MICRO), part=st.integers(0, 9), more=st.integers(0, 24), days=st.sampled_from([0, 0, 1]))
    def serves(self, key: c.KeyId, want: int, part: int, more: int, days: int) -> None:
        """A request from its hold to its end, perhaps across midnight."""
        self.holds(key=key, want=want, floor=1, caps=(None, None, None), room=9, stale=0, fits=None)
        self.folds(pick=-1, part=part)
        self.now += days * 86_400
        self.folds(pick=-1, part=8)
        self.reports()
        self.settles(pick=-1, part=more)
        self.reports()

    # --- bills and time

    @rule()
    def reports(self) -> None:
        prepaid = self.clerk.funds(c.FundsKind.PAYMENT, c.FundsKind.GRANT)
        billable = max(self.clerk.ended - prepaid, 0) // MICRO
        expected = max(billable - sum(self.clerk.bills), 0)
        made = self.done(c.ReportUsage())
        assert (made.reported_micro, made.replayed) == (expected, expected == 0)
        self.clerk.bills.append(made.reported_micro)
        assert self.done(c.ReportUsage()).replayed, "nothing is billed twice"

    @rule(seconds=st.sampled_from([1, 3_600, 7_200, 86_400, 31 * 86_400, -1, -3_600, -90_000, -40 * 86_400]))
    def waits(self, seconds: int) -> None:
        self.now = max(self.now + seconds, BEGIN - 86_400)

    @rule()
    def opens_again(self) -> None:
        assert self.done(c.OpenAccount(ID, 77)).replayed

    # --- laws

    @invariant()
    def the_books_agree(self) -> None:
        account, clerk = self.account, self.clerk
        assert account is not None
        c.check(account)
        assert (account.funds, account.owed, account.held) == (clerk.funds(), clerk.owed, clerk.held)
        assert (account.balance, account.headroom, account.final) == (clerk.funds() - clerk.owed, clerk.free, clerk.ended)
        assert (account.invoiced, account.access, account.overdraft) == (clerk.funds(c.FundsKind.INVOICE), clerk.access, clerk.overdraft)
        assert account.reported_micro == sum(clerk.bills)
        assert {name: (hold.key, hold.granted, hold.consumed) for name, hold in account.holds.items()} == {
            name: (live.key, live.promised, live.charged) for name, live in clerk.live.items()
        }
        for key in KEYS:
            spent = account.spending.get(key, c.Spending()).at(UnixSeconds(self.now))
            assert [spent.spent_day, spent.spent_month, spent.spent_total] == list(clerk.spent(key, self.now).values())

    @invariant()
    def the_journal_rebuilds(self) -> None:
        assert reduce(c.fold, self.journal, None) == self.account
        assert self.account is not None
        assert self.account.version == len(self.journal)


CreditBooks.TestCase.settings = settings() if settings.get_current_profile_name() == "deep" else QUICK
TestCreditBooks = CreditBooks.TestCase
