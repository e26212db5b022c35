"""The ABI reader accepts exactly the canonical spelling (T-18)."""

import eth_abi
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channels import escrow, escrow_v1, tip20
from channels.abi import Dynamic, Log, Words, encode
from channels.descriptor import RESERVE_ADDRESS, Descriptor, Escrow, SessionProtocol
from channels.faults import ChannelFault, Reason
from channels.ids import ZERO_ADDRESS, Address, ChannelId, Hash32
from channels.units import Units

ADDRESSES = st.binary(min_size=20, max_size=20).map(Address)
HASHES = st.binary(min_size=32, max_size=32).map(Hash32)
AMOUNTS = st.integers(min_value=0, max_value=2**96 - 1).map(Units)
DESCRIPTORS = st.builds(Descriptor, ADDRESSES, ADDRESSES, ADDRESSES, ADDRESSES, HASHES, ADDRESSES, HASHES)
V2 = Escrow(SessionProtocol.V2, 1, RESERVE_ADDRESS)
V1 = Escrow(SessionProtocol.V1, 1, Address(b"\xe1" * 20))


@given(ADDRESSES, st.integers(min_value=0, max_value=2**256 - 1), HASHES, st.binary(max_size=200), st.binary(max_size=70))
def test_encoding_agrees_with_eth_abi(address, number, word, one, two):
    """Static words and two tails encode as the independent encoder has them, and read back."""
    data = encode(address, number, Dynamic(one), word, Dynamic(two))
    assert data == eth_abi.encode(["address", "uint256", "bytes", "bytes32", "bytes"], [address, number, one, word, two])
    words = Words(data, heads=5, field="data")
    assert (words.address(), words.uint(256), words.dynamic(length_max=200)) == (address, number, one)
    assert (words.hash32(), words.dynamic(length_max=70)) == (word, two)
    words.end()


OPEN = escrow.encode_open(
    escrow.OpenCall(Address(b"\1" * 20), ZERO_ADDRESS, Address(b"\2" * 20), Units(7), Hash32(b"\3" * 32), ZERO_ADDRESS)
)


def _flip(data, index, value):
    return data[:index] + bytes((value,)) + data[index + 1 :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        OPEN[:3],
        OPEN[:-1],
        OPEN + b"\0",
        OPEN + bytes(32),
        _flip(OPEN, 0, 0),
        _flip(OPEN, 4, 1),  # dirty upper byte of the payee
        _flip(OPEN, 4 + 96 + 19, 1),  # a deposit of 2**96
        escrow_v1.encode_open(
            escrow_v1.OpenCall(Address(b"\1" * 20), Address(b"\2" * 20), Units(7), Hash32(b"\3" * 32), ZERO_ADDRESS)
        ),
    ],
)
def test_any_other_open_is_refused(data):
    """Short, long, dirty, oversized or foreign calldata is a rejected transaction, not a different open."""
    with pytest.raises(ChannelFault) as caught:
        escrow.decode_open(data)
    assert (caught.value.reason, caught.value.field) == (Reason.TRANSACTION_REJECTED, "transaction")


@given(st.integers(min_value=0, max_value=len(OPEN) - 1), st.integers(min_value=0, max_value=255))
def test_what_decodes_encodes_back(index, value):
    """For any one-byte change, calldata is refused or re-encodes to itself: there is one spelling per meaning."""
    data = _flip(OPEN, index, value)
    try:
        assert escrow.encode_open(escrow.decode_open(data)) == data
    except ChannelFault as fault:
        if fault.reason is not Reason.TRANSACTION_REJECTED:
            raise


@pytest.mark.parametrize(
    "tail",
    [
        (64).to_bytes(32) + (3).to_bytes(32) + b"abc" + bytes(29),  # points past its place
        (0).to_bytes(32) + (3).to_bytes(32) + b"abc" + bytes(29),  # points into the head
        (32).to_bytes(32) + (3).to_bytes(32) + b"abc" + bytes(28) + b"\1",  # dirty padding
        (32).to_bytes(32) + (3).to_bytes(32) + b"abc",  # no padding
        (32).to_bytes(32) + (2**255).to_bytes(32) + bytes(32),  # absurd length
        (32).to_bytes(32),  # no length
    ],
)
def test_dynamic_values_have_one_place(tail):
    """A bytes value anywhere but at the end of the previous tail, or badly padded, is refused."""
    with pytest.raises(ChannelFault):
        Words(tail, heads=1, field="data").dynamic(length_max=64)


