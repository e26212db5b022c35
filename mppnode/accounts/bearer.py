"""JWT bearers: verified against keys that are passed in, by a clock that is passed in.

PyJWT checks signatures and nothing else here. Its claim checks read the machine's clock, and its JSON takes the last of
two equal keys, so that two readers of one token could see two subjects.

Source: RFC 7515 (JWS), RFC 7517 (JWK), RFC 7519 (JWT), RFC 8725 (best current practices).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

import jwt
from jwt.api_jws import PyJWS

from channels.instants import UnixSeconds
from mppnode.accounts.model import TRUST_NAME, Identity
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.strict_input import parse_object

TOKEN_CHARS_MAX: Final = 8192  # what common servers take as one header line
SECRET_BYTES_MIN: Final = 32  # RFC 7518, section 3.2: a key as long as the hash
LEEWAY_S_MAX: Final = 300  # clocks that differ more are broken, and it also prolongs every stolen token
KEYS_MAX: Final = 64  # issuers publish two to ten
TRUSTS_MAX: Final = 64  # accounts of one bearer; looked through on every request
_KEY_ID_MAX: Final = 256
_RSA_BITS_MIN: Final = 2048  # RFC 7518, section 3.3
_RSA_BITS_MAX: Final = 4096  # verifying costs with the square of it
_INSTANT_MAX: Final = 2**53  # what a JSON number holds exactly; far beyond any calendar
_SEGMENTS: Final = re.compile(r"([A-Za-z0-9_-]{2,})\.([A-Za-z0-9_-]{2,})\.[A-Za-z0-9_-]{2,}", re.ASCII)
_NUMBER: Final = re.compile(r"[A-Za-z0-9_-]{1,1024}", re.ASCII)  # longer than the longest modulus taken


class Algorithm(StrEnum):
    """The signatures taken. ``none`` and everything else is refused by not being here."""

    HS256 = "HS256"
    RS256 = "RS256"
    ES256 = "ES256"
    EDDSA = "EdDSA"


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """Bounds of one JSON part of a token or of a key set; ``mppnode.kernel.strict_input.JsonLimits`` in shape."""

    body_bytes: int
    depth: int = 4
    keys: int = 128


_TOKEN_LIMITS: Final = TokenLimits(body_bytes=TOKEN_CHARS_MAX)
_JWKS_LIMITS: Final = TokenLimits(body_bytes=256 * 1024, depth=6, keys=2048)  # certificate chains are long


@dataclass(frozen=True, slots=True)
class PinnedKey:
    """A key and the one algorithm it may be used with: a token's own ``alg`` never chooses (RFC 8725, section 3.1)."""

    algorithm: Algorithm
    key: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class TokenPolicy:
    """What a token must say to be for us. ``leeway_s`` is seconds."""

    issuer: str
    audience: str
    leeway_s: int = 30
    subject_claim: str = "sub"
    trusts_claim: str = "trusts"
    """A list of account names; without it the subject is the name of the one account."""

    def __post_init__(self) -> None:
        if not self.issuer or not self.audience:
            raise ValueError("issuer and audience must not be empty")
        if not 0 <= self.leeway_s <= LEEWAY_S_MAX:
            raise ValueError(f"leeway_s must be from 0 to {LEEWAY_S_MAX}")


def shared_secret(secret: bytes) -> PinnedKey:
    """The HS256 key that this node and the issuer share.

    Raises:
        ValueError: when it has fewer than 32 bytes; whoever has one token could search for it.
    """
    if len(secret) < SECRET_BYTES_MIN:
        raise ValueError(f"a shared secret has at least {SECRET_BYTES_MIN} bytes")
    return PinnedKey(Algorithm.HS256, secret)


def parse_jwks(body: bytes) -> Mapping[str, PinnedKey]:
    """The usable keys of a key set, by ``kid``.

    A key that is not for us (another type, algorithm or use, or without ``kid``) is passed over, as RFC 7517, section
    5 has it; symmetric keys always are, because what an issuer publishes is no secret. A key that claims to be for us
    and is not sound makes the whole set suspect.

    Raises:
        ValueError: for anything that is not such a set, or one with a ``kid`` twice; it repeats nothing of it.
    """
    try:
        listed = parse_object(body, limits=_JWKS_LIMITS).get("keys")
    except NodeFault:
        raise ValueError("a key set must be one JSON object within limits") from None
    if not isinstance(listed, list) or len(listed) > KEYS_MAX:
        raise ValueError(f"a key set must have an array of at most {KEYS_MAX} keys")
    found: dict[str, PinnedKey] = {}
    for index, entry in enumerate(listed):
        if not isinstance(entry, dict):
            raise ValueError(f"keys[{index}] must be an object")  # noqa: TRY004 - one kind of error for one bad document
        kid, algorithm = entry.get("kid"), _algorithm(entry)
        if algorithm is None or kid is None:
            continue
        if not isinstance(kid, str) or not 1 <= len(kid) <= _KEY_ID_MAX:
            raise ValueError(f"keys[{index}].kid must be a string of 1 to {_KEY_ID_MAX} characters")
        if kid in found:
            raise ValueError(f"keys[{index}].kid must not be used twice")
        found[kid] = PinnedKey(algorithm, _public_key(entry, algorithm, index))
    return MappingProxyType(found)


def key_id(token: str) -> str | None:
    """The ``kid`` a token asks to be verified with, or None. Unverified: good for finding a key and nothing else.

    Raises:
        NodeFault: ``INVALID_TOKEN``.
    """
    kid = _header(token).get("kid")
    if kid is not None and (not isinstance(kid, str) or not 1 <= len(kid) <= _KEY_ID_MAX):
        raise _invalid("has a malformed kid")
    return kid


