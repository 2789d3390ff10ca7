"""PPO with the same signal, as a baseline: equation (7) of docs/method.md as one reward at the end of a response, a value head, GAE, a KL penalty, the clip.

    R(y) = β·Σ_t log(π̃/π_ref)(y_t|s_t) at the last token, −β·log(π_old/π_ref)(y_t|s_t) at every token, β = 1/strength, γ = 1.

Its optimum is Π_t π̃, the same as the token-level objectives'. Rollouts, readings, chunked loss and optimizer are those of `train`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from iqlite.method.loss import logps_of_tokens
from iqlite.records import Messages, Rollout, StepMetrics, SuperiorScores
from iqlite.run.journal import Journal, part
from iqlite.training.checkpoint import restore, snapshot
from iqlite.training.optimizer import apply_update, learning_rate, load_state_of, make_optimizer, state_of
from iqlite.training.order import prompts_of_step, spread
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import backward, micro_batches, policy_batches

EPOCHS, CLIP, LAMBDA = 2, 0.2, 0.95  # passes over a rollout, PPO's clip (arXiv 1707.06347), GAE's λ (arXiv 1506.02438)
VALUE_RATE = 1e-2  # the value head's own learning rate, times 1/√D; our choice


class Value:
    """V(s_t) = w·h_t + b on the policy's last hidden states, which it doesn't move; fitted by Adam."""

    def __init__(self, width: int):
        self.linear = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.optimizer = torch.optim.Adam(self.linear.parameters(), lr=VALUE_RATE / width**0.5)

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        with torch.no_grad():
            return self.linear(hidden_BTD)[..., 0]  # type: ignore[no-any-return]

    def fit(self, hidden_nD: Tensor, return_n: Tensor, steps: int = 8) -> float:
        """Some steps towards the returns; the last mean squared error."""
        for _ in range(steps):
            error = (self.linear(hidden_nD)[:, 0] - return_n).square().mean()
            self.optimizer.zero_grad()
            error.backward()
            self.optimizer.step()
        return float(error.detach())


def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = LAMBDA) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T]: generalised advantage estimation (arXiv 1506.02438, equation 16); 0 outside the mask."""
    advantage_BT = torch.zeros_like(reward_BT)
    following_B, next_value_B = torch.zeros(len(reward_BT)), torch.zeros(len(reward_BT))
    for t in range(reward_BT.shape[1] - 1, -1, -1):
        real_B = mask_BT[:, t].float()
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        following_B = real_B * (delta_B + gamma * lam * following_B)
        next_value_B = real_B * value_BT[:, t]
        advantage_BT[:, t] = following_B
    return advantage_BT, (advantage_BT + value_BT) * mask_BT


