"""Pages: nothing a model or a recipe says is believed, they stay small, curves keep their spikes, and a browser, axe-core and a keyboard agree."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from iqlite.recipe.schema import Recipe
from iqlite.run.rundir import RunDir
from iqlite.showing.aggregates import aggregates
from iqlite.showing.chart import Series, chart, downsampled, ticks
from iqlite.showing.facts import WHY, facts_of
from iqlite.showing.heat import ROLES, Heat, Token
from iqlite.showing.page import inspect_page
from iqlite.showing.report import Words, report_page
from iqlite.training import monitors

NASTY = (
    "</script><script>window.bad=1</script><img src=x onerror=window.bad=1>\u202eevil\x1b[2J&lt;b&gt;'\"]]><style>*{display:none}</style>"
)
MOST = 2_000_000  # bytes


def token(text: str, reward: float) -> Token:
    tops = dict.fromkeys(ROLES, ((text, 0.5), ("other", 0.25)))
    return Token(text, reward, reward, -reward, 2 * reward, reward > 1, reward < -1, dict.fromkeys(ROLES, 0.5), tops)


def words(text: str = "What a lovely day", pairs: int = 2, prompt: str = "Why?") -> Words:
    pieces = re.findall(r"\s*\S+", text)
    heats = [
        Heat(f"{prompt} {n}", who, tuple(token(piece, (-1) ** at * at / 2) for at, piece in enumerate(pieces)))
        for n in range(pairs)
        for who in ("before", "after")
    ]
    return Words(heats, [(text, 1.0)], [(text, -1.0)])


@pytest.fixture
def make_folder(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., RunDir]:
    """make_folder(name, steps, why, **tables) → a run directory without weights."""

    def make(name: str, steps: int = 10, why: str | None = "finished", **tables: Any) -> RunDir:
        run = RunDir.create(tmp_path / name, make_recipe(**tables), {"base": {"name": "base"}, "placement": "system", "device": NASTY})
        with (run.path / "metrics.jsonl").open("w") as file:
            for step in range(steps + 1):
                line = {"step": step, "reward/mean": -1 / (step + 1), "kl/policy_superior": random.random(), "time/step_s": 1.0}
                file.write(
                    json.dumps(line | ({"eval/kl_policy_superior": 1 / (step + 1)} if step % max(1, steps // 4) == 0 else {})) + "\n"
                )
        run.add_sample(0, NASTY, NASTY)
        run.add_sample(steps, NASTY, NASTY)
        if why:
            run.write_result({"step": steps, "total": steps, "why": why, "best_step": steps, "best_kl": 0.1})
        return run

    return make


def page(runs: list[RunDir], given: list[Words | None] | None = None) -> str:
    facts = [facts_of(run) for run in runs]
    return report_page(runs, facts, given or [None] * len(runs), NASTY if len(runs) == 1 else "runs", [NASTY] * len(runs))


class Parsed(HTMLParser):
    """The tags of a page, and addresses in their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def harmless(text: str) -> None:
    parsed = Parsed(text)
    assert parsed.tags.count("script") == 2 and parsed.tags.count("style") == 1 and "img" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("style", "src")]
    assert all(value == "data:," or (value or "").startswith("#") for name, value in parsed.attributes if name == "href")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert "http://" not in text and "https://" not in text


def test_nothing_that_is_said_gets_into_the_page(make_folder: Callable[..., RunDir], make_recipe: Callable[..., Recipe]) -> None:
    tables = {"behavior": {"wanted": NASTY, "unwanted": "mean " + NASTY}}
    run = make_folder("<i>run", **tables)
    harmless(page([run]))
    harmless(page([run], [words(NASTY, prompt=NASTY)]))
    harmless(page([run, run], [words(NASTY), None]))
    harmless(inspect_page(NASTY, make_recipe(**tables), words(NASTY).heats, ([(NASTY, 1.0)], [(NASTY, -1.0)]), "described"))


@pytest.mark.parametrize("runs, steps", [(1, 10), (1, 100_000), (20, 10), (20, 2000)])
def test_pages_stay_small(make_folder: Callable[..., RunDir], runs: int, steps: int) -> None:
    made = [make_folder(f"run{n}", steps) for n in range(runs)]
    text = page(made, [words("word " * 300, 20)] * runs)
    assert 10_000 < len(text.encode()) < MOST


def test_a_run_that_failed_says_why(make_folder: Callable[..., RunDir]) -> None:
    stopped = page([make_folder("stopped", why="measure")])
    assert "Stopped by the monitor “measure”" in stopped and "points the wrong way" in stopped
    run = make_folder("killed", why=None)
    facts = facts_of(run)
    assert facts.state == "unfinished" and "--resume" in facts.advice
    with run.held():
        assert facts_of(run).state == "running"


def test_every_monitor_that_stops_has_its_reason() -> None:
    source = Path(monitors.__file__).read_text("utf-8")
    rules = set(re.findall(r"_rule\(\s*\"([^\"]+)\"", source)) - {"one kind"}  # which only warns
    assert len(rules) > 8 and rules == set(WHY)


