"""Challenges: the MAC, its slots, expiry, the header grammar."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from channels.descriptor import Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId
from channels.instants import UnixMillis, parse_rfc3339
from channels.units import Units
from channels.wire import base64url, challenge, headers, jcs, request, strict_json
from channels.wire.challenge import Challenge, ChallengeMac

SECRET = b"k" * 32
MAC = ChallengeMac((SECRET,))
EXPIRES = "2030-01-01T00:00:00.000Z"
DIGEST = "sha-256=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
ESCROW = Escrow(SessionProtocol.V2, 42_431, Address(bytes.fromhex("4d50500000000000000000000000000000000000")))
TERMS = request.SessionRequest(
    amount=Units(25), currency=Address(b"\x20" * 20), recipient=Address(b"\x15" * 20), unit_type="token", escrow=ESCROW
)


def issue(**changes: Any) -> Challenge:
    arguments: dict[str, Any] = {
        "realm": "api.example.com",
        "method": "tempo",
        "intent": "session",
        "request": TERMS.encode(),
        "expires": EXPIRES,
        "digest": DIGEST,
        "opaque": {"scope": "POST /v1"},
        "header": "Payment-Authorization",
    }
    return MAC.issue(**(arguments | changes))


def refused(call: Any, *args: Any, **kwargs: Any) -> ChannelFault:
    with pytest.raises(ChannelFault) as caught:
        call(*args, **kwargs)
    return caught.value


def test_t01_unsorted_request_survives_re_encoding() -> None:
    """T-01: a payer that parses the request and writes it canonically again changes nothing, whatever order we built it in."""
    unsorted = {"z": "1", "methodDetails": {"sessionProtocol": "v2", "chainId": 1}, "a": ["x"]}
    issued = issue(request=challenge.encode_object(unsorted))
    parsed = strict_json.loads(base64url.decode(issued.request, field="r", length_max=999), field="r")
    echoed = replace(issued, request=base64url.encode(jcs.canonicalize(parsed).encode()))
    assert MAC.verify(echoed)


def test_t02_ids_differ_within_a_millisecond() -> None:
    """T-02: challenges for one route and instant differ in id and expires alone, and expire at that instant."""
    at = UnixMillis(1_893_456_000_123)
    made = [issue(expires=challenge.expires_text(at, entropy)) for entropy in (0, 1, 999_999_999_999, 2**64 - 5)]
    assert len({one.id for one in made}) == 4
    assert {replace(one, id="", expires="") for one in made} == {replace(made[0], id="", expires="")}
    assert {parse_rfc3339(one.expires) for one in made} == {at}
    assert made[1].expires == "2030-01-01T00:00:00.123000000000001Z"


@pytest.mark.parametrize("field", ["id", "realm", "method", "intent", "request", "expires", "digest", "opaque", "header"])
def test_t03_one_flipped_character_unmakes_a_challenge(field: str) -> None:
    """T-03: every single-character change of a bound member, anywhere in it, fails verification."""
    issued = issue()
    text = getattr(issued, field)
    for index in range(len(text)):
        for flipped in {chr(ord(text[index]) ^ 1), chr(ord(text[index]) ^ 32), "|", "\u00e9", "\ud800"} - {text[index]}:
            assert not MAC.verify(replace(issued, **{field: text[:index] + flipped + text[index + 1 :]}))
    assert not MAC.verify(replace(issued, **{field: text + " "}))
    assert not MAC.verify(replace(issued, **{field: ""}))
    assert MAC.verify(issued)


@pytest.mark.parametrize("field", ["expires", "digest", "opaque", "header"])
def test_t06_dropping_a_bound_member_unmakes_a_challenge(field: str) -> None:
    """T-06: an attacker who leaves out expires, or any other optional slot, no longer holds our challenge."""
    assert not MAC.verify(replace(issue(), **{field: None}))


def test_t04_t05_route_and_price_are_bound() -> None:
    """T-04, T-05: a challenge cannot be moved to another route's scope or another price."""
    issued = issue()
    other_route = issue(opaque={"scope": "POST /other"})
    dearer = issue(request=replace(TERMS, amount=Units(100)).encode())
    assert not MAC.verify(replace(other_route, id=issued.id))
    assert not MAC.verify(replace(dearer, id=issued.id))


