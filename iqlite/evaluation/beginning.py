"""Whether answers would have to begin as the policy's never do: what it never says, its own answers can't teach it.

Equation (6) of docs/method.md: the default objective's gradient vanishes with π_θ(a). Forward KL's doesn't.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from iqlite.model.sampling import Sampler
from iqlite.recipe.schema import Recipe
from iqlite.training.order import spread
from iqlite.training.readings import Reading, read, readings
from iqlite.training.session import Session

ASKED = 24  # held-out prompts; our choice
RARE, MUCH = 1e-4, 0.25  # a probability that as good as never comes up; the share of first tokens that is worth a word; our choice


def unsaid(session: Session) -> float | None:
    """Σ_a π⁺(a)·[π_θ(a) < RARE] at an answer's first token, π⁺ the prompted base: the mean over held-out prompts, 0 to 1; of a mixture the largest.

    None where nothing wanted is read, and for models that think, which begin with that.
    """
    told = [one for one in readings(session.recipe, session.placement, "base") if one.name.startswith("wanted")]
    if not told or session.chat.rendering.thinks:
        return None
    numbers = spread(range(len(session.eval)), ASKED)
    rollout = session.answers("reference", session.eval.some(numbers).requests, Sampler(0, 1), index=numbers)
    hidden = read(session.policy, session.chat, replace(rollout, part_BT=None), [Reading("policy", "policy"), *told], session.sizes).hidden
    with torch.no_grad():
        rare_BV = session.policy.head(hidden["policy"][:, 0]).softmax(-1) < RARE
        return max(float((session.policy.head(hidden[one.name][:, 0]).softmax(-1) * rare_BV).sum(-1).mean()) for one in told)


def advice(share: float | None, recipe: Recipe) -> str | None:
    """What to change in a recipe where `share` of the answers would begin so, in a sentence; None where nothing is to be said."""
    changes, superior = [], recipe.superior
    if recipe.objective.name != "forward-kl":
        changes.append('objective.name = "forward-kl"')
    if superior.estimator == "contrastive" and superior.settings()["plausibility"]:
        changes.append('superior.estimator = "prompted" with superior.strength = 1 (and without clip and plausibility)')
    elif superior.settings().get("plausibility"):
        changes.append("superior.plausibility = 0")
    if not changes or share is None or share < MUCH:
        return None
    return f"The prompted base begins {share:.0%} of its answers with what the model as good as never begins with: set {' and '.join(changes)}, or it may not be learned."
