"""The v1 stream channel contract: calls in, state and events out. Source: the published ``TempoStreamChannel`` ABI.

It differs from v2 in three ways that matter for money: ``open`` needs a token approval first, ``close`` has no capture
amount (the voucher used on chain *is* the payout), and its events carry ``uint256``, hence other topics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from channels.abi import Dynamic, Log, Words, arguments, encode, selector, topic
from channels.descriptor import ChainSnapshot, Descriptor, Escrow
from channels.escrow import (
    CLOSE_REQUEST_CANCELLED,
    CLOSE_REQUESTED,
    ChannelClosed,
    ChannelOpened,
    CloseRequestCancelled,
    CloseRequested,
    Event,
    Settled,
    ToppedUp,
    log_of,
    read_amount_event,
    read_log,
)
from channels.faults import Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.units import Units

OPEN: Final = selector("open(address,address,uint128,bytes32,address)")
TOP_UP: Final = selector("topUp(bytes32,uint256)")
SETTLE: Final = selector("settle(bytes32,uint128,bytes)")
CLOSE: Final = selector("close(bytes32,uint128,bytes)")
REQUEST_CLOSE: Final = selector("requestClose(bytes32)")
WITHDRAW: Final = selector("withdraw(bytes32)")
GET_CHANNEL: Final = selector("getChannel(bytes32)")
COMPUTE_CHANNEL_ID: Final = selector("computeChannelId(address,address,address,bytes32,address)")
GET_VOUCHER_DIGEST: Final = selector("getVoucherDigest(bytes32,uint128)")
DOMAIN_SEPARATOR: Final = selector("domainSeparator()")

CHANNEL_OPENED: Final = topic("ChannelOpened(bytes32,address,address,address,address,bytes32,uint256)")
TOPPED_UP: Final = topic("TopUp(bytes32,address,address,uint256,uint256)")
SETTLED: Final = topic("Settled(bytes32,address,address,uint256,uint256,uint256)")
CHANNEL_CLOSED: Final = topic("ChannelClosed(bytes32,address,address,uint256,uint256)")
CHANNEL_EXPIRED: Final = topic("ChannelExpired(bytes32,address,address)")

_NO_NONCE: Final = Hash32(bytes(32))


@dataclass(frozen=True, slots=True)
class OpenCall:
    """Arguments of ``open``; ``deposit`` in base units. The payer is whoever sends the transaction."""

    payee: Address
    token: Address
    deposit: Units
    salt: Hash32
    authorized_signer: Address

    def descriptor(self, payer: Address) -> Descriptor:
        """The channel this call opens when ``payer`` sends it."""
        return Descriptor(payer, self.payee, ZERO_ADDRESS, self.token, self.salt, self.authorized_signer, _NO_NONCE)


@dataclass(frozen=True, slots=True)
class TopUpCall:
    """Arguments of ``topUp``; ``additional`` in base units."""

    channel_id: ChannelId
    additional: Units


@dataclass(frozen=True, slots=True)
class ChannelState:
    """The contract's record of a channel; once closed, everything but ``finalized`` reads zero."""

    finalized: bool
    close_requested_at: UnixSeconds | None
    payer: Address
    payee: Address
    token: Address
    authorized_signer: Address
    deposit: Units
    settled: Units

    def snapshot(self, *, block: int) -> ChainSnapshot:
        """The part both escrows have in common; a closed channel has a zero deposit on either."""
        return ChainSnapshot(self.deposit, self.settled, self.close_requested_at, block)


def encode_open(call: OpenCall) -> bytes:
    """Calldata of ``open``; an approval of at least the deposit must come before it."""
    return OPEN + encode(call.payee, call.token, call.deposit, call.salt, call.authorized_signer)


def decode_open(data: bytes, *, field: str = "transaction") -> OpenCall:
    """Read canonical ``open`` calldata. Raises ``TRANSACTION_REJECTED`` naming ``field``."""
    words = arguments(data, OPEN, heads=5, field=field)
    payee, token, deposit = words.address(), words.address(), _units(words)
    call = OpenCall(payee, token, deposit, words.hash32(), words.address())
    words.end()
    return call


def encode_top_up(call: TopUpCall) -> bytes:
    """Calldata of ``topUp``."""
    return TOP_UP + encode(call.channel_id, call.additional)


