"""One connection to PostgreSQL that breaks and comes back, and transactions on it that happen exactly once.

Whoever loses the connection during COMMIT does not know whether it happened. Every writing transaction therefore leaves
its number in a row of its own (table ``lane``), and the next connection reads that row, which waits for a predecessor
that is still committing: the number says whether to answer or to run the work again. Without it an unknown outcome
could only be met with steps that may be repeated, and charging the exact end of a request is not one of them.

Work is repeated for :data:`DEADLINE_S`; then its askers are told that the ledger is not available. Errors that no
repetition cures (a full disk, a broken index, a law the database refuses) end the node.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urlsplit

import asyncpg

from channels.faults import ChannelFault, Reason
from mppnode.config.secrets import Secret
from mppnode.ledger.base import LedgerError
from mppnode.ledger.batch import unavailable

R = TypeVar("R")
Connection = Any
"""An ``asyncpg.Connection``; the package has no types."""

DEADLINE_S: Final = 5.0  # a failover takes longer and is worth an answer to the payer; a restarted server does not
_CONNECT_S: Final = 4.0
_PAUSE_S: Final = 0.05
_PAUSE_MAX_S: Final = 0.5
_BEGIN: Final = {
    # Firm with a synchronous standby means that it has it too; a stronger setting of the server is not asked for.
    True: "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit TO on",
    False: "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit TO off",
}
# A node that stops in the middle must not hold its rows for ever, and nobody waits for a row beyond the deadline.
_SESSION: Final = "SET idle_in_transaction_session_timeout TO '5s'; SET lock_timeout TO '4s'"
MARK: Final = (
    "INSERT INTO lane (id, batch, at) VALUES ($1, $2, now())"
    " ON CONFLICT (id) DO UPDATE SET batch = excluded.batch, at = excluded.at"
)
_FIND_MARK: Final = (
    "INSERT INTO lane (id, batch, at) VALUES ($1, 0, now())"
    " ON CONFLICT (id) DO UPDATE SET at = excluded.at RETURNING batch"
)
TROUBLE: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, EOFError)


class GenerationFell(LedgerError):
    """The database is an older one than this node has worked with: a standby that was behind, or a backup."""


class Again(Exception):
    """Another node was faster: roll back, read again, decide again."""


class _Cure(Enum):
    REPEAT = auto()
    RECONNECT = auto()
    NONE = auto()


def _cure(error: BaseException) -> _Cure:
    """What makes the error go away. Source: PostgreSQL documentation, appendix A, error codes."""
    if isinstance(error, Again):
        return _Cure.REPEAT
    if isinstance(error, (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError)):
        return _Cure.RECONNECT  # a newer node has migrated the tables
    state = getattr(error, "sqlstate", None)
    if state is None:
        return _Cure.RECONNECT  # not the server's word but the connection's
    if state in ("40001", "40P01", "55P03", "57014"):  # serialisation, deadlock, lock timeout, cancelled
        return _Cure.REPEAT
    if state[:2] in ("08", "40", "57") or state in ("25006", "25P03", "53300"):
        return _Cure.RECONNECT  # gone, unknown, shutting down; demoted; we idled; too many connections
    return _Cure.NONE


@dataclass(slots=True)
class Generation:
    """The greatest generation this node has seen, and what to do when a greater one appears."""

    on_new: Callable[[], None]
    seen: int = 0

    def check(self, found: int) -> None:
        """Raises ``GenerationFell``."""
        if found < self.seen:
            raise GenerationFell(f"the database's generation is {found}, and this node has seen {self.seen}")
        if self.seen and found > self.seen:
            self.on_new()
        self.seen = found


@dataclass(frozen=True, slots=True)
class Mark:
    """What a writing transaction leaves behind, with the statement :data:`MARK`."""

    lane: str
    number: int


def describe(dsn: Secret[str]) -> str:
    """Where a database is, without the password and the rest of its URL."""
    try:
        parts = urlsplit(dsn.reveal())
        place = f"{parts.hostname or 'localhost'}:{parts.port or 5432}"
    except ValueError:
        return "the configured PostgreSQL URL"
    return f"PostgreSQL at {place}{parts.path}"


async def connect(dsn: Secret[str]) -> Connection:
    """Open a connection.

    Raises:
        LedgerError: the server cannot be reached or does not let us in; without the password.
    """
    try:
        async with asyncio.timeout(_CONNECT_S):
            connection = await asyncpg.connect(dsn.reveal(), server_settings={"application_name": "mppnode"})
            try:
                await connection.execute(_SESSION)
            except BaseException:  # cancelled, mostly: a listener that is stopped while it connects
                connection.terminate()
                raise
    except (*TROUBLE, ValueError) as error:
        # Neither the error nor its context is kept: some quote the URL, all hold it in their frames.
        raise LedgerError(f"cannot connect to {describe(dsn)}: {_reason(error, dsn)}") from None
    return connection


def _reason(error: BaseException, dsn: Secret[str]) -> str:
    if not isinstance(error, (asyncpg.PostgresError, OSError)) or not str(error):
        return type(error).__name__
    text = str(error)
    with contextlib.suppress(ValueError):
        password = urlsplit(dsn.reveal()).password
        for secret in (dsn.reveal(), password, unquote(password or "")):
            text = text.replace(secret, "***") if secret else text
    return text


class Link:
    """A connection for one task at a time: it is serial, and a second caller waits for the first."""

    def __init__(
        self,
        dsn: Secret[str],
        *,
        generation: Generation,
        on_fatal: Callable[[BaseException], None],
        on_connect: Callable[[], None] = lambda: None,
        on_commit: Callable[[float | None], None] = lambda _: None,
    ) -> None:
        self._on_commit = on_commit
        self._dsn = dsn
        self._generation = generation
        self._on_fatal = on_fatal
        self._on_connect = on_connect
        self._lane = secrets.token_hex(8)
        self._number = 0
        self._landed = 0
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()

    async def open(self) -> None:
        """Connect, so that a node which cannot does not start. Raises ``LedgerError``."""
        try:
            await self._connected()
        except TROUBLE as error:
            raise LedgerError(f"cannot use {describe(self._dsn)}: {_reason(error, self._dsn)}") from None

    async def close(self) -> None:
        """Tidy up behind us, if the server is still there."""
        async with self._turn:
            if self._connection is None:
                return
            with contextlib.suppress(*TROUBLE, TimeoutError):
                async with asyncio.timeout(_CONNECT_S):
                    await self._connection.execute("DELETE FROM lane WHERE id = $1", self._lane)
                    await self._connection.close()
            self._drop()

    async def read(self, work: Callable[[Connection], Awaitable[R]]) -> R:
        """Run statements that change nothing. Raises ``STORE_UNAVAILABLE`` and whatever ``work`` raises."""

        async def attempt() -> R:
            return await work(await self._connected())

        async with self._turn:
            return await self._persist(attempt)

    async def write(
        self, work: Callable[[Connection, Mark], Awaitable[tuple[R, bool]]], *, firm: bool = True
    ) -> R:
        """Run ``work`` in a transaction that happens once, however often it takes.

        ``work`` gives its result and whether it wrote; if it did, it has written its mark too. It runs again after a
        failure and must begin from what it reads then. What it raises itself reaches the caller, rolled back.

        Raises:
            ChannelFault: ``STORE_UNAVAILABLE``; in the worst case with an outcome nobody knows yet.
        """
        async with self._turn:
            self._number += 1
            mark, sent = Mark(self._lane, self._number), list[R]()
            now = asyncio.get_running_loop().time
            begun = now()

            async def attempt() -> R:
                connection = await self._connected()
                if sent and self._landed == mark.number:
                    return sent[-1]
                await connection.execute(_BEGIN[firm])
                result, wrote = await work(connection, mark)
                if not wrote:
                    await connection.execute("ROLLBACK")
                    return result
                sent.append(result)
                ended = await connection.execute("COMMIT")
                assert ended == "COMMIT", "the transaction had failed before it was committed"
                return result

            try:
                result = await self._persist(attempt)
            except ChannelFault as fault:
                if fault.reason is Reason.STORE_UNAVAILABLE:
                    self._on_commit(None)
                raise
            self._on_commit(now() - begun)
            return result

    async def _persist(self, attempt: Callable[[], Awaitable[R]]) -> R:
        pause = _PAUSE_S
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    try:
                        return await attempt()
                    except (*TROUBLE, LedgerError, Again) as error:
                        await self._recover(error)
                    await asyncio.sleep(pause)
                    pause = min(pause + pause, _PAUSE_MAX_S)
        except TimeoutError:
            self._drop()
            raise unavailable() from None
        except _Fatal as fatal:
            self._on_fatal(fatal.error)
            raise unavailable() from fatal.error
        except Exception:
            await self._roll_back()
            raise
        except BaseException:  # cancelled in the middle of something
            self._drop()
            raise

    async def _recover(self, error: Exception) -> None:
        if isinstance(error, asyncpg.DataError):
            raise error  # never left this process: its asker's bug
        cure = _Cure.NONE if isinstance(error, GenerationFell) else _cure(error)
        if cure is _Cure.REPEAT:
            await self._roll_back()
            return
        self._drop()
        if cure is _Cure.NONE:
            raise _Fatal(error)

    async def _connected(self) -> Connection:
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        connection = await connect(self._dsn)
        try:
            self._generation.check(await connection.fetchval("SELECT value FROM meta WHERE name = 'generation'"))
            self._landed = await connection.fetchval(_FIND_MARK, self._lane)
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection
        self._on_connect()
        return connection

    async def _roll_back(self) -> None:
        if self._connection is None or not self._connection.is_in_transaction():
            return
        try:
            await self._connection.execute("ROLLBACK")
        except TROUBLE:
            self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


class _Fatal(Exception):
    """Wraps an error that no repetition cures on its way out of the loop."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
