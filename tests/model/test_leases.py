"""Lives of nodes: who may be given up for dead, and when. The product's own ``Life`` and ``Sweeper``, driven step by step.

A lease is measured by two clocks that never meet. Here one clock stands for both, and every answer of the ledger may
come at once, late, after its effect only, or not at all, within the 5 s after which a store gives up. All sequences of
such answers are tried; in none may others release what a process still believes to hold.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mppnode.ledger.life
from channels.faults import ChannelFault, Reason
from channels.ids import ChannelId
from channels.model import Account, Finish, HoldId, NodeId, Plan
from channels.policy import Policy
from channels.store import Step
from channels.testing.memory_store import MemoryStore
from channels.units import Pico
from mppnode.kernel.clock import ManualClock
from mppnode.ledger.base import GRACE_S, LEASE_S, Which
from mppnode.ledger.books import Books
from tests.support.builders import CHANNEL, buffered, opening, reserve

SOURCE = Path(mppnode.ledger.life.__file__).read_text()
STORE_GIVES_UP_S = 5.0
BEATS = 4
"""From one answer on, a lease cannot live through more of them."""


def build(*change: str) -> ModuleType:
    """``mppnode/ledger/life.py`` from its source, with one replacement."""
    source = SOURCE
    if change:
        old, new = change
        assert old in source, "the mutant no longer applies: say it in today's words"
        source = source.replace(old, new, 1)
    module = ModuleType("mppnode.ledger.life_under_test")
    sys.modules[module.__name__] = module  # dataclasses look there while they are made
    try:
        exec(compile(source, "<life>", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def finished(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never really waits: time passes on the clock of the test."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("nothing here waits")


# ------------------------------------------------------------------------------------------------------------- leases


@dataclass(frozen=True)
class Answering:
    """How the ledger treats one request; seconds from when it was asked. ``acts`` None: never reached."""

    name: str
    acts: float | None
    answers: float
    fails: bool = False


ANSWERS = (
    Answering("at once", 0, 0),
    Answering("late answer", 0, STORE_GIVES_UP_S),
    Answering("late effect", STORE_GIVES_UP_S, STORE_GIVES_UP_S),
    Answering("answer lost", 0, STORE_GIVES_UP_S, fails=True),
    Answering("refused at once", None, 0, fails=True),
    Answering("refused late", None, STORE_GIVES_UP_S, fails=True),
)


class Desk:
    """The ledger's table of one life, whose others act as early as they may."""

    def __init__(self, clock: ManualClock, grace_s: float) -> None:
        self._clock = clock
        self._grace_s = grace_s
        self.lease_until = 0.0
        self.next = ANSWERS[0]

    @property
    def given_up_at(self) -> float:
        return self.lease_until + self._grace_s

    async def join(self, name: str) -> NodeId:
        self._ask(revive=True)
        return NodeId(name)

    async def beat(self, node: NodeId) -> bool:
        return self._ask(revive=False)

    def _ask(self, *, revive: bool) -> bool:
        asked, alive = self._clock.monotonic(), False
        if self.next.acts is not None:
            self._clock.advance(self.next.acts)
            alive = revive or self._clock.monotonic() < self.given_up_at
            if alive:
                self.lease_until = self._clock.monotonic() + LEASE_S
        self._clock.advance(asked + self.next.answers - self._clock.monotonic())
        if self.next.fails:
            raise ChannelFault(Reason.STORE_UNAVAILABLE)
        return alive


def believes_too_long(module: ModuleType, answers: Sequence[Answering], *, grace_s: float) -> bool:
    """Whether a process still believed in its life when others were free to release its holds."""
    clock, told = ManualClock(), list[float]()
    desk = Desk(clock, grace_s)
    life = module.Life(desk, "node", clock=clock, sleep=lambda _: None, on_lost=lambda _: told.append(clock.monotonic()))
    desk.next = answers[0] if not answers[0].fails else ANSWERS[0]  # a node that cannot join does not start
    finished(life.begin())
    for answer in answers[1:]:
        clock.advance(module.BEAT_S)
        given_up_at, desk.next = desk.given_up_at, answer
        finished(life.beat())
        if told:
            # While the answer was awaited it still believed, in the lease of the last beat that took effect.
            return told[0] >= max(given_up_at, desk.given_up_at if answer.acts is not None else 0)
    return clock.monotonic() >= desk.given_up_at


def some_sequence_fails(module: ModuleType, *, grace_s: float = GRACE_S) -> bool:
    sequences = itertools.product(ANSWERS, repeat=1 + BEATS)
    return any(believes_too_long(module, answers, grace_s=grace_s) for answers in sequences)


def test_nobody_is_given_up_while_it_believes_to_live() -> None:
    """However answers are delayed and lost, a process stops by itself before others may release its holds."""
    assert not some_sequence_fails(build())


# ------------------------------------------------------------------------------------------------------------- sweeps


