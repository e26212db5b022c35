"""API keys: their text, which is shown once, and their digest, which is all a ledger ever holds."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from mppnode.kernel.faults import NodeFault, NodeReason

KEY_START: Final = "sk-mpp-"
SECRET_BYTES: Final = 32
_CHECK_BYTES: Final = 4
_BODY_CHARS: Final = 48  # 36 bytes are whole groups of base64url: no padding, and every text means other bytes
_SHAPE: Final = re.compile(rf"{KEY_START}[A-Za-z0-9_-]{{{_BODY_CHARS}}}", re.ASCII)
_SHOWN_CHARS: Final = 6  # 36 of 256 bits: enough to tell one's own keys apart, and no help in guessing one
_DIGEST_BYTES: Final = 32


class KeyDigest:
    """The SHA-256 of a key's text: what is stored, looked up and cached by. Prints as nothing.

    Neither slow nor keyed on purpose. A slow hash protects secrets people choose; nobody searches 256 random bits, and
    ten milliseconds per request would only be a lever for whoever floods the node. A keyed one would tie every
    customer's key to a secret of ours that could then never be changed.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        if len(value) != _DIGEST_BYTES:
            raise ValueError(f"a key digest has {_DIGEST_BYTES} bytes")
        self._value = bytes(value)

    def __eq__(self, other: object) -> bool:
        """Whether both are of one key, found out in constant time."""
        return isinstance(other, KeyDigest) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        # What time a table takes to find a digest says something about the digest. The caller cannot choose
        # it without inverting SHA-256, so it says nothing about how much of a guessed key was right.
        return hash(self._value)

    def __repr__(self) -> str:
        return "KeyDigest(***)"

    def stored(self) -> bytes:
        """The 32 bytes, for the ledger's column and nothing else."""
        return self._value


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made. ``text`` exists here and in the one answer that shows it; ``prefix`` is for lists."""

    text: str = field(repr=False)
    digest: KeyDigest
    prefix: str


def new_key(entropy: Callable[[int], bytes]) -> NewKey:
    """Make a key of 256 bits; ``entropy(n)`` gives n bytes that nobody can predict, such as ``secrets.token_bytes``."""
    secret = entropy(SECRET_BYTES)
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a key needs {SECRET_BYTES} bytes of entropy")
    text = KEY_START + base64.urlsafe_b64encode(secret + _check(secret)).decode()
    return NewKey(text, _digest(text), text[: len(KEY_START) + _SHOWN_CHARS])


def is_key(token: str) -> bool:
    """Whether a bearer token claims to be an API key; everything else is tried as a JWT."""
    return token.startswith(KEY_START)


def parse_key(text: object) -> KeyDigest:
    """The digest of a key a caller presents, after checks that need no ledger.

    A key with a typing error is told so: the checksum shows it, and is no secret. Whether a sound key exists is not
    known here.

    Raises:
        NodeFault: ``INVALID_KEY``; the words never repeat what was sent.
    """
    if not isinstance(text, str) or _SHAPE.fullmatch(text) is None:
        raise NodeFault(NodeReason.INVALID_KEY, detail=f"an API key is {KEY_START} and {_BODY_CHARS} characters")
    body = base64.urlsafe_b64decode(text[len(KEY_START) :])
    secret, check = body[:SECRET_BYTES], body[SECRET_BYTES:]
    if check != _check(secret):
        raise NodeFault(NodeReason.INVALID_KEY, detail="the API key has a typing error: its checksum does not fit")
    return _digest(text)


def _check(secret: bytes) -> bytes:
    # CRC-32 finds every error within 32 adjacent bits, hence every wrong or swapped pair of characters; a truncated
    # hash would only probably. Its bytes go in the order its bits come out, else that fails across the boundary.
    return zlib.crc32(secret).to_bytes(_CHECK_BYTES, "little")


def _digest(text: str) -> KeyDigest:
    return KeyDigest(hashlib.sha256(text.encode("ascii")).digest())
