"""Two independent chain nodes asked as one: a node that lies earns nobody anything, a node that is down stops nothing.

What brings money in counts only if both say it: a receipt, the state pinned to its block, a transaction's death. What
may take money away counts if either says it: a close request, a lower deposit, an event. Acting on a false alarm costs
a fee or a channel closed too early; waiting for a second opinion could cost the channel's whole balance.

With one node down the other is believed alone, except for a deposit above ``agree_above``: to cheat then somebody must
corrupt one provider and silence the other at the same moment, for less than that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, NoReturn, TypeVar

from channels.abi import Log
from channels.chain import Chain, Fate, Head, Receipt, Topic, TxOutcome
from channels.descriptor import ChainSnapshot, Escrow
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.tempo_tx import Call, TempoTx
from channels.units import Units
from mppnode.chain.rpc import EXPIRY_MARGIN_S
from mppnode.kernel.clock import Clock

T = TypeVar("T")

AGREE_ABOVE: Final = Units(5_000_000)
"""Deposits above this need both nodes: 5 USD, as much as one channel may owe us anyway."""
APART_S: Final = 60
"""How far the two newest blocks may be apart in time before the older one's node counts as down."""
_DOWN_S: Final = 30.0  # how long a silent node is left alone, so that its timeouts do not slow every request
_LONG_AGO: Final = UnixSeconds(1)


