"""The pages that are written from the code: docs/keys.md and docs/commands.md. `python -m tests.helpers.generated` rewrites them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from iqlite.cli import app
from iqlite.commands.recipe import keys

DOCS = Path(__file__).parent.parent.parent / "docs"
WIDTH = 120
NOTE = "<!-- Written from the code by `python -m tests.helpers.generated`; tests/whole/test_docs.py holds it against the code. -->"


def keys_page() -> str:
    """Every key of a recipe by table, with its default."""
    lines = [NOTE, "", "# Keys of a recipe", ""]
    lines += ["Every key with its default, as `iqlite recipe` prints them. [Recipes](recipes.md) explains the tables.", ""]
    tables: dict[str, list[str]] = {}
    for row in keys():
        table, _, name = row.key.rpartition(".")
        choices = f" One of {', '.join(f'`{choice}`' for choice in row.choices)}." if row.choices else ""
        tables.setdefault(table, []).append(f"| `{name}` | {_cell(row.default)} | {_escaped(row.what)}{choices} |")
    for table, rows in tables.items():
        lines += [f"## {table}", "", "| key | default | what it does |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def commands_page() -> str:
    """What each verb's --help prints, wide and without colours."""
    group: Any = typer.main.get_command(app)
    parent = group.make_context("iqlite", [], resilient_parsing=True)
    lines = [NOTE, "", "# Commands", "", "What `iqlite VERB --help` prints; [json.md](json.md) has what `--json` does.", ""]
    for name, command in verbs(group).items():
        context = command.context_class(command, parent=parent, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH, color=False)
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        lines += [f"## iqlite {name}", "", "```text", text.strip(), "```", ""]
    return "\n".join(lines)


def verbs(group: Any) -> dict[str, Any]:
    """Verbs by name, each followed by those it has of its own, as `runs rm`."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        found |= {name: command} | {f"{name} {inner}": one for inner, one in getattr(command, "inner", {}).items()}
    return found


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _cell(default: Any) -> str:
    if default is None or default == "" or default == ():
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


PAGES = {"keys.md": keys_page, "commands.md": commands_page}


def main() -> None:
    """Rewrites the pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), "utf-8")
        sys.stdout.write(f"wrote {DOCS / name}\n")


if __name__ == "__main__":
    main()
