"""Google's Gemini API: requests in its words.

Source: Gemini API reference, "Generating content"; guides "Function calling", "Structured output", "Thinking".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import orjson

from mppnode.kernel.clock import Clock
from mppnode.kernel.requests import ChatRequest
from mppnode.providers.base import Call, Completion, UpstreamRequest
from mppnode.providers.gemini_answers import GeminiDecoder, decode_generated
from mppnode.providers.quirks import Quirks
from mppnode.providers.translate import (
    arguments_of,
    check_members,
    data_url,
    functions_of,
    media_url,
    parts_of,
    refuse,
    response_schema,
    tool_choice,
)

_UNDERSTOOD: Final = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "stop",
        "n",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "tools",
        "tool_choice",
        "response_format",
        "reasoning_effort",
        "safetySettings",  # Google's own; costs nothing
    }
)
_PLAIN: Final[Mapping[str, str]] = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
_MODES: Final = {None: "AUTO", "auto": "AUTO", "none": "NONE", "required": "ANY", "function": "ANY"}
_BUDGETS: Final[Mapping[str, int]] = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24576}
"""Tokens of thought for models before generation 3, as Google's own OpenAI-compatible endpoint sets them."""
_LEVELS: Final = ("minimal", "low", "medium", "high")
_BUDGETED: Final = "gemini-2."


class Gemini:
    """The adapter of ``generateContent``; ``mppnode.providers.base.Adapter`` in shape.

    Log-probabilities, single tool calls (``parallel_tool_calls: false``) and remote media are refused by name.
    """

    running_usage = True

    def __init__(self, quirks: Quirks, *, clock: Clock | None = None) -> None:
        self.quirks = quirks
        self._clock = clock

    @property
    def cancel_stops_billing(self) -> bool:
        return self.quirks.cancel_stops_billing

    def encode(self, call: Call) -> UpstreamRequest:
        """The request in Gemini's words; the key goes into a header, never into the URL, which proxies log.

        Raises:
            NodeFault: ``INVALID_FIELD`` naming the member it has no words for.

        Source: Gemini API, ``models.generateContent`` and ``models.streamGenerateContent``.
        """
        chat, raw = call.chat, call.chat.raw
        check_members(raw, _UNDERSTOOD)
        body = _conversation(raw["messages"])
        body["generationConfig"] = _settings(chat, call)
        body |= _tools(raw)
        if raw.get("safetySettings") is not None:
            body["safetySettings"] = raw["safetySettings"]
        headers = [
            ("Content-Type", "application/json"),
            ("Accept", "text/event-stream" if chat.stream else "application/json"),
            ("User-Agent", "mppnode"),
        ]
        if call.api_key is not None:
            headers.append(("x-goog-api-key", call.api_key))
        model = quote(call.model if "/" in call.model else f"models/{call.model}", safe="/")
        method = "streamGenerateContent?alt=sse" if chat.stream else "generateContent"
        url = f"{call.base_url.rstrip('/')}/{model}:{method}"
        return UpstreamRequest("POST", url, tuple(headers), orjson.dumps(body))

    def decoder(self) -> GeminiDecoder:
        return GeminiDecoder(self._clock)

    def decode(self, body: bytes) -> Completion:
        return decode_generated(body, self._clock)


def _settings(chat: ChatRequest, call: Call) -> dict[str, Any]:
    raw = chat.raw
    settings: dict[str, Any] = {theirs: raw[ours] for ours, theirs in _PLAIN.items() if raw.get(ours) is not None}
    settings["maxOutputTokens"] = call.max_tokens
    if chat.choices > 1:
        settings["candidateCount"] = chat.choices
    if chat.stop:
        settings["stopSequences"] = list(chat.stop)
    kind, schema = response_schema(raw)
    if kind != "text":
        settings["responseMimeType"] = "application/json"
    if kind == "json_schema":
        settings["responseJsonSchema"] = schema
    effort = raw.get("reasoning_effort")
    if effort is not None:
        settings["thinkingConfig"] = _thinking(effort, call.model)
    return settings


def _thinking(effort: Any, model: str) -> dict[str, Any]:
    if type(effort) is str and _BUDGETED in model and effort in _BUDGETS:
        return {"thinkingBudget": _BUDGETS[effort], "includeThoughts": effort != "none"}
    if type(effort) is not str or _BUDGETED in model or effort not in _LEVELS:
        known = tuple(_BUDGETS) if _BUDGETED in model else _LEVELS
        refuse("reasoning_effort", "is not one of " + ", ".join(known))
    return {"thinkingLevel": effort, "includeThoughts": True}


