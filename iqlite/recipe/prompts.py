"""Files and hub data sets → requests → token ids: the same request plain, or under a wanted or unwanted description.

`load_prompts` reads and cleans a prompt set. `Chat` knows a tokenizer's template: where a description may stand, which tokens end
a turn, how requests become ids with exactly one BOS.
"""

from __future__ import annotations

import csv
import functools
import json
import operator
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iqlite.base.hub import offline_without_network
from iqlite.errors import PromptsError
from iqlite.recipe.faults import explain
from iqlite.recipe.schema import HubPrompts
from iqlite.records import Messages, Prompts

COLUMNS = ("prompt", "messages", "question", "instruction", "text", "chosen")
LABELS = ("category", "language")
EXPECTED = {
    **dict.fromkeys(("refuse", "unsafe", "harmful"), "refuse"),
    **dict.fromkeys(("answer", "safe", "harmless"), "answer"),
}  # what a row's label (or kind) says is right, for the measure harmless
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")
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
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PromptsError(f"--prompts {path} can't be read ({getattr(error, 'strerror', None) or error}).") from None
    except ValidationError as error:
        raise PromptsError(f"--prompts {path}: {explain(error, HubPrompts)}") from None
    offline_without_network()
    return load_prompts(source, beside=path.parent, key=f"--prompts {path}")


def name_of(source: str | HubPrompts | Sequence[str | HubPrompts]) -> str:
    """How messages name a prompt source."""
    if isinstance(source, str):
        return repr(source)
    if isinstance(source, HubPrompts):
        return repr(source.dataset)
    return ", ".join(name_of(one) for one in source)


def parse_request(value: Any) -> Messages | None:
    """A plain string, an HH transcript, or chat messages → the request (a last assistant turn is cut); None if it's none of these."""
    if isinstance(value, str):
        if TRANSCRIPT.match(value if value.startswith("\n\n") else "\n\n" + value):
            value = _transcript(value)
        else:
            value = [{"role": "user", "content": value}]
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, dict) for turn in value):
        return None
    turns = [{"role": turn.get("role"), "content": turn.get("content")} for turn in value]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    roles = [turn["role"] for turn in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(body)) or body[-1] != "user":
        return None
    if not all(isinstance(turn["content"], str) and is_text(turn["content"]) for turn in turns):
        return None
    return tuple({"role": turn["role"], "content": turn["content"].strip()} for turn in turns)


def is_text(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and no tokenizer can read."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _transcript(text: str) -> list[dict[str, str]]:
    pieces = TRANSCRIPT.split(text if text.startswith("\n\n") else "\n\n" + text)[1:]
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said} for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _load_one(source: str | HubPrompts, beside: Path, key: str) -> Prompts:
    name = name_of(source)
    column = source.column if isinstance(source, HubPrompts) else None
    requests: dict[str, Messages] = {}
    labels: list[str] = []
    expected: list[str] = []
    faults: dict[str, list[int]] = {"malformed": [], "empty": [], "duplicate": []}
    for number, row in _rows(source, beside, key):
        request = parse_request(_value(row, column))
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


def _value(row: Any, column: str | None) -> Any:
    if not isinstance(row, dict):
        return row
    if column is not None:
        return row.get(column)
    return next((row[name] for name in COLUMNS if row.get(name) is not None), None)


def _rows(source: str | HubPrompts, beside: Path, key: str) -> Iterable[tuple[int, Any]]:
    """(line number, row) of a file or hub data set; a row that isn't readable comes as None."""
    if isinstance(source, HubPrompts):
        return _hub_rows(source, key)
    path = beside / Path(source).expanduser()
    if not path.is_file():
        raise PromptsError(
            f'{key} = {source!r}: no such file ({path}); paths are relative to the recipe, and a hub data set is written {{ dataset = "…", split = "train" }}.'
        )
    readers: dict[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {
        ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _lines, "": _lines, ".md": _lines,
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        raise PromptsError(f"{key} = {source!r}: files ending in {path.suffix} can't be read; use .jsonl, .json, .csv, .parquet or .txt.")
    try:
        return list(readers[path.suffix.lower()](path))
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # UnicodeDecodeError and pyarrow's ArrowInvalid are ValueErrors
        raise PromptsError(f"{key} = {source!r} can't be read: {str(error).splitlines()[0]}; mend the file.") from None


def _jsonl(path: Path) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _json(path: Path) -> Iterable[tuple[int, Any]]:
    rows = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError("it isn't a list of rows")
    return enumerate(rows, 1)


def _csv(path: Path) -> Iterable[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [(number, dict(row)) for number, row in enumerate(csv.DictReader(file), 2)]


def _parquet(path: Path) -> Iterable[tuple[int, Any]]:
    import pyarrow.parquet

    return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)


def _lines(path: Path) -> Iterable[tuple[int, Any]]:
    return [(number, line) for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1) if line.strip()]


def _hub_rows(source: HubPrompts, key: str) -> Iterable[tuple[int, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        rows = load_dataset(source.dataset, data_dir=source.folder, split=source.split)
    except (OSError, DatasetNotFoundError) as error:
        if "space" in str(error).lower():
            raise PromptsError(
                f"{key}: no space left on the disk that holds the data set {source.dataset!r}: free some, or set HF_HOME."
            ) from None
        raise PromptsError(
            f"{key}: the data set {source.dataset!r} isn't in the local cache and the hub can't be reached, or has no such public data set: connect to the network, or name a local file."
        ) from None
    except (ValueError, KeyError, RuntimeError, DatasetsError) as error:
        raise PromptsError(
            f"{key}: the data set {source.dataset!r} can't be read ({str(error).splitlines()[0]}): check its split and folder."
        ) from None
    for column in (source.column, source.category):
        if column is not None and column not in rows.column_names:
            raise PromptsError(f"{key}: the data set {source.dataset!r} has no column {column!r}; it has: {', '.join(rows.column_names)}.")
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    return enumerate(rows, 1)


def hold_back(prompts: Prompts, key: str, share: float = 0.1) -> tuple[Prompts, Prompts]:
    """(train, held out): every tenth request (or another share of them) held back, at least one."""
    every = max(2, round(1 / share))
    if len(prompts) < 2:
        raise PromptsError(f"{key} holds one prompt only, and some are held back: give it more, or name prompts.eval.")
    held = range(every - 1, len(prompts), every) or range(len(prompts) - 1, len(prompts))
    return prompts.some([number for number in range(len(prompts)) if number not in held], prompts.notes), prompts.some(held)
