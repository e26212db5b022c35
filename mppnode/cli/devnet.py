"""The development network in one process: a chain, a provider and a node, on free ports, with money for two accounts.

DEVELOPMENT ONLY: the chain is a look-alike that mints on request, and the keys are made up at every start.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from aiohttp import web

from channels.descriptor import RESERVE_ADDRESS, Escrow, SessionProtocol
from channels.ids import Address, parse_address, to_hex
from channels.signature import address_of
from channels.units import Pico, Units, format_decimal, units_floor
from mppnode.accounts.forms import Gift, KeyForm, Opening
from mppnode.accounts.model import AccountKind, Prepaid
from mppnode.app import Node
from mppnode.chain.devchain import DevChain
from mppnode.cli.devchain_server import start_devchain
from mppnode.cli.devprovider_server import DevProviderServer, start_devprovider
from mppnode.config.accounts import NO_ACCOUNTS_SECTION, AccountsConfig, AdminConfig
from mppnode.config.billing import BillingConfig
from mppnode.config.ops import MetricsConfig
from mppnode.config.schema import (
    ChainConfig,
    Config,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    NodeConfig,
    ProviderConfig,
    SessionConfig,
    TreasuryConfig,
)
from mppnode.config.secrets import Secret
from mppnode.config.traces import TracesConfig
from mppnode.kernel.clock import Clock, SystemClock
from mppnode.observe.logs import Log, quiet
from mppnode.parts import World

CHAIN_ID: Final = 1337
PATH_USD: Final = parse_address("0x20c0000000000000000000000000000000000000", field="token")
V1_ESCROW: Final = parse_address("0xe1c4d3dce17bc111181ddf716f75bae49e61a336", field="escrow")
FUNDS: Final = Units(100_000_000)
_CREDIT: Final = Pico(10 * 10**12)  # ten dollars
MODELS: Final = (
    "dev/story",
    "dev/echo",
    "dev/slow",
    "dev/burst",
    "dev/dies-after-3",
    "dev/no-usage",
    "dev/usage-shrinks",
    "dev/usage-huge",
    "dev/never-ends",
    "dev/garbage",
    "dev/stalls",
    "dev/error-500",
    "dev/error-in-200",
    "dev/injects",
    "dev/injects-cr",
    "dev/finish-only",
    "dev/rate-limited",
    "dev/stalls-first",
    "dev/stalls-mid",
    "dev/garbage-200",
    "dev/lies-high",
    "dev/lies-low",
    "dev/drip",
    "dev/empty",
    "dev/closes-early",
)


@dataclass(frozen=True, slots=True)
class DevnetOptions:
    """What may differ between development networks; ports of 0 are chosen by the system."""

    host: str = "127.0.0.1"
    """What the network is called by: in URLs, and as the realm clients compare with the host they asked."""
    listen: str | None = None
    """Where chain and node listen, if that is not ``host``: in a container, whose ports are published as the host's."""
    node_port: int = 0
    chain_port: int = 0
    provider_port: int = 0
    tokens_per_second: float = 100.0
    input: Pico = Pico(500_000)
    output: Pico = Pico(10_000_000)
    session: SessionConfig = field(
        default_factory=lambda: SessionConfig(
            protocols=(SessionProtocol.V2, SessionProtocol.V1),
            min_deposit=Units(1_000),
            suggested_deposit=Units(100_000),
            chain_ttl_s=0,
        )
    )
    limits: LimitsConfig = field(default_factory=lambda: LimitsConfig(drain_s=2))
    treasury: TreasuryConfig = field(default_factory=TreasuryConfig)
    accounts: AccountsConfig = NO_ACCOUNTS_SECTION
    billing: BillingConfig | None = None
    admin: AdminConfig | None = None
    metrics: MetricsConfig | None = None
    traces: TracesConfig | None = None
    directory: Path | None = None
    payee_key: bytes | None = None


