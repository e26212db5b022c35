"""The v2 channel reserve precompile: calls in, state and events out. Source: TIP-1034 interface.

The event records are shared with v1 (``escrow_v1.py``), whose events carry the same facts under other topics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from channels.abi import Dynamic, Log, Words, arguments, encode, selector, topic
from channels.descriptor import ChainSnapshot, Descriptor, Escrow
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.units import Units

_DESCRIPTOR: Final = "(address,address,address,address,bytes32,address,bytes32)"
_DESCRIPTOR_WORDS: Final = 7
_ARRAY_AT: Final = 32  # where the only dynamic argument starts
SIGNATURE_MAX: Final = 2049
"""Longest signature the chain verifies (WebAuthn); ours are 65 bytes, but others' calls are decoded too."""

OPEN: Final = selector("open(address,address,address,uint96,bytes32,address)")
TOP_UP: Final = selector(f"topUp({_DESCRIPTOR},uint96)")
SETTLE: Final = selector(f"settle({_DESCRIPTOR},uint96,bytes)")
CLOSE: Final = selector(f"close({_DESCRIPTOR},uint96,uint96,bytes)")
REQUEST_CLOSE: Final = selector(f"requestClose({_DESCRIPTOR})")
WITHDRAW: Final = selector(f"withdraw({_DESCRIPTOR})")
GET_CHANNEL: Final = selector(f"getChannel({_DESCRIPTOR})")
GET_CHANNEL_STATE: Final = selector("getChannelState(bytes32)")
GET_CHANNEL_STATES: Final = selector("getChannelStatesBatch(bytes32[])")
COMPUTE_CHANNEL_ID: Final = selector("computeChannelId(address,address,address,address,bytes32,address,bytes32)")
GET_VOUCHER_DIGEST: Final = selector("getVoucherDigest(bytes32,uint96)")
DOMAIN_SEPARATOR: Final = selector("domainSeparator()")

CHANNEL_OPENED: Final = topic("ChannelOpened(bytes32,address,address,address,address,address,bytes32,bytes32,uint96)")
TOPPED_UP: Final = topic("TopUp(bytes32,address,address,uint96,uint96)")
SETTLED: Final = topic("Settled(bytes32,address,address,uint96,uint96,uint96)")
CHANNEL_CLOSED: Final = topic("ChannelClosed(bytes32,address,address,uint96,uint96)")
CLOSE_REQUESTED: Final = topic("CloseRequested(bytes32,address,address,uint256)")
CLOSE_REQUEST_CANCELLED: Final = topic("CloseRequestCancelled(bytes32,address,address)")


# ----------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True, slots=True)
class OpenCall:
    """Arguments of ``open``; ``deposit`` in base units. The payer is whoever sends the transaction."""

    payee: Address
    operator: Address
    token: Address
    deposit: Units
    salt: Hash32
    authorized_signer: Address


@dataclass(frozen=True, slots=True)
class TopUpCall:
    """Arguments of ``topUp``; ``additional`` in base units."""

    descriptor: Descriptor
    additional: Units


@dataclass(frozen=True, slots=True)
class ChannelOpened:
    """A channel exists. ``operator`` and ``expiring_nonce_hash`` are zero on v1."""

    channel_id: ChannelId
    descriptor: Descriptor
    deposit: Units


@dataclass(frozen=True, slots=True)
class ToppedUp:
    """The payer added ``additional`` base units; the deposit is now ``deposit``."""

    channel_id: ChannelId
    payer: Address
    payee: Address
    additional: Units
    deposit: Units


@dataclass(frozen=True, slots=True)
class Settled:
    """The payee took ``paid`` base units with a voucher for ``cumulative``; ``settled`` is the new total."""

    channel_id: ChannelId
    payer: Address
    payee: Address
    cumulative: Units
    paid: Units
    settled: Units


@dataclass(frozen=True, slots=True)
class ChannelClosed:
    """The channel ended: base units paid to the payee over its whole life, and given back to the payer."""

    channel_id: ChannelId
    payer: Address
    payee: Address
    settled: Units
    refunded: Units


@dataclass(frozen=True, slots=True)
class CloseRequested:
    """The payer wants out and may withdraw from ``grace_end`` on."""

    channel_id: ChannelId
    payer: Address
    payee: Address
    grace_end: UnixSeconds


@dataclass(frozen=True, slots=True)
class CloseRequestCancelled:
    """A top-up took the close request back."""

    channel_id: ChannelId
    payer: Address
    payee: Address


Event: TypeAlias = ChannelOpened | ToppedUp | Settled | ChannelClosed | CloseRequested | CloseRequestCancelled


