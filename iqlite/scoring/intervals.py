"""What a comparison lets one say: win rates, differences and Elo with intervals. numpy only; every interval holds 95 %.

Legend: P prompts, S seeds, K answerers. Answers to one prompt belong together, so resampling draws prompts, not answers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Z95 = 1.959963984540054  # the normal quantile of 0.975
RESAMPLES, SEED = 1000, 0
FEWEST = 10  # prompts or pairs below which nothing is said of a difference: so few resample badly, and can all agree by chance; our choice
ELO = 400 / math.log(10)  # Elo points of one nat of Bradley–Terry strength
VIRTUAL_DRAWS = 1.0  # between any two who met: keeps a clean sweep finite


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g}..{self.high:.3g})"

    def percent(self) -> str:
        """A share as 62 % (55..69)."""
        return f"{100 * self.value:.0f} % ({100 * self.low:.0f}..{100 * self.high:.0f})"

    def bounded(self) -> dict[str, float | None]:
        """Its fields for JSON, which has no infinity: None where there is no bound."""
        return {name: bound if math.isfinite(bound) else None for name, bound in asdict(self).items()}

    def excludes(self, value: float) -> bool:
        """True if the interval doesn't hold `value`: the difference is significant at 5 %."""
        return not self.low <= value <= self.high


def wilson(wins: float, trials: float) -> Estimate:
    """A share with Wilson's score interval (1927); `wins` may hold halves for ties. nan without trials."""
    if trials <= 0:
        return Estimate(math.nan, math.nan, math.nan)
    share, z2 = wins / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def paired(difference_PS: Array, comparisons: int = 1) -> Estimate:
    """The mean of paired differences; the interval is a percentile bootstrap over prompts.

    Of several `comparisons` that are looked at together, all intervals hold at once in 95 % (Bonferroni).
    """
    by_prompt_P = difference_PS.mean(1)
    means = _resampled(len(by_prompt_P)) @ by_prompt_P
    tail = 2.5 / comparisons
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(by_prompt_P.mean()), float(low), float(high))


def outcomes(scores_KPS: Array) -> Array:
    """[P, K, K]: share of the seeds at which i scored above j on a prompt, ties as halves; diagonal 0.5."""
    first, second = scores_KPS[:, None], scores_KPS[None]
    found: Array = ((first > second) + 0.5 * (first == second)).mean(-1).transpose(2, 0, 1)
    return found


def elo(outcome_PKK: Array, seeds: int = 1) -> list[list[Estimate]]:
    """[i][j]: by how many Elo points i is above j. The Bradley–Terry fit, intervals by resampling prompts.

    `seeds` answers to each prompt count as so many games; one virtual draw between any two is added. Where i won every single game
    against j, resampling them can't tell how much: no upper bound, and Wilson's lower one of the win rate where that is lower.
    """
    prompts = len(outcome_PKK)
    point = _strengths(outcome_PKK.sum(0)[None] * seeds)[0]
    drawn_RKK = np.einsum("rp,pij->rij", _resampled(prompts) * prompts, outcome_PKK) * seeds
    drawn_RK = _strengths(drawn_RKK)
    above, drawn = ELO * (point[:, None] - point), ELO * (drawn_RK[:, :, None] - drawn_RK[:, None])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    swept = (outcome_PKK == 1).all(0)
    least = wilson(prompts, prompts).low
    low[swept], high[swept] = np.minimum(low[swept], ELO * math.log(least / (1 - least))), math.inf
    low, high = np.where(swept.T, -high.T, low), np.where(swept.T, -low.T, high)
    return [[Estimate(*map(float, one)) for one in zip(*rows, strict=True)] for rows in zip(above, low, high, strict=True)]


def length_controlled(won: Array, length: Array, other_length: Array) -> Estimate:
    """The win rate if both answers were equally long: a logistic fit of the outcome on the difference in length.

    P(win) = σ(a + b·tanh(Δ/sd Δ)), σ(a) is reported (after AlpacaEval's length-controlled win rate, arXiv 2404.04475, with a weak prior
    on b); the interval is the fit's own. All arrays flat: one entry an answer, `won` 0, 0.5 or 1.
    """
    difference = length - other_length
    spread = float(difference.std())
    x = np.stack([np.ones_like(difference), np.tanh(difference / spread) if spread else np.zeros_like(difference)], 1)
    prior = np.diag([1e-6, 0.1])  # b's keeps a perfect separation finite
    weights = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ weights))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + prior
        step = np.linalg.solve(curvature, x.T @ (won - p) - prior @ weights)
        weights = weights + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10 or abs(weights[0]) > 30:
            break
    if min(won.mean(), 1 - won.mean()) == 0:  # nothing to fit: all won, or all lost
        return wilson(float(won.sum()), len(won))
    error = Z95 * math.sqrt(np.linalg.inv(curvature)[0, 0])
    values = [1 / (1 + math.exp(-max(-30.0, min(30.0, float(v))))) for v in (weights[0], weights[0] - error, weights[0] + error)]
    return Estimate(*values)


def _resampled(count: int) -> Array:
    """[RESAMPLES, count] weights of a bootstrap, rows summing to 1."""
    found: Array = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    return found


def _strengths(wins_RKK: Array) -> Array:
    """Bradley–Terry log-strengths [R, K] with mean 0 for R tables of wins, by the minorise-maximise iteration (Hunter 2004)."""
    off = 1.0 - np.eye(wins_RKK.shape[-1])
    wins_RKK = wins_RKK * off
    met = (wins_RKK + wins_RKK.transpose(0, 2, 1)) > 0
    wins_RKK = wins_RKK + VIRTUAL_DRAWS / 2 * met
    games, won = wins_RKK + wins_RKK.transpose(0, 2, 1), wins_RKK.sum(-1)
    strength = np.ones(won.shape)
    for _ in range(5000):
        denominator = (games / (strength[:, :, None] + strength[:, None, :])).sum(-1)
        new = np.where(won > 0, won / np.maximum(denominator, 1e-300), strength)
        new /= np.exp(np.log(new).mean(-1, keepdims=True))
        done = np.abs(np.log(new) - np.log(strength)).max() < 1e-9
        strength = new
        if done:
            break
    logs: Array = np.log(strength)
    return logs
