"""Every estimator × every objective, five steps on the embedded model: does KL(policy‖superior) on fixed held-out responses fall?

    python -m tests.bench.pairs

The held-out responses are sampled once from the base and stay the same, so that before and after differ by the policy alone. The `adapter`
estimator reads an adapter that this script trains first (`prompted`, ten steps). One line a pair; writes runs/bench/pairs.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from iqlite.method.estimators import ESTIMATORS
from iqlite.method.objectives import OBJECTIVES
from iqlite.recipe.reading import load_recipe, parse_recipe, to_data
from iqlite.recipe.schema import Recipe
from iqlite.run.rundir import RunDir
from iqlite.training.loop import train
from iqlite.training.opening import environment, open_session
from iqlite.training.session import Session
from tests.helpers.reporters import Silent

OUT = Path("runs/bench/pairs")
HELD_OUT = 8
MIXTURE = (
    {"name": "cheerful", "weight": 0.7, "wanted": "You always answer in a warm, cheerful and encouraging tone.", "unwanted": "You always answer in a cold, gloomy and discouraging tone."},
    {"name": "concise", "weight": 0.3, "wanted": "You answer in one short sentence.", "unwanted": "You answer at great length, with many details and examples."},
)  # fmt: skip


def recipe_for(base: Recipe, estimator: str, objective: str, adapter: Path, steps: int) -> Recipe:
    """The demo's recipe with another estimator and objective, cut to a few short steps."""
    data = to_data(base)
    data["superior"] = {"estimator": estimator} | ({"adapter": str(adapter.resolve())} if estimator == "adapter" else {})
    data["objective"] = {"name": objective}
    data["behavior"]["placement"] = "user"
    if estimator == "mixture":
        data["behavior"] = {"placement": "user", "mixture": list(MIXTURE)}
    data["rollout"] |= {"prompts_per_step": 4, "max_new_tokens": 16}
    data["train"] |= {"steps": steps, "eval_every": 1000, "checkpoint_every": 1000, "schedule": "constant"}
    data["prompts"]["eval_count"] = 1
    return parse_recipe(data, base.path)


def train_pair(recipe: Recipe, out: Path) -> tuple[float, float]:
    """(KL before, KL after) on fixed responses of the base."""
    session: Session = open_session(recipe)
    fixed = session.answers("reference", session.eval.requests[:HELD_OUT], session.sampler("fixed"))
    before = session.score(fixed, weights="base").means()["kl/policy_superior"]
    shutil.rmtree(out, ignore_errors=True)
    train(session, RunDir.create(out, recipe, environment(session)), Silent())
    return before, session.score(fixed, weights="base").means()["kl/policy_superior"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/cheerful-135m.toml"))
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    base, adapter = load_recipe(args.recipe), OUT / "teacher" / "adapter"
    results = json.loads((OUT / "pairs.json").read_text()) if (OUT / "pairs.json").exists() else {}
    if not adapter.exists():
        train_pair(recipe_for(base, "prompted", "full-kl", adapter, 10), OUT / "teacher")
    for estimator in ESTIMATORS:
        for objective in OBJECTIVES:
            pair = f"{estimator} × {objective}"
            if pair not in results:
                results[pair] = train_pair(recipe_for(base, estimator, objective, adapter, args.steps), OUT / "run")
                (OUT / "pairs.json").write_text(json.dumps(results, indent=1), "utf-8")
            before, after = results[pair]
            print(f"{pair:32} KL {before:.4f} → {after:.4f}  {'falls' if after < before else 'DOES NOT FALL'}", flush=True)


if __name__ == "__main__":
    main()
