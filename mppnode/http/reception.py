"""What every route about accounts has in common: who asks, what a query may say, where a page goes on, how one answers.

These routes reserve nothing, so no ledger refuses what a node remembers wrongly: each looks its bearer up again.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Final, NoReturn, TypeVar

import orjson
from aiohttp import web

from channels.faults import ChannelFault
from mppnode.accounts.directory import Admission, Directory
from mppnode.accounts.forms import known, read_instant
from mppnode.accounts.keyring import Stale
from mppnode.http.middleware import REFUSED
from mppnode.http.problem import STATUS, openai_error, retry_headers
from mppnode.kernel.faults import NodeFault, NodeReason

R = TypeVar("R")
Self = TypeVar("Self")
Handler = Callable[[Self, web.Request], Awaitable[web.StreamResponse]]

PRIVATE: Final[Mapping[str, str]] = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
PAGE: Final = 100
PAGE_MAX: Final = 1_000  # rows are a few hundred bytes: one answer stays below a megabyte
_TRIES: Final = 3  # an account that changes three times within a request is being changed by a program
_UNAUTHORIZED: Final = 401
_CURSOR_MAX: Final = 512
_NAME: Final = re.compile(r"[!-~]{1,256}", re.ASCII)  # of a key, a model, a provider: no controls, which stores refuse
_ID: Final = re.compile(r"[A-Za-z0-9_.:-]{1,128}", re.ASCII)
_WHOLE: Final = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)


def bearer_of(request: web.Request) -> str:
    """What follows ``Bearer`` in the one ``Authorization`` header. Raises ``INVALID_KEY``. Source: RFC 6750, 2.1."""
    given = request.headers.getall("Authorization", [])
    if len(given) != 1:
        # Of two bearers one would be checked here and the other perhaps by a proxy in front.
        words = "is missing" if not given else "is given more than once"
        raise NodeFault(NodeReason.INVALID_KEY, field="Authorization", detail=words)
    scheme, _, token = given[0].strip().partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise NodeFault(NodeReason.INVALID_KEY, field="Authorization", detail="is not Bearer and a key or a token")
    return token.strip()


class Reception:
    """Admits bearers to the routes about their account."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def admit(self, request: web.Request) -> Admission:
        """Who asks, as the ledger has it now. Raises as :meth:`Directory.admit`."""
        return await self._directory.admit(bearer_of(request), request.headers.getall("X-Trust", []), fresh=True)

    async def changing(self, request: web.Request, change: Callable[[Admission], Awaitable[R]]) -> R:
        """Admit, then change something; once more when the account has changed in between. Raises ``CONFLICT``."""
        for _ in range(_TRIES):
            who = await self.admit(request)
            try:
                return await change(who)
            except Stale:
                continue
        raise NodeFault(NodeReason.CONFLICT, detail="the account is being changed by others", retry_after_s=1)


def answered(handler: Handler[Self]) -> Handler[Self]:
    """A handler whose refusals are answers nobody may keep, with what RFC 6750 wants on a 401."""

    @wraps(handler)
    async def handle(surface: Self, request: web.Request) -> web.StreamResponse:
        try:
            return await handler(surface, request)
        except (NodeFault, ChannelFault) as fault:
            request[REFUSED] = fault.reason.value
            return refusal(fault)

    return handle


def refusal(fault: NodeFault | ChannelFault) -> web.Response:
    """The answer to a request that is refused."""
    status = STATUS[fault.reason]
    headers = {**PRIVATE, **retry_headers(fault)}
    if status == _UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return _body(status, orjson.dumps({"error": openai_error(fault)}), headers)


def answer(document: object, *, status: int = 200) -> web.Response:
    """An answer nobody may keep but who asked."""
    return _body(status, orjson.dumps(document), PRIVATE)


def _body(status: int, body: bytes, headers: Mapping[str, str]) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


# --------------------------------------------------------------------------------------------------------------- query


class Query:
    """A query string whose every parameter is known, given once, and read by its name."""

    def __init__(self, request: web.Request, allowed: Sequence[str]) -> None:
        """Raises ``INVALID_FIELD`` naming what is unknown or given twice."""
        known(list(request.query), allowed)
        for name in allowed:
            if len(request.query.getall(name, [])) > 1:
                _bad(name, "is given more than once")
        self._given = request.query

    def instant(self, name: str) -> int | None:
        """A moment in milliseconds since 1970, from Unix seconds or RFC 3339."""
        text = self._given.get(name)
        if text is None:
            return None
        # A "+" that was not escaped arrives as a space: in a time it can have been nothing else.
        return read_instant(int(text) if _WHOLE.fullmatch(text) else text.replace(" ", "+"), name)

    def limit(self) -> int:
        """How many rows a page has."""
        text = self._given.get("limit")
        if text is None:
            return PAGE
        if _WHOLE.fullmatch(text) is None or not 1 <= int(text) <= PAGE_MAX:
            _bad("limit", f"is not an integer from 1 to {PAGE_MAX}")
        return int(text)

    def name(self, name: str) -> str | None:
        """The name of a key, a model or a provider."""
        text = self._given.get(name)
        if text is not None and _NAME.fullmatch(text) is None:
            _bad(name, "is not a name")
        return text

    def choice(self, name: str, allowed: Sequence[str]) -> str | None:
        """One of a few words."""
        text = self._given.get(name)
        if text is not None and text not in allowed:
            _bad(name, "is not one of " + ", ".join(allowed))
        return text

    def choices(self, name: str, allowed: Sequence[str]) -> list[str]:
        """Some of a few words, separated by commas, each once."""
        text = self._given.get(name)
        chosen = [] if text is None else text.split(",")
        if any(each not in allowed for each in chosen) or len(set(chosen)) != len(chosen):
            _bad(name, "is not some of " + ",".join(allowed))
        return chosen

    def cursor(self, *shape: type) -> tuple[Any, ...] | None:
        """Where the page before ended: values of these types, as :func:`cursor` wrote them."""
        text = self._given.get("cursor")
        return None if text is None else read_cursor(text, *shape)


def cursor(*position: int | str) -> str:
    """Where a page ends. Opaque, not secret: whose rows they are is decided by the bearer, never by this."""
    return base64.urlsafe_b64encode(orjson.dumps(position)).decode().rstrip("=")


def read_cursor(text: str, *shape: type) -> tuple[Any, ...]:
    """The inverse; only what :func:`cursor` writes is read. Raises ``INVALID_FIELD``."""
    try:
        position = orjson.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError):
        position = None
    if (
        len(text) > _CURSOR_MAX
        or not isinstance(position, list)
        or [type(value) for value in position] != list(shape)
        or not all(_fits(value) for value in position)
        or cursor(*position) != text
    ):
        _bad("cursor", "is not one that this route has given")
    return tuple(position)


def identifier(request: web.Request, name: str = "id") -> str:
    """An id in the path. Raises ``NOT_FOUND`` for what can be none: stores refuse some of it in their own words."""
    text = request.match_info[name]
    if _ID.fullmatch(text) is None:
        raise NodeFault(NodeReason.NOT_FOUND, detail="there is no such thing")
    return text


def _fits(value: int | str) -> bool:
    return 0 <= value < 1 << 62 if isinstance(value, int) else _ID.fullmatch(value) is not None


def _bad(name: str, detail: str) -> NoReturn:
    raise NodeFault(NodeReason.INVALID_FIELD, field=name, detail=detail) from None
