"""A tiny project, commands in processes of their own that a library kills or refuses the disk to, and what must be the same in the end."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

LIBRARY = "IQLITE_FAULTS"
COUNT, KILL, HALF, FULL = range(4)
UNSTEADY = ("time/", "memory/")
STEPS = 6


@dataclass(frozen=True)
class Verb:
    """A command and how it is given again after a fault; what it starts from, beside the project; what it leaves that must be the same every time."""

    name: str
    first: list[str]
    again: list[str]
    needs: tuple[str, ...]
    left: Callable[[Path], Any]


@dataclass(frozen=True)
class Called:
    """A command's exit code (−9: killed), what it printed, and the paths of the operations that were counted (none after a kill)."""

    code: int
    text: str
    paths: tuple[str, ...]


def call(folder: Path, arguments: Sequence[str], at: int = -1, kind: int = COUNT) -> Called:
    """`iqlite ARGUMENTS` in `folder`, forked from this process; operations on files below the folder are counted."""
    said = folder.with_name("said.json")
    said.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.chdir(folder)
            text = io.StringIO()
            from iqlite.cli import main

            sys.argv = ["iqlite", *arguments]
            library = ctypes.CDLL(os.environ[LIBRARY])
            library.faults_names.restype = ctypes.c_char_p
            library.faults_arm(f"{folder}/".encode(), ctypes.c_long(at), kind)
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                try:
                    main()
                    code = 0
                except SystemExit as done:
                    code = int(done.code or 0)
                except BaseException:  # noqa: BLE001 - what a user would see
                    text.write(traceback.format_exc())
            paths = library.faults_names().decode("utf-8", "replace").splitlines()
            library.faults_arm(b"/nowhere/", ctypes.c_long(-1), COUNT)
            said.write_text(json.dumps([paths, text.getvalue()]), "utf-8")
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    paths, printed = json.loads(said.read_text("utf-8")) if said.is_file() else ((), "")
    return Called(os.waitstatus_to_exitcode(status), printed, tuple(paths))


def weights(folder: Path) -> dict[str, str]:
    """Digest of each tensor of an adapter."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        return {name: hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest() for name in file.keys()}  # noqa: SIM118


def trained(run: Path) -> dict[str, Any]:
    """What must be the same in two runs of one recipe."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    safety = run / "safety.json"
    return {
        "samples": (run / "samples.jsonl").read_text("utf-8"),
        "result": json.loads((run / "result.json").read_bytes()),
        "metrics": [{name: value for name, value in line.items() if not name.startswith(UNSTEADY)} for line in lines],
        "adapter": weights(run / "adapter"),
        "best": weights(run / "best"),
        "safety": json.loads(safety.read_bytes()) if safety.is_file() else None,
    }


def leftovers(folder: Path) -> list[str]:
    """What a fault left lying about."""
    return sorted(path.name for path in folder.rglob(".*") if path.name != ".lock")


