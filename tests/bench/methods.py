"""Every method under one recipe, base, prompts, adapter shape and number of sampled tokens: one table. Goes on where it was interrupted.

    python -m tests.bench.methods [--tasks cheerful concise] [--seeds 0 1 2] [--rate 1]

Per task and training seed: `iqlite train`, then `iqlite compare RUN --with …`, which trains the baselines (SFT, DPO and SDFT by TRL, PPO)
in the run. Score: the recipe's measure of answers to all held-out prompts, temperature 0.7, top-p 0.9. Win rates and Elo are iqlite's
comparison's own, means over training seeds with (min..max). "At equal time": the score of the method's held-out samples (temperature 1)
when the fastest method was done. Until 90 %: sampled tokens and minutes until nine tenths of a method's own gain are reached and kept.
`--rate` multiplies every method's learning rate, iqlite's too: whether a method is behind because its rate was another's choice.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iqlite.evaluation.curves import Point, until

OUT = Path("runs/bench/methods")
METHODS = {"cheerful": "superior,sft,dpo,ppo,sdft", "concise": "superior,dpo,sdft"}
EVERY = {"cheerful": 4, "concise": 6}
UNTRAINED = ("base-", "prompted-", "superior-")  # whose answers are the same for every training seed


def run(task: str, seed: int, rate: float) -> tuple[dict[str, Any], dict[str, list[Point]]]:
    """(comparison, curves) of one seed; what is there isn't done again."""
    path, recipe = OUT / f"{task}-{seed}{suffix(rate)}", Path("recipes") / f"{task}-135m.toml"
    command = [sys.executable, "-m", "iqlite"]
    if not (path / "result.json").exists():
        settings = [f"train.seed={seed}", f"train.eval_every={EVERY[task]}", "prompts.eval_count=24"]
        if rate != 1:
            settings.append(f"train.learning_rate={rate * tomllib.loads(recipe.read_text('utf-8'))['train']['learning_rate']:.3g}")
        words = [part for setting in settings for part in ("--set", setting)]
        resume = ["--resume"] if path.exists() else []
        subprocess.run([*command, "train", str(recipe), "--out", str(path), *words, *resume], check=True)
    (path / "answers").mkdir(exist_ok=True)
    for file in OUT.glob(f"{task}-*/answers/*.jsonl"):
        if file.name.startswith(UNTRAINED) and not (path / "answers" / file.name).exists():
            shutil.copy(file, path / "answers")
    compare = [*command, "compare", str(path), "--seeds", "1", "--json"]
    done = subprocess.run([*compare, "--no-safety", "--with", METHODS[task]], check=True, stdout=subprocess.PIPE, text=True)
    curves = json.loads(subprocess.run([*compare, "--checkpoints"], check=True, stdout=subprocess.PIPE, text=True).stdout)["curves"]
    named = {name.partition(": ")[2] or "trained": [Point(**point) for point in points] for name, points in curves.items()}
    return json.loads(done.stdout), named


def suffix(rate: float) -> str:
    """What a run at another learning rate has in its name."""
    return "" if rate == 1 else f"-rate{rate:g}"


def spread(values: Sequence[float], form: str) -> str:
    """mean (min..max), or the one value."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.fmean(values))} ({form.format(min(values))}..{form.format(max(values))})"


def at_time(points: list[Point], seconds: float) -> float:
    """The score of the last point that was there by then."""
    return [point for point in points if point.seconds <= seconds + 1e-6][-1].score


def table(task: str, found: list[tuple[dict[str, Any], dict[str, list[Point]]]]) -> str:
    """One task's Markdown table."""
    first = found[0][0]
    names = [measure["name"] for measure in first["measures"]]
    lines = [f"### {task}, {len(found)} training seed{'s' * (len(found) > 1)}, {first['prompts']} held-out prompts", ""]
    head = [first["measure"], "words", "wins of iqlite against it, %", "Elo", "base nats", "distinct-2", "sampled tokens", "minutes", "of iqlite's time", "at equal time", "until 90 %"]  # fmt: skip
    lines += [f"| | {' | '.join(head)} |", "|" + " --- |" * (len(head) + 1)]
    for name in names:
        measures = [next(m for m in result["measures"] if m["name"] == name) for result, _ in found]
        wins = [100 * c["win_rate"]["value"] for result, _ in found for c in result["contests"] if c["against"] == name]
        cells = [
            spread([m["score"] for m in measures], "{:.3f}"),
            spread([m["words_median"] for m in measures], "{:.0f}"),
            spread(wins, "{:.0f}") if wins else "",
            spread([result["elo"][name]["value"] for result, _ in found], "{:+.0f}"),
            spread([m["base_nll"] for m in measures], "{:.2f}"),
            spread([m["distinct_2"] for m in measures], "{:.2f}"),
        ]
        curves = [curve[name] for _, curve in found if name in curve]
        if curves:
            mine = [curve["trained"][-1].seconds for _, curve in found if name in curve]
            fastest = [min(points[-1].seconds for points in curve.values()) for _, curve in found if name in curve]
            reached = [point for point in map(until, curves) if point is not None]
            cells += [
                spread([points[-1].tokens for points in curves], "{:.0f}"),
                spread([points[-1].seconds / 60 for points in curves], "{:.1f}"),
                spread([points[-1].seconds / own for points, own in zip(curves, mine, strict=True)], "{:.2f}"),
                spread([at_time(points, limit) for points, limit in zip(curves, fastest, strict=True)], "{:.3f}"),
                f"{spread([p.tokens for p in reached], '{:.0f}')} tokens, {spread([p.seconds / 60 for p in reached], '{:.1f}')} min"
                if reached
                else "nothing gained",
            ]
        else:
            cells += [""] * 5
        lines.append(f"| {'**iqlite**' if name == 'trained' else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=1.0)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Any]] = {task: [] for task in args.tasks}
    for seed in args.seeds:
        for task in args.tasks:
            found[task].append(run(task, seed, args.rate))
            text = "\n\n".join(table(name, results) for name, results in found.items() if results)
            (OUT / f"{'-'.join(args.tasks)}{suffix(args.rate)}.md").write_text(text + "\n", "utf-8")
            print(text, flush=True)


if __name__ == "__main__":
    main()
