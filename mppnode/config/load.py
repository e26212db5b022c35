"""Reads a configuration file whole and reports everything that is wrong with it at once, each by its key."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from channels.descriptor import SessionProtocol
from channels.faults import ChannelFault
from channels.ids import Address, parse_address
from channels.signature import address_of
from channels.units import Pico, Units, parse_decimal
from channels.wire.challenge import SECRET_BYTES_MIN
from mppnode.config.rates import parse_rate
from mppnode.config.schema import (
    ChainConfig,
    Config,
    LimitsConfig,
    LogConfig,
    LogFormat,
    ModelConfig,
    NodeConfig,
    ProviderConfig,
    SessionConfig,
    TreasuryConfig,
)
from mppnode.config.secrets import Secret
from mppnode.kernel.listing import ProviderKind

T = TypeVar("T")

_MISSING: Final = object()
_REALM = re.compile(r"[A-Za-z0-9.-]{1,253}(?::[0-9]{1,5})?", re.ASCII)
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,255}", re.ASCII)
_URL = re.compile(r"https?://[A-Za-z0-9.\[\]:_-]+(?:/[^\s?#]*)?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_LEVELS: Final = ("debug", "info", "warning", "error")


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
    root = _Section(tree, "", problems, environ, base)
    node, chain = _node(root.section("node")), _chain(root.section("chain"))
    session, limits = _session(root.section("session", optional=True)), _limits(root.section("limits", optional=True))
    log = _log(root.section("log", optional=True))
    treasury = _treasury(root.section("treasury", optional=True))
    providers = tuple(_provider(section) for section in root.sections("providers"))
    models = tuple(_model(section) for section in root.sections("models"))
    root.done()
    names = {provider.name for provider in providers}
    for label, values in (("providers.name", [p.name for p in providers]), ("models.id", [m.id for m in models])):
        twice = sorted({value for value in values if values.count(value) > 1})
        problems += [f"{label}: {value!r} is used twice" for value in twice]
    problems += [
        f"models: {model.id!r} names provider {model.provider!r}, which is not configured"
        for model in models
        if model.provider and model.provider not in names
    ]
    if SessionProtocol.V1 in session.protocols and chain.v1_escrow is None:
        problems.append('chain.v1_escrow: is required when session.protocols has "v1"')
    if problems:
        raise ConfigError(problems)
    return Config(node, chain, session, limits, providers, models, log, treasury)


class _Section:
    """One table of the file. A getter that records a problem still returns a usable value, so checking goes on."""

    def __init__(
        self, values: dict[str, Any], path: str, problems: list[str], environ: Mapping[str, str], base: Path
    ) -> None:
        self.values = values
        self._path = path
        self._problems = problems
        self._environ = environ
        self._used: set[str] = set()
        self.base = base

    def section(self, name: str, *, optional: bool = False) -> _Section:
        self._used.add(name)
        value = self.values.get(name, {} if optional else _MISSING)
        if not isinstance(value, dict):
            self.problem(name, "section is missing" if value is _MISSING else "must be a table")
            value = {}
        return self._child(value, name)

    def sections(self, name: str) -> list[_Section]:
        self._used.add(name)
        value = self.values.get(name, [])
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            self.problem(name, f"needs at least one [[{name}]] table")
            return []
        return [self._child(item, f"{name}[{index}]") for index, item in enumerate(value)]

    def _child(self, values: dict[str, Any], name: str) -> _Section:
        return _Section(values, self._key(name), self._problems, self._environ, self.base)

    def _key(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def problem(self, name: str, detail: str) -> None:
        self._problems.append(f"{self._key(name)}: {detail}")

    def get(self, name: str, read: Callable[[Any], T], default: Any = _MISSING, *, fallback: T) -> T:
        """Read one key through ``read``, which raises ``ValueError`` in words fit for people."""
        self._used.add(name)
        value = self.values.get(name, _MISSING)
        if value is _MISSING:
            if default is _MISSING:
                self.problem(name, "is required")
                return fallback
            return default  # type: ignore[no-any-return]
        try:
            return read(value)
        except ChannelFault as fault:
            self.problem(name, fault.detail)
        except ValueError as error:
            self.problem(name, str(error))
        return fallback

    def text(self, name: str, pattern: re.Pattern[str], example: str, default: Any = _MISSING) -> str:
        def read(value: Any) -> str:
            if not isinstance(value, str) or pattern.fullmatch(value) is None:
                raise ValueError(f"must look like {example}")
            return value

        return self.get(name, read, default, fallback="")

    def whole(self, name: str, low: int, high: int, default: Any = _MISSING) -> int:
        def read(value: Any) -> int:
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"must be an integer from {low} to {high}")
            return value

        return self.get(name, read, default, fallback=low)

    def usd(self, name: str, default: Units) -> Units:
        return self.get(name, lambda value: parse_decimal(_str(value), field=name), default, fallback=default)

    def address(self, name: str, default: Any = _MISSING) -> Address:
        return self.get(name, lambda value: parse_address(value, field=name), default, fallback=Address(bytes(20)))

    def secret(self, name: str, read: Callable[[str], T], *, required: bool = True) -> T | None:
        default = _MISSING if required else None
        return self.get(name, lambda value: read(self._resolve(value)), default, fallback=None)

    def _resolve(self, value: Any) -> str:
        """A secret is named, never written in the file: ``{ env = "NAME" }`` or ``{ file = "path" }``."""
        match value:
            case {"env": str(name), **rest} if not rest:
                if not self._environ.get(name):
                    raise ValueError(f"environment variable {name} is not set")
                return self._environ[name]
            case {"file": str(name), **rest} if not rest:
                try:
                    return (self.base / name).read_text(encoding="utf-8").strip()
                except (OSError, UnicodeDecodeError):
                    raise ValueError("its file cannot be read") from None
            case _:
                raise ValueError('must be { env = "NAME" } or { file = "path" }, never the secret itself')

    def secrets(self, name: str, read: Callable[[str], T]) -> tuple[T, ...]:
        def every(value: Any) -> tuple[T, ...]:
            if not isinstance(value, list) or not value:
                raise ValueError("must be a list of at least one secret")
            return tuple(read(self._resolve(item)) for item in value)

        return self.get(name, every, fallback=())

    def done(self) -> None:
        for name in self.values:
            if name not in self._used:
                near = difflib.get_close_matches(name, self._used, n=1)
                self.problem(name, f"is not a known key{f'; did you mean {near[0]}?' if near else ''}")


def _str(value: Any) -> str:
    if not isinstance(value, str):
        # A TOML float would already have lost digits.
        raise ValueError('must be text; decimals are written as "1.50"')  # noqa: TRY004 - words for people
    return value


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


def _node(section: _Section) -> NodeConfig:
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


def _ledger(section: _Section) -> Path | Secret[str]:
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


def _treasury(section: _Section) -> TreasuryConfig:
    base = TreasuryConfig()
    config = TreasuryConfig(
        settle_fees=section.whole("settle_fees", 1, 10_000, base.settle_fees),
        settle_age_s=section.whole("settle_age_s", 60, 30 * 86_400, base.settle_age_s),
        exposure_max=section.usd("exposure_max", base.exposure_max),
        idle_close_s=section.whole("idle_close_s", 60, 365 * 86_400, base.idle_close_s),
        second_rpc_url=section.get("second_rpc_url", _url, None, fallback=None),
        agree_above=section.usd("agree_above", base.agree_above),
        sponsor=section.get("sponsor", _flag, base.sponsor, fallback=base.sponsor),
        sponsor_fee_max=section.usd("sponsor_fee_max", base.sponsor_fee_max),
        sponsor_budget=section.usd("sponsor_budget", base.sponsor_budget),
        sponsor_grants_per_hour=section.whole("sponsor_grants_per_hour", 1, 1_000, base.sponsor_grants_per_hour),
    )
    section.done()
    return config


def _url(value: Any) -> str:
    if not isinstance(value, str) or _URL.fullmatch(value) is None:
        raise ValueError("must look like https://rpc.example.com")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004 - words for people
    return value


def _chain(section: _Section) -> ChainConfig:
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


def _session(section: _Section) -> SessionConfig:
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


def _limits(section: _Section) -> LimitsConfig:
    base = LimitsConfig()
    config = LimitsConfig(
        body_bytes_max=section.whole("body_bytes_max", 1_024, 16 * 1024 * 1024, base.body_bytes_max),
        streams_max=section.whole("streams_max", 1, 100_000, base.streams_max),
        first_token_s=section.whole("first_token_s", 1, 600, base.first_token_s),
        idle_s=section.whole("idle_s", 1, 600, base.idle_s),
        stall_s=section.whole("stall_s", 1, 600, base.stall_s),
        drain_s=section.whole("drain_s", 0, 600, base.drain_s),
    )
    section.done()
    return config


def _provider(section: _Section) -> ProviderConfig:
    def kind(value: Any) -> ProviderKind:
        try:
            return ProviderKind(value)
        except ValueError:
            raise ValueError("must be one of " + ", ".join(ProviderKind)) from None

    config = ProviderConfig(
        name=section.text("name", re.compile(r"[a-z0-9][a-z0-9_-]{0,63}"), "my-vllm"),
        base_url=section.text("base_url", _URL, "https://inference.example.com/v1").rstrip("/"),
        kind=section.get("kind", kind, ProviderKind.NATIVE, fallback=ProviderKind.NATIVE),
        api_key=section.secret("api_key", Secret[str], required=False),
    )
    section.done()
    return config


def _model(section: _Section) -> ModelConfig:
    def usd(value: Any) -> Pico:
        return parse_rate(_str(value))

    free = Pico(0)
    name = section.text("id", _MODEL_ID, "qwen/qwen3.5-9b")
    rate = section.get("input_usd_per_million", usd, fallback=free)
    config = ModelConfig(
        id=name,
        provider=section.get("provider", _str, fallback=""),
        upstream_model=section.get("upstream_model", _str, name, fallback=name),
        input=rate,
        cached_input=section.get("cached_input_usd_per_million", usd, rate, fallback=rate),
        output=section.get("output_usd_per_million", usd, fallback=free),
        context=section.whole("context", 1, 100_000_000),
        max_output=section.whole("max_output", 1, 10_000_000),
    )
    if not config.input and not config.output:
        section.problem("output_usd_per_million", "is zero like the input price: a free model cannot be quoted")
    section.done()
    return config


def _log(section: _Section) -> LogConfig:
    def level(value: Any) -> str:
        if value not in _LEVELS:
            raise ValueError("must be one of " + ", ".join(_LEVELS))
        return str(value)

    def form(value: Any) -> LogFormat:
        try:
            return LogFormat(value)
        except ValueError:
            raise ValueError('must be "json" or "text"') from None

    config = LogConfig(
        level=section.get("level", level, "info", fallback="info"),
        format=section.get("format", form, LogFormat.JSON, fallback=LogFormat.JSON),
    )
    section.done()
    return config


def environment() -> Mapping[str, str]:
    """The process environment, read in one place."""
    return os.environ
