"""The payer machine's vocabulary: its limits, what it knows, what it hears, what it asks its driver to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeAlias

from channels.descriptor import ChainSnapshot, Descriptor, Escrow
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixMillis
from channels.units import Units
from channels.wire.challenge import Challenge
from channels.wire.receipt import SessionReceipt
from channels.wire.request import SessionRequest
from channels.wire.snapshot import SessionSnapshot
from channels.wire.sse import NeedVoucher

ATTEMPTS_MAX: Final = 3
"""Payments per request; a server that answers each with another 402 is broken or greedy. The reference stops here."""


@dataclass(frozen=True, slots=True)
class PayerPolicy:
    """Limits of one payer; all amounts in base units, and none is ever exceeded by anything signed.

    ``request_cap`` bounds what one request may add to the signed total, ``channel_cap`` the total on one channel,
    ``max_deposit`` what one channel may lock. ``deposit`` and ``top_up`` replace the server's suggestions when given.
    """

    payer: Address
    signer: Address
    escrows: frozenset[Escrow]
    tokens: frozenset[Address]
    request_cap: Units
    channel_cap: Units
    max_deposit: Units
    deposit: Units | None = None
    top_up: Units | None = None

    def __post_init__(self) -> None:
        if self.deposit is not None and self.deposit > self.max_deposit:
            raise ValueError("the chosen deposit exceeds the largest one allowed")


@dataclass(frozen=True, slots=True)
class Counterparty:
    """Whom a channel is with. Two offers that agree on this share one channel."""

    payee: Address
    token: Address
    escrow: Escrow


def counterparty_of(terms: SessionRequest) -> Counterparty:
    """The counterparty an offer names, by which a driver finds the session to hand the challenge to."""
    return Counterparty(terms.recipient, terms.currency, terms.escrow)


class PayerPhase(StrEnum):
    """Where the channel with a counterparty stands."""

    ABSENT = "absent"
    OPENING = "opening"
    RECOVERING = "recovering"
    OPEN = "open"
    CLOSING = "closing"


class Purpose(StrEnum):
    """What a credential in flight is for."""

    OPEN = "open"
    CONTENT = "content"
    VOUCHER = "voucher"
    TOP_UP = "top_up"


class GiveUpReason(StrEnum):
    """Why the machine will not go on with a request."""

    BAD_CHALLENGE = "bad_challenge"
    EXPIRED_CHALLENGE = "expired_challenge"
    FOREIGN_TERMS = "foreign_terms"
    REQUEST_CAP = "request_cap"
    CHANNEL_CAP = "channel_cap"
    DEPOSIT_CAP = "deposit_cap"
    DEPOSIT_EXHAUSTED = "deposit_exhausted"
    TOO_MANY_ATTEMPTS = "too_many_attempts"
    FOREIGN_CHANNEL = "foreign_channel"
    INFLATED_CLAIM = "inflated_claim"
    BAD_RECEIPT = "bad_receipt"
    TOP_UP_FAILED = "top_up_failed"
    OPEN_FAILED = "open_failed"
    CLOSING = "closing"
    NO_CHANNEL = "no_channel"
    CLOSE_REFUSED = "close_refused"


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel whose id we derived from its descriptor ourselves."""

    id: ChannelId
    descriptor: Descriptor
    escrow: Escrow


@dataclass(frozen=True, slots=True)
class InFlight:
    """One request: ``authorised`` is what it added to the most ever signed, ``reserve`` what it may yet use up of it.

    ``floor`` is where a refusal of the latest credential, over ``signed``, returns to.
    """

    authorised: Units = Units(0)
    reserve: Units = Units(0)
    floor: Units = Units(0)
    signed: Units = Units(0)
    attempts: int = 0
    refreshes: int = 0
    challenge_id: str = ""
    pending: Purpose | None = None


@dataclass(frozen=True, slots=True)
class PaymentDue:
    """A challenge to be paid, perhaps later: once the channel is usable or the deposit is larger."""

    request: int
    challenge_id: str
    terms: SessionRequest


@dataclass(frozen=True, slots=True)
class VoucherDue:
    """A mid-stream voucher of at least ``required`` cumulative base units, perhaps once the deposit is larger."""

    request: int
    required: Units


Due: TypeAlias = PaymentDue | VoucherDue


@dataclass(frozen=True, slots=True)
class PayerState:
    """All that is remembered about one counterparty; all amounts in base units.

    ``cumulative`` is what the next voucher builds on; ``signed_max`` is the most ever signed, which is all the server
    can claim. They differ only after a refused payment. ``accepted`` and ``spent`` are the server's checked claims.
    ``reclaimed`` are channels we are taking back: a server may still offer them.
    """

    counterparty: Counterparty
    phase: PayerPhase = PayerPhase.ABSENT
    channel: Channel | None = None
    deposit: Units = Units(0)
    cumulative: Units = Units(0)
    signed_max: Units = Units(0)
    accepted: Units = Units(0)
    spent: Units = Units(0)
    suggested_deposit: Units = Units(0)
    operator: Address | None = None
    opener: int | None = None
    top_up: TopUp | None = None
    close: Close | None = None
    close_attempts: int = 0
    candidate: SessionSnapshot | None = None
    requests: Mapping[int, InFlight] = field(default_factory=dict)
    waiting: tuple[Due, ...] = ()
    reclaimed: frozenset[ChannelId] = frozenset()


