"""``mppnode accounts``, ``keys`` and ``credits``, beside a running node."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mppnode.kernel.keys import KEY_START
from tests.cli.operator import Desk, desk


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk(tmp_path) as made:
        yield made


async def test_an_operator_opens_an_account_and_gives_it_a_key(shop: Desk) -> None:
    """From opening to suspension; a key's text is printed once and only its digest is in the ledger."""
    opened = await shop.run("accounts", "create", "acme", "--email", "a@b.example", "--json")
    assert opened.status == 0, opened.err
    account = opened.records[0]["id"]
    made = await shop.run("keys", "create", "acme", "--name", "ci", "--day-cap", "5.00", "--rpm", "60", "--json")
    assert made.status == 0, made.err
    (key,) = made.records
    assert (key["spend_caps"]["day"], key["rpm"], key["name"]) == (500, 60, "ci")
    assert made.out.count(key["key"]) == 1
    assert made.err == ""
    with sqlite3.connect(shop.folder / "ledger.sqlite") as connection:
        dump = "\n".join(connection.iterdump())
    assert key["key"] not in dump
    assert hashlib.sha256(key["key"].encode()).hexdigest() in dump
    table, rotated, terms = await asyncio.gather(
        shop.run("keys", "list", account),
        shop.run("keys", "rotate", account, key["id"], "--overlap", "0"),
        shop.run("accounts", "terms", account, "postpaid", "--trust-limit", "2.50", "--json"),
    )
    assert KEY_START in table.out
    assert key["key"] not in table.out
    assert rotated.out.count(KEY_START) == 1
    assert terms.records[0]["trust_limit"]["usd"] == "2.500000"
    suspended = await shop.run("accounts", "suspend", "acme", "--json")
    assert suspended.records[0]["suspended_at"] is not None
    shown = await shop.run("accounts", "show", account, "--json")
    assert shown.records[0]["credits"]["available"]["usd"] == "2.500000"


async def test_credit_is_given_once_and_amounts_are_exact(shop: Desk) -> None:
    """A repeated reference books nothing and says so; what is no amount, no account or zero is refused in words."""
    assert (await shop.run("accounts", "create", "acme")).status == 0
    grants = await asyncio.gather(*(shop.run("credits", "grant", "acme", "5.000001", "--reference", "invoice 7", "--json") for _ in range(3)))
    assert [ran.status for ran in grants] == [0, 0, 0]
    assert sorted(ran.records[0]["booked"] for ran in grants) == [False, False, True]
    deducted = await shop.run("credits", "deduct", "acme", "1", "--reference", "back", "--json")
    assert deducted.records[0]["balance"]["usd"] == "4.000001"
    lines = await shop.run("credits", "transactions", "acme")
    assert [line.split()[1:3] for line in lines.out.splitlines()[1:]] == [["grant_reversed", "-1.000000"], ["grant", "5.000001"]]
    refusals = await asyncio.gather(
        shop.run("credits", "grant", "acme", "5,00", "--reference", "x"),
        shop.run("credits", "grant", "acme", "0", "--reference", "x"),
        shop.run("credits", "grant", "nobody", "5", "--reference", "x"),
        shop.run("keys", "create", "acme", "--day-cap", "0.001"),
        shop.run("keys", "revoke", "acme", "key_0"),
    )
    assert [ran.status for ran in refusals] == [2] * 5
    for ran, words in zip(refusals, ("is not an amount", "is zero", "is no account", "is not whole cents", "no such key"), strict=True):
        assert words in ran.err
        assert ran.out == ""
