"""The one signature form this library accepts: 65 bytes ``r || s || v``, low s, v of 27 or 28.

The chain and the reference client each accept more, and not the same more. A high-s twin passes the reference client
but not the v2 precompile, so a voucher carrying one could be served and never be claimed; ``v`` of 0 or 1 is the other
way round. Wallet-contract, keychain, P256 and WebAuthn forms would each need their own verifier. Refusing them all
leaves exactly one byte string per signature, which every escrow pays.
"""

from __future__ import annotations

from typing import Final, NewType

from coincurve import PrivateKey, PublicKey

from channels.faults import ChannelFault, Reason
from channels.ids import Address
from channels.keccak import keccak256

Signature65 = NewType("Signature65", bytes)
"""Canonical bytes: made only by :func:`parse_signature` and :func:`sign`."""

CURVE_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_HALF_ORDER: Final = CURVE_ORDER // 2
_LENGTH: Final = 65
_V_EVEN: Final = 27
_V_ODD: Final = 28


def parse_signature(raw: bytes, *, field: str = "signature") -> Signature65:
    """Accept canonical signature bytes and nothing else; equal signatures are equal bytes afterwards.

    Raises:
        ChannelFault: ``INVALID_SIGNATURE`` naming ``field``.

    Source: TIP-1020 (secp256k1 form); EIP-2 for low s; SEC 1 section 4.1.4 for the ranges of r and s.
    """
    if len(raw) != _LENGTH:
        raise _refused(field, "is not a 65-byte secp256k1 signature")
    if raw[64] not in (_V_EVEN, _V_ODD):
        raise _refused(field, "has a recovery byte other than 27 or 28")
    if not 0 < int.from_bytes(raw[:32]) < CURVE_ORDER:
        raise _refused(field, "has r outside the curve order")
    if not 0 < int.from_bytes(raw[32:64]) <= _HALF_ORDER:
        raise _refused(field, "has s outside the lower half of the curve order")
    return Signature65(bytes(raw))


def recover(digest: bytes, signature: Signature65, *, field: str = "signature") -> Address:
    """The address whose key made ``signature`` over the 32-byte ``digest``.

    Raises:
        ChannelFault: ``INVALID_SIGNATURE`` naming ``field`` when ``r`` is no point on the curve, or no key results.
    """
    try:
        key = PublicKey.from_signature_and_message(
            signature[:64] + bytes((signature[64] - _V_EVEN,)), digest, hasher=None
        )
    except ValueError:
        raise _refused(field, "recovers to no key") from None
    return _address(key)


def sign(digest: bytes, key: bytes) -> Signature65:
    """Sign a 32-byte digest with a 32-byte private key: deterministic (RFC 6979) and already canonical.

    Raises:
        ValueError: when ``key`` is not a private key; a key is configuration, never peer input.
    """
    raw = PrivateKey(key).sign_recoverable(digest, hasher=None)  # libsecp256k1 emits low s only
    return Signature65(raw[:64] + bytes((raw[64] + _V_EVEN,)))


def address_of(key: bytes) -> Address:
    """The address of a 32-byte private key. Raises ``ValueError`` when it is not one."""
    return _address(PrivateKey(key).public_key)


def _address(key: PublicKey) -> Address:
    return Address(keccak256(key.format(compressed=False)[1:])[12:])


def _refused(field: str, detail: str) -> ChannelFault:
    return ChannelFault(Reason.INVALID_SIGNATURE, field=field, detail=detail)
