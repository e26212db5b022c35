"""Decides which prices that were read are believed. A price list is somebody else's text, and it becomes our bills.

What is malformed, negative, nothing where there was something, or more than ten times away is *held*: the price in
force stays, goes stale in time, and the operator is told. A held price is taken only when the operator names it and the
source still says the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from channels.instants import UnixSeconds
from mppnode.config.catalog import EVERY_MODEL, MODEL_ID
from mppnode.config.schema import DEFAULT_ABILITIES
from mppnode.kernel.listing import Ability
from mppnode.kernel.rates import Rates
from mppnode.pricing.entries import AXES, ENTRIES_MAX, HISTORY_MAX, Dated, Entry, Held

JUMP_MAX: Final = 10
"""Times dearer or cheaper, on any axis. Price cuts of a half happen; ten times is a misread unit."""

_FREE: Final = "is free, and a free model cannot be quoted"


@dataclass(frozen=True, slots=True)
class Offer:
    """One model as a source lists it. ``cost`` is None when it has no usable price; then ``problem`` says why."""

    upstream_model: str
    cost: Rates | None
    problem: str = ""
    context: int | None = None
    max_output: int | None = None
    abilities: Ability = DEFAULT_ABILITIES
    rounded: tuple[str, ...] = ()


class Verdict(StrEnum):
    """What became of one price."""

    NEW = "new"
    SAME = "same"
    CHANGED = "changed"
    ACCEPTED = "accepted"
    HELD = "held"
    SKIPPED = "skipped"
    GONE = "gone"
    FAILED = "failed"

    @property
    def bad(self) -> bool:
        """Whether the operator has to do something."""
        return self in (Verdict.HELD, Verdict.FAILED)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one price, and of which. ``model`` is empty when it is the provider's whole list."""

    provider: str
    model: str
    verdict: Verdict
    reason: str = ""
    old: Rates | None = None
    new: Rates | None = None


def suspicion(old: Rates, new: Rates) -> str:
    """Why a new price is not believed beside the old one, or nothing."""
    for axis, before, after in zip(AXES, old.axes, new.axes, strict=True):
        if before and not after:
            return f"{axis} fell from a price to zero"
        if after > before * JUMP_MAX:
            return f"{axis} rose more than {JUMP_MAX} times"
        if after * JUMP_MAX < before:
            return f"{axis} fell more than {JUMP_MAX} times"
    return ""


@dataclass(frozen=True, slots=True)
class Reading:
    """One provider's list as it was read: where, when, and what the operator said about it beforehand."""

    provider: str
    source: str
    now: UnixSeconds
    wanted: tuple[str, ...]
    """Models as in the provider's configuration; ``*`` is all of them."""
    accepted: frozenset[tuple[str, str]] = frozenset()
    """Provider and model of held prices the operator believes."""


def take_offers(
    entries: Mapping[tuple[str, str], Entry], offers: Iterable[Offer], reading: Reading
) -> tuple[dict[tuple[str, str], Entry], list[Outcome]]:
    """The entries after a provider's list was read, and what became of each of its prices."""
    merged = dict(entries)
    outcomes: list[Outcome] = []
    sold_as: dict[str, list[str]] = {}
    for entry in entries.values():
        if entry.provider == reading.provider:
            sold_as.setdefault(entry.upstream_model, []).append(entry.model)
    seen: set[str] = set()
    for offer in _unambiguous(offers):
        for model in sold_as.get(offer.upstream_model, [offer.upstream_model]):
            named = model in reading.wanted
            if MODEL_ID.fullmatch(model) is None or not (named or EVERY_MODEL in reading.wanted):
                continue
            old = entries.get((reading.provider, model))
            if old is not None and old.upstream_model != offer.upstream_model:
                continue  # the name is taken: by another of the provider's models, which has its own price
            seen.add(model)
            taken, outcome = (
                _first(offer, model, reading, named=named, room=len(merged) < ENTRIES_MAX)
                if old is None
                else _again(old, offer, reading)
            )
            if taken is not None:
                merged[taken.key] = taken
            outcomes.append(outcome)
    known = {model for provider, model in entries if provider == reading.provider}
    everything = known if EVERY_MODEL in reading.wanted else set(reading.wanted)
    for model in sorted(everything - seen):
        # Its price stays and goes stale: a list that lost a model for an hour must not take it off sale at once.
        verdict = Verdict.FAILED if model in reading.wanted else Verdict.GONE
        outcomes.append(Outcome(reading.provider, model, verdict, "is not in the provider's list"))
    return merged, outcomes


def _unambiguous(offers: Iterable[Offer]) -> list[Offer]:
    found: dict[str, Offer] = {}
    for offer in offers:
        twin = found.get(offer.upstream_model)
        if twin is not None and twin != offer:
            offer = Offer(offer.upstream_model, None, "is listed twice with different prices")  # noqa: PLW2901
        found[offer.upstream_model] = offer
    return list(found.values())


