"""The real nginx and Caddy with the configurations we ship, before a real node.

Of the shipped files only addresses, paths and certificates are changed. What is promised is what a paid stream needs of
a proxy, and what a proxy could break without anybody noticing.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mppnode.cli.devnet import DevnetOptions
from tests.deploy.files import ROOT, need
from tests.support.http_client import World, chat, new_world

PATIENCE_S = 20


def free_port() -> int:
    """A port nobody listens at; a proxy cannot tell which one it was given."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def make_certificate(folder: Path) -> None:
    """A certificate for localhost that nobody but the test trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)  # noqa: TID251 - TLS looks at the wall clock
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(days=1))
    built = built.not_valid_after(now + dt.timedelta(days=1))
    built = built.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = built.sign(key, hashes.SHA256())
    (folder / "fullchain.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "privkey.pem").write_bytes(private)


def replaced(text: str, **changes: str) -> str:
    """A shipped file with some of its text replaced; each must be there, or the test would test another file."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def nginx_command(folder: Path, port: int, plain: int, upstreams: list[str]) -> list[str]:
    """nginx with the shipped server, inside the ``http`` block an installation has."""
    program = need("nginx")
    servers = " ".join(f"server {address} max_fails=0;" for address in upstreams)
    site = replaced(
        (ROOT / "docs/deploy/nginx.conf").read_text(),
        **{
            "server 127.0.0.1:8402 max_fails=0;": servers,
            "listen 80;": f"listen 127.0.0.1:{plain};",
            "listen 443 ssl http2;": f"listen 127.0.0.1:{port} ssl http2;",
            "/etc/ssl/mppnode/": f"{folder}/",
            "/var/log/nginx/": f"{folder}/",
            "/var/www/acme": f"{folder}",
        },
    )
    (folder / "site.conf").write_text(site)
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;" if os.getuid() == 0 else ""
    main = f"{user} daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/main.log;\n"
    main += f"events {{ worker_connections 256; }}\nhttp {{ {temporary} include {folder}/site.conf; }}\n"
    (folder / "nginx.conf").write_text(main)
    return [program, "-p", str(folder), "-e", str(folder / "early.log"), "-c", str(folder / "nginx.conf")]


def caddy_command(folder: Path, port: int, _plain: int, upstreams: list[str]) -> list[str]:
    """Caddy with the shipped file."""
    program = need("caddy")
    text = replaced(
        (ROOT / "docs/deploy/Caddyfile").read_text(),
        **{
            "localhost:2019": f"unix/{folder}/admin.sock",
            "https://api.example.com": f"https://localhost:{port}",
            "# tls /etc/ssl/mppnode/fullchain.pem /etc/ssl/mppnode/privkey.pem": f"tls {folder}/fullchain.pem {folder}/privkey.pem",
            "127.0.0.1:8402": " ".join(upstreams),
            "/var/log/caddy/": f"{folder}/",
        },
    )
    (folder / "Caddyfile").write_text(text)
    return [program, "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


COMMANDS: dict[str, Callable[[Path, int, int, list[str]], list[str]]] = {"nginx": nginx_command, "caddy": caddy_command}


@dataclass
class Proxy:
    """A running proxy."""

    url: str
    plain: int
    folder: Path
    trust: ssl.SSLContext
    process: asyncio.subprocess.Process

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=self.trust))

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()

    @property
    def logs(self) -> str:
        """Everything it has written down."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@asynccontextmanager
async def proxy_before(kind: str, folder: Path, upstreams: list[str]) -> AsyncIterator[Proxy]:
    make_certificate(folder)
    port, plain = free_port(), free_port()
    command = COMMANDS[kind](folder, port, plain, upstreams)
    environment = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "output.log").open("wb") as out:
        process = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out, env=environment)
    trust = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
    made = Proxy(f"https://localhost:{port}", plain, folder, trust, process)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                assert process.returncode is None, made.logs
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("localhost", port)
                    writer.close()
                    break
                await asyncio.sleep(0.01)
        yield made
    finally:
        await made.stop()


@pytest.fixture(params=list(COMMANDS))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    need(name)
    return name


@dataclass
class Shop:
    """A node, reached directly and through the proxy."""

    direct: World
    through: World
    proxy: Proxy


@pytest.fixture
async def shop(kind: str, tmp_path: Path) -> AsyncIterator[Shop]:
    async with new_world(DevnetOptions(tokens_per_second=0.0)) as world:
        address = world.net.node.url.removeprefix("http://")
        async with proxy_before(kind, tmp_path, [address]) as proxy, proxy.session() as session:
            yield Shop(world, Through(world, session, proxy.url), proxy)


class Through(World):
    """The same network, asked through a proxy."""

    def __init__(self, world: World, session: aiohttp.ClientSession, url: str) -> None:
        super().__init__(world.net, session, world.clock, world.log)
        self.url = url

    def request(self, body=None, authorization=None, *, path="/v1/chat/completions", **more):  # type: ignore[no-untyped-def]
        session, url = self.http, self.url
        self.http = _Elsewhere(session, self.net.node.url, url)  # type: ignore[assignment]
        try:
            return super().request(body, authorization, path=path, **more)
        finally:
            self.http = session


@dataclass
class _Elsewhere:
    """A session that asks the proxy where a test asks the node."""

    session: aiohttp.ClientSession
    node: str
    proxy: str

    def request(self, method: str, url: str, **more: object):  # type: ignore[no-untyped-def]
        return self.session.request(method, url.replace(self.node, self.proxy), **more)  # type: ignore[arg-type]


async def test_a_paid_stream_arrives_token_by_token(shop: Shop) -> None:
    """Each token is at the client while the provider is held before the next one: nothing on the way collects them."""
    gate, world, body = shop.direct.gate(), shop.through, chat("dev/story", stream=True, max_tokens=30)
    channel = await world.opened()
    async with world.stream(body, await world.pay(world.payer.voucher(channel, 1_000), body)) as stream:
        for number in range(1, 13):
            await gate.release(1)
            async with asyncio.timeout(PATIENCE_S):
                await stream.tokens(number)
            assert gate.released == number
        assert shop.direct.net.provider.live == 1
        await gate.release(1_000)
        await stream.rest()
        assert stream.final.spent > 0
    await shop.direct.settled()


async def test_a_client_who_hangs_up_stops_the_provider(shop: Shop) -> None:
    """A connection that ends, as a killed client's does, ends at the provider too, before anything else is sent."""
    gate, world, body = shop.direct.gate(), shop.through, chat("dev/story", stream=True)
    channel = await world.opened()
    async with world.stream(body, await world.pay(world.payer.voucher(channel, 1_000), body)) as stream:
        await gate.release(3)
        await stream.tokens(3)
        connection = stream.response.connection
        assert connection is not None
        assert connection.transport is not None
        connection.transport.abort()
    await shop.direct.eventually(lambda: shop.direct.net.provider.cancelled == 1, seconds=PATIENCE_S)
    await shop.direct.settled()
    assert shop.direct.log.endings() == ["disconnected"]


