"""Accounts and events as text and back."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels import model as m
from channels.descriptor import ChainSnapshot, Descriptor, Escrow, SessionProtocol
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.intent import Intent, IntentKind, IntentState
from channels.units import MAX_UINT96, PICO_PER_UNIT, Pico, Units
from mppnode.ledger.rows import (
    account_columns,
    intent_row,
    padded,
    read_account,
    read_intent,
    read_journal,
    terms_column,
    write_journal,
)
from tests.support.builders import opened as opened_account

UNITS = st.integers(0, MAX_UINT96).map(Units) | st.integers(0, 10**6).map(Units)
PICO = st.integers(0, MAX_UINT96 * PICO_PER_UNIT).map(Pico)
SECONDS = st.integers(0, 2**40).map(UnixSeconds)
HASH = st.binary(min_size=32, max_size=32).map(Hash32)
ADDRESS = st.binary(min_size=20, max_size=20).map(Address)
TEXT = st.text(max_size=20)
HOLD = st.text(min_size=1, max_size=20).map(m.HoldId)
VOUCHER = st.builds(m.Voucher, UNITS, st.binary(min_size=65, max_size=65))
NODE = TEXT.map(m.NodeId)
HELD = st.builds(
    lambda pair, *rest: m.Hold(max(pair), min(pair), *rest), st.tuples(PICO, PICO), NODE, st.booleans(), st.booleans()
)
LADDER = st.lists(VOUCHER, min_size=1, max_size=4, unique_by=lambda rung: rung.cumulative).map(
    lambda rungs: tuple(sorted(rungs, key=lambda rung: rung.cumulative))
)
CHAIN = st.builds(ChainSnapshot, UNITS, UNITS, st.none() | SECONDS, st.integers(0, 2**70))
RECORD = st.builds(m.CloseRecord, TEXT, UNITS, st.none() | UNITS, st.none() | HASH)
ESCROW = st.builds(Escrow, st.sampled_from(SessionProtocol), st.integers(1, 2**63), ADDRESS)
DESCRIPTOR = st.builds(Descriptor, ADDRESS, ADDRESS, ADDRESS, ADDRESS, HASH, ADDRESS, HASH)
CHANNEL = HASH.map(ChannelId)
ACCOUNT = st.builds(
    m.Account,
    id=CHANNEL,
    escrow=ESCROW,
    descriptor=DESCRIPTOR,
    phase=st.sampled_from(m.Phase),
    version=st.integers(1, 2**62),
    chain=CHAIN,
    ladder=LADDER,
    owed_pico=PICO,
    spent=UNITS,
    holds=st.dictionaries(HOLD, HELD, max_size=3).map(MappingProxyType),
    tickets=st.dictionaries(TEXT, SECONDS, max_size=3).map(MappingProxyType),
    top_ups=st.lists(st.tuples(HASH, HASH), max_size=3).map(tuple),
    close=st.none() | RECORD,
    active_at=SECONDS,
)
KEPT = ["chain", "ladder", "holds", "tickets", "top_ups", "close", "phase", "owed_pico", "spent", "active_at"]
OPENED = st.builds(
    m.Account,
    id=CHANNEL,
    escrow=ESCROW,
    descriptor=DESCRIPTOR,
    phase=st.just(m.Phase.OPEN),
    version=st.just(1),
    chain=CHAIN,
    ladder=LADDER,
    owed_pico=PICO,
    spent=UNITS,
    holds=st.just(MappingProxyType({})),
)
EVENTS: dict[type[Any], st.SearchStrategy[Any]] = {
    m.Opened: st.builds(m.Opened, OPENED),
    m.VoucherAccepted: st.builds(m.VoucherAccepted, LADDER),
    m.ToppedUp: st.builds(m.ToppedUp, HASH, HASH),
    m.ChainObserved: st.builds(m.ChainObserved, CHAIN, st.sampled_from(m.Phase)),
    m.Held: st.builds(m.Held, HOLD, PICO, TEXT, SECONDS, SECONDS, NODE, st.booleans()),
    m.EndAsked: st.builds(m.EndAsked, st.lists(HOLD, max_size=3).map(tuple)),
    m.Folded: st.builds(m.Folded, HOLD, PICO, PICO),
    m.Released: st.builds(m.Released, HOLD),
    m.CloseBegun: st.builds(m.CloseBegun, RECORD),
    m.CaptureFixed: st.builds(m.CaptureFixed, UNITS),
    m.CloseAborted: st.just(m.CloseAborted()),
    m.Closed: st.builds(m.Closed, HASH, CHAIN),
    m.Restored: st.builds(m.Restored, CHAIN, LADDER, PICO, st.sampled_from(m.Phase), st.none() | RECORD),
}


def test_every_event_has_a_strategy() -> None:
    """A new event cannot be forgotten here."""
    assert set(EVENTS) == set(get_args(m.Event))


@settings(max_examples=200)
@given(story=st.lists(st.one_of(*EVENTS.values()), max_size=6))
def test_events_survive_the_journal(story: list[m.Event]) -> None:
    """Every story reads back as itself, whatever its ladders do, and in plain text."""
    rows = write_journal(story, None)
    assert read_journal(rows) == story
    assert all(kind.isascii() and body.isascii() for kind, body in rows)


@settings(max_examples=50)
@given(start=ACCOUNT, ladders=st.lists(LADDER, min_size=1, max_size=4))
def test_a_journal_may_be_written_in_parts(start: m.Account, ladders: list[tuple[m.Voucher, ...]]) -> None:
    """Entries appended one commit after the other read the same as those written at once."""
    opened = replace(start, phase=m.Phase.OPEN, version=1, holds=MappingProxyType({}), tickets=MappingProxyType({}))
    opened = replace(opened, top_ups=(), close=None, active_at=UnixSeconds(0))
    rows, account = write_journal([m.Opened(opened)], None), opened
    for ladder in ladders:
        rows += write_journal([m.VoucherAccepted(ladder)], account)
        account = replace(account, ladder=ladder)
    assert read_journal(rows) == [m.Opened(opened), *(m.VoucherAccepted(ladder) for ladder in ladders)]


def test_a_voucher_is_one_short_entry() -> None:
    """The journal of a long ladder grows by the new rung, not by the ladder."""
    ladder = tuple(m.Voucher(Units(n), bytes(65)) for n in range(1, 65))
    opened = replace(opened_account(), ladder=ladder)
    (entry,) = write_journal([m.VoucherAccepted((*ladder[:-1], m.Voucher(Units(99), bytes(65))))], opened)
    assert len(entry[1]) < 250


def test_journals_of_schema_one_are_read() -> None:
    """Entries and rows written before holds had owners, when a voucher's entry was the whole ladder."""
    ladder = [["5", "11" * 65], ["9", "22" * 65]]
    rows = [
        ("VoucherAccepted", json.dumps(ladder)),
        ("Held", json.dumps(["h", "7", "t", 300, 200])),
        ("VoucherAccepted", json.dumps({"new": [["12", "33" * 65]], "gone": ["5"]})),
    ]
    accepted, held, later = read_journal(rows)
    assert accepted == m.VoucherAccepted((m.Voucher(Units(5), b"\x11" * 65), m.Voucher(Units(9), b"\x22" * 65)))
    assert held == m.Held(m.HoldId("h"), Pico(7), "t", UnixSeconds(300), UnixSeconds(200), m.NOBODY, True)
    assert isinstance(later, m.VoucherAccepted)
    assert [rung.cumulative for rung in later.ladder] == [9, 12]
    row = account_columns(opened_account(), None) | {"holds": '{"h":["7","3"]}'}
    assert read_account(bytes(32), terms_column(opened_account()), row).holds == {"h": m.Hold(Pico(7), Pico(3))}


