"""Google's Gemini API: its responses as OpenAI chunks and completions.

A stream is a row of whole responses, each with its share of every candidate; it ends by ending, so the end marker is
ours. Thoughts become ``reasoning_content``; the signature behind a tool call travels in
``extra_content.google.thought_signature``, as Google's own OpenAI-compatible endpoint writes it.

Source: Gemini API reference, ``GenerateContentResponse``.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from mppnode.kernel.clock import Clock
from mppnode.kernel.usage import Usage
from mppnode.providers.answers import Head, called, piece, text_of
from mppnode.providers.base import Chunk, Completion, UpstreamFault
from mppnode.providers.events import CHOICES_MAX, EventDecoder
from mppnode.providers.usage import parse_gemini_usage

_FINISH: Final = {
    "MAX_TOKENS": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "LANGUAGE": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "IMAGE_SAFETY": "content_filter",
}
"""Their reasons to stop, where ours is not plain ``stop``."""
_FAILED: Final = frozenset({"MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL"})
"""Reasons that mean there is no answer: the model wrote a call that cannot be read."""
_CALLS_MAX: Final = 1024
"""Calls in one candidate: far above any answer, and it bounds what one stream counts."""


class GeminiDecoder(EventDecoder):
    """Turns a stream of responses into OpenAI chunks; the report to the caller comes once, at the end."""

    __slots__ = ("_calls", "_clock", "_finished", "_head", "_prefix", "_seen", "_usage")

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self._clock = clock
        self._head: Head | None = None
        self._prefix = ""
        self._usage: Usage | None = None
        self._calls: dict[int, int] = {}
        """Tool calls so far, by candidate."""
        self._seen: set[int] = set()
        self._finished: set[int] = set()

    def end(self) -> list[Chunk]:
        """What is left, then the report and the end marker if every candidate has finished."""
        chunks = super().end()
        if not self._over and self._seen and self._finished == self._seen:
            self._finish(chunks)
        return chunks

    def _finish(self, chunks: list[Chunk]) -> None:
        if self._usage is not None and self._head is not None:
            chunks.append(Chunk(self._head.frame([], self._usage), usage=self._usage, reported=True))
        super()._finish(chunks)

    def _read(self, event: dict[str, Any], payload: bytes, block: bytes | None, chunks: list[Chunk]) -> None:
        del payload, block
        candidates = event.get("candidates") or []
        if _blocked(event):
            chunks.append(self._broken("prompt_blocked"))
            return
        if type(candidates) is not list or len(candidates) > CHOICES_MAX:
            chunks.append(self._broken("invalid_frame"))
            return
        if self._head is None:
            name = event.get("responseId")
            self._prefix = text_of(name)
            model = event.get("modelVersion")
            self._head = Head("chat.completion.chunk", name=name, model=model, clock=self._clock)
        pieces: list[dict[str, Any]] = []
        texts: list[str] = []
        tokens = 0
        finished = False
        for candidate in candidates:
            if type(candidate) is not dict:
                chunks.append(self._broken("invalid_frame"))
                return
            if text_of(candidate.get("finishReason")) in _FAILED:
                chunks.append(self._broken("upstream_error"))
                return
            said, ends = self._candidate(candidate, pieces)
            texts.append(said)
            tokens += bool(said)
            finished = finished or ends
        usage = self._report(event.get("usageMetadata"))
        if not pieces:
            return  # a response with a report alone: it is kept for the end
        frame = self._head.frame(pieces)
        chunks.append(Chunk(frame, tokens, usage if tokens or finished else None, finished, text="".join(texts)))

    def _report(self, given: Any) -> Usage | None:
        """Keep the latest believable report: every one is cumulative."""
        if given is None:
            return None
        usage = parse_gemini_usage(given)
        if usage is None:
            self.implausible_reports += 1
        else:
            self._usage = usage
        return usage

    def _candidate(self, candidate: dict[str, Any], pieces: list[dict[str, Any]]) -> tuple[str, bool]:
        """Append the candidate's share; what it said in it, and whether it has ended."""
        index = candidate.get("index", 0)
        if type(index) is not int or not 0 <= index < CHOICES_MAX:
            index = 0
        before = self._calls.get(index, 0)
        message, text = _message(candidate, f"call_{self._prefix}_{index}", before, streamed=True)
        self._calls[index] = min(before + len(message.get("tool_calls", ())), _CALLS_MAX)
        reason = candidate.get("finishReason")
        finish = None if reason is None else _finish_of(reason, calls=self._calls[index] > 0)
        if index not in self._seen:
            self._seen.add(index)
            message = {"role": "assistant", "content": "", **message}
        if message or finish:
            pieces.append(piece(index, message, finish))
        if finish:
            self._finished.add(index)
        return text, finish is not None


