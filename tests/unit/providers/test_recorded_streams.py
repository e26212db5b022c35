"""What each provider streams, decoded: the same deltas and usage however the bytes arrive.

Each stream lies in ``tests/fixtures/streams`` beside a description with the public page it was written after and what it
means. P-ids are those of the pitfalls named in the docstrings.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mppnode.providers.presets import PRESETS, adapter_for

STREAMS = sorted(Path(__file__).resolve().parents[2].joinpath("fixtures/streams").glob("*.sse"))
NAMES = [path.stem for path in STREAMS]


def load(name):
    path = next(path for path in STREAMS if path.stem == name)
    described = json.loads(path.with_suffix(".json").read_text())
    preset = PRESETS[described["preset"]]
    return path.read_bytes(), described["expected"], adapter_for(preset.api, preset.quirks)


def decode(adapter, data, cuts=()):
    decoder, chunks, last = adapter.decoder(), [], 0
    for cut in [*sorted(cuts), len(data)]:
        chunks += decoder.feed(data[last:cut])
        last = cut
    return chunks + decoder.end()


def conforming_events(data):
    """The events a parser by the WHATWG grammar dispatches: (type, data)."""
    found, lines, kind = [], [], "message"
    for line in re.split("\r\n|\r|\n", data.decode()):
        if not line:
            if lines:
                found.append((kind, "\n".join(lines)))
            lines, kind = [], "message"
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            lines.append(value)
        elif name == "event":
            kind = value
    return found


class Answer:
    """A stream assembled as a client assembles it."""

    def __init__(self, chunks):
        self.text, self.reasoning, self.refusal, self.tools, self.finish, self.logprobs = {}, {}, {}, {}, {}, {}
        self.reports, self.documents, self.details = [], [], []
        for chunk in chunks:
            if not chunk.frame or chunk.done:
                continue
            ((kind, payload),) = conforming_events(chunk.frame)
            assert kind == "message"
            document = json.loads(payload)
            self.documents.append(document)
            if document.get("usage") is not None:
                self.reports.append(document["usage"])
            for choice in document.get("choices", ()):
                self._take(str(choice["index"]), choice)

    def _take(self, index, choice):
        delta = choice["delta"]
        for name, store in (("content", self.text), ("refusal", self.refusal)):
            if delta.get(name):
                store[index] = store.get(index, "") + delta[name]
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if thought:
            self.reasoning[index] = self.reasoning.get(index, "") + thought
        for call in delta.get("tool_calls") or ():
            calls = self.tools.setdefault(index, [])
            if call["index"] == len(calls):
                calls.append(["", "", ""])
            made = calls[call["index"]]
            made[0] = call.get("id") or made[0]
            made[1] += call["function"].get("name") or ""
            made[2] += call["function"].get("arguments") or ""
        for entry in (choice.get("logprobs") or {}).get("content") or ():
            self.logprobs.setdefault(index, []).append(entry["token"])
        self.details += delta.get("reasoning_details") or ()
        if choice["finish_reason"] is not None:
            assert index not in self.finish
            self.finish[index] = choice["finish_reason"]


def check(name, chunks, expected):
    answer = Answer(chunks)
    for member in ("text", "reasoning", "refusal", "tools", "finish", "logprobs"):
        assert getattr(answer, member) == expected.get(member, {}), (name, member)
    reports = [chunk.usage for chunk in chunks if chunk.usage is not None]
    last = asdict(reports[-1]) if reports else None
    if last is not None:
        last = {key: last[key] for key in expected["usage"]}
    assert last == expected["usage"]
    assert [chunk.error for chunk in chunks if chunk.error] == ([expected["error"]] if expected["error"] else [])
    assert any(chunk.done for chunk in chunks) is expected["done"]
    assert all(chunk.done is (chunk is chunks[-1]) for chunk in chunks) or not expected["done"]
    spoken = [answer.text, answer.reasoning, answer.refusal]
    said = "".join("".join(store.values()) for store in spoken)
    said += "".join(tool[1] + tool[2] for tools in answer.tools.values() for tool in tools)
    # The pieces of several choices interleave, so only their letters are compared. A "{}" we add is not output.
    counted = "".join(chunk.text for chunk in chunks)
    assert set(counted) <= set(said)
    assert len(said) - 2 <= len(counted) <= len(said)


def test_there_is_a_description_and_a_source_for_every_stream():
    """Every stream names the public page it was written after, and every API has one."""
    apis = set()
    for path in STREAMS:
        described = json.loads(path.with_suffix(".json").read_text())
        assert described["source"].startswith("https://")
        apis.add(PRESETS[described["preset"]].api)
    assert apis == {"openai", "anthropic", "gemini", "openrouter"}
    assert len(STREAMS) > 25


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_decodes_to_its_meaning(name):
    """P-30, P-32, P-36, P-38, P-39, P-44, P-47, P-50, P-56: deltas, calls, endings and usage, for several splits."""
    data, expected, adapter = load(name)
    whole = decode(adapter, data)
    check(name, whole, expected)
    for step in (1, 7, 1448):
        assert decode(adapter, data, range(step, len(data), step)) == whole


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_split_changes_a_stream(name, data):
    """P-30: characters and line ends cut anywhere give the chunks of the undivided stream."""
    sent, _, adapter = load(name)
    cuts = data.draw(st.sets(st.integers(0, len(sent)), max_size=12))
    assert decode(adapter, sent, cuts) == decode(adapter, sent)


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_is_one_event_of_one_line(name):
    """P-29: no comment, id, retry hint, event name or second line of a provider is ever forwarded."""
    data, _, adapter = load(name)
    for chunk in decode(adapter, data):
        if chunk.frame:
            assert chunk.frame.startswith(b"data: ")
            assert chunk.frame.endswith(b"\n\n")
            assert chunk.frame.count(b"\n") == 2
            assert b"\r" not in chunk.frame
            assert len(conforming_events(chunk.frame)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_no_word_of_an_upstream_error_is_forwarded(name):
    """P-53: error texts, which may quote our key, appear in no frame and no chunk."""
    data, _, adapter = load(name)
    assert "canary" not in repr(decode(adapter, data))


@pytest.mark.parametrize("name", NAMES)
def test_the_caller_sees_one_report_at_most_that_says_what_is_charged(name):
    """P-35, P-36: one report in all frames (a finish chunk may carry it), equal to what the node counts with."""
    data, expected, adapter = load(name)
    chunks = decode(adapter, data)
    answer = Answer(chunks)
    assert len(answer.reports) <= 1
    if answer.reports:
        assert answer.reports[0]["completion_tokens"] == expected["usage"]["completion"]
        assert answer.reports[0]["prompt_tokens"] == expected["usage"]["prompt"]
        for member, value in expected.get("reported", {}).items():
            assert answer.reports[0][member] == value


def test_running_usage_grows_and_stays_between_the_provider_and_us():
    """P-35: vLLM's running counts reach the meter with each token and no frame but the last."""
    data, expected, adapter = load("vllm-running-usage")
    chunks = decode(adapter, data)
    assert adapter.running_usage
    assert [chunk.usage.completion for chunk in chunks if chunk.usage] == expected["running"]
    assert [b'"usage"' in chunk.frame for chunk in chunks].count(True) == 1
    assert chunks[0].usage is None  # of the role: it must not look like the report that is withheld


