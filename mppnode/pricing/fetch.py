"""Fetches a price list: one GET within limits, from a server that may be broken or hostile."""

from __future__ import annotations

from typing import Final

import aiohttp

CONNECT_S: Final = 10.0
TOTAL_S: Final = 30.0
BODY_BYTES_MAX: Final = 16 * 1024 * 1024  # the largest list in use is under 2 MiB


class FetchFailed(Exception):
    """No price list was got; the words are ours and repeat nothing the server said."""


def price_session() -> aiohttp.ClientSession:
    """A session for price lists: no cookies, no proxy from the environment, no decompression."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TOTAL_S, connect=CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # 16 MiB of gzip can be 16 GiB of zeros
        trust_env=False,
    )


async def fetch(session: aiohttp.ClientSession, url: str, api_key: str | None) -> bytes:
    """Return the body of a 200 answer of at most ``BODY_BYTES_MAX`` bytes.

    Raises:
        FetchFailed: for every other ending.
    """
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        # A redirect would take the key along, or answer from inside our network.
        async with session.get(url, headers=headers, allow_redirects=False) as response:
            if response.status != 200:  # noqa: PLR2004 - the one status that has a list
                raise FetchFailed(f"answered with status {response.status}")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise FetchFailed("answered compressed although asked not to")
            parts: list[bytes] = []
            size = 0
            async for part in response.content.iter_any():
                size += len(part)
                if size > BODY_BYTES_MAX:
                    raise FetchFailed(f"answered with more than {BODY_BYTES_MAX} bytes")
                parts.append(part)
    except TimeoutError:
        raise FetchFailed("did not answer in time") from None
    except (aiohttp.ClientError, ValueError):
        # The error's own text may hold the URL, and that is all it adds.
        raise FetchFailed("could not be reached, or hung up") from None
    return b"".join(parts)
