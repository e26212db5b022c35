"""JWT bearers: what is taken, and everything that only looks like it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from mppnode.accounts.bearer import PinnedKey, TokenPolicy, key_id, parse_jwks, shared_secret
from mppnode.accounts.model import Identity
from mppnode.kernel.faults import NodeFault, NodeReason
from tests.unit.accounts.kit import (
    CLAIMS,
    NOW,
    POLICY,
    PRIVATE,
    RSA,
    SECRET,
    jwk,
    jwks,
    refused,
    segment,
    token,
    verified,
)

SHARED = shared_secret(SECRET)
SMALL = rsa.generate_private_key(65537, 1024)


def signed(header: Any, claims: Any, secret: bytes = SECRET) -> str:
    """A token as an attacker would write it, with any bytes for its parts."""
    text = f"{segment(header)}.{segment(claims)}"
    mac = hmac.digest(secret, text.encode(), "sha256")
    return f"{text}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


def test_a_shared_secret_verifies() -> None:
    """HS256: subject, accounts and the end of validity, leeway included."""
    assert verified(token(CLAIMS), SHARED) == Identity("ann", ("ann",), NOW + 630)
    several = {**CLAIMS, "aud": ["other", "mppnode"], "trusts": ["firm", "ann", "firm"]}
    assert verified(token(several), SHARED).trusts == ("firm", "ann")
    assert verified(token({**CLAIMS, "trusts": []}), SHARED).trusts == ()


@pytest.mark.parametrize("algorithm", sorted(PRIVATE))
def test_published_keys_verify_by_their_kid(algorithm: str) -> None:
    """RS256, ES256 and EdDSA keys of one set each verify their own tokens and nobody else's."""
    keys = parse_jwks(jwks(*map(jwk, PRIVATE)))
    text = token(CLAIMS, PRIVATE[algorithm], algorithm, kid=algorithm)
    kid = key_id(text)
    assert kid == algorithm
    assert verified(text, keys[kid]).subject == "ann"
    for other in set(PRIVATE) - {algorithm}:
        refused(NodeReason.INVALID_TOKEN, verified, text, keys[other])
    refused(NodeReason.INVALID_TOKEN, verified, text, SHARED)
    refused(NodeReason.INVALID_TOKEN, verified, text, None)


def test_the_token_does_not_choose_its_algorithm() -> None:
    """A public key is no HMAC secret, `none` is no signature, and nothing but the key's own algorithm is tried."""
    public = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    pinned = parse_jwks(jwks(jwk("RS256")))["RS256"]
    for header in ({"alg": "HS256"}, {"alg": "RS256"}, {"alg": "none"}, {"alg": "None"}, {"alg": None}, {}):
        refused(NodeReason.INVALID_TOKEN, verified, signed(header, CLAIMS, public), pinned)
    for header in ({"alg": "none"}, {"alg": "hs256"}, {"alg": "HS384"}, {"alg": ["HS256"]}, {}):
        refused(NodeReason.INVALID_TOKEN, verified, signed(header, CLAIMS), SHARED)
    refused(NodeReason.INVALID_TOKEN, verified, f"{segment({'alg': 'none'})}.{segment(CLAIMS)}.", SHARED)


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"iss": "https://id.example/"}, NodeReason.INVALID_TOKEN),
        ({"iss": ["https://id.example"]}, NodeReason.INVALID_TOKEN),
        ({"iss": None}, NodeReason.INVALID_TOKEN),
        ({"aud": "mppnode2"}, NodeReason.INVALID_TOKEN),
        ({"aud": []}, NodeReason.INVALID_TOKEN),
        ({"aud": None}, NodeReason.INVALID_TOKEN),
        ({"aud": {"mppnode": 1}}, NodeReason.INVALID_TOKEN),
        ({"exp": None}, NodeReason.INVALID_TOKEN),
        ({"exp": str(NOW + 600)}, NodeReason.INVALID_TOKEN),
        ({"exp": True}, NodeReason.INVALID_TOKEN),
        ({"exp": -1}, NodeReason.INVALID_TOKEN),
        ({"exp": 2**60}, NodeReason.INVALID_TOKEN),
        ({"exp": NOW - 30}, NodeReason.TOKEN_EXPIRED),
        ({"exp": NOW - 29}, None),
        ({"exp": NOW - 29.5}, NodeReason.TOKEN_EXPIRED),
        ({"nbf": NOW + 30}, None),
        ({"nbf": NOW + 30.5}, NodeReason.INVALID_TOKEN),
        ({"nbf": NOW + 31}, NodeReason.INVALID_TOKEN),
        ({"iat": NOW + 31}, NodeReason.INVALID_TOKEN),
        ({"iat": "yesterday"}, NodeReason.INVALID_TOKEN),
        ({"sub": None}, NodeReason.INVALID_TOKEN),
        ({"sub": 7}, NodeReason.INVALID_TOKEN),
        ({"sub": "ann\n"}, NodeReason.INVALID_TOKEN),
        ({"sub": "a" * 256}, NodeReason.INVALID_TOKEN),
        ({"trusts": "ann"}, NodeReason.INVALID_TOKEN),
        ({"trusts": None}, NodeReason.INVALID_TOKEN),
        ({"trusts": ["ann", 7]}, NodeReason.INVALID_TOKEN),
        ({"trusts": ["t"] * 65}, NodeReason.INVALID_TOKEN),
    ],
)
def test_claims_are_strict(claims: dict[str, Any], reason: NodeReason | None) -> None:
    """Each claim has its type, its bounds and its edge to the second."""
    text = signed({"alg": "HS256"}, {**CLAIMS, **claims})
    if reason is None:
        assert verified(text, SHARED).subject == "ann"
    else:
        refused(reason, verified, text, SHARED)


