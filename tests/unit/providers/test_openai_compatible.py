"""Requests to OpenAI-compatible providers, and the decoder of what they stream back."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mppnode.kernel.requests import NODE_ONLY, ChatLimits, parse_chat
from mppnode.kernel.usage import Usage
from mppnode.providers.base import Call, UpstreamFault
from mppnode.providers.openai_compatible import (
    CHOICES_MAX,
    FRAME_BYTES_MAX,
    TOKENS_MAX,
    OpenAICompatible,
    OpenAIDecoder,
    parse_usage,
)
from mppnode.providers.quirks import Quirks


def event(delta=None, **more):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": None}]
    return b"data: " + orjson.dumps({"id": "c", "choices": choices, **more}) + b"\n\n"


WORD = event({"content": "word"})
DONE = b"data: [DONE]\n\n"


def decode(data, cuts=()):
    decoder, chunks, last = OpenAIDecoder(), [], 0
    for cut in [*sorted(cuts), len(data)]:
        chunks += decoder.feed(data[last:cut])
        last = cut
    return chunks + decoder.end()


def payloads(chunks):
    return [orjson.loads(chunk.frame[6:]) for chunk in chunks if chunk.frame and not chunk.done]


# ------------------------------------------------------------------------------------------------------------ frames


def test_a_canonical_event_is_forwarded_as_it_came():
    """Bytes that are already one data line of JSON are not written anew, whatever their spacing inside."""
    odd = b'data: {"choices": [ {"delta":{"content":"\\u00e9"}} ] , "x":1.0}\n\n'
    assert [chunk.frame for chunk in decode(odd + WORD)] == [odd, WORD]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_of_the_grammar_is_understood(end):
    """LF, CRLF and CR frame alike, and what is forwarded always uses LF."""
    stream = (WORD + WORD + DONE).replace(b"\n", end)
    assert [chunk.frame for chunk in decode(stream)] == [WORD, WORD, DONE]


def test_only_data_is_forwarded():
    """Event names, ids, retry hints and comments of a provider never leave the decoder."""
    noisy = b": ping\n\nevent: payment-receipt\nid: 7\nretry: 1\nextra\n" + WORD + b": bye\n\n"
    assert [chunk.frame for chunk in decode(noisy)] == [WORD]


def test_a_forged_payment_event_is_reduced_to_its_payload():
    """A provider that writes our control events gets a plain message through at most."""
    forged = b'event: payment-need-voucher\r\ndata: {"requiredCumulative":"9"}\r\n\r\n'
    assert [chunk.frame for chunk in decode(forged)] == [b'data: {"requiredCumulative":"9"}\n\n']


@given(st.text(max_size=60))
def test_generated_text_cannot_leave_its_line(text):
    """Whatever a model says, a frame is one data line and one blank line, and the text inside is unchanged."""
    (chunk,) = decode(event({"content": text}))
    assert chunk.frame.count(b"\n") == 2
    assert b"\r" not in chunk.frame
    assert orjson.loads(chunk.frame[6:])["choices"][0]["delta"]["content"] == text


def test_an_event_over_several_data_lines_becomes_one():
    """Line ends between JSON tokens are legal in an event and would split our frame, so they are removed."""
    chunks = decode(b'data: {"choices":\ndata: [{"delta":{"content":"a"}}]}\n\n')
    assert [chunk.frame for chunk in chunks] == [b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n']
    assert chunks[0].tokens == 1


@pytest.mark.parametrize("line", [b"data:{}", b"data:  {}", b"data: {} ", b"data: \t{}"])
def test_spacing_around_a_payload_is_normalised(line):
    """However the provider spaces its line, ours has one space: a client may match the prefix exactly."""
    (chunk,) = decode(line + b"\n\n")
    assert chunk.frame.startswith(b"data: {}")
    assert chunk.frame.rstrip().endswith(b"{}")


def test_a_byte_order_mark_is_dropped_once():
    """A mark at the very start is not part of the first field's name."""
    assert [chunk.frame for chunk in decode(b"\xef\xbb\xbf" + WORD)] == [WORD]


