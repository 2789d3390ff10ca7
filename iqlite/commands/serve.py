"""`iqlite serve`: base, prompted base, policy and superior policy behind OpenAI's API, and a page to hear them side by side."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer

from iqlite.commands.options import Base, Which
from iqlite.errors import RunError
from iqlite.terminal import clean
from iqlite.terminal import console as terminal

EXAMPLES = (
    "iqlite serve runs/cheerful-135m",
    "iqlite serve runs/kind --host 0.0.0.0 --key LONG-RANDOM-WORD",
)


def serve(
    run: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="A run directory; further runs on the same base are models by their names.")
    ],
    host: Annotated[str, typer.Option(help="Where to listen; anywhere but on this computer needs --key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 is any that is free.")] = 8765,
    key: Annotated[
        str | None,
        typer.Option(envvar="IQLITE_SERVE_KEY", help="Key that clients must send; the variable keeps it out of lists of processes."),
    ] = None,
    which: Which = "adapter",
    base: Base = None,
    queue: Annotated[int, typer.Option(min=1, help="Answers that may wait; more are refused with status 429.")] = 256,
) -> None:
    """Serve a run to every OpenAI client, and a chat page.

    The models are base, prompted, policy and superior, decoded in batches on one copy of the base.
    """
    from iqlite.run.rundir import RunDir, check_adapter_of
    from iqlite.serving.running import LOCALHOST, address, bound, check_installed

    console = terminal()
    if key is not None and not (key.strip() and key.isascii() and key.isprintable()):
        raise RunError("--key is empty or holds letters that no header can carry: give printable ASCII, such as a long random word.")
    if host not in LOCALHOST and key is None:
        said = f"--host {host} can be reached from elsewhere, so that it needs a key: --key {secrets.token_hex(16)}, for example."
        raise RunError(said)
    check_installed()
    first, *rest = [RunDir.open(path, base) for path in run]
    first.check_base()
    adapters = [one.trained(which) for one in (first, *rest)]
    for adapter in adapters:
        check_adapter_of(first, adapter)
    names = names_of([one.path for one in rest])
    made = bound(host, port)

    from iqlite.chat.speaker import Speaker
    from iqlite.serving.app import make_app
    from iqlite.serving.batcher import Batcher
    from iqlite.serving.running import server
    from iqlite.serving.voices import Voices

    def say(text: str) -> None:
        console.print(f"[dim]{clean(text)}[/]")

    speaker = Speaker.of_recipe(first.recipe(), adapters[0], first.environment()["placement"], say)
    assert speaker.session is not None
    voices = Voices(speaker, dict(zip(names, adapters[1:], strict=True)))
    batcher = Batcher(voices, speaker.session.sizes, room=queue)
    try:
        made.listen()  # who asks as soon as the address is printed waits, and isn't refused
        url = address(made)
        console.print(f"models  {', '.join(clean(name) for name in voices.by_name)}")
        console.print(f"page    {url}", markup=False)
        console.print(f"API     {url}/v1" + ("" if key is None else "  (with the key)") + "\n[dim]Ctrl-C stops it.[/]")
        server(make_app(voices, batcher, key, first.path.resolve().name)).run(sockets=[made])
    except KeyboardInterrupt:
        pass
    finally:
        batcher.close()


def names_of(paths: list[Path]) -> list[str]:
    """A model's name for each further run: its folder's, with a number where that is taken."""
    found: list[str] = []
    for path in paths:
        name, number = path.resolve().name, 2
        while name in found or name in ("base", "prompted", "policy", "superior"):
            name, number = f"{path.resolve().name}-{number}", number + 1
        found.append(name)
    return found
