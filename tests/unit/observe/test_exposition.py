"""The page a scraper gets: two formats, read back with the client library's own parsers."""

import math

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from mppnode.kernel.clock import ManualClock
from mppnode.observe.exposition import (
    BODY_BYTES_MAX,
    OPENMETRICS_TYPE,
    TEXT_TYPE,
    PageTooLarge,
    prefers_openmetrics,
    render,
)
from mppnode.observe.metric_catalog import CATALOG, SERIES_MAX, Kind, series_max
from mppnode.observe.metric_labels import OTHER, Vocabulary
from mppnode.observe.metrics import Metrics

PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


def full():
    """A node whose every series exists, with names that need escaping."""
    registry = CollectorRegistry()
    vocabulary = Vocabulary((f'm{n}"\\' for n in range(100)), (f"p{n}é" for n in range(100)))
    metrics = Metrics(registry, clock=ManualClock(), vocabulary=vocabulary)
    for family in metrics._board._families.values():
        spec = family._spec
        rows = [()]
        for label in spec.labels:
            known = label.known if label.values else vocabulary._known[label.name]
            rows = [(*row, value) for row in rows for value in known]
        for number, row in enumerate(rows):
            match spec.kind:
                case Kind.COUNTER:
                    family.add(number + 1, *row)
                case Kind.GAUGE:
                    family.put(number, *row)
                case Kind.HISTOGRAM:
                    family.see(spec.bounds[number % len(spec.bounds)], *row)
    return registry, vocabulary


def samples(families):
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


def test_both_formats_parse_back_to_the_same_full_set():
    """Every declared series is rendered and read back by independent readers, with one value in both formats."""
    registry, vocabulary = full()
    text, rich = render(registry), render(registry, PROMETHEUS)
    assert (text.content_type, rich.content_type) == (TEXT_TYPE, OPENMETRICS_TYPE)
    plain, openmetrics = samples(parse_text(text.body.decode())), samples(parse_openmetrics(rich.body.decode()))
    moving = {key for key in plain if key[0].startswith("process_")}
    assert {key: plain[key] for key in plain.keys() - moving} == {key: openmetrics[key] for key in openmetrics.keys() - moving}
    assert plain.keys() == openmetrics.keys()
    assert len(plain) == series_max(vocabulary) <= SERIES_MAX
    assert {name for name, _ in plain} >= {spec.name for spec in CATALOG if spec.kind is not Kind.HISTOGRAM}
    assert ("mppnode_model_charged_usd_total", (("model", 'm3"\\'),)) in plain
    assert max(len(text.body), len(rich.body)) < BODY_BYTES_MAX // 10


def test_types_units_and_help_are_told():
    """What a metric is stands above its samples, with the suffix each format wants."""
    registry, _ = full()
    text, rich = render(registry).body.decode(), render(registry, "application/openmetrics-text").body.decode()
    assert "# TYPE mppnode_charged_usd_total counter\n" in text
    assert "# TYPE mppnode_charged_usd counter\n# UNIT mppnode_charged_usd usd\n" in rich
    assert "# HELP mppnode_streams_paused Streams that wait for their payer's next voucher.\n" in text
    assert rich.endswith("# EOF\n")
    assert "_created" not in text + rich


def test_histograms_are_cumulative_and_agree_with_their_count():
    """Buckets never fall, the last one is the count, and an observation on a bound is inside it."""
    registry, _ = full()
    for family in parse_text(render(registry).body.decode()):
        if family.type != "histogram":
            continue
        of = {}
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
            of.setdefault(labels, {})[sample.labels.get("le", sample.name.rsplit("_", 1)[-1])] = sample.value
        for row in of.values():
            count, total = row.pop("count"), row.pop("sum")
            ordered = [row[le] for le in sorted(row, key=float)]
            assert ordered == sorted(ordered)
            assert ordered[-1] == count == row["+Inf"]
            assert total >= 0
            finite = [float(le) for le in row if not math.isinf(float(le))]
            assert count == row[next(le for le in row if float(le) == max(finite))]  # the largest was exactly a bound


@pytest.mark.parametrize(
    ("accept", "rich"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("text/html, */*;q=0.1", False),
        (PROMETHEUS, True),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; Version=1.0.0", True),
        ("application/openmetrics-text; version=2.0.0", False),
        ("application/openmetrics-text;q=0, text/plain", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.4, text/plain;q=0.5", False),
        ("application/openmetrics-text;q=0.5, */*;q=0.5", True),
        ("application/openmetrics-text;q=nonsense", False),
        ("application/openmetrics-text;q=1.000", True),
        ("application/openmetrics-text;q=1.5", False),
        ("application/openmetrics-text;q=2", False),
        (";;;,=,q=,", False),
        ("text/plain," * 1_000 + "application/openmetrics-text", False),
    ],
)
def test_the_format_follows_the_accept_header(accept, rich):
    """Weights count, unknown versions and nonsense do not, and in doubt the format everybody reads is sent."""
    assert prefers_openmetrics(accept) is rich


def test_a_page_has_a_largest_size():
    """A collector somebody else registered cannot make the answer endless."""

    class Endless:
        def collect(self):
            metric = Metric("more", "More than fits.", "gauge")
            for number in range(BODY_BYTES_MAX // 100):
                metric.add_sample("more", {"n": f"{number:0100}"}, 1.0)
            return [metric]

    registry = CollectorRegistry()
    registry.register(Endless())
    with pytest.raises(PageTooLarge):
        render(registry)


def test_what_is_unknown_is_one_series():
    """A model that is in no catalog is called other on the page."""
    registry, metrics = CollectorRegistry(), None
    metrics = Metrics(registry, clock=ManualClock(), vocabulary=Vocabulary())
    metrics.providers_usable({'evil"} 1\nforged': 3})
    assert f'mppnode_model_providers_usable{{model="{OTHER}"}} 3.0\n' in render(registry).body.decode()
    assert "forged" not in render(registry).body.decode()
