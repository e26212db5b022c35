"""One channel, the nodes that serve it, its escrow and its payer, as a state machine small enough to visit entirely.

A *process* is one life of a node process; it is up or gone, and its lease is good or given up by the others. Four things
need no step of their own. Not acting is always possible, so a process that sleeps (SIGSTOP) and wakes as a zombie is one
whose lease lapses while it is up. A lease lapses at any moment, so a second process that starts under the same name,
and fences the first, is a lapse and a start. A process nobody has heard of may be there or not, so starting and starting
again is a request that is served by a *free* process. And free processes are alike, so the next request goes to one of
them: with as many of them as there are requests, no number of nodes and restarts could do more.

A *stream* delivers against its own copy of its hold. A renewal is three steps (sent, committed, answered), with delivery,
kills, fences and repeats between any two of them; a renewal that was sent may be committed after its process has died.

The steps of the ledger are the real ones (``books``); everything else here is the node as it is meant to be, and each
of :class:`Rules` breaks it in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from channels.faults import Reason
from tests.model.books import EVERYBODY, Books, Broken, Held, View

FREE, UP, ZOMBIE, DEAD, GONE = range(5)
"""Of a process: nothing is known of it; up; up with its lease given up; killed, lease good; killed, lease given up."""
IDLE, SENT, ANSWERED, STARVED = range(4)
"""Of a stream: whether a renewal is on its way, committed with its answer on the way, or useless until there is news."""
SENT_OFF, MINED, FINAL, REVERTED, EXPIRED = range(5)
"""Of a transaction: perhaps on its way, in a block that may still be replaced, and its three ends."""
WAITING, OVER = 0, 1
"""A request that has not come yet, and one nobody speaks of any more."""

Processes = tuple[int, ...]


class Stream(NamedTuple):
    """A request as its process sees it. ``charged`` is -1 while its hold is there, then what it was released at."""

    owner: int
    granted: int
    delivered: int
    phase: int = IDLE
    sent: int = 0
    answer: int = 0
    charged: int = -1
    recorded: int = 0
    """What it remembers to have been charged; nothing sound depends on it, so only the unsound remember."""


class Escrow(NamedTuple):
    """The contract's slot and both wallets. ``closed``: 0 open, 1 withdrawn by the payer, 2 closed by the node."""

    deposit: int
    settled: int
    asked: bool
    closed: int
    payer: int
    node: int


class Intent(NamedTuple):
    """A transaction of ours; what it did on chain counts from its final block on, and the books learn of it later."""

    close: bool
    amount: int
    stage: int = 0


SAME: Final = Intent(False, -1)


class Channel(NamedTuple):
    """Everything about one channel. ``firm`` is the account a power cut would leave."""

    account: int
    firm: int
    escrow: Escrow
    intent: Intent | None
    requests: tuple[Stream | int, ...]


@dataclass(frozen=True)
class Bound:
    """How much there is of everything. A run visits all states within its bound or says that it did not."""

    deposit: int = 3
    accepted: int = 1
    voucher_steps: int = 2
    window: int = 2
    kinds: tuple[str, ...] = ("stream", "stream")
    """Of the requests, one after the other."""
    processes: int = 2
    """How many may hold something at once."""
    credit: bool = True
    """The usage report at the end may say one less than was counted."""
    overrun: bool = False
    """Or one more."""
    settles: bool = False
    closes: bool = False
    exits: bool = False
    """The payer may ask the chain to close, and withdraw."""
    top_ups: int = 0
    relaxed: bool = False
    """Folds that a power cut may undo, and power cuts."""
    any_process: bool = False
    """Every free process may serve a request, as if they were not alike; states of two worlds can then be compared."""


@dataclass(frozen=True)
class Rules:
    """Ways to break the node. All False is the node as it is."""

    grant_before_commit: bool = False
    difference_from_memory: bool = False
    numbers_from_memory: bool = False
    notified_only: bool = False
    reopens_on_timeout: bool = False
    answers_from_soft_rows: bool = False
    vouchers_in_soft_rows: bool = False
    grants_in_soft_rows: bool = False
    believes_new_blocks: bool = False
    books_by_hold: bool = False
    """The ledger finds a hold by its name without its channel."""
    one_stream_per_process: bool = False


