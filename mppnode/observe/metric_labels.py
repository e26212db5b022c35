"""What a label may say. Every label is a closed set, so the number of series is known before the first request.

A value outside its set is counted as ``other``: a payer's text, a key, an account or a channel can become no series
(reliability: K11, O4). Names of models and providers come from the operator's catalog alone, and only so many of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from channels.credit import CreditReason, FundsKind, Window
from channels.faults import Reason
from channels.intent import IntentKind
from channels.model import Phase
from mppnode.kernel.faults import NodeReason
from mppnode.kernel.strategy import Strategy

OTHER: Final = "other"
"""Every value outside a closed set."""
MODELS_MAX: Final = 40
"""Models with series of their own: each costs about ten, and a panel with more lines than this is not read."""
PROVIDERS_MAX: Final = 20
"""Providers with series of their own: each costs about fifty, as their latencies are histograms."""
_NAME_MAX: Final = 128  # characters; longer than any name of a catalog


class Rail(StrEnum):
    """How a request is paid."""

    SESSION = "session"
    CREDIT = "credit"


class Ending(StrEnum):
    """How a request ended: as streams end in the engine, and ``failed`` when no provider gave any output."""

    COMPLETE = "complete"
    OVERRUN = "overrun"
    UPSTREAM_FAILED = "upstream_failed"
    UNPAID = "unpaid"
    SUPERSEDED = "superseded"
    CLOSED = "closed"
    STALLED = "stalled"
    DISCONNECTED = "disconnected"
    FAILED = "failed"
    REJECTED = "rejected"
    NODE_STOPPED = "node_stopped"


class Outcome(StrEnum):
    """Whose doing the end of a request was."""

    SERVED = "served"
    FAILED = "failed"
    """Ours or the provider's: this is what an availability is computed from."""
    ABANDONED = "abandoned"
    """The payer's: gone, not paying, not reading, or asking for what every provider refused."""


class TokenKind(StrEnum):
    """What tokens were."""

    PROMPT = "prompt"
    CACHED = "cached"
    COMPLETION = "completion"
    REASONING = "reasoning"


class Source(StrEnum):
    """Whose count a bill is made of."""

    REPORTED = "reported"
    TOKENIZER = "tokenizer"
    ESTIMATED = "estimated"


class Asked(StrEnum):
    """How a caller named the model."""

    NAMED = "named"
    SEVERAL = "several"
    AUTO = "auto"


class Excluded(StrEnum):
    """Why a provider was not tried."""

    RAIL = "rail"
    ALLOWED_PROVIDERS = "allowed_providers"
    HEALTH = "health"
    THROTTLED = "throttled"
    REQUIRE_PARAMETERS = "require_parameters"
    CONTEXT_LENGTH = "context_length"
    EXTERNAL = "external"
    PRICE_STALE = "price_stale"
    MAX_PRICE = "max_price"
    QUOTE = "quote"


class AttemptResult(StrEnum):
    """What became of one call of a provider."""

    OK = "ok"
    CONNECT = "connect"
    TIMEOUT = "timeout"
    PROTOCOL = "protocol"
    CLOSED = "closed"
    STATUS = "status"
    ERROR = "error"


class PauseEnd(StrEnum):
    """How a wait for a payer ended."""

    PAID = "paid"
    UNPAID = "unpaid"
    """No voucher came in time."""
    GONE = "gone"


class DisconnectPhase(StrEnum):
    """Where a client was when it went away."""

    BEFORE_OUTPUT = "before_output"
    STREAMING = "streaming"
    PAUSED = "paused"
    AFTER_OUTPUT = "after_output"
    """Everything was delivered but the receipt."""


class TxResult(StrEnum):
    """What became of a transaction of ours."""

    CONFIRMED = "confirmed"
    DEAD = "dead"
    REVERTED = "reverted"


class GasFor(StrEnum):
    """What gas was paid for."""

    SETTLE = "settle"
    CLOSE = "close"
    SPONSOR = "sponsor"


