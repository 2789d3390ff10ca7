"""Kill −9 and resume: the same token ids, weights and metrics as an uninterrupted run. Ctrl-C: a checkpoint, and the way on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from iqlite.cli import main
from iqlite.model.policy import Policy
from iqlite.run.rundir import RunDir
from iqlite.training.loop import train
from iqlite.training.opening import environment
from tests.helpers.reporters import Silent

STEPS = 8


def write_recipe(folder: Path, data: dict[str, Any], **tables: dict[str, Any]) -> Path:
    data = {name: {**data.get(name, {}), **tables.get(name, {})} for name in {**data, **tables}}
    data["train"] |= {"steps": STEPS, "eval_every": 3, "checkpoint_every": 2}
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(data), "utf-8")
    return path


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "iqlite", "train", str(recipe), "--out", str(out), "--no-safety"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )


def forked(recipe: Path, out: Path) -> int:
    """The same in a process that is forked from this one, which has loaded everything: its number."""
    process = os.fork()
    if process == 0:
        sys.argv = ["iqlite", "train", str(recipe), "--out", str(out), "--no-safety"]
        try:
            main()
        finally:
            os._exit(0)
    return process


def wait_for_step(out: Path, step: int, lives: Callable[[], bool]) -> None:
    """Until metrics.jsonl holds that step (0: as soon as the run directory is there)."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and lives():
        metrics = out / "metrics.jsonl"
        if (step == 0 and out.exists()) or (metrics.exists() and len(metrics.read_text().splitlines()) > step):
            return
        time.sleep(0.002)  # the run is another process; there is nothing to wait on
    pytest.fail(f"the run never got to step {step}")


def record(out: Path) -> dict[str, Any]:
    """Everything that must be the same: metrics but for time and memory, samples, the adapters' tensors as bytes."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in metrics]
    tensors = {
        f"{folder}/{name}": value.numpy().tobytes()
        for folder in ("adapter", "best")
        for name, value in load_file(out / folder / "adapter_model.safetensors").items()
    }
    return {"metrics": kept, "samples": (out / "samples.jsonl").read_text(), "tensors": tensors}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A forked process has none of torch's others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("tables", "killed_at"),
    [
        ({}, random.Random(7).randint(1, STEPS - 2)),
        ({"superior": {"weights": "ema"}, "objective": {"name": "policy-gradient"}, "train": {"updates_per_rollout": 2}}, STEPS - 3),
        ({}, 0),
    ],
    ids=["base weights", "ema weights and several updates", "before the first checkpoint"],
)
def test_kill_and_resume_is_exact(
    data: dict[str, Any], tmp_path: Path, iqlite: Callable[..., tuple[int, str, str]], tables: dict[str, Any], killed_at: int
) -> None:
    recipe = write_recipe(tmp_path, data, **tables)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, _, err = iqlite("train", recipe, "--out", whole, "--no-safety")
    assert code == 0, err
    killed = forked(recipe, broken)
    wait_for_step(broken, killed_at, lambda: os.waitpid(killed, os.WNOHANG) == (0, 0))
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    assert not (broken / "result.json").exists()
    code, _, err = iqlite("train", recipe, "--out", broken, "--no-safety", "--resume")
    assert code == 0, err
    assert record(broken) == record(whole)


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(
    data: dict[str, Any], tmp_path: Path, iqlite: Callable[..., tuple[int, str, str]]
) -> None:
    recipe, out = write_recipe(tmp_path, data, rollout={"max_new_tokens": 64}), tmp_path / "run"
    process = start(recipe, out)
    wait_for_step(out, 1, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "--resume" in said and "Traceback" not in said
    steps = len((out / "metrics.jsonl").read_text().splitlines()) - 1
    assert RunDir(out).last_step() == steps < STEPS
    command = said.strip().splitlines()[-1].rpartition("go on with:")[2].split()
    assert command[:2] == ["iqlite", "train"] and "--no-safety" in command  # as it was started
    code, _, err = iqlite(*command[1:])
    assert code == 0, err
    assert len((out / "metrics.jsonl").read_text().splitlines()) == STEPS + 1


def test_resuming_a_finished_run_changes_nothing(make_session: Callable[..., Any], tmp_path: Path) -> None:
    session = make_session()
    run = RunDir.create(tmp_path / "run", session.recipe, environment(session))
    first = train(session, run, Silent())
    before = record(run.path)
    assert train(make_session(), run, Silent()) == first
    assert record(run.path) == before


def test_optimizer_state_comes_back_to_the_bit(make_session: Callable[..., Any], tmp_path: Path) -> None:
    from iqlite.training.optimizer import load_state_of, make_optimizer, state_of

    session = make_session()
    policy: Policy = session.policy
    optimizer = make_optimizer(policy, "adamw")
    for parameter in policy.parameters.values():
        parameter.grad = parameter.detach() * 0.1 + 0.01
    optimizer.step()
    tensors, numbers = state_of(optimizer)
    again = make_optimizer(policy, "adamw")
    load_state_of(again, tensors, numbers)
    for before, after in zip(optimizer.state_dict()["state"].values(), again.state_dict()["state"].values(), strict=True):
        assert all(bytes(before[k].numpy().data) == bytes(after[k].numpy().data) for k in before)


def test_an_8_bit_optimizer_resumes_exactly(make_session: Callable[..., Any], tmp_path: Path) -> None:
    """CUDA's default optimizer; its state goes through a checkpoint's safetensors and JSON. Rank 64: smaller tensors stay in 32 bits."""
    tables = {"adapter": {"rank": 64, "alpha": 64.0}, "train": {"steps": 4, "optimizer": "paged-adamw-8bit", "checkpoint_every": 2}}
    runs = {}
    for name in ("whole", "broken"):
        session = make_session(**tables)
        runs[name] = RunDir.create(tmp_path / name, session.recipe, environment(session))
        if name == "broken":
            train(session, runs[name], Silent(), lambda: len(runs["broken"].metrics()) == 3)
            assert runs[name].last_step() == 2
            tensors, state = runs[name].load_checkpoint() or ({}, {})
            assert any(key.endswith(".state1") and value.dtype == torch.uint8 for key, value in tensors.items()) and state["optimizer"]
            session = make_session(**tables)
        train(session, runs[name], Silent())
    assert record(runs["broken"].path) == record(runs["whole"].path)


def test_a_kill_between_the_first_look_and_the_first_checkpoint_repeats_nothing(make_session: Callable[..., Any], tmp_path: Path) -> None:
    whole, broken = make_session(), make_session()
    run = RunDir.create(tmp_path / "whole", whole.recipe, environment(whole))
    train(whole, run, Silent())
    cut = RunDir.create(tmp_path / "broken", broken.recipe, environment(broken))
    train(broken, cut, Silent(), lambda: True)
    shutil.rmtree(cut.path / "checkpoints" / "step-000001")  # as if the kill had come before it was written
    assert cut.last_step() == 0 and len(cut.metrics()) == 2
    train(make_session(), cut, Silent())
    assert record(cut.path) == record(run.path)
