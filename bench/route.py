"""CPU of one routing decision: 100 providers that each list 200 models, so 100 candidates for the model asked for.

    python bench/route.py [--decisions 5000]

Printed are the median and the 99th percentile in microseconds for each strategy, as a first request (no quote) and as a
paid one (ceilings, and a bound that every listing is compared with). A tenth of the providers has just failed, a tenth
is above the ceiling, every speed is measured; nothing is kept from one decision to the next but the sorted listings.
The budget is 200 us at the median. Compare figures only from one run on one machine.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace

from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.kernel.listing import Listing, ProviderKind
from mppnode.kernel.rates import Rates
from mppnode.kernel.strategy import Strategy
from mppnode.routing.decision import bound_of
from mppnode.routing.health import Health, Outcome, Verdict
from mppnode.routing.plan import Moment, Wish
from mppnode.routing.router import Router

PROVIDERS, MODELS, ASKED = 100, 200, "maker/model-7"
NOW = Moment(1000.0, UnixSeconds(1_900_000_000))


def catalogue(draw: random.Random) -> dict[str, tuple[Listing, ...]]:
    """Every provider lists every model, at prices of its own."""
    kinds = list(ProviderKind)
    return {
        f"maker/model-{model}": tuple(
            Listing(
                model=f"maker/model-{model}",
                provider=f"provider-{provider}",
                kind=kinds[provider % 3],
                upstream_model="m",
                rates=Rates(Pico(draw.randint(200_000, 300_000)), Pico(100_000), Pico(draw.randint(400_000, 600_000))),
                context=128_000,
                max_output=16_000,
                priced_at=UnixSeconds(NOW.wall - 60),
            )
            for provider in range(PROVIDERS)
        )
        for model in range(MODELS)
    }


def warmed(health: Health, listings: tuple[Listing, ...], draw: random.Random) -> None:
    """Measure everybody, and let every tenth fail once."""
    for index, listing in enumerate(listings):
        for _ in range(6):
            permit = health.admit(listing, NOW.monotonic)
            assert permit is not None
            permit.began(NOW.monotonic, first_s=draw.uniform(0.1, 2))
            permit.release(Outcome(Verdict.SERVED, tokens_per_s=draw.uniform(20, 200)), NOW.monotonic)
        if index % 10 == 0:
            permit = health.admit(listing, NOW.monotonic)
            assert permit is not None
            permit.release(Outcome(Verdict.FAILED), NOW.monotonic)


def measured(router: Router, wish: Wish, decisions: int) -> tuple[float, float]:
    """Median and 99th percentile, in microseconds."""
    took: list[int] = []
    for _ in range(decisions):
        begun = time.perf_counter_ns()
        router.decide(wish, now=NOW)
        took.append(time.perf_counter_ns() - begun)
    took.sort()
    return took[decisions // 2] / 1000, took[decisions * 99 // 100] / 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=5000)
    decisions = parser.parse_args().decisions
    draw = random.Random(4)
    book = catalogue(draw)
    health = Health(below=draw.randrange, alarm=lambda _provider, _status: None)
    warmed(health, book[ASKED], draw)
    router = Router(book.__getitem__, health=health, below=draw.randrange)
    print(f"{PROVIDERS} providers x {MODELS} models, us per decision    median      p99")
    for strategy in Strategy:
        first = Wish((ASKED,), strategy=strategy, prompt_tokens=1000, max_tokens=1000, affinity=b"conversation")
        paid = replace(first, max_prompt_price=290_000, max_completion_price=600_000, bound=bound_of(book[ASKED]))
        for name, wish in (("first request", first), ("paid, bounded", paid)):
            median, p99 = measured(router, wish, decisions)
            print(f"{strategy.value:>10}  {name:<24} {median:14.1f} {p99:8.1f}")


if __name__ == "__main__":
    main()