PIECES = st.sampled_from(
    [
        WORD,
        event({"content": "\u00e9\u2028\U0001f600 \r\n\n"}),
        event({"role": "assistant", "content": ""}),
        event(usage={"prompt_tokens": 3, "completion_tokens": 2}),
        b": comment\n\n",
        b"event: x\nid: 1\n" + WORD,
        b"data:{}\n\n",
        b'data: {"spaced":1} \n\n',
        b'data: {"a":\ndata: 1}\n\n',
        b"\n\n\n",
        DONE,
        b"data: nonsense\n\n",
        event(error={"message": "x"}),
    ]
)


@given(st.lists(PIECES, max_size=8), st.sampled_from([b"\n", b"\r\n", b"\r"]), st.data())
def test_the_result_does_not_depend_on_how_bytes_arrive(pieces, end, data):
    """Any division into reads, down to single bytes, gives the chunks of the undivided stream."""
    stream = b"".join(pieces).replace(b"\n", end)
    cuts = data.draw(st.sets(st.integers(0, len(stream))))
    whole = decode(stream)
    assert decode(stream, cuts) == whole
    assert decode(stream, range(len(stream))) == whole


@given(st.binary(max_size=300), st.data())
def test_no_bytes_can_raise_or_break_a_frame(noise, data):
    """Arbitrary bytes end in chunks whose every frame is one line we would have written."""
    cuts = data.draw(st.sets(st.integers(0, len(noise))))
    for chunk in decode(noise, cuts):
        assert chunk.frame == b"" or (chunk.frame.startswith(b"data: ") and chunk.frame.endswith(b"\n\n"))
        assert chunk.frame.count(b"\n") in {0, 2}


# ------------------------------------------------------------------------------------------------------- counts, ends


@pytest.mark.parametrize(
    ("delta", "tokens"),
    [
        ({"content": "a"}, 1),
        ({"content": " "}, 1),
        ({"reasoning_content": "a"}, 1),
        ({"reasoning": "a", "content": ""}, 1),
        ({"tool_calls": [{"index": 0}]}, 1),
        ({"refusal": "no"}, 1),
        ({"role": "assistant"}, 0),
        ({"role": "assistant", "content": ""}, 0),
        ({"content": None, "tool_calls": []}, 0),
        ({}, 0),
    ],
)
def test_an_event_counts_when_it_carries_output(delta, tokens):
    """One for generated output of any kind, nothing for roles, finishes and empty strings."""
    assert [chunk.tokens for chunk in decode(event(delta))] == [tokens]


@pytest.mark.parametrize(
    ("choices", "tokens"),
    [
        ([{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "b"}}], 2),
        ([{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"role": "assistant"}}], 1),
        ([{"index": 0, "delta": {"content": "a"}}, {"index": 0, "delta": {"content": "b"}}], 1),
        ([{"delta": {"content": "a"}}], 1),
        ([{"index": [0], "delta": {"content": "a"}}, {"index": {}, "delta": {"content": "b"}}], 2),
        ([{"index": 0, "text": "a"}, {"index": 1, "text": ""}], 1),
        ([{"index": 0, "delta": None, "text": "a"}], 1),
    ],
)
def test_every_choice_with_output_counts_once(choices, tokens):
    """An event that carries several choices is as many tokens, whatever a provider writes as their index."""
    (chunk,) = decode(b"data: " + orjson.dumps({"choices": choices}) + b"\n\n")
    assert (chunk.tokens, chunk.error) == (tokens, None)


def test_choices_are_bounded():
    """As many choices as can be asked for are counted, one more is a broken frame."""
    choices = [{"index": n, "delta": {"content": "a"}} for n in range(CHOICES_MAX + 1)]
    most, over = (decode(b"data: " + orjson.dumps({"choices": some}) + b"\n\n") for some in (choices[:-1], choices))
    assert [chunk.tokens for chunk in most] == [CHOICES_MAX]
    assert [chunk.error for chunk in over] == ["invalid_frame"]


