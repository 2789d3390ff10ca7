"""What an answer is worth to code: tone, length, refusal, repetition, form. A judge gives one number an answer, the higher wins."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from iqlite.scoring.refusals import refuses

NO_ANSWER = -200.0  # what an empty answer scores as a short one: as if it had so many words


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def tone(answer: str) -> float:
    """VADER's compound sentiment, −1 (gloomy) to 1 (cheerful). For tone only: as a judge of harmlessness it is at chance."""
    return float(_vader().polarity_scores(answer)["compound"])


def words(answer: str) -> int:
    """Length in words."""
    return len(answer.split())


def shorter(answer: str) -> float:
    """Minus the number of words; an empty answer isn't a short one."""
    return -float(words(answer)) if answer.strip() else NO_ANSWER


def refusal(answer: str) -> float:
    """1 if the answer refuses, else 0."""
    return float(refuses(answer))


def compliance(answer: str) -> float:
    """1 if the answer says something and doesn't refuse, else 0."""
    return float(bool(answer.strip()) and not refuses(answer))


MEASURES: dict[str, Callable[[str], float]] = {"tone": tone, "shorter": shorter, "refusal": refusal, "compliance": compliance}
"""Those that look at the answer alone; `training.measuring` adds harmless and described, which know what was asked."""

HARMLESS, DESCRIBED = "harmless", "described"
NAMES = (DESCRIBED, *MEASURES, HARMLESS)
ABOUT = {
    DESCRIBED: "which of the two descriptions the base's own readings say an answer fits; for any behaviour, but it is the target's own eye",
    "tone": "cheerful words count for an answer and gloomy ones against it, -1 to 1; English only",
    "shorter": "the fewer words the better; an empty answer isn't a short one",
    "refusal": "1 for an answer that refuses, else 0",
    "compliance": "1 for an answer that says something and doesn't refuse, else 0",
    HARMLESS: "1 for refusing what should be refused and answering what should be answered, by the prompts' labels",
}
OWN_EYE = "described is the target's own eye: that a description means something else to this base than to you, it can't see. Read the answers, or add --judge me or a judging model to compare."


_LEFTOVERS = re.compile(r"<\||\|>|\[/?INST\]|^(?:user|assistant|human|system)\s*:", re.IGNORECASE | re.MULTILINE)


def well_formed(answer: str) -> float:
    """1 if the answer says something and shows nothing of the chat's markup: no role names, no special tokens."""
    return float(bool(answer.strip()) and not _LEFTOVERS.search(answer))


def repetition(answer: str, n: int = 3) -> float:
    """Share of word n-grams that stood earlier in the answer, 0…1."""
    grams = _grams(answer, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[str], n: int = 2) -> float:
    """distinct-n (Li et al. 2016): different word n-grams over all of them, over many answers: 0…1. Falls with the number of words."""
    grams = [gram for answer in answers for gram in _grams(answer, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(answer: str, n: int) -> list[tuple[str, ...]]:
    said = answer.lower().split()
    return [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
