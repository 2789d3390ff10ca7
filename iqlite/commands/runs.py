"""`iqlite runs`: the table of runs and adapters; `iqlite runs rm`: removing runs; `iqlite runs cache`: what the cache holds, and freeing it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from iqlite.commands.options import Json, Verb, examples
from iqlite.errors import RunError
from iqlite.places import RUNS
from iqlite.terminal import console as terminal
from iqlite.terminal import harmless

EXAMPLES = (
    "iqlite runs experiments --watch",
    "iqlite runs rm runs/first runs/second",
)
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]


def runs(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="FOLDER…", help="Where to look, and below; by default in runs.")] = None,
    watching: Annotated[bool, typer.Option("--watch", help="Look again every two seconds, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """List runs and adapters, remove some, see and free the cache.

    State, behaviour, base, the recipe's measure of held-out answers before and after, size, time, and how long ago they were last written.
    `iqlite runs rm` removes runs; `iqlite runs cache` shows what the cache holds, and frees it. A folder called rm is ./rm.
    """
    from iqlite.run.listing import Row, check_folder, listed

    for folder in folders or ():
        check_folder(folder)

    def look() -> list[Row]:
        found = {row.path.resolve(): row for folder in folders or [RUNS] for row in listed(folder)}  # a folder may be named twice
        return sorted(found.values(), key=lambda row: row.order)

    console = terminal()
    if watching:
        if as_json or not console.is_terminal or console.is_dumb_terminal:
            raise RunError("--watch draws on a terminal, and there is none here: leave it out.")
        from iqlite.showing.runs import watch

        watch(console, look)
        return
    rows = look()
    if as_json:
        print(json.dumps([row.record() for row in rows]))
    elif not rows:
        console.print(f"no runs in {', '.join(map(str, folders or [RUNS]))}; begin one with:  iqlite train cheerful-135m", markup=False)
    else:
        from iqlite.showing.runs import PIPED, RunsTable

        console.width = console.width if console.is_terminal else PIPED
        console.print(RunsTable(rows))


def rm(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run directories.")],
    yes: Yes = False,
) -> None:
    """Remove runs. One that is being trained is refused, and so are links and folders that aren't runs."""
    from iqlite.run.removing import check_removable, remove
    from iqlite.showing.runs import size

    rows = check_removable(paths)
    for row in rows:
        sys.stdout.write(f"{harmless(f'{row.path}  {row.state.words}')}, {size(row.bytes)}\n")
    if not _agreed("Remove this run?" if len(rows) == 1 else f"Remove these {len(rows)} runs?", yes):
        return
    for row in rows:
        remove(row.path)
    sys.stdout.write(f"removed: {size(sum(row.bytes for row in rows))}\n")


def cache(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="With --free: only these.")] = None,
    free: Annotated[
        bool, typer.Option("--free", help="Remove what isn't in use and is made again when it is needed, or what is named.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Show what the cache holds: converted models, kept answers and the like, what each was made from, and its size."""
    from iqlite.places import cache_folder
    from iqlite.showing import cached
    from iqlite.showing.runs import size

    if names and not free:
        raise RunError(f"{names[0]}: to remove it from the cache, add --free.")
    found = cached.entries()
    going = cached.chosen(found, names or ()) if free else []
    console = terminal(stderr=as_json)
    if not as_json or going:
        cached.show(console, going if free else found, "nothing to free" if found else "the cache is empty")
    if going and not _agreed(f"Remove {size(sum(one.bytes for one in going))} from the cache?", yes):
        going = []
    for one in going:
        cached.free(one)
    if as_json:
        print(
            json.dumps(
                {"folder": str(cache_folder()), "entries": [one.record() for one in found], "freed": [one.path.name for one in going]}
            )
        )
    elif going:
        console.print(f"removed: {size(sum(one.bytes for one in going))}", markup=False)


def _agreed(question: str, yes: bool) -> bool:
    """Whether somebody says yes; RunError where nobody can be asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise RunError(f"{question} Nobody can be asked here: add --yes.")
    if typer.confirm(question, err=True):
        return True
    sys.stderr.write("nothing was removed\n")
    return False


INNER_EXAMPLES = {"rm": ("iqlite runs rm runs/first runs/second",), "cache": ("iqlite runs cache", "iqlite runs cache --free")}


class Runs(Verb):
    """The verb that has verbs of its own: `iqlite runs rm …` is one of these, and `iqlite runs ./rm` shows a folder of that name."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        app = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
        for function in (rm, cache):
            app.command(function.__name__, cls=Verb, epilog=examples(INNER_EXAMPLES[function.__name__]))(function)
        self.inner: dict[str, TyperCommand] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The inner verb's, where the first argument names one."""
        if args and args[0] in self.inner:
            return self.inner[args[0]].make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


VERB = Runs