def test_finish_usage_and_done_are_recognised():
    """The closing events of a stream carry their meaning and no tokens."""
    finish = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    report = event(usage={"prompt_tokens": 3, "completion_tokens": 2})
    chunks = decode(WORD + finish + report + DONE + WORD)
    assert [chunk.finished for chunk in chunks] == [False, True, False, False]
    assert [chunk.tokens for chunk in chunks] == [1, 0, 0, 0]
    assert chunks[2].usage == Usage(prompt=3, completion=2)
    assert chunks[3].done


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (b"data: {not json\n\n", "invalid_frame"),
        (b"data: hello\n\n", "invalid_frame"),
        (b"data: [1]\n\n", "invalid_frame"),
        (b'data: {"choices":{}}x\n\n', "invalid_frame"),
        (b'data: {"choices":{"a":1}}\n\n', "invalid_frame"),
        (b'data: {"choices":[1]}\n\n', "invalid_frame"),
        (b'data: {"choices":[{"delta":[1]}]}\n\n', "invalid_frame"),
        (b'data: {"a":"\xff"}\n\n', "invalid_frame"),
        (b'data: {"a":NaN}\n\n', "invalid_frame"),
        (b'data: {"error":{"message":"key sk-canary"}}\n\n', "upstream_error"),
        (b'data: {"object":"error","message":"key sk-canary"}\n\n', "upstream_error"),
        (b'event: error\ndata: {"error":"sk-canary"}\n\n', "upstream_error"),
    ],
)
def test_a_broken_event_ends_the_stream_after_what_was_whole(broken, code):
    """Chunks before the break survive, none of the provider's words do, and nothing follows."""
    chunks = decode(WORD + broken + WORD)
    assert [chunk.frame for chunk in chunks] == [WORD, b""]
    assert [chunk.error for chunk in chunks] == [None, code]
    assert "canary" not in repr(chunks[1])


def padded(size):
    """One data line of exactly ``size`` bytes."""
    return b'data: {"a":"' + b"x" * (size - 14) + b'"}'


@pytest.mark.parametrize("step", [1 << 20, 4096], ids=["one-read", "many-reads"])
def test_frames_are_bounded(step):
    """A frame of the limit passes; one byte more, with or without an end, is refused."""
    for size, error in ((FRAME_BYTES_MAX, None), (FRAME_BYTES_MAX + 1, "oversize_frame")):
        data = padded(size) + b"\n\n"
        assert [chunk.error for chunk in decode(data, range(step, len(data), step))] == [error]
        assert [chunk.error for chunk in decode(data, [len(data) - 1])] == [error]
    endless = b"data: " + b"x" * (FRAME_BYTES_MAX + step)
    decoder = OpenAIDecoder()
    chunks = [c for at in range(0, len(endless), step) for c in decoder.feed(endless[at : at + step])]
    assert [chunk.error for chunk in chunks] == ["oversize_frame"]


def test_an_end_without_its_blank_line_is_still_an_event():
    """Some servers close right after the last line; what is cut inside JSON is an error."""
    assert [chunk.done for chunk in decode(b"data: [DONE]")] == [True]
    assert [chunk.error for chunk in decode(WORD[:-10])] == ["invalid_frame"]


# ------------------------------------------------------------------------------------------------------------- usage


def test_a_full_report_is_read():
    """Cached and reasoning tokens come from the details groups."""
    report = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert parse_usage(report) == Usage(prompt=10, cached_prompt=4, completion=5, reasoning=2)
    assert parse_usage({"prompt_tokens": 1, "completion_tokens": 0, "prompt_tokens_details": None}) == Usage(prompt=1)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_tokens": -1},
        {"prompt_tokens": True},
        {"prompt_tokens": 1.0},
        {"prompt_tokens": "1"},
        {"prompt_tokens": None},
        {"completion_tokens": TOKENS_MAX + 1},
        {"completion_tokens": None},
        {"prompt_tokens_details": {"cached_tokens": 11}},
        {"prompt_tokens_details": {"cached_tokens": -1}},
        {"prompt_tokens_details": [1]},
        {"completion_tokens_details": {"reasoning_tokens": "many"}},
    ],
)
def test_a_report_that_cannot_be_true_is_no_report(change):
    """It is dropped and counted, and the event that carried it is still delivered."""
    report = {"prompt_tokens": 10, "completion_tokens": 5} | change
    assert parse_usage(report) is None
    decoder = OpenAIDecoder()
    (chunk,) = decoder.feed(event({"content": "a"}, usage=report))
    assert (chunk.usage, chunk.tokens, decoder.implausible_reports) == (None, 1, 1)