def test_a_running_report_in_gemini_counts_thoughts_once():
    """P-38: thoughts are beside the candidates' count in every report, and the reports are never summed."""
    data, _, adapter = load("gemini-thoughts")
    running = [(chunk.usage.completion, chunk.usage.reasoning) for chunk in decode(adapter, data) if chunk.usage]
    assert running == [(20, 20), (21, 20), (22, 20), (22, 20)]


def test_signed_thoughts_travel_with_their_signature():
    """What Anthropic wants back in the next turn is there, block by block."""
    data, _, adapter = load("anthropic-thinking")
    details = Answer(decode(adapter, data)).details
    assert [(entry["type"], entry["index"]) for entry in details] == [("reasoning.text", 0)] * 3 + [
        ("reasoning.encrypted", 1)
    ]
    assert details[2]["signature"] == "EqQBCgIYAhIM1gbcDa9GJwZA2b3h"


def test_the_count_of_a_message_that_has_not_begun_is_no_report():
    """P-37, P-58: the one token in Anthropic's first event is not what the message took when its last event lacks a count."""
    data, _, adapter = load("anthropic-text")
    chunks = decode(adapter, data.replace(b',"usage":{"output_tokens":15}', b""))
    assert chunks[-1].done
    assert not any(chunk.usage for chunk in chunks)


