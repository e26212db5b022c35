"""The words of the account machine: its state, the commands it hears and the events it writes.

``channels/account.py`` holds every transition; this file only names things. Amounts are base units unless a name
ends in ``pico``. Commands are imperative and say from which phase to which; events are past tense and absolute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Generic, NewType, TypeVar

from channels.descriptor import ChainSnapshot, Descriptor, Escrow, SessionProtocol
from channels.ids import ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.units import PICO_PER_UNIT, Pico, Units

HoldId = NewType("HoldId", str)
NodeId = NewType("NodeId", str)
"""One life of one node process. A process that starts again, or that was fenced, gets a new one."""
R = TypeVar("R")

NOBODY: Final = NodeId("")
"""The owner of holds that were written before holds had owners."""

TOP_UPS_MAX: Final = 32
"""Top-up credentials remembered for replay: a 25 s transaction validity makes older repeats impossible."""


_NEVER: Final = UnixSeconds(0)


class Phase(StrEnum):
    """Where a channel is in its life."""

    OPEN = "open"
    CONTESTED = "contested"
    """The payer asked the chain to close: nothing new is accepted, but what was delivered is still charged."""
    CLOSING = "closing"
    """We are closing: no vouchers and no new holds; live holds still fold."""
    CAPTURED = "captured"
    """The amount to capture is fixed and may be signed; folding is refused from here on."""
    SUSPECT = "suspect"
    """Chain and books contradict each other (a lost top-up, a capture above what was spent): only people proceed."""
    CLOSED = "closed"
    """Final. A closed id is a tombstone for ever."""


@dataclass(frozen=True, slots=True)
class Voucher:
    """One rung of the ladder: a cumulative permission and its canonical 65-byte signature."""

    cumulative: Units
    signature: bytes


@dataclass(frozen=True, slots=True)
class Hold:
    """A durable reservation of one live request. Both numbers are absolute, so a repeated fold changes nothing."""

    granted: Pico
    consumed: Pico
    owner: NodeId = NOBODY
    """Whose request it is. When that life of a node has ended, anybody may release the hold."""
    stream: bool = True
    """Whether the request is a stream: a channel has one of those at a time."""
    ending: bool = False
    """A newer stream waits for this one: it is not extended any more."""

    @property
    def open(self) -> int:
        """Reserved and not yet charged, in pico."""
        return self.granted - self.consumed


@dataclass(frozen=True, slots=True)
class CloseRecord:
    """How a channel ended: the credential that asked, what we captured, and the transaction that did it."""

    challenge_id: str
    cumulative: Units
    capture: Units | None = None
    tx_hash: Hash32 | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """Everything the node knows about one channel. Amounts: units unless named pico."""

    id: ChannelId
    escrow: Escrow
    descriptor: Descriptor
    phase: Phase
    version: int
    chain: ChainSnapshot
    ladder: tuple[Voucher, ...]
    owed_pico: int
    spent: Units
    holds: Mapping[HoldId, Hold]
    tickets: Mapping[str, UnixSeconds] = field(default_factory=lambda: MappingProxyType({}))
    top_ups: tuple[tuple[Hash32, Hash32], ...] = ()
    close: CloseRecord | None = None
    active_at: UnixSeconds = _NEVER
    """When the last request began; zero before the first."""

    @property
    def accepted(self) -> Units:
        """The highest voucher we hold."""
        return self.ladder[-1].cumulative

    @property
    def held_pico(self) -> int:
        """Reserved by live requests, not yet charged."""
        return sum(hold.open for hold in self.holds.values())

    @property
    def headroom_pico(self) -> int:
        """What may still be reserved: accepted - owed - held. Never negative."""
        return self.accepted * PICO_PER_UNIT - self.owed_pico - self.held_pico

    @property
    def streams(self) -> tuple[HoldId, ...]:
        """The holds of live streams."""
        return tuple(name for name, hold in self.holds.items() if hold.stream)

    @property
    def final(self) -> Units:
        """Charged by requests that have ended: unlike ``spent`` it can never turn out to have been too much.

        A live stream is charged by our own count, and the provider's report at its end may give some of it back. Money
        the chain has paid out cannot be given back, so settlement stops here.
        """
        return Units((self.owed_pico - sum(hold.consumed for hold in self.holds.values())) // PICO_PER_UNIT)

    @property
    def settleable(self) -> Units:
        """What a settlement may bring the chain's total to: the greatest rung not above ``final``."""
        final = self.final
        rungs = (rung.cumulative for rung in self.ladder if rung.cumulative <= final)
        return Units(max(self.chain.settled, *rungs, 0))

    @property
    def unsettled(self) -> Units:
        """Earned and not yet paid out on chain."""
        return Units(max(self.capturable - self.chain.settled, 0))

    @property
    def capturable(self) -> Units:
        """What the chain may be asked to pay in total: consumption, never permission.

        ``owed`` may have fallen below ``spent`` through a credit; the credit belongs to the payer. The v1 escrow pays
        a voucher in full, so there it is the greatest rung that is not above consumption.
        """
        earned = min(self.spent, self.owed_pico // PICO_PER_UNIT)
        if self.escrow.protocol is SessionProtocol.V1:
            earned = max((rung.cumulative for rung in self.ladder if rung.cumulative <= earned), default=0)
        return Units(max(earned, self.chain.settled))


# --------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Open:
    """none -> OPEN. A verified open whose transaction the chain has confirmed."""

    id: ChannelId
    escrow: Escrow
    descriptor: Descriptor
    chain: ChainSnapshot
    voucher: Voucher


@dataclass(frozen=True, slots=True)
class AcceptVoucher:
    """OPEN -> OPEN. A voucher whose signature has been verified."""

    voucher: Voucher


@dataclass(frozen=True, slots=True)
class RecordTopUp:
    """OPEN | CONTESTED -> OPEN. A confirmed top-up; ``credential`` identifies a repeat of the same request."""

    credential: Hash32
    tx_hash: Hash32
    chain: ChainSnapshot


@dataclass(frozen=True, slots=True)
class Reserve:
    """OPEN -> OPEN. Start a request: spend the content ticket and hold between ``floor`` and ``want`` pico."""

    hold: HoldId
    ticket: str
    ticket_expires: UnixSeconds
    floor: Pico
    want: Pico
    preempt: bool = True
    """Release the hold of an older stream without its owner's word: it is charged what was recorded, and no more."""
    owner: NodeId = NOBODY
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Renew:
    """OPEN | CONTESTED | CLOSING, phase unchanged. Fold ``consumed`` and extend the hold towards ``want`` pico."""

    hold: HoldId
    consumed: Pico
    want: Pico


@dataclass(frozen=True, slots=True)
class Finish:
    """OPEN | CONTESTED | CLOSING, phase unchanged. Charge the exact ``total`` of a request and release its hold.

    ``total`` below what was folded gives credit; above the hold it is charged from headroom, and the rest is the tail.
    """

    hold: HoldId
    total: Pico


@dataclass(frozen=True, slots=True)
class EndStreams:
    """OPEN -> OPEN. Ask the owners of live streams to end them: they bill exactly, which only they can do."""


@dataclass(frozen=True, slots=True)
class ReleaseOrphans:
    """Any phase but CAPTURED and CLOSED. Drop holds whose owner is gone, charging only what was recorded.

    ``owner`` limits it to the holds of one life of a node; without it every hold goes. Safe even when the owner is
    alive after all: its next renewal is refused, and until then it can deliver no more than it already held.
    """

    owner: NodeId | None = None


@dataclass(frozen=True, slots=True)
class ObserveChain:
    """Any phase but CLOSED. Replace the cached chain facts by newer ones; OPEN <-> CONTESTED, or -> SUSPECT, CLOSED.

    A contradiction makes a closing channel SUSPECT too; when it is resolved the close goes on where it was.
    """

    chain: ChainSnapshot


@dataclass(frozen=True, slots=True)
class BeginClose:
    """OPEN | CONTESTED -> CLOSING. A verified close credential, or the node's own wish (its own highest voucher)."""

    challenge_id: str
    voucher: Voucher | None


@dataclass(frozen=True, slots=True)
class FixCapture:
    """CLOSING -> CAPTURED. Every hold has ended; from here the captured amount cannot change."""


@dataclass(frozen=True, slots=True)
class AbortClose:
    """CLOSING | CAPTURED -> OPEN | CONTESTED. Only when the closing transaction provably can never be included."""


@dataclass(frozen=True, slots=True)
class ConfirmClosed:
    """CAPTURED -> CLOSED. The chain confirmed our close. A watcher may have seen the end before its receipt came."""

    tx_hash: Hash32
    chain: ChainSnapshot


@dataclass(frozen=True, slots=True)
class Restore:
    """Any phase but CLOSED. Bring an account from an old backup up to date: newer vouchers, and the chain's word.

    What the chain has paid out was consumed before the backup's tail was lost (nothing else is ever settled), so
    ``owed`` rises to it. For people, never for requests.
    """

    chain: ChainSnapshot
    vouchers: tuple[Voucher, ...]


Command = (
    Open
    | AcceptVoucher
    | RecordTopUp
    | Reserve
    | Renew
    | Finish
    | EndStreams
    | ReleaseOrphans
    | ObserveChain
    | BeginClose
    | FixCapture
    | AbortClose
    | ConfirmClosed
    | Restore
)

# ----------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Opened:
    """The channel exists."""

    account: Account


@dataclass(frozen=True, slots=True)
class VoucherAccepted:
    """The ladder gained a rung; ``ladder`` is the whole ladder after thinning."""

    ladder: tuple[Voucher, ...]


@dataclass(frozen=True, slots=True)
class ToppedUp:
    """A top-up was recorded."""

    credential: Hash32
    tx_hash: Hash32


@dataclass(frozen=True, slots=True)
class ChainObserved:
    """The cached chain facts were replaced, and with them perhaps the phase."""

    chain: ChainSnapshot
    phase: Phase


@dataclass(frozen=True, slots=True)
class Held:
    """A request got its first hold and used its ticket; expired tickets are forgotten."""

    hold: HoldId
    granted: Pico
    ticket: str
    ticket_expires: UnixSeconds
    now: UnixSeconds
    owner: NodeId = NOBODY
    stream: bool = True


@dataclass(frozen=True, slots=True)
class EndAsked:
    """The owners of these holds were asked to end them."""

    holds: tuple[HoldId, ...]


@dataclass(frozen=True, slots=True)
class Folded:
    """A hold's absolute numbers moved; ``owed`` moves by the difference of ``consumed``."""

    hold: HoldId
    consumed: Pico
    granted: Pico


@dataclass(frozen=True, slots=True)
class Released:
    """A hold ended; what was not consumed is headroom again."""

    hold: HoldId


@dataclass(frozen=True, slots=True)
class CloseBegun:
    """The node will close this channel."""

    record: CloseRecord


@dataclass(frozen=True, slots=True)
class CaptureFixed:
    """The amount the chain will be asked to pay in total is fixed."""

    capture: Units


@dataclass(frozen=True, slots=True)
class CloseAborted:
    """The close never happened and never can; the channel is usable again."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The chain confirmed the end."""

    tx_hash: Hash32
    chain: ChainSnapshot


@dataclass(frozen=True, slots=True)
class Restored:
    """An account from an old backup was brought up to date."""

    chain: ChainSnapshot
    ladder: tuple[Voucher, ...]
    owed_pico: int
    phase: Phase
    close: CloseRecord | None


Event = (
    Opened
    | VoucherAccepted
    | ToppedUp
    | ChainObserved
    | Held
    | EndAsked
    | Folded
    | Released
    | CloseBegun
    | CaptureFixed
    | CloseAborted
    | Closed
    | Restored
)


@dataclass(frozen=True, slots=True)
class Plan(Generic[R]):
    """What a command would do. ``events == ()`` means there is nothing to write and the answer is a replay."""

    account: Account
    events: tuple[Event, ...]
    result: R


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to a command. ``granted`` and ``unpaid`` are pico; ``replayed`` says nothing changed."""

    replayed: bool = False
    granted: Pico = Pico(0)
    unpaid: Pico = Pico(0)
    tx_hash: Hash32 | None = None
