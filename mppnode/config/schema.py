"""The node's configuration as frozen values. ``load.py`` builds them; nothing else does, except tests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from channels.descriptor import SessionProtocol
from channels.ids import Address
from channels.units import Pico, Units
from mppnode.config.accounts import NO_ACCOUNTS_SECTION, AccountsConfig, AdminConfig
from mppnode.config.billing import BillingConfig
from mppnode.config.ops import MetricsConfig
from mppnode.config.secrets import Secret
from mppnode.config.traces import TracesConfig
from mppnode.kernel.listing import Ability, ProviderKind
from mppnode.kernel.strategy import PriceCeiling, Strategy


class LogFormat(StrEnum):
    """How log lines are written."""

    AUTO = "auto"
    """Text in a terminal, JSON otherwise."""
    JSON = "json"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """``[node]``."""

    realm: str
    challenge_secrets: tuple[Secret[bytes], ...]
    ledger: Path | Secret[str]
    """A SQLite file, or the URL of a PostgreSQL database, which holds a password."""
    host: str = "127.0.0.1"
    port: int = 8402
    name: str = "node"
    """Of this process among those that share the ledger; a process takes over from an earlier one of its name."""
    workers: int = 1
    spool: Path | None = None
    """A file for a second copy of accepted vouchers; best on another disk than the ledger."""


@dataclass(frozen=True, slots=True)
class ChainConfig:
    """``[chain]``."""

    rpc_url: str
    chain_id: int
    token: Address
    payee_key: Secret[bytes]
    fee_token: Address
    v1_escrow: Address | None = None


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """``[session]``. Amounts in base units, times in seconds."""

    protocols: tuple[SessionProtocol, ...] = (SessionProtocol.V2,)
    min_deposit: Units = Units(1_000_000)
    suggested_deposit: Units = Units(1_000_000)
    min_voucher_delta: Units = Units(0)
    preauthorise_max: Units = Units(50_000)
    window_units_max: int = 2_000
    voucher_wait_s: int = 60
    challenge_ttl_s: int = 300
    chain_ttl_s: int = 5


@dataclass(frozen=True, slots=True)
class TreasuryConfig:
    """``[treasury]``. Amounts in base units, times in seconds; see ``treasury/treasurer.py`` for the reasons."""

    settle_fees: int = 20
    settle_age_s: int = 6 * 3600
    exposure_max: Units = Units(5_000_000)
    idle_close_s: int = 30 * 24 * 3600
    second_rpc_url: str | None = None
    agree_above: Units = Units(5_000_000)
    sponsor: bool = False
    sponsor_fee_max: Units = Units(50_000)
    sponsor_budget: Units = Units(1_000_000)
    sponsor_grants_per_hour: int = 10


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """``[limits]``."""

    body_bytes_max: int = 1024 * 1024
    streams_max: int = 2_000
    first_token_s: int = 60
    idle_s: int = 30
    total_s: int = 3_600
    stall_s: int = 15
    drain_s: int = 30
    drain_delay_s: int = 0
    """How long a node that was told to stop goes on serving, so that balancers see it leave first."""


@dataclass(frozen=True, slots=True)
class QuirksConfig:
    """``[providers.quirks]``: where one server differs from what its preset says; None leaves it to the preset."""

    limit_field: Literal["max_tokens", "max_completion_tokens"] | None = None
    """What it calls the most tokens it may generate."""
    continuous_usage: bool | None = None
    """Whether it reports usage with every event when asked to."""
    include_usage: bool | None = None
    """Whether it may be asked for usage at the end of a stream."""
    reasoning_added: bool | None = None
    """Whether its reasoning tokens come on top of the completion's instead of being part of them."""
    cancel_stops_billing: bool | None = None


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """One ``[[providers]]`` entry."""

    name: str
    base_url: str
    kind: ProviderKind = ProviderKind.NATIVE
    api_key: Secret[str] | None = None
    preset: str | None = None
    """A name of ``config.presets.PRESETS``; None is a server that speaks the OpenAI API."""
    quirks: QuirksConfig = QuirksConfig()
    models: tuple[str, ...] = ()
    """The models of the catalog file it sells; ``("*",)`` is all the file has for it."""
    markup_bps: int | None = None
    """On its cost, in hundredths of a percent; None is the ``[pricing]`` one."""
    insecure: bool = False
    """Whether plain http to a host that is not a private address is meant."""


DEFAULT_ABILITIES: Final = Ability.TOOLS | Ability.JSON_SCHEMA | Ability.LOGPROBS | Ability.CHOICES
"""What an OpenAI-compatible server of one's own can do, unless the configuration says otherwise."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One ``[[models]]`` entry. Prices in pico-dollars per token; ``context`` and ``max_output`` in tokens.

    The prices are what a caller pays: no markup is added to what the operator writes here. An unwritten ``cache_write``
    costs what input does and an unwritten ``reasoning`` what output does, as :class:`mppnode.kernel.rates.Rates` says.
    """

    id: str
    provider: str
    upstream_model: str
    input: Pico
    cached_input: Pico
    output: Pico
    context: int
    max_output: int
    cache_write: Pico | None = None
    reasoning: Pico | None = None
    request: Pico = Pico(0)
    image: Pico = Pico(0)
    audio_second: Pico = Pico(0)
    abilities: Ability = DEFAULT_ABILITIES
    quality: int = 0
    tokenizer: Path | None = None
    """A tokenizer's file, to count with where the provider reports no usage."""


@dataclass(frozen=True, slots=True)
class PricingConfig:
    """``[pricing]``."""

    catalog: Path | None = None
    """The catalog file; None only where a configuration is built without one, as the development network's is."""
    stale_s: int = 7 * 24 * 3600
    """How old a synchronised price may be and still be sold at."""
    band_pct: int = 20
    """How much dearer than the cheapest a provider may be and still be chosen (0 is strictly the cheapest)."""
    markup_bps: int = 0
    """On every provider's cost, in hundredths of a percent."""


Optimize = Literal["balanced", "quality", "cost", "latency"]


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    """``[routing]``: what holds where neither the request nor its account says otherwise."""

    strategy: Strategy = Strategy.BALANCED
    allow_external: bool | None = None
    """None leaves it to the strategy: the cheapest is looked for among our own, the others may go outside."""
    ceiling: PriceCeiling | None = None
    attempts_max: int = 3
    seed_compat: bool = False
    """Whether the price band is drawn from evenly instead of by price."""
    model_pool: tuple[str, ...] = ()
    """What ``model: "auto"`` chooses from; empty is everything on sale."""
    optimize: Optimize = "balanced"


@dataclass(frozen=True, slots=True)
class LogConfig:
    """``[log]``."""

    level: str = "info"
    format: LogFormat = LogFormat.AUTO
    levels: tuple[tuple[str, str], ...] = ()
    """Levels of events by the first word of their names, where they differ."""


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a node needs to start."""

    node: NodeConfig
    chain: ChainConfig
    session: SessionConfig
    limits: LimitsConfig
    providers: tuple[ProviderConfig, ...]
    models: tuple[ModelConfig, ...]
    log: LogConfig
    treasury: TreasuryConfig = TreasuryConfig()
    pricing: PricingConfig = PricingConfig()
    routing: RoutingConfig = RoutingConfig()
    accounts: AccountsConfig = NO_ACCOUNTS_SECTION
    billing: BillingConfig | None = None
    """None when nothing is sold through a payment processor."""
    admin: AdminConfig | None = None
    metrics: MetricsConfig | None = None
    """None when there is no listener for operators."""
    traces: TracesConfig | None = None
    """None when nobody is sent any."""
