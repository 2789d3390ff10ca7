"""What a look before training says, and costs: every shipped recipe on the embedded model as it is, with its descriptions swapped, the same
twice, and nonsense, at several sampling seeds.

    python -m tests.bench.aim [--seeds 3] [--only cheerful-135m]

Recipes whose prompts are on the hub take local ones of the same data set from ../shared/data (they are skipped where that is missing).
Writes tests/bench/results/aim.json; a line a look as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ["IQLITE_CACHE"] = os.environ.get("IQLITE_CACHE", tempfile.mkdtemp(prefix="iqlite-"))  # what is kept would cost nothing

from iqlite.aim.look import Look, look, signed
from iqlite.base.names import EMBEDDED
from iqlite.places import shipped_recipes
from iqlite.recipe.reading import load_recipe, parse_recipe, to_data
from iqlite.recipe.schema import Recipe
from iqlite.training.opening import open_session
from iqlite.training.order import prompts_and_contrary
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import update

RESULT = Path(__file__).parent / "results" / "aim.json"
SHARED = Path(__file__).parents[3] / "shared" / "data"
LOCAL = [str(SHARED / "hh_harmless_first_turns.jsonl"), str(SHARED / "harmfulqa.jsonl")]
NONSENSE = ("The green lamp of seven rivers sleeps above a spoon.", "The brown clock of nine ladders walks below a glove.")
SAME = ("harmless-13b",)  # as harmless-7b word for word, on another base
LONGEST_NEW = 48  # tokens of an answer in a timed step, where a recipe asks for more: a laptop's patience


def on_embedded(name: str) -> Recipe | None:
    """A shipped recipe on the embedded model; None where its prompts can't be had here."""
    path = shipped_recipes() / f"{name}.toml"
    data = to_data(load_recipe(path))
    data["model"]["base"] = EMBEDDED
    data["rollout"]["max_new_tokens"] = min(LONGEST_NEW, data["rollout"]["max_new_tokens"])
    if not isinstance(data["prompts"]["train"], str):
        if not all(Path(one).is_file() for one in LOCAL):
            return None
        data["prompts"]["train"] = LOCAL
    return parse_recipe(data, path)


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """As it is, swapped, the wanted side twice, nonsense. The second and third are made behind the recipe's own checks."""

    def changed(one: Any, how: str) -> Any:
        wanted, unwanted = {"swapped": (one.unwanted, one.wanted), "same twice": (one.wanted, one.wanted), "nonsense": NONSENSE}[how]
        shown = () if how == "nonsense" else tuple(
            d.model_copy(update={"wanted": d.unwanted, "unwanted": d.wanted} if how == "swapped" else {"unwanted": d.wanted}) for d in one.demonstrations
        )  # fmt: skip
        return one.model_copy(update={"wanted": wanted, "unwanted": unwanted, "demonstrations": shown})

    made = {"as it is": recipe}
    for how in ("swapped", "same twice", "nonsense"):
        mixture = tuple(changed(p, how) for p in recipe.behavior.mixture)
        behavior = recipe.behavior.model_copy(update={"mixture": mixture}) if mixture else changed(recipe.behavior, how)
        made[how] = recipe.model_copy(update={"behavior": behavior})
    return made


def seconds_of_a_step(session: Session) -> float:
    """One training step without its evaluation, as `train` makes it, after one answer to warm up."""
    session.answers("policy", session.train.requests[:1], replace(session.sampler("warm"), max_new_tokens=4))
    began = time.perf_counter()
    prompts, numbers, contrary = prompts_and_contrary(session, 1)
    rollout = replace(session.answers("policy", prompts, session.sampler("train"), step=1, index=numbers), contrary=contrary)
    scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
    from iqlite.training.optimizer import make_optimizer

    update(session, make_optimizer(session.policy, session.recipe.train.optimizer), rollout, scores, 0.0)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only")
    asked = parser.parse_args()
    names = [asked.only] if asked.only else sorted(p.stem for p in shipped_recipes().glob("*.toml") if p.stem not in SAME)
    found: dict[str, Any] = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
    for name in names:
        recipe = on_embedded(name)
        if recipe is None:
            print(f"{name}: skipped, its prompts aren't here")
            continue
        session = open_session(recipe)
        step = seconds_of_a_step(session)
        found[name] = {"step_s": step, "measure": recipe.judge.measure, "looks": []}
        for how, changed in variants(recipe).items():
            for seed in range(asked.seeds):
                session.policy.forward.forget_prefixes()
                one: Look = look(replace(session, recipe=changed), seed=seed)
                found[name]["looks"].append({"how": how, "seed": seed, **asdict(one)})
                print(
                    f"{name}, {how}, seed {seed}: {one.verdict}, {signed(one.difference)}; {one.seconds:.0f} s, a step {step:.0f} s",
                    flush=True,
                )
        RESULT.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
