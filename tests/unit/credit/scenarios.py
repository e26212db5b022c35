"""What a credit ledger must do, as short stories in pico; ``test_mutants`` tells each of them to a broken machine."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import reduce
from types import ModuleType
from typing import Any

import pytest

MIDNIGHT = int(datetime(2025, 3, 31, tzinfo=UTC).timestamp())
"""The first second of the last day of a month."""
DAY = 86_400


class Machine:
    """One build of the credit machine, with an account that holds 1,000 pico."""

    def __init__(self, c: ModuleType) -> None:
        self.c = c
        self.account: Any = None
        self.journal: list[Any] = []
        self.now = MIDNIGHT + 100
        self.do(c.OpenAccount("acct"))
        self.funds(1_000)

    def do(self, command: Any) -> Any:
        try:
            made = self.c.plan(self.account, command, now=self.now)
        except self.c.CreditFault as fault:  # of this build: nobody outside knows its class
            raise AssertionError(f"{command} was refused: {fault}") from fault
        self.account = made.account
        self.journal.extend(made.events)
        assert reduce(self.c.fold, self.journal, None) == self.account
        assert self.account.version == len(self.journal)
        return made.result

    def refuses(self, why: str, command: Any) -> Any:
        before = repr(self.account)
        with pytest.raises(self.c.CreditFault) as caught:
            self.c.plan(self.account, command, now=self.now)
        assert caught.value.reason.value == why
        assert repr(self.account) == before
        return caught.value

    def funds(self, amount: int, kind: str = "PAYMENT") -> Any:
        return self.do(self.c.MoveFunds(self.c.FundsKind[kind], "x", amount))

    def wish(
        self,
        name: str,
        want: int,
        floor: int | None = None,
        *,
        key: str = "k",
        day: int | None = None,
        month: int | None = None,
        total: int | None = None,
        **more: Any,
    ) -> Any:
        more = {"access": self.account.access, **more}
        caps = self.c.SpendCaps(day, month, total)
        return self.c.Hold(name, want if floor is None else floor, want, key=key, caps=caps, **more)

    def hold(self, name: str, want: int, floor: int | None = None, **more: Any) -> Any:
        return self.do(self.wish(name, want, floor, **more))

    def fold(self, name: str, consumed: int) -> Any:
        return self.do(self.c.Fold(name, consumed))

    def settle(self, name: str, total: int, **more: Any) -> Any:
        return self.do(self.c.Settle(name, total, **more))

    def spend(self, amount: int, **more: Any) -> None:
        name = f"spent {len(self.journal)}"
        self.hold(name, amount, **more)
        self.settle(name, amount)


def requests_share_the_funds(m: Machine) -> None:
    """What one holds or was charged, another cannot have; to the last pico."""
    assert m.hold("a", 600).granted == 600
    m.fold("a", 200)
    assert m.refuses("credit_too_low", m.wish("b", 401)).left == 400
    assert m.hold("b", 900, 400).granted == 400
    assert m.account.headroom == 0


def an_overdraft_may_be_owed(m: Machine) -> None:
    """Trust counts beside funds, and is no money: the balance goes below zero."""
    m.do(m.c.SetOverdraft(500))
    m.spend(1_500)
    assert (m.account.balance, m.account.headroom) == (-500, 0)
    assert m.do(m.c.SetOverdraft(500)).replayed
    m.refuses("funds_limit", m.c.SetOverdraft(-1))
    m.refuses("funds_limit", m.c.SetOverdraft(m.c.FUNDS_MAX + 1))
    m.do(m.c.SetOverdraft(m.c.FUNDS_MAX))


def nobody_pays_above_the_hold(m: Machine) -> None:
    """The exact end is cut to the hold and the rest is the node's; a fold beyond it is another request's."""
    m.hold("a", 100)
    m.refuses("hold_fenced", m.c.Fold("a", 101))
    m.fold("a", 100)
    made = m.settle("a", 130)
    assert (made.charged, made.beyond, m.account.owed) == (100, 30, 100)
    m.refuses("hold_fenced", m.c.Settle("a", 1))


def an_over_count_is_given_back(m: Machine) -> None:
    """A final report below what was folded lowers what is owed and what the key has spent."""
    m.spend(500)
    m.hold("a", 400, total=900)
    m.fold("a", 300)
    m.settle("a", 100)
    spent = m.account.spending["k"]
    assert (m.account.owed, spent.spent_day, spent.spent_month, spent.spent_total) == (600, 600, 600, 600)


def giving_back_opens_no_window_below_zero(m: Machine) -> None:
    """What yesterday was over-counted is no room today."""
    m.hold("a", 400)
    m.fold("a", 300)
    m.now += DAY
    m.settle("a", 100)
    assert m.refuses("cap_reached", m.wish("b", 51, day=50)).left == 50


def a_cap_counts_what_is_held(m: Machine) -> None:
    """Held and spent of the key itself stay within its cap, to the pico; another key's are its own."""
    m.spend(100, total=300)
    m.hold("a", 150, total=300)
    m.hold("other", 300, key="k2", total=300)
    assert m.refuses("cap_reached", m.wish("b", 51, total=300)).left == 50
    assert m.hold("b", 60, 50, total=300).granted == 50
    assert m.refuses("cap_reached", m.wish("c", 1, total=200)).left == 0


