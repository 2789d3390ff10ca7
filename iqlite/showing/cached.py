"""What the user's cache holds, what each was made from, and freeing it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from iqlite.base import dequantised, gguf_files
from iqlite.errors import RunError
from iqlite.integrity import drop
from iqlite.places import MADE_FROM, cache_folder
from iqlite.run.listing import measured
from iqlite.showing.runs import age, size
from iqlite.terminal import clean

CONVERSION = re.compile(r"(?P<method>[\w.-]+?)-(?P<digest>[0-9a-f]{32})-v(?P<version>\d+)")
MAKING = re.compile(r"making-.*-(?P<process>\d+)(?:\.out)?")
KNOWN = {
    "answers": "answers of bases, prompted bases and targets, so that a look, a probe and a comparison don't ask twice",
    "bench.json": "how fast this machine is, measured by iqlite bench",
    "chat-history": "what was typed in iqlite chat",
    "errors": "details of errors that nobody foresaw",
    "judgements.jsonl": "verdicts of judging models in iqlite probe",
    "unsloth": "code that unsloth compiled",
}
"""Files and folders with fixed names, and what they hold."""
KEPT = ("bench.json", "chat-history", "judgements.jsonl")  # nothing makes these again by itself


@dataclass(frozen=True)
class Entry:
    """One thing in the cache: `what` it is, the file or model it was `made_from` where that is known, when it was last written, whether a
    process has it open or is making it, and whether it is made again by itself when it is needed."""

    path: Path
    what: str
    made_from: str
    bytes: int
    changed: float
    in_use: bool
    made_again: bool

    def record(self) -> dict[str, Any]:
        """For --json."""
        return {"name": self.path.name, "what": self.what, "made_from": self.made_from, "bytes": self.bytes, "changed": self.changed, "in_use": self.in_use, "made_again": self.made_again}  # fmt: skip


def entries() -> list[Entry]:
    """What the cache holds, the largest first; [] where there is none."""
    folder = cache_folder()
    paths = [path for path in folder.iterdir() if not path.is_symlink()] if folder.is_dir() else []
    busy = _open_below(folder) if paths else set()
    found = []
    for path in paths:
        size, changed = measured(path) if path.is_dir() else (path.stat().st_size, path.stat().st_mtime)
        what, making, again = _what(path.name)
        found.append(Entry(path, what, _made_from(path), size, changed, path.name in busy or making, again))
    return sorted(found, key=lambda one: (-one.bytes, one.path.name))


def chosen(found: Sequence[Entry], names: Iterable[str]) -> list[Entry]:
    """Those of the names, or all that aren't in use and are made again by themselves; RunError for a name that isn't there or is in use."""
    known, named = {one.path.name: one for one in found}, list(dict.fromkeys(names))
    for name in named:
        if name not in known:
            raise RunError(f"{name}: the cache holds nothing of that name; iqlite runs cache shows what it holds.")
        if known[name].in_use:
            raise RunError(f"{name} is in use by another process: let it finish, then free it.")
    return [known[name] for name in named] or [one for one in found if one.made_again and not one.in_use]


def free(entry: Entry) -> None:
    """Removes one thing; RunError where the system won't."""
    try:
        if entry.path.is_dir():
            drop(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{entry.path} can't be removed ({error.strerror}): check the folder's rights.") from None


def show(out: Console, found: Sequence[Entry], nothing: str) -> None:
    """Two lines each: name, size, age and whether it is in use; what it is and what it was made from."""
    out.print(f"[dim]{clean(str(cache_folder()))}[/]" + ("" if found else f"  {nothing}"))
    width = max((len(one.path.name) for one in found), default=0)
    for one in found:
        busy = "  [cyan]in use[/]" if one.in_use else "" if one.made_again else "  [dim]removed by name only[/]"
        out.print(f"[bold]{clean(one.path.name):<{width}}[/]  {size(one.bytes):>7}  {age(time.time() - one.changed):>7} old{busy}")
        out.print(f"  [dim]{clean(one.what)}{f', from {clean(one.made_from)}' if one.made_from else ''}[/]")


def _what(name: str) -> tuple[str, bool, bool]:
    """(what something in the cache is, whether a process is making it now, whether it is made again by itself)."""
    if name in KNOWN:
        return KNOWN[name], False, name not in KEPT
    if making := MAKING.fullmatch(name):
        lives = psutil.pid_exists(int(making["process"]))
        return ("a conversion in the making" if lives else "left over by a conversion that was killed"), lives, True
    if found := CONVERSION.fullmatch(name):
        gguf = found["method"] == "gguf"
        today = gguf_files.CONVERSION if gguf else dequantised.CONVERSION
        what = "a GGUF file as plain weights" if gguf else f"weights stored as {found['method']}, dequantised"
        return what + ("" if int(found["version"]) == today else "; of another version of iqlite, which isn't read any more"), False, True
    if name.startswith(".old-"):
        return "left over by a removal that was cut short", False, True
    return "not known to this version of iqlite", False, False


def _made_from(path: Path) -> str:
    """The file or model that a conversion says it was made from; "" where none does."""
    try:
        found = json.loads((path / MADE_FROM).read_bytes())
        return str(found["from"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _open_below(folder: Path) -> set[str]:
    """Names in the folder of which one of this user's processes has a file open, or, where the system tells of that (Linux), mapped into its memory."""
    inside = str(folder.resolve()) + os.sep
    found: set[str] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            paths = [one.path for one in process.open_files()]
            maps = Path(f"/proc/{process.pid}/maps")  # psutil's own way adds up every page, which takes seconds
            paths += (
                [line.split(maxsplit=5)[5] for line in maps.read_text("utf-8", "replace").splitlines() if inside in line]
                if maps.exists()
                else []
            )
            found |= {Path(path.removeprefix(inside)).parts[0] for path in paths if path.startswith(inside)}
    return found
