"""Channels, vouchers and accounts in few words; every default is a valid one. Amounts are base units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from channels.account import plan
from channels.descriptor import RESERVE_ADDRESS, ChainSnapshot, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.model import (
    Account,
    BeginClose,
    Command,
    ConfirmClosed,
    FixCapture,
    HoldId,
    NodeId,
    ObserveChain,
    Open,
    Outcome,
    Phase,
    Plan,
    Reserve,
    Voucher,
)
from channels.policy import Policy
from channels.units import PICO_PER_UNIT, Pico, Units

NOW = UnixSeconds(1_900_000_000)
V2 = Escrow(SessionProtocol.V2, 1337, RESERVE_ADDRESS)
V1 = Escrow(SessionProtocol.V1, 1337, Address(b"\xe1" * 20))
CHANNEL = ChannelId(b"\xc1" * 32)
TX = Hash32(b"\x7a" * 32)
POLICY = Policy()


def unwatched(account: Account) -> Account:
    """An account without what the chain's watcher writes into it whenever a block comes: payments alone change the rest."""
    return replace(account, version=0, chain=replace(account.chain, block=0))


def descriptor(seed: int = 1) -> Descriptor:
    payer = Address(bytes([seed]) * 20)
    nonce = Hash32(bytes([seed]) * 32)
    return Descriptor(payer, Address(b"\x15" * 20), ZERO_ADDRESS, Address(b"\x20" * 20), nonce, payer, nonce)


def pico(units: float) -> Pico:
    """Units as pico; tests may write halves."""
    return Pico(int(units * PICO_PER_UNIT))


def voucher(cumulative: int) -> Voucher:
    """A rung whose signature differs for every amount; the account machine never verifies it."""
    return Voucher(Units(cumulative), cumulative.to_bytes(64, "big") + b"\x1b")


def chain(deposit: int, settled: int = 0, closing: int | None = None, block: int = 1) -> ChainSnapshot:
    return ChainSnapshot(Units(deposit), Units(settled), None if closing is None else UnixSeconds(closing), block)


def opening(
    cumulative: int = 100,
    deposit: int = 1_000,
    *,
    channel: ChannelId = CHANNEL,
    escrow: Escrow = V2,
    on_chain: ChainSnapshot | None = None,
) -> Open:
    return Open(channel, escrow, descriptor(), on_chain or chain(deposit), voucher(cumulative))


def reserve(
    floor: float = 1,
    want: float | None = None,
    *,
    hold: str = "h",
    ticket: str = "t",
    expires: int = NOW + 300,
    preempt: bool = True,
    owner: str = "node-1",
    stream: bool = True,
) -> Reserve:
    most = floor if want is None else want
    return Reserve(HoldId(hold), ticket, UnixSeconds(expires), pico(floor), pico(most), preempt, NodeId(owner), stream)


def buffered(floor: float = 1, want: float | None = None, *, hold: str = "g", ticket: str = "u", owner: str = "node-1") -> Reserve:
    """A request beside a stream: it ends nobody and is no stream itself."""
    return reserve(floor, want, hold=hold, ticket=ticket, preempt=False, owner=owner, stream=False)


def decide(account: Account | None, command: Command, policy: Policy = POLICY, now: int = NOW) -> Plan[Outcome]:
    return plan(account, command, now=UnixSeconds(now), policy=policy)


def after(account: Account | None, *commands: Command, policy: Policy = POLICY) -> Account:
    """The account after commands that must all be allowed."""
    for command in commands:
        account = decide(account, command, policy).account
    assert account is not None
    return account


def refusal(account: Account | None, command: Command, policy: Policy = POLICY, now: int = NOW) -> ChannelFault:
    """The fault ``command`` is refused with; it is an error when it is allowed."""
    try:
        made = decide(account, command, policy, now)
    except ChannelFault as fault:
        return fault
    raise AssertionError(f"{command} was allowed: {made.result}")


def reason(account: Account | None, command: Command, **more: Any) -> Reason:
    return refusal(account, command, **more).reason


def opened(cumulative: int = 100, deposit: int = 1_000, *, escrow: Escrow = V2) -> Account:
    return after(None, opening(cumulative, deposit, escrow=escrow))


def account_in(phase: Phase, *, held: bool = True) -> Account:
    """An account in ``phase``: 100 of 1,000 accepted, and 10 of them held by ``h`` where the phase allows a hold."""
    account = opened()
    if held and phase not in (Phase.CAPTURED, Phase.CLOSED):
        account = after(account, reserve(10))
    close = BeginClose("close", voucher(100))
    steps: dict[Phase, tuple[Command, ...]] = {
        Phase.OPEN: (),
        Phase.CONTESTED: (ObserveChain(chain(1_000, closing=5, block=2)),),
        Phase.SUSPECT: (ObserveChain(chain(50, block=2)),),
        Phase.CLOSING: (close,),
        Phase.CAPTURED: (close, FixCapture()),
        Phase.CLOSED: (close, FixCapture(), ConfirmClosed(TX, chain(0, block=3))),
    }
    account = after(account, *steps[phase])
    assert account.phase is phase
    return account
