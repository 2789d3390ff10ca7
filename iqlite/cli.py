"""The command line: the app, the list of verbs, the one exit. No torch at the top."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from iqlite import __version__
from iqlite.commands import bench, chat, compare, export, init, merge, plan, probe, recipe, serve, train
from iqlite.commands.options import Verb, Verbs
from iqlite.errors import IqliteError

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
for module in (train, compare, init, recipe, plan, probe, bench, chat, serve, merge, export):
    name = module.__name__.rpartition(".")[2]
    app.command(name, cls=Verb, epilog="\b\nExamples:\n  " + "\n  ".join(module.EXAMPLES))(getattr(module, name))

NO_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""What tqdm, transformers and datasets ask before they draw a bar."""


def _version(value: bool) -> None:
    if value:
        print(f"iqlite {__version__}")
        raise typer.Exit


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def main() -> None:
    """The console script: errors for people are one sentence on standard error and exit code 2."""
    warnings.filterwarnings("ignore")  # libraries' advice to their callers isn't the user's business
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):  # a narrow encoding, as Windows gives redirected output, loses a sign and not the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():
        os.environ.update(dict.fromkeys(NO_BARS, "1"))
    try:
        app()
    except IqliteError as error:
        sys.stderr.write(f"iqlite: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
