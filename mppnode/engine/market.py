"""What a request may buy and from whom: the catalog, the router and the providers' addresses behind one door."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Final, Protocol

from channels.faults import ChannelFault, Reason
from channels.units import Pico
from mppnode.engine.attempts import Endpoint, Watch
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Listing
from mppnode.kernel.rates import Rates
from mppnode.kernel.requests import ChatRequest, Role
from mppnode.kernel.strategy import Strategy
from mppnode.kernel.wishes import Optimize
from mppnode.metering.tally import media_tokens_held
from mppnode.pricing.book import usual_unit
from mppnode.pricing.catalog import Catalog
from mppnode.rails.base import Offer
from mppnode.routing.affinity import affinity_key
from mppnode.routing.breaker import Standing
from mppnode.routing.decision import bound_of
from mppnode.routing.health import PermitWatch
from mppnode.routing.plan import Moment, Preferences, Wish, plan
from mppnode.routing.router import Router

_BYTES_PER_TOKEN: Final = 4  # of English prose and of code
_ASKED_MAX: Final = 512  # characters of the models in a challenge: header space is dear


class Readiness(IntEnum):
    """Whether a listing could be used now; the least is the best."""

    READY = 0
    LOADING = 1
    """It failed, and is about to be tried again."""
    UNAVAILABLE = 2


_READINESS: Final[Mapping[Standing, Readiness]] = MappingProxyType(
    {
        Standing.STEADY: Readiness.READY,
        Standing.SHAKY: Readiness.READY,
        Standing.PROBE: Readiness.LOADING,
        Standing.THROTTLED: Readiness.UNAVAILABLE,
        Standing.OPEN: Readiness.UNAVAILABLE,
    }
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Models the node chose for ``model: "auto"``, best first, and what it tells the caller about the choice."""

    models: tuple[str, ...]
    decision: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Caller:
    """What is known of whoever asks, beyond the request itself."""

    payer: bytes = b""
    """Names the payer, for the affinity of conversations; empty is nobody in particular."""
    bound: Rates | None = None
    """What a signed challenge quoted: nothing above it is charged."""
    defaults: tuple[Preferences, ...] = ()
    """Of the caller's key and account, the most specific first; the node's own come after them."""
    pools: tuple[tuple[str, ...], ...] = ()
    """The only models the caller may use: each list is a limit of its own, the most specific first."""
    optimize: Optimize | None = None

    def may_use(self, model: str) -> bool:
        """Whether no pool leaves this model out."""
        return all(model in pool for pool in self.pools)


STRANGER: Final = Caller()


class Chooser(Protocol):
    """Chooses models by what a prompt asks for."""

    def choose(self, chat: ChatRequest, caller: Caller) -> Chosen | None:
        """The models to try, at most as dear as was quoted, or None when the caller has named one.

        Raises:
            NodeFault: ``INVALID_FIELD``, ``UNKNOWN_MODEL`` or ``NO_PROVIDER``.
        """
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """Who is to serve a request, in order, and the most it may cost."""

    wish: Wish
    chain: tuple[Listing, ...]
    bound: Rates
    """No provider that may be tried is dearer than this on any axis."""
    able: int
    """How many could serve it, whether or not they work just now."""
    max_output: int
    """Tokens of one choice, at whoever allows the most of them."""
    strategy: Strategy
    rule: str
    endpoints: Mapping[str, Endpoint]
    """Where providers were when this was decided: a request keeps what it began with when the market changes."""
    decision: Mapping[str, Any] | None = None
    """What is told about the choice of a model, when the node made it."""
    excluded: Mapping[str, int] = field(default_factory=dict)
    """How many were left out, by reason."""


@dataclass(frozen=True, slots=True)
class Quote:
    """A route and the most a request on it can cost, in pico-dollars."""

    route: Route
    cost_max: Pico


