"""``Idempotency-Key``: the answer of a request is kept, and a repeat of the request gets it instead of another.

Kept before its bill is final: a crash in between costs the node an answer, where the other order would cost the payer a
second charge. Only complete answers are kept. One that broke off was charged for what was delivered, and its repeat is
a request of its own, as the caller wants the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import orjson

from channels.faults import ChannelFault
from channels.model import NodeId
from mppnode.engine.sink import Sink
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.ledger import idempotency
from mppnode.ledger.credits import Credits
from mppnode.ledger.idempotency import Claim, Stored
from mppnode.ledger.talk import Talk

HEADER: Final = "Idempotency-Key"
_NAME = re.compile(r"[!-~]{1,255}", re.ASCII)  # as Stripe has it
_PURGE_S: Final = 600.0
_KEPT_MAX: Final = 4 << 20  # bytes: some 20,000 streamed tokens; it waits in memory until the request ends


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer of an earlier request with the same key."""

    type: str
    headers: Mapping[str, str]
    body: bytes


class Idempotence:
    """Claims requests by their key."""

    def __init__(self, books: Credits, *, clock: Clock, node: Callable[[], NodeId]) -> None:
        self._books = books
        self._clock = clock
        self._node = node

    async def begin(self, scope: str, name: str, asked: bytes) -> Kept | Record:
        """Claim the request that ``scope`` calls ``name``, or give the answer it has got already.

        Raises:
            NodeFault: ``INVALID_FIELD`` for a malformed key; ``OTHER_REQUEST`` when it was used for other bytes than
                ``asked``; ``REQUEST_RUNNING`` while the first is being done; ``CONFLICT`` when its answer was too large
                to keep.
        """
        if _NAME.fullmatch(name) is None:
            raise NodeFault(NodeReason.INVALID_FIELD, field=HEADER, detail="must be 1 to 255 visible ASCII characters")
        owner, at = self._node(), self._clock.now_millis()
        digest, body = hashlib.sha256(name.encode()).hexdigest(), hashlib.sha256(asked).hexdigest()
        found = await self._books.write(
            partial(idempotency.claim, scope, digest, body, owner, at), of=scope
        )
        if isinstance(found, Stored):
            return _kept(found.answer)
        if found is Claim.OTHER_BODY:
            raise NodeFault(NodeReason.OTHER_REQUEST, field=HEADER, detail="was used for another request")
        if found is Claim.RUNNING:
            raise NodeFault(NodeReason.REQUEST_RUNNING, field=HEADER, detail="names a request that is being served")
        return Record(self._books, self._clock, scope, digest, owner)

    async def keep(self, sleep: Callable[[float], Awaitable[None]], on_error: Callable[[ChannelFault], None]) -> None:
        """Forget answers that are too old, until cancelled."""
        while True:
            await sleep(_PURGE_S)
            try:
                at = self._clock.now_millis()
                await self._books.write(partial(idempotency.purge, at), of="")
            except ChannelFault as fault:
                on_error(fault)


class Record:
    """The answer of one claimed request; it is ended or dropped once, and what comes later changes nothing."""

    __slots__ = ("_books", "_clock", "_name", "_open", "_owner", "_parts", "_scope", "_size", "headers", "type")

    def __init__(self, books: Credits, clock: Clock, scope: str, name: str, owner: NodeId) -> None:
        self._books = books
        self._clock = clock
        self._scope = scope
        self._name = name
        self._owner = owner
        self._open = True
        self._parts: list[bytes] = []
        self._size = 0
        self.type = ""
        self.headers: Mapping[str, str] = {}

    def through(self, sink: Sink) -> Sink:
        """A sink that remembers what it passes on."""
        return _Recording(sink, self._take)

    def _take(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= _KEPT_MAX:
            self._parts.append(data)
        else:
            self._parts.clear()

    async def end(self, last: bytes, *, complete: bool) -> None:
        """Keep the answer, whose last bytes these are; one that is not complete is dropped."""
        if not self._open:
            return
        if not complete:
            await self.drop()
            return
        self._open = False
        self._take(last)
        body = None if self._size > _KEPT_MAX else b"".join(self._parts).decode()
        answer = orjson.dumps({"type": self.type, "headers": dict(self.headers), "body": body}).decode()
        at = self._clock.now_millis()
        await self._write(partial(idempotency.store, self._scope, self._name, self._owner, answer, at))

    async def drop(self) -> None:
        """Let a repeat be a first try."""
        if self._open:
            self._open = False
            await self._write(partial(idempotency.give_up, self._scope, self._name, self._owner))

    async def _write(self, talk: Callable[[], Talk[object]]) -> None:
        # The bill goes on without it. While this node lives the claim stands, so a repeat is refused, never charged.
        with contextlib.suppress(ChannelFault):
            await self._books.write(talk, of=self._scope)


class _Recording:
    """Implements :class:`Sink` in front of another."""

    __slots__ = ("_sink", "_take", "buffered", "gone")

    def __init__(self, sink: Sink, take: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._take = take
        self.buffered = sink.buffered
        self.gone = sink.gone

    def write(self, frames: bytes) -> None:
        """See :class:`Sink`."""
        self._take(frames)
        self._sink.write(frames)


def _kept(answer: str) -> Kept:
    found = orjson.loads(answer)
    if found["body"] is None:
        detail = "names a request that was served; its answer was too large to keep"
        raise NodeFault(NodeReason.CONFLICT, field=HEADER, detail=detail)
    return Kept(found["type"], found["headers"], found["body"].encode())
