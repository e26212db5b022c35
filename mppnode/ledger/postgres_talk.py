"""Talks (:mod:`mppnode.ledger.talk`) on a PostgreSQL connection."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeVar

from mppnode.ledger.postgres_link import MARK, Connection, Mark
from mppnode.ledger.talk import Talk

R = TypeVar("R")

_STATEMENTS_MAX: Final = 512  # the texts of this program; those built from enums are a few dozen


async def on_postgres(db: Connection, mark: Mark, talk: Callable[[], Talk[R]]) -> tuple[R, bool]:
    """Run a talk inside the connection's transaction; says whether it wrote."""
    result, wrote = await _exchange(db, talk())
    if wrote:
        await db.execute(MARK, mark.lane, mark.number)
    return result, wrote


async def read_postgres(db: Connection, talk: Callable[[], Talk[R]]) -> R:
    """Run a talk that only reads."""
    async with db.transaction(isolation="repeatable_read", readonly=True):
        return (await _exchange(db, talk()))[0]


async def _exchange(db: Connection, talk: Talk[R]) -> tuple[R, bool]:
    wrote = False
    try:
        statement, values = next(talk)
        while True:
            wrote = wrote or not statement.startswith("SELECT")
            rows = await db.fetch(_numbered(statement), *values)
            statement, values = talk.send([tuple(row) for row in rows])
    except StopIteration as end:
        return end.value, wrote


@lru_cache(maxsize=_STATEMENTS_MAX)
def _numbered(statement: str) -> str:
    """``?`` as ``$1``, ``$2``; none of our texts has one in a string."""
    parts = statement.split("?")
    return parts[0] + "".join(f"${number}{part}" for number, part in enumerate(parts[1:], 1))