def days_and_months_begin_at_midnight(m: Machine) -> None:
    """A day's spending is gone with its last second, a month's with its own, the total never."""
    m.spend(100)
    m.now = MIDNIGHT + DAY - 1
    fault = m.refuses("cap_reached", m.wish("a", 1, day=100))
    assert (fault.window.value, fault.again_in_s) == ("day", 1)
    fault = m.refuses("cap_reached", m.wish("a", 1, month=100))
    assert (fault.window.value, fault.again_in_s) == ("month", 1)
    m.now = MIDNIGHT - DAY * 40
    m.refuses("cap_reached", m.wish("a", 1, day=100))  # a clock that was set back opens nothing
    m.spend(1)
    m.now = MIDNIGHT + DAY
    fault = m.refuses("cap_reached", m.wish("a", 1, total=101))
    assert (fault.window.value, fault.again_in_s) == ("total", None)
    m.spend(100, day=100, month=100)
    assert m.refuses("cap_reached", m.wish("a", 1, day=100)).again_in_s == DAY
    assert m.refuses("cap_reached", m.wish("a", 1, month=100)).again_in_s == 30 * DAY
    m.now += DAY
    m.refuses("cap_reached", m.wish("a", 1, month=100))
    m.hold("a", 1, day=1)
    m.now = MIDNIGHT + 276 * DAY - 1  # the last second of December's first day
    assert m.refuses("cap_reached", m.wish("b", 10, month=5)).again_in_s == 31 * DAY - (m.now - (MIDNIGHT + 245 * DAY))


def a_refusal_names_the_window_to_wait_for(m: Machine) -> None:
    """Of the caps that are in the way, the one that opens last; what is left is what the tightest leaves."""
    m.spend(90)
    fault = m.refuses("cap_reached", m.wish("a", 20, day=100, month=105, total=500))
    assert (fault.left, fault.window.value) == (10, "month")
    fault = m.refuses("cap_reached", m.wish("a", 20, day=100, month=110))
    assert (fault.left, fault.window.value) == (10, "day")
    fault = m.refuses("cap_reached", m.wish("a", 20, day=100, month=100))
    assert (fault.left, fault.window.value) == (10, "month")


def a_lowered_cap_refuses_the_next(m: Machine) -> None:
    """A cap below what is held already takes nothing back and grants nothing more; what is left is never negative."""
    m.hold("a", 500, day=600)
    assert m.refuses("cap_reached", m.wish("b", 1, day=100)).left == 0
    assert m.settle("a", 500).charged == 500


def a_repeat_changes_nothing(m: Machine) -> None:
    """The same hold, fold or opening again is answered as it was, also when the key has changed since."""
    m.hold("a", 100)
    asked = m.wish("a", 100)
    m.fold("a", 40)
    m.do(m.c.ChangeAccess())
    for again in (asked, m.c.Fold("a", 40), m.c.OpenAccount("acct", 9), m.c.MoveFunds(m.c.FundsKind.GRANT, "x", 0)):
        before = m.account
        assert m.do(again).replayed
        assert m.account == before
    assert m.do(asked).granted == 100


def old_knowledge_is_refused(m: Machine) -> None:
    """Every change of access counts, and a request that knew an older or a newer count is refused."""
    m.do(m.c.ChangeAccess())
    for access in (1, 3):
        m.refuses("access_changed", m.wish("a", 1, access=access))
    m.hold("a", 1, access=2)


def a_key_has_so_many_at_once(m: Machine) -> None:
    """Concurrency is counted by key; requests that have ended make room."""
    m.hold("a", 1, concurrency=2)
    m.hold("b", 1, concurrency=2)
    m.refuses("busy", m.wish("c", 1, concurrency=2))
    m.hold("c", 1, key="k2", concurrency=1)
    m.settle("a", 0)
    m.hold("d", 1, concurrency=2)


def an_account_has_so_many_at_once(m: Machine) -> None:
    """A row holds at most HOLDS_MAX requests, whoever's they are."""
    m.funds(10_000)
    for number in range(m.c.HOLDS_MAX - 1):
        held = m.c.Held(str(number), 1, "other", "node-1")
        m.account = m.c.fold(m.account, held)
        m.journal.append(held)
    m.hold("last", 1)
    m.refuses("busy", m.wish("one more", 1))


