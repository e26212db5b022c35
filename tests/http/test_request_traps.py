"""Requests: T-44 to T-47 and T-50, P19, the parameter table of the chat API, and the limits of what is read."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from channels.descriptor import Escrow
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.schema import LimitsConfig
from tests.http.test_open_traps import BOTH
from tests.support.http_client import PATH, UNIT, World, chat, cost, new_world

MIB = 1024 * 1024


async def unchanged(world: World, body: object, credential: str, status: int, code: str) -> Any:
    """A paid request that is refused for what it asks, before its money is looked at."""
    before = await world.state()
    reply = await world.send(body, credential)
    assert (reply.status, reply.code) == (status, code), reply.body
    assert "Payment-Receipt" not in reply.headers
    assert await world.state() == before
    return reply


# --------------------------------------------------------------------------------------------- content or management


async def test_t44_a_chunked_body_is_a_body(world: World) -> None:
    """T-44, P19: content without a content length is content, and charged once."""
    channel, body = await world.opened(), chat("dev/story", stream=False, max_tokens=4)
    credential = await world.pay(world.payer.voucher(channel, UNIT), body)
    data = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\nAuthorization: {credential}\r\n\r\n"
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (data[:7], data[7:])) + b"0\r\n\r\n"
    answer = await world.raw(head.encode(), pieces)
    assert answer.startswith(b"HTTP/1.1 200")
    assert (await world.account(channel)).owed_pico == cost(4, 2)


@pytest.mark.parametrize("framing", ["Content-Length: 0", "Transfer-Encoding: chunked", "X: y"])
async def test_p19_an_empty_body_is_no_body(world: World, framing: str) -> None:
    """P19, T-45: no length, a zero one or an empty chunked one: all are management, and none is charged."""
    channel = await world.opened()
    credential = await world.pay(world.payer.voucher(channel, 2 * UNIT))
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {credential}\r\n{framing}\r\n\r\n"
    answer = await world.raw(head.encode(), b"0\r\n\r\n" if "chunked" in framing else b"")
    assert answer.startswith(b"HTTP/1.1 204")
    assert (await world.account(channel)).owed_pico == 0


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: -1",
        "Content-Length: 0x5",
        "Content-Length: +5",
        "Transfer-Encoding: gzip, chunked\r\nX: \x00",
    ],
)
async def test_n3_ambiguous_framing_is_refused(world: World, framing: str) -> None:
    """N3, P19: a body with two lengths, or none that can be read, is a 400 before anything is looked at."""
    channel = await world.opened()
    credential = await world.pay(world.payer.voucher(channel, 2 * UNIT))
    before = await world.state()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {credential}\r\n{framing}\r\n\r\n"
    answer = await world.raw(head.encode(), b"0\r\n\r\n")
    assert b" 400 " in answer[:20]
    assert await world.state() == before


@BOTH
async def test_t46_management_with_a_body_is_management(world: World, escrow: Escrow) -> None:
    """T-46: a close or top-up sent along with a chat body manages the channel; the body buys nothing."""
    channel, body = await world.opened(escrow), chat()
    topped = await world.buy(body, world.payer.top_up(channel, 1_000))
    assert (topped.status, topped.body) == (204, b"")
    closed = await world.buy(body, world.payer.close(channel, UNIT))
    assert closed.status == 204
    assert world.net.provider.requests == 0


async def test_t47_management_takes_the_challenge_of_any_request(world: World) -> None:
    """T-47: price and model of a challenge bind content only: vouchers, top-ups and closes come with any of ours."""
    channel = await world.opened()
    challenge = await world.challenge(chat("dev/slow", "x" * 5_000, max_tokens=9_000))
    for payload in (world.payer.voucher(channel, 3 * UNIT), world.payer.top_up(channel, 1_000), world.payer.close(channel, 3 * UNIT)):
        assert (await world.send(None, world.payer.credential(challenge, payload))).status == 204


async def test_t50_nothing_redirects(world: World) -> None:
    """T-50: no spelling of the path leads elsewhere: it is the route or it is not."""
    credential = await world.pay(world.payer.open(world.payer.channel()))
    before = await world.state()
    for path in ("/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions", "/V1/chat/completions", "/v1/chat", "/"):
        reply = await world.send(None, credential, path=path)
        assert reply.status in (404, 405)
        assert "Location" not in reply.headers
    assert await world.state() == before


# ------------------------------------------------------------------------------------------------- the parameter table

TEXT = [{"role": "user", "content": "hi"}]
PARAMETERS: list[tuple[str, Any, str]] = [
    ("model", ..., "model"), ("model", 5, "model"), ("model", "", "model"), ("model", "a b", "model"),
    ("model", "x" * 300, "model"), ("model", None, "model"), ("model", ["dev/echo"], "model"),
    ("messages", ..., "messages"), ("messages", [], "messages"), ("messages", "hi", "messages"),
    ("messages", {}, "messages"), ("messages", TEXT * 4_097, "messages"), ("messages", [5], "messages[0]"),
    ("messages", [{"content": "hi"}], "messages[0].role"),
    ("messages", [{"role": "king", "content": "hi"}], "messages[0].role"),
    ("messages", [*TEXT, {"role": "user"}], "messages[1].content"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
    ("messages", [{"role": "user", "content": []}], "messages[0].content"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ("messages", [{"role": "user", "content": [{"type": "video"}]}], "messages[0].content[0].type"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}], "messages[0].content[0].image_url.url"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}], "messages[0].content[0].image_url.url"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}], "messages[0].content[0].image_url.url"),
    ("messages", [{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
    ("messages", [{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ("messages", [{"role": "assistant", "tool_calls": [{"id": "1", "type": ["function"]}]}], "messages[0].tool_calls[0].type"),
    ("stream", "true", "stream"), ("stream", 1, "stream"), ("stream", [], "stream"),
    ("max_tokens", 0, "max_tokens"), ("max_tokens", -1, "max_tokens"), ("max_tokens", 1.5, "max_tokens"),
    ("max_tokens", "5", "max_tokens"), ("max_tokens", True, "max_tokens"), ("max_tokens", 10**7, "max_tokens"),
    ("temperature", 2.1, "temperature"), ("temperature", -0.1, "temperature"), ("temperature", "1", "temperature"),
    ("temperature", True, "temperature"), ("temperature", [1], "temperature"),
    ("top_p", 1.01, "top_p"), ("top_p", -1, "top_p"), ("top_p", {}, "top_p"),
    ("stop", 5, "stop"), ("stop", ["a"] * 5, "stop"), ("stop", [""], "stop[0]"), ("stop", ["a", 7], "stop[1]"),
    ("stop", "", "stop"), ("stop", "x" * 2_000, "stop"),
    ("frequency_penalty", 2.5, "frequency_penalty"), ("frequency_penalty", "0", "frequency_penalty"),
    ("presence_penalty", -2.5, "presence_penalty"), ("presence_penalty", [], "presence_penalty"),
    ("timeout_ms", 0, "timeout_ms"), ("timeout_ms", 30_001, "timeout_ms"), ("timeout_ms", "100", "timeout_ms"),
    ("timeout_ms", 0.5, "timeout_ms"),
    ("routing_strategy", "best", "routing_strategy"), ("routing_strategy", 1, "routing_strategy"),
    ("routing_strategy", ["fastest"], "routing_strategy"),
    ("allow_external", "yes", "allow_external"), ("allow_external", 0, "allow_external"),
    ("max_input_price_per_million", 100, "max_output_price_per_million"),
    ("max_output_price_per_million", 100, "max_input_price_per_million"),
    ("max_input_price_per_million", -1, "max_input_price_per_million"),
    ("max_output_price_per_million", 1.5, "max_output_price_per_million"),
    ("n", 0, "n"), ("n", 9, "n"), ("n", "2", "n"), ("stream_options", [], "stream_options"),
    ("stream_options", {"include_usage": 1}, "stream_options.include_usage"), ("tools", {}, "tools"),
    ("tools", [5], "tools[0]"), ("response_format", "json", "response_format"), ("audio", {"voice": "x"}, "audio"),
    ("web_search_options", {}, "web_search_options"), ("modalities", ["audio"], "modalities"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "field"), PARAMETERS, ids=lambda v: repr(v)[:24])
async def test_the_parameter_table(world: World, name: str, value: Any, field: str) -> None:
    """The chat parameters: each bad value is a 400 that names its field, paid or not, and nothing is charged."""
    body = chat()
    if value is ...:
        del body[name]
    else:
        body[name] = value
    channel = await world.opened()
    credential = await world.pay(world.payer.voucher(channel, 2 * UNIT), chat())
    reply = await unchanged(world, body, credential, 400, "invalid_field")
    assert reply.field == field
    assert reply.headers["x-should-retry"] == "false"
    unpaid = await world.send(body)
    assert (unpaid.status, unpaid.field) == (400, field), "a bad request learns so before it pays"


@pytest.mark.parametrize("both", [{"max_tokens": 5, "max_completion_tokens": 6}])
async def test_two_limits_that_differ_are_refused(world: World, both: dict[str, int]) -> None:
    """One limit under two names is one limit; two are a mistake that could bill for the larger."""
    reply = await world.send(chat(**both))
    assert (reply.status, reply.field) == (400, "max_completion_tokens")
    assert (await world.send(chat(max_tokens=5, max_completion_tokens=5))).status == 402


async def test_every_parameter_at_its_bounds_is_accepted(world: World) -> None:
    """The same table from the inside: the bounds themselves, and null for "not said", are accepted."""
    edges: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 2}, {"top_p": 1}, {"top_p": 0.0}, {"stop": "x"}, {"stop": ["a"] * 4},
        {"frequency_penalty": -2}, {"presence_penalty": 2.0}, {"timeout_ms": 30_000}, {"routing_strategy": "cheapest"},
        {"routing_strategy": "fastest"}, {"routing_strategy": "balanced"}, {"allow_external": False},
        {"max_input_price_per_million": 50, "max_output_price_per_million": 10**6}, {"n": 1}, {"stream": None},
        {"max_tokens": None, "temperature": None, "stop": None, "timeout_ms": None}, {"user": "u", "seed": 7},
    ]  # fmt: skip
    for edge in edges:
        assert (await world.send(chat(**edge))).status == 402, edge


async def test_the_node_steers_by_its_own_fields_and_forwards_none_of_them(world: World) -> None:
    """Routing fields, the caller's stream options and its headers never reach the provider; the caller's text does."""
    channel = await world.opened()
    body = chat("dev/echo", stream=False, max_tokens=4, timeout_ms=9_000, routing_strategy="fastest", temperature=0.5, models=["dev/echo"], provider={"order": ["dev"]}, transforms=["y"], stream_options={"include_usage": False})
    credential = await world.pay(world.payer.voucher(channel, UNIT), body)
    reply = await world.send(body, credential, headers={"OpenAI-Organization": "secret-org", "Cookie": "a=b"})
    assert reply.status == 200
    sent = world.net.provider.last_request
    assert sent["temperature"] == 0.5
    assert sent["max_tokens"] == 4
    forbidden = {"timeout_ms", "routing_strategy", "models", "provider", "transforms", "allow_external", "route"}
    assert not forbidden & set(sent)
    headers = {name.lower(): value for name, value in world.net.provider.last_headers.items()}
    assert not {"cookie", "openai-organization", "payment-authorization"} & set(headers)
    assert "Payment" not in headers.get("authorization", "")


async def test_an_unknown_model_is_a_404_with_near_names(world: World) -> None:
    """A typing mistake is answered with what is sold; a name near nothing with nothing; neither is echoed or charged."""
    channel = await world.opened()
    credential = await world.pay(world.payer.voucher(channel, 2 * UNIT), chat())
    near = await unchanged(world, chat("dev/storey"), credential, 404, "unknown_model")
    assert "dev/story" in near.json["error"]["message"]
    assert b"storey" not in near.body
    far = await unchanged(world, chat("zzz/qqqq"), credential, 404, "unknown_model")
    assert "did you mean" not in far.json["error"]["message"]


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b"null", b'"x"', b"5", b"\xff", b"\xef\xbb\xbf{}", b"{}x", b"{'a':1}", b'{"a":NaN}', b'{"a":-Infinity}',
        b'{"a":1e999}', b'{"a":' + b"9" * 5_000 + b"}", b'{"a":18446744073709551616}', b'{"a":"\\ud800"}',
        b'{"\\udc00":1}', b'{"model":"a","model":"b"}', b'{"a":' + b"[" * 100_000, b"[" * 500_000,
        b'{"a":' + b'{"b":' * 64 + b"1" + b"}" * 65, b'{"a":[' + b",".join(b'{"b":1}' for _ in range(10_001)) + b"]}",
        b"a=b&c=d", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--', b"\x1f\x8b\x08\x00",
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
async def test_2_0_bodies_that_are_not_one_strict_json_object(world: World, body: bytes) -> None:
    """2.0, P34: every body two readers could understand differently is a 400, at once and for free."""
    channel = await world.opened()
    credential = await world.pay(world.payer.voucher(channel, 2 * UNIT), chat())
    await unchanged(world, body, credential, 400, "invalid_json")


async def test_2_9_nesting_at_the_limit_and_one_deeper(world: World) -> None:
    """2.9: 64 levels of a chat body are read, 65 are not."""

    def nested(levels: int) -> dict[str, Any]:
        inner: Any = 1
        for _ in range(levels - 1):
            inner = {"x": inner}
        return chat(metadata=inner)

    assert (await world.send(nested(64))).status == 402
    assert (await world.send(nested(65))).code == "invalid_json"


async def test_2_9_keys_at_the_limit_and_one_more(world: World) -> None:
    """2.9: 10,000 names in one body are read, one more is not."""
    own = 4  # model, messages, role, content
    fits = chat(**{f"k{n}": 1 for n in range(10_000 - own)})
    assert (await world.send(fits)).status == 402
    assert (await world.send(fits | {"one": 1})).code == "invalid_json"


async def test_2_9_bodies_at_the_limit_one_more_and_ten_times(world: World) -> None:
    """2.9, P34: a mebibyte is read, a byte more is a 413 in our words, and so is ten times as much."""
    empty = len(json.dumps(chat("dev/echo", "")))
    at_limit = await world.send(chat("dev/echo", "x" * (MIB - empty)))
    assert (at_limit.status, at_limit.field) == (400, "messages"), "read, and found too long for the model"
    for size in (MIB - empty + 1, 10 * MIB):
        reply = await world.send(chat("dev/echo", "x" * size))
        assert (reply.status, reply.code) == (413, "body_too_large")


async def test_2_9_a_body_limit_of_the_operators_own(world: World) -> None:
    """2.9: the limit is configuration: the same body passes one node and not the other."""
    body = chat("dev/echo", "x" * 2_000)
    assert (await world.send(body)).status == 402
    options = DevnetOptions(tokens_per_second=0.0, limits=LimitsConfig(body_bytes_max=1_000, drain_s=2))
    async with new_world(options) as small:
        assert (await small.send(body)).code == "body_too_large"


async def test_p34_compressed_bodies_are_not_read(world: World) -> None:
    """P34: a kilobyte that unpacks to a gigabyte is never unpacked."""
    bomb = gzip.compress(bytes(50 * MIB))
    assert len(bomb) < MIB
    for encoding in ("gzip", "deflate", "br", "zstd", "identity", "x"):
        for body in (bomb, b"\x1f\x8b" + bytes(100), json.dumps(chat()).encode()):
            reply = await world.send(body, headers={"Content-Encoding": encoding})
            assert (reply.status, reply.code) == (415, "unsupported_media_type"), encoding


async def test_2_9_header_sizes(world: World) -> None:
    """2.9, T5: a credential of 16 KiB is read as one, one character more is malformed, a huge header is a 400."""
    fits, above = "A" * 16_384, "A" * 16_388
    for text in (fits, above):
        reply = await world.send(None, f"Payment {text}")
        assert (reply.status, reply.code) == (402, "malformed_credential")
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n"
    huge = await world.raw((head + "Authorization: Payment " + "A" * 300_000 + "\r\n\r\n").encode())
    assert huge == b"" or b" 400 " in huge[:20] or b" 431 " in huge[:20]
    many = await world.raw((head + "".join(f"X-{n}: y\r\n" for n in range(10_000)) + "\r\n").encode())
    assert many == b"" or b" 400 " in many[:20] or b" 431 " in many[:20]
    line = await world.raw(f"POST /{'x' * 100_000} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert line == b"" or b" 400 " in line[:20] or b" 414 " in line[:20]
    assert (await world.send(chat())).status == 402, "the node is well"


@pytest.mark.parametrize(
    "text",
    [b"GARBAGE\r\n\r\n", b"POST\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"POST / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"POST / HTTP/1.1\r\nA\r\n\r\n", b"POST / HTTP/1.1\r\n A: b\r\n\r\n", b"POST / HTTP/1.1\nHost: x\n\n"],
    ids=lambda text: repr(text[:16]),
)
async def test_n3_what_is_not_http_is_not_answered_with_a_mistake(world: World, text: bytes) -> None:
    """N3: bytes that are no request are a 4xx or a closed connection."""
    answer = await world.raw(text.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
    assert answer == b"" or answer.split()[1][:1] == b"4"
    assert (await world.send(chat())).status == 402


async def test_2_9_too_many_live_requests_are_refused_before_money_moves() -> None:
    """2.9: a node that is full says so with 503 before it takes an open's deposit, and serves again afterwards."""
    options = DevnetOptions(tokens_per_second=0.0, limits=LimitsConfig(streams_max=1, drain_s=2))
    async with new_world(options) as world:
        gate, first, body = world.gate(), world.payer.channel(), chat("dev/story", max_tokens=5)
        second = world.payer.channel()
        opening = await world.pay(world.payer.open(second), body)
        async with world.stream(body, await world.pay(world.payer.open(first), body)) as stream:
            before = await world.state()
            reply = await world.send(body, opening)
            assert (reply.status, reply.code) == (503, "overloaded")
            assert int(reply.headers["Retry-After"]) >= 1
            assert await world.state() == before
            managed = await world.manage(world.payer.voucher(first, 2 * UNIT))
            assert managed.status == 204, "vouchers are never refused for want of room"
            await gate.release(5)
            await stream.rest()
        await world.settled()
        world.net.provider.gate = None
        assert (await world.send(body, opening)).status == 200
