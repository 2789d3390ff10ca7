"""A recipe's file, or tables, read, changed by --set, and validated; every fault names the file, the key, the value and the fix."""

from __future__ import annotations

import copy
import difflib
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iqlite.errors import RecipeError, first_line
from iqlite.places import RECIPE, exists, is_run, shipped_recipes
from iqlite.recipe.faults import explain, shown
from iqlite.recipe.schema import Recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and validates a recipe; `overrides` are `table.key=value` with a TOML value. RecipeError names file, key, value and fix."""
    path = recipe_file(path)
    return parse_recipe(recipe_data(path, overrides), path)


def recipe_file(path: Path) -> Path:
    """The file that a path means: what is there, else the shipped recipe of that name (`cheerful-135m`, `recipes/cheerful-135m.toml`)."""
    shipped = shipped_recipes() / f"{path.name.removesuffix('.toml')}.toml"
    named = path.suffix == ".toml" or len(path.parts) == 1
    return shipped if named and shipped.is_file() and not exists(path) else path


def recipe_data(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe's file says, with the overrides, not validated yet."""
    try:
        data = tomllib.loads(path.read_text("utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        if is_run(path):
            again = shlex.join(["iqlite", "train", str(path / RECIPE), "--out", str(path), "--resume"])
            raise RecipeError(f"{path} is a run and no recipe; its training goes on with: {again}") from None
        known = {p.name: str(p) for p in path.parent.glob("*.toml")}
        known |= {p.stem: p.stem for p in shipped_recipes().glob("*.toml") if p.name not in known}
        near = difflib.get_close_matches(path.name, known, 1)
        hint = f"; did you mean {known[near[0]]}?" if near else "; write one with: iqlite init NAME --wanted … --unwanted …"
        raise RecipeError(f"{path}: no such recipe{hint}") from None
    except OSError as error:
        raise RecipeError(f"{str(path)[:200]} can't be read ({error.strerror}); check the file's name and rights.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} isn't UTF-8 text; name a recipe in TOML.") from None
    except (ValueError, RecursionError) as error:  # Python reads no integer of more than 4,300 digits
        raise RecipeError(f"{path} isn't valid TOML: {first_line(error)}.") from None
    return overridden(data, overrides)


def overridden(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A recipe's data, changed as by `--set`; RecipeError for what isn't table.key=value."""
    changed: dict[str, Any] = copy.deepcopy(dict(data))
    for override in overrides:
        _override(changed, override)
    return changed


def parse_recipe(data: Mapping[str, Any], path: Path) -> Recipe:
    """Validates a recipe's data as if it stood in `path`."""
    try:
        recipe = Recipe.model_validate(_tuples(data))
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, Recipe)}") from None
    object.__setattr__(recipe, "_path", path)
    return recipe


def to_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default and setting written out, ready for TOML."""
    data = recipe.model_dump(mode="json", exclude_none=True)
    data["superior"].update(recipe.superior.settings())
    data["objective"].update(recipe.objective.settings())
    return data


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or len(parts) < 2 or not all(parts):
        raise RecipeError(f"--set {shown(override)} must look like table.key=value, for example --set rollout.temperature=0.8")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()  # a bare word is a string
    table = data
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {shown(override)}: {part} isn't a table of the recipe")
    table[parts[-1]] = value
    if parts in (["train", "steps"], ["train", "epochs"]):
        table.pop("epochs" if parts[-1] == "steps" else "steps", None)


def _tuples(value: Any) -> Any:
    """Lists as tuples: frozen, and what strict validation of a tuple field wants."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
