"""A run as a person sees it: a bar and curves on a terminal, a line a step elsewhere, and Ctrl-C that finishes the step first."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.cells import set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from iqlite.machine.ranks import ALONE, Ranks, launched_by
from iqlite.records import HELD_OUT_KL, StepMetrics, judged_by
from iqlite.terminal import clean, duration, spark
from iqlite.training.monitors import Verdict

BAR = 20  # cells
ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK")  # those that the platform has
NARROW = 60  # columns of a terminal that has room for it
GRACE = 20  # seconds that several processes have to finish a step in: launchers kill 30 s after they have passed a signal on
ECHO = 3.0  # seconds within which a second signal is the launcher's, for the same Ctrl-C
SHOWN = 240  # characters of an answer shown in progress
REFRESHES = 2  # a second
ROWS = 12  # of a terminal that has room for curves
CELL, LABEL, VALUE = 38, 12, 7  # cells of a curve, of its name and of its last value, at least
SHARE = 0.01  # of the time since the start that answers drawn for a person may take, the first and the last apart
CURVES = {
    "reward": "reward/mean",
    "KL(π‖π̃)": "kl/policy_superior",
    "KL(π‖ref)": "kl/policy_reference",
    "length": "response/length",
    "": "eval/measure",
    "held-out KL": HELD_OUT_KL,
}
"""What is drawn, by the name it is shown by; the measure has its own, and the held-out KL is the one that the run is judged by."""


class TrainingView:
    """Progress of a run: a bar and curves on a terminal, a line a step elsewhere and where a terminal can't move its cursor.

    `history` are metrics of a run that goes on.
    """

    def __init__(self, out: Console, total: int, first: int = 1, measure: str = "measure", history: Sequence[Mapping[str, Any]] = ()):
        self.out, self.total, self.started, self.first, self.measure = out, total, time.monotonic(), first, measure
        self.plain = not out.is_terminal or out.is_dumb_terminal
        self.drawing, self.drawn = 0.0, False
        self.curves: dict[str, list[float]] = {name: [] for name in CURVES.values()}
        last = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))  # it may be cut
        self.progress = Progress(
            SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), *([BarColumn(BAR)] if out.width >= NARROW else []), TextColumn("left"), TimeRemainingColumn(), last,
            console=out, expand=True, auto_refresh=False, speed_estimate_period=86400,
        )  # fmt: skip
        self.task = self.progress.add_task("first rollout …", total=total, completed=first - 1)
        self.live = Live(self, console=out, refresh_per_second=REFRESHES)
        self.base = ""
        for line in history:
            if line["step"] < first:
                self._remember(line)

    def __enter__(self) -> TrainingView:
        if not self.plain:
            self.live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.plain:
            self.live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.progress.get_renderable()
        known = {name or self.measure: self.curves[key] for name, key in CURVES.items() if self.curves[key]}
        if not known or console.height < ROWS:
            return
        columns = max(1, min(3, options.max_width // CELL))
        cell = options.max_width // columns
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(width=cell, no_wrap=True, overflow="ellipsis")
        cells = [self._curve(name, values, cell - LABEL - VALUE - 4, options) for name, values in known.items()]
        for at in range(0, len(cells), columns):
            grid.add_row(*cells[at : at + columns])
        yield grid

    def step(self, metrics: StepMetrics, total: int) -> None:
        """One step done."""
        v = metrics.values
        self._remember(v)
        work = f"{v['time/tokens_per_s']:.0f} tok/s  {v['memory/peak_gib']:.1f} GiB"
        if self.plain:
            found = f"reward {v['reward/mean']:+z.3f}  KL(π‖π̃) {v['kl/policy_superior']:z.3f}  KL(π‖ref) {v['kl/policy_reference']:z.3f}"
            done = metrics.step - self.first + 1
            left = (time.monotonic() - self.started) / done * (total - metrics.step)
            held = f"  held-out KL {v[judged_by(v)]:z.3f}" if HELD_OUT_KL in v else ""
            held += f", measure {v['eval/measure']:.2f} (base {v['eval/measure_base']:.2f})" if "eval/measure" in v else ""
            self.out.print(f"step {metrics.step}/{total}  {found}  {work}{held}  left {duration(left)}", markup=False)
        else:
            self.progress.update(self.task, completed=metrics.step, description=work)

    def sample(self, step: int, prompt: str, draw: Callable[[], tuple[str, str]]) -> None:
        """A held-out answer on the way, by the base and by the policy now, as often as there is time for: `draw` takes some."""
        began = time.monotonic()
        late = self.drawing > SHARE * (began - self.started)
        if step == 0 or (late and self.drawn and step < self.total):
            return
        before, now = draw()
        self.drawing, self.drawn = self.drawing + time.monotonic() - began, True
        self.out.print(f"[dim]at step {step}[/] {clean(prompt, SHOWN)}")
        for name, style, answer in (("before", "dim", before), ("now", "none", now)):
            head, text = f"  [dim]{name:6} →[/]", f"[{style}]{clean(answer, SHOWN)}[/]"
            if self.plain:
                self.out.print(f"{head} {text}")
                continue
            grid = Table.grid(padding=(0, 1, 0, 0))  # what is longer goes on below the answer's beginning
            grid.add_column(no_wrap=True)
            grid.add_column(overflow="fold")
            grid.add_row(head, text)
            self.out.print(grid)

    def verdict(self, step: int, verdict: Verdict) -> None:
        """A monitor's warning or stop."""
        self.out.print(f"[{'bold red' if verdict.stop else 'yellow'}]step {step}: {clean(verdict.message)}[/]")

    def _remember(self, values: Mapping[str, Any]) -> None:
        for name, curve in self.curves.items():
            value = values.get(judged_by(values) if name == HELD_OUT_KL else name)
            if value is not None and value == value and abs(value) != float("inf"):
                curve.append(value)
        if values.get("eval/measure_base") is not None:
            self.base = f" (base {values['eval/measure_base']:.2f})"

    def _curve(self, name: str, values: Sequence[float], width: int, options: ConsoleOptions) -> Text:
        """Name, last value, and the way there in at most `width` cells; without block characters, the first value."""
        last = format(values[-1], ("+" if name == "reward" else "") + ("z.3f" if abs(values[-1]) < 10 else "z.1f"))
        text = Text.assemble((f"{set_cell_size(name, LABEL)} ", "dim"), f"{last:>{VALUE}} ")
        base = self.base if name == self.measure else ""
        if options.ascii_only:
            return text.append(f"from {values[0]:.3f}{base}")
        if width > len(base) and len(values) > 1:
            text.append(spark(fewer(values, width - len(base))), "cyan")
        return text.append(base, "dim")


