"""The credit rail: accounts with a balance as a way to pay for a request, on the same URLs as channels.

A request holds its worst case, within the balance, the spend caps and the rate limits of its key, in one transaction;
at its end the exact charge, the row customers see, and whatever must be told about it are one transaction again.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

from channels.credit import (
    NO_CAPS,
    CreditAccount,
    CreditFault,
    CreditPlan,
    CreditReason,
    Hold,
    Settle,
    Spending,
    Window,
    plan,
)
from channels.instants import UnixMillis, UnixSeconds
from channels.model import HoldId, NodeId
from channels.units import Pico
from mppnode.accounts.directory import Admission, Directory
from mppnode.accounts.limits import Bucket, Pace, Taken, UnixMicros, Wait, admit, rate_headers, refusal, settle
from mppnode.accounts.model import ApiKey, RateLimits, Routing
from mppnode.kernel.clock import Clock
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.requests import ChatRequest
from mppnode.kernel.tasks import TaskOwner
from mppnode.ledger.credit_rows import RequestRow, SideRow, Task
from mppnode.ledger.credits import Credits
from mppnode.metering.tally import prompt_tokens_held
from mppnode.rails.base import Facts, Need, Tab
from mppnode.rails.credit_tab import CreditTab

_NO_LIMITS: Final = RateLimits()
_CHANGES_MAX: Final = 3  # an account that changes more often than it is looked up is somebody's script

Notices = Callable[..., tuple[Task, ...]]
"""See :func:`mppnode.accounts.notices.notices`: what a change of an account must be told to whom."""


class _Changed(Exception):
    """The key or account is not what is remembered of it."""


class CreditRail:
    """Credit accounts, prepaid and post-paid."""

    def __init__(
        self,
        *,
        books: Credits,
        directory: Directory,
        notices: Notices,
        node: Callable[[], NodeId],
        owner: TaskOwner,
        clock: Clock,
        window_pico: int,
        top_up_url: str | None,
    ) -> None:
        """``window_pico`` is the most of a stream that is not in the ledger yet."""
        self.books = books
        self.owner = owner
        self.clock = clock
        self.directory = directory
        self._notices = notices
        self._node = node
        self._window = window_pico
        self._top_up_url = top_up_url
        self._holds: set[HoldId] = set()
        self._enders: dict[CreditTab, Callable[[], Coroutine[Any, Any, None]]] = {}

    def purchase(self, admission: Admission) -> CreditPurchase:
        """What an admitted bearer may buy."""
        return CreditPurchase(self, admission)

    def owns(self, hold: HoldId) -> bool:
        """Whether a request of this process stands behind a hold."""
        return hold in self._holds

    def end_everything(self) -> None:
        """End every request of this process: its life in the ledger is over, its holds may be gone."""
        for end in tuple(self._enders.values()):
            self.owner.spawn(end(), name="end request")

    # ---------------------------------------------------------------------------------------------------- reservation

    async def open_tab(self, admission: Admission, need: Need, chat: ChatRequest, request: str) -> CreditTab:
        """Hold what a request needs.

        Raises:
            _Changed: the bearer is to be looked up again.
            NodeFault: ``LIMIT_REACHED``, ``CAP_REACHED`` or ``CREDIT_TOO_LOW``.
        """
        hold, limits = HoldId(request), _limits(admission.key)
        pacing = _Pacing(limits, _tokens_of(chat, limits), UnixMicros(self.clock.now_millis() * 1000))
        wanted = self._wanted(admission, need, chat, hold)
        self._holds.add(hold)
        try:
            made = await self.books.transact(
                admission.account.id, lambda found: (self._held(found, wanted, pacing), ())
            )
        except BaseException as error:
            # The sweep ends it if it was reserved all the same and only the answer was lost.
            self._holds.discard(hold)
            if isinstance(error, CreditFault):
                refused = self._refused(error, need, chat)
                if isinstance(refused, NodeFault):
                    refused.headers = pacing.before
                raise refused from None
            raise
        return CreditTab(
            self,
            admission,
            hold,
            made.result.granted,
            cap_pico=need.cap_pico,
            window_pico=self._window,
            taken=pacing.taken,
            headers=pacing.headers,
        )

    def _wanted(self, admission: Admission, need: Need, chat: ChatRequest, hold: HoldId) -> Hold:
        key = admission.key
        # Whoever says how long an answer may be gets that or a refusal; whoever does not, gets what there is money for.
        floor = need.cap_pico if chat.limited else need.prompt_pico + chat.choices * need.token_pico
        return Hold(
            hold,
            Pico(min(floor, need.cap_pico)),
            Pico(need.cap_pico),
            access=admission.changes,
            key=admission.key_id,
            caps=NO_CAPS if key is None else key.caps,
            concurrency=_limits(key).concurrency,
            owner=self._node(),
            about=chat.model,
        )

    def _held(self, found: CreditAccount | None, wanted: Hold, pacing: _Pacing) -> CreditPlan:
        if found is None or found.access != wanted.access:
            raise CreditFault(CreditReason.ACCESS_CHANGED)  # first: the limits it would meet may be yesterday's
        pace = pacing.take(found.paces.get(wanted.key))
        try:
            return plan(found, replace(wanted, pace=pace), now=self.clock.now())
        except CreditFault as fault:
            # What is told to fit below a cap must not be refused for credit then.
            fault.left = Pico(max(min(fault.left, found.headroom), 0))
            raise

    def _refused(self, fault: CreditFault, need: Need, chat: ChatRequest) -> Exception:
        each, more = need.token_pico * chat.choices, dict[str, str | int | None]()
        affordable = max((fault.left - need.prompt_pico) // each, 0)
        match fault.reason:
            case CreditReason.ACCESS_CHANGED:
                return _Changed()
            case CreditReason.BUSY:
                return NodeFault(
                    NodeReason.LIMIT_REACHED,
                    detail="the key has as many requests at once as it may",
                    retry_after_s=1,
                    limit="concurrency",
                )
            case CreditReason.CAP_REACHED:
                until = "" if fault.window is Window.TOTAL else f" of this {fault.window} (UTC)"
                more |= {"affordable_max_tokens": affordable, "window": fault.window, "resets_in_s": fault.again_in_s}
                return NodeFault(
                    NodeReason.CAP_REACHED,
                    detail=f"the key's spend cap{until} does not cover the request",
                    more=more,
                    limit=None if fault.window is None else fault.window.value,
                )
            case CreditReason.CREDIT_TOO_LOW:
                more |= {"affordable_max_tokens": affordable, "top_up_url": self._top_up_url}
                return NodeFault(
                    NodeReason.CREDIT_TOO_LOW,
                    field="max_tokens" if affordable else None,
                    detail="is more than the credit covers" if affordable else "the credit does not cover the request",
                    more=more,
                )
            case _:
                return fault

    # ------------------------------------------------------------------------------------------------------ settlement

    async def settle(self, tab: CreditTab, total: Pico, facts: Facts) -> bool:
        """Charge a request and write everything that belongs to it; False when somebody else has closed its bill.

        Raises:
            ChannelFault: ``STORE_UNAVAILABLE``.
        """
        at = self.clock.now_millis()
        try:
            await self.books.transact(
                tab.admission.account.id, lambda found: self._settled(found, tab, total, facts, at)
            )
        except CreditFault as fault:
            # Dropped by a sweep that took this process for dead: what was recorded then is the bill.
            if fault.reason is not CreditReason.HOLD_FENCED:
                raise
            return False
        return True

    def _settled(
        self, found: CreditAccount | None, tab: CreditTab, total: Pico, facts: Facts, at: UnixMillis
    ) -> tuple[CreditPlan, list[SideRow]]:
        admission, limits = tab.admission, _limits(tab.admission.key)
        pace = None
        if tab.taken is not None and found is not None:
            known = _pace_of(found.paces.get(admission.key_id))
            used = facts.usage.prompt + facts.usage.completion
            pace = _pace_row(settle(known, limits, tab.taken, used, UnixMicros(at * 1000)))
        made = plan(found, Settle(tab.hold, total, pace), now=UnixSeconds(at // 1000))
        assert found is not None
        row = _row(admission, facts, made, at)
        before = _without(found, tab.hold)
        tasks = self._notices(before, made.account, account=admission.account, key=admission.key, now=at)
        return made, [row, *tasks]

    def unrecorded(self) -> int:
        """Pico of all live requests that have left this process and are not in the ledger yet."""
        return sum(tab.unrecorded for tab in self._enders)

    def begun(self, tab: CreditTab, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Remember a running request and how it is ended from outside."""
        self._enders[tab] = end

    def done(self, tab: CreditTab) -> None:
        """Forget a request whose bill is settled."""
        self._enders.pop(tab, None)
        self._holds.discard(tab.hold)


