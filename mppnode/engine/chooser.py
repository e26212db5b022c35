"""``model: "auto"``: what a prompt asks for decides which models are tried, and the caller is told why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from mppnode.engine.market import Caller, Chosen
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Listing
from mppnode.kernel.requests import ChatRequest
from mppnode.kernel.wishes import Optimize
from mppnode.pricing.catalog import Catalog
from mppnode.routing.auto import Candidate, answer_tokens, choose, pool_of
from mppnode.routing.classify import Reading, classify
from mppnode.routing.health import Health
from mppnode.routing.plan import Preferences, Wish, plan

AUTO: Final = "auto"
_MS: Final = 1000
_POOL_MAX: Final = 200  # scored for everybody who asks, paid or not: some 3 us each; a larger catalog needs a pool


class AutoChooser:
    """Chooses among the models of a pool; implements :class:`mppnode.engine.market.Chooser`."""

    def __init__(
        self,
        catalog: Callable[[], Catalog],
        *,
        health: Health,
        clock: Clock,
        defaults: Sequence[Preferences],
        pool: tuple[str, ...] = (),
        optimize: Optimize = Optimize.BALANCED,
    ) -> None:
        """``pool`` and ``optimize`` are the node's own; an empty pool is everything on sale."""
        self._catalog = catalog
        self._health = health
        self._clock = clock
        self._defaults = defaults
        self._pool = pool
        self._optimize = optimize

    def choose(self, chat: ChatRequest, caller: Caller) -> Chosen | None:
        """The best models for a prompt, or None when the caller has named one. Raises as ``Chooser.choose``."""
        wishes = chat.wishes
        if wishes.models[0] != AUTO:
            return None
        begun = self._clock.monotonic()
        catalog = self._catalog()
        reading = classify(chat.messages, needs=chat.needs, prompt_bytes=chat.prompt_bytes, task=wishes.task)
        pool = self._pool_for(wishes.pool, caller, catalog)
        defaults = (*caller.defaults, *self._defaults)
        wish = replace(
            plan(wishes, defaults, needs=chat.needs, prompt_tokens=0, max_tokens=1), bound=caller.bound
        )
        candidates = [each for model in pool if (each := self._candidate(catalog, model, reading, chat, wish))]
        if not candidates:
            raise NodeFault(
                NodeReason.NO_PROVIDER,
                field="model",
                detail="is auto, and no model of the pool has a provider at this price",
                excluded={"max_price": len(pool)},
            )
        optimize = wishes.optimize or caller.optimize or self._optimize
        choice = choose(reading, candidates, optimize, max_tokens=chat.max_tokens, needs=chat.needs)
        took = round((self._clock.monotonic() - begun) * _MS, 3)
        return Chosen(choice.models, choice.decision(took))

    def _pool_for(self, asked: tuple[str, ...] | None, caller: Caller, catalog: Catalog) -> tuple[str, ...]:
        """What to choose from: never more than the caller's key and account allow."""
        for model in asked or ():
            if not caller.may_use(model):
                raise NodeFault(
                    NodeReason.MODEL_FORBIDDEN, field="routing.model_pool", detail="names a model the key may not use"
                )
        # A pool is all its owner wants, so the first 200 models of the catalog are no limit to it.
        on_sale = catalog.models() if caller.pools else catalog.models()[:_POOL_MAX]
        allowed = [model for model in on_sale if caller.may_use(model)][:_POOL_MAX]
        defaults = (None if caller.pools else self._pool or None,)
        return pool_of(asked, defaults, on_sale=allowed, lookup=catalog.listings)

    def _candidate(
        self, catalog: Catalog, model: str, reading: Reading, chat: ChatRequest, wish: Wish
    ) -> Candidate | None:
        """A model as good as its cheapest seller who may serve; None without one."""
        now, wall = self._clock.monotonic(), self._clock.now()
        able = [each for each in catalog.listings(model) if not catalog.stale(each, wall) and _allowed(each, wish)]
        if not able:
            return None
        best = min(able, key=lambda each: each.combined)
        answer = answer_tokens(reading, chat.max_tokens)
        rates = best.rates
        speed = self._health.speed((best.provider, model), now)
        return Candidate(
            model=model,
            quality=max(each.quality for each in able),
            cost=reading.prompt_tokens * rates.input + answer * rates.output + rates.request,
            abilities=best.abilities,
            context=max(each.context for each in able),
            first_s=None if speed is None else speed.first_s,
            tokens_per_s=None if speed is None else speed.tokens_per_s,
        )


def _allowed(listing: Listing, wish: Wish) -> bool:
    """Whether a seller is within what the caller pays and was quoted; everything else the router judges."""
    rates = listing.rates
    return (
        (wish.max_prompt_price is None or rates.input_max <= wish.max_prompt_price)
        and (wish.max_completion_price is None or rates.output_max <= wish.max_completion_price)
        and (wish.bound is None or rates.within(wish.bound))
    )
