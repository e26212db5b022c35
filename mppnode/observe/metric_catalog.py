"""Every metric of the node, declared once: its name, unit, labels, buckets, and how several processes make one value.

Names follow the Prometheus conventions: base units (seconds, bytes), the unit last, ``_total`` on counters. Money is
exposed in dollars. Inside, a counter adds up whole pico-dollars and is divided once, when it is scraped, so its float
is the nearest to the exact sum. Counting micro-dollars instead would lose the fractions and gain nothing: a sample is a
64-bit float in any unit. What is owed and paid is in the ledger; a metric is a picture of it and no book.

Something that waits is shown by its age in seconds, zero when nothing waits; something that should happen regularly by
the time it last did, as an age of the last success would stop growing when its reporter stops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Final

from mppnode.observe import metric_labels as labels
from mppnode.observe.metric_labels import Label, Vocabulary

SERIES_MAX: Final = 2_000
"""Series of a whole node, whatever it is sent: a Prometheus on a small machine keeps a hundred times as many."""
_PICO_PER_USD: Final = 10**12
_PREFIX: Final = "mppnode_"
_HISTOGRAM_EXTRA: Final = 3  # the bucket without a bound, the count and the sum


class Kind(StrEnum):
    """What a metric is, as Prometheus has it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Merge(StrEnum):
    """How the values of several processes become one. Counters and histograms keep what dead processes counted;
    gauges are of the living alone.
    """

    SUM = "sum"
    MAX = "max"
    MIN = "min"
    RECENT = "mostrecent"
    """The value that was set last: of something all processes share and one of them looks at."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric. ``unit`` is the name's last word, if it has one; ``scale`` is what a stored value is divided by."""

    kind: Kind
    name: str
    help: str
    labels: tuple[Label, ...] = ()
    merge: Merge = Merge.SUM
    bounds: tuple[float, ...] = ()
    unit: str = ""
    scale: int = 1

    def series(self, vocabulary: Vocabulary) -> int:
        """The most series it can have."""
        each = len(self.bounds) + _HISTOGRAM_EXTRA if self.kind is Kind.HISTOGRAM else 1
        return each * prod(vocabulary.size(label) for label in self.labels)


def series_max(vocabulary: Vocabulary) -> int:
    """The most series a node with this vocabulary can ever have."""
    return sum(spec.series(vocabulary) for spec in CATALOG)


def _unit(name: str) -> str:
    last = name.rsplit("_", 1)[-1]
    return last if last in ("seconds", "bytes", "usd") else ""


def _counter(name: str, text: str, *of: Label, prefix: str = _PREFIX) -> Spec:
    unit = _unit(name)
    scale = _PICO_PER_USD if unit == "usd" else 1
    return Spec(Kind.COUNTER, f"{prefix}{name}_total", text, of, unit=unit, scale=scale)


def _gauge(merge: Merge, prefix: str = _PREFIX) -> Callable[..., Spec]:
    def make(name: str, text: str, *of: Label) -> Spec:
        unit = _unit(name)
        scale = _PICO_PER_USD if unit == "usd" else 1
        return Spec(Kind.GAUGE, prefix + name, text, of, merge, unit=unit, scale=scale)

    return make


def _histogram(name: str, text: str, bounds: tuple[float, ...], *of: Label) -> Spec:
    return Spec(Kind.HISTOGRAM, _PREFIX + name, text, of, bounds=bounds, unit=_unit(name))


_summed, _highest, _lowest, _latest = (_gauge(merge) for merge in (Merge.SUM, Merge.MAX, Merge.MIN, Merge.RECENT))