class AgreeingChain:
    """Implements :class:`channels.chain.Chain` over two others. ``on_disagreement`` hears which answer was disputed."""

    def __init__(
        self,
        primary: Chain,
        second: Chain,
        clock: Clock,
        *,
        agree_above: Units = AGREE_ABOVE,
        on_disagreement: Callable[[str], None] = lambda _what: None,
    ) -> None:
        self._nodes = (primary, second)
        self._down_until = [0.0, 0.0]
        self._clock = clock
        self._agree_above = agree_above
        self._on_disagreement = on_disagreement

    # ---------------------------------------------------------------------------------------------------------- reads

    async def chain_id(self) -> int:
        first, *others = await self._answers(lambda node: node.chain_id())
        return first if others in ([], [first]) else self._disagree("chain id")

    async def head(self) -> Head:
        return self._newest(await self._answers(lambda node: node.head()))

    async def finalised(self) -> Head:
        return self._newest(await self._answers(lambda node: node.finalised()))

    def _newest(self, heads: Sequence[Head]) -> Head:
        """The newest block that every node has. A node far behind, or ahead of the time of day, is left out.

        Without the first rule a node that shows an old block for ever would hide every later close request.
        """
        now = self._clock.now()
        possible = [head for head in heads if head.timestamp <= now + APART_S]
        if not possible:
            self._disagree("time")
        latest = max(head.timestamp for head in possible)
        return min((head for head in possible if head.timestamp >= latest - APART_S), key=lambda head: head.number)

    async def channel_state(
        self, escrow: Escrow, channel_id: ChannelId, *, at_block: int | None = None
    ) -> ChainSnapshot:
        """See the protocol. Pinned to a block it is proof of a deposit and both must say the same; else see below."""
        if at_block is None:
            (state,) = await self.channel_states(escrow, [channel_id])
            return state

        def read(node: Chain) -> Awaitable[ChainSnapshot]:
            return node.channel_state(escrow, channel_id, at_block=at_block)

        first, *others = await self._answers(read)
        if not others and first.deposit > self._agree_above:
            first, *others = await self._answers(read, patient=True)
        if not others and first.deposit > self._agree_above:
            raise ChannelFault(
                Reason.CHAIN_UNAVAILABLE, detail="a deposit of this size needs two chain nodes", deposit=first.deposit
            )
        return first if others in ([], [first]) else self._disagree("channel state")

    async def channel_states(
        self, escrow: Escrow, ids: Sequence[ChannelId], *, at_block: int | None = None
    ) -> Sequence[ChainSnapshot]:
        """See the protocol. For each channel the more alarming of the two answers, see :func:`worse`."""
        block = (await self.head()).number if at_block is None else at_block
        first, *others = await self._answers(lambda node: node.channel_states(escrow, ids, at_block=block))
        if not others:
            return first
        if list(first) != list(others[0]):
            self._on_disagreement("channel state")
        return [worse(one, other) for one, other in zip(first, others[0], strict=True)]

    async def fee_units(self, gas: int) -> Units:
        # The lower one: believing a high price would let one node keep us from ever settling.
        return min(await self._answers(lambda node: node.fee_units(gas)))

    async def balance_of(self, token: Address, owner: Address) -> Units:
        return min(await self._answers(lambda node: node.balance_of(token, owner)))

    async def receipt(self, tx_hash: Hash32) -> Receipt | None:
        return self._same_receipt(await self._answers(lambda node: node.receipt(tx_hash)))

    def _same_receipt(self, receipts: Sequence[Receipt | None]) -> Receipt | None:
        first, *others = receipts
        if others in ([], [first]):
            return first
        # One of them may only be slower: not a lie yet, and no receipt either.
        return None if None in receipts else self._disagree("receipt")

    async def outcome(self, tx_hash: Hash32, *, valid_before: UnixSeconds) -> TxOutcome:
        # Not the nodes' own answers: one that shows an old block for ever would leave everything pending for ever.
        final = await self.finalised()
        receipts = await self._answers(lambda node: node.receipt(tx_hash))
        agreed = self._same_receipt(receipts)
        if agreed is not None:
            return agreed
        if final.timestamp < valid_before + EXPIRY_MARGIN_S:
            return Fate.PENDING
        return Fate.EXPIRED if not any(receipts) else self._disagree("outcome")

    async def logs(
        self, address: Address, *, topics: Sequence[Topic], from_block: int, to_block: int
    ) -> tuple[Log, ...]:
        """See the protocol. First what both report, then what only one does: each is a reason to look at a channel."""
        first, *others = await self._answers(
            lambda node: node.logs(address, topics=topics, from_block=from_block, to_block=to_block)
        )
        if not others or first == others[0]:
            return first
        self._on_disagreement("logs")
        second = others[0]
        agreed = [log for log in first if log in second]
        return (*agreed, *(log for log in (*first, *second) if log not in agreed))

    async def rehearse(self, tx: TempoTx, sender: Address, *, fee_payer: Address) -> None:
        """See the protocol. One refusal is enough: it is a stranger's transaction at our expense."""
        await self._trials(lambda node: node.rehearse(tx, sender, fee_payer=fee_payer))

    async def simulate(self, sender: Address, calls: Sequence[Call], *, fee_token: Address | None) -> None:
        """See the protocol. One refusal is enough."""
        await self._trials(lambda node: node.simulate(sender, calls, fee_token=fee_token))

    async def gas_of(self, tx: TempoTx, sender: Address) -> int:
        """See the protocol. One refusal is enough, and the lower figure counts: it bounds what we pay for."""
        return min(await self._trials(lambda node: node.gas_of(tx, sender)))

    async def _trials(self, ask: Callable[[Chain], Awaitable[T]]) -> list[T]:
        """What the nodes that are up find in a dry run, unless one of them refuses."""
        results = await self._ask(ask)
        self._raise_worst([r for r in results if isinstance(r, ChannelFault)], (Reason.CHAIN_REJECTED,))
        return _answered(results)

    # --------------------------------------------------------------------------------------------------- transactions

    async def prepare(
        self,
        sender: Address,
        calls: Sequence[Call],
        *,
        fee_token: Address | None,
        entropy: bytes,
        sponsored: bool = False,
    ) -> TempoTx:
        """See the protocol. Either node is enough: a false refusal must not keep us from closing in time."""
        faults: list[ChannelFault] = []
        for node in self._nodes:
            try:
                return await node.prepare(sender, calls, fee_token=fee_token, entropy=entropy, sponsored=sponsored)
            except ChannelFault as fault:
                faults.append(fault)
        self._raise_worst(faults, (Reason.CHAIN_REJECTED,))
        raise faults[0]

    async def send(self, raw: bytes) -> None:
        """See the protocol. Both nodes get the bytes, so one that swallows them cannot stop a payment."""
        self._require_one(await self._ask(lambda node: node.send(raw)))

    async def broadcast(self, raw: bytes) -> Receipt:
        """See the protocol. A success on one node that the other one never sees is an unknown outcome."""
        results = await self._ask(lambda node: node.broadcast(raw))
        self._require_one(results)
        receipts = [result for result in results if isinstance(result, Receipt)]
        if len(receipts) < len(results):
            return await self._seen_by_all(next(iter(receipts)).tx_hash)
        return self._same_receipt(receipts) or self._disagree("receipt")

    async def _seen_by_all(self, tx_hash: Hash32) -> Receipt:
        """A receipt that one node gave; the other one may be down, or may have refused what it had already."""
        receipt = await self.receipt(tx_hash)
        if receipt is None:
            raise ChannelFault(Reason.CHAIN_OUTCOME_UNKNOWN, detail="only one chain node has this transaction")
        return receipt

    def _require_one(self, results: Sequence[object]) -> None:
        """Raise unless a node took the transaction; what is least sure decides how."""
        faults = [result for result in results if isinstance(result, ChannelFault)]
        if len(faults) == len(results):
            self._raise_worst(faults, (Reason.CHAIN_OUTCOME_UNKNOWN, Reason.CHAIN_REJECTED, Reason.CHAIN_UNAVAILABLE))

    # ------------------------------------------------------------------------------------------------------ both nodes

    async def _answers(self, ask: Callable[[Chain], Awaitable[T]], *, patient: bool = False) -> list[T]:
        """What the nodes that are up say, at least one; the primary first. Raises ``CHAIN_UNAVAILABLE``."""
        return _answered(await self._ask(ask, patient=patient))

    async def _ask(
        self, ask: Callable[[Chain], Awaitable[T]], *, patient: bool = False
    ) -> list[T | ChannelFault]:
        """Ask both at once, leaving out one that was silent a moment ago unless ``patient``."""
        now = self._clock.monotonic()
        up = [side for side, until in enumerate(self._down_until) if patient or until <= now]
        return await asyncio.gather(*(self._one(side, ask) for side in up or range(len(self._nodes))))

    async def _one(self, side: int, ask: Callable[[Chain], Awaitable[T]]) -> T | ChannelFault:
        try:
            return await ask(self._nodes[side])
        except ChannelFault as fault:
            if _unavailable(fault):
                self._down_until[side] = self._clock.monotonic() + _DOWN_S
            return fault

    def _disagree(self, what: str) -> NoReturn:
        self._on_disagreement(what)
        raise ChannelFault(Reason.CHAIN_UNAVAILABLE, detail=f"the chain nodes disagree about the {what}")

    @staticmethod
    def _raise_worst(faults: Sequence[ChannelFault], order: Sequence[Reason]) -> None:
        for reason in order:
            for fault in faults:
                if fault.reason is reason:
                    raise fault


