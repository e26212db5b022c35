"""``mppnode prices sync|show|import``: what providers charge, what callers pay, and what is held for a decision."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import aiohttp

from channels.instants import UnixSeconds
from mppnode.config.load import ConfigError, environment, load_config
from mppnode.config.rates import format_rate
from mppnode.config.schema import Config, ProviderConfig
from mppnode.kernel.clock import Clock, SystemClock
from mppnode.kernel.listing import Listing
from mppnode.kernel.rates import Rates
from mppnode.pricing.catalog import Catalog, build_catalog
from mppnode.pricing.entries import (
    CatalogError,
    Entry,
    cost_row,
    parse_entries,
    read_entries,
    rfc3339,
    write_entries,
)
from mppnode.pricing.exact import BadPrice
from mppnode.pricing.fetch import FetchFailed, fetch, price_session
from mppnode.pricing.guard import Outcome, Reading, Verdict, take_list, take_offers, unknown_acceptances
from mppnode.pricing.sync import PRICE_LISTS, decode_offers

_BAD: Final = 2
_FAILED: Final = 1
_EXAMPLE: Final = "example"

_Key = tuple[str, str]


class _Refused(Exception):
    """The command cannot do what was asked; nothing was changed."""


def run(options: argparse.Namespace) -> int:
    """Run one action and return its exit status: 1 when a price was held or could not be had, 2 when nothing ran."""
    try:
        config = load_config(options.config, environment())
    except ConfigError as error:
        for problem in error.problems:
            print(f"{options.config}: {problem}", file=sys.stderr)
        return _BAD
    path = config.pricing.catalog
    if path is None:
        raise AssertionError("a configuration from a file has a catalog file")
    try:
        entries = {entry.key: entry for entry in read_entries(path)}
        if options.action == "show":
            return _show(config, entries, options, SystemClock().now())
        if options.action == "import":
            merged, outcomes = _import(entries, options, SystemClock().now())
        else:
            merged, outcomes = asyncio.run(_sync(config, entries, options, SystemClock()))
        # An unchanged file is left alone: running nodes would read it again for nothing.
        if merged != entries and not options.dry_run:
            write_entries(path, merged.values())
    except _Refused as refused:
        print(f"mppnode: {refused}", file=sys.stderr)
        return _BAD
    except CatalogError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return _BAD
    except OSError as error:
        print(f"{path}: cannot be written: {error.strerror}", file=sys.stderr)
        return _FAILED
    _report(outcomes, as_json=options.json, dry_run=options.dry_run)
    return _FAILED if any(outcome.verdict.bad for outcome in outcomes) else 0


# ---------------------------------------------------------------------------------------------------------------- sync


async def _sync(
    config: Config, entries: Mapping[_Key, Entry], options: argparse.Namespace, clock: Clock
) -> tuple[dict[_Key, Entry], list[Outcome]]:
    accepted = _accepted(entries, options.accept)
    merged, outcomes = dict(entries), list[Outcome]()
    chosen = _chosen(config, options.provider)
    async with price_session() as session:
        for provider in chosen:
            merged, found = await _sync_one(session, provider, merged, accepted, clock)
            outcomes += found
    return merged, outcomes


async def _sync_one(
    session: aiohttp.ClientSession,
    provider: ProviderConfig,
    entries: dict[_Key, Entry],
    accepted: frozenset[_Key],
    clock: Clock,
) -> tuple[dict[_Key, Entry], list[Outcome]]:
    shape = PRICE_LISTS.get(provider.preset or "")
    if shape is None:
        return entries, [Outcome(provider.name, "", Verdict.SKIPPED, "publishes no prices")]
    if not provider.models:
        return entries, [Outcome(provider.name, "", Verdict.SKIPPED, "sells nothing from the catalog: no models key")]
    source = provider.base_url + shape.path
    key = None if provider.api_key is None else provider.api_key.reveal()
    try:
        offers = decode_offers(await fetch(session, source, key), shape)
    except (FetchFailed, BadPrice) as error:
        return entries, [Outcome(provider.name, "", Verdict.FAILED, f"its price list {error}")]
    reading = Reading(provider.name, source, clock.now(), provider.models, accepted)
    return take_offers(entries, offers, reading)


def _chosen(config: Config, names: list[str]) -> list[ProviderConfig]:
    known = {provider.name: provider for provider in config.providers}
    for name in names:
        if name not in known:
            raise _Refused(f"provider {name!r} is not configured")
    return [known[name] for name in dict.fromkeys(names)] if names else list(known.values())


def _accepted(entries: Mapping[_Key, Entry], given: list[str]) -> frozenset[_Key]:
    keys = []
    for text in given:
        provider, slash, model = text.partition("/")
        if not slash or not model:
            raise _Refused(f"--accept {text!r}: write it as provider/model")
        keys.append((provider, model))
    for provider, model in unknown_acceptances(entries, keys):
        raise _Refused(f"--accept {provider}/{model}: no price of it is held")
    return frozenset(keys)


# -------------------------------------------------------------------------------------------------------------- import


def _import(
    entries: Mapping[_Key, Entry], options: argparse.Namespace, now: UnixSeconds
) -> tuple[dict[_Key, Entry], list[Outcome]]:
    accepted = _accepted(entries, options.accept)
    try:
        if options.source == _EXAMPLE:
            given = parse_entries(files("mppnode.pricing").joinpath("example_catalog.json").read_bytes())
        else:
            given = read_entries(Path(options.source), required=True)
    except CatalogError as error:
        raise _Refused(f"{options.source}: {error}") from None
    return take_list(entries, given, now=now, accepted=accepted)


# ---------------------------------------------------------------------------------------------------------------- show


def _show(config: Config, entries: Mapping[_Key, Entry], options: argparse.Namespace, now: UnixSeconds) -> int:
    catalog = build_catalog(config, entries.values())
    listings = [listing for listing in catalog if not options.model or listing.model in options.model]
    missing = [pair for pair in catalog.unpriced if not options.model or pair[1] in options.model]
    rows = [_shown(listing, catalog, entries, config, now) for listing in listings]
    rows += [{"provider": provider, "model": model, "state": "unpriced"} for provider, model in missing]
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        _table(rows)
    unknown = set(options.model) - {row["model"] for row in rows}
    for model in sorted(unknown):
        print(f"mppnode: {model!r} is not sold here", file=sys.stderr)
    return _FAILED if unknown else 0


def _shown(
    listing: Listing, catalog: Catalog, entries: Mapping[_Key, Entry], config: Config, now: UnixSeconds
) -> dict[str, Any]:
    row: dict[str, Any] = {"provider": listing.provider, "model": listing.model, "kind": listing.kind.value}
    row["sell"] = cost_row(listing.rates)
    if listing.source == "configuration":
        return row | {"state": "configured", "source": listing.source}
    entry = entries[listing.provider, listing.model]
    provider = next(provider for provider in config.providers if provider.name == listing.provider)
    row["cost"] = cost_row(entry.cost)
    row["markup_bps"] = config.pricing.markup_bps if provider.markup_bps is None else provider.markup_bps
    row |= {"source": entry.source, "time": rfc3339(entry.time), "age_s": now - entry.time}
    stale = catalog.stale(listing, now)
    row["state"] = "stale" if stale else "held" if entry.held else "vouched" if entry.vouched else "fresh"
    if entry.held is not None:
        row["held"] = {"reason": entry.held.reason}
        if entry.held.cost is not None:
            row["held"]["cost"] = cost_row(entry.held.cost)
    if entry.rounded:
        row["rounded"] = list(entry.rounded)
    return row


def _table(rows: Iterable[dict[str, Any]]) -> None:
    head = ("PROVIDER", "MODEL", "COST IN", "OUT", "MARKUP", "SELL IN", "OUT", "AGE", "STATE")
    lines = [head]
    for row in rows:
        cost, sell = row.get("cost", {}), row.get("sell", {})
        lines.append(
            (
                row["provider"],
                row["model"],
                *(cost.get(f"{axis}_usd_per_million", "-") for axis in ("input", "output")),
                f"{_percent(row['markup_bps'])}%" if "markup_bps" in row else "-",
                *(sell.get(f"{axis}_usd_per_million", "-") for axis in ("input", "output")),
                _age(row["age_s"]) if "age_s" in row else "-",
                row["state"] + (f": {row['held']['reason']}" if "held" in row else ""),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print("USD per million tokens")


def _percent(bps: int) -> str:
    return f"{bps // 100}.{bps % 100:02d}"


def _age(seconds: int) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{max(seconds, 0)}s"


# -------------------------------------------------------------------------------------------------------------- report


def _report(outcomes: list[Outcome], *, as_json: bool, dry_run: bool) -> None:
    if as_json:
        for outcome in outcomes:
            print(json.dumps(_outcome_row(outcome)))
        return
    for outcome in outcomes:
        # What stayed as it was, and what the operator never asked for, would bury the lines that need a decision.
        if outcome.model and outcome.verdict in (Verdict.SAME, Verdict.SKIPPED):
            continue
        name = f"{outcome.provider}/{outcome.model}" if outcome.model else outcome.provider
        move = " -> ".join(_pair(rates) for rates in (outcome.old, outcome.new) if rates is not None)
        print("  ".join(part for part in (outcome.verdict.value.ljust(8), name, move, outcome.reason) if part))
    counts = Counter(outcome.verdict.value for outcome in outcomes if outcome.model)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "no prices"
    print(f"{summary}{' (dry run: nothing was written)' if dry_run else ''}")


def _pair(rates: Rates) -> str:
    return f"{format_rate(rates.input)}/{format_rate(rates.output)}"


def _outcome_row(outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"provider": outcome.provider, "verdict": outcome.verdict.value}
    if outcome.model:
        row["model"] = outcome.model
    if outcome.reason:
        row["reason"] = outcome.reason
    if outcome.old is not None:
        row["old"] = cost_row(outcome.old)
    if outcome.new is not None:
        row["new"] = cost_row(outcome.new)
    return row
