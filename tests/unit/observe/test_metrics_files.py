"""Several processes count as one node: sums that survive kill -9, gauges that do not, and counters that never fall."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from mppnode.kernel.clock import ManualClock
from mppnode.observe import metric_files
from mppnode.observe.metric_cells import Observed, Reading, Snapshot
from mppnode.observe.metric_files import FILE_BYTES_MAX, SharedFolder, SlotsTaken, decode, encode
from mppnode.observe.metric_labels import MODEL, Vocabulary
from mppnode.observe.metrics import Metrics

ROOT = Path(__file__).resolve().parents[3]
CHARGED, OPENED = "mppnode_charged_usd_total", "mppnode_channels_opened_total"
PAUSED, FIRST = "mppnode_streams_paused", "mppnode_first_token_seconds_count"


class Worker:
    """One process's metrics; several of them in one test process are as good, as a lock belongs to an open file."""

    def __init__(self, folder, at=1_900_000_000, models=("m",)):
        vocabulary = Vocabulary(models, ["p"])
        self.clock = ManualClock(at)
        self.shared = SharedFolder(folder, vocabulary)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, clock=self.clock, vocabulary=vocabulary, shared=self.shared)

    def scrape(self, name, **labels):
        return self.registry.get_sample_value(name, labels)

    def kill(self):
        """Die as from SIGKILL: the kernel closes what was open, and nothing else happens."""
        os.close(self.shared._held)


def child():
    """Work off one order per line, and print what a scrape shows."""
    worker = Worker(Path(sys.argv[1]))
    metrics = worker.metrics
    for line in sys.stdin:
        order, *rest = line.split()
        match order:
            case "open":
                for _ in range(int(rest[0])):
                    metrics.channel_opened()
            case "serve":
                metrics.request_began("session", stream=True)
                metrics.request_ended("session", "complete", stream=True, model="m", provider="p", cost_pico=int(rest[0]), first_s=0.1)
            case "pause":
                metrics.pause_began()
            case "flush":
                metrics.flush()
        names = {OPENED: {}, PAUSED: {}, FIRST: {"provider": "p"}, CHARGED: {"rail": "session"}, "mppnode_processes": {}}
        seen = {name: worker.scrape(name, **labels) for name, labels in names.items()} if order == "scrape" else {}
        print(json.dumps({"slot": worker.shared.slot, **seen}), flush=True)


class Child:
    """A worker in a process of its own."""

    def __init__(self, folder):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def tell(self, order):
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self, how=signal.SIGKILL):
        self.process.send_signal(how)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def test_real_processes_one_of_them_killed(tmp_path):
    """Three processes are one node; SIGKILL takes away a process's gauges and nothing it has counted; a new one goes on."""
    with contextlib.ExitStack() as exits:
        one, two, three = (Child(tmp_path) for _ in range(3))
        for process in (one, two):
            exits.callback(process.end)
        assert sorted(process.tell("pause")["slot"] for process in (one, two, three)) == [0, 1, 2]
        for process, count in ((one, 1), (two, 10), (three, 100)):
            process.tell(f"open {count}")
            process.tell(f"serve {count * 10**12}")
            process.tell("flush")
        before = one.tell("scrape")
        assert before == two.tell("scrape") | {"slot": before["slot"]}
        assert (before[OPENED], before[PAUSED], before[FIRST], before[CHARGED]) == (111, 3, 3, 111.0)
        three.tell("open 1000")
        shown = three.tell("scrape")  # shown once, so it must be there for ever
        assert shown[OPENED] == 1_111
        three.end()
        after = two.tell("scrape")
        assert (after[OPENED], after[PAUSED], after[FIRST], after["mppnode_processes"]) == (1_111, 2, 3, 2)
        four = Child(tmp_path)
        exits.callback(four.end)
        assert four.tell("open 5")["slot"] == shown["slot"]
        assert two.tell("scrape")[OPENED] == 1_111  # nothing of the new one is written yet
        assert four.tell("scrape")[OPENED] == 1_116
        last = one.tell("scrape")
        assert (last[OPENED], last[PAUSED], last["mppnode_processes"], last[CHARGED]) == (1_116, 2, 3, 111.0)


