"""Aim: measures by hand and by whole sequences, verdicts on made-up differences, a recipe that aims the wrong way refused before anything is
written, contrary prompts whose target is the reference, and a search for a better aim that goes on from what it has kept."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from iqlite.aim.look import NONE, RIGHT, WRONG, direction, look
from iqlite.aim.writing import two_sided
from iqlite.commands.init import derived
from iqlite.errors import PromptsError
from iqlite.evaluation.answers import Answerer, collect
from iqlite.model.sampling import Sampler
from iqlite.recipe.prompts import hold_back, load_prompts
from iqlite.recipe.reading import load_recipe, to_data
from iqlite.recipe.schema import Recipe
from iqlite.records import HELD_OUT_KL, Prompts, Rollout
from iqlite.run.rundir import RunDir
from iqlite.training.measuring import by_kind, harmless, log_odds
from iqlite.training.monitors import Monitors
from iqlite.training.order import prompts_and_contrary, spread_by_kind
from iqlite.training.readings import Reading, read
from iqlite.training.session import Session
from iqlite.training.update import update
from tests.helpers.tiny import shake

NO, YES = "I'm sorry, but I can't help with that.", "Sure: take the red one."


def asked(*expected: str) -> Prompts:
    return Prompts(tuple(({"role": "user", "content": f"Question {n}?"},) for n in range(len(expected))), expected=expected)


def rows(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Path]:
    """A recipe's file with fourteen held-out and eight contrary prompts beside it."""

    def make(name: str = "recipe", **tables: dict[str, Any]) -> Path:
        rows(tmp_path / "eval.jsonl", *({"prompt": f"Is {n} a good number?"} for n in range(14)))
        rows(tmp_path / "contrary.jsonl", *({"prompt": f"What is {n} called?", "label": "safe"} for n in range(8)))
        data = to_data(make_recipe(**{"prompts": {"contrary": "contrary.jsonl"}, **tables}))
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(data), "utf-8")
        return tmp_path / f"{name}.toml"

    return make


def test_harmless_counts_both_kinds_of_error_alike() -> None:
    """The score is the mean of two shares, however many prompts there are of each kind; and no answer at all is no answer."""
    prompts = asked("refuse", "refuse", "refuse", "answer")
    for texts in ([NO, NO, YES, YES], [NO, NO, NO, NO], [YES, YES, YES, ""], [YES, NO, YES, NO]):
        refused = [text == NO for text in texts[:3]]
        answered = [texts[3] == YES]
        assert harmless(prompts, texts).mean() == pytest.approx((sum(refused) / 3 + sum(answered)) / 2)
        assert by_kind(prompts, texts) == {"refuse": (sum(refused), 3), "answer": (sum(answered), 1)}
    assert harmless(asked("refuse", "refuse"), [NO, YES]).tolist() == [1.0, 0.0]
    with pytest.raises(PromptsError, match="label"):
        harmless(asked("refuse", ""), [NO, YES])


@pytest.mark.parametrize("estimator", ["contrastive", "prompted", "mixture"])
def test_described_is_the_difference_of_two_whole_sequence_readings(estimator: str, make_session: Callable[..., Session]) -> None:
    """log π⁺ − log π⁻ a token (of π_ref without an unwanted reading; weighted in a mixture) from the model's own logits in float64."""
    two = ({"name": "a", "weight": 1.0, "wanted": "Be kind.", "unwanted": "Be mean."}, {"name": "b", "weight": 0.5, "wanted": "Be short.", "unwanted": "Be long."})  # fmt: skip
    behavior = {"wanted": None, "unwanted": None, "mixture": two} if estimator == "mixture" else {}
    session = make_session(superior={"estimator": estimator}, behavior=behavior)
    shake(session.policy)  # the base reads, whatever was trained
    prompts = [({"role": "user", "content": f"Question {n}?"},) for n in range(3)]
    texts = ["Yes.", "No, never again!", ""]
    found = log_odds(session, prompts, texts)
    pairs = {"contrastive": [(1.0, "wanted", "unwanted")], "prompted": [(1.0, "wanted", "reference")], "mixture": [(1.0, "wanted:a", "unwanted:a"), (0.5, "wanted:b", "unwanted:b")]}[estimator]  # fmt: skip
    for request, text, value in zip(prompts, texts, found, strict=True):
        answer = [*session.chat.tokenizer(text, add_special_tokens=False).input_ids, session.chat.turn_end]
        total = {}
        with session.policy.acting_as("reference"):
            for reading in session.readings:
                prompt = session.chat.ids(request, reading.description)
                logits = session.policy.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double()
                total[reading.name] = sum(float(logits[t].log_softmax(-1)[token]) for t, token in enumerate(answer))
        assert value == pytest.approx(sum(w * (total[a] - total[b]) for w, a, b in pairs) / len(answer), abs=1e-4)


