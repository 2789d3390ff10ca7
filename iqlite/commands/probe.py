"""`iqlite probe`: does a description move this base at all, where, at which strength, and do human preferences agree? Nothing is written,
but for `--improve`, which turns the recipe's aim and writes a new one."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from iqlite.commands.options import Json, Set, there
from iqlite.errors import RecipeError, RunError
from iqlite.places import cache_folder
from iqlite.terminal import clean, duration, table
from iqlite.terminal import console as terminal

if TYPE_CHECKING:
    from iqlite.aim.search import Trial
    from iqlite.recipe.schema import Recipe
    from iqlite.records import Prompts
    from iqlite.scoring.intervals import Array

EXAMPLE = 160


EXAMPLES = (
    "iqlite probe cheerful-135m",
    "iqlite probe mine.toml --improve --minutes 20",
)


def probe(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe or its name.")],
    overrides: Set = None,
    count: Annotated[int, typer.Option(min=2, help="How many held-out prompts are answered.")] = 16,
    strengths: Annotated[list[float] | None, typer.Option("--strength", help="A strength to try; can be given several times.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Preference pairs, JSON lines with prompt, chosen and rejected: does π̃ agree?")] = None,
    improve: Annotated[
        bool, typer.Option("--improve", help="Turn the aim: try placements, strengths, wordings and the model's own demonstrations.")
    ] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="With --improve: the new recipe; by default NAME-aimed.toml.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="With --improve: about how long to try.")] = 10.0,
    judge: Annotated[str | None, typer.Option(help="With --improve: reward:NAME or URL#MODEL instead of the recipe's measure.")] = None,
    as_json: Json = False,
) -> None:
    """See before training whether a description moves the base.

    Where it is best placed, and at which strength; --improve tries other wordings and demonstrations.
    """
    from iqlite.recipe.reading import load_recipe

    read = load_recipe(recipe, overrides or [])  # a fault in it is reported before torch is imported
    there(pairs=pairs)
    if not improve and (out or judge):
        raise RecipeError("-o and --judge belong to --improve: add it, or leave them out.")
    if improve and (pairs or strengths):
        raise RecipeError("--improve chooses strengths itself and takes no --pairs: leave --strength and --pairs out.")
    console = terminal(stderr=as_json)
    from iqlite.evaluation.judges import PREFIXES, REWARD

    if judge and not judge.startswith((REWARD, *PREFIXES)):
        raise RunError(f"--judge {judge!r} isn't one that --improve can ask: give reward:NAME or URL#MODEL.")
    if improve:
        _improve(read, overrides or [], out=out, minutes=minutes, judge=judge, as_json=as_json, console=console)
    else:
        _probe(read, prompts=count, pairs=pairs, strengths=strengths, as_json=as_json, console=console)


def _probe(
    recipe: Recipe, *, prompts: int, pairs: Path | None, strengths: Sequence[float] | None, as_json: bool, console: Console
) -> None:  # fmt: skip
    """Reads, answers, prints."""
    from iqlite.aim.look import look_sampler
    from iqlite.chat.superior import check_heard
    from iqlite.evaluation.beginning import advice
    from iqlite.evaluation.probing import RANKINGS, STRENGTHS, agreement, contrast, ranks, suggested, verdict, voices
    from iqlite.machine.sizes import within_memory
    from iqlite.recipe.pairs import load_pairs
    from iqlite.recipe.wording import lint
    from iqlite.scoring.intervals import FEWEST
    from iqlite.scoring.measures import DESCRIBED, HARMLESS, OWN_EYE
    from iqlite.training.measuring import LONGEST
    from iqlite.training.opening import open_session
    from iqlite.training.order import spread, spread_by_kind

    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"start": None})})  # the bare base is what is probed
    check_heard(recipe)
    strengths = sorted(strengths or {*STRENGTHS, recipe.superior.settings()["strength"]} - {0.0})
    given = load_pairs(pairs, lambda text: console.print(text, markup=False)) if pairs else []
    behavior = recipe.behavior
    described = [(behavior.wanted, behavior.unwanted), *((p.wanted, p.unwanted) for p in behavior.mixture)]
    notes = [note for wanted, unwanted in described for note in lint(wanted, unwanted)]
    session = open_session(recipe, say=lambda text: console.print(f"[dim]{text}[/]"))
    for strength in strengths:
        session.with_strength(strength)  # one that can't be is refused before anybody answers
    spreading = spread_by_kind(session.asked, prompts) if recipe.judge.measure == HARMLESS else spread(range(len(session.asked)), prompts)
    asked, name = session.asked.some(spreading), recipe.judge.measure
    requests = asked.requests
    with within_memory(recipe, "with --set, and probe again"), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("answering and reading", total=2 + len(strengths) + 2 + 2 * len(given) / 16)

        def done(what: str) -> None:
            progress.advance(task)
            if progress.disable:
                console.print(f"answered: {what}", markup=False)

        found = voices(session, asked, spreading, look_sampler(session), strengths, done)
        where = contrast(session, session.answers("reference", requests, session.sampler("probe")))
        progress.advance(task)
        began, read_rows = time.monotonic(), 0

        def read(rows: int) -> None:
            nonlocal read_rows
            progress.advance(task, rows / 16)
            read_rows += rows
            left = (time.monotonic() - began) / read_rows * (2 * len(given) - read_rows)
            if progress.disable:
                console.print(f"read {read_rows} of {2 * len(given)} answers of pairs, left {duration(left)}", markup=False)

        ranked, cut = ranks(session, given, LONGEST, read) if given else ({}, 0)
    likely, why = verdict(where, found, name, len(requests))
    begins = advice(where.unsaid, recipe)
    best = suggested(found) if len(requests) >= FEWEST else None
    agrees = agreement(ranked, len(given)) if given else ""
    if as_json:
        result = {
            "likely": likely, "why": why, "measure": name, "prompts": len(requests), "contrast": asdict(where), "voices": [asdict(v) for v in found],
            "suggested": best, "beginning": begins, "lint": notes, "pairs": len(given), "cut": cut, "ranks": {way: asdict(one) for way, one in ranked.items()}, "agrees": agrees,
        }  # fmt: skip
        print(json.dumps(result))
        return
    for note in (*session.notes, *notes):
        console.print(f"[yellow]{clean(note)}[/]")
    cells = [
        [clean(v.name), f"{v.score:.3f}", f"{v.score_se:.3f}", "" if v.name == "base" else "{value:+.2f} ({low:+.2f}..{high:+.2f})".format(**asdict(v.difference)), f"{v.differs:.0%}", f"{v.base_nll:.2f}"]
        for v in found
    ]  # fmt: skip
    columns = ["", name, "± se", "from the base", "differ", "nats"]
    console.print(table(f"answers to {len(requests)} held-out prompts, from the same noise", columns, cells))
    console.print("[dim]differ: answers unlike the base's · nats: how strange a token is to the base[/]")
    for v in found:
        console.print(f"[bold]{clean(v.name)}[/]: {clean(v.example, EXAMPLE)}")
    by_part = " · ".join("–" if nats is None else f"{nats:z.3f}" for nats in where.kl_by_part)
    between = {"KL(π⁺‖π_ref)": where.kl_wanted, "KL(π⁺‖π⁻)": where.kl_opposed}
    if shown := ", ".join(f"{what} {nats:z.3f}" for what, nats in between.items() if nats is not None):
        console.print(f"readings: {shown} nats a token on the base's own answers")
    console.print(
        f"contrast: KL(π_ref‖π̃) {where.kl_superior:z.3f} nats a token over {where.tokens} tokens; by quarters of the answer {by_part}"
    )
    console.print(f"          {where.clipped_share:.1%} of Δ clipped, {where.implausible_mass:.1%} of the mass implausible")
    if given:
        cells = [[way, ranked[way].percent(), RANKINGS[way]] for way in RANKINGS]
        console.print(table(f"how often the chosen answer of {len(given)} pairs is ranked first", ["by", "chosen first", ""], cells))
        if cut:
            console.print(f"[dim]{cut} of {2 * len(given)} answers are longer than {LONGEST} tokens, and were read so far only[/]")
        console.print(agrees)
    if best:
        console.print(f"suggested: superior.strength = {best.rpartition(' ')[2]}, the weakest within a standard error of the best that isn't much stranger to the base")  # fmt: skip
    elif len(requests) >= FEWEST:
        console.print("suggested: none of these strengths, since answers score no better than the base's, or are much stranger to it")
    if begins:
        console.print(f"[bold yellow]{clean(begins)}[/]")
    console.print(f"[{'green' if likely else 'bold yellow'}]{clean(why)}[/]")
    if name == DESCRIBED:
        console.print(f"[dim]{OWN_EYE}[/]")
    quoted = shlex.quote(str(recipe.path))
    console.print(f"next:  iqlite {'train' if likely else 'probe'} {quoted}{'' if likely else ' --improve'}", markup=False)


def _improve(
    recipe: Recipe, overrides: Sequence[str], *, out: Path | None, minutes: float, judge: str | None, as_json: bool, console: Console
) -> None:
    """Turns the recipe's aim and writes the recipe that aims best."""
    import numpy as np

    from iqlite.aim.look import RIGHT, signed
    from iqlite.aim.search import CHOOSING
    from iqlite.aim.search import improve as run_search
    from iqlite.aim.writing import out_path, two_sided, write
    from iqlite.chat.superior import check_heard
    from iqlite.evaluation.judges import RewardModel, named, rubric_of, without_password
    from iqlite.machine.sizes import within_memory
    from iqlite.run.findings import JUDGEMENTS
    from iqlite.training.measuring import measured
    from iqlite.training.opening import open_session

    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"start": None})})
    check_heard(recipe)
    path = out_path(recipe, out)
    recipe, added = two_sided(recipe)
    judging = named(judge, rubric_of(recipe), cache_folder() / JUDGEMENTS) if judge else None
    with within_memory(recipe, "with --set, and probe again"):
        session = open_session(recipe, say=lambda text: console.print(f"[dim]{text}[/]"))
        for note in (*session.notes, *([f"added: {added}."] if added else [])):
            console.print(f"[yellow]{clean(note)}[/]")
        base = session

        def score(asked: Prompts, texts: Sequence[str], others: Sequence[str]) -> Array:
            if isinstance(judging, RewardModel):
                return np.array([judging.score(r, t) for r, t in zip(asked.requests, texts, strict=True)])
            if judging is not None:
                return np.array([judging.prefers(r, t, o) for r, t, o in zip(asked.requests, texts, others, strict=True)])
            return measured(base, recipe.judge.measure, asked, texts)

        began = time.monotonic()

        def tried(trial: Trial) -> None:
            mark = "[green]best so far[/]" if trial.best else ""
            console.print(
                f"{duration(time.monotonic() - began)} of {minutes:g} min  {trial.score:6.3f} ({signed(trial.difference)})  {clean(trial.candidate.what)}  {mark}"
            )

        found = run_search(session, score, minutes, lambda text: console.print(f"[dim]{text}[/]"), tried, recipe.train.seed)
    name = without_password(judge) if judge else recipe.judge.measure
    kept = found.after.difference.value > found.before.difference.value and found.after.verdict == RIGHT
    reason = [
        f"Made by iqlite probe {recipe.path.name} --improve: {found.best.what}.",
        f"By {name}, on {found.after.prompts} held-out prompts that nothing was chosen on: {found.after.figures()};",
        f"as it stood: {found.before.figures()}.",
        *([f"Added: {added}."] if added else []),
        *(
            ["Demonstrations are this base's own answers, the best and the worst by the measure: read them before you train."]
            if found.best.recipe.behavior.demonstrations
            else []
        ),
    ]
    if found.best.what != "as it stands":
        write(path, recipe, overrides, found, reason)
    if as_json:
        print(json.dumps({
            "measure": name, "recipe": str(path) if path.exists() else None, "best": found.best.what, "out_of_time": found.out_of_time,
            "trials": [{"what": t.candidate.what, "score": t.score, "difference": asdict(t.difference), "nll": t.nll, "best": t.best, "prompts": t.prompts} for t in found.trials],
            "before": asdict(found.before), "after": asdict(found.after),
        }))  # fmt: skip
        return
    cells = [
        [
            clean(t.candidate.what),
            str(t.prompts),
            f"{t.score:.3f}",
            signed(t.difference),
            "" if t.nll is None else f"{t.nll:.2f}",
            "*" if t.best else "",
        ]
        for t in found.trials
    ]
    console.print(
        table(
            f"tried on up to {CHOOSING} training prompts: superior, by {clean(name)}",
            ["", "prompts", "score", "from the base", "nats", "best"],
            cells,
        )
    )
    if found.out_of_time:
        console.print(f"[dim]{minutes:g} minutes are over before all was tried: --minutes {2 * minutes:g} goes on from what is kept[/]")
    console.print(f"as it stood, on held-out prompts: {found.before.figures()}", markup=False)
    if found.best.what == "as it stands":
        console.print(
            "[yellow]nothing that was tried beats the recipe as it stands: nothing is written. Write demonstrations yourself, or take a larger base.[/]"
        )
        return
    console.print(f"[{'green' if kept else 'bold yellow'}]now, on the same: {clean(found.after.figures())}[/]")
    if not kept:
        console.print(
            "[bold yellow]That is no improvement that can be told from chance on prompts that nothing was chosen on: train with care.[/]"
        )
    console.print(f"wrote {path} ({found.best.what})\nnext:  iqlite train {shlex.quote(str(path))}", markup=False)
