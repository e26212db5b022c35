"""The Tempo transaction (type 0x76): strict decoding, sender recovery, signing and fee sponsorship.

A payer sends a channel transaction in one of three forms, and a sponsor makes a fourth:

* ``COMPLETE``: 0x76 with an empty fee payer slot; broadcast as it is.
* ``PLACEHOLDER``: 0x76 with 0x00 in the slot (the written specification); a sponsor must co-sign.
* ``ENVELOPE``: prefix 0x78 with the sender's address in the slot (the reference client); a sponsor must co-sign.
* ``COSIGNED``: 0x76 with the sponsor's signature in the slot; broadcast as it is.

The sender signs the same bytes in the last three. ``pytempo`` can encode and sign all this, but has no decoder and
pulls web3 in, so it stays in the tests, where its independence is worth something.

Source: Tempo transaction specification (field order); TIP-1009 for expiring nonces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, TypeAlias

import rlp
from rlp.exceptions import DecodingError

from channels.faults import ChannelFault, Reason
from channels.ids import Address, Hash32
from channels.instants import UnixSeconds
from channels.keccak import keccak256
from channels.signature import Signature65, address_of, parse_signature, recover, sign

Rlp: TypeAlias = "bytes | list[Rlp]"

EXPIRING_NONCE_KEY: Final = 2**256 - 1
RAW_MAX: Final = 16_384
"""Bytes of one transaction we look at; an open is under 400 and the reference client's widest batch under 2,000."""
CALLS_MAX: Final = 16
"""Calls in one batch; the longest one expected has three, a charge with splits eleven."""
_TYPE: Final = 0x76
_SPONSOR_TYPE: Final = 0x78
_ITEMS: Final = 14  # with the signature, without a key authorisation
_CALL_ITEMS: Final = 3
_ADDRESS: Final = 20
_FIELD: Final = "transaction"


class Form(StrEnum):
    """Who has signed what, see the module's description."""

    COMPLETE = "complete"
    PLACEHOLDER = "placeholder"
    ENVELOPE = "envelope"
    COSIGNED = "cosigned"


UNPAID: Final = frozenset({Form.PLACEHOLDER, Form.ENVELOPE})
"""The two forms that wait for a fee payer."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the batch. ``value`` is native value, which Tempo does not have: anything but zero is suspicious."""

    to: Address
    data: bytes
    value: int = 0


@dataclass(frozen=True, slots=True)
class TempoTx:
    """What the sender signs. Fees are in attodollars per gas; times in unix seconds, ``None`` when absent.

    ``sponsored`` means that a fee payer signs too: the sender then commits to no fee token, the sponsor chooses it.
    """

    chain_id: int
    max_priority_fee_per_gas: int
    max_fee_per_gas: int
    gas: int
    calls: tuple[Call, ...]
    nonce_key: int
    nonce: int
    valid_before: UnixSeconds | None
    valid_after: UnixSeconds | None
    fee_token: Address | None
    sponsored: bool = False

    def sender_payload(self) -> bytes:
        """The bytes whose Keccak hash the sender signs."""
        fee_token = b"" if self.sponsored else (self.fee_token or b"")
        slot = b"\0" if self.sponsored else b""
        return _wire(_TYPE, self.body(fee_token, slot))

    def expiring_nonce_hash(self, sender: Address) -> Hash32:
        """What the chain deduplicates by and what a v2 channel id commits to; no fee payer can change it."""
        return keccak256(self.sender_payload() + sender)

    def sponsor_hash(self, sender: Address, fee_token: Address) -> Hash32:
        """What a fee payer signs to pay for ``sender``'s transaction in ``fee_token``."""
        return keccak256(_wire(_SPONSOR_TYPE, self.body(fee_token, sender)))

    def sign(self, key: bytes) -> SignedTx:
        """Sign as the sender with a 32-byte private key; a sponsored one comes out in the reference client's form."""
        signature = sign(keccak256(self.sender_payload()), key)
        form = Form.ENVELOPE if self.sponsored else Form.COMPLETE
        return SignedTx(self, form, address_of(key), signature)

    def body(self, fee_token: bytes, slot: bytes | list[bytes]) -> list[Rlp]:
        """Fields 0 to 12 in wire order, with the two that depend on who signs given."""
        calls: list[Rlp] = [[call.to, _int(call.value), call.data] for call in self.calls]
        return [
            _int(self.chain_id),
            _int(self.max_priority_fee_per_gas),
            _int(self.max_fee_per_gas),
            _int(self.gas),
            calls,
            [],
            _int(self.nonce_key),
            _int(self.nonce),
            _int(self.valid_before or 0),
            _int(self.valid_after or 0),
            fee_token,
            [*slot] if isinstance(slot, list) else slot,
            [],
        ]