@pytest.mark.parametrize("name", ["exp", "iss", "aud", "sub"])
def test_what_is_required_is_required(name: str) -> None:
    """A token without one of the claims that bind it to us is no token."""
    claims = {key: value for key, value in CLAIMS.items() if key != name}
    refused(NodeReason.INVALID_TOKEN, verified, signed({"alg": "HS256"}, claims), SHARED)


@pytest.mark.parametrize(
    ("header", "claims"),
    [
        (b'{"alg":"HS256","alg":"HS256"}', CLAIMS),
        ({"alg": "HS256"}, json.dumps(CLAIMS)[:-1].encode() + b',"sub":"bob"}'),
        ({"alg": "HS256"}, b"[]"),
        ({"alg": "HS256"}, b"{}x"),
        ({"alg": "HS256"}, b'{"exp":NaN}'),
        ({"alg": "HS256"}, b"\xff\xfe"),
        ({"alg": "HS256", "crit": ["exp"]}, CLAIMS),
        ({"alg": "HS256", "b64": True}, CLAIMS),
        ({"alg": "HS256"}, {**CLAIMS, "x": [[[[[1]]]]]}),
        ({"alg": "HS256"}, {**CLAIMS, "x": "y" * 9000}),
    ],
)
def test_correctly_signed_nonsense_is_refused(header: Any, claims: Any) -> None:
    """What two readers could understand differently is not read at all, even from the issuer itself."""
    refused(NodeReason.INVALID_TOKEN, verified, signed(header, claims), SHARED)


def test_one_wrong_bit_anywhere_is_refused() -> None:
    """No byte of a token can be changed."""
    text = token(CLAIMS)
    for at, char in enumerate(text):
        bent = text[:at] + ("A" if char != "A" else "B") + text[at + 1 :]
        refused(NodeReason.INVALID_TOKEN, verified, bent, SHARED)


@given(text=st.text() | st.from_regex(r"[A-Za-z0-9_-]{0,40}(\.[A-Za-z0-9_-]{0,40}){2}", fullmatch=True))
def test_any_text_is_refused_and_never_a_bug(text: str) -> None:
    """Whatever is sent as a token raises the typed refusal, and its words hold nothing of it."""
    for call in (lambda: verified(text, SHARED), lambda: key_id(text)):
        with pytest.raises(NodeFault) as caught:
            call()
        assert caught.value.reason is NodeReason.INVALID_TOKEN


