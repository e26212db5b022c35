"""``/v1/usage`` and ``/v1/requests/{id}``: what every request of an account was and cost, as JSON or CSV.

A table is sent in pages as the ledger gives them: an export of a year takes the memory of one page.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from aiohttp import web

from channels.credit import AccountId, KeyId
from channels.faults import ChannelFault
from channels.instants import UnixMillis
from mppnode.accounts.directory import Directory
from mppnode.accounts.keyring import Who, account_of
from mppnode.http.account_json import Json, group_name, request_json, sums_json, usd
from mppnode.http.account_routes import page
from mppnode.http.reception import PRIVATE, Query, Reception, answer, answered, cursor, identifier
from mppnode.kernel.faults import NodeFault, NodeReason
from mppnode.ledger import credit_lists
from mppnode.ledger.credit_lists import Between, Group, Sums
from mppnode.ledger.credit_rows import RequestRow
from mppnode.ledger.credits import Credits

USAGE: Final = "/v1/usage"
REQUESTS: Final = "/v1/requests"
GROUPS_MAX: Final = 10_000  # a month of days by a few hundred keys and models; one answer, so a few megabytes
_PARAMETERS: Final = ("since", "until", "group_by", "key", "model", "provider", "limit", "cursor", "format")
_EXPORT_PAGE: Final = 500
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a spreadsheet takes for the beginning of a formula; the last four are the wide forms of the first.

Source: OWASP, CSV injection.
"""
_TOKENS: Final = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
_COUNTS: Final = (*_TOKENS, "cost_usd", "cost_pico_usd")
_REQUEST_HEAD: Final = ("time", "request", "key", "model", "provider", *_COUNTS, "ending", "duration_ms", "ttft_ms")


class UsageSurface:
    """Usage of whoever shows the bearer."""

    def __init__(self, *, directory: Directory, books: Credits) -> None:
        self._reception = Reception(directory)
        self._books = books

    def routes(self) -> Sequence[web.RouteDef]:
        """The routes of this surface."""
        return [web.get(USAGE, self.usage), web.get(REQUESTS + "/{id}", self.request)]

    @answered
    async def usage(self, request: web.Request) -> web.StreamResponse:
        """Requests one by one, or added up by key, model, provider and day."""
        who = await self._reception.admit(request)
        return await usage_answer(request, who, self._books)

    @answered
    async def request(self, request: web.Request) -> web.Response:
        """One request."""
        who = await self._reception.admit(request)
        Query(request, ())
        account, name = who.account.id, identifier(request)
        row = await self._books.read(lambda: credit_lists.request(account, name))
        if row is None:
            raise NodeFault(NodeReason.NOT_FOUND, detail="the account has no such request")
        return answer(request_json(row))


async def usage_answer(request: web.Request, who: Who, books: Credits) -> web.StreamResponse:
    """The usage of an account, as the query asks for it. Raises ``INVALID_FIELD``."""
    query, account = Query(request, _PARAMETERS), account_of(who)
    what = _between(query)
    groups = [Group(name) for name in query.choices("group_by", [group.value for group in Group])]
    table = _wants_table(request, query)
    if groups:
        if "limit" in request.query or "cursor" in request.query:
            raise NodeFault(NodeReason.INVALID_FIELD, field="group_by", detail="is answered whole, without pages")
        sums = await books.read(lambda: credit_lists.usage(account, what, groups, GROUPS_MAX + 1))
        if len(sums) > GROUPS_MAX:
            words = f"gives more than {GROUPS_MAX} groups: narrow since and until"
            raise NodeFault(NodeReason.INVALID_FIELD, field="group_by", detail=words)
        return _sums_table(sums, groups) if table else answer(page([sums_json(each, groups) for each in sums], None))
    after, limit = _position(query), query.limit()
    if table and "limit" not in request.query:
        return await _export(request, account, what, after, books)
    rows = await books.read(lambda: credit_lists.requests(account, what, after, limit))
    more = cursor(rows[-1].at_ms, rows[-1].id) if len(rows) == limit else None
    return _page_table(rows, more) if table else answer(_requests_page(rows, more))