class Devnet:
    """Chain, provider and node; use as an async context manager."""

    def __init__(
        self,
        options: DevnetOptions,
        *,
        log: Log = quiet,
        clock: Clock | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.options = options
        self.clock = clock or SystemClock()
        self.log = log
        self.entropy = entropy
        self.payer_key = entropy(32)
        self.payee_key = options.payee_key or entropy(32)
        self.chain = DevChain(self.clock, chain_id=CHAIN_ID, v1_address=V1_ESCROW)
        self.chain_url = ""
        self.fatal: BaseException | None = None
        self.spool: Path | None = None
        self.escrow = Escrow(SessionProtocol.V2, CHAIN_ID, RESERVE_ADDRESS)
        self._exit = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.node.stop()
        await self._exit.aclose()

    async def _start(self) -> None:
        options = self.options
        directory = options.directory or Path(self._exit.enter_context(tempfile.TemporaryDirectory()))
        for owner in (self.payer, self.payee):
            self.chain.fund(owner, FUNDS)
        listen = options.listen or options.host
        runner, chain_url = await start_devchain(self.chain, listen, options.chain_port)
        self.chain_url = self._called(chain_url)
        self._exit.push_async_callback(_cleanup, runner)
        self.provider: DevProviderServer = await start_devprovider(
            options.host, options.provider_port, tokens_per_second=options.tokens_per_second
        )
        self._exit.push_async_callback(self.provider.stop)
        self.directory = directory
        self.node = self.new_node(options.node_port)
        await self.node.start()

    def new_node(self, port: int = 0) -> Node:
        """A node on this network's ledger; start it only when no other runs."""
        world = World(self.clock, self.entropy, self.log, self._on_fatal)
        return Node(self.config(port), world)

    def config(self, port: int = 0) -> Config:
        """The configuration of this network's node."""
        options = self.options
        models = tuple(
            ModelConfig(name, "dev", name, options.input, options.input, options.output, 128_000, 100_000)
            for name in MODELS
        )
        return Config(
            node=NodeConfig(
                realm=options.host,
                challenge_secrets=(Secret(self.payee_key.hex().encode()),),
                ledger=self.directory / "ledger.sqlite",
                host=options.listen or options.host,
                port=port,
                spool=self.spool,
            ),
            chain=ChainConfig(
                rpc_url=self.chain_url,
                chain_id=CHAIN_ID,
                token=PATH_USD,
                payee_key=Secret(self.payee_key),
                fee_token=PATH_USD,
                v1_escrow=V1_ESCROW,
            ),
            session=options.session,
            limits=options.limits,
            providers=(ProviderConfig("dev", f"{self.provider.url}/v1"),),
            models=models,
            log=LogConfig(),
            treasury=options.treasury,
            accounts=options.accounts,
            billing=options.billing,
            admin=options.admin,
            metrics=options.metrics,
            traces=options.traces,
        )

    def _on_fatal(self, error: BaseException) -> None:
        self.fatal = error

    @property
    def payer(self) -> Address:
        """The funded payer's address."""
        return address_of(self.payer_key)

    @property
    def payee(self) -> Address:
        """The node's address."""
        return address_of(self.payee_key)

    @property
    def chat_url(self) -> str:
        """Where to send chat requests."""
        return f"{self._called(self.node.url)}/v1/chat/completions"

    def _called(self, url: str) -> str:
        """A URL of something that listens for us, as clients write it: nobody can ask for 0.0.0.0."""
        return f"http://{self.options.host}:{url.rpartition(':')[2]}"

    async def new_customer(self) -> str:
        """Open an account with ten dollars of credit; returns the text of its key."""
        customers = self.node.customers
        assert customers is not None
        account = await customers.accounts.create(Opening("developer", AccountKind.USER, None, Prepaid()))
        await customers.accounts.grant(account.id, Gift(_CREDIT, "development"))
        made = await customers.keyring.create(account.id, KeyForm({"name": "devnet"}))
        return made.secret.text

    def describe(self, api_key: str) -> str:
        """What a person needs to use this network."""
        lines = (
            "mppnode development network - NOT REAL MONEY, keys are thrown away",
            "",
            f"  node      {self._called(self.node.url)}",
            f"  chain     {self.chain_url}   (chain id {CHAIN_ID}, a look-alike)",
            f"  provider  {self.provider.url}",
            f"  payer     {to_hex(self.payer)}   holds {format_decimal(FUNDS)} USD",
            f"  payer key {to_hex(self.payer_key)}",
            f"  payee     {to_hex(self.payee)}",
            "",
            "Ask what a request costs:",
            "",
            f"  curl -i {self.chat_url} -H 'content-type: application/json' \\",
            '    -d \'{"model": "dev/story", "messages": [{"role": "user", "content": "hello"}]}\'',
            "",
            "Pay for one (the payer key above is read from the environment):",
            "",
            f"  MPPNODE_PAYER_KEY={to_hex(self.payer_key)} \\",
            f"    mppnode pay {self.chat_url} --rpc {self.chain_url} --chain {CHAIN_ID} --model dev/story 'hello'",
            "",
            f"Or with an API key, which has {format_decimal(units_floor(_CREDIT))} USD of credit:",
            "",
            f"  curl -N {self.chat_url} -H 'content-type: application/json' \\",
            f"    -H 'authorization: Bearer {api_key}' \\",
            '    -d \'{"model": "dev/story", "messages": [{"role": "user", "content": "hello"}]}\'',
            "",
            "Ctrl-C stops everything.",
        )
        return "\n".join(lines)


async def _cleanup(runner: web.AppRunner) -> None:
    await runner.cleanup()
