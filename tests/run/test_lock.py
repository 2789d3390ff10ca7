"""One writer: another process's lock is respected while it lives and taken over once it doesn't; another host's is never broken."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from iqlite.errors import RunError
from iqlite.run.lock import Lock

HOLD = "import sys, pathlib; from iqlite.run.lock import Lock; lock = Lock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read(); lock.release()"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_s_lock(holder: subprocess.Popen[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunError, match=f"being trained by process {holder.pid} on .*or name another --out"):
        Lock(tmp_path)
    holder.kill()  # without a word
    holder.wait()
    assert json.loads((tmp_path / "lock.json").read_text())["process"] == holder.pid
    with caplog.at_level(logging.WARNING, "iqlite"):
        lock = Lock(tmp_path)
    assert f"process {holder.pid}, which trained it, has ended without a word; its lock is taken over" in caplog.text
    assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()
    lock.release()
    assert not (tmp_path / "lock.json").exists()


def test_one_that_ended_leaves_nothing(holder: subprocess.Popen[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder.communicate("")
    with caplog.at_level(logging.WARNING, "iqlite"):
        Lock(tmp_path).release()
    assert not caplog.text


def test_where_the_disk_has_no_locks_the_file_alone_decides(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """As on some network disks: .lock doesn't help, and lock.json names a process that lives; one given its number later isn't it."""
    (tmp_path / ".lock").unlink()
    with pytest.raises(RunError, match=f"being trained by process {holder.pid}"):
        Lock(tmp_path)
    said = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(said | {"began": said["began"] - 1000}))
    Lock(tmp_path).release()
    (tmp_path / "lock.json").write_text(json.dumps(said | {"host": "elsewhere"}))
    with pytest.raises(RunError, match=r"process \d+ on elsewhere: .*If that process is no more, delete .*lock\.json"):
        Lock(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"process": "x", "host": 1}'])
def test_a_damaged_one_locks_nobody_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(text)
    if "host" in text:
        with pytest.raises(RunError, match=r"delete .*lock\.json"):
            Lock(tmp_path)
    else:
        Lock(tmp_path).release()
