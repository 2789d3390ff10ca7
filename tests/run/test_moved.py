"""A run whose folder, project or base has moved opens where its files are now."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from iqlite.errors import RunError
from iqlite.recipe.reading import load_recipe
from iqlite.run.rundir import RunDir
from iqlite.training.opening import environment, open_session


@pytest.fixture
def project(data: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with base, prompts, recipe and a run of it."""
    folder = tmp_path / "project"
    shutil.copytree(tiny(), folder / "base")
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copy(tmp_path / name, folder)
    (folder / "r.toml").write_text(tomli_w.dumps(data | {"model": {"base": "base", "quantization": "none"}}))
    session = open_session(load_recipe(folder / "r.toml"))
    RunDir.create(folder / "runs" / "a", session.recipe, environment(session))
    return folder


def paths(run: RunDir) -> list[str]:
    recipe = run.recipe()
    return [str(recipe.model.base), str(recipe.prompts.train), str(recipe.prompts.eval)]


def expected(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("base", "train.jsonl", "eval.jsonl")]


def test_a_project_that_moved(project: Path, tmp_path: Path) -> None:
    moved = project.rename(tmp_path / "elsewhere")
    run = RunDir.open(moved / "runs" / "a")
    assert paths(run) == expected(moved)
    run.check_base()
    session = open_session(load_recipe(moved / "r.toml"))
    run.check_same(session.recipe, environment(session))  # the same work: it resumes
    run.take_over(session.recipe)
    assert paths(RunDir.open(moved / "runs" / "a")) == expected(moved)


def test_a_copy_beside_the_original_has_its_own_files(project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts that were changed in the copy since: the original's, which have the digest that was noted."""
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    assert paths(RunDir.open(copy / "runs" / "a")) == expected(copy)
    (copy / "train.jsonl").write_text('{"prompt": "another"}\n')
    assert paths(RunDir.open(copy / "runs" / "a"))[1] == str(project / "train.jsonl")
    (project / "train.jsonl").unlink()
    with caplog.at_level(logging.WARNING, "iqlite"):
        assert paths(RunDir.open(copy / "runs" / "a"))[1] == str(copy / "train.jsonl")
    assert "train.jsonl (prompts.train) has changed since the run was made" in caplog.text


def test_a_run_that_moved_alone(project: Path, tmp_path: Path) -> None:
    run = (project / "runs" / "a").rename(tmp_path / "a")
    assert paths(RunDir.open(run)) == expected(project)


def test_a_base_that_moved_alone(project: Path, iqlite: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    base = (project / "base").rename(tmp_path / "other place")
    run = RunDir.open(project / "runs" / "a")
    with pytest.raises(RunError, match="isn't there any more; say where it is now with --base PATH"):
        run.check_base()
    assert paths(RunDir.open(run.path, str(base)))[0] == str(base)
    with pytest.raises(RunError, match="--base nowhere: there is no such file or folder"):
        RunDir.open(run.path, "nowhere")
    for verb in ("merge", "export", "compare", "inspect", "report", "serve"):
        code, _, err = iqlite(
            verb, run.path, "--base", "nowhere", *{"merge": ["-o", "out"], "export": ["-o", "out", "--to", "peft"]}.get(verb, [])
        )
        assert code == 2 and "--base nowhere: there is no such file or folder" in err, verb
    code, _, err = iqlite("merge", run.path, "-o", tmp_path / "out")
    assert code == 2 and "--base PATH" in err and "Traceback" not in err
