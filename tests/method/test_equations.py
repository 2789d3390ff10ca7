"""Estimators and objectives against the loops of `oracle.py`, and docs/method.md's claims about them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iqlite.method.estimators import ESTIMATORS, contrastive, prompted
from iqlite.method.objectives import OBJECTIVES, advantages, kl, token_reward
from iqlite.records import Chunk
from tests.helpers import oracle

ATOL = 2e-4  # float32 against float64 at log-probabilities down to about -100
SHAPE = st.tuples(st.integers(1, 4), st.integers(2, 9), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 2**31))


def logits(n: int, vocabulary: int, scale: float, seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, vocabulary, generator=generator) * scale for _ in range(count)]


def readings(name: str, tensors: list[Tensor]) -> list[Any]:
    """The tensors in the form that an estimator asks for."""
    wanted = list(inspect.signature(ESTIMATORS[name]).parameters.values())[1:]
    if wanted[0].name == "behaviors":
        return [[(0.7, tensors[1], tensors[2]), (0.4, tensors[3], tensors[4])]]
    return tensors[1 : 1 + sum(p.kind is not p.KEYWORD_ONLY for p in wanted)]


@pytest.mark.parametrize("name", ESTIMATORS)
@given(shape=SHAPE, strength=st.sampled_from([0.0, 0.5, 3.0]))
@settings(max_examples=25, deadline=None)
def test_estimators_are_equation_3(name: str, shape: tuple[int, int, float, int], strength: float) -> None:
    tensors = logits(*shape, count=5)
    given_readings = readings(name, tensors)
    found, metrics = ESTIMATORS[name](tensors[0], *given_readings, strength=strength)
    for row in range(shape[0]):
        reference = tensors[0][row].tolist()
        clip, plausibility = 5.0, 1e-4
        if name == "prompted":
            pairs, clip, plausibility = [(1.0, given_readings[0][row].tolist(), reference)], math.inf, 0.0
        elif name == "mixture":
            pairs = [(w, a[row].tolist(), b[row].tolist()) for w, a, b in given_readings[0]]
        else:
            pairs = [(1.0, given_readings[0][row].tolist(), given_readings[1][row].tolist())]
        expected = oracle.superior(reference, pairs, strength, clip, plausibility)
        assert found[row].tolist() == pytest.approx(expected, abs=ATOL, rel=1e-5)
    assert all(value.shape == (shape[0],) and torch.isfinite(value).all() for value in metrics.values())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_contrast_or_no_strength_gives_the_reference_to_the_bit(name: str) -> None:
    tensors = logits(5, 50, 3.0, 0, count=5)
    reference = tensors[0].log_softmax(-1)
    still, _ = ESTIMATORS[name](tensors[0], *readings(name, tensors), strength=0.0)
    assert torch.equal(still, reference)
    same = [tensors[0]] * 5 if name == "prompted" else [tensors[0], tensors[1], tensors[1], tensors[3], tensors[3]]
    alike, _ = ESTIMATORS[name](tensors[0], *readings(name, same))
    assert torch.equal(alike, reference)


def test_the_superior_policy_is_a_distribution_and_prefers_the_wanted_tokens() -> None:
    reference = torch.zeros(1, 4)
    wanted, unwanted = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    found = contrastive(reference, wanted, unwanted)[0].exp()[0]
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-6)
    assert found[0] > found[2] == found[3] > found[1]


def test_plain_context_distillation_at_strength_one() -> None:
    reference, wanted = logits(3, 20, 2.0, 1, count=2)
    assert torch.allclose(prompted(reference, wanted)[0], wanted.log_softmax(-1), atol=1e-5)


def test_implausible_tokens_keep_the_reference_s_odds() -> None:
    reference = torch.tensor([[10.0, 9.0, -10.0, -11.0]])
    wanted, unwanted = torch.tensor([[0.0, 1.0, 9.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 9.0]])
    found, metrics = contrastive(reference, wanted, unwanted)
    assert float(found[0, 2] - found[0, 3]) == pytest.approx(1.0, abs=1e-5)
    expected = sum(math.exp(z) for z in (-10, -11)) / sum(math.exp(z) for z in (10, 9, -10, -11))
    assert float(metrics["superior/implausible_mass"]) == pytest.approx(expected, rel=1e-4)


def chunk_of(shape: tuple[int, int, float, int]) -> Chunk:
    policy, superior = (x.log_softmax(-1) for x in logits(*shape, count=2))
    generator = torch.Generator().manual_seed(shape[3])
    tokens = torch.randint(shape[1], (shape[0],), generator=generator)
    old = policy.gather(-1, tokens[:, None])[:, 0] + 0.3 * torch.randn(shape[0], generator=generator)
    return Chunk(tokens, policy, superior, old, torch.randn(shape[0], generator=generator))


@pytest.mark.parametrize("name", OBJECTIVES)
@given(shape=SHAPE)
@settings(max_examples=25, deadline=None)
def test_objectives_are_equation_5(name: str, shape: tuple[int, int, float, int]) -> None:
    chunk = chunk_of(shape)
    found, _ = OBJECTIVES[name](chunk)
    assert chunk.old_logp_n is not None and chunk.advantage_n is not None
    for row in range(shape[0]):
        expected = oracle.loss(
            name, chunk.logp_policy_nV[row].tolist(), chunk.logp_superior_nV[row].tolist(), int(chunk.tokens_n[row]),
            float(chunk.old_logp_n[row]), float(chunk.advantage_n[row]),
        )  # fmt: skip
        assert float(found[row]) == pytest.approx(expected, abs=ATOL, rel=1e-4)


def test_the_reward_s_on_policy_mean_is_minus_the_kl() -> None:
    policy, superior = (x.log_softmax(-1).double() for x in logits(1, 12, 2.0, 3, count=2))
    tokens = torch.arange(12)
    rewards = token_reward(Chunk(tokens, policy.expand(12, -1), superior.expand(12, -1)))
    assert float((policy[0].exp() * rewards).sum()) == pytest.approx(-float(kl(policy, superior)), abs=1e-12)


def test_closed_form_gradient_6_is_autograd() -> None:
    z, superior = (x.double() for x in logits(4, 11, 2.0, 5, count=2))
    z.requires_grad_()
    chunk = Chunk(torch.zeros(4, dtype=torch.long), z.log_softmax(-1), superior.log_softmax(-1))
    (gradient,) = torch.autograd.grad(OBJECTIVES["full-kl"](chunk)[0].sum(), z)
    for row in range(4):
        expected = oracle.full_kl_gradient(oracle.log_softmax(z[row].tolist()), oracle.log_softmax(superior[row].tolist()))
        assert gradient[row].tolist() == pytest.approx(expected, abs=1e-12)


def action_gradients(name: str, z: Tensor, superior: Tensor, tokens: Tensor) -> Tensor:
    """Gradient in the logits [len(tokens), V] of one state's loss, for each sampled action."""
    leaf = z.expand(len(tokens), -1).clone().requires_grad_()
    logp, logq = leaf.log_softmax(-1), superior.expand(len(tokens), -1)
    old = logp.detach().gather(-1, tokens[:, None])[:, 0]
    reward = logq.gather(-1, tokens[:, None])[:, 0] - old
    objective: Callable[..., Any] = OBJECTIVES[name]
    loss_n, _ = objective(Chunk(tokens, logp, logq, old, reward))
    return torch.autograd.grad(loss_n.sum(), leaf)[0]