class Room:
    """A shared ledger in memory that lets something else happen before any of its answers."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.lives = {NodeId("me"), NodeId("other")}
        self.happens: dict[int, Callable[[], None]] = {}
        self.asked = 0

    def _pause(self) -> None:
        happening = self.happens.pop(self.asked, None)
        self.asked += 1
        if happening is not None:
            happening()

    async def page(self, which: Which, *, after: ChannelId | None = None) -> list[Account]:
        assert which is Which.HELD
        self._pause()
        return [a for a in await self.store.accounts() if a.holds and (after is None or a.id > after)]

    async def living(self) -> frozenset[NodeId]:
        self._pause()
        return frozenset(self.lives)

    async def load(self, channel: ChannelId) -> Account | None:
        self._pause()
        return await self.store.load(channel)

    async def transact(self, channel: ChannelId, step: Step[Any], *, relaxed: bool = False) -> Plan[Any]:
        self._pause()
        return await self.store.transact(channel, step, relaxed=relaxed)


class Scene:
    """A channel with a dead node's request, one of another node, and two of ours; we sweep."""

    def __init__(self, module: ModuleType) -> None:
        self.room = Room()
        self.clock = ManualClock()
        self.books = Books(self.room.store, clock=self.clock, policy=Policy())
        self.ours = {HoldId("mine")}
        self.apply(opening(900))
        self.apply(reserve(10, hold="orphan", ticket="orphan", owner="dead"))
        for name, owner in (("theirs", "other"), ("mine", "me"), ("lost", "me")):
            self.apply(buffered(10, hold=name, ticket=name, owner=owner))
        life = module.Life(self.room, "me", clock=self.clock, sleep=None, on_lost=None)
        life.id = NodeId("me")
        swept = Books(self.room, clock=self.clock, policy=Policy())  # type: ignore[arg-type]
        self.sweeper = module.Sweeper(self.room, swept, life, ours=self.ours.__contains__)

    def apply(self, command: Any) -> None:
        finished(self.books.apply(CHANNEL, command))

    @property
    def holds(self) -> set[str]:
        account = finished(self.room.store.load(CHANNEL))
        return set(account.holds)

    def newcomer(self) -> None:
        """A process starts elsewhere and serves its first request."""
        self.room.lives.add(NodeId("newcomer"))
        self.apply(buffered(10, hold="new", ticket="new", owner="newcomer"))

    def request(self) -> None:
        """We serve another request: known here before it is known to the ledger."""
        self.ours.add(HoldId("next"))
        self.apply(buffered(10, hold="next", ticket="next", owner="me"))

    def finish(self) -> None:
        """A request of ours ends: its bill is settled before it is forgotten here."""
        self.apply(Finish(HoldId("mine"), Pico(3)))
        self.ours.remove(HoldId("mine"))

    def forget(self) -> None:
        """A request of ours is forgotten while a sweep has read its hold, just before its bill is settled."""
        self.ours.remove(HoldId("mine"))
        self.room.happens[self.room.asked + 1] = partial(self.apply, Finish(HoldId("mine"), Pico(3)))


HAPPENINGS: dict[str, tuple[Callable[[Scene], None], set[str]]] = {
    "newcomer": (Scene.newcomer, {"theirs", "mine", "new"}),
    "request": (Scene.request, {"theirs", "mine", "next"}),
    "finish": (Scene.finish, {"theirs"}),
}


def sweeps_badly(module: ModuleType) -> bool:
    """Whether two sweeps release what lives, or leave what is dead, whatever happens at any moment in between."""
    for happening, expected in HAPPENINGS.values():
        for moment in range(12):
            scene = Scene(module)
            scene.room.happens[moment] = partial(happening, scene)
            finished(scene.sweeper.sweep())
            if moment in scene.room.happens:
                break  # a sweep asks less than that
            if "lost" not in scene.holds:
                return True  # at first sight: its bill might have been on its way
            finished(scene.sweeper.sweep())
            if scene.holds != expected:
                return True
    return False


def test_a_sweep_releases_the_dead_and_nobody_else() -> None:
    """Newcomers, new requests and ending ones are safe at whatever moment of a sweep they come."""
    assert not sweeps_badly(build())


def test_a_sweep_counts_what_it_released() -> None:
    """The dead node's hold at once; ours that nobody knows at the second look, and charged what was recorded."""
    scene = Scene(build())
    assert finished(scene.sweeper.sweep()) == 1
    assert finished(scene.sweeper.sweep()) == 1
    assert scene.holds == {"theirs", "mine"}
    assert finished(scene.room.store.load(CHANNEL)).owed_pico == 0


# ------------------------------------------------------------------------------------------------------------ mutants

PAGE_THEN_LIVES = """        while page := await self._ledger.page(Which.HELD, after=after):
            after = page[-1].id
            living = await self._ledger.living()
"""
LIVES_THEN_PAGE = """        living = await self._ledger.living()
        while page := await self._ledger.page(Which.HELD, after=after):
            after = page[-1].id
"""
MUTANTS: dict[str, Callable[[], bool]] = {
    "lease measured from reply instead of request": lambda: some_sequence_fails(
        build("alive = await self._ledger.beat(self.id)", "alive = await self._ledger.beat(self.id); asked = self._clock.monotonic()")
    ),
    "first lease measured from reply instead of request": lambda: some_sequence_fails(
        build("self.id = await self._ledger.join(self._name)", "self.id = await self._ledger.join(self._name); asked = self._clock.monotonic()")
    ),
    "reaper without grace": lambda: some_sequence_fails(build(), grace_s=0),
    "no safety margin": lambda: some_sequence_fails(build("asked + LEASE_S - SAFETY_S, False\n        elif", "asked + LEASE_S, False\n        elif")),
    "a node waits to be told": lambda: some_sequence_fails(build("elif self._clock.monotonic() >= self._until:", "elif False:")),
    "lives listed before the holds": lambda: sweeps_badly(build(PAGE_THEN_LIVES, LIVES_THEN_PAGE)),
    "holds of ours released at first sight": lambda: sweeps_badly(build("if name in self._doubtful:", "if True:")),
    "the dead are left alone": lambda: sweeps_badly(build("if owner not in living:", "if False:")),
    "strangers are swept": lambda: sweeps_badly(build("if owner not in living:", "if owner != self._life.id:")),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_dies(name: str) -> None:
    """Some sequence of answers, or something that happens in between, brings it to light."""
    assert MUTANTS[name]()
