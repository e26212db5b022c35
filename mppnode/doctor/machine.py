"""Facts about the machine, read from the kernel; the paths can be others so that tests need no other machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

from mppnode.kernel.clock import Clock

T = TypeVar("T")

_OCTAL = re.compile(r"\\([0-7]{3})", re.ASCII)  # how mountinfo writes a space in a path
_KIB: Final = 1024
_PROBE_BYTES: Final = 4096  # a page of the ledger's log
_PROBES: Final = 8  # the first may pay for the file's directory entry; the median of eight does not
_TYPE_AFTER: Final = "-"


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine we run on; every method may block and may raise ``OSError``."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")

    def open_files_max(self) -> int | None:
        """How many files a process started as we were may open; None is no limit."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return None if soft == resource.RLIM_INFINITY else soft

    def memory_bytes(self) -> int | None:
        """Memory that can be had now, within the container's limit if there is one; None where it cannot be told."""
        found = re.search(r"^MemAvailable:\s+([0-9]{1,15}) kB$", _text(self.proc / "meminfo"), re.MULTILINE)
        limit = _text(self.cgroup / "memory.max").strip()
        sizes = [int(found.group(1)) * _KIB] if found else []
        sizes += [int(limit)] if limit.isascii() and limit.isdigit() else []
        return min(sizes, default=None)

    def filesystem(self, path: Path) -> str | None:
        """The type of the filesystem that holds ``path``, such as ``ext4``; None where it cannot be told."""
        place, found, depth = nearest(path).resolve(), None, -1
        for line in _text(self.proc / "self/mountinfo").splitlines():
            fields = line.split(" ")
            if _TYPE_AFTER not in fields[5:]:
                continue
            mount = Path(_OCTAL.sub(lambda code: chr(int(code.group(1), 8)), fields[4]))
            # Not below: of two on one place the later one hides the earlier.
            if place.is_relative_to(mount) and len(mount.parts) >= depth:
                found, depth = fields[fields.index(_TYPE_AFTER, 5) + 1], len(mount.parts)
        return found

    def free_bytes(self, path: Path) -> int:
        """What an ordinary user may still write there."""
        found = os.statvfs(nearest(path))
        return found.f_bavail * found.f_frsize

    def device(self, path: Path) -> int:
        """The number of the device that holds ``path``: two paths with one number share a fate."""
        return nearest(path).stat().st_dev

    def sync_ms(self, folder: Path, clock: Clock) -> int:
        """The median milliseconds of writing a page and syncing it, in a file that is gone afterwards."""
        path = folder / f".mppnode-doctor-{secrets.token_hex(8)}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            path.unlink()  # at once: whatever happens to us now, nothing stays behind
            times = []
            for _ in range(_PROBES):
                before = clock.monotonic()
                os.write(file, bytes(_PROBE_BYTES))
                os.fsync(file)
                times.append(clock.monotonic() - before)
        finally:
            os.close(file)
        return round(sorted(times)[_PROBES // 2] * 1000)

    def has(self, module: str) -> bool:
        """Whether a Python package is installed."""
        return find_spec(module) is not None


def nearest(path: Path) -> Path:
    """``path``, or what of it exists: where a file that is not there yet will be."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


async def aside(work: Callable[[], T]) -> T:
    """Run blocking ``work`` in a thread nobody has to wait for.

    Not the loop's executor: a disk that does not answer would hold its thread, and the end of the program with it.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def deliver(tell: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(lambda: None if done.done() else tell(value))

    def run() -> None:
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits
            deliver(done.set_exception, error)
        else:
            deliver(done.set_result, value)

    threading.Thread(target=run, name="doctor", daemon=True).start()
    return await done