class ChannelMoney(StrEnum):
    """A difference of two amounts, summed over the channels that are not closed."""

    CLAIMABLE = "claimable"
    """Accepted and not settled."""
    EARNED = "earned"
    """Spent and not settled."""
    HEADROOM = "headroom"
    """Accepted and not spent."""
    UNSIGNED = "unsigned"
    """Deposited and not accepted."""


class Limit(StrEnum):
    """What a key or an account ran into."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENCY = "concurrency"
    DAY = Window.DAY.value
    MONTH = Window.MONTH.value
    TOTAL = Window.TOTAL.value


class OutboxKind(StrEnum):
    """What a task of the outbox does."""

    ALERT = "alert"
    RECHARGE = "recharge"
    METER = "meter"
    SUSPENSION = "suspension"


class OutboxState(StrEnum):
    """What has become of a task that is not done."""

    DUE = "due"
    PARKED = "parked"


class OutboxResult(StrEnum):
    """How one attempt at a task ended."""

    DONE = "done"
    AGAIN = "again"
    PARKED = "parked"


class Webhook(StrEnum):
    """What Stripe announced."""

    PAYMENT_SUCCEEDED = "payment_succeeded"
    PAYMENT_FAILED = "payment_failed"
    CARD_SAVED = "card_saved"
    REFUNDED = "refunded"
    REFUND_FAILED = "refund_failed"
    DISPUTE_OPENED = "dispute_opened"
    DISPUTE_WON = "dispute_won"
    DISPUTE_LOST = "dispute_lost"
    INVOICE_PAID = "invoice_paid"
    INVOICE_FAILED = "invoice_failed"
    CUSTOMER_DELETED = "customer_deleted"
    SUBSCRIPTION_ENDED = "subscription_ended"
    METER_ERRORS = "meter_errors"
    IGNORED = "ignored"


class WebhookRefusal(StrEnum):
    """Why a webhook was refused."""

    TOO_LARGE = "too_large"
    NO_SIGNATURE = "no_signature"
    BAD_SIGNATURE = "bad_signature"
    STALE = "stale"
    MALFORMED = "malformed"
    WRONG_MODE = "wrong_mode"
    WRONG_ACCOUNT = "wrong_account"


class StripeResult(StrEnum):
    """How a call to Stripe ended."""

    OK = "ok"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    DECLINED = "declined"
    INVALID = "invalid"
    OUTCOME_UNKNOWN = "outcome_unknown"


class Store(StrEnum):
    """Where the ledger is."""

    SQLITE = "sqlite"
    POSTGRES = "postgres"


@dataclass(frozen=True, slots=True)
class Label:
    """One label: its name and all it may say; a label without ``values`` takes the names of a :class:`Vocabulary`."""

    name: str
    values: tuple[str, ...] = ()
    known: Mapping[str, str] = field(init=False, repr=False, compare=False)
    """Every value, ``other`` among them, by itself as a plain string: members of enums are looked up in it too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", MappingProxyType({value: value for value in (*self.values, OTHER)}))


def _of(name: str, *enums: type[StrEnum]) -> Label:
    return Label(name, tuple(dict.fromkeys(member.value for enum in enums for member in enum)))


