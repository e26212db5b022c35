"""What the node needs from a chain, as a protocol; types only.

Three answers to a broadcast must never be mixed up: it is in a block (:class:`Receipt`, which may say "reverted"), it
surely is not and never will be (a fault), and nobody can tell yet (``CHAIN_OUTCOME_UNKNOWN``). Treating the third as
the second pays twice; treating it as the first serves for nothing.

And a block can still be replaced: what is read at :meth:`Chain.head` is news, what is at or below
:meth:`Chain.finalised` is a fact. Money is booked on facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, TypeAlias

from channels import tip20
from channels.abi import Log
from channels.descriptor import ChainSnapshot, Escrow
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.tempo_tx import Call, TempoTx
from channels.units import MAX_UINT96, Units

FEE_MANAGER: Final = Address(bytes.fromhex("feec000000000000000000000000000000000000"))
"""Where every fee goes, in the token it is paid in. Source: Tempo fee specification."""
ATTO_PER_UNIT: Final = 10**12
"""Gas prices are in attodollars (10**-18 USD) per gas, token base units are 10**-6 USD."""


@dataclass(frozen=True, slots=True)
class Head:
    """A block by its number and time: the newest one the node knows, or the newest that can no longer be replaced."""

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
    block_hash: Hash32

    def fee_paid(self, payer: Address, token: Address) -> Units:
        """Base units of ``token`` that ``payer`` paid as this transaction's fee; zero when somebody else did.

        Read from the transfer and not from the node's ``feePayer`` member, which not every node fills in truthfully.
        """
        fees = (event for event in tip20.decode_transfers(token, self.logs) if event.to == FEE_MANAGER)
        paid = sum(event.amount for event in fees if event.sender == payer and event.memo is None)
        return Units(min(paid, MAX_UINT96))


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
    """Its validity ended before the last *final* block: it is not on the chain and never will be."""


TxOutcome: TypeAlias = Receipt | Fate
Topic: TypeAlias = Hash32 | Sequence[Hash32] | None
"""One value, any of several, or anything at all."""


def fee_of(gas: int, price: int) -> Units:
    """Base units for ``gas`` at ``price`` attodollars per gas, rounded up as the chain does, at most 2**96 - 1.

    Source: Tempo fee specification, fee units: ceil(price * gas / 10**12).
    """
    return Units(min(-(-gas * price // ATTO_PER_UNIT), MAX_UINT96))


class Chain(Protocol):
    """One Tempo chain. Every method may raise ``CHAIN_UNAVAILABLE``: nothing happened, try again later."""

    async def chain_id(self) -> int:
        """The id the node reports; compare it with the configured one before trusting the rest."""
        ...

    async def head(self) -> Head:
        """The newest block."""
        ...

    async def finalised(self) -> Head:
        """The newest block that can no longer be replaced."""
        ...

    async def channel_state(
        self, escrow: Escrow, channel_id: ChannelId, *, at_block: int | None = None
    ) -> ChainSnapshot:
        """What the escrow says of a channel; unknown and closed channels both read as a zero deposit.

        With ``at_block`` the read is pinned there and repeated until the node has that block: behind a load balancer
        the replica that answers may lag the one that gave the receipt, and "latest" there shows no channel.
        """
        ...

    async def channel_states(
        self, escrow: Escrow, ids: Sequence[ChannelId], *, at_block: int | None = None
    ) -> Sequence[ChainSnapshot]:
        """:meth:`channel_state` of many channels, all at one block and in the order of ``ids``, in few round trips."""
        ...

    async def fee_units(self, gas: int) -> Units:
        """What a transaction that uses ``gas`` costs now, in base units of any fee token; rounded up.

        (base fee + usual priority fee) * gas / 10**12, see :func:`fee_of`.
        """
        ...

    async def balance_of(self, token: Address, owner: Address) -> Units:
        """Token base units of ``owner``, at most 2**96 - 1."""
        ...

    async def gas_of(self, tx: TempoTx, sender: Address) -> int:
        """The gas ``tx`` would use if it were mined now; its own gas limit and fees are not looked at.

        Raises:
            ChannelFault: ``CHAIN_REJECTED`` when it would revert.
        """
        ...

    async def rehearse(self, tx: TempoTx, sender: Address, *, fee_payer: Address) -> None:
        """Run a sponsored transaction as it will be sent, with its gas limit, fee token and fee payer, unsent.

        Raises:
            ChannelFault: ``CHAIN_REJECTED`` when it would revert or could not be paid for.
        """
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

    async def send(self, raw: bytes) -> None:
        """Hand a complete transaction to the chain and do not wait for a block; again with the same bytes is harmless.

        Returns when a node has taken it, or has it already. That is no promise that it will be mined.

        Raises:
            ChannelFault: ``CHAIN_REJECTED`` when the node refused it and does not hold it, ``CHAIN_UNAVAILABLE`` when
                it surely never left, ``CHAIN_OUTCOME_UNKNOWN`` when it may have; then ask :meth:`outcome` later.
        """
        ...

    async def broadcast(self, raw: bytes) -> Receipt:
        """:meth:`send`, then wait for the receipt.

        Raises:
            ChannelFault: as :meth:`send`, and ``CHAIN_OUTCOME_UNKNOWN`` when it was taken and no receipt came in time.
        """
        ...

    async def receipt(self, tx_hash: Hash32) -> Receipt | None:
        """The receipt of a mined transaction, or ``None``; ``None`` alone proves nothing."""
        ...

    async def outcome(self, tx_hash: Hash32, *, valid_before: UnixSeconds) -> TxOutcome:
        """What became of a transaction that may have been sent; ``valid_before`` is its own.

        A receipt may still be of a block that is replaced: compare its ``block`` with :meth:`finalised`. ``EXPIRED``
        is for ever.
        """
        ...

    async def logs(
        self, address: Address, *, topics: Sequence[Topic], from_block: int, to_block: int
    ) -> tuple[Log, ...]:
        """Logs of one contract in a block range, inclusive, whose first topics are as wanted."""
        ...
