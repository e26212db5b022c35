"""What the translating adapters share when they read a caller's OpenAI request.

Strict on purpose. Where an API has no words for a member, the request is refused with the member's name: leaving it
out would answer another question than the caller asked, and passing it on under OpenAI's name would be refused there,
a round trip later. Only members that cannot change an answer are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn

import orjson

from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.requests import NODE_ONLY

_WITHOUT_EFFECT: Final = frozenset(
    {
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "metadata",
        "modalities",  # only text is sold
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "store",
        "user",
    }
)
"""Members that are written by the adapter from the parsed request, or that no answer depends on."""
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "parallel_tool_calls": (True,),
    "verbosity": ("medium",),
}
"""Values that ask for what happens anyway."""
_DATA_URL: Final = re.compile(r"data:([a-z]+/[a-z0-9.+-]{1,64})(?:;[^,;]{1,64})*;base64,", re.ASCII)


def refuse(path: str, detail: str) -> NoReturn:
    """Refuse the request because of one member.

    Raises:
        NodeFault: ``INVALID_FIELD``, always.
    """
    raise NodeFault(NodeReason.INVALID_FIELD, field=path, detail=detail)


def check_members(raw: Mapping[str, Any], understood: frozenset[str]) -> None:
    """Refuse members that are neither understood nor without effect.

    Raises:
        NodeFault: ``INVALID_FIELD`` naming the member.
    """
    for name, value in raw.items():
        if value is None or name in understood or name in _WITHOUT_EFFECT or name in NODE_ONLY:
            continue
        if value not in _NEUTRAL.get(name, ()):
            refuse(name, "cannot be asked of this provider")


def data_url(url: str, path: str) -> tuple[str, str]:
    """The media type of a base64 ``data:`` URL and its payload, unchanged.

    Raises:
        NodeFault: ``INVALID_FIELD``. Source: RFC 2397.
    """
    head = _DATA_URL.match(url)
    if head is None:
        refuse(path, "is not a base64 data URL, and this provider is sent no other")
    return head[1], url[head.end() :]


def functions_of(raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The function definitions of ``tools``, checked.

    Raises:
        NodeFault: ``INVALID_FIELD`` for other kinds of tools and for definitions of another shape.
    """
    for index, tool in enumerate(raw.get("tools") or ()):
        path = f"tools[{index}]"
        if tool.get("type") != "function":
            refuse(f"{path}.type", "is not function, which is all this provider can be given")
        function = tool.get("function")
        if type(function) is not dict:
            refuse(f"{path}.function", "is not an object")
        for name, kind in (("name", str), ("description", str), ("parameters", dict), ("strict", bool)):
            value = function.get(name)
            if (value is not None or name == "name") and type(value) is not kind:
                refuse(f"{path}.function.{name}", "is missing or of the wrong type")
        yield function


def tool_choice(raw: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """``auto``, ``none``, ``required`` or ``function`` with the function's name; nothing when it is not given.

    Raises:
        NodeFault: ``INVALID_FIELD``.
    """
    given = raw.get("tool_choice")
    if given is None:
        return None, None
    if given in ("auto", "none", "required"):
        return given, None
    function = given.get("function") if type(given) is dict and given.get("type") == "function" else None
    if type(function) is not dict or type(function.get("name")) is not str:
        refuse("tool_choice", "is not auto, none, required or a function")
    return "function", function["name"]


def response_schema(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """``text``, ``json_object`` or ``json_schema``, and the schema of the last.

    Raises:
        NodeFault: ``INVALID_FIELD``.
    """
    given = raw.get("response_format")
    if given is None:
        return "text", {}
    kind = given.get("type")
    if kind in ("text", "json_object"):
        return kind, {}
    wrapper = given.get("json_schema")
    if kind != "json_schema" or type(wrapper) is not dict or type(wrapper.get("schema")) is not dict:
        refuse("response_format", "is not text, json_object or json_schema with a schema")
    return "json_schema", wrapper["schema"]


def arguments_of(call: Mapping[str, Any], path: str) -> orjson.Fragment:
    """The arguments of an earlier call as they were written; numbers keep every digit.

    Raises:
        NodeFault: ``INVALID_FIELD`` when they are not a JSON object, which only OpenAI's shape can carry.
    """
    if call.get("type", "function") != "function":
        refuse(f"{path}.type", "is not function, which is all this provider can be given")
    text = call["function"]["arguments"] or "{}"
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    if type(value) is not dict:
        refuse(f"{path}.function.arguments", "is not a JSON object, which this provider needs")
    return orjson.Fragment(text)


def parts_of(message: Mapping[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The content parts of a message with their paths; a plain string is one text part, an empty one is none."""
    content = message.get("content")
    if type(content) is str:
        content = [{"type": "text", "text": content}]
    for index, part in enumerate(content or ()):
        if part["type"] == "refusal":
            part = {"type": "text", "text": part["refusal"]}  # noqa: PLW2901  what the assistant said, all the same
        if part["type"] != "text" or part["text"]:
            yield f"{path}.content[{index}]", part


def media_url(part: Mapping[str, Any]) -> str:
    """The URL of an image, audio or video part."""
    url: str = part[part["type"]]["url"]
    return url
