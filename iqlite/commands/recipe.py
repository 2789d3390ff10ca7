"""`iqlite recipe`: every key of a recipe, read off its definition."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console

from iqlite.commands.options import Json
from iqlite.errors import RecipeError
from iqlite.terminal import clean
from iqlite.terminal import console as terminal

MEASURE = "judge.measure"
INDENT = "    "
EXAMPLES = (
    "iqlite recipe strength",
    "iqlite recipe measure",
)


@dataclass(frozen=True)
class Key:
    """A key of a recipe: its default (None for none), what it does, and the values it takes where these are fixed."""

    key: str
    default: Any
    what: str
    choices: tuple[str, ...] = ()


def recipe(
    part: Annotated[str, typer.Argument(metavar="FILTER", help="Only keys with this in their name, such as strength.")] = "",
    as_json: Json = False,
) -> None:
    """List the keys of a recipe: defaults, choices, meaning."""
    from iqlite.scoring.measures import ABOUT

    console = terminal(stderr=as_json)
    known = keys()
    rows = [row for row in known if part.lower() in row.key]
    if not rows:
        names = {row.key.rpartition(".")[2]: row.key for row in known} | {row.key: row.key for row in known}
        near = difflib.get_close_matches(part.lower(), names, 1, 0.5)
        raise RecipeError(
            f"no key of a recipe has {part!r} in it" + (f"; did you mean {names[near[0]]}?" if near else "; iqlite recipe lists all.")
        )
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    for row in rows:
        choices = f"  [dim]{clean(' | '.join(row.choices))}[/]" if row.choices else ""
        console.print(f"[bold]{clean(row.key)}[/] = {clean('' if row.default in (None, ()) else str(row.default))}{choices}")
        _below(console, row.what)
    if any(row.key == MEASURE for row in rows):
        console.print("[bold]measures[/]")
        for name, about in ABOUT.items():
            _below(console, f"{name}: {about}")


def _below(console: Console, text: str) -> None:
    """Indented, and as wide as the terminal is; elsewhere on one line."""
    width = console.width if console.is_terminal else len(text) + len(INDENT)
    console.print(textwrap.fill(text, width, initial_indent=INDENT, subsequent_indent=INDENT), markup=False)


def keys() -> list[Key]:
    """Every field of a recipe, and the settings of estimators and objectives."""
    from iqlite.method import estimators, objectives
    from iqlite.recipe.schema import Demonstration, HubPrompts, Principle, Recipe

    found: list[Key] = []
    registries = {
        "superior": ("estimator", estimators.ESTIMATORS, estimators.SETTINGS),
        "objective": ("name", objectives.OBJECTIVES, objectives.SETTINGS),
    }
    for table, field in Recipe.model_fields.items():
        found += _of(table, field.annotation)
        if table in registries:
            name, functions, meanings = registries[table]
            found = [replace(row, choices=tuple(functions)) if row.key == f"{table}.{name}" else row for row in found]
            found += _settings(table, functions, meanings)
    for table, kind in (("behavior.demonstrations[]", Demonstration), ("behavior.mixture[]", Principle), ("prompts.*", HubPrompts)):
        found += _of(table, kind)
    return found


def _of(table: str, kind: Any) -> Iterator[Key]:
    for name, field in kind.model_fields.items():
        default = None if field.is_required() else field.get_default()
        yield Key(f"{table}.{name}", default, field.description or "", _choices(field.annotation))


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values of a Literal, or of one that may be left out; none where others are possible too."""
    kinds = [kind for kind in (get_args(annotation) if get_origin(annotation) is not Literal else (annotation,)) if kind is not type(None)]
    return get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else ()


def _settings(table: str, functions: Mapping[str, Callable[..., Any]], meanings: Mapping[str, str]) -> Iterator[Key]:
    """Each setting once, with the functions that take it; its default is the first one's, and others' are told."""
    from iqlite.recipe.schema import settings_of

    defaults: dict[str, dict[str, Any]] = {}
    for name, function in functions.items():
        for setting, default in settings_of(function).items():
            defaults.setdefault(setting, {})[name] = default
    for setting, of in defaults.items():
        default, *rest = dict.fromkeys(of.values())
        others = ", ".join(f"{one} for {' and '.join(name for name, value in of.items() if value == one)}" for one in rest)
        yield Key(f"{table}.{setting}", default, f"{', '.join(of)}: {meanings[setting]}" + (f" By default {others}." if others else ""))