def a_chargeback_takes_what_was_promised(m: Machine) -> None:
    """Headroom goes below zero; the running request is charged its hold all the same, and the next one is refused."""
    m.hold("a", 800)
    m.funds(-1_000)
    assert (m.account.headroom, m.account.funds) == (-800, 0)
    assert m.refuses("credit_too_low", m.wish("b", 1)).left == 0
    assert m.settle("a", 800).charged == 800
    assert m.account.balance == -800


def only_ended_usage_is_billed(m: Machine) -> None:
    """Beyond what was prepaid, in whole millionths, once; a live request may yet get something back."""
    micro = 10**6
    m.do(m.c.SetOverdraft(100 * micro))
    m.hold("live", 50 * micro)
    m.fold("live", 40 * micro)
    assert m.do(m.c.ReportUsage()).replayed
    m.spend(3 * micro + 999)
    assert m.do(m.c.ReportUsage()).reported_micro == 2
    m.spend(1)
    assert m.do(m.c.ReportUsage()).reported_micro == 1
    assert m.do(m.c.ReportUsage()).replayed
    m.funds(3 * micro, "INVOICE")
    assert m.do(m.c.ReportUsage()).replayed
    m.funds(5 * micro)
    assert m.do(m.c.ReportUsage()).replayed
    m.settle("live", 10 * micro)
    assert m.do(m.c.ReportUsage()).reported_micro == 5
    assert m.account.reported_micro == 8


def funds_fit_their_columns(m: Machine) -> None:
    """No sum and no part of it leaves the range, on either side; the greatest that fits is taken."""
    limit = m.c.FUNDS_MAX
    m.refuses("funds_limit", m.c.MoveFunds(m.c.FundsKind.GRANT, "x", limit - 999))
    m.funds(limit - 1_000, "GRANT")
    m.funds(-limit, "INVOICE")
    m.refuses("funds_limit", m.c.MoveFunds(m.c.FundsKind.GRANT, "x", 1))
    m.refuses("funds_limit", m.c.MoveFunds(m.c.FundsKind.INVOICE, "x", -1))
    m.funds(m.c.FUNDS_MIN, "GRANT")
    m.refuses("funds_limit", m.c.MoveFunds(m.c.FundsKind.GRANT, "x", -1))


def the_dead_stay_forgotten(m: Machine) -> None:
    """A forgotten key's counters are gone, and its last requests do not bring them back; others keep theirs."""
    m.spend(10, key="k2", pace=(5,))
    m.hold("a", 100, pace=(1, 2))
    m.fold("a", 10)
    m.do(m.c.ChangeAccess("k"))
    assert m.account.paces.keys() == m.account.spending.keys() == {"k2"}
    m.fold("a", 20)
    m.settle("a", 60, pace=(3, 4))
    assert m.account.paces.keys() == m.account.spending.keys() == {"k2"}
    assert (m.account.owed, m.account.spending["k2"].spent_total) == (70, 10)


def what_a_limiter_keeps_comes_with_the_money(m: Machine) -> None:
    """It changes with hold and settlement, and stays where neither says anything."""
    m.hold("a", 100, pace=(1, 2))
    assert m.account.paces["k"] == (1, 2)
    m.hold("b", 100)
    m.settle("b", 1)
    assert m.account.paces["k"] == (1, 2)
    m.settle("a", 100, pace=(3, 4))
    assert m.account.paces["k"] == (3, 4)


def a_hold_says_whose_it_is(m: Machine) -> None:
    """Through every fold: its node, its key, and what it was for."""
    m.hold("a", 100, owner="node-1", about="dev/echo")
    m.fold("a", 10)
    hold = m.account.holds["a"]
    assert (hold.owner, hold.key, hold.about, hold.granted, hold.consumed) == ("node-1", "k", "dev/echo", 100, 10)
    m.now -= 50
    m.fold("a", 20)
    assert m.account.charged_at == m.now + 50, "the last charge is the latest one"


def what_does_not_exist_is_not_found(m: Machine) -> None:
    """Nothing but an opening makes an account."""
    m.account, m.journal = None, []
    for command in (m.c.Fold("a", 1), m.c.ReportUsage(), m.c.ChangeAccess(), m.c.MoveFunds(m.c.FundsKind.GRANT, "x", 0)):
        m.refuses("not_found", command)
    m.refuses("funds_limit", m.c.OpenAccount("acct", -1))
    m.do(m.c.OpenAccount("acct", 70))
    assert (m.account.overdraft, m.account.version, m.account.access) == (70, 1, 1)
