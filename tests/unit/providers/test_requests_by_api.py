"""What a caller's request becomes in the words of each provider."""

import orjson
import pytest

from mppnode.config.presets import PRESETS as ADDRESSES
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.requests import NODE_ONLY, ChatLimits, parse_chat
from mppnode.kernel.usage import Usage
from mppnode.providers.base import Call, PriceCap
from mppnode.providers.openrouter import OpenRouter
from mppnode.providers.presets import PRESETS, adapter_for
from mppnode.providers.quirks import Quirks

PNG = "data:image/png;base64,iVBORw0KGgo="
KEY = "sk-canary"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 12345678901234567890123}'}}
ALSO = {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}}
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {"url": PNG}}]},
    {"role": "assistant", "content": None, "tool_calls": [CALLED, ALSO]},
    {"role": "tool", "tool_call_id": "c1", "content": "one"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "two"}]},
    {"role": "developer", "content": "Be kind."},
    {"role": "user", "content": "And?"},
]


def asked(**members):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | members
    return parse_chat(orjson.dumps(body), limits=ChatLimits(remote_media=True))


def request(name, model="up", cap=None, key=KEY, quirks=None, **members):
    preset = PRESETS[name]
    adapter = adapter_for(preset.api, quirks or preset.quirks)
    call = Call(asked(**members), model, ADDRESSES[preset.name].base_url or "http://dev/v1/", key, 7, cap)
    return adapter.encode(call)


def body_of(name, **members):
    return orjson.loads(request(name, **members).body)


def refused(name, **members):
    with pytest.raises(NodeFault) as caught:
        request(name, **members)
    assert caught.value.reason is NodeReason.INVALID_FIELD
    assert KEY not in str(caught.value)
    return caught.value.field


# --------------------------------------------------------------------------------------------------------- every api


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_key_is_in_one_header_and_nowhere_else(name):
    """P-53: neither the URL, nor the body, nor any text form shows the key, and none is sent where there is none."""
    made = request(name)
    assert [KEY in value for _, value in made.headers].count(True) == 1
    assert KEY not in made.url
    assert KEY.encode() not in made.body
    assert KEY not in repr(made)
    assert not any(KEY in value for _, value in request(name, key=None).headers)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_fields_that_steer_the_node_are_never_sent(name):
    """P-48: whatever the API, the node's own fields stay here; OpenRouter's routing is ours, not the caller's."""
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
    sent = body_of(name, **{member: ours[member] for member in NODE_ONLY & set(ours)})
    assert not (set(sent) & NODE_ONLY) - ({"provider"} if name == "openrouter" else set())
    assert b"dearer" not in orjson.dumps(sent)
    assert "order" not in sent.get("provider", {})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_limit_is_ours(name):
    """The provider gets the bounded limit, once, whichever of the two names the caller used."""
    for member in ("max_tokens", "max_completion_tokens"):
        assert b"900000" not in request(name, **{member: 900_000}).body
        assert request(name, **{member: 900_000}).body.count(b":7") == 1


# ------------------------------------------------------------------------------------------------------------- OpenAI

OPENAI_SHAPED = sorted(name for name, preset in PRESETS.items() if preset.api in ("openai", "openrouter", "dev"))


