"""The ``mppnode`` command. Each subcommand imports what it needs when it runs, so ``--help`` is instant."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from channels.model import Phase


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
    workers = "processes on one port (default: as configured, else 1)"
    serve.add_argument("--workers", type=int, choices=range(1, 65), metavar="N", help=workers)
    serve.add_argument("--worker", help=argparse.SUPPRESS)  # written by the supervisor of --workers
    serve.set_defaults(run=_serve)

    watchtower = commands.add_parser("watchtower", help="settle and close only: no port, no provider")
    watchtower.add_argument("--config", type=Path, required=True, metavar="FILE")
    watchtower.set_defaults(run=_watchtower)

    _add_money(commands)
    _add_prices(commands)
    _add_accounts(commands)
    _add_doctor(commands)

    demo = commands.add_parser("demo", help="one paid stream on a development network, from open to close")
    demo.add_argument("--json", action="store_true", help="print one summary object and nothing else")
    demo.set_defaults(run=_demo)

    devnet = commands.add_parser("devnet", help="run a development chain, provider and node (not real money)")
    devnet.add_argument("--port", type=int, default=8402, help="of the node (default 8402; 0 picks one)")
    devnet.add_argument("--chain-port", type=int, default=0, help="of the chain (default 0, which picks one)")
    devnet.add_argument("--host", metavar="ADDRESS", help="where chain and node listen (default 127.0.0.1)")
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


def _add_money(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, required=True, metavar="FILE", help="the node's configuration")
    common.add_argument("--json", action="store_true", help="one JSON object per line")
    dry = argparse.ArgumentParser(add_help=False)
    dry.add_argument("--dry-run", action="store_true", help="say what would be done and do nothing")

    channels = commands.add_parser("channels", help="list, show, settle or close channels")
    actions = channels.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", parents=[common], help="channels that are not closed")
    listing.add_argument("--all", action="store_true", help="closed ones too")
    listing.add_argument("--phase", choices=[phase.value for phase in Phase])
    show = actions.add_parser("show", parents=[common], help="everything about one channel")
    show.add_argument("channel", nargs=1, metavar="CHANNEL")
    verbs = {"settle": "bring what is earned to the chain", "close": "end channels, capturing what is spent"}
    for verb, words in verbs.items():
        action = actions.add_parser(verb, parents=[common, dry], help=words)
        action.add_argument("channel", nargs="*", metavar="CHANNEL")
        action.add_argument("--all", action="store_true", help=f"{verb} every channel that has something to {verb}")
    channels.set_defaults(run=_money("channels"))

    reconcile = commands.add_parser("reconcile", parents=[common], help="prove that journal, books and chain agree")
    reconcile.set_defaults(run=_money("reconcile"))

    backup = commands.add_parser("backup", help="copy a SQLite ledger that is in use")
    backup.add_argument("--config", type=Path, required=True, metavar="FILE")
    backup.add_argument("--to", type=Path, required=True, metavar="FILE", help="must not exist yet")
    backup.set_defaults(run=_money("backup"))

    restore = commands.add_parser("restore", parents=[common, dry], help="bring a restored backup up to date")
    restore.add_argument("--spool", type=Path, metavar="FILE", help="accepted vouchers (default: the configured spool)")
    restore.set_defaults(run=_money("restore"))


def _add_prices(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, required=True, metavar="FILE", help="the node's configuration")
    common.add_argument("--json", action="store_true", help="one JSON object per line")
    change = argparse.ArgumentParser(add_help=False)
    change.add_argument("--dry-run", action="store_true", help="say what would change and write nothing")
    accept = "believe a held price that is still the same (repeatable)"
    change.add_argument("--accept", action="append", default=[], metavar="PROVIDER/MODEL", help=accept)

    prices = commands.add_parser("prices", help="read providers' prices, show them, import a list")
    actions = prices.add_subparsers(dest="action", required=True, metavar="ACTION")
    sync = actions.add_parser("sync", parents=[common, change], help="read the price lists that providers publish")
    sync.add_argument("--provider", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    show = actions.add_parser("show", parents=[common], help="cost, markup, price and age of what is sold")
    show.add_argument("model", nargs="*", metavar="MODEL")
    read = actions.add_parser("import", parents=[common, change], help="take a price list you vouch for")
    read.add_argument("source", metavar="FILE|example", help="in the catalog's form; example is the one that ships")
    prices.set_defaults(run=_prices)


def _add_accounts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, required=True, metavar="FILE", help="the node's configuration")
    common.add_argument("--json", action="store_true", help="one JSON object per line")
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("account", metavar="ACCOUNT", help="its id, or the name X-Trust calls it")
    limit = argparse.ArgumentParser(add_help=False)
    limit.add_argument("--trust-limit", metavar="USD", help="what a post-paid account may owe")

    accounts = commands.add_parser("accounts", help="customers without a channel")
    actions = accounts.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", parents=[common, limit], help="open an account")
    create.add_argument("trust", metavar="NAME", help="what X-Trust and tokens call it")
    create.add_argument("--kind", choices=["user", "organisation", "trust"], default="user")
    create.add_argument("--email")
    create.add_argument("--terms", choices=["prepaid", "postpaid"], default="prepaid")
    actions.add_parser("list", parents=[common], help="every account")
    verbs = {"show": "everything about one", "suspend": "refuse its requests", "resume": "serve it again"}
    for verb, words in verbs.items():
        actions.add_parser(verb, parents=[common, one], help=words)
    terms = actions.add_parser("terms", parents=[common, one, limit], help="whether it pays before or afterwards")
    terms.add_argument("terms", choices=["prepaid", "postpaid"])
    accounts.set_defaults(run=_accounts("accounts"))

    _add_keys(commands, common, one)

    credit = commands.add_parser("credits", help="what accounts have left; give and take credit")
    actions = credit.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("show", parents=[common, one], help="balance, held and available")
    for verb, words in {"grant": "give credit", "deduct": "take credit"}.items():
        action = actions.add_parser(verb, parents=[common, one], help=words)
        action.add_argument("amount", metavar="USD")
        action.add_argument("--reference", required=True, help="booked once under it, however often this is said")
    lines = actions.add_parser("transactions", parents=[common, one], help="its statement, the newest first")
    lines.add_argument("--limit", type=int, choices=range(1, 1001), default=100, metavar="N")
    compare = actions.add_parser("reconcile", parents=[common], help="compare Stripe's payments with the ledger")
    compare.add_argument("--days", type=int, choices=range(1, 91), default=3, metavar="N", help="back from now (3)")
    credit.set_defaults(run=_accounts("credit"))


def _add_keys(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
    one: argparse.ArgumentParser,
) -> None:
    keys = commands.add_parser("keys", help="the API keys of an account")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", parents=[common, one], help="make a key; its text is shown once")
    create.add_argument("--name")
    create.add_argument("--model", action="append", default=[], help="the only ones it may use (repeatable)")
    create.add_argument("--optimize", metavar="MODE", help="of model auto")
    create.add_argument("--strategy", help="cheapest, fastest or balanced")
    create.add_argument("--allow-external", action=argparse.BooleanOptionalAction)
    create.add_argument("--max-input-cents", type=int, metavar="N", help="per million tokens; with the other one")
    create.add_argument("--max-output-cents", type=int, metavar="N")
    for window in ("day", "month", "total"):
        create.add_argument(f"--{window}-cap", metavar="USD", help=f"most it may spend: {window}")
    for name in ("rpm", "tpm", "concurrency"):
        create.add_argument(f"--{name}", type=int, metavar="N")
    create.add_argument("--expires", metavar="TIME", help="RFC 3339")
    actions.add_parser("list", parents=[common, one], help="every key, ended ones too")
    revoke = actions.add_parser("revoke", parents=[common, one], help="end a key at once, on every node")
    revoke.add_argument("key", metavar="KEY", help="its id")
    rotate = actions.add_parser("rotate", parents=[common, one], help="put a new key in a key's place")
    rotate.add_argument("key", metavar="KEY", help="its id")
    rotate.add_argument("--overlap", type=int, default=86_400, metavar="SECONDS", help="both work (default a day)")
    keys.set_defaults(run=_accounts("keys"))


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser("doctor", help="look at everything a node needs, and say what to do")
    doctor.add_argument("--config", type=Path, required=True, metavar="FILE", help="the node's configuration")
    doctor.add_argument("--json", action="store_true", help="one JSON object per line")
    doctor.add_argument("--only", action="append", default=[], metavar="NAME", help="only this check (repeatable)")
    patience = "most one check may take (default 10)"
    doctor.add_argument("--timeout", type=int, choices=range(1, 301), default=10, metavar="S", help=patience)
    doctor.set_defaults(run=_doctor)


def _money(name: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        from mppnode.cli import money

        command: Callable[[argparse.Namespace], int] = getattr(money, name)
        return command(options)

    return run


def _accounts(name: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        from mppnode.cli import accounts

        command: Callable[[argparse.Namespace], int] = getattr(accounts, name)
        return command(options)

    return run


def _prices(options: argparse.Namespace) -> int:
    from mppnode.cli.prices import run

    return run(options)


def _doctor(options: argparse.Namespace) -> int:
    from mppnode.cli.doctor import doctor

    return doctor(options)


def _keep_signals() -> None:
    """Let signals wait until ``Orders`` listens: importing takes a second, in which a reload would end the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGTERM, signal.SIGINT))


def _serve(options: argparse.Namespace) -> int:
    _keep_signals()
    from mppnode.cli.serve import serve

    return serve(options.config, workers=options.workers, worker=options.worker)


def _watchtower(options: argparse.Namespace) -> int:
    _keep_signals()
    from mppnode.cli.serve import watchtower

    return watchtower(options.config)


def _demo(options: argparse.Namespace) -> int:
    from mppnode.cli.demo import run_demo

    return asyncio.run(run_demo(as_json=options.json))


def _devnet(options: argparse.Namespace) -> int:
    from mppnode.cli.serve import run_devnet

    network = run_devnet(
        port=options.port,
        tokens_per_second=options.tokens_per_second,
        listen=options.host,
        chain_port=options.chain_port,
    )
    return asyncio.run(network)


def _pay(options: argparse.Namespace) -> int:
    from mppnode.cli.pay import pay

    return asyncio.run(pay(options))


if __name__ == "__main__":
    sys.exit(main())
