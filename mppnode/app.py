"""The composition root: builds a node out of a configuration, starts it in order, stops it in the reverse order.

Nothing else constructs adapters, and nothing here decides anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from channels.descriptor import RESERVE_ADDRESS, Escrow, SessionProtocol
from channels.faults import ChannelFault
from channels.policy import Policy
from channels.signature import address_of
from channels.verify import Terms
from channels.wire.challenge import ChallengeMac
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport as RpcTransport
from mppnode.config.schema import Config, ModelConfig, ProviderConfig
from mppnode.engine.chat import ChatEngine, Upstream
from mppnode.engine.stream import StreamLimits
from mppnode.http.middleware import fault_boundary
from mppnode.kernel.clock import Clock
from mppnode.kernel.requests import ChatLimits
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.books import Books
from mppnode.observe.logs import Level, Log
from mppnode.pricing.book import Model, PriceBook, Rates
from mppnode.providers.transport import Transport, TransportLimits
from mppnode.rails.live import LiveChannels
from mppnode.rails.presented import Seller
from mppnode.rails.session import SessionRail, SessionTerms
from mppnode.rails.tab import TabPolicy
from mppnode.registry import DECODERS, STORES, SURFACES
from mppnode.treasury.intents import ChainDesk

_HEADER_BYTES_MAX = 24 * 1024  # a 16 KiB credential (reliability: section 2.9) and its scheme, with room
_KEEP_ALIVE_S = 75.0
_SETTLE_S = 5.0  # for commits and a close whose transaction is in flight; a close is taken up again at the next start


class WrongChain(Exception):
    """The RPC endpoint serves another chain than the configuration names."""


@dataclass(frozen=True, slots=True)
class World:
    """Everything a node takes from its surroundings; tests replace single parts."""

    clock: Clock
    entropy: Callable[[int], bytes]
    log: Log
    on_fatal: Callable[[BaseException], None]


class Node:
    """One running node. ``start`` it once, ``stop`` it once."""

    def __init__(self, config: Config, world: World) -> None:
        self._config = config
        self._world = world
        self._log = world.log
        self._exit = contextlib.AsyncExitStack()
        self._owner = TaskOwner(self._task_failed)
        self._engine: ChatEngine | None = None
        self._runner: web.AppRunner | None = None
        self.books: Books | None = None
        self.rail: SessionRail | None = None
        self.url = ""

    async def start(self) -> None:
        """Open the ledger, recover it, check the chain, then listen.

        Raises:
            WrongChain, ChannelFault, OSError, ``InstanceLocked``: nothing is left running.
        """
        try:
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise

    async def _start(self) -> None:
        config, world = self._config, self._world
        store = STORES["sqlite"](config.node.ledger, clock=world.clock, on_fatal=world.on_fatal)
        await store.start()
        self._exit.push_async_callback(store.stop)
        books = Books(store, clock=world.clock, policy=_policy(config))
        self.books = books
        recovered = await books.recover()
        http = await self._exit.enter_async_context(aiohttp.ClientSession())
        chain = RpcChain(RpcTransport(http, config.chain.rpc_url), world.clock, limits=RpcLimits())
        found = await chain.chain_id()
        if found != config.chain.chain_id:
            raise WrongChain(f"chain.rpc_url serves chain {found}, but chain.chain_id is {config.chain.chain_id}")
        live = LiveChannels(world.clock)
        books.subscribe(live.on_commit)
        rail = self._rail(books, chain, live)
        self.rail = rail
        engine = self._build_engine(rail, live)
        self._engine = engine
        await rail.resume_closes()
        await self._listen(engine, rail, books)
        self._log("node.started", url=self.url, chain=config.chain.chain_id, recovered=recovered)

    def _rail(self, books: Books, chain: RpcChain, live: LiveChannels) -> SessionRail:
        config, world = self._config, self._world
        payee, escrows = address_of(config.chain.payee_key.reveal()), _escrows(config)
        desk = ChainDesk(
            chain,
            terms={escrow.protocol: Terms(escrow, payee, config.chain.token) for escrow in escrows},
            key=config.chain.payee_key,
            fee_token=config.chain.fee_token,
            clock=world.clock,
            entropy=world.entropy,
        )
        session = config.session
        return SessionRail(
            terms=SessionTerms(
                seller=Seller(config.node.realm, payee, config.chain.token, escrows),
                suggested_deposit=session.suggested_deposit,
                min_voucher_delta=session.min_voucher_delta,
                challenge_ttl_s=session.challenge_ttl_s,
                chain_ttl_s=session.chain_ttl_s,
            ),
            mac=ChallengeMac(tuple(secret.reveal() for secret in config.node.challenge_secrets)),
            books=books,
            intents=desk,
            live=live,
            owner=self._owner,
            clock=world.clock,
            entropy=world.entropy,
            tab_policy=TabPolicy(session.window_units_max, session.preauthorise_max),
        )

    def _build_engine(self, rail: SessionRail, live: LiveChannels) -> ChatEngine:
        config, limits = self._config, self._config.limits
        transport = Transport(TransportLimits(first_byte_s=limits.first_token_s, idle_s=limits.idle_s))
        self._exit.push_async_callback(transport.close)
        return ChatEngine(
            book=PriceBook(_model(model) for model in config.models),
            default_model=config.models[0].id,
            upstreams={provider.name: _upstream(provider) for provider in config.providers},
            transport=transport,
            rail=rail,
            live=live,
            owner=self._owner,
            clock=self._world.clock,
            limits=StreamLimits(voucher_wait_s=config.session.voucher_wait_s, stall_s=limits.stall_s),
            streams_max=limits.streams_max,
            log=self._log,
        )

    async def _listen(self, engine: ChatEngine, rail: SessionRail, books: Books) -> None:
        config = self._config
        app = web.Application(middlewares=[fault_boundary(self._log)], client_max_size=config.limits.body_bytes_max)
        chat_limits = ChatLimits(body_bytes=config.limits.body_bytes_max)
        for surface in SURFACES:
            app.add_routes(surface(engine=engine, rail=rail, books=books, limits=chat_limits).routes())
        runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,  # a disconnect cancels the handler; aiohttp does not tell it otherwise
            keepalive_timeout=_KEEP_ALIVE_S,
            max_field_size=_HEADER_BYTES_MAX,
            auto_decompress=False,  # compressed bodies are refused; aiohttp would unpack them first, or fail to
            shutdown_timeout=float(config.limits.drain_s),
        )
        await runner.setup()
        self._exit.push_async_callback(runner.cleanup)
        self._runner = runner
        site = web.TCPSite(runner, config.node.host, config.node.port)
        await site.start()
        self.url = f"http://{config.node.host}:{runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Take no more requests, let running streams end, settle their bills, then close everything."""
        if self._engine is not None:
            self._engine.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        # The runner has waited for the streams already; what is left are their bills and closes in flight.
        await self._owner.drain(deadline_s=min(_SETTLE_S, self._config.limits.drain_s))
        await self._exit.aclose()
        self._log("node.stopped")

    def _task_failed(self, name: str, error: BaseException) -> None:
        reason = error.reason.value if isinstance(error, ChannelFault) else type(error).__name__
        self._log("task.failed", level=Level.ERROR, task=name, error=reason)


def _policy(config: Config) -> Policy:
    return Policy(
        deposit_units_min=config.session.min_deposit, voucher_delta_units_min=config.session.min_voucher_delta
    )


def _escrows(config: Config) -> tuple[Escrow, ...]:
    places = {SessionProtocol.V2: RESERVE_ADDRESS, SessionProtocol.V1: config.chain.v1_escrow}
    chosen = [(protocol, places[protocol]) for protocol in config.session.protocols]
    return tuple(Escrow(protocol, config.chain.chain_id, place) for protocol, place in chosen if place is not None)


def _model(model: ModelConfig) -> Model:
    rates = Rates(model.input, model.cached_input, model.output)
    return Model(model.id, model.provider, model.upstream_model, rates, model.context, model.max_output)


def _upstream(provider: ProviderConfig) -> Upstream:
    key = provider.api_key
    return Upstream(provider.base_url, lambda: None if key is None else key.reveal(), DECODERS["openai"])
