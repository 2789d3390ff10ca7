"""Runs and adapters below a folder, a line each: state, figures, size and time, from what can be read without opening any weights.

A listing reads and changes nothing. Whole files are checked where they are small (recipe, environment, result), folders of weights by the sizes
in their manifests; `RunDir.trained` checks them to the byte before they are used.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from iqlite.base.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS, IDENTITY_FILE
from iqlite.errors import RunError, first_line
from iqlite.integrity import fault_in, manifest_of
from iqlite.places import ENVIRONMENT, RECIPE, RESULT, is_run
from iqlite.run.journal import METRICS, step_of
from iqlite.run.lock import holder

FINISHED, CONVERGED, STOPPED, RUNNING, UNFINISHED, DAMAGED, ADAPTER = (
    "finished", "converged", "stopped", "running", "unfinished", "damaged", "adapter",
)  # fmt: skip
STATES = (FINISHED, CONVERGED, STOPPED, RUNNING, UNFINISHED, DAMAGED, ADAPTER)
DEEPEST = 8  # folders below the one that is named in which runs are looked for; our choice
SECONDS = re.compile(rb'"time/(?:step|eval)_s": ([0-9.eE+-]+)')
TAIL = 65_536  # bytes at the end of metrics.jsonl in which the last lines are looked for at first


@dataclass(frozen=True)
class State:
    """How far a run is. `name` is one of STATES; `why` the monitor that stopped it, the other host that it runs on, or what is
    damaged; `step` the one it can go on from if it is
    unfinished, else the last; `total` is None where nobody can tell."""

    name: str
    step: int = 0
    total: int | None = None
    why: str = ""

    @property
    def words(self) -> str:
        """As people say it."""
        of = f" of {self.total}" if self.total and self.total != self.step else ""
        if self.name == RUNNING:
            return f"running{f' on {self.why}' if self.why else ''}, step {self.step}{of}"
        if self.name == UNFINISHED:
            return f"unfinished after step {self.step}{of}"
        if self.name == STOPPED:
            return f"stopped by “{self.why}” at step {self.step}{of}"
        return self.name


@dataclass(frozen=True)
class Row:
    """A run, or an adapter that lies outside of any. `before` and `after` are mean scores of held-out answers by `measure`, the base's and the
    kept adapter's, None where there are none; `changed` is when it was last written, seconds since 1970."""

    path: Path
    state: State
    behaviour: str
    base: str
    measure: str
    before: float | None
    after: float | None
    bytes: int
    seconds: float
    changed: float

    @property
    def order(self) -> tuple[Any, ...]:
        """What rows are sorted by: those that are being trained first, then the newest."""
        running = self.state.name == RUNNING
        return not running, 0.0 if running else -self.changed, str(self.path)

    def record(self) -> dict[str, Any]:
        """For --json."""
        state = {"state": self.state.name, "step": self.state.step, "total": self.state.total, "why": self.state.why}
        figures = {"measure": self.measure, "before": self.before, "after": self.after}
        return {"path": str(self.path), **state, "behaviour": self.behaviour, "base": self.base, **figures, "bytes": self.bytes,
                "seconds": self.seconds, "changed": self.changed}  # fmt: skip


def listed(folder: Path) -> list[Row]:
    """Runs and adapters in a folder and below, or the folder itself if it is one; in `Row.order`."""
    return sorted((row_of(path) for path in _below(folder, DEEPEST)), key=lambda row: row.order)


def row_of(path: Path) -> Row:
    """What a run's or an adapter's folder says."""
    return _run(path) if is_run(path) else _adapter(path)


def state_of(run: Path, recipe: Mapping[str, Any], environment: Mapping[str, Any], result: Mapping[str, Any] | None, last: int) -> State:
    """A run's state by its files: `last` is the last step in its metrics."""
    if result:
        why = str(result["why"])
        name, monitor = (why, "") if why in (FINISHED, CONVERGED) else (STOPPED, why)
        return State(name, int(result["step"]), int(result["total"]), monitor)
    total = _total(recipe, environment)
    if who := holder(run):
        host = str(who.get("host", ""))
        return State(RUNNING, last, total, host if host != socket.gethostname() else "")
    numbers = [step for entry in _entries(run / "checkpoints") if (step := step_of(Path(entry.name))) is not None]
    return State(UNFINISHED, max(numbers, default=0), total)