@dataclass(slots=True)
class Market:
    """Everything on sale. It decides nothing itself: prices are the catalog's and choices the router's.

    What it is made of may be exchanged, all at once, while requests run; those keep the :class:`Route` they have.
    """

    router: Router
    endpoints: Mapping[str, Endpoint]
    catalog: Callable[[], Catalog]
    """What is on sale at this moment; the first model is what a request without a body is quoted for."""
    clock: Clock
    defaults: Sequence[Preferences] = ()
    chooser: Chooser | None = None

    def offer(self, route: str, chat: ChatRequest | None) -> Offer:
        """What a request is sold for at most; without one, what a usual request on this route is.

        Raises:
            NodeFault: ``UNKNOWN_MODEL``, or ``NO_PROVIDER`` when nobody could ever serve it as it is asked.
        """
        if chat is None:
            models = self.catalog().models()
            if not models:
                raise NodeFault(NodeReason.NO_PROVIDER, detail="no model has a price")
            asked = models[0]
            wish = Wish((asked,))
        else:
            wish, _ = self._wish(chat, STRANGER)
            asked = _asked(chat)
        rates = bound_of(self._able(wish))
        return Offer(route, asked, rates, usual_unit(rates))

    def route(self, chat: ChatRequest, caller: Caller) -> Route:
        """Decide who serves a request, within what its challenge has quoted and its key allows.

        Raises:
            ChannelFault: ``INVALID_CHALLENGE`` when somebody could serve it, but not at the quoted rates.
            NodeFault: as :meth:`Router.decide`, or ``MODEL_FORBIDDEN``.
        """
        bound = caller.bound
        wish, decision = self._wish(chat, caller)
        now = Moment.of(self.clock)
        able = self._able(wish)
        if bound is not None:
            able = tuple(listing for listing in able if listing.rates.within(bound))
        try:
            decided = self.router.decide(wish, now=now)
        except NodeFault as fault:
            if bound is None or not (fault.excluded or {}).get("quote"):
                raise
            # Whoever still sells at the quote is down or gone. Others may be up: a fresh quote is better than none.
            raise ChannelFault(
                Reason.INVALID_CHALLENGE, field="opaque", detail="quotes a price at which nobody serves now"
            ) from None
        return Route(
            wish=wish,
            chain=decided.chain,
            bound=bound_of(able),
            able=len(able),
            max_output=max(listing.max_output for listing in able),
            strategy=decided.strategy,
            rule=decided.rule,
            endpoints=self.endpoints,
            decision=decision,
            excluded=decided.excluded,
        )

    def watch(self, listing: Listing, *, streamed: bool) -> Watch | None:
        """Leave to try a provider, and whom to tell how it went; None when it is not to be tried just now."""
        permit = self.router.health.admit(listing, self.clock.monotonic())
        return None if permit is None else PermitWatch(permit, self.clock, streamed=streamed)

    def readiness(self, listing: Listing) -> Readiness:
        """Whether a provider could be asked for this model now."""
        if not self.sellable(listing):
            return Readiness.UNAVAILABLE
        key = (listing.provider, listing.model)
        return _READINESS[self.router.health.standing(key, self.clock.monotonic())]

    def sellable(self, listing: Listing) -> bool:
        """Whether its price is recent enough to be sold at."""
        return not self.catalog().stale(listing, self.clock.now())

    def served(self, route: Route, listing: Listing) -> None:
        """Remember who answered a conversation."""
        self.router.served(route.wish, listing, Moment.of(self.clock))

    def _able(self, wish: Wish) -> tuple[Listing, ...]:
        try:
            return self.router.eligible(wish, Moment.of(self.clock))
        except NodeFault as fault:
            if fault.excluded is None or set(fault.excluded) != {"context_length"}:
                raise
            # It will be too long tomorrow too: not the provider's refusal, which clients retry, but the caller's.
            detail = "is longer, with max_tokens, than the context of every provider of this model"
            raise NodeFault(NodeReason.INVALID_FIELD, field="messages", detail=detail) from None

    def _wish(self, chat: ChatRequest, caller: Caller) -> tuple[Wish, Mapping[str, Any] | None]:
        chosen = None if self.chooser is None else self.chooser.choose(chat, caller)
        if chosen is None:
            _require_allowed(chat.wishes.models, "model", caller)
        wish = plan(
            chat.wishes if chosen is None else replace(chat.wishes, models=chosen.models),
            (*caller.defaults, *self.defaults),
            needs=chat.needs,
            # The likely length, not the longest possible: who finds it too long after all is asked before anybody pays.
            prompt_tokens=chat.prompt_bytes // _BYTES_PER_TOKEN + media_tokens_held(chat.images, chat.audio_bytes),
            max_tokens=chat.max_tokens,
            elastic=not chat.limited,
            affinity=affinity_key(caller.payer, cache_key=chat.wishes.cache_key, opening=_opening(chat)),
            bound=caller.bound,
        )
        return wish, None if chosen is None else chosen.decision


def _require_allowed(models: Sequence[str], field: str, caller: Caller) -> None:
    for model in models:
        if not caller.may_use(model):
            raise NodeFault(NodeReason.MODEL_FORBIDDEN, field=field, detail="is not in the model pool of this key")


def _opening(chat: ChatRequest) -> list[str]:
    """The system's words and the user's first: what later turns of a conversation repeat."""
    texts: list[str] = []
    for message in chat.messages:
        texts.append(message.text)
        if message.role is Role.USER:
            break
    return texts


def _asked(chat: ChatRequest) -> str:
    """The models as the caller wrote them. A challenge for one of them buys no other."""
    asked = ",".join(chat.wishes.models)
    if len(asked) > _ASKED_MAX:
        raise NodeFault(NodeReason.INVALID_FIELD, field="models", detail=f"is longer than {_ASKED_MAX} characters")
    return asked
