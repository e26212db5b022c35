"""The development network as a person uses it: start it, do what it says, stop it."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT)}
MPPNODE = [sys.executable, "-m", "mppnode.cli.main"]


@pytest.fixture
async def said() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        *MPPNODE, "devnet", "--port", "0", "--tokens-per-second", "2000", env=ENVIRON, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    text = ""
    async with asyncio.timeout(30):
        while "Ctrl-C" not in text:
            text += (await process.stdout.readline()).decode()
    yield process, text
    if process.returncode is None:
        process.kill()
        await process.wait()


async def test_it_says_what_to_type_and_that_works(said: tuple[asyncio.subprocess.Process, str]) -> None:
    """The command that `devnet` prints pays for a stream, closes the channel and names the transaction."""
    process, text = said
    assert "NOT REAL MONEY" in text
    command = text[text.index("MPPNODE_PAYER_KEY=") :].replace("\\\n", " ").splitlines()[0]
    assignment, *words = shlex.split(command)
    name, _, key = assignment.partition("=")
    assert words[0] == "mppnode"
    pay = await asyncio.create_subprocess_exec(
        *MPPNODE, *words[1:], env={**ENVIRON, name: key}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(pay.communicate(), 30)
    assert pay.returncode == 0, err.decode()
    assert len(out.decode().split()) > 100
    assert re.search(r"paid 0\.\d{6} USD in transaction 0x[0-9a-f]{64}", err.decode())
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_an_unpaid_request_is_told_the_price(said: tuple[asyncio.subprocess.Process, str]) -> None:
    """The `curl` it prints is answered with 402 and a challenge."""
    _, text = said
    url = re.search(r"curl -i (\S+)", text)
    assert url is not None
    async with aiohttp.ClientSession() as http, http.post(url[1], json={"model": "dev/story", "messages": [{"role": "user", "content": "hello"}]}) as answer:
        assert answer.status == 402
        assert answer.headers["WWW-Authenticate"].startswith("Payment ")
        assert "USD per million tokens" in answer.headers["WWW-Authenticate"]


async def test_the_api_key_it_prints_buys_an_answer(said: tuple[asyncio.subprocess.Process, str]) -> None:
    """The second `curl` it prints streams, and the key's account has paid for it."""
    _, text = said
    url, bearer = re.search(r"curl -N (\S+)", text), re.search(r"authorization: (Bearer sk-mpp-\S+)'", text)
    assert url is not None
    assert bearer is not None
    headers, body = {"Authorization": bearer[1]}, {"model": "dev/story", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.post(url[1], json=body) as answer:
            assert (answer.status, (await answer.text()).rstrip()[-6:]) == (200, "[DONE]")
        async with http.get(url[1].replace("chat/completions", "credits")) as answer:
            assert 0 < 10**13 - int((await answer.json())["balance"]["pico_usd"]) < 10**9


async def test_pay_without_a_key_says_which_variable() -> None:
    """A missing or broken key is one clear line, and nothing is sent."""
    pay = await asyncio.create_subprocess_exec(
        *MPPNODE, "pay", "http://127.0.0.1:1/v1/chat/completions", "hi", "--rpc", "http://127.0.0.1:1", "--chain", "1", "--model", "m",
        env={name: value for name, value in ENVIRON.items() if name != "MPPNODE_PAYER_KEY"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await asyncio.wait_for(pay.communicate(), 30)
    assert pay.returncode == 2
    assert "MPPNODE_PAYER_KEY" in err.decode()
