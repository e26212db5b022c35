"""The contract every store of channel accounts keeps; ``tests/store`` runs it against each implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from channels.ids import ChannelId
from channels.model import Account, Event, Plan

R = TypeVar("R")
Step = Callable[[Account | None], Plan[R]]
"""Decides what happens to an account. A store may run it more than once, so it must be pure."""


class ChannelStore(Protocol):
    """Accounts and their journal, linearizable per channel.

    * ``transact`` commits the account and its events together, durably, before it returns; a step that raises changes
      nothing. Between two steps on one channel the second always sees what the first committed.
    * Subscribers hear every committed account, in commit order per channel, after it is durable: what they are told
      may be shown to a payer.
    * Amounts survive up to 2**96 units and 2**116 pico; 64-bit columns do not hold them.
    """

    async def load(self, channel: ChannelId) -> Account | None:
        """The last committed account.

        Raises:
            ChannelFault: ``STORE_UNAVAILABLE``; never an answer that merely looks like "no such channel".
        """
        ...

    async def transact(self, channel: ChannelId, step: Step[R], *, relaxed: bool = False) -> Plan[R]:
        """Run ``step`` on the current account and commit what it planned.

        ``relaxed`` commits survive the process but perhaps not a power cut. Whatever is answered to a step that is
        not relaxed survives both, also when it changed nothing: it may be shown to a payer.

        Raises:
            ChannelFault: whatever ``step`` refused with, or ``STORE_UNAVAILABLE`` when nothing was committed.
        """
        ...

    def subscribe(self, listener: Callable[[Account], None]) -> None:
        """Call ``listener`` with every account this process commits or learns of."""
        ...

    async def accounts(self) -> Sequence[Account]:
        """Every account, in the order of their ids."""
        ...

    async def journal(self, channel: ChannelId) -> Sequence[Event]:
        """The events of one channel, in order; folding them from nothing gives the account."""
        ...
