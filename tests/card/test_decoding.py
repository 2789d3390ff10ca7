"""Decoding on the played card: a token is one launch and no wait, a step that waits isn't recorded, and the ids are the same either way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from iqlite.base.loading import load_base
from iqlite.machine.sizes import Sizes
from iqlite.model import steady
from iqlite.model.policy import Policy
from iqlite.model.sampling import Sampler
from iqlite.records import Rollout
from iqlite.training.rollout import sample
from tests.card.driver import played
from tests.card.graphs import REPLAY
from tests.card.played import PlayedCard

NEW, ROWS = 40, 8
ENDS = tuple(range(0, 256, 12))


@pytest.fixture
def card() -> Iterator[PlayedCard]:
    with played("RTX 4070", 12) as there:
        yield there


def opened(folder: Path, embeddings: str = "card") -> Policy:
    policy = Policy(load_base(str(folder), "nf4", embeddings=embeddings), rank=4, alpha=8.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def rollout(policy: Policy) -> Rollout:
    sizes = Sizes(rows=64, rollout_tokens=10**6, read_tokens=10**6, update_tokens=10**6, chunk_tokens=64)
    prompts = [[10 + row] * (20 - row % 5) for row in range(ROWS)]
    requests = [({"role": "user", "content": "why?"},)] * ROWS
    return sample(policy, "policy", requests, prompts, range(ROWS), ENDS, Sampler(0, NEW, 1.0, 0.9), sizes=sizes)


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_a_recorded_step_draws_what_the_step_draws(
    architecture: str, card: PlayedCard, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = opened(tiny(architecture))
    before = card.counts.copy()
    found = rollout(policy)
    counts = card.counts.since(before)
    assert counts.kernels[REPLAY] > 20 and len(set(found.mask_BT.sum(-1).tolist())) > 3
    in_tokens = [line for line in counts.waits if "steady.py" in line and ("step" in line or "choose" in line)]
    assert not in_tokens

    def run(step: Callable[[], None], _: torch.device) -> Callable[[], None]:
        step()
        return step

    monkeypatch.setattr(steady, "repeated", run)
    assert torch.equal(rollout(policy).tokens_BT, found.tokens_BT)


def test_a_step_that_waits_is_run_and_not_recorded(card: PlayedCard, tiny: Callable[..., Path]) -> None:
    """Embeddings on the host: each token's ids go there and back."""
    found = {}
    for where in ("card", "host"):
        policy = opened(tiny("llama", tie_word_embeddings=False), where)
        before = card.counts.copy()
        found[where] = rollout(policy).tokens_BT
        assert bool(card.counts.since(before).kernels[REPLAY]) == (where == "card")
    assert torch.equal(found["card"], found["host"])
