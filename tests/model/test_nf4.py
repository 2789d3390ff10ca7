"""NF4 through bitsandbytes: the gradients of the same weights dequantised, before and after a rollout; memory held once; a broken install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from iqlite.base.loading import load_base
from iqlite.errors import BaseError
from iqlite.model.policy import Policy
from iqlite.run.rundir import RunDir
from iqlite.training.loop import train
from iqlite.training.opening import environment
from iqlite.training.session import Session
from tests.helpers.reporters import Silent
from tests.helpers.tensors import gradients, tensors_of, training_rollout

NF4 = {"quantization": "nf4"}
WHOLE = {"max_grad_norm": 1e9}


def test_gradients_are_those_of_the_same_weights_dequantised(make_session: Callable[..., Session]) -> None:
    quantised = make_session(model=NF4, train=WHOLE)
    plain = make_session(train=WHOLE)
    weights = {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in quantised.policy.model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    assert len(weights) == 14  # seven linear layers in each of two blocks; head and embeddings stay
    assert all(module.weight.quant_state.nested for module in quantised.policy.model.modules() if isinstance(module, bnb.nn.Linear4bit))
    rollout = training_rollout(quantised)
    other = gradients(make_session(train=WHOLE), rollout)
    for name, weight in weights.items():
        plain.policy.model.get_submodule(name).weight.data = weight
    found, expected = gradients(quantised, rollout), gradients(plain, rollout)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-4
    assert all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4 * largest) for name in expected)
    assert not all(torch.allclose(found[name], other[name], rtol=1e-3, atol=1e-4 * largest) for name in other)  # NF4 does round


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma", "olmo2"])
def test_gradients_are_the_same_before_and_after_a_rollout(
    architecture: str, make_session: Callable[..., Session], tiny: Callable[..., Path]
) -> None:
    """bitsandbytes repacks NF4 weights at the first forward in evaluation mode on some CPUs, and its packed product has no backward."""
    rollout = training_rollout(make_session(model=NF4 | {"base": str(tiny(architecture))}, train=WHOLE))
    fresh = make_session(model=NF4 | {"base": str(tiny(architecture))}, train=WHOLE)
    before = gradients(fresh, rollout)
    training_rollout(fresh)
    after = gradients(fresh, rollout)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(gradient.abs().max() > 0 for name, gradient in before.items() if "lora_B" in name)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in fresh.policy.model.modules())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma", "olmo2"])
def test_a_whole_nf4_run(architecture: str, tiny: Callable[..., Path], make_session: Callable[..., Session], tmp_path: Path) -> None:
    session = make_session(
        model=NF4 | {"base": str(tiny(architecture))},
        train={"steps": 20, "eval_every": 20, "learning_rate": 1e-2},
        rollout={"max_new_tokens": 12},
    )
    fixed = session.answers("reference", session.train.requests, session.sampler("fixed"))
    before = session.score(fixed).means()["kl/policy_superior"]
    run = RunDir.create(tmp_path / "run", session.recipe, environment(session))
    assert train(session, run, Silent()).why == "finished"
    after = session.score(fixed).means()["kl/policy_superior"]
    assert after < 0.8 * before
    assert abs(run.metrics()[1]["kl/policy_reference"]) < 1e-7  # a fresh adapter is the reference
    assert (run.adapter / "adapter_model.safetensors").is_file()


def test_the_base_is_held_once_and_a_policy_adds_its_adapter_only(tiny: Callable[..., Path]) -> None:
    """Bytes of unique storages: 4-bit weights with their quantisation state, embeddings and head as they were, LoRA in float32."""
    wide = {"hidden_size": 256, "intermediate_size": 512}
    base = load_base(str(tiny(**wide)), "nf4")
    before = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for _, tensor in tensors_of(base.model)}
    policy = Policy(base, rank=4, alpha=8.0, seed=0)
    after = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for _, tensor in tensors_of(policy.model)}
    assert before.items() <= after.items()
    assert sum(after.values()) - sum(before.values()) == sum(p.nbytes for p in policy.parameters.values())
    linear = sum(m.in_features * m.out_features for m in base.model.modules() if isinstance(m, bnb.nn.Linear4bit))
    rest = sum(t.nbytes for n, t in tensors_of(base.model) if "embed" in n or "lm_head" in n or "norm" in n)
    assert linear / 2 <= sum(before.values()) - rest <= linear * 0.6  # half a byte a weight, its scales and tables


def test_float32_base_tensors_on_a_cpu_are_embedding_and_head_at_most(tiny: Callable[..., Path]) -> None:
    base = load_base(str(tiny(hidden_size=256, intermediate_size=2048)), "nf4")
    large = [name for name, tensor in tensors_of(base.model) if tensor.dtype == torch.float32 and tensor.nbytes > 2**18]
    assert large and all("embed_tokens" in name or "lm_head" in name for name in large)


def test_missing_bitsandbytes_is_one_sentence(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python does for a package that isn't there
    with pytest.raises(BaseError, match=r"needs bitsandbytes, which can't be imported.*quantization = \"none\""):
        load_base(str(tiny()), "nf4")
    assert load_base(str(tiny()), "none").quantization == "none"


def test_broken_bitsandbytes_is_one_sentence(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA Setup failed despite GPU being available\nand much more text")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    with pytest.raises(BaseError, match=r"doesn't work on this machine \(CUDA Setup failed despite GPU being available\)"):
        load_base(str(tiny()), "nf4")
    monkeypatch.undo()
    monkeypatch.setattr("bitsandbytes.matmul_4bit", lambda x, packed, state: torch.zeros(64, 64))
    with pytest.raises(BaseError, match="multiplies wrongly"):
        load_base(str(tiny()), "nf4")
