"""Who of several processes is still there. Waits for results have no time-out, since a rollout takes as long as it takes; so each process says
every second that it lives, and sees who doesn't: one that was killed, one that is stopped, a machine that is gone. Then all end, and one says why.

It all goes over the launcher's own store, on a connection and a thread of its own. Every verb imports this: nothing large at the top.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

EVERY = 1.0  # seconds between two signs of life
SILENT = 30.0  # seconds without one after which a process counts as stopped; imports and loading hold one up for a few
PATIENCE = 3.0  # seconds for another's reason to arrive, and for the leader to say it
GO_ON = "All have stopped; go on from the last checkpoint with --resume."
STDERR = 2  # a file descriptor


class Watch:
    """This process's signs of life and its eye on the others'. `fault` ends all processes with one message, whoever calls it first."""

    def __init__(self, rank: int, size: int):
        """Starts to watch. When it returns, all have started."""
        import psutil
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        self.rank, self.size = rank, size
        prefix = f"iqlite/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
        limit = timedelta(seconds=SILENT)
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store: Any = PrefixStore(prefix, TCPStore(*place, is_master=False, timeout=limit))
        self.host = socket.gethostname()
        me = {"pid": os.getpid(), "host": self.host, "began": psutil.Process().create_time()}
        self.store.set(f"who/{rank}", json.dumps(me))
        self.store.set(f"beat/{rank}", "0")
        self.store.wait([f"beat/{other}" for other in range(size)], timedelta(minutes=10))
        self.others: list[dict[str, Any]] = [json.loads(self.store.get(f"who/{other}")) for other in range(size)]
        self.beats = 0
        self.seen = {other: ("", time.monotonic()) for other in range(size)}
        self.done, self.speaking = threading.Event(), threading.Lock()
        atexit.register(self._goes)
        threading.Thread(target=self._run, name="iqlite watch", daemon=True).start()

    def over(self) -> None:
        """Nothing is waited for any more."""
        self.done.set()

    def why(self) -> str:
        """Why an exchange with the others failed: what one of them said before it ended, or who is no more."""
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE:
            try:
                if self.store.check(["fault"]):
                    return str(json.loads(self.store.get("fault"))["text"])
            except RuntimeError:  # the store is gone: its process is
                break
            if gone := self.killed():
                return gone
            time.sleep(0.1)
        return f"another process can't be reached any more: it has ended, or its machine or the network has. {GO_ON}"

    def fault(self, text: str, code: int) -> None:
        """Ends this process, and soon all. The first fault of any of them is the one that is said, once: by the leader, if it still can."""
        self.done.set()
        mine = json.dumps({"text": text, "code": code, "of": self.rank})
        try:
            said = json.loads(self.store.compare_set("fault", "", mine))
        except RuntimeError:
            said = json.loads(mine)
        if self.rank != 0 and self._answers(0):
            time.sleep(PATIENCE)  # until it has said so; a launcher kills it as soon as this one ends
        if self._may_speak():
            sys.stderr.flush()
            os.write(own_stderr(), f"iqlite: {said['text']}\n".encode(errors="replace"))
        if self.rank == 0:
            time.sleep(EVERY)  # the store may be this process's
        os._exit(said["code"])

    def _run(self) -> None:
        while not self.done.wait(EVERY):
            try:
                fault = self._look()
            except RuntimeError:
                fault = f"the launcher, or the machine that leads, is gone. {GO_ON}"
            if fault and not self.done.is_set():
                self.fault(fault, 1)

    def _look(self) -> str:
        """Says that this process lives; what is wrong with another, "" if nothing is."""
        self.beats += 1
        self.store.set(f"beat/{self.rank}", str(self.beats))
        if self.store.check(["fault"]):
            time.sleep(EVERY)  # this one may be about to say so itself
            return str(json.loads(self.store.get("fault"))["text"])
        now = time.monotonic()
        for other in range(self.size):
            beat = self.store.get(f"beat/{other}").decode()
            if beat != self.seen[other][0]:
                self.seen[other] = beat, now
        silent = [other for other in range(self.size) if now - self.seen[other][1] > SILENT and not self._went(other)]
        if silent:
            return f"{self._named(silent[0])} hasn't answered for {SILENT:.0f} s (stopped, or its machine can't be reached). {GO_ON}"
        return self.killed()

    def killed(self) -> str:
        """Who of this machine's processes has ended without a word, as a sentence; "" if none has."""
        for other in range(self.size):
            if self.others[other]["host"] == self.host and not _lives(self.others[other]) and not self._went(other):
                return f"{self._named(other)} has ended without a word (killed, or the computer's memory was full). {GO_ON}"
        return ""

    def _went(self, other: int) -> bool:
        """True for one that has said that it goes."""
        with suppress(RuntimeError):
            return bool(self.store.check([f"gone/{other}"]))
        return False

    def _answers(self, other: int) -> bool:
        silent = time.monotonic() - self.seen[other][1] > SILENT
        return not silent and (self.others[other]["host"] != self.host or _lives(self.others[other]))

    def _may_speak(self) -> bool:
        """True in one process of all."""
        if not self.speaking.acquire(blocking=False):
            return False
        try:
            said: bytes = self.store.compare_set("said", "", str(self.rank))
            return bool(said == str(self.rank).encode())
        except RuntimeError:  # the store is gone with the leader
            return not any(map(self._answers, range(self.rank)))

    def _named(self, other: int) -> str:
        return f"process {other} ({self.others[other]['pid']} on {self.others[other]['host']})"

    def _goes(self) -> None:
        self.done.set()
        with suppress(RuntimeError):
            self.store.set(f"gone/{self.rank}", "")


def _lives(who: dict[str, Any]) -> bool:
    import psutil

    try:
        process = psutil.Process(int(who["pid"]))
        same = abs(process.create_time() - float(who["began"])) < 1
        return same and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


_own = STDERR


def own_stderr() -> int:
    """Where a process that prints nothing could still say why all end."""
    return _own


def mute() -> None:
    """From here on this process prints nothing: the leader does, or what a library writes would stand there once a process."""
    global _own
    _own = os.dup(STDERR)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, STDERR):
        os.dup2(nowhere, stream)
    os.close(nowhere)
