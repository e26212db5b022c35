"""Alerts: signed as receivers' libraries expect, sent nowhere they must not go, and never ending in an exception."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import hmac
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from mppnode.config.secrets import Secret
from mppnode.gateways.alerts import (
    ANSWER_BYTES_MAX,
    BODY_BYTES_MAX,
    AlertProblem,
    AlertSender,
    Delivered,
    Refused,
    Retry,
    alert_session,
    check_alert_url,
    new_alert_secret,
    parse_alert_secret,
    sign_alert,
)
from mppnode.kernel.addresses import PrivateAddress
from mppnode.kernel.clock import ManualClock

NOW = 1_900_000_000
TEXT = new_alert_secret(lambda count: bytes(range(count)))
KEY = parse_alert_secret(TEXT.reveal())
BODY = b'{"type":"credit.low"}'
Problem = AlertProblem


# ------------------------------------------------------------------------------------------------- secrets, signatures


def test_the_published_vector_is_met() -> None:
    """The signature of the convention's own test: standard-webhooks, libraries/python/tests/test_webhooks.py."""
    key = Secret(base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"))
    signed = sign_alert(key, id="msg_p5jXN8AQM9LWM0D4loKWxJek", timestamp=1_614_265_330, body=b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_secret_is_made_of_given_entropy_and_read_back() -> None:
    """32 bytes of entropy become ``whsec_`` and base64, and nothing prints them."""
    assert TEXT.reveal() == "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    assert KEY.reveal() == bytes(range(32))
    assert TEXT.reveal() not in repr((TEXT, KEY))
    with pytest.raises(ValueError, match="32 bytes"):
        new_alert_secret(lambda count: b"short")


@pytest.mark.parametrize(
    "text",
    [
        None, b"whsec_", 7, "", "whsec_", TEXT.reveal()[6:], TEXT.reveal()[:-1], TEXT.reveal() + "=", TEXT.reveal() + "\n", TEXT.reveal().replace("A", "-", 1),
        TEXT.reveal().replace("h8=", "h9="), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "WHSEC_" + TEXT.reveal()[6:], "whsec_\u0661" + TEXT.reveal()[7:],
        "whsec_" + base64.b64encode(bytes(33)).decode(), "whsec_" + base64.b64encode(bytes(31)).decode(),
    ],
)  # fmt: skip
def test_another_text_is_no_secret(text: object) -> None:
    """Exactly one text stands for a key, and the refusal does not repeat what was given."""
    with pytest.raises(ValueError, match="base64 of 32 bytes") as caught:
        parse_alert_secret(text)
    assert not isinstance(text, str) or len(text) < 8 or text not in str(caught.value)


@given(st.binary(min_size=32, max_size=32))
def test_every_key_survives_its_text(key: bytes) -> None:
    """Whatever the entropy was, the text reads back as it."""
    assert parse_alert_secret(new_alert_secret(lambda _: key).reveal()).reveal() == key


# ------------------------------------------------------------------------------------------------------------- places

GOOD = ["https://hooks.example.com", "https://hooks.example.com:8443/a/b?c=d&e=%2F", "https://[2001:db8::1]/x", "https://1.2.3.4?x=1", "https://a_b.example.com/~x"]
BAD = [
    "", "hooks.example.com", "ftp://hooks.example.com", "HTTPS://hooks.example.com", "https://", "https:///x", "https://user@hooks.example.com",
    "https://user:pw@hooks.example.com/", "https://hooks.example.com:0/", "https://hooks.example.com:65536/", "https://hooks.example.com:/", "https://h\u00f6oks.example.com/",
    "https://hooks.example.com/a b", "https://hooks.example.com/\r\nx: y", "https://hooks.example.com/#f", "https://hooks.example.com\\@10.0.0.1/", "https://hooks.example.com/\\",
    "https://hooks.example.com/" + "a" * 2048, "https://hooks.example.com:443@10.0.0.1/", "https://hooks.example.com/\n", "https://[::1/", "https://[]/",
]


def test_only_urls_of_one_reading_are_taken() -> None:
    """No user, no fragment, no other scheme, nothing two parsers could read differently; plain http in development."""
    assert [check_alert_url(url) for url in GOOD] == GOOD
    for url in BAD:
        with pytest.raises(ValueError, match="must"):
            check_alert_url(url, development=True)
    with pytest.raises(ValueError, match="https"):
        check_alert_url("http://hooks.example.com/")
    assert check_alert_url("http://127.0.0.1:80/", development=True)


# ------------------------------------------------------------------------------------------------------------ sending

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Receiver:
    """Somebody's server: keeps the requests it got, and answers as it is told."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.answer: bytes | Answer = b"HTTP/1.1 204 No Content\r\n\r\n"
        self.port = 0
        self.gone = asyncio.Event()

    async def hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            self.heard.append(head + await reader.readexactly(size))
            if isinstance(self.answer, bytes):
                writer.write(self.answer)
                await writer.drain()
            else:
                await self.answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.gone.set()
            writer.close()

    def header(self, name: str) -> str:
        for line in self.heard[-1].split(b"\r\n"):
            if line.lower().startswith(name.encode() + b": "):
                return line.partition(b": ")[2].decode()
        raise AssertionError(name)


@asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver.hear, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()


@asynccontextmanager
async def sending(**options: Any) -> AsyncIterator[AlertSender]:
    async with alert_session() as session:
        yield AlertSender(session, clock=ManualClock(NOW), **options)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as made:
        yield made


@pytest.fixture
async def sender() -> AsyncIterator[AlertSender]:
    async with sending(development=True) as made:
        yield made


async def send(sender: AlertSender, receiver: Receiver, path: str = "/hook") -> Delivered | Refused | Retry:
    return await sender.send(f"http://127.0.0.1:{receiver.port}{path}", KEY, id="alert_1", body=BODY)


async def test_an_alert_arrives_signed_over_id_time_and_body(receiver: Receiver, sender: AlertSender) -> None:
    """What arrives is the body as it was, with a signature that somebody else's recomputation finds right."""
    assert await send(sender, receiver, "/hook?a=%2Fb") == Delivered(204)
    assert receiver.heard[0].startswith(b"POST /hook?a=%2Fb HTTP/1.1\r\n")
    assert receiver.heard[0].endswith(b"\r\n\r\n" + BODY)
    assert (receiver.header("webhook-id"), receiver.header("webhook-timestamp")) == ("alert_1", str(NOW))
    digest = hmac.new(bytes(range(32)), b"alert_1.1900000000." + BODY, hashlib.sha256).digest()
    assert receiver.header("webhook-signature") == "v1," + base64.b64encode(digest).decode()
    assert receiver.header("content-type") == "application/json"
    assert b"cookie" not in receiver.heard[0].lower()


ENDS = [
    (b"200 OK\r\nContent-Length: 2\r\n\r\nok", Delivered(200)),
    (b"299 Odd\r\nContent-Length: 0\r\n\r\n", Delivered(299)),
    (b"410 Gone\r\nContent-Length: 0\r\n\r\n", Refused(Problem.GONE, 410)),
    (b"404 Not Found\r\nContent-Length: 0\r\n\r\n", Retry(Problem.STATUS, 404)),
    (b"301 Moved\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", Retry(Problem.STATUS, 301)),
    (b"429 Slow\r\nRetry-After: 120\r\nContent-Length: 0\r\n\r\n", Retry(Problem.STATUS, 429, 120)),
    (b"503 Busy\r\nRetry-After: 999999999\r\nContent-Length: 0\r\n\r\n", Retry(Problem.STATUS, 503, 86_400)),
    (b"503 Busy\r\nRetry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\nContent-Length: 0\r\n\r\n", Retry(Problem.STATUS, 503)),
    (b"503 Busy\r\nRetry-After: -5\r\nContent-Length: 0\r\n\r\n", Retry(Problem.STATUS, 503)),
    (b"503 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n", Retry(Problem.STATUS, 503, 0)),
    (b"200 OK\r\nContent-Length: 9\r\n\r\ncut", Delivered(200)),
    (b"200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope", Delivered(200)),
    (b"200 OK\r\nX: " + b"y" * 9_000 + b"\r\n\r\n", Retry(Problem.UNREACHABLE)),
    (b"200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n", Retry(Problem.UNREACHABLE)),
    (b"200 OK\r\nContent-Length: -1\r\n\r\n", Retry(Problem.UNREACHABLE)),
    (b"\xff\xfe\x00", Retry(Problem.UNREACHABLE)),
    (b"", Retry(Problem.UNREACHABLE)),
]


@pytest.mark.parametrize(("answer", "outcome"), ENDS, ids=lambda value: str(value)[:40])
async def test_an_answer_is_judged_by_its_status_alone(receiver: Receiver, sender: AlertSender, answer: bytes, outcome: object) -> None:
    """2xx is delivered, 410 is the end, everything else is tried later, however broken or large the answer is."""
    receiver.answer = b"HTTP/1.1 " + answer if answer else b""
    assert await send(sender, receiver) == outcome
    assert len(receiver.heard) == 1, "one call is one attempt, and no redirect is followed"


async def test_an_endless_answer_is_cut_off(receiver: Receiver, sender: AlertSender) -> None:
    """More than a kilobyte of answer is not read: the receiver sees the connection end."""
    sent = 0

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            sent += 4096
            await writer.drain()

    receiver.answer = endless
    assert await send(sender, receiver) == Delivered(200)
    await asyncio.wait_for(receiver.gone.wait(), 5)
    assert sent > ANSWER_BYTES_MAX


async def test_an_answer_that_stops_halfway_is_still_an_answer(receiver: Receiver) -> None:
    """A receiver that said 200 and then nothing has the alert."""

    async def halfway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx")
        await reader.read()

    receiver.answer = halfway
    async with sending(development=True, total_s=0.2) as sender:
        assert await send(sender, receiver) == Delivered(200)


async def test_a_silent_receiver_is_left_in_time(receiver: Receiver) -> None:
    """Whoever does not answer within the limit is asked again later."""

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    receiver.answer = silent
    async with sending(development=True, total_s=0.05) as sender:
        assert await send(sender, receiver) == Retry(Problem.TIMEOUT)


async def test_a_name_that_takes_forever_is_left_in_time() -> None:
    """Looking a name up counts towards the limit."""

    async def forever(_: str, __: int) -> str:
        await asyncio.Event().wait()
        return ""

    async with sending(guard=forever, total_s=0.02) as sender:
        assert await sender.send("https://hooks.example.com/", KEY, id="a", body=BODY) == Retry(Problem.TIMEOUT)


async def test_only_cancellation_leaves_the_sender(receiver: Receiver, sender: AlertSender) -> None:
    """A cancelled caller is cancelled, and not told of an outcome."""
    heard = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        heard.set()
        await reader.read()

    receiver.answer = silent
    task = asyncio.get_running_loop().create_task(send(sender, receiver))
    await asyncio.wait_for(heard.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nobody_there_and_a_closed_session_are_tried_later(unused_tcp_port: int) -> None:
    """A refused connection, and even a session that is closed already, are outcomes."""
    url = f"http://127.0.0.1:{unused_tcp_port}/"
    async with alert_session() as session:
        sender = AlertSender(session, clock=ManualClock(NOW), development=True)
        assert await sender.send(url, KEY, id="a", body=BODY) == Retry(Problem.UNREACHABLE)
    assert await sender.send(url, KEY, id="a", body=BODY) == Retry(Problem.UNREACHABLE)


@pytest.mark.parametrize(("ident", "body"), [("", BODY), ("a.b", BODY), ("a\r\nb", BODY), ("x" * 65, BODY), ("a", b"x" * (BODY_BYTES_MAX + 1))])
async def test_an_alert_that_may_not_be_sent_is_not(receiver: Receiver, sender: AlertSender, ident: str, body: bytes) -> None:
    """An id that could be read as part of the time, or a body beyond the limit, never leaves."""
    assert await sender.send(f"http://127.0.0.1:{receiver.port}/", KEY, id=ident, body=body) == Refused(Problem.BAD_ALERT)
    assert receiver.heard == []


# -------------------------------------------------------------------------------------------------- private networks


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254"])
async def test_our_own_network_is_out_of_reach(receiver: Receiver, host: str) -> None:
    """However a private address is written, nothing is connected to."""
    async with sending() as sender:
        outcome = await sender.send(f"https://{host}:{receiver.port}/", KEY, id="a", body=BODY)
    assert outcome in (Retry(Problem.PRIVATE_ADDRESS), Retry(Problem.UNREACHABLE))
    assert not receiver.gone.is_set()


async def test_the_guard_is_asked_and_plain_http_is_refused(receiver: Receiver) -> None:
    """A name is looked up by the guard, once, with the port; http outside development is refused before that."""
    asked: list[tuple[str, int]] = []

    async def guard(host: str, port: int) -> str:
        asked.append((host, port))
        raise PrivateAddress("private")

    async with sending(guard=guard) as sender:
        assert await sender.send("http://hooks.example.com/", KEY, id="a", body=BODY) == Refused(Problem.BAD_URL)
        assert asked == []
        assert await sender.send("https://hooks.example.com/", KEY, id="a", body=BODY) == Retry(Problem.PRIVATE_ADDRESS)
        assert await sender.send("https://hooks.example.com:8443/", KEY, id="a", body=BODY) == Retry(Problem.PRIVATE_ADDRESS)
    assert asked == [("hooks.example.com", 443), ("hooks.example.com", 8443)]


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's context around one certificate that says ``name``."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    day = dt.timedelta(days=1)
    at = dt.datetime.now(dt.UTC)  # noqa: TID251 - TLS reads the machine's clock
    made = (
        x509.CertificateBuilder()
        .subject_name(subject).issuer_name(subject).public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(at - day).not_valid_after(at + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    public = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "both.pem").write_bytes(public + private)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "both.pem")
    return server, ssl.create_default_context(cadata=public.decode())


async def test_the_name_is_in_tls_and_host_though_the_address_is_connected_to(tmp_path: Path) -> None:
    """The address the guard looked at is used; the certificate must still be the name's, and one nobody signed is not."""

    async def here(_: str, __: int) -> str:
        return "127.0.0.1"

    server, trust = certificate(tmp_path, "hooks.example.com")
    async with receiving(server) as receiver, sending(guard=here, tls=trust) as sender:
        assert await sender.send(f"https://hooks.example.com:{receiver.port}/x?y", KEY, id="a", body=BODY) == Delivered(204)
        assert receiver.header("host") == f"hooks.example.com:{receiver.port}"
        assert await sender.send(f"https://other.example.com:{receiver.port}/", KEY, id="a", body=BODY) == Retry(Problem.UNREACHABLE)
        async with sending(guard=here) as strict:
            assert await strict.send(f"https://hooks.example.com:{receiver.port}/", KEY, id="a", body=BODY) == Retry(Problem.UNREACHABLE)
    assert len(receiver.heard) == 1


async def test_no_secret_is_in_an_outcome_or_a_repr(receiver: Receiver, sender: AlertSender) -> None:
    """Neither the key nor what a receiver said is in what the sender returns or is."""
    receiver.answer = b"HTTP/1.1 500 canary-words\r\nContent-Length: 12\r\n\r\ncanary-words"
    outcome = await send(sender, receiver)
    texts = [repr(outcome), repr(sender), str(vars(sender))]
    assert isinstance(outcome, Retry)
    assert not any("canary" in text or TEXT.reveal() in text for text in texts)
