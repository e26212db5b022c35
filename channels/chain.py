"""What the node needs from a chain, as a protocol; types only.

Three answers to a broadcast must never be mixed up: it is in a block (:class:`Receipt`, which may say "reverted"), it
surely is not and never will be (a fault), and nobody can tell yet (``CHAIN_OUTCOME_UNKNOWN``). Treating the third as
the second pays twice; treating it as the first serves for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

from channels.abi import Log
from channels.descriptor import ChainSnapshot, Escrow
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.tempo_tx import Call, TempoTx
from channels.units import Units


@dataclass(frozen=True, slots=True)
class Head:
    """The newest block the node knows."""

    number: int
    timestamp: UnixSeconds


@dataclass(frozen=True, slots=True)
class Receipt:
    """A transaction that is in a block. ``succeeded`` is false when it reverted: none of its calls took effect then.

    ``logs`` end with the fee's own token transfer where the chain charges one, even for a reverted transaction.
    """

    tx_hash: Hash32
    succeeded: bool
    block: int
    sender: Address
    logs: tuple[Log, ...]


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A transaction the chain has included, and what the escrow says of its channel from that block on."""

    tx_hash: Hash32
    chain: ChainSnapshot


class Fate(StrEnum):
    """What is known of a transaction that has no receipt."""

    PENDING = "pending"
    """It may still be mined."""
    EXPIRED = "expired"
    """Its validity ended before the newest block: it is not on the chain and never will be."""


TxOutcome: TypeAlias = Receipt | Fate


class Chain(Protocol):
    """One Tempo chain. Every method may raise ``CHAIN_UNAVAILABLE``: nothing happened, try again later."""

    async def chain_id(self) -> int:
        """The id the node reports; compare it with the configured one before trusting the rest."""
        ...

    async def head(self) -> Head:
        """The newest block."""
        ...

    async def channel_state(
        self, escrow: Escrow, channel_id: ChannelId, *, at_block: int | None = None
    ) -> ChainSnapshot:
        """What the escrow says of a channel; unknown and closed channels both read as a zero deposit.

        With ``at_block`` the read is pinned there and repeated until the node has that block: behind a load balancer
        the replica that answers may lag the one that gave the receipt, and "latest" there shows no channel.
        """
        ...

    async def balance_of(self, token: Address, owner: Address) -> Units:
        """Token base units of ``owner``, at most 2**96 - 1."""
        ...

    async def simulate(self, sender: Address, calls: Sequence[Call], *, fee_token: Address | None) -> None:
        """Run a batch without sending it.

        Raises:
            ChannelFault: ``CHAIN_REJECTED`` when it would revert.
        """
        ...

    async def prepare(
        self,
        sender: Address,
        calls: Sequence[Call],
        *,
        fee_token: Address | None,
        entropy: bytes,
        sponsored: bool = False,
    ) -> TempoTx:
        """An unsigned transaction with expiring nonce, gas and fees filled in; sign and broadcast it at once.

        ``entropy`` (8 bytes) makes two equal batches of one second different transactions.

        Raises:
            ChannelFault: ``CHAIN_REJECTED`` when the batch would revert.
        """
        ...

    async def broadcast(self, raw: bytes) -> Receipt:
        """Send a complete transaction and wait for its receipt; sending the same bytes again is harmless.

        Raises:
            ChannelFault: ``CHAIN_REJECTED`` when the node refused it and does not hold it, ``CHAIN_UNAVAILABLE`` when
                it surely never left, ``CHAIN_OUTCOME_UNKNOWN`` when it may have; then ask :meth:`outcome` later.
        """
        ...

    async def receipt(self, tx_hash: Hash32) -> Receipt | None:
        """The receipt of a mined transaction, or ``None``; ``None`` alone proves nothing."""
        ...

    async def outcome(self, tx_hash: Hash32, *, valid_before: UnixSeconds) -> TxOutcome:
        """What became of a transaction that may have been sent; ``valid_before`` is its own."""
        ...

    async def logs(
        self, address: Address, *, topics: Sequence[Hash32 | None], from_block: int, to_block: int
    ) -> tuple[Log, ...]:
        """Logs of one contract in a block range, inclusive; a ``None`` topic matches any."""
        ...
