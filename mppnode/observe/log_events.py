"""Every event a node logs, with its fields: the operator's vocabulary, from which docs/logs.md is generated.

A test compares this with every call of a log in the program: a query somebody saved keeps finding what it found.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BEGIN: Final = "<!-- events: begin -->"
END: Final = "<!-- events: end -->"


@dataclass(frozen=True, slots=True)
class Spec:
    """One event: its level (or levels), fields, and what it means. ``kept`` ones outlive others when lines wait."""

    name: str
    level: str
    fields: tuple[str, ...]
    what: str
    kept: bool = False


def _debug(name: str, fields: str, what: str) -> Spec:
    return Spec(name, "debug", tuple(fields.split()), what)


def _info(name: str, fields: str, what: str) -> Spec:
    return Spec(name, "info", tuple(fields.split()), what)


def _money(name: str, fields: str, what: str, level: str = "info") -> Spec:
    return Spec(name, level, tuple(fields.split()), what, kept=True)


def _warning(name: str, fields: str, what: str) -> Spec:
    return Spec(name, "warning", tuple(fields.split()), what)


def _error(name: str, fields: str, what: str) -> Spec:
    return Spec(name, "error", tuple(fields.split()), what)


def _mixed(name: str, level: str, fields: str, what: str) -> Spec:
    return Spec(name, level, tuple(fields.split()), what)


_PROCESS: Final = (
    _info(
        "node.started", "url ops_url chain recovered node version", "The node listens; `recovered` holds were swept."
    ),
    _info("node.stopped", "", "Everything is closed."),
    _error("node.lost", "fenced", "The node's lease in the ledger is gone: its requests were ended."),
    _info("watchtower.started", "ops_url chain node version", "The treasury runs alone."),
    _info("workers.started", "url workers", "The supervisor has started its workers."),
    _error("worker.died", "worker status", "A worker ended by itself and is started again."),
    _error("worker.failed", "task error", "The supervisor's own work on a worker failed."),
    _error("task.failed", "task error", "Background work ended with an error."),
    _error("ledger.failed", "error", "The ledger cannot be written: the node stops."),
    _error("spool.failed", "errno", "The second copy of vouchers cannot be written."),
    _warning("sweep.late", "reason", "A sweep of orphaned holds was put off."),
    _debug("gauges.late", "reason", "A look for the metrics was put off."),
    _error("gauges.failed", "error", "A look for the metrics failed by a mistake of ours; it is taken again."),
    _info("config.reloaded", "tables", "A changed configuration is in force."),
    _error("config.refused", "problems", "A changed configuration is wrong; the old one stays in force."),
    _warning("config.needs_restart", "keys", "Changed keys that only a restart takes up."),
    _mixed(
        "traces.lost",
        "warning or error",
        "why status",
        "Spans are being lost (told once, until some arrive again): `why` is `unreachable`, `timeout`, `status`,"
        " `queue` (full), `encoding`, `stopped` or `mistake`.",
    ),
    _info("traces.resumed", "lost", "The receiver takes spans again; so many were lost."),
    _warning("log.dropped", "lines", "Lines that nobody read in time."),
    _info(
        "log.suppressed", "about total counts", "Lines left out of a storm of the same, counted by reason and route."
    ),
)
_REQUESTS: Final = (
    _money(
        "request.ended",
        "request rail ending model provider strategy attempts tokens token_source runs_on first_ms total_ms stall_ms"
        " charged_pico channel spent accepted version account key",
        "A paid request is over, with its bill: `channel`, `spent`, `accepted` and `version` on channels, `account` and"
        " `key` (its id) on credit.",
    ),
    _mixed(
        "request.refused",
        "info; debug for a plain 402",
        "reason route status method rail",
        "A request was not served. At most five a second of one reason and route.",
    ),
    _error("request.bug", "request error where", "The node made a mistake: the type of the error, and file and line."),
    _debug("hold.refused", "rail reason limit", "A reservation was refused; the caller is told why."),
    _error("usage.uncounted", "model error", "A tokenizer failed on an answer; the provider's count is used."),
    _warning("usage.disputed", "provider model counted reported", "A provider's count is not believed."),
    _info("generation.found", "provider model prompt completion counted", "A provider told later what a request used."),
    _warning("generation.unknown", "provider model counted", "A provider did not tell what a request used."),
    _info("provider.recovered", "provider model", "A probe was answered: the provider is used again."),
    _error("provider.refused_us", "provider status", "A provider refused our key or our credit."),
    _warning("model.unpriced", "provider model", "A model is not sold, as it has no price."),
    _money("prices.changed", "listings", "A new catalog is in force."),
    _error("prices.unreadable", "problem", "The list of prices cannot be read; the old one stays in force."),
)
_CHANNELS: Final = (
    _money("channel.opened", "channel protocol deposit accepted", "A payer opened a channel."),
    _money("channel.topped_up", "channel deposit tx", "A payer added to a deposit."),
    _debug("voucher.accepted", "channel accepted delta", "A payer signed for more."),
    _money(
        "channel.closing", "channel why earned", "A close has begun: `why` is the challenge, or `node:` and a reason."
    ),
    _money("channel.reopened", "channel", "A close surely cannot happen: the channel is open again."),
    _money("channel.turned", "channel before phase settled", "The chain changed a channel's phase."),
    _money("channel.closed", "channel why captured tx", "The chain confirmed our close."),
    _money("channel.settled", "channel settled", "The chain paid out what was earned so far."),
    _error("channel.lost", "channel units", "A payer withdrew before we were paid; `units` are lost."),
    _error("channel.suspect", "channel settled", "Chain and books contradict each other: people must look."),
    _money(
        "intent.ended",
        "intent kind state channel amount fee_pico tx",
        "A transaction of ours has ended; at warning unless it is `final`.",
    ),
    _error("chain.disputed", "what", "Two chain nodes disagree about money."),
    _info("treasury.not_yet", "channel reason", "Money will be moved later."),
    _warning("treasury.refused", "channel reason", "Money could not be moved."),
    _warning("treasury.late", "reason", "A round of the treasury was put off."),
    _error("treasury.blind", "seconds", "The chain has not been seen for so long."),
    _error("treasury.no_effect", "channel kind", "A transaction paid another amount than was fixed: people must look."),
    _money("reconcile.done", "channels differences lost", "The daily comparison of books and chain."),
    _error("reconcile.difference", "channel what", "Books and chain differ."),
    _warning("reconcile.late", "reason", "The daily comparison was put off."),
)
_CREDIT: Final = (
    _money(
        "credit.moved",
        "account kind amount_pico reference event_id",
        "Money came to an account (a payment, a gift), or was taken back (a refund, a dispute): below zero.",
    ),
    _money("account.suspended", "account why", "An account was suspended: by `billing` or an `operator`."),
    _money("account.resumed", "account why", "An account may use the node again."),
    _money(
        "operator.action",
        "method route account target status remote",
        "The admin API was asked to change something, or refused to.",
    ),
    _info(
        "billing.reconciled",
        "payments paid_cents refunded_cents disputed_cents booked foreign accounts differences",
        "The comparison with Stripe: ours, theirs.",
    ),
    _mixed(
        "billing.difference",
        "warning or error",
        "account what reference ours theirs",
        "Ours and Stripe's books differ.",
    ),
    _error("billing.unbooked", "event_id payment reason", "Money Stripe tells of could not be booked."),
    _mixed("billing.passed", "info to error", "event_id type why payment", "An event of Stripe's that books nothing."),
    _money("billing.payment_failed", "payment code decline_code", "A payment was declined."),
    _money("billing.dispute", "account dispute state", "A payment is disputed, or the dispute is decided.", "warning"),
    _money("billing.unpaid", "account invoice cents", "An invoice was not paid.", "warning"),
    _warning("billing.customer_deleted", "account", "An account's customer was deleted at Stripe."),
    _error("billing.subscription_ended", "account", "An account's subscription ended: it may owe nothing more."),
    _error("billing.two_subscriptions", "account second", "An account has two subscriptions."),
    _error("billing.foreign_tag", "account payment customer", "A payment is tagged with another customer's account."),
    _error("billing.meter", "code count", "Stripe could not count reports of usage."),
    _mixed("billing.stripe", "warning or error", "doing kind code", "Stripe could not do something."),
    _error("billing.unavailable", "why", "Billing cannot be started."),
    _warning("billing.late", "job why", "A job of billing was put off."),
    _error("billing.failed", "job error", "A job of billing failed."),
    _warning(
        "stripe_call_failed",
        "call kind code attempt again",
        "A call to Stripe failed; `again` says whether it is repeated.",
    ),
    _error("meter.parked", "account why task micro", "A report of usage was given up."),
    _error("meter.unclear", "task counted value", "A report of usage may or may not have arrived."),
    _mixed("meter.late", "warning or error", "task kind code", "A report of usage was put off."),
    _money("recharge.paid", "account cents payment", "A card was charged for an account that ran low."),
    _money("recharge.given_up", "account code", "A card was declined too often.", "warning"),
    _mixed("recharge.late", "warning or error", "task kind code", "A charge was put off."),
    _error("recharge.invalid", "task code", "A charge is impossible as it is."),
    _error("recharge.unbooked", "task reason", "A card was charged and its money could not be booked yet."),
    _warning("alert.parked", "account why", "A customer's alert could not be delivered."),
)
GROUPS: Final = (
    ("The process", _PROCESS),
    ("Requests, providers and prices", _REQUESTS),
    ("Channels and the chain", _CHANNELS),
    ("Credit, billing and operators", _CREDIT),
)
EVENTS: Final = tuple(spec for _, group in GROUPS for spec in group)
KEPT: Final = frozenset(spec.name for spec in EVENTS if spec.kept)
"""Events that are written even when so many lines wait that others are dropped, beside all warnings and errors."""
ROOMS: Final = tuple(sorted({spec.name.partition(".")[0] for spec in EVENTS}))
"""First words of events: what ``[log.levels]`` may name."""


def table() -> str:
    """The events as Markdown, a table for each group."""
    parts = []
    for title, group in GROUPS:
        rows = [f"| {_name(spec)} | {spec.level} | {_names(spec)} | {spec.what} |" for spec in group]
        parts.append("\n".join([f"### {title}", "", "| event | level | fields | what |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def with_table(text: str) -> str:
    """``text`` with the tables between its two marks. Raises ``ValueError`` when it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the document has no place for the table")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def _name(spec: Spec) -> str:
    return f"`{spec.name}`*" if spec.kept else f"`{spec.name}`"


def _names(spec: Spec) -> str:
    return ", ".join(f"`{name}`" for name in spec.fields)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.write_text(with_table(place.read_text(encoding="utf-8")), encoding="utf-8")
