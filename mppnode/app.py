"""The composition root: builds a node out of a configuration, starts it in order, stops it in the reverse order.

Nothing else constructs adapters, and nothing here decides anything.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import CollectorRegistry

from channels.chain import Chain
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.model import AcceptVoucher, Voucher
from channels.signature import address_of
from channels.wire.challenge import ChallengeMac
from mppnode.config.schema import Config
from mppnode.config.secrets import Secret
from mppnode.customers import Customers, build_customers, customer_surfaces, open_tokens
from mppnode.engine.chat import ChatEngine
from mppnode.engine.market import Market
from mppnode.engine.prober import Prober
from mppnode.engine.stream import StreamLimits
from mppnode.gauging import Gauges, build_metrics, commits_into, page_of
from mppnode.http.admin import admin_app
from mppnode.http.billing_routes import BillingPort
from mppnode.http.drain import FAREWELL_S, Drain
from mppnode.http.keyed import KeyedChat
from mppnode.http.middleware import fault_boundary, stamp
from mppnode.http.ops import Exposition, OpsSurface, Phase, Vitals, ops_app
from mppnode.kernel.requests import ChatLimits
from mppnode.kernel.tasks import TaskOwner
from mppnode.kernel.version import VERSION
from mppnode.ledger.base import Ledger
from mppnode.ledger.books import Books
from mppnode.ledger.life import Life, Lost, Sweeper
from mppnode.ledger.spool import Spool
from mppnode.observe.log_sampling import Refusals
from mppnode.observe.logs import Level
from mppnode.observe.traces import Tracer
from mppnode.parts import Treasury, World, account_policy, build_treasury, escrows_of, open_chain, open_ledger
from mppnode.paying import Paying, build_paying
from mppnode.providers.transport import Transport, TransportLimits
from mppnode.rails.live import LiveChannels
from mppnode.rails.presented import Seller
from mppnode.rails.session import SessionRail, SessionTerms
from mppnode.rails.tab import TabPolicy
from mppnode.registry import SURFACES
from mppnode.reload import Running
from mppnode.selling import Sales, build_sales, public_hosts

_HEADER_BYTES_MAX = 24 * 1024  # a 16 KiB credential (reliability: section 2.9) and its scheme, with room
_KEEP_ALIVE_S = 75.0
_SETTLE_S = 5.0  # for commits and a close whose transaction is in flight; a close is taken up again at the next start


class Node:
    """One running node. ``start`` it once, ``stop`` it once."""

    def __init__(self, config: Config, world: World, *, exposition: Exposition | None = None) -> None:
        """``exposition`` renders the metrics; without one there is no ``/metrics``."""
        self._config = config
        self._registry = CollectorRegistry()
        self.metrics = build_metrics(config, world.clock, self._registry)
        self._exposition = exposition or page_of(self._registry)
        self._drain = Drain()
        self._running: Running | None = None
        self._world = world
        self._log = world.log
        self._refusals = Refusals(world.log, world.clock)
        self._exit = contextlib.AsyncExitStack()
        self._owner = TaskOwner(self._task_failed)
        self._daemons = TaskOwner(self._task_failed)
        self._engine: ChatEngine | None = None
        self._runner: web.AppRunner | None = None
        self.ledger: Ledger | None = None
        self.books: Books | None = None
        self.treasury: Treasury | None = None
        self.rail: SessionRail | None = None
        self.customers: Customers | None = None
        self.paying: Paying | None = None
        self.sales: Sales | None = None
        self.vitals: Vitals | None = None
        self.gauges: Gauges | None = None
        self.url = ""
        self.admin_url = ""
        self.ops_url = ""

    async def start(self) -> None:
        """Open the ledger, recover it, check the chain, then listen.

        Raises:
            WrongChain, ChannelFault, OSError, ``InstanceLocked``, CatalogError, TokenizerError, ValueError: nothing is
                left running.
        """
        try:
            await self._start()
        except BaseException:
            await self._daemons.drain(deadline_s=0)
            await self._owner.drain(deadline_s=0)  # closes that were taken up again, a look at the ledger
            await self._exit.aclose()
            raise

    async def _start(self) -> None:
        config, world = self._config, self._world
        world.probe("start.before")
        # The supervisor of several workers holds a file's instance lock for all of them.
        ledger = open_ledger(config, world, shared=config.node.workers > 1)
        await ledger.start()
        self._exit.push_async_callback(ledger.stop)
        self.ledger = ledger
        ledger.on_commit = commits_into(self.metrics, config)
        if config.metrics is not None and config.metrics.folder is not None:
            self.metrics.share(config.metrics.folder)
            self._exit.callback(self.metrics.close)
        books = Books(
            ledger,
            clock=world.clock,
            policy=account_policy(config),
            probe=world.probe,
            metrics=self.metrics,
            log=self._log,
        )
        self.books = books
        live = LiveChannels(world.clock, self._owner)
        life = Life(
            ledger,
            config.node.name,
            clock=world.clock,
            sleep=asyncio.sleep,
            on_lost=lambda lost: self._lost(live, lost),
        )
        await life.begin()
        self._exit.push_async_callback(life.end)
        sweeper = Sweeper(ledger, books, life, ours=live.owns)
        recovered = await sweeper.sweep()
        http = await self._exit.enter_async_context(aiohttp.ClientSession())
        chain = await open_chain(config, world, http)
        live.resubmit = lambda channel, voucher: _resubmit(books, channel, voucher)
        books.subscribe(live.on_commit)
        self._open_spool(books)
        ledger.follow(live.channels)
        self.treasury = money = self._treasury(ledger, books, chain, life, live)
        rail = self._rail(books, money, live, life)
        self.rail = rail
        customers = await build_customers(
            config, world, ledger=ledger, life=life, owner=self._owner, exits=self._exit, metrics=self.metrics
        )
        self.customers = customers
        self._exit.push_async_callback(customers.idempotence.catch_up)  # before our claims are a dead node's
        recovered += await customers.sweeper.sweep()
        self.paying = paying = await build_paying(config, world, customers, ledger=ledger, life=life, exits=self._exit)
        engine = self._build_engine(rail, customers, paying, self._tracer())
        self._engine = engine
        self.vitals = vitals = self._vitals(ledger, life, money)
        self._look_at(ledger, chain, engine.market, live, customers)
        await money.closer.resume()
        self._daemon(life.keep(), "beat")
        self._daemon(vitals.keep(asyncio.sleep), "vitals")
        self._daemon(sweeper.keep(asyncio.sleep, self._late), "sweep")
        self._begin(money, customers)
        world.probe("listen.before")
        for name, loop in paying.daemons(asyncio.sleep):
            self._daemon(loop, name)
        await vitals.look()
        await self._listen(engine, rail, books, customers, paying.port)
        vitals.phase = Phase.OK
        self._tell_started(recovered)
        world.probe("listen.after")

    def _tell_started(self, recovered: int) -> None:
        self._log(
            "node.started",
            url=self.url,
            ops_url=self.ops_url or None,
            chain=self._config.chain.chain_id,
            recovered=recovered,
            node=self._config.node.name,
            version=VERSION,
        )

    def _treasury(self, ledger: Ledger, books: Books, chain: Chain, life: Life, live: LiveChannels) -> Treasury:
        return build_treasury(
            self._config,
            self._world,
            ledger=ledger,
            books=books,
            chain=chain,
            life=life,
            owner=self._owner,
            quiesce=live.quiesce,
            metrics=self.metrics,
        )

    def _begin(self, money: Treasury, customers: Customers) -> None:
        """Everything that runs without a request."""
        self._daemon(customers.sweeper.keep(asyncio.sleep, self._late), "sweep credit")
        self._daemon(customers.idempotence.keep(asyncio.sleep, self._late), "purge answers")
        self._daemon(money.treasurer.keep(), "treasury")
        self._daemon(money.daily.keep(asyncio.sleep), "reconcile")

    def _look_at(
        self, ledger: Ledger, chain: Chain, market: Market, live: LiveChannels, customers: Customers
    ) -> None:
        self.gauges = Gauges.of(
            self._config,
            self._world,
            self.metrics,
            ledger=ledger,
            chain=chain,
            market=market,
            live=live,
            customers=customers,
        )
        for name, loop in self.gauges.daemons(asyncio.sleep):
            self._daemon(loop, name)

    def _open_spool(self, books: Books) -> None:
        path = self._config.node.spool
        if path is None:
            return
        workers = self._config.node.workers > 1
        spool = Spool(
            path.with_name(f"{path.name}.{self._config.node.name}") if workers else path,
            on_error=lambda error: self._log("spool.failed", level=Level.ERROR, errno=error.errno),
        )
        spool.start()
        books.subscribe(spool.on_commit)
        self._daemon(spool.keep(asyncio.sleep), "spool")
        self._exit.push_async_callback(spool.flush)

    def _daemon(self, loop: Coroutine[Any, Any, None], name: str) -> None:
        self._daemons.spawn(loop, name=name)

    def _lost(self, live: LiveChannels, lost: Lost) -> None:
        # Nothing may be delivered any more: the holds of these requests are others' to release, or already gone.
        self._log("node.lost", level=Level.ERROR, fenced=lost.fenced)
        live.end_everything()
        if self.customers is not None:
            self.customers.rail.end_everything()

    def _late(self, fault: ChannelFault) -> None:
        self._log("sweep.late", level=Level.WARNING, reason=fault.reason.value)

    def _rail(self, books: Books, money: Treasury, live: LiveChannels, life: Life) -> SessionRail:
        config, world = self._config, self._world
        session, payee = config.session, address_of(config.chain.payee_key.reveal())
        return SessionRail(
            terms=SessionTerms(
                seller=Seller(config.node.realm, payee, config.chain.token, escrows_of(config)),
                suggested_deposit=session.suggested_deposit,
                min_voucher_delta=session.min_voucher_delta,
                challenge_ttl_s=session.challenge_ttl_s,
                chain_ttl_s=session.chain_ttl_s,
            ),
            mac=ChallengeMac(tuple(secret.reveal() for secret in config.node.challenge_secrets)),
            books=books,
            intents=money.desk,
            closer=money.closer,
            live=live,
            ending=money.ending,
            node=lambda: life.id,
            owner=self._owner,
            clock=world.clock,
            entropy=world.entropy,
            tab_policy=TabPolicy(session.window_units_max, session.preauthorise_max),
            metrics=self.metrics,
        )

    def _tracer(self) -> Tracer | None:
        """Raises ``ValueError`` when traces are wanted and cannot be had."""
        traces = self._config.traces
        if traces is None:
            return None
        try:
            from mppnode.gateways.otel import OtelTraces
        except ModuleNotFoundError:
            raise ValueError("[traces] needs the extra: pip install 'mppnode[otel]'") from None
        way = OtelTraces(traces, node=self._config.node.name, log=self._log)
        self._exit.push_async_callback(way.close)
        return Tracer(way.take, sample_permille=traces.sample_permille, entropy=self._world.entropy)

    def _build_engine(
        self, rail: SessionRail, customers: Customers, paying: Paying, tracer: Tracer | None
    ) -> ChatEngine:
        config, limits = self._config, self._config.limits
        transport = Transport(
            TransportLimits(first_byte_s=limits.first_token_s, idle_s=limits.idle_s), public=public_hosts(config)
        )
        self._exit.push_async_callback(transport.close)
        sales = build_sales(config, clock=self._world.clock, entropy=self._world.entropy, log=self._log)
        self.sales = sales
        prober = Prober(sales.market, transport, clock=self._world.clock, log=self._log)
        self._daemon(sales.keep(asyncio.sleep), "prices")
        self._daemon(prober.keep(asyncio.sleep), "probe")
        engine = ChatEngine(
            market=sales.market,
            counters=sales.counters,
            transport=transport,
            owner=self._owner,
            clock=self._world.clock,
            limits=StreamLimits(
                voucher_wait_s=config.session.voucher_wait_s, stall_s=limits.stall_s, total_s=limits.total_s
            ),
            streams_max=limits.streams_max,
            attempts_max=config.routing.attempts_max,
            log=self._log,
            probe=self._world.probe,
            metrics=self.metrics,
            tracer=tracer,
        )
        self._running = Running(
            sales,
            engine,
            transport,
            rail,
            customers,
            paying,
            lambda jwt: open_tokens(jwt, self._world, self._owner, self._exit),
        )
        return engine

    def _vitals(self, ledger: Ledger, life: Life, money: Treasury) -> Vitals:
        assert self.sales is not None
        return Vitals(
            ping=ledger.living,
            lease=lambda: life.held,
            chain=lambda: not money.treasurer.blind,
            providers=self.sales.sells,
            owner=self._owner,
            clock=self._world.clock,
        )

    def _admin_token(self) -> Secret[str]:
        assert self._config.admin is not None
        return self._config.admin.token

    async def _listen_to_operators(self, vitals: Vitals) -> None:
        where = self._config.metrics
        if where is not None:
            surface = OpsSurface(vitals, self._exposition)
            app = ops_app(surface, log=self._log, entropy=self._world.entropy)
            _, self.ops_url = await self._serve(app, where.host, where.port)

    async def _listen(
        self, engine: ChatEngine, rail: SessionRail, books: Books, customers: Customers, billing: BillingPort | None
    ) -> None:
        config = self._config
        boundary = fault_boundary(self._log, self._world.entropy, self.metrics.request_refused, told=self._refusals)
        app = web.Application(middlewares=[boundary], client_max_size=config.limits.body_bytes_max)
        app.on_response_prepare.append(stamp)
        chat_limits = ChatLimits(body_bytes=config.limits.body_bytes_max)
        keyed = KeyedChat(
            engine=engine,
            rail=customers.rail,
            directory=customers.directory,
            idempotence=customers.idempotence,
            limits=chat_limits,
        )
        for surface in SURFACES:
            made = surface(
                engine=engine,
                rail=rail,
                books=books,
                keyed=keyed,
                directory=customers.directory,
                idempotence=customers.idempotence,
                clock=self._world.clock,
                limits=chat_limits,
            )
            app.add_routes(made.routes())
        for theirs in customer_surfaces(config, self._world, customers, billing):
            app.add_routes(theirs.routes())
        assert self.vitals is not None
        app.add_routes(OpsSurface(self.vitals).routes())
        self._drain.watch(app)
        await self._listen_to_operators(self.vitals)
        if config.admin is not None:
            operator = admin_app(
                token=self._admin_token,
                keyring=customers.keyring,
                accounts=customers.accounts,
                books=customers.books,
                clock=self._world.clock,
                log=self._log,
                entropy=self._world.entropy,
                billing=billing,
                private_alerts=config.accounts.private_alert_urls,
            )
            _, self.admin_url = await self._serve(operator, config.admin.host, config.admin.port)
        self._runner, self.url = await self._serve(app, config.node.host, config.node.port)

    async def _serve(self, app: web.Application, host: str, port: int) -> tuple[web.AppRunner, str]:
        """Listen; returns also the URL, whose port the kernel may have chosen."""
        config = self._config
        runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,  # a disconnect cancels the handler; aiohttp does not tell it otherwise
            keepalive_timeout=_KEEP_ALIVE_S,
            max_field_size=_HEADER_BYTES_MAX,
            auto_decompress=False,  # compressed bodies are refused; aiohttp would unpack them first, or fail to
            shutdown_timeout=FAREWELL_S,  # the drain has waited for what runs already
        )
        await runner.setup()
        self._exit.push_async_callback(runner.cleanup)
        # Workers of one machine share the port; the kernel spreads the connections over them.
        shared = config.node.workers > 1
        site = web.TCPSite(runner, host, port, reuse_port=shared or None)
        await site.start()
        return runner, f"http://{host}:{runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Take no more requests, let running streams end, settle their bills, then close everything."""
        self._world.probe("drain.before")
        if self.vitals is not None:
            self.vitals.phase = Phase.DRAINING
        if self._engine is not None and self._runner is not None:
            limits = self._config.limits
            await self._drain.run(self._runner, self._engine, delay_s=limits.drain_delay_s, drain_s=limits.drain_s)
        self._world.probe("drain.after")
        await self._daemons.drain(deadline_s=0)
        # The streams and their bills are over already; what is left are closes in flight.
        await self._owner.drain(deadline_s=min(_SETTLE_S, self._config.limits.drain_s))
        await self._exit.aclose()
        self._refusals.tell()
        self._log("node.stopped")

    def hurry(self) -> None:
        """Cut a stop short: what still runs is ended at once, each request with its exact bill."""
        self._drain.hurry()

    async def reload(self, config: Config) -> None:
        """Take up what may change without a restart: see :func:`mppnode.reload.taken_up`, which made this ``config``.

        Raises:
            CatalogError, TokenizerError, ValueError: nothing has changed.
        """
        assert self._running is not None
        await self._running.take(self._config, config)
        self._config = config

    def _task_failed(self, name: str, error: BaseException) -> None:
        reason = error.reason.value if isinstance(error, ChannelFault) else type(error).__name__
        self._log("task.failed", level=Level.ERROR, task=name, error=reason)


async def _resubmit(books: Books, channel: ChannelId, voucher: Voucher) -> None:
    """Bring a voucher back that a database lost when it failed over without its last commits."""
    try:
        await books.apply(channel, AcceptVoucher(voucher))
    except ChannelFault as fault:
        if fault.reason not in (Reason.VOUCHER_TOO_LOW, Reason.CHANNEL_FINALIZED, Reason.STORE_UNAVAILABLE):
            raise
