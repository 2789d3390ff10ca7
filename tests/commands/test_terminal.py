"""What a person sees: nothing a model wrote is obeyed, durations read well, progress without a terminal is plain lines."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest
from rich.cells import cell_len
from rich.console import Console

from iqlite.records import StepMetrics
from iqlite.scoring.measures import tone, words
from iqlite.terminal import WordWrap, clean, duration, facts, harmless, painted, table
from iqlite.training.monitors import Verdict
from iqlite.training.progress import TrainingView, fewer, finish_the_step

VALUES = {"reward/mean": -0.2, "kl/policy_superior": 0.3, "kl/policy_reference": 0.1, "time/tokens_per_s": 20.0, "memory/peak_gib": 2.5}


def shown(width: int = 80, *, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, highlight=False, force_terminal=terminal, color_system=None), out


def test_clean_text_has_no_controls_and_no_markup() -> None:
    nasty = "a\x1b[31mred\x1b[0m\r\n\x07[bold]b[/bold]\u202ec\u2028d\x9b31m [link=http://x]e[/link]"
    out, buffer = shown(200)
    out.print(clean(nasty))
    printed = buffer.getvalue().rstrip("\n")
    assert all(c.isprintable() for c in printed)
    assert "[bold]b[/bold]" in printed and "[link=http://x]e[/link]" in printed
    assert clean("x" * 50, 10) == "x" * 9 + "…"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 42, 89, 90, 3 * 60, 5399, 2 * 3600 + 300)] == ["0 s", "42 s", "89 s", "2 min", "3 min", "1 h 30 min", "2 h 05 min"]  # fmt: skip


def test_text_of_all_languages_stays_text() -> None:
    """Joiners, wide and no-break spaces, soft hyphens, direction marks, and signs that this Python doesn't know: only controls are changed."""
    for text in (
        "می\u200cخواهم",
        "क्\u200dष",
        "a\u00a0b",
        "\u3000全角",
        "Schiff\u00adfahrt",
        "\u200fעברית\u200e",
        "👩\u200d👩\u200d👧",
        "\U0001fae9",
    ):
        assert harmless(text) == text and clean(text) == text
    assert harmless("a\x1b[31mb\x9bc\x07\ud800\td\n") == "a\ufffd[31mb\ufffdc\ufffd\ufffd d\n"
    assert clean("a\u2028b\x85c") == "a b c"


def test_progress_in_plain_lines_and_on_a_terminal() -> None:
    for terminal in (False, True):
        out, buffer = shown(200, terminal=terminal)
        with TrainingView(out, 20) as view:
            view.step(StepMetrics(1, VALUES), 20)
            view.sample(1, "[why]?", lambda: ("I [don't]", "be\x1b[2Jcause"))
            view.verdict(1, Verdict("kl", "too far [from] here."))
        text = buffer.getvalue()
        assert re.search(r"KL\(π‖π̃\) +0\.300", text) and "20 tok/s" in text and "left" in text
        assert "before → I [don't]" in text and "now    → be [2Jcause" in text
        assert "\x1b[2J" not in text and "[why]?" in text and "too far [from] here." in text
        assert ("step 1/20" in text) == (not terminal)


def test_words_are_broken_between_and_not_inside() -> None:
    for pieces in (["one two three  four\n", "five"], list("one two three  four\nfive")):
        lines = WordWrap(9, at=2)
        assert "".join(map(lines.add, pieces)) + lines.end() == "one two\nthree  \nfour\nfive"
    wide = WordWrap(6)
    assert wide.add("日本語文") == "日本語\n文"  # shown at once, three to a line
    assert WordWrap(4).add("http://there is ") == "http://there is "
    exact = WordWrap(3)
    assert exact.add("abc def ") == "abc\ndef"  # no space runs over the edge


