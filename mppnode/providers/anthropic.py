"""Anthropic's Messages API: requests in its words.

Source: Anthropic API reference, "Messages" and "Structured outputs".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from mppnode.kernel.clock import Clock
from mppnode.providers.anthropic_answers import AnthropicDecoder, decode_message
from mppnode.providers.base import Call, Completion, UpstreamRequest
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

_VERSION: Final = "2023-06-01"  # the only dated version of the Messages API; newer features are members, not versions
_UNDERSTOOD: Final = frozenset(
    {
        "temperature",
        "top_p",
        "stop",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "reasoning_effort",
        "seed",  # best effort by OpenAI's own words, so an answer without it is no other answer
        # Anthropic's own members that cost no more than the tokens they cause. `speed`, `inference_geo`,
        # `mcp_servers` and server tools do cost more, so the list is of what passes and not of what does not.
        "thinking",
        "top_k",
    }
)
_NATIVE: Final = ("thinking", "top_k")
_EFFORTS: Final[Mapping[str, str]] = {
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "max",
}
_TEMPERATURE_MAX: Final = 1  # OpenAI's goes to 2; scaling it would be another distribution


class Anthropic:
    """The adapter of the Messages API; ``mppnode.providers.base.Adapter`` in shape.

    ``n`` above 1, log-probabilities, penalties, sound and video are refused by name.
    """

    running_usage = False

    def __init__(self, quirks: Quirks, *, clock: Clock | None = None) -> None:
        self.quirks = quirks
        self._clock = clock

    @property
    def cancel_stops_billing(self) -> bool:
        return self.quirks.cancel_stops_billing

    def encode(self, call: Call) -> UpstreamRequest:
        """The request in Anthropic's words.

        Raises:
            NodeFault: ``INVALID_FIELD`` naming the member it has no words for.

        Source: Anthropic Messages API.
        """
        chat, raw = call.chat, call.chat.raw
        check_members(raw, _UNDERSTOOD)
        body: dict[str, Any] = {"model": call.model, "max_tokens": call.max_tokens, "stream": chat.stream}
        body |= _conversation(raw["messages"])
        if chat.temperature is not None:
            if chat.temperature > _TEMPERATURE_MAX:
                refuse("temperature", "is above 1, the most this provider knows")
            body["temperature"] = raw["temperature"]
        if chat.top_p is not None:
            body["top_p"] = raw["top_p"]
        if chat.stop:
            body["stop_sequences"] = list(chat.stop)
        body |= _tools(raw) | _output_config(raw)
        body |= {name: raw[name] for name in _NATIVE if raw.get(name) is not None}
        headers = [
            ("Content-Type", "application/json"),
            ("Accept", "text/event-stream" if chat.stream else "application/json"),
            ("User-Agent", "mppnode"),
            ("anthropic-version", _VERSION),
        ]
        if call.api_key is not None:
            headers.append(("x-api-key", call.api_key))
        return UpstreamRequest("POST", call.base_url.rstrip("/") + "/messages", tuple(headers), orjson.dumps(body))

    def decoder(self) -> AnthropicDecoder:
        return AnthropicDecoder(self._clock)

    def decode(self, body: bytes) -> Completion:
        return decode_message(body, self._clock)


def _tools(raw: Mapping[str, Any]) -> dict[str, Any]:
    tools = [_tool(function) for function in functions_of(raw)]
    if not tools:
        if raw.get("tool_choice") not in (None, "auto", "none"):
            refuse("tool_choice", "names tools, and there are none")
        return {}
    kind, name = tool_choice(raw)
    choice: dict[str, Any] = {"type": {None: "auto", "required": "any", "function": "tool"}.get(kind, kind)}
    if name is not None:
        choice["name"] = name
    if raw.get("parallel_tool_calls") is False and kind != "none":
        choice["disable_parallel_tool_use"] = True
    return {"tools": tools, "tool_choice": choice}


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    tool = {"name": function["name"], "input_schema": parameters}
    return tool | {name: function[name] for name in ("description", "strict") if function.get(name) is not None}


def _output_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The answer's schema and how hard to think; both live in ``output_config``."""
    config: dict[str, Any] = {}
    made: dict[str, Any] = {}
    kind, schema = response_schema(raw)
    if kind == "json_object":
        refuse("response_format.type", "is json_object, and this provider needs a schema (json_schema)")
    if kind == "json_schema":
        config["format"] = {"type": "json_schema", "schema": schema}
    effort = raw.get("reasoning_effort")
    if effort == "none":
        made["thinking"] = {"type": "disabled"}
    elif effort is not None:
        if type(effort) is not str or effort not in _EFFORTS:
            refuse("reasoning_effort", "is not one of none, " + ", ".join(_EFFORTS))
        made["thinking"] = {"type": "adaptive"}
        config["effort"] = _EFFORTS[effort]
    return made | {"output_config": config} if config else made


