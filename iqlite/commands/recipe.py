"""`iqlite recipe`: every key of a recipe, read off its definition."""

from __future__ import annotations

import json
from typing import Any

from iqlite.commands.options import Json
from iqlite.terminal import clean, table
from iqlite.terminal import console as terminal


def recipe(as_json: Json = False) -> None:
    """List every key of a recipe with its default and what it does."""
    console = terminal(stderr=as_json)
    rows = keys()
    if as_json:
        print(json.dumps([{"key": key, "default": default, "what": what} for key, default, what in rows]))
    else:
        shown = [(key, clean("" if default is None else str(default)), clean(what)) for key, default, what in rows]
        made = table("keys of a recipe", ("key", "default", "what it does"), shown)
        made.columns[1].justify = made.columns[2].justify = "left"
        console.print(made)


def keys() -> list[tuple[str, Any, str]]:
    """(key, default, what it does) of every field, and of every estimator's and objective's settings."""
    from iqlite.method.estimators import ESTIMATORS
    from iqlite.method.objectives import OBJECTIVES
    from iqlite.recipe.schema import Demonstration, HubPrompts, Principle, Recipe, settings_of

    found: list[tuple[str, Any, str]] = []
    for table_name, field in Recipe.model_fields.items():
        found += _of(table_name, field.annotation)
    found += [
        row
        for name, kind in (("behavior.demonstrations[]", Demonstration), ("behavior.mixture[]", Principle), ("prompts.*", HubPrompts))
        for row in _of(name, kind)
    ]
    for table_name, functions in (("superior", ESTIMATORS), ("objective", OBJECTIVES)):
        for name, function in functions.items():
            found += [(f"{table_name}.{setting}", default, f"A setting of {name}.") for setting, default in settings_of(function).items()]
    return found


def _of(prefix: str, kind: Any) -> list[tuple[str, Any, str]]:
    rows = []
    for name, field in kind.model_fields.items():
        default = None if field.is_required() else field.get_default()
        rows.append((f"{prefix}.{name}", default, field.description or ""))
    return rows
