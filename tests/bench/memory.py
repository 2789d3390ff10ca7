"""One base in memory: bytes of unique storages by dtype after loading NF4 and the adapter, and what the process grew by.

    python -m tests.bench.memory [--base NAME]

Prints the storages of the whole model (base, quantisation state, adapter), the largest float32 base tensors, and the growth of resident
memory (allocated memory under CUDA) over the imports, after loading and after one rollout, reading and update.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import psutil
import torch

from iqlite.recipe.reading import load_recipe
from iqlite.training.opening import open_session
from iqlite.training.optimizer import make_optimizer
from iqlite.training.readings import read
from iqlite.training.update import update
from tests.helpers.tensors import tensors_of


def census(model: Any) -> dict[str, int]:
    """dtype → bytes of storages, each counted once."""
    seen: dict[int, tuple[str, int]] = {}
    for _, tensor in tensors_of(model):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = (str(tensor.dtype).removeprefix("torch."), storage.nbytes())
    totals: dict[str, int] = {}
    for dtype, size in seen.values():
        totals[dtype] = totals.get(dtype, 0) + size
    return totals


def used() -> int:
    """Resident bytes of this process, or allocated bytes on the card."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    args = parser.parse_args()
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    start = used()
    recipe = load_recipe(Path("recipes/cheerful-135m.toml"), [f"model.base={args.base}", "behavior.placement=user"])
    session = open_session(recipe)
    loaded = used()
    by_dtype = census(session.policy.model)
    large = sorted(
        ((t.numel() * t.element_size(), n) for n, t in tensors_of(session.policy.model) if t.dtype == torch.float32 and "lora" not in n),
        reverse=True,
    )
    rollout = session.answers("policy", session.train.requests[:8], session.sampler("train"))
    scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
    update(session, make_optimizer(session.policy, "auto"), rollout, scores, 1e-4)
    mib = 2**20
    print(
        f"unique storages by dtype, MiB: {json.dumps({k: round(v / mib, 1) for k, v in by_dtype.items()})}, in all {sum(by_dtype.values()) / mib:.1f}"
    )
    print(
        "float32 base tensors above 1 MiB: "
        + ", ".join(f"{n.removeprefix('base_model.model.')} {b / mib:.1f}" for b, n in large if b > mib)
    )
    print(f"growth over the imports, MiB: loaded {(loaded - start) / mib:.0f}, after a step {(used() - start) / mib:.0f}")
    print(f"storages after a step are the same: {census(session.policy.model) == by_dtype}")


if __name__ == "__main__":
    main()
