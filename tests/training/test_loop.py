"""The loop: every estimator with every objective learns, the schedule and the data order are what they say, stops keep the best adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iqlite.method.estimators import ESTIMATORS
from iqlite.method.objectives import OBJECTIVES
from iqlite.model.policy import LOSS_SCALE_FLOAT16
from iqlite.records import Prompts
from iqlite.run.rundir import RunDir
from iqlite.training.evaluating import answered, repetition
from iqlite.training.loop import Outcome, train
from iqlite.training.opening import environment
from iqlite.training.optimizer import apply_update, learning_rate, make_optimizer
from iqlite.training.order import prompts_of_step
from iqlite.training.readings import Reading, read
from iqlite.training.session import Session
from tests.helpers.reporters import Silent
from tests.helpers.tensors import gradients, training_rollout
from tests.helpers.tiny import shake


def run_of(session: Session, path: Path) -> tuple[Outcome, RunDir]:
    run = RunDir.create(path, session.recipe, environment(session))
    return train(session, run, Silent()), run


def tables_of(estimator: str, folder: Path, make_session: Callable[..., Session]) -> dict[str, Any]:
    if estimator == "adapter":
        policy = make_session().policy
        shake(policy)
        (folder / "told").mkdir()
        policy.save_adapter(folder / "told")
        return {"superior": {"estimator": estimator, "adapter": "told", "strength": 1.0}, "behavior": {"wanted": None, "unwanted": None}}
    if estimator == "mixture":
        two = [{"name": "kind", "wanted": "You are kind.", "unwanted": "You are mean."}, {"name": "short", "weight": 0.5, "wanted": "Be short.", "unwanted": "Be long."}]  # fmt: skip
        return {"superior": {"estimator": estimator}, "behavior": {"wanted": None, "unwanted": None, "mixture": tuple(two)}}
    return {"superior": {"estimator": estimator}, "behavior": {"unwanted": None} if estimator == "prompted" else {}}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_pair_moves_the_policy_to_the_superior(
    estimator: str, objective: str, make_session: Callable[..., Session], tmp_path: Path
) -> None:
    tables = tables_of(estimator, tmp_path, make_session)
    session = make_session(
        **tables,
        objective={"name": objective},
        rollout={"prompts_per_step": 8, "max_new_tokens": 12},
        train={"steps": 25, "eval_every": 25, "learning_rate": 5e-3},
    )
    fixed = session.answers("reference", session.train.requests, session.sampler("fixed"))
    before = session.score(fixed).means()["kl/policy_superior"]
    outcome, run = run_of(session, tmp_path / "run")
    assert outcome.why == "finished"
    assert session.score(fixed).means()["kl/policy_superior"] < 0.95 * before  # sampled objectives fall slowest
    first = run.metrics()[1]
    assert abs(first["kl/policy_reference"]) < 1e-7 and all(math.isfinite(v) for v in first.values())


@pytest.mark.parametrize("weights", ["policy", "ema"])
def test_readings_by_moving_weights_train_too(weights: str, make_session: Callable[..., Session], tmp_path: Path) -> None:
    session = make_session(superior={"weights": weights}, train={"steps": 4, "eval_every": 4})
    outcome, run = run_of(session, tmp_path / "run")
    assert outcome.why == "finished" and all(math.isfinite(row["loss"]) for row in run.metrics()[1:])


def test_the_metrics_are_method_s_list(make_session: Callable[..., Session], tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("What is two plus two?\nName a river.\n")
    session = make_session(prompts={"outside": "outside.txt"})
    _, run = run_of(session, tmp_path / "run")
    promised = {
        "step", "loss", "reward/mean", "reward/variance", "kl/policy_superior", "kl/policy_reference", "policy/entropy", "response/length",
        "response/ended_share", "response/truncated_share", "response/repetition", "superior/clipped_share", "superior/implausible_mass",
        "policy/grad_norm", "policy/learning_rate", "time/rollout_tokens_per_s", "time/read_tokens_per_s", "time/update_tokens_per_s",
        "time/tokens_per_s", "memory/peak_gib",
    }  # fmt: skip
    rows = run.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(promised <= row.keys() for row in rows[1:]), promised - rows[1].keys()
    assert [("eval/kl_policy_superior" in row, "outside/kl_policy_reference" in row) for row in rows] == [(True, True), (False, False), (True, True), (True, True)]  # fmt: skip


def test_forward_kl_records_the_kl_that_it_is_judged_by(make_session: Callable[..., Session], tmp_path: Path) -> None:
    """As float64 logits of the same held-out answers have it."""
    session = make_session(objective={"name": "forward-kl"}, train={"steps": 2, "eval_every": 2})
    _, run = run_of(session, tmp_path / "run")
    _, rollout = answered(session, "policy", "eval", session.eval)
    scores = read(session.policy, session.chat, rollout, [*session.readings, Reading("policy", "policy")], session.sizes)
    hidden = {name: states_BTD[rollout.mask_BT] for name, states_BTD in scores.hidden.items()}
    logp_nV = session.policy.head(hidden.pop("policy")).double().log_softmax(-1)
    superior_nV = session.scoring(session.policy.head, hidden)[0].double()
    forward_n = (superior_nV.exp() * (superior_nV - logp_nV)).sum(-1)
    mean, last = float(forward_n.mean()), run.metrics()[-1]
    beside = [float((part - mean).sum()) for part in forward_n.split(rollout.mask_BT.sum(-1).tolist())]
    error = math.sqrt(sum(one**2 for one in beside) * len(beside) / (len(beside) - 1)) / len(forward_n)
    assert last["eval/kl_superior_policy"] == pytest.approx(mean, rel=1e-4)
    assert last["eval/kl_superior_policy_se"] == pytest.approx(error, rel=1e-3) and error > 0
    assert last["eval/kl_policy_superior_se"] != last["eval/kl_superior_policy_se"]


def test_the_data_order_is_passes_over_permutations() -> None:
    prompts = Prompts(tuple(({"role": "user", "content": str(n)},) for n in range(10)))
    seen = [number for step in range(1, 11) for number in prompts_of_step(prompts, step, 4, seed=3)]
    for at in range(0, 40, 10):
        assert sorted(seen[at : at + 10]) == list(range(10))
    assert seen[:10] != seen[10:20] and seen[:10] != list(range(10))
    assert prompts_of_step(prompts, 7, 4, seed=3) == seen[24:28]  # a function of the step alone, so a resume needs no state
    assert prompts_of_step(prompts, 1, 4, seed=4) != seen[:4]
    assert Counter(prompts_of_step(prompts, 1, 25, seed=0)).most_common()[-1][1] >= 2


def test_the_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, 100, peak=1.0, warmup=0.05, schedule="cosine") for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[52] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 48 / 95)) / 2)
    assert {learning_rate(step, 100, peak=1.0, warmup=0.05, schedule="constant") for step in range(5, 101)} == {1.0}
    assert learning_rate(1, 1, peak=1.0, warmup=0.05, schedule="cosine") == 1.0


def test_a_gradient_is_scaled_down_to_its_norm_and_a_broken_one_is_skipped(make_session: Callable[..., Session]) -> None:
    policy = make_session().policy
    before = policy.state()
    sgd = torch.optim.SGD(list(policy.parameters.values()), 1.0)
    for parameter in policy.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in policy.parameters.values())
    assert apply_update(policy, sgd, 1.0, 0.5) == pytest.approx(count**0.5, rel=1e-5)
    moved = torch.cat([(before[name] - value).flatten() for name, value in policy.state().items()])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)
    after = policy.state()
    for parameter in policy.parameters.values():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert math.isnan(apply_update(policy, sgd, 1.0, 0.5))
    assert all(torch.equal(value, after[name]) for name, value in policy.state().items())
    assert all(parameter.grad is None for parameter in policy.parameters.values())


def test_float16_compute_scales_the_loss_and_not_the_step(make_session: Callable[..., Session]) -> None:
    norms = []
    for scale in (1.0, 1024.0):
        policy = make_session().policy
        policy.loss_scale = scale
        for parameter in policy.parameters.values():
            parameter.grad = torch.full_like(parameter, 0.25 * scale)
        norms.append(apply_update(policy, make_optimizer(policy, "adamw"), 1e-3, 1.0))
    assert norms[0] == norms[1]


def test_float16_compute_learns_with_a_float32_adapter(
    make_session: Callable[..., Session], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of cards without bfloat16, on a CPU: the same gradients as float32 to float16's precision, and a run that learns."""
    tables: dict[str, Any] = {"train": {"steps": 20, "learning_rate": 1e-2, "eval_every": 20}, "rollout": {"max_new_tokens": 12}}
    full = make_session(**tables)
    rollout = training_rollout(full)
    expected = gradients(full, rollout)
    monkeypatch.setattr("iqlite.base.loading.here", lambda: (torch.device("cpu"), torch.float16))
    half = make_session(**tables)
    assert half.policy.base.compute_dtype == torch.float16 and half.policy.loss_scale == LOSS_SCALE_FLOAT16
    assert all(p.dtype == torch.float32 for p in half.policy.parameters.values())
    found = gradients(half, rollout)
    whole = torch.cat([g.flatten() for g in expected.values()])
    apart = torch.cat([(found[name] - g).flatten() for name, g in expected.items()])
    assert float(apart.norm()) < 0.03 * float(whole.norm())
    fixed = half.answers("reference", half.train.requests, half.sampler("fixed"))
    before = half.score(fixed).means()["kl/policy_superior"]
    assert run_of(half, tmp_path / "run")[0].why == "finished"
    assert half.score(fixed).means()["kl/policy_superior"] < 0.8 * before


