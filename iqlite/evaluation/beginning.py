"""Whether answers would have to begin as the base's never do: what the policy never says, its own answers can't teach it.

Equation (6) of docs/method.md: the default objective's gradient vanishes with π_θ(a). Forward KL's doesn't.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from iqlite.model.sampling import Sampler
from iqlite.recipe.schema import Recipe
from iqlite.records import Prompts, Rollout
from iqlite.training.readings import read
from iqlite.training.session import Session

RARE, MUCH = 1e-4, 0.25  # a probability that as good as never comes up; the share of first tokens that is worth a word; our choice


def unsaid(session: Session, rollout: Rollout) -> float | None:
    """Σ_a π⁺(a)·[π_ref(a) < RARE] at the answers' first token, the mean over answers, 0 to 1; of a mixture the largest. None where nothing wanted is read."""
    first = replace(rollout, tokens_BT=rollout.tokens_BT[:, :1], mask_BT=rollout.mask_BT[:, :1], part_BT=None)
    hidden = read(session.policy, session.chat, first, session.readings, session.sizes).hidden
    with torch.no_grad():
        rare_BV = session.policy.head(hidden["reference"][:, 0]).softmax(-1) < RARE
        told = [session.policy.head(states_BTD[:, 0]).softmax(-1) for name, states_BTD in hidden.items() if name.startswith("wanted")]
    return max((float((wanted_BV * rare_BV).sum(-1).mean()) for wanted_BV in told), default=None)


def advice(share: float | None, recipe: Recipe) -> str | None:
    """What to change in a recipe where `share` of the answers would begin so, in a sentence; None where nothing is to be said."""
    changes = []
    if recipe.objective.name != "forward-kl":
        changes.append('objective.name = "forward-kl"')
    if recipe.superior.estimator == "contrastive" and recipe.superior.settings()["plausibility"]:
        changes.append('superior.estimator = "prompted" with superior.strength = 1')
    if not changes or recipe.behavior.where != "both" or share is None or share < MUCH:
        return None
    return f"The prompted base begins {share:.0%} of its answers with what the base as good as never begins with: set {' and '.join(changes)}, or it may not be learned."


def heard(session: Session, asked: Prompts, numbers: list[int]) -> str | None:
    """The advice for a session, by the prompts that are asked."""
    return advice(unsaid(session, session.answers("reference", asked.requests, Sampler(0, 1), index=numbers)), session.recipe)
