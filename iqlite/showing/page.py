"""Pages to look at in a browser: one file with its style and script inside, nothing loaded, and nothing a model wrote believed.

jinja2 escapes every text; a policy in the page's head lets only our own script and style run, known by their digests.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from iqlite import __version__
from iqlite.recipe.schema import Recipe
from iqlite.run.findings import with_error
from iqlite.showing.aggregates import BY, Aggregates, aggregates
from iqlite.showing.chart import Chart, Series, chart, number
from iqlite.showing.gathering import AFTER, BEFORE, TARGET, pairs
from iqlite.showing.heat import ROLES, Heat, Token
from iqlite.showing.terminal import visible
from iqlite.terminal import duration, harmless

FOLDER = Path(__file__).parent.parent / "data" / "pages"
MOST_TOKENS = 4000  # on a page, each with its alternatives: about a megabyte; our choice
LONGEST = 400  # tokens of an answer that are shown
WHO = {BEFORE: "Before (the base)", AFTER: "After training", TARGET: "The target itself (superior policy)", "text": "The text"}


def _safe(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else harmless(value)


def _percent(value: Mapping[str, Any] | None) -> str:
    if not value or value.get("value") is None:
        return "–"
    low, high = value.get("low"), value.get("high")
    return f"{value['value']:.0%}" + (f" ({low:.0%}–{high:.0%})" if low is not None and high is not None else "")


def _signed(value: Mapping[str, Any]) -> str:
    return f"{value['value']:+.3f} ({value['low']:+.3f}…{value['high']:+.3f})"


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"duration": duration, "number": number, "percent": _percent, "signed": _signed, "with_error": with_error}
    return made


class Page:
    """A page in the making: its answers' tokens and its charts are numbered for the script that reads their values."""

    def __init__(self, adapted: bool, by: str, heats: Sequence[Heat] = ()):
        self.adapted, self.by = adapted, by
        self.answers: list[list[list[Any]]] = []
        self.charts: list[Chart] = []
        self.most = [_most(heats, name) for name in BY]

    def groups(self, heats: Sequence[Heat], room: int = MOST_TOKENS) -> list[dict[str, Any]]:
        """Answers to one prompt side by side, as many as there is room for; one pair in any case, cut where it is longer."""
        longest = min(LONGEST, room // 2)
        found: list[dict[str, Any]] = []
        for numbers in pairs([(heat.prompt, heat.who) for heat in heats]):
            some = [heats[number] for number in numbers]
            room -= sum(min(longest, len(heat.tokens)) for heat in some)
            if room < 0 and found:
                break
            found.append({"prompt": some[0].prompt, "answers": [self._answer(heat, longest) for heat in some]})
        return found

    def chart(self, title: str, what: str, series: Sequence[Series], unit: str = "step") -> list[dict[str, Any]]:
        """[a chart for the templates], or nothing where there is nothing to draw."""
        made = chart(title, what, [Series(harmless(one.name), one.points) for one in series], unit)
        if made is None:
            return []
        self.charts.append(made)
        return [
            {
                "title": made.title,
                "what": made.what,
                "svg": made.svg,
                "lines": made.lines,
                "rows": made.rows,
                "unit": made.unit,
                "number": len(self.charts) - 1,
            }
        ]

    def why(self, found: Aggregates, more: Sequence[tuple[str, float]], less: Sequence[tuple[str, float]]) -> dict[str, Any]:
        """Aggregates for the templates."""
        points = [(at + 1.0, mean) for at, (mean, _) in enumerate(found.positions)]
        drawn = (
            self.chart("Reward by position", "mean of the tokens at each place of an answer, nats", [Series(found.by, points)], "token")
            if len(points) > 1
            else []
        )
        return {
            "tokens": found.tokens, "bigrams": found.bigrams, "positions": drawn[0] if drawn else None,
            "more": [(visible(text), value) for text, value in more], "less": [(visible(text), value) for text, value in less],
        }  # fmt: skip

    def render(self, template: str, title: str, **values: Any) -> str:
        """The whole page."""
        style, script = ((FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js"))
        charts = [{"frame": _short(one.frame), "lines": [[_short(p) for p in points] for _, _, points in one.lines]} for one in self.charts]
        data = {"answers": self.answers, "charts": charts, "adapted": self.adapted, "most": self.most}
        policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; img-src data:; base-uri 'none'; form-action 'none'"
        return _environment().get_template(template).render(
            title=title, version=__version__, policy=policy, style=Markup(style), script=Markup(script), data=data, by=self.by, **values
        )  # fmt: skip

    def _answer(self, heat: Heat, longest: int) -> dict[str, Any]:
        tokens = heat.tokens[:longest]
        self.answers.append([_row(token) for token in tokens])
        at = BY.index(self.by)
        means = [sum(getattr(token, name) for token in heat.tokens) / len(heat.tokens) for name in BY]
        shown = [
            {
                "lead": _lead(token.text),
                "text": token.text[len(_lead(token.text)) :],
                "style": _style(getattr(token, self.by), self.most[at]),
                "blank": not token.text.strip(),
            }
            for token in tokens
        ]
        return {
            "who": WHO[heat.who], "number": len(self.answers) - 1, "tokens": shown, "means": [round(mean, 3) for mean in means],
            "mean": f"{means[at]:+.2f}".replace("-", "−"), "cut": len(tokens) < len(heat.tokens),
        }  # fmt: skip


def inspect_page(
    name: str, recipe: Recipe, heats: Sequence[Heat], moved: tuple[Sequence[tuple[str, float]], Sequence[tuple[str, float]]], by: str
) -> str:
    """What `iqlite inspect -o` writes."""
    page = Page(any(heat.who == AFTER for heat in heats), by, heats)
    behavior = recipe.behavior
    return page.render(
        "inspect.html", f"{name} – iqlite inspect", name=name, groups=page.groups(heats), count=len(heats),
        why=page.why(aggregates(heats, by), *moved),
        wanted=behavior.wanted or " ".join(p.wanted for p in behavior.mixture),
        unwanted=behavior.unwanted or " ".join(p.unwanted for p in behavior.mixture),
    )  # fmt: skip


def _row(token: Token) -> list[Any]:
    """One token for the script: text, values, contrast, flags, its probabilities and the alternatives by role."""
    tops = [[[harmless(text), _p(p)] for text, p in token.alternatives[role]] for role in ROLES]
    values = [round(getattr(token, name), 3) for name in BY]
    return [
        harmless(token.text),
        values,
        round(token.contrast, 3),
        token.clipped + 2 * token.implausible,
        [_p(token.probability[r]) for r in ROLES],
        tops,
    ]


def _p(value: float) -> float:
    return float(f"{value:.3g}")


def _lead(text: str) -> str:
    """The spaces before a word, which aren't coloured; a token of spaces alone keeps them."""
    return text[: len(text) - len(text.lstrip(" "))] if text.strip() else ""


def _style(value: float, most: float) -> str:
    share = min(1.0, abs(value) / most)
    return "t" if share < 0.1 else f"t {'n' if value < 0 else 'p'}{min(4, 1 + int(4 * share))}"


def _most(heats: Sequence[Heat], by: str) -> float:
    """The value that has the strongest colour: the 90th percentile of the page's, at least half a nat."""
    values = sorted(abs(getattr(token, by)) for heat in heats for token in heat.tokens)
    return round(max(0.5, values[int(0.9 * (len(values) - 1))]), 3) if values else 0.5


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
