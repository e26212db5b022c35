"""What the session rail sells and what it needs from the rooms beside it; they are joined in ``app.py``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Final, Protocol

from channels.chain import Confirmed
from channels.descriptor import ChainSnapshot, Escrow
from channels.ids import ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.model import Account
from channels.units import Pico, Units
from channels.verify import VerifiedOpen
from channels.wire.credential import OpenPayload, TopUpPayload
from mppnode.kernel.rates import Rates
from mppnode.pricing.book import QuotedUnit

WHOLE_REQUEST: Final = "request"
"""The ``unitType`` of a challenge whose amount is meant for one response, the reference implementation's word."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What one request would be sold for at most: the models asked for, the rates, the quoted unit, and the route.

    Providers differ in price, and which one serves is decided when the request is paid. So a challenge quotes the
    dearest that may serve, names its rates under its MAC, and nothing above them is ever charged on it.
    """

    route: str
    asked: str
    """The model as the caller wrote it, or several of them in their order."""
    rates: Rates
    unit: QuotedUnit

    def for_the_rest(self, missing: Units) -> Offer:
        """The same request, quoted at what its voucher still lacks: a client that reads no snapshot adds the quoted
        amount to its last voucher, and unit by unit it would give up before a large buffered answer is covered.
        """
        unit = QuotedUnit(self.unit.tokens, WHOLE_REQUEST, missing) if missing > self.unit.amount else self.unit
        return replace(self, unit=unit)

    @property
    def scope(self) -> dict[str, str]:
        """What a challenge binds: a credential for one route or model buys no other, and none beyond these rates."""
        return {"route": self.route, "model": self.asked, "rates": ":".join(str(int(rate)) for rate in self.rates.axes)}


def quoted_rates(scope: Mapping[str, str]) -> Rates:
    """The rates a challenge of ours was issued at.

    Raises:
        ValueError: when it names none, which no challenge does that this node has issued.
    """
    return Rates(*(Pico(int(rate)) for rate in scope.get("rates", "").split(":")))


class ChainIntents(Protocol):
    """Everything that signs, broadcasts or reads; implemented by ``treasury`` (design D14).

    Every method raises ``ChannelFault``: ``CHAIN_REJECTED`` and ``TRANSACTION_REJECTED`` are the payer's,
    ``CHAIN_UNAVAILABLE`` means surely nothing happened, ``CHAIN_OUTCOME_UNKNOWN`` that something may have.
    """

    def inspect_open(self, escrow: Escrow, payload: OpenPayload) -> VerifiedOpen:
        """Check an open as far as it can be checked without the chain."""
        ...

    @property
    def sponsoring(self) -> bool:
        """Whether v2 challenges should offer to pay the payer's fees just now."""
        ...

    async def open(
        self, escrow: Escrow, payload: OpenPayload, opened: VerifiedOpen, *, expires: UnixSeconds
    ) -> Confirmed:
        """Broadcast an inspected open once and wait for it; ``expires`` is the end of the challenge it answers."""
        ...

    async def top_up(self, account: Account, payload: TopUpPayload, *, expires: UnixSeconds) -> Confirmed:
        """Check, broadcast and confirm a top-up of a channel."""
        ...

    async def observe(self, account: Account) -> ChainSnapshot:
        """Read what the escrow says about a channel now."""
        ...


class Closes(Protocol):
    """Brings channels to their end; implemented by ``treasury``."""

    def closing(self, channel: ChannelId) -> AbstractAsyncContextManager[None]:
        """One close of a channel at a time."""
        ...

    async def finish(self, channel: ChannelId, *, first: bool) -> tuple[Account, Hash32]:
        """Bring a CLOSING or CAPTURED channel to its end, inside :meth:`closing`; refused at ``first`` it reopens."""
        ...

    def later(self, channel: ChannelId) -> None:
        """Go on with a close in the background."""
        ...
