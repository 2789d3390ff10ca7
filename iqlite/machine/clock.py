"""How long a step's phases take, and the most memory that was in use."""

from __future__ import annotations

import time

import torch

from iqlite import device as on


class Clock:
    """Seconds of a step's phases, and peak memory."""

    def __init__(self, device: torch.device):
        self.device, self.laps, self.last = device, {}, time.perf_counter()  # type: ignore[var-annotated]

    def lap(self, name: str) -> None:
        on.synchronize(self.device)
        now = time.perf_counter()
        self.laps[f"time/{name}_s"], self.last = now - self.last, now

    def metrics(self, tokens: int) -> dict[str, float]:
        """time/*_s, response tokens a second of the phases and of the step, and memory/peak_gib."""
        rates = {f"time/{name}_tokens_per_s": tokens / self.laps[f"time/{name}_s"] for name in ("rollout", "read", "update")}
        step_s = sum(self.laps[f"time/{name}_s"] for name in ("rollout", "read", "update"))
        return {
            **self.laps,
            **rates,
            "time/step_s": step_s,
            "time/tokens_per_s": tokens / step_s,
            "memory/peak_gib": on.peak_gib(self.device),
        }
