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
from iqlite.errors import IqliteError, PromptsError, RecipeError, RunError

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


def _there(**files: Path | None) -> None:
    """A file that an option names and that isn't there is said before torch is imported."""
    for option, path in files.items():
        if path is not None and not path.is_file():
            raise PromptsError(f"--{option.replace('_', '-')} {path}: no such file; a path is relative to the folder you are in.")


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
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what is there; start even if memory seems too small or the target points the wrong way."),
    ] = False,
    safety: Annotated[bool, typer.Option("--safety/--no-safety", help="At the end: harm, over-refusal and bias before and after.")] = True,
    json: Json = False,
) -> None:
    """Train a described behaviour into a LoRA adapter."""
    from iqlite.recipe.schema import load_recipe

    read = load_recipe(recipe, set or [])  # a fault in it is said before torch is imported

    from iqlite.commands import train as verb
    from iqlite.terminal import console

    raise typer.Exit(verb.run(read, set or [], out, resume=resume, force=force, safety=safety, as_json=json, console=console(stderr=json)))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run directories of one base, such as runs/cheerful-135m.")],
    others: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="NAMES",
            help="Also: superior (the target itself, untrained), sft, dpo, sdft, ppo (trained under the same recipe).",
        ),
    ] = "",
    pairs: Annotated[
        Path | None, typer.Option(help="Your preference pairs for --with dpo, which otherwise learns told against plain answers.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="tone, shorter, refusal, compliance (by default the recipe's own), me, reward:NAME, or URL#MODEL.")
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
    adapter: Annotated[str, typer.Option(help="Which adapter of the run: adapter or best.")] = "adapter",
    safety: Annotated[bool, typer.Option("--safety/--no-safety", help="Also: harm, over-refusal and bias before and after.")] = True,
    safety_set: Annotated[Path | None, typer.Option(help="Your own safety set instead of the small one that ships.")] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Only the measure by step, epoch, tokens and minutes, of what training sampled.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare base, told base and trained models on the same prompts: figures, win rates and Elo with intervals."""
    from iqlite.run.rundir import RunDir

    opened = [RunDir.open(path) for path in runs]  # a fault in one is said before torch is imported
    _there(prompts=None if str(prompts) == "outside" else prompts, pairs=pairs, safety_set=safety_set)

    from iqlite.commands import compare as verb
    from iqlite.terminal import console

    if checkpoints and (others or pairs or prompts):
        raise RunError("--checkpoints reads what training left: it takes --judge, and none of --with, --pairs and --prompts.")
    if checkpoints:
        raise typer.Exit(verb.checkpoints(opened, judge=judge, as_json=json, console=console(stderr=json)))
    raise typer.Exit(verb.run(
        opened, seeds=seeds, temperature=temperature, top_p=top_p, prompts=prompts, count=count, adapter=adapter, others=[name.strip()
        for name in others.split(",") if name.strip()], pairs=pairs, judge=judge, safety=safety or safety_set is not None,
        safety_set=safety_set, as_json=json, console=console(stderr=json),
    ))  # fmt: skip


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Name of the new recipe; NAME.toml is written.")],
    wanted: Annotated[str, typer.Option(help="The wanted behaviour, in a sentence or two.")],
    unwanted: Annotated[str, typer.Option(help="The unwanted behaviour, alike in form and opposite in meaning.")],
    base: Annotated[
        str, typer.Option(help="Hub id, model folder, .gguf file, ollama:NAME:TAG, or the embedded model.")
    ] = "smollm2-135m-instruct",
    measure: Annotated[
        str | None, typer.Option(help="What answers are scored by; without it, what the descriptions are about (iqlite recipe lists them).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer in training, tokens.")] = 48,
    force: Force = False,
) -> None:
    """Write a commented recipe with prompts beside it, ready to train."""
    from iqlite.commands import init as verb
    from iqlite.terminal import console

    raise typer.Exit(verb.run(name, base, wanted, unwanted, measure=measure, tokens=tokens, force=force, console=console()))


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
    raise typer.Exit(verb.run(
        recipe, set or [], vram=vram, card=card, device=device.value if device else None, everything=all, as_json=json, console=out,
    ))  # fmt: skip


@app.command()
def probe(
    recipe: Annotated[Path, typer.Argument(help="A recipe.")],
    set: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")] = None,
    prompts: Annotated[int, typer.Option(min=2, help="How many held-out prompts are answered.")] = 16,
    strengths: Annotated[list[float] | None, typer.Option("--strength", help="A strength to try; can be given several times.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Preference pairs, JSON lines with prompt, chosen and rejected: does π̃ agree?")] = None,
    improve: Annotated[
        bool, typer.Option("--improve", help="Turn the aim: try placements, strengths, wordings and the model's own demonstrations.")
    ] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="With --improve: the new recipe; by default NAME-aimed.toml.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="With --improve: about how long to try.")] = 10.0,
    judge: Annotated[str | None, typer.Option(help="With --improve: reward:NAME or URL#MODEL instead of the recipe's measure.")] = None,
    json: Json = False,
) -> None:
    """Before training: does the description move this base, where, at which strength? --improve turns its aim."""
    from iqlite.recipe.schema import load_recipe

    read = load_recipe(recipe, set or [])  # a fault in it is said before torch is imported
    _there(pairs=pairs)

    from iqlite.commands import probe as verb
    from iqlite.terminal import console

    if not improve and (out or judge):
        raise RecipeError("-o and --judge belong to --improve: add it, or leave them out.")
    if improve and (pairs or strengths):
        raise RecipeError("--improve chooses strengths itself and takes no --pairs: leave --strength and --pairs out.")
    if improve:
        raise typer.Exit(verb.improve(read, set or [], out=out, minutes=minutes, judge=judge, as_json=json, console=console(stderr=json)))
    raise typer.Exit(verb.run(read, prompts=prompts, pairs=pairs, strengths=strengths, as_json=json, console=console(stderr=json)))


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


@app.command()
def chat(
    target: Annotated[
        str | None, typer.Argument(metavar="[RUN | RECIPE | MODEL]", help="A run, a recipe or a model; the newest run without it.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of another adapter of the same base.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the bare base.")] = False,
    superior: Annotated[bool, typer.Option("--superior", help="Talk to the superior policy: no training is needed.")] = False,
    strength: Annotated[float | None, typer.Option(help="Strength of the superior's contrast, instead of the recipe's.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this one question on standard output and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system text.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    json: Json = False,
) -> None:
    """Talk to what was trained, to its base, or to the superior policy before any training."""
    from iqlite.commands import chat as verb
    from iqlite.terminal import console

    if base and superior:
        raise RecipeError("--base and --superior are two voices: give one of them.")
    voice = "base" if base else "superior" if superior else None
    raise typer.Exit(verb.run(
        target, adapter=adapter, voice=voice, prompt=prompt, system=system, temperature=temperature, tokens=tokens, seed=seed,
        strength=strength, as_json=json, console=console(stderr=json),
    ))  # fmt: skip


class BaseWeights(StrEnum):
    """Which weights of the base a merge takes."""

    trained = "trained"
    stored = "stored"


class DType(StrEnum):
    """What merged weights are written as."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Format(StrEnum):
    """What a run is exported as."""

    peft = "peft"
    hf = "hf"
    gguf = "gguf"
    gguf_adapter = "gguf-adapter"
    ollama = "ollama"


Which = Annotated[str, typer.Option("--adapter", help="Which adapter of the run: adapter or best.")]
Weights = Annotated[
    BaseWeights,
    typer.Option("--base", help="The base's weights as the adapter learned on them (4 bits, dequantised), or as they are stored."),
]
Scale = Annotated[float, typer.Option(help="How much of the adapter is added: 1 is as trained.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where to write it.")]


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Out,
    adapter: Which = "adapter",
    base: Weights = BaseWeights.trained,
    scale: Scale = 1.0,
    dtype: Annotated[DType | None, typer.Option(help="What is written; by default what the base is stored in.")] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Measure how far the merged model is from the adapter on its base.")
    ] = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Sum a run's adapter into its base: a model in Hugging Face format, written shard by shard."""
    from iqlite.commands import merge as verb
    from iqlite.terminal import console

    kind = dtype.value if dtype else None
    out_console = console(stderr=json)
    raise typer.Exit(verb.run(
        run, out, adapter=adapter, base=base.value, strength=scale, dtype=kind, check=check, force=force, as_json=json,
        console=out_console,
    ))  # fmt: skip


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    to: Annotated[Format, typer.Option(help="What for.")],
    out: Out,
    quant: Annotated[str | None, typer.Option(help="Type of a GGUF's weights: f16 by default, q8_0, q4_k_m, …")] = None,
    adapter: Which = "adapter",
    base: Weights = BaseWeights.trained,
    scale: Scale = 1.0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Export what was trained: for PEFT, transformers, llama.cpp, LM Studio or Ollama."""
    from iqlite.commands import export as verb
    from iqlite.terminal import console

    raise typer.Exit(verb.run(
        run, to.value, out, quant=quant.lower() if quant else None, adapter=adapter, base=base.value, strength=scale, force=force,
        as_json=json, console=console(stderr=json),
    ))  # fmt: skip


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