@pytest.mark.parametrize("count, most", [(1000, 100), (999, 40), (50, 100), (101, 100)])
def test_downsampling_keeps_the_extremes_of_neighbours(count: int, most: int) -> None:
    draw = random.Random(0)
    points = [(float(n), draw.gauss(0, 1)) for n in range(count)]
    found = downsampled(points, most)
    if count <= most:
        assert found == points
        return
    groups = most // 2
    expected = []
    for group in range(groups):  # a plain loop over the same runs of neighbours
        low = high = None
        for n in range(count):
            if group * count // groups <= n < (group + 1) * count // groups:
                low = points[n] if low is None or points[n][1] < low[1] else low
                high = points[n] if high is None or points[n][1] > high[1] else high
        assert low and high
        expected += [low] if low == high else [min(low, high), max(low, high)]
    assert found == expected and len(found) <= most


def test_axes_have_round_numbers_around_what_is_drawn() -> None:
    for low, high in ((0.0, 1.0), (-1.28, -0.4), (1e-6, 3e-6), (0, 100_000), (5.0, 5.0), (0.0, 0.0)):
        found = ticks(low, high, 4)
        assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 8
    assert chart("t", "", [Series("a", [(1.0, float("nan"))])]) is None


def test_aggregates_rank_what_loops_say() -> None:
    heats = words("good bad good bad worse").heats
    found = aggregates(heats, count=3)
    means: dict[str, list[float]] = {}
    for heat in heats:
        for one in heat.tokens:
            means.setdefault(one.text.strip(), []).append(one.described)
    best = max(means, key=lambda key: sum(means[key]) / (len(means[key]) + 2))
    assert found.tokens[0][0].text == best and found.tokens[0][0].count == len(means[best])
    assert found.positions[1] == (-0.5, 4) and all(row.mean < 0 for row in found.tokens[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium here: the pages aren't looked at")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_in_a_browser(browser: Any, make_folder: Callable[..., RunDir], tmp_path: Path, width: int, scheme: str) -> None:
    """No console error, no request, nothing runs that was said, nothing is wider than the screen, and the keyboard reaches every token."""
    file = tmp_path / "page.html"
    run = make_folder("run", behavior={"wanted": NASTY, "unwanted": "mean"})
    file.write_text(page([run], [words(f"What a lovely day {NASTY}", prompt=NASTY)]), "utf-8")
    for checked in (False, True):  # axe-core is a script from elsewhere, which the page's own policy forbids
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=checked)
        opened = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        opened.on("console", lambda message, said=said: said.append(message.text))
        opened.on("pageerror", lambda error, said=said: said.append(str(error)))
        opened.on("request", lambda request, asked=asked: asked.append(request.url))
        opened.goto(file.as_uri())
        if checked:
            if not Path(os.environ.get("IQLITE_AXE", "")).is_file():
                pytest.skip("IQLITE_AXE names no axe.min.js: what it would find isn't looked for")
            opened.add_script_tag(path=os.environ["IQLITE_AXE"])
            assert [(one["id"], one["nodes"][0]["html"]) for one in opened.evaluate("axe.run()")["violations"]] == []
            continue
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
        answers = opened.locator(".tokens")
        for number in range(answers.count()):
            tokens = answers.nth(number).locator(".t")
            for _ in range(400):  # Tab alone brings one into each answer
                opened.keyboard.press("Tab")
                if opened.evaluate("n => document.querySelectorAll('.tokens')[n].contains(document.activeElement)", number):
                    break
            for at in range(tokens.count()):
                assert opened.evaluate("document.activeElement.dataset.n") == str(at)
                assert opened.locator("#detail").is_visible() and "What the description rewards" in opened.locator("#detail").inner_text()
                opened.keyboard.press("ArrowRight")
        opened.keyboard.press("Escape")
        assert opened.locator("#detail").is_hidden()
        plot = opened.locator(".plot").first
        plot.focus()
        opened.keyboard.press("Home")
        assert opened.locator("figure").first.locator("[data-step]").inner_text() != "last step"
        assert said == [] and asked == [file.as_uri()] and opened.evaluate("window.bad") is None
        context.close()


def test_several_runs_in_a_browser(browser: Any, make_folder: Callable[..., RunDir], tmp_path: Path) -> None:
    """What the colours are of is chosen at any run and holds for all of them; a chart says what it counts."""
    file = tmp_path / "page.html"
    runs = [make_folder(name) for name in ("one", "two")]
    file.write_text(page(runs, [words("What a lovely day"), words("So it is")]), "utf-8")
    opened = browser.new_page()
    opened.goto(file.as_uri())
    for summary in opened.locator("details > summary", has_text="All about").all():
        summary.click()
    assert opened.locator("fieldset.by").count() == 2

    def colours() -> list[str]:
        found: list[str] = opened.locator(".t").evaluate_all("tokens => tokens.map(token => token.className.split(' ')[1] || '')")
        return found

    before = colours()
    opened.locator("fieldset.by").nth(1).get_by_label("what training changed").check()
    after = colours()
    turned = {"p": "n", "n": "p", "": ""}  # in these answers training changed the opposite of what is described
    assert len(after) == 28 and [turned[one[:1]] for one in before] == [one[:1] for one in after]
    assert opened.locator(".by input:checked").evaluate_all("inputs => inputs.map(input => input.value)") == ["trained", "trained"]
    titles = {}
    for figure in opened.locator("figure").all():
        plot = figure.locator(".plot")
        plot.focus()
        opened.keyboard.press("End")
        titles[figure.locator("figcaption b").inner_text()] = figure.locator("[data-step]").inner_text()
    assert titles["Reward by position"].startswith("token ") and titles["Reward"] == "step 10"
    opened.close()
