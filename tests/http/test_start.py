"""A node that cannot finish its start leaves nothing behind: no task, no lock, no listener."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from mppnode.app import Node
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.ops import MetricsConfig
from mppnode.parts import World as Surroundings
from tests.support.http_client import World, chat, new_world

STEPS = ("start.before", "listen.before", "listen.after")


async def fails_at(world: World, step: str) -> None:
    """Start a node in the place of the network's, and have it fail at a step while it has work of its own."""
    net = world.net

    async def work() -> None:
        await asyncio.Event().wait()

    def probe(name: str) -> None:
        if name == step:
            node._owner.spawn(work(), name="a close that goes on")
            raise OSError("no more")

    config = replace(net.config(), metrics=MetricsConfig(port=0))
    node = Node(config, Surroundings(net.clock, net.entropy, net.log, net._on_fatal, probe))
    with pytest.raises(OSError, match="no more"):
        await node.start()
    for url in filter(None, (node.url, node.ops_url)):
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))


@pytest.mark.parametrize("step", STEPS)
async def test_a_failed_start_leaves_nothing_running(step: str) -> None:
    """Whichever step fails, no task and no port stays, and the next node gets the ledger at once."""
    async with new_world(DevnetOptions(tokens_per_second=0.0)) as world:
        await world.net.node.stop()
        before = asyncio.all_tasks()
        await fails_at(world, step)
        assert asyncio.all_tasks() <= before
        world.net.node = world.net.new_node()
        await world.net.node.start()
        assert (await world.send(chat())).status == 402


async def test_a_port_that_is_taken_leaves_nothing_running() -> None:
    """The last step that can fail by itself; the operators' listener, which is up by then, goes with it."""
    async with new_world(DevnetOptions(tokens_per_second=0.0)) as world:
        net = world.net
        taken = int(net.node.url.rpartition(":")[2])
        await net.node.stop()
        blocker = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", taken)
        before = asyncio.all_tasks()
        node = Node(
            replace(net.config(taken), metrics=MetricsConfig(port=0)),
            Surroundings(net.clock, net.entropy, net.log, net._on_fatal),
        )
        with pytest.raises(OSError, match="in use"):
            await node.start()
        blocker.close()
        assert asyncio.all_tasks() <= before
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", int(node.ops_url.rpartition(":")[2]))
        net.node = net.new_node()
        await net.node.start()
