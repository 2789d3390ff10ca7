"""Tone of a model's answers to the demo's held-out prompts without any description: mean VADER compound, −1 to 1.

    python -m tests.bench.speed_tone --model DIR [--adapter FOLDER]

Temperature 0.7 and top-p 0.9, as `iqlite compare`. Without an adapter the base answers. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from iqlite.model.sampling import Sampler
from iqlite.recipe.reading import load_recipe
from iqlite.scoring.measures import tone
from iqlite.training.opening import open_session

RECIPE = Path("recipes/cheerful-135m.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the base model, Hugging Face format")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--quantization", choices=["none", "nf4"], default="nf4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--prompts", type=int, help="only the first so many")
    args = parser.parse_args()
    settings = [f"model.base={json.dumps(args.model)}", f"model.quantization={args.quantization}", "behavior.placement=user"]
    recipe = load_recipe(RECIPE, settings)
    session = open_session(recipe, start=args.adapter)
    tones = []
    for seed in args.seeds:
        sampler = Sampler(seed, recipe.rollout.max_new_tokens, 0.7, 0.9, "compare")
        rollout = session.answers("policy" if args.adapter else "reference", session.eval.requests[: args.prompts], sampler)
        tones.append([tone(session.chat.text(rollout.response_ids(row))) for row in range(len(rollout.index))])
    by_prompt = [statistics.fmean(column) for column in zip(*tones, strict=True)]
    error = statistics.stdev(by_prompt) / len(by_prompt) ** 0.5 if len(by_prompt) > 1 else 0.0
    print(json.dumps({"tone": round(statistics.fmean(by_prompt), 4), "standard_error": round(error, 4), "answers": len(by_prompt)}))


if __name__ == "__main__":
    main()
