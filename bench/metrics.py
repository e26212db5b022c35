"""What counting costs, and what a scrape costs.

    python bench/metrics.py [--calls 200000] [--scrapes 50]

Printed are nanoseconds per call of the facade's methods (best of five rounds, as the machine does other things too),
and for a node with every series there can be: the snapshot, the page in both formats, and an exchange with three other
processes through files. The path of a token calls none of them. Compare figures only from one run on one machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import CollectorRegistry

from mppnode.engine.stream import Ending
from mppnode.kernel.clock import SystemClock
from mppnode.observe.exposition import render
from mppnode.observe.metric_catalog import Kind
from mppnode.observe.metric_files import SharedFolder
from mppnode.observe.metric_labels import Vocabulary
from mppnode.observe.metrics import Metrics

MODELS = [f"maker/model-{n}" for n in range(40)]
PROVIDERS = [f"provider-{n}" for n in range(20)]
ROUNDS = 5


def nanoseconds(work: Callable[[], object], calls: int) -> float:
    """Best of several rounds, per call."""
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.perf_counter_ns()
        for _ in range(calls):
            work()
        best = min(best, (time.perf_counter_ns() - begun) / calls)
    return best


def node(folder: Path | None = None) -> tuple[CollectorRegistry, Metrics]:
    """A node's metrics, with others if there is a folder."""
    registry, vocabulary = CollectorRegistry(), Vocabulary(MODELS, PROVIDERS)
    shared = None if folder is None else SharedFolder(folder, vocabulary)
    return registry, Metrics(registry, clock=SystemClock(), vocabulary=vocabulary, shared=shared)


def fill(metrics: Metrics) -> None:
    """Make every series there can be."""
    board = metrics._board  # noqa: SLF001 - there is no public way to be this busy
    for family in board._families.values():  # noqa: SLF001
        spec = family._spec  # noqa: SLF001
        rows: list[tuple[str, ...]] = [()]
        for label in spec.labels:
            names = label.known if label.values else (MODELS if label.name == "model" else PROVIDERS) + ["other"]
            rows = [(*row, value) for row in rows for value in names]
        for row in rows:
            match spec.kind:
                case Kind.COUNTER:
                    family.add(1, *row)  # type: ignore[union-attr]
                case Kind.GAUGE:
                    family.put(1, *row)  # type: ignore[union-attr]
                case Kind.HISTOGRAM:
                    family.see(0.1, *row)  # type: ignore[union-attr]


def calls(times: int) -> None:
    """Nanoseconds of every method that is called often."""
    _, metrics = node()
    model, provider = MODELS[7], PROVIDERS[3]

    def request() -> None:
        metrics.request_began("session", stream=True)
        metrics.request_ended(
            "session",
            Ending.COMPLETE,
            stream=True,
            model=model,
            provider=provider,
            cost_pico=123_456_789,
            prompt_tokens=812,
            cached_tokens=512,
            completion_tokens=240,
            source="reported",
            total_s=4.2,
            first_s=0.21,
            gap_s=0.016,
        )

    def pause() -> None:
        metrics.pause_began()
        metrics.pause(0.12, "paid")

    work: dict[str, Callable[[], object]] = {
        "request_began and request_ended": request,
        "pause_began and pause": pause,
        "routed (two exclusions)": lambda: metrics.routed("balanced", "named", {"health": 1, "max_price": 2}),
        "provider_attempt": lambda: metrics.provider_attempt(provider, "ok"),
        "voucher_accepted": lambda: metrics.voucher_accepted(10**9, 0.0021),
        "hold_refused": lambda: metrics.hold_refused("session", "insufficient_balance"),
        "hold_refused, unknown reason": lambda: metrics.hold_refused("session", "never heard of it"),
        "committed": lambda: metrics.committed("sqlite", 0.0017),
        "loop_lag": lambda: metrics.loop_lag(0.0004),
        "breaker_states": lambda: metrics.breaker_states({provider: 0}),
    }
    idle = nanoseconds(lambda: None, times)
    for name, one in work.items():
        print(f"{name:34} {nanoseconds(one, times) - idle:8.0f} ns")


def scrapes(times: int) -> None:
    """Milliseconds of a scrape of a full node, alone and among four processes."""
    registry, metrics = node()
    fill(metrics)
    text, rich = render(registry), render(registry, "application/openmetrics-text")
    series = sum(not line.startswith(b"#") for line in text.body.splitlines())
    print(f"\n{series} series, {len(text.body)} bytes as text, {len(rich.body)} as OpenMetrics")
    print(f"snapshot (on the loop)             {nanoseconds(metrics.snapshot, times) / 1e6:8.2f} ms")
    print(f"page as text                       {nanoseconds(lambda: render(registry), times) / 1e6:8.2f} ms")
    rich_ns = nanoseconds(lambda: render(registry, "application/openmetrics-text"), times)
    print(f"page as OpenMetrics                {rich_ns / 1e6:8.2f} ms")
    with TemporaryDirectory() as folder:
        nodes = [node(Path(folder)) for _ in range(4)]
        for _, one in nodes:
            fill(one)
            one.flush()
        registry, metrics = nodes[0]
        print(f"flush                              {nanoseconds(metrics.flush, times) / 1e6:8.2f} ms")
        print(f"page as text, four processes       {nanoseconds(lambda: render(registry), times) / 1e6:8.2f} ms")
        for _, one in nodes:
            one.close()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--calls", type=int, default=200_000)
    options.add_argument("--scrapes", type=int, default=50)
    chosen = options.parse_args()
    calls(chosen.calls)
    scrapes(chosen.scrapes)