def _blocked(answer: dict[str, Any]) -> bool:
    feedback = answer.get("promptFeedback")
    return type(feedback) is dict and bool(feedback.get("blockReason"))


def _finish_of(reason: Any, *, calls: bool) -> str:
    mapped = _FINISH.get(reason, "stop") if type(reason) is str else "stop"
    return "tool_calls" if calls and mapped == "stop" else mapped


def _message(candidate: dict[str, Any], prefix: str, before: int, *, streamed: bool) -> tuple[dict[str, Any], str]:
    """A candidate's parts as members of a delta or a message, and everything generated, joined."""
    content = candidate.get("content")
    parts = content.get("parts") if type(content) is dict else None
    said: list[str] = []
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in parts if type(parts) is list else ():
        if type(part) is not dict:
            continue
        text = text_of(part.get("text"))
        (thought if part.get("thought") else said).append(text)
        function = part.get("functionCall")
        if type(function) is dict and before + len(calls) < _CALLS_MAX:
            place = before + len(calls)
            # Older models leave the id out, and callers need one to answer; ours is the same on every reading.
            own = text_of(function.get("id")) or f"{prefix}_{place}"
            arguments = orjson.dumps(function.get("args") or {}).decode()
            call = called(place if streamed else None, own, text_of(function.get("name")), arguments)
            signature = text_of(part.get("thoughtSignature"))
            calls.append(call | {"extra_content": {"google": {"thought_signature": signature}}} if signature else call)
    message: dict[str, Any] = {}
    if any(said):
        message["content"] = "".join(said)
    if any(thought):
        message["reasoning_content"] = "".join(thought)
    if calls:
        message["tool_calls"] = calls
    spoken = [call["function"]["name"] + call["function"]["arguments"] for call in calls]
    return message, "".join(thought + said + spoken)


def decode_generated(body: bytes, clock: Clock | None = None) -> Completion:
    """A whole response as a completion.

    Raises:
        UpstreamFault: ``protocol`` when it is not one, ``error`` when it reports a failure or the prompt was blocked.

    Source: Gemini API, ``GenerateContentResponse``.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UpstreamFault("protocol", detail="the provider's answer is not JSON") from None
    if type(answer) is not dict:
        raise UpstreamFault("protocol", detail="the provider's answer is not a JSON object")
    if answer.get("error"):
        raise UpstreamFault("error", detail="the provider reported an error in its answer")
    if _blocked(answer):
        raise UpstreamFault("error", detail="the provider blocked the prompt")
    candidates = answer.get("candidates")
    if type(candidates) is not list or not candidates or not all(type(one) is dict for one in candidates):
        raise UpstreamFault("protocol", detail="the provider's answer has no candidates")
    choices: list[dict[str, Any]] = []
    texts: list[str] = []
    for place, candidate in enumerate(candidates):
        if text_of(candidate.get("finishReason")) in _FAILED:
            raise UpstreamFault("error", detail="the provider's model wrote a call that cannot be read")
        index = place if candidate.get("index") is None else candidate["index"]
        prefix = f"call_{text_of(answer.get('responseId'))}_{place}"
        members, text = _message(candidate, prefix, 0, streamed=False)
        content = None if "tool_calls" in members else ""
        finish = _finish_of(candidate.get("finishReason"), calls="tool_calls" in members)
        message = {"role": "assistant", "content": content, **members}
        choices.append({"index": index, "message": message, "finish_reason": finish})
        texts.append(text)
    usage = parse_gemini_usage(answer.get("usageMetadata"))
    head = Head("chat.completion", name=answer.get("responseId"), model=answer.get("modelVersion"), clock=clock)
    return Completion(head.completion(choices, usage), usage, "".join(texts))
