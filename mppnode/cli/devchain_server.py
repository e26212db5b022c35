"""Serves the development chain over HTTP.

DEVELOPMENT ONLY: whoever reaches the port can mint money and move time.
"""

from __future__ import annotations

from aiohttp import web

from mppnode.chain.devchain import DevChain

_BODY_MAX = 1_048_576


async def start_devchain(chain: DevChain, host: str, port: int) -> tuple[web.AppRunner, str]:
    """Listen on ``host:port`` (port 0 picks one) and return the runner, which the caller cleans up, and the URL."""

    async def answer(request: web.Request) -> web.Response:
        reply = chain.handle_http_body(await request.read())
        # Browser wallets are part of development too; a development chain has nothing to protect.
        headers = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "content-type"}
        return web.Response(body=reply, content_type="application/json", headers=headers)

    async def preflight(_request: web.Request) -> web.Response:
        headers = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "content-type"}
        return web.Response(status=204, headers=headers)

    app = web.Application(client_max_size=_BODY_MAX)
    app.router.add_post("/", answer)
    app.router.add_route("OPTIONS", "/", preflight)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    bound: int = runner.addresses[0][1]
    return runner, f"http://{host}:{bound}"
