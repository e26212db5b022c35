"""Text layers: base64, strict JSON, canonical JSON."""

from __future__ import annotations

import time

import pytest

from channels.faults import ChannelFault, Reason
from channels.wire import base64url, jcs, strict_json


def refuse(call: object, *args: object, **kwargs: object) -> ChannelFault:
    with pytest.raises(ChannelFault) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    return caught.value


@pytest.mark.parametrize("text", ["-_-_", "+/+/", "+/8", "+/8=", "-_8", "-_8=", "", "YQ", "YQ=="])
def test_t10_both_alphabets_with_or_without_padding(text: str) -> None:
    """T-10: either alphabet is read, padded fully or not at all, and both give the same bytes."""
    data = base64url.decode(text, field="f", length_max=16)
    assert base64url.encode(data) == text.replace("+", "-").replace("/", "_").rstrip("=")


@pytest.mark.parametrize(
    "text",
    ["YWJ=YQ", "YQ=", "YQ===", "Y", "YWJjY", "YR", "YR==", "YWJ", "+_", "a b=", "YQ\n", "\nYQ", "YWI=\n", "\uff39\uff31", "!!!", "=", "==", None, 7, b"YQ"],
    ids=lambda text: ascii(text)[:30],
)
def test_non_canonical_base64_is_refused(text: object) -> None:
    """One byte string has one text per alphabet: foreign characters, odd padding and stray bits are refused."""
    fault = refuse(base64url.decode, text, field="f", length_max=9)
    assert (fault.reason, fault.field) == (Reason.INVALID_PAYLOAD, "f")


def test_base64_limit_is_in_bytes() -> None:
    """Exactly ``length_max`` bytes pass and one more does not, whatever the padding."""
    for length in range(9):
        for writer in (base64url.encode, base64url.encode_padded):
            assert base64url.decode(writer(bytes(length)), field="f", length_max=length) == bytes(length)
            refuse(base64url.decode, writer(bytes(length + 1)), field="f", length_max=length)


T08_BAD = {
    "duplicate members": b'{"a":1,"a":2}',
    "duplicate by escape": b'{"a":1,"\\u0061":2}',
    "nested duplicate": b'{"x":[{"a":1,"a":1}]}',
    "float": b'{"a":1.0}',
    "exponent": b'{"a":1e3}',
    "overflowing exponent": b'{"a":1e400}',
    "nan": b'{"a":NaN}',
    "infinity": b"[Infinity]",
    "minus infinity": b"[-Infinity]",
    "54-bit integer": b"[9007199254740992]",
    "5000 digits": b"[" + b"9" * 5000 + b"]",
    "leading zero": b"[01]",
    "plus sign": b"[+1]",
    "arabic-indic digits": "[\u0661]".encode(),
    "full-width digits": "[\uff11]".encode(),
    "lone high surrogate": b'["\\ud800"]',
    "lone low surrogate": b'["\\uDFFF"]',
    "surrogate as a name": b'{"\\ud83d":1}',
    "swapped surrogates": b'["\\ude00\\ud83d"]',
    "invalid utf-8": b'["\xff"]',
    "utf-8 surrogate": b'["\xed\xa0\x80"]',
    "overlong utf-8": b'["\xc0\xaf"]',
    "utf-16": '{"a":1}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"a":1}',
    "trailing text": b"{} {}",
    "trailing comma": b"[1,]",
    "single quotes": b"{'a':1}",
    "comment": b"[1]/**/",
    "raw control in string": b'["\x01"]',
    "raw line feed in string": b'["\n"]',
    "empty": b"",
    "space": b"  ",
    "depth 17": b"[" * 17 + b"]" * 17,
    "depth 10000": b"[" * 10_000,
    "mixed depth": b'{"a":[' * 9 + b"]}" * 9,
    "1 MB": b'["' + b"x" * 1_000_000 + b'"]',
    "limit plus one": b'"' + b"x" * 16_383 + b'"',
}


