"""Choosing a model for ``model: "auto"``: by written weights, with nothing invented."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability
from mppnode.kernel.wishes import Optimize
from mppnode.routing.auto import FALLBACKS_MAX, WEIGHTS, Candidate, answer_tokens, choose, pool_of
from mppnode.routing.classify import Complexity, Reading, Task

ALL = Ability.TOOLS | Ability.JSON_SCHEMA | Ability.VISION | Ability.REASONING


def reading(complexity=Complexity.MODERATE, task=Task.QUESTION_ANSWERING, tokens=100) -> Reading:
    return Reading(task, complexity, 900, "en", tokens)


def model(name="m", quality=50, cost=1000, **more) -> Candidate:
    return Candidate(name, quality, cost, **{"abilities": ALL, "context": 8192, **more})


def chosen(pool, optimize=Optimize.BALANCED, read=None, **more):
    return choose(read or reading(), pool, optimize, max_tokens=1000, **more)


WEAK = model("weak", 35, 1_000, first_s=0.2, tokens_per_s=200.0)
STRONG = model("strong", 85, 20_000, first_s=1.0, tokens_per_s=50.0)
CANDIDATES = st.builds(
    Candidate,
    st.sampled_from([f"m{at}" for at in range(40)]),
    st.integers(0, 100),
    st.integers(0, 10**12),
    abilities=st.just(ALL),
    context=st.integers(1000, 200_000),
    first_s=st.none() | st.floats(0, 1e6, allow_nan=False),
    tokens_per_s=st.none() | st.floats(0, 1e6, allow_nan=False),
)
POOLS = st.lists(CANDIDATES, min_size=1, max_size=20, unique_by=lambda each: each.model)


# ----------------------------------------------------------------------------------------------------------------- scores


def test_weights_of_every_mode_sum_to_a_hundred():
    """Every mode has weights, and a perfect model scores 1."""
    assert {mode: sum(weights) for mode, weights in WEIGHTS.items()} == dict.fromkeys(Optimize, 100)


def test_a_worked_example():
    """Balanced, moderate: fit 0.7 and 1, cost 1 and 0.05, latency 1 and 0.24, quality 0.35 and 0.85."""
    weak, strong = chosen([WEAK, STRONG]).ranked
    # The usual answer is 200 tokens: 1,200 ms and 5,000 ms.
    assert (weak.fit, weak.cost, weak.latency, weak.quality) == (700, 1000, 1000, 350)
    assert (strong.fit, strong.cost, strong.latency, strong.quality) == (1000, 50, 240, 850)
    assert weak.total == (40 * 700 + 25 * 1000 + 15 * 1000 + 20 * 350) // 100 == 750
    assert strong.total == (40 * 1000 + 25 * 50 + 15 * 240 + 20 * 850) // 100 == 618


@pytest.mark.parametrize(
    ("optimize", "complexity", "best"),
    [
        (Optimize.BALANCED, Complexity.SIMPLE, "weak"),
        (Optimize.BALANCED, Complexity.COMPLEX, "strong"),
        (Optimize.QUALITY, Complexity.SIMPLE, "strong"),
        (Optimize.COST, Complexity.COMPLEX, "weak"),
        (Optimize.LATENCY, Complexity.MODERATE, "weak"),
    ],
)
def test_what_each_mode_prefers(optimize, complexity, best):
    """Hard work goes to the better model, easy work to the cheaper one, unless the caller weighs otherwise."""
    assert chosen([WEAK, STRONG], optimize, reading(complexity)).models[0] == best


def test_what_is_unknown_is_said_to_be():
    """Quality 0 and missing measurements are ``unknown`` in the decision, and no number is put in their place."""
    scores = chosen([model("m", 0, first_s=0.5)]).decision(0.4)["scores"]
    assert scores == {"fit": 1.0, "cost": 1.0, "latency": "unknown", "quality": "unknown"}


@given(st.sampled_from(Optimize), st.sampled_from(Complexity), st.lists(st.integers(1, 100), min_size=1, max_size=3))
def test_unknown_quality_is_neither_best_nor_worst(optimize, complexity, qualities):
    """Among models that differ in quality alone, the unknown one scores from the worst to the best of the others."""
    pool = [model(f"m{at}", quality) for at, quality in enumerate(qualities)]
    ranked = choose(reading(complexity), [*pool, model("unknown", 0)], optimize, max_tokens=9).ranked
    totals = [each.total for each in ranked if each.model != "unknown"]
    (unknown,) = (each.total for each in ranked if each.model == "unknown")
    assert min(totals) <= unknown <= max(totals)


def test_unknown_quality_counts_as_the_median():
    """Of 20, 60 and 90 the unknown one is taken for 60: it ranks with it, behind 90 and before 20."""
    pool = [model("low", 20), model("mid", 60), model("high", 90), model("what", 0)]
    ranked = chosen(pool, Optimize.QUALITY).ranked
    assert [each.model for each in ranked] == ["high", "mid", "what", "low"]
    assert ranked[1].total == ranked[2].total
    assert ranked[2].quality == "unknown"


def test_unknown_latency_counts_as_the_median():
    """An unmeasured model is neither taken for fast nor for slow."""
    fast = model("fast", first_s=0.1, tokens_per_s=1000.0)
    usual = model("usual", first_s=1.0, tokens_per_s=100.0)
    slow = model("slow", first_s=9.0, tokens_per_s=10.0)
    assert chosen([slow, model("cold"), usual, fast], Optimize.LATENCY).models == ("fast", "cold", "usual", "slow")


def test_thinking_counts_on_hard_problems_only():
    """A model that cannot think ahead loses fit on complex maths, and on nothing else."""
    plain = model("plain", 80, abilities=Ability.TOOLS)
    hard = chosen([plain, model("thinks", 80)], read=reading(Complexity.COMPLEX, Task.MATH))
    assert [each.fit for each in hard.ranked] == [1000, 850]
    for read in (reading(Complexity.COMPLEX, Task.TRANSLATION), reading(Complexity.SIMPLE, Task.MATH)):
        assert chosen([plain], read=read).ranked[0].fit == 1000


def test_a_crowded_context_costs_fit():
    """Prompt and usual answer over three quarters of the context: exactly there is still fine."""
    read = reading(tokens=6000 - 200)
    assert chosen([model(context=8000)], read=read).ranked[0].fit == 1000
    assert chosen([model(context=7999)], read=read).ranked[0].fit == 800


def test_answers_are_estimated_by_task_and_never_above_what_is_allowed():
    """The tokens that models are compared by depend on task and complexity, up to the caller's limit."""
    assert answer_tokens(reading(Complexity.SIMPLE), 1000) == 100
    assert answer_tokens(reading(Complexity.COMPLEX), 1000) == 600
    assert answer_tokens(reading(Complexity.COMPLEX), 50) == 50