# Bounds about double from one to the next: a quantile read off them is wrong by less than a factor of two anywhere,
# and every promise one would alert on (200 ms, 1 s, a wait of 60 s) is near a bound.
FIRST_TOKEN_BOUNDS: Final = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0)
"""10 ms is a model in this building; 60 s is ``first_token_s``, after which there is no first token."""
GAP_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.4, 1.0, 3.0, 10.0)
"""1 ms is a thousand tokens a second; above 160 ms nobody reads along, and a factor of three tells enough."""
REQUEST_BOUNDS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
"""From a classification to ``total_s``, an hour, which no request survives."""
PAUSE_BOUNDS: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""From one round trip of a voucher to ``voucher_wait_s``, where a stream ends unpaid."""
COMMIT_BOUNDS: Final = (
    *(0.00005, 0.0001, 0.0002, 0.0004, 0.0008, 0.0016, 0.0032, 0.0064),
    *(0.0125, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0),
)
"""50 us is a commit that joined another's write, 5 s is longer than a node's lease allows."""
LAG_BOUNDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0)
"""1 ms is a loop with nothing to do; from 3 s on a node stops by itself, because its lease may end."""
ATTEMPT_BOUNDS: Final = (1.0, 2.0, 3.0, 5.0)

# ------------------------------------------------------------------------------------------------------------- requests

REQUESTS: Final = _counter("requests", "Paid requests that ended.", labels.RAIL, labels.ENDING)
REQUESTS_ACTIVE: Final = _summed("requests_active", "Paid requests being served.", labels.RAIL)
REQUESTS_REFUSED: Final = _counter("requests_refused", "Requests that were not served, by reason.", labels.REFUSAL)
MODEL_REQUESTS: Final = _counter(
    "model_requests", "Paid requests that ended, by whose doing it was.", labels.MODEL, labels.OUTCOME
)
REQUEST_SECONDS: Final = _histogram("request_seconds", "Whole time of a paid request.", REQUEST_BOUNDS, labels.RAIL)
FIRST_TOKEN_SECONDS: Final = _histogram(
    "first_token_seconds", "Time from a streamed request to its first token.", FIRST_TOKEN_BOUNDS, labels.PROVIDER
)
TOKEN_GAP_SECONDS: Final = _histogram(
    "token_gap_seconds", "Mean time between two tokens of a stream, once per stream.", GAP_BOUNDS, labels.PROVIDER
)
TOKENS: Final = _counter("tokens", "Tokens charged; cached and reasoning are parts.", labels.MODEL, labels.TOKEN_KIND)
COUNTED_REQUESTS: Final = _counter(
    "counted_requests", "Complete answers, by whose token count their bill is made of.", labels.SOURCE
)
CHARGED_USD: Final = _counter("charged_usd", "Dollars charged for what was delivered.", labels.RAIL)
MODEL_CHARGED_USD: Final = _counter("model_charged_usd", "Dollars charged, by model.", labels.MODEL)
PROVIDER_CHARGED_USD: Final = _counter("provider_charged_usd", "Dollars charged, by provider.", labels.PROVIDER)
CEILING_BREACHES: Final = _counter("ceiling_breaches", "Charges above a caller's price ceiling; any is a defect.")
HOLDS_REFUSED: Final = _counter("holds_refused", "Reservations refused.", labels.RAIL, labels.HOLD_REFUSAL)

# -------------------------------------------------------------------------------------------------------------- streams

STREAMS_ACTIVE: Final = _summed("streams_active", "Streams being served.")
STREAMS_PAUSED: Final = _summed("streams_paused", "Streams that wait for their payer's next voucher.")
PAUSES: Final = _counter("pauses", "Waits of a stream for its payer, by how they ended.", labels.PAUSE_END)
PAUSE_SECONDS: Final = _histogram("pause_seconds", "Time a stream waited for its payer, once per pause.", PAUSE_BOUNDS)
STALL_SECONDS: Final = _counter("stall_seconds", "Time streams waited for clients that did not read.")
DISCONNECTS: Final = _counter("disconnects", "Clients that went away, by how far they were.", labels.DISCONNECT_PHASE)
UPSTREAM_CANCELS: Final = _counter("upstream_cancels", "Provider calls this node broke off.", labels.PROVIDER)

# -------------------------------------------------------------------------------------------------------------- routing

DECISIONS: Final = _counter("routing_decisions", "Routes decided.", labels.STRATEGY, labels.ASKED)
EXCLUSIONS: Final = _counter("routing_exclusions", "Providers left out of a decision, by reason.", labels.EXCLUDED)
REQUEST_ATTEMPTS: Final = _histogram(
    "request_attempts", "Providers tried for one request that one of them answered.", ATTEMPT_BOUNDS
)
PROVIDER_ATTEMPTS: Final = _counter("provider_attempts", "Provider calls.", labels.PROVIDER, labels.ATTEMPT_RESULT)
PROVIDER_STANDING: Final = _highest(
    "provider_standing", "Worst of 0 steady, 1 shaky, 2 on probation, 3 throttled, 4 avoided.", labels.PROVIDER
)
MODEL_PROVIDERS: Final = _lowest("model_providers_usable", "Providers that could serve a model now.", labels.MODEL)
PRICE_TIME: Final = _latest(
    "price_timestamp_seconds", "Unix time at which a provider's prices were last confirmed.", labels.PROVIDER
)
PRICES_HELD: Final = _latest("prices_held", "Prices that wait for the operator's word.", labels.PROVIDER)

# --------------------------------------------------------------------------------------------------- channels and chain

VOUCHERS: Final = _counter("vouchers", "Vouchers accepted.")
VOUCHERS_REFUSED: Final = _counter("vouchers_refused", "Vouchers refused, by reason.", labels.VOUCHER_REFUSAL)
VOUCHER_SECONDS: Final = _histogram("voucher_seconds", "Time from a voucher to its commit.", COMMIT_BOUNDS)
ACCEPTED_USD: Final = _counter("accepted_usd", "Dollars by which accepted vouchers rose.")
SETTLED_USD: Final = _counter("settled_usd", "Dollars the chain has paid out, finally.")
TRANSACTIONS: Final = _counter("transactions", "Transactions that ended.", labels.INTENT_KIND, labels.TX_RESULT)
GAS_USD: Final = _counter("gas_usd", "Dollars paid for gas.", labels.GAS_FOR)
CHANNELS_OPENED: Final = _counter("channels_opened", "Channels opened.")
CHANNELS: Final = _latest("channels", "Channels that are not closed, by phase.", labels.CHANNEL_PHASE)
CHANNEL_USD: Final = _latest("channel_usd", "Dollars in channels that are not closed.", labels.CHANNEL_MONEY)
UNSETTLED_AGE: Final = _latest("unsettled_oldest_age_seconds", "Age of the oldest earned and unsettled dollar.")
CLOSE_REQUESTS: Final = _latest("close_requests", "Payers' requests to close that are not answered.")
CLOSE_REQUEST_AGE: Final = _latest("close_request_oldest_age_seconds", "Age of the oldest such request.")
EXPOSURE_USD: Final = _summed("exposure_usd", "Dollars delivered and not recorded: what a crash costs.", labels.RAIL)
FEE_PAYER_USD: Final = _latest("fee_payer_balance_usd", "Dollars the fee payer has left for gas.")
SPONSOR_USED_USD: Final = _latest("sponsor_budget_used_usd", "Dollars promised for payers' gas in the last hour.")
SPONSOR_USD: Final = _latest("sponsor_budget_usd", "Dollars that may be promised per hour.")
LEDGER_DIFFERENCES: Final = _latest("ledger_differences", "Differences found by the last reconciliation; 0 is right.")
LEDGER_DRIFT_USD: Final = _latest("ledger_drift_usd", "Dollars by which journal, accounts and chain disagree.")
RECONCILED_TIME: Final = _latest("reconciled_timestamp_seconds", "Unix time of the last whole reconciliation.")
CHAIN_HEAD_AGE: Final = _highest("chain_head_age_seconds", "Age of the newest block the chain endpoint has.")

# ------------------------------------------------------------------------------------------------- accounts and billing

KEYS_ACTIVE: Final = _latest("keys_active", "API keys that may be used.")
LIMITS_REACHED: Final = _counter("limits_reached", "Requests refused for a limit of their key.", labels.LIMIT)
CREDITED_USD: Final = _counter("credited_usd", "Dollars credited to accounts.", labels.FUNDS_KIND)
TAKEN_BACK_USD: Final = _counter("taken_back_usd", "Dollars taken back from accounts.", labels.FUNDS_KIND)
UNBILLED_USD: Final = _latest("unbilled_usd", "Dollars of post-paid usage not reported to Stripe yet.")
OUTBOX_TASKS: Final = _latest("outbox_tasks", "Tasks that are not done.", labels.OUTBOX_KIND, labels.OUTBOX_STATE)
OUTBOX_AGE: Final = _latest("outbox_oldest_age_seconds", "How late the oldest task is.", labels.OUTBOX_KIND)
OUTBOX_ATTEMPTS: Final = _counter("outbox_attempts", "Attempts at tasks.", labels.OUTBOX_KIND, labels.OUTBOX_RESULT)
WEBHOOKS: Final = _counter("webhooks", "Webhooks taken in.", labels.WEBHOOK)
WEBHOOKS_REFUSED: Final = _counter("webhooks_refused", "Webhooks refused, by reason.", labels.WEBHOOK_REFUSAL)
STRIPE_CALLS: Final = _counter("stripe_calls", "Calls to Stripe.", labels.STRIPE_RESULT)
METER_ERRORS: Final = _counter("meter_errors", "Reports of usage Stripe said it could not use.")

# ---------------------------------------------------------------------------------------------------- store and process

COMMIT_SECONDS: Final = _histogram("store_commit_seconds", "Time of one commit.", COMMIT_BOUNDS, labels.STORE)
STORE_FAILURES: Final = _counter("store_failures", "Commits that failed.", labels.STORE)
LOOP_LAG_SECONDS: Final = _histogram("loop_lag_seconds", "How late the event loop runs a timer.", LAG_BOUNDS)
PROCESSES: Final = _summed("processes", "Processes of this node that are alive.")
FOLDED: Final = _counter("metric_values_folded", "Times something unknown was counted as other.")
REJECTED: Final = _counter("metric_values_rejected", "Values no metric can take: negative, or no number.")
SNAPSHOT_FAILURES: Final = _counter("metric_snapshot_failures", "Snapshots that could not be written.")
SNAPSHOTS_UNREADABLE: Final = _highest("metric_snapshots_unreadable", "Other processes' snapshots nobody can read.")
CPU_SECONDS: Final = _counter("cpu_seconds", "Processor time, user and system.", prefix="process_")
MEMORY_BYTES: Final = _gauge(Merge.SUM, "process_")("resident_memory_bytes", "Resident memory.")
OPEN_FDS: Final = _gauge(Merge.MAX, "process_")("open_fds", "Open file descriptors of the process with the most.")
MAX_FDS: Final = _gauge(Merge.MIN, "process_")("max_fds", "Most file descriptors a process may have open.")
START_TIME: Final = _gauge(Merge.MAX, "process_")("start_time_seconds", "Unix time the youngest process started at.")

CATALOG: Final[tuple[Spec, ...]] = tuple(value for value in tuple(globals().values()) if isinstance(value, Spec))
"""Every metric, in the order of declaration."""
