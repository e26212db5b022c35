"""A paying HTTP client: aiohttp moves bytes, ``channels.payer`` decides what to sign.

The driver performs the machine's actions and reports back; it never chooses an amount. Vouchers asked for mid-stream
are posted beside the stream while it is being read on, so an honest server never has to pause.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from channels import escrow as escrow_v2
from channels import escrow_v1, tip20
from channels.chain import Chain
from channels.descriptor import Descriptor, SessionProtocol
from channels.faults import ChannelFault
from channels.ids import Hash32
from channels.instants import UnixMillis
from channels.keccak import keccak256
from channels.payer.model import (
    Action,
    Answered,
    ChallengeSeen,
    ChannelGone,
    ChannelRead,
    Close,
    CloseAnswered,
    Closed,
    CloseRequested,
    Counterparty,
    GiveUp,
    Input,
    NeedVoucherSeen,
    OpenAborted,
    OpenChannel,
    OpenPrepared,
    PayerPolicy,
    Purpose,
    ReadChannel,
    ReceiptSeen,
    Reclaim,
    RequestEnded,
    SendOpen,
    SignVoucher,
    TopUp,
    TopUpAnswered,
    counterparty_of,
)
from channels.payer.session import PayerSession
from channels.payer.signer import Signer, sign_voucher
from channels.tempo_tx import Call, Form, SignedTx, TempoTx
from channels.units import Units
from channels.voucher import VoucherDomain
from channels.wire import receipt as receipts
from channels.wire import request as requests
from channels.wire import sse
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

_ACCEPT: Final = "tempo/session"
_PAYMENT_REQUIRED: Final = 402
_GONE: Final = 410
_ERROR_BODY_MAX: Final = 65_536


class PaymentGivenUp(Exception):
    """The payer's own machine refused to go on: a cap, a false claim, terms it may not accept."""


class RequestFailed(Exception):
    """The server answered with an error that payment cannot mend."""

    def __init__(self, status: int, body: str) -> None:
        self.status = status
        self.body = body
        super().__init__(f"status {status}")


@dataclass(frozen=True, slots=True)
class VoucherSent:
    """A voucher was accepted: cumulative base units."""

    cumulative: Units


@dataclass(frozen=True, slots=True)
class DepositAdded:
    """A top-up was confirmed: base units added."""

    additional: Units
    tx_hash: Hash32 | None


@dataclass(frozen=True, slots=True)
class ChannelOpening:
    """A channel is being opened with this deposit, in base units."""

    descriptor: Descriptor
    deposit: Units


Note = VoucherSent | DepositAdded | ChannelOpening | sse.NeedVoucher | Reclaim
"""What a driver tells its observer while it pays."""


@dataclass(slots=True)
class _Peer:
    """One counterparty: the machine, its voucher domain, and the newest challenge to answer."""

    session: PayerSession
    domain: VoucherDomain
    challenge: Challenge
    opening: dict[int, SignedTx] = field(default_factory=dict)
    unread: ReadChannel | None = None
    """A look at the chain the machine waits for; kept here until done, as whoever was asked may be cancelled."""
    closed: Closed | None = None


