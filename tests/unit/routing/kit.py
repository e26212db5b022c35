"""Builders for routing tests: one model, a few providers, no clock and no chance but the given one."""

from collections.abc import Callable

from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Listing, ProviderKind
from mppnode.kernel.rates import Rates
from mppnode.routing.health import Health, Outcome, Permit, Verdict
from mppnode.routing.plan import Moment, Wish
from mppnode.routing.policy import HealthPolicy, RoutingPolicy
from mppnode.routing.router import Router

NATIVE, QUOTA, EXTERNAL = ProviderKind
WALL = UnixSeconds(1_900_000_000)
DOLLAR = 1_000_000
CENT = 10_000


def at(seconds: float = 0.0) -> Moment:
    return Moment(1000.0 + seconds, UnixSeconds(WALL + int(seconds)))


def sells(provider: str, paid_in: int = 100_000, paid_out: int = 150_000, *, kind: ProviderKind = NATIVE, model: str = "m", context: int = 8192, max_output: int = 4096, **more) -> Listing:
    rates = more.pop("rates", None) or Rates(Pico(paid_in), Pico(paid_in), Pico(paid_out))
    return Listing(model, provider, kind, "upstream", rates, context, max_output, **more)


class Draws:
    """A random source that gives what it is told, and remembers what it was asked."""

    def __init__(self, *values: int) -> None:
        self.values = list(values)
        self.asked: list[int] = []

    def __call__(self, below: int) -> int:
        self.asked.append(below)
        value = self.values.pop(0) if self.values else 0
        assert 0 <= value < below
        return value


def shop(*listings: Listing) -> Callable[[str], tuple[Listing, ...]]:
    by_model: dict[str, tuple[Listing, ...]] = {}
    for listing in listings:
        by_model[listing.model] = (*by_model.get(listing.model, ()), listing)

    def book(model: str) -> tuple[Listing, ...]:
        if model not in by_model:
            raise NodeFault(NodeReason.UNKNOWN_MODEL, field="model", detail="is not sold here; did you mean m?")
        return by_model[model]

    return book


def health_of(alarms: list | None = None, draws: Draws | None = None, policy: HealthPolicy | None = None) -> Health:
    heard = alarms if alarms is not None else []
    return Health(below=draws or Draws(), alarm=lambda *what: heard.append(what), policy=policy)


def router(*listings: Listing, draws: Draws | None = None, policy: RoutingPolicy | None = None, health: Health | None = None) -> Router:
    return Router(shop(*listings), health=health or health_of(), below=draws or Draws(), policy=policy)


def names(chain) -> list[str]:
    return [listing.provider for listing in chain]


def wish(**fields) -> Wish:
    return Wish(**{"models": ("m",), **fields})


def permit_of(health: Health, listing: Listing, now: float) -> Permit:
    permit = health.admit(listing, now)
    assert permit is not None
    return permit


def report(health: Health, listing: Listing, verdict: Verdict, now: float, times: int = 1, **more) -> None:
    for _ in range(times):
        permit_of(health, listing, now).release(Outcome(verdict, **more), now)


def measure(health: Health, listing: Listing, *, first_s: float, rate: float, now: float, times: int = 5) -> None:
    for _ in range(times):
        permit = permit_of(health, listing, now)
        permit.began(now, first_s=first_s)
        permit.release(Outcome(Verdict.SERVED, tokens_per_s=rate), now)
