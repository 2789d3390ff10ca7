"""SFT, DPO and SDFT by TRL's own trainers under a recipe: its base, prompts, adapter shape, steps and sampled tokens (extra iqlite[compare]).

SFT learns the prompted base's answers; DPO prefers them to the base's plain ones (no human data, after RLCD and DLMA) or learns from a user's
pairs; SDFT distils the prompted base into the policy's own answers. What SFT and DPO learn from is sampled by iqlite, once, from the base.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from iqlite.base.loading import Base, load_base
from iqlite.baselines.ppo import eval_prompts
from iqlite.device import is_card, let_go
from iqlite.errors import RunError
from iqlite.model.template import Chat, Description
from iqlite.recipe.pairs import Pair, answer_ids
from iqlite.recipe.schema import Recipe
from iqlite.records import Messages, Rollout, StepMetrics
from iqlite.run.journal import Journal
from iqlite.terminal import duration
from iqlite.training.opening import open_session, room_of
from iqlite.training.optimizer import BETAS, learning_rate
from iqlite.training.order import prompts_of_step
from iqlite.training.session import Session

ROWS, TRAINER = "rows.jsonl", "trainer"  # while a baseline isn't finished: what is sampled beforehand, and TRL's own checkpoints
DPO_BETA = 0.1  # TRL's and the paper's default (arXiv 2305.18290)
DPO_RATE = 1 / 6  # of the recipe's learning rate, which is made for the token-level objectives; our choice


def check_trl() -> None:
    """RunError unless TRL is installed."""
    try:
        import trl  # noqa: F401
    except ImportError:
        raise RunError("--with sft, dpo and sdft need TRL: pip install 'iqlite[compare]', or leave them out.") from None


def train_by_trl(
    name: str, recipe: Recipe, placement: str, work: Journal, say: Callable[[str], None], pairs: Sequence[Pair] = ()
) -> dict[str, Any]:
    """Trains one of `TRL`, from the last checkpoint in `work`, and saves its adapter there; what it took. The base's loading isn't part of its seconds, as it isn't of a run's.

    With `pairs` DPO learns from those, answers cut at the recipe's rollout.max_new_tokens; its tokens are then the ones it learned from.
    """
    rows, tokens, steps, shown, sampled, wanted = _rows(name, recipe, placement, work, say, pairs)
    let_go()  # the session's base before another is loaded: its layers are in reference cycles
    base = load_base(
        recipe.model.base,
        recipe.model.quantization,
        revision=recipe.model.revision,
        beside=recipe.folder,
        embeddings=recipe.model.embeddings,
    )
    chat = Chat(base.tokenizer, base.model.generation_config.eos_token_id, recipe.model.thinking)
    base.tokenizer.chat_template = chat.template
    rate = recipe.train.learning_rate * (DPO_RATE if name == "dpo" else 1)
    trainer = _trainer(name, recipe, base, rows, work.path, per_step=per_step(name, recipe), steps=steps)
    if name == "sdft" and wanted:  # the description where the run has it, with its demonstrations
        trainer.teacher_context_builder._compose_teacher_prompt = lambda prompt, _: [dict(t) for t in chat.describe(tuple(prompt), wanted)]
    _as_iqlite_learns(trainer, recipe, rate, steps)
    _watch(trainer, name, work, chat, shown, recipe, sampled, float(tokens), say)
    trainer.train(resume_from_checkpoint=_last_checkpoint(work.path / TRAINER))
    trainer.model.save_pretrained(str(work.path), selected_adapters=["default"])
    base.identity.write(work.path)
    last = work.metrics()[-1]
    del trainer
    let_go()
    return {
        "steps": steps,
        "sampled_tokens": int(last["tokens"]),
        "seconds": last["seconds"],
        "sampling_seconds": sampled,
        "learning_rate": rate,
    }


def _rows(
    name: str, recipe: Recipe, placement: str, work: Journal, say: Callable[[str], None], pairs: Sequence[Pair]
) -> tuple[list[dict[str, Any]], int, int, list[Messages], float, Description | None]:
    """(rows for the trainer, tokens sampled for them, steps, held-out prompts, seconds of sampling, wanted description)."""
    session = open_session(recipe, placement=placement, say=say)
    wanted, steps = session.wanted, recipe.total_steps(len(session.train))
    if wanted is None and not pairs:
        raise RunError(f"{recipe.path}: --with {name} needs a described behaviour, and estimator {recipe.superior.estimator!r} has none.")
    if pairs:
        rows, tokens, seconds = *_given(session, pairs, steps * per_step("dpo", recipe)), 0.0
        same = sum(row["chosen_ids"] == row["rejected_ids"] for row in rows)
        cut = sum(row[side][-1] != session.chat.turn_end for row in rows for side in ("chosen_ids", "rejected_ids"))
        say(
            f"dpo learns from {len(rows)} pairs: {cut} answers are cut at rollout.max_new_tokens = {recipe.rollout.max_new_tokens}, {same} pairs are alike"
        )
    else:
        rows, tokens, seconds = _sampled(name, session, steps, work, say)
    return rows, tokens, steps, eval_prompts(session), seconds, wanted


def per_step(name: str, recipe: Recipe) -> int:
    """Rows of a step. DPO has two answers to a prompt: half the prompts, so that as many tokens are sampled."""
    return max(1, recipe.rollout.prompts_per_step // (2 if name == "dpo" else 1))


def _sampled(name: str, session: Session, steps: int, work: Journal, say: Callable[[str], None]) -> tuple[list[dict[str, Any]], int, float]:
    """(rows, tokens sampled, seconds of it), kept in rows.jsonl step by step.

    As many answers as the recipe's own run samples, as the very ids: an answer that was cut off isn't taught to end.
    """
    recipe, wanted = session.recipe, session.wanted
    assert wanted is not None
    work.keep_lines(steps, ROWS)
    for step in range(len(work.lines(ROWS)) + 1, steps + 1):
        begin, tokens = time.perf_counter(), 0
        rows: list[dict[str, Any]] = []
        chosen = prompts_of_step(session.train, step, recipe.rollout.prompts_per_step, recipe.train.seed)[: per_step(name, recipe)]
        requests = [session.train.requests[i] for i in chosen]
        if name == "sdft":  # it samples as it goes
            rows = [{"prompt": [dict(t) for t in session.chat.describe(r, None)], "privileged_context": wanted.text} for r in requests]
        else:
            answers: list[Rollout] = []
            for description in (wanted, None)[: 2 if name == "dpo" else 1]:
                told = session.answers("reference", requests, session.sampler("peers"), description=description, step=step, index=chosen)
                answers.append(told)
                tokens += int(told.mask_BT.sum())
            for row, request in enumerate(requests):
                prompt, answer = session.chat.ids(request), answers[0].response_ids(row)
                if name == "dpo":
                    rows.append({"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answers[1].response_ids(row)})
                else:
                    rows.append({"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)})
            say(f"sampled what {name} learns from: step {step} of {steps}")
        work.append(ROWS, {"step": step, "rows": rows, "tokens": tokens, "seconds": time.perf_counter() - begin})
    lines = work.lines(ROWS)
    return [row for line in lines for row in line["rows"]], sum(line["tokens"] for line in lines), sum(line["seconds"] for line in lines)


def _given(session: Session, pairs: Sequence[Pair], count: int) -> tuple[list[dict[str, Any]], int]:
    """(rows of a user's pairs, their answers' tokens): pass after pass, each its own permutation, until there are `count`."""
    recipe, chat = session.recipe, session.chat
    longest, room = recipe.rollout.max_new_tokens, room_of(recipe, chat, session.policy.base)
    chosen = [number for step in range(1, count + 1) for number in prompts_of_step(pairs, step, 1, recipe.train.seed)]
    rows = [
        {
            "prompt_ids": chat.ids(chat.cut(pairs[number].request, room)),
            "chosen_ids": answer_ids(chat, pairs[number].chosen)[:longest],
            "rejected_ids": answer_ids(chat, pairs[number].rejected)[:longest],
        }
        for number in chosen
    ]
    return rows, sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


def _last_checkpoint(folder: Path) -> str | None:
    """The last one that is whole: a trainer writes its state last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def _as_iqlite_learns(trainer: Any, recipe: Recipe, rate: float, steps: int) -> None:
    """The same optimizer and the same rate at every step as a run has; a trainer's own starts at 0 and ends at 0.

    float32 parameters, as a run's: TRL makes them bfloat16 over a 4-bit base, and PEFT, when it loads a checkpoint into such, puts new
    ones in their place that the optimizer doesn't know.
    """
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    trainer.optimizer = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=0.0)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer,
        lambda done: learning_rate(min(done + 1, steps), steps, peak=1.0, warmup=recipe.train.warmup, schedule=recipe.train.schedule),
    )


