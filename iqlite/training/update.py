"""Steps 4 and 5 of docs/method.md on one rollout: token rewards, the objective's gradient by micro-batches, the optimizer's step."""

from __future__ import annotations

import math
from typing import Any

import torch

from iqlite.method.loss import TokenStatistics, chunked_loss, chunked_statistics
from iqlite.method.objectives import advantages
from iqlite.model.forward import Batch
from iqlite.records import Rollout, SuperiorScores
from iqlite.training.optimizer import apply_update
from iqlite.training.readings import batches as in_batches
from iqlite.training.session import Session


def update(session: Session, optimizer: Any, rollout: Rollout, scores: SuperiorScores, rate: float) -> tuple[TokenStatistics, float]:
    """Equations (4) and (5) on one rollout: `updates_per_rollout` optimizer steps, each accumulated over micro-batches.

    Returns the statistics of the first update's tokens (where policy and rollout agree) and the last gradient norm. Micro-batches
    add up to one masked mean over all response tokens, so their size doesn't change the result beyond rounding, and so do several
    processes: each brings the rows of its part, and the gradient, the tokens and the statistics are those of all.
    """
    policy, recipe, ranks = session.policy, session.recipe, session.ranks
    total_tokens = ranks.total(int(rollout.learned_BT.sum()))
    session.check_part(total_tokens)
    old_logp_BT, advantage_BT = rollout_advantages(session, rollout, scores)
    first: tuple[TokenStatistics, list[int]] | None = None
    norm = math.nan
    for _ in range(recipe.train.updates_per_rollout):
        for attempt in session.sizes.attempts("update_tokens"):  # out of memory: the whole gradient once more, in smaller parts
            optimizer.zero_grad(set_to_none=True)
            parts: list[TokenStatistics] = []
            batches = micro_batches(session, rollout)
            widest = max(batches, key=len, default=[])  # none where nothing of this process's part is learned
            with attempt.of(len(widest), row_tokens(session, rollout, widest[0]) if widest else 0):
                states = policy.read(policy_batches(session, rollout, batches))
                for rows in batches:
                    parts.append(backward(session, rollout, scores, rows, next(states), total_tokens, old_logp_BT, advantage_BT))
                next(states, None)  # where layers are streamed, all batches' backward pass comes last
        first = first or (TokenStatistics.join(parts), [row for rows in batches for row in rows])
        ranks.add_gradients(policy.parameters.values())
        norm = apply_update(policy, optimizer, rate, recipe.train.max_grad_norm)
        optimizer.zero_grad(set_to_none=True)  # the next rollout can use their memory
        if recipe.superior.weights == "ema":
            policy.update_ema(recipe.superior.ema_rate)
    assert first is not None
    session.sizes.agree(ranks)
    return _of_all(session, rollout, *first), norm


def _of_all(session: Session, rollout: Rollout, statistics: TokenStatistics, order: list[int]) -> TokenStatistics:
    """The statistics of every process's rows, in the order of the step's prompts; here are those of the part's rows in `order`."""
    if rollout.rows is None:
        return statistics
    lengths = [int(rollout.learned_BT[row].sum()) for row in order]
    return TokenStatistics(session.ranks.in_order(statistics.values, [rollout.rows[row] for row in order], lengths))


