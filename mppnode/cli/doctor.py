"""``mppnode doctor``: looks at everything a node needs, beside one that runs or before the first start."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Final

import aiohttp

from mppnode.cli.serve import run
from mppnode.config.load import ConfigError, environment, load_config
from mppnode.config.schema import Config
from mppnode.doctor.findings import Case, Check, Result, Status, fail
from mppnode.doctor.machine import Machine
from mppnode.doctor.registry import CHECKS
from mppnode.doctor.runner import run_checks
from mppnode.kernel.clock import SystemClock
from mppnode.providers.transport import Transport, TransportLimits
from mppnode.selling import public_hosts

_BAD: Final = 2
_FAILED: Final = 1


def doctor(options: argparse.Namespace) -> int:
    """Run the checks; the exit status is 1 when one failed, 2 when the configuration cannot be used."""
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    unknown = sorted(set(options.only) - {check.name for check in CHECKS})
    if unknown:
        print(f"mppnode: no check is called {', '.join(unknown)}", file=sys.stderr)
        return _BAD
    try:
        config = load_config(options.config, environment())
    except ConfigError as error:
        remedy = f"correct {options.config}; every key is in docs/mppnode.example.toml"
        _report((Result("config", "", fail(problem, remedy)) for problem in error.problems), as_json=options.json)
        return _BAD
    return run(_diagnose(config, chosen, options))


async def _diagnose(config: Config, checks: Sequence[Check], options: argparse.Namespace) -> int:
    results = await diagnose(config, checks, timeout_s=options.timeout)
    _report(results, as_json=options.json)
    return _FAILED if any(result.finding.status is Status.FAIL for result in results) else 0


async def diagnose(config: Config, checks: Sequence[Check], *, timeout_s: float) -> list[Result]:
    """Run ``checks`` on this machine as it is."""
    transport = Transport(TransportLimits(), public=public_hosts(config))
    try:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False) as http:
            case = Case(config, SystemClock(), os.urandom, Machine(), http, transport)
            return await run_checks(checks, case, timeout_s=timeout_s, sleep=asyncio.sleep)
    finally:
        await transport.close()


def _report(results: Iterable[Result], *, as_json: bool) -> None:
    for result in results:
        print(json.dumps(result.row()) if as_json else result.line())
