"""Challenges: what a 402 asks for, and the MAC that lets a stateless server recognise its own.

The id is an HMAC over seven slots joined by "|" (eight when another credential header is advertised). Joining is safe
only while no slot can contain the separator, so that is checked on every way in and out.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from channels.faults import ChannelFault, Reason
from channels.instants import UnixMillis, parse_rfc3339, to_rfc3339
from channels.wire import base64url, jcs, strict_json

REQUEST_TEXT_MAX: Final = 16_384  # characters; the reference client refuses more
ID_TEXT_MAX: Final = 256
SECRET_BYTES_MIN: Final = 32
_ENTROPY: Final = 10**12  # values of the random digits in `expires`; fraction digits beyond nine still parse everywhere
_DEFAULT_HEADER: Final = "authorization"

# What a slot may hold: visible ASCII and space, no quote trouble, never the separator.
_SLOT = re.compile(r"[\x20-\x7b\x7d\x7e]*", re.ASCII)
_METHOD = re.compile(r"[a-z][a-z0-9:_-]{0,63}", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`~-]{1,128}", re.ASCII)
_B64URL = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_DIGEST = re.compile(r"sha-256=[A-Za-z0-9+/]{43}=", re.ASCII)
_PRINTABLE = re.compile(r"[\x20-\x7e]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One offer in a 402, as text: the strings are kept raw because the MAC covers exactly these characters.

    ``request`` and ``opaque`` are base64url of canonical JSON. ``description`` is for people; ``id`` does not bind it.
    """

    id: str
    realm: str
    method: str
    intent: str
    request: str
    expires: str | None = None
    digest: str | None = None
    opaque: str | None = None
    description: str | None = None
    header: str | None = None


class ChallengeMac:
    """Issues challenges and recognises them again; the first secret signs, all of them verify.

    Keep a replaced secret in the tuple for as long as the challenges it signed may still be presented.
    """

    def __init__(self, secrets: tuple[bytes, ...]) -> None:
        if not secrets or any(len(secret) < SECRET_BYTES_MIN for secret in secrets):
            raise ValueError("challenge secrets have at least 32 bytes, and there is at least one")
        self._secrets = secrets

    def __repr__(self) -> str:
        return f"ChallengeMac(<{len(self._secrets)} secrets>)"

    def issue(
        self,
        *,
        realm: str,
        method: str,
        intent: str,
        request: str,
        expires: str,
        digest: str | None = None,
        opaque: Mapping[str, str] | None = None,
        description: str | None = None,
        header: str | None = None,
    ) -> Challenge:
        """Make a challenge with its id; ``request`` comes from ``SessionRequest.encode`` or :func:`encode_object`.

        Raises:
            ChannelFault: ``INVALID_CHALLENGE`` naming a member that could not be written or bound safely.

        Source: draft-httpauth-payment, challenge binding.
        """
        challenge = Challenge(
            id="",
            realm=realm,
            method=method,
            intent=intent,
            request=request,
            expires=expires,
            digest=digest,
            opaque=encode_opaque(opaque) if opaque else None,
            description=description,
            # Naming the default header says nothing, and the reference client neither writes nor binds it.
            header=None if header is not None and header.lower() == _DEFAULT_HEADER else header,
        )
        check_printable(challenge)
        return replace(challenge, id=_identify(self._secrets[0], challenge))

    def verify(self, challenge: Challenge) -> bool:
        """Tell whether ``challenge`` is one we issued, unchanged; takes the same time wherever it differs."""
        if not _bindable(challenge):
            return False
        presented = challenge.id.encode("utf-8", "surrogatepass")
        known = False
        for secret in self._secrets:
            # No early exit: which secret matched is nobody's business. compare_digest wants bytes, since it raises on
            # text outside ASCII.
            known |= hmac.compare_digest(_identify(secret, challenge).encode(), presented)
        return known


def encode_object(value: Mapping[str, object]) -> str:
    """The text of a ``request`` member: base64url of the canonical JSON of ``value``."""
    return base64url.encode(jcs.canonicalize(value).encode())


