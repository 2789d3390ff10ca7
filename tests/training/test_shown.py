"""Answers drawn for whoever watches change nothing of a run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.numpy import load_file

from iqlite.run.rundir import RunDir
from iqlite.training.loop import train
from iqlite.training.progress import TrainingView
from iqlite.training.session import Session
from tests.helpers.reporters import Silent


def test_a_run_that_is_watched_is_the_run_that_isn_t(make_session: Callable[..., Session], tmp_path: Path) -> None:
    """Metrics but for times and memory, samples and the adapter's bytes."""
    found: list[Any] = []
    out = io.StringIO()
    for name, watched in (("silent", False), ("watched", True)):
        session = make_session()
        run = RunDir.create(tmp_path / name, session.recipe, {})
        if watched:
            with TrainingView(Console(file=out, force_terminal=True, width=80, height=24), 3) as view:
                train(session, run, view)
        else:
            train(session, run, Silent())
        metrics = [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in run.metrics()]
        tensors = {k: v.tobytes() for k, v in load_file(run.adapter / "adapter_model.safetensors").items()}
        found.append((json.dumps(metrics), (run.path / "samples.jsonl").read_bytes(), tensors))
    assert found[0] == found[1]
    assert "before" in out.getvalue() and "now" in out.getvalue()  # some were drawn
