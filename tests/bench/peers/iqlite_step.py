"""iqlite's own step with the peers' command line, clock and memory gauge: answers, readings and update as in iqlite.training.loop, nothing else.

    python -m tests.bench.peers.iqlite_step --model DIR --prompts recipes/prompts/everyday.jsonl

Everything the command line doesn't set is the demo's recipe, with the description in the user turn. The last line is one JSON object:
seconds per step (median), tokens per second, memory, and the median seconds of each phase.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from iqlite.machine.clock import Clock
from iqlite.recipe.reading import load_recipe
from iqlite.recipe.schema import Recipe
from iqlite.training.opening import open_session
from iqlite.training.optimizer import make_optimizer
from iqlite.training.order import prompts_of_step
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import update
from tests.bench.peers.common import MIB, Gauge, parse, parser, settle

RECIPE = Path("recipes/cheerful-135m.toml")
PHASES = ("rollout", "read", "update")


def recipe_for(args: argparse.Namespace) -> Recipe:
    """The demo's recipe with what the command line says, at a constant rate."""
    settings = {
        "behavior.placement": "user",
        "model.base": args.model,
        "model.quantization": args.quantization,
        "prompts.train": str(args.prompts.resolve()),
        "adapter.rank": args.rank,
        "adapter.alpha": 2 * args.rank,
        "rollout.prompts_per_step": args.batch,
        "rollout.max_new_tokens": args.new_tokens,
        "train.learning_rate": args.lr,
        "train.schedule": "constant",
        "train.warmup": 0.0,
        "train.steps": args.steps,
        "train.seed": args.seed,
        "train.checkpointing": "on" if args.checkpointing else "off",
    }
    if args.objective is not None:
        settings["objective.name"] = args.objective
    if args.wanted is not None:
        settings["behavior.wanted"] = args.wanted
    return load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def train(session: Session, steps: int, rate: float) -> list[dict[str, float]]:
    """Seconds of each phase and response tokens, for every step."""
    recipe, measured = session.recipe, []
    optimizer = make_optimizer(session.policy, recipe.train.optimizer)
    for step in range(1, steps + 1):
        clock = Clock(session.policy.device)
        chosen = prompts_of_step(session.train, step, recipe.rollout.prompts_per_step, recipe.train.seed)
        rollout = session.answers("policy", [session.train.requests[i] for i in chosen], session.sampler("train"), step=step, index=chosen)
        clock.lap("rollout")
        scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
        clock.lap("read")
        _, norm = update(session, optimizer, rollout, scores, rate)
        clock.lap("update")
        assert math.isfinite(norm), f"step {step}: the gradient isn't finite"
        measured.append({name: clock.laps[f"time/{name}_s"] for name in PHASES} | {"tokens": int(rollout.mask_BT.sum())})
    return measured


def main() -> None:
    options = parser(__doc__, "runs/bench/iqlite-step")
    options.add_argument("--wanted", help="description of the wanted behaviour; the recipe's if left out")
    options.add_argument("--objective", help="the recipe's if left out")
    options.add_argument("--save", action="store_true", help="save the adapter into --out")
    args = parse(options)
    session = open_session(recipe_for(args))
    settle(session.policy.model)
    with Gauge() as gauge:
        measured = train(session, args.steps, args.lr)
    if args.save:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        session.policy.save_adapter(Path(args.out))
    timed = measured[1:]  # the first is the warm-up
    seconds, tokens = [sum(row[name] for name in PHASES) for row in timed], [row["tokens"] for row in timed]
    result = {
        "peer": f"iqlite {session.recipe.objective.name}",
        "steps": args.steps,
        "seconds_per_step": round(statistics.median(seconds), 3),
        "response_tokens_per_second": round(sum(tokens) / sum(seconds), 2),
        "mean_response_tokens": round(statistics.fmean(tokens) / args.batch, 1),
        "loaded_mib": round(gauge.loaded / MIB),
        "peak_mib": round(gauge.peak / MIB),
        "growth_mib": round((gauge.peak - gauge.loaded) / MIB),
        "phases_s": {name: round(statistics.median(row[name] for row in timed), 3) for name in PHASES},
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
