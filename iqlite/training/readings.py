"""Read the responses under the descriptions: hidden states per reading, from the one base, without a gradient.

Positions are aligned by gathering the response's positions of each reading on its own; response ids are never re-tokenised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from iqlite.machine.sizes import Sizes
from iqlite.model.forward import Batch
from iqlite.model.policy import Policy
from iqlite.model.template import Chat, Description
from iqlite.recipe.schema import Demonstration, Recipe, readings_of
from iqlite.records import Rollout, SuperiorScores

PLAIN = ("reference", "policy")  # readings of every row; the others make π̃


@dataclass(frozen=True)
class Reading:
    """One reading of the responses: its name, the weights that read (a role), and the description before the request."""

    name: str
    role: str
    description: Description | None = None


def read(
    policy: Policy, chat: Chat, rollout: Rollout, readings: Sequence[Reading], sizes: Sizes, ahead: Sequence[Batch] = ()
) -> SuperiorScores:
    """Each reading's hidden states [B, T, D] at the response's positions. Step 3 of docs/method.md.

    Readings by the same weights share forwards of at most `sizes.read_tokens` tokens, longest rows first: each layer is dequantised once for all.
    A contrary row is read plain only, and its states stand for all readings that π̃ is made of: Δ = 0, so that by (3) its target is π_ref to the bit.
    `ahead` is what the update will read next (see `Policy.read`).
    """
    width = rollout.tokens_BT.shape[1]
    responses = [rollout.response_ids(row) for row in range(len(rollout.index))]
    hidden: dict[str, torch.Tensor] = {}
    jobs = [
        (reading.role, reading.name, row, chat.ids(request, reading.description), chat.shared(reading.description))
        for role in dict.fromkeys(reading.role for reading in readings)
        for reading in readings
        if reading.role == role
        for row, request in enumerate(rollout.requests)
        if reading.name in PLAIN or not rollout.is_contrary(row)
    ]
    lengths = [len(prompt) + len(responses[row]) - len(start) for _, _, row, prompt, start in jobs]
    left = list(range(len(jobs)))
    while left:
        for attempt in sizes.attempts("read_tokens"):
            parts = [
                [of_role[i] for i in part]
                for role in dict.fromkeys(jobs[i][0] for i in left)
                if (of_role := [i for i in left if jobs[i][0] == role])
                for part in batches([lengths[i] for i in of_role], sizes.read_tokens)
            ]
            asked = []
            for part in parts:
                roles, _, rows, prompts, shared = zip(*(jobs[i] for i in part), strict=True)
                asked.append(Batch(roles[0], prompts, [responses[row] for row in rows], width, shared))
            widest = max(parts, key=len)
            with attempt.of(len(widest), lengths[widest[0]]):
                for part, states in zip(parts, policy.read(asked, ahead), strict=True):
                    for i, state_TD in zip(part, states.to("cpu"), strict=True):  # host memory is the cheaper place to wait
                        _, name, row, _, _ = jobs[i]
                        hidden.setdefault(name, torch.zeros(len(responses), *state_TD.shape, dtype=state_TD.dtype))[row] = state_TD
                    left = [i for i in left if i not in part]
    for name in (reading.name for reading in readings if reading.name not in PLAIN and rollout.contrary):
        at = len(responses) - rollout.contrary
        hidden.setdefault(name, torch.zeros_like(hidden["reference"]))[at:] = hidden["reference"][at:]
    return SuperiorScores(hidden)


def readings(recipe: Recipe, placement: str, weights: str) -> tuple[Reading, ...]:
    """What an estimator has to read, by name. The reference is always the bare base."""
    role = "reference" if weights == "base" else weights
    behavior = recipe.behavior
    found = [Reading("reference", "reference")]

    def described(name: str, text: str | None, demonstrations: Sequence[Demonstration], side: str) -> Reading:
        shown = tuple((turn.user, getattr(turn, side)) for turn in demonstrations)
        return Reading(name, role, Description(text or "", shown, placement))

    for name in readings_of(recipe.superior.estimator):
        if name in ("wanted", "unwanted"):
            found.append(described(name, getattr(behavior, name), behavior.demonstrations, name))
        elif name == "behaviors":
            found += [
                described(f"{side}:{p.name}", getattr(p, side), p.demonstrations, side)
                for p in behavior.mixture
                for side in ("wanted", "unwanted")
            ]
        elif getattr(recipe.superior, name) is not None:
            found.append(Reading(name, name))  # an adapter of its own, with the plain prompt
    return tuple(found)


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Row numbers in as few batches of at most `tokens` tokens with padding as there can be (one row at least), evenly filled.

    Longest rows first: what doesn't fit fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def room(at: int) -> int:
        return max(1, tokens // max(1, lengths[order[at]]))

    parts, at = 0, 0
    while at < len(order):
        parts, at = parts + 1, at + room(at)
    made: list[list[int]] = []
    at = 0
    while at < len(order):
        rows = min(room(at), math.ceil((len(order) - at) / (parts - len(made))))
        made.append(order[at : at + rows])
        at += rows
    return made
