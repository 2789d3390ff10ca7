"""Prompt sets: read from files and data sets, cleaned, labelled, held back."""

from __future__ import annotations

import functools
import json
import operator
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iqlite.base.hub import offline_without_network
from iqlite.errors import PromptsError
from iqlite.recipe.faults import explain
from iqlite.recipe.requests import request_of
from iqlite.recipe.rows import rows_of
from iqlite.recipe.schema import HubPrompts
from iqlite.records import Messages, Prompts

LABELS = ("category", "language")
EXPECTED = {
    **dict.fromkeys(("refuse", "unsafe", "harmful"), "refuse"),
    **dict.fromkeys(("answer", "safe", "harmless"), "answer"),
}  # what a row's label (or kind) says is right, for the measure harmless
NAMED_LINES = 5  # line numbers listed in a note before it says "and N more"


def load_prompts(source: str | HubPrompts | Sequence[str | HubPrompts], *, beside: Path, key: str) -> Prompts:
    """Reads one prompt set or several after one another. Empty, duplicate and malformed rows are dropped and counted in notes."""
    sources = [source] if isinstance(source, (str, HubPrompts)) else list(source)
    sets = [_load_one(one, beside, key) for one in sources]
    notes = tuple(note for prompts in sets for note in prompts.notes)
    together = functools.reduce(operator.add, sets)
    first = {json.dumps(request): number for number, request in reversed([*enumerate(together.requests)])}
    again = len(together) - len(first)
    if again:
        notes += (f"{name_of(source)}: {again} prompt{'s' * (again > 1)} that stood in an earlier source skipped.",)
    return together.some(sorted(first.values()), notes)


def load_asked(path: Path) -> Prompts:
    """What `--prompts` names: a file of prompts, or a .toml with the keys of a hub data set (dataset, split, column, category, limit)."""
    if path.suffix != ".toml":
        return load_prompts(str(path), beside=Path(), key="--prompts")
    try:
        source = HubPrompts.model_validate(tomllib.loads(path.read_text("utf-8-sig")))
    except ValidationError as error:
        raise PromptsError(f"--prompts {path}: {explain(error, HubPrompts)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PromptsError(f"--prompts {path} can't be read ({getattr(error, 'strerror', None) or error}).") from None
    offline_without_network()
    return load_prompts(source, beside=path.parent, key=f"--prompts {path}")


def name_of(source: str | HubPrompts | Sequence[str | HubPrompts]) -> str:
    """How messages name a prompt source."""
    if isinstance(source, str):
        return repr(source)
    if isinstance(source, HubPrompts):
        return repr(source.dataset)
    return ", ".join(name_of(one) for one in source)


def _load_one(source: str | HubPrompts, beside: Path, key: str) -> Prompts:
    name = name_of(source)
    column = source.column if isinstance(source, HubPrompts) else None
    requests: dict[str, Messages] = {}
    labels: list[str] = []
    expected: list[str] = []
    faults: dict[str, list[int]] = {"malformed": [], "empty": [], "duplicate": []}
    for number, row in rows_of(source, beside, key):
        request = request_of(row, column)
        if request is None:
            faults["malformed"].append(number)
        elif not request[-1]["content"]:
            faults["empty"].append(number)
        elif (as_text := json.dumps(request)) in requests:
            faults["duplicate"].append(number)
        else:
            requests[as_text] = request
            labels.append(_label(row, source.category if isinstance(source, HubPrompts) else None))
            said = row.get("label", row.get("kind")) if isinstance(row, dict) else None
            expected.append((source.label if isinstance(source, HubPrompts) else None) or EXPECTED.get(str(said).lower(), ""))
    notes = []
    for fault, lines in faults.items():
        if lines:
            more = f" and {len(lines) - NAMED_LINES} more" if len(lines) > NAMED_LINES else ""
            notes.append(
                f"{name}: {len(lines)} {fault} row{'s' * (len(lines) > 1)} skipped (line {', '.join(map(str, lines[:NAMED_LINES]))}{more})."
            )
    if not requests:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise PromptsError(f'{key} = {name} holds no usable prompt{why}: give it rows like {{"prompt": "How do I boil an egg?"}}.')
    return Prompts(tuple(requests.values()), tuple(notes), tuple(labels) if any(labels) else (), tuple(expected) if any(expected) else ())


def _label(row: Any, column: str | None) -> str:
    """A row's category and language: texts, numbers, or the true ones of several flags (as BeaverTails has them)."""
    found = [row.get(name) for name in (LABELS if column is None else (column,))] if isinstance(row, dict) else []
    labels = []
    for one in found:
        if isinstance(one, dict):
            one = " + ".join(sorted(str(name) for name, flag in one.items() if flag is True))
        labels += [str(one)] if isinstance(one, (str, int)) and str(one) else []
    return ", ".join(labels)


def hold_back(prompts: Prompts, key: str, share: float = 0.1) -> tuple[Prompts, Prompts]:
    """(train, held out): every tenth request (or another share of them) held back, at least one."""
    every = max(2, round(1 / share))
    if len(prompts) < 2:
        raise PromptsError(f"{key} holds one prompt only, and some are held back: give it more, or name prompts.eval.")
    held = range(every - 1, len(prompts), every) or range(len(prompts) - 1, len(prompts))
    return prompts.some([number for number in range(len(prompts)) if number not in held], prompts.notes), prompts.some(held)
