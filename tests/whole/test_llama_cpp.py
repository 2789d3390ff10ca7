"""llama.cpp itself on what iqlite exports: the merged file says what the policy says, and the base's own GGUF file with the LoRA too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iqlite.base.names import EMBEDDED, embedded
from iqlite.model.policy import Policy
from iqlite.model.sampling import Sampler
from iqlite.run.rundir import RunDir
from iqlite.training.opening import environment, open_session
from tests.helpers import llama_cpp

QUESTIONS = (
    "How was your day?",
    "Name three colours.",
    "What is a cat?",
    "Tell me about rain.",
    "Why do people sing?",
    "What is bread made of?",
)


def tilt(policy: Policy) -> None:
    """An adapter with an effect that leaves the model speaking: small random B."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.parameters.items():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.mark.real
def test_llama_cpp_speaks_as_the_policy(make_recipe: Callable[..., Any], iqlite: Callable[..., Any], tmp_path: Path) -> None:
    llama_cpp.home()
    session = open_session(make_recipe(model={"base": EMBEDDED, "quantization": "none"}))
    tilt(session.policy)
    run = RunDir.create(tmp_path / "run", session.recipe, environment(session))
    run.save_folder(run.adapter, session.policy.save_adapter)
    for to, path, quant in (("gguf", "merged.gguf", "f32"), ("gguf-adapter", "lora.gguf", "f32")):
        code, _, err = iqlite("export", run.path, "--to", to, "-o", path, "--quant", quant)
        assert code == 0, err
    requests = [({"role": "user", "content": question},) for question in QUESTIONS]
    rollout = session.answers("policy", requests, Sampler(0, 16, 0.0))
    with session.policy.acting_as("policy"):
        gaps = []
        for row, prompt in enumerate(rollout.prompt_ids):
            ids = torch.tensor([[*prompt, *rollout.response_ids(row)]])
            top = session.policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].topk(2).values
            gaps.append(float((top[:, 0] - top[:, 1]).min()))
    asks = [{"tokens": list(p), "count": len(rollout.response_ids(i))} for i, p in enumerate(rollout.prompt_ids)]
    found = llama_cpp.ask(tmp_path / "merged.gguf", asks)
    clear = [row for row, gap in enumerate(gaps) if gap > 0.02]
    assert len(clear) >= 3
    for row in clear:
        expected = [token for token in rollout.response_ids(row) if token not in session.chat.stop_ids]
        assert found[row][: len(expected)] == expected, QUESTIONS[row]
    # the embedded file is quantised, and llama.cpp rounds activations for it too: fixed answers' log-probabilities, with and without
    fixed = session.answers("reference", requests, Sampler(0, 16, 0.0))
    scored = [{"tokens": list(p), "answer": list(fixed.response_ids(i))} for i, p in enumerate(fixed.prompt_ids)]
    theirs = {
        name: torch.tensor([p for answer in llama_cpp.ask(embedded(), scored, lora) for p in answer])
        for name, lora in (("base", None), ("lora", tmp_path / "lora.gguf"))
    }
    ours: dict[str, torch.Tensor] = {}
    for name, role in (("base", "reference"), ("lora", "policy")):
        parts = []
        with session.policy.acting_as(role):
            for row, prompt in enumerate(fixed.prompt_ids):
                answer = torch.tensor(fixed.response_ids(row))
                logits = session.policy.model(input_ids=torch.tensor([[*prompt, *answer.tolist()]])).logits[0, len(prompt) - 1 : -1]
                parts.append(logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0])
        ours[name] = torch.cat(parts)
    change, their_change = ours["lora"] - ours["base"], theirs["lora"] - theirs["base"]
    print(f"mean |difference| base {float((ours['base'] - theirs['base']).abs().mean()):.3f} nats; change by the adapter {float(change.mean()):.3f} here, {float(their_change.mean()):.3f} there")  # fmt: skip
    assert change.abs().mean() > 0.2
    assert float(torch.corrcoef(torch.stack([change, their_change]))[0, 1]) > 0.9
