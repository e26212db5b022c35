"""Providers that speak the OpenAI chat API: vLLM, llama.cpp, Ollama, resellers and OpenAI itself.

Requests are written and streams are cut by pure code. The decoder forwards an event's own bytes when they are already
the one line we would write, and never forwards anything but JSON payloads: event names, ids, retry hints and comments
of a provider stay behind, so that only our code can write payment events.

Source: the OpenAI chat completion API; the WHATWG server-sent events grammar for the framing.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from mppnode.kernel.requests import NODE_ONLY, ChatRequest
from mppnode.kernel.usage import Usage
from mppnode.providers.base import Chunk, UpstreamFault, UpstreamRequest

FRAME_BYTES_MAX: Final = 256 * 1024
"""One event. Long enough for the top log-probabilities of a burst, short enough to keep per stream."""
TOKENS_MAX: Final = 10_000_000
"""A count above it is not a usage report: the longest contexts on sale are a tenth of it."""
CHOICES_MAX: Final = 128
"""Choices in one event: the most the API lets a caller ask for. Every pair of them is compared."""

_DONE: Final = b"[DONE]"
_DONE_FRAME: Final = b"data: [DONE]\n\n"
_BOM: Final = b"\xef\xbb\xbf"
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


def encode_request(
    chat: ChatRequest,
    *,
    model: str,
    base_url: str,
    api_key: str | None,
    max_tokens: int,
    limit_field: str = "max_tokens",
) -> UpstreamRequest:
    """The provider's request for ``chat``, with the model, the token limit and the usage report we decide.

    The limit is written under the one name the provider is known to obey (``limit_field``) and under no other: a
    provider that ignores the caller's choice of name would generate without bound at our expense. No header of the
    caller is forwarded.

    Source: OpenAI chat completion API.
    """
    payload = {name: value for name, value in chat.raw.items() if name not in NODE_ONLY}
    for name in ("max_tokens", "max_completion_tokens", "stream_options"):
        payload.pop(name, None)
    payload["model"] = model
    payload["stream"] = chat.stream
    payload[limit_field] = max_tokens
    headers = [
        ("Content-Type", "application/json"),
        ("Accept", "text/event-stream" if chat.stream else "application/json"),
        ("User-Agent", "mppnode"),
    ]
    if chat.stream:
        payload["stream_options"] = {"include_usage": True}
    if api_key is not None:
        headers.append(("Authorization", f"Bearer {api_key}"))
    return UpstreamRequest(
        method="POST",
        url=base_url.rstrip("/") + "/chat/completions",
        headers=tuple(headers),
        body=orjson.dumps(payload),
    )


def parse_usage(given: Any) -> Usage | None:
    """A provider's usage report, or ``None`` when its numbers cannot be true."""
    if not isinstance(given, dict):
        return None
    prompt, completion = given.get("prompt_tokens"), given.get("completion_tokens", 0)
    cached = _detail(given, "prompt_tokens_details", "cached_tokens")
    reasoning = _detail(given, "completion_tokens_details", "reasoning_tokens")
    counts: list[int] = []
    for count in (prompt, cached, completion, reasoning):
        if type(count) is not int or not 0 <= count <= TOKENS_MAX:
            return None
        counts.append(count)
    usage = Usage(*counts)
    return usage if usage.cached_prompt <= usage.prompt else None


def _detail(given: dict[str, Any], group: str, name: str) -> Any:
    """A count inside an optional group; absent and null are zero, anything odd is returned to be refused."""
    details = given.get(group)
    if details is None:
        return 0
    if not isinstance(details, dict):
        return None
    value = details.get(name)
    return 0 if value is None else value


