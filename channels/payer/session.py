"""The payer's side of a channel as a pure function: what was heard in, what to do out.

Nothing here signs or sends. What makes it safe to let a program pay unattended:

* A voucher is asked for only on a channel whose id was derived from a descriptor we checked, within the deposit, the
  cap per request and the cap per channel; all of that is decided in :func:`_authorise` and in :func:`_open`.
* The signed total falls only when the server refuses a payment, and then only to what it was before that payment. What
  was signed once stays claimable, so a request's budget is charged with what it adds to the most ever signed, for good.
* An opening whose outcome is unknown is looked up on chain. Opening again instead, as a simple client would, locks
  another deposit each time the answer gets lost.

Between requests the signed but unspent remainder is used up first: the next voucher covers what is spent, what other
requests may still use and the new amount, and is not simply the last one plus the amount. On a metered service the
simple sum drifts away from what is owed. Where the server disagrees, its refusal moves us to the simple sum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias, assert_never

from channels.descriptor import ChainSnapshot, SessionProtocol
from channels.ids import ZERO_ADDRESS
from channels.payer.checks import own_channel, read_terms, receipt_problem, trusted_snapshot, usable_on_chain
from channels.payer.model import (
    ATTEMPTS_MAX,
    Action,
    Answered,
    ChallengeSeen,
    Channel,
    ChannelGone,
    ChannelRead,
    Close,
    CloseAnswered,
    Closed,
    CloseRequested,
    Counterparty,
    Due,
    GiveUp,
    GiveUpReason,
    InFlight,
    Input,
    NeedVoucherSeen,
    OpenAborted,
    OpenChannel,
    OpenPrepared,
    PayerPhase,
    PayerPolicy,
    PayerState,
    PaymentDue,
    Purpose,
    ReadChannel,
    ReceiptSeen,
    Reclaim,
    RequestEnded,
    SendOpen,
    SignVoucher,
    TopUp,
    TopUpAnswered,
    VoucherDue,
)
from channels.units import Units
from channels.wire.receipt import SessionReceipt

Step: TypeAlias = tuple[PayerState, tuple[Action, ...]]


class PayerSession:
    """The state of one counterparty and the policy it is spent under."""

    def __init__(self, policy: PayerPolicy, counterparty: Counterparty) -> None:
        self.policy = policy
        self.state = PayerState(counterparty)

    def handle(self, heard: Input) -> tuple[Action, ...]:
        """Take in what was heard and return what to do about it, in order."""
        self.state, actions = step(self.policy, self.state, heard)
        return actions


def step(policy: PayerPolicy, state: PayerState, heard: Input) -> Step:
    """One transition. It never raises on anything a server can cause: refusals are :class:`GiveUp` actions."""
    match heard:
        case ChallengeSeen():
            return _challenge(policy, state, heard)
        case OpenPrepared():
            return _open_prepared(policy, state, heard)
        case OpenAborted():
            return _open_aborted(policy, state, heard)
        case Answered():
            return _answered(policy, state, heard)
        case ReceiptSeen():
            return _learn(state, heard.request, heard.receipt)
        case NeedVoucherSeen():
            return _need(policy, state, heard)
        case TopUpAnswered():
            return _top_up_answered(policy, state, heard)
        case RequestEnded():
            return _ended(policy, state, heard.request)
        case ChannelGone():
            return _gone(state, heard)
        case ChannelRead():
            return _channel_read(policy, state, heard)
        case CloseRequested():
            return _close(state)
        case CloseAnswered():
            return _close_answered(state, heard)
        case _:
            assert_never(heard)


# --- challenges -----------------------------------------------------------------------------------------------------


def _challenge(policy: PayerPolicy, state: PayerState, heard: ChallengeSeen) -> Step:
    flight = state.requests.get(heard.request, InFlight())
    terms = read_terms(policy, state.counterparty, heard.challenge, heard.now)
    if isinstance(terms, GiveUpReason):
        # A 402 we will not pay is still a refusal of what we sent before.
        if flight.pending is Purpose.TOP_UP:
            state, actions = _top_up_answered(policy, state, TopUpAnswered(ok=False))
        else:
            state, actions = _answered(policy, state, Answered(heard.request, ok=False))
        return state, (GiveUp(heard.request, terms), *actions)
    due = PaymentDue(heard.request, heard.challenge.id, terms)
    match flight.pending:
        case Purpose.OPEN:
            return _open_refused(policy, state, due)
        case Purpose.VOUCHER | Purpose.TOP_UP:
            return _refresh(policy, state, flight, due)
        case Purpose.CONTENT | None:
            return _pay(policy, _roll_back(state, heard.request), due)
        case _:
            assert_never(flight.pending)


def _pay(policy: PayerPolicy, state: PayerState, due: PaymentDue) -> Step:
    """Make the first payment of a request, or the next after a refusal."""
    if state.requests.get(due.request, InFlight()).attempts >= ATTEMPTS_MAX:
        return state, (GiveUp(due.request, GiveUpReason.TOO_MANY_ATTEMPTS),)
    match state.phase:
        case PayerPhase.OPENING | PayerPhase.RECOVERING:
            # Two requests at once must not open two channels: the later one waits for the first one's.
            return replace(state, waiting=(*state.waiting, due)), ()
        case PayerPhase.CLOSING:
            return state, (GiveUp(due.request, GiveUpReason.CLOSING),)
        case PayerPhase.ABSENT:
            return _begin(policy, state, due)
        case PayerPhase.OPEN:
            return _pay_open(policy, state, due)
        case _:
            assert_never(state.phase)


def _pay_open(policy: PayerPolicy, state: PayerState, due: PaymentDue) -> Step:
    terms, flight = due.terms, state.requests.get(due.request, InFlight())
    required = 0
    trusted = trusted_snapshot(policy, state.counterparty, terms)
    if trusted is not None and trusted[1] == state.channel:
        snapshot = trusted[0]
        # It carries our own signature over `accepted`, so that much is claimable whether we remember it or not.
        state = _raise_known(state, accepted=snapshot.accepted, spent=snapshot.spent)
        required = snapshot.required
    others = sum(other.reserve for number, other in state.requests.items() if number != due.request)
    # See the module's last paragraph. The simple sum is the ceiling: `others` counts what they already used up, too.
    frugal = min(state.spent + others, state.cumulative) + terms.amount
    target = max(required, frugal, state.cumulative + flight.attempts * terms.amount)
    least = state.cumulative + (terms.min_voucher_delta or 0)
    if state.cumulative < target < least:
        target = least
    flight = replace(flight, reserve=max(flight.reserve, terms.amount), challenge_id=due.challenge_id)
    state = replace(state, suggested_deposit=terms.suggested_deposit or state.suggested_deposit)
    return _authorise(policy, _with_request(state, due.request, flight), due, target)


def _begin(policy: PayerPolicy, state: PayerState, due: PaymentDue) -> Step:
    """Without a channel: take up the one the server proves we have, else open one."""
    trusted = trusted_snapshot(policy, state.counterparty, due.terms)
    if trusted is None or trusted[1].id in state.reclaimed:
        return _open(policy, state, due)
    snapshot, channel = trusted
    state = replace(
        state,
        phase=PayerPhase.RECOVERING,
        channel=channel,
        candidate=snapshot,
        signed_max=snapshot.accepted,
        operator=due.terms.operator,
        waiting=(due, *state.waiting),
    )
    return state, (ReadChannel(channel, opening=False),)


# --- opening --------------------------------------------------------------------------------------------------------


def _open(policy: PayerPolicy, state: PayerState, due: PaymentDue) -> Step:
    terms, flight = due.terms, state.requests.get(due.request, InFlight())
    if flight.authorised + terms.amount > policy.request_cap:
        return state, (GiveUp(due.request, GiveUpReason.REQUEST_CAP),)
    if terms.amount > policy.channel_cap:
        return state, (GiveUp(due.request, GiveUpReason.CHANNEL_CAP),)
    # Locking more than could ever be signed helps nobody, whatever the server suggests.
    suggested = max(terms.suggested_deposit or Units(0), terms.amount)
    deposit = min(suggested, policy.max_deposit, policy.channel_cap) if policy.deposit is None else policy.deposit
    if deposit < terms.amount:
        return state, (GiveUp(due.request, GiveUpReason.DEPOSIT_CAP),)
    flight = replace(flight, reserve=terms.amount, challenge_id=due.challenge_id, pending=None)
    state = replace(
        _with_request(state, due.request, flight),
        phase=PayerPhase.OPENING,
        opener=due.request,
        deposit=deposit,
        suggested_deposit=terms.suggested_deposit or Units(0),
        operator=terms.operator,
    )
    action = OpenChannel(
        request=due.request,
        counterparty=state.counterparty,
        operator=terms.operator or ZERO_ADDRESS,
        authorized_signer=policy.signer,
        deposit=deposit,
        fee_payer=terms.fee_payer,
        fee_token=terms.fee_token,
    )
    return state, (action,)


def _open_prepared(policy: PayerPolicy, state: PayerState, heard: OpenPrepared) -> Step:
    flight = state.requests.get(heard.request)
    if flight is None or not _awaits_transaction(state, heard.request):
        return state, (GiveUp(heard.request, GiveUpReason.OPEN_FAILED),)
    channel = own_channel(policy, state.counterparty, state.operator, heard.descriptor)
    if channel is None:  # the driver built something else than it was asked to
        return _start_over(policy, state, heard.request, GiveUpReason.FOREIGN_CHANNEL)
    first = flight.reserve
    flight = replace(
        flight,
        authorised=Units(flight.authorised + first),
        floor=Units(0),
        signed=first,
        attempts=flight.attempts + 1,
        pending=Purpose.OPEN,
    )
    state = replace(_with_request(state, heard.request, flight), channel=channel, cumulative=first, signed_max=first)
    return state, (SendOpen(heard.request, channel, state.deposit, first),)


def _open_aborted(policy: PayerPolicy, state: PayerState, heard: OpenAborted) -> Step:
    if not _awaits_transaction(state, heard.request):
        return state, (GiveUp(heard.request, GiveUpReason.OPEN_FAILED),)
    return _start_over(policy, state, heard.request, GiveUpReason.OPEN_FAILED)


def _awaits_transaction(state: PayerState, request: int) -> bool:
    return state.phase is PayerPhase.OPENING and state.opener == request and state.channel is None


def _start_over(policy: PayerPolicy, state: PayerState, request: int, reason: GiveUpReason) -> Step:
    """Forget an opening that certainly did not happen; whoever waited for it tries by itself."""
    state, actions = _flush(policy, _forget_channel(state))
    return state, (GiveUp(request, reason), *actions)


def _open_refused(policy: PayerPolicy, state: PayerState, due: PaymentDue) -> Step:
    """A 402 to our opening: it may have happened all the same, and a snapshot of it says so."""
    trusted = trusted_snapshot(policy, state.counterparty, due.terms)
    state = replace(state, waiting=(due, *state.waiting))
    if trusted is not None and trusted[1] == state.channel and trusted[0].accepted == state.signed_max:
        state = _raise_known(_settle(state, due.request), accepted=trusted[0].accepted, spent=trusted[0].spent)
        return _opened(policy, state)
    return _look_up(_roll_back(state, due.request))


def _open_answered(policy: PayerPolicy, state: PayerState, heard: Answered, flight: InFlight) -> Step:
    receipt = heard.receipt
    if receipt is None:
        if heard.ok:
            return _opened(policy, _settle(state, heard.request))
        return _look_up(_roll_back(state, heard.request))
    problem = receipt_problem(state, receipt)
    if problem is None and (receipt.challenge_id != flight.challenge_id or receipt.accepted != flight.signed):
        problem = GiveUpReason.BAD_RECEIPT
    if problem is not None:
        state, actions = _look_up(_roll_back(state, heard.request))
        return state, (GiveUp(heard.request, problem), *actions)
    # Even on a 5xx: the receipt proves that the channel is open and the voucher accepted.
    state = _raise_known(_settle(state, heard.request), accepted=receipt.accepted, spent=receipt.spent)
    return _opened(policy, state)


def _opened(policy: PayerPolicy, state: PayerState) -> Step:
    return _flush(policy, replace(state, phase=PayerPhase.OPEN, opener=None))


def _look_up(state: PayerState) -> Step:
    assert state.channel is not None
    return replace(state, phase=PayerPhase.RECOVERING, opener=None), (ReadChannel(state.channel, opening=True),)


def _channel_read(policy: PayerPolicy, state: PayerState, heard: ChannelRead) -> Step:
    chain, candidate, channel = heard.chain, state.candidate, state.channel
    if state.phase is not PayerPhase.RECOVERING or channel is None:
        return state, ()
    known = state.signed_max if candidate is None else candidate.accepted
    if chain is not None and usable_on_chain(chain, accepted=known):
        state = replace(state, deposit=chain.deposit, candidate=None)
        if candidate is not None:
            # Settled money was spent, whatever the server says.
            spent = max(candidate.spent, chain.settled)
            state = _raise_known(state, accepted=candidate.accepted, spent=spent)
        return _opened(policy, state)
    reclaim = (Reclaim(channel),) if _may_hold_money(chain) else ()
    state = _reclaiming(state, channel) if reclaim else state
    # The snapshots in the waiting challenges have just been found wanting; trusting one again would go in circles.
    waiting = tuple(
        replace(due, terms=replace(due.terms, snapshot=None)) if isinstance(due, PaymentDue) else due
        for due in state.waiting
    )
    state, actions = _flush(policy, _forget_channel(replace(state, waiting=waiting)))
    return state, (*reclaim, *actions)


def _may_hold_money(chain: ChainSnapshot | None) -> bool:
    return chain is None or (chain.deposit > 0 and chain.close_requested_at is None)


# --- answers --------------------------------------------------------------------------------------------------------


def _answered(policy: PayerPolicy, state: PayerState, heard: Answered) -> Step:
    flight = state.requests.get(heard.request, InFlight())
    if flight.pending is Purpose.OPEN:
        return _open_answered(policy, state, heard, flight)
    if heard.receipt is not None:
        # A receipt acknowledges the voucher whatever the status: there is nothing to take back.
        return _learn(_settle(state, heard.request), heard.request, heard.receipt)
    if heard.ok:
        return _settle(state, heard.request), ()
    return _roll_back(state, heard.request), ()


def _learn(state: PayerState, request: int, receipt: SessionReceipt) -> Step:
    problem = receipt_problem(state, receipt)
    if problem is not None:
        return state, (GiveUp(request, problem),)
    return _raise_known(state, accepted=receipt.accepted, spent=receipt.spent), ()


def _ended(policy: PayerPolicy, state: PayerState, request: int) -> Step:
    opening = state.phase is PayerPhase.OPENING and state.opener == request
    state = replace(
        state,
        requests={number: flight for number, flight in state.requests.items() if number != request},
        waiting=tuple(due for due in state.waiting if due.request != request),
    )
    if not opening:
        return state, ()
    if state.channel is None:
        return _flush(policy, _forget_channel(state))
    return _look_up(state)


def _gone(state: PayerState, heard: ChannelGone) -> Step:
    """The server has no such channel. It is still ours: its deposit is reclaimed; the next payment opens another."""
    if state.channel is None or state.phase is PayerPhase.RECOVERING:
        return state, ()
    if state.phase is PayerPhase.OPENING:
        # Another request's 410 is about a channel before this one.
        return _look_up(_roll_back(state, heard.request)) if heard.request == state.opener else (state, ())
    waiting, channel = state.waiting, state.channel
    state = _forget_channel(_reclaiming(replace(state, waiting=()), channel))
    return state, (Reclaim(channel), *(GiveUp(due.request, GiveUpReason.NO_CHANNEL) for due in waiting))


# --- mid-stream -----------------------------------------------------------------------------------------------------


def _need(policy: PayerPolicy, state: PayerState, heard: NeedVoucherSeen) -> Step:
    need = heard.need
    if state.phase is not PayerPhase.OPEN or state.channel is None or heard.request not in state.requests:
        return state, (GiveUp(heard.request, GiveUpReason.NO_CHANNEL),)
    if need.channel_id != state.channel.id:
        return state, (GiveUp(heard.request, GiveUpReason.FOREIGN_CHANNEL),)
    if need.accepted > state.signed_max:
        return state, (GiveUp(heard.request, GiveUpReason.INFLATED_CLAIM),)
    # The event's deposit is a hint: what the chain and our own top-ups said is what counts.
    due = VoucherDue(heard.request, need.required)
    return _authorise(policy, state, due, max(state.cumulative, need.required))


def _refresh(policy: PayerPolicy, state: PayerState, flight: InFlight, due: PaymentDue) -> Step:
    """A 402 to a mid-stream credential: its challenge has expired. Say the same again, once, with the new one."""
    channel, top_up = state.channel, state.top_up
    again = replace(flight, refreshes=1, challenge_id=due.challenge_id)
    if flight.pending is Purpose.TOP_UP:
        if flight.refreshes > 0 or top_up is None:
            return _top_up_answered(policy, state, TopUpAnswered(ok=False))
        return _with_request(state, due.request, again), (top_up,)
    if flight.refreshes > 0 or channel is None:
        return _roll_back(state, due.request), (GiveUp(due.request, GiveUpReason.TOO_MANY_ATTEMPTS),)
    action = SignVoucher(due.request, channel, flight.signed, Purpose.VOUCHER)
    return _with_request(state, due.request, again), (action,)


def _top_up_answered(policy: PayerPolicy, state: PayerState, heard: TopUpAnswered) -> Step:
    top_up = state.top_up
    if top_up is None:
        return state, ()
    state = _settle(replace(state, top_up=None), top_up.request)
    if not heard.ok:
        # It may have happened; then the deposit is larger than we think, which costs a needless top-up at worst.
        waiting, state = state.waiting, replace(state, waiting=())
        return state, tuple(GiveUp(due.request, GiveUpReason.TOP_UP_FAILED) for due in waiting)
    state = replace(state, deposit=Units(state.deposit + top_up.additional))
    learnt: tuple[Action, ...] = ()
    if heard.receipt is not None:
        state, learnt = _learn(state, top_up.request, heard.receipt)
    state, actions = _flush(policy, state)
    return state, (*learnt, *actions)


# --- the one place that lets vouchers grow --------------------------------------------------------------------------


def _authorise(policy: PayerPolicy, state: PayerState, due: Due, target: int) -> Step:
    """Ask for a voucher over ``target``, topping up first if the deposit does not cover it, or give up."""
    channel, flight = state.channel, state.requests.get(due.request, InFlight())
    assert channel is not None
    assert target >= state.cumulative
    # Only what exceeds everything signed so far is new risk. Charging growth over `cumulative` and refunding it when a
    # payment is refused looks equal, but lets a server that refuses and claims anyway use one budget again and again.
    grown = max(target - state.signed_max, 0)
    if flight.authorised + grown > policy.request_cap:
        return state, (GiveUp(due.request, GiveUpReason.REQUEST_CAP),)
    if target > policy.channel_cap:
        return state, (GiveUp(due.request, GiveUpReason.CHANNEL_CAP),)
    if target > state.deposit:
        return _top_up(policy, state, due, target - state.deposit)
    purpose = Purpose.CONTENT if isinstance(due, PaymentDue) else Purpose.VOUCHER
    flight = replace(
        flight,
        authorised=Units(flight.authorised + grown),
        reserve=Units(flight.reserve + target - state.cumulative) if purpose is Purpose.VOUCHER else flight.reserve,
        floor=state.cumulative,
        signed=Units(target),
        attempts=flight.attempts + (purpose is Purpose.CONTENT),
        refreshes=0,
        pending=purpose,
    )
    state = replace(
        _with_request(state, due.request, flight),
        cumulative=Units(target),
        signed_max=max(state.signed_max, Units(target)),
    )
    return state, (SignVoucher(due.request, channel, state.cumulative, purpose),)


def _top_up(policy: PayerPolicy, state: PayerState, due: Due, shortfall: int) -> Step:
    assert state.channel is not None
    if state.channel.escrow.protocol is SessionProtocol.V1:
        # Servers end a v1 stream when the deposit is used up; none is known to take a v1 top-up.
        return state, (GiveUp(due.request, GiveUpReason.DEPOSIT_EXHAUSTED),)
    if state.top_up is not None:
        return replace(state, waiting=(*state.waiting, due)), ()
    wish = state.suggested_deposit if policy.top_up is None else policy.top_up
    additional = min(max(shortfall, wish), policy.max_deposit - state.deposit)
    if additional < shortfall:
        return state, (GiveUp(due.request, GiveUpReason.DEPOSIT_CAP),)
    action = TopUp(due.request, state.channel, Units(additional))
    flight = replace(state.requests.get(due.request, InFlight()), pending=Purpose.TOP_UP, refreshes=0)
    state = _with_request(replace(state, top_up=action, waiting=(*state.waiting, due)), due.request, flight)
    return state, (action,)


def _flush(policy: PayerPolicy, state: PayerState) -> Step:
    """Take up again what was put off, in order; what still cannot go on is put off anew."""
    waiting, state = state.waiting, replace(state, waiting=())
    actions: tuple[Action, ...] = ()
    for due in waiting:
        more: tuple[Action, ...]
        if isinstance(due, PaymentDue):
            state, more = _pay(policy, state, due)
        elif state.phase is PayerPhase.OPEN:
            state, more = _authorise(policy, state, due, max(state.cumulative, due.required))
        else:
            more = (GiveUp(due.request, GiveUpReason.NO_CHANNEL),)
        actions += more
    return state, actions


# --- closing --------------------------------------------------------------------------------------------------------


def _close(state: PayerState) -> Step:
    if state.phase is not PayerPhase.OPEN or state.channel is None:
        return state, (GiveUp(None, GiveUpReason.NO_CHANNEL),)
    # On v2 the server captures what was spent, so the amount only has to be enough. On v1 the voucher is the payout:
    # sign no more than what was spent, if we are sure to know it.
    exact = state.channel.escrow.protocol is SessionProtocol.V1 and not state.requests
    action = Close(state.channel, state.spent if exact else state.cumulative)
    waiting = state.waiting
    state = replace(state, phase=PayerPhase.CLOSING, close=action, close_attempts=1, top_up=None, waiting=())
    return state, (action, *(GiveUp(due.request, GiveUpReason.CLOSING) for due in waiting))


def _close_answered(state: PayerState, heard: CloseAnswered) -> Step:
    close, receipt = state.close, heard.receipt
    if close is None:
        return state, ()
    if not heard.ok and state.close_attempts == 1:
        # The usual refusal is an amount below what was spent. This one covers all that can have been.
        close = Close(close.channel, state.signed_max)
        return replace(state, close=close, close_attempts=2), (close,)
    reclaimed = _forget_channel(_reclaiming(state, close.channel))
    if not heard.ok:
        return reclaimed, (GiveUp(None, GiveUpReason.CLOSE_REFUSED), Reclaim(close.channel))
    if (
        receipt is None
        or receipt.tx_hash is None
        or receipt.challenge_id != heard.challenge_id
        or receipt.channel_id != close.channel.id
        or receipt.accepted != close.cumulative
        or not state.spent <= receipt.spent <= receipt.accepted
    ):
        # Said to be closed, but not proven: the escrow knows.
        return reclaimed, (GiveUp(None, GiveUpReason.BAD_RECEIPT), Reclaim(close.channel))
    return _forget_channel(state), (Closed(close.channel, receipt.spent, receipt.tx_hash),)


# --- small changes of state -----------------------------------------------------------------------------------------


def _with_request(state: PayerState, request: int, flight: InFlight) -> PayerState:
    return replace(state, requests={**state.requests, request: flight})


def _settle(state: PayerState, request: int) -> PayerState:
    """The credential in flight was taken: its amount stands."""
    flight = state.requests.get(request)
    if flight is None or flight.pending is None:
        return state
    return _with_request(state, request, replace(flight, pending=None))


def _roll_back(state: PayerState, request: int) -> PayerState:
    """The credential in flight was refused: build on what was signed before it, unless others build on it by now."""
    flight = state.requests.get(request)
    if flight is None or flight.pending is None:
        return state
    refused = flight.signed if flight.pending is not Purpose.TOP_UP else Units(0)
    state = _settle(state, request)
    shared = any(other.pending and other.signed >= refused for other in state.requests.values())
    if state.cumulative != refused or shared:
        return state
    return replace(state, cumulative=min(refused, max(flight.floor, state.accepted)))


def _raise_known(state: PayerState, *, accepted: Units, spent: Units) -> PayerState:
    """Take over checked claims. They never fall: answers overtake one another."""
    return replace(
        state,
        accepted=max(state.accepted, accepted),
        spent=max(state.spent, spent),
        cumulative=max(state.cumulative, accepted),
        signed_max=max(state.signed_max, accepted),
    )


def _forget_channel(state: PayerState) -> PayerState:
    # Budgets and attempts outlive the channel; amounts on it mean nothing on the next one.
    requests = {
        number: replace(flight, floor=Units(0), signed=Units(0), reserve=Units(0), pending=None)
        for number, flight in state.requests.items()
    }
    return PayerState(state.counterparty, requests=requests, waiting=state.waiting, reclaimed=state.reclaimed)


def _reclaiming(state: PayerState, channel: Channel) -> PayerState:
    return replace(state, reclaimed=state.reclaimed | {channel.id})
