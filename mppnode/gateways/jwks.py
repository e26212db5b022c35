"""An issuer's signing keys: fetched within limits, kept, and asked for again no more often than the node decides.

The bytes are parsed by whoever composes the node: what a key is belongs to those who verify with it.

Source: RFC 7517, section 5; OpenID Connect Core, section 10.1.1 (rotation of signing keys).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Generic, TypeVar

import aiohttp

from mppnode.config.urls import check_base_url
from mppnode.kernel.clock import Clock
from mppnode.kernel.tasks import TaskOwner

K = TypeVar("K")

BODY_BYTES_MAX: Final = 256 * 1024  # the longest set in use is a tenth of it
CONNECT_S: Final = 3.0
TOTAL_S: Final = 5.0  # requests wait for it: a slower issuer is as good as none
_OK: Final = 200
_UNASKED: Final = "the issuer could not be asked"


class KeysUnavailable(Exception):
    """The issuer's keys could not be got: 503, never 401. The words are ours and repeat nothing the issuer said."""


def jwks_session() -> aiohttp.ClientSession:
    """A session for key sets: no cookies, no proxy from the environment, no decompression."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TOTAL_S, connect=CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # a small answer could become a large one
        trust_env=False,
    )


def jwks_fetcher(session: aiohttp.ClientSession, url: str) -> Callable[[], Awaitable[bytes]]:
    """A function that gets the key set at ``url``: https, or plain http on a loopback or private address.

    Raises:
        ValueError: when keys may not come from there: whoever could change them on the way could sign as anybody.
    """
    checked = check_base_url(url)

    async def fetch() -> bytes:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        try:
            # A redirect would let another host say whom we believe.
            async with session.get(checked, headers=headers, allow_redirects=False) as response:
                if response.status != _OK:
                    raise KeysUnavailable(f"the issuer's key set has status {response.status}")
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise KeysUnavailable("the issuer's key set is compressed although asked not to be")
                body = bytearray()
                async for part in response.content.iter_any():
                    body += part
                    if len(body) > BODY_BYTES_MAX:
                        raise KeysUnavailable(f"the issuer's key set has more than {BODY_BYTES_MAX} bytes")
                return bytes(body)
        except TimeoutError:
            raise KeysUnavailable("the issuer's key set did not come in time") from None
        except (aiohttp.ClientError, ValueError):
            raise KeysUnavailable("the issuer could not be reached, or hung up") from None

    return fetch


@dataclass(frozen=True, slots=True)
class JwksPolicy:
    """How often an issuer is asked, in seconds."""

    refresh_min_s: int = 60
    """Between two attempts, whatever their outcome: a stranger's invented ``kid`` must not make us ask for each."""
    fresh_s: int = 3600
    """After which the set is got again: how long a key lives on that its issuer has withdrawn."""
    stale_max_s: int = 86_400
    """For how long a set is used when it cannot be got again. After it nobody is admitted: it may be long withdrawn."""

    def __post_init__(self) -> None:
        if not 1 <= self.refresh_min_s <= self.fresh_s <= self.stale_max_s:
            raise ValueError("1 <= refresh_min_s <= fresh_s <= stale_max_s must hold")


class IssuerKeys(Generic[K]):
    """The keys of one issuer by ``kid``; one fetch at a time, which outlives the request that began it."""

    def __init__(
        self,
        fetch: Callable[[], Awaitable[bytes]],
        parse: Callable[[bytes], Mapping[str, K]],
        clock: Clock,
        tasks: TaskOwner,
        policy: JwksPolicy | None = None,
    ) -> None:
        self._fetch = fetch
        self._parse = parse
        self._clock = clock
        self._tasks = tasks
        self._policy = policy or JwksPolicy()
        self._keys: Mapping[str, K] = MappingProxyType({})
        self._got_at: float | None = None
        self._tried_at: float | None = None
        self._failure: str | None = _UNASKED
        self._running: asyncio.Task[None] | None = None

    async def key(self, kid: str) -> K | None:
        """The key with this id, or None when the issuer has none such as far as we may ask.

        Raises:
            KeysUnavailable: when that cannot be told, because the last attempt to ask has failed.
        """
        age = self._age(self._got_at)
        known = kid in self._keys and age is not None and age < self._policy.stale_max_s
        if not known:
            await self._refresh()
        elif age is not None and age >= self._policy.fresh_s and self._running is None:
            # Only the first waits: while the issuer is slow, the others go on with what was good until now.
            await self._refresh()
        age = self._age(self._got_at)
        if age is not None and age < self._policy.stale_max_s and kid in self._keys:
            return self._keys[kid]
        if self._failure is not None:
            raise KeysUnavailable(self._failure)
        return None

    async def _refresh(self) -> None:
        """Ask the issuer if it is time to, and wait for whoever is asking."""
        tried = self._age(self._tried_at)
        if self._running is None and (tried is None or tried >= self._policy.refresh_min_s):
            self._tried_at = self._clock.monotonic()
            self._running = self._tasks.start(self._ask(), name="jwks")
        if self._running is not None:
            # Not awaited itself: a caller who hangs up would cancel it, and spend everybody's attempt.
            await asyncio.wait([self._running])

    async def _ask(self) -> None:
        self._failure = _UNASKED  # stays when this is cancelled, or fails in a way nobody thought of
        try:
            self._keys = self._parse(await self._fetch())
        except KeysUnavailable as fault:
            self._failure = str(fault)
        except ValueError:
            self._failure = "the issuer's key set is malformed"
        else:
            self._got_at, self._failure = self._clock.monotonic(), None
        finally:
            self._running = None

    def _age(self, at: float | None) -> float | None:
        return None if at is None else self._clock.monotonic() - at
