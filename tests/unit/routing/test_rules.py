"""Rules R3 to R9 and R12 of routing, with their worked examples (P-62); R1, R2, R13 and R14 are kept elsewhere."""

import pytest

from channels.instants import UnixSeconds
from channels.units import Pico
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability
from mppnode.kernel.rates import Rates
from mppnode.kernel.strategy import PriceCeiling, Strategy
from mppnode.kernel.wishes import Sort, Wishes
from mppnode.routing.affinity import Affinity, affinity_key
from mppnode.routing.decision import Exclusion, bound_of
from mppnode.routing.health import Verdict
from mppnode.routing.plan import Defaults, plan
from mppnode.routing.policy import RoutingPolicy
from tests.unit.routing.kit import (
    CENT,
    EXTERNAL,
    NATIVE,
    QUOTA,
    WALL,
    Draws,
    at,
    health_of,
    measure,
    names,
    report,
    router,
    sells,
    wish,
)

THREE = (sells("dear", 150_000, 200_000), sells("low", 100_000, 150_000), sells("near", 110_000, 170_000))  # 0.35, 0.25, 0.28


def refusal(route, asked, now=None) -> NodeFault:
    with pytest.raises(NodeFault) as caught:
        route.decide(asked, now=now or at())
    return caught.value


# ------------------------------------------------------------------------------------------------- R5, R6, R7: strategies


@pytest.mark.parametrize(("drawn", "chain"), [(0, ["low", "near", "dear"]), (1, ["near", "low", "dear"])])
def test_p62_the_band_of_the_three_prices_is_the_first_two(drawn, chain):
    """P-62, R5: of 0.25, 0.28 and 0.35 dollars a million, one of the first two is chosen evenly."""
    draws = Draws(drawn)
    decided = router(*THREE, draws=draws).decide(wish(strategy=Strategy.CHEAPEST, allow_external=False), now=at())
    assert (names(decided.chain), draws.asked) == (chain, [2])
    assert decided.rule == "at random within 20 % of the lowest price"


@pytest.mark.parametrize(("paid_out", "size"), [(200_000, 2), (200_001, 1)])
def test_the_band_ends_exactly_at_a_fifth(paid_out, size):
    """R5: 20 % above the lowest is inside, one pico more is not."""
    draws = Draws()
    router(sells("a"), sells("b", 100_000, paid_out), draws=draws).decide(wish(strategy=Strategy.CHEAPEST), now=at())
    assert draws.asked == [size]


def test_cheapest_pools_the_kinds():
    """R5: a cheaper quota provider goes before a native one."""
    listings = (sells("own", 200_000), sells("quota", kind=QUOTA))
    assert names(router(*listings).decide(wish(strategy=Strategy.CHEAPEST), now=at()).chain) == ["quota", "own"]


def test_a_band_of_zero_is_strict_and_costs_may_be_of_the_request():
    """R5: with ``band_pct`` 0 only the lowest; with ``by_request`` a long prompt counts its input price."""
    draws = Draws()
    listings = (sells("flat", 200_000, 200_000), sells("steep", 300_000, 50_000))
    asked = wish(strategy=Strategy.CHEAPEST, prompt_tokens=4000, max_tokens=10)
    assert names(router(*listings, draws=draws, policy=RoutingPolicy(band_pct=0)).decide(asked, now=at()).chain)[0] == "steep"
    assert names(router(*listings, policy=RoutingPolicy(band_pct=0, by_request=True)).decide(asked, now=at()).chain)[0] == "flat"
    assert draws.asked == [1]


def test_balanced_takes_kinds_in_order_and_the_band_inside_the_kind():
    """R7: a native provider goes before a cheaper quota one, and that before an external one."""
    listings = (sells("ext", 1, 1, kind=EXTERNAL), sells("quota", 2, 2, kind=QUOTA), sells("own", 300_000, 300_000))
    decided = router(*listings).decide(wish(), now=at())
    assert names(decided.chain) == ["own", "quota", "ext"]


@pytest.mark.parametrize(("drawn", "first"), [(0, "a"), (2**20 - 1, "a"), (2**20, "b"), (2**20 + 728_177 - 1, "b")])
def test_balanced_weighs_by_the_inverse_square_of_the_price(drawn, first):
    """R7: prices 100 and 120 are drawn 1 to 1/1.44, by integers."""
    listings = (sells("a", 50, 50), sells("b", 60, 60))
    draws = Draws(drawn)
    assert names(router(*listings, draws=draws).decide(wish(), now=at()).chain)[0] == first
    assert draws.asked == [2**20 + 728_177]


