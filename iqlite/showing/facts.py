"""What a run's directory says of it, for people: its state in words, what it took, how stable it was, how it compares. Reads files only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iqlite.base.identity import ADAPTER_WEIGHTS
from iqlite.recipe.reading import to_data
from iqlite.recipe.schema import Recipe
from iqlite.records import HELD_OUT_KL, judged_by
from iqlite.run.findings import figures
from iqlite.run.listing import CONVERGED, FINISHED, RUNNING, UNFINISHED, State, state_of
from iqlite.run.rundir import RunDir

WHY = {
    "non-finite": "The loss or its gradient wasn't finite several steps in a row. Lower train.learning_rate, or take another base.",
    "kl": "The policy moved further from the base than train.max_kl_reference allows. Lower superior.strength or train.learning_rate.",
    "gradient": "The gradient was zero: the description has no effect on this base. See what it moves with iqlite inspect and iqlite probe.",
    "entropy": "The policy's entropy fell below a tenth of its first value: it was collapsing to few answers. Lower superior.strength or the learning rate.",
    "repetition": "Answers repeated themselves more and more. Lower superior.strength or train.learning_rate.",
    "truncated": "More and more answers ran into rollout.max_new_tokens. Raise it, or describe shorter answers.",
    "variance": "The variance of the reward grew tenfold. Lower superior.strength, superior.clip or train.learning_rate.",
    "oscillation": "The distance from the target swung up and down from step to step. Lower train.learning_rate.",
    "measure": "Held-out answers scored lower by the recipe's measure than the base's own, beyond chance: the target points the wrong way. Turn it with iqlite probe RECIPE --improve.",
    "held-out": "The distance from the target on held-out prompts got worse. Lower train.learning_rate, or give more training prompts.",
    "held-out answers": "Held-out answers repeated themselves or ran into rollout.max_new_tokens more and more. Lower superior.strength.",
    "outside": "Answers outside the domain got worse. Lower superior.strength, or add such prompts as prompts.contrary.",
}
"""Why a monitor stops a run, and what helps, by the monitor's name in result.json."""
GOOD = (FINISHED, CONVERGED)


@dataclass(frozen=True)
class Facts:
    """One run. `state` is finished, converged, stopped, running or unfinished; `sentence` says it in words, `advice` what helps where it failed."""

    name: str
    path: Path
    recipe: Recipe
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    state: str
    sentence: str
    advice: str
    step: int
    total: int | None
    found: Mapping[str, Any]
    seconds: float
    bytes: int

    @property
    def good(self) -> bool:
        """Whether it ended as it should."""
        return self.state in GOOD

    @property
    def wanted(self) -> str:
        """The behaviour in words."""
        behavior = self.recipe.behavior
        return behavior.wanted or " ".join(p.wanted for p in behavior.mixture) or f"as the adapter {self.recipe.superior.adapter}"

    @property
    def unwanted(self) -> str:
        """Its opposite in words."""
        return self.recipe.behavior.unwanted or " ".join(p.unwanted for p in self.recipe.behavior.mixture)

    @property
    def base(self) -> str:
        """The base's name, without the folders of a path."""
        name = str(self.environment.get("base", {}).get("name", self.recipe.model.base))
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def measure(self) -> tuple[float, float] | None:
        """(the base's, the trained model's) mean score of held-out answers by the recipe's measure, at temperature 0.7 where it was compared."""
        compared = self.found.get("compare")
        if compared and compared["measure"] == self.recipe.judge.measure:
            return compared["measures"][0]["score"], compared["measures"][-1]["score"]
        if measured := self.found.get("held_out_measure"):
            return measured["base"], measured["after"]
        line = next((one for one in reversed(self.metrics) if one.get("eval/measure") is not None), None)
        return (line["eval/measure_base"], line["eval/measure"]) if line else None

    def peak_gib(self) -> float | None:
        """Highest memory of the run."""
        return max((one["memory/peak_gib"] for one in self.metrics if one.get("memory/peak_gib") is not None), default=None)

    def rate(self) -> float | None:
        """Response tokens a second, the middle step's."""
        rates = [one["time/tokens_per_s"] for one in self.metrics if one.get("time/tokens_per_s") is not None]
        return statistics.median(rates) if rates else None

    def tokens(self) -> int:
        """Response tokens in all."""
        return int(sum(one.get("response/tokens") or 0 for one in self.metrics))


