"""Asks a provider afterwards what a stream took that ended without its report: what it cost us is in the log then.

The payer's bill is not touched: it is settled by what was delivered, and the record counts what was generated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from mppnode.engine.attempts import Endpoint
from mppnode.kernel.listing import Listing
from mppnode.observe.logs import Level, Log
from mppnode.providers.base import Lookup, Transport, UpstreamFault

_DELAYS_S: Final = (2.0, 10.0, 60.0)
"""Records are written some seconds after the end of a generation; one that is not there after these will not come."""
_RECORD_BYTES_MAX: Final = 64 * 1024
_ID_MAX: Final = 256
_OK: Final = 200


async def look_up(
    generation: str,
    listing: Listing,
    endpoint: Endpoint,
    *,
    transport: Transport,
    counted: int,
    log: Log,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Log what a generation took by the provider's own record, beside the tokens we ``counted``."""
    adapter = endpoint.adapter
    if not isinstance(adapter, Lookup) or not 0 < len(generation) <= _ID_MAX:
        return
    for delay in _DELAYS_S:
        await sleep(delay)
        request = adapter.encode_lookup(generation, base_url=endpoint.base_url, api_key=endpoint.api_key())
        try:
            response = await transport.open(request)
            if response.status != _OK:
                response.cancel()
                continue
            usage = adapter.decode_lookup(await response.read(_RECORD_BYTES_MAX))
        except UpstreamFault:
            continue
        if usage is not None:
            log(
                "generation.found",
                provider=listing.provider,
                model=listing.model,
                prompt=usage.prompt,
                completion=usage.completion,
                counted=counted,
            )
            return
    log("generation.unknown", level=Level.WARNING, provider=listing.provider, model=listing.model, counted=counted)
