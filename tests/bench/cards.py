"""Several processes beside one: how far apart their runs are and why, how long a step takes, and what is said when one of them fails.

    python -m tests.bench.cards equal [--tiny]    # one process at three widths, two and three processes: 20 steps of the embedded model
    python -m tests.bench.cards resume [--tiny]   # a run by 2, then 1, then 3 processes, beside one process in one go
    python -m tests.bench.cards speed             # seconds a step, wall and CPU, one thread a process, three steps each
    python -m tests.bench.cards faults   # kill -9, SIGSTOP, a full memory, Ctrl-C, on a tiny model; then --resume

A part writes its figures to DIR/PART.json (--out DIR). Runs that are there already aren't trained again. Every draw of a token is recorded with the distance of its random
number from the nearest edge between two tokens: where two runs part, that is the tie that did it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from tests.bench.unchanged import metrics, recipes
from tests.helpers.several import launcher

ROOT = Path(__file__).parents[2]
SMALL = {"rollout.max_new_tokens": 16, "prompts.eval_count": 3, "train.eval_every": 5, "train.checkpoint_every": 5, "judge.aim": "false"}
EQUAL = SMALL | {"rollout.prompts_per_step": 3, "train.steps": 20}
TINY = EQUAL | {"rollout.prompts_per_step": 6, "train.learning_rate": 2e-3, "train.eval_every": 20}
SPEED = SMALL | {"train.steps": 5, "train.eval_every": 1000, "prompts.eval_count": 1}
WIDTHS = {"one, rows 1": {"rollout.batch": 1}, "one, 64 tokens": {"train.batch_tokens": 64}}


def worker(recipe: str, out: str, stop: int, resume: bool, overrides: list[str]) -> None:
    """Trains in this process, one of several or alone, and records draws and clocks."""
    import torch

    from iqlite.api import begin, load_recipe
    from tests.helpers.reporters import Silent

    decoding: Any
    loop: Any
    decoding, loop = (importlib.import_module(f"iqlite.{name}") for name in ("model.decoding", "training.loop"))
    draws: list[list[Any]] = []
    now: dict[str, Any] = {}
    noise, choose, part_of = decoding.noise, decoding.choose, loop.part_of

    def noted_noise(seed: int, stream: str, step: int, index: Any, position: int) -> Any:
        now.update(stream=stream, step=step, index=[int(number) for number in index], position=position)
        return noise(seed, stream, step, index, position)

    def noted_choose(logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
        token_B: torch.Tensor = choose(logits_BV, uniform_B, temperature, top_p)
        cumulative_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
        for row, token in enumerate(token_B.tolist()):
            edges = [float(cumulative_BV[row, token]), float(cumulative_BV[row, token - 1]) if token else 0.0]
            near = min(abs(float(uniform_B[row]) - edge) for edge in edges)
            draws.append([now["stream"], now["step"], now["index"][row], now["position"], token, near])
        return token_B

    clocks: list[tuple[float, float]] = []

    def noted_part_of(*arguments: Any) -> Any:
        clocks.append((time.perf_counter(), time.process_time()))
        return part_of(*arguments)

    session, run = begin(load_recipe(recipe, overrides), out, resume=resume)
    decoding.noise, decoding.choose, loop.part_of = noted_noise, noted_choose, noted_part_of
    left = [stop or 10**9]

    def over() -> bool:
        left[0] -= 1
        return left[0] <= 0

    with run.held():
        loop.train(session, run, Silent(), over)
    session.ranks.leave()
    file = Path(out) / f"draws-{session.ranks.size}-{session.ranks.rank}.json"
    file.write_text(json.dumps({"draws": draws, "clocks": clocks, "threads": torch.get_num_threads()}), "utf-8")


def run(processes: int, out: Path, settings: dict[str, Any], recipe: str = "cheerful-135m", *, stop: int = 0, resume: bool = False) -> None:
    """A run by so many processes of one thread each."""
    if (out / "result.json").exists() and not resume:
        return
    start = [sys.executable] if processes == 1 else launcher(processes)
    command = [*start, "-m", "tests.bench.cards", "worker", recipe, str(out), str(stop), str(int(resume)), *(f"{key}={value}" for key, value in settings.items())]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{out}: {done.stderr[-2000:]}")
    print(f"{time.strftime('%H:%M:%S')} {out.name}", flush=True)


def draws_of(out: Path) -> dict[tuple[Any, ...], tuple[int, float]]:
    """(step, position, stream, prompt) → (token, distance of its random number from the nearest edge)."""
    found = {}
    for file in out.glob("draws-*.json"):
        for stream, step, index, position, token, near in json.loads(file.read_bytes())["draws"]:
            found[step, position, stream, index] = token, near
    return found


def apart(one: Path, other: Path) -> dict[str, Any]:
    """How far two runs are apart: before the first token that differs, and at the end; and that token."""
    mine, yours = draws_of(one), draws_of(other)
    # Evaluations' draws all have step 0: they say nothing of when.
    parted = sorted(key for key in mine.keys() & yours.keys() if key[2] == "train" and mine[key][0] != yours[key][0])
    first = parted[0] if parted else None
    worst: dict[str, tuple[float, float]] = {}
    before, after = metrics(one), metrics(other)
    for a, b in zip(before, after, strict=True):
        same = first is None or a["step"] < first[0]
        for name in a.keys() & b.keys() - {"step"}:
            if a[name] is not None and b[name] is not None:
                was = worst.get(name, (0.0, 0.0))
                difference = abs(a[name] - b[name])
                worst[name] = max(was[0], difference if same else 0.0), max(was[1], difference)
    return {
        "samples part at step": first and first[0],
        "tie": first and {"prompt": first[3], "position": first[1], "tokens": [mine[first][0], yours[first][0]], "distances from the edge": [mine[first][1], yours[first][1]]},
        "draws alike before": sum(key[2] == "train" and (first is None or key[:2] < first[:2]) for key in mine),
        "largest difference by metric before": {name: value[0] for name, value in sorted(worst.items(), key=lambda one: -one[1][0])},
        "largest difference by metric at all": {name: value[1] for name, value in sorted(worst.items(), key=lambda one: -one[1][1])},
    }  # fmt: skip


def tiny(folder: Path) -> str:
    """The recipe of a tiny random model."""
    data = recipes(folder)["contrastive-full-kl"]
    data["train"] |= {"steps": 4000, "eval_every": 1000, "checkpoint_every": 2}
    (folder / "tiny.toml").write_text(tomli_w.dumps(data), "utf-8")
    return str(folder / "tiny.toml")


def equal(folder: Path, recipe: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One process at three widths, two and three processes."""
    runs: dict[str, tuple[int, dict[str, Any]]] = {"one": (1, {}), "two": (2, {}), "three": (3, {})} | {
        name: (1, more) for name, more in WIDTHS.items()
    }
    for name, (processes, more) in runs.items():
        run(processes, folder / name.replace(", ", "-").replace(" ", "-"), settings | more, recipe)
    return {name: apart(folder / "one", folder / name.replace(", ", "-").replace(" ", "-")) for name in runs if name != "one"}


