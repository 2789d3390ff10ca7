"""Which prompts come when: a step's, and evenly spread ones of a set. Functions of seed and step alone."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import TypeVar

import numpy as np

from iqlite.records import Messages, Prompts
from iqlite.training.session import Session

Thing = TypeVar("Thing")


def prompts_of_step(prompts: Sized, step: int, count: int, seed: int) -> list[int]:
    """Prompt (or pair) numbers of a step (1-based): each pass over the set is its own permutation, a function of (seed, pass) alone."""
    chosen: list[int] = []
    at = (step - 1) * count
    while len(chosen) < count:
        pass_number, offset = divmod(at + len(chosen), len(prompts))
        order = np.random.Generator(np.random.PCG64([seed, pass_number])).permutation(len(prompts))
        chosen += order[offset : offset + count - len(chosen)].tolist()
    return chosen


def prompts_and_contrary(session: Session, step: int) -> tuple[list[Messages], list[int], int]:
    """A step's requests, their numbers, and how many of them, the last ones, are contrary; these are numbered behind the training prompts."""
    recipe, contrary = session.recipe, session.contrary
    chosen = prompts_of_step(session.train, step, recipe.rollout.prompts_per_step, recipe.train.seed)
    more = prompts_of_step(contrary, step, recipe.contrary_per_step, recipe.train.seed) if contrary else []
    requests = [session.train.requests[i] for i in chosen] + ([contrary.requests[i] for i in more] if contrary else [])
    return requests, [*chosen, *(len(session.train) + i for i in more)], len(more)


def spread_by_kind(asked: Prompts, count: int) -> list[int]:
    """Up to `count` numbers, half of requests to refuse and half of requests to answer where there are so many, evenly spread over each."""
    refuse, answer = ([n for n, one in enumerate(asked.expected) if one == kind] for kind in ("refuse", "answer"))
    half = min(count // 2, len(answer))
    return sorted(spread(refuse, count - half) + spread(answer, max(half, count - len(refuse))))


def spread(things: Sequence[Thing], count: int) -> list[Thing]:
    """Up to `count` of some things, evenly spread."""
    return [things[n] for n in np.linspace(0, len(things) - 1, min(count, len(things))).astype(int)]
