"""The chat request as strangers send it: everything accepted is meant, everything else names its field."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.requests import ChatLimits, Role, parse_chat
from mppnode.kernel.strategy import PriceCeiling, Strategy

LIMITS = ChatLimits()
HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def parse(_limits=LIMITS, **members):
    return parse_chat(orjson.dumps({"model": "qwen/qwen3.5-9b", "messages": HELLO} | members), limits=_limits)


def refusal(body, limits=LIMITS):
    with pytest.raises(NodeFault) as caught:
        parse_chat(body, limits=limits)
    return caught.value


def refused(_limits=LIMITS, **members):
    return refusal(orjson.dumps({"model": "m", "messages": HELLO} | members), _limits)


def message(**members):
    return refused(messages=[*HELLO, members])


# ----------------------------------------------------------------------------------------------------------- defaults


def test_the_smallest_request_gets_the_documented_defaults():
    """A model and a message are enough: it streams, 4096 tokens, 30 s, and nothing is assumed about routing."""
    chat = parse()
    assert (chat.stream, chat.max_tokens, chat.choices, chat.timeout_ms) == (True, 4096, 1, 30_000)
    assert (chat.wishes.strategy, chat.wishes.allow_external, chat.wishes.ceiling) == (None, None, None)
    assert (chat.temperature, chat.top_p, chat.stop, chat.include_usage) == (None, None, (), None)
    assert [(m.role, m.text) for m in chat.messages] == [(Role.USER, "Hello")]


def test_everything_documented_is_read():
    """Each parameter of the table arrives as its own typed value."""
    chat = parse(
        stream=False,
        max_tokens=7,
        n=2,
        temperature=2,
        top_p=0.5,
        stop=["a", "b"],
        frequency_penalty=-2,
        presence_penalty=2.0,
        timeout_ms=1,
        routing_strategy="cheapest",
        allow_external=True,
        max_input_price_per_million=0,
        max_output_price_per_million=50,
        stream_options={"include_usage": True},
    )
    assert (chat.stream, chat.max_tokens, chat.completion_tokens_max) == (False, 7, 14)
    assert (chat.temperature, chat.top_p, chat.stop) == (2.0, 0.5, ("a", "b"))
    assert (chat.frequency_penalty, chat.presence_penalty, chat.timeout_ms) == (-2.0, 2.0, 1)
    assert (chat.wishes.strategy, chat.wishes.allow_external) == (Strategy.CHEAPEST, True)
    assert (chat.wishes.ceiling, chat.include_usage) == (PriceCeiling(0, 50), True)


def test_null_is_absent():
    """The stock clients write null for what their caller left out."""
    names = ("stream", "max_tokens", "temperature", "stop", "timeout_ms", "routing_strategy", "allow_external", "n")
    assert parse(**dict.fromkeys(names)).max_tokens == 4096
    assert parse(max_input_price_per_million=None, max_output_price_per_million=None).wishes.ceiling is None


# ---------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("max_tokens", [1, 1_000_000], [0, -1, 1_000_001, 10_000_000, 1.0, True, "1", [1]]),
        ("max_completion_tokens", [1, 1_000_000], [0, 1_000_001, 2.5, False]),
        ("n", [1, 8], [0, 9, 80, True, 1.0]),
        ("timeout_ms", [1, 30_000], [0, 30_001, 300_000, 1.5, True, "5"]),
        ("temperature", [0, 2, 0.7], [-0.01, 2.01, 20, True, "1", [1]]),
        ("top_p", [0, 1, 0.5], [-0.1, 1.1, 10, True, "1"]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1, 20, False]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1, 20, "0"]),
        ("stream", [True, False], [0, 1, "true", []]),
        ("allow_external", [True, False], [0, 1, "false", {}]),
        ("routing_strategy", ["cheapest", "fastest", "balanced"], ["", "Fastest", "quality", 1, ["fastest"], {}]),
        ("stream_options", [{}, {"include_usage": None}], [[], "x", 1, True]),
        ("model", ["m", "a/b-c.d:floor@1", "x" * 256], ["", " m", "a b", "m\n", "x" * 257, 1, None, ["m"], "mödel"]),
        ("tools", [[], [{}]], [{}, "x", [1], [None]]),
        ("functions", [[], [{}]], [{}, [1]]),
        ("response_format", [{}, {"type": "json_object"}], [[], "json"]),
        ("service_tier", ["auto", "default"], ["priority", "flex", ["auto"], 1]),
        ("modalities", [["text"]], [["audio"], ["text", "audio"], "text"]),
    ],
)
def test_parameters_at_and_past_their_bounds(name, good, bad):
    """Every bound is accepted, everything past it or of another type is refused by name."""
    for value in good:
        parse(**{name: value})
    for value in bad:
        fault = refused(**{name: value})
        assert (fault.reason, (fault.field or "").partition("[")[0]) == (NodeReason.INVALID_FIELD, name), value


@pytest.mark.parametrize("name", ["best_of", "plugins", "web_search_options", "audio"])
def test_what_would_cost_more_than_tokens_is_refused(name):
    """A field that makes the provider bill what we did not quote is not dropped silently."""
    assert refused(**{name: {"x": 1}}).field == name


def test_two_token_limits_must_agree():
    """Either name works, both only with one value: guessing which one counts would over- or undersell."""
    assert parse(max_completion_tokens=9).max_tokens == 9
    assert parse(max_tokens=9, max_completion_tokens=9).max_tokens == 9
    assert refused(max_tokens=9, max_completion_tokens=10).field == "max_completion_tokens"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ([], None),
        (["a"] * 4, None),
        ("x" * 1024, None),
        (["a"] * 5, "stop"),
        ("", "stop"),
        (["a", ""], "stop[1]"),
        (["a", 1], "stop[1]"),
        ("x" * 1025, "stop"),
        ({"a": 1}, "stop"),
        (3, "stop"),
    ],
)
def test_stop_sequences(given, field):
    """A string or at most four, none empty, each bounded."""
    if field is None:
        parse(stop=given)
    else:
        assert refused(stop=given).field == field


@pytest.mark.parametrize("value", [-1, 1.5, True, "5", 10**9 + 1])
@pytest.mark.parametrize("name", ["max_input_price_per_million", "max_output_price_per_million"])
def test_a_ceiling_is_whole_cents(name, value):
    """Ceilings are integers of cents: a float or a string is a caller who means another unit."""
    both = {"max_input_price_per_million": 5, "max_output_price_per_million": 5}
    assert refused(**(both | {name: value})).field == name


def test_a_lone_ceiling_is_refused_by_the_name_of_the_missing_one():
    """One ceiling would leave the other price open, so the one that is missing is named."""
    assert refused(max_input_price_per_million=5).field == "max_output_price_per_million"
    assert refused(max_output_price_per_million=5).field == "max_input_price_per_million"


# ------------------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize("given", [None, [], {}, "hi", 1])
def test_messages_are_a_list_with_something_in_it(given):
    """Nothing to say is not a request."""
    assert refused(messages=given).field == "messages"


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": None, "tool_calls": [CALL]}, "tool_calls"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "tool_calls"),
        ({"role": "user", "content": 1}, "content"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "user", "content": {}}, "content"),
        ({"content": "x"}, "role"),
        ({"role": "root", "content": "x"}, "role"),
        ({"role": ["user"], "content": "x"}, "role"),
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        ({"role": "function", "content": "x"}, "name"),
        ({"role": "user", "content": "x", "name": 1}, "name"),
        ({"role": "user", "content": ["x"]}, "content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text"),
        ({"role": "user", "content": [{"text": "x"}]}, "content[0].type"),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, "content[0].type"),
        ({"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}, "content[0].type"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "content[0].image_url"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "content[0].input_audio.data"),
        ({"role": "assistant", "tool_calls": [1]}, "tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [CALL | {"id": ""}]}, "tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "shell"}]}, "tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [CALL | {"type": ["function"]}]}, "tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [CALL | {"function": {}}]}, "tool_calls[0].function.name"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": {}}}]},
            "tool_calls[0].function.arguments",
        ),
        ({"role": "assistant", "function_call": []}, "function_call"),
    ],
)
def test_a_bad_message_is_named_by_its_path(members, field):
    """The second message is at fault, and the refusal says so down to the member."""
    fault = message(**members)
    assert (fault.reason, fault.field) == (NodeReason.INVALID_FIELD, f"messages[1].{field}")


def test_a_message_that_is_no_object_is_named():
    """A bare string among the messages is refused by its place."""
    assert refused(messages=["hi"]).field == "messages[0]"


def test_every_role_and_shape_in_use_is_accepted():
    """The conversations that clients really send pass."""
    chat = parse(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "tool", "tool_call_id": "c1", "content": "t"},
            {"role": "function", "name": "f", "content": "r"},
            {"role": "user", "content": ""},
        ]
    )
    assert [m.text for m in chat.messages] == ["s", "d", "a\nb", "", "", "no", "t", "r", ""]


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest", "https://h/x.png", "file:///etc/passwd", "DATA:x", " data:x", "", None, 5, ["data:"]],
)
@pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url"])
def test_media_cannot_name_a_place_to_fetch_from(kind, url):
    """A provider inside our network would fetch it for the caller; only data URLs pass by default."""
    fault = message(role="user", content=[{"type": kind, kind: {"url": url}}])
    assert fault.field == f"messages[1].content[0].{kind}.url"


def test_media_is_counted_apart_from_text():
    """A picture's base64 is not a prompt of a million tokens."""
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    chat = parse(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}])
    assert (chat.prompt_bytes, chat.images, chat.messages[0].images) == (2, 1, 1)
    remote = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://h/x.png"}}]}]
    assert parse(ChatLimits(remote_media=True), messages=remote).images == 1


