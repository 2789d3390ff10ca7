"""A control without training: a steering vector from the same two descriptions, by the package steering-vectors.

    pip install --no-deps steering-vectors && pip install scikit-learn      # no dependency of iqlite's
    python -m tests.bench.steering cheerful [--layers 8 12 16 20] [--multipliers 2 4 6 8]

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
import torch
from steering_vectors import train_steering_vector

from iqlite.evaluation.answers import base_nll
from iqlite.recipe.reading import load_recipe
from iqlite.records import Messages, Prompts, Rollout
from iqlite.training.opening import open_session
from iqlite.training.session import Session
from tests.bench.methods import file_of, path_of, scores, written
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


def answered(session: Session, requests: list[Messages], temperature: float) -> Rollout:
    """By generate(), with whatever hooks the model has; the recipe's length, top-p 0.9."""
    how = {"do_sample": True, "temperature": temperature, "top_p": 0.9, "top_k": 0} if temperature else {"do_sample": False}
    chat, model = session.chat, session.policy.base.model
    ids = [chat.ids(request) for request in requests]
    longest, pad = max(map(len, ids)), chat.stop_ids[0]
    rows = torch.tensor([[pad] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    with torch.no_grad():
        torch.manual_seed(0)
        out = model.generate(
            input_ids=rows, attention_mask=mask, max_new_tokens=session.recipe.rollout.max_new_tokens, **how,
            eos_token_id=list(chat.stop_ids), pad_token_id=pad,
        )[:, longest:]  # fmt: skip
    ends_BT = torch.isin(out, torch.tensor(chat.stop_ids))
    mask_BT = ends_BT.long().cumsum(-1) - ends_BT.long() == 0  # up to the first end, with it
    return Rollout(tuple(range(len(ids))), tuple(requests), tuple(map(tuple, ids)), out, mask_BT, (ends_BT & mask_BT).any(-1))


def figures(task: str, session: Session, asked: Prompts, rollout: Rollout) -> dict[str, Any]:
    """As `tests.bench.methods` keeps them; without hooks."""
    texts = [session.chat.text(rollout.response_ids(row)) for row in range(len(asked))]
    return {
        "scores": scores(task, session, asked, texts),
        "words": [len(text.split()) for text in texts],
        "ended": float(rollout.ended_B.float().mean()),
        "nats": float(np.average(base_nll(session, rollout), weights=rollout.mask_BT.sum(-1).tolist())),
        "kinds": list(asked.expected or ()),
        "example": texts[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--layers", nargs="+", type=int, default=[8, 12, 16, 20])
    parser.add_argument("--multipliers", nargs="+", type=float, default=[2, 4, 6, 8])
    asked = parser.parse_args()
    session = open_session(load_recipe(path_of(asked.task)))
    model, train = session.policy.base.model, list(session.train.requests)
    told = json.loads(file_of(asked.task, Variant(f"told ({session.placement} turn)"), 0).read_bytes())["answers"]["0.7"]
    given = pairs(session, train[:ASKED])
    model.eval()  # its adapter is untouched: the base
    vector = train_steering_vector(model, session.chat.tokenizer, given, layers=asked.layers)

    def steered(layer: int, multiplier: float, prompts: Prompts, temperature: float = 0.7) -> dict[str, Any]:
        one = type(vector)({layer: vector.layer_activations[layer]})
        with one.apply(model, multiplier=multiplier):
            rollout = answered(session, list(prompts.requests), temperature)
        return figures(asked.task, session, prompts, rollout)

    tried, some = {}, session.train.some(range(ASKED, ASKED + CHOSEN_ON))
    for layer, multiplier in itertools.product(asked.layers, asked.multipliers):
        found = steered(layer, multiplier, some)
        tried[layer, multiplier] = float(np.mean(found["scores"])), found["nats"]
        print(f"layer {layer}, multiplier {multiplier:g}: {tried[layer, multiplier][0]:.3f}, {found['nats']:.2f} nats", flush=True)
    sane = {key: value for key, value in tried.items() if value[1] <= told["nats"]}
    for name, of in (("steering", tried), ("steering, no stranger than told", sane)):
        if of:
            layer, multiplier = max(of, key=lambda key: of[key][0])
            answers = {f"{t:g}": steered(layer, multiplier, session.eval, t) for t in (0.7, 0.0)}
            written(asked.task, Variant(f"{name} (layer {layer}, × {multiplier:g})"), 0, {"answers": answers})


if __name__ == "__main__":
    main()
