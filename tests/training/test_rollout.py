"""Sampling: the mask, noise that is a function of its arguments, the frequencies it gives, and the same ids however the batch is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from iqlite.model.sampling import Sampler, choose, noise
from iqlite.training.rollout import response_mask
from iqlite.training.session import Session
from tests.helpers.tiny import shake

STOP = (2, 7)


def test_the_mask_keeps_the_first_end_of_turn_even_where_padding_is_the_same_id() -> None:
    tokens = torch.tensor([[5, 2, 2, 2], [5, 6, 5, 6], [7, 2, 2, 2], [5, 5, 5, 2]])
    mask, ended = response_mask(tokens, STOP)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert ended.tolist() == [True, False, True, True]


def test_noise_is_a_function_of_its_arguments_and_uniform() -> None:
    index = list(range(4000))
    first = noise(1, "train", 2, index, 3)
    assert torch.equal(first, noise(1, "train", 2, index, 3))
    assert torch.equal(first[[17, 5]], noise(1, "train", 2, [17, 5], 3))  # of the prompt, not of its place in the batch
    for other in ((0, "train", 2, index, 3), (1, "eval", 2, index, 3), (1, "train", 1, index, 3), (1, "train", 2, index, 4)):
        correlation = float(np.corrcoef(first, noise(*other))[0, 1])
        assert abs(correlation) < 0.06
    assert float(first.min()) >= 0 and float(first.max()) < 1
    counts = torch.histc(first, 10, 0, 1)
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9  # χ² with 9 degrees of freedom, p = 0.001


def test_frequencies_are_the_distribution_s() -> None:
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -3.0])
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (1.0, 0.7):
        found = torch.bincount(choose(logits.expand(20_000, -1), uniform, temperature, 1.0), minlength=5) / 20_000
        assert torch.allclose(found, (logits / temperature).softmax(-1), atol=1e-4)
    # top-p 0.8: the two likeliest tokens hold 0.86, the likeliest alone 0.59
    kept = logits.softmax(-1) * torch.tensor([1, 0, 0, 1, 0])
    found = torch.bincount(choose(logits.expand(20_000, -1), uniform, 1.0, 0.8), minlength=5) / 20_000
    assert torch.allclose(found, kept / kept.sum(), atol=1e-4)
    assert choose(logits[None], torch.tensor([0.999]), 0.0, 1.0).tolist() == [3]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_sorted_one(top_p: float) -> None:
    """Against a full sort, on a flat distribution where the short look at the likeliest tokens doesn't suffice and on a sharp one."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    for scale in (0.1, 6.0):
        logits = torch.randn(64, 5_000, generator=generator) * scale
        found = choose(logits, uniform, 1.0, top_p)
        for row in range(64):
            probs = logits[row].softmax(-1).double()
            order = sorted(range(5_000), key=lambda a: -float(probs[a]))
            held, total = [], 0.0
            for token in order:
                held.append(token)
                total += float(probs[token])
                if total >= top_p:
                    break
            assert int(found[row]) in held


def test_greedy_is_the_model_s_own_greedy(make_session: Callable[..., Session]) -> None:
    session = make_session(rollout={"max_new_tokens": 12})
    shake(session.policy)
    sampler = replace(session.sampler("train"), temperature=0.0)
    rollout = session.answers("policy", session.train.requests, sampler)
    for row, prompt in enumerate(rollout.prompt_ids):
        with torch.no_grad():
            session.policy.model.eval()
            out = session.policy.model.generate(
                input_ids=torch.tensor([prompt]),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=list(session.chat.stop_ids),
                pad_token_id=0,
            )
        assert out[0, len(prompt) :].tolist() == rollout.response_ids(row)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_ids_don_t_depend_on_how_the_batch_is_split(make_session: Callable[..., Session], quantization: str) -> None:
    session = make_session(rollout={"max_new_tokens": 24}, model={"quantization": quantization})
    shake(session.policy)
    requests = [({"role": "user", "content": "why? " * (1 + number % 5)},) for number in range(16)]
    sampler = session.sampler("train")
    wide = session.answers("policy", requests, sampler)
    differing = 0
    for rows in (1, 3, 8):
        narrow = replace(
            session, recipe=session.recipe.model_copy(update={"rollout": session.recipe.rollout.model_copy(update={"batch": rows})})
        )
        found = narrow.answers("policy", requests, sampler)
        differing += sum(found.response_ids(row) != wide.response_ids(row) for row in range(16))
        order = list(reversed(range(16)))
        turned = narrow.answers("policy", [requests[i] for i in order], sampler, index=order)
        differing += sum(turned.response_ids(row) != wide.response_ids(15 - row) for row in range(16))
    print(f"{differing} of 96 responses differ")
    assert differing <= 2  # a draw within rounding of a boundary between two tokens
    assert len({tuple(wide.response_ids(row)) for row in range(16)}) == 16


def test_what_comes_after_the_end_is_masked(make_session: Callable[..., Session]) -> None:
    session = make_session(rollout={"max_new_tokens": 40})
    stop = tuple(range(0, 256, 3))  # a third of all bytes end a turn, so that rows end early and apart
    session.chat.stop_ids = stop
    rollout = session.answers("policy", session.train.requests, session.sampler("train"))
    assert len(set(rollout.mask_BT.sum(-1).tolist())) > 1
    for row in range(len(rollout.index)):
        ids = rollout.response_ids(row)
        assert not set(ids[:-1]) & set(stop)
        assert (ids[-1] in stop) == bool(rollout.ended_B[row])


def test_sampling_settings_come_from_the_recipe_alone(make_session: Callable[..., Session]) -> None:
    session = make_session(rollout={"temperature": 0.8, "top_p": 0.9}, train={"seed": 5})
    session.policy.base.model.generation_config.update(temperature=0.01, top_k=1, do_sample=False)
    assert session.sampler("train") == Sampler(5, 6, 0.8, 0.9, "train")
    rollout = session.answers("policy", session.train.requests, session.sampler("train"))
    greedy = session.answers("policy", session.train.requests, replace(session.sampler("train"), temperature=0.0))
    assert not torch.equal(rollout.tokens_BT, greedy.tokens_BT)