@pytest.mark.parametrize("kid", [7, "", "k" * 257, ["a"], {}])
def test_a_malformed_kid_is_refused(kid: Any) -> None:
    """An id no key can have asks no issuer for anything."""
    refused(NodeReason.INVALID_TOKEN, key_id, signed({"alg": "HS256", "kid": kid}, CLAIMS))


def test_keys_for_others_are_passed_over() -> None:
    """Symmetric keys, other curves, other uses and keys without kid are not for us; the rest of the set is."""
    secret = {"kty": "oct", "kid": "oct", "k": segment(b"s" * 32), "alg": "HS256"}
    nameless = {name: value for name, value in jwk("ES256").items() if name != "kid"}
    others = [
        secret,
        nameless,
        jwk("RS256", "enc", use="enc"),
        jwk("RS256", "pss", alg="PS256"),
        jwk("RS256", "ops", key_ops=["sign"]),
        jwk("RS256", "ops2", key_ops="verify"),
        {**jwk("ES256", "k1"), "crv": "secp256k1"},
        {"kty": "new", "kid": "new"},
        {"kty": {}, "kid": "odd"},
    ]
    assert set(parse_jwks(jwks(*others, jwk("EdDSA", use="sig", alg="EdDSA")))) == {"EdDSA"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"keys":{}}',
        b'{"keys":[1]}',
        b'{"keys":[],"keys":[]}',
        jwks(*[{"kty": "new"}] * 65),
        jwks(jwk("RS256", "a"), jwk("ES256", "a")),
        jwks({**jwk("RS256"), "kid": 7}),
        jwks({**jwk("RS256"), "n": "!"}),
        jwks({**jwk("RS256"), "n": 7}),
        jwks({"kty": "RSA", "kid": "a"}),
        jwks({**jwk("ES256"), "x": jwk("ES256")["y"]}),
        jwks({**jwk("EdDSA"), "x": "AAAA"}),
        b" " * (256 * 1024 + 1),
    ],
)
def test_an_unsound_set_is_refused_whole(body: bytes) -> None:
    """A set that is malformed, ambiguous or too large gives no key at all."""
    with pytest.raises(ValueError):
        parse_jwks(body)


def test_short_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """RSA below 2048 bits and shared secrets below 32 bytes cannot be configured or published."""
    monkeypatch.setitem(PRIVATE, "RS256", SMALL)
    with pytest.raises(ValueError, match="2048"):
        parse_jwks(jwks(jwk("RS256")))
    with pytest.raises(ValueError, match="32 bytes"):
        shared_secret(b"s" * 31)


def test_private_parts_are_dropped_and_nothing_is_printed() -> None:
    """An issuer that publishes its private key does not make us hold it, and no key is in a repr."""
    pinned = parse_jwks(jwks(jwk("EdDSA", private=True)))["EdDSA"]
    assert not hasattr(pinned.key, "sign")
    assert hashlib.sha256(SECRET).hexdigest() not in repr(SHARED)
    assert repr(SHARED) == "PinnedKey(algorithm=<Algorithm.HS256: 'HS256'>)"
    assert isinstance(pinned, PinnedKey)


@pytest.mark.parametrize("over", [{"leeway_s": 301}, {"leeway_s": -1}, {"issuer": ""}, {"audience": ""}])
def test_a_policy_that_checks_nothing_is_refused(over: dict[str, Any]) -> None:
    """No empty issuer or audience, and no leeway that outlives a token."""
    with pytest.raises(ValueError):
        TokenPolicy(**{"issuer": "i", "audience": "a", **over})


def test_claims_can_have_other_names() -> None:
    """An issuer that calls subject and accounts otherwise is mapped, and the usual names are then not read."""
    policy = TokenPolicy(POLICY.issuer, POLICY.audience, subject_claim="uid", trusts_claim="orgs")
    mapped = {**CLAIMS, "uid": "u1", "orgs": ["firm"], "trusts": ["evil"]}
    assert verified(token(mapped), SHARED, policy=policy) == Identity("u1", ("firm",), NOW + 630)
