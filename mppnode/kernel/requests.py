"""The chat request, parsed once and strictly; nothing below the edge looks at caller JSON again.

Source: the OpenAI chat completion API, plus the node's own routing and price fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NamedTuple, NoReturn

import orjson

from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.listing import Ability
from mppnode.kernel.strict_input import parse_object
from mppnode.kernel.wishes import Wishes, needs_of, parse_wishes

NODE_ONLY: Final = frozenset(
    {
        "timeout_ms",
        "routing_strategy",
        "allow_external",
        "max_input_price_per_million",
        "max_output_price_per_million",
        # Routing instructions other gateways understand. Forwarded to such a gateway they would choose a dearer
        # model on our account, past the caller's ceilings and past the price we quoted.
        "models",
        "provider",
        "route",
        "routing",
        "service_tier",
        "transforms",
    }
)
"""Fields that steer this node and are never sent upstream."""

_REFUSED: Final = ("audio", "best_of", "plugins", "web_search_options")
"""Fields that make a provider bill more than text tokens; dropping them silently would lie to the caller."""

_ONLY: Final[Mapping[str, tuple[Any, ...]]] = {"service_tier": ("auto", "default"), "modalities": (["text"],)}
"""Fields whose other values cost the node more than the price it quoted."""

_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}", re.ASCII)
_MAX_TOKENS_DEFAULT: Final = 4096
_IMAGES_PER_VIDEO: Final = 16  # frames a model looks at of a clip that fits into a request


class Role(StrEnum):
    """Who a message is from."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    FUNCTION = "function"


_ROLES: Final = frozenset(role.value for role in Role)


@dataclass(frozen=True, slots=True)
class ChatLimits:
    """Bounds of one chat request (bytes, counts, milliseconds)."""

    body_bytes: int = 1 << 20
    depth: int = 64
    """Deeper than any JSON schema of a tool in use, far under what exhausts the interpreter's stack."""
    keys: int = 10_000
    messages: int = 4096
    max_tokens: int = 1_000_000
    choices: int = 8
    stops: int = 4
    stop_bytes: int = 1024
    timeout_ms: int = 30_000
    remote_media: bool = False
    """Whether ``https:`` media URLs may pass. Off: the provider would fetch them, possibly inside our own network."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: who, its text (parts joined), and what media it carries."""

    role: Role
    text: str
    images: int = 0
    """Pictures; a video counts as several."""
    audio_bytes: int = 0
    """Of encoded sound."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat request that passed every check. ``None`` means the caller did not say."""

    model: str
    messages: tuple[Message, ...]
    stream: bool
    include_usage: bool | None
    """Whether the caller asked for a usage chunk of its own; the node asks its providers in any case."""
    max_tokens: int
    limited: bool
    """Whether the caller set that limit; one that did not takes what fits."""
    choices: int
    temperature: float | None
    top_p: float | None
    stop: tuple[str, ...]
    frequency_penalty: float | None
    presence_penalty: float | None
    timeout_ms: int
    wishes: Wishes
    """Who may serve it, at what price, chosen how."""
    needs: Ability
    prompt_bytes: int
    """UTF-8 bytes the model will read as text: messages, tool calls, tool definitions. Media is counted apart."""
    images: int
    audio_bytes: int
    raw: Mapping[str, Any] = field(repr=False)
    """The caller's JSON, for forwarding and nothing else."""

    @property
    def completion_tokens_max(self) -> int:
        """The most output tokens this request can cause, over all its choices."""
        return self.max_tokens * self.choices


def parse_chat(body: bytes, *, limits: ChatLimits, stream: bool = True) -> ChatRequest:
    """Read a chat request, refusing everything two readers could understand differently.

    ``stream`` is what a caller gets who does not say.

    Raises:
        NodeFault: ``BODY_TOO_LARGE``; ``INVALID_JSON`` for what is not one JSON object; ``INVALID_FIELD`` naming the
            field by its path.

    Source: OpenAI chat completion API; RFC 8259 and RFC 7493 (no duplicate names, no surrogates).
    """
    raw = parse_object(body, limits=limits)
    for name in _REFUSED:
        if raw.get(name) is not None:
            _bad(name, "is not sold by this node")
    for name, allowed in _ONLY.items():
        if raw.get(name) is not None and raw[name] not in allowed:
            _bad(name, "asks for something this node does not sell")
    model = raw.get("model")
    if not isinstance(model, str) or _MODEL.fullmatch(model) is None:
        _bad("model", "is not a model name")
    messages, message_bytes = _messages(raw.get("messages"), limits)
    said = _boolean(raw, "stream")
    return ChatRequest(
        model=model,
        messages=messages,
        stream=stream if said is None else said,
        include_usage=_include_usage(raw),
        max_tokens=_max_tokens(raw, limits),
        limited=raw.get("max_tokens") is not None or raw.get("max_completion_tokens") is not None,
        choices=_integer(raw, "n", 1, limits.choices) or 1,
        temperature=_number(raw, "temperature", 0, 2),
        top_p=_number(raw, "top_p", 0, 1),
        stop=_stop(raw, limits),
        frequency_penalty=_number(raw, "frequency_penalty", -2, 2),
        presence_penalty=_number(raw, "presence_penalty", -2, 2),
        timeout_ms=_integer(raw, "timeout_ms", 1, limits.timeout_ms) or limits.timeout_ms,
        wishes=parse_wishes(raw),
        needs=needs_of(raw),
        prompt_bytes=message_bytes + _tool_bytes(raw),
        images=sum(message.images for message in messages),
        audio_bytes=sum(message.audio_bytes for message in messages),
        raw=raw,
    )


