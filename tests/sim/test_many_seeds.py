"""Hostile payers, bad weather and dying processes against the real treasury, one world per seed.

``SIM_SEEDS=1000`` is the long profile, ``SIM_SEED=n`` replays one seed and tells its story when it fails. What is
checked is in ``oracle.py``; the rule of when nothing may be lost is the docstring of ``Oracle._chance``.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.sim.world import play

ONE = os.environ.get("SIM_SEED")
SEEDS = int(os.environ.get("SIM_SEEDS", "60"))
CHUNKS = 4


def chunk(number: int) -> range:
    return range(int(ONE), int(ONE) + 1) if ONE else range(number, SEEDS, CHUNKS)


@pytest.mark.parametrize("number", range(1 if ONE else CHUNKS))
def test_no_payer_takes_what_was_consumed_and_none_pays_for_more(number: int) -> None:
    """Nothing is captured that was not used up for good, nothing is lost that could be saved, and everything ends."""
    seen: Counter[str] = Counter()
    for seed in chunk(number):
        tally = play(seed, tell=ONE is not None)
        seen.update(moved=tally.settled + tally.closed, reverted=tally.reverted, flaps=tally.flaps)
        seen.update(withdrawn=tally.withdrawn, kills=tally.kills)
    assert seen["reverted"] <= 1 + seen["moved"] // 1000, f"too many fees were wasted: {seen}"
    if not ONE:
        # A simulation in which nothing happens proves nothing.
        assert min(seen["moved"], seen["flaps"], seen["withdrawn"], seen["kills"]) > 0, seen