class OpenAIDecoder:
    """Cuts an OpenAI event stream into chunks, for any division of its bytes over reads.

    Nothing is raised. A stream that breaks the rules yields the chunks that came before, then one whose ``error``
    names the rule, and from then on nothing: raising would lose the chunks of the same read that are whole.
    """

    __slots__ = ("_after_cr", "_bom", "_over", "_searched", "_tail", "implausible_reports")

    def __init__(self) -> None:
        self._tail = bytearray()
        self._searched = 0
        self._after_cr = False
        self._bom = True
        self._over = False
        self.implausible_reports = 0
        """Usage reports that were dropped because their numbers cannot be true."""

    def feed(self, data: bytes) -> list[Chunk]:
        """The chunks completed by ``data``, in order."""
        if self._over or not data:
            return []
        if self._after_cr or b"\r" in data:
            data = self._unify(data)
        tail = self._tail
        if not tail and data.endswith(b"\n\n"):
            return self._events(data[:-2])
        # Appending to a bytearray and searching only what is new keeps a provider that sends single bytes linear.
        tail += data
        cut = tail.rfind(b"\n\n", max(0, self._searched - 1))
        self._searched = len(tail)
        if cut < 0:
            if len(tail) > FRAME_BYTES_MAX + 1:  # the first half of its blank line is not part of a frame
                return [self._broken("oversize_frame")]
            return []
        whole = bytes(tail[:cut])
        del tail[: cut + 2]
        self._searched = len(tail)
        chunks = self._events(whole)
        if len(tail) > FRAME_BYTES_MAX + 1 and not self._over:
            chunks.append(self._broken("oversize_frame"))
        return chunks

    def end(self) -> list[Chunk]:
        """What is left when the provider closes: an event that lacked only its blank line, or an error."""
        if self._over or not self._tail:
            return []
        return self.feed(b"\n\n")

    def _unify(self, data: bytes) -> bytes:
        """Turn CRLF and CR into LF. A CR at the end of a read may be half of a CRLF."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r") if data else False
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _broken(self, code: str) -> Chunk:
        self._over = True
        self._tail.clear()
        return Chunk(error=code)

    def _events(self, whole: bytes) -> list[Chunk]:
        if self._bom:
            self._bom = False
            whole = whole.removeprefix(_BOM)
        chunks: list[Chunk] = []
        for block in whole.split(b"\n\n"):
            if len(block) > FRAME_BYTES_MAX:
                chunks.append(self._broken("oversize_frame"))
            elif block.startswith(b"data: {") and block.endswith(b"}") and b"\n" not in block:
                chunks.append(self._event(block[6:], block))
            else:
                payload = _payload(block)
                if payload is None:
                    continue
                if payload == _DONE:
                    self._over = True
                    chunks.append(Chunk(_DONE_FRAME, done=True))
                else:
                    chunks.append(self._event(payload, None))
            if self._over:
                break
        return chunks

    def _event(self, payload: bytes, block: bytes | None) -> Chunk:
        """One JSON payload; ``block`` is the event as it came when that is already what we would write."""
        try:
            event = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return self._broken("invalid_frame")
        if type(event) is not dict:
            return self._broken("invalid_frame")
        if event.get("error") or event.get("object") == "error":
            return self._broken("upstream_error")  # its text stays here: it may quote our key or the prompt
        tokens, finished = _counts(event.get("choices") or [])
        if tokens < 0:
            return self._broken("invalid_frame")
        usage = None
        if event.get("usage") is not None:
            usage = parse_usage(event["usage"])
            if usage is None:
                self.implausible_reports += 1
        if block is not None:
            frame = block + b"\n\n"
        else:
            # JSON allows line ends between its tokens, an event line does not.
            line = orjson.dumps(event) if b"\n" in payload else payload
            frame = b"data: " + line + b"\n\n"
        return Chunk(frame, tokens, usage, finished)


def _counts(choices: Any) -> tuple[int, bool]:
    """How many choices of an event carry output (-1 when they are no choices), and whether one has finished.

    Choices are told apart by their index, so naming one twice in an event counts once.
    """
    carrying: list[Any] = []
    finished = False
    if type(choices) is not list or len(choices) > CHOICES_MAX:
        return -1, False
    for choice in choices:
        if type(choice) is not dict:
            return -1, False
        if choice.get("finish_reason") is not None:
            finished = True
        delta = choice.get("delta")
        if delta is None:
            carries = choice.get("text")  # the form of the older completions API, which some servers also send here
        elif type(delta) is not dict:
            return -1, False
        else:
            carries = delta.get("content") or any(delta.get(name) for name in _OUTPUT)
        if carries and choice.get("index") not in carrying:
            carrying.append(choice.get("index"))
    return len(carrying), finished


def _payload(block: bytes) -> bytes | None:
    """The joined data lines of an event, or ``None`` when it has none. Every other field is dropped."""
    lines = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    payload = b"\n".join(lines).strip(b" \t\n")
    return payload or None


def decode_completion(body: bytes) -> tuple[dict[str, Any], Usage | None]:
    """The provider's answer to a request without streaming, and its usage report if that can be true.

    Raises:
        UpstreamFault: ``protocol`` when it is not a completion, ``error`` when it reports one.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UpstreamFault("protocol", detail="the provider's answer is not JSON") from None
    if not isinstance(answer, dict):
        raise UpstreamFault("protocol", detail="the provider's answer is not a JSON object")
    if answer.get("error") or answer.get("object") == "error":
        raise UpstreamFault("error", detail="the provider reported an error in its answer")
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise UpstreamFault("protocol", detail="the provider's answer has no choices")
    return answer, parse_usage(answer.get("usage"))


def generated_bytes(choices: list[dict[str, Any]]) -> int:
    """UTF-8 bytes of what the choices of a buffered answer say, without the JSON around them."""
    messages = (choice.get("message") for choice in choices)
    spoken = (message.get(name) for message in messages if type(message) is dict for name in _OUTPUT)
    return sum(len(value.encode() if type(value) is str else orjson.dumps(value)) for value in spoken if value)
