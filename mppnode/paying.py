"""Money through a payment processor and what is told to customers, built from a configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

from channels.model import NodeId
from mppnode.billing.alerts import AlertWorker
from mppnode.billing.workers import Sleep, Workers
from mppnode.config.billing import BillingConfig
from mppnode.config.schema import Config
from mppnode.customers import Customers
from mppnode.gateways.alerts import AlertSender, alert_session
from mppnode.http.billing_routes import BillingPort
from mppnode.kernel.faults import NodeFault
from mppnode.ledger.base import Ledger
from mppnode.ledger.credits import Credits
from mppnode.ledger.life import Life
from mppnode.observe.logs import Level
from mppnode.parts import World

if TYPE_CHECKING:
    from mppnode.billing.service import Billing


@dataclass(frozen=True, slots=True)
class Paying:
    """What is sold through a processor, if anything, and the loops that run beside the requests."""

    port: BillingPort | None
    workers: Workers
    rekey: Callable[[BillingConfig], None] = lambda _: None
    """Use other secrets of the same processor account from now on."""

    def daemons(self, sleep: Sleep) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """The loops to spawn, by name."""
        return self.workers.daemons(sleep)


async def build_paying(
    config: Config, world: World, customers: Customers, *, ledger: Ledger, life: Life, exits: contextlib.AsyncExitStack
) -> Paying:
    """Put it together and ask the processor whose key this is. A processor that is away keeps nobody from starting.

    Raises:
        ValueError: the extra is not installed.
    """
    session = await exits.enter_async_context(alert_session())
    alerts = AlertSender(session, clock=world.clock, development=config.accounts.private_alert_urls)
    if config.billing is None:
        worker = AlertWorker(customers.books, alerts, log=world.log)
        workers = Workers(ledger, lambda: life.id, customers.books, world.clock, world.log, None, None, None, worker)
        return Paying(None, workers)
    return await _with_stripe(config, config.billing, world, customers, alerts, ledger=ledger, life=life, exits=exits)


async def _with_stripe(
    config: Config,
    billing: BillingConfig,
    world: World,
    customers: Customers,
    alerts: AlertSender,
    *,
    ledger: Ledger,
    life: Life,
    exits: contextlib.AsyncExitStack,
) -> Paying:
    session = await exits.enter_async_context(aiohttp.ClientSession(trust_env=False))
    service = billing_with(
        billing, config, world, customers.books, session=session, ledger=ledger, node=lambda: life.id, alerts=alerts
    )
    try:
        await service.start()
    except NodeFault as fault:
        world.log("billing.unavailable", level=Level.ERROR, why=fault.message)
    return Paying(service, service.workers, service.rekey)


def billing_with(
    billing: BillingConfig,
    config: Config,
    world: World,
    books: Credits,
    *,
    session: aiohttp.ClientSession,
    ledger: Ledger,
    node: Callable[[], NodeId],
    alerts: AlertSender | None = None,
) -> Billing:
    """Billing through the configured Stripe account; nothing is asked of it yet.

    Raises:
        ValueError: the extra is not installed.
    """
    try:
        from mppnode.billing.service import Billing
        from mppnode.gateways.stripe_api import BASE_URL, StripeGateway
    except ModuleNotFoundError:
        raise ValueError("[billing] needs the extra: pip install 'mppnode[stripe]'") from None

    def below(limit: int) -> int:
        return int.from_bytes(world.entropy(8)) % limit

    gateway = StripeGateway(
        billing.secret_key,
        session=session,
        below=below,
        log=world.log,
        base_url=billing.api_base or BASE_URL,
        on_call=books.metrics.stripe_called,
    )
    return Billing(
        gateway,
        books,
        ledger=ledger,
        node=node,
        clock=world.clock,
        config=billing,
        trust=config.accounts.trust_limits,
        entropy=world.entropy,
        log=world.log,
        alerts=alerts,
        probe=world.probe,
    )