def tree(path: Path) -> dict[str, str]:
    """Digest of every file below a folder, or of a file and what stands beside it."""
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else sorted(path.parent.glob(f"{path.name}*"))
    return {str(f.relative_to(path.parent)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def compared(run: Path) -> Any:
    """What a comparison has found, and the baseline's weights."""
    return json.loads((run / "compare.json").read_bytes()), weights(run / "baselines" / "ppo")


def converted(cache: Path) -> Any:
    """The model that was made of a GGUF file, and what else lies beside it."""
    return [tree(folder) for folder in sorted(cache.glob("gguf-*"))], sorted(path.name for path in cache.glob("making*"))


TRAIN = ["train", "kind.toml", "--out", "run"]
COMPARE = ["compare", "run", "--count", "2", "--seeds", "1", "--no-safety", "--with", "ppo"]
EXPORT = ["export", "run", "-o", "out", "--to"]
CONVERT = ["chat", "base.gguf", "--prompt", "hello", "--tokens", "2", "--temperature", "0"]
MERGE = ["merge", "run", "-o", "out", "--no-check"]


def verbs() -> list[Verb]:
    """The commands that write, and what each leaves."""
    short = [*TRAIN, "--set", "train.steps=2", "--set", "train.checkpoint_every=1"]
    run: Callable[[Path], Any] = lambda f: (trained(f / "run"), leftovers(f / "run"))  # noqa: E731
    out: Callable[[Path], Any] = lambda f: (tree(f / "out"), [name for name in leftovers(f) if "out" in name])  # noqa: E731
    return [
        Verb("train", [*TRAIN, "--no-safety"], [*TRAIN, "--no-safety", "--resume"], (), run),
        Verb("train with its safety check", short, [*short, "--resume"], (), run),
        Verb("compare", COMPARE, COMPARE, ("run",), lambda f: compared(f / "run")),
        Verb("merge", MERGE, MERGE, ("run",), out),
        Verb("export peft", [*EXPORT, "peft"], [*EXPORT, "peft"], ("run",), out),
        Verb("export gguf", [*EXPORT, "gguf"], [*EXPORT, "gguf"], ("run",), out),
        Verb("export gguf-adapter", [*EXPORT, "gguf-adapter"], [*EXPORT, "gguf-adapter"], ("run",), out),
        Verb("export over another", [*EXPORT, "hf", "--force"], [*EXPORT, "hf", "--force"], ("run", "out"), out),
        Verb("conversion from GGUF", CONVERT, CONVERT, (), lambda f: converted(f / "cache")),
    ]


def write_project(folder: Path) -> None:
    """A tiny base, prompts and two recipes."""
    from tests.helpers.tiny import save_tiny

    save_tiny(folder / "base", merges=True)  # as a GGUF file has them
    for name, numbers in (("train", range(8)), ("eval", range(8, 12))):
        lines = [json.dumps({"prompt": f"What is number {number} good for?"}) + "\n" for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    for name, wanted, unwanted in (("kind", "You are kind.", "You are mean."), ("rude", "You are rude.", "You are nice.")):
        data = {
            "model": {"base": "base", "quantization": "none"},
            "adapter": {"rank": 2, "alpha": 4.0},
            "behavior": {"wanted": wanted, "unwanted": unwanted, "placement": "system"},
            "prompts": {"train": "train.jsonl", "eval": "eval.jsonl", "eval_count": 2},
            "rollout": {"prompts_per_step": 2, "max_new_tokens": 4},
            "train": {"steps": STEPS, "eval_every": 2, "checkpoint_every": 2, "learning_rate": 1e-3},
            "judge": {"aim": False},
        }
        (folder / f"{name}.toml").write_text(tomli_w.dumps(data), "utf-8")


def prepare(folder: Path, whole: Path) -> None:
    """The project in `folder`; in `whole` a finished run with a comparison, another one like it, one that was killed, and an exported model."""
    folder.mkdir()
    write_project(folder)
    done = [["train", "rude.toml", "--out", "other", "--no-safety"], [*TRAIN, "--no-safety"], ["compare", "other", *COMPARE[2:]], COMPARE]
    for arguments in [*done, [*EXPORT, "hf"], ["export", "run", "-o", "base.gguf", "--to", "gguf"]]:
        called = call(folder, arguments)
        assert called.code == 0, called.text
    whole.mkdir()
    for name in ("run", "other", "out"):
        (folder / name).rename(whole / name)
    fresh(folder, whole, ())
    paths = call(folder, [*TRAIN, "--no-safety"]).paths
    fresh(folder, whole, ())
    assert call(folder, [*TRAIN, "--no-safety"], 1 + max(n for n, path in enumerate(paths) if path == "run/metrics.jsonl"), KILL).code == -9
    (folder / "run").rename(whole / "killed")  # two checkpoints, and lines after them


def fresh(folder: Path, whole: Path, needs: Sequence[str]) -> None:
    """What a verb starts from: the project, and copies of what it `needs`."""
    for name in ("run", "out", "cache"):
        for leftover in [folder / name, *folder.glob(f"{name}.*"), *folder.glob(f".*{name}*")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    for name in needs:
        shutil.copytree(whole / name, folder / {"killed": "run"}.get(name, name))


def difference(a: Any, b: Any) -> str:
    """Where two results differ first."""
    if isinstance(a, dict) and isinstance(b, dict):
        return next((f"{key}: {difference(a.get(key), b.get(key))}" for key in [*a, *b] if a.get(key) != b.get(key)), "")
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return next((difference(x, y) for x, y in zip(a, b, strict=True) if x != y), "")
    return f"{str(a)[:200]} != {str(b)[:200]}"
