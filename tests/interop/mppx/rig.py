"""The reference client as a child process, and the three books that have to agree after everything it does."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from channels.descriptor import Escrow, SessionProtocol
from channels.ids import ChannelId, Hash32, to_hex
from channels.model import Account, Phase
from channels.payer.signer import LocalSigner, sign_voucher
from channels.units import PICO_PER_UNIT, Units
from channels.verify import closed_in
from channels.voucher import VoucherDomain
from channels.wire.challenge import Challenge
from channels.wire.headers import parse_challenges
from channels.wire.receipt import SessionReceipt
from channels.wire.receipt import decode as decode_receipt
from mppnode.chain.devchain import LocalTransport
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.cli.devnet import CHAIN_ID, FUNDS, V1_ESCROW, Devnet
from mppnode.ledger.books import Books

PROMPT = "Tell me how an agent pays for exactly the tokens it reads."
_PATIENCE_S = 30
_LINE_BYTES_MAX = 4 * 1024 * 1024

Event = dict[str, Any]


class ClientFailed(Exception):
    """The reference client threw."""


@dataclass(frozen=True)
class Wire:
    """One request the client sent to the node, and the answer's head."""

    method: str
    url: str
    authorization: str | None
    session: str | None
    has_body: bool
    status: int | None
    receipt: SessionReceipt | None

    @property
    def credential(self) -> dict[str, Any]:
        """The decoded credential."""
        assert self.authorization is not None
        return decode_credential(self.authorization)

    @property
    def action(self) -> str | None:
        """What the credential asks for; None without one."""
        return None if self.authorization is None else str(self.credential["payload"]["action"])


class Operation:
    """One command under way: its events in order, and its end."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self.events: list[Event] = []

    def hear(self, event: Event) -> None:
        self._queue.put_nowait(event)

    async def next(self) -> Event:
        """The next event; raises what the client threw."""
        event = await asyncio.wait_for(self._queue.get(), _PATIENCE_S)
        self.events.append(event)
        if event["event"] == "error":
            raise ClientFailed(event["message"])
        return event

    async def until(self, kind: str, count: int = 1) -> Event:
        """Wait for the ``count``-th further event of a kind."""
        while True:
            event = await self.next()
            count -= event["event"] == kind
            if count == 0:
                return event

    async def end(self) -> Event:
        """What the command returned."""
        return await self.until("result")

    @property
    def text(self) -> str:
        """The words that have arrived so far."""
        return text_of(event["data"] for event in self.events if event["event"] == "chunk")

    @property
    def receipt(self) -> Event:
        """The receipt the stream ended with."""
        (event,) = (event for event in self.events if event["event"] == "receipt")
        return dict(event["receipt"])


@dataclass
class ReferenceClient:
    """A node process with the reference client in it."""

    process: asyncio.subprocess.Process
    wires: list[Wire] = field(default_factory=list)
    store: dict[str, str] = field(default_factory=dict)
    _operations: dict[int, Operation] = field(default_factory=dict)
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, script: Path) -> AsyncIterator[ReferenceClient]:
        """Start the client; it ends with the block."""
        process = await asyncio.create_subprocess_exec(
            "node", str(script), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_LINE_BYTES_MAX
        )
        client = cls(process)
        reader = asyncio.ensure_future(client._read())
        try:
            await asyncio.wait_for(client._ready.wait(), _PATIENCE_S)
            yield client
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await reader

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            event = json.loads(line)
            match event["event"]:
                case "ready":
                    self._ready.set()
                case "wire":
                    self.wires.append(_wire(event))
                case "store":
                    self._keep(event)
                case _:
                    self._operations[event["id"]].hear(event)

    def _keep(self, event: Event) -> None:
        if event["value"] is None:
            self.store.pop(event["at"], None)
        else:
            self.store[event["at"]] = event["value"]

    def start(self, op: str, **arguments: object) -> Operation:
        """Send a command without waiting for its end."""
        assert self.process.stdin is not None
        number, operation = len(self._operations), Operation()
        self._operations[number] = operation
        self.process.stdin.write(json.dumps({"id": number, "op": op, **arguments}).encode() + b"\n")
        return operation

    async def run(self, op: str, **arguments: object) -> Event:
        """Send a command and wait for what it returns. Raises ``ClientFailed``."""
        return await self.start(op, **arguments).end()

    async def make(self, net: Devnet, kind: str, name: str = "payer", **options: object) -> None:
        """Build a ``manager``, ``mppx`` or ``legacy`` client that pays with the network's payer key."""
        if kind == "legacy":
            # On a chain it does not know, the v1 client wants to be told which contract it may trust.
            options |= {"escrowContract": to_hex(V1_ESCROW)}
        await self.run(
            "make", name=name, kind=kind, key=to_hex(net.payer_key), rpc=net.chain_url, chainId=CHAIN_ID, **options
        )

    def sent(self, action: str | None = None, *, body: bool | None = None) -> list[Wire]:
        """What was sent with that action, with or without a body."""
        return [
            wire
            for wire in self.wires
            if (action is None or wire.action == action) and (body is None or wire.has_body is body)
        ]


def _wire(event: Event) -> Wire:
    receipt = None if event["receipt"] is None else decode_receipt(event["receipt"])
    sent = {key: event[key] for key in ("method", "url", "authorization", "session", "status")}
    return Wire(**sent, has_body=event["hasBody"], receipt=receipt)


# ---------------------------------------------------------------------------------------------------------- requests


