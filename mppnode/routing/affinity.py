"""Who served a conversation last: its prompt is in their cache, and a cached prompt is the cheapest prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

_CONVERSATIONS_MAX: Final = 10_000  # a few megabytes; a node serves fewer at a time
_IDLE_S: Final = 600.0  # about as long as providers keep a prompt
_OPENING_CHARS_MAX: Final = 4096  # of each message: what is hashed on every request stays small


def affinity_key(payer: bytes, *, cache_key: str | None, opening: Iterable[str]) -> bytes | None:
    """What names a conversation: the caller's ``prompt_cache_key``, else the beginning of its first messages.

    It holds within one payer, so that nobody's conversation is steered by a stranger who guesses its name. None
    without both payer and cache key: everybody who says "hello" would be one conversation.
    """
    if cache_key is None and not payer:
        return None
    digest = blake2b(digest_size=16, person=b"affinity")
    parts = [cache_key] if cache_key is not None else [text[:_OPENING_CHARS_MAX] for text in opening]
    digest.update(b"named" if cache_key is not None else b"begun")
    for part in (payer, *(text.encode("utf-8", "surrogatepass") for text in parts)):
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()


class Affinity:
    """Remembers providers by conversation and model, the most recent ones, until they have been idle for a while."""

    def __init__(self, *, conversations_max: int = _CONVERSATIONS_MAX, idle_s: float = _IDLE_S) -> None:
        self._max = conversations_max
        self._idle_s = idle_s
        self._known: OrderedDict[tuple[bytes, str], tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def provider(self, key: bytes, model: str, now: float) -> str | None:
        """Who served this conversation, if that was not too long ago. Asking does not keep it alive; serving does."""
        found = self._known.get((key, model))
        if found is None:
            return None
        provider, at = found
        if now - at > self._idle_s:
            del self._known[key, model]
            return None
        return provider

    def served(self, key: bytes, model: str, provider: str, now: float) -> None:
        """Remember who answered."""
        self._known[key, model] = (provider, now)
        self._known.move_to_end((key, model))
        if len(self._known) > self._max:
            self._known.popitem(last=False)
