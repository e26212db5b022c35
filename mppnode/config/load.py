"""Reads a configuration file whole and reports everything that is wrong with it at once, each by its key."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from channels.descriptor import SessionProtocol
from channels.ids import parse_address
from channels.signature import address_of
from channels.wire.challenge import SECRET_BYTES_MIN
from mppnode.config.accounts import read_accounts, read_admin
from mppnode.config.billing import read_billing
from mppnode.config.catalog import read_model, read_pricing, read_provider, read_routing
from mppnode.config.log import read_log
from mppnode.config.ops import read_metrics
from mppnode.config.schema import (
    ChainConfig,
    Config,
    LimitsConfig,
    ModelConfig,
    NodeConfig,
    ProviderConfig,
    SessionConfig,
    TreasuryConfig,
)
from mppnode.config.secrets import Secret
from mppnode.config.section import Section, flag_of
from mppnode.config.traces import read_traces

_REALM = re.compile(r"[A-Za-z0-9.-]{1,253}(?::[0-9]{1,5})?", re.ASCII)
_URL = re.compile(r"https?://[A-Za-z0-9.\[\]:_-]+(?:/[^\s?#]*)?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


class ConfigError(Exception):
    """The configuration cannot be used; ``problems`` has one line per key at fault."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Read and check a configuration file; nothing is started, and relative paths are relative to the file.

    Raises:
        ConfigError: with every problem found, not only the first.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: is not TOML: {error}"]) from None
    return parse_config(tree, environ, base=path.parent)


def parse_config(tree: dict[str, Any], environ: Mapping[str, str], *, base: Path) -> Config:
    """Check a decoded configuration. Raises ``ConfigError`` with every problem."""
    problems: list[str] = []
    root = Section(tree, "", problems, environ, base)
    node, chain = _node(root.section("node")), _chain(root.section("chain"))
    session, limits = _session(root.section("session", optional=True)), _limits(root.section("limits", optional=True))
    log = read_log(root.section("log", optional=True))
    treasury = _treasury(root.section("treasury", optional=True))
    pricing = read_pricing(root.section("pricing", optional=True))
    routing = read_routing(root.section("routing", optional=True))
    providers = tuple(read_provider(section) for section in root.sections("providers"))
    sells = any(provider.models for provider in providers)
    models = tuple(read_model(section) for section in root.sections("models", optional=sells))
    accounts = read_accounts(root.section("accounts", optional=True))
    billing = read_billing(root.section("billing")) if "billing" in tree else None
    admin = read_admin(root.section("admin")) if "admin" in tree else None
    metrics = read_metrics(root.section("metrics")) if "metrics" in tree else None
    traces = read_traces(root.section("traces")) if "traces" in tree else None
    root.done()
    problems += _contradictions(providers, models)
    second = treasury.second_rpc_url
    if second is not None and _same_endpoint(second, chain.rpc_url):
        problems.append("treasury.second_rpc_url: is chain.rpc_url again, and one node cannot disagree with itself")
    if SessionProtocol.V1 in session.protocols and chain.v1_escrow is None:
        problems.append('chain.v1_escrow: is required when session.protocols has "v1"')
    if problems:
        raise ConfigError(problems)
    return Config(
        node,
        chain,
        session,
        limits,
        providers,
        models,
        log,
        treasury,
        pricing,
        routing,
        accounts,
        billing,
        admin,
        metrics,
        traces,
    )


def _contradictions(providers: tuple[ProviderConfig, ...], models: tuple[ModelConfig, ...]) -> list[str]:
    names = [provider.name for provider in providers]
    found = [f"providers.name: {name!r} is used twice" for name in sorted(set(names)) if names.count(name) > 1]
    # One model of several providers is what the router lives on; twice at one of them, its price would be a guess.
    offers = [(model.id, model.provider) for model in models]
    found += [
        f"models.id: {name!r} of provider {provider!r} is used twice"
        for name, provider in sorted(set(offers))
        if offers.count((name, provider)) > 1
    ]
    found += [
        f"models: {model.id!r} names provider {model.provider!r}, which is not configured"
        for model in models
        if model.provider and model.provider not in names
    ]
    return found


def _same_endpoint(one: str, other: str) -> bool:
    return one.rstrip("/").lower() == other.rstrip("/").lower()


def _challenge_secret(text: str) -> Secret[bytes]:
    if len(text.encode()) < SECRET_BYTES_MIN:
        raise ValueError(f"must have at least {SECRET_BYTES_MIN} bytes")
    return Secret(text.encode())


def _private_key(text: str) -> Secret[bytes]:
    try:
        key = bytes.fromhex(text.removeprefix("0x"))
        address_of(key)
    except ValueError:
        raise ValueError("is not a 32-byte private key in hex") from None
    return Secret(key)


def _node(section: Section) -> NodeConfig:
    config = NodeConfig(
        realm=section.text("realm", _REALM, "api.example.com"),
        challenge_secrets=section.secrets("challenge_secrets", _challenge_secret),
        ledger=_ledger(section),
        host=section.text("host", re.compile(r"[A-Za-z0-9.:_-]{1,253}"), "127.0.0.1", "127.0.0.1"),
        port=section.whole("port", 0, 65_535, 8402),
        name=section.text("name", _NAME, "node-1", "node"),
        workers=section.whole("workers", 1, 64, 1),
        spool=section.get("spool", lambda value: section.base / _path(value), None, fallback=None),
    )
    section.done()
    return config


