"""`plan` beside a played card: peaks of each phase at the widths that it chooses, for the shipped recipes on cards of 6 to 24 GB.

    python -m tests.bench.plan_play [--only harmless-7b …] [--gb 8 …] [--whole] [--out FOLDER]
    python -m tests.bench.plan_play --larger    # instead the models of docs/memory.md that are larger than their card: layers are streamed, all are played

No numbers and no card: shapes only (tests/card). Two and three layers are played, each on a card with as much memory as `plan` says that so many
need, and all layers are reckoned from these, since each adds as much as the one before; --whole plays all of them. Writes plan_play.json
and plan_play.md; what was played before stays there.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

from iqlite.base.shape import Shape
from iqlite.machine.memory import GIB, PHASES, estimate
from iqlite.recipe.reading import load_recipe
from tests.card.shapes import FREE, Played, config_of, of_context, planned_for, play

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = [path.stem for path in sorted(RECIPES.glob("*.toml")) if "135m" not in tomllib.loads(path.read_text("utf-8"))["model"]["base"]]
FEW = (2, 3)
LARGER = (("meta-llama/Llama-3.1-8B-Instruct", 4.0), ("meta-llama/Llama-2-13b-chat-hf", 6.0), ("Qwen/Qwen2.5-32B-Instruct", 12.0))
STREAMED = ("model.offload=auto", "model.embeddings=host")


def cell(name: str, gb: float, *, whole: bool, base: str = "") -> dict[str, Any]:
    """A recipe on a card of that size: GiB by phase, without the driver's context and what bitsandbytes keeps in pages. With `base`, that
    model in the recipe's place, streamed as far as it must be."""
    path, settings = RECIPES / f"{name}.toml", STREAMED if base else ()
    recipe = load_recipe(path, list(settings))
    base = base or recipe.model.base
    work, plan = planned_for(recipe, base, gb)
    shown = f"{base.rpartition('/')[2]}, {work.streamed} layers streamed" if settings else name
    found: dict[str, Any] = {"recipe": shown, "gb": gb, "whole": whole, "fits": plan.peak <= FREE * gb * GIB, "widths": vars(plan.widths)}
    if not found["fits"]:
        return found
    plays = [play(path, gb, *settings, base=base, layers=layers) for layers in ((0,) if whole else FEW)]
    allocated = [{peak.phase: peak.allocated for peak in played.peaks} for played in plays]
    shape = Shape.of(config_of(base), base)
    planned, last = of_context(estimate(shape, work, plan.widths)), plays[-1]
    pages = last.paged * (1 if whole else shape.layers / FEW[-1])
    found["phases"] = {
        phase: {
            "plan": (planned[phase] - pages) / GIB,
            "played": (at[phase] if whole else at[phase] + (shape.layers - FEW[-1]) * (at[phase] - allocated[0][phase])) / GIB,
            "reserved beyond": (_of(last, phase).reserved - _of(last, phase).allocated) / GIB,
        }
        for phase in PHASES
        for at in allocated[-1:]
    }
    found["full"], found["retries"] = max(played.full for played in plays), max(played.retries for played in plays)
    return found


def _of(played: Played, phase: str) -> Any:
    return next(peak for peak in played.peaks if peak.phase == phase)


def markdown(record: list[dict[str, Any]]) -> str:
    """A row a recipe, size and phase."""
    lines = [
        "| recipe | GB | layers | phase | plan, GiB | played, GiB | plan's error, % | reserved beyond, GiB | memory full |",
        "|" + " --- |" * 9,
    ]
    for one in sorted(record, key=lambda one: (one["recipe"], one["gb"], one["whole"])):
        for phase, row in one.get("phases", {}).items():
            depth, error = "all" if one["whole"] else " and ".join(map(str, FEW)), 100 * (row["plan"] / row["played"] - 1)
            lines.append(
                f"| {one['recipe']} | {one['gb']:g} | {depth} | {phase} | {row['plan']:.2f} | {row['played']:.2f} | {error:+.1f} | {row['reserved beyond']:.2f} | {one['full']} |"
            )
        if not one["fits"]:
            lines.append(f"| {one['recipe']} | {one['gb']:g} | | doesn't fit | | | | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--gb", nargs="+", type=float, default=[6, 8, 12, 24])
    parser.add_argument("--whole", action="store_true", help="all layers")
    parser.add_argument("--out", type=Path, default=Path("tests/bench/results"))
    parser.add_argument("--larger", action="store_true", help="models larger than their card")
    args = parser.parse_args()
    file = args.out / "plan_play.json"
    cells = [("harmless-7b", gb, base) for base, gb in LARGER] if args.larger else [(name, gb, "") for name in args.only for gb in args.gb]
    for name, gb, base in cells:
        found = cell(name, gb, whole=args.whole or args.larger, base=base)
        print(json.dumps(found), flush=True)
        record = json.loads(file.read_text("utf-8")) if file.exists() else []
        record = [one for one in record if any(one[key] != found[key] for key in ("recipe", "gb", "whole"))] + [found]
        file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        (args.out / "plan_play.md").write_text(markdown(record), "utf-8")


if __name__ == "__main__":
    main()
