"""Two nodes in this loop on one ledger file, as two workers of one machine are, but without the processes."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from channels.model import Account
from mppnode.app import Node
from mppnode.cli.devnet import DevnetOptions
from mppnode.kernel.clock import Clock
from mppnode.parts import World as NodeWorld
from tests.support.http_client import Channel, World, new_world


def at(world: World, node: Node) -> World:
    """The same network and payer, seen through another node."""
    net = copy.copy(world.net)
    net.node = node
    return World(net, world.http, world.clock, world.log)


def new_node(world: World, name: str, *, clock: Clock | None = None) -> Node:
    """A worker of this network's ledger."""
    config = world.net.config()
    config = replace(config, node=replace(config.node, name=name, workers=2))
    return Node(config, NodeWorld(clock or world.clock, os.urandom, world.log, world.net._on_fatal))


@asynccontextmanager
async def two_nodes(
    options: DevnetOptions | None = None, *, clocks: Callable[[World], tuple[Clock, Clock]] | None = None
) -> AsyncIterator[tuple[World, World]]:
    """Two views of one network, each of its own node; ``clocks`` may give each node a clock of its own."""
    async with new_world(options) as world:
        await world.net.node.stop()
        first, second = clocks(world) if clocks else (world.clock, world.clock)
        one, two = new_node(world, "one", clock=first), new_node(world, "two", clock=second)
        await one.start()
        world.net.node = one  # which the network stops
        await two.start()
        try:
            yield at(world, one), at(world, two)
        finally:
            await two.stop()
        assert world.log.bugs == []


async def until(world: World, channel: Channel, holds: Callable[[Account], bool], *, seconds: float = 5.0) -> Account:
    """Read the books until they say what is expected; the limit only bounds a failing test."""
    async with asyncio.timeout(seconds):
        while not holds(account := await world.account(channel)):
            await asyncio.sleep(0.002)
    return account
