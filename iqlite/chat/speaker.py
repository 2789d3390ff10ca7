"""One answer, token by token: by the base, by the policy, or by the superior policy itself, which needs no training to be heard."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from iqlite.base.loading import Base, load_base
from iqlite.base.names import shape_of
from iqlite.base.shape import Shape
from iqlite.device import here
from iqlite.errors import BaseError, RecipeError
from iqlite.machine.fit import CPU_SHARE
from iqlite.machine.here import usable_memory
from iqlite.method.loss import logps_of_tokens
from iqlite.model.decoding import draw
from iqlite.model.policy import Policy
from iqlite.model.sampling import Sampler
from iqlite.model.template import Chat, Description
from iqlite.recipe.schema import Recipe
from iqlite.records import Messages, Rollout
from iqlite.training.opening import open_session
from iqlite.training.readings import Reading, read, readings
from iqlite.training.session import Session

ROOM = 1.2  # of a model's weights: what talking with it takes beside them; our choice


@dataclass(frozen=True)
class Speaker:
    """Who can be talked to: one base in memory, the adapter on it, and, with a recipe, the superior policy."""

    policy: Policy
    chat: Chat
    adapted: bool
    session: Session | None = None
    fold: bool = False

    @classmethod
    def of_recipe(cls, recipe: Recipe, adapter: Path | None, placement: str | None, say: Callable[[str], None]) -> Speaker:
        """A recipe's base; with an adapter, its policy too."""
        session = open_session(recipe, start=adapter, placement=placement, say=say)
        adapted = adapter is not None or recipe.adapter.start is not None
        return cls(session.policy, session.chat, adapted, session, session.sizes.fold)

    @classmethod
    def of_model(cls, name: str, adapter: Path | None, say: Callable[[str], None]) -> Speaker:
        """A model without a recipe, as it is stored where that fits, else in 4 bits: nothing is said under descriptions."""
        device, dtype = here()
        roomy = shape_of(name).parameters * dtype.itemsize * ROOM < usable_memory(device)
        say(f"opening {name}" + ("" if roomy else " in 4 bits, since more doesn't fit"))
        base = load_base(name, "none" if roomy else "nf4")
        chat = Chat(base.tokenizer, base.model.generation_config.eos_token_id)
        return cls(Policy(base, rank=1, alpha=1.0, seed=0, start=adapter), chat, adapter is not None, None, folds(base))

    @property
    def voices(self) -> tuple[str, ...]:
        """Those that can be heard here."""
        superior = self.session is not None and self.session.recipe.superior.estimator != "adapter"
        return ("base", *(["policy"] if self.adapted else []), *(["superior"] if superior else []))

    def with_strength(self, strength: float) -> Speaker:
        """The same with another strength of the contrast in π̃; RecipeError without a recipe or for a number it can't be."""
        if self.session is None:
            raise RecipeError("a model alone has no superior policy: chat with a recipe or a run.")
        return replace(self, session=self.session.with_strength(strength))

    def speak(self, voice: str, turns: Messages, sampler: Sampler, *, attempt: int = 0) -> Generator[int, None, None]:
        """The ids of one answer as they are chosen, up to and without an end-of-turn token; the noise is keyed by (seed, attempt, position)."""
        descriptions = self._descriptions() if voice == "superior" else {"": None}
        prompts = {name: [self.chat.ids(turns, description)] for name, description in descriptions.items()}
        shared = {name: self.chat.shared(description) for name, description in descriptions.items()}  # the base's are kept between turns
        policy, stop_ids, session = self.policy, self.chat.stop_ids, self.session

        def predict(states: Mapping[str, Tensor]) -> Tensor:
            if voice == "superior":
                assert session is not None
                return session.scoring(policy.head, states)[0]
            return policy.head(states[""])

        with _roomy(), policy.acting_as("policy" if voice == "policy" else "reference", decoding=True, folded=self.fold):
            for _, token_1 in draw(policy.forward, prompts, shared, predict, stop_ids, sampler, attempt, [0], every=1):
                if int(token_1) in stop_ids:
                    return
                yield int(token_1)

    def rewards(self, turns: Messages, ids: list[int]) -> dict[str, list[float]]:
        """Two rewards of each token of an answer, nats: `described` is log π̃/π_ref, what the description rewards.

        `trained` is log π_θ/π_ref, what training has changed; it is missing without an adapter.
        """
        session = self.session
        assert session is not None
        tokens_BT = torch.tensor([ids])
        rollout = Rollout((0,), (turns,), (tuple(self.chat.ids(turns)),), tokens_BT, tokens_BT >= 0, torch.tensor([True]))
        which = [*readings(session.recipe, session.placement, "base"), *([Reading("policy", "policy")] if self.adapted else [])]
        hidden = {name: states_BTD[0] for name, states_BTD in read(self.policy, self.chat, rollout, which, session.sizes).hidden.items()}
        policy_TD = hidden.pop("policy", hidden["reference"])
        policy_n, reference_n, superior_n = logps_of_tokens(
            self.policy.head, policy_TD, tokens_BT[0], hidden, session.scoring, chunk_tokens=session.sizes.chunk_tokens
        )
        found = {"described": (superior_n - reference_n).tolist()}
        return found | ({"trained": (policy_n - reference_n).tolist()} if self.adapted else {})

    def shortened(self, turns: Messages, new: int) -> Messages:
        """The turns, without the oldest if they'd leave no room for an answer of `new` tokens in the base's context."""
        longest = max(len(self.chat.ids(turns, description)) for description in [None, *self._descriptions().values()])
        excess = longest + new - self.policy.base.context
        return turns if excess <= 0 else self.chat.cut(turns, max(1, len(self.chat.ids(turns)) - excess))

    def _descriptions(self) -> dict[str, Description | None]:
        """What the base reads the conversation under, by reading."""
        if self.session is None or "superior" not in self.voices:
            return {}
        return {reading.name: reading.description for reading in readings(self.session.recipe, self.session.placement, "base")}


@contextmanager
def _roomy() -> Iterator[None]:
    """A full memory as one sentence with what helps."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise BaseError("memory is full: /clear the conversation, or take a lower --tokens or a smaller base.") from None


def folds(base: Base) -> bool:
    """Whether decoding on a CPU has room for one float32 matrix a layer, which spares dequantising for every token."""
    if base.device.type != "cpu":
        return False
    return 4 * Shape.of(base.model.config.to_dict(), base.name).linear_weights <= CPU_SHARE * usable_memory(base.device)
