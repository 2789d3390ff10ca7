"""`iqlite inspect`: what a description rewards, token by token, before any training; and what training made of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from iqlite.commands.options import Base, Force, Json, Set, Which
from iqlite.errors import RecipeError, RunError
from iqlite.terminal import clean, counting
from iqlite.terminal import console as terminal

if TYPE_CHECKING:
    from iqlite.showing.heat import Heat, Shift
    from iqlite.training.session import Session

ASKED = "Write something."
"""What a text without a prompt is read as an answer to."""


class By(StrEnum):
    """What tokens are coloured and ranked by."""

    described = "described"
    trained = "trained"
    reward = "reward"


EXAMPLES = (
    "iqlite inspect cheerful-135m",
    "iqlite inspect runs/cheerful-135m -o why.html",
)


def inspect(
    target: Annotated[Path, typer.Argument(metavar="RECIPE | RUN", help="A recipe, its name, or a run.")],
    text: Annotated[str | None, typer.Option(help="Look at this text, as an answer to --prompt.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Look at the model's own answer to this prompt.")] = None,
    samples: Annotated[
        bool, typer.Option("--samples", help="Look at the answers that training kept, of its first and last evaluation.")
    ] = False,
    by: Annotated[
        By,
        typer.Option(help="What colours and ranks: what the description rewards, what training changed, or the reward of a training step."),
    ] = By.described,
    count: Annotated[int, typer.Option(min=1, help="How many held-out prompts are answered.")] = 16,
    show: Annotated[int, typer.Option(min=0, help="How many of the prompts are printed with their answers.")] = 3,
    top: Annotated[int, typer.Option(min=1, max=20, help="How many alternatives are kept for each token.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the answer to --prompt.")] = 0,
    which: Which = "adapter",
    base: Base = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write a page to look at in a browser.")] = None,
    overrides: Set = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """See the reward of every token, before or after training.

    And what the target and the base would rather have said. With a recipe: what does this description reward?
    """
    from iqlite.places import is_run
    from iqlite.recipe.reading import load_recipe
    from iqlite.run.files import check_place
    from iqlite.run.rundir import RunDir

    run = RunDir.open(target, base) if target.is_dir() and is_run(target) else None
    recipe = None if run else load_recipe(target, overrides or [])
    if run and overrides:
        raise RecipeError(f"--set changes a recipe, and {target} is a run: leave it out, or inspect a recipe.")
    if base and not run:
        raise RecipeError(f"--base says where a run's base is now, and {target} is a recipe: --set model.base=PATH.")
    if samples and (not run or text is not None or prompt is not None):
        raise RunError("--samples are a run's: name a run, and leave --text and --prompt out.")
    if "" in (text, prompt):
        raise RunError(f"--{'text' if text == '' else 'prompt'} is empty: give some words.")
    if run:
        run.trained(which)
    if out:
        check_place(out, out.name, force=force)
    console = terminal(stderr=as_json)

    from iqlite.machine.sizes import within_memory
    from iqlite.recipe.requests import parse_request
    from iqlite.showing.gathering import TEXT, answered, held_out, ids_of
    from iqlite.showing.gathering import samples as kept
    from iqlite.showing.heat import heat
    from iqlite.training.opening import open_run, open_session

    def say(line: str) -> None:
        console.print(f"[dim]{clean(line)}[/]")

    session = open_run(run, run.trained(which), say=say) if run else open_session(recipe, say=say)  # type: ignore[arg-type]
    adapted = run is not None or session.recipe.adapter.start is not None
    request = parse_request(prompt if prompt is not None else ASKED) or ({"role": "user", "content": prompt or ASKED},)
    with within_memory(session.recipe, "with --set, and inspect again"):
        if text is not None:
            given = [(TEXT, request, ids_of(session, text, True))]
            say(f"read as an answer to “{request[-1]['content']}”" + ("" if prompt else "; --prompt names another"))
        elif prompt is not None:
            given = answered(session, request, adapted=adapted, seed=seed)
        elif samples and run:
            given = kept(session, run)
            if not given:
                raise RunError(f"{run.path} has no samples yet: leave --samples out to draw some.")
        else:
            with counting(console, "answering held-out prompts") as bar:
                task = bar.add_task("", total=2 * count)
                given = held_out(session, run, count, which, lambda rows: bar.advance(task, rows))
        with counting(console, "reading answers") as bar:
            task = bar.add_task("", total=len(given))
            heats, shift = heat(session, given, top=top, progress=lambda rows: bar.advance(task, rows))
    if out:
        from iqlite.showing.page import inspect_page

        out.write_text(inspect_page(str(target), session.recipe, heats, _moved(session, shift), by.value), "utf-8")
    if as_json:
        print(json.dumps(_record(str(target), session, heats, shift, by.value)))
        return
    _print(console, session, heats, shift, by.value, single=text is not None or prompt is not None, show=show, top=top)
    if out:
        console.print(f"written: {out}", markup=False)


def _moved(session: Session, shift: Shift, count: int = 20) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    from iqlite.showing.heat import token_text

    return shift.extremes(lambda token: token_text(session, token), count)


def _record(target: str, session: Session, heats: list[Heat], shift: Shift, by: str) -> dict[str, Any]:
    from iqlite.showing.aggregates import aggregates

    found, (more, less) = aggregates(heats, by), _moved(session, shift)
    ranked = {
        name: {way: [asdict(row) for row in rows] for way, rows in zip(("rewarded", "punished"), both, strict=True)}
        for name, both in (("tokens", found.tokens), ("bigrams", found.bigrams))
    }
    return {
        "of": target,
        "by": by,
        "answers": [asdict(one) for one in heats],
        **ranked,
        "positions": [{"mean": mean, "count": count} for mean, count in found.positions],
        "more_often": [{"text": text, "in_100_tokens": value} for text, value in more],
        "less_often": [{"text": text, "in_100_tokens": value} for text, value in less],
    }


def _print(
    console: Console, session: Session, heats: list[Heat], shift: Shift, by: str, *, single: bool, show: int, top: int
) -> None:  # fmt: skip
    from iqlite.showing.aggregates import aggregates
    from iqlite.showing.gathering import pairs
    from iqlite.showing.terminal import legend, show_aggregates, show_answers, show_tokens

    wanted = session.wanted.text if session.wanted else "the adapter of [superior]"
    console.print(f"[bold]wanted[/]  {clean(wanted)}")
    legend(console, by)
    few = pairs([(one.prompt, one.who) for one in heats])[: len(heats) if single else show]
    show_answers(console, [heats[number] for numbers in few for number in numbers], by)
    if single:
        for one in heats:
            console.print()
            show_tokens(console, one, by, min(top, 3))
        return
    console.print()
    console.print(f"[dim]over {len(heats)} answers, {sum(len(one.tokens) for one in heats)} tokens[/]")
    more, less = _moved(session, shift, 12)
    show_aggregates(console, aggregates(heats, by), more, less)
