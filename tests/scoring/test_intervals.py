"""Statistics against scipy and statsmodels on known cases, and a model compared with itself."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from iqlite.scoring.intervals import ELO, elo, length_controlled, outcomes, paired, wilson


@pytest.mark.parametrize(("wins", "trials"), [(0, 5), (5, 5), (7, 12), (61, 100), (300, 1000), (1, 2)])
def test_wilson_is_statsmodels_wilson(wins: int, trials: int) -> None:
    low, high = proportion_confint(wins, trials, method="wilson")
    found = wilson(wins, trials)
    assert (found.value, found.low, found.high) == pytest.approx((wins / trials, low, high), abs=1e-12)


def test_the_paired_bootstrap_is_scipy_s() -> None:
    differences = np.random.default_rng(1).normal(0.3, 1.0, (40, 3))
    found = paired(differences)
    theirs = stats.bootstrap((differences.mean(1),), np.mean, method="percentile", n_resamples=20000, rng=2).confidence_interval
    wider = stats.bootstrap((differences.mean(1),), np.mean, method="percentile", n_resamples=20000, rng=2, confidence_level=0.99).confidence_interval  # fmt: skip
    of_five = paired(differences, comparisons=5)
    assert (of_five.low, of_five.high) == pytest.approx((wider.low, wider.high), abs=0.1 * (wider.high - wider.low))
    assert found.value == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_elo_is_a_logistic_regression_on_who_met_whom() -> None:
    """Bradley–Terry is a logit on (+1 for one, −1 for the other): statsmodels fits it from single games, virtual draws included."""
    rng = np.random.default_rng(3)
    true = np.array([0.0, 0.6, -0.4, 1.3])
    prompts = 60
    scores = true[:, None, None] + rng.gumbel(size=(4, prompts, 1))  # differences of Gumbel noise are logistic
    games = outcomes(scores)
    rows, won, weight = [], [], []
    for i in range(4):
        for j in range(i + 1, 4):
            row = np.zeros(4)
            row[i], row[j] = 1, -1
            for result, count in ((1, games[:, i, j].sum() + 0.5), (0, games[:, j, i].sum() + 0.5)):
                rows.append(row)
                won.append(result)
                weight.append(count)
    fit = sm.GLM(won, np.array(rows)[:, 1:], family=sm.families.Binomial(), freq_weights=weight).fit()
    table = elo(games)
    found = [above[0] for above in table]
    for i in range(4):  # the other way round
        for j in range(4):
            one, other = table[i][j], table[j][i]
            assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low), abs=1e-6)
    assert found[0].value == 0 and found[0].low == 0
    assert [e.value for e in found[1:]] == pytest.approx(ELO * fit.params, abs=0.01)
    for one, strength in zip(found, true - true[0], strict=True):
        assert one.low - 1e-9 <= ELO * strength <= one.high + 1e-9


def test_elo_of_two_is_the_closed_form_and_a_sweep_is_finite() -> None:
    games = outcomes(np.stack([np.zeros((10, 1)), np.ones((10, 1))]))
    found, other = elo(games)[1][0], elo(games)[0][1]
    assert found.value == pytest.approx(400 * np.log10(10.5 / 0.5), abs=1e-3)
    least = proportion_confint(10, 10, method="wilson")[0]
    assert found.low == pytest.approx(400 * np.log10(least / (1 - least))) and found.high == np.inf and found.bounded()["high"] is None
    assert (other.value, other.low, other.high) == pytest.approx((-found.value, -np.inf, -found.low))


def test_a_sweep_stays_unbounded_beside_others_and_whom_nobody_met() -> None:
    rng = np.random.default_rng(5)
    games = outcomes(np.concatenate([rng.normal(size=(2, 20, 1)), np.full((1, 20, 1), 9.0)]))
    games[:, :2, :2] = 0  # only the last met the others, as where a judge looks at pairs
    found = elo(games)
    assert all(found[2][k].high == np.inf and found[k][2].low == -np.inf and found[2][k].low < found[2][k].value for k in (0, 1))
    assert np.isfinite([found[0][1].low, found[0][1].high]).all()


def test_length_control_is_a_logit_on_the_difference_in_length() -> None:
    rng = np.random.default_rng(0)
    mine, other = rng.uniform(10, 60, 400), rng.uniform(10, 40, 400)
    x = np.tanh((mine - other) / (mine - other).std())
    won = (rng.random(400) < 1 / (1 + np.exp(-(0.2 + 1.5 * x)))).astype(float)
    fit = sm.Logit(won, sm.add_constant(x)).fit(disp=0)
    found = length_controlled(won, mine, other)
    low, high = fit.conf_int()[0]
    expected = [1 / (1 + np.exp(-value)) for value in (fit.params[0], low, high)]
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=0.005)  # the prior on the length's weight is weak
    assert found.value < won.mean()  # the winner's length is taken off


def test_who_is_compared_with_itself_neither_wins_nor_loses() -> None:
    """Two independent sets of answers of one model: intervals hold 50 % and 0 as often as they promise."""
    held = np.zeros(4)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        prompt = rng.normal(size=(1, 40, 1))
        scores = prompt + rng.normal(size=(2, 40, 2))
        games = outcomes(scores)
        rate = wilson(games[:, 1, 0].sum() * 2, 80)
        held += [
            not rate.excludes(0.5),
            not elo(games, seeds=2)[1][0].excludes(0.0),
            not paired(scores[1] - scores[0]).excludes(0.0),
            not paired(games[:, 1, 0:1] - 0.5).excludes(0.0),
        ]
    assert (held / 400 > 0.9).all(), held / 400
    same = np.random.default_rng(0).normal(size=(1, 30, 2)).repeat(2, 0)
    found = elo(outcomes(same))[1][0]
    assert found.value == pytest.approx(0, abs=1e-6) and wilson(outcomes(same)[:, 1, 0].sum(), 30).value == 0.5