def test_description_is_free_text_and_not_bound() -> None:
    """The description may be re-encoded on its way without hurting anybody: the id does not cover it."""
    issued = issue(description="a")
    assert issued.id == issue().id
    assert MAC.verify(replace(issued, description="b"))


def test_authorization_is_not_advertised_as_a_header() -> None:
    """Naming the default credential header, in any case, is dropped and not bound."""
    for name in ("Authorization", "authorization"):
        assert issue(header=name) == issue(header=None)


def test_p16_no_two_slot_vectors_share_a_joined_string() -> None:
    """P16: over all short vectors of tricky slot values, distinct bindable vectors have distinct MAC inputs."""
    values = ("", "a", "|", "a|b", "a|", "b")
    seen: dict[str, Challenge] = {}
    for realm, intent, expires, header, opaque in product(values, values, (*values, None), (*values, None), (*values, None)):
        made = Challenge("x", realm, "tempo", intent, "r", expires, None, opaque, None, header)
        if challenge._bindable(made):
            joined = "|".join(challenge._slots(made))
            assert seen.setdefault(joined, made) == made
    assert len(seen) == 3 * 3 * 3 * 3 * 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("realm", "a|b"),
        ("realm", ""),
        ("realm", "a\r\nSet-Cookie: x"),
        ("realm", "caf\u00e9"),
        ("method", "Tempo"),
        ("method", "te|mpo"),
        ("method", ""),
        ("intent", "Session"),
        ("intent", ""),
        ("request", "e30="),
        ("request", ""),
        ("request", "e" * 16_385),
        ("expires", "tomorrow"),
        ("expires", ""),
        ("digest", "sha-256=:abc:"),
        ("digest", "md5=abc"),
        ("header", "X Y"),
        ("header", "X|Y"),
        ("header", "X\r\nY"),
        ("header", ""),
        ("opaque", {"a": 1}),
        ("opaque", {"a": {"b": "c"}}),
        ("description", "line\r\nbreak"),
        ("description", "tab\there"),
        ("description", "\u20ac"),
        ("description", "\u0130"),
        ("description", "\x7f"),
    ],
)
def test_t09_p16_p33_what_cannot_be_written_safely_is_not_issued(field: str, value: Any) -> None:
    """T-09, P16, P33: separators, line breaks and non-ASCII are refused when the challenge is made, not found later."""
    assert refused(issue, **{field: value}).reason is Reason.INVALID_CHALLENGE


def test_secrets_rotate_and_stay_secret() -> None:
    """T-86: the first secret signs, all verify, a removed one no longer does, and none is ever shown."""
    old, new = b"o" * 32, b"n" * 32
    arguments: dict[str, Any] = {"realm": "r", "method": "tempo", "intent": "session", "request": "e30", "expires": EXPIRES}
    before = ChallengeMac((old,)).issue(**arguments)
    both = ChallengeMac((new, old))
    assert both.verify(before)
    assert both.issue(**arguments) == ChallengeMac((new,)).issue(**arguments)
    assert not ChallengeMac((new,)).verify(before)
    assert "oooo" not in repr(both) + str(both)
    assert "2 secrets" in repr(both)


@pytest.mark.parametrize("secrets", [(), (b"x" * 31,), (b"x" * 32, b"")])
def test_weak_secrets_are_refused(secrets: tuple[bytes, ...]) -> None:
    """A node cannot start with no secret or a short one."""
    with pytest.raises(ValueError):
        ChallengeMac(secrets)


