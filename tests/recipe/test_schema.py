"""The recipe: shipped ones load, faults are one sentence with the key and the fix, `--set` and defaults, a lock that means the same."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import BaseModel

from iqlite.aim.writing import out_path
from iqlite.commands.recipe import keys
from iqlite.errors import RecipeError
from iqlite.method.estimators import ESTIMATORS
from iqlite.method.objectives import OBJECTIVES
from iqlite.places import shipped_recipes
from iqlite.recipe.prompts import load_prompts
from iqlite.recipe.reading import load_recipe, parse_recipe
from iqlite.recipe.schema import Demonstration, HubPrompts, Principle, Recipe
from iqlite.run.rundir import locked
from iqlite.scoring.measures import ABOUT, NAMES

RECIPES = Path(__file__).parents[2] / "recipes"
LEAST: dict[str, Any] = {"behavior": {"wanted": "Be kind.", "unwanted": "Be mean."}, "prompts": {"train": "p.jsonl"}}
HERE = Path("some/recipe.toml")


def fault(data: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, HERE)
    said = str(caught.value)
    assert said.startswith(f"{HERE}: ") and "\n" not in said
    return said


def with_(**tables: Any) -> dict[str, Any]:
    return {name: {**LEAST.get(name, {}), **tables.get(name, {})} for name in {**LEAST, **tables}}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_load_and_say_what_they_need(path: Path) -> None:
    recipe = load_recipe(path)
    head = [line for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    assert any("GiB" in line for line in head) and any(f"iqlite train recipes/{path.name}" in line for line in head)
    if path.stem.endswith("135m"):
        train = load_prompts(recipe.prompts.train, beside=recipe.folder, key="prompts.train")
        held_out = load_prompts(recipe.prompts.eval, beside=recipe.folder, key="prompts.eval")  # type: ignore[arg-type]
        assert len(train) >= 200 and len(held_out) == 64 and not train.notes and not held_out.notes
        assert not set(map(str, train.requests)) & set(map(str, held_out.requests))


def test_a_shipped_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cheerful-135m", "cheerful-135m.toml", "recipes/cheerful-135m.toml", "elsewhere/cheerful-135m.toml"):
        assert load_recipe(Path(name)).path == shipped_recipes() / "cheerful-135m.toml"
    (tmp_path / "cheerful-135m.toml").write_text(tomli_w.dumps(LEAST), "utf-8")
    assert load_recipe(Path("cheerful-135m.toml")).behavior.wanted == "Be kind."  # one's own goes first
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(LEAST), "utf-8")
    for name, said in (
        ("harmles-7b", "harmless-7b"),
        ("mine", "mine.toml"),
        ("runs/cheerful-135m", "cheerful-135m"),
        ("harmless-7b.tml", "harmless-7b"),
    ):
        with pytest.raises(RecipeError, match=rf"^{name}: no such recipe; did you mean {said}\?$"):
            load_recipe(Path(name))
    assert out_path(load_recipe(Path("harmless-7b")), None) == Path("harmless-7b-aimed.toml")  # not among the package's files


def test_a_run_is_no_recipe_and_its_command_is_given(tmp_path: Path, iqlite: Callable[..., tuple[int, str, str]]) -> None:
    run = tmp_path / "runs" / "kind"
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text(tomli_w.dumps(LEAST), "utf-8")
    (run / "environment.json").write_text("{}", "utf-8")
    code, _, err = iqlite("train", "runs/kind")
    assert code == 2 and err.endswith("iqlite train runs/kind/recipe.toml --out runs/kind --resume\n") and "is a run and no recipe" in err


def test_the_shipped_set_is_the_promised_one() -> None:
    names = {path.stem for path in RECIPES.glob("*.toml")}
    assert names == {
        "cheerful-135m",
        "concise-135m",
        "harmless-7b",
        "harmless-13b",
        "helpful-harmless-7b",
        "concise-7b",
        "kind-4b",
        "concise-8b",
        "harmless-12b",
    }
    for name in ("harmless-7b", "harmless-13b"):
        recipe = load_recipe(RECIPES / f"{name}.toml")
        assert recipe.train.epochs == 6 and recipe.train.until_converged
        assert isinstance(recipe.prompts.train, tuple) and all(isinstance(s, HubPrompts) for s in recipe.prompts.train)


def test_what_is_required_depends_on_the_estimator() -> None:
    assert parse_recipe(LEAST, HERE).superior.estimator == "contrastive"
    said = fault({"prompts": {"train": "p"}, "behavior": {"wanted": "Be kind."}})
    assert "behavior.unwanted is missing" in said and '"prompted"' in said
    assert "behavior.wanted is missing" in fault({"prompts": {"train": "p"}})
    assert "prompts.train is missing" in fault({"behavior": LEAST["behavior"], "prompts": {}})
    assert "prompts is missing" in fault({"behavior": LEAST["behavior"]})
    told = {"prompts": {"train": "p"}, "behavior": {"wanted": "Be kind."}, "superior": {"estimator": "prompted"}}
    assert parse_recipe(told, HERE).behavior.unwanted is None
    assert "superior.adapter is missing" in fault({"prompts": {"train": "p"}, "superior": {"estimator": "adapter"}})
    assert parse_recipe({"prompts": {"train": "p"}, "superior": {"estimator": "adapter", "adapter": "a"}}, HERE)
    assert "behavior.mixture is empty" in fault({"prompts": {"train": "p"}, "superior": {"estimator": "mixture"}})
    two: list[dict[str, Any]] = [
        {"name": "kind", "wanted": "Be kind.", "unwanted": "Be mean."},
        {"name": "short", "weight": 2.0, "wanted": "Be short.", "unwanted": "Be long."},
    ]
    mixed = {"prompts": {"train": "p"}, "superior": {"estimator": "mixture"}, "behavior": {"mixture": two}}
    assert [p.weight for p in parse_recipe(mixed, HERE).behavior.mixture] == [1.0, 2.0]
    assert 'set superior.estimator = "mixture"' in fault({"prompts": {"train": "p"}, "behavior": {"mixture": two} | LEAST["behavior"]})
    two[1]["name"] = "kind"
    assert "share a name" in fault(mixed)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"train": {"lerning_rate": 1e-4}}, "train.lerning_rate isn't a key of a recipe; did you mean learning_rate?"),
        ({"trian": {"steps": 3}}, "trian isn't a key of a recipe; did you mean train?"),
        ({"superior": {"strenght": 2.0}}, "superior.strenght isn't a setting of 'contrastive'; did you mean strength?"),
        ({"superior": {"estimatr": "prompted"}}, "superior.estimatr isn't a setting of 'contrastive'; did you mean estimator?"),
        ({"objective": {"gama": 0.5, "name": "policy-gradient"}}, "objective.gama isn't a setting of 'policy-gradient'; did you mean gamma?"),
        ({"superior": {"estimator": "contrastiv"}}, "superior.estimator = 'contrastiv' isn't known; choose one of: contrastive, prompted, adapter, mixture"),
        ({"objective": {"name": "dpo"}}, "objective.name = 'dpo' isn't known; choose one of: squared"),
        ({"train": {"learning_rate": -1e-4}}, "train.learning_rate = -0.0001: input should be greater than 0"),
        ({"train": {"learning_rate": "1e-4"}}, "train.learning_rate = '1e-4': input should be a valid number"),
        ({"train": {"steps": 2.5}}, "train.steps = 2.5: input should be a valid integer"),
        ({"train": {"steps": 5, "epochs": 1.0}}, "train.steps and train.epochs are both given; keep one of them"),
        ({"behavior": {"unwanted": "Be  kind."}}, "wanted and unwanted say the same"),
        ({"behavior": {"wanted": ""}}, "behavior.wanted = ''"),
        ({"behavior": {"placement": "top"}}, "behavior.placement = 'top': input should be 'auto', 'system' or 'user'"),
        ({"behavior": {"demonstrations": [{"user": "Tea?", "wanted": "Yes."}]}}, "behavior.demonstrations.0.unwanted is missing"),
        ({"superior": {"strength": "3"}}, "superior.strength = '3' must be a number"),
        ({"superior": {"strength": -1.0}}, "superior.strength = -1.0 must be between 0 and 1000"),
        ({"superior": {"strength": float("nan")}}, "superior.strength = nan must be between 0 and 1000"),
        ({"superior": {"plausibility": 2.0}}, "superior.plausibility = 2.0 must be between 0 and 1"),
        ({"objective": {"name": "policy-gradient", "centre": 1}}, "objective.centre = 1 must be true or false"),
        ({"prompts": {"train": 7}}, "prompts.train = 7"),
        ({"prompts": {"train": {"dataset": "a/b", "colum": "x"}}}, "prompts.train.colum isn't a key of a recipe; did you mean column?"),
        ({"train": 5}, "train = 5"),
    ],
)  # fmt: skip
def test_faults_name_key_value_and_fix(tables: dict[str, Any], expected: str) -> None:
    data = {**LEAST, **tables} if not all(isinstance(t, dict) for t in tables.values()) else with_(**tables)
    said = fault(data)
    assert expected in said
    assert said.endswith((".", "?", ")")) and not said.endswith("?.") and "pydantic" not in said and "constrained" not in said


def test_set_changes_a_key_and_steps_clear_epochs(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(with_(train={"epochs": 2.0})), "utf-8")
    recipe = load_recipe(
        path, ["train.steps=7", "rollout.temperature=0.8", "model.base=some/model", "superior.strength = 2", "train.until_converged=true"]
    )
    assert (recipe.train.steps, recipe.train.epochs) == (7, None)
    assert recipe.rollout.temperature == 0.8 and recipe.model.base == "some/model" and recipe.train.until_converged
    assert recipe.superior.settings() == {"strength": 2, "clip": 5.0, "plausibility": 1e-4}
    assert load_recipe(path, ["train.steps=7", "train.epochs=3.0"]).train.steps is None
    for wrong, said in (("steps=7", "table.key=value"), ("train.steps", "table.key=value"), ("train.steps.more=1", "isn't a table"), ("train.stesp=1", "did you mean steps?")):  # fmt: skip
        with pytest.raises(RecipeError, match=said.replace("?", r"\?")):
            load_recipe(path, [*(["train.steps=7"] if "more" in wrong else []), wrong])


def test_steps_of_a_run() -> None:
    assert parse_recipe(LEAST, HERE).total_steps(100) == 20
    assert parse_recipe(with_(train={"steps": 7}), HERE).total_steps(100) == 7
    assert parse_recipe(with_(train={"epochs": 1.5}, rollout={"prompts_per_step": 8}), HERE).total_steps(100) == 19


def test_a_recipe_is_frozen_and_its_fields_have_one_sentence_each() -> None:
    recipe = parse_recipe(LEAST, HERE)
    with pytest.raises(Exception, match="frozen"):
        recipe.train.steps = 3  # type: ignore[misc]
    rows = keys()
    settings = tuple(f"{name}{sign}" for name in (*ESTIMATORS, *OBJECTIVES) for sign in ",:")
    assert all(row.what.endswith(".") and bool(row.what[0].isupper() or row.what.startswith(("nf4", "auto", *settings))) for row in rows)
    assert len({row.key for row in rows}) == len(rows)
    tables = [field.annotation for field in Recipe.model_fields.values()]
    count = sum(len(t.model_fields) for t in tables if isinstance(t, type) and issubclass(t, BaseModel))
    assert (
        count <= 54
    )  # 50 of training (contrary prompts: 2, thinking: 2, backend: 1, offload: 1), 3 of judging, 1 of trackers: each needs a user
    assert {row.key for row in rows} >= {f"behavior.mixture[].{n}" for n in Principle.model_fields} | {f"behavior.demonstrations[].{n}" for n in Demonstration.model_fields}  # fmt: skip


def test_keys_are_listed_with_choices_and_settings_once(iqlite: Callable[..., tuple[int, str, str]]) -> None:
    choices = {row.key: row.choices for row in keys() if row.choices}
    assert choices["superior.estimator"] == tuple(ESTIMATORS) and choices["objective.name"] == tuple(OBJECTIVES)
    assert set(choices["judge.measure"]) == set(NAMES) == set(ABOUT)
    assert choices["behavior.placement"] == ("auto", "system", "user") and choices["prompts.*.label"] == ("refuse", "answer")
    assert not {"model.base", "rollout.batch", "train.steps"} & set(choices)  # other values are possible too
    code, out, _ = iqlite("recipe", "STRENGTH")
    assert code == 0 and out.splitlines() == [
        "superior.strength = 3.0",
        "    contrastive, prompted, adapter, mixture: 1/β, how far beyond the base the target lies. By default 1.0 for prompted and adapter.",
    ]
    code, out, _ = iqlite("recipe", "measure")
    assert "tone | shorter" in out and all(f"    {name}: {about}\n" in out for name, about in ABOUT.items())
    rows = json.loads(iqlite("recipe", "train.s", "--json")[1])
    assert [row["key"] for row in rows] == ["train.steps", "train.schedule", "train.seed"]
    assert rows[1] == {"key": "train.schedule", "default": "cosine", "what": rows[1]["what"], "choices": ["cosine", "constant"]}
    code, _, err = iqlite("recipe", "strenght")
    assert code == 2 and "did you mean superior.strength?" in err and err.count("\n") == 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_locked_recipe_means_the_same(estimator: str, objective: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    behaviours: dict[str, dict[str, Any]] = {
        "mixture": {"mixture": [{"name": "kind", "wanted": "Be kind.", "unwanted": "Be mean."}]},
        "adapter": {},
        "prompted": {"wanted": "Be kind."},
        "contrastive": {**LEAST["behavior"], "demonstrations": [{"user": "Tea?", "wanted": "Yes!", "unwanted": "No."}]},
    }
    data = {
        "model": {"base": "base"},
        "adapter": {"start": "before"},
        "behavior": behaviours[estimator],
        "prompts": {"train": ["p.jsonl", {"dataset": "a/b", "limit": 3}], "eval": "q.jsonl"},
        "superior": {"estimator": estimator} | ({"adapter": "told"} if estimator == "adapter" else {}),
        "objective": {"name": objective},
    }
    recipe = parse_recipe(data, tmp_path / "recipe.toml")
    (tmp_path / "runs").mkdir()
    again = parse_recipe(tomllib.loads(tomli_w.dumps(locked(recipe))), tmp_path / "runs" / "recipe.toml")
    assert locked(again) == locked(recipe)
    assert again.model.base == str(tmp_path / "base") and again.adapter.start == str(tmp_path / "before")
    assert again.superior.settings() == recipe.superior.settings() and again.objective.settings() == recipe.objective.settings()
