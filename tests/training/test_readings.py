"""Alignment of positions, where the method is easiest to get silently wrong: every reading against plain transformers, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from iqlite.model.template import Description
from iqlite.records import Rollout
from iqlite.training.readings import Reading, batches, read
from iqlite.training.session import Session
from tests.helpers import oracle
from tests.helpers.tensors import training_rollout
from tests.helpers.tiny import shake

REQUESTS = tuple(
    ({"role": "user", "content": text},) for text in ("why?", "tell me more about this thing", "so", "a longer question, please")
)


def logits_of(model: object, prompt: Sequence[int], response: Sequence[int]) -> list[list[float]]:
    """Next-token logits at each response position, one sequence at a time, no padding, no cache: the plain way."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]  # type: ignore[operator]
    rows: list[list[float]] = logits[len(prompt) - 1 : len(prompt) + len(response) - 1].double().tolist()
    return rows


@pytest.mark.parametrize("placement", ["system", "user"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])
def test_rewards_are_the_oracle_s_on_plain_transformers_logits(
    architecture: str, placement: str, make_session: Callable[..., Session], tiny: Callable[..., Path]
) -> None:
    """Equations (3), (4) and both KLs from text to number: prompts written by the tokenizer's own template, readings one by one."""
    folder = tiny(architecture)
    wanted, unwanted = "You are kind, and you take your time.", "You are mean."  # of different lengths on purpose
    session = make_session(
        model={"base": str(folder)},
        behavior={"wanted": wanted, "unwanted": unwanted, "placement": placement},
        rollout={"max_new_tokens": 9},
        train={"batch_tokens": 150, "chunk_tokens": 5},
    )
    shake(session.policy)
    rollout = session.answers("policy", REQUESTS, session.sampler("train"))
    statistics = session.score(rollout)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rewards, kl_superior, kl_reference = [], [], []
    for row, request in enumerate(rollout.requests):
        question = request[-1]["content"]

        def prompt(text: str | None, question: str = question) -> list[int]:
            turns = [{"role": "user", "content": question}]
            if text is not None and placement == "system":
                turns.insert(0, {"role": "system", "content": text})
            elif text is not None:
                turns[0]["content"] = f"{text}\n\n{question}"
            rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids: list[int] = tokenizer(rendered, add_special_tokens=False).input_ids
            return ids

        response = rollout.response_ids(row)
        readings = [logits_of(model, prompt(text), response) for text in (None, wanted, unwanted)]
        with session.policy.acting_as("policy"):
            policy = logits_of(session.policy.model, prompt(None), response)
        for t, token in enumerate(response):
            reference, plus, minus = (reading[t] for reading in readings)
            log_superior = oracle.superior(reference, [(1.0, plus, minus)], 3.0, 5.0, 1e-4)
            logp = oracle.log_softmax(policy[t])
            rewards.append(log_superior[token] - logp[token])
            kl_superior.append(oracle.loss("full-kl", logp, log_superior, token))
            kl_reference.append(oracle.loss("full-kl", logp, oracle.log_softmax(reference), token))
    for name, expected in (("reward", rewards), ("kl/policy_superior", kl_superior), ("kl/policy_reference", kl_reference)):
        found = statistics.values[name].tolist()
        assert found == pytest.approx(expected, abs=2e-3, rel=1e-3), name
    assert max(map(abs, rewards)) > 0.1


def tensors_close(a: Rollout, session: Session, other: Session) -> float:
    """Largest difference of any token statistic between two ways to score one rollout."""
    one, two = session.score(a), other.score(a)
    return max(float((one.values[name] - two.values[name]).abs().max()) for name in one.values)


def test_chunks_micro_batches_and_padding_change_nothing(make_session: Callable[..., Session]) -> None:
    session = make_session(rollout={"max_new_tokens": 9})
    shake(session.policy)
    rollout = session.answers("policy", REQUESTS, session.sampler("train"))
    for train in ({"batch_tokens": 1}, {"batch_tokens": 150}, {"chunk_tokens": 1}, {"chunk_tokens": 7, "batch_tokens": 100}):
        other = make_session(rollout={"max_new_tokens": 9}, train=train)
        shake(other.policy)
        assert tensors_close(rollout, session, other) < 1e-4, train
    wider = replace(
        rollout,
        tokens_BT=torch.nn.functional.pad(rollout.tokens_BT, (0, 5), value=3),
        mask_BT=torch.nn.functional.pad(rollout.mask_BT, (0, 5)),
    )
    narrow, wide = session.score(rollout), session.score(wider)
    assert all(torch.equal(narrow.values[name], wide.values[name]) for name in narrow.values)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "cohere"])
def test_left_padded_decoding_and_right_padded_scoring_agree(
    architecture: str, make_session: Callable[..., Session], tiny: Callable[..., Path]
) -> None:
    """log π of greedy tokens is the largest of its row only if both put the same token at the same position. One prompt is longer than
    Gemma-2's sliding window of 64 tokens here, the others are padded to it."""
    session = make_session(rollout={"max_new_tokens": 12}, model={"base": str(tiny(architecture))})
    shake(session.policy)
    requests = (*REQUESTS, ({"role": "user", "content": "how is that, and why, and for how long? " * 3},))
    rollout = session.answers("policy", requests, replace(session.sampler("train"), temperature=0.0))
    scores = read(session.policy, session.chat, rollout, [Reading("policy", "policy")], session.sizes)
    logits = session.policy.head(scores.hidden["policy"][rollout.mask_BT])
    assert torch.equal(logits.argmax(-1), rollout.tokens_BT[rollout.mask_BT])


