"""The ways a ledger shared by several nodes goes wrong, each with the law that catches it.

A mutant is a replacement in the source of the account machine, or one switch in the node around it. It is searched until
a law breaks; the machine's own alarms are off, so it must be noticed by what it does. The mutants of a shared ledger that
are not about interleaving die elsewhere: the last table says where, by name.
"""

from __future__ import annotations

import pytest

from tests.model.books import Books, Broken
from tests.model.runs import alone, independent, sound, together
from tests.model.test_channel import PAIRS
from tests.model.test_leases import MUTANTS as LEASE_MUTANTS
from tests.model.world import SOUND, Bound, Rules, World
from tests.support.mutants import Change, build
from tests.unit.account.test_mutants import MUTANTS as UNIT_MUTANTS

STREAMS = Bound(deposit=3)
OVERRUN = Bound(deposit=3, overrun=True)
SETTLES = Bound(deposit=3, settles=True)
CLOSES = Bound(deposit=2, settles=True, closes=True)
EXITS = Bound(deposit=2, settles=True, closes=True, exits=True, top_ups=1, kinds=("stream",), processes=1)
CUTS = Bound(deposit=3, relaxed=True)
WHOLE = Bound(deposit=3, accepted=3, kinds=("stream", "whole"))
ROOMY = Bound(deposit=4, accepted=4, kinds=("stream",), processes=1)
BOUNDS = {"streams": STREAMS, "overrun": OVERRUN, "settles": SETTLES, "closes": CLOSES, "exits": EXITS, "cuts": CUTS, "whole": WHOLE, "roomy": ROOMY}

SOURCE_MUTANTS: dict[str, tuple[str, Bound, tuple[Change, ...]]] = {
    "no epoch check": (
        "I6",
        STREAMS,
        (
            (
                "account",
                '        raise ChannelFault(Reason.HOLD_FENCED, detail="this request no longer owns its reservation")',
                "        return Hold(Pico(9 * PICO_PER_UNIT), Pico(0))",
            ),
            ("account", "before = account.holds[event.hold]", "before = account.holds.get(event.hold, Hold(event.granted, Pico(0)))"),
        ),
    ),
    "hold not subtracted from availability": ("I2", STREAMS, (("model", " - self.owed_pico - self.held_pico", " - self.owed_pico"),)),
    "> for >= in availability": (
        "L2", STREAMS, (("account", "after.headroom_pico < command.floor", "after.headroom_pico <= command.floor"),),
    ),
    "fold adds granted instead of delivered": (
        "I3", STREAMS, (("account", "owed = account.owed_pico + event.consumed", "owed = account.owed_pico + event.granted"),),
    ),
    "granted may shrink during a renewal": ("I1", CUTS, (("account", "max(command.want - hold.granted, 0)", "command.want - hold.granted"),)),
    "recovery charges the window": (
        "I3",
        STREAMS,
        (
            (
                "account",
                "return tuple(Released(name) for name, hold in account.holds.items() if owner is None or hold.owner == owner)",
                "return tuple(e for n, h in account.holds.items() for e in (Folded(n, h.granted, h.granted), Released(n)))",
            ),
        ),
    ),
    "recovery ignores the clip to what is permitted": (
        "I2", OVERRUN, (("account", "payable = Pico(min(command.total, hold.granted + account.headroom_pico))", "payable = command.total"),),
    ),
    "the dead take everybody along": ("I6", WHOLE, (("account", " if owner is None or hold.owner == owner)", ")"),)),
    "two streams on one channel": ("I2", STREAMS, (("account", "if command.stream and after.streams:", "if False:"),)),
    "an ending stream is extended": ("I1", STREAMS, (("account", " and not hold.ending", ""),)),
    "settle takes the highest voucher": (
        "I4", SETTLES, (("model", "for rung in self.ladder if rung.cumulative <= final)", "for rung in self.ladder)"),),
    ),
    "settle ignores live streams": (
        "I4",
        SETTLES,
        (("model", "Units((self.owed_pico - sum(hold.consumed for hold in self.holds.values())) // PICO_PER_UNIT)", "self.spent"),),
    ),
    "a credit is captured": ("I4", CLOSES, (("model", "min(self.spent, self.owed_pico // PICO_PER_UNIT)", "self.spent"),)),
    "capture fixed before fencing": ("I4", CLOSES, (("account", "            if account.holds:", "            if False:"),)),
    "deposit merged by max": (
        "C1",
        EXITS,
        (
            (
                "account",
                "chain=event.chain, phase=event.phase)",
                "phase=event.phase, chain=replace(event.chain, deposit=max(event.chain.deposit, account.chain.deposit)))",
            ),
        ),
    ),
    "a lower voucher takes the place of a higher one": (
        "I7", STREAMS, (("account", "VoucherAccepted(_thin((*account.ladder, voucher),", "VoucherAccepted(_thin(account.ladder,"),),
    ),
}
NODE_MUTANTS: dict[str, tuple[str, Bound, Rules]] = {
    "granted assigned before commit": ("I1", STREAMS, Rules(grant_before_commit=True)),
    "channel difference taken from memory": ("I3", ROOMY, Rules(difference_from_memory=True)),
    "need numbers from memory": ("I3", STREAMS, Rules(numbers_from_memory=True)),
    "unchanged answers from rows a power cut takes back": ("I3", CUTS, Rules(answers_from_soft_rows=True)),
    "a voucher answered before it is durable": ("I7", CUTS, Rules(vouchers_in_soft_rows=True)),
    "a grant answered before it is durable": ("I1", CUTS, Rules(grants_in_soft_rows=True)),
    "NOTIFY as the only wake-up": ("L1", STREAMS, Rules(notified_only=True)),
    "reopen on receipt timeout": ("I5", CLOSES, Rules(reopens_on_timeout=True)),
    "a block that may be replaced is believed": ("I5", CLOSES, Rules(believes_new_blocks=True)),
}
PAIR_MUTANTS: dict[str, Rules] = {
    "a hold is found without its channel": Rules(books_by_hold=True),
    "one stream per process instead of per channel": Rules(one_stream_per_process=True),
}
ELSEWHERE: dict[str, str] = {
    "equal voucher advances state": "equal voucher advances",
    "lower voucher answered as accepted": "lower voucher answered as a repeat",
    "remainder dropped at stream end": "remainder dropped",
    "per-chunk ceil": "ceiling per request",
    "old blocks are news": "old blocks are news",
    "thinning by what was spent": "thinning by what was spent",
}
"""Mutants that need no second process to be seen, and the name under which the scenarios kill them."""
REQUIRED = {
    "no epoch check",
    "hold not subtracted from availability",
    "> for >= in availability",
    "fold adds granted instead of delivered",
    "granted assigned before commit",
    "granted may shrink during a renewal",
    "recovery charges the window",
    "recovery ignores the clip to what is permitted",
    "settle takes the highest voucher",
    "settle ignores live streams",
    "capture fixed before fencing",
    "reopen on receipt timeout",
    "deposit merged by max",
    "equal voucher advances state",
    "lower voucher answered as accepted",
    "remainder dropped at stream end",
    "per-chunk ceil",
    "need numbers from memory",
    "lease measured from reply instead of request",
    "reaper without grace",
    "channel difference taken from memory",
    "NOTIFY as the only wake-up",
}
STATES_MAX = 60_000


