"""Where the description stands, where the recipe leaves it open."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from iqlite.method.loss import logps_by_chunks
from iqlite.method.objectives import kl
from iqlite.records import Rollout
from iqlite.training.readings import read, readings
from iqlite.training.session import Session

PLACEMENT_PROMPTS, PLACEMENT_TOKENS = 8, 16  # how much `placement = "auto"` reads both ways; our choice


def place(session: Session, say: Callable[[str], None]) -> tuple[Session, str]:
    """`placement = "auto"` (docs/method.md): a handful of prompts read both ways; the placement with the larger KL from the base is taken."""
    if not any(r.description for r in readings(session.recipe, "system", "base")):
        return replace(session, placement="system"), "no description is read, so its placement doesn't matter."
    if not session.chat.system_turn:
        return replace(
            session, placement="user"
        ), "the chat template takes no system turn: the description stands at the head of the first user turn."
    say("reading the description in both placements")
    requests = session.train.requests[:PLACEMENT_PROMPTS]
    sampler = replace(session.sampler("place"), max_new_tokens=min(PLACEMENT_TOKENS, session.recipe.rollout.max_new_tokens))
    rollout = session.answers("reference", requests, sampler)
    measured = {placement: moved(session, rollout, placement) for placement in ("system", "user")}
    chosen = session.ranks.told(max(measured, key=lambda placement: measured[placement]))
    figures = ", ".join(f"{placement} turn {nats:.3f}" for placement, nats in measured.items())
    return replace(
        session, placement=chosen
    ), f"the description stands in the {chosen} turn, where it moves the base more (KL from the base, nats a token: {figures})."


def moved(session: Session, rollout: Rollout, placement: str, *, other: str = "reference") -> float:
    """Mean KL(π⁺‖π_ref) over the rollout's tokens, nats, or KL(π⁺‖π⁻) with `other` "unwanted"; over all behaviours of a mixture. The base reads.

    nan where there are no two such readings.
    """
    which = [r for r in readings(session.recipe, placement, "base") if r.name.startswith(("wanted", other))]
    scores = read(session.policy, session.chat, rollout, which, session.sizes)
    head, total, count = session.policy.head, 0.0, 0
    with torch.no_grad():
        for name in scores.hidden:
            against = other if other == "reference" else name.replace("wanted", other, 1)
            if not name.startswith("wanted") or against not in scores.hidden:
                continue
            read_ND, plain_ND = (scores.hidden[n][rollout.mask_BT] for n in (name, against))
            for at, logp_nV in logps_by_chunks(head, read_ND, session.sizes.chunk_tokens):
                total += float(kl(logp_nV, head(plain_ND[at]).log_softmax(-1)).sum())
            count += len(read_ND)
    return total / count if count else math.nan
