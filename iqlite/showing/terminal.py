"""Token rewards in a terminal: painted answers, before and after side by side, one answer's tokens as a table, and the aggregates."""

from __future__ import annotations

from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from iqlite.showing.aggregates import Aggregates, Ranked
from iqlite.showing.gathering import AFTER, BEFORE, TARGET, pairs
from iqlite.showing.heat import ROLES, Heat
from iqlite.terminal import clean, painted, spark, table

WORDS = {
    "described": "what the description rewards, log π̃/π_ref",
    "trained": "what training changed, log π_θ/π_ref",
    "reward": "what a training step would reward now, log π̃/π_θ (equation 4)",
}
WHO = {BEFORE: "before (the base)", AFTER: "after training", TARGET: "the target (superior policy)", "text": "the text"}
SIDE_BY_SIDE = 100  # columns of a terminal that has room for two answers beside each other
SHORT = {"policy": "π_θ", "reference": "π_ref", "superior": "π̃"}


def legend(console: Console, by: str) -> None:
    """What the colours, or the signs, mean."""
    marks = "green is more, red is less" if console.color_system else "{+more} {++much more} {-less} {--much less}"
    console.print(f"[dim]{clean(WORDS[by])}, in nats (0.7: twice as likely); [/][dim]{clean(marks)}[/]")


def show_answers(console: Console, heats: Sequence[Heat], by: str) -> None:
    """Painted answers; those to one prompt before and after training side by side where there is room."""
    for numbers in pairs([(heat.prompt, heat.who) for heat in heats]):
        some = [heats[number] for number in numbers]
        console.print(f"\n[bold]{clean(some[0].prompt, 400)}[/]")
        wide = len(some) == 2 and console.width >= SIDE_BY_SIDE
        panels = []
        for heat in some:
            values = [getattr(token, by) for token in heat.tokens]
            head = f"{WHO[heat.who]}, mean {sum(values) / len(values):+.3f}"
            text = painted([token.text for token in heat.tokens], values, console.color_system)
            if wide:
                panels.append(Panel(text, title=head, title_align="left", width=console.width // 2 - 1))
            else:
                console.print(f"[dim]{head}[/]")
                console.print(text, soft_wrap=False)
        if wide:
            console.print(Columns(panels))


def show_tokens(console: Console, heat: Heat, by: str, top: int) -> None:
    """One answer's tokens, a row each: the figures, and what each role would rather have said."""
    shown = Table(box=None, padding=(0, 1), title=f"{WHO[heat.who]}: every token", title_justify="left", title_style="bold")
    for name in ("token", by, "Δ", "", *(f"p {SHORT[role]}" for role in ROLES), "the target would say", "the base would say"):
        shown.add_column(
            name, justify="left" if name in ("token", "", "the target would say", "the base would say") else "right", overflow="fold"
        )
    for token in heat.tokens:
        marks = ("clipped " if token.clipped else "") + ("implausible" if token.implausible else "")
        said = [
            Text("  ".join(f"{visible(text)} {p:.0%}" for text, p in token.alternatives[role][:top]), overflow="ellipsis", no_wrap=True)
            for role in ("superior", "reference")
        ]
        shown.add_row(
            painted([visible(token.text)], [getattr(token, by)], console.color_system), f"{getattr(token, by):+.2f}", f"{token.contrast:+.2f}",
            marks.strip(), *(f"{token.probability[role]:.3f}" for role in ROLES), *said,
        )  # fmt: skip
    console.print(shown)


def show_aggregates(console: Console, found: Aggregates, more: Sequence[tuple[str, float]], less: Sequence[tuple[str, float]]) -> None:
    """The ranked tokens and pairs, what the target says more and less often, and reward by position."""
    for title, ranked in (("tokens", found.tokens), ("pairs of tokens", found.bigrams)):
        for way, rows in (("most rewarded", ranked[0]), ("most punished", ranked[1])):
            if rows:
                console.print(table(f"{title} {way}", ("text", "mean", "times", "for example"), [_cells(row) for row in rows]))
    for title, moved in (("the target says more often", more), ("the target says less often", less)):
        if moved:
            told = "  ".join(f"{clean(visible(text))} {value:.2f}" for text, value in moved)
            console.print(f"[bold]{title}[/] [dim](times in 100 tokens)[/]\n{told}")
    means = [mean for mean, _ in found.positions]
    if len(means) > 1:
        console.print(f"[bold]by position[/] [dim]first to {len(means)}th token, {min(means):+.2f} to {max(means):+.2f}[/]\n{spark(means)}")


def _cells(row: Ranked) -> list[str]:
    before, itself, after = (clean(part, 48) for part in row.context)
    return [clean(visible(row.text)), f"{row.mean:+.2f}", str(row.count), f"[dim]{before}[/] [bold]{itself}[/] [dim]{after}[/]"]


def visible(text: str) -> str:
    """A token's text where spaces alone and line ends could be overlooked."""
    shown = text.strip(" ").replace("\n", "⏎").replace("\t", "⇥")
    return shown or "␣"
