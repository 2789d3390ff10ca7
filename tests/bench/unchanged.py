"""Does another version of the code still compute the same? Runs both, byte for byte, on one machine.

    git worktree add ../before COMMIT
    python -m tests.bench.unchanged ../before [--demo]

Every estimator × objective trains three steps on a tiny model, and with --demo `cheerful-135m` four; of both versions' runs, compared: metrics
(but for time/ and memory/, and lines that only one has), samples and the adapter's tensors. A run of the other version is opened by this one:
resumed from its last checkpoint, it ends in the same adapter. A line a run; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomli_w
from safetensors import safe_open

from iqlite.method.estimators import ESTIMATORS
from iqlite.method.objectives import OBJECTIVES
from tests.helpers.tiny import save_tiny

HERE = Path(__file__).parents[2]
UNSTEADY = ("time/", "memory/")
ADAPTER = "adapter_model.safetensors"


def train(code: Path, recipe: Path, out: Path, *options: str) -> None:
    """`iqlite train` by the code in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "iqlite", "train", str(recipe), "--out", str(out), "--no-safety", *options]
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 130):
        raise SystemExit(f"{code}: {recipe.name} ended with {done.returncode}: {done.stderr[-800:]}")


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(UNSTEADY)} for line in lines]


def digest(file: Path) -> str:
    """Of the tensors' names and bytes; safetensors writes the entries of its header's metadata in any order."""
    with safe_open(file, "numpy") as opened:
        data = b"".join(name.encode() + opened.get_tensor(name).tobytes() for name in sorted(opened.keys()))
    return hashlib.sha256(data).hexdigest()[:12]


def differences(before: Path, after: Path) -> list[str]:
    """What isn't the same in two runs."""
    old, new = metrics(before), metrics(after)
    found = [] if len(old) == len(new) else ["number of lines of metrics"]
    found += [f"{name} at step {a['step']}" for a, b in zip(old, new, strict=False) for name in a.keys() & b.keys() if a[name] != b[name]]
    found += ["samples.jsonl"] if (before / "samples.jsonl").read_bytes() != (after / "samples.jsonl").read_bytes() else []
    return found + (["adapter"] if digest(before / "adapter" / ADAPTER) != digest(after / "adapter" / ADAPTER) else [])


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """A tiny recipe for each estimator and objective; the first trains the adapter that `adapter` reads."""
    save_tiny(folder / "base")
    for name, numbers in (("train", range(8)), ("eval", range(8, 12))):
        lines = [json.dumps({"prompt": f"What is number {number} good for?"}) + "\n" for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    behavior = {"wanted": "You are kind.", "unwanted": "You are mean."}
    made = {}
    for estimator in ("prompted", *(one for one in ESTIMATORS if one != "prompted")):
        for objective in OBJECTIVES:
            data: dict[str, Any] = {
                "model": {"base": str(folder / "base"), "quantization": "none"},
                "adapter": {"rank": 4, "alpha": 8.0},
                "behavior": {"placement": "system", **behavior},
                "prompts": {"train": "train.jsonl", "eval": "eval.jsonl", "eval_count": 2},
                "superior": {"estimator": estimator},
                "objective": {"name": objective},
                "rollout": {"prompts_per_step": 4, "max_new_tokens": 6},
                "train": {"steps": 3, "eval_every": 2, "checkpoint_every": 2},
                "judge": {"aim": False},
            }
            if estimator == "mixture":
                one, other = {"name": "kind", "weight": 0.7, **behavior}, {"name": "short", "weight": 0.3, "wanted": "Be short.", "unwanted": "Be long."}  # fmt: skip
                data["behavior"] = {"placement": "system", "mixture": [one, other]}
            if estimator == "adapter":
                data["superior"]["adapter"] = str(folder / "prompted-full-kl-before" / "adapter")
            made[f"{estimator}-{objective}"] = data
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("--demo", action="store_true")
    asked = parser.parse_args()
    before, different = asked.before.resolve(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = recipes(folder)
        for name, data in made.items():
            (folder / f"{name}.toml").write_text(tomli_w.dumps(data), "utf-8")
        jobs: dict[str, tuple[Path, list[str]]] = {name: (folder / f"{name}.toml", []) for name in made}
        if asked.demo:
            jobs["cheerful-135m"] = (HERE / "recipes" / "cheerful-135m.toml", ["--set", "train.steps=4", "--set", "prompts.eval_count=8"])
        for name, (recipe, options) in jobs.items():
            runs = [folder / f"{name}-{when}" for when in ("before", "after")]
            for code, run in zip((before, HERE), runs, strict=True):
                train(code, recipe, run, *options)
            found = differences(*runs)
            different += bool(found)
            adapter = digest(runs[1] / "adapter" / ADAPTER)
            print(f"{name:32} adapter {adapter}  {'the same' if not found else 'DIFFERENT: ' + ', '.join(found[:4])}", flush=True)
        old = folder / "prompted-full-kl-before"
        was = digest(old / "adapter" / ADAPTER)
        for leftover in ("result.json", f"adapter/{ADAPTER}"):
            (old / leftover).unlink()
        for late in sorted((old / "checkpoints").iterdir())[1:]:  # as if it had been killed after the first checkpoint it kept
            for file in late.iterdir():
                file.unlink()
            late.rmdir()
        train(HERE, folder / "prompted-full-kl.toml", old, "--resume")
        same = digest(old / "adapter" / ADAPTER) == was
        different += not same
        print(f"a run of the other version, resumed by this one: {'the same adapter' if same else 'DIFFERENT'}")
    raise SystemExit(min(1, different))


if __name__ == "__main__":
    main()
