"""The channel account: every transition of money permitted, held, charged and captured, in one pure file.

Theory of operation
-------------------
``plan(account, command, now, policy)`` decides; ``fold(account, event)`` applies; ``plan`` builds its result
with ``fold``, so replaying the journal always rebuilds the account. A store runs ``plan`` inside its transaction and
may run it again, which is safe because nothing here reads a clock, a file or a socket.

Four numbers matter (README of this package has the table):

* ``accepted``  base units the payer has signed for: the last rung of the ladder;
* ``owed``      pico-dollars charged for delivered work, exact. It falls only when a final usage report shows a
                stream was over-counted: the difference is credit, used up before anything new is charged;
* ``spent``     base units ever charged, ``max over time of floor(owed)``. Monotone, because people have been shown it;
* ``held``      pico-dollars reserved by live requests and not yet charged: the sum over holds of granted - consumed.

The law: ``owed + held <= accepted * 10**6`` after every step. Holds are kept in pico, not in units, because only then
are folding and releasing linear: with unit holds the dust of one stream can tip another over its own hold.

A hold's ``granted`` never shrinks while its owner lives, since the owner delivers against the copy it was given.
Recovery releases an orphaned hold at its last recorded ``consumed``: charging the window instead would bill work
nobody may have received.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from types import MappingProxyType
from typing import Final, assert_never

from channels.descriptor import ChainSnapshot
from channels.faults import ChannelFault, Reason
from channels.instants import UnixSeconds
from channels.model import (
    TOP_UPS_MAX,
    AbortClose,
    AcceptVoucher,
    Account,
    BeginClose,
    CaptureFixed,
    ChainObserved,
    CloseAborted,
    CloseBegun,
    Closed,
    CloseRecord,
    Command,
    ConfirmClosed,
    EndAsked,
    EndStreams,
    Event,
    Finish,
    FixCapture,
    Folded,
    Held,
    Hold,
    HoldId,
    ObserveChain,
    Open,
    Opened,
    Outcome,
    Phase,
    Plan,
    RecordTopUp,
    Released,
    ReleaseOrphans,
    Renew,
    Reserve,
    Restore,
    Restored,
    ToppedUp,
    Voucher,
    VoucherAccepted,
)
from channels.policy import Policy
from channels.units import PICO_PER_UNIT, Pico, Units, units_ceil

_LIVE: Final = frozenset({Phase.OPEN, Phase.CONTESTED, Phase.CLOSING, Phase.SUSPECT})
TRANSITIONS: Final[Mapping[type[Command], frozenset[Phase]]] = MappingProxyType(
    {
        AcceptVoucher: frozenset({Phase.OPEN}),
        RecordTopUp: frozenset({Phase.OPEN, Phase.CONTESTED}),
        Reserve: frozenset({Phase.OPEN}),
        Renew: _LIVE,
        Finish: _LIVE,
        EndStreams: frozenset({Phase.OPEN}),
        ReleaseOrphans: _LIVE,
        ObserveChain: frozenset(Phase) - {Phase.CLOSED},
        BeginClose: frozenset({Phase.OPEN, Phase.CONTESTED, Phase.CLOSING, Phase.CAPTURED}),
        FixCapture: frozenset({Phase.CLOSING, Phase.CAPTURED}),
        AbortClose: frozenset({Phase.CLOSING, Phase.CAPTURED}),
        ConfirmClosed: frozenset({Phase.CAPTURED, Phase.CLOSED}),
        Restore: frozenset(Phase) - {Phase.CLOSED},
    }
)
"""From which phases a command is heard at all; a phase that is missing is the refusal."""


def plan(account: Account | None, command: Command, *, now: UnixSeconds, policy: Policy) -> Plan[Outcome]:
    """Decide what ``command`` does to ``account``.

    Raises:
        ChannelFault: every refusal; the account is then untouched.
    """
    if isinstance(command, Open):
        return _open(account, command, policy)
    if account is None:
        raise ChannelFault(Reason.CHANNEL_NOT_FOUND, detail="no such channel")
    if isinstance(command, RecordTopUp | AcceptVoucher) and (replay := _replay(account, command)) is not None:
        return replay
    if account.phase not in TRANSITIONS[type(command)]:
        raise ChannelFault(Reason.CHANNEL_FINALIZED, detail=f"the channel is {account.phase}")
    match command:
        case AcceptVoucher():
            return _accept(account, command.voucher, policy)
        case RecordTopUp():
            return _top_up(account, command)
        case Reserve():
            return _reserve(account, command, now, policy)
        case Renew():
            return _renew(account, command)
        case Finish():
            return _finish(account, command)
        case EndStreams() | ReleaseOrphans():
            return _planned(account, *_end_holds(account, command))
        case Restore():
            return _restore(account, command, policy)
        case ObserveChain():
            return _planned(account, *_seen(account, command.chain))
        case BeginClose() | FixCapture() | AbortClose() | ConfirmClosed():
            return _closing(account, command, policy)
        case _:
            assert_never(command)


def _planned(account: Account, *events: Event, result: Outcome | None = None) -> Plan[Outcome]:
    after = reduce(fold, events, account)
    check(after)
    return Plan(after, events, result or Outcome(replayed=not events))


def _open(account: Account | None, command: Open, policy: Policy) -> Plan[Outcome]:
    if account is not None:
        # The id contains the hash of the opening transaction, so a second open of it is a repeat of the first.
        if account.phase is not Phase.OPEN:
            raise ChannelFault(Reason.CHANNEL_FINALIZED, detail=f"the channel is {account.phase}")
        return _planned(account)
    deposit, cumulative = command.chain.deposit, command.voucher.cumulative
    if deposit < policy.deposit_units_min:
        raise ChannelFault(
            Reason.DEPOSIT_TOO_SMALL,
            field="deposit",
            detail="is too small",
            deposit=deposit,
            least=policy.deposit_units_min,
        )
    if cumulative > deposit:
        raise _exceeds(cumulative, deposit)
    if command.chain.close_requested_at is not None:
        raise ChannelFault(Reason.CHANNEL_FINALIZED, detail="the payer has asked the chain to close this channel")
    if cumulative < command.chain.settled:
        raise ChannelFault(
            Reason.VOUCHER_TOO_LOW,
            field="cumulativeAmount",
            detail="is below what the chain has paid out",
            cumulative=cumulative,
            settled=command.chain.settled,
        )
    opened = Account(
        id=command.id,
        escrow=command.escrow,
        descriptor=command.descriptor,
        phase=Phase.OPEN,
        version=1,
        chain=command.chain,
        ladder=(command.voucher,),
        # What the chain already paid out was earned before we lost our books: it is never earned again.
        owed_pico=command.chain.settled * PICO_PER_UNIT,
        spent=command.chain.settled,
        holds=MappingProxyType({}),
    )
    check(opened)
    return Plan(opened, (Opened(opened),), Outcome())


def _exceeds(cumulative: int, deposit: int) -> ChannelFault:
    return ChannelFault(
        Reason.VOUCHER_EXCEEDS_DEPOSIT,
        field="cumulativeAmount",
        detail="is above the deposit",
        cumulative=cumulative,
        deposit=deposit,
    )


def _replay(account: Account, command: RecordTopUp | AcceptVoucher) -> Plan[Outcome] | None:
    """Repeats are recognised before anything else, so an honest retry never meets a new error."""
    match command:
        case RecordTopUp():
            for credential, tx_hash in account.top_ups:
                if credential == command.credential:
                    return Plan(account, (), Outcome(replayed=True, tx_hash=tx_hash))
        case AcceptVoucher():
            if account.phase is Phase.OPEN and command.voucher.cumulative == account.accepted:
                return Plan(account, (), Outcome(replayed=True))
        case _:
            assert_never(command)
    return None


def _accept(account: Account, voucher: Voucher, policy: Policy) -> Plan[Outcome]:
    accepted, cumulative = account.accepted, voucher.cumulative
    if cumulative > account.chain.deposit:
        raise _exceeds(cumulative, account.chain.deposit)
    if cumulative < accepted:
        raise ChannelFault(
            Reason.VOUCHER_TOO_LOW,
            field="cumulativeAmount",
            detail="is below the accepted voucher",
            cumulative=cumulative,
            accepted=accepted,
        )
    if cumulative - accepted < policy.voucher_delta_units_min:
        raise ChannelFault(
            Reason.VOUCHER_DELTA_TOO_SMALL,
            field="cumulativeAmount",
            detail="advances too little",
            cumulative=cumulative,
            accepted=accepted,
            least=policy.voucher_delta_units_min,
        )
    return _planned(account, VoucherAccepted(_thin((*account.ladder, voucher), account.final, policy.ladder_max)))


def _thin(ladder: tuple[Voucher, ...], final: int, limit: int) -> tuple[Voucher, ...]:
    """Keep the greatest rung <= final (what settlement may use now), every rung above it, and never lose the highest.

    By ``final`` and not by ``spent``: a credit at the end of a stream would leave no rung that may still be cashed.
    When rungs above it outgrow the limit, the one whose loss leaves the smallest gap goes, so settlement later
    is at most a gap below what was spent; it is never above.
    """
    settled_by = sum(1 for rung in ladder if rung.cumulative <= final)
    kept = list(ladder[max(settled_by - 1, 0) :])
    while len(kept) > limit:
        inner = range(1, len(kept) - 1)
        del kept[min(inner, key=lambda i: kept[i + 1].cumulative - kept[i - 1].cumulative)]
    return tuple(kept)


def _top_up(account: Account, command: RecordTopUp) -> Plan[Outcome]:
    recorded = ToppedUp(command.credential, command.tx_hash)
    return _planned(account, recorded, *_seen(account, command.chain), result=Outcome(tx_hash=command.tx_hash))


def _reserve(account: Account, command: Reserve, now: UnixSeconds, policy: Policy) -> Plan[Outcome]:
    assert 0 < command.floor <= command.want
    if command.hold in account.holds:
        return Plan(account, (), Outcome(replayed=True, granted=account.holds[command.hold].granted))
    live_tickets = sum(1 for expires in account.tickets.values() if expires > now)
    if command.ticket in account.tickets:
        raise ChannelFault(Reason.CREDENTIAL_USED, detail="this credential has already bought a response")
    if live_tickets >= policy.tickets_max:
        raise ChannelFault(Reason.RATE_LIMITED, detail="too many requests on this channel", limit=policy.tickets_max)
    # A newcomer fences the older stream: its hold ends at what it last recorded, and its next renewal is refused.
    events: list[Event] = [Released(hold) for hold in account.streams] if command.preempt else []
    after = reduce(fold, events, account)
    if command.stream and after.streams:
        raise ChannelFault(Reason.CHANNEL_BUSY, detail="another stream runs on this channel")
    if len(after.holds) >= policy.holds_max:
        raise ChannelFault(Reason.CHANNEL_BUSY, detail="too many live requests on this channel", limit=policy.holds_max)
    if after.spent - after.chain.settled >= policy.unsettled_units_max:
        raise ChannelFault(
            Reason.EXPOSURE_LIMIT,
            detail="this channel owes too much that the chain has not paid out yet",
            spent=after.spent,
            settled=after.chain.settled,
            limit=policy.unsettled_units_max,
        )
    if after.headroom_pico < command.floor:
        raise insufficient(after, command.floor)
    granted = Pico(min(command.want, after.headroom_pico))
    expires = command.ticket_expires
    events.append(Held(command.hold, granted, command.ticket, expires, now, command.owner, command.stream))
    return _planned(account, *events, result=Outcome(granted=granted))


def insufficient(account: Account, need_pico: int) -> ChannelFault:
    """The refusal that tells the payer which cumulative amount would do; rounding up only asks, it never takes."""
    return ChannelFault(
        Reason.INSUFFICIENT_BALANCE,
        detail="the accepted voucher does not cover this request",
        accepted=account.accepted,
        required=units_ceil(account.owed_pico + account.held_pico + need_pico),
        deposit=account.chain.deposit,
    )


def _hold(account: Account, hold_id: HoldId) -> Hold:
    hold = account.holds.get(hold_id)
    if hold is None:
        raise ChannelFault(Reason.HOLD_FENCED, detail="this request no longer owns its reservation")
    return hold


def _renew(account: Account, command: Renew) -> Plan[Outcome]:
    hold = _hold(account, command.hold)
    assert hold.consumed <= command.consumed, "delivery ran backwards"
    if command.consumed > hold.granted:
        # A database that failed over has lost the extension this was delivered under. Ending the request bills it as
        # far as the voucher goes; extending the older hold would go on without knowing what else was lost.
        raise ChannelFault(Reason.HOLD_FENCED, detail="the ledger has lost what this request was delivered under")
    extended = account.phase is Phase.OPEN and not hold.ending
    wanted = max(command.want - hold.granted, 0) if extended else 0
    # Folding moves value from held to owed, so headroom is the same before and after it.
    granted = Pico(hold.granted + min(wanted, account.headroom_pico))
    if granted == hold.granted and command.consumed == hold.consumed:
        return Plan(account, (), Outcome(replayed=True, granted=granted))
    return _planned(account, Folded(command.hold, command.consumed, granted), result=Outcome(granted=granted))


def _finish(account: Account, command: Finish) -> Plan[Outcome]:
    hold = _hold(account, command.hold)
    payable = Pico(min(command.total, hold.granted + account.headroom_pico))
    return _planned(
        account,
        Folded(command.hold, payable, Pico(max(hold.granted, payable))),
        Released(command.hold),
        result=Outcome(unpaid=Pico(command.total - payable)),
    )


def _end_holds(account: Account, command: EndStreams | ReleaseOrphans) -> tuple[Event, ...]:
    if isinstance(command, EndStreams):
        asked = tuple(hold for hold in account.streams if not account.holds[hold].ending)
        return (EndAsked(asked),) if asked else ()
    owner = command.owner
    return tuple(Released(name) for name, hold in account.holds.items() if owner is None or hold.owner == owner)


def _is_newer(account: Account, chain: ChainSnapshot) -> bool:
    return chain.block >= account.chain.block and chain != account.chain


def _phase_on_chain(account: Account, chain: ChainSnapshot) -> Phase:
    if chain.deposit == 0:
        return Phase.CLOSED  # v2 deletes the slot on close and withdraw; v1 reads zero deposit once finalised
    if chain.deposit < account.accepted or chain.settled > account.spent:
        return Phase.SUSPECT
    if account.close is not None:  # not the phase: a close that was in doubt goes on where it was
        return Phase.CLOSING if account.close.capture is None else Phase.CAPTURED
    return _usable(chain)


def _usable(chain: ChainSnapshot) -> Phase:
    return Phase.OPEN if chain.close_requested_at is None else Phase.CONTESTED


def _seen(account: Account, chain: ChainSnapshot) -> tuple[Event, ...]:
    """What a look at the chain changes: nothing if it is no news; the end of every hold if it is the channel's end."""
    if not _is_newer(account, chain):
        return ()
    phase = _phase_on_chain(account, chain)
    released = (Released(hold) for hold in account.holds) if phase is Phase.CLOSED else ()
    return (*released, ChainObserved(chain, phase))


