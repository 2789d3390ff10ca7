"""The chunked head: the model's own logits, the plain way's loss and gradient, and no tensor of all tokens × vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from iqlite.base.anatomy import Anatomy
from iqlite.errors import BaseError
from iqlite.method.estimators import ESTIMATORS
from iqlite.method.loss import Scoring, chunked_loss, chunked_statistics
from iqlite.method.objectives import OBJECTIVES
from iqlite.model.head import Head
from iqlite.recipe.schema import readings_of
from iqlite.records import Chunk
from iqlite.training.optimizer import make_optimizer
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import update
from tests.helpers.tiny import ARCHITECTURES, make_model

N, D, V = 23, 16, 40


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_gives_the_model_s_own_logits(architecture: str) -> None:
    model = make_model(architecture)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
        assert torch.equal(Head.of(Anatomy.of(model, architecture))(hidden), expected)
        assert expected.std() > 0.1


def test_a_model_without_linear_maps_is_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    with pytest.raises(BaseError, match=r"gpt2.*no linear maps in its layers"):  # its maps are transformers' Conv1D
        Anatomy.of(model, "gpt2")


def case(estimator: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def hidden() -> Tensor:
        return torch.randn(N, D, generator=generator, dtype=torch.float32).to(dtype)

    linear = nn.Linear(D, V, bias=False, dtype=dtype)
    linear.weight.data = torch.randn(V, D, generator=generator).to(dtype)
    linear.requires_grad_(False)
    names = [*readings_of(estimator)]
    if "behaviors" in names:
        names = [f"{side}:{key}" for key in ("kind", "short") for side in ("wanted", "unwanted")]
    scoring = Scoring(ESTIMATORS[estimator], readings_of(estimator), (("kind", 0.7), ("short", 0.5)))
    return {
        "head": Head(linear, scale=0.7, soft_cap=6.0),
        "hidden_nD": hidden(),
        "tokens_n": torch.randint(V, (N,), generator=generator),
        "hidden": {name: hidden() for name in ["reference", *names]},
        "scoring": scoring,
    }


def extras(objective: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    if objective != "policy-gradient":
        return {}
    return {"old_logp_n": -3 * torch.rand(N, generator=generator), "advantage_n": torch.randn(N, generator=generator)}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_loss_and_gradient_are_the_plain_way_s(estimator: str, objective: str) -> None:
    c = case(estimator)
    plain_D = c["hidden_nD"].clone().requires_grad_()
    log_superior = c["scoring"](c["head"], c["hidden"])[0]
    chunk = Chunk(c["tokens_n"], c["head"](plain_D).log_softmax(-1), log_superior, **extras(objective))
    expected = OBJECTIVES[objective](chunk)[0].mean()
    expected.backward()
    for chunk_tokens in (1, 5, N, 100):
        mine_D = c["hidden_nD"].clone().requires_grad_()
        loss, statistics = chunked_loss(
            c["head"],
            mine_D,
            c["tokens_n"],
            c["hidden"],
            c["scoring"],
            OBJECTIVES[objective],
            total_tokens=N,
            chunk_tokens=chunk_tokens,
            **extras(objective),
        )
        loss.backward()
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert torch.allclose(mine_D.grad, plain_D.grad, rtol=1e-4, atol=1e-6)
        assert statistics.means()["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
        assert all(len(values) == N for values in statistics.values.values())


def test_micro_batches_add_up_and_a_loss_scale_touches_the_gradient_only() -> None:
    c = case("contrastive")
    run = functools.partial(chunked_loss, objective=OBJECTIVES["full-kl"], scoring=c["scoring"], total_tokens=N, chunk_tokens=4)
    whole = c["hidden_nD"].clone().requires_grad_()
    loss, _ = run(c["head"], whole, c["tokens_n"], c["hidden"])
    loss.backward()
    parts = c["hidden_nD"].clone().requires_grad_()
    losses = []
    for at in (slice(0, 7), slice(7, N)):
        part, _ = run(c["head"], parts[at], c["tokens_n"][at], {k: v[at] for k, v in c["hidden"].items()}, loss_scale=8.0)
        part.backward()
        losses.append(float(part))
    assert sum(losses) == pytest.approx(float(loss), rel=1e-6)
    assert torch.allclose(parts.grad / 8.0, whole.grad, rtol=1e-5, atol=1e-8)


def test_statistics_without_a_gradient_are_those_of_the_loss() -> None:
    c = case("contrastive")
    _, with_loss = chunked_loss(
        c["head"], c["hidden_nD"], c["tokens_n"], c["hidden"], c["scoring"], OBJECTIVES["full-kl"], total_tokens=N, chunk_tokens=6
    )
    alone = chunked_statistics(c["head"], c["hidden_nD"], c["tokens_n"], c["hidden"], c["scoring"], chunk_tokens=6)
    assert all(torch.equal(alone.values[name], with_loss.values[name]) for name in alone.values)


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    n, vocabulary, chunk_tokens = 256, 5_000, 16
    linear = nn.Linear(D, vocabulary, bias=False).requires_grad_(False)
    hidden = {name: torch.randn(n, D) for name in ("reference", "wanted", "unwanted")}
    scoring = Scoring(ESTIMATORS["contrastive"], readings_of("contrastive"))
    for objective in OBJECTIVES.values():
        with Largest() as largest:
            states = torch.randn(n, D, requires_grad=True)
            loss, _ = chunked_loss(
                Head(linear), states, torch.zeros(n, dtype=torch.long), hidden, scoring, objective, total_tokens=n, chunk_tokens=chunk_tokens,
                old_logp_n=torch.zeros(n), advantage_n=torch.ones(n),
            )  # fmt: skip
            loss.backward()
        assert largest.elements <= max(chunk_tokens * vocabulary, D * vocabulary)  # a chunk's logits, or the head's own weight


@pytest.mark.parametrize("objective", ["squared", "full-kl"])
def test_a_whole_step_makes_no_tensor_of_all_logits(
    objective: str, tiny: Callable[..., Path], make_session: Callable[..., Session]
) -> None:
    """Rollout, readings and update at a real vocabulary: nothing grows with B·T·V, only a chunk, a decoded column and the head do."""
    vocabulary, hidden, prompts, new_tokens = 152_064, 16, 4, 24
    session = make_session(
        model={"base": str(tiny(vocab_size=vocabulary, hidden_size=hidden))},
        objective={"name": objective},
        rollout={"prompts_per_step": prompts, "max_new_tokens": new_tokens},
        train={"chunk_tokens": 8},
    )
    with Largest() as largest:
        rollout = session.answers("policy", session.train.requests[:prompts], session.sampler("train"))
        scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
        update(session, make_optimizer(session.policy, "adamw"), rollout, scores, 1e-3)
    assert int(rollout.mask_BT.sum()) > 2 * hidden
    assert largest.elements <= hidden * vocabulary  # the head's own weight; a chunk is half of it, all logits would be over twice
