"""One seed, one world: chain, ledger, processes, payers and bad weather, all in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

from channels.descriptor import CLOSE_GRACE_S, RESERVE_ADDRESS, Escrow, SessionProtocol
from channels.ids import ChannelId
from channels.model import HoldId, Phase
from channels.signature import address_of
from channels.units import Units
from mppnode.chain import wire
from mppnode.chain.devchain import PATH_USD, LocalTransport
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.ledger.base import Ledger
from mppnode.treasury.treasurer import TreasuryPolicy
from tests.sim.chain import CHAIN_ID, Fork, SimChain, remembering
from tests.sim.ledger import Killed, MemoryLedger
from tests.sim.oracle import Oracle, Tally, Violation
from tests.sim.payers import Payer
from tests.sim.process import PRODUCT, Bill, Process
from tests.support import hostile_rpc
from tests.support.hostile_rpc import HostileRpc
from tests.support.virtual_loop import VirtualClock, run, this_loop

CHARACTERS = ("honest", "silent", "sniper", "flapper", "double", "frozen", "ghost", "idle")
_MONTH_S = 31 * 24 * 3600
_QUIET_S = 600.0
_ENDLESS_S = 6000.0
_PAYEE_KEY = b"\x22" * 32


class World:
    """Everything one seed decides."""

    def __init__(self, seed: int, product: SimpleNamespace, *, tell: bool) -> None:
        self.seed = seed
        self.product = product
        self.dice = dice = random.Random(seed)
        self.lines: list[str] = []
        self._tell = tell
        self.clock = VirtualClock(this_loop())
        self.dev = SimChain(self.clock)
        self.token = PATH_USD
        self.escrow = Escrow(SessionProtocol.V2, CHAIN_ID, RESERVE_ADDRESS)
        self.payee_key = _PAYEE_KEY
        self.payee = address_of(_PAYEE_KEY)
        self.dev.fund(self.payee, Units(1_000_000_000))
        self.nodes = [HostileRpc(self.dev, self.clock) for _ in range(1 + (dice.random() < 0.3))]
        self.ledger = MemoryLedger(self.clock)
        self.stirred = asyncio.Event()
        self.bills: dict[HoldId, Bill] = {}
        self.consumed_at: dict[ChannelId, float] = {}
        self.idlers: set[ChannelId] = set()
        self.broken: list[str] = []
        self.unsettled_max = Units(10_000_000)
        self.flaps = 100 if dice.random() < 0.05 else 5
        self.hang_s = dice.choice((0.0, 0.0, 10.0))
        self.names = ("one", "two")[: 1 + (dice.random() < 0.5)]
        self.everybody_leads = len(self.names) > 1 and dice.random() < 0.5
        self.policy = TreasuryPolicy(
            settle_age_s=dice.choice((60, 600, 6 * 3600)),
            exposure_max=Units(dice.choice((50_000, 5_000_000))),
            glance_s=dice.choice((2.0, 5.0)),
        )
        self.processes: dict[str, Process] = {}
        self._kill_odds = dice.choice((0.0, 0.0, 0.02, 0.1))
        self._bad = 0
        self._calm: list[tuple[float, float]] = []
        self._calm_since = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.oracle = Oracle(self)
        self.dev.on_included = self._included

    # -------------------------------------------------------------------------------------------------------- reading

    @property
    def now(self) -> float:
        return this_loop().time()

    @property
    def fee(self) -> int:
        """What a settlement is taken to cost, in units."""
        return -(-self.policy.settle_gas * self.dev._price // 10**12)

    @property
    def plain_ledger(self) -> Ledger:
        """The ledger without a link that fails."""
        ledger: Any = self.ledger
        return ledger

    def plain_chain(self) -> RpcChain:
        """The chain over a wire that never fails."""
        return RpcChain(LocalTransport(self.dev), self.clock, limits=RpcLimits())

    @staticmethod
    def logs_of(receipt: dict[str, Any]) -> list[Any]:
        return [wire.read_log(entry) for entry in receipt["logs"]]

    def story(self, line: str) -> None:
        if self._tell:
            self.lines.append(f"{self.now:8.1f} {line}")

    def anybody(self) -> Process | None:
        alive = [process for process in self.processes.values() if not process.dead]
        return self.dice.choice(alive) if alive else None

    async def until(self, done: Callable[[], bool], *, at_most_s: float) -> None:
        """Wait for something on the chain."""
        deadline = self.now + at_most_s
        while not done() and self.now < deadline:
            self.stirred.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self.stirred.wait()
            except TimeoutError:
                return

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = this_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.broken.append(f"a coroutine of the simulation failed: {task.exception()!r}")

    def _included(self, signed: Any, receipt: dict[str, Any]) -> None:
        try:
            self.oracle.hear(signed, receipt)
        except Exception as error:  # noqa: BLE001 - the chain would answer "invalid params" and nobody would ever know
            self.broken.append(f"the oracle failed: {error!r}")

    # ------------------------------------------------------------------------------------------------------- weather

    def disturb(self, change: int = 0) -> None:
        """Something bad begins (+1), ends (-1), or happens in one moment (0)."""
        if self._bad == 0 and self.now > self._calm_since:
            self._calm.append((self._calm_since, self.now))
        self._bad += change
        self._calm_since = self.now

    def calm(self) -> list[tuple[float, float]]:
        """The undisturbed stretches so far."""
        return [*self._calm, (self._calm_since, self.now)] if self._bad == 0 else self._calm

    def kills_at(self, point: str) -> bool:
        """Whether the process that has come to this point ends here."""
        chances = ("plan.", "signed.", "sent.", "broadcast.", "mined.", "final.", "BeginClose.", "FixCapture.", "Finish.")
        return point.startswith(chances) and self.dice.random() < self._kill_odds

    def died(self, process: Process) -> None:
        """A process is gone; it comes back after a while."""
        self.story(f"{process.name}: killed")
        self.oracle.tally.kills += 1
        self.disturb(+1)
        self.spawn(self._revive(process.name))

    async def _revive(self, name: str) -> None:
        await asyncio.sleep(self.dice.choice((0.5, 5.0, 60.0)))
        await self._start(name)
        self.disturb(-1)

    async def _start(self, name: str) -> None:
        self.story(f"{name}: starts")
        process = self.processes[name] = Process(self, name)
        try:
            await process.start()
        except Killed:
            return  # the next life is planned already

    async def _weather(self) -> None:
        """Bad things, one after the other, for as long as a grace period and a bit."""
        dice = self.dice
        kinds = [self._outage, self._limit, self._lag, self._lose, self._reorg, self._halt, self._spike, self._crash]
        kinds += [self._long_night, self._fork, self._lie, self._skew, self._ledger_away, self._outage]
        await asyncio.sleep(dice.random() * 60)
        end = self.now + dice.choice((30, 100, 300, 1000))
        while self.now < end:
            if len(self.names) > 1:
                self._everybody_leads(dice.random() < 0.5)
            await dice.choice(kinds)()
            await asyncio.sleep(dice.choice((0.5, 10, 31, 60)))
        self._everybody_leads(False)

    def _everybody_leads(self, both: bool) -> None:
        """Whether two treasurers work at once: a lead avoids double work and proves nothing."""
        self.everybody_leads = both
        for process in self.processes.values():
            process.link.everybody_leads = both

    async def _while_bad(self, seconds: float) -> None:
        self.disturb(+1)
        await asyncio.sleep(seconds / 2)
        if len(self.names) > 1 and self.dice.random() < 0.5:
            self._everybody_leads(not self.everybody_leads)
        await asyncio.sleep(seconds / 2)
        self.disturb(-1)

    async def _outage(self) -> None:
        seconds = self.dice.choice((3, 40, 100, 850))
        await self._dead(seconds)

    async def _long_night(self) -> None:
        """The RPC comes back just in time to save what the first of the leaving payers owes."""
        pending = [at for channel, at in self.oracle.requested.items() if self.dev.model.reserve.slots[channel].deposit]
        left = min(pending, default=0.0) + CLOSE_GRACE_S - self.dice.choice((32, 40, 60)) - self.now
        if left > 0:
            await self._dead(left)

    async def _dead(self, seconds: float) -> None:
        self.story(f"weather: RPC dead for {seconds}")
        for node in self.nodes:
            node.dead_for(seconds)
        alone = dict(self.processes)
        await self._while_bad(seconds)
        if seconds > self.policy.alarm_s + 30:
            self._alarmed(alone)

    def _alarmed(self, processes: dict[str, Process]) -> None:
        for process in processes.values():
            if len(processes) == 1 and not process.dead:
                # One alarm per blindness, which may have begun in an outage just before this one.
                if not any(process.watcher.checked_at < at for at in process.alarms):
                    self.oracle.violations.append(f"at {self.now:.1f}: nobody was told that the treasury was blind")
                self.oracle.tally.alarms += 1

    def _no_false_alarm(self) -> None:
        for process in self.processes.values():
            for at in process.alarms:
                if any(start + self.policy.alarm_s + 30 < at <= end for start, end in self.calm()):
                    self.oracle.violations.append(f"{process.name} raised a false alarm at {at:.1f}")

    async def _limit(self) -> None:
        for node in self.nodes:
            node.limited = True
        await self._while_bad(self.dice.choice((2, 20, 100)))
        for node in self.nodes:
            node.limited = False

    async def _lag(self) -> None:
        for node in self.nodes:
            node.lag = self.dice.randint(0, 8)
        await self._while_bad(self.dice.choice((5, 60)))
        for node in self.nodes:
            node.lag = 0

    async def _lose(self) -> None:
        """Answers are lost after the request had its effect."""
        for node in self.nodes:
            node.lost["eth_sendRawTransaction"] += self.dice.randint(1, 4)
        await self._while_bad(30)
        for node in self.nodes:
            node.lost.clear()

    async def _reorg(self) -> None:
        self.fork_away()

    def fork_away(self) -> None:
        """Replace some of the blocks that are not final; half of their transactions come back by themselves."""
        depth = self.dice.randint(0, self.dev.head - self.dev.final)
        lost = self.dev.reorg(depth) if depth else ()
        self.story(f"weather: reorg of {depth}, {len(lost)} transactions lost")
        self.disturb()
        for raw in lost:
            if self.dice.random() < 0.5:
                self.dev.send_raw(raw)

    async def _halt(self) -> None:
        self.dev.halt()
        await self._while_bad(self.dice.choice((5, 40, 200)))
        self.dev.resume()

    async def _spike(self) -> None:
        """The base fee rises at once, so what was just signed offers too little."""
        self.dev.base_fee *= 3
        self.disturb()
        await asyncio.sleep(self.dice.choice((5, 60)))
        self.dev.base_fee //= 3
        self.disturb()

    async def _crash(self) -> None:
        process = self.anybody()
        if process is not None:
            process.kill()

    async def _fork(self) -> None:
        """The first node follows a branch that will not last."""
        fork, node = Fork(self.dev), self.nodes[0]
        fork.on(node)
        await self._while_bad(self.dice.choice((20, 130)))
        fork.off(node)

    async def _lie(self) -> None:
        """One of two nodes lies about channels. With a single node nobody could tell."""
        if len(self.nodes) > 1:
            lie = self.dice.choice((hostile_rpc.hide_close_requests(), hostile_rpc.invent_deposit(10**9)))
            self.nodes[0].lies["eth_call"] = lie
            await self._while_bad(self.dice.choice((20, 100)))
            del self.nodes[0].lies["eth_call"]

    async def _skew(self) -> None:
        """A process believes in another time of day."""
        process = self.anybody()
        if process is not None:
            process.clock.skew_s = self.dice.choice((-3600, -40, 40, 3600))
            await self._while_bad(self.dice.choice((20, 100)))
            process.clock.skew_s = 0

    async def _ledger_away(self) -> None:
        process = self.anybody()
        if process is not None:
            process.link.away = True
            await self._while_bad(self.dice.choice((1, 20)))
            process.link.away = False

    # ----------------------------------------------------------------------------------------------------------- life

    async def live(self) -> Tally:
        """From the first channel to the last proof. Raises :class:`Violation`."""
        characters = self.dice.sample(CHARACTERS, self.dice.randint(2, 4))
        payers = [Payer(self, number, character) for number, character in enumerate(characters)]
        for name in self.names:
            await self._start(name)
        for payer in payers:
            await payer.join()
        self.dev.finality_lag = self.dice.choice((0, 1, 3, 8))
        self.story(f"seed {self.seed}: {characters} {self.names} nodes={len(self.nodes)} lag={self.dev.finality_lag}")
        weather = self.spawn(self._weather())
        everybody = {self.spawn(payer.live()): payer.character for payer in payers}
        _, endless = await asyncio.wait({weather, *everybody}, timeout=_ENDLESS_S)
        self.broken += [f"{everybody.get(task, 'the weather')} never ends" for task in endless]
        self._kill_odds = 0.0
        await self._settle_down()
        if self.idlers:
            await self._sleep_a_month()
        await self.oracle.end()
        self._no_false_alarm()
        return self._verdict()

    async def _settle_down(self) -> None:
        deadline = self.now + _QUIET_S
        while self._unquiet() and self.now < deadline:
            await asyncio.sleep(5)
            self.oracle.look()

    def _unquiet(self) -> bool:
        moving = any(intent.active for intent in self.ledger.desk.values())
        ending = any(
            a.phase in (Phase.CLOSING, Phase.CAPTURED, Phase.SUSPECT) or a.holds or self._stale(a)
            for a in self.ledger._accounts.values()
        )
        return moving or ending or any(process.dead for process in self.processes.values())

    def _stale(self, account: Any) -> bool:
        """The chain has moved on and the books have not heard of it."""
        slot = self.dev.model.reserve.slots[account.id]
        return account.phase is not Phase.CLOSED and (slot.deposit, slot.settled) != (account.chain.deposit, account.chain.settled)

    async def _sleep_a_month(self) -> None:
        """The whole machine sleeps; when it wakes, channels nobody has used since are closed."""
        await asyncio.sleep(1)
        self.disturb(+1)
        this_loop().jump(_MONTH_S)
        self.disturb(-1)
        await asyncio.sleep(120)
        await self._settle_down()
        for account in self.ledger._accounts.values():
            if account.active_at and account.phase is Phase.OPEN:
                self.oracle.violations.append(f"{account.id.hex()[:8]} is open after a month without use")

    def _verdict(self) -> Tally:
        violations = [*self.oracle.violations, *self.broken]
        if violations:
            story = "\n".join([*self.lines, *violations])
            raise Violation(f"SIM_SEED={self.seed}: {violations[0]}\n{story}")
        return self.oracle.tally


def play(seed: int, product: SimpleNamespace = PRODUCT, *, tell: bool = False) -> Tally:
    """Run one seed. Raises :class:`Violation`, whose message names the seed."""

    async def main() -> Tally:
        return await World(seed, product, tell=tell).live()

    with remembering():
        return run(main())
