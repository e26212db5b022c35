"""Which prices are believed (P-66), and what is kept of the ones before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from channels.instants import UnixSeconds
from mppnode.kernel.listing import Ability
from mppnode.kernel.rates import Rates
from mppnode.pricing.entries import HISTORY_MAX, Entry, Held
from mppnode.pricing.guard import (
    Offer,
    Outcome,
    Reading,
    Verdict,
    suspicion,
    take_list,
    take_offers,
    unknown_acceptances,
)
from tests.unit.pricing.lists import NOW, entry, rates

LATER = UnixSeconds(NOW + 500)
OLD = entry()
SOURCE = "https://infra.example/v1/models"


def offer(cost: Rates | None = OLD.cost, name: str = "qwen/x", **keys: object) -> Offer:
    return replace(Offer(name, cost, context=8192), **keys)


def take(
    offers: list[Offer], entries: list[Entry] | None = None, *, wanted: tuple[str, ...] = ("*",), accept: bool = False
) -> tuple[dict[tuple[str, str], Entry], list[Outcome]]:
    known = {made.key: made for made in ([OLD] if entries is None else entries)}
    accepted = frozenset(known) if accept else frozenset()
    return take_offers(known, offers, Reading("infra", SOURCE, LATER, wanted, accepted))


@pytest.mark.parametrize(
    ("cost", "verdict", "words"),
    [
        (rates(100_000, 100_000, 400_000), Verdict.SAME, ""),
        (rates(110_000, 100_000, 390_000), Verdict.CHANGED, ""),
        (rates(1_000_000, 100_000, 4_000_000), Verdict.CHANGED, ""),
        (rates(10_000, 10_000, 40_000), Verdict.CHANGED, ""),
        (rates(1_000_001, 100_000, 400_000), Verdict.HELD, "input rose more than 10 times"),
        (rates(100_000, 1_000_001, 400_000), Verdict.HELD, "cached_input rose more than 10 times"),
        (rates(100_000, 100_000, 4_000_001), Verdict.HELD, "output rose more than 10 times"),
        (rates(100_000, 100_000, 39_999), Verdict.HELD, "output fell more than 10 times"),
        (rates(9_999, 100_000, 400_000, 100_000), Verdict.HELD, "input fell more than 10 times"),
        (rates(0, 100_000, 400_000, 100_000), Verdict.HELD, "input fell from a price to zero"),
        (rates(100_000, 100_000, 0, 100_000, 400_000), Verdict.HELD, "output fell from a price to zero"),
        (rates(100_000, 100_000, 400_000, 0), Verdict.HELD, "cache_write fell from a price to zero"),
        (rates(100_000, 100_000, 400_000, 100_000, 0), Verdict.HELD, "reasoning fell from a price to zero"),
        (rates(100_000, 100_000, 400_000, 100_000, 400_000, 1), Verdict.HELD, "request rose more than 10 times"),
        (rates(0, 0, 0), Verdict.HELD, "is free, and a free model cannot be quoted"),
    ],
)
def test_which_moves_are_believed(cost: Rates, verdict: Verdict, words: str) -> None:
    """P-66: up to ten times either way is a price change; more, and nothing for something, waits for the operator."""
    merged, (outcome,) = take([offer(cost)])
    now = merged[OLD.key]
    assert (outcome.verdict, outcome.reason) == (verdict, words)
    assert outcome.verdict.bad is (verdict is Verdict.HELD)
    if verdict is Verdict.HELD:
        # The old price stays with its old time, so it goes stale unless somebody decides.
        assert now == replace(OLD, held=Held(LATER, words, cost))
    else:
        assert (now.cost, now.time, now.source, now.held) == (cost, LATER, SOURCE, None)


@pytest.mark.parametrize("problem", ["input is negative", "output is not a decimal", "states no price"])
def test_what_is_no_price_is_held(problem: str) -> None:
    """P-66: malformed and negative prices leave the old one in force and say why."""
    merged, (outcome,) = take([offer(None, problem=problem)])
    assert (outcome.verdict, outcome.reason) == (Verdict.HELD, problem)
    assert merged[OLD.key] == replace(OLD, held=Held(LATER, problem))


def test_a_price_listed_twice_is_held() -> None:
    """Two prices for one model in one list are no price; the same twice is the same."""
    merged, (outcome,) = take([offer(), offer(rates(2, 2, 2)), offer()])
    assert (outcome.verdict, outcome.reason) == (Verdict.HELD, "is listed twice with different prices")
    assert merged[OLD.key].cost == OLD.cost
    assert [found.verdict for found in take([offer(), offer()])[1]] == [Verdict.SAME]


def test_a_held_price_is_taken_when_it_is_named_and_still_the_same() -> None:
    """The operator's word counts for the price they saw, and for no other."""
    dear, dearer = rates(5_000_000, 5_000_000, 5_000_000), rates(50_000_000, 50_000_000, 50_000_000)
    first, _ = take([offer(dear)])
    held = list(first.values())
    again, (outcome,) = take([offer(dear)], held)
    assert (outcome.verdict, again[OLD.key].cost) == (Verdict.HELD, OLD.cost)
    moved, (outcome,) = take([offer(dearer)], held, accept=True)
    assert "not the price that was held before" in outcome.reason
    assert (outcome.verdict, moved[OLD.key].cost) == (Verdict.HELD, OLD.cost)
    taken, (outcome,) = take([offer(dear)], held, accept=True)
    assert outcome.verdict is Verdict.ACCEPTED
    assert (taken[OLD.key].cost, taken[OLD.key].held) == (dear, None)
    assert taken[OLD.key].history[0].cost == OLD.cost


