"""How soon a behaviour comes, by what could slow it: one choice of the loop changed at a time, for the same number of answers.

    python -m tests.bench.pace [cheerful concise …] [--seeds 0] [--answers 56] [--only NAME …]

Tokens and minutes until the mark of `tests.bench.methods` (whose `untrained` figures it needs), as the held-out answers at temperature 1 reach and
keep it: means over the training seeds with (min..max); then the last score, and how far the policy went from the base. The learning rate is constant
but where a choice says otherwise: so it is in the first steps of a longer run. Goes on where it was interrupted; the table is in runs/bench/pace.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from iqlite.evaluation.curves import of_run
from iqlite.recipe.reading import load_recipe
from iqlite.run.rundir import RunDir
from tests.bench.methods import FEW, SCORES, path_of, run_of
from tests.bench.methods_table import mark_of, reached, records_of, spread, when

OUT = Path("runs/bench/pace")
CHOICES: dict[str, dict[str, float | str]] = {
    "as it is": {},
    "learning rate × 0.5": {"learning_rate": 0.5},
    "learning rate × 2": {"learning_rate": 2.0},
    "cosine": {"schedule": "cosine"},
    "2 updates a rollout": {"updates_per_rollout": 2},
    "4 updates a rollout": {"updates_per_rollout": 4},
    "4 prompts a step": {"prompts_per_step": 4},
    "4 prompts, 2 updates": {"prompts_per_step": 4, "updates_per_rollout": 2},
    "forward KL": {"objective": "forward-kl"},
}
"""`learning_rate` multiplies the recipe's."""


def settings_of(task: str, choice: str, seed: int, answers: int) -> list[str]:
    """--set arguments."""
    recipe, changed = load_recipe(path_of(task)), CHOICES[choice]
    prompts = int(changed.get("prompts_per_step", recipe.rollout.prompts_per_step))
    every = max(1, recipe.rollout.prompts_per_step // prompts)
    settings = {
        "train.seed": seed,
        "train.steps": answers // prompts,
        "train.eval_every": every,
        "train.learning_rate": recipe.train.learning_rate * float(changed.get("learning_rate", 1.0)),
        "train.schedule": changed.get("schedule", "constant"),
        "train.updates_per_rollout": changed.get("updates_per_rollout", 1),
        "rollout.prompts_per_step": prompts,
        "objective.name": changed.get("objective", recipe.objective.name),
        "prompts.eval_count": FEW,
        "judge.aim": False,
    }
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def row(task: str, runs: list[RunDir], mark: float) -> list[str]:
    """Its cells."""
    curves = [of_run(run, SCORES.get(task)) for run in runs]
    last = [curve[-1] for curve in curves]
    away = [[line for line in run.metrics() if "eval/kl_policy_reference" in line][-1]["eval/kl_policy_reference"] for run in runs]
    return [
        when([reached(curve, mark) for curve in curves]), spread([p.tokens for p in last], "{:,.0f}"), spread([p.seconds / 60 for p in last], "{:.1f}"),
        spread([p.score for p in last], "{:.3f}"), spread([p.words for p in last], "{:.0f}"), spread(away, "{:.2f}"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["cheerful", "concise"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--answers", type=int, default=56)
    parser.add_argument("--only", nargs="+", default=list(CHOICES), choices=list(CHOICES))
    asked = parser.parse_args()
    for task in asked.tasks:
        mark = mark_of(task, records_of(task))
        head = ["seeds", "until the mark", "tokens", "minutes", "score", "words", "KL(policy‖base)"]
        lines = [f"{task}: the mark is {mark:.3f}", "", f"| | {' | '.join(head)} |", "|" + " --- |" * (len(head) + 1)]
        for choice in asked.only:
            paths = {seed: OUT / task / f"{choice.replace(' ', '-')}-{seed}" for seed in asked.seeds}
            runs = [run_of(path_of(task), path, settings_of(task, choice, seed, asked.answers)) for seed, path in paths.items()]
            lines.append(f"| {choice} | {' | '.join([str(len(runs)), *row(task, runs, mark)])} |")
        (OUT / f"{task}.md").write_text("\n".join(lines) + "\n", "utf-8")
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
