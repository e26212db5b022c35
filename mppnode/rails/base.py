"""What rails sell, what the engine needs of them, and what they need from the rooms beside them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from channels.chain import Confirmed
from channels.descriptor import ChainSnapshot, Escrow
from channels.faults import ChannelFault
from channels.ids import ChannelId, Hash32
from channels.instants import UnixMillis, UnixSeconds
from channels.model import Account
from channels.units import Pico, Units
from channels.verify import VerifiedOpen
from channels.wire.credential import OpenPayload, TopUpPayload
from mppnode.kernel.rates import Rates
from mppnode.kernel.requests import ChatRequest
from mppnode.kernel.usage import Usage
from mppnode.pricing.book import QuotedUnit

WHOLE_REQUEST: Final = "request"
"""The ``unitType`` of a challenge whose amount is meant for one response, the reference implementation's word."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What one request would be sold for at most: the models asked for, the rates, the quoted unit, and the route.

    Providers differ in price, and which one serves is decided when the request is paid. So a challenge quotes the
    dearest that may serve, names its rates under its MAC, and nothing above them is ever charged on it.
    """

    route: str
    asked: str
    """The model as the caller wrote it, or several of them in their order."""
    rates: Rates
    unit: QuotedUnit

    def for_the_rest(self, missing: Units) -> Offer:
        """The same request, quoted at what its voucher still lacks: a client that reads no snapshot adds the quoted
        amount to its last voucher, and unit by unit it would give up before a large buffered answer is covered.
        """
        unit = QuotedUnit(self.unit.tokens, WHOLE_REQUEST, missing) if missing > self.unit.amount else self.unit
        return replace(self, unit=unit)

    @property
    def scope(self) -> dict[str, str]:
        """What a challenge binds: a credential for one route or model buys no other, and none beyond these rates."""
        return {"route": self.route, "model": self.asked, "rates": ":".join(str(int(rate)) for rate in self.rates.axes)}


def quoted_rates(scope: Mapping[str, str]) -> Rates:
    """The rates a challenge of ours was issued at.

    Raises:
        ValueError: when it names none, which no challenge does that this node has issued.
    """
    return Rates(*(Pico(int(rate)) for rate in scope.get("rates", "").split(":")))


@dataclass(frozen=True, slots=True)
class Need:
    """What a request needs reserved before its provider is called, in pico: at least ``floor``, ideally ``want``."""

    floor: Pico
    want: Pico
    reserve_pico: int
    token_pico: int
    cap_pico: int
    """The most the request can cost."""
    stream: bool
    """Whether the answer is a stream: a channel has one of those at a time."""
    prompt_pico: int = 0
    """The part that is due before the first token, over-estimated."""


@dataclass(frozen=True, slots=True)
class NeedVoucher:
    """A request for the payer's next voucher. Cumulative base units, all from committed state."""

    channel: ChannelId
    required: Units
    accepted: Units
    deposit: Units


@dataclass(frozen=True, slots=True)
class Facts:
    """What became of a request, for whoever keeps a record of it. Times in milliseconds."""

    request: str
    ending: str
    complete: bool
    stream: bool
    model: str
    provider: str
    strategy: str
    attempts: int
    usage: Usage
    token_source: str
    first_ms: int | None
    duration_ms: int