def backward(
    session: Session,
    rollout: Rollout,
    scores: SuperiorScores,
    rows: list[int],
    states_bTD: torch.Tensor,
    total_tokens: int,
    old_logp_BT: torch.Tensor | None,
    advantage_BT: torch.Tensor | None,
) -> TokenStatistics:
    """Adds some rows' part of the gradient through the policy's states. A function of its own: after an out-of-memory nothing of its graph stays alive."""
    policy, mask_bT = session.policy, rollout.learned_BT[rows]
    contrary_n = None
    if rollout.contrary:
        contrary_n = torch.tensor([rollout.is_contrary(row) for row in rows])[:, None].expand_as(mask_bT)[mask_bT]
    loss, statistics = chunked_loss(
        policy.head,
        states_bTD[mask_bT.to(policy.device)],
        rollout.tokens_BT[rows][mask_bT],
        {name: states_BTD[rows][mask_bT] for name, states_BTD in scores.hidden.items()},
        session.scoring,
        session.objective,
        total_tokens=total_tokens,
        chunk_tokens=session.sizes.chunk_tokens,
        loss_scale=policy.loss_scale,
        old_logp_n=None if old_logp_BT is None else old_logp_BT[rows][mask_bT],
        advantage_n=None if advantage_BT is None else advantage_BT[rows][mask_bT],
        contrary_n=contrary_n,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    if contrary_n is not None:
        statistics.values["contrary"] = contrary_n.float()
    return statistics


def policy_batches(session: Session, rollout: Rollout, batches: list[list[int]], role: str = "") -> list[Batch]:
    """Rows of a rollout as the policy reads them, plain; with a gradient if `role` is ""."""
    start = session.chat.shared()
    return [
        Batch(
            role,
            [rollout.prompt_ids[r] for r in rows],
            [rollout.response_ids(r) for r in rows],
            rollout.mask_BT.shape[1],
            [start] * len(rows),
        )
        for rows in batches
    ]


def training_batches(session: Session, rollout: Rollout) -> list[Batch]:
    """What the next update on a rollout reads first."""
    if "gamma" in session.recipe.objective.settings():  # the policy is read without a gradient before
        return []
    return policy_batches(session, rollout, micro_batches(session, rollout))


def rollout_advantages(session: Session, rollout: Rollout, scores: SuperiorScores) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(log π_old, Â) [B, T] for objectives with a `gamma`: rewards under the policy before the update, computed once a rollout.

    log π_old comes from the training forward with the same micro-batches, so that ρ is exactly 1 at the first update.
    """
    settings, policy = session.recipe.objective.settings(), session.policy
    if "gamma" not in settings:
        return None, None
    logp_BT, reward_BT = torch.zeros(rollout.mask_BT.shape), torch.zeros(rollout.mask_BT.shape)
    batches = micro_batches(session, rollout)
    for rows, hidden_bTD in zip(batches, policy.read(policy_batches(session, rollout, batches, "policy")), strict=True):
        mask_bT = rollout.mask_BT[rows]
        hidden = {name: states_BTD[rows][mask_bT] for name, states_BTD in scores.hidden.items()}
        values = chunked_statistics(
            policy.head, hidden_bTD[mask_bT.to(policy.device)], rollout.tokens_BT[rows][mask_bT], hidden, session.scoring,
            chunk_tokens=session.sizes.chunk_tokens,
        ).values  # fmt: skip
        for target_BT, name in ((logp_BT, "logp"), (reward_BT, "reward")):
            part_bT = torch.zeros(mask_bT.shape)
            part_bT[mask_bT] = values[name]
            target_BT[rows] = part_bT
    gamma, centre, learned_BT = float(settings["gamma"]), bool(settings["centre"]), rollout.learned_BT
    if session.ranks.size == 1 or not centre:
        return logp_BT, advantages(reward_BT, learned_BT, gamma=gamma, centre=centre)
    advantage_BT = advantages(reward_BT, learned_BT, gamma=gamma, centre=False)
    sums, tokens = zip(*session.ranks.gathered((float(advantage_BT.double().sum()), int(learned_BT.sum()))), strict=True)
    return logp_BT, (advantage_BT - sum(sums) / sum(tokens)) * learned_BT


def micro_batches(session: Session, rollout: Rollout) -> list[list[int]]:
    """Row numbers in batches of at most `sizes.update_tokens` tokens, longest rows first."""
    rows = [row for row in range(len(rollout.index)) if bool(rollout.learned_BT[row].any())]  # all, but for thinking models
    batches = in_batches([row_tokens(session, rollout, row) for row in rows], session.sizes.update_tokens)
    return [[rows[at] for at in batch] for batch in batches]


def row_tokens(session: Session, rollout: Rollout, row: int) -> int:
    """Tokens that a row adds to a forward: its prompt without what all share, and its answer."""
    return len(rollout.prompt_ids[row]) + int(rollout.mask_BT[row].sum()) - len(session.chat.shared())
