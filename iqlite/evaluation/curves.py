"""How a behaviour came with training: the recipe's measure of held-out answers by step, epoch, sampled tokens and minutes.

A run samples its held-out prompts at every evaluation (samples.jsonl); so do the baselines that a comparison trained in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from iqlite.errors import RunError
from iqlite.run.journal import SAMPLES, Journal
from iqlite.run.rundir import RunDir

PHASES = ("time/rollout_s", "time/read_s", "time/update_s")


@dataclass(frozen=True)
class Point:
    """Held-out answers at one step: mean score and its standard error, sampled tokens and seconds of training up to there."""

    step: int
    epoch: float
    tokens: float
    seconds: float
    score: float
    score_se: float
    words: float


def of_run(run: RunDir, measure: Callable[[str], float] | None) -> list[Point]:
    """The run's own curve, by a measure or, without one, by the scores that training noted; seconds without evaluations. RunError if it has
    no samples yet."""
    tokens, seconds, at = 0.0, 0.0, {0: (0.0, 0.0)}
    for line in run.metrics():
        if line["step"] == 0:
            continue
        tokens += line.get("response/tokens") or 0.0
        seconds += sum(line.get(name) or 0.0 for name in PHASES)
        at[line["step"]] = (tokens, seconds)
    environment, recipe = run.environment(), run.recipe()
    epoch = recipe.rollout.prompts_per_step / environment["prompts"]["train"]
    found = _points(run, at, epoch, measure)
    if not found:
        raise RunError(f"{run.path} has no samples yet: train it first, or set train.eval_every to have them on the way.")
    return found


def of_baseline(folder: Path, epoch: float, measure: Callable[[str], float] | None) -> list[Point]:
    """A baseline's curve; `epoch` is what one step is of a pass over its prompts or pairs."""
    at = {line["step"]: (line["tokens"], line["seconds"]) for line in Journal(folder).metrics()}
    return _points(Journal(folder), {0: (0.0, 0.0)} | at, epoch, measure)


def until(points: Sequence[Point], share: float = 0.9) -> Point | None:
    """The first point from which on `share` of the gain from first to last score is reached and kept; None where nothing is gained."""
    first, last = points[0].score, points[-1].score
    if last <= first:
        return None
    goal = first + share * (last - first)
    for number, point in enumerate(points):
        if all(later.score >= goal for later in points[number:]):
            return point
    return points[-1]


def _points(run: Journal, at: Mapping[int, tuple[float, float]], epoch: float, measure: Callable[[str], float] | None) -> list[Point]:
    by_step: dict[int, list[tuple[str, float | None]]] = {}
    for line in run.lines(SAMPLES):
        by_step.setdefault(line["step"], []).append((line["answer"], line.get("score")))
    found = []
    for step, sampled in sorted(by_step.items()):
        answers = [answer for answer, _ in sampled]
        scores = [score for answer, noted in sampled if (score := measure(answer) if measure else noted) is not None]
        if step in at and len(scores) == len(sampled):
            error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
            words = statistics.fmean(len(answer.split()) for answer in answers)
            found.append(Point(step, step * epoch, *at[step], statistics.fmean(scores), error, words))
    return found
