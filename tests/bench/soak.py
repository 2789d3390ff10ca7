"""A long run: seconds and memory of a step at its beginning and at its end.

    python -m tests.bench.soak [--steps 2000]

A tiny model, so that what grows is the program's own. Memory is the resident memory of this process after the step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil

from iqlite.recipe.reading import parse_recipe
from iqlite.records import StepMetrics
from iqlite.run.rundir import RunDir
from iqlite.training import monitors
from iqlite.training.loop import train
from iqlite.training.opening import environment, open_session
from tests.helpers.reporters import Silent
from tests.helpers.tiny import save_tiny

WINDOW = 100  # steps at either end


class Watching(Silent):
    """Notes the process's memory after each step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.process = psutil.Process()

    def step(self, metrics: StepMetrics, total: int) -> None:
        self.bytes.append(self.process.memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    monitors.PATIENCE = steps + 1  # a tiny model's measures swing, and no monitor is to end this
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["IQLITE_CACHE"] = str(folder / "cache")
        save_tiny(folder / "base")
        lines = [json.dumps({"prompt": f"What is number {number} good for?"}) + "\n" for number in range(24)]
        (folder / "train.jsonl").write_text("".join(lines[:20]), "utf-8")
        (folder / "eval.jsonl").write_text("".join(lines[20:]), "utf-8")
        data = {
            "model": {"base": "base", "quantization": "none"},
            "adapter": {"rank": 4, "alpha": 8.0},
            "behavior": {"wanted": "You are kind.", "unwanted": "You are mean.", "placement": "system"},
            "prompts": {"train": "train.jsonl", "eval": "eval.jsonl", "eval_count": 2},
            "rollout": {"prompts_per_step": 2, "max_new_tokens": 4},
            "train": {"steps": steps, "eval_every": 50, "checkpoint_every": 50},
            "judge": {"aim": False},
        }
        session = open_session(parse_recipe(data, folder / "recipe.toml"))
        run = RunDir.create(folder / "run", session.recipe, environment(session))
        watching = Watching()
        outcome = train(session, run, watching)
        seconds = [line["time/step_s"] for line in run.metrics() if "time/step_s" in line]
        files = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    print("| steps | seconds a step, median | memory, MiB |\n| --- | ---: | ---: |")
    for part in (slice(0, WINDOW), slice(len(seconds) // 2, len(seconds) // 2 + WINDOW), slice(len(seconds) - WINDOW, len(seconds))):
        memory = watching.bytes[part]
        print(f"| {part.start + 1} to {part.stop} | {median(seconds[part]):.4f} | {memory[0] / 2**20:.1f} to {memory[-1] / 2**20:.1f} |")
    print(f"\n{outcome.step} steps, {outcome.why}; the run directory is {files / 2**20:.1f} MiB.")


if __name__ == "__main__":
    main()
