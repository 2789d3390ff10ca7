"""What each choice of the estimate and the objective does on the demo task: one table, filled run by run; goes on where it was interrupted.

    python -m tests.bench.ablations [--steps 10] [--seeds 0] [--full]

One choice at a time is changed from the demo's recipe; --full takes every combination instead (more than a thousand runs). Tone is the mean VADER compound of
24 held-out answers (temperature 1, fixed noise), KL the held-out KL(policy‖superior) of each run's own superior, nats a token; both are means over
the training seeds with (min..max). An adapter to estimate from is trained first where the estimator asks for one.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from iqlite.evaluation.curves import of_run
from iqlite.scoring.measures import tone
from tests.bench.methods import run_of
from tests.bench.methods_table import spread

OUT = Path("runs/bench/ablations")
RECIPE = Path("recipes/cheerful-135m.toml")
CHOICES: dict[str, list[object]] = {
    "superior.estimator": ["contrastive", "prompted", "adapter", "mixture"],
    "superior.weights": ["base", "policy", "ema"],
    "objective.name": ["full-kl", "squared", "policy-gradient", "prob-squared", "forward-kl"],
    "superior.strength": [4.0, 1.0, 2.0, 8.0],
    "superior.clip": [5.0, 1.0, 2.0, 100.0],
    "superior.plausibility": [1e-4, 0.0, 1e-2, 1e-1],
}
"""Each list's first value is the demo's."""
NOT_TAKEN = {"prompted": ("superior.clip", "superior.plausibility")}  # settings that an estimator hasn't


def cases(full: bool) -> Iterator[dict[str, object]]:
    """The settings of each run."""
    usual = {key: values[0] for key, values in CHOICES.items()}
    if full:
        for chosen in itertools.product(*CHOICES.values()):
            yield dict(zip(CHOICES, chosen, strict=True))
        return
    yield usual
    for key, values in CHOICES.items():
        yield from (usual | {key: value} for value in values[1:])


def settings_of(case: dict[str, object], seed: int, steps: int) -> list[str]:
    """--set arguments of a case."""
    kept = {key: value for key, value in case.items() if key not in NOT_TAKEN.get(str(case["superior.estimator"]), ())}
    kept |= {"train.seed": seed, "train.steps": steps, "train.eval_every": steps, "prompts.eval_count": 24}
    made = [f"{key}={json.dumps(value)}" for key, value in kept.items()]
    if case["superior.estimator"] == "adapter":
        made.append(f"superior.adapter={json.dumps(str((OUT / 'wanted' / 'adapter').resolve()))}")
    if case["superior.estimator"] == "mixture":
        sides = [("warm", "You are warm and encouraging.", "You are cold and discouraging."), ("glad", "You are cheerful and excited.", "You are gloomy and bored.")]  # fmt: skip
        tables = ", ".join(f"{{name = {json.dumps(n)}, wanted = {json.dumps(w)}, unwanted = {json.dumps(u)}, weight = 0.5}}" for n, w, u in sides)  # fmt: skip
        made.append(f"behavior.mixture=[{tables}]")
    return made


def table(found: dict[tuple[object, ...], list[list[float]]]) -> str:
    """Markdown of [tone before, after, its standard error, KL, minutes] of each case's training seeds."""
    head = ["estimator", "weights", "objective", "strength", "clip", "plausibility", "seeds", "tone before", "tone after", "± of the answers", "held-out KL", "minutes"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for case, runs in found.items():
        forms = ["{:.3f}", "{:.3f}", "{:.3f}", "{:.3f}", "{:.1f}"]
        cells = [spread(values, form) for values, form in zip(zip(*runs, strict=True), forms, strict=True)]
        unused = NOT_TAKEN.get(str(case[0]), ())
        chosen = ["" if key in unused else str(value) for key, value in zip(CHOICES, case, strict=True)]
        lines.append(f"| {' | '.join([*chosen, str(len(runs)), *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    run_of(RECIPE, OUT / "wanted", [f"train.steps={args.steps}"])
    found: dict[tuple[object, ...], list[list[float]]] = {}
    for seed in args.seeds:
        for case in cases(args.full):
            values = tuple(case.values())
            run = run_of(RECIPE, OUT / f"{'-'.join(map(str, values))}-{seed}", settings_of(case, seed, args.steps))
            first, *_, last = of_run(run, tone)
            kl = run.metrics()[-1]["eval/kl_policy_superior"]
            found.setdefault(values, []).append([first.score, last.score, last.score_se, kl, last.seconds / 60])
            (OUT / "ablations.md").write_text(table(found), "utf-8")
    print((OUT / "ablations.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