def test_each_metric_is_joined_by_its_own_rule(tmp_path):
    """Counters, histograms and running things add up; the worst standing, the fewest providers, the latest sum count."""
    early, late = Worker(tmp_path, at=1_900_000_000), Worker(tmp_path, at=1_900_000_060)
    for worker, standing, usable, keys in ((late, 1, 3, 7), (early, 4, 0, 5)):
        worker.metrics.breaker_states({"p": standing})
        worker.metrics.providers_usable({"m": usable})
        worker.metrics.keys_active(keys)
        worker.metrics.exposure("session", 10**12)
        worker.metrics.loop_lag(0.003)
        worker.metrics.flush()
    for worker in (early, late):
        assert worker.scrape("mppnode_provider_standing", provider="p") == 4
        assert worker.scrape("mppnode_model_providers_usable", model="m") == 0
        assert worker.scrape("mppnode_keys_active") == 7
        assert worker.scrape("mppnode_exposure_usd", rail="session") == 2
        assert worker.scrape("mppnode_loop_lag_seconds_bucket", le="0.005") == 2
        assert worker.scrape("mppnode_loop_lag_seconds_sum") == 0.006
    late.kill()
    assert early.scrape("mppnode_keys_active") == 5  # what the dead one knew is not known any more
    assert early.scrape("mppnode_exposure_usd", rail="session") == 1
    early.metrics.close()


def test_everybody_shows_the_same_bits(tmp_path):
    """Floats are added in one order: a counter whose last bit depends on who is scraped would fall and be a reset."""
    workers = [Worker(tmp_path) for _ in range(3)]
    for worker, seconds in zip(workers, (0.1, 0.2, 0.3), strict=True):
        worker.metrics.loop_lag(seconds)
        worker.metrics.keys_active(int(seconds * 10))  # all in one millisecond
        worker.metrics.flush()
    assert (0.1 + 0.2) + 0.3 != (0.2 + 0.3) + 0.1
    assert len({worker.scrape("mppnode_loop_lag_seconds_sum") for worker in workers}) == 1
    assert {worker.scrape("mppnode_keys_active") for worker in workers} == {3}
    for worker in workers:
        worker.kill()


def test_who_asks_for_a_life_is_not_taken_for_one(tmp_path):
    """Two that look at a dead process's slot at the same moment both find it dead."""
    watch, dead = Worker(tmp_path), Worker(tmp_path)
    dead.metrics.pause_began()
    dead.metrics.flush()
    dead.kill()
    with (tmp_path / "1.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert watch.scrape(PAUSED) == 0
    watch.metrics.close()


def test_a_new_owner_of_a_slot_does_not_revive_gauges(tmp_path):
    """From the moment a slot is taken over, what its last owner had running is gone and what it counted is there."""
    watch, dead = Worker(tmp_path), Worker(tmp_path)
    dead.metrics.pause_began()
    dead.metrics.channel_opened()
    dead.metrics.flush()
    assert watch.scrape(PAUSED) == 1
    dead.kill()
    again = Worker(tmp_path)
    assert (again.shared.slot, watch.scrape(PAUSED), watch.scrape(OPENED)) == (1, 0, 1)
    again.metrics.close()
    watch.metrics.close()


def test_snapshots_are_taken_in_turns(tmp_path):
    """A snapshot is taken and written in one turn: an older one cannot come after a newer one."""
    shared = SharedFolder(tmp_path, Vocabulary())
    turns = []

    def take():
        turns.append(shared._turn.locked())
        return Snapshot()

    shared.exchange(take)
    shared.flush(take)
    shared.close(take)
    assert turns == [True] * 3


def test_money_of_any_size_goes_through_a_file_exactly():
    """Twenty thousand million dollars and one pico-dollar are the same number after they were written and read."""
    cells = {CHARGED: {("session",): 2 * 10**22 + 1}}
    assert decode(encode(Snapshot(cells)), Vocabulary()).cells == cells


def test_restarts_leave_no_files_behind(tmp_path):
    """A hundred lives in turn, ended well and badly, use two slots, and what they flushed is all there."""
    watch = Worker(tmp_path)
    for life in range(100):
        worker = Worker(tmp_path)
        worker.metrics.channel_opened()
        if life % 2:
            worker.metrics.close()
        else:
            worker.metrics.flush()
            worker.kill()
    assert watch.scrape(OPENED) == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "0.lock", "1.json", "1.lock"]
    watch.metrics.close()


