"""docs/json.md says what each verb prints with --json: the verbs run on a tiny model, and every field is in its table, with its type."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import tomli_w

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
Call = Callable[..., tuple[int, str, str]]
ELSEWHERE = ("iqlite eval RUN", "iqlite push RUN")  # they need programs, or a hub: their own tests check them
EMPTY: tuple[Any, ...] = (None, {}, [])
KINDS: dict[str, Any] = {"text": str, "number": (int, float), "integer": int, "true or false": bool}


def sections() -> dict[str, dict[str, str]]:
    """Field → type by command, as the page has them."""
    parts = re.split(r"^## `(iqlite [^`]+)`$", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return {
        command: dict(re.findall(r"^\| `([^`]+)` \| ([^|]+?) \| [^|]+ \|$", text, re.MULTILINE))
        for command, text in zip(parts[::2], parts[1::2], strict=True)
    }


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields that hold no other fields, as `measures[].score`."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from leaves(inner, f"{prefix}[]")
    else:
        yield prefix, value


def is_of(value: Any, kind: str) -> bool:
    """Whether a value is what the page calls it: text, `number or null`, `list of text`, …"""
    if kind.endswith(" or null"):
        return value is None or is_of(value, kind.removesuffix(" or null"))
    if kind.startswith("list of "):
        return isinstance(value, list) and all(is_of(one, kind.removeprefix("list of ")) for one in value)
    if kind == "anything":
        return True
    return isinstance(value, KINDS[kind]) and (kind == "true or false" or not isinstance(value, bool))


def fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern.replace("[]", "[[]]"))


def tables(pattern: str) -> set[str]:
    """The tables and lists that a field of the page is in: a.*.b[].c is in a, a.*, a.*.b."""
    parts = pattern.split(".")
    return {".".join(parts[:n]).removesuffix("[]") for n in range(1, len(parts))}


def check(command: str, found: Any) -> None:
    """Every field that is printed is on the page with its type, and every one on the page was printed, or a table that it is in was empty."""
    told, empty = sections()[command], set()
    for name, value in leaves(found):
        kinds = [kind for pattern, kind in told.items() if fits(name, pattern)]
        if kinds:  # the first that fits
            assert is_of(value, kinds[0].removeprefix("optional ")), f"{command}: {name} = {value!r} isn't {kinds[0]}"
        else:
            assert value in EMPTY and any(fits(name, table) for one in told for table in tables(one)), (
                f"{command}: {name} isn't on the page"
            )
            empty.add(name)
    names = {name for name, _ in leaves(found)}
    for pattern, kind in told.items():
        excused = kind.startswith("optional ") or any(fits(name, table) for name in empty for table in tables(pattern))
        assert excused or any(fits(name, pattern) for name in names), f"{command}: no {pattern} was printed"


def test_every_verb_prints_what_the_page_says(iqlite: Call, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IQLITE_CACHE", str(tmp_path / "cache"))  # what bench measures is none of another test's
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(data | {"train": {"steps": 2, "eval_every": 1}}), "utf-8")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n} good for?"}) + "\n" for n in range(40)), "utf-8")
    rows = [{"prompt": f"Why {n}?", "category": "ab"[n % 2]} for n in range(12)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pairs = [{"prompt": f"Why {n}?", "chosen": "Because.", "rejected": "No."} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), "utf-8")

    def printed(*arguments: str, code: int = 0) -> Any:
        done, out, err = iqlite(*arguments, "--json")
        assert done == code, err
        return json.loads(out)

    outputs = {
        "iqlite train RECIPE": printed("train", "recipe.toml", "--out", "run"),
        "iqlite compare RUN": printed("compare", "run", "--seeds", "1", "--prompts", "asked.jsonl"),
        "iqlite compare RUN --checkpoints": printed("compare", "run", "--checkpoints"),
        "iqlite inspect RECIPE": printed("inspect", "recipe.toml", "--count", "4"),
        "iqlite report RUN": printed("report", "run", "--count", "2"),
        "iqlite runs": printed("runs", "."),
        "iqlite runs cache": printed("runs", "cache"),
        "iqlite recipe": printed("recipe"),
        "iqlite plan RECIPE": printed("plan", "recipe.toml", "--card", "RTX 3060"),
        "iqlite plan --all": printed("plan", "--all"),
        "iqlite probe RECIPE": printed("probe", "recipe.toml", "--count", "4", "--strength", "1", "--pairs", "pairs.jsonl"),
        "iqlite probe RECIPE --improve": printed("probe", "recipe.toml", "--improve", "--minutes", "0.1"),
        "iqlite bench": printed("bench", "recipe.toml", "--steps", "1"),
        "iqlite chat": printed("chat", "run", "--prompt", "hello", "--tokens", "4"),
        "iqlite merge RUN": printed("merge", "run", "-o", "merged"),
        "iqlite export RUN": printed("export", "run", "--to", "gguf", "-o", "run.gguf"),
    }
    done, out, err = iqlite("doctor", "--json")
    assert done in (0, 1), err  # what is wrong here isn't this test's
    outputs["iqlite doctor"] = json.loads(out)
    assert set(outputs) == {command for command in sections() if command not in ELSEWHERE}
    for command, found in outputs.items():
        check(command, found)
