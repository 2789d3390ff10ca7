"""The table of `tests.bench.methods` from the files of figures that it has written."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iqlite.evaluation.curves import Point, until
from iqlite.scoring.intervals import paired, wilson

MINE = "iqlite"
RESULTS = Path(__file__).parent / "results" / "methods"
ABOVE = {"cheerful": 0.1, "first-person": -0.1}  # the mark: so much more than the prompted base at temperature 1, at its better placement
HEAD = ("seeds", "score", "wins of iqlite, %", "score, greedy", "wins of iqlite, greedy, %", "words", "nats", "sampled tokens", "minutes", "until 90 % of its own gain", "until the mark")  # fmt: skip


def spread(values: Sequence[float], form: str) -> str:
    """mean (min..max), or the one value."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.fmean(values))} ({form.format(min(values))}..{form.format(max(values))})"


def reached(points: Sequence[Point], mark: float) -> Point | None:
    """The first point from which on the score stays at the mark or above."""
    at = None
    for point in reversed(points):
        if point.score < mark:
            break
        at = point
    return at


def mark_of(task: str, records: Sequence[dict[str, Any]]) -> float:
    """What every method is timed to: the prompted base's score, and what the behaviour adds to it."""
    told = [np.mean(one["answers"]["1"]["scores"]) for one in records if one["method"].startswith("told")]
    return float(max(told)) + ABOVE.get(task, 0.0)


def records_of(task: str) -> list[dict[str, Any]]:
    """All that was found of a behaviour."""
    return [json.loads(file.read_bytes()) for file in sorted((RESULTS / task).glob("*.json"))]


def table(task: str) -> str:
    """Markdown: a row a variant, the best score first; over the training seeds that were run, mean (min..max); "to" is an interval over prompts."""
    records = records_of(task)
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_name[record["name"]].append(record)
    mark = mark_of(task, records)
    lines = [f"The mark is {mark:.3f}.", "", f"| | {' | '.join(HEAD)} |", "|" + " --- |" * (len(HEAD) + 1)]
    order = {name: -statistics.fmean(float(np.mean(one["answers"]["0.7"]["scores"])) for one in found) for name, found in by_name.items()}
    for name, found in sorted(by_name.items(), key=lambda pair: order[pair[0]]):
        is_trained = "curve" in found[0]
        cells = [str(len(found)) if is_trained else ""]
        for temperature in ("0.7", "0"):
            at = [one["answers"][temperature] for one in found if temperature in one["answers"]]
            cells += [score(at) if at else "", "" if name == MINE or not at else wins(by_name[MINE], found, temperature)]
        at = [one["answers"]["0.7"] for one in found]
        cells += [spread([float(np.median(one["words"])) for one in at], "{:.0f}"), spread([one["nats"] for one in at], "{:.2f}")]
        if is_trained:
            curves = [[Point(**point) for point in one["curve"]] for one in found]
            cells += [spread([c[-1].tokens for c in curves], "{:,.0f}"), spread([c[-1].seconds / 60 for c in curves], "{:.1f}")]
            cells += [when([until(c) for c in curves]), when([reached(c, mark) for c in curves])]
        else:
            cells += [""] * 4
        lines.append(f"| {'**iqlite**' if name == MINE else name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def score(answers: Sequence[dict[str, Any]]) -> str:
    """The mean over seeds, its 95 % interval over prompts, and over the seeds (min..max)."""
    by_prompt = np.mean([one["scores"] for one in answers], 0)
    interval = paired(by_prompt[:, None])
    text = f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
    means = [float(np.mean(one["scores"])) for one in answers]
    return text if len(means) == 1 else f"{text}; {min(means):.3f}..{max(means):.3f}"


def wins(mine: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], temperature: str) -> str:
    """How often iqlite's answer is the better one at that temperature, at the same training seed or, of what isn't trained, at each; ties are halves.
    Wilson's interval over prompts."""
    scores = {one["seed"]: one["answers"][temperature]["scores"] for one in mine if temperature in one["answers"]}
    other = {one["seed"]: one["answers"][temperature]["scores"] for one in found if temperature in one["answers"]}
    if "curve" not in found[0]:
        other = dict.fromkeys(scores, other[0])
    seeds = scores.keys() & other.keys()
    if not seeds:
        return ""
    ours, theirs = (np.array([side[seed] for seed in seeds]) for side in (scores, other))
    won = ((ours > theirs) + 0.5 * (ours == theirs)).mean(0)  # a prompt's, over seeds
    return wilson(float(won.sum()), len(won)).percent().replace(" %", "")


def when(points: Sequence[Point | None]) -> str:
    """Tokens and minutes, of the seeds that came there."""
    there = [point for point in points if point is not None]
    if not there:
        return "never"
    some = "" if len(there) == len(points) else f" ({len(there)} of {len(points)} seeds)"
    return f"{spread([p.tokens for p in there], '{:,.0f}')} tokens, {spread([p.seconds / 60 for p in there], '{:.1f}')} min{some}"
