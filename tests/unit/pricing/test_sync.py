"""Providers' price lists, in the shapes their public documentation gives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mppnode.kernel.listing import Ability
from mppnode.kernel.rates import Rates
from mppnode.pricing.exact import BadPrice, load_json, pico_up
from mppnode.pricing.guard import Offer
from mppnode.pricing.sync import PRICE_LISTS, ROWS_MAX, decode_offers
from tests.unit.pricing.lists import rates

# Shape: GET https://openrouter.ai/api/v1/models, fields of `PublicPricing` in OpenRouter's API reference.
OPENROUTER: dict[str, Any] = {
    "id": "vendor/model",
    "context_length": 200_000,
    "architecture": {"input_modalities": ["text", "image", "audio"], "output_modalities": ["text"]},
    "pricing": {"prompt": "0.000003", "completion": "0.000015"},
    "top_provider": {"context_length": 200_000, "max_completion_tokens": 64_000},
    "supported_parameters": ["tools", "response_format", "logprobs", "reasoning", "temperature"],
}
# Shape: GET https://api.deepinfra.com/v1/openai/models.
DEEPINFRA: dict[str, Any] = {
    "id": "vendor/model",
    "object": "model",
    "metadata": {
        "context_length": 131_072,
        "max_tokens": 16_384,
        "pricing": {"input_tokens": 0.055, "output_tokens": 0.79, "cache_read_tokens": 0.01},
        "tags": ["vision"],
    },
}
# Shape: GET https://api.together.xyz/v1/models, a bare array.
TOGETHER: dict[str, Any] = {
    "id": "vendor/model",
    "type": "chat",
    "context_length": 131_072,
    "pricing": {"hourly": 0, "input": 0.88, "output": 0.88, "base": 0, "finetune": 0},
}


def decode(preset: str, *rows: Any) -> list[Offer]:
    return decode_offers(json.dumps({"data": list(rows)}).encode(), PRICE_LISTS[preset])


def openrouter(**pricing: Any) -> Offer:
    (found,) = decode("openrouter", OPENROUTER | {"pricing": OPENROUTER["pricing"] | pricing})
    return found


def cost_of(found: Offer) -> Rates:
    assert found.cost is not None, found.problem
    return found.cost


def test_an_openrouter_entry() -> None:
    """Strings of dollars per token become exact pico; limits and abilities come along."""
    found = openrouter(input_cache_read="0.0000003", input_cache_write="0.00000375", internal_reasoning="0.00002", request="0.01", image="0.0048")
    assert found.cost == rates(3_000_000, 300_000, 15_000_000, 3_750_000, 20_000_000, 10**10, 4_800_000_000)
    assert (found.context, found.max_output, found.rounded) == (200_000, 64_000, ())
    every = Ability.TOOLS | Ability.JSON_SCHEMA | Ability.LOGPROBS | Ability.REASONING | Ability.VISION | Ability.AUDIO_INPUT
    assert found.abilities == every


def test_zero_for_a_part_is_not_believed() -> None:
    """Lists write 0 where a price is not set apart; reasoning and cached tokens then cost as output and input."""
    found = openrouter(input_cache_read="0", input_cache_write="0", internal_reasoning="0", request="0", image="0")
    assert found.cost == rates(3_000_000, 3_000_000, 15_000_000)


def test_the_dearest_tier_is_the_price() -> None:
    """Long prompts and busy hours cost more at the provider; the node's one price covers them on every axis."""
    found = openrouter(
        overrides=[
            {"min_prompt_tokens": 200_000, "prompt": "0.000006", "completion": "0.0000225"},
            {"utc_start": "16:30", "utc_end": "00:30", "prompt": "0.000001", "completion": "0.000030"},
        ]
    )
    assert cost_of(found) == rates(6_000_000, 6_000_000, 30_000_000)


def test_a_longer_lived_cache_is_covered() -> None:
    """Cache writes are one count, so the dearer of two prices holds."""
    found = openrouter(input_cache_write="0.00000375", input_cache_write_1h="0.000006")
    assert cost_of(found).cache_write == 6_000_000


def test_a_discount_is_not_taken_off() -> None:
    """A discount may end while its price is in force."""
    assert openrouter(discount=0.5).cost == openrouter().cost


def test_dearer_picture_and_sound_tokens_are_not_offered() -> None:
    """Counted among the prompt's tokens, they would be sold below cost."""
    assert Ability.VISION not in openrouter(image_token="0.000004").abilities
    assert Ability.AUDIO_INPUT not in openrouter(audio="0.00001").abilities


def test_finer_than_pico_is_rounded_up_and_said() -> None:
    """A thirteenth place makes the cost one pico more, never less."""
    found = openrouter(prompt="0.0000001234561", completion="1.5e-6")
    assert cost_of(found).input == 123_457
    assert cost_of(found).output == 1_500_000
    assert found.rounded == ("input",)


def test_models_that_write_no_text_are_left_out() -> None:
    """Pictures are not sold by the token of text."""
    assert decode("openrouter", OPENROUTER | {"architecture": {"output_modalities": ["image"]}}) == []
    assert decode("together", TOGETHER | {"type": "image"}) == []


def test_a_deepinfra_entry() -> None:
    """JSON numbers of dollars per million are read by their digits."""
    (found,) = decode("deepinfra", DEEPINFRA)
    assert found.cost == rates(55_000, 10_000, 790_000)
    assert (found.context, found.max_output) == (131_072, 16_384)
    assert found.abilities == Ability.TOOLS | Ability.JSON_SCHEMA | Ability.VISION


