"""What is measured by looking, every few seconds: money, channels, providers, prices, keys, tasks, and the loop itself.

What can be counted where it happens is counted there. This is the rest: states that nobody reports, because they change
by themselves or are everybody's. A look that fails leaves the values as they were, but for ages, which grow; the next
one comes soon.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry

from channels.chain import Chain
from channels.faults import ChannelFault
from channels.ids import Address
from channels.signature import address_of
from channels.units import PICO_PER_UNIT
from mppnode.config.schema import Config
from mppnode.customers import Customers
from mppnode.engine.market import Market, Readiness
from mppnode.kernel.clock import Clock
from mppnode.ledger.base import Ledger
from mppnode.ledger.credit_lists import Waiting, unbilled_micro, usable_keys, waiting_tasks
from mppnode.ledger.credits import Credits
from mppnode.observe.exposition import render
from mppnode.observe.logs import Level, Log
from mppnode.observe.metric_labels import OutboxKind, Rail, Store, Vocabulary
from mppnode.observe.metrics import Metrics
from mppnode.parts import World
from mppnode.rails.credit import CreditRail
from mppnode.rails.live import LiveChannels

LOOP_S: Final = 0.5
"""Between two looks at the clock: a stall of a second is seen at least once."""
FLUSH_S: Final = 1.0
HERE_S: Final = 5.0
"""Between two looks at what is in this process's memory."""
LEDGER_S: Final = 30.0
"""Between two looks at what is in the ledger: five short statements; the shortest alert on them waits a minute."""
CHAIN_S: Final = 30.0
"""Between two questions to the chain's node, which may be paid for by the call."""
_TIMED: Final = (OutboxKind.ALERT, OutboxKind.RECHARGE)
"""Late when nobody has tried at the time they set themselves: a card that was declined waits for days, and so may a
customer's own receiver. A report of usage is late when it is not with Stripe. A suspension stands until it is lifted.
"""

Sleep = Callable[[float], Awaitable[None]]


def build_metrics(config: Config, clock: Clock, registry: CollectorRegistry) -> Metrics:
    """The metrics of a node whose providers are known; its models follow with the catalog (:meth:`Metrics.know`)."""
    vocabulary = Vocabulary(providers=[provider.name for provider in config.providers])
    return Metrics(registry, clock=clock, vocabulary=vocabulary)


def page_of(registry: CollectorRegistry) -> Callable[[str], tuple[bytes, str]]:
    """From an ``Accept`` header to a page of metrics and its content type; to be called in a thread."""

    def page(accept: str) -> tuple[bytes, str]:
        made = render(registry, accept)
        return made.body, made.content_type

    return page


def commits_into(metrics: Metrics, config: Config) -> Callable[[float | None], None]:
    """What a ledger tells of its commits, as metrics."""
    store = (Store.SQLITE if isinstance(config.node.ledger, Path) else Store.POSTGRES).value

    def committed(seconds: float | None) -> None:
        if seconds is None:
            metrics.commit_failed(store)
        else:
            metrics.committed(store, seconds)

    return committed


@dataclass(slots=True)
class ChainSight:
    """What the chain's node shows of itself and of the fee payer."""

    metrics: Metrics
    clock: Clock
    chain: Chain
    fee_token: Address
    fee_payer: Address
    seen: int
    """Unix time of the newest block; of the start, until there is one."""

    @classmethod
    def of(cls, config: Config, metrics: Metrics, clock: Clock, chain: Chain) -> ChainSight:
        """That of a process that settles with the configuration's key."""
        payer = address_of(config.chain.payee_key.reveal())
        return cls(metrics, clock, chain, config.chain.fee_token, payer, seen=clock.now())

    async def look(self) -> None:
        """How far behind the chain's node is, and what is left for gas. Raises ``CHAIN_UNAVAILABLE``."""
        try:
            self.seen = (await self.chain.head()).timestamp
        finally:
            # Also when nobody answers: left as it was, the age of a chain that is away would be small for ever.
            self.metrics.chain_head_age(max(self.clock.now() - self.seen, 0))
        balance = await self.chain.balance_of(self.fee_token, self.fee_payer)
        self.metrics.fee_payer_balance(balance * PICO_PER_UNIT)


def tower_daemons(
    metrics: Metrics, sight: ChainSight, log: Log, sleep: Sleep
) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    """The loops of a process that has a treasury and serves nobody, by name."""
    yield "loop lag", watch_loop(metrics, sight.clock, sleep)
    yield "gauges chain", keep_looking(sight.look, CHAIN_S, sleep, log)


