"""Comparisons: the superior's answers in a batch, answers kept and not asked again, others' runs, categories, baselines under one recipe."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iqlite.baselines.ppo import Value, gae, rewards
from iqlite.baselines.store import baseline
from iqlite.baselines.trl_trainers import _given
from iqlite.chat.speaker import Speaker
from iqlite.chat.superior import superior_answers
from iqlite.evaluation.answers import Answerer, base_nll, collect
from iqlite.model.sampling import Sampler
from iqlite.recipe.pairs import load_pairs
from iqlite.records import StepMetrics
from iqlite.run.rundir import RunDir
from iqlite.training.opening import open_session
from iqlite.training.session import Session

SHARP = {"strength": 2.0, "clip": 4.0, "plausibility": 1e-3}


def test_a_batch_of_superior_answers_is_what_chat_says_one_by_one(make_run: Callable[..., RunDir]) -> None:
    run = make_run(superior=SHARP)
    speaker = Speaker.of_recipe(run.recipe(), run.adapter, "system", lambda text: None)
    session = speaker.session
    assert session is not None
    requests = [({"role": "user", "content": text},) for text in ("Hi.", "What is the capital of the moon?", "A word.")]
    for temperature in (0.0, 1.0):
        sampler = Sampler(4, 8, temperature, 0.9, "chat")
        rollout = superior_answers(session, requests, sampler)
        one = list(speaker.speak("superior", requests[0], sampler))
        ids = rollout.response_ids(0)
        assert one == (ids[:-1] if ids[-1] in session.chat.stop_ids else ids)
        if temperature == 0.0:
            for row, request in enumerate(requests):
                ids = rollout.response_ids(row)
                assert list(speaker.speak("superior", request, sampler)) == (ids[:-1] if ids[-1] in session.chat.stop_ids else ids)


def test_strangeness_is_the_models_own_cross_entropy(make_session: Callable[..., Session]) -> None:
    session = make_session()
    rollout = session.answers("reference", session.eval.requests, Sampler(0, 6))
    found = base_nll(session, rollout)
    with session.policy.acting_as("reference"):
        for row, prompt in enumerate(rollout.prompt_ids):
            answer = rollout.response_ids(row)
            ids = torch.tensor([[*prompt, *answer]])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            assert found[row] == pytest.approx(float(session.policy.model(input_ids=ids, labels=labels).loss), abs=1e-4)


def test_what_was_answered_is_not_asked_again_and_a_cut_line_is(make_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    session = open_session(run.recipe(), start=run.adapter, placement="system")
    who, samplers = Answerer("trained", "policy", of="its digest"), [Sampler(seed, 6, 1.0, 1.0, "compare") for seed in (0, 1)]
    asked: list[int] = []
    answers = Session.answers

    def counted(self: Session, *arguments: Any, **named: Any) -> Any:
        asked.append(1)
        return answers(self, *arguments, **named)

    monkeypatch.setattr(Session, "answers", counted)
    first = collect(session, run.path, who, session.eval.requests, samplers, lambda rows: None)
    assert len(asked) == 2 and len(first) == 2 and len(first[0]) == len(session.eval)
    assert collect(session, run.path, who, session.eval.requests, samplers, lambda rows: None) == first and len(asked) == 2
    (file,) = (run.path / "answers").iterdir()
    lines = file.read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:20], "utf-8")
    again = collect(session, run.path, who, session.eval.requests, samplers, lambda rows: None)
    assert len(asked) == 3 and [[a.answer for a in seed] for seed in again] == [[a.answer for a in seed] for seed in first]
    assert again[0] == first[0] and again[1][:-1] == first[1][:-1]  # the one that was cut, and no other
    file.unlink()
    monkeypatch.setattr("iqlite.evaluation.answers.TOGETHER", 3)  # kept part by part, from the same noise
    parts = collect(session, run.path, who, session.eval.requests, samplers, lambda rows: None)
    assert len(asked) == 3 + 2 * math.ceil(len(session.eval) / 3)
    assert [[a.answer for a in seed] for seed in parts] == [[a.answer for a in seed] for seed in first]
    asked.clear()
    monkeypatch.undo()
    monkeypatch.setattr(Session, "answers", counted)
    hotter = [Sampler(0, 6, 2.0, 1.0, "compare")]
    assert collect(session, run.path, who, session.eval.requests, hotter, lambda rows: None) != first[:1] and len(asked) == 1


def test_two_runs_the_superior_and_categories(iqlite: Callable[..., Any], make_run: Callable[..., RunDir], tmp_path: Path) -> None:
    first, second = make_run("one", superior=SHARP), make_run("two", train={"seed": 5})
    rows = [{"prompt": f"Question {n}?", "category": "even" if n % 2 == 0 else "odd"} for n in range(6)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--with", "superior", "--prompts", "asked.jsonl", "--seeds", "2", "--judge", "shorter"]
    code, out, err = iqlite("compare", first.path, second.path, *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    names = [m["name"] for m in found["measures"]]
    assert names == ["base", "prompted (system turn)", "prompted (user turn)", "superior", "two", "trained"]
    assert [c["category"] for c in found["categories"]] == ["even", "odd"] and found["categories"][0]["prompts"] == 3
    assert found["elo"]["base"]["value"] == 0 and {c["against"] for c in found["contests"]} == set(names) - {"trained"}
    for contest in found["contests"]:
        assert 0 <= contest["win_rate"]["low"] <= contest["win_rate"]["value"] <= contest["win_rate"]["high"] <= 1
        assert contest["win_rate"]["value"] == pytest.approx(contest["win_rate_by_prompt"]["value"])
        ahead, rated = contest["elo"], found["elo"]
        assert ahead["value"] == pytest.approx(rated["trained"]["value"] - rated[contest["against"]]["value"], abs=1e-3)
        assert ahead["low"] <= ahead["value"] <= ahead["high"]
    code, shown, _ = iqlite("compare", first.path, second.path, *options)
    assert code == 0 and "trained wins by shorter" in shown and "shorter by category" in shown
    assert shown.strip().splitlines()[-1].startswith("shorter base=")
    code, _, err = iqlite("compare", first.path, "--with", "magic")
    assert code == 2 and "'magic' isn't one of" in err and err.count("\n") == 1
    code, _, err = iqlite("compare", first.path, "--judge", "taste")
    assert code == 2 and "'taste' isn't one of" in err
    other = make_run("other", model={"base": str(first.recipe().model.base)}, adapter={"rank": 2})
    assert iqlite("compare", first.path, other.path, "--seeds", "1", "--count", "2")[0] == 0
    assert {path.name for path in first.path.glob("compare*")} == {
        "compare.json",
        "compare.asked.jsonl.json",
    }  # neither in the other's place
    coarse = make_run("coarse", model={"quantization": "nf4"})
    code, _, err = iqlite("compare", first.path, coarse.path)
    assert code == 2 and "in nf4 and" in err and err.count("\n") == 1


def test_a_run_may_be_called_as_somebody_else_is(iqlite: Callable[..., Any], make_run: Callable[..., RunDir]) -> None:
    run, others = make_run("mine"), [make_run(name, train={"seed": 1}) for name in ("base", "trained", "ppo")]
    code, out, err = iqlite("compare", run.path, *(other.path for other in others), "--seeds", "1", "--no-safety", "--json")
    assert code == 0, err
    names = [m["name"] for m in json.loads(out)["measures"]]
    assert names == ["base", "prompted (system turn)", "prompted (user turn)", "base (run 2)", "trained (run 2)", "ppo (run 2)", "trained"]
    other = make_run("told by \x1b]0;me", train={"seed": 1})
    code, out, err = iqlite("compare", run.path, other.path, "--seeds", "1", "--no-safety")
    assert code == 0 and " told by ]0;me=" in out.strip().splitlines()[-1] and "\x1b" not in out, err


def test_the_recipe_s_outside_prompts_are_asked_by_name(
    iqlite: Callable[..., Any], make_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    run = make_run("inside")
    code, _, err = iqlite("compare", run.path, "--prompts", "outside")
    assert code == 2 and "has no prompts.outside" in err and err.count("\n") == 1
    (tmp_path / "far.jsonl").write_text("".join(json.dumps({"prompt": f"Far away {n}?"}) + "\n" for n in range(3)))
    run = make_run("both", prompts={"outside": "far.jsonl"})
    code, out, err = iqlite("compare", run.path, "--prompts", "outside", "--seeds", "1", "--no-safety", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["prompts"] == 3 and found["asked"] == "outside" and json.loads((run.path / "compare.outside.json").read_text()) == found


def test_few_prompts_claim_little_and_skipped_rows_are_said(
    iqlite: Callable[..., Any], make_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    run = make_run()
    (tmp_path / "few.jsonl").write_text('{"prompt": "A?"}\n{"prompt":\n\n{"prompt": "B?"}\n{"prompt": "B?"}\n')
    options = ["--prompts", "few.jsonl", "--seeds", "1", "--no-safety"]
    code, out, err = iqlite("compare", run.path, *options)
    assert code == 0, err
    assert "1 malformed row skipped (line 2)" in out and "1 duplicate row skipped (line 5)" in out
    assert "answers: 2 prompts × 1 seed," in out and "2 prompts are too few to call anything significant" in out and "±" in out
    code, out, err = iqlite("compare", run.path, *options, "--count", "1")
    assert code == 0 and "answers: 1 prompt × 1 seed," in out and "±" not in out and "wins by" not in out
    code, out, err = iqlite("compare", run.path, *options, "--count", "1", "--json")
    assert code == 0 and "1 malformed row skipped (line 2)" in err
    assert all(measure["score_se"] is None and measure["tone_se"] is None for measure in json.loads(out)["measures"])
    code, _, err = iqlite("compare", run.path, "--checkpoints", "--with", "sft")
    assert code == 2 and "none of --with" in err and err.count("\n") == 1
    for option in ("--pairs", "--safety-set", "--prompts"):
        code, _, err = iqlite("compare", run.path, option, "nothing.jsonl")
        assert code == 2 and f"{option} nothing.jsonl: no such file" in err and err.count("\n") == 1


def interrupt(_: str) -> None:
    raise KeyboardInterrupt


def test_a_baseline_takes_the_steps_that_the_run_took(make_run: Callable[..., RunDir]) -> None:
    run = make_run(train={"steps": 5})
    for step in (1, 2):  # it stopped early
        run.add_metrics(StepMetrics(step, {"loss": 0.0}))
    folder = baseline(run, "ppo", lambda text: None)
    assert json.loads((folder / "baseline.json").read_text())["steps"] == 2
    run.add_metrics(StepMetrics(3, {"loss": 0.0}))
    others = [run.path / "baselines" / f".unfinished-{name}" for name in ("sft.2", "sft-12345678.2", "sft.3")]
    for other in others:
        other.mkdir()
    with pytest.raises(KeyboardInterrupt):
        baseline(run, "sft", interrupt)
    assert [other.exists() for other in others] == [False, True, True]  # of other steps; of other pairs; the one that goes on
    said: list[str] = []
    assert baseline(run, "ppo", said.append) == folder and "trained for 2 steps, and this run has taken 3" in said[0]


def test_what_no_baseline_can_do_is_said_before_any_trains(iqlite: Callable[..., Any], make_run: Callable[..., RunDir]) -> None:
    first = make_run("first")
    run = make_run("second", adapter={"start": str(first.adapter)})
    code, _, err = iqlite("compare", run.path, "--with", "ppo,sft")
    assert code == 2 and "adapter.start" in err and err.count("\n") == 1 and not (run.path / "baselines").exists()


def test_a_model_compared_with_itself_draws(iqlite: Callable[..., Any], make_run: Callable[..., RunDir], tmp_path: Path) -> None:
    run = make_run()
    run.path.rename(tmp_path / "same")
    import shutil

    shutil.copytree(tmp_path / "same", tmp_path / "twin")
    code, out, err = iqlite("compare", "same", "twin", "--json", "--seeds", "2")
    assert code == 0, err
    contest = next(c for c in json.loads(out)["contests"] if c["against"] == "twin")
    assert contest["win_rate"]["value"] == 0.5 and not contest["significant"]
    assert json.loads(out)["elo"]["twin"]["value"] == pytest.approx(json.loads(out)["elo"]["trained"]["value"], abs=1e-3)


@pytest.mark.parametrize("method", ["sft", "dpo", "sdft", "ppo"])
def test_a_baseline_trains_under_the_run_s_recipe_and_is_kept(
    iqlite: Callable[..., Any], make_run: Callable[..., RunDir], method: str
) -> None:
    run = make_run(superior=SHARP)
    code, out, err = iqlite("compare", run.path, "--with", method, "--json", "--seeds", "1")
    assert code == 0, err
    assert method in [m["name"] for m in json.loads(out)["measures"]]
    folder = run.path / "baselines" / method
    record = json.loads((folder / "baseline.json").read_text())
    assert record["steps"] == 3 and record["sampled_tokens"] > 0 and record["seconds"] > 0
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8.0
    from safetensors.torch import load_file

    assert any(".lora_B." in n and float(t.abs().max()) > 0 for n, t in load_file(folder / "adapter_model.safetensors").items())
    before = (folder / "baseline.json").stat().st_mtime_ns
    assert iqlite("compare", run.path, "--with", method, "--json", "--seeds", "1")[0] == 0
    assert (folder / "baseline.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("method", "quantization"), [("sft", "nf4"), ("dpo", "none"), ("sdft", "nf4"), ("ppo", "none")])
def test_an_interrupted_baseline_goes_on_to_the_same_end(
    make_run: Callable[..., RunDir], method: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, superior = {"steps": 5, "checkpoint_every": 2, "eval_every": 1}, {**SHARP, "weights": "ema"}
    whole, cut = (make_run(n, model={"quantization": quantization}, superior=superior, train=train) for n in ("whole", "cut"))
    expected = baseline(whole, method, lambda text: None)
    for at in ("step 2 of", "step 1/", "step 3/", "step 5/"):  # while sampling, before the first checkpoint, between two, at the end

        def say(text: str, at: str = at) -> None:
            if at in text:
                raise KeyboardInterrupt

        if method in ("sft", "dpo") or "/" in at:
            with pytest.raises(KeyboardInterrupt):
                baseline(cut, method, say)
    said: list[str] = []
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == method:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        baseline(cut, method, said.append)
    assert said and not any("step 2" in text for text in said)
    assert not (cut.path / "baselines" / method).exists()
    said.clear()
    found = baseline(cut, method, said.append)
    assert not said  # all was there but the name
    assert (found / "adapter_model.safetensors").read_bytes() == (expected / "adapter_model.safetensors").read_bytes()
    assert (found / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    for name in ("step", "tokens"):
        assert [line[name] for line in RunDir(found).metrics()] == [line[name] for line in RunDir(expected).metrics()]
    seconds = [line["seconds"] for line in RunDir(found).metrics()]
    assert seconds == sorted(seconds)
    assert {path.name for path in found.parent.iterdir()} == {method}


def test_dpo_learns_from_a_user_s_pairs(iqlite: Callable[..., Any], make_run: Callable[..., RunDir], tmp_path: Path) -> None:
    run = make_run(superior=SHARP)
    rows = [{"prompt": f"Question {n}?", "chosen": "Yes. " * (n + 1), "rejected": "No, never again. " * 4} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--seeds", "1", "--no-safety", "--pairs", "pairs.jsonl"]
    code, out, err = iqlite("compare", run.path, "--with", "dpo", "--json", *options)
    assert code == 0, err
    assert "dpo (pairs.jsonl)" in [m["name"] for m in json.loads(out)["measures"]]
    (folder,) = (run.path / "baselines").glob("dpo-*")
    assert json.loads((folder / "baseline.json").read_text())["pairs"] == "pairs.jsonl"
    session = open_session(run.recipe(), placement="system")
    given, tokens = _given(session, load_pairs(tmp_path / "pairs.jsonl"), 6)
    longest = run.recipe().rollout.max_new_tokens
    texts = sorted(session.chat.tokenizer.decode(row["prompt_ids"]) for row in given)
    assert texts[::2] == texts[1::2] and len(set(texts)) == 3  # two passes, every pair once in each
    assert all("Question" in text for text in texts)
    for row in given:
        for side in ("chosen_ids", "rejected_ids"):
            assert len(row[side]) <= longest and (row[side][-1] == session.chat.turn_end) == (len(row[side]) < longest)
    assert json.loads((folder / "baseline.json").read_text())["sampled_tokens"] == tokens
    assert tokens == sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in given)
    code, _, err = iqlite("compare", run.path, "--with", "sft", *options)
    assert code == 2 and "add --with dpo" in err and err.count("\n") == 1
    for bad in ('{"prompt": "Hi?"}', '{"prompt": "Hi?", "chosen": "\\ud83d", "rejected": "b"}'):
        (tmp_path / "pairs.jsonl").write_text(bad + "\n")
        code, _, err = iqlite("compare", run.path, "--with", "dpo", *options)
        assert code == 2 and "line 1" in err and err.count("\n") == 1


def test_gae_is_its_definition() -> None:
    """Â_t = Σ_l (γλ)^l δ_{t+l}, in plain loops; λ = 1 gives returns minus values."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 3, 1]
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    reward, value = (torch.randn(3, 5, generator=generator) * mask for _ in range(2))
    advantage, returns = gae(reward, value, mask, gamma=0.9, lam=0.8)
    for b, length in enumerate(lengths):
        for t in range(length):
            total = 0.0
            for at in range(t, length):
                following = float(value[b, at + 1]) if at + 1 < length else 0.0
                total += (0.9 * 0.8) ** (at - t) * (float(reward[b, at]) + 0.9 * following - float(value[b, at]))
            assert float(advantage[b, t]) == pytest.approx(total, abs=1e-5)
            assert float(returns[b, t]) == pytest.approx(total + float(value[b, t]), abs=1e-5)
        assert not advantage[b, length:].any()


