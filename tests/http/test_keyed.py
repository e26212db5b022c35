"""API keys on the chat route: what a key buys, what it costs to the unit, and every way it can be refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from channels.faults import ChannelFault, Reason
from mppnode.accounts.model import Postpaid
from mppnode.cli.devnet import DevnetOptions
from mppnode.config.accounts import AccountsConfig
from mppnode.ledger.credits import Credits
from tests.support.customers import DOLLAR, Customer, customers_of, new_customer
from tests.support.http_client import World, chat, cost, new_world

PROMPT_PICO = cost(0, 1)
"""Of the default text: one token is what its provider reports for it at the least."""


async def agree(customer: Customer) -> int:
    """The account, its requests and its statement say the same; returns what was charged."""
    await customer.world.settled()
    credit, rows, lines = await customer.credit(), await customer.requests(), await customer.entries()
    assert not credit.holds
    assert sum(row.cost for row in rows) == credit.owed
    assert sum(line.amount for line in lines) == credit.balance
    assert credit.spending.get(customer.key) is None or sum(s.spent_total for s in credit.spending.values()) == credit.owed
    return credit.owed


async def test_a_key_buys_a_whole_answer_at_its_exact_price(world: World) -> None:
    """Reserved at its worst case, charged by its usage, recorded with its bill; no payment words on the way."""
    customer = await new_customer(world)
    reply = await customer.send(chat(stream=False, max_tokens=50))
    assert reply.status == 200
    usage = reply.json["usage"]
    assert not {"Payment-Receipt", "WWW-Authenticate"} & set(reply.headers)
    charged = await agree(customer)
    assert charged == round(float(usage["cost"]) * 10**12)
    (row,) = await customer.requests()
    assert (row.id, row.model, row.provider) == (reply.headers["X-Request-Id"], "dev/echo", "dev")
    assert (row.prompt, row.completion) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert json.loads(row.document)["ending"] == "complete"


async def test_a_key_buys_a_stream_without_payment_events(world: World) -> None:
    """Deltas, usage and [DONE], as stock SDKs read them; nothing of channels in between."""
    customer = await new_customer(world)
    async with customer.stream(chat("dev/story", max_tokens=40)) as stream:
        await stream.rest()
    assert {event.event for event in stream.events} == {"message"}
    assert stream.events[-1].data == "[DONE]"
    assert stream.text_chunks == 40
    assert await agree(customer) == cost(40, stream.usage["prompt_tokens"])


async def test_leaving_a_stream_costs_what_was_delivered(world: World) -> None:
    """A cancelled stream is billed exactly, in the ledger and on the statement; the hold is gone."""
    customer = await new_customer(world)
    gate = world.gate(lent=10)
    async with customer.stream(chat("dev/story", max_tokens=500)) as stream:
        await stream.tokens(10)
        stream.response.close()
    await gate.release(5)
    await world.eventually(lambda: world.net.provider.live == 0)
    charged = await agree(customer)
    assert cost(10, 1) <= charged <= cost(11, 10)
    (row,) = await customer.requests()
    assert json.loads(row.document)["ending"] == "disconnected"


async def test_p43_an_answer_that_is_not_affordable_is_refused_with_what_is(world: World) -> None:
    """P-43, need 15: a stated max_tokens beyond the credit is 402 with the number that would do; that number works."""
    customer = await new_customer(world, cost(120, 0))
    refused = await customer.send(chat("dev/story", max_tokens=1_000))
    assert (refused.status, refused.code, refused.field) == (402, "insufficient_credit", "max_tokens")
    assert refused.headers["x-should-retry"] == "false"
    affordable = refused.json["error"]["affordable_max_tokens"]
    assert 0 < affordable < 120
    assert refused.json["error"]["top_up_url"] is None
    assert (await customer.credit()).holds == {}
    again = await customer.send(chat("dev/story", max_tokens=affordable, stream=False))
    assert again.status == 200
    beyond = await customer.send(chat("dev/story", max_tokens=affordable + 1, stream=False))
    assert beyond.status == 402
    await agree(customer)


@pytest.mark.parametrize("stream", [True, False])
async def test_p43_an_answer_without_a_limit_is_as_long_as_the_credit(world: World, stream: bool) -> None:
    """P-43: whoever names no max_tokens gets what there is money for, ended by ``length`` as SDKs know it."""
    customer = await new_customer(world, cost(60, 0))
    reply = await customer.send(chat("dev/never-ends" if stream else "dev/story", stream=stream))
    assert reply.status == 200
    charged = await agree(customer)
    assert cost(30, 0) < charged <= cost(60, 0)
    if stream:
        assert b'"finish_reason":"length"' in reply.body.replace(b" ", b"")
    assert (await customer.send(chat())).status in (200, 402)


async def test_the_top_up_link_is_shown_to_who_has_nothing_left() -> None:
    """402 with no token affordable: the link says where credit is bought."""
    options = DevnetOptions(tokens_per_second=0.0, accounts=AccountsConfig(top_up_url="https://shop.example/credit"))
    async with new_world(options) as world:
        customer = await new_customer(world, 0)
        error = (await customer.send(chat())).json["error"]
        assert (error["code"], error["affordable_max_tokens"]) == ("insufficient_credit", 0)
        assert error["top_up_url"] == "https://shop.example/credit"


@pytest.mark.parametrize("many", [50, 500])
async def test_k3_p41_parallel_requests_spend_at_most_the_cap(world: World, many: int) -> None:
    """K3, P-41: through the whole node, a cap for ten requests serves ten of so many, and not a unit more."""
    prompt = 7  # bytes of the text: the most tokens it could have
    cap = 10 * cost(20, prompt)
    customer = await new_customer(world, spend_caps={"total": -(-cap // 10**10)})
    cap = -(-cap // 10**10) * 10**10
    body = chat("dev/story", "x" * 3, max_tokens=20, stream=False)
    replies = await asyncio.gather(*(customer.send(body) for _ in range(many)))
    assert {reply.status for reply in replies} <= {200, 403}
    assert {reply.code for reply in replies if reply.status == 403} == {"cap_reached"}
    assert any(reply.status == 200 for reply in replies)
    charged = await agree(customer)
    assert charged <= cap
    error = next(reply for reply in replies if reply.status == 403).json["error"]
    assert (error["window"], error["resets_in_s"]) == ("total", None)


async def test_p67_a_revoked_key_fails_on_its_next_request(world: World) -> None:
    """P-67: remembered from a moment ago or not, the reservation itself refuses it; other keys go on."""
    customer = await new_customer(world)
    other = await customer.another_key()
    assert (await customer.send(chat(stream=False))).status == 200
    # As another node would: its own handle on the ledger, and nothing tells this one.
    elsewhere = customers_of(world)
    await elsewhere.keyring.revoke(customer.account, customer.key)
    refused = await customer.send(chat(stream=False))
    assert (refused.status, refused.code) == (403, "api_key_revoked")
    assert (await other.send(chat(stream=False))).status == 200


async def test_p67_a_warm_key_asks_the_ledger_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """P-67: the second request of a key looks nothing up: one transaction to hold, one to settle."""
    customer = await new_customer(world)
    assert (await customer.send(chat(stream=False))).status == 200
    asked: list[str] = []
    ledger: Any = world.net.node.ledger
    for name in ("read", "write"):
        inner = getattr(ledger, name)

        def counted(*args: Any, _inner: Any = inner, _name: str = name, **more: Any) -> Any:
            asked.append(_name)
            return _inner(*args, **more)

        monkeypatch.setattr(ledger, name, counted)
    assert (await customer.send(chat(stream=False))).status == 200
    assert asked == ["write", "write"]


async def test_an_outage_of_the_ledger_is_503(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage is never told as an unknown key, nor as no credit."""
    customer = await new_customer(world)

    async def away(*_: Any, **__: Any) -> Any:
        raise ChannelFault(Reason.STORE_UNAVAILABLE, detail="the ledger is not available")

    for name in ("read", "transact"):
        with monkeypatch.context() as patch:
            patch.setattr(Credits, name, away)
            reply = await customer.send(chat())
        assert (reply.status, reply.code) == (503, "store_unavailable")
        assert "Retry-After" in reply.headers
        assert (await customer.send(chat(stream=False))).status == 200


