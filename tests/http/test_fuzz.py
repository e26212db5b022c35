"""Three hundred bent requests: none is a 500, none costs anybody anything (R8, P11, P15, P18, P33)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from channels.wire import base64url
from tests.support.http_client import DEPOSIT, UNIT, Channel, World, chat, new_world, opened_json, sealed_json

QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TOKEN = st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), max_size=40)
VALUE = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=80)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["0x", "0x" + "00" * 32, "-1", "1e9", "99999999999999999999999999999", "voucher", "open", "close"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
NOT_500 = {204, 400, 402, 404, 405, 409, 410, 413, 415, 429, 200}


class Rig:
    """One network for all examples, and the credentials that are bent."""

    def __init__(self, runner: asyncio.Runner, world: World) -> None:
        self.runner = runner
        self.world = world
        self.channel: Channel = runner.run(world.opened())
        payer, channel = world.payer, self.channel
        payloads = [
            payer.voucher(channel, 2 * UNIT),
            payer.close(channel, 2 * UNIT),
            payer.top_up(channel, 1_000),
            payer.open(payer.channel()),
        ]
        self.documents = [opened_json(runner.run(world.pay(payload))) for payload in payloads]

    def harmless(self, body: object, credential: str | None, **more: Any) -> None:
        """Send it: no mistake of ours, and unless it was accepted as good, nothing has changed."""

        async def run() -> None:
            before = await self.world.state()
            self.world.clock.advance(0.1)  # one more voucher check is allowed, and no challenge or transaction expires
            reply = await self.world.send(body, credential, **more)
            assert reply.status in NOT_500, (reply.status, reply.body, credential)
            assert self.world.log.bugs == []
            if reply.status >= 400:
                assert await self.world.state() == before
                assert reply.receipt is None
            else:
                assert credential is not None

        self.runner.run(run())


@pytest.fixture
def rig() -> Iterator[Rig]:
    with asyncio.Runner() as runner:
        manager = new_world()
        world = runner.run(manager.__aenter__())
        try:
            yield Rig(runner, world)
        finally:
            runner.run(manager.__aexit__(None, None, None))


def paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every member of a document by its path."""
    found = []
    for name, member in value.items():
        found.append((*prefix, name))
        if isinstance(member, dict):
            found += paths(member, (*prefix, name))
    return found


@QUICK
@given(data=st.data())
def test_bent_credentials(rig: Rig, data: st.DataObject) -> None:
    """Any member of any credential replaced by any JSON, dropped or doubled: refused or equal, never a mistake."""
    document = json.loads(json.dumps(data.draw(st.sampled_from(rig.documents))))
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, name = data.draw(st.sampled_from(paths(document)))
        place = document
        for parent in parents:
            place = place[parent]
        if data.draw(st.booleans()):
            place[name] = data.draw(JSON)
        elif data.draw(st.booleans()):
            place.pop(name)
        else:
            text = str(place[name])
            at = data.draw(st.integers(0, max(len(text) - 1, 0)))
            place[name] = text[:at] + data.draw(st.sampled_from('0aZ|"\\ \u00e9_-')) + text[at + 1 :]
    body = data.draw(st.sampled_from([None, chat(), chat(stream=False)]))
    with contextlib.suppress(UnicodeEncodeError):
        rig.harmless(body, sealed_json(document))


@QUICK
@given(
    scheme=st.sampled_from(["Payment ", "payment\t", "Payment", 'Payment id="', "Bearer x, Payment ", ", Payment "]),
    token=TOKEN | VALUE | st.binary(max_size=60).map(base64url.encode),
    more=VALUE,
)
def test_bent_headers(rig: Rig, scheme: str, token: str, more: str) -> None:
    """Any text in the Authorization header, with or without the scheme: 402 or 400, never a mistake."""
    rig.harmless(None, f"{scheme}{token}")
    rig.harmless(None, more, headers={"Payment-Authorization": token.strip()})


