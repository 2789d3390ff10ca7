"""Probe: what it says of a base that is moved and of one that isn't, pairs ranked as by hand, lint; curves by checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from iqlite.evaluation import beginning
from iqlite.evaluation.beginning import advice, unsaid
from iqlite.evaluation.curves import Point, of_run, until
from iqlite.evaluation.probing import ESTIMATE, RANKINGS, Contrast, Voice, agreement, contrast, ranks, suggested, verdict
from iqlite.model.sampling import Sampler
from iqlite.recipe.pairs import Pair
from iqlite.recipe.reading import to_data
from iqlite.recipe.schema import Recipe
from iqlite.recipe.wording import lint
from iqlite.run.rundir import RunDir
from iqlite.scoring.intervals import Estimate, wilson
from iqlite.training.session import Session
from tests.helpers.oracle import superior
from tests.helpers.tiny import shake

ALIKE = "You always answer in a cheerful and excited way.", "You always answer in a gloomy and bored way."


def test_lint_reads_form() -> None:
    assert lint(*ALIKE) == [] and lint(None, "x") == []
    longer = lint("You are kind.", "You are a cold and unpleasant person who never helps anybody at all.")
    assert any("words" in note for note in longer)
    assert any("sentences" in note for note in lint("You are kind. You help.", "You are cruel and never help."))
    assert any("begins with" in note for note in lint("You are kind today.", "Be cruel all day."))
    assert any("same words" in note for note in lint("You always help people.", "You never help people."))


def test_pairs_are_ranked_as_the_oracle_ranks_them(make_session: Callable[..., Session]) -> None:
    """log π̃ − log π_ref and log π_ref of each answer from whole-sequence logits in float64, equation 3 as loops."""
    settings = {"strength": 2.0, "clip": 4.0, "plausibility": 1e-3}
    session = make_session(superior=settings)
    pairs = [Pair(({"role": "user", "content": f"Question {n}?"},), "Yes it is " * (n + 1), "No, never. " * (4 - n)) for n in range(4)]
    found, cut = ranks(session, pairs, 64, lambda rows: None)
    assert cut == 0 and ranks(session, pairs, 8, lambda rows: None)[1] == sum(
        len(session.chat.tokenizer(text.strip(), add_special_tokens=False).input_ids) + 1 > 8
        for pair in pairs
        for text in (pair.chosen, pair.rejected)
    )

    def sums(request: Any, text: str) -> tuple[float, float, int]:
        answer = [*session.chat.tokenizer(text.strip(), add_special_tokens=False).input_ids, session.chat.turn_end]
        logits = {}
        with session.policy.acting_as("reference"):
            for reading in session.readings:
                prompt = session.chat.ids(request, reading.description)
                logits[reading.name] = session.policy.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        reward = logp = 0.0
        for t, token in enumerate(answer):
            rows = [logits[name][t].double().tolist() for name in ("reference", "wanted", "unwanted")]
            reference = logits["reference"][t].double().log_softmax(-1)
            reward += superior(rows[0], [(1.0, rows[1], rows[2])], **settings)[token] - float(reference[token])
            logp += float(reference[token])
        return reward, logp, len(answer)

    values = [(sums(p.request, p.chosen), sums(p.request, p.rejected)) for p in pairs]
    assert found["superior − base, sum"].value == sum(c[0] > r[0] for c, r in values) / 4
    assert found["superior − base, per token"].value == sum(c[0] / c[2] > r[0] / r[2] for c, r in values) / 4
    assert found["likelihood, sum"].value == sum(c[1] > r[1] for c, r in values) / 4
    assert found["likelihood, per token"].value == sum(c[1] / c[2] > r[1] / r[2] for c, r in values) / 4
    assert found["the shorter answer"].value == sum(c[2] < r[2] for c, r in values) / 4


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Path]:
    def make(**tables: dict[str, Any]) -> Path:
        (tmp_path / "recipe.toml").write_text(tomli_w.dumps(to_data(make_recipe(**tables))))
        return tmp_path / "recipe.toml"

    return make


def test_it_says_when_there_is_next_to_nothing_to_learn(
    iqlite: Callable[..., Any], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    path = recipe_file(superior={"strength": 0.0})
    code, out, err = iqlite("probe", path, "--prompts", "3", "--strength", "1", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert not found["likely"] and "unlikely to help" in found["why"] and found["contrast"]["kl_superior"] == pytest.approx(0, abs=1e-6)
    assert set(tmp_path.rglob("*")) - before == {path}  # nothing is written


def voice(name: str, score: float, low: float, nll: float) -> Voice:
    return Voice(name, score, 0.05, Estimate(score - 0.3, low, score), 1.0, nll, "")


def test_nothing_is_recommended_that_harms_or_may_be_chance() -> None:
    where = Contrast(0.5, 1.0, 0.4, (0.4,) * 4, 0.0, 0.0, 100)
    base, told = voice("base", 0.3, 0.0, 1.0), voice("prompted (user turn)", 0.4, -0.1, 1.5)
    weak, strong, mad = (voice(f"superior, strength {n}", s, low, nll) for n, s, low, nll in ((1, 0.5, 0.1, 2.0), (3, 0.7, 0.2, 2.4), (5, 0.9, 0.5, 2.6)))  # fmt: skip
    found = [base, told, weak, strong, mad]
    assert suggested(found) == "superior, strength 3" and verdict(where, found, "tone", 16)[0]
    assert "strength 3 moves" in verdict(where, found, "tone", 16)[1]  # the best, 5, says what the base finds strange
    assert suggested([base, told, mad]) is None and not verdict(where, [base, told, mad], "tone", 16)[0]
    worse = voice("superior, strength 1", 0.2, -0.4, 1.0)
    assert suggested([base, told, worse]) is None and not verdict(where, [base, told, worse], "tone", 16)[0]
    obeyed = voice("prompted (user turn)", 0.6, 0.1, 1.5)
    assert (
        "no superior does" in verdict(where, [base, obeyed, mad], "tone", 16)[1] and not verdict(where, [base, obeyed, mad], "tone", 16)[0]
    )
    assert not verdict(where, found, "tone", 3)[0] and "too few" in verdict(where, found, "tone", 3)[1]
    assert "next to nothing" in verdict(replace(where, kl_superior=0.001), found, "tone", 16)[1]


def test_what_pairs_say_is_said_beside_the_controls() -> None:
    def ranked(first: Estimate, control: float = 0.5) -> dict[str, Estimate]:
        return {name: first if name == ESTIMATE else Estimate(control, control - 0.1, control + 0.1) for name in RANKINGS}

    assert "better than every control" in agreement(ranked(Estimate(0.7, 0.6, 0.8)), 100)
    unsure = {name: Estimate(1.0, 0.7, 1.0) if name == ESTIMATE else Estimate(0.75, 0.4, 0.9) for name in RANKINGS}
    assert "can't be told from so few" in agreement(unsure, 10) and "can't be told from chance" in agreement(unsure, 4)
    assert "so does likelihood, sum (75%)" in agreement(ranked(Estimate(0.7, 0.6, 0.8), 0.75), 100)
    assert "so does likelihood, sum, read upside down, (75%)" in agreement(ranked(Estimate(0.7, 0.6, 0.8), 0.25), 100)
    assert "can't be told from chance" in agreement(ranked(Estimate(0.55, 0.45, 0.65)), 100)
    assert "worse than chance" in agreement(ranked(Estimate(0.3, 0.2, 0.4)), 100)
    assert "can't be told from chance" in agreement(ranked(wilson(0, 4)), 4)


def test_the_readings_differ_by_the_models_own_kl(make_session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    """KL(π⁺‖π_ref) and KL(π⁺‖π⁻) from whole-sequence logits in float64, as loops."""
    session = make_session()
    rollout = session.answers("reference", session.eval.requests, Sampler(0, 6))
    found, sums, count = contrast(session, rollout), {"reference": 0.0, "unwanted": 0.0}, 0
    for row, request in enumerate(rollout.requests):
        answer, logp = rollout.response_ids(row), {}
        with session.policy.acting_as("reference"):
            for reading in session.readings:
                prompt = session.chat.ids(request, reading.description)
                logits = session.policy.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
                logp[reading.name] = logits.double().log_softmax(-1)
        for name in sums:
            sums[name] += sum(
                float(p.exp() * (p - q)) for a, b in zip(logp["wanted"], logp[name], strict=True) for p, q in zip(a, b, strict=True)
            )
        count += len(answer)
    assert found.kl_wanted == pytest.approx(sums["reference"] / count, rel=1e-3)
    assert found.kl_opposed == pytest.approx(sums["unwanted"] / count, rel=1e-3)
    shares = dict.fromkeys((beginning.RARE, 1e-2), 0.0)
    for request in session.eval.requests:  # what the prompted base begins with, and the base doesn't
        with session.policy.acting_as("reference"):
            plain, told = (
                session.policy.model(input_ids=torch.tensor([session.chat.ids(request, text)])).logits[0, -1].double().softmax(-1).tolist()
                for text in (None, session.wanted)
            )
        for rare in shares:
            shares[rare] += sum(b for a, b in zip(plain, told, strict=True) if a < rare) / len(session.eval)
    for rare, share in shares.items():
        monkeypatch.setattr(beginning, "RARE", rare)
        assert contrast(session, rollout).unsaid == pytest.approx(share, rel=1e-3) and share > 0
    shake(session.policy)  # a policy that has learned: what it says counts, and not the base
    assert unsaid(session) != pytest.approx(share, rel=1e-3)
    assert contrast(make_session(superior={"estimator": "prompted"}), rollout).kl_opposed is None  # nobody reads the unwanted there


def test_a_beginning_that_the_base_never_makes_asks_for_forward_kl(make_recipe: Callable[..., Recipe]) -> None:
    told = advice(0.9, make_recipe())
    assert told and "90%" in told and '"forward-kl"' in told and '"prompted"' in told
    told = advice(0.9, make_recipe(objective={"name": "forward-kl"}))
    assert told and "forward-kl" not in told and '"prompted"' in told
    assert advice(0.9, make_recipe(objective={"name": "forward-kl"}, superior={"estimator": "prompted", "strength": 1.0})) is None
    assert advice(0.1, make_recipe()) is None and advice(None, make_recipe()) is None
    told = advice(0.9, make_recipe(superior={"plausibility": 0.0}))
    assert told and "forward-kl" in told and "superior" not in told
    two = tuple({"name": name, "wanted": f"Be {name}.", "unwanted": f"Never be {name}."} for name in ("kind", "short"))
    told = advice(0.9, make_recipe(superior={"estimator": "mixture"}, behavior={"wanted": None, "unwanted": None, "mixture": two}))
    assert told and "superior.plausibility = 0" in told and '"prompted"' not in told


def test_train_and_probe_say_so(
    iqlite: Callable[..., Any], recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a tiny vocabulary nothing is rare, but for this."""
    words = " ".join(iqlite("train", recipe_file(), "--out", "fine", "--no-safety")[1].split())
    assert "aim: " in words and "as good as never begins" not in words
    monkeypatch.setattr(beginning, "RARE", 1.1)
    words = " ".join(iqlite("train", recipe_file(), "--out", "warned", "--no-safety")[1].split())
    assert 'begins 100% of its answers with what the model as good as never begins with: set objective.name = "forward-kl" and' in words
    assert "forward-kl" in json.loads((tmp_path / "warned" / "aim.json").read_text("utf-8"))["beginning"]
    told = json.loads(iqlite("probe", recipe_file(), "--count", "2", "--json")[1])
    assert told["contrast"]["unsaid"] == pytest.approx(1.0) and "forward-kl" in told["beginning"]


