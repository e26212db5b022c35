"""P-63: whatever the catalogue, the ceilings, the quote and the providers' health, nobody too dear is ever tried."""

from hypothesis import given, settings
from hypothesis import strategies as st

from channels.units import Pico
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import ProviderKind
from mppnode.kernel.rates import Rates
from mppnode.kernel.strategy import Strategy
from mppnode.kernel.wishes import Sort
from mppnode.routing.decision import bound_of
from mppnode.routing.health import Outcome, Verdict
from mppnode.routing.router import Router
from tests.unit.routing.kit import at, health_of, sells, wish

PRICES = st.integers(0, 6).map(lambda n: Pico(n * 50_000))
RATES = st.builds(Rates, PRICES, PRICES, PRICES, PRICES, PRICES, PRICES)
SELLERS = st.lists(st.tuples(st.sampled_from(list(ProviderKind)), RATES), min_size=1, max_size=8)
CEILINGS = st.none() | st.integers(0, 300_000)
REPORTS = st.lists(st.tuples(st.integers(0, 7), st.sampled_from(list(Verdict)), st.integers(0, 40)), max_size=40)
WISHES = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(list(Strategy)),
        "sort": st.none() | st.sampled_from(list(Sort)),
        "order": st.sampled_from([(), ("p1",), ("p3", "p0")]),
        "allow_external": st.booleans(),
        "allow_fallbacks": st.booleans(),
        "max_prompt_price": CEILINGS,
        "max_completion_price": CEILINGS,
        "affinity": st.none() | st.just(b"talk"),
    }
)


def either(call):
    """What it gives, or the reason it refuses for."""
    try:
        return call()
    except NodeFault as fault:
        return fault.reason


@settings(max_examples=300, deadline=None)
@given(sellers=SELLERS, later=st.lists(RATES, min_size=8, max_size=8), fields=WISHES, reports=REPORTS, data=st.data())
def test_p63_the_chain_is_within_every_limit_and_never_empty_without_reason(sellers, later, fields, reports, data):
    """P-63: every element holds ceilings and quote after any price change, and whoever is eligible and up is offered."""
    book = {"m": tuple(sells(f"p{index}", kind=kind, rates=rates) for index, (kind, rates) in enumerate(sellers))}
    health = health_of()
    route = Router(book.__getitem__, health=health, below=lambda below: data.draw(st.integers(0, below - 1)))
    asked = wish(**fields)
    quoted = either(lambda: route.eligible(asked, at()))
    if quoted is NodeReason.NO_PROVIDER:
        return
    bound = bound_of(quoted)
    for index, verdict, seconds in reports:
        if index < len(sellers) and (permit := health.admit(book["m"][index], at(seconds / 4).monotonic)):
            permit.release(Outcome(verdict), at(seconds / 4).monotonic)
            route.served(asked, book["m"][index], at())
    if data.draw(st.booleans()):
        book["m"] = tuple(sells(each.provider, kind=each.kind, rates=rates) for each, rates in zip(book["m"], later, strict=False))
    now, paid = at(10), wish(**fields, bound=bound)

    def good(listing):
        most_in, most_out, rates = asked.max_prompt_price, asked.max_completion_price, listing.rates
        named = asked.allow_fallbacks or not asked.order or listing.provider in asked.order
        home = asked.allow_external or listing.kind is not ProviderKind.EXTERNAL
        cheap = (most_in is None or rates.input_max <= most_in) and (most_out is None or rates.output_max <= most_out)
        free = (most_in, most_out) != (0, 0) or not any(rates.axes)
        return named and home and cheap and free and rates.within(bound)

    able = [listing for listing in book["m"] if good(listing) and health.wait((listing.provider, "m"), now.monotonic) == 0]
    chain = either(lambda: route.decide(paid, now=now).chain)
    if chain in (NodeReason.NO_PROVIDER, NodeReason.PROVIDERS_BUSY):
        assert not able
        return
    assert set(chain) <= set(able)
    assert len(chain) == len(set(chain)) == (min(3, len(able)) if asked.allow_fallbacks else 1)
    assert health.admit(chain[0], now.monotonic) is not None
