"""Shared fixtures: tiny model folders, a recipe on one, and sessions opened from it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ["IQLITE_CACHE"] = tempfile.mkdtemp(prefix="iqlite-")  # what a user, or another version, has kept is none of a test's
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes on the same cores: threads of each would wait for one another

import pytest

from iqlite.cli import main
from iqlite.recipe.reading import parse_recipe
from iqlite.recipe.schema import Recipe
from iqlite.run.rundir import RunDir
from iqlite.training.opening import environment, open_session
from iqlite.training.session import Session
from tests.helpers.tiny import save_tiny, shake


def pytest_configure() -> None:
    for ending in {"SIGINT", "SIGHUP", "SIGQUIT"} & {*dir(signal)}:  # a suite that a shell started in the background has them ignored
        if signal.getsignal(getattr(signal, ending)) == signal.SIG_IGN:
            signal.signal(getattr(signal, ending), signal.default_int_handler if ending == "SIGINT" else signal.SIG_DFL)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["IQLITE_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(architecture, template, **config) → a model folder, made once a test session."""
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", template: str = "chatml", **config: Any) -> Path:
        key = json.dumps([architecture, template, config])
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp("tiny") / f"{architecture}-{template}", architecture, template, **config)
        return made[key]

    return make


@pytest.fixture
def data(tiny: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """A small recipe's data, ready to be changed by a test: llama architecture, unquantised, 3 steps, prompts in tmp_path."""
    rows = [{"prompt": f"What is number {number} good for?"} for number in range(12)]
    for name, part in (("train.jsonl", rows[:8]), ("eval.jsonl", rows[8:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    return {
        "model": {"base": str(tiny()), "quantization": "none"},
        "adapter": {"rank": 4, "alpha": 8.0},
        "behavior": {"wanted": "You are kind.", "unwanted": "You are mean.", "placement": "system"},
        "prompts": {"train": "train.jsonl", "eval": "eval.jsonl", "eval_count": 2},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 6},
        "train": {"steps": 3, "eval_every": 2, "checkpoint_every": 2},
    }


@pytest.fixture
def make_recipe(data: dict[str, Any], tmp_path: Path) -> Callable[..., Recipe]:
    """make_recipe(train={"steps": 5}, …): the small recipe with tables merged into it."""

    def make(**tables: dict[str, Any]) -> Recipe:
        merged = {name: {**data.get(name, {}), **tables.get(name, {})} for name in {**data, **tables}}
        return parse_recipe(merged, tmp_path / "recipe.toml")

    return make


@pytest.fixture
def make_session(make_recipe: Callable[..., Recipe]) -> Callable[..., Session]:
    """make_session(superior={"estimator": "prompted"}, …): an opened session of the small recipe."""
    return lambda **tables: open_session(make_recipe(**tables))


@pytest.fixture
def iqlite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """iqlite(*arguments) → (exit code, standard output, standard error), with tmp_path as working folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["iqlite", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def make_run(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., RunDir]:
    """make_run(model={…}, …) → a run directory whose adapter, of the small recipe, has random values: as good as trained."""

    def make(name: str = "run", **tables: dict[str, Any]) -> RunDir:
        session = open_session(make_recipe(**tables))
        shake(session.policy)
        run = RunDir.create(tmp_path / name, session.recipe, environment(session))
        run.save_folder(run.adapter, session.policy.save_adapter)
        return run

    return make