def fewer(values: Sequence[float], most: int) -> list[float]:
    """At most `most` values: means of as many equal runs of neighbours."""
    if len(values) <= most:
        return list(values)
    parts = [values[at * len(values) // most : (at + 1) * len(values) // most] for at in range(most)]
    return [sum(part) / len(part) for part in parts]


@contextmanager
def finish_the_step(out: Console, ranks: Ranks = ALONE) -> Iterator[Interrupt]:
    """Inside the block the first Ctrl-C (or a signal to end, or of a terminal that closes) only asks; a second Ctrl-C stops at once.

    What was told to be ignored stays so, as SIGHUP by nohup.
    """
    interrupt = Interrupt(out, ranks)
    signals = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    before = {s: signal.signal(s, interrupt) for s in signals if signal.getsignal(s) != signal.SIG_IGN}
    try:
        yield interrupt
    finally:
        interrupt.end.cancel()
        for which, handler in before.items():
            signal.signal(which, handler)


class Interrupt:
    """Whether the user asked to stop. Of several processes each is asked, by the terminal and by the launcher, which kills them 30 s later."""

    def __init__(self, out: Console, ranks: Ranks = ALONE):
        self.out, self.ranks, self.asked, self.since = out, ranks, False, 0.0
        self.end = threading.Timer(GRACE, self._at_once)
        self.end.daemon = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number not in (signal.SIGINT, signal.SIGTERM):  # a terminal that closes says so more than once
                return
            if self.ranks.size > 1 and time.monotonic() - self.since < ECHO:
                return
            self._at_once()
        self.asked, self.since = True, time.monotonic()
        if self.ranks.watch is None:
            self.out.print("[yellow]finishing this step, then writing a checkpoint (Ctrl-C again stops at once)[/]")
        elif killed := self.ranks.watch.killed():  # and the launcher ends the others
            self.ranks.watch.fault(killed, 1)
        else:
            self.out.print(f"[yellow]finishing this step, then writing a checkpoint, if that takes less than {GRACE} s[/]")
            self.end.start()

    def _at_once(self) -> None:
        self.ranks.fault(f"stopped at once; the last checkpoint is kept: go on with {shlex.join(launched_by())} train … --resume", 130)
        sys.stderr.write("\nstopped at once; the last checkpoint is kept.\n")
        os._exit(130)
