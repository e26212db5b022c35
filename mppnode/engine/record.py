"""``Idempotency-Key``: the answer of a request is kept, and a repeat of the request gets it instead of another.

Kept before its bill is final: a crash in between costs the node an answer, where the other order would cost the payer a
second charge. Only complete answers are kept. One that broke off was charged for what was delivered, and its repeat is
a request of its own, as the caller wants the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import orjson

from channels.faults import ChannelFault, Reason
from channels.instants import UnixMillis
from channels.model import NodeId
from mppnode.engine.sink import Sink
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger import idempotency
from mppnode.ledger.credits import Credits
from mppnode.ledger.idempotency import Claim, Stored
from mppnode.ledger.talk import Talk

_R = TypeVar("_R")

HEADER: Final = "Idempotency-Key"
_NAME = re.compile(r"[!-~]{1,255}", re.ASCII)  # as Stripe has it
_PURGE_S: Final = 600.0
_CATCH_UP_S: Final = 5.0
_LATE_MAX: Final = 20_000  # some 500 bytes each: an outage of the ledger under load
_KEPT_MAX: Final = 4 << 20  # bytes: some 20,000 streamed tokens; it waits in memory until the request ends
_WAITING_MAX: Final = 256 << 20  # bytes of all answers that wait at once: thousands of streams with a key each


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer of an earlier request with the same key."""

    type: str
    headers: Mapping[str, str]
    body: bytes


class Idempotence:
    """Claims requests by their key, and sees to it that every claim ends."""

    def __init__(self, books: Credits, *, clock: Clock, node: Callable[[], NodeId], owner: TaskOwner) -> None:
        self.waiting = 0
        """Bytes of the answers that wait in memory for their requests to end."""
        self.clock = clock
        self._books = books
        self._node = node
        self._owner = owner
        self._tickets = 0
        self._late: OrderedDict[_Name, Callable[[], Talk[object]]] = OrderedDict()

    async def begin(self, scope: str, name: str, asked: bytes) -> Kept | Record:
        """Claim the request that ``scope`` calls ``name``, or give the answer it has got already.

        A caller that leaves meanwhile leaves no claim behind.

        Raises:
            ChannelFault: ``STORE_UNAVAILABLE``.
            NodeFault: ``INVALID_FIELD`` for a malformed key; ``OTHER_REQUEST`` when it was used for other bytes than
                ``asked``; ``REQUEST_RUNNING`` while the first is being done; ``CONFLICT`` when its answer was not kept.
        """
        if _NAME.fullmatch(name) is None:
            raise NodeFault(NodeReason.INVALID_FIELD, field=HEADER, detail="must be 1 to 255 visible ASCII characters")
        digest, body = hashlib.sha256(name.encode()).hexdigest(), hashlib.sha256(asked).hexdigest()
        task = self._owner.start(self._claim(scope, digest, body), name="claim request")
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.add_done_callback(self._unclaim)
            raise
        found = task.result()
        if isinstance(found, ChannelFault):
            raise found
        if isinstance(found, Stored):
            return _kept(found.answer)
        if found is Claim.OTHER_BODY:
            raise NodeFault(NodeReason.OTHER_REQUEST, field=HEADER, detail="was used for another request")
        if found is Claim.RUNNING:
            raise NodeFault(NodeReason.REQUEST_RUNNING, field=HEADER, detail="names a request that is being served")
        assert isinstance(found, Record)
        return found

    async def _claim(self, scope: str, digest: str, body: str) -> Record | Claim | Stored | ChannelFault:
        self._tickets += 1
        name = _Name(scope, digest, self._node(), str(self._tickets))
        claim = partial(idempotency.claim, scope, digest, body, name.owner, self.clock.now_millis(), ticket=name.ticket)
        try:
            for late in [late for late in self._late if (late.scope, late.digest) == (scope, digest)]:
                await self._write_late(late)
            if len(self._late) >= _LATE_MAX:
                raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger has not caught up yet")
            found = await self._write(name, claim, late=name.give_up)  # perhaps only the answer was lost
        except ChannelFault as fault:  # an answer, not a failed task
            return fault
        return Record(self, name) if found is Claim.OURS else found

    def _unclaim(self, task: asyncio.Task[Record | Claim | Stored | ChannelFault]) -> None:
        if not task.cancelled() and task.exception() is None and isinstance(record := task.result(), Record):
            self._owner.spawn(record.drop(), name="drop record")

    async def store(self, name: _Name, answer: Mapping[str, object]) -> None:
        """End a claim with an answer; when that cannot be written now, later, and without the answer's bytes."""
        at = self.clock.now_millis()
        lost = partial(name.store, _json({**answer, "body": None}), at)
        await self._end(name, partial(name.store, _json(answer), at), late=lost)

    async def give_up(self, name: _Name) -> None:
        """End a claim that came to nothing, now or later."""
        await self._end(name, name.give_up, late=name.give_up)

    async def _end(
        self, name: _Name, talk: Callable[[], Talk[object]], *, late: Callable[[], Talk[object]]
    ) -> None:
        try:
            await self._write(name, talk, late=late)
        except ChannelFault:
            return  # the bill goes on without it; until it is caught up with, a repeat is refused, never charged

    async def _write(
        self, name: _Name, talk: Callable[[], Talk[_R]], *, late: Callable[[], Talk[object]]
    ) -> _R:
        try:
            return await self._books.write(talk, of=name.scope)
        except BaseException:  # also cut off by the node's stop: whatever was meant to end must end
            self._late[name] = late
            raise

    async def catch_up(self) -> None:
        """Write what could not be written when its request ended; stops at the first refusal of the ledger."""
        try:
            for name in tuple(self._late):
                await self._write_late(name)
        except ChannelFault:
            return

    async def _write_late(self, name: _Name) -> None:
        talk = self._late.get(name)
        if talk is not None:  # nobody else was faster
            await self._books.write(talk, of=name.scope)
            self._late.pop(name, None)

    async def keep(self, sleep: Callable[[float], Awaitable[None]], on_error: Callable[[ChannelFault], None]) -> None:
        """Write what is late and forget answers that are too old, until cancelled."""
        since = 0.0
        while True:
            await sleep(_CATCH_UP_S)
            await self.catch_up()
            since += _CATCH_UP_S
            if since < _PURGE_S:
                continue
            since = 0.0
            try:
                at = self.clock.now_millis()
                await self._books.write(partial(idempotency.purge, at), of="")
            except ChannelFault as fault:
                on_error(fault)


