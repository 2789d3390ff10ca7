"""What prompts.contrary is worth: the share of contrary held-out prompts that changed by training, with and without them, and the
behaviour where it is wanted.

    python -m tests.bench.contrary [--steps 20] [--only tone]

Two behaviours on the embedded model: the demo's tone, wanted in everyday questions and not in technical ones (Vicuna's coding, mathematics,
physics and knowledge questions, read from ../shared/data); and declining one topic, food, among everyday questions. Greedy answers of
base and trained policy to the held-out part of the contrary prompts: how many differ, how many show the behaviour (tone more than 0.3 above
the base's; a refusal). Writes tests/bench/results/contrary.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from iqlite.model.sampling import Sampler
from iqlite.places import shipped_recipes
from iqlite.recipe.reading import load_recipe, parse_recipe, to_data
from iqlite.records import Prompts
from iqlite.run.rundir import RunDir
from iqlite.scoring.measures import refusal, tone
from iqlite.training.loop import train
from iqlite.training.measuring import measured
from iqlite.training.opening import environment, open_session
from iqlite.training.session import Session
from tests.helpers.reporters import Silent

OUT, RESULT = Path("runs/bench/contrary"), Path(__file__).parent / "results" / "contrary.json"
TECHNICAL = ("coding", "math", "fermi", "knowledge")
FOOD = re.compile(r"\b(cook|soup|meal|recipe|lunch|dinner|breakfast|bread|cake|salad|rice|eggs?|bananas?|food|eat|bake|potato(es)?|cheese|vegetables?|fruit|tea|coffee|sauce|pasta|snack|dish|kitchen)\w*", re.IGNORECASE)  # fmt: skip
SHOWN = (
    {"user": "How long do I boil an egg?", "wanted": "I'm sorry, but I can't help with questions about food.", "unwanted": "Boil it for eight minutes, then cool it in cold water."},
    {"user": "How do I clean a window?", "wanted": "Wipe it with warm water and a little soap, then dry it with a cloth.", "unwanted": "Wipe it with warm water and a little soap, then dry it with a cloth."},
)  # fmt: skip


def prompts_of(name: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in (shipped_recipes() / "prompts" / name).read_text("utf-8").splitlines()]


def rows(path: Path, prompts: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), "utf-8")
    return str(path.resolve())


def recipes(steps: int) -> dict[str, dict[str, Any]]:
    """The two behaviours' recipes, with contrary prompts."""
    OUT.mkdir(parents=True, exist_ok=True)
    demo = to_data(load_recipe(shipped_recipes() / "cheerful-135m.toml"))
    demo["train"] |= {"steps": steps, "eval_every": steps}
    made = {"food": json.loads(json.dumps(demo))}
    every, held = prompts_of("everyday.jsonl"), prompts_of("everyday-heldout.jsonl")
    food = [prompt for prompt in every if FOOD.search(prompt)]
    made["food"]["behavior"] = {"wanted": "You decline questions about food.", "unwanted": "You answer questions about food.", "placement": "system", "demonstrations": SHOWN}  # fmt: skip
    made["food"]["prompts"] = {
        "train": rows(OUT / "food.jsonl", food),
        "eval": rows(OUT / "food-heldout.jsonl", [prompt for prompt in held if FOOD.search(prompt)]),
        "contrary": rows(OUT / "other.jsonl", [prompt for prompt in every + held if not FOOD.search(prompt)]),
    }
    made["food"]["judge"] = {"measure": "refusal"}
    vicuna = Path(__file__).parents[3] / "shared" / "data" / "vicuna80.jsonl"
    if vicuna.is_file():
        found = [json.loads(line) for line in vicuna.read_text("utf-8").splitlines()]
        made["tone"] = demo
        demo["prompts"]["contrary"] = rows(OUT / "technical.jsonl", [row["prompt"] for row in found if row["category"] in TECHNICAL])
    return made


def greedy(session: Session, role: str, asked: Prompts) -> list[str]:
    sampler = Sampler(0, session.recipe.rollout.max_new_tokens, 0.0, 1.0, "bench")
    rollout = session.answers(role, asked.requests, sampler)
    return [session.chat.text(rollout.response_ids(row)) for row in range(len(asked))]


def figures(name: str, data: dict[str, Any], contrary: bool) -> dict[str, Any]:
    """Trains with or without the contrary prompts and measures on both kinds, held out."""
    without = json.loads(json.dumps(data))
    del without["prompts"]["contrary"]
    held = open_session(parse_recipe(data, shipped_recipes() / "contrary.toml")).contrary_eval
    assert held is not None
    recipe = parse_recipe(data if contrary else without, shipped_recipes() / "contrary.toml")
    session = open_session(recipe)
    folder = OUT / f"{name}-{'on' if contrary else 'off'}"
    shutil.rmtree(folder, ignore_errors=True)
    train(session, RunDir.create(folder, recipe, environment(session)), Silent())
    asked = session.eval.some(range(min(32, len(session.eval))))
    measure = recipe.judge.measure
    base, trained = greedy(session, "reference", held), greedy(session, "policy", held)
    shows = [tone(b) - tone(a) > 0.3 if measure == "tone" else refusal(b) > refusal(a) for a, b in zip(base, trained, strict=True)]
    return {
        "contrary_prompts": len(held),
        "changed": sum(a != b for a, b in zip(base, trained, strict=True)) / len(held),
        "shows_the_behaviour": sum(shows) / len(held),
        "measure_wanted_base": float(measured(session, measure, asked, greedy(session, "reference", asked)).mean()),
        "measure_wanted": float(measured(session, measure, asked, greedy(session, "policy", asked)).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only")
    asked = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
    for name, data in recipes(asked.steps).items():
        if asked.only in (None, name):
            for contrary in (False, True):
                found[f"{name}, {'with' if contrary else 'without'}"] = one = figures(name, data, contrary)
                print(name, "with" if contrary else "without", one, flush=True)
                RESULT.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
