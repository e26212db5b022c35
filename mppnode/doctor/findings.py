"""What a check is, what it may look at and what it may say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

import aiohttp

from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.config.schema import Config
from mppnode.doctor.machine import Machine
from mppnode.kernel.clock import Clock
from mppnode.providers.base import Transport


class Status(StrEnum):
    """How a check ended; there are no others."""

    OK = "ok"
    WARN = "warn"
    """The node runs, and an operator should know."""
    FAIL = "fail"
    """The node would not run, or would lose money or requests."""
    SKIP = "skip"
    """There was nothing to look at, or no way to."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, in words for an operator that repeat no secret and no text of anybody else's."""

    status: Status
    text: str
    remedy: str = ""
    """What to do, naming the key or the command; for ``warn`` and ``fail``."""


def ok(text: str) -> Finding:
    """All is well."""
    return Finding(Status.OK, text)


def warn(text: str, remedy: str) -> Finding:
    """It works, but."""
    return Finding(Status.WARN, text, remedy)


def fail(text: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(Status.FAIL, text, remedy)


def skip(reason: str) -> Finding:
    """It was not looked at."""
    return Finding(Status.SKIP, reason)


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration and the ways to look at what it names; nothing in it can write to a ledger or a chain."""

    config: Config
    clock: Clock
    entropy: Callable[[int], bytes]
    machine: Machine
    http: aiohttp.ClientSession
    """For what the operator runs; it neither keeps cookies nor follows the environment's proxies."""
    transport: Transport
    """The one that requests to providers take, with its guard of private addresses."""

    def chain(self, url: str) -> RpcChain:
        """The chain node at ``url``, asked once and without patience: a repeat would hide what is looked for."""
        once = RpcLimits(read_attempts=1, pinned_attempts=1)
        return RpcChain(HttpTransport(self.http, url), self.clock, limits=once)


Look: TypeAlias = Callable[[Case, str], Awaitable[Finding]]


def _alone(_: Config) -> tuple[str, ...]:
    return ("",)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at, once for each of its ``subjects``, which are names out of the configuration."""

    name: str
    what: str
    """For the manual: what must hold."""
    look: Look
    subjects: Callable[[Config], tuple[str, ...]] = _alone


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report."""

    check: str
    subject: str
    finding: Finding

    def row(self) -> dict[str, str]:
        """The line as a JSON object; absent parts are empty text."""
        found = self.finding
        return {
            "status": found.status.value,
            "check": self.check,
            "subject": self.subject,
            "finding": found.text,
            "remedy": found.remedy,
        }

    def line(self) -> str:
        """The line as people read it."""
        found = self.finding
        word = "FAIL" if found.status is Status.FAIL else found.status.value
        name = f"{self.check} {self.subject}".rstrip()
        return f"{word:<5} {name}: {found.text}" + (f" -> {found.remedy}" if found.remedy else "")


def ledger_file(config: Config) -> Path | None:
    """The SQLite file of a configuration that has one."""
    return config.node.ledger if isinstance(config.node.ledger, Path) else None
