"""A transaction of ours, from the wish to the proof: persisted before it is signed, and again before it is sent.

``PLANNED -> SIGNED -> SENT -> MINED -> FINAL`` is the good way. ``SENT`` means "may be on its way": it is written
*before* the bytes leave, so after a crash the node knows which bytes may exist and sends the same ones again. Two ends
are bad: ``DEAD``, the validity passed at a final block and there is no receipt, and ``REVERTED``. An unknown outcome is
not an end: the intent stays ``SENT`` until the chain has answered, and no second transaction is signed meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from channels.ids import ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.model import NodeId
from channels.units import Units


class IntentKind(StrEnum):
    """What the transaction does with a channel."""

    SETTLE = "settle"
    CLOSE = "close"


class IntentState(StrEnum):
    """How far it is."""

    PLANNED = "planned"
    SIGNED = "signed"
    """The bytes are durable and have not left."""
    SENT = "sent"
    """The bytes may have left. Whether the chain has them is what there is to find out."""
    MINED = "mined"
    """In a block that may still be replaced."""
    FINAL = "final"
    DEAD = "dead"
    """Provably never included."""
    REVERTED = "reverted"
    """Included and refused by the contract, finally."""


ACTIVE: Final = frozenset({IntentState.PLANNED, IntentState.SIGNED, IntentState.SENT, IntentState.MINED})
"""A channel has at most one intent in these states; the database says so too."""

STEPS: Final[Mapping[IntentState, frozenset[IntentState]]] = MappingProxyType(
    {
        IntentState.PLANNED: frozenset({IntentState.SIGNED, IntentState.DEAD}),
        IntentState.SIGNED: frozenset({IntentState.SENT, IntentState.DEAD}),
        IntentState.SENT: frozenset({IntentState.MINED, IntentState.REVERTED, IntentState.DEAD}),
        IntentState.MINED: frozenset({IntentState.FINAL, IntentState.SENT}),
        IntentState.FINAL: frozenset(),
        IntentState.DEAD: frozenset(),
        IntentState.REVERTED: frozenset(),
    }
)
"""MINED goes back to SENT when a reorganisation took the block away; ends are for ever."""


@dataclass(frozen=True, slots=True)
class Intent:
    """One transaction of ours. ``amount`` is cumulative base units: the chain's total for the channel afterwards."""

    id: str
    channel: ChannelId
    kind: IntentKind
    amount: Units
    owner: NodeId
    """Who drives it; another node takes over when that life has ended."""
    state: IntentState
    version: int
    created_at: UnixSeconds
    updated_at: UnixSeconds
    attempt: int = 1
    deadline: UnixSeconds | None = None
    """Chain time by which it must be included: set when the payer's exit is running."""
    raw: bytes = b""
    tx_hash: Hash32 | None = None
    valid_before: UnixSeconds | None = None
    block: int | None = None

    @property
    def active(self) -> bool:
        """Whether its outcome is still open."""
        return self.state in ACTIVE


def planned(
    intent_id: str,
    channel: ChannelId,
    kind: IntentKind,
    amount: Units,
    *,
    owner: NodeId,
    now: UnixSeconds,
    attempt: int = 1,
    deadline: UnixSeconds | None = None,
) -> Intent:
    """A new wish. Nothing is signed before it is durable."""
    state = IntentState.PLANNED
    return Intent(intent_id, channel, kind, amount, owner, state, 1, now, now, attempt, deadline)


def _step(intent: Intent, state: IntentState, now: UnixSeconds) -> Intent:
    assert state in STEPS[intent.state], f"{intent.state} does not become {state}"
    return replace(intent, state=state, version=intent.version + 1, updated_at=now)


def signed(intent: Intent, raw: bytes, tx_hash: Hash32, valid_before: UnixSeconds, *, now: UnixSeconds) -> Intent:
    """The bytes exist. They are never signed a second time for this intent."""
    return replace(_step(intent, IntentState.SIGNED, now), raw=raw, tx_hash=tx_hash, valid_before=valid_before)


def sent(intent: Intent, *, now: UnixSeconds) -> Intent:
    """The bytes may leave from here on, or a reorganisation brought the transaction back to where it was."""
    return replace(_step(intent, IntentState.SENT, now), block=None)


def mined(intent: Intent, block: int, *, now: UnixSeconds) -> Intent:
    """The transaction succeeded in ``block``."""
    return replace(_step(intent, IntentState.MINED, now), block=block)


def ended(intent: Intent, state: IntentState, *, now: UnixSeconds) -> Intent:
    """FINAL, DEAD or REVERTED."""
    assert state not in ACTIVE
    return _step(intent, state, now)


def adopted(intent: Intent, owner: NodeId, *, now: UnixSeconds) -> Intent:
    """Another node drives it from here on; its bytes, if there are any, stay the same."""
    return replace(intent, owner=owner, version=intent.version + 1, updated_at=now)
