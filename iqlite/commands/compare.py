"""`iqlite compare`: the base, the base told the wanted description, and the trained model, on the same held-out prompts and seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from iqlite.judges import tone, words
from iqlite.prompts import Description
from iqlite.rollout import Sampler
from iqlite.rundir import RunDir
from iqlite.session import Session, open_session, within_memory
from iqlite.terminal import clean, table

EXAMPLE = 400  # characters of an example answer
COMPARISON = "compare.json"


@dataclass(frozen=True)
class Measures:
    """One answerer's figures: means over prompts and seeds, with the tone's standard error over prompts."""

    name: str
    answers: int
    tone: float
    tone_se: float
    words_median: float
    ended_share: float
    empty_share: float
    example: str


def run(
    run_path: Path, *, seeds: int, temperature: float, top_p: float, prompts: int | None, adapter: str, as_json: bool, console: Console
) -> int:
    """Answers, measures, prints, and writes compare.json into the run; returns the exit code."""
    run_dir = RunDir.open(run_path)
    start = run_dir.trained(adapter)
    recipe = run_dir.recipe()
    placement = run_dir.environment()["placement"]
    with within_memory(recipe, "in that file, and compare again"):
        session = open_session(recipe, start=start, placement=placement, say=lambda text: console.print(f"[dim]{text}[/]"))
    session = replace(session, eval=replace(session.eval, requests=session.eval.requests[:prompts]))
    samplers = [Sampler(seed, recipe.rollout.max_new_tokens, temperature, top_p, "compare") for seed in range(seeds)]
    told = told_descriptions(session)
    example = _example(session)
    measured = []
    with within_memory(recipe, "in that file, and compare again"), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("answering", total=(2 + len(told)) * seeds * len(session.eval))

        def measure(name: str, role: str, description: Description | None = None) -> Measures:
            if progress.disable:
                console.print(f"answering: {name}", markup=False)
            return _measure(session, name, role, samplers, description, example, lambda rows: progress.advance(task, rows))

        base = measure("base", "reference")
        for description in told:
            measured.append(measure(f"told ({description.placement} turn)", "reference", description))
        trained = measure("trained", "policy")
    best_told = [replace(max(measured, key=lambda m: m.tone), name="told")] if measured else []
    rows = [base, *measured, trained]
    result = {
        "prompts": len(session.eval),
        "seeds": seeds,
        "temperature": temperature,
        "top_p": top_p,
        "adapter": adapter,
        "measures": [asdict(m) for m in rows],
    }
    run_dir.write(COMPARISON, json.dumps(result, indent=2) + "\n")
    if as_json:
        print(json.dumps(result))
        return 0
    title = f"held-out answers: {len(session.eval)} prompts × {seeds} seeds, temperature {temperature:g}, top-p {top_p:g}"
    columns = ("", "tone", "± se", "median words", "ended", "empty")
    cells = [
        (m.name, f"{m.tone:.3f}", f"{m.tone_se:.3f}", f"{m.words_median:g}", f"{m.ended_share:.0%}", f"{m.empty_share:.0%}") for m in rows
    ]
    console.print(table(title, columns, cells))
    console.print(f"asked: {clean(session.eval.requests[example][-1]['content'])}")
    for m in rows:
        console.print(f"[bold]{m.name}[/]: {clean(m.example, EXAMPLE)}")
    console.print(" ".join(["tone", *(f"{m.name}={m.tone:.2f}" for m in (base, *best_told, trained))]), markup=False)
    return 0


def told_descriptions(session: Session) -> list[Description]:
    """The wanted description in every placement that the template has: "told" means the better one."""
    if session.wanted is None:
        return []
    placements = ("system", "user") if session.chat.system_turn else ("user",)
    return [replace(session.wanted, placement=placement) for placement in placements]


def _measure(
    session: Session, name: str, role: str, samplers: Sequence[Sampler], description: Description | None, example: int, advance: object
) -> Measures:
    tones: list[list[float]] = []
    lengths, ended, shown = [], [], ""
    for sampler in samplers:
        rollout = session.answers(role, session.eval.requests, sampler, description=description, progress=advance)  # type: ignore[arg-type]
        texts = [session.chat.text(rollout.response_ids(row)) for row in range(len(rollout.index))]
        tones.append([tone(text) for text in texts])
        lengths += [words(text) for text in texts]
        ended += rollout.ended_B.tolist()
        shown = shown or texts[example]
    by_prompt = [statistics.fmean(column) for column in zip(*tones, strict=True)]
    error = statistics.stdev(by_prompt) / len(by_prompt) ** 0.5 if len(by_prompt) > 1 else 0.0
    return Measures(
        name, len(lengths), statistics.fmean(by_prompt), error, statistics.median(lengths), statistics.fmean(ended),
        statistics.fmean([length == 0 for length in lengths]), shown,
    )  # fmt: skip


def _example(session: Session) -> int:
    """The prompt shown as an example: a short one, the same for every answerer."""
    lengths = [len(request[-1]["content"]) for request in session.eval.requests]
    return lengths.index(sorted(lengths)[len(lengths) // 2])
