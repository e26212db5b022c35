"""What is known of well-known providers before anything is configured: where they are, and what names their key.

Plain data: the configuration needs it and may know no adapter. How each of them speaks is the matter of ``providers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from mppnode.kernel.listing import ProviderKind


@dataclass(frozen=True, slots=True)
class PresetDefaults:
    """One provider's public facts. ``base_url`` is what precedes the name of a method, version included."""

    name: str
    base_url: str | None
    """None where there is no usual address, so the configuration has to give one."""
    key_variable: str | None
    """The environment variable that its own documentation names for the key; None when it needs no key."""
    kind: ProviderKind
    price_page: str | None = None
    """Where people read its prices; what an operator compares a synchronised price with."""


_NATIVE, _QUOTA, _EXTERNAL = ProviderKind.NATIVE, ProviderKind.QUOTA, ProviderKind.EXTERNAL

# Source of each line: the quick start and the price page of that provider's public documentation.
_TABLE: Final = (
    PresetDefaults(
        "openai", "https://api.openai.com/v1", "OPENAI_API_KEY", _QUOTA, "https://platform.openai.com/docs/pricing"
    ),
    PresetDefaults(
        "anthropic",
        "https://api.anthropic.com/v1",
        "ANTHROPIC_API_KEY",
        _QUOTA,
        "https://docs.claude.com/en/docs/about-claude/pricing",
    ),
    PresetDefaults(
        "gemini",
        "https://generativelanguage.googleapis.com/v1beta",
        "GEMINI_API_KEY",
        _QUOTA,
        "https://ai.google.dev/gemini-api/docs/pricing",
    ),
    PresetDefaults(
        "openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", _EXTERNAL, "https://openrouter.ai/models"
    ),
    PresetDefaults(
        "deepinfra",
        "https://api.deepinfra.com/v1/openai",
        "DEEPINFRA_API_KEY",
        _QUOTA,
        "https://deepinfra.com/pricing",
    ),
    PresetDefaults(
        "deepseek",
        "https://api.deepseek.com/v1",
        "DEEPSEEK_API_KEY",
        _QUOTA,
        "https://api-docs.deepseek.com/quick_start/pricing",
    ),
    PresetDefaults(
        "together", "https://api.together.xyz/v1", "TOGETHER_API_KEY", _QUOTA, "https://www.together.ai/pricing"
    ),
    PresetDefaults("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY", _QUOTA, "https://groq.com/pricing"),
    PresetDefaults(
        "fireworks",
        "https://api.fireworks.ai/inference/v1",
        "FIREWORKS_API_KEY",
        _QUOTA,
        "https://fireworks.ai/pricing",
    ),
    PresetDefaults("mistral", "https://api.mistral.ai/v1", "MISTRAL_API_KEY", _QUOTA, "https://mistral.ai/pricing"),
    PresetDefaults("xai", "https://api.x.ai/v1", "XAI_API_KEY", _QUOTA, "https://docs.x.ai/docs/models"),
    # Servers people run themselves, each at its own default port.
    PresetDefaults("vllm", "http://127.0.0.1:8000/v1", None, _NATIVE),
    PresetDefaults("llamacpp", "http://127.0.0.1:8080/v1", None, _NATIVE),
    PresetDefaults("ollama", "http://127.0.0.1:11434/v1", None, _NATIVE),
    PresetDefaults("sglang", "http://127.0.0.1:30000/v1", None, _NATIVE),
    PresetDefaults("dev", None, None, _NATIVE),
)

PRESETS: Final[Mapping[str, PresetDefaults]] = MappingProxyType({preset.name: preset for preset in _TABLE})
"""Every preset by its name."""
