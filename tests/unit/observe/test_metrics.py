"""What the facade counts, read back through the registry as a scraper would."""

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.registry import DuplicateTimeseries

from mppnode.engine.stream import Ending
from mppnode.kernel.clock import ManualClock
from mppnode.observe import metric_catalog as catalog
from mppnode.observe.metric_catalog import CATALOG, SERIES_MAX, Kind, series_max
from mppnode.observe.metric_labels import MODELS_MAX, OTHER, Vocabulary
from mppnode.observe.metrics import Metrics

MODEL, PROVIDER = "qwen/qwen3.5-9b", "rack"


def node(**more):
    registry = CollectorRegistry()
    vocabulary = Vocabulary([MODEL], [PROVIDER], **more)
    return registry, Metrics(registry, clock=ManualClock(), vocabulary=vocabulary)


def serve(metrics, ending=Ending.COMPLETE, **more):
    metrics.request_began("session", stream=True)
    asked = {"model": MODEL, "provider": PROVIDER, "cost_pico": 10**12, "source": "reported", "total_s": 2.0, **more}
    metrics.request_ended("session", ending, stream=True, **asked)


def test_a_request_is_counted_once_wherever_it_belongs():
    """One end of a request moves every number it is about, by exactly its amount."""
    registry, metrics = node()
    serve(metrics, prompt_tokens=100, cached_tokens=40, completion_tokens=7, first_s=0.3, gap_s=0.02, stalled_s=1.5, attempts=2)
    value = registry.get_sample_value
    assert value("mppnode_requests_total", {"rail": "session", "ending": "complete"}) == 1
    assert value("mppnode_model_requests_total", {"model": MODEL, "outcome": "served"}) == 1
    assert value("mppnode_charged_usd_total", {"rail": "session"}) == 1.0
    assert value("mppnode_model_charged_usd_total", {"model": MODEL}) == 1.0
    assert value("mppnode_provider_charged_usd_total", {"provider": PROVIDER}) == 1.0
    kinds = {kind: value("mppnode_tokens_total", {"model": MODEL, "kind": kind}) for kind in ("prompt", "cached", "completion", "reasoning")}
    assert kinds == {"prompt": 100, "cached": 40, "completion": 7, "reasoning": 0}
    assert value("mppnode_counted_requests_total", {"source": "reported"}) == 1
    assert value("mppnode_stall_seconds_total") == 1.5
    for name in ("first_token", "token_gap"):
        assert value(f"mppnode_{name}_seconds_count", {"provider": PROVIDER}) == 1
    assert value("mppnode_first_token_seconds_bucket", {"provider": PROVIDER, "le": "0.2"}) == 0
    assert value("mppnode_first_token_seconds_bucket", {"provider": PROVIDER, "le": "0.4"}) == 1
    assert value("mppnode_request_attempts_sum") == 2


def test_what_nobody_answered_and_what_came_in_one_piece_say_nothing_of_speed():
    """A failed request has no first try that served, and the first token of a buffered answer is its last."""
    registry, metrics = node()
    metrics.request_began("credit", stream=False)
    metrics.request_ended("credit", Ending.COMPLETE, stream=False, model=MODEL, provider=PROVIDER, first_s=40.0, attempts=1)
    metrics.request_began("credit", stream=True)
    metrics.request_ended("credit", "failed", stream=True, model=MODEL, provider=None, attempts=1)
    assert registry.get_sample_value("mppnode_first_token_seconds_count", {"provider": PROVIDER}) == 0
    assert registry.get_sample_value("mppnode_request_attempts_count") == 1


@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        *((ending, "served") for ending in (Ending.COMPLETE, Ending.OVERRUN)),
        *((ending, "failed") for ending in (Ending.UPSTREAM_FAILED, "failed")),
        *((ending, "abandoned") for ending in (Ending.UNPAID, Ending.SUPERSEDED, Ending.CLOSED, Ending.STALLED, Ending.DISCONNECTED)),
    ],
)
def test_every_ending_is_somebodys_doing(ending, outcome):
    """Availability counts what we or a provider broke, and nothing a payer did."""
    registry, metrics = node()
    serve(metrics, ending)
    assert registry.get_sample_value("mppnode_model_requests_total", {"model": MODEL, "outcome": outcome}) == 1


