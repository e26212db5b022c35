"""The sliver of Solidity's ABI this library speaks: static words and ``bytes``, in canonical form only.

A general ABI decoder accepts several byte strings for one meaning: dirty upper bytes of an address, bytes after the
last word, a tail that overlaps another. Money hangs on "this calldata does exactly that", so the reader below refuses
every spelling but the one :func:`encode` writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from channels.faults import ChannelFault, Reason
from channels.ids import Address, Hash32
from channels.keccak import keccak256

WORD: Final = 32
SELECTOR: Final = 4
_ADDRESS: Final = 20
_NO_TX: Final = Hash32(bytes(32))


@dataclass(frozen=True, slots=True)
class Dynamic:
    """A value of Solidity type ``bytes``; a bare ``bytes`` argument of :func:`encode` is a static word."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Log:
    """One event as the chain reports it, and where: block and transaction are zero until it is mined."""

    address: Address
    topics: tuple[Hash32, ...]
    data: bytes
    block: int = 0
    tx_hash: Hash32 = _NO_TX


def selector(signature: str) -> bytes:
    """The 4 bytes that name a function, from ``name(types)``. Source: Solidity ABI, function selector."""
    return keccak256(signature.encode())[:SELECTOR]


def topic(signature: str) -> Hash32:
    """The 32 bytes that name an event, from ``Name(types)``. Source: Solidity ABI, events."""
    return keccak256(signature.encode())


def word(value: int | bytes) -> bytes:
    """One static value as 32 bytes: an integer (or bool), a 20-byte address or a 32-byte word."""
    if isinstance(value, int):
        return value.to_bytes(WORD)
    assert len(value) in (_ADDRESS, WORD)
    return value.rjust(WORD, b"\0")


def encode(*values: int | bytes | Dynamic) -> bytes:
    """Encode arguments or results: static words in place, every :class:`Dynamic` in the tail.

    Source: Solidity ABI, formal specification of the encoding. A tuple of static members encodes as its members.
    """
    head, tail = bytearray(), bytearray()
    for value in values:
        if isinstance(value, Dynamic):
            head += word(WORD * len(values) + len(tail))
            tail += word(len(value.data)) + value.data + bytes(-len(value.data) % WORD)
        else:
            head += word(value)
    return bytes(head + tail)


class Words:
    """Reads canonical ABI values in order; call :meth:`end` last, or nothing is known about the rest."""

    __slots__ = ("_at", "_data", "_field", "_reason", "_tail")

    def __init__(self, data: bytes, *, heads: int, field: str, reason: Reason = Reason.TRANSACTION_REJECTED) -> None:
        self._data = data
        self._at = 0
        self._tail = heads * WORD
        self._field = field
        self._reason = reason
        if len(data) < self._tail:
            raise self.refused("is too short for its arguments")

    def uint(self, bits: int) -> int:
        """An unsigned integer that fits ``bits``."""
        value = int.from_bytes(self._word())
        if value.bit_length() > bits:
            raise self.refused("has an integer beyond its type")
        return value

    def bool(self) -> bool:
        """A boolean; only 0 and 1 are."""
        return self.uint(1) == 1

    def address(self) -> Address:
        """An address; its upper 12 bytes must be zero."""
        value = self._word()
        if any(value[:-_ADDRESS]):
            raise self.refused("has an address with dirty upper bytes")
        return Address(value[-_ADDRESS:])

    def hash32(self) -> Hash32:
        """A 32-byte word as it is."""
        return Hash32(self._word())

    def dynamic(self, *, length_max: int) -> bytes:
        """A ``bytes`` value that starts exactly where the previous tail ended and is padded with zeros."""
        if int.from_bytes(self._word()) != self._tail or len(self._data) < self._tail + WORD:
            raise self.refused("has a dynamic value that is out of place")
        length = int.from_bytes(self._data[self._tail : self._tail + WORD])
        if length > length_max:
            raise self.refused("has a dynamic value that is too long")
        start, end = self._tail + WORD, self._tail + WORD + length
        self._tail = end + -length % WORD
        if len(self._data) < self._tail or any(self._data[end : self._tail]):
            raise self.refused("has a dynamic value with wrong padding")
        return self._data[start:end]

    def end(self) -> None:
        """Refuse trailing bytes."""
        if len(self._data) != self._tail:
            raise self.refused("has bytes after its arguments")

    def refused(self, detail: str) -> ChannelFault:
        """The fault of this reader, for checks the caller makes on values it read."""
        return ChannelFault(self._reason, field=self._field, detail=detail)

    def _word(self) -> bytes:
        value = self._data[self._at : self._at + WORD]
        self._at += WORD
        return value


def arguments(data: bytes, name: bytes, *, heads: int, field: str) -> Words:
    """A reader over the arguments of a call that must be to the function selected by ``name``.

    Raises:
        ChannelFault: ``TRANSACTION_REJECTED`` naming ``field`` for any other function.
    """
    if data[:SELECTOR] != name:
        raise ChannelFault(Reason.TRANSACTION_REJECTED, field=field, detail="calls another function")
    return Words(data[SELECTOR:], heads=heads, field=field)
