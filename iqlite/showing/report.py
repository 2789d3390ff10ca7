"""`iqlite report`: what runs left, as one page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iqlite.evaluation.figures import verdict
from iqlite.records import HELD_OUT_FORWARD_KL, HELD_OUT_KL
from iqlite.run.journal import SAMPLES
from iqlite.run.rundir import RunDir
from iqlite.showing.aggregates import aggregates
from iqlite.showing.chart import Interval, Point, Series, forest
from iqlite.showing.facts import Facts, stability
from iqlite.showing.heat import Heat
from iqlite.showing.page import MOST_TOKENS, Page

CURVES = (
    ("Reward", "mean token reward of the step's answers, log π̃ − log π_θ, nats; nearer 0 is nearer the target", ("reward/mean",)),
    ("Distance from the target", "KL(π_θ‖π̃), nats a token; in training and on held-out prompts", ("kl/policy_superior", HELD_OUT_KL)),
    (
        "Distance from the target, forward",
        "KL(π̃‖π_θ), which forward-kl makes smaller and is judged by, nats a token; in training and on held-out prompts",
        ("kl/superior_policy", HELD_OUT_FORWARD_KL),
    ),
    ("Distance from the base", "KL(π_θ‖π_ref), nats a token", ("kl/policy_reference", "eval/kl_policy_reference")),
    (
        "Held-out measure",
        "mean score of held-out answers by the recipe's measure; beside the base's",
        ("eval/measure", "eval/measure_base"),
    ),
    ("Length", "tokens of an answer", ("response/length", "eval/length")),
    ("Entropy", "of the policy's next token, nats", ("policy/entropy",)),
    ("Loss", "the objective's mean over response tokens", ("loss",)),
    ("Gradient", "its norm before it is clipped", ("policy/grad_norm",)),
    ("Speed", "response tokens a second", ("time/tokens_per_s",)),
)
NAMES = {
    HELD_OUT_KL: "held out",
    HELD_OUT_FORWARD_KL: "held out",
    "eval/kl_policy_reference": "held out",
    "eval/measure": "policy",
    "eval/measure_base": "base",
    "eval/length": "held out",
}
PHASES = (
    ("answering", "time/rollout_s"),
    ("reading under the descriptions", "time/read_s"),
    ("update", "time/update_s"),
    ("held-out evaluation", "time/eval_s"),
)
TEXTS = 8  # pairs of answers that are shown where no token was read


@dataclass(frozen=True)
class Words:
    """A run's answers, read token by token, and what its target says more and less often."""

    heats: Sequence[Heat]
    more: Sequence[tuple[str, float]]
    less: Sequence[tuple[str, float]]


def report_page(runs: Sequence[RunDir], facts: Sequence[Facts], words: Sequence[Words | None], title: str, why_not: Sequence[str]) -> str:
    """The page of one run or of several. `words` are None where no token could be read, and `why_not` says why."""
    page = Page(True, "described", [heat for one in words if one for heat in one.heats])
    share = MOST_TOKENS // max(1, len(runs))
    shown = [
        _run(page, run, fact, one, why, share, charts=len(runs) == 1)
        for run, fact, one, why in zip(runs, facts, words, why_not, strict=True)
    ]
    charts = _overlaid(page, facts) if len(runs) > 1 else []
    return page.render("report.html", title, runs=shown, charts=charts)