def test_what_is_running_goes_up_and_down_and_never_below_nothing():
    """Active requests, streams and pauses end at zero, also when an end is reported twice."""
    registry, metrics = node()
    value = registry.get_sample_value
    metrics.request_began("session", stream=True)
    metrics.pause_began()
    active = {"rail": "session"}
    assert (value("mppnode_requests_active", active), value("mppnode_streams_active"), value("mppnode_streams_paused")) == (1, 1, 1)
    metrics.pause(0.25, "paid")
    metrics.pause(0.25, "gone")
    metrics.request_ended("session", "complete", stream=True, model=MODEL, provider=None)
    metrics.request_ended("session", "complete", stream=True, model=MODEL, provider=None)
    assert (value("mppnode_requests_active", active), value("mppnode_streams_active"), value("mppnode_streams_paused")) == (0, 0, 0)
    assert value("mppnode_pause_seconds_count") == 2
    assert value("mppnode_pauses_total", {"ended": "paid"}) == 1


def test_money_is_added_up_exactly_before_it_is_shown():
    """Half a million charges of three pico-dollars on top of a million dollars are not lost to rounding."""
    registry, metrics = node()
    counter = metrics._charged
    counter.add(10**18, "credit")
    for _ in range(500_000):
        counter.add(3, "credit")
    assert counter.cells[("credit",)] == 10**18 + 1_500_000
    assert registry.get_sample_value("mppnode_charged_usd_total", {"rail": "credit"}) == (10**18 + 1_500_000) / 10**12


@pytest.mark.parametrize("bad", [-1, -0.5, float("nan"), float("inf"), 10**25])
def test_a_value_that_is_none_is_counted_and_not_taken(bad):
    """A wrong number never raises in the middle of a payment, never breaks a sum, and is seen."""
    registry, metrics = node()
    metrics.settled_on_chain("settle", bad, 0)
    metrics.loop_lag(bad)
    metrics.pause(bad, "paid")
    value = registry.get_sample_value
    assert value("mppnode_settled_usd_total") == 0
    assert value("mppnode_loop_lag_seconds_count") == value("mppnode_loop_lag_seconds_sum") == 0
    assert value("mppnode_metric_values_rejected_total") == 3


def test_a_name_that_becomes_known_has_its_series_before_anything_happens() -> None:
    """A first failure of a model is seen by rate(): its series was there, at zero, since the catalog named it."""
    registry, metrics = node()
    for name, labels in (
        ("model_requests_total", {"model": MODEL, "outcome": "failed"}),
        ("provider_attempts_total", {"provider": PROVIDER, "result": "timeout"}),
        ("first_token_seconds_count", {"provider": PROVIDER}),
    ):
        assert registry.get_sample_value(f"mppnode_{name}", labels) == 0
    late = {"model": "maker/late", "outcome": "served"}
    assert registry.get_sample_value("mppnode_model_requests_total", late) is None
    metrics.know(models=["maker/late"], providers=["late"])
    assert registry.get_sample_value("mppnode_model_requests_total", late) == 0
    assert registry.get_sample_value("mppnode_upstream_cancels_total", {"provider": "late"}) == 0


def test_what_can_be_known_beforehand_is_there_from_the_start():
    """A counter that begins with its first rise hides it from rate(): every fixed series exists at zero."""
    registry, _metrics = node()
    value = registry.get_sample_value
    assert value("mppnode_holds_refused_total", {"rail": "credit", "reason": "insufficient_credit"}) == 0
    assert value("mppnode_ceiling_breaches_total") == 0
    assert value("mppnode_store_commit_seconds_count", {"store": "sqlite"}) == 0
    assert value("mppnode_fee_payer_balance_usd") is None  # a gauge nobody has set is unknown, not zero


def test_a_name_that_is_gone_is_missed_no_more_and_other_shows_the_worst():
    """A model without providers that is taken off the list raises no alarm for ever, and no name hides another's zero."""
    registry, metrics = node()
    value = registry.get_sample_value
    metrics.providers_usable({MODEL: 0, "beyond/one": 0, "beyond/two": 3})
    metrics.breaker_states({PROVIDER: 4, "q1": 2, "q2": 0})
    metrics.prices_confirmed({PROVIDER: 77, "q1": 9, "q2": 8}, {"q1": 1, "q2": 1, "nowhere": 5})
    assert value("mppnode_model_providers_usable", {"model": OTHER}) == 0
    assert value("mppnode_provider_standing", {"provider": OTHER}) == 2
    assert value("mppnode_price_timestamp_seconds", {"provider": OTHER}) == 8
    assert value("mppnode_prices_held", {"provider": OTHER}) == 2
    metrics.providers_usable({})
    metrics.breaker_states({})
    metrics.prices_confirmed({}, {PROVIDER: 1})
    for name in ("provider_standing", "price_timestamp_seconds", "prices_held"):
        assert value(f"mppnode_{name}", {"provider": PROVIDER}) is None
    assert value("mppnode_model_providers_usable", {"model": MODEL}) is None
    assert value("mppnode_metric_values_folded_total") == 0, "what our own catalog names is no stranger"


