"""From what was said, by whom, to one complete wish: request before key and account before node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeVar

from channels.instants import UnixSeconds
from mppnode.kernel.clock import Clock
from mppnode.kernel.listing import Ability
from mppnode.kernel.rates import Rates
from mppnode.kernel.strategy import PriceCeiling, Strategy
from mppnode.kernel.wishes import Sort, Wishes

_T = TypeVar("_T")
_NOTHING: Final = Ability(0)
_PICO_PER_CENT: Final = 10_000  # one cent per million tokens, in pico-dollars per token


class Moment(NamedTuple):
    """One point in time on both clocks: cool-downs are measured, the age of a price is told."""

    monotonic: float
    wall: UnixSeconds

    @staticmethod
    def of(clock: Clock) -> Moment:
        """Both readings of a clock."""
        return Moment(clock.monotonic(), clock.now())


class Preferences(Protocol):
    """What somebody wants who is not asking just now: a key, an account, the operator. None is no opinion."""

    @property
    def strategy(self) -> Strategy | None: ...

    @property
    def allow_external(self) -> bool | None: ...

    @property
    def ceiling(self) -> PriceCeiling | None: ...


@dataclass(frozen=True, slots=True)
class Defaults:
    """Preferences as plain values."""

    strategy: Strategy | None = None
    allow_external: bool | None = None
    ceiling: PriceCeiling | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """Everything a decision depends on besides the providers. Prices in pico-dollars per token, inclusive."""

    models: tuple[str, ...]
    strategy: Strategy = Strategy.BALANCED
    allow_external: bool = True
    max_prompt_price: int | None = None
    max_completion_price: int | None = None
    needs: Ability = _NOTHING
    prompt_tokens: int = 0
    max_tokens: int = 1
    """Of each choice."""
    elastic: bool = False
    """Whether an answer may be as short as the context leaves room for."""
    order: tuple[str, ...] = ()
    only: frozenset[str] | None = None
    ignore: frozenset[str] = frozenset()
    barred: frozenset[str] = frozenset()
    """Providers that do not take this payer's rail."""
    sort: Sort | None = None
    allow_fallbacks: bool = True
    require_parameters: bool = False
    affinity: bytes | None = None
    bound: Rates | None = None
    """What a signed challenge quoted: nobody who is dearer on any axis may serve what was paid for at that quote."""


def plan(
    wishes: Wishes,
    defaults: Sequence[Preferences],
    *,
    needs: Ability,
    prompt_tokens: int,
    max_tokens: int,
    elastic: bool = False,
    affinity: bytes | None = None,
    bound: Rates | None = None,
    barred: frozenset[str] = frozenset(),
) -> Wish:
    """Merge a request with its defaults, the most specific first: key, account, node.

    The first who says something decides, except for ceilings: each is a promise to whoever set it, so the least of
    all holds on each axis (market rule R4).
    """
    implied = wishes.sort.strategy if wishes.sort is not None else None
    strategy = wishes.strategy or implied or _first(each.strategy for each in defaults) or Strategy.BALANCED
    external = wishes.allow_external
    if external is None:
        external = _first(each.allow_external for each in defaults)
    ceilings = [each for each in (wishes.ceiling, *(each.ceiling for each in defaults)) if each is not None]
    return Wish(
        models=wishes.models,
        strategy=strategy,
        # The cheapest is looked for at home: an external provider's price is not ours to promise.
        allow_external=strategy is not Strategy.CHEAPEST if external is None else external,
        max_prompt_price=_least(wishes.max_prompt_price, (each.input_cents for each in ceilings)),
        max_completion_price=_least(wishes.max_completion_price, (each.output_cents for each in ceilings)),
        needs=needs,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        elastic=elastic,
        order=wishes.order,
        only=None if wishes.only is None else frozenset(wishes.only),
        ignore=frozenset(wishes.ignore),
        barred=barred,
        sort=wishes.sort,
        allow_fallbacks=wishes.allow_fallbacks is not False,
        require_parameters=wishes.require_parameters is True,
        affinity=affinity,
        bound=bound,
    )


def _first(given: Iterable[_T | None]) -> _T | None:
    return next((value for value in given if value is not None), None)


def _least(pico: int | None, cents: Iterable[int]) -> int | None:
    given = [each * _PICO_PER_CENT for each in cents]
    if pico is not None:
        given.append(int(pico))
    return min(given, default=None)
