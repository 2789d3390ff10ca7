"""Safety before and after: shares counted by hand, what is worse, a user's set, and what a model card says of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from iqlite.base.identity import IDENTITY_FILE
from iqlite.evaluation.answers import Answer
from iqlite.evaluation.safety import Item, changes, load_items, measured, worse
from iqlite.export.card import figure_lines, warnings
from iqlite.places import safety_set
from iqlite.records import StepMetrics
from iqlite.run.findings import adapter_digest, figures
from iqlite.run.rundir import RunDir
from iqlite.scoring.measures import tone
from iqlite.showing.facts import facts_of, stability

NO, YES = "I'm sorry, but I can't help with that.", "Sure, it is easy and pleasant."


def answers(*texts: str) -> list[Answer]:
    return [Answer("", 0, row, "", text, 5, True, 1.0) for row, text in enumerate(texts)]


ITEMS = [Item("harmful", "a"), Item("harmful", "b"), Item("harmless", "c"), Item("harmless", "d"), Item("group", "e", "cats"), Item("group", "f", "dogs")]  # fmt: skip


def test_shares_and_gaps_counted_by_hand() -> None:
    found = measured(answers(NO, YES, NO, YES, "They are wonderful and happy.", "They are awful and cruel."), ITEMS)
    assert found["harmful_compliance"]["value"] == 0.5 and found["over_refusal"]["value"] == 0.5
    assert found["tone_gap"] == pytest.approx(found["tone_by_group"]["cats"] - found["tone_by_group"]["dogs"]) and found["tone_gap"] > 1
    assert found["refusal_gap"] == 0.0
    silent = measured(answers("", "", "", "", "", ""), ITEMS)
    assert silent["harmful_compliance"]["value"] == 0.0 and silent["over_refusal"]["value"] == 0.0
    assert measured(answers(NO), ITEMS[:1])["tone_gap"] is None  # not asked for, so not 0


def test_the_chance_of_a_change_is_that_of_all_swaps() -> None:
    """Growth of a share and of a gap, over all 2⁴ ways to swap each request's answer before with the one after."""
    harmful = [Item("harmful", str(n)) for n in range(4)]
    group = [Item("group", f"{g}{n}", g) for g in ("cats", "dogs") for n in range(2)]
    cases = {
        "harmful_compliance": (harmful, [NO, NO, YES, NO], [YES, YES, NO, YES], lambda v: sum(v) / 4, lambda text: float(text == YES)),
        "tone_gap": (group, ["fine", "good", "fine", "okay"], ["wonderful", "bad", "awful", "cruel"], lambda v: abs(v[0] + v[1] - v[2] - v[3]) / 2, tone),
    }  # fmt: skip
    for key, (items, was, is_, figure, measure) in cases.items():
        found = changes(answers(*was), answers(*is_), items)[key]
        sides = [[measure(text) for text in texts] for texts in (was, is_)]
        grown = []
        for swaps in product((0, 1), repeat=4):
            mixed = [[sides[side ^ swap][n] for n, swap in enumerate(swaps)] for side in (0, 1)]
            grown.append(figure(mixed[1]) - figure(mixed[0]))
        assert found["value"] == pytest.approx(grown[0])
        assert found["chance"] == pytest.approx(sum(one >= grown[0] - 1e-9 for one in grown) / 16, abs=0.04)


def test_what_got_worse_is_said() -> None:
    groups = [Item("group", f"{g}{k}", g) for g in ("cats", "dogs") for k in range(8)]
    items = [*[Item("harmful", str(k)) for k in range(8)], *[Item("harmless", str(k)) for k in range(8)], *groups]

    def found(refused: int, over: int, *said: str) -> tuple[list[Answer], dict[str, Any]]:
        texts = [NO] * refused + [YES] * (8 - refused) + [NO] * over + [YES] * (8 - over) + [text for text in said for _ in range(8)]
        return answers(*texts), measured(answers(*texts), items)

    (said, before), (later, after) = found(8, 0, "Fine.", "Fine."), found(2, 1, "Wonderful and happy.", "Awful and cruel.")
    sentences = worse(before, after, changes(said, later, items))
    assert len(sentences) == 3 and "75% instead of 0%." in sentences[0] and "tone" in sentences[2]
    assert "refused" in sentences[1] and "12% instead of 0% (which may be chance)" in sentences[1]
    assert worse(after, before, changes(later, said, items)) == []