def chat(max_tokens: int = 40, *, stream: bool = True, model: str = "dev/burst") -> dict[str, object]:
    """A chat request whose price is known: ``dev/burst`` says exactly ``max_tokens`` words."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": max_tokens,
        "stream": stream,
    }


def price_pico(*requests: Mapping[str, Any], tokens: int | None = None) -> int:
    """What finished requests cost by the published rates, in pico: prompt at 0.50, output at 10 USD per million."""
    prompt = len(PROMPT) // 4
    return sum(prompt * 500_000 + (tokens or request["max_tokens"]) * 10_000_000 for request in requests)


def units_of(pico: int) -> int:
    """Whole units of an exact price: what is shown and captured is rounded in the payer's favour."""
    return pico // PICO_PER_UNIT


def text_of(chunks: Any) -> str:
    """The words of a stream's data lines."""
    found = [json.loads(data) for data in chunks if data != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for chunk in found for choice in chunk["choices"])


def decode_credential(authorization: str) -> dict[str, Any]:
    """The object inside an ``Authorization`` header."""
    scheme, _, token = authorization.partition(" ")
    assert scheme == "Payment"
    return dict(json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))))


def encode_credential(credential: Mapping[str, Any]) -> str:
    """An ``Authorization`` header around any object, right or wrong."""
    text = json.dumps(credential, separators=(",", ":")).encode()
    return "Payment " + base64.urlsafe_b64encode(text).decode().rstrip("=")


@dataclass(frozen=True)
class Answer:
    """An answer to a request of ours."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The reason of a refusal."""
        return str(json.loads(self.body)["error"]["code"])

    @property
    def receipt(self) -> SessionReceipt:
        return decode_receipt(self.headers["Payment-Receipt"])

    def challenge(self, protocol: SessionProtocol = SessionProtocol.V2) -> Challenge:
        """The challenge of one session protocol."""
        (found,) = (
            challenge
            for challenge in parse_challenges([self.headers["WWW-Authenticate"]])
            if request_of(challenge)["methodDetails"]["sessionProtocol"] == protocol.value
        )
        return found


def request_of(challenge: Challenge) -> dict[str, Any]:
    """The request object inside a challenge."""
    text = challenge.request
    return dict(json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))))


async def post(url: str, authorization: str | None = None, body: object = None) -> Answer:
    """One plain request, as anybody may send it; bodyless unless there is a ``body``."""
    headers = {} if authorization is None else {"Authorization": authorization}
    async with aiohttp.ClientSession() as http, http.post(url, json=body, headers=headers) as response:
        return Answer(response.status, dict(response.headers), await response.read())


def answer_with(challenge: Challenge, payload: Mapping[str, Any], source: str | None = None) -> str:
    """A credential for a challenge, with any payload."""
    echoed = {
        "id": challenge.id,
        "realm": challenge.realm,
        "method": challenge.method,
        "intent": challenge.intent,
        "request": challenge.request,
        "expires": challenge.expires,
        "opaque": challenge.opaque,
    }
    return encode_credential({"challenge": echoed, "payload": payload, **({} if source is None else {"source": source})})


def voucher_payload(net: Devnet, opened: Wire, cumulative: int, action: str = "voucher") -> dict[str, Any]:
    """A voucher the payer's key really signed, on the channel ``opened`` opened."""
    payload = opened.credential["payload"]
    channel = ChannelId(bytes.fromhex(payload["channelId"][2:]))
    signature = sign_voucher(LocalSigner(net.payer_key), VoucherDomain(net.escrow), channel, Units(cumulative))
    return {
        "action": action,
        "channelId": payload["channelId"],
        "descriptor": payload["descriptor"],
        "cumulativeAmount": str(cumulative),
        "signature": to_hex(signature),
    }


# ------------------------------------------------------------------------------------------------------------- books


async def captured_on_chain(net: Devnet, account: Account) -> int | None:
    """What the chain paid for a channel in total; None while it is open."""
    chain = RpcChain(LocalTransport(net.chain), net.clock, limits=RpcLimits())
    logs = await chain.logs(account.escrow.address, topics=(None, Hash32(account.id)), from_block=0, to_block=net.chain.head)
    event = closed_in(account.id, account.escrow, logs)
    return None if event is None else int(event.settled)


async def require_agreement(net: Devnet, accounts: Sequence[Account]) -> None:
    """The ledger and the chain tell one story, to the unit, and the payer paid for nothing that was not delivered.

    Holds must be gone: nothing is running any more.
    """
    paid = locked = 0
    for account in accounts:
        assert not account.holds, "a finished request still holds money"
        assert account.spent <= account.accepted
        captured = await captured_on_chain(net, account)
        if account.phase is Phase.CLOSED:
            assert account.close is not None
            assert captured == account.close.capture == account.capturable <= account.spent
            if account.escrow.protocol is SessionProtocol.V2:
                assert captured == account.spent
            paid += captured
        else:
            assert captured is None
            assert account.phase is Phase.OPEN
            assert account.accepted <= account.chain.deposit
            locked += account.chain.deposit
    assert FUNDS - net.chain.balance(net.payer) == paid + locked
    assert net.chain.balance(net.payee) - FUNDS == paid
    assert not net.chain.unknown, "the client asked the chain for something it does not have"
    assert net.fatal is None


async def only_account(books: Books | None) -> Account:
    """The one account there is."""
    assert books is not None
    (account,) = await books.accounts()
    return account


def escrow_v1() -> Escrow:
    """The development network's v1 escrow."""
    return Escrow(SessionProtocol.V1, CHAIN_ID, V1_ESCROW)
