"""pydantic's faults as one sentence with key, value and fix."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, recipe: type[BaseModel]) -> str:
    """The first fault as one sentence with key, value and fix; how many more there are."""
    faults = error.errors(include_url=False)
    # A union reports each of its branches: the fault that lies deepest is the one in the branch that was meant.
    first = max(faults, key=lambda fault: len(fault["loc"])) if all(f["loc"][:2] == faults[0]["loc"][:2] for f in faults) else faults[0]
    loc = [part for part in first["loc"] if not (isinstance(part, str) and ("[" in part or part in UNION_BRANCHES))]
    key = ".".join(str(part) for part in loc)
    if first["type"] == "extra_forbidden":
        table = recipe if len(loc) == 1 else _table_at(recipe, loc[:-1])
        return f"{key} isn't a key of a recipe{nearest(str(loc[-1]), list(table.model_fields)) if table else '.'}"
    if first["type"] == "missing":
        return f"{key} is missing; add it" + (' (for example train = "prompts.jsonl").' if key == "prompts.train" else ".")
    if first["type"] == "value_error":
        return _ended(str(first["ctx"]["error"]))
    if first["type"] == "model_type":
        return f"{key} = {shown(first['input'])} must be a table of keys, [{key}]."
    message = first["msg"][0].lower() + first["msg"][1:]
    table = _table_at(recipe, loc[:-1])
    field = table.model_fields.get(str(loc[-1])) if table else None
    return f"{key} = {shown(first['input'])}: {message}" + (f" ({field.description})" if field is not None and field.description else ".")


def shown(value: Any) -> str:
    """A value as a message repeats it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python spells no integer of more than 4,300 digits
        return "a number of thousands of digits" if isinstance(value, int) else "a value that can't be shown"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


LONGEST_SHOWN = 120  # characters of a value in a message; our choice
UNION_BRANCHES = ("HubPrompts", "str", "constrained-str", "int", "constrained-int")  # what pydantic calls the alternatives of `Source`


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?")) else sentence + "."


def _table_at(recipe: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel] | None:
    """The table class at a place in the recipe, for names of keys."""
    table: Any = recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = table.model_fields.get(part)
        if field is None:
            return None
        kinds = [field.annotation, *(k for a in get_args(field.annotation) for k in (a, *get_args(a)))]
        table = next((k for k in kinds if inspect.isclass(k) and issubclass(k, BaseModel)), None)
        if table is None:
            return None
    return table  # type: ignore[no-any-return]


def nearest(name: str, known: Sequence[str]) -> str:
    """What an unknown name may have meant, as the end of a sentence."""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}."
