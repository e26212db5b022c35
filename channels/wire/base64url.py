"""Base64 in its two alphabets, where every byte string has exactly one text that we write and few that we read.

Python's own decoders skip foreign characters and ignore the unused bits of the last character, so one credential would
have endlessly many spellings and a replay filter keyed by text would see each as new.
"""

from __future__ import annotations

import binascii
import re

from channels.faults import ChannelFault, Reason

# One alphabet per text: a mixture is nothing any encoder writes.
_TEXT = re.compile(r"([A-Za-z0-9_-]*|[A-Za-z0-9+/]*)(={0,2})", re.ASCII)
_TO_STANDARD = str.maketrans("-_", "+/")
_TO_URL = str.maketrans("+/", "-_")


def encode(data: bytes) -> str:
    """Write ``data`` as base64url without padding (RFC 4648 section 5)."""
    return encode_padded(data).rstrip("=").translate(_TO_URL)


def encode_padded(data: bytes) -> str:
    """Write ``data`` as standard base64 with padding (RFC 4648 section 4)."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def decode(text: object, *, field: str, length_max: int, reason: Reason = Reason.INVALID_PAYLOAD) -> bytes:
    """Read base64 of at most ``length_max`` bytes, in either alphabet, with full padding or none.

    Beyond that the text must be canonical: nothing but alphabet characters, unused bits zero.

    Raises:
        ChannelFault: ``reason`` naming ``field``.
    """
    if not isinstance(text, str) or len(text) > (length_max + 2) // 3 * 4:
        raise ChannelFault(reason, field=field, detail="is not base64 text within its size limit")
    match = _TEXT.fullmatch(text)
    if match is None or (match.group(2) and len(text) % 4 != 0):
        raise ChannelFault(reason, field=field, detail="is not base64")
    digits = match.group(1).translate(_TO_STANDARD)
    # The length modulo 4 is never 1 in base64; the padding below would then be three characters and hide that.
    if len(digits) % 4 == 1:
        raise ChannelFault(reason, field=field, detail="is not base64")
    data = binascii.a2b_base64(digits + "=" * (-len(digits) % 4))
    if len(data) > length_max or encode_padded(data).rstrip("=") != digits:
        raise ChannelFault(reason, field=field, detail="is not canonical base64")
    return data