def facts_of(run: RunDir) -> Facts:
    """What the run's files say."""
    recipe, metrics, result, environment = run.recipe(), run.metrics(), run.result(), run.environment()
    seconds = sum((one.get("time/step_s") or 0.0) + (one.get("time/eval_s") or 0.0) for one in metrics)
    state = state_of(run.path, to_data(recipe), environment, result, max((one["step"] for one in metrics), default=0))
    sentence, advice = _said(run, state, result)
    size = sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())
    found = figures(run, run.adapter) if (run.adapter / ADAPTER_WEIGHTS).is_file() else {}
    return Facts(
        run.path.name or str(run.path),
        run.path,
        recipe,
        environment,
        metrics,
        state.name,
        sentence,
        advice,
        state.step,
        state.total,
        found,
        seconds,
        size,
    )


def _said(run: RunDir, state: State, result: Mapping[str, Any] | None) -> tuple[str, str]:
    """(a run's state in a sentence, what helps)."""
    step, of = state.step, f" of {state.total}" if state.total else ""
    if state.name == FINISHED:
        return f"Finished: all {step} steps.", ""
    if state.name == CONVERGED:
        return f"Stopped after step {step}{of}, since the held-out distance from the target no longer fell.", ""
    if state.name == RUNNING:
        return f"Running: step {step}{of}.", ""
    if state.name == UNFINISHED:
        again = f"Go on with: iqlite train RECIPE --out {run.path} --resume"
        return f"Unfinished: interrupted or killed; the last checkpoint is of step {step}{of}.", again
    best = result and result.get("best_step")
    kept = f" The adapter kept is the best one, of step {best}." if best is not None else ""
    return f"Stopped by the monitor “{state.why}” after step {step}{of}.{kept}", WHY.get(state.why, "")


def stability(facts: Facts) -> list[tuple[bool, str]]:
    """How training went, in sentences: (whether that is as it should be, the sentence)."""
    found: list[tuple[bool, str]] = []
    steps = [one for one in facts.metrics if one["step"] > 0]

    def change(name: str) -> tuple[float, float] | None:
        values = [one[name] for one in steps if one.get(name) is not None]
        some = max(1, min(3, len(values) // 2))
        return (statistics.fmean(values[:some]), statistics.fmean(values[-some:])) if values else None

    name = max((judged_by(one) for one in facts.metrics), key=lambda name: name != HELD_OUT_KL, default=HELD_OUT_KL)
    evaluated = [one[name] for one in facts.metrics if one.get(name) is not None]
    if len(evaluated) > 1:
        fell = evaluated[-1] < evaluated[0]
        found.append((fell, f"The distance from the target on held-out prompts {'fell' if fell else 'didn’t fall'}, from {evaluated[0]:.2f} to {evaluated[-1]:.2f} nats a token."))  # fmt: skip
    if (entropy := change("policy/entropy")) is not None:
        kept = entropy[1] > 0.3 * entropy[0]
        found.append((kept, f"The policy's entropy went from {entropy[0]:.2f} to {entropy[1]:.2f} nats{'' if kept else ': answers have become much alike'}."))  # fmt: skip
    if (length := change("response/length")) is not None:
        found.append((True, f"Answers went from {length[0]:.0f} to {length[1]:.0f} tokens."))
    if (repeated := change("response/repetition")) is not None:
        fine = repeated[1] < max(0.1, 2 * repeated[0])
        found.append((fine, f"{repeated[1]:.0%} of the three-token runs in the last answers stood earlier in the same answer ({repeated[0]:.0%} at the start)."))  # fmt: skip
    if (cut := change("response/truncated_share")) is not None and cut[1] > 0.5:
        found.append((cut[1] < 0.9, f"{cut[1]:.0%} of the last answers were cut at rollout.max_new_tokens ({cut[0]:.0%} at the start)."))
    if (far := change("kl/policy_reference")) is not None:
        limit = facts.recipe.train.max_kl_reference
        found.append((far[1] < limit, f"The policy ended {far[1]:.2f} nats a token from the base; training stops at {limit:g}."))
    return found
