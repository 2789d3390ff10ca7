"""Methods to compare a run with, trained under its recipe and kept in it: runs/NAME/baselines/METHOD/ holds the adapter and what it took."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from iqlite.baselines.methods import TRL, check_names
from iqlite.baselines.ppo import train_ppo
from iqlite.baselines.trl_trainers import ROWS, TRAINER, check_trl, per_step, train_by_trl
from iqlite.errors import RunError
from iqlite.integrity import drop, fault_in, put, seal
from iqlite.machine.sizes import within_memory
from iqlite.recipe.pairs import load_pairs
from iqlite.recipe.schema import Recipe
from iqlite.run.files import explained, read_json
from iqlite.run.journal import Journal
from iqlite.run.rundir import RunDir
from iqlite.terminal import duration
from iqlite.training.opening import open_session

RECORD = "baseline.json"


def shown(method: str, pairs: str | None) -> str:
    """How a comparison names a baseline: DPO on a user's pairs with their file."""
    return f"{method} ({pairs})" if pairs else method


def check_methods(names: Sequence[str], recipe: Recipe, pairs: Path | None = None) -> None:
    """RunError for a method that there isn't or that can't be had here or for this recipe; PromptsError for pairs that can't be read."""
    check_names(names)
    if by_trl := [name for name in names if name in TRL]:
        check_trl()
        if recipe.adapter.start is not None:
            raise RunError(f"{recipe.path}: --with {by_trl[0]} can't go on from adapter.start, as this run did; compare a run without it.")
    if pairs:
        if "dpo" not in names:
            raise RunError(f"--pairs {pairs} is what DPO learns from: add --with dpo.")
        load_pairs(pairs)


def baseline(run: RunDir, name: str, say: Callable[[str], None], pairs: Path | None = None) -> Path:
    """The adapter of a method in BASELINES under the run's recipe; trained now unless it's there, from where it was interrupted.

    It takes as many steps as the run has taken, which may have stopped before its recipe's, under a whole schedule of that length.
    With `pairs` DPO learns from that file.
    """
    given = load_pairs(pairs) if pairs else []
    folder = run.path / "baselines" / (f"{name}-{hashlib.sha256(repr(given).encode()).hexdigest()[:8]}" if given else name)
    steps = run.steps_taken()
    if folder.is_dir() and (fault := fault_in(folder)):
        say(f"{folder}: {fault}; it is trained anew.")
        drop(folder)
    if (folder / RECORD).is_file():
        took = read_json(folder / RECORD)["steps"]
        if steps and took != steps:
            say(f"{folder} was trained for {took} steps, and this run has taken {steps}: delete it to have it trained anew.")
        return folder
    recipe, placement = run.recipe(), run.environment()["placement"]
    if steps:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps, "epochs": None})})
    work = Journal(folder.with_name(f".unfinished-{folder.name}.{steps}"), "compare again")
    for other in folder.parent.glob(f".unfinished-{folder.name}.*"):  # of another number of steps
        if other != work.path:
            shutil.rmtree(other)
    with within_memory(recipe, "in that file, and compare again"), explained(run.path, work.again):
        work.path.mkdir(parents=True, exist_ok=True)
        with work.held():
            if not (work.path / RECORD).is_file():
                if name == "ppo":
                    session = open_session(recipe, placement=placement, say=say)

                    def step(at: int, total: int, values: dict[str, float]) -> None:
                        say(
                            f"ppo: step {at}/{total}, return {values['return']:+.3f}, left {duration(values['seconds'] / at * (total - at))}"
                        )

                    record = train_ppo(session, work, step)
                else:
                    record = train_by_trl(name, recipe, placement, work, say, given)
                record["epochs"] = record["steps"] * per_step(name, recipe) / (len(given) or run.environment()["prompts"]["train"])
                work.write(RECORD, json.dumps({"method": name, **({"pairs": pairs.name} if pairs else {}), **record}, indent=2) + "\n")
        for leftover in ("checkpoints", TRAINER):
            shutil.rmtree(work.path / leftover, ignore_errors=True)
        (work.path / ROWS).unlink(missing_ok=True)
        seal(work.path)
        put(work.path, folder)
    gc.collect()  # its base, before another is loaded: layers are in reference cycles
    return folder
