"""Providers that speak the OpenAI chat API: vLLM, llama.cpp, Ollama, resellers and OpenAI itself.

Pure code both ways. The decoder forwards an event's own bytes when they are already the one line we would write.

Source: the OpenAI chat completion API.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from mppnode.kernel.requests import NODE_ONLY
from mppnode.kernel.usage import Usage
from mppnode.providers.base import Call, Chunk, Completion, UpstreamFault, UpstreamRequest
from mppnode.providers.events import CHOICES_MAX, FRAME_BYTES_MAX, EventDecoder
from mppnode.providers.quirks import Quirks
from mppnode.providers.usage import TOKENS_MAX, parse_usage

__all__ = [
    "CHOICES_MAX",
    "FRAME_BYTES_MAX",
    "TOKENS_MAX",
    "OpenAICompatible",
    "OpenAIDecoder",
    "generated_text",
    "parse_usage",
]

_PLAIN: Final = Quirks()
_OUTPUT: Final = (
    "content",
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "tool_calls",
    "function_call",
    "refusal",
    "audio",
)
"""Members of a delta that hold generated output; ``role`` alone is not output."""
_REASONING: Final = ("reasoning_content", "reasoning", "reasoning_details")
"""One text under several names; a provider that sends two of them says it twice, so only the first counts."""
_TEXTS: Final = frozenset({"content", "reasoning_content", "reasoning", "refusal"})
_SPOKEN: Final = frozenset({"text", "thinking", "summary", "name", "arguments", "input", "transcript"})
"""Members of the structures inside a delta that hold generated text; ids, types and indexes are written by servers."""
_INSIDE: Final = frozenset({"function", "custom"})


class OpenAICompatible:
    """The adapter of the OpenAI chat API; ``mppnode.providers.base.Adapter`` in shape."""

    def __init__(self, quirks: Quirks) -> None:
        self.quirks = quirks

    @property
    def running_usage(self) -> bool:
        return self.quirks.continuous_usage

    @property
    def cancel_stops_billing(self) -> bool:
        return self.quirks.cancel_stops_billing

    def encode(self, call: Call) -> UpstreamRequest:
        """The caller's request with the model, the token limit and the usage report we decide.

        The limit is written under the one name the provider is known to obey and under no other: a provider that
        ignores the caller's choice of name would generate without bound at our expense. No header of the caller is
        forwarded; of its fields all but those that steer this node.

        Source: OpenAI chat completion API.
        """
        chat, quirks = call.chat, self.quirks
        payload = {name: value for name, value in chat.raw.items() if name not in NODE_ONLY}
        for name in ("max_tokens", "max_completion_tokens", "stream_options"):
            payload.pop(name, None)
        payload["model"] = call.model
        payload["stream"] = chat.stream
        payload[quirks.limit_field] = call.max_tokens
        if chat.stream and quirks.include_usage:
            payload["stream_options"] = {"include_usage": True}
            if quirks.continuous_usage:
                payload["stream_options"]["continuous_usage_stats"] = True
        payload.update(self._extra(call))
        headers = [
            ("Content-Type", "application/json"),
            ("Accept", "text/event-stream" if chat.stream else "application/json"),
            ("User-Agent", "mppnode"),
        ]
        if call.api_key is not None:
            bearer = quirks.auth == "bearer"
            headers.append(("Authorization", f"Bearer {call.api_key}") if bearer else ("api-key", call.api_key))
        url = call.base_url.rstrip("/") + "/chat/completions"
        return UpstreamRequest("POST", url, tuple(headers), orjson.dumps(payload))

    def _extra(self, call: Call) -> dict[str, Any]:
        """Members that only this provider knows."""
        del call
        return {}

    def decoder(self) -> EventDecoder:
        return OpenAIDecoder(self.quirks)

    def decode(self, body: bytes) -> Completion:
        answer = _answer(body)
        usage = parse_usage(answer.get("usage"), reasoning_added=self.quirks.reasoning_added)
        if usage is not None and self.quirks.reasoning_added:
            answer["usage"] = _with_reasoning(answer["usage"], usage)
        return Completion(answer, usage, generated_text(answer["choices"]))


class OpenAIDecoder(EventDecoder):
    """Cuts an OpenAI event stream into chunks, for any division of its bytes over reads."""

    __slots__ = ("_added", "_running")

    def __init__(self, quirks: Quirks = _PLAIN) -> None:
        super().__init__()
        self._added = quirks.reasoning_added
        self._running = quirks.continuous_usage

    def _read(self, event: dict[str, Any], payload: bytes, block: bytes | None, chunks: list[Chunk]) -> None:
        tokens, finished, text = _output(event.get("choices") or [])
        if tokens < 0:
            chunks.append(self._broken("upstream_error" if finished else "invalid_frame"))
            return
        report = event.get("usage")
        if report is None and finished and type(event.get("x_groq")) is dict:
            report = event["x_groq"].get("usage")  # Groq's older place; its `usage` comes later and then wins
        usage = None
        if report is not None:
            usage = parse_usage(report, reasoning_added=self._added)
            if usage is None:
                self.implausible_reports += 1
            elif self._added and type(event.get("usage")) is dict:
                # What the caller reads is what it pays for.
                event["usage"] = _with_reasoning(event["usage"], usage)
                block, payload = None, orjson.dumps(event)
            if self._running and event.get("choices"):
                # The caller asked for one report at the end, if at all; a running one is between the provider and us.
                event.pop("usage", None)
                block, payload = None, orjson.dumps(event)
                if not tokens and not finished:
                    usage = None  # of a role chunk: it says nothing yet, and would make the chunk look like the report
        if block is not None:
            frame = block + b"\n\n"
        else:
            # JSON allows line ends between its tokens, an event line does not.
            line = orjson.dumps(event) if b"\n" in payload else payload
            frame = b"data: " + line + b"\n\n"
        # Groq and llama.cpp repeat what they report under names of their own.
        reported = event.get("usage") is not None or (finished and ("x_groq" in event or "timings" in event))
        chunks.append(Chunk(frame, tokens, usage, finished, reported=reported, text=text))


def _output(choices: Any) -> tuple[int, bool, str]:
    """How many choices of an event carry output, whether one has finished, and the output joined.

    -1 instead of a count when they are no choices, or when one of them failed; the second is then whether it failed.
    Choices are told apart by their index, so naming one twice in an event counts once.
    """
    if type(choices) is not list or len(choices) > CHOICES_MAX:
        return -1, False, ""
    if len(choices) == 1 and type(choices[0]) is dict and choices[0].get("finish_reason") is None:
        text = _only_text(choices[0].get("delta"))
        if text:  # the ordinary token: nothing is joined or copied
            return 1, False, text
    carrying: list[Any] = []
    texts: list[str] = []
    finished = False
    for choice in choices:
        if type(choice) is not dict:
            return -1, False, ""
        reason = choice.get("finish_reason")
        if reason == "error":
            return -1, True, ""
        finished = finished or reason is not None
        delta = choice.get("delta")
        if delta is None:
            carries = choice.get("text")  # the form of the older completions API, which some servers also send here
            texts.append(carries if type(carries) is str else "")
        elif type(delta) is not dict:
            return -1, False, ""
        else:
            carries = delta.get("content") or any(delta.get(name) for name in _OUTPUT)
            if carries:
                texts.append(_said(delta))
        if carries and choice.get("index") not in carrying:
            carrying.append(choice.get("index"))
    return len(carrying), finished, "".join(texts)


def _only_text(delta: Any) -> str:
    """The text of a delta that holds one plain text and nothing else but a role; empty for every other delta."""
    only: Any = None
    plain = False
    if type(delta) is dict:
        for name, value in delta.items():
            if value and name != "role":
                if only is not None:
                    return ""
                only, plain = value, name in _TEXTS
    return only if plain and type(only) is str else ""


def _said(part: dict[str, Any]) -> str:
    """The generated text of a delta or message: answer, reasoning, refusal, names and arguments of calls."""
    thought = next((part[name] for name in _REASONING if part.get(name)), None)
    spoken = (part.get("content"), part.get("refusal"), part.get("tool_calls"), part.get("function_call"))
    texts: list[str] = []
    # A stack and no recursion: how deep a provider nests its answer is not ours to trust.
    waiting: list[Any] = [part.get("audio"), *reversed(spoken), thought]
    while waiting:
        value = waiting.pop()
        if type(value) is str:
            texts.append(value)
        elif type(value) is list:
            waiting += reversed(value)
        elif type(value) is dict:
            inside = [value[name] for name in value if name in _SPOKEN or name in _INSIDE]
            waiting += reversed(inside)
    return "".join(texts)


def _with_reasoning(given: dict[str, Any], usage: Usage) -> dict[str, Any]:
    """The provider's report with reasoning inside its completion, as everyone else counts."""
    return {**given, "completion_tokens": usage.completion, "total_tokens": usage.prompt + usage.completion}


def _answer(body: bytes) -> dict[str, Any]:
    """A whole answer with choices.

    Raises:
        UpstreamFault: ``protocol`` when it is not one, ``error`` when it reports a failure.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UpstreamFault("protocol", detail="the provider's answer is not JSON") from None
    if type(answer) is not dict:
        raise UpstreamFault("protocol", detail="the provider's answer is not a JSON object")
    if answer.get("error") or answer.get("object") == "error":
        raise UpstreamFault("error", detail="the provider reported an error in its answer")
    choices = answer.get("choices")
    if type(choices) is not list or not choices or not all(type(choice) is dict for choice in choices):
        raise UpstreamFault("protocol", detail="the provider's answer has no choices")
    if any(choice.get("error") or choice.get("finish_reason") == "error" for choice in choices):
        raise UpstreamFault("error", detail="the provider reported an error in a choice")
    return answer


def generated_text(choices: list[dict[str, Any]]) -> str:
    """What the choices of a whole answer say, joined."""
    messages = (choice.get("message") for choice in choices)
    return "".join(_said(message) for message in messages if type(message) is dict)


# ------------------------------------------------------------------------------------- what the engine calls directly