def test_booleans_are_zero_or_one():
    """A word of 2 is no boolean."""
    with pytest.raises(ChannelFault):
        Words((2).to_bytes(32), heads=1, field="data").bool()


EVENTS = st.one_of(
    st.builds(escrow.ToppedUp, HASHES, ADDRESSES, ADDRESSES, AMOUNTS, AMOUNTS),
    st.builds(escrow.Settled, HASHES, ADDRESSES, ADDRESSES, AMOUNTS, AMOUNTS, AMOUNTS),
    st.builds(escrow.ChannelClosed, HASHES, ADDRESSES, ADDRESSES, AMOUNTS, AMOUNTS),
    st.builds(escrow.CloseRequested, HASHES, ADDRESSES, ADDRESSES, st.integers(min_value=0, max_value=2**64 - 1)),
    st.builds(escrow.CloseRequestCancelled, HASHES, ADDRESSES, ADDRESSES),
)


@given(st.lists(EVENTS, max_size=4), st.builds(escrow.ChannelOpened, HASHES, DESCRIPTORS, AMOUNTS))
def test_events_read_back(events, opened):
    """Every event survives its log on both escrows, and neither escrow reads the other's logs."""
    v1_opened = escrow.ChannelOpened(
        opened.channel_id,
        Descriptor(
            opened.descriptor.payer, opened.descriptor.payee, ZERO_ADDRESS, opened.descriptor.token,
            opened.descriptor.salt, opened.descriptor.authorized_signer, Hash32(bytes(32)),
        ),
        opened.deposit,
    )  # fmt: skip
    v2_logs = [escrow.encode_event(V2, event) for event in [opened, *events]]
    v1_logs = [escrow_v1.encode_event(V1, event) for event in [v1_opened, *events]]
    assert escrow.decode_events(V2, v1_logs + v2_logs) == [opened, *events]
    assert escrow_v1.decode_events(V1, v2_logs + v1_logs) == [v1_opened, *events]


def test_a_v1_topic_on_the_reserve_is_no_event():
    """The same event name with v1's types has another topic and is skipped, not misread."""
    log = escrow_v1.encode_event(V1, escrow.Settled(ChannelId(bytes(32)), ZERO_ADDRESS, ZERO_ADDRESS, Units(1), Units(1), Units(1)))
    assert escrow.decode_events(V2, [Log(V2.address, log.topics, log.data)]) == []
    assert escrow.decode_events(V2, [Log(V2.address, (), b"")]) == []


def test_a_malformed_log_of_our_escrow_is_the_nodes_fault():
    """A known topic with missing indexed values or a wrong body is an unavailable chain, not a payer's mistake."""
    log = escrow.encode_event(V2, escrow.ToppedUp(ChannelId(bytes(32)), ZERO_ADDRESS, ZERO_ADDRESS, Units(1), Units(1)))
    for broken in (Log(V2.address, log.topics[:3], log.data), Log(V2.address, log.topics, log.data + b"\0")):
        with pytest.raises(ChannelFault) as caught:
            escrow.decode_events(V2, [broken])
        assert caught.value.reason is Reason.CHAIN_UNAVAILABLE


def test_transfer_events():
    """T-77: a transfer with memo is two logs of the token; another token's logs are skipped."""
    token, payer, payee = Address(b"\x20" * 20), Address(b"\1" * 20), Address(b"\2" * 20)
    plain = tip20.Transferred(token, payer, payee, 2**200)
    memo = tip20.Transferred(token, payer, payee, 5, Hash32(b"\x09" * 32))
    foreign = tip20.Transferred(Address(b"\x21" * 20), payer, payee, 5)
    logs = [tip20.encode_event(event) for event in (plain, foreign, memo)]
    assert tip20.decode_transfers(token, logs) == [plain, memo]
    with pytest.raises(ChannelFault):
        tip20.decode_transfers(token, [Log(token, logs[2].topics[:3], logs[2].data)])


@given(ADDRESSES, AMOUNTS, st.none() | HASHES)
def test_transfers_read_back(to, amount, memo):
    """Both transfer functions decode to what was encoded."""
    call = tip20.TransferCall(to, amount, memo)
    assert tip20.decode_transfer(tip20.encode_transfer(call)) == call


def test_balances_beyond_uint96_are_clamped():
    """A development token may mint 2**256 - 1; we only need to know that it is enough."""
    assert tip20.decode_balance((2**256 - 1).to_bytes(32)) == 2**96 - 1
    assert tip20.decode_balance((7).to_bytes(32)) == 7
    with pytest.raises(ChannelFault):
        tip20.decode_balance(b"")
