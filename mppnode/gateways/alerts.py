"""Signed alerts to addresses that customers choose: one attempt each, told by its outcome and never by an exception.

The receiver is a stranger's machine, named by a stranger. It is reached over https, at a public address that is looked
up once, and nothing it answers is kept but its status and how long it wants to be left alone.

Source: the Standard Webhooks specification, github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import aiohttp
from yarl import URL

from mppnode.config.secrets import Secret
from mppnode.kernel.addresses import PrivateAddress, public_address
from mppnode.kernel.clock import Clock

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what every secret of the convention begins with
SECRET_BYTES: Final = 32
"""Of ours; the convention takes from 24 to 64."""
TOTAL_S: Final = 10.0
"""One attempt from looking up the name to the status; the convention advises 15 to 30, and a queue waits behind it."""
BODY_BYTES_MAX: Final = 20 * 1024
"""Of one alert: what the convention advises to stay below, out of regard for receivers."""
ANSWER_BYTES_MAX: Final = 1024
"""Read of an answer so that a short one ends in order; a longer one is cut off."""
RETRY_AFTER_S_MAX: Final = 86_400
"""A receiver that asks for more than a day is asked again after a day."""

_URL_MAX: Final = 2048  # what every HTTP server in use accepts as a request line
_URL: Final = re.compile(
    r"(https?)://([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([1-9][0-9]{0,4}))?([/?][!-~]*)?"
)
_PORT_MAX: Final = 65_535
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)  # no point: it parts the id from the time in what is signed
_AFTER: Final = re.compile(r"[0-9]{1,9}", re.ASCII)
_ANSWER_S: Final = 1.0  # for the rest of an answer whose status is known
_CONNECTIONS: Final = 64  # of alerts at once: more would only wait for their receivers
_CONNECTIONS_PER_HOST: Final = 4  # so that one slow receiver does not take them all
_FIELD_BYTES: Final = 4096  # of one header of an answer, of which we read one
_FIELDS: Final = 64
_SUCCESS: Final = range(200, 300)
_GONE: Final = 410

Guard = Callable[[str, int], Awaitable[str]]
"""Looks a name up and returns the address to connect to, or raises ``PrivateAddress`` or ``OSError``."""


class AlertProblem(StrEnum):
    """Why an alert did not arrive."""

    GONE = "gone"
    """The receiver answered 410: it wants no more of them."""
    BAD_URL = "bad_url"
    BAD_ALERT = "bad_alert"
    """Ours: its id or its size is none that may be sent."""
    PRIVATE_ADDRESS = "private_address"
    """The name leads into a private network, at least for now."""
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    STATUS = "status"
    """Any other status; a redirect is one, since whoever owns the address can give us the right one."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """The receiver has it."""

    status: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Another attempt cannot help; after ``GONE`` and ``BAD_URL``, neither can another alert: stop sending there."""

    problem: AlertProblem
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """It may have arrived or not: send the same again later, with the same id."""

    problem: AlertProblem
    status: int | None = None
    after_s: int | None = None
    """How many seconds the receiver asked to be left alone, at most a day."""


Outcome = Delivered | Refused | Retry


def new_alert_secret(entropy: Callable[[int], bytes]) -> Secret[str]:
    """Make a secret's text; ``entropy(n)`` gives n bytes that nobody can predict, such as ``secrets.token_bytes``."""
    secret = entropy(SECRET_BYTES)
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"an alert secret needs {SECRET_BYTES} bytes of entropy")
    return Secret(SECRET_PREFIX + base64.b64encode(secret).decode())


def parse_alert_secret(text: object) -> Secret[bytes]:
    """The key in a secret's text.

    Raises:
        ValueError: unless it is ``whsec_`` and the base64 of 32 bytes, as :func:`new_alert_secret` writes it.
    """
    problem = f"an alert secret is {SECRET_PREFIX} and the base64 of {SECRET_BYTES} bytes"
    if not isinstance(text, str) or not text.isascii() or not text.startswith(SECRET_PREFIX):
        raise ValueError(problem)
    body = text.removeprefix(SECRET_PREFIX)
    try:
        key = base64.b64decode(body, validate=True)
    except binascii.Error:
        raise ValueError(problem) from None
    # Written again, since base64 takes several texts for the same bytes.
    if len(key) != SECRET_BYTES or base64.b64encode(key).decode() != body:
        raise ValueError(problem)
    return Secret(key)


