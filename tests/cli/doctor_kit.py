"""A configuration to be examined, with every part replaceable, and the doctor's checks one by one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from channels.ids import parse_address
from channels.units import Pico
from mppnode.cli.devnet import CHAIN_ID, PATH_USD, V1_ESCROW
from mppnode.config.schema import (
    ChainConfig,
    Config,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    NodeConfig,
    ProviderConfig,
    SessionConfig,
)
from mppnode.config.secrets import Secret
from mppnode.doctor.findings import Case, Finding, Status
from mppnode.doctor.machine import Machine
from mppnode.doctor.registry import CHECKS
from mppnode.kernel.clock import Clock, ManualClock, SystemClock
from mppnode.providers.transport import Transport
from mppnode.selling import public_hosts

PAYEE_KEY = bytes(range(7, 39))
OTHER_TOKEN = parse_address("0x20c00000000000000000000000000000000000ff", field="token")
DEAD_URL = "http://127.0.0.1:1"
"""Nothing listens there."""


def model(provider: str = "infra", name: str = "m/one") -> ModelConfig:
    return ModelConfig(name, provider, name, Pico(1), Pico(1), Pico(1), 1_000, 100)


def config(folder: Path = Path("/nowhere"), **parts: Any) -> Config:
    """A configuration with nothing wrong in itself; a part is a whole table or the fields of one that differ."""
    base = Config(
        node=NodeConfig("api.mynode.net", (Secret(bytes(range(130, 170))),), folder / "ledger.sqlite"),
        chain=ChainConfig(DEAD_URL, CHAIN_ID, PATH_USD, Secret(PAYEE_KEY), PATH_USD, V1_ESCROW),
        session=SessionConfig(),
        limits=LimitsConfig(),
        providers=(ProviderConfig("infra", f"{DEAD_URL}/v1"),),
        models=(model(),),
        log=LogConfig(),
    )
    for name, part in parts.items():
        base = replace(base, **{name: replace(getattr(base, name), **part) if isinstance(part, dict) else part})
    return base


class Steps(ManualClock):
    """A clock on which every look at the stop-watch takes a while."""

    def __init__(self, step_s: float) -> None:
        super().__init__()
        self._step_s = step_s

    def monotonic(self) -> float:
        self.advance(self._step_s)
        return super().monotonic()


@asynccontextmanager
async def case_of(what: Config, *, clock: Clock | None = None, machine: Machine | None = None) -> AsyncIterator[Case]:
    transport = Transport(public=public_hosts(what))
    async with aiohttp.ClientSession() as http:
        yield Case(what, clock or SystemClock(), os.urandom, machine or Machine(), http, transport)
    await transport.close()


async def look(name: str, what: Config, subject: str = "", **parts: Any) -> Finding:
    """What one check says of a configuration; a finding that wants something done says what."""
    (check,) = [each for each in CHECKS if each.name == name]
    assert subject in check.subjects(what)
    async with case_of(what, **parts) as case:
        found = await check.look(case, subject)
    assert bool(found.remedy) is (found.status in {Status.WARN, Status.FAIL})
    assert "\n" not in found.text + found.remedy
    return found


@asynccontextmanager
async def server(handler: Any) -> AsyncIterator[str]:
    """Something on a port of its own that answers every request with ``handler``; its URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def never(*_: object) -> None:
    """A sleep that does not end."""
    await asyncio.Event().wait()
