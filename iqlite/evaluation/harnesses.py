"""Harnesses that people trust, handed a server of a run: Inspect and lm-eval, by their own programs, which need not share iqlite's environment."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iqlite.errors import RunError, warn
from iqlite.run.files import read_json
from iqlite.run.findings import HARNESSES, adapter_digest, file_of
from iqlite.run.rundir import RunDir
from iqlite.terminal import Count, Watch, clean

if TYPE_CHECKING:
    from iqlite.serving.batcher import Batcher

INSPECT, LM_EVAL = "inspect", "lm-eval"
PROGRAMS = {INSPECT: ("inspect",), LM_EVAL: ("lm-eval", "lm_eval")}
WHO = {"base": "base", "policy": "trained"}  # the server's models, and what figures call them
TOGETHER = 16  # requests at once; our choice
PATIENCE_S = 24 * 3600  # seconds that a request may wait: on a CPU a batch takes minutes
FOLDER = "harnesses"  # in the run: all that they wrote
OUTPUT = "output.txt"
LAST = 500  # characters of what a program that failed said last


@dataclass(frozen=True)
class Task:
    """A task as its harness's own program takes it, in the folder where it is asked."""

    harness: str
    folder: Path
    argument: str


@dataclass(frozen=True)
class Score:
    """A figure of a task, of the base beside the trained model. `base_se` and `trained_se` are standard errors, None where the harness gives none."""

    task: str
    harness: str
    harness_version: str
    task_version: str
    samples: int
    metric: str
    higher_is_better: bool | None
    base: float | None
    base_se: float | None
    trained: float | None
    trained_se: float | None


@dataclass(frozen=True)
class _Figure:
    value: float | None
    se: float | None
    about: tuple[str, str, int, bool | None]  # versions of harness and task, samples, whether more is better


Figures = dict[tuple[str, str, str], _Figure]  # (harness, task, metric)


def task_named(text: str) -> Task:
    """A file, .py for Inspect and .yaml for lm-eval; else a name, with a slash for Inspect (inspect_evals/ifeval) and without for lm-eval (gsm8k)."""
    file, at, inside = text.partition("@")
    path = Path(file)
    if path.suffix in (".py", ".yaml", ".yml"):
        if not path.is_file():
            raise RunError(f"--tasks {text}: no such file; a path is relative to the folder you are in.")
        return Task(INSPECT if path.suffix == ".py" else LM_EVAL, path.resolve().parent, f"{path.name}{at}{inside}")
    if not text or text.startswith("-"):
        raise RunError(f"--tasks {text!r} is no task: name some, such as inspect_evals/ifeval,gsm8k or mine.py.")
    return Task(INSPECT if "/" in text else LM_EVAL, Path.cwd(), text)


def program(harness: str) -> str:
    """Where a harness's program is: on PATH, or beside this Python; RunError if it isn't."""
    for name in PROGRAMS[harness]:
        if found := shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent)):
            return found
    raise RunError(
        f"{PROGRAMS[harness][0]} isn't on PATH: pip install 'iqlite[eval]', or put the bin folder of an environment that has it on PATH."
    )


@contextmanager
def served(run: RunDir, adapter: Path, say: Callable[[str], None]) -> Iterator[tuple[str, str, Batcher]]:
    """The run's base and policy on a free port of this computer, for who knows the key: (URL, key, its model's queue)."""
    from iqlite.chat.speaker import Speaker
    from iqlite.serving.app import make_app
    from iqlite.serving.batcher import Batcher
    from iqlite.serving.running import bound, running
    from iqlite.serving.voices import Voices

    speaker = Speaker.of_recipe(run.recipe(), adapter, run.environment()["placement"], say)
    assert speaker.session is not None
    voices = Voices(speaker)
    batcher = Batcher(voices, speaker.session.sizes, room=8 * TOGETHER)
    key = secrets.token_hex(16)
    try:
        with running(make_app(voices, batcher, key, run.path.resolve().name), bound("127.0.0.1", 0)) as url:
            yield f"{url}/v1", key, batcher
    finally:
        batcher.close()


