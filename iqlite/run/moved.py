"""Where a run's files are now: its folder, or the whole project, may have been moved or copied since. No torch at the top.

recipe.toml names them by absolute paths. The same way from the run's folder as it was at first is tried before: what has the digest that
environment.json noted is taken, else what is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iqlite.base.identity import ADAPTER_WEIGHTS
from iqlite.base.names import hub_name, is_hub_id
from iqlite.errors import RunError, warn
from iqlite.integrity import stamp

PROMPTS = ("train", "eval", "outside", "contrary")
PATHS = {"prompts": PROMPTS, "adapter": ("start",), "superior": ("adapter", "unwanted_adapter")}
"""Keys of a recipe that hold paths, by table; those of prompts hold data sets too, and lists."""


def each_path(data: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """A recipe's data with every path changed by `change`, which is told its key (`prompts.train`, `prompts.train.1` in a list) and the path."""
    changed = {name: dict(table) if isinstance(table, Mapping) else table for name, table in data.items()}
    for table, keys in PATHS.items():
        for key in keys:
            value, name = changed.get(table, {}).get(key), f"{table}.{key}"
            if isinstance(value, str):
                changed[table][key] = change(name, value)
            elif isinstance(value, (list, tuple)):
                changed[table][key] = [change(f"{name}.{n}", one) if isinstance(one, str) else one for n, one in enumerate(value)]
    return changed


def digests(data: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """SHA-256 of each local file that a recipe's data names, by its key; of an adapter's folder, its weights'. Paths are relative to `folder`."""
    found: dict[str, str] = {}

    def note(key: str, path: str) -> str:
        if digest := _digest(folder / Path(path).expanduser()):
            found[key] = digest
        return path

    each_path(data, note)
    return found


def found_now(data: Mapping[str, Any], run: Path, environment: Mapping[str, Any]) -> dict[str, Any]:
    """A locked recipe's data with each path where its file is now; one that is nowhere stays as it was."""
    place, known = environment.get("place"), environment.get("files", {})

    def now(key: str, path: str) -> str:
        places = _places(path, run, place)
        there = next((one for one in places if known.get(key) and _digest(one) == known[key]), None)
        if there is None and (there := next((one for one in places if one.exists()), None)) and known.get(key):
            warn(f"{run}: {there} ({key}) has changed since the run was made.")
        return str(there or path)

    changed = each_path(data, now)
    base = changed.get("model", {}).get("base")
    if isinstance(base, str) and Path(base).is_absolute():
        changed["model"]["base"] = str(next((one for one in _places(base, run, place) if one.exists()), base))
    return changed


def check_base(run: Path, base: str) -> None:
    """RunError, with what to do, if a run's base was a file or folder and isn't where it was."""
    if Path(base).is_absolute() and not Path(base).exists():
        raise RunError(f"{run}: its base {base} isn't there any more; say where it is now with --base PATH.")


def base_at(path: str) -> str:
    """What --base names: a file or folder, made absolute, or any other name of a model."""
    there = Path(path).expanduser()
    if there.exists():
        return str(there.resolve())
    if hub_name(path) != path or is_hub_id(path) or path.startswith(("ollama:", "lmstudio:")):
        return path
    raise RunError(f"--base {path}: there is no such file or folder.")


def _places(path: str, run: Path, place: Any) -> list[Path]:
    """Where a file may be: the same way from the run as once, and where it was."""
    here = run.resolve()
    if not isinstance(place, str) or Path(place) == here:
        return [Path(path)]
    try:
        moved = Path(os.path.normpath(here / os.path.relpath(path, place)))
    except ValueError:  # another drive
        return [Path(path)]
    return [moved, Path(path)]


def _digest(path: Path) -> str:
    file = path / ADAPTER_WEIGHTS if path.is_dir() else path
    try:
        return str(stamp(file)["sha256"])
    except OSError:
        return ""
