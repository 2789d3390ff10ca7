"""Thousands of inputs that nobody should give, by kind: how many end in a traceback or leave something half-written, and what refusing costs.

    python -m tests.bench.fuzz [--each 700] [--seed 0] [--only KIND …]

One process; on Linux the memory of each try is the peak of the process above what it held before it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["IQLITE_CACHE"] = tempfile.mkdtemp(prefix="fuzz-")

from hypothesis import HealthCheck, given, seed, settings

from iqlite.errors import IqliteError
from tests.helpers.strange import KINDS, files

DEAR = {"GGUF conversions": 0.4, "templates": 0.5, "tokenizers": 0.5}
"""Kinds of which fewer are tried: a try takes a tenth of a second and more."""
HANGS = 60  # seconds after which a try counts as one that never comes back
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Tally:
    """What came of the tries of one kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.seconds, self.bytes = 0.0, 0
        self.faults: dict[str, tuple[str, str]] = {}

    def took(self, seconds: float, size: int) -> None:
        self.seconds, self.bytes = max(self.seconds, seconds), max(self.bytes, size)


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    def hangs(*_: object) -> None:
        raise TimeoutError(f"not back after {seconds} s")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes; 0 where the system doesn't tell."""
    if not STATUS.is_file():
        return 0
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))


def one(read: Callable[[Path, Any], None], example: Any, tally: Tally) -> None:
    """One try in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="strange-") as name:
        folder = Path(name)
        if CLEAR.exists():
            CLEAR.write_text("5")
        before, begin = memory("VmRSS"), time.perf_counter()
        try:
            with in_time(HANGS):
                read(folder, example)
            tally.counts["fine"] += 1
        except IqliteError:
            tally.counts["refused"] += 1
        except BaseException as error:  # noqa: BLE001 - what is counted
            tally.counts["tracebacks"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            tally.faults.setdefault(f"{type(error).__name__} at {where.filename}:{where.lineno}", (str(error)[:200], repr(example)[:300]))
        tally.took(time.perf_counter() - begin, memory("VmHWM") - before)
        left = [part for part in files(folder) if Path(part).name.startswith(".making")]
        tally.counts["half-written"] += bool(left)


def tried(kind: str, count: int, number: int) -> Tally:
    """`count` inputs of a kind, from the seed `number`."""
    made_up, read = KINDS[kind]
    tally = Tally()

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(made_up)
    def go(example: Any) -> None:
        one(read, example, tally)

    go()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(KINDS))
    asked = parser.parse_args()
    total: Counter[str] = Counter()
    print("| kind | tried | refused | fine | tracebacks | half-written | longest, s | most memory, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for kind in asked.only or KINDS:
        tally = tried(kind, int(asked.each * DEAR.get(kind, 1)), asked.seed)
        done = tally.counts["fine"] + tally.counts["refused"] + tally.counts["tracebacks"]
        total.update(tally.counts, tried=done)
        cells = (done, tally.counts["refused"], tally.counts["fine"], tally.counts["tracebacks"], tally.counts["half-written"])
        print(f"| {kind} | {' | '.join(map(str, cells))} | {tally.seconds:.2f} | {tally.bytes / 2**20:.0f} |", flush=True)
        for where, (said, example) in tally.faults.items():
            print(f"  {where}: {said}\n    {example}", file=sys.stderr, flush=True)
    print(f"| all | {total['tried']} | {total['refused']} | {total['fine']} | {total['tracebacks']} | {total['half-written']} | | |")
    sys.exit(1 if total["tracebacks"] or total["half-written"] else 0)


if __name__ == "__main__":
    main()
