"""How far a merged model is from the adapter on its own base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iqlite.base.loading import load_base
from iqlite.device import here, let_go
from iqlite.export.merge import Merge
from iqlite.machine.here import usable_memory
from iqlite.machine.sizes import Sizes
from iqlite.method.loss import logps_by_chunks
from iqlite.model.policy import Policy
from iqlite.model.sampling import Sampler
from iqlite.model.template import Chat
from iqlite.records import Rollout
from iqlite.run.rundir import RunDir
from iqlite.training.opening import open_run
from iqlite.training.readings import Reading, read

CHECK_PROMPTS, CHECK_TOKENS, CHECK_CHUNK = 8, 32, 64


def fits_check(merge: Merge) -> bool:
    """Whether the merged model, unquantised, can be held in this machine's memory to be compared."""
    device, _ = here()
    weights = sum(torch.Size(shape).numel() for shard in merge.stored.shards for _, shape in merge.layout(shard).values())
    return weights * (4 if device.type == "cpu" else 2) * 1.2 + 2**30 < usable_memory(device)


def kl_to_merged(run: RunDir, adapter: Path, merged: Path, scratch: Path, *, scale: float, say: Callable[[str], None]) -> float | None:
    """KL(adapter on its base ‖ merged) in nats a token, on answers of the policy to held-out prompts; None if memory doesn't do.

    One model in memory at a time: the first one's log-probabilities wait on the disk, [tokens, V] float32.
    """
    try:
        return _kl(run, adapter, merged, scratch, scale, say)
    except torch.OutOfMemoryError:
        return None


def _kl(run: RunDir, adapter: Path, merged: Path, scratch: Path, scale: float, say: Callable[[str], None]) -> float:
    session = open_run(run, adapter, say=say)
    recipe = session.recipe
    session.policy.scale_adapter(scale)
    requests = session.eval.requests[:CHECK_PROMPTS]
    sampler = Sampler(recipe.train.seed, min(recipe.rollout.max_new_tokens, CHECK_TOKENS), stream="merge")
    rollout = session.answers("policy", requests, sampler)
    count, vocabulary = int(rollout.mask_BT.sum()), session.policy.head.linear.weight.shape[0]
    kept = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.float32, shape=(count, vocabulary))
    chat, sizes = session.chat, session.sizes
    for at, logp_nV in _logps(session.policy, chat, rollout, "policy", sizes):
        kept[at] = logp_nV.numpy()
    del session
    let_go()
    say(f"loading {merged.name}")
    policy = Policy(load_base(str(merged), "none"), rank=1, alpha=1.0, seed=0)
    total = 0.0
    for at, logp_nV in _logps(policy, chat, rollout, "reference", sizes):
        first_nV = torch.from_numpy(np.array(kept[at])).double()
        total += float((first_nV.exp() * (first_nV - logp_nV.double())).sum())
    return total / count


def _logps(policy: Policy, chat: Chat, rollout: Rollout, role: str, sizes: Sizes) -> Iterator[tuple[slice, Tensor]]:
    """(span, log-probabilities [n, V] on the host) of the response tokens, some at a time."""
    hidden_nD = read(policy, chat, rollout, [Reading("it", role)], sizes).hidden["it"][rollout.mask_BT]
    with torch.no_grad():
        for at, logp_nV in logps_by_chunks(policy.head, hidden_nD, CHECK_CHUNK):
            yield at, logp_nV.cpu()
