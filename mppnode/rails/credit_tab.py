"""One request's running bill on a credit account.

The whole worst case is held before the work begins, so nothing has to be asked for on the way. What was delivered is
folded into the ledger a window at a time: that window is all the node can lose when it dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from channels.credit import CreditFault, Fold
from channels.faults import ChannelFault, Reason
from channels.instants import UnixMillis
from channels.model import HoldId
from channels.units import Pico
from mppnode.accounts.directory import Admission
from mppnode.accounts.limits import Taken
from mppnode.rails.base import Facts, NeedVoucher

if TYPE_CHECKING:
    from mppnode.rails.credit import CreditRail


class CreditTab:
    """Implements :class:`mppnode.rails.base.Tab`."""

    def __init__(
        self,
        rail: CreditRail,
        admission: Admission,
        hold: HoldId,
        granted: Pico,
        *,
        cap_pico: int,
        window_pico: int,
        taken: Taken | None,
        headers: Mapping[str, str],
    ) -> None:
        self.admission = admission
        self.hold = hold
        self.taken = taken
        self.headers = headers
        """What the answer says of the key's rate limits."""
        self._rail = rail
        self._granted = granted
        self._cap = min(cap_pico, granted)
        self._window = window_pico
        self._consumed = 0
        self._recorded = 0
        self._folding: asyncio.Task[None] | None = None
        self._ended: ChannelFault | None = None
        self._closing = False
        self.on_change: Callable[[], None] = _nothing
        self.delivered: Callable[[], int] = lambda: self._consumed

    @property
    def windowed(self) -> bool:
        """See :meth:`Tab.windowed`: what is held is all there will be."""
        return False

    @property
    def granted(self) -> int:
        """See :meth:`Tab.granted`."""
        return self._granted

    @property
    def cap_pico(self) -> int:
        """See :meth:`Tab.cap_pico`."""
        return self._cap

    @property
    def window_pico_max(self) -> int:
        """See :meth:`Tab.window_pico_max`."""
        return self._window

    @property
    def starved(self) -> bool:
        """See :meth:`Tab.starved`: a credit account is never asked for more."""
        return False

    @property
    def ended(self) -> ChannelFault | None:
        """See :meth:`Tab.ended`."""
        return self._ended

    @property
    def recorded(self) -> Pico:
        """See :meth:`Tab.recorded`."""
        return Pico(self._recorded)

    @property
    def unrecorded(self) -> int:
        """Pico that have left this process and are not in the ledger yet."""
        return max(self.delivered() - self._recorded, 0)

    def narrow(self, *, token_pico: int, reserve_pico: int, cap_pico: int) -> None:  # noqa: ARG002 - there are no windows
        """See :meth:`Tab.narrow`."""
        self._cap = min(self._cap, cap_pico)

    def cover(self, total: int) -> bool:
        """See :meth:`Tab.cover`."""
        if total > self._granted:
            self._ended = ChannelFault(Reason.INSUFFICIENT_BALANCE, detail="the hold of this request is used up")
            return False
        unrecorded = total - self._recorded
        if unrecorded > self._window >> 1:
            self._fold_soon()
            # One chunk may be dearer than a window; waiting for something to record before it would be for ever.
            if unrecorded > self._window and self._consumed > self._recorded:
                return False
        self._consumed = total
        return True

    def ask(self) -> NeedVoucher | None:
        """See :meth:`Tab.ask`."""
        return None

    def _fold_soon(self) -> None:
        if self._folding is None and not self._closing and self._ended is None and self._consumed > self._recorded:
            self._folding = self._rail.owner.start(self._fold(), name="fold credit")

    async def _fold(self) -> None:
        consumed = max(min(self.delivered(), self._consumed), self._recorded)
        try:
            if consumed > self._recorded:  # a client that reads slowly has perhaps taken nothing since
                await self._rail.books.apply(self.admission.account.id, Fold(self.hold, Pico(consumed)))
        except CreditFault:
            self._ended = ChannelFault(Reason.HOLD_FENCED, detail="this request no longer owns its reservation")
        except ChannelFault as fault:
            self._ended = fault
        else:
            self._recorded = consumed
        finally:
            self._folding = None
        if not self._closing:
            self.on_change()

    async def settle(self, total: Pico, facts: Facts) -> None:
        """See :meth:`Tab.settle`."""
        self._closing = True
        if self._folding is not None:
            await asyncio.wait({self._folding})
        if await self._rail.settle(self, total, facts):
            self._recorded = total

    def receipt_frame(self, now: UnixMillis, tokens: int) -> bytes:  # noqa: ARG002 - SDKs of API keys know no receipts
        """See :meth:`Tab.receipt_frame`: the receipt of a key's request is ``GET /v1/requests/{id}``."""
        return b""

    def logged(self) -> dict[str, int | str]:
        """See :meth:`Tab.logged`."""
        return {"account": self.admission.account.id, "key": self.admission.key_id}


def _nothing() -> None:
    """Stand in for a listener that is not there yet."""
