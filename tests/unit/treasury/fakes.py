"""A chain that says what it is told to say, and a desk with books and a ledger beside it, on a manual clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from channels import escrow as v2
from channels.chain import Fate, Head, Receipt
from channels.descriptor import ChainSnapshot, Descriptor
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.model import Account, Finish, HoldId, ObserveChain, Open
from channels.policy import Policy
from channels.signature import address_of
from channels.tempo_tx import EXPIRING_NONCE_KEY, TempoTx, decode
from channels.units import Units
from mppnode.kernel.clock import ManualClock
from mppnode.ledger.books import Books
from tests.sim.ledger import MemoryLedger
from tests.support.builders import NOW, V2, chain, opening, pico, reserve, voucher

KEY = b"\x22" * 32
PAYEE = address_of(KEY)
FEE = Units(1_000)


def channel_id(number: int) -> ChannelId:
    return ChannelId(bytes([number]) * 32)


def terms(payer: int) -> Descriptor:
    nonce = Hash32(bytes([payer]) * 32)
    address = Address(bytes([payer]) * 20)
    return Descriptor(address, PAYEE, ZERO_ADDRESS, Address(b"\x20" * 20), nonce, address, nonce)


class FakeChain:
    """Answers from attributes; counts and keeps what it was asked."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.block = 100
        self.final = 100
        self.states: dict[ChannelId, ChainSnapshot] = {}
        self.receipts: dict[Hash32, Receipt] = {}
        self.events: list[Any] = []
        self.asked: list[tuple[Any, ...]] = []
        self.sent: list[bytes] = []
        self.trials = 0
        self.refusing = False
        self.fate = Fate.PENDING
        self.on_send = self.mine

    async def head(self) -> Head:
        return Head(self.block, self.clock.now())

    async def finalised(self) -> Head:
        return Head(self.final, self.clock.now())

    async def fee_units(self, gas: int) -> Units:
        return FEE

    async def channel_state(self, escrow, channel, *, at_block=None) -> ChainSnapshot:
        self.asked.append(("state", channel, at_block))
        return replace(self.states[channel], block=self.block if at_block is None else at_block)

    async def channel_states(self, escrow, ids, *, at_block=None) -> list[ChainSnapshot]:
        return [await self.channel_state(escrow, channel, at_block=at_block) for channel in ids]

    async def prepare(self, sender, calls, *, fee_token, entropy, sponsored=False) -> TempoTx:
        self.trials += 1
        if self.refusing:
            raise ChannelFault(Reason.CHAIN_REJECTED, detail="would fail")
        return TempoTx(
            chain_id=V2.chain_id,
            max_priority_fee_per_gas=100,
            max_fee_per_gas=1_000,
            gas=1,
            calls=tuple(calls),
            nonce_key=EXPIRING_NONCE_KEY,
            nonce=0,
            valid_before=UnixSeconds(self.clock.now() + 25),
            valid_after=UnixSeconds(1 + int.from_bytes(entropy) % 1000),
            fee_token=fee_token,
        )

    async def send(self, raw: bytes) -> None:
        self.sent.append(raw)
        self.on_send(raw)

    def nowhere(self, raw: bytes) -> None:
        """Take the bytes and lose them."""

    def mine(self, raw: bytes, *, effect: bool = True, succeeded: bool = True) -> None:
        signed = decode(raw)
        data = signed.tx.calls[0].data
        event = effect_of(data) if effect and succeeded else None
        logs = () if event is None else (v2.encode_event(V2, event),)
        self.receipts[signed.tx_hash] = Receipt(signed.tx_hash, succeeded, self.block, PAYEE, logs, Hash32(bytes(32)))

    async def receipt(self, tx_hash: Hash32) -> Receipt | None:
        return self.receipts.get(tx_hash)

    async def outcome(self, tx_hash: Hash32, *, valid_before: UnixSeconds) -> Receipt | Fate:
        return self.receipts.get(tx_hash, self.fate)

    async def logs(self, address, *, topics, from_block, to_block) -> tuple[Any, ...]:
        self.asked.append(("logs", from_block, to_block))
        events = [event for block, event in self.events if from_block <= block <= to_block]
        wanted = [v2.encode_event(V2, event) for event in events]
        if len(topics) > 1:
            return tuple(log for log in wanted if log.topics[:2] == (topics[0], topics[1]))
        return tuple(log for log in wanted if log.topics[0] in topics[0])


def effect_of(data: bytes) -> Any:
    """The event an honest escrow gives for settle or close calldata of these tests' only channel."""
    words = [int.from_bytes(data[4 + at : 36 + at]) for at in range(0, 32 * 9, 32)]
    payer = Address(words[0].to_bytes(20))
    number = payer[0]
    if data[:4] == v2.SETTLE:
        return v2.Settled(channel_id(number), payer, PAYEE, Units(words[7]), Units(words[7]), Units(words[7]))
    return v2.ChannelClosed(channel_id(number), payer, PAYEE, Units(words[8]), Units(0))


class Desk:
    """Ledger, books and chain of one test, with words for what payers do."""

    def __init__(self) -> None:
        self.clock = ManualClock(NOW)
        self.ledger = MemoryLedger(self.clock)
        self.books = Books(self.ledger, clock=self.clock, policy=Policy(unsettled_units_max=Units(10**12)))
        self.chain = FakeChain(self.clock)
        self.entropy = Counter[str]()
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def log(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    def said(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.lines if name == event]

    def random(self, size: int) -> bytes:
        self.entropy["n"] += 1
        return self.entropy["n"].to_bytes(size)

    async def sleep(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def channel(self, number: int, *, earned: int = 0, payer: int | None = None, deposit: int = 10**9) -> Account:
        """An open channel with ``earned`` units consumed by a request that has ended; its highest rung is just that."""
        base = opening(earned, deposit, channel=channel_id(number))
        command = Open(base.id, base.escrow, terms(payer or number), base.chain, voucher(earned))
        self.chain.states[base.id] = base.chain
        await self.books.apply(base.id, command)
        if earned:
            await self.books.apply(base.id, reserve(earned, owner="node.1"))
            await self.books.apply(base.id, Finish(HoldId("h"), pico(earned)))
        account = await self.books.load(base.id)
        assert account is not None
        return account

    async def leaving(self, number: int, *, requested_at: int, **more: int) -> Account:
        """A channel whose payer has asked the chain to close it."""
        account = await self.channel(number, **more)
        state = chain(account.chain.deposit, closing=requested_at, block=2)
        self.chain.states[account.id] = state
        return (await self.books.apply(account.id, ObserveChain(state))).account
