"""A payer made of loose parts: every credential a node can meet, well-formed or bent in one place.

Nothing here decides anything. Credentials are built with the library's own codecs; tests bend the JSON afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import aiohttp

from channels import escrow as escrow_v2
from channels import escrow_v1, tip20
from channels.descriptor import RESERVE_ADDRESS, Descriptor, Escrow, SessionProtocol
from channels.faults import Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.model import Account, ChainObserved
from channels.signature import address_of
from channels.tempo_tx import EXPIRING_NONCE_KEY, Call, SignedTx, TempoTx
from channels.units import Units
from channels.voucher import VoucherDomain, derive_channel_id
from channels.wire import base64url
from channels.wire import receipt as receipts
from channels.wire import request as requests
from channels.wire.challenge import Challenge
from channels.wire.credential import (
    ClosePayload,
    Credential,
    OpenPayload,
    Payload,
    TopUpPayload,
    VoucherPayload,
    encode,
    source_of,
)
from channels.wire.headers import authorization, parse_challenges
from channels.wire.receipt import SessionReceipt
from channels.wire.sse import NEED_VOUCHER_EVENT, RECEIPT_EVENT, SseEvent, SseParser
from mppnode.cli.devnet import CHAIN_ID, PATH_USD, V1_ESCROW, Devnet, DevnetOptions
from mppnode.cli.devprovider_server import Gate
from mppnode.kernel.clock import ManualClock
from mppnode.observe.logs import Level

PATH = "/v1/chat/completions"
UNIT = 1_000
"""Base units the development models quote: 100 output tokens of 10 units each."""
TOKEN_UNITS = 10
DEPOSIT = 100_000
V2 = Escrow(SessionProtocol.V2, CHAIN_ID, RESERVE_ADDRESS)
V1 = Escrow(SessionProtocol.V1, CHAIN_ID, V1_ESCROW)
_LARGE = 1 << 19  # aiohttp warns above a megabyte


def chat(model: str = "dev/echo", text: str = "hello there", **members: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **members}


def cost(model_tokens: int, prompt_tokens: int) -> int:
    """What so many tokens cost at the development prices, in pico."""
    return model_tokens * 10_000_000 + prompt_tokens * 500_000


# ------------------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True)
class Reply:
    """One whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.body)
        return value

    @property
    def code(self) -> str:
        """The reason the node gave."""
        code: str = self.json["error"]["code"]
        return code

    @property
    def field(self) -> str | None:
        """The field the node blames."""
        name: str | None = self.json["error"]["param"]
        return name

    @property
    def challenges(self) -> list[Challenge]:
        header = self.headers.get("WWW-Authenticate")
        return [] if header is None else parse_challenges([header])

    @property
    def receipt(self) -> SessionReceipt | None:
        header = self.headers.get("Payment-Receipt")
        return None if header is None else receipts.decode(header)

    def challenge(self, protocol: SessionProtocol = SessionProtocol.V2) -> Challenge:
        """The challenge for one session protocol."""
        for challenge in self.challenges:
            if requests.decode(challenge.request).escrow.protocol is protocol:
                return challenge
        raise AssertionError("no such challenge")


class Stream:
    """A response that is read event by event."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.status = response.status
        self.raw = bytearray()
        self.events: list[SseEvent] = []
        self._parser = SseParser()
        self._waiting: list[SseEvent] = []

    @property
    def receipt(self) -> SessionReceipt:
        """The receipt in the headers."""
        return receipts.decode(self.response.headers["Payment-Receipt"])

    async def next(self) -> SseEvent | None:
        """The next event, or None at the end."""
        while not self._waiting:
            data = await self.response.content.readany()
            if not data:
                return None
            self.raw += data
            self._waiting = self._parser.feed(data)
        event = self._waiting.pop(0)
        self.events.append(event)
        return event

    async def until(self, name: str) -> SseEvent:
        """Read up to the next event of a name."""
        while (event := await self.next()) is not None:
            if event.event == name:
                return event
        raise AssertionError(f"the stream ended without {name}")

    async def tokens(self, count: int) -> None:
        """Read until so many chunks with text have arrived in all."""
        while self.text_chunks < count:
            assert await self.next() is not None, "the stream ended early"

    async def rest(self) -> Self:
        """Read to the end."""
        while await self.next() is not None:
            pass
        return self

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The data events as JSON, without the end marker."""
        return [json.loads(e.data) for e in self.events if e.event == "message" and e.data != "[DONE]"]

    @property
    def texts(self) -> list[str]:
        """The pieces of text."""
        found = []
        for chunk in self.chunks:
            for choice in chunk.get("choices", []):
                text = choice["delta"].get("content")
                if text:
                    found.append(text)
        return found

    @property
    def text_chunks(self) -> int:
        return len(self.texts)

    @property
    def usage(self) -> dict[str, Any]:
        """The last usage report of the stream."""
        usage: dict[str, Any] = [chunk["usage"] for chunk in self.chunks if chunk.get("usage")][-1]
        return usage

    @property
    def final(self) -> SessionReceipt:
        """The one receipt event."""
        (event,) = [e for e in self.events if e.event == RECEIPT_EVENT]
        return receipts.parse_receipt(json.loads(event.data))

    @property
    def needs(self) -> list[dict[str, Any]]:
        return [json.loads(e.data) for e in self.events if e.event == NEED_VOUCHER_EVENT]


