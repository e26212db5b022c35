"""``mppnode demo``: one paid stream from nothing to settled money, and three books that must agree to the unit."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from channels import escrow as escrow_v2
from channels.descriptor import SessionProtocol
from channels.ids import Hash32, to_hex
from channels.payer.model import Closed, PayerPolicy
from channels.payer.signer import LocalSigner
from channels.units import Pico, Units, format_decimal
from channels.verify import closed_in
from channels.wire.sse import NeedVoucher
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.cli.devnet import FUNDS, PATH_USD, Devnet, DevnetOptions
from mppnode.config.schema import LimitsConfig, SessionConfig
from mppnode.observe.logs import Level
from mppnode.payer.client import ChannelOpening, DepositAdded, Note, PayingClient, VoucherSent

_TOKENS: Final = 480
_TOKENS_PER_SECOND: Final = 160.0
_DEPOSIT: Final = Units(3_000)
_PREAUTHORISE: Final = Units(1_200)  # small, so that several vouchers are seen in three seconds
_PROMPT: Final = "Tell me how an agent pays for exactly the tokens it reads."


@dataclass(slots=True)
class _Seen:
    """What happened, from where the payer and the operator sit."""

    tokens: int = 0
    vouchers: int = 0
    top_ups: int = 0
    asked: int = 0
    signed: int = 0
    stall_ms: int = 0
    logs: list[dict[str, object]] = field(default_factory=list)

    def log(self, event: str, *, level: Level = Level.INFO, **fields: object) -> None:
        """Take the node's log lines instead of a terminal."""
        self.logs.append({"event": event, "level": level, **fields})
        stall = fields.get("stall_ms")
        if event == "request.ended" and isinstance(stall, int):
            self.stall_ms += stall


