"""One channel alone, and two channels served by the same processes: the steps of both, for the search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product

import channels.account
import channels.model
from tests.model.books import Books
from tests.model.search import Explored, explore
from tests.model.world import FREE, SOUND, Bound, Processes, Rules, World

Solo = tuple[Processes, int]
Pair = tuple[Processes, int, int]


def sound(bound: Bound, rules: Rules = SOUND) -> World:
    """A world over the account machine as it is."""
    return World(Books(channels.model, channels.account), bound, rules)


class Roster:
    """Which processes are known, by what the channels say; computed once for each different question."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: dict[tuple[Processes, int], Processes] = {}

    def __call__(self, processes: Processes, *channels: int) -> Processes:
        owners = 0
        for channel in channels:
            owners |= self._world.owners[channel]
        key = (processes, owners)
        if (known := self._known.get(key)) is None:
            known = self._known[key] = self._world.known(processes, owners)
        return known


def alone(world: World, *, states_max: int = 10**7) -> Explored[Solo]:
    """Visit one channel with all its processes."""
    known = Roster(world)

    def moves(state: Solo) -> Iterator[tuple[str, Solo]]:
        processes, channel = state
        for name, after in world.moves(processes, channel):
            yield name, (known(processes, after), after)
        for name, left, killed in world.process_moves(processes):
            after = world.without(left, channel) if killed else channel
            yield name, (known(left, after), after)

    return explore(world.start(), moves, states_max=states_max)


def together(world: World, *, states_max: int = 10**7) -> Explored[Pair]:
    """Visit two channels with the processes that serve both."""
    known = Roster(world)
    processes, channel = world.start()

    def moves(state: Pair) -> Iterator[tuple[str, Pair]]:
        processes, one, two = state
        for name, after in world.moves(processes, one):
            if world.admits(name, one, after, two):
                other = world.spilt(name, processes, two)
                yield f"1: {name}", (known(processes, after, other), after, other)
        for name, after in world.moves(processes, two):
            if world.admits(name, two, after, one):
                other = world.spilt(name, processes, one)
                yield f"2: {name}", (known(processes, after, other), other, after)
        for name, left, killed in world.process_moves(processes):
            pair = (world.without(left, one), world.without(left, two)) if killed else (one, two)
            yield name, (known(left, *pair), *pair)

    return explore((processes, channel, channel), moves, states_max=states_max)


def independent(world: World, pair: Explored[Pair], solo: Explored[Solo]) -> bool:
    """Whether two channels together are exactly all combinations of one channel and another.

    Nothing new: each channel of a pair is as it could be alone. Nothing missing: any two states of a channel that agree
    about the processes they both know occur together, and their number is counted.
    """
    known = Roster(world)
    for processes, *both in pair.states:
        if any((known(processes, channel), channel) not in solo.states for channel in both):
            return False
    crowd = Counter(processes for processes, _ in solo.states)
    combinations = sum(crowd[a] * crowd[b] for a, b in product(crowd, repeat=2) if _agree(a, b))
    return len(pair.states) == combinations


def _agree(a: Processes, b: Processes) -> bool:
    return all(one == other or FREE in (one, other) for one, other in zip(a, b, strict=True))
