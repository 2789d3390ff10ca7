"""Runs on the played card: resumed as if uninterrupted, memory that fills in each phase, 16 bits without bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from iqlite.errors import BaseError
from iqlite.run.rundir import RunDir
from iqlite.training.loop import train
from iqlite.training.opening import environment
from iqlite.training.optimizer import make_optimizer
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import update
from tests.card.allocator import Block
from tests.card.driver import played
from tests.card.played import PlayedCard
from tests.helpers.reporters import Silent

NF4 = {"quantization": "nf4"}


@pytest.fixture
def card() -> Iterator[PlayedCard]:
    with played("RTX 4070", 12) as there:
        yield there


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    card: PlayedCard, make_session: Callable[..., Session], tmp_path: Path
) -> None:
    """In 4 bits, with the paged 8-bit optimizer and recomputed layers, as `auto` has it on a card."""
    tables: dict[str, Any] = {"model": NF4, "train": {"steps": 2, "eval_every": 2, "checkpoint_every": 1}}
    states, metrics = [], []
    for name in ("whole", "broken"):
        session = make_session(**tables)
        run = RunDir.create(tmp_path / name, session.recipe, environment(session))
        if name == "broken":
            train(session, run, Silent(), lambda run=run: len(run.metrics()) == 2)  # type: ignore[misc]
            assert run.last_step() == 1
            session = make_session(**tables)
        assert train(session, run, Silent()).why == "finished"
        states.append(session.policy.state())
        metrics.append([{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in run.metrics()])
    assert metrics[0] == metrics[1]
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


def test_an_older_card_trains_in_float16(make_session: Callable[..., Session], tmp_path: Path) -> None:
    with played("RTX 2070", 8):
        session = make_session(model=NF4, train={"steps": 2, "eval_every": 2})
        assert session.policy.base.compute_dtype == torch.float16
        assert train(session, RunDir.create(tmp_path / "run", session.recipe, environment(session)), Silent()).why == "finished"
        assert all(torch.isfinite(value).all() for value in session.policy.state().values())


@contextmanager
def at_most(card: PlayedCard, limit: float) -> Iterator[list[int]]:
    """Within the block the card is full at so many bytes in tensors; how often it was."""
    malloc, full = card.memory.malloc, [0]

    def malloc_within(asked: int) -> Block:
        if card.memory.allocated + asked > limit:
            full[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory [played]")
        return malloc(asked)

    card.memory.malloc = malloc_within  # type: ignore[method-assign]
    try:
        yield full
    finally:
        card.memory.malloc = malloc  # type: ignore[method-assign]


def test_memory_that_fills_halves_a_phase_and_changes_nothing_else(card: PlayedCard, make_session: Callable[..., Session]) -> None:
    said: list[str] = []
    session = make_session(model=NF4, rollout={"prompts_per_step": 8, "max_new_tokens": 24})
    session.sizes.say, session.sizes.fused = said.append, None
    requests, optimizer = session.train.requests[:8], make_optimizer(session.policy, "adamw")
    rollout = session.answers("policy", requests, session.sampler("train"))
    scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
    phases: dict[str, Callable[[], Any]] = {
        "rollout_tokens": lambda: session.answers("policy", requests, session.sampler("train")).tokens_BT,
        "read_tokens": lambda: read(session.policy, session.chat, rollout, session.readings, session.sizes).hidden["wanted"].float(),
        "update_tokens": lambda: torch.tensor(update(session, optimizer, rollout, scores, 0.0)[1]),
    }
    for width, phase in phases.items():
        card.memory.reset_peaks()
        before = card.memory.allocated
        expected = phase()
        limit = before + 0.7 * (card.memory.peak_allocated - before)
        wide = getattr(session.sizes, width)
        with at_most(card, limit) as full:
            found = phase()
        assert full[0] and getattr(session.sizes, width) < wide, width
        assert "memory was full" in said[-1]
        assert torch.allclose(found, expected, rtol=0.02, atol=0.02), width
    with at_most(card, card.memory.allocated + 2**12), pytest.raises(BaseError, match="memory is full even with one row"):
        phases["read_tokens"]()
