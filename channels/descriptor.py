"""What a channel *is*: the facts its id is derived from, the escrow that holds it, and what that escrow last said."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from channels.ids import ZERO_ADDRESS, Address, Hash32
from channels.instants import UnixSeconds
from channels.units import Units

RESERVE_ADDRESS: Final = Address(bytes.fromhex("4d50500000000000000000000000000000000000"))
"""The v2 channel reserve precompile, the same on every Tempo chain (TIP-1034)."""
CLOSE_GRACE_S: Final = 900
"""Seconds between a payer's close request and the first block in which they may withdraw (both escrows)."""


class SessionProtocol(StrEnum):
    """Which escrow a channel lives in; ``sessionProtocol`` on the wire."""

    V1 = "v1"
    """Contract escrow, uint128 amounts, EIP-712 domain "Tempo Stream Channel"."""
    V2 = "v2"
    """TIP-1034 reserve precompile, uint96 amounts, EIP-712 domain "TIP20 Channel Reserve"."""


@dataclass(frozen=True, slots=True)
class Escrow:
    """One escrow on one chain: the verifying contract of every voucher it accepts."""

    protocol: SessionProtocol
    chain_id: int
    address: Address


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The immutable terms of a channel, as its opening transaction fixed them.

    A v1 channel has no operator and no expiring nonce; both are zero there.
    """

    payer: Address
    payee: Address
    operator: Address
    token: Address
    salt: Hash32
    authorized_signer: Address
    expiring_nonce_hash: Hash32

    @property
    def signer(self) -> Address:
        """Whose vouchers count: the authorised signer if one is named, else the payer."""
        return self.payer if self.authorized_signer == ZERO_ADDRESS else self.authorized_signer


@dataclass(frozen=True, slots=True)
class ChainSnapshot:
    """What the escrow said about a channel at one block. A newer one replaces an older one; they are never merged.

    Merging by maximum looks safe and is not: a top-up clears a close request, and a close deletes the slot.
    """

    deposit: Units
    settled: Units
    close_requested_at: UnixSeconds | None
    block: int
