"""Breadth-first search through every state that can be reached, and the shortest way to a broken law."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tests.model.books import Broken

S = TypeVar("S", bound=Hashable)
Moves = Callable[[S], Iterable[tuple[str, S]]]


@dataclass(frozen=True)
class Explored(Generic[S]):
    """What a search has seen. ``emptied`` says that nothing within the bound is left unseen."""

    states: frozenset[S] | dict[S, S | None]
    transitions: int
    depth: int
    emptied: bool


def explore(start: S, moves: Moves[S], *, states_max: int) -> Explored[S]:
    """Visit everything reachable from ``start``; ``moves`` raises ``Broken`` on a step that breaks a law.

    Raises:
        Broken: with the names of the steps that lead there, the fewest that do.
    """
    seen: dict[S, S | None] = {start: None}
    frontier, transitions, depth = [start], 0, 0
    while frontier and len(seen) <= states_max:
        following: list[S] = []
        for state in frontier:
            try:
                for _, target in moves(state):
                    transitions += 1
                    if target not in seen:
                        seen[target] = state
                        following.append(target)
            except Broken as broken:
                raise Broken(f"{broken}\n  after: {' > '.join(_way(seen, state, moves)) or 'nothing'}") from broken
        frontier = following
        depth += 1
    return Explored(seen, transitions, depth, emptied=not frontier)


def _way(seen: dict[S, S | None], state: S, moves: Moves[S]) -> list[str]:
    names: list[str] = []
    while (parent := seen[state]) is not None:
        names.append(next(name for name, target in moves(parent) if target == state))
        state = parent
    return names[::-1]