def _between(query: Query) -> Between:
    since, until, key = query.instant("since"), query.instant("until"), query.name("key")
    if since is not None and until is not None and until <= since:
        raise NodeFault(NodeReason.INVALID_FIELD, field="until", detail="is not after since")
    always = Between()
    return Between(
        always.since if since is None else UnixMillis(since),
        always.until if until is None else UnixMillis(until),
        None if key is None else KeyId(key),
        query.name("model"),
        query.name("provider"),
    )


def _position(query: Query) -> tuple[UnixMillis, str] | None:
    found = query.cursor(int, str)
    return None if found is None else (UnixMillis(found[0]), found[1])


def _wants_table(request: web.Request, query: Query) -> bool:
    """Whether CSV is asked for; the query decides over the header, which browsers write as they like."""
    asked = query.choice("format", ("json", "csv"))
    if asked is not None:
        return asked == "csv"
    accepted = [each.partition(";")[0].strip().lower() for each in request.headers.get("Accept", "").split(",")]
    return "text/csv" in accepted and "application/json" not in accepted


def _requests_page(rows: Sequence[RequestRow], more: str | None) -> Json:
    return page([request_json(row) for row in rows], more)


# ----------------------------------------------------------------------------------------------------------------- CSV


def _sums_table(sums: Sequence[Sums], groups: Sequence[Group]) -> web.Response:
    head = (*(group.value for group in groups), "requests", *_COUNTS)
    lines = []
    for each in sums:
        names = [group_name(group, name) for group, name in zip(groups, each.names, strict=True)]
        lines.append((*names, each.requests, *_counts(each)))
    return web.Response(body=table([head, *lines]), headers=_table_headers("usage"))


def _page_table(rows: Sequence[RequestRow], more: str | None) -> web.Response:
    headers = _table_headers("requests") | ({} if more is None else {"X-Next-Cursor": more})
    return web.Response(body=table([_REQUEST_HEAD, *(_line(row) for row in rows)]), headers=headers)


async def _export(
    request: web.Request, account: AccountId, what: Between, after: tuple[UnixMillis, str] | None, books: Credits
) -> web.StreamResponse:
    """Every request, page by page. The first is read before the status is sent, so that a refusal can be one."""
    rows = await books.read(partial(credit_lists.requests, account, what, after, _EXPORT_PAGE))
    response = web.StreamResponse(headers=_table_headers("requests"))
    await response.prepare(request)
    try:
        await response.write(table([_REQUEST_HEAD]))
        while rows:
            await response.write(table([_line(row) for row in rows]))
            after = rows[-1].at_ms, rows[-1].id
            rows = await books.read(partial(credit_lists.requests, account, what, after, _EXPORT_PAGE))
        await response.write_eof()
    except ChannelFault:
        # The status line has gone: a table that merely ended here would be read as a whole one. Break it off instead.
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError:
        pass  # the reader has left
    return response


def _line(row: RequestRow) -> tuple[Any, ...]:
    shown = request_json(row)
    noted = (shown.get(name) for name in ("ending", "duration_ms", "ttft_ms"))
    return (shown["time"], row.id, row.api_key, row.model, row.provider, *_counts(row), *noted)


def _counts(row: RequestRow | Sums) -> tuple[Any, ...]:
    return (row.prompt, row.cached, row.completion, row.reasoning, usd(row.cost), str(row.cost))


def table(rows: Sequence[Sequence[Any]]) -> bytes:
    """Rows as CSV in which no cell is a formula. Source: RFC 4180."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _table_headers(name: str) -> dict[str, str]:
    kind = "text/csv; charset=utf-8"
    return {**PRIVATE, "Content-Type": kind, "Content-Disposition": f'attachment; filename="{name}.csv"'}
