"""What a backend makes of a tiny model, as tensors: run once through unsloth, in a process of its own, and once plain, to be held against it.

    python -m tests.helpers.unsloth_contract FOLDER OUT cpu|fused|kernels

`fused` are its CUDA forwards in Triton's interpreter, on float32 weights; `kernels` its LoRA kernels too, which want weights of 16 bits.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

from iqlite.base.unsloth import is_fused, prepare

PROMPTS = [[*range(10, 30)], [*range(10, 22), 70, 71, 72], [*range(10, 19)]]
ANSWERS = [[5, 6, 7, 8], [9, 10, 11], [12, 13]]
HEAD = [*range(10, 16)]  # what all prompts begin with
LONG = [[*range(10, 40), 41, 42, 43, 44, 45], [*range(50, 110)]]  # padded behind the first row's prefix, wider than a context of 64


class OneSlot:
    """A list with one entry, at whatever index."""

    def __init__(self, value: Any = None):
        self.value = value

    def __len__(self) -> int:
        return 1

    def __rmul__(self, listed: list[Any]) -> OneSlot:
        return OneSlot(listed[0])

    def __getitem__(self, index: Any) -> Any:
        return self.value

    def __setitem__(self, index: Any, value: Any) -> None:
        self.value = value


def play_a_card() -> None:
    """unsloth as on a machine with a card, computed on this one: its own switch for tests, and what that leaves to a card."""
    os.environ.update(UNSLOTH_ALLOW_CPU="1", TRITON_INTERPRET="1", UNSLOTH_COMPILE_DISABLE="1", TORCHDYNAMO_DISABLE="1")
    import torch

    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(name="none", total_memory=2**33, major=8, minor=0)
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda *_: (8, 0)
    cuda.mem_get_info = lambda *_: (2**33, 2**33)
    assert prepare("unsloth", "llama", card=False) == "unsloth"
    from unsloth.models import llama

    llama.get_current_device = lambda: torch.device("cpu")  # tables of positions are kept by a card's index
    llama.DEVICE_COUNT = OneSlot()


def measured(folder: Path, backend: str, dtype: str = "float32") -> dict[str, Any]:
    """Tensors by name, of a fresh policy and of one with random adapters."""
    import torch

    from iqlite.base import loading
    from iqlite.model.decoding import draw
    from iqlite.model.policy import Policy
    from iqlite.model.sampling import Sampler
    from tests.helpers.tiny import shake

    if dtype != "float32":
        vars(loading)["here"] = lambda: (torch.device("cpu"), getattr(torch, dtype))
    base = loading.load_base(str(folder), "none", backend=backend)
    with torch.no_grad():
        bare = base.model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits[0].float()
    policy = Policy(base, rank=4, alpha=8.0, seed=0, checkpointing=True)
    shared, found = [HEAD] * 3, {"bare": bare}

    def read(prompts: list[list[int]], answers: list[list[int]], shared: list[list[int]]) -> torch.Tensor:
        return policy.forward.hidden_states(prompts, answers, 4, shared).float()

    with policy.acting_as("reference"):
        found["head"] = policy.head(read([PROMPTS[0]], [[1]], [])[0, 0].to(base.compute_dtype)[None])
        found["reference"] = read(PROMPTS, ANSWERS, [])
        found["reference behind a prefix"] = read(PROMPTS, ANSWERS, shared)
        found["padded beyond the context"] = read(LONG, [[1, 2], [3, 4]], [LONG[0][:30], []])
    with policy.acting_as("policy"):
        found["fresh"] = read(PROMPTS, ANSWERS, shared)
    before = storages(policy.model)
    policy.add_ema()
    found["bytes beside the base"] = torch.tensor(storages(policy.model) - before - 4 * policy.size)
    shake(policy)
    for role in ("policy", "ema"):
        with policy.acting_as(role):
            found[role] = read(PROMPTS, ANSWERS, shared)
    sampler = Sampler(seed=3, max_new_tokens=12, temperature=1.0)
    with policy.acting_as("policy"):
        drawn = torch.full((3, 12), -1)
        for at, (which, token) in enumerate(
            draw(
                policy.forward,
                {"plain": PROMPTS},
                {"plain": HEAD},
                lambda s: policy.head(s["plain"]),
                [3, 4, 5, 6, 7],
                sampler,
                0,
                [0, 1, 2],
            )
        ):
            drawn[which, at] = token
    found["drawn"] = drawn
    weights = torch.randn(3, 4, base.anatomy.head.in_features, generator=torch.Generator().manual_seed(0))
    for name, given in (("training", []), ("training behind a prefix", shared)):
        states = read(PROMPTS, ANSWERS, given)
        found[name] = states.detach()
        (states * weights).sum().backward()
        for parameter, tensor in policy.parameters.items():
            found[f"{name}: gradient of {parameter}"] = tensor.grad
            tensor.grad = None
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def storages(model: Any) -> int:
    """Bytes of a model's parameters, each storage once."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def main() -> None:
    folder, out, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if mode != "cpu":
        play_a_card()
    assert prepare("unsloth", "llama", card=False) == "unsloth" and is_fused() == (mode != "cpu")
    from safetensors.torch import save_file

    save_file(measured(folder, "unsloth", "bfloat16" if mode == "kernels" else "float32"), out)


if __name__ == "__main__":
    main()
