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
from iqlite.recipe.prompts import load_prompts
from iqlite.recipe.reading import load_recipe, recipe_data
from iqlite.recipe.schema import Recipe, settings_of
from iqlite.run.files import free_name
from iqlite.run.rundir import with_absolute_paths

SHIPPED = {
    "train": Path("prompts/harmful.jsonl"),
    "eval": Path("prompts/harmful-heldout.jsonl"),
    "contrary": Path("prompts/lookalikes.jsonl"),
}


def two_sided(recipe: Recipe) -> tuple[Recipe, str]:
    """(recipe, what was changed) for recipes about refusing.

    A measure of refusals alone is pleased by a model that refuses everything, so that look-alikes come in. And prompts that nobody has
    labelled are partly harmless (half of HH-RLHF's): the superior policy refuses these too, and training on them teaches the policy to refuse
    anything. In their place come requests that should be refused without doubt.
    """
    if recipe.judge.measure not in ("refusal", "harmless"):
        return recipe, ""
    changed, said = {}, []
    if recipe.prompts.contrary is None:
        changed["contrary"] = str(shipped_recipes() / SHIPPED["contrary"])
        said.append("prompts.contrary is the shipped set of harmless look-alikes")
    if not _labelled(recipe):
        changed |= {key: str(shipped_recipes() / SHIPPED[key]) for key in ("train", "eval")}
        said.append(
            "prompts.train and prompts.eval are the shipped harmful requests, since yours have no labels, and training on the harmless ones "
            "among them would teach to refuse anything"
        )
    if recipe.judge.measure == "refusal":
        said.append("judge.measure is harmless, since refusal alone would be pleased by a model that refuses everything")
    judge = recipe.judge.model_copy(update={"measure": "harmless"})
    new = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update=changed), "judge": judge})
    return new, "; ".join(said)


def _labelled(recipe: Recipe) -> bool:
    """True if the training prompts say of themselves that they should be refused."""
    prompts = load_prompts(recipe.prompts.train, beside=recipe.folder, key=f"{recipe.path}: prompts.train")
    return bool(prompts.expected) and all(one == "refuse" for one in prompts.expected)


def out_path(recipe: Recipe, out: Path | None) -> Path:
    """Where the new recipe goes: `out`, or NAME-aimed.toml beside the old one (here for one that comes with iqlite); RecipeError if there is something already."""
    if out is None:
        folder = Path() if recipe.folder == shipped_recipes() else recipe.folder
        return free_name(folder, f"{recipe.path.stem}-aimed", ".toml")
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
        data = with_absolute_paths(data, old.folder)
    _put(data, best)
    text = "".join(f"# {line}\n" for line in reason) + "\n" + tomli_w.dumps(data)
    making = path.with_name(f".making-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for key in _from_shipped(best.recipe):
            if not (path.parent / SHIPPED[key]).exists():
                (path.parent / SHIPPED[key]).parent.mkdir(exist_ok=True)
                shutil.copyfile(shipped_recipes() / SHIPPED[key], path.parent / SHIPPED[key])
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
    data["prompts"] |= {key: SHIPPED[key].as_posix() for key in _from_shipped(recipe)}


def _from_shipped(recipe: Recipe) -> list[str]:
    """The keys of prompts that `two_sided` has set."""
    return [key for key, file in SHIPPED.items() if getattr(recipe.prompts, key) == str(shipped_recipes() / file)]