def points(metrics: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """(step, value) of a metric where it was recorded and finite."""
    return [(float(one["step"]), float(one[name])) for one in metrics if one.get(name) is not None]


def _run(page: Page, run: RunDir, facts: Facts, words: Words | None, why_not: str, room: int, *, charts: bool) -> dict[str, Any]:
    found, comparison = facts.found, facts.found.get("compare")
    why = None
    if words:
        trained = [heat for heat in words.heats if heat.tokens]
        why = page.why(aggregates(trained), words.more, words.less)
    return {
        "facts": facts,
        "trained": _trained(facts),
        "groups": page.groups(words.heats, room) if words else [],
        "texts": [] if words else _texts(run),
        "why_not": why_not,
        "why": why,
        "count": len(words.heats) if words else 0,
        "charts": [made for title, what, names in CURVES for made in page.chart(title, what, _series(facts, names))] if charts else [],
        "comparison": comparison,
        "forest": _forest(comparison) if comparison else "",
        "verdict": verdict(comparison["judge"], comparison["contests"], comparison["prompts"], str(facts.path))[1] if comparison else "",
        "safety": found.get("safety", []),
        "stability": stability(facts),
        "phases": _phases(facts),
        "environment": _environment(facts),
        "lock": (run.path / "recipe.toml").read_text("utf-8"),
    }


def _series(facts: Facts, names: Sequence[str]) -> list[Series]:
    return [Series(NAMES.get(name, "training"), points(facts.metrics, name)) for name in names]


def _overlaid(page: Page, facts: Sequence[Facts]) -> list[dict[str, Any]]:
    """The first metric of each curve, all runs in one chart, so that what is said of a second one (after the semicolon) is left out."""
    return [
        made
        for title, what, names in CURVES
        for made in page.chart(
            title, what if len(names) == 1 else what.partition(";")[0], [Series(one.name, points(one.metrics, names[0])) for one in facts]
        )
    ]


def _forest(comparison: Mapping[str, Any]) -> Any:
    rows = [
        Interval(f"against {one['against']}", **{k: one["win_rate"][k] for k in ("value", "low", "high")}) for one in comparison["contests"]
    ]
    return forest(rows, 0.0, 1.0, 0.5, "Win rates of the trained model with their intervals")


def _trained(facts: Facts) -> list[tuple[str, str]]:
    recipe, superior = facts.recipe, facts.recipe.superior
    settings = ", ".join(f"{name} {value:g}" for name, value in superior.settings().items())
    aim, rows = facts.found.get("aim"), []
    rows = [
        ("base", f"{facts.base}, {'4 bits (NF4)' if recipe.model.quantization == 'nf4' else 'as stored'}"),
        ("adapter", f"LoRA of rank {recipe.adapter.rank}, alpha {recipe.adapter.alpha:g}"),
        ("target", f"{superior.estimator} ({settings}), read by the {superior.weights} weights, description in the {facts.environment.get('placement', '?')} turn"),
        ("objective", recipe.objective.name),
        ("each step", f"{recipe.rollout.prompts_per_step} prompts, answers of at most {recipe.rollout.max_new_tokens} tokens, learning rate {recipe.train.learning_rate:g}"),
    ]  # fmt: skip
    if aim:
        said = {"right": "pointed the right way", "wrong": "pointed the wrong way" + (", and training was forced" if aim.get("forced") else ""), "none": "had no effect beyond chance"}  # fmt: skip
        rows.append(("aim before training", f"{said.get(aim['verdict'], aim['verdict'])}: {aim['measure']} " + ", ".join(f"{who} {score:.2f}" for who, score in aim["scores"].items())))  # fmt: skip
    return rows


def _texts(run: RunDir) -> list[tuple[str, str, str]]:
    """Held-out answers of the first and the last evaluation that training kept."""
    by_step: dict[int, dict[str, str]] = {}
    for line in run.lines(SAMPLES):
        by_step.setdefault(line["step"], {})[line["prompt"]] = line["answer"]
    if not by_step:
        return []
    first, last = by_step[min(by_step)], by_step[max(by_step)]
    return [(prompt, first[prompt], last[prompt]) for prompt in first if prompt in last][:TEXTS]


def _phases(facts: Facts) -> list[tuple[str, float, float, float]]:
    rows = []
    for name, key in PHASES:
        values = [one[key] for one in facts.metrics if one.get(key) is not None]
        if values:
            rows.append((name, sum(values), statistics.median(values), sum(values) / max(1e-9, facts.seconds)))
    return rows


def _environment(facts: Facts) -> list[tuple[str, str]]:
    found = facts.environment
    packages = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items() if version)
    rows = [("device", found.get("device")), ("computed in", found.get("compute_dtype")), ("system", found.get("platform")), ("Python", found.get("python")), ("packages", packages)]  # fmt: skip
    if prompts := found.get("prompts"):
        rows.append(
            ("prompts", f"{prompts.get('train')} to train on, {prompts.get('eval')} held out, SHA-256 {str(prompts.get('sha256'))[:16]}…")
        )
    if sizes := found.get("sizes"):
        rows.append(("widths", json.dumps(sizes).strip("{}").replace('"', "")))
    return [(name, str(value)) for name, value in rows if value]