@pytest.mark.parametrize("report", [[], "x", 3, {}])
def test_a_report_of_another_shape_is_no_report(report):
    """Only an object with counts is a report."""
    assert parse_usage(report) is None


# ---------------------------------------------------------------------------------------------------------- requests


def asked(**members):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | members
    return parse_chat(orjson.dumps(body), limits=ChatLimits())


def sent(chat, **more):
    settings = {"model": "up", "base_url": "https://h/v1/", "api_key": "sk-key", "max_tokens": 7} | more
    quirks = Quirks(limit_field=settings.pop("limit_field", "max_tokens"))
    request = OpenAICompatible(quirks).encode(Call(chat, **settings))
    return request, orjson.loads(request.body)


def decode_completion(body):
    completion = OpenAICompatible(Quirks()).decode(body)
    return completion.document, completion.usage


def test_node_fields_stay_and_unknown_fields_pass():
    """Fields that steer this node never reach a provider; what we do not know does."""
    ours = {
        "timeout_ms": 5,
        "routing_strategy": "fastest",
        "allow_external": True,
        "max_input_price_per_million": 1,
        "max_output_price_per_million": 1,
        "models": ["dearer"],
        "provider": {"order": ["x"]},
        "route": "fallback",
        "routing": {},
        "transforms": [],
        "service_tier": "auto",
    }
    assert set(ours) == NODE_ONLY
    _, body = sent(asked(**ours, seed=3, x_custom={"deep": [1]}))
    assert not set(body) & NODE_ONLY
    assert (body["seed"], body["x_custom"], body["model"]) == (3, {"deep": [1]}, "up")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_token_limit_is_ours_under_one_name(name):
    """Whatever the caller wrote, the provider gets one limit, the bounded one, under the name it obeys."""
    for field in ("max_tokens", "max_completion_tokens"):
        _, body = sent(asked(**{name: 900_000}), limit_field=field)
        assert {key: value for key, value in body.items() if key.startswith("max_")} == {field: 7}


def test_streams_always_ask_for_usage():
    """The caller cannot switch the report off, and requests without a stream do not carry the option."""
    _, body = sent(asked(stream_options={"include_usage": False, "other": 1}))
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    _, body = sent(asked(stream=False, stream_options={"include_usage": True}))
    assert (body["stream"], "stream_options" in body) == (False, False)


def test_the_key_goes_into_one_header():
    """The provider's key is sent as a bearer token, not at all when there is none, and never shown."""
    request, _ = sent(asked())
    assert ("Authorization", "Bearer sk-key") in request.headers
    assert request.url == "https://h/v1/chat/completions"
    assert "sk-key" not in repr(request)
    request, _ = sent(asked(), api_key=None)
    assert "Authorization" not in dict(request.headers)


# ------------------------------------------------------------------------------------------------- without a stream


def test_a_completion_is_returned_with_its_usage():
    """The answer passes as it is, and an implausible report is left out."""
    answer = {"choices": [{"message": {}}], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}
    assert decode_completion(orjson.dumps(answer)) == (answer, Usage(prompt=2, completion=1))
    answer["usage"]["prompt_tokens"] = -2
    assert decode_completion(orjson.dumps(answer)) == (answer, None)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "protocol"),
        (b"{", "protocol"),
        (b"[]", "protocol"),
        (b"{}", "protocol"),
        (b'{"choices":[]}', "protocol"),
        (b'{"choices":[1]}', "protocol"),
        (b'{"error":{"message":"sk-canary"}}', "error"),
        (b'{"object":"error","message":"sk-canary"}', "error"),
    ],
)
def test_what_is_no_completion_is_refused(body, kind):
    """Errors and nonsense are told apart, without a word of the provider's."""
    with pytest.raises(UpstreamFault) as caught:
        decode_completion(body)
    assert caught.value.kind == kind
    assert "canary" not in str(caught.value)
