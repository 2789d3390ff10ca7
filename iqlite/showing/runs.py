"""Runs in a terminal: a table where there is room, else a few lines each, drawn anew while somebody watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from iqlite.run.listing import ADAPTER, CONVERGED, DAMAGED, FINISHED, RUNNING, STOPPED, UNFINISHED, Row
from iqlite.terminal import clean, duration

STYLES = {
    FINISHED: "green",
    CONVERGED: "green",
    RUNNING: "cyan",
    UNFINISHED: "yellow",
    STOPPED: "bold red",
    DAMAGED: "bold red",
    ADAPTER: "dim",
}
WIDE = 120  # columns of a terminal that has room for a table
PIPED = 220  # columns where no terminal cuts a line
LONGEST = 120  # characters of a behaviour
EVERY = 2.0  # seconds between two looks
SHARE = 0.1  # of the time that looking may take


class RunsTable:
    """The rows as they are drawn: in a table, or at most three lines a run on a narrow terminal, and an empty one. `now` is the time of day in seconds."""

    def __init__(self, rows: Sequence[Row], now: float | None = None):
        self.rows, self.now = rows, time.time() if now is None else now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < WIDE:
            yield Group(*(self._lines(row) for row in self.rows))
        else:
            yield self._table(options.max_width if console.is_terminal else None)

    def _table(self, width: int | None) -> Table:
        made = Table(box=SIMPLE_HEAD, pad_edge=False, width=width)
        made.add_column("run", overflow="fold", min_width=12, max_width=max(24, width // 4) if width else None)
        made.add_column("state", overflow="fold", max_width=30 if width else None)
        made.add_column("behaviour", ratio=1, no_wrap=True, overflow="ellipsis")
        made.add_column("base", no_wrap=True, overflow="ellipsis", max_width=24 if width else None)
        made.add_column("before → after", no_wrap=True)
        for name in ("size", "time", "age"):
            made.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            made.add_row(
                clean(str(row.path)), _state(row), clean(row.behaviour, LONGEST), clean(row.base), _figures(row), size(row.bytes),
                duration(row.seconds) if row.seconds else "–", age(self.now - row.changed),
            )  # fmt: skip
        return made

    def _lines(self, row: Row) -> RenderableType:
        figures = _figures(row)
        about = [clean(row.base, 32), figures if figures != "–" else "", size(row.bytes), duration(row.seconds) if row.seconds else "", f"{age(self.now - row.changed)} ago"]  # fmt: skip
        said = [f"[dim]{clean(row.behaviour, LONGEST)}[/]"] if row.behaviour else []
        lines = [f"[bold]{clean(str(row.path))}[/]  {_state(row)}", *said, "  ".join(filter(None, about)), ""]
        return Group(*(Text.from_markup(line, emoji=False, overflow="ellipsis" if n else "fold") for n, line in enumerate(lines)))


def _state(row: Row) -> str:
    why = f": {clean(row.state.why, 80)}" if row.state.name == DAMAGED else ""
    return f"[{STYLES[row.state.name]}]{clean(row.state.words)}{why}[/]"


def _figures(row: Row) -> str:
    if row.after is None:
        return "–"
    before = "–" if row.before is None else f"{row.before:z.2f}"
    return f"{clean(row.measure)} {before} → {row.after:z.2f}"


def size(count: int) -> str:
    """Bytes as people say them: 12 kB, 85 MB, 1.3 GB."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 0.9995 * 10**power:
            value = count / 10**power
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"
    return f"{count} B"


def age(seconds: float) -> str:
    """How long ago, in one unit: 5 s, 3 min, 2 h, 4 days."""
    for unit, length in (("day", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}{'s' if unit == 'day' else ''}"
    return f"{max(0, round(seconds))} s"


class Watched:
    """What `--watch` draws: the table as it is now, and as much of it as the terminal has room for."""

    def __init__(self, look: Callable[[], Sequence[Row]]):
        self.look = look
        self.rows, self.cost = list(look()), 0.0

    def again(self) -> None:
        """Looks anew."""
        began = time.monotonic()
        self.rows = list(self.look())
        self.cost = time.monotonic() - began

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide, room = options.max_width >= WIDE, console.height - 2
        count = max(1, room - 4) if wide else max(1, room // 4)
        if not self.rows:
            yield Text("no runs yet", style="dim")
        yield RunsTable(self.rows[:count])
        left = len(self.rows) - count
        more = f"{left} more, older; a higher terminal shows them. " if left > 0 else ""
        yield Text(f"{more}Ctrl-C ends the watching and no run.", style="dim", no_wrap=True, overflow="ellipsis")


def watch(out: Console, look: Callable[[], Sequence[Row]]) -> None:
    """Draws the runs until Ctrl-C; looking takes at most a tenth of the time."""
    try:
        view = Watched(look)
        with Live(view, console=out, refresh_per_second=1, vertical_overflow="crop") as live:
            while True:
                time.sleep(max(EVERY, view.cost / SHARE))
                view.again()
                live.refresh()
    except KeyboardInterrupt:
        return
