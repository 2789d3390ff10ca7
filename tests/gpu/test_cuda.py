"""What only a CUDA card can show: the same code path as on a CPU, in 4 bits and 16-bit compute, within a small card's memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iqlite.base.loading import load_base
from iqlite.baselines.methods import BASELINES, TRL
from iqlite.baselines.store import baseline
from iqlite.model.policy import Policy
from iqlite.run.rundir import RunDir
from iqlite.training.loop import train
from iqlite.training.opening import environment
from iqlite.training.optimizer import load_state_of, make_optimizer, state_of
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import update
from tests.helpers.reporters import Silent
from tests.helpers.tensors import tensors_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]
SMALL_CARD = 6 * 2**30


@pytest.fixture(autouse=True)
def small_card() -> Iterator[None]:
    """Plays a 6 GiB card, and takes the limit back."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, SMALL_CARD / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma", "olmo2"])
def test_a_whole_nf4_run(architecture: str, tiny: Callable[..., Path], make_session: Callable[..., Session], tmp_path: Path) -> None:
    session = make_session(model={"base": str(tiny(architecture)), "quantization": "nf4"})
    outcome = train(session, RunDir.create(tmp_path / "run", session.recipe, environment(session)), Silent())
    assert outcome.why == "finished"
    assert all(torch.isfinite(value).all() for value in session.policy.state().values())


@pytest.mark.parametrize("method", BASELINES)
def test_an_interrupted_baseline_goes_on_learning(method: str, make_run: Callable[..., RunDir], tiny: Callable[..., Path]) -> None:
    """Into bfloat16 adapters PEFT loads a checkpoint as new parameters, which an optimizer that was there before wouldn't move."""
    if method in TRL:
        pytest.importorskip("trl")
    run = make_run(model={"base": str(tiny()), "quantization": "nf4"}, train={"steps": 4, "checkpoint_every": 2})

    def say(text: str) -> None:
        if "step 3/" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baseline(run, method, say)
    (work,) = (run.path / "baselines").glob(f".unfinished-{method}.*")
    (file,) = (*work.glob("checkpoints/step-000002/state.safetensors"), *work.glob("trainer/checkpoint-2/adapter_model.safetensors"))
    norms = {float(t.norm()) for name, t in load_file(file).items() if "lora_B" in name and not name.startswith("optimizer.")}
    after = load_file(baseline(run, method, lambda text: None) / "adapter_model.safetensors")
    assert norms and not norms & {float(t.norm()) for name, t in after.items() if "lora_B" in name}


def test_no_float32_base_tensor_above_a_megabyte(make_session: Callable[..., Session], tiny: Callable[..., Path]) -> None:
    wide = tiny(hidden_size=1024, intermediate_size=2048)
    session = make_session(model={"base": str(wide), "quantization": "nf4"})
    assert any(t.nbytes > 2**18 for _, t in tensors_of(session.policy.model))
    large = [n for n, t in tensors_of(session.policy.model) if t.dtype == torch.float32 and "lora" not in n and t.nbytes > 2**20]
    assert not large
    assert all(p.dtype == torch.float32 for p in session.policy.parameters.values())


def test_adapters_off_is_the_bare_base_and_a_fresh_adapter_changes_nothing(tiny: Callable[..., Path]) -> None:
    base = load_base(str(tiny()), "nf4")
    ids = torch.arange(30, device="cuda").reshape(2, 15)
    with torch.no_grad():
        bare = base.model(input_ids=ids).logits.clone()
    policy = Policy(base, rank=4, alpha=8.0, seed=0)
    for shaken in (False, True):
        if shaken:
            for parameter in policy.parameters.values():
                parameter.data.normal_(std=0.1)
        with policy.acting_as("reference"):
            assert torch.equal(policy.model(input_ids=ids).logits, bare)
        with policy.acting_as("policy"):
            assert torch.equal(policy.model(input_ids=ids).logits, bare) is not shaken


def test_gradients_before_and_after_a_rollout_agree(make_session: Callable[..., Session]) -> None:
    session = make_session(model={"quantization": "nf4"}, train={"checkpointing": "on"})
    rollout = session.answers("reference", session.train.requests[:4], session.sampler("train"))
    scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
    norms = []
    for _ in range(2):
        norms.append(update(session, make_optimizer(session.policy, "adamw"), rollout, scores, 0.0)[1])
        session.answers("policy", session.train.requests[:4], session.sampler("train"))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert norms[0] > 0


def test_paged_optimizer_state_survives_a_checkpoint(make_session: Callable[..., Session]) -> None:
    """Rank 1024 makes LoRA matrices of 65,536 to 131,072 elements: bitsandbytes pages a state from 100,000 on."""
    session = make_session(model={"quantization": "nf4"}, adapter={"rank": 1024, "alpha": 8.0})
    rollout = session.answers("policy", session.train.requests[:4], session.sampler("train"))
    scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
    optimizer = make_optimizer(session.policy, "paged-adamw-8bit")
    update(session, optimizer, rollout, scores, 1e-3)
    tensors, numbers = state_of(optimizer)
    json.dumps(numbers)
    assert any(value.dtype == torch.uint8 and value.numel() >= 100_000 for value in tensors.values())
    again = make_optimizer(session.policy, "paged-adamw-8bit")
    load_state_of(again, tensors, numbers)
    restored, restored_numbers = state_of(again)
    assert restored_numbers == numbers
    assert tensors.keys() == restored.keys()
    assert all(torch.equal(value, restored[name]) for name, value in tensors.items())


def test_embeddings_on_the_host_change_nothing(make_session: Callable[..., Session]) -> None:
    found = []
    for where in ("card", "host"):
        session = make_session(model={"quantization": "nf4", "embeddings": where})
        assert session.policy.device.type == "cuda"
        assert session.policy.base.model.get_input_embeddings().weight.device.type == ("cpu" if where == "host" else "cuda")
        rollout = session.answers("policy", session.train.requests[:4], session.sampler("train"))
        found.append(read(session.policy, session.chat, rollout, session.readings, session.sizes).hidden["wanted"])
    assert torch.equal(*found)
