"""Accounts, keys and tokens for the tests of who may use what."""

from __future__ import annotations

import base64
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from channels.instants import UnixSeconds
from mppnode.accounts.bearer import PinnedKey, TokenPolicy, verify
from mppnode.accounts.model import Account, AccountKind, ApiKey, Identity
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.keys import new_key

NOW = UnixSeconds(1_900_000_000)
SECRET = b"s" * 32
POLICY = TokenPolicy("https://id.example", "mppnode", leeway_s=30)
CLAIMS: dict[str, Any] = {"iss": "https://id.example", "aud": "mppnode", "sub": "ann", "exp": NOW + 600}
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
PRIVATE: dict[str, Any] = {"RS256": RSA, "ES256": EC, "EdDSA": ED}


def jwk(algorithm: str, kid: str | None = None, *, private: bool = False, **extra: Any) -> dict[str, Any]:
    key = PRIVATE[algorithm]
    made = jwt.get_algorithm_by_name(algorithm).to_jwk(key if private else key.public_key(), as_dict=True)
    return {**made, "kid": kid or algorithm, **extra}


def jwks(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"keys": list(entries)}).encode()


def token(claims: dict[str, Any], key: Any = SECRET, algorithm: str = "HS256", **header: Any) -> str:
    return jwt.encode(claims, key, algorithm, headers=header)


def segment(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def account(**over: Any) -> Account:
    return Account(**{"id": "a1", "kind": AccountKind.USER, "trust": "ann", **over})


def api_key(**over: Any) -> ApiKey:
    made = new_key(lambda size: b"k" * size)
    return ApiKey(
        **{"id": "k1", "account": "a1", "name": "laptop", "digest": made.digest, "prefix": made.prefix, **over}
    )


def verified(text: str, key: PinnedKey | None, now: int = NOW, policy: TokenPolicy = POLICY) -> Identity:
    return verify(text, key, policy, UnixSeconds(now))


def refused(reason: NodeReason, call: Any, *args: Any, **named: Any) -> NodeFault:
    with pytest.raises(NodeFault) as caught:
        call(*args, **named)
    assert caught.value.reason is reason, caught.value
    return caught.value
