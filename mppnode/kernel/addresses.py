"""Where a stranger's name leads: one that is said to be on the internet must not lead into our own network."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address


class PrivateAddress(Exception):
    """A name leads into a private network. The text repeats neither the name nor the address."""


async def public_address(host: str, port: int) -> str:
    """One address of ``host``, all of whose addresses are public.

    Resolved once, and what was looked at is what must be connected to: resolved again by the connection, the answer
    could be another one. TLS still checks the certificate against the name.

    Raises:
        PrivateAddress: when any address is private, loopback, link-local or otherwise not of the internet.
        OSError: the name cannot be resolved.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not addresses or not all(_public(address) for address in addresses):
        raise PrivateAddress("the name leads into a private network")
    return addresses[0]


def _public(text: str) -> bool:
    address = ip_address(text)
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return address.is_global and not address.is_multicast and (inner is None or inner.is_global)
