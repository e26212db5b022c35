"""A chat request, parsed once and strictly. Below this file nobody looks at the caller's JSON to decide anything.

The original object is kept beside the parsed fields only to be forwarded: unknown members pass to the provider, the
node's own members never do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from channels.faults import ChannelFault
from channels.wire import strict_json
from mppnode.kernel.faults import NodeFault, NodeReason

BODY_BYTES_MAX: Final = 1024 * 1024  # reliability 2.9; images travel as URLs
_DEPTH_MAX: Final = 64  # tool schemas nest; nothing honest nests deeper
_MESSAGES_MAX: Final = 10_000
_MODEL_TEXT_MAX: Final = 256
_STOP_MAX: Final = 4  # OpenAI's limit
_MAX_TOKENS_DEFAULT: Final = 4096  # documented default
_MAX_TOKENS_MAX: Final = 1_000_000
_TIMEOUT_MS_MAX: Final = 30_000  # documented limit
_PRICE_CENTS_MAX: Final = 10**9
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

NODE_FIELDS: Final = frozenset(
    {
        "routing_strategy",
        "allow_external",
        "max_input_price_per_million",
        "max_output_price_per_million",
        "timeout_ms",
    }
)
"""Members that steer this node; a provider must never see them."""


class Strategy(StrEnum):
    """How a provider is chosen."""

    CHEAPEST = "cheapest"
    FASTEST = "fastest"
    BALANCED = "balanced"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The most a caller pays, in integer cents per million tokens; always both."""

    input_cents: int
    output_cents: int


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One ``/v1/chat/completions`` call. ``prompt_bytes`` is the size of everything the model will read."""

    model: str
    stream: bool
    max_tokens: int
    choices: int
    timeout_ms: int
    strategy: Strategy
    allow_external: bool
    ceilings: Ceilings | None
    prompt_bytes: int
    body: Mapping[str, Any]

    def upstream_body(self, model: str) -> dict[str, Any]:
        """The body for the provider: its own model name, bounded ``max_tokens``, usage always asked for."""
        body = {name: value for name, value in self.body.items() if name not in NODE_FIELDS}
        body["model"] = model
        body["stream"] = self.stream
        bound = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        body[bound] = self.max_tokens
        if self.stream:
            body["stream_options"] = {**body.get("stream_options", {}), "include_usage": True}
        else:
            body.pop("stream_options", None)
        return body


def parse_chat(body: bytes, *, body_bytes_max: int = BODY_BYTES_MAX) -> ChatRequest:
    """Read the body of a chat completion request.

    Raises:
        NodeFault: ``BODY_TOO_LARGE``, ``INVALID_JSON``, or ``INVALID_FIELD`` naming the member.

    Source: OpenAI chat completions; the parameter table in docs/api.md.
    """
    if len(body) > body_bytes_max:
        raise NodeFault(NodeReason.BODY_TOO_LARGE, detail=f"the body is larger than {body_bytes_max} bytes")
    fields = _Fields(_load(body, body_bytes_max))
    prompt_bytes = _messages(fields) + _tools(fields)
    strategy = Strategy(fields.choice("routing_strategy", frozenset(Strategy), Strategy.BALANCED))
    for name, low, high in _RANGES:
        fields.number(name, low, high)
    _stop(fields)
    fields.optional("stream_options", dict)
    fields.optional("user", str)
    most = min(
        fields.whole("max_tokens", 1, _MAX_TOKENS_MAX, _MAX_TOKENS_DEFAULT),
        fields.whole("max_completion_tokens", 1, _MAX_TOKENS_MAX, _MAX_TOKENS_MAX),
    )
    return ChatRequest(
        model=fields.text("model", _MODEL_TEXT_MAX),
        stream=fields.flag("stream", default=True),
        max_tokens=most,
        choices=fields.whole("n", 1, 16, 1),
        timeout_ms=fields.whole("timeout_ms", 1, _TIMEOUT_MS_MAX, _TIMEOUT_MS_MAX),
        strategy=strategy,
        allow_external=fields.flag("allow_external", default=strategy is not Strategy.CHEAPEST),
        ceilings=_ceilings(fields),
        prompt_bytes=prompt_bytes,
        body=fields.members,
    )


_RANGES: Final = (
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
)


def _load(body: bytes, size_max: int) -> dict[str, Any]:
    try:
        value = strict_json.loads(body, field="body", size_max=size_max, depth_max=_DEPTH_MAX, floats=True)
    except ChannelFault as fault:
        raise NodeFault(NodeReason.INVALID_JSON, field="body", detail=fault.detail) from None
    if not isinstance(value, dict):
        raise NodeFault(NodeReason.INVALID_JSON, field="body", detail="is not a JSON object")
    return value


def _refuse(field: str, detail: str) -> NodeFault:
    return NodeFault(NodeReason.INVALID_FIELD, field=field, detail=detail)


class _Fields:
    """Typed access to the members of the request; ``null`` counts as absent, as OpenAI's own clients send it."""

    def __init__(self, members: dict[str, Any]) -> None:
        self.members = {name: value for name, value in members.items() if value is not None}

    def text(self, name: str, length_max: int) -> str:
        value = self.members.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= length_max:
            raise _refuse(name, f"is required and must be text of 1 to {length_max} characters")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.members.get(name, default)
        if not isinstance(value, bool):
            raise _refuse(name, "must be true or false")
        return value

    def whole(self, name: str, low: int, high: int, default: int) -> int:
        value = self.members.get(name, default)
        # bool is a subclass of int, and 3.0 is not an integer: both are callers' mistakes worth telling.
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _refuse(name, f"must be an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> None:
        value = self.members.get(name, low)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise _refuse(name, f"must be a number from {low:g} to {high:g}")

    def choice(self, name: str, allowed: frozenset[str], default: str) -> str:
        value = self.members.get(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise _refuse(name, "must be one of " + ", ".join(sorted(allowed)))
        return value

    def optional(self, name: str, kind: type) -> None:
        if name in self.members and not isinstance(self.members[name], kind):
            raise _refuse(name, f"must be {'an object' if kind is dict else 'text'}")


def _messages(fields: _Fields) -> int:
    messages = fields.members.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= _MESSAGES_MAX:
        raise _refuse("messages", f"is required and must be a list of 1 to {_MESSAGES_MAX} messages")
    return sum(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: Any, path: str) -> int:
    if not isinstance(message, dict):
        raise _refuse(path, "must be an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _refuse(f"{path}.role", "must be one of " + ", ".join(sorted(_ROLES)))
    content = message.get("content")
    if content is None:
        if role != "assistant":
            raise _refuse(f"{path}.content", "is required")
    elif isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise _refuse(f"{path}.content[{index}]", "must be an object with a type")
    elif not isinstance(content, str):
        raise _refuse(f"{path}.content", "must be text or a list of parts")
    return _bytes_in(message)


def _tools(fields: _Fields) -> int:
    total = 0
    for name in ("tools", "functions", "response_format"):
        total += _bytes_in(fields.members.get(name))
    return total


def _bytes_in(value: Any) -> int:
    """UTF-8 bytes of all text inside a JSON value: an upper bound, to within a template, of its tokens."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, dict):
        return sum(len(name) + _bytes_in(item) for name, item in value.items())
    if isinstance(value, list):
        return sum(map(_bytes_in, value))
    return 1 if value is not None else 0


def _stop(fields: _Fields) -> None:
    stop = fields.members.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or len(texts) > _STOP_MAX or not all(isinstance(text, str) for text in texts):
        raise _refuse("stop", f"must be text or a list of at most {_STOP_MAX} texts")


def _ceilings(fields: _Fields) -> Ceilings | None:
    names = ("max_input_price_per_million", "max_output_price_per_million")
    present = [name for name in names if name in fields.members]
    if not present:
        return None
    for name in names:
        if name not in present:
            raise _refuse(name, "must be set together with the other price ceiling")
    cents: Callable[[str], int] = lambda name: fields.whole(name, 0, _PRICE_CENTS_MAX, 0)  # noqa: E731
    return Ceilings(cents(names[0]), cents(names[1]))
