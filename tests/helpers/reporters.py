"""What is told of a run that nobody watches."""

from __future__ import annotations

from collections.abc import Callable

from iqlite.records import StepMetrics


class Silent:
    """A reporter that says nothing."""

    def step(self, metrics: StepMetrics, total: int) -> None: ...
    def sample(self, step: int, prompt: str, draw: Callable[[], tuple[str, str]]) -> None: ...
    def verdict(self, step: int, verdict: object) -> None: ...
