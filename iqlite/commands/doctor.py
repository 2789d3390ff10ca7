"""`iqlite doctor`: what is here, what is missing, and what to type."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from iqlite import __version__
from iqlite.commands.options import Json
from iqlite.terminal import clean
from iqlite.terminal import console as terminal

EXAMPLES = ("iqlite doctor",)
SIGNS = {"ok": "[green]ok[/]", "missing": "[yellow]–[/]", "wrong": "[bold red]wrong[/]"}


def doctor(as_json: Json = False) -> None:
    """Look whether everything that iqlite needs is here.

    Python, torch and its driver, the card, a product in 4 bits, memory, disk, hub, tools. Changes nothing; exit code 1 if something is wrong.
    """
    from iqlite.machine.checks import checks, system

    console, found = terminal(stderr=as_json), []
    if not as_json:
        console.print(f"iqlite {__version__} on {clean(system())}")
    for check in checks():
        found.append(check)
        if not as_json:
            console.print(
                f"{SIGNS[check.state]}{' ' * (5 - len(check.state if check.state != 'missing' else '–'))}  {check.name:<10}  {clean(check.found)}"
            )
            if check.fix:
                console.print(f"       {'':<10}  → {clean(check.fix)}")
    wrong = [check.name for check in found if check.state == "wrong"]
    if as_json:
        print(json.dumps({"iqlite": __version__, "system": system(), "ok": not wrong, "checks": [asdict(check) for check in found]}))
    else:
        console.print(f"[bold red]to be mended: {', '.join(wrong)}[/]" if wrong else "[green]everything that iqlite needs is here[/]")
    raise typer.Exit(1 if wrong else 0)
