"""The widest step that fits into free memory, and what to change, least harm first, where none does. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from iqlite.base.shape import Shape
from iqlite.machine.memory import GIB, MIB, Plan, Widths, Work, estimate
from iqlite.recipe.schema import Recipe

LEAST_CHUNK = 16
CHUNK_TENSOR = 30 * MIB  # glibc maps larger blocks anew each time, which costs a CPU what a wider chunk would gain
CPU_SHARE = 0.25  # of the free memory, what the float32 matrices for decoding may take
CAPS = {"cuda": Widths(256, 16384, 8192, 256), "cpu": Widths(64, 4096, 256, 48)}
"""Beyond these, width gains nothing (on a CPU it costs: few rows stay in its caches)."""


def choose(shape: Shape, work: Work, free: float, given: Widths | None = None) -> Plan:
    """The widest step whose peak stays within `free` bytes; where not even the narrowest does, that one. `given` wins where not 0."""
    cap, longest = CAPS[work.device], work.longest + work.description_tokens
    chunk = cap.chunk_tokens
    if work.device == "cpu":
        chunk = max(LEAST_CHUNK, min(chunk, int(CHUNK_TENSOR / (4 * shape.vocabulary)) // 8 * 8))
    fold = work.device == "cpu" and not work.streamed and 4 * shape.linear_weights <= CPU_SHARE * free
    start = Widths(cap.rows, cap.read_tokens, cap.update_tokens, chunk, fold)
    if given is not None:
        start = Widths(*(g or s for g, s in zip(vars(given).values(), vars(start).values(), strict=True)))
    narrowing: dict[str, tuple[tuple[str, int], ...]] = {
        "rollout": (("rows", 1),),
        "reading": (("read_tokens", longest),),
        "update": (("update_tokens", longest), ("chunk_tokens", LEAST_CHUNK)),  # a chunk fills what the widest layer leaves
    }
    narrow = start if given is not None and given.chunk_tokens else replace(start, chunk_tokens=min(chunk, 4 * LEAST_CHUNK))
    widths, full = narrow, replace(work, answers=cap.rows)  # a comparison may have more answers than a step
    for phase, steps in narrowing.items():
        for name, least in steps:
            if given is not None and getattr(given, name):
                continue

            def fits(size: int, phase: str = phase, name: str = name, widths: Widths = widths) -> bool:
                sized: dict[str, Any] = {name: size}
                return estimate(shape, full, replace(widths, **sized)).total(phase) <= free

            chosen: dict[str, Any] = {name: _widest(fits, least, getattr(start, name))}
            widths = replace(widths, **chosen)
    return estimate(shape, work, widths)


Change = tuple[str, Callable[[Work], Work]]
STREAM = 'model.offload = "auto"'
LEAST_HARM: tuple[Change, ...] = (
    ('model.embeddings = "host"', lambda work: replace(work, on_card=False)),
    ('train.checkpointing = "on"', lambda work: replace(work, checkpointing=True)),
    ('train.checkpointing = "offload"', lambda work: replace(work, checkpointing=True, offload=work.device == "cuda")),
    ('train.optimizer = "paged-adamw-8bit"', lambda work: replace(work, optimizer="paged-adamw-8bit")),
    ('superior.weights = "base"', lambda work: replace(work, ema=False)),
    ('model.quantization = "nf4"', lambda work: replace(work, quantization="nf4")),
    (STREAM, lambda work: work),
    ("prompts.max_tokens = 256", lambda work: replace(work, prompt_tokens=min(256, work.prompt_tokens))),
    ("rollout.max_new_tokens = 128", lambda work: replace(work, new_tokens=min(128, work.new_tokens))),
    ("adapter.rank = 8", lambda work: replace(work, rank=min(8, work.rank))),
)
"""What makes a recipe smaller, in the order of least harm: time, then what the averaged weights gain, then what is trained."""


def streaming(recipe: Recipe, shape: Shape, work: Work, free: float) -> Work:
    """The work as `model.offload` wants it done in so many free bytes."""
    return least_streaming(shape, work, free, given_widths(recipe)) if recipe.model.offload == "auto" else work


def least_streaming(shape: Shape, work: Work, free: float, given: Widths | None = None) -> Work:
    """The work streamed so that it fits in `free` bytes and the least is moved; all layers where nothing fits.

    Not with as few layers as fit at all: a layer more makes room for more answers at once, and every position of those pays for a pass.
    """
    least, chosen = math.inf, replace(work, streamed=0).streaming(shape.layers)
    for layers in range(shape.layers + 1) if work.device == "cuda" else (0, shape.layers):  # of a CPU's file the system keeps what it can
        tried = replace(work, streamed=0).streaming(layers)
        plan = choose(shape, tried, free, given)
        moved = layers * -(-work.prompts // plan.widths.rows)
        if plan.peak <= free and moved < least:
            least, chosen = moved, tried
        if least == 0:
            break
    return chosen


def given_widths(recipe: Recipe) -> Widths | None:
    """What a recipe sets itself, 0 where it leaves the choice to us; None if it sets nothing."""
    rows, tokens, chunk = (0 if n == "auto" else n for n in (recipe.rollout.batch, recipe.train.batch_tokens, recipe.train.chunk_tokens))
    return Widths(rows, tokens, tokens, chunk) if rows or tokens or chunk else None


def advice(shape: Shape, work: Work, free: float, given: Widths | None = None) -> tuple[list[str], Plan]:
    """(settings, plan): which changes make it fit, least harm first; all that help if even those don't suffice."""
    chosen: list[str] = []
    plan = choose(shape, work, free, given)
    for change, apply in ((("the widths at auto", lambda work: work),) if given else ()) + LEAST_HARM:
        if plan.peak <= free:
            break
        if (work.device == "cpu" and any(word in change for word in ("8bit", "host", "offload"))) or (shape.tied and "host" in change):
            continue
        smaller = apply(work)
        if change == STREAM or STREAM in chosen:
            smaller = least_streaming(shape, smaller, free)
        tried = choose(shape, smaller, free)
        if tried.peak < plan.peak:
            if "checkpointing" in change:  # offload takes the place of on
                chosen = [other for other in chosen if "checkpointing" not in other]
            chosen.append(change)
            work, plan = smaller, tried
    return chosen, plan


def refusal(recipe: Recipe, shape: Shape, work: Work, free: float) -> str | None:
    """One sentence for a recipe that doesn't fit, with what to change, least harm first; None if it fits."""
    plan = choose(shape, work, free, given_widths(recipe))
    if plan.peak <= free:
        return None
    changes, smaller = advice(shape, work, free, given_widths(recipe))
    where = "card" if work.device == "cuda" else "memory"
    said = f"{recipe.path} needs {plan.peak / GIB:.1f} GiB and {free / GIB:.1f} GiB of this machine's {where} are free"
    if smaller.peak <= free:
        return f"{said}; {' and '.join(changes)} would make it {smaller.peak / GIB:.1f} GiB (see iqlite plan), or go on all the same with --force --out NEW."
    return f"{said}; no setting makes it fit (the least is {smaller.peak / GIB:.1f} GiB): choose a smaller base, or go on all the same with --force --out NEW."


def _widest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest size from `least` to `most` that fits; `least` if none does. Below `least` there is nothing to gain."""
    if most <= least or fits(most):
        return most
    low = least
    while most - low > max(1, low // 16):
        middle = (low + most) // 2
        low, most = (middle, most) if fits(middle) else (low, middle)
    return low
