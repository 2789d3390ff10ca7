"""speed.json → speed.md, one table: python -m tests.bench.speed_table runs/bench/speed/speed.json prints it again."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = tuple[str, str, str, str, str]
PEERS = {"sdft": "TRL SDFT", "distill": "TRL DistillationTrainer", "grpo": "TRL GRPO"}
WORK = {
    "sdft": "iqlite reads 3 times, SDFT once",
    "distill": "iqlite reads 3 times, DistillationTrainer once",
    "grpo": "iqlite reads 3 times, GRPO never; GRPO answers half the prompts twice",
}
HIGHER, LOWER = "higher is better", "lower is better"


def markdown(record: dict[str, Any]) -> str:
    """What was measured, on what, as one Markdown table."""
    rows: list[Row] = []
    for part, rows_of in TABLES.items():
        if part in record:
            rows += rows_of(record[part])
            if "failed" in record[part]:
                rows.append((part, "", "", "", f"failed: {record[part]['failed']}"))
    head = [("what", "iqlite", "other", "ratio, median (min..max)", "note"), ("---",) * 5]
    machines = "\n".join(dict.fromkeys(describe(part["machine"]) for part in record.values()))
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in [*head, *rows]) + f"\n\n{machines}\n"


def describe(machine: dict[str, Any]) -> str:
    where = machine["card"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    return f"{where}; {machine['compute_dtype']} compute; Python {machine['python']}, {versions}"


def number(value: float) -> str:
    """Three significant digits, or the whole part."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def spread(values: Sequence[float]) -> str:
    """median (min..max)."""
    found = [value for value in values if math.isfinite(value)]
    return f"{number(statistics.median(found))} ({number(min(found))}..{number(max(found))})" if found else "–"


def compared(what: str, pairs: Sequence[tuple[float, float]], note: str, unit: str = "") -> Row:
    """The row of (iqlite's, the other's) figures, one pair for each repetition."""
    mine, other = (number(statistics.median(column)) + unit for column in zip(*pairs, strict=True))
    return what, mine, other, spread([a / b if b > 0 else math.nan for a, b in pairs]), note


def steps_rows(part: dict[str, Any]) -> list[Row]:
    rows = []
    size = f"{part['settings']['batch']} × {part['settings']['new_tokens']} tokens"
    for quantization, runs in part["runs"].items():
        for peer, name in PEERS.items() if runs else ():
            if peer not in runs[0]:  # a record from before it was a peer
                continue
            for key, what, unit, better in (
                ("response_tokens_per_second", "response tokens a second", "", HIGHER),
                ("growth_mib", "memory growth", " MiB", LOWER),
            ):
                pairs = [(run["iqlite"][key], run[peer][key]) for run in runs]
                rows.append(compared(f"step, {quantization}, against {name}: {what}", pairs, f"{better}; {size}; {WORK[peer]}", unit))
    return rows


def rollout_rows(part: dict[str, Any]) -> list[Row]:
    rows = []
    for quantization, by_batch in part["runs"].items():
        for batch, runs in by_batch.items():
            pairs = [tuple(run[side]["tokens"] / run[side]["seconds"] for side in ("iqlite", "generate")) for run in runs]
            what = f"rollout, {quantization}, batch {batch}, against generate(): tokens a second"
            rows.append(compared(what, pairs, f"{HIGHER}; {part['settings']['new_tokens']} tokens each"))
    return rows


def loss_rows(part: dict[str, Any]) -> list[Row]:
    runs = part["runs"].get("pairs", [])
    if not runs:
        return []
    n, vocabulary, width = part["settings"]["shape"]
    apart = max(abs(run["chunked"]["loss"] / run["plain"]["loss"] - 1) for run in runs)
    note = f"{LOWER}; n = {n}, V = {vocabulary}, D = {width}, chunks of {runs[0]['chunked']['chunk_tokens']}; losses differ by {apart:.0e}"
    return [
        compared(f"loss, against all logits at once: {what}", [(run["chunked"][key], run["plain"][key]) for run in runs], note, unit)
        for key, what, unit in (("extra_mib", "extra memory", " MiB"), ("seconds", "forward and backward", " s"))
    ]


def growth_rows(part: dict[str, Any]) -> list[Row]:
    rows = []
    for axis, what in (("tokens", "longest response"), ("prompts", "prompts")):
        for key, figure, unit in (("seconds_per_step", "time", " s"), ("growth_mib", "memory growth", " MiB")):
            lines = [[(one["prompts"] * one["mean_response_tokens"], one[key]) for one in run] for run in part["runs"].get(axis, [])]
            if not lines:
                continue
            first, last = ([line[at] for line in lines] for at in (0, -1))
            from_to = " → ".join(number(statistics.median(y for _, y in points)) + unit for points in (first, last))
            ends = " → ".join(f"{statistics.median(x for x, _ in points):.0f}" for points in (first, last))
            a, b = (statistics.median(column) for column in zip(*map(straight, lines), strict=True))
            note = f"exponent k of tokens^k; {ends} response tokens; {a:.3g} + {b:.3g}·tokens{unit}; {part['settings']['quantization']}"
            rows.append((f"step: {figure} as {what} doubles", from_to, "", spread([exponent(line) for line in lines]), note))
    return rows


def straight(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of y = a + b·x by least squares."""
    if len({x for x, _ in points}) < 2:
        return math.nan, math.nan
    x_n, y_n = np.array(points).T
    b, a = np.polyfit(x_n, y_n, 1)
    return float(a), float(b)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """k of y = a·x^k by least squares on logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    return straight(logs)[1]


def tone_rows(part: dict[str, Any]) -> list[Row]:
    runs, rows = part["runs"].get("sides", []), []
    steps = part["settings"]["steps"]
    for side in ("full-kl", "squared") if runs else ():

        def pairs(figure: Callable[[dict[str, Any]], float], side: str = side) -> list[tuple[float, float]]:
            return [(figure(run[side]), figure(run["sdft"])) for run in runs]

        base = part["runs"]["base"]["tone"]

        def minutes(run: dict[str, Any]) -> float:
            return float(steps * run["seconds_per_step"] / 60)

        def gained(run: dict[str, Any], base: float = base) -> float:
            return float((run["tone"] - base) / minutes(run))

        error = max(run[name]["standard_error"] for run in runs for name in (side, "sdft"))
        what = f"{side} against TRL SDFT, {steps} steps"
        rows.append(compared(f"{what}: tone", pairs(lambda run: run["tone"]), f"{HIGHER}; base {base:.2f}, standard error {error:.2f}"))
        rows.append(compared(f"{what}: minutes", pairs(minutes), f"{LOWER}; training only"))
        rows.append(compared(f"{what}: tone gained a minute", pairs(gained), f"{HIGHER}; no ratio where SDFT gains nothing"))
    return rows


TABLES: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "steps": steps_rows,
    "rollout": rollout_rows,
    "loss": loss_rows,
    "growth": growth_rows,
    "tone": tone_rows,
}

if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text("utf-8"))), end="")
