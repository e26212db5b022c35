"""How fast a key may go: requests and tokens per minute, as values in and values out.

A limit is a bucket that leaks, the continuous form of GCRA: what is taken raises its level, time lowers it, and what
would raise it above the limit waits. The level is counted in millionths of (one per minute), so that an elapsed
microsecond lowers it by exactly the limit per minute: nothing is ever divided on the way in, and no rounding adds up.

Source: ITU-T I.371, annex A (GCRA); OpenAI API reference, rate limit headers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NewType

from mppnode.accounts.model import RateLimits
from mppnode.kernel.faults import NodeFault, NodeReason

UnixMicros = NewType("UnixMicros", int)

MINUTE_US: Final = 60_000_000
_SECOND_US: Final = 1_000_000
_MILLI_US: Final = 1_000


class Bound(StrEnum):
    """What ran out."""

    REQUESTS = "requests per minute"
    TOKENS = "tokens per minute"
    CONCURRENCY = "requests at once"


@dataclass(frozen=True, slots=True)
class Bucket:
    """How full a limit was at an instant. A new one is empty, so a customer's first minute starts with all of it."""

    level: int = 0
    """In 1/60,000,000 of what is limited; see the module."""
    at: UnixMicros = UnixMicros(0)
    returned: int = 0
    """All that was ever given back, in the same measure: it tells a hold how far it has moved up since."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken, and where in the bucket it stands; kept until the request has ended."""

    amount: int
    level: int
    at: UnixMicros
    returned: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now: in ``for_us`` it fits if nobody else comes. None is never, because it is more than the limit."""

    bound: Bound
    for_us: int | None


def leaked(bucket: Bucket, limit: int, now: UnixMicros) -> Bucket:
    """The bucket as it is at ``now``. A clock that steps back stands still here: nobody gains what has not passed."""
    at = max(bucket.at, now)
    return Bucket(max(bucket.level - limit * (at - bucket.at), 0), at, bucket.returned)


def take(bucket: Bucket, amount: int, limit: int, now: UnixMicros, bound: Bound) -> tuple[Bucket, Taken | Wait]:
    """Take ``amount`` of a limit per minute, or say how long to wait; a refusal takes nothing."""
    assert amount >= 0
    current = leaked(bucket, limit, now)
    level, full = current.level + amount * MINUTE_US, limit * MINUTE_US
    if level > full:
        too_much = amount > limit
        return current, Wait(bound, None if too_much else -(-(level - full) // limit))
    return Bucket(level, current.at, current.returned), Taken(amount, level, current.at, current.returned)


def correct(bucket: Bucket, taken: Taken, actual: int, limit: int, now: UnixMicros) -> Bucket:
    """Put what was used in the place of what was taken for it, once, after the request has ended.

    More than was taken is added, even above the limit: it happened, and the next request waits for it. Less is given
    back only as far as it is still in the bucket. What has leaked out since was made good by time already, and giving
    it back as well would let through that many tokens of others beyond the limit.
    """
    assert actual >= 0
    current = leaked(bucket, limit, now)
    more = (actual - taken.amount) * MINUTE_US
    if more >= 0:
        return Bucket(current.level + more, current.at, current.returned)
    # Where the top of this hold is now: it sinks by what has leaked, and by whatever others have got back below it.
    # Their part above it is subtracted as well: not knowing which it was, the bucket keeps the more.
    top = taken.level - limit * (current.at - taken.at) - (current.returned - taken.returned)
    back = max(min(-more, top, current.level), 0)
    return Bucket(current.level - back, current.at, current.returned + back)


@dataclass(frozen=True, slots=True)
class Pace:
    """Both buckets of a key."""

    requests: Bucket = Bucket()
    tokens: Bucket = Bucket()


def admit(pace: Pace, limits: RateLimits, tokens: int, now: UnixMicros) -> tuple[Pace, Taken | Wait]:
    """Take one request and the tokens it may need; the verdict's ``Taken`` is of the tokens.

    All or nothing: a request that waits for tokens has not used up one of its requests as well.
    """
    requests, first = pace.requests, None
    if limits.rpm is not None:
        requests, verdict = take(pace.requests, 1, limits.rpm, now, Bound.REQUESTS)
        first = verdict if isinstance(verdict, Wait) else None
    if limits.tpm is None:
        held, second = pace.tokens, Taken(tokens, 0, now, 0)
    else:
        held, answer = take(pace.tokens, tokens, limits.tpm, now, Bound.TOKENS)
        if isinstance(answer, Wait):
            return pace, answer if first is None or _longer(answer, first) else first
        second = answer
    return (pace, first) if first is not None else (Pace(requests, held), second)


def settle(pace: Pace, limits: RateLimits, taken: Taken, actual: int, now: UnixMicros) -> Pace:
    """Put the tokens a request has used in the place of those it had taken."""
    if limits.tpm is None:
        return pace
    return Pace(pace.requests, correct(pace.tokens, taken, actual, limits.tpm, now))


def _longer(one: Wait, other: Wait) -> bool:
    return one.for_us is None or (other.for_us is not None and one.for_us > other.for_us)


def refusal(wait: Wait) -> NodeFault:
    """The refusal of a request that has to wait, with the time rounded up to whole seconds."""
    seconds = None if wait.for_us is None else max(-(-wait.for_us // _SECOND_US), 1)
    never = " asks for more than it ever allows" if wait.for_us is None else " is reached"
    return NodeFault(
        NodeReason.LIMIT_REACHED,
        detail=f"the key's limit of {wait.bound.value}{never}",
        retry_after_s=seconds,
        limit=wait.bound.name.lower(),
    )


def rate_headers(pace: Pace, limits: RateLimits, now: UnixMicros) -> dict[str, str]:
    """The ``x-ratelimit-*`` headers of an answer: limit, what is left, and when all of it is back.

    A limit that is not set has none of its three. Source: OpenAI API reference, rate limit headers.
    """
    headers: dict[str, str] = {}
    for name, limit, bucket in (
        ("requests", limits.rpm, pace.requests),
        ("tokens", limits.tpm, pace.tokens),
    ):
        if limit is not None:
            level = leaked(bucket, limit, now).level
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(limit * MINUTE_US - level, 0) // MINUTE_US)
            headers[f"x-ratelimit-reset-{name}"] = go_duration(-(-level // limit))
    return headers


def go_duration(micros: int) -> str:
    """A span of time as Go prints it, rounded up to milliseconds: ``0s``, ``17ms``, ``8.64s``, ``6m0s``, ``1h0m0s``.

    Source: Go, ``time.Duration.String``; these are the values OpenAI sends.
    """
    millis = -(-micros // _MILLI_US)
    if 0 < millis < 1000:  # noqa: PLR2004 - the last that is written in milliseconds
        return f"{millis}ms"
    seconds, rest = divmod(millis, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{rest:03d}".rstrip("0") if rest else ""
    text = f"{seconds}{fraction}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text