async def test_rate_limits_are_openais_headers(world: World) -> None:
    """Limit, rest and reset on every answer; the request too many is 429 with the time to wait, and takes nothing."""
    customer = await new_customer(world, rpm=2, tpm=100_000)
    first = await customer.send(chat(stream=False, max_tokens=10))
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    async with customer.stream(chat(max_tokens=10)) as stream:
        assert stream.response.headers["x-ratelimit-remaining-requests"] == "0"
        await stream.rest()
    refused = await customer.send(chat())
    assert (refused.status, refused.code) == (429, "limit_reached")
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    world.clock.advance(int(refused.headers["Retry-After"]))
    assert (await customer.send(chat(stream=False))).status == 200
    tokens = int((await customer.send(chat(stream=False, max_tokens=99_000))).headers["x-ratelimit-remaining-tokens"])
    assert tokens < 100_000
    await agree(customer)


async def test_a_request_beyond_any_minute_is_not_worth_a_retry(world: World) -> None:
    """More tokens than the limit ever allows: ``x-should-retry: false`` and no time to wait."""
    customer = await new_customer(world, tpm=100)
    refused = await customer.send(chat(max_tokens=500))
    assert (refused.status, refused.headers["x-should-retry"]) == (429, "false")
    assert "Retry-After" not in refused.headers
    assert (await customer.send(chat(stream=False))).status == 200, "without a number it is made to fit"


