"""The recipe that a search for a better aim ends in: the old file's tables with what was changed, and a comment that says why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from iqlite.aim.search import Candidate, Improved
from iqlite.errors import RecipeError
from iqlite.method.estimators import ESTIMATORS
from iqlite.places import shipped_recipes
from iqlite.recipe.schema import Recipe, load_recipe, recipe_data, settings_of
from iqlite.run.rundir import free_name, locked

LOOKALIKES = Path("prompts") / "lookalikes.jsonl"


def two_sided(recipe: Recipe) -> tuple[Recipe, str]:
    """(recipe, what was added): a measure of refusals alone is pleased by a model that refuses everything, so that look-alikes come in."""
    measure = recipe.judge.measure
    if measure not in ("refusal", "harmless") or (recipe.prompts.contrary is not None and measure == "harmless"):
        return recipe, ""
    prompts, added = recipe.prompts, ""
    if prompts.contrary is None:
        prompts = prompts.model_copy(update={"contrary": str(shipped_recipes() / LOOKALIKES)})
        added = "prompts.contrary is the shipped set of harmless look-alikes"
    judge = recipe.judge.model_copy(update={"measure": "harmless"})
    if measure == "refusal":
        added = f"{added and added + ', and '}judge.measure is harmless, since refusal alone would be pleased by a model that refuses everything"
    new = recipe.model_copy(update={"prompts": prompts, "judge": judge})
    object.__setattr__(new, "_path", recipe.path)
    return new, added


def out_path(recipe: Recipe, out: Path | None) -> Path:
    """Where the new recipe goes: `out`, or NAME-aimed.toml beside the old one; RecipeError if there is something already."""
    if out is None:
        return free_name(recipe.folder, f"{recipe.path.stem}-aimed", ".toml")
    if out.exists():
        raise RecipeError(f"-o {out} exists already: name another file.")
    if out.suffix != ".toml":
        raise RecipeError(f"-o {out} isn't named as a recipe is: end it in .toml.")
    return out


def write(path: Path, old: Recipe, overrides: Sequence[str], found: Improved, reason: Sequence[str]) -> None:
    """Writes the best candidate: what the old file said, with the changed keys, behind a comment; nothing half-written."""
    best = found.best
    data = recipe_data(old.path, overrides)
    if path.parent.resolve() != old.folder.resolve():  # relative paths would mean something else there
        data |= {table: locked(old)[table] for table in ("model", "prompts")}
    _put(data, best)
    text = "".join(f"# {line}\n" for line in reason) + "\n" + tomli_w.dumps(data)
    making = path.with_name(f".making-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if best.recipe.prompts.contrary == str(shipped_recipes() / LOOKALIKES) and not (path.parent / LOOKALIKES).exists():
            (path.parent / LOOKALIKES).parent.mkdir(exist_ok=True)
            shutil.copyfile(shipped_recipes() / LOOKALIKES, path.parent / LOOKALIKES)
        making.write_text(text, "utf-8")
        load_recipe(making)  # what wouldn't train isn't written
        os.replace(making, path)
    except OSError as error:
        raise RecipeError(f"{path} can't be written ({error.strerror}): name another -o.") from None
    finally:
        making.unlink(missing_ok=True)


def _put(data: dict[str, Any], best: Candidate) -> None:
    recipe = best.recipe
    behavior, superior = data.setdefault("behavior", {}), data.setdefault("superior", {})
    for name in ("wanted", "unwanted"):
        if getattr(recipe.behavior, name) is not None:
            behavior[name] = getattr(recipe.behavior, name)
    behavior["placement"] = best.placement
    if recipe.behavior.demonstrations:
        behavior["demonstrations"] = [d.model_dump() for d in recipe.behavior.demonstrations]
    for name in [name for name in superior if name not in type(recipe.superior).model_fields]:
        del superior[name]
    defaults = settings_of(ESTIMATORS[recipe.superior.estimator])
    superior |= {"estimator": recipe.superior.estimator} | {
        n: v for n, v in recipe.superior.settings().items() if v != defaults[n] or n == "strength"
    }
    data.setdefault("judge", {})["measure"] = recipe.judge.measure
    if recipe.prompts.contrary == str(shipped_recipes() / LOOKALIKES):
        data["prompts"]["contrary"] = LOOKALIKES.as_posix()