def resume(folder: Path, recipe: str, settings: dict[str, Any]) -> dict[str, Any]:
    """2 → 1 → 3 processes, beside one."""
    legs = folder / "legs"
    run(1, folder / "one", settings, recipe)
    if not (legs / "result.json").exists():
        run(2, legs, settings, recipe, stop=7)
        run(1, legs, settings, recipe, stop=6, resume=True)
        run(3, legs, settings, recipe, resume=True)
    return {"2 → 1 → 3, stopped after steps 7 and 13": apart(folder / "one", legs)}


def seconds(out: Path) -> list[dict[str, Any]]:
    """Wall and CPU seconds of the steps after the first, which warms up, by process."""
    found = []
    for file in sorted(out.glob("draws-*.json")):
        clocks = json.loads(file.read_bytes())["clocks"]
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(clocks)][1:]
        found.append(
            {"wall_s": [s[0] for s in steps], "cpu_s": [s[1] for s in steps], "median_cpu_s": statistics.median(s[1] for s in steps)}
        )
    return found


def speed(folder: Path) -> dict[str, Any]:
    """8 prompts by one and by two processes, and 16 by two."""
    found: dict[str, Any] = {}
    for name, processes, prompts in (("1 process, 8 prompts", 1, 8), ("2 processes, 8 prompts", 2, 8), ("2 processes, 16 prompts", 2, 16)):
        out = folder / f"speed-{processes}-{prompts}"
        run(processes, out, SPEED | {"rollout.prompts_per_step": prompts})
        found[name] = seconds(out)
    return found


