"""What the chain tells the books: only final blocks, every event, and a sweep for what no event told."""

import pytest

from channels import escrow as v2
from channels.faults import ChannelFault, Reason
from channels.model import AcceptVoucher, Phase
from channels.units import Units
from mppnode.treasury.watcher import Watcher
from tests.support.builders import NOW, V2, chain, reserve, voucher
from tests.unit.treasury.fakes import Desk, channel_id


class Tower(Desk):
    def __init__(self):
        super().__init__()
        self.watcher = Watcher(self.chain, self.ledger, self.books, escrows=[V2], clock=self.clock, log=self.log)

    def asks_to_close(self, account, *, block):
        """The payer's request, in a block, and the state from then on."""
        event = v2.CloseRequested(account.id, account.descriptor.payer, account.descriptor.payee, NOW + 900)
        self.chain.events.append((block, event))
        self.chain.states[account.id] = chain(account.chain.deposit, closing=NOW, block=block)

    async def phase(self, account):
        return (await self.books.load(account.id)).phase

    @property
    def ranges(self):
        return [entry[1:] for entry in self.chain.asked if entry[0] == "logs"]


@pytest.fixture
def tower():
    return Tower()


async def test_event_of_a_final_block_is_heard_at_the_next_glance(tower):
    """A close request makes the channel contested and is reported once."""
    account = await tower.channel(1, earned=10)
    await tower.watcher.glance()
    tower.asks_to_close(account, block=101)
    tower.chain.final = tower.chain.block = 102
    assert [seen.phase for seen in (await tower.watcher.glance()).changed] == [Phase.CONTESTED]
    assert (await tower.watcher.glance()).changed == ()


async def test_block_that_may_be_replaced_is_not_believed(tower):
    """Neither a glance nor a sweep looks above the final block."""
    account = await tower.channel(1, earned=10)
    await tower.watcher.glance()
    tower.asks_to_close(account, block=105)
    tower.chain.block = 105
    await tower.watcher.glance()
    tower.chain.asked.clear()
    await tower.watcher.sweep()
    assert [at for _, _, at in tower.chain.asked] == [100]


async def test_sweep_finds_what_no_event_told(tower):
    """A node that withholds logs hides nothing from the sweep of channels that hold money of ours."""
    account = await tower.channel(1, earned=10)
    await tower.watcher.sweep()
    tower.asks_to_close(account, block=101)
    tower.chain.events.clear()
    tower.chain.final = tower.chain.block = 102
    assert (await tower.watcher.glance()).changed == ()
    assert [seen.id for seen in (await tower.watcher.sweep()).changed] == [account.id]


async def test_channels_with_nothing_to_lose_are_swept_now_and_then(tower):
    """The first sweep reads everything, the next 59 only what could be lost, the next one everything again."""
    await tower.channel(1)
    await tower.channel(2, earned=10)
    read = []
    for _ in range(61):
        tower.chain.asked.clear()
        await tower.watcher.sweep()
        read.append(len(tower.chain.asked))
    assert read == [2, *[1] * 59, 2]


async def test_live_request_is_something_to_lose(tower):
    """A channel with a hold is swept although nothing is owed yet."""
    account = await tower.channel(1, earned=10)
    tower.chain.states[account.id] = chain(10**9, 10, block=50)
    await tower.watcher.sweep()
    assert (await tower.books.load(account.id)).unsettled == 0
    free = await tower.channel(2, deposit=1_000)
    await tower.watcher.sweep()
    await tower.books.apply(free.id, AcceptVoucher(voucher(100)))
    await tower.books.apply(free.id, reserve(1, hold="live"))
    tower.chain.asked.clear()
    await tower.watcher.sweep()
    assert [channel for _, channel, _ in tower.chain.asked] == [free.id]


async def test_wide_gaps_are_read_in_pieces(tower):
    """After an outage the blocks since are asked for completely, without overlap, in ranges a provider takes."""
    await tower.watcher.glance()
    tower.chain.final = 4_150
    tower.chain.asked.clear()
    await tower.watcher.glance()
    assert tower.ranges == [(101, 2_100), (2_101, 4_100), (4_101, 4_150)]


async def test_blocks_are_read_again_when_a_glance_failed(tower):
    """A glance that got no answer has seen nothing: its blocks belong to the next one."""
    account = await tower.channel(1, earned=10)
    await tower.watcher.glance()
    tower.asks_to_close(account, block=101)
    tower.chain.final = 101
    states = tower.chain.channel_states

    async def silent(*_args, **_more):
        raise ChannelFault(Reason.CHAIN_UNAVAILABLE)

    tower.chain.channel_states = silent
    with pytest.raises(ChannelFault):
        await tower.watcher.glance()
    tower.chain.channel_states = states
    assert len((await tower.watcher.glance()).changed) == 1


async def test_only_a_complete_sweep_counts_as_a_look(tower):
    """The alarm's clock is set back by a sweep that ended, not by one that failed."""
    await tower.channel(1, earned=10)
    tower.clock.advance(100)

    async def silent(*_args, **_more):
        raise ChannelFault(Reason.CHAIN_UNAVAILABLE)

    states, tower.chain.channel_states = tower.chain.channel_states, silent
    before = tower.watcher.checked_at
    with pytest.raises(ChannelFault):
        await tower.watcher.sweep()
    assert tower.watcher.checked_at == before
    tower.chain.channel_states = states
    await tower.watcher.sweep()
    assert tower.watcher.checked_at == before + 100


async def test_stranger_events_are_nobodys(tower):
    """Events of channels that are not in the books cause no read and no report."""
    event = v2.CloseRequested(channel_id(7), b"\x01" * 20, b"\x02" * 20, NOW)
    tower.chain.events = [(100, event)]
    assert (await tower.watcher.glance()).changed == ()


@pytest.mark.parametrize(
    ("deposit", "settled", "event", "fields"),
    [(0, 0, "channel.lost", {"units": 10}), (5, 0, "channel.suspect", {"settled": 0}), (10**9, 11, "channel.suspect", {"settled": 11})],
)
async def test_losses_and_contradictions_are_said_aloud(tower, deposit, settled, event, fields):
    """A payer who got out first, a deposit below what was accepted, a capture above what was spent: people hear it."""
    account = await tower.channel(1, earned=10)
    tower.chain.states[account.id] = chain(deposit, settled, block=50)
    await tower.watcher.sweep()
    [said] = tower.said(event)
    assert said.items() >= {"channel": "0x" + account.id.hex(), **fields}.items()
    assert Units(deposit) == (await tower.books.load(account.id)).chain.deposit
