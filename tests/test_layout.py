"""The architecture: imports go down the levels, never sideways; what answers at once imports no torch; modules stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = (
    ("errors", "records", "intervals", "refusals", "recipe_faults", "sampling", "wording"),
    ("hub", "estimators", "objectives", "architectures", "identity"),
    ("recipe", "gguf_files"),
    ("rundir", "prompts", "monitors", "base", "judges", "linear", "keyvalues", "sizes", "memory"),
    ("chunked", "terminal", "fit", "timing", "merging", "gguf_metadata", "ollama", "card", "curves", "preferences", "judging"),
    ("policy", "gguf_writing"),
    ("decoding", "optimizer"),
    ("rollout", "superior"),
    ("session",),
    ("contrast", "measuring", "update", "merged"),
    ("train", "speaking", "answers"),
    ("aim", "baselines", "comparison", "probing", "safety"),
    ("improving", "peers"),
    ("aimed", "contenders"),
    ("commands",),
    ("cli",),
)
"""The architecture document; the README quotes it."""
VERBS = ("train", "compare", "init", "recipe", "plan", "bench", "chat", "merge", "export", "probe")
WITHOUT_TORCH = {"intervals", "refusals", "recipe_faults", "errors", "records", "hub", "estimators", "objectives", "recipe", "gguf_files", "architectures", "memory", "fit", "timing", "rundir", "prompts", "monitors", "judges", "terminal", "wording", "cli", "identity", "ollama", "card", "gguf_metadata", "gguf_writing"}  # fmt: skip
MODULES = sorted((ROOT / "iqlite").rglob("*.py"))
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names} | {"__main__": len(LEVELS), "__init__": -1}


def name_of(path: Path) -> str:
    return "commands" if path.parent.name == "commands" else path.stem


def imports(tree: ast.AST, *, everywhere: bool) -> Iterator[str]:
    """Full names of imported modules; at run time of the module's top only, or in functions and for type checkers too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                [f"{node.module}.{a.name}" for a in node.names] if node.module in ("iqlite", "iqlite.commands") else [str(node.module)]
            )
        elif everywhere or not (
            isinstance(node, (ast.FunctionDef, ast.Lambda)) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ):
            yield from imports(node, everywhere=everywhere)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_downward(path: Path) -> None:
    name = name_of(path)
    assert name in LEVEL_OF, f"{path} has no level: add it to LEVELS and to the README"
    for imported in imports(ast.parse(path.read_text("utf-8")), everywhere=True):
        package, _, below = imported.partition(".")
        if package == "iqlite" and below and below != "__version__":
            assert LEVEL_OF[below.split(".")[0]] < LEVEL_OF[name], f"{path} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_modules_are_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))


def test_no_torch_at_the_top_of_what_answers_at_once() -> None:
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "datasets"}
    for path in MODULES:
        if name_of(path) in WITHOUT_TORCH:
            found = {name.split(".")[0] for name in imports(ast.parse(path.read_text("utf-8")), everywhere=False)}
            assert not found & heavy, f"{path} imports {found & heavy}"


def test_the_readme_quotes_the_levels() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", readme, re.MULTILINE))
    assert len(rows) == len(LEVELS)
    for level, names in enumerate(LEVELS):
        assert set(re.findall(r"(?:^|· )`(\w+)`", rows[str(level)])) == set(names)
    assert {path.stem for path in (ROOT / "iqlite" / "commands").glob("[a-z]*.py")} == set(VERBS)
    assert all(f"`{verb}`" in rows[str(LEVEL_OF["commands"])] for verb in VERBS)


def test_the_root_holds_only_what_tools_ask_for() -> None:
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files are ours")
    expected = {"iqlite", "recipes", "tests", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "docs", ".ci", ".gitignore"}  # fmt: skip
    assert {line.split("/")[0] for line in listed.stdout.split()} == expected