def _total(recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> int | None:
    """Steps of the whole run, as `Recipe.total_steps` has them."""
    train, prompts = recipe.get("train", {}), environment.get("prompts", {}).get("train")
    if (epochs := train.get("epochs")) is None:
        return int(train.get("steps", 20))
    per_step = recipe.get("rollout", {}).get("prompts_per_step", 8)
    return max(1, math.ceil(epochs * prompts / per_step)) if isinstance(prompts, int) else None


def _run(path: Path) -> Row:
    size, changed = measured(path)
    try:
        if fault := fault_in(path, RECIPE, ENVIRONMENT, RESULT) or _lost(path):
            raise ValueError(fault)
        recipe = _recipe((path / RECIPE).read_text("utf-8"))
        environment = _object(path / ENVIRONMENT)
        result = _object(path / RESULT) if (path / RESULT).is_file() else None
        data = (path / METRICS).read_bytes() if (path / METRICS).is_file() else b""
        state = state_of(path, recipe, environment, result, _last_step(data))
        kept = result.get("best_step") if result and state.name == STOPPED else None  # a monitor's stop leaves the best adapter
        before, after = _figures(data, kept)
        behavior = recipe.get("behavior", {})
        wanted = behavior.get("wanted") or " ".join(str(one.get("wanted", "")) for one in behavior.get("mixture", ()))
        base = environment.get("base", {}).get("name") or recipe.get("model", {}).get("base", "")
        seconds = sum(_number(found) for found in SECONDS.findall(data))
        measure = recipe.get("judge", {}).get("measure", "described")
        return Row(path, state, str(wanted), _short(base), str(measure), before, after, size, seconds, changed)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return Row(path, State(DAMAGED, why=first_line(error)), "", "", "", None, None, size, 0.0, changed)


def _adapter(path: Path) -> Row:
    size, changed = measured(path)
    try:
        known = _object(path / IDENTITY_FILE)["base"]["name"] if (path / IDENTITY_FILE).is_file() else ""
        base = known or _object(path / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    except (OSError, ValueError, LookupError, TypeError) as error:
        return Row(path, State(DAMAGED, why=first_line(error)), "", "", "", None, None, size, 0.0, changed)
    return Row(path, State(ADAPTER), "", _short(base), "", None, None, size, 0.0, changed)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Folders of runs and of adapters, the folder itself included; links aren't followed, and hidden folders not entered."""
    if is_run(folder) or ((folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file()):
        yield folder
    elif depth:
        for entry in _entries(folder):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _below(folder / entry.name, depth - 1)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; nothing where it can't be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def measured(folder: Path) -> tuple[int, float]:
    """(bytes of all files in it and below, when the last of its own was written); what goes away meanwhile counts as nothing."""
    size, changed = 0, 0.0
    for entry in _entries(folder):
        try:
            if entry.is_dir(follow_symlinks=False):
                size += measured(folder / entry.name)[0]
            elif entry.is_file(follow_symlinks=False):
                found = entry.stat(follow_symlinks=False)
                size, changed = size + found.st_size, max(changed, found.st_mtime)
        except OSError:
            continue
    return size, changed


def _lost(path: Path) -> str:
    """What is missing or cut of the weights' folders, by their manifests and sizes; a folder that is just being replaced isn't looked at."""
    for name in ("adapter", "best"):
        for file, accepted in ((manifest_of(path / name) or {}).get("files", {}) if (path / name).is_dir() else {}).items():
            there = path / name / file
            if not there.is_file():
                if (path / name).is_dir() and not (path / f".old-{name}").exists():
                    return f"{name}/{file} is missing"
            elif there.stat().st_size not in [one["bytes"] for one in accepted if one]:
                return f"{name}/{file} has {there.stat().st_size} bytes and not {accepted[0]['bytes']}"
    return ""


@lru_cache(maxsize=4096)
def _recipe(text: str) -> Mapping[str, Any]:
    """A recipe's data, not validated; kept, since whoever watches asks again and again."""
    return tomllib.loads(text)


def _object(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return found


def _lines(data: bytes, *, last: bool) -> Iterator[dict[str, Any]]:
    """Whole lines of metrics from the first on, or from the last back; what is damaged is passed over."""
    data = data[: data.rfind(b"\n") + 1]
    at = 0 if not last else len(data) - 1
    while 0 <= at < len(data):
        if last:
            start = data.rfind(b"\n", 0, at) + 1
            text, at = data[start:at], start - 1
        else:
            end = data.find(b"\n", at)
            text, at = data[at:end], end + 1
        try:
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line
        except ValueError:
            continue


def _last_step(data: bytes) -> int:
    return next((int(line["step"]) for line in _lines(data, last=True)), 0)


def _figures(data: bytes, kept: int | None) -> tuple[float | None, float | None]:
    """(the base's score, the adapter's) by the evaluations of training: of step `kept`, or of the last one."""
    for line in _lines(data, last=True):
        after = line.get("eval/measure")
        if isinstance(after, (int, float)) and (kept is None or line["step"] <= kept):
            before = line.get("eval/measure_base")
            return (float(before) if isinstance(before, (int, float)) else None), float(after)
    return None, None


def _number(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _short(base: Any) -> str:
    """A base's name, without the folders of a path."""
    return Path(str(base)).name if Path(str(base)).is_absolute() else str(base)


def check_folder(path: Path) -> None:
    """RunError unless the folder is there."""
    if not path.is_dir():
        raise RunError(f"{path}: there is no such folder; name one that holds runs, such as runs.")
