"""Reads the price lists that providers publish. Pure: bytes in, offers out; whether they are believed is ``guard``'s.

Each list is read leniently in what it says beside prices, since providers add fields as they like, and strictly in the
prices. A price in a unit the node does not meter is never left out: what it would apply to is not offered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from channels.units import Pico
from mppnode.config.rates import EACH_MAX, RATE_MAX
from mppnode.kernel.listing import Ability
from mppnode.kernel.rates import Rates
from mppnode.pricing.entries import EACH_AXES
from mppnode.pricing.exact import PER_MILLION_PLACES, PER_TOKEN_PLACES, BadPrice, Number, load_json, pico_up
from mppnode.pricing.guard import Offer

ROWS_MAX: Final = 20_000  # as many as a catalog may have entries
_TOKENS_MAX: Final = 100_000_000
_BASE: Final = Ability.TOOLS | Ability.JSON_SCHEMA

_ID = re.compile(r"[!-~]{1,256}", re.ASCII)

_Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PriceList:
    """How one provider publishes prices: where below its base URL, and how an entry of the list is read."""

    path: str
    rows: Callable[[Any], list[Any]]
    offer: Callable[[_Row, str], Offer | None]


def decode_offers(data: bytes, shape: PriceList) -> list[Offer]:
    """Read a provider's list; an entry without a usable price is an offer that says why.

    Raises:
        BadPrice: when it is no list of models at all.
    """
    rows = shape.rows(load_json(data))
    if len(rows) > ROWS_MAX:
        raise BadPrice(f"lists more than {ROWS_MAX} models")
    offers = []
    for row in rows:
        name = row.get("id") if isinstance(row, dict) else None
        if not isinstance(name, str) or isinstance(name, Number) or _ID.fullmatch(name) is None:
            continue  # nothing to sell under, and no price of ours can be about it
        try:
            offer = shape.offer(row, name)
        except BadPrice as error:
            offer = Offer(name, None, str(error))
        if offer is not None:
            offers.append(offer)
    return offers


def _data(document: Any) -> list[Any]:
    rows = document.get("data") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise BadPrice("is not a list of models")
    return rows


def _bare(document: Any) -> list[Any]:
    if isinstance(document, list):
        return document
    return _data(document)


class _Prices:
    """The prices of one row, read by axis; remembers which had to be rounded."""

    def __init__(self, row: Any, places: int) -> None:
        if not isinstance(row, dict):
            raise BadPrice("states no price")
        self._row = row
        self._places = places
        self.rounded: list[str] = []

    def has(self, key: str) -> bool:
        """Whether the row has something to say under a key."""
        return self._row.get(key) is not None

    def read(self, key: str, axis: str) -> Pico:
        """A price that has to be there."""
        if not self.has(key):
            raise BadPrice(f"states no {axis} price")
        try:
            value, exact = pico_up(self._row[key], self._places)
            if value > (EACH_MAX if axis in EACH_AXES else RATE_MAX):
                raise BadPrice("is far above any price on sale")
        except BadPrice as error:
            raise BadPrice(f"{axis} {error}") from None
        if not exact and axis not in self.rounded:
            self.rounded.append(axis)
        return value

    def part(self, key: str, axis: str, whole: Pico) -> Pico:
        """The price of a part of what ``whole`` is the price of.

        Absent or zero, it costs what the whole does: lists write 0 for "not priced apart", and believing that would
        give the tokens away.
        """
        return (self.read(key, axis) if self.has(key) else Pico(0)) or whole

    def fee(self, key: str, axis: str) -> Pico:
        """A price that is nothing when it is not mentioned."""
        return self.read(key, axis) if self.has(key) else Pico(0)


def _openrouter(row: _Row, name: str) -> Offer | None:
    """An entry of OpenRouter's list. Source: its models API, ``PublicPricing``: decimal strings, US dollars a unit.

    ``pricing.overrides`` are dearer or cheaper prices for long prompts and for hours of the day. The node sells at one
    price, so it takes the dearest of all on each axis. ``discount`` is not taken off for the same reason.
    """
    architecture = row.get("architecture")
    outputs = architecture.get("output_modalities") if isinstance(architecture, dict) else None
    if isinstance(outputs, list) and "text" not in outputs:
        return None
    pricing = row.get("pricing")
    prices = _Prices(pricing, PER_TOKEN_PLACES)
    cost = _openrouter_cost(prices)
    rounded = list(prices.rounded)
    overrides = pricing.get("overrides") if isinstance(pricing, dict) else None
    for override in _objects(overrides):
        # What an override leaves out is as in the list above it.
        said = {key: value for key, value in override.items() if value is not None}
        tier = _Prices({**(pricing or {}), **said}, PER_TOKEN_PLACES)
        cost = cost.dearest(_openrouter_cost(tier))
        rounded += [axis for axis in tier.rounded if axis not in rounded]
    provider = row.get("top_provider")
    limit = provider.get("max_completion_tokens") if isinstance(provider, dict) else None
    return Offer(
        name,
        cost,
        context=_tokens(row.get("context_length")),
        max_output=_tokens(limit),
        abilities=_openrouter_abilities(row, prices, cost),
        rounded=tuple(rounded),
    )


def _openrouter_cost(prices: _Prices) -> Rates:
    paid_in, paid_out = prices.read("prompt", "input"), prices.read("completion", "output")
    write = prices.part("input_cache_write", "cache_write", paid_in)
    return Rates(
        paid_in,
        prices.part("input_cache_read", "cached_input", paid_in),
        paid_out,
        # Callers choose how long a cache lives; both kinds are counted as one, so the dearer price is for both.
        max(write, prices.part("input_cache_write_1h", "cache_write", paid_in)),
        prices.part("internal_reasoning", "reasoning", paid_out),
        prices.fee("request", "request"),
        prices.fee("image", "image"),
    )


def _openrouter_abilities(row: _Row, prices: _Prices, cost: Rates) -> Ability:
    parameters, architecture = _names(row.get("supported_parameters")), row.get("architecture")
    inputs = _names(architecture.get("input_modalities") if isinstance(architecture, dict) else None)
    found = Ability(0)
    if "tools" in parameters:
        found |= Ability.TOOLS
    if "structured_outputs" in parameters or "response_format" in parameters:
        found |= Ability.JSON_SCHEMA
    if "logprobs" in parameters:
        found |= Ability.LOGPROBS
    if "reasoning" in parameters:
        found |= Ability.REASONING
    # Tokens of pictures and sound are counted among the prompt's. Where they cost more, they are not for sale.
    if "image" in inputs and prices.fee("image_token", "image") <= cost.input:
        found |= Ability.VISION
    if "audio" in inputs and prices.fee("audio", "audio") <= cost.input:
        found |= Ability.AUDIO_INPUT
    return found


def _deepinfra(row: _Row, name: str) -> Offer | None:
    """An entry of DeepInfra's OpenAI-compatible list: ``metadata.pricing``, JSON numbers, US dollars per million."""
    metadata = row.get("metadata")
    if not isinstance(metadata, dict):
        return Offer(name, None, "states no price")
    prices = _Prices(metadata.get("pricing"), PER_MILLION_PLACES)
    paid_in, paid_out = prices.read("input_tokens", "input"), prices.read("output_tokens", "output")
    tags = _names(metadata.get("tags"))
    return Offer(
        name,
        Rates(paid_in, prices.part("cache_read_tokens", "cached_input", paid_in), paid_out),
        context=_tokens(metadata.get("context_length")),
        max_output=_tokens(metadata.get("max_tokens")),
        abilities=_BASE | (Ability.VISION if "vision" in tags else Ability(0)),
        rounded=tuple(prices.rounded),
    )