def test_a_message_finishes_once():
    """P-36: a reason to stop that comes with two events is one finish, and the last count holds."""
    data, _, adapter = load("anthropic-text")
    event = data[data.index(b"event: message_delta") : data.index(b"event: message_stop")]
    chunks = decode(adapter, data.replace(event, event + event.replace(b"15", b"16")))
    assert [chunk.finished for chunk in chunks].count(True) == 1
    assert [chunk.usage.completion for chunk in chunks if chunk.usage] == [16]


CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


@pytest.mark.parametrize(
    ("delta", "text"),
    [
        ({"role": "assistant", "content": "a", "refusal": None}, "a"),
        ({"reasoning_content": "t", "content": None}, "t"),
        ({"reasoning_content": "t", "content": "a"}, "ta"),
        ({"content": "a", "unknown": "not generated"}, "a"),
        ({"content": "a", "tool_calls": [CALL]}, 'af{"a":1}'),
        ({"reasoning": "t", "reasoning_content": "t", "reasoning_details": [{"text": "t"}]}, "t"),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "t", "signature": "S"}]}, "t"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}, {"text": "a"}]}, "ta"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "f{}"),
        ({"audio": {"id": "x", "data": "AAAA", "transcript": "said"}}, "said"),
        ({"refusal": "no"}, "no"),
        ({"role": "assistant"}, ""),
        ({"content": 7}, ""),
    ],
)
def test_what_was_generated_is_joined_once(delta, text):
    """P-37: the node's own count sees every generated word of an event, and no word twice."""
    event = {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    (chunk,) = decode(adapter_for("openai", PRESETS["openai"].quirks), b"data: " + json.dumps(event).encode() + b"\n\n")
    assert chunk.text == text


@pytest.mark.parametrize("name", ["openai-text", "together-text", "ollama-text", "openai-logprobs", "llamacpp-timings"])
def test_a_canonical_stream_is_forwarded_byte_for_byte(name):
    """P-47, P-48, P-50: unknown members, log-probabilities and timings survive because nothing is written anew."""
    data, _, adapter = load(name)
    assert b"".join(chunk.frame for chunk in decode(adapter, data)) == data


def test_a_cut_stream_never_ends_well():
    """P-31: without its finish or its end marker no provider's stream says that it is complete."""
    for path in STREAMS:
        data, expected, adapter = load(path.stem)
        if not expected["done"]:
            continue
        marker = b"event: message_stop" if adapter.__class__.__name__ == "Anthropic" else b'"finishReason"'
        marker = marker if marker in data else b"data: [DONE]"
        cut = data[: data.rindex(marker)]
        cut = cut[: cut.rfind(b"\n\n" if b"\n\n" in cut else b"\r\n\r\n") + 4]
        assert not any(chunk.done for chunk in decode(adapter, cut)), path.stem


@pytest.mark.parametrize("preset", sorted(PRESETS))
@given(st.binary(max_size=200))
@settings(max_examples=20, deadline=None)
def test_no_bytes_can_raise(preset, noise):
    """Arbitrary bytes, bare and as payloads, end in chunks."""
    made = PRESETS[preset]
    adapter = adapter_for(made.api, made.quirks)
    for data in (noise, b"data: {" + noise + b"}\n\n", b"data: " + noise + b"\n\n"):
        assert all(chunk.frame.count(b"\n") in (0, 2) for chunk in decode(adapter, data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**40) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["type", "index", "delta", "choices", "usage", "message", "content", "content_block", "text", "parts", "candidates",
         "finishReason", "functionCall", "args", "usageMetadata", "promptTokenCount", "tool_calls", "stop_reason", "id"]
    ), inner, max_size=5),
    max_leaves=12,
)
TYPES = ["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("preset", ["openai", "xai", "vllm", "anthropic", "gemini", "openrouter"])
@given(st.lists(st.dictionaries(st.sampled_from(
    ["index", "delta", "choices", "usage", "message", "content_block", "candidates", "usageMetadata", "promptFeedback"]
), JSON, max_size=4), max_size=4), st.sampled_from(TYPES))
@settings(max_examples=60, deadline=None)
def test_no_shape_can_raise(preset, events, kind):
    """Hostile JSON in the members we read, streamed and whole, ends in chunks or in a named fault."""
    made = PRESETS[preset]
    adapter = adapter_for(made.api, made.quirks)
    data = b"".join(b"data: " + json.dumps({"type": kind, **event}).encode() + b"\n\n" for event in events)
    for chunk in decode(adapter, data):
        assert chunk.usage is None or chunk.usage.consistent
        assert isinstance(chunk.text, str)
