"""What is in memory, the gradients of one update, and a card that is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from iqlite.records import Rollout
from iqlite.training.readings import read
from iqlite.training.session import Session
from iqlite.training.update import update


def tensors_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and the quantisation state behind 4-bit weights."""
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        yield name, tensor.data
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            for part in ("absmax", "code", "offset"):
                if isinstance(getattr(state, part, None), Tensor):
                    yield f"{name}.{part}", getattr(state, part)
            state = getattr(state, "state2", None)


def gradients(session: Session, rollout: Rollout) -> dict[str, Tensor]:
    """One update's gradients: what plain gradient descent at rate 1 takes away."""
    policy = session.policy
    scores = read(policy, session.chat, rollout, session.readings, session.sizes)
    before = policy.state()
    update(session, torch.optim.SGD(list(policy.parameters.values()), 1.0), rollout, scores, 1.0)
    after = policy.state()
    policy.load_state(before)
    return {name: before[name] - after[name] for name in before}


def training_rollout(session: Session, count: int = 4) -> Rollout:
    return session.answers("policy", session.train.requests[:count], session.sampler("train"))


@contextmanager
def at_most(session: Session, tokens: int, *, with_gradient: bool) -> Iterator[list[int]]:
    """The decoder fails like a full card on more than `tokens` tokens at once, in forwards with or without a gradient."""
    decoder, refused = session.policy.forward.decoder, []
    forward = decoder.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        size = kwargs["input_ids"].numel()
        if torch.is_grad_enabled() == with_gradient and size > tokens:
            refused.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(*args, **kwargs)

    decoder.forward = limited
    try:
        yield refused
    finally:
        decoder.forward = forward