async def keep_looking(look: Callable[[], Awaitable[None]], every_s: float, sleep: Sleep, log: Log) -> None:
    """Look every so many seconds; what fails is tried again at the next turn."""
    while True:
        try:
            await look()
        except ChannelFault as fault:
            log("gauges.late", level=Level.DEBUG, reason=fault.reason.value)
        except Exception as error:  # noqa: BLE001 - values that stand still would keep every alert on them silent
            log("gauges.failed", level=Level.ERROR, error=type(error).__name__)
        await sleep(every_s)


async def watch_loop(metrics: Metrics, clock: Clock, sleep: Sleep) -> None:
    """See how late the loop runs a timer."""
    while True:
        due = clock.monotonic() + LOOP_S
        await sleep(LOOP_S)
        metrics.loop_lag(max(clock.monotonic() - due, 0.0))


@dataclass(frozen=True, slots=True)
class Gauges:
    """Everything that is looked at, and where it is shown."""

    metrics: Metrics
    clock: Clock
    log: Log
    ledger: Ledger
    sight: ChainSight
    sponsor_budget_pico: int
    market: Market
    live: LiveChannels
    credit: CreditRail
    books: Credits

    @classmethod
    def of(
        cls,
        config: Config,
        world: World,
        metrics: Metrics,
        *,
        ledger: Ledger,
        chain: Chain,
        market: Market,
        live: LiveChannels,
        customers: Customers,
    ) -> Gauges:
        """Those of a node."""
        return cls(
            metrics=metrics,
            clock=world.clock,
            log=world.log,
            ledger=ledger,
            sight=ChainSight.of(config, metrics, world.clock, chain),
            sponsor_budget_pico=config.treasury.sponsor_budget * PICO_PER_UNIT if config.treasury.sponsor else 0,
            market=market,
            live=live,
            credit=customers.rail,
            books=customers.books,
        )

    async def _leave_counts(self) -> None:
        """Leave what was counted for the other workers, so that one that is killed loses little."""
        await asyncio.to_thread(self.metrics.flush)

    def daemons(self, sleep: Sleep) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """The loops to spawn, by name."""
        yield "loop lag", watch_loop(self.metrics, self.clock, sleep)
        if self.metrics.shared:
            yield "shared metrics", keep_looking(self._leave_counts, FLUSH_S, sleep, self.log)
        yield "gauges here", keep_looking(self.look_here, HERE_S, sleep, self.log)
        yield "gauges ledger", keep_looking(self.look_at_ledger, LEDGER_S, sleep, self.log)
        yield "gauges chain", keep_looking(self.look_at_chain, CHAIN_S, sleep, self.log)

    async def look_here(self) -> None:
        """Exposure, providers and prices, as this process sees them."""
        self.metrics.exposure(Rail.SESSION.value, self.live.unrecorded())
        self.metrics.exposure(Rail.CREDIT.value, self.credit.unrecorded())
        catalog, now = self.market.catalog(), self.clock.monotonic()
        self.metrics.know(models=catalog.models(), providers=self.market.endpoints)
        worst = dict.fromkeys(self.market.endpoints, 0)
        usable_by: dict[str, int] = {}
        priced: dict[str, int] = {}
        for index, model in enumerate(catalog.models()):
            usable = 0
            for listing in catalog.listings(model):
                usable += self.market.readiness(listing) is not Readiness.UNAVAILABLE
                standing = self.market.router.health.standing((listing.provider, model), now)
                worst[listing.provider] = max(worst.get(listing.provider, 0), standing)
                if listing.priced_at is not None:
                    priced[listing.provider] = min(priced.get(listing.provider, listing.priced_at), listing.priced_at)
            usable_by[model] = usable
            if index % 64 == 63:  # noqa: PLR2004 - streams go on while a catalog of thousands is looked through
                await asyncio.sleep(0)
        self.metrics.providers_usable(usable_by)
        self.metrics.breaker_states(worst)
        self.metrics.prices_confirmed(priced, catalog.held)

    async def look_at_ledger(self) -> None:
        """Keys, tasks, and what is promised or not billed yet. Raises ``STORE_UNAVAILABLE``."""
        now = self.clock.now_millis()
        outbox = await self.books.read(waiting_tasks)
        for kind in OutboxKind:
            found = outbox.get(kind.value, Waiting())
            since = found.created_ms if kind is OutboxKind.METER else found.due_ms if kind in _TIMED else None
            late = 0.0 if since is None else max(now - since, 0) / 1000
            self.metrics.outbox(kind.value, due=found.due, parked=found.parked, oldest_s=late)
        self.metrics.keys_active(await self.books.read(usable_keys))
        self.metrics.unbilled(await self.books.read(unbilled_micro) * PICO_PER_UNIT)
        self.metrics.sponsor_budget(await self.ledger.promised() * PICO_PER_UNIT, self.sponsor_budget_pico)

    async def look_at_chain(self) -> None:
        """See :meth:`ChainSight.look`."""
        await self.sight.look()
