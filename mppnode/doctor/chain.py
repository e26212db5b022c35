"""The chain: its nodes, the contracts the node relies on, and the money that pays for settlements."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Final

from channels.abi import Words, encode, selector
from channels.descriptor import SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import Address, ChannelId, to_hex
from channels.signature import address_of
from channels.units import Units, format_decimal
from mppnode.config.schema import Config
from mppnode.doctor.findings import Case, Check, Finding, fail, ok, skip, warn
from mppnode.parts import escrows_of
from mppnode.treasury.treasurer import TreasuryPolicy

REGISTRY: Final = Address(bytes.fromhex("403c000000000000000000000000000000000000"))
"""Where transfer policies are kept. Source: TIP-403 specification."""
_DECIMALS: Final = selector("decimals()")
_SYMBOL: Final = selector("symbol()")
_POLICY: Final = selector("transferPolicyId()")
_MAY_RECEIVE: Final = selector("isAuthorizedRecipient(uint64,address)")
_MAY: Final = selector("isAuthorized(uint64,address)")
_SYMBOL_MAX: Final = 32
_SYMBOL_SHAPE = re.compile(rb"[A-Za-z0-9.$_-]{1,32}")

_PRIMARY: Final = "chain.rpc_url"
_SECOND: Final = "treasury.second_rpc_url"
_AGE_WARN_S: Final = 15
"""Blocks come twice a second; a payer's deposit that is this late has already been refused by an impatient client."""
_AGE_FAIL_S: Final = 60
"""From here on the treasury is blind: the same minute after which the node says so itself."""
_APART_WARN: Final = 20
"""Blocks between two nodes, ten seconds: with more, deposits wait for the slower one."""
_SLOW_MS: Final = 1_000
"""Of one answer: an open needs several, and a payer waits for it."""
_AHEAD_WARN_S: Final = 2
_AHEAD_FAIL_S: Final = 30  # what docs/operations.md allows clocks to differ
_SETTLEMENTS_WARN: Final = 50
_SETTLEMENTS_FAIL: Final = 5
_TOKEN_DECIMALS: Final = 6


def _urls(config: Config) -> tuple[str, ...]:
    return (_PRIMARY,) if config.treasury.second_rpc_url is None else (_PRIMARY, _SECOND)


def _url(config: Config, key: str) -> str:
    second = config.treasury.second_rpc_url
    return config.chain.rpc_url if key == _PRIMARY or second is None else second


async def _rpc(case: Case, key: str) -> Finding:
    chain, before = case.chain(_url(case.config, key)), case.clock.monotonic()
    try:
        found = await chain.chain_id()
        took_ms = round((case.clock.monotonic() - before) * 1000)
        head = await chain.head()
    except ChannelFault as fault:
        return fail(f"no usable answer to {fault.field}", f"correct {key}, or find out why that node is away")
    if found != case.config.chain.chain_id:
        return fail(
            f"serves chain {found}, but chain.chain_id is {case.config.chain.chain_id}",
            f"correct {key} or chain.chain_id: a node signs for no other chain",
        )
    age = case.clock.now() - head.timestamp
    text = f"chain {found}, block {head.number} is {max(age, 0)} s old, answers in {took_ms} ms"
    if age > _AGE_FAIL_S:
        return fail(text, f"let {key} name a node that follows the chain, and compare this machine's clock")
    if age > _AGE_WARN_S:
        return warn(text, f"see whether the chain stands still or the node behind {key} is behind")
    if took_ms > _SLOW_MS:
        return warn(text, f"let {key} name a node that is nearer")
    return ok(text)


async def _heights(case: Case, _: str) -> Finding:
    second = case.config.treasury.second_rpc_url
    if second is None:
        return warn(
            "one chain node is believed alone about every deposit",
            "set treasury.second_rpc_url to a node of somebody else's",
        )
    try:
        one = await case.chain(case.config.chain.rpc_url).head()
        other = await case.chain(second).head()
    except ChannelFault:
        return skip("one of them does not answer: see rpc")
    apart = abs(one.number - other.number)
    text = f"{apart} blocks apart"
    if apart > _APART_WARN:
        behind = _SECOND if other.number < one.number else _PRIMARY
        return warn(text, f"replace the node behind {behind}: deposits wait for the slower one")
    return ok(text)


