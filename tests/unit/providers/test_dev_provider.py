"""The development provider: what each model name promises, first as a plan, then over loopback HTTP."""

import asyncio
from itertools import islice

import orjson
import pytest

from mppnode.cli.devprovider_server import Gate, start_devprovider
from mppnode.kernel.usage import Usage
from mppnode.providers.base import UpstreamFault, UpstreamRequest
from mppnode.providers.dev import plan_for, prompt_tokens
from mppnode.providers.openai_compatible import OpenAICompatible, OpenAIDecoder
from mppnode.providers.quirks import Quirks
from mppnode.providers.transport import Transport, TransportLimits

WAIT_S = 5


def ask(model, text="one two three", **more):
    return {
        "model": f"dev/{model}",
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


def decode_completion(body):
    completion = OpenAICompatible(Quirks()).decode(body)
    return completion.document, completion.usage


def wire(request):
    return b"".join(data for _, data in plan_for(request).pieces)


def decode(data):
    decoder = OpenAIDecoder()
    return decoder.feed(data) + decoder.end()


def documents(chunks):
    return [orjson.loads(chunk.frame[6:]) for chunk in chunks if chunk.frame and not chunk.done]


def texts(chunks):
    return [
        choice["delta"]["content"]
        for document in documents(chunks)
        for choice in document.get("choices", [])
        if choice["delta"].get("content")
    ]


def finish_reasons(chunks):
    choices = [choice for document in documents(chunks) for choice in document["choices"]]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def reports(chunks):
    return [chunk.usage for chunk in chunks if chunk.usage is not None]


# ------------------------------------------------------------------------------------------------------------- plans


def test_a_stream_has_a_role_tokens_a_finish_a_report_and_an_end():
    """The shape every model shares: role, one token per event, finish reason, usage, end marker."""
    chunks = decode(wire(ask("echo", "one two three")))
    assert [chunk.tokens for chunk in chunks] == [0, 1, 1, 1, 0, 0, 0]
    assert documents(chunks)[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(texts(chunks)) == "one two three"
    assert [chunk.finished for chunk in chunks].index(True) == 4
    assert documents(chunks)[-1]["choices"] == []
    assert chunks[-1].done


@pytest.mark.parametrize("model", ["echo", "story", "slow", "burst"])
def test_the_report_is_exact(model):
    """Reported completion tokens are the events that carried content; the prompt is a quarter of its bytes."""
    chunks = decode(wire(ask(model, "x" * 41)))
    assert reports(chunks) == [Usage(prompt=10, completion=sum(chunk.tokens for chunk in chunks))]


def test_an_empty_prompt_is_one_token():
    """A prompt is never free."""
    assert prompt_tokens(ask("echo", "")) == 1


def test_a_prompt_is_counted_in_bytes():
    """Text outside ASCII counts by its UTF-8 length, as the node counts it."""
    assert prompt_tokens(ask("echo", "é" * 8)) == 4


@pytest.mark.parametrize(("limit", "tokens", "reason"), [({}, 160, "stop"), ({"max_tokens": 7}, 7, "length")])
def test_a_story_is_as_long_as_asked(limit, tokens, reason):
    """A story has 160 tokens unless the request limits it, and says which of the two ended it."""
    chunks = decode(wire(ask("story", **limit)))
    assert (len(texts(chunks)), finish_reasons(chunks)) == (tokens, [reason])


def test_the_newer_limit_is_obeyed_too():
    """``max_completion_tokens`` limits as ``max_tokens`` does, and is named as the reason."""
    chunks = decode(wire(ask("story", max_completion_tokens=5)))
    assert (len(texts(chunks)), finish_reasons(chunks)) == (5, ["length"])


def test_a_story_is_the_same_every_time_and_not_one_word_over_and_over():
    """Deterministic, so that recorded bills can be compared; varied, so that lost or swapped tokens show."""
    story = texts(decode(wire(ask("story"))))
    assert story == texts(decode(wire(ask("story"))))
    assert len(set(story)) > 8


def test_usage_is_sent_only_when_asked_for():
    """Without ``include_usage`` there is no report, and ``no-usage`` has none in any case."""
    assert reports(decode(wire(ask("story", stream_options=None)))) == []
    assert reports(decode(wire(ask("no-usage")))) == []
    assert decode(wire(ask("no-usage")))[-1].done


def test_false_reports_are_false_in_the_direction_their_name_says():
    """One model claims half of what it sent, one far more than it sent; both inside what a decoder accepts."""
    sent = len(texts(decode(wire(ask("story")))))
    assert reports(decode(wire(ask("usage-shrinks"))))[0].completion == sent // 2
    assert reports(decode(wire(ask("usage-huge"))))[0].completion > 64 * sent


@pytest.mark.parametrize(("model", "hangs", "dies"), [("stalls", True, False), ("dies-after-3", False, True)])
def test_a_stream_that_stops_short_has_three_tokens_and_no_end(model, hangs, dies):
    """Neither a finish reason nor an end marker follows the third token; the two differ in what the socket does."""
    plan = plan_for(ask(model))
    chunks = decode(b"".join(data for _, data in plan.pieces))
    assert (sum(chunk.tokens for chunk in chunks), plan.hangs, plan.dies) == (3, hangs, dies)
    assert not any(chunk.done or chunk.finished for chunk in chunks)


def test_never_ends_ignores_the_limit():
    """A provider that does not obey the token limit keeps sending tokens."""
    pieces = islice(plan_for(ask("never-ends", max_tokens=5)).pieces, 1_000)
    chunks = decode(b"".join(data for _, data in pieces))
    assert sum(chunk.tokens for chunk in chunks) == 999
    assert not any(chunk.done for chunk in chunks)


@pytest.mark.parametrize(("model", "code"), [("garbage", "invalid_frame"), ("error-in-200", "upstream_error")])
def test_a_broken_stream_is_seen_as_broken(model, code):
    """Text that is not JSON and an error inside a stream both end it, and the provider's words stay behind."""
    chunks = decode(wire(ask(model)))
    assert chunks[-1].error == code
    assert b"secret" not in b"".join(chunk.frame for chunk in chunks)


@pytest.mark.parametrize("model", ["injects", "injects-cr"])
def test_an_injection_never_becomes_an_event(model):
    """Control events in the text and on the wire, with LF and with CR, arrive as data lines or not at all."""
    data = wire(ask(model))
    assert b"event: payment-receipt" in data  # the attack is really in there
    chunks = decode(data)
    for line in b"".join(chunk.frame for chunk in chunks).split(b"\n"):
        assert line == b"" or line.startswith(b"data: ")
        assert b"\r" not in line
    assert "event: payment-receipt\r\ndata:" in "".join(texts(chunks))


def test_finish_only_costs_nothing():
    """A completion without a token: role, finish, a report of zero tokens, end."""
    chunks = decode(wire(ask("finish-only", max_tokens=5)))
    assert (texts(chunks), finish_reasons(chunks)) == ([], ["stop"])
    assert reports(chunks) == [Usage(prompt=3, completion=0)]


@pytest.mark.parametrize("model", ["echo", "story", "usage-huge"])
def test_a_whole_answer_says_what_the_stream_says(model):
    """With ``stream: false`` text and usage are those of the stream."""
    chunks = decode(wire(ask(model)))
    answer, usage = decode_completion(plan_for(ask(model, stream=False)).body)
    assert answer["choices"][0]["message"]["content"] == "".join(texts(chunks))
    assert [usage] == reports(chunks)


def test_failures_of_a_whole_answer():
    """A status 500 for one model, an error inside a 200 for another."""
    assert plan_for(ask("error-500")).status == plan_for(ask("error-500", stream=False)).status == 500
    plan = plan_for(ask("error-in-200", stream=False))
    assert plan.status == 200
    with pytest.raises(UpstreamFault) as caught:
        decode_completion(plan.body)
    assert (caught.value.kind, "secret" in str(caught.value)) == ("error", False)


# ------------------------------------------------------------------------------------- the ways a chaos test needs


@pytest.mark.parametrize("streamed", [True, False])
def test_a_rate_limit_says_when_to_come_back(streamed):
    """429 with Retry-After, with and without a stream."""
    plan = plan_for(ask("rate-limited", stream=streamed))
    assert (plan.status, dict(plan.headers), plan.pieces) == (429, {"Retry-After": "7"}, None)


def test_a_stall_before_the_first_token():
    """The role arrives, then nothing, and the connection stays open."""
    plan = plan_for(ask("stalls-first"))
    chunks = decode(b"".join(data for _, data in plan.pieces))
    assert ([chunk.tokens for chunk in chunks], plan.hangs) == ([0], True)
    plan = plan_for(ask("stalls-first", stream=False))
    assert (list(plan.pieces), plan.hangs) == ([], True)


def test_a_stall_in_the_middle():
    """Half of the story arrives, or half of the body."""
    plan = plan_for(ask("stalls-mid"))
    chunks = decode(b"".join(data for _, data in plan.pieces))
    assert (sum(chunk.tokens for chunk in chunks), plan.hangs) == (80, True)
    assert not any(chunk.finished or chunk.done for chunk in chunks)
    plan = plan_for(ask("stalls-mid", stream=False))
    half = b"".join(data for _, data in plan.pieces)
    assert half.startswith(b'{"id"')
    assert plan.hangs
    with pytest.raises(UpstreamFault):
        decode_completion(half)


@pytest.mark.parametrize("streamed", [True, False])
def test_garbage_in_a_200_is_no_answer(streamed):
    """P-32: a page of HTML under status 200 yields no chunk and no completion."""
    plan = plan_for(ask("garbage-200", stream=streamed))
    assert (plan.status, plan.content_type, decode(plan.body)) == (200, "text/html", [])
    with pytest.raises(UpstreamFault):
        decode_completion(plan.body)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("model", "expected"), [("lies-high", Usage(9, 0, 60)), ("lies-low", Usage(1, 0, 2))])
def test_lies_are_within_what_could_be_true(model, expected, streamed):
    """Reports that are off by a factor of three or ten, on both sides of the bill."""
    request = ask(model, max_tokens=20, stream=streamed)
    plan = plan_for(request)
    found = [decode_completion(plan.body)[1]] if plan.pieces is None else reports(decode(wire(request)))
    assert found == [expected]


def test_a_drip_is_many_small_frames():
    """One letter per event, at a fiftieth of the pace."""
    plan = plan_for(ask("drip", max_tokens=30))
    said = texts(decode(b"".join(data for _, data in plan.pieces)))
    assert (len(said), {len(letter) for letter in said}, plan.pace) == (30, {1}, 0.02)


def test_an_empty_answer_has_neither_tokens_nor_a_finish():
    """An end marker after nothing, or a message without text and without a reason to stop."""
    chunks = decode(wire(ask("empty")))
    assert ([chunk.tokens for chunk in chunks], chunks[-1].done) == ([0, 0], True)
    assert finish_reasons(chunks) == []
    answer, _ = decode_completion(plan_for(ask("empty", stream=False)).body)
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("", None)


def test_an_early_close_is_a_proper_end_of_http():
    """P-31: three tokens, no finish, no end marker, and neither a hang nor a reset tells that something is missing."""
    plan = plan_for(ask("closes-early"))
    chunks = decode(b"".join(data for _, data in plan.pieces))
    assert (sum(chunk.tokens for chunk in chunks), plan.hangs, plan.dies) == (3, False, False)
    assert not any(chunk.finished or chunk.done for chunk in chunks)


# ------------------------------------------------------------------------------------------------------ over loopback


class Reader:
    """Decodes what a response delivers, and lets a test wait for a number of tokens."""

    def __init__(self):
        self.decoder, self.chunks, self.error = OpenAIDecoder(), [], None
        self.ended, self._grown = asyncio.Event(), asyncio.Event()

    def on_body(self, data):
        self.chunks += self.decoder.feed(data)
        self._grown.set()

    def on_end(self, error):
        self.error = error
        self.ended.set()

    @property
    def tokens(self):
        return sum(chunk.tokens for chunk in self.chunks)

    async def until(self, tokens):
        while self.tokens < tokens:
            self._grown.clear()
            await asyncio.wait_for(self._grown.wait(), WAIT_S)

    async def end(self):
        await asyncio.wait_for(self.ended.wait(), WAIT_S)


def post(server, body):
    payload = body if isinstance(body, bytes) else orjson.dumps(body)
    return UpstreamRequest("POST", server.url + "/v1/chat/completions", (), payload)


@pytest.fixture
async def server():
    made = await start_devprovider(tokens_per_second=1e9)
    yield made
    await asyncio.wait_for(made.stop(), WAIT_S)


@pytest.fixture
async def transport(server):
    made = Transport(TransportLimits())
    yield made
    await asyncio.wait_for(made.close(), WAIT_S)


async def stream(transport, server, body):
    response = await asyncio.wait_for(transport.open(post(server, body)), WAIT_S)
    reader = Reader()
    response.attach(reader)
    return response, reader


async def until(condition):
    """Turn the loop until the server has noticed something."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0)


async def test_a_stream_arrives_as_planned(server, transport):
    """What a client decodes is what the plan says, and a finished request leaves nothing open."""
    _, reader = await stream(transport, server, ask("story"))
    await reader.end()
    assert reader.error is None
    assert [chunk.frame for chunk in reader.chunks] == [chunk.frame for chunk in decode(wire(ask("story")))]
    await until(lambda: server.live == 0)
    assert (server.requests, server.cancelled) == (1, 0)


async def test_a_gate_releases_tokens_one_by_one(server, transport):
    """No token passes before it is released, so a test decides what has been sent without waiting for a clock."""
    server.gate = Gate()
    _, reader = await stream(transport, server, ask("echo", "one two three"))
    for number in (1, 2, 3):
        assert reader.tokens == number - 1
        await server.gate.release(1)
        await reader.until(number)
    await reader.end()
    assert texts(reader.chunks) == ["one", " two", " three"]


async def test_hanging_up_is_noticed(server, transport):
    """A client that cancels is counted as gone and its stream is not kept alive."""
    server.gate = Gate()
    response, reader = await stream(transport, server, ask("never-ends"))
    await server.gate.release(2)
    await reader.until(2)
    assert (server.live, server.cancelled) == (1, 0)
    response.cancel()
    await until(lambda: server.cancelled == 1)
    assert server.live == 0


async def test_a_stalled_stream_stays_open(server, transport):
    """After three tokens nothing comes, neither bytes nor an end."""
    response, reader = await stream(transport, server, ask("stalls"))
    await reader.until(3)
    assert (server.live, reader.ended.is_set()) == (1, False)
    response.cancel()
    await until(lambda: server.cancelled == 1)


async def test_a_dying_stream_ends_early(server, transport):
    """After three tokens the connection is gone, which a client can tell from a proper end."""
    _, reader = await stream(transport, server, ask("dies-after-3"))
    await reader.end()
    assert (reader.tokens, reader.error.kind) == (3, "closed")


async def test_statuses_and_whole_answers(server, transport):
    """Answers without streaming come back with their status, and a body that is not JSON is refused."""
    for body, status in [
        (ask("error-500"), 500),
        (ask("echo", stream=False), 200),
        (b"{", 400),
    ]:
        response = await transport.open(post(server, body))
        assert response.status == status
        assert await response.read(10_000)
    assert server.requests == 3


async def test_headers_and_types_of_a_plan_are_sent(server, transport):
    """Retry-After and HTML arrive as such; an early close is no error of the transport."""
    response = await transport.open(post(server, ask("rate-limited")))
    assert (response.status, response.headers["retry-after"]) == (429, "7")
    await response.read(10_000)
    response = await transport.open(post(server, ask("garbage-200")))
    assert response.headers["content-type"] == "text/html"
    await response.read(10_000)
    _, reader = await stream(transport, server, ask("closes-early"))
    await reader.end()
    assert (reader.tokens, reader.error) == (3, None)


async def test_stopping_does_not_wait_for_streams(transport, server):
    """A server with open streams stops at once, its clients see the connection close, and none counts as gone."""
    _, reader = await stream(transport, server, ask("stalls"))
    await reader.until(3)
    await asyncio.wait_for(server.stop(), 0.9)  # under the second that the runner grants unfinished requests
    await reader.end()
    assert (reader.error.kind, server.live, server.cancelled) == ("closed", 0, 0)
