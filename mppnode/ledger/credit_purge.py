"""What the ledger may forget: announcements nobody repeats any more, and tasks that are done and told nobody anything.

A bite at a time, each in a transaction of its own, so that no request waits for a year's worth of rows.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from channels.instants import UnixMillis
from mppnode.ledger.credits import Credits
from mppnode.ledger.talk import Talk

_DAY_MS: Final = 86_400_000
HEARD_MS: Final = 40 * _DAY_MS
"""Stripe keeps events for 30 days, and cannot repeat one it does not keep. Source: docs.stripe.com/api/events."""
DONE_MS: Final = 90 * _DAY_MS
"""A quarter: as long as anybody asks what became of a report or an alert."""
_BITE: Final = 500  # rows of one transaction: a few milliseconds

# Every other kind is kept for good: each of its tasks is the only memory of something that must not happen twice
# (grant, recharge, customer, subscription, reconciled) or of how things stand (suspension, card).
_HEARD: Final = (
    "DELETE FROM heard WHERE id IN (SELECT id FROM heard WHERE at_ms < ? LIMIT ?) RETURNING 1"
)
_ALERTS: Final = (
    "DELETE FROM outbox WHERE id IN (SELECT id FROM outbox WHERE kind = 'alert' AND state = 'done' AND created_ms < ?"
    " LIMIT ?) RETURNING 1"
)
# An account's last report stays, and so does all that comes after one that is not done: what was reported is proved by
# what is left, which therefore has to be without a gap (billing/reconcile.py).
_REPORTS: Final = (
    "DELETE FROM outbox WHERE id IN (SELECT id FROM outbox AS old"
    " WHERE old.kind = 'meter' AND old.state = 'done' AND old.created_ms < ?"
    " AND EXISTS (SELECT 1 FROM outbox AS later WHERE later.account = old.account AND later.kind = 'meter'"
    " AND later.created_ms > old.created_ms)"
    " AND NOT EXISTS (SELECT 1 FROM outbox AS open WHERE open.account = old.account AND open.kind = 'meter'"
    " AND open.state <> 'done' AND open.created_ms <= old.created_ms)"
    " ORDER BY old.created_ms LIMIT ?) RETURNING 1"
)


async def purge(books: Credits) -> int:
    """Forget what is old enough; returns how many rows. Raises ``ChannelFault`` with ``STORE_UNAVAILABLE``."""
    now = books.clock.now_millis()
    total = 0
    for statement, age in ((_HEARD, HEARD_MS), (_ALERTS, DONE_MS), (_REPORTS, DONE_MS)):
        gone = _BITE
        while gone == _BITE:
            gone = await books.write(partial(_bite, statement, UnixMillis(now - age)), of="")
            total += gone
    return total


def _bite(statement: str, before: UnixMillis) -> Talk[int]:
    rows = yield statement, (before, _BITE)
    return len(rows)
