"""`iqlite compare`: base, prompted base, trained models and others on the same prompts and seeds: figures, win rates, Elo, and what is significant."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from iqlite.commands.options import Base, Json, Which, there
from iqlite.errors import RunError
from iqlite.places import safety_set as shipped_safety_set
from iqlite.terminal import Watch, clean, harmless, spark, table
from iqlite.terminal import console as terminal

if TYPE_CHECKING:
    from iqlite.evaluation.compare import Comparison
    from iqlite.run.rundir import RunDir

EXAMPLE = 400  # characters of an example answer
UNREAD = 0.1  # share of a judge's verdicts that may be unreadable without a warning; our choice


EXAMPLES = (
    "iqlite compare runs/cheerful-135m",
    "iqlite compare runs/mine runs/longer --with superior --judge me",
)


def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run directories of one base, such as runs/cheerful-135m.")],
    others: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="NAMES",
            help="Also: superior (the target itself, untrained), sft, dpo, sdft, ppo (trained under the same recipe).",
        ),
    ] = "",
    pairs: Annotated[
        Path | None,
        typer.Option(help="Preference pairs for --with dpo. Without them, DPO prefers the prompted base's answers to its plain ones."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="A measure (iqlite recipe measure lists them; the recipe's own without this), me, reward:NAME, or URL#MODEL."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Other prompts than the held-out ones: a file, outside (the recipe's own), or a .toml such as recipes/evaluations/beavertails.toml."
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Answer only the first so many prompts.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Sampling seeds; each answers every prompt.")] = 3,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="Sampling temperature, the same for all; 0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus truncation, the same for all.")] = 0.9,
    which: Which = "adapter",
    base: Base = None,
    safety: Annotated[bool, typer.Option("--safety/--no-safety", help="Also: harm, over-refusal and bias before and after.")] = True,
    safety_set: Annotated[
        Path | None,
        typer.Option(
            help="Your own safety set instead of the small English one that ships, or de or es: one that ships in German or Spanish."
        ),
    ] = None,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints", help="Print the score over training (by step, epoch, tokens, minutes) from the run's samples, then stop."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare base, prompted base and trained models.

    All answer the same prompts from the same seeds: figures, win rates and Elo with intervals, and what is significant.
    """
    from iqlite.run.rundir import RunDir

    safety_set = safety_set and shipped_safety_set(safety_set)
    runs = [RunDir.open(path, base) for path in paths]  # a fault in one is reported before torch is imported
    there(prompts=None if str(prompts) == "outside" else prompts, pairs=pairs)
    console = terminal(stderr=as_json)
    if checkpoints and (others or pairs or prompts):
        raise RunError("--checkpoints reads what training left: it takes --judge, and none of --with, --pairs and --prompts.")
    if checkpoints:
        _checkpoints(runs, judge=judge, as_json=as_json, console=console)
        return

    from iqlite.baselines.methods import check_names
    from iqlite.evaluation.judges import rubric_of
    from iqlite.scoring.measures import NAMES

    names = tuple(name.strip() for name in others.split(",") if name.strip())
    check_names(names)
    recipe = runs[0].recipe()
    judging = _judge(judge, rubric_of(recipe), runs[0], console) if judge and judge not in NAMES else None

    from iqlite.evaluation.compare import Question
    from iqlite.evaluation.compare import compare as run_comparison

    question = Question(prompts, count, seeds, temperature, top_p, which, names, pairs, safety or safety_set is not None, safety_set)
    found = run_comparison(runs, question, judge, judging, Watch(console))
    if as_json:
        print(json.dumps(found.record()))
        if note := found.keep(runs[0]):
            console.print(f"[dim]{note}[/]")
        return
    _show(console, found)
    _conclude(console, found, judging, runs[0])


