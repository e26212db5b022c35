"""Who is told of committed accounts, and which version of each channel they were told last.

Commits reach a node on two ways, its own and by looking for other nodes' commits. Both end here, and here it is decided
that nobody hears a version twice or goes back to an older one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from channels.ids import ChannelId
from channels.model import Account

_REMEMBERED_MAX: Final = 50_000  # channels whose last version is remembered; those somebody follows are kept fresh


@dataclass(slots=True)
class _Last:
    told: int = 0
    known: int = 0


class Subscribers:
    """The listeners of one store. Used on the event loop alone."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Account], None]] = []
        self._last: OrderedDict[ChannelId, _Last] = OrderedDict()
        self._interest: Callable[[], Collection[ChannelId]] = tuple

    def subscribe(self, listener: Callable[[Account], None]) -> None:
        """Call ``listener`` with every account from here on."""
        self._listeners.append(listener)

    def follow(self, interest: Callable[[], Collection[ChannelId]]) -> None:
        """Look for other processes' commits to these channels."""
        self._interest = interest

    def followed(self) -> dict[ChannelId, int]:
        """The channels somebody follows, each with the version that is no news any more."""
        versions = {}
        for channel in self._interest():
            last = self._last.get(channel)
            versions[channel] = 0 if last is None else last.known
            if last is not None:
                self._last.move_to_end(channel)
        return versions

    def tell(self, accounts: Iterable[Account]) -> None:
        """Tell of accounts that are durable; what is not news is left out."""
        for account in accounts:
            last = self._of(account.id)
            if account.version <= last.told:
                continue
            last.told, last.known = account.version, max(account.version, last.known)
            for listener in self._listeners:
                _tell(listener, account)

    def passed(self, before: Account | None, account: Account) -> None:
        """Note a relaxed commit of ours, which is told when it is durable: looking for news must not find it.

        Unless it was made of something nobody was told of yet. Then it stays news, or a voucher that another node took
        would be hidden behind our own next look at the chain.
        """
        last = self._of(account.id)
        if before is not None and before.version <= last.known:
            last.known = max(last.known, account.version)

    def forget(self) -> None:
        """Begin again: another database took over, and its newest version may be an older one."""
        self._last.clear()

    def _of(self, channel: ChannelId) -> _Last:
        last = self._last.setdefault(channel, _Last())
        self._last.move_to_end(channel)
        while len(self._last) > _REMEMBERED_MAX:
            self._last.popitem(last=False)
        return last


def _tell(listener: Callable[[Account], None], account: Account) -> None:
    try:
        listener(account)
    except Exception as error:  # noqa: BLE001 - one request's bug; the others' news and answers come after it
        context = {"message": "a ledger listener failed", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)
