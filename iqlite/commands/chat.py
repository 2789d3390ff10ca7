"""`iqlite chat`: talk to the base, the trained policy or the superior policy itself; several turns, or one answer and out."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iqlite.base.names import EMBEDDED, find_gguf
from iqlite.commands.options import Json
from iqlite.errors import RecipeError, RunError
from iqlite.places import RUNS, is_run, path_of
from iqlite.terminal import console as terminal

if TYPE_CHECKING:
    from iqlite.recipe.schema import Recipe


EXAMPLES = (
    "iqlite chat runs/cheerful-135m",
    'iqlite chat cheerful-135m --superior --prompt "How was your day?"',
)


def chat(
    target: Annotated[
        str | None, typer.Argument(metavar="RUN | RECIPE | MODEL", help="A run, a recipe or a model; the newest run without it.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of another adapter of the same base.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the bare base.")] = False,
    base_path: Annotated[
        str | None, typer.Option("--base-path", metavar="PATH", help="Where the run's base is now, if it has moved; --base PATH does too.")
    ] = None,
    superior: Annotated[bool, typer.Option("--superior", help="Talk to the superior policy: no training is needed.")] = False,
    strength: Annotated[float | None, typer.Option(help="Strength of the superior's contrast, instead of the recipe's.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this one question on standard output and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system text.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Talk to what was trained, or to its base.

    Or, with --superior, to what training aims at, before any training. /help lists what can be typed.
    """
    console = terminal(stderr=as_json)
    if base_path is not None and target is None:  # --base PATH: the bare base, of the model that is named
        target, base, base_path = base_path, True, None
    if base and superior:
        raise RecipeError("--base and --superior are two voices: give one of them.")
    voice = "base" if base else "superior" if superior else None
    recipe, folder, placement, name = _resolve(target, adapter, base_path)
    piped = None if prompt is not None or sys.stdin.isatty() else sys.stdin.read().strip()
    question = prompt if prompt is not None else piped
    if question is None and as_json:
        raise RunError("--json is for one answer: give --prompt TEXT, or pipe the question in.")
    if question == "":
        raise RunError("the question is empty: give --prompt TEXT, or pipe a text in.")

    from iqlite.chat.conversation import WHY_NOT, Conversation
    from iqlite.chat.speaker import Speaker

    def say(text: str) -> None:
        if question is None:
            console.print(f"[dim]{text}[/]")

    if recipe:
        say(f"opening {name}")
    speaker = Speaker.of_recipe(recipe, folder, placement, say) if recipe else Speaker.of_model(name, folder, say)
    if strength is not None:
        speaker = speaker.with_strength(strength)
    if voice is not None and voice not in speaker.voices:
        raise RunError(f"{name} has no {voice} to talk to, only {' and '.join(speaker.voices)}: {WHY_NOT[voice]}")
    if voice == "superior":
        say(_aim(target, name))
    start = voice or ("policy" if speaker.adapted else "base")
    talk = Conversation(speaker, console, start, temperature, tokens, seed, system)
    if question is not None:
        talk.once(question, as_json=as_json)
    else:
        talk.loop(name)


def _aim(target: str | None, name: str) -> str:
    """What is known of where the superior policy points: of a run, what was seen before it was trained."""
    from iqlite.run.rundir import RunDir

    path = Path(target or name)
    aim = RunDir.open(path).aim() if is_run(path) else None
    if aim is None:
        return f"this is what training would aim at; whether it is better by the recipe's measure, iqlite probe {shlex.quote(name)} tells"
    said = {"right": "points the right way", "wrong": "points the wrong way", "none": "had no effect beyond chance"}[aim["verdict"]]
    means = ", ".join(f"{who} {score:.2f}" for who, score in aim["scores"].items())
    return f"this is what training aimed at; by {aim['measure']} it {said} ({means})"


def _resolve(target: str | None, adapter: Path | None, base: str | None = None) -> tuple[Recipe | None, Path | None, str | None, str]:
    """(recipe, adapter, placement, name) of a run, a recipe or a model; without a target, the newest run."""
    from iqlite.recipe.reading import load_recipe, recipe_file
    from iqlite.run.rundir import RunDir, check_adapter_of

    if target is None:
        runs = sorted((p for p in RUNS.glob("*") if is_run(p)), key=lambda p: p.stat().st_mtime)
        target = str(runs[-1]) if runs else EMBEDDED
    path = path_of(target)
    if path.is_dir() and not (path / "config.json").is_file():
        run_dir = RunDir.open(path, base)
        run_dir.check_base()
        folder = adapter or run_dir.trained()
        check_adapter_of(run_dir, folder)
        return run_dir.recipe(), folder, run_dir.environment()["placement"], target
    if recipe_file(path).suffix == ".toml":
        return load_recipe(path), adapter, None, target
    if path.is_file():
        find_gguf(target)  # one that is no model is reported before torch is imported
    if not path.exists() and len(path.parts) > 1 and path.parent.is_dir():  # not OWNER/NAME on the hub
        raise RunError(f"{target}: there is no such run or model; name a run, a recipe or a model.")
    return None, adapter, None, target
