"""The command line: parse, import the verb lazily, print, exit. The only module that exits. No torch at the top."""

from __future__ import annotations

import logging
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from iqlite import __version__
from iqlite.errors import IqliteError

app = typer.Typer(
    name="iqlite",
    help="Describe a behaviour in words, and iqlite trains it into the weights, on the GPU you already own.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output; progress goes to standard error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


class Device(StrEnum):
    """Where a plan is for."""

    cpu = "cpu"
    cuda = "cuda"


def _version(value: bool) -> None:
    if value:
        print(f"iqlite {__version__}")
        raise typer.Exit


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/cheerful-135m.toml.")],
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/NAME, numbered if that exists.")] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe: --set rollout.temperature=0.8")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there, and start even if memory seems too small.")] = False,
    json: Json = False,
) -> None:
    """Train a described behaviour into a LoRA adapter."""
    from iqlite.commands import train as verb
    from iqlite.terminal import console

    raise typer.Exit(verb.run(recipe, set or [], out, resume=resume, force=force, as_json=json, console=console(stderr=json)))


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="A run directory, such as runs/cheerful-135m.")],
    seeds: Annotated[int, typer.Option(min=1, help="Sampling seeds; each answers every prompt.")] = 3,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature, the same for all; 0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus truncation, the same for all.")] = 0.9,
    prompts: Annotated[int | None, typer.Option(min=1, help="Answer only the first so many held-out prompts.")] = None,
    adapter: Annotated[str, typer.Option(help="Which adapter of the run: adapter or best.")] = "adapter",
    json: Json = False,
) -> None:
    """Compare base, told base and trained model on held-out prompts: tone, length, share ended."""
    from iqlite.commands import compare as verb
    from iqlite.terminal import console

    raise typer.Exit(
        verb.run(
            run,
            seeds=seeds,
            temperature=temperature,
            top_p=top_p,
            prompts=prompts,
            adapter=adapter,
            as_json=json,
            console=console(stderr=json),
        )
    )


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Name of the new recipe; NAME.toml is written.")],
    wanted: Annotated[str, typer.Option(help="The wanted behaviour, in a sentence or two.")],
    unwanted: Annotated[str, typer.Option(help="The unwanted behaviour, alike in form and opposite in meaning.")],
    base: Annotated[
        str, typer.Option(help="Hub id, model folder, .gguf file, ollama:NAME:TAG, or the embedded model.")
    ] = "smollm2-135m-instruct",
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer in training, tokens.")] = 48,
    force: Force = False,
) -> None:
    """Write a commented recipe with prompts beside it, ready to train."""
    from iqlite.commands import init as verb
    from iqlite.terminal import console

    raise typer.Exit(verb.run(name, base, wanted, unwanted, tokens=tokens, force=force, console=console()))


@app.command()
def recipe(json: Json = False) -> None:
    """List every key of a recipe with its default and what it does."""
    from iqlite.commands import recipe as verb
    from iqlite.terminal import console

    raise typer.Exit(verb.run(as_json=json, console=console(stderr=json)))


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; with --all, a folder of recipes (the shipped ones by default).")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")] = None,
    vram: Annotated[str | None, typer.Option(help="Free memory of the card that is meant, such as 8GB.")] = None,
    card: Annotated[str | None, typer.Option(help='A card by its name, such as "RTX 4070".')] = None,
    device: Annotated[Device | None, typer.Option(help="Plan for this machine's CPU or card.")] = None,
    all: Annotated[bool, typer.Option("--all", help="Every recipe on cards of 6, 8, 10, 12, 16 and 24 GB.")] = False,
    json: Json = False,
) -> None:
    """Tell whether a recipe fits, what takes the memory, and how long it takes: nothing is downloaded but a few kB."""
    from iqlite.commands import plan as verb
    from iqlite.terminal import console

    out = console(stderr=json)
    raise typer.Exit(
        verb.run(
            recipe, set or [], vram=vram, card=card, device=device.value if device else None, everything=all, as_json=json, console=out
        )
    )


@app.command()
def bench(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe whose steps are timed; the demo's without it.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after one warm-up.")] = 3,
    json: Json = False,
) -> None:
    """Measure this machine: tokens a second of each phase, and how long each recipe takes."""
    from iqlite.commands import bench as verb
    from iqlite.terminal import console

    raise typer.Exit(verb.run(recipe, steps=steps, as_json=json, console=console(stderr=json)))


def main() -> None:
    """The console script: errors for people are one sentence on standard error and exit code 2."""
    warnings.filterwarnings("ignore")  # libraries' advice to their callers isn't the user's business
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except IqliteError as error:
        sys.stderr.write(f"iqlite: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
