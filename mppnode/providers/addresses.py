"""Where a provider's name leads: a public one must not lead into our own network."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address

from mppnode.providers.base import UpstreamFault


async def public_address(host: str, port: int) -> str:
    """One address of ``host``, all of whose addresses are public.

    Resolved once, and what was looked at is what is connected to: resolved again by the connection, the answer could be
    another one. TLS still checks the certificate against the name.

    Raises:
        UpstreamFault: ``connect`` when any address is private, loopback, link-local or otherwise not of the internet.
        OSError: the name cannot be resolved.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not addresses or not all(_public(address) for address in addresses):
        # It would take the prompt and the provider's key to one of our neighbours.
        raise UpstreamFault("connect", detail="the provider's name leads into a private network")
    return addresses[0]


def _public(text: str) -> bool:
    address = ip_address(text)
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return address.is_global and not address.is_multicast and (inner is None or inner.is_global)
