"""Out of memory at each phase: the work goes on in halves with the same result, says so, and a checkpoint keeps the new sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from iqlite.errors import BaseError
from iqlite.machine.sizes import Sizes
from iqlite.machine.timing import Fused
from iqlite.run.rundir import RunDir
from iqlite.training.loop import train
from iqlite.training.opening import environment
from iqlite.training.optimizer import make_optimizer
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import update
from tests.helpers.reporters import Silent
from tests.helpers.tensors import at_most
from tests.helpers.tiny import shake


def ready(make_session: Callable[..., Session]) -> tuple[Session, list[str]]:
    """A session with a shaken adapter, and what it says."""
    session = make_session(rollout={"prompts_per_step": 8})
    said: list[str] = []
    session.sizes.say = said.append
    shake(session.policy)
    return session, said


def test_a_rollout_goes_on_with_fewer_rows(make_session: Callable[..., Session]) -> None:
    session, said = ready(make_session)
    requests = session.train.requests[:8]
    whole = session.answers("policy", requests, session.sampler("train"))
    longest = max(map(len, whole.prompt_ids))
    with at_most(session, 4 * longest, with_gradient=False) as refused:
        halves = session.answers("policy", requests, session.sampler("train"))
    assert refused
    assert torch.equal(whole.tokens_BT, halves.tokens_BT)
    assert len(said) == 1
    assert "memory was full" in said[0]
    assert session.sizes.together(longest + 6) == 4


def test_a_reading_goes_on_with_fewer_tokens(make_session: Callable[..., Session]) -> None:
    session, said = ready(make_session)
    rollout = session.answers("policy", session.train.requests[:8], session.sampler("train"))
    whole = read(session.policy, session.chat, rollout, session.readings, session.sizes)
    with at_most(session, 600, with_gradient=False) as refused:
        parts = read(session.policy, session.chat, rollout, session.readings, session.sizes)
    assert refused
    assert said
    assert session.sizes.read_tokens <= 650  # rows are reckoned with the last token, which isn't read
    for name, states_BTD in whole.hidden.items():
        torch.testing.assert_close(parts.hidden[name], states_BTD, rtol=1e-5, atol=1e-5)


def test_an_update_starts_its_gradient_again_with_fewer_tokens(make_session: Callable[..., Session]) -> None:
    adapters = []
    for limited in (False, True):
        session, said = ready(make_session)
        rollout = session.answers("policy", session.train.requests[:8], session.sampler("train"))
        scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
        optimizer = make_optimizer(session.policy, "adamw")
        with at_most(session, 150 if limited else 10**9, with_gradient=True) as refused:
            _, norm = update(session, optimizer, rollout, scores, 1e-3)
        assert bool(refused) == bool(said) == limited
        adapters.append((norm, session.policy.state()))
    assert adapters[0][0] == pytest.approx(adapters[1][0], rel=1e-5)
    for name, value in adapters[0][1].items():
        torch.testing.assert_close(adapters[1][1][name], value, rtol=1e-4, atol=1e-6)


def test_a_run_with_a_full_card_ends_as_one_without_and_remembers(make_session: Callable[..., Session], tmp_path: Path) -> None:
    states = []
    for limited in (False, True):
        session, said = ready(make_session)
        run = RunDir.create(tmp_path / str(limited), session.recipe, environment(session))
        with at_most(session, 150 if limited else 10**9, with_gradient=True):
            assert train(session, run, Silent()).why == "finished"
        assert len(said) == limited  # once, at the first step
        found = run.load_checkpoint()
        assert found is not None
        assert found[1]["sizes"] == session.sizes.record()
        states.append(session.policy.state())
        widths = found[1]["sizes"]["update_tokens"]
        assert (widths <= 160) if limited else (widths == 256)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5)


def test_where_not_even_one_row_fits_it_is_one_sentence(make_session: Callable[..., Session]) -> None:
    session, _ = ready(make_session)
    with at_most(session, 3, with_gradient=False), pytest.raises(BaseError, match="even with one row at a time"):
        session.answers("policy", session.train.requests[:4], session.sampler("train"))


def test_other_errors_pass_and_short_prompts_leave_room_for_more_rows() -> None:
    sizes = Sizes(rows=8, rollout_tokens=400, read_tokens=100, update_tokens=100, chunk_tokens=16)
    assert [sizes.together(tokens) for tokens in (40, 100, 1000)] == [8, 4, 1]
    with pytest.raises(RuntimeError, match="shapes"), next(sizes.attempts("read_tokens")).of(4, 25):
        raise RuntimeError("shapes differ")
    copy = Sizes(1, 1, 1, 1, 1)
    copy.restore(sizes.record())
    assert copy == sizes


def test_narrower_batches_where_weights_stay_in_4_bits() -> None:
    """Sixty rows would be dequantised for on a 4070 and thirty-two not; few rows, a width that little helps and an unknown card stay."""
    fused = Fused.of_card("NVIDIA GeForce RTX 4070")
    assert (fused.all, fused.most) == (32, 128)
    assert [fused.together(64, fit) for fit in (8, 32, 60)] == [8, 32, 32]
    assert fused.together(128, 128) == 128
    assert Fused.of_card("RTX 4090").together(64, 57) == 57
    assert Fused.of_card("Some Card").together(64, 60) == Fused.of_card("").together(64, 60) == 60
    sizes = Sizes(rows=256, rollout_tokens=60 * 100, read_tokens=1, update_tokens=1, chunk_tokens=1, fused=fused)
    assert (sizes.together(100), sizes.together(100, 64)) == (60, 32)
    assert "fused" not in sizes.record()