def whitened(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the mask."""
    values = value_BT[mask_BT]
    return (value_BT - values.mean()) / (values.std() + 1e-8) * mask_BT


def token_logps(session: Session, rollout: Rollout, scores: SuperiorScores, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log π_θ, log π_ref, log π̃) [B, T] of the response tokens; `hidden_BTD` are the policy's states."""
    mask_BT = rollout.mask_BT
    hidden = {name: states_BTD[mask_BT] for name, states_BTD in scores.hidden.items()}
    found = logps_of_tokens(
        session.policy.head,
        hidden_BTD[mask_BT],
        rollout.tokens_BT[mask_BT],
        hidden,
        session.scoring,
        chunk_tokens=session.sizes.chunk_tokens,
    )
    out = torch.zeros(3, *mask_BT.shape)
    out[:, mask_BT] = torch.stack(found)
    return out[0], out[1], out[2]


def rewards(logp_BT: Tensor, reference_BT: Tensor, superior_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """Equation (7) at the last token, the KL penalty at every one; [B, T]."""
    reward_BT = -beta * (logp_BT - reference_BT) * mask_BT
    last_B = mask_BT.sum(-1) - 1
    reward_BT[torch.arange(len(mask_BT)), last_B] += beta * ((superior_BT - reference_BT) * mask_BT).sum(-1)
    return reward_BT


def eval_prompts(session: Session) -> list[Messages]:
    """The held-out prompts that an evaluation during training answers."""
    return [session.eval.requests[i] for i in spread(range(len(session.eval)), session.recipe.prompts.eval_count)]


def train_ppo(session: Session, work: Journal, say: Callable[[int, int, dict[str, float]], None]) -> dict[str, Any]:
    """The recipe's steps by PPO on a fresh adapter, from the last checkpoint in `work`, saved there; what it took."""
    recipe, policy = session.recipe, session.policy
    total = recipe.total_steps(len(session.train))
    beta = 1 / max(recipe.superior.settings()["strength"], 1e-6)
    objective = recipe.objective.model_copy(update={"name": "policy-gradient"})
    objective.__pydantic_extra__ = {"clip": CLIP}
    acting = replace(session, recipe=recipe.model_copy(update={"objective": objective}))
    optimizer, value = make_optimizer(policy, recipe.train.optimizer), Value(policy.head.linear.weight.shape[1])
    shown = eval_prompts(session)

    def sample(step: int) -> None:
        rollout = session.answers("policy", shown, session.sampler("eval"))
        for row, request in enumerate(shown):
            work.add_sample(step, request[-1]["content"], session.chat.text(rollout.response_ids(row)))

    done, tokens, seconds = _resume(session, work, optimizer, value)
    if done < 0:
        done = 0
        sample(0)
        _checkpoint(session, work, optimizer, value, 0, 0, 0.0)
    begin = time.perf_counter() - seconds
    for step in range(done + 1, total + 1):
        chosen = prompts_of_step(session.train, step, recipe.rollout.prompts_per_step, recipe.train.seed)
        rollout = session.answers("policy", [session.train.requests[i] for i in chosen], session.sampler("train"), step=step, index=chosen)
        scores = read(policy, session.chat, rollout, session.readings, session.sizes)
        hidden_BTD = torch.zeros(*rollout.mask_BT.shape, policy.head.linear.weight.shape[1])
        batches = micro_batches(session, rollout)
        for rows, states_bTD in zip(batches, policy.read(policy_batches(session, rollout, batches, "policy")), strict=True):
            hidden_BTD[rows] = states_bTD.float().cpu()
        logp_BT, reference_BT, superior_BT = token_logps(session, rollout, scores, hidden_BTD.to(policy.device, policy.base.compute_dtype))
        mask_BT = rollout.mask_BT
        reward_BT = rewards(logp_BT, reference_BT, superior_BT, mask_BT, beta)
        advantage_BT, return_BT = gae(reward_BT, value(hidden_BTD), mask_BT)
        advantage_BT = whitened(advantage_BT, mask_BT)
        rate = learning_rate(step, total, peak=recipe.train.learning_rate, warmup=recipe.train.warmup, schedule=recipe.train.schedule)
        count = int(mask_BT.sum())
        for _ in range(EPOCHS):
            optimizer.zero_grad(set_to_none=True)
            states = policy.read(policy_batches(session, rollout, batches))
            for rows in batches:
                backward(acting, rollout, scores, rows, next(states), count, logp_BT, advantage_BT)
            next(states, None)
            norm = apply_update(policy, optimizer, rate, recipe.train.max_grad_norm)
            if recipe.superior.weights == "ema":
                policy.update_ema(recipe.superior.ema_rate)
        optimizer.zero_grad(set_to_none=True)
        error = value.fit(hidden_BTD[mask_BT], return_BT[mask_BT])
        tokens += count
        values = {
            "return": float(reward_BT.sum(-1).mean()),
            "kl/policy_reference": float(((logp_BT - reference_BT) * mask_BT).sum() / count),
            "value_error": error,
            "grad_norm": norm,
            "seconds": time.perf_counter() - begin,
            "tokens": float(tokens),
        }
        work.add_metrics(StepMetrics(step, values))
        say(step, total, values)
        paused = time.perf_counter()
        if step % recipe.train.eval_every == 0 or step == total:
            sample(step)
        if step % recipe.train.checkpoint_every == 0 or step == total:
            _checkpoint(session, work, optimizer, value, step, tokens, values["seconds"])
        begin += time.perf_counter() - paused
    policy.save_adapter(work.path)
    return {"steps": total, "sampled_tokens": tokens, "seconds": time.perf_counter() - begin, "learning_rate": recipe.train.learning_rate}


def _checkpoint(session: Session, work: Journal, optimizer: Any, value: Value, step: int, tokens: int, seconds: float) -> None:
    (tensors, state), (moments, numbers) = snapshot(session, optimizer), state_of(value.optimizer)
    tensors |= {f"value.{name}": tensor for name, tensor in value.linear.state_dict().items()}
    tensors |= {f"values.{name}": tensor for name, tensor in moments.items()}
    work.save_checkpoint(step, tensors, {**state, "values": numbers, "tokens": tokens, "seconds": seconds})


def _resume(session: Session, work: Journal, optimizer: Any, value: Value) -> tuple[int, int, float]:
    """(steps done, tokens sampled, seconds); −1 steps if nothing is there yet."""
    found = work.load_checkpoint()
    if found is None:
        return -1, 0, 0.0
    tensors, state = found
    restore(session, optimizer, tensors, state)
    value.linear.load_state_dict(part(tensors, "value."))
    load_state_of(value.optimizer, part(tensors, "values."), state["values"])
    return state["step"], state["tokens"], state["seconds"]