class CreditPurchase:
    """One request of an admitted bearer; implements :class:`mppnode.rails.base.Purchase`."""

    rail = "credit"

    def __init__(self, rail: CreditRail, admission: Admission) -> None:
        self._rail = rail
        self.admission = admission

    async def open(self, need: Need, chat: ChatRequest, request: str) -> CreditTab:
        """See :meth:`Purchase.open`. Refused for an outdated admission, the bearer is looked up once more.

        Raises:
            NodeFault: as :meth:`CreditRail.open_tab` and :meth:`Directory.admit`; ``CONFLICT`` when the settings by
                which the request was routed have changed: asked again, it is routed by the new ones.
        """
        for _ in range(_CHANGES_MAX):
            try:
                return await self._rail.open_tab(self.admission, need, chat, request)
            except _Changed:
                pass
            before = self.admission.access
            self.admission = await self._rail.directory.again(self.admission)
            if not _same_routing(before.preferences, self.admission.access.preferences):
                break
        raise NodeFault(
            NodeReason.CONFLICT, detail="the settings of the account are being changed; ask again", retry_after_s=1
        )

    def on_supersede(self, tab: Tab, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """See :meth:`Purchase.on_supersede`: nothing takes the place of a key's request but the end of this process."""
        assert isinstance(tab, CreditTab)
        self._rail.begun(tab, end)

    def done(self, tab: Tab) -> None:
        """See :meth:`Purchase.done`."""
        assert isinstance(tab, CreditTab)
        self._rail.done(tab)


def _same_routing(before: tuple[Routing, ...], after: tuple[Routing, ...]) -> bool:
    names = ("strategy", "allow_external", "ceiling", "model_pool", "optimize")
    return [[getattr(who, name) for name in names] for who in before] == [
        [getattr(who, name) for name in names] for who in after
    ]


def _without(account: CreditAccount, name: HoldId) -> CreditAccount:
    """The account as if a live request had not been charged yet.

    What a request has moved it has moved by the end, and only then somebody is told: a limit that was passed in the
    middle of a stream would otherwise have been passed by nobody.
    """
    hold = account.holds.get(name)
    if hold is None or not hold.consumed:
        return account
    spent = account.spending.get(hold.key, Spending())
    spending = {**account.spending, hold.key: spent.plus(-hold.consumed, account.charged_at)}
    return replace(account, owed=account.owed - hold.consumed, spending=spending)


# --------------------------------------------------------------------------------------------------------- rate limits


@dataclass(slots=True)
class _Pacing:
    """The rate limits of one request, decided inside the transaction of its hold, perhaps more than once."""

    limits: RateLimits
    tokens: int
    now: UnixMicros
    taken: Taken | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    """What a refusal for something else says, which takes nothing."""

    def take(self, row: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """The key's buckets after this request. Raises ``LIMIT_REACHED``."""
        if self.limits.rpm is None and self.limits.tpm is None:
            return None
        before = _pace_of(row)
        self.before = rate_headers(before, self.limits, self.now)
        after, verdict = admit(before, self.limits, self.tokens, self.now)
        self.headers = rate_headers(after, self.limits, self.now)
        if isinstance(verdict, Wait):
            fault = refusal(verdict)
            fault.headers = self.headers
            raise fault
        self.taken = verdict
        return _pace_row(after)


def _limits(key: ApiKey | None) -> RateLimits:
    return _NO_LIMITS if key is None else key.rates


def _tokens_of(chat: ChatRequest, limits: RateLimits) -> int:
    """The most tokens a request may take; one that did not say how many fits into any limit."""
    prompt = prompt_tokens_held(chat.prompt_bytes, images=chat.images, audio_bytes=chat.audio_bytes)
    tokens = prompt + chat.completion_tokens_max
    return tokens if chat.limited or limits.tpm is None else max(min(tokens, limits.tpm), prompt)


def _pace_of(row: tuple[int, ...] | None) -> Pace:
    if row is None:
        return Pace()
    a, b, c, d, e, f = row
    return Pace(Bucket(a, UnixMicros(b), c), Bucket(d, UnixMicros(e), f))


def _pace_row(pace: Pace) -> tuple[int, ...]:
    one, two = pace.requests, pace.tokens
    return (one.level, one.at, one.returned, two.level, two.at, two.returned)


# ------------------------------------------------------------------------------------------------------------- records


def _row(admission: Admission, facts: Facts, made: CreditPlan, at: UnixMillis) -> RequestRow:
    usage, charged = facts.usage, made.result.charged
    document = {
        "ending": facts.ending,
        "stream": facts.stream,
        "strategy": facts.strategy,
        "attempts": facts.attempts,
        "token_source": facts.token_source,
        "cache_write": usage.cache_write,
        "images": usage.images,
        "ttft_ms": facts.first_ms,
        "duration_ms": facts.duration_ms,
        "receipt": {"method": "credit", "reference": facts.request, "entry": made.account.version},
    }
    return RequestRow(
        id=facts.request,
        account=admission.account.id,
        api_key=admission.key_id,
        at_ms=at,
        model=facts.model,
        provider=facts.provider,
        cost=charged,
        prompt=usage.prompt,
        cached=usage.cached_prompt,
        completion=usage.completion,
        reasoning=usage.reasoning,
        document=orjson.dumps(document).decode(),
    )
