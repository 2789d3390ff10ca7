"""What a wheel holds: `python -m tests.helpers.wheel dist/iqlite-….whl` fails where something is missing or too much. Needs no other package."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def expected() -> set[str]:
    """The package's own files that git or the folder has, and the recipes as its data."""
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "iqlite").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    recipes = {f"iqlite/data/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    return own | recipes


def faults(wheel: Path) -> list[str]:
    """What is wrong with a wheel's contents, a line each."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        told = next(archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    found = [f"missing: {name}" for name in sorted(expected() - names)] + [f"too much: {name}" for name in sorted(names - expected())]
    return found + [f"no {line}" for line in ("Requires-Python: >=3.11", "License-Expression: Apache-2.0") if line not in told]


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    print("\n".join(wrong) or f"{sys.argv[1]} holds what it should")
    sys.exit(bool(wrong))