# --- what the driver reports ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChallengeSeen:
    """A 402 with a session challenge, whether or not the request had been paid; ``request`` is the driver's number."""

    request: int
    challenge: Challenge
    now: UnixMillis


@dataclass(frozen=True, slots=True)
class OpenPrepared:
    """The opening transaction asked for by :class:`OpenChannel` is signed, but not sent; this is its descriptor."""

    request: int
    descriptor: Descriptor


@dataclass(frozen=True, slots=True)
class OpenAborted:
    """The opening transaction could not be made; nothing was sent anywhere."""

    request: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A credential was answered by anything but a 402 or 410, or not at all: ``ok`` means status 2xx."""

    request: int
    ok: bool
    receipt: SessionReceipt | None = None


@dataclass(frozen=True, slots=True)
class ReceiptSeen:
    """A receipt outside the answer to a credential: the last event of a stream."""

    request: int
    receipt: SessionReceipt


@dataclass(frozen=True, slots=True)
class NeedVoucherSeen:
    """The server asks, mid-stream, for a larger voucher."""

    request: int
    need: NeedVoucher


@dataclass(frozen=True, slots=True)
class TopUpAnswered:
    """A top-up credential was answered by anything but a 402, or not at all: ``ok`` means status 2xx.

    Always report it: other requests may be waiting for the same top-up.
    """

    ok: bool
    receipt: SessionReceipt | None = None


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """The request is over, whatever became of it; its budget is forgotten.

    A payment still unanswered then is not taken back: the server may have accepted it.
    """

    request: int


@dataclass(frozen=True, slots=True)
class ChannelGone:
    """The server answered 410: it does not know the channel, or has closed it. Send the request unpaid again."""

    request: int


@dataclass(frozen=True, slots=True)
class ChannelRead:
    """What the escrow says about the channel a :class:`ReadChannel` named.

    A channel that does not exist reads as a deposit of zero. None means that reading failed.
    """

    chain: ChainSnapshot | None


@dataclass(frozen=True, slots=True)
class CloseRequested:
    """The user wants the channel closed and the rest of the deposit back."""


@dataclass(frozen=True, slots=True)
class CloseAnswered:
    """The close credential with ``challenge_id`` was answered; ``ok`` means status 2xx."""

    ok: bool
    challenge_id: str
    receipt: SessionReceipt | None = None


Input: TypeAlias = (
    ChallengeSeen
    | OpenPrepared
    | OpenAborted
    | Answered
    | ReceiptSeen
    | NeedVoucherSeen
    | TopUpAnswered
    | RequestEnded
    | ChannelGone
    | ChannelRead
    | CloseRequested
    | CloseAnswered
)


# --- what the driver is asked to do --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenChannel:
    """Sign a transaction that opens a channel with ``deposit`` base units; report it with :class:`OpenPrepared`."""

    request: int
    counterparty: Counterparty
    operator: Address
    authorized_signer: Address
    deposit: Units
    fee_payer: bool
    fee_token: Address | None


@dataclass(frozen=True, slots=True)
class SendOpen:
    """Sign the first voucher and repeat the request with an ``open`` credential."""

    request: int
    channel: Channel
    deposit: Units
    cumulative: Units


@dataclass(frozen=True, slots=True)
class SignVoucher:
    """Sign a voucher over ``cumulative``: with the request again (``CONTENT``), or alone beside it (``VOUCHER``)."""

    request: int
    channel: Channel
    cumulative: Units
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class TopUp:
    """Sign a transaction that adds ``additional`` base units to the deposit, and post a ``topUp`` credential."""

    request: int
    channel: Channel
    additional: Units


@dataclass(frozen=True, slots=True)
class ReadChannel:
    """Read the channel from its escrow and report :class:`ChannelRead`.

    ``opening`` means that our own opening transaction may still be on its way: read only once it is included or can no
    longer be, or a channel that appears a moment later is lost with its deposit.
    """

    channel: Channel
    opening: bool


@dataclass(frozen=True, slots=True)
class Close:
    """Sign a voucher over ``cumulative`` and post a ``close`` credential; report :class:`CloseAnswered`."""

    channel: Channel
    cumulative: Units


@dataclass(frozen=True, slots=True)
class Closed:
    """The server has closed the channel in transaction ``tx_hash``, having charged ``spent`` base units in total."""

    channel: Channel
    spent: Units
    tx_hash: Hash32


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Nobody will close this channel for us: unless the escrow says it is closed, ask the escrow for the deposit."""

    channel: Channel


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Stop paying for ``request`` (None: the close the user asked for) and tell the user why."""

    request: int | None
    reason: GiveUpReason


Action: TypeAlias = OpenChannel | SendOpen | SignVoucher | TopUp | ReadChannel | Close | Closed | Reclaim | GiveUp