# ------------------------------------------------------------------------------------------------------------- calls


def encode_open(call: OpenCall) -> bytes:
    """Calldata of ``open``; no approval is needed, the precompile moves the token itself."""
    return OPEN + encode(call.payee, call.operator, call.token, call.deposit, call.salt, call.authorized_signer)


def decode_open(data: bytes, *, field: str = "transaction") -> OpenCall:
    """Read canonical ``open`` calldata. Raises ``TRANSACTION_REJECTED`` naming ``field``."""
    words = arguments(data, OPEN, heads=6, field=field)
    call = OpenCall(
        payee=words.address(),
        operator=words.address(),
        token=words.address(),
        deposit=Units(words.uint(96)),
        salt=words.hash32(),
        authorized_signer=words.address(),
    )
    words.end()
    return call


def encode_top_up(call: TopUpCall) -> bytes:
    """Calldata of ``topUp``."""
    return TOP_UP + encode(*_flat(call.descriptor), call.additional)


def decode_top_up(data: bytes, *, field: str = "transaction") -> TopUpCall:
    """Read canonical ``topUp`` calldata. Raises ``TRANSACTION_REJECTED`` naming ``field``."""
    words = arguments(data, TOP_UP, heads=_DESCRIPTOR_WORDS + 1, field=field)
    call = TopUpCall(read_descriptor(words), Units(words.uint(96)))
    words.end()
    return call


def encode_settle(descriptor: Descriptor, cumulative: Units, signature: bytes) -> bytes:
    """Calldata of ``settle``: pays the whole voucher, so ``cumulative`` must not exceed what was consumed."""
    return SETTLE + encode(*_flat(descriptor), cumulative, Dynamic(signature))


def encode_close(descriptor: Descriptor, cumulative: Units, capture: Units, signature: bytes) -> bytes:
    """Calldata of ``close``: the payee gets ``capture`` base units in total, the payer the rest of the deposit."""
    return CLOSE + encode(*_flat(descriptor), cumulative, capture, Dynamic(signature))


def encode_request_close(descriptor: Descriptor) -> bytes:
    """Calldata of ``requestClose``, which only the payer may call."""
    return REQUEST_CLOSE + encode(*_flat(descriptor))


def encode_withdraw(descriptor: Descriptor) -> bytes:
    """Calldata of ``withdraw``, which only the payer may call, after the grace period."""
    return WITHDRAW + encode(*_flat(descriptor))


def encode_get_channel_state(channel_id: ChannelId) -> bytes:
    """Calldata of ``getChannelState``."""
    return GET_CHANNEL_STATE + encode(channel_id)


def decode_channel_state(data: bytes, *, block: int) -> ChainSnapshot:
    """Read the reply of ``getChannelState`` as it was at ``block``; a closed channel reads as all zeros.

    Raises:
        ChannelFault: ``CHAIN_UNAVAILABLE`` when the node's reply is not one.
    """
    words = Words(data, heads=3, field="getChannelState", reason=Reason.CHAIN_UNAVAILABLE)
    state = _read_state(words, block)
    words.end()
    return state


def encode_get_channel_states(ids: Sequence[ChannelId]) -> bytes:
    """Calldata of ``getChannelStatesBatch``: the same view for many channels at once."""
    return GET_CHANNEL_STATES + encode(_ARRAY_AT, len(ids), *ids)


def decode_channel_states(data: bytes, count: int, *, block: int) -> tuple[ChainSnapshot, ...]:
    """Read the reply of ``getChannelStatesBatch`` for ``count`` channels, in their order.

    Raises:
        ChannelFault: ``CHAIN_UNAVAILABLE`` when the node's reply is not one.
    """
    words = Words(data, heads=2 + 3 * count, field="getChannelStatesBatch", reason=Reason.CHAIN_UNAVAILABLE)
    if (words.uint(256), words.uint(256)) != (_ARRAY_AT, count):
        raise words.refused("is not an array of that length")
    states = tuple(_read_state(words, block) for _ in range(count))
    words.end()
    return states


def _read_state(words: Words, block: int) -> ChainSnapshot:
    settled, deposit, requested = words.uint(96), words.uint(96), words.uint(32)
    return ChainSnapshot(
        deposit=Units(deposit),
        settled=Units(settled),
        close_requested_at=UnixSeconds(requested) if requested else None,
        block=block,
    )