@dataclass(frozen=True, slots=True)
class _Name:
    """One claim: the request it is for, and what tells it from every other."""

    scope: str
    digest: str
    owner: NodeId
    ticket: str

    def store(self, answer: str, at: UnixMillis) -> Talk[object]:
        return idempotency.store(self.scope, self.digest, self.owner, answer, at, ticket=self.ticket)

    def give_up(self) -> Talk[object]:
        return idempotency.give_up(self.scope, self.digest, self.owner, ticket=self.ticket)


class Record:
    """The answer of one claimed request; it is ended or dropped once, and what comes later changes nothing."""

    __slots__ = ("_idempotence", "_name", "_open", "_parts", "_whole", "headers", "type")

    def __init__(self, idempotence: Idempotence, name: _Name) -> None:
        self._idempotence = idempotence
        self._name = name
        self._open = True
        self._whole = True
        self._parts = bytearray()
        self.type = ""
        self.headers: Mapping[str, str] = {}

    def through(self, sink: Sink) -> Sink:
        """A sink that remembers what it passes on."""
        return _Recording(sink, self._take)

    def _take(self, data: bytes) -> None:
        if not (self._open and self._whole):
            return
        if len(self._parts) + len(data) > _KEPT_MAX or self._idempotence.waiting + len(data) > _WAITING_MAX:
            self._forget()
            self._whole = False
        else:
            self._parts += data
            self._idempotence.waiting += len(data)

    def _forget(self) -> None:
        self._idempotence.waiting -= len(self._parts)
        self._parts = bytearray()

    async def end(self, last: bytes, *, complete: bool) -> None:
        """Keep the answer, whose last bytes these are; one that is not complete is dropped."""
        if not complete:
            await self.drop()
        elif self._open:
            self._take(last)
            self._open = False
            body = self._parts.decode() if self._whole else None
            self._forget()
            await self._idempotence.store(self._name, {"type": self.type, "headers": dict(self.headers), "body": body})

    async def drop(self) -> None:
        """Let a repeat be a first try."""
        if self._open:
            self._open = False
            self._forget()
            await self._idempotence.give_up(self._name)


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


def _json(answer: Mapping[str, object]) -> str:
    return orjson.dumps(answer).decode()


def _kept(answer: str) -> Kept:
    found = orjson.loads(answer)
    if found["body"] is None:
        detail = "names a request that was served; its answer was not kept"
        raise NodeFault(NodeReason.CONFLICT, field=HEADER, detail=detail)
    return Kept(found["type"], found["headers"], found["body"].encode())