class Tab(Protocol):
    """The running bill of one request, backed by a durable hold; every rail has its own."""

    on_change: Callable[[], None]
    """Called when :meth:`cover` may answer otherwise than before."""
    delivered: Callable[[], int]
    """Says how many pico of what was covered have left this process."""

    @property
    def windowed(self) -> bool:
        """Whether more than ``granted`` can come, window by window; otherwise the answer must fit into it."""
        ...

    @property
    def granted(self) -> int:
        """Pico that are held for this request."""
        ...

    @property
    def cap_pico(self) -> int:
        """The most this request may cost."""
        ...

    @property
    def window_pico_max(self) -> int:
        """Most that may be written and not yet recorded: what the node can lose of a stream, in pico."""
        ...

    @property
    def starved(self) -> bool:
        """Whether it is the payer everybody waits for."""
        ...

    @property
    def ended(self) -> ChannelFault | None:
        """Why this tab can never cover more, or None."""
        ...

    def narrow(self, *, token_pico: int, reserve_pico: int, cap_pico: int) -> None:
        """Go on with the prices of the provider that serves; every figure is at most what the tab was opened with."""
        ...

    def cover(self, total: int) -> bool:
        """Charge up to ``total`` pico for this request if that is allowed; no I/O, no lock."""
        ...

    def ask(self) -> NeedVoucher | None:
        """The voucher to ask the payer for now, if any."""
        ...

    @property
    def recorded(self) -> Pico:
        """What is in the ledger as charged for this request, whatever becomes of its process."""
        ...

    async def settle(self, total: Pico, facts: Facts) -> None:
        """Charge exactly ``total`` pico for the whole request, release the hold, and record what became of it.

        When somebody else has released the hold meanwhile, what was ``recorded`` then is the bill.

        Raises:
            ChannelFault: ``STORE_UNAVAILABLE`` when nothing could be recorded.
        """
        ...

    def receipt_frame(self, now: UnixMillis, tokens: int) -> bytes:
        """The event with the payer's receipt at the end of a stream; empty on rails that have none."""
        ...

    def logged(self) -> dict[str, int | str]:
        """What a log line says of the payer: nothing secret."""
        ...


class Purchase(Protocol):
    """A request whose payer is known: how its bill is opened, and who is told when it ends. Opened once."""

    rail: str
    """How it is paid, as metrics and logs call it."""

    async def open(self, need: Need, chat: ChatRequest, request: str) -> Tab:
        """Reserve for a request. Raises ``ChannelFault`` or ``NodeFault`` when that is refused."""
        ...

    def on_supersede(self, tab: Tab, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Say how the request is ended from outside: ``end`` returns when its bill is settled."""
        ...

    def done(self, tab: Tab) -> None:
        """Forget a request whose bill is settled."""
        ...


class ChainIntents(Protocol):
    """Everything that signs, broadcasts or reads; implemented by ``treasury`` (design D14).

    Every method raises ``ChannelFault``: ``CHAIN_REJECTED`` and ``TRANSACTION_REJECTED`` are the payer's,
    ``CHAIN_UNAVAILABLE`` means surely nothing happened, ``CHAIN_OUTCOME_UNKNOWN`` that something may have.
    """

    def inspect_open(self, escrow: Escrow, payload: OpenPayload) -> VerifiedOpen:
        """Check an open as far as it can be checked without the chain."""
        ...

    @property
    def sponsoring(self) -> bool:
        """Whether v2 challenges should offer to pay the payer's fees just now."""
        ...

    async def open(
        self, escrow: Escrow, payload: OpenPayload, opened: VerifiedOpen, *, expires: UnixSeconds
    ) -> Confirmed:
        """Broadcast an inspected open once and wait for it; ``expires`` is the end of the challenge it answers."""
        ...

    async def top_up(self, account: Account, payload: TopUpPayload, *, expires: UnixSeconds) -> Confirmed:
        """Check, broadcast and confirm a top-up of a channel."""
        ...

    async def observe(self, account: Account) -> ChainSnapshot:
        """Read what the escrow says about a channel now."""
        ...


class Closes(Protocol):
    """Brings channels to their end; implemented by ``treasury``."""

    def closing(self, channel: ChannelId) -> AbstractAsyncContextManager[None]:
        """One close of a channel at a time."""
        ...

    async def finish(self, channel: ChannelId, *, first: bool) -> tuple[Account, Hash32]:
        """Bring a CLOSING or CAPTURED channel to its end, inside :meth:`closing`; refused at ``first`` it reopens."""
        ...

    def later(self, channel: ChannelId) -> None:
        """Go on with a close in the background."""
        ...
