"""`iqlite plan`: does a recipe fit, what takes the memory, what to change if not, and how long a step takes. No torch, no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from iqlite.base.names import shape_of
from iqlite.commands.options import Json, Set
from iqlite.errors import RecipeError
from iqlite.places import shipped_recipes
from iqlite.terminal import clean, duration, facts, table
from iqlite.terminal import console as terminal

if TYPE_CHECKING:
    from iqlite.machine.memory import Plan, Work
    from iqlite.machine.timing import Rates
    from iqlite.recipe.schema import Recipe

SIZES_GB = (6, 8, 10, 12, 16, 24)
FREE_OF_A_CARD = 0.95  # of its size, what driver and desktop usually leave free; our choice
UNITS = {"": 2**30, "G": 2**30, "GB": 2**30, "GIB": 2**30, "M": 2**20, "MB": 2**20, "MIB": 2**20}
EXAMPLES = (
    'iqlite plan harmless-7b --card "RTX 4070"',
    "iqlite plan --all",
)


@dataclass(frozen=True)
class Machine:
    """What is planned for: device, free bytes, what it is called, and its rates if they are known."""

    device: str
    free: float
    name: str
    rates: Rates | None


class Device(StrEnum):
    """Where a plan is for."""

    cpu = "cpu"
    cuda = "cuda"


def plan(
    recipe_path: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="A recipe or its name; with --all, a folder of recipes (the shipped ones by default)."),
    ] = None,
    overrides: Set = None,
    vram: Annotated[str | None, typer.Option(help="Free memory of the GPU to plan for, such as 8GB.")] = None,
    card: Annotated[str | None, typer.Option(help="A card by its name or a part of it, such as 4070.")] = None,
    kind: Annotated[Device | None, typer.Option("--device", help="Plan for this machine's CPU or card.")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes, one a card, as torchrun or accelerate launch would start them for train.")
    ] = 1,
    bus: Annotated[
        float | None, typer.Option(min=0.1, max=10_000, help="GB a second to the card out of the computer's memory, for model.offload.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every recipe on cards of 6, 8, 10, 12, 16 and 24 GB.")] = False,
    as_json: Json = False,
) -> None:
    """Tell whether a recipe fits, and how long it takes.

    Also what takes the memory, and what to change if it doesn't fit. Nothing is downloaded but a few kB.
    """
    from iqlite.machine.fit import advice, choose, given_widths, streaming
    from iqlite.machine.memory import GIB, Work, waiting_outside
    from iqlite.machine.ranks import check_enough
    from iqlite.machine.timing import seconds_of_step, steps_of, streamed_bytes, typical_prompt
    from iqlite.recipe.reading import load_recipe

    console, overrides, device = terminal(stderr=as_json), overrides or [], kind.value if kind else None
    if everything and (vram or card or device or bus or processes > 1):
        raise RecipeError(
            "--all is about cards of six sizes: leave --vram, --card, --device, --bus and --processes out, or name one recipe."
        )
    if everything:
        _all(recipe_path or shipped_recipes(), overrides, as_json=as_json, console=console)
        return
    if recipe_path is None:
        raise RecipeError("name a recipe, such as: iqlite plan harmless-7b; or all shipped ones: iqlite plan --all")
    recipe = load_recipe(recipe_path, overrides)
    machine = _machine(vram, card, device)
    shape = shape_of(recipe.model.base, recipe.folder, recipe.model.revision)
    check_enough(recipe, processes)
    if machine.device == "cpu":  # they share its memory
        machine = replace(machine, free=machine.free / processes)
    step = Work.of(recipe, shape, machine.device)
    work = streaming(recipe, shape, step.of_one_among(processes), machine.free)
    made = choose(shape, work, machine.free, given_widths(recipe))
    changes, smaller = advice(shape, work, machine.free, given_widths(recipe))
    prompt = typical_prompt(recipe, work.prompt_tokens)
    rates = replace(machine.rates, bus=bus * 1e9) if machine.rates and bus else machine.rates
    seconds = seconds_of_step(shape, work, made.widths, rates, prompt) if rates else None
    steps = steps_of(recipe)
    fits = made.peak <= machine.free
    if as_json:
        found: dict[str, Any] = {
            "recipe": str(recipe_path), "machine": machine.name, "device": machine.device, "free_bytes": machine.free, "fits": fits,
            "peak_bytes": made.peak, "peak_phase": made.sets_the_peak, "stays_bytes": dict(made.stays),
            "phases_bytes": {phase: dict(terms) for phase, terms in made.phases.items()}, "widths": asdict(made.widths),
            "longest_tokens": work.longest, "changes": changes if not fits else [], "changed_peak_bytes": smaller.peak,
            "step_seconds": seconds, "steps": steps, "rates": rates.record() if rates else None,
            "processes": processes, "prompts_of_a_process": work.prompts,
            "streamed_layers": work.streamed, "pass_bytes": streamed_bytes(shape, work),
            "host_bytes": waiting_outside(shape, work) if work.streamed and machine.device == "cuda" else 0.0,
        }  # fmt: skip
        print(json.dumps(found))
        raise typer.Exit(0 if fits else 1)
    verdict = f"{made.peak / GIB:.2f} GiB at its peak, in the {made.sets_the_peak}, of {machine.free / GIB:.1f} GiB free: {machine.name}"
    console.print(f"[green]fits[/]: {clean(verdict)}" if fits else f"[bold yellow]doesn't fit[/]: {clean(verdict)}")
    console.print(_terms(recipe, made))
    told = {
        "base": f"{recipe.model.base}, {shape.parameters / 1e9:.2f} G weights ({recipe.model.quantization})",
        "at once": _widths(made, work),
        "lengths": f"prompts up to {work.prompt_tokens} tokens, answers up to {work.new_tokens}",
    }
    if processes > 1:
        told["processes"] = f"{processes}, each with a base of its own and {work.prompts} of a step's {step.prompts} prompts"
        if rates is not None and seconds is not None:  # decoding takes as many passes however few rows it has: prompts are what to add
            alone_step = streaming(recipe, shape, step, machine.free)
            alone = seconds_of_step(shape, alone_step, choose(shape, alone_step, machine.free, given_widths(recipe)).widths, rates, prompt)
            told["processes"] += (
                f": {alone / seconds:.1f} times as fast as one. With rollout.prompts_per_step = {processes * recipe.rollout.prompts_per_step} "
                f"a step takes about {_short(alone)} and has {processes} times the prompts"
            )
    if work.streamed:
        pass_gib = streamed_bytes(shape, work) / GIB
        told["offload"] = f"{work.streamed} of {shape.layers} layers come by when they are read, {pass_gib:.2f} GiB a pass of the weights"
        if machine.device == "cuda":
            told["offload"] += f"; needs about {waiting_outside(shape, work) / GIB:.0f} GiB of the computer's memory"
    if not fits:
        helps = f" → {smaller.peak / GIB:.2f} GiB" + ("" if smaller.peak <= machine.free else ", which doesn't fit either: a smaller base")
        told["change"] = (", then ".join(changes) or "nothing helps") + helps
    if seconds is not None and rates is not None:
        whole = f", {duration(seconds * steps)} for {steps} steps" if steps else ""
        at = f", {rates.bus / 1e9:g} GB/s to the card" if work.streamed else ""
        told["time"] = f"about {_short(seconds)} a step{whole}, with prompts of about {prompt} tokens (rates from {rates.source}{at})"
    else:
        told["time"] = "unknown: name the card with --card" if vram else "unknown until this machine was measured: iqlite bench"
    facts(console, told)
    raise typer.Exit(0 if fits else 1)


def _terms(recipe: Recipe, plan: Plan) -> Any:
    """Terms by phase, in GiB."""
    from iqlite.machine.memory import GIB, PHASES

    names = list(dict.fromkeys(term for phase in PHASES for term in plan.phases[phase]))
    rows = [[name, *[f"{size / GIB:.2f}"] * len(PHASES)] for name, size in plan.stays.items() if size]
    rows += [[name, *(f"{size / GIB:.2f}" if (size := plan.phases[phase].get(name)) else "" for phase in PHASES)] for name in names]
    rows.append(["peak", *(f"{plan.total(phase) / GIB:.2f}" for phase in PHASES)])
    return table(f"{escape(str(recipe.path))}: memory, GiB", ("term", *PHASES), rows)


def _widths(plan: Plan, work: Work) -> str:
    widths = plan.widths
    rows = min(widths.rows, work.answers)
    kept = "; decodes with float32 matrices" if widths.fold else ""
    return f"{rows} answer{'s' * (rows != 1)} decoded, {widths.read_tokens} tokens read, {widths.update_tokens} with a gradient, {widths.chunk_tokens} through the head{kept}"


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _all(folder: Path, overrides: Sequence[str], *, as_json: bool, console: Console) -> None:
    """Every recipe of a folder on every card size."""
    from iqlite.machine.fit import advice, choose, given_widths, streaming
    from iqlite.machine.memory import GIB, Work
    from iqlite.recipe.reading import load_recipe

    recipes = sorted(folder.glob("*.toml"))
    if not recipes:
        raise RecipeError(f"{folder} holds no recipes (.toml): name a folder that does.")
    rows, found = [], []
    for path in recipes:
        recipe = load_recipe(path, overrides)
        shape = shape_of(recipe.model.base, recipe.folder, recipe.model.revision)
        cells = []
        for size in SIZES_GB:
            free = FREE_OF_A_CARD * size * GIB
            work = streaming(recipe, shape, Work.of(recipe, shape, "cuda"), free)
            plan = choose(shape, work, free, given_widths(recipe))
            changes, smaller = advice(shape, work, free, given_widths(recipe))
            fits = plan.peak <= free
            changed = changes if not fits and smaller.peak <= free else []
            cells.append(f"{plan.peak / GIB:.1f}" if fits else f"{smaller.peak / GIB:.1f} *" if changed else "–")
            found.append(
                {
                    "recipe": str(path),
                    "card_gb": size,
                    "fits": fits,
                    "peak_bytes": plan.peak,
                    "changes": changed,
                    "widths": asdict(plan.widths),
                }
            )
        rows.append([escape(path.stem), *cells])
    if as_json:
        print(json.dumps(found))
        return
    console.print(table("peak memory in GiB by the card's size", ("recipe", *(f"{size} GB" for size in SIZES_GB)), rows))
    console.print(
        "* with changes that iqlite plan RECIPE --vram SIZE names; – not even then. 95 % of a card's memory is taken to be free.",
        markup=False,
    )


def _machine(vram: str | None, card: str | None, device: str | None) -> Machine:
    """What the options mean; without any, this machine."""
    from iqlite.machine.memory import GIB
    from iqlite.machine.timing import Rates, card_here, card_named, cards

    if (vram or card) and device == "cpu":
        raise RecipeError("--device cpu has no --vram or --card: leave them out, or plan for a card.")
    if card is not None:
        name = card_named(card)
        free = _size(vram) if vram else FREE_OF_A_CARD * cards()[name]["memory_gb"] * GIB
        return Machine("cuda", free, name, Rates.of_card(name))
    if vram is not None:
        return Machine("cuda", _size(vram), "a card", None)
    here = None if device == "cpu" else card_here()
    if here is not None:
        return Machine("cuda", here[1], here[0], Rates.here(here[0]))
    if device == "cuda":
        raise RecipeError("--device cuda: no card answers here (nvidia-smi); say which one is meant with --card or --vram.")
    import psutil

    memory = psutil.virtual_memory()
    return Machine("cpu", float(memory.available), f"this machine's CPU, {memory.total / GIB:.0f} GiB", Rates.measured("cpu"))


def _size(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS or float(found[1]) == 0:
        raise RecipeError(f"--vram {text!r} isn't a size: write it like 8GB, what the driver reports as free.")
    return float(found[1]) * UNITS[found[2].upper()]