def _watch(trainer: Any, name: str, work: Journal, chat: Chat, shown: Sequence[Messages], recipe: Recipe, spent: float, tokens: float, say: Callable[[str], None]) -> None:  # fmt: skip
    """The trainer's progress through `say` (its own would print into standard output), held-out answers and a line of metrics a step."""
    from transformers import PrinterCallback, TrainerCallback

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            work.keep_lines(state.global_step or -1)
            last = (work.metrics() or [{"seconds": spent, "tokens": 0.0}])[-1]
            self.sampled, self.first = last["tokens"], state.global_step
            if state.global_step == 0:
                self._sample(0)
            self.begin = self.resumed = time.perf_counter()
            self.begin -= last["seconds"]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % recipe.train.eval_every == 0 or state.global_step == state.max_steps:
                paused = time.perf_counter()
                self._sample(state.global_step)
                self.begin += time.perf_counter() - paused

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in (logs or {}):
                return
            self.sampled += (logs or {}).get("completions/mean_length", 0.0) * recipe.rollout.prompts_per_step
            now = self.logged = time.perf_counter()
            work.add_metrics(StepMetrics(state.global_step, {"loss": logs["loss"], "seconds": now - self.begin, "tokens": tokens or self.sampled}))  # fmt: skip
            left = (now - self.resumed) / (state.global_step - self.first) * (state.max_steps - state.global_step)
            say(f"{name} by TRL: step {state.global_step}/{state.max_steps}, left {duration(left)}")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # a run's clock doesn't count it either
            self.begin += time.perf_counter() - self.logged

        def _sample(self, step: int) -> None:
            training = trainer.model.training
            trainer.model.eval()
            texts = _answers(trainer.model, chat, shown, recipe)
            trainer.model.train(training)
            for request, text in zip(shown, texts, strict=True):
                work.add_sample(step, request[-1]["content"], text)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Told())


