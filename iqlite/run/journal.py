"""A folder of work that goes on after a kill: lines of metrics and samples, checkpoints, adapters. A run is one, a baseline's work is one.

Every write is atomic: files and folders are written beside their final name and renamed. No torch at the top.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iqlite.places import usual_rights
from iqlite.run.files import explained, json_numbers, lines_of, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from iqlite.records import StepMetrics

KEPT_CHECKPOINTS = 2
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Journal:
    """The folder. `again` is what to do after a full disk."""

    def __init__(self, path: Path, again: str = "go on with --resume"):
        self.path, self.again = path, again

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
        return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0

    def write(self, name: str, text: str) -> None:
        """Puts a command's own file into the run."""
        with explained(self.path, self.again):
            self._write(name, text)

    def save_folder(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Lets `write` fill a private folder, then puts it in `folder`'s place."""
        with explained(self.path, self.again):
            making, old = folder.with_name(f".making-{folder.name}"), folder.with_name(f".old-{folder.name}")
            for leftover in (making, old):
                shutil.rmtree(leftover, ignore_errors=True)
            making.mkdir(parents=True)
            write(making)
            usual_rights(making)
            if folder.exists():
                folder.rename(old)
            making.rename(folder)
            shutil.rmtree(old, ignore_errors=True)

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
        return list(lines_of(self.path / name))

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
        write_whole(self.path / name, text)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A checkpoint's tensors whose names begin so, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