MODEL: Final = Label("model")
PROVIDER: Final = Label("provider")
RAIL: Final = _of("rail", Rail)
ENDING: Final = _of("ending", Ending)
OUTCOME: Final = _of("outcome", Outcome)
TOKEN_KIND: Final = _of("kind", TokenKind)
SOURCE: Final = _of("source", Source)
STRATEGY: Final = _of("strategy", Strategy)
ASKED: Final = _of("asked", Asked)
EXCLUDED: Final = _of("reason", Excluded)
ATTEMPT_RESULT: Final = _of("result", AttemptResult)
REFUSAL: Final = _of("reason", NodeReason, Reason, CreditReason)
VOUCHER_REFUSAL: Final = _of("reason", Reason)
HOLD_REFUSAL: Final = Label(
    "reason",
    (
        Reason.INSUFFICIENT_BALANCE.value,
        Reason.CREDENTIAL_USED.value,
        Reason.RATE_LIMITED.value,
        Reason.EXPOSURE_LIMIT.value,
        Reason.CHANNEL_FINALIZED.value,
        Reason.CHANNEL_BUSY.value,
        Reason.CHANNEL_NOT_FOUND.value,
        Reason.STORE_UNAVAILABLE.value,
        NodeReason.CREDIT_TOO_LOW.value,
        NodeReason.CAP_REACHED.value,
        NodeReason.LIMIT_REACHED.value,
        NodeReason.ACCOUNT_SUSPENDED.value,
        NodeReason.KEY_REVOKED.value,
        NodeReason.CONFLICT.value,
    ),
)
"""Only these can refuse a reservation: with all the reasons there are, half the budget of series would be zeros."""
PAUSE_END: Final = _of("ended", PauseEnd)
DISCONNECT_PHASE: Final = _of("phase", DisconnectPhase)
CHANNEL_PHASE: Final = Label("phase", tuple(phase.value for phase in Phase if phase is not Phase.CLOSED))
CHANNEL_MONEY: Final = _of("money", ChannelMoney)
INTENT_KIND: Final = _of("kind", IntentKind)
TX_RESULT: Final = _of("result", TxResult)
GAS_FOR: Final = _of("purpose", GasFor)
FUNDS_KIND: Final = _of("kind", FundsKind)
LIMIT: Final = _of("limit", Limit)
OUTBOX_KIND: Final = _of("kind", OutboxKind)
OUTBOX_STATE: Final = _of("state", OutboxState)
OUTBOX_RESULT: Final = _of("result", OutboxResult)
WEBHOOK: Final = _of("kind", Webhook)
WEBHOOK_REFUSAL: Final = _of("reason", WebhookRefusal)
STRIPE_RESULT: Final = _of("result", StripeResult)
STORE: Final = _of("store", Store)


class Vocabulary:
    """The models and providers that have series of their own: the first so many, in the order they are made known.

    The order is the catalog's, the same in every process. First come, first labelled would suit a long catalog better
    and is wrong: two processes would disagree about who is ``other``, and a counter scraped now from the one, now from
    the other would jump to and fro.
    """

    def __init__(
        self,
        models: Iterable[str] = (),
        providers: Iterable[str] = (),
        *,
        models_max: int = MODELS_MAX,
        providers_max: int = PROVIDERS_MAX,
    ) -> None:
        self._max = {MODEL.name: models_max, PROVIDER.name: providers_max}
        self._known: dict[str, dict[str, str]] = {MODEL.name: {OTHER: OTHER}, PROVIDER.name: {OTHER: OTHER}}
        self.know(models=models, providers=providers)

    def know(self, *, models: Iterable[str] = (), providers: Iterable[str] = ()) -> bool:
        """Add names of a catalog that was read again; a name once known stays, as its counters may not vanish.

        True when a name has become known.
        """
        before = sum(map(len, self._known.values()))
        for label, names in ((MODEL, models), (PROVIDER, providers)):
            for name in names:
                if len(self._known[label.name]) > self._max[label.name]:
                    break  # of ten thousand names, looked through every few seconds, all but the first change nothing
                self.admit(label, name)
        return sum(map(len, self._known.values())) > before

    def admit(self, label: Label, name: str) -> str:
        """The value that stands for ``name``, which is made known while there is room."""
        if label.values:
            return label.known.get(name, OTHER)
        known = self._known[label.name]
        fits = len(known) <= self._max[label.name] and 0 < len(name) <= _NAME_MAX and name.isprintable()
        if fits and name not in known:
            known[str(name)] = str(name)
        return known.get(name, OTHER)

    def names(self, label: Label) -> tuple[str, ...]:
        """The names that have series of their own."""
        return tuple(name for name in self._known[label.name] if name != OTHER)

    def fold(self, label: Label, value: str) -> str:
        """The value that stands for ``value``: itself, or ``other``."""
        known = label.known if label.values else self._known[label.name]
        return known.get(value, OTHER)

    def size(self, label: Label) -> int:
        """How many values the label can ever have, ``other`` included."""
        return (len(label.values) if label.values else self._max[label.name]) + 1