def test_an_overflow_under_float16_halves_the_loss_scale_and_a_resume_keeps_it(
    make_session: Callable[..., Session], tmp_path: Path
) -> None:
    session = make_session(train={"steps": 1})
    session.policy.loss_scale = 8.0
    for parameter in session.policy.parameters.values():
        parameter.grad = torch.full_like(parameter, math.inf)
    assert not math.isfinite(apply_update(session.policy, make_optimizer(session.policy, "adamw"), 1e-3, 1.0))
    assert session.policy.loss_scale == 4.0
    _, run = run_of(session, tmp_path / "run")
    again = make_session(train={"steps": 1})
    train(again, run, Silent())
    assert again.policy.loss_scale == 4.0


def test_a_base_s_dropout_is_off_in_the_update(make_session: Callable[..., Session], tiny: Callable[..., Path]) -> None:
    """Some bases ship attention dropout: the policy that learns must be the one that answered, and a run must resume exactly."""
    session = make_session(model={"base": str(tiny("granite", attention_dropout=0.5))})
    rollout = training_rollout(session)
    first, second = gradients(session, rollout), gradients(session, rollout)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stop_leaves_the_best_adapter(make_session: Callable[..., Session], tmp_path: Path) -> None:
    session = make_session(train={"steps": 30, "learning_rate": 0.5, "max_kl_reference": 0.5, "eval_every": 1})
    outcome, run = run_of(session, tmp_path / "run")
    assert outcome.why in ("kl", "held-out") and outcome.step < 30
    adapter, best = (load_file(folder / "adapter_model.safetensors") for folder in (run.adapter, run.best))
    assert all(torch.equal(value, best[name]) for name, value in adapter.items())
    assert outcome.best_step < outcome.step
    assert run.step_of(run.adapter) == run.step_of(run.best) == outcome.best_step and run.steps_taken() == outcome.step


def test_a_description_without_effect_stops_with_the_reason(make_session: Callable[..., Session], tmp_path: Path) -> None:
    session = make_session(superior={"strength": 0.0}, train={"steps": 10})
    outcome, _ = run_of(session, tmp_path / "run")
    assert outcome.why == "gradient" and outcome.step == 3


def test_until_converged_ends_an_epochs_run(make_session: Callable[..., Session], tmp_path: Path) -> None:
    session = make_session(train={"steps": None, "epochs": 200.0, "until_converged": True, "eval_every": 1, "learning_rate": 1e-6})
    outcome, run = run_of(session, tmp_path / "run")
    assert outcome.total == 400 and outcome.why == "converged"
    assert outcome.step == outcome.best_step + 3
    assert len(run.metrics()) == outcome.step + 1


def test_repetition_is_the_share_of_repeated_trigrams() -> None:
    assert repetition([[1, 2, 3, 4, 5]]) == 0.0
    assert repetition([[7, 7, 7, 7, 7]]) == pytest.approx(2 / 3)
    assert repetition([[1, 2, 3, 1, 2, 3]]) == pytest.approx(1 / 4)
    assert repetition([[1], [2, 3]]) == 0.0