def evaluate(run: RunDir, which: str, tasks: Sequence[Task], limit: int | None, watch: Watch) -> list[Score]:
    """Asks base and trained model, each harness once for the tasks of a folder. RunError with what a program said last, if it fails."""
    adapter = run.trained(which)
    groups: dict[tuple[str, Path], list[str]] = {}
    for task in tasks:
        groups.setdefault((task.harness, task.folder), []).append(task.argument)
    programs = {harness: program(harness) for harness, _ in groups}
    found: dict[str, Figures] = {who: {} for who in WHO}
    kept = run.path / FOLDER
    with served(run, adapter, watch.note) as (url, key, batcher), tempfile.TemporaryDirectory() as tokenizer:
        voices = batcher.voices
        voices.chat.tokenizer.save_pretrained(tokenizer)
        (Path(tokenizer) / "chat_template.jinja").write_text(voices.chat.template, "utf-8")
        with watch.counting("evaluating", len(groups) * len(WHO)) as count:
            for number, ((harness, folder), names) in enumerate(groups.items()):
                for who in WHO:
                    what = f"{WHO[who]} by {harness}: {', '.join(names)}"
                    count.now(what)
                    out = kept / f"{time.strftime('%Y%m%d-%H%M%S')}-{number}-{WHO[who]}"
                    out.mkdir(parents=True)
                    if harness == INSPECT:
                        arguments, more = _inspect(names, who, url, key, out, limit)
                    else:
                        arguments, more = _lm_eval(names, who, url, key, out, limit, tokenizer, voices.context)
                    tick = partial(_moment, count, what, batcher)
                    _run([programs[harness], *arguments], folder, more, out / OUTPUT, tick)
                    found[who] |= _inspect_figures(out) if harness == INSPECT else _lm_eval_figures(out)
                    count.advance(1)
    return _beside(found)