@dataclass(frozen=True, slots=True)
class SignedTx:
    """A transaction with its sender, recovered from the signature and never taken from the wire."""

    tx: TempoTx
    form: Form
    sender: Address
    signature: Signature65
    fee_payer: Address | None = None
    fee_payer_signature: Signature65 | None = None

    @property
    def expiring_nonce_hash(self) -> Hash32:
        """See :meth:`TempoTx.expiring_nonce_hash`."""
        return self.tx.expiring_nonce_hash(self.sender)

    @property
    def raw(self) -> bytes:
        """The wire bytes of this form, exactly as they were decoded."""
        prefix = _SPONSOR_TYPE if self.form is Form.ENVELOPE else _TYPE
        return _wire(prefix, [*self.tx.body(self.tx.fee_token or b"", self._slot()), self.signature])

    @property
    def tx_hash(self) -> Hash32:
        """The hash the chain will know this transaction by; only complete and co-signed forms have one.

        Raises:
            ValueError: for a form that still waits for its fee payer; that is a mistake of the caller.
        """
        if self.form in UNPAID:
            raise ValueError("a transaction without its fee payer has no hash yet")
        return keccak256(self.raw)

    def cosign(self, fee_token: Address, key: bytes) -> SignedTx:
        """Add a sponsor's signature; the sponsor pays in ``fee_token``. Check the policy before, not after.

        Raises:
            ValueError: when the sender did not ask for a sponsor; that is a mistake of the caller.
        """
        if self.form not in UNPAID:
            raise ValueError("the sender did not leave the fee payer's slot open")
        return SignedTx(
            tx=replace(self.tx, fee_token=fee_token),
            form=Form.COSIGNED,
            sender=self.sender,
            signature=self.signature,
            fee_payer=address_of(key),
            fee_payer_signature=sign(self.tx.sponsor_hash(self.sender, fee_token), key),
        )

    def _slot(self) -> bytes | list[bytes]:
        match self.form:
            case Form.COMPLETE:
                return b""
            case Form.PLACEHOLDER:
                return b"\0"
            case Form.ENVELOPE:
                return self.sender
            case Form.COSIGNED:
                signature = self.fee_payer_signature
                assert signature is not None
                r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:64])
                return [_int(signature[64] - 27), _int(r), _int(s)]


def decode(raw: bytes) -> SignedTx:
    """Read a signed transaction in any of the four forms and recover who signed it.

    Access lists, authorisation lists, key authorisations and signatures other than canonical secp256k1 are refused:
    no payment needs them, and each would have to be understood before it is co-signed or trusted.

    Raises:
        ChannelFault: ``TRANSACTION_REJECTED`` naming ``transaction``.
    """
    items = _items(raw)
    calls, access_list, authorizations = _list(items[4]), _list(items[5]), _list(items[12])
    if access_list or authorizations:
        raise _refused("has an access or authorisation list")
    if not 0 < len(calls) <= CALLS_MAX:
        raise _refused("has no calls or too many")
    form, fee_token = _form(raw[0], items[10], items[11])
    tx = TempoTx(
        chain_id=_uint(items[0], 64),
        max_priority_fee_per_gas=_uint(items[1], 128),
        max_fee_per_gas=_uint(items[2], 128),
        gas=_uint(items[3], 64),
        calls=tuple(_call(item) for item in calls),
        nonce_key=_uint(items[6], 256),
        nonce=_uint(items[7], 64),
        valid_before=_instant(items[8]),
        valid_after=_instant(items[9]),
        fee_token=fee_token,
        sponsored=form is not Form.COMPLETE,
    )
    signature = _signature(_bytes(items[13]))
    sender = _recover(keccak256(tx.sender_payload()), signature)
    signed = SignedTx(tx, form, sender, signature)
    if form is Form.ENVELOPE and items[11] != sender:
        # The slot is only what the sender claims; co-signing for it would let anybody name a victim.
        raise _refused("names a sender who did not sign it")
    if form is Form.COSIGNED:
        assert fee_token is not None
        sponsor_signature = _sponsor_signature(_list(items[11]))
        sponsor = _recover(tx.sponsor_hash(sender, fee_token), sponsor_signature)
        signed = replace(signed, fee_payer=sponsor, fee_payer_signature=sponsor_signature)
    return signed