# ----------------------------------------------------------------------------------------------------------- fields


def _bad(path: str, detail: str) -> NoReturn:
    raise NodeFault(NodeReason.INVALID_FIELD, field=path, detail=detail)


def _integer(raw: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = raw.get(name)
    if value is None:
        return None
    # type() and not isinstance(): True is an int, and a caller who sends it meant something else.
    if type(value) is not int or not low <= value <= high:
        _bad(name, f"is not an integer from {low} to {high}")
    return value


def _number(raw: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    if type(value) not in {int, float} or not low <= value <= high:
        _bad(name, f"is not a number from {low} to {high}")
    return float(value)


def _boolean(raw: Mapping[str, Any], name: str) -> bool | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        _bad(name, "is not a boolean")
    return value


def _max_tokens(raw: Mapping[str, Any], limits: ChatLimits) -> int:
    old = _integer(raw, "max_tokens", 1, limits.max_tokens)
    new = _integer(raw, "max_completion_tokens", 1, limits.max_tokens)
    if old is not None and new is not None and old != new:
        _bad("max_completion_tokens", "differs from max_tokens")
    return new or old or min(_MAX_TOKENS_DEFAULT, limits.max_tokens)


def _include_usage(raw: Mapping[str, Any]) -> bool | None:
    options = raw.get("stream_options")
    if options is None:
        return None
    if not isinstance(options, dict):
        _bad("stream_options", "is not an object")
    asked = options.get("include_usage")
    if asked is not None and not isinstance(asked, bool):
        _bad("stream_options.include_usage", "is not a boolean")
    return asked


def _stop(raw: Mapping[str, Any], limits: ChatLimits) -> tuple[str, ...]:
    value = raw.get("stop")
    if value is None:
        return ()
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or len(given) > limits.stops:
        _bad("stop", f"is not a string or an array of at most {limits.stops} strings")
    for index, item in enumerate(given):
        if not isinstance(item, str) or not item or len(item.encode()) > limits.stop_bytes:
            _bad(
                "stop" if isinstance(value, str) else f"stop[{index}]",
                f"is not a string of 1 to {limits.stop_bytes} bytes",
            )
    return tuple(given)


def _tool_bytes(raw: Mapping[str, Any]) -> int:
    """Check the shape of tool definitions and count what a model reads of them."""
    total = 0
    for name in ("tools", "functions"):
        given = raw.get(name)
        if given is None:
            continue
        if not isinstance(given, list):
            _bad(name, "is not an array")
        for index, item in enumerate(given):
            if not isinstance(item, dict):
                _bad(f"{name}[{index}]", "is not an object")
        total += _encoded_bytes(given)
    shape = raw.get("response_format")
    if shape is not None and not isinstance(shape, dict):
        _bad("response_format", "is not an object")
    return total + (_encoded_bytes(shape) if shape else 0)


def _encoded_bytes(value: Any) -> int:
    return len(orjson.dumps(value))


# --------------------------------------------------------------------------------------------------------- messages


def _messages(given: Any, limits: ChatLimits) -> tuple[tuple[Message, ...], int]:
    """The messages, and the text bytes a model will read of them."""
    if not isinstance(given, list) or not 1 <= len(given) <= limits.messages:
        _bad("messages", f"is not an array of 1 to {limits.messages} messages")
    made: list[Message] = []
    total = 0
    for index, item in enumerate(given):
        message, size = _message(item, f"messages[{index}]", limits)
        made.append(message)
        total += size
    return tuple(made), total


def _message(given: Any, path: str, limits: ChatLimits) -> tuple[Message, int]:
    if not isinstance(given, dict):
        _bad(path, "is not an object")
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        _bad(f"{path}.role", "is not one of " + ", ".join(Role))
    extra = _calls(given, path, Role(role)) + _names(given, path, Role(role))
    content = given.get("content")
    if content is None:
        if role != Role.ASSISTANT or not (given.get("tool_calls") or given.get("function_call")):
            _bad(f"{path}.content", "is missing, and only a message with tool calls may leave it out")
        return Message(Role.ASSISTANT, ""), extra
    if isinstance(content, str):
        return Message(Role(role), content), extra + len(content.encode())
    if not isinstance(content, list) or not content:
        _bad(f"{path}.content", "is not a string or an array of parts")
    texts: list[str] = []
    images = audio = 0
    for index, part in enumerate(content):
        seen = _part(part, f"{path}.content[{index}]", limits)
        texts += [] if seen.text is None else [seen.text]
        images += seen.images
        audio += seen.audio_bytes
    joined = "\n".join(texts)
    return Message(Role(role), joined, images, audio), extra + len(joined.encode())


def _names(given: Mapping[str, Any], path: str, role: Role) -> int:
    total = 0
    for name, needed in (("name", role is Role.FUNCTION), ("tool_call_id", role is Role.TOOL)):
        value = given.get(name)
        if value is None and not needed:
            continue
        if not isinstance(value, str) or not value:
            _bad(f"{path}.{name}", "is not a non-empty string")
        total += len(value.encode())
    return total


def _calls(given: Mapping[str, Any], path: str, role: Role) -> int:
    """Check the calls an assistant made earlier; the bytes a model reads of them."""
    total = 0
    for name, container in (("tool_calls", list), ("function_call", dict)):
        value = given.get(name)
        if value is None:
            continue
        if role is not Role.ASSISTANT:
            _bad(f"{path}.{name}", "belongs to assistant messages only")
        if not isinstance(value, container) or not value:
            _bad(f"{path}.{name}", "is not a non-empty " + ("array" if container is list else "object"))
        total += _encoded_bytes(value)
    for index, call in enumerate(given.get("tool_calls") or ()):
        where = f"{path}.tool_calls[{index}]"
        if not isinstance(call, dict):
            _bad(where, "is not an object")
        if not isinstance(call.get("id"), str) or not call["id"]:
            _bad(f"{where}.id", "is not a non-empty string")
        kind = call.get("type", "function")
        # A tuple, not a set: the caller may send a list here, and a list has no hash.
        if kind not in ("function", "custom") or not isinstance(call.get(kind), dict):
            _bad(f"{where}.type", "is not function or custom, with the object of that name")
        if not isinstance(call[kind].get("name"), str):
            _bad(f"{where}.{kind}.name", "is not a string")
        body = "arguments" if kind == "function" else "input"
        if not isinstance(call[kind].get(body), str):
            _bad(f"{where}.{kind}.{body}", "is not a string")
    return total


class _Part(NamedTuple):
    text: str | None = None
    images: int = 0
    audio_bytes: int = 0


def _part(given: Any, path: str, limits: ChatLimits) -> _Part:
    if not isinstance(given, dict):
        _bad(path, "is not an object")
    match given.get("type"):
        case "text" | "refusal" as kind:
            text = given.get(kind)
            if not isinstance(text, str):
                _bad(f"{path}.{kind}", "is not a string")
            return _Part(text)
        case "image_url" | "video_url" | "audio_url" as kind:
            source = given.get(kind)
            if not isinstance(source, dict):
                _bad(f"{path}.{kind}", "is not an object")
            url = _media_url(source.get("url"), f"{path}.{kind}.url", limits)
            if kind == "audio_url":
                return _Part(audio_bytes=len(url))
            return _Part(images=1 if kind == "image_url" else _IMAGES_PER_VIDEO)
        case "input_audio" as kind:
            sound = given.get(kind)
            if not isinstance(sound, dict) or not isinstance(sound.get("data"), str):
                _bad(f"{path}.{kind}.data", "is not a string")
            return _Part(audio_bytes=len(sound["data"]) * 3 // 4)
        case _:
            # An unknown part could name a URL for the provider to fetch, past the check above.
            _bad(f"{path}.type", "is not one of text, refusal, image_url, video_url, audio_url, input_audio")


def _media_url(url: Any, path: str, limits: ChatLimits) -> str:
    allowed = ("data:", "https://") if limits.remote_media else ("data:",)
    if not isinstance(url, str) or not url.startswith(allowed):
        _bad(path, "is not a URL starting with " + " or ".join(allowed))
    return url
