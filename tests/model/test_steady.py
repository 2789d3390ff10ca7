"""Decoding by equal steps: the same ids as the plain loop, also where a recording of a step is replayed, as a CUDA graph is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from iqlite.chat.superior import superior_answers
from iqlite.model import decoding, steady
from iqlite.model.sampling import Sampler
from iqlite.records import Rollout
from iqlite.training.session import Session
from tests.helpers.recorded import Recording
from tests.helpers.tiny import shake
from tests.model.test_decoding import SHOWN, answers

ENDS = tuple(range(0, 256, 12))
REQUESTS = [({"role": "user", "content": "why? " * (1 + number % 3)},) for number in range(8)]
NEW = 16


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Steps are recorded and replayed on the CPU, over short spans and with frequent looks; the recordings made so far."""
    made: list[Recording] = []

    def repeated(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        step()
        made.append(Recording())
        with made[-1]:
            step()
        made[-1].rewind()
        return made[-1].replay

    monkeypatch.setattr(steady, "repeated", repeated)
    monkeypatch.setattr(steady, "SPAN", 8)
    monkeypatch.setitem(decoding.draw.__kwdefaults__ or {}, "every", 3)
    return made


def opened(make_session: Callable[..., Session], base: Path, **tables: Any) -> Session:
    """A session that answers all requests in one batch, rows of several lengths that end early and apart."""
    session = make_session(model={"base": str(base)}, **tables)
    shake(session.policy)
    session.chat.stop_ids = ENDS
    return replace(session, sizes=replace(session.sizes, rows=64, rollout_tokens=100_000, fold=False))


def both_ways(session: Session, draw: Callable[[], Rollout]) -> tuple[list[list[int]], list[list[int]]]:
    """Answers of the plain loop, and of equal steps."""
    found = []
    for steadily in (False, True):
        session.policy.forward.steady = steadily
        found.append(answers(draw()))
    return found[0], found[1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_under_every_sampler_and_several_readings(
    temperature: float, top_p: float, make_session: Callable[..., Session], tiny: Callable[..., Path], replays: list[Recording]
) -> None:
    session = opened(make_session, tiny(), behavior={"demonstrations": SHOWN})
    sampler = Sampler(1, NEW, temperature, top_p)
    ways: dict[str, Callable[[], Rollout]] = {
        "superior": lambda: superior_answers(session, REQUESTS, sampler),
        "policy": lambda: session.answers("policy", REQUESTS, sampler),
    }
    for who, draw in ways.items():
        made = len(replays)
        plain, steps = both_ways(session, draw)
        assert steps == plain, who
        assert len(replays) > made + 1


def test_who_draws_ends_answers_too(make_session: Callable[..., Session], tiny: Callable[..., Path], replays: list[Recording]) -> None:
    session = opened(make_session, tiny())
    policy, sampler = session.policy, Sampler(1, NEW, 1.0, 1.0)
    prompts = {"plain": [session.chat.ids(request) for request in REQUESTS]}

    def draw(*, steadily: bool) -> list[list[int]]:
        policy.forward.steady = steadily
        found: list[list[int]] = [[] for _ in REQUESTS]
        with policy.acting_as("policy"):
            drawn = decoding.draw(
                policy.forward, prompts, {}, lambda states: policy.head(states["plain"]), ENDS, sampler, 0, range(len(REQUESTS))
            )
            enough_b = None
            while True:
                try:
                    which_b, token_b = drawn.send(enough_b)
                except StopIteration:
                    return found
                for row, token in zip(which_b.tolist(), token_b.tolist(), strict=True):
                    found[row].append(token)
                enough_b = torch.tensor([len(found[row]) == 2 + row for row in which_b.tolist()])

    plain, steps = draw(steadily=False), draw(steadily=True)

    def upto_end(ids: list[int], row: int) -> list[int]:
        return ids[: next((at + 1 for at, token in enumerate(ids[: 2 + row]) if token in ENDS), 2 + row)]

    assert [upto_end(ids, row) for row, ids in enumerate(steps)] == [upto_end(ids, row) for row, ids in enumerate(plain)]
    for row, (ids, whole) in enumerate(zip(steps, plain, strict=True)):
        assert set(ids[2 + row :]) <= {ENDS[0]} >= set(whole[2 + row :])  # nothing more is drawn
    assert replays
