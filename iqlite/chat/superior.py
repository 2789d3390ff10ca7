"""Answers drawn from the superior policy itself, without training: contrastive decoding (docs/method.md, equation 3, at every position).

The base reads what was said so far plain, under the wanted and under the unwanted description, as rows of one batch; the recipe's own
estimator combines what they predict, and the token that is drawn is said to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from iqlite.errors import RecipeError
from iqlite.model.sampling import Sampler
from iqlite.recipe.schema import Recipe
from iqlite.records import Messages, Rollout
from iqlite.training.readings import readings
from iqlite.training.rollout import sample_readings
from iqlite.training.session import Session


def check_heard(recipe: Recipe) -> None:
    """RecipeError where π̃ isn't made of readings of the base."""
    if recipe.superior.estimator == "adapter":
        raise RecipeError(
            f"{recipe.path}: superior.estimator = 'adapter' can't be spoken with: it can for contrastive, prompted and mixture."
        )


def superior_answers(
    session: Session,
    requests: Sequence[Messages],
    sampler: Sampler,
    *,
    index: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Rollout:
    """Answers to requests drawn from π̃, the base's weights reading; noise as in a rollout, by the requests' numbers `index`."""
    check_heard(session.recipe)
    which = readings(session.recipe, session.placement, "base")
    return sample_readings(
        session.policy,
        "reference",
        requests,
        {reading.name: [session.chat.ids(request, reading.description) for request in requests] for reading in which},
        {reading.name: session.chat.shared(reading.description) for reading in which},
        lambda states: session.scoring(session.policy.head, states)[0],
        range(len(requests)) if index is None else index,
        session.chat.stop_ids,
        sampler,
        sizes=session.sizes,
        progress=progress,
        ranks=session.ranks,
    )