def _with_chain(look: Callable[[Case], Awaitable[Finding]]) -> Callable[[Case, str], Awaitable[Finding]]:
    """A look that needs a chain node: a dead one is one failure, not one per check."""

    async def looked(case: Case, _: str) -> Finding:
        chain = case.chain(case.config.chain.rpc_url)
        try:
            if await chain.chain_id() != case.config.chain.chain_id:
                return skip("chain.rpc_url serves another chain: see rpc")
        except ChannelFault:
            return skip("chain.rpc_url does not answer: see rpc")
        return await look(case)

    return looked


async def _clock(case: Case) -> Finding:
    ahead = (await case.chain(case.config.chain.rpc_url).head()).timestamp - case.clock.now()
    remedy = "synchronise this machine's clock: timedatectl set-ntp true"
    if ahead > _AHEAD_WARN_S:
        text = f"is at least {ahead} s behind the chain's newest block"
        return fail(text, remedy) if ahead > _AHEAD_FAIL_S else warn(text, remedy)
    return ok(f"{-ahead} s after the chain's newest block" if ahead < 0 else "agrees with the chain's newest block")


async def _escrow(case: Case, protocol: str) -> Finding:
    escrow = next(each for each in escrows_of(case.config) if each.protocol.value == protocol)
    try:
        await case.chain(case.config.chain.rpc_url).channel_state(escrow, ChannelId(bytes(32)))
    except ChannelFault:
        key = "chain.v1_escrow" if escrow.protocol is SessionProtocol.V1 else "chain.rpc_url"
        return fail(
            f"{to_hex(escrow.address)} does not answer as an escrow",
            f"correct {key}, or leave {protocol} out of session.protocols",
        )
    return ok(f"{to_hex(escrow.address)} answers")


def _escrow_of(protocol: str) -> Callable[[Case], Awaitable[Finding]]:
    async def look(case: Case) -> Finding:
        return await _escrow(case, protocol)

    return look


async def _each_escrow(case: Case, protocol: str) -> Finding:
    return await _with_chain(_escrow_of(protocol))(case, protocol)


async def _token(case: Case) -> Finding:
    config = case.config.chain
    chain, payee = case.chain(config.rpc_url), address_of(config.payee_key.reveal())
    try:
        decimals = _word(await chain.view(config.token, _DECIMALS), "decimals")
    except ChannelFault:
        return fail(f"{to_hex(config.token)} does not answer as a token", "correct chain.token")
    if decimals != _TOKEN_DECIMALS:
        return fail(f"has {decimals} decimals, and every amount here has 6", "let chain.token name a TIP-20 token")
    try:
        symbol = _symbol(await chain.view(config.token, _SYMBOL))
    except ChannelFault:
        symbol = "symbol unknown"
    may = await _may_receive(case, payee)
    if may is False:
        return fail(
            f"{symbol}: its transfer policy does not let {to_hex(payee)} receive",
            "ask the token's issuer to admit the payee, or choose another chain.token",
        )
    policy = "its transfer policy cannot be read" if may is None else "its transfer policy lets the payee receive"
    return ok(f"{symbol}, 6 decimals; {policy}")


async def _may_receive(case: Case, payee: Address) -> bool | None:
    """Whether the token's policy lets the payee receive; None when it cannot be read. Source: TIP-403, TIP-1015."""
    chain = case.chain(case.config.chain.rpc_url)
    try:
        policy = _word(await chain.view(case.config.chain.token, _POLICY), "transferPolicyId")
    except ChannelFault:
        return None
    for question in (_MAY_RECEIVE, _MAY):  # chains from before policies had sides know the second only
        try:
            return _word(await chain.view(REGISTRY, question + encode(policy, payee)), "policy") == 1
        except ChannelFault:
            continue
    return None


