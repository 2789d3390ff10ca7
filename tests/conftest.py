"""Shared fixtures: tiny model folders, a recipe on one, and sessions opened from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

import pytest

from iqlite.recipe import Recipe, parse_recipe
from iqlite.session import Session, open_session
from tests.tiny import save_tiny


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
