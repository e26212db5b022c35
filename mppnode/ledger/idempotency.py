"""Answers that are kept for repeats of the same request: claimed before the work, stored before its bill.

An answer is stored before the charge is final. A crash in between leaves a repeat that is answered from here and a hold
that is released uncharged; the other order would leave a charge whose repeat is done, and charged, again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from channels.instants import UnixMillis
from channels.model import NodeId
from mppnode.ledger.talk import Talk

KEPT_MS: Final = 24 * 3_600_000
"""How long an answer is kept: as long as Stripe keeps its own."""
_INSERT: Final = (
    "INSERT INTO idempotency (scope, name, body, owner, answer, at_ms) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT DO NOTHING RETURNING 1"
)
_FIND: Final = "SELECT body, owner, answer, at_ms FROM idempotency WHERE scope = ? AND name = ? FOR UPDATE"
_OURS: Final = " WHERE scope = ? AND name = ? AND owner = ? AND answer = ?"
_STORE: Final = f"UPDATE idempotency SET owner = '', answer = ?, at_ms = ?{_OURS} RETURNING 1"  # noqa: S608 - our own
_GIVE_UP: Final = f"DELETE FROM idempotency{_OURS}"  # noqa: S608 - our own

_PURGE: Final = "DELETE FROM idempotency WHERE at_ms < ? AND (owner = '' OR owner NOT IN (SELECT id FROM node))"


class Claim(Enum):
    """What became of the wish to do a request."""

    OURS = "ours"
    """It is to be done now, and then stored or given up."""
    RUNNING = "running"
    """It is being done."""
    OTHER_BODY = "other body"
    """The same name was used for something else."""


@dataclass(frozen=True, slots=True)
class Stored:
    """It was done; this is the answer."""

    answer: str


def claim(
    scope: str, name: str, body: str, owner: NodeId, at: UnixMillis, *, ticket: str = ""
) -> Talk[Claim | Stored]:
    """Begin a request under its key; one whose owner has died is begun again.

    ``ticket`` tells this claim from every other of its owner, and stands where the answer will be: given up late, a
    claim takes no later one of the same name with it.
    """
    inserted = yield _INSERT, (scope, name, body, owner, ticket, at)
    if inserted:
        return Claim.OURS
    rows = yield _FIND, (scope, name)
    if not rows:  # given up between the two statements
        return Claim.RUNNING
    known, holder, answer, since = rows[0]
    if not holder and since + KEPT_MS > at:
        return Claim.OTHER_BODY if known != body else Stored(answer)
    if holder:
        alive = yield "SELECT 1 FROM node WHERE id = ?", (holder,)
        if alive:
            return Claim.RUNNING if known == body else Claim.OTHER_BODY
    yield (
        "UPDATE idempotency SET body = ?, owner = ?, answer = ?, at_ms = ? WHERE scope = ? AND name = ?",
        (body, owner, ticket, at, scope, name),
    )
    return Claim.OURS


def store(scope: str, name: str, owner: NodeId, answer: str, at: UnixMillis, *, ticket: str = "") -> Talk[bool]:
    """Keep the answer of a claimed request; False when the claim is not ours any more."""
    done = yield _STORE, (answer, at, scope, name, owner, ticket)
    return bool(done)


def give_up(scope: str, name: str, owner: NodeId, *, ticket: str = "") -> Talk[None]:
    """Forget a claimed request that came to nothing: its repeat is a first try."""
    yield _GIVE_UP, (scope, name, owner, ticket)


def purge(at: UnixMillis) -> Talk[None]:
    """Forget answers that are older than :data:`KEPT_MS`, and claims as old whose owners have died."""
    yield _PURGE, (at - KEPT_MS,)
