"""`iqlite report`: one or several runs as a page to keep, print and share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from iqlite.commands.options import Base, Force, Json
from iqlite.errors import IqliteError
from iqlite.terminal import clean
from iqlite.terminal import console as terminal

EXAMPLES = (
    "iqlite report runs/cheerful-135m",
    "iqlite report runs/first runs/second -o both.html",
)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run directories; several are drawn into the same charts.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write it.")] = Path("report.html"),
    count: Annotated[int, typer.Option(min=1, help="How many held-out prompts are shown with their answers.")] = 8,
    rewards: Annotated[
        bool, typer.Option("--rewards/--no-rewards", help="Read the answers' tokens; this loads the base, once for each run.")
    ] = True,
    base: Base = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write runs as one page that loads nothing.

    What was trained and how to repeat it, answers before and after with every token's reward, curves, the comparison, stability, memory and time.
    """
    from iqlite.integrity import write_whole
    from iqlite.run.files import check_place, explained
    from iqlite.run.rundir import RunDir

    opened = [RunDir.open(path, base) for path in runs]
    check_place(out, out.name, force=force)
    console = terminal(stderr=as_json)

    from iqlite.showing.facts import facts_of
    from iqlite.showing.report import Words, report_page

    words: list[Words | None] = []
    reasons: list[str] = []
    facts = [facts_of(run) for run in opened]
    for run in opened:
        one, why_not = None, "Answers that training kept, of its first and last evaluation, drawn at the recipe's temperature."
        if rewards:
            try:
                run.trained()
                from iqlite.showing.keeping import words_of

                one = words_of(run, count, lambda line, run=run: console.print(f"[dim]{clean(run.path.name)}: {clean(line)}[/]"))  # type: ignore[misc]
            except IqliteError as error:
                why_not = f"No token could be read: {error} {why_not}"
                console.print(f"[yellow]{clean(str(error))}[/]")
        words.append(one)
        reasons.append(why_not)
    title = facts[0].name if len(facts) == 1 else f"{len(facts)} runs"
    page = report_page(opened, facts, words, title, reasons)
    with explained(out, "write it again"):
        write_whole(out, page)
    size = out.stat().st_size
    if as_json:
        print(json.dumps({"path": str(out), "bytes": size, "runs": [{"run": str(one.path), "state": one.state} for one in facts]}))
    else:
        console.print(f"written: {out} ({size / 1000:.0f} kB)", markup=False)