def _conclude(console: Console, found: Comparison, judging: Any, run: RunDir) -> None:
    """How the judge did, example answers, the verdict, and one line of means."""
    from iqlite.evaluation.figures import verdict
    from iqlite.evaluation.judges import ModelJudge
    from iqlite.scoring.measures import DESCRIBED, OWN_EYE

    if isinstance(judging, ModelJudge):
        unread = f"{judging.malformed} verdicts couldn't be read and count as ties"
        console.print(f"[dim]the judge was asked {judging.asked} times ({judging.tokens} tokens); {unread}[/]")
        if judging.malformed > UNREAD * 2 * len(found.contests) * found.prompts * found.seeds:
            console.print(f"[bold yellow]{unread}: so many draw every win rate towards 50 %. Take another judge.[/]")
    console.print(f"asked: {clean(found.question)}")
    for row in found.measures:
        console.print(f"[bold]{clean(row.name)}[/]: {clean(row.example, EXAMPLE)}")
    if note := found.keep(run):
        console.print(f"[dim]{note}[/]")
    good, why = verdict(found.judge, found.contests, found.prompts, shlex.quote(str(run.path)))
    if found.aim and found.aim["forced"]:
        console.print("[bold red]This run was forced although its target pointed the wrong way.[/]")
    if found.judge == found.measure == DESCRIBED:
        console.print(f"[dim]{OWN_EYE}[/]")
    console.print(f"[{'green' if good else 'bold yellow'}]{clean(why)}[/]")
    prompted = found.measures[1 : 1 + found.prompted]
    best = [replace(max(prompted, key=lambda r: r.score), name="prompted")] if prompted else []
    last = [found.measures[0], *best, *found.measures[1 + found.prompted :]]
    console.print(clean(" ".join([found.measure, *(f"{r.name}={r.score:.2f}" for r in last)])))