def test_prompt_bytes_count_what_the_model_reads():
    """UTF-8 bytes of text, calls, names and tool definitions all count; other fields do not."""
    assert parse(messages=[{"role": "user", "content": "é€"}]).prompt_bytes == 5
    assert parse(messages=[{"role": "user", "content": "a", "name": "bob"}]).prompt_bytes == 4
    assert parse(metadata={"x": "y" * 100}).prompt_bytes == len("Hello")
    tool = {"type": "function", "function": {"name": "f"}}
    assert parse(tools=[tool]).prompt_bytes == len("Hello") + len(orjson.dumps([tool]))
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert parse(messages=[call]).prompt_bytes == len(orjson.dumps([CALL]))


# ---------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"{} {}",
        b'{"a":1,}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e400}',
        b'{"a":-1e400}',
        b'{"a":01}',
        b'{"a":18446744073709551616}',
        b'{"a":-9223372036854775809}',
        b'{"a":' + b"9" * 10_000 + b"}",
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":1,"\\u0061":2}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\\ud800"}',
        b'{"a":["\\udc00x"]}',
        b'{"\\ud800":1}',
        b'{"a":"\\ude00\\ud83d"}',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b'{"a":"\n"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_what_two_readers_could_read_differently_is_not_json_here(body):
    """Duplicates, foreign numbers, half surrogates and endless nesting are refused as JSON, without our failing."""
    assert refusal(body).reason is NodeReason.INVALID_JSON


