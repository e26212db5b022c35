"""The node's configuration as frozen values. ``load.py`` builds them; nothing else does, except tests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from channels.descriptor import SessionProtocol
from channels.ids import Address
from channels.units import Pico, Units
from mppnode.config.secrets import Secret
from mppnode.kernel.listing import ProviderKind


class LogFormat(StrEnum):
    """How log lines are written."""

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
    stall_s: int = 15
    drain_s: int = 30


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """One ``[[providers]]`` entry."""

    name: str
    base_url: str
    kind: ProviderKind = ProviderKind.NATIVE
    api_key: Secret[str] | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One ``[[models]]`` entry. Prices in pico-dollars per token; ``context`` and ``max_output`` in tokens."""

    id: str
    provider: str
    upstream_model: str
    input: Pico
    cached_input: Pico
    output: Pico
    context: int
    max_output: int


@dataclass(frozen=True, slots=True)
class LogConfig:
    """``[log]``."""

    level: str = "info"
    format: LogFormat = LogFormat.JSON


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
