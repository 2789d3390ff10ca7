"""What can't leave a run is refused before torch is imported."""

from __future__ import annotations

import math
from pathlib import Path

from iqlite.errors import RunError
from iqlite.run.files import check_place
from iqlite.run.rundir import RunDir, check_adapter_of


def leaving(run_path: Path, which: str, out: Path, mark: str, *, scale: float, force: bool, base: str | None = None) -> tuple[RunDir, Path]:
    """(run, adapter) of what is to be merged or exported to `out`; IqliteError, before anything heavy, for what can't be."""
    run = RunDir.open(run_path, base)
    run.check_base()
    adapter = run.trained(which)
    check_adapter_of(run, adapter)
    check_place(out, mark, force=force)
    if not (math.isfinite(scale) and abs(scale) <= 100):
        raise RunError(f"--scale {scale:g} can't be used: give a factor such as 0.5 or 1.")
    return run, adapter