def check_alert_url(text: str, *, development: bool = False) -> str:
    """``text`` if alerts may be sent there; what its name resolves to is looked at when they are.

    Raises:
        ValueError: in words that do not repeat the URL. ``development`` allows plain http.
    """
    if len(text) > _URL_MAX or (match := _URL.fullmatch(text)) is None or int(match.group(3) or 1) > _PORT_MAX:
        raise ValueError("must look like https://hooks.example.com/path, without user or fragment")
    if "#" in (match.group(4) or "") or "\\" in (match.group(4) or ""):
        raise ValueError("must have neither a fragment nor a backslash")
    if match.group(1) != "https" and not development:
        raise ValueError("must use https")
    return text


def sign_alert(key: Secret[bytes], *, id: str, timestamp: int, body: bytes) -> str:  # noqa: A002 - the convention's word
    """The ``webhook-signature`` of an alert: HMAC-SHA256 over its id, its time (Unix seconds) and its body."""
    signed = f"{id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key.reveal(), signed, hashlib.sha256).digest()).decode()


def alert_session() -> aiohttp.ClientSession:
    """A session for alerts: no cookies, no proxy from the environment, no decompression, bounded headers."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=_CONNECTIONS, limit_per_host=_CONNECTIONS_PER_HOST, force_close=True),
        timeout=aiohttp.ClientTimeout(total=TOTAL_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        read_bufsize=ANSWER_BYTES_MAX,
        max_line_size=_FIELD_BYTES,
        max_field_size=_FIELD_BYTES,
        max_headers=_FIELDS,
    )


class AlertSender:
    """Sends alerts, each once per call. ``development`` allows plain http and private addresses.

    ``guard`` looks receivers' names up; ``tls`` is for tests, whose receivers nobody else vouches for.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        clock: Clock,
        guard: Guard = public_address,
        development: bool = False,
        tls: ssl.SSLContext | None = None,
        total_s: float = TOTAL_S,
    ) -> None:
        self._session = session
        self._clock = clock
        self._guard = guard
        self._development = development
        self._tls: ssl.SSLContext | bool = tls if tls is not None else True
        self._total_s = total_s

    async def send(self, url: str, secret: Secret[bytes], *, id: str, body: bytes) -> Outcome:  # noqa: A002
        """POST the JSON in ``body`` to ``url``, signed; ``id`` is the same in every attempt of one alert.

        Raises nothing but ``CancelledError``: every way it can end is an outcome.
        """
        try:
            check_alert_url(url, development=self._development)
        except ValueError:
            return Refused(AlertProblem.BAD_URL)
        if _ID.fullmatch(id) is None or len(body) > BODY_BYTES_MAX:
            return Refused(AlertProblem.BAD_ALERT)
        now = self._clock.now()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "mppnode",
            "Accept-Encoding": "identity",
            "webhook-id": id,
            "webhook-timestamp": str(now),
            "webhook-signature": sign_alert(secret, id=id, timestamp=now, body=body),
        }
        try:
            async with asyncio.timeout(self._total_s):
                return await self._post(url, headers, body)
        except TimeoutError:
            return Retry(AlertProblem.TIMEOUT)
        except PrivateAddress:
            return Retry(AlertProblem.PRIVATE_ADDRESS)
        except Exception:  # noqa: BLE001 - nothing a receiver does may end the loop that serves all the others
            return Retry(AlertProblem.UNREACHABLE)

    async def _post(self, url: str, headers: dict[str, str], body: bytes) -> Outcome:
        target = URL(url, encoded=True)  # as it was written: another quoting can be another place
        name = target.raw_host or ""
        if not self._development:
            # Connected to by address, so that nobody looks the name up again; the name stays in Host and in TLS.
            headers["Host"] = url.partition("://")[2].partition("/")[0].partition("?")[0]
            target = target.with_host(await self._guard(name, target.port or 443))
        async with self._session.post(
            target,
            data=body,
            headers=headers,
            allow_redirects=False,
            ssl=self._tls,
            server_hostname=name if target.scheme == "https" else None,
        ) as response:
            outcome = _outcome(response.status, response.headers.get("Retry-After"))
            # The status has said all; an answer that breaks or does not end changes nothing about it.
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(min(_ANSWER_S, self._total_s / 4)):
                    await _discard(response)
            return outcome


def _outcome(status: int, after: str | None) -> Outcome:
    """What a status says. Source: Standard Webhooks, on delivery and response codes."""
    if status in _SUCCESS:
        return Delivered(status)
    if status == _GONE:
        return Refused(AlertProblem.GONE, status)
    # The other form of Retry-After, a date, is as good as none: it would be one of the receiver's clock.
    asked = int(after) if after is not None and _AFTER.fullmatch(after) else None
    return Retry(AlertProblem.STATUS, status, min(asked, RETRY_AFTER_S_MAX) if asked is not None else None)


async def _discard(response: aiohttp.ClientResponse) -> None:
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > ANSWER_BYTES_MAX:
            response.close()
            return