def test_binary_noise_costs_the_next_pico() -> None:
    """A list computed in floats says 0.049999999999999996; that is the 0.05 it meant."""
    text = json.dumps({"data": [DEEPINFRA]}).replace("0.055", "0.049999999999999996")
    (found,) = decode_offers(text.encode(), PRICE_LISTS["deepinfra"])
    assert cost_of(found).input == 50_000
    assert found.rounded == ("input",)


def test_a_together_entry() -> None:
    """The bare array, and the same in an object, are read alike."""
    bare = decode_offers(json.dumps([TOGETHER]).encode(), PRICE_LISTS["together"])
    assert bare == decode("together", TOGETHER)
    assert bare[0].cost == rates(880_000, 880_000, 880_000)


@pytest.mark.parametrize(
    ("pricing", "words"),
    [
        ({"prompt": "-1"}, "input is negative"),
        ({"prompt": "-1", "completion": "-1"}, "input is negative"),
        ({"completion": "abc"}, "output is not a decimal"),
        ({"completion": ""}, "output is not a decimal"),
        ({"completion": "NaN"}, "output is not a decimal"),
        ({"completion": "Infinity"}, "output is not a decimal"),
        ({"completion": "0x10"}, "output is not a decimal"),
        ({"completion": " 1"}, "output is not a decimal"),
        ({"completion": "1_0"}, "output is not a decimal"),
        ({"completion": "1e999"}, "output is not a decimal"),
        ({"completion": True}, "output is not a decimal"),
        ({"completion": ["1"]}, "output is not a decimal"),
        ({"completion": None}, "states no output price"),
        ({"completion": "1.01"}, "output is far above"),
        ({"completion": "1e99"}, "output is far above"),
        ({"request": "1001"}, "request is far above"),
        ({"overrides": {}}, "overrides that are not objects"),
        ({"overrides": [1]}, "overrides that are not objects"),
        ({"overrides": [{"prompt": "-1"}]}, "input is negative"),
    ],
)
def test_each_bad_price_is_named(pricing: dict[str, Any], words: str) -> None:
    """One wrong price makes the model unpriced, says which price it was, and leaves the other models alone."""
    bad = OPENROUTER | {"pricing": OPENROUTER["pricing"] | pricing}
    first, second = decode("openrouter", bad, OPENROUTER | {"id": "fine"})
    assert first.cost is None
    assert words in first.problem
    assert second.cost is not None


@pytest.mark.parametrize("pricing", [None, [], "free", 0])
def test_no_price_at_all_is_said(pricing: Any) -> None:
    """A model without a pricing object is unpriced, in every shape."""
    for preset, row in (("openrouter", OPENROUTER), ("together", TOGETHER)):
        (found,) = decode(preset, row | {"pricing": pricing})
        assert (found.cost, found.problem) == (None, "states no price")
    for metadata in (None, {"pricing": pricing}):
        (found,) = decode("deepinfra", DEEPINFRA | {"metadata": metadata})
        assert (found.cost, found.problem) == (None, "states no price")


@pytest.mark.parametrize("name", [None, 7, "", "two words", "x" * 257, "ünï"])
def test_rows_without_a_usable_name_are_passed_over(name: Any) -> None:
    """Nothing can be sold under them."""
    assert decode("openrouter", OPENROUTER | {"id": name}, 1, None, OPENROUTER)[0].upstream_model == "vendor/model"


@pytest.mark.parametrize("context", [None, 0, -1, 1.5, "200000", 10**12, True])
def test_an_unusable_context_is_none(context: Any) -> None:
    """A context that is not a plain positive integer is as good as not stated."""
    assert decode("openrouter", OPENROUTER | {"context_length": context})[0].context is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"<!doctype html>", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"data": [{"id": "x", "pricing": {"prompt": NaN}}]}', "number that JSON does not have"),
        (b'{"data": [], "data": []}', "same key twice"),
        (b'{"data": {}}', "not a list of models"),
        (b"[]", "not a list of models"),
        (b"7", "not a list of models"),
        (b"[" * 50_000, "nested too deeply"),
        (json.dumps({"data": [0] * (ROWS_MAX + 1)}).encode(), "more than"),
    ],
)
def test_what_is_no_list_of_models_is_refused_whole(data: bytes, words: str) -> None:
    """An answer of another kind has no offers, so no price of ours changes."""
    with pytest.raises(BadPrice, match=words):
        decode_offers(data, PRICE_LISTS["openrouter"])


@pytest.mark.parametrize(
    ("text", "places", "value", "exact"),
    [
        ("0", 12, 0, True),
        ("-0.0", 12, 0, True),
        ("0.000000000001", 12, 1, True),
        ("0.0000000000001", 12, 1, False),
        ("0.59", 6, 590_000, True),
        ("5.9E-1", 6, 590_000, True),
        ("59e+1", 6, 590_000_000, True),
        ("1e-99", 6, 1, False),
    ],
)
def test_decimals_are_moved_not_computed(text: str, places: int, value: int, exact: bool) -> None:
    """A decimal becomes an integer by its digits; what does not fit is rounded up and said."""
    assert pico_up(text, places) == (value, exact)


def test_json_numbers_keep_their_digits() -> None:
    """No number passes through a float on its way."""
    assert load_json(b"[0.1000000000000000055511151231257827, 12345678901234567890123]") == [
        "0.1000000000000000055511151231257827",
        "12345678901234567890123",
    ]
