"""Answers and a judge → what may be said: each answerer's figures, who wins how often, Elo, all with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from iqlite.answers import Answer
from iqlite.intervals import Array, Estimate, elo, length_controlled, outcomes, paired, wilson
from iqlite.judges import distinct, refusal, repetition, tone, well_formed, words

Answers = Mapping[str, Sequence[Sequence[Answer]]]
"""Answerer → [seed][prompt]."""


@dataclass(frozen=True)
class Figures:
    """One answerer's: means over prompts and seeds; standard errors over prompts."""

    name: str
    answers: int
    score: float | None
    score_se: float | None
    tone: float
    tone_se: float
    words_median: float
    ended_share: float
    empty_share: float
    well_formed_share: float
    refused_share: float
    repetition: float
    distinct_2: float
    base_nll: float
    example: str


def figures(name: str, answers: Sequence[Sequence[Answer]], score_PS: Array | None, example: int) -> Figures:
    """Of one answerer; `score_PS` is the judge's [prompts, seeds]."""
    flat = [answer for seed in answers for answer in seed]
    texts = [answer.answer for answer in flat]
    tone_P = np.array([[tone(a.answer) for a in seed] for seed in answers]).mean(0)
    return Figures(
        name=name,
        answers=len(flat),
        score=None if score_PS is None else float(score_PS.mean()),
        score_se=None if score_PS is None else _standard_error(score_PS.mean(1)),
        tone=float(tone_P.mean()),
        tone_se=_standard_error(tone_P),
        words_median=statistics.median(map(words, texts)),
        ended_share=statistics.fmean(a.ended for a in flat),
        empty_share=statistics.fmean(not text for text in texts),
        well_formed_share=statistics.fmean(map(well_formed, texts)),
        refused_share=statistics.fmean(map(refusal, texts)),
        repetition=statistics.fmean(map(repetition, texts)),
        distinct_2=distinct(texts),
        base_nll=sum(a.nll * a.tokens for a in flat) / max(1, sum(a.tokens for a in flat)),
        example=answers[0][example].answer,
    )


def scores(answers: Answers, measure: Callable[[str], float]) -> Array:
    """[answerers, prompts, seeds] of a code measure."""
    found: Array = np.array([[[measure(a.answer) for a in seed] for seed in by_seed] for by_seed in answers.values()]).transpose(0, 2, 1)
    return found


def contests(answers: Answers, focus: str, score_KPS: Array) -> list[dict[str, Any]]:
    """`focus` against everybody else: win rate with Wilson's interval and by resampling prompts, length-controlled, difference in score."""
    names = list(answers)
    at = names.index(focus)
    length_KPS = scores(answers, lambda text: float(words(text)))
    games_PKK = outcomes(score_KPS)
    prompts, seeds = score_KPS.shape[1:]
    found = []
    for other, name in enumerate(names):
        if other == at:
            continue
        won_PS = (score_KPS[at] > score_KPS[other]) + 0.5 * (score_KPS[at] == score_KPS[other])
        rate, by_prompt = wilson(float(won_PS.sum()), prompts * seeds), paired(games_PKK[:, at, other, None])
        controlled = length_controlled(won_PS.ravel(), length_KPS[at].ravel(), length_KPS[other].ravel())
        difference = paired(score_KPS[at] - score_KPS[other])
        found.append(
            {
                "against": name,
                "win_rate": asdict(rate),
                "win_rate_by_prompt": asdict(by_prompt),
                "length_controlled": asdict(controlled),
                "difference": asdict(difference),
                "significant": by_prompt.excludes(0.5),
            }
        )
    return found


def ratings(answers: Answers, games_PKK: Array, seeds: int) -> dict[str, Estimate]:
    """Elo by answerer; the first one's is 0."""
    return dict(zip(answers, elo(games_PKK, 0, seeds), strict=True))


def by_category(answers: Answers, focus: str, score_KPS: Array, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Per category: mean score of everybody, and `focus`'s win rate against the first answerer."""
    names = list(answers)
    at = names.index(focus)
    found = []
    for label in dict.fromkeys(labels):
        some = np.array([i for i, one in enumerate(labels) if one == label])
        won = outcomes(score_KPS[:, some])[:, at, 0].sum() * score_KPS.shape[2]
        means = {name: float(score_KPS[k, some].mean()) for k, name in enumerate(names)}
        found.append(
            {
                "category": label,
                "prompts": len(some),
                "scores": means,
                "win_rate": asdict(wilson(float(won), len(some) * score_KPS.shape[2])),
            }
        )
    return found


def _standard_error(values_P: Array) -> float:
    return float(values_P.std(ddof=1) / len(values_P) ** 0.5) if len(values_P) > 1 else 0.0
