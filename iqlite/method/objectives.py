"""Objectives (docs/method.md, equation 5) and token rewards (equation 4). Plain functions of a `Chunk` in one dict.

An objective returns `(loss_n, metrics)`: float32 loss per response token with a gradient in `logp_policy_nV` only, and per-token
float32 metrics. Its keyword-only parameters are its settings in the recipe's `[objective]` table. One that has a `gamma` gets its
advantages, computed once a rollout by `advantages`, in the chunk. To add one: write the function, add a line to `OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from iqlite.records import Chunk

Loss = tuple["Tensor", dict[str, "Tensor"]]


def of_tokens(logp_nV: Tensor, tokens_n: Tensor) -> Tensor:
    """log-probability of each sampled token, [n]."""
    return logp_nV.gather(-1, tokens_n[:, None])[:, 0]


def token_reward(chunk: Chunk) -> Tensor:
    """Equation (4): r_t = log π̃(y_t|s_t) − log π_θ(y_t|s_t), in nats, [n]. Its on-policy mean is −KL(π_θ‖π̃)."""
    return of_tokens(chunk.logp_superior_nV, chunk.tokens_n) - of_tokens(chunk.logp_policy_nV, chunk.tokens_n)


def kl(logp_nV: Tensor, logq_nV: Tensor) -> Tensor:
    """KL(p‖q) over the whole vocabulary, in nats, [n]."""
    return (logp_nV.exp() * (logp_nV - logq_nV)).sum(-1)


def squared(chunk: Chunk) -> Loss:
    """½ r_t²: the log-ratio reading of the paper's soft label."""
    return 0.5 * token_reward(chunk) ** 2, {}


def policy_gradient(chunk: Chunk, *, gamma: float = 0.0, centre: bool = False, clip: float = 0.2) -> Loss:
    """−Â_t·ρ_t with ρ_t = π_θ/π_old, pessimistically clipped to 1 ± `clip` (PPO, arXiv 1707.06347): the paper's reward view.

    `gamma` in [0, 1] discounts later rewards into Â_t and `centre` subtracts the batch mean; both act in `advantages`. At the
    first update of a rollout ρ is exactly 1 and the clip is idle.
    """
    assert chunk.old_logp_n is not None and chunk.advantage_n is not None
    ratio_n = (of_tokens(chunk.logp_policy_nV, chunk.tokens_n) - chunk.old_logp_n).exp()
    clipped_n = ratio_n.clamp(1 - clip, 1 + clip)
    gain_n = (chunk.advantage_n * ratio_n).minimum(chunk.advantage_n * clipped_n)
    outside_n = (ratio_n != clipped_n).float()
    return -gain_n, {"policy/ratio_clipped_share": outside_n, "policy/ratio": ratio_n.detach()}


def full_kl(chunk: Chunk) -> Loss:
    """Σ_a π_θ(a)·(log π_θ(a) − log π̃(a)): our choice, the default. Gradient in the logits: equation (6)."""
    return kl(chunk.logp_policy_nV, chunk.logp_superior_nV), {}


def prob_squared(chunk: Chunk) -> Loss:
    """Σ_a (π_θ(a) − π̃(a))²: the literal text of what is known of the paper; for ablation."""
    return (chunk.logp_policy_nV.exp() - chunk.logp_superior_nV.exp()).square().sum(-1), {}


def forward_kl(chunk: Chunk) -> Loss:
    """Σ_a π̃(a)·(log π̃(a) − log π_θ(a)): for what the policy as good as never says, since its gradient in the logits is π_θ − π̃."""
    loss_n = kl(chunk.logp_superior_nV, chunk.logp_policy_nV)
    return loss_n, {"kl/superior_policy": loss_n.detach()}


def staying(objective: Callable[[Chunk], Loss]) -> Callable[[Chunk], Loss]:
    """The objective, but forward KL(π_ref‖π_θ) on the tokens of contrary prompts, where π̃ is π_ref.

    Its gradient in the logits is π_θ − π_ref, which is largest where the policy is furthest from the base. Equation (6)'s, of the reverse KL, vanishes once
    the policy is sure of itself: a policy that has come to refuse everything would stay so.
    """

    def both(chunk: Chunk) -> Loss:
        loss_n, metrics = objective(chunk)
        if chunk.contrary_n is not None and bool(chunk.contrary_n.any()):
            at = chunk.contrary_n
            loss_n = loss_n.clone()
            loss_n[at] = kl(chunk.logp_superior_nV[at], chunk.logp_policy_nV[at])
        return loss_n, metrics

    return both


OBJECTIVES: dict[str, Callable[..., Loss]] = {
    "squared": squared,
    "policy-gradient": policy_gradient,
    "full-kl": full_kl,
    "prob-squared": prob_squared,
    "forward-kl": forward_kl,
}

SETTINGS = {
    "gamma": "How much of a later token's reward counts for an earlier one, 0 to 1.",
    "centre": "Subtract the batch's mean from the advantages.",
    "clip": "How far from 1 the ratio of new to old probability counts, as in PPO.",
}
"""What the settings mean, for `iqlite recipe`."""


def advantages(reward_BT: Tensor, mask_BT: Tensor, *, gamma: float, centre: bool) -> Tensor:
    """Â_t = Σ_{k ≥ t} γ^{k−t} r_k within a response, then less its mean over the batch's response tokens if `centre`.

    float32 [B, T], zero outside the mask, no gradient; with γ = 0 and no centring Â is the token reward itself.
    """
    reward_BT = reward_BT * mask_BT
    advantage_BT = reward_BT.clone()
    for t in range(reward_BT.shape[1] - 2, -1, -1):
        advantage_BT[:, t] += gamma * advantage_BT[:, t + 1]
    if centre:
        advantage_BT = advantage_BT - advantage_BT.sum() / mask_BT.sum().clamp(min=1)
    return advantage_BT * mask_BT