class PayingClient:
    """Pays for requests to MPP servers from payment channels; one instance per payer."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        *,
        chain: Chain,
        signer: Signer,
        policy: PayerPolicy,
        now: Callable[[], UnixMillis],
        entropy: Callable[[int], bytes],
        observer: Callable[[Note], None] = lambda _: None,
    ) -> None:
        self._http = http
        self._chain = chain
        self._signer = signer
        self._policy = policy
        self._now = now
        self._entropy = entropy
        self._observer = observer
        self._peers: dict[Counterparty, _Peer] = {}
        self._inboxes: dict[int, asyncio.Queue[Action]] = {}
        self._last_request = 0

    # ---------------------------------------------------------------------------------------------------- requests

    @asynccontextmanager
    async def stream(self, url: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
        """Send a paid streaming request; iterate over the ``data`` of its events, without the payment events.

        Raises:
            PaymentGivenUp: a cap was reached or the server broke the protocol.
            RequestFailed: the server refused for another reason.
        """
        number = self._begin()
        try:
            response, peer = await self._pay(number, url, body)
            try:
                async with asyncio.TaskGroup() as side:
                    yield self._events(number, url, response, peer, side)
            finally:
                response.close()
        except* PaymentGivenUp as group:
            raise PaymentGivenUp(str(group.exceptions[0])) from None
        finally:
            self._end(number)

    async def post(self, url: str, body: Mapping[str, Any]) -> tuple[Any, SessionReceipt | None]:
        """Send a paid request and return its JSON answer and receipt. Raises as :meth:`stream`."""
        number = self._begin()
        try:
            response, _ = await self._pay(number, url, body)
            async with response:
                return await response.json(), _receipt_of(response)
        finally:
            self._end(number)

    async def close(self, url: str) -> Closed | None:
        """Close the channel with the server behind ``url`` and get the rest of the deposit back.

        Raises:
            PaymentGivenUp: there is no channel, or the server refused.
        """
        for peer in self._peers.values():
            await self._recover(peer)
            await self._perform_close(url, peer, peer.session.handle(CloseRequested()))
            return peer.closed
        return None

    def sessions(self) -> list[PayerSession]:
        """What this payer knows of its channels."""
        return [peer.session for peer in self._peers.values()]

    def _begin(self) -> int:
        self._last_request += 1
        self._inboxes[self._last_request] = asyncio.Queue()
        return self._last_request

    def _end(self, number: int) -> None:
        for peer in self._peers.values():
            for action in self._dispatch(peer.session.handle(RequestEnded(number))):
                if isinstance(action, ReadChannel):
                    peer.unread = action
            if peer.unread is not None:  # not done here: a request that is being cancelled must not go and read a chain
                for due in peer.session.state.waiting:
                    self._inboxes[due.request].put_nowait(peer.unread)
        self._inboxes.pop(number, None)

    def _dispatch(self, actions: tuple[Action, ...]) -> list[Action]:
        """Hand actions to the requests they belong to; what belongs to none is returned."""
        rest: list[Action] = []
        for action in actions:
            number = getattr(action, "request", None)
            if number in self._inboxes:
                self._inboxes[number].put_nowait(action)
            elif isinstance(action, Reclaim):
                self._observer(action)
            else:
                rest.append(action)
        return rest

    # -------------------------------------------------------------------------------------------------- first byte

    async def _pay(
        self, number: int, url: str, body: Mapping[str, Any]
    ) -> tuple[aiohttp.ClientResponse, _Peer]:
        """Repeat the request with credentials until it is served."""
        data = json.dumps(body).encode()
        peer: _Peer | None = None
        credential: str | None = None
        while True:
            response = await self._send(url, data, credential)
            if response.status == _PAYMENT_REQUIRED:
                peer, heard = self._challenged(number, response)
                response.release()
            elif response.status == _GONE and peer is not None:
                response.release()
                await self._tell(peer, ChannelGone(number))
                credential = None
                continue
            else:
                if peer is None:
                    await _fail(response)
                    raise PaymentGivenUp("the server gave its answer away")
                await self._tell(peer, Answered(number, response.ok, _receipt_of(response)))
                if not response.ok:
                    await _fail(response)
                return response, peer
            await self._tell(peer, heard)
            credential = await self._next_credential(number, url, peer)

    def _challenged(self, number: int, response: aiohttp.ClientResponse) -> tuple[_Peer, ChallengeSeen]:
        """Pick the session challenge we can answer and find the machine it belongs to."""
        for challenge in parse_challenges(response.headers.getall("WWW-Authenticate", [])):
            if (challenge.method, challenge.intent) != ("tempo", "session"):
                continue
            try:
                terms = requests.decode(challenge.request)
            except ChannelFault:
                continue
            if terms.escrow not in self._policy.escrows:
                continue
            who = counterparty_of(terms)
            peer = self._peers.get(who)
            if peer is None:
                peer = _Peer(PayerSession(self._policy, who), VoucherDomain(who.escrow), challenge)
                self._peers[who] = peer
            peer.challenge = challenge
            return peer, ChallengeSeen(number, challenge, self._now())
        raise PaymentGivenUp("the server offers no payment this client can make")

    async def _tell(self, peer: _Peer, heard: Input) -> None:
        """Report to the machine; do at once what belongs to no request."""
        for action in self._dispatch(peer.session.handle(heard)):
            if isinstance(action, ReadChannel):
                peer.unread = action
                await self._recover(peer)

    async def _recover(self, peer: _Peer) -> None:
        """Look at the chain if the machine waits for that; of several who try, one reports."""
        action = peer.unread
        if action is None:
            return
        state = await self._read(action)
        if peer.unread is action:
            peer.unread = None
            await self._tell(peer, ChannelRead(state))

    async def _read(self, action: ReadChannel) -> Any:
        try:
            return await self._chain.channel_state(action.channel.escrow, action.channel.id)
        except ChannelFault:
            return None

    async def _next_credential(self, number: int, url: str, peer: _Peer) -> str:
        """Perform this request's actions until one of them is a credential for the request itself."""
        await self._recover(peer)
        while True:
            action = await self._inboxes[number].get()
            match action:
                case OpenChannel():
                    await self._prepare_open(peer, action)
                case SendOpen():
                    return self._open_credential(peer, action)
                case SignVoucher(purpose=Purpose.CONTENT):
                    return self._credential(peer, self._voucher(peer, action))
                case GiveUp():
                    raise PaymentGivenUp(action.reason.value)
                case _:
                    await self._aside(number, url, peer, action)

    # --------------------------------------------------------------------------------------------------- mid-stream

    async def _events(
        self, number: int, url: str, response: aiohttp.ClientResponse, peer: _Peer, side: asyncio.TaskGroup
    ) -> AsyncIterator[str]:
        parser = sse.SseParser()
        async for data in response.content.iter_any():
            for event in parser.feed(data):
                match event.event:
                    case sse.NEED_VOUCHER_EVENT:
                        need = sse.parse_need_voucher(event.data)
                        self._observer(need)
                        await self._tell(peer, NeedVoucherSeen(number, need))
                        # Beside the stream, not instead of it: tokens go on while the voucher travels.
                        side.create_task(self._drain(number, url, peer))
                    case sse.RECEIPT_EVENT:
                        await self._tell(peer, ReceiptSeen(number, sse.parse_receipt_event(event.data)))
                        self._check(number)
                    case _:
                        yield event.data

    async def _drain(self, number: int, url: str, peer: _Peer) -> None:
        inbox = self._inboxes[number]
        while not inbox.empty():
            await self._aside(number, url, peer, inbox.get_nowait())

    def _check(self, number: int) -> None:
        inbox = self._inboxes[number]
        while not inbox.empty():
            action = inbox.get_nowait()
            if isinstance(action, GiveUp):
                raise PaymentGivenUp(action.reason.value)

    async def _aside(self, number: int, url: str, peer: _Peer, action: Action) -> None:
        """Perform an action that is a request of its own: a bodyless POST to the same URL."""
        match action:
            case TopUp():
                await self._post_top_up(number, url, peer, action)
            case SignVoucher():
                await self._post_voucher(number, url, peer, action)
            case ReadChannel():
                await self._recover(peer)
            case GiveUp():
                raise PaymentGivenUp(action.reason.value)
            case _:
                raise PaymentGivenUp("the payer's machine asked for something out of turn")

    async def _post_voucher(self, number: int, url: str, peer: _Peer, action: SignVoucher) -> None:
        async with await self._send(url, b"", self._credential(peer, self._voucher(peer, action))) as response:
            if response.status == _PAYMENT_REQUIRED:
                _, heard = self._challenged(number, response)
                await self._tell(peer, heard)
            elif response.status == _GONE:
                await self._tell(peer, ChannelGone(number))
            else:
                if response.ok:
                    self._observer(VoucherSent(action.cumulative))
                await self._tell(peer, Answered(number, response.ok, _receipt_of(response)))

    async def _post_top_up(self, number: int, url: str, peer: _Peer, action: TopUp) -> None:
        try:
            payload = await self._top_up(peer, action)
        except ChannelFault:
            await self._tell(peer, TopUpAnswered(ok=False))
            return
        try:
            sending = await self._send(url, b"", self._credential(peer, payload))
        except (aiohttp.ClientError, OSError):
            # Said before it is raised: a machine that still waits for this answer puts off every later voucher.
            await self._tell(peer, TopUpAnswered(ok=False))
            raise
        async with sending as response:
            if response.status == _PAYMENT_REQUIRED:
                _, heard = self._challenged(number, response)
                await self._tell(peer, heard)
                return
            receipt = _receipt_of(response)
            if response.ok:
                self._observer(DepositAdded(action.additional, receipt.tx_hash if receipt else None))
            await self._tell(peer, TopUpAnswered(response.ok, receipt))

    async def _perform_close(self, url: str, peer: _Peer, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case Close():
                    heard = await self._post_close(url, peer, action)
                    await self._perform_close(url, peer, peer.session.handle(heard))
                case Closed():
                    peer.closed = action
                case Reclaim():
                    self._observer(action)
                case GiveUp():
                    raise PaymentGivenUp(action.reason.value)
                case _:
                    self._dispatch((action,))

    async def _post_close(self, url: str, peer: _Peer, action: Close) -> CloseAnswered:
        signature = sign_voucher(self._signer, peer.domain, action.channel.id, action.cumulative)
        payload = ClosePayload(action.channel.id, _descriptor(action.channel), action.cumulative, signature)
        challenge_id = peer.challenge.id
        async with await self._send(url, b"", self._credential(peer, payload)) as response:
            if response.status == _PAYMENT_REQUIRED:
                self._challenged(0, response)
            return CloseAnswered(response.ok, challenge_id, _receipt_of(response))

    # -------------------------------------------------------------------------------------------------- credentials

    async def _send(self, url: str, data: bytes, credential: str | None) -> aiohttp.ClientResponse:
        headers = {"Accept-Payment": _ACCEPT}
        if data:
            headers["Content-Type"] = "application/json"
        if credential is not None:
            headers["Authorization"] = credential
        return await self._http.post(url, data=data, headers=headers, allow_redirects=False)

    def _credential(self, peer: _Peer, payload: Payload) -> str:
        source = source_of(peer.session.state.counterparty.escrow.chain_id, self._policy.payer)
        return authorization(encode(Credential(peer.challenge, payload, source)))

    def _voucher(self, peer: _Peer, action: SignVoucher) -> VoucherPayload:
        signature = sign_voucher(self._signer, peer.domain, action.channel.id, action.cumulative)
        return VoucherPayload(action.channel.id, _descriptor(action.channel), action.cumulative, signature)

    async def _prepare_open(self, peer: _Peer, action: OpenChannel) -> None:
        who, salt = action.counterparty, Hash32(self._entropy(32))
        if who.escrow.protocol is SessionProtocol.V2:
            call = escrow_v2.OpenCall(
                who.payee, action.operator, who.token, action.deposit, salt, action.authorized_signer
            )
            calls: tuple[Call, ...] = (Call(who.escrow.address, escrow_v2.encode_open(call)),)
        else:
            v1_call = escrow_v1.OpenCall(who.payee, who.token, action.deposit, salt, action.authorized_signer)
            approval = tip20.encode_approve(tip20.ApproveCall(who.escrow.address, action.deposit))
            calls = (Call(who.token, approval), Call(who.escrow.address, escrow_v1.encode_open(v1_call)))
        try:
            signed = await self._transaction(calls, action.fee_payer, action.fee_token or who.token)
        except ChannelFault:
            await self._tell(peer, OpenAborted(action.request))
            return
        nonce_hash = signed.expiring_nonce_hash if who.escrow.protocol is SessionProtocol.V2 else Hash32(bytes(32))
        descriptor = Descriptor(
            self._policy.payer, who.payee, action.operator, who.token, salt, action.authorized_signer, nonce_hash
        )
        peer.opening[action.request] = signed
        self._observer(ChannelOpening(descriptor, action.deposit))
        await self._tell(peer, OpenPrepared(action.request, descriptor))

    def _open_credential(self, peer: _Peer, action: SendOpen) -> str:
        signed = peer.opening.pop(action.request)
        signature = sign_voucher(self._signer, peer.domain, action.channel.id, action.cumulative)
        payload = OpenPayload(
            action.channel.id,
            signed.raw,
            _descriptor(action.channel),
            action.channel.descriptor.authorized_signer,
            action.cumulative,
            signature,
        )
        return self._credential(peer, payload)

    async def _top_up(self, peer: _Peer, action: TopUp) -> TopUpPayload:
        channel = action.channel
        call = escrow_v2.encode_top_up(escrow_v2.TopUpCall(channel.descriptor, action.additional))
        signed = await self._transaction(
            (Call(channel.escrow.address, call),), requests.decode(peer.challenge.request).fee_payer,
            channel.descriptor.token,
        )
        return TopUpPayload(channel.id, signed.raw, _descriptor(channel), action.additional)

    async def _transaction(self, calls: tuple[Call, ...], sponsored: bool, fee_token: Any) -> SignedTx:  # noqa: FBT001
        tx: TempoTx = await self._chain.prepare(
            self._policy.payer,
            calls,
            fee_token=None if sponsored else fee_token,
            entropy=self._entropy(8),
            sponsored=sponsored,
        )
        signature = self._signer.sign(keccak256(tx.sender_payload()))
        return SignedTx(tx, Form.ENVELOPE if sponsored else Form.COMPLETE, self._signer.address, signature)


def _descriptor(channel: Any) -> Descriptor | None:
    """The descriptor as v2 payloads carry it; v1 has none on the wire."""
    descriptor: Descriptor = channel.descriptor
    return descriptor if channel.escrow.protocol is SessionProtocol.V2 else None


def _receipt_of(response: aiohttp.ClientResponse) -> SessionReceipt | None:
    header = response.headers.get("Payment-Receipt")
    try:
        return None if header is None else receipts.decode(header)
    except ChannelFault:
        return None


async def _fail(response: aiohttp.ClientResponse) -> None:
    body = (await response.content.read(_ERROR_BODY_MAX)).decode("utf-8", "replace")
    response.close()
    raise RequestFailed(response.status, body)
