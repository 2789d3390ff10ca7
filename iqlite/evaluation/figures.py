"""Answers and a judge → what may be said: each answerer's figures, who wins how often, Elo, all with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from iqlite.evaluation.answers import Answer
from iqlite.records import Messages
from iqlite.scoring.intervals import FEWEST, Array, Estimate, length_controlled, paired, wilson
from iqlite.scoring.measures import distinct, refusal, repetition, tone, well_formed, words

Answers = Mapping[str, Sequence[Sequence[Answer]]]
"""Answerer → [seed][prompt]."""
Ratings = Sequence[Sequence[Estimate]]
"""[i][j]: by how many Elo points answerer i is above j."""


@dataclass(frozen=True)
class Figures:
    """One answerer's: means over prompts and seeds; standard errors over prompts, None of one prompt."""

    name: str
    answers: int
    score: float
    score_se: float | None
    tone: float
    tone_se: float | None
    words_median: float
    ended_share: float
    empty_share: float
    well_formed_share: float
    refused_share: float
    repetition: float
    distinct_2: float
    base_nll: float
    example: str


def figures(name: str, answers: Sequence[Sequence[Answer]], score_PS: Array, example: int) -> Figures:
    """Of one answerer; `score_PS` is the judge's [prompts, seeds]."""
    flat = [answer for seed in answers for answer in seed]
    texts = [answer.answer for answer in flat]
    tone_P = np.array([[tone(a.answer) for a in seed] for seed in answers]).mean(0)
    return Figures(
        name=name,
        answers=len(flat),
        score=float(score_PS.mean()),
        score_se=_standard_error(score_PS.mean(1)),
        tone=float(tone_P.mean()),
        tone_se=_standard_error(tone_P),
        words_median=statistics.median(map(words, texts)),
        ended_share=statistics.fmean(a.ended for a in flat),
        empty_share=statistics.fmean(not text for text in texts),
        well_formed_share=statistics.fmean(map(well_formed, texts)),
        refused_share=statistics.fmean(map(refusal, texts)),
        repetition=statistics.fmean(map(repetition, texts)),
        distinct_2=distinct(texts),
        base_nll=sum((a.nll or 0.0) * a.tokens for a in flat) / max(1, sum(a.tokens for a in flat)),
        example=answers[0][example].answer,
    )


def scores(answers: Answers, measure: Callable[[str], float]) -> Array:
    """[answerers, prompts, seeds] of a code measure."""
    return scores_on(answers, None, lambda _, text: measure(text))


def scores_on(answers: Answers, requests: Sequence[Messages] | None, measure: Callable[[Any, str], float]) -> Array:
    """The same of a judge who sees the requests too."""
    asked: Sequence[Any] = requests or [None] * len(next(iter(answers.values()))[0])
    found = [[[measure(r, a.answer) for r, a in zip(asked, seed, strict=True)] for seed in by_seed] for by_seed in answers.values()]
    return np.array(found).transpose(0, 2, 1)


def wins_by_score(names: Sequence[str], focus: str, score_KPS: Array) -> dict[str, Array]:
    """[prompts, seeds] by opponent: 1 where `focus` scored higher, 0.5 where it drew."""
    mine = score_KPS[list(names).index(focus)]
    return {name: (mine > other) + 0.5 * (mine == other) for name, other in zip(names, score_KPS, strict=True) if name != focus}


def wins_by_judge(
    answers: Answers, focus: str, requests: Sequence[Messages], prefers: Callable[[Messages, str, str], float], progress: Callable[[int], None]
) -> dict[str, Array]:  # fmt: skip
    """The same by one who looks at two answers at a time."""
    found = {}
    for name, given in answers.items():
        if name == focus:
            continue
        won_PS = np.zeros((len(requests), len(given)))
        for seed, (mine, other) in enumerate(zip(answers[focus], given, strict=True)):
            for row, request in enumerate(requests):
                won_PS[row, seed] = prefers(request, mine[row].answer, other[row].answer)
                progress(1)
        found[name] = won_PS
    return found


