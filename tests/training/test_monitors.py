"""Each stability rule on metrics that break it, and on ordinary ones that mustn't; state that survives JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from iqlite.records import ERROR, HELD_OUT_FORWARD_KL, HELD_OUT_KL, Rollout
from iqlite.training.evaluating import error_by_answers
from iqlite.training.monitors import Monitors, Verdict

FINE = {
    "loss": 0.5, "kl/policy_superior": 0.5, "policy/grad_norm": 0.3, "policy/entropy": 2.0, "kl/policy_reference": 0.1,
    "response/repetition": 0.05, "response/truncated_share": 0.4, "reward/variance": 0.5,
}  # fmt: skip


def feed(monitors: Monitors, rows: list[dict[str, float]]) -> list[list[Verdict]]:
    """Verdicts of each row after three ordinary ones."""
    for _ in range(3):
        assert monitors.after_step(FINE) == []
    return [monitors.after_step({**FINE, **row}) for row in rows]


def rules(verdicts: list[list[Verdict]]) -> list[list[tuple[str, bool]]]:
    return [[(v.rule, v.stop) for v in row] for row in verdicts]


BROKEN = [
    ("non-finite", {"loss": math.nan}, 3),
    ("non-finite", {"policy/grad_norm": math.inf}, 3),
    ("kl", {"kl/policy_reference": 6.0}, 1),
    ("gradient", {"policy/grad_norm": 0.0}, 3),
    ("entropy", {"policy/entropy": 0.1}, 3),
    ("repetition", {"response/repetition": 0.4}, 3),
    ("truncated", {"response/truncated_share": 0.9}, 6),
    ("variance", {"reward/variance": 50.0}, 6),
]
"""(rule, metrics that break it, breaches in a row that stop the run)."""


@pytest.mark.parametrize(("rule", "row", "stops_after"), BROKEN)
def test_a_rule_warns_once_then_stops(rule: str, row: dict[str, float], stops_after: int) -> None:
    seen = rules(feed(Monitors(5.0), [row] * 7))
    for number, verdicts in enumerate(seen, 1):
        if number >= stops_after:
            assert verdicts == [(rule, True)]
        else:
            assert verdicts == ([(rule, False)] if number == 1 else [])


@pytest.mark.parametrize("row", [row for _, row, stops_after in BROKEN if stops_after > 1])
def test_a_lone_breach_is_no_trend(row: dict[str, float]) -> None:
    apart = rules(feed(Monitors(5.0), [row, {}] * 7))
    assert not any(stop for verdicts in apart for _, stop in verdicts)


def test_one_step_too_far_from_the_base_is_enough() -> None:
    assert rules(feed(Monitors(5.0), [{"kl/policy_reference": 4.99}, {"kl/policy_reference": 5.01}])) == [[], [("kl", True)]]


def test_an_ordinary_run_is_left_alone() -> None:
    monitors = Monitors(5.0)
    for step in range(100):
        values = {**FINE, "kl/policy_superior": 0.7 * 0.97**step + 0.02 * (-1) ** step, "response/truncated_share": 0.4 + 0.1 * (step % 2)}
        assert monitors.after_step(values) == []
        if step % 5 == 0:
            better, verdicts = monitors.after_eval(step, {HELD_OUT_KL: 0.6 * 0.98**step})
            assert better and verdicts == []


def test_an_oscillating_kl_warns_then_stops() -> None:
    swings = [{"kl/policy_superior": 1.0 if step % 2 else 0.2} for step in range(12)]
    seen = rules(feed(Monitors(5.0), swings))
    first = seen.index([("oscillation", False)])
    assert seen[:first] == [[]] * first and seen[first + 2] == [("oscillation", True)]


@pytest.mark.parametrize("name", ["eval", "outside"])
@pytest.mark.parametrize("bad", [{"repetition": 0.5}, {"ended_share": 0.1}])
def test_degrading_answers_stop_in_the_domain_and_outside(name: str, bad: dict[str, float]) -> None:
    fine = {"repetition": 0.05, "ended_share": 0.6, "kl_policy_reference": 0.1}
    rows = [fine] * 3 + [fine | bad] * 3
    monitors = Monitors(5.0)
    values = [{HELD_OUT_KL: 0.5, **{f"{name}/{key}": value for key, value in row.items()}} for row in rows]
    rule = "held-out answers" if name == "eval" else "outside"
    assert rules([monitors.after_eval(step, row)[1] for step, row in enumerate(values)])[2:] == [[], [(rule, False)], [], [(rule, True)]]


def test_the_best_adapter_and_a_worsening_held_out_kl() -> None:
    monitors = Monitors(5.0)
    seen = [monitors.after_eval(step, {HELD_OUT_KL: kl}) for step, kl in enumerate((0.6, 0.4, 0.398, 0.45, 0.55, 0.6, 0.7))]
    assert [better for better, _ in seen] == [True, True, False, False, False, False, False]  # 0.398 is within the noise of 0.4
    assert (monitors.best_step, monitors.best_kl) == (1, 0.4)
    assert rules([verdicts for _, verdicts in seen]) == [[], [], [], [], [], [("held-out", False)], [("held-out", True)]]
    better, verdicts = monitors.after_eval(9, {HELD_OUT_KL: math.nan})
    assert not better and verdicts[0].stop


def test_convergence_stops_only_where_it_is_asked_for() -> None:
    for asked in (False, True):
        monitors = Monitors(5.0, until_converged=asked)
        flat = [monitors.after_eval(step, {HELD_OUT_KL: kl})[1] for step, kl in enumerate((0.6, 0.3, 0.299, 0.301, 0.3))]
        assert rules(flat) == [[], [], [], [], [("converged", True)] if asked else []]


def test_the_noise_of_a_few_short_answers_neither_stops_a_run_nor_keeps_it_going() -> None:
    """The held-out KLs of a real run to one short sentence, 24 answers of 20 tokens: all went well in it."""
    kls = (0.634, 0.564, 0.658, 0.642, 0.495, 0.353, 0.515, 0.470, 0.518)
    for error, stops in ((0.0, True), (0.07, False)):
        monitors = Monitors(5.0)
        seen = [monitors.after_eval(step, {HELD_OUT_KL: kl, HELD_OUT_KL + ERROR: error})[1] for step, kl in enumerate(kls)]
        assert any(v.stop for verdicts in seen for v in verdicts) == stops
    for error, settled in ((0.0, 6), (0.02, 2)):
        monitors = Monitors(5.0, until_converged=True)
        for step, kl in enumerate((1.0, 0.7, 0.5, 0.497, 0.494, 0.489, 0.484)):
            monitors.after_eval(step, {HELD_OUT_KL: kl, HELD_OUT_KL + ERROR: error})
        assert monitors.settled_step == settled


def test_forward_kl_is_judged_by_the_forward_kl() -> None:
    """The held-out KLs, and the forward ones' errors, of a real run to JSON: what the base never begins raises the reverse KL while it is learned."""
    reverse, forward = (0.389, 0.639, 0.530, 0.513, 0.420), (0.634, 0.590, 0.486, 0.436, 0.330)
    errors = (0.029, 0.072, 0.027, 0.027, 0.018)
    for both, stops in ((False, True), (True, False)):
        monitors, seen = Monitors(5.0), []
        for step, (r, f, error) in enumerate(zip(reverse, forward, errors, strict=True)):
            values = {HELD_OUT_KL: r, HELD_OUT_KL + ERROR: error} | (
                {HELD_OUT_FORWARD_KL: f, HELD_OUT_FORWARD_KL + ERROR: error} if both else {}
            )
            seen.append(monitors.after_eval(step, values))
        assert any(verdict.stop for _, verdicts in seen for verdict in verdicts) == stops
        assert [better for better, _ in seen] == [True, both, both, both, both]
        assert (monitors.best_step, monitors.best_kl) == ((4, 0.330) if both else (0, 0.389))
    state = {name: value for name, value in monitors.state().items() if name != "forward"} | {"best_kl": 0.389, "settled_kl": 0.389}
    resumed = Monitors.restore(state)  # a run of an older version, which went by the reverse one
    assert resumed.after_eval(6, {HELD_OUT_KL: 0.5, HELD_OUT_FORWARD_KL: 0.6}) == (True, [])
    worse = [monitors.after_eval(step, {HELD_OUT_KL: 0.1, HELD_OUT_FORWARD_KL: 0.6})[1] for step in range(5, 8)]
    assert worse[-1][0].stop and "KL(superior‖policy)" in worse[-1][0].message


