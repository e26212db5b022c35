"""A watch over the whole run: no secret that a test gave the node may come out of it again.

Every value that is wrapped in a ``Secret`` while a test runs is a canary, and so are API keys from the moment they are
made. What comes out is searched for them after each test: log lines, whether the real log wrote them or a test's own
double heard them, pages of metrics, bodies of answers with an error status, texts of faults, the standard error of child
processes, and what pytest captured. Shapes that are always secrets (API keys, JWTs, Stripe's keys, payers' signatures)
are looked for as well, whoever made them. A hit fails the test it happened in.

The watch is a plugin of each pytest process, so it works the same under pytest-xdist.
"""

from __future__ import annotations

import asyncio.subprocess
import functools
import re
import sys
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web

from channels.faults import ChannelFault
from mppnode.config.secrets import Secret
from mppnode.kernel.faults import NodeFault
from mppnode.kernel.keys import NewKey
from mppnode.observe.exposition import Page
from mppnode.observe.logs import NodeLog
from tests.support.http_client import LogLines

LEAST: Final = 12
"""Characters of a secret that is looked for; shorter ones are words in tests about secrets that are too short."""
SHAPES: Final = re.compile(
    r"sk-mpp-[A-Za-z0-9_-]{48}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    r"|\b(?:sk|rk)_(?:test|live)_[A-Za-z0-9]{12,}"
    r"|\bwhsec_[A-Za-z0-9+/]{12,}"
    r"|0x[0-9a-f]{128}(?:1b|1c|00|01)(?![0-9a-f])"  # a payer's signature, whole
    r"|\bPayment eyJ[A-Za-z0-9_-]{16,}"
)
_ERROR: Final = 400
_STDERR: Final = 2
_KEPT: Final = 400_000  # characters of a test's output that are kept; storms repeat themselves


class Watch:
    """What is secret and what came out, in this process, of the test that runs."""

    def __init__(self) -> None:
        self.lasting: set[str] = set()  # made outside of tests: in modules and long-lived fixtures
        self.secrets: set[str] = set()
        self.out: list[tuple[str, str]] = []
        self._size = 0
        self.running = False

    def learn(self, value: object) -> None:
        """Take a secret in, in every form it could be printed in."""
        forms: list[str] = []
        if isinstance(value, bytes):
            text = value.decode("latin-1")
            forms = [value.hex(), b64encode(value).decode(), urlsafe_b64encode(value).decode()]
            forms += [text] if text.isascii() and text.isprintable() else []
        elif isinstance(value, str):
            forms = [value]
        known = self.secrets if self.running else self.lasting
        known.update(form.rstrip("=") for form in forms if len(form) >= LEAST)

    def hear(self, where: str, text: str) -> None:
        """Take in something that came out."""
        if self._size < _KEPT:
            self._size += len(text)
            self.out.append((where, text))

    def begin(self) -> None:
        """A test begins, with nothing of the last one."""
        self.secrets.clear()
        self.out.clear()
        self._size, self.running = 0, True

    def hits(self, captured: list[tuple[str, str]]) -> list[str]:
        """Where a secret shows, without showing it; ``captured`` is only searched for values, never for shapes."""
        found = set[str]()
        secrets = self.secrets | self.lasting
        for shaped, texts in ((True, self.out), (False, captured)):
            together = dict[str, dict[str, None]]()
            for where, text in texts:
                together.setdefault(where, {})[text] = None  # most of what comes out comes out again and again
            for where, parts in together.items():
                text = "\n".join(parts)
                if any(secret in text for secret in secrets):
                    found.add(f"a secret's value is in {where}")
                if shaped and SHAPES.search(text):
                    found.add(f"something shaped like a secret is in {where}")
        return sorted(found)


def install(watch: Watch) -> Callable[[], None]:
    """Listen where secrets come in and texts go out; returns what undoes it."""
    undo: list[Callable[[], None]] = []

    def after(owner: Any, name: str, tell: Callable[..., None]) -> None:
        was = getattr(owner, name)

        @functools.wraps(was)
        def told(*args: Any, **more: Any) -> Any:
            result = was(*args, **more)
            tell(result, *args, **more)
            return result

        setattr(owner, name, told)
        undo.append(lambda: setattr(owner, name, was))

    after(Secret, "__init__", lambda _, secret, value: watch.learn(value))
    after(NewKey, "__init__", lambda _, key, *args, **more: watch.learn(key.text))
    after(NodeLog, "_line", lambda line, *args: watch.hear("the log", line.decode()))
    after(LogLines, "__call__", lambda _, log, event, **fields: watch.hear("a log line", f"{event} {fields!r}"))
    after(Page, "__init__", lambda _, page, *args, **more: watch.hear("the metrics", page.body.decode()))
    for fault in (ChannelFault, NodeFault):
        after(fault, "__init__", lambda _, made, *args, **more: watch.hear("a fault", f"{made} {made!r}"))
    after(web.Response, "__init__", lambda _, response, **more: _refusal(watch, response))
    after(asyncio.subprocess.SubprocessStreamProtocol, "pipe_data_received", lambda _, me, fd, data: _child(watch, fd, data))
    return lambda: [each() for each in reversed(undo)] and None


def _refusal(watch: Watch, response: web.Response) -> None:
    # Three frames up is who made it: a test's hostile provider or processor repeats our keys on purpose.
    maker = str(sys._getframe(3).f_globals.get("__name__"))
    if response.status >= _ERROR and isinstance(response.body, bytes) and maker.startswith("mppnode."):
        watch.hear("the body of an error", response.body.decode("utf-8", "replace"))


def _child(watch: Watch, fd: int, data: bytes) -> None:
    if fd == _STDERR:
        watch.hear("a child's standard error", data.decode("utf-8", "replace"))
