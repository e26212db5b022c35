"""What one payment is worth to its account, whatever was heard of it, in whatever order and however often.

A payment processor announces payments, refunds and disputes in any order, more than once, and sometimes not at all. So
nothing is ever added up from announcements: everything known of a payment is joined into one value, where joining is
commutative, associative and idempotent, and the account is booked the difference of what that value is worth.

Amounts are whole cents. Source: Stripe API, the life of a refund and of a dispute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Final, TypeVar

from channels.credit import FundsKind
from channels.units import Pico

S = TypeVar("S", bound=IntEnum)

PICO_PER_CENT: Final = 10**10
CENTS_MAX: Final = 99_999_999  # Stripe's largest charge, in cents


class RefundState(IntEnum):
    """How far a refund has come; it never goes back, so the greatest that was heard of is the truth."""

    PENDING = 1
    SUCCEEDED = 2
    FAILED = 3
    """Failed or cancelled: the money stayed, also when it had been on its way."""


class DisputeState(IntEnum):
    """How far a dispute has come."""

    INQUIRY = 1
    """A question from the bank: no money has moved."""
    OPEN = 2
    LOST = 3
    WON = 4
    """Above lost: money that came back after all is there."""


@dataclass(frozen=True, slots=True)
class PaymentRecord:
    """All that is known of one payment. ``paid`` is None until the payment itself was heard of."""

    id: str
    kind: FundsKind = FundsKind.PAYMENT
    paid: int | None = None
    refunds: Mapping[str, tuple[int, RefundState]] = field(default_factory=lambda: MappingProxyType({}))
    disputes: Mapping[str, tuple[int, DisputeState]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def worth(self) -> int:
        """Cents this payment gives its account; negative when more was taken back than it brought.

        A refund that was heard of before its payment waits for it: nothing is taken for money that never came.
        """
        if self.paid is None:
            return 0
        back = sum(cents for cents, state in self.refunds.values() if state is not RefundState.FAILED)
        lost = (DisputeState.OPEN, DisputeState.LOST)
        return self.paid - back - sum(cents for cents, state in self.disputes.values() if state in lost)

    @property
    def worth_pico(self) -> Pico:
        """The same in pico-dollars."""
        return Pico(self.worth * PICO_PER_CENT)


_KINDS: Final = (FundsKind.PAYMENT, FundsKind.GRANT, FundsKind.INVOICE)
"""The later, the more was heard. Once an invoice, always one: the payment's own announcement does not say so."""


def joined(known: PaymentRecord | None, heard: PaymentRecord) -> PaymentRecord:
    """Everything that either knows."""
    if known is None:
        return heard
    assert known.id == heard.id, "two payments were taken for one"
    paid = max((paid for paid in (known.paid, heard.paid) if paid is not None), default=None)
    kind = max(known.kind, heard.kind, key=_KINDS.index)
    return PaymentRecord(
        known.id, kind, paid, _latest(known.refunds, heard.refunds), _latest(known.disputes, heard.disputes)
    )


def _latest(known: Mapping[str, tuple[int, S]], heard: Mapping[str, tuple[int, S]]) -> Mapping[str, tuple[int, S]]:
    both = dict(known)
    for name, (cents, state) in heard.items():
        before = both.get(name)
        both[name] = (cents, state) if before is None else max(before, (cents, state), key=lambda one: (one[1], one[0]))
    return MappingProxyType(both)
