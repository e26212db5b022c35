"""Makes ``signatures.json``: some two hundred ways to write a voucher's signature, each with its verdict.

The verdict is known by construction, never by asking the code under test, and the curve arithmetic here is its own:
``python -m tests.vectors.signature_set`` writes the file again. Keys are throwaway.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

from channels.descriptor import RESERVE_ADDRESS, Escrow, SessionProtocol
from channels.ids import Address, ChannelId
from channels.keccak import keccak256
from channels.voucher import VoucherDomain

FILE: Final = Path(__file__).parent / "signatures.json"
P: Final = 2**256 - 2**32 - 977
N: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
G: Final = (
    0x79BE667EF9DCBBAC55A06295CE870B07029BFCDB2DCE28D959F2815B16F81798,
    0x483ADA7726A3C4655DA4FBFC0E1108A8FD17B448A68554199C47D08FFB10D4B8,
)
HALF: Final = N // 2
KEY: Final = b"\x11" * 32
STRANGER: Final = b"\x22" * 32
MAX: Final = 2**256 - 1
_V1_ADDRESS: Final = Address(bytes.fromhex("e1c4d3dce17bc111181ddf716f75bae49e61a336"))
_CHANNEL: Final = ChannelId(keccak256(b"a channel"))
_MAGIC_6492: Final = b"\x64\x92" * 16
Point = tuple[int, int] | None

VOUCHERS: Final = (
    (Escrow(SessionProtocol.V2, 4217, RESERVE_ADDRESS), 1),
    (Escrow(SessionProtocol.V2, 4217, RESERVE_ADDRESS), 2**96 - 1),
    (Escrow(SessionProtocol.V2, 1337, RESERVE_ADDRESS), 1_000_000),
    (Escrow(SessionProtocol.V1, 4217, _V1_ADDRESS), 1_000_000),
)


def _add(a: Point, b: Point) -> Point:
    if a is None or b is None:
        return a or b
    if a[0] == b[0]:
        if (a[1] + b[1]) % P == 0:
            return None
        slope = 3 * a[0] * a[0] * pow(2 * a[1], -1, P) % P
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, P) % P
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def _times(k: int, point: Point = G) -> Point:
    found: Point = None
    while k:
        if k & 1:
            found = _add(found, point)
        point = _add(point, point)
        k >>= 1
    return found


def address(key: bytes) -> bytes:
    """The address of a key."""
    point = _times(int.from_bytes(key))
    assert point is not None
    return keccak256(point[0].to_bytes(32) + point[1].to_bytes(32))[12:]


def signed(digest: bytes, key: bytes, nonce: bytes) -> tuple[int, int, int]:
    """Low-s ``(r, s, v)`` over a digest with a nonce derived from ``nonce``."""
    k = int.from_bytes(sha256(nonce + digest + key).digest()) % N
    point = _times(k)
    assert point is not None
    r, odd = point[0] % N, point[1] & 1
    s = (int.from_bytes(digest) + r * int.from_bytes(key)) * pow(k, -1, N) % N
    return (r, N - s, 28 - odd) if s > HALF else (r, s, 27 + odd)


def recovered(digest: bytes, raw: bytes) -> bytes | None:
    """The address behind a canonical envelope, by SEC 1 section 4.1.6; None where there is no key."""
    x, s, odd = int.from_bytes(raw[:32]), int.from_bytes(raw[32:64]), raw[64] - 27
    y = pow(x**3 + 7, (P + 1) // 4, P)
    if y * y % P != (x**3 + 7) % P:
        return None
    point = (x, y if y & 1 == odd else P - y)
    inverse = pow(x, -1, N)
    key = _add(_times(s * inverse % N, point), _times(-int.from_bytes(digest) * inverse % N))
    return None if key is None else keccak256(key[0].to_bytes(32) + key[1].to_bytes(32))[12:]


def to_nobody(digest: bytes) -> tuple[int, int, int]:
    """A canonical form whose recovered key is the point at infinity: ``s * R`` equals ``digest * G``."""
    k = 7
    point = _times(k)
    assert point is not None
    s, odd = int.from_bytes(digest) * pow(k, -1, N) % N, point[1] & 1
    return (point[0], N - s, 28 - odd) if s > HALF else (point[0], s, 27 + odd)


def pack(r: int, s: int, v: int) -> bytes:
    return r.to_bytes(32) + s.to_bytes(32) + bytes((v,))


def _der(r: int, s: int) -> bytes:
    def integer(value: int) -> bytes:
        body = value.to_bytes(value.bit_length() // 8 + 1)
        return b"\x02" + bytes((len(body),)) + body

    body = integer(r) + integer(s)
    return b"\x30" + bytes((len(body),)) + body


# ------------------------------------------------------------------------------------------------------------- groups

Case = tuple[str, bytes]


def accepted(digest: bytes) -> Iterator[Case]:
    """Canonical, by the signer. More than one exists for one voucher: whoever signs chooses the nonce."""
    for number in range(6):
        yield f"canonical, nonce {number}", pack(*signed(digest, KEY, bytes((number,))))


def another_form(digest: bytes) -> Iterator[Case]:
    """The right signer's signature in any other spelling, and numbers out of range."""
    r, s, v = signed(digest, KEY, b"\0")
    good = pack(r, s, v)
    yield "high-s twin", pack(r, N - s, 55 - v)
    yield "high-s, same v", pack(r, N - s, v)
    for wrong in (0, 1, 2, 3, 4, 26, 29, 30, 31, 34, 35, 36, 37, 127, 128, 255):
        yield f"v {wrong}", pack(r, s, wrong)
    for name, number in (("zero", 0), ("n", N), ("n + 1", N + 1), ("p", P), ("p + 1", P + 1), ("maximal", MAX)):
        yield f"r {name}", pack(number, s, v)
        yield f"s {name}", pack(r, number, v)
        yield f"r and s {name}", pack(number, number, v)
    yield "r one, s zero", pack(1, 0, v)
    yield "s just above half", pack(r, HALF + 1, v)
    yield "s n - 1", pack(r, N - 1, v)
    compact = r.to_bytes(32) + (s | (v - 27) << 255).to_bytes(32)
    yield "compact, EIP-2098", compact
    yield "compact's parity bit, and v", r.to_bytes(32) + (s | 1 << 255).to_bytes(32) + bytes((v,))
    yield "without v", good[:64]
    yield "v first", bytes((v,)) + good[:64] + b"\0"
    yield "DER", _der(r, s)
    yield "DER and v", _der(r, s) + bytes((v,))
    yield "three ABI words", good[:64] + v.to_bytes(32)
    yield "ABI bytes", (32).to_bytes(32) + (65).to_bytes(32) + good + bytes(31)
    yield "trailing zero", good + b"\0"
    yield "leading zero", b"\0" + good
    yield "twice", good + good
    yield "as hex text", good.hex().encode()
    yield "as 0x text", b"0x" + good.hex().encode()
    yield "empty", b""
    yield "one byte", bytes((v,))
    yield "all zeros", bytes(65)
    yield "zeros with v", bytes(64) + bytes((v,))
    yield "keychain wrapper, version 1", b"\x03" + address(KEY) + good
    yield "keychain wrapper, version 2", b"\x04" + address(KEY) + good
    yield "P256", b"\x01" + good[:64] + good[:64] + b"\0"
    yield "WebAuthn", b"\x02" + bytes(69) + good[:64] + good[:64]
    yield "secp256k1 type byte", b"\x00" + good
    yield "contract wallet, EIP-6492", address(KEY).rjust(32, b"\0") + good + _MAGIC_6492
    yield "contract wallet, pre-approved hash", address(KEY).rjust(32, b"\0") + bytes(32) + b"\x01"


