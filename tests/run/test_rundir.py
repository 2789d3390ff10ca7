"""The run directory: whole or not at all, never overwritten, readable after a kill, refused when the work has changed."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from iqlite.errors import RecipeError, RunError
from iqlite.recipe.schema import Recipe
from iqlite.records import StepMetrics
from iqlite.run.files import check_space, explained, free_name
from iqlite.run.journal import KEPT_CHECKPOINTS
from iqlite.run.rundir import FORMAT, RunDir

ENVIRONMENT = {"base": {"name": "tiny"}, "prompts": {"sha256": "00"}, "placement": "system"}


@pytest.fixture
def run(make_recipe: Callable[..., Recipe], tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", make_recipe(), ENVIRONMENT)


def test_a_run_is_made_whole_and_never_overwritten(run: RunDir, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    made = {"format": FORMAT, "run": run.id, "place": str(run.path), **ENVIRONMENT}
    assert RunDir.open(run.path).environment() == made and RunDir.open(run.path).id == run.id
    with pytest.raises(RunError, match="exists already: go on with --resume, replace it with --force"):
        RunDir.create(run.path, make_recipe(), ENVIRONMENT)
    (run.path / "old.txt").write_text("from before")
    RunDir.create(run.path, make_recipe(), ENVIRONMENT, force=True)
    assert sorted(path.name for path in run.path.iterdir()) == ["environment.json", "manifest.json", "recipe.toml"]
    with pytest.raises(RunError, match="isn't a run directory"):
        RunDir.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be written"):
        RunDir.create(tmp_path / "file" / "run", make_recipe(), ENVIRONMENT)


def test_a_run_of_a_newer_iqlite_is_refused_and_one_without_a_format_opens(run: RunDir) -> None:
    (run.path / "manifest.json").unlink()  # as 0.1.0 left a run
    for made, opens in (({}, True), ({"format": FORMAT}, True), ({"format": FORMAT + 1}, False)):
        (run.path / "environment.json").write_text(json.dumps(made | ENVIRONMENT))
        with contextlib.nullcontext() if opens else pytest.raises(RunError, match="made by a newer iqlite"):
            RunDir.open(run.path)


@pytest.mark.parametrize("text", ['{"format": 1', "[]", '{"format": "2"}', "\xff"])
def test_a_broken_environment_is_one_sentence(run: RunDir, text: str) -> None:
    (run.path / "environment.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=re.escape(str(run.path))):
        RunDir.open(run.path)


def test_what_json_has_no_number_for_is_null(run: RunDir) -> None:
    run.add_metrics(StepMetrics(1, {"loss": float("nan"), "policy/grad_norm": float("inf"), "reward/mean": -0.5}))
    run.write_result({"best_kl": float("inf"), "why": "non-finite"})
    for name in ("metrics.jsonl", "result.json"):
        json.loads((run.path / name).read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
    assert run.metrics() == [{"step": 1, "loss": None, "policy/grad_norm": None, "reward/mean": -0.5}]


def test_free_names(tmp_path: Path) -> None:
    assert free_name(tmp_path, "a") == tmp_path / "a"
    for name in ("a", "a-2"):
        (tmp_path / name).mkdir()
    assert free_name(tmp_path, "a") == tmp_path / "a-3"


def test_a_folder_that_fails_half_way_leaves_the_old_one(run: RunDir) -> None:
    def write(name: str) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            (folder / name).write_text("1")

        return fill

    run.save_folder(run.best, write("good"))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("2")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="no space left on its disk: free some space, then go on with --resume"):
        run.save_folder(run.best, fail)
    assert sorted(path.name for path in run.best.iterdir()) == ["good", "manifest.json"]
    run.save_folder(run.best, write("better"))
    assert sorted(path.name for path in run.best.iterdir()) == ["better", "manifest.json"]
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_checkpoints_keep_tensors_to_the_bit_and_drop_later_lines(run: RunDir) -> None:
    tensors = {"a": torch.tensor([0.1, float("nan"), -0.0]), "b": torch.arange(5)}
    assert run.last_step() == 0
    for step in range(1, 5):
        run.add_metrics(StepMetrics(step, {"loss": step / 3}))
        run.add_sample(step, "why?", "because\n\u2028that is so")
        run.save_checkpoint(step, {"a": tensors["a"] + step, "b": tensors["b"]}, {"monitors": {"x": step}})
    assert len(list((run.path / "checkpoints").iterdir())) == KEPT_CHECKPOINTS
    run.add_metrics(StepMetrics(5, {"loss": 9.0}))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut in two by a kill
    found = RunDir.open(run.path).load_checkpoint()
    assert found is not None
    assert found[1] == {"step": 4, "monitors": {"x": 4}}
    assert found[0]["a"].numpy().tobytes() == (tensors["a"] + 4).numpy().tobytes() and torch.equal(found[0]["b"], tensors["b"])
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    assert run.metrics()[0] == {"step": 1, "loss": 1 / 3}
    assert len((run.path / "samples.jsonl").read_text("utf-8").split("\n")) == 5


def test_a_resumed_recipe_must_be_the_run_s(run: RunDir, make_recipe: Callable[..., Recipe]) -> None:
    run.check_same(make_recipe(), ENVIRONMENT)
    other = make_recipe(judge={"measure": "shorter"})  # how a run is judged may change, and is kept
    run.check_same(other, ENVIRONMENT)
    run.take_over(other)
    assert run.recipe().judge.measure == "shorter" and run.recipe().train == make_recipe().train
    whole = (run.path / "recipe.toml").read_text()
    (run.path / "recipe.toml").write_text(whole + "[judge]\n")
    (run.path / "manifest.json").unlink()  # as who has changed it is told to
    with pytest.raises(RecipeError, match=r"recipe\.toml isn't valid TOML"):
        run.recipe()
    (run.path / "recipe.toml").write_text(whole)
    with pytest.raises(RunError, match=r"train\.steps was 3 and is 4.*--out"):
        run.check_same(make_recipe(train={"steps": 4}), ENVIRONMENT)
    with pytest.raises(RunError, match="prompts was .* and is"):
        run.check_same(make_recipe(), ENVIRONMENT | {"prompts": {"sha256": "11"}})
    with pytest.raises(RunError, match="base was"):
        run.check_same(make_recipe(), ENVIRONMENT | {"base": {"name": "other"}})


def test_space_is_checked_where_the_run_would_stand(tmp_path: Path) -> None:
    check_space(tmp_path / "a" / "b" / "c", 1)
    with pytest.raises(RunError, match="needs .* MiB and its disk has"):
        check_space(tmp_path / "a" / "b" / "c", 2**60)


def test_recipe_and_result_are_plain_files(run: RunDir, make_recipe: Callable[..., Recipe]) -> None:
    run.write_result({"step": 3})
    assert json.loads((run.path / "result.json").read_text()) == {"step": 3}
    assert run.recipe().behavior == make_recipe().behavior


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_one_sentence_whichever_library_met_it(tmp_path: Path) -> None:
    """tokenizers raises a plain Exception, torch a RuntimeError; a plain Exception of another kind stays itself."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    (tmp_path / "a.pt").symlink_to("/dev/full")
    for write in (
        lambda: Tokenizer(BPE()).save(str(tmp_path / "tokenizer.json")),
        lambda: torch.save(torch.ones(9), tmp_path / "a.pt"),
        lambda: (tmp_path / "a.pt").write_text("1"),
    ):
        with pytest.raises(RunError, match="no space left on its disk|can't be written"), explained(tmp_path):
            write()
    unforeseen = Exception("nobody foresaw")
    with pytest.raises(Exception, match="nobody foresaw") as raised, explained(tmp_path):
        raise unforeseen
    assert raised.value is unforeseen