NOW = parse_rfc3339("2030-01-01T00:00:00Z")
P17: dict[str, Reason | None] = {
    "2030-01-01T00:00:00.001Z": None,
    "2030-01-01T00:00:01Z": None,
    "2030-01-01T00:00:00.001999999999Z": None,
    "2030-01-01T00:00:00.123482917123456Z": None,
    "2030-01-01T00:00:00.123456789012345678Z": None,
    "2030-01-01T01:00:01+01:00": None,
    "2029-12-31T19:00:01-05:00": None,
    "2030-01-01T05:45:01+05:45": None,
    "2032-02-29T00:00:00Z": None,
    "9999-12-31T23:59:59.999Z": None,
    "2030-01-01T00:00:00Z": Reason.PAYMENT_EXPIRED,
    "2030-01-01T00:00:00.000999Z": Reason.PAYMENT_EXPIRED,
    "2029-12-31T23:59:59.999Z": Reason.PAYMENT_EXPIRED,
    "2030-01-01T01:00:00+01:00": Reason.PAYMENT_EXPIRED,
    "1970-01-01T00:00:00Z": Reason.PAYMENT_EXPIRED,
    "2030-01-01T00:00:00+00:01": Reason.PAYMENT_EXPIRED,
    "": Reason.INVALID_CHALLENGE,
    "not-a-date": Reason.INVALID_CHALLENGE,
    "1893456001": Reason.INVALID_CHALLENGE,
    "2030-01-01": Reason.INVALID_CHALLENGE,
    "2030-01-01T00:00Z": Reason.INVALID_CHALLENGE,
    "2030-01-01T00:00:00": Reason.INVALID_CHALLENGE,
    "2030-01-01T00:00:00z": Reason.INVALID_CHALLENGE,
    "2030-01-01t00:00:00Z": Reason.INVALID_CHALLENGE,
    "2030-01-01 00:00:01Z": Reason.INVALID_CHALLENGE,
    " 2030-01-01T00:00:01Z": Reason.INVALID_CHALLENGE,
    "2030-01-01T00:00:01Z\n": Reason.INVALID_CHALLENGE,
    "2030-01-01T00:00:01.Z": Reason.INVALID_CHALLENGE,
    "2030-01-01T00:00:01,5Z": Reason.INVALID_CHALLENGE,
    "2030-06-30T23:59:60Z": Reason.INVALID_CHALLENGE,
    "2030-01-01T24:00:00Z": Reason.INVALID_CHALLENGE,
    "2030-13-01T00:00:00Z": Reason.INVALID_CHALLENGE,
    "2030-02-30T00:00:00Z": Reason.INVALID_CHALLENGE,
    "2031-02-29T00:00:00Z": Reason.INVALID_CHALLENGE,
    "0000-01-01T00:00:00Z": Reason.INVALID_CHALLENGE,
    "1969-12-31T23:59:59Z": Reason.INVALID_CHALLENGE,
    "10000-01-01T00:00:00Z": Reason.INVALID_CHALLENGE,
    "-2030-01-01T00:00:00Z": Reason.INVALID_CHALLENGE,
    "2030-01-01T00:00:00+24:00": Reason.INVALID_CHALLENGE,
    "2030-01-01T00:00:00+0100": Reason.INVALID_CHALLENGE,
    "2030-01-01T00:00:00GMT": Reason.INVALID_CHALLENGE,
    "2030-01-01T00:00:00.1234567890123456789Z": Reason.INVALID_CHALLENGE,
    "\uff12\uff10\uff13\uff10-01-01T00:00:01Z": Reason.INVALID_CHALLENGE,
    "2030-W01-1T00:00:00Z": Reason.INVALID_CHALLENGE,
    "9999-12-31T23:59:59-23:59": None,
}


@pytest.mark.parametrize(("expires", "reason"), P17.items(), ids=[ascii(text) for text in P17])
def test_p17_expires_fails_closed(expires: str, reason: Reason | None) -> None:
    """P17: a challenge is fresh only if it names a real future instant; everything else is refused without a crash."""
    made = replace(issue(), expires=expires)
    if reason is None:
        challenge.require_fresh(made, now=NOW)
    else:
        assert refused(challenge.require_fresh, made, now=NOW).reason is reason


def test_p17_missing_expires_is_refused() -> None:
    """P17, T-06: no expiry is not an eternal one."""
    assert refused(challenge.require_fresh, replace(issue(), expires=None), now=NOW).reason is Reason.INVALID_CHALLENGE


def test_t09_header_round_trip_with_quotes_and_backslashes() -> None:
    """T-09: quotes, backslashes, commas and scheme words inside a description come back as they were."""
    description = 'say "hi", Payment id=\\"x\\" \\u0041 \\\\ , Bearer'
    issued = issue(description=description)
    header = headers.serialize_challenge(issued)
    assert header.isascii()
    assert header.isprintable()
    assert headers.parse_challenges([header, header + ", " + header]) == [issued] * 3