def read_descriptor(words: Words) -> Descriptor:
    """The next seven words as a descriptor."""
    return Descriptor(
        payer=words.address(),
        payee=words.address(),
        operator=words.address(),
        token=words.address(),
        salt=words.hash32(),
        authorized_signer=words.address(),
        expiring_nonce_hash=words.hash32(),
    )


def _flat(descriptor: Descriptor) -> tuple[bytes, ...]:
    return (
        descriptor.payer,
        descriptor.payee,
        descriptor.operator,
        descriptor.token,
        descriptor.salt,
        descriptor.authorized_signer,
        descriptor.expiring_nonce_hash,
    )


# ------------------------------------------------------------------------------------------------------------ events


def encode_event(escrow: Escrow, event: Event) -> Log:
    """The log the reserve emits for ``event``."""
    if isinstance(event, ChannelOpened):
        d = event.descriptor
        body = encode(d.operator, d.token, d.authorized_signer, d.salt, d.expiring_nonce_hash, event.deposit)
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
    """The reserve's events among ``logs``, in order; logs of other contracts are not ours to read.

    Raises:
        ChannelFault: ``CHAIN_UNAVAILABLE`` when a log of the reserve does not have its event's shape.
    """
    return [event for log in logs if log.address == escrow.address and (event := _decode(log)) is not None]


def _decode(log: Log) -> Event | None:
    if log.topics and log.topics[0] == CHANNEL_OPENED:
        channel_id, payer, payee, words = read_log(log, heads=6)
        operator, token, signer = words.address(), words.address(), words.address()
        salt, nonce_hash, deposit = words.hash32(), words.hash32(), Units(words.uint(96))
        words.end()
        descriptor = Descriptor(payer, payee, operator, token, salt, signer, nonce_hash)
        return ChannelOpened(channel_id, descriptor, deposit)
    return read_amount_event(
        log,
        bits=96,
        topped_up=TOPPED_UP,
        settled=SETTLED,
        closed=CHANNEL_CLOSED,
    )


def read_amount_event(log: Log, *, bits: int, topped_up: Hash32, settled: Hash32, closed: Hash32) -> Event | None:
    """Any event but ``ChannelOpened``; the two escrows differ in the amounts' type and hence in three topics.

    Amounts beyond uint96 are refused although v1's types could hold them: no token has such a supply.
    """
    name = log.topics[0] if log.topics else None
    event: Event
    if name == topped_up:
        channel_id, payer, payee, words = read_log(log, heads=2)
        event = ToppedUp(channel_id, payer, payee, _units(words, bits), _units(words, bits))
    elif name == settled:
        channel_id, payer, payee, words = read_log(log, heads=3)
        event = Settled(channel_id, payer, payee, _units(words, bits), _units(words, bits), _units(words, bits))
    elif name == closed:
        channel_id, payer, payee, words = read_log(log, heads=2)
        event = ChannelClosed(channel_id, payer, payee, _units(words, bits), _units(words, bits))
    elif name == CLOSE_REQUESTED:
        channel_id, payer, payee, words = read_log(log, heads=1)
        event = CloseRequested(channel_id, payer, payee, UnixSeconds(words.uint(64)))
    elif name == CLOSE_REQUEST_CANCELLED:
        channel_id, payer, payee, words = read_log(log, heads=0)
        event = CloseRequestCancelled(channel_id, payer, payee)
    else:
        return None
    words.end()
    return event


def read_log(log: Log, *, heads: int) -> tuple[ChannelId, Address, Address, Words]:
    """The three indexed values every escrow event has, and a reader over the others."""
    if len(log.topics) != 4:  # noqa: PLR2004 - the name and three indexed values
        raise ChannelFault(Reason.CHAIN_UNAVAILABLE, field="log", detail="does not have three indexed values")
    indexed = Words(b"".join(log.topics[1:]), heads=3, field="log", reason=Reason.CHAIN_UNAVAILABLE)
    words = Words(log.data, heads=heads, field="log", reason=Reason.CHAIN_UNAVAILABLE)
    return ChannelId(indexed.hash32()), indexed.address(), indexed.address(), words


def log_of(escrow: Escrow, name: Hash32, indexed: tuple[ChannelId, Address, Address], data: bytes) -> Log:
    """A log of ``escrow`` with the indexed values in place."""
    topics = (name, Hash32(indexed[0]), *(Hash32(address.rjust(32, b"\0")) for address in indexed[1:]))
    return Log(escrow.address, topics, data)


def _units(words: Words, bits: int) -> Units:
    amount = words.uint(bits)
    if amount.bit_length() > 96:  # noqa: PLR2004 - uint96
        raise words.refused("has an amount beyond all supply")
    return Units(amount)
