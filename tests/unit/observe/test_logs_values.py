"""Whatever a field contains, a line is one JSON object of bounded length that shows nothing secret."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mppnode.config.secrets import Secret
from mppnode.kernel.clock import ManualClock
from mppnode.observe.log_values import ITEMS_MAX, TEXT_MAX, shown, sounds_secret
from mppnode.observe.logs import CAUSE, LINE_BYTES_MAX, Level, make_log, wants_colour

HOSTILE = ["a\nb", "a\r\n{}", "\u2028\u2029\x85\x0b\x0c", "\x1b[2J\x1b]0;owned\x07", "\ud800", "a\udc80\U0001f600", "\x00", '"}\n{"level":"error"', "\u202egpj.exe"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.sampled_from(HOSTILE) | st.characters(categories=["Cs"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)


def written(as_json=True, **fields):
    stream = io.StringIO()
    make_log(clock=ManualClock(), level=Level.DEBUG, as_json=as_json, stream=stream)("x.y", **fields)
    return stream.getvalue()


def check(line):
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    assert line[:-1].isprintable()
    assert line.isascii()
    assert len(line) <= LINE_BYTES_MAX


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_text_stays_in_its_field(value, as_json):
    """Line ends, escapes and lone surrogates neither end a line nor move a cursor, alone or inside something."""
    line = written(as_json, a=value, b=[value, {value: value}])
    check(line)
    if as_json:
        assert list(json.loads(line)) == ["at", "level", "event", "a", "b"]


@given(st.dictionaries(st.text(min_size=1), ANYTHING, max_size=40))
def test_any_value_makes_one_object(fields):
    """No value makes a line that is not one strict JSON object with its own head."""
    fields = {name: value for name, value in fields.items() if name not in ("self", "event", "level")}
    line = written(**fields)
    check(line)
    found = json.loads(line, parse_constant=pytest.fail)
    assert found["event"] == "x.y"
    json.dumps(found, ensure_ascii=False).encode()


def test_a_text_of_ten_megabytes_is_cut_with_a_mark():
    """A long text is its beginning and how much is missing; two of them still make a line."""
    line = written(a="x" * 10_000_000)
    assert json.loads(line)["a"] == "x" * TEXT_MAX + f"...(+{10_000_000 - TEXT_MAX})"
    check(written(**{f"f{number}": "\u2028" * 10_000_000 for number in range(3)}))


def test_so_many_fields_still_make_a_line():
    """A line keeps its head whatever has to go."""
    line = written(**{f"field_{'x' * 80}_{number}": "y" * 500 for number in range(200)})
    check(line)
    assert json.loads(line)["event"] == "x.y"


def test_deep_and_endless_values_end():
    """A value inside itself, and one of a thousand items, are shown as far as it helps."""
    endless: list[object] = [1]
    endless.append(endless)
    assert json.loads(written(a=endless))["a"][1][1][1][1] == "<list>"
    many = shown("a", list(range(1_000)))
    assert many == [*range(ITEMS_MAX), f"...(+{1_000 - ITEMS_MAX})"]
    mapping = shown("a", {str(number): number for number in range(1_000)})
    assert isinstance(mapping, dict)
    assert mapping["..."] == 1_000 - ITEMS_MAX
    assert shown("a", 10**5_000) == f"<int of {(10**5_000).bit_length()} bits>"


class Odd:
    def __repr__(self):
        return "sk-mpp-odd"

    __str__ = __repr__


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b"sk-mpp", "<bytes>"),
        (bytearray(b"sk"), "<bytearray>"),
        (ValueError("sk-mpp"), "<ValueError>"),
        (Secret("sk-mpp"), "<Secret>"),
        (Odd(), "<Odd>"),
        (Odd, "<type>"),
    ],
)
def test_what_is_no_plain_data_is_its_type(value, name):
    """An exception, bytes and objects say only what they are, whatever their ``repr`` would say."""
    assert shown("a", value) == name
    assert shown("a", {"b": [value]}) == {"b": [name]}


@pytest.mark.parametrize(
    "name",
    ["authorization", "Authorization", "api_key", "key", "token", "access_token", "client_secret", "password", "db-password", "credential", "signature", "x_signature", "jwt", "cookie"],
)
def test_a_text_under_a_name_that_sounds_secret_is_hidden(name):
    """The second net: a text is its type there, at any depth; numbers and nothing are shown."""
    assert sounds_secret(name)
    assert shown(name, "hunter2") == "<str>"
    assert shown(name, ["hunter2", {"a": "hunter2"}]) == ["<str>", {"a": "<str>"}]
    assert shown("a", {name: "hunter2", "b": 1}) == {name: "<str>", "b": 1}
    assert shown(name, 5) == 5
    assert shown(name, None) is None


def test_the_id_of_a_key_and_our_own_words_are_shown():
    """What may stand under such a name is an allowed list of two: key ids, and whose count was charged."""
    assert shown("key", "key_0123abcd") == "key_0123abcd"
    assert shown("key", "key_0123 sk-mpp-x") == "<str>"
    assert shown("token_source", "counted") == "counted"
    assert shown("tokens", "many") == "many"


def test_a_field_cannot_take_the_place_of_the_head():
    """A field named like a part of the head stands beside it."""
    assert json.loads(written(at="never"))["at_"] == "never"


def test_lines_carry_the_request_that_caused_them():
    """``request`` stands third: the one a line names, or the one on whose behalf something happens."""
    cause = CAUSE.set("req_cause")
    try:
        assert list(json.loads(written(a=1)).items())[3] == ("request", "req_cause")
        assert json.loads(written(a=1, request="req_own"))["request"] == "req_own"
    finally:
        CAUSE.reset(cause)
    assert "request" not in json.loads(written(a=1))


def test_rooms_have_levels_of_their_own():
    """A room may be told of in full while others are silent, and the other way round."""
    stream = io.StringIO()
    log = make_log(
        clock=ManualClock(), level=Level.WARNING, as_json=True, stream=stream, levels={"channel": Level.DEBUG, "request": Level.ERROR}, always={"worker": 2}
    )
    log("channel.opened", level=Level.DEBUG)
    log("request.refused", level=Level.WARNING)
    log("node.started")
    log("sweep.late", level=Level.WARNING)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line["worker"]) for line in lines] == [("channel.opened", 2), ("sweep.late", 2)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_are_for_terminals_that_want_them():
    """Escapes are ours alone, in terminals alone, and not with NO_COLOR."""
    assert wants_colour(Terminal(), {})
    assert wants_colour(Terminal(), {"NO_COLOR": ""})
    assert not wants_colour(Terminal(), {"NO_COLOR": "1"})
    assert not wants_colour(Terminal(), {"TERM": "dumb"})
    assert not wants_colour(io.StringIO(), {})
    stream = io.StringIO()
    make_log(clock=ManualClock(), level=Level.INFO, as_json=False, stream=stream, colour=True)("x.y", a="\x1b[31m")
    assert stream.getvalue().count("\x1b") == 8
    assert "\\u001b[31m" in stream.getvalue()