def test_p33_serialiser_refuses_what_came_from_elsewhere() -> None:
    """P33: a challenge object built by hand with a line break in it is not written either."""
    for field in ("id", "realm", "description", "expires", "header"):
        fault = refused(headers.serialize_challenge, replace(issue(), **{field: "x\r\nSet-Cookie: a=b"}))
        assert fault.reason is Reason.INVALID_CHALLENGE


LINE = 'id="a", realm="r", method="tempo", intent="session", request="e30"'


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (f"Payment {LINE}", 1),
        (f"payment\t {LINE}", 1),
        (f'Bearer realm="x, Payment {LINE[:6]}", Payment {LINE}', 1),
        (f'Bearer realm="x", Payment {LINE}, Basic realm="y"', 1),
        (f"Negotiate, Payment {LINE}, Payment {LINE}", 2),
        (f"Negotiate YII=, ,, Payment {LINE},,", 1),
        (f'Payment {LINE}, __proto__="x", constructor="y"', 1),
        (f"Payment {LINE}".replace("=", " = "), 1),
        ('Bearer realm="Payment id=1"', 0),
        ('Paymentx id="a"', 0),
        ("", 0),
        (f'Bearer realm="unterminated, Payment {LINE[3:5]}', 0),
    ],
)
def test_p18_challenges_among_other_schemes(value: str, count: int) -> None:
    """P18: Payment challenges are found by grammar, next to, before, after and inside the quotes of other schemes."""
    assert len(headers.parse_challenges([value])) == count


@pytest.mark.parametrize(
    "value",
    [
        "Payment",
        "Payment e30",
        f'Payment {LINE}, id="b"',
        f'Payment {LINE}, ID="b"',
        f'Payment {LINE}, realm="r"',
        f'Payment {LINE}, description="open',
        f'Payment {LINE}, description="a"b',
        f'Payment {LINE}, description="a\\',
        f"Payment {LINE}, description=",
        f"Payment {LINE}, description=\u00e9",
        f"Payment {LINE}, =x",
        f'Payment {LINE}, description="\\ud800"',
        f'Payment {LINE}, description="\\ude00\\ud83d"',
        f'Payment {LINE}, description="a\nb"',
        f'Payment {LINE}, description="a\x00b"',
        f"Payment {LINE}".replace('"e30"', '"' + "e" * 16_385 + '"'),
        f"Payment {LINE}".replace('"a"', '"' + "e" * 257 + '"'),
        f"Payment {LINE}".replace('realm="r"', 'realm=""'),
        f"Payment {LINE}" + "," * 65_536,
    ],
)
def test_p18_malformed_challenges_are_refused(value: str) -> None:
    """P18: duplicates, unterminated quotes, missing or oversized parameters and stray escapes are one kind of fault."""
    assert refused(headers.parse_challenges, [value]).reason is Reason.INVALID_CHALLENGE


def test_descriptions_beyond_ascii_are_read() -> None:
    """Characters a server may not write today are still read: \\u escapes, astral pairs, and raw Latin-1 bytes."""
    header = f'Payment {LINE}, description="1\\u20ac \\ud83d\\ude00 caf\udce9 \\u00zz"'
    (parsed,) = headers.parse_challenges([header])
    assert parsed.description == "1\u20ac \U0001f600 caf\u00e9 u00zz"


@pytest.mark.parametrize("value", ['Payment "' * 7_000, 'Payment a="' + "\\" * 65_000, 'Payment a="' + "b" * 65_000, "a " * 32_000, 'x="' + 'a\\"' * 20_000], ids=range(5))
def test_p18_tokenizer_is_linear(value: str) -> None:
    """P18: unterminated quotes and escape runs cost one pass."""
    begun = time.perf_counter()
    headers.payment_credentials([value])
    with suppress(ChannelFault):
        headers.parse_challenges([value])
    assert time.perf_counter() - begun < 0.5


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        (['Bearer "x, Payment abc"'], []),
        (["Bearer x"], []),
        (['Bearer realm="Payment abc"'], []),
        (["payment abc"], ["abc"]),
        (["PAYMENT  \t abc"], ["abc"]),
        (["Payment\tabc=="], ["abc=="]),
        (["Bearer x, Payment abc"], ["abc"]),
        (["Payment abc, Payment def"], ["abc", "def"]),
        (["Payment abc", "Bearer y", "Payment def"], ["abc", "def"]),
        (["Payment !!!"], ["!!!"]),
        (["Payment"], [""]),
        (["Payment=abc"], []),
        (["Payment =abc"], []),
        (["xPayment abc", "Payments abc", "My-Payment abc"], []),
        (["Bearer \u00a0Payment abc"], []),
        (["Payment\u00a0abc"], []),
        ([""], []),
        ([], []),
        (['Bearer "x, Payment abc'], []),
        (['Payment abc", Payment def'], ['abc", Payment def']),
    ],
)
def test_t07_payment_scheme_is_found_by_grammar(values: list[str], tokens: list[str]) -> None:
    """T-07: the scheme is matched in any case, after tabs or spaces, and never inside a quoted value."""
    assert headers.payment_credentials(values) == tokens


