"""The ``mppnode`` command. Each subcommand imports what it needs when it runs, so ``--help`` is instant."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mppnode", description="The inference node that is paid by the token.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run a node")
    serve.add_argument("--config", type=Path, required=True, metavar="FILE", help="see docs/mppnode.example.toml")
    serve.set_defaults(run=_serve)

    demo = commands.add_parser("demo", help="one paid stream on a development network, from open to close")
    demo.add_argument("--json", action="store_true", help="print one summary object and nothing else")
    demo.set_defaults(run=_demo)

    devnet = commands.add_parser("devnet", help="run a development chain, provider and node (not real money)")
    devnet.add_argument("--port", type=int, default=8402, help="of the node (default 8402; 0 picks one)")
    devnet.add_argument("--tokens-per-second", type=float, default=100.0, help="pace of the development provider")
    devnet.set_defaults(run=_devnet)

    pay = commands.add_parser("pay", help="send one paid chat request and close the channel")
    pay.add_argument("url", help="of the chat completions route")
    pay.add_argument("prompt")
    pay.add_argument("--rpc", required=True, metavar="URL", help="of the chain")
    pay.add_argument("--chain", type=int, required=True, metavar="ID")
    pay.add_argument("--token", default="0x20c0000000000000000000000000000000000000", help="default pathUSD")
    pay.add_argument("--model", required=True)
    pay.add_argument("--max-tokens", type=int, default=256)
    pay.add_argument("--cap", default="0.10", metavar="USD", help="most this request may cost (default 0.10)")
    pay.add_argument("--max-deposit", default="2", metavar="USD", help="most the channel may lock (default 2)")
    pay.set_defaults(run=_pay)
    return parser


def _serve(options: argparse.Namespace) -> int:
    from mppnode.cli.serve import serve

    return serve(options.config)


def _demo(options: argparse.Namespace) -> int:
    from mppnode.cli.demo import run_demo

    return asyncio.run(run_demo(as_json=options.json))


def _devnet(options: argparse.Namespace) -> int:
    from mppnode.cli.serve import run_devnet

    return asyncio.run(run_devnet(port=options.port, tokens_per_second=options.tokens_per_second))


def _pay(options: argparse.Namespace) -> int:
    from mppnode.cli.pay import pay

    return asyncio.run(pay(options))


if __name__ == "__main__":
    sys.exit(main())
