"""What the node asks of its ledger beyond the accounts: lives of nodes, intents, sponsored gas. One per store.

Times are the ledger's own, never the caller's: with several nodes only one clock may decide when a lease ends, and the
database is what they share (PostgreSQL: ``now()``; SQLite: the machine's clock).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.intent import Intent
from channels.model import Account, NodeId
from channels.store import ChannelStore
from channels.units import Units
from mppnode.ledger.talk import Till

LEASE_S: Final = 10.0
"""A node that has not been heard of for this long may be dead (reliability: section 2.9)."""
GRACE_S: Final = 5.0
"""And this much later others release its holds: the two clocks and one slow commit fit in between."""
SAFETY_S: Final = 3.0
"""A node stops by itself this long before its lease ends."""
PAGE: Final = 200
"""Accounts per page: a page of full ladders is about 2 MB and 10 ms."""


class Which(StrEnum):
    """What to list."""

    ALL = "all"
    NOT_CLOSED = "not closed"
    HELD = "held"
    """With at least one hold."""


class LedgerError(Exception):
    """The ledger cannot be opened; the message is for people and holds no password."""


class IntentExists(Exception):
    """The channel has an active intent already: a second transaction could only revert."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Gas we promise to pay for one payer's transaction; ``fee_max`` in fee-token base units."""

    tx_hash: Hash32
    sender: Address
    fee_max: Units
    valid_before: UnixSeconds


@dataclass(frozen=True, slots=True)
class Budget:
    """The most we pay for others. Units of the fee token; counted over the last hour."""

    grants_per_sender: int
    total: Units


class BudgetSpent(Exception):
    """Sponsoring this transaction would go beyond the budget; ``total`` if it is everybody's and not its sender's."""

    def __init__(self, message: str, *, total: bool = False) -> None:
        self.total = total
        super().__init__(message)


class Ledger(ChannelStore, Till, Protocol):
    """A channel store with all a node needs around it."""

    on_commit: Callable[[float | None], None]
    """Hears, on the event loop, how many seconds each commit took, and None of one that failed."""

    async def start(self) -> None:
        """Open it, migrate it, refuse a schema that is newer than this program."""
        ...

    async def stop(self) -> None:
        """Commit what is queued and close."""
        ...

    async def page(self, which: Which, *, after: ChannelId | None = None, limit: int = PAGE) -> Sequence[Account]:
        """Up to ``limit`` accounts with ids above ``after``, in the order of their ids."""
        ...

    def follow(self, interest: Callable[[], Collection[ChannelId]]) -> None:
        """Tell subscribers of these channels also what *other* processes commit, within a second at the latest."""
        ...

    async def join(self, name: str) -> NodeId:
        """Begin a life as ``name``, which one process has at a time: an earlier life of that name is fenced."""
        ...

    async def beat(self, node: NodeId) -> bool:
        """Extend a lease by :data:`LEASE_S`; False when this life has been fenced: it owns nothing any more."""
        ...

    async def leave(self, node: NodeId) -> None:
        """End a life that holds nothing."""
        ...

    async def living(self) -> frozenset[NodeId]:
        """Fence the lives whose lease ended :data:`GRACE_S` ago, then list those that are left."""
        ...

    async def lead(self, job: str, node: NodeId) -> bool:
        """Be the one that does ``job`` for the next :data:`LEASE_S`; avoids double work, proves nothing.

        A leader whose life has been fenced leads no more: a node that starts again under its name goes on at once.
        """
        ...

    async def add_intent(self, intent: Intent) -> None:
        """Persist a new intent. Raises ``IntentExists`` when the channel has an active one."""
        ...

    async def move_intent(self, before: Intent, after: Intent) -> bool:
        """Replace ``before`` durably; False when somebody else has moved it since."""
        ...

    async def intents(
        self, *, active: bool, channel: ChannelId | None = None, limit: int = PAGE
    ) -> Sequence[Intent]:
        """Intents, the newest last; ``active`` leaves out those that have ended. With ``limit`` the newest ones."""
        ...

    async def grant(self, grant: Grant, budget: Budget) -> bool:
        """Reserve sponsored gas durably; False when the same transaction has been granted already.

        Raises:
            BudgetSpent: the sender's or the total budget of the last hour would be exceeded.
        """
        ...

    async def promised(self) -> Units:
        """What was granted in the last hour: the fee where it is known, else the most it may be."""
        ...

    async def settle_grant(self, tx_hash: Hash32, fee: Units) -> None:
        """Replace a grant's maximum by what was really paid; zero when it provably never was included."""
        ...

    async def open_grants(self, *, limit: int = PAGE) -> Sequence[Grant]:
        """Grants whose fee is not known yet, the oldest first."""
        ...
