"""Many answers' token rewards in a few rows: the tokens and pairs of tokens most rewarded and most punished, in context, and reward by position."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from iqlite.showing.heat import Heat

BY = ("described", "trained", "reward")
"""What can be looked at; see `heat.Token`."""
SHRINK = 2.0  # places with reward 0 that are added to each, so that what was seen once doesn't lead; our choice
AROUND = 5  # tokens of context on either side


@dataclass(frozen=True)
class Ranked:
    """One token, or two in a row: `mean` nats over its `count` places, and the place where it was most extreme, as (before, itself, after)."""

    text: str
    mean: float
    count: int
    context: tuple[str, str, str]


@dataclass(frozen=True)
class Aggregates:
    """Of some answers: `tokens` and `bigrams` as (most rewarded, most punished), and (mean, answers that reach it) by position."""

    by: str
    tokens: tuple[list[Ranked], list[Ranked]]
    bigrams: tuple[list[Ranked], list[Ranked]]
    positions: list[tuple[float, int]]


def aggregates(heats: Sequence[Heat], by: str = "described", count: int = 10) -> Aggregates:
    """`count` rows of each, ranked by the mean, drawn to 0 where there are few places; texts that differ in case and spaces only are one."""
    return Aggregates(by, _ranked(heats, by, 1, count), _ranked(heats, by, 2, count), positions(heats, by))


def positions(heats: Sequence[Heat], by: str) -> list[tuple[float, int]]:
    """(mean, number of answers) at each position that an answer reaches."""
    found = []
    for at in range(max((len(heat.tokens) for heat in heats), default=0)):
        values = [getattr(heat.tokens[at], by) for heat in heats if len(heat.tokens) > at]
        found.append((sum(values) / len(values), len(values)))
    return found


def _ranked(heats: Sequence[Heat], by: str, size: int, count: int) -> tuple[list[Ranked], list[Ranked]]:
    places: dict[str, list[tuple[float, Heat, int]]] = defaultdict(list)
    for heat in heats:
        for at in range(len(heat.tokens) - size + 1):
            some = heat.tokens[at : at + size]
            if key := "".join(token.text for token in some).strip().lower():
                places[key].append((sum(getattr(token, by) for token in some) / size, heat, at))
    scored = [(sum(value for value, _, _ in found) / (len(found) + SHRINK), key) for key, found in places.items()]
    up = [_row(key, places[key], size, 1) for score, key in sorted(scored, reverse=True)[:count] if score > 0]
    down = [_row(key, places[key], size, -1) for score, key in sorted(scored)[:count] if score < 0]
    return up, down


def _row(key: str, found: Sequence[tuple[float, Heat, int]], size: int, sign: int) -> Ranked:
    _, heat, at = max(found, key=lambda place: sign * place[0])
    pieces = [token.text for token in heat.tokens]
    context = ("".join(pieces[max(0, at - AROUND) : at]), "".join(pieces[at : at + size]), "".join(pieces[at + size : at + size + AROUND]))
    return Ranked(key, sum(value for value, _, _ in found) / len(found), len(found), context)
