"""Trains recipes one after the other, in one process or as one of several that a launcher started:

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.helpers.several JOBS.json

A job is a recipe's file, where to, whether to resume, the step to stop after, and how many tokens process 1 has memory for. A process that
doesn't lead fails if it opens a file for writing, or makes, moves or removes one, beside JOBS.json or in iqlite's cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.")


def started(processes: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Has the jobs done by so many processes; AssertionError with what they said if one fails."""
    file = folder / f"jobs-{processes}.json"
    file.write_text(json.dumps(jobs), "utf-8")
    done = subprocess.run(
        [*launcher(processes), "-m", "tests.helpers.several", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def launcher(processes: int) -> list[str]:
    """torchrun, without its name on PATH; a port of its own, so that tests can run side by side."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def work(jobs: list[dict[str, Any]]) -> None:
    """Does the jobs in this process."""
    from iqlite.api import begin
    from iqlite.recipe.reading import load_recipe
    from iqlite.training.loop import train
    from tests.helpers.reporters import Silent
    from tests.helpers.tensors import at_most

    for job in jobs:
        session, run = begin(load_recipe(Path(job["recipe"])), job["out"], resume=job.get("resume", False))
        left = [job.get("stop") or 10**9]

        def over(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] <= 0

        limited = bool(job.get("limit")) and session.ranks.rank == 1
        with run.held(), at_most(session, job["limit"] if limited else 10**9, with_gradient=True) as refused:
            train(session, run, Silent(), over)
        assert bool(refused) == limited
        if job.get("limit") and session.ranks.size > 1:  # agreed on by all
            assert len({json.dumps(each) for each in session.ranks.gathered(session.sizes.record())}) == 1


def main() -> None:
    changed: list[str] = []
    ours = str(Path(sys.argv[1]).resolve().parent), os.environ["IQLITE_CACHE"]  # libraries may try their own folders

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event.startswith(CHANGING)) and str(arguments[0]).startswith(ours):
            changed.append(f"{event}{arguments}")

    if os.environ.get("RANK", "0") != "0":
        sys.dont_write_bytecode = True
        sys.addaudithook(seen)
    work(json.loads(Path(sys.argv[1]).read_bytes()))
    if changed:
        sys.exit(f"process {os.environ['RANK']} writes: {changed}")


if __name__ == "__main__":
    main()
