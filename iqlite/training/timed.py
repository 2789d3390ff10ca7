"""Timed steps of this machine: seconds of each phase, the rates that they come from, and how long the shipped recipes take at these."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from iqlite.base.names import shape_of
from iqlite.base.shape import Shape
from iqlite.device import is_card, name_of, pinned, synchronize
from iqlite.machine.clock import Clock
from iqlite.machine.fit import choose, given_widths, streaming
from iqlite.machine.here import usable_memory
from iqlite.machine.memory import Widths, Work
from iqlite.machine.timing import Rates, seconds_of_step, steps_of, typical_prompt, work_of_step
from iqlite.places import cache_folder, shipped_recipes
from iqlite.recipe.reading import load_recipe
from iqlite.records import Rollout
from iqlite.training.optimizer import make_optimizer
from iqlite.training.order import prompts_of_step
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import update

PHASES = ("rollout", "read", "update")
STREAM_BYTES = {"cpu": 2**28, "cuda": 2**30}
BUS_BYTES = 2**28
RATE = 1e-6  # of the updates; their cost is what counts


def stream_rate(device: torch.device) -> float:
    """Bytes a second that a sum over a large array reads."""
    numbers = torch.ones(STREAM_BYTES["cuda" if is_card(device) else "cpu"] // 4, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        float(numbers.sum())
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best


def timed_steps(session: Session, steps: int, say: Callable[[str], None]) -> list[dict[str, float]]:
    """Seconds of the phases, response tokens and the mean prompt of each step after the warm-up."""
    recipe, measured = session.recipe, []
    optimizer = make_optimizer(session.policy, recipe.train.optimizer)
    for step in range(1, steps + 2):
        say(f"step {step} of {steps + 1}{' (warm-up)' if step == 1 else ''}")
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


def rates_of(session: Session, timed: dict[str, float]) -> Rates:
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
        machine_name(session.policy.device),
        bus=bus_rate(session.policy.device),
    )


def bus_rate(device: torch.device) -> float:
    """Bytes a second to a card out of the computer's memory, or on a CPU out of a file that memory doesn't hold."""
    if is_card(device):
        source, target = pinned(BUS_BYTES, device), torch.empty(BUS_BYTES, dtype=torch.uint8, device=device)
        target.copy_(source, non_blocking=True)
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(device)
        return BUS_BYTES / (time.perf_counter() - start)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache_folder()) as file:
        block = bytes(2**20)
        for _ in range(BUS_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # else the figure is of a file that memory holds
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(len(block)):
            pass
        return BUS_BYTES / (time.perf_counter() - start)


def machine_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else name_of(device)


def recipes_at(device: torch.device, rates: Rates) -> list[dict[str, Any]]:
    """Seconds a step and of the whole run for each shipped recipe, as far as it's known how many steps that is."""
    rows = []
    for path in sorted(shipped_recipes().glob("*.toml")):
        recipe = load_recipe(path)
        shape = shape_of(recipe.model.base, recipe.folder, recipe.model.revision)
        work = streaming(recipe, shape, Work.of(recipe, shape, device.type), usable_memory(device))
        widths = choose(shape, work, usable_memory(device), given_widths(recipe)).widths
        seconds = seconds_of_step(shape, work, widths, rates, typical_prompt(recipe, work.prompt_tokens))
        steps = steps_of(recipe)
        rows.append({"recipe": path.stem, "step_seconds": seconds, "steps": steps, "seconds": steps * seconds if steps else None})
    return rows
