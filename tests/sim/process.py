"""One node process without its HTTP server: the real books, life, sweeper and treasury, and streams as coroutines."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import mppnode.chain.rpc
import mppnode.treasury.closer
import mppnode.treasury.settler
import mppnode.treasury.treasurer
import mppnode.treasury.watcher
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.instants import UnixSeconds
from channels.model import BeginClose, Finish, HoldId, Phase, Renew, Reserve, Voucher
from channels.policy import Policy
from channels.units import PICO_PER_UNIT, Pico, Units
from mppnode.chain.agreeing import AgreeingChain
from mppnode.config.secrets import Secret
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.books import Books
from mppnode.ledger.ending import Ending
from mppnode.ledger.life import BEAT_S, Life, Lost, Sweeper
from tests.sim.chain import Wire
from tests.sim.ledger import Killed, Link
from tests.support.virtual_loop import VirtualClock, this_loop

PRODUCT = SimpleNamespace(
    rpc=mppnode.chain.rpc,
    settler=mppnode.treasury.settler,
    closer=mppnode.treasury.closer,
    watcher=mppnode.treasury.watcher,
    treasurer=mppnode.treasury.treasurer,
)
"""The modules under test; a mutant has one of them replaced."""
_MAY_YET_CLOSE = (Reason.CHAIN_OUTCOME_UNKNOWN, Reason.CHAIN_UNAVAILABLE)


@dataclass
class Bill:
    """What one stream really used, as the stream itself knows it. Pico."""

    channel: ChannelId
    hold: HoldId
    asked: int = 0
    """The most that may have been recorded."""
    recorded: int = 0
    """The most that was surely recorded."""
    final: int | None = None


@dataclass
class _Stream:
    bill: Bill
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Process:
    """One life or more of a node, until it is killed."""

    def __init__(self, world: Any, name: str) -> None:
        self.name = name
        self.dead = False
        self.since = this_loop().time()
        self.alarms: list[float] = []
        self._world = world
        self._dice: random.Random = world.dice
        self.clock = VirtualClock(this_loop())
        self._streams: dict[HoldId, _Stream] = {}
        self.link = Link(world.ledger, world.dice, must_live=self.must_live)
        self.link.everybody_leads = world.everybody_leads
        self.owner = TaskOwner(self._failed)
        self._build()

    def must_live(self) -> None:
        if self.dead:
            raise Killed(self.name)

    def _probe(self, point: str) -> None:
        self.must_live()
        if self._world.kills_at(point):
            self.kill()
            raise Killed(self.name)

    def _failed(self, name: str, error: BaseException) -> None:
        if not isinstance(error, Killed):
            self._world.broken.append(f"{self.name}: {name}: {error!r}")

    def _log(self, event: str, **fields: object) -> None:
        if event != "treasury.late":
            self._world.story(f"{self.name}: {event} {fields}")
        if event == "treasury.blind":
            self.alarms.append(this_loop().time())

    def _build(self) -> None:
        world, clock, product = self._world, self.clock, self._world.product
        self.wires = [Wire(node, world.dice, must_live=self.must_live) for node in world.nodes]
        for wire in self.wires:
            wire.hang_s = world.hang_s
        limits = product.rpc.RpcLimits()
        chains = [product.rpc.RpcChain(wire, clock, limits=limits, chain_id=world.dev.chain_id) for wire in self.wires]
        self.chain = chains[0] if len(chains) == 1 else AgreeingChain(chains[0], chains[1], clock)
        ledger: Any = self.link
        self.books = Books(ledger, clock=clock, policy=Policy(unsettled_units_max=world.unsettled_max), probe=self._probe)
        self.life = Life(ledger, self.name, clock=clock, sleep=asyncio.sleep, on_lost=self._lost)
        self.sweeper = Sweeper(ledger, self.books, self.life, ours=self._streams.__contains__)
        self.settler = product.settler.Settler(
            self.chain,
            ledger,
            key=Secret(world.payee_key),
            fee_token=world.token,
            clock=clock,
            entropy=world.dice.randbytes,
            node=lambda: self.life.id,
            probe=self._probe,
            limits=product.settler.SettlerLimits(poll_s=1.0),
        )
        self.ending = Ending(self.books, clock=clock, sleep=asyncio.sleep)
        self.closer = product.closer.Closer(
            ledger=ledger,
            books=self.books,
            settler=self.settler,
            chain=self.chain,
            ending=self.ending,
            quiesce=self.quiesce,
            owner=self.owner,
            clock=clock,
        )
        self.watcher = product.watcher.Watcher(
            self.chain, ledger, self.books, escrows=[world.escrow], clock=clock, log=self._log
        )
        self.treasurer = product.treasurer.Treasurer(
            chain=self.chain,
            ledger=ledger,
            books=self.books,
            watcher=self.watcher,
            settler=self.settler,
            closer=self.closer,
            node=lambda: self.life.id,
            owner=self.owner,
            clock=clock,
            log=self._log,
            policy=world.policy,
        )

    # ------------------------------------------------------------------------------------------------- life and death

    async def start(self) -> None:
        """As ``app.py`` does it."""
        await self.life.begin()
        await self.sweeper.sweep()
        await self.closer.resume()
        self._daemon(self._beat(), "beat")
        self._daemon(self.sweeper.keep(asyncio.sleep, lambda _fault: None), "sweep")
        self._daemon(self.treasurer.keep(), "treasury")

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self.life.beat()

    def _daemon(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self.owner.spawn(work, name=name)

    def kill(self) -> None:
        """No more effect of any kind, from this moment on."""
        self.dead = True
        self._world.died(self)
        for task in list(self.owner._tasks):
            if task is not asyncio.current_task():
                task.cancel()

    def _lost(self, lost: Lost) -> None:
        self._world.story(f"{self.name}: lost {lost}")
        for stream in self._streams.values():
            stream.stop.set()

    # -------------------------------------------------------------------------------------------------------- streams

    async def quiesce(self, channel: ChannelId, *, but: HoldId | None = None) -> None:
        """End this process's streams of a channel and wait for their bills."""
        mine = [s for hold, s in self._streams.items() if s.bill.channel == channel and hold != but]
        for stream in mine:
            stream.stop.set()
        for stream in mine:
            await stream.done.wait()

    def stream(self, channel: ChannelId, *, used: int, counted: int, pace_s: float) -> asyncio.Task[None]:
        """Serve one stream that really uses ``used`` units and that we count as ``counted`` on the way."""
        return self.owner.start(self._stream(channel, used, counted, pace_s), name="stream")

    async def _stream(self, channel: ChannelId, used: int, counted: int, pace_s: float) -> None:
        hold = HoldId(self._dice.randbytes(8).hex())
        mine = _Stream(Bill(channel, hold))
        window = max(counted // 4, 1) * PICO_PER_UNIT
        self._streams[hold] = mine  # before it is asked for, or a sweep could take it for nobody's
        try:
            if not await self._reserved(channel, hold, Pico(window)):
                return
            self._world.bills[hold] = mine.bill
            await self._serve(mine, window, counted * PICO_PER_UNIT, pace_s)
            await self._bill(mine, min(used * PICO_PER_UNIT, mine.bill.asked))
        finally:
            self._streams.pop(hold, None)
            mine.done.set()

    async def _reserved(self, channel: ChannelId, hold: HoldId, window: Pico) -> bool:
        expires = UnixSeconds(self.clock.now() + 300)
        for preempt in (False, True):
            reserve = Reserve(hold, hold, expires, Pico(1), window, preempt, self.life.id)
            try:
                await self.books.apply(channel, reserve)
            except ChannelFault as fault:
                if fault.reason is not Reason.CHANNEL_BUSY or preempt:
                    return False
            else:
                return True
            try:
                await self.quiesce(channel, but=hold)
                await self.ending.streams(channel)
            except ChannelFault:
                return False
        return False

    async def _serve(self, mine: _Stream, window: int, counted: int, pace_s: float) -> None:
        bill, granted = mine.bill, window
        while not mine.stop.is_set() and bill.asked < counted:
            await self._pause(mine.stop, pace_s)
            bill.asked = min(bill.asked + window // 2, granted, counted)
            try:
                plan = await self.books.apply(bill.channel, Renew(bill.hold, Pico(bill.asked), Pico(bill.asked + window)))
            except ChannelFault as fault:
                if fault.reason is not Reason.STORE_UNAVAILABLE:
                    return  # fenced, or the channel is gone: what was recorded stands
                continue
            bill.recorded = bill.asked
            hold = plan.account.holds[bill.hold]
            if hold.ending or hold.granted == bill.asked:
                return
            granted = hold.granted

    @staticmethod
    async def _pause(stop: asyncio.Event, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await stop.wait()
        except TimeoutError:
            return

    async def _bill(self, mine: _Stream, total: int) -> None:
        # From here on either may be in the books: what was recorded, or the exact total.
        mine.bill.recorded = min(mine.bill.recorded, total)
        for _ in range(3):
            try:
                plan = await self.books.apply(mine.bill.channel, Finish(mine.bill.hold, Pico(total)))
            except ChannelFault as fault:
                if fault.reason is not Reason.STORE_UNAVAILABLE:
                    return
                await asyncio.sleep(0.5)
            else:
                mine.bill.final = total - plan.result.unpaid
                return

    # --------------------------------------------------------------------------------------------------------- closes

    async def close_for_payer(self, channel: ChannelId, challenge: str, voucher: Callable[[int], Voucher]) -> None:
        """A close credential, handled as the session rail does it. Raises ``ChannelFault``."""
        async with self.closer.closing(channel):
            account = await self.books.load(channel)
            if account is None or account.phase is Phase.CLOSED:
                return
            first = account.phase in (Phase.OPEN, Phase.CONTESTED)
            await self.quiesce(channel)
            if first:
                account = await self.ending.everything(channel)
            amount = Units(max(account.spent, account.chain.settled))
            await self.books.apply(channel, BeginClose(challenge, voucher(amount)))
            try:
                await self.closer.finish(channel, first=first)
            except ChannelFault as fault:
                if fault.reason in _MAY_YET_CLOSE:
                    self.closer.later(channel)
                raise