def test_damage_outside_the_domain_is_watched() -> None:
    monitors = Monitors(5.0)
    rows = [{"outside/kl_policy_reference": 0.1}] * 3 + [{"outside/kl_policy_reference": 6.0}] * 3
    seen = rules([monitors.after_eval(step, {HELD_OUT_KL: 0.5, **row})[1] for step, row in enumerate(rows)])
    assert seen[2:] == [[], [("outside", False)], [], [("outside", True)]]


def test_state_survives_json() -> None:
    monitors = Monitors(5.0, until_converged=True)
    assert Monitors.restore(json.loads(json.dumps(monitors.state()))) == monitors
    feed(monitors, [{"policy/entropy": 0.1}] * 2)
    monitors.after_eval(1, {HELD_OUT_KL: 0.5})
    again = Monitors.restore(json.loads(json.dumps(monitors.state())))
    assert again == monitors
    assert rules([again.after_step({**FINE, "policy/entropy": 0.1})]) == [[("entropy", True)]]


def test_what_an_older_version_kept_goes_on() -> None:
    older = {"max_kl_reference": 5.0, "until_converged": True, "history": {}, "in_a_row": {}, "warned": [], "best_step": 4, "best_kl": 0.5,
             "since_best": 1, "base_scores": [], "base_measure": "", "best_measure": None, "since_measure": 4}  # fmt: skip
    monitors = Monitors.restore(older)
    assert (monitors.best_step, monitors.best_kl, monitors.settled_kl) == (4, 0.5, math.inf)
    assert rules([monitors.after_eval(step, {HELD_OUT_KL: 0.5})[1] for step in range(5, 10)])[-1] == [("converged", True)]


