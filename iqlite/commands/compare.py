"""`iqlite compare`: base, told base, trained models and others on the same prompts and seeds: figures, win rates, Elo, and what is significant."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from iqlite.answers import Answerer, adapter_digest, collect, told_answerers
from iqlite.comparison import Answers, Figures, by_category, contests, figures, ratings, scores
from iqlite.contenders import BASELINES, baseline, check_methods
from iqlite.contrast import check_heard
from iqlite.errors import RunError
from iqlite.intervals import Estimate, outcomes
from iqlite.judges import MEASURES
from iqlite.prompts import load_prompts
from iqlite.records import Prompts
from iqlite.rollout import Sampler
from iqlite.rundir import RunDir, check_adapter_of
from iqlite.session import Session, open_session, within_memory
from iqlite.terminal import clean, table

EXAMPLE = 400  # characters of an example answer
COMPARISON = "compare.json"
TRAINED = "trained"


def run(
    runs: Sequence[Path], *, seeds: int, temperature: float, top_p: float, prompts: Path | None, count: int | None, adapter: str,
    others: Sequence[str], judge: str | None, as_json: bool, console: Console,
) -> int:  # fmt: skip
    """Answers, measures, prints, and writes compare.json into the first run; returns the exit code."""
    run_dir = RunDir.open(runs[0])
    start = run_dir.trained(adapter)
    recipe = run_dir.recipe()
    measure = judge or recipe.judge.measure
    if measure not in MEASURES:
        raise RunError(f"--judge {measure!r} isn't one of {', '.join(MEASURES)}.")
    check_methods(others)
    more = _others(run_dir, runs[1:], adapter)
    placement = run_dir.environment()["placement"]
    baselines = [name for name in others if name in BASELINES]
    for name in baselines:  # each with the base in memory, before the comparison's own
        more[name] = baseline(run_dir, name, lambda text: console.print(f"[dim]{text}[/]"))
    with within_memory(recipe, "in that file, and compare again"):
        session = open_session(recipe, start=start, placement=placement, say=lambda text: console.print(f"[dim]{text}[/]"))
    if "superior" in others:
        check_heard(session)
    asked = load_prompts(str(prompts), beside=Path(), key="--prompts") if prompts else session.eval
    asked = Prompts(asked.requests[:count], asked.notes, asked.labels[:count])
    samplers = [Sampler(seed, recipe.rollout.max_new_tokens, temperature, top_p, "compare") for seed in range(seeds)]
    who = [Answerer("base", "reference"), *told_answerers(session)]
    who += [Answerer("superior", "superior")] if "superior" in others else []
    for number, (name, folder) in enumerate(more.items()):
        session.policy.add_frozen(f"other{number}", folder)
        who.append(Answerer(name, f"other{number}", of=adapter_digest(folder)))
    who.append(Answerer(TRAINED, "policy", of=adapter_digest(start)))
    answers = _ask(session, run_dir, who, asked, samplers, console)

    score_KPS = scores(answers, MEASURES[measure])
    example = _example(asked)
    rows = [figures(name, given, score_KPS[k], example) for k, (name, given) in enumerate(answers.items())]
    found = contests(answers, TRAINED, score_KPS)
    rated = ratings(answers, outcomes(score_KPS), seeds)
    result: dict[str, Any] = {
        "prompts": len(asked),
        "seeds": seeds,
        "temperature": temperature,
        "top_p": top_p,
        "adapter": adapter,
        "judge": measure,
        "measures": [asdict(row) for row in rows],
        "contests": found,
        "elo": {name: asdict(one) for name, one in rated.items()},
        "categories": by_category(answers, TRAINED, score_KPS, asked.labels) if asked.labels else [],
    }
    run_dir.write(COMPARISON, json.dumps(result, indent=2) + "\n")
    if as_json:
        print(json.dumps(result))
        return 0
    _show(console, result, rows, found, rated, measure)
    console.print(f"asked: {clean(asked.requests[example][-1]['content'])}")
    for row in rows:
        console.print(f"[bold]{clean(row.name)}[/]: {clean(row.example, EXAMPLE)}")
    told = (
        [replace(max((r for r in rows if r.name.startswith("told")), key=lambda r: r.score or 0.0), name="told")] if session.wanted else []
    )
    last = [rows[0], *told, *(r for r in rows[1:] if not r.name.startswith("told"))]
    console.print(" ".join([measure, *(f"{r.name}={r.score:.2f}" for r in last)]), markup=False)
    return 0


def _others(run_dir: RunDir, paths: Sequence[Path], adapter: str) -> dict[str, Path]:
    """Name → adapter of the other runs, each checked to be of the first one's base before anything heavy."""
    found: dict[str, Path] = {}
    for path in paths:
        folder = RunDir.open(path).trained(adapter)
        check_adapter_of(run_dir, folder)
        name = path.resolve().name
        found[name if name not in found else str(path)] = folder
    return found


