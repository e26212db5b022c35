"""`mppnode devnet --host`: a development network inside a container, reached through published ports."""

from __future__ import annotations

import asyncio
import re
import sys

import aiohttp

from channels.wire.headers import parse_challenges
from mppnode.cli.devnet import Devnet, DevnetOptions
from tests.support.http_client import chat


async def test_a_network_that_listens_everywhere_is_called_by_the_name_its_clients_use() -> None:
    """A wildcard address appears in no URL and in no challenge: a client could ask for neither."""
    async with Devnet(DevnetOptions(listen="0.0.0.0", tokens_per_second=0.0)) as net, aiohttp.ClientSession() as http:
        assert net.node.url.startswith("http://0.0.0.0:")
        assert net.chain_url.startswith("http://127.0.0.1:")
        assert net.provider.url.startswith("http://127.0.0.1:")  # nobody outside has business with it
        assert "0.0.0.0" not in net.describe(await net.new_customer())
        async with http.post(net.chat_url, json=chat()) as response:
            assert response.status == 402
            challenges = parse_challenges([response.headers["WWW-Authenticate"]])
        assert {challenge.realm for challenge in challenges} == {"127.0.0.1"}


async def test_the_command_listens_where_it_is_told_and_prints_what_works() -> None:
    """``--host``, ``--port`` and ``--chain-port`` reach the network; the URL it prints answers; SIGTERM ends it with 0."""
    command = (sys.executable, "-m", "mppnode.cli.main", "devnet", "--host", "0.0.0.0", "--port", "0", "--chain-port", "0")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30), aiohttp.ClientSession() as http:
            said = ""
            while "Ctrl-C" not in said:
                line = (await process.stdout.readline()).decode()
                assert line, said
                said += line
            found = re.search(r"node +(http://127\.0\.0\.1:\d+)", said)
            assert found is not None, said
            for path in ("/v1/models", "/healthz"):  # the second is what the image's health check asks
                async with http.get(found[1] + path) as response:
                    assert response.status == 200
    finally:
        process.terminate()
        status = await process.wait()
    assert status == 0
