"""Points in time as integers, and their RFC 3339 text. There is no "now" in this package: callers pass it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Final, NewType

from channels.faults import ChannelFault, Reason

UnixSeconds = NewType("UnixSeconds", int)
UnixMillis = NewType("UnixMillis", int)

_RFC3339 = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[T]([0-9]{2}):([0-9]{2}):([0-9]{2})(\.[0-9]{1,18})?(Z|[+-][0-9]{2}:[0-9]{2})",
    re.ASCII,
)
_TEXT_MAX: Final = 64
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def to_rfc3339(at: UnixMillis) -> str:
    """``2030-01-01T00:00:00.123Z``: the millisecond form the reference client writes and parses."""
    whole = datetime.fromtimestamp(at // 1000, tz=UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{at % 1000:03d}Z"


def parse_rfc3339(text: object, *, field: str = "expires") -> UnixMillis:
    """Read an RFC 3339 instant, rounding any sub-millisecond digits down.

    Extra fraction digits are legal and ignored: challenges carry random ones to make their ids unique.
    A leap second, a year below 1970 and a lower-case ``z`` are refused rather than guessed at.

    Raises:
        ChannelFault: ``INVALID_CHALLENGE`` naming ``field``.
    """
    match = _RFC3339.fullmatch(text) if isinstance(text, str) and len(text) <= _TEXT_MAX else None
    if match is None:
        raise ChannelFault(Reason.INVALID_CHALLENGE, field=field, detail="is not an RFC 3339 time")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    try:
        at = datetime(year, month, day, hour, minute, second, tzinfo=_zone(match.group(8)))
    except ValueError:
        raise ChannelFault(Reason.INVALID_CHALLENGE, field=field, detail="is not a real time") from None
    millis = int(((match.group(7) or ".0")[1:] + "000")[:3])
    since = at - _EPOCH
    total = (since.days * 86_400 + since.seconds) * 1000 + millis
    if total < 0:
        raise ChannelFault(Reason.INVALID_CHALLENGE, field=field, detail="is before 1970")
    return UnixMillis(total)


def _zone(text: str) -> timezone:
    if text == "Z":
        return UTC
    sign = -1 if text[0] == "-" else 1
    return timezone(sign * timedelta(hours=int(text[1:3]), minutes=int(text[4:6])))
