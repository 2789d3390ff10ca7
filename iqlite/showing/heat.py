"""Why every token: rewards, what the target and the base would rather have said, the contrast behind it, and what was clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iqlite.errors import PromptsError
from iqlite.method.loss import spans
from iqlite.method.objectives import of_tokens, token_reward
from iqlite.records import Chunk, Messages, Rollout
from iqlite.training.measuring import contrasted
from iqlite.training.readings import Reading, read, readings
from iqlite.training.session import Session

TOGETHER = 16  # answers read at once; our choice
ROLES = ("policy", "reference", "superior")
"""Whose probabilities are shown: the policy π_θ, the bare base π_ref, the target π̃."""


@dataclass(frozen=True)
class Token:
    """One token of an answer. In nats, of the token itself: `reward` is equation (4), log π̃/π_θ, what a training step would reward now;
    `described` log π̃/π_ref, what the descriptions reward; `trained` log π_θ/π_ref, what training has changed; `contrast` Δ of equation (3), unclipped.

    `clipped`: a |Δ| above `superior.clip` counts only up to it. `implausible`: so unlikely under the base that Δ counts as 0. `probability` is
    the token's by role, `alternatives` the likeliest tokens at its place by role, each (text, probability).
    """

    text: str
    reward: float
    described: float
    trained: float
    contrast: float
    clipped: bool
    implausible: bool
    probability: Mapping[str, float]
    alternatives: Mapping[str, tuple[tuple[str, float], ...]]


@dataclass(frozen=True)
class Heat:
    """An answer, token by token. `who` gave it: "before" is the bare base, "after" the trained policy, "target" the superior policy itself, "text" somebody else."""

    prompt: str
    who: str
    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(token.text for token in self.tokens)


@dataclass(frozen=True)
class Shift:
    """Over all places that were read, for each token of the vocabulary: how much likelier it is under the target than under the base.

    `total_V` is the sum of π̃ − π_ref over `places` places, float64 [V].
    """

    total_V: Tensor
    places: int

    def extremes(self, chat_text: Callable[[int], str], count: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """(what the target says more often, what less often) than the base: (text, change of its expected number in 100 tokens)."""
        scaled_V = 100 * self.total_V / max(1, self.places)
        count = min(count, len(scaled_V))
        more, less = scaled_V.topk(count), (-scaled_V).topk(count)
        up = [(chat_text(at), value) for value, at in zip(more.values.tolist(), more.indices.tolist(), strict=True) if value > 0]
        down = [(chat_text(at), -value) for value, at in zip(less.values.tolist(), less.indices.tolist(), strict=True) if value > 0]
        return up, down


def heat(
    session: Session,
    answers: Sequence[tuple[str, Messages, Sequence[int]]],
    *,
    top: int = 5,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[list[Heat], Shift]:
    """Reads answers, each (who, request, ids with the end of turn where it ended), under the session's base and policy.

    π̃ is read by the bare base, as in evaluations. `top` alternatives a role. PromptsError for an answer without a token.
    """
    which = [*readings(session.recipe, session.placement, "base"), Reading("policy", "policy")]
    found: list[Heat] = []
    total_V, places = torch.zeros(0, dtype=torch.float64), 0
    for at in range(0, len(answers), TOGETHER):
        part = answers[at : at + TOGETHER]
        rollout = _rollout(session, part)
        mask_BT = rollout.mask_BT
        hidden = {
            n: states_BTD[mask_BT] for n, states_BTD in read(session.policy, session.chat, rollout, which, session.sizes).hidden.items()
        }
        columns, shift_V = _columns(session, hidden, rollout.tokens_BT[mask_BT], top)
        total_V = shift_V if places == 0 else total_V + shift_V
        begin = 0
        for who, request, ids in part:
            tokens = _tokens(session, ids, {name: values[begin : begin + len(ids)] for name, values in columns.items()})
            found.append(Heat(request[-1]["content"], who, tokens))
            begin += len(ids)
        places += begin
        progress(len(part))
    return found, Shift(total_V, places)


def _rollout(session: Session, answers: Sequence[tuple[str, Messages, Sequence[int]]]) -> Rollout:
    if not all(ids for _, _, ids in answers):
        raise PromptsError("there is no token in this answer to look at: give a longer text.")
    width = max(len(ids) for _, _, ids in answers)
    tokens_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for _, _, ids in answers])
    mask_BT = torch.arange(width)[None] < torch.tensor([[len(ids)] for _, _, ids in answers])
    requests = tuple(request for _, request, _ in answers)
    prompts = tuple(tuple(session.chat.ids(request)) for request in requests)
    return Rollout(tuple(range(len(answers))), requests, prompts, tokens_BT, mask_BT, torch.ones(len(answers), dtype=torch.bool))


def _columns(session: Session, hidden: Mapping[str, Tensor], tokens_N: Tensor, top: int) -> tuple[dict[str, list[list[float]]], Tensor]:
    """What is said of each of N tokens, and π̃ − π_ref summed over them; chunk by chunk through the head, like training."""
    head, settings = session.policy.head, session.recipe.superior.settings()
    clip, plausibility = settings.get("clip", math.inf), settings.get("plausibility", 0.0)
    columns: dict[str, list[list[float]]] = {}
    total_V = torch.zeros(0, dtype=torch.float64)
    with torch.no_grad():
        for at in spans(len(tokens_N), session.sizes.chunk_tokens):
            states = {name: states_ND[at] for name, states_ND in hidden.items()}
            superior_nV, reference_nV, _ = session.scoring(head, states)
            policy_nV = head(states["policy"]).log_softmax(-1)
            tokens_n = tokens_N[at].to(policy_nV.device)
            logp = {"policy": policy_nV, "reference": reference_nV, "superior": superior_nV}
            mine = {role: of_tokens(logp_nV, tokens_n) for role, logp_nV in logp.items()}
            contrast_n, clipped_n = torch.zeros_like(mine["policy"]), torch.zeros_like(tokens_n, dtype=torch.bool)
            for weight, wanted, unwanted in contrasted(session):
                sides = [
                    of_tokens(head(states[n]).log_softmax(-1), tokens_n) if n in states else mine["reference"] for n in (wanted, unwanted)
                ]
                contrast_n = contrast_n + weight * (sides[0] - sides[1])
                clipped_n = clipped_n | ((sides[0] - sides[1]).abs() > clip)
            least_n = reference_nV.amax(-1) + (math.log(plausibility) if plausibility > 0 else -math.inf)
            values = {
                "reward": token_reward(Chunk(tokens_n, policy_nV, superior_nV)),
                "described": mine["superior"] - mine["reference"],
                "trained": mine["policy"] - mine["reference"],
                "contrast": contrast_n,
                "clipped": clipped_n,
                "implausible": mine["reference"] < least_n,
            }
            for role, logp_nV in logp.items():
                values[f"p {role}"] = mine[role].exp()
                best = logp_nV.topk(min(top, logp_nV.shape[-1]))
                values[f"top {role}"], values[f"ids {role}"] = best.values.exp(), best.indices
            for name, value in values.items():
                columns.setdefault(name, []).extend(value.tolist())
            moved_V = (superior_nV.exp() - reference_nV.exp()).double().sum(0).cpu()
            total_V = total_V + moved_V if len(total_V) else moved_V
    return columns, total_V


def _tokens(session: Session, ids: Sequence[int], columns: Mapping[str, Sequence[float | Sequence[float]]]) -> tuple[Token, ...]:
    chat, made = session.chat, []
    for at, piece in enumerate(chat.pieces(ids)):
        tops = {role: zip(columns[f"ids {role}"][at], columns[f"top {role}"][at], strict=True) for role in ROLES}  # type: ignore[arg-type]
        made.append(
            Token(
                text=piece,
                **{name: columns[name][at] for name in ("reward", "described", "trained", "contrast", "clipped", "implausible")},  # type: ignore[arg-type]
                probability={role: columns[f"p {role}"][at] for role in ROLES},  # type: ignore[misc]
                alternatives={role: tuple((token_text(session, int(i)), float(p)) for i, p in pairs) for role, pairs in tops.items()},
            )
        )
    return tuple(made)


def token_text(session: Session, token: int) -> str:
    """A token alone, as text."""
    text: str = session.chat.tokenizer.decode([token])
    return text
