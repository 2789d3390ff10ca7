"""The command line: the app, the list of verbs, the one exit. No torch at the top."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from iqlite import __version__
from iqlite.commands import (
    bench,
    chat,
    compare,
    doctor,
    eval,
    export,
    init,
    inspect,
    merge,
    plan,
    probe,
    push,
    recipe,
    report,
    runs,
    serve,
    train,
)
from iqlite.commands.options import Verb, Verbs, examples
from iqlite.errors import IqliteError
from iqlite.machine import ranks
from iqlite.machine.watch import mute
from iqlite.streams import lost, outlive
from iqlite.terminal import harmless

app = typer.Typer(
    name="iqlite",
    help="Describe a behaviour in words, and iqlite trains it into the weights, on the GPU you already own.",
    no_args_is_help=True,
    cls=Verbs,
    epilog="Tab completion in your shell: iqlite --install-completion",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (train, compare, eval, inspect, report, runs, init, recipe, plan, probe, bench, chat, serve, merge, export, push, doctor):
    name = module.__name__.rpartition(".")[2]
    app.command(name, cls=getattr(module, "VERB", Verb), epilog=examples(module.EXAMPLES))(getattr(module, name))

NO_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""What tqdm, transformers and datasets ask before they draw a bar."""


def _version(value: bool) -> None:
    if value:
        print(f"iqlite {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if ranks.rank() > 0 and context.invoked_subcommand != "train":  # of several processes one does what isn't shared out
        raise typer.Exit


def main() -> None:
    """The console script: errors for people are one sentence on standard error and exit code 2; what nobody foresaw is one, with exit code 1."""
    warnings.filterwarnings("ignore")  # libraries' advice to their callers isn't the user's business
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if ranks.rank() > 0:
        mute()
    outlive()
    survived = _Survived()
    logging.getLogger("iqlite").addHandler(survived)
    if not sys.stderr.isatty():
        os.environ.update(dict.fromkeys(NO_BARS, "1"))
    try:
        try:
            app()
        except SystemExit as done:
            if not done.code:
                lost()
            raise
    except IqliteError as error:
        ranks.fault(str(error), 2)
        sys.stderr.write(f"iqlite: {harmless(str(error))}\n")
        sys.exit(2)
    except Exception as error:  # what nobody foresaw becomes a sentence too
        from iqlite import unforeseen

        if os.environ.get(unforeseen.DEBUG):
            raise
        text = unforeseen.explain(error, sys.argv)
        ranks.fault(text, 1)
        sys.stderr.write(f"iqlite: {harmless(text)}\n")
        sys.exit(1)
    finally:
        logging.getLogger("iqlite").removeHandler(survived)


class _Survived(logging.Handler):
    """What went wrong and was survived, as a line on standard error: over a live bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes it."""
        sys.stderr.write(f"iqlite: {harmless(record.getMessage())}\n")


if __name__ == "__main__":
    main()
