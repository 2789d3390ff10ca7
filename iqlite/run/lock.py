"""One writer: while a folder is being trained it has a lock, which says by whom.

The lock itself is the system's, on `.lock`, so that it goes with its process however that ends; `lock.json` says which process that is, on
which host. Where a disk has no such locks (some network disks), lock.json alone decides.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from iqlite.errors import RunError, warn
from iqlite.integrity import write_whole

HOLDER, LOCK = "lock.json", ".lock"


class Lock:
    """The lock of a folder; taken when it is made, RunError if another process holds it."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / HOLDER
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(self._refusal(self._holder())) from None
        except NotImplementedError:  # a disk without locks
            pass
        holder = self._holder()
        mine = _myself()
        if holder and holder.get("host") != mine["host"]:
            self._lock.release()
            raise RunError(f"{self._refusal(holder)} If that process is no more, delete {self.file}.")
        if holder and holder.get("process") != mine["process"]:
            if _lives(holder):
                self._lock.release()
                raise RunError(self._refusal(holder))
            warn(f"{folder}: process {holder.get('process')}, which trained it, has ended without a word; its lock is taken over.")
        write_whole(self.file, json.dumps(mine) + "\n")

    def release(self) -> None:
        """Gives it back. `.lock` stays: another process may be opening it."""
        if self._holder().get("process") == os.getpid():
            with suppress(OSError):
                self.file.unlink()
        self._lock.release()

    def _holder(self) -> dict[str, Any]:
        return _read(self.file)

    def _refusal(self, holder: dict[str, Any]) -> str:
        who = f"process {holder['process']} on {holder['host']}" if {"process", "host"} <= holder.keys() else "another process"
        return (
            f"{self.folder} is being trained by {who}: let it finish, or stop it (Ctrl-C there, or kill {holder.get('process', 'its number')}), "
            "which leaves a checkpoint; or name another --out."
        )


def holder(folder: Path) -> dict[str, Any] | None:
    """Who writes in a folder now: its process, host and since when, as they stand in lock.json; None if nobody does. A process on another host
    counts as being there. Takes no lock and changes nothing."""
    found = _read(folder / HOLDER)
    return found if found and (found.get("host") != socket.gethostname() or _lives(found)) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _myself() -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname(), "began": psutil.Process().create_time(), "since": time.strftime("%F %T")}


def _lives(holder: dict[str, Any]) -> bool:
    """True if the process that the lock names is still there, and isn't another one that was given its number."""
    try:
        began: float = psutil.Process(int(holder["process"])).create_time()
        return abs(began - float(holder["began"])) < 1
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
