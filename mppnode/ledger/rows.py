"""Accounts and events as text columns and back.

Amounts are zero-padded decimal text: SQLite integers have 64 bits, uint96 does not fit, and padded text compares in
numeric order, so CHECK constraints and an operator's eye both work on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from channels.account import check
from channels.descriptor import ChainSnapshot, Descriptor, Escrow, SessionProtocol
from channels.ids import Address, ChannelId, Hash32, to_hex
from channels.instants import UnixSeconds
from channels.intent import Intent, IntentKind, IntentState
from channels.model import (
    Account,
    CaptureFixed,
    ChainObserved,
    CloseAborted,
    CloseBegun,
    Closed,
    CloseRecord,
    EndAsked,
    Event,
    Folded,
    Held,
    Hold,
    HoldId,
    NodeId,
    Opened,
    Phase,
    Released,
    Restored,
    ToppedUp,
    Voucher,
    VoucherAccepted,
)
from channels.units import Pico, Units, units
from mppnode.ledger.base import Grant

_WIDTH: Final = 36  # digits of 2**96 units in pico: 35, and one to spare

Json = Any


def padded(amount: int) -> str:
    """An amount as sortable text."""
    assert amount >= 0
    return f"{amount:0{_WIDTH}d}"


def dumps(value: Json) -> str:
    """Compact JSON text of plain values."""
    return json.dumps(value, separators=(",", ":"))


# ------------------------------------------------------------------------------------------------------ value codecs


def _chain(chain: ChainSnapshot) -> Json:
    return [str(chain.deposit), str(chain.settled), chain.close_requested_at, chain.block]


def _read_chain(row: Json) -> ChainSnapshot:
    deposit, settled, requested, block = row
    at = None if requested is None else UnixSeconds(requested)
    return ChainSnapshot(units(int(deposit)), units(int(settled)), at, block)


def _ladder(ladder: tuple[Voucher, ...]) -> Json:
    return [[str(rung.cumulative), rung.signature.hex()] for rung in ladder]


def _read_ladder(rows: Json) -> tuple[Voucher, ...]:
    return tuple(Voucher(units(int(amount)), bytes.fromhex(signature)) for amount, signature in rows)


def _holds(holds: Mapping[HoldId, Hold]) -> Json:
    return {
        name: [str(hold.granted), str(hold.consumed), hold.owner, hold.stream, hold.ending]
        for name, hold in holds.items()
    }


def _read_holds(rows: Json) -> Mapping[HoldId, Hold]:
    return MappingProxyType({HoldId(name): _read_hold(*row) for name, row in rows.items()})


def _read_hold(granted: str, consumed: str, owner: str = "", stream: bool = True, ending: bool = False) -> Hold:  # noqa: FBT001, FBT002 - a row
    # The defaults are schema 1, whose holds had no owner.
    return Hold(Pico(int(granted)), Pico(int(consumed)), NodeId(owner), stream, ending)


def _close(record: CloseRecord | None) -> Json:
    if record is None:
        return None
    capture = None if record.capture is None else str(record.capture)
    return [record.challenge_id, str(record.cumulative), capture, record.tx_hash.hex() if record.tx_hash else None]


def _read_close(row: Json) -> CloseRecord | None:
    if row is None:
        return None
    challenge_id, cumulative, capture, tx_hash = row
    return CloseRecord(
        challenge_id,
        units(int(cumulative)),
        None if capture is None else units(int(capture)),
        None if tx_hash is None else Hash32(bytes.fromhex(tx_hash)),
    )


def _terms(account: Account) -> Json:
    d, e = account.descriptor, account.escrow
    parts = (d.payer, d.payee, d.operator, d.token, d.salt, d.authorized_signer, d.expiring_nonce_hash)
    return [e.protocol.value, e.chain_id, e.address.hex(), *(part.hex() for part in parts)]


def read_terms(row: Json) -> tuple[Escrow, Descriptor]:
    """The inverse of :func:`terms_column`, of decoded JSON."""
    protocol, chain_id, escrow, *parts = row
    payer, payee, operator, token, salt, signer, nonce_hash = (bytes.fromhex(part) for part in parts)
    return (
        Escrow(SessionProtocol(protocol), chain_id, Address(bytes.fromhex(escrow))),
        Descriptor(
            payer=Address(payer),
            payee=Address(payee),
            operator=Address(operator),
            token=Address(token),
            salt=Hash32(salt),
            authorized_signer=Address(signer),
            expiring_nonce_hash=Hash32(nonce_hash),
        ),
    )


# --------------------------------------------------------------------------------------------------------- accounts

COLUMNS: Final[tuple[str, ...]] = (
    "phase",
    "version",
    "deposit",
    "settled",
    "accepted",
    "spent",
    "owed_pico",
    "held_pico",
    "chain",
    "ladder",
    "holds",
    "tickets",
    "top_ups",
    "close",
    "active_at",
    "live",
)
"""Mutable columns of ``channel``, in the order of :func:`account_columns`."""


def terms_column(account: Account) -> str:
    """The immutable part of an account, written once."""
    return dumps(_terms(account))


def account_columns(account: Account, before: Account | None) -> dict[str, str | int]:
    """The columns that differ from ``before``.

    ``replace`` keeps the identity of untouched fields, so "did it change" is a pointer comparison, and a renewal of a
    hold does not rewrite ten kilobytes of ladder.
    """
    columns: dict[str, str | int] = {"version": account.version}
    # Only on a change: an index stands on phase and on live, and naming a column in an update touches its indexes.
    if before is None or account.phase is not before.phase:
        columns["phase"] = account.phase.value
    if before is None or bool(account.holds) != bool(before.holds):
        columns["live"] = int(bool(account.holds))
    if before is None or account.chain is not before.chain:
        columns |= {
            "deposit": padded(account.chain.deposit),
            "settled": padded(account.chain.settled),
            "chain": dumps(_chain(account.chain)),
        }
    if before is None or account.ladder is not before.ladder:
        columns |= {"accepted": padded(account.accepted), "ladder": dumps(_ladder(account.ladder))}
    if before is None or account.holds is not before.holds:
        columns |= {"held_pico": padded(account.held_pico), "holds": dumps(_holds(account.holds))}
    # By value: a restore raises both without touching a hold.
    if before is None or account.owed_pico != before.owed_pico or account.spent != before.spent:
        columns |= {"spent": padded(account.spent), "owed_pico": padded(account.owed_pico)}
    if before is None or account.tickets is not before.tickets:
        columns["tickets"] = dumps(dict(account.tickets))
    if before is None or account.top_ups is not before.top_ups:
        columns["top_ups"] = dumps([[a.hex(), b.hex()] for a, b in account.top_ups])
    if before is None or account.close is not before.close:
        columns["close"] = dumps(_close(account.close))
    if before is None or account.active_at != before.active_at:
        columns["active_at"] = account.active_at
    return columns


def read_account(channel: bytes, terms: str, columns: Mapping[str, Any]) -> Account:
    """Rebuild an account from its row; the inverse of :func:`terms_column` and :func:`account_columns`."""
    escrow, descriptor = read_terms(json.loads(terms))
    tickets = {name: UnixSeconds(at) for name, at in json.loads(columns["tickets"]).items()}
    top_ups = json.loads(columns["top_ups"])
    return Account(
        id=ChannelId(channel),
        escrow=escrow,
        descriptor=descriptor,
        phase=Phase(columns["phase"]),
        version=columns["version"],
        chain=_read_chain(json.loads(columns["chain"])),
        ladder=_read_ladder(json.loads(columns["ladder"])),
        owed_pico=int(columns["owed_pico"]),
        spent=units(int(columns["spent"])),
        holds=_read_holds(json.loads(columns["holds"])),
        tickets=MappingProxyType(tickets),
        top_ups=tuple((Hash32(bytes.fromhex(a)), Hash32(bytes.fromhex(b))) for a, b in top_ups),
        close=_read_close(json.loads(columns["close"])),
        active_at=UnixSeconds(columns["active_at"]),
    )


class BrokenRow(AssertionError):
    """A row that is no account, or one that breaks a law. Its channel stops, and no other."""


def checked_account(channel: bytes, terms: str, columns: Mapping[str, Any]) -> Account:
    """The account in a row, checked. Raises ``BrokenRow``, whatever is wrong with it."""
    try:
        account = read_account(channel, terms, columns)
        check(account)
    except Exception as error:
        raise BrokenRow(f"the row of channel {to_hex(channel)} is broken: {error!r}") from error
    return account


# ----------------------------------------------------------------------------------------------------------- events


def write_journal(events: Iterable[Event], before: Account | None) -> list[tuple[str, str]]:
    """Events as (kind, body), to be appended to the journal of ``before``."""
    rows = []
    ladder: tuple[Voucher, ...] = () if before is None else before.ladder
    for event in events:
        rows.append((type(event).__name__, dumps(_event_body(event, ladder))))
        ladder = _ladder_after(event, ladder)
    return rows


def read_journal(rows: Iterable[tuple[str, str]]) -> list[Event]:
    """The whole journal of one channel, from its first entry; an unknown kind is a newer journal than this code."""
    events: list[Event] = []
    ladder: tuple[Voucher, ...] = ()
    for kind, body in rows:
        row = json.loads(body)
        event: Event = _read_accepted(row, ladder) if kind == "VoucherAccepted" else _READERS[kind](row)
        events.append(event)
        ladder = _ladder_after(event, ladder)
    return events


def _ladder_after(event: Event, ladder: tuple[Voucher, ...]) -> tuple[Voucher, ...]:
    if isinstance(event, Opened):
        return event.account.ladder
    return event.ladder if isinstance(event, (VoucherAccepted, Restored)) else ladder


def _ladder_change(before: tuple[Voucher, ...], after: tuple[Voucher, ...]) -> Json:
    # The whole ladder in every entry would be ten kilobytes a voucher; an entry is what is new and what went. By
    # identity: rungs that stay are the same objects, and an equal one that is not is merely written as gone and new.
    old, kept = {id(rung) for rung in before}, {id(rung) for rung in after}
    return {
        "new": _ladder(tuple(rung for rung in after if id(rung) not in old)),
        "gone": [str(rung.cumulative) for rung in before if id(rung) not in kept],
    }


def _read_accepted(row: Json, before: tuple[Voucher, ...]) -> VoucherAccepted:
    if isinstance(row, list):  # schema 1 wrote the whole ladder
        return VoucherAccepted(_read_ladder(row))
    gone = {int(amount) for amount in row["gone"]}
    rungs = (*(rung for rung in before if rung.cumulative not in gone), *_read_ladder(row["new"]))
    return VoucherAccepted(tuple(sorted(rungs, key=lambda rung: rung.cumulative)))


def _event_body(event: Event, ladder: tuple[Voucher, ...]) -> Json:
    match event:
        case Opened():
            a = event.account
            return [a.id.hex(), _terms(a), _chain(a.chain), _ladder(a.ladder), str(a.owed_pico), str(a.spent)]
        case VoucherAccepted():
            return _ladder_change(ladder, event.ladder)
        case ToppedUp():
            return [event.credential.hex(), event.tx_hash.hex()]
        case ChainObserved():
            return [_chain(event.chain), event.phase.value]
        case Held():
            used = [event.ticket, event.ticket_expires, event.now]
            return [event.hold, str(event.granted), *used, event.owner, event.stream]
        case EndAsked():
            return list(event.holds)
        case Folded():
            return [event.hold, str(event.consumed), str(event.granted)]
        case Released():
            return event.hold
        case CloseBegun():
            return _close(event.record)
        case CaptureFixed():
            return str(event.capture)
        case CloseAborted():
            return None
        case Closed():
            return [event.tx_hash.hex(), _chain(event.chain)]
        case Restored():
            ladder, close = _ladder(event.ladder), _close(event.close)
            return [_chain(event.chain), ladder, str(event.owed_pico), event.phase.value, close]


def _read_opened(row: Json) -> Event:
    channel, terms, chain, ladder, owed, spent = row
    escrow, descriptor = read_terms(terms)
    return Opened(
        Account(
            id=ChannelId(bytes.fromhex(channel)),
            escrow=escrow,
            descriptor=descriptor,
            phase=Phase.OPEN,
            version=1,
            chain=_read_chain(chain),
            ladder=_read_ladder(ladder),
            owed_pico=int(owed),
            spent=units(int(spent)),
            holds=MappingProxyType({}),
        )
    )


def _read_held(row: Json) -> Event:
    hold, granted, ticket, expires, now, *later = row  # schema 1 ends here
    owner, stream = later or ("", True)
    return Held(HoldId(hold), Pico(int(granted)), ticket, UnixSeconds(expires), UnixSeconds(now), NodeId(owner), stream)


def _read_begun(row: Json) -> Event:
    record = _read_close(row)
    assert record is not None
    return CloseBegun(record)


_READERS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "Opened": _read_opened,
        "ToppedUp": lambda row: ToppedUp(Hash32(bytes.fromhex(row[0])), Hash32(bytes.fromhex(row[1]))),
        "ChainObserved": lambda row: ChainObserved(_read_chain(row[0]), Phase(row[1])),
        "Held": _read_held,
        "EndAsked": lambda row: EndAsked(tuple(HoldId(name) for name in row)),
        "Folded": lambda row: Folded(HoldId(row[0]), Pico(int(row[1])), Pico(int(row[2]))),
        "Released": lambda row: Released(HoldId(row)),
        "CloseBegun": _read_begun,
        "CaptureFixed": lambda row: CaptureFixed(Units(int(row))),
        "CloseAborted": lambda _row: CloseAborted(),
        "Closed": lambda row: Closed(Hash32(bytes.fromhex(row[0])), _read_chain(row[1])),
        "Restored": lambda row: Restored(
            _read_chain(row[0]), _read_ladder(row[1]), int(row[2]), Phase(row[3]), _read_close(row[4])
        ),
    }
)


# ----------------------------------------------------------------------------------------------- intents and grants

INTENT_COLUMNS: Final[tuple[str, ...]] = (
    "id",
    "channel",
    "kind",
    "amount",
    "owner",
    "state",
    "version",
    "created_at",
    "updated_at",
    "attempt",
    "deadline",
    "raw",
    "tx_hash",
    "valid_before",
    "block",
)
"""Columns of ``intent``, in the order of :func:`intent_row`."""


def intent_row(intent: Intent) -> tuple[str | int | bytes | None, ...]:
    """An intent as column values. What the chain said is text: its numbers need not fit 64 bits."""
    return (
        intent.id,
        intent.channel,
        intent.kind.value,
        padded(intent.amount),
        intent.owner,
        intent.state.value,
        intent.version,
        intent.created_at,
        intent.updated_at,
        intent.attempt,
        None if intent.deadline is None else str(intent.deadline),
        intent.raw,
        intent.tx_hash,
        intent.valid_before,
        None if intent.block is None else str(intent.block),
    )


def read_intent(row: Sequence[Any]) -> Intent:
    """The inverse of :func:`intent_row`."""
    name, channel, kind, amount, owner, state, version, created, updated, attempt, deadline, raw, tx, valid, block = row
    return Intent(
        name,
        ChannelId(channel),
        IntentKind(kind),
        units(int(amount)),
        NodeId(owner),
        IntentState(state),
        version,
        UnixSeconds(created),
        UnixSeconds(updated),
        attempt,
        deadline=None if deadline is None else UnixSeconds(int(deadline)),
        raw=raw,
        tx_hash=None if tx is None else Hash32(tx),
        valid_before=None if valid is None else UnixSeconds(valid),
        block=None if block is None else int(block),
    )


def read_grant(row: Sequence[Any]) -> Grant:
    """A grant from its transaction, sender, most it may cost, and end of validity."""
    tx_hash, sender, fee_max, valid_before = row
    return Grant(Hash32(tx_hash), Address(sender), units(int(fee_max)), UnixSeconds(valid_before))