class _Screen:
    """Writes tokens as they come and payments as quiet lines; says nothing at all for ``--json``."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
        self._column = 0

    def line(self, text: str = "") -> None:
        """A line of its own."""
        if not self._silent:
            print(("\n" if self._column else "") + text, flush=True)
        self._column = 0

    def quiet(self, text: str) -> None:
        """A payment, as an aside."""
        self.line(f"{self._dim}  ~ {text}{self._plain}")

    def token(self, text: str) -> None:
        """A piece of the response."""
        if not self._silent:
            print(text, end="", flush=True)
        self._column += len(text)


async def run_demo(*, as_json: bool) -> int:
    """Run the demonstration; 0 only when all three books agree."""
    seen, screen = _Seen(), _Screen(silent=as_json)
    options = DevnetOptions(
        tokens_per_second=_TOKENS_PER_SECOND,
        input=Pico(500_000),
        output=Pico(10_000_000),
        session=SessionConfig(
            protocols=(SessionProtocol.V2,),
            min_deposit=Units(1_000),
            suggested_deposit=_DEPOSIT,
            preauthorise_max=_PREAUTHORISE,
            chain_ttl_s=0,
        ),
        limits=LimitsConfig(drain_s=2),
    )
    async with Devnet(options, log=seen.log) as net, aiohttp.ClientSession() as http:
        screen.line("mppnode demo: a development chain, provider and node in this process. Not real money.")
        chain = RpcChain(HttpTransport(http, net.chain_url), net.clock, limits=RpcLimits())
        client = PayingClient(
            http,
            chain=chain,
            signer=LocalSigner(net.payer_key),
            policy=_policy(net),
            now=net.clock.now_millis,
            entropy=net.entropy,
            observer=lambda note: _note(note, seen, screen),
        )
        await _stream(client, net, seen, screen)
        closed = await client.close(net.chat_url)
        assert closed is not None, "there is a channel to close"
        summary = await _books(net, chain, seen, closed)
    if as_json:
        print(json.dumps(summary))
    else:
        _table(screen, summary)
    return 0 if summary["ok"] else 1


def _policy(net: Devnet) -> PayerPolicy:
    return PayerPolicy(
        payer=net.payer,
        signer=net.payer,
        escrows=frozenset({net.escrow}),
        tokens=frozenset({PATH_USD}),
        request_cap=Units(20_000),
        channel_cap=Units(50_000),
        max_deposit=Units(50_000),
    )


def _note(note: Note, seen: _Seen, screen: _Screen) -> None:
    match note:
        case ChannelOpening():
            seen.vouchers += 1  # the open carries the first one
            screen.quiet(f"open a channel with a deposit of {format_decimal(note.deposit)} USD")
        case NeedVoucher():
            seen.asked += 1
        case VoucherSent():
            seen.vouchers += 1
            seen.signed = max(seen.signed, note.cumulative)
            screen.quiet(f"voucher: up to {format_decimal(note.cumulative)} USD in total, after {seen.tokens} tokens")
        case DepositAdded():
            seen.top_ups += 1
            screen.quiet(f"top-up: deposit {format_decimal(note.additional)} USD more")
        case _:
            pass


async def _stream(client: PayingClient, net: Devnet, seen: _Seen, screen: _Screen) -> None:
    body = {
        "model": "dev/story",
        "messages": [{"role": "user", "content": _PROMPT}],
        "max_tokens": _TOKENS,
    }
    async with client.stream(net.chat_url, body) as events:
        async for data in events:
            if data == "[DONE]":
                continue
            for choice in json.loads(data).get("choices", []):
                text = choice.get("delta", {}).get("content")
                if text:
                    seen.tokens += 1
                    screen.token(text)
    screen.line()


async def _books(net: Devnet, chain: RpcChain, seen: _Seen, closed: Closed) -> dict[str, Any]:
    """Read the same story from the payer, the ledger and the chain."""
    assert net.node.books is not None
    (account,) = await net.node.books.accounts()
    logs = await chain.logs(
        net.escrow.address, topics=(escrow_v2.CHANNEL_CLOSED, Hash32(account.id)), from_block=0, to_block=net.chain.head
    )
    event = closed_in(account.id, net.escrow, logs)
    assert event is not None, "the chain closed the channel"
    captured, refunded = int(event.settled), int(event.refunded)
    told = int(closed.spent)
    paid, earned = FUNDS - net.chain.balance(net.payer), net.chain.balance(net.payee) - FUNDS
    agree = (
        captured == account.spent == told == paid == earned
        and account.accepted == seen.signed
        and account.close is not None
        and account.close.capture == captured
        and account.close.tx_hash == closed.tx_hash
    )
    return {
        "ok": agree and seen.tokens == _TOKENS,
        "tokens": seen.tokens,
        "vouchers": seen.vouchers,
        "top_ups": seen.top_ups,
        "need_voucher_events": seen.asked,
        "stall_ms": seen.stall_ms,
        "accepted": int(account.accepted),
        "spent": int(account.spent),
        "captured": captured,
        "refunded": refunded,
        "books_agree": agree,
        "payer": {"signed": seen.signed, "spent": told, "paid": paid},
        "chain": {"earned": earned, "transaction": to_hex(closed.tx_hash)},
    }


def _table(screen: _Screen, summary: dict[str, Any]) -> None:
    spent, refunded = summary["spent"], summary["refunded"]
    rows = (
        ("", "payer", "node's ledger", "chain"),
        ("permitted", _usd(summary["payer"]["signed"]), _usd(summary["accepted"]), ""),
        ("spent", _usd(summary["payer"]["spent"]), _usd(spent), _usd(summary["captured"])),
        ("moved", _usd(summary["payer"]["paid"]), _usd(spent), _usd(summary["chain"]["earned"])),
        ("refunded", "", "", _usd(refunded)),
    )
    screen.line()
    for label, *columns in rows:
        screen.line(f"  {label:10}" + "".join(f"{column:>16}" for column in columns))
    screen.line()
    screen.line(
        f"  {summary['tokens']} tokens, {summary['vouchers']} vouchers, {summary['top_ups']} top-up, "
        f"{summary['stall_ms']} ms of waiting for money"
    )
    screen.line("  The three books agree." if summary["books_agree"] else "  THE BOOKS DO NOT AGREE.")


def _usd(units: int) -> str:
    return format_decimal(units)

