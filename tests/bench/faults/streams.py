"""Streams that close, fill up or are narrow, signals, and two writers at once: whole commands by the shell, in processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.faults.harness import TRAIN, fresh, leftovers, trained

ALONE = ("LD_PRELOAD", "IQLITE_FAULTS")
SHELL = {
    "| head -1": "{train} 2>err.txt | head -1 >seen.txt; test ${{PIPESTATUS[0]}} = 0",
    "2>&1 | head -0": "{train} 2>&1 | head -0",
    "> /dev/full": "{train} >/dev/full 2>err.txt; test $? = 2 && grep -q 'standard output can.t be written' err.txt",
    "2> /dev/full": "{train} >seen.txt 2>/dev/full",
    ">&- (closed)": "{train} >&- 2>err.txt",
    "2>&- (closed)": "{train} >seen.txt 2>&-",
    "<&- (closed)": "{train} <&- >seen.txt 2>err.txt",
    "all three closed": "{train} <&- >&- 2>&-",
    "nohup": "nohup {train} >seen.txt 2>err.txt",
    "cp1252": "PYTHONIOENCODING=cp1252 {train} >seen.txt 2>err.txt",
    "ascii, C locale": "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii {train} >seen.txt 2>err.txt",
    "NO_COLOR": "NO_COLOR=1 {train} >seen.txt 2>err.txt; test $? = 0 && ! grep -q $'\\x1b' seen.txt",
    "a terminal of 1 × 1": "COLUMNS=1 LINES=1 TERM=xterm {train} >seen.txt 2>err.txt",
    "plan | head -1": "{python} -m iqlite plan kind.toml 2>err.txt | head -1 >seen.txt; test ${{PIPESTATUS[0]}} = 0",
    "--help > /dev/full": "{python} -m iqlite --help >/dev/full 2>err.txt; test $? = 2",
}
DISK = "mkdir -p {disk} && mount -t tmpfs -o size={size}k none {disk}"
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")


def tries(folder: Path, whole: Path, only: str, known: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, what came of it) of each try that isn't `known`."""
    clean = {name: value for name, value in os.environ.items() if name not in ALONE}
    train = f"{sys.executable} -m iqlite {' '.join(TRAIN)} --no-safety"
    reference = trained(whole / "run")
    clean["PYTHONPATH"] = str(Path.cwd())

    def wanted(name: str) -> bool:
        return (not only or only in name) and f"stream | {name}" not in known

    def result(name: str, code: int, *, said: str = "", must: bool = True) -> tuple[str, dict[str, Any]]:
        text = (
            "".join((folder / file).read_text("utf-8", "replace") for file in ("err.txt", "seen.txt") if (folder / file).is_file()) + said
        )
        sentence = next((line for line in text.splitlines() if line.startswith("iqlite: ")), "").replace(str(folder), "…")
        found: dict[str, Any] = {"fault": "stream", "verb": name, "said": sentence}
        if "Traceback" in text or (must and code):
            found |= {"wrong": "traceback" if "Traceback" in text else f"exit code {code}", "detail": text[-1500:]}
        elif (folder / "run").exists() and (trained(folder / "run") != reference or leftovers(folder)):
            found |= {"wrong": "another result", "detail": str(leftovers(folder))}
        return f"stream | {name}", found

    def anew() -> None:
        fresh(folder, whole, ())
        for name in ("err.txt", "seen.txt"):
            (folder / name).unlink(missing_ok=True)

    for name, line in SHELL.items():
        if wanted(name):
            anew()
            done = subprocess.run(["bash", "-c", line.format(train=train, python=sys.executable)], cwd=folder, env=clean, capture_output=True, text=True)  # fmt: skip
            yield result(name, done.returncode, said=done.stderr + done.stdout)
    for number in SIGNALS:
        if wanted(number):
            anew()
            yield result(number, ended_by(getattr(signal, number), train, folder, clean))
    if wanted("two writers at once"):
        fresh(folder, whole, ["killed"])
        code, said = two(f"{train} --resume", folder, clean)
        yield result("two writers at once", code, said=said)
    if wanted("--force into a running training"):
        anew()
        code, said = two(train, folder, clean, f"{train} --force")
        yield result("--force into a running training", code, said=said)
    if wanted("a lock whose process was killed"):
        fresh(folder, whole, ["killed"])
        done = subprocess.run(f"{train} --resume", shell=True, cwd=folder, env=clean, capture_output=True, text=True)
        yield result("a lock whose process was killed", done.returncode, said=done.stderr)


def begun(train: str, folder: Path, env: dict[str, str], lines: int) -> subprocess.Popen[str]:
    """A training that holds the run's lock and has more than so many lines of metrics."""
    process = subprocess.Popen(
        train.split(), cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=(folder / "err.txt").open("w"), text=True
    )
    metrics, lock = (folder / "run" / name for name in ("metrics.jsonl", "lock.json"))
    while process.poll() is None:
        mine = lock.is_file() and f'"process": {process.pid},' in lock.read_text()
        if mine and metrics.is_file() and len(metrics.read_bytes().splitlines()) > lines:
            break
        time.sleep(0.01)
    return process


def ended_by(number: int, train: str, folder: Path, env: dict[str, str]) -> int:
    """0 if a training that gets the signal ends with a checkpoint, and goes on to its end with --resume."""
    process = begun(train, folder, env, 2)
    process.send_signal(number)
    code = process.wait(120)
    if code not in (130, 0) or not list((folder / "run" / "checkpoints").glob("step-*")):
        return code or 99
    return subprocess.run(f"{train} --resume", shell=True, cwd=folder, env=env, capture_output=True).returncode


def two(train: str, folder: Path, env: dict[str, str], second: str = "") -> tuple[int, str]:
    """(0 if the second is refused in a sentence and the first goes on to its end, what the second said)."""
    first = begun(train, folder, env, 0)
    os.kill(first.pid, signal.SIGSTOP)  # it is still running, however long the second takes
    try:
        late = subprocess.run((second or train).split(), cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    code = first.wait(120)
    refused = late.returncode == 2 and "is being trained by process" in late.stderr
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return (0 if refused and code == 0 else late.returncode or 1), late.stderr