def test_the_reward_of_a_response_is_equation_7() -> None:
    logp, reference, superior = (torch.randn(2, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    found = rewards(logp, reference, superior, mask, 0.5)
    for b, length in enumerate((4, 2)):
        penalties = [-0.5 * float(logp[b, t] - reference[b, t]) for t in range(length)]
        end = 0.5 * sum(float(superior[b, t] - reference[b, t]) for t in range(length))
        assert found[b, :length].tolist() == pytest.approx([*penalties[:-1], penalties[-1] + end], abs=1e-6)
        assert not found[b, length:].any()


def test_the_value_head_learns_returns() -> None:
    hidden = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    target = hidden @ torch.arange(8.0) / 8 + 0.5
    value = Value(8)
    first = value.fit(hidden, target, 1)
    assert value.fit(hidden, target, 2000) < 0.05 * first
    assert math.isclose(float((value(hidden[None])[0] - target).square().mean()), value.fit(hidden, target, 1), rel_tol=0.2)


def test_prompts_of_a_hub_data_set_are_named_in_a_file(iqlite: Callable[..., Any], make_run: Callable[..., RunDir], tmp_path: Path) -> None:
    from iqlite.recipe.schema import HubPrompts

    run = make_run()
    for text, said in (
        ('dataset = "a/b"\ncolum = "x"\n', "did you mean column?"),
        ('split = "test"\n', "dataset is missing"),
        ("dataset = \n", "can't be read"),
    ):
        (tmp_path / "asked.toml").write_text(text)
        code, _, err = iqlite("compare", run.path, "--prompts", "asked.toml")
        assert code == 2 and said in err and "asked.toml" in err and err.count("\n") == 1, err
    code, _, err = iqlite("compare", run.path, "--prompts", "nothing.jsonl")
    assert code == 2 and "no such file" in err and err.count("\n") == 1
    import tomllib

    for path in (Path(__file__).parents[2] / "recipes" / "evaluations").glob("*.toml"):
        text = path.read_text("utf-8")
        assert HubPrompts.model_validate(tomllib.loads(text)).split == "test" and "# Licence: " in text
