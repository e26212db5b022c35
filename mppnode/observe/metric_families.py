"""From numbers to what the client library renders, and what the kernel says of this process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from mppnode.observe.metric_catalog import CATALOG, Spec
from mppnode.observe.metric_cells import Labels, Observed, Reading, Snapshot, Value

_TOTAL: Final = "_total"
_NO_BOUND: Final = float("inf")


def families(snapshot: Snapshot) -> Iterable[Metric]:
    """Every metric that has a value, in the catalog's order, its series sorted."""
    for spec in CATALOG:
        cells = snapshot.cells.get(spec.name)
        if cells:
            metric = empty_family(spec)
            for labels, value in sorted(cells.items(), key=lambda cell: cell[0]):
                _add(metric, spec, labels, value)
            yield metric


def empty_family(spec: Spec) -> Metric:
    """A metric without samples; a counter's family is named without its ``_total`` (OpenMetrics 1.0, counter)."""
    return Metric(spec.name.removesuffix(_TOTAL), spec.help, spec.kind.value, spec.unit)


def _add(metric: Metric, spec: Spec, labels: Labels, value: Value) -> None:
    named = {label.name: text for label, text in zip(spec.labels, labels, strict=True)}
    match value:
        case Observed():
            running = 0
            for bound, count in zip((*spec.bounds, _NO_BOUND), value.counts, strict=True):
                running += count
                metric.add_sample(f"{spec.name}_bucket", {**named, "le": _bound(bound)}, running)
            metric.add_sample(f"{spec.name}_count", named, running)
            metric.add_sample(f"{spec.name}_sum", named, value.total)
        case Reading():
            metric.add_sample(spec.name, named, value.value / spec.scale)
        case _:
            metric.add_sample(spec.name, named, value / spec.scale)


def _bound(bound: float) -> str:
    return "+Inf" if bound == _NO_BOUND else repr(bound)


class ProcessFigures:
    """Processor time, memory and files of this process; nothing where there is no ``/proc``."""

    def __init__(self) -> None:
        self._collector: Collector = ProcessCollector(registry=None)

    def read(self) -> dict[str, float]:
        """Values by the names the client library gives them, which are everybody's."""
        return {sample.name: sample.value for metric in self._collector.collect() for sample in metric.samples}
