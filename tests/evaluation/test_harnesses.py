"""`iqlite eval`: Inspect and lm-eval by their own programs on local tasks, their figures against what the model itself says, and programs that fail."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from iqlite.errors import RunError
from iqlite.evaluation.harnesses import Score, keep, program, task_named
from iqlite.export.card import model_card
from iqlite.run.findings import figures
from iqlite.run.rundir import RunDir
from iqlite.showing.facts import facts_of
from iqlite.showing.report import report_page
from tests.serving.conftest import served, tiny_run
from tests.whole.test_json import check

__all__ = ["served", "tiny_run"]  # fixtures
TASKS = Path(__file__).parents[1] / "helpers" / "tasks"
NASTY = "</td><script>window.bad=1</script>|`x`"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both harnesses on PATH: in IQLITE_HARNESSES, the bin folder of an environment of their own, or here."""
    if folder := os.environ.get("IQLITE_HARNESSES"):
        monkeypatch.setenv("PATH", folder + os.pathsep + os.environ["PATH"])
    try:
        program("inspect"), program("lm-eval")
    except RunError:
        pytest.skip("Inspect or lm-eval isn't here (IQLITE_HARNESSES names the bin folder of their environment)")


def test_both_harnesses_on_local_tasks(installed: None, iqlite: Callable[..., tuple[int, str, str]], tiny_run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = ",".join(str(TASKS / name) for name in ("capitals.py", "cities.yaml"))
    code, out, err = iqlite("eval", str(tiny_run.path), "--tasks", tasks, "--limit", "3", "--json")
    assert code == 0, err
    found = json.loads(out)
    check("iqlite eval RUN", found)
    by = {score["task"]: score for score in found["scores"]}
    assert {name: one["harness"] for name, one in by.items()} == {"capitals": "inspect", "cities": "lm-eval"}
    assert all(one["samples"] == 3 and one["harness_version"] for one in by.values())
    for role, who in (("reference", "base"), ("policy", "trained")):  # lm-eval's accuracy: the likeliest of the cities, scored here
        assert by["cities"][who] == pytest.approx(accuracy(tiny_run, role, 3))
    kept = figures(tiny_run, tiny_run.adapter)["harnesses"]
    assert kept == found["scores"]


def accuracy(run: RunDir, role: str, count: int) -> float:
    """Share of rows whose first city is the likeliest, by whole sequences through the model."""
    from iqlite.chat.speaker import Speaker

    speaker = Speaker.of_recipe(run.recipe(), run.adapter, "system", lambda text: None)
    right = 0
    for row in [json.loads(line) for line in (TASKS / "cities.jsonl").read_text("utf-8").splitlines()][:count]:
        ids = speaker.chat.ids(({"role": "user", "content": f"What is the capital of {row['land']}?"},))
        scores = []
        for city in row["cities"]:
            answer = speaker.chat.tokenizer(city, add_special_tokens=False).input_ids
            with torch.no_grad(), speaker.policy.acting_as(role):
                logits = speaker.policy.model(input_ids=torch.tensor([[*ids, *answer]])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logits[len(ids) - 1 + at, token]) for at, token in enumerate(answer)))
        right += scores.index(max(scores)) == 0
    return right / count


def score(task: str, trained: float) -> Score:
    return Score(task, "lm-eval", "0.4.13", "1.0", 6, "acc", True, 0.5, 0.25, trained, None)


def test_what_is_kept_stands_in_card_and_report(tiny_run: RunDir) -> None:
    (tiny_run.path / "eval.json").unlink(missing_ok=True)  # of a test before
    keep(tiny_run, "adapter", [score(NASTY, 0.25), score("other", 0.75)])
    assert keep(tiny_run, "adapter", [score("other", 1.0)]) == [asdict(score(NASTY, 0.25)), asdict(score("other", 1.0))]
    found = figures(tiny_run, tiny_run.adapter)
    assert [one["trained"] for one in found["harnesses"]] == [0.25, 1.0]
    card = model_card(manifest(found), peft=True)
    assert "| other | lm-eval 0.4.13 | 6 | acc | 0.500 ± 0.250 | 1.000 |" in card and "<script>" not in card
    page = report_page([tiny_run], [facts_of(tiny_run)], [None], "run", ["no"])
    assert "By harnesses of others" in page and "0.500 ± 0.250" in page and NASTY not in page
    data = json.loads((tiny_run.path / "eval.json").read_text("utf-8"))
    tiny_run.write("eval.json", json.dumps(data | {"adapter_sha256": "another"}))
    assert "harnesses" not in figures(tiny_run, tiny_run.adapter)


def manifest(found: dict[str, Any]) -> dict[str, Any]:
    """As much of a manifest as a card needs."""
    return {
        "iqlite": "0",
        "made": {},
        "base": {"name": "base", "licence": None},
        "recipe": {"behavior": {"wanted": "a", "unwanted": "b"}, "objective": {"name": "full-kl"}, "adapter": {"rank": 4}},
        "prompts": {"sources": []},
        "trained_with": {"quantization": "none", "compute_dtype": "float32"},
        "figures": found,
    }


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A program called lm-eval that complains and fails."""
    file = tmp_path / "bin" / "lm-eval"
    file.parent.mkdir()
    file.write_text(f"#!{sys.executable}\nprint('first')\nprint('no such task \\x1b[31m')\nraise SystemExit(3)\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent) + os.pathsep + os.environ["PATH"])
    yield file


@pytest.mark.skipif(sys.platform == "win32", reason="a script with a first line that names its program")
def test_a_program_that_fails_is_quoted(failing: Path, iqlite: Callable[..., tuple[int, str, str]], tiny_run: RunDir) -> None:
    code, _, err = iqlite("eval", str(tiny_run.path), "--tasks", "nothing")
    assert code == 2 and "lm-eval ended with exit code 3 (no such task" in err and "\x1b" not in err and "output.txt" in err


def test_tasks_that_can_t_be(iqlite: Callable[..., tuple[int, str, str]], tiny_run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for named in ("missing.yaml", "gsm8k,", "--model"):
        code, _, err = iqlite("eval", str(tiny_run.path), f"--tasks={named}")
        assert code == 2 and err.startswith("iqlite: --tasks")
    assert task_named("inspect_evals/ifeval").harness == "inspect" and task_named("gsm8k").harness == "lm-eval"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RunError, match="isn't on PATH"):
        program("inspect")
