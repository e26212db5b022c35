"""The tables that say who sells what: providers, models, pricing and routing."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from mppnode.config.load import ConfigError, parse_config
from mppnode.config.presets import PRESETS
from mppnode.config.rates import format_each, format_rate, parse_each, parse_rate
from mppnode.config.schema import Config, QuirksConfig
from mppnode.config.urls import check_base_url
from mppnode.kernel.listing import Ability, ProviderKind
from mppnode.kernel.strategy import PriceCeiling, Strategy

ROOT = Path(__file__).resolve().parents[3]
ENVIRON = {
    "MPPNODE_CHALLENGE_SECRET": "s" * 40,
    "MPPNODE_PAYEE_KEY": "0x" + "22" * 32,
    "DEEPINFRA_API_KEY": "usual-key",
    "OTHER_KEY": "other-key",
    "TWO_LINES": "key\nX-Admin: yes",
}


def tree(**tables: Any) -> dict[str, Any]:
    return tomllib.loads((ROOT / "docs" / "mppnode.example.toml").read_text()) | tables


def load(**tables: Any) -> Config:
    return parse_config(tree(**tables), ENVIRON, base=ROOT)


def refused(environ: dict[str, str] = ENVIRON, **tables: Any) -> set[str]:
    """The keys that are reported."""
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**tables), environ, base=ROOT)
    return {problem.split(":")[0] for problem in caught.value.problems}


def provider(**keys: Any) -> dict[str, Any]:
    return {"name": "my-vllm", "base_url": "http://10.0.0.5:8000/v1"} | keys


def hosted(**keys: Any) -> list[dict[str, Any]]:
    return [provider(), {"name": "infra", "preset": "deepinfra"} | keys]


def model(**keys: Any) -> dict[str, Any]:
    given = {
        "id": "qwen/x",
        "provider": "my-vllm",
        "input_usd_per_million": "0.10",
        "output_usd_per_million": "0.40",
        "context": 8192,
        "max_output": 1024,
    }
    return given | keys


def test_a_preset_knows_address_kind_and_key() -> None:
    """A preset alone is a whole provider."""
    infra = load(providers=hosted()).providers[1]
    assert infra.base_url == "https://api.deepinfra.com/v1/openai"
    assert infra.kind is ProviderKind.QUOTA
    assert infra.api_key is not None
    assert infra.api_key.reveal() == "usual-key"


def test_what_is_written_goes_before_the_preset() -> None:
    """Address, kind, key and quirks of a preset can be replaced one by one."""
    keys = {"base_url": "https://proxy.example/v1", "kind": "external", "api_key": {"env": "OTHER_KEY"}, "quirks": {"limit_field": "max_tokens", "reasoning_added": True}}
    infra = load(providers=hosted(**keys)).providers[1]
    assert (infra.base_url, infra.kind) == ("https://proxy.example/v1", ProviderKind.EXTERNAL)
    assert infra.api_key is not None
    assert infra.api_key.reveal() == "other-key"
    assert infra.quirks == QuirksConfig(limit_field="max_tokens", reasoning_added=True)


def test_a_usual_key_goes_nowhere_else() -> None:
    """With another base URL the preset's key variable is not read: the key would go to a stranger."""
    assert load(providers=hosted(base_url="https://proxy.example/v1")).providers[1].api_key is None


def test_a_missing_usual_key_is_named() -> None:
    """A preset that needs a key says which variable it would have read."""
    without = {name: value for name, value in ENVIRON.items() if name != "DEEPINFRA_API_KEY"}
    with pytest.raises(ConfigError, match=r"providers\[1\]\.api_key: .*DEEPINFRA_API_KEY"):
        parse_config(tree(providers=hosted()), without, base=ROOT)
    assert refused(without | {"DEEPINFRA_API_KEY": "a b"}, providers=hosted()) == {"providers[1].api_key"}