async def test_requests_at_once_are_bounded(world: World) -> None:
    """Concurrency counts live holds: the second of two is refused while the first runs, and served after it."""
    customer = await new_customer(world, concurrency=1)
    gate = world.gate(lent=3)
    async with customer.stream(chat("dev/story", max_tokens=10)) as stream:
        await stream.tokens(3)
        refused = await customer.send(chat())
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        await gate.release(100)
        await stream.rest()
    await world.settled()
    world.net.provider.gate = None
    assert (await customer.send(chat(stream=False))).status == 200


async def test_a_key_is_held_to_its_models_and_its_ceiling(world: World) -> None:
    """A model outside the pool is 403; a ceiling of the key holds although the request names none."""
    customer = await new_customer(world, model_pool=["dev/echo"])
    refused = await customer.send(chat("dev/story"))
    assert (refused.status, refused.code, refused.field) == (403, "model_forbidden", "model")
    assert (await customer.send(chat(stream=False))).status == 200
    cheap = await customer.another_key(max_input_price_per_million=1, max_output_price_per_million=1)
    nobody = await cheap.send(chat())
    assert (nobody.status, nobody.code) == (503, "no_provider")
    assert nobody.json["error"]["excluded_by"] == {"max_price": 1}


async def test_auto_chooses_from_the_pool_of_the_key(world: World) -> None:
    """Seed 002: with ``model: auto`` the key's pool is all there is, and a pool in the request cannot widen it."""
    customer = await new_customer(world, model_pool=["dev/echo"], optimize_mode="cost")
    reply = await customer.send(chat("auto", stream=False))
    assert (reply.status, reply.headers["X-Model"]) == (200, "dev/echo")
    wider = await customer.send(chat("auto", routing={"model_pool": ["dev/story"]}))
    assert (wider.status, wider.field) == (403, "routing.model_pool")


async def test_a_postpaid_account_spends_up_to_its_trust_limit(world: World) -> None:
    """Post-paid: served without funds as far as it is trusted, and 402 beyond."""
    customer = await new_customer(world, 0, terms=Postpaid(cost(100, 0)))  # type: ignore[arg-type]
    assert (await customer.send(chat("dev/story", max_tokens=80, stream=False))).status == 200
    assert (await customer.send(chat("dev/story", max_tokens=80, stream=False))).status == 402
    assert (await customer.credit()).balance < 0
    await agree(customer)


async def test_a_crashed_stream_is_charged_what_was_recorded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stream has delivered is folded a window at a time; a sweep charges that, and the statement shows it."""
    customer = await new_customer(world)
    gate = world.gate(lent=600)
    async with customer.stream(chat("dev/never-ends", max_tokens=5_000)) as stream:
        await stream.tokens(600)

        async def recorded() -> int:
            (hold,) = (await customer.credit()).holds.values()
            return hold.consumed

        async with asyncio.timeout(3):
            while not (consumed := await recorded()):
                await asyncio.sleep(0.001)
        window = 2_000 * 10**6
        assert cost(600, 1) - consumed <= window
        # The life of this process is given up for dead by another node.
        customers = customers_of(world)
        monkeypatch.setattr(customers.sweeper._ledger, "living", _nobody)
        assert await customers.sweeper.sweep() == 1
        await gate.release(1_000)
        await stream.rest()
    assert await agree(customer) == consumed
    (row,) = await customer.requests()
    assert (row.model, json.loads(row.document)["ending"]) == ("dev/never-ends", "crashed")


async def _nobody() -> frozenset[str]:
    return frozenset()


async def test_k11_what_a_caller_makes_up_reaches_no_log_and_no_record(world: World) -> None:
    """K11: users, metadata, model names and header values of a stranger's choice are in no log line and in no row."""
    customer, made_up = await new_customer(world), [f"invented-{number}" for number in range(50)]
    for name in made_up:
        unknown = await customer.send(chat(f"dev/{name}", user=name, metadata={"a": name}), headers={"X-Request-Id": name})
        assert unknown.status == 404
        served = await customer.send(
            chat(stream=False, user=name, metadata={name: name}), headers={"X-Request-Id": name, "Idempotency-Key": name}
        )
        assert served.status == 200
        assert served.headers["X-Request-Id"] != name
    await agree(customer)
    told = repr(world.log.lines) + repr(await customer.requests()) + repr(await customer.credit())
    assert not [name for name in made_up if name in told]


