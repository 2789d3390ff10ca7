"""The architecture: a wing imports only wings before it, no circles; what answers at once imports no torch; modules stay small."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WINGS = (
    "errors", "integrity", "streams", "records", "places", "unforeseen", "terminal", "device",
    "method", "base", "model", "recipe", "machine", "scoring", "run", "training",
    "chat", "export", "serving", "baselines", "evaluation", "aim", "showing", "api", "commands", "cli",
)  # fmt: skip
"""A wing imports only wings before it; docs/architecture.md says in a sentence what each is about."""
MODULES = sorted((ROOT / "iqlite").rglob("*.py"))


def name_of(path: Path) -> str:
    """A module's name below iqlite: base.loading, commands.train, errors."""
    return ".".join(path.relative_to(ROOT / "iqlite").with_suffix("").parts).removesuffix(".__init__")


def wing_of(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Our modules and others that one imports; at run time of the module's top only, or in functions and for type checkers too."""
    names = {name_of(one) for one in MODULES}

    def walk(tree: ast.AST) -> Iterator[str]:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield full if full.removeprefix("iqlite.") in names else str(node.module)
            elif everywhere or not (
                isinstance(node, (ast.FunctionDef, ast.Lambda)) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            ):
                yield from walk(node)

    return walk(ast.parse(path.read_text("utf-8")))


def ours(path: Path) -> set[str]:
    found = {name.removeprefix("iqlite.") for name in imports(path) if name.startswith("iqlite.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_wing_imports_only_wings_before_it(path: Path) -> None:
    name = name_of(path)
    if name in ("__init__", "__main__"):
        return
    assert wing_of(name) in WINGS, f"{path} stands in no wing: add it to WINGS and to docs/architecture.md"
    for imported in ours(path):
        if wing_of(imported) != wing_of(name):
            assert WINGS.index(wing_of(imported)) < WINGS.index(wing_of(name)), f"{name} imports {imported}"


def test_no_circles() -> None:
    graph = {name_of(path): ours(path) for path in MODULES}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)) or path.name == "__main__.py"


def test_no_wing_imports_anything_by_being_imported() -> None:
    for path in MODULES:
        if path.name == "__init__.py" and path.parent.name != "iqlite":
            assert not list(imports(path)), f"{path} imports something"


def test_the_architecture_page_says_what_each_wing_is_about() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.*) \|$", page, re.MULTILINE)
    assert tuple(name for name, _, _ in rows) == WINGS
    for name, sentence, files in rows:
        folder = ROOT / "iqlite" / name
        assert re.findall(r"\w+", files) == sorted(path.stem for path in folder.glob("[a-z]*.py"))
        if folder.is_dir():
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) == sentence


def test_the_root_holds_only_what_tools_ask_for() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files are ours")
    expected = {"iqlite", "recipes", "tests", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "constraints-unsloth.txt", "docs", ".ci", ".gitignore", "CONTRIBUTING.md", "SECURITY.md", ".github", ".pre-commit-config.yaml"}  # fmt: skip
    assert {line.split("/")[0] for line in listed.stdout.split()} == expected