def test_the_seed_draws_evenly_and_so_does_a_free_band():
    """R7: ``seed_compat`` is uniform; where all is free there are no weights."""
    draws = Draws(1, 1)
    even = router(sells("a", 50, 50), sells("b", 60, 60), draws=draws, policy=RoutingPolicy(seed_compat=True))
    assert names(even.decide(wish(), now=at()).chain)[0] == "b"
    free = router(sells("a", 0, 0), sells("b", 0, 0), draws=draws)
    assert names(free.decide(wish(), now=at()).chain)[0] == "b"
    assert draws.asked == [2, 2]


def test_fastest_keeps_kinds_in_order_and_measures_inside():
    """R6: of the native providers the fastest within 10 %, however fast an external one is."""
    listings = tuple(sells(name, kind=kind) for name, kind in [("slow", NATIVE), ("quick", NATIVE), ("close", NATIVE), ("ext", EXTERNAL)])
    health = health_of()
    for listing, first_s in zip(listings, (2.0, 1.0, 1.1, 0.01), strict=True):
        measure(health, listing, first_s=first_s, rate=100.0, now=at().monotonic)
    draws = Draws(1)
    asked = wish(strategy=Strategy.FASTEST, max_tokens=100)
    decided = router(*listings, health=health, draws=draws, policy=RoutingPolicy(attempts_max=4)).decide(asked, now=at())
    assert (names(decided.chain), draws.asked) == (["close", "quick", "slow", "ext"], [2])


def test_fastest_without_measurements_is_the_seeds_rule():
    """R6: nobody measured: at random in the first kind; too few or too old measurements are none."""
    listings = (sells("a"), sells("b"), sells("q", kind=QUOTA))
    health = health_of()
    measure(health, listings[0], first_s=1, rate=10, now=at().monotonic, times=4)
    measure(health, listings[1], first_s=1, rate=10, now=at(-700).monotonic)
    draws = Draws(1)
    decided = router(*listings, health=health, draws=draws).decide(wish(strategy=Strategy.FASTEST), now=at())
    assert (names(decided.chain), draws.asked) == (["b", "a", "q"], [2])


@pytest.mark.parametrize(("drawn", "first"), [(49, "cold"), (50, "warm")])
def test_fastest_explores_the_unmeasured_now_and_then(drawn, first):
    """R6: one in twenty requests goes to somebody nobody has measured."""
    warm, cold = sells("warm"), sells("cold")
    health = health_of()
    measure(health, warm, first_s=1, rate=10, now=at().monotonic)
    decided = router(warm, cold, health=health, draws=Draws(drawn)).decide(wish(strategy=Strategy.FASTEST), now=at())
    assert names(decided.chain)[0] == first


def test_sorts_are_strict_and_pool_the_kinds():
    """``sort`` draws nothing: price, tokens per second, or time to the first token, the unmeasured last."""
    a, b, c = sells("a", 300_000, kind=NATIVE), sells("b", 100_000, kind=QUOTA), sells("c", 200_000, kind=EXTERNAL)
    health, draws = health_of(), Draws()
    measure(health, a, first_s=2, rate=100, now=at().monotonic)
    measure(health, c, first_s=1, rate=50, now=at().monotonic)
    route = router(a, b, c, health=health, draws=draws)
    orders = {sort: names(route.decide(wish(sort=sort), now=at()).chain) for sort in Sort}
    assert orders == {Sort.PRICE: ["b", "c", "a"], Sort.THROUGHPUT: ["a", "c", "b"], Sort.LATENCY: ["c", "a", "b"]}
    assert draws.asked == []


def test_the_callers_order_goes_first_and_alone_without_fallbacks():
    """``order`` is kept as given, the strategy orders the rest; without fallbacks only the named are tried, once."""
    route = router(*THREE)
    assert names(route.decide(wish(order=("dear", "nobody", "near")), now=at()).chain) == ["dear", "near", "low"]
    assert names(route.decide(wish(order=("dear", "near"), allow_fallbacks=False), now=at()).chain) == ["dear"]
    fault = refusal(route, wish(order=("nobody",), allow_fallbacks=False))
    assert fault.excluded == {"allowed_providers": 3}


