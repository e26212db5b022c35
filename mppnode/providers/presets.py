"""Providers the node knows by name: where they are, what they can do and in what they differ.

A preset is a default; an operator's configuration may change the URL, the key's variable, the kind and the abilities.
``cancel_stops_billing`` is True only where the provider is known to stop: believing it wrongly costs the node money at
every disconnect, doubting it wrongly costs a reservation that is a little too large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from mppnode.kernel.clock import Clock
from mppnode.kernel.listing import Ability, ProviderKind
from mppnode.providers.anthropic import Anthropic
from mppnode.providers.base import Adapter
from mppnode.providers.gemini import Gemini
from mppnode.providers.openai_compatible import OpenAICompatible
from mppnode.providers.openrouter import OpenRouter
from mppnode.providers.quirks import Quirks

Api = Literal["openai", "anthropic", "gemini", "openrouter", "dev"]
"""What a provider speaks; each is one adapter."""

_TEXT: Final = Ability.TOOLS | Ability.JSON_SCHEMA
_SERVER: Final = _TEXT | Ability.LOGPROBS | Ability.CHOICES
_PLAIN: Final = Quirks()


@dataclass(frozen=True, slots=True)
class Preset:
    """One provider by name. ``abilities`` are the most its API can express; a model may have fewer."""

    name: str
    api: Api
    base_url: str | None
    key_variable: str | None
    """The environment variable in which this provider's users keep their key."""
    price_page: str | None
    """Where a human checks the prices."""
    models_url: str | None
    """Path under ``base_url`` of a model list that states prices; None where prices are on a page only."""
    kind: ProviderKind
    abilities: Ability
    quirks: Quirks = _PLAIN

    @property
    def cancel_stops_billing(self) -> bool:
        """Whether closing the connection is known to stop generation and charges."""
        return self.quirks.cancel_stops_billing


def adapter_for(api: Api, quirks: Quirks, *, clock: Clock | None = None) -> Adapter:
    """The adapter of an API; ``clock`` dates the chunks of those whose own answers carry no date."""
    match api:
        case "openai" | "dev":
            return OpenAICompatible(quirks)
        case "openrouter":
            return OpenRouter(quirks)
        case "anthropic":
            return Anthropic(quirks, clock=clock)
        case "gemini":
            return Gemini(quirks, clock=clock)


def _sold(
    name: str,
    base_url: str,
    price_page: str,
    *,
    abilities: Ability,
    quirks: Quirks = _PLAIN,
    api: Api = "openai",
    models_url: str | None = None,
    kind: ProviderKind = ProviderKind.QUOTA,
) -> Preset:
    return Preset(name, api, base_url, f"{name.upper()}_API_KEY", price_page, models_url, kind, abilities, quirks)


def _own(name: str, port: int, abilities: Ability = _SERVER, *, continuous: bool = False) -> Preset:
    quirks = Quirks(continuous_usage=continuous, cancel_stops_billing=True)
    url = f"http://127.0.0.1:{port}/v1"
    return Preset(name, "openai", url, None, None, None, ProviderKind.NATIVE, abilities, quirks)


_ALL: Final = (
    _sold(
        "openai",
        "https://api.openai.com/v1",
        "https://platform.openai.com/docs/pricing",
        abilities=_SERVER | Ability.VISION | Ability.AUDIO_INPUT | Ability.REASONING,
        # Reasoning models refuse the older name, and all others know the newer one.
        quirks=Quirks(limit_field="max_completion_tokens", cancel_stops_billing=True),
    ),
    _sold(
        "anthropic",
        "https://api.anthropic.com/v1",
        "https://platform.claude.com/docs/en/about-claude/pricing",
        api="anthropic",
        abilities=_TEXT | Ability.VISION | Ability.REASONING,
        quirks=Quirks(cancel_stops_billing=True),
    ),
    _sold(
        "gemini",
        "https://generativelanguage.googleapis.com/v1beta",
        "https://ai.google.dev/gemini-api/docs/pricing",
        api="gemini",
        abilities=_TEXT | Ability.VISION | Ability.AUDIO_INPUT | Ability.CHOICES | Ability.REASONING,
    ),
    _sold(
        "openrouter",
        "https://openrouter.ai/api/v1",
        "https://openrouter.ai/models",
        api="openrouter",
        models_url="/models",
        kind=ProviderKind.EXTERNAL,
        # No CHOICES: most upstreams behind it answer once whatever `n` says.
        abilities=_TEXT | Ability.LOGPROBS | Ability.VISION | Ability.AUDIO_INPUT | Ability.REASONING,
        quirks=Quirks(include_usage=False),  # always reported; whether a cancel stops depends on who serves
    ),
    _sold(
        "deepinfra",
        "https://api.deepinfra.com/v1/openai",
        "https://deepinfra.com/pricing",
        abilities=_SERVER | Ability.VISION | Ability.REASONING,
        models_url="/models",
        quirks=Quirks(cancel_stops_billing=True),
    ),
    _sold(
        "deepseek",
        "https://api.deepseek.com",
        "https://api-docs.deepseek.com/quick_start/pricing",
        abilities=Ability.TOOLS | Ability.LOGPROBS,  # JSON without a schema only
    ),
    _sold(
        "together",
        "https://api.together.xyz/v1",
        "https://www.together.ai/pricing",
        abilities=_SERVER | Ability.VISION | Ability.REASONING,
        models_url="/models",
        quirks=Quirks(cancel_stops_billing=True),
    ),
    _sold(
        "groq",
        "https://api.groq.com/openai/v1",
        "https://groq.com/pricing",
        abilities=_TEXT | Ability.VISION | Ability.REASONING,  # refuses n above 1 and logprobs
        quirks=Quirks(limit_field="max_completion_tokens"),
    ),
    _sold(
        "fireworks",
        "https://api.fireworks.ai/inference/v1",
        "https://fireworks.ai/pricing",
        abilities=_SERVER | Ability.VISION | Ability.REASONING,
        quirks=Quirks(cancel_stops_billing=True),
    ),
    _sold(
        "mistral",
        "https://api.mistral.ai/v1",
        "https://mistral.ai/pricing",
        abilities=_TEXT | Ability.VISION | Ability.CHOICES,
        quirks=Quirks(include_usage=False),  # always on the last chunk; the option is no member of its schema
    ),
    _sold(
        "xai",
        "https://api.x.ai/v1",
        "https://docs.x.ai/docs/models",
        abilities=_SERVER | Ability.VISION | Ability.REASONING,
        quirks=Quirks(reasoning_added=True, cancel_stops_billing=True),
    ),
    _own("vllm", 8000, continuous=True),
    _own("llamacpp", 8080),
    _own("ollama", 11434, _TEXT),
    _own("sglang", 30000),
    Preset("dev", "dev", None, None, None, None, ProviderKind.NATIVE, _SERVER, Quirks(cancel_stops_billing=True)),
)

PRESETS: Final[Mapping[str, Preset]] = MappingProxyType({preset.name: preset for preset in _ALL})
"""Every known provider by its name."""