@pytest.mark.parametrize("preset", [preset for preset in PRESETS.values() if preset.base_url])
def test_every_preset_has_an_address_a_provider_may_have(preset: Any) -> None:
    """The table itself passes the checks that configured addresses pass."""
    assert check_base_url(preset.base_url) == preset.base_url


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"preset": "deepinfr"}, "preset"),
        ({"preset": 3}, "preset"),
        ({"base_url": "https://169.254.169.254/v1"}, "base_url"),
        ({"base_url": "http://inference.example.com/v1"}, "base_url"),
        ({"base_url": 1}, "base_url"),
        ({"insecure": "yes"}, "insecure"),
        ({"api_key": {"env": "TWO_LINES"}}, "api_key"),
        ({"api_key": "sk-literal"}, "api_key"),
        ({"models": []}, "models"),
        ({"models": ["a", "a"]}, "models"),
        ({"models": ["*", "a"]}, "models"),
        ({"models": ["has space"]}, "models"),
        ({"models": "a"}, "models"),
        ({"markup_bps": -1}, "markup_bps"),
        ({"markup_bps": 100_001}, "markup_bps"),
        ({"markup_bps": 1.5}, "markup_bps"),
        ({"quirks": {"limit_field": "tokens"}}, "quirks.limit_field"),
        ({"quirks": {"continuous_usage": 1}}, "quirks.continuous_usage"),
        ({"quirks": {"limit": "max_tokens"}}, "quirks.limit"),
        ({"quirks": 1}, "quirks"),
        ({"modells": ["*"]}, "modells"),
    ],
)
def test_each_bad_key_of_a_provider_is_named(keys: dict[str, Any], key: str) -> None:
    """One wrong value is reported under its own key and no other."""
    assert refused(providers=[provider(**keys)]) == {f"providers[0].{key}"}


def test_plain_http_to_a_name_is_said_out_loud() -> None:
    """`insecure = true` allows what is refused otherwise."""
    assert load(providers=[provider(base_url="http://gpu:8000/v1", insecure=True)]).providers[0].insecure


def test_preset_without_an_address_needs_one() -> None:
    """The development provider has no usual address."""
    assert refused(providers=[provider(), {"name": "d", "preset": "dev"}]) == {"providers[1].base_url"}


def test_several_providers_may_sell_one_model() -> None:
    """A model is unique per provider, not altogether."""
    both = [provider(), provider(name="other", base_url="http://10.0.0.6/v1")]
    config = load(providers=both, models=[model(), model(provider="other")])
    assert [(entry.id, entry.provider) for entry in config.models] == [("qwen/x", "my-vllm"), ("qwen/x", "other")]
    assert refused(providers=both, models=[model(), model()]) == {"models.id"}


def test_models_may_come_from_the_catalog_alone() -> None:
    """Without any [[models]] table some provider has to sell from the catalog file."""
    assert load(models=[], providers=[provider(models=["*"])]).models == ()
    assert refused(models=[]) == {"models"}


def test_a_model_says_everything_that_is_priced() -> None:
    """Every axis of a price, the abilities and the tokenizer are read."""
    keys = {
        "cached_input_usd_per_million": "0.01",
        "cache_write_usd_per_million": "0.125",
        "reasoning_usd_per_million": "0.5",
        "request_usd": "0.001",
        "image_usd": "0.000000000001",
        "audio_second_usd": "0.0001",
        "abilities": ["vision", "tools"],
        "quality": 71,
        "tokenizer": "qwen.json",
    }
    read = load(models=[model(**keys)]).models[0]
    assert (read.cached_input, read.cache_write, read.reasoning) == (10_000, 125_000, 500_000)
    assert (read.request, read.image, read.audio_second) == (10**9, 1, 10**8)
    assert read.abilities == Ability.VISION | Ability.TOOLS
    assert (read.quality, read.tokenizer) == (71, ROOT / "qwen.json")


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"request_usd": 0.01}, "request_usd"),
        ({"image_usd": "-1"}, "image_usd"),
        ({"audio_second_usd": "0.0000000000001"}, "audio_second_usd"),
        ({"request_usd": "1000.01"}, "request_usd"),
        ({"cache_write_usd_per_million": "nan"}, "cache_write_usd_per_million"),
        ({"reasoning_usd_per_million": "0.1234567"}, "reasoning_usd_per_million"),
        ({"abilities": ["telepathy"]}, "abilities"),
        ({"abilities": ["tools", "tools"]}, "abilities"),
        ({"abilities": "tools"}, "abilities"),
        ({"quality": 101}, "quality"),
        ({"tokenizer": "https://x"}, "tokenizer"),
        ({"upstream_model": "has space"}, "upstream_model"),
    ],
)
def test_each_bad_key_of_a_model_is_named(keys: dict[str, Any], key: str) -> None:
    """One wrong value is reported under its own key and no other."""
    assert refused(models=[model(**keys)]) == {f"models[0].{key}"}


