"""The strongest form of each rival: SDFT at its divergences and rates, RLOO and GRPO on METHOD's sequence reward (7), on the demo's task.

    python -m tests.bench.rivals sdft [--alphas 0 0.5 1] [--rates 0.333 1 3] [--seeds 0 1 2] [--steps 20]
    python -m tests.bench.rivals rloo grpo [--groups 2 4] [--rates 0.333 1 3] [--steps 20]

Base, prompts, adapter shape, optimizer, schedule, sampling and answers a step are those of the recipe (as in `iqlite compare --with`); `--rates`
multiply its learning rate. α = 0 is forward KL, 1 reverse KL. RLOO's and GRPO's reward is R(y) = β·Σ_t log(π̃/π_ref), their KL weight β, the step's answers
split into groups of the same prompt. Tone: 24 held-out answers at temperature 1. A folder a variant under runs/bench/rivals: goes on where it
was interrupted; the table has every variant that is there.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from iqlite.base.loading import Base
from iqlite.baselines import trl_trainers
from iqlite.baselines.ppo import token_logps
from iqlite.evaluation.curves import of_baseline, until
from iqlite.recipe.reading import load_recipe
from iqlite.recipe.schema import Recipe
from iqlite.records import Rollout
from iqlite.run.journal import Journal
from iqlite.scoring.measures import tone
from iqlite.training.opening import open_session
from iqlite.training.readings import read
from iqlite.training.session import Session
from tests.bench.methods import spread

OUT, RECIPE = Path("runs/bench/rivals"), Path("recipes/cheerful-135m.toml")


def reward(session: Session, beta: float, prompts: list[list[dict[str, str]]], completion_ids: list[list[int]], **__: Any) -> list[float]:
    """Equation (7) of some answers, by a session of iqlite's own beside the trainer's model."""
    requests = tuple(tuple(dict(turn) for turn in prompt) for prompt in prompts)
    width = max(map(len, completion_ids))
    tokens_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids in completion_ids])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in completion_ids], dtype=torch.bool)
    ended_B = torch.tensor([ids[-1] in session.chat.stop_ids for ids in completion_ids])
    rollout = Rollout(tuple(range(len(requests))), requests, tuple(tuple(session.chat.ids(r)) for r in requests), tokens_BT, mask_BT, ended_B)  # fmt: skip
    scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
    _, reference_BT, superior_BT = token_logps(session, rollout, scores, scores.hidden["reference"])
    return [beta * float(total) for total in ((superior_BT - reference_BT) * mask_BT).sum(-1)]


def trainer_of(variant: dict[str, Any], name: str, recipe: Recipe, base: Base, rows: list[dict[str, Any]], folder: Path, *, per_step: int, steps: int) -> Any:  # fmt: skip
    """In `trl_trainers._trainer`'s place."""
    if variant["method"] == "sdft":
        trainer = ORIGINAL(name, recipe, base, rows, folder, per_step=per_step, steps=steps)
        trainer.args.distillation_alpha = variant["alpha"]
        return trainer
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    config, trained = {"rloo": (trl.RLOOConfig, trl.RLOOTrainer), "grpo": (trl.GRPOConfig, trl.GRPOTrainer)}[variant["method"]]
    beta = 1 / recipe.superior.settings()["strength"]
    session = open_session(recipe, placement="user", say=lambda _: None)
    options = dict(
        output_dir=str(folder / trl_trainers.TRAINER), max_steps=steps, per_device_train_batch_size=per_step, num_generations=variant["group"],
        use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="steps", save_steps=recipe.train.checkpoint_every,
        save_total_limit=1, report_to="none", seed=recipe.train.seed, disable_tqdm=True, max_grad_norm=recipe.train.max_grad_norm,
        max_completion_length=recipe.rollout.max_new_tokens, temperature=recipe.rollout.temperature, top_p=recipe.rollout.top_p, beta=beta,
    )  # fmt: skip
    lora = LoraConfig(r=recipe.adapter.rank, lora_alpha=recipe.adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    given = functools.partial(reward, session, beta)
    given.__name__ = "superior"  # type: ignore[attr-defined]
    told = [{"prompt": row["prompt"]} for row in rows]
    return trained(
        model=base.model, reward_funcs=given, args=config(**options), train_dataset=Dataset.from_list(told), processing_class=base.tokenizer, peft_config=lora
    )  # fmt: skip


ORIGINAL = trl_trainers._trainer


def train(variant: dict[str, Any], seed: int) -> Path:
    """The variant's folder, trained now unless it is."""
    path = OUT / ("-".join(f"{key}={value}" for key, value in variant.items()) + f"-seed={seed}")
    done = path / "baseline.json"
    if not done.exists():
        path.mkdir(parents=True, exist_ok=True)
        rate = load_recipe(RECIPE).train.learning_rate * variant["rate"]
        steps = variant["steps"]
        settings = {"train.seed": seed, "train.steps": steps, "train.eval_every": steps // 5, "prompts.eval_count": 24, "train.learning_rate": rate, "behavior.placement": "user"}  # fmt: skip
        recipe = load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        trl_trainers._trainer = functools.partial(trainer_of, variant)
        work = Journal(path)
        with work.held():
            took = trl_trainers.train_by_trl("sdft", recipe, "user", work, lambda line: print(path.name, line, flush=True))
        done.write_text(json.dumps(took))
    return path


def table() -> str:
    """Every variant that is there, the best tone first."""
    found: dict[str, list[Any]] = defaultdict(list)
    for path in sorted(OUT.glob("*/baseline.json")):
        found[re.sub(r"-seed=\d+", "", path.parent.name)].append(of_baseline(path.parent, 1.0, tone))
    lines = ["| variant | seeds | tone before | tone after | best on the way | words | tokens | minutes | until 90 % |", "|" + " --- |" * 9]
    for name, curves in sorted(found.items(), key=lambda pair: -sum(c[-1].score for c in pair[1]) / len(pair[1])):
        reached = [point for point in map(until, curves) if point is not None]
        cells = [
            str(len(curves)),
            spread([c[0].score for c in curves], "{:.3f}"),
            spread([c[-1].score for c in curves], "{:.3f}"),
            spread([max(p.score for p in c) for c in curves], "{:.3f}"),
            spread([c[-1].words for c in curves], "{:.0f}"),
            spread([c[-1].tokens for c in curves], "{:.0f}"),
            spread([c[-1].seconds / 60 for c in curves], "{:.1f}"),
            f"{spread([p.tokens for p in reached], '{:.0f}')} tokens" if reached else "nothing gained",
        ]
        lines.append(f"| {name.replace('-', ', ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=["sdft", "rloo", "grpo"])
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    parser.add_argument("--groups", nargs="+", type=int, default=[4])
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 0.333, 3.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    for seed in args.seeds:
        for method in args.methods:
            for rate in args.rates:
                for value in args.alphas if method == "sdft" else args.groups:
                    choice = {"alpha": value} if method == "sdft" else {"group": value}
                    train({"method": method, **choice, "rate": rate, "steps": args.steps}, seed)
                    (OUT / "rivals.md").write_text(table(), "utf-8")
    print(table())


if __name__ == "__main__":
    main()
