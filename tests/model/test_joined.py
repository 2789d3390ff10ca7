"""Joined adapters and fused norms: the plain forward's logits, with fewer operations and no casts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iqlite.base.loading import load_base
from iqlite.model.joined import fusible
from iqlite.model.policy import Policy
from tests.helpers.tiny import ARCHITECTURES, make_model, shake

FUSED = {"llama", "qwen2", "mistral", "olmo2", "granite"}
"""Gemma's weights are offsets from one and stay exact in float32; Cohere's is a layer norm."""


class Counted(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function._schema.name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))


def opened(folder: Path, dtype: torch.dtype) -> Policy:
    """A policy that computes in `dtype` and decodes as on a card."""
    base = load_base(str(folder), "none")
    policy = Policy(base, rank=4, alpha=6.0, seed=0)  # 6 / 4: a scale that isn't a power of two
    shake(policy)
    for module in base.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if "lora" not in name and not parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter.to(dtype), requires_grad=False))
    object.__setattr__(base, "compute_dtype", dtype)
    policy.forward.steady = True
    return policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_logits_are_the_plain_ones(architecture: str, tiny: Callable[..., Path]) -> None:
    """Read twice: the first forward finds out which layers belong together, the second has them joined."""
    policy = opened(tiny(architecture), torch.float32)
    policy.add_ema()
    policy.update_ema(0.5)
    ids = torch.arange(30).reshape(2, 15)
    found = {}
    for role in ("policy", "ema", "reference"):
        with policy.acting_as(role):
            plain = policy.model(input_ids=ids).logits
        with policy.acting_as(role, decoding=True):
            first, second = (policy.model(input_ids=ids).logits for _ in range(2))
        for logits in (first, second):
            torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
        with policy.acting_as(role):
            assert torch.equal(policy.model(input_ids=ids).logits, plain)  # nothing stays
        found[role] = plain
    assert not torch.allclose(found["policy"], found["reference"], atol=1e-2)


def test_a_layer_in_16_bits_takes_half_the_operations(tiny: Callable[..., Path]) -> None:
    """Of a Llama layer: one product with A for q, k and v, one for gate and up; each B's adds to its base's; two operations for two norms."""
    policy = opened(tiny("llama"), torch.bfloat16)
    ids, counts = torch.arange(8).reshape(8, 1), {}
    for decoding in (False, True):
        with policy.acting_as("policy", decoding=decoding):
            policy.forward.decoder(input_ids=ids, use_cache=False)
            with Counted() as counted:
                policy.forward.decoder(input_ids=ids, use_cache=False)
        counts[decoding] = counted.calls
    layers, plain, fewer = len(policy.forward.layers), counts[False], counts[True]
    assert fewer["addmm_"] == 7 * layers
    assert plain["mm"] + plain["bmm"] - fewer["mm"] - fewer["bmm"] == 3 * layers  # 7 A's are 4 products
    assert plain["_to_copy"] - fewer["_to_copy"] >= 14 * layers


def test_16_bits_are_as_near_the_exact_logits_as_before(tiny: Callable[..., Path]) -> None:
    ids = torch.arange(30).reshape(2, 15)
    exact = opened(tiny("llama"), torch.float32)
    with exact.acting_as("policy"):
        right = exact.model(input_ids=ids).logits
    policy, errors = opened(tiny("llama"), torch.bfloat16), []
    for decoding in (False, True):
        with policy.acting_as("policy", decoding=decoding):
            policy.model(input_ids=ids)
            errors.append(float((policy.model(input_ids=ids).logits.float() - right).std()))
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_are_fused_where_they_are_torch_s(architecture: str) -> None:
    decoder = make_model(architecture).get_decoder()
    norms = [module for module in decoder.modules() if "RMSNorm" in type(module).__name__]
    assert set(fusible(decoder, torch.float32)) == (set(norms) if architecture in FUSED else set())
    assert not fusible(decoder, torch.bfloat16)  # of another dtype than what it is given: torch wouldn't fuse it


def test_layers_that_get_other_inputs_later_are_computed_alone(tiny: Callable[..., Path]) -> None:
    """A group is made of what the first forward showed; a call with another tensor must not take its product."""
    policy = opened(tiny("llama"), torch.float32)
    attention: Any = policy.forward.layers[0].self_attn
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    with policy.acting_as("policy"):
        plain = [attention.q_proj(x), attention.k_proj(y), attention.v_proj(x)]
    with policy.acting_as("policy", decoding=True):
        for _ in range(2):
            attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        found = [attention.q_proj(x), attention.k_proj(y), attention.v_proj(x)]
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
