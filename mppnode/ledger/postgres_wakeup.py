"""News between nodes: a hint that a channel has changed, and the polling that does not need the hint.

Each node sends the ids of what it committed with one NOTIFY at most every 20 ms, on a connection of its own: a NOTIFY
inside a voucher's transaction would take a lock of the whole database at commit. Hints may be lost, with a connection,
behind a pooler, or because nobody listened yet. So what somebody follows is also looked at in one query, every 250 ms
at first and after any news, then less often, and never more than a second apart.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Final

from channels.faults import ChannelFault
from channels.ids import ChannelId
from channels.model import Account
from mppnode.config.secrets import Secret
from mppnode.ledger.base import LedgerError
from mppnode.ledger.postgres_link import TROUBLE, Connection, connect
from mppnode.ledger.subscribers import Subscribers

TOPIC: Final = "mppnode_ledger"
_TOGETHER_S: Final = 0.02
_IDS_MAX: Final = 120  # of 65 characters with the comma: a payload must stay below 8,000 bytes
_PENDING_MAX: Final = 10_000  # what cannot be sent is found by polling
_TICK_S: Final = 0.25
_EASE_S: Final = 0.25
_INTERVAL_MAX_S: Final = 0.75  # and one tick late is within a second
_RETRY_S: Final = 1.0

Look = Callable[[dict[ChannelId, int]], Awaitable[list[Account]]]
"""Reads those of these channels that are newer than the version they come with."""


class Wakeup:
    """Sends and hears hints, and looks for other nodes' commits; three endless tasks."""

    def __init__(self, dsn: Secret[str], subscribers: Subscribers, look: Look) -> None:
        self._dsn = dsn
        self._subscribers = subscribers
        self._look = look
        self._connection: Connection | None = None
        self._pid = 0
        self._pending: dict[ChannelId, None] = {}
        self._to_send = asyncio.Event()
        self._hinted: set[ChannelId] = set()
        self._hint = asyncio.Event()

    def changed(self, accounts: Iterable[Account]) -> None:
        """Hint to other nodes that these accounts were committed, soon and without waiting for it."""
        self._pending |= {account.id: None for account in accounts}
        if self._pending:
            self._to_send.set()

    async def send(self) -> None:
        """Send hints until cancelled."""
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            channels, self._pending = list(self._pending), {}
            connection = self._connection
            if connection is not None:
                with contextlib.suppress(*TROUBLE):
                    payloads = list(_payloads(channels[:_PENDING_MAX]))
                    await connection.execute("SELECT pg_notify($1, p) FROM unnest($2::text[]) AS p", TOPIC, payloads)
            await asyncio.sleep(_TOGETHER_S)

    async def listen(self) -> None:
        """Keep a listening connection until cancelled; polling goes on without it."""
        while True:
            lost = asyncio.Event()
            with contextlib.suppress(LedgerError, *TROUBLE):
                connection = await connect(self._dsn)
                try:
                    connection.add_termination_listener(lambda _, lost=lost: lost.set())
                    self._pid = connection.get_server_pid()
                    await connection.add_listener(TOPIC, self._heard)
                    self._connection = connection
                    self._hint.set()  # whatever was said while nobody listened
                    await lost.wait()
                finally:
                    self._connection = None
                    connection.terminate()
            await asyncio.sleep(_RETRY_S)

    def _heard(self, _connection: object, pid: int, _topic: str, payload: str) -> None:
        if pid == self._pid or len(self._hinted) >= _PENDING_MAX:
            return
        with contextlib.suppress(ValueError):  # whoever may connect may write here: a hint is only a reason to look
            self._hinted |= {ChannelId(bytes.fromhex(text)) for text in payload.split(",")}
            self._hint.set()

    async def watch(self) -> None:
        """Look for news until cancelled."""
        loop = asyncio.get_running_loop()
        watched, interval, due = set[ChannelId](), _EASE_S, loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._hint.wait()
            self._hint.clear()
            hinted, self._hinted = self._hinted, set()
            known = self._subscribers.followed()
            wanted = {channel: known[channel] for channel in hinted & known.keys()}
            everything = not known.keys() <= watched or loop.time() >= due
            watched = set(known)
            if everything:
                wanted = known
            if not wanted:
                continue
            news = await self._tell(wanted)
            interval = _EASE_S if news else min(interval + _EASE_S, _INTERVAL_MAX_S)
            if everything or news:
                due = loop.time() + interval

    async def _tell(self, wanted: dict[ChannelId, int]) -> bool:
        try:
            found = await self._look(wanted)
        except ChannelFault:
            return True  # not available: soon again
        self._subscribers.tell(found)
        return bool(found)


def _payloads(channels: list[ChannelId]) -> Iterator[str]:
    for start in range(0, len(channels), _IDS_MAX):
        yield ",".join(channel.hex() for channel in channels[start : start + _IDS_MAX])
