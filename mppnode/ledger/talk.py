"""Conversations with a database, written once for both stores.

A *talk* is a generator that yields statements and is sent the rows they give; SQLite runs it on its writer's thread,
PostgreSQL on a connection. So what is decided between two statements is the same code for both, and there is one text
of every statement. They use what the two have in common: ``?`` for parameters, BIGINT, TEXT, ``ON CONFLICT``, and ``FOR
UPDATE``, which SQLite does without, as it has one writer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, Protocol, TypeVar

R = TypeVar("R")

Row = Sequence[Any]
Ask = tuple[str, Sequence[Any]]
"""A statement and its parameters."""
Talk = Generator[Ask, list[Row], R]

_LOCK: Final = " FOR UPDATE"


class Till(Protocol):
    """Runs talks: what a store offers for everything that is not a channel."""

    async def write(self, talk: Callable[[], Talk[R]], *, of: str) -> R:
        """Run a talk in one transaction and commit it durably; it may be begun again and must only depend on rows.

        Talks ``of`` the same account run one after the other. One that raises changes nothing.

        Raises:
            ChannelFault: ``STORE_UNAVAILABLE``, and whatever the talk raises.
        """
        ...

    async def read(self, talk: Callable[[], Talk[R]]) -> R:
        """Run a talk that changes nothing."""
        ...


def on_sqlite(db: sqlite3.Connection, talk: Callable[[], Talk[R]]) -> R:
    """Run a talk inside the connection's transaction; what it wrote before it raised is undone."""
    db.execute("SAVEPOINT talk")
    try:
        result = _converse(db, talk())
    except BaseException:
        db.execute("ROLLBACK TO talk")
        raise
    finally:
        db.execute("RELEASE talk")
    return result


def read_sqlite(db: sqlite3.Connection, talk: Callable[[], Talk[R]]) -> R:
    """Run a talk that only reads, from one state of the database."""
    db.execute("BEGIN")
    try:
        return _converse(db, talk())
    finally:
        db.execute("ROLLBACK")


def _converse(db: sqlite3.Connection, talk: Talk[R]) -> R:
    try:
        statement, values = next(talk)
        while True:
            cursor = db.execute(statement.removesuffix(_LOCK), values)
            statement, values = talk.send(cursor.fetchall())
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
