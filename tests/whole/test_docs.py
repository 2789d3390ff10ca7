"""The documentation says what the code does: generated pages, links, recipes, commands, options, and every recorded metric."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import typer

from iqlite.cli import app
from iqlite.recipe.reading import parse_recipe
from iqlite.run.rundir import RunDir
from iqlite.training.loop import train
from iqlite.training.session import Session
from tests.helpers.generated import DOCS, PAGES
from tests.helpers.generated import verbs as all_verbs
from tests.helpers.reporters import Silent

ROOT = DOCS.parent
README_LINES = 100
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:srcset|src|href)=\"([^\"]+)\"")
CALL = re.compile(r"\biqlite ([a-z]+)([^`|;\n]*)")


def pages() -> list[Path]:
    """Every Markdown page of the project."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    found = {ROOT / name for name in listed.stdout.split("\n") if name} | {*ROOT.glob("*.md"), *DOCS.rglob("*.md")}
    return sorted(page for page in found if page.is_file() and ".github" not in page.parts)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    """A page's code blocks of one language."""
    return [code for named, code in FENCE.findall(page.read_text("utf-8")) if named == language]


def anchors(page: Path) -> set[str]:
    """What a forge calls a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", text.strip()).replace(" ", "-"))
    return found


def calls(page: Path) -> Iterator[tuple[str, str]]:
    """(verb, the rest) of each command line that a page shows, in code blocks and in code within a line."""
    text = page.read_text("utf-8")
    shown = [code for language, code in FENCE.findall(text) if language in ("bash", "powershell", "sh")]
    shown += re.findall(r"`(iqlite [^`\n]+)`", FENCE.sub("", text))
    for code in shown:
        yield from CALL.findall(re.sub(r"(?:^|\s)#\s.*", "", code, flags=re.MULTILINE))


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == PAGES[name](), "rewrite it: python -m tests.helpers.generated"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in (one or other for one, other in LINK.findall(prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)}: {link} names no heading of {target.name}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, left = set[Path](), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page not in seen and page.suffix == ".md" and page.is_file():
            seen.add(page)
            left += [(page.parent / one.partition("#")[0]).resolve() for one, _ in LINK.findall(prose(page)) if one and ":" not in one]
    assert not {*DOCS.rglob("*.md")} - seen


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


def test_pre_commit_checks_with_the_pinned_ruff() -> None:
    pinned = re.findall(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert re.findall(r"ruff-pre-commit\n +rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text("utf-8")) == pinned


@pytest.mark.parametrize("name", ("recipes.md", "writing-descriptions.md"))
def test_the_recipes_shown_are_recipes(name: str) -> None:
    shown = blocks(DOCS / name, "toml")
    assert shown
    for text in shown:
        parse_recipe({"prompts": {"train": "prompts.jsonl"}, **tomllib.loads(text)}, Path(name))


def test_the_commands_shown_exist() -> None:
    """Every `iqlite VERB --option` on a page is a verb with that option."""
    verbs = all_verbs(typer.main.get_command(app))
    found = [(page, *call) for page in pages() if page.name != "commands.md" for call in calls(page)]
    assert len(found) > 50
    for page, verb, rest in found:
        where = f"{page.relative_to(ROOT)}: iqlite {verb}{rest}"
        assert verb in verbs, where
        inner = " ".join([verb, *rest.split()[:1]])
        verb = inner if inner in verbs else verb
        options = {name for parameter in verbs[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}
        for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest):
            assert option in options or option in ("--help", "-h"), f"{where}: no option {option}"


def test_the_table_of_metrics_is_what_a_run_records(make_session: Callable[..., Session], tmp_path: Path) -> None:
    """A small run with everything that names a metric: each name is in the table, and each line of the table was recorded."""
    for name, label in (("contrary", "answer"), ("outside", "answer")):
        rows = [{"prompt": f"Name {name} thing {number}.", "label": label} for number in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    session = make_session(
        prompts={"contrary": "contrary.jsonl", "outside": "outside.jsonl"},
        objective={"name": "policy-gradient"},
        judge={"measure": "harmless"},
    )
    recorded = set()
    for number, one in enumerate((session, make_session(objective={"name": "forward-kl"}))):
        run = RunDir.create(tmp_path / f"run{number}", one.recipe, {})
        train(one, run, Silent())
        recorded |= {name for line in run.metrics() for name in line} - {"step"}
    section = (DOCS / "run-directory.md").read_text("utf-8").partition("## Metrics")[2]
    table = re.findall(r"^\| `([\w/*]+)` \| (.+?) \| (.+?) \| (.+) \|$", section, re.MULTILINE)
    names = [name for name, *_ in table]
    assert len(names) == len({*names}) and all(all(cells) for cells in table)
    unknown = {name for name in recorded if not any(fnmatchcase(name, one) for one in names)}
    assert not unknown, f"not in docs/run-directory.md: {sorted(unknown)}"
    unseen = [one for one in names if not any(fnmatchcase(name, one) for name in recorded)]
    assert not unseen, f"in docs/run-directory.md, and no run records it: {unseen}"