def test_free_is_never_accepted() -> None:
    """A model without a price cannot be quoted, whoever says so."""
    held, _ = take([offer(rates(0, 0, 0))])
    merged, (outcome,) = take([offer(rates(0, 0, 0))], list(held.values()), accept=True)
    assert (outcome.verdict, merged[OLD.key].cost) == (Verdict.HELD, OLD.cost)


def test_acceptances_of_nothing_are_told() -> None:
    """Accepting what is not held is a typing error."""
    entries = {OLD.key: OLD, ("infra", "b"): entry("b", held=Held(NOW, "why"))}
    assert unknown_acceptances(entries, [OLD.key, ("infra", "b"), ("infra", "c")]) == [OLD.key, ("infra", "c")]


def test_a_hold_ends_when_the_source_comes_to_reason() -> None:
    """The old price read again is fresh again, and nothing is held any more."""
    held = replace(OLD, held=Held(NOW, "why"))
    merged, (outcome,) = take([offer()], [held])
    assert outcome.verdict is Verdict.SAME
    assert (merged[OLD.key].held, merged[OLD.key].time, merged[OLD.key].history) == (None, LATER, ())


def test_earlier_prices_are_kept_with_their_dates() -> None:
    """Every price that was in force is in the history, newest first, up to the limit."""
    entries = {OLD.key: OLD}
    for step in range(1, HISTORY_MAX + 6):
        cost = rates(100_000 + step, 100_000, 400_000)
        entries, _ = take_offers(entries, [offer(cost)], Reading("infra", SOURCE, UnixSeconds(NOW + step), ("*",)))
    history = entries[OLD.key].history
    assert len(history) == HISTORY_MAX
    assert [dated.cost.input for dated in history[:2]] == [100_000 + HISTORY_MAX + 4, 100_000 + HISTORY_MAX + 3]
    assert [dated.time for dated in history] == sorted((dated.time for dated in history), reverse=True)


def test_what_the_operator_corrected_stays() -> None:
    """Abilities, kind and quality of an entry survive; context and output limit follow the source."""
    mine = replace(OLD, abilities=Ability.VISION, quality=50, vouched=True)
    merged, _ = take([offer(context=9000, max_output=100, abilities=Ability.TOOLS)], [mine])
    now = merged[OLD.key]
    assert (now.abilities, now.quality, now.context, now.max_output) == (Ability.VISION, 50, 9000, 100)
    assert not now.vouched


def test_models_are_matched_by_the_provider_s_name_for_them() -> None:
    """An entry that sells under another name keeps it."""
    renamed = entry("nice/name", upstream_model="accounts/1/x")
    merged, (outcome,) = take([offer(rates(200_000, 200_000, 400_000), "accounts/1/x")], [renamed])
    assert (outcome.model, outcome.verdict) == ("nice/name", Verdict.CHANGED)
    assert set(merged) == {("infra", "nice/name")}


