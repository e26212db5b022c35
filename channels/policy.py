"""The numbers a node chooses about its channels. Frozen, passed in, each with the reason for its default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from channels.units import Units

_UNSETTLED_MAX: Final = Units(5_000_000)


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits of the account state machine. All amounts are base units."""

    deposit_units_min: Units = Units(0)
    """Smallest deposit worth opening: below it settling costs more than the channel earns (the draft says 1 USD)."""
    voucher_delta_units_min: Units = Units(0)
    """Smallest advance of a voucher that is not a repeat; stops one-unit floods from buying a signature check each."""
    ladder_max: int = 64
    """Accepted vouchers kept per channel. Settlement needs the greatest one <= spent; 64 bounds what thinning can cost
    to one sixty-fourth of the distance between spent and accepted."""
    holds_max: int = 8
    """Live requests on one channel; the draft wants one active session, sharing nodes go up to 8."""
    tickets_max: int = 256
    """Used content credentials remembered until they expire. 50 challenges/s per address over 300 s would be more,
    but one channel serves one stream at a time, and 256 requests in five minutes is one every 1.2 s."""
    unsettled_units_max: Units = _UNSETTLED_MAX
    """Most one channel may owe the node beyond what the chain has paid out before it gets no new request: 5 USD. What a
    payer whose token is frozen, or a chain that stands still, can cost."""
