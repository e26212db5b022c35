"""The JSON spelling of what Ethereum nodes say: quantities, data, logs and receipts, read strictly.

Source: Ethereum JSON-RPC specification, "quantity" and "data" encodings.
"""

from __future__ import annotations

import re
from typing import Any, Final

from channels.abi import Log
from channels.chain import Head, Receipt, Topic
from channels.faults import ChannelFault, Reason
from channels.ids import Address, Hash32, to_hex
from channels.instants import UnixSeconds
from channels.tempo_tx import EXPIRING_NONCE_KEY, Call, TempoTx

_QUANTITY = re.compile(r"0x(?:0|[1-9a-fA-F][0-9a-fA-F]{0,63})", re.ASCII)
_DATA = re.compile(r"0x(?:[0-9a-fA-F]{2})*", re.ASCII)
_ADDRESS: Final = 20
_WORD: Final = 32


def malformed(field: str) -> ChannelFault:
    """The fault of a reply that does not have the shape it should: the node's, never the payer's."""
    return ChannelFault(Reason.CHAIN_UNAVAILABLE, field=field, detail="in the chain node's reply is malformed")


def quantity(value: int) -> str:
    """Write a number."""
    return hex(value)


def read_quantity(value: object, field: str) -> int:
    """Read a number of at most 256 bits. Raises ``CHAIN_UNAVAILABLE``."""
    if not isinstance(value, str) or _QUANTITY.fullmatch(value) is None:
        raise malformed(field)
    return int(value, 16)


def read_data(value: object, field: str, *, length: int | None = None) -> bytes:
    """Read bytes, of exactly ``length`` if given. Raises ``CHAIN_UNAVAILABLE``."""
    if not isinstance(value, str) or _DATA.fullmatch(value) is None:
        raise malformed(field)
    data = bytes.fromhex(value[2:])
    if length is not None and len(data) != length:
        raise malformed(field)
    return data


def read_object(value: object, field: str) -> dict[str, Any]:
    """Read a JSON object. Raises ``CHAIN_UNAVAILABLE``."""
    if not isinstance(value, dict):
        raise malformed(field)
    return value


def read_list(value: object, field: str) -> list[Any]:
    """Read a JSON array. Raises ``CHAIN_UNAVAILABLE``."""
    if not isinstance(value, list):
        raise malformed(field)
    return value


def read_log(value: object) -> Log:
    """Read one log object. Raises ``CHAIN_UNAVAILABLE``; a log removed by a reorganisation is no log."""
    entry = read_object(value, "log")
    if entry.get("removed") not in (None, False):
        raise malformed("log.removed")
    return Log(
        address=Address(read_data(entry.get("address"), "log.address", length=_ADDRESS)),
        topics=tuple(
            Hash32(read_data(topic, "log.topics", length=_WORD))
            for topic in read_list(entry.get("topics"), "log.topics")
        ),
        data=read_data(entry.get("data"), "log.data"),
        block=read_quantity(entry.get("blockNumber"), "log.blockNumber"),
        tx_hash=Hash32(read_data(entry.get("transactionHash"), "log.transactionHash", length=_WORD)),
    )


def read_receipt(value: object, *, expected: Hash32) -> Receipt:
    """Read a receipt, which must be of the transaction asked for. Raises ``CHAIN_UNAVAILABLE``."""
    entry = read_object(value, "receipt")
    tx_hash = Hash32(read_data(entry.get("transactionHash"), "receipt.transactionHash", length=_WORD))
    status = read_quantity(entry.get("status"), "receipt.status")
    logs = tuple(read_log(log) for log in read_list(entry.get("logs"), "receipt.logs"))
    if tx_hash != expected or status > 1 or any(log.tx_hash != expected for log in logs):
        raise malformed("receipt")
    return Receipt(
        tx_hash=tx_hash,
        succeeded=status == 1,
        block=read_quantity(entry.get("blockNumber"), "receipt.blockNumber"),
        sender=Address(read_data(entry.get("from"), "receipt.from", length=_ADDRESS)),
        logs=logs,
        block_hash=Hash32(read_data(entry.get("blockHash"), "receipt.blockHash", length=_WORD)),
    )


def read_head(value: object) -> tuple[Head, int]:
    """Read a block's number and time, and its base fee in attodollars per gas. Raises ``CHAIN_UNAVAILABLE``."""
    entry = read_object(value, "block")
    head = Head(
        number=read_quantity(entry.get("number"), "block.number"),
        timestamp=UnixSeconds(read_quantity(entry.get("timestamp"), "block.timestamp")),
    )
    return head, read_quantity(entry.get("baseFeePerGas"), "block.baseFeePerGas")


def topic(wanted: Topic) -> str | list[str] | None:
    """One position of a log filter. Bytes are one value, any other sequence is a choice."""
    if wanted is None or isinstance(wanted, bytes):
        return None if wanted is None else to_hex(wanted)
    return [to_hex(value) for value in wanted]


def call_object(call: Call) -> dict[str, str]:
    """One call of a batch as JSON."""
    return {"to": to_hex(call.to), "value": quantity(call.value), "data": to_hex(call.data)}


def request_object(tx: TempoTx, sender: Address) -> dict[str, Any]:
    """An unsigned transaction as the argument of ``eth_estimateGas``, in the shape the reference client sends."""
    request: dict[str, Any] = {
        "from": to_hex(sender),
        "type": "0x76",
        "chainId": quantity(tx.chain_id),
        "nonce": quantity(tx.nonce),
        "nonceKey": quantity(tx.nonce_key),
        "calls": [call_object(call) for call in tx.calls],
    }
    if tx.nonce_key == EXPIRING_NONCE_KEY:
        request["validBefore"] = quantity(tx.valid_before or 0)
        request["validAfter"] = quantity(tx.valid_after or 0)
    if tx.fee_token is not None:
        request["feeToken"] = to_hex(tx.fee_token)
    if tx.sponsored:
        request["feePayer"] = True
    return request
