"""What a caller says about routing, parsed once and strictly; and what a request needs of whoever serves it.

A routing field that were dropped silently would send a prompt to someone the caller had excluded, or at a price they
had refused. So a field is either honoured or refused by name.

Source: OpenRouter's chat completion API (``models``, ``provider``, ``:floor`` and ``:nitro``), OpenAI's
``prompt_cache_key``, and the node's own ``routing_strategy``, ``allow_external``, price ceilings and ``routing``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, NoReturn

from channels.faults import ChannelFault
from channels.units import Pico, parse_decimal
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability
from mppnode.kernel.strategy import PriceCeiling, Strategy

_MODELS_MAX: Final = 8  # each may cost a decision and an attempt, and nobody waits for the ninth
_POOL_MAX: Final = 64  # scored one by one on every request
_PROVIDERS_MAX: Final = 32  # more than any model has sellers; each is hashed on every request
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}", re.ASCII)
_PROVIDER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}", re.ASCII)
_TASK: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)
_CACHE_KEY_BYTES_MAX: Final = 512  # hashed once; SDKs write a user or session id
_CENTS_MAX: Final = 10**9  # ten dollars a token: above every price there is, and it fits 64 bits as pico
_PICO_MAX: Final = _CENTS_MAX * 10_000  # the same limit for the ceilings that come in dollars
_SMALL_FLOAT: Final = re.compile(r"([0-9])(?:\.([0-9]+))?e-0([0-9])", re.ASCII)  # how repr() writes 0.00001

_PROVIDER_KEYS: Final = frozenset(
    {"order", "only", "ignore", "sort", "max_price", "allow_fallbacks", "require_parameters"}
)
_UNSUPPORTED: Final = (
    "data_collection",
    "zdr",
    "quantizations",
    "enforce_distillable_text",
    "preferred_min_throughput",
    "preferred_max_latency",
    "experimental",
)
"""What OpenRouter knows and we do not do, by name so that the refusal can say which."""
_UNPRICED: Final = ("request", "image", "audio")
_ROUTING_KEYS: Final = frozenset({"model_pool", "optimize", "task"})


class Sort(StrEnum):
    """A strict order of providers, instead of a strategy's choice among near-equals."""

    PRICE = "price"
    THROUGHPUT = "throughput"
    LATENCY = "latency"

    @property
    def strategy(self) -> Strategy:
        """The strategy this is the strict form of: its defaults hold, and naming another one is a contradiction."""
        return Strategy.CHEAPEST if self is Sort.PRICE else Strategy.FASTEST


class Optimize(StrEnum):
    """What ``model: "auto"`` weighs most."""

    BALANCED = "balanced"
    QUALITY = "quality"
    COST = "cost"
    LATENCY = "latency"


_STRATEGIES: Final = frozenset(strategy.value for strategy in Strategy)  # `"x" in Strategy` raises before 3.12
_SORTS: Final = frozenset(sort.value for sort in Sort)
_MODES: Final = frozenset(mode.value for mode in Optimize)
_SUFFIXES: Final[Mapping[str, Sort]] = MappingProxyType({":floor": Sort.PRICE, ":nitro": Sort.THROUGHPUT})


@dataclass(frozen=True, slots=True)
class Wishes:
    """The caller's routing fields. ``None`` means the caller did not say; prices are pico-dollars per token."""

    models: tuple[str, ...]
    """Which to try, in order and without suffixes: ``model`` and then ``models``."""
    strategy: Strategy | None = None
    allow_external: bool | None = None
    ceiling: PriceCeiling | None = None
    max_prompt_price: Pico | None = None
    max_completion_price: Pico | None = None
    sort: Sort | None = None
    order: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    allow_fallbacks: bool | None = None
    require_parameters: bool | None = None
    cache_key: str | None = None
    pool: tuple[str, ...] | None = None
    optimize: Optimize | None = None
    task: str | None = None