@pytest.mark.parametrize("name", OPENAI_SHAPED)
def test_an_openai_request_keeps_everything(name):
    """P-48, P-49, P-51, P-56: tools, calls, schema, vision, sound, log-probabilities and the unknown pass unchanged."""
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    history = [
        HISTORY[0],
        {"role": "user", "content": [*HISTORY[1]["content"], sound]},
        {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": {"id": "a"}},
        *HISTORY[2:],
    ]
    members = {
        "messages": history,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
        "logprobs": True,
        "top_logprobs": 3,
        "n": 2,
        "seed": 1,
        "x_unknown": {"deep": [1, None, 2.5]},
    }
    sent = body_of(name, **members)
    assert {member: sent[member] for member in members} == members


def test_each_provider_is_asked_for_usage_in_its_way():
    """P-35: forced where it must be asked for, running where that exists, absent where it would be refused."""
    assert body_of("openai")["stream_options"] == {"include_usage": True}
    assert body_of("vllm")["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    for name in ("mistral", "openrouter"):
        assert "stream_options" not in body_of(name, stream_options={"include_usage": True})
    assert "usage" not in body_of("openrouter")


@pytest.mark.parametrize(("name", "member"), [("openai", "max_completion_tokens"), ("together", "max_tokens")])
def test_the_limit_has_the_name_the_provider_obeys(name, member):
    """P-43: one name and never both, since a provider may obey only one."""
    sent = body_of(name, max_tokens=9)
    assert [found for found in sent if found.startswith("max_")] == [member]


def test_a_key_can_go_into_the_header_azure_reads():
    """The key's header is a quirk."""
    assert ("api-key", KEY) in request("openai", quirks=Quirks(auth="api-key")).headers


# --------------------------------------------------------------------------------------------------------- OpenRouter


@pytest.mark.parametrize(
    ("pico", "written"),
    [(1_250_000, b"1.25"), (0, b"0"), (3_000_000, b"3"), (1, b"0.000001"), (10_000_000, b"10"), (15_999_999, b"15.999999")],
)
def test_a_ceiling_becomes_an_exact_maximum_price(pico, written):
    """R11: dollars per million tokens as a JSON number with every digit, and never above the ceiling."""
    made = request("openrouter", cap=PriceCap(prompt=pico, completion=pico))
    assert b'"max_price":{"prompt":' + written + b',"completion":' + written + b"}" in made.body


def test_openrouter_needs_what_the_caller_needs():
    """P-49: a schema or a tool may not be ignored by whoever serves; without either nobody is excluded."""
    assert body_of("openrouter")["provider"] == {"allow_fallbacks": True}
    for members in ({"tools": [TOOL]}, {"response_format": {"type": "json_object"}}, {"logprobs": True}):
        assert body_of("openrouter", **members)["provider"]["require_parameters"] is True


def test_a_generation_is_looked_up():
    """The id is quoted, the key is in its header, and the native counts are read."""
    made = OpenRouter(Quirks()).encode_lookup("gen-1&x=/é", base_url="https://h/api/v1/", api_key=KEY)
    assert (made.method, made.url) == ("GET", "https://h/api/v1/generation?id=gen-1%26x%3D%2F%C3%A9")
    assert ("Authorization", f"Bearer {KEY}") in made.headers
    assert KEY not in repr(made)


RECORD = {"tokens_prompt": 10, "tokens_completion": 30, "native_tokens_prompt": 14, "native_tokens_completion": 521}


@pytest.mark.parametrize(
    ("document", "usage"),
    [
        ({"data": RECORD | {"native_tokens_reasoning": None}}, Usage(14, 0, 521)),
        ({"data": RECORD | {"native_tokens_reasoning": 500, "native_tokens_cached": 4}}, Usage(14, 4, 521, 500)),
        ({"data": RECORD | {"native_tokens_completion": None}}, None),
        ({"data": RECORD | {"native_tokens_cached": 15}}, None),
        ({"data": RECORD | {"native_tokens_prompt": -1}}, None),
        ({"error": {"code": 404}}, None),
        ([], None),
    ],
)
def test_a_record_is_read_or_not_ready(document, usage):
    """Counts that are missing or cannot be true are no counts."""
    assert OpenRouter(Quirks()).decode_lookup(orjson.dumps(document)) == usage
    assert OpenRouter(Quirks()).decode_lookup(b"<html>") is None


# ---------------------------------------------------------------------------------------------------------- Anthropic


def test_a_conversation_in_anthropics_words():
    """P-56: instructions move up, and results of parallel calls stand in one turn before what the user says next."""
    sent = body_of("anthropic", messages=HISTORY, stop=["END"], temperature=0.5, top_p=0.9, top_k=4)
    assert sent["system"] == [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    first, second, third = sent["messages"]
    assert first == {"role": "user", "content": [{"type": "text", "text": "Look"}, image]}
    assert [block["type"] for block in second["content"]] == ["tool_use", "tool_use"]
    assert second["content"][1] == {"type": "tool_use", "id": "c2", "name": "g", "input": {}}
    assert third["content"] == [
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "one"}]},
        {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "two"}]},
        {"type": "text", "text": "And?"},
    ]
    assert [sent[name] for name in ("max_tokens", "stop_sequences", "temperature", "top_p", "top_k", "stream")] == [
        7, ["END"], 0.5, 0.9, 4, True,
    ]  # fmt: skip


