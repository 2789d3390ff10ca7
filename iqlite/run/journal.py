"""A folder of work that goes on after a kill: lines of metrics and samples, checkpoints, adapters. A run is one, a baseline's work is one.

Every write is atomic: files and folders are written beside their final name and renamed. Each folder has a manifest with its files'
checksums, a checkpoint's also those of the lines before it, so that what is damaged is noticed and said. No torch at the top.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iqlite.errors import RunError, first_line, warn
from iqlite.integrity import crc, drop, fault_in, manifest_of, seal, sealed, swap, sync, unsealed, write_whole
from iqlite.places import usual_rights
from iqlite.run.files import explained, json_numbers
from iqlite.run.lock import Lock

if TYPE_CHECKING:
    from torch import Tensor

    from iqlite.records import StepMetrics

KEPT_CHECKPOINTS = 2
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
STATE, TENSORS = "state.json", "state.safetensors"


class Journal:
    """The folder. `again` is what to do after a full disk. `copied` are files that each checkpoint takes along."""

    copied: tuple[str, ...] = ()

    def __init__(self, path: Path, again: str = "go on with --resume"):
        self.path, self.again = path, again
        self.id = ""  # what every folder in it is marked with, so that another run's isn't taken for its own
        self._lock: Lock | None = None

    def lock(self) -> None:
        """From now on this process is the one that writes here; RunError if another is."""
        if self._lock is None:
            with explained(self.path):
                self._lock = Lock(self.path)

    def release(self) -> None:
        """Others may write here again."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block this process is the one that writes here."""
        self.lock()
        try:
            yield
        finally:
            self.release()

    def add_metrics(self, metrics: StepMetrics) -> None:
        """Appends one line to metrics.jsonl."""
        self.append(METRICS, {"step": metrics.step, **json_numbers(metrics.values)})

    def add_sample(self, step: int, prompt: str, answer: str, score: float | None = None, thought: str = "") -> None:
        """Appends one held-out answer to samples.jsonl, with its score by the recipe's measure, and what was thought before it."""
        more: dict[str, Any] = ({} if score is None else {"score": score}) | ({"thought": thought} if thought else {})
        self.append(SAMPLES, {"step": step, "prompt": prompt, "answer": answer} | more)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self.lines(METRICS)

    def last_step(self) -> int:
        """Step of the last checkpoint; 0 before the first."""
        checkpoints = self._checkpoints()
        return step_of(checkpoints[-1]) or 0 if checkpoints else 0

    def write(self, name: str, text: str) -> None:
        """Puts a command's own file into the run."""
        with self._writing():
            write_whole(self.path / name, text)

    def save_folder(self, folder: Path, write: Callable[[Path], None], **more: Any) -> None:
        """Lets `write` fill a private folder, seals it with a manifest that holds `more`, then puts it in `folder`'s place."""
        with self._writing():
            making = folder.with_name(f".making-{folder.name}")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            write(making)
            usual_rights(making)
            seal(making, **({"run": self.id} if self.id else {}), **more)
            swap(making, folder)

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes checkpoints/step-N with everything an exact resume needs, and drops the oldest ones."""
        from safetensors.torch import save_file

        def write(folder: Path) -> None:
            save_file(dict(tensors), folder / TENSORS)
            (folder / STATE).write_text(json.dumps({"step": step, **state}), "utf-8")
            for name in self.copied:
                shutil.copyfile(self.path / name, folder / name)

        with self._writing():
            for name in (METRICS, SAMPLES):
                if (self.path / name).is_file():
                    sync(self.path / name)
            lines = {name: self._checksums(name) for name in (METRICS, SAMPLES)}
        self.save_folder(self.path / "checkpoints" / f"step-{step:06d}", write, lines=lines)
        with self._writing():
            self._prune()

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, state) of the last checkpoint that is whole; later lines of metrics and samples are dropped. None before the first one."""
        from safetensors.torch import load_file

        self.recover()
        checkpoints = self._checkpoints()
        if not checkpoints:
            self.keep_lines(-1)
            return None
        state: dict[str, Any] = json.loads((checkpoints[-1] / STATE).read_text("utf-8"))
        self.keep_lines(state["step"])
        return load_file(checkpoints[-1] / TENSORS), state

    def recover(self) -> None:
        """Clears what kills left behind, and drops damaged checkpoints for the one before; RunError if there are some and none is whole."""
        checkpoints = self._checkpoints()
        faults = {}
        for folder in reversed(checkpoints):
            if not (fault := self.fault(folder)):
                break
            faults[folder] = fault
        if faults and len(faults) == len(checkpoints):
            newest = next(iter(faults))
            raise RunError(
                f"{self.path} can't be resumed, none of its checkpoints is whole ({newest.name}: {faults[newest]}): put one back from a copy, or start anew with --force or another --out."
            )
        for folder, fault in faults.items():
            warn(f"{folder}: {fault}; going on from {checkpoints[-1 - len(faults)].name}, the one before it.")
        with self._writing():
            for folder in faults:
                drop(folder)
            self._prune()

    def fault(self, folder: Path) -> str:
        """What is wrong with one of its folders, in a few words; "" if nothing is. A checkpoint without a manifest, as older versions left them,
        is at least opened."""
        if fault := fault_in(folder):
            return fault
        manifest = manifest_of(folder) or {}
        if manifest.get("run", self.id) != self.id:
            return "it is of another run"
        if manifest or folder.parent.name != "checkpoints":
            return ""
        from safetensors import SafetensorError, safe_open

        try:
            step = json.loads((folder / STATE).read_text("utf-8"))["step"]
            safe_open(folder / TENSORS, "numpy")
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            return f"it can't be read ({first_line(error)})"
        return "" if folder.name == f"step-{step:06d}" else f"it is of step {step}"

    def append(self, name: str, line: Mapping[str, Any], *, seal: bool = False) -> None:
        """Adds a line to one of the folder's .jsonl files, with a checksum of its own to `seal` it."""
        with self._writing(), (self.path / name).open("a", encoding="utf-8") as file:
            file.write((sealed(line) if seal else json.dumps(line, ensure_ascii=False)) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of one of the folder's .jsonl files, [] if it isn't there. What is damaged is left out, counted and said."""
        return [line for _, line in self._whole(name)]

    def keep_lines(self, step: int, *names: str) -> None:
        """Drops the lines of later steps, damaged ones, and one that a kill cut in two."""
        with self._writing():
            for name in names or (METRICS, SAMPLES):
                kept = b"".join(text + b"\n" for text, line in self._whole(name) if line["step"] <= step)
                if (self.path / name).is_file() and kept != (self.path / name).read_bytes():
                    write_whole(self.path / name, kept.decode())

    def _whole(self, name: str) -> list[tuple[bytes, dict[str, Any]]]:
        """(bytes, object) of each line that is as it was written: by the checksums of the last checkpoint, and after it by being readable."""
        checkpoints = self._checkpoints()
        written, last = self._written(checkpoints[-1], name) if checkpoints else None, self.last_step()
        try:
            data = (self.path / name).read_bytes()
        except FileNotFoundError:
            data = b""
        left, kept, unreadable = Counter(written or ()), [], 0
        *whole, _ = data.split(
            b"\n"
        )  # splitlines would also split where a model wrote U+2028; behind the last end is what a kill cut in two
        for text in filter(None, whole):
            try:
                line = unsealed(text)
                step = int(line["step"])
            except (ValueError, LookupError, TypeError):
                unreadable += 1
                continue
            if left[crc(text)]:
                left[crc(text)] -= 1
            elif written is not None and step <= last:
                continue
            kept.append((text, line))
        missing = unreadable if written is None else left.total()
        if missing:
            warn(
                f"{self.path / name}: {missing} of {len(kept) + missing} lines {'is' if missing == 1 else 'are'} damaged or missing; the others are kept."
            )
        return kept

    def _checksums(self, name: str) -> list[str]:
        """Of a file's lines: what the last checkpoint says, so that a lost one stays counted, and those that came after it."""
        checkpoints = self._checkpoints()
        before = self._written(checkpoints[-1], name) if checkpoints else None
        return (before or []) + [crc(text) for text, line in self._whole(name) if before is None or line["step"] > self.last_step()]

    def _written(self, checkpoint: Path, name: str) -> list[str] | None:
        """The checksums of a file's lines at a checkpoint; None if it doesn't say."""
        try:
            manifest = manifest_of(checkpoint) or {}
        except (OSError, ValueError):
            return None
        found: list[str] | None = manifest.get("lines", {}).get(name)
        return found

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What a disk refuses is one sentence, and so is a folder that isn't this process's any more."""
        with explained(self.path, self.again):
            if self._lock is not None:
                self._check_mine()
            yield

    def _check_mine(self) -> None:
        """RunError if what is written here now is another's."""

    def _prune(self) -> None:
        """Drops the oldest checkpoints, and what is left of ones that were being written or dropped."""
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            drop(old)
        for leftover in (self.path / "checkpoints").glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        found = [folder for folder in (self.path / "checkpoints").glob("step-*") if step_of(folder) is not None]
        return sorted(found, key=lambda folder: step_of(folder) or 0)


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; None for a folder that is called otherwise."""
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdecimal() else None


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A checkpoint's tensors whose names begin so, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
