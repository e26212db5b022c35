"""Reads what is sold and from whom: ``[[providers]]``, ``[[models]]``, ``[pricing]`` and ``[routing]``."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

from channels.units import Pico
from mppnode.config.presets import PRESETS, PresetDefaults
from mppnode.config.rates import parse_each, parse_rate
from mppnode.config.schema import (
    DEFAULT_ABILITIES,
    ModelConfig,
    Optimize,
    PricingConfig,
    ProviderConfig,
    QuirksConfig,
    RoutingConfig,
)
from mppnode.config.secrets import Secret
from mppnode.config.section import Section, flag_of, text_of
from mppnode.config.urls import check_base_url
from mppnode.kernel.listing import Ability, ProviderKind
from mppnode.kernel.strategy import PriceCeiling, Strategy

Choice = TypeVar("Choice", bound=StrEnum)

MODEL_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,255}", re.ASCII)
"""What a model may be called here; it stands in URLs, headers and logs."""
PROVIDER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)
EVERY_MODEL: Final = "*"

_SELLABLE: Final = re.compile(rf"{MODEL_ID.pattern}|\*", re.ASCII)
_UPSTREAM = re.compile(r"[!-~]{1,256}", re.ASCII)
_API_KEY = re.compile(r"[!-~]{1,4096}", re.ASCII)  # one header field: a line break in it would start another
_MODELS_MAX: Final = 10_000  # several times what the largest aggregator lists
_POOL_MAX: Final = 200
_ABILITY_NAMES: Final = {(ability.name or "").lower(): ability for ability in Ability}
_CENTS_MAX: Final = 10**9  # as in a request
MARKUP_BPS_MAX: Final = 100_000
"""Ten times the cost on top: beyond that somebody wrote percent of percent."""


def parse_abilities(value: Any) -> Ability:
    """Read a list of names such as ``["tools", "vision"]``. Raises ``ValueError``."""
    known = ", ".join(_ABILITY_NAMES)
    if not isinstance(value, list) or not all(isinstance(item, str) and item in _ABILITY_NAMES for item in value):
        raise ValueError(f"must be a list of {known}")
    if len(set(value)) != len(value):
        raise ValueError("names one thing twice")
    total = Ability(0)
    for item in value:
        total |= _ABILITY_NAMES[item]
    return total


def ability_names(abilities: Ability) -> list[str]:
    """The names :func:`parse_abilities` reads, in a fixed order."""
    return [name for name, ability in _ABILITY_NAMES.items() if ability in abilities]


def read_provider(section: Section) -> ProviderConfig:
    """One ``[[providers]]`` table; problems are noted in the section."""
    preset = section.get("preset", _preset, None, fallback=None)
    insecure = section.get("insecure", flag_of, default=False, fallback=False)
    config = ProviderConfig(
        name=section.text("name", PROVIDER_NAME, "my-vllm"),
        base_url=_base_url(section, preset, insecure=insecure),
        kind=_choice(section, "kind", ProviderKind, preset.kind if preset else ProviderKind.NATIVE),
        api_key=section.secret("api_key", _api_key, required=False),
        preset=preset.name if preset else None,
        quirks=_quirks(section.section("quirks", optional=True)),
        models=section.names("models", _SELLABLE, '"qwen/qwen3.5-9b", or ["*"]', most=_MODELS_MAX),
        markup_bps=section.whole("markup_bps", 0, MARKUP_BPS_MAX, None),
        insecure=insecure,
    )
    if EVERY_MODEL in config.models and len(config.models) > 1:
        section.problem("models", 'has "*", which is every model, and others beside it')
    section.done()
    if preset is None or "api_key" in section.values:
        return config
    return _with_usual_key(section, config, preset)


def _with_usual_key(section: Section, config: ProviderConfig, preset: PresetDefaults) -> ProviderConfig:
    # A key is sent only where the preset says: with another base URL, the usual key of this machine would go to
    # somebody who has no business with it.
    if preset.key_variable is None or config.base_url != preset.base_url:
        return config
    text = section.environ.get(preset.key_variable)
    if not text:
        section.problem("api_key", f"preset {preset.name} reads environment variable {preset.key_variable}: not set")
        return config
    try:
        key = _api_key(text)
    except ValueError as error:
        section.problem("api_key", f"environment variable {preset.key_variable} {error}")
        return config
    return replace(config, api_key=key)


def _preset(value: Any) -> PresetDefaults:
    found = PRESETS.get(value) if isinstance(value, str) else None
    if found is None:
        near = difflib.get_close_matches(value, PRESETS, n=1) if isinstance(value, str) else []
        raise ValueError("must be one of " + ", ".join(PRESETS) + (f"; did you mean {near[0]}?" if near else ""))
    return found


def _base_url(section: Section, preset: PresetDefaults | None, *, insecure: bool) -> str:
    def read(value: Any) -> str:
        return check_base_url(text_of(value), insecure=insecure)

    if preset is not None and preset.base_url is not None:
        return section.get("base_url", read, preset.base_url, fallback=preset.base_url)
    return section.get("base_url", read, fallback="")


def _api_key(text: str) -> Secret[str]:
    if _API_KEY.fullmatch(text) is None:
        raise ValueError("must be one line of printable ASCII without spaces")
    return Secret(text)


def _quirks(section: Section) -> QuirksConfig:
    def limit_field(value: Any) -> Literal["max_tokens", "max_completion_tokens"]:
        if value == "max_tokens":
            return "max_tokens"
        if value == "max_completion_tokens":
            return "max_completion_tokens"
        raise ValueError('must be "max_tokens" or "max_completion_tokens"')

    def flag(name: str) -> bool | None:
        return section.get(name, flag_of, None, fallback=None)

    config = QuirksConfig(
        limit_field=section.get("limit_field", limit_field, None, fallback=None),
        continuous_usage=flag("continuous_usage"),
        include_usage=flag("include_usage"),
        reasoning_added=flag("reasoning_added"),
        cancel_stops_billing=flag("cancel_stops_billing"),
    )
    section.done()
    return config


def read_model(section: Section) -> ModelConfig:
    """One ``[[models]]`` table; problems are noted in the section."""

    def rate(value: Any) -> Pico:
        return parse_rate(text_of(value))

    def each(value: Any) -> Pico:
        return parse_each(text_of(value))

    def upstream(value: Any) -> str:
        if not isinstance(value, str) or _UPSTREAM.fullmatch(value) is None:
            raise ValueError("must be the provider's own name of the model, without spaces")
        return value

    free = Pico(0)
    name = section.text("id", MODEL_ID, "qwen/qwen3.5-9b")
    paid_in = section.get("input_usd_per_million", rate, fallback=free)
    config = ModelConfig(
        id=name,
        provider=section.get("provider", text_of, fallback=""),
        upstream_model=section.get("upstream_model", upstream, name, fallback=name),
        input=paid_in,
        cached_input=section.get("cached_input_usd_per_million", rate, paid_in, fallback=paid_in),
        output=section.get("output_usd_per_million", rate, fallback=free),
        context=section.whole("context", 1, 100_000_000),
        max_output=section.whole("max_output", 1, 10_000_000),
        cache_write=section.get("cache_write_usd_per_million", rate, None, fallback=None),
        reasoning=section.get("reasoning_usd_per_million", rate, None, fallback=None),
        request=section.get("request_usd", each, free, fallback=free),
        image=section.get("image_usd", each, free, fallback=free),
        audio_second=section.get("audio_second_usd", each, free, fallback=free),
        abilities=section.get("abilities", parse_abilities, DEFAULT_ABILITIES, fallback=DEFAULT_ABILITIES),
        quality=section.whole("quality", 0, 100, 0),
        tokenizer=section.get("tokenizer", lambda value: _file(section, value), None, fallback=None),
    )
    if not config.input and not config.output:
        section.problem("output_usd_per_million", "is zero like the input price: a free model cannot be quoted")
    section.done()
    return config


def read_pricing(section: Section) -> PricingConfig:
    """The ``[pricing]`` table; problems are noted in the section."""
    base = PricingConfig()
    usual = section.base / "prices.json"
    config = PricingConfig(
        catalog=section.get("catalog", lambda value: _file(section, value), usual, fallback=usual),
        stale_s=section.whole("stale_s", 60, 365 * 86_400, base.stale_s),
        band_pct=section.whole("band_pct", 0, 1_000, base.band_pct),
        markup_bps=section.whole("markup_bps", 0, MARKUP_BPS_MAX, base.markup_bps),
    )
    section.done()
    return config


def read_routing(section: Section) -> RoutingConfig:
    """The ``[routing]`` table; problems are noted in the section."""

    def optimize(value: Any) -> Optimize:
        known: tuple[Optimize, ...] = get_args(Optimize)
        for name in known:
            if value == name:
                return name
        raise ValueError("must be one of " + ", ".join(known))

    base = RoutingConfig()
    config = RoutingConfig(
        strategy=_choice(section, "strategy", Strategy, base.strategy),
        allow_external=section.get("allow_external", flag_of, None, fallback=None),
        ceiling=_ceiling(section),
        attempts_max=section.whole("attempts_max", 1, 10, base.attempts_max),
        seed_compat=section.get("seed_compat", flag_of, base.seed_compat, fallback=base.seed_compat),
        model_pool=section.names("model_pool", MODEL_ID, '"qwen/qwen3.5-9b"', most=_POOL_MAX),
        optimize=section.get("optimize", optimize, base.optimize, fallback=base.optimize),
    )
    section.done()
    return config


def _ceiling(section: Section) -> PriceCeiling | None:
    names = ("max_input_price_per_million", "max_output_price_per_million")
    most_in, most_out = (section.whole(name, 0, _CENTS_MAX, None) for name in names)
    if "max_input_price_per_million" not in section.values and "max_output_price_per_million" not in section.values:
        return None
    for name in names:
        if name not in section.values:
            section.problem(name, "is required beside the other ceiling: one alone leaves the other price unbounded")
            return None
    return PriceCeiling(most_in, most_out)


def _choice(section: Section, name: str, choices: type[Choice], default: Choice) -> Choice:
    def read(value: Any) -> Choice:
        try:
            return choices(value)
        except ValueError:
            raise ValueError("must be one of " + ", ".join(choices)) from None

    return section.get(name, read, default, fallback=default)


def _file(section: Section, value: Any) -> Path:
    if not isinstance(value, str) or not value or "://" in value:
        raise ValueError("must be a path")
    return section.base / value