def _items(raw: bytes) -> list[Rlp]:
    if len(raw) > RAW_MAX:
        raise _refused("is too long")
    if not raw or raw[0] not in (_TYPE, _SPONSOR_TYPE):
        raise _refused("is not a Tempo transaction")
    try:
        items: Rlp = rlp.decode(raw[1:], strict=True)
    except (DecodingError, RecursionError):
        raise _refused("is not RLP") from None
    # The decoder accepts a few longer spellings; equality with the only canonical one is the stronger check.
    if rlp.encode(items) != raw[1:] or not isinstance(items, list):
        raise _refused("is not canonical RLP")
    if len(items) != _ITEMS:
        raise _refused("does not have the 14 fields of a transaction without key authorisation")
    return items


def _form(prefix: int, fee_token: Rlp, slot: Rlp) -> tuple[Form, Address | None]:
    token = _bytes(fee_token)
    if len(token) not in (0, _ADDRESS):
        raise _refused("has a fee token that is no address")
    chosen = Address(token) if token else None
    if prefix == _SPONSOR_TYPE:
        form = Form.ENVELOPE
        if len(_bytes(slot)) != _ADDRESS:
            raise _refused("has no sender address in its fee payer slot")
    elif isinstance(slot, list):
        form = Form.COSIGNED
    elif slot in (b"", b"\0"):
        form = Form.PLACEHOLDER if slot else Form.COMPLETE
    else:
        raise _refused("has an unknown fee payer slot")
    # A sender who leaves the fees to a sponsor does not sign the token, so a token there would be anybody's word.
    if (chosen is None) is not (form in UNPAID) and form is not Form.COMPLETE:
        raise _refused("has a fee token its signature does not cover, or lacks one")
    return form, chosen


def _call(item: Rlp) -> Call:
    parts = _list(item)
    if len(parts) != _CALL_ITEMS:
        raise _refused("has a call that is not three fields")
    to = _bytes(parts[0])
    if len(to) != _ADDRESS:
        raise _refused("has a call without a 20-byte target")
    return Call(Address(to), _bytes(parts[2]), _uint(parts[1], 256))


def _sponsor_signature(parts: list[Rlp]) -> Signature65:
    if len(parts) != 3:  # noqa: PLR2004 - yParity, r, s
        raise _refused("has a fee payer signature that is not three fields")
    parity, r, s = _uint(parts[0], 8), _uint(parts[1], 256), _uint(parts[2], 256)
    if parity > 1:
        raise _refused("has a fee payer signature with a wrong parity")
    return _signature(r.to_bytes(32) + s.to_bytes(32) + bytes((27 + parity,)))


def _signature(raw: bytes) -> Signature65:
    try:
        return parse_signature(raw, field=_FIELD)
    except ChannelFault as fault:
        raise _refused("signature " + fault.detail) from None


def _recover(digest: Hash32, signature: Signature65) -> Address:
    try:
        return recover(digest, signature)
    except ChannelFault as fault:
        raise _refused("signature " + fault.detail) from None


def _bytes(item: Rlp) -> bytes:
    if not isinstance(item, bytes):
        raise _refused("has a list where a value is due")
    return item


def _list(item: Rlp) -> list[Rlp]:
    if not isinstance(item, list):
        raise _refused("has a value where a list is due")
    return item


def _uint(item: Rlp, bits: int) -> int:
    data = _bytes(item)
    if data[:1] == b"\0" or len(data) * 8 > bits:
        raise _refused("has an integer that is not minimal or too large")
    return int.from_bytes(data)


def _instant(item: Rlp) -> UnixSeconds | None:
    value = _uint(item, 64)
    return UnixSeconds(value) if value else None


def _wire(prefix: int, items: list[Rlp]) -> bytes:
    body: bytes = rlp.encode(items)
    return bytes((prefix,)) + body


def _int(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8)


def _refused(detail: str) -> ChannelFault:
    return ChannelFault(Reason.TRANSACTION_REJECTED, field=_FIELD, detail=detail)
