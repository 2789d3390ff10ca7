"""Objectives side by side on the demo task: held-out tone and KL(policy‖superior) by step, several seeds, one table.

    python -m tests.bench.objectives --objectives squared policy-gradient full-kl --seeds 0 1 2

Each run is the demo's recipe with another objective and seed, through the command line, into runs/bench/objectives; one that is there
already isn't run again, one that was interrupted goes on. Tone is the mean VADER compound of the 24 held-out answers that every
evaluation samples (temperature 1, fixed noise), KL is measured on the same answers, nats a token. Writes objectives.json and .md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from iqlite.scoring.measures import tone

STEPS, EVERY, HELD_OUT = 20, 10, 24
OUT = Path("runs/bench/objectives")


def run(objective: str, seed: int, recipe: str) -> Path:
    """Trains one pair unless it is done; returns the run directory."""
    path = OUT / f"{objective}-{seed}"
    if not (path / "result.json").exists():
        settings = [
            f"objective.name={objective}",
            f"train.seed={seed}",
            f"train.steps={STEPS}",
            f"train.eval_every={EVERY}",
            f"prompts.eval_count={HELD_OUT}",
        ]
        command = [sys.executable, "-m", "iqlite", "train", recipe, "--out", str(path)]
        command += [part for setting in settings for part in ("--set", setting)] + (["--resume"] if path.exists() else [])
        subprocess.run(command, check=True)
    return path


def by_step(path: Path) -> dict[int, tuple[float, float]]:
    """step → (tone, held-out KL)."""
    kl = {row["step"]: row["eval/kl_policy_superior"] for row in _lines(path / "metrics.jsonl") if "eval/kl_policy_superior" in row}
    tones: dict[int, list[float]] = {}
    for row in _lines(path / "samples.jsonl"):
        tones.setdefault(row["step"], []).append(tone(row["answer"]))
    return {step: (statistics.fmean(tones[step]), kl[step]) for step in sorted(kl)}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").strip().split("\n")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=["squared", "policy-gradient", "full-kl"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipe", default="recipes/cheerful-135m.toml")
    parser.add_argument("--table-only", action="store_true", help="tabulate the runs that are there")
    args = parser.parse_args()
    curves: dict[str, dict[int, dict[int, tuple[float, float]]]] = {}
    for seed in args.seeds:
        for objective in args.objectives:
            path = OUT / f"{objective}-{seed}"
            if args.table_only and not (path / "result.json").exists():
                continue
            curves.setdefault(objective, {})[seed] = by_step(path if args.table_only else run(objective, seed, args.recipe))
    steps = sorted({step for runs in curves.values() for curve in runs.values() for step in curve})
    lines = ["| objective | " + " | ".join(f"step {step}" for step in steps) + " |", "| --- |" + " --- |" * len(steps)]
    for objective, runs in curves.items():
        cells = []
        for step in steps:
            tones, kls = ([curve[step][i] for curve in runs.values() if step in curve] for i in (0, 1))
            spread = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in (tones, kls)]
            cells.append(
                f"{statistics.fmean(tones):.2f} ± {spread[0]:.2f} / {statistics.fmean(kls):.3f} ± {spread[1]:.3f}" if tones else ""
            )
        lines.append(f"| `{objective}` ({len(runs)} seeds) | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "objectives.md").write_text(text + "\n", "utf-8")
    record = {"machine": f"{platform.machine()} {platform.system()}", "recipe": args.recipe, "held_out": HELD_OUT, "curves": curves}
    (OUT / "objectives.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print("tone / held-out KL(policy‖superior), mean ± standard deviation over seeds\n" + text)


if __name__ == "__main__":
    main()
