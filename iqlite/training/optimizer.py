"""AdamW over the pinned adapter parameters, the learning rate of a step, and the optimizer's state as plain tensors.

float32 state on a CPU; paged 8-bit state (bitsandbytes) on CUDA, where it spills to host memory instead of failing. No pickles: the
state is a flat dict of tensors and one of numbers, so that a checkpoint is safetensors and JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from iqlite.machine.memory import usual_optimizer
from iqlite.model.policy import Policy
from iqlite.training.monitors import NO_GRADIENT

BETAS = (0.9, 0.95)  # our choice
QUANTISED = "__bnb_optimizer_quant_state__"
COSINE_FLOOR = 0.1  # share of the peak learning rate at the end; our choice


def make_optimizer(policy: Policy, name: str) -> torch.optim.Optimizer:
    """AdamW without weight decay; `auto` is what `memory.usual_optimizer` says."""
    parameters = list(policy.parameters.values())
    if name == "auto":
        name = usual_optimizer(policy.device.type)
    if name == "paged-adamw-8bit":
        import bitsandbytes as bnb

        return bnb.optim.PagedAdamW8bit(parameters, betas=BETAS, weight_decay=0.0)  # type: ignore[no-any-return]
    return torch.optim.AdamW(parameters, betas=BETAS, weight_decay=0.0)


def learning_rate(step: int, steps: int, *, peak: float, warmup: float, schedule: str) -> float:
    """The rate of update `step` (1-based) of `steps`: a linear warm-up, then a cosine down to a tenth of the peak, or constant."""
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return peak * step / rising
    if schedule == "constant":
        return peak
    done = (step - rising) / max(1, steps - rising)
    return peak * (COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * done)) / 2)


def apply_update(policy: Policy, optimizer: torch.optim.Optimizer, rate: float, max_norm: float) -> float:
    """One optimizer step from the accumulated gradients; returns their norm before clipping.

    Skips the step if the norm isn't finite, or is rounding only: Adam would blow rounding up to steps of full size. Under float16 a
    norm that isn't finite halves the loss scale, so that the next step has room.
    """
    parameters = list(policy.parameters.values())
    if policy.loss_scale != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(policy.loss_scale)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    if math.isfinite(norm) and norm >= NO_GRADIENT:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    elif not math.isfinite(norm):
        policy.loss_scale = max(1.0, policy.loss_scale / 2)
    optimizer.zero_grad(set_to_none=True)
    return norm


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers), each keyed "parameter.name": the whole per-parameter state, in host memory."""
    tensors, numbers = {}, {}
    for index, entries in optimizer.state_dict()["state"].items():
        flat = dict(entries)
        flat |= flat.pop(QUANTISED, {})  # bitsandbytes nests its 8-bit state for FSDP's sake; it loads the flat form too
        for name, value in flat.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().clone().contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def load_state_of(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Puts back what `state_of` returned, to the bit."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if getattr(optimizer, "is_paged", False):
        _page(optimizer)


def _page(optimizer: Any) -> None:
    """Puts a paged optimizer's moments back into pages: bitsandbytes loads them as plain tensors of the card."""
    for parameter, entries in optimizer.state.items():
        for name in ("state1", "state2"):
            if parameter.device.type != "cpu" and name in entries:
                buffer = optimizer.get_state_buffer(parameter, dtype=entries[name].dtype)
                entries[name] = buffer.copy_(entries[name])
