"""Files and data sets → rows, with their line numbers."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from iqlite.errors import PromptsError, first_line
from iqlite.places import path_of
from iqlite.recipe.requests import request_of
from iqlite.recipe.schema import HubPrompts

LONGEST_FIELD = 2**31 - 1  # of a CSV file; the library's own limit, 131,072 characters, is less than a long document


def rows_of(source: str | HubPrompts, beside: Path, key: str) -> Iterable[tuple[int, Any]]:
    """(line number, row) of a file or hub data set; a row that isn't readable comes as None."""
    if isinstance(source, HubPrompts):
        return _hub_rows(source, key)
    path = path_of(source, beside)
    if path.is_dir():
        return _saved(path, source, key)
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
        raise PromptsError(f"{key} = {source!r} can't be read: {first_line(error)}; mend the file.") from None


def _jsonl(path: Path) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _json(path: Path) -> Iterable[tuple[int, Any]]:
    """A list of rows, such a list under a name of its own, or JSON lines that are called .json."""
    text = path.read_text("utf-8-sig")
    try:
        rows = json.loads(text)
    except ValueError:
        if sum(1 for line in text.splitlines() if line.strip().startswith("{") and line.strip().endswith("}")) > 1:
            return _jsonl(path)
        raise
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)]
        rows = lists[0] if len(lists) == 1 and request_of(rows, None) is None else [rows]
    if not isinstance(rows, list):
        raise ValueError("it isn't a list of rows")
    return enumerate(rows, 1)


def _csv(path: Path) -> Iterable[tuple[int, Any]]:
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [(number, dict(row)) for number, row in enumerate(csv.DictReader(file), 2)]


def _parquet(path: Path) -> Iterable[tuple[int, Any]]:
    import pyarrow.parquet

    return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)


def _lines(path: Path) -> Iterable[tuple[int, Any]]:
    return [(number, line) for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1) if line.strip()]


def _saved(path: Path, source: str, key: str) -> Iterable[tuple[int, Any]]:
    """A folder that datasets' save_to_disk wrote."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if part.is_dir())
        raise PromptsError(
            f"{key} = {source!r} holds several splits: name one of {', '.join(repr(f'{source}/{split}') for split in splits)}."
        )
    if not (path / "state.json").is_file():
        raise PromptsError(f"{key} = {source!r} is a folder: name a file in it, or a folder that datasets' save_to_disk wrote.")
    from datasets import load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        return enumerate(load_from_disk(str(path)), 1)
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        raise PromptsError(f"{key} = {source!r} can't be read: {first_line(error)}; save it again.") from None


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def check_dataset(name: str, key: str) -> None:
    """PromptsError for what isn't a data set's id on the hub: a path, or a builder of the datasets library, of which some unpickle files."""
    from datasets import packaged_modules

    builders = {*packaged_modules._PACKAGED_DATASETS_MODULES, "pandas", "cache", "generator", "sql", "spark"}
    if name.lower() in builders:
        raise PromptsError(
            f'{key}: {name!r} is a reader of the datasets library and no data set: name a file beside the recipe ({key} = "prompts.jsonl"), or a data set as OWNER/NAME.'
        )
    if not HUB_ID.fullmatch(name) and not path_of(name).is_dir():
        raise PromptsError(
            f"{key}: {name[:200]!r} is neither a data set's id on the hub nor a folder here: name a file by its path alone, or a data set as OWNER/NAME."
        )


def _hub_rows(source: HubPrompts, key: str) -> Iterable[tuple[int, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    check_dataset(source.dataset, key)
    try:
        rows = load_dataset(source.dataset, source.config, data_dir=source.folder, split=source.split)
    except (OSError, DatasetNotFoundError) as error:
        if "space" in str(error).lower():
            raise PromptsError(
                f"{key}: no space left on the disk that holds the data set {source.dataset!r}: free some, or set HF_HOME."
            ) from None
        raise PromptsError(
            f"{key}: the data set {source.dataset!r} isn't in the local cache and the hub can't be reached, or has no such public data set: connect to the network, or name a local file."
        ) from None
    except (ValueError, KeyError, RuntimeError, DatasetsError) as error:
        said = " ".join(str(error).split())
        names = re.search(r"available configs: \[([^\]]*)\]", said) or re.search(r"Available: \[([^\]]*)\]", said)
        if names:
            raise PromptsError(
                f"{key}: the data set {source.dataset!r} has several configurations: set config to one of {names[1]}."
            ) from None
        raise PromptsError(
            f"{key}: the data set {source.dataset!r} can't be read ({first_line(error)}): check its split, config and folder."
        ) from None
    for column in (source.column, source.category):
        if column is not None and column not in rows.column_names:
            raise PromptsError(f"{key}: the data set {source.dataset!r} has no column {column!r}; it has: {', '.join(rows.column_names)}.")
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    return enumerate(rows, 1)
