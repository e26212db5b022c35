"""Writes lines in a thread, so that a reader who does not read stops the lines and not the node.

A pipe holds 64 KiB; when nobody reads it, a write in the event loop's own thread would stop every stream and every
payment until somebody does. Lines wait here instead, up to a stated size, and what does not fit is counted and told as
soon as lines flow again. Setting the descriptor to non-blocking is no way out: the flag belongs to the open file, which
may be the terminal of other programs.

A process that is killed loses what waits: next to nothing while the reader keeps up, at most ``QUEUE_BYTES_MAX``.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

QUEUE_BYTES_MAX: Final = 8 * 1024 * 1024
"""Bytes that wait: some 20,000 requests, half a minute at full load; a reader that is away for longer is broken."""
BATCH_BYTES: Final = 4_096
"""Bytes of one write: what a pipe takes whole (PIPE_BUF on Linux), so lines of several workers never mix."""
CLOSE_S: Final = 2.0
"""Seconds a stopping process waits for its last lines to be taken."""


class LineWriter:
    """Writes whole lines to a file descriptor, in order, from a thread of its own. Callable from any thread."""

    def __init__(self, write: Callable[[bytes], int], *, bytes_max: int = QUEUE_BYTES_MAX) -> None:
        """``write`` may block, take a part only, and raise ``OSError``."""
        self._write = write
        self._bytes_max = bytes_max
        self._lines: deque[bytes] = deque()
        self._size = 0  # of the lines that wait and of those being written
        self._dropped = 0
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.told: Callable[[int], bytes] = _untold
        """Makes the line that says how many lines were dropped."""

    @classmethod
    def of_descriptor(cls, descriptor: int, *, bytes_max: int = QUEUE_BYTES_MAX) -> LineWriter:
        """One that writes to an open file, whether its other users made it non-blocking or not."""

        def write(data: bytes) -> int:
            while True:
                try:
                    return os.write(descriptor, data)
                except BlockingIOError:
                    select.select([], [descriptor], [])

        return cls(write, bytes_max=bytes_max)

    def put(self, line: bytes, *, keep: bool = False) -> None:
        """Have a line written soon. ``keep`` lets it into the quarter of the queue that is kept for what matters."""
        with self._changed:
            room = self._bytes_max if keep else self._bytes_max // 4 * 3
            if self._closed or self._size + len(line) > room:
                self._dropped += 1
                return
            self._lines.append(line)
            self._size += len(line)
            if self._thread is None:
                # Made by the first line: a process that forks before it logs has its thread on the right side.
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until everything is written; False when the time was not enough."""
        with self._changed:
            return self._changed.wait_for(self._idle, timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Flush, and take no more lines; False when some are lost."""
        flushed = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return flushed

    def _idle(self) -> bool:
        return not self._lines and not self._busy

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines or self._closed)
                if not self._lines:
                    return
                taken = self._take()
                # Behind the last line that was kept, because that is where the missing ones would stand.
                dropped = 0 if self._lines else self._dropped
                self._busy = True
            written = self._all(taken) and (not dropped or self._all([self.told(dropped)]))
            with self._changed:
                self._size -= sum(map(len, taken))
                self._dropped += -dropped if written else len(taken)

    def _take(self) -> list[bytes]:
        taken, size = [self._lines.popleft()], 0
        size = len(taken[0])
        while self._lines and size + len(self._lines[0]) <= BATCH_BYTES:
            taken.append(self._lines.popleft())
            size += len(taken[-1])
        return taken

    def _all(self, lines: list[bytes]) -> bool:
        data = memoryview(b"".join(lines))
        try:
            while data:
                data = data[self._write(bytes(data)) :]
        except OSError:  # a full disk, a reader that is gone: there is nowhere to say so
            return False
        return True


def _untold(_: int) -> bytes:
    return b""
