"""Streams that close, fill up or were never there: what is printed may be lost, the run isn't. Signals end a run with a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

posix = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
SAYS = """
import sys
from iqlite.streams import lost, outlive

outlive()
print("x\u2713" * 9, flush=True)
print("to stderr", file=sys.stderr, flush=True)
print("more " * 20000, flush=True)
lost()
open("done", "w").close()
"""
WHICH = {
    "| head -0": ("{python} 2>err | head -c 0", False),
    ">/dev/full": ("{python} >/dev/full 2>err", True),
    ">&-": ("{python} >&- 2>err", False),
    "2>&-": ("{python} >out 2>&-", False),
    "<&- >&- 2>&-": ("{python} <&- >&- 2>&-", False),
    "cp1252": ("PYTHONIOENCODING=cp1252 {python} >out 2>err", False),
}


@posix
@pytest.mark.parametrize("name", WHICH)
def test_what_cannot_be_printed_is_lost_and_all_else_is_done(name: str, tmp_path: Path) -> None:
    """A full disk is said at the end, since what was asked for isn't there; a reader that has gone wanted no more."""
    line, refused = WHICH[name]
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line.format(python=f"{sys.executable} {script}")], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, stdin=subprocess.DEVNULL, check=False)  # fmt: skip
    err = (tmp_path / "err").read_text() if (tmp_path / "err").is_file() else ""
    assert (tmp_path / "done").exists() != refused and bool(done.returncode) == refused, err
    assert ("standard output can't be written (No space left on device)" in err) == refused
    assert refused or "Traceback" not in err
    if name == "cp1252":
        assert (tmp_path / "out").read_bytes().startswith(b"x?x?")


@posix
@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT"])
def test_a_signal_that_ends_a_terminal_leaves_a_checkpoint(
    name: str, data: dict[str, Any], tmp_path: Path, iqlite: Callable[..., Any]
) -> None:
    """It comes in the middle of a step, which is finished first."""
    (tmp_path / "r.toml").write_text(tomli_w.dumps(data | {"train": {"steps": 400}}))
    metrics = tmp_path / "run" / "metrics.jsonl"

    def end() -> None:
        while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 1):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(getattr(signal, name))
    thread = threading.Thread(target=end)
    thread.start()
    code, out, err = iqlite("train", "r.toml", "--out", "run", "--no-safety", "--force")
    thread.join()
    steps = metrics.read_bytes().count(b"\n") - 1
    assert code == 130 and "--resume" in out and not err, err
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir() and steps < 400
    assert signal.getsignal(getattr(signal, name)) == before
