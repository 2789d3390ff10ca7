"""Several processes, started by torchrun: the run of one process, resumed by any number of them, and what is said when one of them ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from iqlite.api import begin
from iqlite.errors import RecipeError
from iqlite.machine.ranks import Ranks, _packed, _unpacked, launched_by
from iqlite.recipe.schema import Recipe
from tests.helpers.several import ROOT, launcher, started, work

ROUNDING = 2e-5  # of metrics, in nats and shares; a step's differences are 1e-7, and Adam enlarges those of a gradient near 0
LEARNED = {"steps": 6, "eval_every": 2, "checkpoint_every": 2}
OTHERS = {
    "objective": {"name": "policy-gradient", "gamma": 0.9, "centre": True},
    "superior": {"weights": "ema"},
    "train": {"steps": 3, "eval_every": 2, "checkpoint_every": 2, "updates_per_rollout": 2},
    "prompts": {"contrary": "contrary.jsonl"},
    "judge": {"aim": False},
}
"""What several processes share beside the plain path: advantages centred over the step, contrary rows, a second update, a slow average."""


@pytest.fixture
def recipe_file(data: dict[str, Any], tmp_path: Path) -> Callable[..., str]:
    """recipe_file("name", train={…}) → a recipe's file, the small recipe with tables merged into it."""
    rows = [{"prompt": f"Name {number} trees." + " Please." * (number % 4)} for number in range(8)]
    (tmp_path / "contrary.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def write(name: str, **tables: dict[str, Any]) -> str:
        merged = {key: {**data.get(key, {}), **tables.get(key, {})} for key in {**data, **tables}}
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(merged), "utf-8")
        return str(tmp_path / f"{name}.toml")

    return write


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_bytes().split(b"\n")[:-1]]  # the last may be being written