def test_directions() -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, 24)
    assert direction(noise + 0.5) == RIGHT and direction(noise - 0.5) == WRONG
    assert direction(noise - noise.mean()) == NONE and direction(np.zeros(24)) == NONE
    assert direction(np.full(9, -1.0)) == NONE  # too few to say anything
    # A model that refuses a quarter of 24 and then none is called wrong; of 24 that refuses one less isn't.
    assert direction(np.array([-1.0] * 6 + [0.0] * 18)) == WRONG and direction(np.array([-1.0] + [0.0] * 23)) == NONE


def test_a_look_at_harmlessness_asks_both_kinds() -> None:
    prompts = asked(*["refuse"] * 40, *["answer"] * 6)
    numbers = spread_by_kind(prompts, 24)
    assert len(numbers) == 24 and sum(prompts.expected[n] == "answer" for n in numbers) == 6 and len(set(numbers)) == 24
    assert len(spread_by_kind(asked(*["refuse"] * 3, *["answer"] * 30), 12)) == 12
    assert spread_by_kind(asked("refuse", "answer"), 24) == [0, 1]


def test_a_recipe_that_aims_the_wrong_way_is_refused_before_anything_is_written(
    iqlite: Callable[..., Any], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """On a random model a strong contrast makes answers longer, or, swapped, not: one of the two aims wrong by `shorter`."""
    tables: dict[str, Any] = {"superior": {"strength": 30.0}, "judge": {"measure": "shorter"}, "rollout": {"max_new_tokens": 24}}
    texts = ("You are kind to everybody, always.", "You are mean to everybody, always.")
    codes = {}
    for name, wanted, unwanted in (("one", *texts), ("other", *reversed(texts))):
        path = recipe_file(name, **tables, behavior={"wanted": wanted, "unwanted": unwanted})
        codes[name] = iqlite("train", path, "--out", name)
    wrong, right = sorted(codes, key=lambda name: -codes[name][0])
    (code, out, err), (fine, said, _) = codes[wrong], codes[right]
    assert code == 2 and "aims the wrong way: by shorter, base" in err and "--improve" in err and err.rstrip().count("\n") == 0
    assert "step 1" not in out and not (tmp_path / wrong).exists()
    assert fine == 0 and "aim: " in said
    record = json.loads((tmp_path / right / "aim.json").read_text("utf-8"))
    assert record["verdict"] != WRONG and not record["forced"] and record["prompts"] == 12
    assert iqlite("train", tmp_path / f"{wrong}.toml", "--out", "silent", "--set", "judge.aim=false", "--no-safety")[0] == 0
    assert not (tmp_path / "silent" / "aim.json").exists()

    # Forced, it goes on, and says for ever that it was.
    code, out, err = iqlite("train", tmp_path / f"{wrong}.toml", "--out", wrong, "--force", "--no-safety")
    assert code == 0 and "forced: " in out, err
    assert json.loads((tmp_path / wrong / "aim.json").read_text("utf-8"))["forced"]
    assert iqlite("export", wrong, "--to", "peft", "-o", "out")[0] == 0
    assert "forced although its target pointed the wrong way by shorter" in (tmp_path / "out" / "README.md").read_text("utf-8")
    code, out, _ = iqlite("compare", wrong, "--no-safety", "--seeds", "1")
    assert code == 0 and "forced although" in out


def test_what_a_look_has_asked_nobody_asks_again(
    make_session: Callable[..., Session], make_run: Callable[..., RunDir], recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file()
    session = make_session(train={"seed": 7}, behavior={"wanted": "You are quite kind.", "unwanted": "You are quite mean."})
    first = look(session)
    run = make_run()
    monkeypatch.setattr(Answerer, "asked", lambda *_: pytest.fail("it is asked again"))
    again = look(session)
    assert replace(again, seconds=first.seconds) == first
    numbers = [0, 3]  # a comparison of other prompts of the set takes what is there, and keeps it in its run
    sampler = Sampler(0, session.recipe.rollout.max_new_tokens, 0.7, 0.9, "compare")
    requests = [session.eval.requests[n] for n in numbers]
    given = collect(session, run.path, Answerer("base", "reference"), requests, [sampler], lambda _: None, index=numbers)[0]
    assert [a.index for a in given] == numbers and all(a.nll is not None and a.nll > 0 for a in given)
    kept = [
        json.loads(line) for file in (run.path / "answers").glob("base-*.jsonl") for line in file.read_text("utf-8").split("\n") if line
    ]
    assert [row["index"] for row in kept] == numbers


def test_contrary_rows_have_the_reference_as_their_target_to_the_bit(
    make_session: Callable[..., Session], recipe_file: Callable[..., Path]
) -> None:
    recipe_file()
    session = make_session(prompts={"contrary": "contrary.jsonl"})
    assert session.contrary is not None and (len(session.contrary), len(session.contrary_eval or ())) == (6, 2)
    shake(session.policy)
    prompts, numbers, contrary = prompts_and_contrary(session, 1)
    assert contrary == 2 and numbers[-2:] == [n for n in numbers if n >= len(session.train)] and len(prompts) == 6
    rollout = replace(session.answers("policy", prompts, session.sampler("train"), step=1, index=numbers), contrary=contrary)
    scores = read(session.policy, session.chat, rollout, session.readings, session.sizes)
    assert all(torch.equal(states[4:], scores.hidden["reference"][4:]) for states in scores.hidden.values())
    assert not torch.equal(scores.hidden["wanted"][:4], scores.hidden["reference"][:4])
    values = session.score(replace(rollout, contrary=len(prompts)), weights="base").values
    assert torch.equal(values["kl/policy_superior"], values["kl/policy_reference"]) and float(values["kl/policy_reference"].mean()) > 0.01


def gradient(session: Session, rollout: Rollout, readings: Sequence[Reading]) -> dict[str, torch.Tensor]:
    """One update's, towards what these readings make: what plain gradient descent at rate 1 takes away."""
    policy, before = session.policy, session.policy.state()
    scores = read(policy, session.chat, rollout, readings, session.sizes)
    update(session, torch.optim.SGD(list(policy.parameters.values()), 1.0), rollout, scores, 1.0)
    after = policy.state()
    policy.load_state(before)
    return {name: before[name] - after[name] for name in before}


def test_a_step_with_contrary_prompts_pulls_them_back_to_the_reference(
    make_session: Callable[..., Session], recipe_file: Callable[..., Path]
) -> None:
    """Its gradient is the token-weighted sum of the parts' own: one to π̃ by the objective, one to π_ref (read plain) by forward KL."""
    recipe_file()
    session = make_session(prompts={"contrary": "contrary.jsonl"}, train={"max_grad_norm": 1e9})
    shake(session.policy)
    prompts, numbers, contrary = prompts_and_contrary(session, 1)
    rollout = replace(session.answers("policy", prompts, session.sampler("train"), step=1, index=numbers), contrary=contrary)

    def part(rows: slice, all_contrary: bool) -> tuple[dict[str, torch.Tensor], int]:
        some = replace(
            rollout, index=rollout.index[rows], requests=rollout.requests[rows], prompt_ids=rollout.prompt_ids[rows],
            tokens_BT=rollout.tokens_BT[rows], mask_BT=rollout.mask_BT[rows], ended_B=rollout.ended_B[rows], contrary=0,
        )  # fmt: skip
        if not all_contrary:
            return gradient(session, some, session.readings), int(some.mask_BT.sum())
        forward = session.recipe.model_copy(update={"objective": session.recipe.objective.model_copy(update={"name": "forward-kl"})})
        plain = [Reading(r.name, "reference") for r in session.readings]  # Δ = 0
        return gradient(replace(session, recipe=forward), some, plain), int(some.mask_BT.sum())

    (wanted, n), (plain, m) = part(slice(0, 4), False), part(slice(4, None), True)
    mixed = gradient(session, rollout, session.readings)
    for name, value in mixed.items():
        assert torch.allclose(value, (n * wanted[name] + m * plain[name]) / (n + m), rtol=1e-3, atol=1e-6)
    statistics, _ = update(session, torch.optim.SGD(session.policy.parameters.values(), 0.0), rollout, read(session.policy, session.chat, rollout, session.readings, session.sizes), 0.0)  # fmt: skip
    assert int(statistics.values["contrary"].sum()) == m


def test_a_run_with_contrary_prompts_measures_and_resumes(
    iqlite: Callable[..., Any], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe_file(judge={"measure": "harmless"}, train={"steps": 4, "eval_every": 2, "checkpoint_every": 1})
    code, out, err = iqlite("train", path, "--out", "run", "--no-safety")
    assert code == 0 and "harmless of held-out answers" in out, err
    lines = RunDir.open(tmp_path / "run").metrics()
    assert all("kl/contrary_policy_reference" in line for line in lines[1:])
    for line in (lines[0], lines[2], lines[4]):
        assert line["eval/measure"] == pytest.approx((line["eval/refuse_right_share"] + line["eval/answer_right_share"]) / 2)
        assert line["eval/measure_base"] == lines[0]["eval/measure"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert len(samples) == 3 * 4 and all("score" in row for row in samples)  # two held-out and two contrary prompts
    code, out, err = iqlite("compare", "run", "--seeds", "1", "--no-safety")
    assert code == 0 and "answered as they should be" in out, err
    code, out, err = iqlite("compare", "run", "--checkpoints")
    assert code == 0 and "harmless" in out, err


def test_labels_and_the_sets_they_stand_in(tmp_path: Path, make_session: Callable[..., Session], recipe_file: Callable[..., Path]) -> None:
    rows(tmp_path / "p.jsonl", {"prompt": "a", "label": "unsafe"}, {"prompt": "b", "label": "safe"}, {"prompt": "c"}, {"prompt": "d", "kind": "harmful"})  # fmt: skip
    found = load_prompts("p.jsonl", beside=tmp_path, key="k")
    assert found.expected == ("refuse", "answer", "", "refuse") and found.expecting("answer").expected[2] == "answer"
    kept, held = hold_back(found, "k", 0.5)
    assert kept.expected == ("refuse", "") and held.expected == ("answer", "refuse")
    with pytest.raises(PromptsError, match=r"prompts\.contrary"):
        make_session(judge={"measure": "harmless"})
    recipe_file()
    rows(tmp_path / "contrary.jsonl", {"prompt": "What is number 1 good for?"}, *({"prompt": f"{n}?"} for n in range(7)))
    assert any("pulled both ways" in note for note in make_session(prompts={"contrary": "contrary.jsonl"}).notes)


def test_a_run_that_scores_below_its_base_stops_and_its_best_does_not() -> None:
    monitors = Monitors(5.0, base_scores=[1.0] * 8 + [0.0] * 8)
    seen = []
    for step, (kl, good) in enumerate(((0.9, 8), (0.6, 7), (0.4, 2), (0.3, 0), (0.2, 0))):
        scores = [1.0] * good + [0.0] * (16 - good)
        better, verdicts = monitors.after_eval(step, {HELD_OUT_KL: kl}, scores)
        seen.append((better, [(v.rule, v.stop) for v in verdicts]))
    # One in sixteen less is within a standard error; six less is worse beyond chance: never the best, a warning, and then a stop.
    assert seen[0] == (True, []) and seen[1] == (True, []) and monitors.best_step == 1
    assert seen[2] == (False, [("measure", False)]) and seen[3] == (False, [("measure", True)])
    again = Monitors.restore(json.loads(json.dumps(Monitors(5.0).state())))
    assert again == Monitors(5.0)


def test_converged_waits_for_a_measure_that_still_rises() -> None:
    def stops(scores: list[float]) -> list[bool]:
        monitors = Monitors(5.0, until_converged=True, base_scores=[0.0] * 12)
        return [
            any(v.rule == "converged" for v in monitors.after_eval(n, {HELD_OUT_KL: 0.5}, [score] * 12)[1])
            for n, score in enumerate(scores)
        ]

    assert stops([0.0, 0.1, 0.2, 0.3, 0.4, 0.5]) == [False] * 6
    assert stops([0.3] * 4) == [False, False, False, True]


def test_a_measure_is_derived_from_the_words() -> None:
    assert derived("You answer in a warm, cheerful tone.", "You answer in a cold, gloomy tone.") == "tone"
    assert derived("You answer in one short sentence.", "You answer at great length.") == "shorter"
    assert derived("You decline what could hurt somebody.", "You grant what could hurt somebody.") == "harmless"
    assert derived("You talk like a pirate.", "You talk like a lawyer.") == "described"


def test_init_writes_the_measure_and_the_prompts_that_it_needs(iqlite: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = iqlite("init", "careful", "--wanted", "You decline what is harmful.", "--unwanted", "You grant what is harmful.")
    assert code == 0 and "scored by harmless" in out, err
    data = tomllib.loads((tmp_path / "careful.toml").read_text("utf-8"))
    assert data["judge"]["measure"] == "harmless" and all((tmp_path / "prompts" / f).is_file() for f in ("harmful.jsonl", "harmful-heldout.jsonl", "lookalikes.jsonl"))  # fmt: skip
    assert iqlite("init", "pirate", "--wanted", "You are a pirate.", "--unwanted", "You are a clerk.", "--measure", "tone")[0] == 0
    assert tomllib.loads((tmp_path / "pirate.toml").read_text("utf-8"))["judge"]["measure"] == "tone"
    code, _, err = iqlite("init", "odd", "--wanted", "a", "--unwanted", "b", "--measure", "nicer")
    assert code == 2 and "judge.measure" in err and not (tmp_path / "odd.toml").exists()


def test_a_search_writes_a_recipe_that_trains_and_goes_on_from_what_it_kept(
    iqlite: Callable[..., Any], recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(tmp_path / "train.jsonl", *({"prompt": f"Is {n} odd?"} for n in range(100, 148)))
    path = recipe_file(
        behavior={"wanted": "You are kind. You help.", "unwanted": "You are mean. You harm."}, rollout={"max_new_tokens": 12}
    )
    code, out, err = iqlite("probe", path, "--improve", "-o", "better.toml", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (
        found["measure"] == "described"
        and not found["out_of_time"]
        and len(found["trials"]) > 6
        and found["trials"][0]["what"] == "as it stands"
    )
    best = max(trial["score"] for trial in found["trials"] if trial["best"])
    assert best == [trial["score"] for trial in found["trials"] if trial["best"]][-1] and best > found["trials"][0]["score"]
    # A race: whoever was best has answered all, and some that were behind on the first half weren't asked the second.
    assert {trial["prompts"] for trial in found["trials"] if trial["best"]} == {32}
    assert 16 in {trial["prompts"] for trial in found["trials"]}
    text = (tmp_path / "better.toml").read_text("utf-8")
    assert text.startswith("# Made by iqlite probe recipe.toml --improve: ") and found["best"] in text.split("\n")[0]
    monkeypatch.setattr(Answerer, "asked", lambda *_: pytest.fail("it is asked again"))
    code, out, err = iqlite("probe", path, "--improve", "-o", "again.toml")
    assert code == 0 and "as it stood, on held-out prompts" in out, err
    assert (tmp_path / "again.toml").read_text("utf-8") == text
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, _, err = iqlite("probe", path, "--improve", "-o", "better.toml")
    assert code == 2 and "better.toml exists already" in err
    code, _, err = iqlite("probe", path, "-o", "x.toml")
    assert code == 2 and "--improve" in err
    assert iqlite("train", "better.toml", "--out", "run", "--no-safety", "--set", "judge.aim=false")[0] == 0
    rows(tmp_path / "train.jsonl", *({"prompt": f"Is {n} odd?"} for n in range(100, 107)))
    code, _, err = iqlite("probe", path, "--improve", "-o", "few.toml")
    assert code == 2 and "prompts.train has 7 prompts" in err and not (tmp_path / "few.toml").exists()


def test_a_search_about_refusing_trains_on_requests_that_are_surely_to_be_refused(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe, said = two_sided(load_recipe(recipe_file(judge={"measure": "refusal"}, prompts={"contrary": None})))
    assert recipe.judge.measure == "harmless" and all(key in said for key in ("prompts.contrary", "prompts.train", "judge.measure"))
    found = {key: load_prompts(getattr(recipe.prompts, key), beside=recipe.folder, key=key) for key in ("train", "eval", "contrary")}
    assert {*found["train"].expected, *found["eval"].expected} == {"refuse"} and {*found["contrary"].expected} == {"answer"}
    rows(tmp_path / "train.jsonl", *({"prompt": f"How do I harm {n}?", "label": "refuse"} for n in range(8)))
    recipe, said = two_sided(load_recipe(recipe_file("labelled", judge={"measure": "harmless"})))
    assert recipe.prompts.train == "train.jsonl" and recipe.prompts.contrary == "contrary.jsonl" and not said
    kind = load_recipe(recipe_file("kind", judge={"measure": "tone"}))
    assert two_sided(kind) == (kind, "")
