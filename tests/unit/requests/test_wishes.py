"""The caller's routing fields: each is honoured or refused by its path."""

import pytest

from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability
from mppnode.kernel.strategy import PriceCeiling, Strategy
from mppnode.kernel.wishes import Optimize, Sort, Wishes, needs_of, parse_wishes

IN, OUT = "max_input_price_per_million", "max_output_price_per_million"


def parse(**fields):
    return parse_wishes({"model": "a/b", **fields})


def refused(**fields) -> NodeFault:
    with pytest.raises(NodeFault) as caught:
        parse(**fields)
    assert caught.value.reason is NodeReason.INVALID_FIELD
    return caught.value


def test_nothing_said_is_nothing_wished():
    """A plain request wishes its model and nothing else, and null says nothing."""
    assert parse() == Wishes(("a/b",))
    assert parse(routing_strategy=None, provider=None, models=None, routing=None, prompt_cache_key=None) == parse()
    assert parse(provider={"zdr": None, "order": None, "unheard_of": None}, routing={"task": None}) == parse()


def test_everything_said_is_kept():
    """Every field arrives as written, prices as exact pico-dollars per token."""
    wishes = parse(
        models=["c:nitro", "a/b"], model="a/b:nitro", routing_strategy="fastest", allow_external=False,
        provider={"order": ["x", "y", "x"], "only": ["x"], "ignore": [], "sort": {"by": "throughput", "partition": "model"},
                  "max_price": {"prompt": 0.1, "completion": "2.000001"}, "allow_fallbacks": False, "require_parameters": True},
        prompt_cache_key="k", routing={"model_pool": ["m"], "optimize": "cost", "task": "code"}, route="fallback",
        **{IN: 0, OUT: 50},
    )
    assert wishes == Wishes(
        ("a/b", "c"), Strategy.FASTEST, False, PriceCeiling(0, 50), 100_000, 2_000_001, Sort.THROUGHPUT,
        ("x", "y"), ("x",), (), False, True, "k", ("m",), Optimize.COST, "code",
    )


@pytest.mark.parametrize(
    ("given", "pico"),
    [(1, 1_000_000), (0, 0), (0.0, 0), (0.3, 300_000), (1e-06, 1), (1.5e-05, 15), (0.000123, 123), (10.0, 10_000_000), ("0.28", 280_000), ("10000000", 10**13), (None, None)],
)
def test_dollars_become_pico_exactly(given, pico):
    """A price is what the caller wrote, digit by digit: no binary fraction of it."""
    assert parse(provider={"max_price": {"prompt": given}}).max_prompt_price == pico
    assert parse(provider={"max_price": {"completion": given}}).max_completion_price == pico


@pytest.mark.parametrize("bad", [-1, -0.0, -0.5, True, 0.0000001, 1.2345678, 1e-05 / 3, 1e16, 1e300, 10**7 + 1, "1e-3", "", " 1", "1,5", "0.0000001", "+1", "nan", [1], {}])
def test_what_is_no_price_is_refused(bad):
    """Negatives, booleans, more than six places and what is beyond every price are refused by path."""
    assert refused(provider={"max_price": {"prompt": bad}}).field == "provider.max_price.prompt"
    assert refused(provider={"max_price": {"completion": bad}}).field == "provider.max_price.completion"


@pytest.mark.parametrize("bad", [1.0, 0.5, -1, True, False, "5", [5], 10**9 + 1])
def test_a_ceiling_is_whole_cents(bad):
    """R4: floats, negatives, booleans and text are no ceilings, on either axis."""
    assert refused(**{IN: bad, OUT: 5}).field == IN
    assert refused(**{IN: 5, OUT: bad}).field == OUT


