"""Notices: each step of a cap once per window, a low balance and a recharge when the balance falls below their bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from channels.credit import AccountId, CreditAccount, KeyId, SpendCaps, Spending
from channels.instants import UnixMillis
from channels.payment import PICO_PER_CENT as CENT
from channels.units import Pico
from mppnode.accounts.model import Account, AccountKind, Alerts, ApiKey, BillingProfile, Recharge
from mppnode.accounts.notices import STEPS, notices
from mppnode.kernel.keys import KeyDigest
from mppnode.ledger.credit_rows import Task

NOW = UnixMillis(1_900_000_000_000)
DAY_MS = 86_400_000
ALERTS = Alerts("https://hooks.example.com/a", "whsec_" + "A" * 43 + "=", low_balance_cents=100)
RECHARGE = Recharge(threshold_cents=50, amount_cents=500, month_cap_cents=5_000)
ACCOUNT = Account(
    id=AccountId("a"), kind=AccountKind.USER, trust="a", alerts=ALERTS, billing=BillingProfile("cus_1", "pm_1", None, RECHARGE)
)  # fmt: skip
QUIET = replace(ACCOUNT, alerts=None, billing=BillingProfile())


def key(caps: SpendCaps) -> ApiKey:
    return ApiKey(id=KeyId("k"), account=ACCOUNT.id, name="", digest=KeyDigest(bytes(32)), prefix="sk-mpp-", caps=caps)


def credit(paid: int, owed: int, spent: int = 0, now: int = NOW) -> CreditAccount:
    spending = Spending().plus(spent, now // 1000)  # type: ignore[arg-type]
    return CreditAccount(AccountId("a"), 1, prepaid=paid, owed=owed, spending={KeyId("k"): spending})


def told(tasks: tuple[Task, ...]) -> list[Any]:
    return [orjson.loads(task.document)["data"]["percent"] for task in tasks if "cap.reached" in task.document]


@given(spent=st.lists(st.integers(0, 40), min_size=1, max_size=30), cap=st.integers(1, 100))
def test_each_step_of_a_cap_is_told_once_in_a_window(spent: list[int], cap: int) -> None:
    """However a cap is used up, 50, 80 and 100 % are each told exactly when they were passed, and once."""
    total, ids, steps = 0, list[str](), list[int]()
    for amount in spent:
        made = notices(
            credit(10**6 * CENT, 0, total), credit(10**6 * CENT, 0, total + amount), account=ACCOUNT, key=key(SpendCaps(total=Pico(cap))), now=NOW
        )  # fmt: skip
        ids += [task.id for task in made]
        steps += told(made)
        total += amount
    assert steps == [step for step in STEPS if total * 100 >= cap * step]
    assert len(set(ids)) == len(ids)


def test_a_new_day_tells_again_and_a_repeat_has_the_same_id() -> None:
    """The id says which window: the same change told twice is one task, and tomorrow's is another."""
    caps = key(SpendCaps(day=Pico(100)))

    def at(now: int) -> tuple[Task, ...]:
        rich = 10**6 * CENT
        return notices(credit(rich, 0, 0, now), credit(rich, 50, 50, now), account=ACCOUNT, key=caps, now=UnixMillis(now))

    today, again, tomorrow = at(NOW), at(NOW + 1_000), at(NOW + DAY_MS)
    assert told(today) == told(tomorrow) == [50]
    assert today[0].id == again[0].id != tomorrow[0].id


def test_a_low_balance_and_a_recharge_follow_the_fall_only() -> None:
    """Falling below tells; staying below, or being above, does not; nobody is told who gave no address."""
    def kinds(before: int, after: int, account: Account = ACCOUNT) -> list[str]:
        paid = 200 * CENT
        made = notices(credit(paid, paid - before * CENT), credit(paid, paid - after * CENT), account=account, key=None, now=NOW)
        return [task.kind for task in made]

    assert kinds(150, 100) == []
    assert kinds(100, 99) == ["alert"]
    assert kinds(99, 50) == []
    assert kinds(50, 49) == ["recharge"]
    assert kinds(150, 10) == ["alert", "recharge"]
    assert kinds(49, 10) == []
    assert kinds(150, 10, QUIET) == []
    assert kinds(150, 10, replace(ACCOUNT, billing=replace(ACCOUNT.billing, card=None))) == ["alert"]


def test_another_card_is_another_order_and_a_trembling_balance_is_not() -> None:
    """The same fall twice in a day is one order; with other settings or another card it is a new one."""
    before, after = credit(200 * CENT, 0), credit(200 * CENT, 190 * CENT)

    def order(account: Account) -> str:
        return notices(before, after, account=account, key=None, now=NOW)[-1].id

    other = replace(ACCOUNT, billing=replace(ACCOUNT.billing, card="pm_2"))
    assert order(ACCOUNT) == order(ACCOUNT) != order(other)


def test_no_secret_is_in_a_task() -> None:
    """Neither the address nor the secret of an account's alerts leaves its row."""
    for task in notices(credit(200 * CENT, 0), credit(200 * CENT, 199 * CENT), account=ACCOUNT, key=None, now=NOW):
        assert "whsec_" not in repr(task)
        assert "hooks.example.com" not in repr(task)
