"""Removing runs: never one that is being trained, never a link, never a folder that isn't a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iqlite.errors import RunError
from iqlite.integrity import drop
from iqlite.places import exists, is_run
from iqlite.run.files import explained
from iqlite.run.listing import Row, row_of
from iqlite.run.lock import Lock, holder


def check_removable(paths: Sequence[Path]) -> list[Row]:
    """What the runs are, each once; RunError, before anything is removed, for what isn't a run or is being trained."""
    rows: dict[Path, Row] = {}
    for path in paths:
        if path.is_symlink():
            raise RunError(f"{path} is a symbolic link, which isn't followed to remove what is there: name the run itself.")
        if not exists(path):
            raise RunError(f"{path}: there is no such run.")
        if not is_run(path):
            raise RunError(f"{path} isn't a run directory, so it isn't removed: name one, such as runs/cheerful-135m.")
        if Path.cwd().is_relative_to(path.resolve()):
            raise RunError(f"{path} is where you are, or above: leave it first.")
        if holder(path):
            Lock(path).release()  # says who trains it
        rows[path.resolve()] = row_of(path)
    return list(rows.values())


def remove(path: Path) -> None:
    """Removes a run while it holds its lock, so that nobody begins to train it meanwhile."""
    with explained(path, "remove it again"):
        lock = Lock(path)
        try:
            drop(path)
        finally:
            lock.release()