@QUICK
@given(data=st.data())
def test_bent_bodies(rig: Rig, data: st.DataObject) -> None:
    """Any JSON in any member of a chat request, or bytes that are none: refused for what it is, never a mistake."""
    raw = data.draw(st.none() | st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
    if raw is None:
        names = ["model", "messages", "stream", "stop", "n", "tools", "max_tokens", "stream_options", "response_format"]
        body: dict[str, Any] = chat()
        body[data.draw(st.sampled_from(names))] = data.draw(JSON)
        if data.draw(st.booleans()):
            body["messages"] = [{"role": data.draw(st.sampled_from(["user", "assistant", "tool", 5])), "content": data.draw(JSON), "tool_calls": data.draw(JSON)}]
        raw = json.dumps(body).encode()
    rig.harmless(raw, None)
    rig.harmless(raw, data.draw(st.sampled_from([None, "Payment x", "Payment e30"])))


def test_after_all_that_the_channel_still_pays(rig: Rig) -> None:
    """The channel whose credentials are bent above is an ordinary one: its good credential works."""
    world = rig.world
    reply = rig.runner.run(world.send(None, sealed_json(rig.documents[0])))
    assert reply.status == 204
    assert rig.runner.run(world.account(rig.channel)).chain.deposit == DEPOSIT


ROUTING = (
    "model", "models", "provider", "routing", "routing_strategy", "allow_external", "prompt_cache_key", "tools", "logprobs",
    "max_input_price_per_million", "max_output_price_per_million", "response_format", "n", "stream_options", "messages",
)  # fmt: skip
NAMES = st.sampled_from(["auto", "dev/story", "dev/story:floor", "dev/story:nitro", "dev/echo", "x", "", "a:b:floor", ":nitro"])
PROVIDER = st.fixed_dictionaries(
    {},
    optional={
        "order": st.lists(NAMES | JSON, max_size=3) | JSON,
        "only": st.lists(st.sampled_from(["dev", "x"]), max_size=2) | JSON,
        "sort": st.sampled_from(["price", "throughput", "latency"]) | JSON,
        "max_price": st.dictionaries(st.sampled_from(["prompt", "completion", "x"]), JSON, max_size=2) | JSON,
        "allow_fallbacks": JSON,
    },
)


@QUICK
@given(data=st.data())
def test_bent_routing(rig: Rig, data: st.DataObject) -> None:
    """Routing fields of every kind, for a quote and for a price: an answer or a refusal, never a mistake."""
    body = chat(data.draw(NAMES), max_tokens=5)
    for name in data.draw(st.lists(st.sampled_from(ROUTING), max_size=3, unique=True)):
        value = {"model": NAMES, "models": st.lists(NAMES, max_size=4), "provider": PROVIDER}.get(name, JSON)
        body[name] = data.draw(value | JSON)

    async def run() -> None:
        world = rig.world
        before = await world.state()
        try:
            sent = json.dumps(body, allow_nan=True).encode()
        except UnicodeEncodeError:
            return
        offer = await world.send(sent, None, path="/v1/quote")
        price = await world.send(sent, None)
        assert offer.status in {200, 400, 404, 503}, (offer.status, offer.body)
        assert price.status in {400, 402, 404, 503}, (price.status, price.body)
        # What can be quoted can be bought, and what cannot is refused for the same reason.
        assert (offer.status == 200) == (price.status == 402), (offer.body, price.body)
        if offer.status != 200:
            assert (offer.status, offer.code) == (price.status, price.code)
        assert world.log.bugs == []
        assert await world.state() == before

    rig.runner.run(run())


@QUICK
@given(name=st.text(max_size=60), health=st.booleans())
def test_bent_model_names_in_paths(rig: Rig, name: str, health: bool) -> None:
    """Any name in the path of a model, with slashes or percent signs: found, or not found."""
    path = "/v1/models/" + quote(name, safe="/") + ("/health" if health else "")

    async def run() -> None:
        reply = await rig.world.send(None, None, method="GET", path=path)
        assert reply.status in {200, 404, 400}, (path, reply.status, reply.body)
        assert rig.world.log.bugs == []

    rig.runner.run(run())