def games_of(names: Sequence[str], focus: str, won: Mapping[str, Array]) -> Array:
    """[prompts, K, K] where only `focus` met the others."""
    at, prompts = list(names).index(focus), len(next(iter(won.values())))
    games = np.zeros((prompts, len(names), len(names)))
    for other, name in enumerate(names):
        if name != focus:
            games[:, at, other] = won[name].mean(1)
            games[:, other, at] = 1 - games[:, at, other]
    return games


def contests(answers: Answers, focus: str, won: Mapping[str, Array], score_KPS: Array, rated: Ratings) -> list[dict[str, Any]]:
    """`focus` against everybody else: win rate with Wilson's interval and by resampling prompts, length-controlled, differences in score and Elo."""
    names = list(answers)
    at = names.index(focus)
    length_KPS = scores(answers, lambda text: float(words(text)))
    found = []
    for name, won_PS in won.items():
        other = names.index(name)
        rate, by_prompt = wilson(float(won_PS.mean(1).sum()), len(won_PS)), paired(won_PS)  # a prompt counts once, whatever the seeds
        controlled = length_controlled(won_PS.mean(1), length_KPS[at].mean(1), length_KPS[other].mean(1))
        found.append(
            {
                "against": name,
                "win_rate": asdict(rate),
                "win_rate_by_prompt": asdict(by_prompt),
                "length_controlled": asdict(controlled),
                "elo": rated[at][other].bounded(),
                "difference": asdict(paired(score_KPS[at] - score_KPS[other])),
                "significant": len(won_PS) >= FEWEST and rate.excludes(0.5) and by_prompt.excludes(0.5),
            }
        )
    return found


def verdict(by: str, found: Sequence[Mapping[str, Any]], prompts: int, run: str) -> tuple[bool, str]:
    """(whether training did what it should, by the judge): in a sentence, with what to try next where it didn't."""
    base = next(one for one in found if one["against"] == "base")
    rate = Estimate(**base["win_rate"])
    prompted = [one for one in found if one["against"].startswith("prompted")]
    hardest = min(prompted, key=lambda one: one["win_rate"]["value"], default=None)
    if prompts < FEWEST:
        return False, f"{prompts} prompts are too few for a verdict: ask at least {FEWEST}."
    if base["significant"] and rate.value > 0.5:
        beside = f", and against {hardest['against']} on {Estimate(**hardest['win_rate']).percent()}" if hardest else ""
        return True, f"It worked: by {by}, the trained model wins against the base on {rate.percent()} of the prompts{beside}."
    if base["significant"]:
        return False, (
            f"It went the wrong way: by {by}, the trained model wins against the base on only {rate.percent()} of the prompts. "
            "Don't use it; turn the recipe's aim: iqlite probe RECIPE --improve."
        )
    return False, (
        f"No difference from the base that can be told from chance, by {by}: {rate.percent()} of the prompts. Try more steps or a higher "
        f"strength (iqlite probe tells which), demonstrations (--improve), more prompts, or another --judge; then: iqlite compare {run}."
    )


def by_category(answers: Answers, won: Mapping[str, Array], score_KPS: Array, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Per category: everybody's mean score, and the win rate against the first answerer."""
    names = list(answers)
    found = []
    for label in dict.fromkeys(labels):
        some = np.array([i for i, one in enumerate(labels) if one == label])
        won_PS = won[names[0]][some]
        means = {name: float(score_KPS[k, some].mean()) for k, name in enumerate(names)}
        found.append(
            {"category": label, "prompts": len(some), "scores": means, "win_rate": asdict(wilson(float(won_PS.mean(1).sum()), len(won_PS)))}
        )
    return found


def _standard_error(values_P: Array) -> float | None:
    return float(values_P.std(ddof=1) / len(values_P) ** 0.5) if len(values_P) > 1 else None
