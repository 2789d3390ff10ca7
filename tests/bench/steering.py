"""A control without training: a steering vector from the same two descriptions, by the package steering-vectors.

    pip install --no-deps steering-vectors && pip install scikit-learn      # no dependency of iqlite's
    python -m tests.bench.steering cheerful [--layers 10 15 20] [--multipliers 1 2 4]

The base's plain answers to some training prompts are read under both descriptions, after 0 to 24 tokens; a layer's vector is the mean difference of
its last states, added at all positions while the plain prompt is answered (contrastive activation addition, arXiv 2312.06681). Layer and
multiplier are chosen on 24 training prompts, once for the score alone and once among those no stranger to the base than its prompted answers; the two
answer all held-out prompts for the table of `tests.bench.methods`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import numpy as np
from steering_vectors import train_steering_vector

from iqlite.baselines.trl_trainers import _answers
from iqlite.evaluation.answers import base_nll
from iqlite.records import Messages
from iqlite.training.measuring import rollout_of
from iqlite.training.opening import open_session
from iqlite.training.session import Session
from tests.bench.methods import file_of, recipe_of, scores, written
from tests.bench.rivals import Variant

ASKED, CHOSEN_ON = 32, 24  # training prompts for the vector, others to choose on
AFTER = (0, 4, 8, 16, 24)  # tokens of the answer


def pairs(session: Session, requests: list[Messages]) -> list[tuple[str, str]]:
    """The same beginnings of plain answers behind both descriptions, as text."""
    assert session.wanted is not None
    rollout = session.answers("reference", requests, session.sampler("steering"), index=list(range(len(requests))))
    wanted, unwanted = (reading.description for reading in session.readings if reading.description is not None)
    decode, found = session.chat.tokenizer.decode, []
    for row, request in enumerate(requests):
        answer = rollout.response_ids(row)
        for after in (count for count in AFTER if count <= len(answer)):
            one, other = (decode(session.chat.ids(request, text) + answer[:after]) for text in (wanted, unwanted))
            found.append((one, other))
    return found


def figures(task: str, session: Session, requests: list[Messages], texts: list[str]) -> dict[str, Any]:
    """As `tests.bench.methods` keeps them; without hooks."""
    rollout = rollout_of(session, requests, texts)
    nats, tokens = base_nll(session, rollout), rollout.mask_BT.sum(-1).tolist()
    return {
        "scores": scores(task, session, session.eval, texts),
        "words": [len(text.split()) for text in texts],
        "ended": 0.0,
        "nats": float(np.average([0.0 if value != value else value for value in nats], weights=tokens)),
        "kinds": [],
        "example": texts[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--layers", nargs="+", type=int, default=[8, 12, 16, 20])
    parser.add_argument("--multipliers", nargs="+", type=float, default=[0.5, 1, 2, 4])
    asked = parser.parse_args()
    session = open_session(recipe_of(asked.task))
    model, train = session.policy.base.model, list(session.train.requests)
    told = json.loads(file_of(asked.task, Variant(f"told ({session.placement} turn)"), 0).read_bytes())["answers"]["0.7"]
    given = pairs(session, train[:ASKED])
    rollout = session.recipe.rollout.model_copy(update={"temperature": 0.7, "top_p": 0.9})
    sampled = session.recipe.model_copy(update={"rollout": rollout})
    model.eval()  # its adapter is untouched: the base
    vector = train_steering_vector(model, session.chat.tokenizer, given, layers=asked.layers)

    def steered(layer: int, multiplier: float, requests: list[Messages]) -> dict[str, Any]:
        one = type(vector)({layer: vector.layer_activations[layer]})
        with one.apply(model, multiplier=multiplier):
            texts = _answers(model, session.chat, requests, sampled)
        return figures(asked.task, session, requests, texts)

    tried, some = {}, train[ASKED:][:CHOSEN_ON]
    for layer, multiplier in itertools.product(asked.layers, asked.multipliers):
        found = steered(layer, multiplier, some)
        tried[layer, multiplier] = float(np.mean(found["scores"])), found["nats"]
        print(f"layer {layer}, multiplier {multiplier:g}: {tried[layer, multiplier][0]:.3f}, {found['nats']:.2f} nats", flush=True)
    sane = {key: value for key, value in tried.items() if value[1] <= told["nats"]}
    for name, of in (("steering", tried), ("steering, no stranger than told", sane)):
        if of:
            layer, multiplier = max(of, key=lambda key: of[key][0])
            answers = steered(layer, multiplier, list(session.eval.requests))
            written(asked.task, Variant(f"{name} (layer {layer}, × {multiplier:g})"), 0, {"answers": {"0.7": answers}})


if __name__ == "__main__":
    main()
