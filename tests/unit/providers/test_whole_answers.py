"""Answers without a stream, usage of every shape, and the table of known providers."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mppnode.config.presets import PRESETS as ADDRESSES
from mppnode.kernel.clock import ManualClock
from mppnode.kernel.listing import Ability, ProviderKind
from mppnode.kernel.requests import ChatLimits, parse_chat
from mppnode.kernel.usage import Usage
from mppnode.providers.base import Call, UpstreamFault
from mppnode.providers.presets import PRESETS, adapter_for
from mppnode.providers.transport import encode_head, split_url
from mppnode.providers.usage import TOKENS_MAX, parse_anthropic_usage, parse_gemini_usage, parse_usage, usage_document


def adapter(name, **more):
    return adapter_for(PRESETS[name].api, PRESETS[name].quirks, **more)


def decode(name, document, **more):
    return adapter(name, **more).decode(orjson.dumps(document))


def openai(message=None, **more):
    choice = {"index": 0, "message": message or {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "model": "m", "choices": [choice], **more}


ANTHROPIC = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": "S"},
        {"type": "redacted_thinking", "data": "X"},
        {"type": "text", "text": "It is"},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": [1]}},
    ],
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 2, "output_tokens": 9},
}
GEMINI = {
    "candidates": [
        {
            "content": {"parts": [{"text": "hm", "thought": True}, {"text": "It is"}], "role": "model"},
            "finishReason": "STOP",
            "index": 0,
        },
        {"content": {"parts": [{"functionCall": {"name": "f", "args": {"a": [1]}}}]}, "finishReason": "STOP", "index": 1},
    ],
    "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 4, "thoughtsTokenCount": 3},
    "modelVersion": "gemini",
    "responseId": "r1",
}


def test_an_openai_answer_passes_as_it_is():
    """P-48, P-50, P-56: unknown members, log-probabilities, audio and annotations survive; the text is what was said."""
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [{"x": 1}], "tool_calls": [call]}
    document = openai(message | {"audio": {"id": "a", "data": "AAAA", "transcript": "spoken"}}, x_new={"y": 2.5})
    made = decode("openai", document)
    assert made.document == document
    assert (made.text, made.usage) == ("hif{}spoken", None)
    assert "hi" not in repr(made)


def test_an_anthropic_message_is_a_completion():
    """P-39: text, thoughts with signatures, calls and the summed prompt."""
    made = decode("anthropic", ANTHROPIC, clock=ManualClock(1_760_000_000))
    (choice,) = made.document["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "It is",
        "reasoning_content": "hm",
        "reasoning_details": [
            {"type": "reasoning.text", "text": "hm", "signature": "S"},
            {"type": "reasoning.encrypted", "data": "X"},
        ],
        "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a":[1]}'}}],
    }
    assert made.usage == Usage(prompt=14, cached_prompt=7, completion=9, cache_write=2)
    assert made.document["usage"] == usage_document(made.usage)
    assert (made.document["created"], made.document["id"]) == (1_760_000_000, "msg_1")
    assert made.text == 'hmIt isf{"a":[1]}'


def test_a_gemini_response_is_a_completion():
    """P-38, P-44: every candidate is a choice, thoughts are added to the completion once."""
    made = decode("gemini", GEMINI)
    first, second = made.document["choices"]
    assert first["message"] == {"role": "assistant", "content": "It is", "reasoning_content": "hm"}
    assert second["message"]["tool_calls"][0]["id"] == "call_r1_1_0"
    assert [first["finish_reason"], second["finish_reason"]] == ["stop", "tool_calls"]
    assert made.usage == Usage(prompt=5, completion=7, reasoning=3)
    assert "created" not in made.document  # no clock was given, and a zero would be a date


def test_what_the_caller_reads_is_what_it_pays():
    """P-38: reasoning that xAI counts beside the completion is inside it in the answer we send on."""
    report = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 18}
    report["completion_tokens_details"] = {"reasoning_tokens": 10}
    made = decode("xai", openai(usage=report))
    assert made.usage == Usage(prompt=3, completion=15, reasoning=10)
    assert made.document["usage"] == report | {"completion_tokens": 15, "total_tokens": 18}


def test_openrouters_cost_stays_in_the_document():
    """What a request cost us is shown and decides nothing."""
    made = decode("openrouter", openai(usage={"prompt_tokens": 3, "completion_tokens": 5, "cost": 12.5}))
    assert (made.usage, made.document["usage"]["cost"]) == (Usage(prompt=3, completion=5), 12.5)


@pytest.mark.parametrize("name", ["openai", "openrouter", "anthropic", "gemini"])
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "protocol"),
        (b"<html>sk-canary", "protocol"),
        (b"[]", "protocol"),
        (b"{}", "protocol"),
        (b'{"choices":[],"content":3,"candidates":[]}', "protocol"),
        (b'{"choices":[1],"content":[1],"candidates":[1]}', "protocol"),
        (b'{"error":{"message":"sk-canary"}}', "error"),
    ],
)
def test_a_200_that_is_no_answer_is_a_failure(name, body, kind):
    """P-32, P-53: errors and nonsense under status 200 are told apart, without a word of the provider's."""
    with pytest.raises(UpstreamFault) as caught:
        adapter(name).decode(body)
    assert caught.value.kind == kind
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("openrouter", openai() | {"choices": [{"error": {"message": "sk-canary"}, "message": {}}]}),
        ("mistral", openai() | {"choices": [{"finish_reason": "error", "message": {}}]}),
        ("anthropic", {"type": "error", "content": []}),
        ("gemini", {"promptFeedback": {"blockReason": "SAFETY"}}),
        ("gemini", {"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]}),
    ],
)
def test_failures_inside_an_answer_are_failures(name, document):
    """P-32: each API has its own place to say so."""
    with pytest.raises(UpstreamFault) as caught:
        decode(name, document)
    assert caught.value.kind == "error"