def fails(folder: Path, kind: str, processes: int, victim: int) -> dict[str, Any]:
    """A tiny model's run in which a process fails: what is said, when, and where --resume goes on."""
    out = folder / f"fault-{kind}-{processes}-{victim}"
    shutil.rmtree(out, ignore_errors=True)
    recipe = tiny(folder)
    command = [*launcher(processes), "-m", "iqlite", "train", recipe, "--out", str(out), "--no-safety"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip

    def steps() -> int:
        file = out / "metrics.jsonl"
        return len(file.read_bytes().splitlines()) - 1 if file.exists() else 0

    while steps() < 4 and process.poll() is None:
        time.sleep(0.05)
    child = {int(one.environ()["RANK"]): one for one in psutil.Process(process.pid).children()}[victim]
    began = time.monotonic()
    if kind == "kill":
        child.kill()
    elif kind == "stop":
        child.suspend()
    elif kind == "memory":
        child.rlimit(psutil.RLIMIT_AS, (child.memory_info().vms, -1))
    else:
        os.killpg(process.pid, signal.SIGINT)
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("iqlite: ", "stopped after", "memory was full", "another process has", "finishing")):
            said.append([round(time.monotonic() - began, 1), line.strip()])
    code, ended = process.wait(), time.monotonic() - began
    at = max(int(one.name.removeprefix("step-")) for one in (out / "checkpoints").glob("step-*"))
    done = steps()
    return {"said": said, "all ended after s": round(ended, 1), "exit code": code, "steps done": done, "last checkpoint": at, "goes on at": goes_on(recipe, out)}  # fmt: skip


def goes_on(recipe: str, out: Path) -> int:
    """The first step that a resumed run does."""
    command = [sys.executable, "-m", "iqlite", "train", recipe, "--out", str(out), "--resume", "--no-safety"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            process.communicate()
            return int(line.split()[1].split("/")[0])
    return -1


def faults(folder: Path) -> dict[str, Any]:
    """Each way to fail, of a process that follows and of the one that leads."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's script starts what runs in its background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    jobs = (("kill", 2, 1), ("kill", 2, 0), ("kill", 3, 2), ("interrupt", 2, 0), ("memory", 2, 1), ("stop", 2, 1), ("stop", 2, 0))
    return {f"{kind}: process {victim} of {processes}": fails(folder, kind, processes, victim) for kind, processes, victim in jobs}


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        recipe, out, stop, resumed, *overrides = sys.argv[2:]
        worker(recipe, out, int(stop), bool(int(resumed)), overrides)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("equal", "resume", "speed", "faults"))
    parser.add_argument("--tiny", action="store_true", help="a tiny random model for equal and resume")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "cards")
    asked = parser.parse_args()
    folder = asked.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if asked.part in ("equal", "resume"):
        recipe, settings = (tiny(folder), TINY) if asked.tiny else ("cheerful-135m", EQUAL)
        found = {"equal": equal, "resume": resume}[asked.part](folder, recipe, settings)
    else:
        found = {"speed": speed, "faults": faults}[asked.part](folder)
    (folder / f"{asked.part}.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(json.dumps(found, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
