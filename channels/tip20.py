"""TIP-20 tokens: transfers, approvals, balances and the two transfer events. Source: TIP-20, a superset of ERC-20."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from channels.abi import Log, Words, arguments, encode, selector, topic
from channels.faults import ChannelFault, Reason
from channels.ids import Address, Hash32
from channels.units import MAX_UINT96, Units

TRANSFER: Final = selector("transfer(address,uint256)")
TRANSFER_WITH_MEMO: Final = selector("transferWithMemo(address,uint256,bytes32)")
APPROVE: Final = selector("approve(address,uint256)")
BALANCE_OF: Final = selector("balanceOf(address)")
ALLOWANCE: Final = selector("allowance(address,address)")

TRANSFERRED: Final = topic("Transfer(address,address,uint256)")
TRANSFERRED_WITH_MEMO: Final = topic("TransferWithMemo(address,address,uint256,bytes32)")


@dataclass(frozen=True, slots=True)
class TransferCall:
    """A transfer of ``amount`` base units; ``memo`` is ``None`` for the plain function."""

    to: Address
    amount: Units
    memo: Hash32 | None = None


@dataclass(frozen=True, slots=True)
class ApproveCall:
    """A permission for ``spender`` to take up to ``amount`` base units; may be the whole uint256 range."""

    spender: Address
    amount: int


@dataclass(frozen=True, slots=True)
class Transferred:
    """Base units moved. The token emits one without a memo for every transfer, and one more when it has a memo."""

    token: Address
    sender: Address
    to: Address
    amount: int
    memo: Hash32 | None = None


def encode_transfer(call: TransferCall) -> bytes:
    """Calldata of ``transfer``, or of ``transferWithMemo`` when there is a memo."""
    if call.memo is None:
        return TRANSFER + encode(call.to, call.amount)
    return TRANSFER_WITH_MEMO + encode(call.to, call.amount, call.memo)


def decode_transfer(data: bytes, *, field: str = "transaction") -> TransferCall:
    """Read canonical ``transfer`` or ``transferWithMemo`` calldata. Raises ``TRANSACTION_REJECTED``."""
    plain = data[:4] == TRANSFER
    words = arguments(data, TRANSFER if plain else TRANSFER_WITH_MEMO, heads=2 if plain else 3, field=field)
    call = TransferCall(words.address(), Units(words.uint(96)), None if plain else words.hash32())
    words.end()
    return call


def encode_approve(call: ApproveCall) -> bytes:
    """Calldata of ``approve``."""
    return APPROVE + encode(call.spender, call.amount)


def decode_approve(data: bytes, *, field: str = "transaction") -> ApproveCall:
    """Read canonical ``approve`` calldata. Raises ``TRANSACTION_REJECTED`` naming ``field``."""
    words = arguments(data, APPROVE, heads=2, field=field)
    call = ApproveCall(words.address(), words.uint(256))
    words.end()
    return call


def encode_balance_of(owner: Address) -> bytes:
    """Calldata of ``balanceOf``."""
    return BALANCE_OF + encode(owner)


def decode_balance(data: bytes) -> Units:
    """Read the reply of ``balanceOf``, clamped to uint96: development tokens mint more than any supply.

    Raises:
        ChannelFault: ``CHAIN_UNAVAILABLE`` when the node's reply is not one word.
    """
    words = Words(data, heads=1, field="balanceOf", reason=Reason.CHAIN_UNAVAILABLE)
    amount = words.uint(256)
    words.end()
    return Units(min(amount, MAX_UINT96))


def encode_event(event: Transferred) -> Log:
    """The log a token emits for one transfer event."""
    parties = (Hash32(event.sender.rjust(32, b"\0")), Hash32(event.to.rjust(32, b"\0")))
    if event.memo is None:
        return Log(event.token, (TRANSFERRED, *parties), encode(event.amount))
    return Log(event.token, (TRANSFERRED_WITH_MEMO, *parties, event.memo), encode(event.amount))


def decode_transfers(token: Address, logs: Iterable[Log]) -> list[Transferred]:
    """The transfer events of ``token`` among ``logs``, in order; other contracts' logs and events are skipped.

    Raises:
        ChannelFault: ``CHAIN_UNAVAILABLE`` when a transfer log of the token does not have its shape.
    """
    return [event for log in logs if log.address == token and (event := _decode(log)) is not None]


def _decode(log: Log) -> Transferred | None:
    name = log.topics[0] if log.topics else None
    if name not in (TRANSFERRED, TRANSFERRED_WITH_MEMO):
        return None
    with_memo = name == TRANSFERRED_WITH_MEMO
    if len(log.topics) != (4 if with_memo else 3):
        raise ChannelFault(Reason.CHAIN_UNAVAILABLE, field="log", detail="is not a transfer event of its kind")
    indexed = Words(b"".join(log.topics[1:3]), heads=2, field="log", reason=Reason.CHAIN_UNAVAILABLE)
    words = Words(log.data, heads=1, field="log", reason=Reason.CHAIN_UNAVAILABLE)
    event = Transferred(
        log.address, indexed.address(), indexed.address(), words.uint(256), log.topics[3] if with_memo else None
    )
    words.end()
    return event
