"""What is looked at every half minute for the metrics: no look reads a whole table of what is over or of no concern."""

from __future__ import annotations

import pytest

from mppnode.ledger.credit_lists import unbilled_micro, usable_keys, waiting_tasks
from mppnode.ledger.talk import Talk
from tests.store.shops import LEDGERS, Shop

pytestmark = pytest.mark.parametrize("shop", LEDGERS, indirect=True)


def statements(talk: Talk[object]) -> list[str]:
    """What a talk that takes no parameters asks, up to its first answer that matters."""
    found, answer = [], None
    try:
        while True:
            statement, values = talk.send(answer)  # type: ignore[arg-type]
            assert not values
            found.append(statement)
            answer = [] if "GROUP BY" in statement else [(0,)]  # type: ignore[assignment]
    except StopIteration:
        return found


@pytest.mark.parametrize(
    ("look", "indexes"),
    [
        (waiting_tasks, ["outbox_due", "outbox_parked"]),
        (usable_keys, ["api_key_usable"]),
        (unbilled_micro, ["credit_postpaid"]),
    ],
)
async def test_looks_use_the_indexes_made_for_them(shop: Shop, look: object, indexes: list[str]) -> None:
    """Done tasks, revoked keys and prepaid accounts are most of a large ledger, and are not read."""
    await shop.open()
    for statement, index in zip(statements(look()), indexes, strict=True):  # type: ignore[operator]
        assert index in await shop.explain(statement)