def test_at_80_columns_step_and_time_left_come_first() -> None:
    out, buffer = shown(80, terminal=True)
    with TrainingView(out, 400) as view:
        view.step(StepMetrics(123, VALUES), 400)
    lines = [line for line in re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", buffer.getvalue()).replace("\r", "\n").splitlines() if "123" in line]
    assert re.match(r". step 123/400 [━╸╺ ]{20} left [-:0-9]+ 20 tok/s  2\.5 GiB", lines[-1]) and len(lines[-1]) <= 80


def test_curves_fill_the_width_and_nothing_is_wider() -> None:
    """At 80 columns two curves a row, at 200 three, at 40 one; the shape is that of the values; a low terminal has the bar alone."""
    for width, height, across in ((80, 24, 2), (200, 50, 3), (40, 40, 1), (80, 8, 0)):
        out = io.StringIO()
        console = Console(file=out, width=width, height=height, force_terminal=True, color_system=None, highlight=False)
        view = TrainingView(console, 400, measure="tone")
        for step in range(1, 101):
            values = {**VALUES, "reward/mean": -step, "response/length": float(step % 2), "eval/measure": 0.5, "eval/measure_base": 0.25}
            view.step(StepMetrics(step, values), 400)
        console.print(view)
        lines = out.getvalue().rstrip("\n").split("\n")
        assert all(cell_len(line) <= width for line in lines), lines
        assert "step 100/400" in lines[0]
        assert len(lines) == 1 + (-(-5 // across) if across else 0)
        if across > 1:
            drawn = re.search(r"reward +-100\.0 (\S+)", lines[1])
            assert drawn and drawn[1] == "".join(sorted(drawn[1], reverse=True)) and drawn[1][0] == "█" and drawn[1][-1] == "▁"
            assert "(base 0.25)" in out.getvalue()


def test_answers_go_on_below_their_beginning_and_one_value_is_no_curve() -> None:
    out, buffer = shown(40, terminal=True)
    with TrainingView(out, 4) as view:
        view.step(StepMetrics(1, VALUES), 4)
        view.sample(1, "Why?", lambda: ("one two three four five six seven", "so"))
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", buffer.getvalue()).replace("\r", "\n").splitlines()]
    at = lines.index("  before → one two three four five six")
    assert lines[at + 1] == "           seven" and "  now    → so" in lines
    assert "▄" not in buffer.getvalue() and "-0.200" in buffer.getvalue()


def test_fewer_values_are_means_of_neighbours() -> None:
    assert fewer([1.0, 2.0, 3.0], 5) == [1.0, 2.0, 3.0]
    assert fewer([float(n) for n in range(10)], 3) == [1.0, 4.0, 7.5]


def test_a_terminal_that_can_t_move_its_cursor_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out, buffer = shown(80, terminal=True)
    with TrainingView(out, 20) as view:
        view.step(StepMetrics(1, VALUES), 20)
    assert buffer.getvalue().startswith("step 1/20") and "\x1b" not in buffer.getvalue()


def test_answers_are_drawn_no_more_often_than_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last always; between them only while drawing has taken under a hundredth of the time."""
    clock = [0.0]
    monkeypatch.setattr("iqlite.training.progress.time.monotonic", lambda: clock[0])
    out, buffer = shown()
    asked = []

    def draw(step: int) -> tuple[str, str]:
        asked.append(step)
        clock[0] += 3.0
        return "a", "b"

    view = TrainingView(out, 20)
    for step in range(0, 21):
        clock[0] += 37.0
        view.sample(step, "why?", partial(draw, step))
    assert asked == [1, 8, 16, 20]
    assert buffer.getvalue().count("why?") == 4


def test_painted_tokens_have_signs_where_there_are_no_colours() -> None:
    pieces, values = ["So", " nice", " [b]", " the", "\x1b[2J", "\n"], [0.0, 2.0, 0.6, 0.1, -0.7, -2.0]
    assert painted(pieces, values, None).plain == "So {++nice} {+[b]} the{-\ufffd[2J}\n"
    for colours in ("standard", "truecolor", "256"):
        text = painted(pieces, values, colours)
        assert text.plain == "So nice [b] the\ufffd[2J\n" and len(text.spans) >= 4
    assert {str(span.style) for span in painted(pieces, values, "standard").spans} == {"black on green", "green", "red", "white on red"}
    assert painted([], [], None).plain == ""


def test_nothing_is_minus_zero() -> None:
    out, buffer = shown(200)
    with TrainingView(out, 20) as view:
        view.step(StepMetrics(1, {**VALUES, "reward/mean": -1e-5, "kl/policy_reference": -1e-6}), 20)
    assert "reward +0.000" in buffer.getvalue() and "KL(π‖ref) 0.000" in buffer.getvalue()
    out, buffer = shown(200, terminal=True)
    with TrainingView(out, 20) as view:
        view.step(StepMetrics(1, {**VALUES, "reward/mean": -1e-5, "kl/policy_reference": -1e-6}), 20)
    assert re.search(r"reward +\+0\.000", buffer.getvalue()) and "-0.000" not in buffer.getvalue()


def test_no_bars_of_libraries_where_no_terminal_is() -> None:
    code = (
        "import sys; sys.argv = ['iqlite', '--version']\nfrom iqlite.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "import tqdm, tqdm.auto, datasets, transformers\n"
        "for bar in (tqdm.tqdm, tqdm.auto.tqdm, transformers.utils.logging.tqdm): list(bar(range(3)))\n"
        "datasets.Dataset.from_list([{'a': 1}]).map(lambda row: row)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.startswith("iqlite ")


def test_tables_and_facts_escape_what_they_show() -> None:
    out, buffer = shown()
    facts(out, {"base": "[red]x[/red]", "run": "runs/[1]"})
    out.print(table("t", ("a", "b"), [("x", "1")]))
    assert "[red]x[/red]" in buffer.getvalue() and "runs/[1]" in buffer.getvalue()


def test_the_first_interrupt_asks_and_the_handlers_come_back() -> None:
    out, buffer = shown()
    before = signal.getsignal(signal.SIGINT)
    with finish_the_step(out) as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
    assert signal.getsignal(signal.SIGINT) is before
    assert "finishing this step" in buffer.getvalue()


def test_code_measures() -> None:
    assert tone("What a lovely, wonderful day!") > 0.5 > -0.5 > tone("A terrible, miserable, hopeless day.")
    assert tone("") == 0.0
    assert words("  two   words\n") == 2


def test_long_facts_go_on_below_their_beginning() -> None:
    rows = {"base": "a", "behaviour": "one two three four five six", "run": "runs/" + "x" * 30}
    out, buffer = shown(30, terminal=True)
    facts(out, rows)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    assert lines == [
        "base       a",
        "behaviour  one two three four",
        "           five six",
        "run        runs/" + "x" * 14,
        " " * 11 + "x" * 16,
    ]
    buffer = io.StringIO()
    facts(Console(file=buffer, width=30, soft_wrap=True, highlight=False), rows)
    assert "behaviour  one two three four five six\n" in buffer.getvalue()  # a pipe's lines stay whole
