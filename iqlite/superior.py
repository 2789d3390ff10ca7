"""Read the responses under the descriptions: hidden states per reading, from the one base, without a gradient.

Positions are aligned by gathering the response's positions of each reading on its own; response ids are never re-tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from iqlite.policy import Policy
from iqlite.prompts import Chat, Description
from iqlite.records import Rollout, SuperiorScores


@dataclass(frozen=True)
class Reading:
    """One reading of the responses: its name, the weights that read (a role), and the description before the request."""

    name: str
    role: str
    description: Description | None = None


def read(policy: Policy, chat: Chat, rollout: Rollout, readings: Sequence[Reading], *, rows: int) -> SuperiorScores:
    """Each reading's hidden states [B, T, D] at the response's positions, `rows` sequences a forward. METHOD's step 3."""
    width = rollout.tokens_BT.shape[1]
    responses = [rollout.response_ids(row) for row in range(len(rollout.index))]
    hidden = {}
    for reading in readings:
        prompts = [chat.ids(request, reading.description) for request in rollout.requests]
        parts = []
        with policy.acting_as(reading.role):
            for at in range(0, len(prompts), rows):
                part = policy.hidden_states(prompts[at : at + rows], responses[at : at + rows], width)
                parts.append(part.to("cpu"))  # host memory is the cheaper place to wait for the update
        hidden[reading.name] = torch.cat(parts)
    return SuperiorScores(hidden)
