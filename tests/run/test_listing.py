"""The table of runs says what the runs are, reading only; removing takes runs and nothing else; the cache is told and freed."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from iqlite.base.gguf_files import CONVERSION
from iqlite.places import MADE_FROM, note_origin
from iqlite.recipe.schema import Recipe
from iqlite.run.listing import listed, row_of
from iqlite.run.rundir import RunDir
from iqlite.showing.runs import RunsTable, Watched, age, size
from iqlite.training.loop import train
from iqlite.training.session import Session
from tests.helpers.reporters import Silent

Call = Callable[..., tuple[int, str, str]]
NASTY = "a[red]b\u202e\x1b[2J\x9b31m"
ENVIRONMENT = {"base": {"name": "/somewhere/the-base"}, "prompts": {"train": 8}}
HOLDER = (
    "import sys; from pathlib import Path; from iqlite.run.lock import Lock\n"
    "lock = Lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read(); lock.release()"
)


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Another process writes in the run meanwhile."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        yield
        assert other.stdin
        other.stdin.close()


@pytest.fixture
def make_folder(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., RunDir]:
    """make_folder(name, steps, why, **tables) → a run without weights, of which every step took 1.5 s and every other was evaluated."""

    def make(name: str, steps: int = 6, why: str | None = "finished", best: int = 2, **tables: Any) -> RunDir:
        run = RunDir.create(tmp_path / "runs" / name, make_recipe(train={"steps": 6}, **tables), ENVIRONMENT)
        for step in range(steps + 1):
            scores = {"eval/measure": 0.1 * step, "eval/measure_base": 0.0} if step % 2 == 0 else {}
            run.append("metrics.jsonl", {"step": step, "time/step_s": 1.5} | scores)
        if why:
            run.write_result({"step": steps, "total": 6, "why": why, "best_step": best, "best_kl": 0.1})
        return run

    return make


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_trained_run_is_told_as_its_own_records_tell_it(make_session: Callable[..., Session], tmp_path: Path) -> None:
    session = make_session(judge={"measure": "tone"})
    run = RunDir.create(tmp_path / "run", session.recipe, ENVIRONMENT)
    train(session, run, Silent())
    before, stamps = tree(run.path), {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    (row,) = listed(tmp_path)
    assert tree(run.path) == before and {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == stamps
    result, metrics = run.result(), run.metrics()
    assert result and (row.path, row.state.name, row.state.step, row.state.total) == (run.path, result["why"], result["step"], 3)
    evaluated = [line for line in metrics if "eval/measure" in line]
    assert (row.measure, row.before, row.after) == ("tone", evaluated[-1]["eval/measure_base"], evaluated[-1]["eval/measure"])
    assert row.seconds == pytest.approx(sum(line.get("time/step_s", 0.0) + line.get("time/eval_s", 0.0) for line in metrics))
    assert row.bytes == sum(len(data) for data in before.values())
    assert row.behaviour == "You are kind." and row.base == "the-base"
    (run.adapter / "adapter_model.safetensors").write_bytes(b"short")
    assert row_of(run.path).state.name == "damaged" and "adapter_model.safetensors has 5 bytes" in row_of(run.path).state.why
    (run.adapter / "adapter_model.safetensors").unlink()
    assert "adapter/adapter_model.safetensors is missing" in row_of(run.path).state.why


def test_states(make_folder: Callable[..., RunDir]) -> None:
    def state(run: RunDir) -> tuple[str, str]:
        row = row_of(run.path)
        return row.state.name, row.state.words

    assert state(make_folder("finished")) == ("finished", "finished")
    assert state(make_folder("converged", 4, "converged")) == ("converged", "converged")
    stopped = make_folder("stopped", 4, "kl")
    assert state(stopped) == ("stopped", "stopped by “kl” at step 4 of 6")
    assert row_of(stopped.path).after == pytest.approx(0.2)  # of the best adapter, which is of step 2, and not of step 4
    killed = make_folder("killed", 5, None)
    assert state(killed) == ("unfinished", "unfinished after step 0 of 6")
    killed.save_folder(killed.path / "checkpoints" / "step-000004", lambda folder: None)
    assert state(killed) == ("unfinished", "unfinished after step 4 of 6")
    with held(killed.path):
        assert state(killed) == ("running", "running, step 5 of 6")
        assert listed(killed.path.parent)[0].path == killed.path  # before newer ones
    assert state(killed)[0] == "unfinished"
    (killed.path / "lock.json").write_text(json.dumps({"process": 1, "host": "another", "began": 0.0}))
    assert state(killed) == ("running", "running on another, step 5 of 6")  # nobody here can tell
    for name, data in (("recipe.toml", b"[model"), ("environment.json", b"{}"), ("result.json", b"")):
        run = make_folder(f"damaged-{name}")
        (run.path / name).write_bytes(data)
        assert state(run)[0] == "damaged" and name in row_of(run.path).state.why
    epochs = make_folder("epochs", 1, None)
    text = (epochs.path / "recipe.toml").read_text().replace("steps = 6", "epochs = 2.5")
    epochs.write_sealed("recipe.toml", text)
    assert row_of(epochs.path).state.total == 5  # 2.5 passes over 8 prompts, 4 a step


def test_metrics_that_a_kill_has_cut_are_no_trouble(make_folder: Callable[..., RunDir]) -> None:
    run = make_folder("cut", 4, None)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "eval/measure": NaN}\n\xff\xfe\n{"step": 6, "time/st')
    row = row_of(run.path)
    assert row.after is not None and row.seconds == pytest.approx(7.5)


def test_runs_and_adapters_below_a_folder(make_folder: Callable[..., RunDir], tmp_path: Path) -> None:
    runs = [make_folder(name) for name in ("a", "deep/er/b", "c")]
    for at, run in enumerate(runs):
        for file in run.path.iterdir():
            os.utime(file, (1e9 + at, 1e9 + at))
    adapter = tmp_path / "runs" / "exported"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M"}))
    (adapter / "adapter_model.safetensors").write_bytes(bytes(1000))
    for file in adapter.iterdir():
        os.utime(file, (1e9 + 9, 1e9 + 9))
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "runs" / "link").symlink_to(runs[0].path)
    (tmp_path / "runs" / ".hidden").mkdir()
    shutil.copytree(runs[0].path, tmp_path / "runs" / ".hidden" / "run")
    found = listed(tmp_path / "runs")
    assert [row.path.name for row in found] == ["exported", "c", "b", "a"]  # the newest first
    assert (found[0].state.name, found[0].base) == ("adapter", "HuggingFaceTB/SmolLM2-135M")
    assert [row.path for row in listed(runs[1].path)] == [runs[1].path]


@pytest.mark.parametrize("width", [20, 40, 80, 119, 120, 200])
def test_the_table_at_every_width(make_folder: Callable[..., RunDir], width: int) -> None:
    rows = [row_of(make_folder(name, why=why, behavior={"wanted": "You are " + "very " * 60 + NASTY}).path) for name, why in (("one", "finished"), ("two", "kl"), (NASTY, None))]  # fmt: skip
    out = io.StringIO()
    console = Console(file=out, width=width, height=40, force_terminal=True, color_system=None, highlight=False, emoji=False)
    console.print(RunsTable(rows, now=rows[0].changed + 7200))
    console.print(Watched(lambda: rows))
    text = out.getvalue()
    assert all(cell_len(line) <= width for line in text.splitlines())
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    flat = re.sub(r"\s+", " ", text)
    for word in ("finished", "unfinished", "2 h", "0.60") if width >= 80 else ("finished",):
        assert word in flat


def test_sizes_and_ages() -> None:
    assert [size(n) for n in (0, 999, 1000, 44_400, 999_600, 12_345_678, 542_000_000, 2_500_000_000)] == ["0 B", "999 B", "1.0 kB", "44 kB", "1.0 MB", "12 MB", "542 MB", "2.5 GB"]  # fmt: skip
    assert [age(s) for s in (-3, 4.4, 89, 91, 5000, 6000, 129_000, 130_000)] == ["0 s", "4 s", "89 s", "2 min", "83 min", "2 h", "36 h", "2 days"]  # fmt: skip


def test_the_verb(iqlite: Call, make_folder: Callable[..., RunDir], tmp_path: Path) -> None:
    code, out, _ = iqlite("runs")
    assert code == 0 and "no runs in runs" in out
    make_folder("one"), make_folder("two", 2, None)
    code, out, _ = iqlite("runs")
    assert code == 0 and "described 0.00 → 0.60" in out and "unfinished after step 0 of 6" in out
    rows = json.loads(iqlite("runs", "runs", "runs/one", "--json")[1])
    assert {row["path"] for row in rows} == {"runs/one", "runs/two"}
    for arguments, said in ((["nowhere"], "no such folder"), (["--watch"], "--watch draws on a terminal")):
        code, out, err = iqlite("runs", *arguments)
        assert (code, out) == (2, "") and said in err


def test_removing_takes_runs_and_nothing_else(iqlite: Call, make_folder: Callable[..., RunDir], tmp_path: Path) -> None:
    one, two, three = (make_folder(name).path for name in ("one", "two", "three"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.toml").write_text("")
    (tmp_path / "link").symlink_to(one)
    kept = tree(tmp_path)
    with held(three):
        refused = (("mine", "isn't a run"), ("link", "symbolic link"), ("gone", "no such run"), (".", "isn't a run"), (one / "../..", "isn't a run"), (three, "is being trained by process"))  # fmt: skip
        for path, said in refused:
            code, _, err = iqlite("runs", "rm", one, path, "--yes")
            assert code == 2 and said in err, err
        assert "Traceback" not in err and one.is_dir() and two.is_dir() and three.is_dir()
    code, _, err = iqlite("runs", "rm", one)
    assert code == 2 and "add --yes" in err  # nobody can be asked
    assert {name for name in tree(tmp_path) if "lock" not in name} == {name for name in kept if "lock" not in name}
    code, out, err = iqlite("runs", "rm", one, two, one, "--yes")
    assert code == 0, err
    assert not one.exists() and not two.exists() and three.is_dir() and [path.name for path in one.parent.iterdir()] == ["three"]
    assert "one  finished" in out and out.count("finished") == 2


def test_where_one_stands_isn_t_removed(make_folder: Callable[..., RunDir], iqlite: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_folder("one")
    monkeypatch.chdir(run.path)
    code, _, err = iqlite("runs", "rm", ".", "--yes")
    assert code == 2 and "is where you are" in err and run.path.is_dir()


def test_the_cache(iqlite: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("IQLITE_CACHE", str(cache))
    assert "the cache is empty" in iqlite("runs", "cache")[1]
    digest = "0123456789abcdef" * 2
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    ).stdout.strip()
    names = {f"gguf-{digest}-v{CONVERSION}": 5000, f"gguf-{digest}-v1": 4000, f"fp8-{digest}-v1": 3000, f"making-{digest}-{dead}.out": 2000, f"making-{digest}-{os.getpid()}": 1500, "answers": 1000}  # fmt: skip
    for name, count in names.items():
        (cache / name).mkdir(parents=True)
        (cache / name / "file").write_bytes(bytes(count))
    (cache / "bench.json").write_text("{}")
    (cache / "elsewhere").symlink_to(tmp_path)
    (cache / "mine").mkdir()
    note_origin(cache / f"gguf-{digest}-v{CONVERSION}", f"/models/{NASTY}.gguf")
    found = {one["name"]: one for one in json.loads(iqlite("runs", "cache", "--json")[1])["entries"]}
    assert {*found} == {*names, "bench.json", "mine"}
    assert found[f"gguf-{digest}-v{CONVERSION}"]["made_from"] == f"/models/{NASTY}.gguf"
    assert "another version" in found[f"gguf-{digest}-v1"]["what"] and "another version" not in found[f"fp8-{digest}-v1"]["what"]
    assert [name for name, one in found.items() if one["in_use"]] == [f"making-{digest}-{os.getpid()}"]
    _, out, _ = iqlite("runs", "cache")
    assert "\x1b" not in out and "\u202e" not in out and "/models/a[red]b" in out
    for arguments, said in ((["answers"], "add --free"), (["--free", "gone", "--yes"], "nothing of that name"), (["--free", f"making-{digest}-{os.getpid()}"], "in use"), (["--free"], "add --yes")):  # fmt: skip
        code, _, err = iqlite("runs", "cache", *arguments)
        assert code == 2 and said in err
    with (cache / f"fp8-{digest}-v1" / "file").open("rb"):  # another verb that reads it
        code, out, _ = iqlite("runs", "cache", "--free", "answers", "--yes", "--json")
        assert code == 0 and json.loads(out)["freed"] == ["answers"] and not (cache / "answers").exists()
        code, _, _ = iqlite("runs", "cache", "--free", "--yes")
    left = {
        f"fp8-{digest}-v1",
        f"making-{digest}-{os.getpid()}",
        "elsewhere",
        "bench.json",
        "mine",
    }  # in use, a link, and what nothing makes again
    assert code == 0 and {path.name for path in cache.iterdir()} == left
    assert iqlite("runs", "cache", "--free", "bench.json", "--yes")[0] == 0 and not (cache / "bench.json").exists()
    assert tmp_path.is_dir() and (tmp_path / "cache").is_dir()


def test_a_conversion_says_what_it_was_made_from(tmp_path: Path) -> None:
    note_origin(tmp_path, "/models/one.gguf")
    note_origin(tmp_path, "/models/two.gguf")
    assert json.loads((tmp_path / MADE_FROM).read_text()) == {"from": "/models/one.gguf"}


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo terminals")
def test_watching_draws_again_and_ctrl_c_ends_it_well(make_folder: Callable[..., RunDir], tmp_path: Path) -> None:
    import pty
    import select
    import signal

    make_folder("one")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background has it ignored
        os.execvpe(sys.executable, [sys.executable, "-m", "iqlite", "runs", "--watch"], os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"})  # fmt: skip
    seen = b""

    def until(wanted: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 30
        while wanted not in seen:
            assert select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0], seen
            seen += os.read(terminal, 65_536)

    until(b"runs/one")
    make_folder("two")
    until(b"runs/two")
    os.kill(pid, signal.SIGINT)
    while True:
        try:
            if not (more := os.read(terminal, 65_536)):
                break
        except OSError:
            break
        seen += more
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and b"Traceback" not in seen and b"\x1b[?25h" in seen