# ---------------------------------------------------------------------------------------------------------------- ranking


@given(POOLS, st.sampled_from(Optimize), st.sampled_from(Complexity), st.randoms(use_true_random=False))
def test_the_order_of_the_pool_does_not_matter(pool, optimize, complexity, draw):
    """The same models in any order give the same choice, sorted by score, all scores from 0 to 1."""
    read = reading(complexity)
    first = choose(read, pool, optimize, max_tokens=500)
    shuffled = list(pool)
    draw.shuffle(shuffled)
    assert choose(read, shuffled, optimize, max_tokens=500) == first
    totals = [each.total for each in first.ranked]
    assert totals == sorted(totals, reverse=True)
    assert len(first.models) == min(len(pool), 1 + FALLBACKS_MAX)
    for each in first.ranked:
        for score in (each.total, each.fit, each.cost, each.latency, each.quality):
            assert score == "unknown" or 0 <= score <= 1000


@given(POOLS, st.sampled_from(Optimize), st.integers(1, 10**9))
def test_a_lower_price_never_ranks_lower(pool, optimize, saved):
    """Making the chosen model cheaper leaves it chosen."""
    best = chosen(pool, optimize).models[0]
    cheaper = [
        Candidate(each.model, each.quality, max(0, each.cost - saved), each.abilities, each.context, each.first_s, each.tokens_per_s)
        if each.model == best
        else each
        for each in pool
    ]
    assert chosen(cheaper, optimize).models[0] == best


def test_equals_go_by_cost_then_quality_then_name():
    """Ties are broken by what is written, never by chance."""
    assert chosen([model("b"), model("a"), model("c")]).models == ("a", "b", "c")
    read = reading(Complexity.SIMPLE)
    huge = [model("x", 50, 10**9 + 1), model("a", 50, 10**9 + 2), model("cheap", 50, 1)]
    assert chosen(huge, read=read).models == ("cheap", "x", "a")


