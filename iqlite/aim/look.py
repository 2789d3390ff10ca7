"""Whether the target points the right way, before anything moves: held-out prompts answered by the base, the prompted base and the superior
policy itself (contrastive decoding), scored by the recipe's own measure, paired.

This is the paper's break condition ("if the estimated superior policy doesn't correlate with preferences"): a description can take away
what it asks for, and training follows the superior wherever it points.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from iqlite.evaluation.answers import Answer, Answerer, collect
from iqlite.model.sampling import Sampler
from iqlite.recipe.schema import Recipe
from iqlite.records import Prompts
from iqlite.scoring.intervals import FEWEST, Array, Estimate, paired
from iqlite.scoring.measures import HARMLESS
from iqlite.training.measuring import by_kind, measured
from iqlite.training.order import spread, spread_by_kind
from iqlite.training.session import Session

FEWEST_LOOKED, MOST_LOOKED = 12, 24  # prompts; our choice
A_STEP = 2  # prompts in a look for each prompt of a step: it costs about two steps then (measured)
SHORT = 32  # tokens of an answer: enough to tell a tone or a refusal; our choice
BY_LENGTH = ("shorter",)  # measures that need whole answers, as long as in training: a cut one can't be longer than another
STRICT = 2  # comparisons' worth of doubt before a verdict is given: a 97.5 % interval
RIGHT, NONE, WRONG = "right", "none", "wrong"


@dataclass(frozen=True)
class Look:
    """What a look has found. `scores` are the measure's means by answerer, `difference` superior − base with its 95 % interval.

    `kinds` are, for harmless, (right, all) of the requests to refuse and to answer, by answerer. `verdict` is "right", "none" (no effect
    beyond chance) or "wrong" (worse than the base in a 97.5 % interval). `beginning` is advice where answers would have to begin as the base's never do.
    """

    measure: str
    prompts: int
    scores: dict[str, float]
    difference: Estimate
    prompted: Estimate | None
    kinds: dict[str, dict[str, tuple[int, int]]]
    verdict: str
    seconds: float
    beginning: str | None = None

    def figures(self) -> str:
        """The means in words: base 0.67, prompted 0.04, superior 0.00 (−0.67 (−0.8..−0.5) from the base)."""
        means = ", ".join(f"{name} {score:.2f}" for name, score in self.scores.items())
        sides = [
            f"; {what}: {', '.join(f'{name} {kinds[kind][0]}/{kinds[kind][1]}' for name, kinds in self.kinds.items())}"
            for kind, what in (("refuse", "refused as they should be"), ("answer", "answered as they should be"))
            if self.kinds
        ]
        return f"{means} ({signed(self.difference)} from the base, {self.prompts} prompts{''.join(sides)})"

    def record(self, *, forced: bool) -> dict[str, Any]:
        """For the run directory."""
        return {**asdict(self), "forced": forced}


def look(session: Session, progress: Callable[[int], None] = lambda _: None, seed: int = 0) -> Look:
    """Answers, or takes from what is kept, and measures. `progress` is told of answers, as many of base, prompted base and superior as `chosen(session)`."""
    began = time.perf_counter()
    numbers = chosen(session)
    who = [Answerer("base", "reference")]
    who += [Answerer(f"prompted ({session.placement} turn)", "reference", session.wanted)] if session.wanted else []
    who.append(Answerer("superior", "superior"))
    sampler = replace(look_sampler(session), seed=seed)
    asked = session.asked.some(numbers)
    answers = {
        one.name.split(" ")[0]: collect(session, None, one, asked.requests, [sampler], progress, index=numbers, strangeness=False)[0]
        for one in who
    }
    return judged(session, asked, answers, time.perf_counter() - began)


def judged(
    session: Session,
    asked: Prompts,
    answers: dict[str, list[Answer]],
    seconds: float = 0.0,
    score: Callable[[list[str]], Array] | None = None,
) -> Look:
    """The verdict on answers by "base", "superior" and, where there is one, "prompted", by the recipe's measure or another `score` of answers."""
    measure = session.recipe.judge.measure
    texts = {name: [a.answer for a in given] for name, given in answers.items()}
    scores = {name: score(given) if score else measured(session, measure, asked, given) for name, given in texts.items()}
    difference = scores["superior"] - scores["base"]
    kinds = {name: by_kind(asked, given) for name, given in texts.items()} if measure == HARMLESS else {}
    return Look(
        measure,
        len(asked),
        {name: float(score_P.mean()) for name, score_P in scores.items()},
        paired(difference[:, None]),
        paired((scores["prompted"] - scores["base"])[:, None]) if "prompted" in scores else None,
        kinds,
        direction(difference),
        seconds,
    )


def direction(difference_P: Array) -> str:
    """Of paired differences: "right" where their mean is above 0 beyond chance, "wrong" where it is below, in a 97.5 % interval."""
    if len(difference_P) < FEWEST:
        return NONE
    interval = paired(difference_P[:, None], comparisons=STRICT)
    return WRONG if interval.high < 0 else RIGHT if interval.low > 0 else NONE


def chosen(session: Session) -> list[int]:
    """Numbers of the held-out prompts that a look asks: evenly spread; for harmless as many of either kind as can be."""
    asked = session.asked
    count = A_STEP * session.recipe.rollout.prompts_per_step * SHORT / look_tokens(session.recipe)
    count = max(FEWEST_LOOKED, min(MOST_LOOKED, int(count)))
    return spread_by_kind(asked, count) if session.recipe.judge.measure == HARMLESS else spread(range(len(asked)), count)


def look_sampler(session: Session) -> Sampler:
    """How a look's answers are drawn: as a comparison's first seed, but no longer than it takes to tell."""
    return Sampler(0, look_tokens(session.recipe), 0.7, 0.9, "compare")


def look_tokens(recipe: Recipe) -> int:
    """Tokens of a look's answers at most: those that it takes to tell by the recipe's measure."""
    return recipe.rollout.max_new_tokens if recipe.judge.measure in BY_LENGTH else min(SHORT, recipe.rollout.max_new_tokens)


def signed(estimate: Estimate) -> str:
    """A difference with its interval, signs shown."""
    return f"{estimate.value:+.2f} ({estimate.low:+.2f}..{estimate.high:+.2f})"


def sentence(found: Look, recipe: Path) -> str:
    """What a look has found, for a person: one sentence of the figures, and what to do about it."""
    quoted = shlex.quote(str(recipe))
    if found.verdict == RIGHT:
        return f"aim: the target points the right way: by {found.measure}, {found.figures()}."
    if found.verdict == WRONG:
        return (
            f"{recipe} aims the wrong way: by {found.measure}, {found.figures()}, so training would take away what it should give. "
            f"Nothing was trained. Turn it round with:  iqlite probe {quoted} --improve   (or train all the same with --force)"
        )
    if found.prompts < FEWEST:
        return (
            f"aim: {found.prompts} held-out prompts are too few to tell which way the target points: give prompts.eval at least {FEWEST}."
        )
    return (
        f"aim: no effect beyond chance: by {found.measure}, {found.figures()}. What usually helps: a few demonstrations, simpler words, another "
        f"measure in [judge], or a larger base; iqlite probe {quoted} --improve tries some."
    )
