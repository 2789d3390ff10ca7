"""What is said of each token, against equations (3) and (4) in float64, written as loops over whole sequences' logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from iqlite.errors import PromptsError
from iqlite.recipe.schema import Recipe
from iqlite.showing.heat import ROLES, heat, token_text
from iqlite.training.opening import open_session
from iqlite.training.readings import Reading, readings
from iqlite.training.session import Session
from tests.helpers import oracle
from tests.helpers.tiny import shake

REQUEST = ({"role": "user", "content": "What is it good for?"},)
IDS = [72, 101, 108, 108, 111, 32, 116, 104, 101, 114, 101, 257]


def rows(session: Session, reading: Reading, ids: list[int]) -> list[list[float]]:
    """Logits at an answer's places, from one whole sequence."""
    with session.policy.acting_as(reading.role), torch.no_grad():
        prompt = session.chat.ids(REQUEST, reading.description)
        logits = session.policy.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    found: list[list[float]] = logits.double().tolist()
    return found


MIXED: dict[str, Any] = {
    "behavior": {
        "mixture": [
            {"name": "kind", "weight": 0.7, "wanted": "You are kind.", "unwanted": "You are mean."},
            {"name": "short", "weight": 0.4, "wanted": "Be short.", "unwanted": "Be long."},
        ],
        "wanted": None,
        "unwanted": None,
    },
    "superior": {"estimator": "mixture", "strength": 1.5, "clip": 0.3},
}


@pytest.mark.parametrize(
    "tables",
    [
        {"superior": {"strength": 2.0, "clip": 0.25, "plausibility": 0.05}},
        {"superior": {"estimator": "prompted", "strength": 1.5}},
        MIXED,
    ],
    ids=["contrastive", "prompted", "mixture"],
)
def test_every_figure_of_a_token_is_what_the_equations_say(make_recipe: Callable[..., Recipe], tables: dict[str, Any]) -> None:
    session = open_session(make_recipe(**tables))
    shake(session.policy)
    (found,), shift = heat(session, [("text", REQUEST, IDS)], top=3)
    logits = {one.name: rows(session, one, IDS) for one in readings(session.recipe, session.placement, "base")}
    policy = rows(session, Reading("policy", "policy"), IDS)
    settings = session.recipe.superior.settings()
    clip, plausibility = settings.get("clip", math.inf), settings.get("plausibility", 0.0)
    names = [(1.0, "wanted", "unwanted")]
    if session.recipe.superior.estimator == "mixture":
        names = [(p.weight, f"wanted:{p.name}", f"unwanted:{p.name}") for p in session.recipe.behavior.mixture]
    moved = [0.0] * len(policy[0])
    seen = {"clipped": 0, "implausible": 0}
    for place, (token, mine) in enumerate(zip(found.tokens, IDS, strict=True)):
        reference = logits["reference"][place]
        pairs = [(weight, logits[one][place], logits.get(other, logits["reference"])[place]) for weight, one, other in names]
        log = {
            "policy": oracle.log_softmax(policy[place]),
            "reference": oracle.log_softmax(reference),
            "superior": oracle.superior(reference, pairs, settings["strength"], clip, plausibility),
        }
        deltas = [(weight, oracle.log_softmax(one)[mine] - oracle.log_softmax(other)[mine]) for weight, one, other in pairs]
        assert token.reward == pytest.approx(log["superior"][mine] - log["policy"][mine], abs=1e-4)
        assert token.described == pytest.approx(log["superior"][mine] - log["reference"][mine], abs=1e-4)
        assert token.trained == pytest.approx(log["policy"][mine] - log["reference"][mine], abs=1e-4)
        assert token.contrast == pytest.approx(sum(weight * delta for weight, delta in deltas), abs=1e-4)
        assert token.clipped == any(abs(delta) > clip for _, delta in deltas)
        best = max(math.exp(one) for one in log["reference"])
        assert token.implausible == (math.exp(log["reference"][mine]) < plausibility * best)
        seen = {name: count + getattr(token, name) for name, count in seen.items()}
        for role in ROLES:
            assert token.probability[role] == pytest.approx(math.exp(log[role][mine]), abs=1e-5)
            order = sorted(range(len(log[role])), key=lambda one: -log[role][one])[:3]
            assert [text for text, _ in token.alternatives[role]] == [token_text(session, one) for one in order]
            assert [p for _, p in token.alternatives[role]] == pytest.approx([math.exp(log[role][one]) for one in order], abs=1e-5)
        moved = [m + math.exp(s) - math.exp(r) for m, s, r in zip(moved, log["superior"], log["reference"], strict=True)]
    assert shift.places == len(IDS) and shift.total_V.tolist() == pytest.approx(moved, abs=1e-4)
    if clip < math.inf:
        assert 0 < seen["clipped"] < len(IDS)  # both kinds were there
    if plausibility > 0.01:
        assert seen["implausible"] > 0
    assert found.text == session.chat.tokenizer.decode(IDS)


def test_answers_of_different_lengths_in_one_batch_are_read_as_alone(make_session: Callable[..., Session]) -> None:
    session = make_session()
    shake(session.policy)
    answers = [("text", REQUEST, IDS[:length]) for length in (3, 12, 7)]
    together, shift = heat(session, answers)
    alone = [heat(session, [one]) for one in answers]
    for one, ((other,), _) in zip(together, alone, strict=True):
        assert [token.reward for token in one.tokens] == pytest.approx([token.reward for token in other.tokens], abs=1e-4)
    assert shift.total_V.tolist() == pytest.approx(sum(part.total_V for _, part in alone).tolist(), abs=1e-4)  # type: ignore[union-attr]


def test_an_answer_without_a_token_is_refused(make_session: Callable[..., Session]) -> None:
    with pytest.raises(PromptsError, match="no token"):
        heat(make_session(), [("text", REQUEST, [])])