def test_a_free_model_is_the_cheapest_and_nothing_divides_by_it():
    """A cost of zero scores 1 and leaves the others comparable."""
    ranked = chosen([model("free", 50, 0), model("one", 50, 1), model("two", 50, 2)]).ranked
    assert [(each.model, each.cost) for each in ranked] == [("free", 1000), ("one", 1000), ("two", 500)]


@pytest.mark.parametrize(("first_s", "rate"), [(None, 10.0), (1.0, None), (1.0, 0.0)])
def test_half_a_measurement_is_none(first_s, rate):
    """Without both figures, or without any speed, latency is unknown."""
    assert chosen([model(first_s=first_s, tokens_per_s=rate)]).ranked[0].latency == "unknown"


# -------------------------------------------------------------------------------------------------------------- refusals


def test_models_that_cannot_serve_drop_out():
    """Abilities and context are conditions, however good the price."""
    blind = model("blind", 90, 1, abilities=Ability.TOOLS)
    small = model("small", 90, 1, context=100)
    fits = model("fits", 20, 10**9, context=101)
    assert chosen([blind, small, fits], needs=Ability.VISION | Ability.TOOLS).models == ("fits",)


def test_nobody_left_is_counted_by_reason():
    """503 with how many lacked an ability and how many the context."""
    pool = [model("a", abilities=Ability.TOOLS), model("b", abilities=Ability(0)), model("c", context=10)]
    with pytest.raises(NodeFault) as caught:
        chosen(pool, needs=Ability.VISION)
    assert caught.value.reason is NodeReason.NO_PROVIDER
    assert caught.value.excluded == {"require_parameters": 2, "context_length": 1}
    assert "2 by require_parameters; 1 by context_length" in caught.value.message


# ------------------------------------------------------------------------------------------------------------------ pool


def lookup(name):
    if name not in {"a", "b", "c"}:
        raise NodeFault(NodeReason.UNKNOWN_MODEL, field="model", detail="is not sold here; did you mean a?")


def test_the_most_specific_pool_decides():
    """Request before key before account before node before everything on sale; each model once."""
    sold = ("a", "b", "c")
    assert pool_of(["b", "a", "b"], [["c"]], on_sale=sold, lookup=lookup) == ("b", "a")
    assert pool_of(None, [None, ["c", "a"], ["b"]], on_sale=sold, lookup=lookup) == ("c", "a")
    assert pool_of(None, [None], on_sale=sold, lookup=lookup) == sold


def test_an_unknown_entry_of_the_request_is_named():
    """404 that names the place in the pool and near names, and repeats nothing of the caller's."""
    with pytest.raises(NodeFault) as caught:
        pool_of(["a", "zzz"], [], on_sale=("a",), lookup=lookup)
    assert (caught.value.reason, caught.value.field) == (NodeReason.UNKNOWN_MODEL, "routing.model_pool[1]")
    assert caught.value.message == "routing.model_pool[1] is not sold here; did you mean a?"


def test_other_refusals_of_the_catalog_pass():
    """Only an unknown name is renamed."""

    def closed(_name):
        raise NodeFault(NodeReason.OVERLOADED)

    with pytest.raises(NodeFault) as caught:
        pool_of(["a"], [], on_sale=("a",), lookup=closed)
    assert caught.value.reason is NodeReason.OVERLOADED


def test_a_default_pool_outlives_its_models():
    """A model that left the catalog is passed over in a default; when none is left the refusal says so."""
    assert pool_of(None, [["gone", "a"]], on_sale=("a", "b"), lookup=lookup) == ("a",)
    for given_pool, sold in ((["gone"], ("a",)), (None, ())):
        with pytest.raises(NodeFault) as caught:
            pool_of(None, [given_pool], on_sale=sold, lookup=lookup)
        assert caught.value.reason is NodeReason.NO_PROVIDER


# -------------------------------------------------------------------------------------------------------------- decision


def test_the_decision_as_it_is_told():
    """Every field of the routing event but ``object``, all numbers from 0 to 1."""
    choice = chosen([WEAK, STRONG])
    assert choice.decision(0.31) == {
        "task": "question_answering",
        "complexity": "moderate",
        "confidence": 0.9,
        "language": "en",
        "model": "weak",
        "optimize": "balanced",
        "score": 0.75,
        "scores": {"fit": 0.7, "cost": 1.0, "latency": 1.0, "quality": 0.35},
        "alternatives": [{"model": "strong", "score": 0.618}],
        "routing_time_ms": 0.31,
    }