def verify(token: str, key: PinnedKey | None, policy: TokenPolicy, now: UnixSeconds) -> Identity:
    """Verify a token with the key found by its ``kid``; None is what no key was found for.

    Raises:
        NodeFault: ``INVALID_TOKEN`` or, for a token that once was good, ``TOKEN_EXPIRED``.

    Source: RFC 7519, sections 4.1 and 7.2.
    """
    header = _header(token)
    if key is None or header.get("alg") != key.algorithm.value:
        raise _invalid("is not signed by a key of its issuer")
    if "crit" in header or "b64" in header:
        raise _invalid("asks for an extension that is not supported")
    try:
        signed = PyJWS(algorithms=[key.algorithm.value]).decode(token, key.key, algorithms=[key.algorithm.value])
    except (jwt.PyJWTError, ValueError, TypeError):
        raise _invalid("is not signed by a key of its issuer") from None
    claims = _json(signed, "claims")
    if claims.get("iss") != policy.issuer:
        raise _invalid("is of another issuer")
    audience = claims.get("aud")
    if policy.audience not in (audience if isinstance(audience, list) else [audience]):
        raise _invalid("is for another audience")
    expires, begins, issued = (_instant(claims, name) for name in ("exp", "nbf", "iat"))
    if expires is None:
        raise _invalid("has no exp")
    if any(at is not None and at > now + policy.leeway_s for at in (begins, issued)):
        raise _invalid("is not valid yet")
    until = UnixSeconds(expires + policy.leeway_s)
    if now >= until:
        raise NodeFault(NodeReason.TOKEN_EXPIRED, detail="the token has expired")
    return Identity(*_names(claims, policy), until)


def _names(claims: Mapping[str, Any], policy: TokenPolicy) -> tuple[str, tuple[str, ...]]:
    """The subject, and the accounts it may act for."""
    subject, trusts = claims.get(policy.subject_claim), claims.get(policy.trusts_claim)
    if not isinstance(subject, str) or TRUST_NAME.fullmatch(subject) is None:
        raise _invalid("has no usable subject")
    if policy.trusts_claim not in claims:
        return subject, (subject,)
    # An empty list is somebody who may act for nobody, not somebody of whom nothing was said.
    if not isinstance(trusts, list) or len(trusts) > TRUSTS_MAX:
        raise _invalid("has a malformed list of accounts")
    if not all(isinstance(name, str) and TRUST_NAME.fullmatch(name) for name in trusts):
        raise _invalid("has a malformed list of accounts")
    return subject, tuple(dict.fromkeys(trusts))


def _instant(claims: Mapping[str, Any], name: str) -> int | None:
    """A NumericDate in whole seconds. A fraction ends a token early and starts it late, never the other way."""
    if name not in claims:
        return None
    value = claims[name]
    if type(value) not in {int, float} or not 0 <= value <= _INSTANT_MAX:  # type(): True is an int
        raise _invalid(f"has a malformed {name}")
    whole = int(value)
    return whole if name == "exp" or whole == value else whole + 1


def _header(token: str) -> dict[str, Any]:
    match = _SEGMENTS.fullmatch(token) if len(token) <= TOKEN_CHARS_MAX else None
    if match is None:
        raise _invalid("is not a JWT")
    text = match.group(1)
    try:
        decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise _invalid("is not a JWT") from None
    return _json(decoded, "header")


def _json(part: bytes, name: str) -> dict[str, Any]:
    try:
        return parse_object(part, limits=_TOKEN_LIMITS)
    except NodeFault:
        raise _invalid(f"has malformed {name}") from None


def _algorithm(entry: Mapping[str, Any]) -> Algorithm | None:
    """The one algorithm a published key is pinned to by its type; None when it is not for us."""
    match entry.get("kty"), entry.get("crv"):
        case "RSA", None:
            pinned = Algorithm.RS256
        case "EC", "P-256":
            pinned = Algorithm.ES256
        case "OKP", "Ed25519":
            pinned = Algorithm.EDDSA
        case _:
            return None
    uses = entry.get("key_ops", ["verify"])
    verifies = entry.get("use", "sig") == "sig" and isinstance(uses, list) and "verify" in uses
    return pinned if verifies and entry.get("alg", pinned.value) == pinned.value else None


def _public_key(entry: Mapping[str, Any], algorithm: Algorithm, index: int) -> Any:
    # The public members alone: an issuer that publishes a private key by mistake does not make us hold it.
    names = ("kty", "n", "e") if algorithm is Algorithm.RS256 else ("kty", "crv", "x", "y")
    public = {name: entry[name] for name in names if name in entry}
    if not all(isinstance(value, str) and _NUMBER.fullmatch(value) for value in public.values()):
        raise ValueError(f"keys[{index}] must be a sound key")
    try:
        made = PyJWS().get_algorithm_by_name(algorithm.value).from_jwk(json.dumps(public))
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        raise ValueError(f"keys[{index}] must be a sound key") from None
    bits = getattr(made, "key_size", _RSA_BITS_MIN)
    if algorithm is Algorithm.RS256 and not _RSA_BITS_MIN <= bits <= _RSA_BITS_MAX:
        raise ValueError(f"keys[{index}] must have {_RSA_BITS_MIN} to {_RSA_BITS_MAX} bits")
    return made


def _invalid(detail: str) -> NodeFault:
    return NodeFault(NodeReason.INVALID_TOKEN, detail=f"the token {detail}")