def check_alike(one: Path, other: Path) -> None:
    """The same answers; metrics, scores and adapter but for rounding."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        for before, after in zip(lines(one, name), lines(other, name), strict=True):
            assert before.keys() == after.keys()
            for key, value in before.items():
                if not key.startswith(("time/", "memory/")):
                    assert after[key] == (value if isinstance(value, str) else pytest.approx(value, rel=ROUNDING, abs=ROUNDING)), key
    mine, yours = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert all(torch.allclose(mine[key], yours[key], rtol=0, atol=ROUNDING) for key in mine)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rows_are_dealt_evenly(size: int) -> None:
    costs = [int(cost) for cost in torch.randint(1, 200, (17,), generator=torch.Generator().manual_seed(size))]
    shares = [Ranks(rank, size).mine(costs) for rank in range(size)]
    assert sorted(row for share in shares for row in share) == list(range(17))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    in_all = [sum(costs[row] for row in share) for share in shares]
    assert max(in_all) - min(in_all) <= max(costs)
    assert Ranks(0, 1).mine(costs) == list(range(17))


def test_a_packet_brings_everything_to_the_bit() -> None:
    tensors = {
        "a": torch.tensor([1.5, -0.0, float("nan"), float("inf")]),
        "b": torch.ones(2, 3, dtype=torch.bfloat16),
        "c": torch.arange(3),
    }
    value = {"step": 3, "kl": 0.1 + 0.2, "text": "gr\u00fcn \u2028", "none": None, "rows": [1, 2]}
    said, found = _unpacked(_packed(value, tensors))
    assert said == value and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].numpy(force=True).tobytes() == tensor.numpy().tobytes() if name != "b" else torch.equal(found[name], tensor)  # fmt: skip
    assert _unpacked(_packed(None, {})) == (None, {})


def test_several_processes_are_one(recipe_file: Callable[..., str], tmp_path: Path) -> None:
    """Two against one: the plain path, all that is shared beside it, a process that is short of memory; and 1 → 2 → 1 resumed."""
    plain, others, legs = recipe_file("plain", train=LEARNED), recipe_file("others", **OTHERS), str(tmp_path / "legs")
    alone: list[dict[str, Any]] = [
        {"recipe": recipe, "out": str(tmp_path / f"{name}-1")} for name, recipe in (("plain", plain), ("others", others))
    ]
    work([*alone, {"recipe": plain, "out": legs, "stop": 2}])
    checkpoint = load_file(tmp_path / "legs" / "checkpoints" / "step-000002" / "state.safetensors")
    together: list[dict[str, Any]] = [
        {"recipe": others, "out": str(tmp_path / "others-2")},
        {"recipe": plain, "out": str(tmp_path / "short-2"), "limit": 80},
    ]
    started(2, [*together, {"recipe": plain, "out": legs, "resume": True, "stop": 2}], tmp_path)
    assert len(lines(tmp_path / "legs", "metrics.jsonl")) == 5
    adapter = load_file(tmp_path / "legs" / "checkpoints" / "step-000002" / "state.safetensors")
    assert all(torch.equal(adapter[key], checkpoint[key]) for key in checkpoint)
    work([{"recipe": plain, "out": legs, "resume": True}])
    for one, other in (("others-1", "others-2"), ("plain-1", "short-2"), ("plain-1", "legs")):
        check_alike(tmp_path / one, tmp_path / other)
    assert json.loads((tmp_path / "others-2" / "environment.json").read_bytes())["processes"] == 2
    assert "processes" not in json.loads((tmp_path / "others-1" / "environment.json").read_bytes())


def test_more_processes_than_prompts(make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "5"), ("LOCAL_WORLD_SIZE", "5")):
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"5 processes share out a step of 4 prompts, so 1 would have nothing to do: raise rollout\."):
        begin(make_recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_way_on_names_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_by() == ["iqlite"]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert " ".join(launched_by()) == "torchrun --nproc-per-node 2 -m iqlite"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert " ".join(launched_by()) == "accelerate launch --multi_gpu --num_processes 4 -m iqlite"


def test_plan_knows_processes(recipe_file: Callable[..., str], iqlite: Callable[..., tuple[int, str, str]]) -> None:
    recipe = recipe_file("planned", rollout={"prompts_per_step": 7, "max_new_tokens": 6})
    alone, two = (json.loads(iqlite("plan", recipe, "--vram", "8GB", "--json", *more)[1]) for more in ((), ("--processes", "2")))
    assert (alone["prompts_of_a_process"], two["prompts_of_a_process"], two["processes"]) == (7, 4, 2)
    assert two["peak_bytes"] < alone["peak_bytes"] and two["stays_bytes"] == alone["stays_bytes"]  # each has the whole base
    code, _, said = iqlite("plan", recipe, "--vram", "8GB", "--processes", "8")
    assert code == 2 and said.count("\n") == 1 and "8 processes share out a step of 7 prompts, so 1 would have nothing to do" in said


def until_step(out: Path, step: int, *processes: subprocess.Popen[str]) -> None:
    """Waits until a run has come to a step."""
    deadline = time.monotonic() + 300
    while not ((out / "metrics.jsonl").exists() and len(lines(out, "metrics.jsonl")) > step):
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline, processes[0].communicate()[0]
        time.sleep(0.02)  # the run is another process; there is nothing to wait on


def test_a_killed_process_and_ctrl_c(recipe_file: Callable[..., str], tmp_path: Path) -> None:
    """One message, all end, a checkpoint stays; on from it, Ctrl-C finishes the step; on from there, by one process."""
    recipe, out = recipe_file("long", train={"steps": 90, "eval_every": 90, "checkpoint_every": 2}, judge={"aim": False}), tmp_path / "run"
    command = ["-m", "iqlite", "train", recipe, "--out", str(out), "--no-safety"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    torchrun = subprocess.Popen([*launcher(2), *command], **pipes)
    until_step(out, 4, torchrun)
    victim = next(child for child in psutil.Process(torchrun.pid).children() if child.environ()["RANK"] == "1")
    victim.kill()
    began = time.monotonic()
    said = torchrun.communicate(timeout=60)[0]
    assert time.monotonic() - began < 25 and torchrun.returncode == 1
    ours = [line for line in said.splitlines() if line.startswith("iqlite: ")]
    assert len(ours) == 1 and f"process 1 ({victim.pid} on" in ours[0] and ours[0].endswith("with --resume."), said
    assert said.count("step 1/90") == 1  # one process prints

    before = len(lines(out, "metrics.jsonl"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    processes = []  # by hand: without a launcher, the leader keeps the store, and nobody passes the signal on or kills who is late
    for rank in ("0", "1"):
        one = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(subprocess.Popen([sys.executable, *command, "--resume"], env=os.environ | one, **pipes))
    until_step(out, before, *processes)
    for process in processes:
        process.send_signal(signal.SIGINT)
    said, nothing = (process.communicate(timeout=60)[0] for process in processes)
    stopped = max(int(folder.name.removeprefix("step-")) for folder in (out / "checkpoints").iterdir())
    assert f"stopped after step {stopped} of 90; go on with:  torchrun --nproc-per-node 2 -m iqlite train" in said and not nothing
    assert [process.returncode for process in processes] == [130, 130] and len(lines(out, "metrics.jsonl")) == stopped + 1

    work([{"recipe": recipe, "out": str(out), "resume": True, "stop": 1}])
    assert len(lines(out, "metrics.jsonl")) == stopped + 2
