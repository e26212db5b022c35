"""The arithmetic of sponsored gas, which no store may do differently."""

from __future__ import annotations

from collections.abc import Sequence

from mppnode.ledger.base import Budget, BudgetSpent, Grant


def check_budget(wanted: Grant, budget: Budget, spent: Sequence[tuple[bytes, int]]) -> None:
    """Compare a wish with what was granted in the last hour, as (sender, units). Raises ``BudgetSpent``."""
    if sum(1 for sender, _ in spent if sender == wanted.sender) >= budget.grants_per_sender:
        raise BudgetSpent("the sender's grants of the last hour are used up")
    if sum(fee for _, fee in spent) + wanted.fee_max > budget.total:
        raise BudgetSpent("the budget of the last hour is used up", total=True)
