"""The fault boundary around every route: no exception becomes an aiohttp page, and no caller can cause a 500."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware

from channels.faults import ChannelFault, Reason
from mppnode.http.problem import STATUS, error_body, problem_body, retry_headers
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.observe.logs import CAUSE, Level, Log

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_BY_STATUS = {
    404: NodeFault(NodeReason.NOT_FOUND, detail="there is no such route"),
    405: NodeFault(NodeReason.METHOD_NOT_ALLOWED, detail="this route does not take that method"),
    413: NodeFault(NodeReason.BODY_TOO_LARGE, detail="the body is too large"),
}
_BAD_REQUEST = 400
_INTERNAL = 500
_RAILS: Final = {"payment": "session", "bearer": "credit"}


REQUEST_ID: Final = web.RequestKey("request_id", str)
REFUSED: Final = web.RequestKey("refused", str)
"""Why a request was refused, left by whoever rendered the refusal."""
_ID_BYTES: Final = 12


async def stamp(request: web.Request, response: web.StreamResponse) -> None:
    """Put the id of a request on its answer, whatever the answer is."""
    response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")


class Told(Protocol):
    """Hears of every refusal, with what a line says of it."""

    def __call__(self, reason: str, route: str, *, level: Level, **fields: object) -> None:
        """Tell of it."""
        ...


def fault_boundary(
    log: Log,
    entropy: Callable[[int], bytes],
    refused: Callable[[str], None] = lambda _: None,
    *,
    told: Told | None = None,
) -> Middleware:
    """Build the middleware; ``entropy`` makes the ids of requests, which are never the caller's.

    ``refused`` hears the reason of every refusal, whoever has rendered it, and ``told`` writes of it.
    """

    @web.middleware
    async def boundary(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = name = f"req_{entropy(_ID_BYTES).hex()}"
        cause = CAUSE.set(name)
        try:
            response = await answered(request, handler)
            if REFUSED in request:
                refused(request[REFUSED])
                if told is not None:
                    _tell(told, request, response.status)
            return response
        finally:
            CAUSE.reset(cause)

    async def answered(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _known(request, error)
        except (ConnectionError, HttpProcessingError):
            # The peer broke off or sent a broken body; there is nobody to answer, or nothing more to say.
            return _render(request, NodeFault(NodeReason.INVALID_FIELD, field="body", detail="could not be read"))
        except NodeFault as fault:
            return _render(request, fault)
        except ChannelFault as fault:
            request[REFUSED] = fault.reason.value
            body = problem_body(fault, challenge_id=None)
            return _response(request, STATUS[fault.reason], body, retry_headers(fault))
        except Exception as error:  # noqa: BLE001 - the boundary: a bug of ours, shown to nobody, logged in full
            where = _where(error)
            log("request.bug", level=Level.ERROR, request=request[REQUEST_ID], error=type(error).__name__, where=where)
            return _render(request, NodeFault(NodeReason.INTERNAL, detail="the node made a mistake"))

    return boundary


def _tell(told: Told, request: web.Request, status: int) -> None:
    reason, scheme = request[REFUSED], request.headers.get("Authorization", "")[:8].lower()
    # The first answer to everybody who pays through a channel is the price: that is no trouble to read about.
    asked = reason == Reason.PAYMENT_REQUIRED.value and not scheme
    told(
        reason,
        route_of(request),
        level=Level.DEBUG if asked else Level.INFO,
        status=status,
        method=request.method,
        rail=_RAILS.get(scheme.partition(" ")[0]),
    )


def route_of(request: web.Request) -> str:
    """The route a request was for, as it is written in the program: never what a stranger put into a path."""
    resource = request.match_info.route.resource
    return "none" if resource is None else resource.canonical


def _known(request: web.Request, error: web.HTTPException) -> web.Response:
    fault = _BY_STATUS.get(error.status)
    if fault is None:
        fault = NodeFault(NodeReason.INVALID_FIELD, field="request", detail="could not be read")
    response = _render(request, fault)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _render(request: web.Request, fault: NodeFault) -> web.Response:
    request[REFUSED] = fault.reason.value
    return _response(request, STATUS[fault.reason], error_body(fault), retry_headers(fault))


def _response(request: web.Request, status: int, body: bytes, headers: dict[str, str]) -> web.Response:
    if request.method == "HEAD":
        return web.Response(status=status, headers=headers)
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def _where(error: BaseException) -> str:
    """File and line only: messages and locals may hold a prompt or a key."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " < ".join(reversed(frames[-6:]))