@pytest.mark.parametrize("name", SOURCE_MUTANTS)
def test_the_broken_ledger_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some way through the node leads to the law that is named."""
    law, bound, changes = SOURCE_MUTANTS[name]
    world = World(Books(*build(monkeypatch, *changes, with_laws=False)), bound, SOUND)
    with pytest.raises(Broken, match=rf"^{law}:"):
        alone(world, states_max=STATES_MAX)


@pytest.mark.parametrize("name", NODE_MUTANTS)
def test_the_broken_node_is_found(name: str) -> None:
    """A node that takes one liberty breaks the law that is named, with a ledger that is sound."""
    law, bound, rules = NODE_MUTANTS[name]
    with pytest.raises(Broken, match=rf"^{law}:"):
        alone(sound(bound, rules), states_max=STATES_MAX)


@pytest.mark.parametrize("name", PAIR_MUTANTS)
def test_channels_that_influence_each_other_are_found(name: str) -> None:
    """What one channel does beside another is then not what it does alone."""
    world = sound(PAIRS["requests"], PAIR_MUTANTS[name])
    assert not independent(world, together(world), alone(world))


@pytest.mark.parametrize("name", BOUNDS)
def test_the_sound_survive_what_kills_the_mutants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the same bounds the machine as it is breaks nothing, its own alarms switched off as well."""
    world = World(Books(*build(monkeypatch, with_laws=False)), BOUNDS[name], SOUND)
    assert alone(world, states_max=STATES_MAX).transitions > 0


def test_every_mutant_that_was_asked_for_has_a_place_to_die() -> None:
    """None of the known ways to lose money on a shared ledger is without its executioner."""
    here = {*SOURCE_MUTANTS, *NODE_MUTANTS, *PAIR_MUTANTS, *LEASE_MUTANTS}
    assert set(ELSEWHERE.values()) <= set(UNIT_MUTANTS)
    assert here | set(ELSEWHERE) >= REQUIRED
