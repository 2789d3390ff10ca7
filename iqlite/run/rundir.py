"""The run directory, the product's public interface: recipe lock, environment, metrics, samples, adapter, checkpoints, best.

    runs/NAME/  recipe.toml  environment.json  metrics.jsonl  samples.jsonl  adapter/  best/  checkpoints/step-000010/  result.json

Every write is atomic: files and folders are written beside their final name and renamed. No torch at the top.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w

from iqlite.base.identity import ADAPTER_WEIGHTS, Identity, check_adapter, saved_after
from iqlite.base.names import here
from iqlite.errors import RunError, warn
from iqlite.integrity import MANIFEST, drop, fault_in, found_again, manifest_of, put, seal, stamp, swap, write_manifest, write_whole
from iqlite.places import ENVIRONMENT, RECIPE, RESULT, check_no_link, exists, is_run, path_of
from iqlite.recipe.reading import parse_recipe, recipe_data, to_data
from iqlite.recipe.schema import Recipe
from iqlite.run.files import explained, json_numbers, read_json
from iqlite.run.journal import STATE, Journal, step_of
from iqlite.run.lock import Lock
from iqlite.run.moved import PATHS, base_at, check_base, each_path, found_now

AIM = "aim.json"  # what the look before training found

FORMAT = 1
"""Of a run directory, in environment.json (0.1.0 wrote none): raised when an older iqlite couldn't read it any more."""