def decode_top_up(data: bytes, *, field: str = "transaction") -> TopUpCall:
    """Read canonical ``topUp`` calldata. Raises ``TRANSACTION_REJECTED`` naming ``field``."""
    words = arguments(data, TOP_UP, heads=2, field=field)
    call = TopUpCall(ChannelId(words.hash32()), _units(words))
    words.end()
    return call


def encode_settle(channel_id: ChannelId, cumulative: Units, signature: bytes) -> bytes:
    """Calldata of ``settle``: pays the whole voucher."""
    return SETTLE + encode(channel_id, cumulative, Dynamic(signature))


def encode_close(channel_id: ChannelId, cumulative: Units, signature: bytes) -> bytes:
    """Calldata of ``close``: pays the whole voucher and returns the rest, so choose the voucher by what was spent."""
    return CLOSE + encode(channel_id, cumulative, Dynamic(signature))


def encode_request_close(channel_id: ChannelId) -> bytes:
    """Calldata of ``requestClose``, which only the payer may call."""
    return REQUEST_CLOSE + encode(channel_id)


def encode_withdraw(channel_id: ChannelId) -> bytes:
    """Calldata of ``withdraw``, which only the payer may call, after the grace period."""
    return WITHDRAW + encode(channel_id)


def encode_get_channel(channel_id: ChannelId) -> bytes:
    """Calldata of ``getChannel``."""
    return GET_CHANNEL + encode(channel_id)


def decode_get_channel(data: bytes) -> ChannelState:
    """Read the reply of ``getChannel``. Raises ``CHAIN_UNAVAILABLE`` when the node's reply is not one."""
    words = Words(data, heads=8, field="getChannel", reason=Reason.CHAIN_UNAVAILABLE)
    finalized, requested = words.bool(), words.uint(64)
    state = ChannelState(
        finalized=finalized,
        close_requested_at=UnixSeconds(requested) if requested else None,
        payer=words.address(),
        payee=words.address(),
        token=words.address(),
        authorized_signer=words.address(),
        deposit=_units(words),
        settled=_units(words),
    )
    words.end()
    return state


def encode_event(escrow: Escrow, event: Event) -> Log:
    """The log the contract emits for ``event``."""
    if isinstance(event, ChannelOpened):
        d = event.descriptor
        body = encode(d.token, d.authorized_signer, d.salt, event.deposit)
        return log_of(escrow, CHANNEL_OPENED, (event.channel_id, d.payer, d.payee), body)
    indexed = (event.channel_id, event.payer, event.payee)
    match event:
        case ToppedUp():
            return log_of(escrow, TOPPED_UP, indexed, encode(event.additional, event.deposit))
        case Settled():
            return log_of(escrow, SETTLED, indexed, encode(event.cumulative, event.paid, event.settled))
        case ChannelClosed():
            return log_of(escrow, CHANNEL_CLOSED, indexed, encode(event.settled, event.refunded))
        case CloseRequested():
            return log_of(escrow, CLOSE_REQUESTED, indexed, encode(event.grace_end))
        case CloseRequestCancelled():
            return log_of(escrow, CLOSE_REQUEST_CANCELLED, indexed, b"")


def decode_events(escrow: Escrow, logs: Iterable[Log]) -> list[Event]:
    """The contract's events among ``logs``, in order; logs of other contracts are not ours to read.

    Raises:
        ChannelFault: ``CHAIN_UNAVAILABLE`` when a log of the contract does not have its event's shape.
    """
    return [event for log in logs if log.address == escrow.address and (event := _decode(log)) is not None]


def _decode(log: Log) -> Event | None:
    if log.topics and log.topics[0] == CHANNEL_OPENED:
        channel_id, payer, payee, words = read_log(log, heads=4)
        token, signer, salt, deposit = words.address(), words.address(), words.hash32(), _units(words)
        words.end()
        descriptor = Descriptor(payer, payee, ZERO_ADDRESS, token, salt, signer, _NO_NONCE)
        return ChannelOpened(channel_id, descriptor, deposit)
    return read_amount_event(log, bits=256, topped_up=TOPPED_UP, settled=SETTLED, closed=CHANNEL_CLOSED)


def _units(words: Words) -> Units:
    # The contract's own types are uint128 and uint256. Amounts beyond uint96 exceed every supply, and one unit type
    # for both escrows is worth more than vouchers nobody can fund.
    return Units(words.uint(96))