# ------------------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("report", "usage"),
    [
        ({"prompt_tokens": 9, "prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 5}, Usage(9, 4)),
        ({"prompt_tokens": 9, "cached_tokens": 4}, Usage(9, 4)),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 6}}, Usage(9, 3, cache_write=6)),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 2}, "prompt_cache_hit_tokens": 8}, Usage(9, 2)),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 6}}, None),
        ({"prompt_tokens": 9, "cached_tokens": 10}, None),
        ({"prompt_tokens": 9, "completion_tokens": 2, "completion_tokens_details": {"reasoning_tokens": 3}}, None),
    ],
)  # fmt: skip
def test_cached_and_written_tokens_have_many_names(report, usage):
    """P-39: each name is a part of the prompt, and parts larger than their whole make no report."""
    assert parse_usage(report) == usage


@pytest.mark.parametrize(
    ("completion", "reasoning", "total", "charged"), [(50, 124, 837, 174), (50, 124, None, 174), (50, 24, 713, 50)]
)
def test_reasoning_is_charged_once_whichever_way_it_is_counted(completion, reasoning, total, charged):
    """P-38: beside the completion by default, inside it where the provider's own total says so."""
    report = {"prompt_tokens": 663, "completion_tokens": completion, "total_tokens": total}
    report["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    assert parse_usage(report, reasoning_added=True) == Usage(663, 0, charged, reasoning)


@pytest.mark.parametrize(
    "change",
    [
        {"input_tokens": -1},
        {"input_tokens": True},
        {"input_tokens": None},
        {"cache_read_input_tokens": -5},
        {"cache_creation_input_tokens": 1.5},
        {"output_tokens": "9"},
        {"output_tokens": TOKENS_MAX + 1},
        {"output_tokens_details": {"thinking_tokens": 10}},
    ],
)
def test_an_anthropic_report_that_cannot_be_true_is_none(change):
    """P-39: a negative count cannot hide in the sum of the others."""
    assert parse_anthropic_usage(ANTHROPIC["usage"]) is not None
    assert parse_anthropic_usage(ANTHROPIC["usage"] | change) is None


@pytest.mark.parametrize(
    "change",
    [
        {"promptTokenCount": None},
        {"candidatesTokenCount": -1},
        {"thoughtsTokenCount": True},
        {"toolUsePromptTokenCount": -5},
        {"cachedContentTokenCount": 6},
    ],
)
def test_a_gemini_report_that_cannot_be_true_is_none(change):
    """P-38: a negative count cannot hide in the sum of the others."""
    assert parse_gemini_usage(GEMINI["usageMetadata"] | {"toolUsePromptTokenCount": 0}) == Usage(5, 0, 7, 3)
    assert parse_gemini_usage(GEMINI["usageMetadata"] | change) is None


COUNT = st.integers(0, 1000)


@given(COUNT, COUNT, COUNT, COUNT)
def test_three_dialects_of_one_usage_agree(fresh, cached, spoken, thought):
    """P-38, P-39: parts beside or inside their wholes, the same tokens give the same usage."""
    ours = Usage(fresh + cached, cached, spoken + thought, thought)
    inside = {"cached_tokens": cached}, {"reasoning_tokens": thought}
    subset = {"prompt_tokens": fresh + cached, "completion_tokens": spoken + thought}
    details = {"prompt_tokens_details": inside[0], "completion_tokens_details": inside[1]}
    assert parse_usage(subset | details) == ours
    counts = {"input_tokens": fresh, "cache_read_input_tokens": cached, "output_tokens": spoken + thought}
    assert parse_anthropic_usage(counts | {"output_tokens_details": {"thinking_tokens": thought}}) == ours
    google = {"promptTokenCount": fresh + cached, "cachedContentTokenCount": cached}
    assert parse_gemini_usage(google | {"candidatesTokenCount": spoken, "thoughtsTokenCount": thought}) == ours
    assert parse_usage(usage_document(ours)) == ours


# ------------------------------------------------------------------------------------------------------------ presets


def test_presets_are_named_by_their_name():
    """The table is complete and each entry is what its kind says: own servers need no key, resold ones do."""
    assert set(PRESETS) == {
        "openai", "anthropic", "gemini", "openrouter", "deepinfra", "deepseek", "together", "groq", "fireworks", "mistral",
        "xai", "vllm", "llamacpp", "ollama", "sglang", "dev",
    }  # fmt: skip
    assert set(PRESETS) == set(ADDRESSES), "who is configured by name is known by name, and the other way round"
    for name, preset in ADDRESSES.items():
        assert preset.name == PRESETS[name].name == name
        native = preset.kind is ProviderKind.NATIVE
        assert (preset.key_variable is None) == (preset.price_page is None) == native, name
        if not native:
            assert preset.base_url.startswith("https://")


def test_a_cancel_is_believed_to_stop_only_where_it_is_known_to():
    """A wrong yes costs the node money at every disconnect."""
    assert {name for name, preset in PRESETS.items() if preset.cancel_stops_billing} == {
        "openai", "anthropic", "fireworks", "deepinfra", "together", "xai", "vllm", "llamacpp", "ollama", "sglang", "dev",
    }  # fmt: skip
    for preset in PRESETS.values():
        assert adapter_for(preset.api, preset.quirks).cancel_stops_billing is preset.cancel_stops_billing


def test_no_preset_promises_what_its_adapter_refuses():
    """P-49, P-50: what Anthropic and Gemini have no words for is not among their abilities."""
    assert not PRESETS["anthropic"].abilities & (Ability.LOGPROBS | Ability.CHOICES | Ability.AUDIO_INPUT)
    assert not PRESETS["gemini"].abilities & Ability.LOGPROBS
    assert all(preset.abilities & Ability.TOOLS for preset in PRESETS.values())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_request_can_be_put_on_the_wire(name):
    """P-33: URL and headers are those a transport takes, and compression is left to it, which refuses any."""
    chat = parse_chat(b'{"model":"m","messages":[{"role":"user","content":"hi"}]}', limits=ChatLimits())
    made = adapter(name).encode(Call(chat, "a/b:c", ADDRESSES[name].base_url or "http://127.0.0.1:1/v1", "k", 5))
    _, host, target = split_url(made.url)
    assert b"Accept-Encoding: identity\r\n" in encode_head(made, host, target)
    assert dict(made.headers)["Accept"] == "text/event-stream"
