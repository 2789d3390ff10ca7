"""One base, roles by toggling adapters: the bare base to the bit, gradients in the policy's LoRA alone, adapters that PEFT alone loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from iqlite.base.loading import load_base
from iqlite.errors import AdapterError
from iqlite.model.policy import Policy
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import update
from tests.helpers.tensors import gradients, training_rollout
from tests.helpers.tiny import save_tiny, shake

IDS = torch.arange(30).reshape(2, 15)


def logits_as(policy: Policy, role: str) -> Tensor:
    with policy.acting_as(role):
        logits: Tensor = policy.model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_adapters_off_is_the_bare_base_to_the_bit(tiny: Callable[..., Path], quantization: str) -> None:
    base = load_base(str(tiny()), quantization)
    with torch.no_grad():
        bare = base.model(input_ids=IDS).logits.clone()
    policy = Policy(base, rank=4, alpha=8.0, seed=0)
    assert torch.equal(logits_as(policy, "reference"), bare)
    assert torch.equal(logits_as(policy, "policy"), bare)  # B = 0: KL(policy‖reference) is 0 at step 0
    shake(policy)
    policy.add_ema()
    assert not torch.allclose(logits_as(policy, "policy"), bare, atol=1e-3)
    assert torch.equal(logits_as(policy, "ema"), logits_as(policy, "policy"))
    assert torch.equal(logits_as(policy, "reference"), bare)


def test_a_seed_draws_the_adapter_and_nothing_else(tiny: Callable[..., Path]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(5)
        states.append(Policy(load_base(str(tiny()), "none"), rank=4, alpha=8.0, seed=seed).state())
        assert torch.equal(torch.rand(3), expected)  # the caller's generator is left alone
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_every_lora_b_learns_and_nothing_else(make_session: Callable[..., Session], tmp_path: Path) -> None:
    other = make_session().policy
    shake(other, seed=9)
    folder = tmp_path / "other"
    folder.mkdir()
    other.save_adapter(folder)
    session = make_session(
        superior={"estimator": "adapter", "adapter": str(folder), "weights": "ema"},
        train={"max_grad_norm": 1e9},
        behavior={"wanted": None, "unwanted": None},
    )
    policy = session.policy
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters() if name not in policy.parameters}
    rollout = training_rollout(session)
    scores = read(policy, session.chat, rollout, session.readings, session.sizes)
    optimizer = torch.optim.SGD(list(policy.parameters.values()), 1.0)
    update(session, optimizer, rollout, scores, 1.0)
    for name, parameter in policy.parameters.items():
        if "lora_B" in name:
            assert torch.isfinite(parameter).all() and parameter.abs().max() > 0, name
    frozen = {name: p for name, p in policy.model.named_parameters() if name not in policy.parameters}
    assert any(".ema." in name for name in frozen) and any(".adapter." in name for name in frozen)
    for name, parameter in frozen.items():
        assert parameter.grad is None and not parameter.requires_grad
        if ".ema." not in name:
            assert torch.equal(parameter, before[name]), name
    rate = session.recipe.superior.ema_rate
    for name, parameter in policy.parameters.items():
        average = frozen[name.replace(".default.", ".ema.")]
        was = before[name.replace(".default.", ".ema.")]
        assert torch.allclose(average, (1 - rate) * was + rate * parameter, atol=1e-7)


def test_checkpointing_and_micro_batches_don_t_change_the_gradients(make_session: Callable[..., Session]) -> None:
    wide = {"max_grad_norm": 1e9, "batch_tokens": 4096}
    session = make_session(train=wide)
    rollout = training_rollout(session)
    plain = gradients(session, rollout)
    assert sum(float(g.abs().sum()) for g in plain.values()) > 0
    for other in (
        {"checkpointing": "on"},
        {"checkpointing": "offload"},
        {"batch_tokens": 1},
        {"batch_tokens": 150, "chunk_tokens": 2},
        {"checkpointing": "on", "batch_tokens": 100},
    ):
        found = gradients(make_session(train=wide | other), rollout)
        assert all(torch.allclose(found[name], plain[name], rtol=1e-4, atol=1e-6) for name in plain), other


def test_a_role_block_is_for_scoring_and_restores_everything(make_session: Callable[..., Session]) -> None:
    policy = make_session(superior={"weights": "ema"}).policy
    pinned = set(policy.parameters)

    def learning() -> set[str]:
        return {name for name, p in policy.model.named_parameters() if p.requires_grad}

    assert learning() == pinned
    for role in ("policy", "reference", "ema"):
        with pytest.raises(KeyError, match="the block fails"), policy.acting_as(role):
            assert not policy.model.training
            assert not policy.model(input_ids=IDS).logits.requires_grad
            raise KeyError("the block fails")
        assert learning() == pinned
        assert policy.model.training
        assert policy.model(input_ids=IDS).logits.requires_grad
    with pytest.raises(AssertionError, match="don't nest"), policy.acting_as("policy"), policy.acting_as("reference"):
        pass
    shake(policy)
    assert not torch.equal(logits_as(policy, "policy"), logits_as(policy, "reference"))


def test_peft_alone_loads_the_adapter(tiny: Callable[..., Path], tmp_path: Path) -> None:
    policy = Policy(load_base(str(tiny()), "none"), rank=4, alpha=8.0, seed=0)
    shake(policy)
    policy.save_adapter(tmp_path)
    assert policy.model.peft_config["default"].inference_mode is False
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny()), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits_as(policy, "policy"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny()) and f'from_pretrained("{tiny()}")' in (tmp_path / "README.md").read_text()
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}


def test_training_goes_on_from_an_adapter_with_the_bare_base_as_reference(
    make_session: Callable[..., Session], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    first = Policy(load_base(str(tiny()), "none"), rank=4, alpha=8.0, seed=0)
    bare = logits_as(first, "reference")
    shake(first)
    (tmp_path / "first").mkdir()
    first.save_adapter(tmp_path / "first")
    session = make_session(adapter={"start": "first"})  # relative to the recipe
    assert torch.equal(logits_as(session.policy, "policy"), logits_as(first, "policy"))
    assert torch.equal(logits_as(session.policy, "reference"), bare)
    assert session.score(training_rollout(session)).means()["kl/policy_reference"] > 0
    assert set(session.policy.parameters) and all(p.requires_grad for p in session.policy.parameters.values())


def saved_by_peft(folder: Path, base: Path, **options: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)).save_pretrained(folder)
    return folder


def test_adapters_that_don_t_fit_are_refused_with_the_reason(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = load_base(str(tiny()), "none")

    def refusal(folder: Path) -> str:
        with pytest.raises(AdapterError) as caught:
            Policy(base, rank=4, alpha=8.0, seed=0, start=folder)
        return str(caught.value)

    assert "adapter_config.json" in refusal(tmp_path)
    other = Policy(load_base(str(save_tiny(tmp_path / "other-base", seed=1)), "none"), rank=4, alpha=8.0, seed=0)
    (tmp_path / "theirs").mkdir()
    other.save_adapter(tmp_path / "theirs")
    said = refusal(tmp_path / "theirs")
    assert "other-base" in said and str(tiny()) in said  # names both
    assert "was trained on" in refusal(saved_by_peft(tmp_path / "elsewhere", tmp_path / "other-base"))
    assert "is a DoRA" in refusal(saved_by_peft(tmp_path / "dora", tiny(), use_dora=True))
    assert "isn't a plain LoRA" in refusal(saved_by_peft(tmp_path / "bias", tiny(), bias="lora_only"))
    assert "holds whole modules" in refusal(saved_by_peft(tmp_path / "saved", tiny(), modules_to_save=["lm_head"]))
    pickled = saved_by_peft(tmp_path / "pickled", tiny())
    torch.save({}, pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    assert "pickled weights aren't loaded" in refusal(pickled)
    broken = saved_by_peft(tmp_path / "broken", tiny())
    (broken / "adapter_config.json").write_text("{", "utf-8")
    assert "isn't valid JSON" in refusal(broken)
    truncated = saved_by_peft(tmp_path / "truncated", tiny())
    (truncated / "adapter_model.safetensors").write_bytes(b"not tensors")
    assert "can't be read" in refusal(truncated)
    assert Policy(load_base(str(tiny()), "none"), rank=4, alpha=8.0, seed=0, start=saved_by_peft(tmp_path / "fine", tiny()))


def test_the_same_weights_under_another_folder_name_are_the_same_base(tiny: Callable[..., Path], tmp_path: Path) -> None:
    moved = save_tiny(tmp_path / "moved")
    policy = Policy(load_base(str(tiny()), "none"), rank=4, alpha=8.0, seed=0)
    shake(policy)
    (tmp_path / "adapter").mkdir()
    policy.save_adapter(tmp_path / "adapter")
    again = Policy(load_base(str(moved), "nf4"), rank=4, alpha=8.0, seed=0, start=tmp_path / "adapter")
    assert all(torch.equal(value, policy.state()[name]) for name, value in again.state().items())


def test_the_same_adapter_is_the_same_bytes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Neither the order of PEFT's set of modules nor that of safetensors' metadata may tell two runs apart; the sets' order here is another's."""
    program = (
        "import sys; from pathlib import Path; from iqlite.base.loading import load_base; from iqlite.model.policy import Policy;"
        "folder = Path(sys.argv[2]); folder.mkdir(); Policy(load_base(sys.argv[1], 'none'), rank=2, alpha=4.0, seed=0).save_adapter(folder, step=3)"
    )
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, str(tiny()), str(tmp_path / seed)], env=environment, check=True)
        found.append({path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()})
    assert found[0] == found[1]
