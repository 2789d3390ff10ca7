"""What stands in a run about its adapters: figures of training, comparisons, safety, the look at its aim."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iqlite.base.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from iqlite.errors import RunError, warn
from iqlite.records import HELD_OUT_FORWARD_KL, HELD_OUT_KL
from iqlite.run.files import read_json
from iqlite.run.rundir import RunDir

COMPARISON, SAFETY, HARNESSES = "compare", "safety", "eval"
JUDGEMENTS = "judgements.jsonl"  # verdicts of a judging model, or a person's
REWARDS = "rewards.json"  # held-out answers before and after, with every token's rewards, as a report shows them
HELD_OUT = "held out"  # what a comparison asked when it asked nothing else


def file_of(name: str, which: str = "adapter", asked: str = "") -> str:
    """Where a run keeps what was found of its adapter `which`: NAME.json, NAME-best.json, and NAME.FILE.json for other prompts or requests than its own."""
    return name + (f"-{which}" if which != "adapter" else "") + (f".{asked}" if asked else "") + ".json"


def figures(run: RunDir, adapter: Path) -> dict[str, Any]:
    """What the run measured on its held-out prompts, and what `iqlite compare` found of this very adapter, if it was asked.

    `compare` is of the run's own held-out prompts, `elsewhere` a list of the same on others; `safety` is a list, one for each set of requests;
    `harnesses` what Inspect and lm-eval said.
    """
    evaluated = [line for line in run.metrics() if line.get(HELD_OUT_KL) is not None]
    evaluated = evaluated if evaluated and evaluated[0]["step"] == 0 else []  # without what was before, nothing is said of a change
    found: dict[str, Any] = {}
    mine = adapter_digest(adapter)
    if evaluated:
        step = run.step_of(adapter)
        last = [line for line in evaluated if line["step"] <= step][-1]
        for name, key in ((HELD_OUT_KL, "held_out_kl_policy_superior"), (HELD_OUT_FORWARD_KL, "held_out_kl_superior_policy")):
            if evaluated[0].get(name) is not None:
                found[key] = {"before": evaluated[0][name], "after": last[name]}
        found["steps"] = last["step"]
    if evaluated and evaluated[0].get("eval/measure") is not None:
        found["held_out_measure"] = {"of": run.recipe().judge.measure, "base": last["eval/measure_base"], "after": last["eval/measure"]}
    if aim := run.aim():
        found["aim"] = aim
    compared: dict[str, Any] = {}
    checked: dict[str, Any] = {}
    if scores := harness_scores(run, mine):
        found["harnesses"] = scores
    for file in sorted([*run.path.glob(f"{COMPARISON}*.json"), *run.path.glob(f"{SAFETY}*.json")]):
        one = _of_adapter(file, mine)
        if one is None:
            continue
        if file.name.startswith(SAFETY):
            checked[one["set"]] = one
        elif one["asked"] not in compared or answers_in(one) >= answers_in(compared[one["asked"]]):
            compared[one["asked"]] = one  # adapter and best may be the same one, and both have been asked
    if HELD_OUT in compared:
        found["compare"] = compared.pop(HELD_OUT)
    return found | ({"elsewhere": [*compared.values()]} if compared else {}) | ({"safety": [*checked.values()]} if checked else {})


def harness_scores(run: RunDir, adapter_sha256: str) -> list[dict[str, Any]]:
    """What Inspect and lm-eval said of this very adapter beside the base, as `iqlite eval` kept it."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for file in (run.path / file_of(HARNESSES), run.path / file_of(HARNESSES, "best")):
        for score in (_of_adapter(file, adapter_sha256) or {}).get("scores", []) if file.is_file() else []:
            found.setdefault((score["harness"], score["task"], score["metric"]), score)
    return [*found.values()]


def _of_adapter(file: Path, adapter_sha256: str) -> dict[str, Any] | None:
    """What a file says of an adapter; None if it is of another one, or can't be read, which is said."""
    try:
        one = read_json(file)
    except RunError as error:
        warn(f"{error} Its figures are left out.")
        return None
    return one if one.get("adapter_sha256") == adapter_sha256 else None


def with_error(score: Mapping[str, Any], who: str) -> str:
    """A harness's score of `base` or `trained` with its standard error, for people."""
    value, error = score[who], score[f"{who}_se"]
    return "–" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def answers_in(comparison: Mapping[str, Any]) -> int:
    """How many answers of each answerer a comparison holds."""
    return int(comparison["prompts"] * comparison["seeds"])


def adapter_digest(folder: Path) -> str:
    """What tells one adapter from another: its weights, and what multiplies them."""
    return digest((folder / ADAPTER_WEIGHTS).read_bytes() + (folder / ADAPTER_CONFIG).read_bytes())[:16]


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