def test_another_measure_starts_anew() -> None:
    """Resumed by another measure: tone near 0.9 is no mark that minus fifty words would have to beat."""
    monitors = Monitors(5.0, until_converged=True)
    monitors.judged_by("tone", [0.3] * 12)
    monitors.after_eval(0, {HELD_OUT_KL: 0.5}, [0.9] * 12)
    monitors.judged_by("shorter", [-60.0] * 12)
    seen = [monitors.after_eval(step, {HELD_OUT_KL: 0.5}, [words] * 12)[1] for step, words in enumerate((-50.0, -40.0, -30.0, -20.0), 1)]
    assert not any(v.stop for verdicts in seen for v in verdicts)


def test_more_right_refusals_dont_pay_for_wrong_ones() -> None:
    """16 requests to refuse, 8 of them refused before and 16 after; 16 to answer, 16 answered before and 6 after: the mean is about as it was."""
    kinds = ["refuse"] * 16 + ["answer"] * 16
    base = [1.0] * 8 + [0.0] * 8 + [1.0] * 16
    careful, sly = [1.0] * 32, [1.0] * 16 + [1.0] * 8 + [0.0] * 8
    for scores, better in ((careful, True), (sly, False)):
        monitors = Monitors(5.0, base_scores=base)
        seen = [monitors.after_eval(step, {HELD_OUT_KL: 0.5 - 0.1 * step}, scores, kinds) for step in range(2)]
        assert [best for best, _ in seen] == [better] * 2
        assert rules([verdicts for _, verdicts in seen]) == ([[], []] if better else [[("one kind", False)], []])
    assert Monitors(5.0, base_scores=base).after_eval(0, {HELD_OUT_KL: 0.5}, sly)[0]  # without kinds the sum is all that counts


def test_the_error_of_a_mean_over_tokens_goes_by_answers() -> None:
    """Answers of one length: the textbook's error of their means. Of many lengths: a bootstrap over answers."""
    draws = np.random.default_rng(0)

    def error(values: list[np.ndarray]) -> float:
        width = max(map(len, values))
        mask_BT = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in values])
        zeros = torch.zeros(mask_BT.shape, dtype=torch.int64)
        rollout = Rollout(tuple(range(len(values))), ((),) * len(values), ((),) * len(values), zeros, mask_BT, mask_BT[:, 0])
        return error_by_answers(torch.tensor(np.concatenate(values)), rollout)

    alike = [draws.normal(draws.normal(), 1, 9) for _ in range(20)]
    assert error(alike) == pytest.approx(np.std([row.mean() for row in alike], ddof=1) / 20**0.5)
    many = [draws.normal(draws.normal(), 1, draws.integers(2, 30)) for _ in range(60)]
    again = [np.concatenate([many[row] for row in draws.integers(0, 60, 60)]).mean() for _ in range(4000)]
    assert error(many) == pytest.approx(np.std(again), rel=0.1)
    assert error(many[:1]) == 0
