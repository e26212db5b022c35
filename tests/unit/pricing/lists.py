"""Entries, configurations and price lists to test with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from channels.ids import Address
from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.config.schema import (
    ChainConfig,
    Config,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    NodeConfig,
    PricingConfig,
    ProviderConfig,
    SessionConfig,
)
from mppnode.config.secrets import Secret
from mppnode.kernel.listing import ProviderKind
from mppnode.kernel.rates import Rates
from mppnode.pricing.entries import Entry

NOW = UnixSeconds(1_900_000_000)


def rates(*values: int) -> Rates:
    """Input, cached input, output and so on, in pico per token."""
    return Rates(*map(Pico, values))


def entry(model: str = "qwen/x", **changes: Any) -> Entry:
    """One entry, priced now at 0.10 and 0.40 dollars per million."""
    made = Entry("infra", model, model, rates(100_000, 100_000, 400_000), 8192, 1024, "https://infra.example/models", NOW)
    return replace(made, **changes)


def config(
    *, models: tuple[ModelConfig, ...] = (), catalog: Path | None = None, stale_s: int = 3600, markup_bps: int = 0, kind: ProviderKind = ProviderKind.NATIVE
) -> Config:
    """A configuration with one provider, ``infra``, that sells everything in the catalog file."""
    return Config(
        NodeConfig("x", (), Path("x")),
        ChainConfig("http://x", 1, Address(bytes(20)), Secret(b""), Address(bytes(20))),
        SessionConfig(),
        LimitsConfig(),
        (ProviderConfig("infra", "https://infra.example", kind, models=("*",)),),
        models,
        LogConfig(),
        pricing=PricingConfig(catalog, stale_s, markup_bps=markup_bps),
    )
