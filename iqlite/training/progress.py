"""A run as a person sees it: a live bar on a terminal, a line a step elsewhere, and Ctrl-C that finishes the step first."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from iqlite.records import HELD_OUT_KL, StepMetrics
from iqlite.terminal import clean, duration
from iqlite.training.monitors import Verdict

BAR = 20  # cells
ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK")  # those that the platform has
PLAIN_SAMPLE = 160  # characters of an answer shown in progress


class TrainingView:
    """Progress of a run: a live bar on a terminal, a line a step elsewhere."""

    def __init__(self, out: Console, total: int, first: int = 1):
        self.out, self.total, self.started, self.first = out, total, time.monotonic(), first
        last = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))  # it may be cut
        self.progress = Progress(
            SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(BAR), TextColumn("left"), TimeRemainingColumn(), last,
            console=out, disable=not out.is_terminal, expand=True,
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
        work = f"{v['time/tokens_per_s']:.0f} tok/s  {v['memory/peak_gib']:.1f} GiB"
        found = f"reward {v['reward/mean']:+z.3f}  KL(π‖π̃) {v['kl/policy_superior']:z.3f}  KL(π‖ref) {v['kl/policy_reference']:z.3f}"
        if self.progress.disable:
            done = metrics.step - self.first + 1
            left = (time.monotonic() - self.started) / done * (total - metrics.step)
            held = f"  held-out KL {v[HELD_OUT_KL]:z.3f}" if HELD_OUT_KL in v else ""
            held += f", measure {v['eval/measure']:.2f} (base {v['eval/measure_base']:.2f})" if "eval/measure" in v else ""
            self.out.print(f"step {metrics.step}/{total}  {found}  {work}{held}  left {duration(left)}", markup=False)
        else:
            self.progress.update(self.task, completed=metrics.step, description=f"{work}  {found}")

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """A held-out answer on the way."""
        self.out.print(f"[dim]at step {step}[/] {clean(prompt, PLAIN_SAMPLE)} [dim]→[/] [italic]{clean(answer, PLAIN_SAMPLE)}[/]")

    def verdict(self, step: int, verdict: Verdict) -> None:
        """A monitor's warning or stop."""
        self.out.print(f"[{'bold red' if verdict.stop else 'yellow'}]step {step}: {escape(verdict.message)}[/]")


@contextmanager
def finish_the_step(out: Console) -> Iterator[Interrupt]:
    """Inside the block the first Ctrl-C (or a signal to end, or of a terminal that closes) only asks; a second Ctrl-C stops at once.

    What was told to be ignored stays so, as SIGHUP by nohup.
    """
    interrupt = Interrupt(out)
    signals = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    before = {s: signal.signal(s, interrupt) for s in signals if signal.getsignal(s) != signal.SIG_IGN}
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
            if number not in (signal.SIGINT, signal.SIGTERM):  # a terminal that closes says so more than once
                return
            sys.stderr.write("\nstopped at once; the last checkpoint is kept.\n")
            os._exit(130)
        self.asked = True
        self.out.print("[yellow]finishing this step, then writing a checkpoint (Ctrl-C again stops at once)[/]")
