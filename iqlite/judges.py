"""Code measures of an answer: tone, length, and whether it ended by itself."""

from __future__ import annotations

import functools
from typing import Any


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
