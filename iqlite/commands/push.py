"""`iqlite push`: a run's adapter on the hub, for PEFT and whoever is let in."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from iqlite.base.names import hub_name, is_hub_id
from iqlite.commands.options import Base, Json, Which
from iqlite.errors import RunError
from iqlite.terminal import clean, facts
from iqlite.terminal import console as terminal

EXAMPLES = (
    "iqlite push runs/cheerful-135m me/cheerful-135m",
    "iqlite push runs/mine me/mine --which best --public",
)


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/cheerful-135m.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; made if it isn't there.")],
    which: Which = "adapter",
    public: Annotated[bool, typer.Option("--public", help="A new repository is for everybody; without this it is yours alone.")] = False,
    base: Base = None,
    force: Annotated[bool, typer.Option("--force", help="Push onto a repository that holds files of others.")] = False,
    as_json: Json = False,
) -> None:
    """Push a run's adapter to the Hugging Face hub.

    As export --to peft writes it, with its model card. A new repository is private.
    """
    if not is_hub_id(repo):
        raise RunError(f"{repo!r} isn't a repository's name: give OWNER/NAME.")
    from iqlite.run.rundir import RunDir, check_adapter_of

    run_dir = RunDir.open(run, base)
    adapter = run_dir.trained(which)
    check_adapter_of(run_dir, adapter)

    from iqlite.export.pushing import check_token, exists, look, push_folder

    console = terminal(stderr=as_json)
    check_token()
    there = look(repo, force=force)
    name = hub_name(run_dir.environment()["base"]["name"])
    known = name if is_hub_id(name) and exists(name) else None

    from iqlite.export.card import manifest, model_card, public_name, warnings, write_about
    from iqlite.export.folder import licence_of, opened
    from iqlite.export.peft import write_peft

    console.print(f"[dim]reading {clean(str(run))}/{which}[/]")
    merge, chat = opened(run_dir, adapter, base="trained", scale=1.0, dtype=None)
    about = manifest(run_dir, adapter, chat, licence_of(merge.stored), {"format": "peft", "scale": 1.0})
    with tempfile.TemporaryDirectory() as folder:
        write_peft(Path(folder), adapter, chat, base_model=known or public_name(name))
        write_about(Path(folder), about, peft=True)
        (Path(folder) / "README.md").write_text(model_card(about, peft=True, base_model=known), "utf-8")
        url = push_folder(Path(folder), repo, there, private=not public, message=f"iqlite: {run_dir.path.resolve().name}, {which}")
    private = there.private if there.files is not None else not public
    if as_json:
        print(
            json.dumps(
                {"repo": repo, "url": url, "new": there.files is None, "private": private, "base_model": known, "warnings": warnings(about)}
            )
        )
        return
    facts(console, {"pushed": repo, "commit": url, "seen by": "you alone" if private else "everybody"})
    if known is None:
        console.print("[yellow]The base isn't a model of the hub: the card names none, and nobody else can load the adapter without it.[/]")
    for sentence in warnings(about):
        console.print(f"[yellow]{clean(sentence)}[/]")
