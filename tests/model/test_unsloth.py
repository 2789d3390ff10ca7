"""unsloth as a backend, held against the plain one: in processes of its own, since it changes transformers, PEFT and TRL for everybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iqlite.base import unsloth
from iqlite.errors import BaseError
from iqlite.recipe.schema import Recipe
from tests.helpers.tiny import save_tiny
from tests.helpers.unsloth_contract import measured

needs_unsloth = pytest.mark.skipif(not unsloth.installed(), reason="unsloth isn't installed (constraints-unsloth.txt)")


def child(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own with `folder` as its working folder."""
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("short") / "base", max_position_embeddings=64)


@pytest.fixture(scope="module")
def plain(base: Path) -> dict[str, Any]:
    return measured(base, "plain")


FORWARDS = "IQLITE_UNSLOTH_FORWARDS" in os.environ  # Triton's interpreter takes minutes over them


@pytest.fixture(scope="module", params=["cpu", "fused"])
def through_it(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    if request.param == "fused" and not FORWARDS:
        pytest.skip("its CUDA forwards take minutes in Triton's interpreter: set IQLITE_UNSLOTH_FORWARDS")
    folder = tmp_path_factory.mktemp(request.param)
    child("tests.helpers.unsloth_contract", base, folder / "found.safetensors", request.param, folder=folder)
    assert [path.name for path in folder.iterdir()] == ["found.safetensors"]
    found: dict[str, torch.Tensor] = load_file(folder / "found.safetensors")
    return found


@needs_unsloth
def test_everything_read_and_drawn_is_what_the_plain_backend_reads_and_draws(
    plain: dict[str, Any], through_it: dict[str, torch.Tensor]
) -> None:
    assert plain.keys() == through_it.keys()
    for name, right in plain.items():
        torch.testing.assert_close(through_it[name], right, atol=1e-5, rtol=1e-4, msg=name)


@needs_unsloth
def test_one_base_in_roles(through_it: dict[str, torch.Tensor]) -> None:
    assert int(through_it["bytes beside the base"]) == 0  # an adapter more costs its own numbers
    torch.testing.assert_close(through_it["fresh"], through_it["reference"], atol=1e-5, rtol=1e-4)  # KL 0 before the first step
    torch.testing.assert_close(through_it["head"][0], through_it["bare"][-1], atol=1e-5, rtol=1e-4)  # adapter off is the bare base
    assert (through_it["policy"] - through_it["ema"]).abs().max() > 0.1
    for name in ("reference", "training"):
        torch.testing.assert_close(through_it[f"{name} behind a prefix"], through_it[name], atol=1e-5, rtol=1e-4)


@needs_unsloth
def test_a_run_through_it_is_a_plain_run(make_recipe: Callable[..., Recipe], data: dict[str, Any], tmp_path: Path) -> None:
    import tomli_w

    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(data), "utf-8")
    runs = {}
    before = {path.name for path in tmp_path.iterdir()}
    for backend in ("unsloth", "plain"):
        said = child(
            "iqlite", "train", "recipe.toml", "--set", f"model.backend={backend}", "--set", "judge.aim=false",
            "--no-safety", "--json", "--out", backend, folder=tmp_path,
        )  # fmt: skip
        assert json.loads(said.stdout)["step"] == 3  # its banners aren't ours
        assert json.loads((tmp_path / backend / "environment.json").read_text("utf-8"))["backend"] == backend
        lines = [json.loads(line) for line in (tmp_path / backend / "metrics.jsonl").read_text("utf-8").splitlines()]
        runs[backend] = [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]
    assert {path.name for path in tmp_path.iterdir()} - before == {"unsloth", "plain"}
    for ours, theirs in zip(runs["plain"], runs["unsloth"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)


def test_what_can_t_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsloth, "installed", lambda: False)
    assert unsloth.prepare("auto", "llama", card=True) == unsloth.prepare("plain", "llama", card=True) == "plain"
    with pytest.raises(BaseError, match=r'isn\'t installed; .*model\.backend = "plain"'):
        unsloth.prepare("unsloth", "llama", card=True)
    monkeypatch.setattr(unsloth, "installed", lambda: True)
    with pytest.raises(BaseError, match=r"no fast path for a 'olmo2' model"):
        unsloth.prepare("unsloth", "olmo2", card=True)
    assert unsloth.prepare("auto", "olmo2", card=True) == unsloth.prepare("auto", "llama", card=False) == "plain"
