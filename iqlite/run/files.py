"""Files that are there whole or not at all, and what a disk refuses as one sentence."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iqlite.errors import RunError, first_line
from iqlite.integrity import found_again, of_the_disk, put, swap
from iqlite.places import check_no_link, exists


def json_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with null for what JSON has no number for: nan and the infinities."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; RunError for a file that holds none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read ({first_line(error)}): put it back from a copy, or start anew with another --out.") from None
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no JSON object: put it back from a copy, or start anew with another --out.")
    return found


@contextmanager
def explained(path: Path, again: str = "go on with --resume") -> Iterator[None]:
    """Turns a full or read-only disk into a RunError."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing narrower
        if not of_the_disk(error):
            raise
        if getattr(error, "errno", None) == errno.ENOSPC or "no space left" in str(error).lower():
            raise RunError(f"{path}: no space left on its disk: free some space, then {again}.") from None
        raise RunError(
            f"{path} can't be written ({getattr(error, 'strerror', None) or error}): name another place, or check the folder's rights."
        ) from None


def replace_with(making: Path, path: Path) -> None:
    """Puts a finished file or folder in `path`'s place; a kill on the way leaves the old one or the new one."""
    with explained(path):
        swap(making, path) if path.is_dir() else put(making, path)


def free_name(folder: Path, name: str, ending: str = "") -> Path:
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3, … that doesn't exist."""
    path, number = folder / f"{name}{ending}", 2
    while path.exists():
        path, number = folder / f"{name}-{number}{ending}", number + 1
    return path


def check_space(path: Path, needed: int, flag: str = "--out") -> None:
    """RunError if the disk that would hold `path` has less than `needed` bytes free. `flag` is the option that names another place."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunError(
            f"{path} needs {needed / 2**20:.0f} MiB and its disk has {free / 2**20:.0f} MiB free: free some space, or name another {flag}."
        )


def check_place(path: Path, mark: str, *, force: bool) -> None:
    """RunError unless a new file or folder can be put at `path`: `force` replaces a file, or a folder that holds `mark`."""
    if path.name in ("", ".."):
        raise RunError(f"-o {path} is where you are, or above: name a folder or file of its own.")
    check_no_link(path, "-o")
    if not exists(path) and not found_again(path):
        return
    if not force:
        raise RunError(f"{path} exists already: replace it with --force, or name another -o.")
    if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise RunError(f"{path} isn't a folder that iqlite wrote ({mark} is missing), so --force won't delete it: name another -o.")