def _ask(
    session: Session, run_dir: RunDir, who: Sequence[Answerer], asked: Prompts, samplers: Sequence[Sampler], console: Console
) -> Answers:
    columns = (TextColumn("answering: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    answers = {}
    with within_memory(session.recipe, "in that file, and compare again"), Progress(*columns, console=console, disable=not console.is_terminal) as progress:  # fmt: skip
        task = progress.add_task("", total=len(who) * len(samplers) * len(asked))
        advance: Callable[[int], None] = lambda rows: progress.advance(task, rows)  # noqa: E731
        for one in who:
            progress.update(task, description=one.name)
            if progress.disable:
                console.print(f"answering: {one.name}", markup=False)
            answers[one.name] = collect(session, run_dir, one, asked.requests, samplers, advance)
    return answers


def _show(
    console: Console,
    result: dict[str, Any],
    rows: Sequence[Figures],
    found: Sequence[dict[str, Any]],
    rated: dict[str, Estimate],
    measure: str,
) -> None:
    asked = f"{result['prompts']} prompts × {result['seeds']} seeds, temperature {result['temperature']:g}, top-p {result['top_p']:g}"
    columns = ["", measure, "± se", "median words", "ended", "empty", "refused", "repeated", "distinct-2", "base nats"]
    cells = [
        [
            clean(r.name), f"{r.score:.3f}", f"{r.score_se:.3f}", f"{r.words_median:g}", f"{r.ended_share:.0%}", f"{r.empty_share:.0%}",
            f"{r.refused_share:.0%}", f"{r.repetition:.0%}", f"{r.distinct_2:.2f}", f"{r.base_nll:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    console.print(table(f"answers: {asked}", columns, cells))
    if result["prompts"] > 1:
        cells = []
        for one in found:
            rate, controlled, name = Estimate(**one["win_rate"]), Estimate(**one["length_controlled"]), one["against"]
            mine, other = rated[TRAINED], rated[name]
            cells.append(
                [
                    clean(name),
                    rate.percent(),
                    controlled.percent(),
                    "yes" if one["significant"] else "no",
                    f"{mine.value - other.value:+.0f}",
                ]
            )
        title = f"{TRAINED} wins by {measure} (95 % intervals; ties are halves)"
        console.print(table(title, ["against", "win rate", "at equal length", "significant", "Elo"], cells))
    if result["categories"]:
        names = list(result["categories"][0]["scores"])
        cells = [
            [clean(c["category"]), str(c["prompts"]), *(f"{c['scores'][n]:.3f}" for n in names), Estimate(**c["win_rate"]).percent()]
            for c in result["categories"]
        ]
        console.print(table(f"{measure} by category", ["", "prompts", *map(clean, names), f"{TRAINED} beats base"], cells))


def _example(asked: Prompts) -> int:
    """The prompt shown as an example: a short one, the same for every answerer."""
    lengths = np.array([len(request[-1]["content"]) for request in asked.requests])
    return int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
