"""Kills, and disks that are full from then on, at each operation on files of each verb; then the verb again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.faults.harness import FULL, HALF, KILL, Verb, call, difference, fresh, verbs

Found = dict[str, Any]


def what_of(path: str) -> str:
    """Which part of the work a file belongs to."""
    parts = [part.removeprefix(".making-").removeprefix(".old-") for part in Path(path).parts]
    if not parts or parts[0] == "cache" or parts[0].startswith("out"):
        return ""
    if len(parts) < 2:
        return "the run's folder"
    return {"checkpoints": "checkpoint", "answers": "kept answers", "baselines": "baseline", ".lock": "lock", "lock.json": "lock"}.get(
        parts[1], parts[1].removesuffix(".jsonl").removesuffix(".json").removesuffix(".damaged")
    )


def lines_after_the_last_checkpoint(run: Path) -> int:
    """Steps that are done again."""
    metrics = run / "metrics.jsonl"
    steps = len(metrics.read_bytes().splitlines()) - 1 if metrics.is_file() else 0
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    return max(0, steps - (int(checkpoints[-1].name[5:]) if checkpoints else 0))


def tries(kind: str, folder: Path, whole: Path, only: str, every: int, known: set[str]) -> Iterator[tuple[str, Found]]:
    """(key, what came of it) of each try that isn't `known`."""
    for verb in verbs():
        if only and only not in verb.name:
            continue
        fresh(folder, whole, verb.needs)
        called = call(folder, verb.first)
        assert called.code == 0, called.text
        reference = verb.left(folder)
        for at in range(1, len(called.paths) + 1, every):
            key = f"{kind} | {verb.name} | {at}"
            if key not in known:
                part = what_of(called.paths[at - 1])
                yield key, {"fault": kind, "verb": verb.name, "part": part, **one(kind, folder, whole, verb, at, reference)}


def one(kind: str, folder: Path, whole: Path, verb: Verb, at: int, reference: Any) -> Found:
    """One try."""
    fresh(folder, whole, verb.needs)
    how = FULL if kind == "disk full" else HALF if at % 2 else KILL
    called = call(folder, verb.first, at, how)
    said = next((line for line in called.text.splitlines() if line.startswith("iqlite: ")), "").replace(str(folder), "…")
    found: Found = {"said": said, "lost": lines_after_the_last_checkpoint(folder / "run") if verb.name.startswith("train") else 0}
    if kind == "killed" and called.code != -9:
        return found | {"wrong": "wasn't killed", "detail": called.text[-1000:]}
    if kind == "disk full" and called.code != 0:
        if "Traceback" in called.text:
            return found | {"wrong": "traceback", "detail": called.text[-1500:]}
        if called.code != 2 or "no space left" not in called.text.lower():
            return found | {"wrong": "no sentence on the disk", "detail": f"{called.code} {called.text[-600:]}"}
    there = any((folder / name).exists() for name in ("run", ".old-run"))  # or it was killed before the run was there
    called = call(folder, verb.again if there else verb.first)
    if called.code != 0 and "exists already" not in called.text:  # else it had been done before the fault
        return found | {"wrong": "traceback" if "Traceback" in called.text else "couldn't go on", "detail": called.text[-1500:]}
    if (left := verb.left(folder)) != reference:
        return found | {"wrong": "another result", "detail": difference(left, reference)}
    return found
