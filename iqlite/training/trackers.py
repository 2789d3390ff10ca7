"""Metrics to TensorBoard, trackio and Weights & Biases through accelerate's trackers, where a recipe asks for that (`[log] to`).

What goes there is each line of metrics.jsonl and the recipe: no prompts of files, no answers, nothing of the machine or the terminal. A step is sent
once: the run notes, before it sends one, how far each tracker is, so that a resumed run goes on behind it. A tracker that fails on the way is
left out from then on; training goes on. No torch at the top.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from iqlite.errors import RecipeError, RunError, first_line, warn
from iqlite.recipe.reading import to_data
from iqlite.recipe.schema import Recipe
from iqlite.run.rundir import RunDir, Unwritten

if TYPE_CHECKING:
    from iqlite.records import StepMetrics
    from iqlite.training.evaluating import Reporter
    from iqlite.training.monitors import Verdict

PROJECT = "iqlite"
SENT = "trackers.json"  # in the run: the last step that each tracker was sent


def check_trackers(recipe: Recipe) -> None:
    """RecipeError for a tracker that a recipe asks for and that isn't installed."""
    for name in recipe.log.to:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"{recipe.path}: log.to has {name!r}, which isn't installed: pip install {name}, or take it out.")


@contextmanager
def tracked(report: Reporter, run: RunDir, recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> Iterator[Reporter]:
    """A reporter that tells `report` and the recipe's trackers; `say` is told where to look. RunError for one that can't begin."""
    if not recipe.log.to or isinstance(run, Unwritten):
        yield report
        return
    trackers: dict[str, Any] = {}
    for name in recipe.log.to:
        try:
            trackers[name] = _begun(name, run, recipe)
        except Exception as error:  # noqa: BLE001 - whatever a service, its key or a disk may say
            raise RunError(f"log.to: {name} can't begin ({first_line(error)}): mend that, or take it out of log.to, and go on with --resume.") from None  # fmt: skip
        say(f"metrics also go to {_where(name, run, trackers[name])}")
    report = Tracked(report, run, trackers)
    try:
        yield report
    finally:
        report.finish()


class Tracked:
    """A reporter with trackers beside it."""

    def __init__(self, report: Reporter, run: RunDir, trackers: dict[str, Any]):
        self.report, self.run, self.trackers = report, run, trackers
        file = run.path / SENT
        self.sent: dict[str, int] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        self.whole = False

    def step(self, metrics: StepMetrics, total: int) -> None:
        """One step done; the first time, also what the run has from before."""
        self.report.step(metrics, total)
        lines: Sequence[Mapping[str, Any]] = [{"step": metrics.step, **metrics.values}] if self.whole else self.run.metrics()
        self.whole = True
        for line in lines:
            self._send(int(line["step"]), {name: float(value) for name, value in line.items() if name != "step" and _is_number(value)})

    def sample(self, step: int, prompt: str, draw: Callable[[], tuple[str, str]]) -> None:
        """As the other reporter shows it; it isn't sent."""
        self.report.sample(step, prompt, draw)

    def verdict(self, step: int, verdict: Verdict) -> None:
        """As the other reporter shows it; it isn't sent."""
        self.report.verdict(step, verdict)

    def finish(self) -> None:
        """Everything is sent."""
        for name, tracker in list(self.trackers.items()):
            self._trying(name, _finish, name, tracker)

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        behind = [name for name in self.trackers if step > self.sent.get(name, -1)]
        if not behind:
            return
        self.sent |= dict.fromkeys(behind, step)
        self.run.write(SENT, json.dumps(self.sent) + "\n")
        for name in behind:
            self._trying(name, self.trackers[name].log, dict(values), step=step)

    def _trying(self, name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            with redirect_stdout(io.StringIO()):  # what is printed there is for programs
                call(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - a network, a disk, a service
            self.trackers.pop(name, None)
            warn(f"log.to: {name} has failed ({first_line(error)}); training goes on without it, and metrics.jsonl has everything.")


def _begun(name: str, run: RunDir, recipe: Recipe) -> Any:
    """A tracker that takes values: in the same place as before where the run goes on."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # its trackers ask it which process logs
    with redirect_stdout(io.StringIO()):
        tracker = LOGGER_TYPE_TO_CLASS[name]("tensorboard" if name == "tensorboard" else PROJECT, **_options(name, run, recipe))
        tracker.start()
    return tracker


def _finish(name: str, tracker: Any) -> None:
    """Everything is sent."""
    if name == "trackio":
        import trackio

        trackio.finish()  # accelerate's leaves it to be finished once more, and talked of, when Python ends
    else:
        tracker.finish()


def _options(name: str, run: RunDir, recipe: Recipe) -> dict[str, Any]:
    """How a tracker begins: under the run's own name and id, so that it goes on there, and collecting nothing by itself."""
    if name == "tensorboard":
        return {"logging_dir": run.path}
    title = run.path.resolve().name
    shared = {"resume": "allow", "config": _flat(recipe)}
    if name == "trackio":
        return {"name": f"{title}-{run.id}", "embed": False, "auto_log_cpu": False, "auto_log_gpu": False, **shared}
    import wandb

    quiet = {"silent": True, "console": "off", "disable_git": True, "disable_code": True, "save_code": False, "x_disable_stats": True,
             "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False}  # fmt: skip
    settings = {key: value for key, value in quiet.items() if key in wandb.Settings.model_fields}
    return {"name": title, "id": run.id or None, "settings": settings, "dir": os.environ.get("WANDB_DIR") or run.path, **shared}


def _where(name: str, run: RunDir, tracker: Any) -> str:
    if name == "tensorboard":
        return f"TensorBoard: tensorboard --logdir {run.path}"
    if name == "trackio":
        return f"trackio: trackio show --project {PROJECT}"
    return f"Weights & Biases: {f'offline, in {tracker.run.dir}' if tracker.run.offline else tracker.run.url}"


def _flat(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys and values, as `table.key`; lists as text."""
    return {
        f"{table}.{key}": value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for table, keys in to_data(recipe).items()
        for key, value in keys.items()
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