# -------------------------------------------------------------------------------------------------------- R3: eligibility


FIT = {"provider": "p", "paid_in": 10 * CENT, "paid_out": 20 * CENT}


@pytest.mark.parametrize(
    ("listing", "asked", "reason"),
    [
        (sells(**FIT), {"barred": frozenset({"p"})}, Exclusion.RAIL),
        (sells(**FIT), {"ignore": frozenset({"p"})}, Exclusion.ALLOWED_PROVIDERS),
        (sells(**FIT), {"only": frozenset({"q"})}, Exclusion.ALLOWED_PROVIDERS),
        (sells(**FIT), {"needs": Ability.VISION}, Exclusion.REQUIRE_PARAMETERS),
        (sells(**FIT), {"needs": Ability.REASONING, "require_parameters": True}, Exclusion.REQUIRE_PARAMETERS),
        (sells(**FIT, context=100), {"prompt_tokens": 91, "max_tokens": 10}, Exclusion.CONTEXT_LENGTH),
        (sells(**FIT, max_output=9), {"max_tokens": 10, "require_parameters": True}, Exclusion.CONTEXT_LENGTH),
        (sells(**FIT, kind=EXTERNAL), {"allow_external": False}, Exclusion.EXTERNAL),
        (sells(**FIT, priced_at=UnixSeconds(WALL - 7 * 86400 - 1)), {}, Exclusion.PRICE_STALE),
        (sells(**FIT, priced_at=UnixSeconds(WALL + 86401)), {}, Exclusion.PRICE_STALE),
        (sells(**FIT), {"max_prompt_price": 10 * CENT - 1}, Exclusion.MAX_PRICE),
        (sells(**FIT), {"max_completion_price": 20 * CENT - 1}, Exclusion.MAX_PRICE),
        (sells("p", rates=Rates(Pico(1), Pico(1), Pico(1), reasoning=Pico(9))), {"max_completion_price": 8}, Exclusion.MAX_PRICE),
        (sells("p", rates=Rates(Pico(1), Pico(1), Pico(1), cache_write=Pico(9))), {"max_prompt_price": 8}, Exclusion.MAX_PRICE),
        (sells("p", rates=Rates(Pico(0), Pico(0), Pico(0), request=Pico(1))), {"max_prompt_price": 0, "max_completion_price": 0}, Exclusion.MAX_PRICE),
        (sells(**FIT), {"bound": Rates(Pico(10 * CENT), Pico(10 * CENT), Pico(20 * CENT - 1))}, Exclusion.QUOTE),
    ],
)
def test_r3_each_question_excludes_by_its_own_reason(listing, asked, reason):
    """R3, R4: who fails a question is not tried, and the refusal counts them under that question."""
    fault = refusal(router(listing), wish(**asked))
    assert (fault.reason, fault.excluded) == (NodeReason.NO_PROVIDER, {reason.value: 1})


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt_tokens": 90, "max_tokens": 10},
        {"prompt_tokens": 60, "max_tokens": 10_000},
        {"max_prompt_price": 10 * CENT, "max_completion_price": 20 * CENT},
        {"bound": Rates(Pico(10 * CENT), Pico(10 * CENT), Pico(20 * CENT))},
        {"needs": Ability.REASONING | Ability.TOOLS},
    ],
)
def test_limits_are_inclusive(asked):
    """R4: a price at the ceiling and a prompt that just fits are served, and an answer is as long as the provider gives."""
    listing = sells(**FIT, context=100, max_output=40, priced_at=UnixSeconds(WALL - 7 * 86400))
    assert names(router(listing).decide(wish(**asked), now=at()).chain) == ["p"]