@pytest.mark.parametrize("estimator", ["contrastive", "mixture", "prompted", "adapter"])
def test_without_a_contrast_the_superior_policy_is_the_reference(
    estimator: str, make_session: Callable[..., Session], tmp_path: Path
) -> None:
    """c⁺ = c⁻ (to the bit, since the readings share shape and padding) and strength 0; an untouched adapter then has reward 0."""
    same = Description("You are kind.")
    session = make_session()
    if estimator == "adapter":
        folder = tmp_path / "untouched"
        folder.mkdir()
        session.policy.save_adapter(folder)
        tables = {"superior": {"estimator": estimator, "adapter": str(folder)}, "behavior": {"wanted": None, "unwanted": None}}
    elif estimator == "mixture":
        two = [{"name": n, "wanted": "Be kind.", "unwanted": "Be mean."} for n in ("one", "two")]
        tables = {
            "superior": {"estimator": estimator, "strength": 0.0},
            "behavior": {"wanted": None, "unwanted": None, "mixture": tuple(two)},
        }
    elif estimator == "prompted":
        tables = {"superior": {"estimator": estimator, "strength": 0.0}, "behavior": {"unwanted": None}}
    else:
        tables = {"superior": {"estimator": estimator, "strength": 3.0}}
    session = make_session(**tables)
    rollout = training_rollout(session)
    which = [replace(r, description=same) if r.description and estimator == "contrastive" else r for r in session.readings]
    scores = read(session.policy, session.chat, rollout, which, session.sizes)
    hidden = {name: states[rollout.mask_BT] for name, states in scores.hidden.items()}
    if estimator == "contrastive":
        assert torch.equal(hidden["wanted"], hidden["unwanted"])
    log_superior = session.scoring(session.policy.head, hidden)[0]
    assert torch.equal(log_superior, session.policy.head(hidden["reference"]).float().log_softmax(-1))
    if estimator in ("adapter", "mixture", "prompted"):
        assert session.score(rollout).values["reward"].abs().max() < 1e-5


def test_readings_under_the_base_s_and_the_policy_s_weights(make_session: Callable[..., Session]) -> None:
    """The reference is always the bare base; the descriptions are read by the weights that the recipe names."""
    hidden = {}
    for weights in ("base", "policy", "ema"):
        session = make_session(superior={"weights": weights})
        if weights == "base":
            rollout = training_rollout(session)
        shake(session.policy)
        hidden[weights] = read(session.policy, session.chat, rollout, session.readings, session.sizes).hidden
        described = Reading("told", "policy", session.wanted)
        policy_s = read(session.policy, session.chat, rollout, [described], session.sizes).hidden["told"]
        assert torch.allclose(hidden[weights]["wanted"], policy_s, atol=1e-4) == (weights == "policy")
    assert torch.allclose(hidden["base"]["reference"], hidden["policy"]["reference"], atol=1e-5)
    assert torch.allclose(
        hidden["base"]["wanted"], hidden["ema"]["wanted"], atol=1e-5
    )  # an average that hasn't moved is the start: the base
    assert not torch.allclose(hidden["base"]["wanted"], hidden["policy"]["wanted"], atol=1e-3)


def test_demonstrations_stand_before_the_request_in_every_description(make_session: Callable[..., Session]) -> None:
    shown = {"user": "Breakfast?", "wanted": "Bread, lovely!", "unwanted": "Bread, alas."}
    session = make_session(behavior={"demonstrations": (shown,)})
    wanted, unwanted = (next(r.description for r in session.readings if r.name == name) for name in ("wanted", "unwanted"))
    assert wanted is not None and unwanted is not None
    turns = session.chat.describe(REQUESTS[0], wanted)
    assert [turn["content"] for turn in turns] == ["You are kind.", "Breakfast?", "Bread, lovely!", "why?"]
    assert [turn["content"] for turn in session.chat.describe(REQUESTS[0], unwanted)][2] == "Bread, alas."
    assert session.chat.describe(REQUESTS[0], None) == REQUESTS[0]  # the policy's own prompt stays plain


def test_the_ratio_is_exactly_one_at_the_first_update(make_session: Callable[..., Session]) -> None:
    """With ρ = 1 the first policy-gradient loss is the plain mean of −Â, whatever the clip: compare a tiny one with a wide one, the
    second with activation checkpointing."""
    from iqlite.training.update import rollout_advantages, update

    losses = []
    for clip in (1e-6, 0.5):
        session = make_session(
            objective={"name": "policy-gradient", "clip": clip, "centre": False},
            train={"batch_tokens": 150, "checkpointing": "on" if clip > 0.1 else "off"},
        )
        shake(session.policy)
        rollout = session.answers("policy", REQUESTS, session.sampler("train"))
        scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
        _, advantage = rollout_advantages(session, rollout, scores)
        assert advantage is not None
        statistics, _ = update(session, torch.optim.SGD(list(session.policy.parameters.values()), 0.0), rollout, scores, 0.0)
        losses.append(statistics.means()["loss"])
        assert (statistics.values["policy/ratio"] == 1.0).all()
        assert losses[-1] == pytest.approx(-float(advantage[rollout.mask_BT].mean()), rel=1e-6)
    assert losses[0] == losses[1] and math.isfinite(losses[0])


def test_batches_hold_every_row_once_longest_first_within_the_budget() -> None:
    lengths = [5, 40, 12, 12, 3, 90]
    parts = batches(lengths, 48)
    assert sorted(row for part in parts for row in part) == list(range(6))
    assert [lengths[row] for part in parts for row in part] == sorted(lengths, reverse=True)
    assert all(len(part) == 1 or max(lengths[row] for row in part) * len(part) <= 48 for part in parts)
    assert len(parts) == 3
