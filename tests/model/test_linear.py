"""The lean adapted layer against PEFT's own, blocks and folding against a float64 product, shared prefixes against a plain forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from iqlite.base.loading import load_base
from iqlite.model.linear import FEW_ROWS, FewRows, few_rows_product, folded, is_few
from iqlite.model.policy import Policy
from tests.helpers.tiny import ARCHITECTURES, shake


@pytest.mark.parametrize("rows", [1, 7, FEW_ROWS])
@pytest.mark.parametrize("out", [96, 127, 192, 640])  # one block, a prime without any, several
def test_blocks_are_the_product(rows: int, out: int) -> None:
    x, weight, bias = torch.randn(rows, 1, 24), torch.randn(out, 24), torch.randn(out)
    exact = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(few_rows_product(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-5)
    leaf, twin = (x.clone().requires_grad_() for _ in range(2))
    pull = torch.randn(rows, 1, out)
    (FewRows.apply(leaf, weight, bias) * pull).sum().backward()
    (torch.nn.functional.linear(twin, weight, bias) * pull).sum().backward()
    assert leaf.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-5, atol=1e-5)
    assert is_few(x) == (rows <= FEW_ROWS)
    assert not is_few(torch.zeros(FEW_ROWS + 1, 24))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_lean_layer_is_peft_s_with_its_gradient(tiny: Callable[..., Path], quantization: str) -> None:
    """On few and on many rows, adapter on and off; PEFT's own layers on an equal base are the other side."""
    folder, ids = str(tiny()), torch.arange(60).reshape(2, 30)
    policy = Policy(load_base(folder, quantization), rank=4, alpha=8.0, seed=0)
    shake(policy)
    config = LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(load_base(folder, quantization).model, config)
    peft.load_state_dict(policy.model.state_dict(), strict=False)
    many = torch.arange(FEW_ROWS * 2 + 40).reshape(2, -1) % 250
    for tokens in (ids, many):
        ours, theirs = (model(input_ids=tokens).logits.log_softmax(-1)[..., 0].sum() for model in (policy.model, peft))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        ours.backward()
        theirs.backward()
    gradients = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    assert len(gradients) == len(policy.parameters)
    for name, parameter in policy.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)
    with torch.no_grad(), policy.acting_as("reference"), peft.disable_adapter():
        torch.testing.assert_close(policy.model(input_ids=ids).logits, peft(input_ids=ids).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_folding_is_the_sum_and_leaves_nothing_behind(tiny: Callable[..., Path], quantization: str) -> None:
    policy = Policy(load_base(str(tiny()), quantization), rank=4, alpha=8.0, seed=0)
    shake(policy)
    ids = torch.arange(40).reshape(2, 20)
    parameters = {name for name, _ in policy.model.named_parameters()}
    for role in ("policy", "reference"):
        with policy.acting_as(role):
            plain = policy.model(input_ids=ids).logits
        with policy.acting_as(role, folded=True):
            one = policy.model(input_ids=ids).logits
            layer = next(m for m in policy.model.modules() if hasattr(m, "lora_A"))
            assert layer.folded is not None
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-4)
        with policy.acting_as(role):
            assert torch.equal(policy.model(input_ids=ids).logits, plain)
    assert {name for name, _ in policy.model.named_parameters()} == parameters
    with pytest.raises(RuntimeError), folded(policy.model):
        raise RuntimeError
    assert layer.folded is None


def states(policy: Policy, prompts: list[list[int]], responses: list[list[int]], shared: list[list[int]]) -> Tensor:
    return policy.forward.hidden_states(prompts, responses, max(map(len, responses)), shared)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prefixes_change_neither_states_nor_gradients(architecture: str, checkpointing: bool, tiny: Callable[..., Path]) -> None:
    """Prompts that begin alike, of two kinds and with one that doesn't, against the plain forward over every whole row."""
    policy = Policy(load_base(str(tiny(architecture)), "none"), rank=4, alpha=8.0, seed=0, checkpointing=checkpointing)
    shake(policy)
    one, two = list(range(3, 15)), list(range(40, 60))
    prompts = [[*one, 70, 71], [*one, 80], [*two, 90, 91, 92], [*two, 93], [100, 101, 102]]
    responses = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16]]
    shared: list[list[int]] = [one, one, two, two, []]
    found = []
    for begins in (shared, []):
        policy.model.zero_grad()
        hidden_BTD = states(policy, prompts, responses, begins)
        (hidden_BTD * torch.linspace(0.5, 1.5, hidden_BTD.numel()).view_as(hidden_BTD)).sum().backward()
        gradients = {}
        for name, parameter in policy.parameters.items():
            assert parameter.grad is not None
            gradients[name] = parameter.grad.clone()
        found.append((hidden_BTD.detach(), gradients))
        with policy.acting_as("policy"):
            torch.testing.assert_close(states(policy, prompts, responses, begins), found[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-3, atol=1e-3)
    assert float(found[0][0].abs().max()) > 0.1


def test_a_frozen_role_s_prefix_is_computed_once_a_run_and_a_moving_one_s_anew(tiny: Callable[..., Path]) -> None:
    policy = Policy(load_base(str(tiny()), "none"), rank=4, alpha=8.0, seed=0)
    ids = list(range(3, 20))
    with policy.acting_as("reference"):
        first = policy.forward.prefix(ids)
        assert policy.forward.prefix(ids) is first
    with policy.acting_as("policy"):
        before = policy.forward.prefix(ids)
    shake(policy)
    with policy.acting_as("policy"):
        after = policy.forward.prefix(ids)
    assert not torch.equal(before.keys[1], after.keys[1])
    with policy.acting_as("reference"):
        assert policy.forward.prefix(ids) is first