def test_one_upstream_model_may_be_sold_under_two_names() -> None:
    """Every entry of one upstream model follows its price."""
    both = [entry("nice/name", upstream_model="up"), entry("other/name", upstream_model="up")]
    merged, outcomes = take([offer(rates(200_000, 200_000, 400_000), "up")], both)
    assert [outcome.verdict for outcome in outcomes] == [Verdict.CHANGED, Verdict.CHANGED]
    assert {made.cost.input for made in merged.values()} == {200_000}


def test_a_name_that_is_taken_keeps_its_own_price() -> None:
    """A provider's model that is called as we call another of its models does not set that one's price."""
    aliased = entry("x", upstream_model="y")
    merged, outcomes = take([offer(rates(300_000, 300_000, 400_000), "x"), offer(rates(200_000, 200_000, 400_000), "y")], [aliased])
    assert [(outcome.model, outcome.verdict) for outcome in outcomes] == [("x", Verdict.CHANGED)]
    assert merged["infra", "x"].cost.input == 200_000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (offer(None, problem="input is negative"), "input is negative"),
        (offer(rates(0, 0, 0)), "is free, and a free model cannot be quoted"),
        (offer(context=None), "states no context length"),
    ],
)
def test_a_new_model_needs_a_whole_price(given: Offer, words: str) -> None:
    """Never priced and not usable, a model is left out; it is a failure only when the operator asked for it."""
    for wanted, verdict in ((("*",), Verdict.SKIPPED), (("qwen/x",), Verdict.FAILED)):
        merged, (outcome,) = take([given], [], wanted=wanted)
        assert (merged, outcome.verdict, outcome.reason) == ({}, verdict, words)


def test_a_new_model_is_taken_as_it_is_listed() -> None:
    """Name, limits, abilities, source and time of a new entry are the list's."""
    merged, (outcome,) = take([offer(abilities=Ability.VISION, rounded=("input",))], [])
    (made,) = merged.values()
    assert outcome.verdict is Verdict.NEW
    assert made == entry(source=SOURCE, time=LATER, abilities=Ability.VISION, rounded=("input",), max_output=8192)


def test_only_what_is_sold_is_taken() -> None:
    """A list of hundreds of models adds the few the provider is configured to sell."""
    merged, outcomes = take([offer(), offer(name="b"), offer(name="bad name")], [], wanted=("b",))
    assert set(merged) == {("infra", "b")}
    assert [outcome.model for outcome in outcomes] == ["b"]
    assert take([offer(name="~bad")], [])[0] == {}


def test_a_model_that_left_the_list_keeps_its_price_and_ages() -> None:
    """Gone is told, and is a failure when the operator named the model."""
    merged, (outcome,) = take([])
    assert (merged[OLD.key], outcome.verdict) == (OLD, Verdict.GONE)
    (outcome,) = take([], wanted=("qwen/x",))[1]
    assert outcome.verdict is Verdict.FAILED
    assert outcome.verdict.bad


def test_other_providers_are_not_touched() -> None:
    """One provider's list says nothing about another's prices."""
    other = entry(provider="other")
    merged, _ = take([offer(rates(200_000, 200_000, 400_000))], [OLD, other])
    assert merged[other.key] == other


def test_a_vouched_list_passes_the_same_rails() -> None:
    """An import adds and changes prices that do not go stale, and holds a jump like any other list."""
    known = {OLD.key: OLD, ("infra", "b"): entry("b")}
    given = [entry(cost=rates(120_000, 120_000, 400_000)), entry("b", cost=rates(9_000_000, 9_000_000, 9_000_000)), entry("c")]
    merged, outcomes = take_list(known, given, now=LATER)
    assert [outcome.verdict for outcome in outcomes] == [Verdict.CHANGED, Verdict.HELD, Verdict.NEW]
    assert merged[OLD.key].vouched
    assert merged[OLD.key].history[0].cost == OLD.cost
    assert merged["infra", "b"].cost == OLD.cost
    assert merged["infra", "c"].vouched
    merged, outcomes = take_list(merged, given[1:2], now=LATER, accepted=frozenset({("infra", "b")}))
    assert [outcome.verdict for outcome in outcomes] == [Verdict.ACCEPTED]
    assert merged["infra", "b"].cost.input == 9_000_000


def test_equal_prices_are_never_suspicious() -> None:
    """Zero and zero is no fall, and no rise."""
    assert suspicion(rates(0, 0, 5), rates(0, 0, 5)) == ""
