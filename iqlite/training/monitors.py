"""Stability rules over the metrics: warn, keep the best, stop. Pure functions of the numbers so far; no torch.

The failure signatures are those of docs/method.md: oscillating loss, degraded held-out metrics, poor out-of-domain behaviour, and those of the
nearest literature (collapse of entropy, growing repetition and truncation: arXiv 2604.08527). All thresholds are our choice.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from iqlite.records import ERROR, HELD_OUT_KL, judged_by
from iqlite.scoring.intervals import FEWEST, paired

FIRST = 3  # steps that say what is normal for this run
PATIENCE = 3  # steps, or evaluations, in a row before a rule stops the run
PATIENCE_MEASURE = 2  # evaluations in a row that score below the base
NO_GRADIENT = 1e-6
WORSE = 1.25  # times the best held-out KL; less is the noise of a few answers
BEYOND_NOISE = 2.0  # standard errors of a difference of two held-out KLs, taken as independent: the same prompts make it less
SWING = 0.25  # of the first KL; smaller ups and downs are the noise of a few answers
ROUNDING = 1e-3  # nats a token; a KL that is zero but for rounding never gets worse
IMPROVEMENT = 0.01  # relative fall of the held-out KL that counts as getting better
NO_NUMBER = {"best_kl": math.inf, "settled_kl": math.inf, "best_measure": -math.inf}  # before the first evaluation; JSON has no infinity


@dataclass(frozen=True)
class Verdict:
    """What a rule says: `stop` ends the run (the best adapter is kept), otherwise it is a warning."""

    rule: str
    message: str
    stop: bool = False


@dataclass
class Monitors:
    """The run's memory of its own metrics. `state`/`restore` make it part of a checkpoint."""

    max_kl_reference: float
    until_converged: bool = False
    history: dict[str, list[float]] = field(default_factory=dict)
    in_a_row: dict[str, int] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    best_step: int = 0
    best_kl: float = math.inf
    best_error: float = 0.0
    settled_step: int = 0
    settled_kl: float = math.inf
    since_settled: int = 0
    forward: bool = False
    base_scores: list[float] = field(default_factory=list)
    base_measure: str = ""
    best_measure: float = -math.inf
    since_measure: int = 0

    def after_step(self, values: dict[str, float]) -> list[Verdict]:
        """Verdicts on one step's metrics."""
        finite = all(math.isfinite(values[name]) for name in ("loss", "policy/grad_norm"))
        verdicts = [
            self._rule("non-finite", not finite, "the loss or its gradient isn't finite; the step was skipped", stop_after=PATIENCE)
        ]
        if finite:
            verdicts += self._rules(values)
            for name in ("kl/policy_superior", "reward/variance", "policy/entropy", "response/repetition", "response/truncated_share"):
                self.history.setdefault(name, []).append(values[name])
        return [v for v in verdicts if v is not None]

    def _rules(self, values: dict[str, float]) -> list[Verdict | None]:
        far = values["kl/policy_reference"] > self.max_kl_reference
        return [
            self._rule("kl", far, f"KL(policy‖reference) is above train.max_kl_reference = {self.max_kl_reference:g}; lower the strength or the learning rate", stop_after=1),
            self._rule("gradient", values["policy/grad_norm"] < NO_GRADIENT, "the gradient is zero: the description has no effect on this base, or no response tokens are trained", stop_after=PATIENCE),
            self._rule("entropy", self._fell("policy/entropy", values, 0.1), "the policy's entropy has fallen below a tenth of its first value: it is collapsing", stop_after=PATIENCE),
            self._rule("repetition", self._grew("response/repetition", values, 2.0, above=0.25), "answers repeat themselves more and more", stop_after=PATIENCE),
            self._rule("truncated", self._grew("response/truncated_share", values, 1.5, above=0.5), "more and more answers run into rollout.max_new_tokens", stop_after=2 * PATIENCE),
            self._rule("variance", self._grew("reward/variance", values, 10.0, above=1.0), "the variance of the reward has grown tenfold", stop_after=2 * PATIENCE),
            self._rule("oscillation", self._oscillates(values["kl/policy_superior"]), "KL(policy‖superior) swings up and down from step to step; lower the learning rate", stop_after=PATIENCE),
        ]  # fmt: skip

    def after_eval(
        self, step: int, values: dict[str, float], scores: Sequence[float] = (), kinds: Sequence[str] = ()
    ) -> tuple[bool, list[Verdict]]:
        """(is this the best adapter so far, verdicts) for one evaluation on the held-out prompts.

        The KL is that of `records.judged_by`; where a run of an older version went by the other one, that counts no more.
        `scores` are its answers' by the recipe's measure, as many as `base_scores`, the base's own on the same prompts. What scores lower
        than the base by more than a standard error is never the best; what does beyond chance, twice in a row, stops. Where prompts are of several
        `kinds` (one a score), the best must not be lower in any: more right refusals don't pay for harmless requests that are refused too. Beyond
        chance in one of them warns.
        """
        name = judged_by(values)
        kl, error, forward = values[name], values.get(name + ERROR, 0.0), name != HELD_OUT_KL
        which = "KL(superior‖policy)" if forward else "KL(policy‖superior)"
        if forward != self.forward:
            self.forward, self.best_step, self.best_kl, self.settled_kl = forward, 0, math.inf, math.inf
            self.in_a_row.pop("held-out", None)
        lower, worse, one_sided = self._behind(scores, kinds)
        better = not lower and (kl < self.best_kl * (1 - IMPROVEMENT) if math.isfinite(self.best_kl) else math.isfinite(kl))
        if better:
            self.best_kl, self.best_error, self.best_step = kl, error, step
        noise = BEYOND_NOISE * math.hypot(error, self.best_error)
        self._settled(step, kl, error)
        self._measured(scores)
        verdicts = [
            self._rule(
                "measure",
                worse,
                "held-out answers score lower by the recipe's measure than the base's own, beyond chance: the target points the wrong way",
                stop_after=PATIENCE_MEASURE,
            ),
            self._rule(
                "one kind",
                one_sided and not worse,
                "held-out answers to one kind of prompts score lower than the base's own, beyond chance (refused though harmless, or the other way round): compare before you use it",
            ),
            self._rule(
                "held-out",
                not kl <= max(WORSE * self.best_kl + ROUNDING, self.best_kl + noise),
                f"the held-out {which} is getting worse",
                stop_after=PATIENCE,
                warn_after=2,
            ),
        ]
        verdicts.append(self._rule("held-out answers", self._degraded("eval", values), "held-out answers repeat themselves or run into rollout.max_new_tokens more and more", stop_after=PATIENCE))  # fmt: skip
        if "outside/kl_policy_reference" in values:
            bad = self._degraded("outside", values) or values["outside/kl_policy_reference"] > self.max_kl_reference
            verdicts.append(self._rule("outside", bad, "answers outside the domain are getting worse", stop_after=PATIENCE))
        if self.until_converged and self.since_settled >= PATIENCE and (not scores or self.since_measure >= PATIENCE):
            why = f"converged: the held-out {which} hasn't fallen beyond its noise since step {self.settled_step}"
            verdicts.append(Verdict("converged", why, stop=True))
        return better, [v for v in verdicts if v is not None]

    def judged_by(self, measure: str, base_scores: Sequence[float]) -> None:
        """Another measure from here on: what was seen by the one before counts no more."""
        self.base_measure, self.base_scores = measure, list(base_scores)
        self.best_measure, self.since_measure = -math.inf, 0
        self.in_a_row.pop("measure", None)
        self.in_a_row.pop("one kind", None)

    def state(self) -> dict[str, Any]:
        """Everything above as JSON data."""
        return {name: None if name in NO_NUMBER and math.isinf(value) else value for name, value in asdict(self).items()}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Monitors:
        """What `state` returned, as it was; what an older version didn't keep is as at the beginning."""
        known = {one.name for one in fields(cls)} - {name for name in NO_NUMBER if state.get(name) is None}
        return cls(**{name: value for name, value in state.items() if name in known})

    def _behind(self, scores: Sequence[float], kinds: Sequence[str]) -> tuple[bool, bool, bool]:
        """Of paired scores: (lower than the base's by more than a standard error, in all or of any kind; beyond chance in all; of any kind)."""
        if not scores:
            return False, False, False
        difference_P, kind_P = np.array(scores) - np.array(self.base_scores), np.array(kinds or [""] * len(scores))
        lower, beyond = [], []
        for some_p in (difference_P, *(difference_P[kind_P == kind] for kind in sorted(set(kinds)))):
            error = float(some_p.std(ddof=1) / len(some_p) ** 0.5) if len(some_p) > 1 else math.inf
            lower.append(float(some_p.mean()) < -error)
            beyond.append(len(some_p) >= FEWEST and paired(some_p[:, None]).high < 0)
        return any(lower), beyond[0], any(beyond)

    def _settled(self, step: int, kl: float, error: float) -> None:
        """How many evaluations it is since the held-out KL fell by more than a standard error."""
        if kl < self.settled_kl * (1 - IMPROVEMENT) - error if math.isfinite(self.settled_kl) else math.isfinite(kl):
            self.settled_step, self.settled_kl, self.since_settled = step, kl, 0
        else:
            self.since_settled += 1

    def _measured(self, scores: Sequence[float]) -> None:
        """How many evaluations it is since the measure rose by more than a standard error."""
        mean = statistics.fmean(scores) if scores else -math.inf
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        if mean > self.best_measure + error:
            self.best_measure, self.since_measure = mean, 0
        else:
            self.since_measure += 1

    def _rule(self, rule: str, broken: bool, message: str, stop_after: int | None = None, warn_after: int = 1) -> Verdict | None:
        """Counts a rule's breaches in a row: `warn_after` in a row warn, once a run; `stop_after` in a row stop."""
        self.in_a_row[rule] = self.in_a_row.get(rule, 0) + 1 if broken else 0
        if stop_after is not None and self.in_a_row[rule] >= stop_after:
            return Verdict(rule, f"{message} ({self.in_a_row[rule]} in a row).", stop=True)
        if self.in_a_row[rule] >= warn_after and rule not in self.warned:
            self.warned.append(rule)
            return Verdict(rule, f"{message}.")
        return None

    def _first(self, name: str) -> float | None:
        seen = self.history.get(name, [])
        return statistics.fmean(seen[:FIRST]) if len(seen) >= FIRST else None

    def _fell(self, name: str, values: dict[str, float], to: float) -> bool:
        first = self._first(name)
        return first is not None and values[name] < to * first

    def _grew(self, name: str, values: dict[str, float], times: float, above: float) -> bool:
        first = self._first(name)
        return first is not None and values[name] > above and values[name] > times * first

    def _degraded(self, name: str, values: dict[str, float]) -> bool:
        """Repetition or truncation of an evaluation's answers has grown well beyond what its first evaluations showed."""
        if f"{name}/repetition" not in values:
            return False
        seen = {f"{name}/repetition": values[f"{name}/repetition"], f"{name}/truncated": 1.0 - values[f"{name}/ended_share"]}
        worse = self._grew(f"{name}/repetition", seen, 2.0, above=0.25) or self._grew(f"{name}/truncated", seen, 1.5, above=0.5)
        for key, value in seen.items():
            self.history.setdefault(key, []).append(value)
        return worse

    def _oscillates(self, kl: float) -> bool:
        """Eight changes in a row that turn each time, none of them small beside what the run began with (the loss's own sign and
        scale differ between objectives; the KL's don't)."""
        first = self._first("kl/policy_superior")
        last = [*self.history.get("kl/policy_superior", []), kl][-9:]
        changes = [b - a for a, b in itertools.pairwise(last)]
        turns = sum(a * b < 0 for a, b in itertools.pairwise(changes))
        return first is not None and len(last) == 9 and turns == 7 and min(map(abs, changes)) > SWING * first