def another_signer(escrow: Escrow, cumulative: int, digest: bytes) -> Iterator[Case]:
    """Canonical forms that are nobody's signature of this voucher, or somebody else's."""
    r, s, v = signed(digest, KEY, b"\0")
    yield "the other parity", pack(r, s, 55 - v)
    yield "s plus one", pack(r, s + 1 if s < HALF else s - 1, v)
    yield "s at half", pack(r, HALF, v)
    yield "s one", pack(r, 1, v)
    yield "r off the curve", pack(5, s, v)
    yield "r one", pack(1, s, v)
    yield "r n - 1", pack(N - 1, s, v)
    yield "r and s one", pack(1, 1, v)
    yield "recovers to nobody", pack(*to_nobody(digest))
    yield "a stranger's", pack(*signed(digest, STRANGER, b"\0"))
    domain = VoucherDomain(escrow)
    other = cumulative - 1 if cumulative > 1 else cumulative + 1
    elsewhere = VoucherDomain(Escrow(escrow.protocol, escrow.chain_id + 1, escrow.address))
    beside = VoucherDomain(Escrow(escrow.protocol, escrow.chain_id, Address(bytes(19) + b"\1")))
    flipped = SessionProtocol.V1 if escrow.protocol is SessionProtocol.V2 else SessionProtocol.V2
    crossed = VoucherDomain(Escrow(flipped, escrow.chain_id, escrow.address))
    text = b"\x19Ethereum Signed Message:\n32" + digest
    for name, signing in (
        ("another amount", domain.digest(_CHANNEL, other)),
        ("another channel", domain.digest(ChannelId(keccak256(b"another")), cumulative)),
        ("another chain", elsewhere.digest(_CHANNEL, cumulative)),
        ("another escrow", beside.digest(_CHANNEL, cumulative)),
        ("the other protocol", crossed.digest(_CHANNEL, cumulative)),
        ("a personal message", keccak256(text)),
        ("the digest hashed again", keccak256(digest)),
        ("the digest with SHA-256", sha256(digest).digest()),
        ("zero", bytes(32)),
    ):
        yield f"over {name}", pack(*signed(signing, KEY, b"\0"))


def make() -> dict[str, object]:
    """The whole set."""
    vouchers = []
    for escrow, cumulative in VOUCHERS:
        digest = VoucherDomain(escrow).digest(_CHANNEL, cumulative)
        groups = {
            "accepted": accepted(digest),
            "another form": another_form(digest),
            "another signer": another_signer(escrow, cumulative, digest),
        }
        vouchers.append(
            {
                "protocol": escrow.protocol.value,
                "chainId": escrow.chain_id,
                "escrow": "0x" + escrow.address.hex(),
                "channelId": "0x" + _CHANNEL.hex(),
                "cumulative": str(cumulative),
                "signer": "0x" + address(KEY).hex(),
                "digest": "0x" + digest.hex(),
                "cases": {verdict: {name: "0x" + raw.hex() for name, raw in each} for verdict, each in groups.items()},
            }
        )
    return {"how": "python -m tests.vectors.signature_set; verdicts by construction", "vouchers": vouchers}


def text() -> str:
    """The file's content."""
    return json.dumps(make(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