def _together(row: _Row, name: str) -> Offer | None:
    """An entry of Together's list: ``pricing``, JSON numbers, US dollars per million tokens."""
    if row.get("type") not in ("chat", "language", "code"):
        return None
    prices = _Prices(row.get("pricing"), PER_MILLION_PLACES)
    paid_in, paid_out = prices.read("input", "input"), prices.read("output", "output")
    return Offer(
        name,
        Rates(
            paid_in,
            prices.part("cached_input", "cached_input", paid_in),
            paid_out,
            request=prices.fee("base", "request"),
        ),
        context=_tokens(row.get("context_length")),
        abilities=_BASE,
        rounded=tuple(prices.rounded),
    )


def _objects(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadPrice("has overrides that are not objects")
    return value


def _names(value: Any) -> frozenset[str]:
    return frozenset(item for item in value if isinstance(item, str)) if isinstance(value, list) else frozenset()


def _tokens(value: Any) -> int | None:
    if not isinstance(value, Number) or not value.isdigit() or len(value) > len(str(_TOKENS_MAX)):
        return None
    return int(value) if 0 < int(value) <= _TOKENS_MAX else None


PRICE_LISTS: Final[Mapping[str, PriceList]] = MappingProxyType(
    {
        "openrouter": PriceList("/models", _data, _openrouter),
        "deepinfra": PriceList("/models", _data, _deepinfra),
        "together": PriceList("/models", _bare, _together),
    }
)
"""By preset. Who is not here publishes no prices at an address of its API: their price pages are for people."""
