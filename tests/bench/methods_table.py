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

RESULTS = Path(__file__).parent / "results" / "methods"
ABOVE = {"cheerful": 0.1}  # the mark: so much more than the prompted base at temperature 1, at its better placement
HEAD = ("words", "nats", "wins of iqlite, %", "sampled tokens", "minutes", "until 90 % of its own gain", "until the mark")


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


def table(task: str) -> str:
    """Markdown: a row a variant, the best score first; over the training seeds that were run, mean (min..max); ± over prompts."""
    records = [json.loads(file.read_bytes()) for file in sorted((RESULTS / task).glob("*.json"))]
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        for temperature, answers in record["answers"].items():
            if temperature != "1":
                by_name[record["name"] + ", greedy" * (temperature == "0")].append(record | {"at": answers})
    mine = {one["seed"]: one["at"]["scores"] for one in by_name["iqlite"]}
    mark = mark_of(task, records)
    lines = [f"The mark is {mark:.3f}.", "", f"| | seeds | score | {' | '.join(HEAD)} |", "|" + " --- |" * (len(HEAD) + 3)]
    for name, found in sorted(by_name.items(), key=lambda pair: -statistics.fmean(float(np.mean(one["at"]["scores"])) for one in pair[1])):
        seeds = sorted({one["seed"] for one in found})
        is_trained = "curve" in found[0]
        at = [one["at"] for one in found]
        cells = [str(len(seeds)) if is_trained else "", score(at), spread([float(np.median(one["words"])) for one in at], "{:.0f}")]
        cells += [spread([one["nats"] for one in at], "{:.2f}"), "" if name == "iqlite" else wins(mine, found, trained=is_trained)]
        if is_trained:
            curves = [[Point(**point) for point in one["curve"]] for one in found]
            cells += [spread([c[-1].tokens for c in curves], "{:,.0f}"), spread([c[-1].seconds / 60 for c in curves], "{:.1f}")]
            cells += [when([until(c) for c in curves]), when([reached(c, mark) for c in curves])]
        else:
            cells += [""] * 4
        lines.append(f"| {'**iqlite**' if name == 'iqlite' else name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def score(answers: Sequence[dict[str, Any]]) -> str:
    """The mean over seeds, its 95 % interval over prompts, and over the seeds (min..max)."""
    by_prompt = np.mean([one["scores"] for one in answers], 0)
    interval = paired(by_prompt[:, None])
    text = f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
    means = [float(np.mean(one["scores"])) for one in answers]
    return text if len(means) == 1 else f"{text}; {min(means):.3f}..{max(means):.3f}"


def wins(mine: dict[int, list[float]], found: Sequence[dict[str, Any]], *, trained: bool) -> str:
    """How often iqlite's answer is the better one, at the same seed or, of what isn't trained, at each; ties are halves; Wilson's interval over all answers."""
    pairs = [(mine[one["seed"]], one["at"]["scores"]) for one in found if one["seed"] in mine] if trained else [(own, found[0]["at"]["scores"]) for own in mine.values()]  # fmt: skip
    if not pairs:
        return ""
    own, other = (np.array([pair[side] for pair in pairs]) for side in (0, 1))
    won = ((own > other) + 0.5 * (own == other)).mean(0)  # a prompt's, over seeds
    share = wilson(float(won.sum()), len(won))
    return f"{100 * share.value:.0f} ({100 * share.low:.0f} to {100 * share.high:.0f})"


def when(points: Sequence[Point | None]) -> str:
    """Tokens and minutes, of the seeds that came there."""
    there = [point for point in points if point is not None]
    if not there:
        return "never"
    some = "" if len(there) == len(points) else f" ({len(there)} of {len(points)} seeds)"
    return f"{spread([p.tokens for p in there], '{:,.0f}')} tokens, {spread([p.seconds / 60 for p in there], '{:.1f}')} min{some}"
