"""What is measured by looking: also when nobody answers, and in a process that serves nobody."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from channels.faults import ChannelFault, Reason
from mppnode.config.ops import MetricsConfig
from mppnode.gauging import keep_looking
from mppnode.parts import World as NodeWorld
from mppnode.watchtower import Watchtower
from tests.http.test_counted import Seen
from tests.support.http_client import World


class Away:
    """A chain nobody reaches."""

    async def head(self) -> None:
        raise ChannelFault(Reason.CHAIN_UNAVAILABLE, detail="no chain endpoint answers")


async def test_a_chain_that_does_not_answer_grows_old(world: World) -> None:
    """The age of the newest block goes on growing when nobody can be asked for one, or nobody would be told."""
    gauges = world.net.node.gauges
    assert gauges is not None
    await gauges.look_at_chain()
    fresh = Seen(world)("chain_head_age_seconds")
    gauges.sight.chain = Away()  # type: ignore[assignment]
    for _ in range(2):
        world.clock.advance(45)
        with pytest.raises(ChannelFault):
            await gauges.look_at_chain()
    assert Seen(world)("chain_head_age_seconds") == fresh + 90


async def test_a_watchtower_shows_what_its_treasury_does(world: World) -> None:
    """Beside nodes the watchtower may be the one that leads: the sums of channels and the fee payer are then its own."""
    await world.opened()
    config = replace(world.net.config(), metrics=MetricsConfig(port=0))
    tower = Watchtower(config, NodeWorld(world.clock, world.net.entropy, world.log, world.net._on_fatal), beside=True)
    await tower.start()
    try:
        await tower.treasury.treasurer._review()
        await tower.sight.look()
        async with world.http.get(tower.ops_url + "/metrics") as response:
            assert response.status == 200
            page = await response.text()
        seen = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }
        assert seen["mppnode_channels", "open"] == 1
        assert seen["mppnode_fee_payer_balance_usd",] == world.net.chain.balance(world.net.payee) / 10**6
        assert seen["mppnode_store_commit_seconds_count", "sqlite"] > 0
    finally:
        await tower.stop()


@pytest.mark.parametrize("error", [ValueError("hostile"), ChannelFault(Reason.STORE_UNAVAILABLE, detail="away")])
async def test_a_look_that_fails_is_taken_again(world: World, error: Exception) -> None:
    """Whatever goes wrong in one look, the next one comes: values that stood still would keep every alert silent."""
    looks, pauses = list[str](), list[float]()

    async def look() -> None:
        looks.append("one")
        if len(looks) == 1:
            raise error

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await keep_looking(look, 5.0, sleep, world.log)
    assert (len(looks), pauses) == (2, [5.0, 5.0])
    told = [line for line in world.log.lines if line["event"] in ("gauges.late", "gauges.failed")]
    assert [line["event"] for line in told] == ["gauges.failed" if isinstance(error, ValueError) else "gauges.late"]
    assert "hostile" not in str(told), "its text may be anybody's"
