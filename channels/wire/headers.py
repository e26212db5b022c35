"""The grammar of ``WWW-Authenticate`` and ``Authorization`` as far as the ``Payment`` scheme needs it (RFC 9110, 11.6).

Values are split at commas outside quoted strings, never searched: a quoted value may contain the word "Payment".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from channels.faults import ChannelFault, Reason
from channels.wire.challenge import ID_TEXT_MAX, REQUEST_TEXT_MAX, Challenge, check_printable

SCHEME: Final = "Payment"
_HEADER_TEXT_MAX: Final = 65_536  # several challenges share one field; a single one stays under 20 kB
_NAME = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
# Possessive quantifiers throughout: with plain ones an unterminated string is retried in exponentially many ways.
_QUOTED = r'"(?:[^"\\]++|\\.)*+'
# One list element: text up to a comma, quoted strings skipped whole, an unterminated one swallowing the rest.
_ELEMENT = re.compile(rf'(?:[^",]++|{_QUOTED}(?:"|\\?\Z))++', re.DOTALL)
_SCHEME = re.compile(rf"({_NAME})(?:[ \t]++(?!=)(.*))?", re.DOTALL)
_PARAMETER = re.compile(rf'({_NAME})[ \t]*=[ \t]*({_QUOTED}"|[!#-+\x2d-~]+)', re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_METHOD = re.compile(r"[a-z][a-z0-9:_-]*", re.ASCII)
_SPACE: Final = " \t"
# Servers read header bytes that are not UTF-8 as lone surrogates (PEP 383); in a description they were Latin-1.
_LATIN1 = {0xDC00 + byte: byte for byte in range(0x80, 0x100)}


@dataclass(frozen=True, slots=True)
class _Group:
    scheme: str
    elements: list[str]


def payment_credentials(values: Sequence[str]) -> list[str]:
    """The text after every ``Payment`` scheme in the given header values, in order; other schemes are skipped.

    The text is not judged here: an undecodable one must be reported as malformed, not as absent.
    """
    return [
        element
        for value in values
        for group in _groups(value)
        if group.scheme.lower() == SCHEME.lower()
        for element in group.elements[:1] or [""]
    ]


def authorization(token: str) -> str:
    """The header value that presents a credential token."""
    return f"{SCHEME} {token}"


def serialize_challenge(challenge: Challenge) -> str:
    """Write one challenge as a ``WWW-Authenticate`` value, parameters in the reference client's order.

    Raises:
        ChannelFault: ``INVALID_CHALLENGE`` naming a member with control characters or anything outside ASCII.

    Source: draft-httpauth-payment, challenge header.
    """
    # Refused, not escaped: a line break here would be somebody else's header, and all text but the payer's is our own.
    check_printable(challenge)
    parameters = (
        ("id", challenge.id),
        ("realm", challenge.realm),
        ("method", challenge.method),
        ("intent", challenge.intent),
        ("request", challenge.request),
        ("description", challenge.description),
        ("digest", challenge.digest),
        ("expires", challenge.expires),
        ("header", challenge.header),
        ("opaque", challenge.opaque),
    )
    return f"{SCHEME} " + ", ".join(f"{name}={_quote(value)}" for name, value in parameters if value is not None)


def parse_challenges(values: Sequence[str]) -> list[Challenge]:
    """Read every ``Payment`` challenge in the given header values; other schemes and unknown parameters are ignored.

    Raises:
        ChannelFault: ``INVALID_CHALLENGE`` when any of them is malformed, repeats a parameter or lacks a required one.
    """
    challenges: list[Challenge] = []
    for value in values:
        if len(value) > _HEADER_TEXT_MAX:
            raise ChannelFault(Reason.INVALID_CHALLENGE, field="WWW-Authenticate", detail="is larger than its limit")
        for group in _groups(value):
            if group.scheme.lower() == SCHEME.lower():
                if _CONTROL.search(value):
                    raise ChannelFault(
                        Reason.INVALID_CHALLENGE, field="WWW-Authenticate", detail="has a control character"
                    )
                challenges.append(_challenge(group))
    return challenges


def _groups(value: str) -> Iterator[_Group]:
    """Gather list elements under the scheme that precedes them."""
    current: _Group | None = None
    for element in _ELEMENT.findall(value):
        stripped = element.strip(_SPACE)
        if not stripped:
            continue
        match = _SCHEME.fullmatch(stripped)
        if match is not None:
            if current is not None:
                yield current
            rest = (match.group(2) or "").strip(_SPACE)
            current = _Group(match.group(1), [rest] if rest else [])
        elif current is not None:
            current.elements.append(stripped)
    if current is not None:
        yield current


def _challenge(group: _Group) -> Challenge:
    found: dict[str, str] = {}
    for element in group.elements:
        match = _PARAMETER.fullmatch(element)
        if match is None:
            raise ChannelFault(Reason.INVALID_CHALLENGE, field="WWW-Authenticate", detail="has a malformed parameter")
        name, raw = match.group(1).lower(), match.group(2)
        if name in found:
            raise ChannelFault(Reason.INVALID_CHALLENGE, field="WWW-Authenticate", detail="repeats a parameter")
        found[name] = _unquote(raw) if raw.startswith('"') else raw
    for name in ("id", "realm", "method", "intent", "request"):
        if not found.get(name):
            raise ChannelFault(Reason.INVALID_CHALLENGE, field=name, detail="is missing or empty")
    if len(found["request"]) > REQUEST_TEXT_MAX or len(found["id"]) > ID_TEXT_MAX:
        raise ChannelFault(Reason.INVALID_CHALLENGE, field="request", detail="is larger than its limit")
    if _METHOD.fullmatch(found["method"]) is None:
        raise ChannelFault(Reason.INVALID_CHALLENGE, field="method", detail="is not a lower-case method name")
    return Challenge(
        id=found["id"],
        realm=found["realm"],
        method=found["method"],
        intent=found["intent"],
        request=found["request"],
        expires=found.get("expires"),
        digest=found.get("digest"),
        opaque=found.get("opaque"),
        description=found.get("description"),
        header=found.get("header"),
    )


def _quote(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _unquote(raw: str) -> str:
    text = _ESCAPE.sub(_unescape, raw[1:-1].translate(_LATIN1))
    try:
        # The escapes are UTF-16 code units; a pair of them is one character.
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeError:
        raise ChannelFault(
            Reason.INVALID_CHALLENGE, field="WWW-Authenticate", detail="has half a surrogate pair"
        ) from None


def _unescape(match: re.Match[str]) -> str:
    # The reference client writes characters beyond Latin-1 as \uXXXX inside quoted strings. A literal backslash is
    # doubled by every writer, so a single one before "u" can only be that.
    return chr(int(match.group(1), 16)) if match.group(1) else match.group(2)
