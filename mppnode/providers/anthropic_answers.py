"""Anthropic's Messages API: its events and messages as OpenAI chunks and completions.

Thoughts become ``reasoning_content``. Their signatures, which a caller must give back when it continues a turn with
tools, travel in ``reasoning_details`` beside the text, as ``reasoning.text`` or ``reasoning.encrypted``; pieces of one
block share an ``index``.

Source: Anthropic API reference, "Messages" and "Streaming Messages".
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from mppnode.kernel.clock import Clock
from mppnode.providers.answers import Head, called, piece, text_of
from mppnode.providers.base import Chunk, Completion, UpstreamFault
from mppnode.providers.events import EventDecoder
from mppnode.providers.usage import parse_anthropic_usage

_FINISH: Final = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
"""Their reasons to stop, where ours is not plain ``stop``."""
_COUNTS: Final = (
    "input_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "output_tokens",
    "output_tokens_details",
)
_BLOCKS_MAX: Final = 1024
"""Blocks in one message: far above the tool calls of any answer, and it bounds what one stream keeps."""


class AnthropicDecoder(EventDecoder):
    """Turns the events of one message into OpenAI chunks; usage comes once, at the end."""

    __slots__ = ("_calls", "_clock", "_finished", "_head", "_silent", "_usage")

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self._clock = clock
        self._head = Head("chat.completion.chunk", name=None, model=None, clock=clock)
        self._usage: dict[str, Any] = {}
        self._calls: dict[int, int] = {}
        """Index of a block that is a tool call: its place among the calls."""
        self._silent: set[int] = set()
        """Blocks of calls that have not said an argument yet."""
        self._finished = False

    def _read(self, event: dict[str, Any], payload: bytes, block: bytes | None, chunks: list[Chunk]) -> None:
        del payload, block
        match event.get("type"):
            case "message_start":
                self._start(event.get("message"), chunks)
            case "content_block_start":
                self._block(event.get("index"), event.get("content_block"), chunks)
            case "content_block_delta":
                self._delta(event.get("index"), event.get("delta"), chunks)
            case "content_block_stop":
                self._block_end(event.get("index"), chunks)
            case "message_delta":
                self._message_delta(event, chunks)
            case "message_stop":
                self._finish(chunks)
            case "error":
                chunks.append(self._broken("upstream_error"))
            case _:
                pass  # pings, and events that are added over time: the API asks its clients to skip them

    def _finish(self, chunks: list[Chunk]) -> None:
        usage = parse_anthropic_usage(self._usage)
        if usage is None:
            self.implausible_reports += bool(self._usage)
        else:
            chunks.append(Chunk(self._head.frame([], usage), usage=usage, reported=True))
        super()._finish(chunks)

    def _say(self, chunks: list[Chunk], delta: dict[str, Any], text: str) -> None:
        chunks.append(Chunk(self._head.frame([piece(0, delta)]), 1 if text else 0, text=text))

    def _start(self, message: Any, chunks: list[Chunk]) -> None:
        if type(message) is not dict:
            chunks.append(self._broken("invalid_frame"))
            return
        name, model = message.get("id"), message.get("model")
        self._head = Head("chat.completion.chunk", name=name, model=model, clock=self._clock)
        self._count(message.get("usage"))
        self._usage.pop("output_tokens", None)  # of a message that has not begun; the final count comes with its end
        self._say(chunks, {"role": "assistant", "content": ""}, "")

    def _block(self, index: Any, given: Any, chunks: list[Chunk]) -> None:
        if type(given) is not dict or type(index) is not int or len(self._calls) >= _BLOCKS_MAX:
            chunks.append(self._broken("invalid_frame"))
            return
        match given.get("type"):
            case "text" if text := text_of(given.get("text")):
                self._say(chunks, {"content": text}, text)
            case "thinking" if text := text_of(given.get("thinking")):
                self._think(index, text, chunks)
            case "redacted_thinking":
                sealed = {"type": "reasoning.encrypted", "data": text_of(given.get("data")), "index": index}
                self._say(chunks, {"reasoning_details": [sealed]}, "")
            case "tool_use":
                place = self._calls[index] = len(self._calls)
                self._silent.add(index)
                name = text_of(given.get("name"))
                self._say(chunks, {"tool_calls": [called(place, text_of(given.get("id")), name, "")]}, name)
            case _:
                pass

    def _delta(self, index: Any, delta: Any, chunks: list[Chunk]) -> None:
        if type(delta) is not dict or type(index) is not int:
            chunks.append(self._broken("invalid_frame"))
            return
        match delta.get("type"):
            case "text_delta" if text := text_of(delta.get("text")):
                self._say(chunks, {"content": text}, text)
            case "thinking_delta" if text := text_of(delta.get("thinking")):
                self._think(index, text, chunks)
            case "signature_delta" if text := text_of(delta.get("signature")):
                signed = {"type": "reasoning.text", "signature": text, "index": index}
                self._say(chunks, {"reasoning_details": [signed]}, "")
            case "input_json_delta" if (text := text_of(delta.get("partial_json"))) and index in self._calls:
                self._silent.discard(index)
                self._argue(index, text, text, chunks)
            case _:
                pass  # citations have no place in a chunk

    def _think(self, index: int, text: str, chunks: list[Chunk]) -> None:
        # Said twice, for two readers: who shows thoughts, and who must give each block back with its signature.
        block = {"type": "reasoning.text", "text": text, "index": index}
        self._say(chunks, {"reasoning_content": text, "reasoning_details": [block]}, text)

    def _argue(self, index: int, arguments: str, text: str, chunks: list[Chunk]) -> None:
        call = {"index": self._calls[index], "function": {"arguments": arguments}}
        self._say(chunks, {"tool_calls": [call]}, text)

    def _block_end(self, index: Any, chunks: list[Chunk]) -> None:
        if type(index) is int and index in self._silent:
            self._silent.discard(index)
            self._argue(index, "{}", "", chunks)  # a call without arguments says nothing here; clients parse JSON

    def _message_delta(self, event: dict[str, Any], chunks: list[Chunk]) -> None:
        self._count(event.get("usage"))
        delta = event.get("delta")
        reason = delta.get("stop_reason") if type(delta) is dict else None
        if reason is not None and not self._finished:
            self._finished = True
            chunks.append(Chunk(self._head.frame([piece(0, {}, _finish_of(reason))]), finished=True))

    def _count(self, usage: Any) -> None:
        """Take over a report: every count in it is cumulative, so the last one holds and nothing is added."""
        if type(usage) is dict:
            self._usage |= {name: usage[name] for name in _COUNTS if usage.get(name) is not None}


def _finish_of(reason: Any) -> str:
    return _FINISH.get(reason, "stop") if type(reason) is str else "stop"


def decode_message(body: bytes, clock: Clock | None = None) -> Completion:
    """A whole message as a completion.

    Raises:
        UpstreamFault: ``protocol`` when it is not a message, ``error`` when it reports a failure.

    Source: Anthropic Messages API.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UpstreamFault("protocol", detail="the provider's answer is not JSON") from None
    if type(answer) is not dict:
        raise UpstreamFault("protocol", detail="the provider's answer is not a JSON object")
    if answer.get("error") or answer.get("type") == "error":
        raise UpstreamFault("error", detail="the provider reported an error in its answer")
    blocks = answer.get("content")
    if type(blocks) is not list or not all(type(block) is dict for block in blocks):
        raise UpstreamFault("protocol", detail="the provider's answer has no content")
    message, text = _message(blocks)
    report = answer.get("usage")
    usage = parse_anthropic_usage(report) if type(report) is dict else None
    head = Head("chat.completion", name=answer.get("id"), model=answer.get("model"), clock=clock)
    choice = {"index": 0, "message": message, "finish_reason": _finish_of(answer.get("stop_reason"))}
    return Completion(head.completion([choice], usage), usage, text)


def _message(blocks: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The message of the completion and everything generated, joined."""
    said: list[str] = []
    thought: list[str] = []
    details: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        match block.get("type"):
            case "text":
                said.append(text_of(block.get("text")))
            case "thinking":
                thought.append(text_of(block.get("thinking")))
                signed = {"text": thought[-1], "signature": text_of(block.get("signature"))}
                details.append({"type": "reasoning.text", **signed})
            case "redacted_thinking":
                details.append({"type": "reasoning.encrypted", "data": text_of(block.get("data"))})
            case "tool_use":
                arguments = orjson.dumps(block.get("input") or {}).decode()
                calls.append(called(None, text_of(block.get("id")), text_of(block.get("name")), arguments))
            case _:
                pass
    message: dict[str, Any] = {"role": "assistant", "content": "".join(said) or None}
    if not calls and message["content"] is None:
        message["content"] = ""
    if thought:
        message["reasoning_content"] = "".join(thought)
    if details:
        message["reasoning_details"] = details
    if calls:
        message["tool_calls"] = calls
    spoken = [call["function"]["name"] + call["function"]["arguments"] for call in calls]
    return message, "".join(thought + said + spoken)
