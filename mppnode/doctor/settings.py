"""What the configuration alone tells: combinations that work and that an operator will regret."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Final

from channels.ids import Address, to_hex
from channels.signature import address_of
from mppnode.doctor.findings import Case, Check, Finding, fail, ledger_file, ok, skip, warn
from mppnode.doctor.machine import aside, nearest

_DISTINCT_MIN: Final = 10
"""Different bytes in 32 random ones: fewer than 25 is rare, below 10 somebody typed them."""
_PLACEHOLDER = re.compile(
    rb"change.?me|example|secret|password|placeholder|your.?key|0123456789|abcdef0123", re.IGNORECASE
)
_PUBLISHED: Final = frozenset(
    Address(bytes.fromhex(text))
    for text in (
        # The accounts of the mnemonic that development chains are started with, as their documentation prints them.
        "f39fd6e51aad88f6f4ce6ab8827279cfffb92266",
        "70997970c51812dc3a010c7d01b50e0d17dc79c8",
        "3c44cdddb6a900fa2b585dd299e03d12fa4293bc",
        "90f79bf6eb2c4f870365e785982e1f101e93b906",
        "15d34aaf54267db7d7c367839aaf71a00a2c6a65",
        "9965507d1a55bcc2695c58ba16fb37d819b0a4dc",
        "976ea74026e726554db657fa54763abd0c3a0aa9",
        "14dc79964da2c08b23698b3d3cc7ca32193d9955",
        "23618e81e3f5cdf7f54c3d65f7fbc0abf5b21e8f",
        "a0ee7a142d267c1f36714e4a8f75612f20a79720",
    )
)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


async def _config(case: Case, _: str) -> Finding:
    config = case.config
    return ok(f"no problem in the file; providers: {len(config.providers)}, models written down: {len(config.models)}")


async def _realm(case: Case, _: str) -> Finding:
    realm = case.config.node.realm
    host = realm.partition(":")[0].lower()
    if is_loopback(host) or re.fullmatch(r"[0-9.]+", host):
        return warn(
            f"{realm} is no public host name", "set node.realm to the name clients ask, such as api.example.com"
        )
    if "." not in host or host.endswith((".example", ".invalid", ".test", ".local")) or "example." in host:
        return warn(f"{realm} is no name of the internet", "set node.realm to the host name clients ask")
    return ok(realm)


async def _proxy(case: Case, _: str) -> Finding:
    node = case.config.node
    if is_loopback(node.host):
        return ok(f"listens on {node.host}: only a proxy of this machine can reach it")
    return warn(
        f"listens on {node.host} without TLS: credentials pass in the clear unless a proxy or private network is there",
        'set node.host = "127.0.0.1" and put a reverse proxy before it, or let a firewall admit the proxy only',
    )


async def _workers(case: Case, _: str) -> Finding:
    count = case.config.node.workers
    if count > 1 and ledger_file(case.config) is not None:
        return warn(
            f"{count} workers take turns writing one SQLite file",
            "point node.ledger at a PostgreSQL database, or set node.workers = 1",
        )
    return ok(f"{count} process" + ("es" if count > 1 else ""))


async def _spool(case: Case, _: str) -> Finding:
    spool, ledger = case.config.node.spool, ledger_file(case.config)
    if spool is None:
        return warn(
            "none: vouchers since the last backup are lost with the ledger", "set node.spool to a file on another disk"
        )
    machine = case.machine
    try:
        # A node makes the folder where it is missing.
        await aside(lambda: machine.sync_ms(nearest(spool.parent), case.clock))
    except OSError as error:
        return fail(
            f"its folder cannot be written: {error.strerror}", "let node.spool name a file in a folder the node owns"
        )
    if ledger is not None and await aside(lambda: machine.device(spool.parent) == machine.device(ledger)):
        return warn("is on the ledger's own device and is lost with it", "move node.spool to another disk")
    return ok("can be written" + ("" if ledger is None else ", and is on another device than the ledger"))


async def _admin(case: Case, _: str) -> Finding:
    admin = case.config.admin
    if admin is None:
        return warn(
            "off: accounts and keys can be managed by command only", "add [admin] with a token if a program shall do it"
        )
    if not is_loopback(admin.host):
        return warn(
            f"listens on {admin.host}: whoever has the token can give credit",
            'set admin.host = "127.0.0.1" or an address of a private network',
        )
    return ok(f"listens on {admin.host}, with a token of {len(admin.token.reveal())} characters")


async def _metrics(case: Case, _: str) -> Finding:
    metrics = case.config.metrics
    if metrics is None:
        return warn("off: nobody will be told when something breaks", "add [metrics] and let Prometheus read it")
    if not is_loopback(metrics.host):
        return warn(
            f"listens on {metrics.host}, where it asks for no token",
            'set metrics.host = "127.0.0.1", or let a firewall admit Prometheus only',
        )
    return ok(f"listens on {metrics.host}")


def _typed(secret: bytes) -> bool:
    """Whether somebody typed it or left it as they found it."""
    return len(set(secret)) < _DISTINCT_MIN or _PLACEHOLDER.search(secret) is not None


async def _secrets(case: Case, _: str) -> Finding:
    remedy = "make one with: openssl rand -hex 32"
    found = [secret.reveal() for secret in case.config.node.challenge_secrets]
    if any(_typed(secret) for secret in found):
        return fail("one of them is a placeholder: whoever guesses it can forge challenges", remedy)
    if len(set(found)) != len(found):
        return warn("one of them is there twice", "name each of node.challenge_secrets once")
    if len(found) > 2:  # noqa: PLR2004 - one that signs and one that is leaving
        return warn(f"{len(found)} verify", "drop those from node.challenge_secrets whose challenges have expired")
    return ok(f"{len(found)}, the shortest of {min(map(len, found))} bytes")


async def _payee_key(case: Case, _: str) -> Finding:
    key = case.config.chain.payee_key.reveal()
    payee = address_of(key)
    if payee in _PUBLISHED or len(set(key)) < _DISTINCT_MIN:
        return fail(
            f"{to_hex(payee)} has a key that is published or typed: anybody can take the money",
            "make a key of 32 random bytes for chain.payee_key: openssl rand -hex 32",
        )
    return ok(f"payee {to_hex(payee)}")


async def _jwks(case: Case, _: str) -> Finding:
    jwt = case.config.accounts.jwt
    if jwt is None or jwt.jwks_url is None:
        return skip("no accounts.jwt.jwks_url")
    try:
        from mppnode.accounts.bearer import parse_jwks
    except ModuleNotFoundError:
        return fail("the extra is not installed", "pip install 'mppnode[jwt]'")
    from mppnode.gateways.jwks import KeysUnavailable, jwks_fetcher, jwks_session

    async with jwks_session() as session:
        try:
            keys = parse_jwks(await jwks_fetcher(session, jwt.jwks_url)())
        except KeysUnavailable as away:
            return fail(str(away), "make accounts.jwt.jwks_url reachable from here")
        except ValueError:
            return fail("what is there is no key set", "correct accounts.jwt.jwks_url")
    if not keys:
        return fail("the set has no key that could sign a token", "correct accounts.jwt.jwks_url")
    return ok(f"{len(keys)} keys")


CHECKS: Final = (
    Check("config", "the file loads; every problem is a line of its own", _config),
    Check("realm", "`node.realm` is a host name of the internet, not an address or localhost", _realm),
    Check("proxy", "`node.host` is loopback, so that a proxy with TLS stands before it", _proxy),
    Check("workers", "several workers share a PostgreSQL ledger, not a SQLite file", _workers),
    Check("spool", "`node.spool` is set, can be written, and is on another device than the ledger", _spool),
    Check("admin", "`[admin]` is there and on loopback", _admin),
    Check("metrics", "`[metrics]` is there and on loopback", _metrics),
    Check("challenge-secrets", "one or two, each once, none a placeholder or typed", _secrets),
    Check("payee-key", "its address, and that the key is not published or typed", _payee_key),
    Check("jwks", "the issuer's keys can be read and are keys", _jwks),
)
"""In the order of the report."""