def test_headers_of_anthropic():
    """The key and the version go where that API reads them."""
    made = request("anthropic")
    assert {("x-api-key", KEY), ("anthropic-version", "2023-06-01")} <= set(made.headers)
    assert "Authorization" not in dict(made.headers)
    assert made.url == "https://api.anthropic.com/v1/messages"


@pytest.mark.parametrize("name", ["anthropic", "gemini"])
def test_arguments_keep_every_digit(name):
    """P-47: a number beyond 64 bits in an earlier call is passed as it was written, not as a rounded float."""
    assert b"12345678901234567890123" in request(name, messages=HISTORY).body


@pytest.mark.parametrize(
    ("choice", "parallel", "expected"),
    [
        (None, None, {"type": "auto"}),
        ("auto", False, {"type": "auto", "disable_parallel_tool_use": True}),
        ("required", True, {"type": "any"}),
        ("none", False, {"type": "none"}),
        ({"type": "function", "function": {"name": "f"}}, None, {"type": "tool", "name": "f"}),
    ],
)
def test_tools_for_anthropic(choice, parallel, expected):
    """P-47: definitions and every form of choice have their counterpart."""
    sent = body_of("anthropic", tools=[TOOL], tool_choice=choice, parallel_tool_calls=parallel)
    assert sent["tools"] == [{"name": "f", "input_schema": SCHEMA, "description": "d", "strict": True}]
    assert sent["tool_choice"] == expected


def test_a_schema_and_effort_for_anthropic():
    """P-49: the schema uses the API's own mechanism; effort lives beside it."""
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    sent = body_of("anthropic", response_format=shape, reasoning_effort="high")
    assert sent["output_config"] == {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "high"}
    assert sent["thinking"] == {"type": "adaptive"}
    assert body_of("anthropic", reasoning_effort="none")["thinking"] == {"type": "disabled"}


def test_signed_thoughts_go_back():
    """Thoughts are returned block by block with their signatures; unsigned ones are left out."""
    details = [
        {"type": "reasoning.text", "text": "a", "index": 0},
        {"type": "reasoning.text", "text": "b", "index": 0},
        {"type": "reasoning.text", "signature": "S0", "index": 0},
        {"type": "reasoning.encrypted", "data": "X", "index": 1},
        {"type": "reasoning.text", "text": "unsigned", "index": 2},
    ]
    said = {"role": "assistant", "content": None, "tool_calls": [ALSO], "reasoning_details": details}
    history = [{"role": "user", "content": "q"}, said, {"role": "tool", "tool_call_id": "c2", "content": "r"}]
    assert body_of("anthropic", messages=history)["messages"][1]["content"][:-1] == [
        {"type": "thinking", "thinking": "ab", "signature": "S0"},
        {"type": "redacted_thinking", "data": "X"},
    ]


def test_a_cache_mark_of_five_minutes_passes():
    """A write that lasts an hour costs more than the price that was quoted, so it is refused."""
    part = {"type": "text", "text": "long"}
    mark = {"cache_control": {"type": "ephemeral"}}
    sent = body_of("anthropic", messages=[{"role": "user", "content": [part | mark]}])
    assert sent["messages"][0]["content"] == [part | mark]
    dear = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    field = refused("anthropic", messages=[{"role": "user", "content": [part | dear]}])
    assert field == "messages[0].content[0].cache_control"


# ------------------------------------------------------------------------------------------------------------- Gemini


def test_a_conversation_in_geminis_words():
    """P-51, P-56: roles, media, calls and their results by function name."""
    sent = body_of("gemini", messages=HISTORY)
    assert sent["systemInstruction"] == {"parts": [{"text": "Be brief."}, {"text": "Be kind."}]}
    first, second, third = sent["contents"]
    media = {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}}
    assert first == {"role": "user", "parts": [{"text": "Look"}, media]}
    assert second["role"] == "model"
    assert [part["functionCall"]["name"] for part in second["parts"]] == ["f", "g"]
    assert third["parts"] == [
        {"functionResponse": {"id": "c1", "name": "f", "response": {"output": "one"}}},
        {"functionResponse": {"id": "c2", "name": "g", "response": {"output": "two"}}},
        {"text": "And?"},
    ]


