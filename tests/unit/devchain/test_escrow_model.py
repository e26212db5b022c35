"""The judging model itself: money is conserved, a revert leaves nothing, and the past can be read."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels import escrow as v2
from channels import escrow_v1 as v1
from channels import tip20
from channels.descriptor import CLOSE_GRACE_S, RESERVE_ADDRESS
from channels.ids import ZERO_ADDRESS, Address, Hash32
from channels.signature import address_of
from channels.tempo_tx import Call
from channels.testing.escrow_model import Context, EscrowModel, EscrowRevert
from channels.units import Units
from channels.voucher import VoucherDomain, derive_channel_id

PAYER_KEY = b"\x11" * 32
PAYER, PAYEE = address_of(PAYER_KEY), address_of(b"\x22" * 32)
TOKEN, V1_ADDRESS = Address(b"\x20" * 20), Address(b"\xe1" * 20)
SALT, SUPPLY, DEPOSIT = Hash32(b"\x07" * 32), 1_000, Units(600)
HOLDERS = (PAYER, PAYEE, RESERVE_ADDRESS, V1_ADDRESS)


class World:
    """One v2 and one v1 channel of the same parties, driven by calldata."""

    def __init__(self):
        self.model = EscrowModel(chain_id=1, v1_address=V1_ADDRESS)
        self.model.mint(TOKEN, PAYER, 2 * SUPPLY)
        self.now, self.nonce = 1_900_000_000, 0
        open_v2 = v2.OpenCall(PAYEE, ZERO_ADDRESS, TOKEN, DEPOSIT, SALT, ZERO_ADDRESS)
        (_,), (_, log) = self.run(PAYER, Call(RESERVE_ADDRESS, v2.encode_open(open_v2)))
        (opened,) = v2.decode_events(self.model.reserve.escrow, [log])
        self.descriptor, self.v2_id = opened.descriptor, opened.channel_id
        open_v1 = v1.OpenCall(PAYEE, TOKEN, DEPOSIT, SALT, ZERO_ADDRESS)
        approve = tip20.encode_approve(tip20.ApproveCall(V1_ADDRESS, 2**256 - 1))
        self.run(PAYER, Call(TOKEN, approve), Call(V1_ADDRESS, v1.encode_open(open_v1)))
        self.v1_id = derive_channel_id(self.model.streams.escrow, open_v1.descriptor(PAYER))

    def run(self, sender, *calls, commit=True):
        self.model.journal.block += 1
        self.nonce += 1
        context = Context(sender, self.now, Hash32(self.nonce.to_bytes(32)), self.model.journal.block)
        return self.model.run(context, calls, commit=commit)

    def balances(self):
        return {owner: self.model.tokens.balances[TOKEN, owner] for owner in HOLDERS}

    def calldata(self, name, amount, capture):
        on_v2, on_v1 = VoucherDomain(self.model.reserve.escrow), VoucherDomain(self.model.streams.escrow)
        signed_v2 = on_v2.sign(self.v2_id, amount, PAYER_KEY)
        signed_v1 = on_v1.sign(self.v1_id, amount, PAYER_KEY)
        d, units = self.descriptor, Units(amount)
        return {
            "v2 topUp": (RESERVE_ADDRESS, v2.encode_top_up(v2.TopUpCall(d, units))),
            "v2 settle": (RESERVE_ADDRESS, v2.encode_settle(d, units, signed_v2)),
            "v2 close": (RESERVE_ADDRESS, v2.encode_close(d, units, Units(capture), signed_v2)),
            "v2 requestClose": (RESERVE_ADDRESS, v2.encode_request_close(d)),
            "v2 withdraw": (RESERVE_ADDRESS, v2.encode_withdraw(d)),
            "v1 topUp": (V1_ADDRESS, v1.encode_top_up(v1.TopUpCall(self.v1_id, units))),
            "v1 settle": (V1_ADDRESS, v1.encode_settle(self.v1_id, units, signed_v1)),
            "v1 close": (V1_ADDRESS, v1.encode_close(self.v1_id, units, signed_v1)),
            "v1 requestClose": (V1_ADDRESS, v1.encode_request_close(self.v1_id)),
            "v1 withdraw": (V1_ADDRESS, v1.encode_withdraw(self.v1_id)),
        }[name]


NAMES = [f"{version} {name}" for version in ("v1", "v2") for name in ("topUp", "settle", "close", "requestClose", "withdraw")]
STEPS = st.tuples(
    st.sampled_from(NAMES),
    st.sampled_from([PAYER, PAYEE]),
    st.integers(min_value=0, max_value=900),
    st.integers(min_value=0, max_value=900),
    st.sampled_from([0, 1, CLOSE_GRACE_S]),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=12))
def test_money_is_conserved_and_reverts_leave_nothing(steps):
    """Whatever is called in whatever order, the supply is constant, escrows hold their deposits, reverts change nothing."""
    world = World()
    for name, sender, amount, capture, passed, commit in steps:
        world.now += passed
        before = world.balances()
        to, data = world.calldata(name, amount, capture)
        done = True
        try:
            world.run(sender, Call(to, data), commit=commit)
        except EscrowRevert:
            done = False
        after = world.balances()
        if not (done and commit):
            assert after == before
        assert sum(after.values()) == 2 * SUPPLY
        slot = world.model.reserve.slots[world.v2_id]
        state = world.model.streams.channels[world.v1_id]
        assert after[RESERVE_ADDRESS] == slot.deposit - slot.settled
        assert after[V1_ADDRESS] == state.deposit - state.settled


def test_the_payee_never_gets_more_than_signed():
    """T-26: settle then close with a higher voucher pays the capture in total, however the calls interleave with top-ups."""
    world = World()
    world.run(PAYEE, Call(*world.calldata("v2 settle", 100, 0)))
    world.run(PAYER, Call(*world.calldata("v2 topUp", 50, 0)))
    world.run(PAYEE, Call(*world.calldata("v2 close", 400, 250)))
    assert world.balances()[PAYEE] == 250
    with pytest.raises(EscrowRevert) as caught:
        world.run(PAYEE, Call(*world.calldata("v2 settle", 500, 0)))
    assert caught.value.name == "ChannelNotFound"


def test_a_second_open_of_one_channel_reverts():
    """Opening the same v1 channel twice, even after it was closed, is refused."""
    world = World()
    again = Call(V1_ADDRESS, v1.encode_open(v1.OpenCall(PAYEE, TOKEN, DEPOSIT, SALT, ZERO_ADDRESS)))
    for _ in range(2):
        with pytest.raises(EscrowRevert) as caught:
            world.run(PAYER, again)
        assert caught.value.name == "ChannelAlreadyExists"
        if not world.model.streams.channels[world.v1_id].finalized:
            world.run(PAYEE, Call(*world.calldata("v1 close", 0, 0)))


@pytest.mark.parametrize("change", [{"payee": ZERO_ADDRESS}, {"deposit": Units(0)}, {"deposit": Units(10**9)}])
def test_opens_that_revert(change):
    """No payee, no deposit, or more than the balance opens nothing."""
    world = World()
    before = world.balances()
    call = dataclasses.replace(v2.OpenCall(PAYEE, ZERO_ADDRESS, TOKEN, DEPOSIT, SALT, ZERO_ADDRESS), **change)
    with pytest.raises(EscrowRevert):
        world.run(PAYER, Call(RESERVE_ADDRESS, v2.encode_open(call)))
    assert world.balances() == before


def test_history_shows_every_block():
    """A value read at a block is the one at that block's end, also after an undone write in between."""
    world = World()
    cells = world.model.tokens.balances
    block = world.model.journal.block
    world.run(PAYEE, Call(*world.calldata("v2 settle", 100, 0)))
    world.run(PAYEE, Call(*world.calldata("v2 settle", 200, 0)), commit=False)
    world.run(PAYEE, Call(*world.calldata("v2 settle", 300, 0)))
    assert [cells.at((TOKEN, PAYEE), block + later) for later in range(4)] == [0, 100, 100, 300]
