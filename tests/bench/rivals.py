"""The methods that iqlite is compared with, each in the form that is asked for, trained under a recipe: `tests.bench.methods` has the command.

SFT, DPO, SDFT and PPO as `iqlite compare --with` trains them; SDFT also at another divergence (α = 0 is forward KL, 1 reverse KL); RLOO and GRPO,
TRL's, on METHOD's sequence reward (7): R(y) = β·Σ_t log(π̃/π_ref), their KL weight β, the step's answers split into groups of the same prompt.
Base, prompts, adapter shape, optimizer, schedule and sampling are the recipe's for all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from iqlite.base.loading import Base
from iqlite.baselines import trl_trainers
from iqlite.baselines.ppo import token_logps, train_ppo
from iqlite.device import let_go
from iqlite.recipe.schema import Recipe
from iqlite.records import Rollout
from iqlite.run.journal import Journal
from iqlite.training.opening import open_session
from iqlite.training.readings import read
from iqlite.training.session import Session

BY_REWARD = ("rloo", "grpo")
KINDS = ("sft", "dpo", "sdft", "ppo", *BY_REWARD)
ORIGINAL = trl_trainers._trainer


@dataclass(frozen=True)
class Variant:
    """A method in one form: `rate` and `times` multiply the recipe's learning rate and steps, `alpha` is SDFT's divergence, `group` RLOO's and
    GRPO's answers a prompt, `settings` what else is changed in the recipe."""

    method: str
    rate: float = 1.0
    times: int = 1
    alpha: float | None = None
    group: int | None = None
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = [] if self.alpha is None else [f"α {self.alpha:g}"]
        more += [] if self.group is None else [f"groups of {self.group}"]
        more += [f"rate × {self.rate:g}"] * (self.rate != 1) + [f"steps × {self.times}"] * (self.times != 1)
        return ", ".join([self.method, *more, *self.settings])


def train(variant: Variant, recipe: Recipe, placement: str, folder: Path) -> None:
    """Trains it into `folder`, from where it was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Journal(folder)

    def say(line: str) -> None:
        print(folder.name, line, flush=True)

    with work.held():
        if variant.method == "ppo":
            session = open_session(recipe, placement=placement)
            train_ppo(session, work, lambda at, total, values: say(f"step {at}/{total}, return {values['return']:+.3f}"))
        else:
            name = "sdft" if variant.method in BY_REWARD else variant.method
            with mock.patch.object(trl_trainers, "_trainer", functools.partial(trainer_of, variant, placement)):
                trl_trainers.train_by_trl(name, recipe, placement, work, say)
    let_go()


def trainer_of(
    variant: Variant, placement: str, name: str, recipe: Recipe, base: Base, rows: list[dict[str, Any]], folder: Path, *, per_step: int, steps: int
) -> Any:  # fmt: skip
    """In `trl_trainers._trainer`'s place."""
    if variant.method not in BY_REWARD:
        trainer = ORIGINAL(name, recipe, base, rows, folder, per_step=per_step, steps=steps)
        if variant.alpha is not None:
            trainer.args.distillation_alpha = variant.alpha
        return trainer
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    config, trained = {"rloo": (trl.RLOOConfig, trl.RLOOTrainer), "grpo": (trl.GRPOConfig, trl.GRPOTrainer)}[variant.method]
    beta = 1 / recipe.superior.settings()["strength"]
    session = open_session(recipe, placement=placement)
    options = dict(
        output_dir=str(folder / trl_trainers.TRAINER), max_steps=steps, per_device_train_batch_size=per_step, num_generations=variant.group,
        use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="steps", save_steps=recipe.train.checkpoint_every,
        save_total_limit=1, report_to="none", seed=recipe.train.seed, disable_tqdm=True, max_grad_norm=recipe.train.max_grad_norm,
        max_completion_length=recipe.rollout.max_new_tokens, temperature=recipe.rollout.temperature, top_p=recipe.rollout.top_p, beta=beta,
    )  # fmt: skip
    lora = LoraConfig(r=recipe.adapter.rank, lora_alpha=recipe.adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    given = functools.partial(reward, session, beta)
    given.__name__ = "superior"  # type: ignore[attr-defined]
    asked = [{"prompt": row["prompt"]} for row in rows]
    trainer = trained(
        model=base.model, reward_funcs=given, args=config(**options), train_dataset=Dataset.from_list(asked), processing_class=base.tokenizer, peft_config=lora
    )  # fmt: skip
    trainer.teacher_context_builder = SimpleNamespace()  # `train_by_trl` tells SDFT's how to place the description
    return trainer


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