def test_settings_for_gemini():
    """P-44, P-49: every setting has Gemini's name, several answers and the schema included."""
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    sent = body_of(
        "gemini", model="gemini-2.5-flash", n=2, temperature=1.5, top_p=0.5, seed=3, presence_penalty=1,
        stop="END", response_format=shape, reasoning_effort="medium",
    )  # fmt: skip
    assert sent["generationConfig"] == {
        "temperature": 1.5,
        "topP": 0.5,
        "seed": 3,
        "presencePenalty": 1,
        "maxOutputTokens": 7,
        "candidateCount": 2,
        "stopSequences": ["END"],
        "responseMimeType": "application/json",
        "responseJsonSchema": SCHEMA,
        "thinkingConfig": {"thinkingBudget": 8192, "includeThoughts": True},
    }
    later = body_of("gemini", model="gemini-3-pro", reasoning_effort="high")["generationConfig"]
    assert later["thinkingConfig"] == {"thinkingLevel": "high", "includeThoughts": True}


def test_tools_for_gemini():
    """P-47: definitions, forced functions and the signature behind an earlier call."""
    sent = body_of("gemini", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}})
    declared = {"name": "f", "description": "d", "parametersJsonSchema": SCHEMA}
    assert sent["tools"] == [{"functionDeclarations": [declared]}]
    assert sent["toolConfig"] == {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}}
    signed = CALLED | {"extra_content": {"google": {"thought_signature": "CiwB"}}}
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [signed]}]
    assert body_of("gemini", messages=history)["contents"][1]["parts"][0]["thoughtSignature"] == "CiwB"


def test_sound_for_gemini():
    """P-51: an audio part becomes inline data of its type."""
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    sent = body_of("gemini", messages=[{"role": "user", "content": [sound]}])
    assert sent["contents"][0]["parts"] == [{"inlineData": {"mimeType": "audio/wav", "data": "UklGRg=="}}]


def test_urls_of_gemini():
    """The model is part of the path and cannot leave it; streams ask for server-sent events."""
    base = "https://generativelanguage.googleapis.com/v1beta/"
    assert request("gemini", model="g").url == base + "models/g:streamGenerateContent?alt=sse"
    assert request("gemini", model="tunedModels/t", stream=False).url == base + "tunedModels/t:generateContent"
    assert request("gemini", model="a?key=b#c", stream=False).url == base + "models/a%3Fkey%3Db%23c:generateContent"


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "members", "field"),
    [
        ("anthropic", {"n": 2}, "n"),
        ("anthropic", {"logprobs": True}, "logprobs"),
        ("anthropic", {"frequency_penalty": 0.5}, "frequency_penalty"),
        ("anthropic", {"temperature": 1.5}, "temperature"),
        ("anthropic", {"response_format": {"type": "json_object"}}, "response_format.type"),
        ("anthropic", {"speed": "fast"}, "speed"),
        ("anthropic", {"mcp_servers": [{}]}, "mcp_servers"),
        ("anthropic", {"reasoning_effort": "huge"}, "reasoning_effort"),
        ("gemini", {"logprobs": True}, "logprobs"),
        ("gemini", {"parallel_tool_calls": False}, "parallel_tool_calls"),
        ("gemini", {"cachedContent": "x"}, "cachedContent"),
        ("gemini", {"reasoning_effort": "max"}, "reasoning_effort"),
        ("gemini", {"logit_bias": {"1": 1}}, "logit_bias"),
    ],
)
def test_what_an_api_has_no_words_for_is_refused_by_name(name, members, field):
    """P-48: not left out, which would answer another question, and not passed on, which could cost more."""
    assert refused(name, **members) == field


@pytest.mark.parametrize("name", ["anthropic", "gemini"])
@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": [{"role": "system", "content": "s"}]}, "messages"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [
                CALLED | {"function": {"name": "f", "arguments": "[1]"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}]},
            "messages[0].content[0].type",
        ),
    ],
)  # fmt: skip
def test_bad_shapes_are_refused_at_their_path(name, members, field):
    """A definition, call or part that cannot be translated is named by its path."""
    assert refused(name, **members) == field


@pytest.mark.parametrize("name", ["anthropic", "gemini"])
def test_values_that_ask_for_nothing_are_no_reason_to_refuse(name):
    """What SDKs send by default passes, and so do members that no answer depends on."""
    members = {
        "n": 1, "logprobs": False, "top_logprobs": 0, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {},
        "tools": [], "parallel_tool_calls": True, "user": "u", "store": False, "metadata": {}, "seed": 1,
        "response_format": {"type": "text"}, "tool_choice": "auto", "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert request(name, **members).body