def test_routing_and_pricing_are_read() -> None:
    """Every key of the two tables arrives, and paths are relative to the file."""
    config = load(
        pricing={"catalog": "p.json", "stale_s": 3600, "band_pct": 0, "markup_bps": 250},
        routing={
            "strategy": "cheapest",
            "allow_external": False,
            "max_input_price_per_million": 0,
            "max_output_price_per_million": 200,
            "attempts_max": 5,
            "seed_compat": True,
            "model_pool": ["qwen/x"],
            "optimize": "cost",
        },
    )
    assert config.pricing.catalog == ROOT / "p.json"
    assert (config.pricing.stale_s, config.pricing.band_pct, config.pricing.markup_bps) == (3600, 0, 250)
    routing = config.routing
    assert (routing.strategy, routing.allow_external, routing.ceiling) == (Strategy.CHEAPEST, False, PriceCeiling(0, 200))
    assert (routing.attempts_max, routing.seed_compat, routing.model_pool, routing.optimize) == (5, True, ("qwen/x",), "cost")


@pytest.mark.parametrize(
    ("table", "keys", "key"),
    [
        ("pricing", {"stale_s": 1}, "stale_s"),
        ("pricing", {"band_pct": -1}, "band_pct"),
        ("pricing", {"markup_bps": "10"}, "markup_bps"),
        ("pricing", {"catalog": ""}, "catalog"),
        ("pricing", {"catalogue": "x"}, "catalogue"),
        ("routing", {"strategy": "best"}, "strategy"),
        ("routing", {"allow_external": "no"}, "allow_external"),
        ("routing", {"max_input_price_per_million": 1}, "max_output_price_per_million"),
        ("routing", {"max_output_price_per_million": 1}, "max_input_price_per_million"),
        ("routing", {"max_input_price_per_million": 1.5, "max_output_price_per_million": 1}, "max_input_price_per_million"),
        ("routing", {"max_input_price_per_million": True, "max_output_price_per_million": 1}, "max_input_price_per_million"),
        ("routing", {"attempts_max": 0}, "attempts_max"),
        ("routing", {"seed_compat": 1}, "seed_compat"),
        ("routing", {"model_pool": []}, "model_pool"),
        ("routing", {"optimize": "speed"}, "optimize"),
        ("treasury", {"exposure_max": "0"}, "exposure_max"),
        ("treasury", {"sponsor_fee_max": "0.000000"}, "sponsor_fee_max"),
        ("treasury", {"sponsor_budget": "0"}, "sponsor_budget"),
        ("treasury", {"second_rpc_url": "https://rpc.example.com"}, "second_rpc_url"),
        ("treasury", {"second_rpc_url": "https://RPC.example.com/"}, "second_rpc_url"),
    ],
)
def test_each_bad_key_of_the_other_tables_is_named(table: str, keys: dict[str, Any], key: str) -> None:
    """One wrong value is reported under its own key and no other."""
    assert refused(**{table: keys}) == {f"{table}.{key}"}


@pytest.mark.parametrize("text", ["0.00", "0.50", "0.055", "12.345678", "999999.999999"])
def test_rates_are_written_as_they_are_read(text: str) -> None:
    """Text to pico and back is the same text."""
    assert format_rate(parse_rate(text)) == text


@pytest.mark.parametrize("text", ["0.00", "0.005", "0.000000000001", "1000.00"])
def test_single_prices_are_written_as_they_are_read(text: str) -> None:
    """Text to pico and back is the same text."""
    assert format_each(parse_each(text)) == text
