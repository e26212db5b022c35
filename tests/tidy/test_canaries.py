"""The watch for secrets sees what it should: without this, a run without hits would say nothing."""

from __future__ import annotations

import io
import sys

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from channels.faults import ChannelFault, Reason
from mppnode.config.secrets import Secret
from mppnode.http.reception import answer
from mppnode.kernel.clock import ManualClock
from mppnode.kernel.keys import new_key
from mppnode.observe.exposition import Page
from mppnode.observe.logs import Level, make_log
from tests.support.canaries import SHAPES, Watch
from tests.support.http_client import LogLines

VALUE = "a-secret-of-this-test-0123456789"


@pytest.fixture
def watch(request: pytest.FixtureRequest) -> Watch:
    """The watch of this process, cleaned of what the test makes it hear."""
    (found,) = (value for value in request.config.stash._storage.values() if isinstance(value, Watch))
    yield found  # type: ignore[misc]  # a fixture
    found.begin()


@pytest.mark.parametrize("value", [VALUE, VALUE.encode(), bytes(range(200, 232))])
def test_a_secret_in_a_line_of_the_log_is_found(watch: Watch, value: str | bytes) -> None:
    """Text, bytes that are text, and bytes in hex, in a field with a harmless name."""
    Secret(value)
    shown = value if isinstance(value, str) else value.hex()
    make_log(clock=ManualClock(), level=Level.INFO, as_json=True, stream=io.StringIO())("node.started", url=shown)
    assert watch.hits([]) == ["a secret's value is in the log"]


def test_a_secret_a_double_of_the_log_hears_is_found(watch: Watch) -> None:
    """What the second net would hide is found all the same: nobody may rely on it."""
    log, made = LogLines(), new_key(lambda size: bytes(range(size)))
    log("node.started", key=made.text)
    assert watch.hits([]) == ["a secret's value is in a log line", "something shaped like a secret is in a log line"]


def test_a_secret_in_a_fault_and_in_an_error_is_found(watch: Watch) -> None:
    """Words of a refusal, and the body that shows it; the answer that shows a new key is none."""
    Secret(VALUE)
    assert VALUE in str(ChannelFault(Reason.INVALID_CHALLENGE, detail=VALUE))
    answer({"key": VALUE})
    assert watch.hits([]) == ["a secret's value is in a fault"]
    answer({"key": VALUE}, status=400)
    assert watch.hits([]) == ["a secret's value is in a fault", "a secret's value is in the body of an error"]
    watch.out.clear()
    web.Response(status=400, text=VALUE)  # by a test: providers are hostile on purpose
    assert watch.hits([]) == []


def test_a_secret_in_what_pytest_captured_is_found(watch: Watch) -> None:
    """Its value; a shape alone may be what a command line tool is there to show."""
    Secret(VALUE)
    assert watch.hits([("captured stderr", f"x{VALUE}y")]) == ["a secret's value is in captured stderr"]
    assert watch.hits([("captured stdout", "sk-mpp-" + "A" * 48)]) == []


async def test_a_secret_on_a_childs_standard_error_is_found(watch: Watch) -> None:
    """Nodes that run as processes are heard as well."""
    import asyncio

    Secret(VALUE)
    script = f"import sys; print({VALUE!r}, file=sys.stderr)"
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=asyncio.subprocess.PIPE)
    await child.communicate()
    assert watch.hits([]) == ["a secret's value is in a child's standard error"]


def test_pages_of_metrics_are_heard(watch: Watch) -> None:
    """Every page that is rendered is searched."""
    from mppnode.observe import exposition

    page = exposition.render(CollectorRegistry())
    assert isinstance(page, Page)
    assert [where for where, _ in watch.out] == ["the metrics"]


@pytest.mark.parametrize(
    "text",
    [
        "sk-mpp-" + "A" * 48,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl",
        "sk_" + "test_0123456789abcdef",
        "whsec_0123456789abcdef",
        "Payment eyJjaGFsbGVuZ2UiOnsi",
        "0x" + "ab" * 64 + "1b",
    ],
)
def test_shapes_of_secrets_are_known(text: str) -> None:
    """Whoever made it, a key, a token or a signature is one by its shape."""
    assert SHAPES.search(f"before {text} after")


@pytest.mark.parametrize("text", ["0x" + "ab" * 32, "key_0123456789abcdef", "sk-mpp-", "whsec_", "req_" + "0" * 24])
def test_ids_are_no_secrets(text: str) -> None:
    """Hashes, channels and the ids of keys and requests may be shown."""
    assert SHAPES.search(f"before {text} after") is None