def test_r3_the_first_reason_is_kept():
    """R3: questions are asked in the rule's order, so fixing the reason given leads to the next one."""
    listing = sells("p", 9, 9, kind=EXTERNAL, context=10, priced_at=UnixSeconds(0))
    health = health_of()
    report(health, listing, Verdict.FAILED, at().monotonic, times=5)
    asked = {"barred": frozenset({"p"}), "ignore": frozenset({"p"}), "needs": Ability.VISION, "prompt_tokens": 10, "allow_external": False, "max_prompt_price": 1, "bound": Rates(Pico(1), Pico(1), Pico(1))}
    seen = []
    fixes = [({}, 0), ({"barred": frozenset()}, 0), ({"ignore": frozenset()}, 0), ({}, 60), ({"needs": Ability(0)}, 60), ({"prompt_tokens": 0}, 60), ({"allow_external": True}, 60)]
    for fix, seconds in fixes:
        asked |= fix
        seen += refusal(router(listing, health=health), wish(**asked), at(seconds)).excluded
    listing = sells("p", 9, 9)
    for fix in ({}, {"max_prompt_price": 9}):
        asked |= fix
        seen += refusal(router(listing), wish(**asked)).excluded
    assert seen == [reason.value for reason in Exclusion if reason is not Exclusion.THROTTLED]


def test_who_has_what_the_caller_would_like_goes_first():
    """Without ``require_parameters`` a provider without log probabilities is second choice, at any price."""
    plain = sells("plain", 1, 1, abilities=Ability.TOOLS)
    rich = sells("rich", abilities=Ability.LOGPROBS)
    assert names(router(plain, rich).decide(wish(needs=Ability.LOGPROBS), now=at()).chain) == ["rich", "plain"]


# ---------------------------------------------------------------------------------------------------- R4: merged wishes


def test_r4_precedence_and_the_least_ceiling_on_each_axis():
    """Request before key before node; ceilings of all combine to the least on each axis, 1 cent being 10,000 pico."""
    key = Defaults(Strategy.FASTEST, None, PriceCeiling(10, 90))
    node = Defaults(Strategy.CHEAPEST, True, None)
    merged = plan(Wishes(("m",), ceiling=PriceCeiling(20, 50), max_prompt_price=Pico(150_000)), (key, node), needs=Ability(0), prompt_tokens=1, max_tokens=2)
    assert (merged.strategy, merged.allow_external) == (Strategy.FASTEST, True)
    assert (merged.max_prompt_price, merged.max_completion_price) == (100_000, 500_000)
    said = plan(Wishes(("m",), Strategy.BALANCED, False), (key, node), needs=Ability(0), prompt_tokens=1, max_tokens=2)
    assert (said.strategy, said.allow_external) == (Strategy.BALANCED, False)


@pytest.mark.parametrize(
    ("wishes", "strategy", "external"),
    [
        (Wishes(("m",)), Strategy.BALANCED, True),
        (Wishes(("m",), Strategy.FASTEST), Strategy.FASTEST, True),
        (Wishes(("m",), Strategy.CHEAPEST), Strategy.CHEAPEST, False),
        (Wishes(("m",), Strategy.CHEAPEST, True), Strategy.CHEAPEST, True),
        (Wishes(("m",), sort=Sort.PRICE), Strategy.CHEAPEST, False),
        (Wishes(("m",), sort=Sort.LATENCY), Strategy.FASTEST, True),
    ],
)
def test_external_providers_are_out_only_for_the_cheapest(wishes, strategy, external):
    """``allow_external`` defaults to true, and to false for the cheapest; a sort has its strategy's default."""
    merged = plan(wishes, (Defaults(),), needs=Ability(0), prompt_tokens=1, max_tokens=1)
    assert (merged.strategy, merged.allow_external) == (strategy, external)


# ------------------------------------------------------------------------------------------- R9: affinity; chains; R12


def test_r9_a_conversation_stays_with_its_provider():
    """R9: a cheaper rival in the band and one failure do not move it; the band, the breaker and ten idle minutes do."""
    own, rival, dear = sells("own", 60, 60), sells("rival", 50, 50), sells("dear", 500, 500)
    health = health_of()
    route = router(own, rival, dear, health=health)
    asked = wish(affinity=b"talk")
    def first(seconds=0):
        return names(route.decide(asked, now=at(seconds)).chain)[0]
    assert first() == "rival"
    route.served(asked, own, at())
    assert first() == "own"
    report(health, own, Verdict.FAILED, at().monotonic)
    assert first(1) == "own"
    assert (first(600), first(601)) == ("own", "rival")
    route.served(asked, own, at())
    report(health, own, Verdict.FAILED, at().monotonic, times=4)
    assert first() == "rival"
    route.served(asked, dear, at())
    assert first() == "rival"