def encode_opaque(value: Mapping[str, object]) -> str:
    """The text of an ``opaque`` member, a flat map from text to text.

    Raises:
        ChannelFault: ``INVALID_CHALLENGE`` when a name or value is not text.
    """
    if not all(isinstance(part, str) for item in value.items() for part in item):
        raise ChannelFault(Reason.INVALID_CHALLENGE, field="opaque", detail="is not a flat map of text")
    return encode_object(value)


def decode_opaque(text: str | None) -> dict[str, str]:
    """The flat map from text to text that :func:`encode_opaque` has written; empty for an absent member.

    Raises:
        ChannelFault: ``INVALID_CHALLENGE`` when it is something else.
    """
    if text is None:
        return {}
    raw = base64url.decode(text, field="opaque", length_max=REQUEST_TEXT_MAX, reason=Reason.INVALID_CHALLENGE)
    value = strict_json.loads(raw.decode("utf-8", "replace"), field="opaque", reason=Reason.INVALID_CHALLENGE)
    if not isinstance(value, dict) or not all(isinstance(part, str) for item in value.items() for part in item):
        raise ChannelFault(Reason.INVALID_CHALLENGE, field="opaque", detail="is not a flat map of text")
    return value


def expires_text(at: UnixMillis, entropy: int) -> str:
    """Write ``expires`` for ``at``, with twelve random digits below the millisecond taken from ``entropy``.

    They make ids unique when two challenges are issued in one millisecond. A random ``opaque`` would do the same, but
    the reference CLI treats it as a changed offer and refuses to pay.
    """
    return f"{to_rfc3339(at)[:-1]}{entropy % _ENTROPY:012d}Z"


def require_fresh(challenge: Challenge, *, now: UnixMillis) -> None:
    """Pass a challenge that names a future expiry and refuse every other one.

    Raises:
        ChannelFault: ``INVALID_CHALLENGE`` when ``expires`` is missing or not a time, ``PAYMENT_EXPIRED`` when past.
    """
    if parse_rfc3339(challenge.expires) <= now:
        raise ChannelFault(Reason.PAYMENT_EXPIRED, field="expires", detail="is past")


def check_printable(challenge: Challenge) -> None:
    """Refuse a challenge that has no single unambiguous header form or MAC input.

    Raises:
        ChannelFault: ``INVALID_CHALLENGE`` naming the member.
    """
    rules: tuple[tuple[str, str | None, re.Pattern[str]], ...] = (
        ("method", challenge.method, _METHOD),
        ("intent", challenge.intent, _METHOD),
        ("request", challenge.request, _B64URL),
        ("digest", challenge.digest, _DIGEST),
        ("opaque", challenge.opaque, _B64URL),
        ("header", challenge.header, _TOKEN),
        ("description", challenge.description, _PRINTABLE),
        ("id", challenge.id, _PRINTABLE),
    )
    for field, value, pattern in rules:
        if value is not None and pattern.fullmatch(value) is None:
            raise ChannelFault(Reason.INVALID_CHALLENGE, field=field, detail="has a character or form it may not have")
    if not challenge.realm or len(challenge.request) > REQUEST_TEXT_MAX or not _bindable(challenge):
        raise ChannelFault(Reason.INVALID_CHALLENGE, detail="a member is empty, too long or holds the slot separator")
    if challenge.expires is not None:
        parse_rfc3339(challenge.expires)


def _bindable(challenge: Challenge) -> bool:
    optional = (challenge.expires, challenge.digest, challenge.opaque, challenge.header)
    # An optional member that is present but empty would share its id with a challenge that lacks it.
    return "" not in optional and all(_SLOT.fullmatch(slot) for slot in _slots(challenge))


def _slots(challenge: Challenge) -> list[str]:
    slots = [
        challenge.realm,
        challenge.method,
        challenge.intent,
        challenge.request,
        challenge.expires or "",
        challenge.digest or "",
    ]
    if challenge.header is not None:
        slots.append(challenge.header)
    return [*slots, challenge.opaque or ""]


def _identify(secret: bytes, challenge: Challenge) -> str:
    return base64url.encode(hmac.digest(secret, "|".join(_slots(challenge)).encode(), "sha256"))
