"""Which base URLs a provider may have: a typing error must not send prompts and keys to somebody else's machine.

Addresses that only ever answer with a machine's own credentials are refused under every setting. What a *name* resolves
to is not known here; the transport that connects is where that can be checked.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

_LENGTH_MAX: Final = 2048  # what every HTTP server in use accepts as a request line
_SHAPE = re.compile(r"(https?)://([^/]*)((?:/[A-Za-z0-9._~:-]+)*)/?", re.ASCII)
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([1-9][0-9]{0,4}))?", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*", re.ASCII)
_NAME_MAX: Final = 253  # RFC 1035, section 2.3.4, as text
_PORT_MAX: Final = 65_535

_PRIVATE: Final = tuple(
    map(IPv4Network, ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"))
)  # RFC 1918 and RFC 6598; the latter is what overlay networks between a node and its GPU hosts use
_PRIVATE_6: Final = tuple(map(IPv6Network, ("::1/128", "fc00::/7")))
_NEVER: Final = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # "this host": connects to the machine itself
            "169.254.0.0/16",  # link-local, with the metadata service of most clouds
            "100.100.100.200/32",  # metadata, Alibaba Cloud
            "168.63.129.16/32",  # the host agent, Azure
            "192.0.0.0/24",  # RFC 6890, with Oracle Cloud's metadata
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)
_NEVER_6: Final = tuple(
    map(
        IPv6Network,
        (
            "fe80::/10",
            "ff00::/8",
            "fd00:ec2::/32",  # metadata and its neighbours, Amazon EC2
            "fd20:ce::/32",  # metadata, Google Cloud
            # Each of these has an IPv4 address inside, which would get past the list above.
            "::ffff:0:0/96",
            "::/127",
            "::/96",
            "64:ff9b::/96",
            "64:ff9b:1::/48",
            "2002::/16",
            "2001::/32",
        ),
    )
)
_METADATA_NAMES: Final = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data"})


def check_base_url(text: str, *, insecure: bool = False) -> str:
    """Return a provider's base URL without its last slash, if a provider may be there.

    Plain http is for loopback and private addresses, written as addresses; ``insecure`` allows it to anything else.

    Raises:
        ValueError: in words for people that do not repeat the URL, which may hold a password.
    """
    if not text.isascii() or len(text) > _LENGTH_MAX:
        raise ValueError(f"must be plain ASCII of at most {_LENGTH_MAX} characters")
    if "#" in text or "?" in text:
        raise ValueError("must have neither a query nor a fragment")
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise ValueError("must look like https://inference.example.com/v1")
    scheme, authority, path = match.groups()
    if "@" in authority:
        raise ValueError("must not hold a user name or password")
    place = _AUTHORITY.fullmatch(authority)
    if place is None or int(place.group(2) or 1) > _PORT_MAX:
        raise ValueError("must name a host, and a port from 1 to 65535 if any")
    if {".", ".."} & set(path.split("/")):
        raise ValueError("must not step up in its path")
    private = _is_private(place.group(1).lower())
    if scheme == "http" and not private and not insecure:
        raise ValueError("must use https: plain http is for private addresses, or with insecure = true")
    return text.rstrip("/")


def _is_private(host: str) -> bool:
    """Whether the host is one of ours for certain. Raises ``ValueError`` when no provider can be there."""
    if host.startswith("["):
        return _is_private_6(host[1:-1])
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # 127.1, 2130706433 and 0x7f.0.0.1 are 127.0.0.1 to a resolver; only the usual form is taken.
        try:
            address = IPv4Address(host)
        except AddressValueError:
            raise ValueError("must write an IPv4 address as four decimal numbers") from None
        if any(address in network for network in _NEVER):
            raise ValueError("is an address no provider has")
        return any(address in network for network in _PRIVATE)
    if len(host) > _NAME_MAX or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("must name a host, and a port from 1 to 65535 if any")
    if host in _METADATA_NAMES:
        raise ValueError("is an address no provider has")
    return host == "localhost" or host.endswith(".localhost")  # RFC 6761, section 6.3: never leaves the machine


def _is_private_6(text: str) -> bool:
    try:
        address = IPv6Address(text)
    except AddressValueError:
        raise ValueError("must write an IPv6 address in its usual form") from None
    if address != IPv6Address("::1") and any(address in network for network in _NEVER_6):
        raise ValueError("is an address no provider has")
    return any(address in network for network in _PRIVATE_6)