def test_gauges_of_money_may_be_large_and_negative():
    """The sums of a large node and a balance below zero are shown as they are."""
    registry, metrics = node()
    metrics.channel_money(claimable_pico=5 * 10**18, earned_pico=1, headroom_pico=0, unsigned_pico=0)
    metrics.reconciled(1_900_000_000, 2, -3 * 10**12)
    value = registry.get_sample_value
    assert value("mppnode_channel_usd", {"money": "claimable"}) == 5_000_000
    assert value("mppnode_channel_usd", {"money": "earned"}) == 1e-12
    assert value("mppnode_ledger_drift_usd") == -3
    assert value("mppnode_reconciled_timestamp_seconds") == 1_900_000_000


def test_every_reporter_reaches_a_metric_of_its_own():
    """Each of the facade's methods changes the one sample it is named for."""
    registry, metrics = node()
    rack, model = {"provider": PROVIDER}, {"model": MODEL}
    story = [
        (lambda: metrics.request_refused("cap_reached"), "requests_refused_total", {"reason": "cap_reached"}, 1),
        (lambda: metrics.hold_refused("session", "insufficient_balance"), "holds_refused_total", {"rail": "session", "reason": "insufficient_balance"}, 1),
        (metrics.ceiling_breached, "ceiling_breaches_total", {}, 1),
        (lambda: metrics.disconnected("paused"), "disconnects_total", {"phase": "paused"}, 1),
        (lambda: metrics.upstream_cancelled(PROVIDER), "upstream_cancels_total", rack, 1),
        (lambda: metrics.routed("fastest", "auto", {"quote": 3}), "routing_exclusions_total", {"reason": "quote"}, 3),
        (lambda: metrics.routed("fastest", "auto", {}), "routing_decisions_total", {"strategy": "fastest", "asked": "auto"}, 2),
        (lambda: metrics.provider_attempt(PROVIDER, "timeout"), "provider_attempts_total", {**rack, "result": "timeout"}, 1),
        (lambda: metrics.breaker_states({PROVIDER: 4}), "provider_standing", rack, 4),
        (lambda: metrics.providers_usable({MODEL: 0}), "model_providers_usable", model, 0),
        (lambda: metrics.prices_confirmed({PROVIDER: 77}, {PROVIDER: 2}), "prices_held", rack, 2),
        (lambda: metrics.voucher_accepted(2 * 10**12, 0.001), "accepted_usd_total", {}, 2),
        (lambda: metrics.voucher_refused("voucher_too_low"), "vouchers_refused_total", {"reason": "voucher_too_low"}, 1),
        (metrics.channel_opened, "channels_opened_total", {}, 1),
        (lambda: metrics.settled_on_chain("close", 10**12, 10**9), "gas_usd_total", {"purpose": "close"}, 0.001),
        (lambda: metrics.transaction_failed("settle", "reverted"), "transactions_total", {"kind": "settle", "result": "reverted"}, 1),
        (lambda: metrics.gas_sponsored(10**12), "gas_usd_total", {"purpose": "sponsor"}, 1),
        (lambda: metrics.channels({"open": 3}), "channels", {"phase": "open"}, 3),
        (lambda: metrics.channels({"open": 3}), "channels", {"phase": "suspect"}, 0),
        (lambda: metrics.unsettled_age(9.5), "unsettled_oldest_age_seconds", {}, 9.5),
        (lambda: metrics.close_requests(2, 121.0), "close_request_oldest_age_seconds", {}, 121),
        (lambda: metrics.exposure("session", 10**12), "exposure_usd", {"rail": "session"}, 1),
        (lambda: metrics.fee_payer_balance(10**12), "fee_payer_balance_usd", {}, 1),
        (lambda: metrics.sponsor_budget(10**12, 4 * 10**12), "sponsor_budget_usd", {}, 4),
        (lambda: metrics.chain_head_age(3.0), "chain_head_age_seconds", {}, 3),
        (lambda: metrics.keys_active(12), "keys_active", {}, 12),
        (lambda: metrics.limit_reached("month"), "limits_reached_total", {"limit": "month"}, 1),
        (lambda: metrics.credited("payment", 10**13), "credited_usd_total", {"kind": "payment"}, 10),
        (lambda: metrics.taken_back("payment", 10**13), "taken_back_usd_total", {"kind": "payment"}, 10),
        (lambda: metrics.unbilled(10**12), "unbilled_usd", {}, 1),
        (lambda: metrics.outbox("alert", due=4, parked=1, oldest_s=60.0), "outbox_tasks", {"kind": "alert", "state": "due"}, 4),
        (lambda: metrics.outbox_attempt("meter", "again"), "outbox_attempts_total", {"kind": "meter", "result": "again"}, 1),
        (lambda: metrics.webhook("refunded"), "webhooks_total", {"kind": "refunded"}, 1),
        (lambda: metrics.webhook_refused("stale"), "webhooks_refused_total", {"reason": "stale"}, 1),
        (lambda: metrics.stripe_called("outcome_unknown"), "stripe_calls_total", {"result": "outcome_unknown"}, 1),
        (metrics.meter_error, "meter_errors_total", {}, 1),
        (lambda: metrics.committed("sqlite", 0.003), "store_commit_seconds_count", {"store": "sqlite"}, 1),
        (lambda: metrics.commit_failed("postgres"), "store_failures_total", {"store": "postgres"}, 1),
        (lambda: metrics.loop_lag(0.002), "loop_lag_seconds_count", {}, 1),
    ]
    for tell, name, labels, expected in story:
        tell()
        assert registry.get_sample_value(f"mppnode_{name}", labels) == expected, name
    assert registry.get_sample_value("mppnode_metric_values_folded_total") == 0
    assert registry.get_sample_value("mppnode_processes") == 1
    assert registry.get_sample_value("process_cpu_seconds_total") > 0
    silent = {spec.name for spec in CATALOG} - metrics._board.names()
    assert not silent


