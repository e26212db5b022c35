"""Labels are closed sets: whatever strangers send, the series stay the ones that were declared."""

import random
import string
from typing import get_args

import pytest
from prometheus_client import CollectorRegistry

from mppnode.accounts.limits import Bound
from mppnode.engine.stream import Ending
from mppnode.gateways.stripe_events import WebhookReason
from mppnode.gateways.stripe_faults import StripeFaultKind
from mppnode.kernel.clock import ManualClock
from mppnode.metering.tally import TokenSource
from mppnode.observe import metric_labels as labels
from mppnode.observe.exposition import render
from mppnode.observe.metric_catalog import SERIES_MAX
from mppnode.observe.metric_labels import MODEL, MODELS_MAX, OTHER, PROVIDER, PROVIDERS_MAX, Vocabulary
from mppnode.observe.metrics import Metrics
from mppnode.providers.base import FaultKind
from mppnode.routing.decision import Exclusion

CANARY = "sk-canary-0f2e"


def values(enum):
    return {member.value for member in enum}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (labels.Ending, values(Ending) | {"failed"}),
        (labels.Excluded, values(Exclusion)),
        (labels.Source, values(TokenSource)),
        (labels.AttemptResult, set(get_args(FaultKind)) | {"ok"}),
        (labels.WebhookRefusal, values(WebhookReason)),
        (labels.StripeResult, values(StripeFaultKind) | {"ok"}),
    ],
)
def test_labels_say_what_the_rooms_above_say(ours, theirs):
    """This room may not import those above it, so their enumerations are repeated here; they may not drift apart."""
    assert values(ours) == theirs


def test_there_is_a_limit_for_every_bound_of_a_key():
    """As many limits are told apart as a key has: three rates and three windows."""
    assert len(values(labels.Limit)) == len(Bound) + 3


def test_members_and_texts_are_the_same_value():
    """A member of an enumeration and its text are counted as one."""
    vocabulary = Vocabulary()
    assert vocabulary.fold(labels.ENDING, Ending.UNPAID) == "unpaid"
    assert type(vocabulary.fold(labels.ENDING, Ending.UNPAID)) is str
    assert vocabulary.fold(labels.ENDING, "Unpaid") == OTHER


def test_a_vocabulary_takes_the_first_names_of_a_catalog():
    """Names beyond the limits are other, in every process the same ones, and a known name is never forgotten."""
    vocabulary = Vocabulary((f"m{n}" for n in range(10_000)), (f"p{n}" for n in range(10_000)))
    assert vocabulary.fold(MODEL, f"m{MODELS_MAX - 1}") == f"m{MODELS_MAX - 1}"
    assert vocabulary.fold(MODEL, f"m{MODELS_MAX}") == OTHER
    assert vocabulary.fold(PROVIDER, f"p{PROVIDERS_MAX - 1}") == f"p{PROVIDERS_MAX - 1}"
    assert vocabulary.fold(PROVIDER, f"p{PROVIDERS_MAX}") == OTHER
    vocabulary.know(models=["late"])
    assert vocabulary.fold(MODEL, "late") == OTHER
    assert vocabulary.fold(MODEL, "m0") == "m0"


@pytest.mark.parametrize("name", ["", "x" * 129, "line\nfeed", "\x00"])
def test_a_name_no_catalog_has_gets_no_series(name):
    """Empty, endless and unprintable names are other."""
    assert Vocabulary([name]).fold(MODEL, name) == OTHER


def test_a_flood_of_names_keys_and_error_texts_makes_no_series():
    """Ten thousand random models, providers, keys and texts through every method leave the budget kept and no trace."""
    dice = random.Random(7)

    def noise():
        return CANARY + "".join(dice.choices(string.printable + "é\u2028", k=dice.randrange(1, 60)))

    registry = CollectorRegistry()
    catalog = [f"maker/model-{n}" for n in range(10_000)]
    vocabulary = Vocabulary(catalog, [f"provider-{n}" for n in range(10_000)])
    metrics = Metrics(registry, clock=ManualClock(), vocabulary=vocabulary)
    for number in range(10_000):
        a, b, c = noise(), noise(), noise()
        model = catalog[number] if number % 2 else a
        metrics.request_began(a, stream=False)
        metrics.request_ended(
            a, b, stream=False, model=model, provider=f"provider-{number}", cost_pico=1, prompt_tokens=1, cached_tokens=1,
            completion_tokens=1, reasoning_tokens=1, source=c, first_s=dice.expovariate(1), gap_s=dice.expovariate(50), total_s=1.0,
        )
        metrics.request_refused(a)
        metrics.hold_refused(a, b)
        metrics.pause(1.0, a)
        metrics.disconnected(a)
        metrics.upstream_cancelled(a)
        metrics.routed(a, b, {c: 1})
        metrics.provider_attempt(f"provider-{number}", b)
        metrics.breaker_states({a: 1})
        metrics.providers_usable({model: 1})
        metrics.prices_confirmed({a: 1}, {a: 1})
        metrics.voucher_refused(a)
        metrics.settled_on_chain(a, 1, 1)
        metrics.transaction_failed(a, b, 1)
        metrics.channels({a: 1})
        metrics.exposure(a, 1)
        metrics.limit_reached(a)
        metrics.credited(a, 1)
        metrics.taken_back(a, 1)
        metrics.outbox(a, due=1, parked=1, oldest_s=1.0)
        metrics.outbox_attempt(a, b)
        metrics.webhook(a)
        metrics.webhook_refused(a)
        metrics.stripe_called(a)
        metrics.committed(a, 0.001)
        metrics.commit_failed(a)
    page = render(registry).body.decode()
    series = [line for line in page.splitlines() if not line.startswith("#")]
    assert len(series) <= SERIES_MAX
    assert CANARY not in page
    assert registry.get_sample_value("mppnode_requests_total", {"rail": OTHER, "ending": OTHER}) == 10_000
    assert registry.get_sample_value("mppnode_model_requests_total", {"model": OTHER, "outcome": "abandoned"}) == 10_000 - MODELS_MAX // 2
    assert registry.get_sample_value("mppnode_metric_values_folded_total") > 100_000