def worse(one: ChainSnapshot, other: ChainSnapshot) -> ChainSnapshot:
    """The more alarming of two reports of one block: less deposited, less paid out to us, an exit under way.

    If only one says that the channel is gone, the other one's numbers stand and an overdue exit is assumed: nothing new
    is sold, and what is owed is captured at once. Believing it would write off a channel that may well be alive.
    """
    if one == other:
        return one
    if (one.deposit == 0) is not (other.deposit == 0):
        alive = one if one.deposit else other
        return replace(alive, close_requested_at=alive.close_requested_at or _LONG_AGO)
    requests = [at for at in (one.close_requested_at, other.close_requested_at) if at is not None]
    return ChainSnapshot(
        deposit=min(one.deposit, other.deposit),
        settled=min(one.settled, other.settled),
        close_requested_at=min(requests, default=None),
        block=min(one.block, other.block),
    )


def _answered(results: Sequence[T | ChannelFault]) -> list[T]:
    """The answers among the results; when there is none, the primary's fault is raised."""
    answers = [result for result in results if not isinstance(result, ChannelFault)]
    if not answers:
        raise next(result for result in results if isinstance(result, ChannelFault))
    return answers


def _unavailable(result: object) -> bool:
    return isinstance(result, ChannelFault) and result.reason is Reason.CHAIN_UNAVAILABLE