def test_the_set_that_ships_is_whole() -> None:
    items = load_items()
    kinds = [item.kind for item in items]
    assert kinds.count("harmful") == kinds.count("harmless") == 64 and kinds.count("group") == 24
    assert len({item.prompt for item in items}) == len(items)


@pytest.mark.parametrize("language", ["de", "es"])
def test_other_languages_ship_and_are_reported_apart(language: str, iqlite: Callable[..., Any], make_run: Callable[..., RunDir]) -> None:
    items = load_items(safety_set(Path(language)))
    kinds = [item.kind for item in items]
    assert kinds.count("harmful") == kinds.count("harmless") == 32 and kinds.count("group") == 24
    assert len({item.prompt for item in items}) == len(items) and {item.language for item in items} == {language}
    run = make_run()
    code, out, err = iqlite("compare", run.path, "--seeds", "1", "--count", "2", "--safety-set", language, "--json")
    assert code == 0, err
    safe = json.loads(out)["safety"]
    assert safe["set"] == f"a small {'German' if language == 'de' else 'Spanish'} set" and safe["figures"]["trained"]["harmful"] == 32
    assert safe["figures"]["base"]["tone_gap"] is None and safe["figures"]["base"]["refusal_gap"] is not None  # VADER reads English
    assert (run.path / f"safety.{'German' if language == 'de' else 'Spanish'}.json").is_file() and not (run.path / "safety.json").exists()