def parse_wishes(raw: Mapping[str, Any]) -> Wishes:
    """Read the routing fields of a chat request.

    Raises:
        NodeFault: ``INVALID_FIELD`` naming the field by its path, also for what is understood and not supported and
            for fields that contradict each other.

    Source: OpenRouter provider routing and model fallbacks; OpenAI ``prompt_cache_key``.
    """
    models, suffix = _models(raw)
    provider = _object(raw, "provider")
    _known_keys(provider, "provider", _PROVIDER_KEYS, _UNSUPPORTED)
    routing = _object(raw, "routing")
    _known_keys(routing, "routing", _ROUTING_KEYS, ())
    # The older of OpenRouter's fields: its only value is what happens here anyway.
    _one_of(raw.get("route"), "route", frozenset({"fallback"}))
    strategy = _one_of(raw.get("routing_strategy"), "routing_strategy", _STRATEGIES)
    asked = None if strategy is None else Strategy(strategy)
    prompt, completion = _max_price(provider)
    pool = routing.get("model_pool")
    mode = _one_of(routing.get("optimize"), "routing.optimize", _MODES)
    return Wishes(
        models=models,
        strategy=asked,
        allow_external=_boolean(raw.get("allow_external"), "allow_external"),
        ceiling=_ceiling(raw),
        max_prompt_price=prompt,
        max_completion_price=completion,
        sort=_agreed(_sort(provider.get("sort")), suffix, asked),
        order=_providers(provider, "order") or (),
        only=_providers(provider, "only", low=1),  # nobody at all is a mistake, not a wish
        ignore=_providers(provider, "ignore") or (),
        allow_fallbacks=_boolean(provider.get("allow_fallbacks"), "provider.allow_fallbacks"),
        require_parameters=_boolean(provider.get("require_parameters"), "provider.require_parameters"),
        cache_key=_cache_key(raw.get("prompt_cache_key")),
        pool=None if pool is None else _names(pool, "routing.model_pool", "model", 1, _POOL_MAX),
        optimize=None if mode is None else Optimize(mode),
        task=_task(routing.get("task")),
    )


# ----------------------------------------------------------------------------------------------------------- models


def _models(raw: Mapping[str, Any]) -> tuple[tuple[str, ...], Sort | None]:
    """The models to try, and the order their suffix asks for."""
    model = raw.get("model")
    if not isinstance(model, str) or _NAME.fullmatch(model) is None:
        _bad("model", "is not a model name")
    first, suffix = _split(model)
    if not first:
        _bad("model", "is not a model name")
    names = [first]
    given = raw.get("models")
    if given is not None:
        for index, name in enumerate(_names(given, "models", "model", 1, _MODELS_MAX)):
            bare, other = _split(name)
            if not bare:
                _bad(f"models[{index}]", "is not a model name")
            # One decision has one order: a suffix on a fallback alone could only be ignored or leak to the others.
            if other is not None and other is not suffix:
                _bad(f"models[{index}]", "has a suffix that model does not have")
            names.append(bare)
    return tuple(dict.fromkeys(names)), suffix


def _split(name: str) -> tuple[str, Sort | None]:
    for suffix, sort in _SUFFIXES.items():
        if name.endswith(suffix):
            return name[: -len(suffix)], sort
    return name, None  # another colon belongs to the name: "llama3:8b"


# ----------------------------------------------------------------------------------------------------------- prices


def _ceiling(raw: Mapping[str, Any]) -> PriceCeiling | None:
    names = ("max_input_price_per_million", "max_output_price_per_million")
    cents: list[int | None] = []
    for name in names:
        value = raw.get(name)
        # type() and not isinstance(): True is an int, and a caller who sends it meant something else.
        if value is not None and (type(value) is not int or not 0 <= value <= _CENTS_MAX):
            _bad(name, f"is not an integer from 0 to {_CENTS_MAX}")
        cents.append(value)
    paid_in, paid_out = cents
    if paid_in is None and paid_out is None:
        return None
    # One ceiling alone would leave the other price unbounded, which is never what a caller with a budget means.
    if paid_in is None:
        _bad(names[0], "is missing although the output ceiling is set")
    if paid_out is None:
        _bad(names[1], "is missing although the input ceiling is set")
    return PriceCeiling(paid_in, paid_out)


def _max_price(provider: Mapping[str, Any]) -> tuple[Pico | None, Pico | None]:
    path = "provider.max_price"
    given = provider.get("max_price")
    if given is None:
        return None, None
    if not isinstance(given, dict):
        _bad(path, "is not an object")
    _known_keys(given, path, frozenset({"prompt", "completion"}), _UNPRICED)
    return _price(given.get("prompt"), f"{path}.prompt"), _price(given.get("completion"), f"{path}.completion")


def _price(value: Any, path: str) -> Pico | None:
    """US dollars per million tokens, as pico-dollars per token: a factor of exactly one with six places."""
    if value is None:
        return None
    if type(value) not in {int, float, str}:
        _bad(path, "is not a price in dollars per million tokens")
    # A JSON float arrives as a binary one. Its shortest text is the number the caller wrote; arithmetic on it is not.
    text = value if isinstance(value, str) else repr(value)
    small = None if isinstance(value, str) else _SMALL_FLOAT.fullmatch(text)
    if small is not None:
        whole, fraction, zeros = small.groups()
        text = "0." + "0" * (int(zeros) - 1) + whole + (fraction or "")
    try:
        pico = int(parse_decimal(text, field=path))
    except ChannelFault:
        _bad(path, "is not a price in dollars per million tokens with at most six places")
    if pico > _PICO_MAX:
        _bad(path, f"is above {_PICO_MAX // 1_000_000} dollars per million tokens")
    return Pico(pico)


# ---------------------------------------------------------------------------------------------------------- choices


