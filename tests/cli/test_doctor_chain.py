"""What the doctor says of the chain: development chains that are well, late, poor, or not what they should be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from channels.abi import Dynamic, encode, selector
from channels.descriptor import SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import parse_address, to_hex
from channels.signature import address_of
from channels.units import Units
from mppnode.chain.devchain import DevChain
from mppnode.cli.devchain_server import start_devchain
from mppnode.cli.devnet import CHAIN_ID, PATH_USD, V1_ESCROW
from mppnode.doctor.chain import REGISTRY
from mppnode.doctor.findings import Status
from mppnode.kernel.clock import ManualClock
from tests.cli.doctor_kit import DEAD_URL, OTHER_TOKEN, PAYEE_KEY, Steps, case_of, config, look

PRIMARY, SECOND = "chain.rpc_url", "treasury.second_rpc_url"
PAYEE = address_of(PAYEE_KEY)
NOWHERE = parse_address("0x00000000000000000000000000000000000000ee", field="escrow")


@asynccontextmanager
async def running(chain: DevChain) -> AsyncIterator[str]:
    runner, url = await start_devchain(chain, "127.0.0.1", 0)
    try:
        yield url
    finally:
        await runner.cleanup()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def chain(clock):
    return DevChain(clock, chain_id=CHAIN_ID, v1_address=V1_ESCROW)


@pytest.fixture
async def url(chain):
    async with running(chain) as address:
        yield address


def answering(chain: DevChain, answers: dict[tuple[bytes, bytes], bytes]) -> None:
    """Let ``chain`` answer some calls, by contract and selector, as chains with more than escrows and balances do."""
    rest = chain._methods["eth_call"]

    def call(params):
        data = bytes.fromhex(params[0]["data"][2:])
        said = answers.get((bytes.fromhex(params[0]["to"][2:]), data[:4]))
        return rest(params) if said is None else to_hex(said)

    chain._methods["eth_call"] = call


async def test_a_chain_node_that_follows(chain, clock, url):
    """Its id, height, age and speed are told; an old block is a warning, then a failure."""
    what = config(chain={"rpc_url": url})
    found = await look("rpc", what, PRIMARY, clock=clock)
    assert (found.status, found.text) == (Status.OK, f"chain {CHAIN_ID}, block {chain.head} is 0 s old, answers in 0 ms")
    chain.halt()
    for age_s, status in ((20, Status.WARN), (50, Status.FAIL)):
        clock.advance(age_s)
        found = await look("rpc", what, PRIMARY, clock=clock)
        assert found.status is status
        assert PRIMARY in found.remedy


async def test_a_chain_node_that_is_slow(chain, url):
    """An answer that takes two seconds is told with its milliseconds."""
    slow = Steps(2.0)
    chain._clock = slow
    found = await look("rpc", config(chain={"rpc_url": url}), PRIMARY, clock=slow)
    assert found.status is Status.WARN
    assert "2000 ms" in found.text


async def test_a_chain_node_of_another_chain(url, clock):
    """Signing for the wrong chain would be expensive."""
    found = await look("rpc", config(chain={"rpc_url": url, "chain_id": 4217}), PRIMARY, clock=clock)
    assert found.status is Status.FAIL
    assert f"serves chain {CHAIN_ID}" in found.text
    skipped = await look("payee-balance", config(chain={"rpc_url": url, "chain_id": 4217}), clock=clock)
    assert skipped.status is Status.SKIP


async def test_a_dead_chain_node_is_one_failure(clock):
    """What needs it is skipped and points to the one line that failed."""
    what = config(session={"protocols": (SessionProtocol.V2, SessionProtocol.V1)})
    assert (await look("rpc", what, PRIMARY, clock=clock)).status is Status.FAIL
    for name, subject in (("clock", ""), ("escrow", "v2"), ("escrow", "v1"), ("token", ""), ("payee-balance", "")):
        found = await look(name, what, subject, clock=clock)
        assert found.status is Status.SKIP
        assert "see rpc" in found.text


async def test_two_chain_nodes(chain, clock, url):
    """One is a warning, two that are far apart are one, two that agree are well."""
    found = await look("rpc-heights", config(chain={"rpc_url": url}), clock=clock)
    assert found.status is Status.WARN
    assert SECOND in found.remedy
    other = DevChain(clock, chain_id=CHAIN_ID)
    async with running(other) as second:
        what = config(chain={"rpc_url": url}, treasury={"second_rpc_url": second})
        assert (await look("rpc", what, SECOND, clock=clock)).status is Status.OK
        assert (await look("rpc-heights", what, clock=clock)).status is Status.OK
        for _ in range(30):
            chain.handle({"method": "evm_mine", "params": []})
        apart = await look("rpc-heights", what, clock=clock)
        assert (apart.status, apart.text) == (Status.WARN, "30 blocks apart")
        assert SECOND in apart.remedy
    assert (await look("rpc-heights", what, clock=clock)).status is Status.SKIP


async def test_a_clock_that_is_slow(chain, clock, url):
    """A block from our future says that we are late."""
    what = config(chain={"rpc_url": url})
    assert (await look("clock", what, clock=clock)).status is Status.OK
    for more_s, status in ((10, Status.WARN), (50, Status.FAIL)):
        chain.travel(more_s)
        found = await look("clock", what, clock=clock)
        assert found.status is status
        assert "set-ntp" in found.remedy
    assert "60 s behind" in found.text


async def test_escrows(chain, clock, url):
    """Both escrows answer; an address without one does not."""
    both = {"protocols": (SessionProtocol.V2, SessionProtocol.V1)}
    what = config(chain={"rpc_url": url}, session=both)
    assert (await look("escrow", what, "v2", clock=clock)).status is Status.OK
    assert (await look("escrow", what, "v1", clock=clock)).status is Status.OK
    found = await look("escrow", config(chain={"rpc_url": url, "v1_escrow": NOWHERE}, session=both), "v1", clock=clock)
    assert found.status is Status.FAIL
    assert "chain.v1_escrow" in found.remedy


async def test_the_token(chain, clock, url):
    """Six decimals, a name, and a policy that lets the payee receive, as far as they can be read."""
    what = config(chain={"rpc_url": url})
    bare = await look("token", what, clock=clock)
    assert (bare.status, bare.text) == (Status.OK, "symbol unknown, 6 decimals; its transfer policy cannot be read")
    answers = {
        (bytes(PATH_USD), selector("symbol()")): encode(Dynamic(b"pathUSD")),
        (bytes(PATH_USD), selector("transferPolicyId()")): encode(7),
        (bytes(REGISTRY), selector("isAuthorized(uint64,address)")): encode(1),
    }
    answering(chain, answers)
    older = await look("token", what, clock=clock)
    assert (older.status, older.text) == (Status.OK, "pathUSD, 6 decimals; its transfer policy lets the payee receive")
    answers[bytes(REGISTRY), selector("isAuthorizedRecipient(uint64,address)")] = encode(0)
    refused = await look("token", what, clock=clock)
    assert refused.status is Status.FAIL
    assert to_hex(PAYEE) in refused.text
    answers[bytes(PATH_USD), selector("symbol()")] = encode(Dynamic(b"\x1b[31mevil"))
    answers[bytes(REGISTRY), selector("isAuthorizedRecipient(uint64,address)")] = encode(1)
    assert "symbol unreadable" in (await look("token", what, clock=clock)).text
    answers[bytes(PATH_USD), selector("decimals()")] = encode(18)
    wrong = await look("token", what, clock=clock)
    assert wrong.status is Status.FAIL
    assert "18 decimals" in wrong.text
    answers[bytes(PATH_USD), selector("decimals()")] = b""
    assert (await look("token", what, clock=clock)).status is Status.FAIL


async def test_how_many_settlements_the_payee_can_pay_for(chain, clock, url):
    """Below fifty is a warning and below five a failure, with the address to send to."""
    what = config(chain={"rpc_url": url})
    async with case_of(what, clock=clock) as case:
        fee = await case.chain(url).fee_units(250_000)
    held = 0
    for settlements, status in ((4, Status.FAIL), (5, Status.WARN), (49, Status.WARN), (50, Status.OK)):
        chain.fund(PAYEE, Units(settlements * fee - held))
        held = settlements * fee
        found = await look("payee-balance", what, clock=clock)
        assert found.status is status
        assert f"pay for {settlements} settlements" in found.text
        assert status is Status.OK or to_hex(PAYEE) in found.remedy
    poor = await look("payee-balance", config(chain={"rpc_url": url, "fee_token": OTHER_TOKEN}), clock=clock)
    assert poor.status is Status.FAIL


async def test_sponsoring(chain, clock, url):
    """Who pays payers' fees has an hour's budget, or at least one fee."""
    assert (await look("sponsor", config(chain={"rpc_url": url}), clock=clock)).status is Status.SKIP
    terms = {"sponsor": True, "sponsor_fee_max": Units(50_000), "sponsor_budget": Units(1_000_000)}
    what = config(chain={"rpc_url": url}, treasury=terms)
    for more, status in ((0, Status.FAIL), (50_000, Status.WARN), (950_000, Status.OK)):
        chain.fund(PAYEE, Units(more))
        found = await look("sponsor", what, clock=clock)
        assert found.status is status
        assert status is Status.OK or "treasury.sponsor_budget" in found.remedy


async def test_a_view_is_read_or_refused(chain, clock, url):
    """The chain adapter gives a view's words, and a fault where nothing answers."""
    async with case_of(config(chain={"rpc_url": url}), clock=clock) as case:
        assert await case.chain(url).view(PATH_USD, selector("decimals()")) == encode(6)
        for where, address in ((url, selector("symbol()")), (DEAD_URL, selector("decimals()"))):
            with pytest.raises(ChannelFault) as caught:
                await case.chain(where).view(PATH_USD, address)
            assert caught.value.reason is Reason.CHAIN_UNAVAILABLE