@pytest.mark.parametrize("data", T08_BAD.values(), ids=T08_BAD)
def test_t08_hostile_json_is_one_fault(data: bytes) -> None:
    """T-08: duplicate members, floats, bad Unicode, depth and size all end in the same refusal."""
    fault = refuse(strict_json.loads, data, field="credential")
    assert (fault.reason, fault.field) == (Reason.MALFORMED_CREDENTIAL, "credential")


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"__proto__":1,"constructor":{"a":null}}', {"__proto__": 1, "constructor": {"a": None}}),
        (b"[9007199254740991,-9007199254740991,-0]", [2**53 - 1, 1 - 2**53, 0]),
        (b'["\\ud83d\\ude00","\\u20ac"]', ["\U0001f600", "\u20ac"]),
        (b'["[[[[[[[[[[[[[[[[[[[[[[", "{{{\\"{{{{{{{{{{{{{"]', ["[" * 22, '{{{"{{{{{{{{{{{{{']),
        (b"[" * 16 + b"]" * 16, None),
        (b"[[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[]]", None),
        (b'["\\\\ud800"]', ["\\ud800"]),
        (b'"' + b"x" * 16_382 + b'"', "x" * 16_382),
    ],
)
def test_honest_json_passes(data: bytes, value: object) -> None:
    """What is within the limits is read as any parser would, brackets inside strings and odd names included."""
    read = strict_json.loads(data, field="f")
    assert value is None or read == value
    assert strict_json.loads(data.decode(), field="f") == read


def test_lone_surrogates_in_text_input() -> None:
    """Text that cannot be UTF-8 is refused, not encoded with replacements."""
    refuse(strict_json.loads, '["\ud800"]', field="f")


@pytest.mark.parametrize(
    "data",
    [b'"' + b'\\"' * 8_000, b'["' + b'a"' * 5_000, b'"' * 16_000, b"[{" * 17 + b'"\\' * 8_000, b'{"a":' * 3_000],
)
def test_t08_scan_is_linear(data: bytes) -> None:
    """T-08: no arrangement of quotes, backslashes and brackets costs more than a moment."""
    begun = time.perf_counter()
    refuse(strict_json.loads, data, field="f")
    assert time.perf_counter() - begun < 0.5


def test_jcs_orders_by_utf16() -> None:
    """Names sort by UTF-16 code units (RFC 8785 section 3.2.3): an astral name precedes U+FB33."""
    value = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\x80": 6, "\u00f6": 7}
    assert list(strict_json.loads(jcs.canonicalize(value), field="f")) == ["\r", "1", "\x80", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]  # type: ignore[call-overload]


def test_jcs_escapes_only_what_it_must() -> None:
    """Two-character escapes where JSON has them, lower-case \\u for other controls, everything else literal."""
    assert jcs.canonicalize('\b\t\n\f\r"\\/\x00\x1f\x7f\u2028\u00e9') == '"\\b\\t\\n\\f\\r\\"\\\\/\\u0000\\u001f\x7f\u2028\u00e9"'


def test_jcs_forms() -> None:
    """Scalars, empty containers and nesting have no spaces; true is not 1."""
    assert jcs.canonicalize({"b": [], "a": {}, "c": [True, False, None, -1, (2,)]}) == '{"a":{},"b":[],"c":[true,false,null,-1,[2]]}'


@pytest.mark.parametrize("value", [1.0, b"x", bytearray(b"x"), object(), {1: 2}, {"a": [1.5]}, {None: 1}, {1, 2}])
def test_jcs_refuses_types_payment_objects_never_hold(value: object) -> None:
    """A float or a non-text name is a programming error, never written."""
    with pytest.raises(TypeError):
        jcs.canonicalize(value)


@pytest.mark.parametrize("value", [2**53, -(2**53), "\ud800", {"\udfff": 1}])
def test_jcs_refuses_values_without_a_canonical_form(value: object) -> None:
    """Integers no reader agrees on and half surrogate pairs raise instead of producing text."""
    with pytest.raises(ValueError):
        jcs.canonicalize(value)