def _closing(
    account: Account, command: BeginClose | FixCapture | AbortClose | ConfirmClosed, policy: Policy
) -> Plan[Outcome]:
    match command:
        case BeginClose():
            return _begin_close(account, command, policy)
        case FixCapture():
            if account.phase is Phase.CAPTURED:
                return Plan(account, (), Outcome(replayed=True))
            if account.holds:
                held = len(account.holds)
                raise ChannelFault(Reason.CHANNEL_BUSY, detail="live requests still hold money", holds=held)
            return _planned(account, CaptureFixed(account.capturable))
        case AbortClose():
            return _planned(account, CloseAborted())
        case ConfirmClosed():
            return _confirm_closed(account, command)
        case _:
            assert_never(command)


def _confirm_closed(account: Account, command: ConfirmClosed) -> Plan[Outcome]:
    record = account.close
    if account.phase is Phase.CLOSED:
        if record is not None and record.tx_hash == command.tx_hash:
            return Plan(account, (), Outcome(replayed=True))
        if record is None or record.capture is None or record.tx_hash is not None:
            raise ChannelFault(Reason.CHANNEL_FINALIZED, detail="the channel was closed by somebody else")
    return _planned(account, Closed(command.tx_hash, command.chain))


def _restore(account: Account, command: Restore, policy: Policy) -> Plan[Outcome]:
    chain, owed = command.chain, max(account.owed_pico, command.chain.settled * PICO_PER_UNIT)
    if chain.block < account.chain.block:
        # An older look may show a lower deposit, and the vouchers above it would be dropped for good.
        raise ChannelFault(Reason.CHAIN_UNAVAILABLE, detail="the chain's word is older than the books")
    if chain.deposit == 0:
        return _planned(account, *_seen(account, chain))
    rungs = {rung.cumulative: rung for rung in (*command.vouchers, *account.ladder) if rung.cumulative <= chain.deposit}
    ladder = _thin(tuple(rungs[amount] for amount in sorted(rungs)), owed // PICO_PER_UNIT, policy.ladder_max)
    if not ladder or ladder[-1].cumulative * PICO_PER_UNIT < max(owed, account.spent * PICO_PER_UNIT):
        raise ChannelFault(Reason.VOUCHER_TOO_LOW, detail="no voucher covers what was charged or paid out")
    record = account.close
    if record is not None and record.capture is not None and record.capture < chain.settled:
        record = None  # that capture was fixed from older books and can never be included
    begun = Phase.CLOSING if record is not None and record.capture is None else Phase.CAPTURED
    restored = Restored(chain, ladder, owed, _usable(chain) if record is None else begun, record)
    return _planned(account, *(Released(hold) for hold in account.holds), restored)


def _begin_close(account: Account, command: BeginClose, policy: Policy) -> Plan[Outcome]:
    if account.phase in (Phase.CLOSING, Phase.CAPTURED):
        if account.close is not None and account.close.challenge_id == command.challenge_id:
            return Plan(account, (), Outcome(replayed=True))
        raise ChannelFault(Reason.CHANNEL_FINALIZED, detail="the channel is already closing")
    voucher = command.voucher
    if voucher is None:
        return _planned(account, CloseBegun(CloseRecord(command.challenge_id, account.accepted)))
    least = max(account.spent, account.chain.settled)
    if voucher.cumulative < least:
        raise ChannelFault(
            Reason.CLOSE_BELOW_SPENT,
            field="cumulativeAmount",
            detail="is below what was spent",
            cumulative=voucher.cumulative,
            spent=least,
        )
    if voucher.cumulative > account.chain.deposit:
        raise _exceeds(voucher.cumulative, account.chain.deposit)
    events: list[Event] = []
    if all(rung.cumulative != voucher.cumulative for rung in account.ladder):
        # Also between the rungs: v1 pays whole vouchers, and a payer who closes signs exactly what was spent. Thinned
        # before it joins them, or it could be the one that goes.
        kept = _thin(account.ladder, account.final, policy.ladder_max)
        events.append(VoucherAccepted(tuple(sorted((*kept, voucher), key=lambda rung: rung.cumulative))))
    return _planned(account, *events, CloseBegun(CloseRecord(command.challenge_id, voucher.cumulative)))


# ------------------------------------------------------------------------------------------------------------- fold


def fold(account: Account | None, event: Event) -> Account:
    """Apply one event. Never refuses: an event is a fact."""
    if isinstance(event, Opened):
        return event.account
    assert account is not None, "only Opened comes first"
    version = account.version + 1
    match event:
        case VoucherAccepted():
            return replace(account, version=version, ladder=event.ladder)
        case ToppedUp():
            kept = (*account.top_ups, (event.credential, event.tx_hash))[-TOP_UPS_MAX:]
            return replace(account, version=version, top_ups=kept)
        case ChainObserved():
            return replace(account, version=version, chain=event.chain, phase=event.phase)
        case Held():
            tickets = {ticket: at for ticket, at in account.tickets.items() if at > event.now}
            tickets[event.ticket] = event.ticket_expires
            holds = {**account.holds, event.hold: Hold(event.granted, Pico(0), event.owner, event.stream)}
            frozen, at = MappingProxyType(holds), max(account.active_at, event.now)
            return replace(account, version=version, tickets=MappingProxyType(tickets), holds=frozen, active_at=at)
        case EndAsked():
            asked = {name: replace(account.holds[name], ending=True) for name in event.holds}
            return replace(account, version=version, holds=MappingProxyType({**account.holds, **asked}))
        case Folded():
            before = account.holds[event.hold]
            owed = account.owed_pico + event.consumed - before.consumed
            moved = Hold(event.granted, event.consumed, before.owner, before.stream, before.ending)
            holds = {**account.holds, event.hold: moved}
            spent = Units(max(account.spent, owed // PICO_PER_UNIT))
            return replace(account, version=version, owed_pico=owed, spent=spent, holds=MappingProxyType(holds))
        case Released():
            holds = {name: hold for name, hold in account.holds.items() if name != event.hold}
            return replace(account, version=version, holds=MappingProxyType(holds))
        case CloseBegun():
            return replace(account, version=version, phase=Phase.CLOSING, close=event.record)
        case CaptureFixed():
            assert account.close is not None
            record = replace(account.close, capture=event.capture)
            return replace(account, version=version, phase=Phase.CAPTURED, close=record)
        case CloseAborted():
            return replace(account, version=version, phase=_usable(account.chain), close=None)
        case Closed():
            assert account.close is not None
            record = replace(account.close, tx_hash=event.tx_hash)
            return replace(account, version=version, phase=Phase.CLOSED, close=record, chain=event.chain)
        case Restored():
            spent = Units(max(account.spent, event.owed_pico // PICO_PER_UNIT))
            restored = replace(account, version=version, chain=event.chain, ladder=event.ladder, close=event.close)
            return replace(restored, owed_pico=event.owed_pico, spent=spent, phase=event.phase)
        case _:
            assert_never(event)


def check(account: Account) -> None:
    """Assert the laws of an account; run before every write and after every read, in production too."""
    assert account.owed_pico >= 0, "owed is negative"
    assert account.owed_pico + account.held_pico <= account.accepted * PICO_PER_UNIT, "charged or held beyond accepted"
    assert account.spent <= account.accepted, "spent beyond accepted"
    assert all(0 <= hold.consumed <= hold.granted for hold in account.holds.values()), "a hold is out of order"
    assert all(a.cumulative < b.cumulative for a, b in zip(account.ladder, account.ladder[1:], strict=False)), "ladder"
    if account.phase not in (Phase.CLOSED, Phase.SUSPECT):
        assert account.accepted <= account.chain.deposit, "accepted beyond deposit"
