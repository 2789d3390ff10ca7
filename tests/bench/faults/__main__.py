"""What a run and the verbs on it survive: kills and full disks at every file operation, damaged files, streams, signals, two writers.

    python -m tests.bench.faults [kills] [full] [damage] [streams] [--only TEXT] [--every N] [--minutes M] [--work FOLDER]

A tiny model trains, compares, merges and exports in processes that are forked from this one. A small library before the C library
(faults.c, built with cc) counts their operations on files and kills them at the n-th, in the middle of it for every other write; or gives
no more disk space from the n-th on. Then the same command is given again (training with --resume), and what it leaves must be what an
undisturbed one leaves, to the byte: adapter, best, metrics but for times, samples; the merged model's and the exported files.

Every try is noted in tests/bench/results/faults.json, and isn't made again; faults.md is written from it. With --work the project is kept
between calls.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.faults import damage, operations, streams
from tests.bench.faults.harness import LIBRARY, prepare

RESULTS = Path(__file__).parents[1] / "results"
ONCE = (
    "iqlite.training.opening",
    "iqlite.evaluation.compare",
    "iqlite.export.folder",
    "iqlite.export.gguf_file",
    "iqlite.export.distance",
    "trl",
)
"""Imported before forking, and not in each process."""


def again_with_the_library() -> None:
    """Builds the library and starts this program once more, with it loaded."""
    built = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(built), str(Path(__file__).with_name("faults.c")), "-ldl"], check=True)
    more = {"LD_PRELOAD": str(built), LIBRARY: str(built), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "tests.bench.faults", *sys.argv[1:]], os.environ | more)


def table(found: dict[str, dict[str, Any]]) -> str:
    """The fault table."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in found.values():
        if one["fault"] != "damaged":
            rows[f"{one['fault']}: {one['verb']}{', ' + one['part'] if one.get('part') else ''}"].append(one)
    lines = ["| fault | times | wrong | lost, at most | what is said (the first) |", "| --- | ---: | --- | --- | --- |"]
    for name, ones in rows.items():
        wrong = Counter(one["wrong"] for one in ones if "wrong" in one)
        steps = max(one.get("lost", 0) for one in ones)
        lost = f"{steps} step{'s' if steps > 1 else ''}, done again" if steps else "nothing"
        lines.append(
            f"| {cell(name)} | {len(ones)} | {counted(wrong)} | {lost} | {cell(next((o['said'] for o in ones if o['said']), ''))} |"
        )
    sums = Counter((one["fault"], "wrong" in one) for one in found.values())
    for fault in dict.fromkeys(one["fault"] for one in found.values()):
        lines.append(f"| **{fault}, in all** | {sums[fault, True] + sums[fault, False]} | {sums[fault, True]} | | |")
    damaged: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in found.values():
        if one["fault"] == "damaged":
            damaged[f"{one['then']}: {one['file']}"].append(one)
    lines += ["", "| damaged, then | ways | outcome | what is said (the first) |", "| --- | ---: | --- | --- |"]
    for name, ones in damaged.items():
        outcomes = Counter(one["wrong"].upper() if "wrong" in one else one["outcome"] for one in ones)
        lines.append(f"| {cell(name)} | {len(ones)} | {counted(outcomes)} | {cell(next((o['said'] for o in ones if o['said']), ''))} |")
    every = Counter(one["wrong"].upper() if "wrong" in one else one["outcome"] for ones in damaged.values() for one in ones)
    lines.append(f"| **all** | {every.total()} | {counted(every)} | |")
    return "\n".join(lines) + "\n"


def counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counter.items()) or "0"


def cell(text: str) -> str:
    return text.replace("|", "\\|")[:300]


def main() -> None:
    if LIBRARY not in os.environ:
        again_with_the_library()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["kills", "full", "damage", "streams"])
    parser.add_argument("--only", default="", help="verbs or files with this in their name")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; the next call goes on")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS / "faults.json")
    asked, began = parser.parse_args(), time.monotonic()
    for name in ONCE:
        with contextlib.suppress(ImportError):
            __import__(name)
    found: dict[str, dict[str, Any]] = json.loads(asked.results.read_bytes()) if asked.results.is_file() else {}
    work = asked.work or Path(tempfile.mkdtemp(prefix="faults-"))
    folder, whole = work / "work", work / "whole"
    os.environ["IQLITE_CACHE"] = str(folder / "cache")
    if not whole.is_dir():
        work.mkdir(exist_ok=True)
        prepare(folder, whole)
    parts: dict[str, Iterator[tuple[str, dict[str, Any]]]] = {
        "kills": operations.tries("killed", folder, whole, asked.only, asked.every, set(found)),
        "full": operations.tries("disk full", folder, whole, asked.only, asked.every, set(found)),
        "damage": damage.tries(folder, whole, asked.only, set(found)),
        "streams": streams.tries(folder, whole, asked.only, set(found)),
    }
    made = 0
    try:
        for key, one in itertools.chain.from_iterable(parts[what] for what in asked.what):
            found[key] = one
            made += 1
            if "wrong" in one:
                print(key, one["wrong"], one.get("detail", ""), sep="\n  ", flush=True)
            if time.monotonic() - began > asked.minutes * 60:
                break
    finally:
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(one, ensure_ascii=False)}" for key, one in found.items())
        asked.results.write_text("{\n" + lines + "\n}\n", "utf-8")
        asked.results.with_suffix(".md").write_text(table(found), "utf-8")
    print(f"{made} tries in {time.monotonic() - began:.0f} s, {sum('wrong' in one for one in found.values())} of {len(found)} in all wrong")


if __name__ == "__main__":
    main()