async def test_a_challenge_arrives_whole(shop: Shop) -> None:
    """402, every challenge in ``WWW-Authenticate`` and the body are those of the node, with its other headers."""
    direct, through = await shop.direct.send(chat()), await shop.through.send(chat())
    assert (direct.status, through.status) == (402, 402)
    assert [challenge.request for challenge in through.challenges] == [challenge.request for challenge in direct.challenges]
    assert len(through.challenges) == 2
    assert through.json["error"]["code"] == direct.json["error"]["code"]
    assert {name.lower() for name in direct.headers} - {"server"} <= {name.lower() for name in through.headers}
    assert len(through.body) == len(direct.body)


async def test_a_credential_of_16_kib_reaches_the_node(shop: Shop) -> None:
    """The longest credential the node reads gets the node's answer, not the proxy's; so does one with a real voucher."""
    long = "Payment " + "A" * (16 * 1024)
    direct, through = await shop.direct.send(chat(), long), await shop.through.send(chat(), long)
    assert (through.status, through.json["error"]["code"]) == (direct.status, direct.json["error"]["code"])
    channel = await shop.through.opened()
    reply = await shop.through.buy(chat("dev/echo", stream=False, max_tokens=20), shop.through.payer.voucher(channel, 1_000))
    assert reply.status == 200
    assert reply.receipt is not None


async def test_what_is_for_operators_is_not_for_the_world(shop: Shop) -> None:
    """Health, metrics and admin paths are answered by the proxy with 404, whatever the node would say."""
    for path in ("/healthz", "/readyz", "/metrics", "/admin/v1/accounts"):
        reply = await shop.through.send(method="GET", path=path)
        assert reply.status == 404, path
        assert "X-Request-Id" not in reply.headers, path  # the node would have given it one
    assert (await shop.through.send(method="GET", path="/v1/models")).status == 200


async def test_bodies_of_a_megabyte_pass_and_larger_ones_do_not(shop: Shop) -> None:
    """The proxy's limit is the node's: a body of exactly that size gets the node's answer, which finds it too long."""
    frame = json.dumps(chat(text="")).encode()
    largest = json.dumps(chat(text="a" * (1024 * 1024 - len(frame)))).encode()
    assert len(largest) == 1024 * 1024
    direct, through = await shop.direct.send(largest), await shop.through.send(largest)
    assert (through.status, through.code) == (direct.status, direct.code)
    assert through.field == "messages"
    assert (await shop.through.send(largest + b" " * 4096)).status == 413


