"""Forms about keys and accounts: every field is honoured or refused by name, and secrets are shown once."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channels.instants import UnixSeconds
from mppnode.accounts.forms import read_key_form, read_operated, read_rotation, read_settings
from mppnode.kernel.faults import NodeFault, NodeReason
from tests.http.accounts.office import Office

NOW = UnixSeconds(1_900_000_000)
BIG = 10**30


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"nmae": "x"}, "nmae"), ({"name": 5}, "name"), ({"name": "a\u0007"}, "name"), ({"name": "x" * 129}, "name"), ({"name": None}, "name"),
        ({"model_pool": []}, "model_pool"), ({"model_pool": ["a"] * 65}, "model_pool"), ({"model_pool": ["a", ""]}, "model_pool[1]"), ({"model_pool": "a"}, "model_pool"),
        ({"optimize_mode": "best"}, "optimize_mode"), ({"optimize_mode": ""}, "optimize_mode"), ({"optimize_mode": 0}, "optimize_mode"), ({"optimize_mode": False}, "optimize_mode"),
        ({"routing_strategy": []}, "routing_strategy"), ({"allow_external": 1}, "allow_external"), ({"allow_external": "true"}, "allow_external"),
        ({"max_input_price_per_million": 1}, "max_output_price_per_million"), ({"max_output_price_per_million": 1}, "max_input_price_per_million"),
        ({"max_input_price_per_million": 1, "max_output_price_per_million": None}, "max_output_price_per_million"), ({"max_input_price_per_million": -1}, "max_input_price_per_million"),
        ({"spend_caps": 5}, "spend_caps"), ({"spend_caps": {"week": 5}}, "spend_caps.week"), ({"spend_caps": {"day": 5.0}}, "spend_caps.day"), ({"spend_caps": {"day": 400_000_001}}, "spend_caps.day"),
        ({"spend_caps": {"day": 2, "month": 1}}, "spend_caps"), ({"rpm": 0}, "rpm"), ({"rpm": True}, "rpm"), ({"tpm": 10**12 + 1}, "tpm"), ({"concurrency": 1025}, "concurrency"),
        ({"expires_at": int(NOW)}, "expires_at"), ({"expires_at": "tomorrow"}, "expires_at"), ({"expires_at": "2031-01-01T00:00:00"}, "expires_at"), ({"expires_at": 1e10}, "expires_at"), ({"expires_at": 253402300800}, "expires_at"),
    ],
)
def test_a_wrong_key_form_is_refused_by_name(body: dict[str, Any], named: str) -> None:
    """What is wrong with a key's settings is named by its path."""
    with pytest.raises(NodeFault) as caught:
        read_key_form(orjson.dumps(body), now=NOW)
    assert (caught.value.reason, caught.value.field) == (NodeReason.INVALID_FIELD, named)


def test_a_near_name_is_offered() -> None:
    """A typing error is answered with the name it was meant to be; text that is no name is not repeated."""
    with pytest.raises(NodeFault, match="did you mean model_pool"):
        read_key_form(b'{"model_pol": null}', now=NOW)
    with pytest.raises(NodeFault, match="a field is not known here"):
        read_key_form(b'{"<script>": null}', now=NOW)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"alerts": {"url": "http://a.example/"}}, "alerts.url"), ({"alerts": {}}, "alerts.url"), ({"alerts": {"url": "https://a.example/", "low_balance_cents": -1}}, "alerts.low_balance_cents"),
        ({"alerts": {"url": "https://a.example/", "secret": "x"}}, "alerts.secret"), ({"alerts": []}, "alerts"), ({"recharge": {"threshold_cents": 1}}, "recharge.amount_cents"),
        ({"recharge": {"threshold_cents": 1, "amount_cents": 500, "month_cap_cents": 499}}, "recharge.month_cap_cents"), ({"recharge": {"threshold_cents": 1, "amount_cents": 499, "month_cap_cents": 499}}, "recharge.amount_cents"),
        ({"email": "a@b"}, "email"), ({"suspended": False}, "suspended"), ({"terms": "postpaid"}, "terms"), ({"name": "x"}, "name"),
    ],
)
def test_wrong_settings_are_refused_by_name(body: dict[str, Any], named: str) -> None:
    """What an owner may not or cannot set is named; terms, suspension and e-mail are the operator's."""
    with pytest.raises(NodeFault) as caught:
        read_settings(orjson.dumps(body))
    assert caught.value.field == named


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"terms": "postpaid"}, "trust_limit_cents"), ({"trust_limit_cents": 5}, "terms"), ({"terms": "prepaid", "trust_limit_cents": 5}, "trust_limit_cents"),
        ({"terms": None}, "terms"), ({"suspended": None}, "suspended"), ({"email": "nobody"}, "email"),
    ],
)
def test_wrong_terms_are_refused_by_name(body: dict[str, Any], named: str) -> None:
    """An operator's half-said terms are refused: a limit without post-paid, or the other way round."""
    with pytest.raises(NodeFault) as caught:
        read_operated(orjson.dumps(body))
    assert caught.value.field == named


@pytest.mark.parametrize("body", [b'{"overlap_s": -1}', b'{"overlap_s": 604801}', b'{"overlap_s": null}', b'{"overlap": 1}', b"[]", b"5"])
def test_an_overlap_is_at_most_a_week(body: bytes) -> None:
    """Two keys for one place live side by side for a week at most; nothing said is a day."""
    with pytest.raises(NodeFault):
        read_rotation(body)
    assert read_rotation(b"") == read_rotation(b"{}") == 86_400


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-BIG, BIG), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["day", "url", "amount_cents", "x"]), inner, max_size=3)),
    max_leaves=6,
)
NAMES = ["name", "model_pool", "optimize_mode", "spend_caps", "rpm", "expires_at", "concurrency", "allow_external", "alerts", "recharge", "terms", "max_input_price_per_million"]


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_no_form_breaks_its_reader(body: dict[str, Any]) -> None:
    """Any JSON is a form or a refusal, never another exception."""
    raw = json.dumps(body).encode()
    for read in (lambda: read_key_form(raw, now=NOW), lambda: read_settings(raw), lambda: read_operated(raw), lambda: read_rotation(raw)):
        with contextlib.suppress(NodeFault):
            read()


async def test_an_alert_secret_is_shown_once_and_per_address(desk: Office) -> None:
    """A new address gets a new secret, shown in that answer alone; the same address keeps the one it has."""
    _, owner = await desk.customer("first")

    async def set_alerts(alerts: dict[str, Any] | None) -> Any:
        return (await desk.ask("PATCH", "/v1/account", owner.secret.text, {"alerts": alerts})).json["alerts"]

    first = await set_alerts({"url": "https://a.example/x"})
    assert first["secret"].startswith("whsec_")
    assert await set_alerts({"url": "https://a.example/x", "low_balance_cents": 500}) == {"url": "https://a.example/x", "low_balance_cents": 500}
    assert first["secret"] not in (await desk.ask("GET", "/v1/account", owner.secret.text)).body.decode()
    other = await set_alerts({"url": "https://b.example/x"})
    assert other["secret"] != first["secret"]
    assert await set_alerts(None) is None
    recharge = {"threshold_cents": 100, "amount_cents": 1000, "month_cap_cents": 5000}
    shown = (await desk.ask("PATCH", "/v1/account", owner.secret.text, {"recharge": recharge, "routing_strategy": "fastest"})).json
    assert (shown["recharge"], shown["routing_strategy"]) == (recharge, "fastest")
    assert (await desk.ask("PATCH", "/v1/account", owner.secret.text, {"recharge": None})).json["recharge"] is None