def test_one_ceiling_alone_is_refused_by_the_missing_one():
    """R4: both or neither; zero is a ceiling."""
    assert refused(**{IN: 0}).field == OUT
    assert refused(**{OUT: 0}).field == IN
    assert parse(**{IN: 0, OUT: 0}).ceiling == PriceCeiling(0, 0)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"routing_strategy": "quality"}, "routing_strategy"),
        ({"routing_strategy": ["cheapest"]}, "routing_strategy"),
        ({"allow_external": 1}, "allow_external"),
        ({"models": []}, "models"),
        ({"models": ["m"] * 9}, "models"),
        ({"models": "m"}, "models"),
        ({"models": ["m", ""]}, "models[1]"),
        ({"models": [":floor"]}, "models[0]"),
        ({"models": ["m", 3]}, "models[1]"),
        ({"models": ["m:floor"]}, "models[0]"),
        ({"model": ":nitro"}, "model"),
        ({"model": None}, "model"),
        ({"route": "other"}, "route"),
        ({"provider": []}, "provider"),
        ({"provider": {"order": "x"}}, "provider.order"),
        ({"provider": {"order": ["x"] * 33}}, "provider.order"),
        ({"provider": {"only": []}}, "provider.only"),
        ({"provider": {"only": ["x", 1]}}, "provider.only[1]"),
        ({"provider": {"ignore": [""]}}, "provider.ignore[0]"),
        ({"provider": {"sort": "speed"}}, "provider.sort"),
        ({"provider": {"sort": {}}}, "provider.sort.by"),
        ({"provider": {"sort": {"by": "price", "partition": "none"}}}, "provider.sort.partition"),
        ({"provider": {"sort": {"by": ["price"]}}}, "provider.sort.by"),
        ({"provider": {"sort": {"by": "price", "zz": 1}}}, "provider.sort"),
        ({"provider": {"max_price": 1}}, "provider.max_price"),
        ({"provider": {"max_price": {"image": 1}}}, "provider.max_price.image"),
        ({"provider": {"max_price": {"zz": 1}}}, "provider.max_price"),
        ({"provider": {"allow_fallbacks": "yes"}}, "provider.allow_fallbacks"),
        ({"provider": {"require_parameters": 1}}, "provider.require_parameters"),
        ({"provider": {"data_collection": "deny"}}, "provider.data_collection"),
        ({"provider": {"zdr": True}}, "provider.zdr"),
        ({"provider": {"quantizations": ["int4"]}}, "provider.quantizations"),
        ({"provider": {"preferred_max_latency": 1}}, "provider.preferred_max_latency"),
        ({"provider": {"\x1b[31m": 1}}, "provider"),
        ({"prompt_cache_key": ""}, "prompt_cache_key"),
        ({"prompt_cache_key": "k" * 513}, "prompt_cache_key"),
        ({"prompt_cache_key": 1}, "prompt_cache_key"),
        ({"routing": "auto"}, "routing"),
        ({"routing": {"model_pool": []}}, "routing.model_pool"),
        ({"routing": {"model_pool": ["m", None]}}, "routing.model_pool[1]"),
        ({"routing": {"optimize": "price"}}, "routing.optimize"),
        ({"routing": {"task": "Code!"}}, "routing.task"),
        ({"routing": {"zz": 1}}, "routing"),
        # contradictions
        ({"routing_strategy": "fastest", "provider": {"sort": "price"}}, "routing_strategy"),
        ({"routing_strategy": "balanced", "provider": {"sort": "latency"}}, "routing_strategy"),
        ({"routing_strategy": "cheapest", "model": "m:nitro"}, "routing_strategy"),
        ({"model": "m:floor", "provider": {"sort": "throughput"}}, "provider.sort"),
        ({"model": "m:nitro", "provider": {"sort": "latency"}}, "provider.sort"),
    ],
)
def test_bad_routing_fields_are_refused_by_path(fields, path):
    """What cannot be honoured, or contradicts itself, is refused in our words; an unknown key is not repeated."""
    fault = refused(**fields)
    assert fault.field == path
    assert "\x1b" not in fault.message


@pytest.mark.parametrize(("name", "sort"), [("m:floor", Sort.PRICE), ("m:nitro", Sort.THROUGHPUT), ("m", None)])
def test_suffixes_are_orders(name, sort):
    """``:floor`` is the price order and ``:nitro`` the throughput order; other colons belong to the name."""
    assert (parse(model=name).sort, parse(model=name).models) == (sort, ("m",))
    assert parse(model="llama3:8b").models == ("llama3:8b",)
    assert parse(model="m:floor", routing_strategy="cheapest", provider={"sort": "price"}).sort is Sort.PRICE


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, Ability(0)),
        ({"tools": [], "n": 1, "logprobs": False, "response_format": {"type": "text"}}, Ability(0)),
        ({"tools": [{}]}, Ability.TOOLS),
        ({"functions": [{}]}, Ability.TOOLS),
        ({"messages": [{"role": "tool", "content": "x"}]}, Ability.TOOLS),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, Ability.TOOLS),
        ({"response_format": {"type": "json_schema"}}, Ability.JSON_SCHEMA),
        ({"response_format": {"type": "json_object"}}, Ability.JSON_SCHEMA),
        ({"messages": [{"role": "user", "content": [{"type": "text"}, {"type": "image_url"}]}]}, Ability.VISION),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, Ability.AUDIO_INPUT),
        ({"logprobs": True}, Ability.LOGPROBS),
        ({"top_logprobs": 3}, Ability.LOGPROBS),
        ({"n": 2}, Ability.CHOICES),
        ({"reasoning_effort": "low"}, Ability.REASONING),
        ({"reasoning": {"effort": "low"}, "n": 3}, Ability.REASONING | Ability.CHOICES),
    ],
)
def test_needs_follow_from_the_request(fields, needs):
    """What a request needs is read from what it says."""
    assert needs_of(fields) == needs
