"""`iqlite bench`: how fast this machine is, phase by phase, on the embedded model, and so how long each recipe takes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from iqlite.commands.options import Json
from iqlite.errors import RunError
from iqlite.places import cache_folder, shipped_recipes
from iqlite.terminal import console as terminal
from iqlite.terminal import duration, facts, table

RECIPE = "cheerful-135m.toml"
LONGEST = 1000 * 3600  # seconds


EXAMPLES = (
    "iqlite bench",
    "iqlite bench mine.toml --steps 5",
)


def bench(
    recipe_path: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A recipe whose steps are timed; the demo's without it.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after one warm-up.")] = 3,
    as_json: Json = False,
) -> None:
    """Measure how fast this machine is.

    Tokens per second of each phase, and how long each recipe takes here.
    """
    from iqlite.recipe.reading import load_recipe

    console = terminal(stderr=as_json)
    given = recipe_path or shipped_recipes() / RECIPE
    recipe = load_recipe(given, [] if recipe_path else ["behavior.placement=user"])

    from iqlite.device import name_of, peak_gib
    from iqlite.machine.sizes import within_memory
    from iqlite.machine.timing import BENCH_FILE
    from iqlite.training.opening import open_session
    from iqlite.training.timed import PHASES, rates_of, recipes_at, stream_rate, timed_steps

    def say(text: str) -> None:
        console.print(f"[dim]{text}[/]")

    with within_memory(recipe, "in a recipe of your own"):
        session = open_session(recipe, say=say)
        measured = timed_steps(session, steps, say)
    timed = {name: statistics.median(row[name] for row in measured) for name in (*PHASES, "tokens", "prompt")}
    device = session.policy.device
    peak = peak_gib(device)
    stream = stream_rate(device)
    rates = rates_of(session, timed)
    minutes = recipes_at(device, rates)
    found: dict[str, Any] = {
        "machine": name_of(device),
        "base": session.policy.base.name,
        "seconds": {name: timed[name] for name in PHASES},
        "tokens_per_s": {name: timed["tokens"] / timed[name] for name in PHASES},
        "peak_gib": peak,
        "memory_gb_per_s": stream / 1e9,
        "bandwidth_share": rates.decode / stream,
        "rates": rates.record(),
        "recipes": minutes,
    }  # fmt: skip
    file = cache_folder() / BENCH_FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise RunError(f"{file} can't be written ({error.strerror}); set IQLITE_CACHE to a folder that can.") from None
    if as_json:
        print(json.dumps(found))
        return
    phases = [[name, f"{timed[name]:.2f}", f"{timed['tokens'] / timed[name]:.1f}"] for name in PHASES]
    console.print(table(f"{found['base']} on {found['machine']}", ("phase", "seconds", "response tokens/s"), phases))
    shown = [[row["recipe"], duration(row["step_seconds"]), _whole(row["seconds"])] for row in minutes]
    console.print(table("about how long recipes take here", ("recipe", "a step", "all steps"), shown))
    share = f"{rates.decode / 1e9:.1f} GB/s, {100 * found['bandwidth_share']:.0f} % of the {stream / 1e9:.1f} GB/s that memory gives"
    facts(console, {"peak": f"{found['peak_gib']:.2f} GiB", "decoding reads": share, "written": f"{file} (iqlite plan uses it)"})


def _whole(seconds: float | None) -> str:
    """How long all steps take; what nobody would wait for isn't told in hours."""
    if not seconds:
        return "?"
    return duration(seconds) if seconds <= LONGEST else "not on this machine"