def _word(reply: bytes, field: str) -> int:
    words = Words(reply, heads=1, field=field, reason=Reason.CHAIN_UNAVAILABLE)
    value = words.uint(256)
    words.end()
    return value


def _symbol(reply: bytes) -> str:
    words = Words(reply, heads=1, field="symbol", reason=Reason.CHAIN_UNAVAILABLE)
    text = words.dynamic(length_max=_SYMBOL_MAX)
    return text.decode("ascii") if _SYMBOL_SHAPE.fullmatch(text) else "symbol unreadable"


async def _balance(case: Case) -> Finding:
    config = case.config.chain
    chain, payee = case.chain(config.rpc_url), address_of(config.payee_key.reveal())
    try:
        fee = max(int(await chain.fee_units(TreasuryPolicy().settle_gas)), 1)
        balance = await chain.balance_of(config.fee_token, payee)
    except ChannelFault as fault:
        return fail(f"cannot be read: no usable answer to {fault.field}", "correct chain.fee_token")
    count = balance // fee
    text = f"{format_decimal(balance)} USD pay for {count} settlements at {format_decimal(Units(fee))} USD each"
    remedy = f"send fee tokens ({to_hex(config.fee_token)}) to {to_hex(payee)}"
    if count < _SETTLEMENTS_FAIL:
        return fail(text, remedy)
    return warn(text, remedy) if count < _SETTLEMENTS_WARN else ok(text)


async def _sponsor(case: Case) -> Finding:
    terms, config = case.config.treasury, case.config.chain
    payee = address_of(config.payee_key.reveal())
    try:
        balance = await case.chain(config.rpc_url).balance_of(config.fee_token, payee)
    except ChannelFault:
        return fail("its balance cannot be read", "correct chain.fee_token")
    budget = format_decimal(terms.sponsor_budget)
    text = f"{format_decimal(balance)} USD for {budget} USD of payers' fees an hour"
    remedy = f"send fee tokens to {to_hex(payee)}, or lower treasury.sponsor_budget"
    if balance < terms.sponsor_fee_max:
        return fail(text, remedy)
    return warn(text, remedy) if balance < terms.sponsor_budget else ok(text)


async def _sponsoring(case: Case, subject: str) -> Finding:
    if not case.config.treasury.sponsor:
        return skip("treasury.sponsor is off")
    return await _with_chain(_sponsor)(case, subject)


def _protocols(config: Config) -> tuple[str, ...]:
    return tuple(escrow.protocol.value for escrow in escrows_of(config))


CHECKS: Final = (
    Check(
        "rpc",
        f"each chain node serves `chain.chain_id`, answers within {_SLOW_MS} ms (warn), and its newest block is younger"
        f" than {_AGE_WARN_S} s (warn) and {_AGE_FAIL_S} s (fail)",
        _rpc,
        _urls,
    ),
    Check("rpc-heights", f"there are two chain nodes, at most {_APART_WARN} blocks apart", _heights),
    Check(
        "clock",
        f"ours is behind the newest block by no more than {_AHEAD_WARN_S} s (warn) and {_AHEAD_FAIL_S} s (fail)",
        _with_chain(_clock),
    ),
    Check("escrow", "each escrow of `session.protocols` answers", _each_escrow, _protocols),
    Check("token", "`chain.token` has 6 decimals, and its transfer policy lets the payee receive", _with_chain(_token)),
    Check(
        "payee-balance",
        f"the payee's fee tokens pay for {_SETTLEMENTS_WARN} settlements (warn) or {_SETTLEMENTS_FAIL} (fail)",
        _with_chain(_balance),
    ),
    Check(
        "sponsor",
        "where `treasury.sponsor` is on: the balance covers an hour's budget (warn) and one fee (fail)",
        _sponsoring,
    ),
)
"""In the order of the report."""
