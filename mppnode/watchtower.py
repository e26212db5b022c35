"""The treasury without a server: settles and closes what nodes have earned, and listens to nobody.

It runs beside nodes on a shared PostgreSQL, where whoever holds the lease does the work, or in the place of a node that
is down, on its SQLite file. It needs the ledger, the chain and the key that settles; no provider and no port.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import aiohttp
from prometheus_client import CollectorRegistry

from channels.faults import ChannelFault
from channels.ids import ChannelId
from mppnode.config.schema import Config
from mppnode.gauging import ChainSight, build_metrics, commits_into, page_of, tower_daemons
from mppnode.http.ops import Exposition, OpsListener, OpsSurface, Phase, Vitals, ops_app
from mppnode.kernel.tasks import TaskOwner
from mppnode.kernel.version import VERSION
from mppnode.ledger.books import Books
from mppnode.ledger.life import Life, Lost, Sweeper
from mppnode.observe.logs import Level
from mppnode.parts import Treasury, World, account_policy, build_treasury, open_chain, open_ledger

_SETTLE_S = 5.0


class Watchtower:
    """Ledger, chain and treasury. ``start`` it once, ``stop`` it once."""

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        name: str = "watchtower",
        beside: bool = False,
        exposition: Exposition | None = None,
    ) -> None:
        """``beside`` opens a SQLite ledger that a node may have in use; it is for short visits.

        ``exposition`` renders the metrics in place of the page of this process's own.
        """
        registry = CollectorRegistry()
        self.metrics = build_metrics(config, world.clock, registry)
        self._exposition = exposition or page_of(registry)
        self.ops_url = ""
        self._config = replace(config, node=replace(config.node, name=f"{config.node.name}-{name}"))
        self._beside = beside
        self._world = world
        self._exit = contextlib.AsyncExitStack()
        self._owner = TaskOwner(self._task_failed)
        self._daemons = TaskOwner(self._task_failed)
        self.books: Books
        self.treasury: Treasury
        self.life: Life
        self.sight: ChainSight

    async def open(self) -> None:
        """Open ledger and chain and put the treasury together; nothing moves by itself yet.

        Raises:
            WrongChain, InstanceLocked, LedgerError, ChannelFault: nothing is left open.
        """
        try:
            await self._open()
        except BaseException:
            await self._daemons.drain(deadline_s=0)
            await self._owner.drain(deadline_s=0)
            await self._exit.aclose()
            raise

    async def _open(self) -> None:
        config, world = self._config, self._world
        ledger = open_ledger(config, world, shared=self._beside)
        await ledger.start()
        self._exit.push_async_callback(ledger.stop)
        self.ledger = ledger
        ledger.on_commit = commits_into(self.metrics, config)
        self.books = Books(
            ledger,
            clock=world.clock,
            policy=account_policy(config),
            probe=world.probe,
            metrics=self.metrics,
            log=world.log,
        )
        self.life = Life(ledger, config.node.name, clock=world.clock, sleep=asyncio.sleep, on_lost=self._lost)
        await self.life.begin()
        self._exit.push_async_callback(self.life.end)
        self._daemons.spawn(self.life.keep(), name="beat")  # a visit may last longer than a lease
        http = await self._exit.enter_async_context(aiohttp.ClientSession())
        self.chain = await open_chain(config, world, http)
        self.treasury = build_treasury(
            config,
            world,
            ledger=ledger,
            books=self.books,
            chain=self.chain,
            life=self.life,
            owner=self._owner,
            quiesce=_nothing_runs_here,
            metrics=self.metrics,
        )
        self.sight = ChainSight.of(config, self.metrics, world.clock, self.chain)

    async def start(self) -> None:
        """Open everything and begin to work. Raises as :meth:`open`, and ``OSError`` for a port that is taken."""
        await self.open()
        sweeper = Sweeper(self.ledger, self.books, self.life, ours=lambda _: False)
        self._daemons.spawn(sweeper.keep(asyncio.sleep, self._late), name="sweep")
        self._daemons.spawn(self.treasury.treasurer.keep(), name="treasury")
        self._daemons.spawn(self.treasury.daily.keep(asyncio.sleep), name="reconcile")
        for name, loop in tower_daemons(self.metrics, self.sight, self._world.log, asyncio.sleep):
            self._daemons.spawn(loop, name=name)
        try:
            await self._listen_to_operators()
        except BaseException:
            await self.stop()
            raise
        config = self._config
        self._world.log(
            "watchtower.started",
            ops_url=self.ops_url or None,
            chain=config.chain.chain_id,
            node=config.node.name,
            version=VERSION,
        )

    async def _listen_to_operators(self) -> None:
        where = self._config.metrics
        if where is None:
            return
        vitals = Vitals(
            ping=self.ledger.living,
            lease=lambda: self.life.held,
            chain=lambda: not self.treasury.treasurer.blind,
            providers=lambda: True,  # it has none and needs none
            owner=self._owner,
            clock=self._world.clock,
        )
        self._daemons.spawn(vitals.keep(asyncio.sleep), name="vitals")
        await vitals.look()
        vitals.phase = Phase.OK
        surface = OpsSurface(vitals, self._exposition)
        listener = OpsListener(ops_app(surface, log=self._world.log, entropy=self._world.entropy))
        self._exit.push_async_callback(listener.stop)
        self.ops_url = await listener.start(where.host, where.port)

    def hurry(self) -> None:
        """Nothing here waits for anybody for long."""

    async def stop(self) -> None:
        """Begin nothing new, give transactions in flight a moment, close; intents go on at the next start."""
        await self._daemons.drain(deadline_s=0)
        await self._owner.drain(deadline_s=_SETTLE_S)
        await self._exit.aclose()

    def _lost(self, lost: Lost) -> None:
        self._world.log("node.lost", level=Level.ERROR, fenced=lost.fenced)

    def _late(self, fault: ChannelFault) -> None:
        self._world.log("sweep.late", level=Level.WARNING, reason=fault.reason.value)

    def _task_failed(self, name: str, error: BaseException) -> None:
        self._world.log("task.failed", level=Level.ERROR, task=name, error=type(error).__name__)


async def _nothing_runs_here(_: ChannelId) -> None:
    """A watchtower serves nobody, so it has no requests of its own to end."""
