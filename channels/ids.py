"""Fixed-length byte identifiers and their one text form.

Keys are raw bytes, never text: hex has many spellings (case, checksum, ``0X``) and one channel must have one record.
Output is always ``0x`` plus lower-case digits.
"""

from __future__ import annotations

import re
from typing import Final, NewType

from channels.faults import ChannelFault, Reason

Address = NewType("Address", bytes)
"""20 bytes."""
Hash32 = NewType("Hash32", bytes)
"""32 bytes."""
ChannelId = NewType("ChannelId", bytes)
"""32 bytes, as derived by the escrow that holds the channel."""

ZERO_ADDRESS: Final = Address(bytes(20))
_HEX = re.compile(r"0x(?:[0-9a-fA-F]{2})*", re.ASCII)


def parse_hex(text: object, *, field: str, length_max: int) -> bytes:
    """Read ``0x`` hex of at most ``length_max`` bytes; case is accepted, spaces and odd lengths are not.

    Raises:
        ChannelFault: ``INVALID_PAYLOAD`` naming ``field``.
    """
    # The length check comes first so that a megabyte of digits costs nothing. bytes.fromhex alone allows spaces.
    if not isinstance(text, str) or len(text) > 2 + 2 * length_max or _HEX.fullmatch(text) is None:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=field, detail="is not 0x-prefixed hex of the right length")
    return bytes.fromhex(text[2:])


def _parse_exact(text: object, field: str, length: int) -> bytes:
    value = parse_hex(text, field=field, length_max=length)
    if len(value) != length:
        raise ChannelFault(Reason.INVALID_PAYLOAD, field=field, detail=f"is not {length} bytes of 0x-prefixed hex")
    return value


def parse_address(text: object, *, field: str) -> Address:
    """Read a 20-byte address in any letter case. Raises ``INVALID_PAYLOAD`` naming ``field``."""
    return Address(_parse_exact(text, field, 20))


def parse_hash32(text: object, *, field: str) -> Hash32:
    """Read a 32-byte hash in any letter case. Raises ``INVALID_PAYLOAD`` naming ``field``."""
    return Hash32(_parse_exact(text, field, 32))


def parse_channel_id(text: object, *, field: str = "channelId") -> ChannelId:
    """Read a channel id in any letter case. Raises ``INVALID_PAYLOAD`` naming ``field``."""
    return ChannelId(_parse_exact(text, field, 32))


def to_hex(value: bytes) -> str:
    """The text form of any identifier: ``0x`` plus lower-case hex."""
    return "0x" + value.hex()
