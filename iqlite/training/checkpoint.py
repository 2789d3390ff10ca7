"""What an exact resume needs, taken and put back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from iqlite.errors import RunError, first_line
from iqlite.run.journal import part
from iqlite.run.rundir import RunDir
from iqlite.training.monitors import Monitors
from iqlite.training.optimizer import load_state_of, state_of
from iqlite.training.session import Session


def snapshot(session: Session, optimizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, state) of adapter, average, optimizer, loss scale and widths, for an exact resume. Noise and data order are functions of the step."""
    moments, numbers = state_of(optimizer)
    groups = {"adapter": session.policy.state(), "optimizer": moments}
    if session.recipe.superior.weights == "ema":
        groups["ema"] = session.policy.state("ema")
    tensors = {f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    return tensors, {"optimizer": numbers, "loss_scale": session.policy.loss_scale, "sizes": session.sizes.record()}


def restore(session: Session, optimizer: Any, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Puts back what `snapshot` took."""
    session.policy.load_state(part(tensors, "adapter."))
    if session.recipe.superior.weights == "ema":
        session.policy.load_state(part(tensors, "ema."), "ema")
    load_state_of(optimizer, part(tensors, "optimizer."), state["optimizer"])
    session.policy.loss_scale = state["loss_scale"]
    session.sizes.restore(state.get("sizes", {}))


def save_checkpoint(session: Session, run: RunDir, optimizer: Any, monitors: Monitors, step: int, why: str | None) -> None:
    tensors, state = snapshot(session, optimizer)
    stopped = None if why in (None, "interrupted") else why
    run.save_checkpoint(step, tensors, {**state, "monitors": monitors.state(), "stopped": stopped})


def resume(session: Session, run: RunDir, optimizer: Any, monitors: Monitors) -> tuple[int, Monitors, str | None]:
    """(first step to do, monitors, rule that had stopped the run) from the last checkpoint; step 0 is the look before any update."""
    found = run.load_checkpoint() if session.ranks.leads else None
    tensors, state = session.ranks.handed(*(found or ({}, None)))  # the others may be on machines that haven't got the run
    if state is None:
        return 0, monitors, None
    if not part(tensors, "adapter."):
        raise RunError(f"{run.path}: its last checkpoint holds no adapter; delete that checkpoint's folder and resume from the one before.")
    try:
        restore(session, optimizer, tensors, state)
        monitors = Monitors.restore(state["monitors"])
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(
            f"{run.path}: its last checkpoint isn't of this recipe and base ({first_line(error)}); start anew with another --out."
        ) from None
    if session.ranks.told(not run.best.is_dir()):  # lost, and said: the best from here on is the best
        monitors = replace(monitors, best_kl=math.inf, best_step=0)
    return state["step"] + 1, monitors, state["stopped"]
