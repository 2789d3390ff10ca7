"""`iqlite bench`: how fast this machine is, phase by phase, on the embedded model, and so how long each recipe takes."""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from iqlite.base.architectures import Shape
from iqlite.errors import RunError
from iqlite.machine.fit import choose, given_widths
from iqlite.machine.memory import Widths, Work, shape_of
from iqlite.machine.sizes import within_memory
from iqlite.machine.timing import BENCH_FILE, Rates, seconds_of_step, steps_of, typical_prompt, work_of_step
from iqlite.places import cache_folder, shipped_recipes
from iqlite.recipe.schema import load_recipe
from iqlite.records import Rollout
from iqlite.terminal import duration, facts, table
from iqlite.training.loop import Clock, peak_gib, prompts_of_step
from iqlite.training.optimizer import make_optimizer
from iqlite.training.readings import read
from iqlite.training.session import Session, free_memory, open_session
from iqlite.training.update import update

RECIPE = "cheerful-135m.toml"
PHASES = ("rollout", "read", "update")
STREAM_BYTES = {"cpu": 2**28, "cuda": 2**30}
RATE = 1e-6  # of the updates; their cost is what counts


def run(recipe_path: Path | None, *, steps: int, as_json: bool, console: Console) -> int:
    """Measures a recipe's first steps after a warm-up, writes bench.json into the cache folder; returns the exit code."""
    recipe = load_recipe(recipe_path or shipped_recipes() / RECIPE, [] if recipe_path else ["behavior.placement=user"])
    with within_memory(recipe, "in a recipe of your own"):
        session = open_session(recipe, say=lambda text: console.print(f"[dim]{text}[/]"))
        measured = _steps(session, steps, console)
    timed = {name: statistics.median(row[name] for row in measured) for name in (*PHASES, "tokens", "prompt")}
    device = session.policy.device
    peak = peak_gib(device)
    stream = stream_rate(device)
    rates = _rates(session, timed)
    minutes = _recipes(device, rates)
    found: dict[str, Any] = {
        "machine": _machine(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
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
        return 0
    phases = [[name, f"{timed[name]:.2f}", f"{timed['tokens'] / timed[name]:.1f}"] for name in PHASES]
    console.print(table(f"{found['base']} on {found['machine']}", ("phase", "seconds", "response tokens/s"), phases))
    shown = [[row["recipe"], duration(row["step_seconds"]), duration(row["seconds"]) if row["seconds"] else "?"] for row in minutes]
    console.print(table("about how long recipes take here", ("recipe", "a step", "all steps"), shown))
    share = f"{rates.decode / 1e9:.1f} GB/s, {100 * found['bandwidth_share']:.0f} % of the {stream / 1e9:.1f} GB/s that memory gives"
    facts(console, {"peak": f"{found['peak_gib']:.2f} GiB", "decoding reads": share, "written": f"{file} (iqlite plan uses it)"})
    return 0


def stream_rate(device: torch.device) -> float:
    """Bytes a second that a sum over a large array reads."""
    numbers = torch.ones(STREAM_BYTES[device.type] // 4, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        float(numbers.sum())
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best


def _steps(session: Session, steps: int, console: Console) -> list[dict[str, float]]:
    """Seconds of the phases, response tokens and the mean prompt of each step after the warm-up."""
    recipe, measured = session.recipe, []
    optimizer = make_optimizer(session.policy, recipe.train.optimizer)
    for step in range(1, steps + 2):
        console.print(f"[dim]step {step} of {steps + 1}{' (warm-up)' if step == 1 else ''}[/]")
        clock = Clock(session.policy.device)
        chosen = prompts_of_step(session.train, step, recipe.rollout.prompts_per_step, recipe.train.seed)
        requests = [session.train.requests[i] for i in chosen]
        rollout: Rollout = session.answers("policy", requests, session.sampler("train"), step=step, index=chosen)
        clock.lap("rollout")
        scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
        clock.lap("read")
        update(session, optimizer, rollout, scores, RATE)
        clock.lap("update")
        row = {name: clock.laps[f"time/{name}_s"] for name in PHASES}
        measured.append(row | {"tokens": float(rollout.mask_BT.sum()), "prompt": statistics.fmean(map(len, rollout.prompt_ids))})
    return measured[1:]


def _rates(session: Session, timed: dict[str, float]) -> Rates:
    """Rates that give the measured seconds back for the work that the timing model counts."""
    recipe, base = session.recipe, session.policy.base
    shape = Shape.of(base.model.config.to_dict(), base.name)
    work = Work.of(recipe, shape, session.policy.device.type)
    sizes = session.sizes
    rows = sizes.together(round(timed["prompt"]) + work.new_tokens)
    widths = Widths(rows, sizes.read_tokens, sizes.update_tokens, sizes.chunk_tokens, sizes.fold)
    needed = work_of_step(shape, work, widths, round(timed["prompt"]))
    return Rates(
        needed["decode"] / timed["rollout"],
        needed["read"] / timed["read"],
        needed["update"] / timed["update"],
        "iqlite bench",
        _machine(session.policy.device),
    )


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _recipes(device: torch.device, rates: Rates) -> list[dict[str, Any]]:
    """Seconds a step and of the whole run for each shipped recipe, as far as it's known how many steps that is."""
    rows = []
    for path in sorted(shipped_recipes().glob("*.toml")):
        recipe = load_recipe(path)
        shape = shape_of(recipe.model.base, recipe.folder, recipe.model.revision)
        work = Work.of(recipe, shape, device.type)
        widths = choose(shape, work, free_memory(device), given_widths(recipe)).widths
        seconds = seconds_of_step(shape, work, widths, rates, typical_prompt(recipe, work.prompt_tokens))
        steps = steps_of(recipe)
        rows.append({"recipe": path.stem, "step_seconds": seconds, "steps": steps, "seconds": steps * seconds if steps else None})
    return rows