def _ledger(section: Section) -> Path | Secret[str]:
    """Text is the path of a SQLite file; a secret is the URL of a PostgreSQL database, since that has a password."""
    if isinstance(section.values.get("ledger"), dict):
        return section.secret("ledger", _database_url) or Secret("")
    return section.base / section.get("ledger", _path, "mppnode.sqlite", fallback="mppnode.sqlite")


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError('must be a path, or { env = "NAME" } with the URL of a PostgreSQL database')
    if "://" in value:
        raise ValueError('is a URL: it may hold a password, so write { env = "NAME" } or { file = "path" }')
    return value


def _database_url(text: str) -> Secret[str]:
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError("must be a postgresql:// URL")
    return Secret(text)


def _treasury(section: Section) -> TreasuryConfig:
    base = TreasuryConfig()
    config = TreasuryConfig(
        settle_fees=section.whole("settle_fees", 1, 10_000, base.settle_fees),
        settle_age_s=section.whole("settle_age_s", 60, 30 * 86_400, base.settle_age_s),
        exposure_max=section.usd("exposure_max", base.exposure_max, zero=False),
        idle_close_s=section.whole("idle_close_s", 60, 365 * 86_400, base.idle_close_s),
        second_rpc_url=section.get("second_rpc_url", _url, None, fallback=None),
        agree_above=section.usd("agree_above", base.agree_above),
        sponsor=section.get("sponsor", flag_of, base.sponsor, fallback=base.sponsor),
        sponsor_fee_max=section.usd("sponsor_fee_max", base.sponsor_fee_max, zero=False),
        sponsor_budget=section.usd("sponsor_budget", base.sponsor_budget, zero=False),
        sponsor_grants_per_hour=section.whole("sponsor_grants_per_hour", 1, 1_000, base.sponsor_grants_per_hour),
    )
    section.done()
    return config


def _url(value: Any) -> str:
    if not isinstance(value, str) or _URL.fullmatch(value) is None:
        raise ValueError("must look like https://rpc.example.com")
    return value


def _chain(section: Section) -> ChainConfig:
    token = section.address("token")
    config = ChainConfig(
        rpc_url=section.text("rpc_url", _URL, "https://rpc.example.com"),
        chain_id=section.whole("chain_id", 1, 2**53 - 1),
        token=token,
        payee_key=section.secret("payee_key", _private_key) or Secret(b""),
        fee_token=section.address("fee_token", token),
        v1_escrow=section.get("v1_escrow", lambda v: parse_address(v, field="v1_escrow"), None, fallback=None),
    )
    section.done()
    return config


def _session(section: Section) -> SessionConfig:
    def protocols(value: Any) -> tuple[SessionProtocol, ...]:
        known = [protocol.value for protocol in SessionProtocol]
        if not isinstance(value, list) or not value or any(item not in known for item in value):
            raise ValueError('must be a list of "v1" and "v2"')
        return tuple(SessionProtocol(item) for item in dict.fromkeys(value))

    base = SessionConfig()
    config = SessionConfig(
        protocols=section.get("protocols", protocols, base.protocols, fallback=base.protocols),
        min_deposit=section.usd("min_deposit", base.min_deposit),
        suggested_deposit=section.usd("suggested_deposit", base.suggested_deposit),
        min_voucher_delta=section.usd("min_voucher_delta", base.min_voucher_delta),
        preauthorise_max=section.usd("preauthorise_max", base.preauthorise_max),
        window_units_max=section.whole("window_units_max", 1, 1_000_000, base.window_units_max),
        voucher_wait_s=section.whole("voucher_wait_s", 1, 3_600, base.voucher_wait_s),
        challenge_ttl_s=section.whole("challenge_ttl_s", 10, 86_400, base.challenge_ttl_s),
        chain_ttl_s=section.whole("chain_ttl_s", 0, 600, base.chain_ttl_s),
    )
    if config.suggested_deposit < config.min_deposit:
        section.problem("suggested_deposit", "is below min_deposit")
    section.done()
    return config


def _limits(section: Section) -> LimitsConfig:
    base = LimitsConfig()
    config = LimitsConfig(
        body_bytes_max=section.whole("body_bytes_max", 1_024, 16 * 1024 * 1024, base.body_bytes_max),
        streams_max=section.whole("streams_max", 1, 100_000, base.streams_max),
        first_token_s=section.whole("first_token_s", 1, 600, base.first_token_s),
        idle_s=section.whole("idle_s", 1, 600, base.idle_s),
        total_s=section.whole("total_s", 10, 86_400, base.total_s),
        stall_s=section.whole("stall_s", 1, 600, base.stall_s),
        drain_s=section.whole("drain_s", 0, 600, base.drain_s),
        drain_delay_s=section.whole("drain_delay_s", 0, 300, base.drain_delay_s),
    )
    section.done()
    return config


def environment() -> Mapping[str, str]:
    """The process environment, read in one place."""
    return os.environ