step = st.one_of(
    st.tuples(st.just("start"), st.just(0)),
    *(st.tuples(st.just(word), st.integers(0, 3)) for word in ("count", "flush", "scrape", "kill", "close")),
)


@settings(max_examples=60)
@given(st.lists(step, min_size=8, max_size=40))
def test_no_order_of_deaths_and_scrapes_makes_a_counter_fall(tmp_path_factory, steps):
    """Whoever is scraped, a counter never shows less than before nor more than happened, and gauges are of the living."""
    folder = tmp_path_factory.mktemp("slots")
    living, happened, seen = [], 0, 0
    try:
        for word, number in steps:
            if word == "start" and len(living) < 4:
                living.append(Worker(folder))
            elif living and word != "start":
                worker = living[number % len(living)]
                match word:
                    case "count":
                        worker.metrics.channel_opened()
                        happened += 1
                    case "flush":
                        worker.metrics.flush()
                    case "scrape":
                        for one in living:
                            one.metrics.pause_began()
                            one.metrics.flush()
                        now = worker.scrape(OPENED)
                        assert seen <= now <= happened
                        seen = now
                        assert worker.scrape(PAUSED) == sum(one.metrics._streams_paused.cells[()].value for one in living)
                        assert worker.scrape("mppnode_processes") == len(living)
                    case "kill":
                        living.remove(worker)
                        worker.kill()
                    case "close":
                        living.remove(worker)
                        worker.metrics.close()
    finally:
        for worker in living:
            worker.kill()


GOOD = json.dumps({"format": 1, "metrics": {OPENED: [[[], 3]]}}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"null",
        b'{"format":2,"metrics":{}}',
        b'{"format":1,"metrics":[]}',
        *(
            json.dumps({"format": 1, "metrics": metrics}).encode()
            for metrics in (
                {OPENED: 3},
                {OPENED: [3]},
                {OPENED: [[]]},
                {OPENED: [[[]]]},
                {OPENED: [[[], -1]]},
                {OPENED: [[[], True]]},
                {OPENED: [[[], "3"]]},
                {OPENED: [[[], float("nan")]]},
                {OPENED: [[[], float("inf")]]},
                {CHARGED: [[[1], 3]]},
                {PAUSED: [[[], 3]]},
                {PAUSED: [[[], 3, -1]]},
                {"mppnode_loop_lag_seconds": [[[], 3]]},
                {"mppnode_loop_lag_seconds": [[[], [-1] * 11, 3.0]]},
                {"mppnode_loop_lag_seconds": [[[], [1.5] * 11, 3.0]]},
            )
        ),
        GOOD + b" " * (FILE_BYTES_MAX + 1 - len(GOOD)),
    ],
)
def test_a_broken_file_is_counted_and_left_out(tmp_path, data):
    """A file that is no snapshot stops no scrape and no start; how many there are is shown by the next scrape."""
    (tmp_path / "9.lock").touch()
    (tmp_path / "9.json").write_bytes(data)
    worker = Worker(tmp_path)
    worker.metrics.channel_opened()
    assert worker.scrape(OPENED) == 1
    assert worker.scrape("mppnode_metric_snapshots_unreadable") == 1
    worker.metrics.close()
    (tmp_path / "0.json").write_bytes(data)
    again = Worker(tmp_path)
    assert again.scrape(OPENED) == 0
    again.metrics.close()