# --------------------------------------------------------------------------------------------------------- messages


def _conversation(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """``system`` and alternating turns.

    Instructions have one place there, before the conversation, so later ones move up too. Results of parallel calls
    must stand in one turn, ahead of what the user says next; merging neighbours of one role does that.
    """
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        role = message["role"]
        if role in ("system", "developer"):
            system += [_text(part, where) for where, part in parts_of(message, path)]
            continue
        if role == "function":
            refuse(f"{path}.role", "is function, and this provider needs tool with a tool_call_id")
        blocks = _assistant(message, path) if role == "assistant" else _user(message, path)
        speaker = "assistant" if role == "assistant" else "user"
        if turns and turns[-1]["role"] == speaker:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": speaker, "content": blocks})
    if not turns:
        refuse("messages", "has no message with content besides instructions")
    return {"system": system, "messages": turns} if system else {"messages": turns}


def _user(message: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
    blocks = [_block(part, where) for where, part in parts_of(message, path)]
    if message["role"] == "tool":
        return [{"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": blocks}]
    return blocks


def _assistant(message: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
    blocks = _thoughts(message)
    blocks += [_block(part, where) for where, part in parts_of(message, path)]
    if message.get("refusal"):
        blocks.append({"type": "text", "text": message["refusal"]})
    if message.get("function_call") is not None:
        refuse(f"{path}.function_call", "has no id, and this provider needs tool_calls")
    for index, call in enumerate(message.get("tool_calls") or ()):
        where = f"{path}.tool_calls[{index}]"
        used = {"type": "tool_use", "id": call["id"], "input": arguments_of(call, where)}
        blocks.append(used | {"name": call["function"]["name"]})
    return blocks


def _thoughts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Signed thoughts as we handed them out in ``reasoning_details``; what is not signed cannot be given back."""
    details = message.get("reasoning_details")
    blocks: list[dict[str, Any]] = []
    last: Any = None
    for entry in details if type(details) is list else ():
        if type(entry) is not dict:
            continue
        kind, text, signature = entry.get("type"), entry.get("text"), entry.get("signature")
        if kind == "reasoning.text":
            if last is None or entry.get("index") != last or blocks[-1].get("signature"):
                blocks.append({"type": "thinking", "thinking": "", "signature": ""})
            last = entry.get("index")
            blocks[-1]["thinking"] += text if type(text) is str else ""
            blocks[-1]["signature"] += signature if type(signature) is str else ""
        elif kind == "reasoning.encrypted" and type(entry.get("data")) is str:
            blocks.append({"type": "redacted_thinking", "data": entry["data"]})
            last = None
    return [block for block in blocks if block["type"] != "thinking" or block["signature"]]


def _block(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return _text(part, path)
    if kind != "image_url":
        refuse(f"{path}.type", f"is {kind}, which this provider cannot read")
    url = media_url(part)
    if url.startswith("https://"):
        source = {"type": "url", "url": url}
    else:
        media_type, data = data_url(url, f"{path}.image_url.url")
        source = {"type": "base64", "media_type": media_type, "data": data}
    return {"type": "image", "source": source} | _cache(part, path)


def _text(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    if part["type"] != "text":
        refuse(f"{path}.type", "is not text, and instructions are")
    return {"type": "text", "text": part["text"]} | _cache(part, path)


def _cache(part: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A cache mark of the five-minute kind; a write that lasts longer costs twice as much as the price we quoted."""
    mark = part.get("cache_control")
    if mark is None:
        return {}
    if mark not in ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"}):
        refuse(f"{path}.cache_control", "is not the ephemeral mark of five minutes")
    return {"cache_control": mark}
