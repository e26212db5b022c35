"""A log nobody reads costs lines, never requests; a storm of refusals costs five lines a second."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from mppnode.kernel.clock import ManualClock
from mppnode.observe.log_sampling import KINDS_MAX, PER_SECOND, Refusals
from mppnode.observe.log_writer import LineWriter
from mppnode.observe.logs import Level

ROOT = Path(__file__).resolve().parents[3]


class Gate:
    """A reader that reads when it is told to."""

    def __init__(self):
        self.open = threading.Event()
        self.got = bytearray()
        self.reached = threading.Event()

    def write(self, data):
        self.reached.set()
        assert self.open.wait(30)
        part = data[: max(len(data) // 2, 1)]  # a descriptor may take a part only
        self.got += part
        return len(part)


def test_lines_come_in_order_and_whole_though_writes_are_partial():
    """What was put is what is read, line after line."""
    gate = Gate()
    gate.open.set()
    writer = LineWriter(gate.write)
    lines = [b"%d %s\n" % (number, b"x" * (number % 700)) for number in range(500)]
    for line in lines:
        writer.put(line)
    assert writer.close(30)
    assert bytes(gate.got) == b"".join(lines)


def test_a_reader_that_stands_still_costs_lines_and_they_are_counted():
    """The queue keeps its size, warnings still get in, and the loss is told once, where it happened."""
    gate = Gate()
    writer = LineWriter(gate.write, bytes_max=1_000)
    writer.told = lambda count: b"dropped %d\n" % count
    writer.put(b"first\n")
    assert gate.reached.wait(30)
    for number in range(500):
        writer.put(b"line %04d\n" % number)
    kept = (750 - 6) // 10
    for number in range(100):
        writer.put(b"kept %04d\n" % number, keep=True)
    more = (1_000 - 6) // 10 - kept
    assert not writer.flush(0)
    gate.open.set()
    assert writer.flush(30)
    writer.put(b"last\n")
    assert writer.close(30)
    lines = bytes(gate.got).decode().splitlines()
    assert lines == [
        "first",
        *(f"line {number:04d}" for number in range(kept)),
        *(f"kept {number:04d}" for number in range(more)),
        f"dropped {500 - kept + 100 - more}",
        "last",
    ]


def test_a_disk_that_is_full_for_a_while_costs_lines_and_they_are_counted():
    """Errors of a write end nothing; what they cost is told when writes work again."""
    broken, got = [True], bytearray()

    def write(data):
        if broken[0]:
            raise OSError(errno.ENOSPC, "full")
        got.extend(data)
        return len(data)

    writer = LineWriter(write)
    writer.told = lambda count: b"dropped %d\n" % count
    writer.put(b"lost\n")
    assert writer.flush(30)
    broken[0] = False
    writer.put(b"seen\n")
    assert writer.close(30)
    assert bytes(got) == b"seen\ndropped 1\n"


def test_a_full_pipe_stops_nobody_and_is_told_when_it_flows():
    """A pipe nobody reads fills, the writer goes on taking lines, and the reader who comes back gets the count."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as some parents leave it behind
    writer = LineWriter.of_descriptor(writing, bytes_max=100_000)
    writer.told = lambda count: b"dropped %d\n" % count
    line = b"x" * 999 + b"\n"
    for _ in range(1_000):
        writer.put(line)
    assert not writer.flush(0)
    got = bytearray()

    def read():
        while part := os.read(reading, 65_536):
            got.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    assert writer.close(30)
    os.close(writing)
    reader.join(30)
    os.close(reading)
    lines = bytes(got).splitlines()
    dropped = [entry for entry in lines if entry.startswith(b"dropped")]
    assert len(dropped) == 1
    assert len(lines) - 1 + int(dropped[0].split()[1]) == 1_000


LOGGER = """
import asyncio, os, sys
from mppnode.kernel.clock import SystemClock
from mppnode.observe.logs import Level, make_log
log = make_log(clock=SystemClock(), level=Level.INFO, as_json=True)
for number in range(int(sys.argv[1])):
    log("request.ended", request=f"req_{number}", text="x" * 900)
print("the loop turns", flush=True)
sys.stdin.readline()
log.close(0)
"""


def test_a_process_whose_log_nobody_reads_goes_on_and_ends():
    """More lines than a pipe and the queue hold: the process does its work, and ends when it is told, by itself."""
    with subprocess.Popen(
        [sys.executable, "-c", LOGGER, "20000"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"the loop turns\n"
        process.stdin.write(b"end\n")
        process.stdin.flush()
        assert process.wait(60) == 0
        process.stderr.close()


def test_a_killed_process_has_written_what_a_reader_kept_up_with():
    """kill -9 loses what waits and nothing else: whole lines, in order, from the first on."""
    with subprocess.Popen(
        [sys.executable, "-c", LOGGER, "50"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        seen = [json.loads(process.stderr.readline())["request"] for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        assert process.stderr.read() == b""
    assert seen == [f"req_{number}" for number in range(50)]


class Told:
    def __init__(self):
        self.lines = []
        self.later = []

    def __call__(self, event, *, level=Level.INFO, **fields):
        self.lines.append((event, fields))

    def call_later(self, seconds, call):
        self.later.append((seconds, call))


def test_a_storm_of_refusals_is_five_lines_and_a_count():
    """Same reason, same route: examples, then one line with the number of the others, also when the storm is over."""
    told, clock = Told(), ManualClock()
    refusals = Refusals(told, clock, later=told.call_later)
    for _ in range(1_000):
        refusals("rate_limited", "/v1/chat/completions", status=429)
    refusals("not_found", "none", status=404)
    assert [event for event, _ in told.lines] == ["request.refused"] * (PER_SECOND + 1)
    assert len(told.later) == 1
    told.later[0][1]()
    assert told.lines[-1] == (
        "log.suppressed",
        {"about": "request.refused", "total": 1_000 - PER_SECOND, "counts": {"rate_limited /v1/chat/completions": 1_000 - PER_SECOND}},
    )
    refusals.tell()
    assert len(told.lines) == PER_SECOND + 2


def test_every_second_begins_anew():
    """What the last second left out is told before the first line of the next."""
    told, clock = Told(), ManualClock()
    refusals = Refusals(told, clock, later=told.call_later)
    for _ in range(3):
        for _ in range(PER_SECOND + 2):
            refusals("r", "/")
        clock.advance(1)
    assert [event for event, _ in told.lines] == ["request.refused"] * 5 + (["log.suppressed"] + ["request.refused"] * 5) * 2


def test_kinds_of_refusals_are_bounded():
    """Whoever could invent reasons or routes would still not fill the memory, or the log."""
    told, clock = Told(), ManualClock()
    refusals = Refusals(told, clock, later=told.call_later)
    for number in range(10_000):
        refusals(f"r{number}", "/")
    assert len(told.lines) == KINDS_MAX + PER_SECOND
    refusals.tell()
    assert told.lines[-1][1]["total"] == 10_000 - KINDS_MAX - PER_SECOND
