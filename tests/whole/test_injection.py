"""Texts that would steer a terminal or a page, wherever a person lets them in: recipe, prompts, answers, names of runs, files of a run.

What is checked is what arrives: bytes at a pipe, bytes at a pseudo terminal, and a page in a parser; tests/showing/test_page.py has the browser.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from iqlite.records import StepMetrics
from iqlite.run.rundir import RunDir
from iqlite.terminal import HarmlessConsole, facts, table
from iqlite.training.monitors import Verdict
from iqlite.training.progress import TrainingView

Call = Callable[..., tuple[int, str, str]]
NASTY = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b31m\x90q\u202eevil\u2066\u2028[bold red]x[/] :bomb: <script>window.bad=1</script>"
    "<img src=x onerror=window.bad=1>&lt;b&gt;&#x1b;'\"<style>*{display:none}</style>\r\x08"
)
NAME = NASTY.replace("/", "∕")[:60]  # as a folder may be called
STEERS = re.compile("[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00-\x08\x0b-\x1f\x7f-\x9f]")
OWN = re.compile(r"\x1b\[[0-9;?]*[mKHJABCDGhl]|\r")  # what rich itself writes: colours, the cursor, lines erased
MEANT = ("\x1b[2J", "\x1b]", "\x1b[31m\x9b")  # and what only the text would


def unharmed(text: str, *, terminal: bool = False) -> None:
    for one in MEANT:
        assert one not in text
    text = OWN.sub("", text) if terminal else text
    assert not STEERS.search(text), ascii(text[max(0, STEERS.search(text).start() - 80) :][:200])  # type: ignore[union-attr]


@pytest.fixture
def nasty(make_run: Callable[..., RunDir]) -> RunDir:
    """A run that says it everywhere that a person or a model can write into, with an adapter."""
    run = make_run(NAME, behavior={"wanted": "You are kind. " + NASTY, "unwanted": "You are mean. " + NASTY})
    for step in (0, 2):
        run.add_metrics(StepMetrics(step, {"eval/measure": 0.5, "eval/measure_base": 0.25, "loss": 1.0}))
        run.add_sample(step, NASTY, NASTY, 0.5, NASTY)
    environment = run.environment()
    environment["base"]["name"] = NASTY
    run.write_sealed("environment.json", json.dumps(environment | {"device": NASTY, "placement": "system"}))
    run.write_result({"step": 2, "total": 3, "why": NASTY, "best_step": 2, "best_kl": 0.1})
    return run


class Tags(HTMLParser):
    """Tags of a page, and attributes that could run something."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.running: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.running += [name for name, _ in attrs if name.startswith("on") or name in ("style", "src")]


def safe_page(file: Path) -> None:
    text = file.read_text("utf-8")
    page = Tags(text)
    assert page.tags.count("script") == 2 and page.tags.count("style") == 1 and "img" not in page.tags and not page.running
    unharmed(text)


def test_the_verbs_at_a_pipe(iqlite: Call, nasty: RunDir, tmp_path: Path) -> None:
    path = nasty.path
    for arguments in (
        ("runs", "."), ("runs", ".", "--json"), ("runs", "rm", path), ("runs", f"{path}-gone"), ("runs", "rm", f"{path}-gone"), ("runs", "cache", NASTY[1:9]),
        ("report", path, "--no-rewards", "-o", NAME + ".html"), ("report", path, path, "--no-rewards", "-o", "two.html", "--json"),
        ("inspect", path, "--samples", "-o", "why.html"), ("inspect", path, "--text", NASTY, "--prompt", NASTY), ("inspect", path, "--text", NASTY, "--json"),
        ("report", f"{path}-gone"), ("train", f"{NAME}.toml"), ("compare", f"{path}-gone"),
    ):  # fmt: skip
        code, out, err = iqlite(*arguments)
        assert code in (0, 2) and "Traceback" not in err, (arguments, err)
        unharmed(out + err)
    for name in (NAME + ".html", "two.html", "why.html"):
        safe_page(tmp_path / name)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo terminals")
@pytest.mark.parametrize("columns", ["60", "200"])
def test_the_table_of_runs_at_a_terminal(nasty: RunDir, tmp_path: Path, columns: str) -> None:
    import pty

    mine, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm-256color", "COLUMNS": columns, "LINES": "24"}
    done = subprocess.Popen(
        [sys.executable, "-m", "iqlite", "runs", "."], cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            more = os.read(mine, 65_536)
        except OSError:
            break
        if not more:
            break
        seen += more
    os.close(mine)
    assert done.wait() == 0
    text = seen.decode().replace("\r\n", "\n")
    assert "You are kind." in text and "\x1b[" in text  # it was drawn in colours
    unharmed(text, terminal=True)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_live_view(terminal: bool) -> None:
    out = io.StringIO()
    console = HarmlessConsole(file=out, width=80, height=24, force_terminal=terminal, highlight=False, emoji=False)
    values: dict[str, Any] = {"reward/mean": -0.2, "kl/policy_superior": 0.3, "kl/policy_reference": 0.1, "time/tokens_per_s": 20.0, "memory/peak_gib": 2.5, "eval/measure": 0.5, "eval/measure_base": 0.2}  # fmt: skip
    facts(console, {"behaviour": NASTY, "run": NAME})
    with TrainingView(console, 3, measure=NASTY) as view:
        view.step(StepMetrics(1, values), 3)
        view.sample(1, NASTY, lambda: (NASTY, NASTY))
        view.verdict(1, Verdict("kl", NASTY))
    text = out.getvalue()
    assert text.count("evil") >= 5 and "[bold red]x[/]" in text and ":bomb:" in text
    unharmed(text, terminal=terminal)


def test_no_way_of_printing_lets_a_text_steer() -> None:
    out = io.StringIO()
    console = HarmlessConsole(file=out, width=400, force_terminal=True, color_system="standard", highlight=False, emoji=False)
    console.print(NASTY, markup=False)
    console.print(Text(NASTY, "red"))
    console.print(table("t", ("a",), [(NASTY.replace("[/]", ""),)]))
    console.rule(Text(NASTY))
    unharmed(out.getvalue(), terminal=True)
    assert "\x1b[31m" in out.getvalue()  # its own colours stay
