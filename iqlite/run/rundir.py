"""The run directory, the product's public interface: recipe lock, environment, metrics, samples, adapter, checkpoints, best.

    runs/NAME/  recipe.toml  environment.json  metrics.jsonl  samples.jsonl  adapter/  best/  checkpoints/step-000010/  result.json

Every write is atomic: files and folders are written beside their final name and renamed. No torch at the top.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from iqlite.base.identity import ADAPTER_WEIGHTS, Identity, check_adapter
from iqlite.errors import RunError
from iqlite.recipe.schema import Recipe, load_recipe, to_data

if TYPE_CHECKING:
    from torch import Tensor

    from iqlite.records import StepMetrics

KEPT_CHECKPOINTS = 2
RECIPE, ENVIRONMENT, METRICS, SAMPLES, RESULT = "recipe.toml", "environment.json", "metrics.jsonl", "samples.jsonl", "result.json"


class RunDir:
    """One run's folder. `create` makes a new one, `RunDir(path)` opens one that exists. `again` is what to do after a full disk."""

    def __init__(self, path: Path, again: str = "go on with --resume"):
        self.path, self.again = path, again

    @classmethod
    def create(cls, path: Path, recipe: Recipe, environment: Mapping[str, Any], *, force: bool = False) -> RunDir:
        """Makes the folder with its recipe lock and environment; RunError if it can't be or exists without `force`."""
        path = path.resolve() if path.is_dir() else path  # "." has no name to rename to
        run = cls(path)
        with explained(path):
            if path.exists():
                if not force:
                    raise RunError(f"{path} exists already: go on with --resume, replace it with --force, or name another --out.")
                if not path.is_dir() or (any(path.iterdir()) and not is_run(path)):
                    raise RunError(f"{path} isn't a run directory, so --force won't delete it: name another --out.")
            making = cls(path.with_name(f".making-{path.name}"))
            shutil.rmtree(making.path, ignore_errors=True)
            making.path.mkdir(parents=True)
            making._write(ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
            making._write(RECIPE, tomli_w.dumps(locked(recipe)))
            if path.exists():
                shutil.rmtree(path)
            making.path.rename(path)  # a run directory is there whole or not at all
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run; RunError if the folder isn't one."""
        if not is_run(path):
            raise RunError(f"{path} isn't a run directory (it has no {RECIPE} and {ENVIRONMENT}); name one, such as runs/cheerful-135m.")
        return cls(path)

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
            raise RunError(f"--adapter {which!r} isn't one of the run's: adapter (as training left it) or best.")
        folder = self.path / which
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise RunError(
                f"{self.path} has no {which}/ yet, its training hasn't finished: go on with iqlite train … --out {self.path} --resume."
            )
        return folder

    def step_of(self, adapter: Path) -> int:
        """The step after which one of the run's adapters was saved: metrics may be further on, after a resume that was killed."""
        from safetensors import safe_open

        with safe_open(adapter / ADAPTER_WEIGHTS, "numpy") as file:
            said = (file.metadata() or {}).get("step")
        if said is None and self.metrics():  # saved before adapters said so
            return int(self.metrics()[-1]["step"])
        return int(said or 0)

    def steps_taken(self) -> int:
        """How many steps the run's adapter has behind it, 0 if it has none: a monitor's stop leaves the best one, of an earlier step."""
        if (self.path / RESULT).is_file():
            return int(json.loads((self.path / RESULT).read_text("utf-8"))["step"])
        return self.step_of(self.adapter) if (self.adapter / ADAPTER_WEIGHTS).is_file() else 0

    def recipe(self) -> Recipe:
        """The locked recipe."""
        return load_recipe(self.path / RECIPE)

    def environment(self) -> dict[str, Any]:
        """Versions, device, base and prompts the run was made with."""
        data: dict[str, Any] = json.loads((self.path / ENVIRONMENT).read_text("utf-8"))
        return data

    def check_same(self, recipe: Recipe, environment: Mapping[str, Any]) -> None:
        """RunError with what differs, unless a resumed recipe, its base and its prompts are those of the run."""
        old, new = _flat(locked(self.recipe())), _flat(locked(recipe))
        was = self.environment()
        for key in ("base", "prompts"):
            old[key], new[key] = was.get(key), environment.get(key)
        changed = [
            f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
            for key in sorted(old | new)
            if old.get(key) != new.get(key) and not key.startswith("judge.")
        ]
        if changed:
            raise RunError(
                f"{self.path} can't be resumed, since the work has changed: {'; '.join(changed[:4])}. Undo that, or start anew with another --out."
            )

    def take_over(self, recipe: Recipe) -> None:
        """Locks what a resumed recipe may change: how it is judged."""
        self.write(RECIPE, tomli_w.dumps(locked(recipe)))

    def add_metrics(self, metrics: StepMetrics) -> None:
        """Appends one line to metrics.jsonl."""
        self.append(METRICS, {"step": metrics.step, **json_numbers(metrics.values)})

    def add_sample(self, step: int, prompt: str, answer: str, score: float | None = None) -> None:
        """Appends one held-out answer to samples.jsonl, with its score by the recipe's measure."""
        self.append(SAMPLES, {"step": step, "prompt": prompt, "answer": answer} | ({} if score is None else {"score": score}))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self.lines(METRICS)

    def last_step(self) -> int:
        """Step of the last checkpoint; 0 before the first."""
        checkpoints = self._checkpoints()
        return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0

    def write(self, name: str, text: str) -> None:
        """Puts a command's own file into the run."""
        with explained(self.path, self.again):
            self._write(name, text)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """How the run ended: result.json is there once it has."""
        self.write(RESULT, json.dumps(json_numbers(result), indent=2) + "\n")

    def save_folder(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Lets `write` fill a private folder, then puts it in `folder`'s place."""
        with explained(self.path, self.again):
            making, old = folder.with_name(f".making-{folder.name}"), folder.with_name(f".old-{folder.name}")
            for leftover in (making, old):
                shutil.rmtree(leftover, ignore_errors=True)
            making.mkdir(parents=True)
            write(making)
            if folder.exists():
                folder.rename(old)
            making.rename(folder)
            shutil.rmtree(old, ignore_errors=True)

    def copy_best(self, folder: Path) -> None:
        """Fills a folder with the best adapter."""
        shutil.copytree(self.best, folder, dirs_exist_ok=True)

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes checkpoints/step-N with everything an exact resume needs, and drops the oldest ones."""
        from safetensors.torch import save_file

        def write(folder: Path) -> None:
            save_file(dict(tensors), folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": step, **state}), "utf-8")

        folder = self.path / "checkpoints" / f"step-{step:06d}"
        self.save_folder(folder, write)
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, state) of the last checkpoint; later lines of metrics and samples are dropped. None before the first one."""
        from safetensors.torch import load_file

        checkpoints = self._checkpoints()
        if not checkpoints:
            self.keep_lines(-1)
            return None
        state: dict[str, Any] = json.loads((checkpoints[-1] / "state.json").read_text("utf-8"))
        self.keep_lines(state["step"])
        return load_file(checkpoints[-1] / "state.safetensors"), state

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Adds a line to one of the folder's .jsonl files."""
        with explained(self.path, self.again), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of one of the folder's .jsonl files, [] if it isn't there."""
        return list(_lines(self.path / name))

    def keep_lines(self, step: int, *names: str) -> None:
        """Drops the lines of later steps, and one that a kill cut in two."""
        with explained(self.path, self.again):
            for name in names or (METRICS, SAMPLES):
                kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines(name) if line["step"] <= step]
                if (self.path / name).is_file():
                    self._write(name, "".join(kept))

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*"))

    def _write(self, name: str, text: str) -> None:
        making = self.path / f".making-{name}"
        making.write_text(text, "utf-8")
        os.replace(making, self.path / name)


def json_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with null for what JSON has no number for: nan and the infinities."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A checkpoint's tensors whose names begin so, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def is_run(path: Path) -> bool:
    """True if the folder is a run's: a user's own folder may hold a recipe.toml, but no environment beside it."""
    return (path / RECIPE).is_file() and (path / ENVIRONMENT).is_file()


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


def check_adapter_of(run: RunDir, adapter: Path) -> None:
    """AdapterError, before any weights are read, unless an adapter was made on the run's base."""
    check_adapter(adapter, Identity.from_record(run.environment()["base"]))


def leaving(run_path: Path, which: str, out: Path, mark: str, *, strength: float, force: bool) -> tuple[RunDir, Path]:
    """(run, adapter) of what is to be merged or exported to `out`; IqliteError, before anything heavy, for what can't be."""
    run = RunDir.open(run_path)
    adapter = run.trained(which)
    check_adapter_of(run, adapter)
    check_place(out, mark, force=force)
    if not (math.isfinite(strength) and abs(strength) <= 100):
        raise RunError(f"--scale {strength:g} can't be used: give a factor such as 0.5 or 1.")
    return run, adapter


def check_place(path: Path, mark: str, *, force: bool) -> None:
    """RunError unless a new file or folder can be put at `path`: `force` replaces a file, or a folder that holds `mark`."""
    if path.name in ("", ".."):
        raise RunError(f"-o {path} is where you are, or above: name a folder or file of its own.")
    if not path.exists():
        return
    if not force:
        raise RunError(f"{path} exists already: replace it with --force, or name another -o.")
    if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise RunError(f"{path} isn't a folder that iqlite wrote ({mark} is missing), so --force won't delete it: name another -o.")


def replace_with(making: Path, path: Path) -> None:
    """Puts a finished file or folder in `path`'s place."""
    with explained(path):
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(making, path)


def locked(recipe: Recipe) -> dict[str, Any]:
    """The recipe's data with all defaults and with absolute paths, so that it means the same from the run directory."""
    data = to_data(recipe)

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        return str((recipe.folder / Path(value).expanduser()).resolve()) if isinstance(value, str) else value

    for table, keys in {
        "prompts": ("train", "eval", "outside", "contrary"),
        "adapter": ("start",),
        "superior": ("adapter", "unwanted_adapter"),
    }.items():
        for key in keys:
            if key in data[table]:
                data[table][key] = absolute(data[table][key])
    base = recipe.folder / Path(recipe.model.base).expanduser()
    if base.exists():
        data["model"]["base"] = str(base.resolve())
    return data


@contextmanager
def explained(path: Path, again: str = "go on with --resume") -> Iterator[None]:
    """What a disk can refuse, as one sentence. safetensors wraps the system's error in its own, which is no OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):  # torch.save's own way to say it
            raise
        if getattr(error, "errno", None) == errno.ENOSPC or "no space left" in str(error).lower():
            raise RunError(f"{path}: no space left on its disk: free some space, then {again}.") from None
        raise RunError(
            f"{path} can't be written ({getattr(error, 'strerror', None) or error}): name another place, or check the folder's rights."
        ) from None


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        return {key: value for name, item in data.items() for key, value in _flat(item, f"{prefix}.{name}" if prefix else name).items()}
    return {prefix: data}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):  # splitlines would also split where a model wrote U+2028
            try:
                if line:
                    yield json.loads(line)
            except ValueError:
                return  # the line that a kill cut in two; nothing can follow it
