"""Log lines: one event, one line, nothing secret, and never a reason for the node to stop."""

import io
import json

import pytest

from mppnode.config.secrets import Secret
from mppnode.kernel.clock import ManualClock
from mppnode.observe.logs import Level, make_log


def lines(as_json=True, level=Level.INFO):
    stream = io.StringIO()
    return make_log(clock=ManualClock(1_900_000_000), level=level, as_json=as_json, stream=stream), stream


def test_a_json_line_has_its_time_level_event_and_fields():
    """One object per line, with the node's own clock."""
    log, stream = lines()
    log("node.started", port=8402)
    assert json.loads(stream.getvalue()) == {
        "at": "2030-03-17T17:46:40.000Z",
        "level": "info",
        "event": "node.started",
        "port": 8402,
    }


def test_levels_below_the_threshold_are_not_written():
    """Debug is silent at info, and errors are not."""
    log, stream = lines(level=Level.WARNING)
    for level in Level:
        log("x", level=level)
    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == ["warning", "error"]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_field_cannot_start_a_line_of_its_own(as_json):
    """Line ends and terminal escapes in a value stay inside the value."""
    log, stream = lines(as_json=as_json)
    log("x", value='a\nforged\r\u2028\x1b[31m" b')
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.isascii()
    assert "\r" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("as_json", [True, False])
def test_a_secret_that_gets_here_says_nothing(as_json):
    """A secret passed by mistake, alone or inside something, is written as a redaction."""
    log, stream = lines(as_json=as_json)
    log("x", key=Secret("sk-canary"), nested={"k": [Secret("sk-canary")]})
    assert "canary" not in stream.getvalue()
    assert "<Secret>" in stream.getvalue()


def test_a_field_of_any_type_is_written():
    """Amounts beyond 64 bits stay exact, and a value JSON does not know is written as text."""
    log, stream = lines()
    log("x", amount=2**96 - 1, odd=object, raw=b"\x00\xff")
    assert json.loads(stream.getvalue())["amount"] == 2**96 - 1


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError])
def test_a_log_that_cannot_be_written_does_not_stop_the_request(error):
    """A full disk or a closed pipe behind the log must not fail a payment that is already booked."""

    class Broken(io.StringIO):
        def write(self, _):
            raise error

    log = make_log(clock=ManualClock(), level=Level.INFO, as_json=True, stream=Broken())
    log("request.ended", charged=1)