def test_a_good_file_beside_the_broken_ones_counts(tmp_path):
    """The twin of the test above: the same place, the same way, and it is read. Other files are not looked at."""
    (tmp_path / "9.lock").touch()
    (tmp_path / "9.json").write_bytes(GOOD)
    for stray in ("x.json", "99999.json", "²2.json"):
        (tmp_path / stray).write_bytes(GOOD)
    worker = Worker(tmp_path)
    assert worker.scrape(OPENED) == 3
    assert worker.shared.unreadable == 0
    worker.metrics.close()


def test_metrics_of_another_version_are_left_out():
    """A rolling upgrade mixes versions: unknown metrics, other labels and other buckets are not guessed at."""
    metrics = {"mppnode_new_total": [[[], 1]], CHARGED: [[["session", "more"], 1]], "mppnode_loop_lag_seconds": [[[], [1, 2], 3.0]], OPENED: [[[], 3]]}
    found = decode(json.dumps({"format": 1, "metrics": metrics}).encode(), Vocabulary())
    assert found.cells == {OPENED: {(): 3}}


def test_names_of_a_sibling_that_knows_more_are_taken_over_while_there_is_room():
    """A model one process has learned of is shown by all under its name; beyond the limit rows fall together."""
    rows = [[[f"m{n}"], n] for n in range(1, 5)]
    data = json.dumps({"format": 1, "metrics": {"mppnode_model_charged_usd_total": rows}}).encode()
    vocabulary = Vocabulary(["m0"], models_max=3)
    assert decode(data, vocabulary).cells["mppnode_model_charged_usd_total"] == {("m1",): 1, ("m2",): 2, ("other",): 7}
    assert vocabulary.fold(MODEL, "m2") == "m2"


def test_a_dead_process_keeps_everything_but_its_gauges():
    """What lasts is told by the kind of a metric alone."""
    observed = Observed((1,) * 11, 2.0)
    cells = {OPENED: {(): 3}, PAUSED: {(): Reading(1, 0)}, "mppnode_loop_lag_seconds": {(): observed}}
    assert set(Snapshot(cells).without_gauges().cells) == {OPENED, "mppnode_loop_lag_seconds"}
    assert decode(encode(Snapshot(cells)), Vocabulary()).cells == cells


def test_a_disk_that_is_full_stops_no_scrape(tmp_path):
    """Numbers that cannot be written are shown, and that they could not is one of them."""
    worker = Worker(tmp_path)
    (tmp_path / "0.tmp").mkdir()
    worker.metrics.channel_opened()
    assert worker.scrape(OPENED) == 1
    worker.metrics.flush()
    assert worker.scrape("mppnode_metric_snapshot_failures_total") == 2
    (tmp_path / "0.tmp").rmdir()
    worker.metrics.close()
    assert json.loads((tmp_path / "0.json").read_bytes())["metrics"][OPENED] == [[[], 1]]


def test_there_are_only_so_many_slots(tmp_path, monkeypatch):
    """A folder whose slots are all held refuses the next process, and a slot given away is taken again."""
    monkeypatch.setattr(metric_files, "SLOTS_MAX", 2)
    workers = [Worker(tmp_path), Worker(tmp_path)]
    with pytest.raises(SlotsTaken):
        Worker(tmp_path)
    workers[0].metrics.close()
    again = Worker(tmp_path)
    assert again.shared.slot == 0
    again.metrics.close()
    workers[1].metrics.close()


def test_scrapes_in_threads_never_show_less_than_an_earlier_one(tmp_path):
    """Counting goes on while threads scrape: every thread sees a number that only rises, and none an impossible one."""
    worker = Worker(tmp_path)
    done, seen = threading.Event(), [[0], [0], [0]]

    def scrape(mine):
        while not done.is_set():
            mine.append(worker.scrape(OPENED))  # an exception here is a warning of pytest's, and warnings are errors

    threads = [threading.Thread(target=scrape, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for number in range(20_000):
        worker.metrics.channel_opened()
        worker.metrics.voucher_refused(f"unknown {number}")
    done.set()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in seen)
    assert worker.scrape(OPENED) == 20_000
    worker.metrics.close()


if __name__ == "__main__":
    child()
