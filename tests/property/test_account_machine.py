"""The account machine against books kept by somebody else, in memory and on disk, through crashes.

Three implementations run in step: the pure ``plan``, the memory store and SQLite; the auditor decides before each
command what must happen. ``--hypothesis-profile=deep`` runs it for longer.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from functools import reduce
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from channels import model as m
from channels.account import check, fold, plan
from channels.descriptor import ChainSnapshot
from channels.faults import ChannelFault
from channels.ids import ChannelId, Hash32
from channels.instants import UnixSeconds
from channels.policy import Policy
from channels.testing.memory_store import MemoryStore
from channels.units import Pico, Units
from mppnode.kernel.clock import ManualClock
from mppnode.ledger.books import Books
from mppnode.ledger.sqlite import SqliteStore
from tests.support.auditor import PICO, Auditor, Facts, Limits, Verdict
from tests.support.builders import TX, V1, V2, descriptor, voucher

LIMITS = Limits(deposit_min=10, delta_min=3, holds_max=2, tickets_max=4, unsettled_max=150)
POLICY = Policy(
    deposit_units_min=Units(LIMITS.deposit_min),
    voucher_delta_units_min=Units(LIMITS.delta_min),
    ladder_max=40,  # thinning has tests of its own; here every rung must be there to be judged
    holds_max=LIMITS.holds_max,
    tickets_max=LIMITS.tickets_max,
    unsettled_units_max=Units(LIMITS.unsettled_max),
)
IDS = tuple(ChannelId(bytes([n]) * 32) for n in (3, 1, 2))
ESCROWS = (V2, V1, V2)
CHANNELS = range(len(IDS))
WHICH = st.sampled_from([0, 0, 0, 1, 1, 1, 2])
NAMES = st.sampled_from("abc")
OWNERS = st.sampled_from(["life-1", "life-1", "life-2"])
PARTS = st.integers(0, 8)
STRANGER = st.sampled_from([False] * 7 + [True])
UNITS = st.integers(0, 60)

QUICK = settings(max_examples=100, stateful_step_count=50, deadline=None)


class Ledger(RuleBasedStateMachine):
    """Three channels, over both escrows, under everything a payer, a chain, a node and a power switch can do."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        self.generation = 0
        self.clock = ManualClock()
        self.memory = Books(MemoryStore(), clock=self.clock, policy=POLICY)
        self.audits = [Auditor(LIMITS, pays_whole_vouchers=escrow is V1) for escrow in ESCROWS]
        self.pure: list[m.Account | None] = [None] * len(IDS)
        self.heard: list[m.Account] = []
        self.last: tuple[int, m.Command] | None = None
        self.shown: list[tuple[int, ...]] = [(0, 0, 0, 0)] * len(IDS)
        self.cashed = [0] * len(IDS)
        self.tickets = 0
        self.fatal: list[BaseException] = []
        self.store = self.start_store(self.folder / "0.sqlite")

    def start_store(self, path: Path) -> SqliteStore:
        store = SqliteStore(path, clock=self.clock, on_fatal=self.fatal.append)
        store.subscribe(self.heard.append)
        self.runner.run(store.start())
        self.disk = Books(store, clock=self.clock, policy=POLICY)
        return store

    def teardown(self) -> None:
        self.runner.run(self.store.stop())
        self.runner.close()
        shutil.rmtree(self.folder)
        assert self.fatal == []

    def prefer(self, which: int, *phases: str) -> int:
        """A channel in one of these phases where there is one: most runs should get somewhere."""
        return next((n for n in CHANNELS if self.audits[n].phase in phases), which)

    def some_live(self, which: int, name: str) -> tuple[int, str]:
        """A live request where there is one, of ``which`` first."""
        for n in (which, *CHANNELS):
            if self.audits[n].live and self.audits[n].phase != "captured":
                return n, name if name in self.audits[n].live else min(self.audits[n].live)
        return which, name

    # --- running one command on all three

    def run(self, which: int, command: m.Command, expected: Verdict) -> m.Plan[m.Outcome] | None:
        before = self.pure[which]
        if expected.reason is not None:
            journal = self.runner.run(self.disk.journal(IDS[which]))
            for attempt in self.attempts(which, command):
                assert isinstance(attempt, ChannelFault), f"{command} was allowed, not refused with {expected.reason}"
                assert attempt.reason is expected.reason
            assert self.runner.run(self.disk.journal(IDS[which])) == journal, "I8: a refusal leaves no trace"
            assert self.runner.run(self.disk.load(IDS[which])) == before
            return None
        made = self.attempts(which, command)
        for attempt in made:
            assert not isinstance(attempt, ChannelFault), f"{command} was refused: {attempt!r}"
            assert attempt == made[0], "the three agree"
        done: m.Plan[m.Outcome] = made[0]
        answer = done.result
        assert (answer.replayed, answer.granted, answer.unpaid) == (expected.replayed, expected.granted_pico, expected.unpaid_pico)
        assert (done.events == ()) == expected.replayed
        self.pure[which], self.last = done.account, (which, command)
        relaxed = isinstance(command, m.ObserveChain) or (isinstance(command, m.Renew) and command.want <= command.consumed)
        if done.events and not relaxed:
            assert self.heard[-1] == done.account, "the subscriber heard it before the asker"
        return done

    def attempts(self, which: int, command: m.Command) -> list[Any]:
        now = self.clock.now()
        made: list[Any] = []
        for attempt in (
            lambda: plan(self.pure[which], command, now=now, policy=POLICY),
            lambda: self.runner.run(self.memory.apply(IDS[which], command)),
            lambda: self.runner.run(self.disk.apply(IDS[which], command)),
        ):
            try:
                made.append(attempt())
            except ChannelFault as fault:
                made.append(fault)
        return made

    # --- the payer

    @initialize(deposit=st.integers(60, 300), part=st.integers(2, 8))
    def first(self, deposit: int, part: int) -> None:
        for which in CHANNELS[:2]:
            self.opens(which, deposit * part // 8, Facts(deposit, 0, None, 1))

    @rule(which=WHICH, cumulative=UNITS, deposit=st.integers(0, 90), settled=st.sampled_from([0, 0, 9]), asked=st.sampled_from([None, None, 5]))
    def opening(self, which: int, cumulative: int, deposit: int, settled: int, asked: int | None) -> None:
        which = self.prefer(which, "none")
        self.opens(which, cumulative, Facts(deposit, min(settled, deposit), asked, 1))

    def opens(self, which: int, cumulative: int, facts: Facts) -> None:
        command = m.Open(IDS[which], ESCROWS[which], descriptor(which + 1), snapshot(facts), voucher(cumulative))
        self.run(which, command, self.audits[which].open(cumulative, facts))

    @rule(which=WHICH, kind=st.sampled_from(["fresh"] * 5 + ["equal", "lower", "small", "over"]), more=st.integers(3, 40))
    def voucher(self, which: int, kind: str, more: int) -> None:
        audit = self.audits[which]
        accepted = audit.accepted if audit.vouchers else 0
        amount = {
            "fresh": accepted + more,
            "equal": accepted,
            "lower": max(accepted - more, 0),
            "small": accepted + 2,
            "over": audit.chain.deposit + more,
        }[kind]
        self.run(which, m.AcceptVoucher(voucher(amount)), audit.voucher(amount))

    @rule(which=WHICH, credential=st.integers(0, 40), more=st.integers(1, 200), late=st.booleans())
    def top_up(self, which: int, credential: int, more: int, late: bool) -> None:
        audit, name = self.audits[which], Hash32(credential.to_bytes(32, "big"))
        facts = Facts(audit.chain.deposit + more, audit.chain.settled, None, audit.chain.block + (-1 if late else 1))
        self.run(which, m.RecordTopUp(name, TX, snapshot(facts)), audit.top_up(name, facts))

    # --- requests

    @rule(
        which=WHICH,
        name=NAMES,
        floor=PARTS,
        want=PARTS,
        preempt=st.booleans(),
        again=st.sampled_from([False] * 6 + [True]),
        ttl=st.integers(-1, 90),
        owner=OWNERS,
        stream=st.booleans(),
    )
    def reserve(
        self, *, which: int, name: str, floor: int, want: int, preempt: bool, again: bool, ttl: int, owner: str, stream: bool
    ) -> None:
        audit, now = self.audits[which], self.clock.now()
        if not again:
            self.tickets += 1
        ticket, expires = f"t{self.tickets}", UnixSeconds(now + ttl)
        whole = max(audit.free_pico, 0) if audit.vouchers else PICO
        least = {7: whole, 8: whole + 1}.get(floor, whole * floor // 40) or 1  # a fit, a pico too much, or some part
        most = max(least, whole * want // 7)
        verdict = audit.reserve(name, ticket, expires, least, most, preempt=preempt, now=now, owner=owner, stream=stream)
        asked = m.Reserve(m.HoldId(name), ticket, expires, Pico(least), Pico(most), preempt, m.NodeId(owner), stream)
        self.run(which, asked, verdict)

    @rule(which=WHICH, name=NAMES, part=PARTS, want=st.integers(0, 40 * PICO), stranger=STRANGER)
    def renew(self, which: int, name: str, part: int, want: int, stranger: bool) -> None:
        which, name = (which, name) if stranger else self.some_live(which, name)
        audit = self.audits[which]
        live = audit.live.get(name)
        consumed = 0 if live is None else live.charged_pico + live.rest_pico * part // 8
        target = consumed + want
        self.run(which, m.Renew(m.HoldId(name), Pico(consumed), Pico(target)), audit.renew(name, consumed, target))

    @rule(which=WHICH, name=NAMES, part=st.sampled_from([0, 2, 5, 7, 8, 8, 9, 30]), stranger=STRANGER)
    def finish(self, which: int, name: str, part: int, stranger: bool) -> None:
        which, name = (which, name) if stranger else self.some_live(which, name)
        audit = self.audits[which]
        live = audit.live.get(name)
        total = 0 if live is None else live.granted_pico * part // 8 + part  # from credit to beyond the hold
        self.run(which, m.Finish(m.HoldId(name), Pico(total)), audit.finish(name, total))

    @rule(which=st.sampled_from(CHANNELS), name=NAMES, used=st.integers(1, 8), final=st.integers(0, 12))
    def serve(self, which: int, name: str, used: int, final: int) -> None:
        """A request from its first token to its usage report, which says less, the same or more than was counted."""
        which = which if self.audits[which].phase == "open" else self.prefer(which, "open")
        self.reserve(which=which, name=name, floor=0, want=5, preempt=True, again=False, ttl=9, owner="life-1", stream=True)
        self.renew(which=which, name=name, part=used, want=0, stranger=True)
        live = self.audits[which].live.get(name)
        total = 0 if live is None else live.charged_pico * final // 8
        self.run(which, m.Finish(m.HoldId(name), Pico(total)), self.audits[which].finish(name, total))

    @rule(which=WHICH)
    def ask_streams(self, which: int) -> None:
        which = next((n for n in CHANNELS if self.audits[n].live), which)
        self.run(which, m.EndStreams(), self.audits[which].ask_streams())

    # --- the world

    @rule(which=WHICH, lag=st.integers(0, 2))
    def settle(self, which: int, lag: int) -> None:
        """A settlement of ours lands: the chain pays what was cashable when it was planned, now or a little later."""
        audit = self.audits[which]
        if audit.phase not in ("open", "contested"):
            return
        account = self.pure[which]
        assert account is not None
        amount = self.cashed[which] = max(int(account.settleable), self.cashed[which])
        assert amount <= max(audit.certain, audit.chain.settled), "I4: more than was consumed for good"
        for n in range(lag):  # the stream goes on meanwhile, and may end with a credit
            self.serve(which=which, name="c", used=8, final=n)
        if audit.phase in ("open", "contested"):
            seen = audit.chain
            facts = Facts(seen.deposit, amount, seen.asked_at, seen.block + 1)
            self.run(which, m.ObserveChain(snapshot(facts)), audit.observe(facts))
            assert audit.phase != "suspect", "a settlement of ours contradicts nothing"

    @rule(
        which=WHICH,
        deposit=st.sampled_from([0] * 6 + [-90, 5, 30, None]),
        settled=st.sampled_from([0] * 6 + [3, None]),
        asked=st.sampled_from([None, None, None, 5, 9]),
        blocks=st.sampled_from([-1, 0, 1, 1, 1]),
    )
    def observe(self, which: int, deposit: int | None, settled: int | None, asked: int | None, blocks: int) -> None:
        audit = self.audits[which]
        seen = audit.chain
        there = 0 if deposit is None else max(seen.deposit + deposit, 1)
        paid = audit.shown if settled is None else seen.settled + settled
        facts = Facts(there, min(paid, there), asked, max(seen.block + blocks, 0))
        self.run(which, m.ObserveChain(snapshot(facts)), audit.observe(facts))

    @rule(seconds=st.integers(0, 60))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule(which=WHICH, owner=OWNERS, everybody=st.booleans())
    def orphans(self, which: int, owner: str, everybody: bool) -> None:
        whose = None if everybody else m.NodeId(owner)
        self.run(which, m.ReleaseOrphans(whose), self.audits[which].orphans(whose))

    @rule(
        which=WHICH,
        deposit=st.sampled_from([0, 0, 0, 40, -40, None]),
        settled=st.sampled_from([0, 0, 1, 7]),
        asked=st.sampled_from([None, None, 5]),
        blocks=st.sampled_from([-1, 0, 1, 1]),
        vouchers=st.lists(st.integers(-9, 40), max_size=3),
    )
    def restore(
        self, *, which: int, deposit: int | None, settled: int, asked: int | None, blocks: int, vouchers: list[int]
    ) -> None:
        audit = self.audits[which]
        seen, accepted = audit.chain, audit.accepted if audit.vouchers else 0
        there = 0 if deposit is None else max(seen.deposit + deposit, 1)
        facts = Facts(there, min(max(seen.settled, audit.shown) + settled, there), asked, max(seen.block + blocks, 0))
        kept = [max(accepted + more, 0) for more in vouchers]
        command = m.Restore(snapshot(facts), tuple(voucher(amount) for amount in kept))
        if self.run(which, command, audit.restore(facts, kept)) is not None and audit.phase != "closed":
            # The one way a voucher goes: people have looked, and the deposit that covered it is not there.
            best, *others = self.shown[which]
            self.shown[which] = (best if best <= facts.deposit else audit.accepted, *others)

    @rule()
    def crash(self) -> None:
        """Copy the files as they are under a running store, which is what a killed process leaves, and start from there."""
        old, self.generation = self.folder / f"{self.generation}.sqlite", self.generation + 1
        new = self.folder / f"{self.generation}.sqlite"
        for suffix in ("", "-wal"):
            if (source := Path(f"{old}{suffix}")).exists():
                shutil.copy(source, f"{new}{suffix}")
        self.runner.run(self.store.stop())
        self.store = self.start_store(new)
        for which in CHANNELS:
            assert self.runner.run(self.disk.load(IDS[which])) == self.pure[which], "what was answered is on disk"
        self.recover()

    def recover(self) -> None:
        """What the first sweep after a restart does: both lives are over, so every hold goes."""
        for which, audit in enumerate(self.audits):
            for owner in sorted({request.owner for request in audit.live.values()}):
                self.run(which, m.ReleaseOrphans(m.NodeId(owner)), audit.orphans(owner))

    # --- the end

    @rule(which=WHICH, challenge=st.sampled_from("xyz"), kind=st.sampled_from(["node", "exact", "accepted", "low", "between", "over"]))
    def begin_close(self, which: int, challenge: str, kind: str) -> None:
        audit = self.audits[which]
        accepted = audit.accepted if audit.vouchers else 0
        amount = {
            "node": None,
            "exact": audit.shown,
            "accepted": accepted,
            "low": max(audit.shown - 1, 0),
            "between": (audit.shown + accepted) // 2,
            "over": audit.chain.deposit + 1,
        }[kind]
        command = m.BeginClose(challenge, None if amount is None else voucher(amount))
        self.run(which, command, audit.begin_close(challenge, amount))

    @rule(which=WHICH, stranger=STRANGER)
    def fix_capture(self, which: int, stranger: bool) -> None:
        which = which if stranger else self.prefer(which, "closing")
        self.run(which, m.FixCapture(), self.audits[which].fix_capture())

    @rule(which=WHICH, stranger=STRANGER)
    def abort_close(self, which: int, stranger: bool) -> None:
        which = which if stranger else self.prefer(which, "captured", "closing")
        self.run(which, m.AbortClose(), self.audits[which].abort_close())

    @precondition(lambda self: any(audit.phase != "open" for audit in self.audits))
    @rule(which=WHICH, stranger=STRANGER, other=STRANGER)
    def confirm(self, which: int, stranger: bool, other: bool) -> None:
        which = which if stranger else self.prefer(which, "captured", "closed")
        audit, tx_hash = self.audits[which], Hash32(b"\x0d" * 32) if other else TX
        facts = Facts(0, 0, None, audit.chain.block + 1)
        if audit.phase == "captured":
            self.the_escrow_would_pay(which)
        self.run(which, m.ConfirmClosed(tx_hash, snapshot(facts)), audit.confirm_closed(tx_hash, facts))

    def the_escrow_would_pay(self, which: int) -> None:
        """I5: what we sign does not revert, takes no more than was consumed, and the rest goes back."""
        account, audit = self.pure[which], self.audits[which]
        assert account is not None
        assert account.close is not None
        capture = account.close.capture
        assert capture is not None
        assert capture == audit.capture
        assert audit.chain.settled <= capture <= min(account.accepted, audit.chain.deposit)
        assert capture <= max(audit.owed_pico // PICO, audit.chain.settled), "never more than was consumed"
        if account.escrow is V1 and capture > audit.chain.settled:
            assert voucher(capture) in account.ladder, "v1 pays a voucher we hold, in full"

    @precondition(lambda self: self.last is not None)
    @rule()
    def repeat(self) -> None:
        """I4: the last command once more never charges twice; where it is a repeat by nature the answer says so."""
        assert self.last is not None
        which, command = self.last
        account = self.pure[which]
        repeatable = (
            m.Open
            | m.AcceptVoucher
            | m.RecordTopUp
            | m.Reserve
            | m.Renew
            | m.EndStreams
            | m.ReleaseOrphans
            | m.ObserveChain
            | m.BeginClose
            | m.FixCapture
        )
        if not isinstance(command, repeatable) or account is None or account.phase not in (m.Phase.OPEN, m.Phase.CLOSING):
            return
        for attempt in self.attempts(which, command):
            if isinstance(attempt, ChannelFault):
                continue  # the world has moved on since
            assert attempt.result.replayed or not isinstance(command, m.Open | m.Reserve | m.FixCapture | m.BeginClose)
            assert attempt.account.owed_pico == account.owed_pico
        self.settle_repeat(which)

    def settle_repeat(self, which: int) -> None:
        now = [self.runner.run(books.load(IDS[which])) for books in (self.memory, self.disk)]
        assert now[0] == now[1] == self.pure[which], "I4: a repeat changed something"

    # --- always

    @invariant()
    def the_books_agree(self) -> None:
        for which, (account, audit) in enumerate(zip(self.pure, self.audits, strict=True)):
            if account is None:
                assert audit.phase == "none"
                continue
            check(account)
            assert account.phase.value == audit.phase
            assert (account.accepted, account.owed_pico, account.spent) == (audit.accepted, audit.owed_pico, audit.shown)
            assert {k: (h.granted, h.consumed, h.owner, h.stream, h.ending) for k, h in account.holds.items()} == {
                k: (r.granted_pico, r.charged_pico, r.owner, r.stream, r.asked) for k, r in audit.live.items()
            }
            assert (account.final, account.settleable, account.active_at) == (audit.certain, audit.cashable, audit.used_at)
            assert account.unsettled == max(account.capturable - audit.chain.settled, 0)
            assert dict(account.tickets) == audit.tickets
            assert account.chain == snapshot(audit.chain)
            assert account.headroom_pico == audit.free_pico
            self.the_laws_hold(which, account)

    def the_laws_hold(self, which: int, account: m.Account) -> None:
        if account.phase not in (m.Phase.CLOSED, m.Phase.SUSPECT):
            assert account.accepted <= account.chain.deposit, "I1"
        assert account.headroom_pico >= 0, "I1"
        assert account.capturable <= max(account.owed_pico // PICO, account.chain.settled), "I5"
        assert len(account.streams) <= 1, "one stream at a time"
        assert self.cashed[which] <= max(account.final, account.chain.settled), "I4: paid out and not consumed for good"
        assert account.capturable >= self.cashed[which] or account.phase is m.Phase.CLOSED, "a close never goes back"
        shown = (account.accepted, account.spent, account.version, account.final)
        assert all(now >= was for now, was in zip(shown, self.shown[which], strict=True)), "I2: a number shown has fallen"
        self.shown[which] = shown
        if account.phase is m.Phase.CLOSED:
            assert not account.holds

    @invariant()
    def the_journal_is_the_account(self) -> None:
        for which, account in enumerate(self.pure):
            journals = [self.runner.run(books.journal(IDS[which])) for books in (self.memory, self.disk)]
            assert journals[0] == journals[1], "I7: events survive the disk"
            assert reduce(fold, journals[1], None) == account, "I3"
            if account is not None:
                assert account.version == len(journals[1])


def snapshot(facts: Facts) -> ChainSnapshot:
    asked = None if facts.asked_at is None else UnixSeconds(facts.asked_at)
    return ChainSnapshot(Units(facts.deposit), Units(facts.settled), asked, facts.block)


TestLedger = Ledger.TestCase
TestLedger.settings = settings() if settings.get_current_profile_name() == "deep" else QUICK
