"""Where folders are: the cache, the shipped recipes, runs."""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import platformdirs

from iqlite.errors import IqliteError, PromptsError

RUNS = Path("runs")
"""Where runs go that nobody gives a place."""

SAFETY = Path(__file__).parent / "data" / "safety.jsonl"
"""The safety set that ships, in English; beside it those in other languages."""

MADE_FROM = "made-from.json"
"""In a converted model's folder in the cache: the file or model that it was made from."""


RECIPE, ENVIRONMENT = "recipe.toml", "environment.json"
"""What a run directory holds from its first moment on."""

RESULT = "result.json"
"""What it holds once training has ended."""


def exists(path: Path) -> bool:
    """True if there is something; IqliteError where the system won't say (a name that is too long, a folder that can't be looked into)."""
    try:
        if "\0" in str(path):  # Python 3.11 calls it a path that isn't there
            raise ValueError("a null character is in it")
        return path.exists()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise IqliteError(f"{str(path)[:200]!r} can't be looked at ({why}): name another path.") from None


def check_no_link(path: Path, option: str) -> None:
    """IqliteError for a symbolic link, or one where the new folder is made: what it leads to isn't replaced."""
    for one in (path, path.with_name(f".making-{path.name}")):
        exists(one)  # says what the system can't take as a path
        if one.is_symlink():
            raise IqliteError(
                f"{one} is a symbolic link, which isn't followed to replace what is there: remove it, or name another {option}."
            )


def path_of(text: str, beside: Path = Path()) -> Path:
    """A path as somebody wrote it, ~ expanded, looked up in `beside` if it is relative; IqliteError for what the system can't take as one."""
    try:
        path = beside / Path(text).expanduser()
    except RuntimeError:
        raise IqliteError(f"{text[:200]!r} names the home of somebody whom this computer doesn't know: write the path out.") from None
    except ValueError as error:
        raise IqliteError(f"{text[:200]!r} can't be looked at ({error}): name another path.") from None
    exists(path)
    return path


def is_run(path: Path) -> bool:
    """True if the folder is a run's: a user's own folder may hold a recipe.toml, but no environment beside it."""
    return (path / RECIPE).is_file() and (path / ENVIRONMENT).is_file()


def usual_rights(folder: Path) -> None:
    """Gives every file in a new folder the rights that the user's umask gave the folder: safetensors writes for nobody but its owner."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(folder.stat().st_mode & 0o666)


def cache_folder() -> Path:
    """IQLITE_CACHE, else the platform's cache folder."""
    if "IQLITE_CACHE" in os.environ:
        return Path(os.environ["IQLITE_CACHE"]).expanduser()
    return platformdirs.user_cache_path("iqlite", appauthor=False)


def note_origin(folder: Path, source: str) -> None:
    """Notes in a converted model's folder what it was made from, unless that stands there already; a disk may refuse."""
    with suppress(OSError):
        if not (folder / MADE_FROM).is_file():
            (folder / MADE_FROM).write_text(json.dumps({"from": source}) + "\n", "utf-8")


def making(name: str) -> Path:
    """Where this process makes something for the cache. What processes of this computer that are no more have left of it is removed."""
    import psutil

    start = f"making-{name}-{socket.gethostname()}-"
    for path in cache_folder().glob(f"{glob.escape(start)}*"):
        number = path.name.removeprefix(start).partition(".")[0]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(path, ignore_errors=True)
    return cache_folder() / f"{start}{os.getpid()}"


def shipped_recipes() -> Path:
    """The recipes folder: inside an installed package, or beside it in a clone."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "data" / "recipes", package.parent / "recipes") if folder.is_dir())


def safety_set(name: Path) -> Path:
    """A safety set that ships by its language (de, es), unless a file is called so; else the file itself. PromptsError if there is neither."""
    shipped = {language: SAFETY.with_name(f"safety-{language}.jsonl") for language in ("de", "es")}
    found = name if name.is_file() else shipped.get(str(name), name)
    if not found.is_file():
        known = ", ".join(shipped)
        raise PromptsError(f"--safety-set {name}: no such file; a path is relative to the folder you are in. By name there are {known}; English needs no option.")  # fmt: skip
    return found