def _first(offer: Offer, model: str, reading: Reading, *, named: bool, room: bool) -> tuple[Entry | None, Outcome]:
    """A model without a price so far. What the operator did not name may be unusable: then it is just not sold."""
    cost, problem = offer.cost, offer.problem
    if cost is not None and not cost.input and not cost.output:
        problem = _FREE
    elif cost is not None and offer.context is None:
        problem = "states no context length"
    elif not room:
        problem = f"would be entry {ENTRIES_MAX + 1} of the catalog"
    if cost is None or offer.context is None or problem:
        verdict = Verdict.FAILED if named else Verdict.SKIPPED
        return None, Outcome(reading.provider, model, verdict, problem, new=cost)
    entry = Entry(
        provider=reading.provider,
        model=model,
        upstream_model=offer.upstream_model,
        cost=cost,
        context=offer.context,
        max_output=offer.max_output or offer.context,
        source=reading.source,
        time=reading.now,
        abilities=offer.abilities,
        rounded=offer.rounded,
    )
    return entry, Outcome(reading.provider, model, Verdict.NEW, new=cost)


def _again(old: Entry, offer: Offer, reading: Reading) -> tuple[Entry, Outcome]:
    """A model that has a price. Its abilities, kind and quality stay: the operator may have corrected them."""
    provider, model = old.key
    if offer.cost is None:
        held = Held(reading.now, offer.problem)
        return replace(old, held=held), Outcome(provider, model, Verdict.HELD, offer.problem, old=old.cost)
    fresh = replace(
        old,
        cost=offer.cost,
        rounded=offer.rounded,
        context=offer.context or old.context,
        max_output=offer.max_output or old.max_output,
        source=reading.source,
        time=reading.now,
        vouched=False,
        held=None,
    )
    return settle(old, fresh, accepted=old.key in reading.accepted, now=reading.now)


def settle(old: Entry, fresh: Entry, *, accepted: bool, now: UnixSeconds) -> tuple[Entry, Outcome]:
    """Put ``fresh`` in the place of ``old``, with the old price in its history, or hold its price and keep the old one.

    ``accepted`` is the operator's word for the price held before; it does not count for another one.
    """
    provider, model = old.key
    if fresh.cost == old.cost:
        verdict = Verdict.SAME
        return replace(fresh, history=old.history), Outcome(provider, model, verdict, old=old.cost, new=fresh.cost)
    doubt = _FREE if fresh.free else suspicion(old.cost, fresh.cost)
    believed = accepted and old.held is not None and old.held.cost == fresh.cost and not fresh.free
    if doubt and not believed:
        if accepted and not fresh.free:
            doubt += "; this is not the price that was held before" if old.held else "; it was not held before"
        held = Held(now, doubt, fresh.cost)
        outcome = Outcome(provider, model, Verdict.HELD, doubt, old=old.cost, new=fresh.cost)
        return replace(old, held=held), outcome
    history = (Dated(old.time, old.source, old.cost), *old.history)[:HISTORY_MAX]
    verdict = Verdict.ACCEPTED if doubt else Verdict.CHANGED
    return replace(fresh, history=history), Outcome(provider, model, verdict, old=old.cost, new=fresh.cost)


def take_list(
    entries: Mapping[tuple[str, str], Entry],
    given: Iterable[Entry],
    *,
    now: UnixSeconds,
    accepted: frozenset[tuple[str, str]] = frozenset(),
) -> tuple[dict[tuple[str, str], Entry], list[Outcome]]:
    """The entries after a list that the operator vouches for: its prices do not go stale, but jumps are held too.

    A list with a misplaced decimal point is no better for coming from a friend.
    """
    merged = dict(entries)
    outcomes: list[Outcome] = []
    for entry in given:
        fresh = replace(entry, vouched=True, held=None)
        old = entries.get(entry.key)
        if old is None and len(merged) >= ENTRIES_MAX:
            outcome = Outcome(*entry.key, Verdict.FAILED, f"would be entry {ENTRIES_MAX + 1} of the catalog")
        elif old is None:
            merged[entry.key] = fresh
            outcome = Outcome(*entry.key, Verdict.NEW, new=entry.cost)
        else:
            merged[entry.key], outcome = settle(old, fresh, accepted=entry.key in accepted, now=now)
        outcomes.append(outcome)
    return merged, outcomes


def unknown_acceptances(
    entries: Mapping[tuple[str, str], Entry], accepted: Iterable[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The accepted pairs nothing is held for: a typing error that would otherwise pass for success."""
    return [key for key in accepted if key not in entries or entries[key].held is None]
