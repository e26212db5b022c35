"""The session rail: payment channels as a way to pay for a stream.

It recognises credentials, accepts vouchers, opens, tops up and closes channels, and gives the engine a
:class:`~mppnode.rails.tab.SessionTab` to charge a response to. Every amount it shows comes from a committed account.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar, assert_never

from channels.descriptor import Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId, Hash32
from channels.keccak import keccak256
from channels.model import (
    AcceptVoucher,
    Account,
    BeginClose,
    HoldId,
    NodeId,
    ObserveChain,
    Open,
    Outcome,
    Phase,
    Plan,
    RecordTopUp,
    Reserve,
    Voucher,
)
from channels.signature import parse_signature
from channels.units import PICO_PER_UNIT, Pico, Units
from channels.verify import require_descriptor
from channels.voucher import VoucherDomain
from channels.wire.challenge import Challenge, ChallengeMac, expires_text
from channels.wire.credential import ClosePayload, Envelope, OpenPayload, TopUpPayload, VoucherPayload
from channels.wire.receipt import SessionReceipt
from channels.wire.request import SessionRequest
from channels.wire.snapshot import SessionSnapshot, SignedAmount
from mppnode.kernel.clock import Clock
from mppnode.kernel.requests import ChatRequest
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.books import Books
from mppnode.ledger.ending import Ending
from mppnode.observe.metrics import Metrics
from mppnode.pricing.book import describe
from mppnode.rails.base import ChainIntents, Closes, Need, Offer, Tab
from mppnode.rails.live import LiveChannels, VoucherRate
from mppnode.rails.presented import Presented, Seller, read_presented
from mppnode.rails.tab import SessionTab, TabPolicy

T = TypeVar("T")

_MAY_YET_CLOSE: Final = frozenset({Reason.CHAIN_UNAVAILABLE, Reason.CHAIN_OUTCOME_UNKNOWN})
_BLIND_S: Final = 600  # how long vouchers are taken without seeing the chain; a payer's exit takes 900 s


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """How this node sells sessions. Units and seconds."""

    seller: Seller
    suggested_deposit: Units
    min_voucher_delta: Units
    challenge_ttl_s: int = 300
    chain_ttl_s: int = 5


class SessionRail:
    """Payment channels, v1 and v2."""

    def __init__(
        self,
        *,
        terms: SessionTerms,
        mac: ChallengeMac,
        books: Books,
        intents: ChainIntents,
        closer: Closes,
        live: LiveChannels,
        ending: Ending,
        node: Callable[[], NodeId],
        owner: TaskOwner,
        clock: Clock,
        entropy: Callable[[int], bytes],
        tab_policy: TabPolicy,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics if metrics is not None else Metrics.unseen(clock)
        self._terms = terms
        self._mac = mac
        self._books = books
        self._intents = intents
        self._closer = closer
        self._live = live
        self._ending = ending
        self._node = node
        self._owner = owner
        self._clock = clock
        self._entropy = entropy
        self._tab_policy = tab_policy
        self._domains = {escrow: VoucherDomain(escrow) for escrow in terms.seller.escrows}
        self._rate = VoucherRate(clock)

    # ----------------------------------------------------------------------------------------------------- offers

    def rekey(self, mac: ChallengeMac) -> None:
        """Sign challenges with other secrets from now on, and take those that these secrets signed."""
        self._mac = mac

    def challenges(self, offer: Offer, snapshot: SessionSnapshot | None = None) -> list[Challenge]:
        """Fresh challenges for an offer, one per session protocol; they differ between calls only in id and expiry."""
        return [self._challenge(offer, escrow, snapshot) for escrow in self._terms.seller.escrows]

    def _challenge(self, offer: Offer, escrow: Escrow, snapshot: SessionSnapshot | None) -> Challenge:
        terms, now = self._terms, self._clock.now_millis()
        request = SessionRequest(
            amount=offer.unit.amount,
            currency=terms.seller.token,
            recipient=terms.seller.payee,
            unit_type=offer.unit.unit_type,
            escrow=escrow,
            suggested_deposit=terms.suggested_deposit,
            fee_payer=escrow.protocol is SessionProtocol.V2 and self._intents.sponsoring,
            min_voucher_delta=terms.min_voucher_delta or None,
            snapshot=snapshot if escrow.protocol is SessionProtocol.V2 else None,
        )
        expires = type(now)(now + terms.challenge_ttl_s * 1000)
        return self._mac.issue(
            realm=terms.seller.realm,
            method="tempo",
            intent="session",
            request=request.encode(),
            expires=expires_text(expires, int.from_bytes(self._entropy(8))),
            opaque=offer.scope,
            description=describe(offer.rates),
        )

    def snapshot(self, account: Account, required: Units) -> SessionSnapshot | None:
        """What a payer whose signature has been verified may know of a channel; None when it is of no more use."""
        if account.phase is not Phase.OPEN or account.escrow.protocol is SessionProtocol.V1:
            return None
        rung = account.ladder[-1]
        return SessionSnapshot(
            channel_id=account.id,
            escrow=account.escrow,
            descriptor=account.descriptor,
            deposit=account.chain.deposit,
            settled=account.chain.settled,
            spent=account.spent,
            accepted=account.accepted,
            required=required,
            units=0,
            highest_voucher=SignedAmount(rung.cumulative, rung.signature),
        )

    # ------------------------------------------------------------------------------------------------- credentials

    def read(self, envelope: Envelope, offer: Offer | None, *, peer: str) -> Presented:
        """See :func:`mppnode.rails.presented.read_presented`."""
        now = self._clock.now_millis()
        return read_presented(
            envelope, mac=self._mac, seller=self._terms.seller, offer=offer, now=now, peer=peer
        )

    async def manage(self, presented: Presented) -> SessionReceipt:
        """Perform a management credential: nothing is delivered and nothing is charged."""
        match presented.payload:
            case OpenPayload():
                opened = await self._to_the_end(self._open(presented, presented.payload), name="open channel")
                return self.receipt(presented, opened.account, tx_hash=opened.tx_hash)
            case VoucherPayload():
                return self.receipt(presented, await self._voucher(presented, presented.payload))
            case TopUpPayload():
                return await self._to_the_end(self._top_up(presented, presented.payload), name="top up channel")
            case ClosePayload():
                return await self._to_the_end(self._close(presented, presented.payload), name="close channel")
            case _:
                assert_never(presented.payload)

    async def admit(self, presented: Presented) -> Opened:
        """Accept the money of a content credential: an open, or a voucher on a known channel."""
        match presented.payload:
            case OpenPayload():
                return await self._to_the_end(self._open(presented, presented.payload), name="open channel")
            case VoucherPayload():
                return Opened(await self._voucher(presented, presented.payload), None)
            case _:
                raise ChannelFault(Reason.INVALID_PAYLOAD, field="action", detail="does not buy a response")

    async def open_tab(self, presented: Presented, account: Account, need: Need, unit: Units) -> SessionTab:
        """Reserve what a request needs and give back its bill; the content ticket is spent by the same commit.

        Raises:
            ChannelFault: ``INSUFFICIENT_BALANCE`` with the cumulative amount that would do, ``CREDENTIAL_USED``,
                ``RATE_LIMITED``, ``EXPOSURE_LIMIT`` or ``CHANNEL_FINALIZED``.
        """
        hold = HoldId(self._entropy(8).hex())
        async with self._live.admitting(account.id):
            if need.stream and self._live.streaming(account.id):
                # Decided before the older stream is ended: a repeated credential must not stop it.
                newest = await self._books.load(account.id)
                if newest is not None and presented.challenge.id in newest.tickets:
                    raise ChannelFault(Reason.CREDENTIAL_USED, detail="this credential has already bought a response")
                await self._live.end_streams(account.id)
            self._live.expect(hold)
            try:
                plan = await self._reserve(presented, account.id, hold, need)
            except BaseException:
                # The sweep ends it if it was reserved all the same and only the answer was lost.
                self._live.forget(hold)
                raise
            tab = SessionTab(
                plan.account,
                hold,
                plan.result.granted,
                challenge_id=presented.challenge.id,
                token_pico=need.token_pico,
                reserve_pico=need.reserve_pico,
                unit_pico=unit * PICO_PER_UNIT,
                cap_pico=need.cap_pico,
                books=self._books,
                owner=self._owner,
                clock=self._clock,
                policy=self._tab_policy,
            )
            self._live.add(tab, stream=need.stream)
            return tab

    async def _reserve(self, presented: Presented, channel: ChannelId, hold: HoldId, need: Need) -> Plan[Outcome]:
        """Hold the money. A stream of another process is asked to end first; only when it does not is it fenced.

        Buffered requests share the channel, each with its whole worst case held, so several of one agent run at once.
        """
        # The stated window bounds the first hold too: for a dear model its usual tokens would be more than that.
        want = Pico(min(need.want, need.floor + self._tab_policy.window_units_max * PICO_PER_UNIT))
        command = Reserve(
            hold,
            presented.challenge.id,
            presented.expires,
            need.floor,
            want,
            preempt=False,
            owner=self._node(),
            stream=need.stream,
        )
        try:
            return await self._books.apply(channel, command)
        except ChannelFault as fault:
            busy = fault.reason is Reason.CHANNEL_BUSY and need.stream
            if not busy or (account := await self._books.load(channel)) is None or not account.streams:
                raise
        await self._ending.streams(channel)
        return await self._books.apply(channel, replace(command, preempt=True))

    def purchase(self, presented: Presented, account: Account, unit: Units) -> SessionPurchase:
        """What ``presented`` buys, ``unit`` by unit as it was quoted."""
        return SessionPurchase(self, self._live, presented, account, unit)

    # ----------------------------------------------------------------------------------------------------- actions

    async def _open(self, presented: Presented, payload: OpenPayload) -> Opened:
        known = await self._books.load(payload.channel_id)
        domain = self._domains[presented.escrow]
        signature = parse_signature(payload.signature)
        if known is not None:
            return Opened(await self._reopen(presented, payload, known), None)
        opened = self._intents.inspect_open(presented.escrow, payload)
        self._require_source(presented, opened.descriptor.payer, opened.descriptor.signer)
        if payload.cumulative > opened.deposit:
            raise ChannelFault(
                Reason.VOUCHER_EXCEEDS_DEPOSIT,
                field="cumulativeAmount",
                detail="is above the deposit",
                cumulative=payload.cumulative,
                deposit=opened.deposit,
            )
        domain.verify(payload.channel_id, payload.cumulative, signature, opened.descriptor.signer)
        self._books.require_deposit(opened.deposit)
        confirmed = await self._intents.open(presented.escrow, payload, opened, expires=presented.expires)
        command = Open(
            payload.channel_id,
            presented.escrow,
            opened.descriptor,
            confirmed.chain,
            Voucher(payload.cumulative, signature),
        )
        plan = await self._books.apply(payload.channel_id, command)
        self._live.checked(plan.account.id)
        return Opened(plan.account, confirmed.tx_hash)

    async def _reopen(self, presented: Presented, payload: OpenPayload, known: Account) -> Account:
        """The same open again, or again after its answer was lost: its voucher counts, its transaction does not."""
        voucher = VoucherPayload(payload.channel_id, payload.descriptor, payload.cumulative, payload.signature)
        return await self._voucher(presented, voucher, known)

    async def _known(
        self, presented: Presented, payload: VoucherPayload | TopUpPayload | ClosePayload, known: Account | None = None
    ) -> Account:
        account = known or await self._books.load(payload.channel_id)
        if account is None or account.escrow != presented.escrow:
            raise ChannelFault(Reason.CHANNEL_NOT_FOUND, field="channelId", detail="names no channel of this node")
        require_descriptor(payload.descriptor, account.descriptor)
        self._require_source(presented, account.descriptor.payer, account.descriptor.signer)
        return account

    async def _voucher(self, presented: Presented, payload: VoucherPayload, known: Account | None = None) -> Account:
        try:
            return await self._accept(presented, payload, known)
        except ChannelFault as fault:
            self._metrics.voucher_refused(fault.reason.value)
            raise

    async def _accept(self, presented: Presented, payload: VoucherPayload, known: Account | None) -> Account:
        account = await self._known(presented, payload, known)
        signature = parse_signature(payload.signature)
        if account.phase is not Phase.OPEN:
            raise ChannelFault(Reason.CHANNEL_FINALIZED, detail=f"the channel is {account.phase}")
        if payload.cumulative < account.accepted:  # before any curve arithmetic: an old voucher costs an attacker more
            raise ChannelFault(
                Reason.VOUCHER_TOO_LOW,
                field="cumulativeAmount",
                detail="is below the accepted voucher",
                cumulative=payload.cumulative,
                accepted=account.accepted,
            )
        if signature != account.ladder[-1].signature or payload.cumulative != account.accepted:
            self._rate.take(account.id, presented.peer)
            domain = self._domains[account.escrow]
            domain.verify(account.id, payload.cumulative, signature, account.descriptor.signer)
        # A payer may have topped up without telling us: look again before refusing for want of deposit.
        account = await self._fresh(account, force=payload.cumulative > account.chain.deposit)
        # Cancelled, the commit would happen all the same, and nobody would count it or write a line about it.
        accept = AcceptVoucher(Voucher(payload.cumulative, signature))
        plan = await self._to_the_end(self._books.apply(account.id, accept), name="accept voucher")
        return plan.account

    async def _fresh(self, account: Account, *, force: bool) -> Account:
        """Look at the chain unless that was done a moment ago: a payer may have asked it to close."""
        if not force and self._live.checked_within(account.id, self._terms.chain_ttl_s):
            return account
        try:
            seen = await self._intents.observe(account)
        except ChannelFault as fault:
            # An RPC outage must not cut streams off: within the grace period of a close request nothing can be lost.
            if fault.reason is Reason.CHAIN_UNAVAILABLE and self._live.checked_within(account.id, _BLIND_S):
                return account
            raise
        plan = await self._books.apply(account.id, ObserveChain(seen))
        self._live.checked(account.id)
        return plan.account

    async def _top_up(self, presented: Presented, payload: TopUpPayload) -> SessionReceipt:
        account = await self._known(presented, payload)
        credential = Hash32(keccak256(payload.transaction))
        for known, tx_hash in account.top_ups:
            if known == credential:
                return self.receipt(presented, account, tx_hash=tx_hash)
        if account.phase not in (Phase.OPEN, Phase.CONTESTED):
            raise ChannelFault(Reason.CHANNEL_FINALIZED, detail=f"the channel is {account.phase}")
        confirmed = await self._intents.top_up(account, payload, expires=presented.expires)
        plan = await self._books.apply(account.id, RecordTopUp(credential, confirmed.tx_hash, confirmed.chain))
        self._live.checked(account.id)
        return self.receipt(presented, plan.account, tx_hash=plan.result.tx_hash)

    async def _close(self, presented: Presented, payload: ClosePayload) -> SessionReceipt:
        async with self._closer.closing(payload.channel_id):
            account = await self._known(presented, payload)
            signature = parse_signature(payload.signature)
            record = account.close
            if account.phase is Phase.CLOSED and record is not None and record.tx_hash is not None:
                if (record.challenge_id, record.cumulative) == (presented.challenge.id, payload.cumulative):
                    return self._close_receipt(presented, account, payload, record.tx_hash)
                raise ChannelFault(Reason.CHANNEL_FINALIZED, detail="the channel is closed")
            domain = self._domains[account.escrow]
            domain.verify(account.id, payload.cumulative, signature, account.descriptor.signer)
            first = account.phase in (Phase.OPEN, Phase.CONTESTED)
            if first:
                # A payer may have withdrawn behind our back: then there is nothing to capture, and no receipt for it.
                await self._fresh(account, force=True)
            begin = BeginClose(presented.challenge.id, Voucher(payload.cumulative, signature))
            async with self._live.admitting(account.id):
                # First the streams, then the credential: it must cover what they have cost, and their cost is known
                # only now. The other way round its receipt could show more spent than it permits.
                await self._live.end_all(account.id)
                if first:
                    await self._ending.everything(account.id)
                await self._books.apply(account.id, begin)
            try:
                closed, tx_hash = await self._closer.finish(account.id, first=first)
            except ChannelFault as fault:
                if fault.reason in _MAY_YET_CLOSE:
                    self._closer.later(account.id)
                raise
            return self._close_receipt(presented, closed, payload, tx_hash)

    async def _to_the_end(self, work: Coroutine[Any, Any, T], *, name: str) -> T:
        """Do ``work`` even if the asker goes away: a transaction that has left must not be forgotten half-way."""

        async def run() -> T | ChannelFault:
            try:
                return await work
            except ChannelFault as fault:  # a refusal is an answer, not a failed task
                return fault

        task = self._owner.start(run(), name=name)
        await asyncio.wait({task})
        outcome = task.result()
        if isinstance(outcome, ChannelFault):
            raise outcome
        return outcome

    # ---------------------------------------------------------------------------------------------------- receipts

    def _require_source(self, presented: Presented, payer: bytes, signer: bytes) -> None:
        if presented.source is not None and presented.source[1] not in (payer, signer):
            raise ChannelFault(Reason.SOURCE_MISMATCH, field="source", detail="is not the channel's payer or signer")

    def receipt(self, presented: Presented, account: Account, tx_hash: Hash32 | None = None) -> SessionReceipt:
        """The answer to a credential, as of a committed account."""
        return SessionReceipt(
            timestamp_ms=self._clock.now_millis(),
            challenge_id=presented.challenge.id,
            channel_id=account.id,
            accepted=account.accepted,
            spent=account.spent,
            tx_hash=tx_hash,
        )

    def _close_receipt(
        self, presented: Presented, account: Account, payload: ClosePayload, tx_hash: Hash32
    ) -> SessionReceipt:
        # The client requires the amount of its close credential here, not the highest voucher.
        return SessionReceipt(
            timestamp_ms=self._clock.now_millis(),
            challenge_id=presented.challenge.id,
            channel_id=account.id,
            accepted=payload.cumulative,
            spent=account.spent,
            tx_hash=tx_hash,
        )


class SessionPurchase:
    """One content credential and its channel; implements :class:`mppnode.rails.base.Purchase`."""

    rail = "session"
    __slots__ = ("_account", "_live", "_presented", "_rail", "_unit")

    def __init__(
        self, rail: SessionRail, live: LiveChannels, presented: Presented, account: Account, unit: Units
    ) -> None:
        self._rail = rail
        self._live = live
        self._presented: Presented | None = presented
        self._account: Account | None = account
        self._unit = unit

    async def open(self, need: Need, chat: ChatRequest, request: str) -> SessionTab:  # noqa: ARG002 - not recorded
        """See :meth:`SessionRail.open_tab`."""
        presented, account = self._presented, self._account
        assert presented is not None
        assert account is not None
        # A stream may wait for money for long, and these are kilobytes it needs no more.
        self._presented = self._account = None
        return await self._rail.open_tab(presented, account, need, self._unit)

    def on_supersede(self, tab: Tab, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """A newer request of the channel, or its close, ends this one."""
        assert isinstance(tab, SessionTab)
        self._live.on_supersede(tab, end)

    def done(self, tab: Tab) -> None:
        """Forget a finished tab."""
        assert isinstance(tab, SessionTab)
        self._live.remove(tab)


@dataclass(frozen=True, slots=True)
class Opened:
    """An account whose money a credential brought; ``tx_hash`` is set when that opened the channel just now."""

    account: Account
    tx_hash: Hash32 | None
