"""Takes up a changed configuration while the node runs: what may change is exchanged in one step, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from channels.wire.challenge import ChallengeMac
from mppnode.accounts.directory import Tokens
from mppnode.config.accounts import JwtConfig
from mppnode.config.billing import BillingConfig
from mppnode.config.difference import changed_keys, same
from mppnode.config.load import ConfigError
from mppnode.config.schema import Config
from mppnode.customers import Customers
from mppnode.engine.chat import ChatEngine
from mppnode.metering.tokenizer import TokenizerError
from mppnode.observe.logs import Level, Log
from mppnode.paying import Paying
from mppnode.pricing.entries import CatalogError
from mppnode.providers.transport import Transport
from mppnode.rails.session import SessionRail
from mppnode.selling import Sales, hosts, public_hosts

UNUSABLE: Final = (ConfigError, CatalogError, TokenizerError, ValueError)
"""What is raised for a configuration that cannot be taken up; each says in words what is wrong."""


@dataclass(frozen=True, slots=True)
class Running:
    """The parts of a running node that can be told something new."""

    sales: Sales
    engine: ChatEngine
    transport: Transport
    rail: SessionRail
    customers: Customers
    paying: Paying
    tokens: Callable[[JwtConfig], Awaitable[Tokens]]
    """Opens the reader of an issuer's tokens."""

    async def take(self, old: Config, new: Config) -> None:
        """Exchange everything that differs: built first, then put in force without a pause in between.

        Raises:
            CatalogError, TokenizerError, ValueError: nothing has changed.
        """
        stock = None
        if any(not same(getattr(old, table), getattr(new, table)) for table in _SOLD):
            # In a thread: a large catalog and a tokenizer take long enough to be felt by every stream.
            stock = await asyncio.to_thread(self.sales.prepare, new)
        mac = ChallengeMac(tuple(secret.reveal() for secret in new.node.challenge_secrets))
        jwt, told = new.accounts.jwt, not same(old.accounts.jwt, new.accounts.jwt)
        tokens = await self.tokens(jwt) if told and jwt is not None else None
        if stock is not None:
            public = public_hosts(new)
            self.transport.guard(public, freed=hosts(new) - public)
            self.sales.adopt(stock)
            self.engine.restock(stock.counters, attempts_max=new.routing.attempts_max)
        self.rail.rekey(mac)
        if told:
            self.customers.directory.trust(tokens)
        if new.billing is not None and not same(old.billing, new.billing):
            self.paying.rekey(new.billing)


_SOLD: Final = ("providers", "models", "pricing", "routing")


def taken_up(old: Config, new: Config) -> Config:
    """``old`` with everything of ``new`` that takes effect without a restart."""
    admin = old.admin
    if admin is not None and new.admin is not None:
        admin = replace(admin, token=new.admin.token)
    return replace(
        old,
        providers=new.providers,
        models=new.models,
        pricing=new.pricing,
        routing=new.routing,
        node=replace(old.node, challenge_secrets=new.node.challenge_secrets),
        accounts=replace(old.accounts, jwt=new.accounts.jwt),
        billing=_billing(old.billing, new.billing),
        admin=admin,
    )


def _billing(old: BillingConfig | None, new: BillingConfig | None) -> BillingConfig | None:
    # A key belongs to its mode and its address: taken without them it would be sent to the wrong place.
    if old is None or new is None or (old.livemode, old.api_base) != (new.livemode, new.api_base):
        return old
    return replace(old, secret_key=new.secret_key, webhook_secrets=new.webhook_secrets)


class Reloadable(Protocol):
    """Something that runs and can be told of another configuration."""

    async def reload(self, config: Config) -> None:
        """Take up what may change. Raises :data:`UNUSABLE`: nothing has changed."""
        ...


class Reloader:
    """Reads the configuration again whenever it is asked to; askers during a reload are served by one more."""

    def __init__(
        self,
        config: Config,
        *,
        load: Callable[[], Config],
        service: Reloadable | None,
        log: Log,
        asked: asyncio.Event | None = None,
    ) -> None:
        """``load`` reads the file; ``service`` is None when nothing can be changed without a restart.

        ``asked`` is set by whoever wants a reload, as :meth:`ask` does.
        """
        self._config = config
        self._load = load
        self._service = service
        self._log = log
        self._asked = asked or asyncio.Event()

    def ask(self) -> None:
        """Reload soon; may be called from a signal handler of the loop, as often as anybody likes."""
        self._asked.set()

    async def keep(self) -> None:
        """Reload when asked, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self.reload()

    async def reload(self) -> None:
        """Read the file and take it up; if anything is wrong with it, all stays as it is and the log says why."""
        try:
            new = await asyncio.to_thread(self._load)
            config = self._config if self._service is None else taken_up(self._config, new)
            tables = _tables(changed_keys(self._config, config))
            if tables and self._service is not None:
                await self._service.reload(config)
        except Exception as error:  # noqa: BLE001 - one that went past here would be the last reload of this process
            self._log("config.refused", level=Level.ERROR, problems=_problems(error))
            return
        self._config = config
        self._log("config.reloaded", tables=tables)
        if keys := changed_keys(config, new):
            self._log("config.needs_restart", level=Level.WARNING, keys=list(keys))


def _problems(error: Exception) -> list[str]:
    if isinstance(error, ConfigError):
        return error.problems
    # Of what we did not foresee the type alone: its text may quote the file, or a secret.
    return [str(error) if isinstance(error, UNUSABLE) else f"not taken up: {type(error).__name__}"]


def _tables(keys: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in keys))