def _answers(model: Any, chat: Chat, requests: Sequence[Messages], recipe: Recipe) -> list[str]:
    """Sampled by transformers' own generate(), as the recipe's rollouts are."""
    ids = [chat.ids(request) for request in requests]
    longest, pad = max(map(len, ids)), chat.stop_ids[0]
    rows = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
    rollout = recipe.rollout
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(recipe.train.seed)
        out = model.generate(
            input_ids=rows, attention_mask=mask, max_new_tokens=rollout.max_new_tokens, do_sample=True, temperature=rollout.temperature,
            top_p=rollout.top_p, top_k=0, eos_token_id=list(chat.stop_ids), pad_token_id=pad,
        )  # fmt: skip
    return [chat.text(row) for row in out[:, longest:].tolist()]


def _trainer(name: str, recipe: Recipe, base: Base, rows: list[dict[str, Any]], folder: Path, *, per_step: int, steps: int) -> Any:
    from datasets import Dataset
    from peft import LoraConfig

    card = is_card(base.device)
    options = dict(
        output_dir=str(folder / TRAINER), max_steps=steps, per_device_train_batch_size=per_step, bf16=card, use_cpu=not card,
        gradient_checkpointing=card, logging_steps=1, save_strategy="steps", save_steps=recipe.train.checkpoint_every, save_total_limit=1, report_to="none", seed=recipe.train.seed, disable_tqdm=True,
        max_grad_norm=recipe.train.max_grad_norm,
    )  # fmt: skip
    lora = LoraConfig(r=recipe.adapter.rank, lora_alpha=recipe.adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    parts = dict(model=base.model, processing_class=base.tokenizer, peft_config=lora)
    if name == "sft":
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(**options, completion_only_loss=True, max_length=None)
        return SFTTrainer(args=config, train_dataset=Dataset.from_list(rows), **parts)
    if name == "dpo":
        from trl import DPOConfig, DPOTrainer

        said = {"prompt": "a", "chosen": "b", "rejected": "c"}  # it tokenises texts itself; ours are ids already
        trainer = DPOTrainer(args=DPOConfig(**options, beta=DPO_BETA, max_length=None), train_dataset=Dataset.from_list([said]), **parts)
        trainer.train_dataset = Dataset.from_list(rows)
        return trainer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    config = SDFTConfig(
        **options, num_generations=1, max_completion_length=recipe.rollout.max_new_tokens, max_prompt_length=None,
        temperature=recipe.rollout.temperature, top_p=recipe.rollout.top_p, distillation_mode="topk_logits", distillation_alpha=1.0,
        teacher_model_kind="base",
    )  # fmt: skip
    return SDFTTrainer(args=config, train_dataset=Dataset.from_list(rows), **parts)