def _tools(raw: Mapping[str, Any]) -> dict[str, Any]:
    declared = [_declaration(function) for function in functions_of(raw)]
    if not declared:
        if raw.get("tool_choice") not in (None, "auto", "none"):
            refuse("tool_choice", "names tools, and there are none")
        return {}
    kind, name = tool_choice(raw)
    config: dict[str, Any] = {"mode": _MODES[kind]}
    if name is not None:
        config["allowedFunctionNames"] = [name]
    return {"tools": [{"functionDeclarations": declared}], "toolConfig": {"functionCallingConfig": config}}


def _declaration(function: Mapping[str, Any]) -> dict[str, Any]:
    # `strict` is left out: calls are held to their schema there in any case, as far as they ever are.
    declared = {"name": function["name"]}
    if function.get("description") is not None:
        declared["description"] = function["description"]
    if function.get("parameters"):
        declared["parametersJsonSchema"] = function["parameters"]
    return declared


# --------------------------------------------------------------------------------------------------------- messages


def _conversation(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """``systemInstruction`` and alternating turns; the results of parallel calls stand in one turn."""
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        role = message["role"]
        if role in ("system", "developer"):
            system += [_text(part, where) for where, part in parts_of(message, path)]
            continue
        if role == "assistant":
            parts = _assistant(message, path, names)
        elif role == "user":
            parts = [_part(part, where) for where, part in parts_of(message, path)]
        else:
            parts = [_result(message, path, names)]
        speaker = "model" if role == "assistant" else "user"
        if turns and turns[-1]["role"] == speaker:
            turns[-1]["parts"] += parts
        elif parts:
            turns.append({"role": speaker, "parts": parts})
    if not turns:
        refuse("messages", "has no message with content besides instructions")
    body: dict[str, Any] = {"contents": turns}
    if system:
        body["systemInstruction"] = {"parts": system}
    return body


def _assistant(message: Mapping[str, Any], path: str, names: dict[str, str]) -> list[dict[str, Any]]:
    parts = [_text(part, where) for where, part in parts_of(message, path)]
    if message.get("refusal"):
        parts.append({"text": message["refusal"]})
    if message.get("function_call") is not None:
        refuse(f"{path}.function_call", "has no id, and this provider needs tool_calls")
    for index, call in enumerate(message.get("tool_calls") or ()):
        arguments = arguments_of(call, f"{path}.tool_calls[{index}]")
        name = names[call["id"]] = call["function"]["name"]
        part: dict[str, Any] = {"functionCall": {"id": call["id"], "name": name, "args": arguments}}
        signature = _signature(call)
        if signature is not None:
            part["thoughtSignature"] = signature
        parts.append(part)
    return parts


def _signature(call: Mapping[str, Any]) -> str | None:
    """The signature of the thought behind a call, where Google's own OpenAI-compatible endpoint puts it."""
    extra = call.get("extra_content")
    google = extra.get("google") if type(extra) is dict else None
    signature = google.get("thought_signature") if type(google) is dict else None
    return signature if type(signature) is str else None


def _result(message: Mapping[str, Any], path: str, names: Mapping[str, str]) -> dict[str, Any]:
    if message["role"] == "function":
        refuse(f"{path}.role", "is function, and this provider needs tool with a tool_call_id")
    call = message["tool_call_id"]
    if call not in names:
        refuse(f"{path}.tool_call_id", "names no earlier call, and this provider needs the function's name")
    texts = [_text(part, where)["text"] for where, part in parts_of(message, path)]
    return {"functionResponse": {"id": call, "name": names[call], "response": {"output": "\n".join(texts)}}}


def _part(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return _text(part, path)
    if kind == "input_audio":
        sound = part[kind]
        form = sound.get("format")
        if form not in ("wav", "mp3"):
            refuse(f"{path}.{kind}.format", "is not wav or mp3")
        return {"inlineData": {"mimeType": f"audio/{form}", "data": sound["data"]}}
    media_type, data = data_url(media_url(part), f"{path}.{kind}.url")
    return {"inlineData": {"mimeType": media_type, "data": data}}


def _text(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    if part["type"] != "text":
        refuse(f"{path}.type", f"is {part['type']}, and only a user's message may hold it here")
    return {"text": part["text"]}