async def test_logs_hold_no_credentials(shop: Shop) -> None:
    """Neither a key, nor a voucher, nor a receipt, nor a query is in anything the proxy has written; the request is."""
    canary = "sk-canary-0123456789abcdef"
    await shop.through.send(chat(), f"Bearer {canary}", path="/v1/chat/completions?canary=query-canary")
    channel = await shop.through.opened()
    body = chat(stream=False, max_tokens=20)
    credential = await shop.through.pay(shop.through.payer.voucher(channel, 1_000), body)
    reply = await shop.through.send(body, credential)
    assert reply.status == 200
    await shop.proxy.stop()
    logs = shop.proxy.logs
    assert "/v1/chat/completions" in logs
    assert reply.headers["X-Request-Id"] in logs or "caddy" in logs
    for secret in (canary, "query-canary", credential.split()[1], reply.headers["Payment-Receipt"]):
        assert secret not in logs


@dataclass
class Deaf:
    """A server that takes requests and hangs up before it answers, or answers all of a connection."""

    answers: bool
    requests: int = 0
    connections: int = 0
    address: str = ""
    heads: list[bytes] = field(default_factory=list)
    header: bytes = b""
    """One more line for its answers."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length:")), 0)
                await reader.readexactly(length)
                self.requests += 1
                self.heads.append(head)
                if not self.answers:
                    break
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + self.header + b"\r\nok")
        writer.close()


@asynccontextmanager
async def deaf(*, answers: bool) -> AsyncIterator[Deaf]:
    made = Deaf(answers)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, limit=1 << 17)
    async with server:
        made.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield made


async def test_a_post_that_was_sent_is_never_sent_again(kind: str, tmp_path: Path) -> None:
    """Where the node dies over a request the client is told so, even if another node is there and the key is idempotent."""
    async with (
        deaf(answers=False) as one,
        deaf(answers=False) as two,
        proxy_before(kind, tmp_path, [one.address, two.address]) as proxy,
        proxy.session() as http,
    ):
        for headers in ({}, {"Idempotency-Key": "k" * 20}):
            before = one.requests + two.requests
            async with http.post(f"{proxy.url}/v1/chat/completions", json=chat(), headers=headers) as response:
                assert response.status == 502
            assert one.requests + two.requests == before + 1


async def test_connections_to_the_node_are_kept(kind: str, tmp_path: Path) -> None:
    """Requests of several clients share one HTTP/1.1 connection to the node, and no header says to close it."""
    async with deaf(answers=True) as node, proxy_before(kind, tmp_path, [node.address]) as proxy:
        for _ in range(3):
            async with proxy.session() as http, http.post(f"{proxy.url}/v1/x", json={}) as response:
                assert response.status == 200
                await response.read()
    assert (node.requests, node.connections) == (3, 1)
    assert all(b" HTTP/1.1\r\n" in head for head in node.heads)
    assert not any(b"connection: close" in head.lower() for head in node.heads)


async def test_plain_http_is_refused_and_not_redirected(tmp_path: Path) -> None:
    """A redirect would hide from a client that it sends its key in clear text."""
    need("nginx")
    async with (
        deaf(answers=True) as node,
        proxy_before("nginx", tmp_path, [node.address]) as proxy,
        aiohttp.ClientSession() as http,
        http.get(f"http://127.0.0.1:{proxy.plain}/v1/models") as response,
    ):
        assert response.status == 403
    assert node.requests == 0


async def test_long_credentials_pass_over_http_2(kind: str, tmp_path: Path) -> None:
    """Its limits on headers are others than those of HTTP/1.1; a long answer, as challenges may be, comes back as well."""
    curl = need("curl")
    async with deaf(answers=True) as node, proxy_before(kind, tmp_path, [node.address]) as proxy:
        node.header = b"WWW-Authenticate: Payment " + b"B" * (16 * 1024) + b"\r\n"
        long = tmp_path / "header"
        long.write_text("Authorization: Payment " + "A" * (16 * 1024))
        process = await asyncio.create_subprocess_exec(
            curl, "-s", "--http2", "--cacert", str(tmp_path / "fullchain.pem"), "-w", " %{http_version} %{http_code} %{size_header}",
            "-H", f"@{long}", "-d", "{}", f"{proxy.url}/v1/x", stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
    said, version, status, size = out.decode().split()
    assert (said, version, status) == ("ok", "2", "200")
    assert int(size) > 16 * 1024
    assert b"A" * (16 * 1024) in node.heads[0]


def test_both_files_name_the_same_node_and_caddys_formatter_has_nothing_to_say() -> None:
    """The node's address and the public name are the same in both; a file the formatter would change is hard to compare."""
    nginx, caddy = ROOT / "docs/deploy/nginx.conf", ROOT / "docs/deploy/Caddyfile"
    for path in (nginx, caddy):
        assert "127.0.0.1:8402" in path.read_text()
        assert "api.example.com" in path.read_text()
    formatted = subprocess.run([need("caddy"), "fmt", caddy], capture_output=True, text=True, check=False)
    assert formatted.stdout == caddy.read_text()
