"""The steps of a transaction of ours: which may follow which, written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from channels.ids import ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.intent import ACTIVE, STEPS, Intent, IntentKind, IntentState, adopted, ended, mined, planned, sent, signed
from channels.model import NodeId
from channels.units import Units

NOW = UnixSeconds(1_900_000_000)
LATER = UnixSeconds(NOW + 5)
TX = Hash32(b"\x7a" * 32)
P, G, S, M, F, D, R = IntentState
MOVES: dict[IntentState, Callable[[Intent], Intent]] = {
    G: lambda intent: signed(intent, b"raw", TX, UnixSeconds(NOW + 20), now=LATER),
    S: lambda intent: sent(intent, now=LATER),
    M: lambda intent: mined(intent, 77, now=LATER),
    F: lambda intent: ended(intent, F, now=LATER),
    D: lambda intent: ended(intent, D, now=LATER),
    R: lambda intent: ended(intent, R, now=LATER),
}
ALLOWED = {(P, G), (P, D), (G, S), (G, D), (S, M), (S, R), (S, D), (M, F), (M, S)}


def wish() -> Intent:
    return planned("i", ChannelId(b"\xc1" * 32), IntentKind.SETTLE, Units(40), owner=NodeId("node-1"), now=NOW)


def intent_in(state: IntentState) -> Intent:
    path: dict[IntentState, tuple[IntentState, ...]] = {P: (), G: (G,), S: (G, S), M: (G, S, M), F: (G, S, M, F), D: (D,), R: (G, S, R)}
    intent = wish()
    for step in path[state]:
        intent = MOVES[step](intent)
    return intent


@pytest.mark.parametrize("state", IntentState)
@pytest.mark.parametrize("target", list(MOVES), ids=lambda state: state.value)
def test_every_pair_of_states(state: IntentState, target: IntentState) -> None:
    """Each of the 42 steps is allowed by this table or stops the intent: ends are for ever, nothing is signed twice."""
    intent = intent_in(state)
    assert intent.state is state
    if (state, target) not in ALLOWED:
        with pytest.raises(AssertionError):
            MOVES[target](intent)
        return
    after = MOVES[target](intent)
    assert (after.state, after.version, after.updated_at) == (target, intent.version + 1, LATER)
    assert (after.amount, after.kind, after.channel, after.id, after.created_at) == (40, IntentKind.SETTLE, intent.channel, "i", NOW)


def test_the_table_of_the_product_is_ours() -> None:
    """No step is missing and none is there that this table does not know."""
    assert {(state, target) for state, targets in STEPS.items() for target in targets} == ALLOWED
    assert set(STEPS) == set(IntentState)


@pytest.mark.parametrize("state", IntentState)
def test_what_may_still_land_is_active(state: IntentState) -> None:
    """Exactly the states with an open outcome keep a second intent away."""
    assert intent_in(state).active is (state not in (F, D, R))
    assert (state in ACTIVE) is bool(STEPS[state])


@pytest.mark.parametrize("state", [P, G, S, M])
def test_only_an_end_ends(state: IntentState) -> None:
    """An active state is never written as an end."""
    with pytest.raises(AssertionError):
        ended(intent_in(M), state, now=LATER)


def test_the_bytes_stay_the_same_from_signing_to_the_end() -> None:
    """Whatever a chain does to it, there is one transaction per intent."""
    intent = intent_in(G)
    assert (intent.raw, intent.tx_hash, intent.valid_before) == (b"raw", TX, NOW + 20)
    for step in (S, M, S, M, F):
        intent = MOVES[step](intent)
        assert (intent.raw, intent.tx_hash, intent.valid_before) == (b"raw", TX, NOW + 20)


def test_a_block_that_was_taken_away_is_forgotten() -> None:
    """After a reorganisation the transaction is where it was: sent, and in no block."""
    assert intent_in(M).block == 77
    assert MOVES[S](intent_in(M)).block is None


@pytest.mark.parametrize("state", IntentState)
def test_another_node_takes_over_without_a_step(state: IntentState) -> None:
    """Only the driver changes, and the version, so that the old driver's next move finds the intent moved."""
    intent = intent_in(state)
    taken = adopted(intent, NodeId("node-2"), now=LATER)
    assert (taken.owner, taken.version, taken.state) == ("node-2", intent.version + 1, state)
    assert (taken.raw, taken.tx_hash, taken.block) == (intent.raw, intent.tx_hash, intent.block)


def test_a_wish_is_unsigned() -> None:
    """A new intent has no bytes; its deadline and attempt are the caller's."""
    deadline = UnixSeconds(NOW + 700)
    intent = planned("i", ChannelId(b"\xc1" * 32), IntentKind.CLOSE, Units(0), owner=NodeId("n"), now=NOW, attempt=3, deadline=deadline)
    assert (intent.state, intent.version, intent.raw, intent.tx_hash, intent.block) == (P, 1, b"", None, None)
    assert (intent.attempt, intent.deadline) == (3, deadline)
