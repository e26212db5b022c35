"""Requests that reach each reason a bearer can be refused for; ``test_reasons`` runs them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import jwt

from mppnode.accounts.forms import read_operated
from mppnode.config.accounts import AccountsConfig, JwtConfig
from mppnode.config.secrets import Secret
from mppnode.kernel.faults import NodeReason
from tests.support.customers import Customer, customers_of, new_customer
from tests.support.http_client import Reply, World, chat

SHARED = b"a shared signing secret of 36 bytes!"
ACCOUNTS = AccountsConfig(jwt=JwtConfig("https://id.example", "mppnode", secret=Secret(SHARED)))
"""The configuration these requests need."""


def token(world: World, *, secret: bytes = SHARED, lives: int = 600, **claims: Any) -> str:
    """A bearer of the issuer above."""
    made = {"iss": "https://id.example", "aud": "mppnode", "sub": "customer", "exp": world.clock.now() + lives, **claims}
    return "Bearer " + jwt.encode(made, secret, "HS256")


async def _unknown(world: World) -> Reply:
    return await world.send(chat(), "Bearer sk-mpp-" + "A" * 48)


async def _revoked(world: World) -> Reply:
    customer = await new_customer(world)
    await customers_of(world).keyring.revoke(customer.account, customer.key)
    return await customer.send(chat())


async def _rotated(world: World) -> Reply:
    customer = await new_customer(world)
    await customers_of(world).keyring.rotate(customer.account, customer.key, 60)
    assert (await customer.send(chat(stream=False))).status == 200, "both keys work while they overlap"
    world.clock.advance(60)
    return await customer.send(chat())


async def _expired(world: World) -> Reply:
    customer = await new_customer(world, expires_at=world.clock.now() + 60)
    assert (await customer.send(chat(stream=False))).status == 200
    world.clock.advance(60)
    return await customer.send(chat())


async def _forged(world: World) -> Reply:
    return await world.send(chat(), token(world, secret=b"another secret of at least 32 bytes."))


async def _outlived(world: World) -> Reply:
    await new_customer(world)
    bearer = token(world, lives=10)
    assert (await world.send(chat(stream=False), bearer)).status == 200
    world.clock.advance(10 + 30)
    return await world.send(chat(), bearer)


async def _anothers(world: World) -> Reply:
    await new_customer(world)
    return await world.send(chat(), token(world, trusts=["customer"]), headers={"X-Trust": "somebody-else"})


async def _suspended(world: World) -> Reply:
    customer = await new_customer(world)
    assert (await customer.send(chat(stream=False))).status == 200
    await _suspend(customer)
    return await customer.send(chat())


async def _suspend(customer: Customer) -> None:
    await customers_of(customer.world).accounts.change(customer.account, read_operated(b'{"suspended": true}'))


async def _another_model(world: World) -> Reply:
    return await (await new_customer(world, model_pool=["dev/echo"])).send(chat("dev/story"))


async def _too_fast(world: World) -> Reply:
    customer = await new_customer(world, rpm=1)
    await customer.send(chat(stream=False))
    return await customer.send(chat())


async def _capped(world: World) -> Reply:
    return await (await new_customer(world, spend_caps={"day": 0})).send(chat())


async def _broke(world: World) -> Reply:
    return await (await new_customer(world, 0)).send(chat())


async def _running(world: World) -> Reply:
    customer, body, headers = await new_customer(world), chat("dev/story", max_tokens=5), {"Idempotency-Key": "a"}
    gate = world.gate(lent=1)
    async with customer.stream(body, headers=headers) as stream:
        reply = await customer.send(body, headers=headers)
        await gate.release(100)
        await stream.rest()
    return reply


async def _other_body(world: World) -> Reply:
    customer, headers = await new_customer(world), {"Idempotency-Key": "a"}
    await customer.send(chat(stream=False), headers=headers)
    return await customer.send(chat(text="something else"), headers=headers)


async def _twice_rotated(world: World) -> Reply:
    customer = await new_customer(world)
    other = await customer.another_key()
    for _ in range(2):
        reply = await other.send({"overlap_s": 60}, path=f"/v1/keys/{customer.key}/rotate")
    return reply


CASES: dict[NodeReason, Callable[[World], Awaitable[Reply]]] = {
    NodeReason.INVALID_KEY: _unknown,
    NodeReason.KEY_REVOKED: _revoked,
    NodeReason.KEY_ROTATED: _rotated,
    NodeReason.KEY_EXPIRED: _expired,
    NodeReason.INVALID_TOKEN: _forged,
    NodeReason.TOKEN_EXPIRED: _outlived,
    NodeReason.ACCOUNT_FORBIDDEN: _anothers,
    NodeReason.ACCOUNT_SUSPENDED: _suspended,
    NodeReason.MODEL_FORBIDDEN: _another_model,
    NodeReason.LIMIT_REACHED: _too_fast,
    NodeReason.CAP_REACHED: _capped,
    NodeReason.CREDIT_TOO_LOW: _broke,
    NodeReason.REQUEST_RUNNING: _running,
    NodeReason.OTHER_REQUEST: _other_body,
    NodeReason.CONFLICT: _twice_rotated,
}