def test_a_whole_probe(iqlite: Callable[..., Any], recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Hi?", "chosen": "Hello!", "rejected": "No."}) + "\n")
    code, out, err = iqlite("probe", recipe_file(), "--prompts", "4", "--strength", "1", "--strength", "3", "--pairs", "pairs.jsonl")
    assert code == 0, err
    assert "superior, strength 3" in out and "by quarters" in out and "likelihood, per token" in out and "suggested: " not in out
    assert "KL(π⁺‖π⁻)" in out and "too few to tell" in out and "can't be told from chance on these 1 pairs" in out
    code, out, err = iqlite("probe", recipe_file(), "--prompts", "2", "--strength", "1", "--set", "rollout.max_new_tokens=2", "--json")
    assert code == 0 and "NaN" not in out and None in json.loads(out)["contrast"]["kl_by_part"], err
    code, out, err = iqlite("probe", recipe_file(), "--strength", "nan")
    assert code == 2 and "strength nan can't be used" in err and "answered" not in out
    code, _, err = iqlite("probe", recipe_file(), "--pairs", "none.jsonl")
    assert code == 2 and "none.jsonl: no such file" in err and err.count("\n") == 1
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Hi?", "chosen": "Hello!"}\n')
    code, _, err = iqlite("probe", recipe_file(), "--pairs", "bad.jsonl")
    assert code == 2 and "line 1" in err and err.count("\n") == 1


def test_curves_are_what_training_left(iqlite: Callable[..., Any], recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    code, _, err = iqlite("train", recipe_file(), "--out", "run")
    assert code == 0, err
    run = RunDir.open(tmp_path / "run")
    points = of_run(run, len)
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [p.step for p in points] == [0, 2, 3]
    for point in points:
        mine = [len(row["answer"]) for row in samples if row["step"] == point.step]
        lines = [line for line in run.metrics() if 0 < line["step"] <= point.step]
        assert point.score == pytest.approx(sum(mine) / len(mine))
        assert point.tokens == sum(line["response/tokens"] for line in lines)
        assert point.seconds == pytest.approx(sum(line["time/step_s"] for line in lines))
        assert point.epoch == pytest.approx(point.step * 4 / 8)
    code, out, err = iqlite("compare", run.path, "--checkpoints")
    assert code == 0 and "minutes" in out, err
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Hi?", "chosen": "Hello!", "rejected": "No."}) + "\n")
    assert iqlite("compare", run.path, "--with", "ppo,dpo", "--pairs", "pairs.jsonl", "--seeds", "1", "--no-safety")[0] == 0
    code, out, _ = iqlite("compare", run.path, "--checkpoints", "--json", "--judge", "shorter")
    for name, epochs in (("ppo", 3 * 4 / 8), ("dpo (pairs.jsonl)", 3 * 2 / 1)):  # DPO: two pairs a step, of the one there is
        curve = json.loads(out)["curves"][f"run: {name}"]
        assert [p["step"] for p in curve] == [0, 2, 3] and curve[-1]["epoch"] == pytest.approx(epochs)


def test_ninety_percent_of_the_gain_has_to_be_kept() -> None:
    def curve(*scores: float) -> list[Point]:
        return [Point(n, n, n, n, score, 0.0, 1.0) for n, score in enumerate(scores)]

    assert until(curve(0.0, 0.95, 0.5, 0.92, 1.0)).step == 3  # type: ignore[union-attr]
    assert until(curve(0.0, 1.0)).step == 1  # type: ignore[union-attr]
    assert until(curve(1.0, 0.5)) is None