def test_names_follow_the_conventions():
    """Counters end in _total, units are base units and stand last, and every metric says what it is."""
    assert len({spec.name for spec in CATALOG}) == len(CATALOG)
    for spec in CATALOG:
        bare = spec.name.removesuffix("_total")
        assert (spec.kind is Kind.COUNTER) == spec.name.endswith("_total")
        assert bare.startswith(("mppnode_", "process_"))
        assert not bare.endswith(("_ms", "_us", "_millis", "_cents", "_pico", "_count", "_sum", "_bucket"))
        assert spec.unit in ("", "seconds", "bytes", "usd")
        assert not spec.unit or bare.endswith(f"_{spec.unit}")
        assert spec.help.endswith(".")
        assert len(spec.help) < 100
        assert list(spec.bounds) == sorted(set(spec.bounds))
        assert bool(spec.bounds) == (spec.kind is Kind.HISTOGRAM)
    spans = {spec.name: (spec.bounds[0], spec.bounds[-1]) for spec in CATALOG if spec.bounds}
    assert spans[catalog.FIRST_TOKEN_SECONDS.name] == (0.01, 60.0)
    assert spans[catalog.TOKEN_GAP_SECONDS.name] == (0.001, 10.0)
    assert spans[catalog.COMMIT_SECONDS.name] == (0.00005, 5.0)


def test_a_vocabulary_beyond_the_budget_is_refused_at_the_start():
    """The budget is checked where it can still be helped, and the built-in limits are inside it."""
    assert series_max(Vocabulary()) <= SERIES_MAX
    with pytest.raises(ValueError, match=f"{SERIES_MAX} is the most"):
        node(models_max=MODELS_MAX * 10)


def test_two_sets_of_metrics_in_one_registry_are_refused():
    """Nothing is at module level, so two nodes have two registries, and one registry has one node."""
    registry, metrics = node()
    with pytest.raises(DuplicateTimeseries):
        Metrics(registry, clock=ManualClock(), vocabulary=Vocabulary())
    _other, untouched = node()
    metrics.channel_opened()
    assert untouched._opened.cells == {(): 0}


def test_without_other_processes_there_is_nothing_to_write():
    """A single process needs no folder: flushing and closing do nothing."""
    registry, metrics = node()
    metrics.channel_opened()
    metrics.flush()
    metrics.close()
    assert registry.get_sample_value("mppnode_channels_opened_total") == 1