def _sort(given: Any) -> Sort | None:
    path = "provider.sort"
    if isinstance(given, dict):
        _known_keys(given, path, frozenset({"by", "partition"}), ())
        # "none" would rank the endpoints of all models against each other; "model" is what happens here.
        _one_of(given.get("partition"), f"{path}.partition", frozenset({"model"}))
        if given.get("by") is None:
            _bad(f"{path}.by", "is missing")
        given, path = given["by"], f"{path}.by"
    name = _one_of(given, path, _SORTS)
    return None if name is None else Sort(name)


def _agreed(sort: Sort | None, suffix: Sort | None, strategy: Strategy | None) -> Sort | None:
    """The one order that ``provider.sort`` and the suffix ask for, if the strategy allows it."""
    if sort is not None and suffix is not None and sort is not suffix:
        _bad("provider.sort", "contradicts the suffix of model")
    agreed = sort or suffix
    if agreed is not None and strategy is not None and strategy is not agreed.strategy:
        _bad("routing_strategy", "contradicts provider.sort" if sort else "contradicts the suffix of model")
    return agreed


def _providers(provider: Mapping[str, Any], name: str, *, low: int = 0) -> tuple[str, ...] | None:
    given = provider.get(name)
    if given is None:
        return None
    return tuple(dict.fromkeys(_names(given, f"provider.{name}", "provider", low, _PROVIDERS_MAX)))


def _cache_key(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value or len(value.encode()) > _CACHE_KEY_BYTES_MAX:
        _bad("prompt_cache_key", f"is not a string of 1 to {_CACHE_KEY_BYTES_MAX} bytes")
    return value


def _task(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or _TASK.fullmatch(value) is None):
        _bad("routing.task", "is not the name of a task")
    return value


# ---------------------------------------------------------------------------------------------------------- needs


def needs_of(raw: Mapping[str, Any]) -> Ability:
    """The abilities a chat request needs of whoever serves it.

    The request is one that ``parse_chat`` accepted: shapes are not checked again here.

    Source: OpenAI chat completion API.
    """
    needs = Ability(0)
    if raw.get("tools") or raw.get("functions"):
        needs |= Ability.TOOLS
    shape = raw.get("response_format")
    if isinstance(shape, dict) and shape.get("type") in ("json_schema", "json_object"):
        needs |= Ability.JSON_SCHEMA
    if raw.get("logprobs") or raw.get("top_logprobs") is not None:
        needs |= Ability.LOGPROBS
    if (raw.get("n") or 1) > 1:
        needs |= Ability.CHOICES
    if raw.get("reasoning_effort") is not None or raw.get("reasoning") is not None:
        needs |= Ability.REASONING
    for message in raw.get("messages") or ():
        needs |= _message_needs(message)
    return needs


def _message_needs(message: Mapping[str, Any]) -> Ability:
    # A model that was never taught calls cannot read a conversation that contains them.
    needs = Ability.TOOLS if message.get("tool_calls") or message.get("role") == "tool" else Ability(0)
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        match part.get("type"):
            case "image_url" | "video_url":
                needs |= Ability.VISION
            case "input_audio" | "audio_url":
                needs |= Ability.AUDIO_INPUT
            case _:
                pass
    return needs


# --------------------------------------------------------------------------------------------------------- helpers


def _bad(path: str, detail: str) -> NoReturn:
    raise NodeFault(NodeReason.INVALID_FIELD, field=path, detail=detail) from None


def _object(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        _bad(name, "is not an object")
    return value


def _known_keys(given: Mapping[str, Any], path: str, known: frozenset[str], refused: tuple[str, ...]) -> None:
    """Refuse what we would otherwise drop; a null says nothing and is let through, as everywhere."""
    for name in refused:
        if given.get(name) is not None:
            _bad(f"{path}.{name}", "is not supported")
    for name in _stated(given):
        if name not in known:
            _bad(path, "has a key that is not supported")  # the key is the caller's text: not repeated


def _stated(given: Mapping[str, Any]) -> Iterator[str]:
    return (name for name, value in given.items() if value is not None)


def _one_of(value: Any, path: str, allowed: frozenset[str]) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in allowed:
        _bad(path, "is not one of " + ", ".join(sorted(allowed)))
    return value


def _boolean(value: Any, path: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        _bad(path, "is not a boolean")
    return value


def _names(given: Any, path: str, noun: str, low: int, high: int) -> tuple[str, ...]:
    shape = _PROVIDER if noun == "provider" else _NAME
    if not isinstance(given, list) or not low <= len(given) <= high:
        _bad(path, f"is not an array of {low} to {high} {noun} names")
    for index, name in enumerate(given):
        if not isinstance(name, str) or shape.fullmatch(name) is None:
            _bad(f"{path}[{index}]", f"is not a {noun} name")
    return tuple(given)
