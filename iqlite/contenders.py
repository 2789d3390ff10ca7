"""Methods to compare a run with, trained under its recipe and kept in it: runs/NAME/baselines/METHOD/ holds the adapter and what it took."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from iqlite.baselines import train_ppo
from iqlite.errors import RunError
from iqlite.peers import TRL, check_trl, train_by_trl
from iqlite.rundir import RunDir
from iqlite.session import open_session, within_memory
from iqlite.terminal import duration

BASELINES = (*TRL, "ppo")
METHODS = ("prompting", "superior", *BASELINES)
RECORD = "baseline.json"


def check_methods(names: Sequence[str]) -> None:
    """RunError for a method that there isn't, or that can't be had here."""
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise RunError(
            f"--with {unknown[0]!r} isn't one of {', '.join(METHODS)}: give names with commas between, such as --with superior,dpo."
        )
    if set(names) & set(TRL):
        check_trl()


def baseline(run: RunDir, name: str, say: Callable[[str], None]) -> Path:
    """The adapter of a method in BASELINES under the run's recipe; trained now unless it's there."""
    folder = run.path / "baselines" / name
    if (folder / RECORD).is_file():
        return folder
    recipe, placement = run.recipe(), run.environment()["placement"]

    def write(making: Path) -> None:
        if name == "ppo":
            session = open_session(recipe, placement=placement, say=say)

            def step(at: int, total: int, values: dict[str, float]) -> None:
                say(f"ppo: step {at}/{total}, return {values['return']:+.3f}, left {duration(values['seconds'] / at * (total - at))}")

            record = train_ppo(session, making, step)
        else:
            record = train_by_trl(name, recipe, placement, making, say)
        (making / RECORD).write_text(json.dumps({"method": name, **record}, indent=2) + "\n", "utf-8")

    with within_memory(recipe, "in that file, and compare again"):
        run.save_folder(folder, write)
    return folder