# -------------------------------------------------------------------------------------------------------------- payer


@dataclass(frozen=True)
class Channel:
    """A channel somebody opens or has opened."""

    id: ChannelId
    escrow: Escrow
    descriptor: Descriptor
    opening: SignedTx
    deposit: int

    @property
    def wire_descriptor(self) -> Descriptor | None:
        return self.descriptor if self.escrow.protocol is SessionProtocol.V2 else None


class Payer:
    """Signs whatever it is asked to."""

    def __init__(self, key: bytes, *, payee: Address, clock: ManualClock) -> None:
        self.key = key
        self.address = address_of(key)
        self.payee = payee
        self._clock = clock

    def transaction(self, calls: tuple[Call, ...], **changes: Any) -> SignedTx:
        """A transaction the chain would take, with ``changes`` to its fields."""
        now = self._clock.now()
        tx = TempoTx(
            chain_id=CHAIN_ID,
            max_priority_fee_per_gas=1_000_000_000,
            max_fee_per_gas=25_000_000_000,
            gas=500_000,
            calls=calls,
            nonce_key=EXPIRING_NONCE_KEY,
            nonce=0,
            valid_before=UnixSeconds(now + 25),
            valid_after=UnixSeconds(1 + int.from_bytes(os.urandom(4)) % 1_000_000_000),
            fee_token=PATH_USD,
        )
        return replace(tx, **changes).sign(self.key)

    def channel(
        self,
        escrow: Escrow = V2,
        deposit: int = DEPOSIT,
        *,
        calls: Callable[[tuple[Call, ...]], tuple[Call, ...]] = lambda calls: calls,
        call: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Channel:
        """A channel to be opened: ``call`` alters the open call's arguments, ``calls`` the batch, ``changes`` the tx."""
        salt, more = Hash32(os.urandom(32)), dict(call or {})
        if escrow.protocol is SessionProtocol.V2:
            opening = escrow_v2.OpenCall(self.payee, ZERO_ADDRESS, PATH_USD, Units(deposit), salt, self.address)
            opening = replace(opening, **more)
            signed = self.transaction(calls((Call(escrow.address, escrow_v2.encode_open(opening)),)), **changes)
            descriptor = Descriptor(
                self.address,
                opening.payee,
                opening.operator,
                opening.token,
                opening.salt,
                opening.authorized_signer,
                signed.expiring_nonce_hash,
            )
        else:
            older = replace(escrow_v1.OpenCall(self.payee, PATH_USD, Units(deposit), salt, self.address), **more)
            approval = tip20.encode_approve(tip20.ApproveCall(escrow.address, Units(deposit)))
            batch = (Call(PATH_USD, approval), Call(escrow.address, escrow_v1.encode_open(older)))
            signed = self.transaction(calls(batch), **changes)
            descriptor = older.descriptor(self.address)
        return Channel(derive_channel_id(escrow, descriptor), escrow, descriptor, signed, deposit)

    def sign(self, channel: Channel, cumulative: int, *, key: bytes | None = None) -> bytes:
        """A voucher's signature."""
        return VoucherDomain(channel.escrow).sign(channel.id, cumulative, key or self.key)

    def open(self, channel: Channel, cumulative: int = UNIT, *, key: bytes | None = None) -> OpenPayload:
        return OpenPayload(
            channel.id,
            channel.opening.raw,
            channel.wire_descriptor,
            channel.descriptor.authorized_signer,
            Units(cumulative),
            self.sign(channel, cumulative, key=key),
        )

    def voucher(self, channel: Channel, cumulative: int, *, key: bytes | None = None) -> VoucherPayload:
        signature = self.sign(channel, cumulative, key=key)
        return VoucherPayload(channel.id, channel.wire_descriptor, Units(cumulative), signature)

    def close(self, channel: Channel, cumulative: int, *, key: bytes | None = None) -> ClosePayload:
        signature = self.sign(channel, cumulative, key=key)
        return ClosePayload(channel.id, channel.wire_descriptor, Units(cumulative), signature)

    def top_up(self, channel: Channel, amount: int, **changes: Any) -> TopUpPayload:
        if channel.escrow.protocol is SessionProtocol.V2:
            call = escrow_v2.TopUpCall(channel.descriptor, Units(amount))
            batch: tuple[Call, ...] = (Call(channel.escrow.address, escrow_v2.encode_top_up(call)),)
        else:
            approval = tip20.encode_approve(tip20.ApproveCall(channel.escrow.address, Units(amount)))
            older = escrow_v1.encode_top_up(escrow_v1.TopUpCall(channel.id, Units(amount)))
            batch = (Call(PATH_USD, approval), Call(channel.escrow.address, older))
        raw = self.transaction(batch, **changes).raw
        return TopUpPayload(channel.id, raw, channel.wire_descriptor, Units(amount))

    def credential(self, challenge: Challenge, payload: Payload, *, source: str | None = "mine") -> str:
        """The ``Authorization`` value; ``source`` is this payer's own identity unless given."""
        who = source_of(CHAIN_ID, self.address) if source == "mine" else source
        return authorization(encode(Credential(challenge, payload, who)))


def opened_json(credential: str) -> dict[str, Any]:
    """The JSON inside an ``Authorization`` value."""
    value: dict[str, Any] = json.loads(base64url.decode(credential.split()[1], field="x", length_max=100_000))
    return value


def sealed_json(value: object) -> str:
    """An ``Authorization`` value around any JSON value."""
    return authorization(base64url.encode(json.dumps(value).encode()))


def bent(credential: str, path: str, value: object) -> str:
    """A credential with one member, named by a dotted path, replaced; ``...`` removes it."""
    document = opened_json(credential)
    *parents, name = path.split(".")
    place = document
    for parent in parents:
        place = place[parent]
    if value is ...:
        place.pop(name, None)
    else:
        place[name] = value
    return sealed_json(document)


# -------------------------------------------------------------------------------------------------------------- world


@dataclass
class LogLines:
    """Everything the node logged."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, event: str, *, level: Level = Level.INFO, **fields: object) -> None:
        self.lines.append({"event": event, "level": level, **fields})

    @property
    def bugs(self) -> list[dict[str, Any]]:
        """Mistakes of ours; a task that ended with a refusal or a provider's failure is none."""
        faults = {"NodeFault", *(reason.value for reason in Reason)}
        return [
            line
            for line in self.lines
            if line["event"] == "request.bug" or (line["event"] == "task.failed" and line["error"] not in faults)
        ]

    def endings(self) -> list[str]:
        return [line["ending"] for line in self.lines if line["event"] == "request.ended"]


class World:
    """A development network, a client of it, and one funded payer."""

    def __init__(self, net: Devnet, http: aiohttp.ClientSession, clock: ManualClock, log: LogLines) -> None:
        self.net = net
        self.http = http
        self.clock = clock
        self.log = log
        self.payer = self.new_payer(net.payer_key)

    def new_payer(self, key: bytes | None = None) -> Payer:
        """Somebody else with money."""
        payer = Payer(key or os.urandom(32), payee=self.net.payee, clock=self.clock)
        if key is None:
            self.net.chain.fund(payer.address, Units(100_000_000))
        return payer

    # ------------------------------------------------------------------------------------------------------- requests

    async def send(
        self,
        body: object = None,
        authorization: str | None = None,
        *,
        method: str = "POST",
        path: str = PATH,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request, read to its end."""
        async with self.request(body, authorization, method=method, path=path, headers=headers) as response:
            return Reply(response.status, response.headers, await response.read())

    def request(
        self,
        body: object = None,
        authorization: str | None = None,
        *,
        method: str = "POST",
        path: str = PATH,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        data: Any = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None and len(data) > _LARGE:
            data = io.BytesIO(data)
        sent = dict(headers or {})
        if authorization is not None:
            sent["Authorization"] = authorization
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        return self.http.request(method, self.net.node.url + path, data=data, headers=sent, allow_redirects=False)

    @contextlib.asynccontextmanager
    async def stream(
        self, body: object, authorization: str, *, path: str = PATH, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Stream]:
        """A paid stream that is read by the test."""
        async with self.request(body, authorization, path=path, headers=headers) as response:
            if response.status != 200:
                raise AssertionError(f"{response.status} {await response.text()}")
            yield Stream(response)

    async def raw(self, head: bytes, body: bytes = b"") -> bytes:
        """Bytes out, bytes in, until the node closes or stops answering."""
        port = int(self.net.node.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head + body)
            return await asyncio.wait_for(reader.read(), 5)
        except ConnectionError:
            return b""
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def challenge(self, body: object = None, protocol: SessionProtocol = SessionProtocol.V2) -> Challenge:
        """A fresh challenge for a request."""
        return (await self.send(body)).challenge(protocol)

    async def pay(
        self, payload: Payload, body: object = None, *, payer: Payer | None = None, source: str | None = "mine"
    ) -> str:
        """A credential for a fresh challenge of the channel's own protocol."""
        protocol = SessionProtocol.V2 if payload.descriptor is not None else SessionProtocol.V1
        challenge = await self.challenge(body, protocol)
        return (payer or self.payer).credential(challenge, payload, source=source)

    async def manage(self, payload: Payload, *, payer: Payer | None = None, source: str | None = "mine") -> Reply:
        """Send a management credential with a fresh challenge."""
        return await self.send(None, await self.pay(payload, payer=payer, source=source))

    async def buy(self, body: object, payload: Payload, *, payer: Payer | None = None) -> Reply:
        """Send a content credential with a fresh challenge, and read the whole answer."""
        return await self.send(body, await self.pay(payload, body, payer=payer))

    async def opened(
        self, escrow: Escrow = V2, deposit: int = DEPOSIT, cumulative: int = UNIT, *, payer: Payer | None = None
    ) -> Channel:
        """An open channel, nothing bought yet."""
        who = payer or self.payer
        channel = who.channel(escrow, deposit)
        reply = await self.manage(who.open(channel, cumulative), payer=who)
        assert reply.status == 204, reply.body
        return channel

    # ----------------------------------------------------------------------------------------------------------- books

    async def account(self, channel: Channel) -> Account:
        """The node's committed account."""
        assert self.net.node.books is not None
        account = await self.net.node.books.load(channel.id)
        assert account is not None
        return account

    async def state(self) -> object:
        """Everything that is money: accounts, journals, the chain's transactions and balances, and provider calls."""
        books = self.net.node.books
        assert books is not None
        accounts = {account.id: account for account in await books.accounts()}
        journals = {
            name: [event for event in await books.journal(name) if not isinstance(event, ChainObserved)]
            for name in accounts
        }
        chain = self.net.chain
        return accounts, journals, len(chain._receipts), {who: list(values) for who, values in chain.model.tokens.balances._history.items()}, self.net.provider.requests

    def broadcasts(self) -> int:
        """Transactions the chain has seen."""
        return len(self.net.chain._receipts)

    def gate(self, lent: int = 1) -> Gate:
        """Make the provider send tokens only when told to, but for the first, without which a stream does not begin."""
        self.net.provider.gate = Gate(lent)
        return self.net.provider.gate

    async def settled(self) -> None:
        """Wait until every running request has settled its bill."""
        await self.eventually(lambda: not self.net.node._owner and self.net.provider.live == 0)

    async def eventually(self, condition: Callable[[], bool], *, seconds: float = 3.0) -> None:
        """Give the loop turns until ``condition`` holds; the limit only bounds a failing test."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def new_world(options: DevnetOptions | None = None) -> AsyncIterator[World]:
    """A network in this loop; its provider sends without pacing unless the options say otherwise."""
    clock, log = ManualClock(), LogLines()
    async with (
        Devnet(options or DevnetOptions(tokens_per_second=0.0), log=log, clock=clock) as net,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        yield World(net, http, clock, log)
        assert net.fatal is None
