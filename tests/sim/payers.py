"""Payers by character. Each is one coroutine that talks to the node's processes and, behind their backs, to the chain."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from channels import escrow as v2
from channels.descriptor import CLOSE_GRACE_S, ChainSnapshot, Descriptor
from channels.faults import ChannelFault
from channels.ids import ZERO_ADDRESS, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.keccak import keccak256
from channels.model import AcceptVoucher, Open, Phase, Voucher
from channels.signature import address_of
from channels.tempo_tx import EXPIRING_NONCE_KEY, Call, TempoTx
from channels.units import Units
from channels.voucher import VoucherDomain, derive_channel_id
from tests.sim.ledger import Killed

DEPOSIT = Units(3_000_000)
_GAS = 400_000


class Payer:
    """A key, a channel, and what this payer does with them."""

    def __init__(self, world: Any, number: int, character: str) -> None:
        self.world = world
        self.dice: random.Random = world.dice
        self.character = character
        self.key = keccak256(b"payer" + number.to_bytes(4) + world.seed.to_bytes(8))
        self.address = address_of(self.key)
        self.domain = VoucherDomain(world.escrow)
        self.accepted = 0
        world.dev.fund(self.address, Units(100_000_000))
        self.descriptor, self.channel = self._open()

    # ---------------------------------------------------------------------------------------------------- on the chain

    def _sign(self, data: bytes) -> Any:
        now = self.world.clock.now()
        return TempoTx(
            chain_id=self.world.dev.chain_id,
            max_priority_fee_per_gas=1_000_000_000,
            max_fee_per_gas=1_000_000_000_000,
            gas=_GAS,
            calls=(Call(self.world.escrow.address, data),),
            nonce_key=EXPIRING_NONCE_KEY,
            nonce=0,
            valid_before=UnixSeconds(now + 25),
            valid_after=UnixSeconds(1 + self.dice.randrange(2**30)),
            fee_token=self.world.token,
        ).sign(self.key)

    def _open(self) -> tuple[Descriptor, ChannelId]:
        world = self.world
        salt = Hash32(self.dice.randbytes(32))
        call = v2.OpenCall(world.payee, ZERO_ADDRESS, world.token, DEPOSIT, salt, ZERO_ADDRESS)
        signed = self._sign(v2.encode_open(call))
        assert world.dev.send_raw(signed.raw) is None
        descriptor = Descriptor(
            self.address, world.payee, ZERO_ADDRESS, world.token, salt, ZERO_ADDRESS, signed.expiring_nonce_hash
        )
        return descriptor, derive_channel_id(world.escrow, descriptor)

    def send(self, data: bytes, *, times: int = 1) -> None:
        """Send a transaction of the payer's own; it may well be refused."""
        raw = self._sign(data).raw
        for _ in range(times):
            self.world.dev.send_raw(raw)

    @property
    def slot(self) -> Any:
        """The channel on chain, at the head."""
        return self.world.dev.model.reserve.slots[self.channel]

    async def leave(self, *, late_s: float, times: int = 1) -> None:
        """Ask to close, say nothing, and withdraw when the grace period is over; again if a fork forgets it."""
        while self.slot.deposit:
            if not self.slot.requested_at:
                self.send(v2.encode_request_close(self.descriptor), times=times)
            ready = self.slot.requested_at + CLOSE_GRACE_S if self.slot.requested_at else 0
            if ready and self.world.dev._block_time() >= ready + late_s:
                self.send(v2.encode_withdraw(self.descriptor), times=times)
            await self.world.until(lambda: not self.slot.deposit, at_most_s=self._left(ready, late_s))

    def _left(self, ready: int, late_s: float) -> float:
        left = ready + late_s - self.world.dev._block_time() if ready else 0.0
        return left if left > 0 else 7.0

    # -------------------------------------------------------------------------------------------------- with the node

    def voucher(self, amount: int) -> Voucher:
        """A signed permission."""
        return Voucher(Units(amount), self.domain.sign(self.channel, amount, self.key))

    async def ask(self, what: Callable[[Any], Awaitable[object]], *, tries: int = 3) -> bool:
        """Ask any process that is alive; whether one did it."""
        for _ in range(tries):
            process = self.world.anybody()
            if process is not None:
                try:
                    await what(process)
                except ChannelFault:
                    pass
                except Killed:
                    pass
                else:
                    return True
            await asyncio.sleep(self.dice.random() * 4)
        return False

    async def join(self) -> None:
        """Tell the books of the channel."""
        snapshot = ChainSnapshot(DEPOSIT, Units(0), None, self.world.dev.final)
        first = Open(self.channel, self.world.escrow, self.descriptor, snapshot, self.voucher(0))
        await self.world.anybody().books.apply(self.channel, first)

    async def use(self, units: int, *, pace_s: float = 1.0) -> None:
        """Sign for a stream, in a few rungs, and let it run to its end."""
        step = max(units // 3, 1)
        for target in range(self.accepted + step, self.accepted + units + step, step):
            voucher = self.voucher(target)

            async def sign(process: Any, voucher: Voucher = voucher) -> None:
                await process.books.apply(self.channel, AcceptVoucher(voucher))

            if await self.ask(sign):
                self.accepted = target
        process = self.world.anybody()
        if process is None or not self.accepted:
            return
        # Our own count is up to a quarter too high; the report at the end puts it right.
        counted = units
        used = counted - self.dice.randrange(counted // 4 + 1)
        running = process.stream(self.channel, used=used, counted=counted, pace_s=pace_s)
        await asyncio.wait({running})
        self.world.consumed_at[self.channel] = self.world.now

    # ----------------------------------------------------------------------------------------------------- characters

    async def live(self) -> None:
        """Act in character until nothing is left to do."""
        await asyncio.sleep(self.dice.random() * 20)
        for _ in range(self.dice.randint(1, 3)):
            await self.use(self.dice.choice((2_000, 30_000, 150_000, 400_000)), pace_s=self.dice.choice((0.3, 2.0, 8.0)))
            await asyncio.sleep(self.dice.random() * 20)
        await getattr(self, f"_{self.character}")()

    async def _close(self, challenge: str) -> None:
        async def close(process: Any) -> None:
            await process.close_for_payer(self.channel, challenge, self.voucher)

        await self.ask(close, tries=1)

    async def _honest(self) -> None:
        """Closes; when no answer comes, uses the channel a little more if it may, and closes again."""
        for attempt in range(3):
            await self._close(f"the end {attempt}")
            if self.phase is Phase.CLOSED:
                return
            await self.use(20_000, pace_s=0.3)
        await self.world.until(lambda: not self.slot.deposit, at_most_s=200)

    async def _silent(self) -> None:
        await self.leave(late_s=self.dice.random() * 60)

    async def _sniper(self) -> None:
        """Leaves in the middle of a stream and withdraws in the first possible second."""
        stream = self.world.spawn(self.use(200_000, pace_s=3.0))
        await asyncio.sleep(self.dice.random() * 6)
        await self.leave(late_s=0)
        await asyncio.wait({stream})

    async def _flapper(self) -> None:
        self.world.oracle.flappers.add(self.channel)
        for _ in range(self.world.flaps):
            if not self.slot.deposit:
                return
            self.send(v2.encode_request_close(self.descriptor))
            await asyncio.sleep(self.dice.choice((0.5, 4.0, 15.0)))
            self.send(v2.encode_top_up(v2.TopUpCall(self.descriptor, Units(1))))
            self.world.oracle.tally.flaps += 1
            await asyncio.sleep(self.dice.choice((0.5, 4.0)))

    async def _double(self) -> None:
        """Does everything twice, and the close through two processes at once."""
        await asyncio.gather(self._close("twice"), self._close("twice"), self.leave(late_s=0, times=2))

    async def _frozen(self) -> None:
        """Is blocked by the token's policy for a while, and leaves."""
        self.world.dev.freeze(self.address)
        self.world.disturb(+1)
        leaving = self.world.spawn(self.leave(late_s=5))
        await asyncio.sleep(self.dice.random() * 1200)
        self.world.dev.thaw(self.address)
        self.world.disturb(-1)
        await asyncio.wait({leaving})

    async def _ghost(self) -> None:
        """Tops up and spends the new money at once; a fork may take the top-up back, and nobody repeats it."""
        for _ in range(4):
            self.send(v2.encode_top_up(v2.TopUpCall(self.descriptor, Units(1_000_000))))
            deposit = self.slot.deposit

            async def sign(process: Any, deposit: int = deposit) -> None:
                await process.books.apply(self.channel, AcceptVoucher(self.voucher(deposit)))

            forked_after = self.dice.randrange(6)
            for attempt in range(4):
                if await self.ask(sign, tries=1):
                    self.accepted = max(self.accepted, deposit)
                await asyncio.sleep(3)
                if attempt == forked_after:
                    self.world.fork_away()
        await self._honest()

    async def _idle(self) -> None:
        """Never comes back."""
        self.world.idlers.add(self.channel)

    @property
    def phase(self) -> Phase:
        """What the books say."""
        return self.world.ledger._accounts[self.channel].phase