class RunDir(Journal):
    """One run's folder. `create` makes a new one, `open` opens one that exists."""

    copied = (RECIPE, ENVIRONMENT)
    base: str | None = None  # where the base is now, if that was said

    @classmethod
    def create(cls, path: Path, recipe: Recipe, environment: Mapping[str, Any], *, force: bool = False) -> RunDir:
        """Makes the folder with its recipe lock and environment; RunError if it can't be, exists without `force`, or is being trained."""
        path = path if path.name or not path.is_dir() else path.resolve()  # "." has no name to rename to
        run = cls(path)
        with explained(path):
            check_replaceable(path, force=force)
            replaced = Lock(path) if path.exists() else None
            making = path.with_name(f".making-{path.name}")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            run.id = uuid.uuid4().hex[:12]
            made = {"format": FORMAT, "run": run.id, "place": str(path.resolve()), **environment}
            write_whole(making / ENVIRONMENT, json.dumps(made, indent=2) + "\n")
            write_whole(making / RECIPE, tomli_w.dumps(locked(recipe)))
            seal(making)
            swap(making, path)  # a run directory is there whole or not at all
            if replaced:
                replaced.release()
        return run

    @classmethod
    def open(cls, path: Path, base: str | None = None) -> RunDir:
        """An existing run, `base` where its base is now; RunError if the folder isn't one, or what says how it was made is damaged and no checkpoint has a copy of it."""
        run = cls(path)
        run.base = base_at(base) if base else None
        with suppress(OSError):
            found_again(path)
        faults = {name: fault_in(path, name) and fault_in(path, name) for name in cls.copied}  # twice: training may have been writing it
        for name, fault in faults.items():
            if fault:
                run._put_back(name, fault)
        if not is_run(path):
            raise RunError(f"{path} isn't a run directory (it has no {RECIPE} and {ENVIRONMENT}); name one, such as runs/cheerful-135m.")
        environment = run.environment()
        made = environment.get("format", FORMAT)
        if not isinstance(made, int) or made > FORMAT:
            raise RunError(f"{path} was made by a newer iqlite (format {made}; this one knows {FORMAT}): update iqlite.")
        run.id = str(environment.get("run", ""))
        for folder in (run.best, run.adapter):
            with suppress(OSError):
                found_again(folder)
        return run

    @property
    def adapter(self) -> Path:
        """The trained adapter, in PEFT format."""
        return self.path / "adapter"

    @property
    def best(self) -> Path:
        """The adapter with the lowest held-out KL(policy‖superior) so far."""
        return self.path / "best"

    def trained(self, which: str = "adapter") -> Path:
        """The folder of the run's `adapter` or of its `best` one; RunError if there is no such or training hasn't left it yet."""
        if which not in ("adapter", "best"):
            raise RunError(f"--which {which!r} isn't one of the run's: adapter (as training left it) or best.")
        folder = self.path / which
        if not folder.is_dir() or (not (fault := self.fault(folder)) and not (folder / ADAPTER_WEIGHTS).is_file()):
            raise RunError(
                f"{self.path} has no {which}/ yet, its training hasn't finished: go on with iqlite train … --out {self.path} --resume."
            )
        if fault:
            raise RunError(
                f"{folder}: {fault}; iqlite train … --out {self.path} --resume writes it anew, or put it back from a copy (if you changed it yourself, delete its {MANIFEST})."
            )
        return folder

    def step_of(self, adapter: Path) -> int:
        """The step after which one of the run's adapters was saved: metrics may be further on, after a resume that was killed."""
        said = saved_after(adapter)
        if said is None and self.metrics():  # saved before adapters said so
            return int(self.metrics()[-1]["step"])
        return said or 0

    def steps_taken(self) -> int:
        """How many steps the run's adapter has behind it, 0 if it has none: a monitor's stop leaves the best one, of an earlier step."""
        if result := self.result():
            return int(result["step"])
        return self.step_of(self.adapter) if (self.adapter / ADAPTER_WEIGHTS).is_file() else 0

    def result(self) -> dict[str, Any] | None:
        """How the run ended; None before it has."""
        if fault := fault_in(self.path, RESULT):
            raise RunError(f"{self.path}: {fault}; iqlite train … --out {self.path} --resume writes it anew.")
        file = self.path / RESULT
        return read_json(file) if file.is_file() else None

    def aim(self) -> dict[str, Any] | None:
        """What the look before training found; None if nobody looked, or if that is damaged."""
        if fault := fault_in(self.path, AIM):
            warn(f"{self.path}: {fault}; what the look before training found isn't shown.")
            return None
        return read_json(self.path / AIM) if (self.path / AIM).is_file() else None

    def recipe(self) -> Recipe:
        """The locked recipe, with every path where its file is now."""
        file = self.path / RECIPE
        data = found_now(recipe_data(file), self.path, self.environment())
        if self.base:
            data["model"] = data.get("model", {}) | {"base": self.base}
        return parse_recipe(data, file)

    def check_base(self) -> None:
        """RunError if the base isn't where it was."""
        check_base(self.path, self.recipe().model.base)

    def environment(self) -> dict[str, Any]:
        """Versions, device, base and prompts the run was made with."""
        return read_json(self.path / ENVIRONMENT)

    def check_same(self, recipe: Recipe, environment: Mapping[str, Any]) -> None:
        """RunError with what differs, unless a resumed recipe, its base and its prompts are those of the run."""
        old, new = _flat(locked(self.recipe())), _flat(locked(recipe))
        was = self.environment()
        for key in ("base", "prompts", "thinking"):
            old[key], new[key] = was.get(key), environment.get(key)
        self._moved(old, new, was, environment)
        changed = [
            f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
            for key in sorted(old | new)
            if old.get(key) != new.get(key) and not key.startswith(("judge.", "log."))
        ]
        if changed:
            raise RunError(
                f"{self.path} can't be resumed, since the work has changed: {'; '.join(changed[:4])}. Undo that, or start anew with another --out."
            )

    @staticmethod
    def _moved(old: dict[str, Any], new: dict[str, Any], was: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Takes out of `old` and `new` what differs by its place only: bases of the same weights, files of the same contents."""
        with suppress(TypeError, LookupError):  # a record without weights
            if Identity.from_record(was["base"]).same_base(Identity.from_record(environment["base"])):
                for key in ("base", "model.base"):
                    old.pop(key, None), new.pop(key, None)
        before, now = was.get("files", {}), environment.get("files", {})
        for table, keys in PATHS.items():
            for key in (f"{table}.{name}" for name in keys):
                mine, yours = (
                    {name: sha for name, sha in files.items() if name == key or name.startswith(f"{key}.")} for files in (before, now)
                )
                same = (
                    mine == yours
                    if mine
                    else table == "prompts" and key != "prompts.outside" and was.get("prompts") == environment.get("prompts")
                )
                if same and key in old and key in new:
                    old.pop(key), new.pop(key)

    def take_over(self, recipe: Recipe) -> None:
        """Locks what a resumed recipe may change: how it is judged, where its metrics go, and where its files are."""
        self.write_sealed(RECIPE, tomli_w.dumps(locked(recipe)))
        if (was := self.environment()).get("place", "") not in ("", str(self.path.resolve())):
            self.write_sealed(ENVIRONMENT, json.dumps(was | {"place": str(self.path.resolve())}, indent=2) + "\n")

    def write_result(self, result: Mapping[str, Any]) -> None:
        """How the run ended: result.json is there once it has."""
        self.write_sealed(RESULT, json.dumps(json_numbers(result), indent=2) + "\n")

    def write_sealed(self, name: str, text: str) -> None:
        """Puts one of training's files into the run, and its checksum into the run's manifest: before it, with the old one, so that a kill between
        the two isn't damage."""
        with self._writing():
            making, file = self.path / f".making-{name}", self.path / name
            making.write_text(text, "utf-8")
            try:
                manifest = manifest_of(self.path) or {"files": {}}
            except ValueError:  # damaged itself
                manifest = {"files": {one: [stamp(self.path / one)] for one in (*self.copied, AIM, RESULT) if (self.path / one).is_file()}}
            manifest["files"][name] = [stamp(making), stamp(file) if file.is_file() else None]
            write_manifest(self.path, manifest)
            put(making, file)

    def recover(self) -> None:
        """A journal's, and a damaged or lost best adapter: training goes back to before the step that it is of, which is then done again."""
        super().recover()
        with self._writing():
            for folder in (self.best, self.adapter):
                found_again(folder)
                for leftover in (".making-", ".old-"):
                    shutil.rmtree(folder.with_name(leftover + folder.name), ignore_errors=True)
        checkpoints = self._checkpoints()
        fault = self.fault(self.best) if self.best.is_dir() else "it is missing"
        if not fault or not checkpoints:
            return
        monitors = json.loads((checkpoints[-1] / STATE).read_text("utf-8"))["monitors"]
        if monitors.get("best_kl") is None:  # there was none
            return
        step = monitors["best_step"]
        earlier = [folder for folder in checkpoints if (step_of(folder) or 0) < step]
        if earlier:
            warn(f"{self.best}: {fault}; going on from {earlier[-1].name}, before step {step} that it is of, which is done again.")
        else:
            warn(
                f"{self.best}: {fault}; it was of step {step}, before the checkpoints that are kept: the best from here on takes its place."
            )
        with self._writing():
            for folder in checkpoints[len(earlier) :] if earlier else ():
                drop(folder)
            if self.best.is_dir():
                drop(self.best)

    def _put_back(self, name: str, fault: str) -> None:
        """Takes a damaged file from the last whole checkpoint, and keeps it as NAME.damaged; RunError if there is none."""
        for folder in reversed(self._checkpoints()):
            if (folder / name).is_file() and not fault_in(folder):
                text, file = (folder / name).read_text("utf-8"), self.path / name
                with explained(self.path):
                    if file.exists() and file.read_bytes() != text.encode():
                        file.replace(self.path / f"{name}.damaged")
                        fault += f" (kept as {name}.damaged)"
                    self.write_sealed(name, text)
                warn(f"{self.path}: {fault}; {name} is put back from {folder.name}.")
                return
        raise RunError(f"{self.path}: {fault}; put it back from a copy (if you changed it yourself, delete {self.path / MANIFEST}).")

    def _check_mine(self) -> None:
        try:
            found = json.loads((self.path / ENVIRONMENT).read_bytes()).get("run", "")
        except FileNotFoundError:
            found = None
        except (ValueError, AttributeError):
            return  # damaged, and no less this run's
        if self.id and found != self.id:
            raise RunError(f"{self.path} was moved, removed or replaced while it was being trained: nothing more is written there.")

    def copy_best(self, folder: Path) -> None:
        """Fills a folder with the best adapter."""
        shutil.copytree(self.best, folder, dirs_exist_ok=True)


class Unwritten(RunDir):
    """A run as the processes have it that don't write it: one of several does (`machine.ranks`). Nothing is opened, nothing is locked."""

    def append(self, name: str, line: Mapping[str, Any], *, seal: bool = False) -> None: ...
    def write(self, name: str, text: str) -> None: ...
    def write_sealed(self, name: str, text: str) -> None: ...
    def save_folder(self, folder: Path, write: Callable[[Path], None], **more: Any) -> None: ...
    def save_checkpoint(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None: ...
    def lock(self) -> None: ...


def check_adapter_of(run: RunDir, adapter: Path) -> None:
    """AdapterError, before any weights are read, unless an adapter was made on the run's base."""
    check_adapter(adapter, Identity.from_record(run.environment()["base"]))


def check_replaceable(path: Path, *, force: bool) -> None:
    """RunError unless a new run can be put at `path`: where nothing is or, with `force`, where a run or an empty folder is."""
    if path.name not in ("", ".."):
        check_no_link(path, "--out")
    if not exists(path) and not found_again(path):
        return
    if not force:
        raise RunError(f"{path} exists already: go on with --resume, replace it with --force, or name another --out.")
    if not path.is_dir() or (any(path.iterdir()) and not is_run(path)):
        raise RunError(f"{path} isn't a run directory, so --force won't delete it: name another --out.")


def locked(recipe: Recipe) -> dict[str, Any]:
    """The recipe's data with all defaults and with absolute paths, so that it means the same from the run directory."""
    return with_absolute_paths(to_data(recipe), recipe.folder)


def with_absolute_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe's data, in which paths that were relative to `folder` are absolute."""

    data = each_path(data, lambda _, path: str(path_of(path, folder).resolve()))
    base = here(str(data.get("model", {}).get("base", "")), folder) if data.get("model", {}).get("base") else None
    if base is not None:
        data["model"]["base"] = str(base.resolve())
    return data


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        return {key: value for name, item in data.items() for key, value in _flat(item, f"{prefix}.{name}" if prefix else name).items()}
    return {prefix: data}
