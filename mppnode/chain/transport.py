"""Bytes to a chain node and back, and the one fact that matters when that fails: whether the request left."""

from __future__ import annotations

from typing import Protocol

import aiohttp

_CLIENT_ERRORS = range(400, 500)
_OK = 200


class TransportFailed(Exception):
    """No usable reply. ``maybe_sent`` is false only when the node surely never saw the request."""

    def __init__(self, message: str, *, maybe_sent: bool) -> None:
        self.maybe_sent = maybe_sent
        super().__init__(message)


class Transport(Protocol):
    """One request, one reply."""

    async def post(self, body: bytes) -> bytes:
        """Deliver a JSON body and return the reply's. Raises :class:`TransportFailed` and nothing else."""
        ...


class HttpTransport:
    """A node behind HTTP. The session is the caller's, who closes it; its URL may hold a secret and is never logged."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, *, timeout_s: float = 10.0, reply_bytes_max: int = 4_194_304
    ) -> None:
        self._session = session
        self._url = url
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._reply_bytes_max = reply_bytes_max  # a month of one channel's logs is far below; a node gone mad is not

    async def post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        try:
            async with self._session.post(
                self._url, data=body, headers=headers, timeout=self._timeout, allow_redirects=False
            ) as response:
                if response.status != _OK:
                    # A gateway answers 4xx before the node sees anything; a 5xx may come after it did.
                    refused = response.status in _CLIENT_ERRORS
                    raise TransportFailed(f"chain node answered HTTP {response.status}", maybe_sent=not refused)
                return await self._body(response)
        except aiohttp.ClientConnectorError as error:
            raise TransportFailed("cannot connect to the chain node", maybe_sent=False) from error
        except aiohttp.ConnectionTimeoutError as error:
            raise TransportFailed("no connection to the chain node in time", maybe_sent=False) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TransportFailed(f"chain node: {type(error).__name__}", maybe_sent=True) from error

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_chunked(65_536):
            body += chunk
            if len(body) > self._reply_bytes_max:
                raise TransportFailed("chain node's reply is too long", maybe_sent=True)
        return bytes(body)