def test_whole_surrogate_pairs_and_64_bit_integers_pass():
    """What is valid stays: an escaped emoji, the largest integers, a deep but bounded value."""
    body = b'{"model":"m","messages":[{"role":"user","content":"\\ud83d\\ude00"}],"a":[18446744073709551615,-9223372036854775808]}'
    chat = parse_chat(body, limits=LIMITS)
    assert (chat.messages[0].text, chat.raw["a"]) == ("\U0001f600", [2**64 - 1, -(2**63)])


def nested(levels):
    """A request whose whole value is exactly that many levels deep."""
    value = 1
    for _ in range(levels - 1):
        value = [value]
    return orjson.dumps({"model": "m", "messages": HELLO, "a": value})


def test_depth_is_bounded_at_its_limit():
    """64 levels pass, 65 and 640 do not."""
    parse_chat(nested(64), limits=LIMITS)
    for levels in (65, 200):
        assert refusal(nested(levels)).reason is NodeReason.INVALID_JSON


def test_keys_are_bounded_at_their_limit():
    """As many keys as allowed pass, one more does not."""
    limits = ChatLimits(keys=20)
    fixed = 5  # model, messages, metadata; role, content
    parse(limits, metadata={str(n): n for n in range(20 - fixed)})
    assert refused(limits, metadata={str(n): n for n in range(21 - fixed)}).reason is NodeReason.INVALID_JSON


def test_the_body_is_bounded_at_its_limit():
    """The size is checked before anything is parsed."""
    body = orjson.dumps({"model": "m", "messages": HELLO})
    parse_chat(body, limits=ChatLimits(body_bytes=len(body)))
    assert refusal(body, ChatLimits(body_bytes=len(body) - 1)).reason is NodeReason.BODY_TOO_LARGE
    assert refusal(b"\xff" * 100, ChatLimits(body_bytes=99)).reason is NodeReason.BODY_TOO_LARGE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["model", "messages", "stream", "max_tokens", "stop", "n", "tools", "stream_options", "routing_strategy", "response_format",
     "service_tier", "modalities", "max_input_price_per_million", "timeout_ms", "temperature"]
)  # fmt: skip
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "function_call", "name", "tool_call_id"]), JSON)
    | st.fixed_dictionaries({"role": st.sampled_from(list(Role)), "content": st.lists(st.fixed_dictionaries({"type": JSON}), max_size=2)}),
    max_size=3,
)


@given(st.dictionaries(NAMES, JSON, max_size=6), MESSAGES)
def test_no_json_makes_the_parser_fail_in_any_other_way(members, messages):
    """Any JSON at all is either a request or a refusal with a reason and a field."""
    fault = None
    try:
        parse(**({"messages": messages} | members))
    except NodeFault as refused_as:
        fault = refused_as
    if fault is not None:
        assert fault.reason in {NodeReason.INVALID_JSON, NodeReason.INVALID_FIELD}
        assert fault.field


@given(st.binary(max_size=200))
def test_no_bytes_make_the_parser_fail_in_any_other_way(body):
    """Neither do arbitrary bytes."""
    with pytest.raises(NodeFault):
        parse_chat(body, limits=LIMITS)


def test_refusals_repeat_nothing_the_caller_wrote():
    """Details are our words: they may be logged and shown without escaping."""
    canary = "canary<script>"
    for members in ({"model": canary}, {"routing_strategy": canary}, {"messages": [{"role": canary}]}, {"stop": [canary] * 9}):
        assert "canary" not in str(refused(**members))
    assert "canary" not in repr(parse(metadata={"k": canary}))
