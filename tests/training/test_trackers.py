"""Metrics in trackers: read back by the trackers' own readers, each step once though the run was interrupted, and nothing of a run changes."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.numpy import load_file

from iqlite.errors import RecipeError
from iqlite.recipe.schema import Recipe
from iqlite.records import StepMetrics
from iqlite.run.rundir import RunDir
from iqlite.training import trackers
from iqlite.training.loop import train
from iqlite.training.session import Session
from iqlite.training.trackers import check_trackers, tracked
from tests.helpers.reporters import Silent

Call = Callable[..., tuple[int, str, str]]


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """[(step, value), …] of each metric, by tensorboard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), purge_orphaned_data=False)
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def numbers(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in run.metrics():
        for name, value in line.items():
            if name != "step" and value is not None:
                found.setdefault(name, []).append((line["step"], value))
    return found


def same(mine: dict[str, list[tuple[int, float]]], theirs: dict[str, list[tuple[int, float]]]) -> None:
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        assert [step for step, _ in values] == [step for step, _ in theirs[name]], name
        assert [value for _, value in values] == pytest.approx([value for _, value in theirs[name]], rel=1e-6), name  # they keep float32


def interrupted_and_resumed(make_session: Callable[..., Session], path: Path, to: list[str]) -> RunDir:
    """Four steps, killed in the fourth: the last checkpoint is of the second, so that the third is done twice and was sent before."""

    class Killed(Silent):
        def step(self, metrics: StepMetrics, total: int) -> None:
            if metrics.step == 4:
                raise KeyboardInterrupt

    tables: dict[str, Any] = {"train": {"steps": 4, "eval_every": 4}, "log": {"to": to}}
    session = make_session(**tables)
    run = RunDir.create(path, session.recipe, {})
    with pytest.raises(KeyboardInterrupt), tracked(Killed(), run, session.recipe) as report:
        train(session, run, report)
    run = RunDir.open(path)
    session = make_session(**tables)
    with tracked(Silent(), run, session.recipe) as report:
        train(session, run, report)
    return run


def told_twice(recipe: Recipe, path: Path) -> RunDir:
    """The like without a model: the metrics of six steps, of which the fifth is told again after the kill."""
    run = RunDir.create(path, recipe, {})

    def tell(report: Any, steps: range) -> None:
        for step in steps:
            metrics = StepMetrics(step, {"reward/mean": -1.0 / (step + 1), "never": float("nan")})
            run.add_metrics(metrics)
            if step:
                report.step(metrics, 6)

    with tracked(Silent(), run, recipe) as report:
        tell(report, range(6))
    run = RunDir.open(path)
    run.keep_lines(4)
    with tracked(Silent(), run, recipe) as report:
        tell(report, range(5, 7))
    return run


def test_tensorboard_has_every_step_once(make_session: Callable[..., Session], tmp_path: Path) -> None:
    run = interrupted_and_resumed(make_session, tmp_path / "run", ["tensorboard"])
    sent, kept = in_tensorboard(run.path / "tensorboard"), numbers(run)
    for found in (sent, kept):  # times and memory of the step that was done twice are the first's
        for name in [name for name in found if name.startswith(("time/", "memory/"))]:
            found[name] = [(step, 0.0) for step, _ in found[name]]
    same(sent, kept)
    assert [step for step, _ in sent["reward/mean"]] == [1, 2, 3, 4] and sent["eval/measure"][0][0] == 0


def test_a_tracker_changes_nothing_of_a_run(make_session: Callable[..., Session], tmp_path: Path) -> None:
    found: list[Any] = []
    for name, to in (("without", []), ("with", ["tensorboard"])):
        session = make_session(train={"steps": 1}, log={"to": to})
        run = RunDir.create(tmp_path / name, session.recipe, {})
        with tracked(Silent(), run, session.recipe) as report:
            train(session, run, report)
        found.append([{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in run.metrics()])
        found.append({k: v.tobytes() for k, v in load_file(run.adapter / "adapter_model.safetensors").items()})
        assert (
            {path.name for path in run.path.iterdir()} >= {"tensorboard", "trackers.json"}
            if to
            else not (run.path / "tensorboard").exists()
        )
    assert found[:2] == found[2:]


def test_one_that_is_added_on_a_resume_gets_what_was_before(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(log={"to": ["tensorboard"]})
    run = RunDir.create(tmp_path / "run", make_recipe(), {})
    for step in range(3):
        run.add_metrics(StepMetrics(step, {"loss": float(step)}))
    RunDir.open(run.path).check_same(recipe, {})  # where metrics go isn't what is trained
    run.take_over(recipe)
    assert RunDir.open(run.path).recipe().log.to == ("tensorboard",)
    with tracked(Silent(), run, recipe) as report:
        run.add_metrics(StepMetrics(3, {"loss": 3.0, "gone": float("nan")}))
        report.step(StepMetrics(3, {"loss": 3.0}), 4)
    assert in_tensorboard(run.path / "tensorboard") == {"loss": [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]}


def test_one_that_fails_on_the_way_ends_nothing(
    make_recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its folder is taken away: tensorboard's own writer fails, the other reporter and metrics.jsonl don't notice."""
    recipe = make_recipe(log={"to": ["tensorboard"]})
    run = RunDir.create(tmp_path / "run", recipe, {})
    seen: list[int] = []

    class Seen(Silent):
        def step(self, metrics: StepMetrics, total: int) -> None:
            seen.append(metrics.step)

    with caplog.at_level(logging.WARNING, "iqlite"), tracked(Seen(), run, recipe) as report:
        for step in range(1, 5):
            if step == 2:
                report.trackers["tensorboard"].tracker.close()  # type: ignore[attr-defined]
                shutil.rmtree(run.path / "tensorboard")
                (run.path / "tensorboard").write_text("in the way")
            metrics = StepMetrics(step, {"loss": 1.0})
            run.add_metrics(metrics)
            report.step(metrics, 4)
    assert seen == [1, 2, 3, 4]
    assert [record.message.startswith("log.to: tensorboard has failed") for record in caplog.records] == [True]


def test_what_isn_t_installed_is_refused_before_anything(
    iqlite: Call, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(data | {"log": {"to": ["trackio"]}}), "utf-8")
    real = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name, *rest: None if name == "trackio" else real(name, *rest))  # type: ignore[attr-defined]
    code, out, err = iqlite("train", "recipe.toml", "--out", "run")
    assert (code, out) == (2, "") and not (tmp_path / "run").exists()
    assert err == "iqlite: recipe.toml: log.to has 'trackio', which isn't installed: pip install trackio, or take it out.\n"
    code, _, err = iqlite("train", "recipe.toml", "--out", "run", "--set", 'log.to=["tensorboards"]')
    assert code == 2 and "log.to" in err and "'tensorboard'" in err


def test_nothing_of_a_tracker_is_imported_unasked(make_recipe: Callable[..., Recipe]) -> None:
    check_trackers(make_recipe())
    code = (
        "import sys; from pathlib import Path; from iqlite.recipe.reading import load_recipe; from iqlite.training import trackers\n"
        "recipe = load_recipe(Path('cheerful-135m')); trackers.check_trackers(recipe)\n"
        "with trackers.tracked('same', None, recipe) as report: assert report == 'same'\n"
        "assert not {'tensorboard', 'trackio', 'wandb', 'accelerate', 'torch'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_trackio_has_every_step_once(make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    run = told_twice(make_recipe(log={"to": ["trackio"]}), tmp_path / "run")
    (file,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(file).execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, *_ in rows} == {f"run-{run.id}"}
    assert [(step, json.loads(values)["reward/mean"]) for _, step, values in rows] == numbers(run)["reward/mean"]


def test_wandb_offline_has_every_step_once(make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = told_twice(make_recipe(log={"to": ["wandb"]}), tmp_path / "run")
    files = sorted((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {f"run-{run.id}"}
    assert sorted(step for file in files for step in steps_in(file)) == [0, 1, 2, 3, 4, 5, 6]


def steps_in(file: Path) -> list[int]:
    """The steps in a file that wandb would send: LevelDB's log format behind seven bytes, its records as wandb's own protocol has them."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:  # no header fits into what is left of a block
            at += 32_768 - at % 32_768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0:
            break
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                found.append(record.history.step.num)
    return found


def test_an_unknown_tracker_is_a_fault_of_the_recipe(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="log.to"):
        make_recipe(log={"to": ["mlflow"]})
