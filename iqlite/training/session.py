"""What a recipe comes to once it is in memory: base, policy, chat, prompts, the readings, and how π̃ is made from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from iqlite.errors import RecipeError
from iqlite.machine.ranks import ALONE, Ranks
from iqlite.machine.sizes import Sizes
from iqlite.method.estimators import ESTIMATORS
from iqlite.method.loss import Scoring, TokenStatistics, chunked_statistics
from iqlite.method.objectives import OBJECTIVES, staying
from iqlite.model.policy import Policy
from iqlite.model.sampling import Sampler
from iqlite.model.template import Chat, Description
from iqlite.recipe.schema import Recipe, readings_of
from iqlite.records import Messages, Prompts, Rollout
from iqlite.scoring.measures import HARMLESS
from iqlite.training.readings import Reading, read, readings
from iqlite.training.rollout import part_of, sample


@dataclass(frozen=True)
class Session:
    """A recipe ready to run. `placement` is resolved; `notes` are sentences for the user; `ranks` the processes that share out its rows."""

    recipe: Recipe
    policy: Policy
    chat: Chat
    train: Prompts
    eval: Prompts
    outside: Prompts | None
    placement: str
    notes: tuple[str, ...]
    sizes: Sizes
    contrary: Prompts | None = None
    contrary_eval: Prompts | None = None
    ranks: Ranks = ALONE

    @property
    def asked(self) -> Prompts:
        """The held-out prompts that the recipe's measure is of: harmless needs those with both kinds of right answer."""
        return self.asked_by(self.recipe.judge.measure)

    def asked_by(self, measure: str) -> Prompts:
        """The held-out prompts that a measure is of."""
        return self.eval + self.contrary_eval if measure == HARMLESS and self.contrary_eval else self.eval

    @functools.cached_property
    def readings(self) -> tuple[Reading, ...]:
        """The reference, always by the bare base, and what the estimator asks for, by the weights that the recipe names."""
        return readings(self.recipe, self.placement, self.recipe.superior.weights)

    @functools.cached_property
    def scoring(self) -> Scoring:
        """The estimator with its settings."""
        superior = self.recipe.superior
        estimator = functools.partial(ESTIMATORS[superior.estimator], **superior.settings())
        mixture = tuple((p.name, p.weight) for p in self.recipe.behavior.mixture)
        return Scoring(estimator, readings_of(superior.estimator), mixture)

    @functools.cached_property
    def objective(self) -> Callable[..., Any]:
        """The objective with its settings; on contrary prompts, what keeps the policy at the base."""
        return staying(functools.partial(OBJECTIVES[self.recipe.objective.name], **self.recipe.objective.settings()))

    @property
    def wanted(self) -> Description | None:
        """The wanted description as it is read, what the base is told in a comparison; all of them in a mixture."""
        found = [r.description for r in self.readings if r.name.startswith("wanted") and r.description]
        if not found:
            return None
        shown = tuple(turn for description in found for turn in description.demonstrations)
        return Description(" ".join(description.text for description in found), shown, self.placement)

    def with_strength(self, strength: float) -> Session:
        """The same with another strength of the contrast in π̃; RecipeError for a number it can't be."""
        if not 0 <= strength < 1000:
            now = self.recipe.superior.settings()["strength"]
            raise RecipeError(f"the strength {strength:g} can't be used: give one from 0 to 1000, such as {now:g}.")
        superior = self.recipe.superior.with_settings({"strength": strength})
        return replace(self, recipe=self.recipe.model_copy(update={"superior": superior}))

    def sampler(self, stream: str) -> Sampler:
        """How rollouts are drawn."""
        rollout = self.recipe.rollout
        return Sampler(self.recipe.train.seed, rollout.max_new_tokens, rollout.temperature, rollout.top_p, stream)

    def answers(
        self, role: str, requests: Sequence[Messages], sampler: Sampler, *, description: Description | None = None, step: int = 0,
        index: Sequence[int] | None = None, progress: Callable[[int], None] | None = None,
    ) -> Rollout:  # fmt: skip
        """Samples answers to requests by a role, plain or told a description."""
        ids = [self.chat.ids(request, description) for request in requests]
        numbers = range(len(requests)) if index is None else index
        rollout = sample(
            self.policy,
            role,
            requests,
            ids,
            numbers,
            self.chat.stop_ids,
            sampler,
            step=step,
            sizes=self.sizes,
            shared=self.chat.shared(description),
            progress=progress,
            ranks=self.ranks,
        )
        where = self.recipe.behavior.where
        return replace(rollout, part_BT=self._part(rollout, where)) if where != "both" and self.chat.rendering.thinks else rollout

    def check_part(self, tokens: int) -> None:
        """RecipeError if `tokens`, those of a step's answers that are of the part that is trained, are none: they end before they have thought to the end."""
        if not tokens:
            where, new = self.recipe.behavior.where, self.recipe.rollout.max_new_tokens
            raise RecipeError(
                f'{self.recipe.path}: no answer has anything of behavior.where = "{where}" in its {new} tokens: raise rollout.max_new_tokens, '
                'or set model.thinking = false or behavior.where = "both".'
            )

    def _part(self, rollout: Rollout, where: str) -> torch.Tensor:
        """The tokens [B, T] of the answers, or of the thinking before them."""
        thought_BT = torch.zeros_like(rollout.mask_BT)
        for row in range(len(rollout.index)):
            ids = rollout.response_ids(row)
            end = self.chat.rendering.thought_end(ids)
            thought_BT[row, : len(ids) if end is None else end] = True
        return rollout.mask_BT & (thought_BT if where == "thinking" else ~thought_BT)

    def score(self, rollout: Rollout, *, weights: str | None = None) -> TokenStatistics:
        """Rewards, KLs and entropy of the policy on a rollout's tokens, without a gradient; for forward KL, that one too."""
        which = self.readings if weights is None else readings(self.recipe, self.placement, weights)
        # An answer that hasn't thought to its end has nothing of the part that is trained; where none has, all of it is scored.
        mask_BT = rollout.learned_BT if bool(rollout.learned_BT.any()) else rollout.mask_BT
        mine = part_of(self.ranks, rollout)
        values: dict[str, torch.Tensor] = {}
        mask_BT = mask_BT if mine.rows is None else mask_BT[list(mine.rows)]
        if len(mine.index):
            scores = read(self.policy, self.chat, mine, [*which, Reading("policy", "policy")], self.sizes)
            hidden = {name: hidden_BTD[mask_BT] for name, hidden_BTD in scores.hidden.items()}
            values = chunked_statistics(
                self.policy.head,
                hidden.pop("policy"),
                mine.tokens_BT[mask_BT],
                hidden,
                self.scoring,
                chunk_tokens=self.sizes.chunk_tokens,
                objective=self.objective if self.recipe.objective.name == "forward-kl" else None,
            ).values
        return TokenStatistics(self.ranks.in_order(values, mine.rows or (), mask_BT.sum(-1).tolist()))