@settings(max_examples=100)
@given(
    intent=st.builds(
        Intent,
        TEXT,
        CHANNEL,
        st.sampled_from(IntentKind),
        UNITS,
        NODE,
        st.sampled_from(IntentState),
        st.integers(1, 2**31),
        SECONDS,
        SECONDS,
        st.integers(1, 9),
        deadline=st.none() | st.integers(0, 2**70).map(UnixSeconds),
        raw=st.binary(max_size=30),
        tx_hash=st.none() | HASH,
        valid_before=st.none() | SECONDS,
        block=st.none() | st.integers(0, 2**256 - 1),
    )
)
def test_intents_survive_their_row(intent: Intent) -> None:
    """Every intent reads back as itself, also with numbers of the chain that no database integer holds."""
    assert read_intent(intent_row(intent)) == intent


@settings(max_examples=200)
@given(account=ACCOUNT)
def test_accounts_survive_their_row(account: m.Account) -> None:
    """Every account reads back as itself from the columns that are written for a new row."""
    assert read_account(account.id, terms_column(account), account_columns(account, None)) == account


@settings(max_examples=200)
@given(before=ACCOUNT, after=ACCOUNT, kept=st.sets(st.sampled_from(KEPT)))
def test_an_update_writes_all_that_changed(before: m.Account, after: m.Account, kept: set[str]) -> None:
    """The old row with the changed columns over it is the new account; an untouched field may be left out."""
    changed = replace(after, id=before.id, escrow=before.escrow, descriptor=before.descriptor)
    changed = replace(changed, **{name: getattr(before, name) for name in kept})
    row = account_columns(before, None) | account_columns(changed, before)
    assert read_account(before.id, terms_column(before), row) == changed


@pytest.mark.parametrize(("kind", "body"), [("Doubled", "[]"), ("Held", '["h","70","t"]'), ("Held", '["h","70","t",1,2,"n"]')])
def test_an_event_this_program_does_not_know_is_not_guessed(kind: str, body: str) -> None:
    """A newer journal, or a damaged one, stops the reader."""
    with pytest.raises((KeyError, ValueError)):
        read_journal([(kind, body)])


@given(amounts=st.lists(PICO | UNITS, min_size=2, max_size=5))
def test_padded_amounts_sort_like_numbers(amounts: list[int]) -> None:
    """The database compares text; the order is that of the amounts, up to the largest."""
    assert sorted(amounts) == [int(text) for text in sorted(map(padded, amounts))]
    assert len({len(padded(amount)) for amount in amounts}) == 1
