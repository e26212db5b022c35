"""The parts of a node that are not a server: ledger, chain and treasury, built from a configuration.

The composition root uses them, and so do the commands that work on the same money without serving anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from channels.chain import Chain
from channels.descriptor import RESERVE_ADDRESS, Escrow, SessionProtocol
from channels.ids import ChannelId
from channels.policy import Policy
from channels.signature import address_of
from channels.sponsor import SponsorPolicy
from channels.verify import Terms
from mppnode.chain.agreeing import AgreeingChain
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.config.schema import Config
from mppnode.kernel.clock import Clock
from mppnode.kernel.probe import Probe, unwatched
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.base import Budget, Ledger
from mppnode.ledger.books import Books
from mppnode.ledger.ending import Ending
from mppnode.ledger.life import Life
from mppnode.observe.logs import Level, Log
from mppnode.observe.metrics import Metrics
from mppnode.registry import STORES
from mppnode.treasury.closer import Closer
from mppnode.treasury.desk import ChainDesk
from mppnode.treasury.reconcile import DailyReconcile
from mppnode.treasury.settler import Settler
from mppnode.treasury.sponsor import Sponsor
from mppnode.treasury.treasurer import Treasurer, TreasuryPolicy
from mppnode.treasury.watcher import Watcher


class WrongChain(Exception):
    """The RPC endpoint serves another chain than the configuration names."""


@dataclass(frozen=True, slots=True)
class World:
    """Everything a node takes from its surroundings; tests replace single parts."""

    clock: Clock
    entropy: Callable[[int], bytes]
    log: Log
    on_fatal: Callable[[BaseException], None]
    probe: Probe = unwatched


@dataclass(frozen=True, slots=True)
class Treasury:
    """Everything that moves money on chain."""

    desk: ChainDesk
    settler: Settler
    closer: Closer
    treasurer: Treasurer
    ending: Ending
    daily: DailyReconcile


def open_ledger(config: Config, world: World, *, shared: bool = False) -> Ledger:
    """The configured ledger, not started yet; ``shared`` opens a SQLite file that others may have in use."""
    where = config.node.ledger
    if isinstance(where, Path):
        return STORES["sqlite"](where, clock=world.clock, on_fatal=world.on_fatal, shared=shared)
    return STORES["postgres"](where, clock=world.clock, on_fatal=world.on_fatal)


async def open_chain(config: Config, world: World, http: aiohttp.ClientSession) -> Chain:
    """The configured chain, checked to be the right one. Raises ``WrongChain`` or ``CHAIN_UNAVAILABLE``."""
    urls = {"chain.rpc_url": config.chain.rpc_url, "treasury.second_rpc_url": config.treasury.second_rpc_url}
    chains: list[Chain] = []
    for key, url in urls.items():
        if url is None:
            continue
        chain = RpcChain(
            HttpTransport(http, url), world.clock, limits=RpcLimits(), chain_id=config.chain.chain_id
        )
        found = await chain.chain_id()
        if found != config.chain.chain_id:
            raise WrongChain(f"{key} serves chain {found}, but chain.chain_id is {config.chain.chain_id}")
        chains.append(chain)
    if len(chains) == 1:
        return chains[0]

    def disputed(what: str) -> None:
        world.log("chain.disputed", level=Level.ERROR, what=what)

    primary, second = chains
    return AgreeingChain(
        primary, second, world.clock, agree_above=config.treasury.agree_above, on_disagreement=disputed
    )


def escrows_of(config: Config) -> tuple[Escrow, ...]:
    """The escrows this node accepts, in the order of its preference."""
    places = {SessionProtocol.V2: RESERVE_ADDRESS, SessionProtocol.V1: config.chain.v1_escrow}
    chosen = [(protocol, places[protocol]) for protocol in config.session.protocols]
    return tuple(Escrow(protocol, config.chain.chain_id, place) for protocol, place in chosen if place is not None)


def account_policy(config: Config) -> Policy:
    """The limits of the account machine."""
    return Policy(
        deposit_units_min=config.session.min_deposit,
        voucher_delta_units_min=config.session.min_voucher_delta,
        unsettled_units_max=config.treasury.exposure_max,
    )


def build_treasury(
    config: Config,
    world: World,
    *,
    ledger: Ledger,
    books: Books,
    chain: Chain,
    life: Life,
    owner: TaskOwner,
    quiesce: Callable[[ChannelId], Awaitable[None]],
    metrics: Metrics | None = None,
) -> Treasury:
    """Put the treasury together; nothing runs yet."""
    clock, payee, escrows = world.clock, address_of(config.chain.payee_key.reveal()), escrows_of(config)
    settler = Settler(
        chain,
        ledger,
        key=config.chain.payee_key,
        fee_token=config.chain.fee_token,
        clock=clock,
        entropy=world.entropy,
        node=lambda: life.id,
        probe=world.probe,
        metrics=metrics,
        log=world.log,
    )
    settler.on_no_effect = lambda intent: world.log(
        "treasury.no_effect", level=Level.ERROR, channel="0x" + intent.channel.hex(), kind=intent.kind.value
    )
    ending = Ending(books, clock=clock, sleep=asyncio.sleep)
    closer = Closer(
        ledger=ledger,
        books=books,
        settler=settler,
        chain=chain,
        ending=ending,
        quiesce=quiesce,
        owner=owner,
        clock=clock,
    )
    policy = config.treasury
    terms = {
        escrow.protocol: Terms(escrow, payee, config.chain.token, sponsored=policy.sponsor) for escrow in escrows
    }
    sponsor = _sponsor(config, world, ledger, chain, metrics)
    treasurer = Treasurer(
        chain=chain,
        ledger=ledger,
        books=books,
        watcher=Watcher(chain, ledger, books, escrows=escrows, clock=clock, log=world.log),
        settler=settler,
        closer=closer,
        node=lambda: life.id,
        owner=owner,
        clock=clock,
        log=world.log,
        policy=TreasuryPolicy(
            settle_fees=policy.settle_fees,
            settle_age_s=policy.settle_age_s,
            exposure_max=policy.exposure_max,
            idle_close_s=policy.idle_close_s,
        ),
        chores=() if sponsor is None else (sponsor.settle_open_grants,),
        metrics=metrics,
    )
    desk = ChainDesk(chain, terms=terms, clock=clock, sponsor=sponsor, probe=world.probe)
    daily = DailyReconcile(ledger, chain, node=lambda: life.id, clock=clock, log=world.log, metrics=metrics)
    return Treasury(desk, settler, closer, treasurer, ending, daily)


def _sponsor(
    config: Config, world: World, ledger: Ledger, chain: Chain, metrics: Metrics | None
) -> Sponsor | None:
    """Who pays the fees of payers' transactions, if anybody does."""
    terms = config.treasury
    if not terms.sponsor:
        return None
    return Sponsor(
        ledger,
        chain,
        key=config.chain.payee_key,
        policy=SponsorPolicy(fee_tokens=(config.chain.fee_token,), fee_units_max=terms.sponsor_fee_max),
        budget=Budget(terms.sponsor_grants_per_hour, terms.sponsor_budget),
        clock=world.clock,
        metrics=metrics,
    )
