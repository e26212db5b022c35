"""The payer machine against a server that says anything: what gets signed stays within what the user allowed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from channels.descriptor import ChainSnapshot
from channels.ids import Address, ChannelId, Hash32
from channels.instants import UnixMillis, UnixSeconds
from channels.payer import model as m
from channels.payer.session import PayerSession
from channels.payer.signer import sign_voucher
from channels.units import Units
from channels.voucher import VoucherDomain, derive_channel_id
from channels.wire.receipt import SessionReceipt
from channels.wire.snapshot import SessionSnapshot, SignedAmount
from channels.wire.sse import NeedVoucher
from tests.unit.payer.kit import DESCRIPTOR, NOW, PAYEE, PAYER, SIGNER, TERMS, TOKEN, V1, V2, offer

REQUEST_CAP, CHANNEL_CAP, MAX_DEPOSIT = 190, 300, 400
REQUESTS = st.integers(1, 4)
AMOUNTS = st.integers(0, 450).map(Units)
PRICES = st.integers(1, 140).map(Units)
TX = Hash32(b"\xcd" * 32)


class Payer(RuleBasedStateMachine):
    """Feeds the machine every input a server or driver could cause, and keeps its own, dumber books."""

    escrow = V2

    def __init__(self) -> None:
        super().__init__()
        policy = m.PayerPolicy(
            payer=PAYER,
            signer=PAYER,
            escrows=frozenset({self.escrow}),
            tokens=frozenset({TOKEN}),
            request_cap=Units(REQUEST_CAP),
            channel_cap=Units(CHANNEL_CAP),
            max_deposit=Units(MAX_DEPOSIT),
        )
        self.terms = replace(TERMS, escrow=self.escrow, suggested_deposit=Units(200))
        self.session = PayerSession(policy, m.counterparty_of(self.terms))
        self.locked: dict[ChannelId, int] = {}  # deposit per channel that the escrow or an answer has confirmed
        self.signed: dict[ChannelId, int] = {}  # most ever signed per channel
        self.budget: dict[int, int] = {}  # what each request added to that
        self.promised = 0  # deposit of the opening transaction being made
        self.openings: dict[int, int] = {}  # SendOpen per request
        self.vouchers: dict[int, int] = {}  # content vouchers per request
        self.retired: set[ChannelId] = set()
        self.top_up = 0
        self.salt = 0
        self.opening: int | None = None
        self.reading: m.ReadChannel | None = None

    # --- driving

    def hear(self, heard: m.Input, *, refusal: bool = False) -> tuple[m.Action, ...]:
        before = self.session.state
        actions = self.session.handle(heard)
        after = self.session.state
        if before.channel == after.channel and not refusal:
            assert after.cumulative >= before.cumulative, "only a refusal lowers the signed total"
        assert before.channel == after.channel or not after.channel or after.channel.id not in self.retired
        for action in actions:
            self.check(action)
        return actions

    def check(self, action: m.Action) -> None:
        match action:
            case m.OpenChannel():
                assert self.session.state.channel is None
                assert action.deposit <= min(MAX_DEPOSIT, max(CHANNEL_CAP, 1))
                assert action.counterparty == m.counterparty_of(self.terms)
                self.opening, self.promised = action.request, action.deposit
            case m.SendOpen():
                self.openings[action.request] = self.openings.get(action.request, 0) + 1
                assert self.openings[action.request] + self.vouchers.get(action.request, 0) <= m.ATTEMPTS_MAX
                assert action.deposit == self.promised
                self.locked[action.channel.id] = self.promised
                self.sign(action.request, action.channel, action.cumulative)
            case m.SignVoucher():
                if action.purpose is m.Purpose.CONTENT:
                    self.vouchers[action.request] = self.vouchers.get(action.request, 0) + 1
                    assert self.openings.get(action.request, 0) + self.vouchers[action.request] <= m.ATTEMPTS_MAX
                self.sign(action.request, action.channel, action.cumulative)
            case m.Close():
                assert action.cumulative <= self.signed.get(action.channel.id, 0), "closing adds nothing"
            case m.TopUp():
                assert self.escrow is V2
                assert action.additional > 0
                assert self.locked[action.channel.id] + action.additional <= MAX_DEPOSIT
                self.top_up = action.additional
            case m.ReadChannel():
                self.reading = action
            case m.Reclaim() | m.Closed():
                self.retired.add(action.channel.id)
            case m.GiveUp():
                pass

    def sign(self, request: int, channel: m.Channel, cumulative: int) -> None:
        facts = channel.descriptor
        assert (facts.payer, facts.payee, facts.token, facts.signer) == (PAYER, PAYEE, TOKEN, PAYER)
        assert channel.id == derive_channel_id(self.escrow, facts)
        assert channel.id not in self.retired
        assert cumulative <= min(self.locked[channel.id], CHANNEL_CAP)
        risk = max(0, cumulative - self.signed.get(channel.id, 0))
        self.budget[request] = self.budget.get(request, 0) + risk
        assert self.budget[request] <= REQUEST_CAP
        self.signed[channel.id] = max(self.signed.get(channel.id, 0), cumulative)

    def snapshot(self, kind: str, amount: int, spent: int, required: int) -> SessionSnapshot | None:
        """A snapshot that is honest about our signature, or is not. Only what was signed can be signed for honestly."""
        channel = self.session.state.channel
        if kind == "none":
            return None
        facts = channel.descriptor if channel is not None and kind != "foreign" else DESCRIPTOR
        identity = derive_channel_id(self.escrow, facts)
        # Honest means: a voucher the books say was handed out.
        accepted = min(amount, self.signed.get(identity, 0)) if kind == "honest" else amount
        signature = b"\x01" * 65
        if kind == "honest":
            signature = sign_voucher(SIGNER, VoucherDomain(self.escrow), identity, Units(accepted))
        return SessionSnapshot(
            channel_id=identity,
            escrow=self.escrow,
            descriptor=facts,
            deposit=Units(self.locked.get(identity, 0)),
            settled=Units(0),
            spent=Units(min(spent, accepted)),
            accepted=Units(accepted),
            required=Units(required),
            highest_voucher=SignedAmount(Units(accepted), signature),
        )

    def receipt(self, data: tuple[bool, bool, int, int, str, bool]) -> SessionReceipt | None:
        given, own, accepted, spent, challenge, mined = data
        channel = self.session.state.channel
        if not given:
            return None
        identity = channel.id if own and channel is not None else ChannelId(b"\x01" * 32)
        return SessionReceipt(NOW, challenge, identity, Units(accepted), Units(spent), tx_hash=TX if mined else None)

    RECEIPTS = st.tuples(st.booleans(), st.booleans(), AMOUNTS, AMOUNTS, st.sampled_from(["", "c", "own"]), st.booleans())

    # --- what a server or a driver can cause

    @rule(request=REQUESTS, amount=PRICES, kind=st.sampled_from(["none", "none", "honest", "forged", "foreign"]), numbers=st.tuples(AMOUNTS, AMOUNTS, AMOUNTS), delta=st.none() | AMOUNTS, expired=st.sampled_from([False] * 7 + [True]))
    def challenge(self, *, request: int, amount: Units, kind: str, numbers: tuple[int, int, int], delta: Units | None, expired: bool) -> None:
        terms = replace(self.terms, amount=amount, min_voucher_delta=delta, snapshot=self.snapshot(kind, *numbers))
        seen = offer(request, terms)
        self.hear(replace(seen, now=UnixMillis(NOW + 10**9)) if expired else seen, refusal=True)

    @precondition(lambda self: self.opening is not None)
    @rule(honest=st.sampled_from([True, True, True, False]), aborted=st.sampled_from([False, False, False, True]))
    def prepare(self, honest: bool, aborted: bool) -> None:
        request, self.opening = self.opening, None
        assert request is not None
        self.salt += 1
        made = replace(DESCRIPTOR, salt=Hash32(self.salt.to_bytes(32, "big")))
        if not honest:
            made = replace(made, payee=Address(b"\x66" * 20))
        self.hear(m.OpenAborted(request) if aborted else m.OpenPrepared(request, made), refusal=True)

    @rule(request=REQUESTS, ok=st.booleans(), data=RECEIPTS)
    def answer(self, request: int, ok: bool, data: tuple[bool, bool, int, int, str, bool]) -> None:
        receipt = self.receipt(data)
        flight = self.session.state.requests.get(request)
        if receipt is not None and flight is not None and receipt.challenge_id == "own":
            receipt = replace(receipt, challenge_id=flight.challenge_id)
        self.hear(m.Answered(request, ok, receipt), refusal=not ok or receipt is not None)

    @rule(request=REQUESTS, data=RECEIPTS)
    def receipt_event(self, request: int, data: tuple[bool, bool, int, int, str, bool]) -> None:
        receipt = self.receipt((True, *data[1:]))
        assert receipt is not None
        self.hear(m.ReceiptSeen(request, receipt))
        assert self.session.state.channel is None or self.session.state.accepted <= self.signed.get(self.session.state.channel.id, 0)

    @rule(request=REQUESTS, own=st.sampled_from([True, True, True, False]), required=AMOUNTS, accepted=AMOUNTS)
    def need(self, request: int, own: bool, required: Units, accepted: Units) -> None:
        channel = self.session.state.channel
        identity = channel.id if own and channel is not None else ChannelId(b"\x01" * 32)
        self.hear(m.NeedVoucherSeen(request, NeedVoucher(identity, required, accepted, Units(10**6))))

    @rule(request=REQUESTS)
    def honest_need(self, request: int) -> None:
        state = self.session.state
        if state.channel is not None:
            required = Units(state.cumulative + 60)
            self.hear(m.NeedVoucherSeen(request, NeedVoucher(state.channel.id, required, state.accepted, state.deposit)))

    @rule(ok=st.booleans(), data=RECEIPTS)
    def top_up_answer(self, ok: bool, data: tuple[bool, bool, int, int, str, bool]) -> None:
        state = self.session.state
        if ok and state.top_up is not None and state.channel is not None:
            self.locked[state.channel.id] += self.top_up
        self.hear(m.TopUpAnswered(ok, self.receipt(data)))

    @rule(request=REQUESTS)
    def end(self, request: int) -> None:
        if self.opening == request:
            self.opening = None
        self.hear(m.RequestEnded(request))
        # A number is not used for another request in practice; here it is, with a budget of its own.
        for book in (self.budget, self.openings, self.vouchers):
            book.pop(request, None)

    @rule(request=REQUESTS)
    def gone(self, request: int) -> None:
        self.hear(m.ChannelGone(request), refusal=True)

    @precondition(lambda self: self.reading is not None)
    @rule(deposit=st.sampled_from([None, 0, 50, 200, 400]), settled=st.integers(0, 120), closing=st.sampled_from([None, None, 5]))
    def read_chain(self, deposit: int | None, settled: int, closing: int | None) -> None:
        assert self.reading is not None
        identity, self.reading = self.reading.channel.id, None
        if deposit is None:
            self.hear(m.ChannelRead(None))
            return
        if deposit:
            self.locked[identity] = deposit
        at = None if closing is None else UnixSeconds(closing)
        self.hear(m.ChannelRead(ChainSnapshot(Units(deposit), Units(min(settled, deposit)), at, 1)))

    @rule()
    def close(self) -> None:
        self.hear(m.CloseRequested())

    @rule(ok=st.booleans(), data=RECEIPTS, honest=st.booleans())
    def close_answer(self, ok: bool, data: tuple[bool, bool, int, int, str, bool], honest: bool) -> None:
        state = self.session.state
        receipt = self.receipt(data)
        if honest and state.close is not None:
            receipt = SessionReceipt(NOW, "c", state.close.channel.id, state.close.cumulative, min(state.spent, state.close.cumulative), tx_hash=TX)
        self.hear(m.CloseAnswered(ok, "c", receipt))

    # --- always

    @invariant()
    def the_numbers_hold(self) -> None:
        state = self.session.state
        assert state.spent <= state.accepted <= state.signed_max
        assert state.cumulative <= state.signed_max <= CHANNEL_CAP
        if state.channel is None:
            assert (state.cumulative, state.signed_max, state.accepted) == (0, 0, 0)
            assert state.phase in {m.PayerPhase.ABSENT, m.PayerPhase.OPENING}
        elif state.phase is not m.PayerPhase.RECOVERING:
            assert state.signed_max == self.signed.get(state.channel.id, 0), "the machine and the books agree"
            assert state.signed_max <= state.deposit == self.locked[state.channel.id]
        if state.waiting and state.phase is m.PayerPhase.OPEN:
            assert state.top_up is not None, "nobody waits for nothing"
        assert not (state.waiting and state.phase in {m.PayerPhase.ABSENT, m.PayerPhase.CLOSING})
        assert all(flight.authorised <= REQUEST_CAP for flight in state.requests.values())


class PayerOnContractEscrow(Payer):
    """The same on v1, where no top-up exists."""

    escrow = V1


TestPayer = Payer.TestCase
TestPayerOnContractEscrow = PayerOnContractEscrow.TestCase
TestPayer.settings = TestPayerOnContractEscrow.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
__all__: list[Any] = ["TestPayer", "TestPayerOnContractEscrow"]
