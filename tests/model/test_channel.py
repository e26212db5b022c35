"""Every state a channel can reach within a bound, with kills, naps, fences, repeats and a chain in between.

The accounts are the product's own (``channels.account``); the node, the escrow and the payer around them are the small
machines of ``world``. After every step the laws are judged (reliability: section 4.1):

* I1 nothing is delivered outside a durable hold;
* I2 owed and held stay within the accepted voucher, and that within the deposit;
* I3 nobody is charged for more than was delivered, and no number that was shown falls, power cuts included;
* I4 what the chain pays never exceeds what was consumed for good;
* I5 the node loses at most one window per stream, and nothing in a close;
* I6 an owner that was fenced changes nothing, and nobody touches a stranger's hold;
* I7 an accepted voucher stays accepted;
* L1 a stream that waits for money is woken, L2 a request that fits is served;
* M1 payer, node and escrow together always have the same money.

One channel is visited with as many processes as it has requests, which is as good as any number of nodes and restarts.
Two channels would square that, so their product is visited within a smaller bound, and in addition compared with one
channel alone: neither makes anything possible or impossible for the other, whatever state it is in.

The bounds here are visited entirely by the ordinary test command. ``--hypothesis-profile=deep`` visits larger ones: 12
million states, in some eight minutes and 3 GB.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.model.runs import alone, independent, sound, together
from tests.model.world import Bound, World

STREAMS = ("stream", "stream")
BOUNDS = {
    "two streams": Bound(deposit=4, overrun=True),
    "three streams": Bound(deposit=2, kinds=(*STREAMS, "stream"), processes=3),
    "a whole answer beside a stream": Bound(kinds=("stream", "whole"), overrun=True),
    "power cuts": Bound(relaxed=True, settles=True, deposit=2),
    "settlements": Bound(settles=True),
    "closes": Bound(settles=True, closes=True),
    "the payer leaves": Bound(settles=True, closes=True, exits=True, deposit=2),
    "top-ups and exits": Bound(settles=True, closes=True, exits=True, kinds=("stream",), processes=1, top_ups=1, deposit=2),
}
DEEP = {
    "two streams": Bound(deposit=6, overrun=True),
    "three streams": Bound(deposit=4, kinds=(*STREAMS, "stream"), processes=3),
    "a whole answer beside two streams": Bound(deposit=3, kinds=("stream", "whole", "stream"), processes=3, overrun=True),
    "power cuts": Bound(deposit=5, relaxed=True, settles=True),
    "a wider window": Bound(deposit=5, window=3, settles=True),
    "closes": Bound(settles=True, closes=True, deposit=4),
    "the payer leaves": Bound(settles=True, closes=True, exits=True),
    "top-ups and exits": Bound(settles=True, closes=True, exits=True, top_ups=1, deposit=2),
}
PAIRS = {
    "requests": Bound(deposit=2, kinds=("stream",), any_process=True),
    "settlements": Bound(deposit=2, kinds=("stream",), any_process=True, settles=True),
}
DEEP_PAIRS = {
    "requests": Bound(deposit=3, kinds=("stream",), any_process=True),
    "two streams each": Bound(deposit=1, kinds=STREAMS, any_process=True),
    "closes": Bound(deposit=2, kinds=("stream",), any_process=True, settles=True, closes=True),
}
IS_DEEP = settings.get_current_profile_name() == "deep"


@pytest.mark.parametrize("name", DEEP if IS_DEEP else BOUNDS)
def test_no_reachable_state_breaks_a_law(name: str) -> None:
    """All states within the bound are visited, and every law holds in each and on every step between them."""
    world = sound((DEEP if IS_DEEP else BOUNDS)[name])
    seen = alone(world)
    print(f"{name}: {len(seen.states):,} states, {seen.transitions:,} steps, {seen.depth} deep")
    assert seen.emptied, "the bound was not visited entirely"
    assert everything_happened(world), "a bound in which nothing happens proves nothing"


@pytest.mark.parametrize("name", DEEP_PAIRS if IS_DEEP else PAIRS)
def test_two_channels_never_influence_each_other(name: str) -> None:
    """With the processes they share, each channel does exactly what it does alone, and every law holds in both."""
    world = sound((DEEP_PAIRS if IS_DEEP else PAIRS)[name])
    pair, solo = together(world), alone(world)
    print(f"two channels, {name}: {len(pair.states):,} states, {pair.transitions:,} steps, {pair.depth} deep")
    assert pair.emptied
    assert solo.emptied
    assert independent(world, pair, solo)


def everything_happened(world: World) -> bool:
    """Whether the visited states include the ends that the bound allows."""
    views = [world.books.views[channel.account] for channel in world.channels]
    paid = {channel.escrow.node for channel in world.channels}
    phases = {view.phase for view in views}
    bound = world.bound
    return (
        max(view.spent for view in views) == bound.deposit + bound.top_ups
        and (not bound.settles or max(paid) == bound.deposit + bound.top_ups)
        and (not bound.closes or {"closing", "captured", "closed"} <= phases)
        and (not bound.exits or {"contested"} <= phases)
        and (not bound.relaxed or any(channel.firm != channel.account for channel in world.channels))
    )
