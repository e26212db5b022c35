"""Server-sent events cut from a provider's bytes; shared by every decoder.

The cutter never forwards anything but JSON payloads: event names, ids, retry hints and comments of a provider stay
behind, so that only our code can write payment events.

Source: the WHATWG server-sent events grammar.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Final

import orjson

from mppnode.providers.base import Chunk

FRAME_BYTES_MAX: Final = 256 * 1024
"""One event. Long enough for the top log-probabilities of a burst, short enough to keep per stream."""
CHOICES_MAX: Final = 128
"""Choices in one event: the most the API lets a caller ask for. Every pair of them is compared."""
DONE_FRAME: Final = b"data: [DONE]\n\n"

_DONE: Final = b"[DONE]"
_BOM: Final = b"\xef\xbb\xbf"


class EventDecoder(ABC):
    """Cuts an event stream into payloads, for any division of its bytes over reads; a subclass reads the payloads.

    Nothing is raised. A stream that breaks the rules yields the chunks that came before, then one whose ``error``
    names the rule, and from then on nothing: raising would lose the chunks of the same read that are whole.
    """

    __slots__ = ("_after_cr", "_bom", "_over", "_searched", "_tail", "implausible_reports")

    def __init__(self) -> None:
        self._tail = bytearray()
        self._searched = 0
        self._after_cr = False
        self._bom = True
        self._over = False
        self.implausible_reports = 0
        """Usage reports that were dropped because their numbers cannot be true."""

    def feed(self, data: bytes) -> list[Chunk]:
        """The chunks completed by ``data``, in order."""
        if self._over or not data:
            return []
        if self._after_cr or b"\r" in data:
            data = self._unify(data)
        tail = self._tail
        if not tail and data.endswith(b"\n\n"):
            return self._events(data[:-2])
        # Appending to a bytearray and searching only what is new keeps a provider that sends single bytes linear.
        tail += data
        cut = tail.rfind(b"\n\n", max(0, self._searched - 1))
        self._searched = len(tail)
        if cut < 0:
            if len(tail) > FRAME_BYTES_MAX + 1:  # the first half of its blank line is not part of a frame
                return [self._broken("oversize_frame")]
            return []
        whole = bytes(tail[:cut])
        del tail[: cut + 2]
        self._searched = len(tail)
        chunks = self._events(whole)
        if len(tail) > FRAME_BYTES_MAX + 1 and not self._over:
            chunks.append(self._broken("oversize_frame"))
        return chunks

    def end(self) -> list[Chunk]:
        """What is left when the provider closes: an event that lacked only its blank line, or an error."""
        if self._over or not self._tail:
            return []
        return self.feed(b"\n\n")

    def _unify(self, data: bytes) -> bytes:
        """Turn CRLF and CR into LF. A CR at the end of a read may be half of a CRLF."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r") if data else False
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _broken(self, code: str) -> Chunk:
        self._over = True
        self._tail.clear()
        return Chunk(error=code)

    def _events(self, whole: bytes) -> list[Chunk]:
        if self._bom:
            self._bom = False
            whole = whole.removeprefix(_BOM)
        chunks: list[Chunk] = []
        for block in whole.split(b"\n\n"):
            if len(block) > FRAME_BYTES_MAX:
                chunks.append(self._broken("oversize_frame"))
            elif block.startswith(b"data: {") and block.endswith(b"}") and b"\n" not in block:
                self._payload(block[6:], block, chunks)
            else:
                payload = _joined_data(block)
                if payload is None:
                    continue
                if payload == _DONE:
                    self._finish(chunks)
                else:
                    self._payload(payload, None, chunks)
            if self._over:
                break
        return chunks

    def _payload(self, payload: bytes, block: bytes | None, chunks: list[Chunk]) -> None:
        """Parse one payload; ``block`` is the event as it came when that is already what we would write."""
        try:
            event = orjson.loads(payload)
        except orjson.JSONDecodeError:
            event = None
        if type(event) is not dict:
            chunks.append(self._broken("invalid_frame"))
        elif event.get("error") or event.get("object") == "error":
            chunks.append(self._broken("upstream_error"))  # its text stays here: it may quote our key or the prompt
        else:
            self._read(event, payload, block, chunks)

    @abstractmethod
    def _read(self, event: dict[str, Any], payload: bytes, block: bytes | None, chunks: list[Chunk]) -> None:
        """Append what one event becomes."""

    def _finish(self, chunks: list[Chunk]) -> None:
        """Append the end marker."""
        self._over = True
        chunks.append(Chunk(DONE_FRAME, done=True))


def _joined_data(block: bytes) -> bytes | None:
    """The joined data lines of an event, or ``None`` when it has none. Every other field is dropped."""
    lines = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    payload = b"\n".join(lines).strip(b" \t\n")
    return payload or None
