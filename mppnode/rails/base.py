"""What the session rail needs from the rooms beside it, as protocols: they are joined in ``app.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from channels.descriptor import ChainSnapshot, Descriptor, Escrow
from channels.ids import Hash32
from channels.model import Account
from channels.units import Units
from channels.wire.credential import OpenPayload, TopUpPayload
from mppnode.kernel.models import Model
from mppnode.pricing.book import QuotedUnit


@dataclass(frozen=True, slots=True)
class Offer:
    """What one request would be sold for: the model, the quoted unit, and the route it is bound to."""

    route: str
    model: Model
    unit: QuotedUnit


@dataclass(frozen=True, slots=True)
class InspectedOpen:
    """A decoded and statically verified open: nothing has been broadcast."""

    descriptor: Descriptor
    deposit: Units


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A transaction the chain has included, and the channel's state at its block."""

    tx_hash: Hash32
    chain: ChainSnapshot


class ChainIntents(Protocol):
    """Everything that signs, broadcasts or reads; implemented by ``treasury`` (design D14).

    Every method raises ``ChannelFault``: ``CHAIN_REJECTED`` and ``TRANSACTION_REJECTED`` are the payer's,
    ``CHAIN_UNAVAILABLE`` means surely nothing happened, ``CHAIN_OUTCOME_UNKNOWN`` that something may have.
    """

    def inspect_open(self, escrow: Escrow, payload: OpenPayload) -> InspectedOpen:
        """Check an open as far as it can be checked without the chain."""
        ...

    async def open(self, escrow: Escrow, payload: OpenPayload, inspected: InspectedOpen) -> Confirmed:
        """Broadcast an inspected open once and wait for it."""
        ...

    async def top_up(self, account: Account, payload: TopUpPayload) -> Confirmed:
        """Check, broadcast and confirm a top-up of a channel."""
        ...

    async def close(self, account: Account) -> Confirmed:
        """Capture the fixed amount of a CAPTURED account and give the rest back to the payer."""
        ...

    async def observe(self, account: Account) -> ChainSnapshot:
        """Read what the escrow says about a channel now."""
        ...
