"""Providers the node knows by name: what they speak, what they can do and in what they differ.

A preset is a default; an operator's configuration may change its quirks and the abilities of each model.
``cancel_stops_billing`` is True only where the provider is known to stop: believing it wrongly costs the node money at
every disconnect, doubting it wrongly costs a reservation that is a little too large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from mppnode.kernel.clock import Clock
from mppnode.kernel.listing import Ability
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
    """How one known provider speaks; where it is and what names its key is the matter of ``config.presets``."""

    name: str
    api: Api
    abilities: Ability
    """The most its API can express; a model may have fewer."""
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


_ALL: Final = (
    Preset(
        "openai",
        "openai",
        _SERVER | Ability.VISION | Ability.AUDIO_INPUT | Ability.REASONING,
        # Reasoning models refuse the older name, and all others know the newer one.
        Quirks(limit_field="max_completion_tokens", cancel_stops_billing=True),
    ),
    Preset("anthropic", "anthropic", _TEXT | Ability.VISION | Ability.REASONING, Quirks(cancel_stops_billing=True)),
    Preset(
        "gemini", "gemini", _TEXT | Ability.VISION | Ability.AUDIO_INPUT | Ability.CHOICES | Ability.REASONING
    ),
    Preset(
        "openrouter",
        "openrouter",
        # No CHOICES: most upstreams behind it answer once whatever `n` says.
        _TEXT | Ability.LOGPROBS | Ability.VISION | Ability.AUDIO_INPUT | Ability.REASONING,
        Quirks(include_usage=False),  # always reported; whether a cancel stops depends on who serves
    ),
    Preset("deepinfra", "openai", _SERVER | Ability.VISION | Ability.REASONING, Quirks(cancel_stops_billing=True)),
    Preset("deepseek", "openai", Ability.TOOLS | Ability.LOGPROBS),  # JSON without a schema only
    Preset("together", "openai", _SERVER | Ability.VISION | Ability.REASONING, Quirks(cancel_stops_billing=True)),
    Preset(
        "groq",
        "openai",
        _TEXT | Ability.VISION | Ability.REASONING,  # refuses n above 1 and logprobs
        Quirks(limit_field="max_completion_tokens"),
    ),
    Preset("fireworks", "openai", _SERVER | Ability.VISION | Ability.REASONING, Quirks(cancel_stops_billing=True)),
    Preset(
        "mistral",
        "openai",
        _TEXT | Ability.VISION | Ability.CHOICES,
        Quirks(include_usage=False),  # always on the last chunk; the option is no member of its schema
    ),
    Preset(
        "xai",
        "openai",
        _SERVER | Ability.VISION | Ability.REASONING,
        Quirks(reasoning_added=True, cancel_stops_billing=True),
    ),
    Preset("vllm", "openai", _SERVER, Quirks(continuous_usage=True, cancel_stops_billing=True)),
    Preset("llamacpp", "openai", _SERVER, Quirks(cancel_stops_billing=True)),
    Preset("ollama", "openai", _TEXT, Quirks(cancel_stops_billing=True)),
    Preset("sglang", "openai", _SERVER, Quirks(cancel_stops_billing=True)),
    Preset("dev", "dev", _SERVER, Quirks(cancel_stops_billing=True)),
)

PRESETS: Final[Mapping[str, Preset]] = MappingProxyType({preset.name: preset for preset in _ALL})
"""Every known provider by its name."""
