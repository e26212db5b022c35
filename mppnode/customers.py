"""Customers without a channel: accounts, keys and credit, built from a configuration."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from channels.model import NodeId
from channels.units import PICO_PER_UNIT
from mppnode.accounts.access import TrustRule
from mppnode.accounts.directory import Directory, Tokens
from mppnode.accounts.keyring import Accounts, Keyring
from mppnode.accounts.notices import notices
from mppnode.config.accounts import JwtConfig
from mppnode.config.schema import Config
from mppnode.engine.record import Idempotence
from mppnode.http.account_routes import AccountSurface
from mppnode.http.billing_routes import BillingPort, BillingSurface
from mppnode.http.usage_routes import UsageSurface
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.base import Ledger
from mppnode.ledger.credits import Credits, CreditSweeper
from mppnode.ledger.life import Life
from mppnode.observe.metrics import Metrics
from mppnode.parts import World
from mppnode.rails.credit import CreditRail


@dataclass(frozen=True, slots=True)
class Customers:
    """Who may use the node by bearer, and what they may spend."""

    books: Credits
    directory: Directory
    keyring: Keyring
    accounts: Accounts
    rail: CreditRail
    idempotence: Idempotence
    sweeper: CreditSweeper


async def build_customers(
    config: Config,
    world: World,
    *,
    ledger: Ledger,
    life: Life,
    owner: TaskOwner,
    exits: contextlib.AsyncExitStack,
    metrics: Metrics,
) -> Customers:
    """Put together what is needed to serve bearers; nothing runs yet.

    Raises:
        ValueError: the issuer's keys may not come from the configured URL, or an extra is not installed.
    """
    accounts, clock = config.accounts, world.clock
    books = Credits(ledger, clock=clock, probe=world.probe, metrics=metrics, log=world.log)
    tokens = None if accounts.jwt is None else await open_tokens(accounts.jwt, world, owner, exits)
    directory = Directory(
        books,
        clock=clock,
        tokens=tokens,
        rule=TrustRule(accounts.trust_rule),
        sign_up=accounts.sign_up,
        entropy=world.entropy,
    )

    def node() -> NodeId:
        return life.id

    rail = CreditRail(
        books=books,
        directory=directory,
        notices=notices,
        node=node,
        owner=owner,
        clock=clock,
        window_pico=config.session.window_units_max * PICO_PER_UNIT,
        top_up_url=accounts.top_up_url,
    )
    sweeper = CreditSweeper(books, ledger, life, ours=rail.owns)
    return Customers(
        books=books,
        directory=directory,
        keyring=Keyring(books, clock=clock, entropy=world.entropy),
        accounts=Accounts(books, clock=clock, entropy=world.entropy),
        rail=rail,
        idempotence=Idempotence(books, clock=clock, node=node, owner=owner),
        sweeper=sweeper,
    )


def customer_surfaces(
    config: Config, world: World, customers: Customers, billing: BillingPort | None
) -> tuple[AccountSurface, UsageSurface, BillingSurface]:
    """The routes on which customers manage what is theirs."""
    directory, books = customers.directory, customers.books
    account = AccountSurface(
        directory=directory,
        keyring=customers.keyring,
        accounts=customers.accounts,
        books=books,
        clock=world.clock,
        private_alerts=config.accounts.private_alert_urls,
    )
    usage = UsageSurface(directory=directory, books=books)
    return account, usage, BillingSurface(directory=directory, billing=billing)


async def open_tokens(jwt: JwtConfig, world: World, owner: TaskOwner, exits: contextlib.AsyncExitStack) -> Tokens:
    """The reader of one issuer's tokens. Raises as :func:`build_customers`."""
    try:
        from mppnode.accounts.bearer import TokenPolicy, parse_jwks, shared_secret
        from mppnode.accounts.tokens import TokenReader
    except ModuleNotFoundError:
        raise ValueError("[accounts.jwt] needs the extra: pip install 'mppnode[jwt]'") from None
    policy = TokenPolicy(jwt.issuer, jwt.audience, jwt.leeway_s, jwt.subject_claim, jwt.trusts_claim)
    if jwt.secret is not None:
        return TokenReader(policy, shared=shared_secret(jwt.secret.reveal()), clock=world.clock)
    from mppnode.gateways.jwks import IssuerKeys, KeysUnavailable, jwks_fetcher, jwks_session

    assert jwt.jwks_url is not None
    session = await exits.enter_async_context(jwks_session())
    keys = IssuerKeys(jwks_fetcher(session, jwt.jwks_url), parse_jwks, world.clock, owner)
    return TokenReader(policy, published=keys.key, away=KeysUnavailable, clock=world.clock)
