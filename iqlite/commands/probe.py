"""`iqlite probe`: does a description move this base at all, where, at which strength, and do human preferences agree? Nothing is written."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from iqlite.contrast import check_heard
from iqlite.intervals import FEWEST
from iqlite.judges import MEASURES
from iqlite.preferences import load_pairs
from iqlite.probing import RANKINGS, STRENGTHS, agreement, contrast, lint, ranks, suggested, verdict, voices
from iqlite.recipe import Recipe
from iqlite.rollout import Sampler
from iqlite.session import open_session, within_memory
from iqlite.terminal import clean, duration, table

EXAMPLE = 160
LONGEST = 256  # tokens of an answer of a pair that are read


def run(
    recipe: Recipe, *, prompts: int, pairs: Path | None, strengths: Sequence[float] | None, as_json: bool, console: Console
) -> int:  # fmt: skip
    """Reads, answers, prints; returns the exit code."""
    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"start": None})})  # the bare base is what is probed
    check_heard(recipe)
    strengths = sorted(strengths or {*STRENGTHS, recipe.superior.settings()["strength"]} - {0.0})
    given = load_pairs(pairs) if pairs else []
    behavior = recipe.behavior
    described = [(behavior.wanted, behavior.unwanted), *((p.wanted, p.unwanted) for p in behavior.mixture)]
    notes = [note for wanted, unwanted in described for note in lint(wanted, unwanted)]
    session = open_session(recipe, say=lambda text: console.print(f"[dim]{text}[/]"))
    for strength in strengths:
        session.with_strength(strength)  # one that can't be is refused before anybody answers
    requests = session.eval.requests[:prompts]
    name = recipe.judge.measure
    with within_memory(recipe, "with --set, and probe again"), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("answering and reading", total=2 + len(strengths) + 2 + 2 * len(given) / 16)

        def done(what: str) -> None:
            progress.advance(task)
            if progress.disable:
                console.print(f"answered: {what}", markup=False)

        sampler = Sampler(recipe.train.seed, recipe.rollout.max_new_tokens, 0.7, 0.9, "probe")
        found = voices(session, requests, sampler, MEASURES[name], strengths, done)
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
    best = suggested(found) if len(requests) >= FEWEST else None
    agrees = agreement(ranked, len(given)) if given else ""
    if as_json:
        result = {
            "likely": likely, "why": why, "measure": name, "prompts": len(requests), "contrast": asdict(where), "voices": [asdict(v) for v in found],
            "suggested": best, "lint": notes, "pairs": len(given), "cut": cut, "ranks": {way: asdict(one) for way, one in ranked.items()}, "agrees": agrees,
        }  # fmt: skip
        print(json.dumps(result))
        return 0
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
    by_part = " · ".join("–" if nats is None else f"{nats:.3f}" for nats in where.kl_by_part)
    between = {"KL(π⁺‖π_ref)": where.kl_wanted, "KL(π⁺‖π⁻)": where.kl_opposed}
    if shown := ", ".join(f"{what} {nats:.3f}" for what, nats in between.items() if nats is not None):
        console.print(f"readings: {shown} nats a token on the base's own answers")
    console.print(
        f"contrast: KL(π_ref‖π̃) {where.kl_superior:.3f} nats a token over {where.tokens} tokens; by quarters of the answer {by_part}"
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
    console.print(f"[{'green' if likely else 'bold yellow'}]{clean(why)}[/]")
    return 0
