"""``mppnode pay``: open a channel, stream one response, close the channel."""

from __future__ import annotations

import argparse
import json
import os
import sys

import aiohttp

from channels.descriptor import RESERVE_ADDRESS, Escrow, SessionProtocol
from channels.faults import ChannelFault
from channels.ids import parse_address, to_hex
from channels.payer.model import PayerPolicy
from channels.payer.signer import LocalSigner
from channels.units import format_decimal, parse_decimal
from mppnode.chain.rpc import RpcChain, RpcLimits
from mppnode.chain.transport import HttpTransport
from mppnode.config.load import environment
from mppnode.kernel.clock import SystemClock
from mppnode.payer.client import Note, PayingClient, PaymentGivenUp, RequestFailed, VoucherSent

_KEY = "MPPNODE_PAYER_KEY"


async def pay(options: argparse.Namespace) -> int:
    """Run the command; the payer's key comes from the environment, never from the command line."""
    try:
        key = bytes.fromhex(environment().get(_KEY, "").removeprefix("0x"))
        signer = LocalSigner(key)
        token = parse_address(options.token, field="--token")
        cap = parse_decimal(options.cap, field="--cap")
        deposit = parse_decimal(options.max_deposit, field="--max-deposit")
    except ChannelFault as fault:
        print(f"mppnode pay: {fault.message}", file=sys.stderr)
        return 2
    except ValueError:
        print(f"mppnode pay: set {_KEY} to a 32-byte private key in hex", file=sys.stderr)
        return 2
    policy = PayerPolicy(
        payer=signer.address,
        signer=signer.address,
        escrows=frozenset({Escrow(SessionProtocol.V2, options.chain, RESERVE_ADDRESS)}),
        tokens=frozenset({token}),
        request_cap=cap,
        channel_cap=deposit,
        max_deposit=deposit,
    )
    clock = SystemClock()
    async with aiohttp.ClientSession() as http:
        client = PayingClient(
            http,
            chain=RpcChain(HttpTransport(http, options.rpc), clock, limits=RpcLimits()),
            signer=signer,
            policy=policy,
            now=clock.now_millis,
            entropy=os.urandom,
            observer=_note,
        )
        try:
            return await _run(client, options)
        except (PaymentGivenUp, RequestFailed, ChannelFault) as error:
            print(f"\nmppnode pay: {error}", file=sys.stderr)
            return 1


async def _run(client: PayingClient, options: argparse.Namespace) -> int:
    body = {
        "model": options.model,
        "messages": [{"role": "user", "content": options.prompt}],
        "max_tokens": options.max_tokens,
    }
    try:
        async with client.stream(options.url, body) as events:
            async for data in events:
                if data != "[DONE]":
                    for choice in json.loads(data).get("choices", []):
                        print(choice.get("delta", {}).get("content") or "", end="", flush=True)
        print()
    finally:
        if client.sessions():
            closed = await client.close(options.url)
            if closed is not None:
                spent = format_decimal(closed.spent)
                print(f"paid {spent} USD in transaction {to_hex(closed.tx_hash)}", file=sys.stderr)
    return 0


def _note(note: Note) -> None:
    if isinstance(note, VoucherSent):
        print(f" [up to {format_decimal(note.cumulative)} USD]", end="", file=sys.stderr, flush=True)
