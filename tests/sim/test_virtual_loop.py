"""Virtual time is time: ordered, complete, and never a reason to wait."""

import asyncio

import pytest

from tests.support.virtual_loop import START, VirtualClock, WaitsForEver, run, this_loop


def test_a_year_passes_at_once_and_timers_keep_their_order():
    """Sleepers wake in the order of their times, at exactly their times."""

    async def main():
        loop, woken = this_loop(), []

        async def sleeper(seconds):
            await asyncio.sleep(seconds)
            woken.append((seconds, round(loop.time())))

        async with asyncio.TaskGroup() as group:
            for seconds in (31_536_000, 3, 60):
                group.create_task(sleeper(seconds))
        return woken

    assert run(main()) == [(3, 3), (60, 60), (31_536_000, 31_536_000)]


def test_clock_follows_the_loop_and_skew_moves_the_wall_alone():
    """A wrong wall clock leaves the monotonic one alone, as on a machine whose time is corrected."""

    async def main():
        clock = VirtualClock(this_loop())
        await asyncio.sleep(10)
        clock.skew_s = -3600
        return clock.now(), clock.now_millis(), clock.monotonic()

    assert run(main()) == (START + 10 - 3600, (START + 10 - 3600) * 1000, 10.0)


def test_a_sleeping_machine_finds_all_its_timers_due():
    """After a jump over two deadlines both have passed."""

    async def main():
        loop = this_loop()
        sleepers = [loop.create_task(asyncio.sleep(5)), loop.create_task(asyncio.sleep(50))]
        await asyncio.sleep(0)
        loop.jump(100)
        await asyncio.gather(*sleepers)
        return loop.time()

    assert run(main()) == 100


def test_waiting_for_ever_is_an_error_that_names_the_waiting():
    """A deadlock ends the run with the names of those who wait, not with a hanging test."""

    async def main():
        this_loop().create_task(asyncio.Event().wait(), name="the forgotten one")
        await asyncio.Event().wait()

    with pytest.raises(WaitsForEver, match="the forgotten one"):
        run(main())


def test_threads_are_refused():
    """Work in a thread would end at a real time, which does not exist here."""

    async def main():
        await asyncio.to_thread(int)

    with pytest.raises(RuntimeError, match="virtual time"):
        run(main())
