"""The ``[billing]`` table: what a node with a Stripe account starts with, and what it does not start with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mppnode.config.billing import BillingConfig, read_billing
from mppnode.config.section import Section

ENVIRON = {
    "STRIPE_KEY": "sk_test_canaryCanaryCanary",
    "LIVE": "sk_live_canaryCanaryCanary",
    "RESTRICTED": "rk_test_canaryCanaryCanary",
    "PUBLISHABLE": "pk_test_canaryCanaryCanary",
    "HOOK": "whsec_canaryCanaryCanary",
    "HOOK2": "whsec_anotherAnotherOne1",
    "SHORT": "whsec_fifteen-letters",
    "PREFIX": "whsec_",
    "BARE": "canaryCanaryCanaryCanary",
}
GOOD: dict[str, Any] = {
    "secret_key": {"env": "STRIPE_KEY"},
    "webhook_secrets": [{"env": "HOOK"}, {"env": "HOOK2"}],
    "success_url": "https://node.example.com/paid?session={CHECKOUT_SESSION_ID}",
    "cancel_url": "https://node.example.com/account",
    "return_url": "http://localhost:8000/account",
    "packs_cents": [500, 2_000, 10_000],
    "meter": "inference_usage",
    "meter_price": "price_1Qx",
    "livemode": False,
}


def parse(values: dict[str, Any], base: Path = Path()) -> tuple[BillingConfig, list[str]]:
    problems: list[str] = []
    config = read_billing(Section(values, "billing", problems, ENVIRON, base))
    return config, problems


def test_a_full_table_is_read(tmp_path: Path) -> None:
    """Every key has its place, and a secret may be in a file."""
    (tmp_path / "hook").write_text("whsec_fromFileFromFileFrom\n")
    config, problems = parse(GOOD | {"webhook_secrets": [{"file": "hook"}]}, tmp_path)
    assert problems == []
    assert config.secret_key.reveal() == ENVIRON["STRIPE_KEY"]
    assert [secret.reveal() for secret in config.webhook_secrets] == ["whsec_fromFileFromFileFrom"]
    assert config.success_url.endswith("?session={CHECKOUT_SESSION_ID}")
    assert config.packs_cents == (500, 2_000, 10_000)
    assert (config.meter, config.livemode) == ("inference_usage", False)
    assert "canary" not in repr(config)


def test_a_meter_needs_the_price_its_customers_are_subscribed_to() -> None:
    """Reported and not subscribed, usage would be counted and never billed."""
    _, problems = parse({name: value for name, value in GOOD.items() if name != "meter_price"})
    assert problems == ["billing.meter_price: is required with meter: nobody would be billed for what is reported"]


def test_a_node_may_have_no_meter_and_a_restricted_key() -> None:
    """Post-paid is optional, and a key may be one that can do less."""
    config, problems = parse({name: value for name, value in GOOD.items() if not name.startswith("meter")} | {"secret_key": {"env": "RESTRICTED"}})
    assert (config.meter, problems) == (None, [])


BAD: list[tuple[str, Any, str]] = [
    ("secret_key", {"env": "LIVE"}, "live key"),
    ("secret_key", {"env": "PUBLISHABLE"}, "secret or restricted key"),
    ("secret_key", "sk_test_canaryCanaryCanary", "never the secret itself"),
    ("webhook_secrets", [], "at least one"),
    ("webhook_secrets", [{"env": "EMPTY"}], "not set"),
    ("webhook_secrets", [{"env": "HOOK"}, {"env": "PREFIX"}], "at least 16"),
    ("webhook_secrets", [{"env": "SHORT"}], "at least 16"),
    ("webhook_secrets", [{"env": "BARE"}], "whsec_"),
    ("webhook_secrets", [{"env": "HOOK"}, {"env": "HOOK"}], "twice"),
    ("webhook_secrets", [{"env": "HOOK"}] * 5, "at most 4"),
    ("webhook_secrets", {"env": "HOOK"}, "list"),
    ("success_url", "http://node.example.com/paid", "https"),
    ("success_url", "http://10.0.0.1/paid", "loopback"),
    ("cancel_url", "javascript:alert(1)", "must look like"),
    ("cancel_url", "https://node.example.com/paid?a=<b>", "query"),
    ("return_url", "https://user:canary@node.example.com/", "password"),
    ("return_url", 7, "text"),
    ("packs_cents", [], "list of 1"),
    ("packs_cents", [49], "50"),
    ("packs_cents", [500.0], "integers"),
    ("packs_cents", [True], "integers"),
    ("packs_cents", [2_000, 500], "rise"),
    ("packs_cents", [500, 500], "rise"),
    ("packs_cents", list(range(100, 121)), "list of 1 to 20"),
    ("meter", "two words", "inference_usage"),
    ("livemode", "no", "true or false"),
    ("live_mode", True, "did you mean livemode"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_a_bad_value_is_named_and_not_repeated(name: str, value: Any, words: str) -> None:
    """K5: an empty or short webhook secret, like every other bad value, is a problem by its key, without the secret."""
    _, problems = parse(GOOD | {name: value})
    assert any(problem.startswith(f"billing.{name}") and words in problem for problem in problems)
    assert "canary" not in " ".join(problems).lower()


@pytest.mark.parametrize("name", ["secret_key", "webhook_secrets", "success_url", "cancel_url", "return_url", "packs_cents", "livemode"])
def test_what_must_be_there_is_asked_for(name: str) -> None:
    """Nothing about money has a default."""
    _, problems = parse({key: value for key, value in GOOD.items() if key != name})
    assert f"billing.{name}: is required" in problems
