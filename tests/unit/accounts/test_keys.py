"""API keys: told apart from typing errors, never printed, never guessed (K1, K2)."""

from __future__ import annotations

import copy
import pickle
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.kernel.keys import KEY_START, KeyDigest, is_key, new_key, parse_key
from tests.unit.accounts.kit import api_key, refused

ALPHABET = string.ascii_letters + string.digits + "-_"
SECRETS = st.binary(min_size=32, max_size=32)
HOSTILE = (
    "",
    KEY_START,
    "Bearer " + KEY_START + "A" * 48,
    KEY_START + "A" * 47,
    KEY_START + "A" * 49,
    KEY_START + "A" * 48 + "\n",
    KEY_START.upper() + "A" * 48,
    KEY_START + "A" * 47 + "=",
    KEY_START + "\u0410" * 48,
    KEY_START + "' OR 1=1 --".ljust(48, "x"),
    KEY_START + "A" * 1_000_000,
    None,
    b"sk-mpp-",
    7,
)


@given(secret=SECRETS)
def test_a_new_key_parses_to_its_own_digest(secret: bytes) -> None:
    """What is shown once is what is recognised afterwards, and the prefix is the beginning of it and no more."""
    made = new_key(lambda size: secret[:size])
    assert is_key(made.text)
    assert len(made.text) == 55
    assert parse_key(made.text) == made.digest
    assert made.text.startswith(made.prefix)
    assert len(made.prefix) == 13


@given(secret=SECRETS, at=st.integers(0, 47), to=st.sampled_from(ALPHABET))
def test_every_wrong_character_is_a_typing_error(secret: bytes, at: int, to: str) -> None:
    """One wrong character anywhere is found without asking a ledger."""
    text = new_key(lambda _: secret).text
    body = text[len(KEY_START) :]
    bent = KEY_START + body[:at] + to + body[at + 1 :]
    if bent != text:
        assert "typing error" in refused(NodeReason.INVALID_KEY, parse_key, bent).message


@given(secret=SECRETS)
def test_every_swapped_pair_is_a_typing_error(secret: bytes) -> None:
    """Two neighbours in the wrong order are found, also where the secret ends and the checksum begins."""
    text = new_key(lambda _: secret).text
    for at in range(len(KEY_START), len(text) - 1):
        bent = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
        if bent != text:
            refused(NodeReason.INVALID_KEY, parse_key, bent)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_k2_nothing_else_is_a_key_and_nothing_is_repeated(text: object) -> None:
    """K2: whatever is not a key is refused for its form alone, in words that hold nothing of it."""
    fault = refused(NodeReason.INVALID_KEY, parse_key, text)
    assert fault.message == "an API key is sk-mpp- and 48 characters"


@given(text=st.text())
def test_any_text_is_refused_and_never_a_bug(text: str) -> None:
    """Text nobody thought of raises the one refusal and nothing else."""
    for each in (text, KEY_START + text):
        with pytest.raises(NodeFault):
            parse_key(each)


def test_k1_a_digest_is_of_the_whole_text_by_sha_256() -> None:
    """K1: a fixed key has the digest another implementation computes, and keys one bit apart share nothing."""
    made = new_key(lambda size: bytes(range(size)))
    assert made.text == "sk-mpp-AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh-KfiaR"
    assert made.digest.stored().hex() == "a0fdbfb57ab36db27dad9c8448beabd472abe29f2fff554824d97ff5c103f5bc"
    other = new_key(lambda size: bytes([1]) + bytes(range(1, size)))
    assert made.digest != other.digest
    assert len({made.digest, other.digest, parse_key(made.text)}) == 2


def test_no_secret_is_printed() -> None:
    """Neither the text nor the digest of a key appears in a repr, whatever holds it."""
    made = new_key(lambda size: b"z" * size)
    shown = repr([made, made.digest, api_key(digest=made.digest)]) + str(made.digest)
    assert made.text not in shown
    assert made.text[13:] not in shown
    assert made.digest.stored().hex() not in shown
    assert repr(made.digest.stored())[2:-1] not in shown


def test_entropy_and_digests_have_their_lengths() -> None:
    """A source that gives too little makes no key, and no shorter value passes for a digest."""
    with pytest.raises(ValueError, match="32 bytes"):
        new_key(lambda size: b"k" * (size - 1))
    with pytest.raises(ValueError, match="32 bytes"):
        KeyDigest(b"k" * 31)
    assert KeyDigest(b"k" * 32) != b"k" * 32


def test_a_digest_survives_copies() -> None:
    """Equality is of the value, so a digest read back from a ledger finds its key."""
    digest = new_key(lambda size: b"k" * size).digest
    assert copy.deepcopy(digest) == pickle.loads(pickle.dumps(digest)) == KeyDigest(digest.stored())