@pytest.mark.parametrize("name", ["squared", "policy-gradient"])
def test_mean_sampled_gradients_are_full_kl_s(name: str) -> None:
    z, superior = (x.double() for x in logits(1, 9, 1.5, 8, count=2))
    superior = superior.log_softmax(-1)
    policy = z.softmax(-1)[0]
    exact = action_gradients("full-kl", z, superior, torch.tensor([0]))[0]
    every = action_gradients(name, z, superior, torch.arange(9))
    assert torch.allclose((policy[:, None] * every).sum(0), exact, atol=1e-12)
    tokens = torch.multinomial(policy, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    sampled = action_gradients(name, z, superior, tokens)
    error = sampled.std(0) / len(tokens) ** 0.5
    assert ((sampled.mean(0) - exact).abs() < 4.5 * error + 1e-12).all()  # 4.5 standard errors over 9 coordinates
    assert (sampled.std(0) > 0).all()  # the variance that full-kl doesn't have


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("centre", [False, True])
def test_advantages(gamma: float, centre: bool) -> None:
    rewards = [[1.0, -2.0, 0.5, 4.0], [3.0], [0.25, 0.75]]
    mask = torch.tensor([[t < len(row) for t in range(4)] for row in rewards])
    padded = torch.tensor([row + [99.0] * (4 - len(row)) for row in rewards])  # what stands behind the mask must not matter
    found = advantages(padded, mask, gamma=gamma, centre=centre)
    expected = oracle.advantages(rewards, gamma, centre)
    assert [found[row][mask[row]].tolist() for row in range(3)] == [pytest.approx(row) for row in expected]
    assert (found[~mask] == 0).all()


def test_every_method_says_what_it_is_and_has_settings_with_defaults() -> None:
    for functions in (ESTIMATORS, OBJECTIVES):
        for function in functions.values():
            assert function.__doc__
            assert all(p.default is not p.empty for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)