def test_affinity_is_bounded_and_private():
    """The oldest conversations are forgotten, and one payer's name for a conversation is not another's."""
    affinity = Affinity(conversations_max=2)
    for key in (b"1", b"2", b"3"):
        affinity.served(key, "m", "p", 0.0)
    assert [affinity.provider(key, "m", 1.0) for key in (b"1", b"2", b"3")] == [None, "p", "p"]
    assert len(affinity) == 2
    keys = [affinity_key(payer, cache_key=name, opening=texts) for payer, name, texts in [(b"a", "k", ["x"]), (b"a", "k", ["y"]), (b"b", "k", []), (b"a", None, ["k"]), (b"a", None, ["xy"]), (b"a", None, ["x", "y"])]]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5
    assert affinity_key(b"", cache_key=None, opening=["hello"]) is None


def test_chains_are_short_and_leave_room_for_the_next_model():
    """At most ``attempts_max``, model by model; each later model keeps one place; one without fallbacks."""
    listings = [sells(f"{model}{index}", model=model) for model in "abc" for index in range(4)]
    route = router(*listings)
    assert names(route.decide(wish(models=("a",)), now=at()).chain) == ["a0", "a1", "a2"]
    assert names(route.decide(wish(models=("a", "b")), now=at()).chain) == ["a0", "a1", "b0"]
    assert names(route.decide(wish(models=("c", "b", "a")), now=at()).chain) == ["c0", "b0", "a0"]
    assert names(route.decide(wish(models=("a", "b"), allow_fallbacks=False), now=at()).chain) == ["a0"]
    skipping = wish(models=("a", "b"), ignore=frozenset({"a0", "a1", "a2", "a3"}))
    assert names(route.decide(skipping, now=at()).chain) == ["b0", "b1", "b2"]


def test_an_unknown_model_is_the_books_refusal():
    """The 404 with near names comes from the book, for a fallback model as well."""
    for models in (("zz",), ("m", "zz")):
        fault = refusal(router(sells("p")), wish(models=models))
        assert (fault.reason, "did you mean m" in fault.message) == (NodeReason.UNKNOWN_MODEL, True)


def test_r12_nobody_says_who_was_kept_out_and_what_would_do():
    """R12: counts by reason and the lowest price only a ceiling kept out, in pico and in words."""
    listings = (sells("a", 300_000, 400_000), sells("b", 250_000, 900_000), sells("c", 1, 1, kind=EXTERNAL))
    fault = refusal(router(*listings), wish(max_prompt_price=1, allow_external=False))
    assert (fault.excluded, fault.lowest) == ({"external": 1, "max_price": 2}, (300_000, 400_000))
    assert "0.300000 and 0.400000 USD per million" in fault.message


def test_r12_everybody_throttled_is_busy_for_the_least_wait():
    """R12: 429 with the smallest Retry-After when those who would qualify are all throttled; else 503."""
    a, b, dear = sells("a"), sells("b"), sells("dear", 900_000)
    health = health_of()
    route = router(a, b, dear, health=health)
    for listing, wait in ((a, 30.2), (b, 9.0), (dear, 2.0)):
        report(health, listing, Verdict.THROTTLED, at().monotonic, retry_after_s=wait)
    fault = refusal(route, wish(max_prompt_price=200_000))
    assert (fault.reason, fault.retry_after_s, fault.excluded) == (NodeReason.PROVIDERS_BUSY, 9, {"throttled": 3})
    assert refusal(route, wish(max_prompt_price=1)).reason is NodeReason.NO_PROVIDER


def test_a_quote_covers_everybody_who_may_be_tried():
    """What is quoted is the dearest of all who qualify, sick ones too; a price raised since then is out."""
    a, b, out = sells("a", 100, 900), sells("b", 200, 100), sells("out", 5000, 5000)
    health = health_of()
    report(health, a, Verdict.FAILED, at().monotonic, times=5)
    asked = wish(max_prompt_price=1000)
    able = router(a, b, out, health=health).eligible(asked, at())
    bound = bound_of(able)
    assert (names(able), bound.input, bound.output) == (["b", "a"], 200, 900)
    raised = router(sells("a", 201, 900), b)
    decided = raised.decide(wish(bound=bound), now=at())
    assert (names(decided.chain), decided.excluded) == (["b"], {"quote": 1})
    with pytest.raises(NodeFault):
        router(out).eligible(asked, at())
    with pytest.raises(ValueError, match="nobody"):
        bound_of(())