SOUND: Final = Rules()


class World:
    """The steps of one channel; channels and their accounts are numbered."""

    def __init__(self, books: Books, bound: Bound, rules: Rules = SOUND) -> None:
        self.books = books
        self.bound = bound
        self.rules = rules
        self.channels: list[Channel] = []
        self.owners: list[int] = []
        """For each channel a bit for each process that has a request or a hold on it."""
        self._numbers: dict[Channel, int] = {}
        self._rests: dict[tuple[bool, int, int, int, Stream], Stream | int] = {}
        self._moves: dict[tuple[Processes, int], tuple[tuple[str, int], ...]] = {}

    def start(self) -> tuple[Processes, int]:
        """Two nodes are up, nobody has asked for anything."""
        b = self.bound
        account = self.books.open(b.deposit, b.accepted)
        escrow = Escrow(b.deposit, 0, False, 0, b.top_ups, 0)
        channel = Channel(account, account, escrow, None, (WAITING,) * len(b.kinds))
        return (FREE,) * b.processes, self._number(channel)

    # ------------------------------------------------------------------------------------------------- processes

    def process_moves(self, processes: Processes) -> Iterator[tuple[str, Processes, bool]]:
        """What happens to processes: (name, processes after it, whether one was killed)."""
        for p, state in enumerate(processes):
            if state in (UP, ZOMBIE):
                yield f"kill {p}", _with(processes, p, DEAD if state == UP else GONE), True
            if state in (UP, DEAD):
                yield f"lapse {p}", _with(processes, p, ZOMBIE if state == UP else GONE), False

    def known(self, processes: Processes, owners: int) -> Processes:
        """The processes after a step: whoever has something is up, whoever has nothing left is free."""
        return tuple((state or UP) if owners >> p & 1 else FREE for p, state in enumerate(processes))

    def without(self, processes: Processes, channel: int) -> int:
        """The channel after a process is gone: its requests end where they are."""
        now = self.channels[channel]
        return self._after(processes, now, now.account, firm=now.firm)

    def admits(self, name: str, before: int, after: int, other: int) -> bool:
        """Whether a step on one channel is possible in spite of another channel: always, when nothing is broken."""
        newcomers = self.owners[after] & ~self.owners[before]
        return not (self.rules.one_stream_per_process and newcomers & self.owners[other])

    def spilt(self, name: str, processes: Processes, other: int) -> int:
        """What a step on one channel does to another: nothing, when nothing is broken."""
        now = self.channels[other]
        if not self.rules.books_by_hold or not name.startswith("finish 0") or 0 not in self.books.views[now.account].holds:
            return other
        owner = self.books.views[now.account].holds[0].owner
        return self._after(processes, now, self.books.do(now.account, "release", owner).account)

    def moves(self, processes: Processes, channel: int) -> tuple[tuple[str, int], ...]:
        """Every step of the channel that is possible now, and where it leads. Raises ``Broken``."""
        found = self._moves.get((processes, channel))
        if found is None:
            found = self._moves[processes, channel] = tuple(self._steps(processes, self.channels[channel]))
            self._lively(processes, self.channels[channel], {name for name, _ in found})
        return found

    def _lively(self, processes: Processes, now: Channel, names: set[str]) -> None:
        """L1: whoever waits and has something to hear can hear it, without anybody else's help."""
        view = self.books.views[now.account]
        for i, s in enumerate(now.requests):
            waits = isinstance(s, Stream) and s.phase == STARVED and processes[s.owner] not in (DEAD, GONE)
            if waits and self._news(view, view.holds.get(i)) and f"look {i}" not in names:
                raise Broken(f"L1: request {i} waits, there is news, and nobody will wake it")

    def _steps(self, processes: Processes, now: Channel) -> Iterator[tuple[str, int]]:
        for i, request in enumerate(now.requests):
            if isinstance(request, Stream):
                yield from self._stream(processes, now, i, request)
        yield from self._admission(processes, now)
        yield from self._payer(processes, now)
        yield from self._sweep(processes, now)
        if self.bound.settles or self.bound.closes or self.bound.exits:
            yield from self._treasury(processes, now)
        if self.bound.relaxed and now.firm != now.account:
            yield "power cut", self._after(processes, now, now.firm)

    # --------------------------------------------------------------------------------------------------- requests

    def _stream(self, processes: Processes, now: Channel, i: int, s: Stream) -> Iterator[tuple[str, int]]:
        view = self.books.views[now.account]
        hold = view.holds.get(i)
        if s.phase == SENT:
            yield f"commit {i}", self._commit(processes, now, i, s)
        if processes[s.owner] in (DEAD, GONE):
            return
        if s.delivered < s.granted:
            yield f"deliver {i}", self._after(processes, now, now.account, i, s._replace(delivered=s.delivered + 1))
        if s.phase == ANSWERED:
            yield f"answer {i}", self._answer(processes, now, i, s)
            # The connection went with the answer: the store runs the step again.
            yield f"repeat {i}", self._after(processes, now, now.account, i, s._replace(phase=SENT, answer=0))
        if s.phase == STARVED and self._news(view, hold) and not self.rules.notified_only:
            yield f"look {i}", self._after(processes, now, now.account, i, s._replace(phase=IDLE))
        if s.phase in (IDLE, STARVED) and hold is not None:
            yield from self._own(processes, now, i, s, hold)

    def _own(self, processes: Processes, now: Channel, i: int, s: Stream, hold: Held) -> Iterator[tuple[str, int]]:
        if s.phase == IDLE and (s.delivered > hold.consumed or s.granted - s.delivered < self.bound.window):
            wish = s.delivered + self.bound.window
            granted = max(s.granted, wish) if self.rules.grant_before_commit else s.granted
            sent = s._replace(phase=SENT, sent=s.delivered, granted=granted)
            yield f"renew {i}", self._after(processes, now, now.account, i, sent)
        if self.bound.relaxed and s.delivered > hold.consumed:
            folded = self.books.do(now.account, "renew", i, s.delivered, s.delivered).account
            yield f"fold {i}", self._after(processes, now, folded, i, s, firm=now.firm)
        totals = {s.delivered}
        if self.bound.credit and s.delivered:
            totals.add(s.delivered - 1)
        if self.bound.overrun:
            totals.add(s.delivered + 1)
        for total in totals:
            done = self.books.do(now.account, "finish", i, total)
            if done.refused is None:
                yield f"finish {i} at {total}", self._after(processes, now, done.account, i, OVER)

    def _commit(self, processes: Processes, now: Channel, i: int, s: Stream) -> int:
        if self.rules.difference_from_memory:
            done = self.books.do(now.account, "recount", i, s.sent, s.sent + self.bound.window, s.recorded)
        else:
            done = self.books.do(now.account, "renew", i, s.sent, s.sent + self.bound.window)
        if done.refused is not None:
            return self._after(processes, now, now.account, i, s._replace(phase=IDLE, sent=0))
        unchanged = done.account == now.account
        firm = now.firm if self.rules.answers_from_soft_rows and unchanged else done.account
        self._shown(self.books.views[done.account].spent, firm)
        firm = now.firm if self.rules.grants_in_soft_rows else firm
        committed = s._replace(phase=ANSWERED, answer=done.granted)
        return self._after(processes, now, done.account, i, committed, firm=firm)

    def _answer(self, processes: Processes, now: Channel, i: int, s: Stream) -> int:
        view = self.books.views[now.account]
        starved = s.answer <= s.granted and not view.headroom
        if starved:  # what the payer is asked for now carries numbers
            memory = s.delivered - view.holds[i].consumed if i in view.holds else 0
            firm = self.books.views[now.firm].spent
            self._shown(firm + memory if self.rules.numbers_from_memory else firm, now.firm)
        phase = STARVED if starved else IDLE
        granted = max(s.granted, s.answer) if self.rules.grant_before_commit else s.answer
        recorded = s.sent if self.rules.difference_from_memory else 0
        answered = s._replace(phase=phase, granted=granted, sent=0, answer=0, recorded=recorded)
        return self._after(processes, now, now.account, i, answered)

    def _shown(self, spent: int, firm: int) -> None:
        if spent > self.books.views[firm].spent:
            raise Broken(f"I3: {spent} was shown as spent, and a power cut would take it back")

    def _news(self, view: View, hold: Held | None) -> bool:
        return hold is None or hold.ending or view.phase != "open" or view.headroom > 0

    def _admission(self, processes: Processes, now: Channel) -> Iterator[tuple[str, int]]:
        """The next request comes to any process; a stream asks the running one to end before it takes its place."""
        if WAITING not in now.requests:
            return
        i, a = now.requests.index(WAITING), now.account
        for p, state in enumerate(processes):
            if state in (DEAD, GONE) or (state == FREE and FREE in processes[:p] and not self.bound.any_process):
                continue
            kind = self.bound.kinds[i]
            opened = self.books.do(a, kind, i, p, self.bound.window)
            if opened.refused is None:
                yield f"{kind} {i} at {p}", self._after(processes, now, opened.account, i, Stream(p, opened.granted, 0))
            elif opened.refused is Reason.CHANNEL_BUSY:
                asked = self.books.do(a, "ask").account
                if asked != a:
                    yield "ask", self._after(processes, now, asked)
                    continue
                taken = self.books.do(a, "preempt", i, p, self.bound.window)
                if taken.refused is None:
                    yield f"preempt {i} at {p}", self._after(processes, now, taken.account, i, Stream(p, taken.granted, 0))

    def _sweep(self, processes: Processes, now: Channel) -> Iterator[tuple[str, int]]:
        owners = {hold.owner for hold in self.books.views[now.account].holds.values()}
        for owner in owners:
            if processes[owner] in (ZOMBIE, GONE):
                released = self.books.do(now.account, "release", owner).account
                yield f"release {owner}", self._after(processes, now, released)

    # ------------------------------------------------------------------------------------------ payer and chain

    def _payer(self, processes: Processes, now: Channel) -> Iterator[tuple[str, int]]:
        view, e = self.books.views[now.account], now.escrow
        most = min(view.accepted + self.bound.voucher_steps, e.deposit)
        for amount in range(view.accepted + 1, most + 1):
            took = self.books.do(now.account, "voucher", amount)
            if took.refused is None:
                firm = now.firm if self.rules.vouchers_in_soft_rows else None
                yield f"voucher {amount}", self._after(processes, now, took.account, firm=firm)
                if self.rules.notified_only:
                    yield f"voucher {amount}, told", self._after(processes, self._told(now), took.account)
        if now.intent is not None and now.intent.stage == MINED:
            return  # later blocks cannot come before it, and a replaced one takes them along
        if self.bound.exits and not e.closed:
            if not e.asked:
                yield "ask the chain", self._after(processes, now, now.account, escrow=e._replace(asked=True))
            else:
                left = e._replace(closed=1, payer=e.payer + e.deposit - e.settled)
                yield "withdraw", self._after(processes, now, now.account, escrow=left)
        if e.payer and not e.closed:
            more = e._replace(deposit=e.deposit + 1, payer=e.payer - 1, asked=False)
            yield "top up", self._after(processes, now, now.account, escrow=more)

    def _told(self, now: Channel) -> Channel:
        woken = (s._replace(phase=IDLE) if isinstance(s, Stream) and s.phase == STARVED else s for s in now.requests)
        return now._replace(requests=tuple(woken))

    def _treasury(self, processes: Processes, now: Channel) -> Iterator[tuple[str, int]]:
        a, e, view = now.account, now.escrow, self.books.views[now.account]
        there = (0, 0, False) if e.closed else (e.deposit, e.settled, e.asked)
        if there != view.facts and view.phase != "closed":
            yield "observe", self._after(processes, now, self._observed(now), firm=self._undone(now))
        if now.intent is not None:
            yield from self._intent(processes, now, now.intent)
        elif self.bound.settles and view.phase in ("open", "contested") and view.settleable > view.facts[1]:
            yield "settle", self._after(processes, now, a, intent=Intent(False, view.settleable))
        if not self.bound.closes:
            return
        if view.phase in ("open", "contested"):
            yield "close", self._after(processes, now, self.books.do(a, "close").account)
        elif view.phase == "closing":
            if view.holds:
                yield "fence all", self._after(processes, now, self.books.do(a, "release", EVERYBODY).account)
            fixed = self.books.do(a, "fix")
            if fixed.refused is None:
                yield "fix", self._after(processes, now, fixed.account)
        elif view.phase == "captured" and now.intent is None:
            yield "sign", self._after(processes, now, a, intent=Intent(True, view.capture))

    def _intent(self, processes: Processes, now: Channel, t: Intent) -> Iterator[tuple[str, int]]:
        a, e = now.account, now.escrow
        captured = self.books.views[a].phase == "captured"
        believed = FINAL if not self.rules.believes_new_blocks or t.stage != MINED else MINED
        if t.stage == SENT_OFF:
            fails = e.closed or t.amount < e.settled + (not t.close) or t.amount > self.books.views[a].accepted
            yield "include", self._after(processes, now, a, intent=t._replace(stage=REVERTED if fails else MINED))
            yield "expire", self._after(processes, now, a, intent=t._replace(stage=EXPIRED))
            if t.close and captured and self.rules.reopens_on_timeout:
                yield "time out", self._after(processes, now, self.books.do(a, "abort").account)
        elif t.stage == MINED:
            paid = e._replace(settled=t.amount, node=e.node + t.amount - e.settled)
            if t.close:
                paid = paid._replace(closed=2, payer=e.payer + e.deposit - t.amount)
            yield "finalise", self._after(processes, now, a, escrow=paid, intent=t._replace(stage=FINAL))
            yield "reorganise", self._after(processes, now, a, intent=t._replace(stage=SENT_OFF))
        if t.stage == believed and t.close:
            yield "confirm", self._after(processes, now, self.books.do(a, "confirm").account, intent=self._kept(t))
        elif t.stage in (FINAL, REVERTED, EXPIRED):
            yield "learn", self._after(processes, now, self._observed(now), firm=self._undone(now), intent=None)
            if t.close and captured and not e.closed:
                yield "abort", self._after(processes, now, self.books.do(a, "abort").account, intent=None)

    def _kept(self, t: Intent) -> Intent | None:
        return t if t.stage == MINED else None  # a believer does not make the block stay

    def _observed(self, now: Channel) -> int:
        """The account after a look at the chain. A look can be repeated, so a power cut may undo it."""
        e = now.escrow
        if self.books.views[now.account].phase == "closed":
            return now.account
        there = (0, 0, 0) if e.closed else (e.deposit, e.settled, int(e.asked))
        return self.books.do(now.account, "observe", *there).account

    def _undone(self, now: Channel) -> int | None:
        return now.firm if self.bound.relaxed else None

    # ------------------------------------------------------------------------------------------------ after a step

    def _after(
        self,
        processes: Processes,
        was: Channel,
        account: int,
        changed: int = -1,
        request: Stream | int = OVER,
        *,
        firm: int | None = None,
        escrow: Escrow | None = None,
        intent: Intent | None = SAME,
    ) -> int:
        """The channel after a step, judged and with everything forgotten that can no longer matter."""
        if firm is None:  # an ordinary commit lasts, and what is not in the ledger changes nothing in it
            firm = was.firm if account == was.account else account
        requests = list(was.requests)
        if changed >= 0:
            requests[changed] = request
        for i, s in enumerate(requests):
            if isinstance(s, Stream):
                question = (processes[s.owner] not in (DEAD, GONE), was.account, account, i, s)
                rest = self._rests.get(question)
                if rest is None:
                    rest = self._rests[question] = self._rest(*question)
                requests[i] = rest
        channel = Channel(
            account,
            firm,
            was.escrow if escrow is None else escrow,
            was.intent if intent is SAME else intent,
            tuple(requests),
        )
        return self._number(channel)

    def _rest(self, up: bool, was: int, account: int, i: int, s: Stream) -> Stream | int:
        """A request after a step from account ``was``, judged and without what cannot matter any more.

        That is the memory of the dead, and of those who have learnt that they were fenced.
        """
        before, now = self.books.views[was].holds.get(i), self.books.views[account].holds.get(i)
        if now is not None:
            s = s._replace(charged=-1)
        elif s.charged < 0:
            s = s._replace(charged=before.consumed if before is not None else 0)
        if not up:
            phase, sent = (SENT, s.sent) if s.phase == SENT else (IDLE, 0)
            s = s._replace(phase=phase, granted=s.delivered, answer=0, sent=sent)
        self._judge(account, i, s)
        if now is not None:
            return s
        if s.phase == SENT:  # refused, and if it is not the books say so
            if self.books.do(account, "renew", i, s.sent, s.sent + self.bound.window).refused is None:
                raise Broken(f"I6: request {i} renewed a hold that was taken from it")
            s = s._replace(phase=IDLE, sent=0)
        if s.phase == ANSWERED and s.answer <= s.granted:
            s = s._replace(phase=IDLE, sent=0, answer=0)
        if s.phase in (IDLE, STARVED) and (not up or s.delivered >= s.granted):
            return OVER
        return s

    def _judge(self, account: int, i: int, s: Stream) -> None:
        """I1, I3 and I5 for one request and the account it is charged to."""
        view = self.books.views[account]
        hold = view.holds.get(i)
        charged = s.charged if hold is None else hold.consumed
        if hold is not None and s.delivered > hold.granted:
            raise Broken(f"I1: request {i} delivered {s.delivered} under a durable hold of {hold.granted}")
        if charged > s.delivered:
            raise Broken(f"I3: request {i} was charged {charged} for {s.delivered}")
        if s.delivered - charged > self.bound.window:
            raise Broken(f"I5: request {i} delivered {s.delivered} for {charged}, more than a window")

    def _number(self, channel: Channel) -> int:
        number = self._numbers.get(channel)
        if number is None:
            self._balance(channel)
            number = self._numbers[channel] = len(self.channels)
            self.channels.append(channel)
            holders = [hold.owner for hold in self.books.views[channel.account].holds.values()]
            holders += [request.owner for request in channel.requests if isinstance(request, Stream)]
            self.owners.append(sum(1 << owner for owner in set(holders)))
        return number

    def _balance(self, now: Channel) -> None:
        """I4 and the conservation of money."""
        e, view = now.escrow, self.books.views[now.account]
        inside = 0 if e.closed else e.deposit - e.settled
        if e.payer + e.node + inside != self.bound.deposit + self.bound.top_ups or min(e) < 0:
            raise Broken(f"M1: money came from nowhere or went there: {e}")
        if self.books.views[now.firm].accepted < view.accepted:
            raise Broken(f"I7: a power cut would take back an accepted voucher of {view.accepted}")
        if e.node > view.final:
            raise Broken(f"I4: the chain has paid {e.node}, and {view.final} were consumed for good")
        if e.closed == 2 and e.node != view.final:
            raise Broken(f"I5: the channel was closed for {e.node}, and {view.final} were consumed")
        if view.phase == "closed" and not e.closed:
            raise Broken(f"I5: the books say that the channel is closed, the escrow does not: {e}")


def _with(processes: Processes, p: int, state: int) -> Processes:
    return (*processes[:p], state, *processes[p + 1 :])