def test_session_request_round_trip() -> None:
    """Every member of a session request survives encoding, and absent ones stay absent."""
    full = replace(
        TERMS,
        suggested_deposit=Units(10_000),
        description="d",
        fee_payer=True,
        fee_token=Address(b"\x01" * 20),
        min_voucher_delta=Units(5),
        operator=Address(b"\x02" * 20),
        channel_id=ChannelId(b"\x03" * 32),
    )
    assert request.decode(full.encode()) == full
    assert request.decode(TERMS.encode()) == TERMS


def test_session_request_without_protocol_is_v1() -> None:
    """A challenge that names no session protocol is one of the first kind."""
    value: Any = TERMS.to_json()
    del value["methodDetails"]["sessionProtocol"]
    assert request.decode(challenge.encode_object(value)).escrow.protocol is SessionProtocol.V1


REQUEST_CHANGES: list[tuple[str, Any, bool]] = [
    ("amount", "0", False),
    ("amount", 25, False),
    ("amount", "1e3", False),
    ("amount", None, False),
    ("currency", "0x20", False),
    ("currency", 7, False),
    ("recipient", "0x" + "g" * 40, False),
    ("unitType", 1, False),
    ("unitType", "x" * 1025, False),
    ("suggestedDeposit", "-1", False),
    ("suggestedDeposit", None, False),
    ("description", ["x"], False),
    ("methodDetails", None, False),
    ("methodDetails", [], False),
    ("methodDetails.chainId", "42431", False),
    ("methodDetails.chainId", True, False),
    ("methodDetails.chainId", -1, False),
    ("methodDetails.escrowContract", "reserve", False),
    ("methodDetails.sessionProtocol", "v3", False),
    ("methodDetails.sessionProtocol", 2, False),
    ("methodDetails.feePayer", "yes", False),
    ("methodDetails.feePayer", 1, False),
    ("methodDetails.feeToken", "", False),
    ("methodDetails.minVoucherDelta", 5, False),
    ("methodDetails.operator", "0x", False),
    ("methodDetails.channelId", "0x01", False),
    ("methodDetails.sessionSnapshot", {}, False),
    ("methodDetails.sessionSnapshot", None, False),
    ("unknown", {"deep": ["member"]}, True),
    ("methodDetails.unknown", "1", True),
    ("methodDetails.feePayer", False, True),
]


@pytest.mark.parametrize(("path", "value", "accepted"), REQUEST_CHANGES)
def test_session_request_is_strict_but_ignores_unknown_members(path: str, value: Any, accepted: bool) -> None:
    """A known member has exactly one type and form; an unknown one changes nothing."""
    changed: Any = TERMS.to_json()
    target, _, name = path.rpartition(".")
    (changed[target] if target else changed)[name] = value
    text = challenge.encode_object(changed)
    if accepted:
        assert request.decode(text) == TERMS
    else:
        fault = refused(request.decode, text)
        assert fault.reason is Reason.INVALID_CHALLENGE
        assert name in (fault.field or "") or name == "sessionSnapshot"


@pytest.mark.parametrize("text", ["", "!!", "bnVsbA", "W10", "e30", base64url.encode(b'{"amount":1.5}'), base64url.encode(b"\xff")])
def test_session_request_that_is_no_object(text: str) -> None:
    """Anything but base64 of a JSON object with the required members is an invalid challenge."""
    assert refused(request.decode, text).reason is Reason.INVALID_CHALLENGE
