"""What a person sees: rich tables and progress on a terminal, plain lines elsewhere, and nothing a model wrote left unescaped."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

MILD, STRONG = 0.25, 0.6  # of the largest value: where a token is marked, and marked twice; our choice


class HarmlessConsole(Console):
    """rich's console, which lets a terminal be steered by rich alone: whatever text is printed, its control characters are made visible."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """rich's, text by text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


def console(*, stderr: bool = False) -> Console:
    """A console that keeps long lines whole when it isn't a terminal, and through which no text can steer one."""
    out = HarmlessConsole(stderr=stderr, highlight=False, emoji=False)  # :100: in an answer stays what the model wrote
    return out if out.is_terminal else HarmlessConsole(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)


def clean(text: str, longest: int | None = None) -> str:
    """A model's text for a terminal: control characters and markup are made visible or harmless, line ends become spaces."""
    flat = " ".join(part for part in "".join(" " if _controls(c) else c for c in text).split(" ") if part)
    if longest is not None and len(flat) > longest:
        flat = flat[: longest - 1] + "…"
    return escape(flat)


def harmless(text: str) -> str:
    """A model's text as it may be written to a terminal: line ends stay, other control characters become visible."""
    if text.isprintable():  # which is most of what is shown, and quick to see; lone surrogates aren't
        return text
    return "".join("\n" if c == "\n" else " " if c == "\t" else "\ufffd" if _controls(c) else c for c in text)


def _controls(character: str) -> bool:
    """True for what steers a terminal (C0, C1, separators of lines, overrides of direction) or can't be written (half a surrogate pair).

    Joiners, spaces of all widths, direction marks and signs newer than this Python are text.
    """
    return (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or "\u202a" <= character <= "\u202e"
        or "\u2066" <= character <= "\u2069"
    )


def painted(pieces: Sequence[str], values: Sequence[float], colours: str | None) -> Text:
    """Tokens by a value each, 0 unmarked: green above it, red below it, brighter the further; `colours` is what the console has (`color_system`).

    With 16 colours there are two shades; without any, a token in question stands as {++so}, {+so}, {-so} or {--so}.
    """
    most = (
        max(0.5, sorted(abs(v) for v in values)[int(0.9 * (len(values) - 1))]) if values else 0.5
    )  # one outlier doesn't darken all others
    text = Text()
    for piece, value in zip(pieces, values, strict=True):
        share, shown = min(1.0, abs(value) / most), harmless(piece)
        level = (share >= MILD) + (share >= STRONG)
        if colours in ("truecolor", "256"):
            depth = int(150 * share)
            text.append(shown, f"white on rgb(0,{depth},0)" if value >= 0 else f"white on rgb({depth},0,0)")
        elif colours:
            text.append(shown, ("", "green", "black on green")[level] if value >= 0 else ("", "red", "white on red")[level])
        elif level and shown.strip():
            start = len(shown) - len(shown.lstrip())
            text.append(f"{shown[:start]}{{{('+' if value >= 0 else '-') * level}{shown[start:]}}}")
        else:
            text.append(shown)
    return text


class WordWrap:
    """Text that arrives in pieces, as lines of at most `width` cells broken between words: a word is shown once it is whole.

    `at` is the column where the text begins. Wide characters (Chinese, Japanese, Korean) are words of their own; a word longer than a
    line, such as an address, is left whole for the terminal to break.
    """

    def __init__(self, width: int, at: int = 0):
        self.width, self.column, self.word = width, at, ""

    def add(self, piece: str) -> str:
        """What may be shown now."""
        return "".join(self._character(character) for character in piece)

    def end(self) -> str:
        """The last word."""
        shown, self.word = self.word, ""
        size = cell_len(shown)
        breaks = self.column > 0 and self.column + size > self.width >= size
        self.column = size if breaks else self.column + size
        if self.column > self.width:
            self.column %= self.width
        return "\n" * breaks + shown

    def _character(self, character: str) -> str:
        if character == "\n":
            shown, self.column = self.end() + "\n", 0
            return shown
        if character == " ":
            shown = self.end()
            fits = self.column < self.width
            self.column += fits
            return shown + " " * fits
        if cell_len(character) < 2:
            self.word += character
            return ""
        shown, self.word = self.end(), character
        return shown + self.end()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A small table: first column left, the others right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def spark(values: Sequence[float]) -> str:
    """A row of bars, the lowest value the shortest."""
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[int(7.999 * (value - low) / (high - low))] if high > low else "▄" for value in values)


def facts(out: Console, rows: Mapping[str, str]) -> None:
    """Label and value, a line each; on a terminal what is longer goes on below the value's beginning."""
    if not out.is_terminal:
        width = max(map(len, rows))
        for label, value in rows.items():
            out.print(f"[dim]{label:<{width}}[/]  {clean(value)}")
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for label, value in rows.items():
        grid.add_row(label, clean(value))
    out.print(grid)


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min or 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def counting(console: Console, what: str, *, quiet: bool = False) -> Progress:
    """A bar of things done on a terminal, with what is left; nothing elsewhere."""
    columns = (TextColumn(f"{what}: {{task.description}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal)


class Watch:
    """Long work as a person sees it: notes on the way, and bars of things done; `quiet` bars are for work that itself talks."""

    def __init__(self, out: Console):
        self.out = out

    def note(self, text: str) -> None:
        """A line that is only for the moment."""
        self.out.print(f"[dim]{clean(text)}[/]")

    @contextmanager
    def counting(self, what: str, total: int, *, quiet: bool = False) -> Iterator[Count]:
        """A bar of `total` things on a terminal; elsewhere a line whenever another kind of them begins."""
        with counting(self.out, what, quiet=quiet) as progress:
            yield Count(progress, progress.add_task("", total=total), what, self.out)


class Count:
    """A bar that is being filled."""

    def __init__(self, progress: Progress, task: TaskID, what: str, out: Console):
        self.progress, self.task, self.what, self.out = progress, task, what, out

    def advance(self, number: int) -> None:
        """So many more are done."""
        self.progress.advance(self.task, number)

    def moment(self, text: str) -> None:
        """What the bar says meanwhile; nothing where there is none."""
        self.progress.update(self.task, description=clean(text))

    def now(self, name: str) -> None:
        """What is being done now."""
        self.moment(name)
        if self.progress.disable:
            self.out.print(f"{self.what}: {clean(name)}")


@contextmanager
def bytes_done(out: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes with rate and time left on a terminal, nothing elsewhere; what it yields is told of bytes done."""
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, disable=not out.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)
