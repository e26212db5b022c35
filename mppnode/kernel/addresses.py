"""Where a stranger's name leads: one that is said to be on the internet must not lead into our own network."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

_INTERNET: Final = ip_network("2000::/3")
"""All of IPv6 that is given out. What lies beside it leads to IPv4, or nowhere: site-local, mapped, translated.

Source: IANA, IPv6 address space; RFC 4291, 2.5.5; RFC 8215.
"""
_NAT64: Final = ip_network("64:ff9b::/96")
"""IPv4 as networks without it see it. Source: RFC 6052."""
_PROTOCOLS: Final = ip_network("192.0.0.0/24")
"""Protocols' own; one cloud has its machines' secrets there, and Python calls some of it global. Source: RFC 6890."""


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
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return _public(str(IPv4Address(int(address) & 0xFFFF_FFFF)))
        inner = address.sixtofour
        return address in _INTERNET and address.is_global and (inner is None or inner.is_global)
    return address.is_global and not address.is_multicast and address not in _PROTOCOLS