def test_compare_measures_it_and_merge_and_export_pass_it_on(
    iqlite: Callable[..., Any], make_run: Callable[..., RunDir], tmp_path: Path
) -> None:
    run = make_run()
    code, out, err = iqlite("merge", run.path, "-o", "before", "--no-check", "--json")
    assert code == 0 and "weren't measured" in json.loads(out)["warnings"][0], err
    rows = [{"kind": "harmful", "prompt": "x"}, {"kind": "harmless", "prompt": "y"}, {"kind": "group", "prompt": "z", "group": "g"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = iqlite("compare", run.path, "--seeds", "1", "--count", "2", "--safety-set", "mine.jsonl", "--json")
    assert code == 0, err
    safe = json.loads(out)["safety"]
    assert safe["figures"]["trained"]["harmful"] == 1 and safe == json.loads((run.path / "safety.mine.jsonl.json").read_text())
    code, out, _ = iqlite("export", run.path, "--to", "peft", "-o", "peft", "--json")
    assert code == 0 and json.loads(out)["warnings"] == [s[0].upper() + s[1:] for s in safe["worse"]]
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "## Safety" in card and "harmful requests granted" in card
    safe["worse"] = ["more harmful requests are granted than before: 50% instead of 0%."]
    (run.path / "safety.json").write_text(json.dumps(safe | {"set": "another"}))
    code, out, _ = iqlite("merge", run.path, "-o", "after", "--no-check")
    assert "More harmful requests are granted" in out and "More harmful" in (tmp_path / "after" / "README.md").read_text()
    code, out, _ = iqlite("merge", run.path, "-o", "louder", "--scale", "3", "--no-check")
    card = (tmp_path / "louder" / "README.md").read_text()
    assert all("Nothing was measured at scale 3" in text and "More harmful" in text for text in (out, card))
    code, _, err = iqlite("compare", run.path, "--seeds", "1", "--prompts", "mine.jsonl", "--no-safety")
    assert code == 0, err
    code, out, _ = iqlite("export", run.path, "--to", "gguf-adapter", "-o", "a.gguf")
    assert code == 0
    card = (tmp_path / "a.gguf.md").read_text()
    (tmp_path / "b.gguf.md").write_text("mine")
    code, _, err = iqlite("export", run.path, "--to", "gguf-adapter", "-o", "b.gguf")
    assert code == 2 and "b.gguf.md exists already" in err and not (tmp_path / "b.gguf").exists()
    assert "(held out)" in card and "(mine.jsonl)" in card and "More harmful" in card and "temperature 0.7:" in card
    assert (
        "Measured on another" in card and "Measured on the set mine.jsonl" in card and "granted, of 1 |" in card
    )  # none in another's place


def test_a_small_try_does_not_take_the_place_of_a_large_comparison(iqlite: Callable[..., Any], make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    options = ["--seeds", "1", "--no-safety"]
    assert iqlite("compare", run.path, *options)[0] == 0
    large = (run.path / "compare.json").read_text()
    code, out, err = iqlite("compare", run.path, *options, "--count", "2")
    assert code == 0 and "compare.json stays as it was" in out and (run.path / "compare.json").read_text() == large, err
    assert iqlite("compare", run.path, *options, "--temperature", "0")[0] == 0
    assert json.loads((run.path / "compare.json").read_text())["temperature"] == 0  # as many answers: the newer one


@pytest.mark.parametrize("line", ['{"kind": "bad", "prompt": "x"}', '{"kind": "group", "prompt": "x"}', "no json", '{"prompt": "x"}', "3", '{"kind": "harmful", "prompt": "\\ud800"}', '{"kind": "group", "prompt": "x", "group": ["a"]}'])  # fmt: skip
def test_a_bad_set_is_one_sentence(line: str, tmp_path: Path, iqlite: Callable[..., Any], make_run: Callable[..., RunDir]) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    code, _, err = iqlite("compare", make_run().path, "--safety-set", "bad.jsonl")
    assert code == 2 and "line 1" in err and err.count("\n") == 1


def test_a_language_that_has_no_set_is_told_which_have(iqlite: Callable[..., Any], make_run: Callable[..., RunDir]) -> None:
    code, _, err = iqlite("compare", make_run().path, "--safety-set", "fr")
    assert code == 2 and "--safety-set fr: no such file" in err and "de, es" in err and err.count("\n") == 1


def test_a_manifest_without_figures_says_so() -> None:
    assert "weren't measured" in warnings({"figures": {}, "made": {}})[0]


def test_the_best_adapter_has_its_own_held_out_figures(make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    for step, kl in enumerate((1.0, 0.4, 0.7, 0.6)):
        run.add_metrics(StepMetrics(step, {"eval/kl_policy_superior": kl}))
    shutil.copytree(run.adapter, run.best)
    for folder, step in ((run.adapter, 2), (run.best, 1)):  # interrupted after step 2; resumed, and killed after step 3
        identity = json.loads((folder / IDENTITY_FILE).read_text())
        (folder / IDENTITY_FILE).write_text(json.dumps(identity | {"step": step}))
    found = [figures(run, folder) for folder in (run.adapter, run.best)]
    assert [one["held_out_kl_policy_superior"] for one in found] == [{"before": 1.0, "after": 0.7}, {"before": 1.0, "after": 0.4}]
    assert [one["steps"] for one in found] == [2, 1] and run.steps_taken() == 2
    (run.adapter / IDENTITY_FILE).write_text("{")  # what doesn't say is taken to be where the metrics are
    assert run.step_of(run.adapter) == 3


def test_the_held_out_kl_that_a_run_was_judged_by_is_the_one_that_is_told(make_run: Callable[..., RunDir]) -> None:
    """By forward KL something new was learned, while the reverse KL rose: a success, in the figures, the card and the report."""
    run = make_run()
    for step, (reverse, forward) in enumerate(((0.389, 0.634), (0.639, 0.590), (0.530, 0.486))):
        run.add_metrics(StepMetrics(step, {"eval/kl_policy_superior": reverse, "eval/kl_superior_policy": forward}))
    found = figures(run, run.adapter)
    assert found["held_out_kl_superior_policy"] == {"before": 0.634, "after": 0.486}
    assert found["held_out_kl_policy_superior"] == {"before": 0.389, "after": 0.530}
    assert figure_lines(found)[0].startswith("Held-out KL(superior‖policy), nats a token: 0.634 before, 0.486 after 2")
    assert (True, "The distance from the target on held-out prompts fell, from 0.63 to 0.49 nats a token.") in stability(facts_of(run))


def test_of_two_comparisons_of_one_adapter_the_larger_counts(make_run: Callable[..., RunDir]) -> None:
    run = make_run()
    shutil.copytree(run.adapter, run.best)  # a monitor's stop
    of = {"adapter_sha256": adapter_digest(run.adapter)}
    for name, prompts in (("compare-best.json", 64), ("compare.json", 2), ("compare-best.a.json", 9), ("compare.a.json", 10)):
        run.write(name, json.dumps({**of, "asked": "a" if ".a." in name else "held out", "prompts": prompts, "seeds": 1}))
    for name in ("safety-best.json", "safety.json", "safety.mine.json"):
        run.write(name, json.dumps({**of, "set": name.partition("mine")[1]}))
    found = figures(run, run.best)
    assert found["compare"]["prompts"] == 64 and [one["prompts"] for one in found["elsewhere"]] == [10] and len(found["safety"]) == 2
