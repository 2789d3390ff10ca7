"""What a person sees: rich tables and progress on a terminal, plain lines elsewhere, and nothing a model wrote left unescaped."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from iqlite.intervals import Estimate
from iqlite.monitors import HELD_OUT_KL, Verdict
from iqlite.records import StepMetrics

UNTRAINED_TO_REFUSE = 0.9  # share of harmful requests that the base grants from which on it can't lose its refusals; ours
PLAIN_SAMPLE = 160  # characters of an answer shown in progress


def console(*, stderr: bool = False) -> Console:
    """A console that keeps long lines whole when it isn't a terminal."""
    out = Console(stderr=stderr, highlight=False, emoji=False)  # :100: in an answer stays what the model wrote
    return out if out.is_terminal else Console(stderr=stderr, highlight=False, emoji=False, soft_wrap=True)


def clean(text: str, longest: int | None = None) -> str:
    """A model's text for a terminal: control characters and markup are made visible or harmless, line ends become spaces."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if longest is not None and len(flat) > longest:
        flat = flat[: longest - 1] + "…"
    return escape(flat)


def harmless(text: str) -> str:
    """A model's text as it may be written to a terminal: line ends stay, other control characters become visible."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "\ufffd" for c in text)


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
    """Label and value, a line each."""
    width = max(map(len, rows))
    for label, value in rows.items():
        out.print(f"[dim]{label:<{width}}[/]  {escape(value)}")


class TrainingView:
    """Progress of a run: a live bar on a terminal, a line a step elsewhere."""

    def __init__(self, out: Console, total: int, first: int = 1):
        self.out, self.total, self.started, self.first = out, total, time.monotonic(), first
        self.progress = Progress(
            SpinnerColumn(), TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=out, disable=not out.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("first rollout …", total=total, completed=first - 1)

    def __enter__(self) -> TrainingView:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, metrics: StepMetrics, total: int) -> None:
        """One step done."""
        v = metrics.values
        line = (
            f"reward {v['reward/mean']:+.3f}  KL(π‖π̃) {v['kl/policy_superior']:.3f}  KL(π‖ref) {v['kl/policy_reference']:.3f}  "
            f"{v['time/tokens_per_s']:.0f} tok/s  {v['memory/peak_gib']:.1f} GiB"
        )
        if self.progress.disable:
            done = metrics.step - self.first + 1
            left = (time.monotonic() - self.started) / done * (total - metrics.step)
            held = f"  held-out KL {v[HELD_OUT_KL]:.3f}" if HELD_OUT_KL in v else ""
            held += f", measure {v['eval/measure']:.2f} (base {v['eval/measure_base']:.2f})" if "eval/measure" in v else ""
            self.out.print(f"step {metrics.step}/{total}  {line}{held}  left {duration(left)}", markup=False)
        else:
            self.progress.update(self.task, completed=metrics.step, description=line)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """A held-out answer on the way."""
        self.out.print(f"[dim]at step {step}[/] {clean(prompt, PLAIN_SAMPLE)} [dim]→[/] [italic]{clean(answer, PLAIN_SAMPLE)}[/]")

    def verdict(self, step: int, verdict: Verdict) -> None:
        """A monitor's warning or stop."""
        self.out.print(f"[{'bold red' if verdict.stop else 'yellow'}]step {step}: {escape(verdict.message)}[/]")


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


def show_safety(console: Console, safe: Mapping[str, Any]) -> None:
    """The figures before and after, what they mean where they surprise, and what got worse."""
    shares = {"harmful_compliance": "harmful requests granted", "over_refusal": "harmless requests refused"}
    gaps = {"tone_gap": "gap in tone between groups of people", "refusal_gap": "gap in refusals between them"}
    names = list(safe["figures"])
    cells = [
        [what, *(Estimate(**safe["figures"][n][key]).percent() for n in names)]
        for key, what in shares.items()
        if safe["figures"][names[0]][key] is not None
    ]
    cells += [
        [what, *(f"{safe['figures'][n][key]:.2f}" for n in names)]
        for key, what in gaps.items()
        if safe["figures"][names[0]][key] is not None
    ]
    if cells:
        console.print(table(f"safety, greedy answers to {clean(safe['set'])}", ["", *names], cells))
    granted = safe["figures"][names[0]]["harmful_compliance"]
    if granted is not None and granted["value"] >= UNTRAINED_TO_REFUSE:
        console.print("[dim]this base was never taught to refuse, so that it can't lose it; many small models are like that[/]")
    for sentence in safe["worse"]:
        console.print(f"[bold yellow]{clean(sentence[0].upper() + sentence[1:])}[/]")


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


@contextmanager
def finish_the_step(out: Console) -> Iterator[Interrupt]:
    """Inside the block the first Ctrl-C (or a termination signal) only asks; the second stops at once."""
    interrupt = Interrupt(out)
    signals = [signal.SIGINT, signal.SIGTERM]
    before = {s: signal.signal(s, interrupt) for s in signals}
    try:
        yield interrupt
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


class Interrupt:
    """Whether the user asked to stop."""

    def __init__(self, out: Console):
        self.out, self.asked = out, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            sys.stderr.write("\nstopped at once; the last checkpoint is kept.\n")
            os._exit(130)
        self.asked = True
        self.out.print("[yellow]finishing this step, then writing a checkpoint (Ctrl-C again stops at once)[/]")
