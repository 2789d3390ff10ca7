"""Damage is noticed, said, and survived where something whole is left: folders with their manifests, lines, checkpoints, `best/`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from iqlite.errors import RunError
from iqlite.integrity import fault_in, found_again, seal, sealed, swap, unsealed
from iqlite.recipe.schema import Recipe
from iqlite.records import StepMetrics
from iqlite.run.rundir import RunDir

ENVIRONMENT = {"base": {"name": "tiny"}, "prompts": {"sha256": "00"}, "placement": "system"}


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def a_weight(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(64))


@pytest.fixture
def run(make_recipe: Callable[..., Recipe], tmp_path: Path) -> RunDir:
    """Five steps, checkpoints after the second and the fourth, the best adapter of step 3."""
    run = RunDir.create(tmp_path / "run", make_recipe(), ENVIRONMENT)
    for step in range(6):
        run.add_metrics(StepMetrics(step, {"loss": step / 8}))
        run.add_sample(step, "why?", f"answer {step}")
        if step == 3:
            run.save_folder(run.best, a_weight)
        if step in (2, 4):
            monitors = {"best_kl": 0.5 if step > 2 else None, "best_step": 3 if step > 2 else 0}
            run.save_checkpoint(step, {"a": torch.full((8,), float(step))}, {"monitors": monitors})
    return run


def resumed(run: RunDir) -> tuple[float, int, list[int]]:
    """(what is in the checkpoint's tensor, its step, steps of the lines that are left)."""
    tensors, state = RunDir.open(run.path).load_checkpoint() or ({"a": torch.zeros(1)}, {"step": 0})
    return float(tensors["a"][0]), state["step"], [line["step"] for line in run.metrics()]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "manifest.json", "recipe.toml", "environment.json"])
@pytest.mark.parametrize("way", ["cut", "empty", "bit", "gone", "foreign"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(file: str, way: str, run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    before, newest = (run.path / "checkpoints" / f"step-00000{step}" for step in (2, 4))
    path = newest / file
    if way == "gone" and file == "manifest.json":
        pytest.skip("as older versions left them: without a manifest a checkpoint is opened, not checked")
    {
        "cut": lambda: path.write_bytes(path.read_bytes()[:-9]),
        "empty": lambda: path.write_bytes(b""),
        "bit": lambda: flipped(path, 8 * (path.stat().st_size - 3)),
        "gone": path.unlink,
        "foreign": lambda: path.write_bytes((before / file).read_bytes().replace(b"why", b"not") + b" "),
    }[way]()
    with caplog.at_level(logging.WARNING, "iqlite"):
        assert resumed(run) == (2.0, 2, [0, 1, 2])
    said = "state.json" if (file, way) == ("manifest.json", "foreign") else file  # by the manifest before, the newer files are wrong
    assert f"step-000004: {said}" in caplog.text and "going on from step-000002, the one before it" in caplog.text


def test_another_run_s_checkpoint_is_not_taken(run: RunDir, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    other = RunDir.create(tmp_path / "other", make_recipe(), ENVIRONMENT)
    other.save_checkpoint(4, {"a": torch.full((8,), 9.0)}, {"monitors": {"best_kl": None}})
    shutil.rmtree(run.path / "checkpoints" / "step-000004")
    shutil.copytree(other.path / "checkpoints" / "step-000004", run.path / "checkpoints" / "step-000004")
    assert resumed(run)[:2] == (2.0, 2)


def test_no_whole_checkpoint_is_a_sentence_and_nothing_is_lost(run: RunDir) -> None:
    for folder in (run.path / "checkpoints").iterdir():
        flipped(folder / "state.safetensors", 8 * 50)
    lines = (run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="none of its checkpoints is whole .*start anew with --force"):
        RunDir.open(run.path).load_checkpoint()
    assert (run.path / "metrics.jsonl").read_bytes() == lines and len(list((run.path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize(("how", "lost"), [("bit", 1), ("cut", 1), ("foreign", 1), ("empty", 5)])
def test_damaged_lines_are_counted_and_the_others_kept(how: str, lost: int, run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    path = run.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = {"bit": bytes([lines[1][0] ^ 1]) + lines[1][1:], "cut": lines[1][:7] + b"\n", "foreign": b'{"step": 1, "loss": 9.0}\n', "empty": b""}[how]  # fmt: skip
    path.write_bytes(b"" if how == "empty" else b"".join(lines))
    with caplog.at_level(logging.WARNING, "iqlite"):
        assert resumed(run)[1:] == (4, [] if how == "empty" else [0, 2, 3, 4])
    assert f"{lost} of {5 if how == 'empty' else 6} lines" in caplog.text  # one is of after the checkpoint


@pytest.mark.parametrize("how", ["bit", "gone"])
def test_a_lost_best_adapter_is_made_again(how: str, run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    if how == "gone":
        shutil.rmtree(run.best)
    else:
        flipped(run.best / "weights", 77)
    with caplog.at_level(logging.WARNING, "iqlite"):
        assert resumed(run) == (2.0, 2, [0, 1, 2])
    assert "going on from step-000002, before step 3 that it is of, which is done again" in caplog.text and not run.best.exists()


@pytest.mark.parametrize("name", ["recipe.toml", "environment.json"])
def test_what_says_how_a_run_was_made_is_put_back(name: str, run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    good = (run.path / name).read_bytes()
    flipped(run.path / name, 8 * 20)
    bad = (run.path / name).read_bytes()
    with caplog.at_level(logging.WARNING, "iqlite"):
        RunDir.open(run.path)
    assert (run.path / name).read_bytes() == good and (run.path / f"{name}.damaged").read_bytes() == bad
    assert f"{name} is put back from step-000004" in caplog.text
    shutil.rmtree(run.path / "checkpoints")
    flipped(run.path / name, 8 * 20)
    with pytest.raises(RunError, match="put it back from a copy"):
        RunDir.open(run.path)


def test_a_swap_that_was_cut_short_is_found_again(run: RunDir) -> None:
    """Between its two renames there is no best/ under its name."""
    run.best.rename(run.path / ".old-best")
    (run.path / ".making-best").mkdir()
    assert RunDir.open(run.path).best.is_dir() and resumed(run)[:2] == (4.0, 4)
    assert not [path.name for path in run.path.glob(".*") if path.name != ".lock"]


def test_folders(tmp_path: Path) -> None:
    folder, making = tmp_path / "x", tmp_path / "making"
    for place, text in ((folder, "old"), (making, "new")):
        place.mkdir()
        (place / "a.txt").write_text(text)
        seal(place)
    swap(making, folder)
    assert (folder / "a.txt").read_text() == "new" and not fault_in(folder) and not found_again(folder)
    for damage, said in ((b"new!", "a.txt isn't what was written"), (b"n", "cut short: 1 of 3 bytes"), (b"", "is empty"), (None, "is missing")):  # fmt: skip
        (folder / "a.txt").unlink() if damage is None else (folder / "a.txt").write_bytes(damage)
        assert said in fault_in(folder)


def test_no_bit_of_a_sealed_line_flips_unseen() -> None:
    """Each of them: an error, or a line without its checksum, whose readers take no unknown key."""
    line = {"of": "0a", "seed": 0, "answer": "naïve \u2028 “x”"}
    data = sealed(line).encode()
    assert unsealed(data) == line and unsealed(json.dumps(line).encode()) == line
    with pytest.raises(ValueError, match="checksum differs"):  # a whole line, of something else
        unsealed(sealed(line, "base-0a.jsonl").encode(), "base-0b.jsonl")
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert unsealed(bytes(changed)).keys() - line.keys()
        except ValueError:
            continue
