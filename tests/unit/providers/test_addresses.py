"""U11: a public provider's name must not lead into a private network, whatever it resolves to and when."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from mppnode.providers.addresses import public_address
from mppnode.providers.base import UpstreamFault, UpstreamRequest
from mppnode.providers.transport import Transport

PUBLIC = "93.184.215.14"


def resolver(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Names resolve to these addresses, one answer after the other; the names asked for."""
    asked: list[str] = []

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "::ffff:10.0.0.1",
        "::ffff:169.254.169.254", "2002:7f00:1::", "2002:a00:1::", "ff02::1", "192.0.2.1", "198.18.0.1",
        "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::1", "::10.0.0.1", "::ffff:0:10.0.0.1", "fec0::1", "192.0.0.192",
    ],
)  # fmt: skip
async def test_no_address_of_our_own_network_is_connected_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Alone or beside a public one, a private address is refused before anything is sent."""
    for answer in ([address], [PUBLIC, address]):
        resolver(monkeypatch, answer)
        with pytest.raises(UpstreamFault, match="private network"):
            await public_address("api.example.com", 443)


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::93.184.215.14"])
async def test_a_public_address_is_used(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """The address that was looked at is the one that is given back."""
    resolver(monkeypatch, [address])
    assert await public_address("api.example.com", 443) == address


async def test_a_name_that_changes_its_answer_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebinding: asked once, the second answer is never heard of; and a guarded host's private answer reaches nobody."""
    seen: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(1))
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    transport = Transport(public=frozenset({"api.example.com"}))
    asked = resolver(monkeypatch, ["127.0.0.1"])
    with pytest.raises(UpstreamFault, match="private network"):
        await transport.open(UpstreamRequest("POST", f"http://api.example.com:{port}/v1", (), b"{}"))
    assert (asked, seen) == (["api.example.com"], [])
    asked = resolver(monkeypatch, [PUBLIC], ["127.0.0.1"])
    assert await public_address("api.example.com", port) == PUBLIC
    assert len(asked) == 1
    await transport.close()
    server.close()
    await server.wait_closed()


async def test_a_guard_outlives_the_provider_it_was_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that fails over to a provider a reload has just removed is still kept out of our network; a host whose
    owner now says that it is in there is let go.
    """
    transport = Transport(public=frozenset({"gone.example.com", "moved.example.com"}))
    transport.guard(frozenset({"new.example.com"}), freed=frozenset({"moved.example.com"}))
    resolver(monkeypatch, ["127.0.0.1"])
    for host in ("gone.example.com", "new.example.com"):
        with pytest.raises(UpstreamFault, match="private network"):
            await transport.open(UpstreamRequest("POST", f"http://{host}:1/v1", (), b"{}"))
    with pytest.raises(UpstreamFault, match="cannot be reached"):
        await transport.open(UpstreamRequest("POST", "http://moved.example.com:1/v1", (), b"{}"))
    await transport.close()