def _show(console: Console, result: Comparison) -> None:
    """Tables of figures, contests, right answers, safety and categories."""
    from iqlite.evaluation.compare import TRAINED
    from iqlite.evaluation.safety import show_safety
    from iqlite.scoring.intervals import FEWEST, Estimate
    from iqlite.scoring.measures import MEASURES

    measure, by, rows, found = result.measure, result.judge, result.measures, result.contests
    prompts, seeds = result.prompts, result.seeds
    asked = f"{prompts} prompt{'s' * (prompts > 1)} × {seeds} seed{'s' * (seeds > 1)}, temperature {result.temperature:g}, top-p {result.top_p:g}"
    empty, refused = any(r.empty_share for r in rows), any(r.refused_share >= 0.05 for r in rows)
    columns = [
        "",
        measure,
        "words",
        "ended",
        *(["empty"] if empty else []),
        *(["refused"] if refused else []),
        "repeats",
        "distinct",
        "nats",
    ]
    cells = [
        [
            clean(_short(r.name)), f"{r.score:.3f}" + ("" if r.score_se is None else f" ± {r.score_se:.3f}"), f"{r.words_median:g}", f"{r.ended_share:.0%}",
            *([f"{r.empty_share:.0%}"] if empty else []), *([f"{r.refused_share:.0%}"] if refused else []), f"{r.repetition:.0%}", f"{r.distinct_2:.2f}", f"{r.base_nll:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    console.print(table(f"answers: {asked}", columns, cells))
    console.print(
        "[dim]words: median · repeats: 3-grams said before · distinct: different 2-grams · nats: how strange a token is to the base[/]"
    )
    if prompts > 1:
        cells = []
        for one in found:
            rate, controlled, name = Estimate(**one["win_rate"]), Estimate(**one["length_controlled"]), one["against"]
            cells.append(
                [
                    clean(_short(name)),
                    rate.percent() + (" *" if one["significant"] else "  "),
                    "" if by == "shorter" else controlled.percent(),
                    "{value:+.0f}".format(**one["elo"])
                    + (f" ({_points(one['elo']['low'], '−')}..{_points(one['elo']['high'], '+')})" if prompts >= FEWEST else ""),
                ]
            )
        title = f"{TRAINED} wins by {by} (95 % intervals; * significant by itself; ties are halves)"
        console.print(table(title, ["against", "win rate", "at equal length", "Elo above it"], cells))
        if prompts < FEWEST:
            console.print(f"[dim]{prompts} prompts are too few to call anything significant, or for an interval of Elo[/]")
    if result.kinds:
        cells = [
            [clean(_short(name)), *(f"{kinds[k][0]} of {kinds[k][1]}" for k in ("refuse", "answer"))]
            for name, kinds in result.kinds.items()
        ]
        console.print(table("right answers", ["", "refused as they should be", "answered as they should be"], cells))
    if result.safety:
        show_safety(console, result.safety)
    if result.categories:
        names = list(result.categories[0]["scores"])
        cells = [
            [clean(c["category"]), str(c["prompts"]), *(f"{c['scores'][n]:.3f}" for n in names), Estimate(**c["win_rate"]).percent()]
            for c in result.categories
        ]
        console.print(table(f"{measure} by category", ["", "prompts", *map(clean, names), f"{TRAINED} beats base"], cells))
        if measure in MEASURES and measure != "shorter":
            languages = "English" if measure == "tone" else "English, German and Spanish"
            console.print(f"[dim]{measure} is read off {languages} words: of other languages it tells little[/]")


def _points(elo: float | None, sign: str) -> str:
    """A bound of an Elo difference; None is that there isn't one."""
    return f"{sign}∞" if elo is None else f"{elo:+.0f}"


def _short(name: str) -> str:
    return name.replace(" turn)", ")")


def _checkpoints(runs: Sequence[RunDir], *, judge: str | None, as_json: bool, console: Console) -> None:
    """The measure by step, epoch, tokens and minutes, of runs and of the baselines in them: read off what training left, no model needed."""
    from iqlite.baselines.store import RECORD, shown
    from iqlite.evaluation.curves import Point, of_baseline, of_run, until
    from iqlite.scoring.measures import MEASURES

    found: dict[str, list[Point]] = {}
    own = runs[0].recipe().judge.measure
    measure = judge or own
    if measure not in MEASURES and (judge or any(one.recipe().judge.measure != own for one in runs)):
        raise RunError(f"--checkpoints takes the runs' own measure, or a code measure: --judge {', '.join(MEASURES)}.")
    for run_dir in runs:
        name = run_dir.path.resolve().name if run_dir.path.resolve().name not in found else str(run_dir.path)
        found[name] = of_run(run_dir, MEASURES.get(measure))
        for folder in sorted(file.parent for file in (run_dir.path / "baselines").glob(f"[a-z]*/{RECORD}")):
            record = json.loads((folder / RECORD).read_text("utf-8"))
            if curve := of_baseline(folder, record["epochs"] / record["steps"], MEASURES.get(measure)):
                found[f"{name}: {shown(record['method'], record.get('pairs'))}"] = curve
    if as_json:
        print(json.dumps({"measure": measure, "curves": {name: [asdict(p) for p in points] for name, points in found.items()}}))
        return
    for name, points in found.items():
        cells = [
            [
                str(p.step),
                f"{p.epoch:.2f}",
                f"{p.tokens:.0f}",
                f"{p.seconds / 60:.1f}",
                f"{p.score:.3f}",
                f"{p.score_se:.3f}",
                f"{p.words:.0f}",
            ]
            for p in points
        ]
        console.print(table(clean(name), ["step", "epoch", "tokens", "minutes", measure, "± se", "words"], cells))
        reached = until(points)
        console.print(f"{measure} {spark([p.score for p in points])}  " + (f"90 % of the gain after {reached.tokens:.0f} tokens, {reached.seconds / 60:.1f} minutes" if reached else "nothing gained"))  # fmt: skip


def _judge(name: str, rubric: str, run_dir: RunDir, console: Console) -> Any:
    """The judge behind a name that isn't a code measure; RunError for one that there isn't."""
    from iqlite.evaluation.judges import Human, Kept, named
    from iqlite.run.findings import JUDGEMENTS
    from iqlite.scoring.measures import NAMES

    if name == "me":
        if not console.is_terminal:
            raise RunError("--judge me asks in a terminal: run it there, or name another judge.")
        console.print(clean(rubric))
        return Human(console.input, lambda text: console.print(harmless(text), markup=False), Kept(run_dir.path / JUDGEMENTS))
    found = named(name, rubric, run_dir.path / JUDGEMENTS)
    if found is None:
        raise RunError(f"--judge {name!r} isn't one of {', '.join(NAMES)}, me, reward:NAME, URL#MODEL.")
    return found