def keep(run: RunDir, which: str, scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Writes the scores into the run; those of the same adapter on other tasks stay. All that are there now."""
    mine = adapter_digest(run.trained(which))
    name, new = file_of(HARNESSES, which), [asdict(score) for score in scores]
    old: dict[str, Any] = {}
    if (run.path / name).is_file():
        try:
            old = read_json(run.path / name)
        except RunError as error:
            warn(f"{error} It is replaced.")
    tasks = {(one["harness"], one["task"]) for one in new}
    others = old.get("scores", []) if old.get("adapter_sha256") == mine else []
    both = [*(one for one in others if (one["harness"], one["task"]) not in tasks), *new]
    run.write(name, json.dumps({"adapter_sha256": mine, "adapter": which, "scores": both}, indent=2) + "\n")
    return both


def _inspect(names: Sequence[str], who: str, url: str, key: str, out: Path, limit: int | None) -> tuple[list[str], dict[str, str]]:
    arguments = ["eval", *names, "--model", f"openai-api/iqlite/{who}", "--log-dir", str(out.resolve()), "--log-format", "json"]
    arguments += ["--display", "plain", "--temperature", "0", "--max-connections", str(TOGETHER)]
    return arguments + (["--limit", str(limit)] if limit else []), {"IQLITE_BASE_URL": url, "IQLITE_API_KEY": key}


def _lm_eval(
    names: Sequence[str], who: str, url: str, key: str, out: Path, limit: int | None, tokenizer: str, context: int
) -> tuple[list[str], dict[str, str]]:
    """Raw completions, for which lm-eval itself renders the base's chat template: the one way that gives log-probabilities of answers too."""
    model = {"base_url": f"{url}/completions", "model": who, "tokenizer": tokenizer, "tokenizer_backend": "huggingface"}
    model |= {"num_concurrent": str(TOGETHER), "max_length": str(context), "timeout": str(PATIENCE_S)}
    arguments = ["run", "--model", "local-completions", "--model_args", ",".join(f"{name}={value}" for name, value in model.items())]
    arguments += ["--tasks", ",".join(names), "--apply_chat_template", "--output_path", str(out.resolve()), "--log_samples"]
    return arguments + (["--limit", str(limit)] if limit else []), {"OPENAI_API_KEY": key}


def _run(arguments: Sequence[str], folder: Path, more: Mapping[str, str], output: Path, tick: Callable[[], None]) -> None:
    """Runs a program to its end; all it says goes to a file. `tick` is called now and then."""
    away = {name: ",".join(filter(None, (os.environ.get(name, ""), "127.0.0.1"))) for name in ("NO_PROXY", "no_proxy")}
    environment = {**os.environ, **away, "PYTHONUNBUFFERED": "1", **more}
    with output.open("wb") as file:
        process = subprocess.Popen(arguments, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = None
            while code is None:
                tick()
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=1)
        finally:
            process.kill()
    if code:
        raise _failed(Path(arguments[0]).name, f"ended with exit code {code}", output)


def _moment(count: Count, what: str, batcher: Batcher) -> None:
    count.moment(f"{what}, {batcher.tokens} tokens answered")


def _failed(name: str, why: str, output: Path) -> RunError:
    lines = [line for line in output.read_text("utf-8", "replace").splitlines() if any(map(str.isalnum, line))]
    said = clean(lines[-1].strip(), LAST) if lines else "it said nothing"
    return RunError(f"{name} {why} ({said}): all that it said is in {output}.")


def _inspect_figures(out: Path) -> Figures:
    found: Figures = {}
    logs = sorted(out.glob("*.json"))
    if not logs:
        raise _failed(INSPECT, "left no log", out / OUTPUT)
    for file in logs:
        log = read_json(file)
        if log["status"] != "success":
            raise _failed(
                INSPECT, f"didn't finish {log['eval']['task']}: {(log.get('error') or {}).get('message', log['status'])}", out / OUTPUT
            )
        version = log["eval"]["packages"].get("inspect_ai", "")
        results = log["results"]
        for score in results["scores"]:
            metrics = {name: one["value"] for name, one in score["metrics"].items()}
            error = _number(metrics.pop("stderr", None))
            for name, value in metrics.items():
                label = name if len(results["scores"]) == 1 else f"{score['name']} {name}"
                about = (version, str(log["eval"]["task_version"]), int(results["completed_samples"]), None)
                found[INSPECT, log["eval"]["task"], label] = _Figure(_number(value), error if name in ("accuracy", "mean") else None, about)
    return found


def _lm_eval_figures(out: Path) -> Figures:
    found: Figures = {}
    logs = sorted(out.rglob("results_*.json"))
    if not logs:
        raise _failed(LM_EVAL, "left no results", out / OUTPUT)
    for log in map(read_json, logs):
        inner = {name for names in log.get("group_subtasks", {}).values() for name in names}  # a group's mean says it for them
        for task, results in log["results"].items():
            if task in inner:
                continue
            samples = log["n-samples"].get(task, {}).get("effective") or results.get("sample_len") or 0
            for name, value in results.items():
                metric, comma, filtered = name.partition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                better = log["higher_is_better"].get(task, {}).get(metric)
                about = (log["lm_eval_version"], str(log["versions"].get(task, "")), int(samples), better)
                label = metric if filtered == "none" else f"{metric} ({filtered})"
                found[LM_EVAL, task, label] = _Figure(_number(value), _number(results.get(f"{metric}_stderr,{filtered}")), about)
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _beside(found: Mapping[str, Figures]) -> list[Score]:
    base, trained = (found[who] for who in WHO)
    return [
        Score(task, harness, *after.about[:3], metric, after.about[3], before.value, before.se, after.value, after.se)
        for (harness, task, metric), after in trained.items()
        if (before := base.get((harness, task, metric)))
    ]