# --------------------------------------------------------------------------------------------------- Idempotency-Key

KEY = {"Idempotency-Key": "order-17"}


@pytest.mark.parametrize("stream", [True, False])
async def test_p24_a_repeat_gets_the_first_answer(world: World, stream: bool) -> None:
    """P-24: the same key and body: the same bytes, charged once, and marked as a repeat."""
    customer = await new_customer(world)
    body = chat("dev/story", max_tokens=20, stream=stream)
    first = await customer.send(body, headers=KEY)
    charged = await agree(customer)
    again = await customer.send(body, headers=KEY)
    assert (again.status, again.headers["Idempotent-Replayed"]) == (200, "true")
    assert again.body.removeprefix(b": stream\n\n") == first.body.removeprefix(b": stream\n\n")
    assert again.headers["Content-Type"] == first.headers["Content-Type"]
    assert again.headers["X-Provider"] == first.headers["X-Provider"]
    assert await agree(customer) == charged
    assert world.net.provider.requests == 1


async def test_p24_a_key_is_for_one_request(world: World) -> None:
    """P-24: with another body it is 422, while the first runs it is 409, and somebody else's key is not ours."""
    customer, stranger = await new_customer(world), await new_customer(world, trust="another")
    gate = world.gate(lent=2)
    body = chat("dev/story", max_tokens=10)
    async with customer.stream(body, headers=KEY) as stream:
        await stream.tokens(2)
        running = await customer.send(body, headers=KEY)
        assert (running.status, running.code) == (409, "request_in_progress")
        assert running.headers["x-should-retry"] == "false"
        await gate.release(100)
        await stream.rest()
    await world.settled()
    world.net.provider.gate = None
    other = await customer.send(chat("dev/story", max_tokens=11), headers=KEY)
    assert (other.status, other.code) == (422, "idempotency_mismatch")
    assert "Idempotent-Replayed" not in (await stranger.send(body, headers=KEY)).headers
    for bad in ("", "x" * 256, "two words"):
        refused = await customer.send(body, headers={"Idempotency-Key": bad})
        assert (refused.status, refused.field) == (400, "Idempotency-Key")


async def test_p24_what_was_refused_or_broke_off_is_tried_again(world: World) -> None:
    """A refusal keeps nothing, and neither does an answer that broke off: the repeat is a first try."""
    customer = await new_customer(world, 0)
    assert (await customer.send(chat("dev/story", max_tokens=10), headers=KEY)).status == 402
    await customer.grant(DOLLAR, "later")
    gate = world.gate(lent=5)
    async with customer.stream(chat("dev/story", max_tokens=10), headers=KEY) as stream:
        await stream.tokens(5)
        stream.response.close()
    await gate.release(100)
    await world.settled()
    world.net.provider.gate = None
    reply = await customer.send(chat("dev/story", max_tokens=10), headers=KEY)
    assert (reply.status, "Idempotent-Replayed" in reply.headers) == (200, False)
    await agree(customer)


@pytest.mark.parametrize("stream", [True, False])
async def test_p24_p32_a_channels_repeat_is_answered_with_a_receipt(world: World, stream: bool) -> None:
    """P-24, P32: on the session rail too: the repeat of a paid request gets its answer and a receipt, and costs nothing."""
    body, channel = chat("dev/story", max_tokens=20, stream=stream), world.payer.channel()
    credential = await world.pay(world.payer.open(channel), body)
    first = await world.send(body, credential, headers=KEY)
    assert first.status == 200
    await world.settled()
    owed = (await world.account(channel)).owed_pico
    again = await world.send(body, credential, headers=KEY)
    assert (again.status, again.headers["Idempotent-Replayed"]) == (200, "true")
    assert again.receipt is not None
    assert again.receipt.spent == (await world.account(channel)).spent
    assert (await world.account(channel)).owed_pico == owed
    assert b"payment-receipt" in again.body or not stream
    assert world.net.provider.requests == 1


async def test_p24_an_answer_is_kept_before_its_bill(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the two leaves an answer without a charge, never a charge whose repeat is charged again."""
    customer = await new_customer(world)
    body, order = chat("dev/story", max_tokens=5, stream=False), []
    write, transact = Credits.write, Credits.transact

    async def writing(self: Credits, talk: Any, *, of: str) -> Any:
        order.append("kept")
        return await write(self, talk, of=of)

    async def transacting(self: Credits, account: Any, step: Any) -> Any:
        order.append("money")
        return await transact(self, account, step)

    monkeypatch.setattr(Credits, "write", writing)
    monkeypatch.setattr(Credits, "transact", transacting)
    assert (await customer.send(body, headers=KEY)).status == 200
    assert order == ["kept", "money", "kept", "money"], "claimed, held, stored, charged"
